"""
draft
"""
out_dir = 'out/emoji_cpu'
dataset = 'emoji'
tokenizer = 'data/emoji/words.txt'
objective = 'itc+itm+itg'
augment = 'crop+colour'
vision_encoder = 'vit'
connector = 'qformer'
patch_height = 12
patch_width = 12
max_image_tokens = 36
vision_n_layer = 3
vision_n_head = 4
vision_n_embd = 128
n_queries = 8
qformer_n_layer = 2
qformer_n_head = 4
qformer_n_embd = 128
align_dim = 128
block_size = 24
batch_size = 64
optimizer = 'muon'
muon_lr = 0.01
learning_rate = 1e-3
vision_lr = 1e-3
qformer_lr = 1e-3
min_lr = 1e-5
weight_decay = 0.05
warmup_iters = 50
max_iters = 900
eval_interval = 300
eval_samples = 1000
eval_iters = 2
