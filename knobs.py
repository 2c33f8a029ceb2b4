"""The knobs of a script: a flat dataclass with a comment on every field, set by config files and --key=value.

    python train.py sample_config/demo.py sample_config/ablation/gru.py --seed=2

Any number of config files, then or between them --key=value; from left to right, the last one wins. A config
file is python text that holds assignments only. A stage's dataclass has check(), which yields one line for
each value that makes no sense; the check_* functions below are for it. --help prints the fields with their
comments.
"""
import ast
import dataclasses
import difflib
import importlib
import inspect
import math
import os
import re
import sys
from pathlib import Path

from common import default_of, fail


def load_config(cls, doc="", args=None):
    """Build the dataclass `cls` from the command line, or `args`: config files and --key=value, later wins.

    Returns the config, checked. `config.sources` maps each knob that was set to the place that set it. Exits
    with one line on an unknown key, a wrong type, a missing file, or a complaint of `cls.check()`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values, sources, files = {}, {}, []  # files: config files and the knobs that they set
    for arg in sys.argv[1:] if args is None else args:
        if arg in ("-h", "--help"):
            print(help_text(cls, doc))
            raise SystemExit(0)
        if arg.startswith("-"):
            key, equals, text = arg.lstrip("-").partition("=")
            if not equals or not arg.startswith("--"):
                fail(f"{arg}: flags are written --key=value, for example --seed=2 (--help lists the knobs)")
            assignments, where = {key: text}, "command line"
        else:
            assignments, where = read_config_file(arg), arg
            files.append((arg, assignments.keys()))
        for key, value in assignments.items():
            if key not in fields:
                fail(f"{where}: {cls.__name__} has no knob {key}{hint_for(key, fields)} "
                     f"({command()} --help lists them)")
            if where == "command line" and fields[key].type is not str:
                value = parse_flag(value)
            values[key] = to_type(value, fields[key].type, f"{where}: {key}")
            sources[key] = where
    for path, keys in files:  # as when scratch.py stands before the config that it changes
        later = {sources[key] for key in keys}
        if later and later <= {other for other, _ in files} - {path}:
            fail(f"{path} changes nothing: {' and '.join(sorted(later))} sets it again; put it after that, "
                 "or leave it out")
    config = cls(**values)
    config.sources = sources
    if getattr(config, "out_dir", None) == "":
        config.out_dir = "out/" + ("+".join(Path(path).stem for path, _ in files) or Path(sys.argv[0]).stem)
    for complaint in config.check() or ():
        fail(complaint)
    return config


def command():
    """How this script is called: python train.py, python -m tools.plot."""
    path = Path(sys.argv[0])
    return f"python -m tools.{path.stem}" if path.parent.name == "tools" else f"python {path.name}"


def print_knobs(config):
    """What differs from the defaults, and which file or flag set it: for the log, after all checks."""
    for field in dataclasses.fields(config):
        where, value = config.sources.get(field.name), getattr(config, field.name)
        if where and value != default_of(field):
            print(f"knob {field.name} = {value!r} (default {default_of(field)!r}, from {where})")


def help_text(cls, doc):
    """The script's docstring and every knob with its default and the comment beside it in the source."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            match = re.match(r"    (\w+): [^#]*#\s*(.*)", line)
            if match:
                comments[match[1]] = match[2]
    lines = [f"  {f'--{field.name}={default_of(field)!r}':<36} {comments.get(field.name, '')}"
             for field in dataclasses.fields(cls)]
    return "\n".join([doc.strip(), "", "knobs (set in config files or as --key=value, later wins):", *lines])


def hint_for(key, fields):
    """What to say of an unknown knob: it belongs to another script, or is misspelt."""
    for script, name in (("simulate", "SimulateConfig"), ("prepare", "PrepareConfig"),
                         ("train", "TrainConfig"), ("finetune", "FinetuneConfig"),
                         ("tools.prometheus", "PrometheusConfig"), ("tools.graphnet", "GraphnetConfig")):
        if key in getattr(importlib.import_module(script), name).__dataclass_fields__:
            return f"; {key} is a knob of {script.replace('.', '/')}.py"
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def read_config_file(path):
    """A config file's assignments as a dict. The file is python, but may hold `name = value` only."""
    if not os.path.isfile(path):
        hint = "check the spelling"
        if Path(path).parts[:1] == ("config",) and not os.path.isdir("config"):
            hint = "config/ is your copy of the samples, make it with: cp -r sample_config config"
        fail(f"{path}: no such config file; {hint}")
    names = {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        tree = ast.parse(text)
        for node in tree.body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_assignment = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if not (is_docstring or is_assignment):
                fail(f"{path}:{node.lineno}: a config file holds assignments only (name = value)")
        exec(compile(tree, path, "exec"), {"__builtins__": {}}, names)
    except UnicodeDecodeError:
        fail(f"{path}: not a text file; a config file is python text with assignments")
    except SyntaxError as error:
        fail(f"{path}:{error.lineno}: not valid python: {error.msg}")
    except Exception as error:  # whatever the user's expressions may raise
        fail(f"{path}: {type(error).__name__}: {error}")
    return {name: value for name, value in names.items() if not name.startswith("__")}


def parse_flag(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):  # {[1]: 2} is a TypeError
        return {"true": True, "false": False}.get(text.lower(), text)


def to_type(value, kind, where):
    """The value as `kind`, where nothing is lost: 1 may be a float, 1e6 an int; 1.5, "1" and True may not."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number and math.isfinite(value):
        return float(value)
    if kind is int and is_number and abs(value) < 2**53 and value == int(value):
        return int(value)
    if type(value) is not kind or kind in (int, float):
        wanted = {int: "an integer below 2^53", float: "a finite number", bool: "True or False",
                  str: "a string (in quotes)", dict: "a dict"}[kind]
        fail(f"{where} = {value!r} is not {wanted}")
    return value


def take_architecture(config, architecture, saved, path):
    """Set the knobs of the dataclass `architecture` as a checkpoint has them; one that was set to something
    else is an error.
    """
    for field in dataclasses.fields(architecture):
        key, known = field.name, saved["config"].get(field.name, default_of(field))  # younger knobs were off
        if key in config.sources and getattr(config, key) != known:
            fail(f"{config.sources[key]}: {key} = {getattr(config, key)!r}, but {path} has {known!r}; leave "
                 f"{key} out, the checkpoint tells it, or end the command with --{key}={known}")
        setattr(config, key, known)


# ------------------------------------------------------------------------------------------------------------
# for the check() of a config: each yields one line for each value that makes no sense
# ------------------------------------------------------------------------------------------------------------

def check_choice(config, key, choices):
    value = getattr(config, key)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        yield f"{key} = {value!r}: choose one of {', '.join(map(repr, choices))}{hint}"


def check_joined(config, key, choices):
    """A knob that is one of the choices, or some of them joined by +."""
    if not set(getattr(config, key).split("+")) <= {*choices}:
        yield f"{key} = {getattr(config, key)!r}: choose among {', '.join(choices)}, or join some by +"


def check_positive(config, *keys):
    yield from (f"{key} = {getattr(config, key)}: must be greater than 0" for key in keys
                if getattr(config, key) <= 0)


def check_not_negative(config, *keys):
    yield from (f"{key} = {getattr(config, key)}: must not be negative" for key in keys
                if getattr(config, key) < 0)


def check_fraction(config, *keys):
    yield from (f"{key} = {getattr(config, key)}: must lie between 0 and 1" for key in keys
                if not 0 < getattr(config, key) < 1)


def check_device(config):
    yield from check_choice(config, "device", ("auto", "cuda", "mps", "cpu"))
    yield from check_choice(config, "dtype", ("auto", "float32", "bfloat16", "float16"))


def check_writable(path):
    """Can a file of this name be written? Better known before the work than after it."""
    folder = Path(path).parent
    if Path(path).is_dir():
        yield f"{path}: is a folder, a file is needed"
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        yield f"{path}: {folder} is no folder to write in; make it (mkdir -p {folder}) or choose another"
