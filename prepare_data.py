"""
Raw data -> examples -> token batches: the way of a batch up to the model, read from top to bottom.

    open_rows      a dataset's name or path -> its rows, {"text": ...} or {"messages": ..., "image_path": ...}
    Examples       row -> example; plain text becomes pictures here, by one of the TASKS read, continue, text
    load_image     any image file -> RGB
    get_tokenizer  bytes, gpt2, nanoGPT's meta.pkl or a tokenizer.json, as a tiktoken.Encoding with a conversation's tokens
    tokenize       example -> ids, targets, images; each <image> widened to as many ids as the encoder gives tokens
    collate        examples -> one padded batch
    Batches        the micro-batches of a run, a pure function of (seed, index): resuming needs no loader state

The one example format is a JSON line, images as files beside it (or PIL images under "images", drawn on the fly):

    {"messages": [{"role": "user", "content": "<image>\\nWhat is this?"}, {"role": "assistant", "content": "A cat."}],
     "image_path": "images/1.jpg"}
    {"text": "A paragraph. <image> Another paragraph. <image>", "image_paths": ["images/2.jpg", "images/3.png"]}
    {"text": "<image>A cat on a mat.", "image_path": "images/4.jpg", "references": ["A cat on a mat.", "A mat with a cat."]}

"references", of what is held out, are all the captions that count as right.

As a script it writes datasets to data/NAME/{train,val}.jsonl, and looks into them:

    $ python prepare_data.py text --source=HuggingFaceFW/fineweb --subset=sample-10BT --max_examples=100000 --name=fineweb
    $ python prepare_data.py shapes                                              # drawn here, nothing is downloaded
    $ python prepare_data.py llava_instruct --image_dir=coco/train2017           # llava_pretrain, llava_cc3m, sharegpt4v
    $ python prepare_data.py llava_instruct --source=MINE.json --image_dir=DIR_OR_ZIP --name=mine
    $ python prepare_data.py coco_captions --source=annotations --image_dir=coco
    $ python prepare_data.py cc3m --max_examples=100000                          # or --source=FOLDER of .tar or img2dataset's
    $ python prepare_data.py emoji                                               # drawn from an installed font
    $ python prepare_data.py features --dataset=mine --vision_encoder=ViT-L-14-quickgelu/openai
    $ python prepare_data.py show --dataset=mine --index=3                       # an example, and what is learnt of it
"""

import bisect
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
import sys
import tarfile
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import regex
import tiktoken
import torch
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFont, ImageOps
from tqdm import tqdm

import render
import vision
from configurator import configure, run

IMAGE, USER, ASSISTANT, END = '<image>', '<|user|>', '<|assistant|>', '<|endoftext|>'
IM_START, IM_END = '<|im_start|>', '<|im_end|>'  # of ChatML, which models speak that know these tokens

# -----------------------------------------------------------------------------
# rows

VAL_EVERY = 20  # of a dataset that comes in one piece, every 20th row is held out


def open_rows(dataset, split):
    """
    The rows of a dataset as a sequence of dicts. `split` is 'train' or 'val'. `dataset` is

        pydoc            the Python language reference that is part of every CPython; topics are held out whole
        a folder         with train.jsonl and val.jsonl, or with .txt, .jsonl and .parquet files to be split here
        a file           .txt (cut at blank lines), .jsonl or .parquet (both with a "text", or rows in example format)
        any other name   data/NAME/train.jsonl and val.jsonl, as the commands of this script write them

    Rows without any text are left out. Raises ValueError if there is no such dataset, or a line of it is broken.
    """
    if dataset == 'pydoc':
        return pydoc_rows(split)
    path = os.path.join(dataset_folder(dataset), f'{split}.jsonl')
    if os.path.isfile(path):
        return JsonLines(path)
    if not os.path.exists(dataset):
        command = f'text --source=HUB_NAME_OR_FILE --name={dataset}'
        if dataset in COMMANDS:
            command = dataset + (' --image_dir=FOLDER_OR_ZIP' if dataset in LLAVA else '')
        raise ValueError(f'no dataset {dataset!r}: expected pydoc, a file, a folder, or {path}, which '
                         f'"python prepare_data.py {command}" writes')
    files = [dataset] if os.path.isfile(dataset) else sorted(
        os.path.join(root, name) for root, _, names in os.walk(dataset) for name in names)
    rows = Chain([read_file(f) for f in files if f.endswith(('.txt', '.jsonl', '.parquet'))])
    held_out = range(VAL_EVERY - 1, len(rows), VAL_EVERY)
    chosen = held_out if split == 'val' else [i for i in range(len(rows)) if i % VAL_EVERY != VAL_EVERY - 1]
    if not chosen:
        raise ValueError(f'{dataset} has {len(rows)} rows with text in .txt, .jsonl or .parquet files; to hold out one '
                         f'of {VAL_EVERY} takes at least {VAL_EVERY}')
    return Chain([rows], chosen)


def dataset_folder(dataset):
    return dataset if os.path.isdir(dataset) else os.path.join('data', dataset)


class Chain:
    """Sequences one behind another, as one; or, with `chosen`, only those indices of it."""

    def __init__(self, parts, chosen=None):
        self.parts, self.chosen = parts, chosen
        self.ends = []
        for part in parts:
            self.ends.append(len(part) + (self.ends[-1] if self.ends else 0))

    def __len__(self):
        return len(self.chosen) if self.chosen is not None else self.ends[-1] if self.ends else 0

    def __getitem__(self, i):
        i = self.chosen[i] if self.chosen is not None else i
        part = bisect.bisect_right(self.ends, i)
        return self.parts[part][i - (self.ends[part - 1] if part else 0)]


class JsonLines:
    """
    The rows of a .jsonl file, read from disk when asked for: only their offsets are in memory. Every line is parsed
    once in the beginning, so that a broken one is named now and not after three hours of training.
    """

    def __init__(self, path):
        self.path, self.offsets = path, []
        with open(path, 'rb') as f:
            offset = 0
            for number, line in enumerate(f, 1):
                if line.strip() and not self.is_blank(line, number):
                    self.offsets.append(offset)
                offset += len(line)
        if not self.offsets:
            raise ValueError(f'{path} holds no row')

    def is_blank(self, line, number):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f'{self.path}, line {number} is not JSON ({error}): mend or delete that line') from None
        if not isinstance(row, dict) or not isinstance(row.get('text', row.get('messages')), (str, list)):
            raise ValueError(f'{self.path}, line {number}: expected an object with "text" or "messages", got '
                             f'{line[:60].decode(errors="replace").strip()}')
        return 'text' in row and not row['text'].strip()

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        with open(self.path, 'rb') as f:
            f.seek(self.offsets[i])
            row = json.loads(f.readline())
        paths = row.pop('image_paths', None) or [row.pop('image_path', None)]
        row['images'] = [os.path.join(os.path.dirname(self.path), p) for p in paths if p]
        return row


def read_file(path):
    """The rows of one .txt, .jsonl or .parquet file."""
    if path.endswith('.jsonl'):
        return JsonLines(path)
    if path.endswith('.txt'):
        with open(path, encoding='utf-8', errors='replace') as f:
            return [{'text': piece} for piece in pieces(f.read())]
    import datasets  # memory-maps what it reads; takes a second to import, so only here
    try:
        table = datasets.load_dataset('parquet', data_files=path, split='train')
        texts = table.select_columns('text')
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f'{path} is not a parquet file with a "text" column: {error}') from error
    filled = [i for i, text in enumerate(texts['text']) if text and text.strip()]
    return Chain([texts], filled)


def pieces(text, least=600):
    """Cuts a long text at blank lines into pieces of at least `least` characters (the last one may be shorter)."""
    found, piece = [], ''
    for paragraph in re.split(r'\n\s*\n', text):
        if paragraph.strip():
            piece += ('\n\n' if piece else '') + paragraph
        if len(piece) >= least:
            found.append(piece)
            piece = ''
    return found + [piece] if piece else found


def pydoc_rows(split):
    """
    The topics of `help()` in pieces. One topic of ten, chosen by a hash of its name, is held out, and so is every
    paragraph of it that other topics repeat. Lines without a letter, rules and table borders, are no text to read.
    """
    from pydoc_data.topics import topics
    paragraphs = {'train': {}, 'val': {}}  # without white space -> as it stands; a dict keeps their order
    for name in sorted(topics, key=lambda name: (hashlib.sha256(name.encode()).digest()[0] >= 26, name)):
        held_out = hashlib.sha256(name.encode()).digest()[0] < 26
        text = '\n'.join(line for line in topics[name].split('\n') if not line.strip() or re.search('[A-Za-z]', line))
        for paragraph in re.split(r'\n\s*\n', text):
            key = ''.join(paragraph.split())
            if key not in paragraphs['val']:  # the held-out topics come first
                paragraphs['val' if held_out else 'train'].setdefault(key, paragraph)
    return [{'text': piece} for piece in pieces('\n\n'.join(paragraphs[split].values()))]


# -----------------------------------------------------------------------------
# plain text becomes examples. A task is (text, rng, config, growth) -> example; config holds train.py's knobs,
# growth in (0, 1] says how long a picture's text is in the beginning of a run that lets it grow

def text_span(text, rng, low, high):
    """A span of `low` to `high` characters from a random place of the text, at word boundaries if there are some."""
    length = rng.randint(low, high)
    if len(text) <= length:
        return text.strip()
    start = rng.randrange(len(text) - length + 1)
    while start and not text[start - 1].isspace():
        start -= 1  # back to the beginning of the word
    end = start + length
    if end < len(text) and not text[end].isspace():
        cut = max(text.rfind(' ', start, end), text.rfind('\n', start, end))
        end = cut if cut - start >= low else end
    while len(text[start:end].strip()) < low and end < len(text):
        end += 1
    return text[start:end].strip()


def picture(text, rng, config):
    """
    The text drawn into the config's box, shortened until it fits. Returns what was drawn and the image; ('', None) for a
    text of which the font has no character.
    """
    font = rng.choice(render.list_fonts(config.font))
    text = render.drawable(text, font)
    text = ' '.join(text.split()) if config.one_line else text
    extra = render.augmentation(rng, config.distort)
    if not text.strip():
        return '', None
    while True:
        try:
            return text, render.draw(text, config.image_width, config.image_height, font, trim=config.one_line,
                                     min_size=config.font_min, max_size=config.font_max, **extra)
        except render.DoesNotFit:
            if len(text) < 2:
                raise
            text = text[:len(text) * 7 // 8].rstrip()


def read(text, rng, config, growth=1.0):
    """A picture of a span of text -> the span: what an OCR model does."""
    high = max(2, round(config.max_chars * growth))
    low = min(config.min_chars, 1 + high // 2)
    span = text_span(' '.join(text.split()) if config.one_line else text, rng, low, high)
    span, image = picture(span, rng, config)
    if not span:  # nothing that the font can draw: it stays text
        return {'text': text}
    messages = [{'role': 'user', 'content': IMAGE}, {'role': 'assistant', 'content': span}]
    return {'messages': messages, 'images': [image], **({'spell': True} if config.spell else {})}


def continue_(text, rng, config, growth=1.0):
    """
    Text whose middle is a picture -> the text behind it: text-only VLM pretraining. "infix" keeps what was drawn, so
    that an evaluation can ask how much of it the model took from the pixels.
    """
    words = re.findall(r'\s*\S+', text_span(text, rng, config.min_span, config.max_span))
    if len(words) < 3:  # too short to be split: it stays text
        return {'text': text}
    prefix, infix, postfix = render.split(words, rng, config.infix_min, config.infix_max)
    drawn, image = picture(''.join(infix).strip(), rng, config)
    if not drawn:
        return {'text': text}
    infix = ''.join(infix)
    if infix.split() != drawn.split():  # shortened to fit, or glyphs are missing: then the text shall tell no more
        infix = ' ' + drawn
    return {'text': ''.join(prefix) + IMAGE + ''.join(postfix), 'images': [image], 'infix': infix, 'loss_on': 'postfix'}


def plain(text, rng, config, growth=1.0):
    """A span of text as text: it keeps the language alive."""
    return {'text': text_span(text, rng, config.min_span, config.max_span)}


TASKS = {'read': read, 'continue': continue_, 'text': plain}


def parse_tasks(spec):
    """'read:0.8 text:0.2' -> {'read': 0.8, 'text': 0.2}. Raises ValueError for an unknown task or a weight <= 0."""
    weights = {}
    for word in spec.split():
        name, _, weight = word.partition(':')
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = 0.0
        if name not in TASKS or not weights[name] > 0:
            raise ValueError(f'tasks: expected some of {", ".join(TASKS)} with weights, like "read:0.8 text:0.2", got {word!r}')
    if not weights:
        raise ValueError('tasks is empty: expected something like "read:0.8 text:0.2"')
    return weights


class Examples:
    """
    The examples of a split, endlessly: example i is a function of (seed, i) alone. Each epoch goes through all rows
    in another order and, for plain text, draws another task, span and picture from each.
    """

    def __init__(self, rows, config, seed, tasks=None, shuffle=True, growing=0, seen=''):
        self.rows, self.config, self.seed, self.shuffle = rows, config, seed, shuffle
        self.growing = growing  # over as many examples, pictures grow from a few characters to max_chars
        self.seen = seen        # text of which no line is to be read
        self.tasks = parse_tasks(config.tasks if tasks is None else tasks)
        self.order = (None, None)  # (epoch, permutation), the last one used
        # whether the rows are plain text, which gives any number of examples, each another picture
        self.drawn = 'messages' not in rows[0] and not rows[0].get('images')
        if config.augment not in ('', 'crop', 'colour', 'crop+colour'):
            raise ValueError(f"augment must be crop, colour or crop+colour, or '' for none, got {config.augment!r}")

    def __getitem__(self, i):
        epoch, place = divmod(i, len(self.rows))
        if self.shuffle and self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = epoch, torch.randperm(len(self.rows), generator=generator)
        row = self.rows[int(self.order[1][place]) if self.shuffle else place]
        rng = random.Random(f'{self.seed} {i}')
        if 'messages' in row or row.get('images'):  # an example already
            if self.shuffle and self.config.augment:
                kinds, images = self.config.augment, row.get('images') or []
                return {**row, 'images': [augmented(load_image(source), rng, kinds) for source in images]}
            return row
        task = rng.choices(list(self.tasks), list(self.tasks.values()))[0]
        growth = min(1.0, (i + 1) / self.growing) if self.growing else 1.0
        example = TASKS[task](row['text'], rng, self.config, growth)
        for _ in range(100):
            if 'messages' not in example or example['messages'][-1]['content'] not in self.seen:
                break
            example = TASKS[task](row['text'], rng, self.config, growth)
        return example


def held_out_examples(dataset, config, tasks):
    """
    The examples of a dataset's held-out rows, in their order. Of pydoc, which is small enough to be searched, no line
    to read occurs in the training text, not even a common phrase.
    """
    seen = '\n'.join(' '.join(row['text'].split()) for row in open_rows(dataset, 'train')) if dataset == 'pydoc' else ''
    return Examples(open_rows(dataset, 'val'), config, seed=0, tasks=tasks, shuffle=False, seen=seen)


# -----------------------------------------------------------------------------
# images

def load_image(source):
    """
    A path (also one into a zip: images.zip/00453/1.jpg) or PIL image -> RGB PIL image, upright: EXIF rotation is applied,
    transparency laid over white, 16 bits scaled to 8. Raises ValueError, naming the file, for what is missing, empty, cut
    off, or no image.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(open_path(source))
        image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f'no image at {source}') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'{source} is not an image that can be read: {error}') from error
    if image.mode.startswith('I') or image.mode == 'F':
        image = image.convert('F').point(lambda v: v / 257).convert('L')  # 65535 / 257 = 255
    if image.mode in ('LA', 'PA', 'RGBA', 'La', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def augmented(image, rng, kinds):
    """
    A part of the picture, half of it or more, in its own aspect or up to a third off (crop), and brighter or darker, paler or
    more colourful, of more or less contrast (colour), as BLIP-2 was trained. Not mirrored: left would become right, and no
    letter could be read.
    """
    if 'crop' in kinds:
        w, h = image.size
        area, aspect = w * h * rng.uniform(0.5, 1), w / h * math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        cw, ch = min(w, round(math.sqrt(area * aspect))), min(h, round(math.sqrt(area / aspect)))
        x, y = rng.randint(0, w - max(1, cw)), rng.randint(0, h - max(1, ch))
        image = image.crop((x, y, x + max(1, cw), y + max(1, ch)))
    if 'colour' in kinds:
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = kind(image).enhance(rng.uniform(0.6, 1.4))
    return image


def open_path(path):
    """A file, or a member of a zip that has not been unpacked, as something to read bytes from."""
    archive, is_zip, member = str(path).partition('.zip/')
    if not is_zip or os.path.isdir(f'{archive}.zip'):
        return path
    try:
        return io.BytesIO(open_zip(f'{archive}.zip', os.getpid()).read(member))
    except (KeyError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(f'{path}: {error}') from error


@functools.lru_cache(maxsize=4)
def open_zip(path, pid):
    """The open archive, its table of contents read once; `pid`, because a forked process needs a file position of its own."""
    return zipfile.ZipFile(path)


# -----------------------------------------------------------------------------
# a frozen tower's features, computed once

class StoredFeatures:
    """
    What `prepare_data.py features` has stored of a dataset's images: store[path] is (features (L', C), grid (L', 2)), read
    from disk when asked for, and takes the place of the picture's patches. One store belongs to one tower (by its
    fingerprint), layer, fit and pooling, so a stale one is never found.
    """

    def __init__(self, folder, root):
        self.folder, self.root = folder, root
        with open(os.path.join(folder, 'index.json'), encoding='utf-8') as f:
            index = json.load(f)
        self.shape, self.dtype = tuple(index['shape']), index['dtype']
        self.rows = {path: i for i, path in enumerate(index['images'])}

    @staticmethod
    def folder_for(dataset, config):
        made_by = [getattr(config, key) for key in ('vision_fingerprint', 'vision_layer', 'vision_cls', 'image_fit')]
        key = hashlib.sha256(json.dumps([*made_by, vision.cell_size(config)]).encode()).hexdigest()[:8]
        return os.path.join(dataset_folder(dataset), f'features-{key}')

    @classmethod
    def find(cls, dataset, config):
        """The store that fits the model, or None."""
        if not config.vision_encoder or not config.vision_fingerprint:  # features of an encoder that learns do not last
            return None
        folder = cls.folder_for(dataset, config)
        return cls(folder, dataset_folder(dataset)) if os.path.exists(os.path.join(folder, 'index.json')) else None

    def __getitem__(self, path):
        row = self.rows.get(path.removeprefix(self.root + os.sep))
        if row is None:
            raise ValueError(f'{path} is not among the features in {self.folder}: run "python prepare_data.py features" again, '
                             'or train with --stored_features=False')
        _, length, width = self.shape
        kind = np.float16 if self.dtype == 'float16' else np.uint16  # numpy has no bfloat16
        data = np.memmap(os.path.join(self.folder, 'features.bin'), kind, 'r', row * length * width * 2, (length, width))
        return torch.from_numpy(data.copy()).view(getattr(torch, self.dtype)), torch.zeros(length, 2, dtype=torch.int64)


# -----------------------------------------------------------------------------
# tokenizers

class Tokenizer(tiktoken.Encoding):
    """
    A tiktoken.Encoding, and what some models' tokenizers do besides:

        nfc     text is brought into Unicode's normal form C
        lost    bytes that have no token and are left out, as Hugging Face's tokenizers do; all of them are rare
        system  what a conversation begins with if it does not say so itself
    """

    def __init__(self, name, nfc=False, lost=b'', system='', **encoding):
        super().__init__(name, **encoding)
        self.nfc, self.lost, self.system = nfc, lost, system

    def __getstate__(self):  # for workers that are not forked
        return {**super().__getstate__(), 'nfc': self.nfc, 'lost': self.lost, 'system': self.system}

    def encode_ordinary(self, text):
        text = unicodedata.normalize('NFC', text) if self.nfc else text
        if not set(self.lost).intersection(text.encode(errors='replace') if self.lost else b''):
            return super().encode_ordinary(text)
        pieces = (match[0].encode(errors='replace').translate(None, self.lost) for match in regex.finditer(self._pat_str, text))
        return [i for piece in pieces if piece for i in self._encode_single_piece(piece)]


def get_tokenizer(name, system_prompt='auto'):
    """
    A Tokenizer with the special tokens <image> and <|endoftext|>, and those of a conversation, by name:

        bytes           one token a byte: 256 and the special ones; nothing to download, no text it cannot take
        gpt2            GPT-2's BPE, whose <|endoftext|> (50256) it keeps; tiktoken downloads it once
        .../meta.pkl    the characters of a nanoGPT dataset; other characters are refused
        .../words.txt   each line of the file a word, one token with and one without a space before it; the rest is bytes
        tokenizer.json  of Hugging Face, as a file, a folder with it, or OWNER/NAME on the hub: byte-level BPE, exactly

    system_prompt replaces what conversations begin with according to the model's chat template; 'auto' leaves it.
    Raises ValueError for another name, when the BPE cannot be downloaded, or cannot be converted exactly.
    """
    special, more = {}, {}
    if name == 'bytes':
        pattern, ranks = r'(?s:.)', {bytes([i]): i for i in range(256)}
    elif name == 'gpt2':
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except OSError as error:
            raise ValueError(f"GPT-2's BPE is not in tiktoken's cache and cannot be downloaded ({type(error).__name__}): "
                             'connect once, or use --tokenizer=bytes') from error
        pattern, ranks, special = gpt2._pat_str, gpt2._mergeable_ranks, dict(gpt2._special_tokens)
    elif name.endswith('.pkl'):
        pattern, ranks = r'(?s:.)', read_meta(name)
    elif name.endswith('.txt'):
        if not os.path.isfile(name):
            raise ValueError(f'no tokenizer at {name}: "python prepare_data.py shapes" writes one beside its data; for other '
                             'data take --tokenizer=bytes, or a file with a word a line')
        with open(name, encoding='utf-8') as f:
            words = [space + word for word in f.read().split() for space in ('', ' ')]
        tokens = [bytes([i]) for i in range(256)] + [word.encode() for word in words if len(word) > 1]
        pattern, ranks = r' ?[^\W\d_]+|(?s:.)', {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    elif name.endswith('.json') or os.path.isdir(name) or name.count('/') == 1:
        try:
            pattern, ranks, special, more = read_bpe(*tokenizer_files(name))
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from error
    else:
        raise ValueError('tokenizer must be bytes, gpt2, the path of a meta.pkl, words.txt or tokenizer.json, or OWNER/NAME on '
                         f'the hub, got {name!r}')
    for token in (IMAGE, *((USER, ASSISTANT) if IM_START not in special else ()), END):
        special.setdefault(token, max([*ranks.values(), *special.values()]) + 1)
    more |= {} if system_prompt == 'auto' else {'system': system_prompt}
    return Tokenizer(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special, **more)


def read_meta(path):
    """{character as UTF-8: id} of a nanoGPT meta.pkl. A pickle can run code, so this one may hold nothing but values."""

    class Values(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f'it asks for {module}.{name}')

    try:
        with open(path, 'rb') as f:
            stoi = Values(f).load()['stoi']
        ranks = {character.encode(): int(i) for character, i in stoi.items()}
    except FileNotFoundError:
        raise ValueError(f'no tokenizer at {path}') from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f'{path} is not the meta.pkl of a nanoGPT character dataset: {error}') from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f'{path}: expected the ids 0 to {len(ranks) - 1}, each once')
    return ranks


def tokenizer_files(name):
    """The paths of tokenizer.json and of the file with the chat template, '' if there is none."""
    names = 'tokenizer.json', 'chat_template.jinja', 'tokenizer_config.json'
    if not name.endswith('.json') and not os.path.isdir(name):
        from huggingface_hub import snapshot_download
        try:
            name = snapshot_download(name, allow_patterns=list(names))
        except Exception as error:  # the hub's client has many of its own
            raise ValueError("it is not in the cache of huggingface_hub and cannot be downloaded "
                             f'({type(error).__name__}): connect once, or name a folder with its tokenizer.json') from error
    folder = os.path.dirname(name) if name.endswith('.json') else name
    path, *templates = (os.path.join(folder, n) for n in names)
    return name if name.endswith('.json') else path, next(filter(os.path.isfile, templates), '')


GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same with each digit as a piece of its own; white space before one is not torn apart, for no word follows
DIGIT_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def read_bpe(path, template_path=''):
    """
    Hugging Face's tokenizer.json -> (split pattern, {bytes: id}, {special token: id}, further arguments of Tokenizer). Theirs
    merges the pairs that the file lists, in that order; tiktoken merges whatever gives a token, in the order of ids. Both do
    the same if the merges' results are all the longer tokens, in order. Raises ValueError for what would not be the same.
    """
    try:
        with open(path, encoding='utf-8') as f:
            file = json.load(f)
        model, normalizer, split = file['model'], file.get('normalizer'), file.get('pre_tokenizer') or {}
        vocab, merges = model['vocab'], [m.split(' ') if isinstance(m, str) else m for m in model['merges']]
        special = {token['content']: token['id'] for token in file.get('added_tokens') or []}
    except FileNotFoundError:
        raise ValueError(f'there is no {path}: name another tokenizer, such as --tokenizer=gpt2') from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is no byte-level BPE that can be read ({type(error).__name__}: {error})') from error
    steps = split.get('pretokenizers', [split])
    kinds, last = [step.get('type') for step in steps], {'add_prefix_space': True, 'use_regex': True, **steps[-1]}
    patterns = {'ByteLevel': GPT2_SPLIT, 'Digits ByteLevel': DIGIT_SPLIT,
                'Split ByteLevel': steps[0].get('pattern', {}).get('Regex')}
    pattern = patterns.get(' '.join(map(str, kinds)))
    probe = 'aÉ日 12½ \t\r\n  x\'s!?…\u0301🙂\x00\u200b'  # theirs keeps what the pattern does not match, tiktoken's drops it
    if not pattern or ''.join(match[0] for match in regex.finditer(pattern, probe)) != probe:
        raise ValueError(f'its way of splitting text, {kinds}, is not one that can be converted exactly')
    after = file.get('post_processor') or {}
    if after.get('type') not in (None, 'ByteLevel', 'TemplateProcessing') or after.get('special_tokens'):
        raise ValueError('its post_processor adds tokens to every text, which cannot be converted exactly')
    for settings, wanted in (
            (model, {'type': 'BPE', 'dropout': None, 'byte_fallback': False, 'continuing_subword_prefix': None,
                     'end_of_word_suffix': None}),
            (normalizer or {}, {'type': 'NFC'}), (last, {'add_prefix_space': False, 'use_regex': kinds[0] != 'Split'}),
            (steps[0], {'individual_digits': True, 'behavior': 'Isolated', 'invert': False})):
        for key, value in wanted.items():
            if (settings.get(key, value) or None) != (value or None):  # an empty suffix is none
                raise ValueError(f'its {key} is {settings[key]!r}, not {value!r}, which cannot be converted exactly')
    alphabet = byte_alphabet()
    try:
        ranks = {bytes(alphabet[c] for c in token): i for token, i in vocab.items() if token not in special}
        made = [vocab[a + b] for a, b in merges]
    except (KeyError, ValueError) as error:
        raise ValueError(f'its tokens are not those of a byte-level BPE: {error}') from error
    if made != sorted(i for token, i in ranks.items() if len(token) > 1):
        raise ValueError('its merges are not in the order of its tokens, or do not make all of them')
    lost = bytes(b for b in range(256) if bytes([b]) not in ranks)
    return pattern, ranks, special, {'nfc': bool(normalizer), 'lost': lost, 'system': default_system(template_path, special)}


def byte_alphabet():
    """{character: byte}: in its files a byte-level BPE writes every byte as a printable character, as GPT-2's encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def default_system(path, special):
    """
    What the chat template in a file puts before a conversation that has no system message: SmolLM2 is told its name there.
    Raises ValueError if the template is not that of ChatML, though the tokens are.
    """
    if not path or IM_START not in special:
        return ''
    with open(path, encoding='utf-8') as f:
        template = f.read() if path.endswith('.jinja') else json.load(f).get('chat_template') or ''
    if not template:
        return ''
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # torch brings it along
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    hello = [{'role': 'user', 'content': 'Hi'}]
    try:
        said = environment.from_string(template).render(messages=hello, add_generation_prompt=True)
    except Exception as error:  # whatever somebody's program raises
        raise ValueError(f'its chat template cannot be rendered ({type(error).__name__}: {error})') from error
    found = re.fullmatch(r'(?s:<\|im_start\|>system\n(.*?)<\|im_end\|>\n)?<\|im_start\|>user\nHi<\|im_end\|>\n'
                         r'<\|im_start\|>assistant\n', said)
    if not found:
        raise ValueError(f'its chat template is not the one of ChatML: it makes {said!r} of a user\'s "Hi"')
    return found[1] or ''


def encode(tokenizer, text):
    """Data text -> ids. What looks like a special token in it stays text. ValueError for a character without an id."""
    if tokenizer.name.endswith('.pkl'):
        known = {t.decode() for t in tokenizer._mergeable_ranks}
        unknown = sorted(set(text) - known)
        if unknown:
            raise ValueError(f'the {len(known)} characters of {tokenizer.name} do not include '
                             f'{", ".join(map(repr, unknown[:5]))}: leave them out or take --tokenizer=bytes')
    return tokenizer.encode_ordinary(text)


def decode(tokenizer, ids):
    """Ids -> text, up to the first end token. Bytes that are no UTF-8 become U+FFFD."""
    return tokenizer.decode(ids[:text_length(tokenizer, ids)])


def text_length(tokenizer, ids):
    """How many ids stand before the first end token."""
    ends = end_tokens(tokenizer)
    return next((n for n, i in enumerate(ids) if i in ends), len(ids))


def end_tokens(tokenizer):
    """The ids that end an answer or a text: <|endoftext|>, and ChatML's <|im_end|> where the tokenizer has it."""
    return [tokenizer._special_tokens[token] for token in (END, IM_END) if token in tokenizer._special_tokens]


def drawable_ids(tokenizer, vocab_size):
    """
    bool (vocab_size,): the ids that generation may draw: text, the end tokens and what else the tokenizer brought along, but
    not <image>, <|user|> and <|assistant|>, and nothing that it can't decode.
    """
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[list(tokenizer._mergeable_ranks.values())] = True
    allowed[[i for token, i in tokenizer._special_tokens.items() if token not in (IMAGE, USER, ASSISTANT)]] = True
    return allowed


# -----------------------------------------------------------------------------
# example -> ids, targets, images

def segments(example, tokenizer, loss_on, prompt_only=False):
    """
    An example as a list of (text or special token, is_special, learn). <image> is special only as often as there are
    images. With prompt_only the last answer is left out and what opens it stands at the end, ready to be continued. A turn is

        <|user|>...                <|assistant|>...<|endoftext|>        or, where the tokenizer has its tokens, ChatML's
        <|im_start|>user\\n...<|im_end|>\\n      <|im_start|>assistant\\n...<|im_end|>\\n
    """
    loss_on = example.get('loss_on', loss_on)
    if loss_on not in ('assistant', 'all', 'postfix'):
        raise ValueError(f'loss_on must be assistant or all, got {loss_on!r}')
    out = []
    has_images, filling = bool(example.get('images')), example.get('filling')  # filling: text in the images' place
    if 'messages' not in example:
        parts = example['text'].split(IMAGE) if has_images or filling is not None else [example['text']]
        out.append((END, True, False))  # a text begins as it ends, so that its first token is predicted too
        for i, part in enumerate(parts):
            if i:
                out.append((IMAGE, True, False) if has_images else (filling, False, False))
            out.append((part, False, loss_on != 'postfix' or i == len(parts) - 1))
        return out if prompt_only else out + [(END, True, True)]
    messages, chatml, system = list(example['messages']), IM_START in tokenizer._special_tokens, ''
    if messages and messages[0]['role'] == 'system' and not chatml:
        system = messages.pop(0)['content'] + '\n\n'
    elif messages and messages[0]['role'] != 'system' and tokenizer.system:
        messages.insert(0, {'role': 'system', 'content': tokenizer.system})
    if prompt_only and messages and messages[-1]['role'] == 'assistant':
        messages.pop()
    for place, message in enumerate(messages):
        role, content = message['role'], message['content']
        if role not in ('user', 'assistant') and not (role == 'system' and chatml and not place):
            raise ValueError(f'a message is by "user" or "assistant" (and a first one by "system"), got {role!r}')
        everything, learn = loss_on == 'all', loss_on == 'all' or role == 'assistant'
        if chatml:
            out += [(IM_START, True, everything), (f'{role}\n', False, everything)]
        else:
            out.append((USER if role == 'user' else ASSISTANT, True, everything))
        content, system = system + content, ''
        parts = content.split(IMAGE) if has_images else [content]
        for i, part in enumerate(parts):
            out += [(IMAGE, True, False)] if i else []
            out.append((part, False, learn))
        if chatml:
            out += [(IM_END, True, learn), ('\n', False, everything)]
        elif role == 'assistant':
            out.append((END, True, learn))
    opening = [(IM_START, True, False), ('assistant\n', False, False)] if chatml else [(ASSISTANT, True, False)]
    return out + opening if prompt_only else out


def tokenize(example, tokenizer, config, loss_on='assistant', prompt_only=False, features=None):
    """
    An example -> {'idx': [int], 'targets': [int], 'images': [(patches, grid)]}; config is the model's GPTConfig. With
    `features`, StoredFeatures, image files are not opened: their features come in the place of their patches. Of an example
    that has "spell": true, the answer becomes a token for each character instead of the tokenizer's longer ones.

    targets[t] is the token behind idx[t], or -1 where nothing is to be learnt: for the 'assistant' it is the answers
    and their end, for 'all' every text token. Image tokens never are targets, but the last of them predicts the text
    behind it. Text that takes more than block_size positions is cut; an image
    is not, and neither is a prompt. Raises ValueError if images and <image> places differ, or something does not fit.
    """
    sources = example.get('images') or []
    if config.objective != 'lm':
        return tokenize_pair(example, tokenizer, config, features)
    if sources and not config.vision_encoder:
        raise ValueError('the example has an image, but the model has no vision_encoder')
    images = [look(source, config, features) for source in sources]
    ids, learn, left, positions = [], [], list(images), 0
    for text, is_special, learnt in segments(example, tokenizer, loss_on, prompt_only):
        if text == IMAGE and is_special:
            if not left:
                raise ValueError(f'more <image> places than images ({len(images)})')
            new = [config.image_token] * vision.num_tokens(left.pop(0), config)
            positions += 1
        else:
            pieces = text if example.get('spell') and learnt else [text]
            new = [tokenizer.encode_single_token(text)] if is_special else [i for s in pieces for i in encode(tokenizer, s)]
            if not prompt_only:  # cut what runs over; one more than block_size, because the last id is only a target
                new = new[:max(0, config.block_size + 1 - positions)]
            positions += len(new)
        ids += new
        learn += [learnt] * len(new)
    if left:
        raise ValueError(f'{len(images)} images, but only {len(images) - len(left)} <image> places in the text')
    if positions > config.block_size + (not prompt_only):
        raise ValueError(f'{"the prompt takes" if prompt_only else "text and images up to the last image take"} '
                         f'{positions} positions, but block_size is {config.block_size}: shorten the text or train with '
                         'a larger block_size')
    if prompt_only:
        return {'idx': ids, 'targets': [-1] * len(ids), 'images': images}
    return {'idx': ids[:-1], 'targets': [i if learnt else -1 for i, learnt in zip(ids[1:], learn[1:])], 'images': images}


def look(source, config, features=None):
    """(patches, grid) of an image, or its stored features in their place."""
    return features[source] if features and isinstance(source, str) else vision.preprocess(load_image(source), config)


def reference(example):
    """What the model should have answered: the last message's text, or the text behind the last image."""
    return example['messages'][-1]['content'] if 'messages' in example else example['text'].rpartition(IMAGE)[2]


def tokenize_pair(example, tokenizer, config, features=None):
    """For an Aligner: a picture and its caption, cut at block_size positions. The one target stands for the one pair."""
    if len(example.get('images') or []) != 1 or not reference(example).strip():
        raise ValueError(f'objective {config.objective} learns from pairs of a picture and a caption, and an example is none: '
                         f'it has {len(example.get("images") or [])} images and the text {reference(example)[:40]!r}')
    ids = caption_ids(reference(example), tokenizer, config)
    return {'idx': ids, 'targets': [0] + [-1] * (len(ids) - 1), 'images': [look(example['images'][0], config, features)]}


def caption_ids(caption, tokenizer, config):
    """The ids of a caption and its end; one place of block_size is left for what an Aligner puts in front."""
    return encode(tokenizer, caption.strip())[:config.block_size - 2] + [tokenizer.encode_single_token(END)]


def collate(examples, config):
    """
    Tokenized examples -> a batch:
        idx, targets  int64 (B, T), padded at the right with -1
        lengths       int64 (B,), the tokens of each example
        images        vision.collate's (patches, grid) of all images, row by row; None for a model without vision
    Raises ValueError if ids and images disagree.
    """
    lengths = torch.tensor([len(e['idx']) for e in examples])
    idx = torch.full((len(examples), int(lengths.max())), -1)
    targets = idx.clone()
    for i, e in enumerate(examples):
        idx[i, :len(e['idx'])] = torch.tensor(e['idx'])
        targets[i, :len(e['idx'])] = torch.tensor(e['targets'])
    images = [image for e in examples for image in e['images']]
    places, tokens = int((idx == config.image_token).sum()), sum(vision.num_tokens(image, config) for image in images)
    if config.vision_encoder and config.objective == 'lm' and places != tokens:
        raise ValueError(f'the batch has {places} <image> places, but its images make {tokens} tokens')
    return {'idx': idx, 'targets': targets, 'lengths': lengths,
            'images': vision.collate(images, config) if config.vision_encoder else None}


class Batches(torch.utils.data.Dataset):
    """
    Micro-batch i holds the examples i * batch_size to (i + 1) * batch_size - 1, whoever computes it and whenever.
    What a user must hear (a missing image, say) comes back as {'error': sentence}: raised in a loader's worker it would
    arrive wrapped in that worker's traceback.
    """

    def __init__(self, examples, tokenizer, config, batch_size, loss_on, features=None):
        self.examples, self.tokenizer, self.config = examples, tokenizer, config
        self.batch_size, self.loss_on, self.features = batch_size, loss_on, features

    def __getitem__(self, i):
        try:
            return collate([tokenize(self.examples[j], self.tokenizer, self.config, self.loss_on, features=self.features)
                            for j in range(i * self.batch_size, (i + 1) * self.batch_size)], self.config)
        except (ValueError, OSError) as error:
            return {'error': str(error)}


# -----------------------------------------------------------------------------
# the commands' knobs

name = ''             # the dataset is written to data/NAME; '' takes the source's last part, or the command's name
source = ''           # text: a dataset of the hub, or a .txt/.jsonl/.parquet file or folder; llava: a local .json of theirs;
#                       coco_captions, cc3m, emoji: see there
subset = ''           # text: the dataset's configuration, such as sample-10BT; llava: another file of the repository
max_examples = 0      # stop after as many examples; 0: all (of text 10000, of shapes 40000)
val_every = 100       # one example of so many is held out
image_dir = ''        # llava, coco_captions: the folder or .zip that the images' names are relative to
dataset = ''          # features, show: the dataset
# show
split = 'train'
index = 0             # of the row
loss_on = 'assistant'
tokenizer = 'bytes'
block_size = 1024
out = 'show.png'
# the encoder of features and show, as in train.py
vision_encoder = 'vit'
connector = 'mlp'     # pool: features are stored pooled, in pool_size ** 2 times less space
pool_size = 2
n_queries = 32        # connector qformer
patch_height = 16
patch_width = 16
max_image_tokens = 256
line_height = 0
vision_layer = -2
vision_cls = False
image_fit = 'pad'
# features
batch_size = 32
dtype = 'float16'     # or bfloat16: a wider range, less precise
device = ''           # '' takes CUDA or MPS if there is one


def vision_config():
    """The knobs as vision.py and tokenize want them of a GPTConfig; a tower writes its own into it."""
    wanted = ('vision_encoder', 'connector', 'pool_size', 'n_queries', 'patch_height', 'patch_width', 'max_image_tokens',
              'line_height', 'vision_layer', 'vision_cls', 'image_fit', 'block_size')
    # -2 is the id of no token: these sequences are shown, no model reads them
    return SimpleNamespace(**{key: globals()[key] for key in wanted}, image_token=-2, n_embd=1, image_size=0,
                           vision_fingerprint='', objective='lm')


# -----------------------------------------------------------------------------
# python prepare_data.py text

def text_command():
    """Streams the first max_examples documents of a text dataset to data/NAME/{train,val}.jsonl."""
    if not source:
        raise ValueError('expected --source=NAME_ON_THE_HUB or --source=FILE_OR_FOLDER')
    if os.path.exists(source):
        files = [source] if os.path.isfile(source) else [os.path.join(r, n) for r, _, ns in sorted(os.walk(source)) for n in ns]
        rows = (row for f in sorted(files) if f.endswith(('.txt', '.jsonl', '.parquet')) for row in read_file(f))
    else:
        import datasets
        try:
            rows = datasets.load_dataset(source, subset or None, split='train', streaming=True)
        except Exception as error:  # the hub's client has many of its own
            raise ValueError(f'{source} is neither a file here nor a dataset that the hub gives us '
                             f'({type(error).__name__}: {str(error).splitlines()[0]})') from error
    folder = os.path.join('data', name or os.path.splitext(os.path.basename(source.rstrip('/')))[0])
    count, most = 0, max_examples or 10000
    with Parts(folder) as parts, tqdm(total=most, unit='doc') as bar:
        for row in rows:
            if count == most:
                break
            text = row.get('text')
            if isinstance(text, str) and text.strip():
                parts.write('val' if count % val_every == val_every - 1 else 'train', {'text': text})
                count += 1
                bar.update()


class Parts:
    """
    train.jsonl and val.jsonl of a folder while they are being written, under the names *.part: what has been interrupted
    never looks like a dataset. With `work`, a dict that names what is being done, an interrupted command goes on where the
    last `checkpoint` was, if it is called again for the same work.
    """

    def __init__(self, folder, names=('train', 'val'), work=None):
        self.folder, self.work, self.progress = folder, work, os.path.join(folder, 'progress.json')
        os.makedirs(folder, exist_ok=True)
        self.state = {'work': work, 'bytes': dict.fromkeys(names, 0), 'counts': dict.fromkeys(names, 0), 'done': 0}
        if work and os.path.exists(self.progress):
            with open(self.progress, encoding='utf-8') as f:
                state = json.load(f)
            if state['work'] == work:
                self.state = state
                print(f'going on behind row {state["done"]}', file=sys.stderr)
        self.files = {}
        for name, size in self.state['bytes'].items():
            path = os.path.join(folder, f'{name}.jsonl.part')
            self.files[name] = open(path, 'r+b' if size else 'wb')
            self.files[name].seek(size)
            self.files[name].truncate()

    def write(self, name, row):
        self.files[name].write(json.dumps(row, ensure_ascii=False).encode() + b'\n')
        self.state['counts'][name] += 1

    def checkpoint(self, done):
        """Everything up to source row `done` is written."""
        for name, f in self.files.items():
            f.flush()
            self.state['bytes'][name] = f.tell()
        self.state['done'] = done
        with open(self.progress + '.part', 'w', encoding='utf-8') as f:
            json.dump(self.state, f)
        os.replace(self.progress + '.part', self.progress)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        for f in self.files.values():
            f.close()
        if error:
            if isinstance(error, ValueError) and os.path.exists(self.progress):
                os.remove(self.progress)  # there is something to mend first, and all is to be looked at again then
            return
        for name in self.files:
            path = os.path.join(self.folder, f'{name}.jsonl')
            os.replace(f'{path}.part', path)
        if os.path.exists(self.progress):
            os.remove(self.progress)
        counts = self.state['counts']
        print(f'{self.folder}: {counts["train"]} examples to train on, {counts["val"]} held out', file=sys.stderr)


# -----------------------------------------------------------------------------
# python prepare_data.py llava_instruct, llava_pretrain, llava_cc3m, sharegpt4v

# command -> repository, its file, its images if it has them, whether its rows are captions of which only the caption is kept
LLAVA = {
    'llava_instruct': ('liuhaotian/LLaVA-Instruct-150K', 'llava_instruct_150k.json', None, False),
    'llava_pretrain': ('liuhaotian/LLaVA-Pretrain', 'blip_laion_cc_sbu_558k.json', 'images.zip', True),
    'llava_cc3m': ('liuhaotian/LLaVA-CC3M-Pretrain-595K', 'chat.json', 'images.zip', True),
    'sharegpt4v': ('Lin-Chen/ShareGPT4V', 'sharegpt4v_instruct_gpt4-vision_cap100k.json', None, False),
}


def llava_command(command):
    """
    A dataset in LLaVA's format to data/NAME/{train,val}.jsonl. The rows of one image (or text-only row) are held out
    together. Every image is opened once: a row whose image is missing or broken is left out and listed with the reason
    in left_out.jsonl. Interrupted, it goes on where it was. Raises ValueError if nothing is left.
    """
    repository, file, zipped, captions = LLAVA[command]
    file = f'{subset.removesuffix(".json")}.json' if subset else file
    path, images = source or download(repository, file), image_dir
    if not images:
        if source or not zipped:
            raise ValueError('expected --image_dir=FOLDER_OR_ZIP: this data has no images of its own, only their names, like '
                             'those of COCO: http://images.cocodataset.org/zips/train2017.zip')
        images = download(repository, zipped)
    if not (os.path.isdir(images) or images.endswith('.zip') and os.path.isfile(images) and zipfile.is_zipfile(images)):
        raise ValueError(f'--image_dir={images} does not exist, or is no archive: expected the folder or .zip with the images')
    folder = os.path.join('data', name or (os.path.splitext(os.path.basename(source))[0] if source else command))
    images = os.path.abspath(images)
    work = {'command': command, 'source': path, 'size': os.path.getsize(path), 'image_dir': images, 'val_every': val_every,
            'max_examples': max_examples}
    write_dataset(folder, work, json_rows(path, max_examples), lambda row: llava_example(row, images, captions))


def write_dataset(folder, work, rows, convert):
    """
    The rows of a source to folder/{train,val}.jsonl. convert(row), in threads, gives (example, '') or (None, why it is left
    out), which left_out.jsonl lists. Rows of one image (or "id") are held out together, or all with "split": "val"; of
    several captions, under "references" of an example, each becomes an example to train on. Interrupted, it goes on where it
    was. Raises ValueError if nothing is left.
    """
    with Parts(folder, ('train', 'val', 'left_out'), work) as parts, ThreadPoolExecutor(8) as pool, tqdm(unit='row') as bar:
        state = parts.state
        for first, some in chunks(rows, 256):
            if first + len(some) <= state['done']:
                bar.update(len(some))
                continue
            for i, (row, (example, why)) in enumerate(zip(some, pool.map(convert, some)), first):
                if why:
                    parts.write('left_out', {'row': i, 'id': row.get('id'), 'image': row.get('image'), 'why': why})
                    state.setdefault('whys', {})[why] = state.get('whys', {}).get(why, 0) + 1
                    continue
                key = str(row.get('image') or row.get('id') or i)
                held_out = key == state.setdefault('first', key) or \
                    int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % val_every == 0
                held_out = row['split'] == 'val' if 'split' in row else held_out
                captions = example.pop('references', []) if not held_out else []
                for caption in captions:
                    parts.write('train', {**example, 'text': IMAGE + caption})
                if not captions:
                    parts.write('val' if held_out else 'train', example)
            parts.checkpoint(first + len(some))
            bar.update(len(some))
        counts = state['counts']
        for why, count in state.get('whys', {}).items():
            print(f'left out: {count} rows, {why}', file=sys.stderr)
        if counts['left_out']:
            print(f'they are listed in {os.path.join(folder, "left_out.jsonl")}', file=sys.stderr)
        if not counts['train'] or not counts['val']:
            raise ValueError(f'of {state["done"]} rows in {work["source"]}, {counts["train"]} are left to train on and '
                             f'{counts["val"]} to hold out: is --image_dir={work.get("image_dir", "")} what the names in it '
                             'are relative to?')


def download(repository, file):
    """The local path of a file of a dataset on the hub, which is downloaded once."""
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download(repository, file, repo_type='dataset')
    except Exception as error:  # the hub's client has many of its own
        raise ValueError(f'{file} of {repository} is not in the cache and cannot be downloaded ({type(error).__name__}): '
                         'connect, or name local copies, --source=FILE.json --image_dir=FOLDER_OR_ZIP') from error


def json_rows(path, most=0):
    """
    The objects of a JSON array in a file, one after another: LLaVA's of a gigabyte is never in memory as a whole; or the
    lines of a .jsonl. Raises ValueError with the row's number where the file is broken or ends too early.
    """
    with open(path, encoding='utf-8') as f:
        decoder, text, count, ended = json.JSONDecoder(), '', 0, False
        if not path.endswith('.jsonl') and f.read(1) != '[':
            raise ValueError(f'{path} is not a JSON array of rows, as LLaVA publishes them')
        while not most or count < most:
            text = text.lstrip(' \n\r\t,')
            if text.startswith(']') or ended and not text and path.endswith('.jsonl'):
                return
            try:
                row, end = decoder.raw_decode(text)
            except ValueError as error:
                more = f.read(1 << 20)
                if ended:
                    raise ValueError(f'{path} is broken or cut off at row {count}: {error}') from None
                text, ended = text + more, not more
                continue
            if not isinstance(row, dict):
                raise ValueError(f'{path}, row {count}: expected an object, got {str(row)[:60]}')
            yield row
            text, count = text[end:], count + 1


def chunks(rows, size):
    """(number of its first row, up to `size` rows) of an iterable."""
    first, chunk = 0, []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield first, chunk
            first, chunk = first + size, []
    if chunk:
        yield first, chunk


def image_path(images, name):
    """Where an image is: below a folder, or in a zip, which may hold everything in one folder, as COCO's do."""
    if images.endswith('.zip'):
        archive = open_zip(images, os.getpid())
        if name not in archive.NameToInfo:
            name = archive.namelist()[0].partition('/')[0] + '/' + name
    return os.path.join(images, name)


def llava_example(row, images, captions):
    """A row of LLaVA's -> (example, '') or (None, why it is left out)."""
    names = row.get('image') or []
    names = [names] if isinstance(names, str) else names
    paths = [image_path(images, name) for name in names]
    roles = {'human': 'user', 'gpt': 'assistant', 'system': 'system'}
    try:
        messages = [{'role': roles[turn['from']], 'content': turn['value']} for turn in row['conversations']]
    except (KeyError, TypeError):
        return None, 'no conversation in the format of LLaVA'
    while messages and messages[-1]['role'] == 'user':  # a question without an answer
        messages.pop()
    system = messages[:1] if messages and messages[0]['role'] == 'system' else []
    turns = messages[len(system):]
    while turns and turns[0]['role'] == 'assistant':    # an answer without a question
        turns.pop(0)
    if not turns or any(m['role'] != ('user', 'assistant')[i % 2] for i, m in enumerate(turns)):
        return None, 'no questions and answers by turns'
    if not all(isinstance(m['content'], str) and m['content'].strip() for m in turns):
        return None, 'an empty turn'
    places = sum(m['content'].count(IMAGE) for m in turns)
    if names and not places:
        turns[0]['content'] = (IMAGE + '\n') * len(names) + turns[0]['content']
    elif places != len(names):
        return None, f'{places} <image> places for {len(names)} images'
    why = next(filter(None, map(what_is_wrong, paths)), '')
    if why:
        return None, why
    example = {'text': IMAGE + turns[-1]['content'].strip()} if captions and names else {'messages': system + turns}
    return {**example, **({'image_path': paths[0]} if len(paths) == 1 else {'image_paths': paths} if paths else {})}, ''


def what_is_wrong(path):
    """'' for an image that can be read, to its last byte, else the reason."""
    try:
        image = Image.open(open_path(path))
        image.draft('RGB', (64, 64))  # a JPEG at an eighth of its size
        image.load()
    except FileNotFoundError:
        return 'the image is missing'
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 'the image is broken'
    return ''


# -----------------------------------------------------------------------------
# python prepare_data.py coco_captions, cc3m: pictures and captions

def captioned(row):
    """A row {'captions': [...], 'path': image} -> its example, or why it is left out."""
    captions = [' '.join(c.split()) for c in row['captions'] if isinstance(c, str) and c.strip()]
    why = what_is_wrong(row['path']) if captions else 'it has no caption'
    return (None, why) if why else ({'text': IMAGE + captions[0], 'image_path': row['path'], 'references': captions}, '')


def coco_command():
    """
    COCO's captions, five of a picture. --source is the folder with captions_train2017.json and captions_val2017.json, which
    stay what they are, to train on and held out, and --image_dir the one with train2017 and val2017, unpacked or as .zip; or
    --source is one such file, to be split here, and --image_dir the folder or .zip with its images.
    """
    if not source or not image_dir:
        raise ValueError('expected --source=FOLDER with captions_train2017.json and captions_val2017.json (they are in '
                         'http://images.cocodataset.org/annotations/annotations_trainval2017.zip) and --image_dir=FOLDER with '
                         'train2017.zip and val2017.zip of http://images.cocodataset.org/zips')
    parts = [(source, image_dir, None)]
    if os.path.isdir(source):
        parts = [(os.path.join(source, f'captions_{part}2017.json'), os.path.join(image_dir, f'{part}2017'), part)
                 for part in ('train', 'val')]
    rows = []
    for path, images, part in parts:
        images = images if os.path.exists(images) else images + '.zip'
        if not os.path.isfile(path) or not os.path.exists(images):
            raise ValueError(f'{path if not os.path.isfile(path) else images} does not exist: expected the captions as COCO '
                             'publishes them, and their images')
        rows += coco_rows(path, os.path.abspath(images), part)
    rows = rows[:max_examples or None]
    work = {'command': 'coco_captions', 'source': source, 'image_dir': image_dir, 'rows': len(rows), 'val_every': val_every}
    write_dataset(os.path.join('data', name or 'coco_captions'), work, rows, captioned)


def coco_rows(path, images, part):
    """A row for each image of a captions_*.json, with all of its captions."""
    try:
        with open(path, encoding='utf-8') as f:
            file = json.load(f)
        captions = {}
        for annotation in file['annotations']:
            captions.setdefault(annotation['image_id'], []).append(annotation['caption'])
        return [{'image': image['file_name'], 'path': image_path(images, image['file_name']), 'captions': captions[image['id']],
                 **({'split': part} if part else {})} for image in file['images'] if image['id'] in captions]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not a captions file as COCO publishes them: {type(error).__name__}: {error}') from error


def cc3m_command():
    """
    Conceptual Captions, or any pictures with captions that img2dataset has downloaded. --source is a folder with .tar files in
    the WebDataset format, a repository of the hub with such (pixparse/cc3m-wds, pixparse/cc12m-wds), or what img2dataset
    writes as files: 00000/000000000.jpg with .txt beside it. Tars become .zip files in data/NAME/images, out of which a single
    picture can be read; files stay where they are.
    """
    place = source or 'pixparse/cc3m-wds'
    folder = os.path.join('data', name or ('cc3m' if not source else os.path.basename(place.rstrip('/'))))
    if os.path.isdir(place):
        files = sorted(os.path.join(root, n) for root, _, names in os.walk(place) for n in names)
        tars = [f for f in files if f.endswith('.tar')]
    elif os.path.isfile(place) and place.endswith('.tar'):
        tars = [place]
    elif place.count('/') == 1 and not os.path.exists(place):
        tars = [(place, file) for file in hub_files(place) if file.endswith('.tar')]
    else:
        raise ValueError(f'{place} is neither a folder, a .tar, nor OWNER/NAME on the hub')
    rows = (row for tar in tars for row in tar_rows(tar, os.path.join(folder, 'images'))) if tars else \
        ({'image': os.path.relpath(f, place), 'path': os.path.abspath(f), 'captions': [beside(f)]}
         for f in files if f.lower().endswith(PICTURES))
    work = {'command': 'cc3m', 'source': place, 'val_every': val_every, 'max_examples': max_examples}
    write_dataset(folder, work, itertools.islice(rows, max_examples or None), captioned)


PICTURES = ('.jpg', '.jpeg', '.png', '.webp')


def hub_files(repository):
    """The names of the files of a dataset on the hub."""
    from huggingface_hub import list_repo_files
    try:
        return sorted(list_repo_files(repository, repo_type='dataset'))
    except Exception as error:  # the hub's client has many of its own
        raise ValueError(f'{repository} cannot be listed ({type(error).__name__}): connect, or name a local copy, '
                         '--source=FOLDER with its .tar files') from error


def beside(path):
    """The caption in the .txt beside an image, '' if there is none."""
    try:
        with open(os.path.splitext(path)[0] + '.txt', encoding='utf-8', errors='replace') as f:
            return f.read()
    except FileNotFoundError:
        return ''


def tar_rows(tar, folder):
    """
    The rows of one shard, a path or (repository, file) on the hub. Its members become a .zip of the same name, unless that
    has been done before: the members of a sample share their name up to the first dot.
    """
    path = os.path.join(folder, os.path.splitext(os.path.basename(tar if isinstance(tar, str) else tar[1]))[0] + '.zip')
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        tar = tar if isinstance(tar, str) else download(*tar)
        try:
            with tarfile.open(tar) as members, zipfile.ZipFile(path + '.part', 'w') as archive:
                for member in members:
                    if member.isfile() and member.name.lower().endswith((*PICTURES, '.txt')):
                        archive.writestr(member.name, members.extractfile(member).read())
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f'{tar} is broken or cut off: {error}') from error
        os.replace(path + '.part', path)
    archive = open_zip(path, os.getpid())
    for file in archive.namelist():
        stem, dot, kind = file.rpartition('/')[2].partition('.')
        if (dot + kind).lower() in PICTURES:
            text = file[:len(file) - len(dot + kind)] + '.txt'
            caption = archive.read(text).decode(errors='replace') if text in archive.NameToInfo else ''
            yield {'image': f'{os.path.basename(path)}/{file}', 'path': os.path.abspath(os.path.join(path, file)),
                   'captions': [caption]}


# -----------------------------------------------------------------------------
# python prepare_data.py features

def features_command():
    """
    Runs a frozen tower over all images of a dataset once and stores its features, pooled with connector pool, in
    data/NAME/features-KEY/. Says first what that takes on the disk, and does not begin without as much. Interrupted, it goes
    on where it was.
    """
    config = vision_config()
    if not vision.is_tower(config):
        raise ValueError(f'expected --vision_encoder=NAME/TAG of a frozen tower, got {vision_encoder!r}: the features of an '
                         'encoder that is trained change with every step')
    if dtype not in ('float16', 'bfloat16'):
        raise ValueError(f'dtype must be float16 or bfloat16, got {dtype!r}')
    root, paths = dataset_folder(dataset), {}
    for part in ('train', 'val'):
        rows = open_rows(dataset, part)
        for i in range(len(rows)):
            paths.update(dict.fromkeys(rows[i].get('images') or []))
    if not paths:
        raise ValueError(f'{dataset} has no image files: there is nothing to store')
    paths = list(paths)
    eyes = vision.Vision(config)
    place = device or ('cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu')
    eyes.to(place).eval().requires_grad_(False)
    x, grid = vision.collate([vision.preprocess(load_image(paths[0]), config)], config)
    _, length, width = eyes.features(x.to(place), grid.to(place))[0].shape
    folder = StoredFeatures.folder_for(dataset, config)
    os.makedirs(folder, exist_ok=True)
    need, free = len(paths) * length * width * 2, shutil.disk_usage(folder).free
    print(f'{len(paths)} images x {length} tokens x {width} x 2 bytes = {need / 1e9:.3f} GB in {folder}; '
          f'{free / 1e9:.1f} GB are free', file=sys.stderr)
    if need > free:
        raise ValueError(f'{need / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB: make room, or pool them '
                         '(--connector=pool --pool_size=2)')
    file, plan, finished = (os.path.join(folder, name) for name in ('features.bin', 'plan.json', 'index.json'))
    index = {'shape': [len(paths), length, width], 'dtype': dtype, 'vision_encoder': vision_encoder,
             'images': [path.removeprefix(root + os.sep) for path in paths]}
    done = 0
    if os.path.exists(finished):  # of these images: there is nothing left to do; of others: it is begun again
        os.replace(finished, plan)
    if os.path.exists(plan) and os.path.exists(file):
        with open(plan, encoding='utf-8') as f:
            done = os.path.getsize(file) // (length * width * 2) if json.load(f) == index else 0
    with open(plan, 'w', encoding='utf-8') as f:
        json.dump(index, f)
    with open(file, 'r+b' if done else 'wb') as f, torch.no_grad():
        f.seek(done * length * width * 2)
        f.truncate()
        with ThreadPoolExecutor(4) as pool, tqdm(total=len(paths), initial=done, unit='image') as bar:
            for i in range(done, len(paths), batch_size):
                some = list(pool.map(lambda p: vision.preprocess(load_image(p), config), paths[i:i + batch_size]))
                x, grid = vision.collate(some, config)
                found = eyes.features(x.to(place), grid.to(place))[0].to(getattr(torch, dtype)).cpu()
                if not found.isfinite().all():
                    raise ValueError(f'a feature is too large for {dtype}: store them with --dtype=bfloat16')
                f.write(found.contiguous().view(torch.uint8).numpy().tobytes())
                bar.update(len(some))
    os.replace(plan, finished)


# -----------------------------------------------------------------------------
# python prepare_data.py show

def show_command():
    """One example as the model gets it: its images and tokens in show.png, what is learnt in green; the same as text."""
    config, encoding = vision_config(), get_tokenizer(tokenizer)
    if vision.is_tower(config):
        vision.Tower(config, load=False)  # for the number of its tokens; its weights do not matter here
    rows = open_rows(dataset, split)
    if not 0 <= index < len(rows):
        raise ValueError(f'{dataset} has {len(rows)} rows to {split} on, from 0 to {len(rows) - 1}; there is no {index}')
    example = rows[index]
    t = tokenize(example, encoding, config, loss_on)
    ids, learnt = t['idx'] + t['targets'][-1:], [False, *(target >= 0 for target in t['targets'])]
    if ids[-1] < 0:
        ids, learnt = ids[:-1], learnt[:-1]
    tokens, i, image = [], 0, 0
    while i < len(ids):
        if ids[i] == config.image_token:
            n = vision.num_tokens(t['images'][image], config)
            tokens.append((f'{IMAGE} x {n}', 'image'))
            i, image = i + n, image + 1
            continue
        kind = 'learnt' if learnt[i] else 'special' if ids[i] in encoding._special_tokens.values() else 'given'
        tokens.append((encoding.decode([ids[i]]), kind))
        i += 1
    print(f'{dataset}, row {index} to {split} on: {len(t["images"])} images, {len(ids)} tokens, {sum(learnt)} of them learnt '
          f'(in green); as a picture in {out}', file=sys.stderr)
    print(render.coloured(tokens, sys.stdout.isatty() and 'NO_COLOR' not in os.environ))
    render.token_sheet([load_image(source) for source in example.get('images') or []], tokens).save(out)


# -----------------------------------------------------------------------------
# python prepare_data.py shapes: a small set of questions about pictures, to learn on when nothing can be downloaded

SHAPES = ('circle', 'square', 'triangle', 'cross')
COLOURS = {'red': (220, 40, 40), 'green': (40, 160, 60), 'blue': (50, 80, 220), 'yellow': (245, 210, 40),
           'purple': (150, 60, 190), 'black': (20, 20, 20)}
QUARTERS = ('top left', 'top right', 'bottom left', 'bottom right')
FACTS = [('How many sides has a triangle?', '3'), ('How many sides has a square?', '4'), ('Which shape is round?', 'circle'),
         ('How many corners has a triangle?', '3'), ('Which colour do blue and yellow make?', 'green'),
         ('Which colour do red and blue make?', 'purple'), ('Is a circle round?', 'yes'), ('Is a square round?', 'no')]


def shapes_command():
    """
    data/shapes: PNGs of 64 x 64 pixels with one or two coloured shapes, each at a random place of a quarter of its own and
    of a random size, and conversations on colour, kind, number and place, yes or no. Of twenty examples one is without an
    image and three have two. A picture that is held out is not in the training set. words.txt lists the words, for
    --tokenizer=data/shapes/words.txt: a small GPT need not learn to spell first.
    """
    folder, count = os.path.join('data', name or 'shapes'), max_examples or 40000
    os.makedirs(os.path.join(folder, 'images'), exist_ok=True)
    seen, words = set(), set()
    with Parts(folder) as parts:
        for i in tqdm(range(count), unit='example'):
            rng, part = random.Random(f'shapes {i}'), 'val' if i * 40 < count else 'train'  # held out is what is drawn first
            while True:
                pictures, turns = shapes_example(rng, part == 'val')
                if part == 'val' or not seen & {str(sorted(p)) for p in pictures}:
                    break
            seen |= {str(sorted(p)) for p in pictures} if part == 'val' else set()
            paths = [f'images/{i:06d}{"ab"[j]}.png' for j in range(len(pictures))]
            for shapes, path in zip(pictures, paths):
                draw_shapes(shapes).save(os.path.join(folder, path))
            messages = [{'role': role, 'content': text} for turn in turns for role, text in zip(('user', 'assistant'), turn)]
            words.update(re.findall('[A-Za-z]+', ' '.join(m['content'] for m in messages)))
            messages[0]['content'] = (IMAGE + '\n') * len(paths) + messages[0]['content']
            parts.write(part, {'messages': messages, **({'image_paths': paths} if paths else {})})
    with open(os.path.join(folder, 'words.txt'), 'w', encoding='utf-8') as f:
        f.write('\n'.join(sorted(words)) + '\n')


def shapes_example(rng, held_out):
    """
    (pictures, each a list of shapes; turns, each a question and its answer). To learn from, many conversations are or end
    in a description: every word of it has to be looked for, the most that a picture can teach. Of what is held out only
    the last answer is scored: there a description stands alone, and every question type comes last.
    """
    dice = rng.random()
    if dice < 0.05:
        return [], rng.sample(FACTS, 4)
    if dice < 0.85:
        shapes = some_shapes(rng, rng.randint(1, 2))
        description = 'Describe the picture.', ', '.join(f'a {colour} {kind} {quarter}' for kind, colour, quarter, *_
                                                         in sorted(shapes, key=lambda shape: QUARTERS.index(shape[2])))
        if dice < (0.15 if held_out else 0.25):
            return [shapes], [description]
        questions = [shapes_question(shapes, rng) for _ in range(rng.randint(1, 3 if held_out else 5))]
        turns = list(dict.fromkeys(questions))  # none twice
        return [shapes], turns + [description] if dice < 0.45 and not held_out else turns
    pictures = [some_shapes(rng, n) for n in rng.sample((1, 2), 2)]
    turns = [('Which picture has more shapes?', 'the first' if len(pictures[0]) > len(pictures[1]) else 'the second')]
    for _ in range(2):
        which = rng.randrange(2)
        question, answer = shapes_question(pictures[which], rng)
        turns.append((f'In the {("first", "second")[which]} picture: {question}', answer))
    turns = list(dict.fromkeys(turns))
    return pictures, rng.sample(turns, len(turns))[:rng.randint(1, 3)]


def some_shapes(rng, n, half=32):
    """n shapes (kind, colour, quarter, x, y, radius), each in a quarter of its own."""
    shapes = []
    for quarter in rng.sample(range(4), n):
        r = rng.randint(9, 14)
        x, y = (rng.randint(r + 1, half - r - 1) for _ in range(2))
        shapes.append((rng.choice(SHAPES), rng.choice(list(COLOURS)), QUARTERS[quarter],
                       x + quarter % 2 * half, y + quarter // 2 * half, r))
    return shapes


def draw_shapes(shapes, size=64, fine=4):
    """The shapes on white, drawn large and scaled down, so that their edges are smooth."""
    image = Image.new('RGB', (fine * size, fine * size), 'white')
    pen = ImageDraw.Draw(image)
    for kind, colour, _, *place in shapes:
        x, y, r = (fine * v for v in place)
        box, fill = (x - r, y - r, x + r, y + r), COLOURS[colour]
        if kind == 'circle':
            pen.ellipse(box, fill)
        elif kind == 'square':
            pen.rectangle(box, fill)
        elif kind == 'triangle':
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
        else:
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
    return image.resize((size, size), Image.Resampling.BOX)


def shapes_question(shapes, rng):
    """A question that has one right answer, and the answer."""
    kinds, colours, pairs = ([s[0] for s in shapes], [s[1] for s in shapes], [s[:2] for s in shapes])
    while True:
        about, (kind, colour, quarter, *_) = rng.choice(('colour', 'kind', 'yes or no', 'count', 'where')), rng.choice(shapes)
        if about == 'colour' and kinds.count(kind) == 1:
            return f'What colour is the {kind}?', colour
        if about == 'kind' and colours.count(colour) == 1:
            return f'What is the {colour} shape?', kind
        if about == 'yes or no':
            if rng.random() < 0.5:
                return f'Is there a {colour} {kind}?', 'yes'
            # half right: only looking at both, colour and kind, tells
            other = rng.choice([(kind, rng.choice(list(COLOURS))), (rng.choice(SHAPES), colour)])
            if other not in pairs:
                return f'Is there a {other[1]} {other[0]}?', 'no'
        if about == 'count':
            what = rng.choice(('', kind, colour, rng.choice(SHAPES), rng.choice(list(COLOURS))))
            number = kinds.count(what) + colours.count(what) if what else len(shapes)
            return f'How many {what + "s" if what in SHAPES else (what + " shapes").strip()} are there?', str(number)
        if about == 'where' and pairs.count((kind, colour)) == 1:
            return f'Where is the {colour} {kind}?', quarter


# -----------------------------------------------------------------------------
# python prepare_data.py emoji: pictures with names, of nothing but a font

def emoji_command():
    """
    data/emoji: every emoji of one character that a colour font has (--source, or one that is installed), 72 x 72 pixels, and
    its Unicode name as the caption: U+1F40B, "whale". Each is drawn once; names that are held out never occur in training,
    though their words may. words.txt lists the words that do, for --tokenizer=data/emoji/words.txt.
    """
    path = source or next(filter(os.path.isfile, EMOJI_FONTS), '')
    if not path:
        raise ValueError('no colour emoji font is installed: install one (Debian and Ubuntu: apt install '
                         'fonts-noto-color-emoji), or name its file, --source=NotoColorEmoji.ttf')
    folder = os.path.join('data', name or 'emoji')
    os.makedirs(os.path.join(folder, 'images'), exist_ok=True)
    font, size = emoji_font(path)
    characters = [c for c in map(chr, (*range(0x203c, 0x3300), *range(0x1f000, 0x1fb00)))
                  if unicodedata.name(c, '') and not unicodedata.name(c).startswith('EMOJI MODIFIER')]
    count, words = 0, set()
    blank = draw_emoji('\U000e0fff', font, size).tobytes()  # what the font draws for what it does not have
    with Parts(folder) as parts:
        for c in tqdm(characters, unit='character'):
            image = draw_emoji(c, font, size)
            if image.tobytes() == blank or len(image.getcolors(1 << 16)) < 2:
                continue
            caption, file = unicodedata.name(c).lower(), f'images/{ord(c):x}.png'
            image.save(os.path.join(folder, file))
            held_out = int(hashlib.sha256(caption.encode()).hexdigest()[:8], 16) % 10 == 0
            parts.write('val' if held_out else 'train', {'text': IMAGE + caption, 'image_path': file,
                                                         **({'references': [caption]} if held_out else {})})
            count, words = count + 1, words if held_out else words | set(re.findall('[a-z]+', caption))
        if count < 100:
            raise ValueError(f'{path} has {count} emoji: expected a colour emoji font such as NotoColorEmoji.ttf')
    with open(os.path.join(folder, 'words.txt'), 'w', encoding='utf-8') as f:
        f.write('\n'.join(sorted(words)) + '\n')


EMOJI_FONTS = ('/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf', '/usr/share/fonts/noto/NotoColorEmoji.ttf',
               '/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf',
               '/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf',
               os.path.expanduser('~/.local/share/fonts/NotoColorEmoji.ttf'), '/System/Library/Fonts/Apple Color Emoji.ttc',
               'C:/Windows/Fonts/seguiemj.ttf')


def emoji_font(path):
    """The font at the one size in which its pictures come (Noto's is 109 pixels, Apple's 160), and that size."""
    for size in (109, 160, 136, 128, 96, 72, 64):
        try:
            return ImageFont.truetype(path, size), size
        except OSError:
            continue
    raise ValueError(f'{path} is not a font that Pillow can open')


def draw_emoji(character, font, size, side=72):
    """A character in colour in the middle of a white square."""
    image = Image.new('RGB', (2 * size, 2 * size), 'white')
    ImageDraw.Draw(image).text((size, size), character, font=font, embedded_color=True, anchor='mm', fill='white')
    box = ImageChops.difference(image, Image.new('RGB', image.size, 'white')).getbbox()
    return ImageOps.pad(image.crop(box) if box else image, (side, side), Image.Resampling.LANCZOS, color='white')


# -----------------------------------------------------------------------------

COMMANDS = {'text': text_command, 'shapes': shapes_command, 'coco_captions': coco_command, 'cc3m': cc3m_command,
            'emoji': emoji_command, 'features': features_command, 'show': show_command,
            **{command: functools.partial(llava_command, command) for command in LLAVA}}


def main():
    argv = sys.argv[1:]
    if argv and argv[0] in COMMANDS:
        configure(globals(), argv[1:])
        COMMANDS[argv[0]]()
    elif '--help' in argv or '-h' in argv:
        configure(globals(), ['--help'])
    else:
        raise ValueError(f'expected a command ({", ".join(COMMANDS)}): python prepare_data.py text --source=...')


if __name__ == '__main__':
    run(main)
