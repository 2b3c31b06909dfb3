"""The whole method on one page: `python toy.py`, a minute or two on one CPU core, makes toy.png.

A teacher learns a checkerboard by flow matching. A student is distilled from it with the four
losses of SCFlow. Then both draw samples in 1, 2 and 4 steps. t = 1 is noise, t = 0 is data.
"""

import os
from copy import deepcopy
os.environ["MPLBACKEND"] = "Agg"    # before matplotlib; a notebook's own works only inside it
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.optim import AdamW, lr_scheduler

import losses as L


class MLP(nn.Sequential):
    """The velocity v(z, t), or D(z) without t, of points z (B, 2); t has shape (B,)."""

    def __init__(self, inputs, outputs, act, width=128):
        super().__init__(nn.Linear(inputs, width), act, nn.Linear(width, width), act,
                         nn.Linear(width, width), act, nn.Linear(width, outputs))

    def forward(self, z, t=None, y=None):
        # with sines and cosines of its inputs, a network can learn the sharp edges of the squares
        times = [] if t is None else [t[:, None] * 2.0 ** torch.arange(-3, 4)]
        angles = torch.cat([*(z * 2**k for k in range(4)), *times], dim=1)
        return super().forward(torch.cat([z, angles.sin(), angles.cos()], dim=1)).squeeze(1)


def checkerboard(n):
    a = 4 * torch.rand(n) - 2
    b = torch.rand(n) - 2 * (torch.rand(n) < 0.5) + a.floor() % 2
    return torch.stack([a, b], dim=1) / (4 / 3) ** 0.5   # its std is 1


def student_loss(teacher, student, target, disc, opt_disc, z0, step):
    """The loss of iteration `step` of Algorithm 1. Also updates the discriminator."""
    z1, t = torch.randn_like(z0), torch.rand(len(z0))
    d_s, d_k = L.time_skip(t, torch.rand(len(t)), torch.rand(len(t)), t_skip=0.1)
    zt = L.interpolate(z0, z1, t)
    with torch.no_grad():                          # the teacher steps down and up (Eq. 6)
        v = teacher(zt, t)
        f_lo = L.z0_prediction(target, zt - L.expand(d_s, zt) * v, t - d_s)
        f_hi = L.z0_prediction(target, zt + L.expand(d_k, zt) * v, t + d_k)

    # consistency, truncated near the data (Eq. 8), and bidirectional (Eq. 10)
    f_t = L.z0_prediction(student, zt, t)
    loss = L.consistency_loss(f_t, f_lo, z0, t, t - d_s, t_trunc=0.1, c=0.2)
    loss = loss + L.bidirectional_loss(f_t, f_hi, c=0.2)
    if step >= 500:                                # GAN on the one-step sample x1 (Eq. 7)
        x1, real = L.z0_prediction(student, z1, torch.ones(len(z1))), z0.clone().requires_grad_()
        d_real, d_fake = disc(real), disc(x1.detach())
        loss_d = L.discriminator_loss(d_real, d_fake) + 0.1 / 2 * L.r1_penalty(d_real, real)
        loss_d.backward()
        opt_disc.step(), opt_disc.zero_grad()
        loss = loss + L.generator_loss(disc(x1))
    if step >= 1000:                               # reflow, a straight line from z1 to x1 (Eq. 9)
        zr = L.interpolate(x1.detach(), z1, t)     # free: x1 moves, too (ours)
        loss = loss + L.reflow_loss(L.z0_prediction(student, zr, t), x1, free=True)
    return loss


@torch.no_grad()
def sample(model, z, nfe):
    for i in range(nfe, 0, -1):                    # Euler, from noise at t = 1 to data at t = 0
        z = z - model(z, torch.full((len(z),), i / nfe)) / nfe
    return z


def main(steps=3500):
    torch.manual_seed(0), torch.set_num_threads(1)
    teacher, disc = MLP(32, 2, nn.SiLU()), MLP(18, 1, nn.LeakyReLU(0.2))
    opt = AdamW(teacher.parameters(), lr=4e-3)
    rate = lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(steps):
        z0, z1, t = checkerboard(512), torch.randn(512, 2), torch.rand(512)
        L.flow_matching_loss(teacher(L.interpolate(z0, z1, t), t), z0, z1).backward()   # Eq. 1
        opt.step(), opt.zero_grad(), rate.step()

    student, target = deepcopy(teacher), deepcopy(teacher)   # theta and theta~ start as phi
    opt, opt_disc = AdamW(student.parameters(), 2e-3), AdamW(disc.parameters(), 2e-3, (0.0, 0.99))
    rate = lr_scheduler.CosineAnnealingLR(opt, steps)
    for step in range(steps):
        student_loss(teacher, student, target, disc, opt_disc, checkerboard(256), step).backward()
        opt.step(), opt.zero_grad(), opt_disc.zero_grad(), rate.step()
        for average, p in zip(target.parameters(), student.parameters()):
            average.data.lerp_(p.data, 1 - 0.9)    # theta~ <- 0.9 theta~ + 0.1 theta

    z1, (_, axes) = torch.randn(4000, 2), plt.subplots(2, 3, figsize=(7.5, 5.2))
    for row, model, name, c in zip(axes, (teacher, student), ("teacher", "student"), "rb"):
        for ax, nfe in zip(row, (1, 2, 4)):
            ax.scatter(*sample(model, z1, nfe).T, s=1, c=c)
            ax.set(title=f"{name}, {nfe} NFE", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
    plt.savefig("toy.png"), print("wrote toy.png")


if __name__ == "__main__":
    main()
