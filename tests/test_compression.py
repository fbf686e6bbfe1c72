"""How much text fits into an image token: the table, its baselines, its plot."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, inside, refused
from PIL import Image

import evaluate
from dataloader import get_tokenizer
from render import CURVE_COLORS, plot
from vision import VisionConfig, complete_config

PAGES = ['--image_size=32', '--line_height=0', '--image_width=32', '--image_height=32', '--one_line=False', '--patch_height=8']


def pages(texts):
    return [{'messages': [{'role': 'user', 'content': '<image>'}, {'role': 'assistant', 'content': text}],
             'images': [Image.new('RGB', (32, 32), (i, 0, 0))]} for i, text in enumerate(texts)]


def read(texts, answers, **changes):
    """evaluate.read_pages of pages for which a model would give these answers: those of the images, of blank and of others."""
    knobs = dict(vision_encoder='vit', connector='linear', image_size=32, patch_height=8, patch_width=8)
    config = complete_config(VisionConfig(**{**knobs, **changes}))
    model = SimpleNamespace(config=config)
    model.eval = lambda: model
    answers = iter(answers)
    evaluation = SimpleNamespace(questions=pages(texts), enc=get_tokenizer('bytes'), generate=lambda examples: next(answers))
    return evaluate.read_pages(evaluation, model, torch.autocast('cpu', enabled=False))


@pytest.fixture(autouse=True)
def text_tokens_are_bytes(monkeypatch):
    monkeypatch.setattr(evaluate, 'text_tokenizer', lambda enc: enc)


def test_precision_is_that_of_each_answer():
    texts = ['a page', 'another page of text', 'x']
    rows = read(texts, [['a page', 'another page', 'x' * 50], ['', 'a', ''], ['another', 'a page', 'y']])
    assert [row['precision'] for row in rows] == pytest.approx([1, 12 / 20, 0])  # 49 edits of a character are not below 0
    assert [row['blank'] for row in rows] == pytest.approx([0, 1 / 20, 0])
    assert rows[2]['shuffled'] == 0 and rows[0]['shuffled'] < 0.5
    # 16 places hold a text of 6 bytes, and 16 of 20
    assert [row['truncated'] for row in rows] == pytest.approx([1, 16 / 20, 1])
    assert [row['characters'] for row in rows] == [row['text_tokens'] for row in rows] == [6, 20, 1]


def test_newlines_take_places_but_are_no_tokens():
    rows = read(['a page of text that is long'], [['']] * 3, image_newlines=True)
    assert (rows[0]['image_tokens'], rows[0]['places']) == (16, 16 + 4 + 1)
    assert rows[0]['truncated'] == pytest.approx(21 / 27)


def test_a_table_has_the_means_of_each_bucket():
    rows = [{'characters': 4 * n, 'text_tokens': n, 'image_tokens': 8, 'places': 10, 'precision': p, 'blank': 0.0,
             'shuffled': 0.25, 'truncated': 1.0} for n, p in ((10, 1.0), (19, 0.5), (20, 0.2), (45, 0.0))]
    table = evaluate.compression_table('run', rows, 10)
    assert [line['text tokens'] for line in table] == ['all', '10-20', '20-30', '40-50']
    assert [line['pages'] for line in table] == [4, 2, 1, 1]
    assert [line['precision'] for line in table] == [0.425, 0.75, 0.2, 0]
    assert table[1]['characters / image token'] == pytest.approx(58 / 8, abs=1e-3)
    assert table[1]['characters / place'] == 5.8 and table[1]['text tokens / place'] == 1.45
    assert table[1]['text tokens / image token'] == pytest.approx(14.5 / 8, abs=1e-3)
    assert len(evaluate.compression_table('run', rows, 0)) - 1 <= 7
    fox = [{**rows[0], 'text_tokens': n} for n in (600, 699, 700, 1299)]
    assert [line['text tokens'] for line in evaluate.compression_table('fox', fox, 100)[1:]] == [
        '600-700', '700-800', '1200-1300']


def test_a_plot_shows_each_point_where_it_is():
    image = plot({'a': [[(0, 0), (10, 1)]], 'b': [[(5, 0.5)], [(10, 0)]]}, 'x', 'y')
    a, b = (tuple(int(color[i:i + 2], 16) for i in (1, 3, 5)) for color in CURVE_COLORS[:2])
    left, top, right, bottom = 60, 20, 780, 450
    assert image.getpixel((left, bottom)) == image.getpixel((right, top)) == a
    assert image.getpixel((right, bottom)) == b
    assert image.getpixel(((left + right) // 2 + 40, (top + bottom) // 2)) != b  # a point, no line from one run to another
    plot({}, 'x', 'y')
    plot({'nothing': [[(0, 2.0)]]}, 'x', 'y')


def test_runs_are_compared(tmp_path):
    sizes = ['--min_chars=6', '--max_chars=12']
    for name, more in (('a', ['--vision_encoder=deepencoder_tiny', '--patch_width=8', '--vision_n_embd=24']),
                       ('b', ['--connector=pool', '--pool_size=4'])):
        process = inside('train.py', *TINY, *PAGES, *sizes, *more, f'--out_dir={tmp_path}/{name}')
        assert process.returncode == 0, process.stderr
    process = inside('sample.py', '--compression', tmp_path / 'a', tmp_path / 'b', '--eval=pydoc', '--eval_samples=6',
                     '--bucket=2', f'--out_dir={tmp_path}/out')
    assert process.returncode == 0, process.stderr
    printed = [json.loads(line) for line in process.stdout.splitlines()]
    assert [line['run'] for line in printed] == [f'{tmp_path}/a', f'{tmp_path}/b']
    with open(tmp_path / 'out' / 'compression.csv') as f:
        table = list(csv.DictReader(f))
    for run, places in (('a', 3), ('b', 1)):
        lines = [line for line in table if line['run'] == f'{tmp_path}/{run}']
        assert lines[0]['text tokens'] == 'all' and sum(int(line['pages']) for line in lines[1:]) == 6
        assert all(float(line['image tokens']) == 1 and float(line['places']) == places for line in lines)
        for line in lines:
            assert all(0 <= float(line[key]) <= 1 for key in ('precision', 'blank', 'shuffled', 'truncated'))
    # both have read the same texts
    assert table[0]['characters / image token'] == next(line for line in table if line['run'].endswith('b'))[
        'characters / image token']
    assert Image.open(tmp_path / 'out' / 'compression.png').size == (800, 500)


def test_what_has_no_pages_is_refused(tmp_path):
    assert inside('train.py', *TINY, '--vision_encoder=', '--tasks=text', f'--out_dir={tmp_path}/text').returncode == 0
    refused(inside('sample.py', '--compression', tmp_path / 'text', '--eval=pydoc', f'--out_dir={tmp_path}/out'),
            'needs held-out pages, with one image and its text each')
    refused(inside('sample.py', '--compression', tmp_path / 'nothing', '--eval=pydoc'), 'no checkpoint at')
