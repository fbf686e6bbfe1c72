"""
The one training loop: a GPT, with or without vision, on text, on images of text, or on conversations about
images; or BLIP-2's first stage, which has the same contract.

    $ python train.py config/quickstart.py                                       # one process, any machine
    $ torchrun --nproc_per_node=8 train.py config/render_pretrain.py             # 8 GPUs
    $ python train.py config/quickstart.py --init_from=resume                    # continue where it stopped, exactly
    $ python train.py config/vlm_cpu.py --init_from=out/text_bytes/ckpt.pt       # add vision to a text model
    $ python train.py --help                                                     # every knob

Writes to out_dir: ckpt.pt (newest), ckpt_best.pt (lowest val_loss), log.jsonl and samples.png.
"""

import atexit
import contextlib
import functools
import gc
import glob
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configurator import configure, knobs_of, run
from dataloader import (FeatureCache, Mixture, TokenizedExamples, collate, dataset_folder, get_tokenizer,
                        is_plain_text, open_rows, pack, parse_mixture)
from evaluate import all_gather, best_dtype, describe, find_device, note, open_evaluation, to_device, warn_of_collapse
from model import GPTConfig
from patches import is_deepencoder, is_native
from render import parse_tasks
from vision import VisionConfig, complete_config
from weights import (QFORMER_EMBEDDINGS, build_model, checkpoint_state, load_vision_from, new_model, published_fingerprint,
                     read_weights, vision_of)

# -----------------------------------------------------------------------------
# run
out_dir = 'out'
init_from = 'scratch'          # scratch, resume (from out_dir), a checkpoint's path, or a published model: gpt2 to
#                                gpt2-xl, OWNER/NAME on the hub or a folder with a GPT-2, Llama (SmolLM2), Qwen2, Qwen3,
#                                SmolLM3, SmolVLM, LLaVA or nanoVLM
vision_from = ''               # a checkpoint whose small ViT, deepencoder or Q-Former becomes this model's, or for its Q-Former
#                                a BLIP-2 or a BERT on the hub or in a folder: Salesforce/blip2-itm-vit-g,
#                                google-bert/bert-base-uncased
eval_interval = 500            # steps between two evaluations, each with a checkpoint
log_interval = 10              # steps between two lines of log.jsonl
eval_iters = 8                 # micro-batches for each loss of an evaluation
eval_samples = 64              # held-out examples answered greedily at each evaluation, for the scores
eval_only = False              # evaluate once and exit
always_save_checkpoint = True  # False: no ckpt.pt at evaluations, only ckpt_best.pt when val_loss improves
keep_checkpoints = 0           # how many older checkpoints to keep next to ckpt.pt, as ckpt_ITER.pt
seed = 1337                    # everything random comes from it
# wandb
wandb_log = False
wandb_project = 'glimpse'
wandb_run_name = ''
# data
dataset = 'pydoc'              # pydoc, a file or folder of text, data/NAME (prepare_data.py list); several of them as
#                                'chartqa:1 gsm8k:0.3:all pydoc@0.2': passes of each in an epoch, or @ its share
overfit_rows = 0               # > 0: train and evaluate on the first so many rows only, to see whether they are learned
text_dataset = ''              # plain text for text_loss; '' takes the dataset's own, pydoc for conversations
tokenizer = ''                 # bytes, gpt2, the path of a nanoGPT meta.pkl, words.txt or tokenizer.json, OWNER/NAME
#                                on the hub; '' takes that of init_from, and bytes from scratch
system_prompt = 'auto'         # system message of conversations without one; auto: as the chat template does
chat_template = ''             # in Jinja, for conversations; '' takes that of init_from, else the tokenizer's
tasks = 'ocr:1'                # what plain text becomes: ocr, continuation, text; with weights 'ocr:0.8 text:0.2'
loss_on = 'assistant'          # of conversations: the assistant's messages are in the loss; or all text
gradient_accumulation_steps = 1  # micro-batches of a step, over all processes together
batch_size = 12                # examples, or packed rows, in a micro-batch
block_size = 1024              # positions of a sequence; an image takes one, see image_positions
packing = False                # several documents in a row of block_size tokens, each attends to itself only
max_images = 8                 # packing: images in a row, at most
num_workers = min(4, os.cpu_count()) if torch.cuda.is_available() else 1  # processes that draw and tokenize; 0: none
# images of text
image_width = 256              # pixels of the box that the text is drawn into
image_height = 16
max_aspect = 1.0               # the box keeps its area and becomes up to so many times as wide or as high, at random
one_line = True                # white space becomes one space, the image is as wide as its line; False: a page
min_chars = 16                 # task ocr: characters in an image
max_chars = 32
char_level = False             # task ocr: a token for each character, not the tokenizer's longer ones
length_warmup_iters = 0        # task ocr: steps over which lines grow from a few characters to full length
min_span = 200                 # tasks continuation and text: characters of the text
max_span = 4000
infix_min = 0.1                # task continuation: share of the text that becomes an image
infix_max = 0.4
blank_images = 0.0             # task continuation: share of the images that are blank, so that the model knows what to do
#                                without the text: what pixel recovery compares with
font = ''                      # a .ttf/.otf file or a folder of them; '' is Pillow's built-in font
font_min = 6                   # font sizes, pixels
font_max = 200
distort = 0.0                  # strength of random colors, position, rotation, blur and noise, 0 to 1
# image files
augment = ''                   # crop, color or crop+color: another part of an image, other colors, each time
feature_cache = True           # of a frozen encoder: use what prepare_data.py features has stored; one dataset, no augment
# model; python train.py --help lists the others
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0                  # for pretraining 0 is good, for finetuning try 0.1+
bias = False                   # do we use bias inside LayerNorm and Linear layers?
# optimizer
optimizer = 'adamw'            # adamw, or muon for the hidden matrices and adamw for the rest
learning_rate = 6e-4           # max learning rate of the GPT; 0 freezes it
vision_lr = 6e-4               # of the encoder
sam_lr = -1.0                  # of deepencoder's SAM; -1: vision_lr
compressor_lr = -1.0           # of its compressor; -1: vision_lr
qformer_lr = 6e-4              # of the Q-Former
qformer_new_lr = -1.0          # of its queries and cross-attention, which BERT does not have; -1: qformer_lr
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
min_lr = 6e-5                  # learning rate at its end; the other parts end at the same share of theirs
# system
backend = ''                   # nccl or gloo; '' takes nccl on CUDA, else gloo
device = ''                    # cuda, cuda:1, mps or cpu; '' takes the best there is
dtype = ''                     # bfloat16, float16 (with a GradScaler) or float32; '' takes the best of the device
compile = torch.cuda.is_available()  # use torch.compile to make the model faster
parallel = 'ddp'               # of several processes: ddp, each has the whole model; fsdp, each has a part of it
fsdp_size = 0                  # fsdp: processes that share a model, such as those of a machine; 0: all
checkpoint_activations = False  # compute the activations of a block again in its backward pass, instead of keeping them
# -----------------------------------------------------------------------------

def setup_distributed(config):
    """Joins torchrun's other processes: a namespace of rank, world_size, ddp, device, device_type and dtype."""
    ddp = 'RANK' in os.environ
    rank = int(os.environ.get('RANK', 0))
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    device = config.device or find_device()
    device_type = device.split(':')[0]
    if ddp and device_type == 'cuda':
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
    dtype = config.dtype or best_dtype(device_type)
    if device_type not in ('cuda', 'mps', 'cpu'):
        raise ValueError(f'device must be cuda, mps or cpu, got {device!r}')
    if dtype not in ('bfloat16', 'float16', 'float32'):
        raise ValueError(f'dtype must be bfloat16, float16 or float32, got {dtype!r}')
    if config.gradient_accumulation_steps % world_size:
        raise ValueError(f'gradient_accumulation_steps ({config.gradient_accumulation_steps}) counts the '
                         f'micro-batches of all processes and must be a multiple of their number ({world_size})')
    if config.parallel not in ('ddp', 'fsdp'):
        raise ValueError(f'parallel must be ddp or fsdp, got {config.parallel!r}')
    if config.parallel == 'fsdp' and (not ddp or dtype == 'float16' or world_size % (config.fsdp_size or world_size)):
        raise ValueError(f'parallel=fsdp needs torchrun, bfloat16 or float32, and a number of processes ({world_size}) that '
                         f'fsdp_size ({config.fsdp_size}) divides')
    if ddp:
        dist.init_process_group(backend=config.backend or ('nccl' if device_type == 'cuda' else 'gloo'))
    torch.set_float32_matmul_precision('high')  # tf32 on CUDA
    return SimpleNamespace(rank=rank, world_size=world_size, ddp=ddp, device=device, device_type=device_type,
                           dtype=dtype)

# -----------------------------------------------------------------------------
# the model

def init_model(config):
    """(model, tokenizer, checkpoint to resume from or None), as init_from says."""
    if config.init_from == 'scratch':
        config.tokenizer = config.tokenizer or 'bytes'
        enc = get_tokenizer(config.tokenizer, config.system_prompt, config.image_marks, config.calculator,
                            config.chat_template)
        return init_from_scratch(config, enc), enc, None
    resumes = config.init_from == 'resume'
    source = os.path.join(config.out_dir, 'ckpt.pt') if resumes else config.init_from
    checkpoint = read_weights(source)
    config.tokenizer = config.tokenizer or checkpoint['config'].get('tokenizer', '')
    if not config.tokenizer:
        raise ValueError(f'{source} does not say which tokenizer it was trained with: name it, as '
                         '--tokenizer=gpt2, or --tokenizer=data/NAME/meta.pkl of a nanoGPT character dataset')
    config.chat_template = config.chat_template or checkpoint['config'].get('chat_template', '')
    known = checkpoint['model_args']
    adds_vision = not resumes and not known.get('vision_encoder') and (config.vision_encoder or config.vision_from)
    marks = config.image_marks if adds_vision else known.get('image_marks', False)
    has_calculator = known.get('calculator', False) or config.calculator and not resumes
    enc = get_tokenizer(config.tokenizer, config.system_prompt, marks, has_calculator, config.chat_template)
    if resumes:
        return resume_model(config, checkpoint, source), enc, checkpoint
    return init_from_checkpoint(config, enc, checkpoint), enc, None

def init_from_scratch(config, enc):
    """A model with random weights; its vision is that of vision_from, if that is set."""
    if config.lora_rank:
        raise ValueError('lora_rank adapts a trained model: name one with --init_from')
    args = {name: getattr(config, name) for name in knobs_of(GPTConfig)}
    vision_args, vision_state = read_vision_from(config, enc)
    args.update(vision_args, vocab_size=pad_vocab(enc.n_vocab), image_token=enc.image_id)
    model = new_model(complete_config(GPTConfig(**args)), load=not brings_encoder(vision_state))
    if vision_state:
        note(load_vision_from(model, vision_state, config.vision_from))
    return model

def init_from_checkpoint(config, enc, checkpoint):
    """The model of init_from, to which this run adds positions, tokens, LoRA, and vision if it has none."""
    source = config.init_from
    known = vars(GPTConfig(**checkpoint['model_args']))
    if config.objective != known['objective']:
        raise ValueError(f'a run with objective {config.objective} cannot start from {source}, which was trained '
                         f'with {known["objective"]}: --vision_from={source} takes over its encoder and Q-Former')
    other_image_token = known['vision_encoder'] and known['image_token'] != enc.image_id
    if not fits_tokenizer(known['vocab_size'], enc) or other_image_token:
        raise ValueError(f'{source} was not trained with the tokenizer {enc.name}: it has {known["vocab_size"]} '
                         f'tokens, the tokenizer {enc.n_text} and its special ones; name the one it was trained '
                         'with by --tokenizer')
    args = {name: getattr(config, name) for name in ('dropout', 'block_size', 'lora_rank', 'lora_dropout')}
    args['calculator'] = enc.calculator
    if known['max_image_side'] and config.max_image_side:  # more or fewer tiles
        args['max_image_side'] = config.max_image_side
    if known['vision_encoder'] and config.image_positions:  # no weight depends on it
        args['image_positions'] = config.image_positions
    if not known['lora_rank']:  # updates that are there already act as they were trained to
        args.update(lora_alpha=config.lora_alpha, lora_scope=config.lora_scope)
    if enc.n_vocab > known['vocab_size']:
        args['vocab_size'] = pad_vocab(enc.n_vocab)
    vision_state = {}
    if known['vision_encoder']:
        if config.vision_encoder not in ('', known['vision_encoder']):
            raise ValueError(f'{source} already has a vision encoder, {known["vision_encoder"]!r}, and this run '
                             f'asks for {config.vision_encoder!r}: start from a text model, or leave it as it is')
    elif config.vision_encoder or config.vision_from:
        vision_args, vision_state = read_vision_from(config, enc)
        new = {name: getattr(config, name) for name in knobs_of(VisionConfig) if name not in ('block_size', 'n_embd')}
        args.update({**new, **vision_args, 'image_token': enc.image_id})
    model = build_model(checkpoint, source, load=not brings_encoder(vision_state), **args)
    note(f'{source}:\n{model.load_report}')
    if vision_state:
        note(load_vision_from(model, vision_state, config.vision_from))
        model.match_rms()
    kept = [f'{name} {known[name]!r}' for name in knobs_of(GPTConfig)
            if name not in args and known[name] != getattr(config, name)]
    if kept:
        note('as in the checkpoint: ' + ', '.join(kept))
    return model

def resume_model(config, checkpoint, source):
    """The model of this run's own checkpoint. Raises ValueError if the run cannot continue exactly."""
    model = build_model(checkpoint, source, dropout=config.dropout)
    if config.block_size != model.config.block_size:
        raise ValueError(f'{source} was trained with block_size {model.config.block_size}, and a resumed run keeps '
                         f'it: to change it, start from its weights with --init_from={source}')
    if 'scaler' not in checkpoint:  # nanoGPT's checkpoints have none
        raise ValueError(f'{source} cannot be resumed: it was not written by this train.py; start from its weights '
                         f'with --init_from={source}')
    for key, old in checkpoint['config'].items():
        new = getattr(config, key, old)
        if new == old or key == 'init_from':
            continue
        if key in knobs_of(GPTConfig) and key != 'dropout':
            note(f'note: {key} stays {old!r}, because a resumed run keeps its model')
        else:
            note(f'note: {key} was {old!r}, and is {new!r} from now on')
    return model

def read_vision_from(config, enc):
    """({field of GPTConfig: value}, {name: tensor}) of vision_from; empty without it. The Q-Former's text embeddings are
    left out if they are of another tokenizer: what it has trained besides is of use without them.
    """
    source = config.vision_from
    if not source:
        return {}, {}
    checkpoint = read_weights(source)
    vision_args, state = vision_of(checkpoint, source, config.connector)
    changed = [f'{name} {value!r}' for name, value in vision_args.items() if getattr(config, name, value) != value]
    note(f'{source}: ' + (', '.join(changed) or 'the configuration of this run'))
    vocab_size = checkpoint['model_args'].get('vocab_size', 0)
    if config.objective != 'lm' and QFORMER_EMBEDDINGS[0] in state and not fits_tokenizer(vocab_size, enc):
        note(f'note: the text embeddings of {source} are those of {vocab_size} tokens, the tokenizer {enc.name} has '
             f'{enc.n_text} and its special ones: new ones are trained; to take them over, name theirs by --tokenizer')
        state = {name: p for name, p in state.items() if name not in QFORMER_EMBEDDINGS}
    return vision_args, state

def fits_tokenizer(vocab_size, enc):
    """Whether a model with so many tokens can have been trained with this tokenizer: it has a row for each id of the
    tokenizer's text, for some special tokens, and a few more.
    """
    return 0 <= vocab_size - enc.n_text <= max(64, enc.n_text // 256)

def brings_encoder(vision_state):
    return any(name.startswith('vision.encoder.') for name in vision_state)

def pad_vocab(n):
    """A multiple of 64, for efficiency; the spare ids are never generated."""
    return -(-n // 64) * 64

# -----------------------------------------------------------------------------
# models that are too large for one GPU

def transformer_blocks(model):
    """The blocks of the GPT, the encoder and the Q-Former, a list each. In timm and open_clip it is blocks or resblocks."""
    return [list(module) for name, module in model.named_modules() if name.endswith(('.h', '.blocks', '.resblocks'))]

def recompute_activations(model):
    """Activation checkpointing, https://arxiv.org/abs/1604.06174: of each block only its input is kept for the backward
    pass, which computes the rest again. A third more time, for much less memory.
    """
    for block in itertools.chain(*transformer_blocks(model)):
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)

def shard(model, config, dist_env):
    """FSDP, https://arxiv.org/abs/2304.11277: each process keeps 1 / fsdp_size of all weights, gradients and optimizer
    states, and gets the whole weights of a block when the block runs. With several groups of fsdp_size processes (HSDP),
    each of them has a whole model. The weights that a block gets are in the run's dtype, and so is the residual stream,
    which is float32 with DDP; gradients are summed in float32.
    """
    size = config.fsdp_size or dist_env.world_size
    mesh = init_device_mesh(dist_env.device_type, (dist_env.world_size // size, size), mesh_dim_names=('replicate', 'shard'))
    dtype = getattr(torch, dist_env.dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for blocks in transformer_blocks(model):
        for block, before in zip(blocks, blocks[:1] + blocks):
            fully_shard(block.float(), mesh=mesh, mp_policy=policy)  # one after another: of each, only a part stays
            # the backward pass gets the weights of the block before in advance. By itself FSDP would follow the order of
            # all blocks that have run since the last one, in an evaluation too
            block.set_modules_to_backward_prefetch([before])
    fully_shard(model.float(), mesh=mesh, mp_policy=policy)  # embeddings, connector and head
    model.set_modules_to_backward_prefetch([model])  # itself: nothing in advance

@contextlib.contextmanager
def whole_weights(model):
    """While it lasts every process has the whole weights of a sharded model, and may run it as often as it likes. Without
    it all processes have to run the same blocks at the same time, because they wait for each other's parts.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()

def gather(value, keep):
    """A value of tensors in dicts and lists, in which sharded tensors are whole and on the CPU, or None in processes that
    do not keep them. All processes have to call it at the same time.
    """
    if isinstance(value, DTensor):
        tensor = value.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gather(entry, keep) for key, entry in value.items()}
    return [gather(entry, keep) for entry in value] if isinstance(value, list) else value

def shard_like(tensor, p):
    """A whole tensor, sharded as the parameter p is, if it is."""
    if not isinstance(p, DTensor):
        return tensor
    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)

def load_optimizer(opt, state):
    """Loads the state of an optimizer; rates, betas and weight decay of the command line count, as everywhere."""
    settings = [dict(group) for group in opt.param_groups]
    params = [p for group in opt.param_groups for p in group['params']]
    for i, values in state['state'].items():
        for name, value in values.items():
            if value.dim():  # a step's number has none
                values[name] = shard_like(value, params[i])
    opt.load_state_dict(state)
    for group, own in zip(opt.param_groups, settings):
        group.update(own)

# -----------------------------------------------------------------------------
# optimizers: a learning rate for each part, Muon; MFU

def configure_optimizers(model, config):
    """A list of optimizers over the parts of a model, each with its own learning rate: learning_rate of the
    GPT, vision_lr, sam_lr, compressor_lr, qformer_lr, qformer_new_lr and connector_lr. A rate of 0 freezes the
    part: no gradient, no optimizer state, eval mode. Matrices and embeddings decay, biases and norms don't. With
    lora_rank only the updates of the GPT are trained. What is trained becomes float32: a small update is lost in
    bfloat16's rounding.

    Under optimizer 'muon', Muon trains the hidden matrices of the Transformer blocks at muon_lr, times
    vision_lr / learning_rate in the encoder. A group's 'initial_lr' is its full rate, which the training loop
    scales by the schedule. Raises ValueError if nothing is left to train.
    """
    if config.optimizer not in ('adamw', 'muon'):
        raise ValueError(f'optimizer must be adamw or muon, got {config.optimizer!r}')
    rates = {'gpt': config.learning_rate, 'vision': config.vision_lr, 'qformer': config.qformer_lr,
             'connector': config.connector_lr}
    for part, lr, default in (('sam', config.sam_lr, config.vision_lr),
                              ('compressor', config.compressor_lr, config.vision_lr),
                              ('qformer_new', config.qformer_new_lr, config.qformer_lr)):
        rates[part] = default if lr == -1 else lr
    adamw_groups, muon_groups = [], []
    for part, named in model.param_groups().items():
        lr = rates[part]
        hidden, matrices, vectors = [], [], []
        for name, p in named.items():
            p.requires_grad_(lr > 0 and (part != 'gpt' or not model.config.lora_rank or '.lora_' in name))
            if not p.requires_grad:
                continue
            if p.dtype != torch.float32:
                p.data = p.data.float()
            is_in_block = any(blocks in name for blocks in ('.h.', '.blocks.', '.resblocks.'))
            if config.optimizer == 'muon' and is_in_block and p.dim() == 2 and name.endswith('weight'):
                hidden.append(p)
            elif p.dim() >= 2:
                matrices.append(p)
            else:
                vectors.append(p)
        hidden_lr = config.muon_lr * lr / (config.learning_rate or lr or 1)
        muon_groups.append(dict(params=hidden, lr=hidden_lr, weight_decay=config.weight_decay))
        adamw_groups.append(dict(params=matrices, lr=lr, weight_decay=config.weight_decay))
        adamw_groups.append(dict(params=vectors, lr=lr, weight_decay=0.0))
    adamw = functools.partial(torch.optim.AdamW, betas=(config.beta1, config.beta2), fused=True)
    optimizers = []
    for make_optimizer, groups in ((adamw, adamw_groups), (Muon, muon_groups)):
        groups = [{**group, 'initial_lr': group['lr']} for group in groups if group['params']]
        if groups:
            optimizers.append(make_optimizer(groups))
    if not optimizers:
        raise ValueError('the learning rates of all parts of this model are 0: nothing is left to train')
    model.train(model.training)
    return optimizers

class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon): SGD with Nesterov momentum whose update, a matrix, is
    replaced by roughly the nearest orthogonal matrix, so that all of its directions count alike; with
    decoupled weight decay. Steps as torch.optim.Muon does, but orthogonalizes all matrices of one shape in
    one call: there are many small ones. Of sharded matrices each process orthogonalizes the whole, and keeps its part.
    """

    def __init__(self, groups, momentum=0.95):
        super().__init__(groups, dict(momentum=momentum))

    @torch.no_grad()
    def step(self):
        by_shape = defaultdict(list)
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None:
                    by_shape[p.shape].append((p, group))
        for (rows, cols), pairs in by_shape.items():
            updates = []
            for p, group in pairs:
                if not self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                momentum = self.state[p]['momentum_buffer'].lerp_(p.grad, 1 - group['momentum'])
                update = p.grad.lerp(momentum, group['momentum'])  # Nesterov: one step ahead
                updates.append(update.full_tensor() if isinstance(update, DTensor) else update)
            for (p, group), update in zip(pairs, orthogonalize(torch.stack(updates))):
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.add_(shard_like(update, p), alpha=-group['lr'] * max(1, rows / cols) ** 0.5)

def orthogonalize(x, steps=5):
    """Matrices (N, rows, cols) with singular value decompositions U S V^T -> U S' V^T, S' between 0.7 and 1.2:
    Newton-Schulz iteration, x <- 3.4445 x - 4.775 g x + 2.0315 g g x with g = x x^T. The coefficients are those
    of https://kellerjordan.github.io/posts/muon. In bfloat16 on a GPU; in float32 on a CPU, where bfloat16 can
    be many times slower.
    """
    is_tall = x.shape[1] > x.shape[2]
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x.mT if is_tall else x
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor_of = lambda g: torch.baddbmm(g, g, g, beta=-4.7750, alpha=2.0315) + 3.4445 * identity
    if x.is_cuda:
        for _ in range(steps):
            x = factor_of(x @ x.mT) @ x
    else:  # the same by products of small matrices: less work, but bfloat16 is not precise enough for it
        g = x @ x.mT                                                            # (N, smaller, smaller)
        factor = factor_of(g)
        product = factor
        for _ in range(steps - 1):
            g = factor @ factor @ g  # that of factor x: factor and g commute
            factor = factor_of(g)
            product = factor @ product
        x = product @ x
    return x.mT if is_tall else x

# peak FLOPS in bfloat16, or float16 where there is no bfloat16, without sparsity, by a part of the GPU's name
PEAK_FLOPS = {'B200': 2250e12, 'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'A10': 125e12,
              'L4': 121e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100': 125e12, 'T4': 65e12}

def estimate_flops(model, batch):
    """The operations of a training step on a batch: 2 a weight and token forward, 2 for the gradient of the
    activations, unless nothing before or in the part is trained, and 2 for that of the weights, if those
    are trained; and the GPT's attention. See PaLM paper Appendix B, https://arxiv.org/abs/2204.02311.
    """
    idx, images = batch['idx'], batch['images']
    n_image_tokens = int((idx == model.config.image_token).sum())
    tokens = {part: n_image_tokens for part in ('qformer_new', 'qformer', 'connector')}
    tokens['gpt'] = int((idx >= 0).sum())
    n_patches = 0
    if images is not None and not images[0].is_floating_point():  # cached features skip the encoder
        n_patches = int((images[1][..., 0] >= 0).sum())
    # the first tenth of the compressor's weights acts at a quarter of the places, the rest at a 16th
    n_vision = n_patches // 16 if is_deepencoder(model.config) else n_patches
    tokens |= {'sam': n_patches, 'compressor': n_patches / 10, 'vision': n_vision}
    lookups = ['wpe.weight', 'row_embed.weight', 'col_embed.weight']  # tables that nothing is multiplied with
    if not model.config.tie_weights:
        lookups.append('wte.weight')
    total, has_gradient = 0, False
    for part, named in model.param_groups().items():
        has_gradient |= any(p.requires_grad for p in named.values())
        for name, p in named.items():
            if p.dim() >= 2 and not name.endswith(tuple(lookups)):
                total += 2 * p.numel() * tokens[part] * (1 + has_gradient + p.requires_grad)
    if hasattr(model, 'transformer'):
        attn = model.transformer.h[0].attn
        n_pairs = idx.shape[1] * tokens['gpt']  # of queries and keys
        if 'docs' in batch:
            rows = torch.arange(len(idx), device=idx.device)[:, None]
            documents = (batch['docs'] + rows * idx.shape[1])[idx >= 0]
            n_pairs = int(documents.unique(return_counts=True)[1].square().sum())
        total += 12 * model.config.n_layer * attn.n_head * attn.head_dim * n_pairs
    return total

def estimate_mfu(flops, seconds, gpu):
    """Model flops utilization: the share of a GPU's peak FLOPS, or None if its peak is not known here."""
    name = torch.cuda.get_device_name(gpu)
    for part, peak in PEAK_FLOPS.items():
        if part in name:
            return flops / seconds / peak
    return None

# -----------------------------------------------------------------------------
# a step

def get_lr_scale(it, config, top_lr):
    """The share of its full rate that each part has at step it: linear warmup, cosine to min_lr / top_lr."""
    if not config.decay_lr:
        return 1.0
    if it < config.warmup_iters:
        return (it + 1) / (config.warmup_iters + 1)
    floor = config.min_lr / top_lr
    end = config.lr_decay_iters or config.max_iters
    if it >= end:
        return floor
    ratio = (it - config.warmup_iters) / (end - config.warmup_iters)
    return floor + (1 - floor) * 0.5 * (1.0 + math.cos(math.pi * ratio))

def mark_sizes(batch, model_config):
    """Tells torch.compile which sizes differ from batch to batch: it makes one graph for all, and not two or three."""
    mark = torch._dynamo.maybe_mark_dynamic
    is_padded = 'docs' not in batch  # packed rows and their images have one length
    mark(batch['places'], 0)
    if is_padded:
        mark(batch['idx'], 1)
        mark(batch['targets'], 1)
    for tensor in batch['images'] or ():
        mark(tensor, (0, 1) if is_padded and is_native(model_config) else 0)

def train_step(model, optimizers, scaler, batches, autocast, config, dist_env, stop):
    """One optimizer step over this rank's micro-batches. The gradient is that of the mean loss over everything
    in the loss, on all ranks: a mean of means would weigh short answers more. Returns (loss in nats, number
    of tokens, whether any rank wants to stop).
    """
    raw_model = model.module if isinstance(model, DDP) else model
    weight = sum(raw_model.loss_weight(batch) for batch in batches)
    tokens = sum(int(batch['lengths'].sum()) for batch in batches)
    totals = torch.tensor([weight, tokens, stop])
    if dist_env.ddp:
        totals = totals.to(dist_env.device)
        dist.all_reduce(totals)
    weight, tokens, stop = totals.tolist()
    if not weight:
        raise ValueError('nothing in this step is in the loss: no example of it has a target left, because the '
                         f'answers are empty or cut off by block_size ({config.block_size})')
    summed = 0
    for i, batch in enumerate(batches):
        if isinstance(model, DDP):  # gradients are exchanged once a step, with the last micro-batch
            model.require_backward_grad_sync = i == len(batches) - 1
        batch = to_device(batch, dist_env.device)
        if config.compile:
            mark_sizes(batch, raw_model.config)
        with autocast:
            loss = sum(model(batch).values())
        summed += loss.detach()
        # DDP and FSDP average over ranks: times their number is the sum
        scaler.scale(loss * (dist_env.world_size / weight)).backward()
    if dist_env.ddp:
        dist.all_reduce(summed)
    for opt in optimizers:
        scaler.unscale_(opt)
    if config.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    for opt in optimizers:
        scaler.step(opt)
        opt.zero_grad(set_to_none=True)
    scaler.update()
    return summed / weight, tokens, bool(stop)

# -----------------------------------------------------------------------------
# batches: loader processes that draw and tokenize ahead

def ignore_signals(_):
    """Ctrl-C and SIGTERM reach all processes: the training process saves first, then stops the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def stop_workers():
    """At the end of the training process, for whatever reason it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would complain
    for process in multiprocessing.active_children():
        process.kill()

def open_loader(sources, rows, config, enc, model_config, dist_env, iter_num, packing, cache):
    """This rank's micro-batches from step iter_num on: of those of a step, every world_size-th. With config.packing they
    are packed rows of every world_size-th example, and `packing` says with which to go on.
    """
    accumulation = config.gradient_accumulation_steps
    size = config.batch_size
    examples = Mixture(sources, rows, config, config.seed, config.length_warmup_iters * accumulation * size)
    dataset = TokenizedExamples(examples, enc, model_config, config.loss_on, cache)
    atexit.register(stop_workers)
    make_loader = functools.partial(torch.utils.data.DataLoader, dataset, num_workers=config.num_workers,
                                    worker_init_fn=ignore_signals)
    if config.packing:
        new = itertools.count(packing['last'] + dist_env.world_size, dist_env.world_size)
        order, indices = itertools.tee(itertools.chain(packing['waiting'], new))
        # workers tokenize one document at a time, and this process packs them in their order
        documents = make_loader(batch_size=None, sampler=order, prefetch_factor=2 * size if config.num_workers else None)
        return pack(zip(indices, documents), model_config, size, config.max_images, packing['left_out'], config.compile)
    order = (range(i * size, (i + 1) * size) for step in range(iter_num, config.max_iters)
             for i in range(step * accumulation + dist_env.rank, (step + 1) * accumulation, dist_env.world_size))
    return iter(make_loader(batch_sampler=order, collate_fn=functools.partial(collate, config=model_config),
                            pin_memory=dist_env.device_type == 'cuda', prefetch_factor=4 if config.num_workers else None))

def packing_state(checkpoint, config, dist_env):
    """Where this rank's packing starts, or goes on: its state as `pack` describes it."""
    if checkpoint and len(checkpoint.get('packing', ())) == dist_env.world_size:
        return checkpoint['packing'][dist_env.rank]
    last, left_out = -1, 0
    if checkpoint and checkpoint.get('packing'):
        last = max(state['last'] for state in checkpoint['packing'])
        left_out = sum(len(state['waiting']) for state in checkpoint['packing'])
        note(f'note: {left_out} documents that waited for a row are left out, because the number of processes was '
             f'{len(checkpoint["packing"])} and is {dist_env.world_size} from now on')
    elif checkpoint:  # of a run without packing
        last = checkpoint['iter_num'] * config.gradient_accumulation_steps * config.batch_size - 1
    return {'waiting': [], 'last': last + 1 + dist_env.rank - dist_env.world_size, 'left_out': left_out}

def next_batches(loader, n):
    """The micro-batches of this rank's next step. Raises ValueError if one of them could not be made."""
    batches = list(itertools.islice(loader, n))
    for batch in batches:
        if 'error' in batch:
            raise ValueError(batch['error'])
    return batches

# -----------------------------------------------------------------------------
# what a run leaves

def save_checkpoint(path, checkpoint, keep=0):
    """Writes to a temporary name and renames: whatever happens meanwhile, the last good file stays. `keep`: how
    many copies to keep as ckpt_ITER.pt, the newest ones. Raises OSError if it cannot be written.
    """
    temporary = path + '.tmp'
    folder = os.path.dirname(path)
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        free = shutil.disk_usage(folder or '.').free / 2**20
        raise OSError(f'could not write {path} ({error}; {free:.0f} MiB are free there): the last good '
                      'checkpoint is untouched; make space and continue with --init_from=resume') from error
    if keep:
        shutil.copy(path, os.path.join(folder, f'ckpt_{checkpoint["iter_num"]:08d}.pt'))
        for older in sorted(glob.glob(os.path.join(folder, 'ckpt_[0-9]*.pt')))[:-keep]:
            os.remove(older)

class Log:
    """log.jsonl, from the first process only. A resumed run drops the rows that came after its checkpoint."""

    def __init__(self, config, iter_num):
        self.path = os.path.join(config.out_dir, 'log.jsonl')
        self.wandb = None
        os.makedirs(config.out_dir, exist_ok=True)
        kept = rows_until(self.path, iter_num) if iter_num and os.path.exists(self.path) else []
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
        with open(self.path, 'a', encoding='utf-8') as f:
            f.write(json.dumps(row) + '\n')
        if self.wandb:
            self.wandb.log({**row.get('eval', row), 'iter': row['iter']}, step=row['iter'])

def rows_until(path, iter_num):
    """The lines of the steps before iter_num. The evaluation at iter_num itself is repeated."""
    kept = []
    with open(path, encoding='utf-8', errors='replace') as f:
        for number, line in enumerate(f, 1):
            if not line.endswith('\n'):  # the run was killed while it wrote this one
                break
            try:
                row = json.loads(line)
                if row['iter'] + ('eval' in row) <= iter_num:
                    kept.append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number} is not a row of this log ({error}): fix or delete '
                                 'that line') from None
    return kept

def print_parameters(model, dist_env):
    """The size of each part, and how much of it is trained."""
    millions = lambda parameters: f'{sum(p.numel() for p in parameters) / 1e6:.2f}M'
    counts = [f'{part} {millions(named.values())} ({millions(p for p in named.values() if p.requires_grad)} trained)'
              for part, named in model.param_groups().items() if named]
    note(f'parameters: {", ".join(counts)}; on {dist_env.world_size} x {dist_env.device_type}, {dist_env.dtype}')

# -----------------------------------------------------------------------------
# the loop

def main():
    config = SimpleNamespace(**configure(globals(), GPTConfig))
    dist_env = setup_distributed(config)
    torch.manual_seed(config.seed)

    # data and model
    sources = parse_mixture(config.dataset)
    # first of all: a missing dataset shows at once
    rows = [open_rows(source.name, 'train', config.overfit_rows) for source in sources]
    is_chat = any('messages' in part[0] or is_plain_text(part[0]) and 'ocr' in parse_tasks(config.tasks) for part in rows)
    raw_model, enc, checkpoint = init_model(config)
    if config.checkpoint_activations:
        recompute_activations(raw_model)
    if config.parallel == 'fsdp':
        shard(raw_model, config, dist_env)
    raw_model.to(dist_env.device)
    if config.packing and config.objective != 'lm':
        raise ValueError(f'packing is for a GPT: objective {config.objective} compares images and captions one by one')
    if config.packing and config.dropout and dist_env.device_type == 'cuda':
        raise ValueError('packing uses FlexAttention on CUDA, which has no dropout: set --dropout=0')
    optimizers = configure_optimizers(raw_model, config)
    # min_lr refers to the GPT's rate; if that is frozen, to the largest one of what is trained
    top_lr = config.learning_rate or max(group['lr'] for group in optimizers[0].param_groups)
    if config.decay_lr and config.min_lr > top_lr:
        raise ValueError(f'min_lr ({config.min_lr:g}) is above the learning rate ({top_lr:g}), so '
                         'the rates would rise: lower --min_lr')
    dtype = getattr(torch, dist_env.dtype)
    for p in raw_model.param_groups()['gpt'].values():
        if not p.requires_grad and config.parallel == 'ddp':  # frozen weights are kept in the dtype of the computation
            p.data = p.data.to(dtype)
    cache = None
    # with FSDP an encoder runs on all processes or on none, and a batch without images runs it
    if config.feature_cache and not config.augment and config.parallel == 'ddp' and len(sources) == 1:
        cache = FeatureCache.find(dataset_folder(sources[0].name), raw_model.config, published_fingerprint(raw_model))
    if cache:
        note(f'using cached features from {cache.folder}')
    scaler = torch.amp.GradScaler(dist_env.device_type, enabled=dtype == torch.float16)
    autocast = torch.autocast(dist_env.device_type, dtype, enabled=dtype != torch.float32)

    # resume: the optimizers' state and the counters; everything else is a function of (seed, iter_num)
    iter_num, best_val_loss = 0, math.inf
    if checkpoint:
        iter_num, best_val_loss = checkpoint['iter_num'], checkpoint['best_val_loss']
        scaler.load_state_dict(checkpoint['scaler'])
        for opt, state in zip(optimizers, checkpoint['optimizer']):
            load_optimizer(opt, state)
    first_iter = iter_num
    packing = packing_state(checkpoint, config, dist_env)
    checkpoint = None  # free its memory

    evaluation = open_evaluation(config, enc, raw_model, dist_env, cache)
    loader = open_loader(sources, rows, config, enc, raw_model.config, dist_env, iter_num, packing, cache)
    log = Log(config, iter_num) if dist_env.rank == 0 else None
    model = torch.compile(raw_model) if config.compile else raw_model
    if dist_env.ddp and config.parallel == 'ddp':
        model = DDP(model, device_ids=[dist_env.device] if dist_env.device_type == 'cuda' else None)
    signals = []  # Ctrl-C and SIGTERM wait here until the step is done
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    print_parameters(raw_model, dist_env)

    def save(name):
        states = all_gather(packing, dist_env) if config.packing else []
        is_first = dist_env.rank == 0
        model_state = gather(checkpoint_state(raw_model), keep=is_first)
        optimizer_states = gather([opt.state_dict() for opt in optimizers], keep=is_first)
        if is_first:
            save_checkpoint(os.path.join(config.out_dir, name), {
                'model': model_state, 'optimizer': optimizer_states,
                'model_args': vars(raw_model.config), 'iter_num': iter_num, 'best_val_loss': best_val_loss,
                'config': vars(config), 'scaler': scaler.state_dict(), 'base_model': raw_model.base_model,
                'vision_fingerprint': published_fingerprint(raw_model), 'chat': is_chat,
                'packing': states,
            }, keep=config.keep_checkpoints if name == 'ckpt.pt' else 0)

    started = t0 = time.time()
    tokens_since_log, flops_since_log = 0, 0
    stop = False
    # closes on errors too, so that a message does not stand on the line of the bar
    with tqdm(total=config.max_iters, initial=iter_num, unit='step', disable=dist_env.rank > 0) as bar:
        while True:
            is_last = iter_num >= config.max_iters
            if stop:  # a signal reached some rank: all of them are here, after the same step
                save('ckpt.pt')
                break

            # evaluate; save first, in case evaluation fails
            if iter_num % config.eval_interval == 0 or is_last or config.eval_only:
                t_eval = time.time()
                if iter_num > first_iter and (config.always_save_checkpoint or is_last):
                    save('ckpt.pt')
                with whole_weights(raw_model):
                    result, sheet, _ = evaluation.run(raw_model, autocast)
                if log:
                    log.write({'iter': iter_num, 'eval': result, 'elapsed_s': round(time.time() - started, 1)})
                    tqdm.write(f'step {iter_num}: {describe(result)}', file=sys.stderr)
                    if iter_num:  # new weights give all images nearly the same embedding
                        warn_of_collapse(result)
                    if sheet:
                        sheet.save(os.path.join(config.out_dir, 'samples.png'))
                if result['val_loss'] < best_val_loss and iter_num > 0 and not config.eval_only:
                    best_val_loss = result['val_loss']
                    save('ckpt_best.pt')
                t0 += time.time() - t_eval
            if is_last or config.eval_only:
                break

            # learning rates of this step
            scale = get_lr_scale(iter_num, config, top_lr)
            for opt in optimizers:
                for group in opt.param_groups:
                    group['lr'] = group['initial_lr'] * scale

            # forward, backward, update; dropout is the same after a resume
            torch.manual_seed(config.seed + 1_000_003 * iter_num + dist_env.rank)
            batches = next_batches(loader, config.gradient_accumulation_steps // dist_env.world_size)
            loss, tokens, stop = train_step(model, optimizers, scaler, batches, autocast, config, dist_env, len(signals))
            iter_num += 1
            packing = batches[-1].get('packing')
            bar.update()
            tokens_since_log += tokens
            if dist_env.device_type == 'cuda':
                flops_since_log += sum(estimate_flops(raw_model, batch) for batch in batches)

            # log
            if iter_num % config.log_interval == 0 or iter_num >= config.max_iters:
                loss_value = loss.item()  # waits for the GPU, so that the time is that of whole steps
                if not math.isfinite(loss_value):
                    raise ValueError(f'the loss is {loss_value} after {iter_num} steps: lower the learning rates '
                                     'or check the data; the last checkpoint is untouched')
                seconds = time.time() - t0
                row = {'iter': iter_num, 'loss': loss_value, 'lr': top_lr * scale,
                       'tokens_per_s': round(tokens_since_log / seconds), 'elapsed_s': round(time.time() - started, 1)}
                mfu = estimate_mfu(flops_since_log, seconds, dist_env.device) if flops_since_log else None
                if mfu:
                    row['mfu'] = mfu
                if packing:
                    row['left_out'] = packing['left_out']  # documents, by this process
                if log:
                    log.write(row)
                bar.set_postfix(loss=f'{loss_value:.3f}', tokens_per_s=row['tokens_per_s'])
                tokens_since_log, flops_since_log = 0, 0
                t0 = time.time()

    if dist_env.ddp:
        dist.barrier()  # leave together: a process that exits while another still saves breaks the connection
        # what DDP and FSDP have wrapped holds on to the process groups, whose threads have to end before Python does
        del model, raw_model, optimizers, evaluation, save
        gc.collect()
        dist.destroy_process_group()
    if stop:
        note(f'saved after step {iter_num}; continue with --init_from=resume')
        sys.exit(128 + (signals or [signal.SIGTERM])[0])

if __name__ == '__main__':
    run(main)
