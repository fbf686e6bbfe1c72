"""What the tests share: a tiny GPT with eyes, and a way to run a script as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import GPT, GPTConfig  # noqa: E402

torch.set_num_threads(2)

# a run of a few seconds: every knob that makes it small
TINY = ['--dataset=pydoc', '--vision_encoder=vit', '--connector=linear', '--n_layer=2', '--n_head=2', '--n_embd=32',
        '--vision_n_layer=1', '--vision_n_head=2', '--vision_n_embd=32', '--patch_width=8', '--patch_height=16',
        '--line_height=16', '--max_image_tokens=32', '--block_size=48', '--batch_size=4', '--min_chars=6', '--max_chars=12',
        '--min_span=20', '--max_span=40', '--max_iters=4', '--eval_interval=2', '--log_interval=1', '--eval_iters=1',
        '--eval_samples=4', '--warmup_iters=2', '--learning_rate=1e-3', '--vision_lr=1e-3', '--connector_lr=1e-3',
        '--min_lr=1e-4', '--num_workers=0', '--device=cpu', '--compile=False', '--optimizer=muon']


def tiny_config(**changes):
    """A GPTConfig with eyes whose forward pass takes a millisecond."""
    args = dict(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=32, vision_encoder='vit', connector='linear',
                patch_height=8, patch_width=8, max_image_tokens=16, vision_n_layer=1, vision_n_head=2, vision_n_embd=32,
                image_token=256)
    return GPTConfig(**{**args, **changes})


@pytest.fixture
def tiny_model():
    """The same tiny model for everyone, with weights large enough that everything it sees makes a difference."""
    return make_model()


def make_model(**changes):
    torch.manual_seed(0)
    model = GPT(tiny_config(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return model


def launch(*words, cwd=None, processes=1, script=None, **kwargs):
    """Runs `python WORDS` (or torchrun with several processes) as a user would; returns the finished process."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
    first = [sys.executable] if processes == 1 else [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    words = [str(script or ROOT / words[0]), *map(str, words[1:])]
    return subprocess.run([*first, *words], cwd=cwd or ROOT, env=env, capture_output=True, text=True, timeout=300, **kwargs)


def train(out_dir, *knobs, processes=1, **kwargs):
    """A tiny run of train.py."""
    return launch('train.py', *TINY, f'--out_dir={out_dir}', *knobs, processes=processes, **kwargs)


def read_log(out_dir):
    """log.jsonl without what depends on the clock."""
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
