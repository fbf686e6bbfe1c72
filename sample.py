"""
What you do with a trained model: ask it, chat with it, score it. The answer alone goes to stdout, the rest to stderr.

    $ python sample.py --out_dir=out/quickstart --image line.png             # read a picture
    $ python sample.py --image a.png b.png --prompt "What has changed?"      # several images, a question
    $ python sample.py --image a.png --interactive                           # a conversation
    $ python sample.py --out_dir=out/text_bytes --prompt "The with statement" --temperature=0.8 --num_samples=3
    $ python sample.py --eval=data/mine/val.jsonl                            # greedy CER and exact match, CSV, pictures
"""

import csv
import json
import os
import sys
from types import SimpleNamespace

import torch

import render
from configurator import configure, run
from model import GPT, load_checkpoint
from prepare_data import (END, IMAGE, Examples, JsonLines, collate, decode, drawable_ids, get_tokenizer,
                          held_out_examples, load_image, tokenize)

# -----------------------------------------------------------------------------
out_dir = 'out'          # where train.py has left its checkpoint
checkpoint = 'ckpt.pt'   # or ckpt_best.pt
image = ()               # one or more image files
prompt = ''              # the question; <image> in it says where the images stand, else they stand first
interactive = False      # a conversation: every line you type is a turn, an empty one ends it
num_samples = 1          # number of answers
max_new_tokens = 256     # an answer ends after as many tokens, if the model does not end it
temperature = 0.0        # 0 is greedy, 1 draws from the model's own probabilities
top_k = 0                # draw from the k likeliest tokens only; 0 for all
top_p = 1.0              # draw from the likeliest tokens that hold this probability; 1 for all
seed = 1337
chat = 'auto'            # yes: the prompt is a turn of a conversation; no: a text to go on with; auto: as it was trained
eval = ''                # a .jsonl file or dataset: score its answers instead
eval_samples = 512       # score at most as many
batch_size = 64          # of the evaluation
device = ''              # cuda, mps or cpu; '' finds out by itself
tokenizer = ''           # bytes, gpt2 or a meta.pkl; '' takes the checkpoint's
# -----------------------------------------------------------------------------


def find_device():
    """'cuda', 'mps' or 'cpu': the best that this machine has."""
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


def answer(model, tokenizer, examples, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """
    The model's answers, a list of str, to a batch of examples: conversations up to their last answer, which the model
    does not see, or texts to go on with. Greedy unless temperature > 0. An answer does not depend on its neighbours.
    """
    device = model.lm_head.weight.device
    batch = collate([tokenize(e, tokenizer, model.config, prompt_only=True) for e in examples], model.config)
    images = tuple(t.to(device) for t in batch['images']) if any(e.get('images') for e in examples) else None
    out = model.generate(batch['idx'].to(device), max_new_tokens, temperature, top_k, top_p, images, batch['lengths'],
                         end_token=tokenizer.encode_single_token(END), generator=generator,
                         allowed=drawable_ids(tokenizer, model.config.vocab_size).to(device))
    return [decode(tokenizer, row[n:].tolist()) for row, n in zip(out, batch['lengths'])]


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


def reference(example):
    """What the model should have answered: the last message's text."""
    return example['messages'][-1]['content']


def answer_sheet(examples, predictions):
    """Contact sheet of the examples with images: what the model answered, green if right, red with the truth below."""
    rows = [(e, p) for e, p in zip(examples, predictions) if e.get('images')]
    captions = [p if p == reference(e) else f'{p}\n({reference(e)})' for e, p in rows]
    return render.contact_sheet([load_image(e['images'][0]) for e, _ in rows], captions,
                                [p == reference(e) for e, p in rows])


# -----------------------------------------------------------------------------

def load():
    """The model of out_dir/checkpoint in eval mode on the device, its tokenizer, and the knobs it was trained with."""
    path = os.path.join(out_dir, checkpoint)
    state = load_checkpoint(path)
    model = GPT.from_state(state, path, dropout=0.0).to(device or find_device()).eval()
    config = SimpleNamespace(**state.get('config', {}))
    encoding = get_tokenizer(tokenizer or getattr(config, 'tokenizer', 'gpt2'))
    if encoding.n_vocab > model.config.vocab_size:
        raise ValueError(f'the tokenizer {encoding.name} has {encoding.n_vocab} ids, the model only '
                         f'{model.config.vocab_size}: name the one it was trained with by --tokenizer')
    print(f'{path}: iteration {state.get("iter_num")}, {model.get_num_params() / 1e6:.2f}M parameters', file=sys.stderr)
    return model, encoding, config


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
        text, = answer(model, encoding, [example], max_new_tokens, temperature, top_k, top_p, generator)
        print(text if as_chat else prompt + text, flush=True)
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
        text, = answer(model, encoding, [{'messages': messages, 'images': images}], max_new_tokens, temperature, top_k,
                       top_p, generator)
        print(text, flush=True)
        messages.append({'role': 'assistant', 'content': text})


def evaluate(model, encoding, config):
    """Greedy answers to a held-out set: scores to stdout as JSON, eval.csv and eval.png to out_dir."""
    if os.path.isfile(eval) and eval.endswith('.jsonl'):
        examples = Examples(JsonLines(eval), config, seed=0, tasks='read', shuffle=False)
    else:
        examples = held_out_examples(eval, config, 'read')
    rows = examples.rows
    drawn = 'messages' not in rows[0]  # plain text gives any number of examples, each another picture
    examples = [examples[i] for i in range(eval_samples if drawn else min(eval_samples, len(rows)))]
    examples = [e for e in examples if 'messages' in e]
    if not examples:
        raise ValueError(f'{eval} has no conversation to answer: expected rows with "messages"')
    predictions = []
    for i in range(0, len(examples), batch_size):
        predictions += answer(model, encoding, examples[i:i + batch_size], max_new_tokens)
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


def main():
    configure(globals())
    if chat not in ('auto', 'yes', 'no'):
        raise ValueError(f'--chat must be auto, yes or no, got {chat!r}')
    model, encoding, config = load()
    # a model that was trained to go on with texts has never seen the tokens of a conversation
    as_chat = chat == 'yes' or chat == 'auto' and 'read' in getattr(config, 'tasks', '')
    if image and not model.config.vision_encoder:
        raise ValueError(f'the model in {out_dir} is blind: it was trained without a vision_encoder')
    if eval:
        evaluate(model, encoding, config)
    elif interactive:
        converse(model, encoding)
    else:
        ask(model, encoding, as_chat)


if __name__ == '__main__':
    run(main)
