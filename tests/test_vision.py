"""What must stay true between a picture and its image tokens."""

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_config
from PIL import Image

import vision


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize('connector,size', [('linear', (32, 24)), ('linear', (30, 17)), ('pool', (30, 17)), ('pool', (7, 5)),
                                            ('pool', (48, 24))])
def test_patches_hold_every_pixel_at_its_place(connector, size):
    config, image = tiny_config(connector=connector, patch_width=6, max_image_tokens=64), noise(*size)
    patches, grid = vision.preprocess(image, config)
    ph, pw = config.patch_height, config.patch_width
    pixels = np.asarray(image)
    seen = np.zeros(pixels.shape[:2], int)
    for patch, (row, col) in zip(patches.numpy(), grid.tolist()):
        if row < 0:
            continue
        part = pixels[row * ph:(row + 1) * ph, col * pw:(col + 1) * pw]
        assert (patch.reshape(ph, pw, 3)[:part.shape[0], :part.shape[1]] == part).all()
        seen[row * ph:(row + 1) * ph, col * pw:(col + 1) * pw] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize('size', [(5, 5), (31, 9), (200, 100), (100, 900), (1500, 30), (4000, 3000)])
@pytest.mark.parametrize('connector', ['linear', 'pool'])
def test_any_size_makes_at_most_max_image_tokens_and_keeps_its_aspect(size, connector):
    config = tiny_config(connector=connector, max_image_tokens=30)
    assert 1 <= vision.num_tokens(vision.preprocess(noise(*size), config), config) <= 30
    width, height = vision.scaled_size(*size, config)
    assert (width, height) == size or abs(width / size[0] - height / size[1]) < 0.7 / min(size)  # but for rounding


def test_an_image_that_fits_is_not_scaled_and_one_that_does_not_uses_its_tokens():
    config = tiny_config(max_image_tokens=16)
    assert vision.scaled_size(32, 32, config) == (32, 32)
    assert vision.scaled_size(10, 12, config) == (10, 12)
    assert vision.num_tokens(vision.preprocess(noise(640, 640), config), config) == 16


def test_lines_are_scaled_to_line_height():
    config = tiny_config(line_height=16, patch_height=16, max_image_tokens=64)
    assert vision.scaled_size(100, 32, config) == (50, 16)
    assert vision.scaled_size(100, 8, config) == (200, 16)


def test_a_20000_to_1_image_is_refused():
    with pytest.raises(ValueError, match='20000x1 pixels is too elongated'):
        vision.preprocess(Image.new('RGB', (20000, 1)), tiny_config())
    with pytest.raises(ValueError, match='1x20000 pixels is too elongated'):
        vision.preprocess(Image.new('RGB', (1, 20000)), tiny_config())
    with pytest.raises(ValueError, match='20000x1 pixels is too elongated'):
        vision.preprocess(Image.new('RGB', (20000, 1)), tiny_config(line_height=16))


def test_a_narrow_line_is_no_elongated_image():
    config = tiny_config(line_height=16, patch_height=16)
    assert len(vision.preprocess(Image.new('RGB', (1, 40)), config)[1]) == 1


@pytest.mark.parametrize('connector', ['linear', 'mlp', 'pool'])
def test_an_images_tokens_do_not_depend_on_the_other_images_of_the_batch(connector):
    model = make_model(connector=connector)
    images = [vision.preprocess(noise(*size), model.config) for size in ((9, 9), (32, 32), (25, 8))]
    emb, valid = model.vision(*vision.collate(images, model.config))
    for i, image in enumerate(images):
        alone, _ = model.vision(*vision.collate([image], model.config))
        assert valid[i].sum() == vision.num_tokens(image, model.config)
        torch.testing.assert_close(emb[i][valid[i]], alone[0], atol=1e-5, rtol=1e-4)


def test_pool_is_the_mean_over_the_patches_that_exist():
    _, grid = vision.preprocess(noise(24, 8), tiny_config(connector='pool'))  # 1 x 3 patches: a cell of two and a cell of one
    x = torch.randn(1, len(grid), 32)
    out, valid = vision.pool(x, grid[None], 2)
    there = grid[:, 0] >= 0
    assert there.tolist() == [True, True, False, False, True, False, False, False] and valid.tolist() == [[True, True]]
    torch.testing.assert_close(out[0, 0], x[0, :2].mean(0))
    torch.testing.assert_close(out[0, 1], x[0, 4])


def test_the_place_of_a_patch_matters():
    model = make_model()
    left, right = Image.new('RGB', (32, 8), 'white'), Image.new('RGB', (32, 8), 'white')
    left.paste('black', (0, 0, 8, 8))
    right.paste('black', (24, 0, 32, 8))
    a, b = (model.vision(*vision.collate([vision.preprocess(i, model.config)], model.config))[0] for i in (left, right))
    assert (a[0, 0] - b[0, 3]).abs().max() > 1e-3


def test_a_batch_without_images_gives_zero_gradients_not_none_and_not_nan():
    model = make_model().train()
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]), vision.collate([], model.config))[1].backward()
    for name, p in model.vision.named_parameters():
        assert p.grad is not None and (p.grad == 0).all(), name


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match='vision_encoder must be vit, a tower'):
        make_model(vision_encoder='clip')
    with pytest.raises(ValueError, match='connector must be linear, mlp, pool or qformer'):
        make_model(connector='perceiver')
