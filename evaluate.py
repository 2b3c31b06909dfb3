"""How good samples are, over the number of function evaluations: `python evaluate.py`.

Points: sliced W2 to 50,000 data points. Images: Frechet distance of features (features.py). Beside
it precision and recall, how far few steps end from one step, the spread, and the speed.
"""

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import sample
from config import (DATASETS, LATENT_SETS, MACHINE, POINT_SETS, TEACHER_FIELDS, Config, Parser,
                    UserError, add_field_flags, flag, make_config, run_script)

MEASURES = ("distance", "precision", "recall", "consistency", "spread", "per_second")
MANY = {True: 100, False: 50}      # NFE of the teacher at its best, for points and for images
NEIGHBOURS = 10_000                # precision and recall take at most so many samples of each
BATCH = 100                        # images that are decoded and kept as pixels at a time


# ----------------------------------------------------------------------------------- distances


def projections(x, directions=256, seed=0):
    """Points (n, d) projected on fixed random directions, each sorted: (directions, n)."""
    w = torch.randn(x.shape[1], directions, generator=torch.Generator().manual_seed(seed))
    along = (x.float().cpu() @ (w / w.norm(dim=0))).T.contiguous()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # a quarter of torch.sort's time
        list(pool.map(np.ndarray.sort, along.numpy()))         # each row where it lies
    return along


def sliced_w2(a, b, directions=256, seed=0, b_projected=None):
    """Sliced Wasserstein-2 distance between two clouds (n, d) of the same size n.

    The root of the mean, over fixed random directions, of the squared 1D W2 between the sorted
    projections (those of b may be known). Raises ValueError where the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"sliced W2 compares clouds of one shape, not {a.shape} and {b.shape}")
    pa = projections(a, directions, seed)
    pb = projections(b, directions, seed) if b_projected is None else b_projected
    return (pa - pb).square().mean().sqrt().item()


def frechet_distance(a, b):
    """Frechet distance between Gaussians fitted to two sets of features, (n, d) and (m, d).

    || mean_a - mean_b ||^2 + tr(A + B - 2 (A B)^(1/2)), in float64; the trace of the root is the
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


def squared_distances(a, b):
    """|| a - b ||^2 of every pair of rows, float64 (n, d) and (m, d) -> (n, m), in one product.

    Right to about 1e-15 of the rows' squared norms; takes about a third of torch.cdist's time.
    """
    apart = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return apart.add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


@torch.no_grad()
def squared_radii(x, k=3, at_a_time=100):
    """Squared distance of each of the features (n, d) from its k-th neighbour, (n,) float64.

    In pieces, so that memory grows with n alone, and small ones, which caches and the allocator
    like: twice as fast as 1,000 at a time. Raises ValueError for n <= k.
    """
    if len(x) <= k:
        raise ValueError(f"precision and recall take more than k = {k} samples")
    x = x.double().cpu()                           # each is its own nearest, hence k + 1
    return torch.cat([squared_distances(part, x).topk(k + 1, largest=False).values[:, -1]
                      for part in x.split(at_a_time)])


@torch.no_grad()
def precision_recall(real, fake, k=3, at_a_time=100, real_radii=None):
    """Precision and recall of Kynkaanniemi et al. (2019) on features (n, d), (m, d).

    Precision: the share of `fake` within the k-th neighbour's distance of some `real`; recall: the
    reverse. Raises ValueError for n or m <= k. real_radii: squared_radii(real), where known.
    """
    real_radii = squared_radii(real, k, at_a_time) if real_radii is None else real_radii
    fake_radii = squared_radii(fake, k, at_a_time)
    real, fake = real.double().cpu(), fake.double().cpu()
    inside, covered = torch.zeros(len(fake), dtype=torch.bool), []
    for part, radius in zip(real.split(at_a_time), real_radii.split(at_a_time)):
        apart = squared_distances(part, fake)      # (at_a_time, m)
        inside |= (apart < radius[:, None]).any(0)
        covered.append((apart < fake_radii).any(1))
    return inside.double().mean().item(), torch.cat(covered).double().mean().item()


class Spread:
    """Standard deviation of samples that come in batches: the root of the mean variance over all
    elements of a sample."""

    def __init__(self, *batches):
        self.n, self.sums = 0, 0
        for z in batches:
            self.add(z)

    def add(self, z):
        """Takes in a batch (b, ...)."""
        z = z.flatten(1).double().cpu()
        self.n, self.sums = self.n + len(z), self.sums + torch.stack([z.sum(0), z.square().sum(0)])

    @property
    def std(self):
        mean, square = self.sums / self.n
        return ((square - mean.square()).mean() * self.n / (self.n - 1)).sqrt().item()


# --------------------------------------------------------------------------------------- the data


class Reference:
    """The data that samples are held against, as features, and how.

    name: of the distance, with its counts. floor: what other data of the same kind get, the best
    that samples can be expected to.
    """

    def __init__(self, cfg, n, spec="", device="cpu"):
        generator = torch.Generator().manual_seed(20_000)
        self.points, self.floor_name = cfg.dataset in POINT_SETS, "data against data"
        if self.points:
            if spec:
                raise UserError("--features is for images; points are compared as they are")
            self.features, self.name = lambda z: z.float().cpu(), f"sliced W2 x 1000, {n:,} points"
            self.data, other = (data.sample_points(cfg.dataset, n, generator) for _ in range(2))
            spread, others = Spread(self.data), Spread(other)
        else:
            from features import extractor         # points need no torchvision, and start faster
            name, self.features = extractor(cfg.dataset, spec, cfg.data_dir, device)
            if cfg.dataset == "mnist":
                digits = data.mnist(cfg.data_dir)[0]
                digits = digits[torch.randperm(len(digits), generator=generator)[:n]]
                real = data.from_uint8(data.mnist(cfg.data_dir, False)[0])
                other, against = data.from_uint8(digits), f"{len(real):,} test digits"
                spread, others = Spread(real), Spread(other)
                self.data, other = self.features(real), self.features(other)
            else:
                self.data, spread = self.of_images(cfg)
                others, against = spread, f"{len(self.data):,} images"
            if min(n, len(self.data)) <= self.data.shape[1]:
                raise UserError(f"{min(n, len(self.data)):,} samples are too few for the "
                                f"covariance of {self.data.shape[1]:,} features; take more by "
                                "--n, more images, or fewer features by --features")
            self.name = f"Frechet distance on {name}, {n:,} samples against {against}"
        self.data = self.data[torch.randperm(len(self.data), generator=generator)]
        self.std, self.at_most = spread.std, min(n, len(self.data), NEIGHBOURS)
        self.radii = squared_radii(self.data[:self.at_most])
        self.projected = projections(self.data) if self.points else None
        if cfg.dataset in LATENT_SETS:             # there is no test split: some against the rest
            k = min(n, len(self.data) // 2)
            self.floor_name = f"data, {k:,} against {len(self.data) - k:,}"
            self.floor = self.compare(self.data[:k], self.data[k:])
        else:
            self.floor = self.compare(other)
        self.floor["spread"] = others.std / self.std

    def of_images(self, cfg):
        """Features and spread of all the images of a run, in batches."""
        images, found, spread = data.open_images(cfg), [], Spread()
        batch, skipped = [], []
        for i, (file, pixels, _) in enumerate(tqdm(data.decoded(images, cfg.image_size),
                                                total=images.size, desc="features of the data"), 1):
            (skipped if pixels is None else batch).append(file if pixels is None else pixels)
            if batch and (len(batch) == BATCH or i == images.size):
                x = data.from_uint8(torch.stack(batch))
                found.append(self.features(x))
                spread.add(x)
                batch = []
        if skipped:
            print(f"skipped {len(skipped):,} images that cannot be read, {skipped[0]} the first")
        if not found:
            raise UserError(f"{cfg.data_dir} has no image that can be read")
        return torch.cat(found), spread

    def compare(self, fake, real=None):
        """Distance, precision and recall of features (n, d), against the data's or `real`."""
        known = self.radii if real is None else None
        real = self.data if real is None else real
        k = min(self.at_most, len(real), len(fake))
        precision, recall = precision_recall(real[:k], fake[:k], real_radii=known)
        if self.points:
            distance = 1000 * sliced_w2(fake, real, b_projected=self.projected)
        else:
            distance = frechet_distance(fake, real)
        return {"distance": distance, "precision": precision, "recall": recall}


# ----------------------------------------------------------------------------------- measuring

def measure(name, network, nfes, reference, shape, n, seed=0, solver="euler", batch=500,
            device="cpu", decode=sample.same):
    """Rows of dicts, one an NFE: network, nfe, distance, precision, recall, consistency, spread,
    per_second.

    The same noise for every network and NFE. consistency: RMS distance, per element of z0, of the
    sample from the one-step sample of the same noise; spread: std over the data's; per_second:
    samples, decoding included. Memory holds a batch of samples, and the features of n at every NFE.
    """
    found = {k: {"features": [], "spread": Spread(), "gap": 0.0, "seconds": 0.0}
             for k in sorted({1, *nfes})}
    for start in tqdm(range(0, n, batch), desc=f"{name}, {'/'.join(map(str, nfes))} NFE",
                      unit="batch", leave=False):
        one = None
        for k, entry in found.items():             # the least NFE, 1, comes first
            clock = time.perf_counter()
            z = sample.draw(network, shape, min(batch, n - start), k, seed, solver, batch, device,
                            first=start)
            x = decode(z)
            entry["seconds"] += time.perf_counter() - clock
            one = z if one is None else one
            entry["gap"] += (z - one).double().square().sum().item()
            entry["features"].append(reference.features(x))
            entry["spread"].add(x)
    numbers = n * torch.Size(shape).numel()
    return [{"network": name, "nfe": k, "seed": seed,
             **reference.compare(torch.cat(found[k]["features"])),
             "consistency": (found[k]["gap"] / numbers) ** 0.5,
             "spread": found[k]["spread"].std / reference.std,
             "per_second": n / found[k]["seconds"]} for k in nfes]


def medians(rows, name=lambda row: row["network"]):
    """The medians of the rows of one name and NFE; `within`: half the range of their distances."""
    groups = {}
    for row in rows:
        groups.setdefault((name(row), row["nfe"]), []).append(row)
    return [{"network": network, "nfe": nfe, "runs": len(group),
             "within": (max(r["distance"] for r in group) - min(r["distance"] for r in group)) / 2,
             **{k: statistics.median(r[k] for r in group) for k in MEASURES}}
            for (network, nfe), group in groups.items()]


def table(rows, cell, floor="", floor_name="data against data"):
    """Rows as an aligned Markdown table: a line a network, a column an NFE, cell(row) in each."""
    nfes = sorted({r["nfe"] for r in rows})
    cells = {(r["network"], r["nfe"]): cell(r) for r in rows}
    lines = ["| NFE |" + "".join(f" {k} |" for k in nfes), "|---|" + "---|" * len(nfes)]
    for name in dict.fromkeys(r["network"] for r in rows):
        lines.append(f"| {name} |" + "".join(f" {cells.get((name, k), '')} |" for k in nfes))
    if floor:
        lines.append(f"| {floor_name} | {floor} |" + " |" * (len(nfes) - 1))
    columns = [max(len(c) for c in column) for column in zip(*(x.split("|") for x in lines))]
    return "\n".join(
        "|".join(c.ljust(w, "-" if i == 1 else " ") for c, w in zip(line.split("|"), columns))
        for i, line in enumerate(lines))


def report(dataset, reference, rows, solver="euler"):
    """The rows as text: a table of the distance with the spread, one each of the other measures."""
    floor, several = reference.floor, max(r.get("runs", 1) for r in rows)
    within = f" +- half the range of {several} runs" if several > 1 else ""

    def distance(r):
        plus = f" +- {r['within']:.1f}" if r.get("runs", 1) > 1 else ""
        return f"{r['distance']:.1f}{plus} ({r['spread']:.2f})"

    kept = f"k = 3, {reference.at_most:,} samples"
    return "\n\n".join([
        f"{dataset}, {solver}: {reference.name}{within}; in brackets std over the data's",
        table(rows, distance, f"{floor['distance']:.1f} ({floor['spread']:.2f})",
              reference.floor_name),
        f"precision / recall ({kept})",
        table(rows, lambda r: f"{r['precision']:.3f} / {r['recall']:.3f}",
              f"{floor['precision']:.3f} / {floor['recall']:.3f}", reference.floor_name),
        "consistency: RMS distance from the one-step sample of the same noise",
        table(rows, lambda r: f"{r['consistency']:.3f}"),
        "samples a second",
        table(rows, lambda r: f"{r['per_second']:,.0f}" if r["per_second"] > 10
              else f"{r['per_second']:.2f}")])


def write(out, dataset, reference, rows, text, **more):
    """The rows as OUT.json and the text as OUT.md; UserError where they cannot be written."""
    out = str(out).removesuffix(".json").removesuffix(".md")
    content = {"dataset": dataset, "metric": reference.name, "floor": reference.floor, **more,
               "rows": rows}
    write_text(f"{out}.json", json.dumps(content, indent=1))
    write_text(f"{out}.md", text)
    print(f"\nwrote {out}.json, {out}.md")


def write_text(path, text):
    """Writes a text to a temporary file, then renames it; UserError where that fails."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text + "\n")
        part.replace(path)
    except OSError as e:
        raise UserError(f"could not write {path} ({e.strerror}); name another by --out") from e


# ------------------------------------------------------------------------------- command line

TIMED = (*MACHINE, "model", "vae", "batch_size")
MEASURED = ("data_dir", "vae_weights", *TIMED)
TRAINED = tuple(f.name for f in fields(Config) if f.name not in (
    *MEASURED, "dataset", "out", "seed", "resume", "overwrite", "download", "method", "losses",
    "teacher_checkpoint"))


def networks_of(paths, cfg):
    """[(name, network)] of the teachers beside the checkpoints, then of these; and their content.

    A teacher that several runs share comes once. Raises UserError for runs of different data sets.
    """
    opened = [sample.open_network(path, cfg) for path in paths]
    sets = {content["config"]["dataset"] for _, content in opened}
    if len(sets) > 1:
        raise UserError(f"these checkpoints were trained on {', '.join(sorted(sets))}; "
                        "a table holds runs of one data set")
    settings = [checkpoint.config_of(content) for _, content in opened]
    if sets & set(LATENT_SETS):
        for other in settings[1:]:
            clash = checkpoint.differences(settings[0], other, ("data_dir", "image_size", "vae"))
            if clash:
                raise UserError(f"these checkpoints were trained on other images: {clash}; a table "
                                "holds runs of one data set")
    teachers = {}
    for path in paths:
        beside = path.with_name("teacher.pt")
        if beside.exists() and beside not in paths:
            network, content = sample.open_network(beside, cfg)
            its = checkpoint.config_of(content)
            key = tuple(getattr(its, name) for name in TEACHER_FIELDS)
            teachers.setdefault(key, (f"teacher of {path.parent.name}", network))
    if len(teachers) == 1:
        teachers = {key: ("teacher", network) for key, (_, network) in teachers.items()}
    names = [path.parent.name for path in paths]
    names = names if len(set(names)) == len(paths) else list(map(str, paths))
    if len(paths) == 1:
        names = [opened[0][1]["kind"].split()[0]]
    students = [(name, network) for name, (network, _) in zip(names, opened)]
    return list(teachers.values()), students, opened[0][1]


def parse(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--checkpoint", nargs="+", metavar="FILE", help="students to measure, with "
                      "the teachers beside them [the newest student in runs/]")
    what.add_argument("--dataset", choices=DATASETS, help="the newest student of this data set")
    what.add_argument("--ablation", choices=("losses", "weights", "times", "methods"),
                      help="train and measure the runs of the paper's Table 4, 5, 6 or 3; finished "
                      "ones are kept [data set: checkerboard]")
    what.add_argument("--speed", action="store_true", help="time a training iteration and sampling "
                      "on this machine, and stop")
    how = parser.add_argument_group("how")
    how.add_argument("--nfe", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N",
                     help="numbers of function evaluations; the teacher also at its best "
                     "[1 2 4 8 16]")
    how.add_argument("--n", type=int, help="samples [50000 points, 2000 digits, 5000 latents]")
    how.add_argument("--seed", type=int, default=0, help="of the noise, first of --seeds [0]")
    how.add_argument("--seeds", type=int, default=1, help="measure with so many seeds of the noise "
                     "(--ablation: train with so many); medians and half the range [1]")
    how.add_argument("--median", action="store_true", help="print the medians over the "
                     "checkpoints, which are the same run with other seeds")
    how.add_argument("--solver", choices=tuple(sample.SOLVERS), default="euler", help="[euler]")
    how.add_argument("--features", default="", metavar="MODULE:FUNCTION", help="compare images by "
                     "a function of yours, (B, C, H, W) in [-1, 1] -> (B, d)")
    how.add_argument("--batch", type=int, help="samples at a time [1000 points, 500 images, 64 "
                     "latents]")
    how.add_argument("--out", metavar="FILE", help="the tables as FILE.json and FILE.md "
                     "[evaluation beside the checkpoint]")
    add_field_flags(parser, MEASURED + TRAINED)
    args = parser.parse_args(argv)
    idle = [n for n in (*TRAINED, "model", "vae", "batch_size") if n in args]
    if idle and not args.ablation and not (args.speed and idle[0] in TIMED):
        raise UserError(f"{flag(idle[0])} is for the runs of --ablation; checkpoints know theirs")
    sample.check(args, nfe=1, n=10, batch=1, seeds=1, seed=0)
    args.nfe = list(dict.fromkeys(args.nfe))
    return args


def main(argv=None):
    args = parse(argv)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items()
             if k in MEASURED + TRAINED}
    if args.speed:
        import speed
        return speed.report(make_config(args.dataset or "mnist", **given))
    if args.ablation:
        import ablation
        return ablation.run(args, given)

    machine = make_config(**{k: v for k, v in given.items() if k in (*MACHINE, "vae_weights")})
    paths = [Path(p) for p in args.checkpoint or [sample.find_student(args.dataset)]]
    teachers, students, content = networks_of(paths, machine)
    cfg = sample.machine_of(machine, content)
    if args.dataset and cfg.dataset != args.dataset:
        raise UserError(f"{paths[0]} was trained on {cfg.dataset}, not on {args.dataset}; leave "
                        "--dataset out")
    cfg = replace(cfg, data_dir=given.get("data_dir", cfg.data_dir))
    reference, how = prepare(args, cfg, content["shape"], students[0][1])
    how["decode"] = sample.open_decoder(content, machine)

    rows = []
    for seed in range(args.seed, args.seed + args.seeds):
        for name, network in teachers:
            rows += measure(name, network, of_teachers(args, reference), reference, seed=seed,
                            **how)
        for name, network in students:
            rows += measure(name, network, args.nfe, reference, seed=seed, **how)
    shown = medians(rows) if args.seeds > 1 else rows
    if args.median:
        shown = medians(rows, lambda row: f"{row['network'].split()[0]}s" if
                        row["network"].startswith("teacher") else "students")
    text = report(cfg.dataset, reference, shown, args.solver)
    print(text)
    write(args.out or paths[0].with_name("evaluation"), cfg.dataset, reference, rows, text,
          seed=args.seed, solver=args.solver)


def prepare(args, cfg, shape, network):
    """The Reference of the command line's settings, and the arguments that `measure` takes."""
    points, device = len(shape) == 1, next(network.parameters()).device
    n = args.n or (50_000 if points else 5_000 if cfg.dataset in LATENT_SETS else 2_000)
    batch = args.batch or sample.at_a_time(cfg.dataset)
    return Reference(cfg, n, args.features, device), dict(
        shape=tuple(shape), n=n, solver=args.solver, batch=batch, device=device)


def of_teachers(args, reference):
    """The NFE that teachers are measured at: those of the students, and many."""
    odd = args.solver == "heun"                    # which takes an odd number
    return sorted({*args.nfe, MANY[reference.points] - odd})


if __name__ == "__main__":
    run_script(main)
