"""Conditions by class (Eq. 2) and guidance (Eq. 3): closed forms, and use by a user."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import model
import sample
import train
from config import make_config
from harness import UserError
from harness.run import Run
from losses import expand
from running import gen, is_picture, read, refused, works
from study import ablation, baselines

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
TINY = ("--channels 16 --blocks 1 --disc-channels 8 --batch-size 32 --teacher-batch-size 32 "
        "--lr-warmup 2 --threads 1 --log-every 2 --preview-every 6 --steps 8 --teacher-steps 8 "
        "--n-rf 0 --n-gan 0")
CLASS = f"--dataset 8gaussians --condition class {TINY}"


# ------------------------------------------------------------------------------------- guidance


class Counted:
    """A network of two Gaussian classes of one variance: the exact velocity, and its calls."""

    means = torch.tensor([[1.0, 0.0], [-0.5, 2.0]])

    def __init__(self, s=0.7):
        self.s, self.calls = s, 0

    def __call__(self, zt, t, y=None):
        self.calls += 1
        m = torch.zeros_like(zt) if y is None else self.means[y]
        return velocity(zt, t, m, self.s)


def velocity(zt, t, m, s):
    """E[z1 - z0 | zt] for z0 ~ N(m, s^2) and z1 ~ N(0, 1), by the joint Gaussian of the two.

    zt has mean (1 - t) m and variance (1 - t)^2 s^2 + t^2, and z1 - z0 has mean -m and covariance
    t - (1 - t) s^2 with it.
    """
    t = expand(t, zt)
    return -m + (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * (zt - (1 - t) * m)


def inputs(n=64):
    return torch.randn(n, 2, generator=gen(0)), torch.rand(n, generator=gen(1)), torch.arange(n) % 2


def test_w_1_is_the_plain_call_and_no_call_more():
    net, (z, t, y) = Counted(), inputs()
    assert torch.equal(model.guided(net, z, t, y, 1), Counted()(z, t, y)) and net.calls == 1


def test_w_0_is_the_null_condition():
    z, t, y = inputs()
    torch.testing.assert_close(model.guided(Counted(), z, t, y, 0), Counted()(z, t))


def test_without_a_condition_there_is_nothing_to_guide():
    net, (z, t, _) = Counted(), inputs()
    assert torch.equal(model.guided(net, z, t, None, 3), Counted()(z, t)) and net.calls == 1


def test_guidance_is_affine_in_w_and_makes_two_calls():
    net, (z, t, y) = Counted(), inputs()
    v = [model.guided(net, z, t, y, w) for w in (0.0, 1.5, 3.0)]
    torch.testing.assert_close(v[1], (v[0] + v[2]) / 2)
    assert net.calls == 6


@pytest.mark.parametrize("w", [0.0, 1.0, 1.5, 3.0])
def test_the_guided_field_of_two_gaussians_is_that_of_a_third(w):
    """v is affine in the mean, so the mix is the field of mean m_null + w (m_y - m_null)."""
    net, (z, t, y) = model.Guided(Counted(), w), inputs()
    torch.testing.assert_close(net(z, t, y), velocity(z, t, w * Counted.means[y], 0.7))

    # and many Euler steps from noise land on that Gaussian
    y = torch.ones(20_000, dtype=torch.long)
    z0 = sample.draw(net, (2,), len(y), 200, batch=len(y), y=y)
    assert (z0.mean(0) - w * Counted.means[1]).abs().max() < 0.02
    assert (z0.std(0) - 0.7).abs().max() < 0.02


# ---------------------------------------------------------------------------- who sees what


def watch(monkeypatch):
    """The conditions that every label embedding is given, by the number of its channels."""
    seen, forward = [], model.LabelEmbedding.forward

    def remember(self, y, batch):
        seen.append((self, None if y is None else y.clone()))
        return forward(self, y, batch)

    monkeypatch.setattr(model.LabelEmbedding, "forward", remember)
    return seen


def test_the_teacher_sees_the_null_condition_and_the_student_never_does(monkeypatch):
    seen = watch(monkeypatch)
    with Run(make_config("8gaussians", condition="class", teacher_steps=20, teacher_batch_size=64,
                         channels=16, threads=1)) as run:
        train.find_or_train(run)
    drawn = torch.cat([y for _, y in seen if y is not None and len(y) == 64])
    assert 0.05 < (drawn == 8).float().mean() < 0.15 and len(drawn.unique()) == 9

    seen.clear()
    cfg = make_config("8gaussians", condition="class", guidance=1.5, batch_size=16, channels=16,
                      disc_channels=8)
    teacher = model.copy_of(model.velocity_network(cfg, (2,)))
    net = train.begin(teacher, teacher, cfg, (2,), torch.device("cpu"))
    dataset, draws = data.Points("8gaussians", 8), data.Draws(0)
    train.scflow_step(net, dataset.batch(16, draws), 2000, cfg, draws)
    for embedding, y in seen:
        if embedding is not teacher.label_emb:
            assert y is not None and (y < 8).all()
    of_teacher = [y for embedding, y in seen if embedding is teacher.label_emb]
    assert len(of_teacher) == 2 and of_teacher[0] is None and (of_teacher[1] < 8).all()


def test_p_null_1_is_unconditional_training():
    """The rows of the classes get no gradient: AdamW without decay leaves them as they were."""
    with Run(make_config("8gaussians", condition="class", p_null=1.0, teacher_steps=3,
                         teacher_batch_size=16, channels=16, threads=1)) as run:
        weights = read(train.find_or_train(run))["ema"]["label_emb.weight"]
    torch.manual_seed(0)
    fresh = model.velocity_network(run.cfg, (2,)).label_emb.weight
    assert torch.equal(weights[:8], fresh[:8]) and not torch.equal(weights[8], fresh[8])


def test_labels_of_8gaussians_are_their_modes():
    x, y = data.labelled_points("8gaussians", 4000, gen(0))
    centres = torch.stack([(y * math.pi / 4).cos(), (y * math.pi / 4).sin()], 1)
    assert (x * math.sqrt(2 + 0.15**2) - 2 * centres).norm(dim=1).max() < 0.9
    assert torch.equal(x, data.sample_points("8gaussians", 4000, gen(0)))


def test_labels_of_mnist_are_its_own(mnist_dir):
    images, labels = data.mnist(mnist_dir)
    dataset = data.load(make_config("mnist", condition="class", data_dir=str(mnist_dir)))
    z0, y = dataset.batch(50, data.Draws(3))
    i = data.Draws(3).integers(60_000, 50)
    assert torch.equal(y, labels[i]) and torch.equal(z0, data.from_uint8(images[i]))


@pytest.mark.parametrize("method", ["reflow", "reflow-distill", "fgm", "cd"])
def test_baselines_carry_the_condition(method, monkeypatch, no_pictures):
    seen = watch(monkeypatch)
    works(f"train.py {CLASS} --method {method} --guidance 2 --pairs 40 --pair-steps 2")
    rows = [y for embedding, y in seen if y is not None and len(y) == 32]
    assert rows and all((y <= 8).all() for y in rows)
    content = read(f"runs/8gaussians-{method}/student.pt")
    assert content["config"]["num_classes"] == 8 and content["config"]["guidance"] == 2


def test_pairs_keep_the_condition_of_their_noise(tmp_path):
    """A network that carries everything to its class number tells whether they match."""
    class ToClass(torch.nn.Module):
        def forward(self, z, t, y=None):
            return (z - y.float()[:, None].expand(-1, 2)) / expand(t, z)

    cfg = make_config("8gaussians", condition="class", pairs=70, pair_steps=1)
    pairs = baselines.Pairs(tmp_path, ToClass(), data.Points("8gaussians", 8), cfg, 3, "cpu")
    z0, _, y = pairs.batch(50, data.Draws(0))
    torch.testing.assert_close(z0[:, 0], y.float(), atol=1e-4, rtol=0)
    assert len(y.unique()) == 8


def test_a_guided_teacher_counts_twice():
    plain, guided = (make_config("8gaussians", condition="class", guidance=w) for w in (1.0, 1.5))
    assert ablation.passes(guided, 4000) - ablation.passes(plain, 4000) == 1


# ---------------------------------------------------------------------------------- as a user


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run by class; tests work on copies of it."""
    folder = tmp_path_factory.mktemp("classes") / "8gaussians"
    works(f"train.py {CLASS} --guidance 1.5 --out {folder}")
    return folder


@pytest.fixture
def run(trained):
    return Path(shutil.copytree(trained, "runs/8gaussians"))


def test_classes_are_drawn_and_measured(run):
    assert is_picture(run / "samples.png") and is_picture(run / "preview_000006.png")
    printed = works("evaluate.py --nfe 1 2 4 --n 400 --guidance 1 3")
    assert "as asked: class, in percent" in printed
    assert "spread within a class, in percent of the data's" in printed
    assert "| teacher, w = 3 " in printed
    guided = next(line for line in printed.splitlines() if line.startswith("| teacher, w = 3"))
    assert guided.split("|")[2].strip() == ""      # one call is half a step of a guided teacher
    printed = works("evaluate.py --median --nfe 2 --n 100 --guidance 1 3")
    for name in ("teachers, w = 1", "teachers, w = 3", "students"):
        assert f"| {name} " in printed

    # raw samples of one class are those of the same noise and class in a longer list
    for name, flags in (("one", "--class 3"), ("two", "--class 3 5"), ("all", "")):
        works(f"sample.py --nfe 2 --n 20 --npz {name}.npz {flags}")
    one, two = (np.load(f"{name}.npz")["arr_0"] for name in ("one", "two"))
    assert np.allclose(one[::2], two[::2], atol=1e-5) and not np.allclose(one[1::2], two[1::2])
    works("sample.py --teacher --guidance 2 --nfe 2 --class 3 --out guided.png")
    works("sample.py --teacher --guidance 2 --nfe 2")
    assert is_picture(run / "samples/teacher-nfe2-w2-seed0.png")
    works("sample.py --trajectory --nfe 2 --class 1 --out path.png")
    assert is_picture("guided.png") and is_picture("path.png")


def test_guidance_changes_what_a_teacher_draws(run):
    raw = []
    for flags in ("", "--guidance 1", "--guidance 3"):
        works(f"sample.py --teacher --nfe 4 --n 50 --npz raw.npz {flags}")
        raw.append(np.load("raw.npz")["arr_0"])
    assert np.array_equal(raw[0], raw[1]) and not np.allclose(raw[0], raw[2], atol=1e-2)


@pytest.mark.parametrize("line, named", [
    ("sample.py --guidance 2", ["--guidance", "w = 1.5"]),
    ("sample.py --teacher --guidance -1", ["--guidance -1"]),
    ("sample.py --teacher --guidance nan", ["--guidance nan"]),
    ("sample.py --class 8", ["--class 8", "0 to 7"]),
    ("evaluate.py --n 100 --guidance inf", ["--guidance inf"]),
    (f"train.py {CLASS} --guidance -1 --out a", ["--guidance -1"]),
    (f"train.py {CLASS} --guidance nan --out a", ["--guidance nan"]),
    (f"train.py {CLASS} --p-null 1.5 --out a", ["--p-null 1.5"]),
    (f"train.py {CLASS} --p-null 0 --guidance 2 --out a", ["--p-null 0", "--guidance 2"]),
    (f"train.py {CLASS} --num-classes 3 --out a", ["there is no flag --num-classes"]),
    (f"train.py {TINY} --dataset moons --condition class", ["moons", "8gaussians", "folder"]),
    (f"train.py {TINY} --dataset 8gaussians --guidance 2 --out a", ["--condition class"]),
    (f"train.py {TINY} --dataset 8gaussians", ["--condition", "runs/8gaussians"]),
])
def test_bad_input(line, named, run):
    refused(line, *named)


def test_an_unconditional_network_has_no_classes_and_no_guidance():
    """The one of weights/, since runs/ has none."""
    refused("sample.py --class 1", "--class", "unconditional")
    refused("sample.py --teacher --guidance 2", "--guidance", "unconditional")


def test_a_teacher_that_never_saw_the_null_condition_is_not_guided(no_pictures):
    works(f"teacher.py {CLASS} --p-null 0 --out phi")
    refused("sample.py --checkpoint phi/teacher.pt --guidance 2", "--p-null 0")
    works("sample.py --checkpoint phi/teacher.pt --guidance 1 --nfe 1 --n 20 --npz a.npz")
    refused(f"train.py {CLASS} --guidance 3 --teacher-checkpoint phi/teacher.pt --out a",
            "--p-null 0", "phi/teacher.pt")


def test_other_labels_are_other_data(monkeypatch):
    images, labels = torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.arange(20) % 10
    keys = []
    for answer in (labels, 9 - labels):
        monkeypatch.setattr(data, "mnist", lambda *_, answer=answer: (images, answer))
        keys.append([data.key(make_config("mnist", condition=c)) for c in ("none", "class")])
    assert keys[0][0] == keys[1][0] and keys[0][1] != keys[1][1]


def test_one_table_holds_one_condition(run, no_pictures):
    works(f"train.py --dataset 8gaussians {TINY} --out plain")
    refused(f"evaluate.py --n 100 --nfe 1 --checkpoint {run}/student.pt plain/student.pt",
            "--condition")
    refused(f"evaluate.py --n 100 --nfe 1 --guidance 2 --checkpoint {run}/teacher.pt",
            "--guidance", "student")


def test_pairs_of_another_guidance_are_other_pairs(tmp_path):
    for w in (1.0, 2.0):
        cfg = make_config("8gaussians", condition="class", guidance=w, pairs=8, pair_steps=1)
        network = model.velocity_network(cfg, (2,))
        torch.manual_seed(0)
        baselines.Pairs(tmp_path, network, data.Points("8gaussians", 8), cfg, 3, "cpu")
    assert len(list(tmp_path.glob("pairs-8-1-3-*.npy"))) == 2


def test_sub_folders_are_classes(taef2_files, no_pictures):
    """Their order is that of their names; a skipped image does not shift the labels."""
    for name, grey in (("cats", 40), ("dogs", 200)):
        Path("animals", name).mkdir(parents=True)
        for i in range(60):
            Image.new("L", (64, 64), grey + i % 3).save(f"animals/{name}/{i:02d}.png")
    Path("animals/cats/05.png").write_bytes(b"no image")
    vae = f"--vae taef2 --vae-weights {taef2_files[0]} {taef2_files[1]} --image-size 64"
    flags = ("--model tiny --channels 8 --heads 2 --disc-channels 8 --batch-size 8 --steps 2 "
             "--teacher-batch-size 8 --teacher-steps 2 --threads 1 --precision fp32")
    printed = works(f"train.py --dataset folder --data-dir animals --condition class {vae} {flags}")
    assert "0 cats, 1 dogs" in printed

    cfg = make_config("folder", data_dir="animals", condition="class", vae="taef2", image_size=64,
                      vae_weights=tuple(map(str, taef2_files)), model="tiny")
    latents = data.load(data.with_classes(cfg))
    assert latents.labels.tolist() == [0] * 59 + [1] * 60
    brightness = latents.array[:, 0, 0].astype(np.float32).mean((1, 2, 3))
    assert abs(brightness[:59].mean() - brightness[59:].mean()) > 5 * brightness[:59].std()
    z0, y = latents.batch(30, data.Draws(0))
    assert {int(k) for k in y} == {0, 1}

    # samples that are measured have the shares of the data
    Path("animals/dogs/rare").mkdir()
    for i in range(30):
        Path(f"animals/cats/{i:02d}.png").unlink()
    y = evaluate.classes_as_in(data.with_classes(cfg), 30)
    assert y.bincount().tolist() == [10, 20]
    Path("animals/mice").mkdir()
    shutil.copy("animals/dogs/00.png", "animals/mice")
    with pytest.raises(UserError, match="3 sub-folders, and the network has 2"):
        evaluate.classes_as_in(replace(cfg, num_classes=2), 30)
    shutil.rmtree("animals/mice")

    Path("animals/loose.png").write_bytes(Path("animals/dogs/00.png").read_bytes())
    refused(f"train.py --dataset folder --data-dir animals --condition class {vae} {flags} --out b",
            "loose.png", "sub-folders")
    Path("zipped/animals/cats").mkdir(parents=True)
    shutil.copy("animals/loose.png", "zipped/animals/cats")
    refused("train.py --dataset folder --data-dir zipped --condition class",
            "all images lie in animals")


# ----------------------------------------------------------------------- experiments on guidance

SHORT = "--channels 16 --blocks 1 --steps 4 --n-rf 1 --teacher-steps 4 --lr-warmup 1 --threads 1"


def test_guidance_against_truncation(monkeypatch, no_pictures):
    monkeypatch.setattr(ablation, "GUIDANCE", (1.0, 3.0))
    monkeypatch.setattr(ablation, "TRUNCATION", (0.1, 0.4))
    line = f"study.ablation guidance --dataset 8gaussians --condition class {SHORT} --n 200 --nfe 1"
    printed = works(line)
    root = Path("runs/ablation/8gaussians")
    saved = json.loads((root / "guidance.json").read_text())
    assert "guidance against truncation" in printed and is_picture(root / "guidance.png")
    for name in ("teacher, w = 3", "CD, w = 1, t_trunc = 0.1", "all, w = 3, t_trunc = 0.4"):
        assert f"| {name} " in printed
    configs = [read(path)["config"] for path in root.glob("*/student.pt")]
    made = sorted((c["guidance"], c["t_trunc"], "gan" in c["losses"]) for c in configs)
    assert made == [(w, t, gan) for w in (1.0, 3.0) for t in (0.1, 0.4) for gan in (False, True)]

    # a second time everything is read from files, also what was asked of guided teachers
    monkeypatch.setattr("evaluate.measure", None)
    works(line)
    assert json.loads((root / "guidance.json").read_text())["rows"] == saved["rows"]
    refused("study.ablation guidance --dataset 8gaussians", "--condition class")


def test_everything_is_guided(monkeypatch):
    """The student of "teacher alone" is the one of train.py; the others differ."""
    from study import guide_everything

    kept, distil = [], guide_everything.distil
    monkeypatch.setattr(guide_everything, "distil", lambda *a: kept.append(distil(*a)) or kept[-1])
    monkeypatch.setattr(Run, "pictures", lambda *_: [])        # those of teacher and plain student
    printed = works(f"study.guide_everything {SHORT} --n 200 --nfe 1 2")
    for name in ("teacher alone", "teacher, theta~", "teacher, theta~, theta", "sampled guided"):
        assert f"| {name} " in printed or name in printed
    assert is_picture("runs/guide-everything/samples.png")
    works(f"train.py --dataset 8gaussians --condition class --guidance 1.5 {SHORT}")
    plain = read("runs/8gaussians/student.pt")["ema"]
    equal = [all(torch.equal(v, plain[k]) for k, v in ema.state_dict().items()) for ema in kept]
    assert equal == [True, False, False]

    monkeypatch.setattr(sample, "draw", lambda *args, **more: torch.full((200, 2), math.inf))
    refused(f"study.guide_everything {SHORT} --n 200 --nfe 1", "no samples", "--lr")
    refused("study.guide_everything --dataset captioned", "captioned")
    refused("study.ablation losses --dataset captioned", "captioned")
