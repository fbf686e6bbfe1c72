"""
Text -> images: the part of glimpse that turns any text into pictures a model can learn to read.

    fit            the largest font size at which the wrapped text fills a box and nothing runs out of it
    draw           the text as a PIL image, with seeded augmentation on request
    split          a span of tokens or characters -> prefix, infix, postfix; the infix is what gets drawn
    contact_sheet  pictures with captions, right ones green and wrong ones red: the eyes of the experimenter
    token_sheet    an example's images and tokens, what is learnt of them in green

What will the model see?

    $ python render.py "The quick brown fox" --out x.png
    $ python render.py "$(cat poem.txt)" --width=448 --height=448 --out page.png

The font is Pillow's built-in one (Aileron), or any .ttf/.otf file or folder of them.
"""

import functools
import itertools
import math
import os
import random
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

# -----------------------------------------------------------------------------
# fonts

MIN_SIZE, MAX_SIZE = 6, 200  # font sizes in pixels that `fit` tries unless told otherwise
LEADING = 1.4                # distance of two baselines, in font sizes


@functools.lru_cache(maxsize=1024)
def load_font(path, size):
    """The font at `size` pixels; path '' is Pillow's built-in one. Raises ValueError if the file is no font."""
    if not path:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise ValueError(f'{path} is not a font that can be read ({error}): expected a .ttf or .otf file') from error


@functools.lru_cache
def list_fonts(path):
    """['' (built-in)] for '', [path] for a file, all fonts below a folder in sorted order."""
    if not path or os.path.isfile(path):
        return [path]
    found = sorted(os.path.join(root, name) for root, _, names in os.walk(path)
                   for name in names if name.lower().endswith(('.ttf', '.otf')))
    if not found:
        raise ValueError(f'no .ttf or .otf file in font folder {path!r}')
    return found


@functools.lru_cache(maxsize=65536)
def has_glyph(character, path=''):
    """Whether the font can draw the character: a missing one comes out as the same little box as U+FFFF does."""
    if character.isspace():
        return character in ' \n\t'
    font = load_font(path, 16)
    return bytes(font.getmask(character)) != bytes(font.getmask('\uffff'))


def drawable(text, font=''):
    """The text without the characters that the font lacks; what remains can be drawn and therefore read."""
    return ''.join(c for c in text if has_glyph(c, font))


# -----------------------------------------------------------------------------
# fit: text and a box -> font size and lines

def wrap(text, font, width):
    """
    Breaks text into lines of at most `width` pixels, at spaces where it can and inside a word where it must.
    Newlines and indentation survive. Returns the lines, or None if a single character is wider than the box.
    """
    lines = []
    for paragraph in text.expandtabs(4).split('\n'):
        while font.getlength(paragraph) > width:
            # the longest head that fits, by bisection
            low, high = 0, len(paragraph)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if font.getlength(paragraph[:middle]) <= width else (low, middle)
            if low == 0:
                return None
            indent = len(paragraph) - len(paragraph.lstrip(' '))
            space = paragraph.rfind(' ', indent, low + 1)  # a space right behind the head is a fine place too
            cut, skip = (space, 1) if space > 0 else (low, 0)
            lines.append(paragraph[:cut])
            paragraph = paragraph[cut + skip:]
        lines.append(paragraph)
    return lines


def layout(text, font, width, leading=LEADING):
    """
    The text set in a column of `width` pixels: its lines, and the ink box (x0, y0, x1, y1) they need, in pixels,
    with the origin at the left end of the first ascender line. None if the column is too narrow for a character.
    """
    lines = wrap(text, font, width)
    if lines is None:
        return None
    ascent, descent = font.getmetrics()
    pitch = math.ceil(leading * font.size)
    # accents and italics can stand out of the font's own metrics, so the ink is measured, not assumed
    boxes = [font.getbbox(line) for line in lines]
    x0 = min(0, *(b[0] for b in boxes))
    y0 = min(0, boxes[0][1])
    x1 = max(b[2] for b in boxes)
    y1 = max(ascent + descent + pitch * (len(lines) - 1), *(pitch * i + b[3] for i, b in enumerate(boxes)), 0)
    return lines, (x0, y0, x1, y1)


class DoesNotFit(ValueError):
    """The text overflows its box even at the smallest font size that is allowed."""


@functools.lru_cache(maxsize=256)
def tallest(font, height, max_size):
    """The largest font size up to max_size of which one line is no higher than `height` pixels, or 0."""
    return next((size for size in range(max_size, 0, -1) if sum(load_font(font, size).getmetrics()) <= height), 0)


def fit(text, width, height, font='', min_size=MIN_SIZE, max_size=MAX_SIZE, leading=LEADING):
    """
    The largest font size, min_size <= size <= max_size, at which the wrapped text stays inside width x height pixels.
    Returns (size, lines, ink box), the last two as `layout` gives them. Raises ValueError for text without ink,
    DoesNotFit for text that overflows even at min_size.
    Binary search over cached fonts, as text-only VLM pretraining does it (sizes 12 to 200, leading 1.4).
    """
    if not text.strip():
        raise ValueError('there is nothing to draw: the text is empty or white space')
    low, high, best = min_size, tallest(font, height, max_size), None
    size = high  # a short line usually fits at the largest size that is not too high, so that is tried first
    while low <= high:
        found = layout(text, load_font(font, size), width, leading)
        if found and found[1][2] - found[1][0] <= width and found[1][3] - found[1][1] <= height:
            best, low = (size, *found), size + 1
        else:
            high = size - 1
        size = (low + high) // 2
    if best is None:
        raise DoesNotFit(f'a text of {len(text)} characters does not fit {width}x{height} pixels at font size '
                         f'{min_size}: shorten it or enlarge the box')
    return best


# -----------------------------------------------------------------------------
# draw: text -> image

def draw(text, width, height, font='', size=0, position=(0.0, 0.0), color=(0, 0, 0), background=(255, 255, 255),
         trim=False, pad=(0, 0), scale=1.0, rotate=0.0, blur=0.0, noise=0.0, seed=0, min_size=MIN_SIZE, max_size=MAX_SIZE,
         leading=LEADING):
    """
    Draws text into a box of width x height pixels. Returns an RGB PIL image.

    size      font size in pixels; 0 takes the largest that fits (`fit`)
    position  (x, y) in [0, 1]: where in the room that is left over the text stands; (0, 0) is top left
    trim      cut the picture to the width of the text: a picture as wide as its line, for a native-resolution encoder
    pad       pixels of background left and right of the text
    scale     share of the font size that would fit, so that `position` has room to move the text in
    rotate    degrees counter-clockwise; the box is kept, so the text is set smaller
    blur      radius of a Gaussian blur in pixels
    noise     standard deviation of pixel noise, in grey levels of 255, drawn from `seed`

    Raises ValueError if the text is empty or does not fit.
    """
    # a w x h box turned by an angle needs w cos + h sin by w sin + h cos: solve for what fits into ours
    c, s = math.cos(math.radians(abs(rotate))), math.sin(math.radians(abs(rotate)))
    inner_w, inner_h = int((width * c - height * s) / (c * c - s * s)), int((height * c - width * s) / (c * c - s * s))
    if inner_w <= sum(pad) or inner_h < 1:
        raise DoesNotFit(f'a box of {width}x{height} pixels leaves no room for text turned by {rotate} degrees')
    size, lines, ink = fit(text, inner_w - sum(pad), inner_h, font, size or min_size, size or max_size, leading)
    if scale < 1:
        size = max(min_size, round(size * scale))
        lines, ink = layout(text, load_font(font, size), inner_w - sum(pad), leading)
    face, (x0, y0, x1, y1) = load_font(font, size), ink
    if trim:
        surplus = inner_w - sum(pad) - math.ceil(x1 - x0)
        width, inner_w = width - surplus, inner_w - surplus
    image = Image.new('RGB', (inner_w, inner_h), background)
    pen = ImageDraw.Draw(image)
    x = pad[0] - x0 + position[0] * (inner_w - sum(pad) - (x1 - x0))
    y = -y0 + position[1] * (inner_h - (y1 - y0))
    pitch = math.ceil(leading * size)
    for i, line in enumerate(lines):
        pen.text((round(x), round(y) + i * pitch), line, font=face, fill=color)
    if rotate:
        image = image.rotate(rotate, Image.Resampling.BICUBIC, expand=True, fillcolor=background)
        page = Image.new('RGB', (width, height), background)
        page.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        image = page
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    if noise:
        image = add_noise(image, noise, seed)
    return image


def add_noise(image, sigma, seed):
    """Gaussian pixel noise of standard deviation `sigma` grey levels, the same for the same seed."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels + rng.normal(0.0, sigma, pixels.shape[:2])[..., None]  # one value for all three channels
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def augmentation(rng, strength=1.0):
    """
    Random arguments for `draw`: size, place, colours, rotation, blur and noise, scaled by strength in [0, 1]; 0 gives
    plain black on white in the corner. `rng` is a random.Random, so the picture is a function of its seed.
    """
    if not strength:
        return {}
    paper, ink = 255 - rng.random() * 60 * strength, rng.random() * 90 * strength
    tint = [rng.random() * 30 * strength for _ in range(3)]
    background, color = tuple(int(paper - t) for t in tint), tuple(int(ink + t) for t in tint)
    if rng.random() < 0.2 * strength:  # now and then light on dark
        background, color = color, background
    return dict(scale=1 - rng.random() * 0.5 * strength, position=(rng.random(), rng.random()),
                pad=(rng.randint(0, round(8 * strength)), rng.randint(0, round(8 * strength))),
                color=color, background=background,
                rotate=rng.uniform(-1, 1) * strength if rng.random() < 0.3 * strength else 0.0,
                blur=rng.random() * 0.6 * strength if rng.random() < 0.5 else 0.0,
                noise=rng.random() * 12 * strength, seed=rng.getrandbits(32))


# -----------------------------------------------------------------------------
# split: a span -> prefix, infix, postfix

def split(span, rng, low=0.1, high=0.4):
    """
    Cuts a list of tokens or a string into prefix, infix and postfix, none of them empty. The infix is a share
    r ~ U(low, high) of the span and starts at a uniformly random place: the recipe of text-only VLM pretraining.
    Raises ValueError if the span has fewer than three elements or the ratios are not 0 < low <= high < 1.
    """
    if not 0 < low <= high < 1:
        raise ValueError(f'the infix ratio must satisfy 0 < low <= high < 1, got {low} and {high}')
    if len(span) < 3:
        raise ValueError(f'a span of {len(span)} is too short to be split into prefix, infix and postfix')
    length = min(len(span) - 2, max(1, round(len(span) * rng.uniform(low, high))))
    start = rng.randint(1, len(span) - length - 1)
    return span[:start], span[start:start + length], span[start + length:]


# -----------------------------------------------------------------------------
# contact_sheet: what a run looks like

GREEN, RED, GREY = (0, 110, 40), (190, 20, 20), (60, 60, 60)


def contact_sheet(images, captions, right=None, columns=4, cell=400, font_size=15, caption_lines=6):
    """
    One RGB picture with all images in a grid, each with its caption below.

    images    PIL images; larger ones are scaled down to `cell` pixels of width, small ones drawn twice as large
    captions  one string each; wrapped, and cut with an ellipsis after caption_lines lines
    right     one bool or None each: the caption is green, red or grey; None for all grey
    """
    if not images or len(images) != len(captions):
        raise ValueError(f'a contact sheet needs as many captions as images, got {len(images)} and {len(captions)}')
    right = [None] * len(images) if right is None else right
    font, margin, pitch = load_font('', font_size), 8, round(font_size * 1.3)
    columns = min(columns, len(images))
    tiles = []
    for image, caption, ok in zip(images, captions, right):
        image = image.convert('RGB')
        scale = cell / image.width
        scale = min(int(scale), 2) if scale >= 1 else scale
        size = max(1, round(image.width * scale)), max(1, min(2 * cell, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
        lines = wrap(caption, font, cell)
        if len(lines) > caption_lines:
            lines = lines[:caption_lines - 1] + ['…']
        tile = Image.new('RGB', (cell, image.height + 4 + pitch * len(lines)), (255, 255, 255))
        tile.paste(image, (0, 0))
        pen = ImageDraw.Draw(tile)
        pen.rectangle((0, 0, image.width - 1, image.height - 1), outline=(200, 200, 200))
        for i, line in enumerate(lines):
            pen.text((0, image.height + 2 + i * pitch), line, font=font, fill=GREY if ok is None else GREEN if ok else RED)
        tiles.append(tile)
    rows = [tiles[i:i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new('RGB', (columns * (cell + margin) + margin, sum(heights) + margin * (len(rows) + 1)), (255,) * 3)
    y = margin
    for row, height in zip(rows, heights):
        for j, tile in enumerate(row):
            sheet.paste(tile, (margin + j * (cell + margin), y))
        y += height + margin
    return sheet


def similarity_grid(images, captions, values, cell=110, font_size=13):
    """
    Images as columns, captions as rows, values[row][column] (-1 to 1) written in the cells, the greener the larger; a frame
    around the largest of each row. Returns an RGB picture.
    """
    font, left = load_font('', font_size), 2 * cell
    wrapped = [wrap(caption, font, left - 10)[:4] for caption in captions]
    thumbs = [ImageOps.contain(image.convert('RGB'), (cell - 6, cell - 6)) for image in images]
    top, pitch = max(t.height for t in thumbs) + 12, round(font_size * 1.3)
    heights = [max(34, pitch * len(lines) + 8) for lines in wrapped]
    sheet = Image.new('RGB', (left + cell * len(images) + 8, top + sum(heights) + 8), 'white')
    pen = ImageDraw.Draw(sheet)
    for j, thumb in enumerate(thumbs):
        sheet.paste(thumb, (left + j * cell + (cell - thumb.width) // 2, 6))
    low, high = min(map(min, values)), max(map(max, values))
    y = top
    for lines, row, height in zip(wrapped, values, heights):
        for k, line in enumerate(lines):
            pen.text((6, y + 3 + k * pitch), line, font=font, fill='black')
        for j, value in enumerate(row):
            box = left + j * cell + 2, y + 2, left + (j + 1) * cell - 3, y + height - 3
            share = (value - low) / (high - low or 1)
            pale = round(255 - 150 * share)
            pen.rectangle(box, fill=(pale, 255 - round(40 * share), pale), outline='black' if value == max(row) else None)
            pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), f'{value:.2f}', font=font, fill='black', anchor='mm')
        y += height
    return sheet


def token_sheet(images, tokens, width=720, size=14, height=160):
    """
    Images side by side and, below them, a sequence of (text, kind) tokens, each in its box: green what is 'learnt', blue
    an 'image', grey what is 'special', white what is 'given'.
    """
    font, fills = load_font('', size), {'learnt': '#a5e6a5', 'image': '#a9c9ff', 'special': '#d5d5d5', 'given': '#f6f6f6'}
    boxes, x, y = [], 8, 8
    for text, kind in tokens:
        text = text.replace('\n', '\\n') or '\u00b7'
        text = ''.join(c if has_glyph(c) else '?' for c in text)
        wide = max(4, math.ceil(font.getlength(text))) + 3
        if x + wide > width - 8 and x > 8:
            x, y = 8, y + round(1.7 * size)
        boxes.append((x, y, wide, text, fills[kind]))
        x += wide + 1
    thumbnails = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    top = height + 16 if images else 0
    sheet = Image.new('RGB', (max(width, 8 + sum(t.width + 8 for t in thumbnails)), top + y + 2 * size), 'white')
    pen, left = ImageDraw.Draw(sheet), 8
    for thumbnail in thumbnails:
        sheet.paste(thumbnail, (left, 8))
        pen.rectangle((left, 8, left + thumbnail.width - 1, 7 + height), outline=(200, 200, 200))
        left += thumbnail.width + 8
    for x, y, wide, text, fill in boxes:
        pen.rectangle((x, top + y, x + wide, top + y + round(1.5 * size)), fill)
        pen.text((x + 2, top + y + 2), text, fill='black', font=font)
    return sheet


def coloured(tokens, ansi=True):
    """The same tokens as a terminal shows them; without colours, what is learnt stands in double brackets."""
    codes, out = {'learnt': '30;42', 'image': '30;44', 'special': '2', 'given': '0'}, ''
    for kind, group in itertools.groupby(tokens, key=lambda token: token[1]):
        text = ''.join(text for text, _ in group)
        out += f'\x1b[{codes[kind]}m{text}\x1b[0m' if ansi else f'[[{text}]]' if kind == 'learnt' else text
    return out


# -----------------------------------------------------------------------------
# python render.py "some text" --out x.png

out = 'render.png'  # file to write
width = 512         # box, in pixels: the quickstart's
height = 24
trim = True         # cut the picture to the width of the text
font = ''           # .ttf/.otf file or a folder of them; '' is Pillow's built-in font
distort = 0.0       # strength of the random colours, place, rotation, blur and noise, 0 to 1
seed = 1337


def main():
    from configurator import configure  # only the command line needs it: the functions above stand alone
    if len(sys.argv) < 2 or sys.argv[1].startswith('--') and sys.argv[1] != '--help':
        raise ValueError('expected the text first: python render.py "some text" --out x.png')
    text = sys.argv[1]
    configure(globals(), ['--help'] if text == '--help' else sys.argv[2:])
    rng = random.Random(seed)
    face = rng.choice(list_fonts(font))
    missing = sorted({c for c in text if not has_glyph(c, face)})
    if missing:
        print(f'the font has no glyph for {" ".join(map(repr, missing))}: drawn as boxes', file=sys.stderr)
    extra = augmentation(rng, distort)
    image = draw(text, width, height, face, trim=trim, **extra)
    image.save(out)
    print(f'{out}: {image.width}x{image.height} pixels', file=sys.stderr)


if __name__ == '__main__':
    from configurator import run
    run(main)
