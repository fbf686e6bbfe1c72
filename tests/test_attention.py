"""Where does it look? The attention shown is the attention computed, and it is drawn where the patches are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LLAMA, inside, make_model, refused, tiny_config, train
from PIL import Image

from dataloader import get_tokenizer, tokenize
from evaluate import attention_maps
from patches import arrange, assemble, collate_images, preprocess, resize, token_cells
from vision import complete_config

BYTES = get_tokenizer('bytes')


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize('switches', [{}, LLAMA, {**LLAMA, 'nope_every': 2}, {**LLAMA, 'qk_norm': True, 'n_kv_head': 2}])
def test_weights_are_those_of_the_forward_pass(switches):
    model = make_model(**switches, image_token=BYTES.image_id)
    images = collate_images([preprocess(noise(24, 16), model.config)], model.config)
    idx = torch.tensor([[5] + [BYTES.image_id] * 6 + list(range(20, 40))])
    weights = model.attention(idx, images)                                      # (n_layer, 1, nh, T, T)
    T = idx.shape[1]
    assert weights.shape == (2, 1, 2, T, T)
    assert torch.allclose(weights.sum(-1), torch.ones(()))
    assert (weights.triu(1) == 0).all() and (weights > 0.2).any()
    inputs = []
    hooks = [block.attn.register_forward_hook(lambda attn, args, y: inputs.append((attn, args, y))) for block in
             model.transformer.h]
    with torch.no_grad():
        model.hidden(idx, images)
    for hook in hooks:
        hook.remove()
    for (attn, args, y), own in zip(inputs, weights):
        x, rope, lora_mask = args[:3]
        v = attn.project(x, rope, lora_mask)[2].repeat_interleave(attn.n_head // attn.n_kv_head, dim=2)
        mixed = torch.einsum('bhij,bjhd->bihd', own, v).flatten(2)
        torch.testing.assert_close(attn.c_proj(mixed), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('changes', [{}, {'connector': 'pool'}, {'image_size': 32},
                                     {'vision_encoder': 'deepencoder_tiny', 'image_size': 32, 'vision_n_embd': 24}])
def test_a_picture_is_the_image_as_the_encoder_sees_it(changes):
    config = complete_config(tiny_config(**changes))
    image = noise(32, 24)
    patches, grid = preprocess(image, config)
    seen = np.asarray(assemble(patches, grid, config))
    expected = np.asarray(resize(image, config))
    assert (seen[:expected.shape[0], :expected.shape[1]] == expected).all()


def test_tiles_are_above_the_whole_image():
    config = complete_config(tiny_config(image_size=32, max_tiles=2, image_newlines=True, max_image_tokens=64))
    image = noise(64, 32)
    patches, grid = preprocess(image, config)
    seen = np.asarray(assemble(patches, grid, config))
    assert seen.shape == (64, 64, 3) and (seen[:32] == np.asarray(image)).all() and (seen[32:, 32:] == 255).all()


class Looking:
    """In place of a model: each token attends to one image token only, the n-th to the n-th."""

    def __init__(self, config):
        self.config = config
        self.lm_head = torch.nn.Linear(1, 1)

    def attention(self, idx, images):
        places = (idx[0] == self.config.image_token).nonzero()[:, 0]
        if self.config.image_newlines:
            order = arrange(images[1][0], self.config)
            places = places[order >= 0][order[order >= 0].argsort()]
        weights = torch.zeros(self.config.n_layer, 1, self.config.n_head, idx.shape[1], idx.shape[1])
        for n, row in enumerate(range(self.prompt_length - 1, idx.shape[1])):
            weights[:, 0, :, row, places[n % len(places)]] = 1.0
        return weights


@pytest.mark.parametrize('changes', [{}, {'image_newlines': True},
                                     {'image_newlines': True, 'image_size': 16, 'max_tiles': 2, 'image_fit': 'squash'}])
def test_red_is_where_a_word_looked(changes):
    config = complete_config(tiny_config(image_token=BYTES.image_id, **changes))
    model = Looking(config)
    example = {'messages': [{'role': 'user', 'content': '<image>\nWhat?'}], 'images': [Image.new('RGB', (32, 16), 'white')]}
    model.prompt_length = len(tokenize(example, BYTES, config, prompt_only=True)['idx'])
    # the letters are tokens 0, 2, 4, 6, each with the space after it
    shown = attention_maps(model, BYTES, example, BYTES.encode('a b c d'))
    assert [word for word, _ in shown] == ['a', 'b', 'c', 'd']
    cells = token_cells(preprocess(example['images'][0], config)[1], config).tolist()
    for number, (_, image) in enumerate(shown):
        rows, cols = image.height // 8, image.width // 8
        red = (np.asarray(image)[..., 0].astype(int) - np.asarray(image)[..., 1] > 100).reshape(rows, 8, cols, 8).any((1, 3))
        expected = np.zeros((rows, cols), bool)
        for token in (2 * number, 2 * number + 1)[:2 if number < 3 else 1]:
            expected[tuple(cells[token])] = True
        assert (red == expected).all()


def test_a_sheet_is_written(tmp_path):
    assert train(tmp_path / 'run').returncode == 0
    noise(64, 16).save(tmp_path / 'x.png')
    words = ['sample.py', f'--out_dir={tmp_path}/run', '--image', tmp_path / 'x.png', '--max_new_tokens=4', '--attention']
    process = inside(*words)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / 'run' / 'attention.png').exists() == bool(process.stdout.strip())
    process = train(tmp_path / 'q', '--connector=qformer', '--qformer_n_layer=1', '--qformer_n_head=2', '--qformer_n_embd=32')
    assert process.returncode == 0, process.stderr
    model = SimpleNamespace(config=tiny_config(connector='qformer'))
    with pytest.raises(ValueError, match="a Q-Former's queries are none"):
        attention_maps(model, BYTES, {}, [120])
    refused(inside('sample.py', f'--out_dir={tmp_path}/run', '--prompt=x', '--attention_layer=3', '--image', tmp_path / 'x.png',
                   '--attention'), 'attention_layer must be 1 to 2')
