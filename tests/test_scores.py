"""Scores of answers: cases worked out by hand, and output no author of a metric thinks of."""
import random

import apted
import pytest

from evaluate import (
    METRICS,
    edit_similarity,
    final_number,
    letter,
    relabel_cost,
    relaxed_accuracy,
    table_nodes,
    teds,
    tree_edit_distance,
    yes_no,
)


@pytest.mark.parametrize('prediction, reference, expected', [
    ('105', '100', 1), ('95', '100', 1), ('106', '100', 0), ('94', '100', 0), ('-100', '100', 0), ('-98', '-100', 1),
    ('-50', '-100', 0),
    ('12%', '0.12', 1), ('12 %', '12%', 1), ('12%', '12', 0), ('12', '12%', 0), ('0.125', '12%', 1), ('%', '0', 0),
    ('1,234', '1234', 1), ('1234', '1,234.50', 1), ('-1,234,567', '-1234567', 1), ('1,200%', '12', 1),
    ('1,2', '12', 0), ('1234,567', '1234567', 0), ('$1,234.50', '1234.5', 0),
    ('2019', '2010', 1),                                       # a year is a number: the metric is that lenient
    ('0', '0', 1), ('0.0', '0', 0), ('0.001', '0', 0), ('0%', '0', 0), ('5', '0', 0), ('0', '5', 0),
    ('5.', '5', 1), ('Yes.', 'Yes', 0), ('12%.', '12%', 0),    # float() takes "5.", and text must match
    (' YES\n', 'yes', 1), ('Blue', 'blue', 1), ('blue green', 'blue', 0), ('ÉTÉ', 'été', 1), ('', '', 1), ('', '3', 0),
    ('nan', 'nan', 1), ('nan', '5', 0), ('inf', 'inf', 1), ('inf', '5', 0), ('5', 'inf', 0), ('1e400', '5', 0),
    ('1/0', '1/0', 1), ('-', '-', 1), ('-', '5', 0),
])
def test_relaxed_accuracy(prediction, reference, expected):
    assert relaxed_accuracy(prediction, reference) == expected


@pytest.mark.parametrize('prediction, reference, expected', [
    ('Yes', 'yes', 1), ('NO.', 'no', 1), ('**Yes**, there is no dog.', 'yes', 1), ('The answer is no', 'No', 1),
    ('_yes_', 'yes', 1), ('yes', 'no', 0), ('I know', 'no', 0), ('Yesterday', 'yes', 0), ('Not sure', 'no', 0),
    ('no1', 'no', 1), ('nó', 'no', 0), ('', 'yes', 0), ('maybe', 'maybe', 0), ('', '', 0),
])
def test_yes_no(prediction, reference, expected):
    assert yes_no(prediction, reference) == expected


@pytest.mark.parametrize('prediction, reference, expected', [
    ('A', 'A', 1), ('A.', 'A', 1), ('(B)', 'B', 1), ('Answer: C', 'C', 1), ('The answer is D.', 'D', 1), ('B', '(B)', 1),
    ('**C**', 'C', 1), ('A) cat', 'A', 1), ('A. A cat', 'A', 1), ('A - cat', 'A', 1), ("'B'", 'B', 1), ('G', 'G', 1),
    ('The answer is A because it barks', 'A', 1), ('Option A fits', 'A', 1), ('Answer: A because', 'A', 1),
    ('A\nThe cat', 'A', 1), ('A cat', 'A', 0), ('A Cat', 'A', 0), ('A cat, so B', 'B', 1),
    ('I think it is C', 'C', 1), ("I'm sure: D", 'D', 1),
    ('I’d say B', 'B', 1), ('An X-ray: C', 'C', 1), ('B because A is wrong', 'B', 1), ('B', 'A', 0), ('b', 'B', 0),
    ('Cat', 'C', 0), ('ÀB', 'B', 0), ('', 'A', 0), ('', '', 0), ('none', 'none', 0),
])
def test_letter(prediction, reference, expected):
    assert letter(prediction, reference) == expected


@pytest.mark.parametrize('prediction, reference, expected', [
    ('so 72', '6*12=72\n#### 72', 1), ('72.0', '72', 1), ('72.', '72', 1), ('She has $1,234.50.', '#### 1234.5', 1),
    ('$1,234.50', '1234.50', 1), ('####72\nQ: 2+2? #### 4', '72', 1), ('#### 72 of 100', '72', 1), ('#### $72', '72', 1),
    ('#### Step 1\n3 + 4 = 7', '7', 1), ('first 72, then 5', '72', 0), ('#### -3', '-3', 1), ('is -3', '3', 0),
    ('-$5', '-5', 1), ('10-3', '3', 1), ('1,000,000', '1000000', 1), ('1, 2, 3', '3', 1), ('1,2345', '2345', 1),
    ('12 %', '12', 1), ('٣', '3', 1), ('9' * 400, '9' * 399 + '8', 0), ('9007199254740993', '9007199254740992', 0),
    ('1/0', '0', 1), ('', '72', 0), ('-', '72', 0), ('nan', 'nan', 0), ('inf', 'inf', 0), ('', '', 0), ('72', '', 0),
])
def test_final_number(prediction, reference, expected):
    assert final_number(prediction, reference) == expected


@pytest.mark.parametrize('prediction, reference, expected', [
    ('abcd', 'abcd', 1), ('abcx', 'abcd', 3 / 4), ('', 'abcd', 0), ('abcd', '', 0), ('', '', 1),
    ('ab', 'abcdefgh', 1 / 4), ('abcdefgh', 'ab', 1 / 4), ('é😀', 'e😀', 1 / 2), ('kitten', 'sitting', 4 / 7),
])
def test_edit_similarity(prediction, reference, expected):
    assert edit_similarity(prediction, reference) == pytest.approx(expected)


def table(*rows, cell='td'):
    cells = [''.join(f'<{cell}>{text}</{cell}>' for text in row) for row in rows]
    return '<table>' + ''.join(f'<tr>{row}</tr>' for row in cells) + '</table>'

SQUARE = table(['ab', 'cd'], ['ef', 'gh'])                     # 6 nodes below <table>: 2 tr and 4 td


@pytest.mark.parametrize('prediction, expected', [
    (SQUARE, 1), (f'Here it is:\n```html\n{SQUARE}\n``` Bye', 1), (SQUARE + table(['x'] * 50), 1), (SQUARE.upper(), 1 / 3),
    (table(['ab', 'cd'], ['ef', 'gx']), 1 - 0.5 / 6),         # one of two characters of one cell
    (table(['ab', 'cd'], ['ef']), 1 - 1 / 6), (table(['ab', 'cd']), 1 - 3 / 6),
    (table(['ab', 'cd', 'ef', 'gh']), 1 - 3 / 6),             # a tr deleted and two inserted
    (table(['ab', 'cd'], ['ef', 'gh'], ['i']), 1 - 2 / 8),
    (table(['ab', 'cd'], ['ef', 'gh'], cell='th'), 1),
    (SQUARE.replace('<td>ab', '<td colspan="2">ab'), 1 - 1 / 6), (SQUARE.replace('<td>ab', '<td rowspan=2>ab'), 1 - 1 / 6),
    (SQUARE.replace('<td>', '<td colspan="1" style="x">'), 1), (SQUARE.replace('<td>ab', '<td colspan=two>ab'), 1),
    (SQUARE.replace('<table>', '<table><tbody>').replace('</table>', '</tbody></table>'), 1 - 1 / 7),
    ('<table><thead><tr><td>ab<td>cd<tfoot><tr><td>ef<td>gh', 1 - 2 / 8), (SQUARE.replace('</td>', '</td>x'), 1),
    (SQUARE.replace('>ab', '>\n <b>a</b> <br> b<!-- c -->\n '), 1 - 2 / 4 / 6),         # the cell reads "a  b"
    (SQUARE.replace('</td>', '').replace('</tr>', '').replace('</table>', ''), 1),       # never closed
    (SQUARE[:-len('gh</td></tr></table>')], 1 - 1 / 6),        # cut off before the last text
    (SQUARE.replace('</table>', '</table><tr><td>x'), 1), ('<table></table>', 0), ('<table>', 0),
    ('', 0), ('no table', 0), ('<tr><td>ab', 0), ('<table', 0), ('</table><table', 0),
])
def test_teds(prediction, expected):
    assert teds(prediction, SQUARE) == pytest.approx(expected)


def test_teds_without_a_reference_table():
    assert teds(SQUARE, '') == teds('', '') == teds(SQUARE, 'ab cd') == 0


def test_cell_text():
    cell = lambda text: table([text])
    assert teds(cell('a &lt; b'), cell('a < b')) == teds(cell(' a\n b '), cell('a b')) == 1
    assert teds(cell('a <b'), cell('a &lt;b')) == 1            # no tag, because no > follows
    assert teds(cell(''), cell('')) == teds('<table></table>', '<table></table>') == 1
    assert teds(cell(''), cell('ab')) == 1 - 1 / 2             # the cell of two nodes, tr and td, is all wrong


def test_tree_edit_distance_of_random_tables():
    """Against apted, which PubTabNet's code uses."""

    class Config(apted.Config):
        children = lambda self, tree: tree[1]
        rename = lambda self, a, b: relabel_cost(a[0], b[0])

    def to_tree(nodes):
        trees = []
        for node in nodes:
            n_children = sum(child.first >= node.first for child, _ in trees)
            trees[len(trees) - n_children:] = [(node, trees[len(trees) - n_children:])]
        return trees[0]

    rng = random.Random(0)
    parts = ['<tr>', '</tr>', '<td>', '<td>', '<td colspan=2>', '<tbody>', '<thead>', '</tbody>', 'a', 'bc', '<b>']
    for _ in range(200):
        a, b = (table_nodes('<table>' + ''.join(rng.choices(parts, k=rng.randrange(40)))) for _ in range(2))
        expected = apted.APTED(to_tree(a), to_tree(b), Config()).compute_edit_distance()
        assert tree_edit_distance(a, b) == pytest.approx(expected)


def test_teds_is_never_negative():
    assert teds('<table><tbody><tr><td>a', '<table><tr><tr><tr>') == 0   # 4 edits and 3 nodes


def test_endless_table(monkeypatch):
    """Cut, but scored no higher than the whole would be; equal if what was cut has no match anyway."""
    endless = table(*[['ab', 'cd']] * 2500)
    assert teds(endless, SQUARE) < 6 / 7500
    assert teds(table(*[['ab', 'cd']] * 400), table(*[['ab', 'cd']] * 20)) == pytest.approx(60 / 1200)
    assert teds(SQUARE + endless, SQUARE) == 1
    sizes = []
    monkeypatch.setattr('evaluate.tree_edit_distance', lambda a, b: sizes.append((len(a), len(b))) or 0)
    teds(endless, SQUARE)
    assert sizes == [(7 + 500 + 1, 7)]


LONG = 10**5
HOSTILE = ['', '-', '$1,234.50', '1/0', 'nan', 'inf', '12 %', '%', ',', '\x00', '\ud800', '²', '１２', '1e400', '5e-324',
           '1_0', '<![ x', '<table><![foo[ x ]]>', '<table', '<table><td colspan=two', '####', '.', 'I ', "A'",
           '9' * LONG, '<' * LONG, '<table>' + '<' + 'a' * LONG, '<table>' + '<a' + '-a' * LONG, '<table>' * 15000,
           '<table ' * 15000, '<table><td>' + '<b>x' * 25000, '#' * LONG, '1,111,' * 20000, '<!--' * 25000,
           'A ' * LONG, ' ' * LONG]


@pytest.mark.parametrize('name', METRICS)
def test_no_text_raises_or_hangs(name):
    for text in HOSTILE:
        for prediction, reference in ((text, '72'), ('72', text), (text, SQUARE), (SQUARE, text), (text, text)):
            value = METRICS[name](prediction, reference)
            assert type(value) is float and 0 <= value <= 1, (prediction[:40], reference[:40], value)
