"""
Knobs of a script are the plain global variables at its top, and the fields of the config class that it
names. A config file is Python that sets some of them; --key=value on the command line has the last word:

    $ python train.py config/quickstart.py --batch_size=32 --out_dir=out/wide
    $ python train.py --help                    # every knob of the script, with its comment and its value
    $ python prepare_data.py shapes --help      # the knobs of a command: its function's keyword arguments

nanoGPT executes its configurator inside the script. Here it is one call, `configure(globals(), GPTConfig)`.
A misspelled key is an error, in a config file too, and a value has the type of its knob.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import runpy
import sys
import textwrap
from pathlib import Path

def configure(knobs, config_class=None, argv=None):
    """Overrides the knobs in a script's globals() by config files and --key=value, in their order. Returns
    {name: value} of all knobs; the script's own are set in its globals as well.

    A knob is a global whose value is a bool, int, float, str or a tuple of str, or another field of the
    dataclass config_class. `--key value` and `--flag` (for True) work too; a tuple takes all values that
    follow: `--image a.png b.png`. Raises ValueError for an unknown key or a value of another type.
    """
    argv = sys.argv[1:] if argv is None else argv
    own = {name: value for name, value in knobs.items() if is_knob(name, value)}
    values = {**knobs_of(config_class), **own}
    if asks_for_help(argv):
        source = Path(knobs['__file__']).read_text(encoding='utf-8')
        print_help(knobs['__doc__'], values, source, [config_class])
    override(values, argv)
    knobs.update((name, values[name]) for name in own)
    return values

def run_command(commands, argv=None):
    """Runs `SCRIPT NAME --key=value`: calls commands[NAME]; its keyword arguments are the knobs."""
    argv = sys.argv[1:] if argv is None else argv
    if asks_for_help(argv[:1]):
        for function, names in itertools.groupby(commands, key=lambda name: unwrap(commands[name])):
            print('\n'.join(textwrap.wrap(', '.join(names), 110)))
            print('        ' + inspect.getdoc(function).partition('\n')[0])
        print('\nNAME --help lists the knobs of a command')
        sys.exit(0)
    if not argv or argv[0] not in commands:
        raise ValueError(f'expected a command: {", ".join(commands)}; --help says what each does')
    return call_with_knobs(commands[argv[0]], argv[1:])

def call_with_knobs(function, argv, *positional):
    """Calls function(*positional, **knobs); its keyword arguments, overridden by argv, are the knobs. A
    parameter annotated with a dataclass gives that dataclass's fields as knobs and receives an instance.
    """
    values = {}
    classes = {}
    for parameter in list(inspect.signature(function).parameters.values())[len(positional):]:
        if dataclasses.is_dataclass(parameter.annotation):
            classes[parameter.name] = parameter.annotation
            values.update(knobs_of(parameter.annotation))
        else:
            values[parameter.name] = parameter.default
    if asks_for_help(argv):
        written = unwrap(function)
        print_help(inspect.getdoc(written), values, inspect.getsource(written), classes.values())
    override(values, argv)
    for name, cls in classes.items():
        values[name] = cls(**{field: values.pop(field) for field in knobs_of(cls)})
    return function(*positional, **values)

def is_knob(name, value):
    """CONSTANTS and _private names are no knobs."""
    return name.islower() and not name.startswith('_') and isinstance(value, (bool, int, float, str, tuple))

def knobs_of(config_class):
    """{field: default} of a dataclass, without the fields that follow from others (metadata derived)."""
    if config_class is None:
        return {}
    return {f.name: f.default for f in dataclasses.fields(config_class) if not f.metadata.get('derived')}

def unwrap(function):
    """The function of a functools.partial."""
    return getattr(function, 'func', function)

def override(values, argv):
    """Sets values[key] for each --key=value, and for each assignment in a config file."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            run_config_file(word, values)
            continue
        key, has_value, value = word[2:].partition('=')  # a value may hold further '='
        check_known(key, values, f'--{key}')
        old = values[key]
        takes_many = isinstance(old, tuple)
        texts = [value] if has_value else []
        while words and not words[0].startswith('--') and (takes_many or not texts):
            texts.append(words.pop(0))
        if not texts and isinstance(old, bool):
            texts = ['True']
        if not texts:
            raise ValueError(f'--{key} needs a value: --{key}=VALUE (now {old!r})')
        values[key] = tuple(texts) if takes_many else convert(key, texts[0], old)
        print(f'overriding: {key} = {values[key]!r}', file=sys.stderr)

def run_config_file(path, values):
    """Runs a config file, which can read the present values; every name that it sets must be a knob."""
    if not Path(path).is_file():
        raise ValueError(f'expected a config file or --key=value, got {path!r}, which is not a file')
    print(f'config file: {path}', file=sys.stderr)
    try:
        scope = runpy.run_path(path, init_globals=values)
    except Exception as error:
        raise ValueError(f'config file {path} does not run: {type(error).__name__}: {error}') from error
    for key, value in scope.items():
        if key.startswith('_') or isinstance(value, type(sys)):  # __doc__, __builtins__, imported modules
            continue
        check_known(key, values, f'{path}: {key}')
        values[key] = check_type(value, values[key], f'{path}: {key}')

def check_known(key, values, where):
    """Raises ValueError, naming the closest knobs, unless `key` is one."""
    if key not in values:
        close = difflib.get_close_matches(key, values, n=3, cutoff=0.5)
        hint = f'did you mean {" or ".join(close)}?' if close else '--help lists all knobs'
        raise ValueError(f'{where} is not a knob of this script: {hint}')

def convert(key, text, old):
    """The command line's text as the type of the knob's present value: '1' is a float for a float."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text in ('true', 'false') else text)
    except (SyntaxError, ValueError):
        value = text
    if isinstance(old, bool) and value in (0, 1):
        value = bool(value)
    if type(old) is int and type(value) is float and value.is_integer():  # --max_iters=1e4
        value = int(value)
    return check_type(value, old, f'--{key}')

def check_type(value, old, where):
    """The value, if it is of the type of `old`; an int is a float, too. Else raises ValueError."""
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if type(value) is not type(old):
        raise ValueError(f'{where} must be {type(old).__name__}, like {old!r}, got {value!r}')
    return value

def asks_for_help(argv):
    return '--help' in argv or '-h' in argv

def print_help(doc, values, source, classes):
    """Prints every knob as '--name=value  # comment', in the sources' order, with their headings; exits."""
    print((doc or '').strip() + '\n')
    remaining = dict(values)
    extended = [base for cls in classes if cls for base in inspect.getmro(cls)[:-1]]
    heading = ''
    for line in '\n'.join([source, *map(inspect.getsource, extended)]).split('\n'):
        code, _, comment = line.partition('  #')
        name = re.split('[:=]', code)[0].strip()
        if '=' in code and name in remaining:
            knob = f'  --{name}={remaining.pop(name)!r}'.ljust(42)
            print(heading + knob + (comment and f' # {comment.strip()}'))
        is_comment = line.strip().startswith('# ') and '---' not in line
        continued = re.sub('^#  +', ' ' * 43 + '# ', line.strip())  # of the comment above
        heading = heading + continued + '\n' if is_comment else ''
    sys.exit(0)

def run(main):
    """Runs a script's main(). A user's mistake ends in one sentence; `python -X dev` shows the traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
