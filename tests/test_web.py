"""The page in the browser: what its buttons do, and, where a Chromium is installed, that a person can press them."""

import shutil
import time

import gradio as gr
import pytest
import torch
from conftest import inside, make_model, tiny_config
from PIL import Image

import web
from blip2 import QFormerPretraining
from dataloader import Examples, get_tokenizer
from evaluate import answer, rank_captions

BYTES = get_tokenizer('bytes')
FLOAT32 = torch.autocast('cpu', enabled=False)
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
SAMPLING = (0.0, 0, 1.0, 12)  # temperature, top_k, top_p, max_new_tokens


@pytest.fixture
def model():
    """It answers in small letters: the others, tied to the head's rows, have none."""
    model = make_model(image_token=BYTES.image_id)
    keep = torch.zeros(320, 1)
    keep[97:123] = 1
    model.lm_head.weight.data *= keep
    return model


@pytest.fixture
def line(tmp_path):
    path = tmp_path / 'line.png'
    Image.effect_noise((32, 16), 80).convert('RGB').save(path)
    return str(path)


def file_part(path):
    return {'type': 'file', 'file': {'path': path}}


def turn(role, *parts):
    """As gradio gives a message of the chat to a function."""
    return [{'role': role, 'content': [part if isinstance(part, dict) else {'type': 'text', 'text': part}]} for part in parts]


def test_the_chat_is_an_example():
    history = (turn('user', file_part('a.png'), file_part('b.png'), 'What?') + turn('assistant', 'This.')
               + turn('user', file_part('c.png'), 'And this?'))
    assert web.to_example(history, True) == {
        'messages': [{'role': 'user', 'content': '<image>\n<image>\nWhat?'}, {'role': 'assistant', 'content': 'This.'},
                     {'role': 'user', 'content': '<image>\nAnd this?'}],
        'images': ['a.png', 'b.png', 'c.png']}
    assert web.to_example(history, False) == {'text': 'And this?<image>', 'images': ['c.png']}
    assert web.to_example(turn('user', 'Once'), False) == {'text': 'Once', 'images': []}


def test_a_conversation_that_no_longer_fits_is_forgotten(model, line):
    page = web.Page(model, BYTES, FLOAT32, True)
    last = turn('user', file_part(line), 'And this?')
    # of 64 positions the prompts take 22, 56 and 84, and an answer up to 12
    for first, n_messages in (('Hi', 3), ('x' * 36, 1), ('x' * 64, 1)):
        history = turn('user', first) + turn('assistant', 'Yes.') + last
        steps = list(page.respond(history, *SAMPLING))
        assert len(steps[-1][1][0]['messages']) == n_messages
        assert len(steps[-1][0]) == len(history) + 1  # the page shows all of it


@pytest.mark.parametrize('as_chat', [True, False])
def test_an_answer_grows_to_what_sample_py_answers(model, line, as_chat):
    page = web.Page(model, BYTES, FLOAT32, as_chat)
    history = turn('user', file_part(line), 'What?')
    steps = list(page.respond(history, *SAMPLING))
    texts = [chat[-1]['content'] for chat, _ in steps]
    expected, = answer(model, BYTES, [web.to_example(history, as_chat)], max_new_tokens=12)
    assert len(expected.text) == 12 and texts == [expected.text[:n] for n in range(13)]
    shown, _ = page.explain(steps[-1][1])
    assert expected.text in shown and (int(shown.split('<rt>')[1].split('<')[0]) < 50) == ('?]' in expected.marked)


def test_what_is_shown_is_what_the_encoder_reads(model, line, monkeypatch):
    """A sheet of the images, with their sizes, patches and tokens; and of the words, red where they looked."""
    page = web.Page(model, BYTES, FLOAT32, True)
    history = turn('user', file_part(line), file_part(line), 'What?')
    *_, (_, last) = page.respond(history, *SAMPLING)
    sheets = []
    monkeypatch.setattr(web.render, 'contact_sheet', lambda images, captions, **_: sheets.append((images, captions)) or 'sheet')
    _, sheet = page.explain(last)
    assert sheet == 'sheet' and sheets[0][1] == ['32 x 16 pixels, 8 patches of 8 x 8, 8 tokens'] * 2
    assert page.look(last) == 'sheet' and ''.join(sheets[1][1]) == BYTES.decode(last[1])
    view = sheets[0][0][0].resize((32, 16), Image.NEAREST)  # lines between cells are one pixel of 31
    assert list(view.getdata()) == list(Image.open(line).getdata())


def test_a_first_stage_ranks_captions(line):
    torch.manual_seed(0)
    config = tiny_config(connector='qformer', n_queries=4, qformer_n_layer=1, qformer_n_head=2, qformer_n_embd=32, proj_dim=16,
                         objective='itc', image_token=BYTES.image_id)
    model = QFormerPretraining(config).eval()
    page = web.Page(model, BYTES, FLOAT32, True)
    (chat, last), = page.respond(turn('user', file_part(line), 'a cat\n\n a dog \na cow'), *SAMPLING)
    ranked = rank_captions(model, BYTES, line, ['a cat', 'a dog', 'a cow'])
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
    assert chat[-1]['content'] == '\n'.join(f'{score:.3f}  {caption}' for caption, score in ranked)
    assert page.explain(last)[1] is not None
    with pytest.raises(gr.Error, match='one image with captions'):
        page.add_turn({'text': 'a cat', 'files': []}, [])
    web.build(page, 'first stage', [], *SAMPLING)


def test_mistakes_are_said_on_the_page(model, line, tmp_path):
    page = web.Page(model, BYTES, FLOAT32, True)
    broken, huge = tmp_path / 'broken.png', tmp_path / 'huge.png'
    broken.write_bytes(b'\x89PNG\r\n\x1a\n nothing more')
    Image.new('1', (10_000, 5_001)).save(huge)
    cut = tmp_path / 'cut.png'
    cut.write_bytes(open(line, 'rb').read()[:400])
    refusals = [({'text': '', 'files': [str(broken)]}, 'broken.png is not an image'),
                ({'text': '', 'files': [str(cut)]}, 'cut.png'),
                ({'text': 'x', 'files': [line, str(huge)]}, '10000 x 5001 pixels, more than 50,000,000'),
                ({'text': '  ', 'files': []}, 'nothing to answer')]
    for box, message in refusals:
        with pytest.raises(gr.Error, match=message):
            page.add_turn(box, [])
    with pytest.raises(gr.Error, match='block_size'):
        list(page.respond(turn('user', 'too long ' * 20), *SAMPLING))
    with pytest.raises(gr.Error, match='have to be numbers'):
        next(page.respond(turn('user', 'Hi'), 0.0, 0, 1.0, None))
    with pytest.raises(gr.Error, match='Ask about an image first'):
        page.look(None)
    text_only = web.Page(make_model(vision_encoder=''), BYTES, FLOAT32, True)
    with pytest.raises(gr.Error, match='text-only'):
        text_only.add_turn({'text': '', 'files': [line]}, [])


def test_sample_py_serves_the_run_at_a_local_address(run_dir, monkeypatch):
    served = {}
    monkeypatch.setattr(gr.Blocks, 'launch', lambda self, **words: served.update(words, blocks=self))
    process = inside('sample.py', f'--out_dir={run_dir}', '--web', '--device=cpu', '--max_new_tokens=6')
    assert process.returncode == 0, process.stderr
    assert served['server_name'] == '127.0.0.1' and served['share'] is False and served['max_file_size'] == '20mb'
    examples = [block for block in served['blocks'].blocks.values() if isinstance(block, gr.Dataset)]
    assert len(examples[0].samples) == 4
    # conversations without an image show nothing
    monkeypatch.setattr(Examples, '__getitem__', lambda self, i: {'messages': [{'role': 'user', 'content': 'Hi'}]})
    process = inside('sample.py', f'--out_dir={run_dir}', '--web', '--device=cpu')
    assert process.returncode == 0, process.stderr
    assert not any(isinstance(block, gr.Dataset) for block in served['blocks'].blocks.values())


# -----------------------------------------------------------------------------
# in a browser

@pytest.fixture
def browser():
    """A page of a headless Chromium."""
    if not CHROMIUM:
        pytest.skip('needs a Chromium')
    from playwright.sync_api import Error, sync_playwright
    switches = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
                '--disable-component-update', '--disable-sync']
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        except Error as error:
            pytest.skip(f'the Chromium does not start: {error}')
        page = chromium.new_page(viewport={'width': 1280, 'height': 900})
        page.set_default_timeout(120_000)
        yield page
        chromium.close()


BRING = """async ([name, bytes, pastes]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
    const target = document.querySelector('textarea');
    const rest = {bubbles: true, cancelable: true};
    if (pastes)
        return target.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, ...rest}));
    for (const kind of ['dragenter', 'dragover', 'drop'])
        target.dispatchEvent(new DragEvent(kind, {dataTransfer: data, ...rest}));
}"""


def bring(browser, path, pastes=False):
    """Drops a file on the box, or pastes it."""
    browser.evaluate(BRING, [path.rpartition('/')[2], list(open(path, 'rb').read()), pastes])
    if not path.endswith('large.png'):
        browser.wait_for_selector('.thumbnail-item')


def ask(browser, text):
    box = browser.locator('textarea').first
    box.fill(text)
    box.press('Enter')


def last_answer(browser):
    return browser.locator('.bot .message-content, .message.bot').last


def test_a_person_uses_the_page(browser, model, line, tmp_path, monkeypatch):
    """Drops an image, asks, reads the answer, looks where it looked, pastes another, stops an endless answer, and asks again; a
    broken file and one that is too large are said to be so, and what was typed stays.
    """
    from playwright.sync_api import expect
    expect.set_options(timeout=120_000)
    endless = []

    def stream(model, enc, example, **sampling):
        if not example['messages'][-1]['content'].endswith('endless'):
            yield from real_stream(model, enc, example, **sampling)
            return
        endless.append(len(example['images']))
        try:
            ids = []
            while True:
                ids = ids + [ord('z')]
                yield ids, [0.0] * len(ids)
                time.sleep(0.02)
        finally:
            endless.append('ended')

    real_stream = web.stream_answer
    monkeypatch.setattr(web, 'stream_answer', stream)
    monkeypatch.setattr(web, 'MAX_MEGABYTES', 1)
    blocks = web.build(web.Page(model, BYTES, FLOAT32, True), 'a model', [], *SAMPLING)
    monkeypatch.setattr(gr.Blocks, 'launch', lambda self, *, real=gr.Blocks.launch, **words: real(
        self, prevent_thread_lock=True, quiet=True, **words))
    web.serve(blocks, '127.0.0.1', 0)
    try:
        outside = []
        is_local = lambda url: url.startswith((blocks.local_url, 'data:', 'blob:'))
        browser.on('request', lambda request: is_local(request.url) or outside.append(request.url))
        browser.goto(blocks.local_url)
        browser.wait_for_selector('textarea')
        bring(browser, line)
        ask(browser, 'What?')
        example = {'messages': [{'role': 'user', 'content': '<image>\nWhat?'}], 'images': [line]}
        expected, = answer(model, BYTES, [example], max_new_tokens=12)
        expect(last_answer(browser)).to_have_text(expected.text)
        expect(browser.locator('#words rt')).to_have_count(1)
        expect(browser.locator('#views img')).to_be_visible()
        expect(browser.locator('#maps img')).to_have_count(0)
        browser.click('#look')
        expect(browser.locator('#maps img')).to_be_visible()
        browser.screenshot(path=tmp_path / 'page.png')

        bring(browser, line, pastes=True)
        ask(browser, 'endless')
        browser.wait_for_function("[...document.querySelectorAll('.bot')].at(-1)?.innerText.includes('zzzzz')")
        expect(browser.locator('#maps img')).to_have_count(0)
        browser.click('#stop')
        browser.wait_for_function("[...document.querySelectorAll('#words')].at(-1)?.innerText.includes('zzzzz')")
        while endless != [2, 'ended']:
            time.sleep(0.05)

        (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n nothing more')
        bring(browser, str(tmp_path / 'broken.png'))
        ask(browser, 'Again?')
        expect(browser.get_by_text('broken.png is not an image that can be read')).to_be_visible()
        expect(browser.locator('textarea').first).to_have_value('Again?')
        browser.locator('.thumbnail-item button, .delete-button').first.click()
        browser.locator('textarea').first.press('Enter')
        expect(last_answer(browser)).not_to_contain_text('z' * 5)
        assert len(last_answer(browser).inner_text()) > 0

        large = tmp_path / 'large.png'
        Image.effect_noise((1600, 1600), 255).save(large)
        bring(browser, str(large))
        expect(browser.get_by_text('exceed the maximum allowed size of 1.0 Mb')).to_be_visible()
        assert not outside
    finally:
        blocks.close()
