"""What must stay true of the GPT: it is GPT-2, images change the logits after them, and nothing else does."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA, batch_of_ids, make_model, optimizer_config, tiny_config
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.optim import _muon

import train
from model import GPT, GPTConfig, sample_token
from patches import collate_images, num_tokens, preprocess
from train import Muon, best_dtype, configure_optimizers, orthogonalize
from weights import load_model, read_weights


def random_image(seed, size=(24, 16)):
    """A random image as (patches, grid)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8).numpy()
    return preprocess(Image.fromarray(pixels), tiny_config())


def row(*items):
    """The ids of a row; an image becomes as many <image> ids as it makes tokens."""
    ids = []
    for item in items:
        ids += [item] if isinstance(item, int) else [256] * num_tokens(item, tiny_config())
    return ids


def pad(rows, length=None):
    length = length or max(map(len, rows))
    return torch.tensor([r + [-1] * (length - len(r)) for r in rows])


def mean_loss(model, idx, targets, images=None):
    batch = batch_of_ids(idx, targets, images)
    return model(batch)['lm'] / model.loss_weight(batch)


def test_lora_after_images_changes_neither_text_nor_what_comes_before_the_image():
    base = make_model()
    lora = make_model(lora_rank=2, lora_scope='image')
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if '.lora_b' in name:
                p.normal_()
    lora.load_state_dict(base.state_dict(), strict=False)
    a = random_image(0)
    images = collate_images([a], base.config)
    idx = pad([row(5, 6, a, 7, 8), row(1, 2, 3)])
    before = base.logits(idx, images)
    after = lora.logits(idx, images)
    assert torch.equal(before[0, :2], after[0, :2]) and torch.equal(before[1, :3], after[1, :3])
    assert ((before[0, 2:] - after[0, 2:]).abs().amax(-1) > 0.01).all()
    # generation with its cache computes the same; <image> ids in the padding have no effect
    lengths = torch.tensor([len(row(5, 6, a, 7, 8)), 3])
    filled = idx.masked_fill(idx < 0, base.config.image_token)
    out = lora.generate(filled, 6, temperature=0, images=images, lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        line = idx[i:i + 1, :n]
        for _ in range(6):
            scores = lora.logits(line, images if i == 0 else None)[:, -1]
            scores[:, base.config.image_token] = -torch.inf
            line = torch.cat([line, scores.argmax(-1, keepdim=True)], 1)
        assert torch.equal(line[0], out[i, :n + 6])
    with pytest.raises(ValueError, match='has no effect on a model without vision_encoder'):
        make_model(lora_scope='image', vision_encoder='')


def test_logits_are_those_of_hugging_face_gpt2():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=199, n_positions=48, n_embd=64, n_layer=3, n_head=4, activation_function='gelu')).eval()
    ours = GPT(GPTConfig(block_size=48, vocab_size=199, n_layer=3, n_head=4, n_embd=64)).eval()
    state = {}
    for name, w in theirs.state_dict().items():
        conv1d = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))  # stored [in, out]
        state[name] = w.t() if conv1d else w
    ours.load_state_dict(state)
    idx = torch.randint(0, 199, (3, 48))
    targets = idx.roll(-1, 1)
    with torch.no_grad():
        expected = theirs(idx).logits
        torch.testing.assert_close(ours.logits(idx), expected, atol=1e-4, rtol=0)
        loss = mean_loss(ours, idx, targets)
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), targets.flatten()), atol=1e-4, rtol=0)


def test_state_dict_keys_are_those_of_nanogpt():
    keys = set(GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8)).state_dict())
    modules = ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')
    block = {f'transformer.h.0.{m}.{p}' for m in modules for p in ('weight', 'bias')}
    assert keys == block | {'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.ln_f.weight',
                            'transformer.ln_f.bias', 'lm_head.weight'}


def test_text_logits_are_bit_identical_with_and_without_vision():
    torch.manual_seed(3)
    with_vision = GPT(tiny_config()).eval()
    torch.manual_seed(3)
    text_only = GPT(tiny_config(vision_encoder='')).eval()
    idx = torch.randint(0, 256, (3, 20))
    assert torch.equal(with_vision.logits(idx), text_only.logits(idx))
    # also in a batch whose only image is the padding that keeps the graph the same on every rank
    padding = collate_images([], with_vision.config)
    assert torch.equal(with_vision.logits(idx, padding), text_only.logits(idx))


def test_image_changes_the_logits_after_it_and_none_before(tiny_model):
    a = random_image(1)
    b = random_image(2)
    idx = pad([row(5, 6, a, 7, 8)])
    with_a = tiny_model.logits(idx, collate_images([a], tiny_model.config))
    with_b = tiny_model.logits(idx, collate_images([b], tiny_model.config))
    assert torch.equal(with_a[:, :2], with_b[:, :2])
    assert (with_a[:, -2:] - with_b[:, -2:]).abs().max() > 1e-2


def test_swapping_two_images_changes_the_logits(tiny_model):
    a = random_image(1)
    b = random_image(2, (40, 8))
    both = tiny_model.logits(pad([row(5, a, b, 7)]), collate_images([a, b], tiny_model.config))
    swapped = tiny_model.logits(pad([row(5, b, a, 7)]), collate_images([b, a], tiny_model.config))
    assert (both[:, -1] - swapped[:, -1]).abs().max() > 1e-3


def test_padding_of_rows_and_of_images_changes_nothing(tiny_model):
    small = random_image(1, (16, 8))
    large = random_image(2, (30, 30))
    single = tiny_model.logits(pad([row(5, small, 7, 8)]), collate_images([small], tiny_model.config))
    rows = [row(5, small, 7, 8), row(large, 9, large, 9, 9)]
    batch = tiny_model.logits(pad(rows, 50), collate_images([small, large, large], tiny_model.config))
    torch.testing.assert_close(batch[0, :single.shape[1]], single[0], atol=1e-5, rtol=1e-5)


def test_image_takes_one_position_and_text_counts_on_after_it(tiny_model):
    a = random_image(1)
    b = random_image(2)
    _, pos = tiny_model.embed(pad([row(5, a, b, 7, 8), row(5, 6)]), collate_images([a, b], tiny_model.config))
    n = num_tokens(a, tiny_model.config)
    assert pos[0].tolist() == [0] + [1] * n + [2] * n + [3, 4]
    assert pos[1, :2].tolist() == [0, 1] and pos[1].max() == 1  # padding takes no position


def test_more_image_tokens_than_block_size_fit():
    model = make_model(block_size=6)
    a = random_image(1, (32, 32))
    images = collate_images([a], model.config)
    idx = pad([row(5, a, 7, 8, 9, 10)])
    assert idx.shape[1] > 6
    model.logits(idx, images)
    with pytest.raises(ValueError, match='7 positions, but block_size is 6'):
        model.logits(pad([row(5, a, 7, 8, 9, 10, 11)]), images)


@pytest.mark.parametrize('n_ids', [0, 3, 7])
def test_another_number_of_image_ids_than_image_tokens_raises(tiny_model, n_ids):
    images = collate_images([random_image(1)], tiny_model.config)
    with pytest.raises(ValueError, match=f'{n_ids} <image> ids, but the images make 6 tokens'):
        tiny_model.logits(torch.tensor([[256] * n_ids + [1]]), images)


def test_image_ids_without_an_image_raise(tiny_model):
    with pytest.raises(ValueError, match='2 <image> ids, but the images make 0 tokens'):
        tiny_model.logits(torch.tensor([[256, 256, 1]]))


# -----------------------------------------------------------------------------
# generation

@torch.no_grad()
def greedy_without_cache(model, idx, max_new_tokens, images=None):
    for _ in range(max_new_tokens):
        scores = model.logits(idx, images)[:, -1]
        new = scores.index_fill(1, torch.tensor([256]), -torch.inf).argmax(-1)
        idx = torch.cat([idx, new[:, None]], 1)
    return idx


def test_cached_generation_equals_uncached(tiny_model):
    a = random_image(1)
    images = collate_images([a], tiny_model.config)
    idx = pad([row(5, a, 7)])
    cached = tiny_model.generate(idx, 20, temperature=0, images=images)
    assert torch.equal(cached, greedy_without_cache(tiny_model, idx, 20, images))
    assert len(set(cached[0, -20:].tolist())) > 3, 'a model that repeats one token would prove nothing'


def test_batched_generation_equals_single_generation(tiny_model):
    a = random_image(1)
    b = random_image(2, (40, 24))
    rows = [row(5, a, 7), row(9, 10, 11, 12, 13), row(b, a, 3, 4, 5, 6)]
    batch = tiny_model.generate(pad(rows), 12, temperature=0, lengths=torch.tensor([len(r) for r in rows]),
                                images=collate_images([a, b, a], tiny_model.config))
    for r, row_images, out in zip(rows, [[a], [], [b, a]], batch):
        images = collate_images(row_images, tiny_model.config) if row_images else None
        single = tiny_model.generate(torch.tensor([r]), 12, temperature=0, images=images)
        assert torch.equal(out[len(r):len(r) + 12], single[0, len(r):])


def test_generation_ends_at_stop_ids_and_at_block_size(tiny_model):
    idx = torch.tensor([[5, 6, 7]])
    free = tiny_model.generate(idx, 10, temperature=0)[0, 3:].tolist()
    end = free[4]
    stopped = tiny_model.generate(idx, 10, temperature=0, stop_ids=[end])[0, 3:].tolist()
    assert stopped == free[:free.index(end) + 1]
    unused = next(i for i in range(320) if i not in free)  # whichever of several comes first
    stopped = tiny_model.generate(idx, 10, temperature=0, stop_ids=[unused, end])[0, 3:].tolist()
    assert stopped == free[:free.index(end) + 1]
    assert tiny_model.generate(idx, 1000, temperature=0).shape[1] == tiny_model.config.block_size


def test_ids_that_are_not_allowed_are_never_generated(tiny_model):
    allowed = torch.zeros(320, dtype=torch.bool)
    allowed[[3, 30, 200]] = True
    out = tiny_model.generate(torch.tensor([[5, 6]] * 8), 30, temperature=5.0, allowed=allowed)
    assert set(out[:, 2:].flatten().tolist()) <= {3, 30, 200}


def test_temperature_top_k_and_top_p():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, -1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample_token(scores, 0).tolist()) == {0}
    assert set(sample_token(scores, 1.0, generator=generator).tolist()) == {0, 1, 2, 3}
    assert set(sample_token(scores, 1.0, top_k=2, generator=generator).tolist()) == {0, 1}
    assert set(sample_token(scores, 1.0, top_p=0.7, generator=generator).tolist()) == {0, 1}
    assert set(sample_token(scores, 1.0, top_p=0.4, generator=generator).tolist()) == {0}


def test_same_seed_generates_the_same_text(tiny_model):
    texts = [tiny_model.generate(torch.tensor([[5]]), 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def rms_norm_of_cuda_autocast(x, shape, weight=None, eps=None):
    """What F.rms_norm returns under CUDA's autocast since torch 2.12: float32, whatever x is. A CPU has no such rule. Before, a
    slow one ran, with a warning, unless x was in the weights' dtype.
    """
    assert x.dtype == weight.dtype
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize('position', ['learned', 'rope'])
def test_qk_norm_generates_under_autocast_with_float32_keys(monkeypatch, position):
    model = make_model(**{**LLAMA, 'position': position}, qk_norm=True)
    monkeypatch.setattr(F, 'rms_norm', rms_norm_of_cuda_autocast)
    idx = torch.tensor([[5, 6, 7]])
    with torch.autocast('cpu', torch.bfloat16):
        assert model.empty_cache(1, 4)[0][0].dtype == torch.bfloat16
        assert model.transformer.h[0].attn.k_norm(torch.zeros(16)).dtype == torch.float32
        logits = model.logits(idx)
        out = model.generate(idx, 8, temperature=0)
        expected = greedy_without_cache(model, idx, 8)
    assert logits.isfinite().all() and torch.equal(out, expected)


def test_attention_takes_float32_keys_and_a_bfloat16_cache():
    attn = make_model(**LLAMA, qk_norm=True).transformer.h[0].attn
    x = torch.randn(2, 3, 32)
    rope = tuple(torch.rand(2, 3, 1, 8) for _ in range(2))
    cache = tuple(torch.zeros(2, 5, 1, 16, dtype=torch.bfloat16) for _ in range(2))
    positions = torch.arange(3).expand(2, 3)
    mask = torch.arange(5) <= positions[:, None, :, None]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=False):
        expected = attn(x, rope)
        attn.c_proj.to(torch.bfloat16)  # what autocast would do to its input
        out = attn(x, rope, None, cache, positions, mask)
    assert out.dtype == torch.bfloat16 and all(t[:, :3].abs().sum() > 0 and not t[:, 3:].any() for t in cache)
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.05)


# -----------------------------------------------------------------------------
# optimizers

def test_learning_rate_of_zero_freezes_a_part():
    model = GPT(tiny_config(dropout=0.5, connector='mlp')).train()
    optimizers = configure_optimizers(model, optimizer_config(learning_rate=0.0, vision_lr=0.0, optimizer='muon'))
    trained = {id(p) for opt in optimizers for group in opt.param_groups for p in group['params']}
    assert trained == {id(p) for p in model.vision.connector.parameters()}
    assert all(p.requires_grad == (id(p) in trained) for p in model.parameters())
    model.train()
    assert not model.transformer.training and not model.vision.encoder.training and model.vision.connector.training
    with pytest.raises(ValueError, match='nothing is left to train'):
        configure_optimizers(model, optimizer_config(learning_rate=0.0, vision_lr=0.0, connector_lr=0.0))


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest():
    model = GPT(tiny_config(connector='mlp'))
    adamw, muon = configure_optimizers(model, optimizer_config(vision_lr=5e-4, connector_lr=2e-3, optimizer='muon'))
    names = {id(p): n for n, p in model.named_parameters()}
    in_muon = [names[id(p)] for group in muon.param_groups for p in group['params']]
    in_adamw = [names[id(p)] for group in adamw.param_groups for p in group['params']]
    assert sorted(in_muon + in_adamw) == sorted(names.values())
    assert set(in_muon) == {n for n, p in model.named_parameters() if '.h.' in n and p.dim() == 2}
    assert {group['lr'] for group in muon.param_groups} == {0.02, 0.01}  # the encoder at half, like its learning rate
    assert {group['lr'] for group in adamw.param_groups} == {1e-3, 5e-4, 2e-3}


def test_adamw_is_fused():
    adamw, = configure_optimizers(GPT(tiny_config()), optimizer_config())
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults['fused'] is True


SHAPES = [(64, 64), (192, 64), (256, 64), (64, 256)] * 3


def muon_parameters():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in SHAPES]


def muon_groups(parameters):
    return [{'params': parameters[:6], 'lr': 0.02, 'weight_decay': 0.1},
            {'params': parameters[6:], 'lr': 0.01, 'weight_decay': 0.1}]


def set_gradients(parameters, step):
    """Random gradients; one parameter has none in the first two steps."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(parameters):
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = None if i == 3 and step < 2 else gradient


def newton_schulz_in_float32(gradient, coefficients, steps, eps):
    """torch.optim._muon's function, which computes in bfloat16 on every device, in float32."""
    a, b, c = coefficients
    x = gradient.T if gradient.size(0) > gradient.size(1) else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        product = x @ x.T
        x = a * x + (b * product + c * product @ product) @ x
    return x.T if gradient.size(0) > gradient.size(1) else x


def test_muon_steps_as_torch_does(monkeypatch):
    monkeypatch.setattr(_muon, '_zeropower_via_newtonschulz', newton_schulz_in_float32)
    ours = muon_parameters()
    theirs = muon_parameters()
    our_muon = Muon(muon_groups(ours))
    their_muon = torch.optim.Muon(muon_groups(theirs))
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        our_muon.step()
        their_muon.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=0)
    before = muon_parameters()
    assert all((p - q).abs().max() > 0.01 for p, q in zip(ours, before))


def test_muon_orthogonalizes_all_matrices_of_a_shape_in_one_call(monkeypatch):
    calls = []

    def counted(x):
        calls.append(tuple(x.shape))
        return orthogonalize(x)

    monkeypatch.setattr(train, 'orthogonalize', counted)
    parameters = muon_parameters()
    set_gradients(parameters, 2)
    Muon(muon_groups(parameters)).step()
    assert sorted(calls) == sorted((3, *shape) for shape in set(SHAPES))


def dtypes_of_products(monkeypatch, x):
    """(the dtypes of the matrices that orthogonalize multiplies, its result)"""
    dtypes = set()
    baddbmm = torch.baddbmm

    def recorded(*tensors, **options):
        dtypes.update(t.dtype for t in tensors)
        return baddbmm(*tensors, **options)

    monkeypatch.setattr(torch, 'baddbmm', recorded)
    return dtypes, orthogonalize(x)


def test_muon_computes_in_float32_on_a_cpu(monkeypatch):
    dtypes, out = dtypes_of_products(monkeypatch, torch.randn(4, 128, 512))
    assert dtypes == {torch.float32} and out.dtype == torch.float32
    singular_values = torch.linalg.svdvals(out)
    assert 0.65 < singular_values.min() and singular_values.max() < 1.25
    assert not orthogonalize(torch.zeros(2, 8, 4)).any()


def test_muon_computes_in_bfloat16_on_a_gpu(monkeypatch):
    with FakeTensorMode():  # shapes, dtypes and devices of tensors, without a GPU
        dtypes, out = dtypes_of_products(monkeypatch, torch.empty(4, 128, 512, device='cuda'))
    assert dtypes == {torch.bfloat16} and out.shape == (4, 128, 512) and out.device.type == 'cuda'


def test_muon_resumes_exactly(tmp_path):
    ours = muon_parameters()
    muon = Muon(muon_groups(ours))
    for step in range(5):
        set_gradients(ours, step)
        muon.step()
    torch.save({'parameters': ours, 'optimizer': muon.state_dict()}, tmp_path / 'muon.pt')
    saved = torch.load(tmp_path / 'muon.pt', weights_only=True)
    resumed = saved['parameters']
    new_muon = Muon(muon_groups(resumed))
    new_muon.load_state_dict(saved['optimizer'])
    for step in range(5, 10):
        for parameters, optimizer in ((ours, muon), (resumed, new_muon)):
            set_gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, resumed))


@pytest.mark.parametrize('emulated, expected', [(False, 'bfloat16'), (True, 'float16')])
def test_best_dtype_is_float16_where_bfloat16_is_emulated(monkeypatch, emulated, expected):
    """T4 and V100 have no bfloat16; torch says that they support it, by emulation."""
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation or not emulated)
    assert best_dtype('cuda') == expected
    assert best_dtype('cpu') == 'float32'


# -----------------------------------------------------------------------------
# the config, and checkpoints

@pytest.mark.parametrize('changes', [{}, LLAMA, {'connector': 'pool'}, {'lora_rank': 2, 'lora_scope': 'image'}])
def test_gpt_and_optimizers_do_not_change_their_config(changes):
    config = tiny_config(**changes)
    before = dataclasses.asdict(config)
    model = GPT(config)
    configure_optimizers(model, optimizer_config(vision_lr=0.0, optimizer='muon'))
    if config.lora_rank:
        model.merge_lora()
    else:
        model.crop_block_size(16)
    assert dataclasses.asdict(config) == before


def test_crop_block_size_keeps_the_first_positions():
    model = make_model()
    idx = torch.randint(0, 256, (2, 16))
    before = model.logits(idx)
    model.crop_block_size(16)
    assert torch.equal(before, model.logits(idx))
    assert model.transformer.wpe.weight.shape[0] == 16 and model.transformer.wpe.weight.requires_grad
    assert model.config.block_size == 16
    with pytest.raises(ValueError, match='cropped, not grown'):
        model.crop_block_size(17)


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_checkpoints_with_every_prefix_load(tmp_path, tiny_model, prefix):
    path = tmp_path / 'ckpt.pt'
    state = {prefix + name: p for name, p in tiny_model.state_dict().items()}
    torch.save({'model': state, 'model_args': vars(tiny_model.config)}, path)
    idx = torch.randint(0, 256, (2, 16))
    assert torch.equal(load_model(path).eval().logits(idx), tiny_model.logits(idx))


def test_checkpoint_with_wrong_keys_raises_with_the_list(tmp_path):
    state = make_model().state_dict()
    state['stranger'] = state.pop('transformer.h.1.mlp.c_fc.weight')
    state['transformer.wpe.weight'] = state['transformer.wpe.weight'][:7]
    path = tmp_path / 'ckpt.pt'
    torch.save({'model': state, 'model_args': vars(tiny_config())}, path)
    with pytest.raises(ValueError) as error:
        load_model(path)
    for text in ('missing transformer.h.1.mlp.c_fc.weight', 'unexpected stranger', 'wpe.weight is (7, 32), not (64, 32)'):
        assert text in str(error.value)


def test_damaged_and_malicious_checkpoints_raise(tmp_path, tiny_model):
    path = tmp_path / 'ckpt.pt'
    with pytest.raises(ValueError, match='no checkpoint at'):
        read_weights(path)
    path.write_bytes(b'')
    with pytest.raises(ValueError, match='ckpt.pt'):
        read_weights(path)
    torch.save({'model': tiny_model.state_dict(), 'model_args': vars(tiny_model.config)}, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match='cannot be read as a checkpoint'):
        read_weights(path)
    torch.save([1, 2, 3], path)
    with pytest.raises(ValueError, match='no glimpse or nanoGPT checkpoint'):
        read_weights(path)
    written_by_attack = tmp_path / 'written'

    class Malicious:
        def __reduce__(self):
            return open, (str(written_by_attack), 'w')

    torch.save({'model': {}, 'model_args': Malicious()}, path)
    with pytest.raises(ValueError, match='is refused'):
        read_weights(path)
    assert not written_by_attack.exists()


def test_checkpoint_with_unknown_model_args_raises(tmp_path):
    path = tmp_path / 'ckpt.pt'
    torch.save({'model': {}, 'model_args': {**vars(tiny_config()), 'tied': True}}, path)
    with pytest.raises(ValueError, match='model_args has tied, which this GPT does not know'):
        read_weights(path)


def test_logits_in_chunks_give_the_same_loss_and_gradients(monkeypatch):
    model = make_model(vision_encoder='')
    idx = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    targets = torch.where(idx % 3 == 0, -1, idx)
    sizes = []

    def gradients():
        model.zero_grad()
        hook = model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
        loss = model(batch_of_ids(idx, targets))['lm']
        loss.backward()
        hook.remove()
        return loss.item(), [p.grad.clone() for p in model.parameters()]

    loss, grads = gradients()
    assert sizes == [int((targets >= 0).sum())]
    monkeypatch.setattr('model.MAX_LOGITS', 10 * model.config.vocab_size)
    chunked_loss, chunked_grads = gradients()
    assert len(sizes) == 1 + 2 * 4 and max(sizes[1:]) <= 10  # computed twice
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    for g, chunked in zip(grads, chunked_grads):
        torch.testing.assert_close(chunked, g, atol=1e-5, rtol=1e-4)
