"""
What you do with a trained model: ask, chat, evaluate. The answer goes to stdout, everything else to stderr.

    $ python sample.py --image line.png                                  # the newest run under out/
    $ python sample.py --image a.png b.png --prompt "What has changed?"  # several images, a question
    $ python sample.py --image a.png --interactive                       # a conversation
    $ python sample.py --image photos/ --prompt "Describe the image."    # every image of a folder, to a CSV
    $ python sample.py --image a.png --attention                         # which part of it did each word look at?
    $ python sample.py --image a.png --logprobs                          # which words is it not confident of?
    $ python sample.py --out_dir=out/text_bytes --prompt "The with" --temperature=0.8 --num_samples=3
    $ python sample.py --eval=data/mine/val.jsonl                        # losses, greedy CER and exact match
    $ python sample.py --eval=coco_captions                              # captions: also BLEU-4, CIDEr-D
    $ python sample.py --out_dir=out/qformer_cpu --eval=pydoc            # a Q-Former's first stage: recall
    $ python sample.py --compression out/a out/b --eval=pydoc            # how much text fits into an image token?
    $ python sample.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --interactive  # a text model, as it is
    $ python sample.py --web                                             # a page in the browser, see web.py
    $ python sample.py --out_dir=out/mine --export=DIR                   # weights for other programs
"""

import csv
import glob
import json
import os
import shutil
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

import render
from blip2 import QFormerPretraining
from configurator import configure, run
from dataloader import ASSISTANT, IMAGE, Examples, FileRows, get_tokenizer, image_error, load_image, parse_mixture
from evaluate import (Evaluation, answer, attention_maps, best_dtype, compression_table, find_device, held_out_examples,
                      map_across_ranks, note, open_evaluation, read_pages, warn_of_collapse)
from weights import build_model, read_weights, to_hugging_face

# -----------------------------------------------------------------------------
init_from = 'resume'     # out_dir's checkpoint; or, as in train.py, a checkpoint's path or a published model
out_dir = ''             # the folder of a run; '' takes the run under out/ with the newest checkpoint
checkpoint = 'ckpt.pt'   # or ckpt_best.pt, or the glimpse.safetensors of an export
image = ()               # image files, or one folder: the prompt is asked about each image of it
prompt = ''              # the question; <image> in it marks where the images stand, else they come first
interactive = False      # a conversation: every line you type is a turn, an empty one ends it
num_samples = 1          # number of answers
max_new_tokens = 256     # an answer has at most as many tokens
temperature = 0.0        # 0 is greedy, 1 samples from the model's own probabilities
top_k = 0                # sample from the k most likely tokens only; 0 for all
top_p = 1.0              # sample from the most likely tokens that hold this probability; 1 for all
seed = 1337
logprobs = False         # mark each word to which the model gave less than half the probability: [word?]
attention = False        # draw where in the images each word of the answer looked: attention.png in out_dir
attention_layer = 0      # the layer, from 1 on, whose heads are averaged for that; 0: the one at three quarters
chat = 'auto'            # yes: the prompt is a turn; no: it is a text to continue; auto: as in training
eval = ''                # a .jsonl file, a dataset or several: evaluate the model on it, as train.py does
compression = ()         # folders of runs: measure on --eval how much text their image tokens hold, a table and a plot
bucket = 0               # text tokens in a row of that table; 0: about six rows for a run
eval_samples = 512       # examples to answer, or images and captions to compare, in an evaluation
batch_size = 0           # examples at a time, in an evaluation or a folder; 0: as in training
web = False              # a page in the browser, at a local address
host = '127.0.0.1'       # of the page; 0.0.0.0 shows it to the network
port = 0                 # of the page; 0: the first free one from 7860 on
export = ''              # a new folder to write the model to
device = ''              # cuda, mps or cpu; '' takes the best that is there
dtype = ''               # float32, bfloat16 or float16; '' takes the best that the device has
tokenizer = ''           # as in train.py; '' takes the checkpoint's
vision_encoder = ''      # where a pretrained encoder's weights are now, if their file has moved
# -----------------------------------------------------------------------------

# what an evaluation needs of train.py's knobs, for a model that was trained elsewhere
DEFAULTS = dict(dataset='', text_dataset='', tasks='ocr', loss_on='assistant', eval_iters=8, batch_size=12,
                seed=1337, augment='', min_span=200, max_span=4000, tokenizer='', system_prompt='auto', packing=False,
                overfit_rows=0, chat_template='')
ONE_PROCESS = SimpleNamespace(rank=0, world_size=1, ddp=False)

def newest_run():
    """The folder under out/ with the newest checkpoint. Raises ValueError if there is none."""
    newest = max(glob.glob(f'out/**/{checkpoint}', recursive=True), key=os.path.getmtime, default='')
    if not newest:
        raise ValueError('no checkpoint under out/: train one first (torchrun train.py '
                         'config/quickstart.py), or name one with --out_dir or --init_from')
    folder = os.path.dirname(newest)
    note(f'{folder}: newest run')
    return folder

def load(source):
    """The model in eval mode on the device, its tokenizer, the knobs that it was trained with, autocast."""
    state = read_weights(source)
    overrides = {}
    if vision_encoder:
        overrides['vision_encoder'] = vision_encoder
    if state['model_args'].get('lora_scope') != 'image':
        overrides['lora_rank'] = 0  # merges the updates: the same answers, faster
    model = build_model(state, source, **overrides)
    config = SimpleNamespace(**DEFAULTS | state['config'])
    enc = get_tokenizer(tokenizer or config.tokenizer or 'gpt2', config.system_prompt, model.config.image_marks,
                        model.config.calculator, config.chat_template)
    config.chat = state.get('chat', enc.has_chat_template)
    n_ids = max(enc.n_text, 1 + max(enc.end_ids))
    if n_ids > model.config.vocab_size:
        raise ValueError(f'the tokenizer {enc.name} has {n_ids} ids, the model only '
                         f'{model.config.vocab_size}: name the one it was trained with by --tokenizer')
    where = device or find_device()
    device_type = where.split(':')[0]
    # an export is the same from every machine
    precision = getattr(torch, dtype or ('float32' if export else best_dtype(device_type)))
    for part, named in model.param_groups().items():
        for p in named.values():  # the vision encoder stays as precise as it was trained
            p.data = p.data.to(precision if part == 'gpt' else torch.float32)
    model.to(where).eval()
    n_params = sum(p.numel() for p in model.parameters()) / 1e6
    note(f'{source}: iteration {state.get("iter_num", 0)}, {n_params:.2f}M parameters')
    return model, enc, config, torch.autocast(device_type, precision, enabled=precision != torch.float32)

def store_by_column(model):
    """Stores the matrices column by column, if they are float32 on a CPU. An answer to one prompt is made of products of a
    matrix and one vector, which wait for memory: MKL on an AMD EPYC reads it 1.65 times as fast so (2026-11-26). From four
    prompts on, rows are faster.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.dtype == torch.float32 and module.weight.device.type == 'cpu':
            weight = module.weight.data                                         # (out, in)
            by_column = weight.T.contiguous()                                   # (in, out)
            module.weight.data = weight.view(by_column.shape).copy_(by_column).T  # in the same memory

def prompt_example(text, images, as_chat):
    """The prompt as an example. Without <image> in it, images come first in a turn, and last in a text."""
    n_marks = 0 if IMAGE in text else len(images)
    if not as_chat:
        return {'text': text + n_marks * IMAGE, 'images': images}
    content = n_marks * (IMAGE + '\n') + text
    return {'messages': [{'role': 'user', 'content': content.strip()}], 'images': images}

def print_answer(respond, example, prefix=''):
    """Prints the Answer to the example and returns it; with --logprobs marked, and the mean to stderr."""
    found, = respond([example])
    print(prefix + (found.marked if logprobs else found.text), flush=True)
    if logprobs:
        note(f'mean log-probability of a token: {found.mean_logprob:.3f} nats')
    return found

def chat_loop(respond):
    """Reads turns from stdin and answers each, given all turns before it."""
    images = list(map(load_image, image))
    messages = []
    note(f'{len(images)} image(s); an empty line or Ctrl-D ends the conversation')
    while True:
        print('> ', end='', file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        messages += prompt_example(line, [] if messages else images, True)['messages']
        found = print_answer(respond, {'messages': messages, 'images': images})
        messages.append({'role': 'assistant', 'content': found.text})

def caption_folder(respond, size, as_chat):
    """The prompt's answers to the images of a folder, `size` at a time: captions.csv and .png in out_dir."""
    folder, = image
    paths = []
    for path in sorted(str(path) for path in Path(folder).rglob('[!.]*') if not path.is_dir()):
        problem = image_error(path)
        if problem:
            note(f'skipped {path}: {problem}')
        else:
            paths.append(path)
    if not paths:
        raise ValueError(f'no image in {folder}')
    work = lambda batch: respond([prompt_example(prompt, [path], as_chat) for path in batch])
    table = []
    for path, found in zip(paths, map_across_ranks(work, paths, size, ONE_PROCESS)):
        table.append({'image': os.path.relpath(path, folder), 'caption': found.text,
                      'logprob': f'{found.mean_logprob:.4f}', 'marked': found.marked})
    captions = [row['marked' if logprobs else 'caption'] for row in table[:64]]
    write_results('captions', table, render.contact_sheet(list(map(load_image, paths[:64])), captions))

def evaluate(model, enc, config, autocast):
    """The evaluation of train.py on --eval: figures to stdout as JSON, eval.csv and eval.png to out_dir."""
    result, sheet, table = open_eval(model, enc, config).run(model, autocast)
    warn_of_collapse(result)
    write_results('eval', table, sheet)
    print(json.dumps(result))

def open_eval(model, enc, config):
    """The evaluation of a model on --eval; config, its knobs, is changed."""
    config.batch_size = batch_size or config.batch_size
    if eval != config.dataset:
        config.text_dataset = ''
        config.overfit_rows = 0
    if not model.config.vision_encoder:
        config.tasks = 'text'
    config.dataset = eval
    config.eval_samples = eval_samples
    if eval.endswith('.jsonl') and os.path.isfile(eval):
        held_out = Examples(FileRows(eval), config, seed=0, shuffle=False)
        return Evaluation(config, enc, model, ONE_PROCESS, held_out=held_out)
    return open_evaluation(config, enc, model, ONE_PROCESS)

def measure_compression():
    """The table and the plot of --compression, for its runs, to compression.csv and compression.png in out_dir."""
    table, curves = [], defaultdict(list)
    for folder in compression:
        model, enc, config, autocast = load(os.path.join(folder, checkpoint))
        evaluation = open_eval(model, enc, config)
        if not isinstance(evaluation, Evaluation) or isinstance(model, QFormerPretraining):
            raise ValueError('--compression reads the pages of one --eval dataset with a model that generates text')
        lines = compression_table(folder, read_pages(evaluation, model, autocast), bucket)
        table += lines
        name = f'{model.config.vision_encoder}, {model.config.connector}'
        for baseline, column in ((name, 'precision'), ('the text, cut', 'truncated'), ('blank images', 'blank')):
            curves[baseline].append([(line['characters / image token'], line[column]) for line in lines[1:]])
        print(json.dumps(lines[0]))
    plot = render.plot(curves, 'characters of text for each image token', 'precision: 1 - edits / characters')
    write_results('compression', table, plot)

def write_results(name, table, sheet):
    """NAME.csv and NAME.png in out_dir, of what there is."""
    os.makedirs(out_dir or '.', exist_ok=True)
    path = os.path.join(out_dir, name)
    if table:
        with open(path + '.csv', 'w', newline='', encoding='utf-8') as f:
            writer = csv.DictWriter(f, dict.fromkeys(key for row in table for key in row))
            writer.writeheader()
            writer.writerows(table)
        note(f'{len(table)} rows in {path}.csv')
    if sheet:
        sheet.save(path + '.png')
        note(f'drawn in {path}.png')

def serve_page(model, enc, config, autocast, as_chat, name):
    """The page in the browser, with four held-out examples of the run, if its datasets are there."""
    try:
        from web import Page, build, serve
    except ImportError as error:
        raise ValueError(f"--web needs Gradio ({error}): pip install -e '.[web]'") from None
    examples = []
    sources = parse_mixture(config.dataset) if config.dataset and model.config.vision_encoder else []
    for source in sources:
        try:
            held_out = held_out_examples(source.name, config, config.tasks)
        except ValueError as error:
            note(f'the page shows no examples of {source.name}: {error}')
            continue
        own = [held_out[i] for i in range(min(len(held_out.rows), 20))]
        examples += [example for example in own if example.get('images')][:max(1, 4 // len(sources))]
    page = Page(model, enc, autocast, as_chat, attention_layer)
    serve(build(page, name, examples, temperature, top_k, top_p, max_new_tokens), host, port)

def export_model(model, enc, config):
    """Writes a new folder: config.json and model.safetensors for Hugging Face's classes (see weights.to_hugging_face), the
    files of its tokenizer and of its image processor, if it has one, and glimpse.safetensors, the whole model, which
    --checkpoint and --init_from read.
    """
    settings, text_weights = to_hugging_face(model)
    settings['eos_token_id'] = enc.end_ids
    folder = Path(export)
    os.makedirs(folder, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f'--export={export} is not empty: name a new folder')
    (folder / 'config.json').write_text(json.dumps(settings, indent=2))
    save_file(text_weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    # a frozen encoder is written too, so that no other file is needed; tied weights are written once
    weights = {name: p.contiguous() for name, p in model.state_dict().items()}
    if model.config.tie_weights:
        del weights['lm_head.weight']
    config.tokenizer = enc.name
    about = {'model_args': vars(model.config), 'config': vars(config), 'chat': config.chat}
    save_file(weights, folder / 'glimpse.safetensors', metadata={'glimpse': json.dumps(about)})
    for path in enc.files:
        shutil.copy(path, folder)
    for path in Path(enc.files[0]).parent.glob('preprocessor_config.json') if enc.files else ():
        policy = json.loads(path.read_text(encoding='utf-8'))
        if model.config.max_image_side:
            policy |= {'size': {'longest_edge': model.config.max_image_side}, 'do_image_splitting': model.config.tile_marks}
        (folder / path.name).write_text(json.dumps(policy, indent=2))
    note(f'{export}: {", ".join(sorted(os.listdir(export)))}')

def main():
    global out_dir
    configure(globals())
    if chat not in ('auto', 'yes', 'no'):
        raise ValueError(f'--chat must be auto, yes or no, got {chat!r}')
    if dtype not in ('', 'float32', 'bfloat16', 'float16'):
        raise ValueError(f'--dtype must be float32, bfloat16 or float16, got {dtype!r}')
    if compression:
        return measure_compression()
    if init_from == 'resume' and not out_dir:
        out_dir = newest_run()
    model, enc, config, autocast = load(os.path.join(out_dir, checkpoint) if init_from == 'resume' else init_from)
    if attention_layer not in range(model.config.n_layer + 1):
        raise ValueError(f'--attention_layer must be 1 to {model.config.n_layer}, or 0 for one of them, got {attention_layer}')
    name = out_dir if init_from == 'resume' else init_from
    if eval:
        return evaluate(model, enc, config, autocast)
    if isinstance(model, QFormerPretraining) and not web:
        raise ValueError(f'{name} was trained with objective {model.config.objective}, to compare images and '
                         'captions, and cannot generate text: --eval=DATASET measures it, --web shows it, and train.py '
                         '--vision_from gives its encoder to a GPT')
    # a model that was trained to continue texts does not know the tokens of a conversation
    as_chat = chat == 'yes' or chat == 'auto' and config.chat
    if as_chat and enc.special.get(ASSISTANT, 0) >= model.config.vocab_size:
        raise ValueError(f'{name} has no tokens for a conversation: --chat=no continues the prompt as a text')
    if image and not model.config.vision_encoder:
        raise ValueError(f'{name} is text-only: it was trained without a vision_encoder')
    torch.manual_seed(seed)
    is_folder = len(image) == 1 and os.path.isdir(image[0])
    if not is_folder and not export:  # one prompt at a time
        store_by_column(model)
    # examples -> their Answers
    respond = partial(answer, model, enc, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    if web:
        return serve_page(model, enc, config, autocast, as_chat, name)
    with autocast:
        if export:
            export_model(model, enc, config)
        elif is_folder:
            caption_folder(respond, batch_size or config.batch_size, as_chat)
        elif interactive:
            chat_loop(respond)
        else:
            example = prompt_example(prompt, image, as_chat)
            for i in range(num_samples):
                if i:
                    print('---------------')
                found = print_answer(respond, example, '' if as_chat else prompt)
            if attention and image and found.text.split():
                words, maps = zip(*attention_maps(model, enc, example, found.ids, attention_layer))
                write_results('attention', [], render.contact_sheet(maps, words))

if __name__ == '__main__':
    run(main)
