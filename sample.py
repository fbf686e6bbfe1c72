"""
What you do with a trained model: ask it, chat with it, score it. The answer alone goes to stdout, the rest to stderr.

    $ python sample.py --out_dir=out/quickstart --image line.png             # read a picture
    $ python sample.py --image a.png b.png --prompt "What has changed?"      # several images, a question
    $ python sample.py --image a.png --interactive                           # a conversation
    $ python sample.py --image photos/ --prompt "Describe the image."        # every image of a folder, to a CSV
    $ python sample.py --image a.png --logprobs                              # how sure is it, and of which words not?
    $ python sample.py --out_dir=out/text_bytes --prompt "The with statement" --temperature=0.8 --num_samples=3
    $ python sample.py --eval=data/mine/val.jsonl                            # greedy CER and exact match, CSV, pictures
    $ python sample.py --eval=coco_captions                                  # captions: BLEU-4, ROUGE-L and CIDEr-D, too
    $ python sample.py --out_dir=out/qformer_cpu --eval=pydoc                # of an Aligner: recall, and a similarity grid
    $ python sample.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --interactive     # a text model, as it is
    $ python sample.py --out_dir=out/mine --export=DIR                       # safetensors, the text part for transformers
"""

import csv
import functools
import json
import math
import operator
import os
import re
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import render
import vision
from configurator import configure, run
from model import GPT, GPT2, Aligner, load_checkpoint, to_hugging_face
from prepare_data import (ASSISTANT, IM_START, IMAGE, Examples, JsonLines, caption_ids, collate, decode, drawable_ids,
                          end_tokens, get_tokenizer, held_out_examples, load_image, look, reference, text_length, tokenize,
                          tokenizer_files)

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


# captions, of which several may be right: what the field reports, as pycocoevalcap computes it

def caption_words(text):
    """Lower case, without punctuation. (The field's tokenizer, the Penn Treebank's, is in Java; it tears "don't" in two.)"""
    return re.findall(r"\w+(?:['’]\w+)?", text.lower())


def ngrams(words, n):
    """{n words behind one another: how often}"""
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(predictions, references):
    """
    BLEU-4 of all predictions together, each a list of words; references: several such lists for each. The geometric mean of
    four precisions (of an n-gram no more counts than one reference has), and a penalty if they are shorter than the
    references nearest in length, https://aclanthology.org/P02-1040.
    """
    right, made, length, wanted = [0] * 4, [0] * 4, 0, 0
    for words, refs in zip(predictions, references):
        length += len(words)
        wanted += min((abs(len(r) - len(words)), len(r)) for r in refs)[1]
        for n in range(4):
            most = functools.reduce(operator.or_, (ngrams(r, n + 1) for r in refs))  # of Counters: the larger counts
            right[n] += (ngrams(words, n + 1) & most).total()
            made[n] += max(0, len(words) - n)
    # the small numbers are pycocoevalcap's: nothing right is not quite 0
    precision = math.prod((r + 1e-15) / (m + 1e-9) for r, m in zip(right, made)) ** 0.25
    return precision * min(1.0, math.exp(1 - (wanted + 1e-9) / (length + 1e-15)))


def rouge_l(predictions, references):
    """
    Mean ROUGE-L: the F-score (beta 1.2) of the longest common subsequence of words, of the references the best precision
    and the best recall, https://aclanthology.org/W04-1013.
    """
    scores = []
    for words, refs in zip(predictions, references):
        common = [len(words) + len(r) - indel_distance(words, r) for r in refs]  # twice the subsequence
        p = max(c / 2 / max(1, len(words)) for c in common)
        r = max(c / 2 / max(1, len(ref)) for c, ref in zip(common, refs))
        scores.append((1 + 1.2**2) * p * r / (r + 1.2**2 * p) if p and r else 0.0)
    return sum(scores) / len(scores)


def indel_distance(a, b):
    """The least number of items to insert or delete to make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(last[j - 1] if x == y else 1 + min(last[j], row[j - 1]))
    return row[-1]


def cider_d(predictions, references):
    """
    Mean CIDEr-D: the cosine of n-gram counts (n = 1 to 4), rare n-grams weighing more, counts clipped at the reference's, and
    a penalty for another length, times 10, https://arxiv.org/abs/1411.5726. What is rare, the references of all images say:
    on a handful of images, or on one, it means nothing.
    """
    found = Counter()  # in the references of how many images
    for refs in references:
        found.update({g for r in refs for n in range(4) for g in ngrams(r, n + 1)})
    images = math.log(len(references))

    def weigh(words):
        """For each n: {n-gram: its count times its rarity}, and the length of that vector."""
        vectors = [{g: c * (images - math.log(max(1, found[g]))) for g, c in ngrams(words, n + 1).items()} for n in range(4)]
        return [(v, math.sqrt(sum(x * x for x in v.values()))) for v in vectors]

    scores = []
    for words, refs in zip(predictions, references):
        mine, total = weigh(words), 0.0
        for ref in refs:
            # the lengths are counted in pairs of words, as in the authors' code
            penalty = math.exp(-((max(0, len(words) - 1) - max(0, len(ref) - 1)) ** 2) / (2 * 6.0**2))
            for (a, size_a), (b, size_b) in zip(mine, weigh(ref)):
                dot = sum(min(x, b[g]) * b[g] for g, x in a.items() if g in b)
                total += penalty * (dot / (size_a * size_b) if size_a and size_b else dot)
        scores.append(10 * total / 4 / len(refs))
    return sum(scores) / len(scores)


def score_captions(predictions, examples):
    """BLEU-4, ROUGE-L and CIDEr-D of predictions for examples with "references"."""
    predictions = [caption_words(p) for p in predictions]
    references = [[caption_words(r) for r in e['references']] for e in examples]
    return {'bleu4': bleu(predictions, references), 'rouge_l': rouge_l(predictions, references),
            'cider_d': cider_d(predictions, references)}


def is_question(example):
    """Whether it has an answer to be scored: a conversation, or images with a caption behind the last one."""
    return 'messages' in example or bool(example.get('images')) and 'infix' not in example and bool(reference(example).strip())


def question(example):
    """The example as it is put to the model."""
    return example if 'messages' in example else {**example, 'text': example['text'].rpartition(IMAGE)[0] + IMAGE}


def answer_sheet(examples, predictions):
    """Contact sheet of the examples with images: the question, and the answer; green if right, red with the truth below."""
    rows = [(e, p) for e, p in zip(examples, predictions) if e.get('images')]
    asked = [e['messages'][-2]['content'].replace(IMAGE, '').strip() if len(e.get('messages', [])) > 1 else '' for e, _ in rows]
    captions = [f'{q}\n{p}'.strip() + (f'\n({reference(e)})' if p != reference(e) else '') for q, (e, p) in zip(asked, rows)]
    return render.contact_sheet([load_image(e['images'][0]) for e, _ in rows], captions,
                                [p == reference(e) for e, p in rows])


# -----------------------------------------------------------------------------
# retrieval: which caption belongs to which picture?

def pairs_of(examples, most):
    """
    Held-out pictures and captions in which each has its right answers: (examples, one for each picture; captions; owner, the
    picture that each caption belongs to). A picture may have several captions, under "references"; one that shares an
    image or a caption with an earlier one is left out.
    """
    pictures, captions, owner, seen = [], [], [], set()
    for example in examples:
        own = list(dict.fromkeys(example.get('references') or [reference(example).strip()]))
        names = {*own, *(s for s in example.get('images') or [] if isinstance(s, str))}
        if len(example.get('images') or []) == 1 and all(own) and not names & seen:
            seen |= names
            captions += own
            owner += [len(pictures)] * len(own)
            pictures.append(example)
        if len(pictures) == most:
            break
    if len(pictures) < 2:
        raise ValueError('retrieval needs held-out pictures with a caption each, and there are fewer than two')
    return pictures, captions, torch.tensor(owner)


@torch.no_grad()
def embed_images(model, tokenizer, examples, autocast, features=None):
    """An Aligner's vectors of the examples' pictures, (N, K, D) float32 on the CPU."""
    images = vision.collate([look(e['images'][0], model.config, features) for e in examples], model.config)
    with autocast:
        return model.image_vectors(*model.see([t.to(model.logit_scale.device) for t in images])).float().cpu()


@torch.no_grad()
def embed_texts(model, tokenizer, captions, autocast, features=None):
    """An Aligner's vectors of captions, (N, D) float32 on the CPU."""
    ids = [torch.tensor(caption_ids(caption, tokenizer, model.config)) for caption in captions]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    with autocast:
        return model.text_vectors(ids.to(model.logit_scale.device)).float().cpu()


def cosines(image_vectors, text_vectors):
    """Pictures (N, K, D) and captions (M, D) -> (N, M): of a picture the query that is nearest to the caption counts."""
    return torch.einsum('nkd,md->nmk', image_vectors, text_vectors).amax(-1)


def recall(image_vectors, text_vectors, owner):
    """
    How well pictures (N, K, D) and captions (M, D) find one another; caption j belongs to picture owner[j]. Returns a dict: the
    share of pictures of which a right caption is among the k most similar (i2t_r1, i2t_r5, i2t_r10), the same of captions
    (t2i_...), what guessing would give (chance_r1), and the mean cosine of two pictures: near 1, all of them have collapsed
    into one. What is just as similar as the right one counts as more similar, or a collapsed model would be perfect.
    """
    similarity = cosines(image_vectors, text_vectors)                                    # (N, M)
    N, M = similarity.shape
    right = owner == torch.arange(N)[:, None]                                            # (N, M)
    best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)               # (N, 1)
    ahead = {'i2t': ((similarity >= best) & ~right).sum(1),                              # (N)
             't2i': (similarity >= similarity[owner, torch.arange(M)]).sum(0) - 1}       # (M)
    out = {f'{way}_r{k}': (n < k).float().mean().item() for way, n in ahead.items() for k in (1, 5, 10)}
    mean = torch.nn.functional.normalize(image_vectors.mean(1), dim=-1)                  # (N, D)
    return {**out, 'chance_r1': 1 / N, 'cosine': ((mean.sum(0).square().sum() - N) / (N * (N - 1))).item()}


def retrieval_grid(examples, image_vectors, text_vectors, owner, captions, size=8):
    """The first pictures as columns, a caption of each as rows, and in each cell how similar the two are."""
    size = min(size, len(examples))
    chosen = [owner.tolist().index(i) for i in range(size)]
    return render.similarity_grid([load_image(e['images'][0]) for e in examples[:size]], [captions[j] for j in chosen],
                                  cosines(image_vectors[:size], text_vectors[chosen]).T.tolist())


# -----------------------------------------------------------------------------

def load():
    """The model (a GPT or an Aligner) in eval mode on the device, its tokenizer, and the knobs it was trained with."""
    if init_from == 'resume':
        path = os.path.join(out_dir, checkpoint)
        state = load_checkpoint(path)
        moved = {'vision_encoder': vision_encoder} if vision_encoder else {}
        if state['model_args'].get('lora_scope') != 'image':
            moved['lora_rank'] = 0  # merges the updates: the same answers, faster. Those behind images only stay apart
        learnt = Aligner if state['model_args'].get('objective', 'lm') != 'lm' else GPT
        model = learnt.from_state(state, path, dropout=0.0, **moved)
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
    count = sum(p.numel() for p in model.parameters())
    print(f'{path}: iteration {state.get("iter_num", 0)}, {count / 1e6:.2f}M parameters', file=sys.stderr)
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


def held_out(config, most):
    """Up to `most` examples of what --eval names, a .jsonl file or a dataset, one after another."""
    if os.path.isfile(eval) and eval.endswith('.jsonl'):
        examples = Examples(JsonLines(eval), config, seed=0, tasks='read', shuffle=False)
    else:
        examples = held_out_examples(eval, config, 'read')
    return (examples[i] for i in range(most if examples.drawn else min(most, len(examples.rows))))


def retrieve(model, encoding, config, autocast):
    """Of an Aligner: recall to stdout as JSON; each caption's rank among those of its picture, and a grid, to out_dir."""
    examples, captions, owner = pairs_of(held_out(config, 4 * eval_samples), eval_samples)
    embed = lambda work, things: torch.cat([work(model, encoding, things[i:i + batch_size], autocast)
                                            for i in tqdm(range(0, len(things), batch_size), unit='batch')])
    images, texts = embed(embed_images, examples), embed(embed_texts, captions)
    table, sheet = os.path.join(out_dir, 'eval.csv'), os.path.join(out_dir, 'eval.png')
    similarity = cosines(images, texts)                                                  # (N, M)
    with open(table, 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        writer.writerow(['image', 'caption', 'cosine', 'rank', 'nearest'])
        for j, (caption, i) in enumerate(zip(captions, owner.tolist())):
            source, rank = examples[i]['images'][0], int((similarity[i] > similarity[i, j]).sum()) + 1
            writer.writerow([source if isinstance(source, str) else 'drawn', caption, f'{similarity[i, j]:.4f}', rank,
                             captions[int(similarity[i].argmax())]])
    retrieval_grid(examples, images, texts, owner, captions).save(sheet)
    print(f'{len(examples)} pictures and {len(captions)} captions in {table}; the first of them in {sheet}', file=sys.stderr)
    print(json.dumps({'n': len(examples), **recall(images, texts, owner)}))


def evaluate(model, encoding, config):
    """Greedy answers to a held-out set: scores to stdout as JSON, eval.csv and eval.png to out_dir."""
    examples = [e for e in held_out(config, eval_samples) if is_question(e)]
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
    captions = score_captions(predictions, examples) if all(e.get('references') for e in examples) else {}
    print(json.dumps({'n': len(examples), **score(predictions, [reference(e) for e in examples]), **captions}))


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
    if isinstance(model, Aligner):
        if not eval:
            raise ValueError(f'{out_dir} has learnt {model.config.objective}, to compare pictures and captions, and cannot '
                             'speak: --eval=DATASET measures it, and train.py --vision_from gives its eyes to a GPT')
        return retrieve(model, encoding, config, autocast)
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
