"""
Words and their boxes -> what a model should answer when it reads a page or a table.

    docbank_text   the words of a page of DocBank -> its text, in reading order
    table_html     the words and cells of a table of PubTables-1M -> HTML

This file imports nothing of the project.
"""

import html
import xml.etree.ElementTree as ET
from collections import Counter

import numpy as np
# boxes of words: (x0, y0, x1, y1), with y downwards

def mostly_inside(a, b):
    """Whether more than half of the area of each of N boxes lies in each of M others, bool (N, M)."""
    a = np.reshape(a, (-1, 1, 4)).astype(float)
    b = np.reshape(b, (1, -1, 4)).astype(float)
    sizes = a[..., 2:] - a[..., :2]                                                   # (N, 1, 2)
    shared = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])  # (N, M, 2)
    return shared.clip(0).prod(-1) > 0.5 * sizes.prod(-1)

def group_lines(boxes):
    """Splits text boxes (N, 4) of one column into lines: lists of indices, top to bottom, each left to right.
    It compares the lower edges, which follow the baseline: large symbols overlap the lines above and below.
    """
    boxes = np.reshape(boxes, (-1, 4))
    order = np.argsort(boxes[:, 3], kind='stable')
    height = np.median(boxes[:, 3] - boxes[:, 1])
    starts = np.flatnonzero(np.diff(boxes[order, 3]) > height / 2) + 1
    lines = np.split(order, starts)
    return [sorted(line.tolist(), key=lambda i: boxes[i, 0]) for line in lines]

# DocBank: its files go down the page across both columns, which is not the reading order

PAGE = 1000   # boxes are in thousandths of the page's width and height
GUTTER = 14   # the least width of the white between two columns: LaTeX's is 16, a space is 4 to 12
BODY = ('paragraph', 'list', 'reference', 'abstract', 'section')  # a table has columns of its own

def docbank_text(tsv):
    """
    The text of a DocBank page from its tokens, rows of 10 fields: token x0 y0 x1 y1 R G B font label.
    One line for each printed line, and an empty line between paragraphs, which begin at a new label, a wide
    gap, an indented line or the top of a column. ValueError for a damaged row and for a page without text.
    """
    words, boxes, labels = read_docbank(tsv)
    lines = [column[line] for column in split_columns(boxes, labels) for line in group_lines(boxes[column])]
    lefts = np.array([boxes[line[0], 0] for line in lines])
    bottoms = np.array([np.median(boxes[line, 3]) for line in lines])
    line_labels = [Counter(labels[line]).most_common(1)[0][0] for line in lines]
    indents, steps = np.diff(lefts), np.diff(bottoms)
    pitch = np.median(steps[steps > 0]) if (steps > 0).any() else 0
    text = ' '.join(words[lines[0]])
    for line, indent, step, label, last in zip(lines[1:], indents, steps, line_labels[1:], line_labels):
        is_indented = label == 'paragraph' and 8 <= indent <= 40
        is_new = label != last or not 0 < step <= 1.5 * pitch or is_indented
        text += ('\n\n' if is_new else '\n') + ' '.join(words[line])
    return text

def read_docbank(tsv):
    """The tokens without those for drawn lines and figures: words (N,), boxes int (N, 4), labels (N,)."""
    lines = [line.rstrip('\r') for line in tsv.split('\n')]  # splitlines would split a token that has U+2028
    rows = [line.split('\t') for line in lines if line]
    if any(len(row) != 10 or not all(map(str.isdecimal, row[1:5])) for row in rows):
        raise ValueError('a line of the page is not 10 fields')
    rows = [row for row in rows if row[0].strip() and row[0] not in ('##LTLine##', '##LTFigure##')]
    if not rows:
        raise ValueError('it has no text')
    boxes = np.array([list(map(int, row[1:5])) for row in rows]).clip(0, PAGE)
    return np.array([row[0] for row in rows], object), boxes, np.array([row[9] for row in rows])

def split_columns(boxes, labels):
    """The tokens as arrays of indices, one for each column, in reading order. On a page with two
    columns, each stretch between full-width lines is read down the left and then down the right column.
    """
    gutter = find_gutter(boxes[np.isin(labels, BODY)])
    if gutter is None:
        return [np.arange(len(boxes))]
    across = (boxes[:, 2] > gutter) & (boxes[:, 0] < gutter + GUTTER)
    full_width = covered_rows(boxes[across], margin=3)  # a superscript can be a little outside of its line
    # a line at the edge of the page with white below or above it is a running head or foot
    filled = np.flatnonzero(covered_rows(boxes))
    whites = np.flatnonzero(np.diff(filled) > np.median(boxes[:, 3] - boxes[:, 1]))
    if len(whites):
        head_end, foot_start = filled[whites[0]] + 1, filled[whites[-1] + 1]
        full_width[:head_end] |= head_end < 0.1 * PAGE
        full_width[foot_start:] |= foot_start > 0.9 * PAGE
    middle = ((boxes[:, 1] + boxes[:, 3]) // 2).clip(max=PAGE - 1)
    stretch = np.cumsum(np.diff(full_width, prepend=False))[middle]
    is_right = (boxes[:, 0] > gutter) & ~full_width[middle]
    column = 2 * stretch + is_right
    return [np.flatnonzero(column == value) for value in np.unique(column)]

def find_gutter(boxes):
    """The left end of the white strip between two columns of boxes (N, 4): that with text on both sides in
    the most rows of the page. None if more rows have text across it.
    """
    xs = range(350, 650, 2)
    scores = []
    for x in xs:
        is_left, is_right = boxes[:, 2] <= x, boxes[:, 0] >= x + GUTTER
        across = covered_rows(boxes[~is_left & ~is_right])
        both = covered_rows(boxes[is_left]) & covered_rows(boxes[is_right]) & ~across
        scores.append(both.sum() - across.sum())
    best = [x for x, score in zip(xs, scores) if score == max(scores)]
    return best[len(best) // 2] if max(scores) > 0 else None

def covered_rows(boxes, margin=0):
    """Which rows of the page have a box, bool (PAGE,)."""
    starts = np.bincount((boxes[:, 1] - margin).clip(0), minlength=PAGE + 1)
    ends = np.bincount((boxes[:, 3] + margin).clip(max=PAGE), minlength=PAGE + 1)
    return np.cumsum(starts - ends)[:PAGE] > 0

# -----------------------------------------------------------------------------
# PubTables-1M

def read_voc(xml_bytes):
    """The objects of a PASCAL VOC annotation as [(label, box)], in pixels. ValueError for a damaged one."""
    sides = ('xmin', 'ymin', 'xmax', 'ymax')
    objects = []
    try:
        root = ET.fromstring(xml_bytes)
        if root.tag != 'annotation':
            raise ValueError(f'its root is <{root.tag}>')
        for item in root.iter('object'):
            box = tuple(float(item.find('bndbox').find(side).text) for side in sides)
            objects.append((item.find('name').text.strip(), box))
    except (ET.ParseError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError('the annotation is not VOC XML') from error
    return objects

def table_html(objects, words):
    """
    objects  [(label, box)], as from read_voc
    words    [{"bbox": box, "text": "..."}], as in PMC..._words.json; words outside the table are left out

    The grid is rows x columns, and spanning cells merge the grid cells that they cover. Written as in
    PubTabNet: the cells of header rows are <td> in a <thead>, as its metric, TEDS, reads text and spans of
    <td> alone (Table Transformer writes <th>). A projected row header is a <td> over all columns.
    ValueError for a table without rows or columns.
    """
    rows = sorted(select_boxes(objects, 'table row'), key=lambda box: box[1] + box[3])
    columns = sorted(select_boxes(objects, 'table column'), key=lambda box: box[0] + box[2])
    if not rows or not columns:
        raise ValueError('a table without rows or columns')
    in_header = mostly_inside(rows, select_boxes(objects, 'table column header')).any(1)
    n_head = [*in_header, False].index(False)
    spanning = select_boxes(objects, 'table spanning cell', 'table projected row header')
    cells = merge_cells(rows, columns, spanning, n_head)
    boxes = [(columns[c0][0], rows[r0][1], columns[c1 - 1][2], rows[r1 - 1][3]) for r0, c0, r1, c1 in cells]
    outline = np.array([*select_boxes(objects, 'table'), *rows, *columns])
    outline = [*outline[:, :2].min(0), *outline[:, 2:].max(0)]

    trs = [''] * len(rows)
    for (r0, c0, r1, c1), text in zip(cells, cell_texts(boxes, words, outline)):
        colspan = f' colspan="{c1 - c0}"' if c1 - c0 > 1 else ''
        rowspan = f' rowspan="{r1 - r0}"' if r1 - r0 > 1 else ''
        trs[r0] += f'<td{colspan}{rowspan}>{html.escape(text, quote=False)}</td>'
    trs = [f'<tr>{tds}</tr>' for tds in trs]
    thead = f'<thead>{"".join(trs[:n_head])}</thead>' if n_head else ''
    tbody = f'<tbody>{"".join(trs[n_head:])}</tbody>' if n_head < len(trs) else ''
    return f'<table>{thead}{tbody}</table>'

def select_boxes(objects, *labels):
    return [box for label, box in objects if label in labels]

def merge_cells(rows, columns, spanning, n_head):
    """The cells as sorted (r0, c0, r1, c1), ends exclusive. Of overlapping spanning boxes the first wins."""
    grid = [(column[0], row[1], column[2], row[3]) for row in rows for column in columns]
    taken = np.zeros((len(rows), len(columns)), bool)
    cells = []
    for covered in mostly_inside(grid, spanning).T:
        r, c = np.nonzero(covered.reshape(taken.shape))
        r = r[(r < n_head) == (r[:1] < n_head)]  # HTML has no cell that reaches from <thead> into <tbody>
        if not len(r):
            continue
        r0, c0, r1, c1 = r.min(), c.min(), r.max() + 1, c.max() + 1
        if not taken[r0:r1, c0:c1].any():
            taken[r0:r1, c0:c1] = True
            cells.append((r0, c0, r1, c1))
    cells += [(r, c, r + 1, c + 1) for r, c in zip(*np.nonzero(~taken))]
    return sorted(cells)

def cell_texts(boxes, words, outline):
    """The text of each cell. A word goes by its center: the cell with most of it has that, else the nearest."""
    boxes = np.array(boxes, float)
    members = [[] for _ in boxes]
    for word in words:
        center = np.reshape(word['bbox'], (2, 2)).mean(0)
        if (center >= outline[:2]).all() and (center <= outline[2:]).all():
            distance = np.maximum(boxes[:, :2] - center, center - boxes[:, 2:]).clip(0).sum(1)
            members[distance.argmin()].append(word)
    texts = []
    for cell in members:
        lines = group_lines([word['bbox'] for word in cell]) if cell else []
        text = ' '.join(cell[i]['text'] for line in lines for i in line)
        texts.append(' '.join(text.split()))
    return texts
