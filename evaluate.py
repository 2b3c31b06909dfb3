"""How far samples are from the data, over the number of function evaluations: `python evaluate.py`.

Points: sliced W2 to 50,000 data points. MNIST: Frechet distance on the features of a small
classifier that is trained here with a fixed seed; its numbers compare only with one another.
"""

import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

import checkpoint
import data
import sample
from config import (DATASETS, LATENT_SETS, MACHINE, TEACHER_FIELDS, Parser, UserError,
                    add_field_flags, make_config, run_script)


# ----------------------------------------------------------------------------------- distances


def sliced_w2(a, b, directions=256, seed=0):
    """Sliced Wasserstein-2 distance between two clouds (n, d) of the same size n.

    The root of the mean, over fixed random directions, of the squared 1D W2 between the sorted
    projections. Raises ValueError where the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"sliced W2 compares clouds of one shape, not {a.shape} and {b.shape}")
    w = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(seed))
    w = w / w.norm(dim=0)
    pa, pb = ((x.float().cpu() @ w).T.contiguous().sort(dim=1).values for x in (a, b))
    return (pa - pb).square().mean().sqrt().item()


def frechet_distance(a, b):
    """Frechet distance between Gaussians fitted to two sets of features, (n, d) and (m, d).

    || mean_a - mean_b ||^2 + tr(A + B - 2 (A B)^(1/2)), in float64; the trace of the root is the
    sum of the roots of the eigenvalues of A^(1/2) B A^(1/2). Raises ValueError for n or m below 2.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a covariance takes at least two samples")
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return (gap + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def spread(z):
    """Standard deviation of samples (n, ...): the root of the mean variance over all elements."""
    return z.flatten(1).var(dim=0).mean().sqrt().item()


# ------------------------------------------------------------------------------ MNIST's features


class Classifier(nn.Module):
    """A small CNN for 28 x 28 digits; `features` (B, 64) come from its last layer but one."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 49, 64), nn.ReLU(),
        )
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        return self.last(self.features(x))


def mnist_classifier(data_dir, folder=Path("runs/mnist"), epochs=2):
    """The classifier, trained once with a fixed seed (about a minute) and kept in `folder`."""
    path = checkpoint.make_folder(folder) / "classifier.pt"
    torch.manual_seed(0)
    net = Classifier()
    if path.exists():
        content = checkpoint.load(path, "classifier")
        checkpoint.load_weights(net, content["net"], path)
        return net.eval()
    images, labels = data.mnist(data_dir)
    generator, batch = torch.Generator().manual_seed(0), 100
    steps = epochs * len(images) // batch
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for i in trange(steps, desc="classifier for the features"):
        chosen = order[i * batch:][:batch]
        loss = F.cross_entropy(net(data.from_uint8(images[chosen])), labels[chosen])
        opt.zero_grad()
        loss.backward()
        opt.step()
        rates.step()
    net.eval()
    held, answers = data.mnist(data_dir, train=False)
    with torch.no_grad():
        right = torch.cat([net(data.from_uint8(x)).argmax(1) for x in held.split(500)]) == answers
    print(f"classifier: {100 * right.float().mean():.2f} % of the test digits right")
    checkpoint.save(path, "classifier", make_config("mnist"), (1, 28, 28), steps,
                    net=net.state_dict())
    return net


@torch.no_grad()
def mnist_features(net, z):
    """Features (n, 64) of images (n, 1, 28, 28) in [-1, 1], seen in the 8 bits of a file."""
    bits = data.from_uint8(data.to_uint8(z)).split(500)
    return torch.cat([net.features(x) for x in bits])


class Reference:
    """What samples of a data set are held against: `distance(z)` and the data's own spread."""

    def __init__(self, dataset, n, data_dir="data"):
        generator = torch.Generator().manual_seed(20_000)
        if dataset == "mnist":
            self.name = f"Frechet distance (classifier's features, {n:,} samples, test digits)"
            self.net = mnist_classifier(data_dir)
            test = data.from_uint8(data.mnist(data_dir, False)[0])
            self.data = mnist_features(self.net, test)
            digits = data.mnist(data_dir)[0]
            other = data.from_uint8(digits[torch.randperm(len(digits), generator=generator)[:n]])
            self.spread = spread(test)
        else:
            self.name = f"sliced W2 (x 1000, {n:,} points)"
            self.data = data.sample_points(dataset, n, generator)
            other, self.spread = data.sample_points(dataset, n, generator), spread(self.data)
            self.net = None
        self.floor = self.distance(other)

    def distance(self, z):
        if self.net is None:
            return 1000 * sliced_w2(z, self.data)
        return frechet_distance(mnist_features(self.net, z), self.data)


# --------------------------------------------------------------------------------------- table


def measure(networks, reference, shape, n, seed=0, solver="euler", batch=500, device="cpu"):
    """Rows of dicts: network, nfe, distance, spread (samples' std over the data's).

    networks is [(name, network, NFEs), ...]; every network and NFE starts from the same noise.
    """
    rows = []
    for name, network, nfes in networks:
        for nfe in nfes:
            z = sample.draw(network, shape, n, nfe, seed, solver, batch, device)
            rows.append({"network": name, "nfe": nfe, "distance": reference.distance(z),
                         "spread": spread(z) / reference.spread})
    return rows


def medians(rows):
    """The medians of the rows over teachers, and over students, for each NFE."""
    groups = {}
    for row in rows:
        role = "teacher" if row["network"].startswith("teacher") else "student"
        groups.setdefault((role, row["nfe"]), []).append(row)
    return [{"network": f"{role}, median of {len(group)}", "nfe": nfe,
             **{k: statistics.median(r[k] for r in group) for k in ("distance", "spread")}}
            for (role, nfe), group in groups.items()]


def table(rows, floor):
    """The rows as aligned text: a line a network, "distance (spread)" for each NFE."""
    nfes = sorted({r["nfe"] for r in rows})
    cells = {(r["network"], r["nfe"]): f"{r['distance']:.1f} ({r['spread']:.2f})" for r in rows}
    lines = ["| NFE |" + "".join(f" {k} |" for k in nfes), "|---|" + "---|" * len(nfes)]
    for name in dict.fromkeys(r["network"] for r in rows):
        lines.append(f"| {name} |" + "".join(f" {cells.get((name, k), '')} |" for k in nfes))
    lines.append(f"| data against data | {floor:.1f} (1.00) |" + " |" * (len(nfes) - 1))
    columns = [max(len(c) for c in column) for column in zip(*(x.split("|") for x in lines))]
    return "\n".join(
        "|".join(c.ljust(w, "-" if i == 1 else " ") for c, w in zip(line.split("|"), columns))
        for i, line in enumerate(lines))


TIMED = (*MACHINE, "model", "vae", "batch_size")


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", nargs="+", metavar="FILE", help="students to measure, with "
                        "the teacher beside the first [the newest student in runs/]")
    parser.add_argument("--dataset", choices=DATASETS, help="the newest student of this data set")
    parser.add_argument("--nfe", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument("--n", type=int, help="samples [50000 points, 2000 images]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise [0]")
    parser.add_argument("--median", action="store_true", help="print the medians over the "
                        "checkpoints, which are the same run with other seeds")
    parser.add_argument("--batch", type=int, default=500, help="samples at a time [500]")
    parser.add_argument("--out", metavar="FILE", help="the table as JSON [beside the checkpoint]")
    add_field_flags(parser, ("data_dir", *TIMED))
    parser.add_argument("--speed", action="store_true", help="time a training iteration on this "
                        "machine in several ways, and stop")
    args = parser.parse_args(argv)
    if args.speed:
        import speed
        given = {k: v for k, v in vars(args).items() if k in TIMED}
        return speed.report(make_config(args.dataset or "mnist", **given))
    for name in ("n", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 2:
            raise UserError(f"--{name} {getattr(args, name)} is too few; it must be at least 2")
    if min(args.nfe) < 1 or args.seed < 0:
        raise UserError("--nfe must be at least 1 and --seed not negative")
    cfg = make_config(**{k: v for k, v in vars(args).items() if k in ("data_dir", *MACHINE)})

    paths = [Path(p) for p in args.checkpoint or [sample.find_student(args.dataset)]]
    opened = [sample.open_network(path, cfg) for path in paths]
    sets = {content["config"]["dataset"] for _, content in opened}
    if len(sets) > 1 or args.dataset and sets != {args.dataset}:
        raise UserError(f"these checkpoints were trained on {', '.join(sorted(sets))}; "
                        "a table holds runs of one data set")
    if sets & set(LATENT_SETS):
        raise UserError("the distance of images and latents (FID) is not measured yet; "
                        "sample.py --npz writes samples for any other tool")
    (dataset,), shape = sets, tuple(opened[0][1]["shape"])
    n = args.n or (50_000 if len(shape) == 1 else 2_000)
    device = next(opened[0][0].parameters()).device

    # the teacher beside each run, once where several runs share it
    teachers, many = {}, 100 if len(shape) == 1 else 50
    for path in paths:
        beside = path.with_name("teacher.pt")
        if beside.exists() and beside not in paths:
            network, content = sample.open_network(beside, cfg)
            settings = checkpoint.config_of(content)
            key = tuple(getattr(settings, name) for name in TEACHER_FIELDS)
            teachers.setdefault(key, (f"teacher of {path.parent.name}", network))
    if len(teachers) == 1:
        teachers = {key: ("teacher", network) for key, (_, network) in teachers.items()}
    networks = [(name, network, [*args.nfe, many]) for name, network in teachers.values()]
    for path, (network, content) in zip(paths, opened):
        name = content["kind"].split()[0] if len(paths) == 1 else path.parent.name
        networks.append((name, network, args.nfe))

    reference = Reference(dataset, n, args.data_dir if "data_dir" in args else cfg.data_dir)
    rows = measure(networks, reference, shape, n, args.seed, batch=args.batch, device=device)
    print(f"{dataset}: {reference.name}, Euler; in brackets std over the data's\n")
    print(table(medians(rows) if args.median else rows, reference.floor))
    out = Path(args.out or paths[0].with_name("evaluation.json"))
    try:
        out.write_text(json.dumps({"dataset": dataset, "metric": reference.name, "seed": args.seed,
                                   "floor": reference.floor, "rows": rows}, indent=1) + "\n")
    except OSError as e:
        raise UserError(f"could not write {out} ({e.strerror}); name another by --out") from e
    print(f"\nwrote {out}")


if __name__ == "__main__":
    run_script(main)
