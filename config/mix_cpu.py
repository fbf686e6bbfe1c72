"""
One small model learns three things at once: to read drawn lines, to answer questions about drawn shapes, and plain
conversations about sums, for which it calls a calculator. Nothing is downloaded.

    python prepare_data.py shapes && python prepare_data.py sums
    python prepare_data.py tokenizer --dataset='shapes sums' --vocab_size=1024
    python train.py config/mix_cpu.py
    python sample.py --out_dir=out/mix_cpu --prompt "Ann has 17 books. Ann gets 25 more. How many are there?"
"""
out_dir = 'out/mix_cpu'
dataset = 'pydoc@0.5 shapes@0.35 sums@0.15'
tokenizer = 'data/shapes/tokenizer.json'
calculator = True
char_level = True       # lines are read letter by letter
image_width = 512       # pixels of the box of a line
image_height = 16
length_warmup_iters = 100
vision_encoder = 'vit'
connector = 'linear'
patch_height = 16       # one row of patches of a line, four of shapes
patch_width = 8
max_image_tokens = 40
vision_n_layer = 3
vision_n_head = 4
vision_n_embd = 128
block_size = 256
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
eval_interval = 1000
eval_samples = 384
