r"""
Raw data -> examples -> token batches: everything that happens to a batch before the model, read from top to bottom.

    open_rows      name or path of a dataset -> its rows, {"text": ...} or {"messages": ...}, each with "images"
    Examples       row -> example; plain text becomes images here, by one of the TASKS ocr, continuation, text
    load_image     any image file -> RGB
    get_tokenizer  bytes, gpt2, nanoGPT's meta.pkl or any tokenizer.json -> ids, with the model's own chat template
    tokenize       example -> ids, targets, images; each <image> widened to as many ids as the encoder gives tokens
    collate        examples -> one padded batch
    Batches        the micro-batches of a run, a pure function of (seed, index): resuming needs no loader state

The example format is a JSON line, with image files next to it (drawn text has PIL images in their place):

    {"messages": [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}],
     "images": ["images/1.jpg"]}
    {"text": "A paragraph. <image> Another paragraph. <image>", "images": ["images/2.jpg", "images/3.png"]}
    {"text": "<image>A cat on a mat.", "images": ["photos.zip/4.jpg"], "references": ["A cat on a mat.", "A mat with a cat."]}

"references" are all the correct captions of a held-out image. As a script this file writes datasets to
data/NAME/{train,val}.jsonl and shows what is in them; `prepare_data.py COMMAND --help` lists the knobs of a command:

    $ python prepare_data.py text --source=HuggingFaceFW/fineweb --subset=sample-10BT --max_examples=100000 --name=fineweb
    $ python prepare_data.py shapes                                              # drawn here, nothing is downloaded
    $ python prepare_data.py llava_instruct --image_dir=coco/train2017           # llava_pretrain, llava_cc3m, sharegpt4v
    $ python prepare_data.py llava_instruct --source=MINE.json --image_dir=FOLDER_OR_ZIP --name=mine
    $ python prepare_data.py coco_captions --source=annotations --image_dir=coco
    $ python prepare_data.py cc3m --max_examples=100000                          # or --source=FOLDER of .tar or img2dataset's
    $ python prepare_data.py features --dataset=mine --vision_encoder=ViT-L-14-quickgelu/openai
    $ python prepare_data.py show --dataset=mine --index=3                       # an example, and what of it is in the loss
"""

import bisect
import contextlib
import dataclasses
import fileinput
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import huggingface_hub
import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import safetensors.torch
import tiktoken
import tokenizers
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import ConcatDataset
from tqdm import tqdm

import render
import vision
from configurator import run, run_command

IMAGE, USER, ASSISTANT, END = '<image>', '<|user|>', '<|assistant|>', '<|endoftext|>'

# -----------------------------------------------------------------------------
# rows

VAL_EVERY = 20  # one row of so many is held out where a dataset comes in one piece


def open_rows(dataset, split):
    """
    The rows of a dataset as a sequence of examples. `split` is 'train' or 'val'. `dataset` is

        pydoc            the Python language reference that is part of every CPython; whole topics are held out
        a folder         with train.jsonl and val.jsonl, or with .txt, .jsonl and .parquet files to be split here
        a file           .txt (cut at blank lines), .jsonl or .parquet
        any other name   data/NAME/train.jsonl and val.jsonl, as the commands of this script write them

    Rows with blank text are left out. Raises ValueError if there is no such dataset, or a line of it is broken.
    """
    if dataset == 'pydoc':
        return pydoc_rows(split)
    files = {name: os.path.join(dataset_folder(dataset), f'{name}.jsonl') for name in ('train', 'val')}
    if any(map(os.path.isfile, files.values())):
        return FileRows(files[split])
    if not os.path.exists(dataset):
        command = f'text --source=HUB_NAME_OR_FILE --name={dataset}'
        if dataset in COMMANDS:
            command = dataset + (' --image_dir=FOLDER_OR_ZIP' if dataset in LLAVA else '')
        raise ValueError(f'no dataset {dataset!r}: expected pydoc, a file, a folder, or {files[split]}, which '
                         f'"python prepare_data.py {command}" writes')
    paths = list_files(dataset)
    rows = {name: [FileRows(path, name) for path in paths] for name in files}
    counts = {name: sum(map(len, rows[name])) for name in rows}
    if not all(counts.values()):
        raise ValueError(f'{dataset} has {sum(counts.values())} rows with text in .txt, .jsonl or .parquet files, of which '
                         f'{counts["val"]} are held out, one of {VAL_EVERY} by a hash of its image or text: that takes at '
                         f'least {VAL_EVERY}, better many more, or train.jsonl and val.jsonl')
    return ConcatDataset(rows[split])


def dataset_folder(dataset):
    return dataset if os.path.isdir(dataset) else os.path.join('data', dataset)


def list_files(path, endings=('.txt', '.jsonl', '.parquet')):
    """The files at or below a path that have one of the endings, sorted."""
    files = [path] if os.path.isfile(path) else [
        os.path.join(root, name) for root, _, names in os.walk(path) for name in names]
    return sorted(file for file in files if file.lower().endswith(endings))


class FileRows:
    """
    The rows of a .txt, .jsonl or .parquet file, read when asked for. The file's index says where they are, memory-mapped, so
    that ten million take no memory (a .txt is held in memory). With `split`, 'train' or 'val', only the rows of that side.
    """

    def __init__(self, path, split=''):
        self.path = path
        self.split = split
        self.table = None if path.endswith('.jsonl') else open_table(path)
        build = functools.partial(index_rows, every=VAL_EVERY if split else 0)
        index = map_index(path, build, np.int64, 'split-index' if split else 'index')
        n_train = len(index) - 1 - index[-1]
        if len(index) == 1 and self.table is None:
            raise ValueError(f'{path} holds no row')
        self.positions = index[n_train:-1] if split == 'val' else index[:n_train]

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, i):
        position = int(self.positions[i])
        if self.table is not None:
            return to_example(self.table[position], os.path.dirname(self.path))
        with open(self.path, 'rb') as f:
            f.seek(position)
            return to_example(json.loads(f.readline()), os.path.dirname(self.path))

    def __reduce__(self):  # a worker process maps the index itself
        return FileRows, (self.path, self.split)


def open_table(path):
    """The rows of a .txt or .parquet file by their number."""
    if path.endswith('.txt'):
        with open(path, encoding='utf-8', errors='replace') as f:
            return [{'text': text} for text in split_paragraphs(f.read())]
    import datasets  # memory-maps what it reads; takes a second to import, so only here
    try:
        return datasets.load_dataset('parquet', data_files=path, split='train')
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f'{path} is not a parquet file that can be read: {error}') from error


def scan_file(path):
    """
    (position, row as it stands there, example) of each row of a file whose text is not blank. Positions are byte offsets in a
    .jsonl, else numbers. Raises ValueError, naming the line, for a row that is broken or not understood.
    """
    is_jsonl = path.endswith('.jsonl')
    position = 0
    with open(path, 'rb') as f:
        for number, row in enumerate(tqdm(f if is_jsonl else open_table(path), desc=path, unit='row', delay=5), 1):
            size = len(row) if is_jsonl else 1
            try:
                row = json.loads(row.strip() or '{"text": ""}') if is_jsonl else row
                example = to_example(row, os.path.dirname(path))
            except json.JSONDecodeError as error:
                raise ValueError(f'{path}, line {number} is not JSON ({error}): correct or delete that line') from error
            except ValueError as error:
                raise ValueError(f'{path}, line {number}: {error}') from error
            if 'messages' in example or example['text'].replace(IMAGE, '').strip():
                yield position, row, example
            position += size


def split_paragraphs(text, min_chars=600):
    """Cuts a long text at blank lines into pieces of at least min_chars characters (the last one may be shorter)."""
    pieces, piece = [], ''
    for paragraph in re.split(r'\n\s*\n', text):
        if paragraph.strip():
            piece += ('\n\n' if piece else '') + paragraph
        if len(piece) >= min_chars:
            pieces.append(piece)
            piece = ''
    return pieces + [piece] if piece else pieces


def pydoc_rows(split):
    """
    The topics of `help()` in pieces. One topic of ten is held out, and so is every paragraph of it that other topics
    repeat. Lines without a letter, rules and table borders, are left out.
    """
    from pydoc_data.topics import topics
    paragraphs = {'val': {}, 'train': {}}  # without white space -> as it stands; a dict keeps their order
    for name in sorted(topics, key=lambda name: (not is_held_out(name, 10), name)):  # held-out topics first
        text = '\n'.join(line for line in topics[name].split('\n') if not line.strip() or re.search('[A-Za-z]', line))
        for paragraph in re.split(r'\n\s*\n', text):
            key = ''.join(paragraph.split())
            if key not in paragraphs['val']:
                paragraphs['val' if is_held_out(name, 10) else 'train'].setdefault(key, paragraph)
    return [{'text': piece, 'images': []} for piece in split_paragraphs('\n\n'.join(paragraphs[split].values()))]


# -----------------------------------------------------------------------------
# other people's rows: this is the one place that understands their keys

IMAGE_KEYS = ('images', 'image', 'image_path', 'image_paths')
LOOKS_LIKE_IMAGE = re.compile(r'(image|img|picture|photo|pic|jpe?g|png|webp|gif|tiff?)s?'
                              r'([_-]?(path|file|file_?name|name|url|uri|bytes|data|base64)s?)?([_-]?\d+)?', re.IGNORECASE)
ROLES = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant', 'system': 'system'}


def to_example(row, folder):
    """
    A row -> {'messages': [{'role', 'content'}] or 'text', 'images': [paths]} and its other keys. Understood are TRL's and
    LLaMA-Factory's rows, which are ours, LLaVA's "conversations", and "image", "image_path", "image_paths". Relative paths
    start at `folder`, the file's own. Images that the text does not mention come first: an <image> for each in front of the
    first user's turn, or of the text. Raises ValueError for a row without text, or with an image that is not understood.
    """
    if not isinstance(row, dict):
        raise ValueError(f'expected an object with "text" or "messages", got {str(row)[:60]}')
    example, images = {}, []
    for key, value in row.items():
        if value and LOOKS_LIKE_IMAGE.fullmatch(key) and not isinstance(value, (int, float)):
            paths = value if isinstance(value, list) else [value]
            if images or key not in IMAGE_KEYS or not all(isinstance(path, str) for path in paths):
                raise ValueError(f'the key "{key}" looks like an image and is not understood: expected one key, "images", '
                                 'with a list of paths')
            images = [os.path.join(folder, path) for path in paths]
        elif value is not None and key not in IMAGE_KEYS:
            example[key] = value
    turns = example.pop('conversations', None) or example.get('messages')
    if turns:
        example['messages'] = [to_message(turn) for turn in turns]
    elif 'text' in row:
        example.setdefault('text', '')  # null is blank
    if not turns and not isinstance(example.get('text'), str):
        raise ValueError(f'expected an object with "text" or "messages", got {str(row)[:60]}')
    if images:
        place_images(example, len(images))
    return {**example, 'images': images}


def to_message(turn):
    """A turn of TRL ("role", "content", which may be a list of parts) or LLaVA ("from", "value") -> {'role', 'content'}."""
    try:
        role = ROLES[turn.get('role') or turn['from']]
        content = turn['content'] if 'content' in turn else turn['value']
        if isinstance(content, list):
            content = ''.join(map(part_to_text, content))
        return {'role': role, 'content': content + ''}
    except (AttributeError, KeyError, TypeError):
        raise ValueError('expected a message by "user", "assistant" or "system" with a "content" of texts and images, got '
                         f'{str(turn)[:60]}') from None


def part_to_text(part):
    part = {key: value for key, value in part.items() if value is not None}
    if part == {'type': 'image'}:  # the image itself is in "images"
        return IMAGE
    return {'text': part['text']}[part['type']]


def place_images(example, n_images):
    """Puts n_images <image> in front of the first user's turn, or of the text, if there is none yet."""
    is_text = 'messages' not in example
    key, place = ('text', IMAGE) if is_text else ('content', IMAGE + '\n')
    turns = [example] if is_text else example['messages']
    n_places = sum(turn[key].count(IMAGE) for turn in turns)
    if n_places not in (0, n_images):
        raise ValueError(f'{n_places} <image> places for {n_images} images')
    if not n_places:
        first = next((turn for turn in turns if turn.get('role') == 'user'), turns[0])
        first[key] = place * n_images + first[key]


# -----------------------------------------------------------------------------
# what is held out, and the order of an epoch: functions of a hash, so that neither takes memory

def hash64(text):
    return int.from_bytes(hashlib.sha256(text.encode(errors='replace')).digest()[:8], 'big')


def is_held_out(key, every):
    """The one rule for what training never gets: one key of `every`, by its hash."""
    return hash64(key) < 2**64 / every


def holdout_key(row):
    """What decides on which side a row is: its image, else its text."""
    keys = (*IMAGE_KEYS, 'text', 'messages', 'conversations')
    return str(next((row[key] for key in keys if row.get(key)), ''))


def shuffled_index(i, n, key):
    """
    Number i of a random order of range(n). `key` chooses the order. A Feistel network permutes the numbers of an even
    count of bits; a result that is not below n is permuted again.
    """
    half = ((n - 1).bit_length() + 1) // 2
    while True:
        left, right = i >> half, i % (1 << half)
        for r in range(4):
            left, right = right, left ^ hash64(f'{key} {r} {right}') % (1 << half)
        i = left << half | right
        if i < n:
            return i


# -----------------------------------------------------------------------------
# index files: where the rows of a .jsonl and the members of an archive are

def map_index(path, build, dtype, suffix='index'):
    """
    The index of a file as a memory-mapped array. It is PATH.index, or in the user's cache folder where that cannot be
    written. If there is none, or the file has changed since, build(path, file) writes it.
    """
    status = os.stat(path)
    header = struct.pack('<qq', status.st_size, status.st_mtime_ns)
    path = os.path.abspath(path)
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    candidates = [f'{path}.{suffix}', os.path.join(cache, 'glimpse', f'{hash64(path):x}.{suffix}')]
    index = next((index for index in candidates if starts_with(index, header)), '')
    if not index:
        index = candidates[0] if os.access(os.path.dirname(path), os.W_OK) else candidates[1]
        os.makedirs(os.path.dirname(index), exist_ok=True)
        part = f'{index}.{os.getpid()}.{threading.get_ident()}'
        try:
            with open(part, 'wb') as f:
                f.write(header)
                build(path, f)
            os.replace(part, index)  # so that an interrupted command leaves no half index
        finally:
            if os.path.exists(part):
                os.remove(part)
    # unlike np.memmap this keeps no file open: there may be thousands of archives
    mapped = torch.from_file(index, False, os.path.getsize(index), dtype=torch.uint8).numpy()
    return mapped[len(header):].view(dtype)


def starts_with(path, header):
    if not os.path.isfile(path):
        return False
    with open(path, 'rb') as f:
        return f.read(len(header)) == header


def index_rows(path, f, every):
    """Writes int64 to f: the positions of the rows to train on, of those held out (none if every is 0), the latter's number."""
    with tempfile.TemporaryFile() as held_out:
        for position, row, _ in scan_file(path):
            is_val = every and is_held_out(holdout_key(row), every)
            (held_out if is_val else f).write(struct.pack('<q', position))
        n_held_out = held_out.tell() // 8
        held_out.seek(0)
        shutil.copyfileobj(held_out, f)
    f.write(struct.pack('<q', n_held_out))


# -----------------------------------------------------------------------------
# plain text becomes examples. A task is (text, rng, config, length_scale) -> example; config holds train.py's knobs,
# length_scale in (0, 1] is the length of the drawn text while a run with length_warmup begins

def text_span(text, rng, min_chars, max_chars):
    """A random span of min_chars to max_chars characters of the text, at word boundaries if there are any."""
    length = rng.randint(min_chars, max_chars)
    if len(text) <= length:
        return text.strip()
    start = rng.randrange(len(text) - length + 1)
    while start and not text[start - 1].isspace():
        start -= 1  # back to the beginning of the word
    end = start + length
    if end < len(text) and not text[end].isspace():
        cut = max(text.rfind(' ', start, end), text.rfind('\n', start, end))
        end = cut if cut - start >= min_chars else end
    while len(text[start:end].strip()) < min_chars and end < len(text):
        end += 1
    return text[start:end].strip()


def render_text(text, rng, config):
    """
    The text drawn into the config's box, shortened until it fits. Returns the text as drawn and the image; ('', None) for a
    text of which the font has no character.
    """
    font = rng.choice(render.list_fonts(config.font))
    text = render.strip_unsupported(text, font)
    text = ' '.join(text.split()) if config.one_line else text
    augmentation = render.augmentation(rng, config.distort)
    if not text.strip():
        return '', None
    while True:
        try:
            return text, render.draw(text, config.image_width, config.image_height, font, trim=config.one_line,
                                     min_size=config.font_min, max_size=config.font_max, **augmentation)
        except render.DoesNotFit:
            if len(text) < 2:
                raise
            text = text[:len(text) * 7 // 8].rstrip()


def ocr(text, rng, config, length_scale=1.0):
    """An image of a span of text -> the span."""
    max_chars = max(2, round(config.max_chars * length_scale))
    min_chars = min(config.min_chars, 1 + max_chars // 2)
    span = text_span(' '.join(text.split()) if config.one_line else text, rng, min_chars, max_chars)
    span, image = render_text(span, rng, config)
    if not span:  # the font can draw nothing of it: it stays text
        return {'text': text}
    messages = [{'role': 'user', 'content': IMAGE}, {'role': 'assistant', 'content': span}]
    example = {'messages': messages, 'images': [image]}
    return {**example, 'char_level': True} if config.char_level else example


def continuation(text, rng, config, length_scale=1.0):
    """
    Text with an image in place of its middle -> the text after it: text-only VLM pretraining. "infix" keeps the drawn
    text, so that an evaluation can measure how much of it the model took from the pixels.
    """
    words = re.findall(r'\s*\S+', text_span(text, rng, config.min_span, config.max_span))
    if len(words) < 3:  # too short to be split: it stays text
        return {'text': text}
    prefix, infix, postfix = map(''.join, render.split(words, rng, config.infix_min, config.infix_max))
    drawn, image = render_text(infix.strip(), rng, config)
    if not drawn:
        return {'text': text}
    if infix.split() != drawn.split():  # shortened to fit, or glyphs are missing
        infix = ' ' + drawn
    return {'text': prefix + IMAGE + postfix, 'images': [image], 'infix': infix, 'loss_on': 'postfix'}


def plain_text(text, rng, config, length_scale=1.0):
    """A span of text as text, so that the model does not forget language."""
    return {'text': text_span(text, rng, config.min_span, config.max_span)}


TASKS = {'ocr': ocr, 'continuation': continuation, 'text': plain_text}


def parse_tasks(spec):
    """'ocr:0.8 text:0.2' -> {'ocr': 0.8, 'text': 0.2}. Raises ValueError for an unknown task or a weight <= 0."""
    weights = {}
    for word in spec.split():
        task, _, weight = word.partition(':')
        try:
            weights[task] = float(weight or 1)
        except ValueError:
            weights[task] = 0.0
        if task not in TASKS or not weights[task] > 0:
            raise ValueError(f'tasks: expected {", ".join(TASKS)} with weights, like "ocr:0.8 text:0.2", got {word!r}')
    if not weights:
        raise ValueError('tasks is empty: expected something like "ocr:0.8 text:0.2"')
    return weights


class Examples:
    """
    The examples of a split, endlessly: example i is a function of (seed, i) alone. Each epoch goes through all rows in
    another order and, for plain text, draws another task, span and image from each.

        length_warmup  over so many examples the drawn text grows from a few characters to max_chars
        exclude        text of which no drawn line may be a part
    """

    def __init__(self, rows, config, seed, tasks=None, shuffle=True, length_warmup=0, exclude=''):
        if config.augment not in ('', 'crop', 'color', 'crop+color'):
            raise ValueError(f"augment must be crop, color or crop+color, or '' for none, got {config.augment!r}")
        self.rows = rows
        self.config = config
        self.seed = seed
        self.tasks = parse_tasks(config.tasks if tasks is None else tasks)
        self.shuffle = shuffle
        self.length_warmup = length_warmup
        self.exclude = exclude
        # whether the rows are plain text, which gives any number of examples, each with another image
        self.is_plain_text = 'messages' not in rows[0] and not rows[0].get('images')

    def __getitem__(self, i):
        epoch, position = divmod(i, len(self.rows))
        if self.shuffle:
            position = shuffled_index(position, len(self.rows), f'{self.seed} {epoch}')
        row = self.rows[position]
        rng = random.Random(f'{self.seed} {i}')
        images = row.get('images') or []
        if 'messages' not in row and not images:
            return self.draw_example(row['text'], rng, i)
        if self.shuffle and self.config.augment:
            images = [augment_image(load_image(source), rng, self.config.augment) for source in images]
        return {**row, 'images': images}

    def draw_example(self, text, rng, i):
        task = TASKS[rng.choices(list(self.tasks), list(self.tasks.values()))[0]]
        length_scale = min(1.0, (i + 1) / self.length_warmup) if self.length_warmup else 1.0
        for _ in range(100):
            example = task(text, rng, self.config, length_scale)
            if 'messages' not in example or example['messages'][-1]['content'] not in self.exclude:
                break
        return example


def held_out_examples(dataset, config, tasks):
    """
    The examples of a dataset's held-out rows, in their order. pydoc is small enough to be searched: no line drawn from its
    held-out text occurs in its training text, not even a common phrase.
    """
    texts = [row['text'] for row in open_rows(dataset, 'train')] if dataset == 'pydoc' else []
    exclude = '\n'.join(' '.join(text.split()) for text in texts)
    return Examples(open_rows(dataset, 'val'), config, seed=0, tasks=tasks, shuffle=False, exclude=exclude)


# -----------------------------------------------------------------------------
# images

def load_image(source, draft=None):
    """
    A path (also one into an archive: images.zip/00453/1.jpg, 0000.tar/1.jpg) or PIL image -> RGB PIL image, upright: EXIF
    rotation is applied, transparency laid over white, 16 bits scaled to 8. `draft`, a size in pixels, decodes a JPEG faster
    at a reduced size. Raises ValueError, naming the file, for one that is missing, empty, cut off, damaged or no image.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(read_bytes(str(source))))
        if draft:
            image.draft('RGB', draft)
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # for a damaged file Pillow, zlib and struct raise nearly anything
        reason = f'{source} is not an image that can be read: {error}'
        if isinstance(error, FileNotFoundError):
            reason = f'no image at {source}'
        raise ValueError(reason) from error


def to_rgb(image):
    if image.mode.startswith('I') or image.mode == 'F':
        image = image.convert('F').point(lambda v: v / 257).convert('L')  # 65535 / 257 = 255
    if image.mode in ('LA', 'PA', 'RGBA', 'La', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def image_error(path):
    """'' for an image that training can load, else the reason. The decision is load_image's."""
    try:
        load_image(path, draft=(64, 64))
    except ValueError as error:
        is_missing = isinstance(error.__cause__, FileNotFoundError)
        return 'the image is missing' if is_missing else 'the image is broken'
    return ''


def augment_image(image, rng, augment):
    """
    A part of the image, half of it or more, in its own aspect or up to a third off (crop), and brighter or darker, paler or
    more colorful, of more or less contrast (color), as BLIP-2 was trained. It is not mirrored: left would become right, and
    no letter could be read.
    """
    if 'crop' in augment:
        width, height = image.size
        area = width * height * rng.uniform(0.5, 1)
        aspect = width / height * math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        crop_width = max(1, min(width, round(math.sqrt(area * aspect))))
        crop_height = max(1, min(height, round(math.sqrt(area / aspect))))
        x = rng.randint(0, width - crop_width)
        y = rng.randint(0, height - crop_height)
        image = image.crop((x, y, x + crop_width, y + crop_height))
    if 'color' in augment:
        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(rng.uniform(0.6, 1.4))
    return image


# -----------------------------------------------------------------------------
# images in archives: read in place, and no archive is kept open

ARCHIVE = re.compile(r'(.+?\.(?:zip|tar|tar\.gz|tgz))/(.+)')
MEMBER = np.dtype([('name', '<u8'), ('offset', '<i8'), ('size', '<i8'), ('method', '<u4'), ('crc', '<u4')])
IN_TAR = 1 << 16  # `method` of a tar's members: they are not compressed, and have no checksum


def read_bytes(path):
    """The bytes of a file, or of a member of an archive: photos.zip/a/1.jpg, 0000.tar/1.jpg."""
    match = ARCHIVE.fullmatch(path)
    if match and not os.path.isdir(match[1]):
        return read_member(match[1], match[2])
    with open(path, 'rb') as f:
        return f.read()


def read_member(archive, name):
    """The bytes of a member of a .zip or .tar, checked. FileNotFoundError if there is none; whatever zlib raises."""
    status = os.stat(archive)
    members = map_members(archive, status.st_size, status.st_mtime_ns)
    key = np.uint64(hash64(name))
    i = bisect.bisect_right(members['name'], key) - 1
    if i < 0 or members['name'][i] != key:
        raise FileNotFoundError(f'{archive} has no {name}')
    _, offset, size, method, crc = members[i].item()
    with open(archive, 'rb') as f:
        f.seek(offset)
        if method != IN_TAR:  # skip the local header, with a name and an extra field of variable length
            f.seek(sum(struct.unpack('<26xHH', f.read(30))), os.SEEK_CUR)
        data = f.read(size)
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompress(data, -zlib.MAX_WBITS)
    elif method not in (zipfile.ZIP_STORED, IN_TAR):
        raise ValueError(f'compression method {method} of a .zip is not supported: store or deflate its members')
    if method != IN_TAR and zlib.crc32(data) != crc:
        raise ValueError('its checksum is wrong')
    return data


@functools.cache
def map_members(archive, size, mtime_ns):
    return map_index(archive, index_archive, MEMBER)


def index_archive(path, f):
    """Writes where the members of an archive are to f, sorted by the hashes of their names. ValueError if it is broken."""
    if path.endswith('gz'):
        raise ValueError(f'{path} is compressed, so that no single image can be read from it: unpack it to a .tar first')
    try:
        if path.endswith('.tar'):
            with tarfile.open(path, 'r:') as tar:
                rows = [(m.name, m.offset_data, m.size, IN_TAR, 0) for m in tar if m.isfile()]
        else:
            with zipfile.ZipFile(path) as archive:
                rows = [(m.filename, m.header_offset, m.compress_size, m.compress_type, m.CRC) for m in archive.infolist()]
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f'{path} is broken or cut off: {error}') from error
    rows = [(name.removeprefix('./'), *rest) for name, *rest in rows]
    if len({name.partition('/')[0] for name, *_ in rows}) == 1:  # COCO's have one folder, which names may leave out
        rows += [(name.partition('/')[2], *rest) for name, *rest in rows]
    members = np.array([(hash64(name), *rest) for name, *rest in rows], MEMBER)
    f.write(members[members['name'].argsort(kind='stable')].tobytes())


# -----------------------------------------------------------------------------
# features of a frozen encoder, computed once

class FeatureCache:
    """
    What `prepare_data.py features` has stored, a file for each image: cache[path] is (features (L', C), grid (L', 2)), which
    replace the image's patches. A cache belongs to one encoder's weights (by fingerprint), layer, fit and pooling, so a stale
    one is never found.
    """

    def __init__(self, dataset, config, fingerprint, dtype=''):
        made_by = [fingerprint, config.vision_layer, config.vision_cls, config.image_fit, vision.cell_size(config)]
        self.root = dataset_folder(dataset)
        self.folder = os.path.join(self.root, f'features-{hash64(json.dumps(made_by)):016x}')
        self.finished = os.path.join(self.folder, 'finished.json')
        self.dtype = dtype

    @classmethod
    def find(cls, dataset, config, fingerprint):
        """The finished cache that fits the model, or None. Without published weights features change with every step."""
        cache = cls(dataset, config, fingerprint)
        if not fingerprint or not os.path.exists(cache.finished):
            return None
        with open(cache.finished, encoding='utf-8') as f:
            cache.dtype = json.load(f)['dtype']
        return cache

    def file_for(self, path):
        return os.path.join(self.folder, f'{hash64(os.path.relpath(path, self.root)):016x}-{self.dtype}.safetensors')

    def __getitem__(self, path):
        try:
            features = safetensors.torch.load_file(self.file_for(path))['features']
        except FileNotFoundError:
            raise ValueError(f'{path} is not among the features in {self.folder}: run "python prepare_data.py features" '
                             'again, or train with --feature_cache=False') from None
        return features, torch.zeros(len(features), 2, dtype=torch.int64)


# -----------------------------------------------------------------------------
# tokenizers

MARK = '\ufdd0'  # a special token in a text to be encoded; Unicode reserves this code, so no text has it
NOT_TEXT = re.compile(f'[\ud800-\udfff{MARK}]')  # surrogates, which have no UTF-8, and the mark


@dataclasses.dataclass(eq=False)
class Tokenizer:
    """
    Text <-> ids, by tiktoken. Data text never becomes a special token. Besides its fields it has

        image_id           the id of <image>
        n_vocab, n_text    1 + the largest id; the number of ids that are plain text
        begin, end         the special tokens at the two ends of a text
        end_ids            the ids that end a text or an answer; the first one is that of `end`
        has_chat_template  whether the tokenizer came with a chat template

    Raises ValueError for a chat template that cannot be rendered.
    """
    name: str
    backend: object       # a tiktoken.Encoding
    special: dict         # {special token: id}
    text_ids: list        # all other ids
    system_prompt: str
    names: dict           # {'eos_token': special token, ...}: the names by which chat templates use them
    template: str = ''    # the chat template
    files: tuple = ()     # the paths of a published tokenizer, which an export copies
    characters: str = ''  # the only characters with an id; '': all have one

    def __post_init__(self):
        self.image_id = self.special[IMAGE]
        self.n_vocab = 1 + max(*self.text_ids, *self.special.values())
        self.n_text = len(self.text_ids)
        self.end = END if END in self.special else self.names['eos_token']
        self.begin = END if END in self.special else self.names.get('bos_token', self.end)
        self.has_chat_template = bool(self.template)
        self.template = self.template or (CHATML if '<|im_start|>' in self.special else TEMPLATE)
        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_pattern = re.compile(f'({"|".join(map(re.escape, longest_first))})')
        shape = (('user', SLOT), ('assistant', SLOT))
        self.content_is_list = False
        try:
            template_segments(self, shape)
        except ValueError:  # the template may expect a list of texts and images
            self.content_is_list = True
        turns = template_segments(self, shape)
        answer_ends = [text for text, is_special, is_answer in turns if is_special and is_answer]
        self.end_ids = [self.special[token] for token in dict.fromkeys([self.end, *answer_ends])]

    def encode(self, text):
        """Data text -> ids; special tokens in it stay text. ValueError for a character without an id."""
        return self.encode_segments([(text, False, False)])[0]

    def encode_segments(self, pieces, char_level=False):
        """
        [(text, is_special, in_loss)] -> the ids, and for each id whether it is in the loss. Text between
        two special tokens is encoded as one string, as transformers does: a token may cross the border of
        two segments, and is in the loss if one of its characters is. With char_level, each character in the
        loss is encoded alone.
        """
        text = flags = ''
        marked = []  # what the marks stand for: an id, or None, where a mark only keeps texts apart
        for piece, is_special, in_loss in pieces:
            if is_special:
                marked.append(self.special.get(piece))
                piece = MARK
            else:
                piece = NOT_TEXT.sub('\ufffd', piece)
                if char_level and in_loss:
                    marked += [None] * (len(piece) + 1)
                    piece = MARK + MARK.join(piece) + MARK
            text += piece
            flags += str(int(in_loss)) * len(piece)
        marked = iter(marked)
        ids, ids_in_loss = [], []
        for token, (start, end) in zip(*self.encode_with_offsets(text)):
            characters = text[start:end]
            if characters == MARK:
                token = next(marked)
            elif characters in self.special:  # Unigram models do that
                raise ValueError(f'{self.name} makes a special token of the text {characters!r}: leave it out')
            if token is not None:
                ids.append(token)
                ids_in_loss.append('1' in flags[start:end])
        return ids, ids_in_loss

    def encode_with_offsets(self, text):
        """The ids of a text in which MARK is a token, and for each id where its characters start and end."""
        unknown = set(text) - {*self.characters, MARK} if self.characters else ''
        if unknown:
            raise ValueError(f'{self.name} has no id for the characters {"".join(sorted(unknown))!r}: leave them '
                             'out or take --tokenizer=bytes')
        ids = self.backend.encode(text, allowed_special={MARK}, disallowed_special=())
        starts = self.backend.decode_with_offsets(ids)[1]
        ends = [*starts[1:], len(text)]
        # a character may be several ids
        return ids, [(start, max(start + 1, end)) for start, end in zip(starts, ends)]

    def decode(self, ids):
        """Ids -> text, special tokens by name. Bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(ids)

    def allowed_ids(self, vocab_size):
        """
        bool (vocab_size,): the ids that may be generated: text, the end tokens and what else the tokenizer
        brought along, but not <image>, <|user|> and <|assistant|>, and nothing that it cannot decode.
        """
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[self.text_ids] = True
        allowed[[i for token, i in self.special.items() if token not in (IMAGE, USER, ASSISTANT)]] = True
        return allowed


class HuggingFaceTokenizer(Tokenizer):
    """The same by a tokenizers.Tokenizer, which is the backend."""

    def encode_with_offsets(self, text):
        self.backend.encode_special_tokens = True  # as text; pickling loses this switch
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids):
        return self.backend.decode(ids, skip_special_tokens=False)


def get_tokenizer(name, system_prompt='auto'):
    """
    A Tokenizer by name:

        bytes           one token a byte: 256 and the special ones; nothing to download, takes any text
        gpt2            GPT-2's BPE, whose <|endoftext|> (50256) it keeps; tiktoken downloads it once
        .../meta.pkl    the characters of a nanoGPT dataset; other characters are refused
        .../words.txt   a token for each word of the file, and one with a space before it; the rest is bytes
        tokenizer.json  of Hugging Face: a file, a folder with it, or OWNER/NAME on the hub

    system_prompt is the system message of conversations that have none; 'auto' leaves that to the chat
    template. Raises ValueError for another name, and for files that are missing, damaged or cannot be
    downloaded.
    """
    pattern = r'(?s:.)'
    special, characters = {}, ''
    if name.endswith(('.pkl', '.txt', '.json')) and not os.path.isfile(name):
        raise ValueError(f'no tokenizer at {name}: "python prepare_data.py shapes" writes a words.txt, nanoGPT a '
                         'meta.pkl; --tokenizer=bytes needs no file')
    if name == 'bytes':
        ranks = {bytes([i]): i for i in range(256)}
    elif name == 'gpt2':
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except OSError as error:
            raise ValueError("GPT-2's BPE is not in tiktoken's cache and cannot be downloaded "
                             f'({type(error).__name__}): connect once, or use --tokenizer=bytes') from error
        pattern, ranks, special = gpt2._pat_str, gpt2._mergeable_ranks, dict(gpt2._special_tokens)
    elif name.endswith('.pkl'):
        ranks = read_meta(name)
        characters = b''.join(ranks).decode()
    elif name.endswith('.txt'):
        ranks = read_words(name)
        pattern = r' ?[^\W\d_]+|(?s:.)'
    elif name.endswith('.json') or os.path.isdir(name) or name.count('/') == 1:
        return read_hugging_face(name, system_prompt)
    else:
        raise ValueError('tokenizer must be bytes, gpt2, the path of a meta.pkl, words.txt or tokenizer.json, or '
                         f'OWNER/NAME on the hub, got {name!r}')
    for token in (IMAGE, USER, ASSISTANT, END):
        special.setdefault(token, len(ranks) + len(special))
    backend = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                special_tokens={**special, MARK: len(ranks) + len(special)})
    text_ids = list(ranks.values())
    return Tokenizer(name, backend, special, text_ids, system_prompt, {'eos_token': END}, characters=characters)


def read_meta(path):
    """{character as UTF-8: id} of a nanoGPT meta.pkl. A pickle can run code: this one may hold values only."""

    class Values(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f'it asks for {module}.{name}')

    try:
        with open(path, 'rb') as f:
            stoi = Values(f).load()['stoi']
        ranks = {character.encode(): int(i) for character, i in stoi.items()}
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f'{path} is not the meta.pkl of a nanoGPT character dataset: {error}') from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f'{path}: expected the ids 0 to {len(ranks) - 1}, each once')
    return ranks


def read_words(path):
    """{bytes: id} of a words.txt: every byte, and each word with and without a space before it."""
    with open(path, encoding='utf-8') as f:
        words = [space + word for word in f.read().split() for space in ('', ' ')]
    tokens = [bytes([i]) for i in range(256)] + [word.encode() for word in words]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def read_hugging_face(name, system_prompt):
    """The HuggingFaceTokenizer of a tokenizer.json, of a folder with it or of OWNER/NAME on the hub."""
    folder = name
    file_names = ['tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja']
    if name.endswith('.json'):
        folder, file_names[0] = os.path.split(name)
    elif not os.path.isdir(name):
        try:
            folder = huggingface_hub.snapshot_download(name, allow_patterns=file_names)
        except Exception as error:  # the hub's client has many of its own
            raise ValueError(f'{name}: it is not in the cache of huggingface_hub and cannot be downloaded '
                             f'({type(error).__name__}): connect once, or name a folder with it') from error
    files = [os.path.join(folder, file_name) for file_name in file_names]
    if not os.path.isfile(files[0]):
        raise ValueError(f'{name} has no tokenizer.json: name another tokenizer, such as --tokenizer=gpt2')
    files = tuple(filter(os.path.isfile, files))
    config = {}
    try:
        for path in files[1:]:
            with open(path, encoding='utf-8') as f:
                config |= {'chat_template': f.read()} if path.endswith('.jinja') else json.load(f)
        backend = tokenizers.Tokenizer.from_file(files[0])
    except Exception as error:  # that of tokenizers has no class of its own
        raise ValueError(f'{name}: its tokenizer.json or chat template cannot be read ({type(error).__name__}: '
                         f'{error}): download it again') from error
    template = config.get('chat_template') or ''
    if isinstance(template, list):
        template = {entry['name']: entry['template'] for entry in template}.get('default', '')
    names = {'eos_token': END}
    for key, token in config.items():
        if key.endswith('_token') and token:
            names[key] = token['content'] if isinstance(token, dict) else token
    backend.no_truncation()
    backend.no_padding()
    # adds no tokens and keeps offsets exact
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    special = [token for token in added if not token.isspace()]  # also <think>, which files do not call special
    special.append(IMAGE)
    if not template and '<|im_start|>' not in special:
        special += [USER, ASSISTANT]
    special.append(names['eos_token'])
    backend.add_special_tokens(special)
    special = {token: backend.token_to_id(token) for token in special}
    text_ids = list({*backend.get_vocab().values()} - {*special.values()})
    backend.add_tokens([tokenizers.AddedToken(MARK, normalized=False)])
    return HuggingFaceTokenizer(name, backend, special, text_ids, system_prompt, names, template, files)


# -----------------------------------------------------------------------------
# conversations

SLOT = '\ufdd1'  # the text of a message while a chat template is rendered

# for tokenizers without a chat template: ours, and that of models with ChatML's tokens
TEMPLATE = r"""
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' + message.content + eos_token }}
    {%- elif message.role == 'system' %}
        {{- '<|user|>' + message.content + '\n\n' }}
    {%- else %}
        {{- '<|user|>' if loop.first or loop.previtem.role != 'system' }}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}"""

CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""


def conversation_shape(example, system_prompt, prompt_only):
    """
    What the rendered template depends on, and the texts that it does not depend on: ((role, piece, ...),
    ...), [text]. The pieces of a content stand around its images. In a piece, SLOT stands for the text;
    white space around the text stays, because templates may strip it.
    """
    messages = list(example['messages'])
    if system_prompt != 'auto' and messages[0]['role'] != 'system':
        messages.insert(0, {'role': 'system', 'content': system_prompt})
    if prompt_only and messages[-1]['role'] == 'assistant':
        messages.pop()
    shape, texts = [], []
    for message in messages:
        pieces = message['content'].split(IMAGE) if example.get('images') else [message['content']]
        for i, piece in enumerate(pieces):
            if piece or len(pieces) == 1:
                text = piece.strip()
                texts.append(text)
                pieces[i] = piece.replace(text, SLOT, 1) if text else SLOT + piece
        shape.append((message['role'], *pieces))
    return tuple(shape), texts


@functools.lru_cache(maxsize=1000)
def template_segments(tokenizer, shape, prompt_only=False):
    """
    The chat template for all conversations of one shape: [(text, is_special, is_answer)], with a number in
    the place of each SLOT. So special tokens come from the template alone. An answer is a content of the
    assistant with what follows it, up to the first special token. Raises ValueError if the template cannot
    be rendered.
    """
    texts = render_template(tokenizer, shape, prompt_only)
    # the template keeps the white space in front of an answer's text if it is missing when it is left out
    stripped = [[entry.lstrip() for entry in message] for message in shape]
    stripped_texts = render_template(tokenizer, stripped, prompt_only)
    roles = [role for role, *pieces in shape for piece in pieces if piece]
    out = []
    is_answer = False
    for text, stripped_text, number in zip(texts[::2], stripped_texts[::2], [*texts[1::2], None]):
        for i, token in enumerate(tokenizer.special_pattern.split(stripped_text)):
            is_special = i % 2 == 1
            out.append((token, is_special, is_answer))
            is_answer = is_answer and (not is_special or token == IMAGE)
        if number is not None:
            is_answer = roles[number] == 'assistant'
            out.append((text[len(stripped_text):], False, is_answer))
            out.append((number, False, is_answer))
    return [segment for segment in out if segment[0] != '']


def render_template(tokenizer, shape, prompt_only):
    """The rendered template, cut at its slots: [text, number of a slot, text, ..., text]."""
    messages = []
    n_slots = 0
    for role, *pieces in shape:
        for i, piece in enumerate(pieces):
            pieces[i] = piece.replace(SLOT, f'{SLOT}{n_slots}{SLOT}')
            n_slots += SLOT in piece
        content = IMAGE.join(pieces)
        if tokenizer.content_is_list:
            entries = filter(None, re.split(f'({IMAGE})', content))
            content = [{'type': 'image'} if entry == IMAGE else {'type': 'text', 'text': entry}
                       for entry in entries]
        messages.append({'role': role, 'content': content})
    variables = {**tokenizer.names, 'messages': messages, 'tools': None, 'add_generation_prompt': prompt_only}
    # Qwen3's template then ends a prompt with the empty thought that it writes in front of a last answer
    variables['enable_thinking'] = False
    try:
        rendered = compile_template(tokenizer.template).render(variables)
    except Exception as error:  # whatever somebody's program raises
        raise ValueError(f'{tokenizer.name}: its chat template cannot be rendered ({type(error).__name__}: '
                         f'{error})') from error
    texts = re.split(f'{SLOT}(\\d+){SLOT}', rendered)
    texts[1::2] = map(int, texts[1::2])
    if sorted(texts[1::2]) != list(range(n_slots)):
        raise ValueError(f'{tokenizer.name}: its chat template leaves out a message or repeats one')
    return texts


@functools.cache
def compile_template(source):
    """A chat template, with Jinja set up as in transformers. {% generation %} marks answers; it has no effect."""
    source = re.sub(r'({%[-+]?\s*)generation\b', r'\1if true', source)
    source = re.sub(r'({%[-+]?\s*)endgeneration\b', r'\1endif', source)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters['tojson'] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(source)


# -----------------------------------------------------------------------------
# example -> ids, targets, images

def segments(example, tokenizer, loss_on, prompt_only=False):
    """
    An example as a list of (text or special token, is_special, in_loss): a conversation in the tokenizer's
    chat template, or a text between its begin and end tokens. <image> is special only if there are images;
    "filling" is text instead of them. With prompt_only the last answer is left out, and what opens it
    stands at the end.
    """
    loss_on = example.get('loss_on', loss_on)
    if loss_on not in ('assistant', 'all', 'postfix'):
        raise ValueError(f'loss_on must be assistant or all, got {loss_on!r}')
    out = []
    if 'messages' in example:
        shape, texts = conversation_shape(example, tokenizer.system_prompt, prompt_only)
        for text, is_special, is_answer in template_segments(tokenizer, shape, prompt_only):
            text = text if isinstance(text, str) else texts[text]
            out.append((text, is_special, is_answer or loss_on == 'all'))
        return out
    image = [(IMAGE, True, False)]
    if 'filling' in example:  # '' has no id: the filling is encoded apart, so targets do not depend on it
        image = [('', True, False), (example['filling'], False, False), ('', True, False)]
    has_images = example.get('images') or 'filling' in example
    texts = example['text'].split(IMAGE) if has_images else [example['text']]
    for i, text in enumerate(texts):
        out += image if i else [(tokenizer.begin, True, False)]
        out.append((text, False, loss_on != 'postfix' or i == len(texts) - 1))
    return out if prompt_only else [*out, (tokenizer.end, True, True)]


def tokenize(example, tokenizer, config, loss_on='assistant', prompt_only=False, cache=None):
    """
    An example -> {'idx': [int], 'targets': [int], 'images': [(patches, grid)]}; config is the model's
    VisionConfig. With `cache`, a FeatureCache, image files are not opened: it has their (features, grid).
    In an example with "char_level": true, each character in the loss is a token.

    targets[t] is the token after idx[t], or -1 where it is not in the loss: for 'assistant' the loss is on
    the answers and their end, for 'all' on every text token. Image tokens never are targets, but the last
    of them predicts the text after it. Text that takes more than block_size positions is cut; an image,
    which takes one, is not, and neither is a prompt. Raises ValueError if there are more or fewer <image>
    than images, or something does not fit.
    """
    sources = example.get('images') or []
    if sources and not config.vision_encoder:
        raise ValueError('the example has an image, but the model has no vision_encoder')
    images = []
    for source in sources:
        is_cached = cache and isinstance(source, str)
        images.append(cache[source] if is_cached else vision.preprocess(load_image(source), config))
    pieces = segments(example, tokenizer, loss_on, prompt_only)
    ids, in_loss = tokenizer.encode_segments(pieces, example.get('char_level'))
    positions = [position for position, token in enumerate(ids) if token == tokenizer.image_id]
    if len(positions) != len(images):
        raise ValueError(f'the example has {len(images)} images, but its text has {len(positions)} <image>: write '
                         'one for each')
    needed = len(ids) if prompt_only else 1 + max(positions, default=-1)
    if needed > config.block_size:
        subject = 'the prompt takes' if prompt_only else 'text and images up to the last image take'
        raise ValueError(f'{subject} {needed} positions, but block_size is {config.block_size}: shorten the '
                         'text or enlarge block_size')
    if not prompt_only:  # one more than block_size, because the last id is only a target
        del ids[config.block_size + 1:], in_loss[config.block_size + 1:]
    for position, image in reversed(list(zip(positions, images))):
        n = vision.num_tokens(image, config)
        ids[position:position + 1] = [config.image_token] * n
        in_loss[position:position + 1] = [False] * n
    if prompt_only:
        return {'idx': ids, 'targets': [-1] * len(ids), 'images': images}
    targets = [token if is_target else -1 for token, is_target in zip(ids[1:], in_loss[1:])]
    return {'idx': ids[:-1], 'targets': targets, 'images': images}


def reference(example):
    """What the model should have answered: the last message's text, or the text after the last image."""
    if 'messages' in example:
        return example['messages'][-1]['content']
    return example['text'].rpartition(IMAGE)[2]


def until_end(tokenizer, ids):
    """The ids before the first one that ends an answer or a text."""
    return next((ids[:n] for n, token in enumerate(ids) if token in tokenizer.end_ids), ids)


def collate(examples, config):
    """
    Tokenized examples -> a batch:
        idx, targets  int64 (B, T), padded on the right with -1
        lengths       int64 (B,), the tokens of each example
        images        vision.collate's (patches, grid) of all images, row by row; None without vision
    Raises ValueError if ids and images disagree.
    """
    def pad(key):
        rows = [torch.tensor(example[key], dtype=torch.long) for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)  # (B, T)

    lengths = torch.tensor([len(example['idx']) for example in examples])
    batch = {'idx': pad('idx'), 'targets': pad('targets'), 'lengths': lengths, 'images': None}
    if config.vision_encoder:
        images = [image for example in examples for image in example['images']]
        n_ids = int((batch['idx'] == config.image_token).sum())
        n_tokens = sum(vision.num_tokens(image, config) for image in images)
        if n_ids != n_tokens:
            raise ValueError(f'the batch has {n_ids} <image> ids, but its images make {n_tokens} tokens')
        batch['images'] = vision.collate(images, config)
    return batch


class Batches(torch.utils.data.Dataset):
    """
    Micro-batch i holds the examples i * batch_size to (i + 1) * batch_size - 1, whichever process computes
    it, and when. What a user must read (a missing image, say) comes back as {'error': sentence}: raised in
    a loader's worker it would arrive wrapped in that worker's traceback.
    """

    def __init__(self, examples, tokenizer, config, batch_size, loss_on, cache=None):
        self.examples, self.tokenizer, self.config = examples, tokenizer, config
        self.batch_size, self.loss_on, self.cache = batch_size, loss_on, cache

    def __getitem__(self, i):
        indices = range(i * self.batch_size, (i + 1) * self.batch_size)
        arguments = self.tokenizer, self.config, self.loss_on
        try:
            examples = [tokenize(self.examples[j], *arguments, cache=self.cache) for j in indices]
            return collate(examples, self.config)
        except (ValueError, OSError) as error:
            return {'error': str(error)}


# -----------------------------------------------------------------------------
# what the commands share

def write_dataset(name, work, rows, convert):
    """
    The rows of a source to data/NAME/{train,val}.jsonl. convert(row), in threads, gives (example, '') or (None, the reason
    why the row is skipped), which skipped.jsonl lists. Each thousand rows are stored as they are done: an interrupted command
    continues there if it is called again for the same work, a dict. Raises ValueError if a side is empty.
    """
    folder = os.path.join('data', name)
    progress = os.path.join(folder, f'progress-{hash64(json.dumps(work)):x}')
    os.makedirs(progress, exist_ok=True)
    if os.listdir(progress):
        print(f'resuming with what is in {progress}', file=sys.stderr)
    rows = iter(rows)
    paths = []
    try:
        with ThreadPoolExecutor(8) as pool:
            for chunk in tqdm(iter(lambda: list(itertools.islice(rows, 1000)), []), unit='k rows'):
                path = os.path.join(progress, f'{len(paths)}.jsonl')
                if not os.path.exists(path):
                    with open(f'{path}.part', 'w', encoding='utf-8') as f:
                        for number, (row, result) in enumerate(zip(chunk, pool.map(convert, chunk)), 1000 * len(paths)):
                            for output in place_row(number, row, *result, work['val_every']):
                                print(json.dumps(output), file=f)
                    os.replace(f'{path}.part', path)
                paths.append(path)
        merge_chunks(paths, folder, work)
    except ValueError:  # what has to be corrected may concern every row
        shutil.rmtree(progress)
        raise
    for path in glob.glob(os.path.join(folder, 'progress-*')):
        shutil.rmtree(path)


def place_row(number, row, example, reason, val_every):
    """[(file, line)] of a converted row. Several captions of an image, "references", become an example each to train on."""
    if reason:
        return [('skipped', {'row': number, 'id': row.get('id'), 'image': row.get('image'), 'reason': reason})]
    split = row.get('split') or ('val' if is_held_out(holdout_key(row), val_every) else 'train')
    captions = example.pop('references', []) if split == 'train' else []
    return [(split, {**example, 'text': IMAGE + caption}) for caption in captions] or [(split, example)]


def merge_chunks(paths, folder, work):
    counts = Counter()
    files = {name: open(os.path.join(folder, f'{name}.jsonl.part'), 'w', encoding='utf-8')
             for name in ('train', 'val', 'skipped')}
    for line in fileinput.input(paths, encoding='utf-8') if paths else ():
        name, row = json.loads(line)
        print(json.dumps(row, ensure_ascii=False), file=files[name])
        counts[row.get('reason', name)] += 1
    for reason in sorted(counts.keys() - {'train', 'val'}):
        print(f'skipped: {counts[reason]} rows, {reason}', file=sys.stderr)
    if not counts['train'] or not counts['val']:
        raise ValueError(f'of {counts.total()} rows in {work["source"]}, {counts["train"]} are left to train on and '
                         f'{counts["val"]} to hold out: {folder}/skipped.jsonl.part lists why, or --val_every is too large')
    for file in files.values():
        file.close()
        os.replace(file.name, file.name.removesuffix('.part'))
    print(f'{folder}: {counts["train"]} examples to train on, {counts["val"]} held out', file=sys.stderr)


@contextlib.contextmanager
def hub_errors(problem, advice):
    """Whatever the hub's client raises (it has many errors of its own) as a ValueError with one sentence."""
    try:
        yield
    except Exception as error:
        detail = f'{type(error).__name__}: {error}'.partition('\n')[0]
        raise ValueError(f'{problem} ({detail}): {advice}') from error


def download(repository, file):
    """The local path of a file of a dataset on the hub, which is downloaded once."""
    from huggingface_hub import hf_hub_download
    with hub_errors(f'{file} of {repository} is not in the cache and cannot be downloaded',
                    'connect, or name local copies with --source and --image_dir'):
        return hf_hub_download(repository, file, repo_type='dataset')


def default_name(source):
    return os.path.splitext(os.path.basename(source.rstrip('/')))[0]


# -----------------------------------------------------------------------------
# python prepare_data.py text, shapes

def prepare_text(
    source='',           # a dataset of the hub, or a .txt, .jsonl or .parquet file, or a folder of them
    subset='',           # the configuration of a dataset of the hub, such as sample-10BT
    name='',             # the dataset is written to data/NAME; '' takes the last part of the source
    max_examples=10000,  # stop after as many; 0: all
    val_every=100,       # one example of so many is held out
):
    """Writes the documents of a text dataset to data/NAME/{train,val}.jsonl."""
    if not source:
        raise ValueError('expected --source=NAME_ON_THE_HUB or --source=FILE_OR_FOLDER')
    rows = (example for path in list_files(source) for _, _, example in scan_file(path))
    if not os.path.exists(source):
        rows = hub_rows(source, subset)
    rows = (row for row in rows if isinstance(row.get('text'), str) and row['text'].strip())
    work = {'source': source, 'subset': subset, 'max_examples': max_examples, 'val_every': val_every}
    write_dataset(name or default_name(source), work, itertools.islice(rows, max_examples or None),
                  lambda row: ({'text': row['text']}, ''))


def hub_rows(repository, subset):
    import datasets
    with hub_errors(f'{repository} is neither a file here nor a dataset that the hub gives us', 'check the name, or connect'):
        yield from datasets.load_dataset(repository, subset or None, split='train', streaming=True)


def prepare_shapes(
    name='shapes',       # the dataset is written to data/NAME
    max_examples=40000,  # how many conversations
):
    """
    Draws images of colored shapes, with conversations about them: a dataset to learn on when nothing can be downloaded.

    PNGs of 64 x 64 pixels with one or two shapes, and questions on color, shape, number and position. One example of twenty
    has no image and three have two. No held-out image is in the training set. words.txt lists all words, for
    --tokenizer=data/shapes/words.txt: a small GPT need not learn spelling first.
    """
    folder = os.path.join('data', name)
    os.makedirs(os.path.join(folder, 'images'), exist_ok=True)

    def convert(row):
        def new_image(rng, count):
            while True:
                shapes = render.random_shapes(rng, count)
                if is_held_out(str(sorted(shapes)), VAL_EVERY) == held_out:
                    return shapes

        number, held_out = row['id'], row['split'] == 'val'
        images, turns = render.shapes_example(random.Random(f'shapes {number}'), new_image, held_out)
        paths = [f'images/{number:06d}{"ab"[i]}.png' for i in range(len(images))]
        for shapes, path in zip(images, paths):
            render.draw_shapes(shapes).save(os.path.join(folder, path))
        messages = [{'role': role, 'content': text} for turn in turns for role, text in zip(('user', 'assistant'), turn)]
        messages[0]['content'] = (IMAGE + '\n') * len(paths) + messages[0]['content']
        return {'messages': messages, 'images': paths}, ''

    rows = ({'id': i, 'split': 'val' if i * 40 < max_examples else 'train'} for i in range(max_examples))
    write_dataset(name, {'source': 'shapes', 'max_examples': max_examples, 'val_every': VAL_EVERY}, rows, convert)
    words = {word for split in ('train', 'val') for row in open_rows(folder, split) for message in row['messages']
             for word in re.findall('[A-Za-z]+', message['content'])}
    with open(os.path.join(folder, 'words.txt'), 'w', encoding='utf-8') as f:
        f.write('\n'.join(sorted(words)) + '\n')


# -----------------------------------------------------------------------------
# python prepare_data.py llava_instruct, llava_pretrain, llava_cc3m, sharegpt4v

def prepare_llava(
    command,
    repository='',        # of the hub
    subset='',            # its .json file, without the ending
    zipped_images='',     # its images, '' if it has none
    captions_only=False,  # keep only the answer of a conversation, as a caption
    source='',            # a local .json or .jsonl file in this format, instead of the hub's
    image_dir='',         # the folder or archive that the images' names are relative to
    name='',              # the dataset is written to data/NAME; '' takes the source's or the command's name
    max_examples=0,       # stop after as many rows; 0: all
    val_every=100,        # one image (or row without an image) of so many is held out
):
    """
    Writes conversations in LLaVA's format, with their images, to data/NAME/{train,val}.jsonl.

    Every image is opened once: a row whose image is missing or broken is skipped, and listed in skipped.jsonl.
    """
    path = source or download(repository, f'{subset}.json')
    if not image_dir and (source or not zipped_images):
        raise ValueError('expected --image_dir=FOLDER_OR_ZIP: this data has no images of its own, only their names, like '
                         'those of COCO: http://images.cocodataset.org/zips/train2017.zip')
    images = os.path.abspath(image_dir or download(repository, zipped_images))
    try:
        os.path.isdir(images) or map_index(images, index_archive, MEMBER)
    except (OSError, ValueError) as error:
        raise ValueError(f'--image_dir={image_dir} does not exist, or is no archive: expected the folder, .zip or .tar with '
                         f'the images ({error})') from error
    work = {'source': path, 'size': os.path.getsize(path), 'image_dir': images, 'captions_only': captions_only,
            'val_every': val_every, 'max_examples': max_examples}
    write_dataset(name or default_name(source) or command, work, json_rows(path, max_examples),
                  lambda row: llava_example(row, images, captions_only))


def json_rows(path, max_rows=0):
    """
    The objects of a JSON array in a file, or of a .jsonl, one after another: LLaVA's gigabyte is never in memory as a whole.
    Raises ValueError with the row's number where the file is broken or cut off.
    """
    text, count, ended = '', 0, False
    is_array = not path.endswith('.jsonl')
    with open(path, encoding='utf-8') as f:
        if is_array and f.read(1) != '[':
            raise ValueError(f'{path} is not a JSON array of rows, as LLaVA publishes them')
        while not max_rows or count < max_rows:
            text = text.lstrip(' \n\r\t,')
            if text.startswith(']') or ended and not text and not is_array:
                return
            try:
                row, end = json.JSONDecoder().raw_decode(text)
            except ValueError as error:
                if ended:
                    raise ValueError(f'{path} is broken or cut off at row {count}: {error}') from None
                more = f.read(1 << 20)
                text, ended = text + more, not more
                continue
            if not isinstance(row, dict):
                raise ValueError(f'{path}, row {count}: expected an object, got {str(row)[:60]}')
            yield row
            text, count = text[end:], count + 1


def llava_example(row, image_dir, captions_only):
    """A row of LLaVA's -> (example, '') or (None, the reason why it is skipped)."""
    names = row.get('image') or []
    names = [names] if isinstance(names, str) else names
    try:
        turns = [to_message(turn) for turn in row['conversations']]
    except (KeyError, TypeError, ValueError):
        return None, 'no conversation in the format of LLaVA'
    system = [turns.pop(0)] if turns and turns[0]['role'] == 'system' else []
    while turns and turns[-1]['role'] == 'user':     # a question without an answer
        turns.pop()
    while turns and turns[0]['role'] == 'assistant':  # an answer without a question
        turns.pop(0)
    if not turns or any(turn['role'] != ('user', 'assistant')[i % 2] for i, turn in enumerate(turns)):
        return None, 'no questions and answers by turns'
    if not all(turn['content'].strip() for turn in turns):
        return None, 'an empty turn'
    n_places = sum(turn['content'].count(IMAGE) for turn in turns)
    if n_places not in (0, len(names)):
        return None, f'{n_places} <image> places for {len(names)} images'
    example = to_example({'messages': system + turns, 'images': names}, image_dir)
    reason = next(filter(None, map(image_error, example['images'])), '')
    if captions_only and names:
        example = {'text': IMAGE + turns[-1]['content'].strip(), 'images': example['images']}
    return (None, reason) if reason else (example, '')


LLAVA = {
    'llava_instruct': {'repository': 'liuhaotian/LLaVA-Instruct-150K', 'subset': 'llava_instruct_150k'},
    'llava_pretrain': {'repository': 'liuhaotian/LLaVA-Pretrain', 'subset': 'blip_laion_cc_sbu_558k',
                       'zipped_images': 'images.zip', 'captions_only': True},
    'llava_cc3m': {'repository': 'liuhaotian/LLaVA-CC3M-Pretrain-595K', 'subset': 'chat',
                   'zipped_images': 'images.zip', 'captions_only': True},
    'sharegpt4v': {'repository': 'Lin-Chen/ShareGPT4V', 'subset': 'sharegpt4v_instruct_gpt4-vision_cap100k'},
}

# -----------------------------------------------------------------------------
# python prepare_data.py coco_captions, cc3m: images and captions

IMAGE_ENDINGS = ('.jpg', '.jpeg', '.png', '.webp')


def to_caption_example(row):
    """A row {'captions': [...], 'path': image} -> (example, '') or (None, the reason why it is skipped)."""
    captions = [' '.join(caption.split()) for caption in row['captions'] if isinstance(caption, str) and caption.strip()]
    reason = image_error(row['path']) if captions else 'it has no caption'
    if reason:
        return None, reason
    return {'text': IMAGE + captions[0], 'images': [row['path']], 'references': captions}, ''


def prepare_coco(
    source='',             # the folder with captions_train2017.json and captions_val2017.json, or one such file
    image_dir='',          # the folder with train2017 and val2017, unpacked or as .zip, or the images of the one file
    name='coco_captions',  # the dataset is written to data/NAME
    max_examples=0,        # stop after as many images; 0: all
    val_every=100,         # one image of so many is held out, of one file
):
    """Writes COCO's captions, five of an image, to data/NAME/{train,val}.jsonl. val2017 is held out."""
    if not source or not image_dir:
        raise ValueError('expected --source=FOLDER with captions_train2017.json and captions_val2017.json (they are in '
                         'http://images.cocodataset.org/annotations/annotations_trainval2017.zip) and --image_dir=FOLDER with '
                         'train2017.zip and val2017.zip of http://images.cocodataset.org/zips')
    rows = []
    for split in ('train', 'val') if os.path.isdir(source) else ('',):
        path = os.path.join(source, f'captions_{split}2017.json') if split else source
        images = os.path.abspath(os.path.join(image_dir, f'{split}2017') if split else image_dir)
        images = images if os.path.exists(images) else f'{images}.zip'
        for file in (path, images):
            if not os.path.exists(file):
                raise ValueError(f'{file} does not exist: expected the captions as COCO publishes them, and their images')
        if os.path.isfile(images):
            map_index(images, index_archive, MEMBER)  # once, before the threads need it
        rows += coco_rows(path, images, split)
    work = {'source': source, 'image_dir': image_dir, 'max_examples': max_examples, 'val_every': val_every}
    write_dataset(name, work, rows[:max_examples or None], to_caption_example)


def coco_rows(path, images, split):
    """A row for each image of a captions_*.json, with all of its captions."""
    captions = defaultdict(list)
    try:
        with open(path, encoding='utf-8') as f:
            file = json.load(f)
        for annotation in file['annotations']:
            captions[annotation['image_id']].append(annotation['caption'])
        return [{'image': image['file_name'], 'path': os.path.join(images, image['file_name']),
                 'captions': captions[image['id']], 'split': split} for image in file['images'] if image['id'] in captions]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not a captions file as COCO publishes them: {type(error).__name__}: {error}') from error


def prepare_cc3m(
    source='',       # a folder or file as above, or a repository of the hub; '' is pixparse/cc3m-wds
    name='',         # the dataset is written to data/NAME; '' takes the last part of the source, or cc3m
    max_examples=0,  # stop after as many images; 0: all
    val_every=100,   # one image of so many is held out
):
    """
    Writes Conceptual Captions, or any images that img2dataset has downloaded, to data/NAME/{train,val}.jsonl.

    --source is a folder with .tar files in the WebDataset format, one such file, a repository of the hub with such
    (pixparse/cc3m-wds, pixparse/cc12m-wds), or what img2dataset writes as files: 00000/000000000.jpg with .txt next to it.
    Images stay where they are, those in a .tar too.
    """
    repository = source or 'pixparse/cc3m-wds'
    roots = list_files(source, ('.tar', '.tar.gz', '.tgz')) or [source]
    if not os.path.exists(repository):
        if repository.count('/') != 1:
            raise ValueError(f'{repository} is neither a folder, a .tar, nor OWNER/NAME on the hub')
        roots = (download(repository, file) for file in hub_files(repository) if file.endswith('.tar'))
    rows = (row for root in roots for row in sample_rows(root))
    work = {'source': repository, 'val_every': val_every, 'max_examples': max_examples}
    write_dataset(name or default_name(source) or 'cc3m', work, itertools.islice(rows, max_examples or None),
                  to_caption_example)


def hub_files(repository):
    """The names of the files of a dataset on the hub."""
    from huggingface_hub import list_repo_files
    with hub_errors(f'{repository} cannot be listed', 'connect, or name a local copy, --source=FOLDER with its .tar files'):
        return sorted(list_repo_files(repository, repo_type='dataset'))


def sample_rows(root):
    """The images with captions in a .tar or folder: the files of a sample share their name up to the first dot."""
    if os.path.isdir(root):
        names = [os.path.relpath(path, root) for path in list_files(root, (*IMAGE_ENDINGS, '.txt'))]
    else:
        map_index(root, index_archive, MEMBER)  # here, in one thread; ValueError if the file is broken
        with tarfile.open(root) as tar:
            names = [member.name for member in tar if member.isfile()]
    for _, sample in itertools.groupby(names, key=lambda name: re.match(r'(.*/)?[^/.]*', name)[0]):
        files = {os.path.splitext(name)[1].lower(): name for name in sample}
        image = next((files[ending] for ending in IMAGE_ENDINGS if ending in files), '')
        if image:
            caption = read_bytes(os.path.join(root, files['.txt'])).decode(errors='replace') if '.txt' in files else ''
            yield {'image': os.path.join(os.path.basename(root), image), 'captions': [caption],
                   'path': os.path.abspath(os.path.join(root, image))}


# -----------------------------------------------------------------------------
# python prepare_data.py features, show

def store_features(
    config: vision.VisionConfig,
    dataset='',
    batch_size=32,
    dtype='float16',  # or bfloat16: a wider range, less precise
    device='',        # '' takes CUDA or MPS if there is one
):
    """
    Runs a frozen encoder over all images of a dataset once and stores its features in data/NAME/features-KEY/.

    With connector pool they are stored pooled, in pool_size ** 2 times less space. It prints first how much disk space that
    takes, and does not begin without. Interrupted, it continues where it was.
    """
    if not vision.is_pretrained(config):
        raise ValueError(f'expected --vision_encoder=NAME/TAG of a frozen encoder, got {config.vision_encoder!r}: the features '
                         'of an encoder that is trained change with every step')
    if dtype not in ('float16', 'bfloat16'):
        raise ValueError(f'dtype must be float16 or bfloat16, got {dtype!r}')
    rows = itertools.chain(open_rows(dataset, 'train'), open_rows(dataset, 'val'))
    paths = list(dict.fromkeys(path for row in rows for path in row['images']))
    if not paths:
        raise ValueError(f'{dataset} has no image files: there is nothing to store')
    config = vision.complete_config(config)
    device = device or ('cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu')
    model = vision.Vision(config).to(device).eval().requires_grad_(False)
    cache = FeatureCache(dataset, config, model.encoder.fingerprint, dtype)
    os.makedirs(cache.folder, exist_ok=True)

    def compute(paths):
        images = [vision.preprocess(image, config) for image in pool.map(load_image, paths)]
        patches, grid = vision.collate(images, config)
        features = model.features(patches.to(device), grid.to(device))[0].to(getattr(torch, dtype))  # (N, L', C)
        if not features.isfinite().all():
            raise ValueError(f'a feature is too large for {dtype}: store them with --dtype=bfloat16')
        return features.cpu()

    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        check_space(cache.folder, len(paths), compute(paths[:1]))
        paths = [path for path in paths if not os.path.exists(cache.file_for(path))]
        for i in tqdm(range(0, len(paths), batch_size), unit='batch'):
            batch = paths[i:i + batch_size]
            for path, features in zip(batch, compute(batch)):
                file = cache.file_for(path)
                safetensors.torch.save_file({'features': features.contiguous()}, f'{file}.part')
                os.replace(f'{file}.part', file)
    with open(cache.finished, 'w', encoding='utf-8') as f:
        json.dump({'dtype': dtype, 'vision_encoder': config.vision_encoder}, f)


def check_space(folder, n_images, features):
    """Raises ValueError if the disk has no room for n_images such features (1, L', C)."""
    _, length, width = features.shape
    needed = n_images * features.nbytes / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    print(f'{n_images} images x {length} tokens x {width} x 2 bytes = {needed:.3f} GB in {folder}; {free:.1f} GB are free',
          file=sys.stderr)
    if needed > free:
        raise ValueError(f'{needed:.1f} GB do not fit into {free:.1f} GB: make room, or pool them '
                         '(--connector=pool --pool_size=2)')


def show_example(
    config: vision.VisionConfig,
    dataset='',
    split='train',
    index=0,              # of the row
    loss_on='assistant',
    tokenizer='bytes',
    out='show.png',       # the image to write
):
    """Prints an example as the model gets it, what is in the loss in green, and draws its images and tokens to show.png."""
    enc = get_tokenizer(tokenizer)
    config = dataclasses.replace(config, vision_encoder=config.vision_encoder or 'vit', image_token=enc.image_id)
    config = vision.complete_config(config)
    rows = open_rows(dataset, split)
    if not 0 <= index < len(rows):
        raise ValueError(f'{dataset} has {len(rows)} rows to {split} on, from 0 to {len(rows) - 1}; there is no {index}')
    batch = tokenize(rows[index], enc, config, loss_on)
    ids = batch['idx'] + [target for target in batch['targets'][-1:] if target >= 0]
    in_loss = [False, *(target >= 0 for target in batch['targets'])]
    images = iter(batch['images'])
    tokens, i = [], 0
    while i < len(ids):
        if ids[i] == config.image_token:
            n_tokens = vision.num_tokens(next(images), config)
            tokens.append((f'{IMAGE} x {n_tokens}', 'image'))
            i += n_tokens
            continue
        token_class = 'special' if ids[i] in enc.special.values() else 'given'
        tokens.append((enc.decode([ids[i]]), 'in_loss' if in_loss[i] else token_class))
        i += 1
    print(f'{dataset}, row {index} to {split} on: {len(batch["images"])} images, {len(ids)} tokens, {sum(in_loss)} of them in '
          f'the loss (in green); as an image in {out}', file=sys.stderr)
    print(render.colorize(tokens, sys.stdout.isatty() and 'NO_COLOR' not in os.environ))
    render.token_sheet([load_image(source) for source in rows[index]['images']], tokens).save(out)


# -----------------------------------------------------------------------------

COMMANDS = {
    'text': prepare_text, 'shapes': prepare_shapes, 'coco_captions': prepare_coco, 'cc3m': prepare_cc3m,
    **{command: functools.partial(prepare_llava, command, **defaults) for command, defaults in LLAVA.items()},
    'features': store_features, 'show': show_example,
}


def main():
    run_command(COMMANDS)


if __name__ == '__main__':
    run(main)
