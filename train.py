"""
The one training loop: a GPT, with or without eyes, on text, on pictures of text, or on conversations about images.

    $ python train.py config/quickstart.py                                       # one process, any machine
    $ torchrun --nproc_per_node=8 train.py config/render_pretrain.py             # 8 GPUs
    $ python train.py config/quickstart.py --init_from=resume                    # go on where it stopped, exactly
    $ python train.py config/vlm_cpu.py --init_from=out/text_bytes/ckpt.pt       # a text model gains eyes
    $ python train.py --help                                                     # every knob

Writes to out_dir: ckpt.pt (newest), ckpt_best.pt (lowest val_loss), log.jsonl and samples.png.
"""

import atexit
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import fields
from types import SimpleNamespace

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configurator import configure, run
from model import GPT, GPT2, Aligner, GPTConfig, is_pretrained, load_checkpoint, read_eyes, read_weights
from prepare_data import (IMAGE, Batches, Examples, StoredFeatures, collate, get_tokenizer, held_out_examples, load_image,
                          open_rows, parse_tasks, tokenize)
from sample import (answer, answer_sheet, embed_images, embed_texts, find_device, is_question, pairs_of, question, recall,
                    reference, retrieval_grid, score)

# -----------------------------------------------------------------------------
# run
out_dir = 'out'
init_from = 'scratch'          # scratch, resume (from out_dir), a checkpoint's path, or a model of Hugging Face's: gpt2 to
#                                gpt2-xl, OWNER/NAME or a folder with a GPT-2, Llama (SmolLM2) or Qwen3
eval_interval = 500            # steps between two evaluations, each with a checkpoint
log_interval = 10              # steps between two lines of log.jsonl
eval_iters = 8                 # micro-batches for each loss of an evaluation
eval_samples = 64              # held-out examples answered greedily at each evaluation, for CER and exact match
eval_only = False              # evaluate once and leave
always_save_checkpoint = True  # False: no ckpt.pt at evaluations, only ckpt_best.pt when val_loss improves
keep_checkpoints = 0           # how many older checkpoints to keep beside ckpt.pt, as ckpt_ITER.pt
seed = 1337                    # everything random comes from it
# wandb
wandb_log = False
wandb_project = 'glimpse'
wandb_run_name = ''
# data
dataset = 'pydoc'              # pydoc, a file or folder of text, or data/NAME (see prepare_data.py)
text_dataset = ''              # plain text for text_loss; '' takes the dataset's own, or pydoc if it is of conversations
tokenizer = ''                 # bytes, gpt2, the path of a nanoGPT meta.pkl, words.txt or tokenizer.json, or OWNER/NAME on
#                                the hub; '' takes that of init_from, and bytes from scratch
system_prompt = 'auto'         # what conversations in ChatML begin with; auto: as the chat template of the model says
tasks = 'read:1'               # what plain text becomes: read, continue, text, with weights: 'read:0.8 text:0.2'
objective = 'lm'               # the next token; or itc, itc+itm, itc+itm+itg: encoder and Q-Former learn from pictures and
#                                their captions without a GPT, BLIP-2's first stage; captions are cut at block_size tokens
align_dim = 256                # of that stage: the vectors in which pictures and captions are compared
loss_on = 'assistant'          # of conversations, learn the assistant's words, or 'all'
gradient_accumulation_steps = 1  # micro-batches of a step, over all processes together
batch_size = 12                # examples in a micro-batch
block_size = 1024              # positions of a sequence; an image takes one
num_workers = 1                # processes that draw and tokenize ahead; 0 does it in the training process
# pictures of text
image_width = 256              # pixels of the box that the text is drawn into
image_height = 16
one_line = True                # True: white space is one space, the picture as wide as its line; False: a page
min_chars = 16                 # task read: characters in a picture
max_chars = 32
spell = False                  # task read: learn a token for each character, not the tokenizer's longer ones
grow_iters = 0                 # task read: steps over which pictures grow from a few characters to full length
min_span = 200                 # tasks continue and text: characters of the text
max_span = 4000
infix_min = 0.1                # task continue: share of the text that becomes a picture
infix_max = 0.4
font = ''                      # a .ttf/.otf file or a folder of them; '' is Pillow's built-in font
font_min = 6                   # font sizes, pixels
font_max = 200
distort = 0.0                  # strength of random colours, place, rotation, blur and noise, 0 to 1
# image files
augment = ''                   # crop, colour or crop+colour: another part of a picture, other colours, at each look
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0                  # for pretraining 0 is good, for finetuning try 0.1+
bias = False                   # do we use bias inside LayerNorm and Linear layers?
norm = 'layernorm'             # or rmsnorm. GPT-2's way is the default; for Llama's: rmsnorm, rope, swiglu
norm_eps = 1e-5
position = 'learned'           # or rope
rope_theta = 10000.0
mlp = 'gelu'                   # or swiglu
n_inner = 0                    # width of the MLP; 0: 4 * n_embd
n_kv_head = 0                  # heads of keys and values, fewer than n_head for grouped-query attention; 0: n_head
head_dim = 0                   # width of a head; 0: n_embd / n_head
qk_norm = False                # RMSNorm on queries and keys
tied = True                    # the token embeddings are the head's weights, too
lora_rank = 0                  # > 0: the GPT keeps its weights, and only an update of this rank of each Linear is trained
lora_alpha = 16.0              # the updates are scaled by lora_alpha / lora_rank
lora_dropout = 0.0
lora_scope = 'all'             # image: the updates act from a sequence's first image on; of text alone nothing is forgotten
# vision
vision_encoder = ''            # '' for a text-only GPT, vit for the small ViT trained from scratch, or a tower by name:
#                                ViT-L-14-quickgelu/openai, timm/vit_small_patch14_dinov2.lvd142m (see vision.py)
vision_from = ''               # a checkpoint whose small ViT or Q-Former becomes this model's, or Salesforce/blip2-itm-vit-g
#                                or another BLIP-2 of the hub or in a folder, whose Q-Former does
connector = 'mlp'              # linear, mlp, pool or qformer
pool_size = 2                  # connector pool: k x k patches become one token
n_queries = 32                 # connector qformer: any image becomes as many tokens
qformer_n_layer = 12
qformer_n_head = 12
qformer_n_embd = 768
qformer_cross = 2              # every second layer looks at the image
patch_height = 16
patch_width = 16
max_image_tokens = 256         # a larger image is scaled down, keeping its aspect, to make at most as many tokens
line_height = 0                # > 0: every image is a line of text and first scaled to this height, in pixels
vision_n_layer = 6
vision_n_head = 6
vision_n_embd = 384
vision_layer = -2              # of a tower: the layer whose features are taken; -1 is the last, with its final norm
vision_cls = False             # of a tower: keep the class token
image_fit = 'pad'              # of a tower: how a picture becomes its square: pad, squash or crop
stored_features = True         # of a frozen tower: take those that prepare_data.py features has stored, if it has (and
#                                augment is not asked for)
# optimizer
optimizer = 'adamw'            # adamw, or muon for the hidden matrices and adamw for the rest
learning_rate = 6e-4           # max learning rate of the GPT; 0 freezes it
vision_lr = 6e-4               # of the encoder
qformer_lr = 6e-4              # of the Q-Former
connector_lr = 6e-4            # of the connector
muon_lr = 0.02                 # of the hidden matrices under optimizer muon
max_iters = 600000             # total number of training iterations
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                # clip gradients at this value, or disable if == 0.0
decay_lr = True                # whether to decay the learning rate
warmup_iters = 2000            # how many steps to warm up for
lr_decay_iters = 0             # steps of the cosine; 0: max_iters
min_lr = 6e-5                  # learning rate at its end; the other parts end at the same share of their maximum
# system
backend = ''                   # nccl or gloo; '' takes nccl on CUDA, else gloo
device = ''                    # cuda, cuda:1, mps or cpu; '' finds out by itself
dtype = ''                     # bfloat16, float16 (with a GradScaler) or float32; '' takes the best that the device has
compile = torch.cuda.is_available()  # use torch.compile to make the model faster
# -----------------------------------------------------------------------------


def start_processes(config):
    """Finds the device, joins torchrun's other processes. Returns a namespace: rank, world, device, device_type, dtype."""
    place = SimpleNamespace(rank=int(os.environ.get('RANK', 0)), world=int(os.environ.get('WORLD_SIZE', 1)),
                            device=config.device or find_device(), ddp='RANK' in os.environ)
    place.device_type = place.device.split(':')[0]
    if place.device_type not in ('cuda', 'mps', 'cpu'):
        raise ValueError(f'device must be cuda, mps or cpu, got {place.device!r}')
    if config.gradient_accumulation_steps % place.world:
        raise ValueError(f'gradient_accumulation_steps ({config.gradient_accumulation_steps}) counts the micro-batches '
                         f'of all processes and must be a multiple of their number ({place.world})')
    if place.ddp:
        if place.device_type == 'cuda':
            place.device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(place.device)
        dist.init_process_group(backend=config.backend or ('nccl' if place.device_type == 'cuda' else 'gloo'))
    best = 'float32' if place.device_type != 'cuda' else 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
    place.dtype = config.dtype or best
    if place.dtype not in ('bfloat16', 'float16', 'float32'):
        raise ValueError(f'dtype must be bfloat16, float16 or float32, got {place.dtype!r}')
    if place.device_type == 'cuda':
        torch.set_float32_matmul_precision('high')  # tf32
    return place


def find_tokenizer(config):
    """The tokenizer's name: the run's own, or that of the model it starts from."""
    source = config.init_from
    if config.tokenizer or source == 'scratch':
        return config.tokenizer or 'bytes'
    if source != 'resume' and is_pretrained(source):
        return 'gpt2' if source in GPT2 else source
    path = os.path.join(config.out_dir, 'ckpt.pt') if source == 'resume' else source
    name = load_checkpoint(path).get('config', {}).get('tokenizer')
    if not name:
        raise ValueError(f'{path} does not say which tokenizer it was trained with: name it, as --tokenizer=gpt2, or '
                         '--tokenizer=data/NAME/meta.pkl of a nanoGPT character dataset')
    return name


def build_model(config, tokenizer):
    """The model as init_from says, and the checkpoint to resume from, or None."""
    if config.init_from == 'scratch':
        args = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)}
        vocab_size = -(-tokenizer.n_vocab // 64) * 64  # padded for efficiency; the spare ids are never drawn
        if config.lora_rank:
            raise ValueError('lora_rank adapts a model that can already do something: say which by --init_from')
        shape, eyes = read_eyes(config.vision_from, config) if config.vision_from else ({}, {})
        args |= {'vocab_size': vocab_size, 'image_token': tokenizer.encode_single_token(IMAGE), **shape}
        model = (GPT if config.objective == 'lm' else Aligner)(GPTConfig(**args))
        if eyes:
            take_eyes(model, eyes, config, shape)
        return model, None
    if config.init_from != 'resume':
        return adopt_model(config, tokenizer), None
    path = os.path.join(config.out_dir, 'ckpt.pt')
    checkpoint = load_checkpoint(path)
    kind = GPT if checkpoint['model_args'].get('objective', 'lm') == 'lm' else Aligner
    model = kind.from_state(checkpoint, path, dropout=config.dropout)
    if config.block_size != model.config.block_size:
        raise ValueError(f'{path} was trained with block_size {model.config.block_size}, and a resumed run keeps it: '
                         f'to change it, start from its weights with --init_from={path}')
    missing = sorted({'optimizer', 'iter_num', 'best_val_loss', 'config'} - set(checkpoint))
    if missing or not isinstance(checkpoint['optimizer'], list):
        raise ValueError(f'{path} cannot be resumed: it was not written by this train.py; start from its weights with '
                         f'--init_from={path}')
    for key, old in checkpoint['config'].items():
        if key in vars(config) and getattr(config, key) != old and key != 'init_from':
            print(f'note: {key} was {old!r}, and is {getattr(config, key)!r} from now on', file=sys.stderr)
    return model, checkpoint


def adopt_model(config, tokenizer):
    """
    The model of init_from with what this run asks of it beyond what it is: positions, special tokens, eyes if it is blind,
    LoRA. Its own shape and its own eyes stay as they are.
    """
    source = config.init_from
    if config.objective != 'lm':
        raise ValueError(f'objective {config.objective} has no GPT to start from: leave --init_from out; --vision_from=CKPT '
                         'brings eyes')
    args, state, base = read_weights(source)
    known = vars(GPTConfig(**args))
    # the tokenizer has to be the source's: its ids, some special tokens, and a few rows of padding
    text_ids, image_token = len(tokenizer._mergeable_ranks), tokenizer.encode_single_token(IMAGE)
    spare = known['vocab_size'] - text_ids
    if not 0 <= spare <= max(64, text_ids // 256) or known['vision_encoder'] and known['image_token'] != image_token:
        raise ValueError(f'{source} was not trained with the tokenizer {tokenizer.name}: it has {known["vocab_size"]} tokens, '
                         f'the tokenizer {text_ids} and its special ones; name the one it was trained with by --tokenizer')
    changes = {key: getattr(config, key) for key in ('dropout', 'block_size', 'lora_rank', 'lora_dropout')}
    if not known['lora_rank']:  # updates that are there already act as they have learnt to
        changes |= {key: getattr(config, key) for key in ('lora_alpha', 'lora_scope')}
    if tokenizer.n_vocab > known['vocab_size']:
        changes['vocab_size'] = -(-tokenizer.n_vocab // 64) * 64
    asked = {key: getattr(config, key) for key in known if hasattr(config, key) and key not in changes}
    eyes = None
    if (config.vision_encoder or config.vision_from) and not known['vision_encoder']:
        names = list(known)  # the eyes are new: what GPTConfig lists from vision_encoder on is as this run says
        changes |= {key: asked.pop(key) for key in names[names.index('vision_encoder'):] if key in asked}
        changes['image_token'] = image_token
        if config.vision_from:  # or another model's
            shape, eyes = read_eyes(config.vision_from, config)
            changes |= shape
    elif config.vision_encoder not in ('', known['vision_encoder']):
        raise ValueError(f'{source} already has eyes, {known["vision_encoder"]!r}, and this run asks for '
                         f'{config.vision_encoder!r}: start from a text model, or leave vision_encoder as it is')
    kept = {key: known[key] for key, value in asked.items() if known[key] != value}
    model = GPT.from_weights(args, state, base, source, **changes)
    if eyes:
        take_eyes(model, eyes, config, shape)
    if int(os.environ.get('RANK', 0)) == 0:
        print(f'{source}:\n{model.changes}', file=sys.stderr)
        if kept:
            print('as in the checkpoint: ' + ', '.join(f'{key} {value!r}' for key, value in kept.items()), file=sys.stderr)
    return model


def take_eyes(model, eyes, config, shape):
    """Gives the model the eyes that read_eyes has read, and says what they are."""
    taken = model.vision.take(eyes, config.vision_from)
    if config.init_from != 'scratch':  # a trained GPT's embeddings have a size, which image tokens have to match
        model.match_rms()
    if int(os.environ.get('RANK', 0)) == 0:
        told = ', '.join(f'{key} {value!r}' for key, value in shape.items() if getattr(config, key, value) != value)
        print(f'{" and ".join(taken)} of {config.vision_from}' + (f', so {told}' if told else ''), file=sys.stderr)


def get_lr_scale(it, config):
    """The share of its full learning rate that every part has at step `it`: linear warmup, then a cosine."""
    top = config.learning_rate or max(config.vision_lr, config.qformer_lr, config.connector_lr)
    floor = config.min_lr / top
    if not config.decay_lr:
        return 1.0
    if it < config.warmup_iters:
        return (it + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    if it >= end:
        return floor
    ratio = (it - config.warmup_iters) / (end - config.warmup_iters)
    return floor + (1 - floor) * 0.5 * (1.0 + math.cos(math.pi * ratio))


# -----------------------------------------------------------------------------
# evaluation: the model must prove that it sees

class Evaluation:
    """
    The held-out examples, and what is asked about them. All ranks work at it, each on its share of the batches.

        val_loss       nats per target token
        blank_loss     the same with every image white: what the model knows without looking
        shuffled_loss  the same with another example's images: what it believes of pictures that tell it lies
        text_loss      plain held-out text: whether the language is kept. Before the first step it is the reference
        cer, exact     greedy answers against the truth
        none_loss, infix_loss, R, R_blank, R_shuffled    of task continue: the postfix's loss without any infix, with the
                       infix as text, and the pixel recovery R = (none - pixels) / (none - infix), the part of what the
                       infix would have told that came through its pixels
    """

    def __init__(self, config, tokenizer, model_config, place, features=None):
        self.config, self.tokenizer, self.model_config, self.place = config, tokenizer, model_config, place
        self.features = features
        weights = parse_tasks(config.tasks)
        pictured = ' '.join(f'{t}:{w}' for t, w in weights.items() if t != 'text') if model_config.vision_encoder else ''
        n = max(config.eval_iters * config.batch_size, config.eval_samples if model_config.vision_encoder else 0)
        first = held_out_examples(config.dataset, config, pictured or 'text')
        plain = first.drawn
        n = n if plain else min(n, len(first.rows))
        if not model_config.vision_encoder and plain and set(weights) != {'text'}:
            raise ValueError(f'tasks {config.tasks!r} makes pictures, but the model has no vision_encoder: '
                             'set --vision_encoder=vit, or --tasks=text')
        self.examples = [first[i] for i in range(n)]
        self.texts = []
        text_dataset = config.text_dataset or (config.dataset if plain else 'pydoc')
        if config.text_dataset or pictured and (plain or not tokenizer.name.endswith('.pkl')):
            texts = held_out_examples(text_dataset, config, 'text')
            self.texts = [texts[i] for i in range(config.eval_iters * config.batch_size)]
        self.losses_of = self.examples[:config.eval_iters * config.batch_size]
        self.questions = [e for e in self.examples if is_question(e)][:config.eval_samples]

    def loss(self, model, autocast, examples):
        """(nats per target, number of targets) of examples, over all ranks."""
        size, total = self.config.batch_size, torch.zeros(2, dtype=torch.float64)
        for i in range(self.place.rank * size, len(examples), self.place.world * size):
            batch = collate([tokenize(e, self.tokenizer, self.model_config, self.config.loss_on, features=self.features)
                             for e in examples[i:i + size]], self.model_config)
            with autocast:
                total[0] += model(*to_device(batch, self.place.device), 'sum', False)[1].item()
            total[1] += (batch['targets'] >= 0).sum()
        if self.place.ddp:
            total = total.to(self.place.device, torch.float32 if self.place.device_type == 'mps' else torch.float64)
            dist.all_reduce(total)
        return total[0].item() / max(1, total[1].item()), int(total[1])

    def answers(self, model, autocast):
        """Greedy answers to self.questions, on every rank."""
        def ask(some):
            # as long as the longest answer and a bit: a model that rambles on is wrong anyway
            longest = max(len(reference(e) if e.get('spell') else self.tokenizer.encode_ordinary(reference(e))) for e in some)
            with autocast:
                return answer(model, self.tokenizer, [question(e) for e in some], longest + 8, features=self.features)

        return spread(ask, self.questions, self.config.batch_size, self.place)

    @torch.no_grad()
    def run(self, model, autocast):
        """The dict of log.jsonl's "eval", and a contact sheet of answers or None."""
        model.eval()
        out = {'val_loss': self.loss(model, autocast, self.losses_of)[0]}
        if any(e.get('images') for e in self.losses_of):
            out['blank_loss'] = self.loss(model, autocast, blank(self.losses_of))[0]
            out['shuffled_loss'] = self.loss(model, autocast, shuffled(self.losses_of))[0]
        if self.texts:
            out['text_loss'] = self.loss(model, autocast, self.texts)[0]
        infixes = [e for e in self.losses_of if 'infix' in e]
        if infixes:
            out.update(self.pixel_recovery(model, autocast, infixes))
        sheet = None
        if self.questions:
            predictions = self.answers(model, autocast)
            out.update(score(predictions, [reference(e) for e in self.questions]), n=len(predictions))
            if self.place.rank == 0 and any(e.get('images') for e in self.questions[:32]):
                sheet = answer_sheet(self.questions[:32], predictions[:32])
        model.train()
        return out, sheet

    def pixel_recovery(self, model, autocast, examples):
        """R, its controls and the losses it is made of, all on the same postfix tokens."""
        as_text = [{**e, 'images': []} for e in examples]
        variants = {'pixels': examples, 'blank': blank(examples), 'shuffled': shuffled(examples),
                    'none': [{**e, 'filling': ''} for e in as_text], 'infix': [{**e, 'filling': e['infix']} for e in as_text]}
        losses, counts = {}, set()
        for name, variant in variants.items():
            losses[name], count = self.loss(model, autocast, variant)
            counts.add(count)
        if len(counts) > 1:
            raise ValueError(f'block_size ({self.model_config.block_size}) is too small to measure R: with its infix as '
                             'text a sequence is cut off; lower max_span or raise block_size')
        told = losses['none'] - losses['infix']
        recovery = {name: (losses['none'] - losses[key]) / told for name, key in
                    (('R', 'pixels'), ('R_blank', 'blank'), ('R_shuffled', 'shuffled'))}
        return {'pixels_loss': losses['pixels'], 'none_loss': losses['none'], 'infix_loss': losses['infix'], **recovery}


class RetrievalEvaluation:
    """
    The held-out pairs of an Aligner: val_loss and the losses that it is the sum of; recall at 1, 5 and 10 of pictures
    (i2t) and captions (t2i) with what guessing would give; the mean cosine of two pictures, which tells a collapse.
    """

    def __init__(self, config, tokenizer, model_config, place, features=None):
        self.config, self.tokenizer, self.model_config, self.place = config, tokenizer, model_config, place
        self.features = features
        held_out = held_out_examples(config.dataset, config, 'read')
        n = 4 * config.eval_samples if held_out.drawn else len(held_out.rows)
        self.examples, self.captions, self.owner = pairs_of((held_out[i] for i in range(n)), config.eval_samples)

    @torch.no_grad()
    def run(self, model, autocast):
        """The dict of log.jsonl's "eval", and the similarity grid or None."""
        model.eval()
        size, rows = self.config.batch_size, self.examples[:self.config.eval_iters * self.config.batch_size]

        def losses(some):
            batch = collate([tokenize(e, self.tokenizer, self.model_config, features=self.features) for e in some],
                            self.model_config)
            torch.manual_seed(self.config.seed)  # the wrong pairs of ITM, the same at every evaluation and on any rank
            with autocast:
                parts, _ = model(*to_device(batch, self.place.device))
            return [{'pairs': len(some), **{name: loss.item() for name, loss in parts.items()}}]

        found = spread(losses, rows, size, self.place)
        parts = {k: sum(f['pairs'] * f[k] for f in found) / len(rows) for k in found[0] if k != 'pairs'}
        embed = lambda work, things: torch.stack(spread(
            lambda some: list(work(model, self.tokenizer, some, autocast, self.features)), things, size, self.place))
        images, texts = embed(embed_images, self.examples), embed(embed_texts, self.captions)
        out = {'val_loss': sum(parts.values()), **parts, **recall(images, texts, self.owner), 'n': len(images)}
        sheet = retrieval_grid(self.examples, images, texts, self.owner, self.captions) if self.place.rank == 0 else None
        model.train()
        return out, sheet


def spread(work, things, size, place):
    """The results of work(things[i:i + size]), a list each, one behind another; every rank does its share of the calls."""
    found = {i: work(things[i:i + size]) for i in range(place.rank * size, len(things), place.world * size)}
    if place.ddp:
        shares = [None] * place.world
        dist.all_gather_object(shares, found)
        found = {i: results for share in shares for i, results in share.items()}
    return [result for i in sorted(found) for result in found[i]]


def blank(examples):
    """The examples with white images of the same sizes."""
    return [{**e, 'images': [Image.new('RGB', load_image(s).size, 'white') for s in e.get('images') or []]} for e in examples]


def shuffled(examples):
    """The examples with the images of others: image j becomes image j + M/2 of all M."""
    images = [s for e in examples for s in e.get('images') or []]
    images = iter(images[len(images) // 2:] + images[:len(images) // 2])
    return [{**e, 'images': [next(images) for _ in e.get('images') or []]} for e in examples]


def to_device(batch, device):
    """A collated batch as the model's arguments (idx, targets, images)."""
    move = lambda t: t.to(device, non_blocking=True)
    return move(batch['idx']), move(batch['targets']), batch['images'] and tuple(map(move, batch['images']))


# -----------------------------------------------------------------------------
# what a run leaves

def save_checkpoint(path, checkpoint, keep=0):
    """
    Writes to a temporary name and renames: whatever happens meanwhile, the last good file stays. With `keep`, the file
    also stays as ckpt_ITER.pt, and only the newest `keep` of those. Raises OSError if it cannot be written.
    """
    temporary = path + '.tmp'
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        free = shutil.disk_usage(os.path.dirname(path) or '.').free / 2**20
        raise OSError(f'could not write {path} ({error}; {free:.0f} MiB are free there): the last good checkpoint is '
                      'untouched; make room and go on with --init_from=resume') from error
    if keep:
        folder = os.path.dirname(path)
        shutil.copy(path, os.path.join(folder, f'ckpt_{checkpoint["iter_num"]:08d}.pt'))
        numbered = sorted(n for n in os.listdir(folder) if n.startswith('ckpt_') and n[5:-3].isdigit())
        for name in numbered[:-keep]:
            os.remove(os.path.join(folder, name))


class Log:
    """log.jsonl, from the master process only. Resuming takes back what the lost steps after the checkpoint had written."""

    def __init__(self, config, place, iter_num):
        self.path, self.wandb = os.path.join(config.out_dir, 'log.jsonl'), None
        self.master = place.rank == 0
        if not self.master:
            return
        os.makedirs(config.out_dir, exist_ok=True)
        kept = []
        if iter_num and os.path.exists(self.path):
            with open(self.path, encoding='utf-8') as f:
                for line in f:
                    if line.endswith('\n') and (row := json.loads(line))['iter'] + ('eval' in row) <= iter_num:
                        kept.append(line)
        with open(self.path + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(kept)
        os.replace(self.path + '.tmp', self.path)
        if config.wandb_log:
            try:
                import wandb
            except ImportError:
                raise ValueError('wandb_log needs wandb: pip install "glimpse[wandb]"') from None
            self.wandb = wandb.init(project=config.wandb_project, name=config.wandb_run_name or None, config=vars(config))

    def write(self, row):
        if self.master:
            with open(self.path, 'a', encoding='utf-8') as f:
                f.write(json.dumps(row) + '\n')
            if self.wandb:
                self.wandb.log({**row.get('eval', row), 'iter': row['iter']}, step=row['iter'])


# -----------------------------------------------------------------------------
# the loop

def quiet_worker(_):
    """
    A loader's process leaves Ctrl-C and SIGTERM, which a scheduler sends to all processes at once, to the training process:
    that one saves first, and takes the loaders along when it leaves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_loaders():
    """At the end of the training process, however it comes about."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would complain
    for process in multiprocessing.active_children():
        process.kill()


def open_loader(rows, config, tokenizer, model_config, place, iter_num, features=None):
    """This rank's micro-batches from step iter_num on: of each step's, every world-th."""
    accumulation = config.gradient_accumulation_steps
    examples = Examples(rows, config, config.seed, growing=config.grow_iters * accumulation * config.batch_size)
    batches = Batches(examples, tokenizer, model_config, config.batch_size, config.loss_on, features)
    atexit.register(end_loaders)
    order = (step * accumulation + micro for step in range(iter_num, config.max_iters)
             for micro in range(place.rank, accumulation, place.world))
    return iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=order, num_workers=config.num_workers,
                                            worker_init_fn=quiet_worker, pin_memory=place.device_type == 'cuda',
                                            prefetch_factor=4 if config.num_workers else None))


def train_step(model, optimizers, scaler, batches, autocast, config, place, stop):
    """
    One optimizer step over this rank's micro-batches. The gradient is that of the mean loss over all target tokens of
    the step, whichever rank and micro-batch they are in: a mean of means would weigh short answers more.
    Returns (loss in nats per target, number of tokens, whether any rank wants to stop).
    """
    targets = sum(int((b['targets'] >= 0).sum()) for b in batches)
    totals = torch.tensor([targets, sum(int(b['lengths'].sum()) for b in batches), stop])
    if place.ddp:
        totals = totals.to(place.device)
        dist.all_reduce(totals)
    targets, tokens, stop = totals.tolist()
    if not targets:
        raise ValueError('a step without anything to learn: no example of it has a target left, because the answers '
                         f'are empty or cut off by block_size ({config.block_size})')
    summed = torch.zeros((), device=place.device)
    for i, batch in enumerate(batches):
        if place.ddp:  # gradients travel once a step, with the last micro-batch
            model.require_backward_grad_sync = i == len(batches) - 1
        with autocast:
            _, loss = model(*to_device(batch, place.device), 'sum', False)
        summed += loss.detach()
        scaler.scale(loss * (place.world / targets)).backward()  # DDP averages over ranks: times world is the sum
    if place.ddp:
        dist.all_reduce(summed)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    if config.grad_clip:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.grad_clip)
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return summed / targets, tokens, bool(stop)


class Run:
    """All that a run holds, and what is done with it: evaluate, save, step, again and again."""

    def __init__(self, config):
        self.config = config
        self.place = place = start_processes(config)
        torch.manual_seed(config.seed)
        rows = open_rows(config.dataset, 'train')  # first of all: a missing dataset shows at once
        config.tokenizer = find_tokenizer(config)
        tokenizer = get_tokenizer(config.tokenizer, config.system_prompt)
        self.chat = 'messages' in rows[0] or not rows[0].get('images') and 'read' in parse_tasks(config.tasks)
        self.raw_model, checkpoint = build_model(config, tokenizer)
        self.raw_model.to(place.device)
        self.optimizers = self.raw_model.configure_optimizers(
            config.weight_decay, config.learning_rate, (config.beta1, config.beta2), place.device_type, config.vision_lr,
            config.connector_lr, config.optimizer, config.muon_lr, config.qformer_lr)
        for p in self.raw_model.parts()['gpt'].values():
            if not p.requires_grad:  # what only computes is kept in the dtype it computes in
                p.data = p.data.to(getattr(torch, place.dtype))
        self.scaler = torch.amp.GradScaler(place.device_type, enabled=place.dtype == 'float16')
        self.autocast = torch.autocast(place.device_type, getattr(torch, place.dtype), enabled=place.dtype != 'float32')
        self.iter_num, self.best_val_loss = 0, math.inf
        if checkpoint:
            self.resume(checkpoint)
        self.first_iter = self.iter_num
        stored = config.stored_features and not config.augment
        features = StoredFeatures.find(config.dataset, self.raw_model.config) if stored else None
        if features and place.rank == 0:
            print(f'the encoder rests: its features come from {features.folder}', file=sys.stderr)
        kind = Evaluation if self.raw_model.config.objective == 'lm' else RetrievalEvaluation
        self.evaluation = kind(config, tokenizer, self.raw_model.config, place, features)
        self.loader = open_loader(rows, config, tokenizer, self.raw_model.config, place, self.iter_num, features)
        self.log = Log(config, place, self.iter_num)
        # of an Aligner the wrong pairs of ITM are drawn in the middle of it, which no graph can hold
        speaks = self.raw_model.config.objective == 'lm'
        self.model = torch.compile(self.raw_model) if config.compile and speaks else self.raw_model
        if place.ddp:
            devices = [place.device] if place.device_type == 'cuda' else None
            self.model = DDP(self.model, device_ids=devices)
        self.signals = []  # Ctrl-C and SIGTERM wait here until the step is done
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.signals.append(number))
        self.started = time.time()
        self.seconds, self.tokens = 0.0, 0  # since the last line of the log

    def resume(self, checkpoint):
        """Optimizers and counters as they were; everything else is a function of (seed, iter_num)."""
        self.iter_num, self.best_val_loss = checkpoint['iter_num'], checkpoint['best_val_loss']
        self.scaler.load_state_dict(checkpoint['scaler'])
        for optimizer, state in zip(self.optimizers, checkpoint['optimizer']):
            rates = [group['initial_lr'] for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, lr in zip(optimizer.param_groups, rates):
                group['initial_lr'] = lr  # a rate given on the command line counts, as everywhere

    def save(self, name):
        if self.place.rank == 0:
            save_checkpoint(os.path.join(self.config.out_dir, name), {
                'model': self.raw_model.checkpoint_state(), 'optimizer': [o.state_dict() for o in self.optimizers],
                'model_args': vars(self.raw_model.config), 'iter_num': self.iter_num, 'best_val_loss': self.best_val_loss,
                'config': vars(self.config), 'scaler': self.scaler.state_dict(), 'base': self.raw_model.base,
                'chat': self.chat},
                keep=self.config.keep_checkpoints if name == 'ckpt.pt' else 0)

    def evaluate(self):
        """Saves, evaluates, logs; in this order, so that what an evaluation can break does not cost the steps behind it."""
        trained = self.iter_num > self.first_iter
        if trained and (self.config.always_save_checkpoint or self.iter_num >= self.config.max_iters):
            self.save('ckpt.pt')
        result, sheet = self.evaluation.run(self.raw_model, self.autocast)
        self.log.write({'iter': self.iter_num, 'eval': result, 'elapsed_s': round(time.time() - self.started, 1)})
        if sheet:
            sheet.save(os.path.join(self.config.out_dir, 'samples.png'))
        if self.place.rank == 0:
            tqdm.write(f'step {self.iter_num}: ' + ', '.join(f'{k} {v:.4g}' for k, v in result.items()), file=sys.stderr)
        if result['val_loss'] < self.best_val_loss and self.iter_num > 0 and not self.config.eval_only:
            self.best_val_loss = result['val_loss']
            self.save('ckpt_best.pt')

    def step(self):
        """One step at the schedule's learning rates. Returns (what the log says of it, whether to stop)."""
        config, place, start = self.config, self.place, time.time()
        scale = get_lr_scale(self.iter_num, config)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group['lr'] = group['initial_lr'] * scale
        torch.manual_seed(config.seed + 1_000_003 * self.iter_num + place.rank)  # dropout, the same after a resume
        batches = [next(self.loader) for _ in range(config.gradient_accumulation_steps // place.world)]
        for batch in batches:
            if 'error' in batch:
                raise ValueError(batch['error'])
        loss, tokens, stop = train_step(self.model, self.optimizers, self.scaler, batches, self.autocast, config, place,
                                        len(self.signals))
        self.iter_num += 1
        self.seconds, self.tokens = self.seconds + time.time() - start, self.tokens + tokens
        if self.iter_num % config.log_interval and self.iter_num < config.max_iters:
            return None, stop
        row = {'iter': self.iter_num, 'loss': loss.item(), 'lr': config.learning_rate * scale,
               'tokens_per_s': round(self.tokens / self.seconds), 'elapsed_s': round(time.time() - self.started, 1)}
        if not math.isfinite(row['loss']):
            raise ValueError(f'the loss is {row["loss"]} after {self.iter_num} steps: lower the learning rates or check the '
                             'data; the last checkpoint is untouched')
        if place.device_type == 'cuda' and self.raw_model.config.objective == 'lm':
            sequences = self.tokens / place.world / self.raw_model.config.block_size
            row['mfu'] = self.raw_model.estimate_mfu(sequences, self.seconds)
        self.seconds, self.tokens = 0.0, 0
        return row, stop

    def loop(self):
        config, stop = self.config, False
        with tqdm(total=config.max_iters, initial=self.iter_num, unit='step', disable=self.place.rank > 0) as bar:
            while True:
                finished = self.iter_num >= config.max_iters
                if stop:  # a signal reached some rank: all of them are here, after the same step
                    self.save('ckpt.pt')
                    break
                if self.iter_num % config.eval_interval == 0 or finished or config.eval_only:
                    self.evaluate()
                if finished or config.eval_only:
                    break
                row, stop = self.step()
                bar.update()
                if row:
                    self.log.write(row)
                    bar.set_postfix(loss=f'{row["loss"]:.3f}', tokens_per_s=row['tokens_per_s'])
        if self.place.ddp:
            dist.barrier()     # leave together: who ends while another still saves takes the connection along,
            self.model = None  # and DDP holds on to the process group's threads
            dist.destroy_process_group()
        if stop:
            if self.place.rank == 0:
                print(f'saved after step {self.iter_num}; go on with --init_from=resume', file=sys.stderr)
            sys.exit(128 + (self.signals or [signal.SIGTERM])[0])


def main():
    training = Run(SimpleNamespace(**configure(globals())))
    if training.place.rank == 0:
        count = lambda named, only=False: sum(p.numel() for p in named.values() if p.requires_grad or not only) / 1e6
        parts = ', '.join(f'{part} {count(named):.2f}M ({count(named, True):.2f}M of them trained)'
                          for part, named in training.raw_model.parts().items() if named)
        print(f'parameters: {parts}; on {training.place.world} x {training.place.device_type}, {training.place.dtype}',
              file=sys.stderr)
    training.loop()


if __name__ == '__main__':
    run(main)
