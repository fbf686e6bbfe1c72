"""What must stay true of published tokenizers: the ids and conversations of transformers; special tokens by templates only."""

import json
import pickle
import random

import pytest
from conftest import ROOT, tiny_config
from PIL import Image

from dataloader import ASSISTANT, END, IMAGE, NOT_TEXT, USER, get_tokenizer, open_rows, segments, tokenize

transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')

# ---------------------------------------------------------------------------------------------------------------------
# chat templates, as published (Qwen3's and Llama 3.2's without their branches for tools)

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}")
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA32 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""  # noqa: E501
ZEPHYR = (  # spread over lines, as Jinja's trim_blocks expects it
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
TEMPLATES = {'smollm2': SMOLLM2, 'llama3': LLAMA3, 'llama3.2': LLAMA32, 'qwen3': QWEN3, 'zephyr': ZEPHYR, 'smolvlm': SMOLVLM}

# the same with {% generation %} around an assistant's content and its end
MARKED = {
    'smollm2': SMOLLM2.replace(
        "' + message['content'] + '<|im_end|>' + '\n'}}",
        "' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n'}}"),
    'llama3': LLAMA3.replace("message['content'] | trim + '<|eot_id|>' %}", "'' %}").replace(
        "{{ content }}", "{{ content }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + "
        "'<|eot_id|>' }}{% endgeneration %}{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}"),
    'llama3.2': LLAMA32.replace(
        "+ message['content'] | trim + '<|eot_id|>' }}",
        "}}{%- if message['role'] == 'assistant' %}{% generation %}{{- message['content'] | trim + '<|eot_id|>' }}"
        "{%- endgeneration %}{% else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}"),
    'qwen3': QWEN3.replace("+ content.lstrip('\\n') }}", "}}{% set content = content.lstrip('\\n') %}").replace(
        "{{- '<|im_start|>' + message.role + '\\n' + content }}", "{{- '<|im_start|>' + message.role + '\\n' }}").replace(
        "{{- '<|im_end|>\\n' }}", "{% generation %}{{- content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}"),
    'zephyr': ZEPHYR.replace(
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}",
        "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '' }}"),
    'smolvlm': SMOLVLM.replace(
        "{% for line in message['content'] %}", "{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'][0]['text'] }}<end_of_utterance>{% endgeneration %}{% else %}"
        "{% for line in message['content'] %}").replace(
        "<end_of_utterance>\n{% endfor %}{% if add", "<end_of_utterance>{% endif %}{{ '\n' }}{% endfor %}{% if add")}

CONVERSATIONS = [
    [('user', 'Hello?')],
    [('user', 'Hello?'), ('assistant', 'Yes, 12.')],
    [('system', 'Be brief.'), ('user', 'Hello?'), ('assistant', 'Yes.')],
    [('user', 'Hello?'), ('assistant', 'Yes, 12.'), ('user', 'The file\nis here'), ('assistant', 'So: \u65e5\u672c \xe9')],
    [('system', ' Be brief.\n'), ('user', '  Why?\n\n'), ('assistant', ' So it is. '), ('user', ''),
     ('assistant', '\n\nIndeed\n')],
    [('user', 'def f():\n    return 1'), ('assistant', '    x = 1\n'), ('user', '\tok')]]

# ---------------------------------------------------------------------------------------------------------------------
# files

QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_SPLIT = QWEN_SPLIT.replace(r'\p{N}|', r'\p{N}{1,3}|')
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}


def split_with(regex):
    split = {'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': 'Isolated', 'invert': False}
    return {'type': 'Sequence', 'pretokenizers': [split, {**BYTE_LEVEL, 'use_regex': False}]}


PRE_TOKENIZERS = {
    'smollm2': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, BYTE_LEVEL]},
    'zephyr': BYTE_LEVEL,
    'qwen3': split_with(QWEN_SPLIT),
    'llama3': split_with(LLAMA_SPLIT),
    'llama3.2': split_with(LLAMA_SPLIT),
    'smolvlm': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, BYTE_LEVEL]}}
SPECIAL = {
    'smollm2': ['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    'qwen3': ['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    'zephyr': ['<unk>', '<s>', '</s>'],
    'llama3': ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'],
    'smolvlm': ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<end_of_utterance>', '<fake_token_around_image>', IMAGE]}
SPECIAL['llama3.2'] = SPECIAL['llama3']
NAMED = {
    'smollm2': {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'unk_token': '<|endoftext|>'},
    'qwen3': {'bos_token': None, 'eos_token': '<|im_end|>', 'add_bos_token': False},
    'zephyr': {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'},
    'llama3': {'bos_token': '<|begin_of_text|>', 'eos_token': '<|eot_id|>'},
    'smolvlm': {'bos_token': '<|im_start|>', 'eos_token': {'content': '<end_of_utterance>', 'lstrip': False}}}
NAMED['llama3.2'] = NAMED['llama3']


@pytest.fixture(scope='session')
def published(tmp_path_factory):
    """{name: folder with tokenizer.json, tokenizer_config.json and chat template, as of that model}; BPE trained on pydoc."""
    folder = tmp_path_factory.mktemp('published')
    texts = [row['text'] + ' \xe9 \xfc 12 \xbd \u65e5\u672c\r\n\t' for row in open_rows('pydoc', 'train')]
    folders = {}
    for name, special in SPECIAL.items():
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=1200, show_progress=False, special_tokens=special)
        tokenizer.train_from_iterator(texts, trainer)
        if name == 'qwen3':  # are not "special" there
            tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in ('<think>', '</think>')])
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        file = json.loads(tokenizer.to_str())
        file['pre_tokenizer'] = PRE_TOKENIZERS[name]
        file['post_processor'] = BYTE_LEVEL
        if name == 'qwen3':
            file['normalizer'] = {'type': 'NFC'}
        folders[name] = folder / name
        folders[name].mkdir()
        (folders[name] / 'tokenizer.json').write_text(json.dumps(file))
        config = {**NAMED[name], 'model_max_length': 2048}
        if name == 'qwen3':
            (folders[name] / 'chat_template.jinja').write_text(TEMPLATES[name])
        elif name == 'smolvlm':
            config['chat_template'] = [{'name': 'rag', 'template': 'x'}, {'name': 'default', 'template': TEMPLATES[name]}]
        else:
            config['chat_template'] = TEMPLATES[name]
        (folders[name] / 'tokenizer_config.json').write_text(json.dumps(config))
    return folders


@pytest.fixture(scope='session')
def wordpiece(tmp_path_factory):
    """The tokenizer.json of a WordPiece trained on pydoc, with BERT's normalizer, pre-tokenizer and post-processor."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token='[UNK]'))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=1500, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator([row['text'] for row in open_rows('pydoc', 'train')], trainer)
    tokenizer.post_processor = tokenizers.processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    path = tmp_path_factory.mktemp('wordpiece') / 'tokenizer.json'
    tokenizer.save(str(path))
    return path


def theirs(folder, name, **changes):
    """transformers' tokenizer of the same files."""
    named = {key: token if isinstance(token, str) else token['content'] for key, token in NAMED[name].items()
             if isinstance(token, (str, dict))}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), **{
        'chat_template': TEMPLATES[name], **named, **changes})
    # with trimmed offsets, its mask has a gap where an answer begins with white space
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    return tokenizer


def messages_of(turns, as_list=False):
    def content(text):
        return [{'type': 'text', 'text': text}] if as_list else text
    return [{'role': role, 'content': content(text)} for role, text in turns]


def mixed_text():
    """pydoc, Python code, and random strings with what is hard to split."""
    rng = random.Random(0)
    hard = [' ', '  ', '\n', '\r\n', '\t', '\xa0', '\u3000', '1', '234', '\xbd', '\u0663', 'a', 'the', '\xdf', 'e\u0301',
            '\u65e5\u672c', "'s", "'LL", '!=', '((', '...', '\x04', '\x14', '\x7f', '\U0001f642', '\U000e0041',
            'def f(x):\n    return', ' tail ']
    texts = [row['text'] for row in open_rows('pydoc', 'val')] + [(ROOT / 'render.py').read_text()]
    return texts + [''.join(rng.choice(hard) for _ in range(rng.randint(1, 12))) for _ in range(2000)]


# ---------------------------------------------------------------------------------------------------------------------
# text

@pytest.mark.parametrize('name', ['smollm2', 'qwen3', 'llama3'])
def test_ids_are_those_of_transformers(published, name):
    ours, reference = get_tokenizer(str(published[name])), theirs(published[name], name)
    for text in mixed_text():
        ids = ours.encode(text)
        assert ids == reference(text, add_special_tokens=False)['input_ids'], repr(text)
        assert ours.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)


def test_wordpiece_ids_are_those_of_transformers(wordpiece):
    ours = get_tokenizer(str(wordpiece))
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(wordpiece))
    for text in mixed_text():
        assert ours.encode(text) == reference(text, add_special_tokens=False)['input_ids'], repr(text)
    assert ours.decode(ours.encode('The file is here')) == 'the file is here'
    assert sorted(ours.special) == sorted(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', IMAGE, USER, ASSISTANT, END])
    assert not ours.has_chat_template and ours.end_ids == [ours.special[END]]


def test_special_tokens_in_data_stay_text(published, wordpiece):
    data = 'a <|im_end|><think></think><image> b <|eot_id|>\ufdd0[SEP] <|endoftext|> <end_of_utterance>\ud800'
    for name in (*published.values(), wordpiece):
        tokenizer = get_tokenizer(str(name))
        unknown = {tokenizer.special['[UNK]']} if '[UNK]' in tokenizer.special else set()
        ids = tokenizer.encode(data)
        assert ids and not (set(ids) - unknown) & set(tokenizer.special.values())
        assert max(ids) < tokenizer.n_vocab
        conversation = {'messages': messages_of([('user', data), ('assistant', data)])}
        segments_of_data = [text for text, is_special, _ in segments(conversation, tokenizer, 'all') if not is_special]
        assert segments_of_data.count(NOT_TEXT.sub('\ufffd', data)) == 2
        ids = tokenize(conversation, tokenizer, tiny_config(block_size=900), loss_on='all')['idx']
        assert tokenizer.image_id not in ids
    assert get_tokenizer(str(published['smollm2'])).decode(
        get_tokenizer(str(published['smollm2'])).encode(data)) == data.replace('\ufdd0', '\ufffd').replace('\ud800', '\ufffd')


def test_a_unigram_model_that_makes_a_special_token_of_text_is_refused(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([('<unk>', 0.0), ('</s>', 0.0), ('a', -1.0), ('<', -9.0)], 0))
    tokenizer.add_special_tokens(['<unk>', '</s>'])
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    tokenizer = get_tokenizer(str(tmp_path))
    assert tokenizer.encode('aa') == [2, 2]
    with pytest.raises(ValueError, match="makes a special token of the text '</s>'"):
        tokenizer.encode('a</s>')


def test_runs_of_spaces_that_were_added_as_tokens_are_text(published, tmp_path):
    file = json.loads((published['smollm2'] / 'tokenizer.json').read_text())
    added = tokenizers.Tokenizer.from_str(json.dumps(file))
    added.add_tokens([tokenizers.AddedToken(' ' * 8, normalized=True)])
    added.save(str(tmp_path / 'tokenizer.json'))
    ids = get_tokenizer(str(tmp_path)).encode('a' + ' ' * 8 + 'b')
    assert ids == added.encode('a' + ' ' * 8 + 'b').ids and 1200 in ids


def test_image_and_what_a_conversation_needs_are_appended(published, tmp_path):
    names = ('smollm2', 'qwen3', 'llama3', 'smolvlm')
    smollm2, qwen3, llama3, smolvlm = (get_tokenizer(str(published[name])) for name in names)
    assert smollm2.special[IMAGE] == 1200 and smollm2.n_vocab == 1201 and smollm2.n_text == 1197
    assert smollm2.begin == smollm2.end == END and smollm2.end_ids == [0, 2]
    assert qwen3.special[IMAGE] == 1202 and qwen3.special['<think>'] == 1200 and qwen3.end_ids == [0, 2]
    assert llama3.begin == '<|begin_of_text|>' and llama3.end == '<|eot_id|>' and llama3.end_ids == [4]
    assert smolvlm.image_id == 5 and smolvlm.n_vocab == 1200 and smolvlm.end_ids == [0, 3]
    assert all(t.has_chat_template and USER not in t.special for t in (smollm2, qwen3, llama3, smolvlm))
    assert END not in llama3.special
    (tmp_path / 'tokenizer.json').write_text((published['llama3'] / 'tokenizer.json').read_text())
    bare = get_tokenizer(str(tmp_path))
    assert [bare.special[token] for token in (IMAGE, USER, ASSISTANT, END)] == [1200, 1201, 1202, 1203]
    assert bare.end_ids == [1203] and not bare.has_chat_template


def test_generation_gives_no_image_and_no_unknown_id(published):
    allowed = get_tokenizer(str(published['smollm2'])).allowed_ids(1280)
    assert allowed[:1200].all() and not allowed[1200:].any()


def test_a_tokenizer_survives_pickling(published, wordpiece):
    for name in (*published.values(), wordpiece, 'bytes'):
        tokenizer = get_tokenizer(str(name))
        copy = pickle.loads(pickle.dumps(tokenizer))
        ids = tokenizer.encode('The e\u0301 \x04 <|im_end|><think>[SEP] file')
        assert copy.encode('The e\u0301 \x04 <|im_end|><think>[SEP] file') == ids
        assert copy.decode(ids) == tokenizer.decode(ids)
        example = {'messages': messages_of(CONVERSATIONS[3])}
        config = tiny_config(block_size=900)
        assert tokenize(example, copy, config) == tokenize(example, tokenizer, config)


# ---------------------------------------------------------------------------------------------------------------------
# conversations

@pytest.mark.parametrize('turns', CONVERSATIONS)
@pytest.mark.parametrize('name', TEMPLATES)
def test_conversations_and_what_is_in_the_loss_are_those_of_transformers(published, name, turns):
    ours = get_tokenizer(str(published[name]))
    stripped = [(role, content.strip()) for role, content in turns]
    messages = messages_of(stripped, as_list=name == 'smolvlm')
    reference = theirs(published[name], name)
    config = tiny_config(block_size=900)
    prompt = messages if turns[-1][0] == 'user' else messages[:-1]
    expected = reference.apply_chat_template(prompt, add_generation_prompt=True, enable_thinking=False)['input_ids']
    assert tokenize({'messages': messages_of(turns)}, ours, config, prompt_only=True)['idx'] == expected
    expected = reference.apply_chat_template(messages)['input_ids']
    batch = tokenize({'messages': messages_of(turns)}, ours, config)
    assert batch['idx'] == expected[:-1]
    assert tokenize({'messages': messages_of(turns)}, ours, config, 'all')['targets'] == expected[1:]
    marked = theirs(published[name], name, chat_template=MARKED[name]).apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True)
    assert marked['input_ids'] == expected
    mask = marked.get('assistant_masks', [0] * len(expected))
    assert batch['targets'] == [token if in_loss else -1 for token, in_loss in zip(expected[1:], mask[1:])]
    assert sum(mask) or 'assistant' not in dict(turns)


def test_special_tokens_in_messages_stay_text_next_to_those_of_the_template(published):
    tokenizer = get_tokenizer(str(published['qwen3']))
    messages = messages_of([('user', 'x<|im_end|>\n<|im_start|>assistant\n'), ('assistant', '<think>no</think><|im_end|>')])
    ids = tokenize({'messages': messages}, tokenizer, tiny_config(block_size=900), 'all')['idx']
    assert [i for i in ids if i in tokenizer.special.values()] == [1, 2, 1, 1200, 1201, 2]
    split = theirs(published['qwen3'], 'qwen3', split_special_tokens=True)  # encodes special tokens as text
    data = split(messages[0]['content'].strip(), add_special_tokens=False)['input_ids']
    start = ids.index(2) - len(data)
    assert ids[start:ids.index(2)] == data


@pytest.mark.parametrize('name', TEMPLATES)
def test_images_stand_where_the_content_has_them(published, name):
    tokenizer = get_tokenizer(str(published[name]))
    config = tiny_config(block_size=900, image_token=tokenizer.image_id)
    image = Image.new('RGB', (16, 8))
    contents = [f'{IMAGE}\nWhat?', 'This.', f'And {IMAGE} or {IMAGE}', f'No {IMAGE}.']
    roles = ['user', 'assistant'] * 2
    example = {'messages': messages_of(zip(roles, contents)), 'images': [image] * 4}
    batch = tokenize(example, tokenizer, config)
    assert batch['idx'].count(tokenizer.image_id) == 8 and tokenizer.image_id not in batch['targets']
    shown = tokenizer.decode(batch['idx']).replace(IMAGE * 2, IMAGE)
    for content in contents:
        if tokenizer.content_is_list:  # a new line after an image is the template's business
            content = content.replace(f'{IMAGE}\n', IMAGE)
        assert content in shown
    in_loss = tokenizer.decode([i for i in batch['targets'] if i >= 0])
    end = {'smolvlm': '<end_of_utterance>', 'zephyr': '</s>'}.get(name, '<|eot_id|>' if 'llama' in name else '<|im_end|>')
    assert in_loss.replace(' ', '') == f'This.{end}No.{end}'
    as_text = {'messages': messages_of(zip(roles, contents))}
    assert tokenizer.image_id not in tokenize(as_text, tokenizer, config)['idx']


def test_a_list_of_texts_and_images_is_rendered_as_by_transformers(published):
    tokenizer = get_tokenizer(str(published['smolvlm']))
    config = tiny_config(block_size=900, image_token=tokenizer.image_id)
    theirs_of_images = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What? '}, {'type': 'image'}]}]
    ours_of_images = {'messages': messages_of([('user', f'{IMAGE}What? {IMAGE}')]), 'images': [Image.new('RGB', (8, 8))] * 2}
    expected = theirs(published['smolvlm'], 'smolvlm').apply_chat_template(theirs_of_images, add_generation_prompt=True)
    assert tokenize(ours_of_images, tokenizer, config, prompt_only=True)['idx'] == expected['input_ids']


def test_without_a_template_chatml_is_used_where_its_tokens_are_known(published, tmp_path):
    (tmp_path / 'tokenizer.json').write_text((published['smollm2'] / 'tokenizer.json').read_text())
    tokenizer = get_tokenizer(str(tmp_path))
    turns = [('system', 'Be brief.'), ('user', 'Hi'), ('assistant', 'Yo')]
    text = ''.join(text for text, *_ in segments({'messages': messages_of(turns)}, tokenizer, 'all'))
    assert text == ''.join(f'<|im_start|>{role}\n{content}<|im_end|>\n' for role, content in turns)
    assert USER not in tokenizer.special and not tokenizer.has_chat_template and tokenizer.end_ids == [0, 2]


def test_system_prompt_is_inserted_where_there_is_none(published):
    turns = [('user', 'Hi'), ('assistant', 'Yo')]
    for name in ('smollm2', 'llama3', 'bytes'):
        path = str(published.get(name, name))
        auto, brief = get_tokenizer(path), get_tokenizer(path, 'Be brief.')
        with_system = segments({'messages': messages_of([('system', 'Be brief.'), *turns])}, auto, 'all')
        assert segments({'messages': messages_of(turns)}, brief, 'all') == with_system
        assert segments({'messages': messages_of(turns)}, auto, 'all') != with_system
        other = {'messages': messages_of([('system', 'Be long.'), *turns])}
        assert segments(other, brief, 'all') == segments(other, auto, 'all')


@pytest.mark.parametrize('template, message', [
    ('{{ raise_exception("no system") }}', 'its chat template cannot be rendered'),
    ('{% if %}', 'its chat template cannot be rendered'),
    ('{{ messages.__class__.__mro__ }}', 'its chat template'),
    ('{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}', 'leaves out a message or repeats one'),
    ('{% for m in messages %}{{ m.content + m.content }}{% endfor %}', 'leaves out a message or repeats one')])
def test_a_template_that_cannot_be_used_is_refused(published, tmp_path, template, message):
    (tmp_path / 'tokenizer.json').write_text((published['smollm2'] / 'tokenizer.json').read_text())
    (tmp_path / 'chat_template.jinja').write_text(template)
    with pytest.raises(ValueError, match=message):
        get_tokenizer(str(tmp_path))


def test_of_special_tokens_in_a_template_the_longest_counts(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({'a': 0, 'b': 1}, []))
    tokenizer.add_special_tokens(['<x>', '<x>b'])
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'chat_template.jinja').write_text('{% for m in messages %}<x>b{{ m.content }}<x>{% endfor %}')
    tokenizer = get_tokenizer(str(tmp_path))
    assert tokenize({'messages': messages_of([('user', 'a')])}, tokenizer, tiny_config(), prompt_only=True)['idx'] == [3, 0, 2]


def test_a_conversation_that_a_template_refuses_is_named(published, tmp_path):
    (tmp_path / 'tokenizer.json').write_text((published['smollm2'] / 'tokenizer.json').read_text())
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (tmp_path / 'chat_template.jinja').write_text(refusing + SMOLLM2)
    tokenizer = get_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match='cannot be rendered .*System role not supported'):
        tokenize({'messages': messages_of([('system', 'x'), ('user', 'y')])}, tokenizer, tiny_config())


# ---------------------------------------------------------------------------------------------------------------------
# missing and damaged files

@pytest.mark.parametrize('damage', [
    lambda text: text[:len(text) // 2], lambda text: '{}', lambda text: '[1]', lambda text: '',
    lambda text: text.replace('"BPE"', '"Abacus"'), lambda text: text.replace('"added_tokens"', '"added"')])
def test_a_damaged_tokenizer_is_refused_in_one_sentence(published, tmp_path, damage):
    text = (published['smollm2'] / 'tokenizer.json').read_text()
    (tmp_path / 'tokenizer.json').write_text(damage(text))
    with pytest.raises(ValueError, match='cannot be read .*: download it again') as error:
        get_tokenizer(str(tmp_path))
    assert '\n' not in str(error.value)


def test_damaged_tokenizer_config_is_refused(published, tmp_path):
    (tmp_path / 'tokenizer.json').write_text((published['smollm2'] / 'tokenizer.json').read_text())
    (tmp_path / 'tokenizer_config.json').write_text('{"chat_template": ')
    with pytest.raises(ValueError, match='cannot be read .*: download it again'):
        get_tokenizer(str(tmp_path))


def test_missing_tokenizers_say_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError('offline')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(ValueError, match='has no tokenizer.json: name another'):
        get_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match='no tokenizer at .*mine.json'):
        get_tokenizer(str(tmp_path / 'mine.json'))
    with pytest.raises(ValueError, match='Qwen/Qwen3-0.6B: it is not in the cache'):
        get_tokenizer('Qwen/Qwen3-0.6B')
