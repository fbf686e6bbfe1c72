"""Text drawn as images: all ink stays inside the box, no character is lost, the same seed gives the same image."""

import random

import numpy as np
import pytest
from conftest import inside, refused
from PIL import Image, ImageDraw

import render
from render import DoesNotFit, contact_sheet, draw, fit, layout, load_font, split, strip_unsupported, wrap

WORDS = 'the quick brown fox jumps_over_the_lazy_dog {x: "y"} Ångström jÿ fjord [0] -> WWWWWWWWWWWWWWWW i\n    indented\n\n'


def random_text(rng):
    words = WORDS.split(' ')
    return 'A' + ' '.join(rng.choice(words) for _ in range(rng.randint(1, 60)))


def find_ink(image):
    """(left, top, right, bottom) of the dark pixels, or None."""
    dark = np.asarray(image.convert('L')) < 200
    ys, xs = np.nonzero(dark)
    if not len(xs):
        return None
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def ink_size(text, font_size, width):
    x0, y0, x1, y1 = layout(text, load_font('', font_size), width)[1]
    return x1 - x0, y1 - y0


@pytest.mark.parametrize('seed', range(25))
def test_fit_returns_the_largest_size_without_overflow(seed):
    rng = random.Random(seed)
    text = random_text(rng)
    width = rng.randint(60, 500)
    height = rng.randint(40, 400)
    try:
        size, lines, _ = fit(text, width, height, max_size=60)
    except DoesNotFit:
        ink_width, ink_height = ink_size(text, render.MIN_SIZE, width)
        assert ink_width > width or ink_height > height
        return
    assert draw(text, width, height, min_size=size, max_size=size).size == (width, height)
    assert layout(text, load_font('', size), width)[0] == lines
    ink_width, ink_height = ink_size(text, size, width)
    assert ink_width <= width and ink_height <= height
    ink_width, ink_height = ink_size(text, size + 1, width)
    assert size == 60 or ink_width > width or ink_height > height


@pytest.mark.parametrize('seed', range(15))
def test_no_ink_is_cut_off(seed):
    """The image has exactly the ink that the same text has on a canvas without borders."""
    rng = random.Random(seed)
    text = random_text(rng)
    width = rng.randint(150, 500)
    height = rng.randint(150, 400)
    try:
        size, lines, _ = fit(text, width, height, max_size=40)
    except DoesNotFit:
        return
    image = draw(text, width, height, min_size=size, max_size=size)
    canvas = Image.new('RGB', (2 * width + 400, 2 * height + 400), 'white')
    pitch = int(np.ceil(render.LEADING * size))
    for i, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((200, 200 + i * pitch), line, font=load_font('', size), fill=0)
    dark_pixels = [int((np.asarray(x.convert('L')) < 128).sum()) for x in (image, canvas)]
    assert dark_pixels[0] == dark_pixels[1] > 0


def test_overflow_and_empty_text_raise_different_errors():
    with pytest.raises(DoesNotFit, match='does not fit 40x10 pixels at font size 6'):
        draw('far too long for such a box', 40, 10)
    with pytest.raises(DoesNotFit):
        draw('W', 2, 2)
    with pytest.raises(DoesNotFit):
        draw('W', 2, 100)
    for text in ('', ' \n\t '):
        with pytest.raises(ValueError, match='nothing to draw') as error:
            draw(text, 100, 100)
        assert not isinstance(error.value, DoesNotFit)


def test_wrap_keeps_every_character_except_spaces_at_breaks():
    face = load_font('', 14)
    for seed in range(20):
        text = random_text(random.Random(seed))
        lines = wrap(text, 150, face.getlength)
        assert ''.join(''.join(lines).split()) == ''.join(text.split())
        assert all(face.getlength(line) <= 150 for line in lines)


def test_wrap_in_a_column_narrower_than_a_character_gives_one_a_line():
    assert wrap('WW\nW', 2, load_font('', 14).getlength) == ['W', 'W', 'W']
    assert wrap('', 2, load_font('', 14).getlength) == ['']


def test_wrap_keeps_newlines_and_indentation():
    code = 'def f(x):\n    if x:\n\n        return 1'
    lines = wrap(code, 300, load_font('', 14).getlength)
    assert lines == ['def f(x):', '    if x:', '', '        return 1']
    left = [find_ink(draw(line, 300, 20, max_size=14))[0] for line in lines if line]
    assert left[0] < left[1] - 10 < left[2] - 20


def test_trim_cuts_the_image_to_the_width_of_its_line():
    wide = draw('a rather long line', 256, 16, trim=True)
    narrow = draw('short', 256, 16, trim=True)
    assert wide.height == narrow.height == 16
    assert 256 > wide.width > narrow.width > 20
    assert find_ink(narrow)[2] >= narrow.width - 3


def test_augmentation_is_seeded_and_keeps_the_text_visible():
    args = [render.augmentation(random.Random(seed), 1.0) for seed in (1, 1, 2)]
    assert args[0] == args[1] != args[2]
    images = [np.asarray(draw('Hello there', 300, 60, max_size=30, **a)) for a in args]
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()
    for seed in range(30):
        extra = render.augmentation(random.Random(seed), 1.0)
        pixels = np.asarray(draw('Hello there', 300, 60, max_size=30, **extra).convert('L'), dtype=int)
        assert pixels.max() - pixels.min() > 60, seed
    assert render.augmentation(random.Random(0), 0.0) == {}


def test_position_moves_the_text_and_rotation_keeps_the_box():
    first = find_ink(draw('x', 100, 60, max_size=12))
    last = find_ink(draw('x', 100, 60, max_size=12, position=(1, 1)))
    assert last[0] > first[0] + 60 and last[1] > first[1] + 30
    turned = draw('a line of text', 300, 60, rotate=3)
    assert turned.size == (300, 60)
    left, top, right, bottom = find_ink(turned)
    assert left > 0 and top > 0 and right < 300 and bottom < 60
    with pytest.raises(DoesNotFit, match='leaves no room'):
        draw('a line of text', 300, 8, rotate=5)


def test_draw_uses_the_given_colors():
    image = draw('x', 40, 20, color=(200, 0, 0), background=(0, 0, 90))
    assert image.getpixel((39, 19)) == (0, 0, 90)
    assert max(r for _, (r, _, _) in image.getcolors(10000)) > 150


def test_strip_unsupported_removes_characters_without_a_glyph():
    assert strip_unsupported('“it’s” 日本 é…') == '“it’s”  …'  # the built-in font has no accents


def test_fonts_of_a_folder_are_listed_and_bad_ones_raise(tmp_path):
    with pytest.raises(ValueError, match='no .ttf or .otf file'):
        render.list_fonts(str(tmp_path))
    (tmp_path / 'broken.ttf').write_bytes(b'not a font')
    assert render.list_fonts(str(tmp_path) + '/.') == [str(tmp_path) + '/./broken.ttf']
    with pytest.raises(ValueError, match='broken.ttf is not a font'):
        draw('x', 100, 100, font=str(tmp_path / 'broken.ttf'))


@pytest.mark.parametrize('span', ['abcdefghijklmnopqrstuvwxyz', list(range(11)), 'abc'])
def test_split_keeps_every_element_and_leaves_no_part_empty(span):
    ratios = []
    for seed in range(300):
        prefix, infix, postfix = split(span, random.Random(seed), 0.1, 0.4)
        assert prefix + infix + postfix == span
        assert prefix and infix and postfix
        ratios.append(len(infix) / len(span))
    if len(span) > 10:
        assert min(ratios) < 0.15
        assert 0.35 < max(ratios) <= 0.4 + 0.5 / len(span)


def test_split_raises_for_short_spans_and_wrong_ratios():
    with pytest.raises(ValueError, match='too short'):
        split('ab', random.Random(0))
    with pytest.raises(ValueError, match='ratio'):
        split('abcdef', random.Random(0), 0.5, 0.2)


def sheet_colors(correct):
    images = [Image.new('RGB', (100, 20), 'white')] * 3
    sheet = contact_sheet(images, ['caption'] * 3, correct)
    return {color for _, color in sheet.getcolors(100000)}


def test_contact_sheet_is_green_for_correct_and_red_for_wrong():
    assert render.GREEN in sheet_colors([True] * 3) and render.RED not in sheet_colors([True] * 3)
    assert render.RED in sheet_colors([False] * 3) and render.GREEN not in sheet_colors([False] * 3)
    assert {render.GREEN, render.RED, render.GRAY} <= sheet_colors([True, False, None])
    assert render.GRAY in sheet_colors(None)
    with pytest.raises(ValueError, match='as many captions as images'):
        contact_sheet([Image.new('RGB', (100, 20))] * 3, ['one'])


TOKENS = [('<|user|>', 'special'), ('<image> x 4', 'image'), ('Hi', 'given'), ('a', 'in_loss'), ('b\n', 'in_loss')]


def test_token_sheet_fills_each_token_with_the_color_of_its_type():
    sheet = render.token_sheet([Image.new('RGB', (50, 20))], TOKENS)
    fills = {color for _, color in sheet.getcolors(100000)}
    for fill in ((0xa5, 0xe6, 0xa5), (0xa9, 0xc9, 0xff), (0xd5, 0xd5, 0xd5), (0xf6, 0xf6, 0xf6)):
        assert fill in fills


def test_colorize_marks_what_is_in_the_loss():
    assert render.colorize(TOKENS, ansi=False) == '<|user|><image> x 4Hi[[ab\n]]'
    assert render.colorize(TOKENS).endswith('\x1b[30;42mab\n\x1b[0m')


def test_command_line_writes_the_image_that_a_model_gets(tmp_path):
    process = inside('render.py', 'some text', '--out', tmp_path / 'x.png')
    assert process.returncode == 0, process.stderr
    image = Image.open(tmp_path / 'x.png')
    assert (np.asarray(image) == np.asarray(draw('some text', 512, 24, trim=True))).all()
    refused(inside('render.py', ' '), 'nothing to draw')
    refused(inside('render.py', 'word ' * 500), 'does not fit')
    refused(inside('render.py'), 'expected the text first')
    refused(inside('render.py', '--out=x.png'), 'expected the text first')
    refused(inside('render.py', 'some text', '--widht=9'), 'did you mean width')
    process = inside('render.py', '--help')
    assert process.returncode == 0 and '--distort=0.0' in process.stdout


def wrap_by_measuring_lines(text, width, length):
    """`wrap` in the slow and obvious way: the longest beginning of a text that fits, back to its last space."""
    lines = []
    for paragraph in text.expandtabs(4).split('\n'):
        while len(paragraph) > 1 and length(paragraph) > width:
            end = max([n for n in range(1, len(paragraph)) if length(paragraph[:n]) <= width], default=1)
            head, space, _ = paragraph[:end + 1].rpartition(' ')
            if not head.strip(' '):
                head, space = paragraph[:end], ''
            lines.append(head)
            paragraph = paragraph[len(head + space):]
        lines.append(paragraph)
    return lines


@pytest.mark.parametrize('seed', range(30))
def test_lines_break_where_measured_lines_would(seed):
    """A length of which words add up exactly, as those of most fonts do: 7 pixels a character."""
    rng = random.Random(seed)
    text = random_text(rng).replace(' i', ' ' * rng.randint(1, 4))
    width = rng.randint(42, 300)
    assert wrap(text, width, lambda s: 7 * len(s)) == wrap_by_measuring_lines(text, width, lambda s: 7 * len(s))


def test_lengths_of_words_add_up_in_the_built_in_font():
    face = load_font('', 23)
    for seed in range(20):
        for line in random_text(random.Random(seed)).split('\n'):
            parts = line.split(' ')
            total = sum(map(face.getlength, parts)) + (len(parts) - 1) * face.getlength(' ')
            assert total == pytest.approx(face.getlength(line), abs=0.1)


def test_text_without_spaces_or_width_is_drawn_and_not_kept_in_memory():
    render.short_word_length.cache_clear()
    long_word = 'x' * 3000
    size, lines, _ = fit(long_word, 400, 400)
    assert ''.join(lines) == long_word and size >= render.MIN_SIZE
    assert render.short_word_length.cache_info().currsize < 200  # beginnings of words of at most 32 characters
    assert fit('\u0301', 100, 30)[0] >= render.MIN_SIZE  # an accent of no width, if the font has one


def test_a_contact_sheet_has_as_many_columns_as_asked():
    images = [Image.new('RGB', (50, 20), 'red')] * 4
    sizes = [contact_sheet(images, ['a'] * 4, cell=60, columns=columns).size for columns in (1, 2, 4)]
    assert sizes[0][0] < sizes[1][0] < sizes[2][0] and sizes[0][1] > sizes[1][1] > sizes[2][1]
