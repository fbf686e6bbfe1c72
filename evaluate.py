"""
What a model answers, and what its answers are worth: what train.py measures while it trains, and sample.py --eval afterwards.

    answer            examples -> answers, a batch at a time; stream_answer one of them, token by token
    attention_maps    where each word of an answer looked
    score, METRICS    answers and references -> edits per character, accuracies, similarities of tables
    recall            embeddings of images and captions -> how often the right one is found
    Evaluation        the held-out examples of a run: losses with the true image, a blank one and another example's
    read_pages        how much text is decoded from each image token
"""

import ast
import itertools
import math
import operator
import os
import re
import sys
from collections import ChainMap, Counter, defaultdict, deque
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from html import unescape
from types import SimpleNamespace

import torch
import torch.distributed as dist
from PIL import Image
from rapidfuzz.distance import Levenshtein
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import render
from blip2 import QFormerPretraining
from dataloader import (CALL_MARKS, IMAGE, Examples, TooLong, collate, count_draws, get_tokenizer, load_image, open_rows,
                        parse_mixture, tokenize)
from patches import NEWLINE, arrange, assemble, cell_size, collate_images, num_tokens, preprocess, token_cells

def find_device():
    """'cuda', 'mps' or 'cpu': the best that this machine has."""
    if torch.cuda.is_available():
        return 'cuda'
    return 'mps' if torch.backends.mps.is_available() else 'cpu'

def best_dtype(device_type):
    """float32, but on CUDA bfloat16, or float16 where bfloat16 is only emulated (T4, V100)."""
    if device_type != 'cuda':
        return 'float32'
    return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'

def note(text):
    """Prints to stderr, from the first process only; stdout is for answers."""
    if int(os.environ.get('RANK', 0)) == 0:
        print(text, file=sys.stderr)

def to_device(batch, where):
    """The tensors of a collated batch on the device `where`."""
    move = lambda tensor: tensor.to(where, non_blocking=True)
    images = batch['images'] and tuple(map(move, batch['images']))
    return {'images': images, **{name: move(value) for name, value in batch.items() if torch.is_tensor(value)}}

@dataclass
class Answer:
    text: str
    ids: list           # as they were generated, without the one that ended it
    marked: str         # the text with each word in [brackets?] of which it was not confident
    mean_logprob: float  # of a token, in nats; that it ends there is part of the answer, too

def answer(model, enc, examples, cache=None, temperature=0.0, **generation):
    """An Answer to each example, a conversation without its last answer or a text to continue; none depends on another.
    `generation` goes to model.generate.
    """
    prompts, lengths = prompt_batch(model, enc, examples, cache)
    out, logprobs = model.generate(**prompts, temperature=temperature, return_logprobs=True, **generation)
    answers = []
    for example, row, p, start in zip(examples, out.tolist(), logprobs.tolist(), lengths):
        ids = until_end(enc, row[start:])
        p = p[start:start + len(ids) + 1]
        text, marked = plain_text(enc.decode(ids), example), plain_text(mark_low_confidence(enc, ids, p), example)
        answers.append(Answer(text, ids, marked, sum(p) / max(1, len(p))))
    return answers

def stream_answer(model, enc, example, temperature=0.0, **generation):
    """The answer to one example as it is generated: yields, after each token, (ids, their log-probabilities in nats)."""
    prompts, (start,) = prompt_batch(model, enc, [example])
    steps = model.stream(**prompts, temperature=temperature, return_logprobs=True, **generation)
    for out, logprobs, lengths in steps:
        ids = until_end(enc, out[0, start:lengths[0]].tolist())
        yield ids, logprobs[0, start:start + len(ids)].tolist()

def prompt_batch(model, enc, examples, cache=None):
    """(what model.generate needs of the examples: {argument: value}, the lengths of the prompts)."""
    config = model.config
    where = model.lm_head.weight.device
    prompts = [tokenize(e, enc, config, prompt_only=True, cache=cache) for e in examples]
    batch = to_device(collate(prompts, config), where)
    arguments = {'idx': batch['idx'], 'lengths': batch['lengths'], 'stop_ids': enc.end_ids, 'tools': calculator_of(enc),
                 'allowed': enc.allowed_ids(config.vocab_size).to(where),
                 'images': batch['images'] if any(p['images'] for p in prompts) else None}
    return arguments, batch['lengths'].tolist()

def plain_text(text, example):
    """What was generated for an example as a reader wants it: the calculator's marks as GSM8K writes them, and no space around
    an answer, because SmolVLM's template, for one, has a space before it.
    """
    for mark, plain in zip(CALL_MARKS, ('<<', '=', '>>')):
        text = text.replace(mark, plain)
    return text.strip() if 'messages' in example else text

def calculator_of(enc):
    """`tools` of GPT.generate: after <|result|> the value of what stands before it comes, and <|end_call|>."""
    if not enc.calculator:
        return {}
    call, result, end_call = (enc.special[mark] for mark in CALL_MARKS)

    def write_result(ids):
        start = len(ids) - ids[::-1].index(call) if call in ids else len(ids) - 1
        return [*enc.encode(calculate(enc.decode(ids[start:-1]))), end_call]

    return {result: write_result}

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.USub: operator.neg}

def calculate(expression):
    """The value of a sum like "(3+4)*2.5" as text; '' for what is none."""
    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](value(node.operand))
        return float(node.value)

    if not re.fullmatch(r'[0-9.+*/() -]{1,200}', expression):
        return ''
    try:
        return f'{value(ast.parse(expression.strip(), mode="eval").body):.10g}'
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        return ''

def until_end(enc, ids):
    """The ids before the first one that ends an answer or a text."""
    return list(itertools.takewhile(lambda token: token not in enc.end_ids, ids))

def word_probabilities(enc, ids, token_logprobs):
    """The text in words and the spaces between them, [(piece, probability of its least likely token)]."""
    text = enc.decode(ids)
    lowest = [1.0] * len(text)  # of each character
    for i, p in enumerate(token_logprobs[:len(ids)]):
        # an incomplete character is decoded as U+FFFD
        start = len(enc.decode(ids[:i]).rstrip('\ufffd'))
        end = len(enc.decode(ids[:i + 1]))
        lowest[start:end] = [min(math.exp(p), old) for old in lowest[start:end]]
    return [(match[0], min(lowest[slice(*match.span())])) for match in re.finditer(r'\s+|\S+', text)]

def mark_low_confidence(enc, ids, token_logprobs):
    """The text with each word in [brackets?] of which a token had less than half the probability."""
    return ''.join(f'[{piece}?]' if p < 0.5 and piece.strip() else piece
                   for piece, p in word_probabilities(enc, ids, token_logprobs))

# where does it look? In the right layer attention follows what is read: in the third of the quickstart's four layers the
# column with most of it is a letter's own for 80 % of held-out letters, that or the next one for 99 %; in the first for 25
# and 47 % (tests/bench.py attention out/quickstart, 2026-11-26)

def attention_maps(model, enc, example, ids, layer=0):
    """Where each word of an answer, its ids, looked: [(word, the image that it attended to most, as the encoder reads it, red
    where)]. The mean over the word's tokens, each at the place from which it was predicted, and over the heads of a layer, the
    first of which is 1; 0 takes the one at three quarters. Raises ValueError for a Q-Former.
    """
    config = model.config
    if config.connector == 'qformer':
        raise ValueError("attention shows parts of images, and a Q-Former's queries are none")
    tokens = tokenize(example, enc, config, prompt_only=True)
    where = model.lm_head.weight.device
    idx = torch.tensor([tokens['idx'] + ids], device=where)                              # (1, T)
    batch = to_device({'images': collate_images(tokens['images'], config)}, where)
    layer = layer or math.ceil(0.75 * config.n_layer)
    weights = model.attention(idx, batch['images'])[layer - 1, 0].mean(0).cpu()          # (T, T)
    places = (idx[0] == config.image_token).nonzero()[:, 0].cpu()
    views = []
    for patches, grid in tokens['images']:
        n = num_tokens((patches, grid), config)
        own, places = places[:n], places[n:]
        if config.image_newlines:
            order = arrange(grid, config)
            own = own[order >= 0][order[order >= 0].argsort()]  # as the encoder has them, without newlines
        views.append((assemble(patches, grid, config), token_cells(grid, config), own))
    word_of = [max(0, len(enc.decode(ids[:i + 1]).split()) - 1) for i in range(len(ids))]
    maps = []
    for number, word in enumerate(enc.decode(ids).split()):
        predicted_from = [len(tokens['idx']) - 1 + i for i, own in enumerate(word_of) if own == number]
        attended = weights[predicted_from].mean(0)                                       # (T,)
        image, grid, own = max(views, key=lambda view: attended[view[2]].sum())
        heat = torch.zeros(*(grid.amax(0) + 1).tolist())
        heat[tuple(grid.T)] = attended[own] / attended[own].max()
        maps.append((word, render.heat_map(image, heat)))
    return maps

# -----------------------------------------------------------------------------
# scores of answers

def score(predictions, references):
    """cer: edits per character of all references together; exact: the share of predictions without an edit.
    Unlike a precision over words, the character error rate does not reward a short or a fluent wrong answer.
    """
    edits = list(map(Levenshtein.distance, predictions, references))
    n_chars = sum(map(len, references))
    return {'cer': sum(edits) / max(1, n_chars), 'exact': edits.count(0) / max(1, len(edits))}

def score_captions(predictions, examples):
    """BLEU-4, ROUGE-L and CIDEr-D of examples with "references"; {} if pycocoevalcap is not installed."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        note("no BLEU-4, ROUGE-L and CIDEr-D of captions: pip install 'glimpse[captions]' adds them")
        return {}
    words = lambda text: ' '.join(caption_words(text))
    predictions = {i: [words(p)] for i, p in enumerate(predictions)}
    # a reference without words, such as an emoji, stays as it is: CIDEr-D fails if all of them are empty
    references = {i: [words(r) or r for r in e['references']] for i, e in enumerate(examples)}
    bleu, _ = Bleu(4).compute_score(references, predictions, verbose=0)  # BLEU-1 to BLEU-4
    rouge_l, _ = Rouge().compute_score(references, predictions)
    cider_d, _ = Cider().compute_score(references, predictions)  # meaningless on few images
    return {'bleu4': bleu[3], 'rouge_l': float(rouge_l), 'cider_d': float(cider_d)}

def caption_words(text):
    """Lower case, without punctuation. The usual tokenizer, the Penn Treebank's, is in Java."""
    return re.findall(r"\w+(?:['’]\w+)?", text.lower())

# -----------------------------------------------------------------------------
# scores that belong to a task: METRICS[name](prediction, reference) is between 0 (wrong) and 1 (right). A prediction
# may be empty, broken or endless: no function here raises on it

def relaxed_accuracy(prediction, reference):
    """ChartQA's (https://arxiv.org/abs/2203.10244, section 5.1), computed as in pix2struct: a number may be
    5 % off, "12%" is 0.12, and a year is a number. A reference of 0 and all else must match as text, except
    for case. Unlike pix2struct, this one reads "1,234" as a number and ignores surrounding space.
    """
    prediction, reference = prediction.strip(), reference.strip()
    found, expected = as_float(prediction), as_float(reference)
    if found is not None and expected:
        return float(abs(found - expected) / abs(expected) <= 0.05)
    return float(prediction.lower() == reference.lower())

def as_float(text):
    if re.fullmatch(r'-?\d{1,3}(,\d{3})+(\.\d+)?\s*%?', text):
        text = text.replace(',', '')
    try:
        number = float(text.rstrip('%')) / (100 if text.endswith('%') else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # "nan" and "inf" are words

def yes_no(prediction, reference):
    """Is the first "yes" or "no" among the words of both the same?"""
    def answer(text):
        words = re.findall(r'[^\W\d_]+', text.lower())
        return next((word for word in words if word in ('yes', 'no')), None)
    return agree(answer(prediction), answer(reference))

def letter(prediction, reference):
    """Is the first capital letter that stands alone the same in both: "B", "(B)", "B. dog", "Answer: B"?
    "A" and "I" before a word, as in "A cat", are English, not a choice, except in "The answer is A because".
    """
    english = r"(?<!(?i:answer|option|choice) )(?<!is )(?<!: )\b[AI](?=['’ ]\w)"
    def answer(text):
        match = re.search(r'(?<![\w-])[A-Z](?!-?\w)', re.sub(english, '', text))  # not the X of "X-ray"
        return match and match[0]
    return agree(answer(prediction), answer(reference))

def final_number(prediction, reference):
    """GSM8K's (https://arxiv.org/abs/2110.14168): the first number right after "####", otherwise the last one
    of the text. Dollar signs and thousands separators do not count, and 72 is 72.0.
    """
    number = r'(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?'  # the minus of "10-3" is no sign
    def answer(text):
        text = text.replace('$', '')
        found = re.findall(rf'####\s*({number})', text)[:1] or re.findall(number, text)[-1:]
        return Decimal(found[0].replace(',', '')) if found else None
    return agree(answer(prediction), answer(reference))

def agree(found, expected):
    return float(found is not None and found == expected)

# pages and tables

def edit_similarity(prediction, reference):
    """1 - edit distance / length of the longer text: the normalized edit distance of OmniDocBench
    (https://arxiv.org/abs/2412.07626), as a similarity. Two empty texts have 1.
    """
    return Levenshtein.normalized_similarity(prediction, reference)

def teds(prediction, reference):
    """Tree-Edit-Distance-based Similarity of the first HTML table of both (https://arxiv.org/abs/1911.10683):
    1 - edits / nodes of the larger tree, without <table> as in PubTabNet's code; 0 if there is no table.
    """
    a, b = table_nodes(prediction), table_nodes(reference)
    if not a or not b:
        return 0.0
    # endless output would take minutes: nodes more than 500 over the reference's count as deleted
    kept = a[:-1][:len(b) + 500] + a[-1:]
    edits = len(a) - len(kept) + tree_edit_distance(kept, b)
    return max(0.0, 1 - edits / max(1, len(a) - 1, len(b) - 1))

@dataclass
class Node:
    first: int  # where its subtree starts in the postorder
    level: int
    label: tuple  # (tag, colspan, rowspan)
    text: str = ''

LEVELS = {'thead': 1, 'tbody': 1, 'tfoot': 1, 'tr': 2, 'td': 3}  # below <table>, which is 0

def table_nodes(html):
    """Nodes of the first table in postorder, <table> last; [] if there is none. A th is a td, and tags not in
    LEVELS are ignored. A tag of the same level or above ends one that was never closed, as in a browser.
    """
    table = re.search(r'<table\b[^<>]*>(.*?)(?:</table|\Z)', html, re.IGNORECASE | re.DOTALL)
    if not table:
        return []
    nodes, parents = [], [Node(0, 0, ('table', '1', '1'))]
    parts = re.split(r'<(/?)([a-z!]\w*)(?!\w)([^<>]*)>', ' '.join(table[1].split()), flags=re.IGNORECASE)
    for slash, tag, attributes, text in zip(parts[1::4], parts[2::4], parts[3::4], parts[4::4]):
        tag = 'td' if tag.lower() == 'th' else tag.lower()
        if tag in LEVELS:
            while parents[-1].level >= LEVELS[tag]:
                nodes.append(parents.pop())
            if not slash:
                span = lambda name: (re.search(rf'{name}\W*(\d+)', attributes.lower()) or (None, '1'))[1]
                parents.append(Node(len(nodes), LEVELS[tag], (tag, span('colspan'), span('rowspan'))))
        if parents[-1].level == LEVELS['td']:
            parents[-1].text += unescape(text)
    return nodes + parents[::-1]

def relabel_cost(a, b):
    return 1 if a.label != b.label else Levenshtein.normalized_distance(a.text.strip(), b.text.strip())

def tree_edit_distance(a, b):
    """Zhang and Shasha's (https://doi.org/10.1137/0218082), of two trees as lists of nodes in postorder. A
    node deleted or inserted costs 1. Takes about 8 * len(a) * len(b) steps.
    """
    def roots(nodes):  # of the subtrees that need a pass: the largest of those that start at the same node
        return sorted({node.first: i for i, node in enumerate(nodes)}.values())
    subtree = [[0] * len(b) for _ in a]  # [i][j]: distance of the subtrees of a[i] and b[j]
    for root_a, root_b in itertools.product(roots(a), roots(b)):
        start_a, start_b = a[root_a].first, b[root_b].first
        forest = [list(range(root_b - start_b + 2))]  # [i][j]: distance of the first i nodes and the first j
        for i in range(start_a, root_a + 1):
            above, before, row = forest[-1], forest[a[i].first - start_a], [len(forest)]
            for j in range(start_b, root_b + 1):
                edits = min(above[j - start_b + 1], row[-1]) + 1
                if a[i].first == start_a and b[j].first == start_b:
                    edits = min(edits, above[j - start_b] + relabel_cost(a[i], b[j]))
                    subtree[i][j] = edits
                else:
                    edits = min(edits, before[b[j].first - start_b] + subtree[i][j])
                row.append(edits)
            forest.append(row)
    return subtree[-1][-1]

METRICS = {f.__name__: f for f in (relaxed_accuracy, yes_no, letter, final_number, edit_similarity, teds)}

# -----------------------------------------------------------------------------
# retrieval: which caption belongs to which image?

def image_caption_pairs(examples, limit):
    """Up to `limit` examples with one image each, all their captions, and image_index (M,), the image of each
    caption. No two examples share an image or a caption. Raises ValueError for fewer than two.
    """
    kept, captions, image_index, used = [], [], [], set()
    for example in examples:
        own = list(dict.fromkeys(example.get('references') or [reference(example).strip()]))
        names = {*own, *map(str, example['images'])}
        if len(example['images']) == 1 and all(own) and not names & used:
            used |= names
            captions += own
            image_index += [len(kept)] * len(own)
            kept.append(example)
        if len(kept) == limit:
            break
    if len(kept) < 2:
        raise ValueError('retrieval needs held-out images with a caption each, and there are fewer than two')
    return kept, captions, torch.tensor(image_index)

def similarity(image_embeds, text_embeds, chunk=16):
    """Images (N, K, D) and captions (M, D) -> (N, M) in float32: the query closest to the caption counts.
    In chunks of images, because N x K x M would be 16 GB for COCO.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        return torch.cat([(part @ text_embeds.T).amax(1) for part in image_embeds.split(chunk)])

def recall(scores, image_index):
    """scores: (N, M); caption j belongs to image image_index[j]. Returns the share of images with a caption of
    their own among the k most similar (i2t_r1, i2t_r5, i2t_r10), that of captions (t2i_r1, ...), and what
    guessing would give (chance_r1). Ties count as wrong, so a collapsed model has 0.
    """
    N = len(scores)
    is_own = image_index == torch.arange(N)[:, None]                                     # (N, M)
    own = scores.masked_fill(~is_own, -math.inf)
    others = scores.masked_fill(is_own, -math.inf)
    result = {}
    for direction, dim in (('i2t', 1), ('t2i', 0)):
        n_ahead = (others >= own.amax(dim, keepdim=True)).sum(dim)
        for k in (1, 5, 10):
            result[f'{direction}_r{k}'] = (n_ahead < k).float().mean().item()
    return {**result, 'chance_r1': 1 / N}

def embed_captions(model, enc, captions):
    """The embeddings of captions by a QFormerPretraining: a list of (D,), in float32 on the CPU."""
    longest = model.config.block_size - 2  # an end token, and the one that the model prepends
    ids = [torch.tensor(enc.encode(caption)[:longest] + enc.end_ids[:1]) for caption in captions]
    ids = pad_sequence(ids, batch_first=True, padding_value=-1)                          # (M, T)
    return list(model.text_embeds(ids.to(model.logit_scale.device)).float().cpu())

@torch.no_grad()
def rank_captions(model, enc, image, captions):
    """[(caption, its similarity to the image)] by a QFormerPretraining, the most similar first."""
    images = collate_images([preprocess(load_image(image), model.config)], model.config)
    images = tuple(tensor.to(model.logit_scale.device) for tensor in images)
    image_embeds = model.image_embeds(images).float().cpu()                              # (1, K, D)
    text_embeds = torch.stack(embed_captions(model, enc, captions))                      # (M, D)
    scores = similarity(image_embeds, text_embeds)[0].tolist()
    return sorted(zip(captions, scores), key=lambda pair: -pair[1])

def mean_cosine(image_embeds):
    """Mean cosine of two images (N, K, D), each the mean of its K embeddings. A collapsed model has 1."""
    N = len(image_embeds)
    total = torch.nn.functional.normalize(image_embeds.mean(1), dim=-1).sum(0)           # (D)
    return (total.square().sum().item() - N) / (N * (N - 1))

# -----------------------------------------------------------------------------
# evaluation: the model must prove that it uses the image

def held_out_examples(dataset, config, tasks):
    """A dataset's held-out examples, in their order. No line drawn from pydoc's occurs in its training text."""
    texts = [row['text'] for row in open_rows(dataset, 'train')] if dataset == 'pydoc' else []
    exclude = '\n'.join(' '.join(text.split()) for text in texts)
    config = SimpleNamespace(**{**vars(config), 'blank_images': 0.0})
    return Examples(open_rows(dataset, 'val', config.overfit_rows), config, seed=0, tasks=tasks, shuffle=False, exclude=exclude)

class Evaluation:
    """The held-out examples of a run, and what is measured on them; the ranks share the work.

        val_loss       nats per target token
        blank_loss     the same with every image white: what the model knows without the images
        shuffled_loss  the same with the images of other examples: what it does with mismatched images
        text_loss      plain held-out text; before the first step it is the reference for later ones
        cer, exact     greedy answers compared with the truth; with "references" also bleu4, rouge_l, cider_d,
                       and the mean of each of METRICS that examples name as their "metric"
        R, R_shuffled, R32, R32_shuffled
                       task continuation: pixel recovery, of all the text after the image and of its first 32
                       characters, see `pixel_recovery`; infix_loss: the loss with the infix as text
        cosine, row_cosine
                       of the embeddings of two images, and of two rows of an image; near 1 they have collapsed

    For a QFormerPretraining: val_loss, the losses that it is the sum of, `recall` and `mean_cosine`.
    config is a namespace with train.py's knobs. held_out: Examples to use instead of the dataset's.
    """

    def __init__(self, config, enc, model, dist_env, cache=None, held_out=None):
        self.config = config
        self.enc = enc
        self.n_cells = 32  # answers on the contact sheet
        self.map = partial(map_across_ranks, size=config.batch_size, dist_env=dist_env)
        self.device = next(model.parameters()).device
        self.cache = cache
        has_vision = model.config.vision_encoder
        image_tasks = ' '.join(task for task in config.tasks.split() if not task.startswith('text'))
        used_tasks = image_tasks if image_tasks and has_vision else 'text'
        held_out = held_out or held_out_examples(config.dataset, config, used_tasks)
        is_plain = held_out.is_plain_text
        if is_plain and image_tasks and not has_vision:
            raise ValueError(f'tasks {config.tasks!r} makes images, but the model has no vision_encoder: set '
                             '--vision_encoder=vit, or --tasks=text')
        n_loss = config.eval_iters * config.batch_size
        limit = max(n_loss, config.eval_samples)
        indices = range(4 * limit if is_plain else len(held_out.rows))
        examples = ({'images': [], **held_out[i]} for i in indices)
        self.pairs = None
        if isinstance(model, QFormerPretraining):
            self.pairs = image_caption_pairs(examples, config.eval_samples)
            self.loss_examples = self.pairs[0][:n_loss]
            return
        self.n_left_out = 0
        if config.packing:
            examples = (e for e in examples if self.fits(e, model.config))
        examples = list(itertools.islice(examples, limit))
        if self.n_left_out:
            note(f'{self.n_left_out} held-out examples are left out: they need more than {model.config.block_size} '
                 'positions')
        self.loss_examples = examples[:n_loss]
        # conversations, and images with a caption after the last one
        is_question = lambda e: 'messages' in e or e['images'] and 'infix' not in e and reference(e).strip()
        self.questions = list(filter(is_question, examples))[:config.eval_samples]
        self.continuations = [e for e in examples if 'infix' in e][:min(8, config.eval_samples)]
        self.texts = []
        encodes_all = is_plain or not enc.name.endswith('.pkl')  # nanoGPT's character tokenizers do not
        if config.text_dataset or used_tasks != 'text' and encodes_all:
            text_dataset = config.text_dataset or ('' if is_plain else 'pydoc')
            text_rows = open_rows(text_dataset, 'val') if text_dataset else held_out.rows
            texts = Examples(text_rows, config, seed=0, tasks='text', shuffle=False)
            self.texts = [texts[i] for i in range(n_loss)]

    def fits(self, example, config):
        """Whether block_size has room for the example; packing leaves out the others in training."""
        try:
            tokenize(example, self.enc, config, self.config.loss_on, cache=self.cache)
            tokenize(question(example), self.enc, config, prompt_only=True, cache=self.cache)
        except TooLong:
            self.n_left_out += 1
            return False
        return True

    @torch.no_grad()
    def run(self, model, autocast):
        """({name: figure}, a contact sheet or None, a table [{column: value}]), the same on every rank."""
        self.model = model.eval()
        with autocast:
            measured = self.measure_retrieval() if self.pairs else self.measure_answers()
        model.train()
        return measured

    def batch(self, examples):
        """The examples as a collated batch on the device."""
        config = self.model.config
        tokenized = [tokenize(e, self.enc, config, self.config.loss_on, cache=self.cache) for e in examples]
        return to_device(collate(tokenized, config), self.device)

    def losses(self, examples, change=list):
        """{name: mean loss in nats, 'weight': the number of targets or rows}."""
        def measure(rows):
            batch = self.batch(change(rows))  # a batch at a time, so that few changed images are in memory
            torch.manual_seed(self.config.seed)  # ITM's hard negatives are the same every time
            sums = {name: loss.item() for name, loss in self.model(batch).items()}
            return [{**sums, 'weight': self.model.loss_weight(batch)}]

        total = Counter()
        for sums in self.map(measure, examples):
            total.update(sums)
        weight = total.pop('weight', 0)
        return Counter({name: value / max(1, weight) for name, value in total.items()}, weight=weight)

    def generate(self, examples):
        """Greedy answers to the examples, on every rank."""
        def work(rows):
            # as long as the longest reference and a little more: an answer that goes on is wrong anyway
            length = lambda e: len(reference(e) if e.get('char_level') else self.enc.encode(reference(e)))
            longest = max(map(length, rows)) + 8
            answers = answer(self.model, self.enc, list(map(question, rows)), self.cache, max_new_tokens=longest)
            return [found.text for found in answers]

        return self.map(work, examples)

    def measure_answers(self):
        """`run` for a GPT."""
        examples = self.loss_examples
        result = {'val_loss': self.losses(examples)['lm']}
        if any(e['images'] for e in examples):
            result['blank_loss'] = self.losses(examples, blank)['lm']
            result['shuffled_loss'] = self.losses(shuffled(examples))['lm']
            with_images = [e for e in examples if e['images']]
            result |= self.image_cosines(with_images[:max(2, self.config.batch_size)])  # as many as memory is there for
        if self.texts:
            result['text_loss'] = self.losses(self.texts)['lm']
        hidden = [e for e in examples if 'infix' in e]
        if hidden:
            result |= self.pixel_recovery(hidden)
        cells = self.continuation_cells()
        predictions = self.generate(self.questions)
        references = list(map(reference, self.questions))
        if predictions:
            result |= {**score(predictions, references), 'n': len(predictions)}
            if all(e.get('references') for e in self.questions):
                result |= score_captions(predictions, self.questions)
        table, scores = [], defaultdict(list)
        for example, prediction, truth in zip(self.questions, predictions, references):
            edits = Levenshtein.distance(prediction, truth)
            table.append({'index': len(table), 'image': image_names(example), 'reference': truth,
                          'prediction': prediction, 'edits': edits, 'exact': int(edits == 0)})
            metric = example.get('metric')
            if metric in METRICS:
                table[-1]['score'] = METRICS[metric](prediction, truth)
                scores[metric].append(table[-1]['score'])
            if len(table) <= self.n_cells:
                image = next(iter(example['images']), None)
                cells.append((image, answer_caption(example, prediction), edits == 0))
        result |= {metric: sum(values) / len(values) for metric, values in scores.items()}
        sheet = None
        if cells:
            sources, captions, correct = zip(*cells)
            cell = 800 if self.continuations else 400  # a caption is cut after six lines
            images = [source and load_image(source) for source in sources]
            sheet = render.contact_sheet(images, captions, correct, cell)
        return result, sheet, table

    def pixel_recovery(self, examples):
        """R = (blank - pixels) / (blank - infix), of the postfix's losses after the image, after a blank one of its size, and
        after the infix as text: the share of what the infix tells about the postfix that comes through its pixels. With
        the images of others it has to be near 0. The first 32 characters depend on the infix more than the rest.
        """
        result = {}
        for name, n_chars in (('R', None), ('R32', 32)):
            cut = examples
            if n_chars:
                cut = [{**e, 'text': question(e)['text'] + reference(e)[:n_chars], 'is_cut': True} for e in examples]
            pixels = self.losses(cut)
            infix = self.losses([{**e, 'images': [], 'filling': e['infix']} for e in cut])
            if pixels['weight'] != infix['weight']:
                raise ValueError(f'block_size ({self.model.config.block_size}) is too small to measure R: with its '
                                 'infix as text a sequence is cut off; lower max_span or raise block_size')
            blank_loss = self.losses(cut, blank)['lm']
            recovery = lambda losses: (blank_loss - losses['lm']) / (blank_loss - infix['lm'])
            result |= {name: recovery(pixels), f'{name}_shuffled': recovery(self.losses(shuffled(cut)))}
            result.setdefault('infix_loss', infix['lm'])
        return result

    def image_cosines(self, examples):
        """Mean cosines of the mean embeddings of images, and of those of an image's rows; {} where there is one only."""
        batch = self.batch(examples)
        patches, grid, *layout = batch['images']
        outputs = []  # by a hook, because parts of a sharded model run in its forward pass only
        hook = self.model.vision.register_forward_hook(lambda module, args, output: outputs.append(output))
        self.model(batch)
        hook.remove()
        emb, valid = outputs[0]                                                          # (N, L, C), (N, L)
        means = [own[is_valid].mean(0) for own, is_valid in zip(emb.float(), valid)]     # N of (C)
        result = {'cosine': mean_cosine(torch.stack(means)[:, None])} if len(means) > 1 else {}
        k = cell_size(self.model.config)
        per_image = []
        # neither a Q-Former's queries nor cached features have rows
        if self.model.config.connector != 'qformer' and not patches.is_floating_point():
            rows = grid[..., 0].unflatten(1, (-1, k**2)).amax(2) // k                    # (N, L), -1 for padding
            for newlines in layout:  # these say where rows end
                rows = (newlines == NEWLINE).cumsum(1).where(newlines >= 0, -1)          # (N, P), -1 for newlines
            for own, row in zip(emb.float(), rows):
                means = [own[row == r].mean(0) for r in range(int(row.max()) + 1)]
                if len(means) > 1:
                    per_image.append(mean_cosine(torch.stack(means)[:, None]))
        return {**result, 'row_cosine': sum(per_image) / len(per_image)} if per_image else result

    def continuation_cells(self):
        """What the model generates after the image, a blank one and that of another example, and the true postfix."""
        examples = [{**e, 'text': question(e)['text'] + reference(e)[:100]} for e in self.continuations]
        generated = [self.generate(changed) for changed in (examples, blank(examples), shuffled(examples))]
        cells = []
        for example, *texts in zip(examples, *generated, map(reference, examples)):
            texts = [' '.join(text.split())[:100] for text in texts]
            caption = 'with the image: {}\nblank: {}\nanother: {}\ntrue: {}'.format(*texts)
            cells.append((example['images'][0], caption, None))
        return cells

    def measure_retrieval(self):
        """`run` for a QFormerPretraining."""
        examples, captions, image_index = self.pairs
        losses = self.losses(self.loss_examples)
        del losses['weight']

        def embed_images(rows):
            return list(self.model.image_embeds(self.batch(rows)['images']).float().cpu())

        image_embeds = torch.stack(self.map(embed_images, examples))                     # (N, K, D)
        text_embeds = torch.stack(self.map(partial(embed_captions, self.model, self.enc), captions))  # (M, D)
        scores = similarity(image_embeds, text_embeds)                                   # (N, M)
        result = {'val_loss': sum(losses.values()), **losses, **recall(scores, image_index),
                  'cosine': mean_cosine(image_embeds), 'n': len(examples)}
        table = []
        own_image = image_index.tolist()
        for caption, i, column in zip(captions, own_image, scores.T):                    # (N)
            rank = 1 + int((scores[i] > column[i]).sum())
            table.append({'image': image_names(examples[i]), 'caption': caption, 'cosine': f'{column[i]:.4f}',
                          'rank': rank, 'nearest': captions[scores[i].argmax()]})
        images = [load_image(e['images'][0]) for e in examples[:8]]
        shown = [own_image.index(i) for i in range(len(images))]  # a caption of each
        sheet = render.similarity_grid(images, [captions[j] for j in shown], scores[:8, shown].T.tolist())
        return result, sheet, table

# how much text fits into an image token, https://arxiv.org/abs/2510.18234

def read_pages(evaluation, model, autocast):
    """The pages of an Evaluation, each with one image, as rows: how much text and how many tokens it has, and the precision of
    the greedy answer, 1 - edits / characters, at least 0: of the image, of a blank one, of another page's, and, as a baseline,
    of the text cut to as many text tokens as the image has places (its tokens and its newlines).
    """
    evaluation.model = model.eval()
    text_enc = text_tokenizer(evaluation.enc)
    pages = [e for e in evaluation.questions if len(e['images']) == 1]
    if not pages:
        raise ValueError('--compression needs held-out pages, with one image and its text each')
    with torch.no_grad(), autocast:
        answers = [evaluation.generate(changed) for changed in (pages, blank(pages), shuffled(pages))]
    rows = []
    for page, *predictions in zip(pages, *answers):
        truth = reference(page)
        ids = text_enc.encode(truth)
        image = preprocess(load_image(page['images'][0]), model.config)
        places = num_tokens(image, model.config)
        n_newlines = int((arrange(image[1], model.config) < 0).sum()) if model.config.image_newlines else 0
        predictions.append(text_enc.decode(ids[:places]))
        precisions = [max(0.0, 1 - Levenshtein.distance(p, truth) / max(1, len(truth))) for p in predictions]
        rows.append({'characters': len(truth), 'text_tokens': len(ids), 'image_tokens': places - n_newlines, 'places': places,
                     **dict(zip(('precision', 'blank', 'shuffled', 'truncated'), precisions))})
    return rows

def text_tokenizer(enc):
    """What counts text tokens: GPT-2's BPE; the model's own tokenizer where that cannot be loaded."""
    try:
        return get_tokenizer('gpt2')
    except ValueError as error:
        note(f'{error}; text tokens are those of {enc.name}')
        return enc

def compression_table(name, rows, width):
    """Rows of `read_pages` as a table [{column: value}]: means over all pages, then over each bucket of text tokens."""
    lengths = [row['text_tokens'] for row in rows]
    width = width or max(1, round((max(lengths) - min(lengths)) / 6))
    buckets = {'all': rows}
    for row in sorted(rows, key=lambda row: row['text_tokens']):
        start = row['text_tokens'] // width * width
        buckets.setdefault(f'{start}-{start + width}', []).append(row)
    table = []
    for label, pages in buckets.items():
        mean = {key: sum(page[key] for page in pages) / len(pages) for key in pages[0]}
        line = {'run': name, 'text tokens': label, 'pages': len(pages), 'image tokens': mean['image_tokens'],
                'places': mean['places'],
                'characters / image token': mean['characters'] / mean['image_tokens'],
                'characters / place': mean['characters'] / mean['places'],
                'text tokens / image token': mean['text_tokens'] / mean['image_tokens'],
                'text tokens / place': mean['text_tokens'] / mean['places']}
        line |= {key: mean[key] for key in ('precision', 'blank', 'shuffled', 'truncated')}
        table.append({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()})
    return table

class MixtureEvaluation:
    """An Evaluation of each source of a mixture. val_loss is the mean of theirs, each weighed by its share of the mixture."""

    def __init__(self, sources, config, enc, model, dist_env):
        sizes = [len(open_rows(source.name, 'train', config.overfit_rows)) for source in sources]
        counts = count_draws(sources, sizes)
        self.shares = [count / sum(counts) for count in counts]
        per_source = lambda total: math.ceil(total / len(sources))  # so that an evaluation takes as long as that of one
        common = {**vars(config), 'eval_iters': per_source(config.eval_iters), 'eval_samples': per_source(config.eval_samples)}
        self.evaluations = {}
        for source in sources:
            own = {**common, 'dataset': source.name, 'loss_on': source.loss_on or config.loss_on}
            self.evaluations[source.name] = Evaluation(SimpleNamespace(**own), enc, model, dist_env)
        for number, evaluation in enumerate(self.evaluations.values()):
            evaluation.n_cells = 4 * per_source(8)  # whole rows of four
            if number:
                evaluation.texts = []  # text_loss is measured once

    def run(self, model, autocast):
        """As Evaluation.run; what it measures on each source is in result['sources'][its name]."""
        results, sheets, table = {}, [], []
        for name, evaluation in self.evaluations.items():
            results[name], sheet, rows = evaluation.run(model, autocast)
            sheets += [sheet] if sheet else []
            table += [{'source': name, **row} for row in rows]
        result = {'val_loss': sum(share * own['val_loss'] for share, own in zip(self.shares, results.values()))}
        for own in results.values():
            if 'text_loss' in own:
                result['text_loss'] = own.pop('text_loss')
        sheet = render.stack(sheets, 1, render.MARGIN) if sheets else None
        return {**result, 'sources': results}, sheet, table

def open_evaluation(config, enc, model, dist_env, cache=None):
    """The evaluation of config.dataset, a dataset or a mixture of several."""
    sources = parse_mixture(config.dataset)
    if len(sources) == 1:
        own = {**vars(config), 'dataset': sources[0].name, 'loss_on': sources[0].loss_on or config.loss_on}
        return Evaluation(SimpleNamespace(**own), enc, model, dist_env, cache)
    return MixtureEvaluation(sources, config, enc, model, dist_env)

def warn_of_collapse(result):
    """Says so if the embeddings of all images, or of all rows, are nearly the same: the GPT cannot tell them apart."""
    for name, what in (('cosine', 'two images'), ('row_cosine', 'two rows of an image')):
        # 0.993 in pages_cpu.py, which reads well: most of a page is white; 0.9998 in a run that had collapsed
        if result.get(name, 0) > 0.999:
            note(f'warning: the embeddings of {what} have a mean cosine of {result[name]:.4f}: the vision encoder or the '
                 'connector has collapsed; lower their learning rates')
    for own in result.get('sources', {}).values():
        warn_of_collapse(own)

def describe(result):
    """The figures of an evaluation on a line, those of a mixture's sources on one each."""
    line = ', '.join(f'{name} {value:.4g}' for name, value in result.items() if name != 'sources')
    sources = result.get('sources', {}).items()
    return '\n'.join([line, *(f'    {name}: {describe(own)}' for name, own in sources)])

def map_across_ranks(work, items, size, dist_env):
    """Concatenates the lists work(items[i:i + size]) of all i; each rank does its share of the calls."""
    starts = range(dist_env.rank * size, len(items), dist_env.world_size * size)
    progress = tqdm(starts, unit='batch', delay=5, leave=False, disable=dist_env.rank > 0)
    results = {i: work(items[i:i + size]) for i in progress}
    results = ChainMap(*all_gather(results, dist_env))
    return [result for i in sorted(results) for result in results[i]]

def all_gather(value, dist_env):
    """The values of all ranks, a list."""
    values = [value] * dist_env.world_size
    if dist_env.ddp:
        dist.all_gather_object(values, value)
    return values

def blank(examples):
    """The examples with white images of the same sizes."""
    return [{**e, 'images': [Image.new('RGB', load_image(source).size, 'white') for source in e['images']]}
            for e in examples]

def shuffled(examples):
    """The examples with the images of others: image j becomes image j + M/2 of all M."""
    images = deque(source for e in examples for source in e['images'])
    images.rotate(-(len(images) // 2))
    return [{**e, 'images': [images.popleft() for _ in e['images']]} for e in examples]

def reference(example):
    """What the model should have answered: the last message's text, or the text after the last image."""
    if 'messages' in example:
        return example['messages'][-1]['content'].strip()
    return example['text'].rpartition(IMAGE)[2]

def question(example):
    """The example up to what the model has to answer."""
    if 'messages' in example:
        return example
    return {**example, 'text': example['text'].rpartition(IMAGE)[0] + IMAGE}

def image_names(example):
    return ' '.join(source if isinstance(source, str) else 'drawn' for source in example['images'])

def answer_caption(example, prediction):
    """For a contact sheet: the question, the answer, and the truth if that is another."""
    messages = example.get('messages', [])
    asked = messages[-2]['content'].replace(IMAGE, '').strip() if len(messages) > 1 else ''
    truth = reference(example)
    return f'{asked}\n{prediction}'.strip() + ('' if prediction == truth else f'\n({truth})')
