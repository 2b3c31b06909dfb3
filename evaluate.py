"""Measures samples against data, at several numbers of network calls: `python evaluate.py`.

Points: sliced W2 to 50,000 data points. Images: Frechet distance of features (study/features.py).
Also precision and recall, how far few steps end from one step, the spread, and the speed.
"""

import json
import math
import re
import statistics
import time
from dataclasses import replace
from functools import cached_property, reduce
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import sample
from config import (CAPTION_SETS, CLASSES, DATASETS, LATENT_SETS, MACHINE, POINT_SETS,
                    UNCAPTIONED_SETS, identity, make_config)
from harness import UserError, machine
from harness.checkpoint import differences, write_text
from harness.machine import choose_device
from harness.pictures import from_uint8
from harness.script import add_field_flags, given_flags, make_parser, run_script
from study import clip
from study.features import Spread, data_features, extractor, mnist_classifier

# settings with which checkpoints are opened
OPENING = (*MACHINE, "data_dir", "latents_dir", "vae_weights", "teacher_checkpoint")
RIGHT = "as asked: "               # before the names of measures of conditional samples
WITHIN = "spread within a class"   # another of these measures
MEASURES = ("distance", "precision", "recall", "consistency", "spread", "per_second")
NEIGHBOURS = 10_000                # precision and recall use at most this many samples of each
BLOCK = 100                        # rows of a distance matrix in memory
PAPER_SAMPLES = 50_000             # of the paper's FID


# ----------------------------------------------------------------------------------- distances


def projections(x, directions=256, seed=0):
    """Points (n, d) projected on fixed random directions, each row sorted: (directions, n)."""
    w = torch.randn(x.shape[1], directions, generator=torch.Generator().manual_seed(seed))
    along = (x.float().cpu() @ (w / w.norm(dim=0))).T.contiguous()
    return torch.from_numpy(np.sort(along.numpy(), axis=1))    # a third of torch.sort's time


def sliced_w2(a, b, b_projected=None):
    """Sliced Wasserstein-2 distance of two clouds (n, d); ValueError if their shapes differ.

    The root of the mean squared difference of their sorted projections. b_projected:
    projections(b), if known.
    """
    if a.shape != b.shape:
        raise ValueError(f"sliced W2 compares clouds of one shape, not {a.shape} and {b.shape}")
    b_projected = projections(b) if b_projected is None else b_projected
    return (projections(a) - b_projected).square().mean().sqrt().item()


def frechet_distance(a, b):
    """Frechet distance between Gaussians fitted to two sets of features, (n, d) and (m, d).

    || mean_a - mean_b ||^2 + tr(A + B - 2 (A B)^(1/2)), in float64. The trace of the root is the
    sum of the roots of the eigenvalues of A^(1/2) B A^(1/2). Raises ValueError for n or m below 2.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a covariance takes at least two samples")
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = (torch.cov(x.T).view(x.shape[1], x.shape[1]) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return (gap + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def neighbour_radii(x, k=3):
    """Distance of each row of x (n, d) from its k-th nearest other row, float64 (n,); n > k."""
    if len(x) <= k:
        raise ValueError(f"precision and recall take more than k = {k} samples")
    x = x.double()                                 # each row is its own nearest, hence k + 1
    return torch.cat([torch.cdist(block, x).topk(k + 1, largest=False).values[:, -1]
                      for block in x.split(BLOCK)])


def precision_recall(real, fake, k=3, real_radii=None):
    """Precision and recall (Kynkaanniemi et al., 2019) of features (n, d), (m, d); n, m > k.

    Precision is the share of `fake` that lies within the k-th neighbour's distance of some `real`,
    recall the reverse. real_radii: neighbour_radii(real), if known.
    """
    real_radii = neighbour_radii(real, k) if real_radii is None else real_radii
    fake_radii, real, fake = neighbour_radii(fake, k), real.double(), fake.double()
    precise, recalled = torch.zeros(len(fake), dtype=torch.bool), []
    for block, radii in zip(real.split(BLOCK), real_radii.split(BLOCK)):
        apart = torch.cdist(block, fake)                                   # (BLOCK, m)
        precise |= (apart < radii[:, None]).any(0)
        recalled.append((apart < fake_radii).any(1))
    return precise.double().mean().item(), torch.cat(recalled).double().mean().item()


# ------------------------------------------------------------------------------------ the data


def real_data(cfg, n, generator, scenes=None):
    """(data, held-out data, what the data are), each float32 (m, ...).

    Points: two independent clouds of n. MNIST: the test digits, and n of the training digits.
    scenes is the data set of captions, or None.
    """
    if cfg.dataset in POINT_SETS:
        real, held_out = (data.sample_points(cfg.dataset, n, generator) for _ in range(2))
        return real, held_out, "points"
    if cfg.dataset == "mnist":
        digits, real = data.mnist(cfg.data_dir)[0], data.mnist(cfg.data_dir, False)[0]
        chosen = torch.randperm(len(digits), generator=generator)[:n]
        return from_uint8(real), from_uint8(digits[chosen]), "test digits"
    if cfg.dataset == "cifar10":
        return from_uint8(data.cifar10(cfg.data_dir)[0]), None, "images"
    real, held_out = (scenes.draw(*scenes.scenes(n, generator), generator) for _ in range(2))
    return real, held_out, "pictures"


class Reference:
    """The data that samples are compared with, as features.

    features: function that turns samples (n, ...) into features (n, d). data: the data's features.
    classes: function of features that tells the class of each, or None. right: function of samples,
    features and their conditions that tells which are as they were asked for. std: the data's
    spread, within: that within a class. scenes: the data set of captions, or None. name: the
    distance in words.
    paper: images are compared as JPEG. All processes make one; rank 0 compares.
    """

    def __init__(self, cfg, n, spec=None, device="cpu", paper=False):
        self.points = cfg.dataset in POINT_SETS
        if self.points and spec is not None:
            raise UserError("--features is for images; points are compared as they are")
        if paper and n != PAPER_SAMPLES:
            raise UserError(f"--protocol paper takes {PAPER_SAMPLES:,} samples, not {n:,}")
        name, self.features, self.classes = ("points", lambda z: z, mode_of(cfg)) if (
            self.points) else extractor(cfg, spec, device, paper)
        self.right = lambda x, features, y: (
            {"class": self.classes(features) == y} if self.classes else {})
        self.scenes = captions_with_judge(cfg) if cfg.dataset in CAPTION_SETS else None
        if self.scenes:
            self.right = lambda x, features, y: self.scenes.scores(x, y)
        generator = torch.Generator().manual_seed(20_000)
        if cfg.dataset in LATENT_SETS:
            real, self.std = data_features(cfg, name, self.features)
            held_out, kind = None, "images"
        else:
            x, held_out, kind = real_data(cfg, n, generator, self.scenes)
            real, self.std, self.within = self.embedded(x)

        size, d = min(n, len(real)), real.shape[1]
        self.name = f"sliced W2 x 1000, {n:,} points" if self.points else (
            f"Frechet distance on {name}, {n:,} samples against {len(real):,} {kind}")
        if cfg.dataset == "captioned":
            self.name += (f" (centre crop, Lanczos to {cfg.image_size} x {cfg.image_size} pixels; "
                          "FID's Inception resizes to 299 x 299)")
        if cfg.dataset == "celebahq" and not paper:
            self.name += "; not comparable with the paper's FID (--protocol paper)"
        if not self.points and size <= max(d, 7):  # halves of 4 have 3 neighbours
            raise UserError(f"{size:,} samples are too few for the covariance of {d:,} features; "
                            "take more by --n, more images, or fewer features by --features")
        self.at_most = min(size, NEIGHBOURS)
        self.data = real[torch.randperm(len(real), generator=generator)]
        self.radii = machine.from_first(neighbour_radii, self.data[:self.at_most])
        self.projected = projections(self.data) if self.points else None

        self.held_out, self.few = held_out, min(n, len(real) // 2)
        self.floor_name = "data against data" if held_out is not None else (
            f"data, {self.few:,} against {len(real) - self.few:,}")

    @cached_property
    def floor(self):
        """The score of held-out data. If there are none, some images against the rest."""
        if self.held_out is None:
            return self.compare(self.data[:self.few], self.data[self.few:]) | {"spread": 1.0}
        fake, std, _ = self.embedded(self.held_out)
        return self.compare(fake) | {"spread": std / self.std}

    def embedded(self, x):
        """Features (n, d), spread, and spread within a class of data (n, ...)."""
        features = self.features(x)
        within = Spread().add(x, self.classes(features)).std if self.classes else math.nan
        return features, Spread().add(x).std, within

    def compare(self, fake, real=None):
        """Distance, precision and recall of features (n, d), against the data's or `real`."""
        radii = self.radii if real is None else None
        real = self.data if real is None else real
        k = min(self.at_most, len(real), len(fake))

        def compared():
            precision, recall = precision_recall(real[:k], fake[:k], real_radii=radii)
            distance = (1000 * sliced_w2(fake, real, self.projected) if self.points
                        else frechet_distance(fake, real))
            return {"distance": distance, "precision": precision, "recall": recall}
        return machine.from_first(compared)


def captions_with_judge(cfg):
    """The data set of captions; that of digits with a classifier, which its judge needs."""
    scenes = data.load(cfg, train=False)
    if cfg.dataset == "captions-digits":
        network = mnist_classifier(cfg.data_dir)
        scenes.classify = torch.no_grad()(lambda x: network(x).argmax(1))
    return scenes


def mode_of(cfg):
    """A function that tells the nearest mode of points of 8gaussians; None for other points."""
    if cfg.dataset not in CLASSES:
        return None
    return lambda z: (torch.atan2(z[:, 1], z[:, 0]) / (math.pi / 4)).round().long() % 8


# ---------------------------------------------------------------------------- measuring, tables


def measure(name, network, nfes, reference, shape, n, seed=0, solver="euler", batch=500,
            device="cpu", decode=sample.same, y=None):
    """One row per NFE, in ascending order, a dict: network, nfe, seed, and the MEASURES.

    A guided network makes two calls per step, so it takes nfe / 2 steps; odd NFEs are left out. A
    student of FGM never saw t < 1, so it is measured at NFE 1 alone. y are the conditions (n, ...),
    or None; with them a row has the shares of samples that are right, and for classes the spread
    within a class.

    The noise is the same for every network and NFE. consistency: RMS distance, per element of z0,
    of a sample from the one-step sample of the same noise. spread: std divided by the data's.
    per_second: samples, decoding included. The processes share the samples, and all get the rows.
    Raises UserError if a sample is not finite.
    """
    calls = sample.calls(network)
    steps = [k // calls for k in nfes if k % calls == 0]
    steps = [1] if getattr(network, "one_step", False) else steps
    rows, one_step = [], {}                        # {first sample of a batch: its one-step samples}
    for k in sorted({1, *steps}):
        mine, features, right, gap, seconds = machine.mine(n), [], {}, 0.0, 0.0
        spread, within = Spread(), Spread()
        for start in tqdm(mine[::batch], f"{name}, {k} NFE", unit="batch", leave=False,
                          disable=not machine.FIRST):
            begun, size = time.perf_counter(), min(batch, mine.stop - start)
            some = None if y is None else y[start : start + size]
            z = sample.draw(network, shape, size, k, seed, solver, batch, device, start, some)
            check_finite(z, f"{name} at {k} NFE")
            gap += (z - one_step.setdefault(start, z)).double().square().sum().item()
            if k not in steps:                     # they are only compared with
                continue
            x = decode(z)
            seconds += time.perf_counter() - begun
            features.append(reference.features(x))
            spread.add(x)
            if some is not None:
                if reference.classes:
                    within.add(x, some)
                for what, is_right in reference.right(x, features[-1], some).items():
                    right.setdefault(what, []).append(is_right)
        if k in steps:
            fake, right, gap, seconds, spread, within = joined(machine.gathered(
                (features, right, gap, seconds, spread.sums, within.sums)))
            shares = {RIGHT + what: x.double().mean().item() for what, x in right.items()}
            if within.sums and math.isfinite(ratio := within.std / reference.within):
                shares[WITHIN] = ratio
            rows.append({"network": name, "nfe": k * calls, "seed": seed,
                         **reference.compare(fake), **shares,
                         "consistency": (gap / (n * math.prod(shape))) ** 0.5,
                         "spread": spread.std / reference.std, "per_second": n / seconds})
    return rows


def check_finite(z, name):
    if not (z.abs() < 1e10).all():                 # false for nan as well
        raise UserError(f"samples of the {name} are not finite or far too large; train it again "
                        "with a lower learning rate")


def joined(parts):
    """What the processes measured, each of its own samples, as one process measures all."""
    features, right, gaps, seconds, *spreads = zip(*parts)
    return (torch.cat(sum(features, [])),
            {what: torch.cat(sum((part.get(what, []) for part in right), []))
             for what in dict.fromkeys(chain(*right))},
            sum(gaps), max(seconds), *(reduce(Spread.take, sums, Spread()) for sums in spreads))


def markdown(lines):
    """Lines of cells as an aligned Markdown table; the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def report(dataset, reference, rows, solver="euler"):
    """The rows as text: one table per measure, of one line per network and one column per NFE.

    Rows of the same network and NFE are shown by their medians, and half the range of distances.
    """
    groups, cells = {}, {}
    shares = [name for name in rows[0] if name.startswith(RIGHT) or name == WITHIN]
    for row in rows:
        groups.setdefault((row["network"], row["nfe"]), []).append(row)
    for key, group in groups.items():
        cells[key] = {name: statistics.median(row[name] for row in group)
                      for name in (*MEASURES, *shares)}
        distances = [row["distance"] for row in group]
        half = (max(distances) - min(distances)) / 2
        cells[key]["within"] = f" +- {half:.1f}" if len(group) > 1 else ""
    runs = max(map(len, groups.values()))
    within = f" +- half the range of {runs} runs" if runs > 1 else ""

    nfes, networks = sorted({nfe for _, nfe in cells}), list(dict.fromkeys(n for n, _ in cells))
    with_floor = [*networks, reference.floor_name]
    cells[reference.floor_name, nfes[0]] = reference.floor | {"within": ""}

    def table(names, cell):
        return markdown([["NFE", *map(str, nfes)], *(
            [name, *(cell(cells[name, k]) if (name, k) in cells else "" for k in nfes)]
            for name in names)])

    conditional = [text for name in shares for text in (
        f"{name}, in percent" + " of the data's" * (name == WITHIN),
        table(networks, lambda r, name=name: f"{100 * r[name]:.1f}"))]
    return "\n\n".join([
        f"{dataset}, {solver}: {reference.name}{within}; in brackets std over the data's",
        table(with_floor, lambda r: f"{r['distance']:.1f}{r['within']} ({r['spread']:.2f})"),
        *conditional,
        f"precision / recall (k = 3, {reference.at_most:,} samples)",
        table(with_floor, lambda r: f"{r['precision']:.3f} / {r['recall']:.3f}"),
        "consistency: RMS distance from the one-step sample of the same noise",
        table(networks, lambda r: f"{r['consistency']:.3f}"),
        "samples per second",
        table(networks, lambda r: f"{r['per_second']:,.{0 if r['per_second'] > 10 else 2}f}")])


def write(out, dataset, reference, rows, text, **more):
    """Rank 0 prints the text and writes it as OUT.md, the rows as OUT.json."""
    if not machine.FIRST:
        return
    print(text)
    out = str(out).removesuffix(".json").removesuffix(".md")
    content = dict(dataset=dataset, metric=reference.name, floor=reference.floor, **more, rows=rows)
    write_text(f"{out}.json", json.dumps(content, indent=1, allow_nan=False))
    write_text(f"{out}.md", text)
    print(f"\nwrote {out}.json, {out}.md")


# -------------------------------------------------------------------------------- command line


def networks_of(paths, guidance=(None,), **given):
    """Opens the checkpoints, and the teacher.pt beside each, guided with each of `guidance`.

    Returns (teachers, students, content, cfg): [(name, network), ...] twice, and the content and
    settings of the first checkpoint. A teacher that several runs share comes once. Raises
    UserError for runs of different data.
    """
    opened = [sample.open_network(path, **given) for path in paths]
    _, content, cfg = opened[0]
    settings = ("dataset", "image_size", "vae", "condition", "num_classes",
                *["data_dir"] * ("data" not in content))
    if cfg.dataset == "captioned":                 # pipelines come without data
        settings = settings[:2]
        for _, other, _ in opened:
            other["data"] = ""
    for _, other, other_cfg in opened[1:]:
        clash = differences(cfg, other_cfg, settings)
        if clash or content.get("data", "") != other.get("data", ""):
            clash = clash or "their files differ"
            raise UserError(f"these checkpoints were trained on other data: {clash}; one table "
                            "holds runs of one data set and condition")

    teachers = {}
    for beside in (path.with_name("teacher.pt") for path in paths):
        if beside.exists() and beside not in paths:
            network, about, its = sample.open_network(beside, **given)
            key = about.get("data"), *(getattr(its, name) for name in identity(its, "teacher"))
            guided = [(w, sample.with_guidance(network, about, its, w)) for w in guidance]
            teachers.setdefault(key, (f"teacher of {beside.parent.name}", guided))
    if len(teachers) == 1:
        teachers = {key: ("teacher", guided) for key, (_, guided) in teachers.items()}
    teachers = [(name if w is None else f"{name}, w = {w:g}", network)
                for name, guided in teachers.values() for w, network in guided]

    names = [path.parent.name for path in paths]
    if len(set(names)) < len(paths):
        names = map(str, paths)
    if len(paths) == 1:
        names = [content["kind"].split()[0]]
    students = zip(names, (network for network, _, _ in opened))
    return teachers, list(students), content, cfg


def of_several_runs(rows, teachers, students):
    """Rows for --median: their network is "students", "teachers", or "teachers, w = 3"."""
    names = {name: "students" for name, _ in students} | {
        name: re.sub("^.*?(?=, w = |$)", "teachers", name) for name, _ in teachers}
    return [row | {"network": names[row["network"]]} for row in rows]


def parse(parser, argv, names, seeds, out):
    """Parses argv with the flags of measuring, and of the settings `names`, added to the parser's.

    study/ablation.py and guide_everything.py have the same flags; seeds and out are the help of
    two of them.
    """
    group = parser.add_argument_group("how")
    group.add_argument("--nfe", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help=(
        "numbers of network calls; the teacher is also measured at its best [1 2 4 8 16]"))
    group.add_argument("--n", type=int, help="samples [50000 points or CIFAR-10, 2000 digits or "
                       "captions, 5000 latents, captioned: one per prompt]")
    group.add_argument("--seed", type=int, default=0, help="the first of --seeds [0]")
    group.add_argument("--seeds", type=int, default=1, help=seeds)
    group.add_argument("--solver", choices=tuple(sample.SOLVERS), default="euler", help="[euler]")
    group.add_argument("--features", metavar="MODULE:FUNCTION", help=(
        "compare images by your own function, (B, C, H, W) in [-1, 1] -> (B, d)"))
    group.add_argument("--batch", type=int, help=(
        "samples drawn together [1000 points, 500 images, 64 latents, captioned: 8]"))
    group.add_argument("--out", metavar="FILE", help=f"tables as FILE.json and FILE.md [{out}]")
    add_field_flags(parser, names)
    args = parser.parse_args(argv)
    sample.check_flags(args, nfe=1, n=10, batch=1, seeds=1, seed=0)
    if args.n and args.n > 1_000_000:
        raise UserError(f"--n {args.n} is more than can be measured; choose at most 1,000,000")
    return args


def prepare(cfg, shape, device, n=None, solver="euler", features=None, batch=None, paper=False,
            prompts=(), clip_model=None):
    """(Reference, other arguments of `measure`, the NFE at which a teacher is at its best).

    Arguments that are left out have the defaults of the command line.
    """
    if paper and cfg.dataset not in UNCAPTIONED_SETS:
        raise UserError(f"--protocol paper is for {' and '.join(UNCAPTIONED_SETS)}, not for "
                        f"{cfg.dataset}")
    usual, best = ((50_000, 100) if cfg.dataset in POINT_SETS else
                   (PAPER_SAMPLES if paper else 5_000, 50) if cfg.dataset in LATENT_SETS else
                   (50_000 if cfg.dataset == "cifar10" else 2_000, 50))
    n = n or usual
    machine.start(device)
    reference = Reference(cfg, n, features, device, paper)
    if reference.scenes:
        y = reference.scenes.questions(n)
    elif cfg.dataset == "folder" and cfg.condition == "class":
        y = classes_as_in(cfg, n)
    else:
        y = sample.conditions_of(cfg, prompts=prompts)(n)
    settings = dict(shape=tuple(shape), n=n, solver=solver, device=device, y=y,
                    batch=batch or sample.at_a_time(cfg.dataset), decode=sample.open_decoder(cfg))
    if clip_model:
        reference.right = clip.Score(clip_model, device)
    return reference, settings, best


def classes_as_in(cfg, n):
    """Classes of n samples, int64 (n,), in the proportions of a folder's sub-folders."""
    import latents
    labels = latents.labels_of(latents.open_images(cfg))
    if labels.max() + 1 != cfg.num_classes:
        raise UserError(f"{cfg.data_dir} has {labels.max() + 1} sub-folders, and the network has "
                        f"{cfg.num_classes} classes; name the images that it was trained on")
    return labels.sort().values[torch.arange(n) * len(labels) // n]


def add_sample_flags(group, parser):
    """Adds the flags of the paper's FID, of samples in files, and of text to image."""
    group.add_argument("--protocol", choices=("paper",), help=f"paper: its FID, {PAPER_SAMPLES:,} "
                       "samples against all images, both as JPEG")
    group.add_argument("--samples", "--npz", nargs="+", metavar="PATH", help="measure these .npz "
                       "files or folders of images, as sample.py writes them, instead of "
                       "checkpoints")
    group.add_argument("--real", metavar="FOLDER", help="the images to compare --samples or "
                       "captioned with [celebahq: its own]")
    text = parser.add_argument_group("text to image (captioned)")
    text.add_argument("--prompts", metavar="FILE", help="what to draw, in turn, or what --samples "
                      "show: one prompt per line, or a .json list of [path, prompt]")
    text.add_argument("--clip", metavar="ID_OR_FOLDER", help="also measure the CLIP score, by this "
                      "CLIPModel of transformers")


def real_folder(args):
    """--real, which text to image needs; UserError if it was not given."""
    if not args.real:
        raise UserError("captioned and --samples are measured against images; name their folder "
                        "by --real")
    return args.real


def of_samples(args):
    """--samples: prints one line per .npz or folder: its distance to the data, its CLIP score."""
    given = {"--out": args.out, "--checkpoint": args.checkpoint, "--median": args.median,
             "--guidance": args.guidance != [None], "--n": args.n, "--seeds": args.seeds > 1,
             f"--dataset {args.dataset}": args.dataset not in (None, "celebahq"),
             "--prompts (which --clip needs)": args.prompts and not args.clip}
    if unused := [name for name, value in given.items() if value]:
        raise UserError(f"--samples measures whole files and prints a table; leave "
                        f"{', '.join(unused)} out")
    celebahq = args.dataset == "celebahq"
    cfg = make_config("celebahq" if celebahq else "folder",
                      **given_flags(args, (*MACHINE, "data_dir", "latents_dir")))
    if args.real or not celebahq:
        cfg = replace(cfg, data_dir=real_folder(args))
    lines, device = [], choose_device(cfg)
    machine.start(device)
    score = clip.Score(args.clip, device) if args.clip else None
    for path in args.samples:
        images = clip.read_samples(path)
        n, side = len(images), images.shape[2]
        if celebahq and side != cfg.image_size:
            raise UserError(f"{path} has samples of {side} x {side}, and celebahq of "
                            f"{cfg.image_size} x {cfg.image_size}; name other data by --real alone")
        if score and len(args.prompts) < n:
            raise UserError(f"{path} has {n} samples, and --prompts has "
                            f"{len(args.prompts)}; name the prompts that they were drawn for")
        # images of `captioned` are enlarged if they are small
        its = cfg if celebahq else replace(cfg, dataset="captioned", image_size=side)
        reference = Reference(its, n, args.features, device, args.protocol == "paper")
        features, scores = [], []
        for i, x in clip.in_blocks(images, machine.mine(n)):
            features.append(reference.features(x))
            if score:
                texts = args.prompts[i : i + len(x)]
                scores += score(x, None, texts)[score.name].tolist()
        features, scores = (sum(x, []) for x in zip(*machine.gathered((features, scores))))
        row = reference.compare(torch.cat(features))
        lines.append([Path(path).name, f"{row['distance']:.1f}", f"{row['precision']:.3f}",
                      f"{row['recall']:.3f}"])
        lines[-1] += [f"{100 * statistics.mean(scores):.1f}"] if score else []
    heads = ["samples", "distance", "precision", "recall"] + (
        [f"{score.name}, in percent"] if score else [])
    if machine.FIRST:
        print(f"{reference.name}\n\n{markdown([heads, *lines])}")


def main(argv=None):
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what is measured")
    group.add_argument("--checkpoint", nargs="+", metavar="FILE", help="students to measure, with "
                       "the teachers beside them [the newest student in runs/]")
    group.add_argument("--dataset", choices=DATASETS, help="the newest student of this data set")
    group.add_argument("--median", action="store_true", help="print the medians over the "
                       "checkpoints, which are the same run with other seeds")
    group.add_argument("--guidance", type=float, nargs="+", default=[None], metavar="W", help=(
        "conditional teachers: guide them with each of these w (Eq. 3) [1]"))
    add_sample_flags(group, parser)
    args = parse(parser, argv, OPENING, "measure with so many seeds of the noise; the tables show "
                 "medians and half the range [1]", "evaluation beside the checkpoint")

    args.prompts = sample.read_prompts(args.prompts) if args.prompts else ()
    if args.samples:
        return of_samples(args)
    paths = [Path(p) for p in args.checkpoint or [sample.find_student(args.dataset)]]
    teachers, students, content, cfg = networks_of(paths, args.guidance,
                                                   **given_flags(args, OPENING))
    if args.guidance != [None] and not teachers:
        raise UserError("--guidance is for the teacher.pt beside a student; name a student by "
                        "--checkpoint")
    if args.dataset and cfg.dataset != args.dataset:
        raise UserError(f"{paths[0]} was trained on {cfg.dataset}, not on {args.dataset}; leave "
                        "--dataset out")
    if cfg.dataset == "captioned":
        cfg, args.n = replace(cfg, data_dir=real_folder(args)), args.n or len(args.prompts) or None
    elif args.real or args.prompts or args.clip:
        raise UserError(f"--real, --prompts and --clip are for captioned, not for {cfg.dataset}")
    elif machine.FIRST and content.get("data", "") not in ("", data.key(cfg)):
        print(f"{paths[0]} was trained on other data than those in {cfg.data_dir}, which it is "
              "now compared with")

    reference, settings, best = prepare(
        cfg, content["shape"], choose_device(cfg), args.n, args.solver, args.features, args.batch,
        paper=args.protocol == "paper", prompts=args.prompts, clip_model=args.clip)
    rows = []
    for seed in range(args.seed, args.seed + args.seeds):
        for networks, nfes in ((teachers, {*args.nfe, best}), (students, args.nfe)):
            for name, network in networks:
                rows += measure(name, network, nfes, reference, seed=seed, **settings)
    shown = of_several_runs(rows, teachers, students) if args.median else rows
    write(args.out or sample.home_of(paths[0]) / "evaluation", cfg.dataset, reference, rows,
          report(cfg.dataset, reference, shown, args.solver), seed=args.seed, solver=args.solver)


if __name__ == "__main__":
    run_script(main)
