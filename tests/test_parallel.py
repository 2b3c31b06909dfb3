"""Several processes, and pieces of a batch, compute what one process computes in one piece."""

import json
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import latents
import train
from config import make_config
from harness import checkpoint, machine
from model import velocity_network
from running import copy_faces, read, refused, rows, works

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
REPO = Path(__file__).resolve().parent.parent

# processes are forked from one that has imported the slow packages, but nothing of this project
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "torch.distributed", "matplotlib.pyplot",
                              "transformers.models.clip.modeling_clip", "datasets",
                              "diffusers.models.unets.unet_2d_condition"])   # if they are there
CHILD = """
import os, runpy, sys
os.environ.update({env!r})
os.chdir({cwd!r})
for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(name + {env!r}["RANK"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
# another test may have had the server import the project, with the rank of that process
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    if file.startswith({repo!r}) and not file.startswith(sys.prefix):    # .venv is in the folder
        del sys.modules[name]
sys.path.insert(0, {repo!r})
import sample, harness.pictures, harness.run       # no pictures, as the fixture no_pictures
harness.run.Run.strips = lambda run, path, dataset: None
sample.strips = harness.pictures.losses = lambda path, *args, **more: None
sys.argv = {words!r}
runpy.run_path(os.path.join({repo!r}, sys.argv[0]), run_name="__main__")
"""


def start(line, n=2):
    """Starts a script in n processes at once."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
               WORLD_SIZE=str(n))
    started = [FORKS.Process(target=exec, args=(CHILD.format(
        env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=os.getcwd(), repo=str(REPO),
        words=shlex.split(line)),)) for rank in range(n)]
    for process in started:
        process.start()
    return started


def end(started):
    """Waits for the processes; returns their exit codes, stdout and stderr."""
    for process in started:
        process.join(90)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [SimpleNamespace(code=process.exitcode, out=Path(f"out{rank}").read_text(),
                            err=Path(f"err{rank}").read_text())
            for rank, process in enumerate(started)]


def changed_script(code, script="train"):
    """A script in the current folder that runs `code` in each process before the script itself."""
    path = Path("changed.py").absolute()
    path.write_text("import os, signal, sys, time\nfrom pathlib import Path\n"
                    f"import data, evaluate, latents, sample, {script}\n"
                    "from harness.script import run_script\nrank = int(os.environ['RANK'])\n"
                    f"{textwrap.dedent(code)}\nrun_script({script}.main)\n")
    return path


def all_work(line, n=2):
    ended = end(start(line, n))
    assert [e.code for e in ended] == [0] * n, "\n".join(e.err for e in ended)
    return ended


def assert_close(weights, expected):
    """State dicts that are equal within 1e-5."""
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=0,
                                   msg=lambda m: f"{key}: {m}")


def assert_equal_runs(one, other):
    """Weights within 1e-5 and the rows of the logs within what they print."""
    for name, states in (("teacher.pt", ["ema"]), ("student.pt", ["ema"]),
                         ("student_resume.pt", ["student", "disc", "target", "ema"])):
        a, b = read(Path(one) / name), read(Path(other) / name)
        for state in states:
            assert_close(a[state], b[state])
    for name in ("teacher_log.csv", "log.csv"):
        a, b = rows(Path(one) / name), rows(Path(other) / name)
        assert len(a) == len(b) > 0
        for row, same in zip(a, b):
            for key in row.keys() - {"per_second"}:
                if row[key] != same[key]:          # empty before a loss begins
                    assert float(row[key]) == pytest.approx(float(same[key]), 1e-3, 2e-5), key


# ------------------------------------------------------------------------- random numbers


def latents_batch(n, draws):
    """A batch of nine encoded images."""
    moments = np.random.default_rng(0).standard_normal((9, 2, 2, 4, 2, 2))
    np.save("some.npy", moments.astype(np.float16))
    codec = SimpleNamespace(row=moments.shape[1:], decode=None, sample=lambda mean, logvar, noise:
                            mean + (logvar / 2).exp() * noise)
    return latents.Latents("some.npy", codec).batch(n, draws)[0]


KINDS = {
    "normal": lambda n, d: d.normal(n, 3, 2),
    "uniform": lambda n, d: d.uniform(n),
    "integers": lambda n, d: d.integers(1000, n),
    "points": lambda n, d: data.Points("moons").batch(n, d)[0],
    "images": lambda n, d: data.Images(torch.arange(256).view(64, 1, 2, 2).byte()).batch(n, d)[0],
    "latents": latents_batch,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_slices_of_all_processes_make_the_whole_draw(kind, world):
    def drawn(n, **rank):
        draws = data.Draws(5, stream=1, **rank)
        draws.at(7)
        return [KINDS[kind](n, draws) for _ in range(2)]      # twice, to see the state, too

    whole = drawn(24)
    parts = [drawn(24 // world, rank=rank, world=world) for rank in range(world)]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_functions_of_seed_and_step(kind):
    def drawn(seed, step, stream=0, waste=0):
        draws = data.Draws(seed, stream)
        draws.normal(waste)
        draws.at(step)
        return KINDS[kind](16, draws)

    torch.manual_seed(0)
    first, other_state = drawn(0, 0), torch.get_rng_state()
    assert torch.equal(drawn(0, 0, waste=5), first)
    assert torch.equal(torch.get_rng_state(), other_state)    # the global one is not touched
    others = [drawn(0, 1), drawn(1, 0), drawn(0, 0, stream=1), drawn(2, 0)]
    assert not any(torch.equal(other, first) for other in others)


# --------------------------------------------------------------------------- whole runs


MOONS = ("--dataset moons --channels 16 --blocks 1 --disc-channels 8 --batch-size 32 "
         "--teacher-batch-size 32 --lr-warmup 2 --steps 10 --teacher-steps 10 --n-rf 4 --n-gan 0 "
         "--log-every 3 --preview-every 5 --save-every 4 --device cpu --threads 1")


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    """runs/one by this process, runs/two by torchrun with two processes."""
    home, before = tmp_path_factory.mktemp("moons"), Path.cwd()
    os.chdir(home)
    try:
        works(f"train.py {MOONS} --out runs/one")
        ended = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             REPO / "train.py", *f"{MOONS} --out runs/two".split()],
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
            text=True, capture_output=True, timeout=180)
    finally:
        os.chdir(before)
    assert ended.returncode == 0, ended.stderr
    return SimpleNamespace(home=home, out=ended.stdout, err=ended.stderr)


def test_two_processes_train_what_one_trains(moons):
    """And only the first of them writes and talks."""
    one, two = moons.home / "runs/one", moons.home / "runs/two"
    assert_equal_runs(one, two)
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    assert moons.out.count("wrote: runs/two/student.pt") == 1 and "Traceback" not in moons.err


@pytest.mark.parametrize("method", ["reflow-distill", "fgm"])
def test_baselines_of_two_processes(method, moons, no_pictures):
    shutil.copy(moons.home / "runs/one/teacher.pt", "teacher.pt")
    line = (f"train.py {MOONS} --method {method} --pairs 21 --pair-steps 2 "
            "--teacher-checkpoint teacher.pt")
    works(f"{line} --out one")
    all_work(f"{line} --out two")
    one, two = (read(f"{name}/student_resume.pt")["student"] for name in ("one", "two"))
    assert_close(one, two)


def test_conditions_and_guidance_of_two_processes():
    line = f"train.py {MOONS} --dataset 8gaussians --condition class --guidance 1.5 --out"
    works(f"{line} one")
    all_work(f"{line} two")
    assert_equal_runs("one", "two")

    # and measuring: each process draws its share of the samples
    line = ("evaluate.py --checkpoint one/student.pt --nfe 2 --n 301 --batch 70 --device cpu "
            "--threads 1 --out")
    works(f"{line} alone")
    first, second = all_work(f"{line} shared")
    alone, shared = (json.loads(Path(f"{name}.json").read_text())["rows"]
                     for name in ("alone", "shared"))
    assert "as asked: class" in first.out and second.out == ""
    assert len(alone) == len(shared) == 3
    for a, b in zip(alone, shared):
        for name in a.keys() - {"network", "per_second"}:
            assert b[name] == pytest.approx(a[name], 1e-4, 1e-4), name


def test_points_of_two_processes(moons):
    shutil.copy(moons.home / "runs/one/student.pt", "student.pt")
    line = "sample.py --checkpoint student.pt --nfe 2 --n 301 --device cpu --threads 1"
    works(f"{line} --npz one.npz")
    works(f"{line} --npz batches.npz --batch 77")
    all_work(f"{line} --npz two.npz")
    one, batches, two = (np.load(f"{name}.npz")["arr_0"] for name in ("one", "batches", "two"))
    assert one.shape == two.shape == (301, 2) and one.dtype == two.dtype == np.float32
    assert np.allclose(one, batches, atol=1e-5) and np.allclose(one, two, atol=1e-5)

    # fewer samples than processes
    all_work(f"{line} --n 1 --npz two.npz")
    assert np.load("two.npz")["arr_0"].shape == (1, 2)


def test_one_process_goes_on_where_two_stopped(moons):
    """And the other way round it is the same code."""
    for run in ("one", "two"):
        shutil.copytree(moons.home / "runs" / run, run)
        works(f"train.py --dataset moons --resume --out {run} --steps 13 --threads 1")
    assert_equal_runs("one", "two")


@pytest.mark.parametrize("signalled", [(0, 1), (1,)], ids=str)
def test_ctrl_c_stops_all_processes_after_the_same_step(signalled, moons):
    """Whichever of them it reaches; the first says so, and any number may go on."""
    shutil.copytree(moons.home / "runs/one", "run")
    started = start("train.py --dataset moons --resume --out run --steps 1000000 "
                    "--log-every 3 --preview-every 1000000")
    deadline = time.time() + 30
    while int(rows("run/log.csv")[-1]["step"]) < 20 and time.time() < deadline:
        time.sleep(0.05)
    for rank in signalled:
        os.kill(started[rank].pid, signal.SIGINT)
    ended = end(started)
    assert [e.code for e in ended] == [130, 130], ended[0].err + ended[1].err
    assert sum(e.err.count("stopped at step") for e in ended) == 1
    step = read("run/student_resume.pt")["step"]
    assert step >= 20
    works(f"train.py --dataset moons --resume --out run --steps {step + 2} --threads 1")
    assert read("run/student.pt")["step"] == step + 2


def test_all_processes_stop_two_steps_after_one_was_asked(moons):
    """However seldom the log is written."""
    shutil.copy(moons.home / "runs/one/teacher.pt", "teacher.pt")
    script = changed_script("""
        step, terms = train.STEPS["scflow"]
        def asked(net, batch, number, *others):
            if (rank, number) == (1, 4):
                signal.raise_signal(signal.SIGINT)
            return step(net, batch, number, *others)
        train.STEPS["scflow"] = asked, terms
    """)
    ended = end(start(f"{script} {MOONS} --teacher-checkpoint teacher.pt --log-every 1000 "
                      "--save-every 1000 --out run"))
    assert [e.code for e in ended] == [130, 130], ended[0].err + ended[1].err
    assert read("run/student_resume.pt")["step"] == 6


def test_measuring_and_the_end_while_the_first_process_draws(moons, monkeypatch):
    """The others wait for it, and the measured distances are those of one process."""
    shutil.copy(moons.home / "runs/one/teacher.pt", "teacher.pt")
    line = f"{MOONS} --teacher-checkpoint teacher.pt --preview-every 100 --eval-every 5"
    few = """
        def few(*args, prepare=evaluate.prepare):
            return prepare(*args, 100)
        evaluate.prepare = few
    """
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "prepare", evaluate.prepare)   # restored at the end
        exec(textwrap.dedent(few), {"evaluate": evaluate})
        works(f"train.py {line} --out one")
    script = changed_script(few + """
        import harness.run, harness.script
        def slow(*args):
            time.sleep(2)
            Path("drawn").touch()
        harness.run.Run.strips = slow
        def leave(leave=harness.script.leave):
            leave()
            Path(f"ended{rank}").touch()
        harness.script.leave = leave
    """)
    all_work(f"{script} {line} --out two")
    one, two = (rows(f"{run}/quality.csv") for run in ("one", "two"))
    assert [row["step"] for row in two] == ["5", "10"]
    for row, same in zip(one, two):
        assert row.keys() == same.keys()
        for name in row:
            assert float(row[name]) == pytest.approx(float(same[name]), 1e-3), name
    assert Path("ended1").stat().st_mtime > Path("drawn").stat().st_mtime


def test_mnist_is_downloaded_once(tmp_path):
    """The second process opens the files only when they are whole."""
    script = changed_script("""
        import torch, torchvision
        from types import SimpleNamespace
        def mnist(folder, train=True, download=False):
            raw = Path(folder, "MNIST/raw")
            if download:
                raw.mkdir(parents=True)
                Path(f"downloaded{rank}").touch()
                time.sleep(1)
                (raw / "images").touch()
            assert (raw / "images").exists(), "half a download"
            return SimpleNamespace(data=torch.zeros(60_000, 28, 28, dtype=torch.uint8),
                                   targets=torch.zeros(60_000, dtype=torch.long))
        torchvision.datasets.MNIST = mnist
    """)
    all_work(f"{script} --dataset mnist --channels 8 --heads 2 --disc-channels 8 --batch-size 4 "
             "--teacher-batch-size 4 --steps 1 --teacher-steps 1 --device cpu --threads 1")
    assert [p.name for p in tmp_path.glob("downloaded*")] == ["downloaded0"]


@pytest.fixture(scope="module")
def faces(faces_dir, taef2_files, tmp_path_factory):
    """Runs on latents of 20 faces, each encoding for itself: "one" process and "two".

    The second of two processes looks for the latents only when the first has made them, as if it
    were on a slow disk; both also split their batches.
    """
    home, before = tmp_path_factory.mktemp("faces"), Path.cwd()
    copy_faces(faces_dir, 20, home / "faces")
    line = ("train.py --dataset folder --data-dir faces --vae taef2 --image-size 64 --model tiny "
            "--channels 16 --disc-channels 8 --steps 4 --teacher-steps 4 --batch-size 4 "
            "--teacher-batch-size 8 --n-rf 1 --lr-warmup 2 --log-every 1 --preview-every 100 "
            # AdamW turns rounding of a gradient near zero into steps as large as the rate
            "--lr 2e-4 --l-gan 0.1 --precision fp32 --device cpu --threads 1 --vae-weights "
            + " ".join(shlex.quote(str(f)) for f in taef2_files))
    os.chdir(home)
    try:
        works(f"{line} --out one --latents-dir latents-one")
        late = changed_script("""
            def late(*args, encoded=latents.encoded):
                while rank == 1 and not list(Path("latents-two").glob("*.npy")):
                    time.sleep(0.05)
                return encoded(*args)
            latents.encoded = late
        """)
        ended = all_work(line.replace("train.py", str(late)) + " --out two "
                         "--latents-dir latents-two --checkpointing --grad-accum 2")
    finally:
        os.chdir(before)
    return SimpleNamespace(home=home, ended=ended)


def test_two_processes_encode_and_train_what_one_does(faces):
    (one,), (two,) = (list((faces.home / f"latents-{n}").glob("*.npy")) for n in ("one", "two"))
    assert one.name == two.name and one.read_bytes() == two.read_bytes()
    assert_equal_runs(faces.home / "one", faces.home / "two")
    assert faces.ended[1].out == "" and faces.ended[1].err.count("Traceback") == 0


def test_images_of_two_processes_and_of_any_batch(faces):
    """Equal bit for bit where the same images share a batch, else up to rounding."""
    shutil.copy(faces.home / "one/student.pt", "student.pt")
    line = ("sample.py --checkpoint student.pt --nfe 2 --device cpu --threads 1 --precision fp32 "
            "--n 7 --batch")
    works(f"{line} 7 --npz whole.npz")
    works(f"{line} 2 --npz one.npz")
    all_work(f"{line} 2 --npz two.npz")
    whole, one, two = (np.load(f"{name}.npz")["arr_0"] for name in ("whole", "one", "two"))
    assert whole.shape == (7, 64, 64, 3) and whole.dtype == np.uint8
    assert (one == two).all()
    assert abs(whole.astype(int) - one).max() <= 1 and (whole != one).mean() < 1e-3
    assert not list(Path().glob("*.part*"))


# ------------------------------------------------------------------------------- bad input


def sentences(ended):
    """What each process says last; it must end with code 2 and without a traceback."""
    assert all(e.code == 2 and "Traceback" not in e.err for e in ended), [e.err for e in ended]
    return [(e.err.strip().splitlines() or [""])[-1] for e in ended]


def test_a_batch_that_does_not_divide():
    first, second = sentences(end(start(f"train.py {MOONS} --batch-size 33")))
    assert first.startswith("train.py: ") and second.startswith("train.py (process 1 of 2): ")
    assert "--batch-size 33" in first and "2 processes" in first
    assert not list(Path().rglob("*.pt"))


def test_an_error_of_one_process_is_printed_with_its_rank():
    script = changed_script("""
        from harness import UserError
        def load(*args, load=data.load):
            if rank == 1:
                raise UserError("no room here")
            return load(*args)
        data.load = load
    """)
    _, second = end(start(f"{script} {MOONS}"))
    assert second.code == 2 and second.err.endswith("(process 1 of 2): no room here\n")


def test_one_gpu_for_all_processes(monkeypatch):
    monkeypatch.setattr(machine, "WORLD", 2)
    refused(f"train.py {MOONS} --device cuda:0", "cuda:0", "one GPU", "--device cuda")


def test_images_that_only_the_first_process_looks_at(taef2_files):
    """The second waits for the latents, which never come: it must end, and without a traceback."""
    from PIL import Image
    Path("images").mkdir()
    for i in range(8):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(f"images/{i}.png")
    ended = end(start("train.py --dataset folder --data-dir images --image-size 64 --vae taef2 "
                      "--model tiny --batch-size 4 --teacher-batch-size 4 --device cpu "
                      "--threads 1 --vae-weights " + " ".join(map(str, taef2_files))))
    assert "0.png is 40 x 40" in sentences(ended)[0]


def test_a_folder_in_which_another_process_trains(moons):
    shutil.copytree(moons.home / "runs/one", "run")
    with checkpoint.locked(Path("run/.lock"), "is training in run"):
        ended = end(start("train.py --dataset moons --resume --out run --steps 13"))
    assert "another process is training in run" in sentences(ended)[0]


# ---------------------------------------------------------------------- pieces of a batch


def two_steps(**settings):
    """The weights after two iterations of Algorithm 1 with all losses, and the last terms."""
    cfg = make_config("mnist", channels=8, heads=2, disc_channels=8, batch_size=6, n_rf=0,
                      precision="fp32", lr=1e-3, **settings)
    torch.manual_seed(0)
    shape = (1, 8, 8)
    teacher = velocity_network(cfg, shape)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn(p.shape))    # layers that start at zero hide mistakes
    net = train.begin(teacher, teacher, cfg, shape, torch.device("cpu"))
    for opt in (net.opt, net.opt_disc):            # plain descent: Adam would divide by zero-ish
        opt.param_groups[0]["eps"] = 1.0
    draws = data.Draws(0)
    for step in range(2):
        draws.at(step)
        terms = train.scflow_step(net, (draws.normal(6, *shape), None), step, cfg, draws)
    weights = {f"{n}.{k}": v for n in ("student", "target", "ema", "disc")
               for k, v in getattr(net, n).state_dict().items()}
    return weights, terms


@pytest.mark.parametrize("settings", [
    dict(grad_accum=2), dict(grad_accum=4), dict(checkpointing=True),
    dict(grad_accum=3, checkpointing=True)], ids=str)
def test_pieces_and_checkpointing_change_nothing(settings):
    expected, terms = two_steps()
    weights, same = two_steps(**settings)
    assert_close(weights, expected)
    for name, value in terms.items():
        assert same[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert not torch.equal(expected["student.out.2.weight"], expected["target.out.2.weight"])


def test_pieces_bound_the_memory_of_activations():
    """What autograd keeps of a call: with pieces the inputs alone, however large the batch."""
    def kept(**settings):
        cfg = make_config("mnist", channels=8, heads=2, precision="fp32", **settings)
        network = machine.prepare(velocity_network(cfg, (1, 8, 8)), cfg, torch.device("cpu"))
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            network(torch.randn(12, 1, 8, 8), torch.rand(12))
        return total

    whole = kept()
    assert kept(grad_accum=3) < whole / 5
    assert kept(checkpointing=True) < whole / 2
