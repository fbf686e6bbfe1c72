"""What must stay true on the way from an example to a batch: what is in the loss, and that nothing is lost silently."""

import os
import pickle
import random

import pytest
import torch
from conftest import tiny_config
from PIL import Image

from dataloader import ASSISTANT, END, IMAGE, USER, TokenizedExamples, collate, get_tokenizer, segments, tokenize
from evaluate import reference, until_end

BYTES = get_tokenizer('bytes')
CONFIG = tiny_config(block_size=200, image_token=BYTES.image_id)


def conversation(*turns, images=()):
    roles = ('user', 'assistant')
    return {'messages': [{'role': roles[i % 2], 'content': t} for i, t in enumerate(turns)], 'images': list(images)}


def show(ids):
    """Ids as text: special tokens by name, -1 as ·"""
    return ''.join('·' if i < 0 else BYTES.decode([i]) for i in ids)


def red(width=16, height=8):
    return Image.new('RGB', (width, height), 'red')


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

def test_bytes_takes_any_text_back_and_forth():
    text = 'naïve 日本 \x00\n\t <image> <|endoftext|> 🙂'
    assert BYTES.decode(BYTES.encode(text)) == text
    assert max(BYTES.encode(text)) < 256, 'what looks special in data stays text'
    assert BYTES.special == {IMAGE: 256, USER: 257, ASSISTANT: 258, END: 259}
    assert (BYTES.image_id, BYTES.n_vocab, BYTES.n_text, BYTES.end_ids) == (256, 260, 256, [259])
    assert BYTES.encode('a\ufdd0\ud800b') == list('a\ufffd\ufffdb'.encode())  # no text may have these
    assert BYTES.encode('') == []


def test_gpt2_keeps_its_ids_and_its_end_token():
    try:
        tokenizer = get_tokenizer('gpt2')
    except ValueError as error:
        pytest.skip(str(error))
    assert tokenizer.encode('Hello world') == [15496, 995]
    assert tokenizer.special == {END: 50256, IMAGE: 50257, USER: 50258, ASSISTANT: 50259}
    assert max(tokenizer.encode('a <|endoftext|> b <image>')) < 50256
    text = 'naïve 日本 🙂 of   spaces\n\n'
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_character_tokenizer_of_nanogpt(tmp_path):
    chars = sorted(set('hello wörld\n'))
    path = tmp_path / 'meta.pkl'
    path.write_bytes(pickle.dumps({'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
                                   'stoi': {c: i for i, c in enumerate(chars)}}))
    tokenizer = get_tokenizer(str(path))
    assert tokenizer.encode('wörld\n') == [chars.index(c) for c in 'wörld\n']
    assert tokenizer.decode(tokenizer.encode('hello')) == 'hello'
    assert tokenizer.image_id == len(chars)
    batch = tokenize({'text': 'hello wörld'}, tokenizer, CONFIG)
    assert batch['targets'] == [*map(chars.index, 'hello wörld'), tokenizer.special[END]]
    with pytest.raises(ValueError, match="no id for the characters 'Xz'"):
        tokenizer.encode('zX')


def test_a_meta_pkl_that_runs_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'sprung'),)

    path = tmp_path / 'meta.pkl'
    path.write_bytes(pickle.dumps({'stoi': Malicious()}))
    with pytest.raises(ValueError, match='meta.pkl is not the meta.pkl of a nanoGPT'):
        get_tokenizer(str(path))
    assert not (tmp_path / 'sprung').exists()
    for content in (b'', b'garbage', pickle.dumps({'stoi': {'a': 0, 'b': 2}})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='meta.pkl'):
            get_tokenizer(str(path))
    with pytest.raises(ValueError, match='no tokenizer at'):
        get_tokenizer(str(tmp_path / 'missing.pkl'))
    with pytest.raises(ValueError, match='tokenizer must be'):
        get_tokenizer('gpt5')


def test_words_are_one_token_and_everything_else_comes_back_as_it_was(tmp_path):
    (tmp_path / 'words.txt').write_text('red\ncircle\na\n')
    tokenizer = get_tokenizer(str(tmp_path / 'words.txt'))
    assert len(tokenizer.encode('red circle')) == 2
    text = 'a red<image>circle, redcircle caf\u00e9 \u4e2d\n\t 12'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < tokenizer.image_id
    assert tokenizer.allowed_ids(320).sum() == 256 + 2 + 3 + 1  # bytes, words, words after a space, the end
    with pytest.raises(ValueError, match='no tokenizer at'):
        get_tokenizer(str(tmp_path / 'none.txt'))


def test_only_text_and_the_end_token_may_be_generated():
    assert BYTES.allowed_ids(320).nonzero().flatten().tolist() == [*range(256), BYTES.special[END]]


def test_until_end_cuts_at_the_first_end_token():
    end = BYTES.special[END]
    assert until_end(BYTES, [1, 2, end, 3, end]) == [1, 2]
    assert until_end(BYTES, [1, 2]) == [1, 2] and until_end(BYTES, [end]) == []


# ---------------------------------------------------------------------------------------------------------------------
# what is in the loss

def test_answers_and_their_end_are_in_the_loss_and_nothing_else():
    batch = tokenize(conversation('<image>\nHi?', 'Yo', 'And?', 'No', images=[red()]), BYTES, CONFIG, 'assistant')
    assert show(batch['idx']) == '<|user|><image><image>\nHi?<|assistant|>Yo<|endoftext|><|user|>And?<|assistant|>No'
    assert show(batch['targets']) == '·' * 7 + 'Yo<|endoftext|>' + '·' * 6 + 'No<|endoftext|>'


def test_white_space_at_the_ends_of_a_message_is_dropped():
    example = conversation(' Hi\n there ', '\n Yo,  you \n', '', ' \n')
    batch = tokenize(example, BYTES, CONFIG)
    assert show(batch['idx']) == '<|user|>Hi\n there<|assistant|>Yo,  you<|endoftext|><|user|><|assistant|>'
    assert show(batch['targets']) == '·' * 10 + 'Yo,  you<|endoftext|>' + '·' * 2 + '<|endoftext|>'
    assert reference(conversation(' Hi ', '\n Yo \n')) == 'Yo'


def test_each_byte_of_an_answer_is_in_the_loss():
    batch = tokenize(conversation('日本', 'é日🙂'), BYTES, CONFIG)
    assert batch['targets'] == [-1] * 7 + [*'é日🙂'.encode(), BYTES.special[END]]


def test_with_all_every_text_token_is_in_the_loss_but_never_an_image():
    batch = tokenize(conversation('Hi <image>?', 'Yo', images=[red()]), BYTES, CONFIG, 'all')
    assert show(batch['idx']) == '<|user|>Hi <image><image>?<|assistant|>Yo'
    assert show(batch['targets']) == 'Hi ··?<|assistant|>Yo<|endoftext|>'


def test_an_image_in_an_answer_is_not_in_the_loss():
    batch = tokenize(conversation('Draw', 'A <image>, see', images=[red()]), BYTES, CONFIG)
    assert show(batch['targets']) == '·' * 5 + 'A ··, see<|endoftext|>'
    batch = tokenize(conversation('Draw', 'A <image>', images=[red()]), BYTES, CONFIG)
    assert show(batch['targets']) == '·' * 5 + 'A ··<|endoftext|>'


def test_the_token_after_an_image_is_predicted_from_it():
    batch = tokenize({'text': 'a<image>b', 'images': [red()]}, BYTES, CONFIG)
    assert show(batch['idx']) == '<|endoftext|>a<image><image>b'
    assert show(batch['targets']) == 'a··b<|endoftext|>'
    assert batch['targets'][batch['idx'].index(CONFIG.image_token) + 1] == ord('b')


def test_of_a_continuation_only_the_postfix_is_in_the_loss():
    example = {'text': 'ab<image>cd', 'images': [red()], 'infix': 'X', 'loss_on': 'postfix'}
    assert show(tokenize(example, BYTES, CONFIG)['targets']) == '·' * 4 + 'cd<|endoftext|>'
    for filling in ('', 'XYZ'):
        batch = tokenize({**example, 'images': [], 'filling': filling}, BYTES, CONFIG)
        assert show(batch['idx']) == f'<|endoftext|>ab{filling}cd'
        assert [t for t in batch['targets'] if t >= 0] == [ord('c'), ord('d'), BYTES.special[END]]


def test_the_targets_of_a_continuation_do_not_depend_on_what_fills_it(tmp_path):
    (tmp_path / 'words.txt').write_text('red\nredcircle\ncircle\n')
    tokenizer = get_tokenizer(str(tmp_path / 'words.txt'))
    config = tiny_config(image_token=tokenizer.image_id, vocab_size=tokenizer.n_vocab)
    example = {'text': 'red<image>circle', 'images': [red()], 'loss_on': 'postfix'}
    targets = [[i for i in tokenize(e, tokenizer, config)['targets'] if i >= 0]
               for e in (example, *({**example, 'images': [], 'filling': filling} for filling in ('', ' red', 'red')))]
    assert targets == [targets[0]] * 4


def test_a_system_message_comes_first_in_the_users_first_turn():
    example = conversation('Hi', 'Yo')
    example['messages'].insert(0, {'role': 'system', 'content': 'Be brief.'})
    assert show(tokenize(example, BYTES, CONFIG)['idx']) == '<|user|>Be brief.\n\nHi<|assistant|>Yo'


def test_special_tokens_in_text_stay_text():
    batch = tokenize(conversation('What is <image> and <|user|>?', 'A tag'), BYTES, CONFIG)
    assert CONFIG.image_token not in batch['idx'] and batch['idx'].count(BYTES.special[USER]) == 1
    assert show(batch['idx']) == '<|user|>What is <image> and <|user|>?<|assistant|>A tag'


def test_a_prompt_ends_where_the_answer_begins():
    batch = tokenize(conversation('Hi', 'Yo', 'And?', 'No'), BYTES, CONFIG, prompt_only=True)
    assert show(batch['idx']) == '<|user|>Hi<|assistant|>Yo<|endoftext|><|user|>And?<|assistant|>'
    assert set(batch['targets']) == {-1} and len(batch['targets']) == len(batch['idx'])
    batch = tokenize({'text': 'a<image>', 'images': [red()]}, BYTES, CONFIG, prompt_only=True)
    assert show(batch['idx']) == '<|endoftext|>a<image><image>'


def test_with_char_level_each_character_of_an_answer_is_a_token(tmp_path):
    (tmp_path / 'words.txt').write_text('red\ncircle\na\n')
    tokenizer = get_tokenizer(str(tmp_path / 'words.txt'))
    config = tiny_config(image_token=tokenizer.image_id, vocab_size=tokenizer.n_vocab)
    whole = conversation('<image>red circle?', 'a red circle', images=[red()])
    a, b = (tokenize(e, tokenizer, config) for e in (whole, {**whole, 'char_level': True}))
    answers = [[i for i in t['targets'] if i >= 0] for t in (a, b)]
    assert [tokenizer.decode([i]) for i in answers[1]] == [*'a red circle', END]
    assert len(answers[0]) == 4 and tokenizer.decode(answers[0]) == tokenizer.decode(answers[1]) == 'a red circle' + END
    assert len(b['idx']) - len(a['idx']) == 13 - 4  # the question keeps its tokens


# ---------------------------------------------------------------------------------------------------------------------
# errors and lengths

@pytest.mark.parametrize('content, images, message', [
    ('no place', 1, '1 images, but its text has 0 <image>'), ('<image>', 2, '2 images, but its text has 1 <image>'),
    ('<image> <image>', 1, '1 images, but its text has 2 <image>')])
def test_numbers_of_images_and_image_tokens_must_agree(content, images, message):
    with pytest.raises(ValueError, match=message):
        tokenize(conversation(content, 'x', images=[red()] * images), BYTES, CONFIG)


def test_an_image_for_a_model_without_vision_is_refused():
    with pytest.raises(ValueError, match='the model has no vision_encoder'):
        tokenize(conversation('<image>', 'x', images=[red()]), BYTES, tiny_config(vision_encoder=''))


def test_long_text_is_cut_but_an_image_never_is():
    config = tiny_config(block_size=10, image_token=CONFIG.image_token)
    batch = tokenize(conversation('<image>', 'x' * 100, images=[red(32, 32)]), BYTES, config)
    positions = len(batch['idx']) - batch['idx'].count(config.image_token) + 1
    assert positions == 10 and batch['targets'][-1] == ord('x')
    with pytest.raises(ValueError, match='block_size is 10'):
        tokenize(conversation('q' * 50 + '<image>', 'x', images=[red()]), BYTES, config)
    with pytest.raises(ValueError, match='the prompt takes 52 positions, but block_size is 10'):
        tokenize(conversation('q' * 50), BYTES, config, prompt_only=True)
    fits = tokenize(conversation('q' * 8 + '<image>', 'x', images=[red()]), BYTES, config)
    assert fits['idx'].count(config.image_token) == 2 and len(fits['idx']) == 11
    with pytest.raises(ValueError, match='up to the last image take 11 positions'):
        tokenize(conversation('q' * 9 + '<image>', 'x', images=[red()]), BYTES, config)


def test_an_unknown_loss_on_is_refused():
    with pytest.raises(ValueError, match='loss_on must be'):
        tokenize(conversation('a', 'b'), BYTES, CONFIG, 'everything')


def test_reference_is_the_last_message_or_the_text_after_the_last_image():
    assert reference(conversation('a', 'b', 'c', 'd')) == 'd'
    assert reference({'text': 'a<image>b<image>c'}) == 'c'


def test_cached_features_come_in_the_place_of_patches():
    cache = {'1.png': (torch.zeros(3, 4), torch.tensor([[0, 0], [0, 1], [0, 2]]))}
    config = tiny_config(image_token=CONFIG.image_token)
    batch = tokenize({'text': '<image>a', 'images': ['1.png']}, BYTES, config, cache=cache)
    assert batch['images'] == [cache['1.png']] and batch['idx'].count(config.image_token) == 3


# ---------------------------------------------------------------------------------------------------------------------
# batches

def test_collate_pads_with_minus_one_and_keeps_images_in_order():
    rows = [tokenize(e, BYTES, CONFIG) for e in (conversation('<image>a', 'b', images=[red()]), conversation('c', 'd'),
                                                 conversation('<image><image>', 'e', images=[red(8, 8), red(24, 8)]))]
    batch = collate(rows, CONFIG)
    assert batch['lengths'].tolist() == [len(r['idx']) for r in rows]
    for i, r in enumerate(rows):
        assert batch['idx'][i].tolist() == r['idx'] + [-1] * (batch['idx'].shape[1] - len(r['idx']))
        assert batch['targets'][i, len(r['idx']):].eq(-1).all()
        assert batch['targets'][i, :len(r['idx'])].tolist() == r['targets']
    patches, grid = batch['images']
    assert (grid[..., 0] >= 0).sum(1).tolist() == [2, 1, 3] and patches.shape[:2] == (3, 3)
    rows[0]['idx'].remove(CONFIG.image_token)
    rows[0]['targets'].pop(0)
    with pytest.raises(ValueError, match='5 <image> ids, but its images make 6 tokens'):
        collate(rows, CONFIG)


def test_batches_are_collated_examples_in_order():
    examples = [conversation(f'question {i}', 'x' * i) for i in range(6)]
    config = tiny_config(vision_encoder='', block_size=200)
    dataset = TokenizedExamples(examples, BYTES, config, 'assistant')
    batch = collate([dataset[2], dataset[3]], config)
    assert batch['images'] is None
    assert [show(row[:n]) for row, n in zip(batch['idx'].tolist(), batch['lengths'])] == [
        '<|user|>question 2<|assistant|>xx', '<|user|>question 3<|assistant|>xxx']


def test_an_error_in_a_worker_comes_back_as_a_sentence():
    examples = [{'messages': [{'role': 'user', 'content': IMAGE}], 'images': ['gone.png']}]
    dataset = TokenizedExamples(examples, BYTES, CONFIG, 'all')
    assert collate([dataset[0]], CONFIG)['error'] == 'no image at gone.png'


def test_segments_of_random_conversations_give_back_their_texts():
    rng = random.Random(0)
    for _ in range(200):
        contents = [''.join(rng.choice(['a', ' ', '\n', 'é', '<image>', '<|user|>', '']) for _ in range(rng.randint(0, 6)))
                    for _ in range(rng.randint(1, 5))]
        images = rng.choice([[], [red()] * sum(content.count(IMAGE) for content in contents)])
        turns = segments(conversation(*contents, images=images), BYTES, 'all')
        stripped = [content.strip() for content in contents]
        written = ''.join(f'{USER}{text}' if i % 2 == 0 else f'{ASSISTANT}{text}{END}' for i, text in enumerate(stripped))
        assert ''.join(text for text, *_ in turns) == written
        assert sum(is_special and text == IMAGE for text, is_special, _ in turns) == len(images)
