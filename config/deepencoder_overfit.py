"""
overfit.py with DeepSeek-OCR's encoder in small: is it wired right, from the file to the loss? CER has to become 0.

    python train.py config/deepencoder_overfit.py
    python train.py config/deepencoder_overfit.py --dataset=olmocr --block_size=2048   # the first ten of a dataset of yours

Measured 2026-11-26, one core of an AMD EPYC: 108 s of CPU time, CER 0.
"""
out_dir = 'out/deepencoder_overfit'
dataset = 'assets/tasks'
overfit_rows = 10
calculator = True
vision_encoder = 'deepencoder_tiny'
image_size = 256            # 16 x 16 patches, 16 tokens, 21 places
patch_height = patch_width = 16
connector = 'linear'
vision_n_layer = 2
vision_n_embd = 96
vision_n_head = n_layer = n_head = 4
n_embd = 128
block_size = 512
position = 'rope'
qk_norm = True
batch_size = 10
optimizer = 'muon'
learning_rate = vision_lr = connector_lr = 3e-3
weight_decay = 0.0
warmup_iters = 10
max_iters = 200
eval_interval = 200
eval_iters = 1
eval_samples = 10
