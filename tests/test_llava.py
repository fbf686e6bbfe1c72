"""LLaVA's data: every row becomes an example as published, or is listed with the reason why not."""

import json
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import inside, read_log, refused, train
from PIL import Image, JpegImagePlugin

import prepare_data
from dataloader import IMAGE, FileRows, get_tokenizer, is_held_out, load_image, tokenize
from prepare_data import json_rows
from vision import VisionConfig


def turns(*texts):
    return [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(texts)]


# upstream's rows: ids of both kinds, <image> before and after the question, a row without an image, and what is broken
ROWS = [
    {'id': '000000033471', 'image': '000000033471.jpg', 'conversations': turns(
        '<image>\nWhat color is it?', 'It is red.', 'Is it large?', 'No.')},
    {'id': 2, 'image': 'coco/train2017/2.jpg', 'conversations': turns('What is this?\n<image>', 'A square.')},
    {'id': 'identity', 'model': '', 'conversations': turns('Who are you?', 'A language model.')},
    {'id': 4, 'image': 'missing.jpg', 'conversations': turns('<image>\nWhere?', 'Nowhere.')},
    {'id': 5, 'image': 'cut.jpg', 'conversations': turns('<image>\nWhat?', 'Half of it.')},
    {'id': 6, 'image': 'alpha.png', 'conversations': turns('<image>\nWhat is under it?', 'White paper.')},
    {'id': 7, 'image': 'gray.jpg', 'conversations': turns('<image>\nIs it gray?', 'Yes.')},
    {'id': 8, 'image': 'gif.jpg', 'conversations': turns('<image>\nWhich format?', 'GIF.')},
    {'id': 9, 'image': 'gray.jpg', 'conversations': turns('No place for it.', 'It stands in front.')},
    {'id': 10, 'image': 'gray.jpg', 'conversations': turns('<image><image> Two?', 'One.')},
    {'id': 11, 'conversations': turns('<image>\nWhere is it?', 'Where?')},
    {'id': 12, 'image': 'gray.jpg', 'conversations': turns('<image>\nAnd?', '')},
    {'id': 13, 'image': 'gray.jpg', 'conversations': turns('<image>\nYes?', 'Yes.', 'No answer to this one.')},
    {'id': 14, 'image': 'gray.jpg', 'conversations': [{'from': 'gpt', 'value': 'Without a question.'},
                                                     *turns('<image>\nNow?', 'Now.')]},
    {'id': 15, 'image': 'gray.jpg'},
]
REASONS = {4: 'the image is missing', 5: 'the image is broken', 10: '2 <image> places for 1 images',
        11: '1 <image> places for 0 images', 12: 'an empty turn', 15: 'no conversation of user and assistant'}


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A working directory with an upstream file and its images."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / 'images'
    (images / 'coco' / 'train2017').mkdir(parents=True)
    red = Image.linear_gradient('L').convert('RGB').resize((300, 200))
    for name in ('000000033471.jpg', 'coco/train2017/2.jpg', 'cut.jpg'):
        red.save(images / name, quality=95)
    (images / 'cut.jpg').write_bytes((images / 'cut.jpg').read_bytes()[:3000])
    Image.new('RGBA', (30, 20), (255, 0, 0, 100)).save(images / 'alpha.png')
    Image.new('L', (30, 20), 100).save(images / 'gray.jpg')
    Image.new('P', (30, 20), 3).save(images / 'gif.jpg', format='GIF')
    (tmp_path / 'mine.json').write_text(json.dumps(ROWS))
    return tmp_path


def prepare(*words, command='llava_instruct', images='images'):
    return inside('prepare_data.py', command, '--source=mine.json', f'--image_dir={images}', '--val_every=3', *words)


def read(name='mine', part=None):
    parts = [part] if part else ['train', 'val']
    return [json.loads(line) for p in parts for line in Path(f'data/{name}/{p}.jsonl').read_text().splitlines()]


def test_every_row_is_kept_or_listed_with_the_reason(upstream):
    process = prepare()
    assert process.returncode == 0, process.stderr
    assert {row['id']: row['reason'] for row in read(part='skipped')} == REASONS
    rows = read()
    assert len(rows) == len(ROWS) - len(REASONS)
    assert all(f'skipped: 1 rows, {reason}' in process.stderr for reason in REASONS.values())
    by_question = {r['messages'][0]['content']: r for r in rows}
    first = by_question['<image>\nWhat color is it?']
    assert [m['role'] for m in first['messages']] == ['user', 'assistant', 'user', 'assistant']
    assert first['messages'][3]['content'] == 'No.' and first['images'] == [str(upstream / 'images' / '000000033471.jpg')]
    assert by_question['What is this?\n<image>']['images'] == [str(upstream / 'images' / 'coco' / 'train2017' / '2.jpg')]
    assert by_question['Who are you?'] == {'images': [], 'messages': [{'role': 'user', 'content': 'Who are you?'},
                                                                      {'role': 'assistant', 'content': 'A language model.'}]}
    assert '<image>\nNo place for it.' in by_question and '<image>\nNow?' in by_question
    assert len(by_question['<image>\nYes?']['messages']) == 2


def test_the_rows_of_one_image_are_held_out_together(upstream):
    assert prepare().returncode == 0
    train_images, val_images = ({path for r in read(part=part) for path in r['images']} for part in ('train', 'val'))
    assert val_images and train_images and not val_images & train_images
    kept = {row['image'] for row in ROWS if 'image' in row and row['id'] not in REASONS}
    assert val_images == {str(upstream / 'images' / name) for name in kept if is_held_out(name, 3)}


def test_a_zip_or_tar_is_read_without_unpacking_with_or_without_a_folder_in_it(upstream):
    assert prepare().returncode == 0
    expected = [r['messages'] for r in read()]
    for archive, top in (('a.zip', ''), ('b.zip', 'train2017/'), ('a.tar', ''), ('b.tar', 'train2017/')):
        with (zipfile.ZipFile if archive.endswith('.zip') else tarfile.open)(archive, 'w') as file:
            for path in sorted(Path('images').rglob('*.*')):
                (file.write if archive.endswith('.zip') else file.add)(path, top + str(path.relative_to('images')))
        process = prepare('--name=packed', images=archive)
        assert process.returncode == 0, process.stderr
        assert {row['id']: row['reason'] for row in read('packed', 'skipped')} == REASONS
        assert sorted(map(str, (r['messages'] for r in read('packed')))) == sorted(map(str, expected))
        shutil.move('images', 'unpacked')
        rows = FileRows('data/packed/train.jsonl')
        assert any(load_image(path).size == (30, 20) for row in rows for path in row['images'])
        shutil.move('unpacked', 'images')


def test_captions_are_plain_text_after_their_image(upstream):
    process = prepare(command='llava_pretrain')
    assert process.returncode == 0, process.stderr
    texts = [r['text'] for r in read() if 'text' in r]
    assert '<image>A square.' in texts and all(t.count(IMAGE) == 1 for t in texts)
    process = prepare('--captions_only=True', '--name=same')
    assert read('same') == read()


def test_an_interrupted_command_continues_where_it_was(upstream, monkeypatch):
    rows = [{**ROWS[0], 'id': i, 'image': ['gray.jpg', 'gif.jpg', 'missing.jpg'][i % 3]} for i in range(3000)]
    Path('mine.json').write_text(json.dumps(rows))
    assert prepare('--name=whole', '--val_every=2').returncode == 0
    whole = {p: Path(f'data/whole/{p}.jsonl').read_bytes() for p in ('train', 'val', 'skipped')}
    assert all(whole.values())
    opened = []

    def interrupt(image, *args):
        opened.append(image)
        if len(opened) == 1000:
            raise KeyboardInterrupt
        return draft(image, *args)

    draft = JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, 'draft', interrupt)
    assert prepare('--name=parts', '--val_every=2').returncode == 130
    assert not Path('data/parts/train.jsonl').exists()
    progress = next(Path('data/parts').glob('progress-*'))
    assert 2000 <= len(progress.read_bytes().splitlines()) < 3000
    with open(progress, 'ab') as f:
        f.write(b'{"half a row' * 10000)  # and whatever was still in a buffer
    opened.clear()
    counted = lambda image, *args: opened.append(image) or draft(image, *args)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, 'draft', counted)
    process = prepare('--name=parts', '--val_every=2')
    assert process.returncode == 0 and 'resuming' in process.stderr, process.stderr
    assert len(opened) < 500, 'what is done is not done again'
    assert {p: Path(f'data/parts/{p}.jsonl').read_bytes() for p in whole} == whole
    assert sorted(p.name for p in Path('data/parts').iterdir()) == ['skipped.jsonl', 'train.jsonl', 'val.jsonl']


def test_other_work_does_not_continue_what_was_interrupted(upstream, monkeypatch):
    def interrupt(image, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JpegImagePlugin.JpegImageFile, 'draft', interrupt)
        assert prepare().returncode == 130
    process = prepare('--val_every=2')
    assert process.returncode == 0 and 'resuming' not in process.stderr, process.stderr
    assert {path for row in read(part='val') for path in row['images']} and not list(Path('data/mine').glob('progress-*'))


def test_a_command_that_was_refused_begins_again(upstream):
    Path('mine.json').write_text('[' + ', '.join([json.dumps(ROWS[0])] * 1200) + ', 1]')
    refused(prepare(), 'row 1200: expected an object')
    assert not list(Path('data/mine').glob('progress-*'))


@pytest.mark.parametrize('text, message', [
    ('[{"id": 1}, {"id": 2', 'mine.json is broken or cut off at row 1'), ('{"id": 1}', 'is not a JSON array of rows'),
    ('[1, 2]', 'row 0: expected an object, got 1'), ('[{"id": 1}]', 'of 1 rows in mine.json, 0 are left')])
def test_broken_files_are_named_with_the_row(upstream, text, message):
    Path('mine.json').write_text(text)
    refused(prepare(), message)


def test_missing_files_are_named_with_what_to_do(upstream, monkeypatch):
    import huggingface_hub
    refused(prepare(images='nowhere'), '--image_dir=nowhere does not exist, or is no archive')
    Path('half.zip').write_bytes(b'PK half of a zip')
    refused(prepare(images='half.zip'), '--image_dir=half.zip does not exist, or is no archive')
    refused(inside('prepare_data.py', 'llava_instruct', '--source=mine.json'), 'http://images.cocodataset.org/zips/train2017.zip')

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError('offline')

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', offline)
    refused(inside('prepare_data.py', 'llava_pretrain'), 'blip_laion_cc_sbu_558k.json of liuhaotian/LLaVA-Pretrain', '--source')


def test_upstreams_files_are_downloaded(upstream, monkeypatch):
    import huggingface_hub
    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return 'images' if file == 'images.zip' else 'mine.json'

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    inside('prepare_data.py', 'llava_cc3m', '--val_every=3')
    inside('prepare_data.py', 'llava_instruct', '--subset=llava_v1_5_mix665k', '--image_dir=images')
    inside('prepare_data.py', 'sharegpt4v', '--image_dir=images', '--val_every=3')
    assert asked == [('liuhaotian/LLaVA-CC3M-Pretrain-595K', 'chat.json', 'dataset'),
                     ('liuhaotian/LLaVA-CC3M-Pretrain-595K', 'images.zip', 'dataset'),
                     ('liuhaotian/LLaVA-Instruct-150K', 'llava_v1_5_mix665k.json', 'dataset'),
                     ('Lin-Chen/ShareGPT4V', 'sharegpt4v_instruct_gpt4-vision_cap100k.json', 'dataset')]
    assert len(read('llava_cc3m')) == len(read('sharegpt4v')) == len(ROWS) - len(REASONS)


@pytest.mark.parametrize('spaces', ['', '  ', '\n'])
def test_a_large_array_is_read_row_by_row(tmp_path, spaces):
    rows = [{'id': i, 'text': f'"]{{[,\\ \u00e9\u4e2d{i}' * 50} for i in range(3000)]  # 2 MB: more than one read
    path = tmp_path / 'x.json'
    texts = [json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(rows)]
    path.write_text('[' + f',{spaces}'.join(texts) + spaces + ']\n', encoding='utf-8')
    assert list(json_rows(str(path))) == rows
    lines = tmp_path / 'x.jsonl'
    lines.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    assert list(json_rows(str(lines))) == rows


# ---------------------------------------------------------------------------------------------------------------------
# show

def test_show_marks_exactly_what_is_in_the_loss(upstream):
    prepare()
    rows = FileRows('data/mine/train.jsonl')
    number = next(i for i in range(len(rows)) if len(rows[i]['messages']) == 2 and rows[i]['images'])
    process = inside('prepare_data.py', 'show', '--dataset=mine', f'--index={number}')
    assert process.returncode == 0, process.stderr
    question, answer = (m['content'] for m in rows[number]['messages'])
    assert re.search(r'<image> x [1-9]', process.stdout)
    assert process.stdout.endswith(f'<|assistant|>[[{answer}<|endoftext|>]]\n')
    assert process.stdout.count('[[') == 1
    assert f'{len(answer.encode()) + 1} of them in the loss' in process.stderr
    sheet = Image.open('show.png').convert('RGB')
    assert {(165, 230, 165), (169, 201, 255), (213, 213, 213)} <= {c for _, c in sheet.getcolors(1 << 24)}
    refused(inside('prepare_data.py', 'show', '--dataset=mine', '--index=99'), 'there is no 99')


def test_show_agrees_with_the_targets_of_every_turn(upstream):
    prepare()
    split, number, row = next((split, i, row) for split in ('train', 'val')
                              for i, row in enumerate(FileRows(f'data/mine/{split}.jsonl')) if len(row['messages']) == 4)
    process = inside('prepare_data.py', 'show', '--dataset=mine', f'--split={split}', f'--index={number}')
    in_loss = ''.join(part.partition(']]')[0] for part in process.stdout.split('[[')[1:])
    tokenizer = get_tokenizer('bytes')
    targets = tokenize(row, tokenizer, VisionConfig(vision_encoder='vit', image_token=tokenizer.image_id))['targets']
    assert in_loss == tokenizer.decode([i for i in targets if i >= 0]) == 'It is red.<|endoftext|>No.<|endoftext|>'


# ---------------------------------------------------------------------------------------------------------------------
# two stages

STAGE = ['--line_height=0', '--patch_width=16', '--max_image_tokens=16', '--block_size=100', '--optimizer=adamw',
         '--batch_size=2']


def test_two_stages_from_a_text_model_to_an_answer(upstream):
    """Captions with the GPT frozen, then conversations with all but the encoder; both from LLaVA's files."""
    assert prepare('--name=captions', command='llava_pretrain').returncode == 0 and prepare().returncode == 0
    assert train('text', '--vision_encoder=', '--tasks=text', *STAGE).returncode == 0
    process = train('align', '--init_from=text/ckpt.pt', '--dataset=captions', '--learning_rate=0', '--vision_lr=0', *STAGE)
    assert process.returncode == 0 and re.search('new +vision.connector', process.stderr), process.stderr
    before, after = (torch.load(f'{x}/ckpt.pt', weights_only=True)['model'] for x in ('text', 'align'))
    assert all(torch.equal(before[k], after[k]) for k in before)
    result = read_log('align')[-1]['eval']
    assert {'val_loss', 'blank_loss', 'shuffled_loss', 'text_loss', 'cer'} <= set(result)
    assert result['text_loss'] == read_log('align')[0]['eval']['text_loss']  # a frozen GPT forgets nothing
    process = train('sft', '--init_from=align/ckpt.pt', '--dataset=mine', '--vision_lr=0', *STAGE)
    assert process.returncode == 0 and 'new' not in process.stderr, process.stderr
    process = inside('sample.py', '--out_dir=sft', '--image', 'images/gray.jpg', '--prompt', 'Is it?', '--max_new_tokens=5')
    assert process.returncode == 0 and process.stdout.endswith('\n'), process.stderr
    # a captioner continues after the image, without a conversation's tokens
    assert torch.load('align/ckpt.pt', weights_only=True)['chat'] is False
    assert torch.load('sft/ckpt.pt', weights_only=True)['chat'] is True


@pytest.mark.parametrize('config, command', [('vlm_sft', 'llava_instruct'), ('vlm_align', 'llava_pretrain'),
                                             ('vlm_cpu', 'shapes')])
def test_a_recipe_without_its_data_names_the_command_that_prepares_it(upstream, config, command):
    root = Path(prepare_data.__file__).parent
    process = inside('train.py', root / 'config' / f'{config}.py', '--tokenizer=bytes')
    refused(process, f'"python prepare_data.py {command}"')
