"""Text to image on a laptop: the captions, their pictures and judge, and a network told by text."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import captions
import data
import model
from config import make_config
from harness import UserError, pictures
from harness.saved import SHIPPED, conditions_of
from running import gen, is_picture, read, refused, works

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
TINY = ("--dataset captions --channels 8 --heads 2 --disc-channels 8 --batch-size 4 --steps 3 "
        "--teacher-batch-size 8 --teacher-steps 3 --n-rf 1 --lr-warmup 1 --preview-every 2 "
        "--log-every 1 --threads 1 --precision fp32")


def text(row):
    return " ".join((*captions.WORDS, *captions.SHAPES)[i] for i in row if i)


@pytest.fixture(scope="module")
def shapes():
    return captions.Captions()


def test_any_number_of_processes_measures(monkeypatch):
    monkeypatch.setattr(data, "WORLD", 3)
    with pytest.raises(UserError, match="not a multiple of the 3 processes"):
        data.load(make_config("captions"))
    data.load(make_config("captions"), train=False)


# -------------------------------------------------------------------------------- the data set


def test_the_judge_agrees_with_what_was_drawn_and_with_nothing_else(shapes):
    scene = shapes.scenes(2000, gen(0))
    pictures, y = shapes.draw(*scene, gen(1)), captions.caption(*scene)
    right = shapes.judge(pictures, y)
    assert all(answers.float().mean() > 0.995 for answers in right.values())
    wrong = shapes.judge(pictures, y.roll(1, 0))
    assert wrong["all"].float().mean() < 0.02
    for broken in (-torch.ones_like(pictures), torch.ones_like(pictures), pictures.flip(1)):
        assert shapes.judge(broken, y)["all"].float().mean() < 0.4


def test_the_judge_tells_places_and_their_order(shapes):
    disc, bar = captions.SHAPES.index("disc"), captions.SHAPES.index("bar")
    colours, kinds = torch.tensor([[0, 2]]), torch.tensor([[disc, bar]])
    for relation, asked, opposite in (
            (1, "a red disc left of a blue bar", "a blue bar left of a red disc"),
            (2, "a red disc above a blue bar", "a blue bar above a red disc")):
        picture = shapes.draw(colours, kinds, torch.tensor([relation]), gen(2))
        for caption, answer in ((asked, True), (opposite, False), ("a red disc", False)):
            assert shapes.judge(picture, captions.tokens([caption]))["all"].item() is answer


def test_captions_are_words_and_back(shapes):
    y = captions.caption(*shapes.scenes(300, gen(3)))
    assert torch.equal(captions.tokens([text(row) for row in y]), y)
    assert text(y[y[:, 3] == 0][0]).count(" ") == 2
    assert {len(text(row).split()) for row in y} == {3, 7, 8}
    assert not captions.tokens([""]).any()
    for dataset, examples in captions.EXAMPLES.items():
        assert captions.tokens(examples, dataset)[:, 0].all()
    with pytest.raises(UserError, match="'three'.*ring"):
        captions.tokens(["a red three"])


def test_some_pairs_are_never_drawn(shapes):
    y = captions.caption(*shapes.scenes(5000, gen(4)))
    drawn = {text(row[k : k + 2]) for row in y for k in (1, 5, 6) if row[k + 1] > 10}
    assert len(drawn) == 32 and not drawn & set(captions.HELD_OUT["captions"])

    # half of the questions are about them
    scores = shapes.scores(torch.zeros(1000, 3, 28, 28), shapes.questions(1000))
    assert len(scores["all right, pairs never drawn"]) == 500
    assert sum(len(v) for name, v in scores.items() if name.startswith("all")) == 1000


def test_digits_are_drawn_and_judged():
    """Ten patterns stand for the digits, and a classifier that compares with them."""
    patterns = 255 * (torch.rand(10, 1, 7, 7, generator=gen(9)) > 0.5).to(torch.uint8)
    patterns = F.pad(patterns.repeat_interleave(2, 2).repeat_interleave(2, 3), (7, 7, 7, 7))
    labels = torch.arange(10).repeat(3)[torch.randperm(30, generator=gen(10))]
    templates = captions.mask_of(patterns / 127.5 - 1).flatten(1)

    def classify(x):
        return (F.avg_pool2d(x, 3, 1, 1).flatten(1)
                @ (templates - templates.mean(0)).T).argmax(1)

    digits = captions.CaptionedDigits(patterns[labels], labels, "key", classify=classify)
    assert len(digits.pairs) == 54 and digits.key.endswith("-key")
    scene = digits.scenes(600, gen(11))
    y = captions.caption(*scene)
    pictures = digits.draw(*scene, gen(12))
    assert pictures.shape == (600, 3, 28, 28) and pictures.abs().max() <= 1
    right, wrong = digits.judge(pictures, y), digits.judge(pictures, y.roll(1, 0))
    assert right["colour"].all() and right["relation"].float().mean() > 0.97
    assert right["object"].float().mean() > 0.8 and wrong["all"].float().mean() < 0.05
    assert torch.equal(digits.draw(*scene, gen(12)), pictures)


def test_batches_are_functions_of_the_draws(shapes):
    whole, y = shapes.batch(8, data.Draws(5))
    assert whole.shape == (8, 3, 28, 28) and y.shape == (8, 8) and whole.abs().max() <= 1
    slices = [shapes.batch(4, data.Draws(5, rank=rank, world=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([z for z, _ in slices]), whole)
    assert torch.equal(torch.cat([c for _, c in slices]), y)
    assert captions.Captions(conditional=False).batch(2, data.Draws(0))[1] is None


# -------------------------------------------------------------------------------- the networks


def networks():
    cfg = data.with_classes(make_config("captions", channels=8, heads=2, disc_channels=8))
    torch.manual_seed(0)
    net, disc = model.velocity_network(cfg, (3, 28, 28)), model.discriminator(cfg, (3, 28, 28))
    with torch.no_grad():
        for p in net.parameters():                 # layers that start at zero hide mistakes
            p.add_(0.05 * torch.randn(p.shape, generator=gen(6)))
    return net, disc


@torch.no_grad()
def test_no_condition_is_the_empty_caption_and_the_order_of_words_counts():
    net, disc = networks()
    z, t = torch.randn(2, 3, 28, 28, generator=gen(7)), torch.rand(2, generator=gen(8))
    empty, one, other = (captions.tokens([caption] * 2) for caption in (
        "", "a red cross left of a blue disc", "a blue cross left of a red disc"))
    torch.testing.assert_close(net(z, t), net(z, t, empty))
    torch.testing.assert_close(disc(z), disc(z, empty))
    for network, inputs in ((net, (z, t)), (disc, (z,))):
        a, b = network(*inputs, one), network(*inputs, other)
        assert (a - b).abs().max() > 1e-4 and (a - network(*inputs)).abs().max() > 1e-4


def test_networks_without_text_build_none_of_it(monkeypatch):
    """Or they would take other random numbers, and older runs could not be reproduced."""
    monkeypatch.setattr(model, "Text", None)
    monkeypatch.setattr(model, "CrossAttention", None)
    for cfg in (make_config("mnist"), make_config("mnist", condition="class")):
        model.velocity_network(cfg, (1, 28, 28)), model.discriminator(cfg, (1, 28, 28))


def test_some_captions_become_the_empty_one():
    y = captions.tokens(captions.EXAMPLES["captions"][:4])
    dropped = model.with_nulls(y, torch.tensor([True, False, True, False]), 17)
    assert not dropped[[0, 2]].any() and torch.equal(dropped[[1, 3]], y[[1, 3]])


# ----------------------------------------------------------------------------------- as a user


def test_a_run_is_drawn_by_prompts_and_judged(monkeypatch):
    works(f"train.py {TINY}")
    for name in ("samples", "preview_000002", "losses"):
        assert is_picture(f"runs/captions/{name}.png")

    # the text encoder is trained with the teacher and frozen in the student; D trains its own
    teacher, student = (read(f"runs/captions/{name}.pt")["ema"] for name in ("teacher", "student"))
    frozen = [key for key in teacher if key.startswith("text.")]
    assert len(frozen) > 5 and all(torch.equal(teacher[key], student[key]) for key in frozen)
    assert not torch.equal(teacher["words_emb.0.weight"], student["words_emb.0.weight"])

    works("sample.py --prompt 'a red cross left of a blue disc' 'a green ring' --nfe 1 --n 4 "
          "--npz one.npz")
    works("sample.py --prompt 'a green ring' --nfe 1 --n 4 --npz two.npz")
    one, two = (np.load(f"{name}.npz")["arr_0"] for name in ("one", "two"))
    assert one.shape == (4, 28, 28, 3) and (one[1::2] == two[1::2]).all()
    works("sample.py --teacher --guidance 3 --prompt '' 'a cyan bar' --nfe 1 2 --out strip.png")
    assert is_picture("strip.png")
    for prompt in ("a cyan bar", "a green ring", ""):                    # each has its picture
        works(f"sample.py --prompt '{prompt}' --nfe 1 --n 2")
        name = f"student-nfe1-{prompt.replace(' ', '-') or 'null'}-seed0.png"
        assert is_picture(f"runs/captions/samples/{name}")
    printed = works("evaluate.py --nfe 1 2 --n 150 --guidance 3")
    for words in ("all right, one object", "all right, two objects", "pairs never drawn", "w = 3"):
        assert words in printed

    refused("sample.py --prompt 'a pink ring'", "pink", "magenta")
    refused("sample.py --prompt 'a red ring left of a blue disc of'", "9 words", "8")
    refused("sample.py --class 3", "--class", "captions")
    Path("many.txt").write_text("a red ring\n" * 2000)
    refused("sample.py --prompts many.txt", "--n 16000", "1,000", "--npz")
    refused("sample.py --prompts many.txt --nfe 1 2", "--n 2000", "500")
    labels, grid = [], pictures.grid
    monkeypatch.setattr(pictures, "grid", lambda path, rows, *args: labels.extend(
        label for label, *_ in rows) or grid(path, rows, *args))
    works("sample.py --prompt 'a red ring' 'a cyan bar' --nfe 1 2 --n 3")        # in turn
    assert labels == ["a red ring", "a cyan bar", "a red ring"]
    refused("sample.py --guidance 2", "w = 1.5")


@pytest.mark.parametrize("line, named", [
    ("train.py --dataset mnist --condition text", ["text", "mnist"]),
    ("train.py --dataset captions --condition class", ["class", "captions"]),
    ("train.py --dataset captions --condition none", ["--guidance 1.5", "--guidance 1"]),
])
def test_bad_settings(line, named):
    refused(line, *named)


def test_a_network_of_classes_takes_no_prompt():
    refused(f"sample.py --prompt 'a red ring' --checkpoint {SHIPPED}/mnist/student.pt", "--prompt",
            "classes")


def test_examples_have_both_kinds_of_pairs():
    examples = captions.tokens(captions.EXAMPLES["captions"])
    y = conditions_of(data.with_classes(make_config("captions")))(20)
    assert y.shape == (20, 8) and torch.equal(y[:10], examples)
