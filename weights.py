"""
Weights from anywhere -> a model, and back.

    load_model       a model of any source: load_model('HuggingFaceTB/SmolVLM-256M-Instruct')
    read_weights     a source as one dict, that of nanoGPT's checkpoints
    build_model      such a dict as a model; it may gain vision, LoRA, tokens, positions
    load_weights     matches names and shapes, and says what was loaded, what is new, what does not fit
    to_hugging_face  a model as Hugging Face's classes read it

The second half is about how Hugging Face stores GPT-2, Llama (SmolLM2), Qwen2, Qwen3, SmolLM3, BLIP-2's Q-Former, BERT,
SmolVLM, LLaVA and nanoVLM: names of fields and tensors.
"""

import json
import math
import os
import pickle
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from blip2 import QFormerPretraining
from model import GPT, GPTConfig
from vision import QFORMER_NEW, PublishedViT, complete_config, fingerprint

def load_model(source, **overrides):
    """The model of any source that `read_weights` reads, with some fields of its configuration changed."""
    return build_model(read_weights(source), source, **overrides)

def read_weights(source):
    """Any source of weights as one dict, that of nanoGPT's checkpoints: a ckpt.pt of nanoGPT or train.py, the
    glimpse.safetensors of an export, a GPT-2, Llama, Qwen, BLIP-2 or BERT of Hugging Face, by hub name or folder.

        model, model_args   {name: tensor} by our names, {field of GPTConfig: value}
        config              knobs of the run that made it; its 'tokenizer' names the tokenizer, 'chat_template' one that is
                            not in the tokenizer's files
        base_model          None, or {'init_from', 'fingerprint'} of the model that LoRA's updates adapt
        vision_fingerprint  of a pretrained encoder whose weights are not in `model`, but published

    Raises ValueError for what is none of these.
    """
    source = str(source)
    if source.endswith('.safetensors'):
        checkpoint = read_export(source)
    elif source.endswith('.pt') or os.path.isfile(source):
        checkpoint = read_checkpoint(source)
    else:
        checkpoint = read_published(source)
    checkpoint = {'config': {}, 'base_model': None, 'vision_fingerprint': '', **checkpoint}
    args = checkpoint['model_args']
    unknown = sorted(set(args) - set(vars(GPTConfig())))
    if unknown:
        raise ValueError(f'{source}: model_args has {", ".join(unknown)}, which this GPT does not know')
    state = {strip_prefixes(name): p for name, p in checkpoint['model'].items()}
    if checkpoint['base_model']:
        state = {**read_base_model(source, checkpoint['base_model'], args), **state}
    wte = state.get('transformer.wte.weight')
    if wte is not None and args.get('tie_weights', True):
        head = state.setdefault('lm_head.weight', wte)  # some files hold the table once
        if not torch.equal(head, wte):
            raise ValueError(f'{source}: lm_head.weight is not tied to transformer.wte.weight')
    return {**checkpoint, 'model': state}

def read_checkpoint(path):
    """The dict in a .pt file, on the CPU. weights_only: what wants to run code when opened is refused."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise ValueError(f'no checkpoint at {path}: train one first, or name another with --out_dir') from None
    except pickle.UnpicklingError as error:
        raise ValueError(f'{path} is refused: it is damaged, or holds more than tensors and plain values and '
                         'could run code when opened; expected a ckpt.pt written by train.py') from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).partition('\n')[0] or type(error).__name__
        raise ValueError(f'{path} cannot be read as a checkpoint; it may have been cut off: {reason}') from error
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= set(checkpoint):
        raise ValueError(f'{path} is no glimpse or nanoGPT checkpoint: it has no "model" and "model_args"')
    return checkpoint

def read_export(path):
    """The dict in a glimpse.safetensors that sample.py --export has written."""
    try:
        state, metadata = read_safetensors(path)
        return {**json.loads(metadata['glimpse']), 'model': state}
    except (FileNotFoundError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as a model that sample.py --export has written: {error}') from error

def read_base_model(path, base_model, args):
    """The model that the LoRA updates in `path` adapt, with as many rows as the model with them has."""
    try:
        state = read_weights(base_model['init_from'])['model']
    except ValueError as error:
        raise ValueError(f'{path} holds LoRA updates only; the model they adapt cannot be read: {error}') from error
    if fingerprint(state) != base_model['fingerprint']:
        raise ValueError(f'{path} adapts {base_model["init_from"]}, but what is there now are other weights')
    resized = {name: resize_embedding(state[name], args[key]) for name, (key, _) in RESIZABLE.items() if name in state}
    return {**state, **resized}

def build_model(checkpoint, source, load=True, **overrides):
    """The GPT, or QFormerPretraining, of a dict of `read_weights`, with some fields of its GPTConfig changed:
    vision fields add vision to a text-only model, lora_rank adds LoRA's updates, or merges them if it is 0.
    load=False reads no pretrained encoder: another one's weights come next. The tensors become the model's own,
    without a copy; model.load_report is the table of what was loaded. Raises ValueError, with the list, if names or
    shapes do not fit.
    """
    state, args = checkpoint['model'], checkpoint['model_args']
    config = complete_config(GPTConfig(**{**args, **overrides}))
    old_rank = args.get('lora_rank', 0)
    if old_rank and config.lora_rank not in (0, old_rank):
        raise ValueError(f'{source} has LoRA updates of rank {old_rank}: continue with that lora_rank, or merge '
                         f'them by lora_rank=0; {config.lora_rank} is neither')
    merges_lora = old_rank and not config.lora_rank
    if merges_lora and args.get('lora_scope') == 'image':
        raise ValueError(f'{source} has LoRA updates that act only after an image and cannot be merged: '
                         f'continue with lora_rank={old_rank}')
    if config.vocab_size < args.get('vocab_size', 0):
        raise ValueError(f'{source} has vocab_size {args["vocab_size"]}, not {config.vocab_size}: a vocabulary does '
                         'not shrink')
    has = lambda part: any(part in name for name in state)
    is_gpt = config.objective == 'lm'
    if is_gpt and not has('transformer.h.'):
        raise ValueError(f'{source} holds no GPT: --vision_from={source} starts a Q-Former from it')
    if merges_lora:
        config = replace(config, lora_rank=old_rank)
    model = new_model(config, load=load and not has('vision.encoder.'), device='meta')
    expected = checkpoint['vision_fingerprint']
    if expected and model.vision.encoder.fingerprint != expected:
        raise ValueError(f'{config.vision_encoder}: these are not the weights that the model was trained with '
                         f'(fingerprint {model.vision.encoder.fingerprint}, expected {expected})')
    # what the checkpoint has nothing of is new, or published
    optional = [part for part in ('.lora_', 'vision.', 'vision.encoder.tower.') if not has(part)]
    model.load_report = load_weights(model, state, source, args, optional)
    model.base_model = checkpoint['base_model']
    if config.lora_rank and not old_rank:
        model.base_model = {'init_from': source, 'fingerprint': fingerprint(state)}
    if is_gpt and config.vision_encoder and load and not has('vision.'):
        model.match_rms()
    if merges_lora:
        model.merge_lora()
    return model

def new_model(config, load=True, device='cpu'):
    """The GPT with random weights, or what config.objective trains without one."""
    if config.objective != 'lm':
        return QFormerPretraining(config, load)
    return GPT(config, load, device)

# tables whose rows may be more or fewer than a checkpoint's, the field that counts them, and how many more there are at
# the end: blip2.py's two own ids
RESIZABLE = {'transformer.wte.weight': ('vocab_size', 0), 'lm_head.weight': ('vocab_size', 0),
             'transformer.wpe.weight': ('block_size', 0),
             'vision.qformer.wte.weight': ('vocab_size', 2), 'vision.qformer.wpe.weight': ('block_size', 0)}

@torch.no_grad()
def load_weights(model, state, source, args=(), optional=(), only=''):
    """strict=False, made safe: every tensor of the model whose name starts with `only` must be in `state`, and
    every tensor of `state` in the model, in its shape, except

        optional  parts of names: such a tensor may be absent from one side, or have another shape there
        args      model_args of `state`: its RESIZABLE tables may have more or fewer rows than the model's.
                  Old rows stay as they are, so the logits of text do not change by a bit

    Returns the table of what was loaded, grown, new and left out. Raises ValueError with what does not fit.
    """
    own = {name: p for name, p in model.state_dict().items() if name.startswith(only)}
    is_optional = lambda name: any(part in name for part in optional)
    wrong = [f'unexpected {name}' for name in state if name not in own and not is_optional(name)]
    loaded, table = {}, defaultdict(list)
    group_of = lambda name: 'LoRA' if '.lora_' in name else '.'.join(name.split('.')[:2])
    for name, p in own.items():
        action, note = 'loaded', ''
        old = state.get(name)
        counts, n_last = RESIZABLE.get(name, ('', 0))
        if old is not None and counts in args and len(old) == args[counts] + n_last != len(p):
            action = 'grown' if len(old) < len(p) else 'cropped'
            note = f'{len(old)} -> {len(p)} rows'
            first, last = old.split([args[counts], n_last])
            old = torch.cat([resize_embedding(first, len(p) - n_last), last])
        if old is not None and old.shape == p.shape:
            loaded[name] = old
        elif is_optional(name):
            action = 'published' if name.startswith('vision.encoder.tower.') else 'new'
        elif old is None:
            wrong.append(f'missing {name}')
        else:
            wrong.append(f'{name} is {tuple(old.shape)}, not {tuple(p.shape)}')
        table[action, group_of(name), note].append(p.numel())
    for name, p in state.items():
        if name not in own:
            table['left out', group_of(name), ''].append(p.numel())
    if wrong:
        raise ValueError(f'{source} does not hold the weights that its configuration asks for: ' + '; '.join(wrong))
    model.load_state_dict(loaded, strict=False, assign=True)  # strict=True is what has been done above
    if model.config.objective == 'lm' and model.config.tie_weights:
        model.transformer.wte.weight = model.lm_head.weight
    return '\n'.join(f'{action:<9} {group:<18} {len(sizes):>4} tensors {sum(sizes) / 1e6:>9.2f}M  {note}'.rstrip()
                     for (action, group, note), sizes in table.items())

def resize_embedding(table, rows):
    """The first rows of a table; or all of them, then new ones: the mean of the old with a little noise, always
    the same. A new token is then hardly likely (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    noise = torch.randn(max(0, rows - len(table)), table.shape[1], generator=torch.Generator().manual_seed(0))
    new = table.mean(0, dtype=torch.float32) + 0.02 * noise
    return torch.cat([table[:rows], new.to(table.dtype)])

def checkpoint_state(model):
    """The tensors that a checkpoint has to hold: not those that a name and a fingerprint bring back, of a
    frozen pretrained encoder, and in a LoRA run of the model that it adapts, with a frozen encoder that came with it.
    """
    is_frozen = model.vision is not None and not any(p.requires_grad for p in model.vision.encoder.parameters())
    came_with_base = model.base_model and is_frozen and isinstance(model.vision.encoder, PublishedViT)
    left_out = ('vision.encoder.',) if published_fingerprint(model) or came_with_base else ()
    return {name: p for name, p in model.state_dict().items()
            if not name.startswith(left_out)
            and (not model.base_model or name.startswith('vision.') or '.lora_' in name)}

def published_fingerprint(model):
    """The fingerprint of the model's encoder if its weights are still the published ones, else ''."""
    if model.vision is None or any(p.requires_grad for p in model.vision.encoder.parameters()):
        return ''
    return model.vision.encoder.fingerprint

# what vision_from takes over: the fields of GPTConfig that describe an encoder and its images
ENCODER_FIELDS = ('vision_encoder', 'vision_n_layer', 'vision_n_head', 'vision_n_embd', 'vision_n_inner', 'vision_layer',
                  'vision_cls', 'patch_height', 'patch_width', 'max_image_tokens', 'line_height', 'image_fit',
                  'image_size', 'image_resample', 'image_mean', 'image_std', 'tile_marks', 'max_image_side', 'max_tiles',
                  'tile_size', 'deepencoder_mode', 'sam_tower', 'clip_tower')
# those of a Q-Former, and their names in BLIP-2's config.json
QFORMER_FIELDS = {'n_queries': 'num_query_tokens', 'qformer_n_layer': 'num_hidden_layers',
                  'qformer_n_head': 'num_attention_heads', 'qformer_n_embd': 'hidden_size',
                  'qformer_cross_every': 'cross_attention_frequency'}
# the Q-Former's text side, which belongs to a vocabulary and which a connector does not have
QFORMER_TEXT = ('.wte.', '.wpe.', '.text_mlp.')
QFORMER_EMBEDDINGS = ('vision.qformer.wte.weight', 'vision.qformer.wpe.weight')
# what a BERT has and a Q-Former does not
BERT_ONLY = ('.token_type_embeddings.', '.pooler.', '.cls.')

def vision_of(checkpoint, source, connector):
    """What a model with this connector takes over of another one's encoder and Q-Former: ({field of GPTConfig:
    value}, {name: tensor}). BLIP-2 gives its Q-Former, BERT all of one but its queries and cross-attention. Raises
    ValueError if there is nothing to take over.
    """
    args = vars(GPTConfig(**checkpoint['model_args']))
    prefixes = ('vision.encoder.', 'vision.qformer.') if connector == 'qformer' else ('vision.encoder.',)
    state = {name: p.float() for name, p in checkpoint['model'].items() if name.startswith(prefixes)}
    names = ENCODER_FIELDS if args['vision_encoder'] else ()
    if args['vision_encoder'] == 'eva':  # BLIP-2's own stays with it: it is ten times as large as its Q-Former
        state = {name: p for name, p in state.items() if not name.startswith('vision.encoder.')}
        names = ()
    if 'vision.qformer.queries' in state:
        names += tuple(QFORMER_FIELDS)
    elif any(name.startswith('vision.qformer.') for name in state):  # BERT: the run says how many queries there are
        names += ('qformer_n_layer', 'qformer_n_head', 'qformer_n_embd')
    elif not state:
        raise ValueError(f'vision_from={source} has no small ViT or deepencoder to take over; a Q-Former needs '
                         '--connector=qformer')
    return {name: args[name] for name in names}, state

def load_vision_from(model, state, source):
    """Loads the tensors of `vision_of` into a model. Returns the table of what was loaded."""
    parts = {'.'.join(name.split('.')[:2]) for name in state}  # vision.encoder, vision.qformer
    if 'vision.encoder' in parts:
        model.vision.encoder.fingerprint = ''  # other weights than the published ones
    optional = QFORMER_TEXT
    if 'vision.qformer.queries' not in state:
        optional += QFORMER_NEW + BERT_ONLY
    args = {counts: len(state[name]) - n_last for name, (counts, n_last) in RESIZABLE.items() if name in state}
    return load_weights(model, state, source, args, optional, only=tuple(parts))

def strip_prefixes(name):
    """Removes what torch.compile and DDP put in front of names."""
    return name.removeprefix('module.').removeprefix('_orig_mod.').removeprefix('module.')

# -----------------------------------------------------------------------------
# Hugging Face's layouts

GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')

# fields of GPTConfig and their names in config.json
GPT2_FIELDS = {'n_layer': 'n_layer', 'n_head': 'n_head', 'n_embd': 'n_embd', 'block_size': 'n_positions',
               'vocab_size': 'vocab_size', 'n_inner': 'n_inner', 'norm_eps': 'layer_norm_epsilon',
               'tie_weights': 'tie_word_embeddings'}
LLAMA_FIELDS = {'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads', 'n_embd': 'hidden_size',
                'block_size': 'max_position_embeddings', 'vocab_size': 'vocab_size',
                'n_inner': 'intermediate_size', 'norm_eps': 'rms_norm_eps', 'tie_weights': 'tie_word_embeddings',
                'n_kv_head': 'num_key_value_heads', 'head_dim': 'head_dim', 'rope_theta': 'rope_theta'}
# tensors of old files that are no weights: the causal mask, RoPE's speeds, 0, 1, 2, ...
CONSTANTS = ('.attn.bias', '.attn.masked_bias', 'rotary_emb.inv_freq', 'position_ids')
GPT2_TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # OpenAI's layers are [in, out]
# activation_function of a GPT-2 -> gelu_approximate
GELU = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}

# parts of names, Llama's, Qwen's and SmolLM3's -> ours; their q_proj, k_proj and v_proj are our c_attn
LLAMA = {'model.embed_tokens': 'transformer.wte', 'model.layers': 'transformer.h',
         'model.norm': 'transformer.ln_f', 'input_layernorm': 'ln_1', 'post_attention_layernorm': 'ln_2',
         'self_attn.o_proj': 'attn.c_proj', 'self_attn.q_norm': 'attn.q_norm', 'self_attn.k_norm': 'attn.k_norm',
         'mlp.up_proj': 'mlp.c_fc', 'mlp.gate_proj': 'mlp.c_gate', 'mlp.down_proj': 'mlp.c_proj'}

# parts of names, BLIP-2's Q-Former's -> ours
BLIP2 = {'query_tokens': 'queries', 'qformer.layernorm': 'ln_embed', 'qformer.encoder.layer': 'h',
         'vision_model.post_layernorm': 'ln_image', 'embeddings.word_embeddings': 'wte',
         'embeddings.position_embeddings': 'wpe',
         'crossattention': 'cross_attn', 'cross_attn.attention': 'cross_attn', 'attention.attention': 'attn',
         'cross_attn.output': 'cross_attn', 'attention.output': 'attn',
         'intermediate_query.dense': 'query_mlp.fc', 'output_query': 'query_mlp',
         'intermediate.dense': 'text_mlp.fc', 'output': 'text_mlp',
         '.dense': '.proj', '.LayerNorm': '.ln', '.query.': '.q.', '.key.': '.k.', '.value.': '.v.'}
# BERT's -> ours. Files of old have TensorFlow's names of the norms' weights
BERT = {'LayerNorm.gamma': 'LayerNorm.weight', 'LayerNorm.beta': 'LayerNorm.bias', 'embeddings.LayerNorm': 'ln_embed',
        'embeddings.token_type_embeddings': 'token_type_embeddings', 'encoder.layer': 'h', 'attention.self': 'attn', **BLIP2}

def published_folder(source):
    """The folder of a published model; one on the hub is downloaded once. Raises ValueError if that fails."""
    if os.path.isdir(source):
        return source
    from huggingface_hub import snapshot_download
    patterns = ['*config.json', 'model*.safetensors*', 'token*.json', 'chat_template.*']
    name = f'openai-community/{source}' if source in GPT2 else source
    try:
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # the hub's client raises many of its own
        raise ValueError(f'{source} is not in the cache of huggingface_hub and cannot be downloaded '
                         f'({type(error).__name__}): connect once, or name a checkpoint that is there, or a '
                         'folder with its config.json and model.safetensors, --init_from=FOLDER') from error

def read_published(source):
    """`read_weights` for a published model. Raises ValueError for an architecture that is not supported."""
    config, tensors = read_tensors(source)
    config = {key: value for key, value in config.items() if value is not None}  # null is the default
    tensors = {name: p for name, p in tensors.items() if not name.endswith(CONSTANTS)}
    readers = {'gpt2': read_gpt2, 'llama': read_llama, 'qwen2': read_llama, 'qwen3': read_llama, 'smollm3': read_llama,
               'nanovlm': read_nanovlm, 'blip-2': read_blip2, 'bert': read_bert, 'idefics3': read_smolvlm,
               'smolvlm': read_smolvlm, 'llava': read_llava}
    model_type = config.get('model_type', 'nanovlm' if 'vit_hidden_dim' in config else None)  # nanoVLM's files have none
    path = f'{source}/config.json'
    if model_type not in readers:
        raise ValueError(f'{path}: expected a model of type {", ".join(readers)}, got {model_type!r}')
    try:
        args, state = readers[model_type](config, tensors)
        chat = {'tokenizer': 'gpt2' if source in GPT2 else source}
        if model_type == 'nanovlm':
            chat = nanovlm_chat(config, source)
    except KeyError as error:
        raise ValueError(f'{path} is no complete configuration of a {model_type}: it has no {error}') from None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'{path} is of a model that this GPT does not compute: {error}') from None
    return {'model': state, 'model_args': args, 'config': chat}

def read_tensors(source):
    """(config.json's dict, {name: tensor}) of a model in Hugging Face's layout, in one file or in shards."""
    folder = Path(published_folder(source))
    index = folder / 'model.safetensors.index.json'
    path = folder / 'config.json'
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        if (folder / 'preprocessor_config.json').exists():  # of models with vision: how images are resized
            config['preprocessor'] = json.loads((folder / 'preprocessor_config.json').read_text(encoding='utf-8'))
        shards = ['model.safetensors']
        if index.exists():
            shards = sorted(set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()))
        tensors = {}
        for shard in shards:
            path = folder / shard
            tensors.update(read_safetensors(path)[0])
    except FileNotFoundError:
        raise ValueError(f'{source} holds no model: expected config.json and model.safetensors, but '
                         f'{path} is not there') from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f'{source} cannot be read; a file of it may have been cut off: {error}') from error
    return config, tensors

def read_safetensors(path):
    """({name: tensor}, metadata) of a file. Each tensor is a memory map of its own, freed with it."""
    with safe_open(path, 'pt') as f:
        metadata = f.metadata() or {}
        names = list(f.keys())
    tensors = {}
    for name in names:
        with safe_open(path, 'pt') as f:
            tensors[strip_prefixes(name)] = f.get_tensor(name)
    return tensors, metadata

def check_supported(config, expected):
    """Raises ValueError if a setting is not the expected one: the result would look right and be wrong."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f'its {key} is {config[key]!r}, not {value!r}')

def rename(name, table):
    """The name with every part that the table lists replaced."""
    for old, new in table.items():
        name = name.replace(old, new)
    return name

def read_gpt2(config, tensors):
    """A GPT-2's config.json and tensors as model_args and state dict."""
    config = {'activation_function': 'gelu_new', 'n_inner': 0, 'layer_norm_epsilon': 1e-5,
              'tie_word_embeddings': True, **config}
    activation = config['activation_function']
    if activation not in GELU:
        raise ValueError(f'its activation_function is {activation!r}, not one of {", ".join(GELU)}')
    check_supported(config, {'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False})
    args = {ours: config[theirs] for ours, theirs in GPT2_FIELDS.items()}
    args.update(bias=True, gelu_approximate=GELU[activation])
    state = {}
    for name, p in tensors.items():
        if name != 'lm_head.weight':
            name = 'transformer.' + name.removeprefix('transformer.')
        state[name] = p.t().contiguous() if name.endswith(GPT2_TRANSPOSED) else p
    return args, state

def read_llama(config, tensors):
    """The config.json and tensors of a Llama, Qwen2, Qwen3 or SmolLM3 as model_args and state dict."""
    model_type = config['model_type']
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    config = {'num_key_value_heads': 0, 'head_dim': 128 if model_type == 'qwen3' else 0, 'rope_theta': 10000.0,
              'tie_word_embeddings': False, **config, **rope}
    args = {ours: config[theirs] for ours, theirs in LLAMA_FIELDS.items()}
    args.update(bias=False, norm='rmsnorm', position='rope', mlp='swiglu', qk_norm=model_type == 'qwen3',
                qkv_bias=model_type == 'qwen2')
    rope_type = config.get('rope_type', config.get('type', 'default'))
    if rope_type == 'llama3':
        check_supported(config, {'low_freq_factor': 1.0, 'high_freq_factor': 4.0})
        args.update(rope_factor=config['factor'], rope_original=config['original_max_position_embeddings'])
    elif rope_type != 'default':
        raise ValueError(f"its rope_type is {rope_type!r}, not 'default' or 'llama3'")
    if model_type == 'smollm3':
        args['nope_every'] = config.get('no_rope_layer_interval', 4)
        rotates = [int((i + 1) % args['nope_every'] > 0) for i in range(args['n_layer'])]
        check_supported(config, {'no_rope_layers': rotates})
    check_supported(config, {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'use_sliding_window': False,
                             'partial_rotary_factor': 1.0})
    state = {rename(name, LLAMA): p for name, p in tensors.items()}
    for i in range(args['n_layer']):
        for kind in ('weight', 'bias'):
            names = [f'transformer.h.{i}.self_attn.{x}_proj.{kind}' for x in 'qkv']
            if all(name in state for name in names):
                state[f'transformer.h.{i}.attn.c_attn.{kind}'] = torch.cat([state.pop(name) for name in names])
    return args, state

def read_blip2(config, tensors):
    """The Q-Former of a BLIP-2, with its text side if the file has that, as model_args and tensors named
    vision.qformer.*: 32 queries that attend to the penultimate layer of EVA-CLIP's ViT-g/14, 1408 wide.
    """
    config = {**config, **config.get('qformer_config', {})}
    check_qformer(config)
    # BLIP-2's defaults are VisionConfig's
    args = {ours: config[theirs] for ours, theirs in QFORMER_FIELDS.items() if theirs in config}
    args['connector'] = 'qformer'
    state = {}
    for name, p in tensors.items():
        if name.startswith(('qformer.', 'query_tokens', 'embeddings.', 'vision_model.post_layernorm.')):
            name = rename(name, BLIP2)
            state[f'vision.qformer.{name}'] = p[0] if name == 'queries' else p
    if 'itm_head.weight' in tensors:
        more_args, more_state = read_first_stage(config, tensors)
        args |= more_args
        state |= more_state
    return args, state

def read_bert(config, tensors):
    """A BERT as the start of a Q-Former, as model_args and tensors named vision.qformer.*, as in
    https://github.com/salesforce/LAVIS (blip2_qformer.py): the MLPs of the queries are copies of BERT's, which remain those
    of the text; of blip2.py's two own ids CLS is BERT's [CLS], and DEC is new. Token types, pooler and heads have no use.
    """
    check_qformer(config)
    args = {ours: config[theirs] for ours, theirs in QFORMER_FIELDS.items() if theirs in config}
    tensors = {name.removeprefix('bert.'): p for name, p in tensors.items()}
    wte = tensors['embeddings.word_embeddings.weight']
    args.update(connector='qformer', vocab_size=len(wte), block_size=len(tensors['embeddings.position_embeddings.weight']))
    dec = 0.02 * torch.randn(1, wte.shape[1], generator=torch.Generator().manual_seed(0))
    tensors['embeddings.word_embeddings.weight'] = torch.cat([wte, wte[BERT_CLS:BERT_CLS + 1], dec.to(wte.dtype)])
    state = {}
    for name, p in tensors.items():
        name = 'vision.qformer.' + rename(name, BERT)
        state[name] = p
        if 'text_mlp' in name:  # cloned, because each is trained
            state[name.replace('text_mlp', 'query_mlp')] = p.clone()
    return args, state

def check_qformer(config):
    """Raises ValueError if a BERT's or Q-Former's config.json is not of what vision.py's QFormer computes."""
    check_supported(config, {'hidden_act': 'gelu', 'position_embedding_type': 'absolute', 'layer_norm_eps': 1e-12,
                             'intermediate_size': 4 * config.get('hidden_size', 768)})

def read_first_stage(config, tensors):
    """What makes a BLIP-2 for retrieval whole: its encoder, its heads, and text embeddings of blip2.py's two own ids."""
    vision = {**EVA_DEFAULTS, **config['vision_config']}
    check_supported(vision, {'hidden_act': 'gelu', 'layer_norm_eps': 1e-6})
    wte = tensors['embeddings.word_embeddings.weight']
    args = {ours: vision[theirs] for ours, theirs in VIT_FIELDS.items()}
    args.update(objective='itc+itm', vision_encoder='eva', vision_layer=-1, image_fit='squash', **CLIP_COLORS,
                vocab_size=len(wte), image_token=len(wte), block_size=len(tensors['embeddings.position_embeddings.weight']),
                proj_dim=len(tensors['vision_projection.weight']))
    # CLS is BERT's [CLS], DEC its last id, [DEC]
    state = {'vision.qformer.wte.weight': torch.cat([wte, wte[BERT_CLS:BERT_CLS + 1], wte[-1:]]),
             'logit_scale': torch.tensor(math.log(1 / 0.07))}  # is not in the file
    heads = {'vision_projection': 'image_proj', 'text_projection': 'text_proj', 'itm_head': 'itm_head'}
    for name, p in tensors.items():
        if name.startswith(tuple(heads)):
            state[rename(name, heads)] = p
        elif name.startswith('vision_model.') and 'post_layernorm' not in name:
            name = rename(name.removeprefix('vision_model.'), EVA_NAMES)
            shaped = {'patch_embed.weight': patch_matrix, 'cls': torch.flatten, 'wpe': torch.squeeze}.get(name, lambda p: p)
            state['vision.encoder.' + name.replace('wpe', 'wpe.weight')] = shaped(p)
    return args, state

def patch_matrix(p):
    """The weights of a convolution over patches, (C, 3, p, p), as a matrix (C, p * p * 3)."""
    return p.permute(0, 2, 3, 1).flatten(1)

# vision-language models. Their text model is one of the above, their encoder vision.py's PublishedViT

VIT_FIELDS = {'vision_n_layer': 'num_hidden_layers', 'vision_n_head': 'num_attention_heads', 'vision_n_embd': 'hidden_size',
                'vision_n_inner': 'intermediate_size', 'image_size': 'image_size', 'patch_height': 'patch_size',
                'patch_width': 'patch_size'}
# parts of names, SigLIP's and CLIP's -> ours; their q_proj, k_proj and v_proj are our c_attn
VIT_NAMES = {'embeddings.patch_embedding': 'patch_embed', 'embeddings.position_embedding': 'wpe',
         'embeddings.class_embedding': 'cls', 'pre_layrnorm': 'ln_pre', 'post_layernorm': 'ln_post',
         'encoder.layers.': 'h.', 'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2', 'self_attn.out_proj': 'attn_proj',
         'mlp.fc1': 'c_fc', 'mlp.fc2': 'mlp_proj'}

# what their files leave out
LLAMA_DEFAULTS = {'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32, 'num_attention_heads': 32,
                  'max_position_embeddings': 2048, 'rms_norm_eps': 1e-6, 'vocab_size': 32000}
SIGLIP_DEFAULTS = {'hidden_size': 1152, 'intermediate_size': 3072, 'num_hidden_layers': 12, 'num_attention_heads': 16,
                   'image_size': 224, 'patch_size': 32}

EVA_DEFAULTS = {'hidden_size': 1408, 'intermediate_size': 6144, 'num_hidden_layers': 39, 'num_attention_heads': 16,
                'image_size': 224, 'patch_size': 14}
EVA_NAMES = {**VIT_NAMES, 'self_attn.qkv': 'c_attn', 'self_attn.projection': 'attn_proj'}
BERT_CLS = 101
CLIP_COLORS = {'image_mean': (0.48145466, 0.4578275, 0.40821073), 'image_std': (0.26862954, 0.26130258, 0.27577711)}

def read_smolvlm(config, tensors):
    """A SmolVLM's, SmolVLM2's or Idefics3's config.json and tensors as model_args and state dict."""
    images = config.get('preprocessor', {})
    check_supported(images, {'do_resize': True, 'resample': 1, 'do_normalize': True})
    size = config['vision_config']['image_size']
    check_supported(images.get('max_image_size', {}), {'longest_edge': size})
    text, state = read_text_of(config, tensors)
    args, encoder = read_vit(config['vision_config'], tensors, 'siglip', -1, has_norm=True)
    args.update(connector='shuffle', pool_size=config['scale_factor'], image_fit='squash', image_token=config['image_token_id'],
                tile_marks=images.get('do_image_splitting', True),
                max_image_side=images.get('size', {}).get('longest_edge', 4 * size), **colors_of(images))
    projection = tensors['model.connector.modality_projection.proj.weight']
    return {**text, **args}, {**state, **encoder, 'vision.connector.net.0.weight': projection}

def read_llava(config, tensors):
    """A LLaVA's config.json and tensors as model_args and state dict: CLIP or SigLIP, an MLP, Llama or Qwen2."""
    images = config.get('preprocessor', {})
    kind = config['vision_config']['model_type'].removesuffix('_vision_model')
    if kind not in ('clip', 'siglip'):
        raise ValueError(f'its encoder is a {kind}, not a clip or siglip')
    # CLIP's class token is dropped, SigLIP has none
    check_supported(config, {'projector_hidden_act': 'gelu', 'multimodal_projector_bias': True,
                             'vision_feature_select_strategy': 'default' if kind == 'clip' else 'full'})
    layer = config.get('vision_feature_layer', -2)
    if layer not in range(-config['vision_config']['num_hidden_layers'], 0):
        raise ValueError(f'its vision_feature_layer is {layer!r}, not one counted from the last, such as -2')
    text, state = read_text_of(config, tensors)
    args, encoder = read_vit(config['vision_config'], tensors, kind, layer)
    is_cropped = images.get('do_center_crop', kind == 'clip')
    args.update(connector='mlp', image_fit='crop' if is_cropped else 'squash',
                image_token=config.get('image_token_index', config.get('image_token_id')), **colors_of(images))
    for i, name in enumerate(('linear_1', 'linear_2')):
        for part in ('weight', 'bias'):
            tensor = next(p for key, p in tensors.items() if key.endswith(f'multi_modal_projector.{name}.{part}'))
            state[f'vision.connector.net.{2 * i}.{part}'] = tensor
    return {**text, **args}, {**state, **encoder}

def colors_of(preprocessor):
    """The mean and std of the pixels, if a preprocessor_config.json has them."""
    return {key: tuple(preprocessor[key]) for key in ('image_mean', 'image_std') if key in preprocessor}

def read_text_of(config, tensors):
    """The text model in a vision-language model as model_args and state dict."""
    text = {**LLAMA_DEFAULTS, **config['text_config']}
    if text['model_type'] not in ('llama', 'qwen2'):
        raise ValueError(f'its text model is a {text["model_type"]}, not a llama or qwen2')
    prefixes = ('model.text_model.', 'model.language_model.', 'language_model.model.')
    state = {}
    for name, p in tensors.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                state['model.' + name.removeprefix(prefix)] = p
        if name in ('lm_head.weight', 'language_model.lm_head.weight'):
            state['lm_head.weight'] = p
    text['tie_word_embeddings'] = 'lm_head.weight' not in state or config.get('tie_word_embeddings', False)
    return read_llama({key: value for key, value in text.items() if value is not None}, state)

def read_vit(config, tensors, kind, layer, has_norm=False):
    """The encoder in a vision-language model as model_args and state dict, without the layers after `layer`."""
    expected = {'siglip': {'hidden_act': 'gelu_pytorch_tanh', 'layer_norm_eps': 1e-6},
                'clip': {'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5}}[kind]
    config = {**expected, **(SIGLIP_DEFAULTS if kind == 'siglip' else {}), **config}
    check_supported(config, expected)
    args = {ours: config[theirs] for ours, theirs in VIT_FIELDS.items()}
    args.update(vision_encoder=kind, vision_layer=layer, image_positions='each')
    if kind == 'clip':
        args.update(CLIP_COLORS)
    n_layer = range(args['vision_n_layer'])[layer] + 1
    state = {}
    for name, p in tensors.items():
        match = re.match(r'(?:model\.)?vision_(?:model|tower)\.(?:vision_model\.)?(?!head\.)(.*)', name)
        if not match:
            continue
        rest = rename(match[1], VIT_NAMES)
        if rest.startswith('h.') and int(rest.split('.')[1]) >= n_layer:
            continue
        if rest.startswith('ln_post') and not has_norm:
            continue
        state[f'vision.encoder.{rest}'] = patch_matrix(p) if rest == 'patch_embed.weight' else p
    for i in range(n_layer):
        for part in ('weight', 'bias'):
            names = [f'vision.encoder.h.{i}.self_attn.{x}_proj.{part}' for x in 'qkv']
            if all(name in state for name in names):
                state[f'vision.encoder.h.{i}.c_attn.{part}'] = torch.cat([state.pop(name) for name in names])
    return args, state

# nanoVLM, https://github.com/huggingface/nanoVLM: a SmolVLM in names of its own

NANOVLM_TEXT = {'lm_hidden_dim': 'hidden_size', 'lm_inter_dim': 'intermediate_size', 'lm_n_blocks': 'num_hidden_layers',
                'lm_n_heads': 'num_attention_heads', 'lm_n_kv_heads': 'num_key_value_heads', 'lm_rms_eps': 'rms_norm_eps',
                'lm_re_base': 'rope_theta', 'lm_max_position_embeddings': 'max_position_embeddings',
                'lm_vocab_size': 'vocab_size'}
NANOVLM_VISION = {'vit_hidden_dim': 'hidden_size', 'vit_inter_dim': 'intermediate_size', 'vit_n_blocks': 'num_hidden_layers',
                  'vit_n_heads': 'num_attention_heads', 'vit_img_size': 'image_size', 'vit_patch_size': 'patch_size',
                  'vit_ln_eps': 'layer_norm_eps'}
# parts of names, nanoVLM's -> SmolVLM's; its encoder's q, k and v are one matrix, as in our c_attn
NANOVLM_DECODER = {'decoder.token_embedding': 'model.text_model.embed_tokens', 'decoder.blocks': 'model.text_model.layers',
                   'decoder.norm': 'model.text_model.norm', 'decoder.head': 'lm_head', 'norm1': 'input_layernorm',
                   'norm2': 'post_attention_layernorm', 'attn.out_proj': 'attn.o_proj', '.attn': '.self_attn'}
NANOVLM_ENCODER = {'vision_encoder': 'model.vision_model', 'patch_embedding.conv': 'embeddings.patch_embedding',
                   'patch_embedding.position_embedding': 'embeddings.position_embedding.weight', 'blocks': 'encoder.layers',
                   'model.layer_norm': 'model.post_layernorm', '.ln': '.layer_norm', 'attn.qkv_proj': 'c_attn',
                   '.attn': '.self_attn', 'MP.proj': 'model.connector.modality_projection.proj'}
# its chat template before June 2025: <image>Question: What is this? Answer: A cat.<|endoftext|>
QUESTION_ANSWER = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' + message.content[0].text + eos_token }}"
    "{% elif message.role == 'user' %}{% for part in message.content if part.type == 'image' %}<image>{% endfor %}Question: "
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %} Answer:{% endif %}{% endfor %}")
# goes before its later ones: images and texts of a message become one text, without a new line after an image
JOIN_PARTS = (
    "{% set joined = namespace(messages=[]) %}{% for message in messages %}"
    "{% set content %}{% for part in message.content %}{{ part.text or '<image>' }}{% endfor %}{% endset %}"
    "{% set joined.messages = joined.messages + [{'role': message.role, 'content': content}] %}{% endfor %}"
    "{% set messages = joined.messages %}")

def read_nanovlm(config, tensors):
    """A nanoVLM's config.json and tensors as model_args and state dict. It computes what a SmolVLM does, but an image is one
    square with pixels from 0 to 1. In its first version, as in nanoVLM-222M, no id stood for an image: here a new one does.
    """
    if 'max_img_size' in config:
        raise ValueError(f'its max_img_size is {config["max_img_size"]}: it cuts images into tiles, as nanoVLM does since July '
                         '2025; only older ones, such as lusxvr/nanoVLM-222M, are read')
    text = {theirs: config[name] for name, theirs in NANOVLM_TEXT.items()}
    vision = {theirs: config[name] for name, theirs in NANOVLM_VISION.items()}
    k = config['mp_pixel_shuffle_factor']
    n_tokens = (vision['image_size'] // vision['patch_size'] // k)**2
    check_supported(config, {'vit_cls_flag': False, 'lm_attn_scaling': 1.0, 'mp_image_token_length': n_tokens})
    image_token = config.get('lm_base_vocab_size', text['vocab_size'])
    is_first_version = image_token == text['vocab_size']
    text.update(model_type='llama', vocab_size=text['vocab_size'] + is_first_version)
    renamed = {}
    for name, p in tensors.items():
        table = NANOVLM_DECODER if name.startswith('decoder.') else NANOVLM_ENCODER
        if name in ('decoder.token_embedding.weight', 'decoder.head.weight'):
            p = resize_embedding(p, len(p) + 1) if is_first_version else p
            if config['lm_tie_weights']:  # files hold the tied table once, and by either name
                name = 'decoder.token_embedding.weight'
        renamed[rename(name, table)] = p[0] if name.endswith('position_embedding') else p
    smolvlm = {'text_config': text, 'vision_config': vision, 'scale_factor': k, 'image_token_id': image_token}
    args, state = read_smolvlm(smolvlm, renamed)
    args.update(tile_marks=False, max_image_side=0, image_resample='bilinear', image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    return args, state

def nanovlm_chat(config, source):
    """A nanoVLM's tokenizer and chat template, as knobs of a run. Its files have none: the tokenizer is that of another model,
    by name, unless someone has put a copy of its tokenizer.json next to them.
    """
    has_tokenizer = (Path(published_folder(source)) / 'tokenizer.json').is_file()
    template = JOIN_PARTS + config['lm_chat_template'] if 'lm_chat_template' in config else QUESTION_ANSWER
    return {'tokenizer': source if has_tokenizer else config['lm_tokenizer'], 'chat_template': template}

def to_hugging_face(model):
    """A model as (config.json's dict, {name: tensor}) for Hugging Face's classes: the whole of one that came as a SmolVLM or
    LLaVA, of others the text part, without LoRA's updates that act only after an image and cannot be merged. Raises
    ValueError if no class computes what this model does.
    """
    config, state = text_to_hugging_face(model)
    is_nanovlm = model.config.connector == 'shuffle' and not model.config.max_image_side  # no processor makes its images
    if model.vision is not None and model.config.vision_encoder in ('siglip', 'clip') and not is_nanovlm:
        return vision_to_hugging_face(model, config, state)
    return config, state

def vision_to_hugging_face(model, text, text_state):
    """The same of a whole SmolVLM or LLaVA, by what it is for its text part."""
    c = model.config
    n_inner = c.vision_n_inner or 4 * c.vision_n_embd
    values = {**vars(c), 'vision_n_layer': len(model.vision.encoder.h), 'vision_n_inner': n_inner}
    vision = {theirs: values[ours] for ours, theirs in VIT_FIELDS.items()}
    config = {'text_config': text, 'vision_config': vision, 'tie_word_embeddings': c.tie_weights, 'dtype': text['dtype']}
    if c.connector == 'shuffle':
        vision['model_type'] = 'smolvlm_vision'
        config |= {'model_type': 'smolvlm', 'architectures': ['SmolVLMForConditionalGeneration'],
                   'image_token_id': c.image_token, 'scale_factor': c.pool_size}
        prefix = 'model.vision_model.'
        connector = {'vision.connector.net.0': 'model.connector.modality_projection.proj'}
        state = {name.replace('model.', 'model.text_model.', 1): p for name, p in text_state.items()}
    else:
        vision['model_type'] = f'{c.vision_encoder}_vision_model'
        strategy = 'default' if c.vision_encoder == 'clip' else 'full'
        config |= {'model_type': 'llava', 'architectures': ['LlavaForConditionalGeneration'],
                   'image_token_index': c.image_token, 'vision_feature_select_strategy': strategy,
                   'vision_feature_layer': -1}  # later ones are left out
        prefix = 'vision_tower.vision_model.'
        connector = {'vision.connector.net.0': 'multi_modal_projector.linear_1',
                     'vision.connector.net.2': 'multi_modal_projector.linear_2'}
        state = {f'language_model.{name}': p for name, p in text_state.items()}
        for part, value in (('weight', 1.0), ('bias', 0.0)):  # their class has this norm, and does not use it
            state[f'{prefix}post_layernorm.{part}'] = torch.full((c.vision_n_embd,), value)
    for name, p in model.vision.state_dict(prefix='vision.').items():
        if name.startswith('vision.connector.'):
            state[rename(name, connector)] = p
        else:
            state |= {prefix + theirs: part for theirs, part in to_vit(name.removeprefix('vision.encoder.'), p, c)}
    return config, state

def to_vit(name, p, config):
    """(name, tensor) of a tensor of the PublishedViT as SigLIP and CLIP have it."""
    if name == 'patch_embed.weight':
        p = p.unflatten(1, (config.patch_height, config.patch_width, 3)).permute(0, 3, 1, 2).contiguous()
    name = rename(name, {ours: theirs for theirs, ours in VIT_NAMES.items()})
    if 'c_attn' not in name:
        yield name, p
        return
    for x, part in zip('qkv', p.chunk(3)):
        yield name.replace('c_attn', f'self_attn.{x}_proj'), part.contiguous()

def text_to_hugging_face(model):
    """The same of the text part: GPT2LMHeadModel, LlamaForCausalLM and its relatives."""
    c = model.config
    attn = model.transformer.h[0].attn
    state = {name: p for name, p in model.state_dict().items()
             if not name.startswith('vision.') and '.lora_' not in name}
    if c.tie_weights:
        del state['lm_head.weight']
    switches = c.norm, c.position, c.mlp
    is_multi_head = attn.n_kv_head == attn.n_head and attn.n_head * attn.head_dim == c.n_embd
    if switches == ('layernorm', 'learned', 'gelu') and not c.qk_norm and not c.qkv_bias and is_multi_head:
        config = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'],
                  'activation_function': 'gelu_new' if c.gelu_approximate == 'tanh' else 'gelu'}
        table = GPT2_FIELDS
        state = dict(to_gpt2(state, c.bias))
    elif switches == ('rmsnorm', 'rope', 'swiglu') and not c.bias:
        model_type = llama_type(c)
        rope = {'rope_theta': c.rope_theta, 'rope_type': 'default'}
        if c.rope_factor != 1:
            rope |= {'rope_type': 'llama3', 'factor': c.rope_factor, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                     'original_max_position_embeddings': c.rope_original}
        config = {'model_type': model_type, 'architectures': [LLAMA_CLASSES[model_type]], 'rope_parameters': rope}
        if c.nope_every:
            config |= {'no_rope_layer_interval': c.nope_every, 'pad_token_id': None}
        table = LLAMA_FIELDS
        state = dict(to_llama(state, attn))
    else:
        raise ValueError(f'no class of Hugging Face computes norm {c.norm}, position {c.position}, mlp {c.mlp}, '
                         f'{"with" if c.bias else "without"} bias{" and qk_norm" * c.qk_norm}')
    n_inner = c.n_inner or 4 * c.n_embd
    values = {**vars(c), 'n_inner': n_inner, 'n_kv_head': attn.n_kv_head, 'head_dim': attn.head_dim}
    config.update({theirs: values[ours] for ours, theirs in table.items()})
    config['dtype'] = str(model.lm_head.weight.dtype).removeprefix('torch.')
    return config, state

LLAMA_CLASSES = {'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM',
                 'smollm3': 'SmolLM3ForCausalLM'}

def llama_type(config):
    """The model_type of Hugging Face that computes a Llama with these switches."""
    types = [name for name, switch in (('qwen3', config.qk_norm), ('qwen2', config.qkv_bias), ('smollm3', config.nope_every))
             if switch] or ['llama']
    if len(types) > 1 or types != ['llama'] and config.rope_factor != 1:
        raise ValueError('no class of Hugging Face has more than one of qk_norm, qkv_bias, nope_every and rope_factor')
    return types[0]

def to_gpt2(state, bias):
    """(name, tensor) as GPT2LMHeadModel has them."""
    for name, p in state.items():
        yield name, p.t().contiguous() if name.endswith(GPT2_TRANSPOSED) else p
        if not bias and ('.h.' in name or '.ln_f.' in name):
            yield name.replace('weight', 'bias'), p.new_zeros(len(p))  # theirs always have one

def to_llama(state, attn):
    """(name, tensor) as LlamaForCausalLM and its relatives have them."""
    theirs = {ours: name for name, ours in LLAMA.items()}
    sizes = [heads * attn.head_dim for heads in (attn.n_head, attn.n_kv_head, attn.n_kv_head)]
    for name, p in state.items():
        name = rename(name, theirs)
        if 'c_attn' in name:
            for x, part in zip('qkv', p.split(sizes)):
                yield name.replace('attn.c_attn', f'self_attn.{x}_proj'), part.contiguous()
        else:
            yield name, p
