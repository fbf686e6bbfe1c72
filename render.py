"""
Text -> images: everything that draws text for a model to read, and the images that show what a run does.

    fit            the largest font size at which the wrapped text stays inside a box
    draw           the text as a PIL image, with random augmentation if asked for
    split          a list of tokens or a string -> prefix, infix, postfix; the infix is the part that is drawn
    TASKS          plain text -> an example to train on: ocr, continuation, text
    contact_sheet  images with captions, correct ones in green and wrong ones in red
    token_sheet    the images and tokens of an example, those in the loss in green

    $ python render.py "The quick brown fox" --out x.png     # what does the model get as its image?
    $ python render.py "$(cat poem.txt)" --width=448 --height=448 --out page.png

The font is Pillow's built-in one (Aileron), or any .ttf/.otf file or a folder of them.
"""

import glob
import itertools
import math
import os
import random
import re
import sys
from bisect import bisect_right
from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

# -----------------------------------------------------------------------------
# fonts: `font` is the path of a font file, '' for Pillow's built-in one; `face` is a font loaded at one size

MIN_SIZE = 6    # font sizes in pixels that `fit` tries unless it is asked for others
MAX_SIZE = 200
LEADING = 1.4   # distance of two baselines, in font sizes

@lru_cache(maxsize=1024)
def load_font(font, size):
    """The font at `size` pixels, as a PIL font. Raises ValueError if the file is not a font."""
    if not font:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(font, size)
    except OSError as error:
        raise ValueError(f'{font} is not a font that can be read ({error}): expected a .ttf or .otf file') from error

@lru_cache
def list_fonts(path):
    """['' (built-in)] for '', [path] for a file, all fonts below a folder in sorted order."""
    if not path or os.path.isfile(path):
        return [path]
    pattern = os.path.join(glob.escape(path), '**', '*.[tToO][tT][fF]')
    fonts = sorted(glob.glob(pattern, recursive=True))
    if not fonts:
        raise ValueError(f'no .ttf or .otf file in font folder {path!r}')
    return fonts

@lru_cache(maxsize=65536)
def has_glyph(character, font=''):
    """Whether the font can draw the character. A missing one is drawn as the same small box as U+FFFF."""
    if character.isspace():
        return character in ' \n\t'
    face = load_font(font, 16)
    return bytes(face.getmask(character)) != bytes(face.getmask('\uffff'))

def strip_unsupported(text, font=''):
    """The text without the characters that the font cannot draw."""
    return ''.join(c for c in text if has_glyph(c, font))

# -----------------------------------------------------------------------------
# fit: text and a box -> font size and lines

@lru_cache(maxsize=2**18)
def short_word_length(face, word):
    return face.getlength(word)

def word_length(face, word):
    """The width of a word in pixels. A text repeats its words, so most of them are measured already; long ones are not
    kept, because where no spaces are written a word is a whole paragraph.
    """
    return short_word_length(face, word) if len(word) <= 32 else face.getlength(word)

def wrap(text, width, length):
    """Breaks text into lines of at most `width` pixels, at spaces if possible and inside a word if necessary.
    length(word) is a word's width: that of a line is the sum of its words and spaces, as fonts hardly kern at a space.
    Newlines and indentation stay. Only a line of a single character can be wider.
    """
    lines = []
    for paragraph in text.expandtabs(4).split('\n'):
        line = []  # words and, between any two of them, one space; several spaces have empty words between them
        used = 0
        for word in paragraph.split(' '):
            added = length(word) + (length(' ') if line else 0)
            if used + added > width and any(line):
                lines.append(' '.join(line))
                line, used, added = [], 0, length(word)
            while used + added > width and (line or len(word) > 1):  # break a word wider than a line
                room = width - used - (length(' ') if line else 0)
                n = bisect_right(range(1, len(word)), room, key=lambda n: length(word[:n]))
                n = n if line else max(n, 1)
                lines.append(' ' * len(line) + word[:n])
                word = word[n:]
                line, used, added = [], 0, length(word)
            line.append(word)
            used += added
        lines.append(' '.join(line))
    return lines

def layout(text, face, width):
    """The lines of the text in a column of `width` pixels, and their ink box (x0, y0, x1, y1); the origin is the
    left end of the first ascender line.
    """
    lines = wrap(text, width, partial(word_length, face))
    return lines, ink_box(lines, face)

def ink_box(lines, face):
    """Accents and italics can be larger than the font's own metrics, so the ink is measured."""
    lefts, tops, rights, bottoms = zip(*map(face.getbbox, lines))
    pitch = math.ceil(LEADING * face.size)
    y1 = max(text_height(len(lines), face), *(pitch * i + bottom for i, bottom in enumerate(bottoms)))
    return min(0, *lefts), min(0, tops[0]), max(rights), y1

def text_height(n_lines, face):
    """Pixels from the first ascender line to the last descender line."""
    return math.ceil(LEADING * face.size) * (n_lines - 1) + sum(face.getmetrics())

class DoesNotFit(ValueError):
    """The text overflows its box even at the smallest font size that is allowed."""

def fit(text, width, height, font='', min_size=MIN_SIZE, max_size=MAX_SIZE):
    """The largest font size at which the wrapped text stays inside width x height pixels, as in text-only VLM
    pretraining (sizes 12 to 200, leading 1.4). Returns (size, lines, ink box), as from `layout`. Starts from the size
    at which the text takes the area of the box, and goes up while it fits, or down until it does.
    Raises ValueError for text without ink, DoesNotFit for text that overflows even at min_size.
    """
    if not text.strip():
        raise ValueError('there is nothing to draw: the text is empty or white space')

    def fit_at(size):
        face = load_font(font, size)
        lines = wrap(text, width, partial(word_length, face))
        if text_height(len(lines), face) > height:
            return None
        ink = x0, y0, x1, y1 = ink_box(lines, face)
        return (size, lines, ink) if x1 - x0 <= width and y1 - y0 <= height else None

    line_height = lambda size: sum(load_font(font, size).getmetrics())
    high = min_size - 1 + bisect_right(range(min_size, max_size + 1), height, key=line_height)
    # at `size` the text, on one line, is `length` * size / 32 wide and LEADING * size high
    face = load_font(font, 32)
    length = max(1, sum(word_length(face, word) for word in re.findall(r'\S+|\s', text)))
    size = int(math.sqrt(32 * width * height / (LEADING * length)))
    size = max(min_size, min(size, high))
    best = fit_at(size) if size <= high else None
    step = 1 if best else -1
    while min_size <= size + step <= high:
        size += step
        found = fit_at(size)
        best = found or best
        if bool(found) == (step < 0):  # up to the first that does not fit, or down to the first that does
            break
    if best is None:
        raise DoesNotFit(f'a text of {len(text)} characters does not fit {width}x{height} pixels at font size '
                         f'{min_size}: shorten it or enlarge the box')
    return best

# -----------------------------------------------------------------------------
# draw: text -> image

def draw(
    text,
    width,                       # of the box, in pixels
    height,
    font='',
    position=(0.0, 0.0),         # (x, y) in [0, 1] of the space that is left over; (0, 0) is top left
    color=(0, 0, 0),
    background=(255, 255, 255),
    trim=False,                  # cut the image to the width of the text
    pad=(0, 0),                  # pixels of background left and right of the text
    scale=1.0,                   # share of the font size that fits; < 1 leaves space for `position`
    rotate=0.0,                  # degrees counter-clockwise; the box stays, so the text is set smaller
    blur=0.0,                    # radius of a Gaussian blur, in pixels
    noise=0.0,                   # standard deviation of pixel noise, in gray levels of 255
    seed=0,                      # of the noise
    min_size=MIN_SIZE,
    max_size=MAX_SIZE,
):
    """Text in a box, as an RGB PIL image. Raises ValueError if the text is empty or does not fit."""
    inner_width, inner_height = size_before_rotation(width, height, rotate)
    column = inner_width - sum(pad)
    if min(column, inner_height) < 1:
        raise DoesNotFit(f'a box of {width}x{height} pixels leaves no room for text turned by {rotate} degrees')
    size, lines, ink = fit(text, column, inner_height, font, min_size, max_size)
    if scale < 1:
        size = max(min_size, round(size * scale))
        lines, ink = layout(text, load_font(font, size), column)
    x0, y0, x1, y1 = ink
    surplus = column - math.ceil(x1 - x0) if trim else 0
    image = Image.new('RGB', (inner_width - surplus, inner_height), background)
    x = pad[0] - x0 + position[0] * (column - surplus - (x1 - x0))
    y = -y0 + position[1] * (inner_height - (y1 - y0))
    draw_lines(image, lines, round(x), round(y), load_font(font, size), color)
    if rotate:
        turned = image.rotate(rotate, Image.BICUBIC, expand=True, fillcolor=background)
        image = Image.new('RGB', (width - surplus, height), background)
        image.paste(turned, ((image.width - turned.width) // 2, (height - turned.height) // 2))
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    if noise:
        pixels = np.asarray(image)                                                  # (H, W, 3)
        gray = np.random.default_rng(seed).normal(0.0, noise, (height, image.width, 1))  # the same in all channels
        image = Image.fromarray((pixels + gray).clip(0, 255).astype(np.uint8))
    return image

def size_before_rotation(width, height, degrees):
    """(width, height) in pixels of the box that takes width x height pixels after a rotation."""
    # a w x h box takes w cos + h sin by w sin + h cos: solved for w and h
    angle = math.radians(abs(degrees))
    solve = lambda a, b: int((a * math.cos(angle) - b * math.sin(angle)) / math.cos(2 * angle))
    return solve(width, height), solve(height, width)

def draw_lines(image, lines, x, y, face, color):
    """Draws lines of text onto the image from (x, y) on."""
    pen = ImageDraw.Draw(image)
    pitch = math.ceil(LEADING * face.size)
    for i, line in enumerate(lines):
        pen.text((x, y + i * pitch), line, color, face)

def augmentation(rng, strength=1.0):
    """Random arguments for `draw`, scaled by strength in [0, 1]; 0 leaves black on white. rng: a random.Random."""
    if not strength:
        return {}
    amount = lambda high: rng.random() * high * strength
    paper = 255 - amount(60)
    ink = amount(90)
    tint = [amount(30) for _ in range(3)]
    background = tuple(int(paper - t) for t in tint)
    color = tuple(int(ink + t) for t in tint)
    if rng.random() < 0.2 * strength:  # sometimes light text on a dark background
        background, color = color, background
    max_pad = round(8 * strength)
    return dict(
        color=color,
        background=background,
        scale=1 - amount(0.5),
        position=(rng.random(), rng.random()),
        pad=(rng.randint(0, max_pad), rng.randint(0, max_pad)),
        rotate=rng.uniform(-1, 1) * strength if rng.random() < 0.3 * strength else 0.0,
        blur=amount(0.6) if rng.random() < 0.5 else 0.0,
        noise=amount(12),
        seed=rng.getrandbits(32),
    )

def render_text(text, rng, config):
    """The text, shortened until it fits into the config's box, and its image, as train.py's knobs of images say;
    ('', None) if the font has no glyph of it.
    """
    font = rng.choice(list_fonts(config.font))
    text = strip_unsupported(text, font)
    text = ' '.join(text.split()) if config.one_line else text
    options = augmentation(rng, config.distort)
    if not text.strip():
        return '', None
    width, height = config.image_width, config.image_height
    if config.max_aspect > 1:
        stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(config.max_aspect))
        width = round(width * stretch)
        height = round(height / stretch)
    while True:
        try:
            return text, draw(text, width, height, font, trim=config.one_line, min_size=config.font_min,
                              max_size=config.font_max, **options)
        except DoesNotFit:
            if len(text) < 2:
                raise
            text = text[:len(text) * 7 // 8].rstrip()

# -----------------------------------------------------------------------------
# split: a text -> pieces; a span of it; prefix, infix, postfix

def split_paragraphs(text, min_chars=600):
    """Cuts a text at blank lines into pieces of at least min_chars characters (the last one may be shorter)."""
    pieces = ['']
    for paragraph in filter(str.strip, re.split(r'\n\s*\n', text)):
        if len(pieces[-1]) >= min_chars:
            pieces.append('')
        pieces[-1] += ('\n\n' if pieces[-1] else '') + paragraph
    return list(filter(None, pieces))

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

def split(span, rng, low=0.1, high=0.4):
    """Cuts a list of tokens or a string into prefix, infix and postfix, none of them empty. The infix is a share
    r ~ U(low, high) of the span, its start uniformly random, as in text-only VLM pretraining. Raises ValueError
    for fewer than three elements and for ratios that are not 0 < low <= high < 1.
    """
    if not 0 < low <= high < 1:
        raise ValueError(f'the infix ratio must satisfy 0 < low <= high < 1, got {low} and {high}')
    if len(span) < 3:
        raise ValueError(f'a span of {len(span)} is too short to be split into prefix, infix and postfix')
    length = min(len(span) - 2, max(1, round(len(span) * rng.uniform(low, high))))
    start = rng.randint(1, len(span) - length - 1)
    return span[:start], span[start:start + length], span[start + length:]

# -----------------------------------------------------------------------------
# tasks: plain text becomes examples, most with an image that is drawn. A task is (text, rng, config, length_scale) ->
# example; config holds train.py's knobs, length_scale in (0, 1] is the length of the drawn text while a run with
# length_warmup begins

IMAGE = '<image>'  # where an image stands in a text

def ocr(text, rng, config, length_scale=1.0):
    """An image of a span of text -> the span."""
    max_chars = max(2, round(config.max_chars * length_scale))
    min_chars = min(config.min_chars, 1 + max_chars // 2)
    span = text_span(' '.join(text.split()) if config.one_line else text, rng, min_chars, max_chars)
    span, image = render_text(span, rng, config)
    if not span:  # the font can draw nothing of it: it stays text
        return {'text': text}
    messages = [{'role': 'user', 'content': IMAGE}, {'role': 'assistant', 'content': span}]
    return {'messages': messages, 'images': [image], 'char_level': config.char_level}

def continuation(text, rng, config, length_scale=1.0):
    """Text with an image in place of its middle, the "infix" -> the text after it: text-only VLM pretraining."""
    span = text_span(text, rng, config.min_span, config.max_span)
    if len(span) < 3:  # too short to be split: it stays text
        return {'text': text}
    # anywhere, as between tokens, also inside a word: what comes next depends on the letters that were drawn
    prefix, middle, postfix = split(span, rng, config.infix_min, config.infix_max)
    infix = middle.strip()
    drawn, image = render_text(infix, rng, config)
    if not drawn:
        return {'text': text}
    before, _, after = middle.partition(infix)  # white space at its two ends stays text
    if rng.random() < config.blank_images:
        image = Image.new('RGB', image.size, 'white')
    if infix.split() != drawn.split():  # shortened to fit, or glyphs are missing
        infix = drawn
    return {'text': prefix + before + IMAGE + after + postfix, 'images': [image], 'infix': infix, 'loss_on': 'postfix'}

def plain_text(text, rng, config, length_scale=1.0):
    """A span of text as text, so that the model does not forget language."""
    return {'text': text_span(text, rng, config.min_span, config.max_span)}

TASKS = {'ocr': ocr, 'continuation': continuation, 'text': plain_text}

def parse_tasks(spec):
    """'ocr:0.8 text:0.2' -> {'ocr': 0.8, 'text': 0.2}. Raises ValueError for an unknown task or a weight <= 0."""
    weights = {}
    for word in spec.split() or ['']:
        task, _, weight = word.partition(':')
        try:
            weights[task] = float(weight or 1)
        except ValueError:
            weights[task] = 0.0
        if task not in TASKS or not weights[task] > 0:
            raise ValueError(f'tasks: expected {", ".join(TASKS)} with weights, like "ocr:0.8 text:0.2", got {word!r}')
    return weights

# -----------------------------------------------------------------------------
# shapes: images of 64 x 64 pixels and questions about them

PLURALS = {'circle': 'circles', 'square': 'squares', 'triangle': 'triangles', 'cross': 'crosses'}
SHAPES = tuple(PLURALS)
COLORS = {'red': (220, 40, 40), 'green': (40, 160, 60), 'blue': (50, 80, 220), 'yellow': (245, 210, 40),
          'purple': (150, 60, 190), 'black': (20, 20, 20)}
QUARTERS = ('top left', 'top right', 'bottom left', 'bottom right')
FACTS = [('How many sides has a triangle?', '3'), ('How many sides has a square?', '4'),
         ('Which shape is round?', 'circle'), ('How many corners has a triangle?', '3'),
         ('Which color do blue and yellow make?', 'green'), ('Which color do red and blue make?', 'purple'),
         ('Is a circle round?', 'yes'), ('Is a square round?', 'no')]

def random_shapes(rng, count):
    """`count` shapes (shape, color, quarter, x, y, radius), each in a quarter of its own."""
    shapes = []
    for quarter in rng.sample(range(4), count):
        radius = rng.randint(9, 14)
        x = 32 * (quarter % 2) + rng.randint(radius + 1, 31 - radius)
        y = 32 * (quarter // 2) + rng.randint(radius + 1, 31 - radius)
        shapes.append((rng.choice(SHAPES), rng.choice(list(COLORS)), QUARTERS[quarter], x, y, radius))
    return shapes

def draw_shapes(shapes):
    """The shapes on white, drawn four times as large and scaled down, so that their edges are smooth."""
    image = Image.new('RGB', (4 * 64, 4 * 64), 'white')
    pen = ImageDraw.Draw(image)
    for shape, color, _, *geometry in shapes:
        x, y, r = (4 * value for value in geometry)
        fill = COLORS[color]
        box = lambda w, h: (x - w, y - h, x + w, y + h)
        if shape == 'circle':
            pen.ellipse(box(r, r), fill)
        elif shape == 'square':
            pen.rectangle(box(r, r), fill)
        elif shape == 'triangle':
            pen.polygon((x, y - r, x - r, y + r, x + r, y + r), fill)
        else:
            pen.rectangle(box(r, r / 3), fill)
            pen.rectangle(box(r / 3, r), fill)
    return image.resize((64, 64), Image.Resampling.BOX)

def shapes_example(rng, new_image, held_out):
    """(images, each a list of shapes from new_image(rng, count); turns, each a question and its answer). Many
    training conversations end in a description, which needs everything in the image. Only the last answer of a
    held-out one is scored: there a description stands alone.
    """
    dice = rng.random()
    if dice < 0.05:
        return [], rng.sample(FACTS, 4)
    turns = {}  # {question: answer}, so that no question is asked twice
    if dice < 0.85:
        shapes = new_image(rng, rng.randint(1, 2))
        if dice >= (0.15 if held_out else 0.25):
            n_questions = rng.randint(1, 3 if held_out else 5)
            turns.update(shapes_question(shapes, rng) for _ in range(n_questions))
        if not turns or dice < 0.45 and not held_out:
            in_order = sorted(shapes, key=lambda shape: QUARTERS.index(shape[2]))
            facts = (f'a {color} {shape} {quarter}' for shape, color, quarter, *_ in in_order)
            turns['Describe the image.'] = ', '.join(facts)
        return [shapes], list(turns.items())
    images = [new_image(rng, count) for count in rng.sample((1, 2), 2)]
    ordinals = 'first', 'second'
    turns['Which image has more shapes?'] = 'the ' + ordinals[len(images[0]) < len(images[1])]
    for _ in range(2):
        number = rng.randrange(2)
        question, answer = shapes_question(images[number], rng)
        turns[f'In the {ordinals[number]} image: {question}'] = answer
    return images, rng.sample(list(turns.items()), len(turns))[:rng.randint(1, 3)]

def shapes_question(shapes, rng):
    """A question that has one correct answer, and the answer."""
    names, colors, *_ = zip(*shapes)
    pairs = list(zip(names, colors))
    while True:
        topic = rng.choice(('color', 'shape', 'yes or no', 'count', 'position'))
        name, color, quarter, *_ = rng.choice(shapes)
        if topic == 'color' and names.count(name) == 1:
            return f'What color is the {name}?', color
        if topic == 'shape' and colors.count(color) == 1:
            return f'What is the {color} shape?', name
        if topic == 'yes or no':
            if rng.random() < 0.5:
                return f'Is there a {color} {name}?', 'yes'
            # half correct, so that neither color nor shape alone gives the answer
            other = rng.choice([(name, rng.choice(list(COLORS))), (rng.choice(SHAPES), color)])
            if other not in pairs:
                return f'Is there a {other[1]} {other[0]}?', 'no'
        if topic == 'count':
            word = rng.choice(('', name, color, rng.choice(SHAPES), rng.choice(list(COLORS))))
            counted = PLURALS[word] if word in SHAPES else f'{word} shapes'.strip()
            answer = sum(not word or word in shape for shape in shapes)
            return f'How many {counted} are there?', str(answer)
        if topic == 'position' and pairs.count((name, color)) == 1:
            return f'Where is the {color} {name}?', quarter

# -----------------------------------------------------------------------------
# sheets: one image that shows what a run does, put together from tiles

GREEN = (0, 110, 40)
RED = (190, 20, 20)
GRAY = (60, 60, 60)
MARGIN = 8     # pixels between the tiles of a sheet
TEXT_SIZE = 14

def stack(tiles, axis, gap):
    """The tiles in a row (axis 0) or in a column (axis 1), `gap` pixels apart, on white."""
    size = [max(tile.width for tile in tiles), max(tile.height for tile in tiles)]
    size[axis] = sum(tile.size[axis] + gap for tile in tiles) - gap
    sheet = Image.new('RGB', size, 'white')
    corner = [0, 0]
    for tile in tiles:
        sheet.paste(tile, tuple(corner))
        corner[axis] += tile.size[axis] + gap
    return sheet

def stack_rows(rows, gap_x=MARGIN, gap_y=MARGIN):
    """Rows of tiles as one image with a margin."""
    return ImageOps.expand(stack([stack(row, 0, gap_x) for row in rows], 1, gap_y), MARGIN, 'white')

def thumbnail(image, width, height):
    """The image scaled down to width x height pixels, or a small one drawn twice as large; framed."""
    image = image.convert('RGB')
    if 2 * image.width <= width:
        image = ImageOps.scale(image, 2, Image.NEAREST)  # stays sharp
    image.thumbnail((width - 2, height - 2), Image.LANCZOS)
    return ImageOps.expand(image, 1, 'silver')

def text_tile(text, width, height=0, color='black', fill='white'):
    """The text on a tile of `width` and at least `height` pixels: wrapped, and cut after six lines."""
    face = load_font('', TEXT_SIZE)
    lines = wrap(text, width - 4, partial(word_length, face))
    if len(lines) > 6:
        lines = lines[:5] + ['…']
    tile = Image.new('RGB', (width, max(height, 20 * len(lines) + 2)), fill)
    draw_lines(tile, lines, 2, 1, face, color)
    return tile

def contact_sheet(images, captions, correct=None, cell=400, columns=4):
    """One RGB image with all PIL images in columns, each above its caption, scaled down to `cell` pixels of
    width; a caption without an image has None in its place. correct: a bool or None each, which makes the caption
    green, red or gray; None for all gray.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f'a contact sheet needs as many captions as images, got {len(images)} and {len(captions)}')
    colors = {True: GREEN, False: RED, None: GRAY}
    tiles = []
    for image, caption, is_correct in zip(images, captions, correct or itertools.repeat(None)):
        tile = text_tile(caption, cell, color=colors[is_correct])
        tiles.append(stack([thumbnail(image, cell, 2 * cell), tile], 1, 2) if image else tile)
    return stack_rows([tiles[i:i + columns] for i in range(0, len(tiles), columns)])

def similarity_grid(images, captions, values):
    """An RGB image: a column for each image, a row for each caption, values[row][column]; a row's largest framed."""
    cell = 110
    header = [ImageOps.pad(thumbnail(image, cell, cell), (cell, cell), color='white') for image in images]
    rows = [[text_tile('', 2 * cell), *header]]
    low = min(map(min, values))
    high = max(map(max, values))
    for caption, row in zip(captions, values):
        tiles = [text_tile(caption, 2 * cell)]
        for value in row:
            share = (value - low) / (high - low or 1)
            fill = f'hsl(120, 50%, {100 - 40 * share:.0f}%)'
            tile = text_tile(f'{value:.2f}', cell - 4, tiles[0].height - 4, fill=fill)
            tiles.append(ImageOps.expand(tile, 2, 'black' if value == max(row) else 'white'))
        rows.append(tiles)
    return stack_rows(rows, 0, 0)

def heat_map(image, heat):
    """The RGB image in gray, with red where `heat` (rows, cols), a value between 0 and 1 for each part of it, is large."""
    gray = image.convert('L').convert('RGB')
    alpha = Image.fromarray((170 * np.asarray(heat)).astype(np.uint8)).resize(image.size, Image.NEAREST)
    return Image.composite(Image.new('RGB', image.size, 'red'), gray, alpha)

CURVE_COLORS = ('#1f5fbf', '#c8551b', '#2e8b57', '#8a4fb0', '#808080', '#404040')

def plot(curves, x_label, y_label, width=800, height=500):
    """An RGB image: {name: [[(x, y), ...], ...]}, the lines of a name in one color; x from 0 on, y from 0 to 1."""
    face = load_font('', TEXT_SIZE)
    image = Image.new('RGB', (width, height), 'white')
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = 60, 20, width - 20, height - 50
    largest = max((x for lines in curves.values() for line in lines for x, _ in line), default=0) or 1
    step = next(step for step in (10.0**n * digit for n in range(-6, 9) for digit in (1, 2, 5)) if largest / step <= 10)
    x_max = math.ceil(largest / step) * step
    place = lambda x, y: (left + x / x_max * (right - left), bottom - y * (bottom - top))
    for i in range(round(x_max / step) + 1):
        x, y = place(i * step, 0)
        pen.line([(x, top), (x, bottom)], 'gainsboro')
        pen.text((x, bottom + 4), f'{i * step:g}', GRAY, face, anchor='ma')
    for i in range(6):
        x, y = place(0, i / 5)
        pen.line([(left, y), (right, y)], 'gainsboro')
        pen.text((left - 6, y), f'{i / 5:g}', GRAY, face, anchor='rm')
    pen.text(((left + right) / 2, height - 20), x_label, GRAY, face, anchor='mm')
    label = Image.new('RGB', (bottom - top, 20), 'white')
    ImageDraw.Draw(label).text((label.width / 2, 10), y_label, GRAY, face, anchor='mm')
    image.paste(label.rotate(90, expand=True), (2, top))
    for number, (name, lines) in enumerate(curves.items()):
        color = CURVE_COLORS[number % len(CURVE_COLORS)]
        for line in lines:
            points = [place(x, min(1, max(0, y))) for x, y in sorted(line)]
            pen.line(points, color, 2)
            for x, y in points:
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], color)
        pen.text((right - 8, top + 8 + 20 * number), name, color, face, anchor='ra')
    return image

TOKEN_FILLS = {'in_loss': '#a5e6a5', 'image': '#a9c9ff', 'special': '#d5d5d5', 'given': '#f6f6f6'}
TOKEN_CODES = {'in_loss': '30;42', 'image': '30;44', 'special': '2', 'given': '0'}  # of ANSI terminals

def token_types(idx, targets, enc):
    """The ids of an example, and the last target, as (text, type) for token_sheet; an image is one of them. enc: their
    tokenizer; targets: -1 where the next id is not in the loss.
    """
    ids = idx + [target for target in targets[-1:] if target >= 0]
    in_loss = [False, *(target >= 0 for target in targets)]
    tokens = []
    for is_image, run_of_ids in itertools.groupby(range(len(ids)), lambda i: ids[i] == enc.image_id):
        if is_image:
            tokens.append((f'{IMAGE} x {len(list(run_of_ids))}', 'image'))
            continue
        for i in run_of_ids:
            other_type = 'special' if ids[i] in enc.special.values() else 'given'
            tokens.append((enc.decode([ids[i]]), 'in_loss' if in_loss[i] else other_type))
    return tokens

def token_sheet(images, tokens, width=720):
    """An RGB image: the images in a row and, below them, (text, type) tokens, each in the color of its type."""
    face = load_font('', TEXT_SIZE)
    rows = [[thumbnail(image, width, 160) for image in images]]
    x = width
    for text, token_type in tokens:
        text = text.expandtabs(4).replace('\n', '\\n') or '\u00b7'
        text = ''.join(c if has_glyph(c) else '?' for c in text)
        tile = text_tile(text, math.ceil(face.getlength(text)) + 4, fill=TOKEN_FILLS[token_type])
        if x + tile.width > width:
            rows.append([])
            x = 0
        rows[-1].append(tile)
        x += tile.width + 1
    return stack_rows([row for row in rows if row], 1, 2)

MASK_COLORS = np.array([(110, 165, 110), (120, 145, 210), (205, 150, 95), (165, 120, 180)])  # of documents, in turn

def mask_image(docs, is_image, width=720):
    """The attention mask of a packed row as an RGB image: the token of a row attends to the colored columns, darker where
    that is an image's token. docs (T,): the number of each token's document, -1 for padding; is_image (T,), bool.
    """
    allowed = np.tril(docs[:, None] == docs) & (docs >= 0)                          # (T, T)
    colors = MASK_COLORS[docs % len(MASK_COLORS)] - 60 * is_image[:, None]          # (T, 3), of the columns
    pixels = np.where(allowed[..., None], colors, 255).astype(np.uint8)             # (T, T, 3)
    image = ImageOps.scale(Image.fromarray(pixels), max(1, width // len(docs)), Image.NEAREST)
    return ImageOps.expand(image, MARGIN, 'silver')

def colorize(tokens, ansi=True):
    """The same tokens as a string for a terminal, in colors or with those in the loss in double brackets."""
    out = ''
    for token_type, group in itertools.groupby(tokens, key=lambda token: token[1]):
        text = ''.join(text for text, _ in group)
        if ansi:
            text = f'\x1b[{TOKEN_CODES[token_type]}m{text}\x1b[0m'
        elif token_type == 'in_loss':
            text = f'[[{text}]]'
        out += text
    return out

# -----------------------------------------------------------------------------
# python render.py "some text" --out x.png

def draw_file(
    text,
    out='render.png',  # file to write
    width=512,         # pixels of the box; the quickstart's
    height=24,         # pixels of the box
    trim=True,         # cut the image to the width of the text
    font='',           # a .ttf/.otf file or a folder of them; '' is Pillow's built-in font
    distort=0.0,       # strength of the random colors, position, rotation, blur and noise, 0 to 1
    seed=1337,         # of these, and of the font of a folder
):
    """python render.py "some text" --out x.png draws the text into a file, as a model gets it."""
    rng = random.Random(seed)
    font = rng.choice(list_fonts(font))
    missing = set(text) - set(strip_unsupported(text, font))
    if missing:
        print(f'the font has no glyph for {sorted(missing)}: drawn as boxes', file=sys.stderr)
    image = draw(text, width, height, font, trim=trim, **augmentation(rng, distort))
    image.save(out)
    print(f'{out}: {image.width}x{image.height} pixels', file=sys.stderr)

def main():
    text, *words = sys.argv[1:] or ['--']
    if text == '--help':
        words = [text]
    elif text.startswith('--'):
        raise ValueError('expected the text first: python render.py "some text" --out x.png')
    call_with_knobs(draw_file, words, text)

if __name__ == '__main__':
    from configurator import call_with_knobs, run  # only the command line needs them
    run(main)
