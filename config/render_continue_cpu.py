"""
Text-only VLM pretraining at a small size: the middle of a text becomes an image, and the GPT continues after it.

    python train.py config/render_continue_cpu.py
Measured 2026-11-21, 2 cores of an Intel Xeon at 2.5 GHz: 13.7 minutes, R 0.75, R_shuffled 0.69, R_blank 0.57, CER 28 %.
Only 0.06 of R are words that were read; most of R is the fact that text is missing.
"""
out_dir = 'out/render_continue_cpu'
tasks = 'ocr:0.4 continuation:0.3 text:0.3'
min_span = 48
max_span = 88
infix_min = 0.3
infix_max = 0.45
image_width = 512
image_height = 24
min_chars = 12
length_warmup_iters = 450
vision_encoder = 'vit'
connector = 'linear'
line_height = 14
patch_height = 14
patch_width = 8
max_image_tokens = 40
vision_n_layer = 2
vision_n_head = 4
vision_n_embd = 128
block_size = 96
n_layer = 4
n_head = 4
n_embd = 128
batch_size = 64
optimizer = 'muon'
learning_rate = 2e-3
vision_lr = 2e-3
connector_lr = 2e-3
min_lr = 2e-5
weight_decay = 0.01
warmup_iters = 20
max_iters = 1400
eval_iters = 16
