"""
Speed and memory of the quickstart model on this machine: not a test, a measurement. Medians of several rounds.

    $ python tests/bench.py                      # the knobs of train.py change what is measured: --batch_size=32
"""

import os
import random
import resource
import statistics
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
from configurator import configure  # noqa: E402


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


def main():
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
    rng, lines = random.Random(0), SimpleNamespace(**{**vars(knobs), 'augment': 0.0})
    texts = [row['text'] for row in prepare_data.open_rows('pydoc', 'train')]
    report('lines drawn on one core, without augmentation',
           50 / median_seconds(lambda: [prepare_data.read(rng.choice(texts), rng, lines) for _ in range(50)]), 'lines/s')
    page = SimpleNamespace(**{**vars(lines), 'one_line': False, 'image_width': 448, 'image_height': 448, 'min_chars': 400,
                              'max_chars': 600, 'font_min': 12})
    report('pages of 448x448 and 400-600 characters on one core',
           20 / median_seconds(lambda: [prepare_data.read(rng.choice(texts), rng, page) for _ in range(20)], 3), 'pages/s')
    report('peak memory of this process', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 'MiB')


if __name__ == '__main__':
    main()
