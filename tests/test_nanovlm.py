"""nanoVLM's own layout: logits, ids and answers are those of its code, written down here once more in a few lines."""

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import inside, refused
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from dataloader import collate, get_tokenizer, tokenize
from weights import load_model, read_weights

N_TEXT = 300  # ids of the tokenizer
N_TOKENS = 9  # of an image
PROMPT = 'What is in this image? 42'
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# May 2025: images come first, as in nanoVLM-222M
FIRST = dict(vit_hidden_dim=32, vit_inter_dim=80, vit_patch_size=8, vit_img_size=48, vit_n_heads=4, vit_dropout=0.0,
             vit_n_blocks=3, vit_ln_eps=1e-6, vit_cls_flag=False, vit_model_type='google/siglip-base-patch16-224',
             lm_hidden_dim=48, lm_inter_dim=96, lm_rms_eps=1e-5, lm_re_base=100000, lm_max_position_embeddings=512,
             lm_vocab_size=N_TEXT, lm_n_heads=3, lm_n_kv_heads=1, lm_dropout=0.0, lm_n_blocks=2, lm_attn_scaling=1.0,
             lm_max_length=79, lm_use_tokens=False, lm_tie_weights=True, lm_model_type='HuggingFaceTB/SmolLM2-135M',
             lm_tokenizer='HuggingFaceTB/cosmo2-tokenizer', lm_eos_token_id=0, mp_pixel_shuffle_factor=2,
             vlm_load_backbone_weights=True, vlm_checkpoint_path='checkpoints/nanoVLM-222M', hf_repo_name='nanoVLM')
# 4 June: they take the places of an id of their own, as in nanoVLM-450M
TOKEN = {**FIRST, 'lm_base_vocab_size': N_TEXT, 'extra_token_amount': 1, 'lm_vocab_size': N_TEXT + 1, 'lm_tie_weights': False,
         'mp_image_token_length': N_TOKENS, 'vlm_extra_tokens': {'image_token': '<|image|>'}}
# 11 June to July: with a chat template
CHAT = {**TOKEN, 'lm_chat_template': CHAT_TEMPLATE, 'lm_tie_weights': True}
VERSIONS = {'first': FIRST, 'token': TOKEN, 'chat': CHAT}


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def write_tokenizer(folder):
    """A byte-level BPE with the special tokens of SmolLM2's, as Hugging Face has it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=N_TEXT, special_tokens=special, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    text = 'Question: What is in this image?\n Answer: Two birds on a wire, the largest of all.\n'
    backend.train_from_iterator([text] * 9, trainer)
    # a template that its model is not asked with
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='<|endoftext|>', chat_template='wrong')
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == N_TEXT
    return tokenizer


def make_weights(config):
    """Random tensors of the names and shapes in its files."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: 0.25 * torch.randn(shape, generator=generator)
    C, inner, p = config['vit_hidden_dim'], config['vit_inter_dim'], config['vit_patch_size']
    side = config['vit_img_size'] // p
    D, lm_inner, k = config['lm_hidden_dim'], config['lm_inter_dim'], config['mp_pixel_shuffle_factor']
    kv = D // config['lm_n_heads'] * config['lm_n_kv_heads']
    w = {'vision_encoder.patch_embedding.conv.weight': new(C, 3, p, p), 'vision_encoder.patch_embedding.conv.bias': new(C),
         'vision_encoder.patch_embedding.position_embedding': new(1, side**2, C), 'MP.proj.weight': new(D, C * k**2)}
    norms = ['vision_encoder.layer_norm']
    for i in range(config['vit_n_blocks']):
        block = f'vision_encoder.blocks.{i}'
        norms += [f'{block}.ln1', f'{block}.ln2']
        shapes = {'attn.qkv_proj': (3 * C, C), 'attn.out_proj': (C, C), 'mlp.fc1': (inner, C), 'mlp.fc2': (C, inner)}
        for name, shape in shapes.items():
            w |= {f'{block}.{name}.weight': new(*shape), f'{block}.{name}.bias': new(shape[0])}
    for name in norms:
        w |= {f'{name}.weight': 1 + new(C), f'{name}.bias': new(C)}
    for i in range(config['lm_n_blocks']):
        block = f'decoder.blocks.{i}'
        shapes = {'attn.q_proj': (D, D), 'attn.k_proj': (kv, D), 'attn.v_proj': (kv, D), 'attn.out_proj': (D, D),
                  'mlp.gate_proj': (lm_inner, D), 'mlp.up_proj': (lm_inner, D), 'mlp.down_proj': (D, lm_inner)}
        w |= {f'{block}.{name}.weight': new(*shape) for name, shape in shapes.items()}
        w |= {f'{block}.{name}.weight': 1 + new(D) for name in ('norm1', 'norm2')}
    w |= {'decoder.norm.weight': 1 + new(D), 'decoder.head.weight': new(config['lm_vocab_size'], D),
          'decoder.rotary_embd.inv_freq': torch.ones(D // config['lm_n_heads'] // 2)}
    if not config['lm_tie_weights']:  # its files have a tied table once, by this name
        w['decoder.token_embedding.weight'] = new(config['lm_vocab_size'], D)
    return w


def make_model(folder, config):
    w = make_weights(config)
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(w, folder / 'model.safetensors')
    return w


@pytest.fixture(scope='module', params=VERSIONS)
def nanovlm(request, tmp_path_factory):
    """(folder, its tensors, its config.json, its tokenizer), with a copy of the tokenizer in the folder."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = write_tokenizer(folder)
    config = VERSIONS[request.param]
    return folder, make_model(folder, config), config, tokenizer


# -----------------------------------------------------------------------------
# what nanoVLM computes, https://github.com/huggingface/nanoVLM: for one sequence, all of it every time

def attention(q, k, v, n_head, is_causal=False):
    """q (T, C), k and v (T, C or fewer heads) -> (T, C)"""
    q = q.unflatten(1, (n_head, -1)).transpose(0, 1)                            # (nh, T, hs)
    k, v = (x.unflatten(1, (-1, q.shape[2])).transpose(0, 1) for x in (k, v))
    k, v = (x.repeat_interleave(n_head // len(x), dim=0) for x in (k, v))
    scores = q @ k.mT / q.shape[2]**0.5                                         # (nh, T, T)
    if is_causal:
        scores = scores + torch.full_like(scores, float('-inf')).triu(1)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def rotate(x, n_head, base):
    """RoPE by complex numbers: a head's first half is the real part, its second the imaginary part."""
    a, b = x.unflatten(1, (n_head, -1)).chunk(2, dim=2)                         # (T, nh, hs / 2)
    speed = base ** -(torch.arange(a.shape[2]) / a.shape[2])
    angle = torch.arange(len(x))[:, None, None] * speed
    x = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([x.real, x.imag], dim=2).flatten(1)


def image_embeds(w, config, image):
    """A PIL image -> (9, D)"""
    side = config['vit_img_size'] // config['vit_patch_size']
    square = image.resize((config['vit_img_size'],) * 2, Image.Resampling.BILINEAR)
    pixels = torch.tensor(np.array(square)).permute(2, 0, 1) / 255
    linear = lambda name, x: F.linear(x, w[f'{name}.weight'], w[f'{name}.bias'])
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'], config['vit_ln_eps'])
    conv = 'vision_encoder.patch_embedding.conv'
    x = F.conv2d(pixels[None], w[f'{conv}.weight'], w[f'{conv}.bias'], config['vit_patch_size'])
    x = x[0].flatten(1).T + w['vision_encoder.patch_embedding.position_embedding'][0]  # (side * side, C)
    for i in range(config['vit_n_blocks']):
        block = f'vision_encoder.blocks.{i}'
        q, k, v = linear(f'{block}.attn.qkv_proj', norm(f'{block}.ln1', x)).chunk(3, dim=1)
        x = x + linear(f'{block}.attn.out_proj', attention(q, k, v, config['vit_n_heads']))
        y = F.gelu(linear(f'{block}.mlp.fc1', norm(f'{block}.ln2', x)), approximate='tanh')
        x = x + linear(f'{block}.mlp.fc2', y)
    x = norm('vision_encoder.layer_norm', x).view(side, side, -1)
    k = config['mp_pixel_shuffle_factor']
    x = torch.cat([x[row::k, col::k] for row in range(k) for col in range(k)], dim=2)
    return x.flatten(0, 1) @ w['MP.proj.weight'].T


def reference(w, config, ids, images):
    """Logits (T, V) of a sequence of ids in which N_TEXT stands for an image token, and of the images in it."""
    head = w['decoder.head.weight']
    table = w.get('decoder.token_embedding.weight', head)
    ids = torch.tensor(ids)
    x = table[ids.clamp(max=len(table) - 1)]
    if images:
        x[ids == N_TEXT] = torch.cat([image_embeds(w, config, image) for image in images])
    norm = lambda name, x: w[name] * x * (x.square().mean(-1, keepdim=True) + config['lm_rms_eps']).rsqrt()
    for i in range(config['lm_n_blocks']):
        linear = lambda name, x: x @ w[f'decoder.blocks.{i}.{name}.weight'].T
        y = norm(f'decoder.blocks.{i}.norm1.weight', x)
        q = rotate(linear('attn.q_proj', y), config['lm_n_heads'], config['lm_re_base'])
        k = rotate(linear('attn.k_proj', y), config['lm_n_kv_heads'], config['lm_re_base'])
        x = x + linear('attn.out_proj', attention(q, k, linear('attn.v_proj', y), config['lm_n_heads'], is_causal=True))
        y = norm(f'decoder.blocks.{i}.norm2.weight', x)
        x = x + linear('mlp.down_proj', F.silu(linear('mlp.gate_proj', y)) * linear('mlp.up_proj', y))
    return norm('decoder.norm.weight', x) @ head.T


def prompt_ids(config, tokenizer, n_images):
    """The ids that its generate.py asks with."""
    image = [N_TEXT] * N_TOKENS * n_images
    encode = lambda text: tokenizer(text)['input_ids']
    if 'lm_chat_template' in config:
        return [*encode('<|im_start|>user\n'), *image, *encode(f'{PROMPT}<|im_end|>\n<|im_start|>assistant\n')]
    return [*image, *encode(f'Question: {PROMPT} Answer:')]


def open_ours(folder):
    run = read_weights(str(folder))['config']
    return load_model(str(folder)).eval(), get_tokenizer(run['tokenizer'], chat_template=run['chat_template'])


def make_batch(ours, enc, images):
    example = {'messages': [{'role': 'user', 'content': '<image>\n' * len(images) + PROMPT}], 'images': images}
    return collate([tokenize(example, enc, ours.config, prompt_only=True)], ours.config)


@pytest.mark.parametrize('sizes', [[(256, 192)], [(20, 90)], [(48, 48), (60, 30)], []])
@torch.no_grad()
def test_it_computes_what_nanovlm_does(nanovlm, sizes):
    folder, w, config, tokenizer = nanovlm
    ours, enc = open_ours(folder)
    images = [noise(*size, seed) for seed, size in enumerate(sizes)]
    batch = make_batch(ours, enc, images)
    ids = prompt_ids(config, tokenizer, len(images))
    assert batch['idx'][0].tolist() == ids
    expected = reference(w, config, ids, images)
    logits = ours.logits(batch['idx'], batch['images'] if images else None)[0, :, :config['lm_vocab_size']]
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_answers_are_nanovlms(nanovlm):
    folder, w, config, tokenizer = nanovlm
    ours, enc = open_ours(folder)
    images = [noise(100, 60)]
    batch = make_batch(ours, enc, images)
    ids = prompt_ids(config, tokenizer, 1)
    for _ in range(48):
        ids.append(reference(w, config, ids, images)[-1, :N_TEXT].argmax().item())
    result = ours.generate(batch['idx'], 48, temperature=0, images=batch['images'])
    assert result[0].tolist() == ids
    assert len(set(ids[-48:])) > 10


def test_what_is_in_the_loss(nanovlm):
    """The answer and its end, as in its own training; an answer begins with a space where its prompt has none at the end."""
    folder, _, config, _ = nanovlm
    ours, enc = open_ours(folder)
    messages = [{'role': 'user', 'content': '<image>\nWhat?'}, {'role': 'assistant', 'content': 'Two birds.'}]
    example = tokenize({'messages': messages, 'images': [noise(30, 20)]}, enc, ours.config)
    text = enc.decode([id for id in example['idx'] if id != N_TEXT])
    target = enc.decode([id for id in example['targets'] if id >= 0])
    if 'lm_chat_template' in config:
        assert text.startswith('<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nTwo birds.')
        assert target == 'Two birds.<|im_end|>'
    else:
        assert text == 'Question: What? Answer: Two birds.' and target.strip() == 'Two birds.<|endoftext|>'
    assert example['idx'].count(N_TEXT) == N_TOKENS and N_TEXT not in example['targets']


def test_it_answers_trains_and_is_exported(nanovlm, tmp_path):
    """A run goes on with the template that is in no tokenizer's files. Hugging Face has no processor of its images, so of the
    whole model only the text part is written for its classes.
    """
    folder, w, config, tokenizer = nanovlm
    noise(100, 80).save(tmp_path / 'x.png')
    ask = ['--image', tmp_path / 'x.png', '--prompt', PROMPT, '--max_new_tokens=8', '--device=cpu']
    asked = inside('sample.py', f'--init_from={folder}', *ask)
    assert asked.returncode == 0, asked.stderr
    rows = [{'messages': [{'role': 'user', 'content': '<image>\nWhat?'}, {'role': 'assistant', 'content': 'Two birds.'}],
             'images': ['x.png']}] * 4
    for split in ('train', 'val'):
        (tmp_path / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    knobs = ['--block_size=64', '--max_iters=2', '--eval_interval=2', '--eval_iters=1', '--eval_samples=1', '--num_workers=0',
             '--gradient_accumulation_steps=1', '--device=cpu', '--compile=False', '--warmup_iters=1', '--learning_rate=1e-3']
    trained = inside('train.py', 'config/finetune.py', f'--init_from={folder}', f'--dataset={tmp_path}',
                     f'--out_dir={tmp_path}/out', *knobs)
    assert trained.returncode == 0, trained.stderr
    templates = [read_weights(source)['config']['chat_template'] for source in (str(folder), f'{tmp_path}/out/ckpt.pt')]
    assert templates[0] == templates[1] != ''
    tuned = inside('sample.py', f'--out_dir={tmp_path}/out', *ask)
    assert tuned.returncode == 0, tuned.stderr
    exported = inside('sample.py', f'--init_from={folder}', f'--export={tmp_path}/export', '--device=cpu')
    assert exported.returncode == 0, exported.stderr
    again = inside('sample.py', f'--init_from={tmp_path}/export/glimpse.safetensors', *ask)
    assert again.stdout == asked.stdout
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'export').eval()
    assert type(theirs).__name__ == 'LlamaForCausalLM'
    ids = prompt_ids(config, tokenizer, 0)
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0, :, :config['lm_vocab_size']]
    torch.testing.assert_close(logits, reference(w, config, ids, []), atol=1e-4, rtol=1e-4)


def test_the_tokenizer_is_the_folders_or_the_one_that_is_named(tmp_path):
    named = tmp_path / 'named'
    own = tmp_path / 'own'
    own.mkdir()
    write_tokenizer(named)
    make_model(own, {**FIRST, 'lm_tokenizer': str(named)})
    assert read_weights(str(own))['config']['tokenizer'] == str(named)
    assert inside('sample.py', f'--init_from={own}', '--prompt=x', '--max_new_tokens=1', '--device=cpu').returncode == 0
    write_tokenizer(own)
    assert read_weights(str(own))['config']['tokenizer'] == str(own)


@pytest.mark.parametrize('change, message', [
    ({'max_img_size': 2048}, 'its max_img_size is 2048: it cuts images into tiles'),
    ({'vit_cls_flag': True}, 'its vit_cls_flag is True, not False'),
    ({'lm_attn_scaling': 0.5}, 'its lm_attn_scaling is 0.5, not 1.0'),
    ({'vit_ln_eps': 1e-5}, 'its layer_norm_eps is 1e-05, not 1e-06'),
    ({'mp_image_token_length': 64}, 'its mp_image_token_length is 64, not 9'),
    ({'lm_re_base': None}, "is no complete configuration of a nanovlm: it has no 'lm_re_base'"),
    ({'lm_tokenizer': None}, "it has no 'lm_tokenizer'")])
def test_what_would_be_computed_wrongly_is_refused(tmp_path, change, message):
    make_model(tmp_path, {**TOKEN, **change})
    refused(inside('sample.py', f'--init_from={tmp_path}', '--prompt', 'x'), message)
