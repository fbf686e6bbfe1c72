"""What must stay true of a run: it resumes exactly, any number of processes compute the same, and nothing good is lost."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, inside, launch, read_log, refused, train
from PIL import Image


def weights(out_dir):
    return torch.load(os.path.join(out_dir, 'ckpt.pt'), weights_only=True)['model']


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write_rows(folder, rows):
    for split in ('train', 'val'):
        (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return f'--dataset={folder}'


def turn(question, answer, **more):
    return {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}], **more}


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves

def test_log_checkpoint_and_samples(run_dir):
    log = read_log(run_dir)
    steps, evals = [r for r in log if 'loss' in r], [r for r in log if 'eval' in r]
    assert [r['iter'] for r in steps] == [1, 2, 3, 4] and all(set(r) == {'iter', 'loss', 'lr'} for r in steps)
    assert [r['iter'] for r in evals] == [0, 2, 4]
    for r in evals:
        assert set(r['eval']) == {'val_loss', 'blank_loss', 'shuffled_loss', 'text_loss', 'cer', 'exact', 'n'}
    assert evals[-1]['eval']['val_loss'] < evals[0]['eval']['val_loss']
    checkpoint = torch.load(run_dir / 'ckpt.pt', weights_only=True)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(checkpoint)
    assert checkpoint['iter_num'] == 4 and checkpoint['config']['n_embd'] == 32
    assert (run_dir / 'ckpt_best.pt').exists()
    assert Image.open(run_dir / 'samples.png').width > 400


def test_a_worse_value_never_replaces_the_best_checkpoint(tmp_path):
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


def test_it_learns_to_look(tmp_path):
    """Two words that only the picture tells apart: a model that sees answers right, and the controls show why."""
    Image.new('RGB', (32, 16), 'black').save(tmp_path / 'night.png')
    Image.new('RGB', (32, 16), 'white').save(tmp_path / 'day.png')
    rows = [turn('<image>\nWhen?', name, image_path=f'{name}.png') for name in ('day', 'night', 'night', 'day')]
    process = train(tmp_path / 'out', write_rows(tmp_path, rows), '--max_iters=100', '--eval_interval=100', '--log_interval=20',
                    '--learning_rate=1e-2')
    assert process.returncode == 0, process.stderr
    result = read_log(tmp_path / 'out')[-1]['eval']
    assert result['exact'] == 1 and result['cer'] == 0 and result['val_loss'] < 0.1
    # every image white: half the answers are wrong; shuffled by half the set: day and night trade places
    assert result['blank_loss'] > 10 * result['val_loss'] and result['shuffled_loss'] > 10 * result['val_loss']


def test_pixel_recovery_is_reported_with_its_losses_and_controls(tmp_path):
    knobs = ['--tasks=continue:1 text:1', '--min_span=30', '--max_span=44']
    process = train(tmp_path, *knobs)
    assert process.returncode == 0, process.stderr
    result = read_log(tmp_path)[-1]['eval']
    told = result['none_loss'] - result['infix_loss']
    assert result['R'] == pytest.approx((result['none_loss'] - result['pixels_loss']) / told)
    assert result['R_shuffled'] == pytest.approx((result['none_loss'] - result['shuffled_loss']) / told)
    assert result['R_blank'] == pytest.approx((result['none_loss'] - result['blank_loss']) / told)
    refused(train(tmp_path, *knobs, '--block_size=40'), 'too small to measure R')


def test_a_text_only_gpt_trains(tmp_path):
    process = train(tmp_path, '--vision_encoder=', '--tasks=text')
    assert process.returncode == 0, process.stderr
    assert set(read_log(tmp_path)[-1]['eval']) == {'val_loss'}
    assert not any(k.startswith('vision') for k in weights(tmp_path))


# those that start from published models or other recipes are in test_towers.py, test_pretrained.py and test_qformer.py
@pytest.mark.parametrize('config', sorted({p.name for p in (ROOT / 'config').iterdir()} -
                                          {'vlm_align.py', 'vlm_sft.py', 'vlm_sft_lora.py', 'vlm_smollm2.py',
                                           'vlm_smollm2_lora.py', 'read_smollm2_cpu.py', 'qformer_align.py',
                                           'vlm_qformer.py', 'connectors_cpu.py'}))
def test_every_recipe_runs_at_a_reduced_size(tmp_path, config):
    small = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--vision_n_layer=1', '--vision_n_head=2', '--vision_n_embd=32',
             '--batch_size=2', '--gradient_accumulation_steps=1', '--block_size=4096', '--max_iters=2', '--eval_interval=2',
             '--eval_iters=1', '--eval_samples=2', '--num_workers=0', '--tokenizer=bytes', '--dataset=pydoc', '--device=cpu',
             '--compile=False', '--init_from=scratch', '--vision_from=', '--qformer_n_layer=1', '--qformer_n_head=2',
             '--qformer_n_embd=32']
    process = inside('train.py', ROOT / 'config' / config, *small, f'--out_dir={tmp_path}')
    assert process.returncode == 0, process.stderr
    assert [r['iter'] for r in read_log(tmp_path) if 'eval' in r] == [0, 2]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_trains_too(tmp_path, dtype):
    process = train(tmp_path, f'--dtype={dtype}')
    assert process.returncode == 0, process.stderr
    evals = [r['eval']['val_loss'] for r in read_log(tmp_path) if 'eval' in r]
    assert evals[-1] < evals[0]
    assert all(w.dtype == torch.float32 for w in weights(tmp_path).values())


def test_frozen_parts_do_not_move(run_dir, tmp_path):
    train(tmp_path, f'--init_from={run_dir}/ckpt.pt', '--learning_rate=0', '--vision_lr=0', '--optimizer=adamw')
    before, after = weights(run_dir), weights(tmp_path)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {k for k in before if k.startswith('vision.connector.')}


# ---------------------------------------------------------------------------------------------------------------------
# resume

RESUME = ['--max_iters=60', '--eval_interval=20', '--dropout=0.1', '--gradient_accumulation_steps=2', '--batch_size=2',
          '--eval_samples=2', '--num_workers=1']

# runs train.py and kills it, with SIGKILL, at the moment given by argv: in a step, in the middle of writing a checkpoint,
# between writing and renaming it, or right after
KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
moment, count = sys.argv.pop(1).split(':')
import train, torch
seen = 0
def die_at(name):
    global seen
    if moment == name and int(os.environ.get('RANK', 0)) == 0:
        seen += 1
        if seen == int(count):
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
def test_a_signal_saves_before_it_ends_the_run_and_the_run_goes_on_exactly(tmp_path, number, to_all):
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
    assert process.returncode == 128 + number and 'go on with --init_from=resume' in stderr and 'Traceback' not in stderr
    assert 0 < last_iter(out_dir) < 60
    assert train(out_dir, *RESUME, '--init_from=resume', processes=1).returncode == 0
    assert same_weights(tmp_path / 'whole', out_dir) and read_log(tmp_path / 'whole') == read_log(out_dir)


# ---------------------------------------------------------------------------------------------------------------------
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
             '--tasks=read:1 text:1', '--eval_iters=3']
    for processes in (1, 2):
        process = train(tmp_path / str(processes), *knobs, processes=processes)
        assert process.returncode == 0, process.stderr
    assert close_logs(tmp_path / '1', tmp_path / '2')


def test_a_batch_without_images_on_one_rank_does_not_hang(tmp_path):
    Image.effect_noise((64, 16), 50).save(tmp_path / 'x.png')
    rows = [turn('<image>', 'noise', image_path='x.png')] + [turn('no image', 'here, and a longer answer')] * 7
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


# ---------------------------------------------------------------------------------------------------------------------
# what a user can get wrong: one sentence, nothing lost

def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(tmp_path):
    assert train(tmp_path, '--max_iters=2').returncode == 0
    before = (tmp_path / 'ckpt.pt').read_bytes()
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # as a disk with 60 kB left would
    process = train(tmp_path, '--init_from=resume', processes=1, preexec_fn=full)
    refused(process, 'could not write', 'ckpt', 'MiB are free', '--init_from=resume')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before and not (tmp_path / 'ckpt.pt.tmp').exists()
    assert train(tmp_path, '--init_from=resume').returncode == 0 and last_iter(tmp_path) == 4


def test_resuming_what_is_not_there_or_damaged(tmp_path):
    refused(train(tmp_path, '--init_from=resume'), 'no checkpoint at')
    refused(train(tmp_path, '--init_from=gone.pt'), 'no checkpoint at gone.pt')
    (tmp_path / 'ckpt.pt').write_bytes(b'')
    refused(train(tmp_path, '--init_from=resume'), 'ckpt.pt')


@pytest.mark.parametrize('knobs,words', [
    (['--block_size=2'], ['the prompt takes 3 positions, but block_size is 2']),
    (['--block_size=2', '--eval_samples=0'], ['without anything to learn', 'block_size (2)']),
    (['--dataset=nowhere'], ["no dataset 'nowhere'"]),
    (['--tasks=reed'], ['expected some of read']),
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


def test_rows_that_cannot_be_learnt_from_are_named(tmp_path):
    Image.new('RGB', (32, 16)).save(tmp_path / 'x.png')
    for row, words in ((turn('hi', 'x', image_path='x.png'), ['1 images, but only 0 <image> places']),
                       (turn('<image>', 'x', image_path='gone.png'), ['no image at', 'gone.png']),
                       ({'messages': [{'role': 'user', 'content': 'no answer'}]}, ['without anything to learn'])):
        refused(train(tmp_path / 'out', write_rows(tmp_path, [row] * 4), '--num_workers=1', '--eval_samples=0'), *words)
    (tmp_path / 'train.jsonl').write_text('{"text": "fine"}\n{"text": broken}\n')
    refused(train(tmp_path / 'out', f'--dataset={tmp_path}'), 'train.jsonl, line 2 is not JSON')
    Image.new('RGB', (20000, 1)).save(tmp_path / 'thin.png')
    process = train(tmp_path / 'out', write_rows(tmp_path, [turn('<image>', 'x', image_path='thin.png')]))
    refused(process, '20000x1 pixels is too elongated')
