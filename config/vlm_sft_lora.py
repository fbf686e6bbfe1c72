"""
vlm_sft.py for a GPU with little memory: GPT-2's weights are frozen, and LoRA updates of rank 64 are trained with the
connector. A checkpoint with its optimizer has some 130 MB instead of 1.5 GB (computed); sample.py merges the updates.

    python prepare_data.py llava_instruct --image_dir=coco/train2017
    torchrun train.py config/vlm_sft_lora.py --init_from=out/vlm_align/ckpt.pt

Rates as in LLaVA-1.5's LoRA variant, 2e-4 and 2e-5 after stage 1; rank and alpha are half of its, for a smaller model.
Not run yet at this size: it needs the weights, the data and a GPU.
"""
out_dir = 'out/vlm_sft_lora'
init_from = 'out/vlm_align/ckpt.pt'
tokenizer = 'gpt2'
dataset = 'llava_instruct'
text_dataset = 'pydoc'
vision_encoder = 'ViT-L-14-quickgelu/openai'
connector = 'mlp'
batch_size = 16
gradient_accumulation_steps = 8
lora_rank = 64
lora_alpha = 128.0
lora_dropout = 0.05
learning_rate = 2e-4
vision_lr = 0.0
connector_lr = 2e-5
min_lr = 2e-6
weight_decay = 0.0
warmup_iters = 37
max_iters = 1230
eval_interval = 200
num_workers = 4
