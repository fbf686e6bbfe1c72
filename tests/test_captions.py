"""Images with captions: where they come from, how they are augmented, how generated captions are scored."""

import io
import json
import os
import random
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import inside, refused, train
from PIL import Image

import dataloader
from dataloader import augment_image, is_held_out, load_image, open_rows
from evaluate import caption_words, score_captions


def image_bytes(color, image_format='JPEG', size=(40, 30)):
    """An image of one color as a file's bytes."""
    file = io.BytesIO()
    Image.new('RGB', size, color).save(file, image_format)
    return file.getvalue()


def read(name, part):
    return [json.loads(line) for line in Path(f'data/{name}/{part}.jsonl').read_text().splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# COCO's captions, WebDataset's tars, img2dataset's folders: as they are published

def coco(path, names):
    """A captions_*.json as COCO publishes it; the image number i has i % 3 + 1 captions."""
    images = [{'license': 3, 'file_name': name, 'height': 30, 'width': 40, 'id': 100 + i} for i, name in enumerate(names)]
    captions = [{'image_id': 100 + i, 'id': 10 * i + k, 'caption': f'Caption {k} of {name}.\n'}
                for i, name in enumerate(names) for k in range(i % 3 + 1)]
    path.write_text(json.dumps({'info': {}, 'licenses': [], 'images': images, 'annotations': random.Random(0).sample(
        captions, len(captions))}))


def test_coco_gives_every_caption_to_train_on_and_all_of_an_image_as_references(folder):
    (folder / 'annotations').mkdir()
    names = {'train': [f'{i:012d}.jpg' for i in range(6)], 'val': [f'{i:012d}.jpg' for i in range(6, 10)]}
    for part in names:
        (folder / 'coco' / f'{part}2017').mkdir(parents=True)
        coco(folder / 'annotations' / f'captions_{part}2017.json', names[part])
        for name in names[part]:
            (folder / 'coco' / f'{part}2017' / name).write_bytes(image_bytes('red'))
    (folder / 'coco' / 'train2017' / names['train'][1]).write_bytes(image_bytes('red')[:200])
    process = inside('prepare_data.py', 'coco_captions', '--source=annotations', '--image_dir=coco')
    assert process.returncode == 0 and 'skipped: 1 rows, the image is broken' in process.stderr, process.stderr
    rows, held_out = read('coco_captions', 'train'), read('coco_captions', 'val')
    assert len(rows) == 1 + 3 + 1 + 2 + 3 and not any('references' in row for row in rows)
    assert {row['text'] for row in rows[1:4]} == {f'<image>Caption {k} of 000000000002.jpg.' for k in range(3)}
    assert [len(row['references']) for row in held_out] == [1, 2, 3, 1]
    assert sorted(held_out[2]['references']) == [f'Caption {k} of 000000000008.jpg.' for k in range(3)]
    example = open_rows('coco_captions', 'val')[2]
    assert load_image(example['images'][0]).size == (40, 30) and len(example['references']) == 3
    # one file, to be split here, and its images in a zip
    with zipfile.ZipFile(folder / 'train2017.zip', 'w') as archive:
        for name in names['train']:
            archive.write(folder / 'coco' / 'train2017' / name, f'train2017/{name}')
    process = inside('prepare_data.py', 'coco_captions', '--source=annotations/captions_train2017.json',
                     '--image_dir=train2017.zip', '--name=one', '--val_every=2')
    assert process.returncode == 0, process.stderr
    held_out = {os.path.basename(row['images'][0]) for row in read('one', 'val')}
    assert held_out == {name for name in names['train'] if is_held_out(name, 2)} - {names['train'][1]} and held_out
    assert held_out.isdisjoint(os.path.basename(row['images'][0]) for row in read('one', 'train'))
    assert load_image(open_rows('one', 'train')[0]['images'][0]).size == (40, 30)
    refused(inside('prepare_data.py', 'coco_captions'), 'expected --source=FOLDER with captions_train2017.json')
    refused(inside('prepare_data.py', 'coco_captions', '--source=coco', '--image_dir=coco'), 'does not exist')
    (folder / 'bad.json').write_text('[1]')
    refused(inside('prepare_data.py', 'coco_captions', '--source=bad.json', '--image_dir=coco'), 'not a captions file')


def test_coco_from_a_zip_lists_its_names_once(folder, monkeypatch):
    names = [f'{i:012d}.jpg' for i in range(300)]
    coco(folder / 'captions.json', names)
    with zipfile.ZipFile(folder / 'train2017.zip', 'w') as archive:
        for name in names:
            archive.writestr(f'train2017/{name}', image_bytes('red'))
    calls = []
    monkeypatch.setattr(zipfile.ZipFile, 'infolist', lambda self: calls.append(self) or self.filelist)
    monkeypatch.setattr(zipfile.ZipFile, 'namelist', lambda self: calls.append(self) or list(self.NameToInfo))
    process = inside('prepare_data.py', 'coco_captions', '--source=captions.json', '--image_dir=train2017.zip')
    assert process.returncode == 0, process.stderr
    assert len(calls) == 1


def shard(path, first, count, cut=None):
    """A .tar in the WebDataset format, as img2dataset writes it and pixparse/cc3m-wds is published."""
    with tarfile.open(path, 'w') as tar:
        for i in range(first, first + count):
            image = image_bytes((i, 0, 0))[:cut if i == first else None]
            for kind, data in (('jpg', image), ('json', json.dumps({'caption': f'No {i}', 'status': 'success'}).encode()),
                               ('txt', f'Image number {i}'.encode())):
                member = tarfile.TarInfo(f'{i:09d}.{kind}')
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_images_are_read_out_of_tars_in_place(folder):
    (folder / 'wds').mkdir()
    shard(folder / 'wds' / 'cc3m-train-0000.tar', 0, 9)
    shard(folder / 'wds' / 'cc3m-train-0001.tar', 9, 9, cut=150)
    process = inside('prepare_data.py', 'cc3m', '--source=wds', '--name=cc', '--val_every=4')
    assert process.returncode == 0 and 'skipped: 1 rows, the image is broken' in process.stderr, process.stderr
    rows = read('cc', 'train') + read('cc', 'val')
    assert sorted(int(row['text'].rpartition(' ')[2]) for row in rows) == [i for i in range(18) if i != 9]
    for row in open_rows('cc', 'val'):
        number = int(row['text'].rpartition(' ')[2])
        assert row['references'] == [f'Image number {number}']
        assert abs(load_image(row['images'][0]).getpixel((0, 0))[0] - number) < 4
    written = sorted(p.name for p in Path('data/cc').iterdir() if 'index' not in p.name)
    assert written == ['skipped.jsonl', 'train.jsonl', 'val.jsonl']
    assert [row['image'] for row in read('cc', 'skipped')] == ['cc3m-train-0001.tar/000000009.jpg']
    one = inside('prepare_data.py', 'cc3m', '--source=wds/cc3m-train-0000.tar', '--name=one', '--val_every=4')
    assert one.returncode == 0 and len(read('one', 'train') + read('one', 'val')) == 9, one.stderr
    (folder / 'wds' / 'cc3m-train-0000.tar').write_bytes(b'')
    refused(inside('prepare_data.py', 'cc3m', '--source=wds', '--name=other'), 'cc3m-train-0000.tar is broken or cut off')
    assert not Path('data/other/train.jsonl').exists()


def test_tars_of_the_hub_are_downloaded_and_stay_tars(folder, monkeypatch):
    import huggingface_hub
    shard(folder / 'a.tar', 0, 30)
    shard(folder / 'b.tar', 30, 30)
    monkeypatch.setattr(huggingface_hub, 'list_repo_files', lambda *args, **kwargs: ['README.md', 'b.tar', 'a.tar'])
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda repository, file, repo_type: str(folder / file))
    process = inside('prepare_data.py', 'cc3m', '--val_every=4', '--max_examples=40')
    assert process.returncode == 0, process.stderr
    rows = read('cc3m', 'train') + read('cc3m', 'val')
    assert len(rows) == 40 and {Path(row['images'][0]).parent.name for row in rows} == {'a.tar', 'b.tar'}

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError('offline')

    monkeypatch.setattr(huggingface_hub, 'list_repo_files', offline)
    refused(inside('prepare_data.py', 'cc3m'), 'pixparse/cc3m-wds cannot be listed', '--source=FOLDER')


def test_a_folder_that_img2dataset_has_written_is_read_in_place(folder):
    (folder / 'mine' / '00000').mkdir(parents=True)
    for i in range(8):
        (folder / 'mine' / '00000' / f'{i:09d}.jpg').write_bytes(image_bytes((0, i, 0)))
        if i != 3:
            (folder / 'mine' / '00000' / f'{i:09d}.txt').write_text(f' green  {i}\n')
    process = inside('prepare_data.py', 'cc3m', '--source=mine', '--val_every=3')
    assert process.returncode == 0 and 'skipped: 1 rows, it has no caption' in process.stderr, process.stderr
    rows = read('mine', 'train') + read('mine', 'val')
    assert len(rows) == 7 and all(row['images'][0].startswith(str(folder)) for row in rows)
    assert rows[0]['text'].startswith('<image>green ')
    process = inside('prepare_data.py', 'cc3m', '--source=mine', '--val_every=3', '--max_examples=5', '--name=five')
    assert process.returncode == 0, process.stderr
    assert len(read('five', 'train') + read('five', 'val')) == 4
    refused(inside('prepare_data.py', 'cc3m', '--source=nowhere'), 'neither a folder, a .tar, nor OWNER/NAME')
    (folder / 'x.zip').write_bytes(b'')
    refused(inside('prepare_data.py', 'cc3m', '--source=x.zip'), 'neither a folder, a .tar, nor OWNER/NAME')


# ---------------------------------------------------------------------------------------------------------------------
# augmentation

def test_augmentation_crops_and_changes_colors_as_the_seed_says():
    x = np.linspace(0, 255, 60).astype(np.uint8)
    channels = np.tile(x, (40, 1)), np.tile(x[:40, None], (1, 60)), np.full((40, 60), 90, np.uint8)
    image = Image.fromarray(np.stack(channels, -1))
    same = augment_image(image, random.Random(3), 'crop+color')
    assert same.tobytes() == augment_image(image, random.Random(3), 'crop+color').tobytes()
    crops = [augment_image(image, random.Random(i), 'crop') for i in range(100)]
    areas = [c.width * c.height / 2400 for c in crops]
    assert 0.45 < min(areas) < 0.6 and max(areas) > 0.9 and len({c.size for c in crops}) > 50
    for c in crops:  # a part of it, neither mirrored nor scaled
        a = np.asarray(c)
        left, top = int(np.searchsorted(x, a[0, 0, 0])), int(np.searchsorted(x, a[0, 0, 1]))
        assert np.array_equal(a, np.asarray(image)[top:top + c.height, left:left + c.width])
    colors = [augment_image(image, random.Random(i), 'color') for i in range(20)]
    assert {c.size for c in colors} == {(60, 40)} and len({c.tobytes() for c in colors}) == 20


def test_only_training_images_are_augmented_each_time_differently(tmp_path):
    Image.linear_gradient('L').convert('RGB').save(tmp_path / 'a.png')
    rows = [{'text': '<image>A gradient.', 'images': [str(tmp_path / 'a.png')]}] * 3
    knobs = SimpleNamespace(tasks='ocr:1', augment='crop+color')
    examples = dataloader.Examples([dict(row) for row in rows], knobs, 5)
    variants = [examples[i]['images'][0] for i in (0, 1, 2, 3, 4, 5)]
    assert len({image.tobytes() for image in variants}) == 6
    again = dataloader.Examples([dict(row) for row in rows], knobs, 5)
    assert [again[i]['images'][0].tobytes() for i in (5, 0)] == [variants[i].tobytes() for i in (5, 0)]
    with pytest.raises(ValueError, match="augment must be crop, color or crop.color, .* got 'flip'"):
        dataloader.Examples(rows, SimpleNamespace(tasks='ocr:1', augment='flip'), 5)
    held_out = dataloader.Examples(rows, knobs, 0, shuffle=False)
    assert held_out[0]['images'] == [str(tmp_path / 'a.png')]


# ---------------------------------------------------------------------------------------------------------------------
# scores

def random_captions(n=200):
    """n predictions and one to five references of each, of a few words, so that they share some."""
    rng, words = random.Random(0), 'a the cat dog man red old sits runs on in mat street with'.split()
    caption = lambda: ' '.join(rng.choice(words) for _ in range(rng.randint(1, 12)))
    references = [[caption() for _ in range(rng.randint(1, 5))] for _ in range(n)]
    near = lambda refs: ' '.join(w for w in rng.choice(refs).split() if rng.random() < 0.8) or caption()
    return [near(refs) if rng.random() < 0.7 else caption() for refs in references], references


# of random_captions(), as pycocoevalcap 1.2 has computed them
PYCOCOEVALCAP = {'bleu4': 0.517105303635813, 'rouge_l': 0.7057967713581246, 'cider_d': 2.411620726110485}


def test_bleu_rouge_and_cider_are_pycocoevalcaps():
    predictions, references = random_captions()
    found = score_captions(predictions, [{'references': refs} for refs in references])
    assert found == pytest.approx(PYCOCOEVALCAP, abs=1e-6)


def test_without_pycocoevalcap_its_scores_are_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'pycocoevalcap.bleu.bleu', None)  # its import raises ImportError
    assert score_captions(['a cat'], [{'references': ['a cat', 'the cat']}]) == {}
    out, err = capsys.readouterr()
    assert out == '' and err.count("pip install 'glimpse[captions]' adds them") == err.count('\n') == 1


def test_answers_to_held_out_captions_are_scored_as_captions(folder, monkeypatch):
    (folder / 'data' / 'few').mkdir(parents=True)
    for part, references in (('train', {}), ('val', {'references': ['Red one.', 'A red thing.']})):
        rows = [{'text': '<image>Red one.', 'images': [f'{part}{i}.png'], **references} for i in range(3)]
        (folder / 'data' / 'few' / f'{part}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        for i in range(3):
            Image.new('RGB', (24, 16), (200, i, 0)).save(folder / 'data' / 'few' / f'{part}{i}.png')
    knobs = ['--dataset=few', '--learning_rate=1e-2', '--connector_lr=1e-2', '--max_iters=40', '--eval_interval=40']
    process = train(folder / 'out', *knobs)
    assert process.returncode == 0, process.stderr
    process = inside('sample.py', '--out_dir=out', '--eval=few', '--max_new_tokens=12')
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found['exact'] == 1 and found['rouge_l'] == 1 and {'bleu4', 'cider_d'} <= set(found)
    monkeypatch.setitem(sys.modules, 'pycocoevalcap.bleu.bleu', None)
    process = inside('sample.py', '--out_dir=out', '--eval=few', '--max_new_tokens=12')
    assert process.returncode == 0 and "'glimpse[captions]' adds them" in process.stderr, process.stderr
    assert json.loads(process.stdout) == {k: v for k, v in found.items() if k not in PYCOCOEVALCAP}


def test_scores_of_what_is_equal_and_of_what_has_nothing_in_common():
    predictions, references = random_captions(50)
    equal = score_captions([refs[0] for refs in references], [{'references': refs[:1]} for refs in references])
    assert equal['bleu4'] == pytest.approx(1) and equal['rouge_l'] == pytest.approx(1) and 5 < equal['cider_d'] <= 10
    other = score_captions(['zebra zebra'] * 50, [{'references': refs} for refs in references])
    assert other['bleu4'] < 1e-3 and other['rouge_l'] == other['cider_d'] == 0
    assert score_captions([''] * 50, [{'references': refs} for refs in references])['cider_d'] == 0
    assert caption_words("A man's cat, on  the (red) mat!") == ['a', "man's", 'cat', 'on', 'the', 'red', 'mat']
    assert score_captions(['a'], [{'references': ['a']}])['cider_d'] == 0  # of one image alone every word is common
    # references without words, of which pycocoevalcap's CIDEr-D alone would fail, and its ROUGE-L reward no answer
    assert max(score_captions(['', 'a'], [{'references': ['!!']}] * 2).values()) < 1e-6
