"""
Full definition of a GPT that reads text and images, all of it in this single file but for the eyes (vision.py).
It is nanoGPT's model with nanoGPT's names, and these additions:

    embed       the places of a sequence whose id is <image> take image embeddings instead of token embeddings
    positions   an image takes ONE position, however many tokens it has; text counts on behind it
    generate    with a preallocated KV cache, for a batch of prompts of different lengths
    Linear      LoRA, if asked for
    surgery     a text model that is loaded gains eyes, tokens and positions, and says in a table what it gained

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
    B (out, r) are trained. B starts at zero: the model starts as what it was.
    """

    def __init__(self, n_in, n_out, config):
        super().__init__(n_in, n_out, bias=config.bias)
        self.lora_a = None
        if config.lora_rank:
            self.lora_a = nn.Parameter(torch.empty(config.lora_rank, n_in).uniform_(-n_in**-0.5, n_in**-0.5))
            self.lora_b = nn.Parameter(torch.zeros(n_out, config.lora_rank))
            self.lora_dropout = nn.Dropout(config.lora_dropout)
            self.lora_scale = config.lora_alpha / config.lora_rank

    def forward(self, x):
        y = super().forward(x)
        if self.lora_a is not None:
            y = y + F.linear(F.linear(self.lora_dropout(x), self.lora_a), self.lora_b) * self.lora_scale
        return y

    @torch.no_grad()
    def merge(self):
        """Adds the update to W and forgets it: the same outputs, without its cost."""
        if self.lora_a is not None:
            self.weight += self.lora_scale * self.lora_b @ self.lora_a
            self.lora_a = self.lora_b = None


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        # key, query, value projections for all heads, but in a batch
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config)
        self.c_proj = Linear(config.n_embd, config.n_embd, config)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, cache=None, slots=None, mask=None):
        """
        x (B, T, C). Without a cache: causal attention over the T tokens. With a cache, a pair of (B, S, nh, hs)
        tensors: the keys and values of these T tokens go to their `slots` (B, T), and the queries see the slots
        that `mask`, bool and broadcastable to (B, 1, T, S), allows.
        """
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head) for t in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            for store, new in zip(cache, (k, v)):
                store[rows, slots] = new
            k, v = cache
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                 # (B, nh, T or S, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)                                           # all heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config)
        self.gelu = nn.GELU(approximate=config.gelu_approximate)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, slots=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, slots, mask)
        return x + self.mlp(self.ln_2(x))


@dataclass
class GPTConfig:
    block_size: int = 1024    # number of positions; an image takes one
    vocab_size: int = 50304   # GPT-2's 50257, padded up to a multiple of 64 for efficiency
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True         # True: bias in Linears and LayerNorms, like GPT-2. False: a bit better and faster
    gelu_approximate: str = 'none'  # 'tanh' is what OpenAI's GPT-2 was trained with, 'none' what nanoGPT trains with
    lora_rank: int = 0        # > 0: the GPT's weights stay, and a low-rank update of each Linear is trained
    lora_alpha: float = 16.0  # the update is scaled by alpha / rank
    lora_dropout: float = 0.0
    # vision: read by vision.py; the defaults make a nanoGPT, which is blind
    vision_encoder: str = ''  # '' for none, 'vit' for the small ViT trained from scratch, or a Tower's name
    connector: str = 'mlp'    # linear, mlp, or pool
    pool_size: int = 2        # connector 'pool': k x k patches become one token
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


class GPT(nn.Module):

    def __init__(self, config, load_tower=True):
        """load_tower: read the weights of a vision Tower. They need not be if those of a checkpoint come next."""
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd ({config.n_embd}) must be a multiple of n_head ({config.n_head})')
        self.config = config
        self.base = None   # of LoRA: {'init_from', 'fingerprint'} of the model that it adapts
        self.changes = ''  # the table of what was loaded, grown and new
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
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
        """Number of parameters; non_embedding leaves out the position embeddings (the token embeddings are the head)."""
        n_params = sum(p.numel() for p in self.parameters())
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    # -------------------------------------------------------------------------
    # a sequence with images in it

    def embed(self, idx, images=None):
        """
        idx (B, T) int64, with <image> ids where image tokens stand and -1 where there is only padding.
        images: (patches, grid) from vision.collate, all images of the batch in the order in which they stand in it,
        row by row; None if there are none.
        Returns x (B, T, C), the sum of token (or image) and position embeddings, and the positions (B, T).
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
        return self.transformer.drop(x + self.position_embeddings(pos)), pos

    def position_embeddings(self, pos):
        """The embeddings (..., C) of positions; raises ValueError for one that the model does not have."""
        if not torch.compiler.is_compiling() and (longest := int(pos.max()) + 1) > self.config.block_size:
            raise ValueError(f'a sequence takes {longest} positions, but block_size is {self.config.block_size}: '
                             'shorten it or train with a larger block_size')
        return self.transformer.wpe(pos)

    def forward(self, idx, targets=None, images=None, loss_reduction='mean'):
        """
        idx, targets (B, T) int64, -1 in idx for padding, in targets where nothing is to be learnt; images as in `embed`.
        Returns (logits, loss): (B, T, vocab_size) and the cross entropy in nats per target ('mean') or summed ('sum');
        without targets (B, 1, vocab_size), the last token's, and None.
        """
        x, _ = self.embed(idx, images)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None  # note: using list [-1] to preserve the time dim
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)
        return logits, loss

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
        end_token    a row that has drawn this id is finished, and filled up with it
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
        x, pos = self.embed(idx.masked_fill(~inside, -1), images)                        # (B, T, C), (B, T)
        fill = 0 if end_token is None else end_token
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
                x = block(x, kv, slots, mask)
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
            if end_token is not None:
                done = done | (new == end_token)
            if done.all():
                break
            # the new token is the next query: it stands behind its own row's text, at the next position
            slots = (lengths + step)[:, None]                                            # (B, 1)
            pos = (pos + 1).clamp(max=self.config.block_size - 1)
            x = (self.transformer.wte(new) + self.position_embeddings(pos))[:, None]     # (B, 1, C)
        self.train(was_training)
        length = lengths.max() + step + 1 if steps else T
        return (out[:, :length], logprobs[:, :length]) if return_logprobs else out[:, :length]

    def empty_cache(self, batch_size, length):
        """A (keys, values) pair of (B, S, nh, hs) tensors for each layer."""
        weight, n_head = self.lm_head.weight, self.config.n_head
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = (batch_size, length, n_head, self.config.n_embd // n_head)
        return [tuple(torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2))
                for _ in range(self.config.n_layer)]

    # -------------------------------------------------------------------------
    # training

    def parts(self):
        """{part: its named parameters}: the three parts that can have a learning rate each."""
        groups = {'gpt': {}, 'vision': {}, 'connector': {}}
        for name, p in self.named_parameters():
            part = 'connector' if name.startswith('vision.connector.') else 'vision' if name.startswith('vision.') else 'gpt'
            groups[part][name] = p
        return groups

    def train(self, mode=True):
        """nn.Module.train, but a frozen part stays in eval mode: it must not drop out what it cannot adapt to."""
        super().train(mode)
        frozen = {part for part, named in self.parts().items() if named and not any(p.requires_grad for p in named.values())}
        if 'gpt' in frozen:
            self.transformer.eval()
        if 'vision' in frozen:
            self.vision.encoder.eval()
        if 'connector' in frozen:
            self.vision.connector.eval()
        return self

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, vision_lr=None, connector_lr=None,
                             optimizer='adamw', muon_lr=0.02):
        """
        A list of optimizers over the three parts, each with its own learning rate: the GPT (learning_rate), the
        encoder (vision_lr) and the connector (connector_lr; None for learning_rate). A rate of 0 freezes the part:
        no gradient, no optimizer state, eval mode. Matrices and embeddings decay, biases and norms don't. With lora_rank
        the GPT's own weights are frozen too, and learning_rate is that of the updates beside them.

        optimizer 'adamw', or 'muon': the hidden matrices of the Transformer blocks, those and nothing else, go to Muon
        (https://kellerjordan.github.io/posts/muon) at muon_lr, times vision_lr / learning_rate in the encoder.
        Every group keeps its full rate as 'initial_lr'; the training loop scales it by the schedule.
        Raises ValueError if nothing is left to train.
        """
        if optimizer not in ('adamw', 'muon'):
            raise ValueError(f'optimizer must be adamw or muon, got {optimizer!r}')
        rates = {'gpt': learning_rate, 'vision': vision_lr, 'connector': connector_lr}
        rates = {part: learning_rate if lr is None else lr for part, lr in rates.items()}
        if rates['vision'] > 0:
            self.config.vision_fingerprint = ''  # from now on a tower's weights are its own, and belong in checkpoints
        groups, muon_groups = [], []
        for part, named in self.parts().items():
            for name, p in named.items():
                p.requires_grad_(rates[part] > 0 and (part != 'gpt' or not self.config.lora_rank or '.lora_' in name))
            named = {name: p for name, p in named.items() if p.requires_grad}
            hidden = [p for n, p in named.items() if optimizer == 'muon' and '.h.' in n and p.dim() == 2 and 'lora_' not in n]
            rest = [p for n, p in named.items() if not any(p is q for q in hidden)]
            groups.append(dict(params=[p for p in rest if p.dim() >= 2], lr=rates[part], weight_decay=weight_decay))
            groups.append(dict(params=[p for p in rest if p.dim() < 2], lr=rates[part], weight_decay=0.0))
            if hidden:
                muon_groups.append(dict(params=hidden, lr=muon_lr * rates[part] / (learning_rate or rates[part])))
        groups = [g for g in groups if g['params']]
        if not groups:
            raise ValueError('learning_rate, vision_lr and connector_lr freeze all there is: nothing is left to train')
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
        flops_per_token = 6 * N + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
        return flops_per_token * cfg.block_size * fwdbwd_per_iter / dt / 312e12

    # -------------------------------------------------------------------------
    # surgery and loading

    def crop_block_size(self, block_size):
        """Takes away the positions from block_size on."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size can be cropped, not grown: {self.config.block_size} to {block_size}')
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].detach(), freeze=False)

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """
        OpenAI's GPT-2: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl' from the Hugging Face hub (or its cache), or a local
        folder with the same config.json and model.safetensors. Overrides and errors as in `from_checkpoint`.
        """
        return cls.from_weights(*read_gpt2(name), None, name, **overrides)

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
        The model with the arguments `args`, changed by the overrides, and the weights `state`, both from read_weights.
        LoRA's updates are merged if the overrides say lora_rank=0.
        """
        config = GPTConfig(**{**args, **overrides})
        has_lora, wanted = any('.lora_' in name for name in state), config.lora_rank
        if has_lora and wanted not in (0, args['lora_rank']):
            raise ValueError(f'{source} has LoRA updates of rank {args["lora_rank"]}: go on with that lora_rank, or with '
                             f'lora_rank=0, which merges them, but not with {wanted}')
        if has_lora:
            config.lora_rank = args['lora_rank']
        has_tower = any(name.startswith('vision.encoder.') for name in state)
        model = cls(config, load_tower=not has_tower)
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
        own, state = self.state_dict(), dict(state)
        blind, plain = not any(n.startswith('vision.') for n in state), not any('.lora_' in n for n in state)
        wrong, kinds = [f'unexpected {n}' for n in state if n not in own], {}
        wte, head = state.get('transformer.wte.weight'), state.get('lm_head.weight')
        if wte is not None and head is not None and not torch.equal(wte, head):
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
                else:
                    p.copy_(old)
            count, size, _ = kinds.get((kind, group), (0, 0, ''))
            kinds[kind, group] = count + 1, size + p.numel(), note
        if wrong:
            raise ValueError(f'{source} does not hold the weights that its configuration asks for: ' + '; '.join(wrong))
        if blind and self.vision is not None:
            self.vision.match_rms(wte.float().square().mean().sqrt())
        self.changes = '\n'.join(f'{kind:<8} {group:<18} {count:>4} tensors {size / 1e6:>9.2f}M  {note}'.rstrip()
                                 for (kind, group), (count, size, note) in kinds.items())

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
    return torch.cat([table[:rows], table.mean(0) + 0.02 * noise])


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
    The dict that train.py (or nanoGPT) saved, on the CPU. weights_only: a checkpoint is data, and a file that wants to
    run code when it is opened is refused. Raises ValueError in one sentence for whatever is not a checkpoint.
    """
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


def read_weights(source):
    """
    (model_args, state_dict, base) of a GPT-2 by name, a folder with one, or a checkpoint; `base` is None, or of a LoRA
    checkpoint {'init_from', 'fingerprint'} of the model that it adapts, whose weights are then in the state_dict too.
    """
    if source in GPT2 or os.path.isdir(source):
        return *read_gpt2(source), None
    return checkpoint_weights(load_checkpoint(source), source)


def checkpoint_weights(checkpoint, path):
    """read_weights for the dict that load_checkpoint has read from `path`."""
    args, base = checkpoint['model_args'], checkpoint.get('base')
    unknown = sorted(set(args) - {f.name for f in fields(GPTConfig)})
    if unknown:
        raise ValueError(f'{path}: model_args has {", ".join(unknown)}, which this GPT does not know')
    state = {plain_name(name): p for name, p in checkpoint['model'].items()}
    if base:
        _, below, _ = read_weights(base['init_from'])
        if fingerprint(below) != base['fingerprint']:
            raise ValueError(f'{path} adapts {base["init_from"]}, but what is there now are other weights')
        below |= {name: resized(below[name], args[key]) for name, key in TABLES.items() if name in below}
        state = {**below, **state}
    return args, state, base


def plain_name(name):
    """torch.compile, DDP and Hugging Face leave prefixes in other people's files."""
    for prefix in ('module.', '_orig_mod.', 'module.'):
        name = name.removeprefix(prefix)
    return name


GPT2 = {'gpt2': 'openai-community/gpt2', 'gpt2-medium': 'openai-community/gpt2-medium',
        'gpt2-large': 'openai-community/gpt2-large', 'gpt2-xl': 'openai-community/gpt2-xl'}


def read_gpt2(source):
    """
    (model_args, state_dict) of a GPT-2 in Hugging Face's layout, by name or from a folder: config.json and
    model.safetensors, which is memory-mapped. Raises ValueError if it is not there, cut off, or something else than a GPT-2.
    """
    names = 'config.json', 'model.safetensors'
    if source in GPT2:
        from huggingface_hub import hf_hub_download
        try:
            config_path, path = (hf_hub_download(GPT2[source], name) for name in names)
        except Exception as error:  # the hub's client has many of its own
            raise ValueError(f'{source} is not in the cache of huggingface_hub and cannot be downloaded '
                             f'({type(error).__name__}): connect once, or take a folder with its config.json and '
                             'model.safetensors, --init_from=FOLDER') from error
    else:
        config_path, path = (os.path.join(source, name) for name in names)
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        with open(config_path, encoding='utf-8') as f:
            config = json.load(f)
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f'{source} holds no GPT-2: expected config.json and model.safetensors, but '
                         f'{error.filename or path} is not there') from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f'{source} cannot be read; a file of it may have been cut off: {error}') from error
    missing = [key for key in ('model_type', 'n_layer', 'n_head', 'n_embd', 'n_positions', 'vocab_size') if key not in config]
    if missing:
        raise ValueError(f'{config_path} is not the configuration of a GPT-2: it has no {", ".join(missing)}')
    wanted = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'n_inner': None,
              'tie_word_embeddings': True, 'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False}
    for key, value in wanted.items():
        # what another one computes would look right and be wrong
        if config.get(key, value) != value and not (key == 'n_inner' and config[key] == 4 * config['n_embd']):
            raise ValueError(f'{source} is not a GPT-2 that this GPT computes: its {key} is {config[key]!r}, not {value!r}')
    args = dict(n_layer=config['n_layer'], n_head=config['n_head'], n_embd=config['n_embd'], bias=True,
                vocab_size=config['vocab_size'], block_size=config['n_positions'], gelu_approximate='tanh')
    state = {}
    for name, p in tensors.items():
        name = plain_name(name).removeprefix('transformer.')
        if name.endswith(('.attn.bias', '.attn.masked_bias')):  # the causal mask, not weights
            continue
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            p = p.t()  # OpenAI's layers are [in, out]
        state[name if name == 'lm_head.weight' else f'transformer.{name}'] = p
    state.setdefault('lm_head.weight', state.get('transformer.wte.weight', torch.empty(0)))  # tied: stored once
    return args, state
