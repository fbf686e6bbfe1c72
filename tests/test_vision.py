"""What must stay true between an image and its image tokens."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import batch_of_ids, make_model, tiny_config
from PIL import Image

import vision
from blip2 import QFormerPretraining
from patches import collate_images, num_tokens, preprocess, scaled_size


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize('connector, size', [
    ('linear', (32, 24)), ('linear', (30, 17)), ('pool', (30, 17)), ('pool', (7, 5)), ('pool', (48, 24))])
def test_every_pixel_is_in_one_patch(connector, size):
    config = tiny_config(connector=connector, patch_width=6, max_image_tokens=64)
    image = noise(*size)
    patches, grid = preprocess(image, config)
    height, width = config.patch_height, config.patch_width
    pixels = np.asarray(image)
    count = np.zeros(pixels.shape[:2], int)
    for patch, (row, col) in zip(patches.numpy(), grid.tolist()):
        if row < 0:
            continue
        box = slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width)
        expected = pixels[box]
        inside_image = patch.reshape(height, width, 3)[:expected.shape[0], :expected.shape[1]]
        assert (inside_image == expected).all()
        count[box] += 1
    assert (count == 1).all()


@pytest.mark.parametrize('size', [(5, 5), (31, 9), (200, 100), (100, 900), (1500, 30), (4000, 3000)])
@pytest.mark.parametrize('connector', ['linear', 'pool'])
def test_image_of_any_size_makes_at_most_max_image_tokens_and_keeps_its_aspect(size, connector):
    config = tiny_config(connector=connector, max_image_tokens=30)
    assert 1 <= num_tokens(preprocess(noise(*size), config), config) <= 30
    width, height = scaled_size(*size, config)
    rounding = 0.7 / min(size)
    assert (width, height) == size or abs(width / size[0] - height / size[1]) < rounding


def test_image_is_scaled_only_if_it_is_too_large():
    config = tiny_config(max_image_tokens=16)
    assert scaled_size(32, 32, config) == (32, 32)
    assert scaled_size(10, 12, config) == (10, 12)
    assert num_tokens(preprocess(noise(640, 640), config), config) == 16


def test_lines_are_scaled_to_line_height():
    config = tiny_config(line_height=16, patch_height=16, max_image_tokens=64)
    assert scaled_size(100, 32, config) == (50, 16)
    assert scaled_size(100, 8, config) == (200, 16)


def test_image_of_20000_to_1_raises():
    with pytest.raises(ValueError, match='20000x1 pixels is too elongated'):
        preprocess(Image.new('RGB', (20000, 1)), tiny_config())
    with pytest.raises(ValueError, match='1x20000 pixels is too elongated'):
        preprocess(Image.new('RGB', (1, 20000)), tiny_config())
    with pytest.raises(ValueError, match='20000x1 pixels is too elongated'):
        preprocess(Image.new('RGB', (20000, 1)), tiny_config(line_height=16))


def test_narrow_line_is_not_too_elongated():
    config = tiny_config(line_height=16, patch_height=16)
    assert len(preprocess(Image.new('RGB', (1, 40)), config)[1]) == 1


@pytest.mark.parametrize('connector', ['linear', 'mlp', 'pool'])
def test_image_tokens_do_not_depend_on_the_other_images_of_the_batch(connector):
    model = make_model(connector=connector)
    images = [preprocess(noise(*size), model.config) for size in ((9, 9), (32, 32), (25, 8))]
    emb, valid = model.vision(*collate_images(images, model.config))
    for i, image in enumerate(images):
        single, _ = model.vision(*collate_images([image], model.config))
        assert valid[i].sum() == num_tokens(image, model.config)
        torch.testing.assert_close(emb[i][valid[i]], single[0], atol=1e-5, rtol=1e-4)


def test_pool_is_the_mean_over_the_patches_that_exist():
    # 1 x 3 patches: a cell of two and a cell of one
    _, grid = preprocess(noise(24, 8), tiny_config(connector='pool'))
    x = torch.randn(1, len(grid), 32)
    out, valid = vision.pool(x, grid[None], 2)
    exists = grid[:, 0] >= 0
    assert exists.tolist() == [True, True, False, False, True, False, False, False]
    assert valid.tolist() == [[True, True]]
    torch.testing.assert_close(out[0, 0], x[0, :2].mean(0))
    torch.testing.assert_close(out[0, 1], x[0, 4])


def test_position_of_a_patch_matters():
    model = make_model()
    black_on_the_left = Image.new('RGB', (32, 8), 'white')
    black_on_the_left.paste('black', (0, 0, 8, 8))
    black_on_the_right = Image.new('RGB', (32, 8), 'white')
    black_on_the_right.paste('black', (24, 0, 32, 8))
    a, b = (model.vision(*collate_images([preprocess(image, model.config)], model.config))[0]
            for image in (black_on_the_left, black_on_the_right))
    assert (a[0, 0] - b[0, 3]).abs().max() > 1e-3


def test_batch_without_images_gives_gradients_of_zero():
    """Not None, which DDP would wait for, and not NaN."""
    model = make_model().train()
    images = collate_images([], model.config)
    model(batch_of_ids(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]), images))['lm'].backward()
    for name, p in model.vision.named_parameters():
        assert p.grad is not None and (p.grad == 0).all(), name


def test_unknown_names_raise():
    with pytest.raises(ValueError, match='vision_encoder must be vit, deepencoder, deepencoder_tiny, an encoder of open_clip'):
        make_model(vision_encoder='clip')
    with pytest.raises(ValueError, match='connector must be linear, mlp, pool, shuffle or qformer'):
        make_model(connector='perceiver')


@pytest.mark.parametrize('connector', ['linear', 'pool', 'qformer'])
def test_constructors_do_not_change_their_config(connector):
    config = tiny_config(connector=connector, qformer_n_layer=2, qformer_n_head=2, qformer_n_embd=32)
    before = dataclasses.asdict(config)
    assert vision.complete_config(config) is config
    vision.Vision(config)
    assert dataclasses.asdict(config) == before
    if connector == 'qformer':
        config.objective = 'itc+itm+itg'
        QFormerPretraining(config)
        assert dataclasses.asdict(config) == {**before, 'objective': 'itc+itm+itg'}
