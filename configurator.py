"""
Knobs are the plain global variables at the top of a script; a config file is more Python that sets some of them;
--key=value on the command line has the last word:

    $ python train.py config/quickstart.py --batch_size=32 --out_dir=out/wide
    $ python train.py --help                    # every knob of the script, with its comment and its value

nanoGPT executes its configurator inside the script. Here it is one call, `config = configure(globals())`, so that a
misspelt key (in a config file as well) is a sentence and not a silent new variable, and a value has its knob's type.
"""

import ast
import difflib
import os
import sys


def configure(knobs, argv=None):
    """
    Overrides the knobs in the namespace `knobs` by config files and --key=value, in the order in which they come.

    A knob is a global of the calling script whose value is a bool, int, float, str or a tuple of str. `--key value`
    and `--flag` (for True) work too; a tuple takes all values that follow: `--image a.png b.png`.
    Returns {name: value} of all knobs. Raises ValueError for an unknown key or a value that is not of the knob's type.
    """
    argv = sys.argv[1:] if argv is None else argv
    names = [k for k, v in knobs.items()  # CONSTANTS are not knobs
             if k.islower() and not k.startswith('_') and isinstance(v, (bool, int, float, str, tuple))]
    if '--help' in argv or '-h' in argv:
        print_help(knobs, names)
        sys.exit(0)
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            run_config_file(word, knobs, names)
            continue
        key, has_value, value = word[2:].partition('=')  # a value may hold further '='
        known(key, names, f'--{key}')
        values = [value] if has_value else []
        many = isinstance(knobs[key], tuple)
        while words and not words[0].startswith('--') and (many or not values):
            values.append(words.pop(0))
        if not values and isinstance(knobs[key], bool):
            values = ['True']
        if not values:
            raise ValueError(f'--{key} needs a value: --{key}=VALUE (now {knobs[key]!r})')
        knobs[key] = tuple(values) if many else convert(key, values[0], knobs[key])
        print(f'overriding: {key} = {knobs[key]!r}', file=sys.stderr)
    return {name: knobs[name] for name in names}


def run_config_file(path, knobs, names):
    """Executes a config file with the knobs' present values in reach; every name it sets must be a knob."""
    if not os.path.isfile(path):
        raise ValueError(f'expected a config file or --key=value, got {path!r}, which is no file')
    print(f'config file: {path}', file=sys.stderr)
    scope = {name: knobs[name] for name in names}
    with open(path, encoding='utf-8') as f:
        try:
            exec(compile(f.read(), path, 'exec'), scope)
        except Exception as error:
            raise ValueError(f'config file {path} does not run: {type(error).__name__}: {error}') from error
    for key, value in scope.items():
        if key.startswith('_') or isinstance(value, type(sys)):  # __doc__, __builtins__, imported modules
            continue
        known(key, names, f'{path}: {key}')
        old = knobs[key]
        if isinstance(old, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(old):
            raise ValueError(f'{path}: {key} must be {type(old).__name__}, like {old!r}, got {value!r}')
        knobs[key] = value


def known(key, names, where):
    """Raises ValueError, naming the nearest knobs, unless `key` is one."""
    if key not in names:
        near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
        hint = f'did you mean {" or ".join(near)}?' if near else '--help lists all knobs'
        raise ValueError(f'{where} is not a knob of this script: {hint}')


def convert(key, text, old):
    """The command line's text as the type of the knob's present value: '1' is a float for a float, 'no=1' a str."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text in ('true', 'false') else text)
    except (SyntaxError, ValueError):
        value = text
    if isinstance(old, bool) and value in (0, 1):
        return bool(value)
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if type(old) is int and type(value) is float and value.is_integer():  # --max_iters=1e4
        return int(value)
    if type(value) is not type(old):
        raise ValueError(f'--{key} must be {type(old).__name__}, like {old!r}, got {text!r}')
    return value


def print_help(knobs, names):
    """Every knob as 'name = value  # comment', in the script's order and under its own headings."""
    print((knobs.get('__doc__') or '').strip() + '\n')
    with open(knobs['__file__'], encoding='utf-8') as f:
        lines = f.read().split('\n')
    heading = ''
    for line in lines:
        name = line.partition(' = ')[0]
        if name in names:
            comment = line.partition('  #')[2].strip()
            print(heading + f'  --{name}={knobs[name]!r}'.ljust(42) + (f' # {comment}' if comment else ''))
        heading = line + '\n' if line.startswith('# ') and not line.startswith('# ---') else ''


def run(main):
    """Runs a script's main(): what a user can cause ends in one sentence and status 1. `python -X dev` shows all."""
    try:
        main()
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
