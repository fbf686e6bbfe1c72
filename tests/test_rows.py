"""Rows, examples, tasks, images and archives: nothing is lost or ignored without a message, and nothing grows with the data."""

import bz2
import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import inside, refused, tiny_config
from PIL import Image, ImageOps

import dataloader
import render
from dataloader import (
    IMAGE,
    Examples,
    FileRows,
    hash64,
    image_error,
    is_held_out,
    load_image,
    open_rows,
    read_bytes,
    shuffled_index,
    to_example,
)
from evaluate import held_out_examples
from patches import crop_line, preprocess
from render import parse_tasks

KNOBS = SimpleNamespace(tasks='ocr:1', one_line=True, font='', font_min=6, font_max=60, image_width=256, image_height=16,
                        min_chars=16, max_chars=32, min_span=60, max_span=120, infix_min=0.1, infix_max=0.4, distort=0.0,
                        augment='', char_level=False, max_aspect=1.0, blank_images=0.0, overfit_rows=0)


def knobs(**changes):
    return SimpleNamespace(**{**vars(KNOBS), **changes})


def write(path, content):
    path.write_text(content, encoding='utf-8')
    return str(path)


def write_rows(path, rows):
    return write(path, '\n'.join(map(json.dumps, rows)) + '\n')


def red(width=16, height=8):
    return Image.new('RGB', (width, height), 'red')


def image_bytes(color='red', image_format='PNG', size=(40, 30)):
    file = io.BytesIO()
    Image.new('RGB', size, color).save(file, image_format)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# rows as others write them

TURNS = [{'role': 'user', 'content': '<image>\nWhat is it?'}, {'role': 'assistant', 'content': 'A cat.'}]
PARTS = [{'type': 'image'}, {'type': 'text', 'text': '\nWhat is it?'}]


@pytest.mark.parametrize('row', [
    {'messages': TURNS, 'images': ['a.png']},
    {'messages': TURNS, 'image': 'a.png'},
    {'messages': TURNS, 'images': None, 'image_path': 'a.png', 'text': None},
    {'messages': TURNS, 'image_paths': ['a.png']},
    {'messages': [{'role': 'user', 'content': 'What is it?'}, TURNS[1]], 'image': 'a.png'},
    {'messages': [{'role': 'user', 'content': PARTS}, {'role': 'assistant', 'content': [{'type': 'text', 'text': 'A cat.'}]}],
     'images': ['a.png']},
    {'messages': [{'role': 'user', 'content': [{**part, 'text': part.get('text')} for part in PARTS]}, TURNS[1]],
     'images': ['a.png']},  # as parquet gives them: every part has every key
    {'conversations': [{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'A cat.'}],
     'image': 'a.png'},
    {'conversations': [{'from': 'user', 'value': 'What is it?'}, {'from': 'assistant', 'value': 'A cat.'}],
     'image': ['a.png']},
])
def test_conversations_of_others_become_messages_and_images(row):
    assert to_example(row, '/data') == {'messages': TURNS, 'images': ['/data/a.png']}


def test_images_that_the_text_does_not_mention_come_first():
    assert to_example({'text': 'A cat.', 'image': 'a.png'}, '') == {'text': '<image>A cat.', 'images': ['a.png']}
    two = to_example({'text': 'Two.', 'images': ['a.png', '/abs/b.png'], 'id': 7}, 'data')
    assert two == {'text': '<image><image>Two.', 'images': ['data/a.png', '/abs/b.png'], 'id': 7}
    system = {'role': 'system', 'content': 'Be brief.'}
    example = to_example({'messages': [system, {'role': 'user', 'content': 'Hi'}], 'images': ['a.png', 'b.png']}, '')
    assert example['messages'] == [system, {'role': 'user', 'content': '<image>\n<image>\nHi'}]
    assert to_example({'text': 'a <image> b', 'image': 'a.png'}, '')['text'] == 'a <image> b'
    assert to_example({'text': 'an <image> tag'}, '') == {'text': 'an <image> tag'}


def test_a_text_with_an_empty_list_of_images_is_an_example_and_others_are_what_tasks_make_of_them(tmp_path):
    path = write_rows(tmp_path / 'x.jsonl', [{'text': 'A document of text.', 'images': []}, {'text': 'A text to be drawn.'}])
    examples = Examples(FileRows(path), KNOBS, seed=0, shuffle=False)
    assert examples[0] == {'text': 'A document of text.', 'images': []}
    assert len(examples[1]['images']) == 1 and 'messages' in examples[1]


@pytest.mark.parametrize('key', ['img', 'image_file', 'picture', 'photo', 'jpg', 'png', 'image_url', 'Image', 'image_0',
                                 'photos'])
@pytest.mark.parametrize('value', ['a.png', ['a.png'], {'bytes': None, 'path': 'a.png'}])
def test_a_key_that_looks_like_an_image_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f'the key "{key}" looks like an image'):
        to_example({'text': 'A cat.', key: value}, '')


@pytest.mark.parametrize('row', [
    {'text': 'x', 'image': {'bytes': 'abc', 'path': None}}, {'text': 'x', 'images': [{'path': 'a.png'}]},
    {'text': 'x', 'image': red()}, {'text': 'x', 'image': 'a.png', 'image_path': 'b.png'}])
def test_an_image_that_is_no_path_or_named_twice_is_refused(row):
    with pytest.raises(ValueError, match='looks like an image and is not understood'):
        to_example(row, '')


def test_numbers_captions_and_empty_values_are_no_images():
    row = {'text': 'A cat.', 'image_id': 3, 'image_width': 640, 'image_caption': 'a cat', 'jpg': '', 'images': []}
    assert to_example(row, '')['images'] == []


@pytest.mark.parametrize('row, message', [
    ({'txt': 'a'}, 'expected an object with "text" or "messages"'), ({'text': 3}, 'expected an object'),
    ([1], 'expected a message by'),
    ({'messages': []}, 'expected an object'), ({'messages': [{'role': 'robot', 'content': 'x'}]}, 'expected a message by'),
    ({'messages': [{'role': 'user', 'content': None}]}, 'expected a message'), ({'messages': ['Hi']}, 'expected a message'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image', 'image': 'a.png'}]}]}, 'expected a message'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': 'a.png'}]}]}, 'expected a message'),
    ({'text': '<image><image>', 'image': 'a.png'}, '2 <image> places for 1 images')])
def test_rows_that_are_not_understood_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        to_example(row, '')


def test_a_folder_with_train_and_val_and_images_next_to_them(tmp_path):
    red().save(tmp_path / '1.png')
    row = {'messages': [{'role': 'user', 'content': '<image>'}], 'images': None, 'image_path': '1.png', 'id': 7}
    write(tmp_path / 'train.jsonl', json.dumps(row) + '\n' + json.dumps({'text': 'plain'}))
    write(tmp_path / 'val.jsonl', json.dumps(row))
    rows = open_rows(str(tmp_path), 'train')
    assert len(rows) == 2 and rows[1] == {'text': 'plain'}
    assert Examples(rows, KNOBS, 0).rows[0]['images'] == [str(tmp_path / '1.png')]
    assert preprocess(load_image(rows[0]['images'][0]), tiny_config())[1].shape == (2, 2)
    (tmp_path / 'val.jsonl').unlink()
    with pytest.raises(OSError, match='val.jsonl'):  # train.jsonl is not split once more: it may be trained on already
        open_rows(str(tmp_path), 'val')


def test_files_of_text_and_a_folder_of_them(tmp_path):
    documents = [f'Document {i} has some words.' for i in range(60)]
    rows = [{'text': d, 'id': i, 'score': None} for i, d in enumerate(documents)]
    write_rows(tmp_path / 'a.jsonl', [*rows, {'text': ' '}, {'text': None}])
    datasets = pytest.importorskip('datasets')
    rows = [{'text': d, 'language_score': 0.9} for d in [*documents, '', None]]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / 'b.parquet')
    write(tmp_path / 'c.txt', '\n\n'.join(d * 30 for d in documents))
    write(tmp_path / 'ignored.csv', 'x')
    write(tmp_path / 'empty.txt', '\n')
    for name, n in (('a.jsonl', 60), ('b.parquet', 60), ('c.txt', 60), ('', 180)):
        rows = {split: open_rows(str(tmp_path / name), split) for split in ('train', 'val')}
        texts = {split: {rows[split][i]['text'] for i in range(len(rows[split]))} for split in rows}
        assert len(rows['train']) + len(rows['val']) == n and 1 <= len(rows['val']) <= n // 8
        assert all(is_held_out(text, 20) for text in texts['val'])
        assert not texts['train'] & texts['val'], 'a text that stands in two files is on one side, too'


def test_parquet_with_conversations_and_with_images_inside(tmp_path):
    datasets = pytest.importorskip('datasets')
    rows = [{'messages': TURNS, 'images': [f'{i}.png']} for i in range(40)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / 'a.parquet')
    row = open_rows(str(tmp_path / 'a.parquet'), 'train')[0]
    assert row['messages'] == TURNS and row['images'][0].startswith(str(tmp_path))
    features = datasets.Features({'image': datasets.Image(), 'text': datasets.Value('string')})
    rows = [{'image': {'bytes': image_bytes(), 'path': None}, 'text': 'x'}] * 40
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / 'b.parquet')
    with pytest.raises(ValueError, match='b.parquet, line 1: the key "image" looks like an image'):
        open_rows(str(tmp_path / 'b.parquet'), 'train')


@pytest.mark.parametrize('content, message', [
    ('{"text": "a"}\n{"text": "b"\n', 'line 2 is not JSON'), ('{"text": "a"}\n[1, 2]\n', 'line 2: expected a message by'),
    ('{"txt": "a"}\n', 'line 1: expected an object'), ('{"text": 3}\n', 'line 1: expected'), ('', 'has 0 rows'),
    ('\n\n', 'has 0 rows'), ('{"text": "ab\xff"', 'line 1 is not JSON'),
    ('{"text": "a"}\n\n{"text": "b", "img": "b.png"}\n', 'line 3: the key "img" looks like an image')])
def test_a_broken_line_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        open_rows(write(tmp_path / 'x.jsonl', content), 'train')
    assert not list(tmp_path.glob('*index.*')), 'no half index is left'


def test_missing_and_unusable_datasets_are_named(tmp_path):
    with pytest.raises(ValueError, match="no dataset 'nowhere'"):
        open_rows('nowhere', 'train')
    with pytest.raises(ValueError, match='takes at least 20'):
        open_rows(write(tmp_path / 'few.txt', 'one paragraph'), 'val')
    write_rows(tmp_path / 'one.jsonl', [{'text': f'{i}', 'image': '1.png'} for i in range(50)])
    with pytest.raises(ValueError, match='has 50 rows .* of which (0|50) are held out'):
        open_rows(str(tmp_path / 'one.jsonl'), 'train')
    (tmp_path / 'bad.parquet').write_bytes(b'PAR1 not really')
    with pytest.raises(ValueError, match='bad.parquet is not a parquet file'):
        open_rows(str(tmp_path / 'bad.parquet'), 'train')


# ---------------------------------------------------------------------------------------------------------------------
# ten million rows: indexes, what is held out, the order of an epoch

def test_an_index_is_made_once_and_again_when_the_file_has_changed(tmp_path, monkeypatch):
    path = write_rows(tmp_path / 'train.jsonl', [{'text': f'row {i}'} for i in range(100)])
    checked = []
    monkeypatch.setattr(dataloader, 'to_example', lambda row, folder: checked.append(row) or to_example(row, folder))
    assert len(FileRows(path)) == 100 and len(checked) == 100
    rows = FileRows(path)
    assert len(rows) == 100 and len(checked) == 100 and rows[99]['text'] == 'row 99'
    assert sorted(os.listdir(tmp_path)) == ['train.jsonl', 'train.jsonl.index']
    with pytest.raises(IndexError):
        rows[100]
    checked.clear()
    status = os.stat(path)
    write(Path(path), Path(path).read_text().replace('row 7"', 'ROW 7"'))  # the same size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert FileRows(path)[7]['text'] == 'ROW 7' and len(checked) == 101
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with open(path, 'a') as f:
        f.write('{"text": "row 100"}\n')
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # another size at the same time
    assert FileRows(path)[100]['text'] == 'row 100'


def test_an_index_of_a_folder_that_cannot_be_written_is_in_the_users_cache(tmp_path, monkeypatch):
    (tmp_path / 'data').mkdir()
    path = write_rows(tmp_path / 'data' / 'train.jsonl', [{'text': f'row {i}'} for i in range(100)])
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(os, 'access', lambda folder, mode: not str(folder).startswith(str(tmp_path / 'data')))
    for _ in range(2):
        assert FileRows(path)[42]['text'] == 'row 42'
        assert os.listdir(tmp_path / 'data') == ['train.jsonl']
        assert len(os.listdir(tmp_path / 'cache' / 'glimpse')) == 1


def test_two_processes_that_index_at_once_do_not_mix_their_files(tmp_path):
    path = write_rows(tmp_path / 'train.jsonl', [{'text': f'row {i}'} for i in range(3000)])
    results = []
    threads = [threading.Thread(target=lambda: results.append(FileRows(path)[2999]['text'])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ['row 2999'] * 4 and sorted(os.listdir(tmp_path)) == ['train.jsonl', 'train.jsonl.index']


def test_rows_travel_to_a_worker_without_their_index(tmp_path):
    path = write_rows(tmp_path / 'x.jsonl', [{'text': f'row {i}'} for i in range(5000)])
    rows = open_rows(path, 'val')
    data = pickle.dumps(rows)
    assert len(data) < 1000
    assert [row['text'] for row in pickle.loads(data)] == [row['text'] for row in rows]


def test_one_rule_holds_out_the_same_keys_everywhere(tmp_path):
    assert sum(is_held_out(f'{i}.jpg', 20) for i in range(20_000)) == pytest.approx(1000, rel=0.1)
    rows = [{'text': f'Question {i}.', 'image': f'{i // 3}.jpg'} for i in range(600)]
    rows += [{'text': f'Text {i}'} for i in range(400)]
    sides = []
    for name, shuffled in (('a', rows), ('b', random.Random(0).sample(rows, 1000))):
        (tmp_path / name).mkdir()
        path = write_rows(tmp_path / name / 'x.jsonl', shuffled)
        train, val = (list(open_rows(path, split)) for split in ('train', 'val'))
        assert len(train) + len(val) == 1000 and 25 <= len(val) <= 80
        key = lambda row: os.path.basename(row['images'][0]) if 'images' in row else row['text']
        keys = {split: {key(row) for row in part} for split, part in (('train', train), ('val', val))}
        assert not keys['train'] & keys['val'], 'the rows of one image are on one side'
        assert all(is_held_out(k, 20) for k in keys['val']) and not any(is_held_out(k, 20) for k in keys['train'])
        sides.append(keys['val'])
    assert sides[0] == sides[1], 'wherever the file is, and whatever its order'


@pytest.mark.parametrize('n', [1, 2, 3, 5, 16, 17, 50, 1000])
def test_an_epochs_order_is_a_permutation_and_a_function_of_its_key(n):
    orders = [[shuffled_index(i, n, key) for i in range(n)] for key in ('0 0', '0 0', '0 1', '1 0')]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert orders[0] == orders[1] and (n < 16 or len(set(map(tuple, orders))) == 3)


def test_an_order_is_random():
    n = 1000
    order = [shuffled_index(i, n, 'key') for i in range(n)]
    neighbors = sum(abs(a - b) == 1 for a, b in zip(order, order[1:]))
    assert neighbors < 10 and abs(np.corrcoef(range(n), order)[0, 1]) < 0.1
    firsts = [shuffled_index(0, 10, f'0 {epoch}') for epoch in range(2000)]
    assert min(np.bincount(firsts, minlength=10)) > 140


def test_every_epoch_goes_through_all_rows_in_another_order():
    rows = [{'messages': [{'role': 'user', 'content': str(i)}]} for i in range(50)]
    examples = Examples(rows, KNOBS, 0)
    epochs = [[examples[e * 50 + i]['messages'][0]['content'] for i in range(50)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(str, range(50))) and epochs[0] != epochs[1]


# ---------------------------------------------------------------------------------------------------------------------
# plain text becomes examples

def test_pydoc_held_out_text_is_not_in_the_training_text():
    train, val = (open_rows('pydoc', split) for split in ('train', 'val'))
    assert sum(len(r['text']) for r in train) > 200_000 and sum(len(r['text']) for r in val) > 15_000
    trained = {''.join(p.split()) for r in train for p in r['text'].split('\n\n')}
    assert not any(''.join(p.split()) in trained for r in val for p in r['text'].split('\n\n'))
    corpus = ' '.join(' '.join(r['text'].split()) for r in train)
    examples = held_out_examples('pydoc', KNOBS, 'ocr')
    lines = [examples[i]['messages'][-1]['content'] for i in range(512)]
    assert all(16 <= len(line) <= 32 for line in lines) and len(set(lines)) > 450
    assert not any(line in corpus for line in lines)


def test_tasks_are_mixed_by_their_weights():
    rows = open_rows('pydoc', 'train')
    examples = Examples(rows, knobs(tasks='ocr:3 text:1'), 0)
    share = sum('messages' in examples[i] for i in range(400)) / 400
    assert 0.68 < share < 0.82
    assert parse_tasks('ocr continuation:0.5') == {'ocr': 1.0, 'continuation': 0.5}
    for spec in ('', 'orc:1', 'ocr:x', 'ocr:0', 'ocr:-1'):
        with pytest.raises(ValueError, match='tasks'):
            parse_tasks(spec)


def test_drawn_text_grows_over_length_warmup():
    rows = open_rows('pydoc', 'train')
    examples = Examples(rows, KNOBS, 0, length_warmup=200)
    lengths = [len(examples[i]['messages'][-1]['content']) for i in range(300)]
    assert max(lengths[:20]) <= 4 and 8 < np.mean(lengths[90:110]) < 17 and min(lengths[200:]) >= 16


def test_the_drawn_text_is_the_text_in_the_loss():
    example = render.ocr('first line\n  second 日 line, with more words than fit the box ' * 3, random.Random(0), KNOBS)
    text, image = example['messages'][1]['content'], example['images'][0]
    assert '\n' not in text and '日' not in text and image.height == 16 and image.width <= 256
    page = knobs(one_line=False, image_width=200, image_height=100, max_chars=60)
    example = render.ocr('def f():\n    return 1\n\n\n' * 5, random.Random(0), page)
    assert '\n    ' in example['messages'][1]['content'] and example['images'][0].size == (200, 100)


def test_text_that_the_font_cannot_draw_stays_text():
    for task in render.TASKS.values():
        assert 'images' not in task('日本語 ' * 40, random.Random(0), KNOBS)


def test_continuation_has_its_image_in_the_place_of_the_infix():
    text = ' '.join(f'word{i}' for i in range(100))
    for seed in range(20):
        example = render.continuation(text, random.Random(seed), KNOBS)
        whole = example['text'].replace(IMAGE, example['infix'])
        assert whole in text and len(example['images']) == 1 and 60 * 0.8 < len(whole) <= 120
        assert not example['text'].startswith(IMAGE) and not example['text'].endswith(IMAGE)
        assert example['infix'] == example['infix'].strip() and not is_blank(example['images'][0])


def is_blank(image):
    return image.convert('L').getextrema() == (255, 255)


def test_a_share_of_the_images_is_blank_in_training_and_none_in_an_evaluation():
    knobs = SimpleNamespace(**{**vars(KNOBS), 'tasks': 'continuation', 'blank_images': 0.3})
    examples = Examples([{'text': 'some words to read and more of them ' * 5}], knobs, 0)
    n_blank = sum(is_blank(examples[i]['images'][0]) for i in range(200))
    assert 40 < n_blank < 80
    held_out = held_out_examples('pydoc', knobs, 'continuation')
    assert not any(is_blank(image) for i in range(30) for image in held_out[i].get('images', ()))


def test_the_text_command_writes_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / 'in.jsonl', [{'text': f'doc {i}'} for i in range(30)])
    process = inside('prepare_data.py', 'text', f'--source={tmp_path}/in.jsonl', '--max_examples=20', '--name=mine',
                     '--val_every=5')
    assert process.returncode == 0, process.stderr
    train, val = ({row['text'] for row in open_rows('mine', split)} for split in ('train', 'val'))
    assert val == {f'doc {i}' for i in range(20) if is_held_out(f'doc {i}', 5)} and val
    assert train == {f'doc {i}' for i in range(20)} - val
    refused(inside('prepare_data.py', 'text'), '--source')
    refused(inside('prepare_data.py', 'txt'), 'expected a command')


def test_a_dataset_of_the_hub_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.chdir(tmp_path)

    def offline(*args, **kwargs):
        raise ConnectionError('no route\nand more')

    monkeypatch.setattr(datasets, 'load_dataset', offline)
    process = inside('prepare_data.py', 'text', '--source=OWNER/NAME')
    refused(process, 'OWNER/NAME is neither a file here nor a dataset that the hub gives us (ConnectionError: no route)')


# ---------------------------------------------------------------------------------------------------------------------
# images

def halves(mode, left, right, size=(40, 20)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize('name, image, left, right', [
    ('rgb.png', halves('RGB', (10, 20, 30), (200, 0, 0)), (10, 20, 30), (200, 0, 0)),
    ('gray.png', halves('L', 50, 250), (50, 50, 50), (250, 250, 250)),
    ('gray.jpg', halves('L', 50, 250), (50, 50, 50), (250, 250, 250)),
    ('rgba.png', halves('RGBA', (0, 0, 0, 0), (0, 0, 0, 255)), (255, 255, 255), (0, 0, 0)),
    ('la.png', halves('LA', (0, 0), (90, 255)), (255, 255, 255), (90, 90, 90)),
    ('palette.gif', halves('P', 0, 1), None, None),
    ('16bit.png', Image.fromarray(np.tile(np.array([0, 65535], np.uint16).repeat(20), (20, 1))), (0, 0, 0), (255, 255, 255)),
    ('cmyk.jpg', halves('CMYK', (0, 0, 0, 0), (0, 0, 0, 255)), (255, 255, 255), (0, 0, 0)),
    ('bilevel.png', halves('1', 0, 1), (0, 0, 0), (255, 255, 255)),
])
def test_every_mode_becomes_rgb_with_the_same_colors(tmp_path, name, image, left, right):
    image.save(tmp_path / name)
    assert image_error(str(tmp_path / name)) == ''
    loaded = load_image(str(tmp_path / name))
    assert loaded.mode == 'RGB' and loaded.size == (40, 20)
    if left:
        for x, expected in ((5, left), (35, right)):
            assert max(abs(a - b) for a, b in zip(loaded.getpixel((x, 10)), expected)) <= 4


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    halves('RGB', (255, 0, 0), (0, 0, 255)).save(tmp_path / 'x.jpg', exif=exif)
    image = load_image(tmp_path / 'x.jpg')
    assert image.size == (20, 40) and image.getpixel((10, 5))[0] > 200 and image.getpixel((10, 35))[2] > 200


def test_files_that_are_no_image_are_named(tmp_path):
    for name, content in (('empty.png', b''), ('text.png', b'hello'), ('html.jpg', b'<html></html>')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f'{name} is not an image that can be read'):
            load_image(tmp_path / name)
    Image.effect_noise((200, 200), 50).save(tmp_path / 'cut.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'cut.jpg').read_bytes()[:2000])
    with pytest.raises(ValueError, match='cut.jpg is not an image that can be read'):
        load_image(tmp_path / 'cut.jpg')
    with pytest.raises(ValueError, match='no image at'):
        load_image(tmp_path / 'gone.png')
    with pytest.raises(ValueError, match='is not an image'):
        load_image(tmp_path)


def jpeg_with_exif(exif):
    """A JPEG with these bytes as its EXIF data."""
    data = image_bytes('red', 'JPEG')
    segment = b'Exif\x00\x00' + exif
    return data[:2] + b'\xff\xe1' + struct.pack('>H', len(segment) + 2) + segment + data[2:]


def rotated_exif(n_bytes):
    """An orientation tag, followed by a second tag whose value is said to be `n_bytes` away."""
    tags = struct.pack('<HHII', 0x0112, 3, 1, 6) + struct.pack('<HHII', 0x011a, 5, 1, n_bytes)
    return b'II*\x00\x08\x00\x00\x00' + struct.pack('<H', 2) + tags + b'\x00' * 4


# found by trying random tags: Pillow decodes these images, and raises when it turns them upright
EXIF_THAT_RAISES = [  # TypeError, struct.error
    '49492a000800000002001201030001000000060000001a010100080000000800000000000000da1f334a7017250d3f603dc82ebd3b120b635e3ff56b1f0b',
    '49492a0008000000030012010300010000000600000005a00b00030000000000000000010600000000009b9f99fa00000000ca03b8153b018a957448']


def hostile_files():
    """{name: bytes} of what is found in the wild, and worse."""
    jpeg, png = image_bytes('red', 'JPEG', (300, 200)), image_bytes('red', 'PNG', (300, 200))
    huge = bytearray(png)
    huge[16:24] = struct.pack('>II', 60_000, 60_000)
    files = {
        'whole.jpg': jpeg, 'whole.png': png, 'empty.jpg': b'', 'html.jpg': b'<html></html>',
        'cut.jpg': jpeg[:len(jpeg) // 2], 'cut.png': png[:len(png) // 2], 'bomb.png': bytes(huge),
        'exif_far.jpg': jpeg_with_exif(rotated_exif(2**31)), 'exif_cut.jpg': jpeg_with_exif(rotated_exif(8)[:20]),
        'exif_text.jpg': jpeg_with_exif(b'not a TIFF header at all'),
        'exif_zero.jpg': jpeg_with_exif(b'II*\x00' + b'\xff' * 40),
        'fax.tif': b'II*\x00\x08\x00\x00\x00\xff\xff' + b'\x01' * 50}
    for i, exif in enumerate(EXIF_THAT_RAISES):
        files[f'exif{i}.jpg'] = jpeg_with_exif(bytes.fromhex(exif))
    rng = random.Random(0)
    for source in ('whole.jpg', 'whole.png'):
        for i in range(30):  # a byte changed anywhere
            data = bytearray(files[source])
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            files[f'{i}{source}'] = bytes(data)
    return files


def decision(path):
    """What training does with the file."""
    try:
        load_image(path)
    except ValueError as error:
        assert str(path) in str(error)
        return 'the image is missing' if str(error).startswith('no image at') else 'the image is broken'
    return ''


@pytest.mark.filterwarnings('ignore')
def test_preparation_and_training_decide_the_same_on_hostile_files(tmp_path):
    files = hostile_files()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / 'all.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    for root in (tmp_path, tmp_path / 'all.zip'):
        reasons = {name: image_error(str(root / name)) for name in files}
        assert reasons == {name: decision(root / name) for name in files}
        assert reasons['whole.jpg'] == reasons['whole.png'] == ''
        for name in ('empty.jpg', 'html.jpg', 'cut.jpg', 'cut.png', 'bomb.png', 'exif0.jpg', 'exif1.jpg'):
            assert reasons[name] == 'the image is broken', name


def test_whatever_pillow_raises_becomes_a_sentence(tmp_path, monkeypatch):
    red().save(tmp_path / 'x.jpg')
    for error in (struct.error('unpack'), KeyError('tag'), SyntaxError('exif'), OverflowError(), ZeroDivisionError('division'),
                  AttributeError('x'), Image.DecompressionBombError('too large'), MemoryError()):
        def broken(image, error=error):
            raise error

        monkeypatch.setattr(ImageOps, 'exif_transpose', broken)
        with pytest.raises(ValueError, match='x.jpg is not an image that can be read'):
            load_image(str(tmp_path / 'x.jpg'))
        assert image_error(str(tmp_path / 'x.jpg')) == 'the image is broken'


# ---------------------------------------------------------------------------------------------------------------------
# archives

MEMBERS = {'a.png': image_bytes('red'), 'sub/b.png': image_bytes('blue'), 'naïve 日本.png': image_bytes('green'),
           'c.txt': b'text'}


def write_archive(path, members, compression=zipfile.ZIP_STORED, prefix=''):
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w', compression) as archive:
            for name, data in members.items():
                archive.writestr(prefix + name, data)
    else:
        with tarfile.open(path, 'w') as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(prefix + name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize('name, compression', [('x.zip', zipfile.ZIP_STORED), ('x.zip', zipfile.ZIP_DEFLATED), ('x.tar', None)])
def test_members_of_archives_are_read_in_place(tmp_path, name, compression):
    write_archive(tmp_path / name, MEMBERS, compression)
    for member, data in MEMBERS.items():
        assert read_bytes(f'{tmp_path}/{name}/{member}') == data
    assert load_image(f'{tmp_path}/{name}/sub/b.png').getpixel((0, 0)) == (0, 0, 255)
    assert image_error(f'{tmp_path}/{name}/gone.png') == 'the image is missing'
    assert image_error(f'{tmp_path}/none.zip/a.png') == 'the image is missing'
    assert sorted(os.listdir(tmp_path)) == [name, f'{name}.index']
    write_archive(tmp_path / name, {'a.png': image_bytes('white')}, compression)  # and what has changed is read anew
    os.utime(tmp_path / name, ns=(0, 1))
    assert load_image(f'{tmp_path}/{name}/a.png').getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('name', ['coco.zip', 'coco.tar'])
def test_the_one_folder_of_an_archive_may_be_left_out(tmp_path, name):
    write_archive(tmp_path / name, {'1.png': MEMBERS['a.png'], 'sub/1.png': MEMBERS['sub/b.png']}, prefix='train2017/')
    for member, color in (('1.png', 255), ('train2017/1.png', 255), ('sub/1.png', 0), ('train2017/sub/1.png', 0)):
        assert load_image(f'{tmp_path}/{name}/{member}').getpixel((0, 0))[0] == color
    assert image_error(f'{tmp_path}/{name}/val2017/1.png') == 'the image is missing'


def test_names_in_a_tar_may_begin_with_a_dot_and_the_last_of_two_counts(tmp_path):
    write_archive(tmp_path / 'x.tar', {'a.png': MEMBERS['a.png'], 'b/c.png': MEMBERS['a.png']}, prefix='./')
    with tarfile.open(tmp_path / 'x.tar', 'a') as archive:
        info = tarfile.TarInfo('./a.png')
        info.size = len(MEMBERS['sub/b.png'])
        archive.addfile(info, io.BytesIO(MEMBERS['sub/b.png']))
    assert load_image(f'{tmp_path}/x.tar/a.png').getpixel((0, 0)) == (0, 0, 255)


def test_damaged_archives_and_members_are_broken_images(tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        write_archive(tmp_path / 'x.zip', {'noise.png': os.urandom(5000), 'a.png': MEMBERS['a.png']}, compression)
        data = bytearray((tmp_path / 'x.zip').read_bytes())
        data[2000] ^= 255  # in the middle of the first member
        (tmp_path / 'x.zip').write_bytes(data)
        with pytest.raises(ValueError, match='noise.png is not an image that can be read'):
            load_image(f'{tmp_path}/x.zip/noise.png')
        assert image_error(f'{tmp_path}/x.zip/noise.png') == 'the image is broken'
        assert image_error(f'{tmp_path}/x.zip/a.png') == ''
    (tmp_path / 'y.zip').write_bytes(b'PK half of a zip')
    (tmp_path / 'y.tar').write_bytes(b'half of a tar' * 100)
    (tmp_path / 'z.tar').write_bytes(b'')
    for name in ('y.zip', 'y.tar', 'z.tar'):
        with pytest.raises(ValueError, match=f'{name} is broken or cut off'):
            load_image(f'{tmp_path}/{name}/a.png')
    write_archive(tmp_path / 'empty.zip', {})
    assert image_error(f'{tmp_path}/empty.zip/a.png') == 'the image is missing'
    write_archive(tmp_path / 'b.zip', MEMBERS, zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match='compression method 12 of a .zip is not supported'):
        load_image(f'{tmp_path}/b.zip/a.png')


def test_a_compressed_tar_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / 'x.tar.gz').write_bytes(bz2.compress(b'x'))
    with pytest.raises(ValueError, match='x.tar.gz is compressed'):
        load_image(f'{tmp_path}/x.tar.gz/a.png')
    monkeypatch.chdir(tmp_path)
    refused(inside('prepare_data.py', 'cc3m', f'--source={tmp_path}'), 'x.tar.gz is compressed')


def test_a_folder_may_be_named_like_an_archive(tmp_path):
    (tmp_path / 'x.zip').mkdir()
    red().save(tmp_path / 'x.zip' / 'a.png')
    assert load_image(f'{tmp_path}/x.zip/a.png').size == (16, 8)


def test_a_thousand_archives_cost_no_open_file(tmp_path):
    for i in range(1000):
        write_archive(tmp_path / f'{i}.{"tar" if i % 2 else "zip"}', {'a.png': MEMBERS['a.png']})
    before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0
    for i in range(1000):
        assert read_bytes(f'{tmp_path}/{i}.{"tar" if i % 2 else "zip"}/a.png') == MEMBERS['a.png']
    assert (len(os.listdir('/proc/self/fd')) if before else 0) == before


def test_archives_are_read_by_threads_and_processes(tmp_path):
    names = [f'{i}.png' for i in range(50)]
    write_archive(tmp_path / 'x.zip', {name: image_bytes((i, 0, 0)) for i, name in enumerate(names)})
    rows = [{'messages': TURNS, 'images': [f'{tmp_path}/x.zip/{name}']} for name in names]
    examples = Examples(rows, knobs(augment='color'), 0)

    class Pixels(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return load_image(examples.rows[i]['images'][0]).getpixel((0, 0))[0]

        def __len__(self):
            return 50

    loader = torch.utils.data.DataLoader(Pixels(), batch_size=None, num_workers=2)
    assert list(loader) == list(range(50))


# ---------------------------------------------------------------------------------------------------------------------
# lines of text

def test_a_line_of_text_becomes_one_row_of_patches_whatever_its_size_margins_and_colors():
    config = tiny_config(patch_height=16, line_height=16, max_image_tokens=64)
    line = render.draw('some (line)', 600, 30, trim=True)
    patches, grid = preprocess(line, config)
    assert grid[:, 0].max() == 0 and len(grid) > 5
    framed = Image.new('RGB', (line.width + 90, line.height + 40), 'white')
    framed.paste(line, (70, 10))
    assert torch.equal(preprocess(framed, config)[0], patches)
    assert torch.equal(preprocess(ImageOps.invert(line), config)[0], patches)
    _, larger = preprocess(line.resize((line.width * 2, line.height * 2)), config)
    assert abs(len(larger) - len(grid)) <= 1
    assert len(preprocess(Image.new('RGB', (64, 16), 'white'), config)[1]) == 8  # nothing to frame


def test_letters_of_one_size_come_out_in_one_size_whatever_the_line_holds():
    heights = {text: crop_line(render.draw(text, 600, 60, min_size=40, max_size=40)).height
               for text in ('the quick brown fox', 'It has no tail at all', 'a gypsy jumps, (hyphen)')}
    assert max(heights.values()) - min(heights.values()) <= 4, heights


# ---------------------------------------------------------------------------------------------------------------------
# shapes

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    """A small set as the command writes it. {split: rows}, and its folder."""
    folder = tmp_path_factory.mktemp('shapes')
    before = os.getcwd()
    os.chdir(folder)
    try:
        process = inside('prepare_data.py', 'shapes', '--max_examples=400')
        assert process.returncode == 0, process.stderr
    finally:
        os.chdir(before)
    data = folder / 'data' / 'shapes'
    return {split: FileRows(str(data / f'{split}.jsonl')) for split in ('train', 'val')}, data


def test_shapes_has_every_type_of_row_and_question(shapes):
    rows = [row for part in shapes[0].values() for row in part]
    assert len(rows) == 400 and len(shapes[0]['val']) == 10
    assert {len(row['images']) for row in rows} == {0, 1, 2} and max(len(row['messages']) for row in rows) >= 6
    questions = ' '.join(m['content'] for row in rows for m in row['messages'][::2])
    for part in ('What color', 'What is the', 'Is there', 'How many', 'crosses', 'Where is', 'more shapes', 'In the second',
                 'Describe'):
        assert part in questions, part
    answers = [m['content'] for row in rows for m in row['messages'][1::2]]
    yes, no = answers.count('yes'), answers.count('no')
    assert 0.3 < yes / (yes + no) < 0.7
    words = set((shapes[1] / 'words.txt').read_text().split())
    assert set(re.findall('[A-Za-z]+', questions + ' '.join(answers))) - {'image'} <= words


def test_a_shapes_answer_agrees_with_the_image(shapes):
    """Descriptions, which name color and position of everything, agree with the pixels; no held-out image is trained on."""
    checked, train_images = 0, set()
    for row in shapes[0]['train']:
        train_images |= {Image.open(path).tobytes() for path in row['images']}
        if row['messages'][-2]['content'].endswith('Describe the image.') and checked < 50:
            checked += 1
            image, in_image = Image.open(row['images'][0]), []
            for number, quarter in enumerate(render.QUARTERS):
                left, top = number % 2 * 32, number // 2 * 32
                colors = image.crop((left, top, left + 32, top + 32)).getcolors()
                names = [name for name, rgb in render.COLORS.items() if rgb in {c for _, c in colors}]
                in_image += [f'{name} {quarter}' for name in names]
            described = row['messages'][-1]['content']
            assert in_image == [re.sub('^a | (circle|square|triangle|cross)', '', d) for d in described.split(', ')]
    assert checked == 50
    for row in shapes[0]['val']:
        assert not {Image.open(path).tobytes() for path in row['images']} & train_images


def test_the_same_shapes_are_drawn_every_time(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inside('prepare_data.py', 'shapes', '--max_examples=400').returncode == 0
    for name in ('train.jsonl', 'val.jsonl', 'words.txt', 'images/000100a.png'):
        assert (tmp_path / 'data' / 'shapes' / name).read_bytes() == (shapes[1] / name).read_bytes()


def test_a_hash_has_64_bits():
    assert len({hash64(str(i)) >> 60 for i in range(1000)}) == 16 and max(map(hash64, map(str, range(1000)))) < 2**64
