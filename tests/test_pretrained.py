"""What must stay true of models from Hugging Face, Llamas and Qwen3 above all: the same logits, the same tokens, and back."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, ROOT, inside, make_model, read_log, refused, tiny_config, train
from safetensors.torch import load_file, save_file

import prepare_data
import sample
from model import GPT, GPTConfig, load_checkpoint, to_hugging_face
from prepare_data import IMAGE, Tokenizer, decode, drawable_ids, end_tokens, get_tokenizer, open_rows, segments, tokenize

transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')

def hugging_face(kind, folder, tied=True, kv=2, shard='1GB', vocab_size=211):
    """A small Llama or Qwen3 with random weights, saved as on the hub."""
    config = {'llama': transformers.LlamaConfig, 'qwen3': transformers.Qwen3Config}[kind](
        vocab_size=vocab_size, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv, head_dim=16, max_position_embeddings=128, rope_theta=5e4, tie_word_embeddings=tied,
        rms_norm_eps=1e-6)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1).add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def ids(*shape, seed=0, top=211):
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# weights

@pytest.mark.parametrize('kind', ['llama', 'qwen3'])
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('kv, shard, files', [(1, '1GB', 1), (2, '60KB', 3), (4, '1GB', 1)])
def test_logits_are_hugging_faces(tmp_path, kind, tied, kv, shard, files):
    theirs = hugging_face(kind, tmp_path, tied, kv, shard)
    assert len(list(tmp_path.glob('*.safetensors'))) >= files
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        expected = theirs(ids(2, 100)).logits
        assert (ours(ids(2, 100), ids(2, 100))[0] - expected).abs().max() < 1e-4 and expected.std() > 0.3


@pytest.mark.parametrize('kind', ['llama', 'qwen3'])
def test_greedy_continuations_are_hugging_faces_and_those_without_a_cache(tmp_path, kind):
    theirs = hugging_face(kind, tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    prompt = ids(1, 9)
    found = ours.generate(prompt, 20, temperature=0)
    assert torch.equal(found, theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0))
    for t in range(9, 29):
        assert ours(found[:, :t])[0].argmax() == found[0, t]


def test_weights_stay_in_the_files_dtype_and_what_is_trained_becomes_float32(tmp_path):
    hugging_face('llama', tmp_path)
    save_file({k: v.bfloat16() for k, v in load_file(tmp_path / 'model.safetensors').items()}, tmp_path / 'model.safetensors')
    model = GPT.from_pretrained(str(tmp_path), lora_rank=2, vocab_size=256)
    assert {p.dtype for n, p in model.named_parameters() if '.lora_' not in n} == {torch.bfloat16}
    model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    assert all((p.dtype == torch.float32) == ('.lora_' in n) for n, p in model.named_parameters())
    full = GPT.from_pretrained(str(tmp_path))
    full.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    assert {p.dtype for p in full.parameters()} == {torch.float32}


def test_merging_lora_into_bfloat16_does_not_round_the_update_away(tmp_path):
    hugging_face('llama', tmp_path)
    save_file({k: v.bfloat16() for k, v in load_file(tmp_path / 'model.safetensors').items()}, tmp_path / 'model.safetensors')
    model = GPT.from_pretrained(str(tmp_path), lora_rank=2).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if '.lora_b' in name:
                p.normal_(std=1e-3)  # far less than the rounding of a weight
    linear = model.transformer.h[0].mlp.c_fc
    before, update = linear.weight.float().clone(), linear.lora_scale * linear.lora_b @ linear.lora_a
    model.merge_lora()
    torch.testing.assert_close(linear.weight - before, update, atol=1e-6, rtol=1e-3)


def test_a_loaded_llama_gains_eyes_and_says_about_text_what_it_said(tmp_path):
    theirs = hugging_face('qwen3', tmp_path)
    eyes = {k: v for k, v in vars(tiny_config()).items() if 'vision' in k or 'patch' in k or k == 'max_image_tokens'}
    ours = GPT.from_pretrained(str(tmp_path), **eyes, vocab_size=256, image_token=211, block_size=4096).eval()
    found = ours(ids(2, 50), ids(2, 50))[0][..., :211]
    assert torch.equal(found, GPT.from_pretrained(str(tmp_path))(ids(2, 50), ids(2, 50))[0])
    assert (found - theirs(ids(2, 50)).logits).abs().max() < 1e-4
    assert '211 -> 256 rows' in ours.changes and 'wpe' not in ours.changes and 'new      vision.encoder' in ours.changes


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'mamba'}, "this GPT computes gpt2, llama, qwen3, not 'mamba'"),
    ({'model_type': None}, 'not None'),
    ({'hidden_act': 'gelu'}, "its hidden_act is 'gelu', not 'silu'"),
    ({'attention_bias': True}, 'its attention_bias is True'),
    ({'rope_parameters': None, 'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "its type is 'linear', not 'default'"),
    ({'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5}}, "its rope_type is 'llama3'"),
    ({'intermediate_size': 96}, 'transformer.h.0.mlp.c_fc.weight is (80, 32), not (96, 32)'),
    ({'num_key_value_heads': 4}, 'c_attn.weight is (128, 32), not (192, 32)'),
    ({'num_key_value_heads': 3}, 'n_head (4) must be a multiple of n_kv_head (3)'),
    ({'tie_word_embeddings': False}, 'missing lm_head.weight'),
    ({'model_type': 'qwen3'}, 'missing transformer.h.0.attn.q_norm.weight')])
def test_what_it_would_compute_wrongly_is_refused_by_name(tmp_path, change, message):
    hugging_face('llama', tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(str(tmp_path))
    assert message in str(error.value), error.value


def test_incomplete_folders_are_refused(tmp_path):
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


def test_switches_that_do_not_exist_are_refused():
    for change, message in (({'norm': 'batch'}, 'norm must be layernorm or rmsnorm'), ({'mlp': 'moe'}, 'mlp must be gelu or'),
                            ({'position': 'alibi'}, 'position must be learned or rope'),
                            ({'n_kv_head': 3, 'n_head': 4}, 'must be a multiple of n_kv_head'),
                            ({'position': 'rope', 'head_dim': 5}, 'it takes an even head_dim')):
        with pytest.raises(ValueError, match=message):
            GPT(GPTConfig(n_layer=1, n_embd=32, **{'n_head': 2, **change}))


def test_a_model_of_modern_parts_trains_from_scratch_and_resumes(tmp_path):
    knobs = ['--norm=rmsnorm', '--position=rope', '--mlp=swiglu', '--n_kv_head=1', '--qk_norm=True', '--tied=False']
    assert train(tmp_path / 'whole', *knobs).returncode == 0
    assert train(tmp_path / 'parts', *knobs, '--max_iters=2', '--lr_decay_iters=4').returncode == 0
    process = train(tmp_path / 'parts', *knobs, '--init_from=resume')
    assert process.returncode == 0, process.stderr
    a, b = (load_checkpoint(tmp_path / x / 'ckpt.pt')['model'] for x in ('whole', 'parts'))
    assert 'transformer.wpe.weight' not in a and 'transformer.h.0.mlp.c_gate.weight' in a
    assert not torch.equal(a['lm_head.weight'], a['transformer.wte.weight'])
    assert [r['loss'] for r in read_log(tmp_path / 'parts') if 'loss' in r]


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
          "You are Tiny.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
SPLITS = {'gpt2': BYTE_LEVEL,
          'smollm2': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, BYTE_LEVEL]},
          'qwen3': {'type': 'Sequence', 'pretokenizers': [
              {'type': 'Split', 'pattern': {'Regex': QWEN}, 'behavior': 'Isolated', 'invert': False},
              {**BYTE_LEVEL, 'use_regex': False}]}}


@pytest.fixture(scope='session')
def bpe(tmp_path_factory):
    """A folder for each way of splitting, with the tokenizer.json of a BPE learnt from the manual: some bytes have no token."""
    folder = tmp_path_factory.mktemp('bpe')
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1200, show_progress=False,
                                             special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'])
    tokenizer.train_from_iterator([row['text'] + ' é ü 12 ½ 日本\r\n\t' for row in open_rows('pydoc', 'train')], trainer)
    trained = json.loads(tokenizer.to_str())
    for name, split in SPLITS.items():
        (folder / name).mkdir()
        file = {**trained, 'pre_tokenizer': split, 'normalizer': {'type': 'NFC'} if name == 'qwen3' else None}
        (folder / name / 'tokenizer.json').write_text(json.dumps(file))
        (folder / name / 'chat_template.jinja').write_text(CHATML)
    return folder


def changed(bpe, to, change):
    """A copy of smollm2's tokenizer.json after change(its contents)."""
    file = json.loads((bpe / 'smollm2' / 'tokenizer.json').read_text())
    change(file)
    to.mkdir(exist_ok=True)
    (to / 'tokenizer.json').write_text(json.dumps(file))
    return to


@pytest.mark.parametrize('name', SPLITS)
def test_token_ids_are_hugging_faces(bpe, name):
    ours, theirs = get_tokenizer(str(bpe / name)), tokenizers.Tokenizer.from_file(str(bpe / name / 'tokenizer.json'))
    assert ours.lost and (ours.nfc == (name == 'qwen3'))
    text = '\n\n'.join(row['text'] for row in open_rows('pydoc', 'val')) + (ROOT / 'render.py').read_text()
    assert ours.encode_ordinary(text) == theirs.encode(text).ids and len(text) > 40_000
    rng = random.Random(0)
    parts = [' ', '  ', '\n', '\r\n', '\t', '\u00a0', '\u3000', '1', '234', '½', '٣', 'a', 'the', 'ß', 'e\u0301', '日本',
             "'s", "'LL", '!=', '((', '...', '\x04', '\x14', '\x7f', '🙂', '\U000e0041', 'def f(x):\n    return', ' tail ']
    for _ in range(3000):
        text = ''.join(rng.choice(parts) for _ in range(rng.randint(1, 12)))
        assert ours.encode_ordinary(text) == theirs.encode(text).ids, repr(text)


def test_special_tokens_in_data_stay_text_and_image_is_appended(bpe):
    tokenizer = get_tokenizer(str(bpe / 'smollm2'))
    assert tokenizer.encode_single_token('<|im_end|>') == 2 and tokenizer.encode_single_token(IMAGE) == 1200
    found = prepare_data.encode(tokenizer, 'a <|im_end|><image> b')
    assert not set(found) & set(tokenizer._special_tokens.values()) and tokenizer.decode(found) == 'a <|im_end|><image> b'
    assert end_tokens(tokenizer) == [0, 2] and decode(tokenizer, [*found, 2, 5]) == 'a <|im_end|><image> b'
    allowed = drawable_ids(tokenizer, 1280)
    assert not allowed[1200:].any() and allowed[:1200].all()


def test_a_tokenizer_survives_the_way_to_a_worker(bpe):
    import pickle
    for name in SPLITS:
        tokenizer = get_tokenizer(str(bpe / name))
        copy = pickle.loads(pickle.dumps(tokenizer))
        text = 'The e\u0301 \x04 file'
        assert copy.encode_ordinary(text) == tokenizer.encode_ordinary(text) and isinstance(copy, Tokenizer)
        assert (copy.system, copy.nfc, copy.lost) == (tokenizer.system, tokenizer.nfc, tokenizer.lost)


@pytest.mark.parametrize('messages', [
    [('user', 'Hello?')], [('system', 'Be brief.'), ('user', 'Hello?')],
    [('user', 'Hello?'), ('assistant', 'Yes, 12.'), ('user', 'The file\nis here')]])
def test_a_conversation_is_spelt_as_its_own_template_does(bpe, messages):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bpe / 'smollm2' / 'tokenizer.json'), chat_template=CHATML)
    messages = [{'role': role, 'content': content} for role, content in messages]
    tokenizer = get_tokenizer(str(bpe / 'smollm2'))
    ours = tokenize({'messages': messages}, tokenizer, tiny_config(block_size=200), prompt_only=True)['idx']
    assert ours == fast.apply_chat_template(messages, add_generation_prompt=True)['input_ids']


def test_in_chatml_the_answer_and_its_end_are_learnt_and_nothing_else(bpe):
    tokenizer = get_tokenizer(str(bpe / 'smollm2'))
    messages = [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'So.'}] * 2
    t = tokenize({'messages': messages}, tokenizer, tiny_config(block_size=200))
    assert tokenizer.decode([i for i in t['targets'] if i >= 0]) == 'So.<|im_end|>So.<|im_end|>'
    text = ''.join(piece for piece, *_ in segments({'messages': messages}, tokenizer, 'assistant'))
    turn = '<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n'
    assert text == '<|im_start|>system\nYou are Tiny.<|im_end|>\n' + turn * 2
    bare = get_tokenizer(str(bpe / 'smollm2'), system_prompt='')
    assert ''.join(piece for piece, *_ in segments({'messages': messages}, bare, 'all')) == turn * 2


def test_a_template_that_is_not_chatml_is_refused(bpe, tmp_path):
    changed(bpe, tmp_path / 'x', lambda file: None)
    (tmp_path / 'x' / 'tokenizer_config.json').write_text(json.dumps(
        {'chat_template': '{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}{% endfor %}'}))
    with pytest.raises(ValueError, match='its chat template is not the one of ChatML'):
        get_tokenizer(str(tmp_path / 'x'))
    (tmp_path / 'x' / 'chat_template.jinja').write_text('{{ raise_exception("no") }}')
    with pytest.raises(ValueError, match='its chat template cannot be rendered'):
        get_tokenizer(str(tmp_path / 'x'))


REFUSED = {
    'its type is \'WordPiece\'': lambda file: file['model'].update(type='WordPiece'),
    'its byte_fallback is True': lambda file: file['model'].update(byte_fallback=True),
    'its type is \'Lowercase\', not \'NFC\'': lambda file: file.update(normalizer={'type': 'Lowercase'}),
    'its add_prefix_space is True': lambda file: file.update(pre_tokenizer={**BYTE_LEVEL, 'add_prefix_space': True}),
    'its way of splitting text, [\'Whitespace\']': lambda file: file.update(pre_tokenizer={'type': 'Whitespace'}),
    'its individual_digits is False': lambda file: file['pre_tokenizer']['pretokenizers'][0].update(individual_digits=False),
    'its post_processor adds tokens': lambda file: file.update(
        post_processor={'type': 'TemplateProcessing', 'special_tokens': {'<s>': {}}}),
    'its use_regex is True, not False': lambda file: file['pre_tokenizer']['pretokenizers'].__setitem__(
        0, {'type': 'Split', 'pattern': {'Regex': QWEN}, 'behavior': 'Isolated', 'invert': False}),
    "its way of splitting text, ['Split', 'ByteLevel']": lambda file: file['pre_tokenizer']['pretokenizers'].__setitem__(
        0, {'type': 'Split', 'pattern': {'Regex': r'\w+'}, 'behavior': 'Isolated', 'invert': False}),
    'its behavior is': lambda file: file['pre_tokenizer'].update(pretokenizers=[
        {'type': 'Split', 'pattern': {'Regex': QWEN}, 'behavior': 'Removed', 'invert': False},
        {**BYTE_LEVEL, 'use_regex': False}]),
    'its merges are not in the order': lambda file: file['model']['merges'].reverse(),
    'or do not make all of them': lambda file: file['model']['merges'].pop(),
    'its tokens are not those of a byte-level BPE': lambda file: file['model']['vocab'].update({'日': 1200}),
    'is no byte-level BPE that can be read': lambda file: file.pop('model')}


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_converted_exactly_is_refused(bpe, tmp_path, message):
    with pytest.raises(ValueError) as error:
        get_tokenizer(str(changed(bpe, tmp_path / 'x', REFUSED[message])))
    assert message in str(error.value), error.value


def test_no_tokenizer_and_no_hub_say_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError('offline')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(ValueError, match='there is no .*tokenizer.json: name another'):
        get_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match='Qwen/Qwen3-0.6B: it is not in the cache'):
        get_tokenizer('Qwen/Qwen3-0.6B')
    refused(train(tmp_path, '--init_from=Qwen/Qwen3-1.7B', '--tokenizer=bytes'), 'Qwen/Qwen3-1.7B is not in the cache')
    refused(train(tmp_path, '--init_from=Qwen/Qwen3-1.7B'), 'Qwen/Qwen3-1.7B: it is not in the cache')


# ---------------------------------------------------------------------------------------------------------------------
# in a run, and out again

@pytest.fixture(scope='session')
def smollm(bpe, tmp_path_factory):
    """A folder as on the hub: a tiny Llama in bfloat16 and its tokenizer."""
    folder = tmp_path_factory.mktemp('hub') / 'smollm'
    shutil.copytree(bpe / 'smollm2', folder)
    model = hugging_face('llama', folder, vocab_size=1200)
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def reader(smollm, tmp_path_factory):
    """The out_dir of a run that gave that Llama eyes and LoRA; its tokenizer comes along with it."""
    out_dir = tmp_path_factory.mktemp('reader')
    process = train(out_dir, f'--init_from={smollm}', '--lora_rank=2', '--optimizer=adamw', '--tasks=read:1 text:1')
    assert process.returncode == 0, process.stderr
    assert '1200 -> 1216 rows' in process.stderr
    return out_dir


def test_a_run_from_the_hub_reads_answers_and_resumes(reader, tmp_path):
    assert {'text_loss', 'cer', 'blank_loss'} <= set(read_log(reader)[-1]['eval'])
    checkpoint = load_checkpoint(reader / 'ckpt.pt')
    assert all('.lora_' in name or name.startswith('vision.') for name in checkpoint['model'])
    assert checkpoint['config']['tokenizer'].endswith('smollm') and checkpoint['chat'] is True
    shutil.copytree(reader, tmp_path / 'on')
    process = train(tmp_path / 'on', '--init_from=resume', '--lora_rank=2', '--optimizer=adamw', '--tasks=read:1 text:1',
                    '--max_iters=6')
    assert process.returncode == 0 and 'tokenizer was' not in process.stderr, process.stderr


def test_the_system_prompt_of_a_run_is_that_of_its_answers(smollm, tmp_path, monkeypatch):
    process = train(tmp_path, f'--init_from={smollm}', '--lora_rank=2', '--optimizer=adamw', '--system_prompt=Be brief.',
                    '--max_iters=1')
    assert process.returncode == 0, process.stderr
    monkeypatch.setattr(sample, 'out_dir', str(tmp_path))
    _, tokenizer, *_ = sample.load()
    assert tokenizer.system == 'Be brief.' != get_tokenizer(str(smollm)).system


def test_a_text_model_of_the_hub_answers_as_it_is(smollm):
    process = inside('sample.py', f'--init_from={smollm}', '--prompt=Hello?', '--max_new_tokens=8')
    assert process.returncode == 0 and process.stdout.strip(), process.stderr
    process = inside('sample.py', f'--init_from={smollm}', '--prompt=The file', '--max_new_tokens=8', '--chat=no',
                     '--dtype=bfloat16')
    assert process.returncode == 0 and process.stdout.startswith('The file'), process.stderr
    refused(inside('sample.py', f'--init_from={smollm}', '--dtype=int8'), '--dtype must be float32')


def test_an_export_is_loaded_by_hugging_face_with_equal_logits_and_is_a_whole_model(reader, tmp_path):
    picture = tmp_path / 'line.png'
    prepare_data.render.draw('some text', 96, 16).save(picture)
    knobs = ['--image', picture, '--max_new_tokens=12']
    before = inside('sample.py', f'--out_dir={reader}', *knobs)
    process = inside('sample.py', f'--out_dir={reader}', f'--export={tmp_path}/export')
    assert process.returncode == 0, process.stderr
    assert sorted(os.listdir(tmp_path / 'export')) == ['chat_template.jinja', 'config.json', 'glimpse.safetensors',
                                                       'model.safetensors', 'tokenizer.json']
    ours = GPT.from_checkpoint(reader / 'ckpt.pt', lora_rank=0).float().eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'export').eval()
    assert type(theirs).__name__ == 'LlamaForCausalLM' and theirs.config.eos_token_id == [0, 2]
    with torch.no_grad():
        assert torch.equal(theirs(ids(2, 40)).logits, ours(ids(2, 40), ids(2, 40))[0])
    after = inside('sample.py', f'--out_dir={tmp_path}/export', '--checkpoint=glimpse.safetensors', *knobs)
    assert after.returncode == 0 and after.stdout == before.stdout, after.stderr
    process = train(tmp_path / 'on', f'--init_from={tmp_path}/export/glimpse.safetensors')  # and is trained further
    assert process.returncode == 0, process.stderr
    refused(inside('sample.py', f'--out_dir={reader}', f'--export={tmp_path}/export'), 'is not empty: name a new folder')
    data = (tmp_path / 'export' / 'glimpse.safetensors').read_bytes()
    (tmp_path / 'export' / 'glimpse.safetensors').write_bytes(data[:500])
    process = inside('sample.py', f'--out_dir={tmp_path}/export', '--checkpoint=glimpse.safetensors')
    refused(process, 'cannot be read as a model')


def test_a_run_whose_updates_act_behind_images_forgets_nothing_of_the_language(smollm, tmp_path):
    process = train(tmp_path / 'a', f'--init_from={smollm}', '--lora_rank=2', '--lora_scope=image', '--optimizer=adamw')
    assert process.returncode == 0, process.stderr
    evals = [r['eval'] for r in read_log(tmp_path / 'a') if 'eval' in r]
    assert len({e['text_loss'] for e in evals}) == 1 and len({e['val_loss'] for e in evals}) == len(evals) > 1
    picture = tmp_path / 'line.png'
    prepare_data.render.draw('some text', 96, 16).save(picture)
    knobs = ['--image', picture, '--max_new_tokens=12']
    before = inside('sample.py', f'--out_dir={tmp_path}/a', *knobs)
    process = inside('sample.py', f'--out_dir={tmp_path}/a', f'--export={tmp_path}/export')
    assert before.returncode == process.returncode == 0, process.stderr
    after = inside('sample.py', f'--out_dir={tmp_path}/export', '--checkpoint=glimpse.safetensors', *knobs)
    assert after.stdout == before.stdout, after.stderr
    theirs, text = load_file(tmp_path / 'export' / 'model.safetensors'), load_file(smollm / 'model.safetensors')
    assert theirs.keys() == text.keys()
    assert all(torch.equal(p[:len(text[name])], text[name].float()) for name, p in theirs.items())
    state = f'--init_from={tmp_path}/a/ckpt.pt'
    refused(train(tmp_path / 'b', state), 'act behind images only, and cannot be merged: go on with lora_rank=2')
    process = train(tmp_path / 'c', state, '--lora_rank=2', '--optimizer=adamw', '--max_iters=1')
    assert process.returncode == 0 and "lora_scope 'image'" in process.stderr, process.stderr


@pytest.mark.parametrize('config', [
    dict(bias=True), dict(bias=False), dict(bias=True, gelu_approximate='tanh', tied=False, n_inner=40),
    LLAMA, dict(LLAMA, tied=False, head_dim=8, n_inner=40, rope_theta=5e5), dict(LLAMA, qk_norm=True, n_kv_head=2)])
def test_what_is_exported_is_loaded_by_hugging_face_and_by_us(tmp_path, config):
    model = make_model(**config)
    settings, tensors = to_hugging_face(model)
    (tmp_path / 'config.json').write_text(json.dumps(settings))
    save_file({name: p.detach() for name, p in tensors.items()}, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = GPT.from_pretrained(str(tmp_path)).eval()
    x = ids(2, 60)
    with torch.no_grad():
        expected = model(x, x)[0]
        torch.testing.assert_close(theirs(x).logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(again(x, x)[0], expected, atol=1e-5, rtol=0)


def test_what_no_class_of_hugging_face_computes_is_not_exported():
    with pytest.raises(ValueError, match='no class of Hugging Face computes norm rmsnorm, position learned, mlp gelu'):
        to_hugging_face(make_model(norm='rmsnorm'))


def test_eyes_that_were_trained_under_another_gpt_are_taken_over(run_dir, smollm, tmp_path):
    knobs = [f'--init_from={smollm}', '--lora_rank=2', '--optimizer=adamw', '--vision_n_layer=3', '--patch_width=4']
    process = train(tmp_path / 'a', *knobs, f'--vision_from={run_dir}/ckpt.pt', '--vision_lr=0', '--max_iters=1')
    assert process.returncode == 0 and 'vision_n_layer 1' in process.stderr, process.stderr
    theirs, ours = (load_checkpoint(x / 'ckpt.pt') for x in (run_dir, tmp_path / 'a'))
    names = [n for n in theirs['model'] if n.startswith('vision.encoder.')]
    assert names and all(torch.equal(theirs['model'][n], ours['model'][n]) for n in names)
    assert ours['model_args']['patch_width'] == theirs['model_args']['patch_width'] == 8
    assert train(tmp_path / 'text', '--vision_encoder=', '--tasks=text').returncode == 0
    refused(train(tmp_path / 'b', *knobs, f'--vision_from={tmp_path}/text/ckpt.pt'), 'has no small ViT')


def test_render_pretrain_takes_a_qwen_by_one_key(bpe, tmp_path):
    shutil.copytree(bpe / 'qwen3', tmp_path / 'qwen')
    hugging_face('qwen3', tmp_path / 'qwen', vocab_size=1216)
    small = ['--dataset=pydoc', '--batch_size=2', '--gradient_accumulation_steps=1', '--max_iters=2', '--eval_interval=2',
             '--eval_iters=1', '--eval_samples=2', '--num_workers=0', '--device=cpu', '--compile=False', '--vision_n_layer=1',
             '--vision_n_head=2', '--vision_n_embd=32', '--max_span=500', f'--out_dir={tmp_path}/out']
    process = inside('train.py', Path('config') / 'render_pretrain.py', f'--init_from={tmp_path}/qwen', *small)
    assert process.returncode == 0, process.stderr
    assert {'R', 'R_shuffled', 'text_loss'} <= set(read_log(tmp_path / 'out')[-1]['eval'])
