"""The plan that train.py prints, the presets of latents, precisions, and what they cost."""

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import config
import model
import train
from config import LATENTS, MODELS, OFFICIAL, make_config
from harness import checkpoint, machine, plan
from harness.run import Run
from running import call, files, read, same, works
from study import precision, speed

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "no_pictures")

CPU = torch.device("cpu")
SMALL = ("--dataset folder --model tiny --channels 8 --heads 2 --disc-channels 8 --image-size 32 "
         "--batch-size 4 --teacher-batch-size 6 --steps 3 --teacher-steps 2 --n-rf 1 "
         "--precision fp32 --device cpu --threads 1")


def small(model="tiny", **given):
    """Settings of a model for latents, whose networks are tiny."""
    sizes = dict(channels=16, mult=(1, 2), blocks=1, attention=(1,), heads=2, disc_channels=8)
    return make_config("folder", **sizes | dict(model=model, image_size=64, batch_size=4,
                                                teacher_batch_size=4) | given)


def begun(cfg, shape=(4, 8, 8)):
    teacher = model.copy_of(model.velocity_network(cfg, shape))
    return train.begin(teacher, teacher, cfg, shape, CPU)


# ------------------------------------------------------------------------------- the presets


@pytest.mark.parametrize("dataset", ["celebahq", "folder"])
def test_the_papers_network_is_trained_as_its_authors_did(dataset):
    cfg, text = make_config(dataset), make_config(dataset, preset="paper")
    assert cfg == make_config(dataset, model="paper", preset="official")
    assert (cfg.metric, cfg.truncation, cfg.lr, cfg.disc_lr) == (
        "pseudo-huber", "landing", 2e-5, 1e-4)
    assert (text.metric, text.truncation, text.lr, text.disc_lr) == ("l2", "current", 1e-5, 1e-5)
    differ = {name for name, value in asdict(cfg).items() if getattr(text, name) != value}
    assert differ == OFFICIAL.keys() | {"preset"}


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_the_smaller_models_have_the_official_losses_but_not_its_rates(name):
    cfg, expected = make_config("folder", model=name), LATENTS | MODELS[name]
    assert {n: getattr(cfg, n) for n in expected} == expected and cfg.preset == ""
    assert (cfg.metric, cfg.huber_c, cfg.truncation) == ("pseudo-huber", 0.01, "landing")
    assert cfg.teacher_lr_final == cfg.lr_final == 0


def test_the_teachers_rate_falls_as_lfms_and_the_students_stays():
    cfg, opt = make_config("celebahq"), SimpleNamespace(param_groups=[{}])
    rates = []
    for final in (cfg.teacher_lr_final, cfg.lr_final):
        for step in (0, cfg.teacher_steps):
            model.set_rates(cfg, step, cfg.teacher_steps, (opt, 2e-5), final=final)
            rates.append(opt.param_groups[0]["lr"])
    assert rates == pytest.approx([2e-5, 1e-5, 2e-5, 2e-5])

    line = "teacher.py --dataset moons --lr-warmup 0 --teacher-steps 2 --teacher-lr 0.01"
    works(f"{line} --teacher-lr-final 0.5 --threads 1")    # half of the cosine is 0.75 of the peak
    state = read("runs/moons/teacher_resume.pt")
    assert state["opt"]["param_groups"][0]["lr"] == pytest.approx(0.0075)


# --------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("cfg, students, teacher", [
    (small("paper"), False, True), (small("paper", precision="bf16"), True, True),
    (small("paper", precision="fp32"), False, False), (small("tiny"), True, True),
    (small("paper", method="fgm"), False, True)], ids=["paper", "bf16", "fp32", "tiny", "fgm"])
def test_the_papers_network_is_distilled_in_float32(cfg, students, teacher, monkeypatch):
    monkeypatch.setattr(machine, "fast_bf16", lambda device: True)
    net = begun(cfg)
    assert net.teacher.network.bf16 == teacher
    assert {getattr(net, name).bf16 for name in ("student", "target", "ema", "disc")} == {students}
    words = ["bf16" if bf16 else "fp32" for bf16 in (students, teacher)]
    assert plan.precision(cfg, CPU) == (words[0] if students == teacher else (
        f"student {words[0]}, teacher and samples {words[1]}"))


def test_a_device_without_bf16_is_told_what_it_costs(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(machine, "fast_bf16", lambda device: fast)
        printed = call(f"train.py {SMALL} --precision auto --data-dir nowhere").out
        assert ("no fast bf16" in printed) != fast
        assert f"precision  {'bf16' if fast else 'fp32'}" in printed


class Rounded(nn.Module):
    """v = z t, so f(z, t) = z (1 - t^2); in bf16 f is `factor` times as large, plus z / 100."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.bf16, self.weight = factor, False, nn.Parameter(torch.ones(()))

    def forward(self, z, t, y=None):
        z, t = z * self.weight, t.view(-1, 1)
        exact = z * (1 - t**2)
        f = self.factor * exact + z / 100 if self.bf16 else exact
        return (z - f) / t


def test_the_error_of_a_difference_is_what_rounding_does_to_it():
    network = Rounded(1.25)        # the offset z / 100 is the same at both times, and cancels
    batch = precision.states(network, (2,), lambda n: None, 64)
    for d in precision.STEPS:
        assert precision.error(network, "bf16", d, *batch) == pytest.approx(0.25, rel=1e-2)


def test_the_table_of_precisions(monkeypatch):
    monkeypatch.setattr(precision, "SAMPLES", 8)
    monkeypatch.setattr(precision, "BATCHES", 2)
    printed = works("study.precision",
                    Path(config.__file__).parent / "weights/mnist/student.pt")
    row = printed.splitlines()[2].split("|")
    numbers = [float(cell.strip(" %")) for cell in row[3:8]]
    assert row[2].strip() == "bf16" and len(numbers) == 5
    # bf16 loses more of a smaller difference, but changes the gradient little
    assert 1 < numbers[0] < numbers[1] < numbers[2] < numbers[3] < 100 and 0 < numbers[4] < 20


# ---------------------------------------------------------------------------------- the plan


def test_without_data_the_plan_is_printed_first(monkeypatch):
    sizes = dict(channels=16, mult=(1, 2), blocks=1, attention=(1,), heads=4, time_scale=1.0,
                 disc_channels=8)
    monkeypatch.setitem(config.MODELS, "paper", sizes)
    ended = call("train.py --dataset celebahq --device cpu")
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1
    assert "there is no" in ended.err and "--download" in ended.err
    for words in ("device     cpu", "precision  ", "GiB", "data/celebahq", "120,500 iterations",
                  "--teacher-checkpoint", "model_480.pth", "168,750 iterations of batch 32",
                  "--preset official", "--plan"):
        assert words in ended.out, words


def test_the_plan_alone_times_ten_iterations_and_keeps_nothing(monkeypatch):
    printed = works(f"train.py {SMALL} --plan")
    student, teacher = map(float, re.findall(r"([\d.e-]+) s per iteration", printed))
    hours = [float(h) for h in re.findall(r"about ([\d.e-]+) hours", printed)]
    assert hours == pytest.approx([3 * student / 3600, 2 * teacher / 3600], rel=0.06)
    assert {Path(name).name for name in files()} <= {".lock"}
    with monkeypatch.context() as patch:           # of a finished run, too
        patch.setattr(Run, "finished", lambda run: True)
        assert "s per iteration" in works(f"train.py {SMALL} --plan")
    printed = works(f"train.py {SMALL} --plan --method reflow")
    assert "unknown" in printed and "per iteration" not in printed


def test_the_median_of_ten_without_the_first_two(monkeypatch):
    now, waits = [0.0], iter([100, 50, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1000])
    monkeypatch.setattr(plan, "perf_counter", lambda: now[0])

    def function():
        now[0] += next(waits)
    assert plan.median_seconds(function) == 5.5


@pytest.mark.parametrize("slow", [True, False])
def test_on_a_slow_cpu_the_plan_times_one_sample(slow, monkeypatch):
    now, batches = [0.0], []
    monkeypatch.setattr(plan, "perf_counter", lambda: now[0])

    def make(cfg):
        def function():
            batches.append(cfg.batch_size)
            now[0] += cfg.batch_size * (1 if slow else 0.125)
        return function
    cfg = small(batch_size=32, grad_accum=4)
    assert plan.measured(cfg, 32, CPU, make) == (32 if slow else 4)
    assert batches == [1] * 3 + ([] if slow else [32] * 12)


def test_timing_changes_nothing_of_the_run(faces_dir, taef2_files, monkeypatch):
    more = f"--data-dir {faces_dir} --vae taef2 --vae-weights {' '.join(map(str, taef2_files))}"
    monkeypatch.setattr("latents.files_in", lambda path: [f"{i:04}.jpg" for i in range(1, 13)])
    works(f"train.py {SMALL} {more} --out plain")
    show, called = plan.show, []
    monkeypatch.setattr(plan, "show", lambda run, only, *others: called.append(
        show(run, True, *others)))
    printed = works(f"train.py {SMALL} {more} --out timed")
    assert called == [True] and "per iteration" in printed
    for name in ("teacher.pt", "student.pt"):
        assert same(read(f"plain/{name}")["ema"], read(f"timed/{name}")["ema"])


@pytest.mark.parametrize("teacher", [False, True])
def test_a_disk_that_is_too_small_is_named_before_anything_is_trained(teacher, monkeypatch):
    # theta, theta~, EMA and two moments; D and two moments; three times, then teacher and student,
    # and the averages that are kept: 3 of the student, 2 of a teacher that is still to be trained
    cfg = small(out="here", steps=3, teacher_steps=2, keep_every=1)
    theta, d = (sum(p.numel() for p in x.parameters()) for x in (
        model.velocity_network(cfg, (4, 8, 8)), model.discriminator(cfg, (4, 8, 8))))
    need = 4 * (3 * (5 * theta + 3 * d) + (3 if teacher else 3 + 2 + 8) * theta + 2 * theta)
    if teacher:
        Path("here").mkdir()
        Path("here/teacher.pt").touch()
    for free in (need - 1, need):
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda f: SimpleNamespace(free=free))
        with Run(cfg) as run:
            if free < need:
                with pytest.raises(plan.UserError, match="what the run will keep needs"):
                    plan.show(run, False, train.begin, train.scflow_step)
            else:
                assert plan.show(run, False, train.begin, train.scflow_step) is False


def test_memory_is_counted_as_it_is_allocated():
    network = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2, bias=False))
    x = torch.randn(3, 4)
    # the input, and the sigmoid's answer, which the last layer takes; no weights
    assert plan.kept_bytes(network, lambda: network(x)) == 4 * (3 * 4 + 3 * 8)

    cfg = small()
    step, net = plan.iteration(cfg, (4, 8, 8), CPU, train.begin, train.scflow_step), None
    net = step.__closure__[[*step.__code__.co_freevars].index("net")].cell_contents
    step()
    tensors = [p for part in (net.teacher, net.student, net.target, net.ema, net.disc)
               for p in part.parameters()]
    tensors += [*net.student.parameters(), *net.disc.parameters()]         # their gradients
    for opt in (net.opt, net.opt_disc):
        tensors += [m for s in opt.state.values() for m in (s["exp_avg"], s["exp_avg_sq"])]
    theta, d, said = plan.sizes(cfg, (4, 8, 8))
    state = float(re.search(r"([\d.e-]+) for networks", said)[1]) * plan.GIB
    assert state == pytest.approx(sum(4 * x.numel() for x in tensors), rel=0.01)

    def activations(**given):
        said = plan.sizes(small(**given), (4, 8, 8))[2]
        return float(re.search(r"([\d.e-]+) for activations", said)[1])
    assert activations(batch_size=8) == pytest.approx(2 * activations(), rel=0.01)
    assert activations(checkpointing=True) < 0.6 * activations()
    assert activations(grad_accum=2) < 0.6 * activations()


def test_operations_of_an_iteration():
    cfg = make_config("moons", losses=("cd",), channels=16, blocks=1, batch_size=8)
    # teacher, theta~ and student forward, and twice the student backward; its input needs none
    forward, first = 2 * (50 * 16 + 16 * 16 + 16 * 2), 2 * 50 * 16
    assert speed.flops(cfg, CPU) == 8 * (5 * forward - first)
