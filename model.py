"""
Full definition of a GPT that reads text and images, all of it in this single file but the vision encoder
(vision.py). It is nanoGPT's model with nanoGPT's names, and these additions:

    embed       an image embedding takes the place of the token embedding of each <image> id
    positions   an image takes ONE position, however many tokens it has (or one for each: image_positions)
    generate    with a preallocated KV cache, for a batch of prompts of different lengths
    Linear      LoRA, on request
    switches    what differs between GPT-2 and Llama or Qwen: norm, position, mlp, n_kv_head, qk_norm, ...

weights.py loads what others have trained.

References:
1) nanoGPT: https://github.com/karpathy/nanoGPT/blob/master/model.py
2) the official GPT-2 implementation: https://github.com/openai/gpt-2/blob/master/src/model.py
3) LLaVA, an image as a run of embeddings in the sequence: https://arxiv.org/abs/2304.08485
4) gpt-fast, a KV cache in plain PyTorch: https://github.com/pytorch-labs/gpt-fast
5) LoRA: https://arxiv.org/abs/2106.09685
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vision import Freezable, Vision, VisionConfig, group_parameters

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
        self.q_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout

    def forward(self, x, rope=None, lora_mask=None, cache=None, cache_pos=None, mask=None):
        """x (B, T, C); rope: (cos, sin) as in `apply_rope`, None for learned positions; lora_mask (B, T, 1),
        bool: the tokens at which LoRA's updates act, None for all. Queries attend to the keys that `mask` allows:
        bool, broadcastable to (B, 1, T, S), or a BlockMask; None is causal attention over the T tokens. With a
        cache, a pair of tensors (B, S, n_kv_head, hs), the keys and values of these T tokens are first written
        to its positions cache_pos (B, T).
        """
        B = len(x)
        q, k, v = self.project(x, rope, lora_mask)
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

    def project(self, x, rope, lora_mask):
        """Queries (B, T, nh, hs), keys and values (B, T, n_kv_head, hs) of x (B, T, C)."""
        heads = self.c_attn(x, lora_mask).unflatten(2, (-1, self.head_dim))     # (B, T, nh + 2 n_kv_head, hs)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        if self.q_norm is not None:  # q and k as precise as the weights: autocast makes them bfloat16
            q = self.q_norm(q.to(self.q_norm.weight.dtype))
            k = self.k_norm(k.to(self.k_norm.weight.dtype))
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return q, k, v

    def weights(self, x, rope, lora_mask):
        """How much each token attends to each up to it, (B, nh, T, T); a row's sum is 1. Only for looking at: the forward
        pass never makes this matrix.
        """
        q, k, _ = self.project(x, rope, lora_mask)
        k = k.repeat_interleave(self.n_head // self.n_kv_head, dim=2)
        scores = torch.einsum('bihd,bjhd->bhij', q.float(), k.float()) / math.sqrt(self.head_dim)
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)        # (T, T)
        return scores.masked_fill(future, -math.inf).softmax(-1)

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
        for number, (block, cache) in enumerate(zip(self.transformer.h, caches or [None] * self.config.n_layer)):
            x = block(x, None if self.has_no_rope(number) else rope, lora_mask, cache, cache_pos, mask)
        return self.transformer.ln_f(x)

    def has_no_rope(self, layer):
        return self.config.nope_every > 0 and (layer + 1) % self.config.nope_every == 0

    @torch.no_grad()
    def attention(self, idx, images=None):
        """How much each token attends to each up to it, in each layer and head: (n_layer, B, n_head, T, T)."""
        x, pos = self.embed(idx, images)
        rope, lora_mask = self.rope(pos), self.lora_mask(idx)
        weights = []
        for number, block in enumerate(self.transformer.h):
            own_rope = None if self.has_no_rope(number) else rope
            weights.append(block.attn.weights(block.ln_1(x), own_rope, lora_mask))
            x = block(x, own_rope, lora_mask)
        return torch.stack(weights)

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
        n_chunks = 1
        while len(places) * self.config.vocab_size > n_chunks * MAX_LOGITS:
            n_chunks *= 2  # compiled, each number of chunks is another graph: there are few powers of two
        if n_chunks == 1:
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

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, return_logprobs=False, **more):
        """Continues each row of idx (B, T) by up to max_new_tokens tokens; all arguments are those of `stream`.

        Returns (B, T') int64: each row its prompt, its continuation, then padding (0 without stop_ids). With
        return_logprobs also (B, T') log-probabilities in nats, before temperature, top_k and top_p; 0 where nothing was
        generated.
        """
        steps = self.stream(idx, max_new_tokens, temperature, top_k, return_logprobs=return_logprobs, **more)
        *_, (out, logprobs, lengths) = steps
        end = lengths.max()
        return (out[:, :end], logprobs[:, :end]) if return_logprobs else out[:, :end]

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, images=None, lengths=None,
               stop_ids=(), allowed=None, generator=None, return_logprobs=False, tools=None):
        """Generates token by token: yields (out, logprobs, lengths) before the first token and after each, where row b has
        out[b, :lengths[b]] so far. out and logprobs are changed in place. The model should be in eval mode.

        images       as in `embed`; they are encoded once
        lengths      (B,) prompt lengths: row b is idx[b, :lengths[b]]. None: all are T
        stop_ids     a row that has generated one of them is finished, and filled up with the first of them
        allowed      bool (vocab_size,): ids that may be generated; None: all but <image>
        temperature, top_k, top_p   as in `sample_token`; generator: a torch.Generator for temperature > 0
        tools        {id: function(ids of a row up to it) -> ids that come next, instead of the model's own}

        A row also ends with its block_size positions. Raises ValueError if a prompt alone needs more than these.
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
        yield out, logprobs, lengths
        while not done.all():
            mask = slots <= cache_pos[:, None, :, None]                         # (B, 1, T or 1, S)
            x = self.run_blocks(x, pos, lora_mask, caches, cache_pos, mask)     # (B, T or 1, C)
            logits = self.lm_head(x[rows, last]).float()                        # (B, vocab_size)
            logits = logits.masked_fill(never, -math.inf)
            new = sample_token(logits, temperature, top_k, top_p, generator)    # (B,)
            if return_logprobs:  # else they stay 0
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
            yield out, logprobs, lengths

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
        from weights import load_model  # which needs this file
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
