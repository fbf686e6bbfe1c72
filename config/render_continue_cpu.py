"""
RESULT
"""
init_from = 'out/quickstart/ckpt.pt'   # the model with all its sizes; here it learns to go on
out_dir = 'out/render_continue_cpu'
dataset = 'pydoc'
tokenizer = 'bytes'
tasks = 'continue:0.5 text:0.3 read:0.2'
min_span = 48
max_span = 88
infix_min = 0.3
infix_max = 0.45
image_width = 512
image_height = 24
vision_encoder = 'vit'
block_size = 128
batch_size = 64
optimizer = 'muon'
muon_lr = 0.01
learning_rate = 1e-3
vision_lr = 1e-3
connector_lr = 1e-3
min_lr = 1e-5
weight_decay = 0.01
warmup_iters = 20
max_iters = 900
eval_interval = 450
eval_iters = 16
eval_samples = 256
