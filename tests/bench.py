"""
Speed and memory on this machine: not a test, a measurement. Medians of several rounds; of vlm's batch of 16, one round.

    $ python tests/bench.py                      # the quickstart's model; the knobs of train.py change it: --batch_size=32
    $ python tests/bench.py config/pages_cpu.py  # another recipe's
    $ python tests/bench.py attention RUN        # of a run that reads lines: does attention follow the letters? by layer
    $ python tests/bench.py features             # a frozen ViT-B-32 running in every step, and its features cached
    $ python tests/bench.py vlm                  # GPT-2 with CLIP, SmolLM2 with SigLIP: a step's time and memory by batch
    $ python tests/bench.py sft                  # config/vlm_sft.py's step by batch: padded, packed, eager, compiled; for a GPU
    $ python tests/bench.py peer                 # GPT-2 with CLIP, against the same out of transformers: steps, generation
    $ python tests/bench.py compile              # the quickstart's steps, eager and compiled; the knobs of train.py change it
    $ python tests/bench.py pack                 # useful tokens a second of documents like LLaVA's, padded and packed
    $ python tests/bench.py fsdp                 # what each of two processes keeps of a GPT-2, with DDP and with FSDP
    $ python tests/bench.py rows 10000000        # a .jsonl of so many rows: time to open it, memory, rows in random order
    $ python tests/bench.py published            # SmolVLM-256M against Hugging Face's class: generation, memory
    $ python tests/bench.py memory               # fine-tuning published models: computed for a GPU, checked on this CPU

Encoders have random weights here: they cost what trained ones cost.
"""

import functools
import gc
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import dataloader  # noqa: E402
import evaluate  # noqa: E402
import render  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
import vision  # noqa: E402
import weights  # noqa: E402
from configurator import configure  # noqa: E402
from evaluate import best_dtype, find_device, to_device  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from patches import assemble, collate_images, num_tokens, preprocess  # noqa: E402


def train_config(*words):
    """The knobs of train.py, changed by config files and --key=value."""
    return SimpleNamespace(**configure(dict(vars(train)), GPTConfig, words))


def median_seconds(function, rounds=7):
    """The median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(name, value, unit, digits=0):
    print(f'{name:<58}{value:>12,.{digits}f} {unit}')


def process_memory(field):
    """A field of /proc/self/status in GiB: VmRSS is the resident memory, VmHWM the most it was, RssAnon without files."""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field)) / 2**20


def forget_cuda_memory():
    """The peak memory counts from here on, without what earlier models have left."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


# -----------------------------------------------------------------------------
# the quickstart

def open_run(*words):
    """A run of config/quickstart.py, or of the recipe in `words`: a namespace of what train.main() makes, and of
    batch(i), a micro-batch, and step(batch, model), an optimizer step.
    """
    config = train_config(*words) if words and words[0].endswith('.py') else train_config('config/quickstart.py', *words)
    dist_env = train.setup_distributed(config)
    torch.manual_seed(config.seed)
    model, enc, _ = train.init_model(config)
    model.to(dist_env.device)
    optimizers = train.configure_optimizers(model, config)
    scaler = torch.amp.GradScaler(dist_env.device_type, enabled=False)
    dtype = getattr(torch, dist_env.dtype)
    autocast = torch.autocast(dist_env.device_type, dtype, enabled=dtype != torch.float32)
    examples = dataloader.Examples(dataloader.open_rows(config.dataset, 'train'), config, config.seed)
    dataset = dataloader.TokenizedExamples(examples, enc, model.config, config.loss_on)
    print(f'{torch.get_num_threads()} threads, {dist_env.device_type}, {dist_env.dtype}, torch {torch.__version__}',
          file=sys.stderr)

    def batch(i):
        indices = range(i * config.batch_size, (i + 1) * config.batch_size)
        return dataloader.collate([dataset[j] for j in indices], model.config)

    def step(batch, model):
        return train.train_step(model, optimizers, scaler, [batch], autocast, config, dist_env, 0)

    return SimpleNamespace(config=config, dist_env=dist_env, model=model, enc=enc, optimizers=optimizers,
                           examples=examples, batch=batch, step=step)


def quickstart():
    run = open_run(*sys.argv[1:])
    config, dist_env, model = run.config, run.dist_env, run.model
    batch = run.batch(0)
    step_seconds = median_seconds(lambda: run.step(batch, model))
    report('training, image and text tokens', int(batch['lengths'].sum()) / step_seconds, 'tokens/s')
    report('training, examples', config.batch_size / step_seconds, 'examples/s')
    muon = [opt for opt in run.optimizers if isinstance(opt, train.Muon)]
    if muon:
        sum(model(to_device(batch, dist_env.device)).values()).backward()
        muon_seconds = median_seconds(muon[0].step)
        report('Muon in a step', 1000 * muon_seconds, 'ms', digits=1)
        report('    share of the step', 100 * muon_seconds / step_seconds, '%', digits=1)

    model.eval()
    report_generation(model, run.enc, [run.examples[i] for i in range(config.batch_size)], dist_env.device)
    torch.set_num_threads(1)  # as in a loader's worker
    count = iter(range(10**9))
    rate = config.batch_size / median_seconds(lambda: run.batch(next(count)))
    report('drawn and tokenized by one worker, examples', rate, 'examples/s')
    report('    times what training takes', 100 * rate * step_seconds / config.batch_size, '%')
    report_drawing(config)
    report('peak memory of this process', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 'MiB')


def report_generation(model, enc, examples, device, new_tokens=32):
    """Tokens per second after a batch of prompts, and after one."""
    prompts = [dataloader.tokenize(e, enc, model.config, prompt_only=True) for e in examples]
    for name, used in ((f'{len(prompts)} prompts at once', prompts), ('one prompt', prompts[:1])):
        batch = to_device(dataloader.collate(used, model.config), device)
        generate = lambda batch=batch: model.generate(batch['idx'], new_tokens, 0, images=batch['images'],
                                                      lengths=batch['lengths'])
        report(f'generation, {name}', len(used) * new_tokens / median_seconds(generate, 5), 'tokens/s')


def report_drawing(config):
    """Lines and pages of text drawn per second."""
    rng = random.Random(0)
    texts = [row['text'] for row in dataloader.open_rows('pydoc', 'train')]
    lines = SimpleNamespace(**{**vars(config), 'distort': 0.0})
    page_knobs = dict(one_line=False, image_width=448, image_height=448, min_chars=400, max_chars=600, font_min=12)
    pages = SimpleNamespace(**{**vars(lines), **page_knobs})
    draw = lambda count, knobs: [render.ocr(rng.choice(texts), rng, knobs) for _ in range(count)]
    seconds = median_seconds(lambda: draw(50, lines))
    report('lines drawn on one core, without augmentation', 50 / seconds, 'lines/s')
    seconds = median_seconds(lambda: draw(20, pages), 3)
    report('pages of 448x448 and 400-600 characters on one core', 20 / seconds, 'pages/s')


def compiled(*words, count=60):
    """The same batches, eager and under torch.compile with its default backend: the seconds of the first half, in which
    it compiles, the steps a second of the other half, and the number of graphs.
    """
    run = open_run(*words)
    batches = [run.batch(i) for i in range(count)]
    counter = CompileCounterWithBackend('inductor')
    for name, model in (('eager', run.model), ('compiled', torch.compile(run.model, backend=counter))):
        run.config.compile = name == 'compiled'
        times = []
        for batch in batches:
            start = time.perf_counter()
            run.step(batch, model)
            times.append(time.perf_counter() - start)
        report(f'{name}: first {count // 2} steps', sum(times[:count // 2]), 's', digits=1)
        report(f'{name}: the others', len(times[count // 2:]) / sum(times[count // 2:]), 'steps/s', digits=2)
    report('graphs', counter.frame_count, '')


# -----------------------------------------------------------------------------
# packing

def llava_like_documents(count, config):
    """
    Tokenized documents with lengths like LLaVA-665k's: log-normal text, a third of it in the loss, 6 % without an image,
    10 % with two to four.
    """
    rng = random.Random(0)
    picture = vision.Image.effect_noise((56, 56), 100).convert('RGB')
    patches = preprocess(picture, config)
    n_image_tokens = num_tokens(patches, config)
    for _ in range(count):
        n_images = rng.choices((0, 1, 2, 3, 4), (6, 84, 5, 3, 2))[0]
        n_text = min(config.block_size - 200, max(8, int(rng.lognormvariate(5.2, 0.8))))
        idx = [config.image_token] * (n_image_tokens * n_images) + [rng.randrange(256) for _ in range(n_text)]
        targets = [-1] * (len(idx) - n_text // 3) + idx[-(n_text // 3):] if n_text // 3 else [-1] * len(idx)
        yield {'idx': idx, 'targets': targets, 'images': [patches] * n_images}


def packed():
    """Training steps on the same documents, padded to the longest of a batch and packed: how many tokens a second?"""
    config = GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=1024, vocab_size=320, bias=False, image_token=256,
                       vision_encoder='vit', connector='linear', patch_height=8, patch_width=8, max_image_tokens=49,
                       vision_n_layer=2, vision_n_head=4, vision_n_embd=128, position='rope')
    documents = list(llava_like_documents(600, config))
    torch.manual_seed(0)
    model = GPT(config)
    optimizer, = train.configure_optimizers(model, train_config('--optimizer=adamw'))

    def measure(name, batches):
        n_tokens = n_places = seconds = 0
        for i, batch in enumerate(batches):
            start = time.perf_counter()
            (model(batch)['lm'] / model.loss_weight(batch)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if i:  # the first one warms up
                seconds += time.perf_counter() - start
                n_tokens += int((batch['idx'] >= 0).sum())
                n_places += batch['idx'].numel()
        report(f'{name}: places that carry a token', 100 * n_tokens / n_places, '%', digits=1)
        report(f'{name}: useful tokens', n_tokens / seconds, 'tokens/s')
        return n_tokens / seconds

    padded_batches = [dataloader.collate(documents[i:i + 16], config) for i in range(0, 16 * 13, 16)]
    stream = enumerate(itertools.cycle(documents))
    packed_batches = list(itertools.islice(dataloader.pack(stream, config, 4, 8), 13))
    padded_rate = measure('16 documents, padded', padded_batches)
    packed_rate = measure('4 rows of 1024, packed', packed_batches)
    report('    times as fast', 100 * packed_rate / padded_rate, '%')


# -----------------------------------------------------------------------------
# pretrained encoders

def make_step(config, batch):
    """A training step of a GPT with a frozen encoder: everything except the encoder is trained, by AdamW in float32."""
    model = GPT(config, load=False)
    rates = ['--learning_rate=1e-4', '--connector_lr=1e-4', '--vision_lr=0']
    optimizer, = train.configure_optimizers(model, train_config(*rates))

    def step():
        (model(batch)['lm'] / model.loss_weight(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_batch(images, n_image_tokens, n_text_tokens, n_target_tokens, image_token, n_images=1):
    """Sequences of n_images, with n_image_tokens in all, and some text each; the last n_target_tokens are in the loss."""
    rows = len(images[0]) // n_images
    text = torch.randint(0, image_token, (rows, n_text_tokens), generator=torch.Generator().manual_seed(0))
    idx = torch.cat([torch.full((rows, n_image_tokens), image_token), text], 1)
    targets = torch.where(idx == image_token, -1, idx)
    targets[:, :-n_target_tokens] = -1
    return {'idx': idx, 'targets': targets, 'places': dataloader.target_places(targets), 'images': images}


def features():
    """A frozen ViT-B-32 under the quickstart's GPT, 32 images a step: from pixels, and from cached features."""
    config = vision.complete_config(GPTConfig(
        n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=320, bias=False, image_token=256,
        vision_encoder='ViT-B-32/', connector='mlp'))
    rows = 32
    pixels = torch.randint(0, 256, (rows, 49, 32 * 32 * 3), dtype=torch.uint8)
    cached = torch.randn(rows, 49, 768).half()
    grid = torch.zeros(rows, 49, 2, dtype=torch.int64)
    seconds = []
    for name, x in (('the encoder in every step', pixels), ('its features from the cache', cached)):
        seconds.append(median_seconds(make_step(config, make_batch((x, grid), 49, 64, 64, 256))))
        report(name, rows / seconds[-1], 'examples/s')
    report('    times as fast', 100 * seconds[0] / seconds[1], '%')


def vlm():
    """One row for each encoder and batch, each in a process of its own: memory does not come back otherwise."""
    print(f'{"":<32}{"image tokens":>14}{"batch":>6}{"s a step":>10}{"peak GiB":>13}')
    for row in (('gpt2', 'ViT-B-16-quickgelu', '0'), ('gpt2', 'ViT-L-14-quickgelu', '0'),
                ('smollm2', 'ViT-B-16-SigLIP', '0'), ('smollm2', 'ViT-B-16-SigLIP', '64')):
        for rows in (1, 4, 16):
            subprocess.run([sys.executable, __file__, 'vlm_row', *row, str(rows)], check=True)


def vlm_row(text_model, name, lora_rank, rows):
    """
    A step of config/vlm_sft.py, vlm_smollm2.py or vlm_smollm2_lora.py: the image's tokens and 256 of text, of which 128
    are in the loss; AdamW on the GPT, or its LoRA updates, and the connector; float32.
    """
    rows = int(rows)
    shape = dict(image_token=50257, connector='mlp', gelu_approximate='tanh')
    if text_model == 'smollm2':
        shape = dict(image_token=49152, connector='pool', vision_layer=-1, vocab_size=49216, n_layer=30, n_head=9, n_kv_head=3,
                     n_embd=576, n_inner=1536, norm='rmsnorm', position='rope', mlp='swiglu', bias=False)
    lora = dict(lora_rank=int(lora_rank), lora_alpha=128.0)
    config = vision.complete_config(GPTConfig(**shape, **lora, vision_encoder=f'{name}/'))
    image = vision.Image.effect_noise((400, 300), 100).convert('RGB')
    patches = preprocess(image, config)
    images = collate_images([patches] * rows, config)
    batch = make_batch(images, num_tokens(patches, config), 256, 128, config.image_token)
    seconds = median_seconds(make_step(config, batch), 3 if rows < 16 else 1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    label = f'{text_model}, {name}' + (', LoRA' if config.lora_rank else '')
    print(f'{label:<32}{batch["idx"].shape[1] - 256:>14}{rows:>6}{seconds:>10.1f}{memory:>13.1f}', flush=True)


# -----------------------------------------------------------------------------
# models that are too large for one GPU

def fsdp():
    """GPT-2 of 124M parameters under AdamW, by two processes: DDP, FSDP, and FSDP with activations computed again."""
    print(f'{"GB of each process":<36}{"weights":>9}{"gradients":>11}{"optimizer":>11}{"resident":>10}{"s a step":>10}')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', __file__, 'fsdp_row']
    for words in (['--parallel=ddp'], ['--parallel=fsdp'], ['--parallel=fsdp', '--checkpoint_activations=True']):
        subprocess.run([*torchrun, *words], check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def fsdp_row(*words):
    """The sizes after two steps on 2 x 256 random tokens, printed by the first process."""
    config = train_config('--dtype=float32', '--gradient_accumulation_steps=2', *words)
    dist_env = train.setup_distributed(config)
    model = GPT(GPTConfig())
    if config.checkpoint_activations:
        train.recompute_activations(model)
    if config.parallel == 'fsdp':
        train.shard(model, config, dist_env)
    model.to(dist_env.device)
    optimizers = train.configure_optimizers(model, config)
    parallel = train.DDP(model) if config.parallel == 'ddp' else model
    idx = torch.randint(0, 50257, (2, 256))
    batch = to_device({'idx': idx, 'targets': idx, 'places': dataloader.target_places(idx), 'images': None},
                      dist_env.device)
    for _ in range(2):
        start = time.perf_counter()
        parallel(batch)['lm'].backward()
        for opt in optimizers:
            opt.step()
    seconds = time.perf_counter() - start
    gb = lambda tensors: sum(getattr(t, '_local_tensor', t).nbytes for t in tensors) / 1e9
    states = [value for opt in optimizers for state in opt.state.values() for value in state.values()]
    resident = process_memory('VmRSS') * 2**30 / 1e9
    if dist_env.rank == 0:
        sizes = [gb(model.parameters()), gb(p.grad for p in model.parameters()), gb(states)]
        print(f'{" ".join(words):<36}{sizes[0]:>9.2f}{sizes[1]:>11.2f}{sizes[2]:>11.2f}{resident:>10.2f}{seconds:>10.1f}',
              flush=True)
    torch.distributed.barrier()


def sft():
    """
    Samples a second, share of the GPU's peak and memory of config/vlm_sft.py's shape, each row in its own process.

    One NVIDIA H200, bfloat16, torch 2.11, 2026-11-26; samples/s, MFU %, peak GiB:

        documents   padded, eager      packed, eager      padded, compiled   packed, compiled
        8           162    9.1   5.8   156    8.0   4.5   254   14.2   5.6   296   15.1   4.3
        32          345   21.1  16.7   488   26.9   9.2   435   26.6  15.8   647   35.7   8.3
        128         326   20.5  79.5   606   33.3  25.8   392   24.6  78.7   778   42.7  24.1

    With images padded to max_images of a row, so that all sizes are fixed, the last one was 443.
    """
    print(f'{"":<32}{"samples/s":>12}{"MFU %":>8}{"peak GiB":>10}')
    for compiles, packing, rows in itertools.product((False, True), (False, True), (8, 32, 128)):
        try:
            sft_row(rows, f'--packing={packing}', f'--compile={compiles}')
        except torch.OutOfMemoryError:
            print(f'{rows} documents, packing={packing}, compile={compiles}: out of memory', flush=True)


@functools.cache
def sft_model():
    config = train_config('config/vlm_sft.py')
    knobs = {name: getattr(config, name) for name in train.knobs_of(GPTConfig)}
    model_config = vision.complete_config(GPTConfig(**{**knobs, 'image_token': 50257, 'bias': True}))
    return GPT(model_config, load=False).to(find_device())


def sft_row(rows, *words):
    """`rows` documents like LLaVA's, or half as many packed rows: a row holds two or three."""
    rows = int(rows)
    config = train_config('config/vlm_sft.py', *words)
    dist_env = train.setup_distributed(config)
    model = sft_model()
    model_config = model.config
    optimizers = train.configure_optimizers(model, config)
    scaler = torch.amp.GradScaler(dist_env.device_type, enabled=dist_env.dtype == 'float16')
    autocast = torch.autocast(dist_env.device_type, getattr(torch, dist_env.dtype), enabled=dist_env.dtype != 'float32')
    documents = list(llava_like_documents(4 * rows, model_config))
    batches = [dataloader.collate(documents[i:i + rows], model_config) for i in range(0, len(documents), rows)]
    if config.packing:
        stream = dataloader.pack(enumerate(itertools.cycle(documents)), model_config, max(1, rows // 2), config.max_images,
                                   fixed_length=config.compile)
        batches = [next(stream) for _ in range(4)]
    torch._dynamo.reset()
    runs = torch.compile(model) if config.compile else model
    is_cuda = dist_env.device_type == 'cuda'
    if is_cuda:
        forget_cuda_memory()

    def steps():
        for batch in batches:
            loss, *_ = train.train_step(runs, optimizers, scaler, [batch], autocast, config, dist_env, 0)
        loss.item()  # waits for the GPU

    seconds = median_seconds(steps, 3)  # the first time compiles
    n_samples = sum(int(batch['docs'].amax(1).sum()) + len(batch['docs']) if 'docs' in batch else rows for batch in batches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    mfu = 'unknown'
    if is_cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
        flops = sum(train.estimate_flops(model, to_device(batch, dist_env.device)) for batch in batches)
        mfu = f'{100 * (train.estimate_mfu(flops, seconds, dist_env.device) or 0):.1f}'
    label = f'batch {rows}, {"packed" if config.packing else "padded"}, {"compiled" if config.compile else "eager"}'
    print(f'{label:<32}{n_samples / seconds:>12.1f}{mfu:>8}{peak:>10.1f}', flush=True)


# -----------------------------------------------------------------------------
# the same model out of transformers' parts

class Composition(torch.nn.Module):
    """GPT-2 that reads CLIP's penultimate layer through a Linear, as one writes it with transformers."""

    def __init__(self, dropout):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel
        self.encoder = CLIPVisionModel(CLIPVisionConfig(patch_size=16)).requires_grad_(False)
        self.connector = torch.nn.Linear(768, 768)
        self.gpt = GPT2LMHeadModel(GPT2Config(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))
        self.gpt.generation_config.eos_token_id = None  # all answers get equally long

    def embed(self, pixels, ids):
        with torch.no_grad():
            features = self.encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return torch.cat([self.connector(features), self.gpt.transformer.wte(ids)], 1)

    def forward(self, pixels, ids, labels):
        return self.gpt(inputs_embeds=self.embed(pixels, ids), labels=labels).loss

    @torch.no_grad()
    def generate(self, pixels, ids, new_tokens):
        return self.gpt.generate(inputs_embeds=self.embed(pixels, ids), max_new_tokens=new_tokens, do_sample=False,
                                 use_cache=True)


def make_peer(side):
    """
    The model, step() and generate(number of prompts) of 'glimpse', of 'transformers' with the same dropout (none) and AdamW
    (fused), or of 'defaults', with what GPT2Config and torch.optim.AdamW have by default. A step trains GPT and connector
    on two sequences of 196 image tokens and 256 of text, of which 128 are in the loss.
    """
    device = find_device()
    dtype = getattr(torch, best_dtype(device))
    config = vision.complete_config(GPTConfig(
        image_token=50257, vision_encoder='ViT-B-16-quickgelu/', connector='linear', gelu_approximate='tanh'))

    def inputs(rows):
        patches = torch.randint(0, 256, (rows, 196, 16 * 16 * 3), dtype=torch.uint8)
        grid = preprocess(vision.Image.new('RGB', (8, 8)), config)[1].expand(rows, -1, -1)
        batch = to_device(make_batch((patches, grid), 196, 256, 128, config.image_token), device)
        if side == 'glimpse':
            return batch
        labels = torch.where(batch['targets'] < 0, -100, batch['targets'])
        return torch.randn(rows, 3, 224, 224, device=device), batch['idx'][:, 196:], labels

    torch.manual_seed(0)
    if side == 'glimpse':
        model = GPT(config, load=False).to(device)
        rates = ['--learning_rate=1e-4', '--connector_lr=1e-4', '--vision_lr=0']
        optimizer, = train.configure_optimizers(model, train_config(*rates))
        compute_loss = lambda batch: model(batch)['lm'] / model.loss_weight(batch)
        answer = lambda batch: model.generate(batch['idx'], 32, 0, images=batch['images'])
    else:
        is_same = side == 'transformers'
        model = Composition(dropout=0.0 if is_same else 0.1).to(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=is_same)
        compute_loss = lambda batch: model(*batch)
        answer = lambda batch: model.generate(*batch[:2], 32)
    autocast = torch.autocast(device.split(':')[0], dtype, enabled=dtype != torch.float32)
    batches = {rows: inputs(rows) for rows in (1, 2, 8, 32)}

    def step():
        model.train()
        with autocast:
            loss = compute_loss(batches[2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def generate(rows):
        model.eval()
        with autocast:
            return answer(batches[rows]).tolist()

    return SimpleNamespace(model=model, step=step, generate=generate)


def peer():
    """Times of both sides, measured in turn: what else runs on the machine slows both. Memory by a process for each."""
    sides = 'glimpse', 'transformers'
    print(f'{"":<40}{sides[0]:>14}{sides[1]:>14}{"times as fast":>16}')
    print(f'{"peak memory of training":<40}', end='', flush=True)
    for side in sides:  # first: Linux counts the memory of who starts a process as the new one's
        subprocess.run([sys.executable, __file__, 'peer_memory', side], check=True)
    print()
    peers = list(map(make_peer, sides))
    trained = [sum(p.numel() for p in peer.model.parameters() if p.requires_grad) / 1e6 for peer in peers]
    print(f'{"trained parameters":<40}{trained[0]:>13.1f}M{trained[1]:>13.1f}M')

    def compare(name, functions, rounds):
        times = [[], []]
        for i in range(rounds + 1):  # the first round warms up
            for function, seconds in zip(functions, times):
                start = time.perf_counter()
                function()
                seconds += [time.perf_counter() - start] if i else []
        ours, theirs = map(statistics.median, times)
        print(f'{name:<40}{ours:>12.3f} s{theirs:>12.3f} s{theirs / ours:>16.2f}', flush=True)

    step = 'training step, 2 x (196 + 256) tokens'
    compare(step, [peer.step for peer in peers], 7)
    for rows in (32, 8, 1):
        if rows == 1:  # as sample.py does
            sample.store_by_column(peers[0].model)
        pair = [functools.partial(peer.generate, rows) for peer in peers]
        compare(f'32 new tokens after each of {rows} prompts', pair, 3 if rows == 32 else 7)
    print("their dropout of 0.1, and AdamW as it is without fused=True:")
    peers = list(map(make_peer, ('glimpse', 'defaults')))
    compare(step, [peer.step for peer in peers], 7)


def peer_memory(side):
    """Prints the peak memory of some training steps."""
    peer = make_peer(side)
    for _ in range(3):
        peer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    print(f'{peak:>10.2f} GiB', end='', flush=True)


# -----------------------------------------------------------------------------
# published models in their real shapes: generation next to Hugging Face's class, memory of fine-tuning

LLAMA = dict(bias=False, norm='rmsnorm', position='rope', mlp='swiglu', image_positions='each', tie_weights=False)
SMOL = dict(**LLAMA, vision_encoder='siglip', vision_layer=-1, connector='shuffle', image_fit='squash', vocab_size=49280,
            image_token=49190, block_size=8192, rope_theta=1e5, tile_marks=True, max_image_side=2048)
SIGLIP_B = dict(pool_size=4, image_size=512, vision_n_layer=12, vision_n_head=12, vision_n_embd=768)
SIGLIP_SO400M = dict(pool_size=3, image_size=384, patch_height=14, patch_width=14, vision_n_layer=27, vision_n_head=16,
                     vision_n_embd=1152, vision_n_inner=4304)
CLIP_L = dict(vision_encoder='clip', vision_layer=-2, connector='mlp', image_fit='crop', image_size=336, patch_height=14,
              patch_width=14, vision_n_layer=24, vision_n_head=16, vision_n_embd=1024)
PUBLISHED = {
    'SmolVLM-256M': dict(**SMOL, **SIGLIP_B, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536),
    'SmolVLM-500M': dict(**SMOL, **SIGLIP_B, n_layer=32, n_head=15, n_kv_head=5, n_embd=960, n_inner=2560),
    'SmolVLM2-2.2B': dict(**SMOL, **SIGLIP_SO400M, n_layer=24, n_head=32, n_embd=2048, n_inner=8192),
    'LLaVA-1.5-7B': dict(**LLAMA, **CLIP_L, n_layer=32, n_head=32, n_embd=4096, n_inner=11008, vocab_size=32064,
                         image_token=32000, block_size=4096)}


def tiles_batch(config, rows, n_tiles):
    """Rows of an image of so many tiles and 256 tokens of text, of which 128 are in the loss."""
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tile = preprocess(vision.Image.fromarray(pixels.numpy()), config)
    images = collate_images([tile] * (rows * n_tiles), config)
    batch = make_batch(images, n_tiles * num_tokens(tile, config), 256, 128, config.image_token, n_tiles)
    return {**batch, 'lengths': torch.full((rows,), batch['idx'].shape[1])}


def open_published(side, folder, n_prompts=1):
    """generate(batch) of the model in a folder, by 'glimpse' or 'transformers': 64 new tokens. Returns the ids, the seconds
    to the first new one and the median seconds of a further one, as the processor counts them for this process.
    """
    config = GPTConfig(**PUBLISHED['SmolVLM-256M'])
    if side == 'glimpse':
        model = weights.load_model(folder).float().eval()
        if n_prompts == 1:  # as in sample.py
            sample.store_by_column(model)
        answer = lambda batch: model.generate(batch['idx'], 64, 0, images=batch['images'])
    else:
        from transformers import SmolVLMForConditionalGeneration
        model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        answer = lambda batch: model.generate(**to_transformers(batch, config), max_new_tokens=64, min_new_tokens=64,
                                              do_sample=False, eos_token_id=None, pad_token_id=0)
    clock = []
    model.lm_head.register_forward_hook(lambda *_: clock.append(time.process_time()))

    def generate(batch):
        start = time.process_time()
        ids = answer(batch)
        return ids, clock[-64] - start, float(np.median(np.diff(clock[-64:])))

    return generate


def to_transformers(batch, config):
    """A batch as Hugging Face's processor makes it."""
    tiles = [torch.from_numpy(np.array(assemble(*tile, config))) for tile in zip(*batch['images'])]
    pixels = torch.stack(tiles).permute(0, 3, 1, 2) / 127.5 - 1
    pixels = pixels.unflatten(0, (len(batch['idx']), -1))                       # (B, n_tiles, 3, H, W)
    return {'input_ids': batch['idx'], 'attention_mask': torch.ones_like(batch['idx']), 'pixel_values': pixels}


def published():
    """In float32: memory by a process for each side, median times of one thread in three rounds, by turns."""
    torch.set_num_threads(1)  # of several, the processor's time says little
    sides = 'glimpse', 'transformers'
    config = GPTConfig(**PUBLISHED['SmolVLM-256M'])
    with tempfile.TemporaryDirectory() as folder:
        settings, state = weights.to_hugging_face(GPT(config))  # random weights
        Path(folder, 'config.json').write_text(json.dumps(settings))
        state = {name: tensor.bfloat16() for name, tensor in state.items()}  # as they are published
        save_file(state, f'{folder}/model.safetensors', metadata={'format': 'pt'})
        print(f'{"peak GiB, one image of five tiles":<44}{"loading":>12}{"generation":>12}')
        for side in sides:
            subprocess.run([sys.executable, __file__, 'published_memory', side, folder], check=True)
        print(f'{"":<44}{sides[0]:>12}{sides[1]:>14}{"times as fast":>16}')
        for rows, n_tiles in ((1, 1), (1, 5), (4, 1)):
            models = [open_published(side, folder, rows) for side in sides]
            batch = tiles_batch(config, rows, n_tiles)
            rounds = [[generate(batch) for generate in models] for _ in range(4)][1:]  # the first one warms up
            first = f'{rows} x ({batch["idx"].shape[1] - 256} + 256) tokens: the first new one'
            for place, name in ((1, first), (2, '    each further one')):
                ours, theirs = (statistics.median(pair[side][place] for pair in rounds) for side in (0, 1))
                print(f'{name:<44}{ours:>10.3f} s{theirs:>12.3f} s{theirs / ours:>16.2f}', flush=True)
            if not torch.equal(*(ids for ids, *_ in rounds[0])):
                print('    their answers differ')


def published_memory(side, folder):
    generate = open_published(side, folder)
    loading = process_memory('VmHWM')
    Path('/proc/self/clear_refs').write_text('5')  # VmHWM starts again
    generate(tiles_batch(GPTConfig(**PUBLISHED['SmolVLM-256M']), 1, 5))
    print(f'{side:<44}{loading:>12.2f}{process_memory("VmHWM"):>12.2f}', flush=True)


def in_float32(norm):
    """A norm as autocast has it on CUDA. That of a CPU, which is used here, has it in bfloat16."""
    return lambda *args: norm(*tree_map_only(torch.Tensor, torch.Tensor.float, args))


class Allocations(TorchDispatchMode):
    """The bytes of all tensors that operations make, and of those given: now, and at most."""

    def __init__(self, tensors):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()
        self.add(tensors)

    def add(self, tensors):
        for storage in {x.untyped_storage() for x in tree_leaves(tensors) if torch.is_tensor(x)}:
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def remove(self, storage, size):
        self.storages.discard(storage)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(result)
        return result


def open_finetuning(model_config, config, dtype):
    """(model, its optimizers) as train.py has them: frozen weights in dtype, trained ones in float32."""
    model = GPT(model_config)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    if config.checkpoint_activations:
        train.recompute_activations(model)
    return model, train.configure_optimizers(model, config)


def computed_peak(model_config, config, dtype, n_tiles):
    """GiB of tensors in the second step of train.py, computed by tensors that have shapes and no numbers."""
    batch = tiles_batch(model_config, config.batch_size, n_tiles)
    norms = {name: in_float32(getattr(F, name)) for name in ('layer_norm', 'rms_norm')}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, optimizers = open_finetuning(model_config, config, dtype)
        allocations = Allocations(list(model.parameters()))
        # embed's checks need numbers; a compiled model has none of them
        compiling = mock.patch('torch.compiler.is_compiling', return_value=True)
        with allocations, compiling, mock.patch.multiple(F, **norms):
            for _ in range(2):
                with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = model(batch)['lm'] / model.loss_weight(batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    return allocations.peak / 2**30


def fine_tune(model_config, config, dtype, n_tiles):
    """Three steps of train.py."""
    dist_env = train.setup_distributed(config)
    with torch.device(dist_env.device):
        model, optimizers = open_finetuning(model_config, config, dtype)
    model.to(dist_env.device)
    if dist_env.device_type == 'cuda':
        forget_cuda_memory()
    batch = tiles_batch(model_config, config.batch_size, n_tiles)
    scaler = torch.amp.GradScaler(dist_env.device_type, enabled=False)
    autocast = torch.autocast(dist_env.device_type, dtype, enabled=dtype != torch.float32)
    for _ in range(3):
        train.train_step(model, optimizers, scaler, [batch], autocast, config, dist_env, 0)


def memory(*words):
    """
    GiB of a step by model, image and LoRA rank, without and with checkpoint_activations, and the smallest card that holds
    it. Computed for eager bfloat16; a GiB is added for CUDA and for gaps. First the same in float32, next to what it takes.
    With a CUDA device at hand, what PyTorch allocates there stands next to what is computed.
    """
    # freed memory goes back to the system at once, and does not count
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}
    subprocess.run([sys.executable, __file__, 'memory_on_cpu', *words], check=True, env=env)
    config = train_config('config/finetune.py', *words, '--compile=False')
    head = f'{"GiB":>8}{"on CUDA":>9}{"GB card":>9}'
    print(f'{"":<15}{"image tokens":>13}{"LoRA":>6}{head}    {"checkpointed:":>13}{head}')
    for name, n_tiles, rank in itertools.product(PUBLISHED, (1, 17), (8, 64)):
        if 'LLaVA' in name and n_tiles > 1:
            continue
        model_config = GPTConfig(**{**PUBLISHED[name], 'block_size': config.block_size}, lora_rank=rank)
        n_image_tokens = tiles_batch(model_config, 1, n_tiles)['idx'].shape[1] - 256
        print(f'{name:<15}{n_image_tokens:>13}{rank:>6}', end='', flush=True)
        for config.checkpoint_activations in (False, True):
            peak = computed_peak(model_config, config, torch.bfloat16, n_tiles)
            measured = ''
            if torch.cuda.is_available():
                fine_tune(model_config, config, torch.bfloat16, n_tiles)
                measured = f'{torch.cuda.max_memory_allocated() / 2**30:.1f}'
            card = next((size for size in (8, 16, 24, 80) if peak + 1 <= size), 'none')
            print(f'{peak:>{25 if config.checkpoint_activations else 8}.1f}{measured:>9}{card:>9}', end='', flush=True)
        print()


def memory_on_cpu(*words):
    """Steps of train.py on this CPU in float32: how much the process grew at most, and what is computed for that."""
    config = train_config('config/finetune.py', *words, '--device=cpu', '--dtype=float32', '--compile=False')
    model_config = GPTConfig(**PUBLISHED['SmolVLM-256M'], lora_rank=8)
    computed = computed_peak(model_config, config, torch.float32, 1)
    before = process_memory('VmRSS')
    fine_tune(model_config, config, torch.float32, 1)
    report('SmolVLM-256M, 64 image tokens, LoRA 8, float32: measured', process_memory('VmHWM') - before, 'GiB', 2)
    report('    computed', computed, 'GiB', 2)


def rows(count):
    """A generated .jsonl of conversations with an image each; memory is the anonymous memory of this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'rows.jsonl')
        with open(path, 'w') as f:
            for i in range(int(count)):
                question = {'role': 'user', 'content': f'<image>\nWhat is in image {i}?'}
                messages = [question, {'role': 'assistant', 'content': 'A cat.'}]
                print(json.dumps({'messages': messages, 'images': [f'images/{i:08d}.jpg']}), file=f)
        report('file', os.path.getsize(path) / 1e6, 'MB')
        before = process_memory('RssAnon')
        for name in ('opened for the first time, every row checked', 'opened again'):
            start = time.perf_counter()
            dataset = dataloader.FileRows(path)
            report(name, time.perf_counter() - start, 's', digits=2)
        examples = dataloader.Examples(dataset, SimpleNamespace(tasks='ocr', augment=''), seed=0)
        start = time.perf_counter()
        for i in range(100_000):
            examples[i]
        report('rows in random order', 100_000 / (time.perf_counter() - start), 'rows/s')
        report('memory that all this took', 1024 * (process_memory('RssAnon') - before), 'MiB')


def attention(run):
    """For each letter of 200 held-out lines: is the column of patches that it was predicted from, the one with most attention
    (the mean of a layer's heads), the column where the letter stands, or one next to it? Letters stand where the font puts
    them in the line.
    """
    model, enc, config, _ = sample.load(f'{run}/ckpt.pt')
    examples = evaluate.held_out_examples(config.dataset, config, 'ocr')
    face = render.load_font(config.font, 100)
    hits = torch.zeros(2, model.config.n_layer)
    n = 0
    for i in range(200):
        example = examples[i]
        text = evaluate.reference(example)
        tokens = dataloader.tokenize(example, enc, model.config)
        targets = [place for place, target in enumerate(tokens['targets']) if target >= 0][:-1]  # not the end
        if len(targets) != len(text):  # a letter of several bytes
            continue
        batch = dataloader.collate([tokens], model.config)
        weights = model.attention(batch['idx'], batch['images'])[:, 0].mean(1)           # (n_layer, T, T)
        columns = tokens['images'][0][1][:, 1]
        is_image = batch['idx'][0] == model.config.image_token
        n_columns = int(columns.max()) + 1
        for number, place in enumerate(targets):
            middle = (face.getlength(text[:number]) + face.getlength(text[:number + 1])) / 2 / face.getlength(text)
            hottest = columns[weights[:, place, is_image].argmax(-1)]                    # (n_layer,)
            distance = (hottest - int(middle * n_columns)).abs()
            hits += torch.stack([distance == 0, distance <= 1])
            n += 1
    for layer, (exact, near) in enumerate((100 * hits / n).T.tolist(), 1):
        report(f'layer {layer}, letters in the hottest column', exact, '%')
        report('    or in one next to it', near, '%')


if __name__ == '__main__':
    modes = {'attention': attention, 'features': features, 'vlm': vlm, 'vlm_row': vlm_row, 'rows': rows, 'pack': packed,
             'compile': compiled, 'fsdp': fsdp, 'fsdp_row': fsdp_row, 'peer': peer, 'peer_memory': peer_memory, 'sft': sft,
             'sft_row': sft_row, 'published': published, 'published_memory': published_memory, 'memory': memory,
             'memory_on_cpu': memory_on_cpu}
    if len(sys.argv) > 1 and sys.argv[1] in modes:
        modes[sys.argv[1]](*sys.argv[2:])
    else:
        quickstart()
