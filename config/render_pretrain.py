"""
Text-only VLM pretraining from scratch on FineWeb: no image is downloaded. The middle of each text becomes an image of
144 tokens, and the GPT continues after it. render_pretrain_qwen3.py starts from published models instead.

    python prepare_data.py text --source=HuggingFaceFW/fineweb --subset=sample-10BT --max_examples=1000000 --name=fineweb
    torchrun --nproc_per_node=8 train.py config/render_pretrain.py

For 8 GPUs. Not run yet at this size; a test runs two steps at a small size.
"""
out_dir = 'out/render_pretrain'
dataset = 'fineweb'
tokenizer = 'gpt2'
tasks = 'continuation:0.8 text:0.2'
infix_min = 0.1         # 0.1 to 0.4 of a text become an image
infix_max = 0.4
min_span = 400
max_span = 2000         # characters, some 500 tokens, so that block_size cuts no text
one_line = False        # a page, in the largest font that fits
image_width = 384       # 24 x 24 patches, pooled 2 x 2: 144 tokens
image_height = 384
font_min = 12
image_positions = 'each'  # better than one for all: render_continue_cpu.py
vision_encoder = 'vit'
connector = 'pool'
pool_size = 2
max_image_tokens = 144
vision_n_layer = 12
vision_n_head = 12
vision_n_embd = 768
batch_size = 8
gradient_accumulation_steps = 8
learning_rate = 6e-4    # nanoGPT's rate for a GPT-2 from scratch, for all parts: nothing here is pretrained
vision_lr = 6e-4
connector_lr = 6e-4
min_lr = 6e-5
warmup_iters = 1000
max_iters = 100000
eval_interval = 1000
keep_checkpoints = 2
num_workers = 4
