"""What SCFlow is compared with (the paper's Table 3, and FGM): `python train.py --method reflow`.

    cd              plain consistency distillation: L_CD alone, not truncated (no code of its own)
    flowmap         CD for steps that end at any r, not only at 0; the network is told r
    reflow          2-RF: Eq. 1 once more, on pairs that the teacher made
    reflow-distill  2-RF, then one-step regression on pairs that 2-RF made
    fgm             flow generator matching: one step, no data, an online flow beside the teacher

Each step takes the arguments of scflow_step in train.py, and replaces it. Student, teacher,
learning rates and averages are the same (for cifar10, fgm has RealUID's). How FGM's authors train
it we could not obtain. RealUID's run of FGM (arXiv 2509.22459) has alpha 0.5, rates of 3e-5, betas
0 and 0.999 and a clip of 1, for both networks: `study.ablation fgm` compares.
"""

import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from harness import UserError, checkpoint, machine
from harness.saved import at_a_time
from losses import distance, expand, flow_matching_loss, interpolate, time_skip, z0_prediction
from model import ema_update
from sample import draw, noise

PAIRS_SEED = 1_000_003             # the noise of pairs differs from that of any evaluation
FAKE_STEPS = 5                     # online-flow updates per generator update, as in RealUID


def learn(net, cfg, loss, clip=math.inf):
    """Steps theta by the gradient of loss, then its average; returns the gradient's norm."""
    theta = [p for p in net.student.parameters() if p.requires_grad]
    loss.backward(inputs=theta)
    grad_norm = clip_grad_norm_(theta, clip)
    net.opt.step()
    net.opt.zero_grad()
    ema_update(net.ema, net.student, cfg.ema)
    return grad_norm


# ------------------------------------------------------------------------------------- flow map


def flow_map_loss(student, target, v, zt, t, s, r, y=None, metric="pseudo-huber", c=0.01):
    """A step from t to r lands where the teacher's step to s, and then theta~'s step to r, land.

    zt - (t - r) u(zt, t, r) = z_s - (s - r) u~(z_s, s, r), with z_s = zt - (t - s) v, for times
    r <= s <= t (B,) and the teacher's v (B, ...) at (zt, t): SplitMeanFlow's identity, without a
    derivative. u is the mean velocity between t and r. r = 0 is L_CD, not truncated.
    """
    with torch.no_grad():
        z_s = zt - expand(t - s, zt) * v
        goal = z_s - expand(s - r, zt) * target(z_s, s, y, r)
    return distance(zt - expand(t - r, zt) * student(zt, t, y, r), goal, metric, c)


def flow_map_step(net, batch, step, cfg, draws):
    """Distils the teacher into a flow map: r is 0 for 1 in 4 samples, else uniform below s."""
    z0, y = batch
    z1, t, u = draws.normal(*z0.shape), draws.uniform(len(z0)), draws.uniform(len(z0))
    s = t - time_skip(t, u, u, cfg.t_skip)[0]
    r = s * (draws.uniform(len(z0)) * 4 / 3 - 1 / 3).clamp(min=0)
    zt = interpolate(z0, z1, t)
    with torch.no_grad():
        v = net.teacher(zt, t, y)
    loss = flow_map_loss(net.student, net.target, v, zt, t, s, r, y, cfg.metric, cfg.huber_c)
    terms = {"map": loss, "grad_norm": learn(net, cfg, loss)}
    ema_update(net.target, net.student, cfg.mu)
    return terms


# ------------------------------------------------------------------------------ reflow, distill


def reflow_step(net, batch, step, cfg, draws):
    """2-RF (Liu et al., 2022): || z1 - z0 - v(zt, t) ||^2 for pairs (z0, z1) of the teacher.

    The teacher's paths never cross, so the straight lines between such pairs cross less often. The
    velocity field that is learnt is straighter, and Euler needs fewer steps.
    """
    z0, z1, y = batch
    t = draws.uniform(len(z0))
    loss = flow_matching_loss(net.student(interpolate(z0, z1, t), t, y), z0, z1)
    return {"fm": loss, "grad_norm": learn(net, cfg, loss)}


def distill_step(net, batch, step, cfg, draws):
    """One-step regression: || z0 - f(z1, 1) ||^2 on pairs (z0, z1) of 2-RF, only at t = 1."""
    z0, z1, y = batch
    x1 = z0_prediction(net.student, z1, torch.ones(len(z1), device=z1.device), y)
    loss = F.mse_loss(x1, z0)
    return {"onestep": loss, "grad_norm": learn(net, cfg, loss)}


class Pairs:
    """Pairs (z0, z1): noise z1, and the point z0 to which Euler steps of a network carry it.

    cfg.pairs pairs, float32, by cfg.pair_steps steps, each with a condition y if the network takes
    one. z0 is kept in a file of `folder`. Rows that are not made yet are NaN, so an interrupted run
    can continue; each process makes its own slice. Raises UserError if the disk is too full or the
    file is damaged.
    """

    def __init__(self, folder, network, dataset, cfg, seed, device):
        self.size, self.key, self.decode = cfg.pairs, dataset.key, dataset.decode
        self.shape, self.device = dataset.shape, torch.device(device)
        self.y = dataset.conditions(cfg.pairs, torch.Generator().manual_seed(seed))
        source = f"{checkpoint.fingerprint(network)}{cfg.guidance}{dataset.key}".encode()
        file = folder / f"pairs-{cfg.pairs}-{cfg.pair_steps}-{seed}-{zlib.crc32(source):08x}.npy"
        try:
            self.make(file, network, cfg, seed, at_a_time(cfg.dataset))
            self.z0 = torch.from_numpy(np.load(file))
        except ValueError as e:
            raise UserError(f"the pairs {file} are damaged ({e}); remove the file") from e
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt("stopped while pairs were made; the same command continues"
                                    + ", without --overwrite" * cfg.overwrite) from e
        self.z1 = noise(self.shape, self.size, seed)

    def make(self, file, network, cfg, seed, batch):
        whole = (self.size, *self.shape)
        if machine.FIRST and not file.exists():
            checkpoint.no_room(file.parent, 4 * math.prod(whole), str(file), "choose fewer --pairs")
            part = file.with_name(file.name + ".part")
            rows = np.lib.format.open_memmap(part, "w+", np.float32, whole)
            rows[:] = np.nan
            rows.flush()
            part.replace(file)
        machine.wait()
        rows = np.lib.format.open_memmap(file, "r+")
        if rows.shape != whole:
            raise ValueError(f"it holds {rows.shape}, not {whole}")

        mine = machine.mine(self.size)
        for i in tqdm(mine[::batch], desc=f"pairs by {cfg.pair_steps} steps", unit="batch",
                      disable=not machine.FIRST):
            n = min(batch, mine.stop - i)
            if np.isnan(rows[i : i + n]).any():
                y = None if self.y is None else self.y[i : i + n]
                rows[i : i + n] = draw(network, self.shape, n, cfg.pair_steps, seed, batch=batch,
                                       device=self.device, first=i, y=y)
        rows.flush()
        machine.wait()

    def batch(self, n, draws):
        """n pairs: z0 and z1, both float32 (n, *shape), and y (n,) or None."""
        i = draws.integers(self.size, n, device="cpu")
        y = None if self.y is None else self.y[i].to(self.device)
        return machine.moved(self.z0[i], self.device), machine.moved(self.z1[i], self.device), y


# ------------------------------------------------------------------------------------------ FGM


def fgm_loss(u, v, c, alpha=1.0):
    """-2 alpha || u - v ||^2 + 2 <u - v, u - c>: the generator's side of flow generator matching.

    u, v are the velocities of teacher and online flow at the generator's own zt, c = z1 - z0, all
    (B, ...); gradients flow through zt and c. Mean over all elements. alpha = 0.5 is L1 + L2, the
    whole loss of Huang et al. (arXiv 2410.19310); RealUID ran this, and calls it alpha = 1. Our
    default, alpha = 1, is L2 alone; others report that Huang et al. used it. The formula is rebuilt
    from RealUID and public reviews.
    """
    return 2 * ((u - v) * (u - c) - alpha * (u - v).square()).mean()


def fgm_step(net, batch, step, cfg, draws):
    """FGM: steps the online flow FAKE_STEPS times, then the generator f(z1, 1) once.

    The online flow learns the velocity of the generator's samples by Eq. 1. It takes the place of
    the discriminator, `net.disc`, and its optimiser. z0 gives only the shape; no data are used.
    """
    z0, y = batch
    clip = cfg.fgm_clip / z0[0].numel() or math.inf            # the losses here are means

    def generate():
        z1 = draws.normal(*z0.shape)
        return z0_prediction(net.student, z1, torch.ones(len(z0), device=z1.device), y)

    # fresh noise: with the generator's own z1 training collapses
    def noised(x):
        z1, t = draws.normal(*z0.shape), draws.uniform(len(z0))
        return interpolate(x, z1, t), t, z1 - x

    for _ in range(FAKE_STEPS):
        with torch.no_grad():
            zt, t, c = noised(generate())
        loss = F.mse_loss(net.disc(zt, t, y), c)
        loss.backward()
        clip_grad_norm_(net.disc.parameters(), clip)
        net.opt_disc.step()
        net.opt_disc.zero_grad()

    zt, t, c = noised(generate())
    fgm = fgm_loss(net.teacher(zt, t, y), net.disc(zt, t, y), c, cfg.fgm_alpha)
    return {"fake": loss, "fgm": fgm, "grad_norm": learn(net, cfg, fgm, clip)}


STEPS = {"flowmap": (flow_map_step, ("map", "grad_norm")),      # one iteration, and what it logs
         "reflow": (reflow_step, ("fm", "grad_norm")),
         "reflow-distill": (distill_step, ("onestep", "grad_norm")),
         "fgm": (fgm_step, ("fake", "fgm", "grad_norm"))}
