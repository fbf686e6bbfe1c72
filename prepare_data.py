"""
Raw data -> examples -> token batches: the way of a batch up to the model, read from top to bottom.

    open_rows      a dataset's name or path -> its rows, {"text": ...} or {"messages": ..., "image_path": ...}
    Examples       row -> example; plain text becomes pictures here, by one of the TASKS read, continue, text
    load_image     any image file -> RGB
    get_tokenizer  bytes, gpt2 or nanoGPT's meta.pkl, as a tiktoken.Encoding with the special tokens of a conversation
    tokenize       example -> ids, targets, images; each <image> widened to as many ids as the encoder gives tokens
    collate        examples -> one padded batch
    Batches        the micro-batches of a run, a pure function of (seed, index): resuming needs no loader state

The one example format is a JSON line, images as files beside it (or PIL images under "images", drawn on the fly):

    {"messages": [{"role": "user", "content": "<image>\\nWhat is this?"}, {"role": "assistant", "content": "A cat."}],
     "image_path": "images/1.jpg"}
    {"text": "A paragraph. <image> Another paragraph. <image>", "image_paths": ["images/2.jpg", "images/3.png"]}

Text to learn from, from the hub or a local file or folder, the first N documents written to data/NAME/{train,val}.jsonl:

    $ python prepare_data.py text --source=HuggingFaceFW/fineweb --subset=sample-10BT --max_examples=100000 --name=fineweb
"""

import bisect
import hashlib
import json
import os
import pickle
import random
import re
import sys

import tiktoken
import torch
from PIL import Image, ImageOps

import render
import vision
from configurator import configure, run

IMAGE, USER, ASSISTANT, END = '<image>', '<|user|>', '<|assistant|>', '<|endoftext|>'

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
    folder = dataset if os.path.isdir(dataset) else os.path.join('data', dataset)
    path = os.path.join(folder, f'{split}.jsonl')
    if os.path.isfile(path):
        return JsonLines(path)
    if not os.path.exists(dataset):
        raise ValueError(f'no dataset {dataset!r}: expected pydoc, a file, a folder, or {path}, which '
                         f'"python prepare_data.py text --source=HUB_NAME_OR_FILE --name={dataset}" writes')
    files = [dataset] if os.path.isfile(dataset) else sorted(
        os.path.join(root, name) for root, _, names in os.walk(dataset) for name in names)
    rows = Chain([read_file(f) for f in files if f.endswith(('.txt', '.jsonl', '.parquet'))])
    held_out = range(VAL_EVERY - 1, len(rows), VAL_EVERY)
    chosen = held_out if split == 'val' else [i for i in range(len(rows)) if i % VAL_EVERY != VAL_EVERY - 1]
    if not chosen:
        raise ValueError(f'{dataset} has {len(rows)} rows with text in .txt, .jsonl or .parquet files; to hold out one '
                         f'of {VAL_EVERY} takes at least {VAL_EVERY}')
    return Chain([rows], chosen)


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
    extra = render.augmentation(rng, config.augment)
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
    return {'messages': [{'role': 'user', 'content': IMAGE}, {'role': 'assistant', 'content': span}], 'images': [image]}


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

    def __getitem__(self, i):
        epoch, place = divmod(i, len(self.rows))
        if self.shuffle and self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = epoch, torch.randperm(len(self.rows), generator=generator)
        row = self.rows[int(self.order[1][place]) if self.shuffle else place]
        if 'messages' in row or row.get('images'):
            return row  # an example already
        rng = random.Random(f'{self.seed} {i}')
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
    A path or PIL image -> RGB PIL image, upright: EXIF rotation is applied, transparency laid over white, 16 bits
    scaled to 8. Raises ValueError, naming the file, for what is missing, empty, cut off, or no image.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
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


# -----------------------------------------------------------------------------
# tokenizers

def get_tokenizer(name):
    """
    A tiktoken.Encoding with the special tokens <image>, <|user|>, <|assistant|> and <|endoftext|>, by name:

        bytes         one token a byte: 256 and the special ones; nothing to download, no text it cannot take
        gpt2          GPT-2's BPE, whose <|endoftext|> (50256) it keeps; tiktoken downloads it once
        .../meta.pkl  the characters of a nanoGPT dataset; other characters are refused

    Raises ValueError for another name, or when the BPE cannot be downloaded.
    """
    special = {}
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
    else:
        raise ValueError(f'tokenizer must be bytes, gpt2 or the path of a meta.pkl, got {name!r}')
    for token in (IMAGE, USER, ASSISTANT, END):
        special.setdefault(token, len(ranks) + len(special))
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


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
    """Ids -> text, up to the end token. Bytes that are no UTF-8 become U+FFFD."""
    end = tokenizer.encode_single_token(END)
    ids = list(ids)
    return tokenizer.decode(ids[:ids.index(end)] if end in ids else ids)


def drawable_ids(tokenizer, vocab_size):
    """bool (vocab_size,): the ids that generation may draw: text and the end token, nothing the tokenizer can't decode."""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[list(tokenizer._mergeable_ranks.values())] = True
    allowed[tokenizer.encode_single_token(END)] = True
    return allowed


# -----------------------------------------------------------------------------
# example -> ids, targets, images

def segments(example, loss_on, prompt_only=False):
    """
    An example as a list of (text or special token, is_special, learn). <image> is special only as often as there are
    images. With prompt_only the last answer is left out and its <|assistant|> stands at the end, ready to be continued.
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
    messages, system = list(example['messages']), ''
    if messages and messages[0]['role'] == 'system':
        system = messages.pop(0)['content'] + '\n\n'
    if prompt_only and messages and messages[-1]['role'] == 'assistant':
        messages.pop()
    for message in messages:
        role, content = message['role'], message['content']
        if role not in ('user', 'assistant'):
            raise ValueError(f'a message is by "user" or "assistant" (and a first one by "system"), got {role!r}')
        learn = loss_on == 'all' or role == 'assistant'
        out.append((USER if role == 'user' else ASSISTANT, True, loss_on == 'all'))
        content, system = system + content, ''
        parts = content.split(IMAGE) if has_images else [content]
        for i, part in enumerate(parts):
            out += [(IMAGE, True, False)] if i else []
            out.append((part, False, learn))
        out += [(END, True, learn)] if role == 'assistant' else []
    return out + [(ASSISTANT, True, False)] if prompt_only else out


def tokenize(example, tokenizer, config, loss_on='assistant', prompt_only=False):
    """
    An example -> {'idx': [int], 'targets': [int], 'images': [(patches, grid)]}; config is the model's GPTConfig.

    targets[t] is the token behind idx[t], or -1 where nothing is to be learnt: for the 'assistant' it is the answers
    and their end, for 'all' every text token. Image tokens never are targets, but the last of them predicts the text
    behind it. Text that takes more than block_size positions is cut; an image
    is not, and neither is a prompt. Raises ValueError if images and <image> places differ, or something does not fit.
    """
    sources = example.get('images') or []
    if sources and not config.vision_encoder:
        raise ValueError('the example has an image, but the model has no vision_encoder')
    images = [vision.preprocess(load_image(source), config) for source in sources]
    ids, learn, left, positions = [], [], list(images), 0
    for text, is_special, learnt in segments(example, loss_on, prompt_only):
        if text == IMAGE and is_special:
            if not left:
                raise ValueError(f'more <image> places than images ({len(images)})')
            new = [config.image_token] * vision.num_tokens(left.pop(0)[1], config)
            positions += 1
        else:
            new = [tokenizer.encode_single_token(text)] if is_special else encode(tokenizer, text)
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
    places, tokens = int((idx == config.image_token).sum()), sum(vision.num_tokens(grid, config) for _, grid in images)
    if config.vision_encoder and places != tokens:
        raise ValueError(f'the batch has {places} <image> places, but its images make {tokens} tokens')
    return {'idx': idx, 'targets': targets, 'lengths': lengths,
            'images': vision.collate(images, config) if config.vision_encoder else None}


class Batches(torch.utils.data.Dataset):
    """
    Micro-batch i holds the examples i * batch_size to (i + 1) * batch_size - 1, whoever computes it and whenever.
    What a user must hear (a missing image, say) comes back as {'error': sentence}: raised in a loader's worker it would
    arrive wrapped in that worker's traceback.
    """

    def __init__(self, examples, tokenizer, config, batch_size, loss_on):
        self.examples, self.tokenizer, self.config = examples, tokenizer, config
        self.batch_size, self.loss_on = batch_size, loss_on

    def __getitem__(self, i):
        try:
            return collate([tokenize(self.examples[j], self.tokenizer, self.config, self.loss_on)
                            for j in range(i * self.batch_size, (i + 1) * self.batch_size)], self.config)
        except (ValueError, OSError) as error:
            return {'error': str(error)}


# -----------------------------------------------------------------------------
# python prepare_data.py text

source = ''           # a text dataset of the Hugging Face hub, or a .txt/.jsonl/.parquet file or folder
subset = ''           # its configuration, such as sample-10BT
max_examples = 10000  # stop after as many documents
name = ''             # written to data/NAME; '' takes the source's last part
val_every = 100       # every 100th document is held out


def text_command():
    """Streams the first max_examples documents of a text dataset to data/NAME/{train,val}.jsonl."""
    if not source:
        raise ValueError('expected --source=NAME_ON_THE_HUB or --source=FILE_OR_FOLDER')
    from tqdm import tqdm
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
    os.makedirs(folder, exist_ok=True)
    paths = {split: os.path.join(folder, f'{split}.jsonl') for split in ('train', 'val')}
    count = 0
    files = {split: open(path + '.part', 'w', encoding='utf-8') for split, path in paths.items()}
    bar = tqdm(total=max_examples, unit='doc')
    for row in rows:
        if count == max_examples:
            break
        text = row.get('text')
        if isinstance(text, str) and text.strip():
            split = 'val' if count % val_every == val_every - 1 else 'train'
            files[split].write(json.dumps({'text': text}, ensure_ascii=False) + '\n')
            count += 1
            bar.update()
    bar.close()
    for split, f in files.items():
        f.close()
        os.replace(paths[split] + '.part', paths[split])  # a broken download never looks like a dataset
    print(f'{folder}: {count - count // val_every} documents to train on, {count // val_every} held out', file=sys.stderr)


COMMANDS = {'text': text_command}


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
