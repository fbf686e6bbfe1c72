"""
SmolLM2-135M with SigLIP-B/16 learns to answer questions about images: the shape of nanoVLM's 222M model. The 196
features of an image are pooled 2 x 2 to 49 image tokens (pool_size=4: 16).

    python prepare_data.py llava_instruct --image_dir=coco/train2017
    torchrun --nproc_per_node=8 train.py config/vlm_smollm2.py
    python sample.py --out_dir=out/vlm_smollm2 --image x.jpg --prompt "What is going on here?"

Larger ones: --init_from=HuggingFaceTB/SmolLM2-360M-Instruct, Qwen/Qwen3-0.6B. Not run yet at this size: it needs
SigLIP's weights, the data and a GPU; bench.py vlm measures memory and time of a step. The GPT's rate is nanoVLM's.
"""
out_dir = 'out/vlm_smollm2'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'   # its tokenizer and its chat template are used as well
dataset = 'llava_instruct'
text_dataset = 'pydoc'      # for text_loss: how much of its language the GPT forgets
vision_encoder = 'ViT-B-16-SigLIP/webli'
vision_layer = -1           # the last, with its final norm, as in nanoVLM
connector = 'pool'
pool_size = 2
batch_size = 16
gradient_accumulation_steps = 8
learning_rate = 5e-5        # the GPT
vision_lr = 0.0             # SigLIP is frozen, so its features can be cached; nanoVLM trains it at 5e-5
connector_lr = 5e-4
min_lr = 5e-7
weight_decay = 0.0
warmup_iters = 37           # 3 %
max_iters = 1230            # one epoch of 158K conversations
eval_interval = 200
num_workers = 4
