"""
A small GPT, from scratch, names emoji through the Q-Former of emoji_cpu.py, whose eyes stay as they are.

    python train.py config/emoji_caption_cpu.py
    python sample.py --out_dir=out/emoji_caption_cpu --eval=emoji

Two cores of an Intel Xeon at 2.5 GHz, 2026-11-21: 1 minute. What so few pictures can teach: of 134 names that it has never
read none is right; BLEU-4 0.02, ROUGE-L 0.09, CIDEr-D 0.17. Loss a token 8.68, with blank pictures 8.88, with those of others
8.84: it sees little. "sun with face" becomes "face with with with open mouth", an artist's palette "horse". Longer training
only learns the 1,252 by heart: val_loss is lowest after 40 steps, at 7.26.
"""
out_dir = 'out/emoji_caption_cpu'
vision_from = 'out/emoji_cpu/ckpt.pt'
dataset = 'emoji'
tokenizer = 'data/emoji/words.txt'
augment = 'crop+colour'
vision_encoder = 'vit'
connector = 'qformer'
block_size = 64
n_layer = 3
n_head = 4
n_embd = 128
dropout = 0.2
batch_size = 64
optimizer = 'muon'
muon_lr = 0.01
learning_rate = 1e-3
vision_lr = 0.0
qformer_lr = 0.0
connector_lr = 1e-3
min_lr = 1e-5
weight_decay = 0.05
warmup_iters = 20
max_iters = 160
eval_interval = 40
eval_samples = 134
