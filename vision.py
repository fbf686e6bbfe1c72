"""
Patches of images -> image tokens: everything between them and the embeddings that the GPT reads.

    VisionConfig        every knob of this file; model.py's GPTConfig extends it
    ViT                 patches -> features: a small Vision Transformer, trained from scratch   (an encoder)
    PublishedViT        patches -> features: the SigLIP, CLIP or EVA of SmolVLM, LLaVA, BLIP-2  (an encoder)
    PretrainedEncoder   patches -> features: CLIP, SigLIP, DINOv2, ... with published weights   (an encoder)
    DeepEncoder         patches -> features: DeepSeek-OCR's, SAM and CLIP, few tokens for pages (an encoder)
    pool                features -> their mean over each cell of k x k patches
    QFormer             features -> a fixed number of queries that have attended to them
    Connector           features or queries -> embeddings as wide as the GPT's: linear or mlp; newlines
    Vision              all of it in one module: what `GPT.vision` is

patches.py cuts the images. It is all that this file imports of the project.

References:
1) ViT: https://arxiv.org/abs/2010.11929
2) NaViT, patches of images of many sizes in one batch: https://arxiv.org/abs/2307.06304
3) LLaVA, a frozen CLIP's penultimate layer: https://arxiv.org/abs/2304.08485
4) LLaVA-1.5, the two-layer MLP connector, and padding to a square: https://arxiv.org/abs/2310.03744
5) BLIP-2, the Q-Former: https://arxiv.org/abs/2301.12597
6) DeepSeek-OCR, how much text fits into an image token: https://arxiv.org/abs/2510.18234
"""

import difflib
import functools
import hashlib
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch.nn import functional as F

from patches import (PADDING, cell_size, collate_images, is_deepencoder, is_native, is_pretrained, keeps_class_token,
                     preprocess, view_lengths)

def derived(default):
    """A field that no user sets: the tokenizer, or a pretrained encoder, determines it."""
    return field(default=default, metadata={'derived': True})

@dataclass
class VisionConfig:
    # the GPT, as far as images and sequences depend on it
    block_size: int = 1024    # positions of a sequence; an image takes one, see image_positions
    vocab_size: int = derived(50304)  # GPT-2's 50257, padded up to a multiple of 64 for efficiency
    n_embd: int = 768
    image_token: int = derived(-1)  # id of <image>
    image_marks: bool = False  # a begin- and an end-of-image token around each image
    # vision
    image_positions: str = ''  # one: all tokens of an image share a position; each has its own; '' takes each for
    #                           deepencoder, else one
    vision_encoder: str = ''  # '' for a text-only GPT, vit (from scratch), deepencoder, deepencoder_tiny (from scratch), or a
    #                           pretrained encoder, like ViT-L-14-quickgelu/openai or timm/vit_small_patch14_dinov2.lvd142m;
    #                           siglip, clip and eva come with published vision-language models
    connector: str = 'mlp'    # linear, mlp, pool, shuffle or qformer
    pool_size: int = 2        # connector pool: k x k patches become one token, their mean; shuffle: side by side
    n_queries: int = 32       # connector qformer: any image becomes as many tokens
    qformer_n_layer: int = 12
    qformer_n_head: int = 12
    qformer_n_embd: int = 768
    qformer_cross_every: int = 2  # every second layer attends to the image, from the first on
    patch_height: int = 16    # pixels
    patch_width: int = 16     # pixels
    max_image_tokens: int = 256  # a larger image is scaled down, keeping its aspect
    line_height: int = 0      # pixels; > 0: every image is a line of text and is first scaled to this height
    vision_n_layer: int = 6
    vision_n_head: int = 6
    vision_n_embd: int = 384
    vision_n_inner: int = 0   # width of the MLP; 0: 4 * vision_n_embd
    vision_layer: int = -2    # of a pretrained encoder: the layer of the features; -1 is the last
    vision_cls: bool = False  # of a pretrained encoder: keep its class token as the first image token
    image_fit: str = ''       # of a pretrained encoder: native, each image keeps its size and aspect, or how it becomes
    #                           a square: pad, squash, crop; '' takes native for timm/naflexvit_*, else pad
    image_size: int = 0       # side of the squares, in pixels; 0: that of the pretrained encoder, and no squares for vit
    max_tiles: int = 0        # of squares: up to so many tiles of a large image come before the whole of it
    tile_size: int = 0        # side of a tile, in pixels; 0: image_size
    tile_marks: bool = False  # SmolVLM's tiles: each is an image of its own, with marks before it, like <row_1_col_2>
    max_image_side: int = 0   # of SmolVLM's images: their longest side is scaled to it first, in pixels
    image_newlines: bool = False  # a trained vector after each row of an image's tokens, and one at its end
    deepencoder_mode: str = ''  # tiny, small, base, large or gundam: size and tiles of its images
    sam_tower: str = 'timm/samvit_base_patch16.sa1b'  # deepencoder's SAM and CLIP, with their weights
    clip_tower: str = 'ViT-L-14-quickgelu/openai'
    image_resample: str = derived('bicubic')  # how the pixels of squares are interpolated; nanoVLM: bilinear
    image_mean: tuple = derived((0.5, 0.5, 0.5))
    image_std: tuple = derived((0.5, 0.5, 0.5))
    # BLIP-2's first stage
    objective: str = 'lm'     # lm trains a GPT; itc, itc+itm, itc+itm+itg train encoder and Q-Former
    proj_dim: int = 256       # width of the embeddings in which images and captions are compared

# -----------------------------------------------------------------------------
# the encoder: a small ViT, trained from scratch

class Freezable(nn.Module):
    """A module that stays in eval mode while all of its weights are frozen."""

    def train(self, mode=True):
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

def attend(q, k, v, n_head, mask):
    """Multi-head attention of q (N, T, C) to k, v (N, L, C); mask: bool, broadcastable to (N, nh, T, L)."""
    q, k, v = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in (q, k, v))  # (N, nh, T or L, hs)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2).flatten(2)                                         # (N, T, C)

def padding_mask(valid):
    """valid (N, L) -> the attention mask (N, 1, 1, L)."""
    # softmax needs something to attend to: in an image that is only padding, the padding
    return (valid | ~valid.any(1, keepdim=True))[:, None, None]

class Block(nn.Module):
    """A pre-norm Transformer block with bidirectional attention."""

    def __init__(self, width, n_head, n_inner=0, eps=1e-5, activation=F.gelu):
        super().__init__()
        self.n_head = n_head
        self.activation = activation
        self.ln_1 = nn.LayerNorm(width, eps)
        self.c_attn = nn.Linear(width, 3 * width)
        self.attn_proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.c_fc = nn.Linear(width, n_inner or 4 * width)
        self.mlp_proj = nn.Linear(n_inner or 4 * width, width)

    def forward(self, x, mask=None):
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)                    # (N, L, C)
        x = x + self.attn_proj(attend(q, k, v, self.n_head, mask))
        return x + self.mlp_proj(self.activation(self.c_fc(self.ln_2(x))))

class ViT(Freezable):
    """Patches to features. The position of a patch is the sum of a row and a column embedding, so any grid
    within max_image_tokens cells works and no position table has to be interpolated.
    """

    fingerprint = ''  # its weights are published nowhere

    def __init__(self, config):
        super().__init__()
        width = config.vision_n_embd
        if width % config.vision_n_head:
            raise ValueError(f'vision_n_embd ({width}) must be a multiple of vision_n_head ({config.vision_n_head})')
        max_length = config.max_image_tokens * cell_size(config)
        self.width = width
        self.patch_embed = nn.Linear(config.patch_height * config.patch_width * 3, width)
        self.row_embed = nn.Embedding(max_length, width)
        self.col_embed = nn.Embedding(max_length, width)
        self.h = nn.ModuleList([Block(width, config.vision_n_head) for _ in range(config.vision_n_layer)])
        self.ln_f = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if name.endswith('_proj.weight'):  # as in GPT-2: each residual branch starts small
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.vision_n_layer))
            elif name.startswith('h.') and p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)
        # neighboring rows and columns start similar: sines and cosines, which are then trained
        for table in (self.row_embed, self.col_embed):
            table.weight.data = sinusoids(max_length, width)

    def forward(self, patches, grid):
        """uint8 patches (N, L, D), grid (N, L, 2) -> features (N, L, C)."""
        x = self.patch_embed(1 - patches.to(self.patch_embed.weight.dtype) / 255)  # (N, L, C), white is 0
        row, col = grid.clamp(min=0).unbind(-1)
        x = x + self.row_embed(row) + self.col_embed(col)
        mask = padding_mask(grid[..., 0] >= 0)                                  # (N, 1, 1, L)
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x)                                                     # (N, L, C)

def quick_gelu(x):
    """The activation that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)

def tanh_gelu(x):
    return F.gelu(x, approximate='tanh')

class PublishedViT(Freezable):
    """The ViT inside a published vision-language model, for squares of one size, by `vision_encoder`:

        siglip  SmolVLM's and nanoVLM's; LLaVA's with SigLIP
        clip    LLaVA's: a class token, which is dropped, a norm before the first layer, another activation
        eva     BLIP-2's: a class token, which is kept

    Layers after vision_layer are left out. A norm after the last comes with the connector shuffle. It is built for weights
    that come next: those here are random.
    """

    fingerprint = ''  # its weights are part of the model's

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.width = width = config.vision_n_embd
        kind = config.vision_encoder
        is_clip = kind == 'clip'
        has_cls = kind in ('clip', 'eva')
        side = config.image_size // config.patch_width
        self.patch_embed = nn.Linear(config.patch_height * config.patch_width * 3, width, bias=not is_clip)
        self.cls = nn.Parameter(torch.randn(width)) if has_cls else None
        self.wpe = nn.Embedding(side**2 + has_cls, width)  # the class token's position is the first
        eps = 1e-5 if is_clip else 1e-6
        activation = {'siglip': tanh_gelu, 'clip': quick_gelu, 'eva': F.gelu}[kind]
        self.ln_pre = nn.LayerNorm(width, eps) if is_clip else nn.Identity()
        n_layer = range(config.vision_n_layer)[config.vision_layer] + 1
        self.h = nn.ModuleList([Block(width, config.vision_n_head, config.vision_n_inner, eps, activation)
                                for _ in range(n_layer)])
        self.ln_post = nn.LayerNorm(width, eps) if config.connector == 'shuffle' else nn.Identity()

    def forward(self, patches, grid):
        """uint8 patches (N, L, D) of whole squares, grid (N, L, 2) -> features (N, L, C). If the class token is kept, it has
        the first entry of all three.
        """
        config = self.config
        n_kept = int(keeps_class_token(config))
        patches, grid = patches[:, n_kept:], grid[:, n_kept:]
        x = patches.unflatten(2, (-1, 3)) / 255                                 # (N, L, D / 3, 3)
        x = (x - x.new_tensor(config.image_mean)) / x.new_tensor(config.image_std)
        row, col = grid.clamp(min=0).unbind(-1)                                 # padding is that of whole images
        position = row * (config.image_size // config.patch_width) + col        # (N, L)
        n_cls = int(self.cls is not None)
        x = self.patch_embed(x.flatten(2)) + self.wpe(position + n_cls)         # (N, L, C)
        if n_cls:
            cls = (self.cls + self.wpe.weight[0]).expand(len(x), 1, -1)
            x = torch.cat([cls, x], dim=1)
        x = self.ln_pre(x)
        for block in self.h:
            x = block(x)
        return self.ln_post(x[:, n_cls - n_kept:])

def sinusoids(length, width):
    """(length, width) table of sines and cosines of falling frequency, with an RMS of 0.3."""
    frequency = torch.exp(-math.log(200) * torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * frequency
    return math.sqrt(2) * 0.3 * torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]

# -----------------------------------------------------------------------------
# the encoder: a published one

class PretrainedEncoder(Freezable):
    """The image tower of a published model, with its weights. The name says which:

        ViT-L-14-quickgelu/openai     open_clip's name and its tag; CLIP, SigLIP, SigLIP2, PE-Core, EVA, ...
        ViT-L-14-quickgelu/FILE       the same with weights from a local file
        hf-hub:ORG/REPO, local-dir:FOLDER                           as in open_clip
        timm/vit_small_patch14_dinov2.lvd142m, timm/NAME/FILE       any image model of timm

    Its features are those of layer vision_layer: -2, the penultimate, is LLaVA's choice, because the last
    layer is specialized in making a single vector; -1 is the last, after the tower's own final norm.
    Parameters without an effect on that layer become buffers: they would never get a gradient, and DDP
    would wait for it. The config has to be complete (`complete_config`). Raises ValueError if there is no
    such model or its weights cannot be read.
    """

    def __init__(self, config, load=True):
        super().__init__()
        if config.vision_cls and cell_size(config) > 1:
            raise ValueError(f'vision_cls does not work with connector {config.connector}: a class token is in no cell')
        self.config = config
        shape = tower_shape(config)
        self.width = shape.width
        self.tower = open_tower(config.vision_encoder, load, shape.new_size)
        for name in shape.unused:
            module_name, _, last = name.rpartition('.')
            module = self.tower.get_submodule(module_name)
            module.register_buffer(last, module._parameters.pop(last).data, persistent=False)
        # identifies weights that are stored elsewhere, under this name
        self.fingerprint = fingerprint(self.tower.state_dict()) if load else ''
        if is_native(config):
            return
        # where the class token and the patches, row by row, are in the order of `preprocess`, cell by cell
        _, grid = preprocess(Image.new('RGB', (8, 8)), config)                  # (L, 2)
        row, col = grid.unbind(-1)
        order = (row * len(grid) + col).argsort(stable=True)  # padding, which is -1, comes first
        self.register_buffer('order', order[(row < 0).sum():], persistent=False)

    def forward(self, patches, grid):
        """uint8 patches (N, L, D), grid (N, L, 2) -> features (N, L, C)."""
        config, p = self.config, self.config.patch_width
        N, L, _ = patches.shape
        x = patches.view(N, L, p * p, 3) / 255
        x = (x - x.new_tensor(config.image_mean)) / x.new_tensor(config.image_std)
        if is_native(config):
            return forward_native(self.tower, x, grid, config)
        side = config.image_size // p
        x = x[:, self.order[-side**2:]].view(N, side, side, p, p, 3)  # without the class token's
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(N, 3, side * p, side * p)
        margin = config.image_size - side * p  # pixels after the last whole patch, which belong to no patch
        x = F.pad(x, (0, margin, 0, margin))                                    # (N, 3, size, size)
        features = forward_features(self.tower, x, config.vision_layer, config.vision_cls)
        out = features.new_zeros(N, L, self.width)  # in their dtype, which autocast may have changed
        out[:, self.order] = features
        return out

def forward_features(tower, x, layer, keep_cls):
    """Normalized pixels (N, 3, S, S) -> features of a layer (N, L, C), class token first, then row by row."""
    is_last = layer == -1
    forward = functools.partial(tower.forward_intermediates, x, indices=[layer], output_fmt='NCHW',
                                intermediates_only=True, stop_early=True)
    if hasattr(tower, 'preprocess_cfg'):  # open_clip's
        out = forward(normalize_intermediates=is_last, output_extra_tokens=keep_cls)
        x = out['image_intermediates'][0]                                       # (N, C, rows, cols)
        prefix = out.get('image_intermediates_prefix', [None])[0]
    elif keep_cls:
        x, prefix = forward(norm=is_last, return_prefix_tokens=True)[0]
    else:
        x = forward(norm=is_last)[0]
    x = x.flatten(2).transpose(1, 2)                                            # (N, rows * cols, C)
    return torch.cat([prefix[:, :1], x], dim=1) if keep_cls else x

# a ViT that was trained on squares reads images of any size, as NaViT and SigLIP2 do: the rows and columns of each image
# extend over the whole table of positions, and its patches attend to each other only

def forward_native(tower, x, grid, config):
    """The same for images of any sizes: normalized patches (N, L, p * p, 3) and grid (N, L, 2), -1 at padding, both with
    an entry for the class token first if config.vision_cls -> features (N, L, C).
    """
    vit = getattr(tower, 'trunk', tower)  # open_clip wraps timm's towers
    n_cls = int(config.vision_cls)
    grid = grid[:, n_cls:]
    x, n_prefix = embed_native(vit, x[:, n_cls:], grid)                         # (N, n_prefix + L, C)
    mask = padding_mask(F.pad(grid[..., 0] >= 0, (n_prefix, 0), value=True))    # (N, 1, 1, n_prefix + L)
    if hasattr(vit, 'class_embedding'):  # open_clip's own
        x = vit.ln_pre(x)
        blocks, norm = vit.transformer.resblocks, vit.ln_post
        # nn.MultiheadAttention wants what is added to the scores of each head
        mask = torch.where(mask, 0.0, -math.inf).expand(-1, blocks[0].attn.num_heads, x.shape[1], -1).flatten(0, 1)
    else:
        x = vit.norm_pre(x)
        blocks, norm = vit.blocks, vit.norm
    last = range(len(blocks))[config.vision_layer]
    for block in list(blocks)[:last + 1]:
        x = block(x, attn_mask=mask)
    if config.vision_layer == -1:
        x = norm(x)
    return torch.cat([x[:, :n_cls], x[:, n_prefix:]], dim=1)

def embed_native(vit, x, grid):
    """What the first layer of a plain ViT of open_clip or timm gets, (N, n_prefix + L, C), and n_prefix: the number of the
    tokens that come before the patches, such as the class token.
    """
    mode = 'bicubic'
    if hasattr(vit, 'class_embedding'):  # open_clip's own
        x = project_patches(vit.conv1, x)                                       # (N, L, C)
        tokens = [vit.class_embedding]
        table = vit.positional_embedding
    elif hasattr(vit, 'embeds'):  # timm's NaFlexVit
        x = vit.embeds.norm(vit.embeds.proj(x.flatten(2)))
        tokens = [vit.embeds.cls_token, vit.embeds.reg_token]
        table = vit.embeds.pos_embed[0].flatten(0, 1)
        mode = vit.embeds.pos_embed_interp_mode
    else:  # timm's VisionTransformer
        x = vit.patch_embed.norm(project_patches(vit.patch_embed.proj, x))
        tokens = [vit.cls_token, vit.reg_token]
        table = vit.pos_embed[0]
    tokens = [token.view(-1, x.shape[2]) for token in tokens if token is not None]
    prefix = torch.cat([table[:0], *tokens])                                    # (n_prefix, C)
    n = len(table) - math.isqrt(len(table))**2  # some tables begin with positions for the prefix
    if n:
        prefix = prefix + table[:n]
    x = x + interpolate_positions(table[n:], grid, mode)
    return torch.cat([prefix.expand(len(x), -1, -1), x], dim=1), len(prefix)

def project_patches(conv, x):
    """A convolution whose stride is its size, on patches (N, L, p * p, 3)."""
    return F.linear(x.flatten(2), conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)

def interpolate_positions(table, grid, mode):
    """The position embeddings (N, L, C) of patches, for which a table (G * G, C) was trained on G x G patches: as
    F.interpolate(mode='bicubic' or 'bilinear', antialias=True) gives them, but for images of different sizes at once.
    """
    side = math.isqrt(len(table))
    shape = grid.amax(1, keepdim=True) + 1  # rows and columns of each image         # (N, 1, 2)
    scale = side / shape.clamp(min=1)
    center = (grid.clamp(min=0) + 0.5) * scale                                  # (N, L, 2), in the table
    distance = torch.arange(side, device=grid.device) + 0.5 - center[..., None]  # (N, L, 2, G)
    x = distance.abs() / scale.clamp(min=1)[..., None]  # an image of fewer patches gets means
    if mode == 'bilinear':
        weight = (1 - x).clamp(min=0)
    else:  # Keys' cubic convolution, https://doi.org/10.1109/TASSP.1981.1163711
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    row, col = (weight / weight.sum(-1, keepdim=True)).unbind(2)                # (N, L, G) each
    return (row[..., :, None] * col[..., None, :]).flatten(2) @ table

def is_plain_vit(vit):
    """Whether `forward_native` computes it: a ViT of open_clip or timm that has one table of positions and no RoPE."""
    if type(vit).__name__ == 'NaFlexVit':
        embeds = vit.embeds
        special = vit.rope is not None or embeds.pos_embed_ar_preserving or embeds.pos_embed_use_grid_sample
        return embeds.pos_embed_type == 'learned' and not special
    if hasattr(vit, 'class_embedding'):
        return hasattr(vit.transformer, 'resblocks')
    return type(vit).__name__ == 'VisionTransformer' and vit.pos_embed is not None

def complete_config(config):
    """The config with what a pretrained encoder determines: the size, mean and std of its images, the size of
    its patches. Reads no weights. Raises ValueError for a wrong name, also for one with another activation
    than its weights were trained with: OpenAI's need the names with "quickgelu".
    """
    if is_deepencoder(config):
        config = complete_deepencoder(config)
    if config.image_positions not in ('', 'one', 'each'):
        raise ValueError(f'image_positions must be one or each, got {config.image_positions!r}')
    if not config.image_fit and (is_pretrained(config) or config.image_size):
        is_naflex = config.vision_encoder.startswith('timm/naflexvit')
        config = replace(config, image_fit='native' if is_naflex else 'pad')
    if is_native(config) and config.image_size:
        raise ValueError('image_size is the side of squares, and with image_fit=native there are none: set '
                         'max_image_tokens, or --image_fit=pad')
    if is_pretrained(config):
        config = replace(config, **tower_shape(config).fields)
    check_newlines_and_tiles(config)
    return replace(config, tile_size=config.tile_size or config.image_size) if config.max_tiles else config

def check_newlines_and_tiles(config):
    """Raises ValueError where they are impossible."""
    if config.image_newlines and (config.connector == 'qformer' or config.vision_cls):
        raise ValueError('image_newlines stand after rows of tokens, and neither the queries of connector qformer nor a '
                         'class token (vision_cls) are in one: leave it out')
    if config.max_tiles and not config.image_newlines:
        raise ValueError('max_tiles needs image_newlines: without them nothing says where in the image a tile is')
    if config.max_tiles and is_native(config):
        raise ValueError('max_tiles is for encoders of squares: set image_size, or image_fit to pad, squash or crop')
    if is_pretrained(config) and config.tile_size not in (0, config.image_size):
        raise ValueError(f'{config.vision_encoder} reads squares of one size: leave tile_size out')

def tower_shape(config):
    """What has to be known of a tower before its weights are read: width of its features; unused, the names of the
    parameters without an effect; fields of the config that it determines; new_size, if it is not the tower's own.
    """
    return find_tower_shape(config.vision_encoder, config.vision_layer, config.vision_cls, config.image_fit == 'native',
                            config.image_size)

@functools.lru_cache
def find_tower_shape(name, layer, keep_cls, native, size):
    """`tower_shape`, by a forward and a backward pass on the meta device, which has shapes and no numbers."""
    published = published_preprocessing(name)
    tower = open_tower(name, load=False, device='meta')
    if name.startswith('timm/'):
        import timm
        own = timm.data.resolve_model_data_config(tower)
        own_size = own['input_size'][-1]
    else:
        own = tower.preprocess_cfg
        own_size = int(np.max(own['size']))  # one number, or height and width
    new_size = size if size != own_size else 0
    size = size or own_size
    if new_size:
        tower = open_tower(name, load=False, new_size=new_size, device='meta')
    trunk = getattr(tower, 'trunk', tower)  # open_clip wraps timm's towers
    if keep_cls and not getattr(trunk, 'num_prefix_tokens', hasattr(trunk, 'class_embedding')):
        raise ValueError(f'{name} has no class token: leave vision_cls out')
    if native and not is_plain_vit(trunk):
        raise ValueError(f'{name} is no plain ViT with a table of positions, so its images have to become squares: set '
                         '--image_fit=pad, squash or crop')
    try:
        x = forward_features(tower.eval(), torch.zeros(1, 3, size, size, device='meta'), layer, keep_cls)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'{name} gives no features at vision_layer {layer}: {error}') from error
    x.sum().backward()
    unused = [name for name, p in tower.named_parameters() if p.grad is None]
    patch = size // math.isqrt(x.shape[1] - keep_cls)
    mean_std = {**own, **published}
    fields = dict(image_size=0 if native else size, image_mean=tuple(mean_std['mean']), image_std=tuple(mean_std['std']),
                  patch_height=patch, patch_width=patch)
    return SimpleNamespace(width=x.shape[2], unused=unused, fields=fields, new_size=new_size)

def split_name(name):
    """An encoder's name as (name of the model in its library, tag or file of its weights)."""
    if name.startswith(('hf-hub:', 'local-dir:')):
        return name, ''
    model, _, weights = name.removeprefix('timm/').partition('/')
    return model, weights

def open_tower(name, load, new_size=0, device='cpu'):
    """The named image tower, for squares of new_size instead of its own size: a table of positions is interpolated, once.
    Without `load` its weights are random and nothing is read.
    """
    model, weights = split_name(name)
    try:
        with torch.device(device):
            if name.startswith('timm/'):
                import timm
                overlay = dict(file=check_file(weights)) if weights and load else None
                size = dict(img_size=new_size) if new_size else {}
                return timm.create_model(model, pretrained=load, num_classes=0, pretrained_cfg_overlay=overlay, **size)
            import open_clip  # takes some seconds
            # the text tower comes along, and is dropped on leaving this line
            return open_clip.create_model(
                model, weights if load else None, load_weights=load, require_pretrained=load,
                pretrained_text=False, force_image_size=new_size or None, device=device).visual
    except Exception as error:  # open_clip, timm and the hub's client raise many of their own
        reason = str(error).partition('\n')[0]
        raise ValueError(f'{name} cannot be loaded ({reason}): connect once to download it, or name a file '
                         'of its weights, like ViT-L-14-quickgelu/FILE.safetensors') from error

def published_preprocessing(name):
    """open_clip's mean, std and quick_gelu of the named weights, or {}. Raises ValueError for a wrong name."""
    model, weights = split_name(name)
    if name.startswith('timm/'):
        import timm
        if not timm.is_model(model):
            raise ValueError(f'{name} is not a model of timm{did_you_mean(model, timm.list_models())}')
        return {}
    if model == name:  # hf-hub: or local-dir:
        return {}
    import open_clip
    if model not in open_clip.list_models():
        raise ValueError(f'{name} is not a model of open_clip{did_you_mean(model, open_clip.list_models())}')
    published = open_clip.get_pretrained_cfg(model, weights) or file_preprocessing(model, weights)
    wants_quick_gelu = open_clip.get_model_config(model).get('quick_gelu', False)
    if published.get('quick_gelu', wants_quick_gelu) != wants_quick_gelu:
        other = model.replace('-quickgelu', '') if wants_quick_gelu else f'{model}-quickgelu'
        raise ValueError(f'{name} would run with another activation than its weights were trained with: take '
                         f'{other}/{weights}')
    return published

def file_preprocessing(model, path):
    """The same of a model's weights in a local file: from the open_clip_config.json next to it, or from the
    model's published weights, if all of them agree. Otherwise {}, and a note says what is assumed.
    """
    import open_clip
    if not path:  # random weights
        return {}
    config_path = Path(check_file(path)).with_name('open_clip_config.json')
    if config_path.is_file():
        config = json.loads(config_path.read_text(encoding='utf-8'))
        quick_gelu = config['model_cfg'].get('quick_gelu', False)
        return {**config.get('preprocess_cfg', {}), 'quick_gelu': quick_gelu}
    tags = open_clip.list_pretrained_tags_by_model(model)
    published = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    if len({(p['mean'], p['std']) for p in published}) == 1:
        return {'mean': published[0]['mean'], 'std': published[0]['std']}
    print(f'note: {path} does not say with which mean and std its images were normalized; CLIP\'s are '
          'assumed: put its open_clip_config.json next to it', file=sys.stderr)
    return {}

def did_you_mean(word, words):
    close = difflib.get_close_matches(word, words, n=3)
    return f': did you mean {" or ".join(close)}?' if close else ''

def check_file(path):
    """The path, if there is such a file."""
    if not Path(path).is_file():
        raise ValueError(f'{path!r} is neither a tag of its weights nor a file')
    return path

def fingerprint(tensors):
    """16 hex digits that identify a set of named tensors, for a checkpoint that leaves them out."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

# -----------------------------------------------------------------------------
# the encoder: DeepSeek-OCR's. Few tokens hold a page, because SAM reads its patches mostly in small windows, which is
# cheap, and only a 16th as many tokens reach CLIP, whose attention is global

# as published; base and large keep the aspect, tiny and small do not. gundam is base with tiles of small
DEEPENCODER_MODES = {
    'tiny': dict(image_size=512, image_fit='squash'),  # 64 tokens, 73 with newlines
    'small': dict(image_size=640, image_fit='squash'),  # 100, 111
    'base': dict(image_size=1024, image_fit='pad'),  # 256, 273
    'large': dict(image_size=1280, image_fit='pad'),  # 400, 421
    'gundam': dict(image_size=1024, image_fit='pad', max_tiles=9, tile_size=640),
}

def complete_deepencoder(config):
    """`complete_config` for a DeepEncoder. Raises ValueError for a size that its tokens do not fill."""
    # positions of their own: 43 instead of 53 % CER on pages (config/compress_cpu.py), because newlines then have places, too
    fixed = dict(image_newlines=config.connector != 'qformer', image_positions=config.image_positions or 'each')
    if config.vision_encoder == 'deepencoder':
        fixed |= dict(patch_height=16, patch_width=16)
        if config.deepencoder_mode:
            if config.deepencoder_mode not in DEEPENCODER_MODES:
                raise ValueError(f'deepencoder_mode must be {", ".join(DEEPENCODER_MODES)}, got {config.deepencoder_mode!r}')
            fixed |= DEEPENCODER_MODES[config.deepencoder_mode]
            if config.image_size not in (0, fixed['image_size']):
                raise ValueError(f'deepencoder_mode {config.deepencoder_mode} has images of {fixed["image_size"]} pixels, not '
                                 f'{config.image_size}: set one of deepencoder_mode and image_size')
    config = replace(config, **fixed)
    token = 4 * config.patch_width  # pixels of a token's side
    for name in ('image_size', 'tile_size'):
        size = getattr(config, name)
        if size % token or not size and name == 'image_size':
            raise ValueError(f'{config.vision_encoder} needs an {name} that is a multiple of {token}, got {size}')
    if config.patch_height != config.patch_width:
        raise ValueError(f'{config.vision_encoder} has square patches: set patch_height and patch_width to the same')
    if config.connector in ('pool', 'shuffle'):
        raise ValueError(f'{config.vision_encoder} makes few tokens by itself: set --connector=linear, mlp or qformer')
    return config

class Compressor(nn.Module):
    """Two convolutions, nothing between them, each of half the rows and columns: 16 times fewer tokens."""

    def __init__(self, width, new_width):
        super().__init__()
        self.conv_1 = nn.Conv2d(width, new_width // 2, 3, stride=2, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(new_width // 2, new_width, 3, stride=2, padding=1, bias=False)

    def forward(self, x):
        return self.conv_2(self.conv_1(x))                                      # (N, new_width, rows / 4, cols / 4)

class DeepEncoder(Freezable):
    """SAM reads the pixels, a compressor makes one token of 4 x 4 patches, and CLIP, whose own patches are not used, reads
    these tokens. The features are CLIP's and the compressor's side by side: what is where, and how it looks. SAM, the
    compressor and CLIP have learning rates of their own. Squares of any size: both tables of positions are interpolated.
    """

    fingerprint = ''  # the compressor is published nowhere, so a checkpoint holds all weights

    def __init__(self, config, load=True):
        super().__init__()
        self.config = config
        if config.vision_encoder == 'deepencoder':
            self.sam = open_tower(config.sam_tower, load)
            clip = open_tower(config.clip_tower, load)
        else:
            self.sam, clip = small_towers(config)
        for module in self.sam.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # SAM's; timm has 1e-5
        del clip.conv1, clip.ln_post, clip.proj  # what has no effect would wait for gradients that never come
        self.clip = clip
        width = clip.class_embedding.shape[0]
        self.compressor = Compressor(self.sam.num_features, width)
        self.width = 2 * width

    def forward(self, patches, grid):
        """uint8 patches (N, L, D) of whole squares -> features (N, L / 16, C), row by row. The grid is not needed."""
        config, p = self.config, self.config.patch_width
        q = math.isqrt(patches.shape[1]) // 4  # tokens in a row
        x = patches.view(-1, q, q, 4, 4, p, p, 3)  # the patches of a token are next to each other
        x = x.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5).flatten(2, 4) / 255    # (N, 3, 4 q p, 4 q p)
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
        x = self.compressor(self.sam.forward_features((x - mean) / std))        # (N, width, q, q)
        x = x.flatten(2).mT                                                     # (N, q * q, width)
        return torch.cat([self.read(x), x], dim=2)                              # (N, q * q, 2 width)

    def read(self, x):
        """CLIP's last layer, without its final norm, of tokens (N, q * q, C) in place of patches."""
        clip = self.clip
        cls = clip.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + resize_positions(clip.positional_embedding, x.shape[1])
        return clip.transformer(clip.ln_pre(x))[:, 1:]

def resize_positions(table, length):
    """A table of positions (1 + G * G, C), the class token's first, for squares of `length` tokens; bicubic."""
    if len(table) == 1 + length:
        return table
    side = math.isqrt(len(table) - 1)
    new_side = math.isqrt(length)
    x = table[1:].float().T.view(1, -1, side, side)
    x = F.interpolate(x, (new_side, new_side), mode='bicubic', antialias=True)  # (1, C, new_side, new_side)
    return torch.cat([table[:1], x.flatten(2)[0].T.to(table.dtype)])

def small_towers(config):
    """A SAM and a CLIP of the same structure with random weights, of vision_n_layer layers each. SAM's last layer, and every
    fourth before it, attends to the whole image. CLIP is 4/3 as wide as SAM and four times as wide as its neck.
    """
    from open_clip.transformer import QuickGELU, VisionTransformer
    from timm.models.vision_transformer_sam import VisionTransformerSAM
    width, n_layer, n_head = config.vision_n_embd, config.vision_n_layer, config.vision_n_head
    clip_width = 4 * width // 3
    if width % 3 or width % n_head or clip_width % n_head:
        raise ValueError(f'deepencoder_tiny is vision_n_embd ({width}) and 4/3 of that wide: both have to be multiples of '
                         f'vision_n_head ({n_head})')
    sam = VisionTransformerSAM(
        config.image_size, config.patch_width, num_classes=0, embed_dim=width, depth=n_layer, num_heads=n_head, window_size=8,
        global_attn_indexes=tuple(range(n_layer - 1, -1, -4)), use_rel_pos=True, neck_chans=clip_width // 4)
    clip = VisionTransformer(config.image_size, 4 * config.patch_width, clip_width, n_layer, n_head, 4, act_layer=QuickGELU)
    return sam, clip

# -----------------------------------------------------------------------------
# the connector

def pool(x, grid, k):
    """Features (N, L, C) -> the mean of each cell of k x k patches (N, L', C), and which have any (N, L')."""
    valid = (grid[..., :1] >= 0).unflatten(1, (-1, k**2))                       # (N, L', k*k, 1)
    # a cell at the border of an image holds fewer patches: its mean is over those
    total = (x.unflatten(1, (-1, k**2)) * valid).sum(2)                         # (N, L', C)
    return total / valid.sum(2).clamp(min=1), valid.any(2).squeeze(-1)

class Attention(nn.Module):
    """Multi-head attention of x to `context`, x itself or an image; residual and post-norm as in BERT."""

    def __init__(self, width, context_width, n_head):
        super().__init__()
        self.n_head = n_head
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(context_width, width)
        self.v = nn.Linear(context_width, width)
        self.proj = nn.Linear(width, width)
        self.ln = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, context, mask):
        y = attend(self.q(x), self.k(context), self.v(context), self.n_head, mask)
        return self.ln(x + self.proj(y))

class FeedForward(nn.Module):
    """BERT's: two layers, residual and post-norm."""

    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)
        self.ln = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        return self.ln(x + self.proj(F.gelu(self.fc(x))))

class QFormerBlock(nn.Module):
    """Queries and text share one self-attention, whose mask says which attends to which. Then queries attend
    to the image, if this layer has cross-attention. Queries and text have their own feed-forward networks.
    """

    def __init__(self, config, image_width, has_cross_attn, has_text_mlp):
        super().__init__()
        width, n_head = config.qformer_n_embd, config.qformer_n_head
        self.attn = Attention(width, width, n_head)
        self.cross_attn = Attention(width, image_width, n_head) if has_cross_attn else None
        self.query_mlp = FeedForward(width)
        self.text_mlp = FeedForward(width) if has_text_mlp else None

    def forward(self, x, n_queries, mask, image, image_mask):
        x = self.attn(x, x, mask)                                               # (N, K + T, C)
        queries = x[:, :n_queries]
        text = x[:, n_queries:]
        if n_queries:
            if self.cross_attn is not None:
                queries = self.cross_attn(queries, image, image_mask)
            queries = self.query_mlp(queries)
        return torch.cat([queries, self.text_mlp(text)], dim=1) if text.shape[1] else queries

def qformer_mask(objective, n_queries, is_token):
    """Which position attends to which in the Q-Former's self-attention, bool (N, 1, K + T, K + T); is_token
    (N, K + T) is False at padding. A row attends to the columns with a 1; here with two queries and three
    tokens:

        itc  q q t t t      itm  q q t t t      itg  q q t t t
           q 1 1 . . .         q 1 1 1 1 1         q 1 1 . . .
           q 1 1 . . .         q 1 1 1 1 1         q 1 1 . . .
           t . . 1 1 1         t 1 1 1 1 1         t 1 1 1 . .
           t . . 1 1 1         t 1 1 1 1 1         t 1 1 1 1 .
           t . . 1 1 1         t 1 1 1 1 1         t 1 1 1 1 1

    itc  image and caption are compared as two embeddings: no information may leak between them
    itm  do image and caption match? Everything attends to everything
    itg  the caption is generated token by token from the queries, which must not attend to it
    """
    mask = is_token.new_ones(is_token.shape[1], is_token.shape[1])              # (K + T, K + T)
    if objective != 'itm':
        mask[:n_queries, n_queries:] = False
    if objective == 'itc':
        mask[n_queries:, :n_queries] = False
    if objective == 'itg':
        mask[n_queries:, n_queries:].tril_()
    return mask & is_token[:, None, None]

class QFormer(Freezable):
    """BLIP-2's Querying Transformer: a BERT in which n_queries trained vectors attend to an image in every
    qformer_cross_every-th layer, from the first on, and carry what they read. With vocab_size > 0 it reads
    text too, which the first stage of training needs.

    forward(image (N, L, D), valid (N, L), ids (N, T)) -> queries (N, K, C), text (N, T, C). Without an
    image (None) there are no queries, without ids no text. ids are padded with -1; objective as in
    `qformer_mask`.
    """

    def __init__(self, config, image_width, vocab_size=0):
        super().__init__()
        width = config.qformer_n_embd
        if width % config.qformer_n_head:
            raise ValueError(f'qformer_n_embd ({width}) must be a multiple of qformer_n_head ({config.qformer_n_head})')
        if min(config.n_queries, config.qformer_n_layer, config.qformer_cross_every) < 1:
            raise ValueError('n_queries, qformer_n_layer and qformer_cross_every must be at least 1')
        self.ln_image = nn.LayerNorm(image_width, eps=1e-6)
        self.queries = nn.Parameter(torch.empty(config.n_queries, width))
        if vocab_size:
            self.wte = nn.Embedding(vocab_size, width)
            self.wpe = nn.Embedding(config.block_size, width)
        self.ln_embed = nn.LayerNorm(width, eps=1e-12)
        self.h = nn.ModuleList()
        for i in range(config.qformer_n_layer):
            has_cross_attn = i % config.qformer_cross_every == 0
            self.h.append(QFormerBlock(config, image_width, has_cross_attn, has_text_mlp=vocab_size > 0))
        for name, p in self.named_parameters():  # as BERT's
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, image=None, valid=None, ids=None, objective='itc'):
        N = len(image if ids is None else ids)
        K = 0 if image is None else len(self.queries)
        x = self.queries[:K].expand(N, -1, -1)                                  # (N, K, C)
        is_token = x.new_ones(N, K, dtype=torch.bool)
        if ids is not None:
            text = self.wte(ids.clamp(min=0)) + self.wpe.weight[:ids.shape[1]]  # (N, T, C)
            x = torch.cat([x, text], dim=1)
            is_token = torch.cat([is_token, ids >= 0], dim=1)                   # (N, K + T)
        x = self.ln_embed(x)
        mask = qformer_mask(objective, K, is_token)
        if image is not None:
            image = self.ln_image(image)
            valid = padding_mask(valid)                                         # (N, 1, 1, L)
        for block in self.h:
            x = block(x, K, mask, image, valid)
        return x[:, :K], x[:, K:]

class Connector(Freezable):
    """Features (N, L, C) to embeddings (N, L, n_embd). `linear`: one matrix, LLaVA's first. `shuffle`: one matrix on k x k
    features side by side, SmolVLM's. The others are LLaVA-1.5's two layers: on all features (mlp), on their means (pool), on
    a Q-Former's queries (qformer). image_newlines are added to the embeddings, as in DeepSeek-OCR.
    """

    def __init__(self, config, width):
        super().__init__()
        if config.connector not in ('linear', 'mlp', 'pool', 'shuffle', 'qformer'):
            raise ValueError(f'connector must be linear, mlp, pool, shuffle or qformer, got {config.connector!r}')
        layers = [nn.Linear(width, config.n_embd, bias=config.connector != 'shuffle')]
        if config.connector not in ('linear', 'shuffle'):
            layers += [nn.GELU(), nn.Linear(config.n_embd, config.n_embd)]
        self.net = nn.Sequential(*layers)
        if config.image_newlines:
            self.newline = nn.Parameter(torch.randn(config.n_embd) / math.sqrt(config.n_embd))
            self.end = nn.Parameter(torch.randn(config.n_embd) / math.sqrt(config.n_embd))

    def forward(self, x):
        return self.net(x)

    def add_newlines(self, x, layout):
        """Embeddings (N, L, C) in the order of `arrange`, with newlines: layout (N, P) -> (N, P, C)."""
        marks = torch.stack([self.end, self.newline, self.end])  # at L + END, L + NEWLINE, L + PADDING, of L + 3
        x = torch.cat([x, marks.to(x.dtype).expand(len(x), -1, -1)], dim=1)     # (N, L + 3, C)
        index = layout.remainder(x.shape[1])                                    # (N, P)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

class Vision(nn.Module):
    """Encoder and connector: the images of a batch (patches.collate_images) -> embeddings (N, P, n_embd), and which are
    valid (N, P). Cached features of a frozen encoder can stand in place of the patches: the encoder is then skipped.
    load=False reads no published weights: those of a checkpoint come next. With pretraining=True, in
    BLIP-2's first stage, there is no GPT to connect to, and the Q-Former reads text itself.
    """

    def __init__(self, config, load=True, pretraining=False):
        super().__init__()
        self.config = config
        if is_pretrained(config):
            self.encoder = PretrainedEncoder(config, load)
        elif is_deepencoder(config):
            self.encoder = DeepEncoder(config, load)
        elif config.vision_encoder in ('siglip', 'clip', 'eva') and config.image_size:
            with torch.device('cpu' if load else 'meta'):  # where weights come next, random ones take no memory
                self.encoder = PublishedViT(config)
        elif config.vision_encoder == 'vit':
            self.encoder = ViT(config)
        else:
            raise ValueError('vision_encoder must be vit, deepencoder, deepencoder_tiny, an encoder of open_clip like '
                             f'ViT-L-14-quickgelu/openai, or timm/NAME, got {config.vision_encoder!r}')
        width = self.encoder.width
        if config.connector == 'shuffle':
            width *= config.pool_size**2
        self.qformer = None
        if config.connector == 'qformer':
            self.qformer = QFormer(config, width, config.vocab_size + 2 if pretraining else 0)
            width = config.qformer_n_embd
        self.connector = None if pretraining else Connector(config, width)

    def encode(self, patches, grid):
        """Features of the patches, or for deepencoder of its tokens: (N, L, C)."""
        if not self.config.max_tiles:
            return self.encoder(patches, grid)
        n, n_of_tile = view_lengths(self.config)
        whole = self.encoder(patches[:, :n], from_zero(grid[:, :n]))            # (N, L', C)
        tiles = patches[:, n:].unflatten(1, (-1, n_of_tile))                    # (N, n_tiles, n_of_tile, D)
        grids = grid[:, n:].unflatten(1, (-1, n_of_tile))                       # (N, n_tiles, n_of_tile, 2)
        is_tile = grids[..., 0, 0] >= 0                                         # (N, n_tiles)
        is_tile[0, 0] = True  # all ranks run the encoder twice: FSDP's wait for each other
        x = self.encoder(tiles[is_tile], from_zero(grids[is_tile]))
        features = x.new_zeros(*is_tile.shape, *x.shape[1:])
        features[is_tile] = x
        return torch.cat([whole, features.flatten(1, 2)], dim=1)

    def features(self, patches, grid, layout=None):
        """The input of the connector or the Q-Former: features (N, L', C), and which are valid (N, L')."""
        if patches.is_floating_point():  # out of a feature cache
            return patches.float(), grid[..., 0] >= 0
        k = cell_size(self.config)
        x = self.encode(patches, grid)
        if self.config.connector == 'pool':
            return pool(x, grid, k)
        valid = (grid[..., 0] >= 0).unflatten(1, (-1, k**2))                    # (N, L', k * k)
        if self.config.connector == 'shuffle':
            x = (x.unflatten(1, (-1, k**2)) * valid[..., None]).flatten(2)      # (N, L', k * k * C)
        return x, valid.any(2)

    def forward(self, patches, grid, layout=None):
        x, valid = self.features(patches, grid)
        if self.qformer is not None:
            x, _ = self.qformer(x, valid)
            valid = valid.any(1, keepdim=True).expand(-1, x.shape[1])  # none of mere padding
        x = self.connector(x)
        if layout is None:
            return x, valid
        return self.connector.add_newlines(x, layout), layout != PADDING

    @torch.no_grad()
    def match_rms(self, rms):
        """Scales the connector's last layer so that the embeddings of a seeded image have the RMS of the GPT's
        token embeddings, `rms`, and its newlines too. If they are much smaller or larger, training starts badly.
        """
        blots = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
        image = Image.fromarray(blots).resize((224, 224))
        patches, grid, *_ = collate_images([preprocess(image, self.config)], self.config)
        emb, valid = self(patches, grid)
        scale = rms / emb[valid].square().mean().sqrt()
        for p in self.connector.net[-1].parameters():
            p.mul_(scale)
        if self.config.image_newlines:
            for p in (self.connector.newline, self.connector.end):
                p.mul_(rms / p.square().mean().sqrt())

def from_zero(grid):
    """Rows and columns (N, L, 2) of a view, -1 at padding, counted from its own first patch."""
    return grid.where(grid < 0, grid - grid[:, :1])

# parts of names: what a Q-Former has and BERT does not. The MLPs of the queries start as copies of BERT's
QFORMER_NEW = ('.queries', '.cross_attn.', '.ln_image.')

def group_parameters(model):
    """{part: {name: parameter}} of a model: the parts that can have a learning rate each, in the order of the data. `vision`
    is the encoder, or deepencoder's CLIP, `qformer_new` what QFORMER_NEW lists of the Q-Former.
    """
    groups = {part: {} for part in ('sam', 'compressor', 'vision', 'qformer_new', 'qformer', 'connector', 'gpt')}
    for name, p in model.named_parameters():
        vision, part, module = (name.split('.') + ['', ''])[:3]
        if vision != 'vision':
            part = 'gpt'
        elif part == 'encoder':
            part = module if module in groups else 'vision'
        elif part == 'qformer' and any(new in name for new in QFORMER_NEW):
            part = 'qformer_new'
        groups[part][name] = p
    return groups
