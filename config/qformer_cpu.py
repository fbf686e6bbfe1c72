"""
A Q-Former's first stage on a laptop: images of lines of text, with the lines as captions. Nothing is downloaded.

    python train.py config/qformer_cpu.py
    python sample.py --out_dir=out/qformer_cpu --eval=pydoc --eval_samples=1000

Measured 2026-11-25, 2 cores of an AMD EPYC: 5.2 minutes with five evaluations; recall@1 among 1,000 held-out pairs
96.5 % image to caption, 95.3 % back (chance 0.1 %), mean cosine of two images 0.76. Rounding decides which hard
negatives are sampled: earlier runs had 94.0 to 96.8 %.
"""
out_dir = 'out/qformer_cpu'
objective = 'itc+itm+itg'
image_width = 512
image_height = 24
vision_encoder = 'vit'
connector = 'qformer'
line_height = 14
patch_height = 14
patch_width = 8
max_image_tokens = 40
vision_n_layer = 2
vision_n_head = 4
vision_n_embd = 128
qformer_n_layer = 2
qformer_n_head = 4
qformer_n_embd = 128
proj_dim = 128
block_size = 36      # <|user|><image><|assistant|>, 32 characters, the end token
batch_size = 64
optimizer = 'muon'
learning_rate = 2e-3
vision_lr = 2e-3
qformer_lr = 2e-3
min_lr = 2e-5
weight_decay = 0.01
warmup_iters = 20
max_iters = 560
eval_interval = 140
eval_samples = 1000
eval_iters = 2
