"""
The path of vlm_sft.py on a laptop: conversations about pictures in LLaVA's format, a small encoder, a small GPT.

    python prepare_data.py shapes
    python train.py config/vlm_cpu.py
"""
out_dir = 'out/vlm_cpu'
dataset = 'shapes'
tokenizer = 'data/shapes/words.txt'  # whole words, and bytes for what else may come
vision_encoder = 'vit'
connector = 'linear'
patch_height = 16
patch_width = 16
max_image_tokens = 16   # of a picture of 64 x 64
vision_n_layer = 3
vision_n_head = 4
vision_n_embd = 128
block_size = 256
n_layer = 4
n_head = 4
n_embd = 128
batch_size = 64
optimizer = 'muon'
learning_rate = 1e-3
vision_lr = 1e-3
connector_lr = 1e-3
muon_lr = 0.008
min_lr = 1e-5
weight_decay = 0.01
warmup_iters = 20
max_iters = 1600
eval_interval = 400
eval_samples = 1000
