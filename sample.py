"""Samples a trained run: `python sample.py --nfe 4`, strips over NFE, trajectories, raw samples.

Sampling goes from noise at t = 1 to data at t = 0; NFE counts the calls of the network.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import plots
from config import Config, DATASETS, Parser, UserError, add_field_flags, make_config, run_script
from losses import expand, interpolate
from model import choose_device, prepare, velocity_network

BLOCK = 256                        # noise is drawn in blocks of this many samples


def noise(shape, n, seed, start=0, stream=0):
    """Noise z1 of the samples start ... start + n - 1, float32 (n, *shape) on the CPU.

    A function of seed and index alone: the batch size, the NFE and the device do not change it.
    `stream` keeps independent draws apart, as the re-noising of stochastic sampling needs them.
    """
    first, last = start // BLOCK, (start + n - 1) // BLOCK
    blocks = []
    for block in range(first, last + 1):
        key = ((seed * 4099 + stream) * 1_000_003 + block) * 2_654_435_761 % 2**63
        blocks.append(torch.randn(BLOCK, *shape, generator=torch.Generator().manual_seed(key)))
    return torch.cat(blocks)[start - first * BLOCK :][:n]


# ----------------------------------------------------------------------------------- solvers


@torch.no_grad()
def euler(model, z, nfe, y=None, path=None):
    """z <- z - (1/N) v(z, i/N) for i = N ... 1, with N = nfe; z (B, ...) starts as noise.

    A list given as `path` receives (t, zt, f(zt, t)) before each step and (0, z0, z0) at the end.
    """
    for i in range(nfe, 0, -1):
        t = torch.full((len(z),), i / nfe, device=z.device)
        v = model(z, t, y)
        if path is not None:
            path.append((i / nfe, z, z - expand(t, z) * v))
        z = z - v / nfe
    if path is not None:
        path.append((0.0, z, z))
    return z


@torch.no_grad()
def heun(model, z, nfe, y=None, path=None):
    """Heun's method, of second order: two calls a step, one in the last, so nfe = 2 steps - 1."""
    steps = (nfe + 1) // 2
    for i in range(steps, 0, -1):
        t = torch.full((len(z),), i / steps, device=z.device)
        v = model(z, t, y)
        if path is not None:
            path.append((i / steps, z, z - expand(t, z) * v))
        if i > 1:                  # the trapezoid of both ends; at t = 0 there is nothing to call
            v = (v + model(z - v / steps, t - 1 / steps, y)) / 2
        z = z - v / steps
    if path is not None:
        path.append((0.0, z, z))
    return z


@torch.no_grad()
def stochastic(model, z, nfe, y=None, path=None, renoise=torch.randn_like):
    """Consistency sampling: predict z0, mix fresh noise in up to the next lower time, repeat."""
    for i in range(nfe, 0, -1):
        t = torch.full((len(z),), i / nfe, device=z.device)
        x = z - expand(t, z) * model(z, t, y)
        if path is not None:
            path.append((i / nfe, z, x))
        z = interpolate(x, renoise(z), t - 1 / nfe) if i > 1 else x
    if path is not None:
        path.append((0.0, z, z))
    return z


SOLVERS = {"euler": euler, "heun": heun, "stochastic": stochastic}


def draw(model, shape, n, nfe, seed=0, solver="euler", batch=500, device="cpu", path=None,
         bar=False):
    """n samples, float32 (n, *shape) on the CPU, in batches that never change the result."""
    samples = []
    for start in tqdm(range(0, n, batch), disable=not bar, desc=f"{nfe} NFE", unit="batch"):
        size, more = min(batch, n - start), {}
        if solver == "stochastic":
            streams = iter(range(1, nfe + 1))
            more["renoise"] = lambda z: noise(
                shape, size, seed, start, stream=next(streams)).to(device)
        z1 = noise(shape, size, seed, start).to(device)
        samples.append(SOLVERS[solver](model, z1, nfe, path=path, **more).cpu())
    return torch.cat(samples)


# ---------------------------------------------------------------------------------- pictures


def strips(path, networks, shape, nfes, seed=0, device="cpu", solver="euler", data=None, title=None,
           columns=10):
    """Figure 5: the same noise at every NFE. networks is [(name, network, nfes or None), ...].

    Points: a row a network, a panel an NFE. Images: a row an NFE, a column a noise.
    """
    rows = []
    for name, network, own in networks:
        kinds = own or nfes
        n = 4000 if len(shape) == 1 else columns
        cells = {k: draw(network, shape, n, k, seed, solver, device=device) for k in kinds}
        if len(shape) == 1:
            rows.append((name, name, list(cells.values()) + ([data] if data is not None else [])))
        else:
            rows += [(f"{name}, {k} NFE", name, list(z)) for k, z in cells.items()]
    if len(shape) == 1:
        heads = [f"{k} NFE" for k in nfes] + (["data"] if data is not None else [])
        return plots.grid(path, rows, heads, title)
    if data is not None:
        rows.append(("data", "data", list(data[:columns])))
    return plots.grid(path, rows, title=title)


def trajectory(path, networks, shape, nfe, seed=0, device="cpu", solver="euler", title=None):
    """Figures 4 and 7: zt and its z0-prediction along the path; for points the paths themselves."""
    rows = []
    for name, network in networks:
        steps = []
        draw(network, shape, 2000 if len(shape) == 1 else 2, nfe, seed, solver, batch=2000,
             device=device, path=steps)
        if len(shape) == 1:
            rows.append((f"{name}, {nfe} NFE", name, steps))
            continue
        for i in range(2):
            rows.append((f"{name}: zt", name, [zt[i] for _, zt, _ in steps]))
            rows.append(("z0-prediction", name, [f[i] for _, _, f in steps[:-1]] + [None]))
    if len(shape) == 1:
        return plots.paths(path, rows, title)
    return plots.grid(path, rows, [f"t = {t:.2g}" for t, _, _ in steps], title)
