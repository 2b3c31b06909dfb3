"""The paper's experiment in small: every step of it, on a hundred faces, in a minute."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from harness.pictures import from_uint8
from running import copy_faces, read, rows, works
from study.features import function_of
from test_parallel import all_work, end, start

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "no_pictures")


def test_the_experiment_in_small(faces_dir, taef2_files):
    copy_faces(faces_dir, 64, "faces")
    Path("pixels.py").write_text("def few(x): return x[:, :, ::16, ::16].flatten(1)[:, :6]\n")
    vae = "--vae taef2 --vae-weights " + " ".join(map(str, taef2_files))
    machine = "--device cpu --threads 1 --precision fp32"
    images = f"--dataset folder --data-dir faces --image-size 64 {vae} {machine}"

    # the latents, once
    assert "64 images in latents/faces-taef2-64-" in works(f"latents.py {images} --n 16")
    made, = (path.stat().st_mtime_ns for path in Path("latents").glob("*.npy"))

    # teacher and student, killed while they train, and resumed (add here: the printed plan)
    tiny = ("--model tiny --patch-size 1 --channels 8 --heads 2 --disc-channels 8 --batch-size 8 "
            "--teacher-batch-size 8 --teacher-steps 20 --steps 1000 --n-rf 10 --save-every 20 "
            "--log-every 5")
    process, = started = start(f"train.py {images} {tiny}", n=1)
    state, deadline = Path("runs/folder/student_resume.pt"), time.time() + 60
    while not state.exists() or read(state)["step"] < 20:
        assert process.exitcode is None and time.time() < deadline, Path("err0").read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert end(started)[0].code == -signal.SIGKILL and not Path("runs/folder/student.pt").exists()
    step = read(state)["step"]
    works(f"train.py --dataset folder --resume --steps {step + 20} {machine}")
    assert read("runs/folder/student.pt")["step"] == step + 20
    assert int(rows("runs/folder/log.csv")[-1]["step"]) == step + 20

    # measured by one process and by two (add above: measured while it trains)
    line = f"evaluate.py --dataset folder --nfe 1 2 --n 12 --features pixels:few {machine}"
    works(f"{line} --out one")
    all_work(f"{line} --out two --latents-dir two")
    kept, of_two = (next(Path(name).glob("faces-features-*.npz")) for name in ("latents", "two"))
    assert kept.name == of_two.name
    assert np.allclose(np.load(kept)["features"], np.load(of_two)["features"], atol=1e-6)
    one, two = (json.loads(Path(f"{name}.json").read_text())["rows"] for name in ("one", "two"))
    assert [r["nfe"] for r in one] == [r["nfe"] for r in two] == [1, 2, 50, 1, 2]
    for a, b in zip(one, two):
        for name in ("distance", "precision", "recall", "consistency", "spread"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=0.006), name

    # 100 samples, written by two processes and measured from the file
    all_work(f"sample.py --dataset folder --nfe 1 --n 100 --npz samples.npz {machine}")
    samples = np.load("samples.npz")["arr_0"]
    assert samples.shape == (100, 64, 64, 3)
    printed = works(f"evaluate.py --npz samples.npz --real faces --features pixels:few {machine}")
    fake = function_of("pixels:few")(from_uint8(torch.from_numpy(samples).permute(0, 3, 1, 2)))
    wanted = evaluate.frechet_distance(fake, torch.from_numpy(np.load(kept)["features"]))
    assert "pixels:few, 100 samples against 64 images" in printed
    assert f"| samples.npz | {wanted:.1f} " in printed
    assert [path.stat().st_mtime_ns for path in Path("latents").glob("*.npy")] == [made]


def test_the_classifier_of_two_processes():
    Path("two.py").write_text("""
import torch, data
from study import features
digits = torch.zeros(300, 1, 28, 28, dtype=torch.uint8), torch.arange(300) % 10
def mnist(folder, train=True):
    machine.wait()                                 # as the real one does
    return digits
from harness import machine
from harness.script import run_script
data.mnist = mnist
def main():
    machine.start(torch.device("cpu"))
    features.mnist_classifier("data")
    print(machine.gathered(machine.RANK), machine.mine(5))
run_script(main)
""")
    first, second = all_work(str(Path("two.py").absolute()))
    assert first.out.endswith("[0, 1] range(0, 3)\n")
    assert second.out.endswith("[0, 1] range(3, 5)\n")
