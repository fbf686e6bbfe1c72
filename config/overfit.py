"""
Ten examples of ten tasks, learned by heart: the first thing to run after adding a dataset, an encoder or a connector. If
CER does not become 0, something between the file and the loss is wired wrongly.

    python train.py config/overfit.py
    python train.py config/overfit.py --connector=qformer --out_dir=out/overfit_qformer
    python train.py config/overfit.py --dataset=chartqa      # the first ten of a dataset of yours

assets/tasks has one example of each of ten datasets, as prepare_data.py writes them; their images are drawn.
"""
out_dir = 'out/overfit'
dataset = 'assets/tasks'
overfit_rows = 10
calculator = True
vision_encoder = 'vit'
connector = 'linear'
patch_height = 16
patch_width = 16
max_image_tokens = 80
vision_n_layer = 2
vision_n_head = 4
vision_n_embd = 128
n_queries = 16
qformer_n_layer = 2
qformer_n_head = 4
qformer_n_embd = 128
block_size = 512
n_layer = 4
n_head = 4
n_embd = 128
position = 'rope'
qk_norm = True
batch_size = 10
optimizer = 'muon'
learning_rate = 3e-3
vision_lr = 3e-3
connector_lr = 3e-3
qformer_lr = 3e-3
weight_decay = 0.0
warmup_iters = 10
max_iters = 200
eval_interval = 200
eval_iters = 1
eval_samples = 10
