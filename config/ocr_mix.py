"""
DeepSeek-OCR's stage 2, after ocr_vision.py: SAM and the compressor stay as they are, CLIP and the language model learn pages,
general images and text, 70, 20 and 10 %.

    for name in docbank olmocr llava_instruct wikitext; do python prepare_data.py $name; done
    torchrun --nproc_per_node=8 train.py config/ocr_mix.py
    torchrun --nproc_per_node=8 train.py config/ocr_mix.py --init_from=HuggingFaceTB/SmolLM2-360M-Instruct \
        --vision_from=out/ocr_vision/ckpt.pt --vision_lr=0 --learning_rate=2e-5 --connector_lr=2e-5 \
        --gradient_accumulation_steps=64

The second command is the other published variant: projector and a new GPT, on top of the frozen encoder of stage 1. Rates
and batches are those published, the shares the paper's. Not run yet at this size. How much text its tokens hold:
`python sample.py --compression out/ocr_mix --eval=olmocr`; with Fox's pages (README) --eval=fox --bucket=100.
"""
out_dir = 'out/ocr_mix'
init_from = 'out/ocr_vision/ckpt.pt'
dataset = 'docbank@0.35 olmocr@0.35 llava_instruct@0.2 wikitext@0.1'
tasks = 'text'              # what plain text becomes
text_dataset = 'wikitext'
vision_encoder = 'deepencoder'
deepencoder_mode = 'base'
connector = 'linear'
block_size = 8192
batch_size = 2
gradient_accumulation_steps = 320  # 640 examples
checkpoint_activations = True
learning_rate = 3e-5
vision_lr = 3e-5            # CLIP
sam_lr = 0.0
compressor_lr = 0.0
connector_lr = 3e-5
min_lr = 3e-7
weight_decay = 0.0
warmup_iters = 100
max_iters = 4000
eval_interval = 500
num_workers = 4
