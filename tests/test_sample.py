"""Tests of sample.py: answers, their scores, the evaluation, and the sentences for what cannot be done."""

import csv
import json
import os
import random
import shutil
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import inside, launch, make_model, read_log, refused, train
from PIL import Image
from test_model import pad, random_image, row
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import sample
from dataloader import get_tokenizer
from evaluate import Evaluation, map_across_ranks, mark_low_confidence, plain_text, score, similarity, warn_of_collapse
from patches import collate_images
from sample import DEFAULTS, ONE_PROCESS, prompt_example


def ask(run_dir, *words, run=inside, **kwargs):
    return run('sample.py', f'--out_dir={run_dir}', '--device=cpu', '--max_new_tokens=6', *words, **kwargs)


def last_eval(run_dir):
    return [row['eval'] for row in read_log(run_dir) if 'eval' in row][-1]


@pytest.fixture(scope='module')
def line(tmp_path_factory):
    path = tmp_path_factory.mktemp('images') / 'line.png'
    Image.effect_noise((90, 20), 80).save(path)
    return str(path)


@pytest.fixture(scope='module')
def text_run(tmp_path_factory):
    """The out_dir of a text-only run."""
    out_dir = tmp_path_factory.mktemp('text')
    process = train(out_dir, '--vision_encoder=', '--tasks=text', '--eval_samples=0')
    assert process.returncode == 0, process.stderr
    return out_dir


# ---------------------------------------------------------------------------------------------------------------------
# scores

def edit_distance(a, b):
    """Levenshtein's, as it is defined."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def test_scores():
    assert score(['abc', 'xx'], ['abc', 'xyz']) == {'cer': 2 / 6, 'exact': 0.5}
    # a fluent, short, wrong answer is no better than none
    assert score(['a large clock'], ['the meeting starts at nine'])['cer'] > 0.7
    assert score([], []) == {'cer': 0, 'exact': 0}


def test_cer_is_the_edit_distance_and_fast_for_pages():
    rng = random.Random(0)
    for a, b in (('', ''), ('abc', ''), ('', 'abc'), ('kitten', 'sitting'), ('ab', 'ba'), ('naïve\U0001f40b', 'naive')):
        assert score([a], [b])['cer'] == edit_distance(a, b) / max(1, len(b))
    for _ in range(50):
        a, b = (''.join(rng.choices('abcé ', k=rng.randint(1, 30))) for _ in range(2))
        assert score([a], [b])['cer'] == edit_distance(a, b) / len(b)
    a, b = (''.join(rng.choices('abcdefgh ', k=4000)) for _ in range(2))
    start = time.time()
    score([a] * 8, [b] * 8)
    assert time.time() - start < 1  # it took 5 s a page in Python


# ---------------------------------------------------------------------------------------------------------------------
# answers

def test_only_the_answer_goes_to_stdout_and_it_is_deterministic(run_dir, line):
    answers = [ask(run_dir, '--image', line, run=launch) for _ in range(2)]
    assert answers[0].returncode == 0, answers[0].stderr
    assert answers[0].stdout == answers[1].stdout and answers[0].stdout.count('\n') >= 1
    assert 'parameters' in answers[0].stderr and 'parameters' not in answers[0].stdout


def test_several_samples_several_images_and_a_seed(run_dir, line):
    words = ['--image', line, line, '--prompt=Compare <image> with <image>.', '--num_samples=2', '--temperature=1',
             '--top_k=50', '--top_p=0.9']
    first, again, other = (ask(run_dir, *words, f'--seed={s}') for s in (1, 1, 2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout != other.stdout and first.stdout.count('---------------') == 1


def test_chat_loop(run_dir, line):
    process = ask(run_dir, '--image', line, '--interactive', run=launch, input='What is it?\nSure?\n\n')
    assert process.returncode == 0, process.stderr
    assert process.stderr.count('> ') == 3


def test_without_chat_the_prompt_is_continued(run_dir):
    process = ask(run_dir, '--chat=no', '--prompt=def ')
    assert process.returncode == 0 and process.stdout.startswith('def ')


def test_without_out_dir_the_newest_run_answers(run_dir, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(inside('sample.py', '--image', line), 'no checkpoint under out/: train one first', '--out_dir or --init_from')
    for age, name in ((300, 'a'), (100, 'b/c'), (200, 'd')):
        (tmp_path / 'out' / name).mkdir(parents=True)
        path = shutil.copy(run_dir / 'ckpt.pt', tmp_path / 'out' / name)
        os.utime(path, times=(time.time() - age,) * 2)
    process = inside('sample.py', '--image', line, '--max_new_tokens=6')
    assert process.returncode == 0 and 'out/b/c: newest run' in process.stderr, process.stderr
    assert process.stdout == ask(run_dir, '--image', line).stdout
    shutil.copy(run_dir / 'ckpt.pt', tmp_path / 'out')  # train.py's own out_dir
    assert 'out: newest run' in inside('sample.py', '--image', line, '--max_new_tokens=6').stderr
    shutil.copy(run_dir / 'ckpt_best.pt', tmp_path / 'out' / 'a')
    process = inside('sample.py', '--image', line, '--max_new_tokens=6', '--checkpoint=ckpt_best.pt')
    assert process.returncode == 0 and 'out/a: newest run' in process.stderr, process.stderr


def test_images_come_first_unless_the_prompt_has_image_marks():
    content = lambda text, images: prompt_example(text, images, as_chat=True)['messages'][0]['content']
    assert content('What?', [1, 2]) == '<image>\n<image>\nWhat?'
    assert content('', [1]) == '<image>'
    assert content('a <image> b', [1]) == 'a <image> b'
    assert prompt_example('Once', [1], as_chat=False) == {'text': 'Once<image>', 'images': [1]}
    assert prompt_example('a <image> b', [1], as_chat=False)['text'] == 'a <image> b'


def test_mistakes_are_refused_in_a_sentence(run_dir, line, tmp_path):
    refused(inside('sample.py', f'--out_dir={tmp_path}'), 'no checkpoint at', 'train one first')
    refused(ask(run_dir, '--image', 'gone.png'), 'no image at gone.png')
    (tmp_path / 'zero.png').write_bytes(b'')
    refused(ask(run_dir, '--image', tmp_path / 'zero.png'), 'zero.png is not an image')
    Image.new('RGB', (20000, 1)).save(tmp_path / 'thin.png')
    refused(ask(run_dir, '--image', tmp_path / 'thin.png'), '20000x1 pixels is too elongated')
    refused(ask(run_dir, '--image', line, '--prompt=<image> <image>'), '1 images, but its text has 2 <image>')
    refused(ask(run_dir, '--prompt=' + 'x' * 100), 'the prompt takes 102 positions, but block_size is 48')
    refused(ask(run_dir, '--eval=gone.jsonl'), "no dataset 'gone.jsonl'")
    (tmp_path / 'broken.jsonl').write_text('{"messages": []\n')
    refused(ask(run_dir, f'--eval={tmp_path}/broken.jsonl'), 'broken.jsonl, line 1 is not JSON')
    refused(ask(run_dir, '--tokenizer=gpt9'), 'tokenizer must be')
    refused(ask(run_dir, '--chat=perhaps'), '--chat must be')
    refused(ask(run_dir, '--dtype=int8'), '--dtype must be')


def test_a_malicious_pickle_is_not_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / 'executed'), 'w')

    torch.save({'model': {}, 'model_args': Malicious()}, tmp_path / 'ckpt.pt')
    refused(inside('sample.py', f'--out_dir={tmp_path}'), 'is refused', 'run code when opened')
    refused(inside('train.py', f'--out_dir={tmp_path}', '--init_from=resume'), 'is refused')
    assert not (tmp_path / 'executed').exists()


def test_a_text_only_model_refuses_images(text_run, line):
    refused(ask(text_run, '--image', line), 'is text-only: it was trained without a vision_encoder')
    process = ask(text_run, '--prompt=The ')
    assert process.returncode == 0 and process.stdout.startswith('The ')


# ---------------------------------------------------------------------------------------------------------------------
# confidence

def test_logprobs_are_those_of_the_logits(tiny_model):
    image = random_image(1)
    idx = pad([row(5, image, 7), row(9, 3, 2)])
    lengths = (idx >= 0).sum(1)
    images = collate_images([image], tiny_model.config)
    out, logprobs = tiny_model.generate(idx, 5, 0, images=images, lengths=lengths, return_logprobs=True)
    assert torch.equal(out, tiny_model.generate(idx, 5, 0, images=images, lengths=lengths))
    for b, n in enumerate(lengths):
        whole = out[b, :n + 5][None]
        logits = tiny_model.logits(whole, images if b == 0 else None)
        logits[..., 256] = -float('inf')  # <image> is never generated
        expected = logits.log_softmax(-1)[0, n - 1:n + 4].gather(-1, whole[0, n:n + 5, None])[:, 0]
        torch.testing.assert_close(logprobs[b, n:n + 5], expected, atol=1e-4, rtol=1e-4)
        assert (logprobs[b, :n] == 0).all()


def test_a_low_confidence_word_is_marked_whole():
    enc = sample.get_tokenizer('bytes')
    text = 'a red \u00e9cole, yes'
    ids, p = enc.encode(text), [-0.01] * len(text.encode())
    assert mark_low_confidence(enc, ids, p) == text
    p[7] = -0.7  # the second byte of a letter; log 0.5 is -0.69
    assert mark_low_confidence(enc, ids, p) == 'a red [\u00e9cole,?] yes'
    p[7], p[6] = -0.69, -9  # its first
    assert mark_low_confidence(enc, ids, p) == 'a red [\u00e9cole,?] yes'
    p[6], p[5] = -0.01, -9  # a space belongs to no word
    assert mark_low_confidence(enc, ids, p) == text
    whale = enc.encode('a \U0001f40b b')
    for doubtful in range(2, 6):  # each byte of a character of four
        p = [-9 if i == doubtful else -0.01 for i in range(len(whale))]
        assert mark_low_confidence(enc, whale, p) == 'a [\U0001f40b?] b'


def test_space_around_an_answer_belongs_to_the_template():
    assert plain_text(' a  cat\n', {'messages': []}) == 'a  cat'
    assert plain_text(' a cat', {'text': 'Once'}) == ' a cat'


def test_logprobs_are_printed_and_do_not_change_the_answer(run_dir, line):
    plain, marked = (ask(run_dir, '--image', line, *words) for words in ([], ['--logprobs']))
    assert marked.returncode == 0 and 'mean log-probability of a token: -' in marked.stderr, marked.stderr
    assert '?]' in marked.stdout and '?]' not in plain.stdout  # after four steps it is confident of nothing
    assert marked.stdout.replace('[', '').replace('?]', '') == plain.stdout.replace('[', '').replace('?]', '')


def test_a_folder_is_captioned_and_other_files_are_skipped(run_dir, tmp_path):
    for i in range(5):
        Image.effect_noise((60 + i, 20), 80).save(tmp_path / f'{i}.png')
    (tmp_path / 'notes.txt').write_text('no image')
    process = ask(run_dir, '--image', tmp_path, '--prompt=What?', '--batch_size=2')
    assert process.returncode == 0 and 'skipped' in process.stderr and 'notes.txt' in process.stderr, process.stderr
    with open(run_dir / 'captions.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [r['image'] for r in rows] == [f'{i}.png' for i in range(5)] and all(float(r['logprob']) < 0 for r in rows)
    alone = ask(run_dir, '--image', tmp_path / '3.png', '--prompt=What?')
    assert rows[3]['caption'] == alone.stdout.rstrip('\n')
    assert Image.open(run_dir / 'captions.png').width > 400
    (tmp_path / 'empty').mkdir()
    refused(ask(run_dir, '--image', tmp_path / 'empty'), 'no image in')


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def test_eval_scores_a_file_and_writes_a_table_and_a_sheet(run_dir, tmp_path):
    Image.new('RGB', (40, 16), 'white').save(tmp_path / 'a.png')
    rows = [{'messages': [{'role': 'user', 'content': '<image>'}, {'role': 'assistant', 'content': f'answer {i}'}],
             'images': ['a.png']} for i in range(5)]
    (tmp_path / 'test.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    process = ask(run_dir, f'--eval={tmp_path}/test.jsonl', '--batch_size=2')
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result['n'] == 5
    assert set(result) == {'val_loss', 'blank_loss', 'shuffled_loss', 'cosine', 'text_loss', 'n', 'cer', 'exact'}
    with open(run_dir / 'eval.csv', newline='', encoding='utf-8') as f:
        table = list(csv.DictReader(f))
    assert [r['reference'] for r in table] == [f'answer {i}' for i in range(5)]
    assert sum(int(r['edits']) for r in table) / sum(len(r['reference']) for r in table) == pytest.approx(result['cer'])
    assert Image.open(run_dir / 'eval.png').width > 400


def test_eval_of_the_runs_dataset_equals_the_training_log(run_dir):
    process = ask(run_dir, '--eval=pydoc', '--eval_samples=4')
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result == last_eval(run_dir) and result['n'] == 4
    assert {'val_loss', 'blank_loss', 'shuffled_loss', 'text_loss', 'cer', 'exact'} <= set(result)


def test_eval_of_models_without_vision_and_without_knobs(text_run, tmp_path):
    process = ask(text_run, '--eval=pydoc', '--eval_samples=4')
    assert process.returncode == 0 and json.loads(process.stdout) == last_eval(text_run), process.stderr
    (tmp_path / 'plain.jsonl').write_text('\n'.join(json.dumps({'text': f'Line {i} of a text.'}) for i in range(3)))
    process = ask(text_run, f'--eval={tmp_path}/plain.jsonl')
    assert process.returncode == 0 and set(json.loads(process.stdout)) == {'val_loss'}, process.stderr
    checkpoint = torch.load(text_run / 'ckpt.pt', weights_only=True)  # as nanoGPT leaves it
    torch.save({key: checkpoint[key] for key in ('model', 'model_args')}, tmp_path / 'ckpt.pt')
    process = ask(tmp_path, '--eval=pydoc', '--tokenizer=bytes', '--batch_size=2')
    assert process.returncode == 0 and set(json.loads(process.stdout)) == {'val_loss'}, process.stderr


def test_training_and_eval_score_references_as_captions(tmp_path):
    for i in range(4):
        Image.new('RGB', (24, 16), (200, i, 0)).save(tmp_path / f'{i}.png')
    rows = [{'text': '<image>Red one.', 'images': [f'{i}.png'], 'references': ['Red one.', 'A red thing.']} for i in range(4)]
    for split in ('train', 'val'):
        (tmp_path / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    process = train(tmp_path / 'out', f'--dataset={tmp_path}')
    assert process.returncode == 0, process.stderr
    logged = last_eval(tmp_path / 'out')
    assert {'bleu4', 'rouge_l', 'cider_d'} <= set(logged)
    assert json.loads(ask(tmp_path / 'out', f'--eval={tmp_path}').stdout) == logged


CONTINUATION = ['--tasks=continuation:1 text:1', '--min_span=30', '--max_span=44']


def test_continuations_with_and_without_the_image_appear_in_the_sheet(tmp_path, monkeypatch):
    """At every evaluation of training and of sample.py."""
    sheets, prompts = [], []
    contact_sheet, answer = sample.render.contact_sheet, evaluate.answer

    def record_sheet(images, captions, *args, **kwargs):
        sheets.append(captions)
        return contact_sheet(images, captions, *args, **kwargs)

    def record_prompts(model, enc, examples, *args, **kwargs):
        prompts.append((enc, model.config, examples))
        return answer(model, enc, examples, *args, **kwargs)

    monkeypatch.setattr(sample.render, 'contact_sheet', record_sheet)
    monkeypatch.setattr(evaluate, 'answer', record_prompts)
    process = train(tmp_path, *CONTINUATION)
    assert process.returncode == 0, process.stderr
    assert len(sheets) == 3 and all(len(captions) == 4 for captions in sheets)
    for caption in sheets[-1]:
        lines = [line.partition(': ') for line in caption.split('\n')]
        assert [name for name, _, _ in lines] == ['with the image', 'blank', 'another', 'true'] and lines[-1][2]
    *_, own, blank, another = prompts
    for (_, _, a), (_, _, b), (_, _, c) in [(own, blank, another)]:
        assert len(a) == len(b) == len(c) == 4
        assert [e['text'] for e in a] == [e['text'] for e in b] == [e['text'] for e in c]
        assert all(e['text'].endswith('<image>') and len(e['images']) == 1 for e in a)
        assert all(e['images'][0].getextrema() == ((255, 255),) * 3 for e in b)
        assert [e['images'] for e in c] == [a[(i + 2) % 4]['images'] for i in range(4)]
    assert json.loads(ask(tmp_path, '--eval=pydoc', '--eval_samples=4').stdout) == last_eval(tmp_path)
    assert (tmp_path / 'samples.png').exists() and (tmp_path / 'eval.png').exists()


@pytest.mark.parametrize('tie_weights', [True, False])
def test_matrices_stored_by_column_are_the_same(tie_weights):
    model = make_model(tie_weights=tie_weights)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    idx = torch.arange(9)[None]
    with torch.no_grad():
        logits = model.logits(idx)
        sample.store_by_column(model)
        torch.testing.assert_close(model.logits(idx), logits, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie_weights
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert all(p.T.is_contiguous() for p in matrices) and len(matrices) > 9


def open_evaluation(run_dir, monkeypatch, **changes):
    """The evaluation of a run, its model and its autocast."""
    model, enc, config, autocast = sample.load(f'{run_dir}/ckpt.pt')
    config = SimpleNamespace(**{**vars(config), **changes})
    dist_env = SimpleNamespace(rank=0, world_size=1, ddp=False, device='cpu')
    return Evaluation(config, enc, model, dist_env), model, autocast


def test_blank_images_of_one_batch_only_are_in_memory(run_dir, monkeypatch):
    evaluation, model, autocast = open_evaluation(run_dir, monkeypatch, eval_iters=5, batch_size=2, eval_samples=0)
    made, most_alive = [], []
    blank = evaluate.blank

    def record(examples):
        changed = blank(examples)
        made.extend(weakref.ref(image) for e in changed for image in e['images'])
        most_alive.append(sum(image() is not None for image in made))
        assert all(image.getextrema() == ((255, 255),) * 3 for e in changed for image in e['images'])
        return changed

    monkeypatch.setattr(evaluate, 'blank', record)
    result, _, _ = evaluation.run(model, autocast)
    assert len(made) == 10 and max(most_alive) == 2
    assert result['blank_loss'] != result['val_loss']


def test_an_evaluation_leaves_the_model_in_training_mode_and_its_weights_alone(run_dir, monkeypatch):
    evaluation, model, autocast = open_evaluation(run_dir, monkeypatch)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first, second = (evaluation.run(model, autocast)[0] for _ in range(2))
    assert first == second and model.training
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_map_across_ranks_keeps_the_order():
    calls = []

    def work(items):
        calls.append(items)
        return [2 * item for item in items]

    one = SimpleNamespace(rank=0, world_size=1, ddp=False)
    assert map_across_ranks(work, list(range(7)), 3, one) == [0, 2, 4, 6, 8, 10, 12]
    assert calls == [[0, 1, 2], [3, 4, 5], [6]]
    second = SimpleNamespace(rank=1, world_size=2, ddp=False)
    assert map_across_ranks(work, list(range(7)), 3, second) == [6, 8, 10]
    assert map_across_ranks(work, [], 3, one) == []


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_similarity_in_chunks_equals_the_direct_computation():
    torch.manual_seed(0)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    images, texts = unit(50, 8, 16), unit(90, 16)
    expected = torch.einsum('nkd,md->nmk', images, texts).amax(-1)
    for chunk in (1, 16, 50, 64):
        torch.testing.assert_close(similarity(images, texts, chunk), expected)
    with LargestTensor() as largest:
        scores = similarity(images, texts, 4)
        result = evaluate.recall(scores, torch.arange(90) % 50)
    assert largest.numel <= 50 * 90  # and not 50 * 8 * 90
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(similarity(images, texts, 4), scores)
    ahead = [sum(bool(scores[i, k] >= scores[i, [i, i + 50] if i < 40 else [i]].max()) for k in range(90)) for i in range(50)]
    assert result['i2t_r5'] == pytest.approx(sum(n - 1 < 5 for n in ahead) / 50)


def collapsed_evaluation(changes):
    """The evaluation of a model after changes(model), on drawn pages of several rows of patches."""
    model = make_model(vision_encoder='vit', connector='linear', max_image_tokens=64, block_size=300)
    changes(model)
    knobs = dict(dataset='pydoc', eval_samples=2, eval_iters=1, batch_size=4, image_width=64, image_height=48, one_line=False,
                 min_chars=16, max_chars=24, font='', font_min=6, font_max=20, max_aspect=1.0, distort=0.0, char_level=False,
                 text_dataset='', tasks='ocr')
    config = SimpleNamespace(**{**DEFAULTS, **knobs})
    evaluation = Evaluation(config, get_tokenizer('bytes'), model, ONE_PROCESS)
    return evaluation.run(model, torch.autocast('cpu', enabled=False))[0]


def test_collapsed_embeddings_are_reported(capsys):
    def same_for_all(model):
        model.vision.connector.net[0].weight.data.zero_()

    healthy = collapsed_evaluation(lambda model: model.vision.connector.net[0].weight.data.normal_())
    collapsed = collapsed_evaluation(same_for_all)
    assert healthy['cosine'] < 0.999 and healthy['row_cosine'] < 0.999
    assert collapsed['cosine'] > 0.9999 and collapsed['row_cosine'] > 0.9999
    warn_of_collapse({'sources': {'a': collapsed}})
    assert capsys.readouterr().err.count('has collapsed') == 2
    warn_of_collapse({'cosine': 0.995, 'row_cosine': 0.98})
    assert not capsys.readouterr().err
