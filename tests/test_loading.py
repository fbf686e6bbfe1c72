"""What must stay true when a published model or a checkpoint is loaded: all of it, and nothing that does not fit."""

import json
import pickle

import pytest
import torch
from conftest import batch_of_ids, inside, make_model, optimizer_config, read_log, refused, tiny_config, train
from safetensors.torch import load_file, save_file

from dataloader import get_tokenizer, open_rows
from model import GPT, GPTConfig
from train import configure_optimizers
from weights import build_model, load_model, read_checkpoint, read_weights


def nanogpt(path, vocab_size=103, prefix='_orig_mod.', bias=False, **changes):
    """A checkpoint as nanoGPT's train.py leaves it. Returns the model in it."""
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=48, bias=bias, vocab_size=vocab_size, dropout=0.0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**args)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    state = {prefix + name: p for name, p in model.state_dict().items()}
    torch.save({'model': {**state, **changes}, 'optimizer': {}, 'model_args': args, 'iter_num': 100,
                'best_val_loss': torch.tensor(1.5), 'config': {'dataset': 'shakespeare_char'}}, path)
    return model


def meta(path):
    """nanoGPT's meta.pkl of an alphabet of 103 characters, among them all of the Python reference."""
    text = ''.join(row['text'] for split in ('train', 'val') for row in open_rows('pydoc', split))
    alphabet = sorted(set(text))
    alphabet += [chr(0x4e00 + i) for i in range(103 - len(alphabet))]
    assert len(alphabet) == 103
    ids = {c: i for i, c in enumerate(alphabet)}
    path.write_bytes(pickle.dumps({'vocab_size': 103, 'itos': dict(enumerate(alphabet)), 'stoi': ids}))
    return path


def random_ids():
    return torch.randint(0, 103, (3, 40), generator=torch.Generator().manual_seed(0))


def report_of(model):
    """The lines of a load report, with one space between two columns."""
    return [' '.join(line.split()) for line in model.load_report.splitlines()]


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.', '_orig_mod.module.'])
@pytest.mark.parametrize('bias', [False, True])
def test_logits_of_a_nanogpt_checkpoint_are_bit_identical_also_with_vision(tmp_path, prefix, bias):
    source = nanogpt(tmp_path / 'ckpt.pt', prefix=prefix, bias=bias)
    new = {k: v for k, v in vars(tiny_config()).items() if 'vision' in k or 'patch' in k or k == 'max_image_tokens'}
    model = load_model(tmp_path / 'ckpt.pt', **new, vocab_size=128, image_token=103, block_size=64).eval()
    idx = random_ids()
    assert torch.equal(model.logits(idx)[..., :103], source.logits(idx))
    assert model.transformer.wte.weight is model.lm_head.weight  # or an optimizer would train them twice
    report = report_of(model)
    assert 'grown transformer.wte 1 tensors 0.00M 103 -> 128 rows' in report
    assert any(line.endswith('48 -> 64 rows') for line in report)
    assert any(line.startswith('new vision.encoder') for line in report)
    assert not any(line.startswith('new') and 'vision.' not in line for line in report)


def test_block_size_shrinks_and_grows_by_rows(tmp_path):
    source = nanogpt(tmp_path / 'ckpt.pt').transformer.wpe.weight
    assert torch.equal(load_model(tmp_path / 'ckpt.pt', block_size=20).transformer.wpe.weight, source[:20])
    assert torch.equal(load_model(tmp_path / 'ckpt.pt', block_size=60).transformer.wpe.weight[:48], source)


def test_new_tokens_are_hardly_ever_predicted(tmp_path):
    source = nanogpt(tmp_path / 'ckpt.pt')
    model = load_model(tmp_path / 'ckpt.pt', vocab_size=128).eval()
    best = source.logits(random_ids()).softmax(-1).max()
    new = model.logits(random_ids()).softmax(-1)[..., 103:]
    assert new.max() < best / 2
    again = load_model(tmp_path / 'ckpt.pt', vocab_size=128)
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)  # the same whenever it is loaded


@pytest.mark.parametrize('change, words', [
    ({'_orig_mod.transformer.h.0.mlp.c_fc.weight': torch.zeros(3, 3)}, ['c_fc.weight is (3, 3), not (128, 32)']),
    ({'_orig_mod.transformer.h.0.mlp.extra': torch.zeros(1)}, ['unexpected transformer.h.0.mlp.extra']),
    ({'_orig_mod.lm_head.weight': torch.zeros(103, 32)}, ['lm_head.weight is not tied'])])
def test_tensors_that_do_not_fit_are_listed(tmp_path, change, words):
    nanogpt(tmp_path / 'ckpt.pt', **change)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path / 'ckpt.pt')
    assert all(word in str(error.value) for word in words)


def test_all_missing_tensors_are_listed(tmp_path):
    nanogpt(tmp_path / 'ckpt.pt')
    checkpoint = read_weights(tmp_path / 'ckpt.pt')
    del checkpoint['model']['transformer.ln_f.weight'], checkpoint['model']['transformer.h.1.ln_1.weight']
    with pytest.raises(ValueError, match='missing transformer.h.1.ln_1.weight; missing transformer.ln_f.weight'):
        build_model(checkpoint, 'x')
    with pytest.raises(ValueError, match='a vocabulary does not shrink'):
        load_model(tmp_path / 'ckpt.pt', vocab_size=64)


def test_vision_with_a_missing_tensor_raises(tmp_path):
    """A checkpoint without any vision is of a text-only model, but half of it is a mistake."""
    state = make_model().state_dict()
    del state['vision.connector.net.0.weight']
    torch.save({'model': state, 'model_args': vars(tiny_config())}, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='missing vision.connector.net.0.weight'):
        load_model(tmp_path / 'ckpt.pt')


# -----------------------------------------------------------------------------
# GPT-2 as Hugging Face writes it

SHAPE = dict(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=211)


@pytest.fixture(scope='session')
def gpt2(tmp_path_factory):
    """A folder as on the hub, with random weights, and Hugging Face's own model of it."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(0.01 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp('gpt2')
    model.save_pretrained(folder)
    return folder, model


def copy_of(folder, to, change=lambda tensors: tensors, **config):
    to.mkdir(exist_ok=True)
    save_file(change(load_file(folder / 'model.safetensors')), to / 'model.safetensors')
    (to / 'config.json').write_text(json.dumps({**json.loads((folder / 'config.json').read_text()), **config}))
    return to


def upstream(tensors):
    """As openai-community/gpt2 has it: no prefix, and the causal masks as tensors."""
    tensors = {k.removeprefix('transformer.'): v for k, v in tensors.items()}
    return {**tensors, **{f'h.{i}.attn.bias': torch.ones(1, 1, 64, 64) for i in range(2)}}


VARIANTS = {'as written': lambda t: t, 'upstream': upstream,
            'fine-tuned': lambda t: {**t, **{f'transformer.h.{i}.attn.masked_bias': torch.tensor(-1e4) for i in range(2)}},
            'with a head': lambda t: {**t, 'lm_head.weight': t['transformer.wte.weight'].clone()},
            'compiled': lambda t: {f'_orig_mod.{k}': v for k, v in t.items()},
            'ddp': lambda t: {f'module.{k}': v for k, v in t.items()}}


@pytest.mark.parametrize('variant', VARIANTS)
def test_logits_are_those_of_hugging_face_gpt2(gpt2, tmp_path, variant):
    folder, theirs = gpt2
    ours = GPT.from_pretrained(copy_of(folder, tmp_path / 'x', VARIANTS[variant])).eval()
    idx = torch.randint(0, 211, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert (ours.logits(idx) - expected).abs().max() < 1e-4 and expected.std() > 0.1


def test_damaged_or_unsupported_gpt2_raises(gpt2, tmp_path):
    folder, _ = gpt2
    x = tmp_path / 'x'

    def message():
        with pytest.raises(ValueError) as error:
            GPT.from_pretrained(str(x))
        return str(error.value)

    copy_of(folder, x, lambda t: {k.replace('ln_f', 'final_norm'): v for k, v in t.items()})
    assert 'unexpected transformer.final_norm.weight' in message() and 'missing transformer.ln_f.weight' in message()
    copy_of(folder, x, n_embd=64)
    assert 'transformer.wte.weight is (211, 32), not (211, 64)' in message()
    copy_of(folder, x, n_layer=3)
    assert 'missing transformer.h.2.ln_1.weight' in message()
    copy_of(folder, x, model_type='mamba')
    assert "blip-2, bert, idefics3, smolvlm, llava, got 'mamba'" in message()
    copy_of(folder, x, activation_function='relu')
    assert "activation_function is 'relu'" in message()
    copy_of(folder, x, scale_attn_by_inverse_layer_idx=True)
    assert 'its scale_attn_by_inverse_layer_idx is True, not False' in message()
    copy_of(folder, x)
    data = (x / 'model.safetensors').read_bytes()
    (x / 'model.safetensors').write_bytes(data[:len(data) // 2])
    assert 'may have been cut off' in message()
    (x / 'model.safetensors').unlink()
    assert 'model.safetensors is not there' in message()
    (x / 'config.json').write_text('{"model_type":')
    assert 'may have been cut off' in message()
    copy_of(folder, x)
    (x / 'config.json').write_text('{"model_type": "gpt2", "n_layer": 2}')
    assert "is no complete configuration of a gpt2: it has no 'n_head'" in message()


def test_gpt2_by_name_without_a_network_raises(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(repository, allow_patterns):
        assert repository == 'openai-community/gpt2-medium'
        raise huggingface_hub.errors.LocalEntryNotFoundError('offline')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    process = train(tmp_path, '--init_from=gpt2-medium', '--tokenizer=bytes')
    refused(process, 'gpt2-medium is not in the cache', '--init_from=FOLDER')


# -----------------------------------------------------------------------------
# in a run

@pytest.mark.parametrize('prefix, vocab_size', [('_orig_mod.', 103), ('', 50304)])
def test_nanogpt_checkpoint_trains_on_images_and_its_text_loss_is_reported(tmp_path, prefix, vocab_size):
    tokenizer = meta(tmp_path / 'meta.pkl') if vocab_size == 103 else 'gpt2'
    if tokenizer == 'gpt2':
        try:
            get_tokenizer('gpt2')
        except ValueError:
            pytest.skip("GPT-2's BPE is not in tiktoken's cache")
    nanogpt(tmp_path / 'ckpt.pt', vocab_size, prefix)
    process = train(tmp_path / 'out', f'--init_from={tmp_path}/ckpt.pt', f'--tokenizer={tokenizer}')
    assert process.returncode == 0, process.stderr
    assert 'new vision.connector' in ' '.join(process.stderr.split())
    assert ('103 -> 128 rows' in process.stderr) == (vocab_size == 103)  # 50304 have 47 spare rows
    evals = [r['eval'] for r in read_log(tmp_path / 'out') if 'eval' in r]
    assert all('text_loss' in e for e in evals) and evals[0]['text_loss'] != evals[-1]['text_loss']


def test_checkpoint_of_another_tokenizer_raises(tmp_path):
    start = [f'--init_from={tmp_path}/ckpt.pt', '--tokenizer=bytes']
    nanogpt(tmp_path / 'ckpt.pt', 50304)
    refused(train(tmp_path / 'out', *start), 'not trained with the tokenizer bytes')
    nanogpt(tmp_path / 'ckpt.pt', 103)
    refused(train(tmp_path / 'out', *start), 'not trained with the tokenizer bytes')
    refused(train(tmp_path / 'out', *start[:1]), 'does not say which tokenizer it was trained with: name it')


def test_another_vision_encoder_than_the_checkpoints_raises_and_its_own_shape_is_kept(run_dir, tmp_path):
    process = train(tmp_path, f'--init_from={run_dir}/ckpt.pt', '--vision_encoder=ViT-B-32-quickgelu/openai')
    refused(process, 'already has a vision encoder')
    process = train(tmp_path, f'--init_from={run_dir}/ckpt.pt', '--connector=mlp', '--n_layer=5')
    assert process.returncode == 0, process.stderr
    kept = next(line for line in process.stderr.splitlines() if line.startswith('as in the checkpoint: '))
    assert set(kept.partition(': ')[2].split(', ')) == {'n_layer 2', "connector 'linear'"}


def test_an_image_may_take_other_positions_than_in_the_checkpoint(run_dir, tmp_path):
    losses = {}
    for knob in ('', 'each'):
        process = train(tmp_path / knob, f'--init_from={run_dir}/ckpt.pt', f'--image_positions={knob}', '--max_iters=1')
        assert process.returncode == 0, process.stderr
        assert read_checkpoint(tmp_path / knob / 'ckpt.pt')['model_args']['image_positions'] == knob
        losses[knob] = read_log(tmp_path / knob)[0]['eval']['val_loss']
    assert losses[''] != losses['each']


def test_every_source_becomes_the_same_dict(run_dir, gpt2, tmp_path, monkeypatch):
    """A nanoGPT checkpoint, ours, an export and a folder as on the hub."""
    nanogpt(tmp_path / 'ckpt.pt')
    monkeypatch.setattr('evaluate.best_dtype', lambda device_type: 'bfloat16')  # as on a GPU: an export is exact there, too
    assert inside('sample.py', f'--out_dir={run_dir}', f'--export={tmp_path}/export').returncode == 0
    exported = read_weights(tmp_path / 'export' / 'glimpse.safetensors')
    ours = read_weights(run_dir / 'ckpt.pt')
    for checkpoint in (read_weights(tmp_path / 'ckpt.pt'), ours, exported, read_weights(gpt2[0])):
        assert {'model', 'model_args', 'config', 'base_model', 'vision_fingerprint'} <= checkpoint.keys()
        model = build_model(checkpoint, 'x')
        assert checkpoint['model'].keys() == model.state_dict().keys()
        assert vars(GPTConfig(**checkpoint['model_args'])) == vars(model.config)
    assert exported['config']['tokenizer'] == ours['config']['tokenizer'] == 'bytes'
    assert all(torch.equal(exported['model'][name], p) for name, p in ours['model'].items())


# -----------------------------------------------------------------------------
# LoRA

LORA = ['--lora_rank=4', '--lora_alpha=8', '--optimizer=adamw']


def test_lora_starts_as_the_model_was_and_merging_keeps_its_logits(tmp_path):
    source = nanogpt(tmp_path / 'ckpt.pt')
    model = load_model(tmp_path / 'ckpt.pt', lora_rank=4, lora_alpha=8.0).eval()
    idx = random_ids()
    assert torch.equal(model.logits(idx), source.logits(idx))
    assert model.base_model['init_from'] == tmp_path / 'ckpt.pt'
    assert any(line.startswith('new LoRA') for line in report_of(model))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if '.lora_b' in name:
                p.normal_(std=0.1)
    before = model.logits(idx)
    assert (before - source.logits(idx)).abs().max() > 0.1
    model.merge_lora()
    torch.testing.assert_close(model.logits(idx), before, atol=1e-4, rtol=1e-4)
    assert model.state_dict().keys() == source.state_dict().keys() and model.config.lora_rank == 0


def test_lora_trains_only_its_updates(tmp_path):
    nanogpt(tmp_path / 'ckpt.pt')
    model = load_model(tmp_path / 'ckpt.pt', lora_rank=4)
    optimizers = configure_optimizers(model, optimizer_config(optimizer='muon'))
    trained = {id(p) for opt in optimizers for group in opt.param_groups for p in group['params']}
    assert trained == {id(p) for n, p in model.named_parameters() if '.lora_' in n} and len(optimizers) == 1
    assert len(trained) == 2 * 2 * 4  # two of each of the four Linears of the two blocks
    idx = random_ids()
    model(batch_of_ids(idx, idx))['lm'].backward()
    assert all((p.grad is not None) == (id(p) in trained) for p in model.parameters())


def test_lora_run_saves_little_resumes_exactly_and_needs_the_model_it_adapts(run_dir, tmp_path):
    start = [f'--init_from={run_dir}/ckpt.pt', *LORA]
    process = train(tmp_path / 'a', *start, '--max_iters=6')
    assert process.returncode == 0, process.stderr
    checkpoint = read_checkpoint(tmp_path / 'a' / 'ckpt.pt')
    assert all('.lora_' in name or name.startswith('vision.') for name in checkpoint['model'])
    assert checkpoint['base_model']['init_from'] == f'{run_dir}/ckpt.pt'
    # the rest of the model stays where it was
    model = load_model(tmp_path / 'a' / 'ckpt.pt')
    base = read_weights(run_dir / 'ckpt.pt')['model']
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, base['transformer.h.0.mlp.c_fc.weight'])
    # stopped after 4 of 6 steps, and continued
    assert train(tmp_path / 'c', *start, '--max_iters=4', '--lr_decay_iters=6').returncode == 0
    process = train(tmp_path / 'c', '--init_from=resume', *LORA, '--max_iters=6', '--lr_decay_iters=6')
    assert process.returncode == 0, process.stderr
    assert train(tmp_path / 'd', *start, '--max_iters=6', '--lr_decay_iters=6').returncode == 0
    c = read_checkpoint(tmp_path / 'c' / 'ckpt.pt')['model']
    d = read_checkpoint(tmp_path / 'd' / 'ckpt.pt')['model']
    assert c.keys() == d.keys() and all(torch.equal(c[k], d[k]) for k in c)
    # another rank, and merging
    refused(train(tmp_path / 'e', f'--init_from={tmp_path}/a/ckpt.pt', '--lora_rank=2'), 'LoRA updates of rank 4')
    process = train(tmp_path / 'e', f'--init_from={tmp_path}/a/ckpt.pt', '--max_iters=2')
    assert process.returncode == 0, process.stderr
    assert not any('.lora_' in name for name in read_checkpoint(tmp_path / 'e' / 'ckpt.pt')['model'])
    # the model it adapts has changed
    changed = tmp_path / 'base.pt'
    base_checkpoint = read_checkpoint(run_dir / 'ckpt.pt')
    base_checkpoint['model']['transformer.ln_f.weight'] += 1
    torch.save(base_checkpoint, changed)
    checkpoint['base_model']['init_from'] = str(changed)
    path = tmp_path / 'lora.pt'
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match='what is there now are other weights'):
        load_model(path)
    # or is gone: then it is not the updates that are missing
    changed.unlink()
    with pytest.raises(ValueError, match='lora.pt holds LoRA updates only; the model they adapt .* no checkpoint at .*base.pt'):
        load_model(path)
    refused(train(tmp_path / 'f', *LORA), 'lora_rank adapts a trained model')
