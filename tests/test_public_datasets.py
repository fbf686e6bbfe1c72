"""Public datasets: every command on small files in the exact format of its repository, damaged rows included."""

import gc
import importlib.util
import io
import json
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from conftest import inside, refused
from datasets import ClassLabel, Features, List, Value
from PIL import Image

import prepare_data
from dataloader import IMAGE, get_tokenizer, load_image, open_rows, tokenize
from evaluate import METRICS
from vision import VisionConfig

STRING, INT, BOOL = Value('string'), Value('int64'), Value('bool')
MESSAGES = List({'content': STRING, 'role': STRING})
PAIRS = List({'user': STRING, 'assistant': STRING})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    datasets.disable_progress_bars()


def picture(color='red', image_format='PNG', size=(40, 30), mode='RGB', **options):
    """An image of one color as a file's bytes; a number makes a color of its own."""
    file = io.BytesIO()
    Image.new(mode, size, (color, 90, 0) if isinstance(color, int) else color).save(file, image_format, **options)
    return file.getvalue()


def parquet(path, rows, **features):
    """A file as the hub has it. An image is given as bytes, or None."""
    path = Path('upstream', path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = lambda value: {'bytes': value, 'path': None} if isinstance(value, bytes) else value
    rows = [{key: [*map(encode, value)] if isinstance(value, list) else encode(value) for key, value in row.items()}
            for row in rows]
    datasets.Dataset.from_list(rows, features=Features(features)).to_parquet(path)


def readme(**configs):
    """The README.md of a repository: readme(config={split: file pattern})."""
    lines = ['---', 'configs:']
    for config, splits in configs.items():
        lines += [f'- config_name: "{config}"', '  data_files:']
        lines += [line for split, pattern in splits.items() for line in (f'  - split: {split}', f'    path: {pattern}')]
    Path('upstream').mkdir(exist_ok=True)
    Path('upstream', 'README.md').write_text('\n'.join([*lines, '---', '# A dataset']))


def tar_gz(name, members):
    Path('upstream', name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(Path('upstream', name), 'w:gz') as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read(name, part):
    return [json.loads(line) for line in Path(f'data/{name}/{part}.jsonl').read_text().splitlines()]


def written(name):
    """The files of a dataset: {path: bytes}. An index is made by who reads it."""
    files = (path for path in Path('data', name).rglob('*') if path.is_file() and path.suffix != '.index')
    return {str(path.relative_to(f'data/{name}')): path.read_bytes() for path in files}


def prepare(command, *words):
    """The examples that a command writes: .train, .val, .skipped {row: reason}, .stderr. Checks what holds for all of
    them: a second run writes the same, skipped rows are counted, each example can be tokenized and its answer be scored.
    """
    process = inside('prepare_data.py', command, '--source=upstream', *words)
    assert process.returncode == 0, process.stderr
    files = written(command)
    second = inside('prepare_data.py', command, '--source=upstream', '--name=second', *words)
    assert second.returncode == 0 and written('second') == files
    skipped = {row['row']: row['reason'] for row in read(command, 'skipped')}
    counted = sorted(line for line in process.stderr.splitlines() if line.startswith('skipped: '))
    assert counted == sorted(f'skipped: {n} rows, {reason}' for reason, n in Counter(skipped.values()).items())
    train, val = read(command, 'train'), read(command, 'val')
    assert f'data/{command}: {len(train)} examples to train on, {len(val)} held out\n' in process.stderr
    tokenizer = get_tokenizer('bytes')
    config = VisionConfig(vision_encoder='vit', image_token=tokenizer.image_id, block_size=4096)
    for side in ('train', 'val'):
        for example in open_rows(command, side):
            document = tokenize(example, tokenizer, config)
            assert len(document['images']) == len(example.get('images', ())) and max(document['targets']) >= 0
    assert metrics(train + val) <= {None, *METRICS}
    saved = {name for example in train + val for name in example.get('images', ()) if not name.startswith('/')}
    assert {name for name in files if name.startswith('images/')} == saved
    return SimpleNamespace(train=train, val=val, skipped=skipped, stderr=process.stderr)


def turns(example):
    """The contents of a conversation, without the <image> in front of the first question."""
    first, *others = (message['content'] for message in example['messages'])
    return [first.removeprefix(f'{IMAGE}\n'), *others]


def answers(examples):
    return [turns(example)[-1] for example in examples]


def check_prompts(examples, *wordings):
    """Every question is one of the wordings, after the image, and it is not always the same."""
    asked = {example['messages'][0]['content'] for example in examples}
    assert asked <= {f'{IMAGE}\n{wording}' for wording in wordings} and len(asked) > 1


def metrics(examples):
    return {example.get('metric') for example in examples}


# ---------------------------------------------------------------------------------------------------------------------
# charts, formulas

def chart(i, **changes):
    return {'image': picture(i), 'query': f'Question {i}?', 'label': [f'{i}.5', 'not this'], 'human_or_machine': i % 2,
            **changes}


def chartqa(path, rows):
    parquet(f'data/{path}.parquet', rows, image=datasets.Image(), query=STRING, label=List(STRING),
            human_or_machine=ClassLabel(names=['human', 'machine']))


def test_chartqa_takes_the_first_label_and_holds_out_upstreams_val():
    chartqa('train-00000-of-00003-49492f364babfa44', [chart(1), chart(2, label=[]), chart(3)])
    chartqa('train-00001-of-00003-7302bae5e425bbc7', [chart(4, query=''), chart(5, image=None), chart(6, label=None)])
    chartqa('train-00002-of-00003-194c9400785577a2', [chart(7), chart(8, label=[None])])
    chartqa('val-00000-of-00001-0f11003c77497969', [chart(11), chart(12)])
    chartqa('test-00000-of-00001-e2cd0b7a0f9eb20d', [chart(21)])
    out = prepare('chartqa')
    assert [turns(example) for example in out.train] == [[f'Question {i}?', f'{i}.5'] for i in (1, 3, 7)]
    assert [turns(example) for example in out.val] == [[f'Question {i}?', f'{i}.5'] for i in (11, 12)]
    assert metrics(out.train + out.val) == {'relaxed_accuracy'}
    assert load_image('data/chartqa/' + out.train[1]['images'][0]).getpixel((0, 0)) == (3, 90, 0)
    assert set(out.skipped) == {3, 5, 6, 7, 9}  # the rows that are held out come first: 0 and 1
    assert out.skipped[5] == 'an empty turn' and out.skipped[6] == 'the image is missing'
    assert 'a field is missing or of another type' in out.skipped[3]


def test_images_of_every_kind_are_read_as_they_look_and_damaged_ones_are_skipped():
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone held upright writes it: to be turned clockwise
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(noise, 'JPEG')
    images = {
        'plain': picture('red', 'JPEG'), 'missing': None, 'truncated': noise.getvalue()[:-800], 'no image': b'<!doctype html>',
        'empty': b'', 'clear': picture((255, 0, 0, 0), mode='RGBA'), 'half': picture((255, 0, 0, 128), mode='RGBA'),
        'gray': picture((100,), 'PNG', mode='L'),
        'cmyk': picture((0, 255, 255, 0), 'JPEG', mode='CMYK'), 'turned': picture('red', 'JPEG', exif=exif),
        'palette': picture((3,), 'GIF', mode='P'), 'sixteen': picture((25700,), 'PNG', mode='I;16')}
    chartqa('train-00000-of-00001-49492f364babfa44', [chart(0, image=data, query=name) for name, data in images.items()])
    chartqa('val-00000-of-00001-0f11003c77497969', [chart(200)])
    out = prepare('chartqa')
    names = list(images)
    assert {names[row - 1]: reason for row, reason in out.skipped.items()} == {
        'missing': 'the image is missing', 'empty': 'the image is missing', 'truncated': 'the image is broken',
        'no image': 'the image is broken'}
    loaded = {turns(example)[0]: load_image('data/chartqa/' + example['images'][0]) for example in out.train}
    assert len(loaded) == 8 and {image.mode for image in loaded.values()} == {'RGB'}
    pixels = {name: image.getpixel((20, 10)) for name, image in loaded.items()}
    assert pixels['clear'] == (255, 255, 255) and pixels['gray'] == pixels['sixteen'] == (100, 100, 100)
    assert pixels['half'] == pytest.approx((255, 127, 127), abs=2)
    for name in ('plain', 'cmyk', 'turned'):
        assert pixels[name] == pytest.approx((255, 0, 0), abs=8)
    assert loaded['turned'].size == (30, 40) and loaded['plain'].size == (40, 30)
    suffixes = {turns(example)[0]: Path(example['images'][0]).suffix for example in out.train}
    assert suffixes['cmyk'] == '.jpeg' and suffixes['palette'] == '.gif' and suffixes['clear'] == '.png'


def series(x, y, **changes):
    """A model of a plot as PlotQA's annotations have it."""
    return {'name': 'bar', 'color': '#A0CBE2', 'bboxes': [{'x': 1, 'y': 2, 'w': 3, 'h': 4}] * 2, 'label': 'Benin', 'x': x,
            'y': y, **changes}


def plotqa(split, plots):
    rows = [{'image': picture((i, 0, 90, 255), mode='RGBA'), 'text': plot if isinstance(plot, str | None) else json.dumps(plot)}
            for i, plot in enumerate(plots, len(split))]
    parquet(f'data/{split}-00000-of-00001.parquet', rows, image=datasets.Image(), text=STRING)


def test_plotqa_writes_the_data_as_a_table_with_a_column_for_each_series():
    plotqa('train', [
        [series(['2001', '2002'], [1.5, 20]), series(['2002', '2003'], [0.25, 3], label='Fiji')],
        [series([12.5, 7], ['Male', 'Female'], label='Share')],  # horizontal bars
        [series(['Jan'], [4], label=None, name='Rain')], *[[series(['a'], [i])] for i in range(4)],
        '[{"name": "cut', '[]', 'null', None, [series(['a', 'b'], [1])], [series([], [])], [{'name': 'pie'}], ['text']])
    plotqa('validation', [[series(['a'], [5])]])
    plotqa('test', [[series(['a'], [6])]])
    out = prepare('plotqa')
    assert answers(out.train)[:4] == [
        '|  | Benin | Fiji |\n| --- | --- | --- |\n| 2001 | 1.5 |  |\n| 2002 | 20 | 0.25 |\n| 2003 |  | 3 |',
        '|  | Share |\n| --- | --- |\n| Male | 12.5 |\n| Female | 7 |',
        '|  | Rain |\n| --- | --- |\n| Jan | 4 |', '|  | Benin |\n| --- | --- |\n| a | 0 |']
    assert answers(out.val) == ['|  | Benin |\n| --- | --- |\n| a | 5 |']
    check_prompts(out.train, 'Write the data of this plot as a table.', 'Convert this plot to a Markdown table.',
                  'Which values does this plot show?')
    assert metrics(out.train + out.val) == {None} and len(out.train) == 7
    assert set(out.skipped) == set(range(8, 16)) and out.skipped[8] == 'its text is not JSON'
    assert out.skipped[12] == out.skipped[13] == 'a series has no values, or not one for each x'
    assert load_image('data/plotqa/' + out.train[0]['images'][0]).getpixel((0, 0)) == (5, 0, 90)


def figure(i, *qa):
    return {'image': {'bytes': i if i is None else picture(i), 'path': f'{i}.png'},
            'qa': [{'question': question, 'answer': answer} for question, answer in qa]}


def test_figureqa_asks_all_questions_about_a_figure_in_one_conversation():
    rows = [figure(i, (f'Is Red {i}?', 'Yes.'), ('Is Blue?', 'No.'), ('Is Green?', 'No.')) for i in range(30)]
    rows += [figure(40), figure(None, ('Is Red?', 'Yes.')), figure(41, ('Is Red?', 'Yes.'), ('', 'No.')),
             figure(42, ('Is Red?', 'Yes.'), ('Is Blue?', None)), figure(43, ('Is Red?', None))]
    parquet('data/train-00000-of-00001.parquet', rows, image={'bytes': Value('binary'), 'path': STRING},
            qa=List({'question': STRING, 'answer': STRING}))
    out = prepare('figureqa', '--val_every=4')
    examples = {turns(example)[0]: example for example in out.train + out.val}
    assert set(examples) == {f'Is Red {i}?' for i in range(30)} and len(out.train + out.val) == 30
    assert turns(examples['Is Red 7?'])[1:] == ['Yes.', 'Is Blue?', 'No.', 'Is Green?', 'No.']
    assert all(str(example['messages']).count(IMAGE) == 1 for example in examples.values())
    assert metrics(examples.values()) == {'yes_no'} and 0 < len(out.val) < 15
    assert set(out.skipped) == set(range(30, 35))
    assert out.skipped[31] == 'the image is missing' and out.skipped[32] == 'an empty turn'


def test_latex_formulas_are_written_without_the_align_around_them():
    formula = lambda i, text: {'image': picture(i), 'latex_formula': text}
    rows = [formula(i, f'\\begin{{align*}}\nx_{{{i}}} &= \\frac{{1}}{{2}} \\\\\ny &= 3\n\\end{{align*}}') for i in range(30)]
    rows += [formula(30, 'x + 1'), formula(31, '\\begin{align*} \\end{align*}'), formula(32, None),
             formula(33, '\\begin{align*} a \\begin{cases} b \\end{cases} \\end{align*}\n')]
    for part in range(2):
        parquet(f'cleaned_formulas/train-0000{part}-of-00002.parquet', rows[17 * part:17 * part + 17], image=datasets.Image(),
                latex_formula=STRING)
    parquet('raw_formulas/train-00000-of-00001.parquet', [formula(99, 'another configuration')], image=datasets.Image(),
            latex_formula=STRING)
    out = prepare('latex-formulas', '--val_every=4')
    expected = [f'x_{{{i}}} &= \\frac{{1}}{{2}} \\\\\ny &= 3' for i in range(30)]
    assert sorted(answers(out.train + out.val)) == sorted([*expected, 'x + 1', 'a \\begin{cases} b \\end{cases}'])
    assert out.skipped[31] == 'an empty turn' and set(out.skipped) == {31, 32} and len(out.val) > 2
    check_prompts(out.train, 'Write this formula in LaTeX.', 'Convert this formula to LaTeX.',
                  'What is the LaTeX of this formula?')
    assert metrics(out.train + out.val) == {None}


# ---------------------------------------------------------------------------------------------------------------------
# conversations about images

def pairs(*texts):
    return [{'user': user, 'assistant': assistant} for user, assistant in zip(texts[::2], texts[1::2])]


def test_finevision_and_the_cauldron_put_the_images_in_front_of_the_first_question():
    rows = [{'images': [picture(i)], 'texts': pairs(f'Question {i}?', 'Yes.')} for i in range(20)]
    rows += [{'images': [picture(50), picture(51)], 'texts': pairs('Compare.', 'Alike.', 'Sure?', 'Yes.')},
             {'images': None, 'texts': pairs('No image?', 'None.')}, {'images': [], 'texts': pairs('Empty?', 'None.')},
             {'images': [picture(52), None], 'texts': pairs('Half?', 'Half.')},
             {'images': [picture(53)], 'texts': []}, {'images': [picture(54)], 'texts': None},
             {'images': [picture(55)], 'texts': pairs('Why?', None)}, {'images': [picture(56)], 'texts': pairs('Why?', ' ')},
             {'images': [picture(57)], 'texts': pairs('What does <image><image> mean?', 'Nothing.')}]
    ratings = {'source': 'ai2d', 'relevance_ratings': None, 'relevance_min': None}
    parquet('ai2d_merged/train-00000-of-00001.parquet', [{**row, **ratings} for row in rows], texts=PAIRS, source=STRING,
            images=List(datasets.Image()), relevance_ratings=List(INT), relevance_min=INT)
    parquet('other/train-00000-of-00001.parquet', rows[:1], images=List(datasets.Image()), texts=PAIRS)
    sourced = [{**row, 'texts': row['texts'] and [{**text, 'source': 'AI2D'} for text in row['texts']]} for row in rows]
    parquet('ai2d/train-00000-of-00001-2ce340398c113b79.parquet', sourced, images=List(datasets.Image()),
            texts=List({'user': STRING, 'assistant': STRING, 'source': STRING}))
    for command, subset in (('finevision', 'ai2d_merged'), ('cauldron', 'ai2d')):
        out = prepare(command, f'--subset={subset}', '--val_every=4')
        examples = {turns(example)[0]: example for example in out.train + out.val}
        assert len(out.train + out.val) == 23 and len(out.val) > 2
        assert examples['Question 3?']['messages'] == [{'role': 'user', 'content': '<image>\nQuestion 3?'},
                                                       {'role': 'assistant', 'content': 'Yes.'}]
        both = next(example for example in examples.values() if len(example['images']) == 2)
        assert [message['content'] for message in both['messages']] == ['<image>\n<image>\nCompare.', 'Alike.', 'Sure?', 'Yes.']
        colors = [load_image(f'data/{command}/{name}').getpixel((0, 0))[0] for name in both['images']]
        assert colors == [50, 51]
        assert examples['No image?']['images'] == examples['Empty?']['images'] == []
        assert set(out.skipped) == set(range(23, 29)) and out.skipped[23] == 'the image is missing'
        assert out.skipped[27] == 'an empty turn' and out.skipped[28] == '2 <image> places for 1 images'
        shutil.rmtree('data')


@pytest.mark.parametrize('key', ['messages', 'conversations', 'texts'])
def test_hub_reads_conversations_under_each_of_their_names(key):
    features = {'messages': MESSAGES, 'texts': PAIRS, 'conversations': List({'from': STRING, 'value': STRING})}[key]

    def talk(question, answer):
        return {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}],
                'conversations': [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}],
                'texts': pairs(question, answer)}[key]

    rows = [{'id': i, 'image': picture(i), key: talk(f'What is {i}?', 'A number.')} for i in range(4)]
    rows += [{'id': 4, 'image': picture(4), key: talk('Where?\n<image>', 'Here.')},
             {'id': 5, 'image': None, key: talk('Hi', 'Hi')}, {'id': 6, 'image': picture(6), key: []}]
    parquet('data/train-00000-of-00001.parquet', rows, id=INT, image=datasets.Image(), **{key: features})
    parquet('data/validation-00000-of-00001.parquet', rows[:1], id=INT, image=datasets.Image(), **{key: features})
    out = prepare('hub')
    contents = [[message['content'] for message in example['messages']] for example in out.train]
    assert contents[:4] == [[f'<image>\nWhat is {i}?', 'A number.'] for i in range(4)]
    assert contents[4:] == [['Where?\n<image>', 'Here.'], ['Hi', 'Hi']]
    assert [len(example['images']) for example in out.train] == [1] * 5 + [0] and len(out.val) == 1
    assert list(out.skipped) == [7] and read('hub', 'skipped')[0]['id'] == 6


# ---------------------------------------------------------------------------------------------------------------------
# conversations and texts

def test_smol_smoltalk_keeps_the_system_turn_and_begins_with_a_question():
    roles = {'s': 'system', 'u': 'user', 'a': 'assistant'}
    talk = lambda order, **contents: {'source': 'everyday', 'messages': [
        {'role': roles[role], 'content': contents.get(role, f'{role}{i}')} for i, role in enumerate(order)]}
    rows = [talk('ua'), talk('suaua'), talk('aua'), talk('uau'), talk('ua', a=''), talk('ua', u=' \n'), talk('sua', s=''),
            talk('s'), talk('uaa'), talk('ua', a=None)]
    features = {'messages': MESSAGES, 'source': STRING}
    parquet('data/train-00000-of-00002.parquet', rows[:5], **features)
    parquet('data/train-00001-of-00002.parquet', rows[5:], **features)
    parquet('data/test-00000-of-00001.parquet', [talk('ua', u='held out')], **features)
    out = prepare('smol-smoltalk')
    contents = [[message['content'] for message in example['messages']] for example in out.train]
    assert contents == [['u0', 'a1'], ['s0', 'u1', 'a2', 'u3', 'a4'], ['u1', 'a2'], ['u0', 'a1'], ['', 'u1', 'a2']]
    assert [message['role'] for message in out.train[1]['messages']] == ['system', *['user', 'assistant'] * 2]
    assert [turns(example)[0] for example in out.val] == ['held out']
    assert set(out.skipped) == {5, 6, 8, 9, 10} and out.skipped[5] == out.skipped[6] == 'an empty turn'
    assert out.skipped[8] == out.skipped[9] == 'no questions and answers by turns'


def test_smoltalk_is_found_by_the_configuration_in_its_readme():
    talk = lambda text: {'messages': [{'role': 'user', 'content': text}, {'role': 'assistant', 'content': 'Yes.'}]}
    for split in ('train', 'test'):
        parquet(f'data/all/{split}-00000-of-00001.parquet', [talk(split)], messages=MESSAGES)
        parquet(f'data/rewrite/{split}-00000-of-00001.parquet', [talk('other')], messages=MESSAGES)
    readme(**{config: {split: f'data/{config}/{split}-*' for split in ('train', 'test')} for config in ('rewrite', 'all')})
    out = prepare('smoltalk')
    assert [turns(example)[0] for example in out.train] == ['train'] and [turns(e)[0] for e in out.val] == ['test']


MMLU = ('test', 'validation', 'dev', 'auxiliary_train')


def mmlu():
    question = lambda text, answer, n=4: {'question': text, 'subject': '', 'choices': [f'{text}{i}' for i in range(n)],
                                          'answer': answer}
    rows = {split: [question(f'{split} {i}', i) for i in range(4)] for split in MMLU}
    rows['auxiliary_train'] += [question('no choices', 2, 0), question('no answer', None), question('', 1)]
    for split in MMLU:
        parquet(f'all/{split}-00000-of-00001.parquet', rows[split], question=STRING, subject=STRING, choices=List(STRING),
                answer=ClassLabel(names=['A', 'B', 'C', 'D']))


def test_mmlu_trains_on_the_auxiliary_part_and_holds_out_validation():
    mmlu()
    out = prepare('mmlu')
    options = '- auxiliary_train 20=A\n- auxiliary_train 21=B\n- auxiliary_train 22=C\n- auxiliary_train 23=D'
    assert turns(out.train[2]) == [f'auxiliary_train 2\n{options}\nAnswer with the letter only.', 'C']
    assert answers(out.train[:4]) == ['A', 'B', 'C', 'D'] and metrics(out.train + out.val) == {'letter'}
    held_out = {turns(example)[0].split()[0] for example in out.val}
    assert 'validation' in held_out and held_out <= {'validation', 'dev'}  # by its name `datasets` adds dev in a folder
    assert any('another type' in reason for reason in out.skipped.values())


def test_the_hub_is_streamed_with_the_configuration_of_the_table(monkeypatch):
    mmlu()
    readme(all={split: f'all/{split}-*' for split in MMLU})
    load, calls = datasets.load_dataset, []

    def hub(*args, **kwargs):
        calls.append((args, kwargs))
        return load('upstream', 'all', **kwargs)

    monkeypatch.setattr(datasets, 'load_dataset', hub)
    assert inside('prepare_data.py', 'mmlu').returncode == 0
    assert calls == [(('cais/mmlu', 'all'), {'streaming': True})]
    assert [turns(example)[0].split('\n')[0] for example in read('mmlu', 'val')] == [f'validation {i}' for i in range(4)]
    assert [turns(example)[0].split()[0] for example in read('mmlu', 'train')][:4] == ['auxiliary_train'] * 4


def test_gsm8k_keeps_the_answer_as_it_is_and_holds_out_the_test_set():
    answer = 'Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nThat is <<48+24=72>>72.\n#### 72'
    rows = [{'question': 'How many clips?', 'answer': answer}, {'question': 'How?', 'answer': ''}]
    for config in ('main', 'socratic'):
        for split in ('train', 'test'):
            parquet(f'{config}/{split}-00000-of-00001.parquet', [{**row, 'question': f'{config} {split} {row["question"]}'}
                                                                for row in rows], question=STRING, answer=STRING)
    out = prepare('gsm8k')
    assert [turns(example) for example in out.train] == [['main train How many clips?', answer]]
    assert [turns(example) for example in out.val] == [['main test How many clips?', answer]]
    assert metrics(out.train + out.val) == {'final_number'} and set(out.skipped.values()) == {'an empty turn'}


def article(title, *lines):
    """An article as upstream has it: a row is a line."""
    section = ['', ' = = A section = = \n', '', ' Its text . \n', '']
    return ['', f' = {title} = \n', '', *(f' {line} \n' for line in lines), *section]


def test_wikitext_joins_lines_to_articles():
    rows = {'train': article('Robert Boulter', 'He is an actor .', 'x = 1 = y') + article('Valkyria 3', 'A game .'),
            'validation': article('Homarus', 'A lobster .'), 'test': article('Never', 'Not to train on .')}
    lines = [{'text': line} for line in rows['train']]
    parquet('wikitext-103-raw-v1/train-00000-of-00002.parquet', lines[:5], text=STRING)
    parquet('wikitext-103-raw-v1/train-00001-of-00002.parquet', lines[5:], text=STRING)
    for split in ('validation', 'test'):
        parquet(f'wikitext-103-raw-v1/{split}-00000-of-00001.parquet', [{'text': line} for line in rows[split]], text=STRING)
    parquet('wikitext-2-v1/train-00000-of-00001.parquet', [{'text': 'another configuration'}], text=STRING)
    out = prepare('wikitext')
    first, second = (example['text'] for example in out.train)
    body = '\n = = A section = = \n\n Its text . \n\n'
    assert first.strip('\n') == f' = Robert Boulter = \n\n He is an actor . \n x = 1 = y \n{body}'.strip('\n')
    assert second.strip('\n') == f' = Valkyria 3 = \n\n A game . \n{body}'.strip('\n')
    assert [example['text'].strip('\n') for example in out.val] == [f' = Homarus = \n\n A lobster . \n{body}'.strip('\n')]
    assert not out.skipped, 'the blank line before the first title is no article'


def test_tinystories_are_one_text_each():
    stories = [f'Once there was a fox {i}.\n\nThe end.' for i in range(5)]
    parquet('data/train-00000-of-00002-2d5a1467fff1081b.parquet', [{'text': text} for text in stories[:3]], text=STRING)
    parquet('data/train-00001-of-00002-5852b56a2bd28fd9.parquet', [{'text': text} for text in [*stories[3:], '', None, ' \n']],
            text=STRING)
    parquet('data/validation-00000-of-00001-869c898b519ad725.parquet', [{'text': 'Held out <image>.'}], text=STRING)
    out = prepare('tinystories')
    assert out.train == [{'text': text} for text in stories] and out.val == [{'text': 'Held out <image>.'}]
    assert set(out.skipped) == {6, 7, 8} and out.skipped[6] == out.skipped[8] == 'it has no text'


def test_custom_json_reads_arrays_and_our_format_and_counts_broken_lines():
    talk = lambda i: [{'role': 'user', 'content': f'Question {i}?'}, {'role': 'assistant', 'content': 'Yes.'}]
    Path('upstream/more').mkdir(parents=True)
    Path('upstream/more/red.png').write_bytes(picture('red'))
    lines = [json.dumps(talk(i)) for i in range(20)]
    lines += ['', json.dumps({'messages': talk(20)}), json.dumps({'text': 'A text.'}), '[{"role": "user", "con', '3', '[]',
              json.dumps(talk(21)[:1]), json.dumps([{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': ''}]),
              '[{"role": "user", "content": "What is \\ud83d?"}, {"role": "assistant", "content": "Half a character."}]']
    Path('upstream/a.jsonl').write_text('\n'.join(lines))
    images = [{'messages': talk(30), 'images': ['red.png'], 'id': 30}, {'messages': talk(31), 'images': ['gone.png']},
              {'text': '<image>Red.', 'images': ['red.png']}]
    Path('upstream/more/b.jsonl').write_text('\n'.join(map(json.dumps, images)))
    out = prepare('custom_json', '--val_every=4')
    examples = out.train + out.val
    assert {turns(example)[0] for example in examples if 'messages' in example} == {
        *(f'Question {i}?' for i in (*range(21), 30)), 'What is ??'} and len(out.val) > 2
    red = str(Path('upstream/more/red.png').resolve())
    assert {'messages': [{'role': 'user', 'content': '<image>\nQuestion 30?'}, {'role': 'assistant', 'content': 'Yes.'}],
            'images': [red], 'id': 30} in examples
    assert {'text': '<image>Red.', 'images': [red]} in examples and {'text': 'A text.'} in examples
    half, = (example for example in examples if example.get('messages', [{}])[-1].get('content') == 'Half a character.')
    assert half['messages'][0]['content'] == 'What is ??'
    assert len(examples) == 25 and set(out.skipped) == {22, 23, 24, 25, 26, 29}
    assert out.skipped[22] == 'the line is not JSON' and out.skipped[25] == 'no questions and answers by turns'
    assert out.skipped[26] == 'an empty turn' and out.skipped[29] == 'the image is missing'


# ---------------------------------------------------------------------------------------------------------------------
# pages and tables, in archives

def token(text, x, y, label='paragraph'):
    return '\t'.join([text, *map(str, (x, y, x + 40, y + 10)), '0', '0', '0', 'NimbusRomNo9L-Regu', label])


PAGE = [token('Deep', 100, 50, 'title'), token('nets', 150, 50, 'title'), token('##LTLine##', 0, 70, 'figure'),
        token('They', 100, 100), token('learn', 150, 100), token('to', 100, 114), token('see.', 150, 114),
        token('Some', 120, 128), token('do.', 170, 128), token('##LTFigure##', 0, 300, 'figure')]
PAGE_TEXT = 'Deep nets\n\nThey learn\nto see.\n\nSome do.'


def noise(i):
    """A PNG of some kilobytes, so that it reaches across the parts of an archive."""
    file = io.BytesIO()
    Image.effect_noise((40, 30), 20 + i).save(file, 'PNG')
    return file.getvalue()


def docbank(pages, images, n_parts=3):
    """The archives as upstream: texts in one, images in one that is cut into parts."""
    Path('upstream').mkdir()
    with zipfile.ZipFile('upstream/DocBank_500K_txt.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('DocBank_500K_txt/', '')
        for base, lines in pages.items():
            archive.writestr(f'DocBank_500K_txt/{base}.txt', '\r\n'.join([*lines, '']))
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w') as archive:
        for base, image in images.items():
            archive.writestr(f'DocBank_500K_ori_img/{base}_ori.jpg', image)
    data = data.getvalue().replace(b'to be damaged', b'was   damaged')
    size = len(data) // n_parts + 1
    for i in range(n_parts):
        Path(f'upstream/DocBank_500K_ori_img.zip.{i + 1:03}').write_bytes(data[i * size:(i + 1) * size])


def test_docbank_reads_pages_from_an_archive_in_parts():
    names = [f'{i}.tar_1801.00{i}.gz_main_{i}' for i in range(24)]
    pages = {name: [*PAGE[:-1], token(f'{i}', 220, 128)] for i, name in enumerate(names)}
    images = {name: noise(i) for i, name in enumerate(names)}
    pages |= dict.fromkeys(('no_image', 'bad_image', 'bad_member'), PAGE)
    pages |= {'no_text': PAGE[2:3], 'bad_line': [*PAGE, 'only\tthree\tfields']}
    images |= {'no_text': noise(50), 'bad_line': noise(51), 'bad_image': noise(52)[:-200], 'bad_member': b'to be damaged'}
    docbank(pages, images)
    out = prepare('docbank', '--val_every=4')
    examples = {answer: example for answer, example in zip(answers(out.train + out.val), out.train + out.val)}
    assert set(examples) == {f'{PAGE_TEXT} {i}' for i in range(24)} and 2 < len(out.val) < 12
    check_prompts(out.train, 'OCR this document.', 'Read the text on this page.', 'Transcribe this page.')
    assert metrics(out.train + out.val) == {'edit_similarity'}
    for i in range(24):
        assert Path('data/docbank', examples[f'{PAGE_TEXT} {i}']['images'][0]).read_bytes() == images[names[i]]
    reasons = {Path(row['id']).stem: row['reason'] for row in read('docbank', 'skipped')}
    assert reasons == {
        'no_image': 'the image is missing', 'no_text': 'it has no text', 'bad_line': 'a line of the page is not 10 fields',
        'bad_image': 'the image is broken', 'bad_member': 'a member of the archive is broken'}


def test_omnidocbench_is_read_in_order_and_held_out():
    block = lambda order, **fields: {'category_type': 'text_block', 'poly': [0] * 8, 'ignore': False, 'order': order, **fields}
    page = lambda name, *blocks: {'layout_dets': list(blocks), 'page_info': {'image_path': name, 'page_no': 1}, 'extra': {}}
    table = '<table><tr><td>1</td></tr></table>'
    rows = [page('a.jpg', block(3, text='Last.'), block(1, text=' A title '), block(None, text='page 7'),
                 block(2, category_type='table', html=table, latex='\\begin{tabular}'), block(4, text='hidden', ignore=True),
                 block(5, category_type='equation_isolated', latex='$$x$$'), block(6, category_type='figure')),
            page('b.png', block(None, text='only a header')), page('missing.jpg', block(1, text='text'))]
    Path('upstream/images').mkdir(parents=True)
    Path('upstream/OmniDocBench.json').write_text(json.dumps(rows))
    Path('upstream/images/a.jpg').write_bytes(picture('red', 'JPEG'))
    Path('upstream/images/b.png').write_bytes(picture('blue'))
    process = inside('prepare_data.py', 'omnidocbench', '--source=upstream')
    assert process.returncode == 0, process.stderr
    example, = read('omnidocbench', 'val')
    assert example['messages'][1]['content'] == f'A title\n\n{table}\n\nLast.\n\n$$x$$'
    assert example['images'] == [str(Path('upstream/images/a.jpg').absolute())] and example['metric'] == 'edit_similarity'
    assert read('omnidocbench', 'train') == []
    assert [row['reason'] for row in read('omnidocbench', 'skipped')] == ['it has no text', 'the image is missing']


def test_a_folder_with_captions_is_read():
    Path('photos/birds').mkdir(parents=True)
    for i in range(8):
        Path(f'photos/birds/{i}.png').write_bytes(picture(i))
    Path('photos/broken.png').write_bytes(b'no image')
    rows = ['\ufeffimage,question,answer', *(f'birds/{i}.png,How many?,"{i}, or more"' for i in range(8)),
            'gone.png,What?,x', 'broken.png,What?,x', 'birds/0.png,What?,']
    Path('photos/captions.csv').write_text('\n'.join(rows), encoding='utf-8')
    process = inside('prepare_data.py', 'folder', '--source=photos', '--name=photos', '--val_every=2')
    assert process.returncode == 0, process.stderr
    examples = read('photos', 'train') + read('photos', 'val')
    assert {example['messages'][1]['content'] for example in examples} == {f'{i}, or more' for i in range(8)}
    assert all(example['messages'][0]['content'] == f'{IMAGE}\nHow many?' for example in examples)
    reasons = [row['reason'] for row in read('photos', 'skipped')]
    assert reasons == ['the image is missing', 'the image is broken', 'it has no caption']
    Path('photos/captions.csv').unlink()
    Path('photos/metadata.csv').write_text('\n'.join(['file_name,text', *(f'birds/{i}.png,Bird {i}' for i in range(8))]))
    process = inside('prepare_data.py', 'folder', '--source=photos', '--name=captions', '--val_every=2')
    assert process.returncode == 0, process.stderr
    example = read('captions', 'train')[0]
    assert example['messages'][0]['content'] == f'{IMAGE}\nDescribe the image.' and len(read('captions', 'val')) >= 1
    refused(inside('prepare_data.py', 'folder', '--source=nowhere'), 'expected --source=FOLDER with images and a captions.csv')


def test_fox_is_read_as_llava_and_held_out():
    rows = [{'image': f'en_{i}.png', 'len': 826, 'conversations': [
        {'from': 'human', 'value': '<image>\nOCR this image: '}, {'from': 'gpt', 'value': f'PAGE {i}'}]} for i in range(3)]
    Path('en_page_ocr.json').write_text(json.dumps(rows))
    Path('en_pdf_png').mkdir()
    for i in range(3):
        Path(f'en_pdf_png/en_{i}.png').write_bytes(picture(i))
    process = inside('prepare_data.py', 'llava_instruct', '--source=en_page_ocr.json', '--image_dir=en_pdf_png', '--name=fox',
                     '--val_every=1')
    assert process.returncode == 0, process.stderr
    assert [row['messages'][1]['content'] for row in read('fox', 'val')] == ['PAGE 0', 'PAGE 1', 'PAGE 2']
    assert read('fox', 'train') == []


def test_docbank_without_all_parts_is_refused():
    docbank({'a': PAGE}, {'a': noise(1), 'b': noise(2)})
    run = lambda: inside('prepare_data.py', 'docbank', '--source=upstream')
    part = Path('upstream/DocBank_500K_ori_img.zip.002')
    data = part.read_bytes()
    part.unlink()
    refused(run(), 'DocBank_500K_ori_img.zip.002 does not exist')
    part.write_bytes(data)
    Path('upstream/DocBank_500K_ori_img.zip.003').unlink()
    refused(run(), 'the archives of DocBank are broken, or a part is missing')
    for path in Path('upstream').glob('*.zip.*'):
        path.unlink()
    refused(run(), 'DocBank_500K_ori_img.zip.001 does not exist', 'liminghao1630/DocBank', '--source=upstream')


def pdf(i, size=(144, 72)):
    """A PDF with a page of so many points, red in the left half."""
    image = Image.new('RGB', size, (i, 0, 200))
    image.paste('red', (0, 0, size[0] // 2, size[1]))
    file = io.BytesIO()
    image.save(file, 'PDF', resolution=72)
    return file.getvalue()


def page_row(name, split='train', **changes):
    return {'id': name, 'url': f'http://a.example/{name}', 'page_number': 1, 'primary_language': 'en',
            'pdf_relpath': f'pdf_tarballs/00_documents_{split}_00000.tar.gz:{name}.pdf', 'is_rotation_valid': True,
            'rotation_correction': 0, 'is_table': False, 'is_diagram': False, 'natural_text': f'Page {name}. ' * 20,
            'extras': '{}', **changes}


def olmocr(train, val, pdfs):
    """olmOCR-mix: tables next to the archives of their PDFs, and a README that names them."""
    features = {name: STRING for name in ('id', 'url', 'pdf_relpath', 'primary_language', 'natural_text', 'extras')}
    features |= dict.fromkeys(('is_table', 'is_diagram', 'is_rotation_valid'), BOOL)
    features |= dict.fromkeys(('page_number', 'rotation_correction'), INT)
    for split, rows in (('train', train), ('eval', val)):
        parquet(f'00_documents_{split}.parquet', rows, **features)
        parquet(f'01_books_{split}.parquet', [page_row('never')], **features)
        members = {row['id']: pdfs.get(row['id'], pdf(i)) for i, row in enumerate(rows)}
        tar_gz(f'pdf_tarballs/00_documents_{split}_00000.tar.gz', {f'{i}.pdf': data for i, data in members.items() if data})
    readme(**{config: {split: f'{config}_{split}.parquet' for split in ('train', 'eval')}
              for config in ('01_books', '00_documents')})


def test_olmocr_draws_pages_upright_and_asks_for_what_is_on_them():
    pytest.importorskip('pypdfium2')
    train = [page_row(f'plain{i}') for i in range(12)]
    train += [page_row(f'table{i}', is_table=True) for i in range(6)]
    train += [page_row(f'diagram{i}', is_diagram=True) for i in range(6)]
    train += [page_row('turned', rotation_correction=90), page_row('upside', rotation_correction=180),
              page_row('unknown', rotation_correction=None)]
    bad = {'null': 'less than 50', 'short': 'less than 50', 'long': 'more than 10,000', 'french': 'it is not English',
           'broken': 'the PDF is broken', 'gone': 'the PDF is missing', 'pageless': 'the PDF is broken', 'nowhere': 'a field'}
    train += [page_row('null', natural_text=None), page_row('short', natural_text='Page 7'),
              page_row('long', natural_text='long ' * 3000), page_row('french', primary_language='fr'), page_row('broken'),
              page_row('gone'), page_row('pageless'), page_row('nowhere', pdf_relpath=None)]
    pageless = pdf(0).replace(b'/Count 1', b'/Count 0').replace(b'/Kids [', b'/Sids [')
    olmocr(train, [page_row('held', 'eval')], {'broken': pdf(0)[:90], 'gone': None, 'pageless': pageless})
    out = prepare('olmocr')
    examples = {answers([example])[0].split()[1].rstrip('.'): example for example in out.train}
    named = lambda word: [example for name, example in examples.items() if name.startswith(word)]
    assert len(examples) == 27 and turns(examples['plain3'])[1] == ('Page plain3. ' * 20).strip()
    check_prompts(named('plain'), 'OCR this document.', 'Read the text on this page.', 'Transcribe this page.')
    check_prompts(named('table'), 'Transcribe this page with its tables.', 'Read this page. Write its tables in Markdown.')
    check_prompts(named('diagram'), 'Transcribe this page with its diagrams.',
                  'Read the text on this page and in its diagrams.')
    assert answers(out.val) == [('Page held. ' * 20).strip()] and metrics(out.train + out.val) == {'edit_similarity'}
    image = lambda name: load_image('data/olmocr/' + examples[name]['images'][0])
    is_red = lambda pixel: pixel[0] > 200 and pixel[2] < 60
    # 144 x 72 points at 150 dpi; the left half of an upright page is red
    assert image('plain0').size == image('upside').size == image('unknown').size == (300, 150)
    assert is_red(image('plain0').getpixel((75, 75))) and not is_red(image('plain0').getpixel((225, 75)))
    assert is_red(image('upside').getpixel((225, 75))) and not is_red(image('upside').getpixel((75, 75)))
    assert image('turned').size == (150, 300)  # clockwise: left becomes top
    assert is_red(image('turned').getpixel((75, 75))) and not is_red(image('turned').getpixel((75, 225)))
    reasons = {row['id']: row['reason'] for row in read('olmocr', 'skipped')}
    assert reasons.keys() == bad.keys() and all(bad[name] in reason for name, reason in reasons.items()), reasons


def test_pdfium_is_never_entered_by_two_threads(monkeypatch):
    pypdfium2 = pytest.importorskip('pypdfium2')
    called = Counter()

    def locked(name, function):
        def call(*args):
            called[name] += prepare_data.PDFIUM.locked()
            called[f'{name} without the lock'] += not prepare_data.PDFIUM.locked()
            return function(*args)
        return call

    for name in ('FPDF_LoadPage', 'FPDF_ClosePage', 'FPDF_CloseDocument'):
        monkeypatch.setattr(pypdfium2.raw, name, locked(name, getattr(pypdfium2.raw, name)))
    assert Image.open(io.BytesIO(prepare_data.draw_pdf(pdf(0), 0))).size == (300, 150)
    gc.collect()
    assert +called == dict.fromkeys(('FPDF_LoadPage', 'FPDF_ClosePage', 'FPDF_CloseDocument'), 1)


def test_a_page_whose_text_has_the_name_of_an_image_place_can_be_trained_on_or_is_skipped():
    rows = [chart(1), chart(2, query='What does <image> mean?'), chart(3, label=['<image>'])]
    chartqa('train-00000-of-00001-49492f364babfa44', rows)
    chartqa('val-00000-of-00001-0f11003c77497969', [chart(11)])
    out = prepare('chartqa')  # which tokenizes all
    assert out.train[0]['messages'][0]['content'] == '<image>\nQuestion 1?' and len(out.train) + len(out.skipped) == 3


def test_archives_of_olmocr_that_are_missing_or_cut_off_are_named():
    pytest.importorskip('pypdfium2')
    olmocr([page_row('a')], [page_row('b', 'eval')], {})
    archive = Path('upstream/pdf_tarballs/00_documents_train_00000.tar.gz')
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-30])
    refused(inside('prepare_data.py', 'olmocr', '--source=upstream'), f'{archive} is broken or cut off', 'download it again')
    assert not archive.with_suffix('').exists(), 'half an archive is not taken for a whole one'
    archive.unlink()
    refused(inside('prepare_data.py', 'olmocr', '--source=upstream'), f'{archive} does not exist', 'allenai/olmOCR-mix-1025')
    archive.write_bytes(whole)
    assert prepare('olmocr').train and archive.with_suffix('').exists()


def voc(*objects):
    """An annotation of PubTables-1M: <object>s with a name and a box."""
    boxes = ''.join(
        f'<object><name>{name}</name><pose>Frontal</pose><truncated>0</truncated><difficult>0</difficult><occluded>0</occluded>'
        f'<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>'
        for name, (x0, y0, x1, y1) in objects)
    size = '<size><width>200</width><height>100</height><depth>3</depth></size><segmented>0</segmented>'
    return f'<?xml version="1.0" ?><annotation><folder/><filename>x.jpg</filename>{size}{boxes}</annotation>'.encode()


TABLE = [('table', (10, 10, 190, 70)), ('table row', (10, 10, 190, 30)), ('table row', (10, 30, 190, 50)),
         ('table row', (10, 50, 190, 70)), ('table column', (10, 10, 100, 70)), ('table column', (100, 10, 190, 70)),
         ('table column header', (10, 10, 190, 30)), ('table projected row header', (10, 30, 190, 50))]


def words(*texts):
    places = [(20, 14), (110, 14), (20, 34), (20, 54), (110, 54)]
    return json.dumps([{'bbox': [x, y, x + 30, y + 10], 'text': text, 'flags': 0, 'span_num': i, 'line_num': 0, 'block_num': 0}
                       for i, (text, (x, y)) in enumerate(zip(texts, places))]).encode()


def pubtables(tables):
    """The archives of tables {split: {name: (annotation, words)}}; None is not there. Test comes with Train and Val."""
    all_words = {}
    for split, of_split in tables.items():
        prefix = 'PubTables-1M-Structure'
        tar_gz(f'{prefix}_Images_{split}.tar.gz', {f'{name}.jpg': picture(i, 'JPEG', (200, 100))
                                                  for i, name in enumerate(of_split, 40 * len(split))})
        tar_gz(f'{prefix}_Annotations_{split}.tar.gz', {f'{name}.xml': xml for name, (xml, _) in of_split.items() if xml})
        all_words |= {f'{name}_words.json': text for name, (_, text) in of_split.items() if text}
    tar_gz(f'{prefix}_Table_Words.tar.gz', all_words)


def test_pubtables_gives_html_and_leaves_the_images_in_their_archive():
    good = lambda i: (voc(*TABLE), words('Drug', 'n', 'Adults', f'A&B {i}', '7'))
    train = {f'PMC100{i}_table_0': good(i) for i in range(6)}
    train |= {'PMC2001_table_0': (voc(*TABLE), None), 'PMC2002_table_0': (None, words('a')),
              'PMC2003_table_0': (b'<annotation><object><name>table', words('a')),
              'PMC2004_table_0': (voc(*TABLE[:4]), words('a')), 'PMC2005_table_0': (voc(*TABLE), b'[{"bbox": [1, 2'),
              'PMC2006_table_0': (voc(*TABLE), b'[{"bbox": [1, 2, 3], "text": "a"}]')}
    pubtables({'Train': train, 'Val': {'PMC3001_table_1': good(8)}, 'Test': {'PMC4001_table_0': good(9)}})
    out = prepare('pubtables')
    html = ('<table><thead><tr><td>Drug</td><td>n</td></tr></thead><tbody><tr><td colspan="2">Adults</td></tr>'
            '<tr><td>A&amp;B {}</td><td>7</td></tr></tbody></table>')
    assert answers(out.train) == [html.format(i) for i in range(6)] and answers(out.val) == [html.format(8)]
    check_prompts(out.train, 'Convert this table to HTML.', 'Write this table as HTML.', 'What is the HTML of this table?')
    assert metrics(out.train + out.val) == {'teds'}
    archive = Path('upstream/PubTables-1M-Structure_Images_Train.tar').resolve()
    assert [example['images'] for example in out.train] == [[f'{archive}/PMC100{i}_table_0.jpg'] for i in range(6)]
    assert not Path('data/pubtables/images').exists() and load_image(out.train[0]['images'][0]).size == (200, 100)
    reasons = {row['id'][3:7]: row['reason'] for row in read('pubtables', 'skipped')}
    assert reasons.keys() == {f'200{i}' for i in range(1, 7)}
    assert reasons['2001'] == reasons['2002'] == 'its annotation or its words are missing'
    assert reasons['2003'] == 'the annotation is not VOC XML' and reasons['2004'] == 'a table without rows or columns'
    assert 'words' in reasons['2005'] and 'words' in reasons['2006'], reasons


# ---------------------------------------------------------------------------------------------------------------------
# what holds for all

def test_an_image_to_train_on_that_is_held_out_too_is_counted():
    chartqa('train-00000-of-00001-49492f364babfa44', [chart(1), chart(2), chart(11), chart(11), chart(12, image=picture(1))])
    chartqa('val-00000-of-00001-0f11003c77497969', [chart(11), chart(13)])
    out = prepare('chartqa')
    assert 'note: 2 examples to train on have an image that is held out, too, byte for byte\n' in out.stderr
    assert out.train[0]['images'] == out.train[4]['images'] != out.train[1]['images']
    chartqa('val-00000-of-00001-0f11003c77497969', [chart(13)])
    assert 'note: ' not in prepare('chartqa').stderr


def test_rows_with_the_same_image_are_on_one_side_if_upstream_holds_out_none():
    rows = [{'images': [picture(i // 3)], 'texts': pairs(f'Question {i}?', 'Yes.')} for i in range(60)]
    parquet('x/train-00000-of-00001.parquet', rows, images=List(datasets.Image()), texts=PAIRS)
    out = prepare('finevision', '--subset=x', '--val_every=4')
    sides = [{example['images'][0] for example in side} for side in (out.train, out.val)]
    assert not sides[0] & sides[1] and len(out.train) == 3 * len(sides[0]) and len(out.val) == 3 * len(sides[1]) > 3
    assert 'note: ' not in out.stderr


def test_max_examples_stops_after_so_many_and_a_tenth_is_held_out():
    chartqa('train-00000-of-00001-49492f364babfa44', [chart(i) for i in range(60)])
    chartqa('val-00000-of-00001-0f11003c77497969', [chart(100 + i) for i in range(40)])
    for n, n_val in ((20, 2), (5, 1), (0, 40)):
        out = prepare('chartqa', f'--max_examples={n}')
        assert [turns(example)[0] for example in out.val] == [f'Question {100 + i}?' for i in range(n_val)]
        assert [turns(example)[0] for example in out.train] == [f'Question {i}?' for i in range(n - n_val if n else 60)]
        shutil.rmtree('data')


def test_max_examples_counts_articles_of_wikitext():
    for split, n in (('train', 6), ('validation', 3)):
        rows = [{'text': line} for i in range(n) for line in article(f'{split} {i}', 'Text .')]
        parquet(f'wikitext-103-raw-v1/{split}-00000-of-00001.parquet', rows, text=STRING)
    out = prepare('wikitext', '--max_examples=4')
    assert len(out.train) + len(out.val) == 4 and len(out.val) < 3 and ' = validation 0 = \n' in out.val[0]['text']


def test_max_examples_holds_out_a_tenth_of_the_tables():
    tables = lambda number, n: {f'PMC{number}{i}_table_0': (voc(*TABLE), words('a')) for i in range(n)}
    pubtables({'Train': tables(1, 9), 'Val': tables(2, 5)})
    out = prepare('pubtables', '--max_examples=6')
    assert len(out.train) == 5 and [Path(example['images'][0]).name for example in out.val] == ['PMC20_table_0.jpg']


def stop_and_continue(stopped):
    """Prepares 500 rows twice: undisturbed, and after stopped() had to stop. The files are the same."""
    out = prepare('chartqa')
    undisturbed = written('chartqa')
    assert len(out.train) == 490 and len(out.skipped) == 10
    shutil.rmtree('data')
    restore = stopped()
    assert not Path('data/chartqa/train.jsonl').exists()
    progress, = Path('data/chartqa').glob('progress-*')
    assert 200 <= len(progress.read_bytes().splitlines()) < 501
    restore()
    process = inside('prepare_data.py', 'chartqa', '--source=upstream')
    assert process.returncode == 0 and 'resuming after ' in process.stderr, process.stderr
    assert written('chartqa') == undisturbed


def five_hundred():
    rows = [chart(i % 250, query=f'Question {i}?', label=['1'] if i % 50 else []) for i in range(500)]
    for part in range(2):
        chartqa(f'train-0000{part}-of-00002-49492f364babfa44', rows[250 * part:250 * part + 250])
    chartqa('val-00000-of-00001-0f11003c77497969', [chart(255)])


def test_a_command_that_was_interrupted_continues_and_writes_the_same(monkeypatch):
    five_hundred()
    convert = prepare_data.chartqa_example

    def interrupted(row, rng):
        if row['query'] == 'Question 300?':
            raise KeyboardInterrupt
        return convert(row, rng)

    def stopped():
        monkeypatch.setattr(prepare_data.DATASETS['chartqa'], 'convert', interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_data.prepare_public('chartqa', source='upstream')
        return lambda: None  # the next run has a table of its own

    stop_and_continue(stopped)


def test_a_source_that_fails_in_the_middle_keeps_what_was_read():
    five_hundred()
    path = Path('upstream/data/train-00001-of-00002-49492f364babfa44.parquet')
    whole = path.read_bytes()

    def stopped():
        path.write_bytes(whole[:-100])
        refused(inside('prepare_data.py', 'chartqa', '--source=upstream'), 'upstream cannot be read', 'what was read is kept')
        return lambda: path.write_bytes(whole)

    stop_and_continue(stopped)


def test_what_a_command_lacks_is_said_in_one_sentence(monkeypatch):
    run = lambda *words: inside('prepare_data.py', *words)
    refused(run('finevision'), '--subset=NAME', 'https://huggingface.co/datasets/HuggingFaceM4/FineVision')
    refused(run('cauldron', '--source=x'), '--subset=NAME', 'https://huggingface.co/datasets/HuggingFaceM4/the_cauldron')
    refused(run('hub'), 'expected --source=')
    refused(run('custom_json'), 'expected --source=')
    refused(run('hub', '--source=nobody/nothing'), 'nobody/nothing cannot be read', 'check the name and the connection')
    refused(run('gsm8k'), 'openai/gsm8k cannot be read', '--source=FOLDER')
    find_spec = importlib.util.find_spec
    without = lambda name, *args: None if name == 'pypdfium2' else find_spec(name, *args)
    monkeypatch.setattr(importlib.util, 'find_spec', without)
    refused(run('olmocr', '--source=x'), 'pip install pypdfium2')


@pytest.mark.parametrize('command, name', [
    ('chartqa', 'upstream'), ('mmlu', 'upstream'), ('wikitext', 'upstream'), ('custom_json', '.jsonl'), ('olmocr', 'upstream'),
    ('docbank', 'DocBank_500K_ori_img.zip.001'), ('pubtables', 'PubTables-1M-Structure_Table_Words.tar.gz')])
def test_a_folder_without_the_expected_files_is_refused(command, name):
    if command == 'olmocr':
        pytest.importorskip('pypdfium2')
    Path('upstream').mkdir()
    Path('upstream/notes.bin').write_bytes(b'nothing of it')
    refused(inside('prepare_data.py', command, '--source=upstream'), name, 'upstream')
    assert not Path(f'data/{command}/train.jsonl').exists()


def test_list_names_every_dataset_with_a_command_that_there_is():
    process = inside('prepare_data.py', 'list')
    assert process.returncode == 0, process.stderr
    table = process.stdout.partition('\n\n')[0].splitlines()
    assert table[0].split() == ['teaches', 'rows', 'GB', 'license', 'command']
    at = table[0].index('command')
    commands = {line.split()[0]: line[at:] for line in table[1:]}
    assert {name: command.split()[0] for name, command in commands.items()} == {name: name for name in commands}
    everything = set(prepare_data.COMMANDS) - {'list', 'features', 'tokenizer', 'show'}
    assert set(commands) == everything
    assert commands['chartqa'] == 'chartqa' and commands['hub'] == 'hub --source=...'
    assert commands['finevision'] == 'finevision --subset=...' and commands['cauldron'] == 'cauldron --subset=...'
    line = next(line for line in table if line.startswith('chartqa '))
    assert 'questions about charts' in line and '28K' in line and 'gpl-3.0' in line
    assert 'olmocr needs pypdfium2: pip install pypdfium2' in process.stdout
