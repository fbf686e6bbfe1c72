"""
Full definition of a GPT that reads text and images, all of it in this single file but for the eyes (vision.py).
It is nanoGPT's model with nanoGPT's names, and these additions:

    embed       the places of a sequence whose id is <image> take image embeddings instead of token embeddings
    positions   an image takes ONE position, however many tokens it has; text counts on behind it
    generate    with a preallocated KV cache, for a batch of prompts of different lengths
    Linear      LoRA, if asked for
    switches    what Llama and Qwen3 do otherwise than GPT-2: norm, position, mlp, n_kv_head, head_dim, qk_norm, tied
    surgery     a text model that is loaded gains eyes, tokens and positions, and says in a table what it gained
    layouts     the names and files under which Hugging Face keeps GPT-2, Llama (SmolLM2) and Qwen3, read and written
    Aligner     no GPT: the first stage of BLIP-2, in which encoder and Q-Former learn from pictures and captions

To read it as nanoGPT's is read, stop at "surgery and loading": what follows is about files.

References:
1) nanoGPT: https://github.com/karpathy/nanoGPT/blob/master/model.py
2) the official GPT-2 implementation: https://github.com/openai/gpt-2/blob/master/src/model.py
3) LLaVA, an image as a run of embeddings in the sequence: https://arxiv.org/abs/2304.08485
4) gpt-fast, a KV cache in plain PyTorch: https://github.com/pytorch-labs/gpt-fast
5) LoRA: https://arxiv.org/abs/2106.09685
"""

import json
import math
import os
import pickle
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F

from vision import Vision, fingerprint


class Linear(nn.Linear):
    """
    nn.Linear, and with lora_rank r > 0 a low-rank update beside it: y = W x + alpha / r * B A x, of which only A (r, in) and
    B (out, r) are trained. B starts at zero: the model starts as what it was. `tuned` (B, T, 1), bool, says at which tokens
    the update acts; None for all.
    """

    def __init__(self, n_in, n_out, config):
        super().__init__(n_in, n_out, bias=config.bias)
        self.lora_a = None
        if config.lora_rank:  # on the CPU, also if the weights beside them have yet to come
            self.lora_a = nn.Parameter(torch.empty(config.lora_rank, n_in, device='cpu').uniform_(-n_in**-0.5, n_in**-0.5))
            self.lora_b = nn.Parameter(torch.zeros(n_out, config.lora_rank, device='cpu'))
            self.lora_dropout = nn.Dropout(config.lora_dropout)
            self.lora_scale = config.lora_alpha / config.lora_rank

    def forward(self, x, tuned=None):
        y = super().forward(x)
        if self.lora_a is not None:
            update = F.linear(F.linear(self.lora_dropout(x), self.lora_a), self.lora_b) * self.lora_scale
            y = y + (update if tuned is None else update * tuned)
        return y

    @torch.no_grad()
    def merge(self):
        """Adds the update to W, in float32, and forgets it: the same outputs, without its cost."""
        if self.lora_a is not None:
            self.weight.data = self.weight.float() + self.lora_scale * self.lora_b @ self.lora_a
            self.lora_a = self.lora_b = None


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, ndim, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if config.bias else None
        self.eps = config.norm_eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """LayerNorm without its mean and its bias, which turned out not to matter, https://arxiv.org/abs/1910.07467."""

    def __init__(self, ndim, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.eps = config.norm_eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


NORMS = {'layernorm': LayerNorm, 'rmsnorm': RMSNorm}


def rotate(x, rope):
    """
    RoPE, https://arxiv.org/abs/2104.09864. x (B, T, nh, hs): queries or keys. rope: cosines and sines (B, T, 1, hs / 2).
    The pair (i, i + hs / 2) of each head turns by its angle, position * theta**(-2 i / hs): slow pairs tell far from near,
    fast ones neighbours. What a query and a key have in common depends on the difference of their positions alone.
    """
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # grouped-query attention, https://arxiv.org/abs/2305.13245: several query heads share a head of keys and values,
        # and the KV cache shrinks as many times
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_dim = config.head_dim or config.n_embd // config.n_head
        # key, query, value projections for all heads, but in a batch
        self.c_attn = Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, config)
        self.c_proj = Linear(self.n_head * self.head_dim, config.n_embd, config)
        # large models train more calmly if no query and no key is long, https://arxiv.org/abs/2302.05442
        self.q_norm = RMSNorm(self.head_dim, config) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config) if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout

    def forward(self, x, rope=None, tuned=None, cache=None, slots=None, mask=None):
        """
        x (B, T, C); rope as in `rotate`, None for learned positions; tuned as in `Linear`. Without a cache: causal attention
        over the T tokens. With a cache, a pair of (B, S, n_kv_head, hs) tensors: the keys and values of these T tokens go to
        their `slots` (B, T), and the queries see the slots that `mask`, bool and broadcastable to (B, 1, T, S), allows.
        """
        B, T, _ = x.shape
        heads = self.c_attn(x, tuned).view(B, T, -1, self.head_dim)                      # (B, T, nh + 2 n_kv_head, hs)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            for store, new in zip(cache, (k, v)):
                store[rows, slots] = new
            k, v = cache
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                 # (B, nh or n_kv_head, T or S, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None,
                                           dropout_p=self.dropout if self.training else 0.0,
                                           enable_gqa=self.n_kv_head < self.n_head)
        y = y.transpose(1, 2).flatten(2)                                                 # all heads side by side
        return self.resid_dropout(self.c_proj(y, tuned))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, n_inner, config)
        # SwiGLU: a second projection says how far each of the first one's values passes, https://arxiv.org/abs/2002.05202
        self.c_gate = Linear(config.n_embd, n_inner, config) if config.mlp == 'swiglu' else None
        self.gelu = nn.GELU(approximate=config.gelu_approximate)
        self.c_proj = Linear(n_inner, config.n_embd, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, tuned=None):
        inner = self.c_fc(x, tuned)                                                      # (B, T, n_inner)
        inner = self.gelu(inner) if self.c_gate is None else F.silu(self.c_gate(x, tuned)) * inner
        return self.dropout(self.c_proj(inner, tuned))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = NORMS[config.norm](config.n_embd, config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, tuned=None, cache=None, slots=None, mask=None):
        x = x + self.attn(self.ln_1(x), rope, tuned, cache, slots, mask)
        return x + self.mlp(self.ln_2(x), tuned)


@dataclass
class GPTConfig:
    block_size: int = 1024    # number of positions; an image takes one
    vocab_size: int = 50304   # GPT-2's 50257, padded up to a multiple of 64 for efficiency
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True         # True: bias in Linears and LayerNorms, like GPT-2. False: a bit better and faster
    # the switches between GPT-2, which the defaults are, and its heirs; on the right what Llama chose, which Qwen3 follows
    norm: str = 'layernorm'   # rmsnorm
    norm_eps: float = 1e-5
    position: str = 'learned'  # rope: queries and keys turn with their position, and no table of positions is needed
    rope_theta: float = 10000.0  # the larger, the slower the slowest pair turns: 100000 and more for long texts
    mlp: str = 'gelu'         # swiglu
    gelu_approximate: str = 'none'  # 'tanh' is what OpenAI's GPT-2 was trained with, 'none' what nanoGPT trains with
    n_inner: int = 0          # width of the MLP; 0: 4 * n_embd
    n_kv_head: int = 0        # heads of keys and values; 0: n_head, each query head has its own
    head_dim: int = 0         # width of a head; 0: n_embd / n_head. Qwen3-0.6B: twice that
    qk_norm: bool = False     # True in Qwen3: RMSNorm on each query and key
    tied: bool = True         # the token embeddings are the head's weights too; in large models each has its own
    lora_rank: int = 0        # > 0: the GPT's weights stay, and a low-rank update of each Linear is trained
    lora_alpha: float = 16.0  # the update is scaled by alpha / rank
    lora_dropout: float = 0.0
    lora_scope: str = 'all'   # 'image': the update acts from a sequence's first image on, and of text alone nothing changes
    objective: str = 'lm'     # the next token; or itc, itc+itm, itc+itm+itg: an Aligner, BLIP-2's first stage, and no GPT
    align_dim: int = 256      # of an Aligner: where pictures and captions are compared
    # vision: read by vision.py; the defaults make a nanoGPT, which is blind
    vision_encoder: str = ''  # '' for none, 'vit' for the small ViT trained from scratch, or a Tower's name
    connector: str = 'mlp'    # linear, mlp, pool, or qformer
    pool_size: int = 2        # connector 'pool': k x k patches become one token
    n_queries: int = 32       # connector 'qformer': any image becomes as many tokens
    qformer_n_layer: int = 12
    qformer_n_head: int = 12
    qformer_n_embd: int = 768
    qformer_cross: int = 2    # every second layer looks at the image, from the first on
    patch_height: int = 16    # pixels
    patch_width: int = 16     # pixels
    max_image_tokens: int = 256  # a larger image is scaled down, keeping its aspect, to make at most as many tokens
    line_height: int = 0      # pixels; > 0: every image is a line of text and is first scaled to this height
    vision_n_layer: int = 6
    vision_n_head: int = 6
    vision_n_embd: int = 384
    vision_layer: int = -2    # of a tower: whose features; -1 is the last, with the final norm
    vision_cls: bool = False  # of a tower: keep its class token
    image_fit: str = 'pad'    # of a tower: pad, squash or crop to its square
    image_size: int = 0       # of a tower, as are mean and std: written here by the tower itself
    image_mean: tuple = (0.5, 0.5, 0.5)
    image_std: tuple = (0.5, 0.5, 0.5)
    vision_fingerprint: str = ''  # of a frozen tower, whose weights are in no checkpoint
    image_token: int = -1     # id of <image>


def check_config(config):
    """Raises ValueError for what no GPT can be made of."""
    for key, known in (('norm', [*NORMS]), ('position', ['learned', 'rope']), ('mlp', ['gelu', 'swiglu']),
                       ('lora_scope', ['all', 'image'])):
        if getattr(config, key) not in known:
            raise ValueError(f'{key} must be {" or ".join(known)}, got {getattr(config, key)!r}')
    if config.n_embd % config.n_head and not config.head_dim:
        raise ValueError(f'n_embd ({config.n_embd}) must be a multiple of n_head ({config.n_head})')
    if config.n_head % (config.n_kv_head or config.n_head):
        raise ValueError(f'n_head ({config.n_head}) must be a multiple of n_kv_head ({config.n_kv_head})')
    if config.lora_scope == 'image' and not config.vision_encoder:
        raise ValueError('lora_scope image has no effect on a model without vision_encoder')
    if config.position == 'rope' and (config.head_dim or config.n_embd // config.n_head) % 2:
        raise ValueError('position rope turns pairs: it takes an even head_dim')


class GPT(nn.Module):

    def __init__(self, config, load_tower=True, device='cpu'):
        """
        load_tower: read the weights of a vision Tower. They need not be if those of a checkpoint come next.
        device: 'meta' makes the text model without memory, for weights that come next.
        """
        super().__init__()
        check_config(config)
        self.config = config
        self.base = None   # of LoRA: {'init_from', 'fingerprint'} of the model that it adapts
        self.changes = ''  # the table of what was loaded, grown and new
        with torch.device(device):
            self.transformer = nn.ModuleDict(dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=NORMS[config.norm](config.n_embd, config),
            ))
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.position == 'rope':
            del self.transformer['wpe']  # a position is an angle, not a vector
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight  # weight tying, https://arxiv.org/abs/1608.05859
        self.apply(self._init_weights)
        # special scaled init of the residual projections, per GPT-2 paper
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))
        # the eyes come last and initialise themselves, so that the same seed gives the same text model with and without
        self.vision = Vision(config, load_tower) if config.vision_encoder else None

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def get_num_params(self, non_embedding=True):
        """
        Number of parameters; non_embedding leaves out the position embeddings, and the token embeddings if they are not the
        head's weights too.
        """
        n_params = sum(p.numel() for p in self.parameters())
        tables = [name for name in ('wpe', 'wte') if name in self.transformer and not (name == 'wte' and self.config.tied)]
        return n_params - sum(self.transformer[name].weight.numel() for name in tables) * non_embedding

    # -------------------------------------------------------------------------
    # a sequence with images in it

    def embed(self, idx, images=None):
        """
        idx (B, T) int64, with <image> ids where image tokens stand and -1 where there is only padding.
        images: (patches, grid) from vision.collate, all images of the batch in the order in which they stand in it,
        row by row; None if there are none.
        Returns x (B, T, C), the token (or image) embeddings, plus those of the positions if such are learned, and the
        positions (B, T).
        Raises ValueError if the places and the image tokens are not equally many, or block_size is exceeded.
        """
        B, T = idx.shape
        x = self.transformer.wte(idx.clamp(min=0))                                       # (B, T, C)
        new = idx >= 0  # whether a token begins a new position                          # (B, T)
        is_image = new & (idx == self.config.image_token)                                # (B, T)
        if images is not None:
            emb, valid = self.vision(*images)                                            # (N, L, C), (N, L)
            N, L, C = emb.shape
            # the j-th <image> id of the batch takes the j-th valid embedding; a stable sort brings those to the front
            order = torch.argsort(~valid.flatten(), stable=True)                         # (N*L)
            j = (is_image.flatten().cumsum(0) - 1).clamp(0, N * L - 1).view(B, T)
            which = order[j]                                                             # (B, T)
            x = torch.where(is_image[..., None], emb.to(x.dtype).flatten(0, 1)[which], x)
            new = new & (~is_image | (which % L == 0))  # an image's first token opens its position, the rest share it
        if not torch.compiler.is_compiling():  # .item() would break the graph; prepare_data.collate has checked it too
            places, tokens = is_image.sum().item(), 0 if images is None else valid.sum().item()
            if places != tokens:
                raise ValueError(f'the sequence has {places} <image> places, but the images make {tokens} tokens')
        pos = (new.cumsum(1) - 1).clamp(min=0)                                           # (B, T)
        if not torch.compiler.is_compiling() and (longest := int(pos.max()) + 1) > self.config.block_size:
            raise ValueError(f'a sequence takes {longest} positions, but block_size is {self.config.block_size}: '
                             'shorten it or train with a larger block_size')
        return self.place(x, pos), pos

    def place(self, x, pos):
        """Embeddings (..., C) at their positions (...), if those are learned ones: RoPE comes in each layer's attention."""
        return self.transformer.drop(x + self.transformer.wpe(pos) if 'wpe' in self.transformer else x)

    def rope(self, pos):
        """RoPE's cosines and sines, (B, T, 1, hs / 2) each, at positions (B, T); None for learned positions."""
        if self.config.position == 'learned':
            return None
        head_dim = self.transformer.h[0].attn.head_dim
        speed = 1 / self.config.rope_theta ** (torch.arange(0, head_dim, 2, device=pos.device) / head_dim)  # (hs / 2)
        angles = pos[..., None, None] * speed                                            # (B, T, 1, hs / 2) radians
        return angles.cos(), angles.sin()

    def tuned(self, idx):
        """
        Where LoRA's updates act, (B, T, 1), None for everywhere. With lora_scope 'image', from the first image on: so Phi-4
        Multimodal keeps its language, https://arxiv.org/abs/2503.01743. What stands before has not seen the image anyway.
        """
        if not self.config.lora_rank or self.config.lora_scope == 'all':
            return None
        return (idx == self.config.image_token).cumsum(1)[..., None] > 0

    def forward(self, idx, targets=None, images=None, loss_reduction='mean', return_logits=True):
        """
        idx, targets (B, T) int64, -1 in idx for padding, in targets where nothing is to be learnt; images as in `embed`.
        Returns (logits, loss): (B, T, vocab_size) and the cross entropy in nats per target ('mean') or summed ('sum');
        without targets (B, 1, vocab_size), the last token's, and None. return_logits=False, for training: (None, loss), the
        head's largest of all products done at the targets only, which are few behind a picture and a question.
        """
        x, pos = self.embed(idx, images)
        rope, tuned = self.rope(pos), self.tuned(idx)
        for block in self.transformer.h:
            x = block(x, rope, tuned)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None  # note: using list [-1] to preserve the time dim
        if not return_logits and not torch.compiler.is_compiling():  # how many targets, the data decide: a graph could not
            x, targets = x[targets >= 0], targets[targets >= 0]                          # (M, C), (M)
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction=loss_reduction)
        return logits if return_logits else None, loss

    # -------------------------------------------------------------------------
    # generation

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, images=None, lengths=None,
                 end_token=None, allowed=None, generator=None, return_logprobs=False):
        """
        Continues each row of idx (B, T) by up to max_new_tokens tokens; the images are encoded once.

        temperature  0 takes the likeliest token (greedy)
        top_k        draw from the k likeliest tokens only; None or 0 for all
        top_p        draw from the smallest set of likeliest tokens that holds this probability; None or 1 for all
        images       as in `embed`
        lengths      (B,) prompt lengths; row b is idx[b, :lengths[b]], whatever padding follows. None: all are T
        end_token    a row that has drawn this id, or one of these ids, is finished, and filled up with it (the first)
        allowed      bool (vocab_size,): ids that may be drawn. The tokenizer knows (prepare_data.drawable_ids)
        generator    torch.Generator for temperature > 0
        return_logprobs  return (tokens, log-probabilities) instead: how sure the model was of each token it drew

        Returns (B, T') int64: each row its prompt, what it was continued by, then end_token (0 if None). A row is also
        finished when its block_size positions are used up. The log-probabilities (B, T') are the model's own, in nats
        and before temperature, top_k and top_p; 0 where it drew nothing. Raises ValueError if a prompt alone needs more.
        """
        was_training = self.training
        self.eval()
        B, T = idx.shape
        device = idx.device
        lengths = torch.full((B,), T, device=device) if lengths is None else lengths.to(device)
        inside = torch.arange(T, device=device) < lengths[:, None]                       # (B, T)
        idx = idx.masked_fill(~inside, -1)
        x, pos = self.embed(idx, images)                                                 # (B, T, C), (B, T)
        rope, tuned = self.rope(pos), self.tuned(idx)
        ends = torch.tensor([] if end_token is None else end_token, dtype=torch.int64, device=device).flatten()
        fill = int(ends[0]) if len(ends) else 0
        rows = torch.arange(B, device=device)
        pos = pos[rows, lengths - 1]                                                     # (B,) of the last token
        room = self.config.block_size - 1 - pos                                          # (B,) positions left
        steps = min(max_new_tokens, int(room.max()))
        S = T + steps
        cache = self.empty_cache(B, S)
        out = torch.full((B, S), fill, device=device)
        out[:, :T] = idx.masked_fill(~inside, fill)
        logprobs = torch.zeros((B, S), device=device)
        slots = torch.arange(T, device=device).expand(B, T)
        key_slots = torch.arange(S, device=device)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(steps):
            mask = key_slots <= slots[:, None, :, None]                                  # (B, 1, T or 1, S)
            for block, kv in zip(self.transformer.h, cache):
                x = block(x, rope, tuned, kv, slots, mask)
            last = x[rows, lengths - 1] if step == 0 else x[:, 0]                        # (B, C)
            logits = self.lm_head(self.transformer.ln_f(last)).float()                   # (B, vocab_size)
            if self.config.image_token >= 0:
                logits[:, self.config.image_token] = -math.inf  # it stands for pixels, and there are none
            if allowed is not None:
                logits = logits.masked_fill(~allowed, -math.inf)
            new = draw_token(logits, temperature, top_k, top_p, generator)               # (B,)
            done = done | (step >= room)
            if return_logprobs:
                logprobs[rows, lengths + step] = logits.log_softmax(-1)[rows, new].masked_fill(done, 0)
            new = new.masked_fill(done, fill)
            out[rows, lengths + step] = new
            done = done | torch.isin(new, ends)
            if done.all():
                break
            # the new token is the next query: it stands behind its own row's text, at the next position
            slots = (lengths + step)[:, None]                                            # (B, 1)
            tuned = tuned if tuned is None else tuned[:, -1:]                            # (B, 1, 1)
            pos = (pos + 1).clamp(max=self.config.block_size - 1)
            x, rope = self.place(self.transformer.wte(new), pos)[:, None], self.rope(pos[:, None])  # (B, 1, C)
        self.train(was_training)
        length = lengths.max() + step + 1 if steps else T
        return (out[:, :length], logprobs[:, :length]) if return_logprobs else out[:, :length]

    def empty_cache(self, batch_size, length):
        """A (keys, values) pair of (B, S, n_kv_head, hs) tensors for each layer."""
        weight, attn = self.lm_head.weight, self.transformer.h[0].attn
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = (batch_size, length, attn.n_kv_head, attn.head_dim)
        return [tuple(torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2))
                for _ in range(self.config.n_layer)]

    # -------------------------------------------------------------------------
    # training

    def parts(self):
        """{part: its named parameters}: the parts that can have a learning rate each."""
        groups = {'gpt': {}, 'vision': {}, 'qformer': {}, 'connector': {}}
        for name, p in self.named_parameters():
            part = name.split('.')[1] if name.startswith('vision.') else 'gpt'
            groups['vision' if part == 'encoder' else part][name] = p
        return groups

    def train(self, mode=True):
        """nn.Module.train, but a frozen part stays in eval mode: it must not drop out what it cannot adapt to."""
        super().train(mode)
        frozen = {part for part, named in self.parts().items() if named and not any(p.requires_grad for p in named.values())}
        if 'gpt' in frozen:
            self.transformer.eval()
        if 'vision' in frozen:
            self.vision.encoder.eval()
        if 'qformer' in frozen:
            self.vision.qformer.eval()
        if 'connector' in frozen:
            self.vision.connector.eval()
        return self

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, vision_lr=None, connector_lr=None,
                             optimizer='adamw', muon_lr=0.02, qformer_lr=None):
        """
        A list of optimizers over the parts, each with its own learning rate: the GPT (learning_rate), the encoder (vision_lr),
        the Q-Former (qformer_lr) and the connector (connector_lr); None for learning_rate. A rate of 0 freezes the part:
        no gradient, no optimizer state, eval mode. Matrices and embeddings decay, biases and norms don't. With lora_rank
        the GPT's own weights are frozen too, and learning_rate is that of the updates beside them. What is trained becomes
        float32, whatever it was loaded as: a small update is lost in the rounding of bfloat16.

        optimizer 'adamw', or 'muon': the hidden matrices of the Transformer blocks, those and nothing else, go to Muon
        (https://kellerjordan.github.io/posts/muon) at muon_lr, times vision_lr / learning_rate in the encoder.
        Every group keeps its full rate as 'initial_lr'; the training loop scales it by the schedule.
        Raises ValueError if nothing is left to train.
        """
        if optimizer not in ('adamw', 'muon'):
            raise ValueError(f'optimizer must be adamw or muon, got {optimizer!r}')
        rates = {'gpt': learning_rate, 'vision': vision_lr, 'qformer': qformer_lr, 'connector': connector_lr}
        rates = {part: learning_rate if lr is None else lr for part, lr in rates.items()}
        if rates['vision'] > 0:
            self.config.vision_fingerprint = ''  # from now on a tower's weights are its own, and belong in checkpoints
        groups, muon_groups = [], []
        for part, named in self.parts().items():
            for name, p in named.items():
                p.requires_grad_(rates[part] > 0 and (part != 'gpt' or not self.config.lora_rank or '.lora_' in name))
                p.data = p.data.float() if p.requires_grad else p.data
            named = {name: p for name, p in named.items() if p.requires_grad}
            hidden = [p for n, p in named.items() if optimizer == 'muon' and '.h.' in n and p.dim() == 2 and 'lora_' not in n]
            rest = [p for n, p in named.items() if not any(p is q for q in hidden)]
            groups.append(dict(params=[p for p in rest if p.dim() >= 2], lr=rates[part], weight_decay=weight_decay))
            groups.append(dict(params=[p for p in rest if p.dim() < 2], lr=rates[part], weight_decay=0.0))
            if hidden:
                muon_groups.append(dict(params=hidden, lr=muon_lr * rates[part] / (learning_rate or rates[part])))
        groups = [g for g in groups if g['params']]
        if not groups:
            raise ValueError('all learning rates that there is something for are 0: nothing is left to train')
        optimizers = [torch.optim.AdamW(groups, betas=betas, fused=device_type == 'cuda')]
        if muon_groups:
            optimizers.append(torch.optim.Muon(muon_groups, weight_decay=weight_decay))
        for group in (g for o in optimizers for g in o.param_groups):
            group['initial_lr'] = group['lr']
        self.train(self.training)
        return optimizers

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """
        Model flops utilization in units of A100 bfloat16 peak FLOPS, of fwdbwd_per_iter sequences of block_size tokens
        in dt seconds; see PaLM paper Appendix B, https://arxiv.org/abs/2204.02311. The encoder's work is not counted.
        """
        cfg = self.config
        N = sum(p.numel() for n, p in self.named_parameters() if n.startswith('transformer.') and '.wpe.' not in n)
        attn = self.transformer.h[0].attn
        flops_per_token = 6 * N + 12 * cfg.n_layer * attn.n_head * attn.head_dim * cfg.block_size
        return flops_per_token * cfg.block_size * fwdbwd_per_iter / dt / 312e12

    # -------------------------------------------------------------------------
    # surgery and loading

    def crop_block_size(self, block_size):
        """Takes away the positions from block_size on."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size can be cropped, not grown: {self.config.block_size} to {block_size}')
        self.config.block_size = block_size
        if self.config.position == 'learned':
            self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].detach(), freeze=False)

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """
        A GPT-2, Llama or Qwen3: 'gpt2' to 'gpt2-xl', 'HuggingFaceTB/SmolLM2-135M-Instruct', 'Qwen/Qwen3-0.6B' from the Hugging
        Face hub (or its cache), or a local folder with config.json and model.safetensors, or its shards. The weights stay in
        the file's own dtype, memory-mapped; .float() makes them what a CPU computes with. Overrides and errors as in
        `from_checkpoint`.
        """
        return cls.from_weights(*read_pretrained(name), None, name, **overrides)

    @classmethod
    def from_checkpoint(cls, path, **overrides):
        """
        The model of a checkpoint that glimpse or nanoGPT has written. Overrides are fields of GPTConfig: dropout;
        block_size and a larger vocab_size; the vision fields, which give eyes to a blind model; lora_rank.
        Raises ValueError for a file that is no such checkpoint, and lists the keys if they are not the model's.
        """
        return cls.from_state(load_checkpoint(path), path, **overrides)

    @classmethod
    def from_state(cls, checkpoint, path, **overrides):
        """As from_checkpoint, from the loaded dict; `path` is for messages."""
        return cls.from_weights(*checkpoint_weights(checkpoint, path), path, **overrides)

    @classmethod
    def from_weights(cls, args, state, base, source, **overrides):
        """
        The model with the arguments `args`, changed by the overrides, and the weights `state`, both from read_weights. The
        tensors of `state` become the model's own, without a copy. LoRA's updates are merged if the overrides say lora_rank=0;
        those that act behind images only cannot be, which is a ValueError.
        """
        config = GPTConfig(**{**args, **overrides})
        if config.objective != 'lm':
            raise ValueError(f'{source} has learnt {config.objective}, and is no GPT: another model takes its eyes over by '
                             f'--vision_from={source}')
        has_lora, wanted = any('.lora_' in name for name in state), config.lora_rank
        if has_lora and wanted not in (0, args['lora_rank']):
            raise ValueError(f'{source} has LoRA updates of rank {args["lora_rank"]}: go on with that lora_rank, or with '
                             f'lora_rank=0, which merges them, but not with {wanted}')
        if has_lora and not wanted and args.get('lora_scope') == 'image':
            raise ValueError(f'{source} has LoRA updates that act behind images only, and cannot be merged: go on with '
                             f'lora_rank={args["lora_rank"]}')
        if has_lora:
            config.lora_rank = args['lora_rank']
        has_tower = any(name.startswith('vision.encoder.') for name in state)
        model = cls(config, load_tower=not has_tower, device='meta')
        model.load_weights(state, args, source)
        model.base = base
        if has_lora and not wanted:
            model.merge_lora()
        elif wanted and not has_lora:
            model.base = {'init_from': source, 'fingerprint': fingerprint(state)}
        return model

    @torch.no_grad()
    def load_weights(self, state, args, source):
        """
        strict=False, made safe, for the tensors `state` of a model with the arguments `args`. Every tensor of this model must
        be in `state` and every one of `state` in this model, in its shape, but for what a text model cannot have: eyes,
        LoRA's updates, and further rows of wte and wpe. The old rows stay as they are, so what the model says about text
        does not change by a bit. self.changes becomes the table of what was loaded, grown and new.
        Raises ValueError with the list of all that is missing, unexpected or misshapen.
        """
        own, state, adopted = self.state_dict(), dict(state), {}
        blind, plain = not any(n.startswith('vision.') for n in state), not any('.lora_' in n for n in state)
        wrong, kinds = [f'unexpected {n}' for n in state if n not in own], {}
        wte, head = state.get('transformer.wte.weight'), state.get('lm_head.weight')
        if self.config.tied and wte is not None and head is not None and not torch.equal(wte, head):
            wrong.append('lm_head.weight is not tied to transformer.wte.weight')
        for name, p in own.items():
            group, note = '.'.join(name.split('.')[:2]), ''
            if name not in state:
                tower = name.startswith('vision.encoder.') and self.config.vision_fingerprint
                if not (tower or name.startswith('vision.') and blind or '.lora_' in name and plain):
                    wrong.append(f'missing {name}')
                kind = 'frozen' if tower and not blind else 'new'
                note = f'{self.config.vision_encoder} has its own weights' if tower else ''
                group = 'LoRA' if '.lora_' in name else group
            else:
                old, kind = state[name], 'loaded'
                if name in TABLES and old.shape == (args[TABLES[name]], p.shape[1]) and len(old) != len(p):
                    kind, note = 'grown' if len(old) < len(p) else 'cropped', f'{len(old)} -> {len(p)} rows'
                    old = resized(old, len(p))
                    if kind == 'cropped' and TABLES[name] == 'vocab_size':
                        wrong.append(f'{name} has {note}: a vocabulary does not shrink')
                if old.shape != p.shape:
                    wrong.append(f'{name} is {tuple(old.shape)}, not {tuple(p.shape)}')
                adopted[name] = old
            count, size, _ = kinds.get((kind, group), (0, 0, ''))
            kinds[kind, group] = count + 1, size + p.numel(), note
        if wrong:
            raise ValueError(f'{source} does not hold the weights that its configuration asks for: ' + '; '.join(wrong))
        self.load_state_dict(adopted, strict=False, assign=True)  # strict=True is what has been done above
        if self.config.tied:
            self.transformer.wte.weight = self.lm_head.weight
        if blind and self.vision is not None:
            self.match_rms()
        self.changes = '\n'.join(f'{kind:<8} {group:<18} {count:>4} tensors {size / 1e6:>9.2f}M  {note}'.rstrip()
                                 for (kind, group), (count, size, note) in kinds.items())

    def match_rms(self):
        """New image embeddings become as large as the GPT's token embeddings are."""
        wte = self.transformer.wte.weight
        self.vision.match_rms(torch.linalg.vector_norm(wte, dtype=torch.float32) / wte.numel()**0.5)

    def merge_lora(self):
        """LoRA's updates become part of the weights: the same model, as fast as without them."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.merge()
        self.config.lora_rank, self.base = 0, None

    def checkpoint_state(self):
        """
        The tensors that a checkpoint has to hold: not those of a frozen tower, which its name and fingerprint bring back,
        and in a LoRA run not those of the model it adapts, whose name and fingerprint are in `base`.
        """
        return {name: p for name, p in self.state_dict().items()
                if not (name.startswith('vision.encoder.') and self.config.vision_fingerprint)
                and (not self.base or name.startswith('vision.') or '.lora_' in name)}


TABLES = {'transformer.wte.weight': 'vocab_size', 'lm_head.weight': 'vocab_size', 'transformer.wpe.weight': 'block_size'}


def resized(table, rows):
    """
    The first rows of a table; or all, and new ones behind them: the mean of the old ones with a little noise, always the
    same. A new token is then as likely as an average one, which is hardly at all
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    noise = torch.randn(max(0, rows - len(table)), table.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.cat([table[:rows], (table.mean(0, dtype=torch.float32) + 0.02 * noise).to(table.dtype)])


def draw_token(logits, temperature, top_k=None, top_p=None, generator=None):
    """One id for each row of logits (B, vocab_size); temperature 0 is greedy, else softmax after top-k and top-p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p and top_p < 1:  # nucleus sampling, https://arxiv.org/abs/1904.09751
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)  # keeps the one that crosses the line
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def load_checkpoint(path):
    """
    The dict that train.py (or nanoGPT, or sample.py --export) saved, on the CPU. weights_only: a checkpoint is data, and a
    file that wants to run code when it is opened is refused. Raises ValueError in one sentence for what is no checkpoint.
    """
    if str(path).endswith('.safetensors'):
        return load_exported(path)
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise ValueError(f'no checkpoint at {path}: train one first, or name another with --out_dir') from None
    except pickle.UnpicklingError as error:
        raise ValueError(f'{path} is refused: it is damaged, or holds more than tensors and plain values and could run '
                         'code when opened; expected a ckpt.pt written by train.py') from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as a checkpoint; it may have been cut off: '
                         f'{str(error).splitlines()[0] if str(error) else type(error).__name__}') from error
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= set(checkpoint):
        raise ValueError(f'{path} is no glimpse or nanoGPT checkpoint: it has no "model" and "model_args"')
    return checkpoint


def load_exported(path):
    """load_checkpoint for the glimpse.safetensors that sample.py --export writes."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, 'pt') as f:
            checkpoint = json.loads((f.metadata() or {})['glimpse'])
            state = {name: f.get_tensor(name) for name in f.keys()}
    except (FileNotFoundError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as a model that sample.py --export has written: {error}') from error
    if checkpoint['model_args'].get('tied', True):
        state['lm_head.weight'] = state['transformer.wte.weight']
    return {**checkpoint, 'model': state}


def read_weights(source):
    """
    (model_args, state_dict, base) of a model of Hugging Face's by name or folder, or of a checkpoint; `base` is None, or of
    a LoRA checkpoint {'init_from', 'fingerprint'} of the model that it adapts, whose weights are then in the state_dict too.
    """
    if is_pretrained(source):
        return *read_pretrained(source), None
    return checkpoint_weights(load_checkpoint(source), source)


def checkpoint_weights(checkpoint, path):
    """read_weights for the dict that load_checkpoint has read from `path`."""
    args, base = checkpoint['model_args'], checkpoint.get('base')
    unknown = sorted(set(args) - {f.name for f in fields(GPTConfig)})
    if unknown:
        raise ValueError(f'{path}: model_args has {", ".join(unknown)}, which this GPT does not know')
    state = {plain_name(name): p for name, p in checkpoint['model'].items()}
    if base:
        try:
            _, below, _ = read_weights(base['init_from'])
        except ValueError as error:
            raise ValueError(f'{path} holds LoRA updates only; the model they adapt cannot be read: {error}') from error
        if fingerprint(below) != base['fingerprint']:
            raise ValueError(f'{path} adapts {base["init_from"]}, but what is there now are other weights')
        below |= {name: resized(below[name], args[key]) for name, key in TABLES.items() if name in below}
        state = {**below, **state}
    return args, state, base


# the fields of GPTConfig that say what an encoder is and how it wants to see a picture, and what a Q-Former is
ENCODER = ('vision_encoder', 'patch_height', 'patch_width', 'max_image_tokens', 'line_height', 'vision_n_layer',
           'vision_n_head', 'vision_n_embd', 'vision_layer', 'vision_cls', 'image_fit', 'image_size', 'image_mean', 'image_std',
           'vision_fingerprint')
QFORMER = ('n_queries', 'qformer_n_layer', 'qformer_n_head', 'qformer_n_embd', 'qformer_cross')


def read_eyes(source, config):
    """
    ({field of GPTConfig: value}, {name: tensor}) of the eyes of another model: of a checkpoint, its encoder, and its Q-Former
    if it has one and `config` asks for one; of a BLIP-2 in Hugging Face's layout the Q-Former.
    """
    if is_pretrained(source):
        try:
            args, state = read_blip2(*read_tensors(source))
        except ValueError as error:
            raise ValueError(f'vision_from={source}: {error}') from error
    else:
        args, state, _ = read_weights(source)
    known, names = vars(GPTConfig(**args)), () if is_pretrained(source) else ENCODER
    state = {name: p for name, p in state.items() if name.startswith('vision.encoder.')
             or name.startswith('vision.qformer.') and config.connector == 'qformer'}
    if any(name.startswith('vision.qformer.') for name in state):
        names += QFORMER
    elif known['vision_encoder'] != 'vit':
        raise ValueError(f'vision_from={source} has no small ViT to take over' + (
            ', and for its Q-Former this run must have --connector=qformer' if known['connector'] == 'qformer' else ''))
    return {name: known[name] for name in names}, state


def plain_name(name):
    """torch.compile, DDP and Hugging Face leave prefixes in other people's files."""
    for prefix in ('module.', '_orig_mod.', 'module.'):
        name = name.removeprefix(prefix)
    return name


# -----------------------------------------------------------------------------
# Hugging Face's layouts

GPT2 = {'gpt2': 'openai-community/gpt2', 'gpt2-medium': 'openai-community/gpt2-medium',
        'gpt2-large': 'openai-community/gpt2-large', 'gpt2-xl': 'openai-community/gpt2-xl'}

# parts of names, Llama's and Qwen3's -> ours; their q_proj, k_proj and v_proj are our c_attn
LLAMA = {'model.embed_tokens': 'transformer.wte', 'model.layers': 'transformer.h', 'model.norm': 'transformer.ln_f',
         'input_layernorm': 'ln_1', 'post_attention_layernorm': 'ln_2', 'self_attn.o_proj': 'attn.c_proj',
         'self_attn.q_norm': 'attn.q_norm', 'self_attn.k_norm': 'attn.k_norm', 'mlp.up_proj': 'mlp.c_fc',
         'mlp.gate_proj': 'mlp.c_gate', 'mlp.down_proj': 'mlp.c_proj'}


def is_pretrained(source):
    """Whether it is a model in Hugging Face's layout: a folder, gpt2 to gpt2-xl, or OWNER/NAME on the hub."""
    source = str(source)
    on_hub = source.count('/') == 1 and not source.endswith(('.pt', '.safetensors')) and not os.path.exists(source)
    return source in GPT2 or os.path.isdir(source) or on_hub


def pretrained_folder(source):
    """The folder of such a model; one of the hub's is downloaded once. Raises ValueError if that cannot be done."""
    if os.path.isdir(source):
        return source
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(GPT2.get(source, source), allow_patterns=['config.json', 'model*.safetensors*', 'token*.json',
                                                                           'chat_template.jinja'])
    except Exception as error:  # the hub's client has many of its own
        raise ValueError(f'{source} is not in the cache of huggingface_hub and cannot be downloaded '
                         f'({type(error).__name__}): connect once, or take a folder with its config.json and '
                         'model.safetensors, --init_from=FOLDER') from error


def read_pretrained(source):
    """
    (model_args, state_dict) of a GPT-2, Llama or Qwen3, by name or from a folder. Raises ValueError if it is not there, cut
    off, or something else than what this GPT computes.
    """
    config, tensors = read_tensors(source)
    readers, config_path = {'gpt2': read_gpt2, 'llama': read_llama, 'qwen3': read_llama}, f'{source}/config.json'
    if config.get('model_type') not in readers:
        raise ValueError(f'{config_path}: this GPT computes {", ".join(readers)}, not {config.get("model_type")!r}')
    try:
        args, state = readers[config['model_type']](config, tensors)
    except KeyError as error:
        raise ValueError(f'{config_path} is no complete configuration of a {config["model_type"]}: it has no {error}') from None
    except ValueError as error:
        raise ValueError(f'{config_path} is of a model that this GPT does not compute: {error}') from None
    if args['tied']:
        state.setdefault('lm_head.weight', state.get('transformer.wte.weight', torch.empty(0)))  # stored once
    return args, state


def read_tensors(source):
    """
    (config.json's dict, {name: tensor}) of a model in Hugging Face's layout: model.safetensors, in one piece or in shards. The
    tensors are memory maps in the file's own dtype: what nobody looks at costs no memory.
    """
    from safetensors import SafetensorError, safe_open
    folder = pretrained_folder(source)
    config_path, index = os.path.join(folder, 'config.json'), os.path.join(folder, 'model.safetensors.index.json')
    try:
        with open(config_path, encoding='utf-8') as f:
            config = json.load(f)
        shards = ['model.safetensors']
        if os.path.exists(index):
            with open(index, encoding='utf-8') as f:
                shards = sorted(set(json.load(f)['weight_map'].values()))
        tensors = {}
        for path in (os.path.join(folder, shard) for shard in shards):
            with safe_open(path, 'pt') as f:
                names = list(f.keys())
            for name in names:  # each in a memory map of its own, which is gone as soon as its tensor is
                with safe_open(path, 'pt') as f:
                    tensors[name] = f.get_tensor(name)
    except FileNotFoundError as error:
        raise ValueError(f'{source} holds no model: expected config.json and model.safetensors, but '
                         f'{error.filename or path} is not there') from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f'{source} cannot be read; a file of it may have been cut off: {error}') from error
    return config, {plain_name(name): p for name, p in tensors.items()}


def demand(config, wanted):
    """Raises ValueError if a setting is another than the one that is wanted: the result would look right and be wrong."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f'its {key} is {config[key]!r}, not {value!r}')


def read_gpt2(config, tensors):
    """A GPT-2's config.json and tensors as model_args and state_dict."""
    kinds = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}
    activation = config.get('activation_function', 'gelu_new')
    if activation not in kinds:
        raise ValueError(f'its activation_function is {activation!r}, not one of {", ".join(kinds)}')
    demand(config, {'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False})
    args = dict(n_layer=config['n_layer'], n_head=config['n_head'], n_embd=config['n_embd'], bias=True,
                vocab_size=config['vocab_size'], block_size=config['n_positions'], n_inner=config.get('n_inner') or 0,
                norm_eps=config.get('layer_norm_epsilon', 1e-5), gelu_approximate=kinds[activation],
                tied=config.get('tie_word_embeddings', True))
    state = {}
    for name, p in tensors.items():
        name = name.removeprefix('transformer.')
        if name.endswith(('.attn.bias', '.attn.masked_bias')):  # the causal mask, not weights
            continue
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            p = p.t().contiguous()  # OpenAI's layers are [in, out]
        state[name if name == 'lm_head.weight' else f'transformer.{name}'] = p
    return args, state


def read_llama(config, tensors):
    """A Llama's or Qwen3's config.json and tensors as model_args and state_dict."""
    qwen = config['model_type'] == 'qwen3'
    rope = {'rope_type': 'default', **(config.get('rope_parameters') or config.get('rope_scaling') or {})}
    demand({**config, **rope}, {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'use_sliding_window': False,
                                'rope_type': 'default', 'type': 'default', 'partial_rotary_factor': 1.0})
    args = dict(n_layer=config['num_hidden_layers'], n_head=config['num_attention_heads'], n_embd=config['hidden_size'],
                vocab_size=config['vocab_size'], block_size=config['max_position_embeddings'], bias=False,
                norm='rmsnorm', norm_eps=config['rms_norm_eps'], position='rope', mlp='swiglu',
                rope_theta=float(rope.get('rope_theta') or config.get('rope_theta', 10000.0)),
                n_inner=config['intermediate_size'], n_kv_head=config.get('num_key_value_heads') or 0,
                head_dim=config['head_dim'] if qwen else config.get('head_dim') or 0, qk_norm=qwen,
                tied=config.get('tie_word_embeddings', False))
    state = {}
    for name, p in tensors.items():
        for theirs, ours in LLAMA.items():
            name = name.replace(theirs, ours)
        if not name.endswith('rotary_emb.inv_freq'):  # of old files: a constant, not a weight
            state[name] = p
    for i in range(args['n_layer']):
        names = [f'transformer.h.{i}.self_attn.{x}_proj.weight' for x in 'qkv']
        if all(name in state and state[name].dim() == 2 and state[name].shape[1] == args['n_embd'] for name in names):
            state[f'transformer.h.{i}.attn.c_attn.weight'] = torch.cat([state.pop(name) for name in names])
    return args, state


# parts of names, BLIP-2's Q-Former's -> ours
BLIP2 = {'query_tokens': 'queries', 'qformer.layernorm': 'ln_embed', 'qformer.encoder.layer': 'h',
         'vision_model.post_layernorm': 'ln_image', 'embeddings.word_embeddings': 'wte',
         'embeddings.position_embeddings': 'wpe',
         'crossattention': 'cross_attn', 'cross_attn.attention.': 'cross_attn.', 'attention.attention.': 'attn.',
         'cross_attn.output.dense': 'cross_attn.proj', 'cross_attn.output.LayerNorm': 'cross_attn.ln',
         'attention.output.dense': 'attn.proj', 'attention.output.LayerNorm': 'attn.ln',
         'intermediate_query.dense': 'query_mlp.fc', 'output_query.dense': 'query_mlp.proj',
         'output_query.LayerNorm': 'query_mlp.ln', 'intermediate.dense': 'text_mlp.fc', 'output.dense': 'text_mlp.proj',
         'output.LayerNorm': 'text_mlp.ln', '.query.': '.q.', '.key.': '.k.', '.value.': '.v.'}


def read_blip2(config, tensors):
    """
    The Q-Former in a BLIP-2's config.json and tensors, as arguments of GPTConfig and tensors by our names vision.qformer.*: 32
    queries that look at what EVA-CLIP's ViT-g/14 has left in its penultimate layer, 1408 wide. Its text side, which speaks
    BERT's tokens, is among them if it is in the file.
    """
    shape = {'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12, 'cross_attention_frequency': 2,
             **config.get('qformer_config', {})}
    if config.get('model_type') != 'blip-2':
        raise ValueError(f'expected a checkpoint or a BLIP-2, got a {config.get("model_type")!r}')
    demand(shape, {'hidden_act': 'gelu', 'position_embedding_type': 'absolute', 'layer_norm_eps': 1e-12,
                   'intermediate_size': 4 * shape['hidden_size']})
    args = {'connector': 'qformer', 'n_queries': config.get('num_query_tokens', 32),
            'qformer_n_layer': shape['num_hidden_layers'], 'qformer_n_head': shape['num_attention_heads'],
            'qformer_n_embd': shape['hidden_size'], 'qformer_cross': shape['cross_attention_frequency']}
    state = {}
    for name, p in tensors.items():
        if name.startswith(('qformer.', 'query_tokens', 'embeddings.', 'vision_model.post_layernorm.')):
            for theirs, ours in BLIP2.items():
                name = name.replace(theirs, ours)
            if not name.endswith('position_ids'):  # of old files: a constant, not a weight
                state[f'vision.qformer.{name}'] = p[0] if name == 'queries' else p
    return args, state


def to_hugging_face(model):
    """
    The text part of a model as (config.json's dict, {name: tensor}) for Hugging Face's GPT2LMHeadModel, LlamaForCausalLM or
    Qwen3ForCausalLM, the reverse of read_pretrained; LoRA's updates that are not merged, because they act behind images only,
    are no part of it. Raises ValueError if none of them computes what this GPT does.
    """
    c, attn = model.config, model.transformer.h[0].attn
    state = {name: p for name, p in model.state_dict().items()
             if not name.startswith('vision.') and '.lora_' not in name}
    if c.tied:
        del state['lm_head.weight']
    config = {'vocab_size': c.vocab_size, 'tie_word_embeddings': c.tied, 'dtype': str(model.lm_head.weight.dtype)[6:]}
    kind = c.norm, c.position, c.mlp
    if kind == ('layernorm', 'learned', 'gelu') and not c.qk_norm and attn.c_attn.weight.shape[0] == 3 * c.n_embd:
        config |= {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'n_layer': c.n_layer, 'n_head': c.n_head,
                   'n_embd': c.n_embd, 'n_positions': c.block_size, 'n_inner': c.n_inner or None,
                   'activation_function': {'tanh': 'gelu_new', 'none': 'gelu'}[c.gelu_approximate],
                   'layer_norm_epsilon': c.norm_eps}
        out = {}
        for name, p in state.items():
            linear = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
            out[name] = p.t().contiguous() if linear else p
            if not c.bias and '.wte.' not in name and '.wpe.' not in name and name != 'lm_head.weight':
                out[name.replace('weight', 'bias')] = p.new_zeros(len(p))  # theirs always have one
        return config, out
    if kind == ('rmsnorm', 'rope', 'swiglu') and not c.bias:
        name = 'Qwen3' if c.qk_norm else 'Llama'
        config |= {'model_type': name.lower(), 'architectures': [f'{name}ForCausalLM'], 'num_hidden_layers': c.n_layer,
                   'num_attention_heads': c.n_head, 'num_key_value_heads': attn.n_kv_head, 'head_dim': attn.head_dim,
                   'hidden_size': c.n_embd, 'intermediate_size': c.n_inner or 4 * c.n_embd, 'hidden_act': 'silu',
                   'rms_norm_eps': c.norm_eps, 'max_position_embeddings': c.block_size, 'attention_bias': False,
                   'rope_theta': c.rope_theta, 'rope_parameters': {'rope_theta': c.rope_theta, 'rope_type': 'default'}}
        out = {}
        for name, p in state.items():
            for theirs, ours in LLAMA.items():
                name = name.replace(ours, theirs)
            sizes = [n * attn.head_dim for n in (attn.n_head, attn.n_kv_head, attn.n_kv_head)]
            parts = zip('qkv', p.split(sizes)) if 'c_attn' in name else [('', p)]
            out |= {name.replace('attn.c_attn', f'self_attn.{x}_proj'): part.contiguous() for x, part in parts}
        return config, out
    raise ValueError(f'no class of Hugging Face computes norm {c.norm}, position {c.position}, mlp {c.mlp}, '
                     f'{"with" if c.bias else "without"} bias{" and qk_norm" * c.qk_norm}')


# -----------------------------------------------------------------------------
# BLIP-2's first stage

class Aligner(nn.Module):
    """
    Encoder and Q-Former learn from pictures and their captions, by up to three objectives (config.objective), as in BLIP-2,
    https://arxiv.org/abs/2301.12597; a GPT can then take both over (train.py's vision_from).

        itc  contrast: picture and caption become vectors (align_dim); each picture has to find its caption among those of all
             ranks, and each caption its picture. The similarity is that of the query which is nearest to the caption
        itm  matching: does this caption belong to this picture? Asked of the pair, of the picture with a wrong caption, and of
             the caption with a wrong picture, both drawn from what ITC finds most similar in the micro-batch
        itg  generation: the caption word by word, of what the queries have seen

    What captions share with a GPT's sequences: idx (B, T) of token ids, padded with -1; a caption ends with END. Two ids of its
    own, CLS and DEC, open a caption that is compared, and one that is written. Raises ValueError for an unknown objective.
    """

    smoothing = 0.1  # of the labels of ITC and ITG

    def __init__(self, config, load_tower=True):
        super().__init__()
        self.parts_of_loss = config.objective.split('+')
        if self.parts_of_loss not in (['itc'], ['itc', 'itm'], ['itc', 'itm', 'itg']):
            raise ValueError(f'objective must be lm, itc, itc+itm or itc+itm+itg, got {config.objective!r}')
        if not config.vision_encoder or config.connector != 'qformer':
            raise ValueError(f'objective {config.objective} trains a Q-Former on top of an encoder: set --connector=qformer '
                             'and a --vision_encoder')
        self.config, self.base, self.changes = config, None, ''
        width = config.qformer_n_embd
        self.cls, self.dec = config.vocab_size, config.vocab_size + 1
        self.vision = Vision(config, load_tower)
        self.image_proj, self.text_proj = nn.Linear(width, config.align_dim), nn.Linear(width, config.align_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # one over the temperature
        if 'itm' in self.parts_of_loss:
            self.itm_head = nn.Linear(width, 2)
        if 'itg' in self.parts_of_loss:
            self.itg_head = nn.Linear(width, width)  # before the words' own embeddings, as BERT's

    # it is trained and saved as a GPT is; the part 'gpt' is its heads
    parts, configure_optimizers, checkpoint_state = GPT.parts, GPT.configure_optimizers, GPT.checkpoint_state

    @classmethod
    def from_state(cls, checkpoint, path, **overrides):
        """The Aligner of a checkpoint that load_checkpoint has read from `path`. Raises ValueError if tensors are amiss."""
        args, state, _ = checkpoint_weights(checkpoint, path)
        model = cls(GPTConfig(**{**args, **overrides}), load_tower=not any(n.startswith('vision.encoder.') for n in state))
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ValueError(f'{path} does not hold the weights that its configuration asks for: {error}') from error
        wrong = unexpected + [n for n in missing if not (model.config.vision_fingerprint and n.startswith('vision.encoder.'))]
        if wrong:
            raise ValueError(f'{path} lacks, or has without need: {", ".join(wrong)}')
        return model

    def see(self, images):
        """(patches, grid) of vision.collate -> the encoder's features (N, L, D), and which are real."""
        return self.vision.features(*images)

    def image_vectors(self, features, valid):
        """A vector of length 1 for each query, (N, K, align_dim)."""
        return F.normalize(self.image_proj(self.vision.qformer(features, valid)[0]), dim=-1)

    def text_vectors(self, idx):
        """A vector of length 1 for each caption, (N, align_dim)."""
        return F.normalize(self.text_proj(self.vision.qformer(ids=self.opened(idx, self.cls))[1][:, 0]), dim=-1)

    def opened(self, idx, token):
        """Captions (N, T) behind an opening token, (N, T + 1)."""
        return F.pad(idx, (1, 0), value=token)[:, :self.config.block_size]

    def forward(self, idx, targets=None, images=None, loss_reduction='mean', return_logits=True):
        """
        idx (B, T) captions, images one for each. Returns ({objective: its mean loss in nats}, their sum), the sum times B with
        loss_reduction 'sum'. `targets` and `return_logits`, which a GPT needs, are not looked at.
        """
        B = len(idx)
        features, valid = self.see(images)
        i, t = self.image_vectors(features, valid), self.text_vectors(idx)               # (B, K, D), (B, D)
        captions = F.pad(idx, (0, self.config.block_size - idx.shape[1]), value=-1)      # (B, block_size)
        every, every_caption, first = torch.cat([i, t[:, None]], dim=1), captions, 0     # (A, K + 1, D), (A, block_size)
        if self.training and torch.distributed.is_initialized():
            every, every_caption, first = Gather.apply(every), Gather.apply(captions), torch.distributed.get_rank() * B
        every_i, every_t = every[:, :-1], every[:, -1]                                   # (A, K, D), (A, D)
        # of two pictures with the same caption neither is wrong
        same = (captions[:, None] == every_caption).all(-1)                              # (B, A)
        right, scale = same / same.sum(1, keepdim=True), self.logit_scale.exp().clamp(max=100)
        to_text = scale * torch.einsum('bkd,ad->bak', i, every_t).amax(-1)               # (B, A)
        to_image = scale * torch.einsum('bd,akd->bak', t, every_i).amax(-1)              # (B, A)
        contrast = [F.cross_entropy(s.float(), right, label_smoothing=self.smoothing) for s in (to_text, to_image)]
        losses = {'itc': sum(contrast) / 2}
        if 'itm' in self.parts_of_loss:
            to_text, to_image, same = (s[:, first:first + B] for s in (to_text, to_image, same))  # (B, B) of this rank's own
            wrong_text, wrong_image = draw_wrong(to_text, same), draw_wrong(to_image, same)  # (B), (B)
            own = torch.arange(B, device=idx.device)
            pictures, texts = torch.cat([own, own, wrong_image]), torch.cat([own, wrong_text, own])  # (3B)
            queries, _ = self.vision.qformer(features[pictures], valid[pictures], self.opened(idx[texts], self.cls), 'itm')
            belongs = torch.arange(3 * B, device=idx.device) < B
            losses['itm'] = F.cross_entropy(self.itm_head(queries).mean(1).float(), belongs.long())
        if 'itg' in self.parts_of_loss:
            ids = self.opened(idx, self.dec)
            _, x = self.vision.qformer(features, valid, ids, 'itg')
            logits = F.linear(F.gelu(self.itg_head(x[:, :-1])), self.vision.qformer.wte.weight)  # (B, T, vocab_size + 2)
            losses['itg'] = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1,
                                            label_smoothing=self.smoothing)
        loss = sum(losses.values())
        return losses, loss * B if loss_reduction == 'sum' else loss


class Gather(torch.autograd.Function):
    """x of all ranks, one behind another. What all of them learn about this rank's x comes back to it as its gradient."""

    @staticmethod
    def forward(ctx, x):
        every = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, x.contiguous())
        return torch.cat(every)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


@torch.no_grad()
def draw_wrong(similarity, same):
    """For each row of (B, B) one column that is not the same, the more similar the likelier."""
    weights = similarity.float().softmax(1).masked_fill(same, 0) + 1e-9 * ~same
    if not weights.any(1).all():
        raise ValueError('all captions of a micro-batch are the same: itm needs a wrong one; raise batch_size')
    return torch.multinomial(weights, 1).squeeze(1)
