"""toy.py against the project: the page computes what the project computes."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

import toy
import train
from config import make_config


class GlobalDraws:
    """The draws of train.py, taken from PyTorch's global generator as toy.py takes them."""

    def normal(self, *shape):
        return torch.randn(*shape)

    def uniform(self, n):
        return torch.rand(n)


@pytest.mark.parametrize("step", [0, 500, 1000])
def test_its_step_computes_what_scflow_step_computes(step):
    torch.manual_seed(0)
    teacher, disc = toy.MLP(32, 2, torch.nn.SiLU()), toy.MLP(18, 1, torch.nn.LeakyReLU(0.2))
    student, target = toy.MLP(32, 2, torch.nn.SiLU()), toy.MLP(32, 2, torch.nn.SiLU())
    z0 = toy.checkerboard(64)

    # plain gradient descent: the change of the weights is the gradient itself
    theirs = train.SimpleNamespace(teacher=deepcopy(teacher), student=deepcopy(student),
                                   target=deepcopy(target), ema=deepcopy(target))
    theirs.disc = deepcopy(disc)
    theirs.disc.forward = lambda z, y=None, plain=theirs.disc.forward: plain(z)
    theirs.opt, theirs.opt_disc = (SGD(n.parameters(), 0.1) for n in (theirs.student, theirs.disc))
    torch.manual_seed(1)
    train.scflow_step(theirs, (z0, None), step, make_config("checkerboard"), GlobalDraws())

    opt, opt_disc = SGD(student.parameters(), 0.1), SGD(disc.parameters(), 0.1)
    torch.manual_seed(1)
    toy.student_loss(teacher, student, target, disc, opt_disc, z0, step).backward()
    opt.step()
    for ours, other in ((student, theirs.student), (disc, theirs.disc)):
        for a, b in zip(ours.parameters(), other.parameters()):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_page_is_short_and_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.main(steps=3)
    assert (tmp_path / "toy.png").stat().st_size > 5000
    assert len(open(toy.__file__).read().splitlines()) <= 100


def test_in_a_notebook():
    """matplotlib refuses the backend that a notebook hands to the processes it starts."""
    subprocess.run([sys.executable, "-c", "import toy"], cwd=Path(toy.__file__).parent, check=True,
                   env=os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
