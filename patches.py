"""
Images -> patches, what an encoder (vision.py) reads: their sizes, squares or native, tiles, and the layout of their tokens.

    preprocess      a PIL image -> its patches as bytes, and the row and column of each
    num_tokens      how many image tokens, and so <image> ids, that makes
    collate_images  the images of a batch, padded to one length

The ViT reads an image at its native resolution: the image keeps its size and aspect and becomes as many patches as it
takes, up to a limit. A batch of them is padded, and attention ignores the padding. Most pretrained encoders were trained on
squares of one size, so their images become such squares, unless image_fit=native asks for the same. Large images can also
be shown in tiles.

config is vision.py's VisionConfig, or model.py's GPTConfig. This file imports nothing of the project.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

def is_pretrained(config):
    """Whether the encoder has published weights: its name has a slash, like ViT-L-14-quickgelu/openai."""
    return '/' in config.vision_encoder

def is_native(config):
    """Whether an image keeps its size and aspect, up to max_image_tokens. Otherwise it becomes a square."""
    return config.image_fit == 'native' if is_pretrained(config) else not config.image_size

def is_deepencoder(config):
    return config.vision_encoder in ('deepencoder', 'deepencoder_tiny')

def keeps_class_token(config):
    """Whether the first image token is the encoder's class token."""
    return config.vision_cls and is_pretrained(config) or config.vision_encoder == 'eva'

def cell_size(config):
    """Side, in patches, of the square that becomes an image token: 4 for deepencoder, pool_size for pool, shuffle; else 1."""
    if is_deepencoder(config):
        return 4
    return config.pool_size if config.connector in ('pool', 'shuffle') else 1

# -----------------------------------------------------------------------------
# sizes, patches, tiles

def preprocess(image, config):
    """Cuts an RGB PIL image into patches. Returns
        patches  uint8 (L, patch_height * patch_width * 3), the pixels of each patch
        grid     int64 (L, 2), the row and column of each patch, -1 where the entry is padding
    The patches come cell by cell, the k x k of one image token next to each other: pooling is a reshape.
    With tiles the whole image comes first, then each tile; the rows and columns are those of one large image, all
    tiles in their places and the whole image below them. Raises ValueError for an image that is too elongated.
    """
    patches, grid = cut_into_patches(resize(image, config), config)
    tiles, rows_of_tiles = cut_into_tiles(image, config)
    if not tiles:
        return patches, grid
    parts = [(patches, grid.where(grid < 0, grid + torch.tensor([rows_of_tiles, 0])))]
    for tile, corner in tiles:
        patches, grid = cut_into_patches(tile, config)
        parts.append((patches, grid.where(grid < 0, grid + torch.tensor(corner))))
    return tuple(map(torch.cat, zip(*parts)))

def cut_into_patches(image, config):
    """`preprocess` of an image, or a tile, that has its size."""
    ph, pw, k = config.patch_height, config.patch_width, cell_size(config)
    width, height = image.size
    rows = k * math.ceil(height / (k * ph))  # of patches, in whole cells
    cols = k * math.ceil(width / (k * pw))
    pixels = np.array(image.crop((0, 0, cols * pw, rows * ph)))                 # (rows * ph, cols * pw, 3)
    # what the image does not fill repeats its last row and column, whatever their color
    pixels[height:] = pixels[height - 1]
    pixels[:, width:] = pixels[:, width - 1:width]
    grid = np.stack(np.indices((rows, cols)), axis=-1)                          # (rows, cols, 2)
    grid[math.ceil(height / ph):] = -1
    grid[:, math.ceil(width / pw):] = -1
    patches = cut(pixels, k, ph, pw)                                            # (L, ph * pw * 3)
    grid = cut(grid, k, 1, 1)                                                   # (L, 2)
    if keeps_class_token(config):  # an entry for the class token, which has no patch
        patches = F.pad(patches, (0, 0, 1, 0))
        grid = F.pad(grid, (0, 0, 1, 0))
    return patches, grid

def cut(array, k, height, width):
    """(H, W, C) -> pieces of height x width as rows of (L, height * width * C), cell by cell of k x k."""
    H, _, C = array.shape
    array = array.reshape(H // (k * height), k, height, -1, k, width, C)
    array = array.transpose(0, 3, 1, 4, 2, 5, 6)            # (rows, cols, k, k, height, width, C)
    return torch.from_numpy(array.reshape(-1, height * width * C))

def cut_into_tiles(image, config):
    """[(tile, (row, column) of its first patch)], and how many rows of patches all tiles have. An image that is not larger
    than a tile has none. The image becomes as many tiles wide and high as fits its aspect best, and is distorted to that.
    """
    size = whole_patches(config.tile_size, config)
    cols, rows = tile_shape(*image.size, config)
    image = image.resize((cols * size, rows * size)) if rows else image
    tiles = []
    for row, col in np.ndindex(rows, cols):
        tile = image.crop((col * size, row * size, (col + 1) * size, (row + 1) * size))
        tiles.append((tile, (row * size // config.patch_height, col * size // config.patch_width)))
    return tiles, rows * size // config.patch_height

def tile_shape(width, height, config):
    """How many tiles an image of this size gets, (in a row, in a column): two to max_tiles in the shape closest to its
    aspect, or (0, 0). Of equal shapes the largest of which the image has more than half the pixels, as in InternVL,
    https://arxiv.org/abs/2404.16821, and DeepSeek-OCR.
    """
    best, best_difference = (0, 0), math.inf
    if config.max_tiles < 2 or max(width, height) <= config.tile_size:
        return best
    shapes = [(cols, rows) for cols, rows in np.ndindex(config.max_tiles + 1, config.max_tiles + 1)
              if 2 <= cols * rows <= config.max_tiles]
    for cols, rows in sorted(shapes, key=math.prod):
        difference = abs(width / height - cols / rows)
        is_filled = width * height > 0.5 * config.tile_size**2 * cols * rows
        if difference < best_difference or difference == best_difference and is_filled:
            best, best_difference = (cols, rows), difference
    return best

def separate_tiles(image, config):
    """SmolVLM's tiles (config.tile_marks), each an image of its own: the tiles row by row, then the whole image; and how many
    rows and columns of tiles there are, 0 if there is only the whole image. The tiles cut an image whose longest side is
    max_image_side, enlarged to whole tiles.
    """
    size = config.image_size
    resize = lambda image, width, height: image.resize((width, height), Image.Resampling.LANCZOS)
    longest = config.max_image_side
    width, height = image.size
    # rounded as SmolVLM's own code rounds
    if width >= height:
        width, height = longest, even(int(longest / (width / height)))
    else:
        width, height = even(int(longest * (width / height))), longest
    image = resize(image, width, height)
    if not config.tile_marks:
        return [resize(image, size, size)], 0, 0
    if width >= height:
        cols = math.ceil(width / size)
        rows = math.ceil(int(cols * size / (width / height)) / size)
    else:
        rows = math.ceil(height / size)
        cols = math.ceil(int(rows * size * (width / height)) / size)
    image = resize(image, cols * size, rows * size)
    if rows == cols == 1:
        return [image], 0, 0
    tiles = [image.crop((col * size, row * size, (col + 1) * size, (row + 1) * size)) for row, col in np.ndindex(rows, cols)]
    return [*tiles, resize(image, size, size)], rows, cols

def even(n):
    return max(1, n + n % 2)

def whole_patches(size, config):
    """The part of a square's side that patches cover: 384 pixels hold 27 patches of 14."""
    return size // config.patch_width * config.patch_width

def resize(image, config):
    """An RGB PIL image at the size at which the encoder reads it, bicubic; squares as image_resample says."""
    if not is_native(config):
        return resize_to_square(image, config)
    if config.line_height:
        image = crop_line(image)
    width, height = scaled_size(*image.size, config)
    if is_pretrained(config):  # it knows whole patches only, so the aspect may change by less than one
        width = config.patch_width * math.ceil(width / config.patch_width)
        height = config.patch_height * math.ceil(height / config.patch_height)
    return image.resize((width, height))

def resize_to_square(image, config):
    """An image as most pretrained encoders take it, image_size x image_size pixels:
        pad     the whole image in its own aspect, the rest filled with the encoder's mean color (LLaVA-1.5)
        squash  the whole image, distorted to a square: uses every pixel of the square, good for pages
        crop    its center, the shorter side whole: what CLIP was trained on; it cuts off a page's margins
    """
    size = config.image_size, config.image_size
    resample = Image.Resampling[config.image_resample.upper()]
    if config.image_fit == 'pad':
        mean = tuple(int(255 * m) for m in config.image_mean)
        image = ImageOps.pad(image, size, resample, color=mean)
    elif config.image_fit == 'squash':
        image = image.resize(size, resample)
    elif config.image_fit == 'crop':
        shorter = min(image.size)
        image = image.resize([int(config.image_size * side / shorter) for side in image.size], resample)
        left, top = ((side - config.image_size) // 2 for side in image.size)
        image = image.crop((left, top, left + config.image_size, top + config.image_size))
    else:
        raise ValueError(f'image_fit must be native, pad, squash or crop, got {config.image_fit!r}')
    whole = whole_patches(config.image_size, config)
    return image.crop((0, 0, whole, whole))

def scaled_size(width, height, config):
    """The size in pixels, (width, height), at which an encoder reads an image that keeps its aspect: its own, or that
    with a height of line_height, if it makes at most max_image_tokens tokens, else the largest that does.
    Raises ValueError if that shrinks one side to less than a quarter of a patch.
    """
    ph, pw, k = config.patch_height, config.patch_width, cell_size(config)
    cell_w = k * pw
    cell_h = k * ph
    wanted = config.line_height / height if config.line_height else 1.0
    scale = min(wanted, math.sqrt(config.max_image_tokens * cell_w * cell_h / (width * height)))
    while math.ceil(width * scale / cell_w) * math.ceil(height * scale / cell_h) > config.max_image_tokens:
        scale *= 0.98
    if scale < wanted and min(width * scale / pw, height * scale / ph) < 1 / 4:
        raise ValueError(f'an image of {width}x{height} pixels is too elongated for '
                         f'{config.max_image_tokens} tokens: cut it into pieces or raise max_image_tokens')
    return max(1, round(width * scale)), max(1, round(height * scale))

def crop_line(image):
    """A line of text in black on white and without its margins, from the top of its letters to a third of
    their height below the baseline: letters of one font size come out in one size, whatever the margins,
    colors and letters. Ink differs from the background by more than a quarter of the strongest contrast.
    The baseline is the row below which most ink ends. An image without ink is returned as it is.
    """
    gray = np.asarray(image.convert('L'))                                       # (H, W)
    background = np.bincount(gray.ravel()).cumsum().searchsorted(gray.size / 2)  # the median, faster
    contrast = np.abs(gray.astype(np.float32) - background)
    ink = contrast > max(16, contrast.max() / 4)
    box = Image.fromarray(ink).getbbox()
    if box is None:
        return image
    left, top, right, bottom = box
    middle = (top + bottom - 1) // 2
    ink_that_ends = -np.diff(ink.sum(1), append=0)                              # (H)
    baseline = middle + int(ink_that_ends[middle:].argmax()) + 1
    black_on_white = (255 - contrast * (255 / contrast.max())).astype(np.uint8)
    line = Image.new('L', (right - left, math.ceil(1.35 * (baseline - top))), 255)
    line.paste(Image.fromarray(black_on_white), (-left, -top))
    return line.convert('RGB')

def num_tokens(image, config):
    """Number of image tokens of an image: (patches, grid), or (features, grid) out of a feature cache."""
    if config.connector == 'qformer':
        return config.n_queries
    x, grid = image
    if x.is_floating_point():
        return len(grid)
    n_newlines = int(grid[:, 0].max()) // cell_size(config) + 2 if config.image_newlines else 0  # one of each row, the end
    return len(grid) // cell_size(config)**2 + n_newlines

# what `arrange` has in the places of an image that hold no token of the encoder
END, NEWLINE, PADDING = -3, -2, -1

def arrange(grid, config):
    """The sequence of an image with newlines: grid (L, 2) -> int64 (P,), the numbers of its tokens row by row, NEWLINE
    after each row and END after the last. Two tiles of 1 x 2 tokens, then the whole image of 1 x 2:

        2 3 4 5 NEWLINE 0 1 NEWLINE END
    """
    row, col = token_cells(grid, config).unbind(1)
    n, n_rows = len(row), int(row.max()) + 1
    right, below = 1 + int(col.max()), n_rows
    row = torch.cat([row, torch.arange(n_rows), torch.tensor([below])])
    col = torch.cat([col, torch.full((n_rows,), right), torch.tensor([0])])
    number = torch.cat([torch.arange(n), torch.full((n_rows,), NEWLINE), torch.tensor([END])])
    return number[(row * (right + 1) + col).argsort()]

def token_cells(grid, config):
    """The row and column of each token, not of newlines: grid (L, 2) -> (L', 2)."""
    k = cell_size(config)
    return grid.unflatten(0, (-1, k**2)).amax(1) // k

def assemble(patches, grid, config):
    """The patches of an image in their places, as an RGB PIL image: what the encoder reads."""
    ph, pw = config.patch_height, config.patch_width
    rows, cols = (grid.amax(0) + 1).tolist()
    canvas = torch.full((rows, cols, ph, pw, 3), 255, dtype=torch.uint8)
    is_patch = grid[:, 0] >= 0
    canvas[tuple(grid[is_patch].T)] = patches[is_patch].view(-1, ph, pw, 3)
    return Image.fromarray(canvas.permute(0, 2, 1, 3, 4).reshape(rows * ph, cols * pw, 3).numpy())

def view_lengths(config):
    """How many patches, with padding, a square image has, and each of its tiles."""
    k = cell_size(config)
    side = lambda size: k * math.ceil(size // config.patch_width / k)
    return side(config.image_size)**2, side(config.tile_size)**2

def collate_images(images, config, fixed_length=False):
    """Pads the images of a batch, a list of (patches, grid), to the longest. Returns
        patches  uint8 (N, L, D); of cached features, their dtype
        grid     int64 (N, L, 2), -1 at padding
        layout   int64 (N, P), as in `arrange`; with image_newlines only
    With fixed_length, L and P are the largest possible and N is at least 2: a compiled model then needs one graph for all
    batches. An empty list becomes one image that is only padding. It adds no token, but the vision parameters get
    gradients of 0: without them, a batch of text on one rank would leave the other ranks waiting.
    """
    if not images:
        patches, grid = preprocess(Image.new('RGB', (1, 1)), config)
        images = [(patches, torch.full_like(grid, -1))]
    patches, grids = zip(*images)
    layouts = [arrange(grid, config) if grid.max() >= 0 else torch.full((1,), PADDING) for grid in grids
               if config.image_newlines]
    patches = pad_sequence(patches, batch_first=True)                           # (N, L, D)
    grid = pad_sequence(grids, batch_first=True, padding_value=-1)              # (N, L, 2)
    length = grid.shape[1]
    if config.max_tiles:  # room for one tile at least: see Vision.encode
        whole, tile = view_lengths(config)
        length = max(length, whole + (config.max_tiles if fixed_length else 1) * tile)
    elif fixed_length and is_native(config):  # squares all have one length
        length = max(length, config.max_image_tokens * cell_size(config)**2 + config.vision_cls)
    # one image would be a graph of its own: torch.compile takes a size of 1 for a constant
    n_missing = max(0, 2 - len(grid)) if fixed_length else 0
    padding = (0, 0, 0, length - grid.shape[1], 0, n_missing)
    patches = F.pad(patches, padding)
    grid = F.pad(grid, padding, value=-1)
    if not config.image_newlines:
        return patches, grid
    layout = pad_sequence(layouts, batch_first=True, padding_value=PADDING)     # (N, P)
    if fixed_length:  # at most a newline for each token
        longest = 2 * length // cell_size(config)**2 + 1
        layout = F.pad(layout, (0, longest - layout.shape[1], 0, n_missing), value=PADDING)
    return patches, grid, layout
