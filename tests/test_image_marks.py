"""Begin- and end-of-image tokens: what they change with --image_marks, and that nothing changes without."""

import json

import pytest
import tokenizers
import torch
from conftest import inside, make_model, read_log, tiny_config, train
from PIL import Image

from dataloader import IMAGE, IMAGE_MARKS, collate, get_tokenizer, tokenize
from model import GPTConfig

BYTES = get_tokenizer('bytes')
MARKED = get_tokenizer('bytes', image_marks=True)
BEGIN, END = 260, 261
CONFIG = tiny_config(image_token=BYTES.image_id, image_marks=True)
PICTURE = Image.new('RGB', (16, 8), 'red')  # two tokens


def test_without_the_knob_nothing_has_changed():
    assert not GPTConfig().image_marks
    assert BYTES.n_vocab == 260 and not set(IMAGE_MARKS) & set(BYTES.special)
    example = {'text': 'a<image>b', 'images': [PICTURE]}
    assert tokenize(example, BYTES, tiny_config())['idx'] == [259, ord('a'), 256, 256, ord('b')]


def test_marks_get_the_next_ids_and_are_not_generated():
    assert MARKED.special == {**BYTES.special, '<|vision_start|>': BEGIN, '<|vision_end|>': END}
    assert MARKED.n_vocab == 262 and MARKED.n_text == 256 and MARKED.end_ids == BYTES.end_ids
    allowed = MARKED.allowed_ids(320)
    assert allowed.nonzero().flatten().tolist() == [*range(256), 259]
    assert MARKED.encode('<|vision_start|>') == list(b'<|vision_start|>')  # text never becomes a special token
    assert MARKED.decode([97, BEGIN, END]) == 'a<|vision_start|><|vision_end|>'


@pytest.fixture
def qwen(tmp_path):
    """Writes a tokenizer.json with Qwen's special tokens, with or without those around an image."""
    def write(marks):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({chr(97 + i): i for i in range(26)}, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(['<|endoftext|>', '<|im_start|>', '<|im_end|>', *marks, '<|video_pad|>'])
        backend.save(str(tmp_path / 'tokenizer.json'))
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<|im_end|>'}))
        return str(tmp_path)
    return write


def test_a_tokenizer_with_these_tokens_keeps_their_ids(qwen):
    path = qwen(IMAGE_MARKS)
    off, on = get_tokenizer(path), get_tokenizer(path, image_marks=True)
    assert off.special == on.special and off.n_vocab == on.n_vocab == 33
    assert (on.special['<|vision_start|>'], on.special['<|vision_end|>'], on.image_id) == (29, 30, 32)
    assert off.allowed_ids(64)[[29, 30]].all() and not on.allowed_ids(64)[[29, 30]].any()
    config = tiny_config(image_token=on.image_id, image_marks=True)
    assert tokenize({'text': 'a<image>b', 'images': [PICTURE]}, on, config)['idx'] == [26, 0, 29, 32, 32, 30, 1]


def test_a_tokenizer_without_them_gets_them_last(qwen):
    path = qwen(())
    off, on = get_tokenizer(path), get_tokenizer(path, image_marks=True)
    assert on.special == {**off.special, '<|vision_start|>': off.n_vocab, '<|vision_end|>': off.n_vocab + 1}
    assert off.n_vocab == 31 and off.text_ids == on.text_ids


def test_each_image_is_between_marks_that_are_not_in_the_loss():
    example = {'text': 'a<image><image>b', 'images': [PICTURE, Image.new('RGB', (8, 8))]}
    batch = tokenize(example, MARKED, CONFIG, 'all')
    assert batch['idx'] == [259, ord('a'), BEGIN, 256, 256, END, BEGIN, 256, END, ord('b')]
    assert batch['targets'] == [ord('a'), -1, -1, -1, -1, -1, -1, -1, ord('b'), 259]
    messages = [{'role': 'user', 'content': '<image>?'}, {'role': 'assistant', 'content': 'A<image>B'}]
    conversation = {'messages': messages, 'images': [PICTURE, PICTURE]}
    for loss_on in ('assistant', 'all'):
        batch = tokenize(conversation, MARKED, CONFIG, loss_on)
        plain = tokenize(conversation, BYTES, tiny_config(), loss_on)
        assert batch['idx'].count(BEGIN) == batch['idx'].count(END) == 2
        assert [i for i in batch['idx'] if i not in (BEGIN, END)] == plain['idx']
        assert [i for i in batch['targets'] if i >= 0] == [i for i in plain['targets'] if i >= 0]
    prompt = tokenize({**conversation, 'images': [PICTURE]}, MARKED, CONFIG, prompt_only=True)
    assert prompt['idx'] == [257, BEGIN, 256, 256, END, ord('?'), 258]
    for text in ('an <image> tag', '<image>'):  # is no place of an image
        text = {'text': text, 'images': []}
        assert tokenize(text, MARKED, CONFIG) == tokenize(text, BYTES, tiny_config())
    with pytest.raises(ValueError):  # another tokenizer than the model's
        tokenize(example, BYTES, CONFIG)


def test_a_mark_has_a_position_of_its_own():
    model = make_model(image_marks=True)
    example = {'text': 'a<image>b<image>', 'images': [PICTURE, PICTURE]}
    batch = collate([tokenize(example, MARKED, model.config, 'all')], model.config)
    _, pos = model.embed(batch['idx'], batch['images'])
    assert batch['idx'].tolist() == [[259, ord('a'), BEGIN, 256, 256, END, ord('b'), BEGIN, 256, 256, END]]
    assert pos.tolist() == [[0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8]]


def test_what_fits_with_its_last_mark_fits_as_a_prompt():
    example = {'text': 'abc<image>d', 'images': [PICTURE]}  # 7 positions up to the end mark
    config = tiny_config(image_token=256, image_marks=True, block_size=7)
    assert tokenize(example, MARKED, config)['idx'][-1] == END
    prompt = {**example, 'text': 'abc<image>'}
    assert tokenize(prompt, MARKED, config, prompt_only=True)['idx'][-1] == END
    config = tiny_config(image_token=256, image_marks=True, block_size=6)
    for prompt_only in (False, True):
        with pytest.raises(ValueError, match='7 positions, but block_size is 6'):
            tokenize(prompt, MARKED, config, prompt_only=prompt_only)


# ---------------------------------------------------------------------------------------------------------------------
# runs

def model_args(out_dir):
    return torch.load(out_dir / 'ckpt.pt', weights_only=True)['model_args']


def test_a_checkpoint_remembers_its_marks(tmp_path):
    image = tmp_path / 'x.png'
    PICTURE.save(image)
    knobs = ['--lr_decay_iters=6', '--optimizer=adamw']
    assert train(tmp_path / 'a', '--image_marks', *knobs, '--max_iters=6').returncode == 0
    assert train(tmp_path / 'b', '--image_marks', *knobs, '--max_iters=4').returncode == 0
    again = train(tmp_path / 'b', *knobs, '--max_iters=6', '--init_from=resume')  # without the knob
    assert again.returncode == 0 and 'image_marks stays True' in again.stderr, again.stderr
    assert read_log(tmp_path / 'a') == read_log(tmp_path / 'b')
    other = train(tmp_path / 'c', *knobs, f'--init_from={tmp_path}/a/ckpt.pt')
    assert other.returncode == 0 and 'as in the checkpoint: image_marks True' in other.stderr, other.stderr
    assert all(model_args(tmp_path / name)['image_marks'] for name in 'abc')
    answers = [inside('sample.py', f'--out_dir={tmp_path}/{name}', f'--image={image}', '--device=cpu') for name in 'ab']
    assert answers[0].returncode == 0 and answers[0].stdout == answers[1].stdout != '', answers[0].stderr
    measured = inside('sample.py', f'--out_dir={tmp_path}/a', '--eval=pydoc', '--eval_samples=4', '--device=cpu')
    last = [row['eval'] for row in read_log(tmp_path / 'a') if 'eval' in row][-1]
    assert json.loads(measured.stdout)['val_loss'] == pytest.approx(last['val_loss'], rel=1e-5)
    unmarked = train(tmp_path / 'd', *knobs)
    assert unmarked.returncode == 0 and not model_args(tmp_path / 'd')['image_marks']
    kept = train(tmp_path / 'e', *knobs, '--image_marks', f'--init_from={tmp_path}/d/ckpt.pt')  # it has images already
    assert kept.returncode == 0 and 'as in the checkpoint: image_marks False' in kept.stderr
    assert not model_args(tmp_path / 'e')['image_marks']


def test_adding_vision_with_marks_grows_the_vocabulary(tmp_path):
    words = [a + b for a in 'bcdfgh' for b in 'aeiou']
    (tmp_path / 'words.txt').write_text('\n'.join(words))  # 256 bytes, 60 words, 4 special tokens
    tokenizer = f'--tokenizer={tmp_path}/words.txt'
    text = train(tmp_path / 'text', tokenizer, '--vision_encoder=', '--tasks=text', '--image_marks=False')
    assert text.returncode == 0 and model_args(tmp_path / 'text')['vocab_size'] == 320, text.stderr
    start = f'--init_from={tmp_path}/text/ckpt.pt'
    unmarked = train(tmp_path / 'unmarked', start)
    assert unmarked.returncode == 0 and model_args(tmp_path / 'unmarked')['vocab_size'] == 320, unmarked.stderr
    marked = train(tmp_path / 'marked', start, '--image_marks')
    assert marked.returncode == 0, marked.stderr
    args = model_args(tmp_path / 'marked')
    assert args['image_marks'] and args['vocab_size'] == 384 and args['image_token'] == 316
    weights = torch.load(tmp_path / 'marked' / 'ckpt.pt', weights_only=True)['model']
    assert weights['transformer.wte.weight'].shape == (384, 32)
    still_text = train(tmp_path / 'still', start, '--vision_encoder=', '--tasks=text', '--image_marks')
    assert still_text.returncode == 0 and model_args(tmp_path / 'still')['vocab_size'] == 320, still_text.stderr


def test_show_prints_the_marks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURE.save('x.png')
    for split in ('train', 'val'):
        (tmp_path / f'{split}.jsonl').write_text(json.dumps({'text': f'a{IMAGE}b', 'images': ['x.png']}))
    words = ['show', f'--dataset={tmp_path}', '--loss_on=all', '--patch_width=8', '--patch_height=8', '--connector=linear']
    process = inside('prepare_data.py', *words, '--image_marks')
    assert process.returncode == 0, process.stderr
    assert '<|vision_start|><image> x 2<|vision_end|>[[b' in process.stdout
    assert '7 tokens at positions 0 to 5, 3 of them in the loss' in process.stderr
    assert 'vision_start' not in inside('prepare_data.py', *words).stdout
