"""What the tests share: a tiny GPT with vision, and two ways to run a script as a user does."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataloader import target_places  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

torch.set_num_threads(1)  # faster than two at this size, and the same on every machine

# a run of a few seconds: every knob that makes it small
TINY = ['--dataset=pydoc', '--vision_encoder=vit', '--connector=linear', '--n_layer=2', '--n_head=2', '--n_embd=32',
        '--vision_n_layer=1', '--vision_n_head=2', '--vision_n_embd=32', '--patch_width=8', '--patch_height=16',
        '--line_height=16', '--max_image_tokens=32', '--block_size=48', '--batch_size=4', '--min_chars=6', '--max_chars=12',
        '--min_span=20', '--max_span=40', '--max_iters=4', '--eval_interval=2', '--log_interval=1', '--eval_iters=1',
        '--eval_samples=4', '--warmup_iters=2', '--learning_rate=1e-3', '--vision_lr=1e-3', '--connector_lr=1e-3',
        '--min_lr=1e-4', '--num_workers=0', '--device=cpu', '--compile=False', '--optimizer=muon']

# the switches that make it a Llama
LLAMA = dict(norm='rmsnorm', position='rope', mlp='swiglu', n_kv_head=1, bias=False)


def tiny_config(**changes):
    """A GPTConfig with vision whose forward pass takes a millisecond."""
    args = dict(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=32, vision_encoder='vit', connector='linear',
                patch_height=8, patch_width=8, max_image_tokens=16, vision_n_layer=1, vision_n_head=2, vision_n_embd=32,
                image_token=256)
    return GPTConfig(**{**args, **changes})


@pytest.fixture(params=['gpt2', 'llama'])
def tiny_model(request):
    """Tiny models, always the same, with weights so large that every input makes a difference."""
    return make_model(**(LLAMA if request.param == 'llama' else {}))


def make_model(**changes):
    torch.manual_seed(0)
    model = GPT(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:  # the tied head would make it repeat its input if the embeddings grew as well
                p.mul_(10 if '.h.' in name or '.wpe.' in name else 1)
    return model


def batch_of_ids(idx, targets, images=None):
    """A batch as collate makes it."""
    return {'idx': idx, 'targets': targets, 'places': target_places(targets), 'images': images}


def optimizer_config(**changes):
    """The knobs that configure_optimizers reads."""
    rates = dict(learning_rate=1e-3, vision_lr=1e-3, qformer_lr=1e-3, connector_lr=1e-3, sam_lr=-1.0,
                 compressor_lr=-1.0, qformer_new_lr=-1.0, muon_lr=0.02)
    return SimpleNamespace(**{'optimizer': 'adamw', 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, **rates, **changes})


def inside(script, *words):
    """
    Runs `python SCRIPT WORDS` in this process, as __main__ and with globals of its own. A user gets the same, but here
    torch is already imported. Returns returncode, stdout and stderr.
    """
    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    rng_state = torch.get_rng_state()
    sys.argv = [script, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name='__main__')
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):  # as the interpreter does: a message goes to stderr, with status 1
            err.write(code + '\n')
            code = 1
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_rng_state(rng_state)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def launch(script, *words, cwd=None, processes=1, **kwargs):
    """Runs `python SCRIPT WORDS`, or torchrun with several processes, as processes of their own."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
    python = [sys.executable]
    if processes > 1:
        python += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    command = [*python, str(ROOT / script), *map(str, words)]
    return subprocess.run(command, cwd=cwd or ROOT, env=env, capture_output=True, text=True, timeout=300, **kwargs)


def train(out_dir, *knobs, processes=0, **kwargs):
    """A tiny run of train.py: in this process, or as one or more processes of their own."""
    words = ['train.py', *TINY, f'--out_dir={out_dir}', *knobs]
    return launch(*words, processes=processes, **kwargs) if processes else inside(*words)


def write_pairs(folder):
    """A dataset of four images with captions."""
    for split in ('train', 'val'):
        rows = []
        for i in range(4):
            Image.new('RGB', (30, 30), (60 * i, 90, 90)).save(folder / f'{split}{i}.png')
            rows.append({'text': f'<image>A {split} image, number {i}.', 'images': [f'{split}{i}.png']})
        (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))


def read_log(out_dir):
    """log.jsonl without the values that depend on the clock."""
    rows = [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ('tokens_per_s', 'elapsed_s')} for row in rows]


def refused(process, *words):
    """The process ended with one sentence on stderr that holds the words, status 1 and no traceback."""
    message = [line for line in process.stderr.splitlines() if line.startswith('error: ')]
    assert process.returncode == 1, process.stderr
    assert 'Traceback' not in process.stderr, process.stderr
    assert len(message) == 1, process.stderr
    for word in words:
        assert word in message[0], message[0]
    return True


@pytest.fixture(scope='session')
def run_dir(tmp_path_factory):
    """The out_dir of one finished tiny run."""
    out_dir = tmp_path_factory.mktemp('run')
    process = train(out_dir)
    assert process.returncode == 0, process.stderr
    return out_dir
