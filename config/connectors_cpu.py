"""
Which connector? A frozen text GPT with LoRA learns to read lines through each of them. README has the results.

    python train.py config/text_bytes.py && python train.py config/qformer_cpu.py
    python train.py config/connectors_cpu.py --max_iters=3000 --eval_interval=1000       # Q-Former of the first stage
    python train.py config/connectors_cpu.py --connector=linear --out_dir=out/linear18   # encoder of the first stage
    python train.py config/connectors_cpu.py --connector=linear --vision_from= --out_dir=out/linear
    python train.py config/connectors_cpu.py --connector=pool --vision_from= --patch_width=2 --out_dir=out/pool
Tried for the Q-Former: Muon instead of AdamW for LoRA, not faster; LoRA of rank 16 at 2e-3, CER 79 % after 300 steps.
"""
out_dir = 'out/connectors_cpu'
init_from = 'out/text_bytes/ckpt.pt'
vision_from = 'out/qformer_cpu/ckpt.pt'  # '' trains an encoder from scratch, of these sizes
image_width = 512
image_height = 24
length_warmup_iters = 120
vision_encoder = 'vit'
connector = 'qformer'
line_height = 13
patch_height = 13
patch_width = 4
max_image_tokens = 64
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
max_iters = 1500
