"""The students in weights/: small, opened where nothing was trained, as good as they should be."""

from pathlib import Path

import pytest
import torch

import captions
import evaluate
import sample
from config import CIRCUMSTANCES
from data import sample_points
from harness import saved
from harness.saved import open_network
from running import is_picture, refused, works

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
DATASETS = sorted(path.parent.name for path in saved.SHIPPED.glob("*/student.pt"))


def test_the_files_are_small():
    assert {"checkerboard", "mnist", "captions", "captions-digits"} <= set(DATASETS)
    files = list(saved.SHIPPED.rglob("*.pt"))
    assert sum(file.stat().st_size for file in files) < 8e6
    for file in files:
        content = torch.load(file, weights_only=True)
        assert all(value.dtype == torch.float16 for value in content["ema"].values())
        assert not set(content["config"]) & set(CIRCUMSTANCES), "where it was trained is nobody's"


@pytest.mark.parametrize("dataset", DATASETS)
def test_they_are_drawn_where_nothing_was_trained(dataset):
    before = sorted(saved.SHIPPED.rglob("*"))
    works(f"sample.py --dataset {dataset} --nfe 1 --threads 1")
    assert is_picture(f"runs/weights/{dataset}/samples/student-nfe1-seed0.png")
    assert sorted(saved.SHIPPED.rglob("*")) == before


def test_what_is_made_with_them_goes_to_runs(monkeypatch):
    monkeypatch.chdir(saved.SHIPPED.parent)
    for file in ("weights/mnist/student.pt", saved.SHIPPED / "mnist/student.pt"):
        assert saved.home_of(file) == Path("runs/weights/mnist")


def test_the_users_own_student_comes_first(no_pictures):
    works("train.py --channels 8 --blocks 1 --steps 2 --teacher-steps 2 --lr-warmup 1 --threads 1")
    assert "from runs/checkerboard/student.pt" in works("sample.py --nfe 1 --threads 1")


def test_a_prompt_finds_the_student_of_its_words():
    assert "weights/captions/student.pt" in works("sample.py --prompt 'a green ring' --nfe 1")
    assert "weights/captions-digits/student.pt" in works("sample.py --prompt 'a red two' --nfe 1")
    assert captions.dataset_of(["a green ring", "a red three"]) == "captions-digits"
    assert captions.dataset_of([""]) == "captions"
    refused("sample.py --prompt 'a pink ring'", "pink", "magenta")


def test_they_are_good():
    network, content, _ = open_network(saved.find_student("captions"), threads=1, precision="fp32")
    shapes = captions.Captions()
    y = shapes.questions(200, seed=5)
    drawn = sample.draw(network, content["shape"], 200, 1, y=y)
    assert shapes.judge(drawn, y)["all"].float().mean() > 0.9

    network, content, _ = open_network(saved.find_student(), threads=1, precision="fp32")
    drawn = sample.draw(network, content["shape"], 10_000, 1, batch=1000)
    data = sample_points("checkerboard", 10_000, torch.Generator().manual_seed(0))
    assert 1000 * evaluate.sliced_w2(drawn, data) < 50      # its teacher scores 950
