r"""
Public datasets and your own files -> data/NAME/{train,val}.jsonl, in the format that dataloader.py reads.

    $ python prepare_data.py --help                                              # all commands
    $ python prepare_data.py llava_instruct --source=MINE.json --image_dir=FOLDER_OR_ZIP --name=mine
    $ python prepare_data.py show --dataset=mine --index=3                       # an example, and what of it is in the loss
"""

import bisect
import csv
import dataclasses
import functools
import gzip
import http.client
import importlib.util
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import numpy as np
import tokenizers
import torch
from PIL import Image
from tqdm import tqdm

import render
import vision
from configurator import run, run_command
from dataloader import (VAL_EVERY, FeatureCache, dataset_folder, explain_errors, fit_document, get_tokenizer,
                        hash64, holdout_key, image_error, is_held_out, list_files, load_image, map_members,
                        open_rows, open_table, pack, parse_mixture, place_images, read_bytes, scan_file,
                        to_example, to_message, tokenize)
from pages import docbank_text, read_voc, table_html
from patches import is_pretrained
from render import IMAGE

# -----------------------------------------------------------------------------
# commands that write a dataset

def write_dataset(name, rows, convert, source, max_examples, val_every, *work):
    """Writes convert(row, rng) of at most max_examples rows to data/NAME/{train,val}.jsonl. Rows for which convert, in
    threads, raises ValueError, or whose images cannot be loaded, are listed in skipped.jsonl, and so are the
    "failed_images" of an example, [(url, reason)]. Called again with the same arguments, it continues. Raises
    ValueError if a side is empty; with val_every=1 all rows are held out.
    """
    folder = Path('data', name)
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / f'progress-{hash64(json.dumps([source, max_examples, val_every, *work])):x}'
    rows = enumerate(itertools.islice(rows, max_examples or None))
    to_lines = functools.partial(convert_row, convert=convert, folder=folder, val_every=val_every)
    try:
        with open(progress, 'a+b') as f, ThreadPoolExecutor(8) as pool, tqdm(unit='row') as bar:
            f.seek(0)
            done = [len(line) for line in f if line.endswith(b'\n')]
            f.truncate(sum(done))
            if done:
                print(f'resuming after {len(done)} rows', file=sys.stderr)
            rows = itertools.islice(rows, len(done), None)
            while chunk := list(itertools.islice(rows, 200)):
                for lines in pool.map(to_lines, chunk):
                    f.write(json.dumps(lines).encode() + b'\n')
                bar.update(len(chunk))
        counts = split_lines(progress, folder)
        if not counts['val'] or not counts['train'] and val_every > 1:
            raise ValueError(f'of {counts.total()} rows in {source}, {counts["train"]} are left to train on and '
                             f'{counts["val"]} to hold out: {folder}/skipped.jsonl.part lists why, or --val_every is too large')
    except ValueError:  # what has to be corrected may concern every row
        progress.unlink()
        raise
    for side in SIDES:
        (folder / f'{side}.jsonl.part').replace(folder / f'{side}.jsonl')
    for path in folder.glob('progress-*'):
        path.unlink()
    print(f'{folder}: {counts["train"]} examples to train on, {counts["val"]} held out', file=sys.stderr)

SIDES = ('val', 'train', 'skipped')

def split_lines(progress, folder):
    """Writes the lines of each side to its file, and prints what was left out and why. Returns how many each side has."""
    counts, failed_images = Counter(), Counter()
    held_out, n_duplicates = set(), 0
    for side in SIDES:
        path = folder / f'{side}.jsonl.part'
        with open(progress, encoding='utf-8') as f, open(path, 'w', encoding='utf-8', errors='replace') as part:
            for row_side, row, image_hashes in itertools.chain.from_iterable(map(json.loads, f)):
                if row_side == side:
                    print(json.dumps(row, ensure_ascii=False), file=part)
                    counter = failed_images if 'failed_image' in row else counts
                    counter[row.get('reason', side)] += 1
                    if side == 'val':
                        held_out.update(image_hashes)
                    elif not held_out.isdisjoint(image_hashes):
                        n_duplicates += 1
    for reason in sorted(set(counts) - set(SIDES)):
        print(f'skipped: {counts[reason]} rows, {reason}', file=sys.stderr)
    for reason in sorted(failed_images):
        print(f'left out: {failed_images[reason]} images, {reason}', file=sys.stderr)
    if n_duplicates:
        print(f'note: {n_duplicates} examples to train on have an image that is held out, too, byte for byte', file=sys.stderr)
    return counts

def convert_row(numbered_row, convert, folder, val_every):
    """[(file, line, hashes of its images)] of a row. Several captions of an image, "references", become an example each to
    train on. Images that are no files yet are written to folder/images.
    """
    number, row = numbered_row
    try:
        example = convert(row, random.Random(number))
        images = example.get('images', [])
        # a relative path is one that convert has written itself
        image_hashes = [check_image(image) for image in images if not isinstance(image, str) or os.path.isabs(image)]
        if images:
            example['images'] = [image if isinstance(image, str) else save_image(image, folder) for image in images]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f'a field is missing or of another type ({error})'
        about = {key: row.get(key) for key in ('id', 'image') if isinstance(row.get(key), str | int)}
        return [('skipped', {'row': number, **about, 'reason': reason}, [])]
    key = holdout_key(row if images and isinstance(images[0], str) else example)
    split = row.get('split') or ('val' if is_held_out(key, val_every) else 'train')
    failed = [('skipped', {'row': number, 'failed_image': url, 'reason': reason}, [])
              for url, reason in example.pop('failed_images', [])]
    captions = example.pop('references', []) if split == 'train' else []
    examples = [{**example, 'text': IMAGE + caption} for caption in captions] or [example]
    return [(split, line, image_hashes) for line in examples] + failed

def check_image(image):
    """The hash of an image's file. Raises ValueError with the reason if training could not load it."""
    data = image
    if isinstance(image, str):
        try:
            data = read_bytes(image)
        except FileNotFoundError:
            raise ValueError('the image is missing') from None
        except Exception:  # for a damaged archive zlib and struct raise nearly anything
            raise ValueError('the image is broken') from None
    reason = image_error(data)
    if reason:
        raise ValueError(reason)
    return f'{hash64(data):016x}'

def save_image(data, folder):
    """Writes the bytes of an image's file to folder/images, once. Returns its path, relative to the folder."""
    ending = Image.open(io.BytesIO(data)).format.lower()
    path = Path('images', f'{hash64(data):016x}.{ending}')
    part = folder / f'{path}.{threading.get_ident()}.part'  # other threads may write the same image
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(data)
    part.replace(folder / path)
    return str(path)

def questions_and_answers(turns):
    """The messages of TRL's or LLaVA's turns: a system message, then questions and answers by turns. A first answer and a last
    question are left out. Raises ValueError if there is nothing else, or a turn is empty.
    """
    try:
        messages = [to_message(turn) for turn in turns]
    except (TypeError, ValueError):
        raise ValueError('no conversation of user and assistant') from None
    roles = ''.join(message['role'][0] for message in messages)
    match = re.fullmatch('(s?)a*((?:ua)+)u*', roles)
    if not match:
        raise ValueError('no questions and answers by turns')
    messages = messages[slice(*match.span(1))] + messages[slice(*match.span(2))]
    if not all(message['content'].strip() for message in messages if message['role'] != 'system'):
        raise ValueError('an empty turn')
    return messages

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

# -----------------------------------------------------------------------------
# public datasets: a function from an upstream row to an example, or ValueError with the reason why it is left out; and
# where it needs more than `hub_rows`, a function that yields such rows. The table is DATASETS

def question_example(image, question, answer, metric=''):
    """A question about an image and its answer. `metric`, a name in sample.METRICS, scores answers; '': CER alone."""
    if IMAGE in question + answer:
        raise ValueError(f'its text has {IMAGE}')
    messages = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
    example = {'messages': questions_and_answers(messages), 'images': [image_bytes(image)]}
    place_images(example, 1)
    return {**example, 'metric': metric} if metric else example

def image_bytes(image):
    """The bytes of an image in a row of `datasets`, which decodes none: {"bytes": ..., "path": ...}. A path stays one."""
    data = image.get('bytes') if isinstance(image, dict) else image
    if not data:
        raise ValueError('the image is missing')
    return data

def hub_rows(source, subset, max_examples):
    """The rows of a dataset on the hub, or of a folder with its files: those that are held out, at most one for ten to train
    on, then those to train on. A dataset without a held-out split is divided by `convert_row`.
    """
    import datasets  # takes a second to import
    if subset and os.path.isdir(os.path.join(source, subset)):
        source, subset = os.path.join(source, subset), ''
    advice = 'check the name and the connection, or use --source=FOLDER with its files; what was read is kept'
    with explain_errors(f'{source} cannot be read', advice, OSError):
        splits = datasets.load_dataset(source, subset or None, streaming=True)
        train = 'auxiliary_train' if 'auxiliary_train' in splits else 'train'  # MMLU's name
        if train not in splits:
            raise ValueError(f'expected a split named train, got {", ".join(splits)}')
        held_out = next((name for name in ('validation', 'val', 'eval', 'test') if name in splits), None)
        if held_out:
            n_val = max(1, max_examples // 10) if max_examples else None
            for row in itertools.islice(splits[held_out].decode(False), n_val):
                yield {**row, 'split': 'val'}
        for row in splits[train].decode(False):
            yield {**row, 'split': 'train'} if held_out else row

def source_file(source, repository, file):
    """The path of a file of a dataset: in the folder `source`, or from the hub if there is none."""
    if not source:
        return download(repository, file)
    path = os.path.join(source, file)
    if not os.path.isfile(path):
        raise ValueError(f'{path} does not exist: expected the files of {repository} in --source={source}')
    return path

def unzip_tar(path):
    """The path of a .tar.gz as a .tar next to it, unpacked once: single members of a compressed one cannot be read."""
    target = path.removesuffix('.gz')
    if not os.path.exists(target):
        problem = f'{path} is broken or cut off'
        with explain_errors(problem, 'download it again'), gzip.open(path) as f, open(f'{target}.part', 'wb') as part:
            shutil.copyfileobj(f, part, 1 << 24)
        os.replace(f'{target}.part', target)
    return target

# pages

OCR_PROMPTS = ('OCR this document.', 'Read the text on this page.', 'Transcribe this page.')

class JoinedFiles(io.RawIOBase):
    """The parts of a file, read as one."""

    def __init__(self, paths):
        self.files = [open(path, 'rb') for path in paths]
        self.ends = list(itertools.accumulate(map(os.path.getsize, paths)))
        self.position = 0

    readable = seekable = lambda self: True

    def seek(self, offset, whence=os.SEEK_SET):
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.ends[-1]}[whence]
        return self.position

    def readinto(self, buffer):
        i = bisect.bisect_right(self.ends, self.position)
        if i == len(self.files):
            return 0
        start = self.ends[i - 1] if i else 0
        self.files[i].seek(self.position - start)
        n = self.files[i].readinto(memoryview(buffer)[:self.ends[i] - self.position])
        self.position += n
        return n

def docbank_rows(source, subset, max_examples):
    """Pages of DocBank: a .zip in ten parts with BASE_ori.jpg and one with BASE.txt."""
    repository = DATASETS['docbank'].repository
    n_parts = len(list(Path(source).glob('DocBank_500K_ori_img.zip.0??'))) if source else 10
    parts = [source_file(source, repository, f'DocBank_500K_ori_img.zip.{i:03}') for i in range(1, max(1, n_parts) + 1)]
    with explain_errors('the archives of DocBank are broken, or a part is missing', 'download them again'):
        images = zipfile.ZipFile(io.BufferedReader(JoinedFiles(parts)))
        texts = zipfile.ZipFile(source_file(source, repository, 'DocBank_500K_txt.zip'))
        image_names = {Path(name).name: name for name in images.namelist()}
    for name in texts.namelist():
        if name.endswith('.txt'):
            image_name = image_names.get(f'{Path(name).stem}_ori.jpg')
            yield {'id': name, 'text': lambda name=name: texts.read(name),
                   'image': lambda image_name=image_name: image_name and images.read(image_name)}

def docbank_example(row, rng):
    try:
        image, text = row['image'](), row['text']()
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise ValueError('a member of the archive is broken') from None
    return question_example(image, rng.choice(OCR_PROMPTS), docbank_text(text.decode(errors='replace')), 'edit_similarity')

def omnidocbench_rows(source, subset, max_examples):
    """The pages of OmniDocBench, a benchmark: all are held out."""
    repository = DATASETS['omnidocbench'].repository
    path = source_file(source, repository, 'OmniDocBench.json')
    for row in json_rows(path):
        name = f'images/{Path(row["page_info"]["image_path"]).name}'
        image = os.path.abspath(os.path.join(source, name)) if source else download(repository, name)
        yield {'id': name, 'image': image, 'split': 'val', 'blocks': row['layout_dets']}

def omnidocbench_example(row, rng):
    """Its blocks in reading order: text, tables as HTML, formulas as LaTeX. Headers, page numbers and figures have no order."""
    blocks = [block for block in row['blocks'] if not block.get('ignore') and block.get('order') is not None]
    texts = [block.get('html') or block.get('latex') or block.get('text') or ''
             for block in sorted(blocks, key=lambda block: block['order'])]
    text = '\n\n'.join(text.strip() for text in texts if text.strip())
    if not text:
        raise ValueError('it has no text')
    return question_example(row['image'], rng.choice(OCR_PROMPTS), text, 'edit_similarity')

def olmocr_rows(source, subset, max_examples):
    """Rows of olmOCR-mix, with the path of the page's PDF in its tar."""
    repository = DATASETS['olmocr'].repository
    for row in hub_rows(source or repository, subset, max_examples):
        archive, _, name = str(row.get('pdf_relpath')).rpartition(':')
        if archive:
            row['pdf'] = f'{unzip_tar(source_file(source, repository, archive))}/{name}'
        yield row

def olmocr_example(row, rng):
    if row['primary_language'] != 'en':
        raise ValueError('it is not English')
    text = (row['natural_text'] or '').strip()
    if not 50 <= len(text) <= 10_000:
        raise ValueError('its text has less than 50 or more than 10,000 characters')
    prompts = OCR_PROMPTS
    if row['is_table']:
        prompts = ('Transcribe this page with its tables.', 'Read this page. Write its tables in Markdown.')
    elif row['is_diagram']:
        prompts = ('Transcribe this page with its diagrams.', 'Read the text on this page and in its diagrams.')
    try:
        pdf = read_bytes(row['pdf'])
    except FileNotFoundError:
        raise ValueError('the PDF is missing') from None
    return question_example(draw_pdf(pdf, row['rotation_correction'] or 0), rng.choice(prompts), text, 'edit_similarity')

PDFIUM = threading.Lock()  # pdfium does not work in several threads

def draw_pdf(data, rotation):
    """The first page of a PDF at 150 dpi, turned clockwise by `rotation` degrees, as the bytes of a PNG."""
    import pypdfium2
    try:
        with PDFIUM, pypdfium2.PdfDocument(data) as document:  # which is closed before the lock is
            image = document[0].render(scale=150 / 72).to_pil()  # a point is 1/72 inch
    except pypdfium2.PdfiumError:
        raise ValueError('the PDF is broken') from None
    out = io.BytesIO()
    image.rotate(-rotation, expand=True).save(out, 'PNG')
    return out.getvalue()

# charts, tables, formulas

def plotqa_example(row, rng):
    """The data of a plot as a Markdown table: a row for each x, a column for each series."""
    try:
        series = json.loads(row['text'])
    except ValueError:
        raise ValueError('its text is not JSON') from None
    if not series:
        raise ValueError('it has no series')
    columns = {}
    for entry in series:
        x, y = entry['x'], entry['y']
        if not any(isinstance(value, str) for value in x) and any(isinstance(value, str) for value in y):
            x, y = y, x  # horizontal bars
        if not x or len(x) != len(y):
            raise ValueError('a series has no values, or not one for each x')
        columns[str(entry.get('label') or entry.get('name'))] = dict(zip(map(str, x), y))
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [['', *columns], ['---'] * (1 + len(columns))]
    for name in names:
        values = [column.get(name, '') for column in columns.values()]
        rows.append([name, *(f'{value:.10g}' if isinstance(value, (int, float)) else str(value) for value in values)])
    prompt = rng.choice(('Write the data of this plot as a table.', 'Convert this plot to a Markdown table.',
                         'Which values does this plot show?'))
    return question_example(row['image'], prompt, '\n'.join(f'| {" | ".join(cells)} |' for cells in rows))

def chartqa_example(row, rng):
    return question_example(row['image'], row['query'], row['label'][0], 'relaxed_accuracy')

def figureqa_example(row, rng):
    """All questions about a figure, as one conversation."""
    example = question_example(row['image'], row['qa'][0]['question'], row['qa'][0]['answer'], 'yes_no')
    for turn in row['qa'][1:]:
        example['messages'] += [{'role': 'user', 'content': turn['question']},
                                {'role': 'assistant', 'content': turn['answer']}]
    example['messages'] = questions_and_answers(example['messages'])
    return example

def pubtables_rows(source, subset, max_examples):
    """Tables of PubTables-1M: a tar of images and one of annotations for each split, and one with all words."""
    repository = DATASETS['pubtables'].repository
    prefix = 'PubTables-1M-Structure'
    archive = lambda name: unzip_tar(source_file(source, repository, f'{prefix}_{name}.tar.gz'))
    words = archive('Table_Words')
    for split, name in (('val', 'Val'), ('train', 'Train')):
        annotations, images = archive(f'Annotations_{name}'), archive(f'Images_{name}')
        with explain_errors(f'{images} is broken or cut off', 'download it again'), tarfile.open(images) as tar:
            names = [member.name for member in tar if member.name.endswith('.jpg')]
        if split == 'val' and max_examples:
            names = names[:max(1, max_examples // 10)]
        for name in names:
            base = Path(name).stem
            yield {'id': base, 'image': os.path.abspath(f'{images}/{name}'), 'split': split,
                   'annotation': f'{annotations}/{base}.xml', 'words': f'{words}/{base}_words.json'}

def pubtables_example(row, rng):
    try:
        annotation, words = read_bytes(row['annotation']), read_bytes(row['words'])
    except FileNotFoundError:
        raise ValueError('its annotation or its words are missing') from None
    objects = read_voc(annotation)
    try:
        words = json.loads(words)
        np.reshape([word['bbox'] for word in words], (-1, 4)).astype(float)  # a box of four numbers each
    except ValueError:
        raise ValueError('its words are broken') from None
    prompt = rng.choice(('Convert this table to HTML.', 'Write this table as HTML.', 'What is the HTML of this table?'))
    return question_example(row['image'], prompt, table_html(objects, words), 'teds')

def formula_example(row, rng):
    formula = re.sub(r'^\s*\\begin\{align\*\}|\\end\{align\*\}\s*$', '', row['latex_formula']).strip()
    prompt = rng.choice(('Write this formula in LaTeX.', 'Convert this formula to LaTeX.',
                         'What is the LaTeX of this formula?'))
    return question_example(row['image'], prompt, formula)

# conversations and texts

def hub_example(row, rng):
    """A row with "images" or "image", and "texts" (The Cauldron, FineVision), "messages" or "conversations"."""
    images = row.get('images') or row.get('image') or []
    turns = row.get('messages') or row.get('conversations')
    if not turns:
        pairs = [(('user', text['user']), ('assistant', text['assistant'])) for text in row['texts']]
        turns = [{'role': role, 'content': content} for pair in pairs for role, content in pair]
    example = {'messages': questions_and_answers(turns),
               'images': list(map(image_bytes, images if isinstance(images, list) else [images]))}
    place_images(example, len(example['images']))
    return example

def mmlu_example(row, rng):
    choices = '\n'.join(f'- {choice}={letter}' for choice, letter in zip(row['choices'], 'ABCD'))
    question = f'{row["question"]}\n{choices}\nAnswer with the letter only.'
    messages = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': 'ABCD'[row['answer']]}]
    return {'messages': questions_and_answers(messages), 'metric': 'letter'}

def gsm8k_example(row, rng):
    """Its <<48/2=24>> become calls of a calculator if the model has one: --calculator."""
    messages = [{'role': 'user', 'content': row['question']}, {'role': 'assistant', 'content': row['answer']}]
    return {'messages': questions_and_answers(messages), 'metric': 'final_number'}

def text_example(row, rng):
    if not row['text'].strip():
        raise ValueError('it has no text')
    return {'text': row['text']}

def wikitext_rows(source, subset, max_examples):
    """WikiText's articles; upstream a row is a line, and an article begins with the line " = Its title = "."""
    begins = re.compile(r'\s*= [^=].* =\s*')
    article, split = [], ''
    for row in hub_rows(source or DATASETS['wikitext'].repository, subset, 20 * max_examples):  # as long as many are
        if article and (begins.fullmatch(row['text']) or row.get('split') != split):
            yield {'text': ''.join(article), 'split': split}
            article = []
        split = row.get('split')
        if article or row['text'].strip():  # the first line of a file is blank
            article.append(row['text'] if row['text'].endswith('\n') else row['text'] + '\n')
    if article:
        yield {'text': ''.join(article), 'split': split}

def json_lines(source, subset, max_examples):
    """The lines of .jsonl files. A damaged one is left out and counted; one of your own you would rather correct."""
    files = list_files(source, ('.jsonl',)) if source else []
    if not files:
        raise ValueError(f'expected --source=FILE_OR_FOLDER with .jsonl files, got {source!r}')
    for path in files:
        with open(path, encoding='utf-8', errors='replace') as f:
            yield from ({'text': line, 'folder': str(path.parent.absolute())} for line in f if line.strip())

def json_example(row, rng):
    """A line that is an array of messages, or an object in our format."""
    try:
        example = to_example(json.loads(row['text']), row['folder'])
    except json.JSONDecodeError:
        raise ValueError('the line is not JSON') from None
    if 'messages' in example:
        example['messages'] = questions_and_answers(example['messages'])
    return example

def csv_rows(source, subset, max_examples):
    """The rows of a captions.csv (or metadata.csv, as Hugging Face's imagefolder has it) in a folder of images."""
    names = ('captions.csv', 'metadata.csv')
    path = next((path for path in (Path(source, name) for name in names) if source and path.is_file()), None)
    if path is None:
        raise ValueError(f'expected --source=FOLDER with images and a captions.csv, got {source!r}')
    with open(path, encoding='utf-8-sig', newline='') as f:
        for row in csv.DictReader(f):
            name = row.get('image') or row.get('file_name') or ''
            yield {**row, 'image': os.path.abspath(path.parent / name)}

def csv_example(row, rng):
    """Columns image (or file_name) and caption (or text, answer); with question it is the answer to that."""
    answer = row.get('caption') or row.get('text') or row.get('answer') or ''
    if not answer.strip():
        raise ValueError('it has no caption')
    return question_example(row['image'], row.get('question') or 'Describe the image.', answer)

@dataclasses.dataclass
class Dataset:
    """A public dataset. Rows and gigabytes are those upstream: '?' is not known here, '~' from memory."""
    teaches: str
    repository: str       # on the hub
    n_rows: str
    gigabytes: str
    license: str
    columns: str          # of an upstream row, as far as they are used
    convert: object       # (row, rng) -> example
    subset: str = ''      # its configuration on the hub; None: the user has to name one
    rows: object = None   # (source, subset, max_examples) -> rows with what `convert` needs; None: hub_rows
    needs: str = ''       # a package that is not installed with glimpse

DATASETS = {
    'docbank': Dataset('reading pages of papers', 'liminghao1630/DocBank', '500K', '51', 'apache-2.0',
                       'BASE_ori.jpg, BASE.txt: token x0 y0 x1 y1 R G B font label', docbank_example, rows=docbank_rows),
    'olmocr': Dataset('reading PDFs, also scanned ones', 'allenai/olmOCR-mix-1025', '270K', '?', 'odc-by',
                      'pdf_relpath, natural_text, primary_language, rotation_correction, is_table, is_diagram',
                      olmocr_example, '00_documents', olmocr_rows, 'pypdfium2'),
    'omnidocbench': Dataset('benchmark: pages of nine kinds', 'opendatalab/OmniDocBench', '1.4K', '~1', '?',
                            'layout_dets: [{order, ignore, text, html, latex}], page_info: {image_path}',
                            omnidocbench_example, rows=omnidocbench_rows),
    'plotqa': Dataset('plots to tables', 'achang/plot_qa', '157K', '?', '~cc-by-4.0',
                      'image, text: JSON [{label, x, y}]', plotqa_example),
    'chartqa': Dataset('questions about charts', 'HuggingFaceM4/ChartQA', '28K', '1.0', 'gpl-3.0',
                       'image, query, label: [answer]', chartqa_example),
    'figureqa': Dataset('yes-no questions about plots', 'vikhyatk/figureqa', '100K', '?', '?',
                        'image, qa: [{question, answer}]', figureqa_example),
    'pubtables': Dataset('tables to HTML', 'bsmock/pubtables-1m', '854K', '?', 'cdla-permissive-2.0',
                         'BASE.jpg, BASE.xml: boxes, BASE_words.json: [{bbox, text}]', pubtables_example, rows=pubtables_rows),
    'latex-formulas': Dataset('formulas to LaTeX', 'OleehyO/latex-formulas', '552K', '?', 'openrail',
                              'image, latex_formula', formula_example, 'cleaned_formulas'),
    'finevision': Dataset('24M rows of all kinds, by subset', 'HuggingFaceM4/FineVision', '24M', '?', 'by subset',
                          'images, texts: [{user, assistant}]', hub_example, None),
    'cauldron': Dataset('50 datasets, by subset', 'HuggingFaceM4/the_cauldron', '?', '?', 'by subset',
                        'images, texts: [{user, assistant}]', hub_example, None),
    'smol-smoltalk': Dataset('conversation, for small models', 'HuggingFaceTB/smol-smoltalk', '460K', '~1', 'apache-2.0',
                             'messages: [{role, content}]', hub_example),
    'smoltalk': Dataset('conversation', 'HuggingFaceTB/smoltalk', '1.04M', '~2', 'apache-2.0',
                        'messages: [{role, content}]', hub_example, 'all'),
    'mmlu': Dataset('multiple choice', 'cais/mmlu', '100K', '~0.05', 'mit',
                    'question, choices: [4], answer: 0 to 3', mmlu_example, 'all'),
    'gsm8k': Dataset('word problems, with a calculator', 'openai/gsm8k', '7.5K', '~0.005', 'mit',
                     'question, answer', gsm8k_example, 'main'),
    'wikitext': Dataset('text: articles of Wikipedia', 'Salesforce/wikitext', '~29K', '~0.3', '~cc-by-sa-3.0',
                        'text: a line', text_example, 'wikitext-103-raw-v1', wikitext_rows),
    'tinystories': Dataset('text: simple stories', 'roneneldan/TinyStories', '2.12M', '~1', 'cdla-sharing-1.0',
                           'text', text_example),
    'fineweb-edu': Dataset('text: the educational web', 'HuggingFaceFW/fineweb-edu', '10B tokens', '~28', 'odc-by',
                           'text', text_example, 'sample-10BT'),
    'hub': Dataset('any set of images and conversations', '', '', '', '',
                   'image(s), and texts, messages or conversations', hub_example),
    'folder': Dataset('images of your own, and a captions.csv', '', '', '', '',
                      'image, caption; or image, question, answer', csv_example, rows=csv_rows),
    'custom_json': Dataset('conversations of your own', '', '', '', '',
                           'a line: [{role, content}], or an example', json_example, rows=json_lines),
}

def prepare_public(
    command,
    source='',       # OWNER/NAME on the hub, or a folder with the files of the dataset; '' is its own repository
    subset='',       # its configuration on the hub; '' is that of the table
    name='',         # the dataset is written to data/NAME; '' takes the command's name
    max_examples=0,  # stop after as many rows; 0: all
    val_every=100,   # one row of so many is held out, unless the dataset has a held-out part of its own
):
    """Writes a public dataset to data/NAME/{train,val}.jsonl, its images to data/NAME/images, unless they lie in a .tar.

    Rows that are damaged or do not fit are counted and listed in skipped.jsonl. Called again after a stop, it continues.
    """
    dataset = DATASETS[command]
    if dataset.needs and not importlib.util.find_spec(dataset.needs):
        raise ValueError(f'{command} needs {dataset.needs}: pip install {dataset.needs}')
    if not source and not dataset.repository:
        raise ValueError(f'expected --source=…: {dataset.teaches}')
    subset = subset or dataset.subset
    if subset is None:
        raise ValueError(f'expected --subset=NAME: https://huggingface.co/datasets/{dataset.repository} lists them')
    if dataset.rows:
        rows = dataset.rows(source, subset, max_examples)
    else:
        rows = hub_rows(source or dataset.repository, subset, max_examples)
    is_benchmark = command == 'omnidocbench'  # nothing of it is trained on
    write_dataset(name or command, rows, dataset.convert, source or dataset.repository, max_examples,
                  1 if is_benchmark else val_every, subset)

# those with a command of their own, in the order of `list`
OTHERS = {
    'llava_instruct': ('conversations about COCO\'s images', '158K', '0.2 + 19', 'cc-by-4.0', '--image_dir=coco/train2017'),
    'llava_pretrain': ('captions', '558K', '27', 'other', ''),
    'llava_cc3m': ('captions', '595K', '6.7', 'that of CC3M', ''),
    'sharegpt4v': ('long captions', '102K', '?', 'cc-by-nc-4.0', '--image_dir=FOLDER'),
    'coco_captions': ('captions, five of an image', '118K', '19', 'cc-by-4.0', '--source=annotations --image_dir=coco'),
    'cc3m': ('captions', '2.9M', '?', 'that of CC3M', ''),
    'obelics': ('web documents with images', '141M', '?', 'cc-by-4.0', ''),
    'text': ('text of any dataset or file', '', '', '', '--source=OWNER/NAME'),
    'shapes': ('questions about drawn shapes', '40K', '0.06', '', ''),
    'sums': ('drawn-up sums, with a calculator', '20K', '0.01', '', ''),
}

def list_datasets():
    """Prints all datasets: what each teaches, its size, its license, its command."""
    rows = [('', 'teaches', 'rows', 'GB', 'license', 'command')]
    for name, dataset in DATASETS.items():
        knobs = '' if dataset.repository else ' --source=...'
        if dataset.subset is None:
            knobs = ' --subset=...'
        rows.append((name, dataset.teaches, dataset.n_rows, dataset.gigabytes, dataset.license, name + knobs))
    rows += [(name, *about, f'{name} {knobs}') for name, (*about, knobs) in OTHERS.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print('\nThe command is what follows "python prepare_data.py"; with --max_examples=1000 it writes a small part to\n'
          'data/. GB are those of the download, images included; ~ is from memory, ? is not known here.')
    for name, dataset in DATASETS.items():
        if dataset.needs:
            print(f'{name} needs {dataset.needs}: pip install {dataset.needs}')

# -----------------------------------------------------------------------------
# datasets with a command of their own

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
    convert = lambda row, rng: {'text': row['text']}
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

    def convert(row, rng):
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

def prepare_sums(
    name='sums',         # the dataset is written to data/NAME
    max_examples=20000,  # how many conversations
):
    """Writes plain conversations about sums, with calls of a calculator as in GSM8K, to data/NAME/{train,val}.jsonl."""
    def convert(row, rng):
        person, thing = rng.choice(('Ann', 'Ben', 'Eva', 'Tom')), rng.choice(('apples', 'books', 'coins', 'stamps'))
        total = rng.randint(2, 99)
        before = f'{person} has {total} {thing}. '
        messages = []
        for _ in range(rng.randint(1, 3)):
            number = rng.randint(2, 99)
            questions = {'+': f'{person} gets {number} more.', '*': f'Now think of {number} times as many.'}
            if number < total:
                questions['-'] = f'{person} gives {number} away.'
            sign = rng.choice([sign for sign in questions if sign != '*' or total < 1000])
            expression = f'{total}{sign}{number}'
            total = {'+': total + number, '*': total * number, '-': total - number}[sign]
            answer = f'That makes <<{expression}={total}>>{total} {thing}.\n#### {total}'
            messages += [{'role': 'user', 'content': f'{before}{questions[sign]} How many are there?'},
                         {'role': 'assistant', 'content': answer}]
            before = ''
        return {'messages': messages, 'metric': 'final_number'}

    write_dataset(name, ({'id': i} for i in range(max_examples)), convert, 'sums', max_examples, VAL_EVERY)

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

def llava_example(row, rng, image_dir, captions_only):
    """A row of LLaVA's -> example. Raises ValueError with the reason why it is skipped."""
    turns = questions_and_answers(row.get('conversations'))
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

def to_caption_example(row, rng):
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

MAX_BYTES = 20_000_000  # of an image of the web
TIMEOUT = 10  # seconds, for all of it

def web_name(url):
    """The name of an image of the web as a file: 16 hex digits of its URL's SHA-256, and the URL's own ending."""
    ending = re.search(r'\.[A-Za-z]{3,4}(?=[?#]|$)', url)
    return f'{hash64(url):016x}{ending[0] if ending else ""}'

def fetch_image(url, path):
    """Downloads an image to a path, unless it is there. Returns '', or the reason why there is none that can be loaded."""
    if os.path.exists(path):
        return image_error(path)
    if not re.match('https?://[^/?#]', url, re.IGNORECASE):  # urllib would also open a file:// of this machine
        return 'no http address'
    data = bytearray()
    deadline = time.monotonic() + TIMEOUT
    try:
        escaped = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")  # spaces, umlauts
        request = urllib.request.Request(escaped, headers={'User-Agent': 'Mozilla/5.0 (compatible; glimpse)'})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            while chunk := response.read1(1 << 16):
                data += chunk
                if len(data) > MAX_BYTES:
                    return f'larger than {MAX_BYTES / 1e6:g} MB'
                if time.monotonic() > deadline:  # the timeout above is that of a single read
                    return 'timed out'
    except urllib.error.HTTPError as error:
        return f'HTTP status {error.code}'
    except (OSError, ValueError, http.client.HTTPException) as error:
        return 'timed out' if isinstance(getattr(error, 'reason', error), TimeoutError) else 'no connection'
    part = Path(path).with_name(f'{threading.get_ident()}.part')  # other threads may fetch the same image
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(data)
    problem = image_error(part)
    if problem:
        part.unlink()
    else:
        part.replace(path)
    return problem

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

def obelics_example(row, rng, folder, image_dir):
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
            path = os.path.join(image_dir or 'images', web_name(url))
            problem = image_error(path) if image_dir else fetch_image(url, folder / path)
            if problem:
                failed_images.append((url, problem))
            else:
                images.append(path)
                parts[i] = IMAGE
    return {'text': '\n\n'.join(filter(None, parts)), 'images': images, 'failed_images': failed_images}

# -----------------------------------------------------------------------------
# commands that read a dataset

def store_features(
    config: vision.VisionConfig,
    dataset='',
    batch_size=32,
    device='',  # '' takes CUDA or MPS if there is one
):
    """Stores a frozen encoder's features of a dataset's images in data/NAME/features-KEY/; continues if interrupted."""
    if not is_pretrained(config):
        raise ValueError(f'expected --vision_encoder=NAME/TAG of a frozen encoder, got {config.vision_encoder!r}')
    if config.image_newlines:
        raise ValueError('stored features do not say where rows end: leave image_newlines out')
    rows = itertools.chain(open_rows(dataset, 'train'), open_rows(dataset, 'val'))
    paths = list(dict.fromkeys(path for row in rows for path in row.get('images', ())))
    if not paths:
        raise ValueError(f'{dataset} has no image files: there is nothing to store')
    config = vision.complete_config(config)
    device = device or torch.accelerator.current_accelerator(check_available=True) or 'cpu'
    model = vision.Vision(config).to(device).eval().requires_grad_(False)
    FeatureCache(dataset_folder(dataset), config, model.encoder.fingerprint).fill(paths, model, batch_size)

def train_tokenizer(
    dataset='',       # or several, as in train.py
    vocab_size=4096,  # tokens of text; special ones come on top
    out='',           # the file to write; '' is data/NAME/tokenizer.json of the first dataset
):
    """Trains a byte-level BPE on the texts of a dataset; train.py takes it by --tokenizer=data/NAME/tokenizer.json."""
    names = [source.name for source in parse_mixture(dataset)]

    def read_texts(split):
        for row in itertools.chain.from_iterable(open_rows(name, split) for name in names):
            yield from (message['content'] for message in row.get('messages', [{'content': row.get('text', '')}]))

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # words, as in GPT-2
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()  # all bytes, so that any text has ids
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(read_texts('train'), trainer)
    out = out or str(dataset_folder(names[0]) / 'tokenizer.json')
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    tokenizer.save(out)
    texts = list(itertools.islice(read_texts('val'), 1000))
    n_tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f'{out}: {tokenizer.get_vocab_size()} tokens, {n_bytes / max(1, n_tokens):.2f} bytes a token of held-out text',
          file=sys.stderr)

def show_example(
    config: vision.VisionConfig,
    dataset='',
    split='train',
    index=0,              # of the row
    loss_on='assistant',
    tokenizer='bytes',
    calculator=False,     # <<48/2=24>> is a call of a calculator
    packed=False,         # a row of block_size tokens as packing makes it, of the examples from `index` on
    out='show.png',       # the image to write
):
    """Prints an example as the model gets it, what is in the loss in green, and draws its images and tokens to show.png.

    With --packed, all examples of a packed row and the mask of its attention: who attends (rows) to whom (columns).
    """
    enc = get_tokenizer(tokenizer, image_marks=config.image_marks, calculator=calculator)
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
        sheets.append(render.token_sheet([load_image(source) for source in example.get('images', ())], tokens))
    if packed:
        is_image = batch['idx'][0] == config.image_token
        sheets.append(render.mask_image(batch['docs'][0].numpy(), is_image.numpy()))
    render.stack(sheets, 1, render.MARGIN).save(out)
    print(f'as an image: {out}', file=sys.stderr)

COMMANDS = {
    'list': list_datasets, **{command: functools.partial(prepare_public, command) for command in DATASETS},
    'text': prepare_text, 'shapes': prepare_shapes, 'sums': prepare_sums, 'coco_captions': prepare_coco, 'cc3m': prepare_cc3m,
    **{command: functools.partial(prepare_llava, command, **defaults) for command, defaults in LLAVA.items()},
    'obelics': prepare_obelics, 'features': store_features, 'tokenizer': train_tokenizer, 'show': show_example,
}

if __name__ == '__main__':
    run(lambda: run_command(COMMANDS))
