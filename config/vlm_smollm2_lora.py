"""
vlm_smollm2.py for little memory: SmolLM2's weights are frozen, in bfloat16 on a GPU, and LoRA updates of rank 64 are
trained. A checkpoint with its optimizer has some 220 MB (computed). The updates act only after an image (lora_scope),
so without images the model's outputs stay the same; LoRA alone does not prevent forgetting.

    python prepare_data.py llava_instruct --image_dir=coco/train2017
    torchrun train.py config/vlm_smollm2_lora.py

Not run yet at this size: it needs SigLIP's weights, the data and a GPU. At a small size: read_smollm2_cpu.py.
"""
out_dir = 'out/vlm_smollm2_lora'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
dataset = 'llava_instruct'
text_dataset = 'pydoc'
vision_encoder = 'ViT-B-16-SigLIP/webli'
vision_layer = -1
connector = 'pool'
pool_size = 2
batch_size = 16
gradient_accumulation_steps = 8
lora_rank = 64
lora_alpha = 128.0
lora_dropout = 0.05
lora_scope = 'image'
learning_rate = 2e-4
vision_lr = 0.0
connector_lr = 5e-4
min_lr = 2e-6
weight_decay = 0.0
warmup_iters = 37
max_iters = 1230
eval_interval = 200
num_workers = 4
