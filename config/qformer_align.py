"""
BLIP-2's first stage, its objectives and rates, on Conceptual Captions: a Q-Former of BERT-base's size learns to ask a frozen
CLIP for what a caption would say. Eight GPUs.

    python prepare_data.py cc3m --val_every=500                    # 2.9M pairs, or --max_examples=50000
    torchrun --nproc_per_node=8 train.py config/qformer_align.py
    torchrun --nproc_per_node=8 train.py config/vlm_qformer.py     # and a GPT speaks about it

With --vision_from=Salesforce/blip2-itm-vit-g it begins with BLIP-2's queries, over its own encoder:
--vision_encoder=EVA01-g-14/laion400m_s11b_b41k --vision_cls=True.

Not run at this size yet, for lack of the data, CLIP's weights and GPUs. In small, on a CPU: qformer_cpu.py.
"""
out_dir = 'out/qformer_align'
dataset = 'cc3m'
tokenizer = 'gpt2'
objective = 'itc+itm+itg'
augment = 'crop+colour'
vision_encoder = 'ViT-L-14-quickgelu/openai'
connector = 'qformer'
n_queries = 32
qformer_n_layer = 12
qformer_n_head = 12
qformer_n_embd = 768
block_size = 34               # captions of up to 32 tokens
batch_size = 128              # times 8 GPUs: negatives for ITC
gradient_accumulation_steps = 8
learning_rate = 1e-4
vision_lr = 0.0
qformer_lr = 1e-4
min_lr = 1e-5
weight_decay = 0.05
beta2 = 0.98
warmup_iters = 2000
max_iters = 14000             # five times through
eval_interval = 1000
eval_samples = 5000
num_workers = 8
