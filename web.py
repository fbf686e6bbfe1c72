"""
A page in the browser for any model, `python sample.py --web`: ask about images, and look at what the model reads of them, how
sure it is of each word and where it looks. Gradio draws the page: pip install -e '.[web]'.

    to_example   the page's chat -> the example that every other file knows
    Page         a model, and what happens when something on the page is pressed
    build        the page itself

A model that continues texts gets the last turn alone, one that chats also if the conversation no longer fits. BLIP-2's first
stage ranks captions, one a line.
"""

import html
import os
import tempfile
from dataclasses import replace
from functools import partial

import gradio as gr
from PIL import Image, ImageDraw

import render
from blip2 import QFormerPretraining
from dataloader import IMAGE, TooLong, image_error, load_image, tokenize
from evaluate import attention_maps, plain_text, rank_captions, reference, stream_answer, word_probabilities
from patches import assemble, num_tokens, token_cells

MAX_MEGABYTES = 20         # of a file
MAX_PIXELS = 50_000_000    # of an image
VIEW_WIDTH = 1000          # pixels to which small images are magnified

def file_error(path):
    """'' for an image file that the page takes, else a sentence."""
    name = os.path.basename(path)
    try:
        with Image.open(path) as image:  # reads the size only
            width, height = image.size
    except Exception:  # for a damaged file Pillow raises nearly anything
        return f'{name} is not an image that can be read'
    if width * height > MAX_PIXELS:
        return f'{name} has {width} x {height} pixels, more than {MAX_PIXELS:,}: scale it down'
    problem = image_error(path)
    return f'{name}: {problem}' if problem else ''

def last_turn(history):
    """The messages after the last answer."""
    answers = [i for i, message in enumerate(history) if message['role'] == 'assistant']
    return history[answers[-1] + 1:] if answers else history

def to_example(history, as_chat):
    """The page's chat as an example: an <image> for each file, before the text of its turn."""
    turns, images = [], []
    for message in history if as_chat else last_turn(history):
        if not turns or turns[-1]['role'] != message['role']:
            turns.append({'role': message['role'], 'content': ''})
        for part in message['content']:
            if part['type'] == 'file':
                images.append(part['file']['path'])
                turns[-1]['content'] += IMAGE + '\n'
            else:
                turns[-1]['content'] += part['text']
    if as_chat:
        return {'messages': [{**turn, 'content': turn['content'].strip()} for turn in turns], 'images': images}
    text = turns[-1]['content'].replace(IMAGE + '\n', '')
    return {'text': text + len(images) * IMAGE, 'images': images}

def complaint(message):
    """The exception whose message the page shows."""
    return gr.Error(message, print_exception=False)  # it is no fault of the program

class Page:
    """A model, and what happens when something on the page is pressed. What a user did wrong is shown on the page."""

    def __init__(self, model, enc, autocast, as_chat, attention_layer=0):
        self.model = model
        self.enc = enc
        self.autocast = autocast
        self.as_chat = as_chat
        self.attention_layer = attention_layer
        self.ranks_captions = isinstance(model, QFormerPretraining)

    def add_turn(self, box, history):
        """What was typed and dropped, {'text', 'files'}, becomes the last turn of the chat, and the box is emptied."""
        text = box['text'].strip()
        n_files = len(box['files'])
        for error in filter(None, map(file_error, box['files'])):
            raise complaint(error)
        if n_files and not self.model.config.vision_encoder:
            raise complaint('This model is text-only: remove the image.')
        if self.ranks_captions and (n_files != 1 or not text):
            raise complaint('This model compares one image with captions: drop an image, and write captions, one a line.')
        if not n_files and not text:
            raise complaint('There is nothing to answer: write something, or drop an image.')
        parts = [{'path': path} for path in box['files']] + [text]
        return None, history + [{'role': 'user', 'content': part} for part in parts if part]

    def respond(self, history, temperature, top_k, top_p, max_new_tokens):
        """Yields the chat with as much of the answer as there is, and (example, ids, log-probabilities)."""
        if top_k is None or max_new_tokens is None:
            raise complaint('top_k and max_new_tokens have to be numbers.')
        example = to_example(history, self.as_chat)
        if self.as_chat and not self.fits(example, max_new_tokens):
            example = to_example(last_turn(history), self.as_chat)  # what came before is forgotten
        with_answer = lambda text: history + [{'role': 'assistant', 'content': text}]
        if self.ranks_captions:
            yield with_answer(self.rank(history)), (example, [], [])
            return
        answers = stream_answer(self.model, self.enc, example, temperature=temperature, top_k=int(top_k), top_p=top_p,
                                max_new_tokens=int(max_new_tokens))
        while True:
            try:
                with self.autocast:  # each time anew: the next token may come in another thread
                    ids, logprobs = next(answers)
            except StopIteration:
                return
            except ValueError as error:
                raise complaint(str(error)) from None
            text = plain_text(self.enc.decode(ids), example)
            yield with_answer(text.rstrip('\ufffd')), (example, ids, logprobs)

    def fits(self, example, max_new_tokens):
        """Whether block_size has room for a conversation and an answer as long as it may be."""
        config = self.model.config
        try:
            tokenize(example, self.enc, replace(config, block_size=config.block_size - max_new_tokens), prompt_only=True)
        except TooLong:
            return False
        return True

    def rank(self, history):
        """The captions of the last turn, one a line, with their similarity to its image, the most similar first."""
        turn = to_example(history, as_chat=False)
        captions = [line.strip() for line in turn['text'].removesuffix(IMAGE).split('\n') if line.strip()]
        with self.autocast:
            ranked = rank_captions(self.model, self.enc, turn['images'][0], captions)
        return '\n'.join(f'{score:.3f}  {caption}' for caption, score in ranked)

    def explain(self, last):
        """The words of the last answer with their probabilities, as HTML, and a sheet of the images as the model reads them."""
        if not last:
            return '', None
        example, ids, logprobs = last
        words = word_probabilities(self.enc, ids, logprobs)
        return ''.join(word_html(word, p) for word, p in words), self.views(example['images'])

    def views(self, sources):
        """A sheet of image files as the encoder reads them, with lines between the cells that become tokens; or None."""
        config = self.model.config
        example = {'text': len(sources) * IMAGE, 'images': sources}
        images = tokenize(example, self.enc, config, prompt_only=True)['images'] if sources else []
        views, captions = [], []
        for patches, grid in images:
            view = assemble(patches, grid, config)
            rows, cols = (token_cells(grid, config).amax(0) + 1).tolist()
            views.append(draw_cells(view, rows, cols))
            captions.append(f'{view.width} x {view.height} pixels, {len(grid)} patches of {config.patch_width} x '
                            f'{config.patch_height}, {num_tokens((patches, grid), config)} tokens')
        return sheet(views, captions)

    def look(self, last):
        """A sheet of the image for each word of the last answer, red where it looked."""
        if not last or not last[0]['images'] or not last[1]:
            raise complaint('Ask about an image first.')
        example, ids, _ = last
        try:
            with self.autocast:
                maps = attention_maps(self.model, self.enc, example, ids, self.attention_layer)
        except ValueError as error:
            raise complaint(str(error)) from None
        return sheet([magnify(image) for _, image in maps], [word for word, _ in maps])

def word_html(word, probability):
    """A word on a color from red to green, by its probability, which stands above it in percent."""
    if not word.strip():
        return html.escape(word)
    color = f'hsl({120 * probability:.0f}, 70%, 85%)'
    return f'<ruby style="background: {color}; color: black">{html.escape(word)}<rt>{100 * probability:.0f}</rt></ruby>'

def magnify(image):
    """The image, if it is small, a whole number of times as large, so that its pixels can be seen."""
    factor = max(1, VIEW_WIDTH // image.width)
    return image.resize((factor * image.width, factor * image.height), Image.NEAREST)

def draw_cells(image, rows, cols):
    """The image, magnified, with lines between rows x cols cells."""
    image = magnify(image)
    pen = ImageDraw.Draw(image)
    for row in range(1, rows):
        y = row * image.height // rows
        pen.line([(0, y), (image.width, y)], 'orange')
    for col in range(1, cols):
        x = col * image.width // cols
        pen.line([(x, 0), (x, image.height)], 'orange')
    return image

def sheet(images, captions):
    """A contact sheet for the page's right column, lines of text in one column, other images in two; None without one."""
    if not images:
        return None
    columns = 1 if images[0].width > 4 * images[0].height else 2
    return render.contact_sheet(images, captions, cell=640 // columns, columns=columns)

def save_examples(examples, ranks_captions):
    """Examples as values of the page's box, [{'text', 'files'}]; their images, which may be drawn, become files."""
    folder = tempfile.mkdtemp()
    captions = '\n'.join(map(reference, examples))
    values = []
    for example in examples:
        paths = []
        for source in example['images']:
            paths.append(os.path.join(folder, f'{len(os.listdir(folder))}.png'))
            load_image(source).save(paths[-1])
        asked = [turn['content'] for turn in example.get('messages', []) if turn['role'] == 'user'][:1]
        question = ''.join(asked).replace(IMAGE, '').strip()
        values.append({'text': captions if ranks_captions else question, 'files': paths})
    return values

def build(page, title, examples, temperature, top_k, top_p, max_new_tokens):
    """The gradio.Blocks of a Page, with examples to press, and the first values of the sampling knobs."""
    hint = 'Drop or paste images, and ask'
    if page.ranks_captions:
        hint = 'Drop or paste an image, and write captions, one a line'
    elif not page.as_chat:
        hint = 'Drop or paste an image, or begin a text'
    image_output = partial(gr.Image, format='png', interactive=False, show_label=False, buttons=['fullscreen'])
    with gr.Blocks(title='glimpse', analytics_enabled=False) as blocks:
        gr.Markdown(f'### {title}')
        last = gr.State()  # (example, ids, log-probabilities) of the newest answer
        with gr.Row():
            with gr.Column(scale=3):
                chat = gr.Chatbot(height=420, render_markdown=False, show_label=False, buttons=['copy'])
                box = gr.MultimodalTextbox(file_count='multiple', file_types=['image'], sources=['upload'],
                                           placeholder=hint, show_label=False, autofocus=True)
                with gr.Row():
                    stop = gr.Button('Stop', elem_id='stop')
                    clear = gr.Button('New conversation', elem_id='clear')
                if examples:
                    gr.Examples(save_examples(examples, page.ranks_captions), box, label='Held-out examples')
                with gr.Accordion('Sampling', open=False):
                    knobs = [gr.Slider(0, 2, temperature, step=0.05, label='temperature', info='0: the most likely token'),
                             gr.Number(top_k, label='top_k', info='0: all', precision=0, minimum=0),
                             gr.Slider(0, 1, top_p, label='top_p'),
                             gr.Number(max_new_tokens, label='max_new_tokens', precision=0, minimum=1)]
            with gr.Column(scale=2):
                gr.Markdown('**How sure was it?** Percent for each word.')
                words = gr.HTML(elem_id='words')
                gr.Markdown('**What did it read?**')
                views = image_output(elem_id='views')
                look = gr.Button('Where did it look?', elem_id='look', visible=not page.ranks_captions)
                maps = image_output(elem_id='maps', visible=not page.ranks_captions)
        hidden = {'show_progress': 'hidden'}  # an error would be drawn over the box, besides its message
        asked = box.submit(page.add_turn, [box, chat], [box, chat], **hidden)
        answered = asked.success(page.respond, [chat, *knobs], [chat, last], concurrency_id='model', **hidden)
        answered.then(page.explain, last, [words, views], **hidden)
        asked.success(lambda: None, None, maps)  # that of the answer before
        stop.click(None, cancels=answered)
        look.click(page.look, last, maps, concurrency_id='model', **hidden)
        clear.click(lambda: ([], None, '', None, None), None, [chat, last, words, views, maps], cancels=answered)
    return blocks

def serve(blocks, host, port):
    """Shows the page at a local address until Ctrl-C; host 0.0.0.0 shows it to the network."""
    blocks.launch(server_name=host, server_port=port or None, max_file_size=f'{MAX_MEGABYTES}mb', footer_links=[],
                  show_error=True, share=False)
