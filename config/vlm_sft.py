"""
LLaVA's stage 2: GPT-2 with CLIP ViT-L/14 learns to answer questions about images, on LLaVA's conversations. It starts
from GPT-2 itself, or after stage 1, vlm_align.py.

    python prepare_data.py llava_instruct --image_dir=coco/train2017
    python prepare_data.py features --dataset=llava_instruct --vision_encoder=ViT-L-14-quickgelu/openai    # optional
    torchrun --nproc_per_node=8 train.py config/vlm_sft.py
    python sample.py --out_dir=out/vlm_sft --image x.jpg --prompt "What is going on here?"

A nanoGPT checkpoint instead of GPT-2: --init_from=FILE. Not run yet at this size: it needs the weights, the data and a
GPU; bench.py vlm measures memory and time of a step. LLaVA-1.5 trains 7B at 2e-5; a smaller model takes a larger rate.
"""
out_dir = 'out/vlm_sft'
init_from = 'gpt2'
tokenizer = 'gpt2'
dataset = 'llava_instruct'
text_dataset = 'pydoc'      # for text_loss: how much of its language the GPT forgets
vision_encoder = 'ViT-L-14-quickgelu/openai'
connector = 'mlp'
batch_size = 16
gradient_accumulation_steps = 8
learning_rate = 1e-4        # the GPT
vision_lr = 0.0             # CLIP is frozen
connector_lr = 1e-3         # 1e-4 after vlm_align.py
min_lr = 1e-6
weight_decay = 0.0
warmup_iters = 37           # 3 %
max_iters = 1230            # one epoch of 158K conversations
eval_interval = 200
num_workers = 4
