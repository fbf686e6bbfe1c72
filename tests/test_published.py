"""Published vision-language models: logits, ids, tiles and answers are those of Hugging Face's classes and processors."""

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import inside, make_model, refused
from PIL import Image
from safetensors.torch import load_file, save_file

from dataloader import collate, frame_images, get_tokenizer, tokenize
from evaluate import similarity
from patches import collate_images, preprocess, separate_tiles
from sample import prompt_example
from vision import Vision
from weights import build_model, load_model, load_vision_from, read_weights, vision_of

MARKS = ['<fake_token_around_image>', '<global-img>', *(f'<row_{r}_col_{c}>' for r in range(1, 7) for c in range(1, 7))]
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


def picture(width, height, seed=0):
    """Noise at a low resolution, so that resizing does not turn it gray."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height))


def write_tokenizer(folder, template, special, **names):
    """A byte-level BPE of a few hundred tokens with the model's special tokens; returns it as Hugging Face has it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(['What is in this image?\n\nTwo birds.\n'] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.25 if p.dim() > 1 else 0.1) + ('norm' in name.lower() and 'weight' in name))
    return model.eval()


@pytest.fixture(scope='module')
def smolvlm(tmp_path_factory):
    """SmolVLM-256M, shrunk: (folder, Hugging Face's model, its processor). Tiles of 64 pixels, 4 tokens each."""
    folder = tmp_path_factory.mktemp('smolvlm')
    special = ['<|endoftext|>', '<|im_start|>', '<image>', '<end_of_utterance>', *MARKS]
    tokenizer = write_tokenizer(folder, SMOLVLM_TEMPLATE, special, bos_token='<|im_start|>', eos_token='<end_of_utterance>',
                                pad_token='<|im_start|>')
    text = dict(model_type='llama', vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=512, rope_theta=1e5,
                tie_word_embeddings=False, pad_token_id=1)
    vision = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=8)
    config = transformers.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, image_token_id=2,
                                        tie_word_embeddings=False)
    model = randomize(transformers.SmolVLMForConditionalGeneration(config))
    model.save_pretrained(folder)
    images = transformers.Idefics3ImageProcessorPil(size={'longest_edge': 256}, max_image_size={'longest_edge': 64})
    images.save_pretrained(folder)
    return folder, model, transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE)


def make_llava(folder, text_type, vision_type):
    special = ['<unk>', '<s>', '</s>', '<image>', '<pad>']
    tokenizer = write_tokenizer(folder, LLAVA_TEMPLATE, special, bos_token='<s>', eos_token='</s>', pad_token='<pad>')
    text = dict(model_type=text_type, vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False)
    vision = dict(model_type=f'{vision_type}_vision_model', hidden_size=32, intermediate_size=80, num_hidden_layers=3,
                  num_attention_heads=4, image_size=28, patch_size=7, projection_dim=16)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3, image_seq_length=16,
                                      vision_feature_select_strategy='default' if vision_type == 'clip' else 'full')
    model = randomize(transformers.LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    if vision_type == 'clip':
        images = transformers.CLIPImageProcessorPil(size={'shortest_edge': 28}, crop_size={'height': 28, 'width': 28})
    else:
        images = transformers.SiglipImageProcessorPil(size={'height': 28, 'width': 28}, resample=3)
    images.save_pretrained(folder)
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=LLAVA_TEMPLATE, num_additional_image_tokens=int(vision_type == 'clip'))
    return model, processor


def compare(folder, theirs, processor, conversation, images, add_generation_prompt=True):
    """Ids, and logits at all places, of one conversation: [(role, text), ...], all images at its beginning."""
    ours = load_model(str(folder)).eval()
    enc = get_tokenizer(read_weights(str(folder))['config']['tokenizer'])
    messages, chat = [], []
    for number, (role, text) in enumerate(conversation):
        n_images = 0 if number else len(images)
        messages.append({'role': role, 'content': '<image>\n' * n_images + text})
        chat.append({'role': role, 'content': [{'type': 'image'}] * n_images + [{'type': 'text', 'text': text}]})
    example = {'messages': messages, 'images': images}
    tokenized = tokenize(example, enc, ours.config, prompt_only=add_generation_prompt)
    batch = collate([tokenized], ours.config)
    text = processor.apply_chat_template(chat, add_generation_prompt=add_generation_prompt)
    inputs = processor(text=text, images=[images] if images else None, return_tensors='pt', add_special_tokens=False)
    ids = batch['idx'] if add_generation_prompt else torch.cat([batch['idx'], torch.tensor([[enc.end_ids[-1]]])], dim=1)
    length = ids.shape[1]
    assert inputs['input_ids'][0, :length].tolist() == ids[0].tolist()
    with torch.no_grad():
        expected = theirs(**inputs).logits
        logits = ours.logits(batch['idx'], batch['images'] if images else None)
    torch.testing.assert_close(logits, expected[:, :logits.shape[1]], atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.3
    return batch, ours


QUESTION = [('user', 'What is in this image?')]
TURNS = [*QUESTION, ('assistant', 'Two birds.'), ('user', 'And now?')]


@pytest.mark.parametrize('sizes', [[(256, 192)], [(90, 200)], [(20, 13)], [(700, 100)], [(64, 64), (300, 150)], []])
@pytest.mark.parametrize('conversation', [QUESTION, TURNS])
def test_smolvlm_computes_what_hugging_faces_does(smolvlm, sizes, conversation):
    folder, theirs, processor = smolvlm
    compare(folder, theirs, processor, conversation, [picture(*size, seed) for seed, size in enumerate(sizes)])


def test_smolvlm_without_tiles(smolvlm, tmp_path):
    folder, theirs, processor = smolvlm
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    policy = json.loads((tmp_path / 'preprocessor_config.json').read_text())
    processor = transformers.Idefics3Processor.from_pretrained(folder)
    policy |= {'do_image_splitting': False, 'image_mean': [0.4, 0.5, 0.6]}
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(policy))
    # older files have the template in a .json
    (tmp_path / 'chat_template.jinja').unlink()
    (tmp_path / 'chat_template.json').write_text(json.dumps({'chat_template': SMOLVLM_TEMPLATE}))
    images = transformers.Idefics3ImageProcessorPil(**policy)
    processor = transformers.Idefics3Processor(images, processor.tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE)
    batch, ours = compare(tmp_path, theirs, processor, QUESTION, [picture(300, 150)])
    assert (batch['idx'] == 2).sum() == 4 and not ours.config.tile_marks


def test_no_random_encoder_is_allocated_where_weights_come_next(smolvlm):
    """Neither when the model is loaded, nor when a text model takes its encoder over."""
    folder, _, _ = smolvlm
    config = load_model(str(folder)).config
    assert all(p.is_meta for p in Vision(config, load=False).encoder.parameters())
    assert not any(p.is_meta for p in Vision(config).encoder.parameters())
    args, state = vision_of(read_weights(str(folder)), str(folder), 'shuffle')
    text = make_model(vision_encoder='')
    checkpoint = {'model': text.state_dict(), 'model_args': vars(text.config), 'base_model': None, 'vision_fingerprint': ''}
    model = build_model(checkpoint, 'text', load=False, connector='shuffle', pool_size=4, **args)
    load_vision_from(model, state, str(folder))
    model.match_rms()
    images = collate_images([preprocess(picture(64, 64), model.config)], model.config)
    rms = model.vision(*images)[0].square().mean().sqrt()
    assert 0.5 < rms / text.transformer.wte.weight.square().mean().sqrt() < 2


@pytest.mark.parametrize('size', [(256, 192), (1, 1), (1000, 30), (31, 800), (64, 64), (65, 64), (129, 257)])
def test_tiles_are_the_processors_pixel_by_pixel(smolvlm, size):
    folder, _, processor = smolvlm
    config = load_model(str(folder)).config
    image = picture(*size)
    tiles, rows, cols = separate_tiles(image, config)
    theirs = processor.image_processor(image, return_row_col_info=True, return_tensors='np')
    assert (theirs['rows'][0][0], theirs['cols'][0][0]) == (rows, cols)
    pixels = theirs['pixel_values'][0]
    assert len(pixels) == len(tiles)
    for own, tile in zip(tiles, pixels):
        assert np.abs(np.asarray(own).transpose(2, 0, 1) / 127.5 - 1 - tile).max() < 1e-5


@pytest.mark.parametrize('text_type, vision_type', [('llama', 'clip'), ('qwen2', 'clip'), ('qwen2', 'siglip')])
@pytest.mark.parametrize('sizes', [[(40, 30)], [(28, 90)], [(10, 10), (500, 300)], []])
def test_llava_computes_what_hugging_faces_does(tmp_path, text_type, vision_type, sizes):
    theirs, processor = make_llava(tmp_path, text_type, vision_type)
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    compare(tmp_path, theirs, processor, TURNS, images)


def test_llava_files_have_had_several_names(tmp_path):
    theirs, processor = make_llava(tmp_path, 'llama', 'clip')
    renamed = {}
    for name, p in load_file(tmp_path / 'model.safetensors').items():
        name = name.replace('vision_tower.', 'vision_tower.vision_model.').replace('language_model.model.', 'language_model.')
        renamed[name.removeprefix('language_model.') if 'lm_head' in name else f'model.{name}'] = p
    assert 'model.vision_tower.vision_model.embeddings.class_embedding' in renamed and 'lm_head.weight' in renamed
    save_file(renamed, tmp_path / 'model.safetensors')
    compare(tmp_path, theirs, processor, QUESTION, [picture(30, 40)])


def test_greedy_answers_are_theirs(smolvlm):
    folder, theirs, processor = smolvlm
    batch, ours = compare(folder, theirs, processor, QUESTION, [picture(200, 120)])
    chat = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': QUESTION[0][1]}]}]
    inputs = processor(text=processor.apply_chat_template(chat, add_generation_prompt=True), images=[[picture(200, 120)]],
                       return_tensors='pt', add_special_tokens=False)
    expected = theirs.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=None,
                               bad_words_ids=[[2]], pad_token_id=0)
    result = ours.generate(batch['idx'], 64, temperature=0, images=batch['images'])
    n = batch['idx'].shape[1]
    assert result.shape[1] == n + 64 and result[0, n:].tolist() == expected[0, n:].tolist()


def test_it_answers_and_trains(smolvlm, tmp_path):
    """From the command line: an answer, then LoRA on a few rows; its checkpoint answers, too, and Hugging Face's class computes
    the same of what is exported.
    """
    folder, _, processor = smolvlm
    picture(100, 80).save(tmp_path / 'x.png')
    process = inside('sample.py', f'--init_from={folder}', '--image', tmp_path / 'x.png', '--prompt', 'What is in this image?',
                     '--max_new_tokens=4', '--device=cpu')
    assert process.returncode == 0, process.stderr
    rows = [{'messages': [{'role': 'user', 'content': '<image>\nWhat is in this image?'},
                          {'role': 'assistant', 'content': 'Two birds.'}], 'images': ['x.png']}] * 4
    for split in ('train', 'val'):
        (tmp_path / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    process = inside('train.py', 'config/finetune.py', f'--init_from={folder}', f'--dataset={tmp_path}', '--block_size=256',
                     f'--out_dir={tmp_path}/out', '--learning_rate=1e-2', '--gradient_accumulation_steps=2', '--max_iters=20',
                     '--eval_interval=20', '--eval_iters=1', '--eval_samples=2', '--device=cpu', '--compile=False',
                     '--num_workers=0', '--warmup_iters=2', '--max_image_side=128')
    assert process.returncode == 0, process.stderr
    checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert checkpoint['model_args']['max_image_side'] == 128 and checkpoint['model_args']['tile_marks']
    # the base model brings back the rest
    assert all('.lora_' in name or name.startswith('vision.connector.') for name in checkpoint['model'])
    evals = [json.loads(line)['eval'] for line in (tmp_path / 'out' / 'log.jsonl').read_text().splitlines() if 'eval' in line]
    assert evals[-1]['val_loss'] < 0.5 * evals[0]['val_loss']
    process = inside('sample.py', f'--out_dir={tmp_path}/out', '--image', tmp_path / 'x.png', '--prompt', 'What is it?',
                     '--max_new_tokens=20', '--device=cpu')
    assert process.returncode == 0 and process.stdout.strip(), process.stderr
    process = inside('sample.py', f'--out_dir={tmp_path}/out', f'--export={tmp_path}/export', '--device=cpu')
    assert process.returncode == 0, process.stderr
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / 'export').eval()
    images = transformers.Idefics3ImageProcessorPil.from_pretrained(tmp_path / 'export')
    assert images.size['longest_edge'] == 128
    processor = transformers.Idefics3Processor(images, processor.tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE)
    compare(tmp_path / 'export', theirs, processor, QUESTION, [Image.open(tmp_path / 'x.png')])
    trained = load_model(f'{tmp_path}/out/ckpt.pt', lora_rank=0).state_dict()
    exported = load_model(str(tmp_path / 'export')).state_dict()
    assert torch.equal(trained['transformer.h.0.attn.c_attn.weight'], exported['transformer.h.0.attn.c_attn.weight'])
    original = load_model(str(folder)).state_dict()
    assert not torch.equal(original['transformer.h.0.attn.c_attn.weight'], exported['transformer.h.0.attn.c_attn.weight'])


def test_image_tokens_are_in_no_loss(smolvlm):
    folder, _, _ = smolvlm
    config = load_model(str(folder)).config
    enc = get_tokenizer(str(folder))
    messages = [{'role': 'user', 'content': '<image>\nWhat?'}, {'role': 'assistant', 'content': 'Two birds.'}]
    marks = {enc.special[mark] for mark in [*MARKS, '<image>']}
    for loss_on in ('all', 'assistant'):
        example = tokenize({'messages': messages, 'images': [picture(300, 200)]}, enc, config, loss_on)
        assert example['idx'].count(2) > 4 and not marks & set(example['targets'])
    assert enc.decode([target for target in example['targets'] if target >= 0]) == 'Two birds.<end_of_utterance>'


@pytest.mark.parametrize('change, message', [
    (lambda c: c['vision_config'].update(hidden_act='relu'), "its hidden_act is 'relu'"),
    (lambda c: c['text_config'].update(model_type='mistral'), 'its text model is a mistral'),
    (lambda c: c.update(model_type='paligemma'), "got 'paligemma'")])
def test_what_would_be_computed_wrongly_is_refused(smolvlm, tmp_path, change, message):
    folder, _, _ = smolvlm
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / 'config.json').read_text())
    change(config)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    refused(inside('sample.py', f'--init_from={tmp_path}', '--prompt', 'x'), message)


def test_tile_marks_need_a_tokenizer_that_has_them(smolvlm):
    folder, _, _ = smolvlm
    config = load_model(str(folder)).config
    with pytest.raises(ValueError, match='has none of the tokens that mark tiles'):
        frame_images([picture(9, 9)], [], get_tokenizer('bytes'), config)
    with pytest.raises(ValueError, match='the example has 2 images, but its text has 1 <image>'):
        tokenize({'text': 'x <image>', 'images': [picture(200, 200), picture(9, 9)]}, get_tokenizer(str(folder)), config)
    assert len(preprocess(picture(64, 64), config)[0]) == 64
    assert prompt_example('x', ['a'], True)['messages'][0]['content'] == '<image>\nx'


def copy_of(folder, target):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize('kind', ['smolvlm', 'llama-clip', 'qwen2-siglip'])
def test_an_export_is_hugging_faces_again(smolvlm, tmp_path, kind):
    """What was read and written back has the logits of the original, there and here."""
    source = tmp_path / 'source'
    source.mkdir()
    if kind == 'smolvlm':
        folder, theirs, processor = smolvlm
        copy_of(folder, source)
    else:
        theirs, processor = make_llava(source, *kind.split('-'))
    process = inside('sample.py', f'--init_from={source}', f'--export={tmp_path}/export', '--device=cpu')
    assert process.returncode == 0, process.stderr
    assert (tmp_path / 'export' / 'preprocessor_config.json').exists()
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / 'export').eval()
    assert type(again) is type(theirs)
    images = [picture(150, 100)]
    compare(tmp_path / 'export', theirs, processor, QUESTION, images)
    compare(source, again, processor, QUESTION, images)


# -----------------------------------------------------------------------------
# BLIP-2, for retrieval

CAPTIONS = ['Two birds on a wire.', 'a CAT, sleeping', 'nothing', "the dog's ball in 1999"]


@pytest.fixture(scope='module')
def blip2(tmp_path_factory):
    """A BLIP-2 of Hugging Face's with random weights, a WordPiece tokenizer as BERT's, and their folder."""
    folder = tmp_path_factory.mktemp('blip2')
    words = 'two birds on a wire cat sleeping nothing the dog ball in 19 99 ##99 ##s s . , ##leep ##ing b w'.split()
    letters = [*'abcdefghijklmnopqrstuvwxyz0123456789\'']
    vocab = ['[PAD]', *(f'[unused{i}]' for i in range(99)), '[UNK]', '[CLS]', '[SEP]', '[MASK]', *words,
             *(letter for letter in letters if letter not in words), *(f'##{letter}' for letter in letters if letter != 's')]
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token='[UNK]'))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.post_processor = tokenizers.processors.BertProcessing(('[SEP]', 102), ('[CLS]', 101))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token='[CLS]', sep_token='[SEP]', pad_token='[PAD]', unk_token='[UNK]',
        mask_token='[MASK]')
    tokenizer.add_special_tokens({'bos_token': '[DEC]'})
    tokenizer.save_pretrained(folder)
    config = transformers.Blip2Config(
        vision_config=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                           patch_size=7),
        qformer_config=dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
                            vocab_size=len(tokenizer), max_position_embeddings=40, encoder_hidden_size=24,
                            use_qformer_text_input=True),
        num_query_tokens=5, image_text_hidden_size=8)
    theirs = randomize(transformers.Blip2ForImageTextRetrieval(config))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.mul_(4 if 'qformer' in name and p.dim() > 1 else 1)
    theirs.save_pretrained(folder)
    transformers.BlipImageProcessorPil(size={'height': 28, 'width': 28}).save_pretrained(folder)
    return theirs, tokenizer, folder


@torch.no_grad()
def test_blip2_scores_images_and_captions_as_hugging_faces_does(blip2):
    theirs, tokenizer, folder = blip2
    ours = load_model(str(folder)).eval()
    enc = get_tokenizer(str(folder))
    pictures = [picture(60, 40, 1), picture(20, 50, 2), picture(28, 28, 3)]
    pixels = transformers.BlipImageProcessorPil.from_pretrained(folder)(pictures, return_tensors='pt')['pixel_values']
    inputs = tokenizer(CAPTIONS, padding=True, return_tensors='pt')
    ids = [enc.encode(caption) + enc.end_ids[:1] for caption in CAPTIONS]
    for own, row, mask in zip(ids, inputs['input_ids'], inputs['attention_mask']):
        assert [101, *own] == row[mask > 0].tolist()
    ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, ids)), batch_first=True, padding_value=-1)
    images = collate_images([preprocess(image, ours.config) for image in pictures], ours.config)
    features, valid = ours.vision.features(*images)
    expected = theirs(pixel_values=pixels, input_ids=inputs['input_ids'], attention_mask=inputs['attention_mask'])
    scores = similarity(ours.image_embeds(images), ours.text_embeds(ids))
    torch.testing.assert_close(scores, expected.logits_per_image, atol=1e-4, rtol=1e-4)
    assert min(expected.logits_per_image.std(dim).min() for dim in (0, 1)) > 0.02
    for n in range(3):
        expected = theirs(pixel_values=pixels[[n] * 4], input_ids=inputs['input_ids'], attention_mask=inputs['attention_mask'],
                          use_image_text_matching_head=True).logits_per_image
        own = ours.matching_logits(features[[n] * 4], valid[[n] * 4], ids)
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


def test_blip2_retrieves_from_the_command_line(blip2, tmp_path):
    _, _, folder = blip2
    for i in range(len(CAPTIONS)):
        picture(40, 30, i).save(tmp_path / f'{i}.png')
    rows = [{'text': f'<image>{caption}', 'images': [f'{i}.png']} for i, caption in enumerate(CAPTIONS)]
    (tmp_path / 'val.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    process = inside('sample.py', f'--init_from={folder}', f'--eval={tmp_path}/val.jsonl', f'--out_dir={tmp_path}/out',
                     '--device=cpu')
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result['n'] == 4 and result['chance_r1'] == 0.25 and 0 <= result['i2t_r1'] <= 1
    assert (tmp_path / 'out' / 'eval.png').exists()
