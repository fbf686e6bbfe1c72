"""OBELICS: web documents whose images are fetched, in the format of the hub, from a server of this machine."""

import io
import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
from conftest import inside, read_log, refused, train
from test_captions import image_bytes, shard

import prepare_data
from dataloader import load_image, open_rows
from prepare_data import prepare_obelics, web_name


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers['User-Agent']))
        name = self.path.rpartition('/')[2]
        if name.startswith('404'):
            return self.send_error(404)
        if name.startswith('slow'):
            time.sleep(3)
        self.send_response(200)
        self.end_headers()
        try:
            for chunk in self.chunks(name):
                self.wfile.write(chunk)
        except OSError:  # the client has had enough
            pass

    def chunks(self, name):
        image = image_bytes((len(name), 90, 0))
        if name.startswith('broken'):
            image = image[:300]
        elif name.startswith('page'):
            image = b'<!doctype html><title>Gone</title>'
        elif name.startswith('huge'):
            image += bytes(200_000)
        elif name.startswith('drip'):
            for byte in image:
                yield bytes([byte])
                time.sleep(0.1)
        yield image

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """The address of a server, with .requests: what it was asked for. The limits are those of a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, 'TIMEOUT', 1)
    monkeypatch.setattr(prepare_data, 'MAX_BYTES', 100_000)
    monkeypatch.setattr(ThreadingHTTPServer, 'request_queue_size', 100)
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.requests = []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def document(*entries):
    """A row with the columns of the hub: an entry is a URL or a text."""
    images = [entry if entry.startswith('http') else None for entry in entries]
    texts = [None if image else entry for image, entry in zip(images, entries)]
    metadata = [image and {'document_url': 'http://a.example', 'src': image, 'alt_text': 'An <image>'} for image in images]
    return {'images': images, 'metadata': json.dumps(metadata),
            'general_metadata': json.dumps({'url': 'http://a.example', 'warc_filename': 'x.warc.gz'}), 'texts': texts}


def write_parquet(path, rows):
    features = datasets.Features({
        'images': datasets.List(datasets.Value('string')), 'metadata': datasets.Value('string'),
        'general_metadata': datasets.Value('string'), 'texts': datasets.List(datasets.Value('string'))})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def read(part, name='obelics'):
    return [json.loads(line) for line in Path(f'data/{name}/{part}.jsonl').read_text().splitlines()]


def failed(name='obelics'):
    return Counter(row['reason'] for row in read('skipped', name) if 'failed_image' in row)


def filler(n=20):
    """Documents of text alone, so that there is one to hold out."""
    return [document(f'Filler {i}.') for i in range(n)]


def test_texts_and_images_keep_their_order_and_what_fails_is_left_out_and_counted(web, capsys):
    bad = {'404.jpg': 'HTTP status 404', 'slow.jpg': 'timed out', 'drip.jpg': 'timed out', 'huge.jpg': 'larger than 0.1 MB',
           'broken.jpg': 'the image is broken', 'page.jpg': 'the image is broken'}
    url = lambda name: f'{web.url}/{name}'
    rows = [
        document('First.\n\nSecond. ', url('a.jpg'), ' Third with an <image>, an <ima<image>ge>.', url('b.PNG?w=3'), 'End.'),
        *(document(f'Before {name}.', url(name), f'After {name}.', url('a.jpg')) for name in bad),
        document('All are gone.', url('404.jpg?x=1'), 'Text stays.', 'http://127.0.0.1:1/x.jpg', 'http:/nowhere.jpg'),
        document(url('a.jpg'), url('never.jpg')), document(url('404.jpg'), '  '), document(),
        {**document('Both.'), 'images': [url('a.jpg')]}, {**document('One.'), 'texts': [None]},
        {**document('One.'), 'images': [None, None]}, {**document('None.'), 'images': None},
        document(url('ä ö%20ü.jpg'), 'A name with blanks.'), *filler()]
    write_parquet('train-00000.parquet', rows)
    prepare_obelics('train-00000.parquet', val_every=4)
    err = capsys.readouterr().err
    examples = {row['text']: row['images'] for row in read('train') + read('val')}
    image = lambda name: f'images/{web_name(url(name))}'
    first = 'First.\n\nSecond.\n\n<image>\n\nThird with an  , an <ima ge>.\n\n<image>\n\nEnd.'
    assert examples[first] == [image('a.jpg'), image('b.PNG?w=3')]
    for name in bad:
        assert examples[f'Before {name}.\n\nAfter {name}.\n\n<image>'] == [image('a.jpg')]
    assert examples['All are gone.\n\nText stays.'] == [] and examples['Filler 3.'] == []
    assert examples['<image>\n\nA name with blanks.'] == [image('ä ö%20ü.jpg')]
    assert len(examples) == 2 + len(bad) + 1 + 20
    skipped = {row['row']: row['reason'] for row in read('skipped') if 'failed_image' not in row}
    assert skipped == {8: 'it has no text', 9: 'it has no text', 10: 'it has no text',
                       11: 'a place has both an image and a text, or neither',
                       12: 'a place has both an image and a text, or neither',
                       13: 'images and texts are not two lists of one length',
                       14: 'images and texts are not two lists of one length'}
    counts = Counter(bad.values()) + Counter(['HTTP status 404', 'no connection', 'no http address'])
    assert failed() == counts
    for reason, n in counts.items():
        assert f'left out: {n} images, {reason}\n' in err
    assert 'skipped: 3 rows, it has no text\n' in err
    assert (1, url('404.jpg')) in {(row['row'], row.get('failed_image')) for row in read('skipped')}
    # what is no example asks for no image, and what is there is not fetched again
    asked = [path for path, _ in web.requests]
    assert '/never.jpg' not in asked and '/%C3%A4%20%C3%B6%20%C3%BC.jpg' in asked
    assert all('Mozilla/5.0' in agent for _, agent in web.requests)
    files = {path.name for path in Path('data/obelics/images').iterdir()}
    assert files == {web_name(url(name)) for name in ('a.jpg', 'b.PNG?w=3', 'ä ö%20ü.jpg')}
    # the reader takes each document as it is written
    texts = {row['text']: row['images'] for row in [*open_rows('obelics', 'train'), *open_rows('obelics', 'val')]}
    assert texts == {text: [f'data/obelics/{name}' for name in names] for text, names in examples.items()}
    assert load_image(texts[first][0]).size == (40, 30)


def test_names_of_files():
    assert web_name('http://a.example/b.jpg') == 'b352bfbcaebc0110.jpg'
    assert web_name('http://a.example/b.jpg?w=3.5#x').endswith('.jpg')
    for url in ('http://a.example/b', 'http://a.example/b.html5', 'http://a.example/' + 'c.' * 300, 'http://[', ''):
        assert len(web_name(url)) == 16, url


def test_images_fetched_before_are_taken_from_a_folder(web, capsys):
    urls = [f'{web.url}/{i}.jpg' for i in range(4)]
    write_parquet('x.parquet', [document(*urls, 'Text.'), *filler()])
    Path('mine').mkdir()
    for url in urls[:2]:
        Path('mine', web_name(url)).write_bytes(image_bytes('red'))
    Path('mine', web_name(urls[2])).write_bytes(image_bytes('red')[:300])
    prepare_obelics('x.parquet', image_dir='mine', val_every=4)
    example, = (row for row in read('train') + read('val') if row['images'])
    assert example == {'text': '<image>\n\n<image>\n\nText.', 'images': [f'{Path("mine").resolve()}/{web_name(url)}'
                                                                         for url in urls[:2]]}
    assert failed() == {'the image is broken': 1, 'the image is missing': 1} and not web.requests
    assert 'left out: 1 images, the image is missing' in capsys.readouterr().err
    refused(inside('prepare_data.py', 'obelics', '--source=x.parquet', '--image_dir=nowhere'), 'does not exist')
    refused(inside('prepare_data.py', 'obelics', '--source=nowhere'), 'nowhere does not exist, or has no .parquet')


def test_an_interrupted_run_continues_with_the_same_counts(web, monkeypatch, capsys):
    Path('hub').mkdir()
    bad = ('page', '404', '404')
    rows = [document(f'Number {i}.', f'{web.url}/{i}.jpg', f'{web.url}/{bad[i % 3]}-{i}.jpg') for i in range(60)]
    write_parquet('hub/train-00000.parquet', rows[:30])
    Path('hub/train-00001.jsonl').write_text('\n'.join(map(json.dumps, rows[30:])))
    prepare_obelics('hub', name='whole', val_every=4)
    counts = [line for line in capsys.readouterr().err.splitlines() if line.startswith('left out')]
    assert counts == ['left out: 40 images, HTTP status 404', 'left out: 20 images, the image is broken']
    n_requests = len(web.requests)
    web.requests.clear()
    fetch = prepare_data.fetch_image

    def interrupted(url, path):
        if url.endswith('/40.jpg'):
            raise KeyboardInterrupt
        return fetch(url, path)

    monkeypatch.setattr(prepare_data, 'fetch_image', interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_obelics('hub', val_every=4)
    assert len(web.requests) >= 80 and not Path('data/obelics/train.jsonl').exists()
    monkeypatch.setattr(prepare_data, 'fetch_image', fetch)
    prepare_obelics('hub', val_every=4)
    err = capsys.readouterr().err
    assert 'resuming after 40 rows' in err
    assert [line for line in err.splitlines() if line.startswith('left out')] == counts
    for part in ('train', 'val', 'skipped'):
        assert read(part) == read(part, 'whole')
    good = [path for path, _ in web.requests if path[1:-4].isdigit()]
    assert len(good) == len(set(good)) == 60, 'an image that is there is not fetched again'
    assert n_requests <= len(web.requests) < n_requests + 20


def test_a_dead_host_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, 'TIMEOUT', 0.2)
    dead = socket.create_server(('127.0.0.1', 0), backlog=100)  # takes a connection and says nothing
    host = f'127.0.0.1:{dead.getsockname()[1]}'
    write_parquet('x.parquet', [document(f'Number {i}.', f'http://{host}/{i}.jpg') for i in range(40)])
    start = time.monotonic()
    prepare_obelics('x.parquet', val_every=4)
    assert time.monotonic() - start < 20
    dead.close()
    assert failed()['timed out'] == 40 == len(read('train') + read('val'))


@pytest.mark.parametrize('url', ['file:///etc/hostname', 'ftp://a.example/x.jpg', 'data:image/png;base64,', 'http://', '//x'])
def test_only_web_addresses_are_opened(tmp_path, monkeypatch, url):
    monkeypatch.setattr(prepare_data.urllib.request, 'urlopen', lambda *args, **kwargs: io.BytesIO(image_bytes('red')))
    assert prepare_data.fetch_image(url, tmp_path / 'x.jpg') == 'no http address'


@pytest.mark.parametrize('url', ['http://[', 'http://a.example:port/x', f'http://{"a" * 99}.example/x', 'http://\x00/x',
                                 'http://a.example/\ud800'])
def test_an_address_that_is_none_is_a_failed_image(tmp_path, url):
    assert prepare_data.fetch_image(url, tmp_path / 'x.jpg') == 'no connection'


def test_the_hub_is_streamed(web, monkeypatch):
    rows = [document(f'Number {i}.', f'{web.url}/{i}.jpg') for i in range(40)]
    calls = []
    monkeypatch.setattr(datasets, 'load_dataset', lambda *args, **kwargs: calls.append((args, kwargs)) or iter(rows))
    prepare_obelics(max_examples=30, val_every=4)
    assert calls == [(('HuggingFaceM4/OBELICS',), {'split': 'train', 'streaming': True})]
    assert len(read('train') + read('val')) == 30


def test_documents_are_held_out_by_their_text(web):
    write_parquet('x.parquet', [document(f'Number {i}.', f'{web.url}/logo.jpg') for i in range(40)] + filler(40))
    prepare_obelics('x.parquet', val_every=4)
    held_out = read('val')
    for has_image in (False, True):
        assert 3 < sum(bool(row['images']) == has_image for row in held_out) < 20


STAGE = ['--line_height=0', '--patch_width=16', '--max_image_tokens=9', '--block_size=96', '--optimizer=adamw',
         '--packing=True', '--max_images=4', '--max_iters=4', '--eval_interval=2']


@pytest.mark.parametrize('name', ['obelics', 'cc3m'])
def test_interleaved_documents_and_pairs_feed_packed_training(web, name):
    if name == 'obelics':
        rows = [document('Cats. ' * (i % 5), f'{web.url}/{i}.jpg', f'Number {i}.', f'{web.url}/{"404" if i % 2 else "a"}.jpg',
                         'dogs' * (40 if i % 9 == 0 else 1), f'{web.url}/{i}.png', 'End.') for i in range(40)]
        write_parquet('x.parquet', [*rows, *filler()])
        process = inside('prepare_data.py', 'obelics', '--source=x.parquet', '--val_every=4')
    else:
        shard('cc3m-train-0000.tar', 0, 40)
        process = inside('prepare_data.py', 'cc3m', '--source=cc3m-train-0000.tar', '--val_every=4', '--name=cc3m')
    assert process.returncode == 0, process.stderr
    process = train('out', f'--dataset={name}', *STAGE, f'--image_marks={name == "obelics"}')
    assert process.returncode == 0, process.stderr
    log = read_log('out')
    losses = [row for row in log if 'loss' in row]
    assert [row['iter'] for row in losses] == [1, 2, 3, 4] and losses[-1]['loss'] < losses[0]['loss']
    assert (losses[-1]['left_out'] > 0) == (name == 'obelics')  # documents longer than a row up to their last image
    evals = [row['eval'] for row in log if 'eval' in row]
    assert {'val_loss', 'blank_loss', 'shuffled_loss'} <= set(evals[-1])
