"""
How much text fits into an image token? Pages of 8 to 24 characters, read through 1, 4, 9 or 16 tokens: --image_size=48, 96,
144, 192, at which the encoder reads the same pages. DeepSeek-OCR's encoder in small; with VIT="--vision_encoder=vit
--vision_n_embd=128 --vision_n_layer=3" and --connector=pool, or --connector=qformer --n_queries=4, the baselines.

    python train.py config/compress_cpu.py --image_size=96 --out_dir=out/deep4
    python sample.py --compression out/deep4 out/pool4 out/qformer4 --eval=pydoc --out_dir=out/table

2026-11-26, one core of an AMD EPYC each, two at a time: 7 to 24 minutes. Precision for 16, 9, 4, 1 tokens: 93, 79, 69, 32 %;
pool 81, 73, 58, 30 %; qformer 32, 34, 32, 24 %. One position for all tokens of an image instead of one for each, pages
of 12 to 32 characters, 4 tokens: CER 53 instead of 43 %. 4 tokens, --max_iters=5000, 20 minutes of CPU time: 90 %, not 69 %.
"""
out_dir = 'out/compress_cpu'
image_width = image_height = 192  # pixels of the page
image_size = 96             # at which it is read: 4 tokens of 48 x 48 pixels; so many are n_queries
image_positions = 'each'
one_line = False
min_chars = 8
max_chars = 24
font_max = 80               # large enough that the text fills the page
length_warmup_iters = 300   # short texts first
vision_encoder = 'deepencoder_tiny'
connector = 'linear'
patch_height = patch_width = 12
pool_size = n_queries = vision_n_head = qformer_n_head = n_layer = n_head = 4  # pool: 4 x 4 patches a token
vision_n_layer = qformer_n_layer = 2
vision_n_embd = 96          # of SAM; CLIP is 128 wide
qformer_cross_every = 1
qformer_n_embd = n_embd = 128
block_size = 64
position = 'rope'
qk_norm = True
batch_size = 32
optimizer = 'muon'
muon_lr = 0.012
learning_rate = vision_lr = qformer_lr = connector_lr = 2e-3
min_lr = 2e-5
weight_decay = 0.01
warmup_iters = 20
max_iters = eval_interval = 1500
