"""What must stay true of knobs: a value has its knob's type, and a typo is never silent."""

import pytest
from conftest import inside, launch, refused

from configurator import configure


def knobs(**changes):
    return {'learning_rate': 6e-4, 'max_iters': 100, 'compile': True, 'out_dir': 'out', 'image': (), 'LIMIT': 3, **changes}


@pytest.mark.parametrize('argv,key,value', [
    (['--learning_rate=1'], 'learning_rate', 1.0), (['--learning_rate', '1e-4'], 'learning_rate', 1e-4),
    (['--max_iters=5'], 'max_iters', 5), (['--max_iters=1e4'], 'max_iters', 10000),
    (['--compile=False'], 'compile', False), (['--compile=true'], 'compile', True), (['--compile=0'], 'compile', False),
    (['--compile'], 'compile', True), (['--out_dir=a=b=c'], 'out_dir', 'a=b=c'), (['--out_dir', '123'], 'out_dir', '123'),
    (['--image', 'a.png', 'b c.png'], 'image', ('a.png', 'b c.png')), (['--image=a=1.png'], 'image', ('a=1.png',)),
    (['--learning_rate=-1'], 'learning_rate', -1.0),
])
def test_values_take_their_knobs_type(argv, key, value):
    result = configure(knobs(), argv)
    assert result[key] == value and type(result[key]) is type(value)


@pytest.mark.parametrize('argv,message', [
    (['--learnin_rate=1'], 'did you mean learning_rate'), (['--zzzzz=1'], '--help lists all'),
    (['--max_iters=many'], "must be int, like 100, got 'many'"), (['--max_iters=1.5'], 'must be int'),
    (['--compile=maybe'], 'must be bool'), (['--out_dir'], 'needs a value'), (['missing.py'], 'is no file'),
    (['--LIMIT=4'], 'not a knob'),
])
def test_mistakes_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        configure(knobs(), argv)


def test_config_files_override_and_the_command_line_has_the_last_word(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('"""doc"""\nimport math\nmax_iters = 7 * 2\nlearning_rate = 1\nout_dir = f"x{max_iters}"\n')
    result = configure(knobs(), [str(path), '--max_iters=3'])
    assert result == {'learning_rate': 1.0, 'max_iters': 3, 'compile': True, 'out_dir': 'x14', 'image': ()}
    assert type(result['learning_rate']) is float


@pytest.mark.parametrize('text,message', [
    ('max_iter = 7', 'did you mean max_iters'), ('max_iters = "7"', 'must be int'), ('max_iters = 1 /', 'does not run'),
    ('max_iters = undefined', 'does not run: NameError'), ('compile = 1', 'must be bool'),
])
def test_a_typo_in_a_config_file_is_an_error(tmp_path, text, message):
    path = tmp_path / 'c.py'
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        configure(knobs(), [str(path)])


def test_help_lists_every_knob_with_comment_and_value():
    process = inside('train.py', '--help')
    assert process.returncode == 0
    import train
    for name in (k for k, v in vars(train).items() if k.islower() and type(v) in (bool, int, float, str) and k[0] != '_'):
        assert f'--{name}={getattr(train, name)!r}' in process.stdout
    assert '# max learning rate of the GPT; 0 freezes it' in process.stdout


def test_mistakes_end_a_script_in_one_sentence():
    refused(launch('train.py', '--learnin_rate=1'), 'learning_rate')
    refused(inside('sample.py', '--temprature=1'), 'temperature')
