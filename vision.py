"""
Images -> image tokens: everything between a picture and the embeddings that the GPT reads.

    preprocess   a PIL image -> its patches as bytes, and where each stands                 (on the CPU, per image)
    collate      the images of a batch, padded to one length                                (on the CPU, per batch)
    ViT          patches -> features: a small Vision Transformer, trained from scratch      (the encoder)
    Connector    features -> embeddings as wide as the GPT's: linear, mlp or pool           (the connector)
    Vision       encoder and connector in one module: what `GPT.vision` is

Native resolution: a picture keeps its size and aspect and becomes as many patches as it takes, up to a limit; a batch
of them is padded, and attention never looks at the padding. No square crops, no interpolated position grids.

This file imports nothing of the project. `config` is any object with the fields that model.py's GPTConfig lists under
"vision"; another encoder (a frozen CLIP, say) is one more entry in ENCODERS and one more branch in `preprocess`.

References:
1) ViT: https://arxiv.org/abs/2010.11929
2) NaViT, patches of images of many sizes in one batch: https://arxiv.org/abs/2307.06304
3) LLaVA-1.5, the two-layer MLP connector: https://arxiv.org/abs/2310.03744
"""

import math

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# a picture becomes patches


def cell_size(config):
    """Side, in patches, of the square of patches that becomes one image token: pool_size for `pool`, else 1."""
    return config.pool_size if config.connector == 'pool' else 1


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
    the pool connector is a reshape. `num_tokens(grid, config)` says how many image tokens that makes.
    """
    ph, pw, k = config.patch_height, config.patch_width, cell_size(config)
    if config.line_height:
        image = frame_line(image)
    size = scaled_size(*image.size, config)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
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
    return torch.from_numpy(patches), torch.from_numpy(np.where(outside[:, None], -1, grid))


def num_tokens(grid, config):
    """Number of image tokens that the connector makes of a picture with this grid."""
    return len(grid) // cell_size(config) ** 2


def collate(images, config):
    """
    Pads the pictures of a batch, a list of (patches, grid), to the longest. Returns
        patches  uint8 (N, L, D)
        grid     int64 (N, L, 2), -1 at padding
    No pictures at all become one that is nothing but padding: it adds no token, but the vision parameters stay part
    of the graph, so that a batch of text on one rank does not leave the others waiting for gradients.
    """
    n, k = max(1, len(images)), cell_size(config)
    length = max((len(p) for p, _ in images), default=k * k)
    patches = torch.zeros(n, length, config.patch_height * config.patch_width * 3, dtype=torch.uint8)
    grid = torch.full((n, length, 2), -1)
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


ENCODERS = {'vit': ViT}

# -----------------------------------------------------------------------------
# the connector

class Connector(nn.Module):
    """
    Features (N, L, C) to embeddings (N, L', n_embd) and which of them are real, bool (N, L').

    linear  one matrix: LLaVA's first
    mlp     Linear, GELU, Linear: LLaVA-1.5's mlp2x_gelu
    pool    the mean over each cell of k x k patches, then mlp: L' = L / k^2
    """

    def __init__(self, config, width):
        super().__init__()
        if config.connector not in ('linear', 'mlp', 'pool'):
            raise ValueError(f'connector must be linear, mlp or pool, got {config.connector!r}')
        self.group = cell_size(config) ** 2
        out = nn.Linear(width if config.connector == 'linear' else config.n_embd, config.n_embd)
        self.net = nn.Sequential(out) if config.connector == 'linear' else nn.Sequential(
            nn.Linear(width, config.n_embd), nn.GELU(), out)

    def forward(self, x, grid):
        N, L, C = x.shape
        valid = (grid[..., 0] >= 0).view(N, L // self.group, self.group, 1)              # (N, L', k*k, 1)
        x = x.view(N, L // self.group, self.group, C)
        # a cell at the border of a picture holds fewer patches: its mean is over those
        x = (x * valid).sum(2) / valid.sum(2).clamp(min=1)                               # (N, L', C)
        return self.net(x), valid.any(2).squeeze(-1)


class Vision(nn.Module):
    """Encoder and connector: (patches, grid) of a batch -> embeddings (N, L', n_embd) and their validity (N, L')."""

    def __init__(self, config):
        super().__init__()
        if config.vision_encoder not in ENCODERS:
            raise ValueError(f'vision_encoder must be one of {", ".join(ENCODERS)}, got {config.vision_encoder!r}')
        self.encoder = ENCODERS[config.vision_encoder](config)
        self.connector = Connector(config, self.encoder.width)

    def forward(self, patches, grid):
        return self.connector(self.encoder(patches, grid), grid)
