"""What must stay true of knobs: a value has the type of its knob, and a typo is never silent."""

import dataclasses
import functools
import inspect
import re

import pytest
from conftest import ROOT, inside, launch, refused

from configurator import call_with_knobs, configure, run_command
from model import GPTConfig
from vision import VisionConfig


def knobs(**changes):
    return {'learning_rate': 6e-4, 'max_iters': 100, 'compile': True, 'out_dir': 'out', 'image': (), 'LIMIT': 3, **changes}


@pytest.mark.parametrize('argv, key, value', [
    (['--learning_rate=1'], 'learning_rate', 1.0),
    (['--learning_rate', '1e-4'], 'learning_rate', 1e-4),
    (['--learning_rate=-1'], 'learning_rate', -1.0),
    (['--max_iters=5'], 'max_iters', 5),
    (['--max_iters=1e4'], 'max_iters', 10000),
    (['--compile=False'], 'compile', False),
    (['--compile=true'], 'compile', True),
    (['--compile=0'], 'compile', False),
    (['--compile'], 'compile', True),
    (['--out_dir=a=b=c'], 'out_dir', 'a=b=c'),
    (['--out_dir', '123'], 'out_dir', '123'),
    (['--image', 'a.png', 'b c.png'], 'image', ('a.png', 'b c.png')),
    (['--image=a=1.png'], 'image', ('a=1.png',)),
])
def test_value_has_the_type_of_its_knob(argv, key, value):
    script = knobs()
    result = configure(script, argv=argv)
    assert result[key] == value and type(result[key]) is type(value)
    assert script[key] == value


@pytest.mark.parametrize('argv, message', [
    (['--learnin_rate=1'], 'did you mean learning_rate'),
    (['--zzzzz=1'], '--help lists all'),
    (['--max_iters=many'], "must be int, like 100, got 'many'"),
    (['--max_iters=1.5'], 'must be int'),
    (['--compile=maybe'], 'must be bool'),
    (['--out_dir'], 'needs a value'),
    (['missing.py'], 'is not a file'),
    (['--LIMIT=4'], 'not a knob'),
])
def test_mistakes_raise_with_their_name(argv, message):
    with pytest.raises(ValueError, match=message):
        configure(knobs(), argv=argv)


def test_config_files_override_and_the_command_line_comes_last(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('"""doc"""\nimport math\nmax_iters = 7 * 2\nlearning_rate = 1\nout_dir = f"x{max_iters}"\n')
    result = configure(knobs(), argv=[str(path), '--max_iters=3'])
    assert result == {'learning_rate': 1.0, 'max_iters': 3, 'compile': True, 'out_dir': 'x14', 'image': ()}
    assert type(result['learning_rate']) is float


@pytest.mark.parametrize('text, message', [
    ('max_iter = 7', 'did you mean max_iters'),
    ('max_iters = "7"', 'must be int'),
    ('max_iters = 1 /', 'does not run'),
    ('max_iters = undefined', 'does not run: NameError'),
    ('compile = 1', 'must be bool'),
])
def test_typo_in_a_config_file_raises(tmp_path, text, message):
    path = tmp_path / 'c.py'
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        configure(knobs(), argv=[str(path)])


# -----------------------------------------------------------------------------
# the fields of a dataclass are knobs

def derived(default):
    return dataclasses.field(default=default, metadata={'derived': True})


@dataclasses.dataclass
class BaseConfig:
    # the heading of the base
    width: int = 64           # of a layer
    learning_rate: float = 1.0  # a script has another one
    size: int = derived(7)    # follows from the weights


@dataclasses.dataclass
class Config(BaseConfig):
    depth: int = 3            # how many layers
    name: str = ''            # what it is called, in one
    #                           or in two lines
    # a heading
    bias: bool = True


def test_fields_of_a_dataclass_are_knobs_that_the_script_overrides(tmp_path):
    script = knobs()
    path = tmp_path / 'c.py'
    path.write_text('depth = 5\nname = f"{width} wide"')
    result = configure(script, Config, ['--width=32', str(path), '--bias=False'])
    assert result == {'learning_rate': 6e-4, 'max_iters': 100, 'compile': True, 'out_dir': 'out', 'image': (),
                      'width': 32, 'depth': 5, 'name': '32 wide', 'bias': False}
    assert script == knobs()  # only a script's own knobs are set in it
    assert Config() == Config(width=64, depth=3, name='', bias=True)
    with pytest.raises(ValueError, match="must be int, like 64, got 'wide'"):
        configure(knobs(), Config, ['--width=wide'])


def test_derived_field_is_not_a_knob(tmp_path):
    with pytest.raises(ValueError, match='--size is not a knob'):
        configure(knobs(), Config, ['--size=3'])
    path = tmp_path / 'c.py'
    path.write_text('size = 3')
    with pytest.raises(ValueError, match='size is not a knob'):
        configure(knobs(), Config, [str(path)])
    for name in ('vocab_size', 'image_token', 'image_mean', 'image_std'):
        with pytest.raises(ValueError, match=f'--{name} is not a knob'):
            configure(knobs(), GPTConfig, [f'--{name}=3'])


def test_every_field_is_defined_once():
    own_fields = inspect.get_annotations(GPTConfig).keys()
    assert own_fields.isdisjoint(inspect.get_annotations(VisionConfig))


# -----------------------------------------------------------------------------
# commands

def draw(
    config: Config,
    n_images=10,          # how many to draw
    name_of_file='a.png',
    scale=1.5,            # of everything
    sources=(),           # files to read
):
    """
    Draws images.

    And more about it.
    """
    return config, n_images, name_of_file, scale, sources


def write(
    text,
    n=1,                  # copies
):
    """Writes a text."""
    return text * n


COMMANDS = {'draw': draw, 'write': functools.partial(write, 'ab', n=2)}


def test_command_gets_its_keyword_arguments_and_a_dataclass_from_the_command_line():
    assert run_command(COMMANDS, ['draw']) == (Config(), 10, 'a.png', 1.5, ())
    result = run_command(COMMANDS, ['draw', '--n_images=3', '--width=8', '--scale=2', '--name_of_file', 'b.png', '--bias=0',
                                    '--sources', 'x', 'y'])
    assert result == (Config(width=8, bias=False), 3, 'b.png', 2.0, ('x', 'y')) and type(result[3]) is float
    assert run_command(COMMANDS, ['write']) == 'abab'
    assert run_command(COMMANDS, ['write', '--n=3']) == 'ababab'
    assert call_with_knobs(draw, ['--n_images=4'], Config(depth=9)) == (Config(depth=9), 4, 'a.png', 1.5, ())


@pytest.mark.parametrize('argv, message', [
    ([], 'expected a command: draw, write'),
    (['drawn'], 'expected a command: draw, write'),
    (['--n_images=3'], 'expected a command: draw, write'),
    (['draw', '--n_image=3'], '--n_image is not a knob of this script: did you mean n_images'),
    (['draw', '--n_images=some'], "must be int, like 10, got 'some'"),
    (['draw', '--size=3'], '--size is not a knob'),
    (['draw', '--config=3'], '--config is not a knob'),
    (['write', '--text=3'], '--text is not a knob'),
])
def test_mistake_in_a_command_raises(argv, message):
    with pytest.raises(ValueError, match=message):
        run_command(COMMANDS, argv)


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        run_command(COMMANDS, list(argv))
    assert end.value.code == 0
    return re.sub(' +', ' ', capsys.readouterr().out)


def test_help_lists_the_commands_and_the_knobs_of_each(capsys):
    assert 'draw\n Draws images.\nwrite\n Writes a text.\n' in help_of(capsys, '--help')
    text = help_of(capsys, 'draw', '--help')
    assert text.startswith('Draws images.\n\nAnd more about it.\n')
    for line in ('--n_images=10 # how many to draw', "--name_of_file='a.png'", '--scale=1.5 # of everything',
                 '--sources=() # files to read', '--width=64 # of a layer', '--depth=3 # how many layers',
                 "--name='' # what it is called, in one", '# or in two lines', '# a heading\n --bias=True'):
        assert line in text
    assert '# the heading of the base\n --width' in text and 'size=7' not in text
    assert '--n=2 # copies' in help_of(capsys, 'write', '--help')


# -----------------------------------------------------------------------------
# the scripts

def definitions(source, indent):
    """[(name, comment or '')] of the lines NAME = VALUE  # COMMENT or NAME: TYPE = VALUE  # COMMENT of a source."""
    pattern = rf'^{indent}([a-z]\w*)(?:: \w+)? = [^#\n]*?(?:  # (.*))?$'
    return re.findall(pattern, source, re.MULTILINE)


def test_help_lists_every_knob_with_comment_and_value():
    process = inside('train.py', '--help')
    assert process.returncode == 0
    import train
    own = [name for name, value in vars(train).items() if name.islower() and name[0] != '_'
           and type(value) in (bool, int, float, str)]
    for name in own:
        assert f'--{name}={getattr(train, name)!r}' in process.stdout
    assert '# max learning rate of the GPT; 0 freezes it' in process.stdout
    fields = {f.name: f.default for f in dataclasses.fields(GPTConfig) if not f.metadata.get('derived')}
    values = {**fields, **{name: getattr(train, name) for name in own}}
    listed = re.findall(r'^  --(\w+)=', process.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(values)
    # each with the comment of its definition: the script's, or else the dataclass's
    top_of_train = (ROOT / 'train.py').read_text().partition('\ndef ')[0]
    comments = dict(definitions(inspect.getsource(VisionConfig) + inspect.getsource(GPTConfig), '    '))
    comments.update(definitions(top_of_train, ''))
    lines = {line.partition('=')[0].strip(' -'): line for line in process.stdout.splitlines() if line.startswith('  --')}
    for name, value in values.items():
        text = f'  --{name}={value!r}'.ljust(42)
        assert lines[name] == (f'{text} # {comments[name]}' if comments[name] else text)
    # and with the further lines of the comment
    for text in re.findall(r'^#   +(.*)', top_of_train, re.MULTILINE):
        assert f'\n{" " * 43}# {text}\n' in process.stdout


def test_mistakes_end_a_script_in_one_sentence():
    refused(launch('train.py', '--learnin_rate=1'), 'learning_rate')
    refused(inside('sample.py', '--temprature=1'), 'temperature')
