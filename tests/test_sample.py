"""What must stay true of asking a trained model: the answer alone on stdout, and a sentence for whatever cannot be asked."""

import csv
import json

import pytest
import torch
from conftest import inside, launch, refused, train
from PIL import Image
from test_model import pad, picture, row

import sample
import vision
from sample import edit_distance, score


def ask(run_dir, *words, run=inside, **kwargs):
    return run('sample.py', f'--out_dir={run_dir}', '--device=cpu', '--max_new_tokens=6', *words, **kwargs)


@pytest.fixture(scope='module')
def line(tmp_path_factory):
    path = tmp_path_factory.mktemp('images') / 'line.png'
    Image.effect_noise((90, 20), 80).save(path)
    return str(path)


def test_edit_distance_and_scores():
    assert [edit_distance(a, b) for a, b in (('', ''), ('abc', ''), ('kitten', 'sitting'), ('ab', 'ba'))] == [0, 3, 3, 2]
    assert score(['abc', 'xx'], ['abc', 'xyz']) == {'cer': 2 / 6, 'exact': 0.5}
    # a fluent, short, wrong answer is no better than none
    assert score(['a large clock'], ['the meeting starts at nine'])['cer'] > 0.7


def test_the_answer_alone_goes_to_stdout_and_is_the_same_each_time(run_dir, line):
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


def test_a_conversation(run_dir, line):
    process = ask(run_dir, '--image', line, '--interactive', run=launch, input='What is it?\nSure?\n\n')
    assert process.returncode == 0, process.stderr
    assert process.stderr.count('> ') == 3


def test_a_text_model_goes_on_with_its_prompt(run_dir):
    process = ask(run_dir, '--chat=no', '--prompt=def ')
    assert process.returncode == 0 and process.stdout.startswith('def ')


def test_eval_scores_a_file_and_leaves_a_table_and_pictures(run_dir, tmp_path):
    Image.new('RGB', (40, 16), 'white').save(tmp_path / 'a.png')
    rows = [{'messages': [{'role': 'user', 'content': '<image>'}, {'role': 'assistant', 'content': f'answer {i}'}],
             'image_path': 'a.png'} for i in range(5)]
    (tmp_path / 'test.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    process = ask(run_dir, f'--eval={tmp_path}/test.jsonl', '--batch_size=2')
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result['n'] == 5 and set(result) == {'n', 'cer', 'exact'}
    table = list(csv.DictReader(open(run_dir / 'eval.csv', encoding='utf-8')))
    assert [r['reference'] for r in table] == [f'answer {i}' for i in range(5)]
    assert sum(int(r['edits']) for r in table) / sum(len(r['reference']) for r in table) == pytest.approx(result['cer'])
    assert Image.open(run_dir / 'eval.png').width > 400


def test_eval_of_a_dataset_is_what_the_training_log_says(run_dir):
    process = ask(run_dir, '--eval=pydoc', '--eval_samples=4', '--max_new_tokens=20')
    logged = [json.loads(r) for r in (run_dir / 'log.jsonl').read_text().splitlines() if 'eval' in r][-1]['eval']
    assert json.loads(process.stdout)['exact'] == logged['exact']
    assert json.loads(process.stdout)['n'] == 4


def test_with_images_puts_places_in_front_unless_the_text_has_them():
    assert sample.with_images('What?', [1, 2]) == '<image>\n<image>\nWhat?'
    assert sample.with_images('', [1]) == '<image>'
    assert sample.with_images('a <image> b', [1]) == 'a <image> b'


def test_what_cannot_be_asked_is_refused_in_a_sentence(run_dir, line, tmp_path):
    refused(inside('sample.py', f'--out_dir={tmp_path}'), 'no checkpoint at', 'train one first')
    refused(ask(run_dir, '--image', 'gone.png'), 'no image at gone.png')
    (tmp_path / 'zero.png').write_bytes(b'')
    refused(ask(run_dir, '--image', tmp_path / 'zero.png'), 'zero.png is not an image')
    Image.new('RGB', (20000, 1)).save(tmp_path / 'thin.png')
    refused(ask(run_dir, '--image', tmp_path / 'thin.png'), '20000x1 pixels is too elongated')
    refused(ask(run_dir, '--image', line, '--prompt=<image> <image>'), 'more <image> places than images (1)')
    refused(ask(run_dir, '--prompt=' + 'x' * 100), 'the prompt takes 102 positions, but block_size is 48')
    refused(ask(run_dir, '--eval=gone.jsonl'), "no dataset 'gone.jsonl'")
    (tmp_path / 'broken.jsonl').write_text('{"messages": []\n')
    refused(ask(run_dir, f'--eval={tmp_path}/broken.jsonl'), 'broken.jsonl, line 1 is not JSON')
    refused(ask(run_dir, '--tokenizer=gpt9'), 'tokenizer must be')
    refused(ask(run_dir, '--chat=perhaps'), '--chat must be')


def test_a_checkpoint_that_is_a_malicious_pickle_is_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / 'sprung'), 'w')

    torch.save({'model': {}, 'model_args': Malicious()}, tmp_path / 'ckpt.pt')
    refused(inside('sample.py', f'--out_dir={tmp_path}'), 'is refused', 'run code when opened')
    refused(inside('train.py', f'--out_dir={tmp_path}', '--init_from=resume'), 'is refused')
    assert not (tmp_path / 'sprung').exists()


def test_a_blind_model_says_so(tmp_path, line):
    assert train(tmp_path, '--vision_encoder=', '--tasks=text', '--eval_samples=0').returncode == 0
    refused(ask(tmp_path, '--image', line), 'is blind')
    process = ask(tmp_path, '--prompt=The ')
    assert process.returncode == 0 and process.stdout.startswith('The ')


def test_logprobs_are_the_models_own(tiny_model):
    image = picture(1)
    idx = pad([row(5, image, 7), row(9, 3, 2)])
    lengths = (idx >= 0).sum(1)
    images = vision.collate([image], tiny_model.config)
    out, logprobs = tiny_model.generate(idx, 5, 0, images=images, lengths=lengths, return_logprobs=True)
    assert torch.equal(out, tiny_model.generate(idx, 5, 0, images=images, lengths=lengths))
    for b, n in enumerate(lengths):
        whole = out[b, :n + 5][None]
        logits = tiny_model(whole, whole, images if b == 0 else None)[0]
        logits[..., 256] = -float('inf')  # <image> is never drawn
        expected = logits.log_softmax(-1)[0, n - 1:n + 4].gather(-1, whole[0, n:n + 5, None])[:, 0]
        torch.testing.assert_close(logprobs[b, n:n + 5], expected, atol=1e-4, rtol=1e-4)
        assert (logprobs[b, :n] == 0).all()


def test_a_doubtful_word_is_marked_whole():
    encoding = sample.get_tokenizer('bytes')
    text = 'a red \u00e9cole, yes'
    ids, p = encoding.encode(text), [-0.01] * len(text.encode())
    assert sample.mark_doubts(encoding, ids, p) == text
    p[7] = -0.7  # the second byte of a letter; log 0.5 is -0.69
    assert sample.mark_doubts(encoding, ids, p) == 'a red [\u00e9cole,?] yes'
    p[7], p[6] = -0.69, -9  # its first
    assert sample.mark_doubts(encoding, ids, p) == 'a red [\u00e9cole,?] yes'
    p[6], p[5] = -0.01, -9  # a space belongs to no word
    assert sample.mark_doubts(encoding, ids, p) == text


def test_logprobs_are_printed_and_do_not_change_the_answer(run_dir, line):
    plain, marked = (ask(run_dir, '--image', line, *words) for words in ([], ['--logprobs']))
    assert marked.returncode == 0 and 'mean log-probability of a token: -' in marked.stderr, marked.stderr
    assert '?]' in marked.stdout and '?]' not in plain.stdout  # after four steps it is sure of nothing
    assert marked.stdout.replace('[', '').replace('?]', '') == plain.stdout.replace('[', '').replace('?]', '')


def test_a_folder_is_captioned_and_what_is_no_image_is_said(run_dir, tmp_path):
    for i in range(5):
        Image.effect_noise((60 + i, 20), 80).save(tmp_path / f'{i}.png')
    (tmp_path / 'notes.txt').write_text('no image')
    process = ask(run_dir, '--image', tmp_path, '--prompt=What?', '--batch_size=2')
    assert process.returncode == 0 and 'left out' in process.stderr and 'notes.txt' in process.stderr, process.stderr
    with open(run_dir / 'captions.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [r['image'] for r in rows] == [f'{i}.png' for i in range(5)] and all(float(r['logprob']) < 0 for r in rows)
    alone = ask(run_dir, '--image', tmp_path / '3.png', '--prompt=What?')
    assert rows[3]['caption'] == alone.stdout.rstrip('\n')
    assert Image.open(run_dir / 'captions.png').width > 400
    (tmp_path / 'empty').mkdir()
    refused(ask(run_dir, '--image', tmp_path / 'empty'), 'no image in')
