"""What the numbers rest on: measures against references, features, baselines, tables, figures."""

import json
import math
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ablation
import baselines
import checkpoint
import data
import evaluate
import features
import oversaturation
import sample
import train
from config import UserError, make_config
from losses import flow_matching_loss
from model import copy_of, velocity_network
from running import call, copy_faces, read, refused, rows, works

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
SMALL = ("--steps 12 --teacher-steps 12 --channels 16 --blocks 1 --disc-channels 8 --batch-size 32 "
         "--teacher-batch-size 32 --lr-warmup 2 --threads 1 --n-rf 0 --n-gan 0 --log-every 4")
PAIRS = "--pairs 64 --pair-steps 3"


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------ precision and recall


@pytest.mark.parametrize("d, n, m", [(2, 1000, 1000), (64, 700, 700), (2, 300, 900)])
def test_precision_and_recall_equal_prdcs(d, n, m):
    from prdc import compute_prdc
    real = torch.randn(n, d, generator=gen())
    fake = 0.8 * torch.randn(m, d, generator=gen(1)) + 0.3
    wanted = compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=3)
    precision, recall = evaluate.precision_recall(real, fake, at_a_time=130)
    assert precision == pytest.approx(wanted["precision"], rel=1e-3)
    assert recall == pytest.approx(wanted["recall"], rel=1e-3)
    assert 0.01 < recall < 1 and 0.1 < precision <= 1


def test_precision_and_recall_of_known_clouds():
    real = torch.randn(500, 2, generator=gen())
    assert evaluate.precision_recall(real, real) == (1.0, 1.0)
    assert evaluate.precision_recall(real, real + 100) == (0.0, 0.0)
    # half of the fakes are far away; the other half are real points
    half = torch.cat([real[:250], real[:250] + 100])
    precision, recall = evaluate.precision_recall(real, half)
    assert precision == 0.5 and recall > 0.7
    # a few modes alone: precise, but it recalls little
    precision, recall = evaluate.precision_recall(real, real[:1] + 1e-4 * torch.randn(
        500, 2, generator=gen(1)))
    assert precision > 0.9 and recall < 0.05
    with pytest.raises(ValueError, match="more than k"):
        evaluate.precision_recall(real[:3], real)


# ------------------------------------------------------------------------------ measuring


class Scale(torch.nn.Module):
    """A velocity field whose f(z, t) = a z: N Euler steps multiply z1 by a known number."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, zt, t, y=None):
        return (1 - self.a) * zt / t[:, None]


def gaussians(n, seed):
    return torch.randn(n, 2, generator=gen(seed))


@pytest.fixture
def normal_data(monkeypatch):
    """2D data that are N(0, I), whatever the name says."""
    monkeypatch.setattr(data, "sample_points", lambda name, n, generator=None: torch.randn(
        n, 2, generator=generator))
    return evaluate.Reference(make_config("moons"), 4000)


def test_measures_of_a_perfect_and_of_a_shrinking_network(normal_data):
    how = dict(reference=normal_data, shape=(2,), n=4000, batch=900)
    perfect, = evaluate.measure("perfect", Scale(1.0), [1], **how)
    assert perfect["distance"] < 2.5 * normal_data.floor["distance"]
    assert perfect["precision"] > 0.9 and perfect["recall"] > 0.9
    assert perfect["spread"] == pytest.approx(1, abs=0.03) and perfect["consistency"] == 0

    one, two = evaluate.measure("shrinking", Scale(0.5), [1, 2], **how)
    assert one["spread"] == pytest.approx(0.5, abs=0.02)
    # at t = 1 half the step of (z - z/2): 3/4 z; at t = 1/2 the whole way to half of that
    assert two["spread"] == pytest.approx(0.375, abs=0.02)
    assert two["consistency"] == pytest.approx(0.125, abs=0.005)
    assert one["distance"] == pytest.approx(500 * math.sqrt(1), rel=0.1)   # 1000 (1 - 0.5)
    assert one["recall"] < perfect["recall"] - 0.05 and one["precision"] > 0.9
    assert one["per_second"] > 0 and list(one) == ["network", "nfe", "seed", *evaluate.MEASURES]


def test_consistency_needs_the_one_step_sample_though_nobody_asked(normal_data):
    two, = evaluate.measure("s", Scale(0.5), [2], normal_data, (2,), 4000)
    assert two["nfe"] == 2 and two["consistency"] == pytest.approx(0.125, abs=0.005)


def test_medians_and_their_range():
    some = [dict.fromkeys(evaluate.MEASURES, 0.0) | {"network": "a", "nfe": 1, "distance": d}
            for d in (5.0, 1.0, 2.0)]
    row, = evaluate.medians(some)
    assert (row["distance"], row["within"], row["runs"]) == (2.0, 2.0, 3)


def test_several_seeds_of_the_noise(moons_run):
    printed = works("evaluate.py --nfe 1 2 --n 300 --seeds 3")
    assert "half the range of 3 runs" in printed and "+-" in printed
    saved = json.loads(Path("runs/moons/evaluation.json").read_text())
    assert len(saved["rows"]) == 3 * (3 + 2)
    ones = [r["distance"] for r in saved["rows"] if r["network"] == "student" and r["nfe"] == 1]
    assert len(set(ones)) == 3 and f"{sorted(ones)[1]:.1f} +- " in printed


def test_heun_and_stochastic_can_be_measured(moons_run):
    printed = works("evaluate.py --nfe 1 3 --n 300 --solver heun")
    assert "moons, heun" in printed and "| 99" in printed
    works("evaluate.py --nfe 1 2 --n 300 --solver stochastic")
    refused("evaluate.py --nfe 2 --n 300 --solver heun", "odd")


# ------------------------------------------------------------------------------ features


def random_inception():
    """Inception whose weights and statistics are random but tame."""
    net = features.inception()
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return net


def test_inception_equals_pytorch_fids(monkeypatch, tmp_path):
    from pytorch_fid import inception as theirs
    weights = random_inception().state_dict()
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **more: weights)
    network = theirs.InceptionV3().eval()
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    try:
        kept = tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"
        kept.parent.mkdir(parents=True)
        torch.save(weights, kept)
        ours = features.fid_network()
    finally:
        torch.hub.set_dir(before)
    x = torch.rand(2, 3, 96, 96, generator=gen())
    with torch.no_grad():
        wanted, found = network(x)[0].flatten(1), ours(2 * x - 1)
    assert found.shape == (2, 2048) and torch.allclose(found, wanted, atol=1e-4)


def test_inceptions_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    try:
        with pytest.raises(UserError, match="--features") as failed:
            features.fid_network()
    finally:
        torch.hub.set_dir(before)
    for word in ("pytorch-fid", "pt_inception-2015-12-05-6726825d.pth", "by hand"):
        assert word in str(failed.value)


OWN = """
import torch
def good(x):
    return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3)), x[:, 0, 14, 14]], 1)
def flat(x):
    return x.mean((1, 2, 3))
def nothing(x):
    return "features"
def fails(x):
    return x @ torch.ones(3, 3)
def nan(x):
    return good(x) / 0 * 0
"""


def test_features_of_your_own():
    Path("own_features.py").write_text(OWN)
    images = 2 * torch.rand(230, 1, 28, 28, generator=gen()) - 1
    name, function = features.extractor("mnist", "own_features:good")
    found = function(images)
    seen = data.from_uint8(data.to_uint8(images))
    assert name == "own_features:good" and torch.equal(found[:, 2], seen[:, 0, 14, 14])
    for spec, word in (("own_features:flat", r"\(100,\)"), ("own_features:nothing", "str")):
        with pytest.raises(UserError, match=word):
            features.extractor("mnist", spec)[1](images)
    for spec in ("own_features:absent", "own_features:torch", "no_such_file:f", "own_features"):
        with pytest.raises(UserError, match="my_module:my_function"):
            features.extractor("mnist", spec)
    for spec, word in (("own_features:fails", "mat1"), ("own_features:nan", "not finite")):
        with pytest.raises(UserError, match=word):
            features.extractor("mnist", spec)[1](images)
    with pytest.raises(UserError, match="for images"):
        evaluate.Reference(make_config("moons"), 10, "own_features:good")


def test_latents_are_measured_as_images(faces_dir, taef2_files):
    Path("own_few.py").write_text(
        "def few(x):\n    return x[:, :, ::16, ::16].flatten(1)[:, :6]\n")
    copy_faces(faces_dir, 24, "photos")
    files = " ".join(map(str, taef2_files))
    works(f"train.py --dataset folder --data-dir photos --vae taef2 --vae-weights {files} --model "
          "tiny --image-size 64 --patch-size 1 --channels 8 --heads 2 --disc-channels 8 --steps 2 "
          "--teacher-steps 2 --batch-size 4 --teacher-batch-size 4 --threads 1 --device cpu")
    printed = works("evaluate.py --dataset folder --n 12 --nfe 1 2 --batch 5 --features "
                    "own_few:few --threads 1 --device cpu")
    assert "own_few:few, 12 samples against 24 images" in printed
    saved = json.loads(Path("runs/folder/evaluation.json").read_text())
    assert {r["nfe"] for r in saved["rows"]} == {1, 2, 50}
    assert all(r["distance"] > 0 and r["spread"] > 0 for r in saved["rows"])


# ------------------------------------------------------------------------------ baselines


@pytest.fixture(scope="session")
def moons_folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("moons")
    out = home / "runs" / "moons"
    works(f"train.py --dataset moons {SMALL} --out {out}")
    return out


@pytest.fixture
def moons_run(moons_folder, tmp_path):
    """A copy of a finished run as runs/moons below the current folder."""
    return Path(shutil.copytree(moons_folder, tmp_path / "runs/moons"))


@pytest.mark.parametrize("method", ["cd", "reflow", "reflow-distill", "fgm"])
def test_a_baseline_end_to_end(method, moons_run):
    line = f"train.py --dataset moons --method {method} {SMALL} {PAIRS}"
    printed = works(line)
    folder = Path(f"runs/moons-{method}")
    assert f"wrote: {folder}/student.pt" in printed
    student, teacher = read(folder / "student.pt"), read(moons_run / "teacher.pt")
    assert student["config"]["method"] == method and student["seconds"] > 0
    # it began at the teacher that was there, and moved
    assert all(torch.equal(a, b) for a, b in zip(read(folder / "teacher.pt")["ema"].values(),
                                                 teacher["ema"].values()))
    assert not torch.equal(student["ema"]["last.weight"], teacher["ema"]["last.weight"])
    log = rows(folder / "log.csv")
    terms = train.TERMS if method == "cd" else baselines.STEPS[method][1]
    assert list(log[0]) == ["step", *terms, "per_second"] and int(log[-1]["step"]) == 12
    assert "already finished" in works(line)
    works(f"sample.py --checkpoint {folder}/student.pt --nfe 1 --n 9")


def test_plain_cd_is_the_first_rung_of_the_ladder(moons_run):
    works(f"train.py --dataset moons --method cd {SMALL}")
    works(f"train.py --dataset moons --losses cd {SMALL} --out rung")
    a, b = (read(Path(p) / "student.pt")["ema"] for p in ("runs/moons-cd", "rung"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["reflow", "reflow-distill", "fgm"])
@pytest.mark.parametrize("stop", [5, 11])
def test_a_baseline_resumes_bit_for_bit(method, stop, moons_run, monkeypatch):
    line = f"train.py --dataset moons --method {method} {SMALL} {PAIRS} --threads 1"
    works(f"{line} --out whole")
    with monkeypatch.context() as m:
        stop_at(stop, m)
        ended = call(f"{line} --out parts")
    assert ended.code == 130 and "--resume" in ended.err
    assert "--out parts " in ended.err
    assert read("parts/student_resume.pt")["seconds"] > 0
    works("train.py --resume --dataset moons --out parts")
    a, b = (read(Path(p) / "student_resume.pt") for p in ("whole", "parts"))
    for name in ("student", "ema"):
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name]), name


def stop_at(iteration, monkeypatch):
    """Ctrl-C after so many iterations of a baseline, the first stage's counted as well."""
    count = iter(range(1, 1000))

    def breaking(step):
        def stepped(net, *more):
            found = step(net, *more)
            if next(count) == iteration:
                signal.raise_signal(signal.SIGINT)
            return found
        return stepped

    for name, (step, terms) in list(baselines.STEPS.items()):
        monkeypatch.setitem(baselines.STEPS, name, (breaking(step), terms))


def test_starting_anew_takes_nothing_of_the_older_run(moons_run, monkeypatch):
    line = f"train.py --dataset moons --method reflow-distill {SMALL} {PAIRS}"
    works(f"{line} --out whole --seed 1")
    works(f"train.py --dataset moons {SMALL} --out parts")     # another method's log
    works(f"{line} --out parts --overwrite")                   # another seed's pairs
    with monkeypatch.context() as m:
        stop_at(5, m)                                          # in the nested 2-RF
        assert call(f"{line} --out parts --seed 1 --overwrite").code == 130
    works("train.py --resume --dataset moons --out parts")
    a, b = (read(Path(p) / "student.pt")["ema"] for p in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert np.array_equal(np.load("whole/pairs.npy"), np.load("parts/pairs.npy"))
    refused("train.py --resume --dataset moons --out parts --steps 40", "--steps 40")


def test_pairs_are_the_teachers_and_go_on_where_they_stopped(tmp_path):
    network = Scale(0.5)
    path = tmp_path / "pairs.npy"
    arguments = dict(network=network, shape=(2,), n=50, nfe=2, seed=3, device="cpu", batch=8)
    pairs = baselines.Pairs(path, **arguments)
    assert torch.allclose(pairs.z0, 0.375 * pairs.z1, atol=1e-6)
    assert abs(pairs.z1.std().item() - 1) < 0.2
    assert torch.equal(pairs.z1, sample.noise((2,), 50, 3))

    # what is there is not made again; what is missing is
    array = np.load(path)
    array[:16], array[40:] = 7.0, np.nan
    np.save(path, array)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    again = baselines.Pairs(path, **arguments)
    assert (again.z0[:16] == 7).all() and torch.equal(again.z0[40:], pairs.z0[40:])
    assert len(calls) == 2 * 2                                    # two batches, two steps each
    z0, z1 = again.batch(10, data.Draws(0))
    assert torch.allclose(z0, torch.where(z0 == 7, z0, 0.375 * z1), atol=1e-6)

    with pytest.raises(UserError, match="50, 2"):
        baselines.Pairs(path, **(arguments | {"n": 60}))
    path.write_bytes(b"no numbers")
    with pytest.raises(UserError, match="pairs.npy"):
        baselines.Pairs(path, **arguments)


def run_of(method, **more):
    cfg = make_config("moons", method=method, channels=16, blocks=1, batch_size=64, threads=1,
                      **more)
    torch.manual_seed(0)
    teacher = velocity_network(cfg, (2,))
    return cfg, train.begin(copy_of(teacher), cfg, (2,), torch.device("cpu")), data.Draws(0)


def test_reflow_is_equation_1_on_pairs():
    cfg, net, draws = run_of("reflow")
    z0, z1 = gaussians(64, 1), gaussians(64, 2)
    draws.at(5)
    t = draws.uniform(64)
    zt = (1 - t)[:, None] * z0 + t[:, None] * z1
    wanted = flow_matching_loss(net.student(zt, t), z0, z1).item()
    draws.at(5)
    assert baselines.reflow_step(net, z0, z1, 0, cfg, draws)["fm"].item() == pytest.approx(wanted)


def test_one_step_regression_sees_t_1_alone():
    cfg, net, draws = run_of("reflow-distill")
    seen = []
    net.student.register_forward_hook(lambda m, args, out: seen.append((args[0], args[1], out)))
    z0, z1 = gaussians(64, 1), gaussians(64, 2)
    found = baselines.distill_step(net, z0, z1, 0, cfg, draws)
    (zt, t, v), = seen
    assert torch.equal(zt, z1) and (t == 1).all()
    assert found["onestep"].item() == pytest.approx((z0 - (z1 - v)).square().mean().item())


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_fgm_loss_is_the_identity_of_its_parts(alpha):
    u, v, c = (gaussians(50, i) for i in range(3))
    l1, l2 = (u - v).square().mean(), 2 * ((u - v) * (v - c)).mean()
    found = baselines.fgm_loss(u, v, c, alpha)
    if alpha == 0.5:                               # L1 + L2 = |u - c|^2 - |v - c|^2
        wanted = (u - c).square().mean() - (v - c).square().mean()
        assert wanted.item() == pytest.approx((l1 + l2).item(), rel=1e-5)
    else:
        wanted = l2
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_fgm_vanishes_where_the_online_flow_is_the_teacher():
    u, c = gaussians(50, 0), gaussians(50, 1)
    assert baselines.fgm_loss(u, u, c).item() == 0


def test_fgm_steps_generator_and_flow_without_data():
    cfg, net, draws = run_of("fgm")
    before = [p.clone() for p in net.disc.parameters()]
    teacher = [p.clone() for p in net.teacher.parameters()]
    calls = {"teacher": 0, "disc": 0, "student": 0}
    for name in calls:
        getattr(net, name).register_forward_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1}))
    first = baselines.fgm_step(net, torch.full((64, 2), math.nan), None, 0, cfg, draws)
    assert all(math.isfinite(x) for x in map(float, first.values()))       # the data are not read
    k = baselines.FAKE_STEPS
    assert calls == {"teacher": 1, "disc": k + 1, "student": k + 1}
    assert all(torch.equal(p, q) for p, q in zip(net.teacher.parameters(), teacher))
    assert not all(torch.equal(p, q) for p, q in zip(net.disc.parameters(), before))
    assert all(p.grad is None for p in net.teacher.parameters())
    assert all(p.grad is None for p in net.disc.parameters())


def test_fgm_learns_a_gaussian_from_its_exact_teacher():
    """Teacher N(m, s^2) in closed form; a generator of two numbers finds m and s, without data."""
    m, s = 1.5, 0.5

    class Linear(torch.nn.Module):
        """The exact velocity of N(mean, std^2) under independent noise."""

        def __init__(self, mean, std):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.tensor(mean))
            self.std = torch.nn.Parameter(torch.tensor(std))

        def forward(self, zt, t, y=None):
            t = t[:, None]
            var = (1 - t) ** 2 * self.std**2 + t**2
            away = zt - (1 - t) * self.mean
            return (t - (1 - t) * self.std**2) / var * away - self.mean

    class Affine(torch.nn.Module):
        """f(z1, 1) = mean + std z1."""

        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.tensor(0.0))
            self.std = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, zt, t, y=None):
            return zt - (self.mean + self.std * zt)

    cfg = make_config("moons", method="fgm", ema=0.9)
    student, fake = Affine(), Linear(0.0, 1.0)
    net = SimpleNamespace(
        teacher=Linear(m, s).requires_grad_(False), student=student, disc=fake, ema=Affine(),
        opt=torch.optim.AdamW(student.parameters(), 0.02, (0.0, 0.99), weight_decay=0.0),
        opt_disc=torch.optim.AdamW(fake.parameters(), 0.02, (0.0, 0.99), weight_decay=0.0))
    draws = data.Draws(0)
    for step in range(400):
        draws.at(step)
        baselines.fgm_step(net, torch.zeros(256, 1), None, step, cfg, draws)
    assert student.mean.item() == pytest.approx(m, abs=0.12)
    assert abs(student.std.item()) == pytest.approx(s, abs=0.12)


@pytest.mark.parametrize("line, named", [
    ("--method gan", ["gan", "fgm"]),
    ("--method reflow --losses cd", ["--losses", "reflow"]),
    ("--method cd --losses cd gan", ["--losses", "cd"]),
    ("--method cd --t-trunc 0.4", ["--method cd", "--t-trunc"]),
    ("--method reflow-distill --steps 1", ["--steps"]),
    ("--method reflow --pairs 0", ["--pairs 0"]),
    ("--method reflow --pair-steps 0", ["--pair-steps 0"]),
])
def test_bad_methods(line, named):
    refused(f"train.py --dataset moons {line} --threads 1", *named)


# ------------------------------------------------------------------------------ the paper's tables


def small_table(kind, more=""):
    return (f"evaluate.py --ablation {kind} --dataset moons {SMALL} {PAIRS} --nfe 1 2 --n 200 "
            f"{more}")


def test_the_ladder_is_trained_measured_and_kept(monkeypatch):
    printed = works(small_table("losses", "--seeds 2"))
    for rung in ("CD", "+ GAN, truncation", "+ RF", "+ BI (all)", "teacher", "data against data"):
        assert f"| {rung} " in printed
    root = Path("runs/ablation/moons")
    assert Image.open(root / "figure6.png").size[0] > 100
    assert {p.name for p in root.iterdir() if p.is_dir()} == {
        f"{name}-{seed}" for seed in (0, 1) for name in
        ("teacher", "losses-cd", "losses-cd-gan", "losses-cd-gan-rf", "scflow")}
    saved = json.loads((root / "losses.json").read_text())
    assert len(saved["rows"]) == 2 * (3 + 4 * 2) and saved["ablation"] == "losses"
    assert read(root / "losses-cd-0/student.pt")["config"]["t_trunc"] == 0
    teachers = [read(root / f"{p}/teacher.pt")["ema"]["last.weight"]
                for p in ("teacher-1", "scflow-1", "losses-cd-1", "teacher-0")]
    assert torch.equal(teachers[0], teachers[1]) and torch.equal(teachers[0], teachers[2])
    assert not torch.equal(teachers[0], teachers[3])

    # nothing is trained or sampled for a measure a second time, and the numbers stay
    monkeypatch.setattr(train, "begin", None)
    monkeypatch.setattr(evaluate, "measure", None)
    assert works(small_table("losses", "--seeds 2")).split("samples a second")[0].count("\n") > 10
    assert json.loads((root / "losses.json").read_text())["rows"] == saved["rows"]


def test_a_table_takes_the_teacher_that_is_there(moons_run, monkeypatch):
    monkeypatch.setattr("teacher.train_teacher", None)
    works(small_table("losses"))
    assert torch.equal(read("runs/ablation/moons/teacher-0/teacher.pt")["ema"]["last.weight"],
                       read(moons_run / "teacher.pt")["ema"]["last.weight"])


def test_an_interrupted_table_goes_on(monkeypatch):
    real, count = train.scflow_step, iter(range(1000))

    def breaking(*arguments):
        if next(count) == 12 + 7:                  # in the second cell
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as m:
        m.setattr(train, "scflow_step", breaking)
        ended = call(small_table("losses"))
    assert ended.code == 130 and "the same command goes on" in ended.err
    root = Path("runs/ablation/moons")
    first = (root / "losses-cd-0/student.pt").stat().st_mtime_ns
    assert not (root / "losses-cd-gan-0/student.pt").exists()
    works(small_table("losses"))
    assert (root / "losses-cd-0/student.pt").stat().st_mtime_ns == first

    # the second cell is what it is without an interruption
    teacher = root / "teacher-0/teacher.pt"
    works(f"train.py --dataset moons {SMALL} {PAIRS} --losses cd gan --out whole "
          f"--teacher-checkpoint {teacher}")
    a, b = (read(p / "student.pt")["ema"] for p in (root / "losses-cd-gan-0", Path("whole")))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_table_of_other_settings_is_refused():
    works(small_table("losses"))
    before = sorted(Path("runs").rglob("*"))
    refused(small_table("losses", "--lr 0.1"), "--lr 0.1", "remove")
    refused(small_table("losses", "--teacher-lr 0.1"), "--teacher-lr 0.1", "remove")
    assert sorted(Path("runs").rglob("*")) == before


def test_times_and_weights_change_one_setting_each():
    default = make_config("moons")
    for kind, names in (("times", {"t_trunc", "t_skip", "mu"}), ("weights", {"l_gan", "l_rf",
                                                                            "l_bi"})):
        table = ablation.cells(kind, default)
        assert table["default"] == {}
        changed = [s for label, s in table.items() if label not in ("default",
                                                                    "0.1, 0.1, 0.1 (paper)")]
        assert {name for s in changed for name in s} == names
        assert all(len(s) == 1 and getattr(default, *s) != list(s.values())[0] for s in changed)
        assert len({ablation.slug(s) for s in table.values()}) == len(table)


def test_methods_take_as_long_as_scflow(monkeypatch):
    # seconds by a clock of our own: an iteration takes 1 s, of the baselines as told
    told = {"scflow": 1.0, "cd": 0.5, "reflow": 0.25, "reflow-distill": 0.5, "fgm": 2.0}
    monkeypatch.setattr(ablation, "iteration", lambda cfg, *more: told[cfg.method])
    clock = iter(range(0, 10**6, 3))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    cfg = make_config("moons", channels=16, blocks=1, pairs=64, pair_steps=3, threads=1)
    checkpoint.save(Path("teacher.pt"), "teacher", cfg, (2,), 1,
                    ema=velocity_network(cfg, (2,)).state_dict())

    def steps(method):
        of = ablation.replace(cfg, method=method, out=method)
        return ablation.as_long_as((1000, 1000.0), of, Path("budget.json"),
                                   Path("teacher.pt")).steps

    assert steps("cd") == 2000 and steps("fgm") == 500
    assert steps("reflow") == (1000 - 3) * 4       # the pairs took 3 s of the clock
    assert steps("reflow-distill") == int((1000 - 6) / ((5 * 0.25 + 0.5) / 6))
    told["cd"] = 123.0                             # and what was found is kept
    assert steps("cd") == 2000
    # an SCFlow that took twice as long on this machine: everything is taken to be half as fast
    of = ablation.replace(cfg, method="fgm", out="fgm")
    found = ablation.as_long_as((1000, 2000.0), of, Path("budget.json"), Path("teacher.pt"))
    assert found.steps == 500
    with pytest.raises(UserError, match="--pairs"):
        ablation.as_long_as((10, 10.0), ablation.replace(cfg, method="reflow", out="other"),
                            Path("budget.json"), Path("teacher.pt"))


def test_the_methods_table(monkeypatch):
    monkeypatch.setattr(ablation, "as_long_as", lambda scflow, cfg, *_: cfg)
    printed = works(small_table("methods"))
    for method in ("SCFlow", "cd", "reflow", "reflow-distill", "fgm"):
        assert f"| {method} " in printed
    assert "| run | iterations | seconds of training |" in printed


def test_a_cell_that_diverges_does_not_end_the_table(monkeypatch):
    real = train.train

    def diverging(cfg):
        if cfg.losses == ("cd", "gan"):
            raise checkpoint.Diverged("gan became nan at step 3, so the run stopped")
        return real(cfg)

    monkeypatch.setattr(train, "train", diverging)
    printed = works(small_table("losses", "--solver heun").replace("--nfe 1 2", "--nfe 1 3"))
    assert "| + RF " in printed and "| + GAN, truncation " not in printed
    assert "+ GAN, truncation, seed 0: gan became nan at step 3" in printed


def test_networks_of_one_name_keep_their_rows(moons_run):
    for place in ("a", "b"):
        shutil.copytree(moons_run, f"{place}/run")
    printed = works("evaluate.py --n 100 --nfe 1 --out t --checkpoint a/run/student.pt "
                    "b/run/student.pt")
    assert "| a/run/student.pt " in printed and "| b/run/student.pt " in printed


def test_too_few_samples_for_the_features():
    Path("own_wide.py").write_text("def wide(x):\n    return x.flatten(1)[:, :64]\n")
    cfg = make_config("mnist")
    real = torch.randint(256, (60, 1, 28, 28), dtype=torch.uint8, generator=gen())
    with pytest.MonkeyPatch.context() as m:
        m.setattr(data, "mnist", lambda *_, **__: (real, None))
        with pytest.raises(UserError, match="too few"):
            evaluate.Reference(cfg, 50, "own_wide:wide")


def test_tables_may_have_a_point_in_their_name(moons_run):
    works("evaluate.py --n 100 --nfe 1 --out tables/lr-0.1")
    works("evaluate.py --n 100 --nfe 1 --out tables/lr-0.2.json")
    assert {p.name for p in Path("tables").iterdir()} == {
        f"lr-{x}.{kind}" for x in ("0.1", "0.2") for kind in ("json", "md")}


def test_training_flags_belong_to_the_tables(moons_run):
    refused("evaluate.py --steps 5 --n 100", "--steps", "--ablation")


# ------------------------------------------------------------------------------ figures


def test_the_film(moons_run):
    printed = works("sample.py --gif")
    path = Path("runs/moons/samples/film.gif")
    assert str(path) in printed
    film = Image.open(path)
    assert film.n_frames > 10 and path.stat().st_size < 400_000
    frames = []
    for i in (0, 4, film.n_frames - 1):
        film.seek(i)
        frames.append(np.asarray(film.convert("L"), float))
    width = frames[0].shape[1] // 4
    moved = [abs(frames[1] - frames[2])[40:, i * width:(i + 1) * width].mean() for i in range(4)]
    assert moved[0] > 1 and max(moved[1:3]) < moved[0]   # after four calls the students are done
    refused("sample.py --gif --trajectory", "--gif")
    refused(f"sample.py --gif --checkpoint {path.parents[1] / 'teacher.pt'}", "--gif", "student")


def test_a_film_is_of_points(monkeypatch, moons_run):
    content = read(moons_run / "student.pt")
    cfg = make_config("mnist", channels=8, heads=2)
    content |= {"shape": (1, 28, 28), "config": vars(cfg)}
    content["ema"] = velocity_network(cfg, (1, 28, 28)).state_dict()
    Path("images").mkdir()
    torch.save(content, "images/student.pt")
    torch.save(content | {"kind": "teacher"}, "images/teacher.pt")
    refused("sample.py --gif --checkpoint images/student.pt", "points", "--trajectory")


def test_oversaturation_in_closed_form():
    printed = works("oversaturation.py --out picture.png")
    for nfe, wanted in ((1, 1.0), (2, 1.414), (4, 1.662), (8, 1.816), (16, 1.904)):
        assert oversaturation.std(nfe) == pytest.approx(wanted, abs=5e-4)
        assert f"{nfe:<5} {wanted:.3f}" in printed
    assert oversaturation.std(10**5) == pytest.approx(2, abs=1e-3)
    assert Image.open("picture.png").size[0] > 500
    refused("oversaturation.py --out picture.png/x.png", "picture.png")
    # the path that it draws is Euler's with that prediction
    z = sample.euler(lambda z, t, y: (z - z / ((1 - t) ** 2 + t**2).sqrt()[:, None]) / t[:, None],
                     torch.ones(1, 1), 7)
    assert oversaturation.euler(1.0, 7)[-1][1] == pytest.approx(z.item(), rel=1e-5)
