"""What SCFlow is held against (the paper's Table 3, and FGM): `python train.py --method reflow`.

    cd              plain consistency distillation: L_CD alone, not truncated (no code of its own)
    reflow          2-RF: Eq. 1 once more, on pairs that the teacher made
    reflow-distill  2-RF, then one-step regression on pairs that 2-RF made
    fgm             flow generator matching: one step, no data, an online flow beside the teacher

Same student, teacher, learning rates and averages as scflow_step in train.py, which they replace;
FGM's authors use rates of their own (3e-5, betas 0 and 0.999, gradients clipped at 1).
"""

import math
import shutil
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import parallel
import sample
from config import UserError
from losses import flow_matching_loss, interpolate, z0_prediction
from model import copy_of, ema_update

PAIRS_SEED = 1_000_003             # keeps the pairs' noise apart from that of any evaluation
FAKE_STEPS = 5                     # of the online flow, to one of the generator; below 3 it fails


def learn(net, cfg, loss):
    """Steps theta by the gradient of loss, then its averages; returns the gradient's norm."""
    theta = list(net.student.parameters())
    loss.backward(inputs=theta)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in theta])
    net.opt.step()
    net.opt.zero_grad()
    ema_update(net.ema, net.student, cfg.ema)
    return grad_norm


# ------------------------------------------------------------------------------ reflow, distill


def reflow_step(net, z0, z1, step, cfg, draws):
    """2-RF (Liu et al., 2022): || z1 - z0 - v(zt, t) ||^2 for pairs (z0, z1) of the teacher.

    The paths of such pairs do not cross, so their straight lines cross less than those of
    independent pairs do, and Euler may take longer steps along what is learnt.
    """
    t = draws.uniform(len(z0))
    loss = flow_matching_loss(net.student(interpolate(z0, z1, t), t), z0, z1)
    return {"fm": loss, "grad_norm": learn(net, cfg, loss)}


def distill_step(net, z0, z1, step, cfg, draws):
    """One-step regression: || z0 - f(z1, 1) ||^2 on pairs (z0, z1) of 2-RF, t = 1 alone."""
    x1 = z0_prediction(net.student, z1, torch.ones(len(z1), device=z1.device))
    loss = F.mse_loss(x1, z0)
    return {"onestep": loss, "grad_norm": learn(net, cfg, loss)}


class Pairs:
    """Pairs (z0, z1): noise z1, and z0 where `nfe` Euler steps of a network carry it, in a file.

    n samples of `shape`, float32. A row that is not there yet is NaN, so making them goes on where
    it was stopped; every process makes its own slice. Raises UserError where the disk is full.
    """

    def __init__(self, path, network, shape, n, nfe, seed, device, batch=500):
        self.shape, self.size, self.device = tuple(shape), n, device
        try:
            if parallel.FIRST and not path.exists():
                need, free = 4 * n * math.prod(shape), shutil.disk_usage(path.parent).free
                if need > free:
                    raise OSError(f"{need / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
                part = path.with_name(path.name + ".part")
                rows = np.lib.format.open_memmap(part, "w+", np.float32, (n, *shape))
                rows[:] = np.nan
                rows.flush()
                part.replace(path)
            parallel.wait()
            rows = np.lib.format.open_memmap(path, "r+")
            if rows.shape != (n, *shape):
                raise ValueError(f"it holds {rows.shape}, not {(n, *shape)}")
            each = -(-n // parallel.WORLD)
            mine = range(parallel.RANK * each, min((parallel.RANK + 1) * each, n))
            for i in tqdm(mine[::batch], desc=f"pairs by {nfe} steps", unit="batch",
                          disable=not parallel.FIRST):
                k = min(batch, mine.stop - i)
                if np.isnan(rows[i : i + k]).any():
                    rows[i : i + k] = sample.draw(network, shape, k, nfe, seed, batch=batch,
                                                  device=device, first=i)
            rows.flush()
            parallel.wait()
        except (OSError, ValueError) as e:
            raise UserError(f"could not write or read the pairs {path} ({e}); make room, or remove "
                            "the file where it is damaged") from e
        self.z0 = torch.from_numpy(np.array(rows))
        self.z1 = sample.noise(shape, n, seed)

    def batch(self, n, draws):
        """n pairs, ((n, *shape), (n, *shape)): data first, then its noise."""
        i = draws.integers(self.size, n, device="cpu")
        return self.z0[i].to(self.device), self.z1[i].to(self.device)


# ------------------------------------------------------------------------------------------ FGM


def fgm_loss(u, v, c, alpha=1.0):
    """-2 alpha || u - v ||^2 + 2 <u - v, u - c>: the generator's side of flow generator matching.

    u, v are the velocities of teacher and online flow at the generator's own zt, c = z1 - z0, all
    (B, ...); gradients flow through zt and c. Mean over all elements. alpha = 0.5 is L1 + L2 of
    Huang et al. (arXiv 2410.19310), alpha = 1 their L2 alone, which is used in practice; rebuilt
    from secondary sources, RealUID (arXiv 2509.22459) and reviews.
    """
    return 2 * ((u - v) * (u - c) - alpha * (u - v).square()).mean()


def fgm_step(net, z0, y, step, cfg, draws):
    """FGM: steps the online flow FAKE_STEPS times, then the generator f(z1, 1) once.

    The online flow learns the velocity of the generator's samples by Eq. 1 and takes the place (and
    the optimiser) of the discriminator; z0 gives the shape alone, no data are used.
    """
    def generate():
        z1 = draws.normal(*z0.shape)
        return z0_prediction(net.student, z1, torch.ones(len(z0), device=z1.device), y)

    def on_the_way(x):                             # z1 afresh: the generator's own collapses it
        z1, t = draws.normal(*z0.shape), draws.uniform(len(z0))
        return interpolate(x, z1, t), t, z1 - x

    for _ in range(FAKE_STEPS):
        with torch.no_grad():
            zt, t, c = on_the_way(generate())
        loss = F.mse_loss(net.disc(zt, t, y), c)
        loss.backward()
        net.opt_disc.step()
        net.opt_disc.zero_grad()

    zt, t, c = on_the_way(generate())
    fgm = fgm_loss(net.teacher(zt, t, y), net.disc(zt, t, y), c)
    return {"fake": loss, "fgm": fgm, "grad_norm": learn(net, cfg, fgm)}


# ------------------------------------------------------------------------------ what train.py uses


STEPS = {"reflow": (reflow_step, ("fm", "grad_norm")),          # one iteration, and what it logs
         "reflow-distill": (distill_step, ("onestep", "grad_norm")),
         "fgm": (fgm_step, ("fake", "fgm", "grad_norm"))}


def prepare(net, cfg, dataset, folder, start, train):
    """What a baseline's iterations need: (the function for their batches, number of the first).

    reflow-distill spends the first 5/6 of its iterations on a 2-RF of its own in folder/reflow, as
    the paper spends 50 of 60 epochs; `train` is train.train.
    """
    if cfg.method == "fgm":
        return dataset.batch, 0
    path, source, first, seed = folder / "pairs.npy", net.teacher, 0, cfg.seed + PAIRS_SEED
    if start == 0 and not cfg.resume and parallel.FIRST:
        path.unlink(missing_ok=True)               # of an older run
    if cfg.method == "reflow-distill":
        first = max(1, cfg.steps * 5 // 6)
        straight = train(replace(cfg, method="reflow", steps=first, out=str(folder / "reflow"),
                                 teacher_checkpoint=str(folder / "teacher.pt")))
        source, seed = copy_of(net.teacher), seed + PAIRS_SEED   # noise that 2-RF has not seen
        checkpoint.load_weights(source, checkpoint.load(straight, "student")["ema"], straight)
        if start <= first:                         # theta <- 2-RF
            for network in (net.student, net.target, net.ema):
                parallel.own(network).load_state_dict(source.state_dict())
    pairs = Pairs(path, source, dataset.shape, cfg.pairs, cfg.pair_steps, seed,
                  next(source.parameters()).device, sample.at_a_time(cfg.dataset))
    return pairs.batch, first
