"""What must stay true of encoders with other people's weights: they see what they were trained to see, and stay as they are."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import ROOT, inside, make_model, read_log, refused, tiny_config, train
from PIL import Image
from safetensors.torch import save_file

import prepare_data
import vision
from model import GPT

CLIP = {'embed_dim': 32, 'vision_cfg': {'image_size': 32, 'layers': 3, 'width': 48, 'head_width': 16, 'patch_size': 8},
        'text_cfg': {'context_length': 8, 'vocab_size': 100, 'width': 32, 'heads': 2, 'layers': 1}}


@pytest.fixture(scope='session')
def towers(tmp_path_factory):
    """Files with the weights of tiny towers, as open_clip and timm write them. {name: vision_encoder}"""
    folder = tmp_path_factory.mktemp('towers')
    for name, config in (('tiny', CLIP), ('tiny-quickgelu', {**CLIP, 'quick_gelu': True})):
        (folder / f'{name}.json').write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model('tiny')
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / 'clip.safetensors')
    trunk = timm.create_model('test_vit', num_classes=0)
    save_file(trunk.state_dict(), folder / 'vit.safetensors')
    conv = timm.create_model('test_convnext', num_classes=0)
    save_file(conv.state_dict(), folder / 'convnext.safetensors')
    return {'clip': f'tiny/{folder}/clip.safetensors', 'timm': f'timm/test_vit/{folder}/vit.safetensors',
            'conv': f'timm/test_convnext/{folder}/convnext.safetensors'}


def picture(seed=0, size=(50, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def eyes_for(towers, which, **changes):
    config = tiny_config(vision_encoder=towers[which], **changes)
    return vision.Vision(config).eval(), config


@pytest.mark.parametrize('layer', [-1, -2])
def test_features_are_open_clips_own(towers, layer):
    eyes, config = eyes_for(towers, 'clip', vision_layer=layer, image_fit='squash')
    ours = eyes.encoder(*vision.collate([vision.preprocess(picture(), config)], config))
    model = open_clip.create_model('tiny', pretrained=towers['clip'].partition('/')[2]).eval()
    size, mean, std = 32, model.visual.preprocess_cfg['mean'], model.visual.preprocess_cfg['std']
    pixels = torch.from_numpy(np.array(picture().resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    theirs = model.visual.forward_intermediates(pixels[None], indices=[layer], output_fmt='NLC', intermediates_only=True,
                                                normalize_intermediates=layer == -1)['image_intermediates'][0]
    assert ours.shape == (1, 16, 48) and mean != (0.5, 0.5, 0.5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('connector', ['mlp', 'pool'])
def test_features_are_timms_own_also_where_cells_reach_over_the_border(towers, connector):
    eyes, config = eyes_for(towers, 'timm', image_fit='squash', connector=connector, pool_size=3)
    model = timm.create_model('test_vit', num_classes=0, pretrained_cfg_overlay={'file': towers['timm'].split('test_vit/')[1]},
                              pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    side = data['input_size'][-1]
    pixels = torch.from_numpy(np.array(picture().resize((side, side), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(data['mean']).view(3, 1, 1)) / torch.tensor(data['std']).view(3, 1, 1)
    theirs = model.forward_intermediates(pixels[None], indices=[-2], output_fmt='NCHW', intermediates_only=True)[0]
    if connector == 'pool':
        theirs = torch.nn.functional.avg_pool2d(theirs, 3, ceil_mode=True)
    x, grid = vision.collate([vision.preprocess(picture(), config)], config)
    ours, valid = eyes.features(x, grid)
    assert valid.all() and ours.shape[1] == vision.num_tokens((x[0], grid[0]), config)
    torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_a_convolutional_tower_works_too(towers):
    eyes, config = eyes_for(towers, 'conv')
    emb, valid = eyes(*vision.collate([vision.preprocess(picture(), config)], config))
    assert valid.all() and emb.shape[1] == (config.image_size // config.patch_width) ** 2 and emb.std() > 0


def test_the_class_token_is_kept_on_request(towers):
    (with_cls, a), (without, b) = (eyes_for(towers, 'clip', vision_cls=cls) for cls in (True, False))
    one = with_cls.encoder(*vision.collate([vision.preprocess(picture(), a)], a))
    other = without.encoder(*vision.collate([vision.preprocess(picture(), b)], b))
    assert one.shape[1] == 17
    torch.testing.assert_close(one[:, 1:], other)
    with pytest.raises(ValueError, match='vision_cls and connector pool exclude'):
        eyes_for(towers, 'clip', vision_cls=True, connector='pool')
    with pytest.raises(ValueError, match='has no class token'):
        eyes_for(towers, 'conv', vision_cls=True)


@pytest.mark.parametrize('fit, corner, middle', [('pad', 'mean', 'red'), ('squash', 'red', 'red'), ('crop', 'red', 'red')])
def test_fit(towers, fit, corner, middle):
    config = tiny_config(vision_encoder='x/y', image_fit=fit, image_size=32, image_mean=(0.25, 0.5, 0.75))
    image = vision.squared(Image.new('RGB', (64, 32), 'red'), config)
    colours = {'red': (255, 0, 0), 'mean': (64, 128, 191)}
    assert image.size == (32, 32) and image.getpixel((16, 1)) == colours[corner] and image.getpixel((16, 16)) == colours[middle]
    edges = Image.new('RGB', (64, 32), 'red')
    edges.paste('blue', (0, 0, 8, 32))
    assert (vision.squared(edges, config).getpixel((0, 16))[2] > 128) == (fit != 'crop')
    config.image_fit = 'stretch'
    with pytest.raises(ValueError, match='image_fit must be pad, squash or crop'):
        vision.squared(image, config)


def test_the_wrong_activation_is_refused_before_anything_is_downloaded(towers, tmp_path):
    with pytest.raises(ValueError, match='take ViT-B-32-quickgelu/openai'):
        vision.open_tower('ViT-B-32/openai', load=True)
    file = Path(towers['clip'].partition('/')[2])
    for quick_gelu, name in ((True, 'tiny'), (False, 'tiny-quickgelu')):  # a local copy with its configuration beside it
        shutil.copy(file, tmp_path / 'open_clip_model.safetensors')
        published = {'model_cfg': {**CLIP, 'quick_gelu': quick_gelu}, 'preprocess_cfg': {'mean': [0.1, 0.2, 0.3]}}
        (tmp_path / 'open_clip_config.json').write_text(json.dumps(published))
        other = {'tiny': 'tiny-quickgelu', 'tiny-quickgelu': 'tiny'}[name]
        with pytest.raises(ValueError, match=f'take {other}/'):
            vision.open_tower(f'{name}/{tmp_path}/open_clip_model.safetensors', load=True)
        _, (_, mean, _) = vision.open_tower(f'{other}/{tmp_path}/open_clip_model.safetensors', load=True)
        assert mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize('name, message', [
    ('ViT-L-15/openai', 'did you mean .*ViT-L-14'),
    ('timm/vit_smal_patch14_dinov2.lvd142m', 'did you mean vit_small_patch14_dinov2'),
    ('ViT-B-32/nothing.safetensors', "'nothing.safetensors' is neither a tag of its weights nor a file"),
    ('clip', 'a tower of open_clip like')])
def test_a_misspelt_tower_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        vision.Vision(tiny_config(vision_encoder=name))


def test_damaged_weights_are_refused_in_one_sentence(towers, tmp_path):
    file = Path(towers['clip'].partition('/')[2])
    (tmp_path / 'cut.safetensors').write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match='cannot be loaded'):
        vision.Vision(tiny_config(vision_encoder=f'tiny/{tmp_path}/cut.safetensors'))
    with pytest.raises(ValueError, match='cannot be loaded'):  # weights of another model
        vision.Vision(tiny_config(vision_encoder=f'tiny/{towers["timm"].split("test_vit/")[1]}'))


# ---------------------------------------------------------------------------------------------------------------------
# frozen

def test_a_frozen_tower_has_no_gradient_no_training_mode_and_no_place_in_a_checkpoint(towers):
    model = make_model(vision_encoder=towers['clip'])
    model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', vision_lr=0, connector_lr=1e-3)
    model.train()
    assert not any(m.training for m in model.vision.encoder.modules())
    model.vision.encoder.train()
    assert not any(m.training for m in model.vision.encoder.modules())
    images = vision.collate([vision.preprocess(picture(), model.config)], model.config)
    idx = torch.tensor([[5, *[256] * 16, 7]])
    model(idx, torch.roll(idx, -1, 1).masked_fill(idx == 256, -1), images)[1].backward()
    assert all(p.grad is None for p in model.vision.encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.vision.connector.parameters())
    assert not any(k.startswith('vision.encoder.') for k in model.checkpoint_state())
    assert model.config.vision_fingerprint


def test_an_unfrozen_tower_trains_and_is_saved(towers):
    model = make_model(vision_encoder=towers['timm'])
    model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', vision_lr=1e-4)
    assert all(m.training for m in model.train().vision.encoder.modules())
    state = model.checkpoint_state()
    assert not model.config.vision_fingerprint and any(k.startswith('vision.encoder.') for k in state)
    with torch.no_grad():
        next(model.vision.encoder.parameters()).add_(1)
    again = GPT.from_state({'model': state, 'model_args': vars(model.config)}, 'x')  # nothing is read from the tower's file
    for (name, p), q in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(p, q), name


def test_the_text_tower_is_not_kept(towers):
    eyes, _ = eyes_for(towers, 'clip')
    own = sum(p.numel() for p in open_clip.create_model('tiny').visual.parameters())
    assert sum(p.numel() for p in eyes.encoder.parameters()) == own


# ---------------------------------------------------------------------------------------------------------------------
# in a run

def write_pictures(folder, n=8):
    (folder / 'images').mkdir(parents=True)
    rows = []
    for i in range(n):
        picture(i, (40 + i, 30)).save(folder / 'images' / f'{i}.png')
        rows.append({'messages': [{'role': 'user', 'content': '<image>\nWhich?'}, {'role': 'assistant', 'content': f'no {i}'}],
                     'image_path': f'images/{i}.png'})
    rows += [{'messages': [{'role': 'user', 'content': 'Hello?'}, {'role': 'assistant', 'content': 'Hello.'}]},
             {'messages': [{'role': 'user', 'content': '<image><image><image> All?'}, {'role': 'assistant', 'content': 'yes'}],
              'image_paths': ['images/1.png', 'images/2.png', 'images/3.png']}]
    for split in ('train', 'val'):
        (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def knobs(towers, tmp_path):
    folder = write_pictures(tmp_path / 'data')
    return [f'--dataset={folder}', f'--vision_encoder={towers["clip"]}', '--connector=mlp', '--vision_lr=0', '--line_height=0',
            '--optimizer=adamw']


def test_a_run_with_a_frozen_tower_saves_little_resumes_and_refuses_other_weights(knobs, towers, tmp_path):
    process = train(tmp_path / 'a', *knobs)
    assert process.returncode == 0, process.stderr
    checkpoint = torch.load(tmp_path / 'a' / 'ckpt.pt', weights_only=True)
    assert not any(k.startswith('vision.encoder.') for k in checkpoint['model'])
    assert checkpoint['model_args']['vision_fingerprint'] and checkpoint['model_args']['image_size'] == 32
    assert {'text_loss', 'blank_loss', 'shuffled_loss'} <= set(read_log(tmp_path / 'a')[-1]['eval'])
    process = train(tmp_path / 'a', *knobs, '--init_from=resume', '--max_iters=6')
    assert process.returncode == 0, process.stderr
    process = inside('sample.py', f'--out_dir={tmp_path / "a"}', '--image', tmp_path / 'data' / 'images' / '1.png')
    assert process.returncode == 0, process.stderr
    # the file has moved, and another lies in its place
    file = Path(towers['clip'].partition('/')[2])
    moved, wrong = tmp_path / 'moved.safetensors', tmp_path / 'wrong.safetensors'
    shutil.copy(file, moved)
    torch.manual_seed(1)
    save_file({k: v.contiguous() for k, v in open_clip.create_model('tiny').state_dict().items()}, wrong)
    words = [f'--out_dir={tmp_path / "a"}', '--image', tmp_path / 'data' / 'images' / '1.png']
    assert inside('sample.py', *words, f'--vision_encoder=tiny/{moved}').stdout == process.stdout
    refused(inside('sample.py', *words, f'--vision_encoder=tiny/{wrong}'), 'not the weights that the model was trained with')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('extra', [[], ['--connector=pool', '--pool_size=2']])
def test_stored_features_give_the_same_losses_and_the_tower_rests(knobs, tmp_path, monkeypatch, extra, dtype):
    knobs = [*knobs, *extra]
    assert train(tmp_path / 'a', *knobs).returncode == 0
    process = inside('prepare_data.py', 'features', *knobs[:3], *extra, '--batch_size=3', f'--dtype={dtype}')
    assert process.returncode == 0, process.stderr
    tokens = 4 if extra else 16
    assert f'8 images x {tokens} tokens x 48 x 2 bytes = 0.000 GB' in process.stderr
    seen, forward = [], vision.Tower.forward

    def watched(self, patches, grid):
        seen.append(int((grid[:, 0, 0] >= 0).sum()))
        return forward(self, patches, grid)

    monkeypatch.setattr(vision.Tower, 'forward', watched)
    process = train(tmp_path / 'b', *knobs, '--eval_interval=100')
    assert process.returncode == 0 and 'the encoder rests' in process.stderr, process.stderr
    assert sum(seen) == 8  # of two evaluations the blank pictures, which no store has, four each
    train(tmp_path / 'c', *knobs, '--stored_features=False', '--eval_interval=100')
    a, b = ([r['loss'] for r in read_log(tmp_path / x) if 'loss' in r] for x in 'ab')
    assert a == pytest.approx(b, abs=2e-3 if dtype == 'float16' else 1e-2) and a != b  # half precision
    assert a == [r['loss'] for r in read_log(tmp_path / 'c') if 'loss' in r]


def test_an_interrupted_store_goes_on_and_a_stale_one_is_not_used(knobs, tmp_path):
    words = ['features', *knobs[:3]]
    inside('prepare_data.py', *words)
    folder = next((tmp_path / 'data').glob('features-*'))
    whole = (folder / 'features.bin').read_bytes()
    (folder / 'index.json').rename(folder / 'plan.json')
    (folder / 'features.bin').write_bytes(whole[:len(whole) // 2 + 7])
    process = inside('prepare_data.py', *words)
    assert process.returncode == 0 and (folder / 'features.bin').read_bytes() == whole, process.stderr
    (folder / 'features.bin').write_bytes(bytes(len(whole)))
    assert inside('prepare_data.py', *words).returncode == 0 and (folder / 'index.json').exists()
    assert not any((folder / 'features.bin').read_bytes())  # what is finished is not begun again
    (folder / 'features.bin').write_bytes(whole)
    config = tiny_config(vision_encoder=knobs[1].partition('=')[2], connector='mlp')
    vision.Vision(config)
    store = prepare_data.StoredFeatures.find(str(tmp_path / 'data'), config)
    features, grid = store[str(tmp_path / 'data' / 'images' / '3.png')]
    assert features.shape == (16, 48) and len(grid) == 16
    with pytest.raises(ValueError, match='not among the features'):
        store['new.png']
    config.vision_layer = -1
    assert prepare_data.StoredFeatures.find(str(tmp_path / 'data'), config) is None


@pytest.mark.parametrize('extra, message', [(['--vision_encoder=vit'], 'expected --vision_encoder=NAME/TAG of a frozen tower'),
                                            (['--dtype=float32'], 'dtype must be float16 or bfloat16'),
                                            (['--dataset=pydoc'], 'has no image files')])
def test_features_refuses(knobs, extra, message):
    refused(inside('prepare_data.py', 'features', *knobs[:3], *extra), message)


def test_an_export_brings_its_frozen_tower_along(knobs, towers, tmp_path):
    assert train(tmp_path / 'a', *knobs).returncode == 0
    words = ['--image', tmp_path / 'data' / 'images' / '1.png', '--max_new_tokens=9']
    before = inside('sample.py', f'--out_dir={tmp_path}/a', *words)
    process = inside('sample.py', f'--out_dir={tmp_path}/a', f'--export={tmp_path}/export')
    assert process.returncode == 0, process.stderr
    file = Path(towers['clip'].partition('/')[2])
    file.rename(tmp_path / 'away')
    after = inside('sample.py', f'--out_dir={tmp_path}/export', '--checkpoint=glimpse.safetensors', *words)
    (tmp_path / 'away').rename(file)
    assert after.returncode == 0 and after.stdout == before.stdout and before.stdout.strip(), after.stderr


def test_mixed_batches_of_no_one_and_three_images_are_the_same_in_two_processes(knobs, towers, tmp_path):
    knobs[1] = f'--vision_encoder={towers["timm"]}'  # which processes of their own know by name, too
    more = ['--gradient_accumulation_steps=2', '--batch_size=2']
    one = train(tmp_path / '1', *knobs, *more, '--num_workers=1', processes=1)
    two = train(tmp_path / '2', *knobs, *more, '--num_workers=1', processes=2)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    a, b = ([r['loss'] for r in read_log(tmp_path / x) if 'loss' in r] for x in '12')
    assert a == pytest.approx(b, abs=1e-5) and len(a) == 4


@pytest.mark.parametrize('recipe', ['vlm_align', 'vlm_sft', 'vlm_sft_lora', 'vlm_smollm2', 'vlm_smollm2_lora', 'vlm_qformer'])
def test_the_recipes_that_start_from_published_models(knobs, tmp_path, recipe):
    """The path of a recipe, with a text model and a tower of a few thousand weights in the places of the published ones."""
    assert train(tmp_path / 'text', '--vision_encoder=', '--tasks=text').returncode == 0
    small = [*knobs[:2], f'--init_from={tmp_path}/text/ckpt.pt', '--tokenizer=bytes', '--batch_size=2', '--block_size=100',
             '--gradient_accumulation_steps=1', '--max_iters=2', '--eval_interval=2', '--eval_iters=1', '--eval_samples=2',
             '--num_workers=0', '--device=cpu', '--compile=False', f'--out_dir={tmp_path}/out']
    if recipe == 'vlm_qformer':  # its first stage comes before it
        captions = tmp_path / 'captions'
        shutil.copytree(tmp_path / 'data' / 'images', captions / 'images')
        pairs = [{'text': f'<image>Picture {i}.', 'image_path': f'images/{i}.png'} for i in range(4)]
        for part in ('train', 'val'):
            (captions / f'{part}.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
        first = [knobs[1], *small[3:-1], f'--dataset={captions}', '--qformer_n_layer=2', '--qformer_n_head=2',
                 '--qformer_n_embd=32', f'--out_dir={tmp_path}/first']
        process = inside('train.py', ROOT / 'config' / 'qformer_align.py', *first)
        assert process.returncode == 0, process.stderr
        assert not any('encoder' in n for n in torch.load(tmp_path / 'first' / 'ckpt.pt', weights_only=True)['model'])
        small.append(f'--vision_from={tmp_path}/first/ckpt.pt')
    process = inside('train.py', ROOT / 'config' / f'{recipe}.py', *small)
    assert process.returncode == 0, process.stderr
    evals = [r['eval'] for r in read_log(tmp_path / 'out') if 'eval' in r]
    assert len(evals) == 2 and all('text_loss' in e and 'shuffled_loss' in e for e in evals)
    assert (evals[0]['text_loss'] == evals[1]['text_loss']) == (
        recipe in ('vlm_align', 'vlm_smollm2_lora', 'vlm_qformer'))  # there the GPT is frozen, or learns behind images only
    names = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['model']
    has_lora = 'lora' in recipe or recipe == 'vlm_qformer'
    assert any('.lora_' in name for name in names) == has_lora
    assert ('transformer.wte.weight' in names) == (not has_lora)
