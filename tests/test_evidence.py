"""What the numbers rest on: measures against references, features, baselines, tables, figures."""

import hashlib
import json
import math
import pickle
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets

import data
import evaluate
import sample
import train
from config import make_config
from harness import UserError, machine, pictures
from harness.log import Diverged
from losses import consistency_loss, distance, expand, interpolate, time_skip, z0_prediction
from model import copy_of, flow_map, velocity_network
from harness.run import Run
from harness.script import parse_config
from running import call, copy_faces, gen, half, is_picture, read, refused, rows, same, works
from study import ablation, baselines, crossing, dimension, features, oversaturation, speed

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
SMALL = ("--steps 12 --teacher-steps 12 --channels 16 --blocks 1 --disc-channels 8 --batch-size 32 "
         "--teacher-batch-size 32 --lr-warmup 2 --threads 1 --n-rf 0 --n-gan 0 --log-every 4")
PAIRS = "--pairs 64 --pair-steps 3"


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


# ------------------------------------------------------------------------------ measuring


@pytest.mark.parametrize("d, n, m", [(2, 1000, 1000), (64, 700, 700), (2, 300, 900)])
def test_precision_and_recall_equal_prdcs(d, n, m):
    from prdc import compute_prdc
    real = torch.randn(n, d, generator=gen())
    fake = 0.8 * torch.randn(m, d, generator=gen(1)) + 0.3
    wanted = compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=3)
    precision, recall = evaluate.precision_recall(real, fake)
    assert precision == pytest.approx(wanted["precision"], rel=1e-3)
    assert recall == pytest.approx(wanted["recall"], rel=1e-3)
    assert 0.01 < recall < 1 and 0.1 < precision <= 1


def test_precision_and_recall_of_known_clouds():
    real, near = torch.randn(500, 2, generator=gen()), 1e-4 * gaussians(500, 1)
    half = torch.cat([real[:250], real[:250] + 100])           # the other half is far away
    for fake, precise, recalled in ((real, (1, 1), (1, 1)), (real + 100, (0, 0), (0, 0)),
                                    (half, (0.5, 0.5), (0.7, 1)),
                                    (real[:1] + near, (0.9, 1), (0, 0.05))):     # one mode alone
        for share, (low, high) in zip(evaluate.precision_recall(real, fake), (precise, recalled)):
            assert low <= share <= high
    with pytest.raises(ValueError, match="more than k"):
        evaluate.precision_recall(real[:3], real)


class Field(torch.nn.Module):
    """A velocity in closed form, velocity(zt, t, *values); t is (B, 1), values are parameters."""

    def __init__(self, velocity, *values):
        super().__init__()
        self.velocity = velocity
        self.values = torch.nn.ParameterList(map(torch.tensor, values))

    def forward(self, zt, t, y=None):
        return self.velocity(zt, t[:, None], *self.values)


def scale(a):
    """f(z, t) = a z: N Euler steps multiply z1 by a known number."""
    return Field(lambda zt, t: (1 - a) * zt / t)


def gaussians(n, seed):
    return torch.randn(n, 2, generator=gen(seed))


@pytest.fixture
def normal_data(monkeypatch):
    """2D data that are N(0, I), whatever the name says."""
    monkeypatch.setattr(data, "sample_points", lambda name, n, generator=None: torch.randn(
        n, 2, generator=generator))
    return evaluate.Reference(make_config("moons"), 4000)


def test_measures_of_a_perfect_and_of_a_shrinking_network(normal_data):
    settings = dict(reference=normal_data, shape=(2,), n=4000, batch=900)
    perfect, = evaluate.measure("perfect", scale(1.0), [1], **settings)
    assert perfect["distance"] < 2.5 * normal_data.floor["distance"]
    assert perfect["precision"] > 0.9 and perfect["recall"] > 0.9
    assert perfect["spread"] == pytest.approx(1, abs=0.03) and perfect["consistency"] == 0

    one, two = evaluate.measure("shrinking", scale(0.5), [1, 2], **settings)
    assert list(one) == ["network", "nfe", "seed", *evaluate.MEASURES] and one["per_second"] > 0
    # at t = 1 half the step of (z - z/2): 3/4 z; at t = 1/2 the whole way to half of that
    assert (one["spread"], two["spread"]) == pytest.approx((0.5, 0.375), abs=0.02)
    assert two["consistency"] == pytest.approx(0.125, abs=0.005)
    assert one["distance"] == pytest.approx(1000 * (1 - 0.5), rel=0.1)
    assert one["recall"] < perfect["recall"] - 0.05 and one["precision"] > 0.9
    # consistency needs the one-step sample even if NFE 1 is not measured
    alone, = evaluate.measure("shrinking", scale(0.5), [2], **settings)
    assert alone["consistency"] == two["consistency"]


def test_rows_of_one_network_are_shown_by_medians_and_half_their_range(normal_data):
    some = [dict.fromkeys(evaluate.MEASURES, 0.25) | {"network": name, "nfe": 1, "distance": d}
            for name, d in (("a", 5.0), ("b", 7.0), ("a", 1.0), ("a", 2.0))]
    text = evaluate.report("moons", normal_data, some)
    assert "half the range of 3 runs" in text
    assert "| a                 | 2.0 +- 2.0 (0.25) |" in text
    assert "| b                 | 7.0 (0.25)        |" in text


def test_seeds_of_the_noise_and_solvers(moons_run):
    printed = works("evaluate.py --nfe 2 1 2 --n 300 --seeds 3")
    saved = json.loads(Path("runs/moons/evaluation.json").read_text())
    assert len(saved["rows"]) == 3 * (3 + 2)
    ones = [r["distance"] for r in saved["rows"] if r["network"] == "student" and r["nfe"] == 1]
    assert len(set(ones)) == 3 and f"{sorted(ones)[1]:.1f} +- " in printed

    printed = works("evaluate.py --nfe 1 3 --n 300 --solver stochastic")
    assert "moons, stochastic" in printed and "| 100" in printed


def test_numbers_that_are_not_finite_end_in_a_sentence(normal_data, moons_run):
    for wrong in (math.nan, 1e12):
        with pytest.raises(UserError, match="not finite"):
            evaluate.measure("s", scale(wrong), [1], normal_data, (2,), 4000)
    content = read(moons_run / "student.pt")
    content["ema"]["last.weight"][:] = math.nan
    torch.save(content, moons_run / "student.pt")
    refused("evaluate.py --n 100", "student.pt", "not finite")
    with pytest.raises(ValueError):                # no bare NaN, which strict parsers reject
        evaluate.write("t", "moons", normal_data, [{"distance": math.nan}], "")


# ------------------------------------------------------------------------------ features


def test_inception_is_pytorch_fids(monkeypatch, tmp_path):
    from pytorch_fid import inception as fid
    from torchvision.models import inception_v3
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    file = tmp_path / "hub/hub/checkpoints" / Path(fid.FID_WEIGHTS_URL).name
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict(),
               file)
    grey = torch.rand(2, 1, 64, 64, generator=gen())
    with torch.no_grad():
        wanted = fid.InceptionV3().eval()(grey.expand(-1, 3, -1, -1))[0].flatten(1)
        assert wanted.shape == (2, 2048)
        assert torch.allclose(features.inception()(2 * grey - 1), wanted, atol=1e-4)

    # weights that cannot be read or fetched, and a package that is not there
    file.write_bytes(b"<html>")
    with pytest.raises(UserError, match=f"by hand as {file}.*--features"):
        features.inception()
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    with pytest.raises(UserError, match="pip install pytorch-fid"):
        features.inception()


def test_features_of_your_own(monkeypatch):
    cfg, images = make_config("mnist"), 2 * torch.rand(230, 1, 28, 28, generator=gen()) - 1

    def good(x):
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3)), x[:, 0, 14, 14]], 1)

    functions = {
        "flat": (lambda x: x.mean((1, 2, 3)), r"\(100,\)"), "text": (lambda x: "words", "'str'"),
        "fails": (lambda x: x @ torch.ones(3, 3), "mat1"), "nan": (lambda x: good(x) / 0, "finite"),
        "changing": (lambda x: good(x)[:, :2 if len(x) == 100 else 3], r"\(30, 3\)"),
        "none": (lambda x: good(x)[:, :0], r"\(100, 0\)"), "exits": (lambda x: sys.exit(3), "3"),
        "complex": (lambda x: good(x) * 1j, "complex")}
    own = SimpleNamespace(good=good, wide=lambda x: x.flatten(1)[:, :64],
                          **{name: function for name, (function, _) in functions.items()})
    monkeypatch.setitem(sys.modules, "own", own)
    for name, (_, word) in functions.items():
        with pytest.raises(UserError, match=f"own:{name} failed on .* images.*{word}"):
            features.extractor(cfg, f"own:{name}")[1](images)
    with pytest.raises(UserError, match="for images"):
        evaluate.Reference(make_config("moons"), 10, "own:good")
    digits = torch.zeros(60, 1, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(data, "mnist", lambda *_: (digits, torch.zeros(60, dtype=torch.long)))
    with pytest.raises(UserError, match="too few"):
        evaluate.Reference(cfg, 50, "own:wide")
    name, function, classes = features.extractor(cfg, "own:good")
    assert classes is None
    seen = features.from_uint8(features.to_uint8(images))
    assert name == "own:good" and torch.equal(function(images)[:, 2], seen[:, 0, 14, 14])

    Path("own_exit.py").write_text("raise SystemExit(3)")
    for spec in ("own:absent", "pathlib:os", "no_such_file:f", "own", "", "own_exit:f"):
        with pytest.raises(UserError, match="my_module:my_function"):
            features.extractor(cfg, spec)


def test_each_data_set_of_digits_has_its_own_classifier(monkeypatch):
    digits = torch.randint(256, (300, 1, 28, 28), dtype=torch.uint8, generator=gen())
    labels, nets = torch.randint(10, (300,), generator=gen(1)), []
    for images in (digits, digits, 255 - digits):
        monkeypatch.setattr(data, "mnist", lambda *_, images=images, **__: (images, labels))
        nets.append(features.mnist_classifier("data", Path("here"), epochs=1).state_dict())
    assert same(nets[0], nets[1])
    assert not any(torch.equal(a, b) for a, b in zip(nets[0].values(), nets[2].values()))
    assert len(list(Path("here").glob("classifier-*.pt"))) == 2


def test_latents_are_measured_as_images(faces_dir, taef2_files, no_pictures):
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


# ------------------------------------------------------------------------------ CIFAR-10


@pytest.fixture
def cifar10_files(tmp_path, monkeypatch):
    """150 images of noise as torchvision stores CIFAR-10; nothing can be downloaded."""
    folder, random = tmp_path / "data/cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)

    def written(name, **content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name, n):
        return written(name, data=random.integers(0, 256, (n, 3072), np.uint8),
                       labels=[i % 10 for i in range(n)])

    made = dict(train_list=[batch(f"data_batch_{i}", 30) for i in range(1, 6)],
                test_list=[batch("test_batch", 20)], url="http://127.0.0.1:9/cifar-10.tar.gz")
    name, md5 = written("batches.meta", label_names=[str(i) for i in range(10)])
    made["meta"] = {"filename": name, "key": "label_names", "md5": md5}
    for attribute, value in made.items():
        monkeypatch.setattr(datasets.CIFAR10, attribute, value)
    monkeypatch.setenv("no_proxy", "*")
    return folder


CIFAR = ("--dataset cifar10 --channels 8 --mult 1 2 --blocks 1 --heads 2 --disc-channels 8 --steps "
         "2 --teacher-steps 2 --batch-size 8 --teacher-batch-size 8 --patch-size 4 --threads 1 "
         "--device cpu")


def test_cifar10_is_learnt_by_class_and_measured(cifar10_files, no_pictures):
    with open(cifar10_files / "data_batch_1", "rb") as file:
        first = pickle.load(file)["data"][0].reshape(3, 32, 32)
    images, labels = data.images_of(make_config("cifar10", condition="class"))
    assert images.shape == (300, 3, 32, 32) and labels[:12].tolist() == [*range(10), 0, 1]
    assert (images[0].numpy() == first).all() and torch.equal(images[150], images[0].flip(2))

    Path("own_few.py").write_text(
        "def few(x):\n    return x[:, :, ::8, ::8].flatten(1)[:, :6]\n")
    for more in ("--condition class", "--method fgm --out fgm"):
        works(f"train.py {CIFAR} {more}")
    assert read("runs/cifar10/student.pt")["config"]["num_classes"] == 10
    printed = works("evaluate.py --checkpoint fgm/student.pt --n 40 --nfe 1 2 --threads 1 --device "
                    "cpu --features own_few:few")
    assert "own_few:few, 40 samples against 150 images" in printed
    student = [r for r in json.loads(Path("fgm/evaluation.json").read_text())["rows"]
               if r["network"] == "student"]
    assert [r["nfe"] for r in student] == [1]      # FGM's network saw t = 1 alone


def test_cifar10_cut_short_or_absent(cifar10_files):
    half(cifar10_files / "data_batch_3")
    refused(f"train.py {CIFAR}", "read CIFAR10", "cifar-10-batches-py")
    shutil.rmtree(cifar10_files)
    refused(f"train.py {CIFAR}", "download CIFAR10", "--data-dir")
    refused(f"train.py {CIFAR} --data-dir nowhere", "nowhere", "cifar-10-batches-py")


@pytest.mark.parametrize("more, wanted", [
    ("", dict(channels=64, lr=1e-4, betas=(0.9, 0.999))),
    ("--model paper", dict(channels=128, blocks=4, teacher_steps=400_000, fgm_alpha=1.0)),
    ("--model paper --method fgm", dict(channels=128, lr=3e-5, disc_betas=(0.0, 0.999),
                                        fgm_alpha=0.5, fgm_clip=1.0))], ids=str)
def test_presets_of_cifar10(more, wanted):
    cfg = parse_config("", ["--dataset", "cifar10", *more.split()])[0]
    assert {name: getattr(cfg, name) for name in wanted} == wanted


# ------------------------------------------------------- features of the data, samples of files


def noise_images(folder, n=30, side=32, seed=0):
    """A folder of n smooth PNG images that are unlike one another."""
    Path(folder).mkdir()
    colours = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), np.uint8)
    for i, small in enumerate(colours):
        Image.fromarray(small).resize((side, side)).save(f"{folder}/{i:02}.png")


def images_of(folder):
    """The images of a folder as the networks see them."""
    return features.from_uint8(torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(
        2, 0, 1) for path in sorted(Path(folder).iterdir())]))


def corners(x):
    return x[:, :, ::24, ::24].flatten(1)[:, :6]


def test_features_of_the_data_are_kept_for_these_images_and_this_function(monkeypatch, capsys):
    noise_images("photos")
    monkeypatch.setattr(features, "AT_A_TIME", 8)
    cfg, seen = make_config("folder", data_dir="photos", image_size=32), []

    def of_data(cfg=cfg, name="own", function=corners):
        seen.clear()
        return features.data_features(cfg, name, lambda x: seen.append(len(x)) or function(x))

    values, std = of_data()
    pixels = images_of("photos")
    assert torch.equal(values, corners(pixels)) and sum(seen) == 30
    assert std == pytest.approx(pixels.double().var(0).mean().sqrt().item())
    path, = Path("latents").glob("photos-features-*.npz")

    # used again, for which the first images alone are looked at
    again, same_std = of_data()
    assert torch.equal(again, values) and same_std == std and seen == [8]
    # a file that is cut short, and a function that changed, make it anew and say so
    path.write_bytes(path.read_bytes()[:-300])
    assert torch.equal(of_data()[0], values) and sum(seen) == 30
    assert f"{path} is damaged, or of other features" in capsys.readouterr().out
    assert torch.allclose(of_data(function=lambda x: 1.1 * corners(x))[0], 1.1 * values)
    assert of_data(function=lambda x: corners(x)[:, :3])[0].shape == (30, 3)
    assert capsys.readouterr().out.count("other features") == 2

    # other images, another size, another name: another file
    shutil.copytree("photos", "more/photos")
    shutil.copy("photos/00.png", "more/photos/99.png")
    assert len(of_data(replace(cfg, data_dir="more/photos"))[0]) == 31
    of_data(replace(cfg, image_size=16), function=lambda x: x.mean((2, 3))), of_data(name="other")
    assert len(list(Path("latents").glob("*.npz"))) == 4
    Path("more/photos/50.png").write_bytes(b"no image")
    assert len(of_data(replace(cfg, data_dir="more/photos"))[0]) == 31
    assert "skipped 1 images" in capsys.readouterr().out


def test_jpeg_is_that_of_torchvisions_save_image():
    from torchvision.utils import save_image
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8, generator=gen())
    for image, ours in zip(pixels, features.as_jpeg(pixels)):
        save_image(image / 255, "image.jpg")
        assert torch.equal(ours, torch.from_numpy(np.array(Image.open("image.jpg"))).permute(
            2, 0, 1))
        assert not torch.equal(ours, image)


def test_samples_of_files_and_the_papers_protocol(monkeypatch):
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(corners=corners))
    noise_images("photos"), noise_images("drawn", 20, seed=1)
    array = np.stack([np.array(Image.open(p)) for p in sorted(Path("drawn").iterdir())])
    np.savez("drawn.npz", arr_0=array)
    np.savez_compressed("small.npz", arr_0=array)
    line = "evaluate.py --real photos --features own:corners --device cpu --threads 1"
    lines = works(f"{line} --samples drawn drawn.npz small.npz").splitlines()
    wanted = evaluate.frechet_distance(corners(images_of("drawn")), corners(images_of("photos")))
    assert [line.split("|")[2].strip() for line in lines[-3:]] == [f"{wanted:.1f}"] * 3

    # the paper's protocol: as many samples as the paper has, and JPEG on both sides
    refused(f"{line} --npz drawn.npz --protocol paper", "50,000 samples, not 20")
    monkeypatch.setattr(evaluate, "PAPER_SAMPLES", 20)
    printed = works(f"{line} --npz drawn.npz --protocol paper")
    fake, real = (corners(features.from_uint8(features.as_jpeg(features.to_uint8(images_of(name)))))
                  for name in ("drawn", "photos"))
    wanted = evaluate.frechet_distance(fake, real)
    assert "own:corners of JPEG images, 20 samples against 30 images" in printed
    assert f"| drawn.npz | {wanted:.1f} " in printed


def test_a_number_of_few_samples_never_stands_beside_the_papers(monkeypatch):
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(corners=corners))
    noise_images("photos", side=256)
    cfg = make_config("celebahq", data_dir="photos")
    monkeypatch.setattr(evaluate, "PAPER_SAMPLES", 20)
    assert "not comparable with the paper's FID" in evaluate.Reference(cfg, 20, "own:corners").name
    paper = evaluate.Reference(cfg, 20, "own:corners", paper=True).name
    assert "JPEG" in paper and "not comparable" not in paper


@pytest.mark.parametrize("array, named", [
    (np.zeros((20, 32, 32, 3), np.float32), ["float32"]),
    (np.zeros((20, 32, 32), np.uint8), ["(20, 32, 32)"]),
    (np.zeros((20, 32, 16, 3), np.uint8), ["square"]),
    (np.zeros((20, 28, 28, 1), np.uint8), ["(20, 28, 28, 1)"]),
    (np.zeros((0, 32, 32, 3), np.uint8), ["empty"]),
    (np.zeros((3, 32, 32, 3), np.uint8), ["3 samples are too few"]),
], ids=str)
def test_samples_that_cannot_be_measured(array, named, monkeypatch):
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(corners=corners))
    noise_images("photos")
    np.savez("s.npz", arr_0=array)
    refused("evaluate.py --npz s.npz --real photos --features own:corners --device cpu", *named)
    if array.shape == (3, 32, 32, 3):
        refused("evaluate.py --dataset celebahq --npz s.npz --data-dir photos --device cpu",
                "32 x 32", "256 x 256")
        half(Path("s.npz"))
        refused("evaluate.py --npz s.npz --real photos --device cpu", "s.npz cannot be read")


def test_when_another_process_fails_each_one_ends(monkeypatch):
    def gone():
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(UserError, match="another process has failed.*closed"):
        machine.together(gone)
    monkeypatch.setattr(machine, "FIRST", False)
    with pytest.raises(SystemExit):
        machine.together(gone)


# ------------------------------------------------------------------------------ baselines


@pytest.mark.parametrize("method", ["cd", *baselines.STEPS])
def test_a_baseline_end_to_end(method, moons_run, no_pictures):
    line = f"train.py --dataset moons --method {method} {SMALL} {PAIRS}"
    folder = Path(f"runs/moons-{method}")
    assert f"wrote: {folder}/student.pt" in works(line)
    student, teacher = read(folder / "student.pt"), read(moons_run / "teacher.pt")
    assert student["config"]["method"] == method and student["seconds"] > 0
    # it began at the teacher that was there, and moved
    assert same(read(folder / "teacher.pt")["ema"], teacher["ema"])
    assert not torch.equal(student["ema"]["last.weight"], teacher["ema"]["last.weight"])
    log = rows(folder / "log.csv")
    assert list(log[0]) == ["step", *train.STEPS[method][1], "per_second"]
    assert int(log[-1]["step"]) == 12
    assert "already finished" in works(line)
    works(f"sample.py --checkpoint {folder}/student.pt --nfe 1 --n 9 --npz raw.npz")
    if method == "cd":                             # plain CD is the first rung of the ladder
        works(f"train.py --dataset moons --losses cd {SMALL} --out rung")
        assert same(read("rung/student.pt")["ema"], student["ema"])


@pytest.mark.parametrize("method, stop", [("reflow", 5), ("reflow-distill", 5), ("flowmap", 11),
                                          ("reflow-distill", 11), ("fgm", 11)])
def test_a_baseline_resumes_bit_for_bit(method, stop, moons_run, monkeypatch, no_pictures):
    line = f"train.py --dataset moons --method {method} {SMALL} {PAIRS} --threads 1"
    works(f"{line} --out whole")
    with monkeypatch.context() as m:
        stop_at(stop, m)
        ended = call(f"{line} --out parts")
    assert ended.code == 130
    if method == "reflow-distill" and stop == 5:   # in its first stage, a run of its own
        assert "the same command continues" in ended.err
        works(f"{line} --out parts")
    else:
        assert "--out parts --resume" in ended.err
        works("train.py --resume --dataset moons --out parts")
    a, b = (read(Path(p) / "student_resume.pt") for p in ("whole", "parts"))
    assert same(a["student"], b["student"]) and same(a["ema"], b["ema"])


def stop_at(iteration, monkeypatch):
    """Ctrl-C after so many iterations of all stages and runs."""
    count = iter(range(1, 1000))

    def breaking(*args, step):
        if next(count) == iteration:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    for name, (step, terms) in list(train.STEPS.items()):
        monkeypatch.setitem(train.STEPS, name, (partial(breaking, step=step), terms))


def test_starting_anew_takes_nothing_of_the_older_run(moons_run, monkeypatch, no_pictures):
    line = f"train.py --dataset moons --method reflow-distill {SMALL} {PAIRS}"
    works(f"{line} --out whole --seed 1")
    works(f"train.py --dataset moons {SMALL} --out parts")     # another method's log
    works(f"{line} --out parts --overwrite")                   # another seed's pairs
    with monkeypatch.context() as m:
        stop_at(5, m)                                          # in the nested 2-RF
        assert call(f"{line} --out parts --seed 1 --overwrite").code == 130
    works(f"{line} --out parts --seed 1")                      # goes on
    a, b = (read(Path(p) / "student.pt")["ema"] for p in ("whole", "parts"))
    assert same(a, b)
    whole, parts = (Path(p).glob("pairs-*.npy") for p in ("whole", "parts"))
    assert [p.read_bytes() for p in whole] == [p.read_bytes() for p in parts]
    refused("train.py --resume --dataset moons --out parts --steps 40", "--steps 40")


def test_pairs_are_the_teachers_and_go_on_where_they_stopped(monkeypatch):
    monkeypatch.setattr(baselines, "at_a_time", lambda dataset: 8)
    network, cfg, calls = scale(0.5), make_config("moons", pairs=50, pair_steps=2), []
    make = partial(baselines.Pairs, Path(), network, data.Points("moons"), cfg, 3, "cpu")
    pairs = make()
    assert torch.allclose(pairs.z0, 0.375 * pairs.z1, atol=1e-6)
    assert torch.equal(pairs.z1, sample.noise((2,), 50, 3))

    # rows that exist are not made again; missing ones are
    path, = Path().glob("pairs-*.npy")
    array = np.load(path)
    array[:16], array[40:] = 7.0, np.nan
    np.save(path, array)
    network.register_forward_hook(lambda *_: calls.append(1))
    again = make()
    assert (again.z0[:16] == 7).all() and torch.equal(again.z0[40:], pairs.z0[40:])
    assert len(calls) == 2 * 2                                    # two batches, two steps each
    z0, z1, _ = again.batch(10, data.Draws(0))
    assert torch.allclose(z0, torch.where(z0 == 7, z0, 0.375 * z1), atol=1e-6)

    for damage in (lambda: np.save(path, array[:30]), lambda: path.write_bytes(b"no numbers")):
        damage()
        with pytest.raises(UserError, match="pairs-50-2-3-.*npy"):
            make()


def run_of(method, **more):
    cfg = make_config("moons", method=method, **dict(channels=16, blocks=1, batch_size=64) | more)
    torch.manual_seed(0)
    teacher = copy_of(velocity_network(cfg, (2,)))
    net = train.begin(teacher, teacher, cfg, (2,), torch.device("cpu"))
    return cfg, net, data.Draws(0)


@pytest.mark.parametrize("method", ["reflow", "reflow-distill"])
def test_pairs_teach_the_straight_velocity_between_them(method):
    cfg, net, draws = run_of(method)
    seen = []
    net.student.register_forward_hook(lambda m, args, out: seen.append((args[0], args[1], out)))
    z0, z1 = gaussians(64, 1), gaussians(64, 2)
    terms = train.STEPS[method][0](net, (z0, z1, None), 0, cfg, draws)
    (zt, t, v), = seen
    assert torch.allclose(zt, z0 + t[:, None] * (z1 - z0), atol=1e-6)
    assert (t == 1).all() if method == "reflow-distill" else 0 < t.min() < 0.2 < 0.8 < t.max() < 1
    loss = terms["fm" if method == "reflow" else "onestep"].item()
    assert loss == pytest.approx((z1 - z0 - v).square().mean().item())


def maps(shape):
    """Two flow maps, as student and theta~, that answer differently for every r."""
    cfg = make_config("moons" if len(shape) == 1 else "mnist", channels=16, blocks=1)
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        networks.append(flow_map(velocity_network(cfg, shape)))
        for p in networks[-1].parameters():        # layers that begin at zero, too
            p += 0.1 * torch.randn(p.shape)
    return networks


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("metric", ["pseudo-huber", "l2"])
def test_the_flow_map_loss_with_r_at_0_is_plain_consistency(shape, metric):
    student, target = maps(shape)
    zt, v, z0 = (torch.randn(32, *shape, generator=gen(i)) for i in range(3))
    t = torch.rand(32, generator=gen(3))
    d_s, _ = time_skip(t, *torch.rand(2, 32, generator=gen(4)), 0.1)
    s, step = t - d_s, expand(d_s, zt)
    f_t, f_lo = z0_prediction(student, zt, t), z0_prediction(target, zt - step * v, s)
    wanted = consistency_loss(f_t, f_lo, z0, t, s, 0.0, "landing", metric)
    got = baselines.flow_map_loss(student, target, v, zt, t, s, torch.zeros(32), None, metric)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    # if r = s, the step is the teacher's
    wanted = distance(step * student(zt, t, None, s), step * v)
    got = baselines.flow_map_loss(student, target, v, zt, t, s, s)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)


class GaussianMap(torch.nn.Module):
    """The exact flow map of N(0, 1): its paths are z1 s(t), so a step multiplies by s(r) / s(t)."""

    span_emb = "told r"

    def forward(self, zt, t, y=None, r=None):
        t, r = t[:, None], torch.zeros(1, 1) if r is None else r[:, None]
        return zt * (1 - oversaturation.s(r) / oversaturation.s(t)) / (t - r)


def test_the_flow_map_of_a_gaussian_in_closed_form():
    z1, exact = torch.randn(64, 1, generator=gen()).double(), GaussianMap()
    for nfe in (1, 2, 4, 16):                      # no oversaturation: std 1 with any number
        *_, (_, _, z0) = sample.euler(exact, z1, nfe)
        assert torch.allclose(z0, z1, atol=1e-6)
    # it is the fixed point: what is left is the teacher's Euler step, whose error is of order 2
    t, errors = torch.linspace(0.3, 1, 64).double(), []
    zt = z1 * oversaturation.s(t)[:, None]
    v = zt * ((2 * t - 1) / oversaturation.s(t) ** 2)[:, None]           # z s'(t) / s(t)
    for d in (0.1, 0.05):
        loss = baselines.flow_map_loss(exact, exact, v, zt, t, t - d, t / 3, metric="l2")
        errors.append(loss.item())
    assert errors[0] < 1e-3 and errors[0] / errors[1] == pytest.approx(2**4, rel=0.25)


def test_a_new_flow_map_is_its_teacher_and_then_depends_on_r():
    torch.manual_seed(0)
    for shape, cfg in (((2,), make_config("moons")), ((1, 28, 28), make_config("mnist"))):
        network, z, t = velocity_network(cfg, shape), torch.randn(4, *shape), torch.rand(4)
        told = flow_map(network)
        assert torch.equal(told(z, t, None, t / 2), network(z, t))
        assert network.span_emb is None            # the teacher stays as it is
    student, _ = maps((2,))
    z, t = torch.randn(4, 2), torch.rand(4)
    assert torch.equal(student(z, t), student(z, t, None, torch.zeros(4)))
    assert (student(z, t) - student(z, t, None, t / 2)).abs().min() > 1e-4


def test_a_flow_map_learns_steps_to_any_r_and_one_in_four_to_0():
    cfg, net, draws = run_of("flowmap", batch_size=2000)
    seen = {}
    for name in ("student", "target"):
        getattr(net, name).register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: args}))
    before = [p.clone() for p in net.target.parameters()]
    baselines.flow_map_step(net, (gaussians(2000, 1), None), 0, cfg, draws)
    (_, t, _, r), (_, s, _, again) = seen["student"], seen["target"]
    assert torch.equal(r, again) and (r <= s).all() and (s <= t).all()
    assert (t - s).max() <= cfg.t_skip + 1e-6
    assert (r == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    below = (r / s)[r > 0]
    assert below.mean() == pytest.approx(0.5, abs=0.03) and below.std() == pytest.approx(
        12 ** -0.5, abs=0.02)
    assert not same(list(net.target.parameters()), before)


def test_fgm_loss_is_the_identity_of_its_parts():
    u, v, c = (gaussians(50, i) for i in range(3))
    l2 = 2 * ((u - v) * (v - c)).mean().item()
    sum_of_both = ((u - c).square() - (v - c).square()).mean().item()      # L1 + L2
    assert sum_of_both == pytest.approx((u - v).square().mean().item() + l2, rel=1e-5)
    for alpha, wanted in ((0.5, sum_of_both), (1.0, l2)):
        assert baselines.fgm_loss(u, v, c, alpha).item() == pytest.approx(wanted, rel=1e-5)
        assert baselines.fgm_loss(u, u, c, alpha).item() == 0  # the online flow is the teacher's


def test_fgm_steps_generator_and_flow_without_data():
    cfg, net, draws = run_of("fgm")
    before, teacher = ([p.clone() for p in n.parameters()] for n in (net.disc, net.teacher))
    calls = {"teacher": 0, "disc": 0, "student": 0}
    for name in calls:
        getattr(net, name).register_forward_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1}))
    first = baselines.fgm_step(net, (torch.full((64, 2), math.nan), None), 0, cfg, draws)
    assert all(x.isfinite() for x in first.values())           # the data are not read
    k = baselines.FAKE_STEPS
    assert calls == {"teacher": 1, "disc": k + 1, "student": k + 1}
    assert same(list(net.teacher.parameters()), teacher)
    assert not same(list(net.disc.parameters()), before)
    assert all(p.grad is None for n in (net.teacher, net.disc) for p in n.parameters())


def test_fgms_alpha_and_clip_reach_both_networks(monkeypatch):
    moved, alphas = {}, []
    real = baselines.fgm_loss
    monkeypatch.setattr(baselines, "fgm_loss", lambda u, v, c, alpha: alphas.append(alpha) or real(
        u, v, c, alpha))
    for clip in (0.0, 1e-3):
        cfg, net, draws = run_of("fgm", fgm_clip=clip, fgm_alpha=0.5)
        net.opt, net.opt_disc = (torch.optim.SGD(n.parameters(), 1.0)
                                 for n in (net.student, net.disc))
        start = [torch.cat([p.flatten() for p in n.parameters()]) for n in (net.student, net.disc)]
        terms = baselines.fgm_step(net, (gaussians(64, 1), None), 0, cfg, draws)
        moved[clip] = [(torch.cat([p.flatten() for p in n.parameters()]) - a).norm().item()
                       for n, a in zip((net.student, net.disc), start)]
        assert terms["grad_norm"] > 1e-3           # the one before the clip
    # for sums over the two coordinates the limit is 1e-3, so for means it is half of it
    assert moved[1e-3][0] == pytest.approx(5e-4, rel=0.01) and moved[0.0][0] > 1e-3
    assert moved[1e-3][1] <= baselines.FAKE_STEPS * 5.1e-4 < moved[0.0][1]
    assert alphas == [0.5, 0.5]


def test_fgm_learns_a_gaussian_from_its_exact_teacher():
    """Teacher N(m, s^2) in closed form; a generator of two numbers finds m and s, without data."""
    def exact(zt, t, mean, std):                   # the velocity of independent noise
        var = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / var * (zt - (1 - t) * mean) - mean

    def affine(zt, t, mean, std):                  # f(z1, 1) = mean + std z1
        return zt - (mean + std * zt)

    cfg = make_config("moons", method="fgm", ema=0.9)
    student, fake = Field(affine, 0.0, 1.0), Field(exact, 0.0, 1.0)
    opt, opt_disc = (torch.optim.AdamW(n.parameters(), 0.02, (0.0, 0.99), weight_decay=0.0)
                     for n in (student, fake))
    net = SimpleNamespace(teacher=Field(exact, 1.5, 0.5).requires_grad_(False), student=student,
                          disc=fake, ema=Field(affine, 0.0, 1.0), opt=opt, opt_disc=opt_disc)
    draws = data.Draws(0)
    for step in range(400):
        draws.at(step)
        baselines.fgm_step(net, (torch.zeros(256, 1), None), step, cfg, draws)
    mean, std = (value.item() for value in student.values)
    assert (mean, abs(std)) == pytest.approx((1.5, 0.5), abs=0.12)


# ------------------------------------------------------------------------------ dimensions


@pytest.mark.parametrize("n, size", [(2, 1.0), (6, 1.0), (6, 3 ** 0.5)])
def test_a_lifted_gaussian_has_its_exact_velocity(n, size):
    """z0 = size x Q with x ~ N(0, I): both parts of E[z1 - z0 | zt] are known."""
    flat = Field(lambda zt, t: zt * (2 * t - 1) / oversaturation.s(t) ** 2)
    plane = torch.linalg.qr(torch.randn(n, 2, generator=gen())).Q.T
    zt, t = torch.randn(50, n, generator=gen(1)), torch.rand(50, generator=gen(2)).clamp(min=0.05)
    across = t[:, None]
    inside = zt @ plane.T @ plane
    wanted = (zt - inside) / across + inside * (across - (1 - across) * size**2) / (
        (1 - across) ** 2 * size**2 + across**2)
    assert torch.allclose(dimension.Lifted(flat, plane, size)(zt, t), wanted, atol=1e-4)


def test_gradients_are_those_of_means_over_the_elements():
    cfg = make_config("checkerboard", metric="l2", t_trunc=0.0)
    plane = torch.linalg.qr(torch.randn(8, 2, generator=gen())).Q.T
    network = dimension.Lifted(velocity_network(cfg, (2,)), plane, 2.0)
    net = train.begin(network.requires_grad_(False), network, cfg, (8,), torch.device("cpu"))
    z0, draws = 2.0 * gaussians(64, 0) @ plane, data.Draws(0)
    norms = dimension.gradients(net, z0, cfg, draws)
    draws.at(0)
    z1, t, u = draws.normal(64, 8), draws.uniform(64), draws.uniform(64)
    with torch.no_grad():
        x1 = z0_prediction(network, z1, torch.ones(64))
        gap = x1 - z0_prediction(network, interpolate(x1, z1, t), t)
        zt, d = interpolate(z0, z1, t), expand(time_skip(t, u, u, cfg.t_skip)[0], z0)
        lower = z0_prediction(network, zt - d * network(zt, t), t - d[:, 0])
        gaps = {"RF": gap, "CD": z0_prediction(network, zt, t) - lower}
    for name, gap in gaps.items():                 # of the mean square: 2 gap / N
        wanted = (2 * gap.norm(dim=1) / 8).mean().item()
        assert norms[name].item() == pytest.approx(wanted, rel=1e-3)


def test_the_table_of_dimensions(monkeypatch):
    monkeypatch.setattr(dimension, "POINTS", 200)
    monkeypatch.setattr(dimension, "ELEMENTS", (2, 5))
    lines = works("study.dimension --steps 3 --threads 1").splitlines()
    head, _, *table = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert head[:7] == ["N", "elements", "CD", "GAN", "RF", "BI", "GAN / CD"]
    assert [row[:2] for row in table] == [[n, name] for name in dimension.SIZES for n in "25"]
    assert all(float(x) > 0 for row in table for x in row[2:])
    assert table[0][2:] == table[2][2:]            # with N = 2 both are the points themselves


# ------------------------------------------------------------------------------ the paper's tables


def small_table(kind, more=""):
    return f"study.ablation {kind} --dataset moons {SMALL} {PAIRS} --nfe 1 2 --n 200 {more}"


@pytest.fixture
def only_tables(monkeypatch):
    """Cells of a table draw no pictures of their own, which would cost more than they do."""
    monkeypatch.setattr(Run, "pictures", lambda *_: [])


def test_the_ladder_is_trained_measured_and_kept(monkeypatch, only_tables):
    printed = works(small_table("losses", "--seeds 2"))
    for rung in ("CD", "CD, truncation (ours)", "+ GAN (ours)", "+ GAN, truncation", "+ RF",
                 "+ BI (all)", "all, x1 fixed (ours)", "all without CD (ours)", "teacher",
                 "data against data"):
        assert f"| {rung} " in printed
    root = Path("runs/ablation/moons")
    assert is_picture(root / "figure6.png") and len(list(root.glob("*-[01]"))) == 2 * 9
    saved = json.loads((root / "losses.json").read_text())
    assert len(saved["rows"]) == 2 * (3 + 8 * 2) and saved["ablation"] == "losses"
    assert {row["seed"] for row in saved["rows"]} == {0, 1}
    for name, t_trunc, used in (("losses-cd", 0, "cd"), ("losses-cd-t_trunc-0.1", 0.1, "cd"),
                                ("losses-cd-gan-t_trunc-0.0", 0, "cd gan"),
                                ("losses-gan-rf-bi", 0.1, "gan rf bi")):
        made = read(root / f"{name}-0/student.pt")["config"]
        assert made["t_trunc"] == t_trunc and [*made["losses"]] == used.split()
    phi = read(root / "teacher-1/teacher.pt")["ema"]
    for name, is_phi in (("scflow-1", True), ("losses-cd-1", True), ("teacher-0", False)):
        assert same(read(root / name / "teacher.pt")["ema"], phi) == is_phi
    assert saved["costs"] in printed and "| + RF " in saved["costs"]

    # nothing is trained or sampled for a measure a second time, and the numbers stay
    monkeypatch.setattr(train, "begin", None)
    monkeypatch.setattr(evaluate, "measure", None)
    assert "| + RF " in works(small_table("losses", "--seeds 2"))
    assert json.loads((root / "losses.json").read_text())["rows"] == saved["rows"]

    # some rows alone have a table and, from two rows on, a picture
    points, grid = [], pictures.grid
    monkeypatch.setattr(pictures, "grid", lambda path, rows, *args: points.extend(
        len(z) for _, _, row in rows for z in row) or grid(path, rows, *args))
    for only, drawn in (("CD", False), ('CD "+ RF"', True)):
        (root / "figure6.png").unlink()
        assert ("figure6.png" in works(small_table("losses", f"--only {only}"))) == drawn
        (root / "figure6.png").touch()
    assert set(points) == {4000}


def test_a_table_of_captions_goes_on_and_is_drawn_with_captions(monkeypatch, only_tables):
    asked, strips = [], sample.strips
    monkeypatch.setattr(sample, "strips", lambda *args, conditions, **more: asked.append(
        conditions(3)) or strips(*args, conditions=conditions, **more))
    small = ("--steps 2 --teacher-steps 2 --channels 8 --heads 2 --disc-channels 8 --batch-size 4 "
             "--teacher-batch-size 4 --threads 1 --precision fp32 --n 150 --nfe 1")
    for only in ("teacher", 'CD "+ RF"'):
        works(f"study.ablation losses --dataset captions {small} --only {only}")
    assert asked[0].dtype == torch.int64 and len(asked[0]) == 3


def test_measurements_are_made_again_if_damaged_or_of_other_settings(monkeypatch):
    path, file, calls = Path("student.pt"), Path("student-measured.json"), []
    path.touch()
    row = {"network": "x", "nfe": 1, "seed": 0} | dict.fromkeys(evaluate.MEASURES, 0.5)
    monkeypatch.setattr(evaluate, "measure", lambda *args, **_: calls.append(args) or [row])
    reference = SimpleNamespace(name="distance", data=torch.ones(3))
    for old, new in ("{", "["), ("rows", "row"), ('"n": 10', '"n": 11'), ("", ""):
        for _ in range(2):
            assert [row] == ablation.measured(path, "x", [1], None, reference,
                                              dict(n=10, solver="euler"), seed=0)
        file.write_text(file.read_text().replace(old, new, 1))
    assert len(calls) == 4                         # once at first, and once after each damage


def test_an_interrupted_table_goes_on_with_the_teacher_that_is_there(moons_run, monkeypatch,
                                                                     only_tables):
    monkeypatch.setattr("teacher.train_teacher", None)
    with monkeypatch.context() as m:
        stop_at(12 + 7, m)                         # in the second cell
        ended = call(small_table("losses"))
    assert ended.code == 130 and "the same command continues" in ended.err
    root = Path("runs/ablation/moons")
    first, second = (root / f"losses-{name}-0/student.pt" for name in ("cd", "cd-t_trunc-0.1"))
    made = first.stat().st_mtime_ns
    assert not second.exists()
    works(small_table("losses"))
    assert first.stat().st_mtime_ns == made

    # the second cell is what it is without an interruption
    works(f"train.py --dataset moons {SMALL} {PAIRS} --losses cd --t-trunc 0.1 --out whole "
          f"--teacher-checkpoint {root}/teacher-0/teacher.pt")
    assert same(read(second)["ema"], read("whole/student.pt")["ema"])

    # a table of other settings is refused, and nothing is touched
    before = sorted(Path("runs").rglob("*"))
    for flag in ("--lr 0.1", "--teacher-lr 0.1"):
        refused(small_table("losses", flag), flag, "remove")
    assert sorted(Path("runs").rglob("*")) == before


@pytest.mark.parametrize("kind, paper", [
    ("weights", [dict(l_gan=a, l_rf=b, l_bi=c) for a, b, c in (
        (1, 1, 1), (.4, .4, .4), (.2, .2, .2), (.1, .1, .1), (1, .1, .1), (.1, 1, 1))]),
    ("times", [*(dict(t_trunc=x) for x in (0, .1, .2, .4, .5)), dict(mu=.9), dict(mu=.95),
               dict(t_skip=.1), dict(t_skip=.2)])])
def test_tables_have_the_papers_rows_and_mark_ours(kind, paper):
    for default in make_config("moons"), make_config("mnist"), make_config("celebahq"):
        table = ablation.cells(kind, default)
        assert [row for label, row in table.items() if "(ours)" not in label] == paper
        # a row that changes nothing shares the run of the default
        folders = [ablation.folder_name(row, default) for row in table.values()]
        unchanged = [all(getattr(default, k) == v for k, v in row.items())
                     for row in table.values()]
        assert [name == "scflow" for name in folders] == unchanged
        assert len(set(folders) - {"scflow"}) == len(folders) - sum(unchanged)


def test_rows_of_a_table_are_trained_alone_and_then_collected(monkeypatch, only_tables):
    works(small_table("fgm", "--only teacher --seed 10"))
    root, table = Path("runs/ablation/moons"), ablation.cells("fgm", make_config("moons"))
    assert [p.name for p in sorted(root.glob("*-10"))] == ["teacher-10"]
    monkeypatch.setattr(ablation, "equal_compute", lambda cfg, scflow: cfg)
    with Run(make_config("moons", out=str(root / "teacher-10"))):        # another process has it
        for label in table:
            printed = works(small_table("fgm", f"--seed 10 --only \"{label}\""))
            assert f"| {label} " in printed and printed.count("| alpha = ") == 5
    name = "fgm-alpha-0.5-RealUID-s-rates-10-10.json"
    alone = [r for r in json.loads((root / name).read_text())["rows"] if "alpha" in r["network"]]
    assert [(r["nfe"], r["seed"]) for r in alone] == [(1, 10)]           # NFE 2 is left blank
    monkeypatch.setattr(evaluate, "measure", None)
    monkeypatch.setattr(train, "begin", None)
    works(small_table("fgm", "--seed 10"))
    rows = json.loads((root / "fgm.json").read_text())["rows"]
    assert [r["network"] for r in rows[3:]] == list(table) and alone[0] in rows
    last = ablation.folder_name(table["alpha = 0.5, RealUID's, rates / 10"], make_config("moons"))
    config = read(root / f"{last}-10/student.pt")["config"]
    assert config["fgm_alpha"] == 0.5 and config["lr"] == config["disc_lr"] == 2e-4


@pytest.mark.parametrize("method", train.STEPS)
def test_passes_are_what_the_networks_compute(method):
    # the FLOPs of an iteration over those of a forward pass; the discriminator is tiny
    cfg, net, draws = run_of(method, channels=128, blocks=12, disc_channels=1, r1=0.0)
    z0, z1 = gaussians(64, 1), gaussians(64, 2)
    batch = (z0, z1, None) if "reflow" in method else (z0, None)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net.teacher(z0, torch.ones(64))
    for step in (0, cfg.n_gan, cfg.n_rf) if method == "scflow" else (0,):
        with FlopCounterMode(display=False) as counter:
            train.STEPS[method][0](net, batch, step, cfg, draws)
        counted = counter.get_total_flops() / forward.get_total_flops()
        assert counted == pytest.approx(ablation.passes(cfg, step), rel=0.015)


def test_methods_have_the_compute_of_scflow():
    default = make_config("checkerboard")
    budget = ablation.compute(default)
    # without GAN and reflow 6 passes, with the GAN 9, with both 12
    assert budget == 500 * 6 + 500 * 9 + 4000 * 12
    pairs = 50_000 * 100 / 256
    for method, steps in (("cd", budget / 5), ("flowmap", budget / 5), ("fgm", budget / 27),
                          ("reflow", (budget - pairs) / 3),
                          ("reflow-distill", (budget - 2 * pairs) / 3)):
        cfg = ablation.equal_compute(make_config("checkerboard", method=method), default)
        assert cfg.steps == int(steps) and ablation.compute(cfg) == pytest.approx(budget, rel=1e-3)
    with pytest.raises(UserError, match="--pairs"):
        ablation.equal_compute(make_config("checkerboard", method="reflow"),
                               replace(default, steps=2000))
    # RealUID's batch on cifar10 is twice as large, and so is each pass
    scflow, fgm = make_config("cifar10"), make_config("cifar10", method="fgm")
    cfg = ablation.equal_compute(fgm, scflow)
    assert cfg.batch_size == 2 * scflow.batch_size
    assert 2 * 27 * cfg.steps == pytest.approx(ablation.compute(scflow), rel=1e-3)
    table = ablation.costs({"SCFlow": [(scflow, 1.0)], "fgm": [(cfg, 1.0)]}, scflow.batch_size)
    passes = [float(line.split("|")[4].replace(",", "")) for line in table.splitlines()[4:6]]
    assert passes[0] == pytest.approx(passes[1], rel=1e-3) and "| 54 " in table


def test_the_methods_table_survives_a_cell_that_diverges(monkeypatch, only_tables):
    def diverging(run, real=train.train):
        if run.cfg.method == "fgm":
            raise Diverged("fgm became nan at step 3, so the run stopped")
        return real(run)

    monkeypatch.setattr(train, "train", diverging)
    monkeypatch.setattr(ablation, "equal_compute", lambda cfg, scflow: cfg)
    printed = works(small_table("methods", "--solver stochastic"))
    for method in ("SCFlow", "cd", "flowmap", "reflow", "reflow-distill"):
        assert f"| {method} " in printed
    assert "| fgm " not in printed and "fgm, seed 0: fgm became nan at step 3" in printed
    assert "the discriminator apart" in printed and "| passes per iteration " in printed


def test_on_cifar10_scflows_recipe_for_fgm_is_scflows():
    for dataset, ratio in (("cifar10", 1 / 2), ("checkerboard", 1)):
        default = make_config(dataset)
        table = ablation.cells("fgm", default)
        ours = table["alpha = 1, SCFlow's recipe"]
        assert ablation.folder_name(ours, default) == "method-fgm"
        assert replace(make_config(dataset, **ours), losses=default.losses, t_trunc=default.t_trunc
                       ) == replace(default, method="fgm", fgm_alpha=1.0)
        theirs = make_config(dataset, **table["alpha = 0.5, RealUID's, rates / 1"])
        assert theirs.betas == (0.0, 0.999) and default.batch_size / theirs.batch_size == ratio


def test_a_shipped_file_replaces_no_other(moons_run):
    works(f"study.ship {moons_run}/student.pt small")
    refused(f"study.ship {moons_run}/student.pt small", "small/student.pt exists")


def test_names_of_rows_and_of_tables(moons_run):
    for place in ("a", "b"):
        shutil.copytree(moons_run, f"{place}/run")
    two = "evaluate.py --n 100 --nfe 1 --checkpoint a/run/student.pt b/run/student.pt --out tables/"
    for flags, names in (("lr-0.1", ("a/run/student.pt", "b/run/student.pt", "teacher")),
                         ("lr-0.2.json --median", ("students", "teachers"))):
        printed = works(two + flags)
        assert all(f"| {name} " in printed for name in names)
    assert {p.name for p in Path("tables").iterdir()} == {
        f"lr-{x}.{kind}" for x in ("0.1", "0.2") for kind in ("json", "md")}


@pytest.mark.parametrize("line, named", [
    ("train.py --method gan", ["gan", "fgm"]),
    ("train.py --method reflow --losses cd", ["--losses", "reflow"]),
    ("train.py --method cd --losses cd gan", ["--losses", "cd"]),
    ("train.py --method cd --t-trunc 0.4", ["--method cd", "--t-trunc"]),
    ("train.py --method reflow-distill --steps 1", ["--steps"]),
    ("train.py --dataset cifar10 --model tiny", ["--model small", "paper"]),
    ("train.py --dataset cifar10 --preset paper", ["--preset", "cifar10"]),
    ("study.ablation fgm --only fgm", ["--only fgm", "alpha = 0.5", "teacher"]),
    ("train.py --method reflow --pairs 0", ["--pairs 0"]),
    ("study.speed --method fgm", ["--method scflow", "fgm"]),
    ("train.py --method reflow --pair-steps 0", ["--pair-steps 0"]),
    ("evaluate.py --n 2000000", ["--n", "at most"]),
    ("evaluate.py --protocol paper", ["--protocol", "not for moons"]),
    ("evaluate.py --n 9999999999999999999999999", ["--n"]),
    ("evaluate.py --checkpoint \"\"", ["--checkpoint"]),
    ("evaluate.py --dataset spirals", ["spirals", "train.py"]),
    ("sample.py --gif --trajectory", ["--gif"]),
    ("sample.py --gif --checkpoint runs/moons/teacher.pt", ["--gif", "student"]),
])
def test_bad_flags(line, named, moons_run):
    refused(line, *named)


def test_a_checkpoint_is_measured_on_its_own_data(moons_run):
    content = read(moons_run / "student.pt")
    content["config"]["download"] = True           # a run of --download; measuring needs none
    torch.save(content, moons_run / "student.pt")
    assert not sample.open_network(moons_run / "student.pt")[2].download
    assert "trained on other data" not in works("evaluate.py --n 100 --nfe 1")

    other = Path(shutil.copytree(moons_run, "other")) / "student.pt"
    torch.save(content | {"data": "1-00000000"}, other)
    assert "trained on other data" in works(f"evaluate.py --n 100 --nfe 1 --checkpoint {other}")
    refused(f"evaluate.py --n 100 --checkpoint {other} {moons_run / 'student.pt'}", "other data")


# ------------------------------------------------------------------------------ cost, figures


def test_speed_times_what_the_flags_say(monkeypatch):
    line = "study.speed --dataset moons --batch-size 8 --threads 1 --device cpu"
    printed = works(f"{line} --peak 1")
    for words in ("moons, batch 8, fp32, cpu", "training iteration", "network call", "TFLOP/s",
                  "% of 1"):
        assert words in printed
    # a CPU that only emulates bf16
    monkeypatch.setattr(speed, "fast_bf16", lambda device: False)
    printed = works(f"{line} --precision bf16")
    assert "bf16 is skipped" in printed and ", fp32, cpu" in printed


def test_the_film(moons_run):
    printed = works("sample.py --gif")
    path = Path("runs/moons/samples/film.gif")
    assert str(path) in printed
    film = Image.open(path)
    assert film.n_frames > 10 and path.stat().st_size < 400_000
    frames = [np.asarray(frame.convert("L"), float) for frame in ImageSequence.Iterator(film)]
    moved = np.array_split(abs(frames[4] - frames[-1])[40:], 4, axis=1)
    teacher, one, two, _ = (panel.mean() for panel in moved)
    assert teacher > 1 and max(one, two) < teacher             # after four calls they are done


def test_only_what_is_shown_is_decoded():
    seen = []
    reference = evaluate.Reference(make_config("moons"), 100)
    network = Field(lambda zt, t: zt)
    settings = dict(shape=(2,), n=100, decode=lambda z: seen.append(len(z)) or z)
    assert [r["nfe"] for r in evaluate.measure("a", network, [8], reference, **settings)] == [8]
    assert sum(seen) == 100                        # not also the samples of one call


def test_crossing_of_lines_that_are_known():
    # x1 = z1 / 2: no lines meet. x1 = (b, a) for z1 = (a, b): all with the same a + b meet, and
    # there the variance of a is 1/2; the mean is predicted
    apart = Field(lambda zt, t: zt / (1 + t))
    meeting = Field(lambda zt, t: (2 * t - 1) * (zt - zt.flip(1)))
    for network, wanted in ((apart, 0), (meeting, 0.5**0.5)):
        found = crossing.crossing(network, n=2000, others=20_000)
        assert found == pytest.approx((wanted, wanted), abs=0.03)


def test_crossing_of_students(moons_run):
    network, content, cfg = sample.open_network(moons_run / "student.pt")
    numbers = "crossing {:.3f}, error {:.3f}".format(*crossing.crossing(network))
    assert numbers in works("study.crossing runs/moons/student.pt")
    works(f"train.py --dataset 8gaussians --condition class {SMALL} --out by-class")
    for student, what in ((WEIGHTS / "mnist/student.pt", "is of mnist, with --condition class"),
                          ("by-class/student.pt", "is of 8gaussians, with --condition class")):
        refused(f"study.crossing {student}", what, "students of points that are unconditional")


def test_oversaturation_in_closed_form():
    printed = works("study.oversaturation --out picture.png")
    for nfe, wanted in ((1, 1.0), (2, 1.414), (4, 1.662), (8, 1.816), (16, 1.904)):
        assert oversaturation.std(nfe) == pytest.approx(wanted, abs=5e-4)
        assert f"{nfe:<5} {wanted:.3f}" in printed
    assert oversaturation.std(10**4) == pytest.approx(2, abs=1e-3)
    assert is_picture("picture.png")
    refused("study.oversaturation --out picture.png/x.png", "picture.png")
