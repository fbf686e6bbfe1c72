"""
BLIP-2's second stage with a small language model: SmolLM2-135M answers questions about images, which a Q-Former
turns into 32 tokens. The GPT and CLIP are frozen; LoRA of rank 64, the Q-Former and an MLP after it are trained.

    torchrun --nproc_per_node=8 train.py config/qformer_align.py
    python prepare_data.py llava_instruct --image_dir=coco/train2017
    torchrun --nproc_per_node=8 train.py config/vlm_qformer.py                     # GPT-2: --init_from=gpt2
    python sample.py --out_dir=out/vlm_qformer --image x.jpg --prompt "What is this?"

The whole GPT instead of LoRA: --lora_rank=0 --lora_scope=all --learning_rate=5e-5. Not run yet at this size: it needs
the data and GPUs; connectors_cpu.py is the same at a small size.
"""
out_dir = 'out/vlm_qformer'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
vision_from = 'out/qformer_align/ckpt.pt'
dataset = 'llava_instruct'
text_dataset = 'pydoc'
vision_encoder = 'ViT-L-14-quickgelu/openai'
connector = 'qformer'
batch_size = 8
gradient_accumulation_steps = 32
lora_rank = 64
lora_alpha = 128.0
lora_dropout = 0.1
lora_scope = 'image'
learning_rate = 5e-4          # of LoRA
vision_lr = 0.0
qformer_lr = 1e-4
connector_lr = 5e-4           # of the MLP
min_lr = 5e-6
weight_decay = 0.0
warmup_iters = 100
max_iters = 1850              # three epochs of 158K conversations
eval_interval = 200
num_workers = 4
