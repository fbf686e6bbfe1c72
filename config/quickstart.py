"""
A GPT and a small ViT from random weights learn to read lines of 16 to 32 characters. Nothing is downloaded.

    torchrun train.py config/quickstart.py
    python sample.py --out_dir=out/quickstart --image line.png

Measured 2026-11-21, 2 cores of an Intel Xeon at 2.5 GHz: 3.7 minutes with three evaluations, 1.6 GB of memory;
CER 2.8 % and 78 % exact on 512 held-out lines; val_loss 0.09, blank 8.0, shuffled 7.7.
Tried: full length from the first step, CER 3.9 % instead of 1.8 %; distort 0.3, 12 % after 560 steps; 3 GPT and 3 ViT
layers, 15.5 % instead of 13.0 % after 250 steps; AdamW 1e-3, 55 % after 200 s, where Muon had 4.5 % after 180 s.
"""
out_dir = 'out/quickstart'
image_width = 512          # pixels of the box of a line
image_height = 24
length_warmup_iters = 100  # short words first
vision_encoder = 'vit'
connector = 'linear'
line_height = 14           # pixels from the top of the letters to below the baseline
patch_height = 14          # one row of patches,
patch_width = 8            # each a bit wider than a letter
max_image_tokens = 40
vision_n_layer = 2
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
max_iters = 900
eval_interval = 900
eval_samples = 512
