"""
The flagship: GPT-2 gains the eyes of CLIP ViT-L/14 and learns to talk about pictures, on LLaVA's conversations. It is
LLaVA's stage 2, or the only one: it starts from GPT-2 as it is, or from where vlm_align.py has ended.

    python prepare_data.py llava_instruct --image_dir=coco/train2017
    python prepare_data.py features --dataset=llava_instruct --vision_encoder=ViT-L-14-quickgelu/openai    # optional
    torchrun --nproc_per_node=8 train.py config/vlm_sft.py
    python sample.py --out_dir=out/vlm_sft --image x.jpg --prompt "What is going on here?"

Any nanoGPT checkpoint takes GPT-2's place: --init_from=FILE. Not run at this size yet, for lack of the weights, the data
and a GPU; README has the memory and the time of a step. LLaVA-1.5's rate for a model of 7B is 2e-5: the smaller a model,
the larger the rate.
"""
out_dir = 'out/vlm_sft'
init_from = 'gpt2'
tokenizer = 'gpt2'
dataset = 'llava_instruct'
text_dataset = 'pydoc'      # how much of its language it forgets, as text_loss
vision_encoder = 'ViT-L-14-quickgelu/openai'
connector = 'mlp'
block_size = 1024           # positions; a picture of 256 tokens takes one of them
batch_size = 16
gradient_accumulation_steps = 8
learning_rate = 1e-4        # the GPT
vision_lr = 0.0             # CLIP stays as it is
connector_lr = 1e-3         # 1e-4 behind vlm_align.py
min_lr = 1e-6
weight_decay = 0.0
warmup_iters = 37           # 3 %
max_iters = 1230            # one epoch of 158K conversations
eval_interval = 200
num_workers = 4
