"""The method against mathematics: losses, solvers, Algorithm 1, networks, data, measures.

Read it beside losses.py and train.py: each test's name is a statement about the method. To see the
ablation in numbers: `pytest tests/test_method.py -s -k spread_grows`.
"""

import ast
import copy
import math
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

import data
import evaluate
import losses
import model
import sample
import train
from config import (CAPTIONED_OFFICIAL, CIFAR10_MODELS, CIRCUMSTANCES, DATASETS, LATENT_SETS,
                    MODELS, OFFICIAL, PRESETS, Config, field_comments, identity, make_config,
                    section)
from harness import UserError
from harness.script import Parser, add_field_flags
from running import gen
from study import oversaturation

ROOT = Path(__file__).resolve().parents[1]
POINTS, IMAGES, LATENTS = (2,), (1, 8, 8), (4, 8, 8)
SHAPES = pytest.mark.parametrize("shape", [POINTS, IMAGES, LATENTS], ids=str)
METRICS = pytest.mark.parametrize("metric", ["pseudo-huber", "l2"])
B = 6


def draws(seed=0):
    numbers = data.Draws(0)
    numbers.generator.manual_seed(seed)
    return numbers


def skips(t, t_skip, seed=0):
    return losses.time_skip(t, *torch.rand(2, len(t), generator=gen(seed)), t_skip)


def normal(shape, n=B, seed=0, dtype=torch.float64):
    return torch.randn(n, *shape, generator=gen(seed), dtype=dtype)


def times(n=B, seed=0, dtype=torch.float64):
    return torch.rand(n, generator=gen(seed), dtype=dtype)


def across(t, z):
    """Times broadcast over the elements of z; an independent version of losses.expand."""
    return t.to(z.dtype).reshape(len(t), *(1 for _ in z.shape[1:]))


def counted(field, calls):
    """The velocity field, which appends (z, t, y) to `calls` in each call."""
    def called(z, t, y=None):
        calls.append((z, t, y))
        return field(z, t, y)
    return called


def mean_and_error(values):
    """Mean of independent estimates and its standard error."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def small(shape, **given):
    """Settings of tiny networks for samples of `shape`, independent of the tuned defaults."""
    nets = dict(channels=16, blocks=1, disc_channels=8, n_gan=0, n_rf=0, n_bi=0, t_trunc=0.4,
                t_skip=0.1, mu=0.9, ema=0.99, l_gan=1.0, l_rf=1.0, l_bi=1.0, r1=1.0,
                truncation="landing", metric="pseudo-huber")
    if len(shape) > 1:
        nets |= dict(mult=(1, 2), attention=(1,), heads=2, time_scale=100.0)
    return make_config(**(nets | given))


@torch.no_grad()
def shaken(network, seed, size=0.1):
    """The network with noise on every weight: layers that start at zero would hide mistakes."""
    for p in network.parameters():
        p.add_(size * torch.randn(p.shape, generator=gen(seed)))
    return network


def make_net(shape, cfg, lr=0.1):
    """Four different velocity networks, a discriminator, and plain SGD: a step is lr x gradient."""
    torch.manual_seed(0)
    start = model.velocity_network(cfg, shape)
    net = SimpleNamespace(**{
        name: shaken(copy.deepcopy(start), seed)
        for seed, name in enumerate(("teacher", "student", "target", "ema"))})
    net.disc = model.discriminator(cfg, shape)
    net.opt = torch.optim.SGD(net.student.parameters(), lr=lr)
    net.opt_disc = torch.optim.SGD(net.disc.parameters(), lr=lr)
    return net


def result(steps):
    """The sample at the end of a solver's steps (t, zt, f(zt, t))."""
    *_, (_, z0, _) = steps
    return z0


def weights(network):
    return [p.detach().clone() for p in network.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------- interpolation, predictions


@SHAPES
def test_interpolation_runs_straight_from_data_to_noise(shape):
    z0, z1, t = normal(shape), normal(shape, seed=1), times()
    for i in range(B):
        expected = (1 - t[i]) * z0[i] + t[i] * z1[i]
        torch.testing.assert_close(losses.interpolate(z0, z1, t)[i], expected)
    assert torch.equal(losses.interpolate(z0, z1, torch.zeros(B)), z0)
    assert torch.equal(losses.interpolate(z0, z1, torch.ones(B)), z1)


@SHAPES
def test_derivative_of_the_interpolation_is_the_velocity(shape):
    z0, z1, t = normal(shape), normal(shape, seed=1), times()
    # the path is straight, so a difference quotient of any width is the derivative
    slope = (losses.interpolate(z0, z1, t + 0.25) - losses.interpolate(z0, z1, t)) / 0.25
    torch.testing.assert_close(slope, z1 - z0)
    # a velocity off by d everywhere costs d^2: the loss is a mean over elements, not a sum
    assert losses.flow_matching_loss(z1 - z0 + 3, z0, z1).item() == pytest.approx(9)


@SHAPES
def test_z0_prediction_is_one_euler_step_to_zero(shape):
    z0, z1, t = normal(shape), normal(shape, seed=1), times()
    zt = losses.interpolate(z0, z1, t)
    # with the true velocity the prediction is the data, from every time
    torch.testing.assert_close(losses.z0_prediction(lambda z, t, y: z1 - z0, zt, t), z0)
    curved = losses.z0_prediction(lambda z, t, y: z**2 + across(t, z), zt, t)
    torch.testing.assert_close(curved, zt - across(t, zt) * (zt**2 + across(t, zt)))


@SHAPES
def test_predictions_in_one_batch_equal_separate_ones(shape):
    def field(z, t, y):
        return z * across(t, z) + across(y, z)

    y, calls = torch.arange(B), []
    one, two, three = ((normal(shape, seed=s), times(seed=s)) for s in range(3))
    answers = losses.z0_predictions(counted(field, calls), [one, None, two, three], y)
    assert len(calls) == 1 and len(calls[0][0]) == 3 * B
    assert calls[0][2].tolist() == [*range(B)] * 3
    assert answers.pop(1) is None, "a pair that no loss needs costs nothing"
    for answer, (z, t) in zip(answers, (one, two, three), strict=True):
        torch.testing.assert_close(answer, losses.z0_prediction(field, z, t, y))


# ------------------------------------------------------------------------------------- solvers


@SHAPES
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 7, 16])
def test_euler_is_exact_if_the_velocity_is_constant(shape, nfe):
    z1, v, calls = normal(shape), normal(shape, seed=1), []
    z0 = result(sample.euler(counted(lambda z, t, y: v, calls), z1, nfe))
    torch.testing.assert_close(z0, z1 - v)
    expected = [i / nfe for i in range(nfe, 0, -1)]
    assert [t[0].item() for _, t, _ in calls] == pytest.approx(expected)
    assert all(t.shape == (B,) and (t == t[0]).all() for _, t, _ in calls)


# dz/dt = v has the solution z(0) = z(1) g, with g known
FIELDS = {
    "z": (lambda z, t, y: z, math.exp(-1)),
    "3 t z": (lambda z, t, y: 3 * across(t, z) * z, math.exp(-1.5)),
}


@pytest.mark.parametrize("field, growth", FIELDS.values(), ids=FIELDS)
def test_the_error_of_euler_halves_with_the_step(field, growth):
    z1 = torch.ones(1, 2, dtype=torch.float64)
    errors = [(result(sample.euler(field, z1, nfe)) - growth * z1).abs().max().item()
              for nfe in (64, 128, 256)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


@SHAPES
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_stochastic_sampling_predicts_and_mixes_noise_in(shape, nfe):
    def field(z, t, y):
        return 0.3 * z + across(t, z)

    fresh, calls = [normal(shape, seed=10 + i) for i in range(nfe)], []
    z1, noises = normal(shape), iter(fresh)
    steps = sample.stochastic(counted(field, calls), z1, nfe, renoise=lambda z: next(noises))
    z0 = result(steps)
    expected = z1
    for k in range(nfe):
        t = 1 - k / nfe
        x = expected - t * (0.3 * expected + t)
        low = t - 1 / nfe
        expected = (1 - low) * x + low * fresh[k] if k < nfe - 1 else x
    # the solvers' times are float32
    torch.testing.assert_close(z0, expected, rtol=0, atol=1e-5)
    assert len(calls) == nfe
    assert len(list(noises)) == 1, "the last prediction takes no noise"


@pytest.mark.parametrize("solver, nfe", [("euler", 4), ("stochastic", 4)])
def test_a_solver_yields_time_state_and_prediction(solver, nfe):
    z1 = normal(POINTS)
    steps = list(sample.SOLVERS[solver](lambda z, t, y: z, z1, nfe))
    assert [t for t, _, _ in steps] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert torch.equal(steps[0][1], z1)
    for t, zt, f in steps:
        torch.testing.assert_close(f, zt - t * zt)


# ---------------------------------------------------------------------- cases known in closed form


def analytic(field):
    """A field that Algorithm 1 can run: one weight, at 1, scales the velocity."""
    scale = nn.Parameter(torch.ones(()))

    def network(z, t, y=None):
        return scale * field(z, t)
    network.parameters = lambda: [scale]
    return network


def regression_terms(field, z0, seed=0, **given):
    """CD, BI, RF as Algorithm 1 computes them with teacher = student = EMA = field, and |grad|."""
    cfg = make_config(losses=("cd", "rf", "bi"), n_rf=0, n_bi=0, **given)
    student = analytic(field)
    net = SimpleNamespace(teacher=student, student=student, target=student, ema=student,
                          opt=torch.optim.SGD(student.parameters(), lr=0.0))
    return train.scflow_step(net, (z0, None), 0, cfg, draws(seed))


@SHAPES
@METRICS
@pytest.mark.parametrize("truncation", ["landing", "current"])
def test_a_point_mass_makes_every_regression_loss_zero(shape, metric, truncation):
    m = normal(shape, n=1, dtype=torch.float32)

    def field(z, t):
        return (z - m) / across(t, z)

    z0 = m.expand(64, *shape)
    terms = regression_terms(field, z0, metric=metric, truncation=truncation, t_trunc=0.4)
    assert {"cd", "rf", "bi"} <= terms.keys()
    assert all(abs(term) < 1e-6 for name, term in terms.items() if name != "grad_norm")
    # any other point is not a fixed point of the same losses
    other = regression_terms(field, z0 + 1, metric=metric, truncation=truncation, t_trunc=0.4)
    assert other["cd"] > 0.1


@SHAPES
@pytest.mark.parametrize("nfe", [1, 5])
@pytest.mark.parametrize("solver", sample.SOLVERS)
def test_every_solver_lands_on_a_point_mass(shape, solver, nfe):
    m = normal(shape, n=1, dtype=torch.float32)
    z0 = result(sample.SOLVERS[solver](lambda z, t, y: (z - m) / across(t, z),
                                       normal(shape, seed=1, dtype=torch.float32), nfe))
    torch.testing.assert_close(z0, m.expand_as(z0), rtol=0, atol=2e-6)


# z0 = sigma z1 couples noise and N(0, sigma^2) by straight lines; sigma = 1 is the teacher v = 0
@SHAPES
@METRICS
@pytest.mark.parametrize("sigma", [1.0, 0.5, 2.0])
def test_a_straight_teacher_makes_the_untruncated_losses_zero(shape, metric, sigma):
    def field(z, t, y=None):
        t = across(t, z)
        return (1 - sigma) * z / (sigma * (1 - t) + t)

    terms = regression_terms(field, 5 * normal(shape, n=64, dtype=torch.float32), metric=metric,
                             t_trunc=0.0)
    assert all(abs(term) < 1e-6 for name, term in terms.items() if name != "grad_norm")
    z1, t = normal(shape), times()
    zt = losses.interpolate(sigma * z1, z1, t)
    assert losses.flow_matching_loss(field(zt, t), sigma * z1, z1) < 1e-14
    for nfe in (1, 2, 4, 16):
        z0 = result(sample.euler(field, z1, nfe))
        torch.testing.assert_close(z0, sigma * z1, rtol=0, atol=1e-6)


# Let the data be N(0,1), independent of the noise. Then zt has variance s^2 = (1-t)^2 + t^2, and
# its covariance with z1 - z0 is 2t - 1. So Var(z1 - z0 | zt) = 2 - (2t-1)^2 / s^2 = 1 / s^2, since
# 2 s^2 = 1 + (2t-1)^2. The mean over t ~ U(0,1) is the integral of 1 / (2t^2 - 2t + 1), which is
# arctan(1) - arctan(-1) = pi / 2.
def s_squared(t):
    return (1 - t) ** 2 + t**2


def gaussian_velocity(z, t, y=None):
    """E[z1 - z0 | zt], the best answer to Eq. 1 for N(0,1)."""
    t = across(t, z)
    return (2 * t - 1) / s_squared(t) * z


@SHAPES
def test_minimum_of_flow_matching_on_a_gaussian_is_half_pi(shape):
    best, worse = [], []
    n = 40_000 // math.prod(shape)
    for i in range(40):
        z0, z1 = normal(shape, n, 3 * i), normal(shape, n, 3 * i + 1)
        t = times(n, 3 * i + 2)
        zt = losses.interpolate(z0, z1, t)
        v = gaussian_velocity(zt, t)
        best.append(losses.flow_matching_loss(v, z0, z1).item())
        worse.append(losses.flow_matching_loss(v + 0.3 * zt, z0, z1).item() - best[-1])
    mean, error = mean_and_error(best)
    assert error < 0.01 and abs(mean - math.pi / 2) < 5 * error
    # an error of 0.3 zt adds its square: 0.3^2 times the mean of s^2, which is 2/3
    mean, error = mean_and_error(worse)
    assert error < 0.005 and abs(mean - 0.09 * 2 / 3) < 5 * error


@SHAPES
@pytest.mark.parametrize("t_trunc", [0.4, 1.0])
def test_truncated_branch_reaches_the_posterior_variance(shape, t_trunc):
    # Var(z0 | zt) = t^2 / s^2, whose integral from 0 to T is T/2 + log(2T^2 - 2T + 1) / 4
    known = 0.5 + math.log(2 * t_trunc**2 - 2 * t_trunc + 1) / 4 / t_trunc
    values, n = [], 40_000 // math.prod(shape)
    for i in range(40):
        z0, z1 = normal(shape, n, 3 * i), normal(shape, n, 3 * i + 1)
        t = t_trunc * times(n, 3 * i + 2)
        zt = losses.interpolate(z0, z1, t)
        f = losses.z0_prediction(gaussian_velocity, zt, t)
        torch.testing.assert_close(f, zt * across((1 - t) / s_squared(t), zt))
        # theta~ answers 1000, which must not matter below t_trunc
        loss = losses.consistency_loss(f, torch.full_like(f, 1e3), z0, t, t, t_trunc, "current",
                                       "l2")
        values.append(loss.item())
    mean, error = mean_and_error(values)
    assert error < 0.02 * known and abs(mean - known) < 5 * error


perfect_cd = oversaturation.velocity   # of the student that knows where every path of ODE ends


def test_the_perfect_student_predicts_the_end_of_the_teachers_path():
    z1, t = normal(POINTS), times()
    # the path from z1 is s(t) z1, by dz/dt = v; it ends in z1, since s(0) = 1
    zt, h = s_squared(across(t, z1)).sqrt() * z1, 1e-4
    slope = (s_squared(across(t + h, z1)).sqrt() - s_squared(across(t - h, z1)).sqrt()) / 2 / h * z1
    torch.testing.assert_close(slope, gaussian_velocity(zt, t), rtol=0, atol=1e-6)
    torch.testing.assert_close(losses.z0_prediction(perfect_cd, zt, t), z1)


def test_a_perfect_consistency_student_oversaturates_but_not_with_fresh_noise():
    n = 100_000
    for nfe, std in ((1, 1), (2, 1.414), (4, 1.662), (8, 1.816), (16, 1.904), (2048, 2)):
        # all is linear, so z = 1 grows as the std does
        z0 = result(sample.euler(perfect_cd, torch.ones(1, 2, dtype=torch.float64), nfe))
        assert z0[0].tolist() == pytest.approx([std, std], abs=0.005 if nfe == 2048 else 6e-4)
    for nfe in (1, 2, 4, 16):
        torch.manual_seed(nfe)
        z0 = result(sample.stochastic(perfect_cd, normal(POINTS, n), nfe))
        assert abs(z0.std() - 1) < 5 / math.sqrt(4 * n)        # 2n numbers, error 1 / sqrt(4n)


@pytest.mark.parametrize("sign", [-1, 1], ids=["CD", "BI"])
@pytest.mark.parametrize("at", [0.2, 0.5, 0.9])
def test_the_perfect_student_is_consistent_to_second_order(sign, at):
    # the teacher's Euler step of size d has an error of d^2, so the L2 loss falls as d^4
    def loss(d):
        z, t = torch.ones(1, 2, dtype=torch.float64), torch.tensor([at], dtype=torch.float64)
        step = z + sign * d * gaussian_velocity(z, t)
        f_t = losses.z0_prediction(perfect_cd, z, t)
        f_next = losses.z0_prediction(perfect_cd, step, t + sign * d)
        if sign < 0:
            return losses.consistency_loss(f_t, f_next, z, t, t - d, 0.0, metric="l2").item()
        return losses.bidirectional_loss(f_t, f_next, metric="l2").item()

    assert loss(0.02) > 0
    assert loss(0.02) / loss(0.01) == pytest.approx(16, rel=0.15)


class TimesZ(nn.Module):
    """A student with velocity g(t) z and an MLP for g; the perfect student has this form, too."""

    def __init__(self):
        super().__init__()
        self.g = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, z, t, y=None):
        return self.g(model.time_features(t, 16, 10.0)) * z


def spreads(use, steps=500, lr=3e-3):
    """Std of the samples at 1, 2, 4, 8, 16 NFE, of a student of N(0,1) trained by Algorithm 1."""
    cfg = make_config(losses=use, n_gan=0, n_rf=0, l_gan=1.0, l_rf=1.0, metric="l2", ema=0.98,
                      lr_warmup=20, disc_channels=32)
    torch.manual_seed(0)
    student, disc = TimesZ(), model.discriminator(cfg, POINTS)
    net = SimpleNamespace(teacher=gaussian_velocity, student=student, disc=disc,
                          target=model.copy_of(student), ema=model.copy_of(student),
                          opt=torch.optim.Adam(student.parameters()),
                          opt_disc=torch.optim.Adam(disc.parameters(), betas=cfg.disc_betas))
    numbers = data.Draws(0)
    for step in range(steps):
        numbers.at(step)
        model.set_rates(cfg, step, steps, (net.opt, lr), (net.opt_disc, 2e-3))
        train.scflow_step(net, (numbers.normal(128, 2), None), step, cfg, numbers)
    return [sample.draw(net.ema, POINTS, 4000, nfe).std().item() for nfe in (1, 2, 4, 8, 16)]


def test_the_spread_grows_with_the_nfe_by_cd_alone_and_not_with_gan_and_reflow():
    perfect = [oversaturation.std(nfe) for nfe in (1, 2, 4, 8, 16)]
    cd, all_three = spreads(("cd",)), spreads(("cd", "gan", "rf"))
    print("\nstd of the samples (of the data: 1)   NFE 1     2     4     8    16")
    for name, row in (("CD, closed form", perfect), ("CD", cd), ("CD + GAN + RF", all_three)):
        print(f"{name:36}" + "".join(f"{std:6.2f}" for std in row))
    assert sorted(cd) == cd and cd[-1] > 1.6 * cd[0]
    assert cd == pytest.approx(perfect, rel=0.15)
    assert all_three == pytest.approx([1] * 5, abs=0.15)
    assert max(all_three) < 1.15 * min(all_three)


# ------------------------------------------------------------------------------ losses in detail


@SHAPES
@METRICS
def test_losses_pass_gradients_to_the_student_alone(shape, metric):
    def leaf(seed):
        return normal(shape, seed=seed).requires_grad_()

    t = torch.linspace(0, 1, B)
    f_t, f_lo, f_hi, z0, x1 = (leaf(i) for i in range(5))
    losses.consistency_loss(f_t, f_lo, z0, t, 0.9 * t, 0.4, metric=metric).backward()
    assert f_lo.grad is None and z0.grad is None and (f_t.grad != 0).all()
    f_t.grad = None
    losses.bidirectional_loss(f_t, f_hi, metric).backward()
    assert f_hi.grad is None and (f_t.grad != 0).all()
    f_t.grad = None
    losses.reflow_loss(f_t, x1).backward()
    assert x1.grad is None
    torch.testing.assert_close(f_t.grad, 2 * (f_t - x1).detach() / f_t.numel())
    losses.reflow_loss(f_t, x1, free=True).backward()      # x1 moves by as much, to the other side
    torch.testing.assert_close(x1.grad, 2 * (x1 - f_t).detach() / x1.numel())


def test_reflow_is_eq_9_for_all_images():
    """x1 moves in reflow for points alone, and there not for 8gaussians."""
    free = {name for name in DATASETS if Config(**PRESETS.get(name, {})).rf_x1 == "free"}
    assert free == {"checkerboard", "moons", "spirals"}


@SHAPES
@pytest.mark.parametrize("truncation", ["landing", "current"])
def test_truncation_takes_the_data_exactly_when_the_rule_says(shape, truncation):
    at = torch.tensor(0.4)
    below, above = torch.nextafter(at, at - 1), torch.nextafter(at, at + 1)
    rows = [  # t, t_lo, data under "landing" (t_lo < 0.4), data under "current" (t <= 0.4)
        (0.0, 0.0, True, True), (0.3, 0.25, True, True),
        (below, below, True, True), (at, below, True, True), (at, at, False, True),
        (above, below, True, False), (above, at, False, False), (above, above, False, False),
        (0.45, 0.39, True, False), (1.0, 0.95, False, False),
    ]
    t, t_lo, landing, current = map(torch.tensor, zip(*rows))
    # the data is 1 and theta~ answers 3; the student's 0 is off by 1 or by 3 in each sample
    off = 3.0 - 2 * (landing if truncation == "landing" else current)
    ones = torch.ones(len(rows), *shape)
    f_t = (0 * ones).requires_grad_()
    loss = losses.consistency_loss(f_t, 3 * ones, ones, t, t_lo, 0.4, truncation, "l2")
    assert loss.item() == pytest.approx(off.square().mean().item())
    (grad,) = torch.autograd.grad(loss, f_t)
    torch.testing.assert_close(grad, -2 * across(off, ones) * ones / grad.numel())


def test_no_truncation_at_t_trunc_zero():
    # the rule is t_lo < t_trunc, so the data 9 never enters, not even at t_lo = 0 exactly
    t, ones = torch.full((64,), 0.05), torch.ones(64, 2)
    for t_lo in (torch.zeros(64), 0.05 * torch.rand(64, generator=gen())):
        assert losses.consistency_loss(ones, ones, 9 * ones, t, t_lo, 0.0, "landing", "l2") == 0


@pytest.mark.parametrize("t_skip", [0.1, 0.5, 1.0])
def test_time_skips_stay_in_range(t_skip):
    t = torch.cat([torch.tensor([0, 1e-7, 0.05, 0.1, 0.5, 0.95, 1 - 1e-7, 1]).repeat(1000),
                   torch.rand(100_000, generator=gen(1))])
    d_s, d_k = skips(t, t_skip)
    for d in (d_s, d_k):
        assert d.shape == t.shape and (d >= 0).all() and (d <= t_skip).all()
    assert (t - d_s >= 0).all() and (t + d_k <= 1).all()


@pytest.mark.parametrize("t", [0.02, 0.1, 0.5, 0.93])
def test_time_skips_are_uniform_and_independent(t):
    n = 40_000
    d_s, d_k = skips(torch.full((n,), t), 0.1, 7)
    for d, longest in ((d_s, min(t, 0.1)), (d_k, min(1 - t, 0.1))):
        # mean and variance of U(0, longest), within five standard errors
        assert abs(d.mean() - longest / 2) < 5 * longest / math.sqrt(12 * n)
        assert d.var() == pytest.approx(longest**2 / 12, rel=5 * math.sqrt(0.8 / n))
    assert abs(torch.corrcoef(torch.stack([d_s, d_k]))[0, 1]) < 5 / math.sqrt(n)


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    c = 0.01
    for d, expected in ((0.0, 0.0), (1e-4, 1e-8 / (2 * c)), (-1e-4, 1e-8 / (2 * c)),
                        (100.0, 100 - c), (-100.0, 100 - c)):
        a = torch.full((3,), d, dtype=torch.float64)
        assert losses.distance(a, 0 * a, c=c).item() == pytest.approx(expected, rel=1e-4)
    # a mean over elements; between the two regimes the formula itself gives the value
    a = torch.tensor([[0.01, 0.03]], dtype=torch.float64)
    expected = (math.sqrt(2) - 1 + math.sqrt(10) - 1) / 2 * c
    assert losses.distance(a, 0 * a, c=c).item() == pytest.approx(expected)
    assert losses.distance(a, 0 * a, "l2").item() == pytest.approx((0.01**2 + 0.03**2) / 2)


# ----------------------------------------------------------------------------------------- GAN


def test_gan_losses_equal_their_logarithms_and_do_not_overflow():
    real, fake, sigmoid = normal((), 50), normal((), 50, seed=1), torch.sigmoid
    torch.testing.assert_close(losses.generator_loss(fake), -sigmoid(fake).log().mean())
    torch.testing.assert_close(losses.discriminator_loss(real, fake),
                               -sigmoid(real).log().mean() - (1 - sigmoid(fake)).log().mean())
    # the non-saturating form keeps its slope if D is sure that a sample is fake
    sure = torch.tensor([-1000.0], requires_grad=True)
    loss = losses.generator_loss(sure)
    assert loss.item() == 1000 and torch.autograd.grad(loss, sure)[0].item() == -1


def test_the_student_raises_the_logits_of_its_samples_and_d_lowers_them():
    real, fake = torch.zeros(B, requires_grad=True), torch.zeros(B, requires_grad=True)
    (g,) = torch.autograd.grad(losses.generator_loss(fake), fake)
    g_real, g_fake = torch.autograd.grad(losses.discriminator_loss(real, fake), (real, fake))
    # -log sigmoid has slope -1/2 at zero
    for slope, sign in ((g, -1), (g_real, -1), (g_fake, 1)):
        torch.testing.assert_close(slope, torch.full((B,), sign * 0.5 / B))


@SHAPES
def test_r1_of_a_linear_discriminator(shape):
    w = normal(shape, n=1, seed=3)[0].requires_grad_()
    z0 = normal(shape).requires_grad_()
    penalty = losses.r1_penalty((z0 * w).flatten(1).sum(1), z0)
    torch.testing.assert_close(penalty, w.square().sum())
    (grad,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(grad, 2 * w)
    assert z0.grad is None


# ----------------------------------------------------------------------------------------- EMA


@SHAPES
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.998, 1.0])
def test_ema_update_is_its_formula(shape, decay):
    net = make_net(shape, small(shape))
    before, new = weights(net.ema), weights(net.student)
    model.ema_update(net.ema, net.student, decay)
    for old, theta, average in zip(before, new, weights(net.ema), strict=True):
        torch.testing.assert_close(average, decay * old + (1 - decay) * theta)
    assert same(weights(net.student), new)


@SHAPES
def test_networks_keep_all_their_state_in_parameters(shape):
    # the average is taken over parameters only, so it would not contain a buffer
    net = make_net(shape, small(shape))
    assert not list(net.student.buffers())
    frozen = model.copy_of(net.student)
    assert same(weights(frozen), weights(net.student))
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())


# ------------------------------------------------------------------------------------ Algorithm 1


def reference_step(net, z0, y, use, cfg, seed):
    """Algorithm 1 as the paper writes it: no batches are joined, no terms are shared.

    Returns the terms and the weights after the step; net itself is not changed. Only the order of
    the random draws is taken from the code.
    """
    generator = gen(seed)
    z1 = torch.randn(z0.shape, generator=generator)
    t = torch.rand(len(z0), generator=generator)
    u_s, u_k = (torch.rand(len(z0), generator=generator) for _ in range(2))

    def f(network, z, t):
        return z - across(t, z) * network(z, t, y)

    def huber(d):
        return ((d**2 + cfg.huber_c**2) ** 0.5 - cfg.huber_c).mean()

    zt = (1 - across(t, z0)) * z0 + across(t, z0) * z1
    d_s = u_s * torch.minimum(t, torch.tensor(cfg.t_skip))
    d_k = u_k * torch.minimum(1 - t, torch.tensor(cfg.t_skip))
    terms, one = {}, torch.ones(len(z0))
    theta, disc = list(net.student.parameters()), copy.deepcopy(net.disc)
    rate = net.opt.param_groups[0]["lr"]

    if "gan" in use:
        fake, real = f(net.student, z1, one).detach(), z0.clone().requires_grad_()
        d_real = disc(real, y)
        terms["disc"] = -(torch.sigmoid(d_real).log().mean()
                          + (1 - torch.sigmoid(disc(fake, y))).log().mean())
        (slope,) = torch.autograd.grad(d_real.sum(), real, create_graph=True)
        terms["r1"] = (slope**2).sum() / len(z0)
        psi = list(disc.parameters())
        grads = torch.autograd.grad(terms["disc"] + cfg.r1 / 2 * terms["r1"], psi,
                                    allow_unused=True)
        terms["grad_norm_d"] = sum((g**2).sum() for g in grads if g is not None) ** 0.5
        with torch.no_grad():
            for p, g in zip(psi, grads):
                if g is not None:
                    p -= rate * g
        terms["gan"] = -torch.sigmoid(disc(f(net.student, z1, one), y)).log().mean()

    with torch.no_grad():
        v = net.teacher(zt, t, y)
        f_lo = f(net.target, zt - across(d_s, z0) * v, t - d_s)
        f_hi = f(net.target, zt + across(d_k, z0) * v, t + d_k)
        aim = f_lo.clone()
        aim[t - d_s < cfg.t_trunc] = z0[t - d_s < cfg.t_trunc]
        x1 = f(net.student, z1, one)
    terms["cd"] = ("cd" in use) * huber(f(net.student, zt, t) - aim)
    if "rf" in use:
        zr = (1 - across(t, z0)) * x1 + across(t, z0) * z1
        goal = f(net.student, z1, one) if cfg.rf_x1 == "free" else x1
        terms["rf"] = ((goal - f(net.student, zr, t)) ** 2).mean()
    if "bi" in use:
        terms["bi"] = huber(f(net.student, zt, t) - f_hi)
    factor = {"cd": 1, "gan": cfg.l_gan, "rf": cfg.l_rf, "bi": cfg.l_bi}
    loss = sum(factor[name] * terms[name] for name in use)
    grads = torch.autograd.grad(loss, theta)
    terms["grad_norm"] = sum((g**2).sum() for g in grads) ** 0.5
    after = {"student": [(p - rate * g).detach() for p, g in zip(theta, grads)],
             "disc": weights(disc), "teacher": weights(net.teacher)}
    for name, decay in (("target", cfg.mu), ("ema", cfg.ema)):
        after[name] = [decay * a + (1 - decay) * p
                       for a, p in zip(weights(getattr(net, name)), after["student"])]
    return terms, after


@SHAPES
@pytest.mark.parametrize("rf_x1", ["free", "fixed"])
@pytest.mark.parametrize("use, n", [("cd", B), ("cd gan", B), ("cd rf", B), ("cd bi", B),
                                    ("cd gan rf bi", B), ("cd gan rf bi", 1), ("gan rf bi", B)])
def test_a_step_equals_algorithm_1_written_plainly(shape, rf_x1, use, n):
    use = tuple(use.split())
    cfg = small(shape, losses=use, t_trunc=0.4, num_classes=3, r1=0.5, l_gan=0.7, l_rf=0.6,
                l_bi=0.4, rf_x1=rf_x1, mu=0.8, ema=0.95)
    net = make_net(shape, cfg)
    z0, y = normal(shape, n, dtype=torch.float32), torch.arange(n) % 3
    expected_terms, after = reference_step(net, z0, y, use, cfg, seed=5)
    terms = train.scflow_step(net, (z0, y), 0, cfg, draws(5))
    assert set(expected_terms) == set(terms) - {"d_real", "d_fake"}
    assert set(terms) <= set(train.TERMS), "a term without a column in the log would be lost"
    for name, value in expected_terms.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name, expected in after.items():
        for p, q in zip(weights(getattr(net, name)), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@SHAPES
def test_a_step_leaves_no_gradient_anywhere(shape):
    cfg = small(shape, num_classes=3)
    net = make_net(shape, cfg)
    # frozen networks and data require gradients here, so that a leak would be seen
    z0, y = normal(shape, dtype=torch.float32).requires_grad_(), torch.arange(B) % 3
    teacher_before = weights(net.teacher)
    terms = train.scflow_step(net, (z0, y), 0, cfg, draws())
    assert z0.grad is None
    for name in ("teacher", "target", "ema", "student", "disc"):
        assert all(p.grad is None for p in getattr(net, name).parameters()), name
    assert same(weights(net.teacher), teacher_before)
    assert all(term.isfinite() for term in terms.values())


@SHAPES
@pytest.mark.parametrize("name, values, unmoved, moved", [
    ("r1", (0.0, 1.0), "student", "disc"), ("l_gan", (0.0, 5.0), "disc", "student")])
def test_r1_moves_d_alone_and_the_gan_loss_moves_the_student_alone(shape, name, values, unmoved,
                                                                   moved):
    after = []
    for value in values:
        cfg = small(shape, **{"l_gan": 0.0, name: value})
        net, start = make_net(shape, cfg), weights(make_net(shape, cfg).disc)
        terms = train.scflow_step(net, (normal(shape, dtype=torch.float32), None), 0, cfg, draws())
        assert ("r1" in terms) == (cfg.r1 > 0)
        assert not same(weights(net.disc), start)
        after.append(net)
    assert same(*(weights(getattr(net, unmoved)) for net in after))
    assert not same(*(weights(getattr(net, moved)) for net in after))


@SHAPES
@pytest.mark.parametrize("use, calls", [
    ("cd gan rf bi", dict(student=[2 * B, B], target=[2 * B], teacher=[B], disc=[B, B, B], ema=[])),
    ("cd", dict(student=[B], target=[B], teacher=[B], disc=[], ema=[]))])
@pytest.mark.parametrize("y", [None, torch.tensor([2, 0, 1, 1, 0, 2])], ids=["no labels", "labels"])
def test_how_many_samples_and_which_labels_each_network_sees(shape, use, calls, y):
    cfg = small(shape, losses=tuple(use.split()), num_classes=0 if y is None else 3)
    net, seen, grads = make_net(shape, cfg), {name: [] for name in calls}, dict.fromkeys(calls, 0)

    def count(name, z, *others):
        seen[name].append((z, *others))
        grads[name] += len(z) * torch.is_grad_enabled()
    for name in calls:
        getattr(net, name).register_forward_pre_hook(
            lambda module, args, name=name: count(name, *args))
    train.scflow_step(net, (normal(shape, dtype=torch.float32), y), 0, cfg, draws())
    assert {name: [len(z) for z, *_ in args] for name, args in seen.items()} == calls
    # all that the student sees passes backwards, too, and nothing of the averages and the teacher
    assert grads == {name: sum(calls[name]) * (name in ("student", "disc")) for name in calls}
    for z, *_, label in sum(seen.values(), []):
        assert z.shape[1:] == shape
        assert label is y is None or label.tolist() == y.tolist() * (len(z) // B)


@SHAPES
def test_labels_reach_student_and_discriminator(shape):
    net = make_net(shape, small(shape, num_classes=3))
    z, t = normal(shape, dtype=torch.float32), times(dtype=torch.float32)
    for network, inputs in ((net.student, (z, t)), (net.disc, (z,))):
        answers = torch.stack([network(*inputs, torch.full((B,), label)) for label in range(4)])
        gaps = (answers[:, None] - answers).abs().view(4, 4, B, -1).amax(3)
        assert (gaps + torch.eye(4)[..., None] > 1e-4).all(), "each label gives another answer"
        # without labels the condition is the null of Eq. 3, the row after the classes
        assert torch.equal(network(*inputs), answers[3])


@pytest.mark.parametrize("name", ["gan", "rf", "bi"])
@pytest.mark.parametrize("first", [1, 7])
def test_warm_ups_end_exactly_at_their_iteration(name, first):
    cfg, everything = small(POINTS, **{f"n_{name}": first}), {"cd", "gan", "rf", "bi"}
    for step, expected in ((0, everything - {name}), (first - 1, everything - {name}),
                           (first, everything), (10**6, everything)):
        assert train.losses_in_use(cfg, step) == expected
    # a loss that was not chosen is not used after its warm-up either
    without = small(POINTS, losses=tuple(everything - {name}))
    assert train.losses_in_use(without, first) == everything - {name}
    net, z0 = make_net(POINTS, cfg), normal(POINTS, dtype=torch.float32)
    assert name not in train.scflow_step(net, (z0, None), first - 1, cfg, draws())
    assert name in train.scflow_step(net, (z0, None), first, cfg, draws())


@pytest.mark.parametrize("step, warmup, final, rate", [
    (0, 0, 0.0, 1), (0, 100, 1.0, 0.01), (99, 100, 1.0, 1), (500, 100, 0.0, 0.5),
    (500, 100, 0.2, 0.6), (1000, 100, 0.0, 0), (700, 100, 1.0, 1)])
def test_learning_rates_rise_then_fall_along_a_cosine(step, warmup, final, rate):
    opt = SimpleNamespace(param_groups=[{"lr": None}, {"lr": None}])
    other = SimpleNamespace(param_groups=[{"lr": None}])
    for cfg, given in ((make_config(lr_warmup=warmup, lr_final=final), {}),
                       (make_config(lr_warmup=warmup, lr_final=0.7), dict(final=final))):
        model.set_rates(cfg, step, 1000, (opt, 2.0), (other, 1.0), **given)
        rates = [group["lr"] for group in opt.param_groups + other.param_groups]
        assert rates == pytest.approx([2 * rate, 2 * rate, rate], abs=1e-12)


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("given, t_trunc", [
    (dict(), Config.t_trunc), (dict(losses=("cd", "gan")), Config.t_trunc),
    (dict(losses=("cd",)), 0), (dict(losses=("cd", "rf", "bi")), 0),
    (dict(losses=("cd",), t_trunc=0.4), 0.4), (dict(losses=("cd", "gan"), t_trunc=0.0), 0),
    (dict(dataset="mnist", losses=("cd",)), 0)], ids=str)
def test_without_the_gan_there_is_no_truncation_unless_it_is_asked_for(given, t_trunc):
    assert make_config(**given).t_trunc == t_trunc


def test_presets_hold_what_differs_and_flags_win():
    names = {f.name for f in fields(Config)}
    for dataset, preset in PRESETS.items():
        cfg = make_config(dataset)
        assert cfg.dataset == dataset and preset.keys() <= names
        if dataset == "captioned":
            preset = preset | CAPTIONED_OFFICIAL | dict(preset="official")
        elif dataset == "cifar10":
            preset = preset | CIFAR10_MODELS["small"] | dict(model="small")
        elif dataset in LATENT_SETS:
            folder = preset["data_dir"] and str(Path(preset["data_dir"]).resolve())
            preset = preset | MODELS["paper"] | OFFICIAL | dict(model="paper", preset="official",
                                                                data_dir=folder)
        for f in fields(Config):
            expected = preset.get(f.name, dataset if f.name == "dataset" else f.default)
            assert getattr(cfg, f.name) == expected
        assert make_config(dataset, lr=0.123).lr == 0.123
    assert make_config("moons") == Config(dataset="moons")


@pytest.mark.parametrize("given", [
    dict(t_trunc=1.5), dict(t_trunc=-0.1), dict(t_skip=0.0), dict(t_skip=2.0), dict(mu=1.1),
    dict(steps=0), dict(batch_size=0), dict(lr=0.0), dict(huber_c=0.0), dict(n_rf=-1),
    dict(r1=-1.0), dict(betas=(0.9,)), dict(disc_betas=(0.0, 1.0)), dict(losses=("x",)),
    dict(losses=()), dict(seed=-1), dict(seed=2**31), dict(steps=2.5), dict(image_size=250),
], ids=str)
def test_settings_that_make_no_sense_are_refused_by_the_flags_name(given):
    (name,) = given
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        make_config(**given)


def test_the_largest_seed_draws_numbers_and_a_larger_one_is_refused():
    largest = 2**31 - 1
    assert data.Draws(make_config(seed=largest).seed, stream=1).normal(3, 2).isfinite().all()
    assert sample.noise((2,), 3, largest).isfinite().all()
    assert sample.parse(["--seed", str(largest)]).seed == largest
    with pytest.raises(UserError, match="--seed"):
        sample.parse(["--seed", str(largest + 1)])


def test_a_new_field_says_by_its_section_whether_it_makes_another_run():
    comments, sections = field_comments()
    reflow = identity(make_config(method="reflow"), "student")
    # what makes two runs differ, what does not, and what only chooses other settings: all fields
    assert sorted([*reflow, *CIRCUMSTANCES, *section("presets")]) == sorted(sections)
    assert set(reflow) - set(identity(make_config(), "student")) == set(section("pairs"))
    student, teacher = (set(identity(make_config(), kind)) for kind in ("student", "teacher"))
    assert student - teacher == set(section("student"))
    assert {"lr", "t_trunc", "batch_size"} <= student - teacher
    assert {"dataset", "seed", "vae", "channels", "teacher_lr"} <= teacher
    assert {"out", "data_dir", "device", "precision", "log_every"} <= set(CIRCUMSTANCES)


def test_every_setting_has_a_comment_and_so_a_help_text():
    comments, sections = field_comments()
    names = [f.name for f in fields(Config)]
    assert list(comments) == list(sections) == names
    assert all(len(comments[name]) > 5 for name in names)
    parser = Parser(prog="x", allow_abbrev=False)
    add_field_flags(parser)
    helps = {action.dest: action for action in parser._actions}
    shown = parser.format_help()
    for name in names:
        if name == "num_classes":                  # it follows from the data
            continue
        assert helps[name].help.replace("%%", "%").startswith(comments[name])
        assert "--" + name.replace("_", "-") in shown


# ------------------------------------------------------------------------------------------- UNet


def adm_shapes():
    """Keys and shapes of the published CelebA-HQ teacher, named as in guided-diffusion."""
    shapes = {}

    def layer(name, *shape):
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, (shape[0],)

    def res(name, ch, out):
        layer(name + ".in_layers.0", ch)
        layer(name + ".in_layers.2", out, ch, 3, 3)
        layer(name + ".emb_layers.1", 2 * out, 1024)
        layer(name + ".out_layers.0", out)
        layer(name + ".out_layers.3", out, out, 3, 3)
        if ch != out:
            layer(name + ".skip_connection", out, ch, 1, 1)

    def attention(name):
        layer(name + ".norm", 512)
        layer(name + ".qkv", 1536, 512, 1)
        layer(name + ".proj_out", 512, 512, 1)

    layer("time_embed.0", 1024, 256)
    layer("time_embed.2", 1024, 1024)
    layer("input_blocks.0.0", 256, 4, 3, 3)
    for i, ch, out in ((1, 256, 256), (2, 256, 256), (4, 256, 512), (5, 512, 512), (7, 512, 512),
                       (8, 512, 512), (10, 512, 512), (11, 512, 512)):
        res(f"input_blocks.{i}.0", ch, out)
    for i, ch in ((3, 256), (6, 512), (9, 512)):
        layer(f"input_blocks.{i}.0.op", ch, ch, 3, 3)
    for i in (10, 11):
        attention(f"input_blocks.{i}.1")
    res("middle_block.0", 512, 512)
    attention("middle_block.1")
    res("middle_block.2", 512, 512)
    for i in range(8):
        res(f"output_blocks.{i}.0", 1024, 512)
    for i, ch, out in ((8, 768, 512), (9, 768, 256), (10, 512, 256), (11, 512, 256)):
        res(f"output_blocks.{i}.0", ch, out)
    for i in (0, 1, 2):
        attention(f"output_blocks.{i}.1")
    for name in ("output_blocks.2.2", "output_blocks.5.1", "output_blocks.8.1"):
        layer(name + ".conv", 512, 512, 3, 3)
    layer("out.0", 256)
    layer("out.2", 4, 256, 3, 3)
    return shapes


def test_default_unet_is_the_published_teacher_key_for_key():
    with torch.device("meta"):                     # only shapes, no memory
        net = model.UNet()
        published = {name: torch.empty(shape) for name, shape in adm_shapes().items()}
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == adm_shapes()
    assert len(adm_shapes()) == 304
    assert sum(p.numel() for p in net.parameters()) == 153_099_524
    net.load_state_dict(published, strict=True, assign=True)
    published.pop("out.2.bias")
    with pytest.raises(RuntimeError, match="out.2.bias"):
        net.load_state_dict(published, strict=True, assign=True)
    # GroupNorm of 32 groups everywhere, eps 1e-5
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-5)}


def reference_time(t, dim, scale=1.0):
    """Cosines, then sines, of scale t 10000^(-k / half), number by number."""
    half = dim // 2
    return torch.tensor([[wave(scale * x * 10000 ** (-k / half))
                          for wave in (math.cos, math.sin) for k in range(half)]
                         for x in t.tolist()])


def reference_norm(w, name, x):
    return F.group_norm(x, 32, w[name + ".weight"], w[name + ".bias"], 1e-5)


def reference_conv(w, name, x, **options):
    return F.conv2d(x, w[name + ".weight"], w[name + ".bias"], **options)


def reference_res(w, name, x, emb):
    """ADM's residual block from its weights alone: scale is the first half, shift the second."""
    h = F.silu(reference_norm(w, name + ".in_layers.0", x))
    h = reference_conv(w, name + ".in_layers.2", h, padding=1)
    e = F.silu(emb) @ w[name + ".emb_layers.1.weight"].T + w[name + ".emb_layers.1.bias"]
    out = e.shape[1] // 2
    scale, shift = e[:, :out, None, None], e[:, out:, None, None]
    h = F.silu(reference_norm(w, name + ".out_layers.0", h) * (1 + scale) + shift)
    h = reference_conv(w, name + ".out_layers.3", h, padding=1)
    if name + ".skip_connection.weight" in w:
        x = reference_conv(w, name + ".skip_connection", x)
    return x + h


def reference_attention(w, name, x, heads):
    """Attention head by head: channels are [head 0: q k v | head 1: q k v | ...]."""
    b, ch, height, width = x.shape
    flat = reference_norm(w, name + ".norm", x).reshape(b, ch, -1)
    qkv = torch.einsum("oc,bcl->bol", w[name + ".qkv.weight"][:, :, 0], flat)
    qkv = qkv + w[name + ".qkv.bias"][:, None]
    d, answers = ch // heads, []
    for k in range(heads):
        start = 3 * d * k
        query, key, value = (qkv[:, start + i * d:start + (i + 1) * d] for i in range(3))
        score = torch.einsum("bcl,bcm->blm", query, key) / math.sqrt(d)
        answers.append(torch.einsum("blm,bcm->bcl", score.softmax(2), value))
    h = torch.einsum("oc,bcl->bol", w[name + ".proj_out.weight"][:, :, 0], torch.cat(answers, 1))
    return x + (h + w[name + ".proj_out.bias"][:, None]).reshape(b, ch, height, width)


def reference_unet(w, z, t, heads, scale):
    """ADM's UNet with mult (1, 2), one block per level and attention at level 1."""
    emb = reference_time(t, 128, scale) @ w["time_embed.0.weight"].T + w["time_embed.0.bias"]
    emb = F.silu(emb) @ w["time_embed.2.weight"].T + w["time_embed.2.bias"]
    a = reference_conv(w, "input_blocks.0.0", z, padding=1)
    b = reference_res(w, "input_blocks.1.0", a, emb)
    c = reference_conv(w, "input_blocks.2.0.op", b, padding=1, stride=2)
    d = reference_res(w, "input_blocks.3.0", c, emb)
    d = reference_attention(w, "input_blocks.3.1", d, heads)
    h = reference_res(w, "middle_block.0", d, emb)
    h = reference_attention(w, "middle_block.1", h, heads)
    h = reference_res(w, "middle_block.2", h, emb)
    for i, skipped in enumerate((d, c)):
        h = reference_res(w, f"output_blocks.{i}.0", torch.cat([h, skipped], 1), emb)
        h = reference_attention(w, f"output_blocks.{i}.1", h, heads)
    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = reference_conv(w, "output_blocks.1.2.conv", h, padding=1)
    for i, skipped in ((2, b), (3, a)):
        h = reference_res(w, f"output_blocks.{i}.0", torch.cat([h, skipped], 1), emb)
    return reference_conv(w, "out.2", F.silu(reference_norm(w, "out.0", h)), padding=1)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_unet_equals_a_functional_reference(heads):
    net = shaken(model.UNet(4, 128, (1, 2), 1, (1,), heads, 7.0), 0, 0.03)
    z, t = normal((4, 6, 10), 3, dtype=torch.float32), torch.tensor([0.0, 0.4, 1.0])
    expected = reference_unet(net.state_dict(), z, t, heads, 7.0)
    tolerance = 1e-3 * expected.std().item()
    assert tolerance > 5e-5
    torch.testing.assert_close(net(z, t), expected, rtol=1e-3, atol=tolerance)
    # the order of heads, queries, keys and values matters: another one gives another answer
    other = reference_unet(net.state_dict(), z, t, 2, 7.0)
    assert (other - expected).abs().max() > 10 * tolerance


def test_time_is_embedded_in_float32_under_autocast():
    # with time_scale 1 neighbouring times differ by less than bf16 resolves
    net = model.UNet(4, 32, (1, 2), 1, (1,), 4, time_scale=1.0)
    t = 0.02 + 0.98 * times(dtype=torch.float32)

    def scale_and_shift(layers, t, bf16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return layers(net.time_embed(model.time_features(t, 32, 1.0)))

    for block in (m for m in net.modules() if isinstance(m, model.ResBlock)):
        change, bf16 = (scale_and_shift(block.emb_layers, t, low) - scale_and_shift(
            block.emb_layers, t - 0.02, low) for low in (False, True))
        assert change.abs().max() > 0
        torch.testing.assert_close(bf16, change, rtol=0, atol=1e-7)


@pytest.mark.parametrize("given, named", [
    (dict(dataset="celebahq", image_size=200), "--image-size 200"),
    (dict(dataset="folder", image_size=64, model="tiny", patch_size=8), "--image-size 64"),
    (dict(dataset="mnist", mult=(1, 2, 2, 2)), "28 x 28"),
    (dict(dataset="mnist", attention=(5,)), "--attention 5"),
    (dict(dataset="mnist", heads=7), "--heads 7"),
], ids=str)
def test_settings_that_make_no_network_are_refused_before_one_is_built(given, named, monkeypatch):
    cfg = make_config(**given)
    monkeypatch.setattr(model, "UNet", None)
    with pytest.raises(UserError, match=named):
        model.check_network(cfg, data.sample_shape(cfg))


def test_a_point_network_equals_its_formula():
    net = shaken(model.MLP(2, 16, 2, 10.0, num_classes=3), 0)
    w, z, t = net.state_dict(), normal(POINTS, dtype=torch.float32), times(dtype=torch.float32)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    waves = [wave(k * z[:, i : i + 1])             # both sines before both cosines, k fastest
             for wave in (torch.sin, torch.cos) for i in range(2) for k in (1, 2, 4, 8)]
    features = torch.cat([z, *waves, reference_time(t, 32, 10.0)], 1)
    h = features @ w["first.weight"].T + w["first.bias"]
    h = h + w["label_emb.weight"][y]
    for i in range(2):
        h = F.silu(h) @ w[f"hidden.{i}.weight"].T + w[f"hidden.{i}.bias"]
    h = F.silu(h) @ w["last.weight"].T + w["last.bias"]
    torch.testing.assert_close(net(z, t, y), h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [IMAGES, LATENTS], ids=str)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_new_unet_has_velocity_zero(shape, patch_size):
    torch.manual_seed(0)
    net = model.velocity_network(small(shape, patch_size=patch_size), shape)
    z, t = normal(shape, dtype=torch.float32), times(dtype=torch.float32)
    assert net(z, t).shape == z.shape and (net(z, t) == 0).all()
    assert torch.equal(losses.z0_prediction(net, z, t), z)
    assert (shaken(net, 0)(z, t) != 0).all()


def test_patches_are_pixels_folded_into_channels():
    folded = shaken(model.UNet(4, 16, (1, 2), 1, (1,), 2, 1.0, patch_size=2), 0)
    plain = model.UNet(16, 16, (1, 2), 1, (1,), 2, 1.0)
    plain.load_state_dict(folded.state_dict(), strict=True)
    z, t = normal(LATENTS, dtype=torch.float32), times(dtype=torch.float32)
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(z, 2), t), 2)
    torch.testing.assert_close(folded(z, t), expected)


@pytest.mark.parametrize("height, width", [(7, 8), (8, 6), (2, 8), (9, 9)])
def test_sizes_that_do_not_divide_are_refused(height, width):
    net = model.UNet(1, 16, (1, 2), 1, (1,), 2, patch_size=2)
    assert net(torch.zeros(1, 1, 8, 12), torch.ones(1)).shape == (1, 1, 8, 12)
    with pytest.raises(ValueError, match="divi.* by 4"):
        net(torch.zeros(1, 1, height, width), torch.ones(1))


# ------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("name", ["8gaussians", "moons", "checkerboard", "spirals"])
def test_densities_have_mean_zero_and_a_common_std_of_one(name):
    n = 200_000
    x = data.sample_points(name, n, gen())
    assert x.shape == (n, 2) and x.dtype == torch.float32
    # five standard errors: of the mean std / sqrt(n), of the variance the std of the squares
    assert (x.mean(0).abs() < 5 * x.std(0) / math.sqrt(n)).all()
    squares = x.double().square().mean(1)
    assert abs(squares.mean() - 1) < 5 * squares.std() / math.sqrt(n)
    assert torch.equal(data.sample_points(name, 50, gen(3)), data.sample_points(name, 50, gen(3)))
    assert not torch.equal(data.sample_points(name, 50, gen(3)),
                           data.sample_points(name, 50, gen(4)))
    dataset = data.load(make_config(name))
    z0, y = dataset.batch(50, draws(3))
    assert torch.equal(z0, data.sample_points(name, 50, gen(3))) and y is None
    assert dataset.shape == (2,) and dataset.size is None


def test_checkerboard_lies_in_every_second_square():
    x = data.sample_points("checkerboard", 100_000, gen()) * math.sqrt(4 / 3)
    assert x.abs().max() <= 2 + 1e-5
    inner = ((x - x.round()).abs() > 1e-4).all(1)              # rounding decides on the very edge
    cells = x[inner].floor().long()
    assert (cells.sum(1) % 2 == 0).all()
    share = torch.bincount((cells + 2) @ torch.tensor([4, 1]), minlength=16) / len(cells)
    error = math.sqrt(1 / 8 * 7 / 8 / len(cells))
    assert ((share > 0).sum() == 8) and ((share[share > 0] - 1 / 8).abs() < 5 * error).all()


def test_eight_gaussians_lie_around_eight_centres():
    n = 80_000
    x = data.sample_points("8gaussians", n, gen()).double() * math.sqrt(2 + 0.15**2)
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    centres = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    gaps, nearest = torch.cdist(x, centres).min(1)
    # the std around a centre is 0.15; centres are 1.53 apart, so hardly any point is confused
    assert gaps.square().mean().item() == pytest.approx(2 * 0.15**2, rel=0.03)
    share = torch.bincount(nearest, minlength=8) / n
    assert ((share - 1 / 8).abs() < 5 * math.sqrt(7 / 64 / n)).all()


def test_an_unknown_density_is_refused_in_words():
    with pytest.raises(UserError, match="no 2D data set 'circle'"):
        data.sample_points("circle", 5)


def test_batches_of_images_lie_between_minus_one_and_one():
    bits = torch.arange(256, dtype=torch.uint8).view(64, 1, 2, 2)
    images = data.Images(bits)
    assert images.shape == (1, 2, 2) and images.size == 64
    z0, y = images.batch(4096, draws())
    assert z0.dtype == torch.float32 and z0.shape == (4096, 1, 2, 2)
    torch.testing.assert_close(z0.unique(), torch.linspace(-1, 1, 256), rtol=0, atol=1e-6)
    assert torch.equal(z0, images.batch(4096, draws())[0])


def test_mnist_is_whole(mnist_dir):
    images, labels = data.mnist(mnist_dir, train=False)
    assert images.shape == (10000, 1, 28, 28) and images.dtype == torch.uint8
    # how often each digit occurs in the published test set
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.load(make_config("mnist", data_dir=str(mnist_dir))).size == 60000


# -------------------------------------------------------------------------------- noise, sampling


@SHAPES
def test_noise_is_a_function_of_seed_and_index_alone(shape):
    whole = sample.noise(shape, 700, seed=3)
    assert whole.shape == (700, *shape) and whole.dtype == torch.float32
    for start, n in ((0, 1), (0, 256), (255, 2), (256, 256), (100, 500), (511, 1), (512, 188)):
        assert torch.equal(sample.noise(shape, n, 3, start), whole[start:start + n])
    # blocks, seeds and streams are independent of one another
    others = [whole[:128], whole[256:384], whole[512:640], sample.noise(shape, 128, 4),
              sample.noise(shape, 128, 3, stream=1), sample.noise(shape, 128, 4, stream=1)]
    for i, a in enumerate(others):
        for b in others[:i]:
            cosine = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(cosine) < 5 / math.sqrt(a.numel())


def test_noise_is_standard_normal():
    n = 50_000
    z = sample.noise((4,), n, 0).double()
    assert abs(z.mean()) < 5 / math.sqrt(4 * n)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / (4 * n))
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / (4 * n))
    off = torch.cov(z.T) - torch.eye(4)
    assert off.abs().max() < 5 * math.sqrt(2 / n)


def bent(z, t, y=None):
    """A velocity that is computed element by element, so that samples do not mix."""
    return (z - 0.5).tanh() + z * across(t, z)


@SHAPES
@pytest.mark.parametrize("solver", sample.SOLVERS)
def test_samples_do_not_depend_on_the_batch_size(shape, solver, nfe=3):
    whole = sample.draw(bent, shape, 600, nfe, seed=5, solver=solver, batch=600)
    assert whole.shape == (600, *shape) and whole.std() > 0.1
    for batch in (1000, 256, 97):
        # vectorised tanh rounds the end of an array differently from its middle
        torch.testing.assert_close(sample.draw(bent, shape, 600, nfe, 5, solver, batch), whole,
                                   rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sample.draw(bent, shape, 40, nfe, 5, solver), whole[:40],
                               rtol=1e-5, atol=1e-6)
    assert not torch.allclose(sample.draw(bent, shape, 40, nfe, 6, solver), whole[:40])


@SHAPES
def test_every_nfe_and_solver_starts_from_the_same_noise(shape):
    z1 = sample.noise(shape, 300, seed=2)
    for solver, nfe in (("euler", 1), ("euler", 8), ("stochastic", 4)):
        calls = []
        sample.draw(counted(bent, calls), shape, 300, nfe, seed=2, solver=solver, batch=128)
        assert len(calls) == 3 * nfe
        starts = torch.cat([calls[k * nfe][0] for k in range(3)])
        assert torch.equal(starts, z1)


def test_stochastic_sampling_takes_new_noise_at_every_step():
    # if the model predicts 0, zt is t times the fresh noise
    calls = []

    def field(z, t, y=None):
        return z / across(t, z)

    sample.draw(counted(field, calls), (2,), 256, 4, seed=0, solver="stochastic")
    seen = torch.stack([(z / across(t, z)).flatten() for z, t, _ in calls])
    assert (torch.corrcoef(seen) - torch.eye(4)).abs().max() < 5 / math.sqrt(512)
    torch.testing.assert_close(seen.std(1), torch.ones(4), rtol=0, atol=5 / math.sqrt(2 * 512))


# --------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("d", [2, 5])
def test_sliced_w2_of_a_shift_and_of_a_scaling(d):
    a, shift = normal((d,), 400, dtype=torch.float32), torch.arange(1.0, d + 1)
    assert evaluate.sliced_w2(a, a) == 0
    # all points move by <w, shift>, whose mean square over directions is |shift|^2 / d
    distance = evaluate.sliced_w2(a, a + shift)
    assert distance == pytest.approx(shift.norm().item() / math.sqrt(d), rel=0.1)
    # neither the order of the points nor that of the clouds matters
    shuffled = (a + shift)[torch.randperm(400, generator=gen())]
    assert evaluate.sliced_w2(a, shuffled) == pytest.approx(distance)
    assert evaluate.sliced_w2(shuffled, a) == pytest.approx(distance)
    # scaling by c moves each projection by (c - 1) times itself
    expected = 2 * a.square().sum(1).mean().sqrt().item() / math.sqrt(d)
    assert evaluate.sliced_w2(a, 3 * a) == pytest.approx(expected, rel=0.1)
    with pytest.raises(ValueError, match="one shape"):
        evaluate.sliced_w2(a, a[:-1])


@pytest.mark.parametrize("d", [3, 64])
def test_frechet_distance_equals_scipys(d):
    mix = normal((d,), d, seed=2) / math.sqrt(d)
    a, b = normal((d,), 500), normal((d,), 400, seed=1) @ mix + 0.3
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    gap = a.mean(0).numpy() - b.mean(0).numpy()
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = gap @ gap + np.trace(cov_a + cov_b - 2 * root)
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert abs(evaluate.frechet_distance(a, a)) < 1e-9
    # ReLU features may always be zero; the root of the covariance must not become nan then
    a, b = (torch.cat([x, torch.zeros(len(x), 2)], 1) for x in (a, b))
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="two samples"):
        evaluate.frechet_distance(a[:1], b)


def test_spread_is_the_root_of_the_mean_variance():
    x = normal((4,), 500) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 7
    std, spread = x.var(0).mean().sqrt().item(), evaluate.Spread()
    spreads = [evaluate.Spread().add(z).std for z in (x, x.view(500, 1, 2, 2))]
    assert spreads[0] == spreads[1] == pytest.approx(std)
    for batch in (3 * x).split(70):
        spread.add(batch)
    assert spread.std == pytest.approx(3 * std)

    # within classes: the mean of the classes' variances; a class of one sample has none
    y, within = torch.arange(500) % 2, evaluate.Spread()
    apart = x + 100 * y[:, None]
    for batch, classes in zip(apart.split(70), y.split(70)):
        within.add(batch, classes)
    within.add(normal((1, 4), 1), torch.tensor([7]))
    expected = torch.stack([x[y == k].var(0) for k in (0, 1)]).mean().sqrt().item()
    assert within.std == pytest.approx(expected) and evaluate.Spread().add(apart).std > 40


# ---------------------------------------------------------------------------------------- imports


def imports():
    """{module: the project's modules that it imports, also inside functions}."""
    files = [f for folder in (".", "harness", "study") for f in (ROOT / folder).glob("*.py")]
    parts = {f: f.relative_to(ROOT).with_suffix("").parts for f in files}
    names = {f: ".".join(p for p in parts[f] if p != "__init__") for f in files}
    graph = {}
    for file, name in names.items():
        named = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        named |= {module.split(".")[0] for module in named}    # harness.run runs harness, too
        graph[name] = named & set(names.values()) - {name}
    return graph


def test_imports_point_one_way():
    graph = imports()
    assert {"train", "toy", "harness", "harness.run", "study.ablation"} <= graph.keys()
    tuple(TopologicalSorter(graph).static_order())             # CycleError names a circle
    assert graph["harness"] == graph["losses"] == set()
    assert graph["config"] == {"harness"} and graph["toy"] == {"losses"}
    # no part of the method needs what it is compared with, except where a method is chosen
    users = {name for name in graph if "study.baselines" in graph[name]}
    assert users <= {"train", "study.ablation"}
