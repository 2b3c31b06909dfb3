"""What bf16, or TF32 on a GPU, does to consistency distillation (CD), against float32.

    python -m study.precision weights/mnist/student.pt

CD compares predictions at neighbouring times. The table has the relative error of their difference
f(z, t) - f(z, t - d), the median over 64 samples, and the error of CD's gradient as a share of its
variance between batches of 16. z lies between noise and the network's own samples.
"""

import torch

from config import POINT_SETS
from data import Draws
from harness import UserError
from harness.saved import conditions_of, open_network
from harness.script import given_flags, make_parser, run_script
from losses import consistency_loss, interpolate, z0_prediction

STEPS, BATCHES = (0.1, 0.05, 0.02, 0.01), 8


def at(precision, network):
    """Sets the precision in which a network computes, fp32, TF32 or bf16."""
    network.bf16, torch.backends.cudnn.allow_tf32 = precision == "bf16", precision == "TF32"


def states(network, shape, n, step, conditions):
    """(z, t, y): n states at times from 0.1 to 1, drawn for `step`, and their conditions."""
    draws, y = Draws(0, device=next(network.parameters()).device), conditions(n)
    draws.at(step)
    y = None if y is None else y.to(draws.device)
    z1, t = draws.normal(n, *shape), STEPS[0] + (1 - STEPS[0]) * draws.uniform(n)
    at("fp32", network)
    x1 = z0_prediction(network, z1, torch.ones_like(t), y)
    return interpolate(x1, draws.normal(n, *shape), t), t, y


@torch.no_grad()
def errors(network, precision, shape, conditions):
    """The median relative errors of f(z, t) - f(z, t - d), one per d of STEPS."""
    z, t, y = states(network, shape, 64, 0, conditions)
    differences = {}
    for kind in ("fp32", precision):
        at(kind, network)
        f = z0_prediction(network, z, t, y)
        differences[kind] = [f - z0_prediction(network, z, t - d, y) for d in STEPS]
    return [((wrong - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)).median().item()
            for right, wrong in zip(*differences.values())]


def gradient(network, precision, shape, step, conditions, cfg):
    """CD's gradient, flat; the network is also its own teacher and theta~, and d is 0.05."""
    with torch.no_grad():
        z, t, y = states(network, shape, 16, step, conditions)
        at(precision, network)
        lo = z - 0.05 * network(z, t, y)
        f_lo = z0_prediction(network, lo, t - 0.05, y)
    loss = consistency_loss(z0_prediction(network, z, t, y), f_lo, z, t, t, 0.0, cfg.truncation,
                            cfg.metric, cfg.huber_c)
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
            raise UserError(f"{file} is a network of points, which always use fp32")
        network.requires_grad_(True)
        conditions, shape = conditions_of(cfg), content["shape"]
        for kind in ["bf16", "TF32"][:1 + (given["device"] != "cpu")]:
            exact, rounded = (torch.stack([gradient(network, p, shape, step, conditions, cfg)
                                           for step in range(BATCHES)]) for p in ("fp32", kind))
            share = (rounded - exact).square().sum(1).mean() / exact.var(dim=0).sum()
            cells = [f"{100 * e:.1f} %" for e in (*errors(network, kind, shape, conditions), share)]
            print(f"| {file} | {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_script(main)
