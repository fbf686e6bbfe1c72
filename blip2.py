"""
BLIP-2's first stage, https://arxiv.org/abs/2301.12597: encoder and Q-Former (vision.py) learn from images and captions,
without a GPT. A GPT then takes both over (train.py's vision_from).

    QFormerPretraining  a batch of pairs -> the losses of up to three objectives: contrast, matching, generation

It has the contract of model.py's GPT, so train.py trains it and sample.py measures it: which caption belongs to an image?
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

from vision import Vision, group_parameters

class QFormerPretraining(nn.Module):
    """Trains encoder and Q-Former on images and captions by up to three objectives (config.objective), as
    BLIP-2 does; a GPT can then take both over (train.py's vision_from).

        itc  contrast: each image has to find its caption among those of all ranks, and each caption its
             image, by embeddings (proj_dim). Their similarity is that of the query closest to the caption
        itm  matching: does this caption belong to this image? Asked of the pair, of the image with a wrong
             caption and of the caption with a wrong image, both sampled from the micro-batch by similarity
        itg  generation: the caption token by token, from what the queries read

    It has the contract of model.py's GPT, and a GPT's batches: the caption is what is in the loss of a row.
    Two ids of its own, CLS and DEC, are prepended to captions that are compared, and that are generated.
    """

    smoothing = 0.1  # of the labels of ITC and ITG

    def __init__(self, config, load=True):
        super().__init__()
        if config.objective not in ('itc', 'itc+itm', 'itc+itm+itg'):
            raise ValueError(f'objective must be lm, itc, itc+itm or itc+itm+itg, got {config.objective!r}')
        if config.connector != 'qformer':
            raise ValueError(f'objective {config.objective} trains encoder and Q-Former: set '
                             '--connector=qformer and a --vision_encoder')
        self.config = config
        width = config.qformer_n_embd
        self.cls = config.vocab_size
        self.dec = config.vocab_size + 1
        self.vision = Vision(config, load, pretraining=True)
        self.image_proj = nn.Linear(width, config.proj_dim)
        self.text_proj = nn.Linear(width, config.proj_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # one over the temperature
        if 'itm' in config.objective:
            self.itm_head = nn.Linear(width, 2)
        if 'itg' in config.objective:
            self.itg_head = nn.Linear(width, width)  # before the tokens' own embeddings, as BERT's

    param_groups = group_parameters  # the part 'gpt' is the heads
    base_model = None

    def image_embeds(self, images):
        """(patches, grid) of patches.collate_images -> an embedding of length 1 for each query, (N, K, proj_dim)."""
        return self.project_image(*self.vision.features(*images))

    def project_image(self, features, valid):
        queries, _ = self.vision.qformer(features, valid)
        return F.normalize(self.image_proj(queries), dim=-1)                    # (N, K, proj_dim)

    def text_embeds(self, ids):
        """Captions (N, T), padded with -1 -> an embedding of length 1 each, (N, proj_dim)."""
        _, text = self.vision.qformer(ids=self.prepend_token(ids, self.cls))
        return F.normalize(self.text_proj(text[:, 0]), dim=-1)

    def prepend_token(self, ids, token):
        """Captions (N, T) after an opening token, (N, T + 1)."""
        return F.pad(ids, (1, 0), value=token)[:, :self.config.block_size]

    def loss_weight(self, batch):
        """What the losses of a batch are summed over: its pairs."""
        return len(batch['idx'])

    def captions(self, batch):
        """The ids in the loss, (B, block_size), padded with -1. Raises ValueError unless each row has one
        image, counted by its n_queries <image> ids, and a caption.
        """
        idx, targets = batch['idx'], batch['targets']
        n_images = (idx == self.config.image_token).sum(1) / self.config.n_queries  # (B)
        length = (targets >= 0).sum(1)                                          # (B)
        wrong = (n_images != 1) | (length < 2)  # the end token alone is no caption
        if wrong.any():
            raise ValueError(f'objective {self.config.objective} trains on pairs of an image and a caption, '
                             f'but an example has {n_images[wrong][0]:g} images and a caption of '
                             f'{max(0, length[wrong][0] - 1)} tokens')
        order = torch.argsort(targets < 0, dim=1, stable=True)  # brings the caption to the front
        extra = self.config.block_size - targets.shape[1]  # below 0, F.pad crops
        return F.pad(targets.gather(1, order), (0, extra), value=-1)

    def forward(self, batch):
        """Batch of dataloader.collate -> {objective: its mean loss in nats, times the number of pairs}."""
        ids = self.captions(batch)                                              # (B, block_size)
        features, valid = self.vision.features(*batch['images'])
        losses = {}
        losses['itc'], to_text, to_image = self.contrast(features, valid, ids)
        if 'itm' in self.config.objective:
            losses['itm'] = self.match(features, valid, ids, to_text, to_image)
        if 'itg' in self.config.objective:
            losses['itg'] = self.generate(features, valid, ids)
        return {name: loss * len(ids) for name, loss in losses.items()}

    def contrast(self, features, valid, ids):
        """ITC: its loss, and this rank's own similarities image to text and text to image, (B, B) each."""
        B = len(ids)
        image = self.project_image(features, valid)                             # (B, K, D)
        text = self.text_embeds(ids)                                            # (B, D)
        rank = 0
        of_all_ranks = [image, text, ids]
        if self.training and dist.is_initialized():
            rank = dist.get_rank()
            of_all_ranks = [Gather.apply(x) for x in of_all_ranks]
        all_images, all_texts, all_ids = of_all_ranks           # (A, K, D), (A, D), (A, block_size)
        # of two images with the same caption neither is wrong
        same = (ids[:, None] == all_ids).all(-1)                                # (B, A)
        targets = same / same.sum(1, keepdim=True)
        to_text = torch.einsum('bkd,ad->bak', image, all_texts).amax(-1)        # (B, A)
        to_image = torch.einsum('bd,akd->bak', text, all_images).amax(-1)       # (B, A)
        logits = self.logit_scale.exp().clamp(max=100) * torch.cat([to_text, to_image])  # (2 B, A)
        loss = F.cross_entropy(logits.float(), targets.repeat(2, 1), label_smoothing=self.smoothing)
        to_text, to_image = logits[:, rank * B:(rank + 1) * B].chunk(2)         # (B, B) each
        return loss, to_text, to_image

    def match(self, features, valid, ids, to_text, to_image):
        """ITM: matching pairs and hard negatives, 1 to 2. If all captions are the same there are none."""
        same = (ids[:, None] == ids).all(-1)                                    # (B, B)
        own = torch.arange(len(ids), device=ids.device)
        others = own[(~same).any(1)]                                            # (M), those with a negative
        if self.training and not len(others):
            raise ValueError('all captions of a micro-batch are the same: itm needs another; raise batch_size')
        wrong_text = sample_hard_negatives(to_text[others], same[others])       # (M)
        wrong_image = sample_hard_negatives(to_image[others], same[others])     # (M)
        images = torch.cat([own, others, wrong_image])                          # (B + 2 M)
        texts = torch.cat([own, wrong_text, others])                            # (B + 2 M)
        logits = self.matching_logits(features[images], valid[images], ids[texts])
        return F.cross_entropy(logits, (images == texts).long())

    def matching_logits(self, features, valid, ids):
        """Whether image n and caption n, ids (N, T), belong together: (N, 2), no and yes."""
        queries, _ = self.vision.qformer(features, valid, self.prepend_token(ids, self.cls), 'itm')
        return self.itm_head(queries).mean(1).float()

    def generate(self, features, valid, ids):
        """ITG: each token of the caption from the image and the tokens before it."""
        opened = self.prepend_token(ids, self.dec)
        _, x = self.vision.qformer(features, valid, opened, 'itg')
        x = F.gelu(self.itg_head(x[:, :-1]))                                    # (B, T, C)
        logits = F.linear(x, self.vision.qformer.wte.weight)                    # (B, T, vocab_size + 2)
        return F.cross_entropy(logits.float().flatten(0, 1), opened[:, 1:].flatten(), ignore_index=-1,
                               label_smoothing=self.smoothing)

class Gather(torch.autograd.Function):
    """x of all ranks, concatenated. The gradients that the ranks have for this rank's x come back, summed."""

    @staticmethod
    def forward(ctx, x):
        all_x = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(all_x, x.contiguous())
        return torch.cat(all_x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]

@torch.no_grad()
def sample_hard_negatives(similarity, same):
    """For each row of (M, B) one column that is not the same; the more similar, the more likely."""
    weights = similarity.float().softmax(1).masked_fill(same, 0) + 1e-9 * ~same
    return torch.multinomial(weights, 1).squeeze(1)
