"""Tests of a Q-Former that starts from BERT's weights, and of the learning rate of what BERT does not have."""

import json
import shutil

import pytest
import tokenizers
import torch
from conftest import ROOT, inside, optimizer_config, read_log, refused, train, write_pairs
from PIL import Image
from safetensors.torch import load_file, save_file
from test_qformer import captions, pair_batch, random_images

import train as train_script
from blip2 import QFormerPretraining
from configurator import configure, knobs_of
from dataloader import collate, get_tokenizer, tokenize
from model import GPTConfig
from patches import keeps_class_token
from vision import complete_config, tower_shape
from weights import load_vision_from, new_model, read_weights, vision_of

transformers = pytest.importorskip('transformers')

CLS = 101  # of BERT's vocabularies
N_LAYER = 4
NEW = {'vision.qformer.queries', 'vision.qformer.ln_image.weight', 'vision.qformer.ln_image.bias',
       *(f'vision.qformer.h.{i}.cross_attn.{part}.{kind}' for i in (0, 2)
         for part in ('q', 'k', 'v', 'proj', 'ln') for kind in ('weight', 'bias'))}
EMBEDDINGS = ['vision.qformer.wte.weight', 'vision.qformer.wpe.weight']


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
    """A small BERT of Hugging Face's with random weights, a WordPiece tokenizer with [CLS] in its place, and their folder."""
    folder = tmp_path_factory.mktemp('bert')
    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    vocab = ['[PAD]', *(f'[unused{i}]' for i in range(99)), '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters,
             *(f'##{letter}' for letter in letters), 'train', 'val', 'image', 'number', '##s']
    vocab = {word: i for i, word in enumerate(dict.fromkeys(vocab))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token='[UNK]'))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.post_processor = tokenizers.processors.BertProcessing(('[SEP]', 102), ('[CLS]', CLS))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token='[CLS]', sep_token='[SEP]', pad_token='[PAD]', unk_token='[UNK]',
        mask_token='[MASK]')
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(
        hidden_size=16, num_hidden_layers=N_LAYER, num_attention_heads=2, intermediate_size=64, vocab_size=len(vocab),
        max_position_embeddings=40)).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # so that biases and norms make a difference too
            p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(folder)
    return theirs.bert, tokenizer, folder


def changed_copy(folder, target, rename):
    """A copy of a model's folder in which `rename` has renamed the tensors, or left them out by None."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / 'model.safetensors')
    save_file({rename(name): p for name, p in tensors.items() if rename(name)}, target / 'model.safetensors',
              metadata={'format': 'pt'})
    return target


def first_stage(folder, **changes):
    """A first stage with this BERT, the tensors that came from it, and the report on them."""
    args, state = vision_of(read_weights(folder), folder, 'qformer')
    torch.manual_seed(0)
    model = new_model(complete_config(GPTConfig(**{
        'objective': 'itc+itm+itg', 'connector': 'qformer', 'n_queries': 5, 'block_size': 12, 'vocab_size': 320,
        'image_token': 256, 'vision_encoder': 'vit', 'vision_n_layer': 1, 'vision_n_head': 2, 'vision_n_embd': 24,
        'patch_height': 8, 'patch_width': 8, 'max_image_tokens': 16, 'proj_dim': 8, **args, **changes})))
    return model, state, load_vision_from(model, state, folder)


# -----------------------------------------------------------------------------
# what is loaded

OLD_NAMES = {'LayerNorm.weight': 'LayerNorm.gamma', 'LayerNorm.bias': 'LayerNorm.beta'}


def old_name(name):
    for new, old in OLD_NAMES.items():
        name = name.replace(new, old)
    return name


LAYOUTS = {'as saved by BertForPreTraining': lambda name: name,
           'of a bare BertModel': lambda name: name.removeprefix('bert.') if name.startswith('bert.') else None,
           'of 2018': old_name}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_text_is_encoded_as_by_bert_without_token_types(bert, tmp_path, layout):
    theirs, _, folder = bert
    model, _, _ = first_stage(changed_copy(folder, tmp_path / 'copy', LAYOUTS[layout]))
    ids = captions(9, 4, 6)
    kept = theirs.embeddings.token_type_embeddings.weight.data.clone()
    with torch.no_grad():
        theirs.embeddings.token_type_embeddings.weight.zero_()
        expected = theirs(ids.clamp(min=0), attention_mask=(ids >= 0).long()).last_hidden_state
        theirs.embeddings.token_type_embeddings.weight.copy_(kept)
        with_types = theirs(ids.clamp(min=0), attention_mask=(ids >= 0).long()).last_hidden_state
        own = model.vision.qformer(ids=ids)[1]
    torch.testing.assert_close(own[ids >= 0], expected[ids >= 0], atol=1e-5, rtol=0)
    assert (with_types - expected)[ids >= 0].abs().max() > 0.1


def test_only_queries_and_cross_attention_are_new(bert):
    theirs, _, folder = bert
    model, state, report = first_stage(folder)
    names = {name for name in model.state_dict() if name.startswith('vision.qformer.')}
    assert names - set(state) == NEW == set(model.param_groups()['qformer_new'])
    assert names - NEW == set(model.param_groups()['qformer'])
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], state[name]) for name in names - NEW - set(EMBEDDINGS))
    # the queries' MLPs start as the text's, and are trained apart
    copies = [(name, name.replace('query_mlp', 'text_mlp')) for name in names if 'query_mlp' in name]
    assert len(copies) == 6 * N_LAYER
    for a, b in copies:
        assert torch.equal(own[a], own[b]) and own[a].data_ptr() != own[b].data_ptr()
    # ids of the vocabulary, then new ones, then CLS and DEC; the first positions
    wte, n = theirs.embeddings.word_embeddings.weight, theirs.config.vocab_size
    table = own[EMBEDDINGS[0]]
    assert torch.equal(table[:n], wte) and len(table) == 322
    assert torch.equal(table[model.cls], wte[CLS])
    assert len(table.unique(dim=0)) == 322 - 1  # CLS is there twice
    assert torch.equal(own[EMBEDDINGS[1]], theirs.embeddings.position_embeddings.weight[:12])
    n_loaded = len(names - NEW) - len(EMBEDDINGS)
    expected = {('loaded', f'{n_loaded} tensors', ''), ('new', f'{len(NEW)} tensors', ''),
                ('grown', '1 tensors', f'{n + 2} -> 322 rows'), ('cropped', '1 tensors', '40 -> 12 rows'),
                ('left out', '10 tensors', '')}  # token types, the pooler's two, the heads' seven
    lines = report.splitlines()
    assert len(lines) == len(expected)
    for words in expected:
        assert any(all(word in line for word in ('vision.qformer', *words)) for line in lines), (words, report)


def test_more_positions_than_berts_are_new(bert):
    theirs, _, folder = bert
    model, _, report = first_stage(folder, block_size=50)
    assert torch.equal(model.vision.qformer.wpe.weight[:40], theirs.embeddings.position_embeddings.weight)
    assert '40 -> 50 rows' in report and len(model.vision.qformer.wpe.weight) == 50


# -----------------------------------------------------------------------------
# which tokenizer

PRETRAIN = ['--objective=itc+itm+itg', '--connector=qformer', '--n_queries=3', '--qformer_cross_every=2', '--proj_dim=16',
            '--qformer_lr=0', '--eval_samples=12', '--max_iters=1', '--eval_interval=1', '--eval_iters=1']


@pytest.mark.parametrize('has_its_tokenizer', [True, False])
def test_text_embeddings_are_loaded_with_berts_tokenizer_only(bert, tmp_path, has_its_tokenizer):
    theirs, tokenizer, folder = bert
    n = len(tokenizer)
    process = train(tmp_path, *PRETRAIN, f'--vision_from={folder}', f'--tokenizer={folder if has_its_tokenizer else "bytes"}')
    assert process.returncode == 0, process.stderr
    checkpoint = read_weights(tmp_path / 'ckpt.pt')
    ours, args = checkpoint['model'], checkpoint['model_args']
    assert (args['qformer_n_layer'], args['qformer_n_embd'], args['n_queries']) == (N_LAYER, 16, 3)
    bert_mlp = theirs.encoder.layer[1].intermediate.dense.weight
    assert all(torch.equal(ours[f'vision.qformer.h.1.{mlp}.fc.weight'], bert_mlp) for mlp in ('text_mlp', 'query_mlp'))
    is_loaded = torch.equal(ours[EMBEDDINGS[0]][:n], theirs.embeddings.word_embeddings.weight)
    assert is_loaded == has_its_tokenizer
    assert (f'text embeddings of {folder} are those of {n} tokens' in process.stderr) != has_its_tokenizer
    new = [int(line.split()[2]) for line in process.stderr.splitlines() if line.startswith('new       vision.qformer')]
    assert new == [len(NEW) + 2 * (not has_its_tokenizer)]


def test_captions_have_the_ids_that_bert_was_trained_on(bert):
    _, tokenizer, folder = bert
    enc = get_tokenizer(str(folder))
    model, _, _ = first_stage(folder, image_token=enc.image_id, block_size=40)
    texts = ['Two trains, 1999.', 'the IMAGE is a number']
    examples = [{'text': f'<image>{text}', 'images': [Image.new('RGB', (16, 16))]} for text in texts]
    batch = collate([tokenize(example, enc, model.config, 'all') for example in examples], model.config)
    ids = model.prepend_token(model.captions(batch), model.cls)
    for text, row in zip(texts, ids):
        expected = tokenizer(text)['input_ids']
        assert row[row >= 0].tolist() == [model.cls, *expected[1:]] and expected[0] == CLS


def test_rows_of_the_vocabulary_stay_in_front_and_those_of_cls_and_dec_at_the_end():
    """Of any Q-Former that a first stage starts from, BLIP-2's too."""
    torch.manual_seed(0)
    config = dict(connector='qformer', qformer_n_layer=1, qformer_n_head=2, qformer_n_embd=16, objective='itc',
                  vision_encoder='vit', vision_n_layer=1, vision_n_head=2, vision_n_embd=24)
    small, large = (QFormerPretraining(GPTConfig(**config, vocab_size=n, block_size=9)) for n in (50, 60))
    state = {name: p for name, p in small.state_dict().items() if name.startswith('vision.qformer.')}
    table = state['vision.qformer.wte.weight'].clone()
    load_vision_from(large, state, 'small')
    own = large.vision.qformer.wte.weight
    assert torch.equal(own[:50], table[:50]) and torch.equal(own[[large.cls, large.dec]], table[[small.cls, small.dec]])


# -----------------------------------------------------------------------------
# a learning rate of its own

def stage_and_gpt(folder):
    """A first stage and a GPT, both with a Q-Former of this BERT, and a batch of each."""
    torch.manual_seed(0)
    batch = pair_batch(captions(5, 3, 6, 4), random_images(4))
    stage = first_stage(folder)[0]
    gpt = first_stage(folder, objective='lm', n_layer=1, n_head=2, n_embd=32, block_size=64)[0]
    return [(model, batch) for model in (stage, gpt)]


RATES = {'new only': (dict(qformer_lr=0.0, qformer_new_lr=1e-3), {'qformer_new'}),
         'all but the new': (dict(qformer_new_lr=0.0), {'qformer'}),
         'by default all': (dict(), {'qformer_new', 'qformer'}),
         'by default none': (dict(qformer_lr=0.0), set())}


@pytest.mark.parametrize('rates', RATES)
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_only_the_parts_with_a_rate_change(bert, rates, optimizer):
    rates, changing = RATES[rates]
    for model, batch in stage_and_gpt(bert[2]):
        optimizers = train_script.configure_optimizers(model, optimizer_config(optimizer=optimizer, **rates))
        before = {name: p.clone() for name, p in model.named_parameters()}
        sum(model(batch).values()).backward()
        for opt in optimizers:
            opt.step()
        in_state = {id(p) for opt in optimizers for p in opt.state}
        for part in ('qformer_new', 'qformer'):
            named = model.param_groups()[part]
            assert named
            for name, p in named.items():
                assert (id(p) in in_state) == p.requires_grad == (part in changing), name
                if not name.endswith('.k.bias'):  # softmax cancels it: its gradient is rounding
                    assert torch.equal(p, before[name]) == (part not in changing), name


def test_the_new_part_has_its_rate(bert):
    model = first_stage(bert[2])[0]
    knobs = optimizer_config(qformer_lr=1e-4, qformer_new_lr=7e-3)
    adamw, = train_script.configure_optimizers(model, knobs)
    rate_of = {id(p): group['lr'] for group in adamw.param_groups for p in group['params']}
    own = dict(model.named_parameters())
    assert {name for name, p in own.items() if rate_of[id(p)] == 7e-3} == NEW
    assert all(rate_of[id(p)] == 1e-4 for name, p in own.items() if name.startswith('vision.qformer.') and name not in NEW)


# -----------------------------------------------------------------------------
# runs

def recipe_knobs(*words):
    return configure(dict(vars(train_script)), GPTConfig, [str(ROOT / 'config' / 'qformer_bert.py'), *words])


def test_the_recipe_and_its_second_stage_run(bert, tmp_path):
    """The recipe's own knobs, with a BERT and an encoder of a few thousand weights in place of the published ones."""
    theirs, tokenizer, folder = bert
    write_pairs(tmp_path)
    small = [f'--dataset={tmp_path}', f'--tokenizer={folder}', f'--vision_from={folder}', f'--out_dir={tmp_path}/out',
             '--vision_encoder=vit', '--vision_n_layer=1', '--vision_n_head=2', '--vision_n_embd=24', '--batch_size=4',
             '--max_iters=2', '--eval_interval=2', '--eval_iters=1', '--eval_samples=4', '--num_workers=0', '--device=cpu',
             '--compile=False']
    process = inside('train.py', ROOT / 'config' / 'qformer_bert.py', *small)
    assert process.returncode == 0, process.stderr
    evals = [row['eval'] for row in read_log(tmp_path / 'out') if 'eval' in row]
    assert len(evals) == 2 and all({'itc', 'itm', 'itg', 'i2t_r1'} <= set(result) for result in evals)
    checkpoint = read_weights(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['model_args']['image_token'] == len(tokenizer) and checkpoint['config']['tokenizer'] == str(folder)
    # a step of BERT's part is a tenth of one of the new part; the first steps of AdamW are as long as the rate
    knobs = recipe_knobs()
    assert knobs['qformer_new_lr'] == 10 * knobs['qformer_lr'] > 0
    wte = theirs.embeddings.word_embeddings.weight
    moved = (checkpoint['model'][EMBEDDINGS[0]][:len(wte)] - wte).abs().max()
    assert 0 < moved < 2 * knobs['qformer_lr']
    gpt = [word for word in small if not word.startswith(('--tokenizer', '--vision_from', '--out_dir'))]
    process = inside('train.py', ROOT / 'config' / 'vlm_qformer.py', *gpt, '--init_from=scratch', '--tokenizer=bytes',
                     '--n_layer=1', '--n_head=2', '--n_embd=32', '--lora_rank=0', '--block_size=64',
                     '--gradient_accumulation_steps=1', f'--vision_from={tmp_path}/out/ckpt.pt', f'--out_dir={tmp_path}/gpt')
    assert process.returncode == 0, process.stderr
    assert 'left out  vision.qformer' in process.stderr and 'loaded    vision.qformer' in process.stderr


def test_the_recipe_trains_ten_epochs_of_its_pairs():
    """49 of 50 pairs of 50,000 are trained on; BERT-base and the encoder of its name have the recipe's shapes."""
    recipe = recipe_knobs()
    assert recipe['max_iters'] * recipe['batch_size'] == pytest.approx(10 * 49_000, rel=0.01)
    bert_base = transformers.BertConfig()
    assert [recipe[f'qformer_{name}'] for name in ('n_layer', 'n_head', 'n_embd')] == [
        bert_base.num_hidden_layers, bert_base.num_attention_heads, bert_base.hidden_size]
    config = complete_config(GPTConfig(**{name: recipe[name] for name in knobs_of(GPTConfig)}))
    assert tower_shape(config).width == 768 and keeps_class_token(config)
    assert (config.image_size // config.patch_width)**2 == 196


def test_a_gpt_starts_with_bert_in_its_qformer(bert, tmp_path):
    """Without text there is no tokenizer to fit: all of BERT but its text side is loaded."""
    theirs, _, folder = bert
    process = train(tmp_path, '--connector=qformer', '--n_queries=3', '--max_iters=1', f'--vision_from={folder}',
                    '--qformer_lr=0', '--qformer_new_lr=1e-3')
    assert process.returncode == 0, process.stderr
    ours = read_weights(tmp_path / 'ckpt.pt')['model']
    for i, layer in enumerate(theirs.encoder.layer):
        assert torch.equal(ours[f'vision.qformer.h.{i}.query_mlp.fc.weight'], layer.intermediate.dense.weight)
        assert torch.equal(ours[f'vision.qformer.h.{i}.attn.k.weight'], layer.attention.self.key.weight)
    assert not any('text_mlp' in name or 'wte' in name for name in ours if name.startswith('vision.'))
    assert 'left out  vision.qformer' in process.stderr and 'text embeddings' not in process.stderr


# -----------------------------------------------------------------------------
# what is refused

@pytest.mark.parametrize('setting, words', [
    ({'hidden_act': 'relu'}, "its hidden_act is 'relu', not 'gelu'"),
    ({'position_embedding_type': 'relative_key'}, "its position_embedding_type is 'relative_key', not 'absolute'"),
    ({'intermediate_size': 32}, 'its intermediate_size is 32, not 64'),
    ({'num_attention_heads': 3}, 'qformer_n_embd (16) must be a multiple of qformer_n_head (3)')])
def test_a_bert_that_would_be_computed_wrongly_is_refused(bert, tmp_path, setting, words):
    copy = changed_copy(bert[2], tmp_path / 'copy', lambda name: name)
    settings = json.loads((copy / 'config.json').read_text())
    (copy / 'config.json').write_text(json.dumps({**settings, **setting}))
    refused(train(tmp_path / 'out', *PRETRAIN, f'--vision_from={copy}', f'--tokenizer={copy}'), words)


@pytest.mark.parametrize('rename, words', [
    (lambda name: None if 'layer.1.attention.self.key.weight' in name else name, 'missing vision.qformer.h.1.attn.k.weight'),
    (lambda name: None if 'word_embeddings' in name else name, "it has no 'embeddings.word_embeddings.weight'"),
    (lambda name: name.replace('layer.3.intermediate', 'layer.3.adapter'), 'unexpected vision.qformer.h.3.adapter')])
def test_a_bert_with_other_tensors_is_refused(bert, tmp_path, rename, words):
    copy = changed_copy(bert[2], tmp_path / 'copy', rename)
    refused(train(tmp_path / 'out', *PRETRAIN, f'--vision_from={copy}', f'--tokenizer={copy}'), words)


def test_a_bert_is_no_gpt_and_has_no_encoder(bert, tmp_path):
    folder = bert[2]
    refused(train(tmp_path, f'--init_from={folder}'), 'holds no GPT', f'--vision_from={folder} starts a Q-Former from it')
    refused(train(tmp_path, f'--vision_from={folder}'), 'a Q-Former needs --connector=qformer')
