"""
A GPT from random weights learns to read pictures it has never seen, on any laptop, in minutes; nothing is downloaded.

    torchrun train.py config/quickstart.py
    python sample.py --out_dir=out/quickstart --image line.png

RESULT
"""
out_dir = 'out/quickstart'
dataset = 'pydoc'
tokenizer = 'bytes'
tasks = 'read:1'
image_width = 512     # a line of 16 to 32 characters, the picture as wide as the line,
image_height = 24     # which the encoder brings to line_height: small letters of every sub-pixel phase
min_chars = 16
max_chars = 32
grow_iters = 200      # reading begins with short words
vision_encoder = 'vit'
connector = 'linear'
line_height = 14      # from the top of the letters to below the baseline
patch_height = 14     # one row of patches,
patch_width = 8       # a bit more than a letter each
max_image_tokens = 40
vision_n_layer = 2
vision_n_head = 4
vision_n_embd = 128
block_size = 128      # more than it needs: config/render_continue_cpu.py goes on from here
min_span = 32         # of the plain text that text_loss is measured on
max_span = 62
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
max_iters = 550
eval_interval = 275
eval_samples = 512
