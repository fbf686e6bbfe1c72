"""Tests of the Q-Former, of the first stage that trains it, of retrieval, and of the second stage."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (ROOT, batch_of_ids, inside, launch, make_model, optimizer_config, read_log, refused, tiny_config, train,
                      write_pairs)
from PIL import Image
from safetensors.torch import load_file, save_file

import train as train_script
import vision
from blip2 import QFormerPretraining, sample_hard_negatives
from configurator import configure
from evaluate import image_caption_pairs, mean_cosine, recall, similarity
from model import GPTConfig
from patches import collate_images, num_tokens, preprocess
from vision import QFormer
from weights import QFORMER_FIELDS, QFORMER_TEXT, load_weights, read_blip2, read_weights, vision_of

QFORMER = dict(connector='qformer', n_queries=5, qformer_n_layer=4, qformer_n_head=2, qformer_n_embd=16)


def random_features(n=3, length=7, width=24, seed=0):
    """Random features of n images, and which are valid: each image has another number of them."""
    torch.manual_seed(seed)
    lengths = torch.tensor([length - 2 * i for i in range(n)])
    return torch.randn(n, length, width), torch.arange(length) < lengths[:, None]


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
        qformer_config=dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, vocab_size=120,
                            max_position_embeddings=20, encoder_hidden_size=24, use_qformer_text_input=True),
        num_query_tokens=5, image_text_hidden_size=8)
    theirs = transformers.Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # so that biases and norms make a difference too
            p.add_(0.3 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp('blip2')
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.mark.parametrize('objective', ['image', 'text', 'itm'])
def test_outputs_equal_those_of_hugging_faces_blip2(blip2, objective):
    theirs, folder = blip2
    args, state = vision_of(read_weights(folder), folder, 'qformer')
    ours = QFormer(GPTConfig(connector='qformer', block_size=20, **args), 24, vocab_size=122)
    ours.load_state_dict({name.removeprefix('vision.qformer.'): p for name, p in state.items()})
    has_image = objective != 'text'
    (image, valid), ids = random_features(), captions(9, 4, 6)
    if objective == 'itm':  # with text theirs cannot take images of different sizes
        valid = torch.ones_like(valid)
    if objective == 'image':
        ids = None
    is_valid = [torch.ones(3, 5)] * has_image + ([] if ids is None else [ids >= 0])
    is_valid = torch.cat(is_valid, dim=1).long()
    with torch.no_grad():
        embedded = theirs.embeddings(input_ids=None if ids is None else ids.clamp(min=0),
                                     query_embeds=theirs.query_tokens.expand(3, -1, -1) if has_image else None)
        expected = theirs.qformer(
            embedded, query_length=5 * has_image, attention_mask=is_valid,
            encoder_hidden_states=theirs.vision_model.post_layernorm(image) if has_image else None,
            encoder_attention_mask=valid.long() if has_image else None).last_hidden_state
        queries, text = ours(image if has_image else None, valid if has_image else None, ids, 'itm')
    result = torch.cat([queries, text], dim=1)
    torch.testing.assert_close(result[is_valid > 0], expected[is_valid > 0], atol=1e-4, rtol=0)


def small_qformer():
    torch.manual_seed(0)
    return QFormer(GPTConfig(**QFORMER, block_size=20), 24, vocab_size=40).eval()


@pytest.mark.parametrize('objective', ['itc', 'itm', 'itg'])
def test_padding_of_image_and_text_changes_nothing(objective):
    qformer = small_qformer()
    (image, valid), ids = random_features(), captions(9, 4, 6)
    queries, text = qformer(image, valid, ids, objective)
    other_padding = torch.where(valid[..., None], image, 100.0)
    queries_2, text_2 = qformer(other_padding, valid, F.pad(ids, (0, 3), value=-1), objective)
    torch.testing.assert_close(queries_2, queries, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_2[:, :9][ids >= 0], text[ids >= 0], atol=1e-5, rtol=0)
    queries_1, text_1 = qformer(image[1:2, :5], valid[1:2, :5], ids[1:2, :4], objective)
    torch.testing.assert_close(queries_1[0], queries[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(text_1[0], text[1, :4], atol=1e-5, rtol=0)


@pytest.mark.parametrize('objective, queries_read_text, changed_tokens, text_reads_image', [
    ('itc', False, [True] * 9, False), ('itm', True, [True] * 9, True), ('itg', False, [False] * 5 + [True] * 4, True)])
def test_attention_mask_of_each_objective(objective, queries_read_text, changed_tokens, text_reads_image):
    qformer = small_qformer()
    (image, valid), ids = random_features(), captions(9, 9, 9)
    other_ids = ids.clone()
    other_ids[:, 5] = (other_ids[:, 5] + 1) % 40
    differ = lambda a, b: ((a - b).abs().amax(-1) > 1e-5)
    queries, text = qformer(image, valid, ids, objective)
    queries_2, text_2 = qformer(image, valid, other_ids, objective)
    assert differ(queries, queries_2).all() == differ(queries, queries_2).any() == queries_read_text
    assert differ(text, text_2).tolist() == [changed_tokens] * 3
    queries_2, text_2 = qformer(-image, valid, ids, objective)
    assert differ(queries, queries_2).all()
    assert differ(text, text_2).all() == differ(text, text_2).any() == text_reads_image


def test_itc_encodes_image_and_text_independently():
    qformer = small_qformer()
    (image, valid), ids = random_features(), captions(9, 9, 9)
    queries, text = qformer(image, valid, ids, 'itc')
    assert torch.equal(queries, qformer(image, valid)[0])
    torch.testing.assert_close(text, qformer(ids=ids)[1], atol=1e-5, rtol=0)


# -----------------------------------------------------------------------------
# the first stage

def pretraining_model(objective='itc+itm+itg', **changes):
    torch.manual_seed(0)
    model = QFormerPretraining(tiny_config(**QFORMER, objective=objective, vocab_size=40, block_size=12, proj_dim=8, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def random_images(n, seed=2):
    """n random images of different sizes, as patches.collate_images makes them a batch."""
    rng, config = torch.Generator().manual_seed(seed), tiny_config()
    sizes = [(8 * int(torch.randint(1, 4, (1,), generator=rng)), 8) for _ in range(n)]
    pixels = [torch.randint(0, 256, (h, w, 3), generator=rng, dtype=torch.uint8).numpy() for w, h in sizes]
    return collate_images([preprocess(Image.fromarray(p), config) for p in pixels], config)


def pair_batch(ids, images):
    """A batch as dataloader.collate makes it: the image's tokens, then the caption, which is in the loss."""
    image_ids = torch.full((len(ids), 5), tiny_config().image_token)
    return batch_of_ids(torch.cat([image_ids, ids[:, :-1]], dim=1), F.pad(ids, (4, 0), value=-1), images)


def smoothed(logits, correct):
    """Cross entropy with a label smoothing of 0.1, in plain Python."""
    total = math.log(sum(math.exp(x) for x in logits))
    return sum((0.9 * (i == correct) + 0.1 / len(logits)) * (total - x) for i, x in enumerate(logits))


def test_losses_equal_formulas_in_plain_python(monkeypatch):
    model, ids, (patches, grid), n = pretraining_model(), captions(5, 3, 6, 4), random_images(4), 4
    wrong_captions, wrong_images = [2, 0, 3, 1], [1, 3, 0, 0]
    negatives = iter([torch.tensor(wrong_captions), torch.tensor(wrong_images)])
    monkeypatch.setattr('blip2.sample_hard_negatives', lambda similarity, same: next(negatives))
    with torch.no_grad():
        losses = model(pair_batch(ids, (patches, grid)))
        features = [model.vision.features(patches[i:i + 1], grid[i:i + 1]) for i in range(n)]
        tokens = [row[row >= 0][None] for row in ids]

        def qformer(i, j, objective, first):
            opened = torch.cat([torch.tensor([[first]]), tokens[j]], dim=1)
            return model.vision.qformer(*features[i], opened, objective)

        unit = lambda v: v / v.norm(dim=-1, keepdim=True)
        image_embeds = [unit(model.image_proj(qformer(i, i, 'itc', 40)[0][0])) for i in range(n)]  # one for each query
        text_embeds = [unit(model.text_proj(qformer(i, i, 'itc', 40)[1][0, 0])) for i in range(n)]  # that of CLS
        scale = math.exp(model.logit_scale)
        scores = [[scale * max(float(q @ text_embeds[j]) for q in image_embeds[i]) for j in range(n)] for i in range(n)]
        itc = sum(smoothed(scores[i], i) + smoothed([scores[j][i] for j in range(n)], i) for i in range(n)) / (2 * n)

        matching = [(i, i, True) for i in range(n)]
        mismatched = [(i, wrong_captions[i], False) for i in range(n)] + [(wrong_images[j], j, False) for j in range(n)]
        itm = 0
        for i, j, matches in matching + mismatched:
            no, yes = model.itm_head(qformer(i, j, 'itm', 40)[0][0]).mean(0).tolist()
            itm += math.log(math.exp(no) + math.exp(yes)) - (yes if matches else no)
        itm /= 3 * n

        itg, count = 0, 0
        table = model.vision.qformer.wte.weight
        for i in range(n):
            opened = torch.cat([torch.tensor([[41]]), tokens[i]], dim=1)
            for k in range(1, opened.shape[1]):  # token k from the tokens before it, and nothing else
                _, x = model.vision.qformer(*features[i], opened[:, :k], 'itg')
                itg += smoothed((F.gelu(model.itg_head(x[0, -1])) @ table.T).tolist(), int(opened[0, k]))
                count += 1
        itg /= count
    means = {name: loss.item() / n for name, loss in losses.items()}
    assert means == {'itc': pytest.approx(itc, abs=1e-5), 'itm': pytest.approx(itm, abs=1e-5),
                     'itg': pytest.approx(itg, abs=1e-5)}


def test_equal_captions_are_no_negatives():
    model, ids, images = pretraining_model('itc+itm'), captions(5, 3, 6, 4), random_images(4)
    twins = ids.clone()
    twins[1] = twins[0]
    model(pair_batch(twins, images))
    same = (twins[:, None] == twins).all(-1)
    negatives = torch.stack([sample_hard_negatives(torch.zeros(4, 4), same) for _ in range(200)])
    assert not (negatives[:, 0] == 1).any()
    assert not (negatives[:, 1] == 0).any()
    assert not (negatives == torch.arange(4)).any()
    assert len(negatives[:, 2].unique()) == 3
    with pytest.raises(ValueError, match='all captions of a micro-batch are the same'):
        model.train()(pair_batch(twins[:2], tuple(t[:2] for t in images)))


def test_similar_negatives_are_more_likely():
    similar = torch.eye(4).roll(1, 1) * 9
    negatives = torch.stack([sample_hard_negatives(similar, torch.eye(4).bool()) for _ in range(100)])
    assert (negatives == torch.tensor([1, 2, 3, 0])).float().mean() > 0.95


def test_unknown_objective_raises():
    with pytest.raises(ValueError, match='objective must be lm, itc'):
        pretraining_model('itm')


def test_a_batch_of_one_pair_has_an_itm_loss_in_an_evaluation():
    """A last batch of an evaluation may have one pair, which has no negatives."""
    model, ids, images = pretraining_model(), captions(5), random_images(1)
    with torch.no_grad():
        losses = model(pair_batch(ids, images))
    assert set(losses) == {'itc', 'itm', 'itg'} and all(loss.isfinite() for loss in losses.values())


def test_captions_are_the_targets_whatever_their_position():
    model, ids, images = pretraining_model(), captions(5, 3, 6, 4), random_images(4)
    batch = pair_batch(ids, images)
    shifted = {**batch, 'idx': F.pad(batch['idx'], (3, 2), value=-1), 'targets': F.pad(batch['targets'], (3, 2), value=-1)}
    assert torch.equal(model.captions(batch)[:, :6], ids) and model.captions(batch).shape == (4, 12)
    assert torch.equal(model.captions(shifted), model.captions(batch))


# -----------------------------------------------------------------------------
# one contract: train.py does not ask which of the two models it trains

def gpt_and_batch():
    ids = captions(5, 3, 6, 4)
    return make_model(**QFORMER), pair_batch(ids, random_images(4)), int((ids >= 0).sum())


def pretraining_and_batch():
    return pretraining_model(), pair_batch(captions(5, 3, 6, 4), random_images(4)), 4


@pytest.mark.parametrize('build, names', [(gpt_and_batch, {'lm'}), (pretraining_and_batch, {'itc', 'itm', 'itg'})])
def test_both_models_have_the_same_contract(build, names):
    model, batch, weight = build()
    losses = model(batch)
    assert set(losses) == names and all(loss.dim() == 0 and loss.requires_grad for loss in losses.values())
    assert model.loss_weight(batch) == weight
    groups = model.param_groups()
    assert set(groups) == {'gpt', 'sam', 'compressor', 'vision', 'qformer_new', 'qformer', 'connector'}
    grouped = [p for named in groups.values() for p in named.values()]
    assert len(grouped) == len(set(map(id, grouped)))
    assert set(map(id, grouped)) == set(map(id, model.parameters()))
    assert model.base_model is None and model.config.connector == 'qformer'
    train_script.configure_optimizers(model, optimizer_config(vision_lr=0.0))
    trained = {part: any(p.requires_grad for p in named.values()) for part, named in groups.items() if named}
    assert trained.pop('vision') is False and all(trained.values())


@pytest.mark.parametrize('build', [gpt_and_batch, pretraining_and_batch])
def test_losses_are_summed_over_the_loss_weight(build):
    """The same rows twice give twice the sum. (ITC and ITM compare the rows of a batch with each other.)"""
    model, batch, _ = build()
    two = batch_of_ids(batch['idx'][:2], batch['targets'][:2], tuple(t[:2] for t in batch['images']))
    torch.manual_seed(0)
    with torch.no_grad():
        once = model(two)
        twice = model(batch_of_ids(two['idx'].repeat(2, 1), two['targets'].repeat(2, 1),
                                   tuple(t.repeat(2, 1, 1) for t in two['images'])))
    for name in {'lm', 'itg'} & set(once):
        torch.testing.assert_close(twice[name], 2 * once[name])


@pytest.mark.parametrize('build', [gpt_and_batch, pretraining_and_batch])
def test_both_models_train_with_torch_compile(build):
    """Traced forward and backward, without the minutes of C++ compilation: the same losses in three steps."""
    def losses(compiled):
        model, batch, weight = build()
        optimizer, = train_script.configure_optimizers(model.train(), optimizer_config(learning_rate=1e-2, qformer_lr=1e-2))
        runs = torch.compile(model, backend='aot_eager') if compiled else model
        for seed in range(3):
            torch.manual_seed(seed)  # of ITM's negatives
            values = runs(batch)
            yield {name: value.item() for name, value in values.items()}
            (sum(values.values()) / weight).backward()
            optimizer.step()
            optimizer.zero_grad()

    eager, compiled = list(losses(False)), list(losses(True))
    assert eager[2] != eager[0]
    for a, b in zip(eager, compiled):
        assert a == pytest.approx(b, rel=1e-4)


# -----------------------------------------------------------------------------
# a run of the first stage

PRETRAIN = ['--objective=itc+itm+itg', '--connector=qformer', '--n_queries=4', '--qformer_n_layer=2', '--qformer_n_head=2',
            '--qformer_n_embd=32', '--proj_dim=16', '--qformer_lr=1e-3', '--eval_samples=12']


@pytest.fixture(scope='module')
def pretraining_run(tmp_path_factory):
    """The out_dir of a first stage."""
    out_dir = tmp_path_factory.mktemp('pretraining')
    process = train(out_dir, *PRETRAIN)
    assert process.returncode == 0, process.stderr
    return out_dir


def test_two_ranks_contrast_like_one_with_the_whole_batch(tmp_path):
    itc = [*PRETRAIN, '--objective=itc']
    one = train(tmp_path / '1', *itc, '--batch_size=8')
    two = train(tmp_path / '2', *itc, '--batch_size=4', '--gradient_accumulation_steps=2', processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = ([row['loss'] for row in read_log(tmp_path / n) if 'loss' in row] for n in '12')
    assert len(a) == 4 and a == pytest.approx(b, abs=1e-5)
    # and the gradients are the same: they cross the ranks too
    script = tmp_path / 'ranks.py'
    script.write_text(f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n'
                      f'import test_qformer; test_qformer.gradients_of_a_rank({str(tmp_path)!r})\n')
    process = launch(script, processes=2)
    assert process.returncode == 0, process.stderr
    model = pretraining_model('itc').train()
    (model(pair_batch(captions(5, 3, 6, 4), random_images(4)))['itc'] / 4).backward()
    gradients = torch.load(tmp_path / 'gradients.pt')
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4)


def gradients_of_a_rank(folder):
    """Run by two processes: the gradient of half of the batch each, averaged by DDP, as the training loop has it."""
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(pretraining_model('itc').train())
    half = slice(2 * rank, 2 * rank + 2)
    batch = pair_batch(captions(5, 3, 6, 4)[half], tuple(t[half] for t in random_images(4)))
    (model(batch)['itc'] * (2 / 4)).backward()  # ranks / pairs of all ranks
    if rank == 0:
        torch.save({name: p.grad for name, p in model.module.named_parameters()}, Path(folder) / 'gradients.pt')
    torch.distributed.barrier()  # leave together: the first one out would break the other's connection
    torch.distributed.destroy_process_group()


def test_an_evaluation_reports_losses_and_recall(pretraining_run):
    result = [row['eval'] for row in read_log(pretraining_run) if 'eval' in row][-1]
    assert set(result) == {'val_loss', 'itc', 'itm', 'itg', 'cosine', 'chance_r1', 'n',
                           *(f'{way}_r{k}' for way in ('i2t', 't2i') for k in (1, 5, 10))}
    assert result['val_loss'] == pytest.approx(sum(result[name] for name in ('itc', 'itm', 'itg')))
    assert (pretraining_run / 'samples.png').exists()
    assert result['n'] == 12 and result['chance_r1'] == 1 / 12


def test_a_first_stage_resumes_exactly(pretraining_run, tmp_path):
    assert train(tmp_path / 'a', *PRETRAIN, '--max_iters=2', '--lr_decay_iters=4').returncode == 0
    process = train(tmp_path / 'a', *PRETRAIN, '--lr_decay_iters=4', '--init_from=resume')
    assert process.returncode == 0, process.stderr
    assert read_log(tmp_path / 'a')[-1] == read_log(pretraining_run)[-1]
    a, b = (read_weights(folder / 'ckpt.pt')['model'] for folder in (tmp_path / 'a', pretraining_run))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_evaluations_of_the_same_weights_are_equal(tmp_path):
    no_change = [f'--{rate}=1e-12' for rate in ('learning_rate', 'vision_lr', 'qformer_lr', 'muon_lr')]
    assert train(tmp_path, *PRETRAIN, *no_change, '--min_lr=1e-13').returncode == 0
    first, *others = [row['eval'] for row in read_log(tmp_path) if 'eval' in row]
    assert len(others) == 2 and all(other == pytest.approx(first, abs=1e-5) for other in others)


def test_a_last_evaluation_batch_of_one_pair_does_not_end_the_run(tmp_path):
    process = train(tmp_path, *PRETRAIN, '--max_iters=2', '--batch_size=4', '--eval_iters=2', '--eval_samples=5')
    assert process.returncode == 0, process.stderr
    assert [row['eval']['n'] for row in read_log(tmp_path) if 'eval' in row] == [5, 5]


def test_recall_equals_counting_by_hand():
    unit = lambda *rows: F.normalize(torch.tensor(rows, dtype=torch.float), dim=-1)
    images = unit([1, 0, 0], [0, 1, 0], [0, 0, 1])[:, None].repeat(1, 2, 1)
    perfect = recall(similarity(images, images[:, 0]), torch.arange(3))
    assert perfect['i2t_r1'] == perfect['t2i_r1'] == 1
    assert mean_cosine(images) == pytest.approx(0, abs=1e-6)
    # images 0 and 1 have each other's captions; image 2 has a second caption, which is not similar to it
    texts = unit([0, 1, 0.1], [1, 0, 0.2], [0, 0, 1], [1, 1, 0])
    result = recall(similarity(images, texts), torch.tensor([0, 1, 2, 2]))
    assert result['i2t_r1'] == pytest.approx(1 / 3) and result['t2i_r1'] == pytest.approx(1 / 4)
    assert result['i2t_r5'] == result['t2i_r5'] == 1 and result['chance_r1'] == pytest.approx(1 / 3)
    # the closest query counts, not the mean of the queries
    two = torch.stack([unit([1, 0], [0, 1]), unit([0, 1], [-1, 0])])
    assert recall(similarity(two, unit([1, 0.1], [-1, 0.1])), torch.arange(2))['i2t_r1'] == 1
    # a collapsed model has recall 0, though nothing is more similar than the correct caption
    collapsed = images[:1].repeat(20, 1, 1)
    result = recall(similarity(collapsed, collapsed[:, 0]), torch.arange(20))
    assert result['i2t_r10'] == result['t2i_r10'] == 0
    assert mean_cosine(collapsed) == pytest.approx(1)


def test_retrieval_uses_images_and_captions_that_occur_once():
    row = lambda image, *texts: {'text': f'<image>{texts[0]}', 'images': [image], 'references': list(texts)}
    rows = [row('a', 'x', 'y'), row('a', 'z'), row('b', 'y'), row('c', 'u'), {'text': 'no image', 'images': []}, row('d', 'v')]
    examples, texts, image_index = image_caption_pairs(rows, 9)
    assert [e['images'] for e in examples] == [['a'], ['c'], ['d']]
    assert texts == ['x', 'y', 'u', 'v'] and image_index.tolist() == [0, 0, 1, 2]
    assert len(image_caption_pairs(rows, 2)[0]) == 2
    with pytest.raises(ValueError, match='fewer than two'):
        image_caption_pairs(rows[:1], 9)


def test_sample_evaluates_a_first_stage(pretraining_run):
    process = inside('sample.py', f'--out_dir={pretraining_run}', '--eval=pydoc', '--eval_samples=12', '--device=cpu')
    assert process.returncode == 0, process.stderr
    result, logged = json.loads(process.stdout), read_log(pretraining_run)[-1]['eval']
    assert result == {key: pytest.approx(logged[key], abs=1e-6) for key in result} and result['n'] == 12
    table = list(csv.DictReader((pretraining_run / 'eval.csv').open()))
    assert len(table) == 12 and (pretraining_run / 'eval.png').exists()
    assert sum(row['rank'] == '1' for row in table) == round(12 * result['i2t_r1'])
    assert all((row['rank'] == '1') == (row['caption'] == row['nearest']) for row in table)


def test_a_first_stage_is_no_gpt(pretraining_run, tmp_path):
    refused(inside('sample.py', f'--out_dir={pretraining_run}', '--prompt=Hello'), 'cannot generate text')
    refused(train(tmp_path, f'--init_from={pretraining_run}/ckpt.pt'), 'a run with objective lm cannot start from',
            f'--vision_from={pretraining_run}/ckpt.pt takes over its encoder and Q-Former')
    refused(train(tmp_path, '--objective=itc'), 'set --connector=qformer')
    refused(train(tmp_path, *PRETRAIN, '--objective=itc', '--dataset=nowhere'), 'no dataset')


@pytest.mark.parametrize('row, words', [
    ({'messages': [{'role': 'user', 'content': 'No image?'}, {'role': 'assistant', 'content': 'None.'}]}, 'has 0 images'),
    ({'text': '<image>Two.<image>', 'images': ['a.png', 'a.png']}, 'has 2 images'),
    ({'messages': [{'role': 'user', 'content': '<image>'}, {'role': 'assistant', 'content': ''}], 'images': ['a.png']},
     'a caption of 0 tokens')])
def test_rows_that_are_no_pairs_are_refused(tmp_path, row, words):
    for name in 'ab':
        Image.new('RGB', (20, 16)).save(tmp_path / f'{name}.png')
    pairs = [{'text': '<image>One.', 'images': ['a.png']}, {'text': '<image>Other.', 'images': ['b.png']}]
    (tmp_path / 'train.jsonl').write_text((json.dumps(row) + '\n') * 4)
    (tmp_path / 'val.jsonl').write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
    process = train(tmp_path / 'out', *PRETRAIN, f'--dataset={tmp_path}')
    refused(process, 'trains on pairs of an image and a caption', words)


# -----------------------------------------------------------------------------
# the second stage

SECOND_STAGE = ['--connector=qformer', '--n_queries=4', '--qformer_n_layer=2', '--qformer_n_head=2', '--qformer_n_embd=32',
                '--qformer_lr=1e-3']


def test_an_image_becomes_as_many_tokens_as_there_are_queries():
    config = tiny_config(**QFORMER)
    model = make_model(**QFORMER)
    small = random_images(1)
    large = collate_images([preprocess(Image.new('RGB', (32, 32), 'red'), config)], config)
    for images in (small, large):
        emb, valid = model.vision(*images)
        assert emb.shape == (1, 5, 32) and valid.all()
    assert num_tokens((large[0][0], large[1][0]), config) == 5
    idx = F.pad(torch.full((1, 5), 256), (2, 3), value=7)
    a, b = (model.logits(idx, images)[0] for images in (small, large))
    assert torch.equal(a[:2], b[:2]) and ((a[2:] - b[2:]).abs().amax(-1) > 1e-4).all()


def test_a_batch_of_text_keeps_the_qformer_in_the_graph():
    """Padding makes no token, but each parameter gets a gradient: other ranks wait for it."""
    model = make_model(**QFORMER)
    no_images = collate_images([], model.config)
    assert not model.vision(*no_images)[1].any()
    idx = torch.randint(0, 250, (2, 9))
    assert torch.equal(model.logits(idx, no_images), model.logits(idx))
    model(batch_of_ids(idx, idx, no_images))['lm'].backward()
    assert all(p.grad is not None for p in model.vision.parameters())


@pytest.fixture(scope='module')
def text_run(tmp_path_factory):
    """The out_dir of a text-only GPT."""
    out_dir = tmp_path_factory.mktemp('text')
    process = train(out_dir, '--vision_encoder=', '--tasks=text')
    assert process.returncode == 0, process.stderr
    return out_dir


def test_a_gpt_takes_over_the_vision_of_the_first_stage(pretraining_run, text_run, tmp_path):
    knobs = [*SECOND_STAGE, '--max_iters=2', f'--vision_from={pretraining_run}/ckpt.pt', '--n_queries=9']
    frozen = train(tmp_path / 'a', *knobs, '--lora_rank=2', '--optimizer=adamw', f'--init_from={text_run}/ckpt.pt',
                   '--vision_lr=0', '--qformer_lr=0')
    assert frozen.returncode == 0, frozen.stderr
    assert 'n_queries 4' in frozen.stderr
    assert 'loaded    vision.encoder' in frozen.stderr and 'loaded    vision.qformer' in frozen.stderr
    theirs, ours = (read_weights(folder / 'ckpt.pt')['model'] for folder in (pretraining_run, tmp_path / 'a'))
    names = [name for name in ours if name.startswith(('vision.encoder.', 'vision.qformer.'))]
    assert len(names) > 40 and all(torch.equal(theirs[name], ours[name]) for name in names)
    assert not any('text_mlp' in name or 'wte' in name for name in names)
    # from scratch everything is trained
    process = train(tmp_path / 'b', *knobs)
    assert process.returncode == 0, process.stderr
    trained = read_weights(tmp_path / 'b' / 'ckpt.pt')['model']
    assert not torch.equal(trained['vision.qformer.queries'], theirs['vision.qformer.queries'])
    assert {'cer', 'blank_loss', 'shuffled_loss'} <= set(read_log(tmp_path / 'b')[-1]['eval'])
    Image.new('RGB', (60, 16), 'white').save(tmp_path / 'a.png')
    process = inside('sample.py', f'--out_dir={tmp_path}/b', '--image', tmp_path / 'a.png', '--max_new_tokens=3')
    assert process.returncode == 0, process.stderr
    refused(train(tmp_path / 'c', *SECOND_STAGE, f'--vision_from={text_run}/ckpt.pt'), 'no small ViT or deepencoder')


@pytest.mark.parametrize('connector', [['--connector=qformer'], ['--connector=linear'],
                                       ['--connector=pool', '--vision_from=', '--patch_width=4']])
def test_the_recipe_that_compares_connectors(pretraining_run, text_run, tmp_path, connector):
    small = [f'--init_from={text_run}/ckpt.pt', f'--vision_from={pretraining_run}/ckpt.pt', '--batch_size=2', '--max_iters=2',
             '--block_size=48', '--eval_interval=2', '--eval_iters=1', '--eval_samples=2', '--num_workers=0', '--device=cpu',
             '--compile=False', '--min_span=20', '--max_span=40', f'--out_dir={tmp_path}/out', *connector]
    process = inside('train.py', ROOT / 'config' / 'connectors_cpu.py', *small)
    assert process.returncode == 0, process.stderr
    evals = [row['eval'] for row in read_log(tmp_path / 'out') if 'eval' in row]
    assert evals[0]['text_loss'] == evals[1]['text_loss'] and evals[0]['val_loss'] != evals[1]['val_loss']


# -----------------------------------------------------------------------------
# BLIP-2's published Q-Former

FROM_BLIP2 = ['--connector=qformer', '--max_iters=1', '--qformer_lr=0', '--vision_n_embd=24']


def test_a_run_starts_with_blip2s_qformer(blip2, tmp_path):
    _, folder = blip2
    process = train(tmp_path / 'a', *FROM_BLIP2, f'--vision_from={folder}')
    assert process.returncode == 0, process.stderr
    assert 'n_queries 5, qformer_n_layer 4, qformer_n_head 2, qformer_n_embd 16' in process.stderr
    _, state = vision_of(read_weights(folder), folder, 'qformer')
    ours = read_weights(tmp_path / 'a' / 'ckpt.pt')['model']
    taken = [name for name in state if name in ours]
    assert torch.equal(ours['vision.qformer.ln_image.weight'], state['vision.qformer.ln_image.weight'])
    assert len(taken) == len([name for name in ours if name.startswith('vision.qformer.')])
    assert all(torch.equal(ours[name], state[name]) for name in taken)
    wide = train(tmp_path / 'b', *FROM_BLIP2, f'--vision_from={folder}', '--vision_n_embd=32')
    refused(wide, 'ln_image.weight is (24,), not (32,)')
    refused(train(tmp_path / 'b', *FROM_BLIP2, f'--vision_from={folder}', '--connector=mlp'), 'no small ViT or deepencoder')


LAYER = 'qformer.encoder.layer.1.output_query.dense.weight'


@pytest.mark.parametrize('change, words', [
    (lambda tensors: tensors.pop(LAYER), 'missing vision.qformer.h.1.query_mlp'),
    (lambda tensors: tensors.update({'qformer.extra': torch.zeros(2)}), 'unexpected vision.qformer.qformer.extra')])
def test_a_qformer_with_other_tensors_is_refused(blip2, tmp_path, change, words):
    shutil.copytree(blip2[1], tmp_path / 'other')
    tensors = load_file(blip2[1] / 'model.safetensors')
    change(tensors)
    save_file(tensors, tmp_path / 'other' / 'model.safetensors', metadata={'format': 'pt'})
    refused(train(tmp_path / 'a', *FROM_BLIP2, f'--vision_from={tmp_path}/other'), words)


def test_a_qformer_with_another_activation_is_refused(blip2, tmp_path):
    shutil.copytree(blip2[1], tmp_path / 'other')
    settings = json.loads((blip2[1] / 'config.json').read_text())
    settings['qformer_config']['hidden_act'] = 'relu'
    (tmp_path / 'other' / 'config.json').write_text(json.dumps(settings))
    process = train(tmp_path / 'a', *FROM_BLIP2, f'--vision_from={tmp_path}/other')
    refused(process, "its hidden_act is 'relu', not 'gelu'")


def test_vision_from_a_gpt_that_is_no_blip2_is_refused(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "mamba"}')
    save_file({'x': torch.zeros(1)}, tmp_path / 'model.safetensors')
    process = train(tmp_path / 'a', *FROM_BLIP2, f'--vision_from={tmp_path}')
    refused(process, "llava, got 'mamba'")


def test_the_first_stage_starts_with_blip2s_queries_and_its_own_vocabulary(blip2, tmp_path):
    """The text embeddings of BLIP-2 are those of BERT's vocabulary: they are left out, and the run has new ones."""
    _, folder = blip2
    words = [*PRETRAIN, '--max_iters=1', '--qformer_lr=0', '--vision_n_embd=24', f'--vision_from={folder}']
    process = train(tmp_path, *words)
    assert process.returncode == 0, process.stderr
    _, state = vision_of(read_weights(folder), folder, 'qformer')
    ours = read_weights(tmp_path / 'ckpt.pt')['model']
    own = {name for name in ours if name.startswith('vision.qformer.')}
    new = {'vision.qformer.wte.weight', 'vision.qformer.wpe.weight'}
    assert own == set(state) and all(ours[name].shape != state[name].shape for name in new)
    assert all(torch.equal(ours[name], state[name]) for name in own - new)
    assert any('text_mlp' in name for name in own)
    table = {tuple(line.split()[:4]) for line in process.stderr.splitlines() if 'vision.qformer' in line}
    assert ('new', 'vision.qformer', '2', 'tensors') in table
    assert ('loaded', 'vision.qformer', str(len(own) - 2), 'tensors') in table


def test_the_shape_of_qformer_align_is_that_of_the_published_blip2():
    """Salesforce/blip2-itm-vit-g without its numbers: each of its tensors fits the recipe, except the text embeddings."""
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('open_clip')
    with torch.device('meta'):
        theirs = transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(
            qformer_config=dict(vocab_size=30523, use_qformer_text_input=True), image_text_hidden_size=256))
    args, state = read_blip2(theirs.config.to_dict(), theirs.state_dict())
    assert (args['vision_n_embd'], args['vision_n_layer'], args['vocab_size'], args['block_size']) == (1408, 39, 30523, 512)
    args = {name: args[name] for name in ('connector', *QFORMER_FIELDS)}
    state = {name: p for name, p in state.items() if name.startswith('vision.qformer.')}
    recipe = configure(dict(vars(train_script)), GPTConfig, [str(ROOT / 'config' / 'qformer_align.py')])
    assert {name: recipe[name] for name in args} == args
    encoder = 'EVA01-g-14/laion400m_s11b_b41k'
    assert encoder in (ROOT / 'config' / 'qformer_align.py').read_text()
    shape = vision.tower_shape(GPTConfig(vision_encoder=encoder, vision_cls=True, image_fit='pad'))
    config = GPTConfig(**args, objective=recipe['objective'], block_size=recipe['block_size'], vocab_size=50304)
    model = torch.nn.Module()
    model.config = config
    model.vision = torch.nn.Module()
    with torch.device('meta'):
        model.vision.qformer = QFormer(config, shape.width, config.vocab_size + 2)
    table = load_weights(model, state, 'BLIP-2', only='vision.qformer.', optional=QFORMER_TEXT)
    assert [line.split()[:3] for line in table.splitlines() if line.startswith('new')] == [['new', 'vision.qformer', '2']]


def test_qformer_align_starts_with_blip2s_queries(blip2, tmp_path):
    """The recipe's own knobs, with a BLIP-2 and an encoder of a few thousand weights in place of the published ones."""
    write_pairs(tmp_path)
    small = [f'--dataset={tmp_path}', '--tokenizer=bytes', '--vision_encoder=vit', '--vision_n_layer=1', '--vision_n_head=2',
             '--vision_n_embd=24', '--batch_size=4', '--gradient_accumulation_steps=1', '--max_iters=2', '--eval_interval=2',
             '--eval_iters=1', '--eval_samples=2', '--num_workers=0', '--device=cpu', '--compile=False',
             f'--vision_from={blip2[1]}', f'--out_dir={tmp_path}/out']
    process = inside('train.py', ROOT / 'config' / 'qformer_align.py', *small)
    assert process.returncode == 0, process.stderr
    assert 'new       vision.qformer' in process.stderr
    assert [row['iter'] for row in read_log(tmp_path / 'out') if 'eval' in row] == [0, 2]
