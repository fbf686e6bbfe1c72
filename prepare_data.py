r"""
Raw data -> examples -> token batches: everything that happens to a batch before the model, read from top to bottom.
An example is a JSON line, with image files next to it (drawn text has PIL images in their place):

    {"messages": [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}],
     "images": ["images/1.jpg"]}
    {"text": "A paragraph. <image> Another paragraph. <image>", "images": ["images/2.jpg", "images/3.png"]}
    {"text": "<image>A cat on a mat.", "images": ["photos.zip/4.jpg"], "references": ["A cat on a mat.", "A mat with a cat."]}

"references" are all the correct captions of a held-out image. As a script this file writes datasets to data/NAME/
{train,val}.jsonl; `prepare_data.py --help` lists the commands, `prepare_data.py COMMAND --help` their knobs:

    $ python prepare_data.py llava_instruct --source=MINE.json --image_dir=FOLDER_OR_ZIP --name=mine
    $ python prepare_data.py show --dataset=mine --index=3                       # an example, and what of it is in the loss
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pickle
import random
import re
import struct
import sys
import tarfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import jinja2.sandbox
import numpy as np
import tiktoken
import tokenizers
import torch
from torch.utils.data import ConcatDataset
from tqdm import tqdm

import render
import vision
from configurator import run, run_command
from render import IMAGE, TASKS, parse_tasks
from vision import augment_image, hash64, image_error, load_image, map_index, map_members, read_bytes

USER, ASSISTANT, END = '<|user|>', '<|assistant|>', '<|endoftext|>'
IMAGE_MARKS = ('<|vision_start|>', '<|vision_end|>')  # Qwen's names: its tokenizers keep their ids

@contextlib.contextmanager
def explain_errors(problem, advice):
    """Turns any exception (parsers and hub clients have many of their own) into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:
        detail = f'{type(error).__name__}: {error}'.partition('\n')[0]
        raise ValueError(f'{problem} ({detail}): {advice}') from error

# -----------------------------------------------------------------------------
# rows

VAL_EVERY = 20  # one row of so many is held out where a dataset comes in one piece

def open_rows(dataset, split):
    """
    The examples of one side, 'train' or 'val', of a dataset: pydoc (Python's language reference), a .txt, .jsonl or .parquet
    file or a folder of them, or a folder with train.jsonl and val.jsonl, as data/NAME. ValueError if there is none.
    """
    if dataset == 'pydoc':
        return pydoc_rows(split)
    files = {side: dataset_folder(dataset) / f'{side}.jsonl' for side in ('train', 'val')}
    if any(map(Path.is_file, files.values())):
        return FileRows(files[split])
    if not os.path.exists(dataset):
        command = dataset if dataset in COMMANDS else f'text --source=HUB_NAME_OR_FILE --name={dataset}'
        command += ' --image_dir=FOLDER_OR_ZIP' if dataset in LLAVA else ''
        raise ValueError(f'no dataset {dataset!r}: expected pydoc, a file, a folder, or {files[split]}, which '
                         f'"python prepare_data.py {command}" writes')
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
    """A row of TRL, LLaMA-Factory or LLaVA -> an example, its images' paths joined to `folder`. ValueError if it is none."""
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
        """bool (vocab_size,): the ids that may be generated: all but <image>, its marks, <|user|> and <|assistant|>."""
        prompt_only = (IMAGE, *self.image_marks, USER, ASSISTANT)
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

def get_tokenizer(name, system_prompt='auto', image_marks=False):
    """A Tokenizer by name, with image_marks also of IMAGE_MARKS. ValueError for an unknown name or damaged files."""
    marks = IMAGE_MARKS if image_marks else ()
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
        return read_hugging_face(name, system_prompt, marks)
    else:
        raise ValueError('tokenizer must be bytes, gpt2, the path of a meta.pkl, words.txt or tokenizer.json, or '
                         f'OWNER/NAME on the hub, got {name!r}')
    for token in (IMAGE, USER, ASSISTANT, END, *marks):
        special.setdefault(token, len(ranks) + len(special))
    with_mark = {**special, MARK: len(ranks) + len(special)}
    backend = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=with_mark)
    text_ids = list(ranks.values())
    names = {'eos_token': END}
    return Tokenizer(name, backend, special, text_ids, system_prompt, names, characters=characters, image_marks=marks)

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

def read_hugging_face(name, system_prompt, marks):
    """The HuggingFaceTokenizer of a tokenizer.json, of a folder with it or of OWNER/NAME on the hub."""
    folder = Path(name)
    file_names = ['tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja']
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
    special += [names['eos_token'], *marks]  # new ids come last
    backend.add_special_tokens(special)
    special = {token: backend.token_to_id(token) for token in special}
    text_ids = list({*backend.get_vocab().values()} - {*special.values()})
    backend.add_tokens([tokenizers.AddedToken(MARK, normalized=False)])
    return HuggingFaceTokenizer(name, backend, special, text_ids, system_prompt, names, template, files, image_marks=marks)

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
        is_answer = is_answer and (not is_special or piece == IMAGE)
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

def conversation(example, tokenizer, prompt_only):
    """[(text, is_special, is_answer)] of a conversation. White space at the ends of a message is dropped."""
    messages = list(example['messages'])
    if tokenizer.system_prompt != 'auto' and messages[0]['role'] != 'system':
        messages.insert(0, {'role': 'system', 'content': tokenizer.system_prompt})
    if prompt_only and messages[-1]['role'] == 'assistant':
        messages.pop()
    turns, texts = [], []
    for message in messages:
        content = message['content'].strip()
        pieces = content.split(IMAGE) if example.get('images') else [content]
        for i, piece in enumerate(pieces):
            if piece or len(pieces) == 1:
                pieces[i] = SLOT.format(len(texts))
                texts.append(piece)
        turns.append((message['role'], IMAGE.join(pieces)))
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
        chat = conversation(example, tokenizer, prompt_only)
        return [(text, is_special, is_answer or loss_on == 'all') for text, is_special, is_answer in chat]
    image = [(IMAGE, True, False)]
    if 'filling' in example:  # '' has no id: the filling is encoded apart, so targets do not depend on it
        image = [('', True, False), (example['filling'], False, False), ('', True, False)]
    has_images = example.get('images') or 'filling' in example
    texts = example['text'].split(IMAGE) if has_images else [example['text']]
    out = [(tokenizer.begin, True, False)]
    for i, text in enumerate(texts):
        out += image if i else []
        out.append((text, False, loss_on != 'postfix' or i == len(texts) - 1))
    return out if prompt_only else [*out, (tokenizer.end, True, True)]

class TooLong(ValueError):
    """An example needs more positions than block_size, and cannot be cut."""

def tokenize(example, tokenizer, config, loss_on='assistant', prompt_only=False, cache=None):
    """
    An example -> {'idx': [int], 'targets': [int], 'images': [(patches, grid)]}, or (features, grid) of a FeatureCache.

    targets[t] is the token after idx[t], or -1 where it is not in the loss: 'assistant' has the answers and their end in the
    loss, 'all' every text token. Image tokens and their marks are no targets; the last one predicts the text after it. Text
    beyond block_size positions is cut; an image, which takes one, is not. ValueError if something does not fit.
    """
    sources = example.get('images') or []
    if sources and not config.vision_encoder:
        raise ValueError('the example has an image, but the model has no vision_encoder')
    images = [cache[source] if cache and isinstance(source, str) else vision.preprocess(load_image(source), config)
              for source in sources]
    pieces = segments(example, tokenizer, loss_on, prompt_only)
    if config.image_marks:  # not in the loss
        begin, end = ((mark, True, False) for mark in tokenizer.image_marks)
        pieces = [part for piece in pieces for part in ([begin, piece, end] if piece[:2] == (IMAGE, True) else [piece])]
    ids, in_loss = tokenizer.encode_segments(pieces, example.get('char_level'))
    positions = [position for position, token in enumerate(ids) if token == tokenizer.image_id]
    if len(positions) != len(images):
        raise ValueError(f'the example has {len(images)} images, but its text has {len(positions)} <image>: write '
                         'one for each')
    needed = len(ids) if prompt_only else 1 + max(positions, default=-1) + config.image_marks
    if needed > config.block_size:
        subject = 'the prompt takes' if prompt_only else 'text and images up to the last image take'
        raise TooLong(f'{subject} {needed} positions, but block_size is {config.block_size}: enlarge it')
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

def collate(examples, config, n_images=0):
    """Tokenized examples -> a batch: idx, targets int64 (B, T), padded on the right with -1; places (n,), as in
    `target_places`; lengths int64 (B,); images, the (patches, grid) of all of them, row by row, or None without vision; of
    packed rows also docs (B, T), as in `pack`. n_images as in vision.collate. An {"error": sentence} among the examples is
    returned in place of a batch. ValueError if ids and images disagree.
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
        n_tokens = sum(vision.num_tokens(image, config) for image in images)
        if n_ids != n_tokens:
            raise ValueError(f'the batch has {n_ids} <image> ids, but its images make {n_tokens} tokens')
        batch['images'] = vision.collate(images, config, n_images)
    return batch

# -----------------------------------------------------------------------------
# packing: several documents in a row, so that few places are padding

WAITING = 128  # so many documents wait for a row with room for them before a batch is finished

def pack(documents, config, batch_size, max_images, left_out=0, static_images=False):
    """Yields batches of `batch_size` rows of block_size tokens, filled with documents in their order: each goes to the first
    row with room for it (first fit), or waits for the next batch. `docs` has the number of each token's document in its row,
    -1 for padding. A row has at most max_images images; static_images pads those of every batch to one shape.

    documents: an endless iterator of (index, tokenized example or {"error": ...}). One that is longer than a row is cut in
    the text after its last image; if that is impossible, or it has too many images, it is left out and counted. `packing` of
    a batch is what a resumed run needs: {'waiting': indices of the documents that wait, which its iterator has to begin
    with, 'last': that of the last document taken from the iterator, 'left_out': how many so far}. Raises ValueError for a
    document's error, and if none of 1000 documents fits.
    """
    n_images = batch_size * max_images if static_images else 0
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
        yield {**collate(rows, config, n_images), 'packing': state}

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

def store_features(
    config: vision.VisionConfig,
    dataset='',
    batch_size=32,
    device='',  # '' takes CUDA or MPS if there is one
):
    """Stores a frozen encoder's features of a dataset's images in data/NAME/features-KEY/; continues if interrupted."""
    if not vision.is_pretrained(config):
        raise ValueError(f'expected --vision_encoder=NAME/TAG of a frozen encoder, got {config.vision_encoder!r}')
    rows = itertools.chain(open_rows(dataset, 'train'), open_rows(dataset, 'val'))
    paths = list(dict.fromkeys(path for row in rows for path in row.get('images', ())))
    if not paths:
        raise ValueError(f'{dataset} has no image files: there is nothing to store')
    config = vision.complete_config(config)
    device = device or torch.accelerator.current_accelerator(check_available=True) or 'cpu'
    model = vision.Vision(config).to(device).eval().requires_grad_(False)
    vision.FeatureCache(dataset_folder(dataset), config, model.encoder.fingerprint).fill(paths, model, batch_size)

# -----------------------------------------------------------------------------
# commands that write a dataset

def write_dataset(name, rows, convert, source, max_examples, val_every, *work):
    """Writes convert(row) of at most max_examples rows to data/NAME/{train,val}.jsonl. Rows for which convert, in threads,
    raises ValueError, or whose images cannot be loaded, are listed in skipped.jsonl, and so are the "failed_images" of an
    example, [(url, reason)]. Called again with the same arguments, it continues. Raises ValueError if a side is empty.
    """
    folder = Path('data', name)
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / f'progress-{hash64(json.dumps([source, max_examples, val_every, *work])):x}'
    rows = enumerate(itertools.islice(rows, max_examples or None))
    to_lines = functools.partial(convert_row, convert=convert, val_every=val_every)
    try:
        with open(progress, 'a+b') as f, ThreadPoolExecutor(8) as pool:
            f.seek(0)
            done = [len(line) for line in f if line.endswith(b'\n')]
            f.truncate(sum(done))
            if done:
                print(f'resuming after {len(done)} rows', file=sys.stderr)
            rows = itertools.islice(rows, len(done), None)
            for chunk in tqdm(iter(lambda: list(itertools.islice(rows, 1000)), []), unit='k rows'):
                for lines in pool.map(to_lines, chunk):
                    f.write(json.dumps(lines).encode() + b'\n')
        counts, failed_images = Counter(), Counter()
        sides = ('train', 'val', 'skipped')
        for side in sides:
            with open(progress, encoding='utf-8') as f, open(folder / f'{side}.jsonl.part', 'w', encoding='utf-8') as part:
                for row_side, row in itertools.chain.from_iterable(map(json.loads, f)):
                    if row_side == side:
                        print(json.dumps(row, ensure_ascii=False), file=part)
                        counter = failed_images if 'failed_image' in row else counts
                        counter[row.get('reason', side)] += 1
        for reason in sorted(set(counts) - set(sides)):
            print(f'skipped: {counts[reason]} rows, {reason}', file=sys.stderr)
        for reason in sorted(failed_images):
            print(f'left out: {failed_images[reason]} images, {reason}', file=sys.stderr)
        if not counts['train'] or not counts['val']:
            raise ValueError(f'of {counts.total()} rows in {source}, {counts["train"]} are left to train on and '
                             f'{counts["val"]} to hold out: {folder}/skipped.jsonl.part lists why, or --val_every is too large')
    except ValueError:  # what has to be corrected may concern every row
        progress.unlink()
        raise
    for side in sides:
        (folder / f'{side}.jsonl.part').replace(folder / f'{side}.jsonl')
    for path in folder.glob('progress-*'):
        path.unlink()
    print(f'{folder}: {counts["train"]} examples to train on, {counts["val"]} held out', file=sys.stderr)

def convert_row(numbered_row, convert, val_every):
    """[(file, line)] of a row. Several captions of an image, "references", become an example each to train on."""
    number, row = numbered_row
    try:
        example = convert(row)
        images = filter(os.path.isabs, example.get('images', ()))  # the others are convert's own
        reason = next(filter(None, map(image_error, images)), '')
        if reason:
            raise ValueError(reason)
    except ValueError as error:
        return [('skipped', {'row': number, 'id': row.get('id'), 'image': row.get('image'), 'reason': str(error)})]
    split = row.get('split') or ('val' if is_held_out(holdout_key(row), val_every) else 'train')
    failed = [('skipped', {'row': number, 'failed_image': url, 'reason': reason})
              for url, reason in example.pop('failed_images', [])]
    captions = example.pop('references', []) if split == 'train' else []
    return [(split, {**example, 'text': IMAGE + caption}) for caption in captions] or [(split, example), *failed]

def download(repository, file):
    """The local path of a file of a dataset on the hub, which is downloaded once."""
    with explain_errors(f'{file} of {repository} cannot be downloaded', 'connect, or use --source and --image_dir'):
        return huggingface_hub.hf_hub_download(repository, file, repo_type='dataset')

def find_images(image_dir):
    """The absolute path of a folder or archive of images. An archive is indexed here, before threads need it."""
    path = os.path.abspath(image_dir)
    if not os.path.isdir(path):
        with explain_errors(f'--image_dir={image_dir} does not exist, or is no archive', 'expected a folder, .zip or .tar'):
            map_members(path)
    return path

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
    if os.path.exists(source):
        rows = (example for path in list_files(source) for _, _, example in scan_file(path))
    else:
        import datasets
        with explain_errors(f'{source} is neither a file here nor a dataset that the hub gives us', 'check the name'):
            rows = datasets.load_dataset(source, subset or None, split='train', streaming=True)
    rows = (row for row in rows if isinstance(row.get('text'), str) and row['text'].strip())
    convert = lambda row: {'text': row['text']}
    write_dataset(name or Path(source).stem, rows, convert, source, max_examples, val_every, subset)

def prepare_shapes(
    name='shapes',       # the dataset is written to data/NAME
    max_examples=40000,  # how many conversations
):
    """Draws images of colored shapes, with conversations about them: a dataset to learn on when nothing can be downloaded.

    No held-out image is in the training set. One example of twenty has no image, three have two. words.txt lists all words.
    """
    folder = Path('data', name)
    (folder / 'images').mkdir(parents=True, exist_ok=True)

    def convert(row):
        held_out = row['split'] == 'val'

        def new_image(rng, count):
            while True:
                shapes = render.random_shapes(rng, count)
                if is_held_out(str(sorted(shapes)), VAL_EVERY) == held_out:
                    return shapes

        images, turns = render.shapes_example(random.Random(f'shapes {row["id"]}'), new_image, held_out)
        paths = [f'images/{row["id"]:06d}{letter}.png' for letter in 'ab'[:len(images)]]
        for shapes, path in zip(images, paths):
            render.draw_shapes(shapes).save(folder / path)
        messages = [{'role': role, 'content': text} for turn in turns for role, text in zip(('user', 'assistant'), turn)]
        example = {'messages': messages, 'images': paths}
        place_images(example, len(paths))
        return example

    rows = ({'id': i, 'split': 'val' if i * 40 < max_examples else 'train'} for i in range(max_examples))
    write_dataset(name, rows, convert, 'shapes', max_examples, VAL_EVERY)
    rows = itertools.chain(open_rows(folder, 'train'), open_rows(folder, 'val'))
    contents = ' '.join(message['content'] for row in rows for message in row['messages'])
    (folder / 'words.txt').write_text('\n'.join(sorted(set(re.findall('[A-Za-z]+', contents)))) + '\n')

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
    """Writes conversations in LLaVA's format, with their images, to data/NAME/{train,val}.jsonl."""
    path = source or download(repository, f'{subset}.json')
    if not image_dir and (source or not zipped_images):
        raise ValueError('expected --image_dir=FOLDER_OR_ZIP: this data has no images of its own, only their names, like '
                         'those of COCO: http://images.cocodataset.org/zips/train2017.zip')
    images = find_images(image_dir or download(repository, zipped_images))
    convert = functools.partial(llava_example, image_dir=images, captions_only=captions_only)
    write_dataset(name or Path(source).stem or command, json_rows(path), convert, path, max_examples, val_every,
                  os.path.getsize(path), images, captions_only)

def json_rows(path):
    """The objects of a JSON array or .jsonl, one after another: LLaVA's gigabyte is never in memory as a whole."""
    opening, closing = ('', '') if path.endswith('.jsonl') else ('[', ']')
    text, count = '', 0
    with open(path, encoding='utf-8') as f:
        if f.read(len(opening)) != opening:
            raise ValueError(f'{path} is not a JSON array of rows, as LLaVA publishes them')
        while True:
            text = text.lstrip(' \n\r\t,')
            try:
                row, end = json.JSONDecoder().raw_decode(text)
            except ValueError as error:
                more = f.read(1 << 20)
                if not more and text.rstrip() == closing:
                    return
                if not more:
                    raise ValueError(f'{path} is broken or cut off at row {count}: {error}') from None
                text += more
                continue
            if not isinstance(row, dict):
                raise ValueError(f'{path}, row {count}: expected an object, got {str(row)[:60]}')
            yield row
            text = text[end:]
            count += 1

def llava_example(row, image_dir, captions_only):
    """A row of LLaVA's -> example. Raises ValueError with the reason why it is skipped."""
    try:
        turns = [to_message(turn) for turn in row['conversations']]
    except (KeyError, TypeError, ValueError):
        raise ValueError('no conversation in the format of LLaVA') from None
    roles = ''.join(turn['role'][0] for turn in turns)
    # a system message, then questions and answers by turns; left out: a first answer, a last question
    match = re.fullmatch('(s?)a*((?:ua)+)u*', roles)
    if not match:
        raise ValueError('no questions and answers by turns')
    turns = turns[slice(*match.span(1))] + turns[slice(*match.span(2))]
    if not all(turn['content'].strip() for turn in turns if turn['role'] != 'system'):
        raise ValueError('an empty turn')
    names = row.get('image') or []
    images = [os.path.join(image_dir, name) for name in ([names] if isinstance(names, str) else names)]
    example = {'messages': turns, 'images': images}
    place_images(example, len(images))
    return {'text': IMAGE + turns[-1]['content'].strip(), 'images': images} if captions_only and images else example

LLAVA = {
    'llava_instruct': {'repository': 'liuhaotian/LLaVA-Instruct-150K', 'subset': 'llava_instruct_150k'},
    'llava_pretrain': {'repository': 'liuhaotian/LLaVA-Pretrain', 'subset': 'blip_laion_cc_sbu_558k',
                       'zipped_images': 'images.zip', 'captions_only': True},
    'llava_cc3m': {'repository': 'liuhaotian/LLaVA-CC3M-Pretrain-595K', 'subset': 'chat',
                   'zipped_images': 'images.zip', 'captions_only': True},
    'sharegpt4v': {'repository': 'Lin-Chen/ShareGPT4V', 'subset': 'sharegpt4v_instruct_gpt4-vision_cap100k'},
}

def to_caption_example(row):
    """A row {'captions': [...], 'path': image} -> example. Raises ValueError without a caption."""
    captions = [' '.join(caption.split()) for caption in row['captions'] if isinstance(caption, str) and caption.strip()]
    if not captions:
        raise ValueError('it has no caption')
    return {'text': IMAGE + captions[0], 'images': [row['path']], 'references': captions}

def prepare_coco(
    source='',             # the folder with captions_train2017.json and captions_val2017.json, or one such file
    image_dir='',          # the folder with train2017 and val2017, unpacked or as .zip, or the images of the one file
    name='coco_captions',  # the dataset is written to data/NAME
    max_examples=0,        # stop after as many images; 0: all
    val_every=100,         # one image of so many is held out, of one file
):
    """Writes COCO's captions, five of an image, to data/NAME/{train,val}.jsonl. val2017 is held out."""
    if not source or not image_dir:
        raise ValueError('expected --source=FOLDER with captions_train2017.json and captions_val2017.json, and '
                         '--image_dir=FOLDER with train2017.zip and val2017.zip of http://images.cocodataset.org')
    files = [('', source, image_dir)]
    if os.path.isdir(source):
        files = [(split, f'{source}/captions_{split}2017.json', f'{image_dir}/{split}2017') for split in ('train', 'val')]
    rows = []
    for split, path, images in files:
        images = find_images(images if os.path.exists(images) else f'{images}.zip')
        with explain_errors(f'{path} does not exist, or is not a captions file as COCO publishes them', 'unpack it anew'):
            file = json.loads(Path(path).read_bytes())
            captions = defaultdict(list)
            for annotation in file['annotations']:
                captions[annotation['image_id']].append(annotation['caption'])
            names = {image['id']: image['file_name'] for image in file['images'] if image['id'] in captions}
        rows += [{'image': image, 'path': f'{images}/{image}', 'captions': captions[i], 'split': split}
                 for i, image in names.items()]
    write_dataset(name, rows, to_caption_example, source, max_examples, val_every, image_dir)

def prepare_cc3m(
    source='',       # a folder or file as above, or a repository of the hub; '' is pixparse/cc3m-wds
    name='',         # the dataset is written to data/NAME; '' takes the last part of the source, or cc3m
    max_examples=0,  # stop after as many images; 0: all
    val_every=100,   # one image of so many is held out
):
    """Writes Conceptual Captions, or any images that img2dataset has downloaded, to data/NAME/{train,val}.jsonl.

    --source is a .tar in the WebDataset format, a folder or a repository of the hub (pixparse/cc12m-wds) with such, or what
    img2dataset writes as files: 00000/000000000.jpg with .txt next to it. Images stay where they are, those in a .tar too.
    """
    repository = source or 'pixparse/cc3m-wds'
    roots = list_files(repository, ('.tar', '.tar.gz', '.tgz'))
    if os.path.isdir(repository):
        roots = roots or [repository]
    if not roots and repository.count('/') != 1:
        raise ValueError(f'{repository} is neither a folder, a .tar, nor OWNER/NAME on the hub')
    if not roots:
        with explain_errors(f'{repository} cannot be listed', 'connect, or use --source=FOLDER with its .tar files'):
            files = sorted(huggingface_hub.list_repo_files(repository, repo_type='dataset'))
        roots = (download(repository, file) for file in files if file.endswith('.tar'))
    rows = (row for root in roots for row in sample_rows(root))
    write_dataset(name or Path(source).stem or 'cc3m', rows, to_caption_example, repository, max_examples, val_every)

def sample_rows(root):
    """The images with captions in a .tar or folder: the files of a sample share their name up to the first dot."""
    endings = ('.jpg', '.jpeg', '.png', '.webp')
    if os.path.isdir(root):
        names = [str(path.relative_to(root)) for path in list_files(root, (*endings, '.txt'))]
    else:
        map_members(root)  # here, in one thread; ValueError if the file is broken
        with tarfile.open(root) as tar:
            names = [member.name for member in tar if member.isfile()]
    for _, sample in itertools.groupby(names, key=lambda name: re.match(r'(.*/)?[^/.]*', name)[0]):
        files = {os.path.splitext(name)[1].lower(): name for name in sample}
        image = next((files[ending] for ending in endings if ending in files), '')
        captions = []
        if '.txt' in files:
            captions.append(read_bytes(f'{root}/{files[".txt"]}').decode(errors='replace'))
        if image:
            yield {'image': f'{Path(root).name}/{image}', 'captions': captions, 'path': os.path.abspath(f'{root}/{image}')}

def prepare_obelics(
    source='',           # a .parquet or .jsonl file as on the hub, or a folder of them; '' streams HuggingFaceM4/OBELICS
    image_dir='',        # a folder or archive of images fetched before; '' fetches them to data/NAME/images
    name='obelics',      # the dataset is written to data/NAME
    max_examples=10000,  # stop after as many documents; 0: all
    val_every=100,       # one document of so many is held out
):
    """Writes OBELICS, documents of the web with images between their texts, to data/NAME/{train,val}.jsonl.

    Images that cannot be had are left out of the text and listed in skipped.jsonl. --image_dir has files named as those
    in data/NAME/images: 16 hex digits of the URL's SHA-256, and the URL's own ending. Train with --packing, which leaves
    out documents that are too long.
    """
    hub = 'HuggingFaceM4/OBELICS'
    if source:
        files = list_files(source, ('.parquet', '.jsonl'))
        if not files:
            raise ValueError(f'{source} does not exist, or has no .parquet or .jsonl file: expected rows as in {hub}')
        rows = (row for path in files for row in (json_rows(str(path)) if path.suffix == '.jsonl' else open_table(path)))
    else:
        import datasets
        with explain_errors(f'{hub} cannot be opened', 'connect, or use --source=FILE_OR_FOLDER'):
            rows = datasets.load_dataset(hub, split='train', streaming=True)
    rows = ({'text': str(row.get('texts')), 'document': row} for row in rows)  # its text decides whether it is held out
    images = image_dir and find_images(image_dir)
    convert = functools.partial(obelics_example, folder=Path('data', name), image_dir=images)
    write_dataset(name, rows, convert, source or hub, max_examples, val_every, images)

def obelics_example(row, folder, image_dir):
    """A row {'document': a row of OBELICS} -> example. Raises ValueError with the reason why it is skipped."""
    urls, texts = (row['document'].get(key) for key in ('images', 'texts'))
    if not isinstance(urls, list) or not isinstance(texts, list) or len(urls) != len(texts):
        raise ValueError('images and texts are not two lists of one length')
    if any({type(url), type(text)} != {str, type(None)} for url, text in zip(urls, texts)):
        raise ValueError('a place has both an image and a text, or neither')
    parts = [text and text.replace(IMAGE, ' ').strip() for text in texts]  # the web's <image> is not ours
    if not any(parts):
        raise ValueError('it has no text')
    images, failed_images = [], []
    for i, url in enumerate(urls):
        if url is not None:
            path = os.path.join(image_dir or 'images', vision.web_name(url))
            problem = image_error(path) if image_dir else vision.fetch_image(url, folder / path)
            if problem:
                failed_images.append((url, problem))
            else:
                images.append(path)
                parts[i] = IMAGE
    return {'text': '\n\n'.join(filter(None, parts)), 'images': images, 'failed_images': failed_images}

# -----------------------------------------------------------------------------

def show_example(
    config: vision.VisionConfig,
    dataset='',
    split='train',
    index=0,              # of the row
    loss_on='assistant',
    tokenizer='bytes',
    packed=False,         # a row of block_size tokens as packing makes it, of the examples from `index` on
    out='show.png',       # the image to write
):
    """Prints an example as the model gets it, what is in the loss in green, and draws its images and tokens to show.png.

    With --packed, all examples of a packed row and the mask of its attention: who attends (rows) to whom (columns).
    """
    enc = get_tokenizer(tokenizer, image_marks=config.image_marks)
    config = dataclasses.replace(config, vision_encoder=config.vision_encoder or 'vit', image_token=enc.image_id)
    config = vision.complete_config(config)
    rows = open_rows(dataset, split)
    if not 0 <= index < len(rows):
        raise ValueError(f'{dataset} has {len(rows)} rows to {split} on, from 0 to {len(rows) - 1}; there is no {index}')
    shown = [index]
    if packed:
        documents = ((i, tokenize(rows[i % len(rows)], enc, config, loss_on)) for i in itertools.count(index))
        batch = next(pack(documents, config, batch_size=1, max_images=8))
        shown = sorted(set(range(index, batch['packing']['last'] + 1)) - set(batch['packing']['waiting']))
    sheets = []
    for i in shown:
        example = rows[i % len(rows)]
        document = tokenize(example, enc, config, loss_on)
        if packed:
            document = fit_document(document, config, max_images=8)
        if document is None:  # left out
            continue
        tokens = render.token_types(document['idx'], document['targets'], enc)
        n_positions = sum(token != enc.image_id for token in document['idx']) + len(document['images'])
        n_targets = sum(target >= 0 for target in document['targets'])
        print(f'{dataset}, row {i % len(rows)} to {split} on: {len(document["images"])} images, {len(document["idx"])} tokens '
              f'at positions 0 to {n_positions - 1}, {n_targets} of them in the loss (in green)', file=sys.stderr)
        print(render.colorize(tokens, sys.stdout.isatty() and 'NO_COLOR' not in os.environ))
        sheets.append(render.token_sheet([load_image(source) for source in example['images']], tokens))
    if packed:
        is_image = batch['idx'][0] == config.image_token
        sheets.append(render.mask_image(batch['docs'][0].numpy(), is_image.numpy()))
    render.stack(sheets, 1, render.MARGIN).save(out)
    print(f'as an image: {out}', file=sys.stderr)

COMMANDS = {
    'text': prepare_text, 'shapes': prepare_shapes, 'coco_captions': prepare_coco, 'cc3m': prepare_cc3m,
    **{command: functools.partial(prepare_llava, command, **defaults) for command, defaults in LLAVA.items()},
    'obelics': prepare_obelics, 'features': store_features, 'show': show_example,
}

if __name__ == '__main__':
    run(lambda: run_command(COMMANDS))
