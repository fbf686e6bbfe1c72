"""
Which connector? A text GPT that stays as it is but for LoRA learns to read lines through one connector or another, each of
which makes at most 40 image tokens of a line, the Q-Former 32.

    python train.py config/text_bytes.py
    python train.py config/qformer_cpu.py
    python train.py config/connectors_cpu.py                          # that first stage's encoder and Q-Former
    python train.py config/connectors_cpu.py --connector=linear --out_dir=out/linear       # its encoder alone
    python train.py config/connectors_cpu.py --connector=pool --vision_from= --patch_width=4 --out_dir=out/pool

Two cores of an Intel Xeon at 2.5 GHz, 2026-11-21, one for each of two runs at a time, 7 to 9 minutes a run. 400 steps are too
few to read, and say only how each of them begins; 256 held-out lines:
    connector   CER     val_loss, blank, shuffled
    qformer     70 %    1.09, 2.08, 1.96
    linear      62 %    0.96, 3.62, 2.36
    pool        63 %    0.98, 2.95, 2.28    its encoder from scratch
LoRA of rank 16 at 2e-3: CER 79 % through the Q-Former after 300 steps; at three times this rate it diverges.
"""
out_dir = 'out/connectors_cpu'
init_from = 'out/text_bytes/ckpt.pt'
vision_from = 'out/qformer_cpu/ckpt.pt'
dataset = 'pydoc'
tasks = 'read:1'
image_width = 512
image_height = 24
min_chars = 16
max_chars = 32
grow_iters = 120
min_span = 64
max_span = 126
vision_encoder = 'vit'
connector = 'qformer'
n_queries = 32
qformer_n_layer = 2
qformer_n_head = 4
qformer_n_embd = 128
line_height = 14
patch_height = 14
patch_width = 8
max_image_tokens = 40
vision_n_layer = 2
vision_n_head = 4
vision_n_embd = 128
block_size = 128
batch_size = 64
lora_rank = 64
lora_alpha = 64.0
lora_scope = 'image'
optimizer = 'muon'
learning_rate = 4e-3
vision_lr = 2e-3
qformer_lr = 2e-3
connector_lr = 2e-3
min_lr = 2e-5
weight_decay = 0.01
warmup_iters = 20
max_iters = 400
eval_interval = 200
eval_samples = 256
