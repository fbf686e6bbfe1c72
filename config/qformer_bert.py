"""
A Q-Former's first stage on one GPU: BERT-base learns to attend to a frozen ViT-B/16, from 50,000 pairs of Conceptual
Captions. Its queries and cross-attention, which are new, learn ten times as fast as what is BERT's.

    python prepare_data.py cc3m --max_examples=50000 --val_every=50   # 1,000 of them are held out
    python train.py config/qformer_bert.py
    python train.py config/vlm_qformer.py --vision_from=out/qformer_bert/ckpt.pt                 # the second stage

Pairs, epochs, encoder and rates are those of https://github.com/avbiswas/vlm, objectives and the rest BLIP-2's; batches
have 64 pairs, not 8, because each pair is compared with the others. Not run yet. Computed, not measured: 1.3e17
operations, which take four hours at 9 TFLOP/s, and about 15 GiB. qformer_cpu.py is the same without BERT at a small size.
"""
out_dir = 'out/qformer_bert'
vision_from = 'google-bert/bert-base-uncased'
dataset = 'cc3m'
tokenizer = 'google-bert/bert-base-uncased'
objective = 'itc+itm+itg'
augment = 'crop+color'
vision_encoder = 'timm/vit_base_patch16_224.orig_in21k_ft_in1k'
vision_layer = -1
vision_cls = True
image_fit = 'crop'
connector = 'qformer'
block_size = 34               # captions of up to 32 tokens
batch_size = 64
learning_rate = 1e-3          # of the heads
vision_lr = 0.0
qformer_lr = 1e-4
qformer_new_lr = 1e-3
min_lr = 1e-4
weight_decay = 0.05
beta2 = 0.98
warmup_iters = 500
max_iters = 7650              # ten epochs of 49,000 pairs
eval_interval = 765
eval_samples = 1000
num_workers = 8
