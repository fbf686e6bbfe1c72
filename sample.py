"""
What you do with a trained model: ask it, chat with it, score it. The answer alone goes to stdout, the rest to stderr.

    $ python sample.py --out_dir=out/quickstart --image line.png             # read a picture
    $ python sample.py --image a.png b.png --prompt "What has changed?"      # several images, a question
    $ python sample.py --image a.png --interactive                           # a conversation
    $ python sample.py --image photos/ --prompt "Describe the image."        # every image of a folder, to a CSV
    $ python sample.py --image a.png --logprobs                              # how sure is it, and of which words not?
    $ python sample.py --out_dir=out/text_bytes --prompt "The with statement" --temperature=0.8 --num_samples=3
    $ python sample.py --eval=data/mine/val.jsonl                            # greedy CER and exact match, CSV, pictures
    $ python sample.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --interactive     # a text model, as it is
    $ python sample.py --out_dir=out/mine --export=DIR                       # safetensors, the text part for transformers
"""

import csv
import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import render
from configurator import configure, run
from model import GPT, GPT2, load_checkpoint, to_hugging_face
from prepare_data import (ASSISTANT, IM_START, IMAGE, Examples, JsonLines, collate, decode, drawable_ids, end_tokens,
                          get_tokenizer, held_out_examples, load_image, text_length, tokenize, tokenizer_files)

# -----------------------------------------------------------------------------
init_from = 'resume'     # out_dir's checkpoint; or a text model of Hugging Face's, by name or folder, as in train.py
out_dir = 'out'          # where train.py has left its checkpoint
checkpoint = 'ckpt.pt'   # or ckpt_best.pt, or the glimpse.safetensors of an export
image = ()               # one or more image files, or one folder: each of its images is asked about
prompt = ''              # the question; <image> in it says where the images stand, else they stand first
interactive = False      # a conversation: every line you type is a turn, an empty one ends it
num_samples = 1          # number of answers
max_new_tokens = 256     # an answer ends after as many tokens, if the model does not end it
temperature = 0.0        # 0 is greedy, 1 draws from the model's own probabilities
top_k = 0                # draw from the k likeliest tokens only; 0 for all
top_p = 1.0              # draw from the likeliest tokens that hold this probability; 1 for all
seed = 1337
logprobs = False         # mark each word that the model gave less than half the probability: [word?]
chat = 'auto'            # yes: the prompt is a turn of a conversation; no: a text to go on with; auto: as it was trained
eval = ''                # a .jsonl file or dataset: score its answers instead
eval_samples = 512       # score at most as many
batch_size = 64          # of the evaluation
export = ''              # a new folder to write the model to: the text part for Hugging Face's classes, and all of it
device = ''              # cuda, mps or cpu; '' finds out by itself
dtype = ''               # float32, bfloat16 or float16; '' takes bfloat16 on CUDA, else float32
tokenizer = ''           # as in train.py; '' takes the checkpoint's
vision_encoder = ''      # where a frozen encoder's weights are now, if the file they came from has moved
# -----------------------------------------------------------------------------


def find_device():
    """'cuda', 'mps' or 'cpu': the best that this machine has."""
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


def answer(model, tokenizer, examples, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, generator=None,
           features=None, return_logprobs=False):
    """
    The model's answers, a list of str, to a batch of examples: conversations up to their last answer, which the model
    does not see, or texts to go on with. Greedy unless temperature > 0. An answer does not depend on its neighbours.
    With return_logprobs each is (answer, its mean log-probability a token in nats, the answer with doubtful words marked).
    """
    device = model.lm_head.weight.device
    batch = collate([tokenize(e, tokenizer, model.config, prompt_only=True, features=features) for e in examples], model.config)
    images = tuple(t.to(device) for t in batch['images']) if any(e.get('images') for e in examples) else None
    out = model.generate(batch['idx'].to(device), max_new_tokens, temperature, top_k, top_p, images, batch['lengths'],
                         end_token=end_tokens(tokenizer), generator=generator, return_logprobs=return_logprobs,
                         allowed=drawable_ids(tokenizer, model.config.vocab_size).to(device))
    tokens, sure = out if return_logprobs else (out, out)
    rows = [(row[n:].tolist(), p[n:].tolist()) for row, p, n in zip(tokens, sure, batch['lengths'])]
    if not return_logprobs:
        return [decode(tokenizer, ids) for ids, _ in rows]
    answers = []
    for ids, p in rows:
        n = text_length(tokenizer, ids)
        drawn = p[:n + 1]  # that it ended there is part of the answer, too
        answers.append((decode(tokenizer, ids), sum(drawn) / max(1, len(drawn)), mark_doubts(tokenizer, ids[:n], p)))
    return answers


def mark_doubts(tokenizer, ids, logprobs, least=0.5):
    """The text with every word in [brackets?] of which a token had a probability below `least`: better look there."""
    starts, text = [], b''  # in bytes, because a token may be less than a character
    for i in ids:
        starts.append(len(text))
        text += tokenizer.decode_single_token_bytes(i)
    out, last = b'', 0
    for word in re.finditer(rb'\S+', text):
        doubtful = any(math.exp(p) < least and start < word.end() and end > word.start()
                       for start, end, p in zip(starts, [*starts[1:], len(text)], logprobs))
        out += text[last:word.start()] + (b'[' + word[0] + b'?]' if doubtful else word[0])
        last = word.end()
    return (out + text[last:]).decode(errors='replace')


def edit_distance(a, b):
    """Levenshtein: the least number of characters to insert, delete or replace to make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def score(predictions, references):
    """
    {'cer': edits per character of all references together, 'exact': share of predictions without any edit}. Unlike
    a precision over sets of words, the character error rate does not reward a short or a fluent wrong answer.
    """
    edits = [edit_distance(p, r) for p, r in zip(predictions, references)]
    return {'cer': sum(edits) / max(1, sum(map(len, references))), 'exact': edits.count(0) / max(1, len(edits))}


def is_question(example):
    """Whether it has an answer to be scored: a conversation, or images with a caption behind the last one."""
    return 'messages' in example or bool(example.get('images')) and 'infix' not in example and bool(reference(example).strip())


def question(example):
    """The example as it is put to the model."""
    return example if 'messages' in example else {**example, 'text': example['text'].rpartition(IMAGE)[0] + IMAGE}


def reference(example):
    """What the model should have answered: the last message's text, or the text behind the last image."""
    return example['messages'][-1]['content'] if 'messages' in example else example['text'].rpartition(IMAGE)[2]


def answer_sheet(examples, predictions):
    """Contact sheet of the examples with images: the question, and the answer; green if right, red with the truth below."""
    rows = [(e, p) for e, p in zip(examples, predictions) if e.get('images')]
    asked = [e['messages'][-2]['content'].replace(IMAGE, '').strip() if len(e.get('messages', [])) > 1 else '' for e, _ in rows]
    captions = [f'{q}\n{p}'.strip() + (f'\n({reference(e)})' if p != reference(e) else '') for q, (e, p) in zip(asked, rows)]
    return render.contact_sheet([load_image(e['images'][0]) for e, _ in rows], captions,
                                [p == reference(e) for e, p in rows])


# -----------------------------------------------------------------------------

def load():
    """The model in eval mode on the device, its tokenizer, and the knobs it was trained with."""
    if init_from == 'resume':
        path = os.path.join(out_dir, checkpoint)
        state = load_checkpoint(path)
        moved = {'vision_encoder': vision_encoder} if vision_encoder else {}
        if state['model_args'].get('lora_scope') != 'image':
            moved['lora_rank'] = 0  # merges the updates: the same answers, faster. Those behind images only stay apart
        model = GPT.from_state(state, path, dropout=0.0, **moved)
        named = state.get('config', {}).get('tokenizer') or 'gpt2'
    else:
        path, state, named = init_from, {}, 'gpt2' if init_from in GPT2 else init_from
        model = GPT.from_pretrained(init_from)
    config = SimpleNamespace(**state.get('config', {}))
    encoding = get_tokenizer(tokenizer or named, getattr(config, 'system_prompt', 'auto'))
    place = device or find_device()
    kind = getattr(torch, dtype or ('bfloat16' if place.startswith('cuda') else 'float32'))
    for part, named_parameters in model.parts().items():
        for p in named_parameters.values():  # the eyes stay as precise as they were trained
            p.data = p.data.to(kind if part == 'gpt' else torch.float32)
    model.to(place).eval()
    needed = 1 + max([*encoding._mergeable_ranks.values(), *end_tokens(encoding)])
    if needed > model.config.vocab_size:
        raise ValueError(f'the tokenizer {encoding.name} has {needed} ids, the model only '
                         f'{model.config.vocab_size}: name the one it was trained with by --tokenizer')
    print(f'{path}: iteration {state.get("iter_num", 0)}, {model.get_num_params() / 1e6:.2f}M parameters', file=sys.stderr)
    config.chat = state.get('chat', IM_START in encoding._special_tokens)
    return model, encoding, config, torch.autocast(place.split(':')[0], kind, enabled=kind != torch.float32)


def say(found, prefix=''):
    """Prints an answer, marked where it is doubtful and with its mean log-probability on stderr if those were asked for."""
    if logprobs:
        _, mean, marked = found
        print(prefix + marked, flush=True)
        print(f'mean log-probability of a token: {mean:.3f} nats', file=sys.stderr)
    else:
        print(prefix + found, flush=True)


def with_images(text, images):
    """The text with an <image> for each image: in front, unless it says itself where they stand."""
    if images and IMAGE not in text:
        text = (IMAGE + '\n') * len(images) + text
    return text.strip()


def ask(model, encoding, as_chat):
    """Prints num_samples answers to the prompt."""
    images = [load_image(path) for path in image]
    if as_chat:
        example = {'messages': [{'role': 'user', 'content': with_images(prompt, images)}], 'images': images}
    else:
        example = {'text': prompt if IMAGE in prompt or not images else prompt + IMAGE * len(images), 'images': images}
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    for i in range(num_samples):
        found, = answer(model, encoding, [example], max_new_tokens, temperature, top_k, top_p, generator,
                        return_logprobs=logprobs)
        say(found, '' if as_chat else prompt)
        if i < num_samples - 1:
            print('---------------')


def converse(model, encoding):
    """Reads turns from stdin and answers them, with all that was said before in mind."""
    images = [load_image(path) for path in image]
    messages, generator = [], torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    print(f'{len(images)} image(s); an empty line or Ctrl-D ends the conversation', file=sys.stderr)
    while True:
        print('> ', end='', file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        messages.append({'role': 'user', 'content': line if messages else with_images(line, images)})
        found, = answer(model, encoding, [{'messages': messages, 'images': images}], max_new_tokens, temperature, top_k,
                        top_p, generator, return_logprobs=logprobs)
        say(found)
        messages.append({'role': 'assistant', 'content': found[0] if logprobs else found})


def caption_folder(model, encoding, folder, as_chat):
    """Asks the prompt about every image of a folder: captions.csv and captions.png in out_dir; what is no image is said."""
    names = sorted(os.path.join(root, n) for root, _, ns in os.walk(folder) for n in ns if not n.startswith('.'))
    text = with_images(prompt, [None]) if as_chat else prompt if IMAGE in prompt else prompt + IMAGE
    rows, shown = [], []
    for i in tqdm(range(0, len(names), batch_size), unit='batch'):
        examples, readable = [], []
        for name in names[i:i + batch_size]:
            try:
                picture = load_image(name)
            except ValueError as error:
                print(f'left out: {error}', file=sys.stderr)
                continue
            readable.append(os.path.relpath(name, folder))
            examples.append({**({'messages': [{'role': 'user', 'content': text}]} if as_chat else {'text': text}),
                             'images': [picture]})
        if examples:
            shown += [e['images'][0] for e in examples][:64 - len(shown)]
            generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
            found = answer(model, encoding, examples, max_new_tokens, temperature, top_k, top_p, generator,
                           return_logprobs=True)
            rows += [(name, caption, f'{mean:.4f}', marked) for name, (caption, mean, marked) in zip(readable, found)]
    if not rows:
        raise ValueError(f'no image in {folder}')
    table, sheet = os.path.join(out_dir, 'captions.csv'), os.path.join(out_dir, 'captions.png')
    with open(table, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([['image', 'caption', 'logprob', 'doubts'], *rows])
    render.contact_sheet(shown, [row[3] if logprobs else row[1] for row in rows[:len(shown)]]).save(sheet)
    print(f'{len(rows)} captions in {table}, the first {len(shown)} as pictures in {sheet}', file=sys.stderr)


def evaluate(model, encoding, config):
    """Greedy answers to a held-out set: scores to stdout as JSON, eval.csv and eval.png to out_dir."""
    if os.path.isfile(eval) and eval.endswith('.jsonl'):
        examples = Examples(JsonLines(eval), config, seed=0, tasks='read', shuffle=False)
    else:
        examples = held_out_examples(eval, config, 'read')
    rows = examples.rows
    # plain text gives any number of examples, each another picture
    drawn = 'messages' not in rows[0] and not rows[0].get('images')
    examples = [examples[i] for i in range(eval_samples if drawn else min(eval_samples, len(rows)))]
    examples = [e for e in examples if is_question(e)]
    if not examples:
        raise ValueError(f'{eval} has nothing to answer: expected rows with "messages", or with a text behind an <image>')
    predictions = []
    for i in range(0, len(examples), batch_size):
        predictions += answer(model, encoding, [question(e) for e in examples[i:i + batch_size]], max_new_tokens)
        print(f'{len(predictions)}/{len(examples)} answered', end='\r', file=sys.stderr)
    table, sheet = os.path.join(out_dir, 'eval.csv'), os.path.join(out_dir, 'eval.png')
    with open(table, 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        writer.writerow(['index', 'image', 'reference', 'prediction', 'edits', 'exact'])
        for i, (e, p) in enumerate(zip(examples, predictions)):
            names = ' '.join(s if isinstance(s, str) else 'drawn' for s in e.get('images') or [])
            edits = edit_distance(p, reference(e))
            writer.writerow([i, names, reference(e), p, edits, int(edits == 0)])
    print(f'{len(examples)} answers in {table}', file=sys.stderr)
    if any(e.get('images') for e in examples[:64]):
        answer_sheet(examples[:64], predictions[:64]).save(sheet)
        print(f'the first 64 as pictures in {sheet}', file=sys.stderr)
    print(json.dumps({'n': len(examples), **score(predictions, [reference(e) for e in examples])}))


def export_model(model, encoding, config):
    """
    Writes a new folder: config.json and model.safetensors, the text part for Hugging Face's classes, with tokenizer.json if
    it came from one; and glimpse.safetensors, the whole model, which --checkpoint and --init_from read.
    """
    if os.path.isdir(export) and os.listdir(export):
        raise ValueError(f'--export={export} is not empty: name a new folder')
    settings, text = to_hugging_face(model)
    os.makedirs(export, exist_ok=True)
    with open(os.path.join(export, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump({**settings, 'eos_token_id': end_tokens(encoding)}, f, indent=2)
    save_file(text, os.path.join(export, 'model.safetensors'), metadata={'format': 'pt'})
    # a frozen tower comes along, and needs no other file then; what is tied is stored once
    state = {name: p.contiguous() for name, p in model.state_dict().items()
             if not (name == 'lm_head.weight' and model.config.tied)}
    about = {'model_args': {**vars(model.config), 'vision_fingerprint': ''}, 'chat': config.chat,
             'config': {**vars(config), 'tokenizer': encoding.name}}
    save_file(state, os.path.join(export, 'glimpse.safetensors'), metadata={'glimpse': json.dumps(about)})
    if encoding.name not in ('bytes', 'gpt2') and not encoding.name.endswith(('.pkl', '.txt')):
        for path in filter(None, tokenizer_files(encoding.name)):
            shutil.copy(path, export)
    print(f'{export}: {", ".join(sorted(os.listdir(export)))}', file=sys.stderr)


def main():
    configure(globals())
    if chat not in ('auto', 'yes', 'no'):
        raise ValueError(f'--chat must be auto, yes or no, got {chat!r}')
    if dtype not in ('', 'float32', 'bfloat16', 'float16'):
        raise ValueError(f'--dtype must be float32, bfloat16 or float16, got {dtype!r}')
    model, encoding, config, autocast = load()
    # a model that was trained to go on with texts has never seen the tokens of a conversation
    as_chat = chat == 'yes' or chat == 'auto' and config.chat
    if as_chat and encoding._special_tokens.get(ASSISTANT, 0) >= model.config.vocab_size:
        raise ValueError(f'{init_from} has no tokens for a conversation: --chat=no goes on with the prompt as a text')
    if image and not model.config.vision_encoder:
        raise ValueError(f'the model in {out_dir} is blind: it was trained without a vision_encoder')
    with autocast:
        if export:
            export_model(model, encoding, config)
        elif eval:
            evaluate(model, encoding, config)
        elif len(image) == 1 and os.path.isdir(image[0]):
            caption_folder(model, encoding, image[0], as_chat)
        elif interactive:
            converse(model, encoding)
        else:
            ask(model, encoding, as_chat)


if __name__ == '__main__':
    run(main)
