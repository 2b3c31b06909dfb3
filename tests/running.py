"""What several test files use: calls of scripts in this process, checks of what they write."""

import csv
import importlib
import io
import os
import shlex
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

from harness.script import run_script

# ------------------------------------------------------------------------- calling a script


def call(line, *more):
    """Runs "train.py --steps 3" or "study.ablation losses" in this process.

    Returns its exit code, stdout and stderr.
    """
    words = [*shlex.split(line), *map(str, more)]
    name = words[0].removesuffix(".py")
    script = importlib.import_module(name)
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [name.replace(".", "/") + ".py", *words[1:]]
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
    lines = [text for text in ended.err.splitlines() if text.strip() and not (
        "%|" in text or text.endswith(("/s]", "s/ images]")))]
    assert ended.code == 2, ended.out + ended.err
    assert "Traceback" not in ended.err
    assert len(lines) == 1, ended.err
    script = line.split()[0].removesuffix(".py").split(".")[-1]
    assert lines[0].startswith(f"{script}.py: "), ended.err
    for word in named:
        assert str(word) in lines[0], f"{word!r} is not in: {lines[0]}"


# ------------------------------------------------------------------------ what a run leaves


def read(path):
    """The content of a checkpoint."""
    return torch.load(path, weights_only=True)


def rows(path):
    """The rows of a log, as dictionaries of text."""
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def files(folder="."):
    """Every file below a folder with its bytes and time, to see that nothing was touched.

    The locks of runs are left out.
    """
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns)
            for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != ".lock"}


def same(a, b):
    """Whether two nested states hold the same values, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def is_picture(path):
    """Whether it is a picture that can be read, of some size, and not blank."""
    pixels = plt.imread(path)
    return min(pixels.shape[:2]) > 50 and pixels[..., :3].std() > 0.01


# ------------------------------------------------------------------------- input for a test


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def half(path):
    """Cuts a file short."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


class Mischief:
    """A pickled object whose reading would run code: it makes the folder `mischief`."""

    def __reduce__(self):
        return os.mkdir, ("mischief",)


def copy_faces(faces_dir, n, folder):
    """Copies the first n faces into a new folder."""
    Path(folder).mkdir()
    for path in sorted(faces_dir.glob("*.jpg"))[:n]:
        shutil.copy(path, folder)
