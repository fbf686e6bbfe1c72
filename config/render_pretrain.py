"""
Text-only VLM pretraining: no image is downloaded, the middle of each text becomes its picture and the GPT continues
behind it. Rates, ratios, fonts and the 144 image tokens a page are those of the project that published the idea, here at
the scale of one node of GPUs:

    python prepare_data.py text --source=HuggingFaceFW/fineweb --subset=sample-10BT --max_examples=1000000 --name=fineweb
    torchrun --nproc_per_node=8 train.py config/render_pretrain.py --gradient_accumulation_steps=8

Not run yet: it was written on a machine without a GPU and without the hub; two steps at a reduced size are a test.
The rates are meant for a GPT that knows its language and an encoder that has seen images. From scratch, as it stands here,
take ten times as much.
"""
out_dir = 'out/render_pretrain'
dataset = 'fineweb'
tokenizer = ''          # that of init_from; gpt2's from scratch needs --tokenizer=gpt2
tasks = 'continue:0.8 text:0.2'
# 0.1 to 0.4 of at most 1024 tokens become a picture that starts anywhere
infix_min = 0.1
infix_max = 0.4
min_span = 400
max_span = 2800         # characters, some 700 tokens: hardly one is cut
one_line = False        # a page, in the largest font that fits
image_width = 384       # 24 x 24 patches, pooled 2 x 2: 144 tokens
image_height = 384
font_min = 12
vision_encoder = 'vit'
connector = 'pool'
pool_size = 2
max_image_tokens = 144
vision_n_layer = 12
vision_n_head = 12
vision_n_embd = 768
block_size = 1024
batch_size = 8
gradient_accumulation_steps = 8
learning_rate = 5e-5
vision_lr = 6e-6
connector_lr = 5e-4
min_lr = 5e-6
warmup_iters = 1000
max_iters = 100000
eval_interval = 1000
keep_checkpoints = 2
num_workers = 4
