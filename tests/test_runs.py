"""The scripts as a user meets them: runs, pictures, bad input, interruption, resuming.

Every script is called in this process, with tiny networks and a few steps, so that a whole run
takes a second. Real processes are used only if they are killed, or for their environment.
"""

import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import losses
import sample
import teacher
import train
from config import make_config
from harness import UserError, checkpoint, log, machine, pictures
from harness.script import command
from running import (Mischief, call, copy_faces, files, half, is_picture, read, refused, rows,
                     same, works)
from study import features

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
REPO = Path(__file__).resolve().parent.parent
NETWORK = "--channels 16 --blocks 1 --disc-channels 8"
SIZES = f"{NETWORK} --batch-size 32 --teacher-batch-size 32 --lr-warmup 2 --threads 1"
LOGS = "--log-every 2 --preview-every 6"
TINY = f"{SIZES} {LOGS} --steps 12 --teacher-steps 12 --n-rf 0 --n-gan 0"
IMAGES = ("--dataset mnist --channels 8 --heads 2 --disc-channels 8 --batch-size 8 "
          "--teacher-batch-size 8 --steps 4 --teacher-steps 4 --log-every 2 --preview-every 4 "
          "--lr-warmup 1 --threads 1")


def untimed(path):
    """The rows of a log without the column that no two runs share."""
    return [{k: v for k, v in row.items() if k != "per_second"} for row in rows(path)]


def assert_same_run(a, b):
    """All that two run folders computed is equal, bit for bit."""
    for name, states in (("teacher_resume.pt", ("teacher", "ema", "opt")),
                         ("teacher.pt", ("ema",)),
                         ("student_resume.pt", train.STATES),
                         ("student.pt", ("ema",))):
        one, other = read(Path(a) / name), read(Path(b) / name)
        for key in ("step", "shape", *states):
            assert same(one[key], other[key]), f"{key} differs in {name}"
    for name in ("teacher_log.csv", "log.csv"):
        assert untimed(Path(a) / name) == untimed(Path(b) / name), name


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """One run on points with everything it writes; tests work on copies of it."""
    home, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    os.chdir(home)
    try:
        printed = works(f"train.py --dataset moons {TINY}")
    finally:
        os.chdir(before)
    return SimpleNamespace(folder=home / "runs" / "moons", printed=printed)


@pytest.fixture
def moons(finished_run, tmp_path):
    """A copy of the finished run as runs/moons below the current folder."""
    return Path(shutil.copytree(finished_run.folder, tmp_path / "runs/moons")).relative_to(tmp_path)


# ------------------------------------------------------------------------------- whole runs


def test_points_end_to_end(finished_run, moons):
    for name in ("losses", "samples", "preview_000006", "preview_000012"):
        assert is_picture(moons / f"{name}.png"), name
    assert is_picture(moons / "teacher_losses.png")

    log = rows(moons / "log.csv")
    assert list(log[0]) == ["step", *train.TERMS, "per_second"]
    assert [int(row["step"]) for row in log] == [2, 4, 6, 8, 10, 12]
    assert all(math.isfinite(float(value)) for row in log for value in row.values())
    assert list(rows(moons / "teacher_log.csv")[0]) == ["step", "fm", "grad_norm", "per_second"]

    # the last line names what was written and a next command that works
    last = finished_run.printed.strip().splitlines()[-1]
    for name in ("student.pt", "samples.png", "losses.png"):
        assert str(moons / name) in last
    command = last.split("next: python ")[1]
    wrote = re.search(r"wrote (\S+\.png)", works(command))[1]
    assert is_picture(wrote)


def test_the_next_command_works_from_any_folder(monkeypatch):
    for folder in ("", "DIR/"):
        monkeypatch.setattr(sys, "argv", [f"{folder}train.py"])
        assert command("sample.py") == f"python {folder}sample.py"


def test_the_student_file_alone_can_be_sampled(moons):
    shutil.copy(moons / "student.pt", "mine.pt")
    shutil.rmtree("runs")
    works("sample.py --checkpoint mine.pt --nfe 2 --n 50 --out mine.png")
    assert is_picture("mine.png")


def test_mnist_end_to_end(mnist_dir):
    works(f"train.py {IMAGES} --data-dir {mnist_dir}")
    folder = Path("runs/mnist")
    saved = read(folder / "student.pt")
    assert saved["shape"] == (1, 28, 28) and saved["config"]["patch_size"] == 2
    assert is_picture(folder / "samples.png") and is_picture(folder / "preview_000004.png")
    assert len(rows(folder / "log.csv")) == 2

    # raw samples of images are uint8 in ADM's order; a strip is a picture
    works("sample.py --nfe 2 --n 5 --npz raw.npz --threads 1")
    raw = np.load("raw.npz")["arr_0"]
    assert raw.shape == (5, 28, 28, 1) and raw.dtype == np.uint8
    works("sample.py --nfe 1 2 --n 3 --out strip.png --threads 1")
    assert is_picture("strip.png")
    works("sample.py --nfe 2 --trajectory --out path.png --threads 1")
    assert is_picture("path.png")

    # the noise of a sample does not depend on how many are drawn at once
    works("sample.py --nfe 2 --n 5 --batch 2 --npz again.npz --threads 1")
    difference = np.load("again.npz")["arr_0"].astype(int) - raw
    assert abs(difference).max() <= 1


def test_mnist_without_a_network(monkeypatch):
    from torchvision import datasets
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "*")
    refused(f"train.py {IMAGES}", "download MNIST", "--data-dir")


def test_mnist_with_a_truncated_file(mnist_dir, tmp_path):
    raw = Path(shutil.copytree(mnist_dir / "MNIST/raw", tmp_path / "cut/MNIST/raw"))
    half(raw / "train-images-idx3-ubyte")
    refused(f"train.py {IMAGES} --data-dir cut", "read MNIST", "cut/MNIST/raw")


# -------------------------------------------------------------------------------- bad input


def changed(path, change, new):
    """Writes a copy of a checkpoint to `new` after change(content)."""
    content = read(path)
    change(content)
    torch.save(content, new)


def prepare_bad_files(moons):
    Path("bad").mkdir()
    shutil.copy(moons / "student.pt", "bad/cut.pt")
    half(Path("bad/cut.pt"))
    torch.save(torch.nn.Linear(2, 2).state_dict(), "bad/plain.pt")
    torch.save(Mischief(), "bad/mischief.pt")
    Path("bad/text.pt").write_text("name,value\nthis is no checkpoint\n")
    Path("bad/text.npz").write_text("no samples")
    Path("bad/empty.pt").touch()


MOONS = f"--dataset moons {TINY}"
LONG = "a" * 300
BAD = [
    # flags and their values
    ("train.py --tpye 3", "--tpye", "--help"),
    ("train.py --t-trunk 0.3", "--t-trunk", "did you mean --t-trunc?"),
    ("sample.py --nfes 3", "--nfes", "did you mean --nfe?"),
    ("train.py --dataset circles", "circles", "8gaussians"),
    ("train.py --steps many", "--steps", "many"),
    ("train.py --steps 0", "--steps 0", "at least 1"),
    ("train.py --t-trunc 2", "--t-trunc 2", "between 0 and 1"),
    ("train.py --mu 1", "--mu 1", "below 1"),
    ("train.py --lr nan", "--lr nan"),
    ("train.py --lr inf", "--lr inf", "larger than 0, and finite"),
    ("train.py --dataset moons --preset official", "moons has neither --model nor --preset"),
    ("train.py --l-gan inf", "--l-gan inf", "finite"),
    (f"train.py --seed {2**31}", f"--seed {2**31}", "2^31"),
    (f"train.py --batch-size {10**24}", "--batch-size 1", "2^31"),
    ("train.py --threads 100000", "--threads 100000", "1024"),
    ("train.py --download", "--download", "celebahq"),
    ("train.py --num-classes 10", "--num-classes", "no flag"),
    ("train.py --dataset folder --preset official --model tiny", "--preset official", "tiny"),
    ("train.py --dataset celebahq --preset paper --model small", "--preset paper", "small"),
    ("train.py --plan", "--plan", "celebahq and folder"),
    ("teacher.py --plan", "no flag --plan"),
    ("sample.py --nfe 0", "--nfe 0"),
    ("sample.py --n 0", "--n 0"),
    (f"sample.py --n {10**13} --nfe 1", "--n 1", "2^31"),
    ("sample.py --n 200000", "--n 200000", "--npz"),
    (f"sample.py --seed {2**31}", "--seed", "2^31"),
    ("sample.py --npz raw.npz --nfe 1 2", "--npz", "one --nfe"),
    ("sample.py --npz raw.npz --nfe 1 --trajectory", "--npz", "--trajectory"),
    # --npz replaces nothing but another .npz
    *((f"sample.py --n 9 --npz {name}", ".npz") for name in
      ("runs/moons/student.pt", "runs/moons/teacher_log.csv", "bad/text.npz", ".", "/dev/null")),
    ("sample.py --npz ''", "--npz"),
    ("sample.py --checkpoint ''", "--checkpoint"),
    ("evaluate.py --nfe 0", "--nfe"),
    ("evaluate.py --n 9", "--n 9"),
    # checkpoints
    ("sample.py --checkpoint no.pt", "no.pt"),
    ("sample.py --checkpoint .", "no checkpoint ."),
    ("sample.py --checkpoint runs", "runs"),
    *((f"sample.py --checkpoint bad/{name}.pt", f"bad/{name}.pt") for name in
      ("cut", "plain", "text", "empty", "mischief")),
    ("sample.py --checkpoint runs/moons/log.csv", "log.csv"),
    ("sample.py --checkpoint runs/moons/student.pt --dataset spirals", "moons", "spirals"),
    ("sample.py --dataset spirals", "no student of spirals", "train.py --dataset spirals"),
    ("sample.py --checkpoint bad/cut.pt --teacher", "bad/teacher.pt"),
    ("train.py --dataset moons --out new --teacher-checkpoint no.pt", "no.pt"),
    ("train.py --dataset folder --model tiny --teacher-checkpoint runs/moons/teacher.pt",
     "--channels 40 (not 16)", "leave --model out"),
    ("train.py --dataset moons --out new --teacher-checkpoint runs/moons/student.pt",
     "student.pt", "teacher"),
    (f"train.py {MOONS} --out new --channels 24 --teacher-checkpoint runs/moons/teacher.pt",
     "--channels 24 (not 16)"),
    (f"train.py --dataset spirals {TINY} --teacher-checkpoint runs/moons/teacher.pt",
     "moons", "spirals"),
    # folders
    ("train.py --dataset mnist --data-dir nowhere", "nowhere", "--data-dir"),
    (f"train.py {MOONS} --out runs/moons/log.csv/new", "runs/moons/log.csv/new", "--out"),
    (f"train.py {MOONS} --out runs/moons/log.csv", "runs/moons/log.csv", "--out"),
    ("sample.py --n 9 --out runs", "runs"),
    ("sample.py --n 9 --npz runs/moons/log.csv/new.npz", "runs/moons/log.csv"),
    (f"train.py {MOONS} --out {LONG}", "aaaa", "File name too long"),
    (f"sample.py --checkpoint {LONG}", "aaaa", "File name too long"),
    (f"sample.py --n 9 --npz {LONG}.npz", "aaaa", "File name too long"),
    (f"train.py --dataset mnist --data-dir {LONG}", "aaaa"),
    # resuming
    ("train.py --dataset spirals --resume", "nothing to resume", "runs/spirals"),
    (f"train.py {MOONS} --lr 0.5 --resume", "--lr 0.5 (not 0.002)"),
    (f"train.py {MOONS} --resume --overwrite", "--resume", "--overwrite"),
    (f"train.py {MOONS} --resume --teacher-checkpoint runs/moons/teacher.pt",
     "--teacher-checkpoint"),
    ("train.py --dataset moons --resume --steps 5", "step 12 already", "--steps 12"),
    ("train.py --dataset spirals --out runs/moons --resume", "--dataset spirals"),
    # what is not there yet
    ("train.py --dataset celebahq", "data/celebahq", "--download", "--data-dir"),
    ("train.py --dataset folder", "--dataset folder", "--data-dir"),
]


@pytest.mark.parametrize("line, named", [(b[0], b[1:]) for b in BAD],
                         ids=[b[0].replace(TINY, "...") for b in BAD])
def test_bad_input(line, named, moons, monkeypatch):
    monkeypatch.setattr(log.Log, "add", stop)      # or a command that is not refused would train
    prepare_bad_files(moons)
    before = files()
    refused(line, *named)
    after = files()
    assert after == before, sorted(after.keys() ^ before.keys())
    assert not Path("mischief").exists()


@pytest.mark.parametrize("flags, named", [
    ("--channels 33", "--channels 33"), ("--mult 0", "--mult"), ("--mult", "--mult"),
    ("--heads 3", "--heads 3"), ("--patch-size 3", "--patch-size"), ("--mult 1 1 1 1", "--mult"),
    ("--batch-size 51", "50 samples"), ("--teacher-batch-size 64", "50 samples")])
def test_networks_and_batches_that_do_not_fit_the_data(flags, named, monkeypatch):
    black = torch.zeros(50, 1, 28, 28, dtype=torch.uint8), torch.zeros(50, dtype=torch.long)
    monkeypatch.setattr(data, "mnist", lambda *args: black)
    refused(f"train.py {IMAGES} {flags}", named)
    assert not files()


def test_no_student_at_all(monkeypatch):
    monkeypatch.setattr("harness.saved.SHIPPED", Path("nowhere"))
    refused("sample.py", "no student", "train.py")
    refused("evaluate.py", "no student", "train.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these devices exist here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu", "privateuseone"])
def test_a_device_that_is_not_there(device, moons):
    before = files()
    refused(f"train.py {MOONS} --out new --device {device}", repr(device), "--device cpu")
    refused(f"sample.py --device {device}", repr(device))
    assert files() == before


# ------------------------------------------------------------------- files that were changed


def put(*keys):
    """A change of a checkpoint: put("config", "lr", -1) sets content["config"]["lr"] to -1."""
    *path, last, value = keys

    def change(content):
        for key in path:
            content = content[key]
        content[last] = value
    return change


NAN, W = float("nan"), "last.weight"
FIELDS = {name: put(*keys) for name, keys in {
    "an old version": ("scflow", 0), "version x": ("scflow", "x"), "no version": ("scflow", None),
    "kind 7": ("kind", 7), "no kind": ("kind", None), "step 1.5": ("step", 1.5),
    "shape ()": ("shape", ()), "shape (2, 2)": ("shape", (2, 2)), "shape -2": ("shape", (-2,)),
    "shape 10^9": ("shape", (10**9,)), "no shape": ("shape", None), "no config": ("config", None),
    "channels -1": ("config", "channels", -1), "channels a": ("config", "channels", "a"),
    "no channels": ("config", "channels", None), "blocks x": ("config", "blocks", "x"),
    "time_scale x": ("config", "time_scale", "x"), "time_scale nan": ("config", "time_scale", NAN),
    "classes -2": ("config", "num_classes", -2), "losses ()": ("config", "losses", ()),
    "dataset nowhere": ("config", "dataset", "nowhere"), "dataset 7": ("config", "dataset", 7),
    "no ema": ("ema", None), "ema a list": ("ema", []), "ema of text": ("ema", W, "x"),
    "ema of another name": ("ema", "more", torch.zeros(3)),
    "ema of another shape": ("ema", W, torch.zeros(3)),
    "ema sparse": ("ema", W, torch.zeros(2, 16).to_sparse()),
    "ema of integers": ("ema", W, torch.zeros(2, 16, dtype=torch.long)),
    "ema complex": ("ema", W, torch.zeros(2, 16, dtype=torch.complex64)),
    "ema on no device": ("ema", W, torch.zeros(2, 16, device="meta")),
    "ema of nan": ("ema", W, torch.full((2, 16), NAN)),
}.items()} | {"nothing else": lambda content: [content.pop(key) for key in [*content][1:]]}


@pytest.mark.parametrize("name", FIELDS)
def test_a_checkpoint_with_a_wrong_field(name, moons, no_pictures):
    changed(moons / "student.pt", FIELDS[name], "bad.pt")
    refused("sample.py --checkpoint bad.pt --n 9", "bad.pt")
    changed(moons / "teacher.pt", FIELDS[name], "bad.pt")
    refused(f"train.py {MOONS} --out new --teacher-checkpoint bad.pt", "bad.pt")
    assert not list(Path("new").glob("*.pt"))


STATES = {name: put(*keys) for name, keys in {
    "no opt": ("opt", None), "no disc": ("disc", None), "step 5": ("step", "5"),
    "step -3": ("step", -3), "seconds x": ("seconds", "x"), "lr -1": ("config", "lr", -1),
    "log_every 0": ("config", "log_every", 0), "metric x": ("config", "metric", "x"),
    "weights of another shape": ("student", W, torch.zeros(3)),
    "weights of nan": ("target", W, torch.full((2, 16), NAN)),
    "moments of another shape": ("opt", "state", 0, "exp_avg", torch.zeros(3)),
    "moments of text": ("opt", "state", 0, "exp_avg", "x"),
    "no moment": ("opt", "state", 0, {}), "a moment too many": ("opt", "state", 99, {"step": 1}),
    "opt of nothing": ("opt", "state", None),
}.items()}


@pytest.mark.parametrize("name", STATES)
def test_a_resume_state_with_a_wrong_part(name, moons, no_pictures):
    state = moons / "student_resume.pt"
    changed(state, put("step", 6), state)
    changed(state, STATES[name], state)
    before = files()
    refused("train.py --dataset moons --resume", "student_resume.pt")
    assert files() == before


def test_a_damaged_teacher_is_not_taken(moons, no_pictures):
    changed(moons / "teacher.pt", FIELDS["ema of another shape"], "edited.pt")
    before = files()
    refused(f"train.py {MOONS} --out runs/moons --overwrite --teacher-checkpoint edited.pt",
            "edited.pt", W)
    assert files() == before


# ---------------------------------------------------------------- what stands in the folder


def test_a_finished_student_of_the_same_settings(moons):
    """Neither the logs nor the machine make it another run."""
    before = files()
    others = "--log-every 3 --save-every 7 --preview-every 5 --data-dir . --precision fp32"
    for more in ("", "--resume", others):
        assert "already finished" in works(f"train.py {MOONS} {more}")
    assert files() == before


def test_a_finished_student_of_other_settings(moons, no_pictures):
    before = files()
    refused(f"train.py {MOONS} --lr 0.003", "student.pt", "--lr 0.003 (not 0.002)",
            "--overwrite", "--out")
    assert files() == before

    # --overwrite replaces the student; the teacher, being the same, stays
    assert "wrote" in works(f"train.py {MOONS} --lr 0.002 --overwrite")
    assert read(moons / "student.pt")["config"]["lr"] == 0.002
    key = str(moons / "teacher.pt")
    assert files()[key] == before[key]


def test_an_unfinished_student(moons, no_pictures):
    (moons / "student.pt").unlink()
    before = files()
    refused(f"train.py {MOONS}", "unfinished", "--resume", "--overwrite")
    assert files() == before


def test_a_finished_student_without_a_state_is_not_replaced_by_resume(moons):
    """The state is the large file, so it is the one that users delete."""
    (moons / "student_resume.pt").unlink()
    before = files()
    refused("train.py --dataset moons --resume --steps 2", "student.pt", "finished", "--overwrite")
    assert files() == before


def test_pictures_that_a_kill_prevented_are_drawn_by_the_next_run(moons, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "losses", stop)
        refused("train.py --dataset moons --resume --steps 14", "stopped")
    assert read(moons / "student.pt")["step"] == 14
    assert not (moons / "losses.png").exists()     # nor is that of the older student
    assert "losses.png" in works("train.py --dataset moons --resume --steps 14")
    assert is_picture(moons / "losses.png") and is_picture(moons / "samples.png")


def test_other_data_in_the_same_format_never_reuse_a_teacher(monkeypatch, no_pictures):
    """Fashion-MNIST has MNIST's format; here it is the same digits, inverted."""
    digits = torch.randint(0, 256, (50, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(data, "mnist", lambda folder, train=True: (
        (255 - digits if folder == "inverted" else digits).byte(), torch.zeros(50)))
    works(f"train.py {IMAGES}")
    before = files("runs/mnist")

    # the same data in another folder are the same run
    assert "already finished" in works(f"train.py {IMAGES} --data-dir moved")
    refused(f"train.py {IMAGES} --data-dir inverted", "student.pt", "other data", "--out")
    refused(f"train.py {IMAGES} --data-dir inverted --resume --steps 6", "other data")
    refused(f"teacher.py {IMAGES} --data-dir inverted", "teacher.pt", "other data")
    assert files("runs/mnist") == before
    works(f"train.py {IMAGES} --data-dir inverted --out new")
    assert not same(read("new/teacher.pt")["ema"], read("runs/mnist/teacher.pt")["ema"])


def test_a_locked_folder(moons, no_pictures):
    """A lock is held while its file is open, so one that a killed process left does not count."""
    assert (moons / ".lock").exists()
    with checkpoint.locked(moons / ".lock", "is training in it"):
        for line in (f"train.py {MOONS}", "train.py --dataset moons --resume --steps 20",
                     f"teacher.py {MOONS}"):
            refused(line, "another process is training in runs/moons", str(os.getpid()))
    works("train.py --dataset moons --resume --steps 13")


def test_a_matching_teacher_is_reused(moons, monkeypatch, no_pictures):
    monkeypatch.setattr(teacher, "train_teacher", stop)
    works(f"train.py {MOONS} --lr 0.002 --out elsewhere")
    assert same(read("elsewhere/teacher.pt"), read(moons / "teacher.pt"))
    assert read("elsewhere/student.pt")["config"]["lr"] == 0.002
    assert "teacher.pt" in works(f"teacher.py {MOONS}")


def test_a_teacher_of_other_settings(moons, no_pictures):
    for name in ("student.pt", "student_resume.pt"):
        (moons / name).unlink()
    before = files()
    refused(f"train.py {MOONS} --teacher-lr 0.01", "teacher.pt", "--teacher-lr 0.01",
            "--teacher-checkpoint", "--overwrite", "--out")
    refused(f"teacher.py {MOONS} --teacher-lr 0.01", "teacher.pt", "--teacher-lr 0.01")
    assert files() == before

    # elsewhere it is no obstacle: another is trained there
    works(f"train.py {MOONS} --teacher-lr 0.01 --out elsewhere")
    assert read("elsewhere/teacher.pt")["config"]["teacher_lr"] == 0.01
    key = str(moons / "teacher.pt")
    assert files()[key] == before[key]


def test_distilling_from_a_named_teacher(moons, no_pictures):
    """The network's shape comes from the file, whatever the flags' defaults are."""
    works("train.py --dataset moons --out new --steps 3 --batch-size 16 --disc-channels 8",
          "--teacher-checkpoint", moons / "teacher.pt")
    assert same(read("new/teacher.pt"), read(moons / "teacher.pt"))
    assert read("new/student.pt")["config"]["channels"] == 16


# ----------------------------------------------------------------- losses that are not finite


def nan_from(function, step):
    """A loss that is called once an iteration and turns into nan in iteration `step`."""
    calls = iter(range(1, 1000))
    return lambda *args: function(*args) * (float("nan") if next(calls) >= step else 1.0)


@pytest.mark.parametrize("name, term, every", [
    ("reflow_loss", "rf", 2), ("discriminator_loss", "disc", 2), ("generator_loss", "gan", 2),
    ("consistency_loss", "cd", 2), ("consistency_loss", "cd", 50)])
def test_a_loss_that_is_not_finite(name, term, every, moons, monkeypatch, no_pictures):
    monkeypatch.setattr(train, name, nan_from(getattr(losses, name), 8))
    refused(f"train.py {MOONS} --out new --log-every {every} --save-every 3",
            f"{term} became nan at step 8")

    # what was saved before the step is whole
    state = read("new/student_resume.pt")
    assert state["step"] == 6
    assert all(v.isfinite().all() for net in ("student", "target", "ema", "disc")
               for v in state[net].values())
    assert not Path("new/student.pt").exists()
    monkeypatch.setattr(train, name, getattr(losses, name))
    works("train.py --dataset moons --out new --resume")


def test_a_teachers_loss_that_is_not_finite(monkeypatch, no_pictures):
    monkeypatch.setattr(teacher, "flow_matching_loss", nan_from(losses.flow_matching_loss, 8))
    refused(f"train.py {MOONS} --save-every 3", "fm became nan at step 8")
    state = read("runs/moons/teacher_resume.pt")
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["ema"].values())
    assert not Path("runs/moons/teacher.pt").exists()


def test_weights_that_are_not_finite_are_never_saved(monkeypatch, no_pictures):
    """Also if every loss of the iteration was finite, as when D's gradient is infinite."""
    def step(net, batch, number, *others):
        terms = train.scflow_step(net, batch, number, *others)
        if number == 7:
            next(net.disc.parameters()).data.fill_(math.inf)
        return terms

    monkeypatch.setitem(train.STEPS, "scflow", (step, train.TERMS))
    refused(f"train.py {MOONS} --save-every 4", "net.disc", "step 8", "--precision fp32")
    state = read("runs/moons/student_resume.pt")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["disc"].values())


# --------------------------------------------------------------------- stopping and resuming


def stop(*args, **more):
    raise UserError("stopped")


def interrupted(line, stage, step, monkeypatch, times=1, number=signal.SIGINT):
    """Runs a script that gets Ctrl-C in iteration `step` of a stage; returns its last line."""
    add, name = log.Log.add, {"teacher": "teacher_log.csv", "student": "log.csv"}[stage]

    def ctrl_c(self, **terms):
        add(self, **terms)
        if self.path.name == name and self.step == step:
            for _ in range(times):
                signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "add", ctrl_c)
        ended = call(line)
    assert ended.code == 130 and "Traceback" not in ended.err, ended.err
    return ended.err.strip().splitlines()[-1]


@pytest.mark.parametrize("script, stage, same_command", [
    ("train.py", "teacher", True), ("train.py", "student", True), ("train.py", "student", False),
    ("teacher.py", "teacher", True)])
def test_resuming_equals_never_having_stopped(script, stage, same_command, finished_run,
                                              monkeypatch, no_pictures):
    message = interrupted(f"{script} {MOONS}", stage, 6, monkeypatch)
    assert "step 6 of 12" in message and "--resume" in message
    assert not Path(f"runs/moons/{stage}.pt").exists()

    # both ways to go on that the message names
    flags = re.search(r"\((--.+)\)", message)[1]
    works(f"{script} {MOONS} --resume" if same_command else f"{script} {flags}")
    works(f"train.py {MOONS}")
    assert_same_run("runs/moons", finished_run.folder)


def flip(path):
    """Changes bytes in the middle of a file; only its checksums tell."""
    content = bytearray(path.read_bytes())
    middle = slice(len(content) * 3 // 5, len(content) * 7 // 10)
    content[middle] = bytes(byte ^ 64 for byte in content[middle])
    path.write_bytes(content)


@pytest.mark.parametrize("stage, damage", [
    ("student", half), ("student", flip), ("student", Path.unlink), ("teacher", half)])
def test_the_last_but_one_state_is_kept_and_taken_if_the_last_is_not_whole(
        stage, damage, finished_run, monkeypatch, no_pictures):
    interrupted(f"train.py {MOONS} --save-every 4", stage, 10, monkeypatch)
    newest, older = (Path(f"runs/moons/{stage}_resume{old}.pt") for old in ("", "_old"))
    assert read(newest)["step"] == 10 and read(older)["step"] == 8
    damage(newest)
    printed = works(f"train.py {MOONS} --resume")
    assert f"{newest} is missing or damaged; continuing from {older}, of step 8" in printed
    assert_same_run("runs/moons", finished_run.folder)
    assert not list(Path("runs/moons").glob("*_old.pt"))       # the run is finished


def test_of_two_states_that_are_damaged_none_is_touched(monkeypatch, no_pictures):
    interrupted(f"train.py {MOONS} --save-every 4", "student", 10, monkeypatch)
    for state in Path("runs/moons").glob("student_resume*.pt"):
        half(state)
    before = files()
    refused("train.py --dataset moons --resume", "student_resume_old.pt", "damaged")
    assert files() == before


def test_a_resumed_run_does_not_lose_its_last_but_one_state(moons, monkeypatch, no_pictures):
    """The state that is saved again at the start does not count as another one."""
    line = f"train.py {MOONS} --out new --save-every 4"
    interrupted(line, "student", 10, monkeypatch)
    monkeypatch.setitem(train.STEPS, "scflow", failing(UserError("stopped")))
    refused(f"{line} --resume", "stopped")
    assert [read(f"new/student_resume{old}.pt")["step"] for old in ("", "_old")] == [10, 8]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_save_like_ctrl_c(name, monkeypatch, no_pictures):
    """A batch system sends SIGTERM, a closed connection SIGHUP."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)             # nohup, if it started the tests
    try:
        assert "step 7 of 12" in interrupted(f"train.py {MOONS}", "student", 7, monkeypatch, 1,
                                             number)
    finally:
        signal.signal(number, before)
    assert read("runs/moons/student_resume.pt")["step"] == 7


def few(cfg, shape, device, n=None, *others, prepare=evaluate.prepare, **more):
    """evaluate.prepare with 500 samples: 50,000 points would take long."""
    return prepare(cfg, shape, device, 500, *others, **more)


def test_nohup_keeps_a_run_alive(monkeypatch, no_pictures):
    def hang_up(self, add=log.Log.add, **terms):
        add(self, **terms)
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(log.Log, "add", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)      # as nohup does
    try:
        works(f"train.py {MOONS}")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read("runs/moons/student.pt")["step"] == 12


def test_a_run_in_the_background_saves_at_kill_int(monkeypatch, no_pictures):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)      # as a shell script does, after &
    try:
        assert "step 7 of 12" in interrupted(f"train.py {MOONS}", "student", 7, monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_damaged_teacher_stops_only_the_runs_that_need_it(moons, no_pictures):
    (moons / "teacher.pt").write_bytes(b"damaged")
    works(f"train.py {MOONS} --seed 5 --out other")            # it was a candidate
    refused(f"teacher.py {MOONS}", "teacher.pt")
    works(f"train.py {MOONS} --overwrite")
    assert read(moons / "teacher.pt")["step"] == 12


def test_the_next_command_of_a_teacher_distils_it(no_pictures):
    printed = works(f"teacher.py {MOONS} --teacher-lr 0.002 --out phi")
    assert "next: python train.py with the same flags distils it" in printed
    works(f"train.py {MOONS} --teacher-lr 0.002 --out phi")
    printed = works(f"train.py {MOONS} --method fgm --out fgm")
    assert printed.rstrip().endswith("--checkpoint fgm/student.pt --nfe 1")


def test_fgm_is_shown_and_measured_at_one_call(monkeypatch):
    shown = {}
    monkeypatch.setattr(evaluate, "prepare", few)
    monkeypatch.setattr(sample, "strips", lambda path, networks, shape, nfes, **more: shown.update(
        {Path(path).name: [some or nfes for _, _, some in networks]}))
    monkeypatch.setattr(pictures, "losses", lambda *args: None)
    works(f"train.py {MOONS} --method fgm --eval-every 12 --preview-every 12 --out fgm")
    assert list(rows(Path("fgm/quality.csv"))[0]) == ["step", "distance at 1 NFE"]
    assert shown["preview_000012.png"] == [(1,)]
    assert shown["samples.png"] == [(1, 2, 4, 8, 16), (1,)]
    for more in ("", "--nfe 1 4", "--gif --nfe 1", "--trajectory --nfe 10"):
        refused(f"sample.py --checkpoint fgm/student.pt {more}", "one network call (fgm)",
                "--nfe 1")
    works("sample.py --checkpoint fgm/student.pt --nfe 1 --n 3 --npz one.npz")
    works("sample.py --checkpoint fgm/student.pt --nfe 2 --n 3 --npz two.npz --teacher")


def test_a_run_in_a_folder_named_reflow_is_found(no_pictures):
    works(f"train.py {MOONS} --method reflow --pairs 40 --pair-steps 2 --out runs/reflow")
    assert sample.find_student("moons") == Path("runs/reflow/student.pt")


def test_a_second_ctrl_c_stops_at_once(monkeypatch, no_pictures):
    interrupted(f"train.py {MOONS} --save-every 4", "student", 6, monkeypatch, times=2)
    assert read("runs/moons/student_resume.pt")["step"] == 4


def test_an_overwriting_run_can_be_resumed(moons, monkeypatch, no_pictures):
    """It must not be taken for the older run, whose files lie in the same folder."""
    works(f"train.py {MOONS} --seed 5 --out fresh")
    message = interrupted(f"train.py {MOONS} --seed 5 --overwrite", "teacher", 6, monkeypatch)
    assert not (moons / "student.pt").exists() and not (moons / "teacher.pt").exists()
    works("train.py " + re.search(r"\((--.+)\)", message)[1])
    assert_same_run(moons, "fresh")


def test_an_overwriting_run_in_two_stages_can_be_resumed(monkeypatch, no_pictures):
    line = f"train.py {MOONS} --method reflow-distill --pairs 40 --pair-steps 2"
    works(f"{line} --seed 5 --out fresh")
    works(f"{line} --out run")
    message = interrupted(f"{line} --seed 5 --out run --overwrite", "student", 6, monkeypatch)
    assert "the same command continues, without --overwrite" in message
    works(f"{line} --seed 5 --out run")
    assert_same_run("run", "fresh")


def test_a_kill_after_resuming_leaves_the_log(moons, monkeypatch, no_pictures):
    """The rows of before are on the disk as soon as the log is open again."""
    monkeypatch.setitem(train.STEPS, "scflow", failing(UserError("stopped")))
    refused("train.py --dataset moons --resume --steps 18", "stopped")
    assert len(rows(moons / "log.csv")) == 6


def test_more_steps_for_a_finished_run(moons, no_pictures):
    assert "wrote" in works("train.py --dataset moons --resume --steps 18")
    assert read(moons / "student.pt")["step"] == 18
    assert [int(row["step"]) for row in rows(moons / "log.csv")] == [*range(2, 19, 2)]


def test_a_resumed_run_keeps_its_own_teacher(moons, finished_run, monkeypatch, no_pictures):
    """Official code: a resumed run takes its student for the teacher."""
    line = f"train.py {MOONS} --out new --teacher-checkpoint runs/moons/teacher.pt"
    interrupted(line, "student", 6, monkeypatch)
    before = Path("new/teacher.pt").read_bytes()

    # the file that it came from may change or go meanwhile
    works(f"teacher.py {MOONS} --seed 7 --overwrite")
    assert (moons / "teacher.pt").read_bytes() != before
    works("train.py --dataset moons --out new --resume")
    assert Path("new/teacher.pt").read_bytes() == before
    for name in train.STATES:
        assert same(read("new/student_resume.pt")[name],
                    read(finished_run.folder / "student_resume.pt")[name]), name


def test_all_weights_start_from_the_teacher(moons, monkeypatch, no_pictures):
    """Official code: the EMA starts from random weights."""
    monkeypatch.setitem(train.STEPS, "scflow", failing(UserError("stopped")))
    refused(f"train.py {MOONS} --out new", "stopped")
    state, phi = read("new/student_resume.pt"), read(moons / "teacher.pt")["ema"]
    assert state["step"] == 0
    for name in ("student", "target", "ema"):
        assert same(dict(state[name]), dict(phi)), name


def test_previews_show_the_ema(moons, monkeypatch):
    shown = {}

    def record(path, networks, *args, **more):
        weights = [{k: v.clone() for k, v in net.state_dict().items()} for _, net, _ in networks]
        shown[Path(path).name] = weights

    monkeypatch.setattr(sample, "strips", record)
    monkeypatch.setattr(pictures, "losses", lambda *args: None)
    works(f"train.py {MOONS} --out new --overwrite --preview-every 12")
    state = read("new/student_resume.pt")
    (preview,) = shown["preview_000012.png"]
    assert same(preview, dict(state["ema"])) and not same(preview, dict(state["student"]))
    phi, ema = shown["samples.png"]
    assert same(ema, preview) and same(phi, dict(read(moons / "teacher.pt")["ema"]))


def test_averages_are_kept(moons, monkeypatch, no_pictures):
    kept = {}

    def step(net, batch, number, *others):
        terms = train.scflow_step(net, batch, number, *others)
        kept[number + 1] = {k: v.clone() for k, v in net.ema.state_dict().items()}
        return terms

    monkeypatch.setitem(train.STEPS, "scflow", (step, train.TERMS))
    works(f"train.py {MOONS} --overwrite --lr 0.003 --keep-every 5")
    assert {p.name for p in moons.glob("student_[0-9]*.pt")} == {
        "student_000005.pt", "student_000010.pt"}
    content = read(moons / "student_000005.pt")
    assert content["step"] == 5 and same(content["ema"], kept[5])
    works(f"sample.py --checkpoint {moons / 'student_000005.pt'} --n 9 --nfe 1 --npz a.npz")
    works(f"train.py {MOONS} --overwrite")
    assert not list(moons.glob("student_[0-9]*.pt"))   # they were of the older run


def test_the_student_is_measured_while_it_is_trained(moons, finished_run, monkeypatch):
    """As evaluate.py measures it, and without any effect on the run."""
    monkeypatch.setattr(evaluate, "prepare", few)
    monkeypatch.setattr(sample, "strips", lambda *args, **more: None)
    works(f"train.py {MOONS} --overwrite --eval-every 8 --keep-every 8")
    assert same(*(read(run / "student_resume.pt")["student"]
                  for run in (moons, finished_run.folder)))
    Path("alone").mkdir()                              # without the teacher
    shutil.copy(moons / "student_000008.pt", "alone")
    works("evaluate.py --checkpoint alone/student_000008.pt --nfe 1 4 --out measured")
    expected = {row["nfe"]: row["distance"]
                for row in json.loads(Path("measured.json").read_text())["rows"]}
    printed = works("train.py --dataset moons --resume --steps 16")
    first, second = rows(moons / "quality.csv")
    for k in (1, 4):
        assert float(first[f"distance at {k} NFE"]) == pytest.approx(expected[k], rel=1e-4)
    assert (first["step"], second["step"]) == ("8", "16")
    assert f"step 16, distance at 1 NFE {second['distance at 1 NFE']}" in printed
    assert is_picture(moons / "quality.png")
    works(f"train.py {MOONS} --overwrite")
    assert not (moons / "quality.csv").exists()        # it was of the older run


def test_a_measurement_that_is_not_possible_is_refused_before_anything_is_replaced(
        moons, monkeypatch):
    def impossible(*args):
        raise UserError("no features")

    interrupted(f"train.py {MOONS} --seed 5 --out new", "teacher", 6, monkeypatch)
    monkeypatch.setattr("evaluate.Reference", impossible)
    before = files()
    refused(f"train.py {MOONS} --overwrite --lr 0.003 --eval-every 6", "no features")
    refused("train.py --dataset moons --out new --resume --eval-every 6", "no features")
    assert files() == before


def test_loss_curves_are_drawn_while_it_is_trained(monkeypatch):
    """And a picture that cannot be drawn does not stop training."""
    curves = {}
    monkeypatch.setattr(sample, "strips", lambda path, *args, **more: None)
    monkeypatch.setattr(pictures, "losses", lambda path, c, title: curves.setdefault(path.name, c))
    interrupted(f"train.py {MOONS} --save-every 4", "student", 7, monkeypatch)
    assert curves["losses.png"]["cd"][0] == (2, 4, 6)

    def fails(path, *args, **more):
        raise UserError(f"could not write {path}")
    monkeypatch.setattr(sample, "strips", lambda path, *args, **more: (
        fails(path) if "preview" in str(path) else None))
    assert "preview_000012.png; training goes on" in works("train.py --dataset moons --resume")


def test_the_log_for_tensorboard(monkeypatch, no_pictures):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    refused(f"train.py {MOONS} --log tensorboard", "pip install tensorboard")
    assert not Path("runs").exists()
    shown = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.name = f"{folder.relative_to('runs/moons')} from {purge_step}"

        def add_scalar(self, *scalar):
            shown.append((self.name, *scalar))

        def close(self):
            shown.append(self.name)

    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=SummaryWriter))
    interrupted(f"train.py {MOONS} --log tensorboard", "student", 6, monkeypatch)
    works("train.py --dataset moons --resume")
    for row in rows("runs/moons/log.csv"):
        start = 1 if int(row["step"]) <= 6 else 7
        assert (f"tensorboard/student from {start}", "cd", float(row["cd"]),
                int(row["step"])) in shown
    assert shown[-1] == "tensorboard/student from 7" and "tensorboard/teacher from 1" in shown


def test_ctrl_c_of_a_real_process():
    started = subprocess.Popen(
        [sys.executable, REPO / "train.py", *f"--dataset moons {SIZES}".split(),
         "--teacher-steps", "1000000", "--preview-every", "1000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(Path("runs/moons/teacher_resume.pt"), started.poll)
    refused(f"train.py {MOONS}", "another process is training in runs/moons", str(started.pid))
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=180)
    assert started.returncode == 130 and "--resume" in err and "Traceback" not in err, err


def wait_for(path, ended, seconds=90):
    until = time.monotonic() + seconds
    while not path.exists():
        assert ended() is None and time.monotonic() < until, f"{path} was never written"
        time.sleep(0.002)


def quiet_train(argv):
    """train.main in a process of its own, without its pictures and its progress bar."""
    torch.set_num_threads(1)
    sample.strips = pictures.losses = lambda path, *args, **more: None
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.main(argv)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_killed_after_the_last_iteration_and_before_the_result(kind):
    line = f"train.py {SIZES} --dataset moons --steps 4 --teacher-steps 4"
    works(f"{line} --out whole")
    shutil.copytree("whole", "torn")
    for path in Path("torn").glob("*.pt"):
        if kind == "teacher" and path.name.startswith("student") or path.name == f"{kind}.pt":
            path.unlink()
    works(f"{line} --out torn --resume")
    assert_same_run("torn", "whole")


def test_kill_9_at_random_moments(monkeypatch):
    long = f"{SIZES} --dataset moons --steps 60 --teacher-steps 60 --save-every 1 --log-every 1"
    # a server that has imported torch (and what an optimiser imports when first used) forks each
    # process, so that a start costs no seconds
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), str(REPO / "tests"), *sys.path]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])

    def start(*flags):
        process = context.Process(target=quiet_train, args=([*long.split(), *flags],))
        process.start()
        return process

    def saved():
        try:
            return {p.name: p.stat().st_mtime_ns for p in Path("torn").glob("*_resume.pt")}
        except FileNotFoundError:                  # moves aside at this moment
            return saved()

    whole = start("--out", "whole")
    whole.join()
    assert whole.exitcode == 0

    # each process lives until shortly after it has saved a few times
    rng, steps, flags = random.Random(0), [], []
    while len(steps) < 8:
        before, process = saved(), start("--out", "torn", *flags)
        for _ in range(rng.randrange(1, 25)):
            while saved() == before and process.is_alive():
                time.sleep(0.001)
            before = saved()
        time.sleep(0.02 * rng.random())
        process.kill()
        process.join()
        states = {p.name: checkpoint.load(p)["step"] for p in Path("torn").glob("*.pt")}
        assert states                              # all of them could be read
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        steps.append(states)
        flags = ["--resume"]
    print("killed at", steps)
    assert len({str(states) for states in steps}) >= 3

    last = start("--out", "torn", "--resume")
    last.join()
    assert last.exitcode == 0
    assert_same_run("torn", "whole")


# ------------------------------------------------------------------ the machine, other errors


def failing(error):
    """A step of training that raises an error."""
    def step(*args):
        raise error
    return step, train.TERMS


@pytest.mark.parametrize("error, named", [
    (MemoryError(), "--batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--batch-size"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), "--compile"),
    (OSError(28, "No space left on device", "some/file"), "some/file (No space left on device)"),
    (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates"), "PYTHONUTF8=1")], ids=repr)
def test_errors_of_the_machine_are_one_sentence(error, named, moons, monkeypatch):
    monkeypatch.setitem(train.STEPS, "scflow", failing(error))
    refused(f"train.py {MOONS} --out new", named)


def test_faults_of_the_code_keep_their_traceback(moons, monkeypatch):
    """Not every error with the word memory says that there is too little."""
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setitem(train.STEPS, "scflow", failing(fault))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        call(f"train.py {MOONS} --out new")


def test_an_odd_environment():
    """No stream for the progress bar, no docstrings, and rubbish in two variables."""
    ended = subprocess.run(
        f"{shlex.quote(sys.executable)} {REPO / 'train.py'} {MOONS} 2>&-", shell=True, text=True,
        env=os.environ | dict(PYTHONOPTIMIZE="2", MPLBACKEND="rubbish", RANK="abc"),
        stdout=subprocess.PIPE, timeout=180)
    assert ended.returncode == 0 and "wrote: runs/moons/student.pt" in ended.stdout
    assert len(rows("runs/moons/log.csv")) == 6


def test_a_stream_that_cannot_be_written_gets_no_progress_bar():
    assert not log.writable(None)
    with open(os.devnull) as only_read:
        assert not log.writable(only_read)


def test_a_variable_of_torchrun_that_was_left_over(monkeypatch):
    monkeypatch.setattr(machine, "WORLD", 2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused(f"train.py {MOONS}", "WORLD_SIZE is 2", "torchrun", "unset")


@pytest.mark.parametrize("dataset, threads, variable, expected", [
    ("moons", 0, None, 1), ("moons", 0, "7", None), ("moons", 3, "7", 3),
    ("mnist", 0, None, machine.CORES), ("mnist", 0, "7", None)])
def test_threads(dataset, threads, variable, expected, monkeypatch):
    """--threads, else OMP_NUM_THREADS (which PyTorch reads), else 1 for points, or all cores."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    machine.choose_device(make_config(dataset, threads=threads, device="cpu"))
    assert asked == ([] if expected is None else [expected])


def test_gpus_with_and_without_an_index(monkeypatch):
    """torch.cuda.set_device refuses a device without an index; seen on the first real GPU.

    cuDNN's settings do not depend on the index.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: torch.zeros(1))
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: chosen.append(index),
                        raising=False)
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace())
    for name, index in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        for precision, tf32 in (("auto", True), ("fp32", False)):
            chosen, torch.backends.cudnn.benchmark = [], False
            machine.choose_device(make_config("mnist", device=name, precision=precision))
            assert chosen == [index] and torch.backends.cudnn.benchmark
            assert torch.backends.cudnn.allow_tf32 == tf32


# --------------------------------------------------------------------------- the file itself


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file")])
def test_saving_is_atomic(error, monkeypatch, tmp_path):
    cfg = make_config("moons")
    checkpoint.save("some.pt", "student", cfg, (2,), 1, ema={"w": torch.zeros(3)})
    before = Path("some.pt").read_bytes()

    def fails_midway(content, f):
        f.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fails_midway)
    with pytest.raises(UserError, match="some.pt"):
        checkpoint.save("some.pt", "student", cfg, (2,), 2, ema={"w": torch.ones(3)})
    assert Path("some.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["some.pt"]
    assert checkpoint.load("some.pt")["step"] == 1


def test_a_full_disk_while_training(moons, monkeypatch, no_pictures):
    """The run stops with a sentence, and goes on from what was saved once there is room again."""
    save, calls = torch.save, iter(range(1000))

    def full(content, f):
        if next(calls) == 3:                       # after the teacher's copy, the start, step 3
            raise OSError(28, "No space left on device")
        save(content, f)

    monkeypatch.setattr(torch, "save", full)
    refused(f"train.py {MOONS} --out new --save-every 3", "student_resume.pt", "No space left")
    assert read("new/student_resume.pt")["step"] == 3 and not list(Path("new").glob("*.part"))
    works("train.py --dataset moons --out new --resume")


def test_a_full_disk_while_logging(moons, monkeypatch, no_pictures):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log, "open", full, raising=False)
        refused(f"train.py {MOONS} --out new", "log.csv", "No space left", "--resume")
    works("train.py --dataset moons --out new --resume")
    assert [int(row["step"]) for row in rows("new/log.csv")] == [*range(2, 13, 2)]


@pytest.mark.parametrize("end", ["", "1", "10,0.5", "abc,", "-4" + ",1" * 11, "4" + ",1" * 11,
                                 "10" + ",x" * 11, "10" + ",1" * 12, "\xff\0"])
def test_a_log_that_was_cut_or_edited(end, moons, no_pictures):
    """Damaged rows are left out, and the others are neither lost nor mixed up."""
    path = moons / "log.csv"
    path.write_text("\n".join([*path.read_text().splitlines()[:5], end]), encoding="latin-1")
    changed(moons / "student_resume.pt", put("step", 10), moons / "student_resume.pt")
    works("train.py --dataset moons --resume")
    assert [int(row["step"]) for row in rows(path)] == [2, 4, 6, 8, 12]
    assert set(log.curves(rows(path))) == {*train.TERMS}


def test_a_run_without_its_log_goes_on(moons):
    (moons / "log.csv").unlink()
    (moons / "losses.png").unlink()
    assert "already finished" in works("train.py --dataset moons --resume")
    works("train.py --dataset moons --resume --steps 14")
    assert is_picture(moons / "losses.png")


@pytest.mark.parametrize("name", ["log.csv", "losses.png", "student.pt"])
def test_a_folder_with_the_name_of_a_file(name, finished_run):
    """A picture that cannot be drawn costs no student."""
    Path("new", name).mkdir(parents=True)
    shutil.copy(finished_run.folder / "teacher.pt", "new")
    refused(f"train.py {MOONS} --out new", f"new/{name}")
    assert Path("new/student.pt").is_file() == (name == "losses.png")


def test_a_picture_of_the_teacher_that_cannot_be_written_does_not_stop_the_student():
    Path("new/teacher_losses.png").mkdir(parents=True)
    assert "teacher_losses.png is a folder; name a .png file; training goes on" in works(
        f"train.py {MOONS} --out new")


def test_a_flipped_bit_is_noticed(moons):
    whole = (moons / "student.pt").read_bytes()
    for place in (len(whole) // 3, len(whole) // 2, 2 * len(whole) // 3):
        Path("flipped.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 64])
                                       + whole[place + 1 :])
        refused("sample.py --checkpoint flipped.pt --n 9 --nfe 1", "flipped.pt", "damaged")


def test_resuming_never_replaces_the_teacher(moons, no_pictures):
    works(f"teacher.py {MOONS} --seed 5 --out one")
    works(f"teacher.py {MOONS} --seed 6 --out other")
    before = Path("one/teacher.pt").read_bytes()
    refused("train.py --dataset moons --out one --resume --teacher-checkpoint other/teacher.pt",
            "another teacher")
    assert Path("one/teacher.pt").read_bytes() == before
    refused("teacher.py --dataset moons --out one --resume --teacher-steps 5", "step 12")


def test_losses_that_never_begin_are_named(no_pictures):
    printed = works(f"train.py {MOONS} --n-gan 500 --n-rf 1000")
    assert "12 iterations end before they begin: gan rf" in printed


def test_a_checkpoint_describes_itself(moons):
    content = read(moons / "student.pt")
    assert content["kind"] == "student" and content["scflow"] == checkpoint.VERSION
    assert content["config"]["dataset"] == "moons" and content["step"] == 12
    assert checkpoint.config_of(content).channels == 16

    # a download is not remembered: it would be tried again by sampling
    content["config"]["download"] = True
    assert not checkpoint.config_of(content).download


def test_a_newer_format_is_refused(moons):
    changed(moons / "student.pt", put("scflow", checkpoint.VERSION + 1), "newer.pt")
    refused("sample.py --checkpoint newer.pt", "newer.pt", "update")


# --------------------------------------------------------------------------------- sampling


def npz(*flags):
    works("sample.py --n 300 --npz raw.npz", *flags)
    return np.load("raw.npz")["arr_0"]


def test_raw_points(moons):
    a = npz("--nfe", 4)
    assert a.shape == (300, 2) and a.dtype == np.float32 and np.isfinite(a).all()
    assert np.array_equal(npz("--nfe", 4), a)
    assert np.allclose(npz("--nfe", 4, "--batch", 7), a, atol=1e-5)
    assert np.allclose(npz("--nfe", 4, "--n", 20), a[:20], atol=1e-5)
    assert not np.allclose(npz("--nfe", 4, "--seed", 1), a, atol=1e-2)
    assert not np.allclose(npz("--nfe", 4, "--teacher"), a, atol=1e-4)

    # re-noising draws from the seed as well
    b = npz("--nfe", 4, "--stochastic")
    assert not np.allclose(b, a, atol=1e-2)
    assert np.allclose(npz("--nfe", 4, "--stochastic", "--batch", 7), b, atol=1e-5)
    # in one step all samplers are the same
    one = npz("--nfe", 1)
    assert np.allclose(npz("--nfe", 1, "--stochastic"), one, atol=1e-5)


def test_the_noise_is_the_same_at_every_nfe():
    def still(z, t, y=None):
        return torch.zeros_like(z)
    z = sample.noise((2,), 600, seed=3)
    for nfe, batch in ((1, 600), (4, 600), (4, 100), (2, 7)):
        assert torch.equal(sample.draw(still, (2,), 600, nfe, seed=3, batch=batch), z)


def test_pictures_of_samples(moons):
    where = moons / "samples"
    printed = works("sample.py --nfe 1 2 4")
    assert str(moons / "student.pt") in printed
    works("sample.py --nfe 2 --n 100 --stochastic")
    works("sample.py --nfe 3 --n 100 --seed 1")
    works("sample.py --nfe 3 --n 100 --teacher")
    assert {p.name for p in where.iterdir()} == {
        "student-nfe1-2-4-seed0.png", "student-nfe2-stochastic-seed0.png",
        "student-nfe3-seed1.png", "teacher-nfe3-seed0.png"}
    assert "new/one.png" in works("sample.py --nfe 2 --n 100 --out new/one")
    for path in (*where.iterdir(), Path("new/one.png")):
        assert is_picture(path)


def test_flags_that_a_picture_does_not_use_are_refused(moons):
    refused("sample.py --gif --stochastic", "--gif", "--stochastic")
    refused("sample.py --gif --teacher", "--gif", "--teacher")
    refused("sample.py --npz a.npz --out b.png", "--npz", "--out")
    for line, n in (("--gif", 100_001), ("--trajectory", 100_001), ("--nfe 1 4", 100_001)):
        refused(f"sample.py {line} --n {n}", f"--n {n}", "100,000", "--npz")
    assert not files(moons / "samples")
    drawn = []
    for line in ("--gif --n 30", "--trajectory --n 30", "--nfe 1 4 --n 30"):
        with pytest.MonkeyPatch.context() as patch:
            draw = sample.path
            patch.setattr(sample, "path", lambda model, shape, n, *args, **more: (
                drawn.append(n), draw(model, shape, n, *args, **more))[1])
            works(f"sample.py {line}")
    assert set(drawn) == {30}


def test_a_prompt_with_dollar_signs_is_no_mathematics():
    label = "from $5 to $10 and $_^$"
    path = pictures.grid("a.png", [(label, "student", [torch.zeros(1, 8, 8)])], ["1 NFE"])
    assert is_picture(path)


def test_long_labels_are_wrapped_and_do_not_touch_the_edge(monkeypatch):
    monkeypatch.setattr(pictures, "write", lambda fig, path: fig)
    label = "the same, sampled guided, 2 calls per step"
    fig = pictures.grid("a.png", [(label, "student", [torch.zeros(5, 2)] * 3)])
    fig.canvas.draw()
    box = fig.axes[0].yaxis.label.get_window_extent()
    assert box.x0 > 5 and box.width < 150


def test_trajectories(moons, monkeypatch):
    names = []
    trajectory = sample.trajectory
    monkeypatch.setattr(sample, "trajectory", lambda path, networks, *args: (
        names.append([name for name, _ in networks]), trajectory(path, networks, *args)))
    for choice in ("", "--teacher", "--no-teacher"):
        works(f"sample.py --trajectory --nfe 3 {choice} --out path{choice}.png")
        assert is_picture(f"path{choice}.png")
    assert names == [["teacher", "student"], ["teacher"], ["student"]]


def test_the_newest_student_is_sampled(moons):
    other = put("config", "dataset", "spirals")
    for name, age in (("old", 50), ("new", 10), ("between", 30)):
        shutil.copytree(moons, f"runs/{name}")
        if name != "old":
            changed(moons / "student.pt", other, f"runs/{name}/student.pt")
        os.utime(f"runs/{name}/student.pt", (time.time() - age,) * 2)
    os.utime(moons / "student.pt", (time.time() - 40,) * 2)
    Path("runs/damaged").mkdir()                   # is passed over
    Path("runs/damaged/student.pt").write_text("newer, but no checkpoint")
    assert "runs/new/student.pt" in works("sample.py --nfe 1 --n 9 --out a.png")
    assert "runs/moons/student.pt" in works("sample.py --nfe 1 --n 9 --out a.png --dataset moons")


def test_an_unfinished_run_can_be_sampled(moons):
    (moons / "student.pt").unlink()
    assert "student_resume.pt" in works("sample.py --nfe 1 --n 9 --out a.png")
    works(f"sample.py --checkpoint {moons / 'teacher_resume.pt'} --nfe 1 --n 9 --out b.png")
    assert is_picture("a.png") and is_picture("b.png")


def test_the_weights_of_a_state_that_are_sampled(moons):
    """Each gives the samples of a student.pt with these weights."""
    line = f"sample.py --n 9 --nfe 2 --checkpoint {moons}"
    for weights, part in (("theta", "student"), ("target", "target"), ("ema", "ema")):
        works(f"{line}/student_resume.pt --weights {weights} --npz {weights}.npz")
        changed(moons / "student.pt", put("ema", read(moons / "student_resume.pt")[part]), "a.pt")
        works("sample.py --n 9 --nfe 2 --checkpoint a.pt --npz expected.npz")
        assert np.array_equal(np.load(f"{weights}.npz")["arr_0"], np.load("expected.npz")["arr_0"])
    assert not np.array_equal(np.load("theta.npz")["arr_0"], np.load("ema.npz")["arr_0"])
    works(f"{line}/teacher_resume.pt --weights theta --npz theta.npz")
    refused(f"{line}/teacher_resume.pt --weights target", "teacher_resume.pt", "target", "ema")
    refused(f"{line}/student.pt --weights theta", "student.pt", "theta", "student_resume.pt")


# ------------------------------------------------------------------------------- evaluation


def test_the_table(moons):
    printed = works("evaluate.py --nfe 1 4 --n 500")
    saved = json.loads((moons / "evaluation.json").read_text())
    assert saved["dataset"] == "moons" and "sliced W2" in saved["metric"]
    assert [(r["network"], r["nfe"]) for r in saved["rows"]] == [
        ("teacher", 1), ("teacher", 4), ("teacher", 100), ("student", 1), ("student", 4)]
    for row in saved["rows"]:
        assert row["distance"] > saved["floor"]["distance"] > 0
        assert f"{row['distance']:.1f} ({row['spread']:.2f})" in printed
        assert f"{row['precision']:.3f} / {row['recall']:.3f}" in printed
    assert f"{saved['floor']['distance']:.1f} (1.00)" in printed
    assert (moons / "evaluation.md").read_text().strip() in printed

    # the same again, in batches of another size and to another file
    works("evaluate.py --nfe 1 4 --n 500 --out again.json --batch 77")
    again = json.loads(Path("again.json").read_text())
    for row, other in zip(saved["rows"], again["rows"]):
        assert row["per_second"] > 0 and other.pop("per_second") != row.pop("per_second")
        assert other.pop("network") == row.pop("network")
        assert other == pytest.approx(row, rel=1e-5)


def test_a_table_of_several_students(moons):
    shutil.copytree(moons, "runs/second")
    printed = works("evaluate.py --nfe 1 --n 500 --checkpoint runs/moons/student.pt "
                    "runs/second/student.pt --out two.json")
    assert "| moons " in printed and "| second " in printed


def test_a_table_holds_one_data_set(moons):
    changed(moons / "student.pt", put("config", "dataset", "spirals"), "other.pt")
    before = files()
    refused(f"evaluate.py --n 500 --checkpoint {moons / 'student.pt'} other.pt",
            "moons (not spirals)")
    refused(f"evaluate.py --n 500 --checkpoint {moons / 'student.pt'} --dataset spirals", "moons")
    refused(f"evaluate.py --n 500 --nfe 1 --checkpoint {moons / 'student.pt'} "
            f"--out {moons / 'log.csv' / 'new.json'}", "new.json")
    assert files() == before


# ------------------------------------------------------------------------------- the README


def readme_commands():
    """The lines "python train.py ..." in the README's shell blocks, in order, without "python"."""
    return commands_of(REPO / "README.md")


def commands_of(page):
    """The same of any page."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.match(r"\s*python (?:-m )?((?:\w+\.py|study\.\w+)\b.*)", line) for line in lines]
    return [shlex.split(m[1], comments=True) for m in found if m]


def test_the_readmes_commands(mnist_dir, faces_dir, taef2_files, monkeypatch):
    """All of them, one after another in one folder, with flags behind them that make them small."""
    commands = readme_commands()
    assert len(commands) >= 5, f"README.md has {len(commands)} commands"

    # the first digits, and feature networks that need not be good
    mnist = data.mnist
    few = {train: [x[:500].clone() for x in mnist(mnist_dir, train)] for train in (True, False)}
    monkeypatch.setattr(data, "mnist", lambda folder, train=True: few[train])
    monkeypatch.setattr(features, "mnist_classifier",
                        lambda *args, **more: features.Classifier().eval())
    monkeypatch.setattr(features, "inception", lambda device: lambda x: x.flatten(2).mean(2))
    # other tests look at the pictures of runs
    monkeypatch.setattr("harness.run.Run.pictures", lambda run, kind: [])
    Path("my_features.py").write_text("def embed(x):\n    return x.flatten(1)[:, :8]\n")
    copy_faces(faces_dir, 16, "MY_PHOTOS")

    # nothing may run in bf16, which most CPUs only emulate, nor in the network of 153 M parameters
    small = ("--steps 3 --teacher-steps 3 --batch-size 8 --teacher-batch-size 8 --channels 8 "
             "--heads 2 --disc-channels 8 --precision fp32 --device cpu --threads 1").split()
    vae = ["--image-size", "64", "--vae", "taef2", "--vae-weights", *map(str, taef2_files)]
    latents = f"--model tiny --patch-size 1 --data-dir MY_PHOTOS {shlex.join(vae)}".split()
    drawing = "--precision fp32 --device cpu --threads 1 --n 12".split()
    flags = {"train.py": small, "teacher.py": small, "sample.py": drawing, "toy.py": [],
             "evaluate.py": drawing, "latents.py": [*vae, *drawing],
             "study.oversaturation": [], "study.speed": small,
             "study.ablation": [*small, "--n", "12", "--nfe", "1", "--pairs", "20",
                                "--pair-steps", "1", "--seeds", "1"]}
    for script, *given in commands:
        if "captioned" in given:                   # tests/test_text2image.py runs these
            continue
        for flag in ("--compile", "--download"):
            given = [word for word in given if word != flag]
        if "model_480.pth" in given:               # the paper's teacher is not here
            i = given.index("model_480.pth")
            del given[i - 1 : i + 1]
        more = [] if "--help" in given else flags[script]
        if {"celebahq", "folder"} & {*given}:
            more = [*more, *{"train.py": latents, "study.speed": ["--model", "tiny"]}.get(
                script, [])]
        if script == "evaluate.py" and "mnist" in given:
            more = [*more, "--n", "80"]            # as many as its classifier has features, or more
        ended = call(script, *given, *more)
        assert ended.code == 0, f"{script} {given}: {ended.err}"
