"""
Speed and memory on this machine: not a test, a measurement. Medians of several rounds; of vlm's batch of 16, one round.

    $ python tests/bench.py                      # the quickstart's model; the knobs of train.py change it: --batch_size=32
    $ python tests/bench.py features             # a frozen ViT-B-32 running in every step, and its features stored once
    $ python tests/bench.py vlm                  # GPT-2 with CLIP, SmolLM2 with SigLIP: a step's time and memory by batch

Towers have random weights here: they cost what trained ones cost.
"""

import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
import train  # noqa: E402
import vision  # noqa: E402
from configurator import configure  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


def median_seconds(function, rounds=7):
    """The median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(what, value, unit):
    print(f'{what:<58}{value:>12,.0f} {unit}')


def quickstart():
    knobs = SimpleNamespace(**configure(vars(train), ['config/quickstart.py', *sys.argv[1:]]))
    place = train.start_processes(knobs)
    torch.manual_seed(knobs.seed)
    tokenizer = prepare_data.get_tokenizer(knobs.tokenizer)
    model, _ = train.build_model(knobs, tokenizer)
    model.to(place.device)
    optimizers = model.configure_optimizers(knobs.weight_decay, knobs.learning_rate, (knobs.beta1, knobs.beta2),
                                            place.device_type, knobs.vision_lr, knobs.connector_lr, knobs.optimizer,
                                            knobs.muon_lr)
    scaler = torch.amp.GradScaler(place.device_type, enabled=False)
    autocast = torch.autocast(place.device_type, dtype=getattr(torch, place.dtype), enabled=place.dtype != 'float32')
    examples = prepare_data.Examples(prepare_data.open_rows(knobs.dataset, 'train'), knobs, knobs.seed)
    batches = prepare_data.Batches(examples, tokenizer, model.config, knobs.batch_size, knobs.loss_on)
    batch = batches[0]
    print(f'{torch.get_num_threads()} threads, {place.device_type}, {place.dtype}, torch {torch.__version__}', file=sys.stderr)

    step = median_seconds(lambda: train.train_step(model, optimizers, scaler, [batch], autocast, knobs, place, 0))
    report('training, image and text tokens', int(batch['lengths'].sum()) / step, 'tokens/s')
    report('training, examples', knobs.batch_size / step, 'examples/s')

    model.eval()
    prompts = prepare_data.collate([prepare_data.tokenize(examples[i], tokenizer, model.config, prompt_only=True)
                                    for i in range(knobs.batch_size)], model.config)
    images = tuple(t.to(place.device) for t in prompts['images'])
    one = prepare_data.collate([prepare_data.tokenize(examples[0], tokenizer, model.config, prompt_only=True)], model.config)
    one_image = tuple(t.to(place.device) for t in one['images'])
    new = 32
    seconds = median_seconds(lambda: model.generate(prompts['idx'].to(place.device), new, 0, images=images,
                                                    lengths=prompts['lengths']), 5)
    report(f'generation, {knobs.batch_size} prompts at once', knobs.batch_size * new / seconds, 'tokens/s')
    seconds = median_seconds(lambda: model.generate(one['idx'].to(place.device), new, 0, images=one_image,
                                                    lengths=one['lengths']), 5)
    report('generation, one prompt', new / seconds, 'tokens/s')

    torch.set_num_threads(1)  # as in a loader's worker
    count = iter(range(10**9))
    drawn = knobs.batch_size / median_seconds(lambda: batches[next(count)])
    report('drawn and tokenized by one worker, examples', drawn, 'examples/s')
    report('    times what training takes', drawn * step / knobs.batch_size * 100, '%')
    rng, lines = random.Random(0), SimpleNamespace(**{**vars(knobs), 'distort': 0.0})
    texts = [row['text'] for row in prepare_data.open_rows('pydoc', 'train')]
    report('lines drawn on one core, without augmentation',
           50 / median_seconds(lambda: [prepare_data.read(rng.choice(texts), rng, lines) for _ in range(50)]), 'lines/s')
    page = SimpleNamespace(**{**vars(lines), 'one_line': False, 'image_width': 448, 'image_height': 448, 'min_chars': 400,
                              'max_chars': 600, 'font_min': 12})
    report('pages of 448x448 and 400-600 characters on one core',
           20 / median_seconds(lambda: [prepare_data.read(rng.choice(texts), rng, page) for _ in range(20)], 3), 'pages/s')
    report('peak memory of this process', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 'MiB')


def step_of(config, idx, targets, images):
    """A training step of a GPT with a frozen tower: everything but the tower learns."""
    model = GPT(config, load_tower=False)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu', vision_lr=0)[0]

    def step():
        model(idx, targets, images(model), return_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def sequences(batch, image_tokens, text_tokens, vocab_size):
    """idx and targets of one image and some text each."""
    text = torch.randint(0, vocab_size, (batch, text_tokens), generator=torch.Generator().manual_seed(0))
    idx = torch.cat([torch.full((batch, image_tokens), vocab_size), text], 1)
    return idx, torch.where(idx == vocab_size, -1, idx)


def features():
    """A frozen ViT-B-32 under the quickstart's GPT, 32 images a step: from pixels, and from stored features."""
    config = GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=320, bias=False, image_token=256,
                       vision_encoder='ViT-B-32/', connector='mlp')
    batch = 32
    idx, targets = sequences(batch, 49, 64, 256)
    pixels = torch.randint(0, 256, (batch, 49, 32 * 32 * 3), dtype=torch.uint8)
    grid = torch.zeros(batch, 49, 2, dtype=torch.int64)
    stored = torch.randn(batch, 49, 768).half()
    seconds = [median_seconds(step_of(config, idx, targets, lambda model, x=x: (x, grid))) for x in (pixels, stored)]
    for name, s in zip(('the tower in every step', 'its features from the store'), seconds):
        report(name, batch / s, 'examples/s')
    report('    times as fast', 100 * seconds[0] / seconds[1], '%')


def vlm():
    """One row for each encoder and batch, each in a process of its own: memory does not come back otherwise."""
    print(f'{"":<32}{"image tokens":>14}{"batch":>6}{"s a step":>10}{"GiB at most":>13}')
    for row in (('gpt2', 'ViT-B-16-quickgelu', '0'), ('gpt2', 'ViT-L-14-quickgelu', '0'),
                ('smollm2', 'ViT-B-16-SigLIP', '0'), ('smollm2', 'ViT-B-16-SigLIP', '64')):
        for batch in (1, 4, 16):
            subprocess.run([sys.executable, __file__, 'vlm_row', *row, str(batch)], check=True)


def vlm_row(text_model, name, lora_rank, batch):
    """
    A step of config/vlm_sft.py, vlm_smollm2.py or vlm_smollm2_lora.py: the picture's tokens and 256 of text, of which 128
    are learnt; AdamW on the GPT, or its LoRA updates, and the connector; float32.
    """
    batch, shape = int(batch), dict(image_token=50257, connector='mlp', gelu_approximate='tanh')
    if text_model == 'smollm2':
        shape = dict(image_token=49152, connector='pool', vision_layer=-1, vocab_size=49216, n_layer=30, n_head=9, n_kv_head=3,
                     n_embd=576, n_inner=1536, norm='rmsnorm', position='rope', mlp='swiglu', bias=False)
    config = GPTConfig(**shape, vision_encoder=f'{name}/', lora_rank=int(lora_rank), lora_alpha=128.0)
    image = prepare_data.Image.effect_noise((400, 300), 100).convert('RGB')
    vision.Tower(config, load=False)  # writes its size into the config
    picture = vision.preprocess(image, config)
    idx, targets = sequences(batch, vision.num_tokens(picture, config), 256, config.image_token)
    targets[:, :-128] = -1
    images = vision.collate([picture] * batch, config)
    seconds = median_seconds(step_of(config, idx, targets, lambda model: images), 3 if batch < 16 else 1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    what = f'{text_model}, {name}' + (', LoRA' if config.lora_rank else '')
    print(f'{what:<32}{idx.shape[1] - 256:>14}{batch:>6}{seconds:>10.1f}{memory:>13.1f}', flush=True)


if __name__ == '__main__':
    modes = {'features': features, 'vlm': vlm, 'vlm_row': vlm_row}
    if len(sys.argv) > 1 and sys.argv[1] in modes:
        modes[sys.argv[1]](*sys.argv[2:])
    else:
        quickstart()
