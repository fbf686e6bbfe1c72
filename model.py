"""
Full definition of a GPT that reads text and images, all of it in this single file but for the eyes (vision.py).
It is nanoGPT's model with nanoGPT's names, and three additions:

    embed       the places of a sequence whose id is <image> take image embeddings instead of token embeddings
    positions   an image takes ONE position, however many tokens it has; text counts on behind it
    generate    with a preallocated KV cache, for a batch of prompts of different lengths

References:
1) nanoGPT: https://github.com/karpathy/nanoGPT/blob/master/model.py
2) the official GPT-2 implementation: https://github.com/openai/gpt-2/blob/master/src/model.py
3) LLaVA, an image as a run of embeddings in the sequence: https://arxiv.org/abs/2304.08485
4) gpt-fast, a KV cache in plain PyTorch: https://github.com/pytorch-labs/gpt-fast
"""

import math
import pickle
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F

from vision import Vision


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
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
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
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
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
    # vision: read by vision.py; the defaults make a nanoGPT, which is blind
    vision_encoder: str = ''  # '' for none, 'vit' for the small ViT trained from scratch
    connector: str = 'mlp'    # linear, mlp, or pool
    pool_size: int = 2        # connector 'pool': k x k patches become one token
    patch_height: int = 16    # pixels
    patch_width: int = 16     # pixels
    max_image_tokens: int = 256  # a larger image is scaled down, keeping its aspect, to make at most as many tokens
    line_height: int = 0      # pixels; > 0: every image is a line of text and is first scaled to this height
    vision_n_layer: int = 6
    vision_n_head: int = 6
    vision_n_embd: int = 384
    image_token: int = -1     # id of <image>


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd ({config.n_embd}) must be a multiple of n_head ({config.n_head})')
        self.config = config
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
        self.vision = Vision(config) if config.vision_encoder else None

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
                 end_token=None, allowed=None, generator=None):
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

        Returns (B, T') int64: each row its prompt, what it was continued by, then end_token (0 if None). A row is also
        finished when its block_size positions are used up. Raises ValueError if a prompt alone needs more.
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
        return out[:, :lengths.max() + step + 1] if steps else out

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
        no gradient, no optimizer state, eval mode. Matrices and embeddings decay, biases and norms don't.

        optimizer 'adamw', or 'muon': the hidden matrices of the Transformer blocks, those and nothing else, go to Muon
        (https://kellerjordan.github.io/posts/muon) at muon_lr, times vision_lr / learning_rate in the encoder.
        Every group keeps its full rate as 'initial_lr'; the training loop scales it by the schedule.
        Raises ValueError if nothing is left to train.
        """
        if optimizer not in ('adamw', 'muon'):
            raise ValueError(f'optimizer must be adamw or muon, got {optimizer!r}')
        rates = {'gpt': learning_rate, 'vision': vision_lr, 'connector': connector_lr}
        rates = {part: learning_rate if lr is None else lr for part, lr in rates.items()}
        groups, muon_groups = [], []
        for part, named in self.parts().items():
            for p in named.values():
                p.requires_grad_(rates[part] > 0)
            if not rates[part]:
                continue
            hidden = [p for n, p in named.items() if optimizer == 'muon' and '.h.' in n and p.dim() == 2]
            rest = [p for n, p in named.items() if not any(p is q for q in hidden)]
            groups.append(dict(params=[p for p in rest if p.dim() >= 2], lr=rates[part], weight_decay=weight_decay))
            groups.append(dict(params=[p for p in rest if p.dim() < 2], lr=rates[part], weight_decay=0.0))
            muon_groups.append(dict(params=hidden, lr=muon_lr * rates[part] / (learning_rate or rates[part])))
        groups = [g for g in groups if g['params']]
        muon_groups = [g for g in muon_groups if g['params']]
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
    def from_checkpoint(cls, path, **overrides):
        """
        The model of a checkpoint that glimpse or nanoGPT has written. Only `dropout` makes sense as an override.
        Raises ValueError for a file that is no such checkpoint, and lists the keys if they are not the model's.
        """
        return cls.from_state(load_checkpoint(path), path, **overrides)

    @classmethod
    def from_state(cls, checkpoint, path, **overrides):
        """As from_checkpoint, from the loaded dict; `path` is for messages."""
        args = {**checkpoint['model_args'], **overrides}
        unknown = sorted(set(args) - {f.name for f in fields(GPTConfig)})
        if unknown:
            raise ValueError(f'{path}: model_args has {", ".join(unknown)}, which this GPT does not know')
        model = cls(GPTConfig(**args))
        # torch.compile and DDP leave prefixes in other people's checkpoints
        state = {k.removeprefix('module.').removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
        own = model.state_dict()
        wrong = [f'missing {k}' for k in own if k not in state] + [f'unexpected {k}' for k in state if k not in own]
        wrong += [f'{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}' for k in own
                  if k in state and state[k].shape != own[k].shape]
        if wrong:
            raise ValueError(f'{path} does not hold the weights of its model_args: ' + '; '.join(wrong))
        model.load_state_dict(state)
        return model


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
