"""What must stay true of packed rows: documents in one row do not see each other, and none is lost."""

import contextlib
import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LLAMA, inside, make_model, read_log, refused, tiny_config, train
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import dataloader
from dataloader import collate, get_tokenizer, pack, tokenize
from model import attend_in_blocks, document_block_mask, document_mask
from patches import preprocess
from train import estimate_flops, mark_sizes, train_step

BYTES = get_tokenizer('bytes')


def image(rng):
    """A small image of noise, of a random size."""
    size = rng.choice([(8, 8), (16, 8), (24, 16)])
    return Image.frombytes('RGB', size, rng.randbytes(3 * size[0] * size[1]))


def document(rng, n_images, config):
    """A tokenized text with n_images at random places."""
    words = [''.join(rng.choices('abcdef', k=rng.randint(1, 4))) for _ in range(n_images + 1)]
    example = {'text': '<image>'.join(words), 'images': [image(rng) for _ in range(n_images)]}
    return tokenize(example, BYTES, config, 'all')


def packed(documents, config, batch_size=1, **knobs):
    """All the documents in one batch: after them come some that are as long as a row, which have to wait."""
    filler = {'idx': [97] * config.block_size, 'targets': [97] * config.block_size, 'images': []}
    stream = itertools.chain(enumerate(documents), ((i, filler) for i in itertools.count(1000)))
    batch = next(pack(stream, config, batch_size, 8, **knobs))
    assert int((batch['idx'] >= 0).sum()) == sum(len(d['idx']) for d in documents), 'choose another block_size'
    return batch


def gradients(model, batch):
    model.zero_grad()
    loss = model(batch)['lm']
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('switches', [{}, LLAMA, {'lora_rank': 4, 'lora_scope': 'image'}], ids=['gpt2', 'llama', 'lora'])
@pytest.mark.parametrize('n_images', [(0, 0, 0), (1, 1, 1), (0, 3, 1, 0, 2)], ids=['text', 'one image', 'many images'])
def test_packed_documents_have_the_loss_and_gradients_of_single_ones(switches, n_images):
    model = make_model(block_size=96, **switches)
    for name, p in model.named_parameters():
        if '.lora_b' in name:
            torch.nn.init.normal_(p, std=0.1)
    rng = random.Random(0)
    documents = [document(rng, n, model.config) for n in n_images]
    loss, grads = gradients(model, packed(documents, model.config))
    total, summed = 0, {}
    for d in documents:
        part, part_grads = gradients(model, collate([d], model.config))
        total += part
        summed = {name: g + summed.get(name, 0) for name, g in part_grads.items()}
    assert loss == pytest.approx(total, rel=1e-5)
    assert set(grads) == set(summed)
    for name, g in grads.items():
        torch.testing.assert_close(g, summed[name], atol=1e-4, rtol=1e-3, msg=name)


def test_a_changed_token_or_image_changes_no_other_document(tiny_model):
    config = tiny_model.config
    rng = random.Random(1)
    documents = [document(rng, n, config) for n in (1, 2, 0)]
    with torch.no_grad():
        logits = lambda batch: tiny_model.logits(batch['idx'], batch['images'], batch['docs'])
        batch = packed(documents, config)
        before = logits(batch)
        own = batch['docs'] == 0
        other_token = {**documents[0], 'idx': [i if i == config.image_token else 98 for i in documents[0]['idx']]}
        other_image = {**documents[0], 'images': [preprocess(Image.new('RGB', (24, 16), 'red'), config)]}
        size = len(documents[0]['images'][0][1])
        other_image['images'] = [(other_image['images'][0][0][:size], documents[0]['images'][0][1])]
        for changed in (other_token, other_image):
            after = logits(packed([changed, *documents[1:]], config))
            assert (after - before)[own].abs().max() > 1e-3
            assert torch.equal(after[batch['docs'] > 0], before[batch['docs'] > 0])


def test_flex_attention_is_attention_under_the_mask():
    torch.manual_seed(0)
    docs = torch.tensor([[0] * 5 + [1] * 40 + [2] * 3 + [-1] * 16, [0] * 64])
    q = torch.randn(2, 4, 64, 16)
    k, v = torch.randn(2, 2, 2, 64, 16)
    y = attend_in_blocks(q, k, v, document_block_mask(docs), enable_gqa=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, document_mask(docs), enable_gqa=True)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='FlexAttention has no backward pass on a CPU')
def test_flex_attention_has_the_gradients_of_the_mask_on_a_gpu():
    torch.manual_seed(0)
    docs = torch.tensor([[0] * 50 + [1] * 140 + [2] * 30 + [-1] * 36, [0] * 256], device='cuda')
    q = torch.randn(2, 4, 256, 32, device='cuda', requires_grad=True)
    k, v = torch.randn(2, 2, 2, 256, 32, device='cuda', requires_grad=True)
    ours = attend_in_blocks(q, k, v, document_block_mask(docs), enable_gqa=True)
    mask = (docs[:, :, None] == docs[:, None]).tril()[:, None]
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    upstream = torch.randn_like(ours)
    for own, other in zip(torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream)):
        torch.testing.assert_close(own, other, atol=5e-3, rtol=5e-3)  # tf32


def llava_lengths(n):
    """Documents as long as LLaVA-665k's, roughly: log-normal text, some without, most with one image of 49 tokens."""
    rng = random.Random(0)
    config = tiny_config(block_size=1024, max_image_tokens=49)
    blank = preprocess(Image.new('RGB', (56, 56)), config)
    for _ in range(n):
        n_images = rng.choices((0, 1, 2, 3, 4), (6, 84, 5, 3, 2))[0]
        n_text = min(900, max(8, int(rng.lognormvariate(5.2, 0.8))))
        idx = [config.image_token] * (49 * n_images) + [97] * n_text
        yield {'idx': idx[:1024], 'targets': idx[1:1025], 'images': [blank] * n_images}


def test_97_percent_of_the_places_carry_a_token_and_every_document_is_packed_once():
    config = tiny_config(block_size=1024, max_image_tokens=49)
    documents = list(llava_lengths(1500))
    numbered = [{**d, 'idx': d['idx'][:-1] + [i % 250]} for i, d in enumerate(documents)]
    stream = enumerate(itertools.cycle(numbered))
    n_tokens = n_places = 0
    lengths = []
    for batch in itertools.islice(pack(stream, config, 4, 8), 60):
        n_tokens += int((batch['idx'] >= 0).sum())
        n_places += batch['idx'].numel()
        state = batch['packing']
        assert len(state['waiting']) == dataloader.WAITING and state['left_out'] == 0
        for row, docs in zip(batch['idx'], batch['docs']):
            lengths += [int((docs == number).sum()) for number in range(int(docs.max()) + 1)]
            assert (docs[1:] - docs[:-1])[docs[1:] >= 0].min() >= 0 and torch.equal(row >= 0, docs >= 0)
    assert n_tokens / n_places >= 0.97
    taken = [len(numbered[i]['idx']) for i in range(state['last'] + 1) if i not in state['waiting']]
    assert sorted(lengths) == sorted(taken), 'every document up to the last one is packed once, or waits'


def test_long_documents_are_cut_after_their_last_image_or_left_out_and_counted():
    config = tiny_config(block_size=32)
    picture = preprocess(Image.new('RGB', (16, 16)), config)
    token = config.image_token
    fits = {'idx': [token] * 4 + [97] * 50, 'targets': [-1] * 3 + [97] * 51, 'images': [picture]}
    image_last = {'idx': [97] * 30 + [token] * 4 + [97], 'targets': [97] * 35, 'images': [picture]}
    no_target = {'idx': [97] * 40, 'targets': [-1] * 39 + [97], 'images': []}
    many_images = {'idx': [token] * 12 + [97], 'targets': [-1] * 12 + [97], 'images': [picture] * 3}
    position_limit = {'error': 'text and images up to the last image take ...', 'is_too_long': True}
    filler = {'idx': [98] * 32, 'targets': [98] * 32, 'images': []}
    documents = [image_last, no_target, many_images, position_limit, fits]
    stream = itertools.chain(enumerate(documents), ((i, filler) for i in itertools.count(5)))
    batch = next(pack(stream, config, 1, max_images=2))
    assert batch['packing']['left_out'] == 4 and batch['idx'].tolist() == [fits['idx'][:32]]
    broken = {'error': 'no image at x.png', 'is_too_long': False}
    with pytest.raises(ValueError, match='no image at x.png'):
        next(pack(iter([(0, broken)]), config, 1, 2))
    with pytest.raises(ValueError, match='of 1000 examples in succession none has a target within a row of 32 tokens'):
        next(pack(enumerate(itertools.repeat(image_last)), config, 1, 2))


def test_packed_documents_take_the_operations_of_single_ones():
    model = make_model(block_size=96)
    rng = random.Random(0)
    documents = [document(rng, n, model.config) for n in (0, 2, 1)]
    batch = packed(documents, model.config)
    single = [estimate_flops(model, collate([d], model.config)) for d in documents]
    assert estimate_flops(model, batch) == sum(single) > 0


def test_images_of_a_fixed_length_change_nothing():
    model = make_model(block_size=96)
    rng = random.Random(0)
    documents = [document(rng, n, model.config) for n in (1, 0, 2)]
    a = packed(documents, model.config)
    b = packed(documents, model.config, fixed_length=True)
    assert b['images'][0].shape[:2] == b['images'][1].shape[:2] == (3, model.config.max_image_tokens)
    with torch.no_grad():
        assert model(a)['lm'].item() == pytest.approx(model(b)['lm'].item(), rel=1e-6)
    text_only = packed([document(rng, 0, model.config)], model.config, fixed_length=True)
    assert text_only['images'][0].shape[:2] == (2, model.config.max_image_tokens)


PACKED = ['--packing=True', '--tasks=ocr:1 text:1', '--batch_size=2', '--block_size=96', '--gradient_accumulation_steps=2']


def losses(out_dir):
    return [(row['iter'], row['loss'], row['left_out']) for row in read_log(out_dir) if 'loss' in row]


@pytest.mark.parametrize('processes, workers', [(0, 0), (1, 2), (2, 1)])
def test_a_resumed_packed_run_is_exact(tmp_path, processes, workers):
    knobs = [*PACKED, f'--num_workers={workers}']
    whole = train(tmp_path / 'a', *knobs, '--max_iters=6', '--lr_decay_iters=6', processes=processes)
    assert whole.returncode == 0, whole.stderr
    half = train(tmp_path / 'b', *knobs, '--max_iters=4', '--lr_decay_iters=6', processes=processes)
    assert half.returncode == 0, half.stderr
    again = train(tmp_path / 'b', *knobs, '--max_iters=6', '--lr_decay_iters=6', '--init_from=resume', processes=processes)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b') and len(losses(tmp_path / 'a')) == 6
    a, b = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in 'ab')
    assert a['packing'] == b['packing'] and len(a['packing']) == max(1, processes)
    assert all(torch.equal(p, b['model'][name]) for name, p in a['model'].items())


def test_another_number_of_processes_continues_and_says_what_is_left_out(tmp_path):
    assert train(tmp_path, *PACKED, '--max_iters=2').returncode == 0
    process = train(tmp_path, *PACKED, '--init_from=resume', '--max_iters=4', processes=2)
    assert process.returncode == 0, process.stderr
    assert f'{dataloader.WAITING} documents that waited for a row are left out' in process.stderr
    assert [iteration for iteration, *_ in losses(tmp_path)] == [1, 2, 3, 4]


def test_packing_is_refused_where_it_would_be_wrong(tmp_path):
    knobs = ['--packing=True', '--objective=itc', '--connector=qformer', '--qformer_n_layer=1', '--qformer_n_head=2',
             '--qformer_n_embd=32']
    refused(train(tmp_path, *knobs), 'packing is for a GPT')


def test_show_packed_draws_the_documents_of_a_row_and_their_mask(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{'text': f'<image>Document {i}, {"x" * i}.', 'images': [f'{i}.png']} for i in range(30)]
    for split in ('train', 'val'):
        (tmp_path / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    for i in range(30):
        Image.new('RGB', (32, 16), 'red').save(f'{i}.png')
    process = inside('prepare_data.py', 'show', f'--dataset={tmp_path}', '--packed', '--index=5', '--block_size=64',
                     '--loss_on=all')
    assert process.returncode == 0, process.stderr
    assert 'row 5 to train on: 1 images, 21 tokens at positions 0 to 19, ' in process.stderr
    assert '[[Document 5, xxxxx.' in process.stdout and '[[Document 6, xxxxxx.' in process.stdout
    pixels = np.asarray(Image.open('show.png').convert('RGB')).astype(int)
    size = 64 * (720 // 64)
    mask = pixels[-size - 8:-8, 8:size + 8][5::720 // 64, 5::720 // 64]  # a pixel of each token
    # rows 5 and 6, and row 0 of the next round, which is the first that fits
    allowed = document_mask(torch.tensor([[0] * 21 + [1] * 22 + [2] * 16 + [-1] * 5]))[0, 0].numpy()
    allowed[59:] = False  # padding is white
    assert np.array_equal((mask != 255).any(-1), allowed)


# -----------------------------------------------------------------------------
# torch.compile: traced forward and backward, without the minutes of C++ compilation

def compiled_and_eager(model, batches):
    """(the number of graphs, whether losses and gradients of the compiled model are the eager one's)"""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=counter)
    for batch in batches:
        loss, grads = gradients(model, batch)
        model.zero_grad()
        mark_sizes(batch, model.config)
        value = compiled(batch)['lm']
        value.backward()
        assert value.item() == pytest.approx(loss, rel=1e-5)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, grads[name], atol=1e-4, rtol=1e-3, msg=name)
    return counter.frame_count


@pytest.mark.parametrize('max_logits, n_graphs', [(2**28, 1), (20_000, 2)], ids=['at once', 'in one or two chunks'])
def test_packed_rows_compile_to_one_graph(monkeypatch, max_logits, n_graphs):
    """In which the numbers of images and targets are variables."""
    monkeypatch.setattr('model.MAX_LOGITS', max_logits)
    model = make_model(block_size=96)
    rng = random.Random(0)
    documents = [document(rng, rng.choice((0, 0, 0, 0, 1, 2)), model.config) for _ in range(900)]
    batches = pack(enumerate(documents), model.config, 1, 8, fixed_length=True)
    batches = [{name: value for name, value in batch.items() if name != 'packing'} for batch in itertools.islice(batches, 40)]
    assert len({len(batch['images'][0]) for batch in batches}) > 4
    assert compiled_and_eager(model, batches) == n_graphs


def test_chunks_of_the_logits_make_few_graphs(monkeypatch):
    """Padded batches that need between one and seven chunks: a graph for one, two, four and eight."""
    monkeypatch.setattr('model.MAX_LOGITS', 5_000)
    model = make_model(block_size=96)
    rng = random.Random(0)
    batches = []
    for _ in range(40):
        length = rng.randint(4, 40)
        row = {'idx': [model.config.image_token] * 6 + [97] * length, 'targets': [-1] * 6 + [97] * length,
               'images': [preprocess(Image.new('RGB', (24, 16)), model.config)]}
        batches.append(collate([row, row], model.config))
    assert {math.ceil(len(batch['places']) * model.config.vocab_size / 5000) for batch in batches} >= {1, 3, 4, 5}
    assert compiled_and_eager(model, batches) == 4


def test_a_compiled_run_has_one_graph_for_batches_of_all_sizes():
    torch._dynamo.reset()
    model = make_model(block_size=96)
    counter = CompileCounterWithBackend('eager')
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = SimpleNamespace(compile=True, grad_clip=0.0)
    dist_env = SimpleNamespace(ddp=False, world_size=1, device='cpu')
    compiled = torch.compile(model, backend=counter)
    for n in (2, 3, 5, 4):  # letters, images, and patches of each
        example = {'text': '<image>' * n + 'a' * n, 'images': [Image.new('RGB', (8 * n, 8))] * n}
        batch = collate([tokenize(example, BYTES, model.config, 'all')] * 2, model.config)
        assert batch['images'][0].shape[:2] == (2 * n, n)
        train_step(compiled, [optimizer], torch.amp.GradScaler('cpu', enabled=False), [batch], contextlib.nullcontext(), config,
                   dist_env, 0)
    assert counter.frame_count == 1
