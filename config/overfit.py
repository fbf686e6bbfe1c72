"""
Ten examples of ten tasks, learned by heart: the first thing to run after adding a dataset, an encoder or a connector. If
CER does not become 0, something between the file and the loss is wired wrongly.

    python train.py config/overfit.py --connector=qformer
    python train.py config/overfit.py --dataset=chartqa      # the first ten of a dataset of yours

assets/tasks has one example of each of ten datasets, as prepare_data.py writes them; their images are drawn. Measured
2026-11-26, one core of an AMD EPYC, CPU time: linear 83 s, mlp 83, pool 69, qformer 73, timm's test_vit 112; with
--vision_lr=0 and random weights ViT-B-32 (90 steps) 109 s, naflexvit_base (66 steps) 117 s. CER is 0 for each.
"""
out_dir = 'out/overfit'
dataset = 'assets/tasks'
overfit_rows = 10
calculator = True
vision_encoder = 'vit'
connector = 'linear'
patch_height = patch_width = 16
max_image_tokens = 80
vision_n_layer = qformer_n_layer = 2
n_layer = n_head = vision_n_head = qformer_n_head = 4
n_embd = vision_n_embd = qformer_n_embd = 128
n_queries = 16
block_size = 512
position = 'rope'
qk_norm = True
batch_size = 10
optimizer = 'muon'
learning_rate = vision_lr = connector_lr = qformer_lr = 3e-3
weight_decay = 0.0
warmup_iters = 10
max_iters = 200
eval_interval = 200
eval_iters = 1
eval_samples = 10
