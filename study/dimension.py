"""How the balance of the losses depends on the number of elements: `python -m study.dimension`.

The points of the checkerboard are put into a plane of a space of N dimensions, z0 = size x Q, where
Q (2, N) has orthonormal rows. Either the size is 1, or it is such that the N elements have variance
1 on average, as those of images and latents. The velocity networks see the plane alone, where they
are those of the 2D points; so nothing changes but the losses, which are means over N elements, and
the discriminator, which sees all of them. A table shows the gradient that each loss sends into a
sample, before its weight.
"""

import torch
from torch import nn
from tqdm import trange

import data
import evaluate
import sample
import train
from config import make_config
from harness.saved import SHIPPED
from harness.script import add_field_flags, given_flags, make_parser, run_script
from losses import (bidirectional_loss, consistency_loss, generator_loss, interpolate, reflow_loss,
                    time_skip, z0_prediction, z0_predictions)
from model import set_rates

ELEMENTS = (2, 32, 512)            # N
SIZES = {"std (2/N)^(1/2)": lambda n: 1.0, "std 1": lambda n: (n / 2) ** 0.5}
POINTS = 10_000                    # for the distance
FIELDS = ("seed", "steps", "l_gan", "l_rf", "l_bi", "metric", "huber_c", "r1", "threads")


class Lifted(nn.Module):
    """The velocity (B, N) of z0 = size x Q, made of the velocity network of the points x (B, 2).

    In the plane, zt is a point of the 2D path at another time, at another scale. Outside of it z0
    is 0, so the velocity is zt / t. Both are exact.
    """

    def __init__(self, network, plane, size):
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("plane", plane)       # Q

    def forward(self, zt, t, y=None):
        inside, t = zt @ self.plane.T, t[:, None].clamp(min=1e-6)         # (B, 2)
        whole = (1 - t) * self.size + t
        v = self.network(inside / whole, (t / whole).squeeze(1))
        v = (self.size * v + (1 - self.size) * inside) / whole
        return (v - inside / t) @ self.plane + zt / t


def gradients(net, z0, cfg, draws):
    """{loss: norm of its gradient with respect to one prediction, mean over the batch z0 (B, N)}.

    The losses are those of scflow_step, without weights. CD and BI send their gradient into f(zt,
    t), RF into f(zr, t), the GAN into x1.
    """
    z1, t, u_s, u_k = draws.normal(*z0.shape), *(draws.uniform(len(z0)) for _ in range(3))
    d_s, d_k = (d[:, None] for d in time_skip(t, u_s, u_k, cfg.t_skip))
    zt, t_lo, t_hi = interpolate(z0, z1, t), t - d_s[:, 0], t + d_k[:, 0]
    with torch.no_grad():
        v = net.teacher(zt, t)
        f_lo, f_hi = z0_predictions(net.target, [(zt - d_s * v, t_lo), (zt + d_k * v, t_hi)])
    f_t, x1 = z0_predictions(net.student, [(zt, t), (z1, torch.ones_like(t))])
    f_r = z0_prediction(net.student, interpolate(x1.detach(), z1, t), t)
    metric = cfg.metric, cfg.huber_c
    terms = {"CD": (consistency_loss(f_t, f_lo, z0, t, t_lo, cfg.t_trunc, cfg.truncation, *metric),
                    f_t), "GAN": (generator_loss(net.disc(x1)), x1),
             "RF": (reflow_loss(f_r, x1), f_r), "BI": (bidirectional_loss(f_t, f_hi, *metric), f_t)}
    return {name: len(z0) * torch.autograd.grad(loss, f, retain_graph=True)[0].norm(dim=1).mean()
            for name, (loss, f) in terms.items()}


def distil(teacher, n, elements, cfg):
    """A row of the table: a student of points in n dimensions after cfg.steps iterations."""
    torch.manual_seed(cfg.seed)
    plane = torch.linalg.qr(torch.randn(n, 2)).Q.T
    size = SIZES[elements](n)
    phi = Lifted(teacher, plane, size).requires_grad_(False)
    net = train.begin(phi, phi, cfg, (n,), torch.device("cpu"))
    points, draws = data.Points(cfg.dataset), data.Draws(cfg.seed, stream=1)
    norms, first = [], cfg.steps * 2 // 3          # then all losses are in use
    for step in trange(cfg.steps, desc=f"N = {n}"):
        draws.at(step)
        set_rates(cfg, step, cfg.steps, (net.opt, cfg.lr), (net.opt_disc, cfg.disc_lr))
        z0 = size * points.batch(cfg.batch_size, draws)[0] @ plane
        train.scflow_step(net, (z0, None), step, cfg, draws)
        if step >= first and (step - first) % 10 == 0:
            norms.append(torch.stack([*gradients(net, z0, cfg, draws).values()]).detach())
    real, distances = data.sample_points(cfg.dataset, POINTS, torch.Generator().manual_seed(0)), {}
    for nfe in (1, 2, 4, 16):
        z0 = sample.draw(net.ema, (n,), len(real), nfe, cfg.seed, batch=1000)
        distances[f"NFE {nfe}"] = 1000 * evaluate.sliced_w2(z0 @ plane.T / size, real)
    means = dict(zip(("CD", "GAN", "RF", "BI"), torch.stack(norms).mean(0).tolist()))
    return {"N": n, "elements": elements, **means, "GAN / CD": means["GAN"] / means["CD"],
            **distances}


def main(argv=None):
    parser = make_parser(__doc__)
    add_field_flags(parser, FIELDS)
    args = parser.parse_args(argv)
    cfg = make_config("checkerboard", **{"steps": 1500} | given_flags(args))
    teacher, _, _ = sample.open_network(SHIPPED / "checkerboard" / "teacher.pt",
                                        **given_flags(args, ("threads",)))
    rows = [distil(teacher, n, size, cfg) for size in SIZES for n in ELEMENTS]
    print(evaluate.markdown([list(rows[0]), *(
        [x if isinstance(x, str) else f"{x:.3g}" for x in row.values()] for row in rows)]))


if __name__ == "__main__":
    run_script(main)
