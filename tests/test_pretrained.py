"""Tests of published Llama and Qwen3 models: their logits are Hugging Face's, and so are those of what is exported."""

import json
import os
import shutil

import pytest
import torch
from conftest import LLAMA, ROOT, inside, make_model, optimizer_config, read_log, refused, tiny_config, train
from safetensors.torch import load_file, save_file

import render
import sample
import vision
from dataloader import get_tokenizer, open_rows
from model import GPT, GPTConfig
from patches import num_tokens, preprocess
from train import configure_optimizers
from weights import load_model, read_weights, to_hugging_face

transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')


LLAMA3_ROPE = {'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
               'original_max_position_embeddings': 48}  # of 8192 upstream, where it would change little in 100 tokens
MODELS = {'llama': ('LlamaConfig', {}), 'llama3': ('LlamaConfig', {'rope_parameters': LLAMA3_ROPE}),
          'qwen2': ('Qwen2Config', {}), 'qwen3': ('Qwen3Config', {}),
          'smollm3': ('SmolLM3Config', {'pad_token_id': None, 'no_rope_layer_interval': 2})}


def hugging_face(name, folder, tie_weights=True, n_kv_head=2, shard='1GB', vocab_size=211):
    """A small model of MODELS with random weights, saved as on the hub."""
    config_class, changes = MODELS[name]
    config = getattr(transformers, config_class)(**{**dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=n_kv_head, head_dim=16, max_position_embeddings=128, rope_theta=5e4,
        tie_word_embeddings=tie_weights, rms_norm_eps=1e-6), **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1).add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def to_bfloat16(folder):
    """Stores the weights in bfloat16."""
    path = folder / 'model.safetensors'
    save_file({name: p.bfloat16() for name, p in load_file(path).items()}, path)


def random_ids(*shape, seed=0, top=211):
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# weights

@pytest.mark.parametrize('model_type', MODELS)
@pytest.mark.parametrize('tie_weights', [True, False])
@pytest.mark.parametrize('n_kv_head, shard, n_files', [(1, '1GB', 1), (2, '60KB', 3), (4, '1GB', 1)])
def test_logits_equal_hugging_faces(tmp_path, model_type, tie_weights, n_kv_head, shard, n_files):
    theirs = hugging_face(model_type, tmp_path, tie_weights, n_kv_head, shard)
    assert len(list(tmp_path.glob('*.safetensors'))) >= n_files
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        expected = theirs(random_ids(2, 100)).logits
        assert (ours.logits(random_ids(2, 100)) - expected).abs().max() < 1e-4 and expected.std() > 0.3


@pytest.mark.parametrize('model_type', MODELS)
def test_greedy_continuations_equal_hugging_faces_and_those_without_a_cache(tmp_path, model_type):
    theirs = hugging_face(model_type, tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    prompt = random_ids(1, 9)
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    result = ours.generate(prompt, 20, temperature=0)
    assert torch.equal(result, expected)
    for t in range(9, 29):
        assert ours.logits(result[:, :t])[0, -1].argmax() == result[0, t]


def test_weights_stay_in_the_files_dtype_and_what_is_trained_becomes_float32(tmp_path):
    hugging_face('llama', tmp_path)
    to_bfloat16(tmp_path)
    model = GPT.from_pretrained(str(tmp_path), lora_rank=2, vocab_size=256)
    assert {p.dtype for n, p in model.named_parameters() if '.lora_' not in n} == {torch.bfloat16}
    configure_optimizers(model, optimizer_config())
    assert all((p.dtype == torch.float32) == ('.lora_' in n) for n, p in model.named_parameters())
    full = GPT.from_pretrained(str(tmp_path))
    configure_optimizers(full, optimizer_config())
    assert {p.dtype for p in full.parameters()} == {torch.float32}


def test_merging_lora_into_bfloat16_does_not_round_the_update_away(tmp_path):
    hugging_face('llama', tmp_path)
    to_bfloat16(tmp_path)
    model = GPT.from_pretrained(str(tmp_path), lora_rank=2).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if '.lora_b' in name:
                p.normal_(std=1e-3)  # far less than the rounding of a weight
    linear = model.transformer.h[0].mlp.c_fc
    before, update = linear.weight.float().clone(), linear.lora_scale * linear.lora_b @ linear.lora_a
    model.merge_lora()
    torch.testing.assert_close(linear.weight - before, update, atol=1e-6, rtol=1e-3)


def test_text_logits_do_not_change_when_vision_is_added(tmp_path):
    theirs = hugging_face('qwen3', tmp_path)
    vision_knobs = {name: value for name, value in vars(tiny_config()).items()
                    if 'vision' in name or 'patch' in name or name == 'max_image_tokens'}
    ours = GPT.from_pretrained(str(tmp_path), **vision_knobs, vocab_size=256, image_token=211, block_size=4096).eval()
    idx = random_ids(2, 50)
    logits = ours.logits(idx)[..., :211]
    assert torch.equal(logits, GPT.from_pretrained(str(tmp_path)).logits(idx))
    assert (logits - theirs(idx).logits).abs().max() < 1e-4
    report = ours.load_report
    assert '211 -> 256 rows' in report and 'wpe' not in report and 'new       vision.encoder' in report


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'mamba'}, "blip-2, bert, idefics3, smolvlm, llava, got 'mamba'"),
    ({'model_type': None}, 'got None'),
    ({'hidden_act': 'gelu'}, "its hidden_act is 'gelu', not 'silu'"),
    ({'attention_bias': True}, 'its attention_bias is True'),
    ({'rope_parameters': None, 'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "its rope_type is 'linear', not 'default'"),
    ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 5e5}}, "its rope_type is 'yarn'"),
    ({'rope_parameters': {**LLAMA3_ROPE, 'high_freq_factor': 8.0}}, 'its high_freq_factor is 8.0, not 4.0'),
    ({'model_type': 'smollm3', 'no_rope_layers': [0, 1, 1]}, 'its no_rope_layers is [0, 1, 1], not [1, 1, 1]'),
    ({'model_type': 'qwen2'}, 'missing transformer.h.0.attn.c_attn.bias'),
    ({'intermediate_size': 96}, 'transformer.h.0.mlp.c_fc.weight is (80, 32), not (96, 32)'),
    ({'num_key_value_heads': 4}, 'c_attn.weight is (128, 32), not (192, 32)'),
    ({'num_key_value_heads': 3}, 'n_head (4) must be a multiple of n_kv_head (3)'),
    ({'tie_word_embeddings': False}, 'missing lm_head.weight'),
    ({'model_type': 'qwen3'}, 'missing transformer.h.0.attn.q_norm.weight')])
def test_unsupported_config_raises(tmp_path, change, message):
    hugging_face('llama', tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(str(tmp_path))
    assert message in str(error.value), error.value


def test_incomplete_folders_raise(tmp_path):
    hugging_face('llama', tmp_path, shard='60KB')
    shard = sorted(tmp_path.glob('*.safetensors'))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match='may have been cut off'):
        GPT.from_pretrained(str(tmp_path))
    shard.unlink()
    with pytest.raises(ValueError, match=f'{shard.name} is not there'):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="no complete configuration of a llama: it has no 'num_attention_heads'"):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('change, message', [
    ({'norm': 'batch'}, 'norm must be layernorm or rmsnorm'), ({'mlp': 'moe'}, 'mlp must be gelu or'),
    ({'position': 'alibi'}, 'position must be learned or rope'),
    ({'n_kv_head': 3, 'n_head': 4}, 'must be a multiple of n_kv_head'),
    ({'position': 'rope', 'head_dim': 5}, 'it needs an even head_dim')])
def test_unknown_switches_raise(change, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(n_layer=1, n_embd=32, **{'n_head': 2, **change}))


def test_a_model_in_qwen3s_shape_trains_from_scratch_and_resumes(tmp_path):
    knobs = ['--norm=rmsnorm', '--position=rope', '--mlp=swiglu', '--n_kv_head=1', '--qk_norm=True', '--tie_weights=False']
    assert train(tmp_path / 'whole', *knobs).returncode == 0
    assert train(tmp_path / 'resumed', *knobs, '--max_iters=2', '--lr_decay_iters=4').returncode == 0
    process = train(tmp_path / 'resumed', *knobs, '--lr_decay_iters=4', '--init_from=resume')
    assert process.returncode == 0, process.stderr
    a, b = (read_weights(tmp_path / name / 'ckpt.pt')['model'] for name in ('whole', 'resumed'))
    assert 'transformer.wpe.weight' not in a and 'transformer.h.0.mlp.c_gate.weight' in a
    assert not torch.equal(a['lm_head.weight'], a['transformer.wte.weight'])
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    losses = [[row['loss'] for row in read_log(tmp_path / name) if 'loss' in row] for name in ('whole', 'resumed')]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


# -----------------------------------------------------------------------------
# in a run, and exported

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
          "You are Tiny.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture(scope='session')
def bpe(tmp_path_factory):
    """A folder with a chat template and the tokenizer.json of a byte-level BPE of 1200 tokens."""
    folder = tmp_path_factory.mktemp('bpe') / 'bpe'
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1200, show_progress=False,
                                             special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'])
    tokenizer.train_from_iterator([row['text'] for row in open_rows('pydoc', 'train')], trainer)
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'chat_template.jinja').write_text(CHATML)
    return folder


@pytest.fixture(scope='session')
def smollm(bpe, tmp_path_factory):
    """A folder as on the hub: a tiny Llama in bfloat16 and its tokenizer."""
    folder = tmp_path_factory.mktemp('hub') / 'smollm'
    shutil.copytree(bpe, folder)
    model = hugging_face('llama', folder, vocab_size=1200)
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def lora_run(smollm, tmp_path_factory):
    """The out_dir of a run that added vision and LoRA to that Llama; its tokenizer is the Llama's."""
    out_dir = tmp_path_factory.mktemp('lora')
    process = train(out_dir, f'--init_from={smollm}', '--lora_rank=2', '--optimizer=adamw', '--tasks=ocr:1 text:1')
    assert process.returncode == 0, process.stderr
    assert '1200 -> 1216 rows' in process.stderr
    return out_dir


@pytest.fixture
def line_image(tmp_path):
    """The path of a drawn line of text."""
    path = tmp_path / 'line.png'
    render.draw('some text', 96, 16).save(path)
    return path


def test_models_that_are_not_there_say_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError('offline')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    for knobs in (['--tokenizer=bytes'], []):
        refused(train(tmp_path, '--init_from=Qwen/Qwen3-1.7B', *knobs), 'Qwen/Qwen3-1.7B is not in the cache')


def test_a_run_from_a_published_model_answers_and_resumes(lora_run, tmp_path):
    assert {'text_loss', 'cer', 'blank_loss'} <= set(read_log(lora_run)[-1]['eval'])
    checkpoint = torch.load(lora_run / 'ckpt.pt', weights_only=True)
    assert all('.lora_' in name or name.startswith('vision.') for name in checkpoint['model'])
    assert checkpoint['config']['tokenizer'].endswith('smollm') and checkpoint['chat'] is True
    shutil.copytree(lora_run, tmp_path / 'on')
    process = train(tmp_path / 'on', '--init_from=resume', '--lora_rank=2', '--optimizer=adamw', '--tasks=ocr:1 text:1',
                    '--max_iters=6')
    assert process.returncode == 0 and 'tokenizer was' not in process.stderr, process.stderr


def test_the_system_prompt_of_a_run_is_that_of_its_answers(smollm, tmp_path):
    process = train(tmp_path, f'--init_from={smollm}', '--lora_rank=2', '--optimizer=adamw', '--system_prompt=Be brief.',
                    '--max_iters=1')
    assert process.returncode == 0, process.stderr
    _, enc, *_ = sample.load(f'{tmp_path}/ckpt.pt')
    assert enc.system_prompt == 'Be brief.' != get_tokenizer(str(smollm)).system_prompt


def test_a_published_text_model_answers_as_it_is(smollm):
    process = inside('sample.py', f'--init_from={smollm}', '--prompt=Hello?', '--max_new_tokens=8')
    assert process.returncode == 0 and process.stdout.strip(), process.stderr
    process = inside('sample.py', f'--init_from={smollm}', '--prompt=The file', '--max_new_tokens=8', '--chat=no',
                     '--dtype=bfloat16')
    assert process.returncode == 0 and process.stdout.startswith('The file'), process.stderr
    refused(inside('sample.py', f'--init_from={smollm}', '--dtype=int8'), '--dtype must be float32')


def test_an_export_has_hugging_faces_logits_and_is_a_whole_model(lora_run, tmp_path, line_image):
    knobs = ['--image', line_image, '--max_new_tokens=12']
    before = inside('sample.py', f'--out_dir={lora_run}', *knobs)
    process = inside('sample.py', f'--out_dir={lora_run}', f'--export={tmp_path}/export')
    assert process.returncode == 0, process.stderr
    assert sorted(os.listdir(tmp_path / 'export')) == ['chat_template.jinja', 'config.json', 'glimpse.safetensors',
                                                       'model.safetensors', 'tokenizer.json']
    ours = load_model(lora_run / 'ckpt.pt', lora_rank=0).float().eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'export').eval()
    assert type(theirs).__name__ == 'LlamaForCausalLM' and theirs.config.eos_token_id == [0, 2]
    with torch.no_grad():
        assert torch.equal(theirs(random_ids(2, 40)).logits, ours.logits(random_ids(2, 40)))
    after = inside('sample.py', f'--out_dir={tmp_path}/export', '--checkpoint=glimpse.safetensors', *knobs)
    assert after.returncode == 0 and after.stdout == before.stdout, after.stderr
    process = train(tmp_path / 'on', f'--init_from={tmp_path}/export/glimpse.safetensors')  # it is trained further
    assert process.returncode == 0, process.stderr
    refused(inside('sample.py', f'--out_dir={lora_run}', f'--export={tmp_path}/export'), 'is not empty: name a new folder')
    data = (tmp_path / 'export' / 'glimpse.safetensors').read_bytes()
    (tmp_path / 'export' / 'glimpse.safetensors').write_bytes(data[:500])
    process = inside('sample.py', f'--out_dir={tmp_path}/export', '--checkpoint=glimpse.safetensors')
    refused(process, 'cannot be read as a model')


def test_lora_that_acts_only_after_images_keeps_the_text_model(smollm, tmp_path, line_image):
    process = train(tmp_path / 'a', f'--init_from={smollm}', '--lora_rank=2', '--lora_scope=image', '--optimizer=adamw')
    assert process.returncode == 0, process.stderr
    evals = [row['eval'] for row in read_log(tmp_path / 'a') if 'eval' in row]
    assert len({e['text_loss'] for e in evals}) == 1 and len({e['val_loss'] for e in evals}) == len(evals) > 1
    knobs = ['--image', line_image, '--max_new_tokens=12']
    before = inside('sample.py', f'--out_dir={tmp_path}/a', *knobs)
    process = inside('sample.py', f'--out_dir={tmp_path}/a', f'--export={tmp_path}/export')
    assert before.returncode == process.returncode == 0, process.stderr
    after = inside('sample.py', f'--out_dir={tmp_path}/export', '--checkpoint=glimpse.safetensors', *knobs)
    assert after.stdout == before.stdout, after.stderr
    exported, text = load_file(tmp_path / 'export' / 'model.safetensors'), load_file(smollm / 'model.safetensors')
    assert exported.keys() == text.keys()
    assert all(torch.equal(p[:len(text[name])], text[name].float()) for name, p in exported.items())
    start = f'--init_from={tmp_path}/a/ckpt.pt'
    refused(train(tmp_path / 'b', start), 'act only after an image and cannot be merged: continue with lora_rank=2')
    process = train(tmp_path / 'c', start, '--lora_rank=2', '--optimizer=adamw', '--max_iters=1')
    assert process.returncode == 0 and "lora_scope 'image'" in process.stderr, process.stderr


@pytest.mark.parametrize('config', [
    dict(bias=True), dict(bias=False), dict(bias=True, gelu_approximate='tanh', tie_weights=False, n_inner=40),
    LLAMA, dict(LLAMA, tie_weights=False, head_dim=8, n_inner=40, rope_theta=5e5), dict(LLAMA, qk_norm=True, n_kv_head=2),
    dict(LLAMA, qkv_bias=True), dict(LLAMA, nope_every=2), dict(LLAMA, rope_factor=8.0, rope_original=16)])
def test_an_export_is_loaded_by_hugging_face_and_by_us(tmp_path, config):
    model = make_model(**config)
    settings, tensors = to_hugging_face(model)
    (tmp_path / 'config.json').write_text(json.dumps(settings))
    save_file({name: p.detach() for name, p in tensors.items()}, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = GPT.from_pretrained(str(tmp_path)).eval()
    idx = random_ids(2, 60)
    with torch.no_grad():
        expected = model.logits(idx)
        torch.testing.assert_close(theirs(idx).logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(again.logits(idx), expected, atol=1e-5, rtol=0)


def test_a_model_that_hugging_face_cannot_compute_is_not_exported():
    with pytest.raises(ValueError, match='no class of Hugging Face computes norm rmsnorm, position learned, mlp gelu'):
        to_hugging_face(make_model(norm='rmsnorm'))
    with pytest.raises(ValueError, match='more than one of qk_norm, qkv_bias, nope_every and rope_factor'):
        to_hugging_face(make_model(**LLAMA, qk_norm=True, qkv_bias=True))
    with pytest.raises(ValueError, match='no class of Hugging Face computes norm layernorm'):
        to_hugging_face(make_model(bias=False, qkv_bias=True))


def test_a_vit_that_was_trained_with_another_gpt_is_taken_over(run_dir, smollm, tmp_path):
    knobs = [f'--init_from={smollm}', '--lora_rank=2', '--optimizer=adamw', '--vision_n_layer=3', '--patch_width=4']
    process = train(tmp_path / 'a', *knobs, f'--vision_from={run_dir}/ckpt.pt', '--vision_lr=0', '--max_iters=1')
    assert process.returncode == 0 and 'vision_n_layer 1' in process.stderr, process.stderr
    theirs, ours = (torch.load(folder / 'ckpt.pt', weights_only=True) for folder in (run_dir, tmp_path / 'a'))
    names = [name for name in theirs['model'] if name.startswith('vision.encoder.')]
    assert names and all(torch.equal(theirs['model'][name], ours['model'][name]) for name in names)
    assert ours['model_args']['patch_width'] == theirs['model_args']['patch_width'] == 8
    assert train(tmp_path / 'text', '--vision_encoder=', '--tasks=text').returncode == 0
    for source in (f'{tmp_path}/text/ckpt.pt', smollm):
        refused(train(tmp_path / 'b', *knobs, f'--vision_from={source}'), 'has no small ViT')


# -----------------------------------------------------------------------------
# config/render_pretrain_qwen3.py

RECIPE = ROOT / 'config' / 'render_pretrain_qwen3.py'


def test_render_pretrain_qwen3_has_the_shape_that_it_claims():
    """144 tokens of an image, by the published encoder; its weights are not read."""
    pytest.importorskip('timm')
    knobs = {}
    exec(RECIPE.read_text(), knobs)
    names = ('vision_encoder', 'vision_layer', 'connector', 'pool_size')
    config = vision.complete_config(GPTConfig(**{name: knobs[name] for name in names}))
    assert knobs['vision_encoder'].startswith('timm/vit_pe_core_large_patch14_336')
    assert (config.image_size, config.patch_width) == (336, 14) == (knobs['image_width'], 14)
    image = vision.Image.new('RGB', (knobs['image_width'], knobs['image_height']))
    assert num_tokens(preprocess(image, config), config) == 144
    assert (knobs['learning_rate'], knobs['vision_lr'], knobs['connector_lr']) == (5e-5, 6e-6, 5e-4)


def test_render_pretrain_qwen3_runs_at_a_reduced_size(bpe, tmp_path):
    """The recipe with a Qwen3 and a PE-Core tower of few random weights in place of the published ones."""
    timm = pytest.importorskip('timm')
    shutil.copytree(bpe, tmp_path / 'qwen')
    hugging_face('qwen3', tmp_path / 'qwen', vocab_size=1216)
    encoder = 'vit_pe_core_tiny_patch16_384'
    tower = timm.create_model(encoder, num_classes=0)
    save_file(tower.state_dict(), tmp_path / 'tower.safetensors')
    small = [f'--init_from={tmp_path}/qwen', f'--vision_encoder=timm/{encoder}/{tmp_path}/tower.safetensors', '--dataset=pydoc',
             '--batch_size=2', '--gradient_accumulation_steps=1', '--max_iters=2', '--eval_interval=2', '--eval_iters=1',
             '--eval_samples=2', '--num_workers=0', '--device=cpu', '--compile=False', '--max_span=500',
             f'--out_dir={tmp_path}/out']
    process = inside('train.py', RECIPE, *small)
    assert process.returncode == 0, process.stderr
    evals = [row['eval'] for row in read_log(tmp_path / 'out') if 'eval' in row]
    assert len(evals) == 2 and all({'R', 'R_shuffled', 'text_loss'} <= set(result) for result in evals)
    assert (tmp_path / 'out' / 'samples.png').exists()
