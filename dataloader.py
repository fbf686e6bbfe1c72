r"""
Rows on disk -> examples -> token batches: everything that happens to a batch before the model, read from top to bottom.
An example is a JSON line, with image files next to it (drawn text has PIL images in their place):

    {"messages": [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}],
     "images": ["images/1.jpg"]}
    {"text": "A paragraph. <image> Another paragraph. <image>", "images": ["images/2.jpg", "images/3.png"]}
    {"text": "<image>A cat on a mat.", "images": ["photos.zip/4.jpg"], "references": ["A cat on a mat.", "A mat with a cat."]}

"references" are all the correct captions of a held-out image. prepare_data.py writes public datasets as such lines.
"""

import bisect
import contextlib
import dataclasses
import functools
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
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import jinja2.sandbox
import numpy as np
import tiktoken
import tokenizers
import torch
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset, Subset
from tqdm import tqdm

import render
import vision
from patches import cell_size, collate_images, is_native, num_tokens, preprocess, separate_tiles
from render import IMAGE, TASKS, parse_tasks

USER, ASSISTANT, END = '<|user|>', '<|assistant|>', '<|endoftext|>'
IMAGE_MARKS = ('<|vision_start|>', '<|vision_end|>')  # Qwen's names: its tokenizers keep their ids
# of an answer's <<48/2=24>>, which is how GSM8K writes the call of a calculator: for "<<", "=" and ">>"
CALL_MARKS = CALL, RESULT, END_CALL = '<|call|>', '<|result|>', '<|end_call|>'

@contextlib.contextmanager
def explain_errors(problem, advice, error_class=ValueError):
    """Turns any exception (parsers and hub clients have many of their own) into one of a single sentence."""
    try:
        yield
    except Exception as error:
        detail = f'{type(error).__name__}: {error}'.partition('\n')[0]
        raise error_class(f'{problem} ({detail}): {advice}') from error

# -----------------------------------------------------------------------------
# image files, also in archives, which are read in place and not kept open

ARCHIVE = re.compile(r'(.+?\.(?:zip|tar|tar\.gz|tgz))/(.+)')
MEMBER = np.dtype([('name', '<u8'), ('offset', '<i8'), ('size', '<i8'), ('method', '<u4'), ('crc', '<u4')])
IN_TAR = 1 << 16  # `method` of a tar's members: they are not compressed, and have no checksum

def load_image(source, draft=None):
    """A path, the bytes of a file or a PIL image -> RGB PIL image, upright, transparency on white. `draft`, a size, makes
    JPEGs faster. Raises ValueError if there is no such file, or it is no image that can be read.
    """
    try:
        image = source
        if not isinstance(source, Image.Image):
            data = source if isinstance(source, bytes) else read_bytes(str(source))
            image = Image.open(io.BytesIO(data))
        if draft:
            image.draft('RGB', draft)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I') or image.mode == 'F':
            image = image.convert('F').point(lambda v: v / 257).convert('L')  # 65535 / 257 = 255
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        return image.convert('RGB')
    except FileNotFoundError as error:
        raise ValueError(f'no image at {source}') from error
    except Exception as error:  # for a damaged file Pillow, zlib and struct raise nearly anything
        raise ValueError(f'{str(source)[:200]} is not an image that can be read: {error}') from error

def image_error(source):
    """'' for an image that training can load, else the reason. The decision is load_image's."""
    try:
        load_image(source, draft=(64, 64))
    except ValueError as error:
        is_missing = isinstance(error.__cause__, FileNotFoundError)
        return 'the image is missing' if is_missing else 'the image is broken'
    return ''

def augment_image(image, rng, augment):
    """A random crop of half the image or more, brightness, contrast and saturation. Mirroring would swap left and right."""
    if 'crop' in augment:
        width, height = image.size
        side = math.sqrt(rng.uniform(0.5, 1))
        stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(4 / 3))
        crop_width = max(1, min(width, round(width * side * stretch)))
        crop_height = max(1, min(height, round(height * side / stretch)))
        x = rng.randint(0, width - crop_width)
        y = rng.randint(0, height - crop_height)
        image = image.crop((x, y, x + crop_width, y + crop_height))
    if 'color' in augment:
        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(rng.uniform(0.6, 1.4))
    return image

def read_bytes(path):
    """The bytes of a file or of a member of an archive, checked. FileNotFoundError if missing; whatever zlib raises."""
    match = ARCHIVE.fullmatch(path)
    if not match or os.path.isdir(match[1]):
        with open(path, 'rb') as f:
            return f.read()
    archive, name = match.groups()
    members = map_members(archive)
    key = np.uint64(hash64(name))
    i = bisect.bisect_right(members['name'], key) - 1  # unlike searchsorted it does not read the whole index
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

def map_members(archive):
    """The members of an archive: an array of MEMBER, sorted by the hashes of their names."""
    return map_index(archive, index_archive, MEMBER)

def index_archive(path, f):
    """Writes the members of an archive to f. ValueError if it is broken or compressed as a whole."""
    if path.endswith('gz'):
        raise ValueError(f'{path} is compressed, so that no single image can be read from it: unpack it to a .tar first')
    try:
        if path.endswith('.tar'):
            with tarfile.open(path, 'r:') as tar:
                rows = [(m.name, m.offset_data, m.size, IN_TAR, 0) for m in tar if m.isfile()]
        else:
            with zipfile.ZipFile(path) as archive:
                rows = [(m.filename, m.header_offset, m.compress_size, m.compress_type, m.CRC) for m in archive.infolist()]
    except Exception as error:  # for a damaged file these libraries raise nearly anything
        raise ValueError(f'{path} is broken or cut off ({error}): download it again') from error
    rows = [(name.removeprefix('./'), *rest) for name, *rest in rows]
    if len({name.partition('/')[0] for name, *_ in rows}) == 1:  # COCO's have one folder, which names may leave out
        rows += [(name.partition('/')[2], *rest) for name, *rest in rows]
    members = np.array([(hash64(name), *rest) for name, *rest in rows], MEMBER)
    f.write(members[members['name'].argsort(kind='stable')].tobytes())

def hash64(data):
    """The first 64 bits of the SHA-256 of a text or of bytes."""
    data = data if isinstance(data, bytes) else data.encode(errors='replace')
    return int.from_bytes(hashlib.sha256(data).digest()[:8], 'big')

def map_index(path, build, dtype, suffix='index'):
    """
    The memory-mapped index of a file, PATH.index, or in the user's cache folder where that cannot be written. If there is
    none, or the file has changed since, build(path, file) writes it.
    """
    status = os.stat(path)
    header = struct.pack('<qq', status.st_size, status.st_mtime_ns)
    path = os.path.abspath(path)
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    candidates = [f'{path}.{suffix}', os.path.join(cache, 'glimpse', f'{hash64(path):x}.{suffix}')]
    for index in filter(os.path.isfile, candidates):
        # unlike np.memmap this keeps no file open: there may be thousands of archives
        mapped = torch.from_file(index, False, os.path.getsize(index), dtype=torch.uint8).numpy()
        if mapped[:len(header)].tobytes() == header:
            return mapped[len(header):].view(dtype)
    index = candidates[0] if os.access(os.path.dirname(path), os.W_OK) else candidates[1]
    os.makedirs(os.path.dirname(index), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(index)) as folder:  # so that no half index is left
        with open(os.path.join(folder, 'index'), 'wb') as f:
            f.write(header)
            build(path, f)
        os.replace(f.name, index)
    return map_index(path, build, dtype, suffix)

# -----------------------------------------------------------------------------
# rows

VAL_EVERY = 20  # one row of so many is held out where a dataset comes in one piece

def open_rows(dataset, split, overfit_rows=0):
    """
    The examples of one side, 'train' or 'val', of a dataset: pydoc (Python's language reference), a .txt, .jsonl or .parquet
    file or a folder of them, or a folder with train.jsonl and val.jsonl, as data/NAME. With overfit_rows both sides are
    the first so many rows to train on. ValueError if there is no such dataset.
    """
    if overfit_rows:
        rows = open_rows(dataset, 'train')
        return Subset(rows, range(min(overfit_rows, len(rows))))
    if dataset == 'pydoc':
        return pydoc_rows(split)
    files = {side: dataset_folder(dataset) / f'{side}.jsonl' for side in ('train', 'val')}
    if any(map(Path.is_file, files.values())):
        return FileRows(files[split])
    if not os.path.exists(dataset):
        raise ValueError(f'no dataset {dataset!r}: expected pydoc, a file, a folder, or {files[split]}, which "python '
                         f'prepare_data.py {dataset}" writes; "python prepare_data.py list" shows all datasets')
    rows = {side: [FileRows(path, side) for path in list_files(dataset)] for side in files}
    n_train, n_val = (sum(map(len, side_rows)) for side_rows in rows.values())
    if not n_train or not n_val:
        raise ValueError(f'{dataset} has {n_train + n_val} rows with text in .txt, .jsonl or .parquet files, of which {n_val} '
                         f'are held out by a hash: that takes at least {VAL_EVERY}, or train.jsonl and val.jsonl')
    return ConcatDataset(rows[split])

def dataset_folder(dataset):
    return Path(dataset) if os.path.isdir(dataset) else Path('data', dataset)

def list_files(path, endings=('.txt', '.jsonl', '.parquet')):
    """The files at or below a path that have one of the endings, sorted."""
    files = [Path(path), *Path(path).rglob('*')]
    return sorted(file for file in files if file.name.lower().endswith(endings) and file.is_file())

class FileRows:
    """The rows of a file, or those on one side, read when asked for. Their positions are memory-mapped."""

    def __init__(self, path, split=''):
        self.path = Path(path)
        self.split = split
        self.table = None if self.path.suffix == '.jsonl' else open_table(self.path)
        build = functools.partial(index_rows, split=split)
        self.positions = map_index(path, build, np.int64, f'{split}.index' if split else 'index')
        if not split and not len(self):
            raise ValueError(f'{path} holds no row')

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, i):
        position = int(self.positions[i])
        if self.table is None:
            with open(self.path, 'rb') as f:
                f.seek(position)
                row = json.loads(f.readline())
        else:
            row = self.table[position]
        return to_example(row, self.path.parent)

    def __reduce__(self):  # a worker process maps the index itself
        return FileRows, (self.path, self.split)

def open_table(path):
    """The rows of a .txt or .parquet file by their number."""
    if path.suffix == '.txt':
        return [{'text': text} for text in render.split_paragraphs(path.read_text('utf-8', errors='replace'))]
    import datasets  # memory-maps what it reads; takes a second to import, so only here
    with explain_errors(f'{path} is not a parquet file that can be read', 'write it anew'):
        return datasets.load_dataset('parquet', data_files=str(path), split='train')

def scan_file(path):
    """Yields (position: byte offset or number, row, example) of each row with text. ValueError names a broken line."""
    path = Path(path)
    is_jsonl = path.suffix == '.jsonl'
    position = 0
    with open(path, 'rb') as f:
        for number, row in enumerate(tqdm(f if is_jsonl else open_table(path), desc=path.name, unit='row', delay=5), 1):
            size = len(row) if is_jsonl else 1
            try:
                row = json.loads(row.strip() or '{"text": ""}') if is_jsonl else row
                example = to_example(row, path.parent)
            except json.JSONDecodeError as error:
                raise ValueError(f'{path}, line {number} is not JSON ({error}): correct or delete that line') from error
            except ValueError as error:
                raise ValueError(f'{path}, line {number}: {error}') from error
            if 'messages' in example or example['text'].replace(IMAGE, '').strip():
                yield position, row, example
            position += size

def index_rows(path, f, split):
    """Writes the positions of a file's rows to f, int64; with `split` only of those on that side."""
    for position, row, _ in scan_file(path):
        if not split or is_held_out(holdout_key(row), VAL_EVERY) == (split == 'val'):
            f.write(struct.pack('<q', position))

def pydoc_rows(split):
    """The topics of `help()` in pieces. One topic of ten is held out, with every paragraph that other topics repeat."""
    from pydoc_data.topics import topics
    paragraphs = {}  # without white space -> (is held out, as it stands)
    for name in sorted(topics, key=lambda name: (not is_held_out(name, 10), name)):  # held-out topics first
        # without rules and table borders
        text = '\n'.join(line for line in topics[name].split('\n') if not line.strip() or re.search('[A-Za-z]', line))
        for paragraph in re.split(r'\n\s*\n', text):
            paragraphs.setdefault(''.join(paragraph.split()), (is_held_out(name, 10), paragraph))
    text = '\n\n'.join(paragraph for is_val, paragraph in paragraphs.values() if is_val == (split == 'val'))
    return [{'text': piece} for piece in render.split_paragraphs(text)]

# -----------------------------------------------------------------------------
# other people's rows: this is the one place that understands their keys

IMAGE_KEYS = ('images', 'image', 'image_path', 'image_paths')
LOOKS_LIKE_IMAGE = re.compile(r'(image|img|picture|photo|pic|jpe?g|png|webp|gif|tiff?)s?'
                              r'([_-]?(path|file|file_?name|name|url|uri|bytes|data|base64)s?)?([_-]?\d+)?', re.IGNORECASE)
ROLES = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant', 'system': 'system'}

def to_example(row, folder):
    """A row of TRL, LLaMA-Factory or LLaVA, or a list of messages -> an example, its images' paths joined to `folder`.
    ValueError if it is none.
    """
    row = {'messages': row} if isinstance(row, list) else row
    turns = isinstance(row, dict) and (row.get('conversations') or row.get('messages'))
    if not turns and not (isinstance(row, dict) and isinstance(row.get('text', 0), str | None)):
        raise ValueError(f'expected an object with "text" or "messages", got {str(row)[:60]}')
    example, images = {}, []
    for key, value in row.items():
        if value and LOOKS_LIKE_IMAGE.fullmatch(key) and not isinstance(value, (int, float)):
            paths = value if isinstance(value, list) else [value]
            if images or key not in IMAGE_KEYS or not all(isinstance(path, str) for path in paths):
                raise ValueError(f'the key "{key}" looks like an image and is not understood: expected "images", a list')
            images = [os.path.join(folder, path) for path in paths]
        elif value is not None and key not in (*IMAGE_KEYS, 'conversations', 'messages'):
            example[key] = value
    if turns:
        example['messages'] = [to_message(turn) for turn in turns]
    else:
        example.setdefault('text', '')  # null is blank
    if images:
        place_images(example, len(images))
    if images or any(row.get(key) is not None for key in IMAGE_KEYS):  # without "images" a text is what tasks make of it
        example['images'] = images
    return example

def to_message(turn):
    """A turn of TRL ("role", "content", which may be a list of parts) or LLaVA ("from", "value") -> {'role', 'content'}."""
    try:
        role = ROLES[turn.get('role') or turn['from']]
        content = turn['content'] if 'content' in turn else turn['value']
        if isinstance(content, list):
            content = ''.join(map(part_to_text, content))
        return {'role': role, 'content': content + ''}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f'expected a message by user, assistant or system with "content", got {str(turn)[:60]}') from None

def part_to_text(part):
    """A part of a message's content as text. The image itself is in the row's "images": a part that holds one is refused."""
    part = {key: value for key, value in part.items() if value is not None}
    if part == {'type': 'image'}:
        return IMAGE
    if part['type'] != 'text':
        raise KeyError(part['type'])
    return part['text']

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

def is_held_out(key, every):
    """The one rule for what training never gets: one key of `every`, by its hash."""
    return hash64(key) < 2**64 / every

def holdout_key(row):
    """What decides on which side a row is: its image, else its text."""
    keys = (*IMAGE_KEYS, 'text', 'messages', 'conversations')
    return str(next((row[key] for key in keys if row.get(key)), ''))

def shuffled_index(i, n, key):
    """Number i of the random order of range(n) that `key` chooses, by a Feistel network on an even count of bits."""
    half = ((n - 1).bit_length() + 1) // 2
    while True:
        left, right = i >> half, i % (1 << half)
        for r in range(4):
            left, right = right, left ^ hash64(f'{key} {r} {right}') % (1 << half)
        i = left << half | right
        if i < n:  # else it is permuted again
            return i

# -----------------------------------------------------------------------------
# rows -> examples, in the order of an epoch

def is_plain_text(row):
    """Whether tasks make an example of it. A text with "images", even an empty list, is an example already."""
    return 'messages' not in row and 'images' not in row

@dataclasses.dataclass(eq=False)
class Examples:
    """The examples of a split, endlessly: example i is a function of (seed, i). Each epoch has another order and drawings."""
    rows: object
    config: object
    seed: int
    tasks: str = None       # instead of the config's
    shuffle: bool = True
    length_warmup: int = 0  # over so many examples the drawn text grows from a few characters to max_chars
    exclude: str = ''       # text of which no drawn line may be a part

    def __post_init__(self):
        if self.config.augment not in ('', 'crop', 'color', 'crop+color'):
            raise ValueError(f"augment must be crop, color or crop+color, or '' for none, got {self.config.augment!r}")
        self.weights = parse_tasks(self.config.tasks if self.tasks is None else self.tasks)
        # whether the rows are plain text, which gives any number of examples, each with another image
        self.is_plain_text = is_plain_text(self.rows[0])

    def __getitem__(self, i):
        epoch, position = divmod(i, len(self.rows))
        if self.shuffle:
            position = shuffled_index(position, len(self.rows), f'{self.seed} {epoch}')
        row = self.rows[position]
        rng = random.Random(f'{self.seed} {i}')
        images = row.get('images', [])
        if is_plain_text(row):
            return self.draw_example(row['text'], rng, i)
        if self.shuffle and self.config.augment:
            images = [augment_image(load_image(source), rng, self.config.augment) for source in images]
        return {**row, 'images': images}

    def draw_example(self, text, rng, i):
        task = TASKS[rng.choices(list(self.weights), list(self.weights.values()))[0]]
        length_scale = min(1.0, (i + 1) / self.length_warmup) if self.length_warmup else 1.0
        for _ in range(100):
            example = task(text, rng, self.config, length_scale)
            if 'messages' not in example or example['messages'][-1]['content'] not in self.exclude:
                break
        return example

# -----------------------------------------------------------------------------
# a mixture of datasets

SOURCE = re.compile(r'([^\s:@]+)(?:([:@])(\d+\.?\d*|\.\d+))?(?::(all|assistant))?')

@dataclasses.dataclass
class Source:
    """A dataset of a mixture: NAME:2 is shown twice in an epoch, NAME@0.2 is a fifth of the mixture, whatever its size."""
    name: str
    passes: float
    share: float
    loss_on: str  # '' is that of the run

def parse_mixture(spec):
    """'chartqa:1 smol-smoltalk:0.3:all data/mine@0.2' -> [Source]. ValueError if that is no mixture."""
    sources = []
    for word in spec.split():
        match = SOURCE.fullmatch(word)
        amount = float(match[3] or 1) if match else 0
        if not amount:
            raise ValueError(f'dataset {spec!r}: expected NAME, NAME:PASSES or NAME@SHARE above 0, each also with :all or '
                             f':assistant for what is in the loss, got {word!r}')
        passes, share = (0.0, amount) if match[2] == '@' else (amount, 0.0)
        sources.append(Source(match[1], passes, share, match[4] or ''))
    if len({source.name for source in sources}) < max(1, len(sources)):
        raise ValueError(f'dataset {spec!r}: expected one or more datasets, each once')
    return sources

def count_draws(sources, sizes):
    """How many examples of each source an epoch has. A size is the number of a source's rows."""
    shares = sum(source.share for source in sources)
    counts = [round(source.passes * size) for source, size in zip(sources, sizes)]
    if any(counts) and shares < 1:
        total = sum(counts) / (1 - shares)
    elif abs(shares - 1) < 1e-6:  # nothing determines how long an epoch is: as long as all rows
        total = sum(sizes)
    else:
        raise ValueError(f'the shares of a mixture are {shares:g} together: expected 1, or less than 1 next to NAME:PASSES')
    return [max(1, count or round(source.share * total)) for source, count in zip(sources, counts)]

def locate(position, counts):
    """Draw number `position` of an epoch -> (source, number of the draw in the source), such that the draws of each source are
    evenly distributed: draw k of `count` comes at (2 k + 1) / (2 count) of the epoch; of equal times the first source is first.
    """
    def draws_before(i, k):
        """How many draws come before draw k of source i."""
        # those of source j with (2 m + 1) / count_j < (2 k + 1) / count_i; <= if it stands before i
        odd, n = 2 * k + 1, counts[i]
        return sum((odd * m - n + (2 * n if j < i else 2 * n - 1)) // (2 * n) for j, m in enumerate(counts) if j != i) + k

    for i, count in enumerate(counts):
        expected = position * count // sum(counts)
        near = range(max(0, expected - len(counts) - 1), min(count, expected + len(counts) + 2))
        k = near.start + bisect.bisect_left(near, position, key=lambda k, i=i: draws_before(i, k))
        if k < near.stop and draws_before(i, k) == position:
            return i, k

class Mixture:
    """The examples of several datasets, endlessly. Each goes through its own epochs: with 0.3 passes it shows another 30 % in
    each epoch of the mixture. Takes no memory, and example i is a function of (seed, i).
    """

    def __init__(self, sources, rows, config, seed, length_warmup=0):
        self.sources = sources
        self.counts = count_draws(sources, list(map(len, rows)))
        # length_warmup counts the examples of the mixture
        self.examples = [Examples(part, config, seed, length_warmup=length_warmup * count // sum(self.counts))
                         for part, count in zip(rows, self.counts)]

    def __getitem__(self, i):
        epoch, position = divmod(i, sum(self.counts))
        number, draw = locate(position, self.counts)
        example = self.examples[number][epoch * self.counts[number] + draw]
        loss_on = self.sources[number].loss_on
        return {'loss_on': loss_on, **example} if loss_on else example

# -----------------------------------------------------------------------------
# tokenizers

MARK = '\ufdd0'  # a special token in a text to be encoded; Unicode reserves this code, so no text has it
NOT_TEXT = re.compile(f'[\ud800-\udfff{MARK}]')  # surrogates, which have no UTF-8, and the mark
SLOT = '\ufdd1{}\ufdd1'  # the text of that number while a chat template is rendered

# for tokenizers without a chat template: ours, and that of models with ChatML's tokens
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>{{ message.content + eos_token }}{% else %}"
    "{{ '<|user|>' if loop.first or loop.previtem.role != 'system' }}{{ message.content }}"
    "{{ '\n\n' if message.role == 'system' }}{% endif %}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}")

@dataclasses.dataclass(eq=False)
class Tokenizer:
    """Text <-> ids, by tiktoken. Data text never becomes a special token. ValueError for an unusable chat template."""
    name: str
    backend: object       # a tiktoken.Encoding
    special: dict         # {special token: id}
    text_ids: list        # all other ids
    system_prompt: str    # of conversations that have none; 'auto' leaves that to the chat template
    names: dict           # {'eos_token': special token, ...}: the names by which chat templates use them
    template: str = ''    # the chat template
    files: tuple = ()     # the paths of a published tokenizer, which an export copies
    characters: str = ''  # the only characters with an id; '': all have one
    image_marks: tuple = ()  # the special tokens before and after an image
    calculator: bool = False  # whether CALL_MARKS are among the special tokens

    def __post_init__(self):
        self.image_id = self.special[IMAGE]
        self.n_vocab = 1 + max(*self.text_ids, *self.special.values())
        self.n_text = len(self.text_ids)
        # the special tokens at the two ends of a text
        self.end = END if END in self.special else self.names['eos_token']
        self.begin = END if END in self.special else self.names.get('bos_token', self.end)
        self.has_chat_template = bool(self.template)
        self.template = self.template or (CHATML if '<|im_start|>' in self.special else TEMPLATE)
        longest_first = map(re.escape, sorted(self.special, key=len, reverse=True))
        self.template_pieces = re.compile(f'({"|".join([SLOT.format("[0-9]+"), *longest_first])})')
        turns = (('user', SLOT.format(0)), ('assistant', SLOT.format(1)))
        self.content_is_list = False
        try:
            render_chat(self, turns)
        except ValueError:  # the template may expect a list of texts and images
            self.content_is_list = True
        answer_ends = [piece for piece, is_special, is_answer in render_chat(self, turns) if is_special and is_answer]
        # the ids that end a text or an answer
        self.end_ids = [self.special[token] for token in dict.fromkeys([self.end, *answer_ends])]

    def encode(self, text):
        """Data text -> ids; special tokens in it stay text. ValueError for a character without an id."""
        return self.encode_segments([(text, False, False)])[0]

    def encode_segments(self, pieces, char_level=False):
        """[(text, is_special, in_loss)] -> the ids, and for each whether it is in the loss. Text between two special tokens
        is one string to the backend, as in transformers. With char_level, each character in the loss is encoded alone.
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
            unknown = ''.join(sorted(unknown))
            raise ValueError(f'{self.name} has no id for the characters {unknown!r}: take --tokenizer=bytes')
        ids = self.backend.encode(text, allowed_special={MARK}, disallowed_special=())
        starts = self.backend.decode_with_offsets(ids)[1]
        ends = [*starts[1:], len(text)]
        # a character may be several ids
        return ids, [(start, max(start + 1, end)) for start, end in zip(starts, ends)]

    def decode(self, ids):
        """Ids -> text, special tokens by name. Bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(ids)

    def allowed_ids(self, vocab_size):
        """bool (vocab_size,): the ids that may be generated: all but <image>, its marks, <|user|>, <|assistant|> and
        <|end_call|>, which the calculator writes."""
        prompt_only = (IMAGE, *self.image_marks, USER, ASSISTANT, END_CALL)
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[self.text_ids] = True
        allowed[[i for token, i in self.special.items() if token not in prompt_only]] = True
        return allowed

class HuggingFaceTokenizer(Tokenizer):
    """The same by a tokenizers.Tokenizer, which is the backend."""

    def encode_with_offsets(self, text):
        self.backend.encode_special_tokens = True  # as text; pickling loses this switch
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids):
        return self.backend.decode(ids, skip_special_tokens=False)

def get_tokenizer(name, system_prompt='auto', image_marks=False, calculator=False, chat_template=''):
    """A Tokenizer by name, with image_marks also of IMAGE_MARKS, with calculator of CALL_MARKS; chat_template replaces its own.
    ValueError for an unknown name or damaged files.
    """
    marks = IMAGE_MARKS if image_marks else ()
    switches = dict(image_marks=marks, calculator=calculator, template=chat_template)
    marks += CALL_MARKS if calculator else ()
    pattern = r'(?s:.)'
    special, characters = {}, ''
    if name.endswith(('.pkl', '.txt', '.json')) and not os.path.isfile(name):
        raise ValueError(f'no tokenizer at {name}: prepare_data.py shapes writes words.txt; bytes needs no file')
    if name == 'bytes':  # one token a byte: takes any text
        ranks = {bytes([i]): i for i in range(256)}
    elif name == 'gpt2':  # its BPE, which tiktoken downloads once
        with explain_errors("GPT-2's BPE cannot be downloaded", 'connect once, or use --tokenizer=bytes'):
            gpt2 = tiktoken.get_encoding('gpt2')
        pattern, ranks, special = gpt2._pat_str, gpt2._mergeable_ranks, dict(gpt2._special_tokens)
    elif name.endswith('.pkl'):  # the characters of a nanoGPT dataset; others are refused
        ranks = read_meta(name)
        characters = b''.join(ranks).decode()
    elif name.endswith('.txt'):  # a token for each word, with and without a space before it, and each byte
        ranks = read_words(name)
        pattern = r' ?[^\W\d_]+|(?s:.)'
    elif name.endswith('.json') or os.path.isdir(name) or name.count('/') == 1:  # OWNER/NAME on the hub
        return read_hugging_face(name, system_prompt, marks, switches)
    else:
        raise ValueError('tokenizer must be bytes, gpt2, the path of a meta.pkl, words.txt or tokenizer.json, or '
                         f'OWNER/NAME on the hub, got {name!r}')
    for token in (IMAGE, USER, ASSISTANT, END, *marks):
        special.setdefault(token, len(ranks) + len(special))
    with_mark = {**special, MARK: len(ranks) + len(special)}
    backend = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=with_mark)
    text_ids = list(ranks.values())
    names = {'eos_token': END}
    return Tokenizer(name, backend, special, text_ids, system_prompt, names, characters=characters, **switches)

def read_meta(path):
    """{character as UTF-8: id} of a nanoGPT meta.pkl. A pickle can run code: this one may hold values only."""

    class Values(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f'it asks for {module}.{name}')

    with explain_errors(f'{path} is not the meta.pkl of a nanoGPT character dataset', 'name another'), open(path, 'rb') as f:
        ranks = {character.encode(): int(i) for character, i in Values(f).load()['stoi'].items()}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f'{path}: expected the ids 0 to {len(ranks) - 1}, each once')
    return ranks

def read_words(path):
    """{bytes: id} of a words.txt: every byte, and each word with and without a space before it."""
    with open(path, encoding='utf-8') as f:
        words = [space + word for word in f.read().split() for space in ('', ' ')]
    tokens = [bytes([i]) for i in range(256)] + [word.encode() for word in words]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}

def read_hugging_face(name, system_prompt, marks, switches):
    """The HuggingFaceTokenizer of a tokenizer.json, of a folder with it or of OWNER/NAME on the hub."""
    folder = Path(name)
    file_names = ['tokenizer.json', 'tokenizer_config.json', 'chat_template.json', 'chat_template.jinja']
    if folder.suffix == '.json':
        file_names[0] = folder.name
        folder = folder.parent
    elif not folder.is_dir():
        with explain_errors(f'{name}: it is not in the cache and cannot be downloaded', 'connect once, or name a folder'):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=file_names))
    files = [folder / file_name for file_name in file_names]
    if not files[0].is_file():
        raise ValueError(f'{name} has no tokenizer.json: name another tokenizer, such as --tokenizer=gpt2')
    files = tuple(filter(Path.is_file, files))
    config = {}
    with explain_errors(f'{name}: its tokenizer.json or chat template cannot be read', 'download it again'):
        for path in files[1:]:
            text = path.read_text('utf-8')
            config |= {'chat_template': text} if path.suffix == '.jinja' else json.loads(text)
        backend = tokenizers.Tokenizer.from_file(str(files[0]))
    template = switches['template'] or config.get('chat_template') or ''
    if isinstance(template, list):
        template = {entry['name']: entry['template'] for entry in template}.get('default', '')
    names = {'eos_token': END}
    for key, token in config.items():
        if key.endswith('_token') and token:
            names[key] = token['content'] if isinstance(token, dict) else token
    if 'sep_token' in names:  # BERT's texts end with it
        names['eos_token'] = config.get('eos_token') or names['sep_token']
    backend.no_truncation()
    backend.no_padding()
    # adds no tokens and keeps offsets exact
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    special = [token for token in added if not token.isspace()]  # also <think>, which files do not call special
    special.append(IMAGE)
    if not template and '<|im_start|>' not in special:
        special += [USER, ASSISTANT]
    special += [names['eos_token'], *marks]  # new ids come last
    backend.add_special_tokens(special)
    special = {token: backend.token_to_id(token) for token in special}
    text_ids = list({*backend.get_vocab().values()} - {*special.values()})
    backend.add_tokens([tokenizers.AddedToken(MARK, normalized=False)])
    switches = {**switches, 'template': template}
    return HuggingFaceTokenizer(name, backend, special, text_ids, system_prompt, names, files=files, **switches)

# -----------------------------------------------------------------------------
# example -> ids, targets, images

@functools.lru_cache(maxsize=1000)
def render_chat(tokenizer, turns, prompt_only=False):
    """The chat template for conversations with some turns, ((role, content with numbered slots for its texts), ...): [(text
    of the template or number of a slot, is_special, is_answer)]. An answer ends with the first special token after it.
    """
    messages = [{'role': role, 'content': content} for role, content in turns]
    if tokenizer.content_is_list:
        for message in messages:
            entries = filter(None, re.split(f'({IMAGE})', message['content']))
            message['content'] = [{'type': 'image'} if entry == IMAGE else {'type': 'text', 'text': entry}
                                  for entry in entries]
    variables = {**tokenizer.names, 'messages': messages, 'tools': None, 'add_generation_prompt': prompt_only}
    # Qwen3's template then ends a prompt with the empty thought that it writes in front of a last answer
    variables['enable_thinking'] = False
    with explain_errors(f'{tokenizer.name}: its chat template cannot be rendered', 'name another tokenizer'):
        rendered = compile_template(tokenizer.template).render(variables)
    roles = [role for role, content in turns for _ in range(content.count(SLOT[0]) // 2)]
    numbers, out = [], []
    is_answer = False
    for piece in filter(None, tokenizer.template_pieces.split(rendered)):
        if piece.startswith(SLOT[0]):
            piece = int(piece.strip(SLOT[0]))
            numbers.append(piece)
            is_answer = roles[piece] == 'assistant'
        is_special = piece in tokenizer.special
        out.append((piece, is_special, is_answer))
        is_answer = is_answer and (not is_special or piece in (IMAGE, *CALL_MARKS))
    if sorted(numbers) != list(range(len(roles))):
        raise ValueError(f'{tokenizer.name}: its chat template leaves out a message or repeats one')
    return out

@functools.cache
def compile_template(source):
    """A chat template, with Jinja set up as in transformers. {% generation %} marks answers; it has no effect."""
    source = re.sub(r'({%[-+]?\s*)generation\b', r'\1if true', source)
    source = re.sub(r'({%[-+]?\s*)endgeneration\b', r'\1endif', source)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    return environment.from_string(source)

CALCULATION = re.compile('<<([^<>=]+)=([^<>=]*)>>')

def conversation(example, tokenizer, prompt_only):
    """[(text, is_special, is_answer)] of a conversation. White space at the ends of a message is dropped."""
    messages = list(example['messages'])
    if tokenizer.system_prompt != 'auto' and messages[0]['role'] != 'system':
        messages.insert(0, {'role': 'system', 'content': tokenizer.system_prompt})
    if prompt_only and messages[-1]['role'] == 'assistant':
        messages.pop()
    turns, texts = [], []
    for message in messages:
        content = NOT_TEXT.sub('\ufffd', message['content'].strip())
        if example.get('images'):
            if tokenizer.content_is_list:  # then the template decides whether a new line follows an image
                content = content.replace(IMAGE + '\n', IMAGE)
            content = content.replace(IMAGE, MARK + IMAGE + MARK)
        if tokenizer.calculator and message['role'] == 'assistant':
            content = CALCULATION.sub(MARK.join(['', CALL, r'\1', RESULT, r'\2', END_CALL, '']), content)
        pieces = content.split(MARK)  # texts, with a special token between any two
        for i in range(0, len(pieces), 2):
            # an answer begins with a text, if only an empty one: by its slot `render_chat` knows where
            if pieces[i] or len(pieces) == 1 or i == 0 and message['role'] == 'assistant':
                texts.append(pieces[i])
                pieces[i] = SLOT.format(len(texts) - 1)
        turns.append((message['role'], ''.join(pieces)))
    chat = render_chat(tokenizer, tuple(turns), prompt_only)
    return [(piece if isinstance(piece, str) else texts[piece], *flags) for piece, *flags in chat]

def segments(example, tokenizer, loss_on, prompt_only=False):
    """[(text or special token, is_special, in_loss)] of an example. <image> is special only if there are images; "filling"
    is text instead of them. With prompt_only the last answer is left out, and what opens it stands at the end.
    """
    loss_on = example.get('loss_on', loss_on)
    if loss_on not in ('assistant', 'all', 'postfix'):
        raise ValueError(f'loss_on must be assistant or all, got {loss_on!r}')
    if 'messages' in example:
        out = []
        is_computed = False
        for text, is_special, is_answer in conversation(example, tokenizer, prompt_only):
            out.append((text, is_special, not is_computed and (is_answer or loss_on == 'all')))
            if is_special:  # what the calculator writes is not in the loss: its result, and the end of the call
                is_computed = text == RESULT
        return out
    image = [(IMAGE, True, False)]
    if 'filling' in example:  # '' has no id: the filling is encoded apart, so targets do not depend on it
        image = [('', True, False), (example['filling'], False, False), ('', True, False)]
    has_images = example.get('images') or 'filling' in example
    texts = example['text'].split(IMAGE) if has_images else [example['text']]
    out = [(tokenizer.begin, True, False)]
    for i, text in enumerate(texts):
        out += image if i else []
        out.append((text, False, loss_on != 'postfix' or i == len(texts) - 1))
    return out if prompt_only or example.get('is_cut') else [*out, (tokenizer.end, True, True)]

class TooLong(ValueError):
    """An example needs more positions than block_size, and cannot be cut."""

def tokenize(example, tokenizer, config, loss_on='assistant', prompt_only=False, cache=None):
    """
    An example -> {'idx': [int], 'targets': [int], 'images': [(patches, grid)]}, or (features, grid) of a FeatureCache.

    targets[t] is the token after idx[t], or -1 where it is not in the loss: 'assistant' has the answers and their end in the
    loss, 'all' every text token. Image tokens and their marks are no targets; the last one predicts the text after it. Text
    beyond block_size positions is cut; an image, which takes one or with image_positions=each one for each token, is not.
    ValueError if something does not fit.
    """
    sources = example.get('images') or []
    if sources and not config.vision_encoder:
        raise ValueError('the example has an image, but the model has no vision_encoder')
    pieces = segments(example, tokenizer, loss_on, prompt_only)
    if sources and config.max_image_side:
        sources, pieces = frame_images(sources, pieces, tokenizer, config)
    images = [cache[source] if cache and isinstance(source, str) else preprocess(load_image(source), config)
              for source in sources]
    if config.image_marks:  # not in the loss
        begin, end = ((mark, True, False) for mark in tokenizer.image_marks)
        pieces = [part for piece in pieces for part in ([begin, piece, end] if piece[:2] == (IMAGE, True) else [piece])]
    ids, in_loss = tokenizer.encode_segments(pieces, example.get('char_level'))
    positions = [position for position, token in enumerate(ids) if token == tokenizer.image_id]
    if len(positions) != len(images):
        raise ValueError(f'the example has {len(images)} images, but its text has {len(positions)} <image>: write '
                         'one for each')
    n_tokens = [num_tokens(image, config) for image in images]
    extra = sum(n_tokens) - len(images) if config.image_positions == 'each' else 0  # positions
    needed = extra + (len(ids) if prompt_only else 1 + max(positions, default=-1) + config.image_marks)
    if needed > config.block_size:
        subject = 'the prompt takes' if prompt_only else 'text and images up to the last image take'
        raise TooLong(f'{subject} {needed} positions, but block_size is {config.block_size}: enlarge it')
    if not prompt_only:  # one more than block_size, because the last id is only a target
        longest = config.block_size + 1 - extra
        del ids[longest:], in_loss[longest:]
    for position, n in reversed(list(zip(positions, n_tokens))):
        ids[position:position + 1] = [config.image_token] * n
        in_loss[position:position + 1] = [False] * n
    if prompt_only:
        return {'idx': ids, 'targets': [-1] * len(ids), 'images': images}
    targets = [token if is_target else -1 for token, is_target in zip(ids[1:], in_loss[1:])]
    return {'idx': ids[:-1], 'targets': targets, 'images': images}

def frame_images(sources, pieces, tokenizer, config):
    r"""SmolVLM's tiles as images of their own, and the pieces of `segments` with its marks around each of them:

        <fake_token_around_image><row_1_col_1><image><fake_token_around_image><row_1_col_2><image>\n ... \n
        <fake_token_around_image><global-img><image><fake_token_around_image>
    """
    mark = lambda token: (token, True, False)
    fake = '<fake_token_around_image>'
    if '<global-img>' not in tokenizer.special:
        raise ValueError(f'the tokenizer {tokenizer.name} has none of the tokens that mark tiles: leave max_image_side out')
    images, frames = [], []
    for source in sources:
        tiles, rows, cols = separate_tiles(load_image(source), config)
        images += tiles
        frame = []
        for row in range(rows):
            for col in range(cols):
                frame += [mark(fake), mark(f'<row_{row + 1}_col_{col + 1}>'), mark(IMAGE)]
            frame.append(('\n', False, False))
        if rows:
            frame.append(('\n', False, False))
        frames.append([*frame, mark(fake), mark('<global-img>'), mark(IMAGE), mark(fake)])
    if sum(piece[:2] == (IMAGE, True) for piece in pieces) != len(frames):
        return sources, pieces  # `tokenize` says so
    frames = iter(frames)
    framed = [next(frames) if piece[:2] == (IMAGE, True) else [piece] for piece in pieces]
    return images, list(itertools.chain(*framed))

@dataclasses.dataclass(eq=False)
class TokenizedExamples(torch.utils.data.Dataset):
    """Item i is example i, tokenized; {"error": sentence} for what a user must read: a worker would add its traceback."""
    examples: object
    tokenizer: Tokenizer
    config: vision.VisionConfig
    loss_on: str
    cache: object = None

    def __getitem__(self, i):
        try:
            return tokenize(self.examples[i], self.tokenizer, self.config, self.loss_on, cache=self.cache)
        except (ValueError, OSError) as error:
            return {'error': str(error), 'is_too_long': isinstance(error, TooLong)}

def target_places(targets):
    """Where the targets (B, T) have one: indices (n,) of B * T places."""
    return (targets.flatten() >= 0).nonzero().squeeze(1)

def collate(examples, config, fixed_length=False):
    """Tokenized examples -> a batch: idx, targets int64 (B, T), padded on the right with -1; places (n,), as in
    `target_places`; lengths int64 (B,); images, what patches.collate_images makes of all of them, row by row, or None
    without vision; of packed rows also docs (B, T), as in `pack`. fixed_length as in collate_images. An {"error": sentence}
    among the examples is returned in place of a batch. ValueError if ids and images disagree.
    """
    errors = [example for example in examples if 'error' in example]
    if errors:
        return errors[0]

    def pad(key):
        rows = [torch.tensor(example[key], dtype=torch.long) for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)  # (B, T)

    batch = {key: pad(key) for key in ('idx', 'targets', 'docs') if key in examples[0]}
    batch['places'] = target_places(batch['targets'])
    batch['lengths'] = (batch['idx'] >= 0).sum(1)
    batch['images'] = None
    if config.vision_encoder:
        images = [image for example in examples for image in example['images']]
        n_ids = int((batch['idx'] == config.image_token).sum())
        n_tokens = sum(num_tokens(image, config) for image in images)
        if n_ids != n_tokens:
            raise ValueError(f'the batch has {n_ids} <image> ids, but its images make {n_tokens} tokens')
        batch['images'] = collate_images(images, config, fixed_length)
    return batch

# -----------------------------------------------------------------------------
# packing: several documents in a row, so that few places are padding

WAITING = 128  # so many documents wait for a row with room for them before a batch is finished

def pack(documents, config, batch_size, max_images, left_out=0, fixed_length=False):
    """Yields batches of `batch_size` rows of block_size tokens, filled with documents in their order: each goes to the first
    row with room for it (first fit), or waits for the next batch. `docs` has the number of each token's document in its row,
    -1 for padding. A row has at most max_images images; fixed_length as in patches.collate_images.

    documents: an endless iterator of (index, tokenized example or {"error": ...}). One that is longer than a row is cut in
    the text after its last image; if that is impossible, or it has too many images, it is left out and counted. `packing` of
    a batch is what a resumed run needs: {'waiting': indices of the documents that wait, which its iterator has to begin
    with, 'last': that of the last document taken from the iterator, 'left_out': how many so far}. Raises ValueError for a
    document's error, and if none of 1000 documents fits.
    """
    waiting = []
    in_succession = 0  # documents left out
    while True:
        rows = [{'idx': [], 'targets': [], 'docs': [], 'images': []} for _ in range(batch_size)]
        stream = itertools.chain(waiting, documents)
        waiting = []
        while len(waiting) < WAITING:
            index, document = next(stream)
            if 'error' in document and not document['is_too_long']:
                raise ValueError(document['error'])
            document = fit_document(document, config, max_images)
            in_succession = in_succession + 1 if document is None else 0
            if in_succession == 1000:
                raise ValueError('packing: of 1000 examples in succession none has a target within a row of '
                                 f'{config.block_size} tokens and {max_images} images: raise block_size or max_images')
            if document is None:
                left_out += 1
            elif not place_document(document, rows, config, max_images):
                waiting.append((index, document))
        for row in rows:
            for key in ('idx', 'targets', 'docs'):
                row[key] += [-1] * (config.block_size - len(row[key]))
        state = {'waiting': [index for index, _ in waiting], 'last': index, 'left_out': left_out}
        yield {**collate(rows, config, fixed_length), 'packing': state}

def fit_document(document, config, max_images):
    """The tokenized example, cut to a row's length in the text after its last image; None if it does not fit."""
    if 'error' in document or len(document['images']) > max_images:
        return None
    T = config.block_size
    idx, targets = document['idx'], document['targets']
    if config.image_token in idx[T:] or max(targets[:T]) < 0:  # nothing is left to learn from
        return None
    return {**document, 'idx': idx[:T], 'targets': targets[:T]}

def place_document(document, rows, config, max_images):
    """Adds the document to the first row with room for it. Returns whether there was one."""
    n_tokens = len(document['idx'])
    for row in rows:
        if len(row['idx']) + n_tokens <= config.block_size and len(row['images']) + len(document['images']) <= max_images:
            number = row['docs'][-1] + 1 if row['docs'] else 0
            row['docs'] += [number] * n_tokens
            for key in ('idx', 'targets', 'images'):
                row[key] += document[key]
            return True
    return False

# -----------------------------------------------------------------------------
# features of a frozen encoder, computed once

class FeatureCache:
    """cache[path] is (features float32 (L', C), grid (L', 2)). The folder's name is a hash of what the features depend on."""

    def __init__(self, root, config, fingerprint):
        size = config.max_image_tokens if is_native(config) else config.image_size
        made_by = [fingerprint, config.vision_layer, config.vision_cls, config.image_fit, cell_size(config), size]
        self.root = Path(root)  # the dataset's folder
        self.folder = self.root / f'features-{hash64(json.dumps(made_by)):016x}'
        self.finished = self.folder / 'finished'  # an empty file, written last

    @classmethod
    def find(cls, root, config, fingerprint):
        """The finished cache that fits the model, or None. Without published weights features change with every step."""
        cache = cls(root, config, fingerprint)
        # where rows end is not stored, nor are tiles
        fingerprint = fingerprint and not config.image_newlines and not config.max_image_side
        return cache if fingerprint and cache.finished.exists() else None

    def file_for(self, path):
        return self.folder / f'{hash64(os.path.relpath(path, self.root)):016x}.safetensors'

    @torch.no_grad()
    def fill(self, paths, model, batch_size):
        """Stores what a frozen Vision makes of image files, in float16, or in bfloat16 where a feature is too large
        for it. Files that are there already stay. Raises ValueError if the disk has no room for all.
        """
        self.folder.mkdir(exist_ok=True)
        device = next(model.parameters()).device

        def compute(paths):
            images = [preprocess(image, model.config) for image in pool.map(load_image, paths)]
            batch = [tensor.to(device) for tensor in collate_images(images, model.config)]
            features, valid = model.features(*batch)  # (N, L', C), (N, L')
            return [x[own].cpu() for x, own in zip(features, valid)]

        with ThreadPoolExecutor(4) as pool:
            length, width = compute(paths[:1])[0].shape
            if is_native(model.config):
                length = model.config.max_image_tokens  # at most
            needed = len(paths) * length * width * 2 / 1e9
            free = shutil.disk_usage(self.folder).free / 1e9
            print(f'{len(paths)} images x {length} tokens x {width} x 2 bytes = {needed:.3f} GB in {self.folder}; '
                  f'{free:.1f} GB are free', file=sys.stderr)
            if needed > free:
                raise ValueError(f'{needed:.1f} GB do not fit into {free:.1f} GB: make room, or pool '
                                 '(--connector=pool)')
            paths = [path for path in paths if not self.file_for(path).exists()]
            for i in tqdm(range(0, len(paths), batch_size), unit='batch'):
                batch = paths[i:i + batch_size]
                for path, features in zip(batch, compute(batch)):
                    half = features.half()
                    half = half if half.isfinite().all() else features.bfloat16()
                    file = self.file_for(path)
                    save_file({'features': half}, f'{file}.part')
                    os.replace(f'{file}.part', file)
        self.finished.touch()

    def __getitem__(self, path):
        try:
            features = load_file(self.file_for(path))['features'].float()
        except FileNotFoundError:
            raise ValueError(f'{path} is not among the features in {self.folder}: run "prepare_data.py features" again, '
                             'or train with --feature_cache=False') from None
        return features, torch.zeros(len(features), 2, dtype=torch.int64)
