"""
A published vision-language model learns from images of yours: LoRA on SmolVLM-256M. In a folder, the images and a captions.csv
with the columns image, caption, or image, question, answer.

    python prepare_data.py folder --source=FOLDER --name=mine
    python train.py config/finetune.py --dataset=mine
    python sample.py --out_dir=out/finetune --image x.jpg --prompt "Describe the image."
    python sample.py --out_dir=out/finetune --export=DIR       # for Hugging Face's class

Other models: --init_from=HuggingFaceTB/SmolVLM2-500M-Video-Instruct or a LLaVA. Less memory: --checkpoint_activations=True,
--max_image_side=512 (a single tile) and a smaller batch_size, with gradient_accumulation_steps; how much, `tests/bench.py
memory` computes. Not run yet at this size; tests/finetune.py runs it on a CPU, on a SmolVLM of a million weights.
"""
out_dir = 'out/finetune'
init_from = 'HuggingFaceTB/SmolVLM-256M-Instruct'
lora_rank = 16
lora_alpha = 32.0
learning_rate = 2e-4        # of the updates
vision_lr = 0.0
connector_lr = 1e-5
min_lr = 2e-6
weight_decay = 0.0
batch_size = 1
gradient_accumulation_steps = 8
block_size = 2048           # an image of 17 tiles is 1,088 tokens and their marks
warmup_iters = 10
max_iters = 300
eval_interval = 100
eval_samples = 32
