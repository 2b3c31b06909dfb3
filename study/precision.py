"""What bf16, or TF32 on a GPU, does to consistency distillation (CD), against float32.

    python -m study.precision weights/mnist/student.pt

CD compares predictions at neighbouring times. The table has the relative error of their difference
f(z, t) - f(z, t - d), the median over 64 samples, and the error of the gradient of its distance
(d = 0.05) as a share of that gradient's variance between batches of 16. z lies between noise and
the network's own samples.
"""

import torch

from config import POINT_SETS
from data import Draws
from harness import UserError
from harness.saved import conditions_of, open_network
from harness.script import given_flags, make_parser, run_script
from losses import distance, interpolate, z0_prediction

STEPS, BATCHES, SAMPLES = (0.1, 0.05, 0.02, 0.01), 8, 64


@torch.no_grad()
def states(network, shape, conditions, n, step=0):
    """(z, t, y): n states at times from 0.1 to 1, drawn for `step`, and their conditions."""
    draws, y = Draws(0, device=next(network.parameters()).device), conditions(n)
    draws.at(step)
    y = None if y is None else y.to(draws.device)
    z1, t = draws.normal(n, *shape), STEPS[0] + (1 - STEPS[0]) * draws.uniform(n)
    x1 = z0_prediction(network, z1, torch.ones_like(t), y)
    return interpolate(x1, draws.normal(n, *shape), t), t, y


def predictions(network, precision, z, t, y, d):
    """f(z, t) and f(z, t - d), computed in fp32, TF32 or bf16."""
    network.bf16, torch.backends.cudnn.allow_tf32 = precision == "bf16", precision == "TF32"
    return z0_prediction(network, z, t, y), z0_prediction(network, z, t - d, y)


@torch.no_grad()
def error(network, precision, d, z, t, y):
    """The median over samples of the relative error of f(z, t) - f(z, t - d)."""
    right, wrong = (a - b for a, b in (predictions(network, p, z, t, y, d)
                                       for p in ("fp32", precision)))
    return ((wrong - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)).median()


def gradient(network, precision, cfg, z, t, y):
    """The gradient of CD's distance, flat."""
    f, f_lo = predictions(network, precision, z, t, y, 0.05)
    loss = distance(f, f_lo.detach(), cfg.metric, cfg.huber_c)
    parts = torch.autograd.grad(loss, [*network.parameters()], allow_unused=True)
    return torch.cat([p.flatten() for p in parts if p is not None])


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", help="teacher.pt, student.pt or resume states")
    parser.add_argument("--device", default="cpu", help="[%(default)s]")
    given = given_flags(parser.parse_args(argv))

    print("| network | precision | " + " | ".join(f"d = {d}" for d in STEPS) + " | gradient |")
    print("|" + "---|" * (len(STEPS) + 3))
    for file in given["files"]:
        network, content, cfg = open_network(file, device=given["device"], precision="fp32")
        if cfg.dataset in POINT_SETS:
            raise UserError(f"{file} is a network of points, which use fp32 by default")
        network.requires_grad_(True)
        many, *batches = (states(network, content["shape"], conditions_of(cfg), n, step)
                          for step, n in enumerate([SAMPLES] + [16] * BATCHES))
        for kind in ["bf16", "TF32"][:1 + given["device"].startswith("cuda")]:
            exact, rounded = (torch.stack([gradient(network, p, cfg, *batch) for batch in batches])
                              for p in ("fp32", kind))
            share = (rounded - exact).square().sum(1).mean() / exact.var(dim=0).sum()
            cells = [error(network, kind, d, *many) for d in STEPS] + [share]
            print(f"| {file} | {kind} | " + " | ".join(f"{100 * e:.1f} %" for e in cells) + " |")


if __name__ == "__main__":
    run_script(main)
