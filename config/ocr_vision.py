"""
DeepSeek-OCR's stage 1: SAM, the compressor and CLIP learn to read pages, together with a small language model.

    python prepare_data.py docbank && python prepare_data.py olmocr
    torchrun --nproc_per_node=8 train.py config/ocr_vision.py
    torchrun --nproc_per_node=8 train.py config/ocr_vision.py --vision_lr=0 --compressor_lr=1e-3 --connector_lr=1e-3 \
        --learning_rate=0 --gradient_accumulation_steps=64     # only the compressor and the projector, from scratch: 7M

A page of 1024 x 1024 pixels is 256 tokens in 273 places; --deepencoder_mode=tiny, small, large and gundam. Rate, schedule,
batch and length are the paper's; the data are public, the paper's are not. Not run yet at this size: it needs the weights of
SAM-B, CLIP ViT-L/14 and SmolLM2, the data and GPUs. tests/test_deepencoder.py compares what changes in a step of each stage.
"""
out_dir = 'out/ocr_vision'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
dataset = 'docbank olmocr'
text_dataset = 'pydoc'
vision_encoder = 'deepencoder'
deepencoder_mode = 'base'
connector = 'linear'
block_size = 4096
batch_size = 4
gradient_accumulation_steps = 320  # 1280 pages
checkpoint_activations = True
learning_rate = 5e-5
vision_lr = 5e-5            # SAM, compressor and CLIP
connector_lr = 5e-5
min_lr = 5e-7
weight_decay = 0.0
warmup_iters = 36           # 3 %
max_iters = 1200            # two epochs
eval_interval = 200
num_workers = 4
