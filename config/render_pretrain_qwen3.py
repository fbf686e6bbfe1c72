"""
Text-only VLM pretraining in the shape of the project that published it: Qwen3-1.7B, PE-Core-L/14 at 336 pixels, and
features pooled 2 x 2 to 144 image tokens. Infix ratios, font sizes, learning rates and warmup are its own.

    python prepare_data.py text --source=HuggingFaceFW/fineweb --subset=sample-10BT --max_examples=1000000 --name=fineweb
    torchrun --nproc_per_node=8 train.py config/render_pretrain_qwen3.py

For 8 GPUs of 80 GB: weights, gradients and AdamW of 2.0 billion parameters take 32 GB on each (computed). Not run yet.
"""
out_dir = 'out/render_pretrain_qwen3'
init_from = 'Qwen/Qwen3-1.7B'
dataset = 'fineweb'
tasks = 'continuation:0.8 text:0.2'
infix_min = 0.1
infix_max = 0.4
min_span = 400
max_span = 2000         # characters: four tenths of a longer text do not fit the image at font size 12
one_line = False        # a page, in the largest font that fits
image_width = 336
image_height = 336
font_min = 12
font_max = 200
image_positions = 'each'  # better than one for all: render_continue_cpu.py
vision_encoder = 'timm/vit_pe_core_large_patch14_336.fb'
vision_layer = -1       # the last layer, without its class token: 24 x 24 features
connector = 'pool'
pool_size = 2
batch_size = 2
gradient_accumulation_steps = 64
learning_rate = 5e-5    # the GPT
vision_lr = 6e-6
connector_lr = 5e-4
min_lr = 5e-6
warmup_iters = 1000
max_iters = 20000
eval_interval = 1000
keep_checkpoints = 2
num_workers = 4
dtype = 'bfloat16'
