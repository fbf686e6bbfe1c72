"""
LLaVA's stage 1: GPT-2 and CLIP ViT-L/14 stay frozen, and only the connector is trained, on 558K images with a caption.

    python prepare_data.py llava_pretrain
    torchrun --nproc_per_node=8 train.py config/vlm_align.py
    torchrun --nproc_per_node=8 train.py config/vlm_sft.py --init_from=out/vlm_align/ckpt.pt    # stage 2

Rate, batch and length are those of LLaVA-1.5. Not run yet at this size: it needs the weights, the data and a GPU.
tests/test_llava.py runs both stages at a small size.
"""
out_dir = 'out/vlm_align'
init_from = 'gpt2'
tokenizer = 'gpt2'
dataset = 'llava_pretrain'
text_dataset = 'pydoc'      # for text_loss, which must not change: the GPT is frozen
vision_encoder = 'ViT-L-14-quickgelu/openai'
connector = 'mlp'
batch_size = 32
gradient_accumulation_steps = 8
learning_rate = 0.0         # the GPT
vision_lr = 0.0             # CLIP
connector_lr = 1e-3
min_lr = 1e-5
weight_decay = 0.0
warmup_iters = 65           # 3 %
max_iters = 2180            # one epoch
num_workers = 4
