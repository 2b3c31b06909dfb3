"""The command line: one flag per setting, and every error as one sentence."""

import argparse
import difflib
import os
import re
import signal
import sys
import typing
from dataclasses import fields
from pathlib import Path
from typing import Literal

import torch

from config import (LATENTS, LFM_TEACHER, MODELS, OFFICIAL, PRESETS, Config, field_comments, flag,
                    make_config, words)
from harness import UserError, first_line
from harness.machine import FIRST, RANK, WORLD, leave, on_signal

ABOUT_CELEBAHQ = (
    f"celebahq: LFM published the paper's teacher (153 M parameters): {LFM_TEACHER}. "
    "--teacher-checkpoint model_480.pth distils from it without pretraining. The students of "
    "--model small and tiny need a teacher of their size, which train.py pretrains.")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, with the nearest flag if one was mistyped."""

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            known = [o[2:] for action in self._actions for o in action.option_strings]
            near = difflib.get_close_matches(unknown[1][2:], known, n=1)
            message = f"there is no flag {unknown[1]}"
            message += f"; did you mean --{near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the flags)\n")


def make_parser(doc, **more):
    """A Parser that describes a script by the first line of its docstring, if Python kept it."""
    description = (doc or "").strip().splitlines()[:1]
    return Parser(description="".join(description), allow_abbrev=False, **more)


def add_field_flags(parser, names=None):
    """Adds one flag per field of Config (or of `names`), absent from the result if not given."""
    comments, sections = field_comments()
    hints, groups = typing.get_type_hints(Config), {}
    for f in fields(Config):
        if names is not None and f.name not in names or f.name == "num_classes":
            continue                               # num_classes follows from the data
        title = sections[f.name]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, options = hints[f.name], {}
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
            options["nargs"] = "+" if f.name == "losses" else "*"
        if typing.get_origin(kind) is Literal:
            options["choices"], kind = tuple(filter(None, typing.get_args(kind))), str
        text = (comments[f.name] + defaults(f)).replace("%", "%%")
        if kind is bool:
            options["action"] = "store_true"
        else:
            options["type"] = kind
            options["metavar"] = None if "choices" in options else kind.__name__.upper()
        groups[title].add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **options)


def defaults(f):
    """A field's default as help text, with those of the presets that have another one."""
    presets = {name: PRESETS[name] for name in ("8gaussians", "mnist", "captions", "cifar10")}
    presets["latents"], others = LATENTS | MODELS["paper"] | OFFICIAL, {}
    for name, preset in presets.items():
        if preset.get(f.name, f.default) != f.default:
            others.setdefault(words(preset[f.name]), []).append(name)
    texts = [words(f.default), *(f"{', '.join(names)}: {value}" for value, names in others.items())]
    return f" [{'; '.join(texts)}]" if texts[0] not in ("", "False") or others else ""


def given_flags(args, names=None):
    """The settings that were given on the command line, as a dict; lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(args).items() if names is None or name in names}


def parse_config(doc, argv=None, **more):
    """Command line -> (Config, what was given on it); `more` are {flag: help} beside the fields."""
    parser = make_parser(doc, epilog=ABOUT_CELEBAHQ, usage="%(prog)s [flags]")
    for name, text in more.items():
        parser.add_argument(flag(name), action="store_true", default=argparse.SUPPRESS, help=text)
    add_field_flags(parser)
    given = given_flags(parser.parse_args(argv))
    return make_config(**{n: v for n, v in given.items() if n not in more}), given


def command(name):
    """The command for another script in the folder of the one that runs."""
    return f"python {Path(sys.argv[0]).parent / name}"


def run_script(main):
    """Runs a script's main(). An error that the user can fix is one sentence and exit code 2.

    Ctrl-C is exit code 130.
    """
    script = Path(sys.argv[0]).name
    for name in ("stdout", "stderr"):              # closed by the caller; tqdm needs a stream
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    for name in ("SIGTERM", "SIGHUP"):             # like Ctrl-C: temporary files are removed
        on_signal(name, interrupt)
    try:
        code = main()
        leave()
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt as e:                 # training's own says how to continue
        if FIRST:
            fail(f"\n{script}", str(e) or "interrupted")
        sys.exit(130)
    except BrokenPipeError:                        # the reader of our output left (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as e:
        message = explained(e)
        if message is None:
            raise
        sys.exit(fail(script, message))


def interrupt(number, frame):
    raise KeyboardInterrupt


def explained(e):
    """One sentence on an error that the user can fix; None for any other, a fault of the code."""
    if isinstance(e, UserError):
        return str(e)
    if isinstance(e, UnicodeError):
        return f"a name or text cannot be written in this encoding ({e}); set PYTHONUTF8=1"
    if isinstance(e, OSError):
        return (f"cannot use {e.filename or 'a file'} ({e.strerror or first_line(e)}); check its "
                "folder and permissions, or choose another")
    text = str(e)
    lacking = "not enough memory" in text or "can't allocate memory" in text
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or lacking:
        return ("not enough memory; choose a smaller batch or network. Training has --batch-size, "
                "--grad-accum and --checkpointing, sampling has --batch and --n")
    if "InvalidCxxCompiler" in text or "No working C++ compiler" in text:
        return "--compile needs a C++ compiler such as g++; install one, or leave --compile out"
    return None


def fail(script, message):
    """Prints an error; of several processes, each one names its rank. Returns the exit code."""
    where = "" if FIRST else f" (process {RANK} of {WORLD})"
    try:
        print(f"{script}{where}: {message}", file=sys.stderr, flush=True)
    except (OSError, UnicodeError):                # stderr cannot be written to; the code tells
        pass
    return 2
