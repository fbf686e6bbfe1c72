"""
A text-only GPT on the quickstart's text: nanoGPT's character-level recipe with bytes. Nothing is downloaded.

    python train.py config/text_bytes.py
    python sample.py --out_dir=out/text_bytes --prompt='The "with" statement' --temperature=0.8

Measured 2026-11-21, 2 cores of an Intel Xeon at 2.5 GHz, shared with other work: 4.2 minutes, val_loss 1.20 nats per
byte of held-out topics. The manual repeats its phrases, so do not compare this with the loss on another text.
"""
out_dir = 'out/text_bytes'
dataset = 'pydoc'
tokenizer = 'bytes'
tasks = 'text'
block_size = 128
min_span = 128
max_span = 256      # characters; a span is cut to block_size
n_layer = 4
n_head = 4
n_embd = 128
batch_size = 32
optimizer = 'muon'
learning_rate = 2e-3
min_lr = 2e-5
weight_decay = 0.01
warmup_iters = 20
max_iters = 600
eval_interval = 200
eval_iters = 16
