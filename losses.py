"""The four losses of SCFlow, and the teacher's: pure functions, tensors in, scalar out.

Notation of the paper throughout: z0 data, z1 noise, t in [0, 1] with t = 1 noise and t = 0 data,
zt = (1 - t) z0 + t z1, velocity v = z1 - z0, and the z0-prediction f(z, t) = z - t v(z, t).
Points (B, 2), images and latents (B, C, H, W) share every line; t always has shape (B,).
Every loss is a mean over all elements (R1: over samples). Goals that the paper marks sg
(stop-gradient) are detached here, but for x1 in reflow_loss(free=True). The caller detaches x1
inside zr, and x1 that D learns from.
"""

import torch
import torch.nn.functional as F


def expand(t, z):
    """Times (B,) as (B, 1, ...), so that they broadcast over z (B, ...)."""
    return t.view(-1, *[1] * (z.ndim - 1))


def interpolate(z0, z1, t):
    """zt = (1 - t) z0 + t z1, the straight path from data (t = 0) to noise (t = 1)."""
    t = expand(t, z0)
    return (1 - t) * z0 + t * z1


def z0_prediction(model, zt, t, y=None):
    """f(zt, t) = zt - t v(zt, t): one Euler step all the way to t = 0 (Eq. 5)."""
    return zt - expand(t, zt) * model(zt, t, y)


def z0_predictions(model, pairs, y=None):
    """f at several (z, t), each (B, ...) and (B,), in one batch: one answer per pair, in order.

    A pair may be None (no loss needs it); its answer is None.
    """
    needed = [pair for pair in pairs if pair is not None]
    z, t = (torch.cat(parts) for parts in zip(*needed))
    y = None if y is None else torch.cat([y] * len(needed))
    answers = iter(z0_prediction(model, z, t, y).chunk(len(needed)))
    return [None if pair is None else next(answers) for pair in pairs]


# ------------------------------------------------------------------------------------ teacher


def flow_matching_loss(v, z0, z1):
    """|| z1 - z0 - v(zt, t) ||^2, the teacher's loss (Eq. 1)."""
    return F.mse_loss(v, z1 - z0)


# --------------------------------------------------------------------------------- regressions


def time_skip(t, u_s, u_k, t_skip):
    """Step sizes d_s (down), d_k (up) for each t, from two uniform draws, all (B,) (Algorithm 2).

    d_s = U(0,1) min(t, t_skip) and d_k = U(0,1) min(1 - t, t_skip), so t - d_s >= 0, t + d_k <= 1.
    """
    return u_s * t.clamp(max=t_skip), u_k * (1 - t).clamp(max=t_skip)


def distance(a, b, metric="pseudo-huber", c=0.01):
    """Mean over all elements of d^2 ("l2") or of sqrt(d^2 + c^2) - c ("pseudo-huber"), d = a - b.

    The paper has L2. Its code has pseudo-Huber, quadratic for |d| < c and linear beyond. So large
    differences, where noise decides between distant samples, weigh less than in L2.
    """
    if metric == "l2":
        return F.mse_loss(a, b)
    return ((a - b).square() + c**2).sqrt().mean() - c


def consistency_loss(f_t, f_lo, z0, t, t_lo, t_trunc, truncation="landing", metric="pseudo-huber",
                     c=0.01):
    """Truncated consistency (Eq. 8): f(zt, t) matches f~(z_lo, t_lo), or z0 itself near the data.

    f_t is f_theta(zt, t); f_lo is f_theta~(z_lo, t_lo) after the teacher's step down to t_lo.
    The goal is z0 if t_lo < t_trunc ("landing", the official code) or if t <= t_trunc ("current",
    the paper). t_trunc = 0 is plain consistency distillation.
    """
    near_data = t_lo < t_trunc if truncation == "landing" else t <= t_trunc   # (B,)
    goal = torch.where(expand(near_data, z0), z0, f_lo)
    return distance(f_t, goal.detach(), metric, c)


def bidirectional_loss(f_t, f_hi, metric="pseudo-huber", c=0.01):
    """Consistency upwards (Eq. 10): f(zt, t) matches f~(z_hi, t_hi), after a teacher's step up."""
    return distance(f_t, f_hi.detach(), metric, c)


def reflow_loss(f_r, x1, free=False):
    """|| x1 - f(zr, t) ||^2, zr = (1-t) x1 + t z1 (Eq. 9): straight lines to the one-step x1.

    Where lines from several z1 cross, f(zr, t) is the mean of their x1. In Eq. 9, x1 is fixed. If
    it is free (ours), it moves to f(zr, t), so that fewer lines cross.
    """
    return F.mse_loss(f_r, x1 if free else x1.detach())


# ----------------------------------------------------------------------------------------- GAN


def generator_loss(d_fake):
    """The student's side of Eq. 7: -log sigmoid(D(f_theta(z1, 1))), non-saturating.

    The paper does not name the form of the GAN loss; this is the official code's.
    """
    return F.softplus(-d_fake).mean()


def discriminator_loss(d_real, d_fake):
    """The discriminator's side of Eq. 7: -log sigmoid(D(z0)) - log(1 - sigmoid(D(x1)))."""
    return F.softplus(-d_real).mean() + F.softplus(d_fake).mean()


def r1_penalty(d_real, z0):
    """|| grad D(z0) ||^2, mean over the batch (Mescheder et al., 2018). z0 requires gradients.

    Differentiable in D's weights (double backward), so D must run eagerly, not compiled.
    """
    (gradient,) = torch.autograd.grad(d_real.sum(), z0, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()
