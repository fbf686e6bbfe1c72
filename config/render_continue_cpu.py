"""
Text-only VLM pretraining in small: the middle of a text becomes a picture, and the GPT goes on behind it. How much of what
the hidden words would have told comes through their pixels? Each evaluation says so, as R, next to its controls.

    python train.py config/render_continue_cpu.py

Two cores of an Intel Xeon at 2.5 GHz, 2026-11-21: 13.7 minutes with its three evaluations. At its end, in nats per byte
of the held-out postfixes: 1.399 without the infix, 1.198 with its picture, 1.130 with its text, so R = 0.75. But a picture
of other words gives 0.69 and a white one 0.57: most of R is here to know that, and how much, text was left out, which the
loss without any infix is not told; only 0.06 of it are words that were read. Small wonder: reading itself has come no
further than a CER of 28 %, and what a byte-level model of this size takes from a word for the words behind it is little.
Trust R no further than its distance from R_shuffled.
"""
out_dir = 'out/render_continue_cpu'
dataset = 'pydoc'
tokenizer = 'bytes'
tasks = 'read:0.4 continue:0.3 text:0.3'
min_span = 48
max_span = 88
infix_min = 0.3
infix_max = 0.45
image_width = 512
image_height = 24
min_chars = 12
max_chars = 32
grow_iters = 450
vision_encoder = 'vit'
connector = 'linear'
patch_width = 8
patch_height = 14
line_height = 14
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
eval_interval = 700
eval_iters = 16
eval_samples = 256
