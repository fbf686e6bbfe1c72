"""
A Q-Former's first stage on real pictures without a download: 1,252 emoji of an installed font, and what Unicode calls them.

    python prepare_data.py emoji                  # apt install fonts-noto-color-emoji, or --source=FONT
    python train.py config/emoji_cpu.py
    python train.py config/emoji_caption_cpu.py   # and a GPT names them

Two cores of an Intel Xeon at 2.5 GHz, 2026-11-21, Noto Color Emoji 2.042: 7.7 minutes. Among 134 emoji with names that it has
never read, recall@1, 5, 10: 9.0, 14.2, 19.4 % from picture to name, 8.2, 14.9, 17.9 % back (chance 0.7, 3.7, 7.5 %); on one
core, which adds in another order, 8.2, 14.2, 17.9 and 9.7, 17.2, 20.1 %. It recognises kinds; a third of their words occur in
no other name.
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
