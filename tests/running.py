"""Calls of the scripts in this process, and what they leave behind, read for the tests."""

import csv
import importlib
import io
import shlex
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config import run_script


def call(line, *more):
    """Runs "train.py --steps 3" in this process; returns its exit code, stdout and stderr."""
    words = [*shlex.split(line), *map(str, more)]
    script = importlib.import_module(Path(words[0]).stem)
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = words
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            run_script(lambda: script.main(words[1:]))
    finally:
        sys.argv = before
    return SimpleNamespace(code=stop.value.code or 0, out=out.getvalue(), err=err.getvalue())


def works(line, *more):
    """Calls a script that must succeed; returns what it printed."""
    ended = call(line, *more)
    assert ended.code == 0, ended.err
    return ended.out


def refused(line, *named):
    """Calls a script that must stop with code 2 and one sentence, which must hold all of `named`.

    A progress bar may stand before the sentence.
    """
    ended = call(line)
    lines = [text for text in ended.err.splitlines() if text.strip() and "%|" not in text]
    assert ended.code == 2, ended.out + ended.err
    assert "Traceback" not in ended.err
    assert len(lines) == 1, ended.err
    assert lines[0].startswith(line.split()[0] + ": "), ended.err
    for word in named:
        assert str(word) in lines[0], f"{word!r} is not in: {lines[0]}"


def read(path):
    """The content of a checkpoint."""
    return torch.load(path, weights_only=True)


def rows(path):
    """The rows of a log, as dictionaries of text."""
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def copy_faces(faces_dir, n, folder):
    """Copies the first n faces into a new folder."""
    Path(folder).mkdir()
    for path in sorted(faces_dir.glob("*.jpg"))[:n]:
        shutil.copy(path, folder)
