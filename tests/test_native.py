"""What must stay true of images at their own size and aspect: each gives what it gives alone."""

import dataclasses
import itertools
import json
import random

import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import inside, make_model, tiny_config, train
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import vision
from dataloader import get_tokenizer, pack, tokenize
from model import GPT
from patches import collate_images, num_tokens, preprocess
from train import mark_sizes
from vision import complete_config, interpolate_positions

SIZES = [(80, 40), (40, 80), (40, 30), (8, 8), (90, 21)]
NATIVE = dict(image_fit='native', max_image_tokens=64)


@pytest.fixture(scope='module', autouse=True)
def tiny_clip(tmp_path_factory):
    """A CLIP of 8x8 patches, with a table of 4x4 positions."""
    folder = tmp_path_factory.mktemp('towers')
    text = {'context_length': 8, 'vocab_size': 100, 'width': 32, 'heads': 2, 'layers': 1}
    tower = {'image_size': 32, 'layers': 3, 'width': 48, 'head_width': 16, 'patch_size': 8}
    siglip = {'image_size': 160, 'timm_model_name': 'test_vit3', 'timm_pool': 'map', 'timm_proj': 'none'}
    (folder / 'native-clip.json').write_text(json.dumps({'embed_dim': 32, 'text_cfg': text, 'vision_cfg': tower}))
    (folder / 'native-siglip.json').write_text(
        json.dumps({'embed_dim': 96, 'text_cfg': text, 'vision_cfg': siglip, 'custom_text': True}))
    open_clip.add_model_config(folder)


def noise(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def random_vision(encoder, **changes):
    """(Vision with random weights in eval mode, its config)"""
    torch.manual_seed(0)
    config = complete_config(tiny_config(**{'vision_encoder': encoder, 'connector': 'mlp', **NATIVE, **changes}))
    model = vision.Vision(config, load=False).eval()
    for name, p in model.named_parameters():
        if 'pos_embed' in name or 'positional_embedding' in name:  # new ones are so small that they make no difference
            torch.nn.init.normal_(p, std=0.5)
    return model, config


@pytest.mark.parametrize('encoder, changes', [
    ('vit', {'vision_n_layer': 2}),
    ('timm/naflexvit_base_patch16_siglip', {}),
    ('timm/naflexvit_base_patch16_siglip', {'connector': 'pool', 'pool_size': 3}),
    ('native-clip/', {}),
    ('native-clip/', {'vision_layer': -1, 'vision_cls': True}),
    ('native-clip/', {'connector': 'qformer', 'qformer_n_layer': 2, 'qformer_n_head': 2, 'qformer_n_embd': 32}),
    ('native-siglip/', {'vision_layer': -1}),
    ('timm/test_vit2', {'vision_cls': True})])
def test_each_image_of_a_batch_gives_what_it_gives_alone(encoder, changes):
    model, config = random_vision(encoder, **changes)
    images = [preprocess(noise(size, i), config) for i, size in enumerate(SIZES)]
    assert len({len(grid) for _, grid in images}) > 1
    with torch.no_grad():
        emb, valid = model(*collate_images(images, config))
        static, static_valid = model(*collate_images(images, config, fixed_length=True))
        for i, image in enumerate(images):
            alone, alone_valid = model(*collate_images([image], config))
            assert alone_valid.all() and alone.shape[1] == num_tokens(image, config) == valid[i].sum()
            torch.testing.assert_close(emb[i][valid[i]], alone[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(static[i][static_valid[i]], alone[0], atol=1e-4, rtol=1e-4)
        assert static.isfinite().all() and not static_valid[len(images):].any()
        assert (emb[0][-1] - emb[1][-1]).abs().max() > 1e-3  # images make a difference


@pytest.mark.parametrize('layer', [-2, -1])
def test_naflexvit_gives_timms_own_features(layer):
    model, config = random_vision('timm/naflexvit_base_patch16_siglip', vision_layer=layer)
    assert config.image_fit == 'native' and config.image_size == 0 and config.patch_width == 16
    images = [preprocess(noise(size, i), config) for i, size in enumerate([(300, 64), (128, 128), (16, 200)])]
    patches, grid = collate_images(images, config)
    pixels = (patches.unflatten(-1, (-1, 3)) / 255 - torch.tensor(config.image_mean)) / torch.tensor(config.image_std)
    valid = grid[..., 0] >= 0
    batch = {'patches': pixels.flatten(2), 'patch_coord': grid.clamp(min=0), 'patch_valid': valid}
    with torch.no_grad():
        theirs, = model.encoder.tower.forward_intermediates(
            batch, indices=[layer], norm=layer == -1, output_fmt='NLC', intermediates_only=True)
        ours = model.encoder(patches, grid)
    torch.testing.assert_close(ours[valid], theirs[valid], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('encoder', ['native-clip/', 'native-siglip/', 'timm/test_vit', 'timm/test_vit2',
                                     'timm/vit_tiny_patch16_224', 'timm/vit_small_patch14_reg4_dinov2'])
@pytest.mark.parametrize('layer', [-2, -1])
def test_at_the_size_of_its_table_an_interpolated_tower_gives_its_own_features(encoder, layer):
    keep_cls = layer == -1 and encoder != 'native-siglip/'  # which has none
    # DINOv2's table, of 518 pixels, is large: timm interpolates it
    changes = dict(vision_layer=layer, vision_cls=keep_cls, image_size=224 if 'dinov2' in encoder else 0)
    squares, square_config = random_vision(encoder, image_fit='squash', **changes)
    config = dataclasses.replace(square_config, image_fit='native', image_size=0, max_image_tokens=10_000)
    native = vision.PretrainedEncoder(config, load=False).eval()
    native.tower = squares.encoder.tower
    image = noise((square_config.image_size, square_config.image_size))
    batch = collate_images([preprocess(image, config)], config)
    with torch.no_grad():
        ours = native(*batch)
        theirs = squares.encoder(*collate_images([preprocess(image, square_config)], square_config))
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('mode', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('rows, cols', [(16, 16), (7, 30), (40, 3), (1, 1), (33, 2)])
def test_positions_are_interpolated_as_by_torch(mode, rows, cols):
    table = torch.randn(16 * 16, 8)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))[None]
    padded = F.pad(grid, (0, 0, 0, 5), value=-1)
    ours = interpolate_positions(table, padded, mode)[0, :-5]
    theirs = F.interpolate(table.T.view(1, 8, 16, 16), size=(rows, cols), mode=mode, antialias=True)
    torch.testing.assert_close(ours, theirs[0].flatten(1).T, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours, table) or (rows, cols) != (16, 16)  # exactly


def test_aspect_is_kept_within_a_patch():
    config = complete_config(tiny_config(vision_encoder='native-clip/', **NATIVE))
    for width, height in [(50, 40), (300, 100), (9, 200), (3000, 400), (1, 1)]:
        _, grid = preprocess(noise((width, height)), config)
        rows, cols = (grid.amax(0) + 1).tolist()
        assert len(grid) == rows * cols <= 64
        scale = min(1, cols * 8 / width, rows * 8 / height)
        assert abs(width * scale - cols * 8) < 8.5 and abs(height * scale - rows * 8) < 8.5
    with pytest.raises(ValueError, match='too elongated'):
        preprocess(noise((4000, 2)), config)


@pytest.mark.parametrize('encoder, changes, message', [
    ('timm/test_convnext', {}, 'no plain ViT with a table of positions'),
    ('timm/eva02_tiny_patch14_224', {}, 'no plain ViT with a table of positions'),
    ('timm/naflexvit_base_patch16_parfac_gap', {}, 'no plain ViT with a table of positions'),
    ('native-clip/', {'image_size': 64}, 'image_size is the side of squares')])
def test_native_images_are_refused(encoder, changes, message):
    with pytest.raises(ValueError, match=message):
        complete_config(tiny_config(vision_encoder=encoder, **{**NATIVE, **changes}))


@pytest.mark.parametrize('encoder, size', [('timm/test_vit', 64), ('native-clip/', 64), ('native-siglip/', 96)])
def test_image_size_sets_the_side_of_the_squares(encoder, size):
    model, config = random_vision(encoder, image_fit='pad', image_size=size)
    assert config.image_size == size == complete_config(config).image_size
    batch = collate_images([preprocess(noise((50, 40)), config)], config)
    emb, valid = model(*batch)
    assert valid.all() and emb.shape[1] == (size // config.patch_width) ** 2


def test_image_size_of_published_weights_interpolates_their_table(tmp_path):
    """As timm does for a tower that is made for this size."""
    tower = timm.create_model('test_vit', num_classes=0)
    torch.nn.init.normal_(tower.pos_embed)
    path = tmp_path / 'model.pth'
    torch.save(tower.state_dict(), path)
    config = complete_config(tiny_config(vision_encoder=f'timm/test_vit/{path}', image_fit='squash', image_size=96))
    ours = vision.PretrainedEncoder(config).eval()
    theirs = timm.create_model('test_vit', num_classes=0, img_size=96, pretrained=True,
                               pretrained_cfg_overlay={'file': str(path)}).eval()
    assert torch.equal(ours.tower.pos_embed, theirs.pos_embed) and ours.tower.pos_embed.shape != tower.pos_embed.shape


def test_small_vit_reads_squares_if_it_has_an_image_size():
    config = complete_config(tiny_config(image_size=32, max_image_tokens=16))
    patches, grid = preprocess(Image.new('RGB', (64, 16), 'black'), config)
    assert grid.amax(0).tolist() == [3, 3] and len(grid) == 16
    is_gray = (patches == 127).all(1).view(4, 4)
    assert is_gray[0].all() and is_gray[3].all() and not (is_gray[1].any() or is_gray[2].any())
    assert len(preprocess(Image.new('RGB', (64, 16)), tiny_config())[1]) == 16


@pytest.mark.parametrize('changes', [{}, {'connector': 'pool', 'pool_size': 2}, {'vision_cls': True}])
def test_static_batches_have_one_shape(changes):
    config = complete_config(tiny_config(vision_encoder='native-clip/', **{'connector': 'mlp', **NATIVE, **changes}))
    shapes = {collate_images([preprocess(noise(size), config)], config, fixed_length=True)[0].shape
              for size in ((8, 8), (64, 64), (500, 500))}
    assert len(shapes) == 1


def test_naflexvit_can_also_read_squares():
    model, config = random_vision('timm/naflexvit_base_patch16_siglip', image_fit='squash', image_size=64)
    emb, valid = model(*collate_images([preprocess(noise((50, 40)), config)], config))
    assert valid.all() and emb.shape[1] == 16


def test_packed_native_images_compile_to_one_graph():
    torch.manual_seed(0)
    config = complete_config(tiny_config(vision_encoder='native-clip/', connector='mlp', block_size=96, image_fit='native',
                                         max_image_tokens=16))
    model = GPT(config, load=False)
    rng = random.Random(0)
    tokenizer = get_tokenizer('bytes')

    def documents():
        for i in itertools.count():
            images = [noise((rng.randrange(4, 60), rng.randrange(4, 60)), i) for _ in range(i % 3)]
            text = '<image>'.join(['some text'] * (1 + len(images)))
            yield i, tokenize({'text': text, 'images': images}, tokenizer, config, 'all')

    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=counter)
    for batch in itertools.islice(pack(documents(), config, 2, 8, fixed_length=True), 20):
        del batch['packing']
        mark_sizes(batch, config)
        loss = compiled(batch)['lm']
        assert loss.item() == pytest.approx(model(batch)['lm'].item(), rel=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize('words', [[], ['--image_fit=pad', '--image_size=64']], ids=['native', 'squares of 64'])
def test_a_run_resumes_and_answers(tmp_path, words):
    """From random weights: a file of them stands in for the published ones."""
    tower = timm.create_model('test_vit', num_classes=0)
    torch.save(tower.state_dict(), tmp_path / 'model.pth')
    knobs = [f'--vision_encoder=timm/test_vit/{tmp_path}/model.pth', '--image_fit=native', '--line_height=0', *words,
             f'--out_dir={tmp_path}/run']
    assert train(tmp_path / 'run', *knobs, '--max_iters=2').returncode == 0
    process = train(tmp_path / 'run', *knobs, '--init_from=resume')
    assert process.returncode == 0, process.stderr
    noise((100, 30)).save(tmp_path / 'x.png')
    process = inside('sample.py', f'--out_dir={tmp_path}/run', '--image', tmp_path / 'x.png', '--max_new_tokens=4')
    assert process.returncode == 0, process.stderr


def test_padding_takes_no_part_in_the_means_of_a_tiny_model():
    """A GPT with an interpolated tower: the same logits in a batch with a larger image as alone."""
    model = make_model(vision_encoder='vit', max_image_tokens=64)
    config = model.config
    small, large = (preprocess(noise(size), config) for size in ((20, 12), (64, 64)))
    idx = lambda image: torch.tensor([[config.image_token] * num_tokens(image, config) + [5, 6]])
    alone = model.logits(idx(small), collate_images([small], config))
    width = idx(large).shape[1]
    both = torch.cat([F.pad(idx(small), (0, width - idx(small).shape[1]), value=-1), idx(large)])
    together = model.logits(both, collate_images([small, large], config))
    torch.testing.assert_close(together[:1, :alone.shape[1]], alone, atol=1e-4, rtol=1e-4)
