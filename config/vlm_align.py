"""
Stage 1 of LLaVA: a GPT-2 that knows its language and a CLIP that knows pictures are introduced to one another. Only the
connector between them learns, on 558K pictures with a caption each.

    python prepare_data.py llava_pretrain
    torchrun --nproc_per_node=8 train.py config/vlm_align.py
    torchrun --nproc_per_node=8 train.py config/vlm_sft.py --init_from=out/vlm_align/ckpt.pt

Rate, batch and length are those of LLaVA-1.5's stage 1. Not run at this size yet, for lack of the weights, the data and a
GPU; the same two stages run on a small scale in tests/test_llava.py.
"""
out_dir = 'out/vlm_align'
init_from = 'gpt2'
tokenizer = 'gpt2'
dataset = 'llava_pretrain'
text_dataset = 'pydoc'      # text_loss must stay what it was: the GPT is frozen
vision_encoder = 'ViT-L-14-quickgelu/openai'
connector = 'mlp'
block_size = 1024           # positions; a picture of 256 tokens takes one of them
batch_size = 32
gradient_accumulation_steps = 8
learning_rate = 0.0         # the GPT
vision_lr = 0.0             # CLIP
connector_lr = 1e-3
min_lr = 1e-5
weight_decay = 0.0
warmup_iters = 65           # 3 %
max_iters = 2180            # one epoch
eval_interval = 500
num_workers = 4
