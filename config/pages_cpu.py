"""
Pages from 1:4 to 4:1 at 64 image tokens, native: torchrun train.py config/pages_cpu.py; padded to squares: with
--out_dir=out/pages_cpu_padded --image_size=64. One core of an AMD EPYC (Zen 4) each, 2026-11-26, 14 minutes, 512 held-out
pages: native CER 5.9 %, 70 % exact; padded 59.8 %, 0.2 %: its letters of a page of 4:1 are 6 pixels high."""
out_dir = 'out/pages_cpu'
image_width = 64           # pixels of the page, if it is a square
image_height = 64
max_aspect = 4.0           # it keeps its area: 128 x 32 to 32 x 128
one_line = False
min_chars = 4
max_chars = 16
font_min = 10
font_max = 12
length_warmup_iters = 300  # short texts first
vision_encoder = 'vit'
connector = 'linear'
patch_height = 8
patch_width = 8
max_image_tokens = 64
vision_n_layer = 3
vision_n_head = 4
vision_n_embd = 128
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
position = 'rope'
qk_norm = True
batch_size = 32
optimizer = 'muon'
muon_lr = 0.012
learning_rate = 2e-3
vision_lr = 2e-3
connector_lr = 2e-3
min_lr = 2e-5
weight_decay = 0.01
warmup_iters = 20
max_iters = 2000
eval_interval = 2000
eval_samples = 512
