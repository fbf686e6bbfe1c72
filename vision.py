"""
Images -> image tokens: everything between a picture and the embeddings that the GPT reads.

    preprocess   a PIL image -> its patches as bytes, and where each stands                 (on the CPU, per image)
    collate      the images of a batch, padded to one length                                (on the CPU, per batch)
    ViT          patches -> features: a small Vision Transformer, trained from scratch      (an encoder)
    Tower        patches -> features: CLIP, SigLIP, DINOv2 ... with the weights of others   (an encoder)
    pool         features -> their mean over each cell of k x k patches
    QFormer      features -> a few queries that have looked at them, however many features there are
    Connector    features or queries -> embeddings as wide as the GPT's: linear or mlp
    Vision       all of it in one module: what `GPT.vision` is

The ViT looks at a picture at its native resolution: it keeps its size and aspect and becomes as many patches as it takes,
up to a limit; a batch of them is padded, and attention never looks at the padding. A tower has learnt to look at
squares of one size, so its pictures are first made such squares.

This file imports nothing of the project. `config` is any object with the fields that model.py's GPTConfig lists under
"vision".

References:
1) ViT: https://arxiv.org/abs/2010.11929
2) NaViT, patches of images of many sizes in one batch: https://arxiv.org/abs/2307.06304
3) LLaVA, a frozen CLIP's penultimate layer: https://arxiv.org/abs/2304.08485
4) LLaVA-1.5, the two-layer MLP connector, and padding to a square: https://arxiv.org/abs/2310.03744
5) BLIP-2, the Q-Former: https://arxiv.org/abs/2301.12597
"""

import difflib
import hashlib
import json
import math
import os

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# a picture becomes patches


def cell_size(config):
    """Side, in patches, of the square of patches that becomes one image token: pool_size for `pool`, else 1."""
    return config.pool_size if config.connector == 'pool' else 1


def is_tower(config):
    """Whether the encoder is somebody else's, by name ('ViT-L-14-quickgelu/openai'), and not the `vit` of this file."""
    return '/' in config.vision_encoder


def squared(image, config):
    """
    A picture as the tower wants it, image_size x image_size pixels:
        pad     the whole of it in its own aspect, the rest filled with the tower's mean colour (LLaVA-1.5)
        squash  the whole of it, its aspect given up: every pixel goes to the picture, good for pages
        crop    its middle, the shorter side whole: what CLIP was trained on, and what cuts off a page's margins
    """
    size = config.image_size, config.image_size
    if config.image_fit == 'pad':
        mean = tuple(round(255 * m) for m in config.image_mean)
        image = ImageOps.pad(image, size, Image.Resampling.BICUBIC, color=mean)
    elif config.image_fit == 'squash':
        image = image.resize(size, Image.Resampling.BICUBIC)
    elif config.image_fit == 'crop':
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    else:
        raise ValueError(f'image_fit must be pad, squash or crop, got {config.image_fit!r}')
    side = config.image_size // config.patch_width * config.patch_width  # 384 pixels hold 27 patches of 14: 378
    return image.crop((0, 0, side, side))


def scaled_size(width, height, config):
    """
    The size in pixels, (width, height), at which the encoder looks at a picture: its own if that makes at most
    max_image_tokens tokens, else the largest of the same aspect that does. With line_height, pictures are lines of
    text and are first brought to that height, as readers of text lines always did. Raises ValueError for a picture so
    elongated that the limit would shrink a side of it to less than a quarter of a patch.
    """
    k = cell_size(config)
    cell_w, cell_h = k * config.patch_width, k * config.patch_height
    wanted = config.line_height / height if config.line_height else 1.0
    scale = min(wanted, math.sqrt(config.max_image_tokens * cell_w * cell_h / (width * height)))
    while math.ceil(width * scale / cell_w) * math.ceil(height * scale / cell_h) > config.max_image_tokens:
        scale *= 0.98
    if scale < wanted and (width * scale < config.patch_width / 4 or height * scale < config.patch_height / 4):
        raise ValueError(f'an image of {width}x{height} pixels is too elongated for {config.max_image_tokens} image '
                         'tokens: cut it into pieces or raise max_image_tokens')
    return max(1, round(width * scale)), max(1, round(height * scale))


def frame_line(image):
    """
    A line of text in black on white and without its margins, from the top of its letters to a third of their height
    below the baseline: letters of one font size come out in one size, whatever the margins, the colours and the letters.
    The paper is the commonest grey; ink is what differs from it by more than a quarter of the strongest contrast; the
    baseline is the row below which most ink ends. A picture without ink is returned as it is.
    """
    grey = np.asarray(image.convert('L'), dtype=np.float32)                              # (H, W)
    contrast = np.abs(grey - np.median(grey))
    ink = contrast > max(16, contrast.max() / 4)
    rows, ys, xs = ink.sum(1), np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if not len(xs):
        return image
    left, right, top, middle = int(xs[0]), int(xs[-1]) + 1, int(ys[0]), int(ys[0] + ys[-1]) // 2
    ends = rows - np.append(rows[1:], 0)
    baseline = middle + int(ends[middle:].argmax()) + 1
    line = Image.new('L', (right - left, math.ceil(1.35 * (baseline - top))), 255)
    line.paste(Image.fromarray((255 - contrast * (255 / contrast.max())).astype(np.uint8)), (-left, -top))
    return line.convert('RGB')


def preprocess(image, config):
    """
    Cuts an RGB PIL image into patches, a line of text (line_height) after framing it. Returns
        patches  uint8 (L, patch_height * patch_width * 3), the pixels of each patch
        grid     int64 (L, 2), the row and column of each patch, -1 where the entry is padding
    L is a multiple of k*k: the patches come cell by cell, the k x k of one image token behind one another, so that
    the pool connector is a reshape. `num_tokens` says how many image tokens that makes.
    """
    ph, pw, k = config.patch_height, config.patch_width, cell_size(config)
    if is_tower(config):
        image = squared(image, config)
    else:
        image = frame_line(image) if config.line_height else image
        size = scaled_size(*image.size, config)
        image = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
    pixels = np.asarray(image)                                                           # (H, W, 3)
    rows, cols = math.ceil(pixels.shape[0] / ph), math.ceil(pixels.shape[1] / pw)
    cell_rows, cell_cols = math.ceil(rows / k), math.ceil(cols / k)
    # the last row and column of patches are filled up with the picture's own border, whatever its colour
    room = cell_rows * k * ph - pixels.shape[0], cell_cols * k * pw - pixels.shape[1]
    pixels = np.pad(pixels, ((0, room[0]), (0, room[1]), (0, 0)), mode='edge')
    patches = pixels.reshape(cell_rows, k, ph, cell_cols, k, pw, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    patches = patches.reshape(cell_rows * cell_cols * k * k, ph * pw * 3)                # (L, ph*pw*3)
    y, x = np.mgrid[:cell_rows * k, :cell_cols * k]
    grid = np.stack([y, x], -1).reshape(cell_rows, k, cell_cols, k, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    outside = (grid[:, 0] >= rows) | (grid[:, 1] >= cols)
    patches, grid = torch.from_numpy(patches), torch.from_numpy(np.where(outside[:, None], -1, grid))
    if is_tower(config) and config.vision_cls:  # an entry in front for the class token, which comes of no patch
        patches, grid = F.pad(patches, (0, 0, 1, 0)), F.pad(grid, (0, 0, 1, 0))
    return patches, grid


def num_tokens(image, config):
    """Number of image tokens of a picture: (patches, grid), or (features, grid) if a frozen tower has seen it before."""
    if config.connector == 'qformer':
        return config.n_queries
    x, grid = image
    return len(grid) if x.is_floating_point() else len(grid) // cell_size(config) ** 2


def collate(images, config):
    """
    Pads the pictures of a batch, a list of (patches, grid), to the longest. Returns
        patches  uint8 (N, L, D); of stored features, their dtype
        grid     int64 (N, L, 2), -1 at padding
    No pictures at all become one that is nothing but padding: it adds no token, but the vision parameters stay part
    of the graph, so that a batch of text on one rank does not leave the others waiting for gradients.
    """
    if not images:
        patches, grid = preprocess(Image.new('RGB', (config.patch_width, config.patch_height)), config)
        images = [(patches, torch.full_like(grid, -1))]
    first = images[0][0]
    length = max(len(p) for p, _ in images)
    patches = torch.zeros(len(images), length, first.shape[1], dtype=first.dtype)
    grid = torch.full((len(images), length, 2), -1)
    for i, (p, g) in enumerate(images):
        patches[i, :len(p)], grid[i, :len(g)] = p, g
    return patches, grid


# -----------------------------------------------------------------------------
# the encoder

class Block(nn.Module):
    """A pre-norm Transformer block with bidirectional attention: every patch sees all patches of its own image."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width)
        self.attn_proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, 4 * width)
        self.mlp_proj = nn.Linear(4 * width, width)

    def forward(self, x, mask):
        N, L, C = x.shape
        q, k, v = (t.view(N, L, self.n_head, C // self.n_head).transpose(1, 2)           # (N, nh, L, hs)
                   for t in self.c_attn(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                      # not causal: a picture has no order
        x = x + self.attn_proj(y.transpose(1, 2).reshape(N, L, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class ViT(nn.Module):
    """
    Patches to features. A patch knows its place by the sum of a row and a column embedding, so any grid within
    max_image_tokens cells works and no position table has to be interpolated.
    """

    def __init__(self, config):
        super().__init__()
        if config.vision_n_embd % config.vision_n_head:
            raise ValueError(f'vision_n_embd ({config.vision_n_embd}) must be a multiple of vision_n_head '
                             f'({config.vision_n_head})')
        width, places = config.vision_n_embd, config.max_image_tokens * cell_size(config)
        self.width = width
        self.patch_embed = nn.Linear(config.patch_height * config.patch_width * 3, width)
        self.row_embed = nn.Embedding(places, width)
        self.col_embed = nn.Embedding(places, width)
        self.h = nn.ModuleList([Block(width, config.vision_n_head) for _ in range(config.vision_n_layer)])
        self.ln_f = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if name.endswith('_proj.weight'):  # as in GPT-2: each residual branch starts small
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.vision_n_layer))
            elif name.startswith('h.') and p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)
        # neighbouring places start out similar: sines and cosines, learnt from there on
        for table in (self.row_embed, self.col_embed):
            with torch.no_grad():
                table.weight.copy_(sinusoids(places, width))

    def forward(self, patches, grid):
        valid = grid[..., 0] >= 0                                                        # (N, L)
        x = self.patch_embed(1 - patches.to(self.patch_embed.weight.dtype) / 255)        # (N, L, C), white is 0
        row, col = grid.clamp(min=0).unbind(-1)
        x = x + self.row_embed(row) + self.col_embed(col)
        # a key must be a patch, not padding; each sees itself: not every kernel forgives a query without any key
        mask = valid[:, None, None, :] | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)  # (N, 1, L, L)
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x)                                                              # (N, L, C)


def sinusoids(length, width, scale=0.3, period=200):
    """(length, width) table of sines and cosines of falling frequency, of the usual RMS of an embedding, `scale`."""
    angle = torch.arange(length)[:, None] * torch.exp(-math.log(period) * torch.arange(width // 2) / (width // 2))
    return math.sqrt(2) * scale * F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, width % 2))


class Tower(nn.Module):
    """
    The image tower of a model that others have trained, with its weights, and frozen unless vision_lr says otherwise:

        ViT-L-14-quickgelu/openai          open_clip's name and its tag; CLIP, SigLIP, SigLIP2, PE-Core, EVA, ...
        ViT-L-14-quickgelu/FILE            the same with weights from a local file
        hf-hub:ORG/REPO, local-dir:FOLDER  as open_clip knows them
        timm/vit_small_patch14_dinov2.lvd142m, timm/NAME/FILE       any image model of timm

    Its features are those of layer vision_layer: -2, the penultimate, is LLaVA's choice (the last one has been made for a
    single vector); -1 is the last, behind the tower's own final norm. vision_cls keeps the class token, as a first image
    token. What `preprocess` has to know of the tower (image_size, patch size, mean and std) is written into the config.

    Raises ValueError if there is no such model, its weights cannot be had, or its name asks for another activation than
    its weights were trained with: OpenAI's need the names with "quickgelu".
    """

    def __init__(self, config, load=True):
        super().__init__()
        if config.vision_cls and config.connector == 'pool':
            raise ValueError('vision_cls and connector pool exclude one another: a class token is in no cell of patches')
        self.config = config
        try:
            self.tower, seen = open_tower(config.vision_encoder, load)
        except ValueError:
            raise
        except Exception as error:  # open_clip, timm and the hub's client have many of their own
            raise ValueError(f'{config.vision_encoder} cannot be loaded ({str(error).splitlines()[0]}): a name like '
                             'ViT-L-14-quickgelu/openai is downloaded once, so connect, or name a file of its weights, '
                             '--vision_encoder=ViT-L-14-quickgelu/FILE.safetensors') from error
        trunk = getattr(self.tower, 'trunk', self.tower)  # open_clip wraps timm's towers
        if config.vision_cls and not getattr(trunk, 'num_prefix_tokens', hasattr(trunk, 'class_embedding')):
            raise ValueError(f'{config.vision_encoder} has no class token: leave vision_cls out')
        if not config.image_size:
            config.image_size, config.image_mean, config.image_std = seen
        self.eval()
        with torch.no_grad():  # one look at nothing tells the grid and the width of any tower, Transformer or not
            _, self.width, self.side, _ = self.look(torch.zeros(1, 3, config.image_size, config.image_size))[0].shape
        config.patch_height = config.patch_width = config.image_size // self.side
        grid = preprocess(Image.new('RGB', (8, 8)), config)[1][int(config.vision_cls):]
        place = torch.where(grid[:, 0] < 0, 10**9, grid[:, 0] * self.side + grid[:, 1])
        # where in the order of `preprocess`, which is cell by cell, the patches stand that the tower wants row by row
        self.register_buffer('order', place.argsort()[:self.side ** 2] + int(config.vision_cls), persistent=False)

    def look(self, x):
        """Pixels (N, 3, S, S), normalised, to the chosen layer's features (N, C, rows, cols) and the class token or None."""
        last = self.config.vision_layer == -1
        kinds = dict(indices=[self.config.vision_layer], output_fmt='NCHW', intermediates_only=True, stop_early=True)
        cls = self.config.vision_cls
        if hasattr(self.tower, 'preprocess_cfg'):  # open_clip's
            out = self.tower.forward_intermediates(x, normalize_intermediates=last, output_extra_tokens=cls, **kinds)
            x, prefix = out['image_intermediates'][0], out.get('image_intermediates_prefix', [None])[0]
        else:
            x = self.tower.forward_intermediates(x, norm=last, **kinds, **({'return_prefix_tokens': True} if cls else {}))[0]
            x, prefix = x if cls else (x, None)
        return x, prefix

    def forward(self, patches, grid):
        config, side, p = self.config, self.side, self.config.patch_width
        N, L, _ = patches.shape
        x = patches[:, self.order].view(N, side, side, p, p, 3).permute(0, 5, 1, 3, 2, 4)  # (N, 3, side, p, side, p)
        x = x.reshape(N, 3, side * p, side * p).float() / 255
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (config.image_mean, config.image_std))
        rim = config.image_size - side * p  # pixels behind the last whole patch, which no patch looks at
        x, prefix = self.look(F.pad((x - mean) / std, (0, rim, 0, rim)))
        out = x.new_zeros(N, L, self.width)
        out[:, self.order] = x.flatten(2).transpose(1, 2)                                # (N, L, C)
        if prefix is not None:
            out[:, 0] = prefix[:, 0]
        return out

    def train(self, mode=True):
        """Frozen, it stays in eval mode, whatever is called on the model around it."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))


def open_tower(name, load):
    """The named image tower, and its (image size, mean, std). Without `load` its weights are random, nothing is read."""
    if name.startswith('timm/'):
        import timm
        model, _, path = name[5:].partition('/')
        if not timm.is_model(model):
            raise ValueError(f'{name} is not a model of timm{nearest(model.partition(".")[0], timm.list_models())}')
        tower = timm.create_model(model, pretrained=load, num_classes=0,
                                  pretrained_cfg_overlay=dict(file=local(path)) if path else None)
        data = timm.data.resolve_model_data_config(tower)
        return tower, (data['input_size'][-1], data['mean'], data['std'])
    import open_clip  # takes some seconds
    if name.startswith(('hf-hub:', 'local-dir:')):
        tower = open_clip.create_model(name, load_weights=load, require_pretrained=load).visual
    else:
        model, _, tag = name.partition('/')
        wants, known = open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
        if wants is None:
            raise ValueError(f'{name} is not a model of open_clip{nearest(model, open_clip.list_models())}')
        if not known and load:  # a file; its configuration is beside it if it came from the hub
            beside = os.path.join(os.path.dirname(local(tag)), 'open_clip_config.json')
            if os.path.isfile(beside):
                with open(beside, encoding='utf-8') as f:
                    published = json.load(f)
                known = {**published.get('preprocess_cfg', {}), 'quick_gelu': published['model_cfg'].get('quick_gelu', False)}
        if known and known.get('quick_gelu', False) != wants.get('quick_gelu', False):
            other = model.replace('-quickgelu', '') if wants.get('quick_gelu') else f'{model}-quickgelu'
            raise ValueError(f'{name} would run with another activation than its weights were trained with: take {other}/{tag}')
        # the text tower comes along, and is forgotten on leaving this line
        colours = {key: known[key] for key in ('mean', 'std') if known and key in known}
        tower = open_clip.create_model(model, pretrained=tag if load else None, pretrained_text=False, require_pretrained=load,
                                       force_preprocess_cfg=colours).visual
    seen = tower.preprocess_cfg
    size = seen['size'] if isinstance(seen['size'], int) else seen['size'][0]
    return tower, (size, tuple(seen['mean']), tuple(seen['std']))


def nearest(word, words):
    near = difflib.get_close_matches(word, words, n=3)
    return f': did you mean {" or ".join(near)}?' if near else ''


def local(path):
    """The path, if there is such a file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path!r} is neither a tag of its weights nor a file')
    return path


def fingerprint(tensors):
    """16 hex digits that tell one set of named tensors from another; a checkpoint that leaves them out names them by it."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# the connector

def pool(x, grid, k):
    """Features (N, L, C) to the mean of each cell of k x k patches (N, L / k^2, C), and which cells hold any, bool."""
    N, L, C = x.shape
    valid = (grid[..., 0] >= 0).view(N, L // k**2, k**2, 1)                              # (N, L', k*k, 1)
    # a cell at the border of a picture holds fewer patches: its mean is over those
    mean = (x.view(N, L // k**2, k**2, C) * valid).sum(2) / valid.sum(2).clamp(min=1)    # (N, L', C)
    return mean, valid.any(2).squeeze(-1)


class Attention(nn.Module):
    """Multi-head attention of x to `context`, which is x itself or an image, and the sum of both, normalised as in BERT."""

    def __init__(self, width, context_width, n_head):
        super().__init__()
        self.n_head = n_head
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(context_width, width), nn.Linear(context_width, width)
        self.proj = nn.Linear(width, width)
        self.ln = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, context, mask):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2)                    # (N, nh, T or L, hs)
                   for t in (self.q(x), self.k(context), self.v(context)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.ln(x + self.proj(y.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """BERT's: two layers, and the sum with what they were given, normalised."""

    def __init__(self, width):
        super().__init__()
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ln = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        return self.ln(x + self.proj(F.gelu(self.fc(x))))


class QFormerBlock(nn.Module):
    """
    Queries and text go through one self-attention, whose mask says who sees whom. Then the ways part: queries look at the
    image, if this layer does, and each kind has a feed-forward network of its own.
    """

    def __init__(self, config, image_width, looks, reads):
        super().__init__()
        width, n_head = config.qformer_n_embd, config.qformer_n_head
        self.attn = Attention(width, width, n_head)
        self.cross_attn = Attention(width, image_width, n_head) if looks else None
        self.query_mlp = FeedForward(width)
        self.text_mlp = FeedForward(width) if reads else None

    def forward(self, x, n_queries, mask, image, image_mask):
        x = self.attn(x, x, mask)                                                        # (N, K + T, C)
        queries, text = x[:, :n_queries], x[:, n_queries:]
        if n_queries:
            if self.cross_attn is not None:
                queries = self.cross_attn(queries, image, image_mask)
            queries = self.query_mlp(queries)
        return torch.cat([queries, self.text_mlp(text)], dim=1) if text.shape[1] else queries


def qformer_mask(kind, n_queries, valid):
    """
    Who sees whom in the Q-Former's self-attention, bool (N, 1, K + T, K + T), for texts of which `valid`, bool (N, T), is not
    padding. Rows look, columns are looked at; here with two queries and three tokens:

        itc  q q t t t      itm  q q t t t      itg  q q t t t
           q 1 1 . . .         q 1 1 1 1 1         q 1 1 . . .
           q 1 1 . . .         q 1 1 1 1 1         q 1 1 . . .
           t . . 1 1 1         t 1 1 1 1 1         t 1 1 1 . .
           t . . 1 1 1         t 1 1 1 1 1         t 1 1 1 1 .
           t . . 1 1 1         t 1 1 1 1 1         t 1 1 1 1 1

    itc  neither kind sees the other: what two vectors have in common must not have been whispered across
    itm  everyone sees everyone: do they belong together?
    itg  the text is written word by word, from what the queries have seen, and they must not see it
    """
    N, T = valid.shape
    K = n_queries
    mask = torch.ones(K + T, K + T, dtype=torch.bool, device=valid.device)
    if kind in ('itc', 'itg'):
        mask[:K, K:] = False
    if kind == 'itc':
        mask[K:, :K] = False
    elif kind == 'itg':
        mask[K:, K:] = mask[K:, K:].tril()
    real = F.pad(valid, (K, 0), value=True)[:, None, None, :]                            # (N, 1, 1, K + T)
    return mask & real | torch.eye(K + T, dtype=torch.bool, device=valid.device)  # each sees itself, padding too


class QFormer(nn.Module):
    """
    BLIP-2's Querying Transformer: n_queries learned vectors that ask an image, and what they have found. A BERT in which
    every qformer_cross-th layer, from the first on, lets the queries look at the image. With vocab_size > 0 it reads text
    too, which the first stage of training needs; as a connector it does not.

    forward(image (N, L, D), valid (N, L), ids (N, T)) -> queries (N, K, C), text (N, T, C). Without an image (None) there are
    no queries, without ids no text. ids are padded with -1, image tokens by `valid`; kind as in `qformer_mask`.
    """

    def __init__(self, config, image_width, vocab_size=0, block_size=0):
        super().__init__()
        width, n_layer = config.qformer_n_embd, config.qformer_n_layer
        if width % config.qformer_n_head:
            raise ValueError(f'qformer_n_embd ({width}) must be a multiple of qformer_n_head ({config.qformer_n_head})')
        if config.n_queries < 1 or n_layer < 1 or config.qformer_cross < 1:
            raise ValueError('a Q-Former needs n_queries, qformer_n_layer and qformer_cross of at least 1')
        self.ln_image = nn.LayerNorm(image_width, eps=1e-6)
        self.queries = nn.Parameter(torch.empty(config.n_queries, width))
        self.wte = nn.Embedding(vocab_size, width) if vocab_size else None
        self.wpe = nn.Embedding(block_size, width) if vocab_size else None
        self.ln_embed = nn.LayerNorm(width, eps=1e-12)
        self.h = nn.ModuleList([QFormerBlock(config, image_width, i % config.qformer_cross == 0, vocab_size > 0)
                                for i in range(n_layer)])
        for name, p in self.named_parameters():  # as BERT's
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, image=None, valid=None, ids=None, kind='itc'):
        N = len(image if ids is None else ids)
        K = 0 if image is None else len(self.queries)
        x = self.queries[:K].expand(N, -1, -1)                                           # (N, K, C)
        real = torch.ones(N, 0, dtype=torch.bool, device=x.device) if ids is None else ids >= 0  # (N, T)
        if ids is not None:
            text = self.wte(ids.clamp(min=0)) + self.wpe.weight[:ids.shape[1]]           # (N, T, C)
            x = torch.cat([x, text], dim=1)
        x, mask = self.ln_embed(x), qformer_mask(kind, K, real)
        if image is not None:
            image = self.ln_image(image)
            # a picture that is only padding has nothing to be looked at, but softmax wants something
            valid = valid | ~valid.any(1, keepdim=True)
            valid = valid[:, None, None, :]                                              # (N, 1, 1, L)
        for block in self.h:
            x = block(x, K, mask, image, valid)
        return x[:, :K], x[:, K:]


class Connector(nn.Module):
    """
    Features (N, L, C) to embeddings (N, L, n_embd).

    linear   one matrix: LLaVA's first
    mlp      Linear, GELU, Linear: LLaVA-1.5's mlp2x_gelu
    pool     the same mlp, on what `pool` has left
    qformer  the same mlp, on the queries of a Q-Former
    """

    def __init__(self, config, width):
        super().__init__()
        if config.connector not in ('linear', 'mlp', 'pool', 'qformer'):
            raise ValueError(f'connector must be linear, mlp, pool or qformer, got {config.connector!r}')
        out = nn.Linear(width if config.connector == 'linear' else config.n_embd, config.n_embd)
        self.net = nn.Sequential(out) if config.connector == 'linear' else nn.Sequential(
            nn.Linear(width, config.n_embd), nn.GELU(), out)

    def forward(self, x):
        return self.net(x)


class Vision(nn.Module):
    """
    Encoder and connector: (patches, grid) of a batch -> embeddings (N, L', n_embd) and their validity (N, L'). In the place
    of patches there may be the pooled features of a frozen tower, stored before: the tower then has nothing to do.
    `load` reads a tower's weights; if they come from a checkpoint there is no need to.
    """

    def __init__(self, config, load=True):
        super().__init__()
        if config.vision_encoder != 'vit' and not is_tower(config):
            raise ValueError('vision_encoder must be vit, a tower of open_clip like ViT-L-14-quickgelu/openai, or one of '
                             f'timm like timm/vit_small_patch14_dinov2.lvd142m, got {config.vision_encoder!r}')
        self.config = config
        self.encoder = Tower(config, load) if is_tower(config) else ViT(config)
        # without a GPT behind it, in BLIP-2's first stage, there is nothing to connect to, and the Q-Former reads text itself
        alone = config.objective != 'lm'
        self.qformer = self.connector = None
        if alone or config.connector == 'qformer':
            self.qformer = QFormer(config, self.encoder.width, (config.vocab_size + 2) * alone, config.block_size)
        if not alone:
            self.connector = Connector(config, config.qformer_n_embd if self.qformer else self.encoder.width)
        if is_tower(config) and load:
            found = fingerprint(self.encoder.state_dict())
            if config.vision_fingerprint not in ('', found):
                raise ValueError(f'{config.vision_encoder}: these are not the weights that the model was trained with '
                                 f'(fingerprint {found}, expected {config.vision_fingerprint})')
            config.vision_fingerprint = found

    def features(self, patches, grid):
        """What the connector or the Q-Former gets: (N, L', C), and which of it is real."""
        if patches.is_floating_point():  # stored before
            return patches.float(), grid[..., 0] >= 0
        return pool(self.encoder(patches, grid), grid, cell_size(self.config))

    def forward(self, patches, grid):
        x, valid = self.features(patches, grid)
        if self.qformer is not None:
            x, _ = self.qformer(x, valid)
            valid = valid.any(1, keepdim=True).expand(-1, x.shape[1])  # all queries of a picture, none of mere padding
        return self.connector(x), valid

    @torch.no_grad()
    def take(self, state, source):
        """
        The small ViT and the Q-Former of another model's state_dict become this one's, whichever it has; the connector stays.
        A Q-Former's text side is taken only where there is one on both sides. Raises ValueError if one of them has other
        tensors than this one's, which are listed.
        """
        theirs = {name.removeprefix('vision.'): p for name, p in state.items() if name.startswith('vision.')}
        text = ('wte.', 'wpe.', 'text_mlp.')
        own, wrong = {}, []
        for name, p in self.state_dict().items():
            part = name.partition('.')[0]
            if part == 'connector' or not any(n.startswith(part + '.') for n in theirs):
                continue
            is_text = any(word in name for word in text) and part == 'qformer'
            if name in theirs and theirs[name].shape == p.shape:
                own[name] = theirs.pop(name)
            elif name in theirs:
                wrong.append(f'{name} is {tuple(theirs.pop(name).shape)}, not {tuple(p.shape)}')
            elif not is_text:
                wrong.append(f'missing {name}')
        wrong += [f'unexpected {name}' for name in theirs if name.partition('.')[0] in ('encoder', 'qformer')
                  and hasattr(self, name.partition('.')[0]) and not any(word in name for word in text)]
        if wrong or not own:
            raise ValueError(f'{source} does not hold the eyes that this run asks for: ' +
                             ('; '.join(wrong) or 'neither a small ViT nor a Q-Former'))
        self.load_state_dict(own, strict=False)
        return sorted({name.partition('.')[0] for name in own})

    @torch.no_grad()
    def match_rms(self, rms):
        """
        Scales the connector's last layer so that image tokens enter a trained GPT as large as its token embeddings, RMS
        `rms`, measured on a seeded picture of soft blots. A GPT is deaf to what is much smaller, and far too large
        a vector at the start drowns the words around it.
        """
        blots = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(blots).resize((224, 224), Image.Resampling.BICUBIC)
        emb, valid = self(*collate([preprocess(image, self.config)], self.config))
        last = self.connector.net[-1]
        scale = rms / emb[valid].square().mean().sqrt()
        last.weight.mul_(scale)
        last.bias.mul_(scale)
