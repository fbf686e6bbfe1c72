"""What must stay true of pretrained encoders: their features are the original's, and a frozen one does not change."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import ROOT, batch_of_ids, inside, make_model, optimizer_config, read_log, refused, tiny_config, train
from PIL import Image
from safetensors.torch import load, load_file, save_file

import dataloader
import vision
from evaluate import find_device
from patches import collate_images, num_tokens, preprocess, resize_to_square
from train import configure_optimizers
from vision import complete_config
from weights import build_model, checkpoint_state, load_vision_from, published_fingerprint

TEXT = {'context_length': 8, 'vocab_size': 100, 'width': 32, 'heads': 2, 'layers': 1}
CLIP = {'embed_dim': 32, 'text_cfg': TEXT,
        'vision_cfg': {'image_size': 32, 'layers': 3, 'width': 48, 'head_width': 16, 'patch_size': 8}}
COCA = {'embed_dim': 32, 'text_cfg': {**TEXT, 'embed_cls': True, 'output_tokens': True}, 'custom_text': True,
        'multimodal_cfg': {**TEXT, 'attn_pooler_heads': 2},
        'vision_cfg': {**CLIP['vision_cfg'], 'attentional_pool': True, 'attn_pooler_heads': 2, 'output_tokens': True}}
SIGLIP = {'embed_dim': 96, 'text_cfg': TEXT, 'custom_text': True,  # a tower of timm with attn_pool, as SigLIP's
          'vision_cfg': {'image_size': 160, 'timm_model_name': 'test_vit3', 'timm_pool': 'map', 'timm_proj': 'none'}}
RESNET = {'embed_dim': 32, 'text_cfg': TEXT, 'vision_cfg': {'image_size': 64, 'layers': [1, 1, 1, 1], 'width': 16}}


@pytest.fixture(scope='session')
def towers(tmp_path_factory):
    """Files with the weights of tiny towers, as open_clip and timm write them. {name: vision_encoder}"""
    folder = tmp_path_factory.mktemp('towers')
    configs = {'clip': CLIP, 'coca': COCA, 'siglip': SIGLIP, 'resnet': RESNET}
    for name, config in {**configs, 'clip-quickgelu': {**CLIP, 'quick_gelu': True}}.items():
        (folder / f'tiny-{name}.json').write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    encoders = {}
    for name in configs:
        model = open_clip.create_model(f'tiny-{name}')
        state = {k: v.clone() for k, v in model.state_dict().items()}
        if name == 'resnet':  # as it is made, its features are hardly above 0
            state = {k: 2 * v if v.dim() == 4 else v for k, v in state.items()}
        save_file(state, folder / f'{name}.safetensors')
        encoders[name] = f'tiny-{name}/{folder}/{name}.safetensors'
    for name, timm_name in (('timm', 'test_vit'), ('timm-attn-pool', 'test_vit3'), ('conv', 'test_convnext')):
        save_file(timm.create_model(timm_name, num_classes=0).state_dict(), folder / f'{name}.safetensors')
        encoders[name] = f'timm/{timm_name}/{folder}/{name}.safetensors'
    return encoders


def weights_file(encoder):
    """The file that the name of an encoder ends with."""
    return Path('/' + encoder.partition('//')[2])


def original_tower(encoder):
    """The tower as open_clip or timm opens it, and its mean, std and image size."""
    if not encoder.startswith('timm/'):
        model, _, path = encoder.partition('/')
        tower = open_clip.create_model(model, pretrained=path).visual.eval()
        size, *_ = np.atleast_1d(tower.image_size)
        return tower, tower.preprocess_cfg['mean'], tower.preprocess_cfg['std'], int(size)
    name = encoder.split('/')[1]
    overlay = {'file': str(weights_file(encoder))}
    tower = timm.create_model(name, num_classes=0, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    data = timm.data.resolve_model_data_config(tower)
    return tower, data['mean'], data['std'], data['input_size'][-1]


def normalized(image, mean, std, size):
    """The pixels of an image squashed to a square, (1, 3, size, size)."""
    pixels = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    return ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


def original_features(encoder, image, layer):
    """The features of an image in the tower as it was published, (1, C, rows, cols)."""
    tower, mean, std, size = original_tower(encoder)
    pixels = normalized(image, mean, std, size)
    options = dict(indices=[layer], output_fmt='NCHW', intermediates_only=True)
    if encoder.startswith('timm/'):
        return tower.forward_intermediates(pixels, norm=layer == -1, **options)[0]
    return tower.forward_intermediates(pixels, normalize_intermediates=layer == -1, **options)['image_intermediates'][0]


def random_image(seed=0, size=(50, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoder_config(towers, name, **changes):
    return complete_config(tiny_config(vision_encoder=towers[name], **changes))


def make_vision(towers, name, **changes):
    config = encoder_config(towers, name, **changes)
    return vision.Vision(config).eval(), config


def batch_of(image, config):
    return collate_images([preprocess(image, config)], config)


# the last layer of a CoCa has no norm of its own, and open_clip cannot compute it
ENCODERS_AND_LAYERS = [('coca', -2), *((name, layer) for layer in (-2, -1)
                                       for name in ('clip', 'siglip', 'resnet', 'timm', 'timm-attn-pool', 'conv'))]


@pytest.mark.parametrize('name, layer', ENCODERS_AND_LAYERS)
def test_features_are_the_original_towers(towers, name, layer):
    model, config = make_vision(towers, name, vision_layer=layer, image_fit='squash')
    ours = model.encoder(*batch_of(random_image(), config))
    theirs = original_features(towers[name], random_image(), layer)
    assert ours.shape[1] == theirs[0, 0].numel() and theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)
    if name == 'clip':
        assert ours.shape == (1, 16, 48) and config.image_mean != (0.5, 0.5, 0.5)


@pytest.mark.parametrize('connector', ['mlp', 'pool'])
def test_features_are_the_original_towers_also_where_cells_extend_over_the_border(towers, connector):
    model, config = make_vision(towers, 'timm', image_fit='squash', connector=connector, pool_size=3)
    theirs = original_features(towers['timm'], random_image(), -2)
    if connector == 'pool':
        theirs = torch.nn.functional.avg_pool2d(theirs, 3, ceil_mode=True)
    patches, grid = batch_of(random_image(), config)
    ours, valid = model.features(patches, grid)
    assert valid.all() and ours.shape[1] == num_tokens((patches[0], grid[0]), config)
    torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_convolutional_tower_makes_embeddings(towers):
    model, config = make_vision(towers, 'conv')
    emb, valid = model(*batch_of(random_image(), config))
    assert valid.all() and emb.shape[1] == (config.image_size // config.patch_width) ** 2 and emb.std() > 0


def test_class_token_is_kept_on_request(towers):
    with_cls, config = make_vision(towers, 'clip', vision_cls=True)
    x = with_cls.encoder(*batch_of(random_image(), config))
    without_cls, config = make_vision(towers, 'clip', vision_cls=False)
    y = without_cls.encoder(*batch_of(random_image(), config))
    assert x.shape[1] == 17
    torch.testing.assert_close(x[:, 1:], y)
    with_cls, config = make_vision(towers, 'clip', vision_cls=True, image_fit='squash')
    x = with_cls.encoder(*batch_of(random_image(), config))
    tower, mean, std, size = original_tower(towers['clip'])
    theirs = tower.forward_intermediates(normalized(random_image(), mean, std, size), indices=[-2], output_extra_tokens=True)
    torch.testing.assert_close(x[:, 0], theirs['image_intermediates_prefix'][0][:, 0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match='vision_cls does not work with connector pool'):
        make_vision(towers, 'clip', vision_cls=True, connector='pool')
    with pytest.raises(ValueError, match='has no class token'):
        make_vision(towers, 'conv', vision_cls=True)


@pytest.mark.parametrize('fit, corner, middle', [('pad', 'mean', 'red'), ('squash', 'red', 'red'), ('crop', 'red', 'red')])
def test_image_fit(fit, corner, middle):
    config = tiny_config(vision_encoder='x/y', image_fit=fit, image_size=32, image_mean=(0.25, 0.5, 0.75))
    image = resize_to_square(Image.new('RGB', (64, 32), 'red'), config)
    colors = {'red': (255, 0, 0), 'mean': (63, 127, 191)}
    assert image.size == (32, 32)
    assert image.getpixel((16, 1)) == colors[corner] and image.getpixel((16, 16)) == colors[middle]
    blue_edge = Image.new('RGB', (64, 32), 'red')
    blue_edge.paste('blue', (0, 0, 8, 32))
    assert (resize_to_square(blue_edge, config).getpixel((0, 16))[2] > 128) == (fit != 'crop')
    config.image_fit = 'crop'
    for side in range(1, 400):  # the shorter side comes out exactly
        image = resize_to_square(Image.new('RGB', (side, side + 7), 'red'), config)
        assert image.getpixel((31, 31)) == (255, 0, 0)
    config.image_fit = 'stretch'
    with pytest.raises(ValueError, match='image_fit must be native, pad, squash or crop'):
        resize_to_square(image, config)


# -----------------------------------------------------------------------------
# what is known of an encoder before its weights are read

@pytest.mark.parametrize('name', ['clip', 'coca', 'siglip', 'resnet', 'timm', 'timm-attn-pool', 'conv'])
def test_complete_config_finds_what_the_loaded_tower_has(towers, name):
    tower, mean, std, size = original_tower(towers[name])
    with torch.no_grad():
        side = original_features(towers[name], random_image(), -2).shape[-1]
    config = encoder_config(towers, name)
    assert (config.image_size, config.image_mean, config.image_std) == (size, tuple(mean), tuple(std))
    assert config.patch_width == config.patch_height == size // side


@pytest.mark.parametrize('name', ['clip', 'timm'])
def test_complete_config_and_constructors_do_not_change_their_config(towers, name):
    config = tiny_config(vision_encoder=towers[name])
    before = dataclasses.asdict(config)
    complete = complete_config(config)
    assert dataclasses.asdict(config) == before and complete != config
    before = dataclasses.asdict(complete)
    assert complete_config(complete) == complete
    model = make_model(**before)
    vision.PretrainedEncoder(complete)
    configure_optimizers(model, optimizer_config(vision_lr=0.0))
    configure_optimizers(model, optimizer_config(vision_lr=1e-4))
    assert dataclasses.asdict(complete) == before and dataclasses.asdict(model.config) == before


def test_complete_config_reads_no_weights(towers, tmp_path):
    empty = tmp_path / 'empty.safetensors'
    empty.touch()
    config = complete_config(tiny_config(vision_encoder=f'tiny-clip/{empty}'))
    assert config.image_size == 32 and config.patch_width == 8


def test_local_dir_has_its_own_configuration(towers, tmp_path):
    preprocessing = {'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6]}
    (tmp_path / 'open_clip_config.json').write_text(json.dumps({'model_cfg': CLIP, 'preprocess_cfg': preprocessing}))
    shutil.copy(weights_file(towers['clip']), tmp_path / 'open_clip_model.safetensors')
    config = complete_config(tiny_config(vision_encoder=f'local-dir:{tmp_path}'))
    assert (config.image_size, config.patch_width) == (32, 8)
    assert config.image_mean == (0.1, 0.2, 0.3) and config.image_std == (0.4, 0.5, 0.6)
    same_weights, _ = make_vision(towers, 'clip')
    assert vision.Vision(config).encoder.fingerprint == same_weights.encoder.fingerprint


def test_wrong_activation_raises_before_anything_is_downloaded(towers, tmp_path):
    with pytest.raises(ValueError, match='take ViT-B-32-quickgelu/openai'):
        complete_config(tiny_config(vision_encoder='ViT-B-32/openai'))
    # a local copy next to its configuration
    for quick_gelu, wrong, correct in ((True, 'tiny-clip', 'tiny-clip-quickgelu'), (False, 'tiny-clip-quickgelu', 'tiny-clip')):
        folder = tmp_path / wrong
        folder.mkdir()
        path = folder / 'open_clip_model.safetensors'
        shutil.copy(weights_file(towers['clip']), path)
        published = {'model_cfg': {**CLIP, 'quick_gelu': quick_gelu}, 'preprocess_cfg': {'mean': [0.1, 0.2, 0.3]}}
        (folder / 'open_clip_config.json').write_text(json.dumps(published))
        with pytest.raises(ValueError, match=f'take {correct}/'):
            complete_config(tiny_config(vision_encoder=f'{wrong}/{path}'))
        config = complete_config(tiny_config(vision_encoder=f'{correct}/{path}'))
        assert config.image_mean == (0.1, 0.2, 0.3)
        with pytest.raises(ValueError, match=f'take {correct}/'):  # also if a checkpoint's configuration is complete
            vision.Vision(dataclasses.replace(config, vision_encoder=f'{wrong}/{path}'))


def test_weight_file_gets_the_mean_and_std_of_its_models_published_weights(tmp_path, capsys):
    path = tmp_path / 'weights.safetensors'
    path.touch()
    siglip = complete_config(tiny_config(vision_encoder=f'ViT-B-16-SigLIP/{path}'))
    assert siglip.image_mean == siglip.image_std == (0.5, 0.5, 0.5) and siglip.image_size == 224
    clip = complete_config(tiny_config(vision_encoder=f'ViT-B-32/{path}'))
    assert clip.image_mean == open_clip.OPENAI_DATASET_MEAN and clip.image_std == open_clip.OPENAI_DATASET_STD
    assert capsys.readouterr().err == ''
    # of ViT-L-14 there are weights trained with CLIP's and with other values
    complete_config(tiny_config(vision_encoder=f'ViT-L-14/{path}'))
    message = capsys.readouterr().err
    assert message.startswith(f'note: {path} does not say with which mean and std') and message.count('\n') == 1


@pytest.mark.parametrize('name, message', [
    ('ViT-L-15/openai', 'did you mean .*ViT-L-14'),
    ('timm/vit_smal_patch14_dinov2.lvd142m', 'did you mean vit_small_patch14_dinov2'),
    ('ViT-B-32/nothing.safetensors', "'nothing.safetensors' is neither a tag of its weights nor a file"),
    ('clip', 'an encoder of open_clip like')])
def test_misspelled_encoder_raises(name, message):
    config = tiny_config(vision_encoder=name)
    with pytest.raises(ValueError, match=message):
        vision.Vision(complete_config(config))
    with pytest.raises(ValueError, match=message):
        vision.Vision(config)


def test_damaged_weights_raise_in_one_sentence(towers, tmp_path):
    file = weights_file(towers['clip'])
    (tmp_path / 'cut.safetensors').write_bytes(file.read_bytes()[:5000])
    for path in (tmp_path / 'cut.safetensors', weights_file(towers['timm'])):  # cut off, and of another model
        config = complete_config(tiny_config(vision_encoder=f'tiny-clip/{path}'))
        with pytest.raises(ValueError, match='cannot be loaded') as error:
            vision.Vision(config)
        assert '\n' not in str(error.value)


# -----------------------------------------------------------------------------
# frozen, or trained

def one_step(model):
    """Forward and backward with one image."""
    images = batch_of(random_image(), model.config)
    n = num_tokens((images[0][0], images[1][0]), model.config)
    idx = torch.tensor([[5, *[256] * n, 7]])
    targets = torch.roll(idx, -1, 1).masked_fill(idx == 256, -1)
    model(batch_of_ids(idx, targets, images))['lm'].backward()


def test_frozen_encoder_has_no_gradient_no_train_mode_and_is_not_in_a_checkpoint(towers):
    model = make_model(**vars(encoder_config(towers, 'clip')))
    configure_optimizers(model, optimizer_config(vision_lr=0.0))
    model.train()
    assert not any(m.training for m in model.vision.encoder.modules())
    model.vision.encoder.train()
    assert not any(m.training for m in model.vision.encoder.modules())
    one_step(model)
    assert all(p.grad is None for p in model.vision.encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.vision.connector.parameters())
    assert not any(name.startswith('vision.encoder.') for name in checkpoint_state(model))
    assert published_fingerprint(model)


@pytest.mark.parametrize('name, layer', ENCODERS_AND_LAYERS)
def test_every_parameter_of_a_trained_encoder_gets_a_gradient(towers, name, layer):
    """DDP waits for the gradient of every parameter, so those without one have to go."""
    model = make_model(**vars(encoder_config(towers, name, vision_layer=layer)))
    optimizers = configure_optimizers(model, optimizer_config(vision_lr=1e-4))
    model.train()
    one_step(model)
    parameters = dict(model.vision.encoder.named_parameters())
    assert [n for n, p in parameters.items() if p.grad is None or not p.requires_grad] == []
    in_optimizers = {id(p) for opt in optimizers for group in opt.param_groups for p in group['params']}
    assert all(id(p) in in_optimizers for p in parameters.values())
    original, *_ = original_tower(towers[name])
    n_original = len(list(original.parameters()))
    if (name, layer) == ('timm', -1):  # nothing comes after its last layer
        assert len(parameters) == n_original
    else:
        assert 0 < len(parameters) < n_original


def test_trained_encoder_is_saved(towers):
    model = make_model(**vars(encoder_config(towers, 'timm')))
    configure_optimizers(model, optimizer_config(vision_lr=1e-4))
    assert all(m.training for m in model.train().vision.encoder.modules())
    state = checkpoint_state(model)
    assert published_fingerprint(model) == '' and any(name.startswith('vision.encoder.') for name in state)
    with torch.no_grad():
        next(model.vision.encoder.parameters()).add_(1)
    # nothing is read from the tower's file
    checkpoint = {'model': state, 'model_args': vars(model.config), 'config': {}, 'base_model': None, 'vision_fingerprint': ''}
    loaded = build_model(checkpoint, 'x')
    for (name, p), q in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(p, q), name
    # what it holds is published nowhere, so a checkpoint keeps it also if it is frozen from now on
    configure_optimizers(loaded, optimizer_config(vision_lr=0.0))
    assert published_fingerprint(loaded) == '' and checkpoint_state(loaded).keys() == state.keys()
    # also in a model that was opened with the published weights
    other = make_model(**vars(model.config))
    configure_optimizers(other, optimizer_config(vision_lr=0.0))
    assert published_fingerprint(other)
    load_vision_from(other, {name: p for name, p in state.items() if name.startswith('vision.encoder.')}, 'x')
    assert published_fingerprint(other) == '' and checkpoint_state(other).keys() == state.keys()


def test_fingerprint_identifies_published_weights(towers, tmp_path):
    model, config = make_vision(towers, 'clip')
    same, _ = make_vision(towers, 'clip')
    assert len(model.encoder.fingerprint) == 16 and same.encoder.fingerprint == model.encoder.fingerprint
    torch.manual_seed(1)
    other = {k: v.clone() for k, v in open_clip.create_model('tiny-clip').state_dict().items()}
    save_file(other, tmp_path / 'other.safetensors')
    other_config = dataclasses.replace(config, vision_encoder=f'tiny-clip/{tmp_path}/other.safetensors')
    assert vision.Vision(other_config).encoder.fingerprint not in ('', model.encoder.fingerprint)
    assert vision.Vision(config, load=False).encoder.fingerprint == ''
    assert vision.Vision(tiny_config()).encoder.fingerprint == ''  # the small ViT
    assert published_fingerprint(make_model(vision_encoder='')) == ''


def test_text_tower_is_not_kept(towers):
    model, _ = make_vision(towers, 'clip')
    image_tower, *_ = original_tower(towers['clip'])
    assert len(list(model.parameters())) < len(list(open_clip.create_model('tiny-clip').parameters()))
    tensors = [*model.encoder.parameters(), *model.encoder.tower.buffers()]
    assert sum(t.numel() for t in tensors) <= sum(p.numel() for p in image_tower.parameters())


# -----------------------------------------------------------------------------
# in a run

def write_images(folder, n=8):
    (folder / 'images').mkdir(parents=True)
    rows = []
    for i in range(n):
        random_image(i, (40 + i, 30)).save(folder / 'images' / f'{i}.png')
        rows.append({'messages': [{'role': 'user', 'content': '<image>\nWhich?'}, {'role': 'assistant', 'content': f'no {i}'}],
                     'images': [f'images/{i}.png']})
    rows.append({'messages': [{'role': 'user', 'content': 'Hello?'}, {'role': 'assistant', 'content': 'Hello.'}]})
    three = [{'role': 'user', 'content': '<image><image><image> All?'}, {'role': 'assistant', 'content': 'yes'}]
    rows.append({'messages': three, 'images': ['images/1.png', 'images/2.png', 'images/3.png']})
    for split in ('train', 'val'):
        (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def knobs(towers, tmp_path):
    folder = write_images(tmp_path / 'data')
    return [f'--dataset={folder}', f'--vision_encoder={towers["clip"]}', '--connector=mlp', '--vision_lr=0', '--line_height=0',
            '--optimizer=adamw']


def losses(out_dir):
    return [row['loss'] for row in read_log(out_dir) if 'loss' in row]


def test_run_with_a_frozen_encoder_saves_little_and_resumes_and_other_weights_raise(knobs, towers, tmp_path):
    process = train(tmp_path / 'a', *knobs)
    assert process.returncode == 0, process.stderr
    checkpoint = torch.load(tmp_path / 'a' / 'ckpt.pt', weights_only=True)
    assert not any(name.startswith('vision.encoder.') for name in checkpoint['model'])
    assert checkpoint['vision_fingerprint'] and checkpoint['model_args']['image_size'] == 32
    assert {'text_loss', 'blank_loss', 'shuffled_loss'} <= set(read_log(tmp_path / 'a')[-1]['eval'])
    process = train(tmp_path / 'a', *knobs, '--init_from=resume', '--max_iters=6')
    assert process.returncode == 0, process.stderr
    words = [f'--out_dir={tmp_path / "a"}', '--image', tmp_path / 'data' / 'images' / '1.png']
    process = inside('sample.py', *words)
    assert process.returncode == 0, process.stderr
    # the file has moved, and another one has taken its name
    moved = tmp_path / 'moved.safetensors'
    other = tmp_path / 'other.safetensors'
    shutil.copy(weights_file(towers['clip']), moved)
    torch.manual_seed(1)
    save_file({k: v.clone() for k, v in open_clip.create_model('tiny-clip').state_dict().items()}, other)
    assert inside('sample.py', *words, f'--vision_encoder=tiny-clip/{moved}').stdout == process.stdout
    process = inside('sample.py', *words, f'--vision_encoder=tiny-clip/{other}')
    refused(process, 'not the weights that the model was trained with')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('extra', [[], ['--connector=pool', '--pool_size=2']])
def test_cached_features_give_the_same_losses_without_the_encoder(knobs, tmp_path, monkeypatch, extra, dtype):
    knobs = [*knobs, *extra]
    assert train(tmp_path / 'a', *knobs).returncode == 0
    with monkeypatch.context() as patch:
        if dtype == 'bfloat16':  # as if the features were too large for float16
            patch.setattr(torch.Tensor, 'half', lambda x: x.to(torch.float16) * torch.inf)
        process = inside('prepare_data.py', 'features', *knobs[:3], *extra, '--batch_size=3')
    assert process.returncode == 0, process.stderr
    stored = [load_file(file)['features'] for file in (tmp_path / 'data').glob('features-*/*.safetensors')]
    assert len(stored) == 8 and all(features.dtype == getattr(torch, dtype) for features in stored)
    tokens = 4 if extra else 16
    assert f'8 images x {tokens} tokens x 48 x 2 bytes = 0.000 GB' in process.stderr
    n_encoded = []
    forward = vision.PretrainedEncoder.forward

    def counted(self, patches, grid):
        n_encoded.append(int((grid[:, 0, 0] >= 0).sum()))
        return forward(self, patches, grid)

    monkeypatch.setattr(vision.PretrainedEncoder, 'forward', counted)
    process = train(tmp_path / 'b', *knobs, '--eval_interval=100')
    assert process.returncode == 0 and 'using cached features' in process.stderr, process.stderr
    assert sum(n_encoded) == 8  # the blank images of two evaluations, four each, which no cache has
    train(tmp_path / 'c', *knobs, '--feature_cache=False', '--eval_interval=100')
    a = losses(tmp_path / 'a')
    b = losses(tmp_path / 'b')
    assert a == pytest.approx(b, abs=2e-3 if dtype == 'float16' else 1e-2) and a != b  # half precision
    assert a == losses(tmp_path / 'c')


def test_interrupted_feature_cache_is_continued_and_an_outdated_one_is_not_used(knobs, tmp_path):
    words = ['features', *knobs[:3]]
    process = inside('prepare_data.py', *words)
    assert process.returncode == 0, process.stderr
    folder = next((tmp_path / 'data').glob('features-*'))
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    files = sorted(folder.glob('*.safetensors'))
    assert len(files) == 8
    config = complete_config(tiny_config(vision_encoder=knobs[1].partition('=')[2], connector='mlp'))
    fingerprint = vision.Vision(config).encoder.fingerprint
    dataset = str(tmp_path / 'data')
    # stopped while it wrote the sixth image
    (folder / 'finished').unlink()
    for file in files[5:]:
        file.unlink()
    Path(f'{files[5]}.part').write_bytes(whole[files[5]][:100])
    assert dataloader.FeatureCache.find(dataset, config, fingerprint) is None  # it is not complete
    files[0].write_bytes(b'stored before')
    process = inside('prepare_data.py', *words)
    assert process.returncode == 0, process.stderr
    assert files[0].read_bytes() == b'stored before'  # what is complete is not computed again
    files[0].write_bytes(whole[files[0]])
    assert set(folder.iterdir()) == set(whole)
    for file in files:  # a batch of another size may be rounded in another way
        torch.testing.assert_close(load_file(file)['features'], load(whole[file])['features'], atol=2e-3, rtol=2e-3)
    cache = dataloader.FeatureCache.find(dataset, config, fingerprint)
    features, grid = cache[str(tmp_path / 'data' / 'images' / '3.png')]
    assert features.shape == (16, 48) and len(grid) == 16
    with pytest.raises(ValueError, match='not among the features'):
        cache['new.png']
    for changes in ({'vision_layer': -1}, {'image_fit': 'crop'}, {'vision_cls': True}, {'connector': 'pool'}):
        assert dataloader.FeatureCache.find(dataset, dataclasses.replace(config, **changes), fingerprint) is None
    assert dataloader.FeatureCache.find(dataset, config, 'another') is None
    assert dataloader.FeatureCache.find(dataset, config, '') is None


@pytest.mark.parametrize('extra, message', [
    (['--vision_encoder=vit'], 'expected --vision_encoder=NAME/TAG of a frozen encoder'),
    (['--dataset=pydoc'], 'has no image files')])
def test_features_of_what_cannot_be_cached_raise(knobs, extra, message):
    refused(inside('prepare_data.py', 'features', *knobs[:3], *extra), message)


def test_export_contains_its_frozen_encoder(knobs, towers, tmp_path):
    assert train(tmp_path / 'a', *knobs).returncode == 0
    words = ['--image', tmp_path / 'data' / 'images' / '1.png', '--max_new_tokens=9']
    before = inside('sample.py', f'--out_dir={tmp_path}/a', *words)
    process = inside('sample.py', f'--out_dir={tmp_path}/a', f'--export={tmp_path}/export')
    assert process.returncode == 0, process.stderr
    file = weights_file(towers['clip'])
    file.rename(tmp_path / 'away')
    after = inside('sample.py', f'--out_dir={tmp_path}/export', '--checkpoint=glimpse.safetensors', *words)
    (tmp_path / 'away').rename(file)
    assert after.returncode == 0 and after.stdout == before.stdout and before.stdout.strip(), after.stderr


def test_batches_with_no_one_and_three_images_are_the_same_in_two_processes(knobs, towers, tmp_path):
    knobs[1] = f'--vision_encoder={towers["timm"]}'  # a name that processes of their own know, too
    more = ['--gradient_accumulation_steps=2', '--batch_size=2']
    one = train(tmp_path / '1', *knobs, *more, '--num_workers=1', processes=1)
    two = train(tmp_path / '2', *knobs, *more, '--num_workers=1', processes=2)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    a = losses(tmp_path / '1')
    assert a == pytest.approx(losses(tmp_path / '2'), abs=1e-5) and len(a) == 4


def test_two_processes_train_an_encoder(knobs, towers, tmp_path):
    """A tower with attn_pool, and with layers after vision_layer, none of which ever gets a gradient."""
    knobs[1] = f'--vision_encoder={towers["timm-attn-pool"]}'
    more = ['--vision_lr=1e-4', '--gradient_accumulation_steps=2', '--batch_size=2', '--max_iters=3', '--eval_interval=3']
    process = train(tmp_path / 'a', *knobs, *more, processes=2)
    assert process.returncode == 0, process.stderr
    assert len(losses(tmp_path / 'a')) == 3
    checkpoint = torch.load(tmp_path / 'a' / 'ckpt.pt', weights_only=True)
    assert checkpoint['vision_fingerprint'] == ''
    name = 'blocks.0.attn.qkv.weight'
    published = timm.create_model('test_vit3', pretrained=True, num_classes=0, pretrained_cfg_overlay={
        'file': str(weights_file(towers['timm-attn-pool']))}).state_dict()
    assert (checkpoint['model'][f'vision.encoder.tower.{name}'] - published[name]).abs().max() > 1e-5


@pytest.mark.parametrize('recipe', ['vlm_align', 'vlm_sft', 'vlm_sft_lora', 'vlm_smollm2', 'vlm_smollm2_lora', 'vlm_qformer'])
def test_recipes_that_start_from_published_models(knobs, tmp_path, recipe):
    """A recipe with a text model and an encoder of a few thousand weights in place of the published ones."""
    assert train(tmp_path / 'text', '--vision_encoder=', '--tasks=text').returncode == 0
    small = [*knobs[:2], f'--init_from={tmp_path}/text/ckpt.pt', '--tokenizer=bytes', '--batch_size=2', '--block_size=100',
             '--gradient_accumulation_steps=1', '--max_iters=2', '--eval_interval=2', '--eval_iters=1', '--eval_samples=2',
             '--num_workers=0', '--device=cpu', '--compile=False', f'--out_dir={tmp_path}/out']
    if recipe == 'vlm_qformer':  # its first stage comes before it
        captions = tmp_path / 'captions'
        shutil.copytree(tmp_path / 'data' / 'images', captions / 'images')
        pairs = [{'text': f'<image>Image {i}.', 'images': [f'images/{i}.png']} for i in range(4)]
        for split in ('train', 'val'):
            (captions / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
        first = [knobs[1], *small[3:-1], f'--dataset={captions}', '--qformer_n_layer=2', '--qformer_n_head=2',
                 '--qformer_n_embd=32', f'--out_dir={tmp_path}/first']
        process = inside('train.py', ROOT / 'config' / 'qformer_align.py', *first)
        assert process.returncode == 0, process.stderr
        checkpoint = torch.load(tmp_path / 'first' / 'ckpt.pt', weights_only=True)
        assert not any('encoder' in name for name in checkpoint['model'])
        small.append(f'--vision_from={tmp_path}/first/ckpt.pt')
    process = inside('train.py', ROOT / 'config' / f'{recipe}.py', *small)
    assert process.returncode == 0, process.stderr
    evals = [row['eval'] for row in read_log(tmp_path / 'out') if 'eval' in row]
    assert len(evals) == 2 and all('text_loss' in e and 'shuffled_loss' in e for e in evals)
    # there the GPT is frozen, or LoRA acts only after images
    keeps_its_text = recipe in ('vlm_align', 'vlm_smollm2_lora', 'vlm_qformer')
    assert (evals[0]['text_loss'] == evals[1]['text_loss']) == keeps_its_text
    names = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['model']
    has_lora = 'lora' in recipe or recipe == 'vlm_qformer'
    assert any('.lora_' in name for name in names) == has_lora
    assert ('transformer.wte.weight' in names) == (not has_lora)


SMALL_QFORMER = {'connector': 'qformer', 'qformer_n_layer': 2, 'qformer_n_head': 2, 'qformer_n_embd': 32}


@pytest.mark.parametrize('name, changes', [
    ('clip', {}), ('clip', {'vision_cls': True}), ('clip', {'image_fit': 'native'}), ('clip', SMALL_QFORMER),
    ('siglip', {'vision_layer': -1}), ('siglip', {'image_fit': 'native'}),
    ('timm', {'connector': 'pool', 'pool_size': 3}), ('timm', {'image_fit': 'native'}), ('conv', {})])
def test_encoders_run_under_autocast(towers, name, changes):
    check_autocast(*make_vision(towers, name, **{'connector': 'mlp', **changes}))


SMALL_VIT = {'vision_n_layer': 2, 'vision_n_head': 2, 'vision_n_embd': 24, 'patch_height': 4, 'patch_width': 4}


@pytest.mark.parametrize('name, changes', [
    ('vit', {}), ('siglip', {'image_size': 32, 'connector': 'shuffle'}), ('clip', {'image_size': 32}),
    ('eva', {'image_size': 32, 'vision_cls': True, **SMALL_QFORMER}), ('deepencoder_tiny', {'image_size': 64}),
    ('deepencoder_tiny', {'image_size': 64, 'image_newlines': True, 'tile_size': 32, 'max_tiles': 4})])
def test_encoders_without_files_run_under_autocast(name, changes):
    torch.manual_seed(0)
    config = complete_config(tiny_config(**{**SMALL_VIT, 'vision_encoder': name, 'connector': 'mlp', **changes}))
    check_autocast(vision.Vision(config).eval(), config)


def check_autocast(model, config):
    """On a GPU if there is one: which operations autocast makes bfloat16 differs."""
    device = find_device()
    batch = [t.to(device) for t in collate_images([preprocess(random_image(i), config) for i in range(2)], config)]
    model.to(device)
    exact, _ = model(*batch)
    with torch.autocast(device, torch.bfloat16):
        emb, _ = model(*batch)
    emb.float().square().mean().backward()
    assert (emb - exact).norm() < 0.03 * exact.norm()
    assert all(p.grad.isfinite().all() for p in model.connector.parameters())
