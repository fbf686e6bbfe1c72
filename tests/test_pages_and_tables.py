"""Boxes -> text: tables as HTML written by hand, and pages of one and two columns in reading order."""

import random

import pytest

from prepare_data import docbank_text, read_voc, table_html

pytestmark = pytest.mark.filterwarnings('error')

# -----------------------------------------------------------------------------
# PubTables-1M

def grid(row_edges, column_edges, n_head=0, **spans):
    """The objects of a table with these edges of rows and columns, and (r0, r1, c0, c1) of other boxes."""
    box = lambda r0, r1, c0, c1: (column_edges[c0], row_edges[r0], column_edges[c1], row_edges[r1])
    n_rows, n_columns = len(row_edges) - 1, len(column_edges) - 1
    objects = [('table', box(0, n_rows, 0, n_columns))]
    objects += [('table row', box(r, r + 1, 0, n_columns)) for r in reversed(range(n_rows))]
    objects += [('table column', box(0, n_rows, c, c + 1)) for c in reversed(range(n_columns))]
    if n_head:
        objects.append(('table column header', box(0, n_head, 0, n_columns)))
    labels = {'spanning': 'table spanning cell', 'projected': 'table projected row header'}
    objects += [(labels[name], box(*span)) for name, boxes in spans.items() for span in boxes]
    return objects

def word(text, x, y, width=20, height=10):
    return {'bbox': [x, y, x + width, y + height], 'text': text}

TWO_BY_TWO = grid([0, 20.5, 40.25], [0, 50.5, 100], n_head=1)
FOUR_WORDS = [word('4', 60, 25), word('Name', 5, 5), word('a', 5, 25), word('Score', 60, 5)]

def test_plain_table():
    assert table_html(TWO_BY_TWO, FOUR_WORDS) == (
        '<table><thead><tr><td>Name</td><td>Score</td></tr></thead>'
        '<tbody><tr><td>a</td><td>4</td></tr></tbody></table>')

def test_no_header_and_only_header():
    body = table_html(grid([0, 20, 40], [0, 50]), [word('a', 5, 5)])
    assert body == '<table><tbody><tr><td>a</td></tr><tr><td></td></tr></tbody></table>'
    head = table_html(grid([0, 20], [0, 50], n_head=1), [word('a', 5, 5)])
    assert head == '<table><thead><tr><td>a</td></tr></thead></table>'

def test_column_and_row_span():
    objects = grid([0, 20, 40, 60], [0, 50, 100, 150], spanning=[(0, 1, 1, 3), (1, 3, 0, 1), (1, 3, 1, 3)])
    words = [word('a', 5, 5), word('b', 90, 5), word('c', 5, 35), word('d', 90, 35)]
    assert table_html(objects, words) == (
        '<table><tbody><tr><td>a</td><td colspan="2">b</td></tr>'
        '<tr><td rowspan="2">c</td><td colspan="2" rowspan="2">d</td></tr><tr></tr></tbody></table>')

def test_header_of_two_rows():
    objects = grid([0, 20, 40, 60], [0, 50, 100, 150], n_head=2, spanning=[(0, 1, 1, 3), (0, 2, 0, 1)])
    words = [word('Model', 5, 15), word('Score', 90, 5), word('dev', 60, 25), word('test', 110, 25),
             word('A', 5, 45), word('1', 60, 45), word('2', 110, 45)]
    assert table_html(objects, words) == (
        '<table><thead><tr><td rowspan="2">Model</td><td colspan="2">Score</td></tr>'
        '<tr><td>dev</td><td>test</td></tr></thead>'
        '<tbody><tr><td>A</td><td>1</td><td>2</td></tr></tbody></table>')

def test_projected_row_header():
    objects = grid([0, 20, 40, 60, 80], [0, 50, 100], n_head=1, projected=[(1, 2, 0, 2), (3, 4, 0, 2)])
    words = [word('Age', 60, 5), word('Men', 5, 25), word('x', 5, 45), word('7', 60, 45),
             word('Women', 45, 65)]
    assert table_html(objects, words) == (
        '<table><thead><tr><td></td><td>Age</td></tr></thead>'
        '<tbody><tr><td colspan="2">Men</td></tr><tr><td>x</td><td>7</td></tr>'
        '<tr><td colspan="2">Women</td></tr></tbody></table>')

def test_spanning_cell_takes_what_it_covers_by_half():
    objects = grid([0, 20], [0, 50, 100, 150])
    objects.append(('table spanning cell', (5, 1, 130, 19)))  # 81, 90 and 54 %
    assert table_html(objects, []) == '<table><tbody><tr><td colspan="3"></td></tr></tbody></table>'
    objects[-1] = ('table spanning cell', (5, 1, 127, 19))    # 81, 90 and 48.6 %
    assert table_html(objects, []) == '<table><tbody><tr><td colspan="2"></td><td></td></tr></tbody></table>'

def test_first_of_overlapping_spanning_cells_wins():
    objects = grid([0, 20], [0, 50, 100, 150], spanning=[(0, 1, 1, 3), (0, 1, 0, 2)])
    assert table_html(objects, []) == '<table><tbody><tr><td></td><td colspan="2"></td></tr></tbody></table>'

def test_spanning_cell_ends_with_the_header():
    objects = grid([0, 20, 40, 60], [0, 50, 100], n_head=2, spanning=[(0, 3, 0, 1)])
    assert table_html(objects, []) == (
        '<table><thead><tr><td rowspan="2"></td><td></td></tr><tr><td></td></tr></thead>'
        '<tbody><tr><td></td><td></td></tr></tbody></table>')

def test_two_lines_in_a_cell():
    objects = grid([0, 50], [0, 100])
    words = [word('day', 5, 25), word('good', 40, 6), word('very', 5, 5), word('2', 60, 4, 5, 7),
             word('night', 40, 24)]
    assert '<td>very good 2 day night</td>' in table_html(objects, words)

def test_word_across_two_cells_goes_to_the_larger_part():
    objects = grid([0, 20], [0, 50, 100])
    assert '<td></td><td>w</td>' in table_html(objects, [word('w', 38, 5, width=26)])
    assert '<td>w</td><td></td>' in table_html(objects, [word('w', 36, 5, width=26)])

def test_word_in_no_cell():
    objects = [('table', (0, 0, 120, 20)), ('table row', (0, 0, 100, 20)),
               ('table column', (0, 0, 30, 20)), ('table column', (80, 0, 100, 20))]
    words = [word('near', 60, 5, width=10), word('edge', 101, 5), word('below', 5, 30), word('side', 130, 5)]
    assert table_html(objects, words) == '<table><tbody><tr><td></td><td>near edge</td></tr></tbody></table>'

def test_text_is_escaped():
    words = [word('p<0.05', 5, 5), word(' ', 20, 5, width=2), word('R&D', 40, 5), word('"x"', 70, 5)]
    text = table_html(grid([0, 20], [0, 100]), words)
    assert text == '<table><tbody><tr><td>p&lt;0.05 R&amp;D "x"</td></tr></tbody></table>'

@pytest.mark.parametrize('label', ['table row', 'table column'])
def test_table_without_rows_or_columns(label):
    objects = [item for item in TWO_BY_TWO if item[0] != label]
    with pytest.raises(ValueError, match='^a table without rows or columns$'):
        table_html(objects, FOUR_WORDS)

def voc(objects):
    items = [f'<object><name>{label}</name><pose>Frontal</pose><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>'
             f'<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>' for label, (x0, y0, x1, y1) in objects]
    return f'<?xml version="1.0"?><annotation><folder/>{"".join(items)}</annotation>'.encode()

def test_read_voc():
    assert read_voc(voc(TWO_BY_TWO)) == TWO_BY_TWO
    assert read_voc(b'<annotation/>') == []

@pytest.mark.parametrize('damaged', [
    b'', b'no XML', voc(TWO_BY_TWO)[:200], b'<html/>', b'<?xml version="1.0" encoding="x"?><annotation/>',
    voc(TWO_BY_TWO).replace(b'100', b'wide'), voc(TWO_BY_TWO).replace(b'bndbox', b'box'),
    voc(TWO_BY_TWO).replace(b'<xmax>100</xmax>', b''), voc(TWO_BY_TWO).replace(b'<name>table</name>', b'')])
def test_damaged_annotation(damaged):
    with pytest.raises(ValueError, match='^the annotation is not VOC XML$'):
        read_voc(damaged)

# -----------------------------------------------------------------------------
# DocBank

def row(token, x0, y0, x1, y1, label):
    return f'{token}\t{x0}\t{y0}\t{x1}\t{y1}\t0\t0\t0\tCMR10\t{label}'

def line(text, x, y, width=None, label='paragraph', height=12):
    """The rows of a printed line, whose words fill `width` with spaces of 6, or are 8 wide per character."""
    words = text.split()
    share = 8 if width is None else (width - 6 * (len(words) - 1)) / sum(map(len, words))
    rows = []
    for token in words:
        rows.append(row(token, round(x), y, round(x + share * len(token)), y + height, label))
        x += share * len(token) + 6
    return rows

def tsv(*lines):
    return ''.join(f'{token}\r\n' for rows in lines for token in rows)

ONE_COLUMN = [
    line('A Short Title', 300, 60, label='title', height=20),
    line('The first paragraph has two lines of words', 100, 120, 800),
    line('and ends here.', 100, 135),
    line('The second is after a gap and has a hyphen-', 100, 165, 800),
    line('ated word in it; its label ends it too:', 100, 180, 800),
    line('a caption', 100, 195, label='caption'),
    line('The third paragraph is short.', 100, 210),
    line('An indented line starts the fourth', 115, 225, 785),
    line('and it goes on over the whole width of it.', 100, 240, 800)]
ONE_COLUMN_TEXT = '''\
A Short Title

The first paragraph has two lines of words
and ends here.

The second is after a gap and has a hyphen-
ated word in it; its label ends it too:

a caption

The third paragraph is short.

An indented line starts the fourth
and it goes on over the whole width of it.'''

def test_one_column():
    assert docbank_text(tsv(*ONE_COLUMN)) == ONE_COLUMN_TEXT

# the lines of the right column are between those of the left one, the usual case; DocBank lists them by y
TWO_COLUMNS = [
    line('17', 880, 30),
    line('A Title over Both of the Columns', 150, 70, 700, 'title', 20),
    line('An abstract that is as wide as the page', 150, 105, 700, 'abstract'),
    line('and has two lines in a paragraph', 150, 120, 700, 'abstract'),
    *[line(f'left text of line {i}', 80, 150 + 15 * i, 405) for i in range(20)],
    *[line(f'right text of line {i}', 515, 157 + 15 * i, 405) for i in range(20)],
    line('A caption below both of the columns', 100, 480, 800, 'caption'),
    line('left below', 80, 510), line('right below', 515, 510),
    line('3', 80, 960, label='footer')]
TWO_COLUMNS_TEXT = '\n\n'.join([
    '17',
    'A Title over Both of the Columns',
    'An abstract that is as wide as the page\nand has two lines in a paragraph',
    '\n'.join(f'left text of line {i}' for i in range(20)),
    '\n'.join(f'right text of line {i}' for i in range(20)),
    'A caption below both of the columns',
    'left below', 'right below', '3'])

def test_two_columns():
    assert docbank_text(tsv(*TWO_COLUMNS)) == TWO_COLUMNS_TEXT

LEFT = [line(f'left {i}', 80, 150 + 15 * i, 405) for i in range(9)]
RIGHT = [line(f'right {i}', 515, 150 + 15 * i, 405) for i in range(9)]
COLUMNS_TEXT = '\n\n'.join('\n'.join(f'{side} {i}' for i in range(9)) for side in ('left', 'right'))

def test_running_head_is_read_first():
    assert docbank_text(tsv(*LEFT, *RIGHT)) == COLUMNS_TEXT
    assert docbank_text(tsv(line('17', 880, 50), *LEFT, *RIGHT)) == '17\n\n' + COLUMNS_TEXT

@pytest.mark.parametrize('left_end, right_start', [(488, 498), (496, 504), (502, 512)])
def test_word_gap_of_a_title_at_the_gutter(left_end, right_start):
    title = [row('Left', 200, 120, left_end, 132, 'title'), row('Right', right_start, 120, 800, 132, 'title')]
    below = [row('Lower', 200, 135, left_end, 147, 'title'), row('Line', right_start, 135, 800, 147, 'title')]
    assert docbank_text(tsv(title, below, *LEFT, *RIGHT)) == 'Left Right\nLower Line\n\n' + COLUMNS_TEXT

def test_raised_symbol_of_a_full_width_line():
    title = line('A title as wide as the page', 100, 120, 700, 'title')
    symbol = [row('∫', 805, 112, 810, 127, 'title')]
    text = docbank_text(tsv(symbol, title, *LEFT, *RIGHT))
    assert text == 'A title as wide as the page ∫\n\n' + COLUMNS_TEXT

def test_two_columns_of_names_on_a_page_of_one_column():
    names = [line('Ada', 100, 150), line('Emmy', 100, 165), line('London', 700, 150), line('Oslo', 700, 165)]
    lines = [line('A line of text that is as wide as the page', 100, 180 + 15 * i, 800) for i in range(5)]
    assert docbank_text(tsv(*names, *lines)).startswith('Ada London\nEmmy Oslo\nA line')

def test_table_on_a_page_of_one_column_is_read_by_rows():
    names = [line(f'row {i}', 100, 200 + 15 * i, label='table') for i in range(30)]
    values = [line(f'cell {i}', 700, 200 + 15 * i, label='table') for i in range(30)]
    text = docbank_text(tsv(line('A line of text above it', 100, 100, 800), *names, *values))
    assert text.split('\n')[:4] == ['A line of text above it', '', 'row 0 cell 0', 'row 1 cell 1']

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('page, text', [(ONE_COLUMN, ONE_COLUMN_TEXT), (TWO_COLUMNS, TWO_COLUMNS_TEXT)])
def test_file_order_does_not_matter(page, text, seed):
    rows = [token for rows in page for token in rows]
    random.Random(seed).shuffle(rows)
    assert docbank_text(tsv(rows)) == text

def test_superscripts_and_tall_symbols_stay_in_their_line():
    lines = [line('above it all', 100, 100), line('the sum', 100, 115), line('below it all', 100, 130)]
    symbols = [row('2', 160, 112, 165, 121, 'paragraph'), row('∑', 175, 95, 190, 127, 'equation')]
    assert docbank_text(tsv(symbols, *lines)) == 'above it all\nthe sum 2 ∑\nbelow it all'

def test_markers_are_dropped():
    marks = [row('##LTLine##', 0, 140, 1000, 141, 'table'), row('##LTFigure##', 0, 0, 1000, 1000, 'figure'),
             row('', 100, 300, 110, 312, 'paragraph')]
    assert docbank_text(tsv(marks, *ONE_COLUMN)) == ONE_COLUMN_TEXT

def test_line_ends():
    page = tsv(*ONE_COLUMN)
    assert '\r' not in docbank_text(page)
    assert docbank_text(page.replace('\r\n', '\n')) == docbank_text(page.rstrip()) == ONE_COLUMN_TEXT
    assert docbank_text(tsv([row('a\u2028b', 0, 0, 10, 10, 'title')])) == 'a\u2028b'

@pytest.mark.parametrize('damaged', [
    'word', 'word\t1\t2\t3\t4\t0\t0\t0\tCMR10', 'word\t1\t2\t3\t4\t0\t0\t0\tCMR10\tparagraph\tmore',
    'word\t1\ttwo\t3\t4\t0\t0\t0\tCMR10\tparagraph', 'word\t1\tnan\t3\t4\t0\t0\t0\tCMR10\tparagraph'])
def test_damaged_row(damaged):
    with pytest.raises(ValueError, match='^a line of the page is not 10 fields$'):
        docbank_text(tsv(*ONE_COLUMN, [damaged]))

@pytest.mark.parametrize('page', ['', '\r\n', tsv([row('##LTLine##', 0, 140, 1000, 141, 'table')])])
def test_page_without_text(page):
    with pytest.raises(ValueError, match='^it has no text$'):
        docbank_text(page)
