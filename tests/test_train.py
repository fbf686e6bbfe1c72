"""Tests of a run: it resumes exactly, any number of processes compute the same, and nothing good is lost."""

import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, inside, launch, make_model, read_log, refused, train
from PIL import Image

import model as model_module
import train as train_script
from configurator import configure
from dataloader import get_tokenizer, open_rows
from model import GPT, GPTConfig


def weights(out_dir):
    return torch.load(os.path.join(out_dir, 'ckpt.pt'), weights_only=True)['model']


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write_rows(folder, rows):
    for split in ('train', 'val'):
        (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return f'--dataset={folder}'


def turn(question, answer, *images):
    messages = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
    return {'messages': messages, 'images': list(images)}


def run_config(*words):
    """The knobs of train.py as its main() gets them."""
    return SimpleNamespace(**configure(dict(vars(train_script)), GPTConfig, [*TINY, *words]))


def fresh_train():
    """train.py as a module of its own: main() writes the knobs into its globals."""
    spec = importlib.util.spec_from_file_location('fresh_train', ROOT / 'train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_main(monkeypatch):
    """run_main(module, out_dir, *words) calls main() of fresh_train(), which a test may have changed before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(module, out_dir, *words):
        monkeypatch.setattr(sys, 'argv', ['train.py', *TINY, f'--out_dir={out_dir}', *words])
        module.main()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


# -----------------------------------------------------------------------------
# what a run leaves

def test_log_checkpoint_and_samples(run_dir):
    log = read_log(run_dir)
    steps, evals = [r for r in log if 'loss' in r], [r for r in log if 'eval' in r]
    assert [r['iter'] for r in steps] == [1, 2, 3, 4] and all(set(r) == {'iter', 'loss', 'lr'} for r in steps)
    assert [r['iter'] for r in evals] == [0, 2, 4]
    for r in evals:
        assert set(r['eval']) == {'val_loss', 'blank_loss', 'shuffled_loss', 'cosine', 'text_loss', 'cer', 'exact', 'n'}
    assert evals[-1]['eval']['val_loss'] < evals[0]['eval']['val_loss']
    checkpoint = torch.load(run_dir / 'ckpt.pt', weights_only=True)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(checkpoint)
    assert checkpoint['iter_num'] == 4 and checkpoint['config']['n_embd'] == 32
    assert (run_dir / 'ckpt_best.pt').exists()
    assert Image.open(run_dir / 'samples.png').width > 400


def test_a_worse_val_loss_never_replaces_the_best_checkpoint(tmp_path):
    assert train(tmp_path, '--eval_samples=0').returncode == 0
    # two more steps, far too large ones
    process = train(tmp_path, '--init_from=resume', '--max_iters=6', '--eval_interval=1', '--eval_samples=0',
                    '--learning_rate=10', '--decay_lr=False')
    assert process.returncode == 0, process.stderr
    losses = {r['iter']: r['eval']['val_loss'] for r in read_log(tmp_path) if 'eval' in r}
    assert losses[4] < losses[5] and losses[4] < losses[6]
    best = torch.load(tmp_path / 'ckpt_best.pt', weights_only=True)
    assert best['iter_num'] == 4 and best['best_val_loss'] == losses[4] and last_iter(tmp_path) == 6


def test_keep_checkpoints_rotates(tmp_path):
    train(tmp_path, '--eval_interval=1', '--keep_checkpoints=2', '--eval_samples=0')
    assert sorted(n for n in os.listdir(tmp_path) if re.match(r'ckpt_\d', n)) == ['ckpt_00000003.pt', 'ckpt_00000004.pt']


def test_eval_only_trains_and_saves_nothing(run_dir, tmp_path):
    process = train(tmp_path, '--eval_only', f'--init_from={run_dir}/ckpt.pt')
    assert process.returncode == 0, process.stderr
    final = [r for r in read_log(run_dir) if 'eval' in r][-1]
    assert read_log(tmp_path) == [{**final, 'iter': 0}] and not (tmp_path / 'ckpt.pt').exists()


def test_a_model_learns_to_use_the_image(tmp_path):
    """Only the image says which of two words is correct: the answers become correct, and the controls show why."""
    Image.new('RGB', (32, 16), 'black').save(tmp_path / 'night.png')
    Image.new('RGB', (32, 16), 'white').save(tmp_path / 'day.png')
    rows = [turn('<image>\nWhen?', name, f'{name}.png') for name in ('day', 'night', 'night', 'day')]
    process = train(tmp_path / 'out', write_rows(tmp_path, rows), '--max_iters=100', '--eval_interval=100', '--log_interval=20',
                    '--learning_rate=1e-2')
    assert process.returncode == 0, process.stderr
    result = read_log(tmp_path / 'out')[-1]['eval']
    assert result['exact'] == 1 and result['cer'] == 0 and result['val_loss'] < 0.1
    # with every image white half of the answers are wrong; shuffled by half the set, day and night are exchanged
    assert result['blank_loss'] > 10 * result['val_loss'] and result['shuffled_loss'] > 10 * result['val_loss']


CONTINUATION = ['--tasks=continuation:1 text:1', '--min_span=30', '--max_span=44']


def test_pixel_recovery_is_reported_with_its_losses_and_controls(tmp_path):
    process = train(tmp_path, *CONTINUATION)
    assert process.returncode == 0, process.stderr
    result = read_log(tmp_path)[-1]['eval']
    gain = result['blank_loss'] - result['infix_loss']  # all examples are continuations
    assert result['R'] == pytest.approx((result['blank_loss'] - result['val_loss']) / gain)
    assert result['R_shuffled'] == pytest.approx((result['blank_loss'] - result['shuffled_loss']) / gain)
    assert result['R32'] != result['R'] and result['R32_shuffled'] != result['R_shuffled']
    refused(train(tmp_path, *CONTINUATION, '--block_size=40'), 'too small to measure R')


def test_a_continuation_run_shows_samples_with_and_without_the_image(tmp_path, monkeypatch, run_main):
    """samples.png is there, and its captions are what the model generates after the image, and after nothing in its place."""
    import evaluate
    import render
    captions, prompts = [], []
    contact_sheet, answer = render.contact_sheet, evaluate.answer

    def record_sheet(images, sheet_captions, *args, **knobs):
        captions.append(sheet_captions)
        return contact_sheet(images, sheet_captions, *args, **knobs)

    def record_answer(model, enc, examples, *args, **knobs):
        answers = answer(model, enc, examples, *args, **knobs)
        prompts.extend((e, ' '.join(found.text.split())[:150]) for e, found in zip(examples, answers))
        return answers

    monkeypatch.setattr(render, 'contact_sheet', record_sheet)
    monkeypatch.setattr(evaluate, 'answer', record_answer)
    run_main(fresh_train(), tmp_path, *CONTINUATION, '--eval_samples=2')
    assert (tmp_path / 'samples.png').exists()
    assert len(captions) == 3 and all(len(of_an_evaluation) == 2 for of_an_evaluation in captions)
    assert len(prompts) == 18  # three evaluations of two examples: the image, a blank one, another
    texts = [[text[:100] for _, text in prompts[i:i + 2]] for i in range(0, 18, 2)]
    for number, of_an_evaluation in enumerate(captions):
        for caption, *answers in zip(of_an_evaluation, *texts[3 * number:3 * number + 3]):
            assert caption.startswith('with the image: {}\nblank: {}\nanother: {}\ntrue: '.format(*answers))
            assert caption.split('true: ')[1]


def test_a_text_only_gpt_trains(tmp_path):
    process = train(tmp_path, '--vision_encoder=', '--tasks=text')
    assert process.returncode == 0, process.stderr
    assert set(read_log(tmp_path)[-1]['eval']) == {'val_loss'}
    assert not any(k.startswith('vision') for k in weights(tmp_path))


SMALL_RECIPE = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--vision_n_layer=1', '--vision_n_head=2', '--vision_n_embd=24',
                '--batch_size=2', '--gradient_accumulation_steps=1', '--block_size=4096', '--max_iters=2', '--eval_interval=2',
                '--eval_iters=1', '--eval_samples=2', '--num_workers=0', '--dataset=pydoc', '--device=cpu', '--compile=False',
                '--init_from=scratch', '--vision_from=', '--qformer_n_layer=1', '--qformer_n_head=2', '--qformer_n_embd=32']


# those that start from published models or other recipes are in other files
@pytest.mark.parametrize('config', sorted({p.name for p in (ROOT / 'config').glob('*.py')} -
                                          {'vlm_align.py', 'vlm_sft.py', 'vlm_sft_lora.py', 'vlm_smollm2.py',
                                           'vlm_smollm2_lora.py', 'read_smollm2_cpu.py', 'qformer_align.py', 'qformer_bert.py',
                                           'vlm_qformer.py', 'connectors_cpu.py', 'render_pretrain_qwen3.py',
                                           'ocr_vision.py', 'ocr_mix.py', 'finetune.py'}))
def test_every_recipe_runs_at_a_reduced_size(tmp_path, config):
    process = inside('train.py', ROOT / 'config' / config, *SMALL_RECIPE, '--tokenizer=bytes', f'--out_dir={tmp_path}')
    assert process.returncode == 0, process.stderr
    assert [r['iter'] for r in read_log(tmp_path) if 'eval' in r] == [0, 2]


def test_render_pretrain_runs_with_its_own_tokenizer(tmp_path):
    """The command at its head, at a reduced size: what block_size holds depends on the tokenizer."""
    recipe = (ROOT / 'config' / 'render_pretrain.py').read_text()
    tokenizer = re.search(r"^tokenizer = '(\w+)'", recipe, re.MULTILINE)[1]
    try:
        get_tokenizer(tokenizer)
    except ValueError as error:
        pytest.skip(str(error))
    texts = [row['text'] for row in open_rows('pydoc', 'train')]
    long_texts = [{'text': '\n\n'.join(texts[i:i + 8])} for i in range(0, 160, 8)]  # longer than the recipe's spans
    small = [word for word in SMALL_RECIPE if not word.startswith(('--block_size', '--dataset'))]
    process = inside('train.py', ROOT / 'config' / 'render_pretrain.py', *small, write_rows(tmp_path, long_texts),
                     '--eval_iters=8', f'--out_dir={tmp_path}')
    assert process.returncode == 0, process.stderr
    evals = [r['eval'] for r in read_log(tmp_path) if 'eval' in r]
    assert len(evals) == 2 and all({'R', 'R_shuffled', 'R32', 'text_loss'} <= set(result) for result in evals)
    assert (tmp_path / 'samples.png').exists()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_trains_too(tmp_path, dtype):
    process = train(tmp_path, f'--dtype={dtype}')
    assert process.returncode == 0, process.stderr
    evals = [r['eval']['val_loss'] for r in read_log(tmp_path) if 'eval' in r]
    assert evals[-1] < evals[0]
    assert all(w.dtype == torch.float32 for w in weights(tmp_path).values())


def test_frozen_parts_do_not_change(run_dir, tmp_path):
    train(tmp_path, f'--init_from={run_dir}/ckpt.pt', '--learning_rate=0', '--vision_lr=0', '--optimizer=adamw')
    before, after = weights(run_dir), weights(tmp_path)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.startswith('vision.connector.')}


# -----------------------------------------------------------------------------
# learning rates

def test_lr_of_the_log_is_the_rate_of_what_is_trained(run_dir, tmp_path):
    """With a frozen GPT, that is the connector's; the Q-Former's, which this model does not have, does not count."""
    process = train(tmp_path, f'--init_from={run_dir}/ckpt.pt', '--learning_rate=0', '--vision_lr=0', '--connector_lr=2e-4',
                    '--qformer_lr=6e-4', '--optimizer=adamw', '--min_lr=2e-5')
    assert process.returncode == 0, process.stderr
    rates = [r['lr'] for r in read_log(tmp_path) if 'lr' in r]
    assert rates[:2] == pytest.approx([2e-4 / 3, 4e-4 / 3]) and rates[2] == pytest.approx(2e-4)
    optimizer, = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['optimizer']
    assert all(group['lr'] == pytest.approx(rates[-1]) for group in optimizer['param_groups'])


@pytest.mark.parametrize('knobs', [['--min_lr=2e-3'], ['--min_lr=2e-3', '--learning_rate=0'],
                                   ['--min_lr=5e-4', '--learning_rate=0', '--connector_lr=1e-4', '--vision_lr=1e-4']])
def test_min_lr_above_the_learning_rate_is_refused(run_dir, tmp_path, knobs):
    process = train(tmp_path, f'--init_from={run_dir}/ckpt.pt', *knobs)
    refused(process, 'is above the learning rate', 'the rates would rise: lower --min_lr')


@pytest.mark.parametrize('knobs', [[], ['--min_lr=0'], ['--min_lr=1e-3'], ['--lr_decay_iters=3'], ['--warmup_iters=0'],
                                   ['--warmup_iters=9'], ['--decay_lr=False', '--min_lr=1']])
def test_no_rate_is_above_its_maximum(knobs):
    config = run_config('--max_iters=8', *knobs)
    scales = [train_script.get_lr_scale(it, config, config.learning_rate) for it in range(12)]
    assert all(0 <= scale <= 1 for scale in scales)
    assert scales[-1] == (config.min_lr / config.learning_rate if config.decay_lr and config.warmup_iters < 9 else scales[-1])


# -----------------------------------------------------------------------------
# tokens per second, MFU

def text_batch(rows, length, images=None, image_ids=0):
    idx = torch.arange(rows * length).view(rows, length) % 200
    idx[:, :image_ids] = 256
    return {'idx': idx, 'targets': idx, 'images': images}


def frozen(model, *parts):
    """The model without gradients for these parts."""
    for part in parts:
        for p in model.param_groups()[part].values():
            p.requires_grad_(False)
    return model


# a GPT of 2 layers, width 32, 320 tokens: matrices of its blocks and its head, and attention for T tokens in a row
BLOCKS = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
HEAD = 320 * 32
ATTENTION = 12 * 2 * 32
# its ViT of 1 layer, width 32, patches of 8 x 8 pixels; its connector
VIT = 8 * 8 * 3 * 32 + 32 * 96 + 32 * 32 + 2 * 32 * 128
CONNECTOR = 32 * 32


def test_flops_of_a_text_only_gpt():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=320, block_size=64))
    tokens = 3 * 10
    assert train_script.estimate_flops(model, text_batch(3, 10)) == tokens * (6 * (BLOCKS + HEAD) + ATTENTION * 10)
    padded = text_batch(3, 10)
    padded['idx'][:, 6:] = -1  # padding is no token
    assert train_script.estimate_flops(model, padded) == 18 * (6 * (BLOCKS + HEAD) + ATTENTION * 10)
    untied = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=320, block_size=64, tie_weights=False))
    assert train_script.estimate_flops(untied, text_batch(3, 10)) == tokens * (6 * (BLOCKS + HEAD) + ATTENTION * 10)


def test_flops_count_the_encoder_and_what_is_frozen():
    # 2 rows with one image of 5 patches each, padded to 7, and 10 text tokens
    grid = torch.zeros(2, 7, 2, dtype=torch.int64)
    grid[:, 5:] = -1
    pixels = torch.zeros(2, 7, 8 * 8 * 3, dtype=torch.uint8)
    batch = text_batch(2, 15, (pixels, grid), image_ids=5)
    vit, connector, gpt = 10 * VIT, 10 * CONNECTOR, 30 * (BLOCKS + HEAD)
    attention = 30 * ATTENTION * 15
    flops = lambda *parts: train_script.estimate_flops(frozen(make_model(), *parts), batch)
    assert flops() == 6 * vit + 6 * connector + 6 * gpt + attention
    # LLaVA's second stage: of a frozen encoder only the forward pass
    assert flops('vision') == 2 * vit + 6 * connector + 6 * gpt + attention
    # LLaVA's first stage: through a frozen GPT the gradient passes, but its weights have none
    assert flops('vision', 'gpt') == 2 * vit + 6 * connector + 4 * gpt + attention
    # only the GPT is trained
    assert flops('vision', 'connector') == 2 * vit + 2 * connector + 6 * gpt + attention
    # cached features: the encoder does not run
    features = torch.zeros(2, 7, 32)
    cached = {**batch, 'images': (features, grid)}
    model = frozen(make_model(), 'vision')
    assert train_script.estimate_flops(model, cached) == 6 * connector + 6 * gpt + attention


def test_flops_of_lora():
    rank = 4
    updates = 2 * rank * ((32 + 96) + (32 + 32) + 2 * (32 + 128))
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=320, block_size=64, lora_rank=rank))
    for name, p in model.named_parameters():
        p.requires_grad_('.lora_' in name)
    flops = train_script.estimate_flops(model, text_batch(3, 10))
    assert flops == 30 * (4 * (BLOCKS + HEAD) + 6 * updates + ATTENTION * 10)


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H200', 989e12), ('NVIDIA L4', 121e12),
    ('NVIDIA L40S', 362e12), ('NVIDIA A10G', 125e12), ('Tesla T4', 65e12), ('Tesla V100-SXM2-16GB', 125e12),
    ('NVIDIA GeForce GTX 1080', None)])
def test_mfu_is_known_for_gpus_whose_peak_is_known(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    mfu = train_script.estimate_mfu(1e12, 2.0, 'cuda')
    assert mfu == (pytest.approx(1e12 / 2 / peak) if peak else None)


def test_tokens_per_s_includes_the_step_under_way(tmp_path, run_main):
    """A step is only queued on a GPU until its loss is read; here reading takes 0.3 s."""
    module = fresh_train()
    train_step = module.train_step

    class QueuedLoss:
        def item(self):
            time.sleep(0.3)
            return 1.0

    def queued_step(*args):
        _, tokens, stop = train_step(*args)
        return QueuedLoss(), tokens, stop

    module.train_step = queued_step
    run_main(module, tmp_path, '--max_iters=2', '--eval_samples=0')
    rows = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    rates = [row['tokens_per_s'] for row in rows if 'loss' in row]
    assert len(rates) == 2 and all(rate < 4 * 48 / 0.3 for rate in rates)  # 4 examples of at most 48 tokens


# -----------------------------------------------------------------------------
# resume

RESUME = ['--max_iters=60', '--eval_interval=20', '--dropout=0.1', '--gradient_accumulation_steps=2', '--batch_size=2',
          '--eval_samples=2', '--num_workers=1']

# runs train.py and kills it, with SIGKILL, at the moment given by argv: in a step, in the middle of writing a checkpoint,
# between writing and renaming it, or after that
KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
moment, count = sys.argv.pop(1).split(':')
import train, torch
calls = 0
def die_at(name):
    global calls
    if moment == name and int(os.environ.get('RANK', 0)) == 0:
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
step, save, replace = train.train_step, torch.save, os.replace
def train_step(*args):
    die_at('step')
    return step(*args)
def torch_save(value, f):
    f.write(b'PK half a checkpoint'); f.flush()
    die_at('writing')
    f.seek(0); f.truncate()
    save(value, f)
def os_replace(a, b):
    if b.endswith('ckpt.pt'): die_at('renaming')
    replace(a, b)
    if b.endswith('ckpt.pt'): die_at('renamed')
train.train_step, torch.save, os.replace = train_step, torch_save, os_replace
train.__dict__['__file__'] = {root!r} + '/train.py'
train.run(train.main)
"""


def killed(tmp_path, out_dir, moment, *knobs, processes=1):
    script = tmp_path / 'killer.py'
    script.write_text(KILLER.format(root=str(ROOT)))
    process = launch(script, moment, *TINY, f'--out_dir={out_dir}', *knobs, processes=processes)
    assert process.returncode in (-9, 1), process.stderr  # torchrun itself ends with 1
    assert 'SIGKILL' in process.stderr or process.returncode == -9
    return process


def last_iter(out_dir):
    path = out_dir / 'ckpt.pt'
    return torch.load(path, weights_only=True)['iter_num'] if path.exists() else 0


@pytest.mark.parametrize('processes,moments', [
    (1, ['step:7', 'step:31', 'writing:1', 'renaming:1', 'renamed:1', 'step:12']),
    (2, ['step:27', 'writing:2'])])
def test_a_run_killed_at_several_moments_ends_like_one_that_was_not(tmp_path, processes, moments):
    whole = train(tmp_path / 'whole', *RESUME, processes=processes)
    assert whole.returncode == 0, whole.stderr
    out_dir, reached = tmp_path / 'killed', []
    for moment in moments:
        start = ['--init_from=resume'] if last_iter(out_dir) else []
        killed(tmp_path, out_dir, moment, *RESUME, *start, processes=processes)
        reached.append(last_iter(out_dir))
    assert reached == sorted(reached) and 0 < reached[-1] < 60, reached
    process = train(out_dir, *RESUME, '--init_from=resume', processes=processes)
    assert process.returncode == 0, process.stderr
    assert same_weights(tmp_path / 'whole', out_dir)
    assert read_log(tmp_path / 'whole') == read_log(out_dir)


@pytest.mark.parametrize('number, to_all', [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_saves_before_it_ends_the_run_and_the_run_resumes_exactly(tmp_path, number, to_all):
    whole = train(tmp_path / 'whole', *RESUME, processes=1)
    assert whole.returncode == 0, whole.stderr
    out_dir = tmp_path / 'stopped'
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *TINY, *RESUME, f'--out_dir={out_dir}'],
                               env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = out_dir / 'log.jsonl'
    while process.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
        time.sleep(0.02)
    if to_all:  # schedulers do not spare the loader's processes
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number and 'Traceback' not in stderr
    assert 'continue with --init_from=resume' in stderr
    assert 0 < last_iter(out_dir) < 60
    assert train(out_dir, *RESUME, '--init_from=resume', processes=1).returncode == 0
    assert same_weights(tmp_path / 'whole', out_dir) and read_log(tmp_path / 'whole') == read_log(out_dir)


NEW_SETTINGS = ['--weight_decay=0.5', '--beta1=0.5', '--beta2=0.6']


def test_a_resumed_run_uses_the_settings_that_it_says_are_new(tmp_path):
    assert train(tmp_path / 'old', '--optimizer=adamw', '--lr_decay_iters=4', '--max_iters=2').returncode == 0
    for name, knobs in (('same', []), ('new', NEW_SETTINGS)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'ckpt.pt').write_bytes((tmp_path / 'old' / 'ckpt.pt').read_bytes())
        process = train(tmp_path / name, '--optimizer=adamw', '--init_from=resume', '--lr_decay_iters=4', *knobs)
        assert process.returncode == 0, process.stderr
        notes = re.findall(r'note: (\w+) was (\S+), and is (\S+) from now on', process.stderr)
        changed = {('weight_decay', '0.1', '0.5'), ('beta1', '0.9', '0.5'), ('beta2', '0.95', '0.6')} if knobs else set()
        assert {note for note in notes if note[0] in ('weight_decay', 'beta1', 'beta2')} == changed
    optimizers = {name: torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['optimizer'] for name in ('same', 'new')}
    settings = lambda name: {(*group['betas'], group['weight_decay']) for group in optimizers[name][0]['param_groups']}
    assert settings('same') == {(0.9, 0.95, 0.1), (0.9, 0.95, 0.0)}
    assert settings('new') == {(0.5, 0.6, 0.5), (0.5, 0.6, 0.0)}
    assert not same_weights(tmp_path / 'same', tmp_path / 'new')


def test_a_resumed_run_uses_a_new_weight_decay_for_muon(tmp_path):
    assert train(tmp_path, '--max_iters=2').returncode == 0
    assert train(tmp_path, '--init_from=resume', '--weight_decay=0.5').returncode == 0
    _, muon = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['optimizer']
    assert {group['weight_decay'] for group in muon['param_groups']} == {0.5}


@pytest.mark.parametrize('line', [b'{"iter": 1, "lo', b'{"loss": 2.0}', b'[]', b'\xff\xfe'])
def test_a_broken_line_of_the_log_is_named_and_nothing_is_lost(tmp_path, line):
    assert train(tmp_path, '--max_iters=2').returncode == 0
    log = tmp_path / 'log.jsonl'
    whole = log.read_bytes()
    first, rest = whole.split(b'\n', 1)
    broken = b'\n'.join([first, line, rest])
    log.write_bytes(broken)
    checkpoint = (tmp_path / 'ckpt.pt').read_bytes()
    refused(train(tmp_path, '--init_from=resume'), f'{log}, line 2 is not a row of this log', 'fix or delete that line')
    assert log.read_bytes() == broken and (tmp_path / 'ckpt.pt').read_bytes() == checkpoint
    log.write_bytes(whole)
    assert train(tmp_path, '--init_from=resume').returncode == 0
    assert [row['iter'] for row in read_log(tmp_path) if 'loss' in row] == [1, 2, 3, 4]


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path):
    assert train(tmp_path, '--max_iters=2').returncode == 0
    with (tmp_path / 'log.jsonl').open('a') as f:
        f.write('{"iter": 3, "lo')
    assert train(tmp_path, '--init_from=resume').returncode == 0
    assert [row['iter'] for row in read_log(tmp_path) if 'loss' in row] == [1, 2, 3, 4]


@pytest.mark.parametrize('start', ['resume', 'checkpoint'])
def test_a_checkpoint_is_read_once(run_dir, tmp_path, monkeypatch, run_main, start):
    opened = []
    load = torch.load

    def record(path, *args, **kwargs):
        opened.append(str(path))
        return load(path, *args, **kwargs)

    monkeypatch.setattr(model_module.torch, 'load', record)
    path = tmp_path / 'ckpt.pt'
    path.write_bytes((run_dir / 'ckpt.pt').read_bytes())
    source = 'resume' if start == 'resume' else path
    run_main(fresh_train(), tmp_path, f'--init_from={source}', '--max_iters=5', '--eval_samples=0')
    assert opened == [str(path)]


# -----------------------------------------------------------------------------
# several processes

def close_logs(a, b):
    """The same rows, numbers equal to float tolerance."""
    a, b = read_log(a), read_log(b)
    assert [(r['iter'], sorted(r)) for r in a] == [(r['iter'], sorted(r)) for r in b]
    for x, y in zip(a, b):
        for k in x.get('eval', x):
            assert y.get('eval', y)[k] == pytest.approx(x.get('eval', x)[k], rel=2e-4, abs=2e-5), (x, y)
    return True


def test_two_processes_give_the_losses_of_one_with_gradient_accumulation(tmp_path):
    knobs = ['--gradient_accumulation_steps=2', '--max_iters=10', '--eval_interval=5', '--optimizer=adamw',
             '--tasks=ocr:1 text:1', '--eval_iters=3']
    for processes in (1, 2):
        process = train(tmp_path / str(processes), *knobs, processes=processes)
        assert process.returncode == 0, process.stderr
    assert close_logs(tmp_path / '1', tmp_path / '2')


def test_a_batch_without_images_on_one_rank_does_not_hang(tmp_path):
    Image.effect_noise((64, 16), 50).save(tmp_path / 'x.png')
    rows = [turn('<image>', 'noise', 'x.png')] + [turn('no image', 'here, and a longer answer')] * 7
    knobs = [write_rows(tmp_path, rows), '--batch_size=1', '--gradient_accumulation_steps=2', '--max_iters=8',
             '--eval_interval=8', '--optimizer=adamw']
    for processes in (1, 2):
        process = train(tmp_path / str(processes), *knobs, processes=processes)
        assert process.returncode == 0, process.stderr
    assert close_logs(tmp_path / '1', tmp_path / '2')


def test_accumulation_that_does_not_divide_is_refused(tmp_path):
    process = train(tmp_path, '--gradient_accumulation_steps=3', processes=2)
    assert process.returncode != 0
    assert 'error: gradient_accumulation_steps (3)' in process.stderr and 'multiple of their number (2)' in process.stderr


# -----------------------------------------------------------------------------
# what a user can get wrong: one sentence, nothing lost

def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(tmp_path):
    assert train(tmp_path, '--max_iters=2').returncode == 0
    before = (tmp_path / 'ckpt.pt').read_bytes()
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # as a disk with 60 kB left would
    process = train(tmp_path, '--init_from=resume', processes=1, preexec_fn=full)
    refused(process, 'could not write', 'ckpt', 'MiB are free', '--init_from=resume')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before and not (tmp_path / 'ckpt.pt.tmp').exists()
    assert train(tmp_path, '--init_from=resume').returncode == 0 and last_iter(tmp_path) == 4


def test_resuming_a_missing_or_damaged_checkpoint_is_refused(tmp_path):
    refused(train(tmp_path, '--init_from=resume'), 'no checkpoint at')
    refused(train(tmp_path, '--init_from=gone.pt'), 'no checkpoint at gone.pt')
    (tmp_path / 'ckpt.pt').write_bytes(b'')
    refused(train(tmp_path, '--init_from=resume'), 'ckpt.pt')


@pytest.mark.parametrize('knobs,words', [
    (['--block_size=2'], ['the prompt takes 3 positions, but block_size is 2']),
    (['--block_size=2', '--eval_samples=0'], ['nothing in this step is in the loss', 'block_size (2)']),
    (['--dataset=nowhere'], ["no dataset 'nowhere'"]),
    (['--tasks=reed'], ['expected ocr, continuation, text']),
    (['--vision_encoder='], ['no vision_encoder', '--tasks=text']),
    (['--tokenizer=nothing'], ['tokenizer must be bytes, gpt2']),
    (['--n_head=3'], ['n_embd (32) must be a multiple of n_head (3)']),
    (['--learning_rate=0', '--vision_lr=0', '--connector_lr=0'], ['nothing is left to train']),
    (['--image_height=3'], ['does not fit 256x3 pixels']),
    (['--device=tpu'], ['device must be']),
    (['--dtype=int8'], ['dtype must be']),
    (['--font=nowhere'], ['no .ttf or .otf file']),
    (['--muon_lr=1e30', '--max_iters=20', '--eval_interval=100'], ['the loss is', 'lower the learning rates']),
])
def test_mistakes_end_in_one_sentence(tmp_path, knobs, words):
    refused(train(tmp_path, *knobs), *words)


@pytest.mark.parametrize('row, words', [
    (turn('hi <image>', 'x', 'x.png', 'x.png'), ['train.jsonl, line 1', '2 images']),
    (turn('<image>', 'x', 'gone.png'), ['no image at', 'gone.png']),
    ({'messages': [{'role': 'user', 'content': 'no answer'}]}, ['nothing in this step is in the loss'])])
def test_rows_that_cannot_be_trained_on_are_named(tmp_path, row, words):
    Image.new('RGB', (32, 16)).save(tmp_path / 'x.png')
    process = train(tmp_path / 'out', write_rows(tmp_path, [row] * 4), '--num_workers=1', '--eval_samples=0')
    refused(process, *words)


def test_broken_lines_and_elongated_images_are_named(tmp_path):
    (tmp_path / 'train.jsonl').write_text('{"text": "fine"}\n{"text": broken}\n')
    (tmp_path / 'val.jsonl').write_text('{"text": "fine"}\n')
    refused(train(tmp_path / 'out', f'--dataset={tmp_path}'), 'train.jsonl, line 2 is not JSON')
    Image.new('RGB', (20000, 1)).save(tmp_path / 'thin.png')
    process = train(tmp_path / 'out', write_rows(tmp_path, [turn('<image>', 'x', 'thin.png')]))
    refused(process, '20000x1 pixels is too elongated')
