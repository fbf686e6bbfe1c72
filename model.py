"""
Full definition of a GPT that reads text and images, all of it in this single file but the vision encoder
(vision.py). It is nanoGPT's model with nanoGPT's names, and these additions:

    embed       an image embedding takes the place of the token embedding of each <image> id
    positions   an image takes ONE position, however many tokens it has (or one for each: image_positions)
    generate    with a preallocated KV cache, for a batch of prompts of different lengths
    Linear      LoRA, on request
    switches    what differs between GPT-2 and Llama or Qwen: norm, position, mlp, n_kv_head, qk_norm, ...
    weights     `read_weights` reads any source, `load_weights` matches names and shapes
    layouts     how Hugging Face stores GPT-2, Llama (SmolLM2), Qwen2, Qwen3, SmolLM3 and BLIP-2's Q-Former

To read it as nanoGPT's is read, stop at "weights": what follows is about files.

References:
1) nanoGPT: https://github.com/karpathy/nanoGPT/blob/master/model.py
2) the official GPT-2 implementation: https://github.com/openai/gpt-2/blob/master/src/model.py
3) LLaVA, an image as a run of embeddings in the sequence: https://arxiv.org/abs/2304.08485
4) gpt-fast, a KV cache in plain PyTorch: https://github.com/pytorch-labs/gpt-fast
5) LoRA: https://arxiv.org/abs/2106.09685
"""

import functools
import json
import math
import os
import pickle
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blip2 import QFormerPretraining
from vision import Freezable, Vision, VisionConfig, complete_config, fingerprint, group_parameters

@dataclass
class GPTConfig(VisionConfig):
    n_layer: int = 12
    n_head: int = 12
    dropout: float = 0.0
    bias: bool = True         # True: bias in Linears and LayerNorms, like GPT-2
    # the switches between GPT-2 (the defaults) and later models; in the comments: Llama's and Qwen3's
    norm: str = 'layernorm'   # rmsnorm
    norm_eps: float = 1e-5
    position: str = 'learned'  # rope: queries and keys are rotated by their position
    rope_theta: float = 10000.0  # the larger, the slower the slowest rotation: 100000 and more for long texts
    rope_factor: float = 1.0  # Llama 3.x, 8 or 32: rotations with a period above rope_original are so much slower
    rope_original: int = 8192
    nope_every: int = 0       # SmolLM3, 4: every fourth layer rotates nothing
    mlp: str = 'gelu'         # swiglu
    gelu_approximate: str = 'none'  # tanh: OpenAI's GPT-2 was trained with it; nanoGPT trains with none
    n_inner: int = 0          # width of the MLP; 0: 4 * n_embd
    n_kv_head: int = 0        # heads of keys and values; 0: n_head, each query head has its own
    head_dim: int = 0         # width of a head; 0: n_embd / n_head. Qwen3-0.6B: twice that
    qk_norm: bool = False     # True in Qwen3: RMSNorm on each query and key
    qkv_bias: bool = False    # True in Qwen2: bias in queries, keys and values, whatever `bias` is
    tie_weights: bool = True  # the token embeddings are the head's weights too
    lora_rank: int = 0        # > 0: the GPT is frozen, and an update of this rank of each Linear is trained
    lora_alpha: float = 16.0  # the update is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0
    lora_scope: str = 'all'   # image: the update acts from a document's first image on
    calculator: bool = False  # <<48/2=24>> in an answer is a call: the model writes 48/2, the calculator 24

def check_config(config):
    """Raises ValueError for a configuration that no GPT can have."""
    choices = {'norm': ('layernorm', 'rmsnorm'), 'position': ('learned', 'rope'), 'mlp': ('gelu', 'swiglu'),
               'lora_scope': ('all', 'image')}
    for key, allowed in choices.items():
        value = getattr(config, key)
        if value not in allowed:
            raise ValueError(f'{key} must be {" or ".join(allowed)}, got {value!r}')
    if config.n_embd % config.n_head and not config.head_dim:
        raise ValueError(f'n_embd ({config.n_embd}) must be a multiple of n_head ({config.n_head})')
    if config.n_head % (config.n_kv_head or config.n_head):
        raise ValueError(f'n_head ({config.n_head}) must be a multiple of n_kv_head ({config.n_kv_head})')
    if config.lora_scope == 'image' and not config.vision_encoder:
        raise ValueError('lora_scope image has no effect on a model without vision_encoder')
    if config.position == 'rope' and (config.head_dim or config.n_embd // config.n_head) % 2:
        raise ValueError('position rope rotates pairs of values: it needs an even head_dim')

# -----------------------------------------------------------------------------
# layers

class Linear(nn.Linear):
    """nn.Linear, and with lora_rank r > 0 a low-rank update of it: y = W x + alpha / r * B A x, of which only
    A (r, in) and B (out, r) are trained. B starts at zero: the model starts as it was.
    """

    def __init__(self, n_in, n_out, config, bias=False):
        super().__init__(n_in, n_out, bias=config.bias or bias)
        self.lora_a = None
        if config.lora_rank:  # on the CPU, even if the frozen weights are still on the meta device
            a = torch.empty(config.lora_rank, n_in, device='cpu')
            self.lora_a = nn.Parameter(a.uniform_(-n_in**-0.5, n_in**-0.5))
            self.lora_b = nn.Parameter(torch.zeros(n_out, config.lora_rank, device='cpu'))
            self.lora_dropout = nn.Dropout(config.lora_dropout)
            self.lora_scale = config.lora_alpha / config.lora_rank

    def forward(self, x, lora_mask=None):
        y = super().forward(x)
        if self.lora_a is not None:
            update = F.linear(F.linear(self.lora_dropout(x), self.lora_a), self.lora_b) * self.lora_scale
            y = y + (update if lora_mask is None else update * lora_mask)
        return y

    @torch.no_grad()
    def merge(self):
        """Adds the update to W, in float32, and drops it: the same outputs, without its cost."""
        if self.lora_a is not None:
            self.weight.data = self.weight.float() + self.lora_scale * self.lora_b @ self.lora_a
            self.lora_a = None
            self.lora_b = None

def make_norm(ndim, config):
    """LayerNorm with an optional bias, or RMSNorm, https://arxiv.org/abs/1910.07467."""
    if config.norm == 'layernorm':
        return nn.LayerNorm(ndim, config.norm_eps, bias=config.bias)
    return nn.RMSNorm(ndim, config.norm_eps)

def apply_rope(x, cos, sin):
    """RoPE, https://arxiv.org/abs/2104.09864. x (B, T, nh, hs): queries or keys. cos, sin (B, T, 1, hs / 2).
    The pair (i, i + hs / 2) of each head is rotated by position * theta**(-2 i / hs). The product of a
    query and a key then depends on the difference of their positions alone.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)

# packed rows: several documents one after another, https://arxiv.org/abs/2107.02027

def count_in_document(x, docs):
    """x (B, T), bool -> how many are True up to each token: in its row, or in its document if docs (B, T) is given."""
    count = x.cumsum(1)
    if docs is None:
        return count
    is_first = docs != F.pad(docs, (1, 0), value=-2)[:, :-1]
    before = torch.where(is_first, count - x.long(), 0).cummax(1).values  # counted before the document's first token
    return count - before

def document_mask(docs):
    """docs (B, T) -> the mask by which each token attends to itself and those before it in its own document. Two
    documents of two and three tokens, then padding, which is document -1:

          a a b b b -
        a 1 . . . . .        On CUDA a BlockMask, by which FlexAttention skips blocks of zeros
        a 1 1 . . . .        (https://arxiv.org/abs/2412.05496); elsewhere bool (B, 1, T, T),
        b . . 1 . . .        because FlexAttention has no backward pass on a CPU.
        b . . 1 1 . .
        b . . 1 1 1 .
        - . . . . . 1
    """
    if docs.is_cuda:
        return document_block_mask(docs)
    return (docs[:, :, None] == docs[:, None]).tril()[:, None]

def document_block_mask(docs):
    """The same as a BlockMask."""
    from torch.nn.attention.flex_attention import create_block_mask  # takes two seconds, so only where it is used
    B, T = docs.shape
    allows = lambda b, h, q, k: (q >= k) & (docs[b, q] == docs[b, k])
    return compiled_on_cuda(create_block_mask, docs)(allows, B, None, T, T, device=docs.device)

def attend_in_blocks(q, k, v, mask, enable_gqa):
    """FlexAttention under a BlockMask."""
    from torch.nn.attention.flex_attention import flex_attention
    return compiled_on_cuda(flex_attention, q)(q, k, v, block_mask=mask, enable_gqa=enable_gqa)

compile_once = functools.cache(torch.compile)

def compiled_on_cuda(function, x):
    """FlexAttention's functions compute whole (T, T) matrices unless they are compiled, by themselves or in a model."""
    return compile_once(function) if x.is_cuda and not torch.compiler.is_compiling() else function

class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # grouped-query attention, https://arxiv.org/abs/2305.13245: query heads share keys and values
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_dim = config.head_dim or config.n_embd // config.n_head
        # key, query, value projections for all heads, but in a batch
        self.c_attn = Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, config, config.qkv_bias)
        self.c_proj = Linear(self.n_head * self.head_dim, config.n_embd, config)
        # queries and keys of unit length make training more stable, https://arxiv.org/abs/2302.05442
        make_qk_norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = make_qk_norm(self.head_dim, config.norm_eps)
        self.k_norm = make_qk_norm(self.head_dim, config.norm_eps)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout

    def forward(self, x, rope=None, lora_mask=None, cache=None, cache_pos=None, mask=None):
        """x (B, T, C); rope: (cos, sin) as in `apply_rope`, None for learned positions; lora_mask (B, T, 1),
        bool: the tokens at which LoRA's updates act, None for all. Queries attend to the keys that `mask` allows:
        bool, broadcastable to (B, 1, T, S), or a BlockMask; None is causal attention over the T tokens. With a
        cache, a pair of tensors (B, S, n_kv_head, hs), the keys and values of these T tokens are first written
        to its positions cache_pos (B, T).
        """
        B, T, _ = x.shape
        heads = self.c_attn(x, lora_mask).view(B, T, -1, self.head_dim)         # (B, T, nh + 2 n_kv_head, hs)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            for stored, new in zip(cache, (k, v)):
                stored[rows, cache_pos] = new.to(stored.dtype)
            k, v = cache
        q, k = q.to(v.dtype), k.to(v.dtype)  # under CUDA's autocast q_norm and k_norm return float32
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                        # (B, nh or n_kv_head, T or S, hs)
        enable_gqa = self.n_kv_head < self.n_head
        if mask is not None and not torch.is_tensor(mask):  # a BlockMask
            y = attend_in_blocks(q, k, v, mask, enable_gqa)
        else:
            dropout_p = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout_p,
                                               enable_gqa=enable_gqa)
        y = y.transpose(1, 2).flatten(2)                                        # all heads concatenated
        return self.resid_dropout(self.c_proj(y, lora_mask))

class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, n_inner, config)
        # SwiGLU: a second projection scales each of the first one's values, https://arxiv.org/abs/2002.05202
        self.c_gate = Linear(config.n_embd, n_inner, config) if config.mlp == 'swiglu' else None
        self.gelu = nn.GELU(approximate=config.gelu_approximate)
        self.c_proj = Linear(n_inner, config.n_embd, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, lora_mask=None):
        inner = self.c_fc(x, lora_mask)                                         # (B, T, n_inner)
        inner = F.silu(self.c_gate(x, lora_mask)) * inner if self.c_gate else self.gelu(inner)
        return self.dropout(self.c_proj(inner, lora_mask))

class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config.n_embd, config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config.n_embd, config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, lora_mask=None, *cache):
        x = x + self.attn(self.ln_1(x), rope, lora_mask, *cache)
        return x + self.mlp(self.ln_2(x), lora_mask)

# -----------------------------------------------------------------------------
# the GPT

MAX_LOGITS = 2**28  # at once; 1 GiB in float32

class Transformer(Freezable, nn.ModuleDict):
    """The layers of a GPT. While they are frozen they stay in eval mode: they cannot adapt to dropout."""

class GPT(nn.Module):

    def __init__(self, config, load=True, device='cpu'):
        """If weights come next: load=False reads no pretrained encoder, device='meta' allocates no text model."""
        super().__init__()
        check_config(config)
        self.config = config
        self.base_model = None  # of LoRA: {'init_from', 'fingerprint'} of the model that it adapts
        with torch.device(device):
            self.transformer = Transformer(dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=make_norm(config.n_embd, config),
            ))
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.position == 'rope':
            del self.transformer['wpe']  # a position is an angle, not a vector
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight  # weight tying, https://arxiv.org/abs/1608.05859
        self.apply(self._init_weights)
        # special scaled init of the residual projections, per GPT-2 paper
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))
        # vision comes last: the same seed gives the same text model with and without it
        self.vision = Vision(config, load) if config.vision_encoder else None

    param_groups = group_parameters

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    # -------------------------------------------------------------------------
    # a sequence with images in it

    def embed(self, idx, images=None, docs=None):
        """idx (B, T) int64: <image> ids where image tokens stand, -1 for padding. images: what patches.collate_images
        returns, all images of the batch, row by row; or None. docs (B, T): in packed rows, the number of
        each token's document. Returns embeddings (B, T, C), position embeddings included if those are learned,
        and positions (B, T), which restart with each document. Raises ValueError if the numbers of <image> ids
        and image tokens differ, or block_size is exceeded.
        """
        B, T = idx.shape
        x = self.transformer.wte(idx.clamp(min=0))                              # (B, T, C)
        advances = idx >= 0  # whether a token advances the position                     # (B, T)
        is_image = advances & (idx == self.config.image_token)                  # (B, T)
        n_embeds = 0
        if images is not None:
            emb, valid = self.vision(*images)                                   # (N, L, C), (N, L)
            N, L, C = emb.shape
            n_embeds = valid.sum()
            # the j-th <image> id of the batch takes the j-th valid embedding: the sort puts those first
            order = torch.argsort(~valid.flatten(), stable=True)                # (N*L)
            j = (is_image.flatten().cumsum(0) - 1).clamp(0, N * L - 1).view(B, T)
            source = order[j]                                                   # (B, T)
            x = torch.where(is_image[..., None], emb.to(x.dtype).flatten(0, 1)[source], x)
            if self.config.image_positions != 'each':  # only an image's first token advances the position
                advances = advances & (~is_image | (source % L == 0))
        pos = (count_in_document(advances, docs) - 1).clamp(min=0)              # (B, T)
        if not torch.compiler.is_compiling():  # reading values would break the graph
            if is_image.sum() != n_embeds:
                raise ValueError(f'the sequence has {is_image.sum()} <image> ids, but the images make {n_embeds} tokens')
            if pos.max() >= self.config.block_size:
                raise ValueError(f'a sequence takes {pos.max() + 1} positions, but block_size is '
                                 f'{self.config.block_size}: shorten it or train with a larger block_size')
        return self.add_position_embedding(x, pos), pos

    def add_position_embedding(self, x, pos):
        """Embeddings (..., C) at positions (...), if those are learned: RoPE acts in the attention."""
        if 'wpe' in self.transformer:
            x = x + self.transformer.wpe(pos)
        return self.transformer.drop(x)

    def rope(self, pos):
        """RoPE's (cos, sin), (B, T, 1, hs / 2) each, at positions (B, T); None for learned positions."""
        if self.config.position == 'learned':
            return None
        head_dim = self.transformer.h[0].attn.head_dim
        exponent = torch.arange(0, head_dim, 2, device=pos.device) / head_dim   # (hs / 2)
        speed = 1 / self.config.rope_theta ** exponent  # rounded as Hugging Face rounds it
        if self.config.rope_factor != 1:  # https://arxiv.org/abs/2407.21783; between a period of a quarter and the whole of
            n_turns = self.config.rope_original * speed / (2 * math.pi)  # rope_original the change is gradual
            share = ((n_turns - 1) / 3).clamp(0, 1)  # of the rotation as it is
            speed = speed * (share + (1 - share) / self.config.rope_factor)
        angles = pos[..., None, None] * speed                                   # (B, T, 1, hs / 2) radians
        return angles.cos(), angles.sin()

    def lora_mask(self, idx, docs=None):
        """Where LoRA's updates act, (B, T, 1), None for everywhere. lora_scope 'image': from a document's first
        image on, which is how Phi-4 Multimodal keeps its language, https://arxiv.org/abs/2503.01743.
        """
        if self.config.lora_scope == 'all':
            return None
        return count_in_document(idx == self.config.image_token, docs)[..., None] > 0

    def hidden(self, idx, images=None, docs=None):
        """The input of the head, (B, T, C); idx, images and docs as in `embed`."""
        x, pos = self.embed(idx, images, docs)
        mask = None if docs is None else document_mask(docs)
        return self.run_blocks(x, pos, self.lora_mask(idx, docs), mask=mask)

    def run_blocks(self, x, pos, lora_mask, caches=None, cache_pos=None, mask=None):
        """All layers: x (B, T, C) at positions (B, T) -> (B, T, C). caches: one for each layer."""
        rope = self.rope(pos)
        nope_every = self.config.nope_every or math.inf
        for number, (block, cache) in enumerate(zip(self.transformer.h, caches or [None] * self.config.n_layer), 1):
            x = block(x, rope if number % nope_every else None, lora_mask, cache, cache_pos, mask)
        return self.transformer.ln_f(x)

    def logits(self, idx, images=None, docs=None):
        """(B, T, vocab_size); idx, images and docs as in `embed`."""
        return self.lm_head(self.hidden(idx, images, docs))

    def forward(self, batch):
        """A batch of dataloader.collate: idx, targets (B, T) int64, -1 for padding; places (n,), where the targets
        are in B * T; images, and docs if the rows are packed, as in `embed`. Returns {'lm': cross entropy in
        nats, summed over the targets}.
        """
        places = batch['places']  # the head is large, and only few places may have a target
        x = self.hidden(batch['idx'], batch['images'], batch.get('docs')).flatten(0, 1)[places]  # (n, C)
        targets = batch['targets'].flatten()[places]                            # (n)
        # gigabytes of logits do not stay in memory: some at a time, and again in the backward pass
        n_chunks = math.ceil(batch['idx'].numel() * self.config.vocab_size / MAX_LOGITS)
        if n_chunks <= 1:
            return {'lm': self.head_loss(x, targets)}
        return {'lm': sum(checkpoint(self.head_loss, x[i::n_chunks], targets[i::n_chunks], use_reentrant=False)
                          for i in range(n_chunks))}

    def head_loss(self, x, targets):
        return F.cross_entropy(self.lm_head(x), targets, reduction='sum')

    def loss_weight(self, batch):
        """What the losses of a batch are summed over: its targets."""
        return len(batch['places'])

    # -------------------------------------------------------------------------
    # generation

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, images=None, lengths=None,
                 stop_ids=(), allowed=None, generator=None, return_logprobs=False, tools=None):
        """Continues each row of idx (B, T) by up to max_new_tokens tokens. The model should be in eval mode.

        images       as in `embed`; they are encoded once
        lengths      (B,) prompt lengths: row b is idx[b, :lengths[b]]. None: all are T
        stop_ids     a row that has generated one of them is finished, and filled up with the first of them
        allowed      bool (vocab_size,): ids that may be generated; None: all but <image>
        temperature, top_k, top_p   as in `sample_token`; generator: a torch.Generator for temperature > 0
        tools        {id: function(ids of a row up to it) -> ids that come next, instead of the model's own}

        Returns (B, T') int64: each row its prompt, its continuation, then padding (0 without stop_ids). A
        row also ends with its block_size positions. With return_logprobs also (B, T') log-probabilities in
        nats, before temperature, top_k and top_p; 0 where nothing was generated. Raises ValueError if a
        prompt alone needs more positions than block_size.
        """
        B, T = idx.shape
        rows = torch.arange(B, device=idx.device)
        lengths = torch.full_like(rows, T) if lengths is None else lengths
        cache_pos = torch.arange(T, device=idx.device).expand(B, T)
        idx = idx.masked_fill(cache_pos >= lengths[:, None], -1)
        x, pos = self.embed(idx, images)                                        # (B, T, C), (B, T)
        lora_mask = self.lora_mask(idx)
        last = lengths - 1  # where each row's last token is in x
        left = self.config.block_size - 1 - pos[rows, last]  # how many tokens each row may still get
        left = left.clamp(max=max_new_tokens)                                   # (B,)
        S = T + int(left.max())
        slots = torch.arange(S, device=idx.device)
        caches = self.empty_cache(B, S)
        if allowed is None:  # <image> stands for pixels, and a new one has none
            allowed = torch.arange(self.config.vocab_size, device=idx.device) != self.config.image_token
        never = ~allowed
        pad_id = stop_ids[0] if len(stop_ids) else 0
        stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=idx.device)
        out = F.pad(idx.masked_fill(idx < 0, pad_id), (0, S - T), value=pad_id)  # (B, S)
        logprobs = torch.zeros((B, S), device=idx.device)
        forced = [[] for _ in range(B)]  # ids that a tool has written and that are not in the row yet
        done = left <= 0
        while not done.all():
            mask = slots <= cache_pos[:, None, :, None]                         # (B, 1, T or 1, S)
            x = self.run_blocks(x, pos, lora_mask, caches, cache_pos, mask)     # (B, T or 1, C)
            logits = self.lm_head(x[rows, last]).float()                        # (B, vocab_size)
            logits = logits.masked_fill(never, -math.inf)
            new = sample_token(logits, temperature, top_k, top_p, generator)    # (B,)
            if return_logprobs:
                logprobs[rows, lengths] = logits.log_softmax(-1)[rows, new].masked_fill(done, 0)
            new = call_tools(tools, forced, new, out, lengths) if tools else new
            new = new.masked_fill(done, pad_id)
            out[rows, lengths] = new
            left = (left - 1).masked_fill(torch.isin(new, stop_ids), 0)
            done = left <= 0
            # the new token is the next query: it comes after its own row's text, at the next position
            cache_pos = lengths[:, None]                                        # (B, 1)
            lengths = lengths + 1
            lora_mask = None if lora_mask is None else lora_mask[:, -1:]        # (B, 1, 1)
            pos = (pos[rows, last, None] + 1).clamp(max=self.config.block_size - 1)  # (B, 1)
            x = self.add_position_embedding(self.transformer.wte(new[:, None]), pos)  # (B, 1, C)
            last = 0
        end = lengths.max()
        return (out[:, :end], logprobs[:, :end]) if return_logprobs else out[:, :end]

    def empty_cache(self, batch_size, length):
        """A (keys, values) pair of (B, S, n_kv_head, hs) tensors for each layer; a head's positions are contiguous."""
        weight = self.lm_head.weight
        attn = self.transformer.h[0].attn
        shape = (self.config.n_layer, 2, batch_size, attn.n_kv_head, length, attn.head_dim)
        dtype = self.lm_head(weight[:1]).dtype  # under autocast not that of the weights
        caches = torch.zeros(shape, dtype=dtype, device=weight.device).transpose(3, 4)
        return [pair.unbind() for pair in caches]

    # -------------------------------------------------------------------------
    # surgery

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """A GPT-2, Llama or Qwen of the Hugging Face hub ('gpt2' to 'gpt2-xl', 'Qwen/Qwen3-0.6B') or in a
        folder. Its weights keep the file's dtype, memory-mapped; .float() is for a CPU.
        """
        return load_model(name, **overrides)

    def crop_block_size(self, block_size):
        """Removes the positions from block_size on."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size can be cropped, not grown: {self.config.block_size} to {block_size}')
        self.config = replace(self.config, block_size=block_size)
        if 'wpe' in self.transformer:
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])

    def match_rms(self):
        """Gives new image embeddings the RMS of the GPT's token embeddings."""
        wte = self.transformer.wte.weight
        self.vision.match_rms(torch.linalg.vector_norm(wte, dtype=torch.float32) / wte.numel()**0.5)

    def merge_lora(self):
        """Adds LoRA's updates to the weights: the same model, as fast as without them."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.merge()
        self.config = replace(self.config, lora_rank=0)
        self.base_model = None

def call_tools(tools, forced, new, out, lengths):
    """The new ids (B,), where a row's list in `forced` is not empty replaced by its first; if one of them is a tool's,
    what the tool writes after the row, out[b, :lengths[b]], and that id is added to the row's list.
    """
    new = [queue.pop(0) if queue else token for queue, token in zip(forced, new.tolist())]
    for queue, token, row, end in zip(forced, new, out, lengths.tolist()):
        if token in tools:
            queue += tools[token]([*row[:end].tolist(), token])
    return torch.tensor(new, device=out.device)

def sample_token(logits, temperature, top_k=None, top_p=None, generator=None):
    """One id for each row of logits (B, vocab_size).

    temperature  0 takes the most likely token (greedy)
    top_k        sample from the k most likely tokens only; None or 0 for all
    top_p        sample from the smallest set of most likely tokens with this probability; None or 1 for all
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p and top_p < 1:  # nucleus sampling, https://arxiv.org/abs/1904.09751
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)

# -----------------------------------------------------------------------------
# weights: one way in for all sources

def load_model(source, **overrides):
    """The model of any source that `read_weights` reads, with some fields of its configuration changed."""
    return build_model(read_weights(source), source, **overrides)

def read_weights(source):
    """Any source of weights as one dict, that of nanoGPT's checkpoints: a ckpt.pt of nanoGPT or train.py, the
    glimpse.safetensors of an export, a GPT-2, Llama, Qwen or BLIP-2 of Hugging Face, by hub name or folder.

        model, model_args   {name: tensor} by our names, {field of GPTConfig: value}
        config              knobs of the run that made it; its 'tokenizer' names the tokenizer
        base_model          None, or {'init_from', 'fingerprint'} of the model that LoRA's updates adapt
        vision_fingerprint  of a pretrained encoder whose weights are not in `model`, but published

    Raises ValueError for what is none of these.
    """
    source = str(source)
    if source.endswith('.safetensors'):
        checkpoint = read_export(source)
    elif source.endswith('.pt') or os.path.isfile(source):
        checkpoint = read_checkpoint(source)
    else:
        checkpoint = read_published(source)
    checkpoint = {'config': {}, 'base_model': None, 'vision_fingerprint': '', **checkpoint}
    args = checkpoint['model_args']
    unknown = sorted(set(args) - set(vars(GPTConfig())))
    if unknown:
        raise ValueError(f'{source}: model_args has {", ".join(unknown)}, which this GPT does not know')
    state = {strip_prefixes(name): p for name, p in checkpoint['model'].items()}
    if checkpoint['base_model']:
        state = {**read_base_model(source, checkpoint['base_model'], args), **state}
    wte = state.get('transformer.wte.weight')
    if wte is not None and args.get('tie_weights', True):
        head = state.setdefault('lm_head.weight', wte)  # some files hold the table once
        if not torch.equal(head, wte):
            raise ValueError(f'{source}: lm_head.weight is not tied to transformer.wte.weight')
    return {**checkpoint, 'model': state}

def read_checkpoint(path):
    """The dict in a .pt file, on the CPU. weights_only: what wants to run code when opened is refused."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise ValueError(f'no checkpoint at {path}: train one first, or name another with --out_dir') from None
    except pickle.UnpicklingError as error:
        raise ValueError(f'{path} is refused: it is damaged, or holds more than tensors and plain values and '
                         'could run code when opened; expected a ckpt.pt written by train.py') from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).partition('\n')[0] or type(error).__name__
        raise ValueError(f'{path} cannot be read as a checkpoint; it may have been cut off: {reason}') from error
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= set(checkpoint):
        raise ValueError(f'{path} is no glimpse or nanoGPT checkpoint: it has no "model" and "model_args"')
    return checkpoint

def read_export(path):
    """The dict in a glimpse.safetensors that sample.py --export has written."""
    try:
        state, metadata = read_safetensors(path)
        return {**json.loads(metadata['glimpse']), 'model': state}
    except (FileNotFoundError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as a model that sample.py --export has written: {error}') from error

def read_base_model(path, base_model, args):
    """The model that the LoRA updates in `path` adapt, with as many rows as the model with them has."""
    try:
        state = read_weights(base_model['init_from'])['model']
    except ValueError as error:
        raise ValueError(f'{path} holds LoRA updates only; the model they adapt cannot be read: {error}') from error
    if fingerprint(state) != base_model['fingerprint']:
        raise ValueError(f'{path} adapts {base_model["init_from"]}, but what is there now are other weights')
    resized = {name: resize_embedding(state[name], args[key]) for name, key in RESIZABLE.items() if name in state}
    return {**state, **resized}

def build_model(checkpoint, source, **overrides):
    """The GPT, or QFormerPretraining, of a dict of `read_weights`, with some fields of its GPTConfig changed:
    vision fields add vision to a text-only model, lora_rank adds LoRA's updates, or merges them if it is 0.
    The tensors become the model's own, without a copy; model.load_report is the table of what was loaded.
    Raises ValueError, with the list, if names or shapes do not fit.
    """
    state, args = checkpoint['model'], checkpoint['model_args']
    config = complete_config(GPTConfig(**{**args, **overrides}))
    old_rank = args.get('lora_rank', 0)
    if old_rank and config.lora_rank not in (0, old_rank):
        raise ValueError(f'{source} has LoRA updates of rank {old_rank}: continue with that lora_rank, or merge '
                         f'them by lora_rank=0; {config.lora_rank} is neither')
    merges_lora = old_rank and not config.lora_rank
    if merges_lora and args.get('lora_scope') == 'image':
        raise ValueError(f'{source} has LoRA updates that act only after an image and cannot be merged: '
                         f'continue with lora_rank={old_rank}')
    if config.vocab_size < args.get('vocab_size', 0):
        raise ValueError(f'{source} has vocab_size {args["vocab_size"]}, not {config.vocab_size}: a vocabulary does '
                         'not shrink')
    has = lambda part: any(part in name for name in state)
    is_gpt = config.objective == 'lm'
    if is_gpt and not has('transformer.h.'):
        raise ValueError(f'{source} holds no GPT: --vision_from={source} takes over its Q-Former')
    if merges_lora:
        config = replace(config, lora_rank=old_rank)
    model = new_model(config, load=not has('vision.encoder.'), device='meta')
    expected = checkpoint['vision_fingerprint']
    if expected and model.vision.encoder.fingerprint != expected:
        raise ValueError(f'{config.vision_encoder}: these are not the weights that the model was trained with '
                         f'(fingerprint {model.vision.encoder.fingerprint}, expected {expected})')
    # what the checkpoint has nothing of is new, or published
    optional = [part for part in ('.lora_', 'vision.', 'vision.encoder.tower.') if not has(part)]
    model.load_report = load_weights(model, state, source, args, optional)
    model.base_model = checkpoint['base_model']
    if config.lora_rank and not old_rank:
        model.base_model = {'init_from': source, 'fingerprint': fingerprint(state)}
    if is_gpt and config.vision_encoder and not has('vision.'):
        model.match_rms()
    if merges_lora:
        model.merge_lora()
    return model

def new_model(config, load=True, device='cpu'):
    """The GPT with random weights, or what config.objective trains without one."""
    if config.objective != 'lm':
        return QFormerPretraining(config, load)
    return GPT(config, load, device)

# tables whose rows may be more or fewer than a checkpoint's, and the field that counts them
RESIZABLE = {'transformer.wte.weight': 'vocab_size', 'lm_head.weight': 'vocab_size',
             'transformer.wpe.weight': 'block_size'}

@torch.no_grad()
def load_weights(model, state, source, args=(), optional=(), only=''):
    """strict=False, made safe: every tensor of the model whose name starts with `only` must be in `state`, and
    every tensor of `state` in the model, in its shape, except

        optional  parts of names: such a tensor may be absent from one side, or have another shape there
        args      model_args of `state`: its RESIZABLE tables may have more or fewer rows than the model's.
                  Old rows stay as they are, so the logits of text do not change by a bit

    Returns the table of what was loaded, grown and new. Raises ValueError with what does not fit.
    """
    own = {name: p for name, p in model.state_dict().items() if name.startswith(only)}
    is_optional = lambda name: any(part in name for part in optional)
    wrong = [f'unexpected {name}' for name in state if name not in own and not is_optional(name)]
    loaded, table = {}, defaultdict(list)
    for name, p in own.items():
        action, note = 'loaded', ''
        old = state.get(name)
        counts = RESIZABLE.get(name)
        if old is not None and counts in args and len(old) == args[counts] != len(p):
            action = 'grown' if len(old) < len(p) else 'cropped'
            note = f'{len(old)} -> {len(p)} rows'
            old = resize_embedding(old, len(p))
        if old is not None and old.shape == p.shape:
            loaded[name] = old
        elif is_optional(name):
            action = 'published' if name.startswith('vision.encoder.tower.') else 'new'
        elif old is None:
            wrong.append(f'missing {name}')
        else:
            wrong.append(f'{name} is {tuple(old.shape)}, not {tuple(p.shape)}')
        group = 'LoRA' if '.lora_' in name else '.'.join(name.split('.')[:2])
        table[action, group, note].append(p.numel())
    if wrong:
        raise ValueError(f'{source} does not hold the weights that its configuration asks for: ' + '; '.join(wrong))
    model.load_state_dict(loaded, strict=False, assign=True)  # strict=True is what has been done above
    if model.config.objective == 'lm' and model.config.tie_weights:
        model.transformer.wte.weight = model.lm_head.weight
    return '\n'.join(f'{action:<9} {group:<18} {len(sizes):>4} tensors {sum(sizes) / 1e6:>9.2f}M  {note}'.rstrip()
                     for (action, group, note), sizes in table.items())

def resize_embedding(table, rows):
    """The first rows of a table; or all of them, then new ones: the mean of the old with a little noise, always
    the same. A new token is then hardly likely (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    noise = torch.randn(max(0, rows - len(table)), table.shape[1], generator=torch.Generator().manual_seed(0))
    new = table.mean(0, dtype=torch.float32) + 0.02 * noise
    return torch.cat([table[:rows], new.to(table.dtype)])

def checkpoint_state(model):
    """The tensors that a checkpoint has to hold: not those that a name and a fingerprint bring back, of a
    frozen pretrained encoder, and in a LoRA run of the model that it adapts.
    """
    left_out = ('vision.encoder.',) if published_fingerprint(model) else ()
    return {name: p for name, p in model.state_dict().items()
            if not name.startswith(left_out)
            and (not model.base_model or name.startswith('vision.') or '.lora_' in name)}

def published_fingerprint(model):
    """The fingerprint of the model's encoder if its weights are still the published ones, else ''."""
    if model.vision is None or any(p.requires_grad for p in model.vision.encoder.parameters()):
        return ''
    return model.vision.encoder.fingerprint

# what vision_from takes over: the fields of GPTConfig that describe an encoder and its images
ENCODER_FIELDS = ('vision_encoder', 'vision_n_layer', 'vision_n_head', 'vision_n_embd', 'vision_n_inner', 'vision_layer',
                  'vision_cls', 'patch_height', 'patch_width', 'max_image_tokens', 'line_height', 'image_fit',
                  'image_size', 'image_mean', 'image_std', 'tile_marks', 'max_image_side', 'max_tiles', 'tile_size',
                  'deepencoder_mode', 'sam_tower', 'clip_tower')
# those of a Q-Former, and their names in BLIP-2's config.json
QFORMER_FIELDS = {'n_queries': 'num_query_tokens', 'qformer_n_layer': 'num_hidden_layers',
                  'qformer_n_head': 'num_attention_heads', 'qformer_n_embd': 'hidden_size',
                  'qformer_cross_every': 'cross_attention_frequency'}
# the Q-Former's text side, which belongs to a vocabulary and which a connector does not have
QFORMER_TEXT = ('.wte.', '.wpe.', '.text_mlp.')

def vision_of(checkpoint, source, connector):
    """What a model with this connector takes over of another one's encoder and Q-Former: ({field of GPTConfig:
    value}, {name: tensor}). BLIP-2 gives its Q-Former. Raises ValueError if there is nothing to take over.
    """
    args = vars(GPTConfig(**checkpoint['model_args']))
    prefixes = ('vision.encoder.', 'vision.qformer.') if connector == 'qformer' else ('vision.encoder.',)
    state = {name: p.float() for name, p in checkpoint['model'].items() if name.startswith(prefixes)}
    names = ENCODER_FIELDS if args['vision_encoder'] else ()
    if any(name.startswith('vision.qformer.') for name in state):
        names += tuple(QFORMER_FIELDS)
    elif not state:
        raise ValueError(f'vision_from={source} has no small ViT or deepencoder to take over; a Q-Former needs '
                         '--connector=qformer')
    return {name: args[name] for name in names}, state

def load_vision_from(model, state, source):
    """Loads the tensors of `vision_of` into a model. Returns the table of what was loaded."""
    parts = {'.'.join(name.split('.')[:2]) for name in state}  # vision.encoder, vision.qformer
    if 'vision.encoder' in parts:
        model.vision.encoder.fingerprint = ''  # other weights than the published ones
    return load_weights(model, state, source, only=tuple(parts), optional=QFORMER_TEXT)

def strip_prefixes(name):
    """Removes what torch.compile and DDP put in front of names."""
    return name.removeprefix('module.').removeprefix('_orig_mod.').removeprefix('module.')

# -----------------------------------------------------------------------------
# Hugging Face's layouts

GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')

# fields of GPTConfig and their names in config.json
GPT2_FIELDS = {'n_layer': 'n_layer', 'n_head': 'n_head', 'n_embd': 'n_embd', 'block_size': 'n_positions',
               'vocab_size': 'vocab_size', 'n_inner': 'n_inner', 'norm_eps': 'layer_norm_epsilon',
               'tie_weights': 'tie_word_embeddings'}
LLAMA_FIELDS = {'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads', 'n_embd': 'hidden_size',
                'block_size': 'max_position_embeddings', 'vocab_size': 'vocab_size',
                'n_inner': 'intermediate_size', 'norm_eps': 'rms_norm_eps', 'tie_weights': 'tie_word_embeddings',
                'n_kv_head': 'num_key_value_heads', 'head_dim': 'head_dim', 'rope_theta': 'rope_theta'}
# tensors of old files that are no weights: the causal mask, RoPE's speeds, 0, 1, 2, ...
CONSTANTS = ('.attn.bias', '.attn.masked_bias', 'rotary_emb.inv_freq', 'position_ids')
GPT2_TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # OpenAI's layers are [in, out]
# activation_function of a GPT-2 -> gelu_approximate
GELU = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}

# parts of names, Llama's, Qwen's and SmolLM3's -> ours; their q_proj, k_proj and v_proj are our c_attn
LLAMA = {'model.embed_tokens': 'transformer.wte', 'model.layers': 'transformer.h',
         'model.norm': 'transformer.ln_f', 'input_layernorm': 'ln_1', 'post_attention_layernorm': 'ln_2',
         'self_attn.o_proj': 'attn.c_proj', 'self_attn.q_norm': 'attn.q_norm', 'self_attn.k_norm': 'attn.k_norm',
         'mlp.up_proj': 'mlp.c_fc', 'mlp.gate_proj': 'mlp.c_gate', 'mlp.down_proj': 'mlp.c_proj'}

# parts of names, BLIP-2's Q-Former's -> ours
BLIP2 = {'query_tokens': 'queries', 'qformer.layernorm': 'ln_embed', 'qformer.encoder.layer': 'h',
         'vision_model.post_layernorm': 'ln_image', 'embeddings.word_embeddings': 'wte',
         'embeddings.position_embeddings': 'wpe',
         'crossattention': 'cross_attn', 'cross_attn.attention': 'cross_attn', 'attention.attention': 'attn',
         'cross_attn.output': 'cross_attn', 'attention.output': 'attn',
         'intermediate_query.dense': 'query_mlp.fc', 'output_query': 'query_mlp',
         'intermediate.dense': 'text_mlp.fc', 'output': 'text_mlp',
         '.dense': '.proj', '.LayerNorm': '.ln', '.query.': '.q.', '.key.': '.k.', '.value.': '.v.'}

def published_folder(source):
    """The folder of a published model; one on the hub is downloaded once. Raises ValueError if that fails."""
    if os.path.isdir(source):
        return source
    from huggingface_hub import snapshot_download
    patterns = ['*config.json', 'model*.safetensors*', 'token*.json', 'chat_template.jinja']
    name = f'openai-community/{source}' if source in GPT2 else source
    try:
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # the hub's client raises many of its own
        raise ValueError(f'{source} is not in the cache of huggingface_hub and cannot be downloaded '
                         f'({type(error).__name__}): connect once, or name a checkpoint that is there, or a '
                         'folder with its config.json and model.safetensors, --init_from=FOLDER') from error

def read_published(source):
    """`read_weights` for a published model. Raises ValueError for an architecture that is not supported."""
    config, tensors = read_tensors(source)
    config = {key: value for key, value in config.items() if value is not None}  # null is the default
    tensors = {name: p for name, p in tensors.items() if not name.endswith(CONSTANTS)}
    readers = {'gpt2': read_gpt2, 'llama': read_llama, 'qwen2': read_llama, 'qwen3': read_llama, 'smollm3': read_llama,
               'blip-2': read_blip2, 'idefics3': read_smolvlm, 'smolvlm': read_smolvlm, 'llava': read_llava}
    model_type = config.get('model_type')
    path = f'{source}/config.json'
    if model_type not in readers:
        raise ValueError(f'{path}: expected a model of type {", ".join(readers)}, got {model_type!r}')
    try:
        args, state = readers[model_type](config, tensors)
    except KeyError as error:
        raise ValueError(f'{path} is no complete configuration of a {model_type}: it has no {error}') from None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'{path} is of a model that this GPT does not compute: {error}') from None
    tokenizer = 'gpt2' if source in GPT2 else source
    return {'model': state, 'model_args': args, 'config': {'tokenizer': tokenizer}}

def read_tensors(source):
    """(config.json's dict, {name: tensor}) of a model in Hugging Face's layout, in one file or in shards."""
    folder = Path(published_folder(source))
    index = folder / 'model.safetensors.index.json'
    path = folder / 'config.json'
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        if (folder / 'preprocessor_config.json').exists():  # of models with vision: how images are resized
            config['preprocessor'] = json.loads((folder / 'preprocessor_config.json').read_text(encoding='utf-8'))
        shards = ['model.safetensors']
        if index.exists():
            shards = sorted(set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()))
        tensors = {}
        for shard in shards:
            path = folder / shard
            tensors.update(read_safetensors(path)[0])
    except FileNotFoundError:
        raise ValueError(f'{source} holds no model: expected config.json and model.safetensors, but '
                         f'{path} is not there') from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f'{source} cannot be read; a file of it may have been cut off: {error}') from error
    return config, tensors

def read_safetensors(path):
    """({name: tensor}, metadata) of a file. Each tensor is a memory map of its own, freed with it."""
    with safe_open(path, 'pt') as f:
        metadata = f.metadata() or {}
        names = list(f.keys())
    tensors = {}
    for name in names:
        with safe_open(path, 'pt') as f:
            tensors[strip_prefixes(name)] = f.get_tensor(name)
    return tensors, metadata

def check_supported(config, expected):
    """Raises ValueError if a setting is not the expected one: the result would look right and be wrong."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f'its {key} is {config[key]!r}, not {value!r}')

def rename(name, table):
    """The name with every part that the table lists replaced."""
    for old, new in table.items():
        name = name.replace(old, new)
    return name

def read_gpt2(config, tensors):
    """A GPT-2's config.json and tensors as model_args and state dict."""
    config = {'activation_function': 'gelu_new', 'n_inner': 0, 'layer_norm_epsilon': 1e-5,
              'tie_word_embeddings': True, **config}
    activation = config['activation_function']
    if activation not in GELU:
        raise ValueError(f'its activation_function is {activation!r}, not one of {", ".join(GELU)}')
    check_supported(config, {'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False})
    args = {ours: config[theirs] for ours, theirs in GPT2_FIELDS.items()}
    args.update(bias=True, gelu_approximate=GELU[activation])
    state = {}
    for name, p in tensors.items():
        if name != 'lm_head.weight':
            name = 'transformer.' + name.removeprefix('transformer.')
        state[name] = p.t().contiguous() if name.endswith(GPT2_TRANSPOSED) else p
    return args, state

def read_llama(config, tensors):
    """The config.json and tensors of a Llama, Qwen2, Qwen3 or SmolLM3 as model_args and state dict."""
    model_type = config['model_type']
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    config = {'num_key_value_heads': 0, 'head_dim': 128 if model_type == 'qwen3' else 0, 'rope_theta': 10000.0,
              'tie_word_embeddings': False, **config, **rope}
    args = {ours: config[theirs] for ours, theirs in LLAMA_FIELDS.items()}
    args.update(bias=False, norm='rmsnorm', position='rope', mlp='swiglu', qk_norm=model_type == 'qwen3',
                qkv_bias=model_type == 'qwen2')
    rope_type = config.get('rope_type', config.get('type', 'default'))
    if rope_type == 'llama3':
        check_supported(config, {'low_freq_factor': 1.0, 'high_freq_factor': 4.0})
        args.update(rope_factor=config['factor'], rope_original=config['original_max_position_embeddings'])
    elif rope_type != 'default':
        raise ValueError(f"its rope_type is {rope_type!r}, not 'default' or 'llama3'")
    if model_type == 'smollm3':
        args['nope_every'] = config.get('no_rope_layer_interval', 4)
        rotates = [int((i + 1) % args['nope_every'] > 0) for i in range(args['n_layer'])]
        check_supported(config, {'no_rope_layers': rotates})
    check_supported(config, {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'use_sliding_window': False,
                             'partial_rotary_factor': 1.0})
    state = {rename(name, LLAMA): p for name, p in tensors.items()}
    for i in range(args['n_layer']):
        for kind in ('weight', 'bias'):
            names = [f'transformer.h.{i}.self_attn.{x}_proj.{kind}' for x in 'qkv']
            if all(name in state for name in names):
                state[f'transformer.h.{i}.attn.c_attn.{kind}'] = torch.cat([state.pop(name) for name in names])
    return args, state

def read_blip2(config, tensors):
    """The Q-Former of a BLIP-2, with its text side if the file has that, as model_args and tensors named
    vision.qformer.*: 32 queries that attend to the penultimate layer of EVA-CLIP's ViT-g/14, 1408 wide.
    """
    config = {**config, **config.get('qformer_config', {})}
    check_supported(config, {'hidden_act': 'gelu', 'position_embedding_type': 'absolute', 'layer_norm_eps': 1e-12,
                             'intermediate_size': 4 * config.get('hidden_size', 768)})
    # BLIP-2's defaults are VisionConfig's
    args = {ours: config[theirs] for ours, theirs in QFORMER_FIELDS.items() if theirs in config}
    args['connector'] = 'qformer'
    state = {}
    for name, p in tensors.items():
        if name.startswith(('qformer.', 'query_tokens', 'embeddings.', 'vision_model.post_layernorm.')):
            name = rename(name, BLIP2)
            state[f'vision.qformer.{name}'] = p[0] if name == 'queries' else p
    return args, state

# vision-language models. Their text model is one of the above, their encoder vision.py's Tower

TOWER_FIELDS = {'vision_n_layer': 'num_hidden_layers', 'vision_n_head': 'num_attention_heads', 'vision_n_embd': 'hidden_size',
                'vision_n_inner': 'intermediate_size', 'image_size': 'image_size', 'patch_height': 'patch_size',
                'patch_width': 'patch_size'}
# parts of names, SigLIP's and CLIP's -> ours; their q_proj, k_proj and v_proj are our c_attn
TOWER = {'embeddings.patch_embedding': 'patch_embed', 'embeddings.position_embedding': 'wpe',
         'embeddings.class_embedding': 'cls', 'pre_layrnorm': 'ln_pre', 'post_layernorm': 'ln_post',
         'encoder.layers': 'h', 'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2', 'self_attn.out_proj': 'attn_proj',
         'mlp.fc1': 'c_fc', 'mlp.fc2': 'mlp_proj'}

# what their files leave out
LLAMA_DEFAULTS = {'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32, 'num_attention_heads': 32,
                  'max_position_embeddings': 2048, 'rms_norm_eps': 1e-6, 'vocab_size': 32000}
SIGLIP_DEFAULTS = {'hidden_size': 1152, 'intermediate_size': 3072, 'num_hidden_layers': 12, 'num_attention_heads': 16,
                   'image_size': 224, 'patch_size': 32}

def read_smolvlm(config, tensors):
    """A SmolVLM's, SmolVLM2's or Idefics3's config.json and tensors as model_args and state dict."""
    images = config.get('preprocessor', {})
    check_supported(images, {'do_resize': True, 'resample': 1, 'do_normalize': True})
    size = config['vision_config']['image_size']
    check_supported(images.get('max_image_size', {}), {'longest_edge': size})
    text, state = read_text_of(config, tensors)
    args, encoder = read_tower(config['vision_config'], tensors, 'siglip', -1)
    args.update(connector='shuffle', pool_size=config['scale_factor'], image_fit='squash', image_token=config['image_token_id'],
                tile_marks=images.get('do_image_splitting', True),
                max_image_side=images.get('size', {}).get('longest_edge', 4 * size))
    projection = tensors['model.connector.modality_projection.proj.weight']
    return {**text, **args}, {**state, **encoder, 'vision.connector.net.0.weight': projection}

def read_llava(config, tensors):
    """A LLaVA's config.json and tensors as model_args and state dict: CLIP or SigLIP, an MLP, Llama or Qwen2."""
    images = config.get('preprocessor', {})
    kind = config['vision_config']['model_type'].removesuffix('_vision_model')
    if kind not in ('clip', 'siglip'):
        raise ValueError(f'its encoder is a {kind}, not a clip or siglip')
    # CLIP's class token is dropped, SigLIP has none
    check_supported(config, {'projector_hidden_act': 'gelu', 'multimodal_projector_bias': True,
                             'vision_feature_select_strategy': 'default' if kind == 'clip' else 'full'})
    layer = config.get('vision_feature_layer', -2)
    if layer not in range(-config['vision_config']['num_hidden_layers'], -1):
        raise ValueError(f'its vision_feature_layer is {layer!r}, not one before the last, such as -2')
    text, state = read_text_of(config, tensors)
    args, encoder = read_tower(config['vision_config'], tensors, kind, layer)
    is_cropped = images.get('do_center_crop', kind == 'clip')
    args.update(connector='mlp', image_fit='crop' if is_cropped else 'squash',
                image_token=config.get('image_token_index', config.get('image_token_id')))
    for i, name in enumerate(('linear_1', 'linear_2')):
        for part in ('weight', 'bias'):
            tensor = next(p for key, p in tensors.items() if key.endswith(f'multi_modal_projector.{name}.{part}'))
            state[f'vision.connector.net.{2 * i}.{part}'] = tensor
    return {**text, **args}, {**state, **encoder}

def read_text_of(config, tensors):
    """The text model in a vision-language model as model_args and state dict."""
    text = {**LLAMA_DEFAULTS, **config['text_config']}
    for key in ('tie_word_embeddings', 'vocab_size'):
        if key in config:
            text.setdefault(key, config[key])
    if text['model_type'] not in ('llama', 'qwen2'):
        raise ValueError(f'its text model is a {text["model_type"]}, not a llama or qwen2')
    prefixes = ('model.text_model.', 'model.language_model.', 'language_model.model.')
    state = {}
    for name, p in tensors.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                state['model.' + name.removeprefix(prefix)] = p
        if name in ('lm_head.weight', 'language_model.lm_head.weight'):
            state['lm_head.weight'] = p
    text['tie_word_embeddings'] = 'lm_head.weight' not in state or config.get('tie_word_embeddings', False)
    return read_llama({key: value for key, value in text.items() if value is not None}, state)

def read_tower(config, tensors, kind, layer):
    """The encoder in a vision-language model as model_args and state dict, without the layers after `layer`."""
    activation = {'siglip': 'gelu_pytorch_tanh', 'clip': 'quick_gelu'}[kind]
    defaults = SIGLIP_DEFAULTS if kind == 'siglip' else {}
    config = {'hidden_act': activation, 'layer_norm_eps': 1e-6 if kind == 'siglip' else 1e-5, **defaults, **config}
    check_supported(config, {'hidden_act': activation, 'layer_norm_eps': 1e-6 if kind == 'siglip' else 1e-5})
    args = {ours: config[theirs] for ours, theirs in TOWER_FIELDS.items()}
    args.update(vision_encoder=kind, vision_layer=layer, image_positions='each')
    if kind == 'clip':
        args.update(image_mean=(0.48145466, 0.4578275, 0.40821073), image_std=(0.26862954, 0.26130258, 0.27577711))
    n_layer = range(args['vision_n_layer'])[layer] + 1
    state = {}
    for name, p in tensors.items():
        _, is_vision, rest = name.replace('vision_tower.vision_model.', 'vision_model.').replace(
            'vision_tower.', 'vision_model.').partition('vision_model.')
        if not is_vision or rest.startswith('head.'):
            continue
        rest = rename(rest, TOWER)
        if rest.startswith('h.') and int(rest.split('.')[1]) >= n_layer:
            continue
        if rest.startswith('ln_post') and (kind == 'clip' or layer != -1):
            continue
        if rest == 'patch_embed.weight':
            p = p.permute(0, 2, 3, 1).flatten(1)  # (C, 3, p, p), as of a convolution
        state[f'vision.encoder.{rest}'] = p
    for i in range(n_layer):
        for part in ('weight', 'bias'):
            names = [f'vision.encoder.h.{i}.self_attn.{x}_proj.{part}' for x in 'qkv']
            state[f'vision.encoder.h.{i}.c_attn.{part}'] = torch.cat([state.pop(name) for name in names])
    return args, state

def to_hugging_face(model):
    """The text part of a model as (config.json's dict, {name: tensor}) for Hugging Face's GPT2LMHeadModel,
    LlamaForCausalLM and its relatives, without LoRA's updates that are not merged because they act only
    after an image. Raises ValueError if none of these classes computes what this GPT does.
    """
    c = model.config
    attn = model.transformer.h[0].attn
    state = {name: p for name, p in model.state_dict().items()
             if not name.startswith('vision.') and '.lora_' not in name}
    if c.tie_weights:
        del state['lm_head.weight']
    switches = c.norm, c.position, c.mlp
    is_multi_head = attn.n_kv_head == attn.n_head and attn.n_head * attn.head_dim == c.n_embd
    if switches == ('layernorm', 'learned', 'gelu') and not c.qk_norm and not c.qkv_bias and is_multi_head:
        config = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'],
                  'activation_function': 'gelu_new' if c.gelu_approximate == 'tanh' else 'gelu'}
        table = GPT2_FIELDS
        state = dict(to_gpt2(state, c.bias))
    elif switches == ('rmsnorm', 'rope', 'swiglu') and not c.bias:
        model_type = llama_type(c)
        rope = {'rope_theta': c.rope_theta, 'rope_type': 'default'}
        if c.rope_factor != 1:
            rope |= {'rope_type': 'llama3', 'factor': c.rope_factor, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                     'original_max_position_embeddings': c.rope_original}
        config = {'model_type': model_type, 'architectures': [LLAMA_CLASSES[model_type]], 'rope_parameters': rope}
        if c.nope_every:
            config |= {'no_rope_layer_interval': c.nope_every, 'pad_token_id': None}
        table = LLAMA_FIELDS
        state = dict(to_llama(state, attn))
    else:
        raise ValueError(f'no class of Hugging Face computes norm {c.norm}, position {c.position}, mlp {c.mlp}, '
                         f'{"with" if c.bias else "without"} bias{" and qk_norm" * c.qk_norm}')
    n_inner = c.n_inner or 4 * c.n_embd
    values = {**vars(c), 'n_inner': n_inner, 'n_kv_head': attn.n_kv_head, 'head_dim': attn.head_dim}
    config.update({theirs: values[ours] for ours, theirs in table.items()})
    config['dtype'] = str(model.lm_head.weight.dtype).removeprefix('torch.')
    return config, state

LLAMA_CLASSES = {'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM',
                 'smollm3': 'SmolLM3ForCausalLM'}

def llama_type(config):
    """The model_type of Hugging Face that computes a Llama with these switches."""
    types = [name for name, switch in (('qwen3', config.qk_norm), ('qwen2', config.qkv_bias), ('smollm3', config.nope_every))
             if switch] or ['llama']
    if len(types) > 1 or types != ['llama'] and config.rope_factor != 1:
        raise ValueError('no class of Hugging Face has more than one of qk_norm, qkv_bias, nope_every and rope_factor')
    return types[0]

def to_gpt2(state, bias):
    """(name, tensor) as GPT2LMHeadModel has them."""
    for name, p in state.items():
        yield name, p.t().contiguous() if name.endswith(GPT2_TRANSPOSED) else p
        if not bias and ('.h.' in name or '.ln_f.' in name):
            yield name.replace('weight', 'bias'), p.new_zeros(len(p))  # theirs always have one

def to_llama(state, attn):
    """(name, tensor) as LlamaForCausalLM and its relatives have them."""
    theirs = {ours: name for name, ours in LLAMA.items()}
    sizes = [heads * attn.head_dim for heads in (attn.n_head, attn.n_kv_head, attn.n_kv_head)]
    for name, p in state.items():
        name = rename(name, theirs)
        if 'c_attn' in name:
            for x, part in zip('qkv', p.split(sizes)):
                yield name.replace('attn.c_attn', f'self_attn.{x}_proj'), part.contiguous()
        else:
            yield name, p
