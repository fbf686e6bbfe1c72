"""DeepSeek-OCR's encoder: its outputs, its places, tiles, and which parts of it learn."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, inside, launch, make_model, optimizer_config, read_log, tiny_config
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

import vision
from dataloader import collate, get_tokenizer, tokenize
from model import GPT
from patches import END, NEWLINE, PADDING, arrange, cell_size, collate_images, num_tokens, preprocess, tile_shape, view_lengths
from train import configure_optimizers, estimate_flops
from vision import VisionConfig, complete_config
from weights import read_weights, rename

SMALL = dict(vision_encoder='deepencoder_tiny', image_size=64, patch_height=4, patch_width=4, vision_n_embd=24,
             vision_n_layer=4)
# the same as a run's arguments
RUN = [*TINY, '--vision_encoder=deepencoder_tiny', '--image_size=64', '--patch_height=4', '--patch_width=4', '--line_height=0',
       '--image_width=64', '--image_height=64', '--one_line=False', '--vision_n_embd=24']


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def deep_config(mode, **changes):
    return complete_config(VisionConfig(vision_encoder='deepencoder', deepencoder_mode=mode, connector='linear', **changes))


# -----------------------------------------------------------------------------
# places

@pytest.mark.parametrize('mode, n_places', [('tiny', 73), ('small', 111), ('base', 273), ('large', 421)])
def test_a_mode_has_the_published_number_of_places(mode, n_places):
    config = deep_config(mode)
    image = preprocess(noise(300, 500), config)
    layout = arrange(image[1], config)
    q = config.image_size // 64
    assert num_tokens(image, config) == len(layout) == q * (q + 1) + 1 == n_places
    rows = layout[:-1].view(q, q + 1)
    assert torch.equal(rows[:, :-1], torch.arange(q * q).view(q, q))
    assert (rows[:, -1] == NEWLINE).all() and layout[-1] == END


@pytest.mark.parametrize('size, shape, n_places', [
    ((500, 640), (0, 0), 273), ((700, 640), (2, 2), 693), ((1300, 1300), (2, 2), 693), ((1280, 1920), (2, 3), 903),
    ((3000, 500), (6, 1), 883), ((500, 5000), (1, 9), 1263), ((3000, 3000), (3, 3), 273 + 30 * 31)])
def test_gundam_has_the_published_number_of_places(size, shape, n_places):
    config = deep_config('gundam')
    assert tile_shape(*size, config) == shape
    image = preprocess(Image.new('RGB', size), config)
    layout = arrange(image[1], config)
    assert num_tokens(image, config) == len(layout) == n_places
    width, height = shape
    # the tiles are stitched before their newlines, then comes the whole image, then one mark
    rows = layout[:10 * height * (10 * width + 1)].view(10 * height, 10 * width + 1) if height else layout[:0].view(0, 1)
    assert (rows[:, -1] == NEWLINE).all()
    for i in range(height):
        for j in range(width):
            tile = 256 + 100 * (i * width + j) + torch.arange(100).view(10, 10)
            assert torch.equal(rows[10 * i:10 * i + 10, 10 * j:10 * j + 10], tile)
    whole = layout[rows.numel():-1].view(16, 17)
    assert torch.equal(whole[:, :-1], torch.arange(256).view(16, 16)) and (whole[:, -1] == NEWLINE).all()
    assert layout[-1] == END and (layout < 0).sum() == 10 * height + 16 + 1


def brute_force_tile_shape(width, height, max_tiles, size):
    """InternVL's dynamic_preprocess, as published."""
    shapes = {(i, j) for n in range(2, max_tiles + 1) for i in range(1, n + 1) for j in range(1, n + 1)
              if 2 <= i * j <= max_tiles}
    best_ratio, best = math.inf, (1, 1)
    for shape in sorted(shapes, key=lambda x: x[0] * x[1]):
        difference = abs(width / height - shape[0] / shape[1])
        if difference < best_ratio:
            best_ratio, best = difference, shape
        elif difference == best_ratio and width * height > 0.5 * size * size * shape[0] * shape[1]:
            best = shape
    return best


def test_tiles_have_the_shape_closest_to_the_images_aspect():
    config = deep_config('gundam')
    for width in range(641, 4000, 217):
        for height in range(100, 4000, 193):
            assert tile_shape(width, height, config) == brute_force_tile_shape(width, height, 9, 640)


def test_a_tile_holds_its_part_of_the_image():
    config = complete_config(tiny_config(**{**SMALL, 'max_tiles': 4, 'tile_size': 32}))
    image = Image.new('RGB', (64, 64))
    colors = {(0, 0): (255, 0, 0), (0, 1): (0, 255, 0), (1, 0): (0, 0, 255), (1, 1): (255, 255, 0)}
    for (row, col), color in colors.items():
        image.paste(color, (32 * col, 32 * row, 32 * col + 32, 32 * row + 32))
    patches, grid = preprocess(image, config)
    tiles = patches[256:].view(4, 64, 4 * 4, 3)
    assert (grid[256::64] // 8).tolist() == [list(corner) for corner in colors]
    for tile, color in zip(tiles, colors.values()):
        assert (tile == torch.tensor(color)).all()
    assert grid[:256, 0].min() == 16  # the whole image is below the tiles


# -----------------------------------------------------------------------------
# parity

def shallow_tower(name, load):
    """SAM-B and CLIP-L in their full width, with few of their layers: the whole ones take two minutes."""
    if 'sam' in name:
        return timm.create_model('samvit_base_patch16', depth=4, num_classes=0)  # the third attends to the whole image
    return VisionTransformer(224, 14, 1024, 3, 16, 4, act_layer=QuickGELU)


SAM_NAMES = {'patch_embed.proj': 'patch_embed.projection', 'blocks.': 'layers.', 'norm1': 'layer_norm1', 'norm2': 'layer_norm2',
             'mlp.fc': 'mlp.lin', 'neck.0': 'neck.conv1', 'neck.1': 'neck.layer_norm1', 'neck.2': 'neck.conv2',
             'neck.3': 'neck.layer_norm2'}
CLIP_NAMES = {'resblocks.': 'layers.', 'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2', 'mlp.c_fc': 'mlp.fc1',
              'mlp.c_proj': 'mlp.fc2', 'attn.': 'self_attn.'}


def hugging_face_features(encoder, pixels):
    """The published wiring of Hugging Face's SAM and CLIP, which get the weights of a DeepEncoder."""
    n_sam, n_clip = len(encoder.sam.blocks), len(encoder.clip.transformer.resblocks)
    with torch.device('meta'):
        sam = SamVisionEncoder(SamVisionConfig(num_hidden_layers=n_sam))  # the defaults are SAM-B's
        clip = CLIPVisionModel(CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=n_clip,
                                                num_attention_heads=16, patch_size=14, image_size=224))
    sam.load_state_dict({rename(name, SAM_NAMES): p for name, p in encoder.sam.state_dict().items()}, assign=True)
    x = sam.eval()(pixels).last_hidden_state                                    # (1, 256, 64, 64)
    for weight in (encoder.compressor.conv_1.weight, encoder.compressor.conv_2.weight):
        x = F.conv2d(x, weight, stride=2, padding=1)
    x = x.flatten(2).transpose(1, 2)                                            # (1, 256, 1024)
    state = {}
    for name, p in encoder.clip.transformer.state_dict().items():
        name = rename(name, CLIP_NAMES)
        if 'in_proj_' in name:
            for letter, part in zip('qkv', p.chunk(3)):
                state[name.replace('in_proj_', f'{letter}_proj.')] = part
        else:
            state[name] = p
    clip = getattr(clip, 'vision_model', clip).eval()
    clip.encoder.load_state_dict(state, assign=True)
    clip.pre_layrnorm.load_state_dict(encoder.clip.ln_pre.state_dict(), assign=True)
    y = torch.cat([encoder.clip.class_embedding.view(1, 1, -1), x], dim=1) + encoder.clip.positional_embedding
    y = clip.encoder(inputs_embeds=clip.pre_layrnorm(y)).last_hidden_state
    return torch.cat([y[:, 1:], x], dim=-1)


@torch.no_grad()
def test_features_are_those_of_hugging_faces_sam_and_clip(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr('vision.open_tower', shallow_tower)
    config = deep_config('base')
    encoder = vision.DeepEncoder(config, load=False).eval()
    for name, p in encoder.named_parameters():  # what starts at zero counts too
        if 'rel_pos' in name or name == 'sam.pos_embed':
            nn.init.normal_(p, std=0.1)
    image = noise(1024, 1024)
    patches, grid = preprocess(image, config)
    ours = encoder(patches[None], grid[None])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 * 2 - 1
    theirs = hugging_face_features(encoder, pixels)
    assert ours.shape == theirs.shape == (1, 256, 2048)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_positions_are_interpolated_as_published():
    table = torch.randn(1 + 16 * 16, 8)
    assert vision.resize_positions(table, 256) is table
    grid = table[1:].view(1, 16, 16, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (10, 10), mode='bicubic', antialias=True, align_corners=False)
    new = vision.resize_positions(table, 100)
    assert torch.equal(new[0], table[0])
    torch.testing.assert_close(new[1:], expected.permute(0, 2, 3, 1).view(100, 8))


# -----------------------------------------------------------------------------
# batches

@pytest.mark.parametrize('encoder', [
    {**SMALL, 'tile_size': 32}, dict(image_size=32, tile_size=32, image_newlines=True, connector='pool', max_image_tokens=64),
    dict(vision_encoder='timm/test_vit', image_size=64, image_fit='squash', image_newlines=True)])
def test_images_with_and_without_tiles_in_a_batch_give_what_they_give_alone(encoder):
    torch.manual_seed(0)
    config = complete_config(tiny_config(**{**encoder, 'max_tiles': 4}))
    model = vision.Vision(config, load=False).eval()
    images = [preprocess(noise(*size), config) for size in ((128, 64), (20, 30), (70, 200), (32, 32))]
    counts = [num_tokens(image, config) for image in images]
    assert len(set(counts)) >= 3
    with torch.no_grad():
        emb, valid = model(*collate_images(images, config))
        static, static_valid = model(*collate_images(images, config, fixed_length=True))
        assert valid.sum(1).tolist() == counts and static_valid.sum(1).tolist() == counts
        torch.testing.assert_close(static[static_valid], emb[valid])
        for i, image in enumerate(images):
            alone, alone_valid = model(*collate_images([image], config))
            torch.testing.assert_close(alone[alone_valid], emb[i][valid[i]], rtol=1e-4, atol=1e-5)
        newlines = collate_images(images, config)[2] == NEWLINE
        assert (emb[newlines] == model.connector.newline).all()


def test_each_tile_changes_its_own_tokens_only():
    torch.manual_seed(0)
    config = complete_config(tiny_config(vision_encoder='timm/test_vit', image_size=64, image_fit='squash', image_newlines=True,
                                         max_tiles=2))
    model = vision.Vision(config, load=False).eval()
    image = noise(128, 64)
    changed = image.copy()
    changed.paste('red', (64, 0, 128, 64))
    with torch.no_grad():
        a, b = (model.features(*collate_images([preprocess(x, config)], config))[0][0] for x in (image, changed))
    differs = (a != b).any(1)  # of the whole image, the left tile, the right tile
    n = (64 // config.patch_width) ** 2
    assert differs[:n].any() and not differs[n:2 * n].any() and differs[2 * n:].all()


@pytest.mark.parametrize('changes', [{**SMALL, 'tile_size': 32}, dict(image_size=32, image_newlines=True, max_image_tokens=64)])
def test_a_tile_is_encoded_as_an_image_of_its_own(changes):
    torch.manual_seed(0)
    config = complete_config(tiny_config(**{**changes, 'max_tiles': 2}))
    model = vision.Vision(config).eval()
    image = noise(64, 32)
    alone = replace(config, image_size=32, max_tiles=0, image_fit='squash')
    n = view_lengths(config)[0] // cell_size(config)**2
    with torch.no_grad():
        features, _ = model.features(*collate_images([preprocess(image, config)], config))
        for i, left in enumerate((0, 32)):
            patches, grid = preprocess(image.crop((left, 0, left + 32, 32)), alone)
            expected = model.encoder(patches[None], grid[None])[0]
            own = features[0, n + i * len(expected):n + (i + 1) * len(expected)]
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_padding_is_encoded():
    config = complete_config(tiny_config(**{**SMALL, 'max_tiles': 4, 'tile_size': 32}))
    batch = collate_images([], config)
    emb, valid = vision.Vision(config)(*batch)
    assert not valid.any() and emb.isfinite().all() and (batch[2] == PADDING).all()


@pytest.mark.parametrize('changes, message', [
    ({'image_size': 100}, 'image_size that is a multiple of 16'), ({'image_size': 0}, 'image_size that is a multiple of 16'),
    ({'connector': 'pool'}, 'few tokens by itself'), ({'patch_height': 8}, 'square patches'),
    ({'vision_encoder': 'deepencoder', 'deepencoder_mode': 'huge'}, 'deepencoder_mode must be tiny'),
    ({'vision_encoder': 'deepencoder', 'deepencoder_mode': 'base'}, 'has images of 1024 pixels, not 64'),
    ({'image_positions': 'two'}, 'image_positions must be one or each'),
    ({'vision_encoder': 'vit', 'max_tiles': 4}, 'max_tiles needs image_newlines'),
    ({'vision_encoder': 'vit', 'image_size': 0, 'max_tiles': 4, 'image_newlines': True}, 'is for encoders of squares'),
    ({'vision_encoder': 'vit', 'image_newlines': True, 'connector': 'qformer'}, 'image_newlines stand after rows'),
    ({'vision_encoder': 'timm/test_vit', 'image_newlines': True, 'max_tiles': 4, 'tile_size': 32}, 'leave tile_size out')])
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        complete_config(tiny_config(**{**SMALL, **changes}))


def test_it_runs_under_autocast():
    torch.manual_seed(0)
    config = complete_config(tiny_config(**SMALL, max_tiles=4, tile_size=32))
    model = vision.Vision(config)
    images = collate_images([preprocess(noise(*size), config) for size in ((64, 64), (20, 20))], config)
    exact, valid = model(*images)
    with torch.autocast('cpu', torch.bfloat16):
        emb, _ = model(*images)
    emb.float().square().mean().backward()
    assert (emb[valid] - exact[valid]).norm() < 0.03 * exact[valid].norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_qformer_reads_its_features():
    config = complete_config(tiny_config(**SMALL, connector='qformer', qformer_n_layer=1, qformer_n_head=2, qformer_n_embd=32,
                                         n_queries=3))
    model = vision.Vision(config)
    images = [preprocess(noise(64, 64), config)]
    emb, valid = model(*collate_images(images, config))
    assert emb.shape == (1, 3, 32) and valid.all() and num_tokens(images[0], config) == 3


# -----------------------------------------------------------------------------
# positions

def example(n_texts=3):
    text = '<image>'.join(f'text {i} ' for i in range(n_texts))
    return {'text': text, 'images': [noise(64, 64, i) for i in range(n_texts - 1)]}


def test_each_image_token_has_its_own_position():
    enc = get_tokenizer('bytes')
    config = complete_config(tiny_config(**SMALL, image_positions='each', image_token=enc.image_id, block_size=96))
    model = make_model(**vars(config))
    batch = collate([tokenize(example(), enc, config)], config)
    _, pos = model.embed(batch['idx'], batch['images'])
    assert pos[0].tolist() == list(range(batch['idx'].shape[1]))
    one = replace(config, image_positions='one')
    _, pos = make_model(**vars(one)).embed(batch['idx'], batch['images'])
    n_tokens = num_tokens(preprocess(noise(64, 64), config), config)
    assert pos.max() == batch['idx'].shape[1] - 1 - 2 * (n_tokens - 1)


@pytest.mark.parametrize('positions', ['one', 'each'])
def test_a_text_is_cut_at_block_size_positions(positions):
    enc = get_tokenizer('bytes')
    config = complete_config(tiny_config(**SMALL, image_positions=positions, image_token=enc.image_id, block_size=64))
    model = make_model(**vars(config))
    long = {**example(2), 'text': 'before <image> ' + 'after' * 40}
    batch = collate([tokenize(long, enc, config)], config)
    _, pos = model.embed(batch['idx'], batch['images'])
    assert pos.max() == 63 and batch['targets'][0, -1] >= 0
    n_tokens = num_tokens(preprocess(noise(64, 64), config), config)
    config.block_size = n_tokens + 5
    if positions == 'each':
        with pytest.raises(ValueError, match='text and images up to the last image take'):
            tokenize(long, enc, config)
    else:
        tokenize(long, enc, config)


def test_generation_counts_the_positions_of_image_tokens():
    enc = get_tokenizer('bytes')
    config = complete_config(tiny_config(**SMALL, image_positions='each', image_token=enc.image_id, block_size=40))
    model = make_model(**vars(config))
    batch = collate([tokenize({**example(2), 'text': '<image> x'}, enc, config, prompt_only=True)], config)
    n = batch['idx'].shape[1]
    out = model.generate(batch['idx'], 100, temperature=0, images=batch['images'])
    assert out.shape[1] == 40
    logits = model.logits(out, batch['images'])
    assert torch.equal(logits[0, n - 1:-1].argmax(-1), out[0, n:])


# -----------------------------------------------------------------------------
# which parts learn

STAGES = {  # rates of a stage -> the parts that change
    'compressor and projector': (dict(vision_lr=0.0, compressor_lr=1e-3, learning_rate=0.0), {'compressor', 'connector'}),
    'whole encoder': (dict(), {'sam', 'compressor', 'vision', 'connector', 'gpt'}),
    'CLIP and GPT': (dict(sam_lr=0.0, compressor_lr=0.0), {'vision', 'connector', 'gpt'}),
    'projector and GPT': (dict(vision_lr=0.0), {'connector', 'gpt'})}


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_only_the_parts_of_a_stage_change(stage, optimizer):
    rates, changing = STAGES[stage]
    enc = get_tokenizer('bytes')
    torch.manual_seed(0)
    config = complete_config(tiny_config(**SMALL, image_token=enc.image_id))
    model = GPT(config)
    batch = collate([tokenize(example(), enc, config, loss_on='all')], config)
    optimizers = configure_optimizers(model, optimizer_config(optimizer=optimizer, **rates))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(batch)['lm'].backward()
    for opt in optimizers:
        opt.step()
    in_state = {id(p) for opt in optimizers for p in opt.state}
    for part, named in model.param_groups().items():
        if part in ('qformer_new', 'qformer'):
            continue
        assert named
        for name, p in named.items():
            # positions that no text has and ids that do not occur stay
            assert (not torch.equal(p, before[name])) == (part in changing), name
            assert (p.grad is not None) == (id(p) in in_state) == (part in changing), name


def test_no_parameter_is_without_effect():
    enc = get_tokenizer('bytes')
    config = complete_config(tiny_config(**SMALL, image_token=enc.image_id))
    model = GPT(config)
    model(collate([tokenize(example(), enc, config, loss_on='all')], config))['lm'].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    names = [name for name, _ in model.vision.named_parameters()]
    assert not any(part in name for name in names for part in ('conv1', 'ln_post', 'clip.proj', 'head'))


def test_flops_of_the_compressor():
    enc = get_tokenizer('bytes')
    config = complete_config(tiny_config(**SMALL, image_token=enc.image_id))
    model = GPT(config)
    batch = collate([tokenize(example(2), enc, config, loss_on='all')], config)
    configure_optimizers(model, optimizer_config())
    every = estimate_flops(model, batch)
    conv_1, conv_2 = (p.numel() for p in model.vision.encoder.compressor.parameters())
    for p in model.vision.encoder.compressor.parameters():
        p.data = p.data.flatten()  # is no matrix any more
    without = estimate_flops(model, batch)
    assert every - without == pytest.approx(6 * (conv_1 * 8 * 8 + conv_2 * 4 * 4))


# -----------------------------------------------------------------------------
# runs

@pytest.mark.parametrize('more', [[], ['--packing=True', '--image_positions=each', '--max_tiles=2', '--tile_size=32',
                                       '--block_size=80']])
def test_a_resumed_run_is_exact(tmp_path, more):
    rates = ['--vision_lr=0', '--compressor_lr=1e-3', *more]
    inside('train.py', *RUN, *rates, f'--out_dir={tmp_path}/whole')
    inside('train.py', *RUN, *rates, f'--out_dir={tmp_path}/parts', '--max_iters=2', '--lr_decay_iters=4')
    inside('train.py', *RUN, *rates, f'--out_dir={tmp_path}/parts', '--lr_decay_iters=4', '--init_from=resume')
    whole, parts = (read_weights(f'{tmp_path}/{name}/ckpt.pt')['model'] for name in ('whole', 'parts'))
    assert whole.keys() == parts.keys()
    for name, p in whole.items():
        assert torch.equal(p, parts[name]), name
    rows = [json.loads(line) for line in (tmp_path / 'whole' / 'log.jsonl').read_text().splitlines()]
    assert 'row_cosine' in rows[-1]['eval']


@pytest.mark.parametrize('mode', ['ddp', 'fsdp'])
def test_two_processes_train_what_one_does(tmp_path, mode):
    """With tiles: of a page of 64 x 20 pixels, but of none that is smaller than a tile."""
    knobs = [*RUN, '--vision_lr=0', '--compressor_lr=1e-3', '--max_tiles=2', '--tile_size=32', '--batch_size=2',
             '--gradient_accumulation_steps=2', '--block_size=80', '--max_chars=40', '--max_aspect=4']
    process = inside('train.py', *knobs, f'--out_dir={tmp_path}/one')
    assert process.returncode == 0, process.stderr
    process = launch('train.py', *knobs, f'--out_dir={tmp_path}/two', f'--parallel={mode}', processes=2)
    assert process.returncode == 0, process.stderr
    logs = [[row['loss'] for row in read_log(tmp_path / name) if 'loss' in row] for name in ('one', 'two')]
    assert logs[0] == pytest.approx(logs[1], abs=2e-4) and len(logs[0]) == 4
    one, two = (read_weights(f'{tmp_path}/{name}/ckpt.pt')['model'] for name in ('one', 'two'))
    for name, p in one.items():
        is_frozen = name.startswith(('vision.encoder.sam', 'vision.encoder.clip'))
        assert torch.equal(p, two[name]) if is_frozen else torch.allclose(p, two[name], atol=2e-3), name


def test_a_fresh_gpt_takes_over_the_encoder(tmp_path):
    inside('train.py', *RUN, f'--out_dir={tmp_path}/one')
    inside('train.py', *RUN, f'--out_dir={tmp_path}/two', f'--vision_from={tmp_path}/one/ckpt.pt', '--vision_lr=0',
           '--n_layer=1')
    one, two = (read_weights(f'{tmp_path}/{name}/ckpt.pt')['model'] for name in ('one', 'two'))
    encoder = [name for name in one if name.startswith('vision.encoder.')]
    assert len(encoder) > 30 and all(torch.equal(one[name], two[name]) for name in encoder)
    assert not torch.equal(one['lm_head.weight'], two['lm_head.weight'])


def test_row_cosine_is_that_of_the_rows_of_tokens():
    """With newlines as without: they are no row's tokens."""
    from evaluate import Evaluation
    enc = get_tokenizer('bytes')
    config = complete_config(tiny_config(vision_encoder='vit', image_token=enc.image_id, image_newlines=True))
    torch.manual_seed(0)
    model = GPT(config).eval()
    plain = GPT(replace(config, image_newlines=False)).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    examples = [{'text': '<image> x', 'images': [noise(32, 24, i)]} for i in range(3)]
    figures = []
    for gpt in (model, plain):
        evaluation = Evaluation.__new__(Evaluation)
        evaluation.config = type('config', (), {'loss_on': 'all'})
        evaluation.enc, evaluation.model, evaluation.device, evaluation.cache = enc, gpt, 'cpu', None
        figures.append(evaluation.image_cosines(examples)['row_cosine'])
    assert figures[0] == pytest.approx(figures[1], abs=1e-6) and figures[0] < 0.99


# -----------------------------------------------------------------------------
# recipes

def narrow_tower(name, load):
    """In place of SAM-B and CLIP-L, of which nothing can be downloaded."""
    if 'sam' in name:
        return VisionTransformerSAM(1024, 16, num_classes=0, embed_dim=24, depth=2, num_heads=2, window_size=14,
                                    global_attn_indexes=(1,), use_rel_pos=True, neck_chans=8)
    return VisionTransformer(224, 14, 32, 2, 2, 4, act_layer=QuickGELU)


@pytest.mark.parametrize('recipe, variant, changing', [
    ('ocr_vision', [], {'sam', 'compressor', 'clip', 'connector', 'gpt'}),
    ('ocr_vision', ['--vision_lr=0', '--compressor_lr=1e-3', '--connector_lr=1e-3', '--learning_rate=0', '--min_lr=0'],
     {'compressor', 'connector'}),
    ('ocr_mix', [], {'clip', 'connector', 'gpt'}),
    ('ocr_mix', ['--vision_lr=0', '--learning_rate=2e-5'], {'connector', 'gpt'})])
def test_the_two_stages_of_deepseek_ocr(tmp_path, monkeypatch, recipe, variant, changing):
    """The recipes themselves, in two processes' worth of micro-batches, with small towers and a small GPT."""
    monkeypatch.setattr('vision.open_tower', narrow_tower)
    rows = [{'messages': [{'role': 'user', 'content': '<image>\nOCR this document.'}, {'role': 'assistant', 'content': 'text'}],
             'images': [f'{i}.png']} for i in range(4)]
    for name in ('pages', 'other'):
        (tmp_path / name).mkdir()
        for i in range(4):
            noise(60 + 9 * i, 80).save(tmp_path / name / f'{i}.png')
        for split in ('train', 'val'):
            (tmp_path / name / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    process = inside('train.py', *TINY, '--vision_encoder=', '--tasks=text', f'--out_dir={tmp_path}/text')
    assert process.returncode == 0, process.stderr
    small = ['--tokenizer=bytes', '--gradient_accumulation_steps=2', '--batch_size=2', '--block_size=150', '--eval_iters=1',
             '--eval_samples=2', '--max_iters=2', '--eval_interval=1', '--keep_checkpoints=2', '--num_workers=0',
             '--device=cpu', '--compile=False', '--deepencoder_mode=tiny', '--warmup_iters=0']
    first = [*small, f'--init_from={tmp_path}/text/ckpt.pt', f'--dataset={tmp_path}/pages', f'--out_dir={tmp_path}/one']
    if recipe == 'ocr_vision':
        process = inside('train.py', 'config/ocr_vision.py', *first, *variant)
    else:
        assert inside('train.py', 'config/ocr_vision.py', *first).returncode == 0
        start = [f'--init_from={tmp_path}/one/ckpt.pt']
        if variant:  # a new GPT; nothing published is read for an encoder that comes from stage 1
            monkeypatch.setattr('vision.open_tower', lambda name, load: narrow_tower(name, load) if not load else 1 / 0)
            start = [f'--init_from={tmp_path}/text/ckpt.pt', f'--vision_from={tmp_path}/one/ckpt.pt']
        process = inside('train.py', 'config/ocr_mix.py', *small, *start, *variant, f'--out_dir={tmp_path}/two',
                         f'--dataset={tmp_path}/pages@0.7 {tmp_path}/other@0.2 pydoc@0.1', '--text_dataset=pydoc')
    assert process.returncode == 0, process.stderr
    out = tmp_path / ('one' if recipe == 'ocr_vision' else 'two')
    before, after = (read_weights(f'{out}/ckpt_0000000{step}.pt')['model'] for step in (1, 2))
    for name, p in before.items():
        part = name.split('.')[2] if name.startswith('vision.encoder.') else name.split('.')[1]
        part = part if name.startswith('vision.') else 'gpt'
        assert torch.equal(p, after[name]) == (part not in changing), name
    if recipe == 'ocr_mix':
        one = read_weights(f'{tmp_path}/one/ckpt.pt')['model']
        assert all(torch.equal(p, after[name]) for name, p in one.items() if name.startswith('vision.encoder.sam.'))
