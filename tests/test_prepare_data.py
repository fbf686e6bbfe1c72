"""What must stay true on the way from raw data to a batch: what is learnt, what is not, and that nothing is lost silently."""

import json
import os
import pickle
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import inside, refused, tiny_config
from PIL import Image, ImageOps

import prepare_data
import render
import vision
from prepare_data import (ASSISTANT, END, IMAGE, USER, Batches, Examples, collate, decode, drawable_ids, encode, get_tokenizer,
                          held_out_examples, load_image, open_rows, parse_tasks, read, tokenize)

BYTES = get_tokenizer('bytes')
CONFIG = tiny_config(block_size=200, image_token=BYTES.encode_single_token(IMAGE))
KNOBS = SimpleNamespace(tasks='read:1', one_line=True, font='', font_min=6, font_max=60, image_width=256, image_height=16,
                        min_chars=16, max_chars=32, min_span=60, max_span=120, infix_min=0.1, infix_max=0.4, distort=0.0,
                        augment='', spell=False)


def conversation(*turns, images=()):
    roles = ('user', 'assistant')
    return {'messages': [{'role': roles[i % 2], 'content': t} for i, t in enumerate(turns)], 'images': list(images)}


def spell(ids, sep=''):
    """Ids as text: special tokens by name, a run of <image> as <image>*n, -1 as ·"""
    out = []
    for i in ids:
        out.append('·' if i < 0 else BYTES.decode([i]))
    return sep.join(out)


def red(width=16, height=8):
    return Image.new('RGB', (width, height), 'red')


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

def test_bytes_takes_any_text_back_and_forth():
    text = 'naïve 日本 \x00\n\t <image> <|endoftext|> 🙂'
    assert decode(BYTES, encode(BYTES, text)) == text
    assert max(encode(BYTES, text)) < 256, 'what looks special in data stays text'
    assert {BYTES.encode_single_token(t) for t in (IMAGE, USER, ASSISTANT, END)} == {256, 257, 258, 259}


def test_gpt2_keeps_its_ids_and_its_end_token():
    try:
        tokenizer = get_tokenizer('gpt2')
    except ValueError as error:
        pytest.skip(str(error))
    assert encode(tokenizer, 'Hello world') == [15496, 995]
    assert tokenizer.encode_single_token(END) == 50256
    assert sorted(tokenizer.encode_single_token(t) for t in (IMAGE, USER, ASSISTANT)) == [50257, 50258, 50259]
    assert max(encode(tokenizer, 'a <|endoftext|> b <image>')) < 50256


def test_character_tokenizer_of_nanogpt(tmp_path):
    chars = sorted(set('hello wörld\n'))
    path = tmp_path / 'meta.pkl'
    path.write_bytes(pickle.dumps({'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
                                   'stoi': {c: i for i, c in enumerate(chars)}}))
    tokenizer = get_tokenizer(str(path))
    assert encode(tokenizer, 'wörld\n') == [chars.index(c) for c in 'wörld\n']
    assert decode(tokenizer, encode(tokenizer, 'hello')) == 'hello'
    assert tokenizer.encode_single_token(IMAGE) == len(chars)
    with pytest.raises(ValueError, match="do not include 'X', 'z'"):
        encode(tokenizer, 'zX')


def test_a_meta_pkl_that_wants_to_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'sprung'),)

    path = tmp_path / 'meta.pkl'
    path.write_bytes(pickle.dumps({'stoi': Malicious()}))
    with pytest.raises(ValueError, match='meta.pkl is not the meta.pkl of a nanoGPT'):
        get_tokenizer(str(path))
    assert not (tmp_path / 'sprung').exists()
    for content in (b'', b'garbage', pickle.dumps({'stoi': {'a': 0, 'b': 2}})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='meta.pkl'):
            get_tokenizer(str(path))
    with pytest.raises(ValueError, match='no tokenizer at'):
        get_tokenizer(str(tmp_path / 'missing.pkl'))
    with pytest.raises(ValueError, match='tokenizer must be'):
        get_tokenizer('gpt5')


def test_only_text_and_the_end_token_may_be_drawn():
    allowed = drawable_ids(BYTES, 320)
    assert allowed.nonzero().flatten().tolist() == [*range(256), BYTES.encode_single_token(END)]


# ---------------------------------------------------------------------------------------------------------------------
# what is learnt

def test_the_assistants_words_and_their_end_are_learnt_and_nothing_else():
    batch = tokenize(conversation('<image>\nHi?', 'Yo', 'And?', 'No', images=[red()]), BYTES, CONFIG, 'assistant')
    assert spell(batch['idx']) == '<|user|><image><image>\nHi?<|assistant|>Yo<|endoftext|><|user|>And?<|assistant|>No'
    assert spell(batch['targets']) == '·' * 7 + 'Yo<|endoftext|>' + '·' * 6 + 'No<|endoftext|>'


def test_with_all_every_text_token_is_learnt_but_never_an_image():
    batch = tokenize(conversation('Hi <image>?', 'Yo', images=[red()]), BYTES, CONFIG, 'all')
    assert spell(batch['idx']) == '<|user|>Hi <image><image>?<|assistant|>Yo'
    assert spell(batch['targets']) == 'Hi ··?<|assistant|>Yo<|endoftext|>'


def test_the_token_behind_an_image_is_predicted_from_it():
    batch = tokenize({'text': 'a<image>b', 'images': [red()]}, BYTES, CONFIG)
    assert spell(batch['idx']) == '<|endoftext|>a<image><image>b'
    assert spell(batch['targets']) == 'a··b<|endoftext|>'
    assert batch['targets'][batch['idx'].index(CONFIG.image_token) + 1] == ord('b')


def test_continue_learns_the_postfix_only():
    example = {'text': 'ab<image>cd', 'images': [red()], 'infix': 'X', 'loss_on': 'postfix'}
    assert spell(tokenize(example, BYTES, CONFIG)['targets']) == '·' * 4 + 'cd<|endoftext|>'
    for filling in ('', 'XYZ'):
        batch = tokenize({**example, 'images': [], 'filling': filling}, BYTES, CONFIG)
        assert spell(batch['idx']) == f'<|endoftext|>ab{filling}cd'
        assert [t for t in batch['targets'] if t >= 0] == [ord('c'), ord('d'), BYTES.encode_single_token(END)]


def test_a_system_turn_goes_in_front_of_the_users_first():
    example = conversation('Hi', 'Yo')
    example['messages'].insert(0, {'role': 'system', 'content': 'Be brief.'})
    assert spell(tokenize(example, BYTES, CONFIG)['idx']) == '<|user|>Be brief.\n\nHi<|assistant|>Yo'


def test_the_literal_image_token_in_text_without_images_stays_text():
    batch = tokenize(conversation('What is <image> and <|user|>?', 'A tag'), BYTES, CONFIG)
    assert CONFIG.image_token not in batch['idx'] and batch['idx'].count(BYTES.encode_single_token(USER)) == 1


def test_a_prompt_ends_where_the_answer_begins():
    batch = tokenize(conversation('Hi', 'Yo', 'And?', 'No'), BYTES, CONFIG, prompt_only=True)
    assert spell(batch['idx']) == '<|user|>Hi<|assistant|>Yo<|endoftext|><|user|>And?<|assistant|>'


@pytest.mark.parametrize('content,images,message', [
    ('no place', 1, '1 images, but only 0'), ('<image>', 2, '2 images, but only 1'),
    ('<image> <image>', 1, 'more <image> places')])
def test_images_and_places_must_agree(content, images, message):
    with pytest.raises(ValueError, match=message):
        tokenize(conversation(content, 'x', images=[red()] * images), BYTES, CONFIG)


def test_long_text_is_cut_but_an_image_never_is():
    config = tiny_config(block_size=10, image_token=CONFIG.image_token)
    batch = tokenize(conversation('<image>', 'x' * 100, images=[red(32, 32)]), BYTES, config)
    positions = len(batch['idx']) - batch['idx'].count(config.image_token) + 1
    assert positions == 10 and batch['targets'][-1] == ord('x')
    with pytest.raises(ValueError, match='block_size is 10'):
        tokenize(conversation('q' * 50 + '<image>', 'x', images=[red()]), BYTES, config)
    with pytest.raises(ValueError, match='the prompt takes 52 positions, but block_size is 10'):
        tokenize(conversation('q' * 50), BYTES, config, prompt_only=True)


def test_wrong_roles_and_loss_on_are_named():
    with pytest.raises(ValueError, match='"user" or "assistant"'):
        tokenize({'messages': [{'role': 'human', 'content': 'x'}]}, BYTES, CONFIG)
    with pytest.raises(ValueError, match='loss_on must be'):
        tokenize(conversation('a', 'b'), BYTES, CONFIG, 'everything')


def test_collate_pads_with_minus_one_and_keeps_images_in_order():
    rows = [tokenize(e, BYTES, CONFIG) for e in (conversation('<image>a', 'b', images=[red()]), conversation('c', 'd'),
                                                 conversation('<image><image>', 'e', images=[red(8, 8), red(24, 8)]))]
    batch = collate(rows, CONFIG)
    assert batch['lengths'].tolist() == [len(r['idx']) for r in rows]
    for i, r in enumerate(rows):
        assert batch['idx'][i].tolist() == r['idx'] + [-1] * (batch['idx'].shape[1] - len(r['idx']))
        assert batch['targets'][i, len(r['idx']):].eq(-1).all()
    patches, grid = batch['images']
    assert (grid[..., 0] >= 0).sum(1).tolist() == [2, 1, 3] and patches.shape[:2] == (3, 3)
    rows[0]['idx'].remove(CONFIG.image_token)
    rows[0]['targets'].pop(0)
    with pytest.raises(ValueError, match='5 <image> places, but its images make 6 tokens'):
        collate(rows, CONFIG)


# ---------------------------------------------------------------------------------------------------------------------
# rows and examples

def test_pydoc_held_out_text_is_not_in_the_training_text():
    train, val = (open_rows('pydoc', split) for split in ('train', 'val'))
    assert sum(len(r['text']) for r in train) > 200_000 and sum(len(r['text']) for r in val) > 15_000
    seen = {''.join(p.split()) for r in train for p in r['text'].split('\n\n')}
    assert not any(''.join(p.split()) in seen for r in val for p in r['text'].split('\n\n'))
    corpus = ' '.join(' '.join(r['text'].split()) for r in train)
    examples = held_out_examples('pydoc', KNOBS, 'read')
    lines = [examples[i]['messages'][-1]['content'] for i in range(512)]
    assert all(16 <= len(line) <= 32 for line in lines) and len(set(lines)) > 450
    assert not any(line in corpus for line in lines)


def test_example_i_is_a_function_of_seed_and_i():
    rows = open_rows('pydoc', 'train')
    knobs = SimpleNamespace(**{**vars(KNOBS), 'tasks': 'read:1 continue:1 text:1', 'distort': 1.0})
    batch = lambda seed, i: Batches(Examples(rows, knobs, seed), BYTES, CONFIG, 4, 'assistant')[i]
    late, early = batch(1, 900), batch(1, 3)  # in another order, and from another object
    for a, b in ((batch(1, 3), early), (batch(1, 900), late)):
        assert torch.equal(a['idx'], b['idx']) and torch.equal(a['images'][0], b['images'][0])
    assert not torch.equal(batch(2, 3)['idx'], early['idx'])


def test_every_epoch_goes_through_all_rows_in_another_order():
    rows = [{'messages': [{'role': 'user', 'content': str(i)}]} for i in range(50)]
    examples = Examples(rows, KNOBS, 0)
    epochs = [[examples[e * 50 + i]['messages'][0]['content'] for i in range(50)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(str, range(50))) and epochs[0] != epochs[1]


def test_tasks_are_mixed_by_their_weights():
    rows = open_rows('pydoc', 'train')
    examples = Examples(rows, SimpleNamespace(**{**vars(KNOBS), 'tasks': 'read:3 text:1'}), 0)
    share = sum('messages' in examples[i] for i in range(400)) / 400
    assert 0.68 < share < 0.82
    assert parse_tasks('read continue:0.5') == {'read': 1.0, 'continue': 0.5}
    for spec in ('', 'reed:1', 'read:x', 'read:0', 'read:-1'):
        with pytest.raises(ValueError, match='tasks'):
            parse_tasks(spec)


def test_what_is_drawn_is_what_is_to_be_read():
    rng = random.Random(0)
    example = prepare_data.read('first line\n  second 日 line, with more words than fit the box ' * 3, rng, KNOBS)
    text, image = example['messages'][1]['content'], example['images'][0]
    assert '\n' not in text and '日' not in text and image.height == 16 and image.width <= 256
    page = SimpleNamespace(**{**vars(KNOBS), 'one_line': False, 'image_width': 200, 'image_height': 100, 'max_chars': 60})
    example = prepare_data.read('def f():\n    return 1\n\n\n' * 5, rng, page)
    assert '\n    ' in example['messages'][1]['content'] and example['images'][0].size == (200, 100)


def test_text_that_the_font_cannot_draw_stays_text():
    for task in prepare_data.TASKS.values():
        assert 'images' not in task('日本語 ' * 40, random.Random(0), KNOBS)


def test_continue_puts_the_picture_where_the_infix_was():
    text = ' '.join(f'word{i}' for i in range(100))
    for seed in range(20):
        example = prepare_data.continue_(text, random.Random(seed), KNOBS)
        whole = example['text'].replace(IMAGE, example['infix'])
        assert whole in text and len(example['images']) == 1 and 60 * 0.8 < len(whole) <= 120
        assert not example['text'].startswith(IMAGE) and not example['text'].endswith(IMAGE)


def write(path, content):
    path.write_text(content, encoding='utf-8')
    return str(path)


def test_text_files_of_every_kind_and_a_folder_of_them(tmp_path):
    documents = [f'Document {i} has some words.' for i in range(60)]
    lines = '\n'.join(json.dumps({'text': d, 'id': i, 'score': None}) for i, d in enumerate(documents)) + '\n{"text": " "}\n'
    write(tmp_path / 'a.jsonl', lines)
    datasets = pytest.importorskip('datasets')
    rows = [{'text': d, 'language_score': 0.9} for d in [*documents, '']]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / 'b.parquet')
    write(tmp_path / 'c.txt', '\n\n'.join(d * 30 for d in documents))
    write(tmp_path / 'ignored.csv', 'x')
    for name, n in (('a.jsonl', 60), ('b.parquet', 60), ('c.txt', 60), ('', 180)):
        rows = {split: open_rows(str(tmp_path / name), split) for split in ('train', 'val')}
        texts = {split: {rows[split][i]['text'] for i in range(len(rows[split]))} for split in rows}
        assert len(rows['train']) + len(rows['val']) == n and len(rows['val']) == n // 20
        assert not texts['train'] & texts['val']


def test_a_folder_with_train_and_val_and_images_beside_them(tmp_path):
    red().save(tmp_path / '1.png')
    row = json.dumps({**conversation('<image>', 'x'), 'images': None, 'image_path': '1.png', 'id': 7})
    write(tmp_path / 'train.jsonl', row + '\n' + json.dumps({'text': 'plain'}))
    write(tmp_path / 'val.jsonl', row)
    rows = open_rows(str(tmp_path), 'train')
    assert len(rows) == 2 and rows[1] == {'text': 'plain', 'images': []}
    assert Examples(rows, KNOBS, 0).rows[0]['images'] == [str(tmp_path / '1.png')]
    assert tokenize(rows[0], BYTES, CONFIG)['images'][0][1].shape == (2, 2)


@pytest.mark.parametrize('content,message', [
    ('{"text": "a"}\n{"text": "b"\n', 'line 2 is not JSON'), ('{"text": "a"}\n[1, 2]\n', 'line 2: expected an object'),
    ('{"txt": "a"}\n', 'line 1: expected an object'), ('{"text": 3}\n', 'line 1: expected'), ('', 'holds no row'),
    ('\n\n', 'holds no row'), ('{"text": "ab\xff"', 'line 1 is not JSON')])
def test_a_broken_line_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        open_rows(write(tmp_path / 'x.jsonl', content), 'train')


def test_missing_and_unusable_datasets_are_named(tmp_path):
    with pytest.raises(ValueError, match="no dataset 'nowhere'"):
        open_rows('nowhere', 'train')
    with pytest.raises(ValueError, match='takes at least 20'):
        open_rows(write(tmp_path / 'few.txt', 'one paragraph'), 'val')
    (tmp_path / 'bad.parquet').write_bytes(b'PAR1 not really')
    with pytest.raises(ValueError, match='bad.parquet is not a parquet file'):
        open_rows(str(tmp_path / 'bad.parquet'), 'train')


def test_what_goes_wrong_in_a_worker_comes_back_as_a_sentence():
    rows = [{'messages': [{'role': 'user', 'content': IMAGE}], 'images': ['gone.png']}]
    assert Batches(Examples(rows, KNOBS, 0), BYTES, CONFIG, 1, 'all')[0] == {'error': 'no image at gone.png'}


def test_the_text_command_writes_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'in.jsonl', '\n'.join(json.dumps({'text': f'doc {i}'}) for i in range(30)))
    process = inside('prepare_data.py', 'text', f'--source={tmp_path}/in.jsonl', '--max_examples=20', '--name=mine',
                     '--val_every=10')
    assert process.returncode == 0, process.stderr
    train, val = (open_rows(str(tmp_path / 'data' / 'mine'), split) for split in ('train', 'val'))
    assert len(train) == 18 and [val[i]['text'] for i in range(2)] == ['doc 9', 'doc 19']
    refused(inside('prepare_data.py', 'text'), '--source')
    refused(inside('prepare_data.py', 'txt'), 'expected a command')


# ---------------------------------------------------------------------------------------------------------------------
# images

def halves(mode, left, right, size=(40, 20)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize('name,image,left,right', [
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
def test_every_mode_becomes_rgb_with_the_right_colours(tmp_path, name, image, left, right):
    image.save(tmp_path / name)
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


def test_a_line_of_text_becomes_one_row_of_patches_whatever_its_size_margins_and_colours():
    config = tiny_config(patch_height=16, line_height=16, max_image_tokens=64)
    line = render.draw('some (line)', 600, 30, trim=True)
    patches, grid = vision.preprocess(line, config)
    assert grid[:, 0].max() == 0 and len(grid) > 5
    framed = Image.new('RGB', (line.width + 90, line.height + 40), 'white')
    framed.paste(line, (70, 10))
    assert torch.equal(vision.preprocess(framed, config)[0], patches)
    assert torch.equal(vision.preprocess(ImageOps.invert(line), config)[0], patches)
    _, larger = vision.preprocess(line.resize((line.width * 2, line.height * 2)), config)
    assert abs(len(larger) - len(grid)) <= 1
    assert len(vision.preprocess(Image.new('RGB', (64, 16), 'white'), config)[1]) == 8  # nothing to frame


def test_letters_of_one_size_come_out_in_one_size_whatever_the_line_says():
    heights = {text: vision.frame_line(render.draw(text, 600, 60, size=40)).height
               for text in ('the quick brown fox', 'It has no tail at all', 'a gypsy jumps, (hyphen)')}
    assert max(heights.values()) - min(heights.values()) <= 4, heights


# ---------------------------------------------------------------------------------------------------------------------
# shapes

def test_a_spelt_answer_is_a_token_for_each_character_and_the_same_text(tmp_path):
    (tmp_path / 'words.txt').write_text('red\ncircle\na\n')
    tokenizer = get_tokenizer(str(tmp_path / 'words.txt'))
    config = tiny_config(image_token=tokenizer.encode_single_token(IMAGE), vocab_size=tokenizer.n_vocab)
    whole = read('a red circle', random.Random(0), KNOBS)
    spelt = read('a red circle', random.Random(0), SimpleNamespace(**{**vars(KNOBS), 'spell': True}))
    assert spelt == {**whole, 'spell': True, 'images': spelt['images']}
    asked = [{'role': 'user', 'content': f'{IMAGE}red circle?'}, *spelt['messages'][1:]]
    a, b = (tokenize({**e, 'messages': asked}, tokenizer, config) for e in (whole, spelt))
    answers = [[i for i in t['targets'] if i >= 0] for t in (a, b)]
    assert [tokenizer.decode_single_token_bytes(i) for i in answers[1][:-1]] == [c.encode() for c in 'a red circle']
    assert len(answers[0]) == 4 and decode(tokenizer, answers[0]) == decode(tokenizer, answers[1]) == 'a red circle'
    assert len(b['idx']) - len(a['idx']) == 13 - 4  # the question is not spelt


def test_words_are_one_token_and_everything_else_comes_back_as_it_was(tmp_path):
    (tmp_path / 'words.txt').write_text('red\ncircle\na\n')
    tokenizer = get_tokenizer(str(tmp_path / 'words.txt'))
    assert len(encode(tokenizer, 'red circle')) == 2
    text = 'a red<image>circle, redcircle caf\u00e9 \u4e2d\n\t 12'
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert max(encode(tokenizer, text)) < tokenizer.encode_single_token(IMAGE)
    assert drawable_ids(tokenizer, 320).sum() == 256 + 2 + 3 + 1  # bytes, words, words behind a space, the end
    with pytest.raises(ValueError, match='no tokenizer at'):
        get_tokenizer(str(tmp_path / 'none.txt'))


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
    return {split: prepare_data.JsonLines(str(data / f'{split}.jsonl')) for split in ('train', 'val')}, data


def test_shapes_has_every_kind_of_row_and_question(shapes):
    rows = [row for part in shapes[0].values() for row in (part[i] for i in range(len(part)))]
    assert len(rows) == 400 and len(shapes[0]['val']) == 10
    assert {len(row['images']) for row in rows} == {0, 1, 2} and max(len(row['messages']) for row in rows) >= 6
    questions = ' '.join(m['content'] for row in rows for m in row['messages'][::2])
    for part in ('What colour', 'What is the', 'Is there', 'How many', 'Where is', 'more shapes', 'In the second', 'Describe'):
        assert part in questions, part
    answers = [m['content'] for row in rows for m in row['messages'][1::2]]
    yes, no = answers.count('yes'), answers.count('no')
    assert 0.3 < yes / (yes + no) < 0.7
    words = set((shapes[1] / 'words.txt').read_text().split())
    assert set(re.findall('[A-Za-z]+', questions + ' '.join(answers))) - {'image'} <= words


def test_a_shapes_answer_is_what_the_picture_shows(shapes):
    """Descriptions, which name colour and place of everything, agree with the pixels; and no held-out picture is learnt."""
    checked, train_images = 0, set()
    for i in range(len(shapes[0]['train'])):
        row = shapes[0]['train'][i]
        train_images |= {Image.open(path).tobytes() for path in row['images']}
        if row['messages'][-2]['content'].endswith('Describe the picture.') and checked < 50:
            checked += 1
            picture, found = Image.open(row['images'][0]), []
            for number, place in enumerate(prepare_data.QUARTERS):
                left, top = number % 2 * 32, number // 2 * 32
                colours = picture.crop((left, top, left + 32, top + 32)).getcolors()
                names = [name for name, rgb in prepare_data.COLOURS.items() if rgb in {c for _, c in colours}]
                found += [f'{name} {place}' for name in names]
            described = row['messages'][-1]['content']
            assert found == [re.sub('^a | (circle|square|triangle|cross)', '', d) for d in described.split(', ')]
    assert checked == 50
    for i in range(10):
        assert not {Image.open(path).tobytes() for path in shapes[0]['val'][i]['images']} & train_images
