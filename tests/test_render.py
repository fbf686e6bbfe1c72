"""What must stay true of drawing: nothing runs out of the box, nothing is lost, the same seed gives the same picture."""

import random

import numpy as np
import pytest
from conftest import inside, refused
from PIL import Image

import render
from render import DoesNotFit, contact_sheet, draw, drawable, fit, layout, load_font, split, wrap

WORDS = 'the quick brown fox jumps_over_the_lazy_dog {x: "y"} Ångström jÿ fjord [0] -> WWWWWWWWWWWWWWWW i\n    indented\n\n'


def random_text(rng):
    words = WORDS.split(' ')
    return 'A' + ' '.join(rng.choice(words) for _ in range(rng.randint(1, 60)))


def ink(image):
    """(left, top, right, bottom) of what differs from the corner's colour, or None."""
    dark = np.asarray(image.convert('L')) < 200
    ys, xs = np.nonzero(dark)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


@pytest.mark.parametrize('seed', range(25))
def test_fit_is_the_largest_size_that_does_not_overflow(seed):
    rng = random.Random(seed)
    text, width, height = random_text(rng), rng.randint(60, 500), rng.randint(40, 400)
    try:
        size, lines, _ = fit(text, width, height, max_size=60)
    except DoesNotFit:
        x0, y0, x1, y1 = layout(text, load_font('', render.MIN_SIZE), width)[1]
        assert x1 - x0 > width or y1 - y0 > height
        return
    # drawn on a canvas with a wide margin, all ink stays inside the box
    canvas = Image.new('RGB', (width + 200, height + 200), 'white')
    box = draw(text, width, height, size=size)
    assert box.size == (width, height)
    canvas.paste(box, (100, 100))
    found, (x0, y0, x1, y1) = layout(text, load_font('', size), width)
    assert found == lines and x1 - x0 <= width and y1 - y0 <= height
    bigger = layout(text, load_font('', size + 1), width)
    assert size == 60 or bigger is None or bigger[1][2] - bigger[1][0] > width or bigger[1][3] - bigger[1][1] > height


@pytest.mark.parametrize('seed', range(15))
def test_no_ink_is_cut_off(seed):
    """The picture holds exactly the ink that the same text has on a canvas without borders."""
    from PIL import ImageDraw
    rng = random.Random(seed)
    text, width, height = random_text(rng), rng.randint(150, 500), rng.randint(150, 400)
    try:
        size, lines, _ = fit(text, width, height, max_size=40)
    except DoesNotFit:
        return
    image = draw(text, width, height, size=size)
    free = Image.new('RGB', (2 * width + 400, 2 * height + 400), 'white')
    pitch = int(np.ceil(render.LEADING * size))
    for i, line in enumerate(lines):
        ImageDraw.Draw(free).text((200, 200 + i * pitch), line, font=load_font('', size), fill=0)
    count = lambda picture: int((np.asarray(picture.convert('L'), dtype=int) < 128).sum())
    assert count(image) == count(free) > 0


def test_what_does_not_fit_raises_and_is_told_from_what_is_empty():
    with pytest.raises(DoesNotFit, match='does not fit 40x10 pixels at font size 6'):
        draw('far too long for such a box', 40, 10)
    with pytest.raises(DoesNotFit):
        draw('W', 2, 2)
    for text in ('', ' \n\t '):
        with pytest.raises(ValueError, match='nothing to draw') as error:
            draw(text, 100, 100)
        assert not isinstance(error.value, DoesNotFit)


def test_wrapping_loses_no_character_but_the_spaces_it_breaks_at():
    font = load_font('', 14)
    for seed in range(20):
        text = random_text(random.Random(seed))
        lines = wrap(text, font, 150)
        assert ''.join(''.join(lines).split()) == ''.join(text.split())
        assert all(font.getlength(line) <= 150 for line in lines)


def test_newlines_and_indentation_survive():
    code = 'def f(x):\n    if x:\n\n        return 1'
    assert wrap(code, load_font('', 14), 300) == ['def f(x):', '    if x:', '', '        return 1']
    lefts = []
    for line in code.split('\n'):
        if line:
            lefts.append(ink(draw(line, 300, 20, size=14))[0])
    assert lefts[0] < lefts[1] - 10 < lefts[2] - 20


def test_trim_makes_the_picture_as_wide_as_its_line():
    wide, narrow = draw('a rather long line', 256, 16, trim=True), draw('short', 256, 16, trim=True)
    assert wide.height == narrow.height == 16 and 256 > wide.width > narrow.width > 20
    assert ink(narrow)[2] >= narrow.width - 3


def test_augmentation_is_seeded_and_never_loses_the_text():
    draws = [render.augmentation(random.Random(s), 1.0) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    pictures = [np.asarray(draw('Hello there', 300, 60, max_size=30, **d)) for d in draws]
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()
    for seed in range(30):
        extra = render.augmentation(random.Random(seed), 1.0)
        pixels = np.asarray(draw('Hello there', 300, 60, max_size=30, **extra).convert('L'), dtype=int)
        assert pixels.max() - pixels.min() > 60, seed
    assert render.augmentation(random.Random(0), 0.0) == {}


def test_position_moves_the_text_and_rotation_keeps_the_box():
    first, last = ink(draw('x', 100, 60, size=12)), ink(draw('x', 100, 60, size=12, position=(1, 1)))
    assert last[0] > first[0] + 60 and last[1] > first[1] + 30
    turned = draw('a line of text', 300, 60, rotate=3)
    assert turned.size == (300, 60)
    left, top, right, bottom = ink(turned)
    assert left > 0 and top > 0 and right < 300 and bottom < 60
    with pytest.raises(DoesNotFit, match='leaves no room'):
        draw('a line of text', 300, 8, rotate=5)


def test_colours_are_what_was_asked_for():
    image = draw('x', 40, 20, color=(200, 0, 0), background=(0, 0, 90))
    assert image.getpixel((39, 19)) == (0, 0, 90)
    assert max(r for _, (r, _, _) in image.getcolors(10000)) > 150


def test_characters_without_a_glyph_are_found():
    assert drawable('“it’s” 日本 é…') == '“it’s”  …'  # the built-in font knows no accents


def test_fonts_come_from_a_folder_and_bad_ones_are_named(tmp_path):
    with pytest.raises(ValueError, match='no .ttf or .otf file'):
        render.list_fonts(str(tmp_path))
    (tmp_path / 'broken.ttf').write_bytes(b'not a font')
    assert render.list_fonts(str(tmp_path) + '/.') == [str(tmp_path) + '/./broken.ttf']
    with pytest.raises(ValueError, match='broken.ttf is not a font'):
        draw('x', 100, 100, font=str(tmp_path / 'broken.ttf'))


@pytest.mark.parametrize('span', ['abcdefghijklmnopqrstuvwxyz', list(range(11)), 'abc'])
def test_split_keeps_everything_and_leaves_no_part_empty(span):
    shares = []
    for seed in range(300):
        prefix, infix, postfix = split(span, random.Random(seed), 0.1, 0.4)
        assert prefix + infix + postfix == span and prefix and infix and postfix
        shares.append(len(infix) / len(span))
    if len(span) > 10:
        assert min(shares) < 0.15 and max(shares) > 0.35 and max(shares) <= 0.4 + 0.5 / len(span)


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(ValueError, match='too short'):
        split('ab', random.Random(0))
    with pytest.raises(ValueError, match='ratio'):
        split('abcdef', random.Random(0), 0.5, 0.2)


def test_contact_sheet_is_green_for_right_and_red_for_wrong():
    images = [Image.new('RGB', (100, 20), 'white')] * 3
    colours = lambda right: {c for _, c in contact_sheet(images, ['caption'] * 3, right).getcolors(100000)}
    assert render.GREEN in colours([True] * 3) and render.RED not in colours([True] * 3)
    assert render.RED in colours([False] * 3) and render.GREEN not in colours([False] * 3)
    assert {render.GREEN, render.RED, render.GREY} <= colours([True, False, None])
    with pytest.raises(ValueError, match='as many captions as images'):
        contact_sheet(images, ['one'])


def test_command_line_shows_what_the_model_will_see(tmp_path):
    process = inside('render.py', 'some text', '--out', tmp_path / 'x.png')
    assert process.returncode == 0, process.stderr
    image = Image.open(tmp_path / 'x.png')
    assert (np.asarray(image) == np.asarray(draw('some text', 512, 24, trim=True))).all()
    refused(inside('render.py', ' '), 'nothing to draw')
    refused(inside('render.py', 'word ' * 500), 'does not fit')
