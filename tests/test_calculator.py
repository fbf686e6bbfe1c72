"""What must stay true of GSM8K's <<48/2=24>>: a call that the model writes, and a result that it does not have to learn."""

import json

import pytest
import torch
from conftest import inside, make_model, train

from dataloader import CALL_MARKS, collate, get_tokenizer, segments, tokenize
from evaluate import answer, calculate

CALL, RESULT, END_CALL = CALL_MARKS
ANSWER = 'In May 48/2 = <<48/2=24>>24 clips.\nIn all <<48+24=72>>72.\n#### 72'
EXAMPLE = {'messages': [{'role': 'user', 'content': 'How many <<1+1=2>>?'}, {'role': 'assistant', 'content': ANSWER}]}


def test_the_result_and_the_end_of_a_call_are_not_in_the_loss_token_by_token():
    enc = get_tokenizer('bytes', calculator=True)
    ids, in_loss = enc.encode_segments(segments(EXAMPLE, enc, 'assistant'))
    mask = ''.join('x' if flag else '.' for flag in in_loss)
    calls = [f'{CALL}48/2{RESULT}24{END_CALL}', f'{CALL}48+24{RESULT}72{END_CALL}']
    question, first, middle, last = 'How many <<1+1=2>>?', 'In May 48/2 = ', '24 clips.\nIn all ', '72.\n#### 72'
    assert enc.decode(ids) == f'<|user|>{question}<|assistant|>{first}{calls[0]}{middle}{calls[1]}{last}<|endoftext|>'
    # a call is <|call|>, its characters and <|result|> in the loss, then two digits and <|end_call|> that are not
    expected = ('.' * (2 + len(question)) + 'x' * len(first) + 'x' * 6 + '...' + 'x' * len(middle) + 'x' * 7 + '...'
                + 'x' * (len(last) + 1))
    assert mask == expected
    _, all_in_loss = enc.encode_segments(segments(EXAMPLE, enc, 'all'))
    assert ''.join('x' if flag else '.' for flag in all_in_loss) == mask[:2 + len(question)].replace('.', 'x') + expected[21:]


def test_calls_at_the_two_ends_of_an_answer_are_in_the_loss():
    enc = get_tokenizer('bytes', calculator=True)
    example = {'messages': [{'role': 'user', 'content': '?'}, {'role': 'assistant', 'content': '<<1+1=2>><<2*3=6>>'}]}
    pieces = [(text, in_loss) for text, _, in_loss in segments(example, enc, 'assistant') if text]
    calls = [[(CALL, True), (call, True), (RESULT, True), (result, False), (END_CALL, False)]
             for call, result in (('1+1', '2'), ('2*3', '6'))]
    prompt = [('<|user|>', False), ('?', False), ('<|assistant|>', False)]
    assert pieces == [*prompt, *calls[0], *calls[1], ('<|endoftext|>', True)]


def test_a_question_and_a_model_without_a_calculator_keep_the_text():
    enc = get_tokenizer('bytes')
    texts = [text for text, is_special, _ in segments(EXAMPLE, enc, 'assistant') if not is_special]
    assert texts == ['How many <<1+1=2>>?', ANSWER] and CALL not in enc.special
    with_calculator = get_tokenizer('bytes', calculator=True)
    assert {**enc.special, **with_calculator.special} == with_calculator.special  # the ids of the others stay
    data = {'messages': [{'role': 'user', 'content': CALL}, {'role': 'assistant', 'content': f'{CALL}1{RESULT}'}]}
    assert CALL not in [text for text, is_special, _ in segments(data, with_calculator, 'all') if is_special]


def test_chat_templates_take_calls(tmp_path):
    (tmp_path / 'text.txt').write_text('In May she sold clips. ' * 50)
    template = '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}'
    process = inside('prepare_data.py', 'tokenizer', f'--dataset={tmp_path}/text.txt', '--vocab_size=260',
                     f'--out={tmp_path}/tokenizer.json')
    assert process.returncode == 1  # one paragraph is too little to hold some out
    (tmp_path / 'text.txt').write_text('\n\n'.join(f'In May she sold {i} clips. ' * 50 for i in range(100)))
    process = inside('prepare_data.py', 'tokenizer', f'--dataset={tmp_path}/text.txt', '--vocab_size=300',
                     f'--out={tmp_path}/tokenizer.json')
    assert process.returncode == 0, process.stderr
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': template, 'eos_token': '<|im_end|>'}))
    enc = get_tokenizer(str(tmp_path), calculator=True)
    pieces = segments(EXAMPLE, enc, 'assistant')
    assert [text for text, is_special, _ in pieces if is_special].count(CALL) == 2
    assert [text for text, is_special, in_loss in pieces if is_special and in_loss] == [CALL, RESULT] * 2 + ['<|im_end|>']


@pytest.mark.parametrize('expression, value', [
    ('48/2', '24'), ('(3+4)*2.5', '17.5'), ('20*.5', '10'), ('-3+1', '-2'), (' 7 - 2 ', '5'), ('1/3', '0.3333333333'),
    ('123456*789', '97406784'), ('1/0', ''), ('2**9', ''), ('abs(1)', ''), ('"a"*9', ''), ('', ''), ('1+', ''), ('x', ''),
    ('(' * 3000, ''), ('1+' * 50_000 + '1', ''), ('__import__("os")', ''), ('True', ''), ('\x00', '')])
def test_the_calculator_computes_sums_and_nothing_else(expression, value):
    assert calculate(expression) == value


def test_generation_takes_the_calculators_result():
    """Of a model that calls whatever the prompts are: the result is computed, whatever it would have written itself."""
    enc = get_tokenizer('bytes', calculator=True)
    model = make_model(vision_encoder='', calculator=True)
    script = [enc.special[CALL], *enc.encode('6*7'), enc.special[RESULT], *enc.encode('!'), enc.end_ids[0]]
    steps = {}

    def forced_logits(x):
        """The next token of the script, for each row."""
        steps['n'] = steps.get('n', -1) + 1
        logits = torch.zeros(*x.shape[:-1], model.config.vocab_size)
        # the two digits and <|end_call|> come from the calculator, and what the model gives meanwhile is not used
        i = steps['n'] if steps['n'] < 5 else max(4, steps['n'] - 3)
        logits[..., script[min(i, len(script) - 1)]] = 9.0
        return logits

    head = model.lm_head.forward
    model.lm_head.forward = lambda x: forced_logits(x) if x.dim() == 2 and len(x) == 2 else head(x)
    question = {'messages': [{'role': 'user', 'content': 'What?'}, {'role': 'assistant', 'content': ''}]}
    longer = {'messages': [{'role': 'user', 'content': 'What is that?'}, {'role': 'assistant', 'content': ''}]}
    assert [found.text for found in answer(model, enc, [question, longer], max_new_tokens=20)] == ['<<6*7=42>>!'] * 2


def test_a_text_model_learns_to_call_and_its_answers_are_computed(tmp_path):
    """A run and its checkpoint: train, resume, add a calculator to a text model, evaluate."""
    for split in ('train', 'val'):
        with open(tmp_path / f'{split}.jsonl', 'w') as f:
            for i in range(4):
                turns = [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': f'<<{i}+1={i + 1}>>{i + 1}'}]
                print(json.dumps({'messages': turns, 'metric': 'final_number'}), file=f)
    plain = train(tmp_path / 'plain', '--vision_encoder=', f'--dataset={tmp_path}', '--tasks=text')
    assert plain.returncode == 0, plain.stderr
    knobs = [f'--dataset={tmp_path}', '--calculator', f'--init_from={tmp_path}/plain/ckpt.pt', '--vision_encoder=']
    process = train(tmp_path / 'run', *knobs)
    assert process.returncode == 0, process.stderr
    checkpoint = torch.load(tmp_path / 'run' / 'ckpt.pt', weights_only=True)
    assert checkpoint['model_args']['calculator'] is True
    process = train(tmp_path / 'run', *knobs, '--init_from=resume', '--max_iters=5')
    assert process.returncode == 0, process.stderr
    process = inside('sample.py', f'--out_dir={tmp_path}/run', f'--eval={tmp_path}', '--device=cpu')
    assert process.returncode == 0, process.stderr
    assert 'final_number' in json.loads(process.stdout)


def test_ids_and_targets_of_a_call(tiny_model):
    enc = get_tokenizer('bytes', calculator=True)
    config = tiny_model.config
    tokenized = tokenize(EXAMPLE, enc, config.__class__(**{**vars(config), 'block_size': 200}), 'assistant')
    batch = collate([tokenized], config)
    targets = set(batch['targets'].flatten().tolist())
    assert enc.special[CALL] in targets and enc.special[RESULT] in targets and enc.special[END_CALL] not in targets
    assert enc.special[END_CALL] in batch['idx']
