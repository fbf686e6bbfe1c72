"""What must stay true of the GPT: it is GPT-2, images change what it says, and nothing else does."""

import pytest
import torch
from conftest import make_model, tiny_config
from PIL import Image

import vision
from model import GPT, GPTConfig, draw_token, load_checkpoint


def picture(seed, size=(24, 16)):
    """A random picture as (patches, grid)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8).numpy()
    return vision.preprocess(Image.fromarray(pixels), tiny_config())


def row(*items):
    """Ids of a row; a picture stands for as many <image> ids as it makes tokens."""
    ids = []
    for item in items:
        ids += [item] if isinstance(item, int) else [256] * vision.num_tokens(item, tiny_config())
    return ids


def pad(rows, length=None):
    length = length or max(map(len, rows))
    return torch.tensor([r + [-1] * (length - len(r)) for r in rows])


def logits(model, idx, images=None):
    return model(idx, torch.zeros_like(idx), images)[0]


def test_updates_that_act_behind_images_leave_text_alone_and_what_stands_before():
    base = make_model()
    tuned = make_model(lora_rank=2, lora_scope='image')
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if '.lora_b' in name:
                p.normal_()
    tuned.load_state_dict(base.state_dict(), strict=False)
    a = picture(0)
    images = vision.collate([a], base.config)
    idx = pad([row(5, 6, a, 7, 8), row(1, 2, 3)])
    before, after = logits(base, idx, images), logits(tuned, idx, images)
    assert torch.equal(before[0, :2], after[0, :2]) and torch.equal(before[1, :3], after[1, :3])
    assert ((before[0, 2:] - after[0, 2:]).abs().amax(-1) > 0.01).all()
    # generation, whose cache outlives the image, computes the same; <image> ids in the padding count for nothing
    lengths = torch.tensor([len(row(5, 6, a, 7, 8)), 3])
    filled = idx.masked_fill(idx < 0, base.config.image_token)
    out = tuned.generate(filled, 6, temperature=0, images=images, lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        line = idx[i:i + 1, :n]
        for _ in range(6):
            scores = logits(tuned, line, images if i == 0 else None)[:, -1]
            scores[:, base.config.image_token] = -torch.inf
            line = torch.cat([line, scores.argmax(-1, keepdim=True)], 1)
        assert torch.equal(line[0], out[i, :n + 6])
    with pytest.raises(ValueError, match='has no effect on a model without vision_encoder'):
        make_model(lora_scope='image', vision_encoder='')


def test_logits_are_those_of_hugging_faces_gpt2():
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
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, idx), theirs(idx).logits, atol=1e-4, rtol=0)
        loss, reference = ours(idx, idx.roll(-1, 1))[1], torch.nn.functional.cross_entropy(
            theirs(idx).logits.flatten(0, 1), idx.roll(-1, 1).flatten())
    torch.testing.assert_close(loss, reference, atol=1e-4, rtol=0)


def test_state_dict_keys_are_nanogpts():
    keys = set(GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8)).state_dict())
    block = {f'transformer.h.0.{m}.{p}' for m in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')
             for p in ('weight', 'bias')}
    assert keys == block | {'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.ln_f.weight',
                            'transformer.ln_f.bias', 'lm_head.weight'}


def test_text_logits_are_bit_identical_with_and_without_eyes():
    torch.manual_seed(3)
    seeing = GPT(tiny_config()).eval()
    torch.manual_seed(3)
    blind = GPT(tiny_config(vision_encoder='')).eval()
    idx = torch.randint(0, 256, (3, 20))
    assert torch.equal(logits(seeing, idx), logits(blind, idx))
    # also in a batch whose only image is the padding that keeps the graph the same on every rank
    assert torch.equal(logits(seeing, idx, vision.collate([], seeing.config)), logits(blind, idx))


def test_the_image_changes_the_logits_behind_it_and_none_before(tiny_model):
    a, b = picture(1), picture(2)
    idx = pad([row(5, 6, a, 7, 8)])
    one, other = (logits(tiny_model, idx, vision.collate([p], tiny_model.config)) for p in (a, b))
    assert torch.equal(one[:, :2], other[:, :2])
    assert (one[:, -2:] - other[:, -2:]).abs().max() > 1e-2


def test_two_images_are_told_apart_and_swapping_them_changes_the_logits(tiny_model):
    a, b = picture(1), picture(2, (40, 8))
    both = logits(tiny_model, pad([row(5, a, b, 7)]), vision.collate([a, b], tiny_model.config))
    swapped = logits(tiny_model, pad([row(5, b, a, 7)]), vision.collate([b, a], tiny_model.config))
    assert (both[:, -1] - swapped[:, -1]).abs().max() > 1e-3


def test_padding_of_rows_and_of_images_changes_nothing(tiny_model):
    small, large = picture(1, (16, 8)), picture(2, (30, 30))
    alone = logits(tiny_model, pad([row(5, small, 7, 8)]), vision.collate([small], tiny_model.config))
    rows = [row(5, small, 7, 8), row(large, 9, large, 9, 9)]
    together = logits(tiny_model, pad(rows, 50), vision.collate([small, large, large], tiny_model.config))
    torch.testing.assert_close(together[0, :alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)


def test_an_image_takes_one_position_and_text_counts_on_behind_it(tiny_model):
    a, b = picture(1), picture(2)
    _, pos = tiny_model.embed(pad([row(5, a, b, 7, 8), row(5, 6)]), vision.collate([a, b], tiny_model.config))
    n = vision.num_tokens(a, tiny_model.config)
    assert pos[0].tolist() == [0] + [1] * n + [2] * n + [3, 4]
    assert pos[1, :2].tolist() == [0, 1] and pos[1].max() == 1  # padding takes no position


def test_more_tokens_than_block_size_fit_when_they_are_an_image():
    model = make_model(block_size=6)
    a = picture(1, (32, 32))
    idx = pad([row(5, a, 7, 8, 9, 10)])
    assert idx.shape[1] > 6
    logits(model, idx, vision.collate([a], model.config))
    with pytest.raises(ValueError, match='7 positions, but block_size is 6'):
        logits(model, pad([row(5, a, 7, 8, 9, 10, 11)]), vision.collate([a], model.config))


@pytest.mark.parametrize('places', [0, 3, 7])
def test_image_tokens_and_places_must_be_equally_many(tiny_model, places):
    with pytest.raises(ValueError, match=f'{places} <image> places, but the images make 6 tokens'):
        tiny_model(torch.tensor([[256] * places + [1]]), images=vision.collate([picture(1)], tiny_model.config))


def test_an_image_without_pixels_is_refused(tiny_model):
    with pytest.raises(ValueError, match='2 <image> places, but the images make 0 tokens'):
        tiny_model(torch.tensor([[256, 256, 1]]))


def test_cached_generation_equals_uncached(tiny_model):
    a = picture(1)
    images = vision.collate([a], tiny_model.config)
    idx = pad([row(5, a, 7)])
    cached = tiny_model.generate(idx, 20, temperature=0, images=images)
    for _ in range(20):
        with torch.no_grad():
            scores = tiny_model(idx, images=images)[0][:, -1]
        new = scores.index_fill(1, torch.tensor([256]), -torch.inf).argmax(-1)
        idx = torch.cat([idx, new[:, None]], 1)
    assert torch.equal(cached, idx)
    assert len(set(cached[0, -20:].tolist())) > 3, 'a model that repeats one token would prove nothing'


def test_batched_generation_gives_what_single_generation_gives(tiny_model):
    a, b = picture(1), picture(2, (40, 24))
    rows, pictures = [row(5, a, 7), row(9, 10, 11, 12, 13), row(b, a, 3, 4, 5, 6)], [[a], [], [b, a]]
    batch = tiny_model.generate(pad(rows), 12, temperature=0, lengths=torch.tensor([len(r) for r in rows]),
                                images=vision.collate([a, b, a], tiny_model.config))
    for r, p, out in zip(rows, pictures, batch):
        images = vision.collate(p, tiny_model.config) if p else None
        single = tiny_model.generate(torch.tensor([r]), 12, temperature=0, images=images)
        assert torch.equal(out[len(r):len(r) + 12], single[0, len(r):])


def test_generation_ends_at_the_end_token_and_at_block_size(tiny_model):
    idx = torch.tensor([[5, 6, 7]])
    free = tiny_model.generate(idx, 10, temperature=0)[0, 3:].tolist()
    end = free[4]
    stopped = tiny_model.generate(idx, 10, temperature=0, end_token=end)[0, 3:].tolist()
    assert stopped == free[:free.index(end) + 1]
    unused = next(i for i in range(320) if i not in free)  # whichever of several comes first
    stopped = tiny_model.generate(idx, 10, temperature=0, end_token=[unused, end])[0, 3:].tolist()
    assert stopped == free[:free.index(end) + 1]
    assert tiny_model.generate(idx, 1000, temperature=0).shape[1] == tiny_model.config.block_size


def test_ids_that_are_not_allowed_are_never_drawn(tiny_model):
    allowed = torch.zeros(320, dtype=torch.bool)
    allowed[[3, 30, 200]] = True
    out = tiny_model.generate(torch.tensor([[5, 6]] * 8), 30, temperature=5.0, allowed=allowed)
    assert set(out[:, 2:].flatten().tolist()) <= {3, 30, 200}


def test_temperature_top_k_and_top_p():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, -1)
    generator = torch.Generator().manual_seed(0)
    assert set(draw_token(scores, 0).tolist()) == {0}
    assert set(draw_token(scores, 1.0, generator=generator).tolist()) == {0, 1, 2, 3}
    assert set(draw_token(scores, 1.0, top_k=2, generator=generator).tolist()) == {0, 1}
    assert set(draw_token(scores, 1.0, top_p=0.7, generator=generator).tolist()) == {0, 1}
    assert set(draw_token(scores, 1.0, top_p=0.4, generator=generator).tolist()) == {0}


def test_the_same_seed_draws_the_same_text(tiny_model):
    texts = [tiny_model.generate(torch.tensor([[5]]), 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_a_learning_rate_of_zero_freezes_a_part():
    model = GPT(tiny_config(dropout=0.5, connector='mlp')).train()
    optimizers = model.configure_optimizers(0.1, 0.0, (0.9, 0.95), 'cpu', 0.0, 1e-3, optimizer='muon')
    trained = {id(p) for o in optimizers for g in o.param_groups for p in g['params']}
    assert trained == {id(p) for p in model.vision.connector.parameters()}
    assert all(p.requires_grad == (id(p) in trained) for p in model.parameters())
    model.train()
    assert not model.transformer.training and not model.vision.encoder.training and model.vision.connector.training


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest_each_once():
    model = GPT(tiny_config(connector='mlp'))
    adamw, muon = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', 5e-4, 2e-3, optimizer='muon', muon_lr=0.02)
    names = {id(p): n for n, p in model.named_parameters()}
    in_muon = [names[id(p)] for g in muon.param_groups for p in g['params']]
    in_adamw = [names[id(p)] for g in adamw.param_groups for p in g['params']]
    assert sorted(in_muon + in_adamw) == sorted(names.values())
    assert set(in_muon) == {n for n, p in model.named_parameters() if '.h.' in n and p.dim() == 2}
    assert {g['lr'] for g in muon.param_groups} == {0.02, 0.01}  # the encoder at half, like its learning rate
    assert {g['lr'] for g in adamw.param_groups} == {1e-3, 5e-4, 2e-3}


def test_crop_block_size_keeps_the_first_positions():
    model = make_model()
    idx = torch.randint(0, 256, (2, 16))
    before = logits(model, idx)
    model.crop_block_size(16)
    assert torch.equal(before, logits(model, idx))
    assert model.transformer.wpe.weight.shape[0] == 16 and model.transformer.wpe.weight.requires_grad
    with pytest.raises(ValueError, match='cropped, not grown'):
        model.crop_block_size(17)


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_checkpoints_with_every_prefix_load(tmp_path, tiny_model, prefix):
    path = tmp_path / 'ckpt.pt'
    torch.save({'model': {prefix + k: v for k, v in tiny_model.state_dict().items()},
                'model_args': vars(tiny_model.config)}, path)
    idx = torch.randint(0, 256, (2, 16))
    assert torch.equal(logits(GPT.from_checkpoint(path).eval(), idx), logits(tiny_model, idx))


def test_a_checkpoint_with_wrong_keys_is_refused_with_the_list(tmp_path):
    state = make_model().state_dict()
    state['stranger'] = state.pop('transformer.h.1.mlp.c_fc.weight')
    state['transformer.wpe.weight'] = state['transformer.wpe.weight'][:7]
    path = tmp_path / 'ckpt.pt'
    torch.save({'model': state, 'model_args': vars(tiny_config())}, path)
    with pytest.raises(ValueError) as error:
        GPT.from_checkpoint(path)
    for text in ('missing transformer.h.1.mlp.c_fc.weight', 'unexpected stranger', 'wpe.weight is (7, 32), not (64, 32)'):
        assert text in str(error.value)


def test_damaged_and_malicious_checkpoints_are_refused(tmp_path, tiny_model):
    path = tmp_path / 'ckpt.pt'
    with pytest.raises(ValueError, match='no checkpoint at'):
        load_checkpoint(path)
    path.write_bytes(b'')
    with pytest.raises(ValueError, match='ckpt.pt'):
        load_checkpoint(path)
    torch.save({'model': tiny_model.state_dict(), 'model_args': vars(tiny_model.config)}, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match='cannot be read as a checkpoint'):
        load_checkpoint(path)
    torch.save([1, 2, 3], path)
    with pytest.raises(ValueError, match='no glimpse or nanoGPT checkpoint'):
        load_checkpoint(path)
    trap = tmp_path / 'sprung'

    class Malicious:
        def __reduce__(self):
            return open, (str(trap), 'w')

    torch.save({'model': {}, 'model_args': Malicious()}, path)
    with pytest.raises(ValueError, match='is refused'):
        load_checkpoint(path)
    assert not trap.exists()
