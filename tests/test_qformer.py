"""What must stay true of the Q-Former, of the first stage that trains it, and of retrieval."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, inside, launch, make_model, read_log, refused, tiny_config, train
from safetensors.torch import load_file, save_file

import vision
from model import Aligner, GPTConfig, draw_wrong, load_checkpoint, read_blip2, read_eyes
from sample import pairs_of, recall

SMALL = dict(connector='qformer', n_queries=5, qformer_n_layer=4, qformer_n_head=2, qformer_n_embd=16)


def features(n=3, length=7, width=24, seed=0):
    """Random image features, and which are real: each image has another number of them."""
    torch.manual_seed(seed)
    return torch.randn(n, length, width), torch.arange(length) < torch.tensor([length - 2 * i for i in range(n)])[:, None]


def captions(*lengths, seed=1):
    """Random ids below 40, padded with -1."""
    torch.manual_seed(seed)
    return torch.stack([F.pad(torch.randint(40, (n,)), (0, max(lengths) - n), value=-1) for n in lengths])


@pytest.fixture(scope='module')
def blip2(tmp_path_factory):
    """A tiny BLIP-2 of Hugging Face's with random weights, and the folder that it has saved itself to."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config=dict(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                           patch_size=14),
        qformer_config=dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, vocab_size=40,
                            max_position_embeddings=20, encoder_hidden_size=24, use_qformer_text_input=True),
        num_query_tokens=5, image_text_hidden_size=8)
    theirs = transformers.Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # everything makes a difference: biases and norms, too
            p.add_(0.3 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp('blip2')
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.mark.parametrize('kind', ['queries', 'text', 'itm'])
def test_queries_and_text_become_what_hugging_faces_blip2_makes_of_them(blip2, kind):
    theirs, folder = blip2
    config = GPTConfig(connector='qformer')
    shape, state = read_eyes(str(folder), config)
    ours = vision.QFormer(GPTConfig(connector='qformer', **shape), 24, vocab_size=40, block_size=20)
    ours.load_state_dict({name.removeprefix('vision.qformer.'): p for name, p in state.items()})
    (image, valid), ids = features(), captions(9, 4, 6)
    if kind == 'itm':  # with text theirs cannot take images of different sizes
        valid = torch.ones_like(valid)
    with torch.no_grad():
        seen = theirs.vision_model.post_layernorm(image)
        queries = None if kind == 'text' else theirs.query_tokens.expand(3, -1, -1)
        embedded = theirs.embeddings(input_ids=None if kind == 'queries' else ids.clamp(min=0), query_embeds=queries)
        parts = {'queries': torch.ones(3, 5), 'text': ids >= 0, 'itm': torch.cat([torch.ones(3, 5), ids >= 0], 1)}
        real = parts[kind].long()
        expected = theirs.qformer(embedded, query_length=0 if kind == 'text' else 5, attention_mask=real,
                                  encoder_hidden_states=None if kind == 'text' else seen,
                                  encoder_attention_mask=None if kind == 'text' else valid.long()).last_hidden_state
        a, b = ours(*((None, None) if kind == 'text' else (image, valid)), None if kind == 'queries' else ids, 'itm')
        found = torch.cat([a, b], dim=1)
    torch.testing.assert_close(found[real > 0], expected[real > 0], atol=1e-4, rtol=0)


def test_queries_do_not_see_padding_of_the_image_nor_of_the_text():
    torch.manual_seed(0)
    former = vision.QFormer(GPTConfig(**SMALL), 24, vocab_size=40, block_size=20).eval()
    (image, valid), ids = features(), captions(9, 4, 6)
    for kind in ('itc', 'itm', 'itg'):
        queries, text = former(image, valid, ids, kind)
        again, words = former(torch.where(valid[..., None], image, 100.0), valid, F.pad(ids, (0, 3), value=-1), kind)
        torch.testing.assert_close(again, queries, atol=1e-5, rtol=0)
        torch.testing.assert_close(words[:, :9][ids >= 0], text[ids >= 0], atol=1e-5, rtol=0)
        alone, said = former(image[1:2, :5], valid[1:2, :5], ids[1:2, :4], kind)
        torch.testing.assert_close(alone[0], queries[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(said[0], text[1, :4], atol=1e-5, rtol=0)


def test_who_sees_whom():
    torch.manual_seed(0)
    former = vision.QFormer(GPTConfig(**SMALL), 24, vocab_size=40, block_size=20).eval()
    (image, valid), ids = features(), captions(9, 9, 9)
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % 40
    differ = lambda a, b: ((a - b).abs().amax(-1) > 1e-5)
    for kind, told, words, seen in (('itc', False, [True] * 9, False), ('itm', True, [True] * 9, True),
                                    ('itg', False, [False] * 5 + [True] * 4, True)):
        queries, text = former(image, valid, ids, kind)
        by_text, by_image = former(image, valid, other, kind), former(-image, valid, ids, kind)
        assert differ(queries, by_text[0]).all() == differ(queries, by_text[0]).any() == told    # another word
        assert differ(text, by_text[1]).tolist() == [words] * 3
        assert differ(queries, by_image[0]).all()                                                # another image
        assert differ(text, by_image[1]).all() == differ(text, by_image[1]).any() == seen
    assert torch.equal(former(image, valid, ids, 'itc')[0], former(image, valid)[0])
    torch.testing.assert_close(former(image, valid, ids, 'itc')[1], former(ids=ids)[1], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# the first stage

def aligner(objective='itc+itm+itg', **changes):
    torch.manual_seed(0)
    model = Aligner(tiny_config(**SMALL, objective=objective, vocab_size=40, block_size=12, align_dim=8, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def pictures(n, seed=2):
    """n random pictures of different sizes, as vision.collate makes them a batch."""
    rng, config = torch.Generator().manual_seed(seed), tiny_config()
    sizes = [(8 * int(torch.randint(1, 4, (1,), generator=rng)), 8) for _ in range(n)]
    pixels = [torch.randint(0, 256, (h, w, 3), generator=rng, dtype=torch.uint8).numpy() for w, h in sizes]
    return vision.collate([vision.preprocess(vision.Image.fromarray(p), config) for p in pixels], config)


def smoothed(logits, right):
    """Cross entropy with a label smoothing of 0.1, in plain Python."""
    total = math.log(sum(math.exp(x) for x in logits))
    return sum((0.9 * (i == right) + 0.1 / len(logits)) * (total - x) for i, x in enumerate(logits))


def test_the_three_losses_are_those_of_formulas_written_apart(monkeypatch):
    model, ids, (patches, grid), n = aligner(), captions(5, 3, 6, 4), pictures(4), 4
    captions_of, pictures_of = [2, 0, 3, 1], [1, 3, 0, 0]  # the wrong ones
    wrong = iter([torch.tensor(captions_of), torch.tensor(pictures_of)])
    monkeypatch.setattr('model.draw_wrong', lambda similarity, same: next(wrong))
    with torch.no_grad():
        losses, total = model(ids, images=(patches, grid))
        image = [model.vision.features(patches[i:i + 1], grid[i:i + 1]) for i in range(n)]
        words = [row[row >= 0][None] for row in ids]

        def former(i, j, kind, first):
            opened = torch.cat([torch.tensor([[first]]), words[j]], dim=1)
            return model.vision.qformer(*image[i], opened, kind)

        unit = lambda v: v / v.norm(dim=-1, keepdim=True)
        seen = [unit(model.image_proj(former(i, i, 'itc', 40)[0][0])) for i in range(n)]     # a vector for each query
        said = [unit(model.text_proj(former(i, i, 'itc', 40)[1][0, 0])) for i in range(n)]   # that of CLS
        scale = math.exp(model.logit_scale)
        likeness = [[scale * max(float(q @ said[j]) for q in seen[i]) for j in range(n)] for i in range(n)]
        itc = sum(smoothed(likeness[i], i) + smoothed([likeness[j][i] for j in range(n)], i) for i in range(n)) / (2 * n)
        pairs = [(i, i, 1) for i in range(n)] + [(i, captions_of[i], 0) for i in range(n)] + [
            (pictures_of[j], j, 0) for j in range(n)]
        itm = 0
        for i, j, belongs in pairs:
            a, b = model.itm_head(former(i, j, 'itm', 40)[0][0]).mean(0).tolist()
            itm += math.log(math.exp(a) + math.exp(b)) - (b if belongs else a)
        itg, count = 0, 0
        table = model.vision.qformer.wte.weight
        for i in range(n):
            opened = torch.cat([torch.tensor([[41]]), words[i]], dim=1)
            for k in range(1, opened.shape[1]):  # word k from the words before it, and nothing else
                _, x = model.vision.qformer(*image[i], opened[:, :k], 'itg')
                itg += smoothed((F.gelu(model.itg_head(x[0, -1])) @ table.T).tolist(), int(opened[0, k]))
                count += 1
    assert losses['itc'].item() == pytest.approx(itc, abs=1e-5)
    assert losses['itm'].item() == pytest.approx(itm / len(pairs), abs=1e-5)
    assert losses['itg'].item() == pytest.approx(itg / count, abs=1e-5)
    assert total.item() == pytest.approx(itc + itm / len(pairs) + itg / count, abs=1e-5)


def test_equal_captions_are_no_wrong_pairs():
    model, ids, images = aligner('itc+itm'), captions(5, 3, 6, 4), pictures(4)
    twins = ids.clone()
    twins[1] = twins[0]
    model(twins, images=images)
    right = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]])
    same = (twins[:, None] == twins).all(-1)
    drawn = torch.stack([draw_wrong(torch.zeros(4, 4), same) for _ in range(200)])
    assert not (drawn[:, 0] == 1).any() and not (drawn[:, 1] == 0).any() and not (drawn == right[0]).any()
    assert len(drawn[:, 2].unique()) == 3
    near = torch.stack([draw_wrong(torch.eye(4).roll(1, 1) * 9, torch.eye(4).bool()) for _ in range(100)])
    assert (near == torch.tensor([1, 2, 3, 0])).float().mean() > 0.95  # the more similar, the likelier
    with pytest.raises(ValueError, match='all captions of a micro-batch are the same'):
        model(twins[:2], images=tuple(t[:2] for t in images))
    with pytest.raises(ValueError, match='objective must be lm, itc'):
        aligner('itm')


FIRST = ['--objective=itc+itm+itg', '--connector=qformer', '--n_queries=4', '--qformer_n_layer=2', '--qformer_n_head=2',
         '--qformer_n_embd=32', '--align_dim=16', '--qformer_lr=1e-3', '--eval_samples=12']


@pytest.fixture(scope='module')
def aligned(tmp_path_factory):
    """The out_dir of a first stage."""
    out_dir = tmp_path_factory.mktemp('aligned')
    process = train(out_dir, *FIRST)
    assert process.returncode == 0, process.stderr
    return out_dir


def test_two_ranks_contrast_as_one_with_the_whole_batch(tmp_path):
    one = train(tmp_path / '1', *FIRST, '--objective=itc', '--batch_size=8')
    two = train(tmp_path / '2', *FIRST, '--objective=itc', '--batch_size=4', '--gradient_accumulation_steps=2', processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = ([row['loss'] for row in read_log(tmp_path / n) if 'loss' in row] for n in '12')
    assert len(a) == 4 and a == pytest.approx(b, abs=1e-5)
    # and its gradients are the same: they have crossed the ranks, too
    script = tmp_path / 'ranks.py'
    script.write_text(f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n'
                      f'import test_qformer; test_qformer.gradients_of_a_rank({str(tmp_path)!r})\n')
    process = launch(script, processes=2)
    assert process.returncode == 0, process.stderr
    model = aligner('itc').train()
    model(captions(5, 3, 6, 4), images=pictures(4))[1].backward()
    found = torch.load(tmp_path / 'gradients.pt')
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)


def gradients_of_a_rank(folder):
    """Run by two processes: the gradient of half of the batch each, averaged by DDP, as the training loop has it."""
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(aligner('itc').train())
    half = slice(2 * rank, 2 * rank + 2)
    loss = model(captions(5, 3, 6, 4)[half], images=tuple(t[half] for t in pictures(4)), loss_reduction='sum')[1]
    (loss * (2 / 4)).backward()  # ranks / pairs of all ranks
    if rank == 0:
        torch.save({name: p.grad for name, p in model.module.named_parameters()}, Path(folder) / 'gradients.pt')
    torch.distributed.destroy_process_group()


def test_a_first_stage_resumes_exactly_and_reports_what_it_finds(aligned, tmp_path):
    evals = [row['eval'] for row in read_log(aligned) if 'eval' in row]
    assert set(evals[-1]) == {'val_loss', 'itc', 'itm', 'itg', 'cosine', 'chance_r1', 'n',
                              *(f'{way}_r{k}' for way in ('i2t', 't2i') for k in (1, 5, 10))}
    assert evals[-1]['val_loss'] == pytest.approx(sum(evals[-1][k] for k in ('itc', 'itm', 'itg')))
    assert (aligned / 'samples.png').exists() and evals[-1]['n'] == 12 and evals[-1]['chance_r1'] == 1 / 12
    assert train(tmp_path / 'a', *FIRST, '--max_iters=2', '--lr_decay_iters=4').returncode == 0
    process = train(tmp_path / 'a', *FIRST, '--lr_decay_iters=4', '--init_from=resume')
    assert process.returncode == 0, process.stderr
    assert read_log(tmp_path / 'a')[-1] == read_log(aligned)[-1]
    a, b = (load_checkpoint(folder / 'ckpt.pt')['model'] for folder in (tmp_path / 'a', aligned))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_evaluation_asks_the_same_each_time(tmp_path):
    still = [f'--{rate}=1e-12' for rate in ('learning_rate', 'vision_lr', 'qformer_lr', 'muon_lr')]
    assert train(tmp_path, *FIRST, *still, '--min_lr=1e-13').returncode == 0
    first, *others = [row['eval'] for row in read_log(tmp_path) if 'eval' in row]
    assert len(others) == 2 and all(other == pytest.approx(first, abs=1e-5) for other in others)


def test_recall_is_what_counting_by_hand_gives():
    unit = lambda *rows: F.normalize(torch.tensor(rows, dtype=torch.float), dim=-1)
    images = unit([1, 0, 0], [0, 1, 0], [0, 0, 1])[:, None].repeat(1, 2, 1)
    perfect = recall(images, images[:, 0], torch.arange(3))
    assert perfect['i2t_r1'] == perfect['t2i_r1'] == 1 and perfect['cosine'] == pytest.approx(0, abs=1e-6)
    # pictures 0 and 1 have each other's captions; there is a second one of picture 2, which is nowhere near
    found = recall(images, unit([0, 1, 0.1], [1, 0, 0.2], [0, 0, 1], [1, 1, 0]), torch.tensor([0, 1, 2, 2]))
    assert found['i2t_r1'] == pytest.approx(1 / 3) and found['t2i_r1'] == pytest.approx(1 / 4)
    assert found['i2t_r5'] == found['t2i_r5'] == 1 and found['chance_r1'] == pytest.approx(1 / 3)
    # the query that is nearest counts, not their mean
    two = torch.stack([unit([1, 0], [0, 1]), unit([0, 1], [-1, 0])])
    assert recall(two, unit([1, 0.1], [-1, 0.1]), torch.arange(2))['i2t_r1'] == 1
    # a collapsed model finds nothing, though nothing is more similar than what it looks for
    collapsed = recall(images[:1].repeat(20, 1, 1), images[:1, 0].repeat(20, 1), torch.arange(20))
    assert collapsed['i2t_r10'] == collapsed['t2i_r10'] == 0 and collapsed['cosine'] == pytest.approx(1)


def test_retrieval_is_asked_of_pictures_and_captions_that_occur_once():
    row = lambda image, *texts: {'text': f'<image>{texts[0]}', 'images': [image], 'references': list(texts)}
    rows = [row('a', 'x', 'y'), row('a', 'z'), row('b', 'y'), row('c', 'u'), {'text': 'no image', 'images': []}, row('d', 'v')]
    examples, texts, owner = pairs_of(rows, 9)
    assert [e['images'] for e in examples] == [['a'], ['c'], ['d']]
    assert texts == ['x', 'y', 'u', 'v'] and owner.tolist() == [0, 0, 1, 2]
    assert len(pairs_of(rows, 2)[0]) == 2
    with pytest.raises(ValueError, match='fewer than two'):
        pairs_of(rows[:1], 9)


def test_an_aligner_is_measured_and_refuses_to_speak(aligned, tmp_path):
    process = inside('sample.py', f'--out_dir={aligned}', '--eval=pydoc', '--eval_samples=12')
    assert process.returncode == 0, process.stderr
    found, logged = json.loads(process.stdout), read_log(aligned)[-1]['eval']
    assert found == {key: pytest.approx(logged[key], abs=1e-6) for key in found} and found['n'] == 12
    table = list(csv.DictReader((aligned / 'eval.csv').open()))
    assert len(table) == 12 and (aligned / 'eval.png').exists()
    assert sum(row['rank'] == '1' for row in table) == round(12 * found['i2t_r1'])
    assert all((row['rank'] == '1') == (row['caption'] == row['nearest']) for row in table)
    refused(inside('sample.py', f'--out_dir={aligned}', '--prompt=Hello'), 'to compare pictures and captions, and cannot speak')
    refused(train(tmp_path, f'--init_from={aligned}/ckpt.pt'), 'is no GPT: another model takes its eyes over by --vision_from')
    refused(train(tmp_path, '--objective=itc'), 'set --connector=qformer')
    refused(train(tmp_path, *FIRST, '--objective=itc', '--dataset=shapes'), 'no dataset')


def test_what_is_no_pair_is_refused(tmp_path):
    words = [{'role': 'user', 'content': 'No image?'}, {'role': 'assistant', 'content': 'None.'}]
    lines = [{'messages': words}, {'text': '<image>Two.<image>', 'image_paths': ['a.png', 'a.png']}, {
        'text': '<image>', 'image_path': 'a.png'}]
    vision.Image.new('RGB', (20, 16)).save(tmp_path / 'a.png')
    for line, words in zip(lines, ('has 0 images', 'has 2 images', 'the text')):
        pair = {'text': '<image>A caption %d.', 'image_path': 'a.png'}
        (tmp_path / 'train.jsonl').write_text((json.dumps(line) + '\n') * 4)
        vision.Image.new('RGB', (20, 16)).save(tmp_path / 'b.png')
        (tmp_path / 'val.jsonl').write_text(json.dumps({**pair, 'text': '<image>One.'}) + '\n' + json.dumps(
            {'text': '<image>Other.', 'image_path': 'b.png'}) + '\n')
        refused(train(tmp_path / 'out', *FIRST, f'--dataset={tmp_path}'), 'learns from pairs of a picture and a caption', words)


# ---------------------------------------------------------------------------------------------------------------------
# the second stage

SECOND = ['--connector=qformer', '--n_queries=4', '--qformer_n_layer=2', '--qformer_n_head=2', '--qformer_n_embd=32',
          '--qformer_lr=1e-3']


def test_any_image_becomes_as_many_tokens_as_there_are_queries():
    config = tiny_config(**SMALL)
    model = make_model(**SMALL)
    small, large = pictures(1), vision.collate([vision.preprocess(vision.Image.new('RGB', (32, 32), 'red'), config)], config)
    for image in (small, large):
        emb, valid = model.vision(*image)
        assert emb.shape == (1, 5, 32) and valid.all()
    assert vision.num_tokens((large[0][0], large[1][0]), config) == 5
    # a batch of text alone: padding makes no token, but the Q-Former stays part of the graph
    empty = vision.collate([], config)
    assert not model.vision(*empty)[1].any()
    idx = torch.randint(0, 250, (2, 9))
    blind = model(idx, idx, empty)
    assert torch.equal(blind[0], model(idx, idx)[0])
    blind[1].backward()
    assert all(p.grad is not None for p in model.vision.parameters())
    seeing = F.pad(torch.full((1, 5), 256), (2, 3), value=7)
    a, b = (model(seeing, seeing, image)[0] for image in (small, large))
    assert torch.equal(a[0, :2], b[0, :2]) and ((a[0, 2:] - b[0, 2:]).abs().amax(-1) > 1e-4).all()


def test_a_gpt_takes_over_the_eyes_of_the_first_stage(aligned, tmp_path):
    words = ['--lora_rank=2', '--optimizer=adamw', '--max_iters=2', f'--vision_from={aligned}/ckpt.pt', '--n_queries=9']
    assert train(tmp_path / 'text', '--vision_encoder=', '--tasks=text').returncode == 0
    frozen = train(tmp_path / 'a', *SECOND, *words, f'--init_from={tmp_path}/text/ckpt.pt', '--vision_lr=0', '--qformer_lr=0')
    assert frozen.returncode == 0 and 'encoder and qformer of' in frozen.stderr, frozen.stderr
    assert 'n_queries 4' in frozen.stderr
    theirs, ours = load_checkpoint(aligned / 'ckpt.pt')['model'], load_checkpoint(tmp_path / 'a' / 'ckpt.pt')['model']
    names = [n for n in ours if n.startswith(('vision.encoder.', 'vision.qformer.'))]
    assert len(names) > 40 and all(torch.equal(theirs[n], ours[n]) for n in names)
    assert not any('text_mlp' in n or 'wte' in n for n in names)
    # from scratch, everything learns; and it is resumed, sampled from and asked
    process = train(tmp_path / 'b', *SECOND, *words[3:])
    assert process.returncode == 0, process.stderr
    moved = load_checkpoint(tmp_path / 'b' / 'ckpt.pt')['model']
    assert not torch.equal(moved['vision.qformer.queries'], theirs['vision.qformer.queries'])
    assert {'cer', 'blank_loss', 'shuffled_loss'} <= set(read_log(tmp_path / 'b')[-1]['eval'])
    vision.Image.new('RGB', (60, 16), 'white').save(tmp_path / 'a.png')
    process = inside('sample.py', f'--out_dir={tmp_path}/b', '--image', tmp_path / 'a.png', '--max_new_tokens=3')
    assert process.returncode == 0, process.stderr
    refused(train(tmp_path / 'c', *SECOND, f'--vision_from={tmp_path}/text/ckpt.pt'), 'has no small ViT to take over')


@pytest.mark.parametrize('connector', [['--connector=qformer'], ['--connector=linear'],
                                       ['--connector=pool', '--vision_from=', '--patch_width=4']])
def test_the_recipe_that_compares_connectors(aligned, tmp_path, connector):
    assert train(tmp_path / 'text', '--vision_encoder=', '--tasks=text').returncode == 0
    small = [f'--init_from={tmp_path}/text/ckpt.pt', f'--vision_from={aligned}/ckpt.pt', '--batch_size=2', '--max_iters=2',
             '--block_size=48', '--eval_interval=2', '--eval_iters=1', '--eval_samples=2', '--num_workers=0', '--device=cpu',
             '--compile=False', '--min_span=20', '--max_span=40', f'--out_dir={tmp_path}/out', *connector]
    process = inside('train.py', ROOT / 'config' / 'connectors_cpu.py', *small)
    assert process.returncode == 0, process.stderr
    evals = [row['eval'] for row in read_log(tmp_path / 'out') if 'eval' in row]
    assert evals[0]['text_loss'] == evals[1]['text_loss'] and evals[0]['val_loss'] != evals[1]['val_loss']


def test_a_run_begins_with_blip2s_q_former_and_refuses_one_of_another_width(blip2, tmp_path):
    _, folder = blip2
    words = ['--connector=qformer', '--max_iters=1', f'--vision_from={folder}', '--qformer_lr=0', '--vision_n_embd=24']
    process = train(tmp_path / 'a', *words)
    assert process.returncode == 0 and 'n_queries 5, qformer_n_layer 4, qformer_n_head 2, qformer_n_embd 16' in process.stderr
    shape, state = read_eyes(str(folder), GPTConfig(connector='qformer'))
    ours = load_checkpoint(tmp_path / 'a' / 'ckpt.pt')['model']
    taken = [n for n in state if n in ours]
    assert torch.equal(ours['vision.qformer.ln_image.weight'], state['vision.qformer.ln_image.weight'])
    assert len(taken) == len([n for n in ours if n.startswith('vision.qformer.')])
    assert all(torch.equal(ours[n], state[n]) for n in taken)
    refused(train(tmp_path / 'b', *words, '--vision_n_embd=32'), 'ln_image.weight is (24,), not (32,)')
    refused(train(tmp_path / 'b', *words, '--connector=mlp'), 'no small ViT to take over')
    # a tensor less, and a tensor too many
    layer = 'qformer.encoder.layer.1.output_query.dense.weight'
    for change, complaint in ((lambda t: t.pop(layer), 'missing qformer.h.1.query_mlp'),
                              (lambda t: t.update({'qformer.extra': torch.zeros(2)}), 'unexpected qformer.qformer.extra')):
        other = tmp_path / 'other'
        shutil.copytree(folder, other)
        tensors = load_file(folder / 'model.safetensors')
        change(tensors)
        save_file(tensors, other / 'model.safetensors', metadata={'format': 'pt'})
        refused(train(tmp_path / 'b', *words, f'--vision_from={other}'), complaint)
        shutil.rmtree(other)
    settings = json.loads((folder / 'config.json').read_text())
    for key, value, complaint in (('hidden_act', 'relu', "its hidden_act is 'relu', not 'gelu'"),):
        shutil.copytree(folder, tmp_path / 'other')
        settings['qformer_config'][key] = value
        (tmp_path / 'other' / 'config.json').write_text(json.dumps(settings))
        refused(train(tmp_path / 'b', *words, f'--vision_from={tmp_path}/other'), complaint)
    with pytest.raises(ValueError, match="expected a checkpoint or a BLIP-2, got a 'llama'"):
        read_blip2({'model_type': 'llama'}, {})
