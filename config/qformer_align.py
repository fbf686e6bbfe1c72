"""
BLIP-2's first stage with its objectives and rates, on Conceptual Captions: a Q-Former of BERT-base's size over a
frozen CLIP ViT-L/14.

    python prepare_data.py cc3m --val_every=500                    # 2.9M pairs, or --max_examples=50000
    torchrun --nproc_per_node=8 train.py config/qformer_align.py
    torchrun --nproc_per_node=8 train.py config/vlm_qformer.py     # the second stage, with a GPT

BLIP-2's own Q-Former: --vision_from=Salesforce/blip2-itm-vit-g --vision_encoder=EVA01-g-14/laion400m_s11b_b41k
--vision_cls=True. Its text embeddings belong to BERT's vocabulary and are left out.
For 8 GPUs. Not run yet at this size; qformer_cpu.py is the same at a small size.
"""
out_dir = 'out/qformer_align'
dataset = 'cc3m'
tokenizer = 'gpt2'
objective = 'itc+itm+itg'
augment = 'crop+color'
vision_encoder = 'ViT-L-14-quickgelu/openai'
connector = 'qformer'
block_size = 34               # captions of up to 32 tokens
batch_size = 128              # on each of 8 GPUs: 1,024 pairs to contrast
gradient_accumulation_steps = 8
learning_rate = 1e-4
vision_lr = 0.0
qformer_lr = 1e-4
min_lr = 1e-5
weight_decay = 0.05
beta2 = 0.98
warmup_iters = 2000
max_iters = 14000             # five epochs
eval_interval = 1000
eval_samples = 5000
num_workers = 8
