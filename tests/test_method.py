"""The method held against mathematics: losses, solvers, networks, data, metrics, Algorithm 1."""

import copy
import math
from dataclasses import fields
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
import teacher
import train
from config import (LATENT_SETS, MODELS, PRESETS, Config, Parser, UserError, add_field_flags,
                    field_comments, make_config)

POINTS, IMAGES, LATENTS = (2,), (1, 8, 8), (4, 8, 8)
SHAPES = pytest.mark.parametrize("shape", [POINTS, IMAGES, LATENTS], ids=str)
METRICS = pytest.mark.parametrize("metric", ["pseudo-huber", "l2"])
B = 6


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(seed=0):
    found = data.Draws(0)
    found.generator.manual_seed(seed)
    return found


def skips(t, t_skip, seed=0):
    return losses.time_skip(t, *torch.rand(2, len(t), generator=gen(seed)), t_skip)


def normal(shape, n=B, seed=0, dtype=torch.float64):
    return torch.randn(n, *shape, generator=gen(seed), dtype=dtype)


def times(n=B, seed=0, dtype=torch.float64):
    return torch.rand(n, generator=gen(seed), dtype=dtype)


def across(t, z):
    """Times over the elements of z, written unlike losses.expand."""
    return t.to(z.dtype).reshape(len(t), *(1 for _ in z.shape[1:]))


def counted(field, calls):
    """The velocity field, noting each call's (z, t, y)."""
    def called(z, t, y=None):
        calls.append((z, t, y))
        return field(z, t, y)
    return called


def mean_and_error(values):
    """Mean of independent estimates and its standard error."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def small(shape, **given):
    """Settings of tiny networks for samples of `shape`; tuned defaults do not enter the tests."""
    nets = dict(channels=16, blocks=1, disc_channels=8, n_gan=0, n_rf=0, n_bi=0, t_trunc=0.4,
                t_skip=0.1, mu=0.9, ema=0.99, l_gan=1.0, l_rf=1.0, l_bi=1.0, r1=1.0,
                truncation="landing", metric="pseudo-huber")
    if len(shape) > 1:
        nets |= dict(mult=(1, 2), attention=(1,), heads=2, time_scale=100.0)
    return make_config(**(nets | given))


@torch.no_grad()
def shaken(network, seed, size=0.1):
    """The network with noise on every weight, since layers that start at zero hide mistakes."""
    for p in network.parameters():
        p.add_(size * torch.randn(p.shape, generator=gen(seed)))
    return network


def make_net(shape, cfg, lr=0.1):
    """Four different velocity networks, a discriminator, and plain SGD: a step is lr x gradient."""
    torch.manual_seed(0)
    first = model.velocity_network(cfg, shape)
    net = SimpleNamespace(**{
        name: shaken(copy.deepcopy(first), seed)
        for seed, name in enumerate(("teacher", "student", "target", "ema"))})
    net.disc = model.discriminator(cfg, shape)
    net.opt = torch.optim.SGD(net.student.parameters(), lr=lr)
    net.opt_disc = torch.optim.SGD(net.disc.parameters(), lr=lr)
    return net


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
    assert losses.flow_matching_loss(slope, z0, z1) < 1e-28
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
def test_predictions_in_one_batch_equal_separate_ones_with_labels(shape):
    def field(z, t, y):
        return z * across(t, z) + across(y, z)

    y, calls = torch.arange(B), []
    pairs = [(normal(shape, seed=s), times(seed=s)) for s in range(3)]
    found = losses.z0_predictions(counted(field, calls), pairs, y)
    assert len(calls) == 1 and len(calls[0][0]) == 3 * B
    assert calls[0][2].tolist() == [*range(B)] * 3
    for answer, (z, t) in zip(found, pairs, strict=True):
        torch.testing.assert_close(answer, losses.z0_prediction(field, z, t, y))
    assert len(losses.z0_predictions(lambda z, t, y: z, pairs[:1])) == 1


# ------------------------------------------------------------------------------------- solvers


@SHAPES
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 7, 16])
def test_euler_is_exact_where_the_velocity_is_constant(shape, nfe):
    z1, v, calls = normal(shape), normal(shape, seed=1), []
    z = sample.euler(counted(lambda z, t, y: v, calls), z1, nfe)
    torch.testing.assert_close(z, z1 - v)
    assert len(calls) == nfe
    wanted = [i / nfe for i in range(nfe, 0, -1)]
    assert [t[0].item() for _, t, _ in calls] == pytest.approx(wanted)
    assert all(t.shape == (B,) and (t == t[0]).all() for _, t, _ in calls)


@pytest.mark.parametrize("nfe", [1, 3, 7, 31])
def test_heun_counts_its_calls_honestly(nfe):
    calls = []
    sample.heun(counted(lambda z, t, y: z, calls), normal(POINTS), nfe)
    assert len(calls) == nfe
    assert min(t.min() for _, t, _ in calls) > 0, "nothing is called at t = 0"


# dz/dt = v has the solution z(0) = z(1) g, with g known
FIELDS = {
    "z": (lambda z, t, y: z, math.exp(-1)),
    "3 t z": (lambda z, t, y: 3 * across(t, z) * z, math.exp(-1.5)),
}


@pytest.mark.parametrize("field, growth", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("solver, ratio", [("euler", 2), ("heun", 4)])
def test_order_of_the_solvers(field, growth, solver, ratio):
    z1 = torch.ones(1, 2, dtype=torch.float64)
    errors = []
    for steps in (64, 128, 256):
        nfe = steps if solver == "euler" else 2 * steps - 1
        errors.append((sample.SOLVERS[solver](field, z1, nfe) - growth * z1).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.05)


@SHAPES
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_stochastic_sampling_predicts_and_mixes_noise_in(shape, nfe):
    def field(z, t, y):
        return 0.3 * z + across(t, z)

    fresh, calls = [normal(shape, seed=10 + i) for i in range(nfe)], []
    z1, left = normal(shape), iter(fresh)
    z = sample.stochastic(counted(field, calls), z1, nfe, renoise=lambda z: next(left))
    expected = z1
    for k in range(nfe):
        t = 1 - k / nfe
        x = expected - t * (0.3 * expected + t)
        low = t - 1 / nfe
        expected = (1 - low) * x + low * fresh[k] if k < nfe - 1 else x
    # the solvers' times are float32
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
    assert len(calls) == nfe
    assert len(list(left)) == 1, "the last prediction takes no noise"


@pytest.mark.parametrize("solver, nfe", [("euler", 4), ("heun", 7), ("stochastic", 4)])
def test_path_holds_time_state_and_prediction(solver, nfe):
    path, z1 = [], normal(POINTS)
    z = sample.SOLVERS[solver](lambda z, t, y: z, z1, nfe, path=path)
    assert [t for t, _, _ in path] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert torch.equal(path[0][1], z1) and torch.equal(path[-1][1], z)
    for t, zt, f in path:
        torch.testing.assert_close(f, zt - t * zt if t else zt)


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
    return train.scflow_step(net, z0, None, 0, cfg, draws(seed))


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
@pytest.mark.parametrize("solver, nfe", [("euler", 1), ("euler", 5), ("heun", 1), ("heun", 5),
                                         ("stochastic", 1), ("stochastic", 5)])
def test_every_solver_lands_on_a_point_mass(shape, solver, nfe):
    m = normal(shape, n=1, dtype=torch.float32)
    z = sample.SOLVERS[solver](lambda z, t, y: (z - m) / across(t, z),
                               normal(shape, seed=1, dtype=torch.float32), nfe)
    torch.testing.assert_close(z, m.expand_as(z), rtol=0, atol=2e-6)


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
    one = sample.euler(field, z1, 1)
    torch.testing.assert_close(one, sigma * z1)
    for nfe in (2, 4, 16):
        torch.testing.assert_close(sample.euler(field, z1, nfe), one, rtol=0, atol=1e-6)


# for N(0,1) and independent noise: zt has variance s^2 = (1-t)^2 + t^2, its covariance with
# z1 - z0 is 2t - 1, and so Var(z1 - z0 | zt) = 2 - (2t-1)^2 / s^2 = 1 / s^2, since 2 s^2 = 1 +
# (2t-1)^2. Over t ~ U(0,1) that is the integral of 1 / (2t^2 - 2t + 1), arctan(1) - arctan(-1)
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
    # what is orthogonal to the minimum adds its own square: 0.3^2 times the mean of s^2, 2/3
    mean, error = mean_and_error(worse)
    assert error < 0.005 and abs(mean - 0.09 * 2 / 3) < 5 * error


@SHAPES
@pytest.mark.parametrize("t_trunc", [0.4, 1.0])
def test_truncated_branch_reaches_the_posterior_variance(shape, t_trunc):
    # Var(z0 | zt) = t^2 / s^2, whose integral from 0 to T is T/2 + log(2T^2 - 2T + 1) / 4
    known = 0.5 + math.log(2 * t_trunc**2 - 2 * t_trunc + 1) / 4 / t_trunc
    found, n = [], 40_000 // math.prod(shape)
    for i in range(40):
        z0, z1 = normal(shape, n, 3 * i), normal(shape, n, 3 * i + 1)
        t = t_trunc * times(n, 3 * i + 2)
        zt = losses.interpolate(z0, z1, t)
        f = losses.z0_prediction(gaussian_velocity, zt, t)
        torch.testing.assert_close(f, zt * across((1 - t) / s_squared(t), zt))
        # theta~ answers nonsense, which must not matter below t_trunc
        loss = losses.consistency_loss(f, torch.full_like(f, 1e3), z0, t, t, t_trunc, "current",
                                       "l2")
        found.append(loss.item())
    mean, error = mean_and_error(found)
    assert error < 0.02 * known and abs(mean - known) < 5 * error


def perfect_cd(z, t, y=None):
    """The velocity of a student that carries z at t to z / s(t), as the teacher's ODE does."""
    t = across(t, z)
    return (z - z / s_squared(t).sqrt()) / t


@pytest.mark.parametrize("nfe, std", [(1, 1), (2, 1.414), (4, 1.662), (8, 1.816), (16, 1.904)])
def test_a_perfect_consistency_student_oversaturates(nfe, std):
    # all is linear, so the std grows as z = 1 does
    z = sample.euler(perfect_cd, torch.ones(1, 2, dtype=torch.float64), nfe)
    assert z[0].tolist() == pytest.approx([std, std], abs=6e-4)


def test_oversaturation_tends_to_two_and_fresh_noise_has_none():
    many = sample.euler(perfect_cd, torch.ones(1, 2, dtype=torch.float64), 2048)
    assert 1.995 < many[0, 0] < 2
    n = 100_000
    for nfe in (1, 2, 4, 16):
        torch.manual_seed(nfe)
        z = sample.stochastic(perfect_cd, normal(POINTS, n), nfe)
        assert abs(z.std() - 1) < 5 / math.sqrt(4 * n)         # 2n numbers, error 1 / sqrt(4n)


@pytest.mark.parametrize("sign", [-1, 1], ids=["CD", "BI"])
@pytest.mark.parametrize("at", [0.2, 0.5, 0.9])
def test_the_perfect_student_is_consistent_to_second_order(sign, at):
    # the teacher's Euler step of size d errs by d^2, so the L2 loss falls as d^4
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


@SHAPES
@pytest.mark.parametrize("truncation", ["landing", "current"])
def test_truncation_takes_the_data_exactly_where_the_rule_says(shape, truncation):
    below, at, above = (x.item() for x in (torch.nextafter(torch.tensor(0.4), torch.tensor(0.0)),
                                           torch.tensor(0.4),
                                           torch.nextafter(torch.tensor(0.4), torch.tensor(1.0))))
    rows = [  # t, t_lo, data under "landing" (t_lo < 0.4), data under "current" (t <= 0.4)
        (0.0, 0.0, True, True), (0.3, 0.25, True, True),
        (below, below, True, True), (at, below, True, True), (at, at, False, True),
        (above, below, True, False), (above, at, False, False), (above, above, False, False),
        (0.45, 0.39, True, False), (1.0, 0.95, False, False),
    ]
    t, t_lo = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    data_wins = [r[2] if truncation == "landing" else r[3] for r in rows]
    # the data is 1 and theta~ answers 3; the student's 0 is then off by 1 or by 3 in each sample
    ones = torch.ones(len(rows), *shape)
    f_t = (0 * ones).requires_grad_()
    loss = losses.consistency_loss(f_t, 3 * ones, ones, t, t_lo, 0.4, truncation, "l2")
    aims = [1 if wins else 3 for wins in data_wins]
    assert loss.item() == pytest.approx(np.mean(np.square(aims)))
    (grad,) = torch.autograd.grad(loss, f_t)
    aims = torch.tensor(aims, dtype=torch.float32).reshape(-1, *(1 for _ in shape))
    torch.testing.assert_close(grad, (-2 * aims / grad.numel()).expand_as(grad))


@SHAPES
def test_no_truncation_at_t_trunc_zero(shape):
    t_lo = torch.cat([torch.zeros(3), torch.rand(61, generator=gen())])
    ones = torch.ones(64, *shape)
    loss = losses.consistency_loss(ones, ones, 9 * ones, t_lo, t_lo, 0.0, "landing", "l2")
    assert loss == 0
    # even where a teacher's step ends at zero exactly, the rule is "below", so data never enters
    t = torch.full((64,), 0.05)
    assert losses.consistency_loss(ones, ones, 9 * ones, t, t - t, 0.0, "landing") < 1e-6


@pytest.mark.parametrize("t_skip", [0.1, 0.5, 1.0])
def test_time_skips_stay_in_range(t_skip):
    for t in (torch.zeros(1000), torch.ones(1000), torch.rand(100_000, generator=gen(1)),
              torch.tensor([1e-7, 0.05, 0.1, 0.5, 0.9, 0.95, 1 - 1e-7]).repeat(1000)):
        d_s, d_k = skips(t, t_skip)
        assert d_s.shape == d_k.shape == t.shape
        assert (d_s >= 0).all() and (d_k >= 0).all()
        assert (d_s <= t_skip).all() and (d_k <= t_skip).all()
        assert (t - d_s >= 0).all() and (t + d_k <= 1).all()
    assert (skips(torch.zeros(9), t_skip)[0] == 0).all()
    assert (skips(torch.ones(9), t_skip)[1] == 0).all()


@pytest.mark.parametrize("t", [0.02, 0.1, 0.5, 0.93, 1.0])
def test_time_skips_are_uniform_and_independent(t):
    n = 40_000
    d_s, d_k = skips(torch.full((n,), t), 0.1, 7)
    for d, longest in ((d_s, min(t, 0.1)), (d_k, min(1 - t, 0.1))):
        if longest == 0:
            continue
        # mean and variance of U(0, longest), within five standard errors
        assert abs(d.mean() - longest / 2) < 5 * longest / math.sqrt(12 * n)
        assert d.var() == pytest.approx(longest**2 / 12, rel=5 * math.sqrt(0.8 / n))
    if t < 1:
        assert abs(torch.corrcoef(torch.stack([d_s, d_k]))[0, 1]) < 5 / math.sqrt(n)


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    c, d = 0.01, torch.tensor([1e-4, -1e-4, 100.0, -100.0], dtype=torch.float64)
    found = [losses.distance(x, torch.zeros_like(x), c=c).item() for x in d]
    assert found[:2] == pytest.approx([1e-8 / (2 * c)] * 2, rel=1e-4)
    assert found[2:] == pytest.approx([100 - c] * 2, rel=1e-8)
    assert losses.distance(d, d) == 0
    # a mean over elements, not over their sum: between the two regimes by the formula itself
    a = torch.tensor([[0.01, 0.03]], dtype=torch.float64)
    expected = (math.sqrt(2) - 1 + math.sqrt(10) - 1) / 2 * c
    assert losses.distance(a, 0 * a, c=c).item() == pytest.approx(expected)
    assert losses.distance(a, 0 * a, "l2").item() == pytest.approx((0.01**2 + 0.03**2) / 2)


# ----------------------------------------------------------------------------------------- GAN


def test_gan_losses_at_zero_logits_and_their_slopes():
    real, fake = torch.zeros(B, requires_grad=True), torch.zeros(B, requires_grad=True)
    loss_g, loss_d = losses.generator_loss(fake), losses.discriminator_loss(real, fake)
    assert loss_g.item() == pytest.approx(math.log(2))
    assert loss_d.item() == pytest.approx(2 * math.log(2))
    # -log sigmoid has slope -1/2 at zero: the generator raises its logits, D lowers them
    (g,) = torch.autograd.grad(loss_g, fake)
    torch.testing.assert_close(g, torch.full((B,), -0.5 / B))
    g_real, g_fake = torch.autograd.grad(loss_d, (real, fake))
    torch.testing.assert_close(g_real, torch.full((B,), -0.5 / B))
    torch.testing.assert_close(g_fake, torch.full((B,), 0.5 / B))


def test_gan_losses_equal_their_logarithms_and_do_not_overflow():
    real, fake = normal((), 50), normal((), 50, seed=1)
    sigmoid = torch.sigmoid
    torch.testing.assert_close(losses.generator_loss(fake), -sigmoid(fake).log().mean())
    torch.testing.assert_close(losses.discriminator_loss(real, fake),
                               -sigmoid(real).log().mean() - (1 - sigmoid(fake)).log().mean())
    # the non-saturating form keeps its slope where D is sure that a sample is fake
    sure = torch.tensor([-1000.0], requires_grad=True)
    loss = losses.generator_loss(sure)
    assert loss.item() == 1000 and torch.autograd.grad(loss, sure)[0].item() == -1


@SHAPES
def test_r1_of_a_linear_discriminator(shape):
    w = normal(shape, n=1, seed=3)[0].requires_grad_()
    z0 = normal(shape).requires_grad_()
    penalty = losses.r1_penalty((z0 * w).flatten(1).sum(1), z0)
    torch.testing.assert_close(penalty, w.square().sum())
    (grad,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(grad, 2 * w)
    assert z0.grad is None


@SHAPES
def test_r1_is_differentiable_through_the_discriminator(shape):
    torch.manual_seed(0)
    disc = model.discriminator(small(shape), shape).double()
    # the network's call answers in float32, so its layers' own forward is what is differentiated
    z0 = normal(shape).requires_grad_()
    penalty = losses.r1_penalty(disc.forward(z0), z0)
    weight = disc.head.linear.weight
    (grad,) = torch.autograd.grad(penalty, weight)
    with torch.no_grad():
        weight[0, 0] += (h := 1e-5)
    up = losses.r1_penalty(disc.forward(z0), z0)
    with torch.no_grad():
        weight[0, 0] -= 2 * h
    down = losses.r1_penalty(disc.forward(z0), z0)
    assert grad[0, 0].item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-6, abs=1e-9)
    assert grad.abs().max() > 0


# ----------------------------------------------------------------------------------------- EMA


@SHAPES
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.998, 1.0])
def test_ema_update_is_its_formula(shape, decay):
    net = make_net(shape, small(shape))
    before, new = weights(net.ema), weights(net.student)
    model.ema_update(net.ema, net.student, decay)
    for old, theta, found in zip(before, new, weights(net.ema), strict=True):
        torch.testing.assert_close(found, decay * old + (1 - decay) * theta)
    assert same(weights(net.student), new)
    if decay == 0:
        assert same(weights(net.ema), new)
    if decay == 1:
        assert same(weights(net.ema), before)


@SHAPES
def test_networks_keep_all_their_state_in_parameters(shape):
    # the average runs over parameters alone, so a buffer would be forgotten
    net = make_net(shape, small(shape))
    assert not list(net.student.buffers())
    frozen = model.copy_of(net.student)
    assert same(weights(frozen), weights(net.student))
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())


# ------------------------------------------------------------------------------------ Algorithm 1


def reference_step(net, z0, y, use, cfg, seed):
    """Algorithm 1 as the paper writes it: no batch is joined, no term is shared.

    Returns its terms and the weights after the step, of copies; net stays as it is. The order of
    the three draws is the one thing taken from the code.
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
        near = t - d_s < cfg.t_trunc
        aim[near] = z0[near]
        x1 = f(net.student, z1, one)
    terms["cd"] = huber(f(net.student, zt, t) - aim)
    if "rf" in use:
        zr = (1 - across(t, z0)) * x1 + across(t, z0) * z1
        terms["rf"] = ((x1 - f(net.student, zr, t)) ** 2).mean()
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
@pytest.mark.parametrize("use", ["cd", "cd gan", "cd rf", "cd bi", "cd gan rf bi"])
def test_a_step_equals_algorithm_1_written_plainly(shape, use):
    use = tuple(use.split())
    cfg = small(shape, losses=use, t_trunc=0.4, num_classes=3, r1=0.5, l_gan=0.7, l_rf=0.6,
                l_bi=0.4, mu=0.8, ema=0.95)
    net = make_net(shape, cfg)
    z0, y = normal(shape, dtype=torch.float32), torch.tensor([0, 1, 2, 0, 1, 2])
    wanted, after = reference_step(net, z0, y, use, cfg, seed=5)
    terms = train.scflow_step(net, z0, y, 0, cfg, draws(5))
    assert set(wanted) == set(terms) - {"d_real", "d_fake"}
    assert set(terms) <= set(train.TERMS), "a term without a column in the log would be lost"
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name, expected in after.items():
        for p, q in zip(weights(getattr(net, name)), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@SHAPES
def test_a_step_leaves_no_gradient_anywhere(shape):
    cfg = small(shape, num_classes=3)
    net = make_net(shape, cfg)
    # the frozen networks and the data ask for gradients here, so that a leak would show
    z0, y = normal(shape, dtype=torch.float32).requires_grad_(), torch.arange(B) % 3
    teacher_before = weights(net.teacher)
    terms = train.scflow_step(net, z0, y, 0, cfg, draws())
    assert z0.grad is None
    for name in ("teacher", "target", "ema", "student", "disc"):
        assert all(p.grad is None for p in getattr(net, name).parameters()), name
    assert same(weights(net.teacher), teacher_before)
    assert all(term.isfinite() for term in terms.values())


@SHAPES
def test_r1_acts_on_the_discriminator_alone(shape):
    after = {}
    for r1 in (0.0, 1.0):
        cfg = small(shape, l_gan=0.0, r1=r1)
        net = make_net(shape, cfg)
        start = weights(net.disc)
        terms = train.scflow_step(net, normal(shape, dtype=torch.float32), None, 0, cfg, draws())
        after[r1] = weights(net.student), weights(net.disc)
        assert ("r1" in terms) == (r1 > 0)
        assert not same(start, after[r1][1])
    assert same(after[0.0][0], after[1.0][0]), "R1's graph reached the student"
    assert not same(after[0.0][1], after[1.0][1])


@SHAPES
def test_the_students_loss_does_not_move_the_discriminator(shape):
    after = []
    for l_gan in (0.0, 5.0):
        cfg = small(shape, l_gan=l_gan)
        net = make_net(shape, cfg)
        net.opt.param_groups[0]["lr"] = 0.0        # the same student, so only a leak may differ
        for step in range(2):                      # a gradient left over would act in the second
            train.scflow_step(net, normal(shape, dtype=torch.float32), None, step, cfg, draws(step))
        after.append(weights(net.disc))
    assert same(*after)


@SHAPES
@pytest.mark.parametrize("labelled", [False, True], ids=["without labels", "with labels"])
def test_cost_of_a_step_and_the_labels_that_networks_see(shape, labelled):
    y = torch.tensor([2, 0, 1, 1, 0, 2]) if labelled else None
    for use, wanted in ((("cd", "gan", "rf", "bi"), dict(student=[2 * B, B], target=[2 * B],
                                                       teacher=[B], disc=[B, B, B], ema=[])),
                        (("cd",), dict(student=[B], target=[B], teacher=[B], disc=[], ema=[]))):
        cfg = small(shape, losses=use, num_classes=3 if labelled else 0)
        net, calls = make_net(shape, cfg), {name: [] for name in wanted}
        for name in wanted:
            getattr(net, name).register_forward_pre_hook(
                lambda module, args, name=name: calls[name].append(args))
        train.scflow_step(net, normal(shape, dtype=torch.float32), y, 0, cfg, draws())
        assert {name: [len(args[0]) for args in seen] for name, seen in calls.items()} == wanted
        for seen in calls.values():
            for z, *_, label in seen:
                assert z.shape[1:] == shape
                if labelled:
                    assert label.tolist() == y.tolist() * (len(z) // B)
                else:
                    assert label is None


@pytest.mark.parametrize("shape", [POINTS, IMAGES], ids=str)
def test_labels_reach_student_teacher_and_ema(shape):
    cfg = small(shape, num_classes=3)
    net = make_net(shape, cfg)
    z, t = normal(shape, dtype=torch.float32), times(dtype=torch.float32)
    for name in ("student", "teacher", "target", "ema"):
        network = getattr(net, name)
        out = [network(z, t, torch.full((B,), k)) for k in range(4)]
        for i in range(4):
            for k in range(i):
                assert (out[i] - out[k]).abs().flatten(1).max(1).values.min() > 1e-4, name
        # no label is the null condition of Eq. 2, the row after the classes
        assert torch.equal(network(z, t), out[3])
    # classes 0 and 1 are learnt from, class 2 and the null condition do not occur
    rows = {name: getattr(net, name).label_emb.weight for name in ("student", "target", "ema")}
    before = {name: w.detach().clone() for name, w in rows.items()}
    theta = rows["student"].detach().clone()
    train.scflow_step(net, z, torch.tensor([0, 1, 0, 1, 0, 1]), 0, cfg, draws())
    moved = (rows["student"] != theta).any(1)
    assert moved.tolist() == [True, True, False, False]
    for name, decay in (("target", cfg.mu), ("ema", cfg.ema)):
        torch.testing.assert_close(rows[name].detach(),
                                   decay * before[name] + (1 - decay) * rows["student"].detach())


@SHAPES
def test_labels_reach_the_discriminator(shape):
    torch.manual_seed(0)
    disc = model.discriminator(small(shape, num_classes=3), shape)
    z = normal(shape, dtype=torch.float32)
    zero, two, null = (disc(z, torch.full((B,), k)) for k in (0, 2, 3))
    assert zero.shape == (B,) and (zero != two).all()
    assert torch.equal(disc(z), null)


@SHAPES
def test_a_batch_of_one_works(shape):
    cfg = small(shape, num_classes=2)
    net = make_net(shape, cfg)
    before = weights(net.student)
    z0 = normal(shape, 1, dtype=torch.float32)
    terms = train.scflow_step(net, z0, torch.tensor([1]), 0, cfg, draws())
    assert {"cd", "gan", "rf", "bi", "disc", "r1"} <= terms.keys()
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    assert not same(before, weights(net.student))
    for solver in sample.SOLVERS:
        z = sample.draw(net.ema, shape, 1, 3, solver=solver)
        assert z.shape == (1, *shape) and z.isfinite().all()
    wanted, _ = reference_step(make_net(shape, cfg), z0, torch.tensor([1]),
                               ("cd", "gan", "rf", "bi"), cfg, seed=0)
    assert terms["cd"].item() == pytest.approx(wanted["cd"].item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name, field", [("gan", "n_gan"), ("rf", "n_rf"), ("bi", "n_bi")])
@pytest.mark.parametrize("first", [1, 7])
def test_warm_ups_end_exactly_at_their_iteration(name, field, first):
    cfg = small(POINTS, **{field: first})
    everything = {"cd", "gan", "rf", "bi"}
    assert train.losses_in_use(cfg, 0) == everything - {name}
    assert train.losses_in_use(cfg, first - 1) == everything - {name}
    assert train.losses_in_use(cfg, first) == everything
    assert train.losses_in_use(cfg, 10**6) == everything
    # a loss that was not chosen does not enter after its warm-up either
    without = small(POINTS, **{field: first}, losses=tuple(everything - {name}))
    assert train.losses_in_use(without, first) == everything - {name}
    net, z0 = make_net(POINTS, cfg), normal(POINTS, dtype=torch.float32)
    assert name not in train.scflow_step(net, z0, None, first - 1, cfg, draws())
    assert name in train.scflow_step(net, z0, None, first, cfg, draws())


def test_learning_rates_rise_then_fall_along_a_cosine():
    opt = SimpleNamespace(param_groups=[{"lr": None}, {"lr": None}])
    other = SimpleNamespace(param_groups=[{"lr": None}])

    def rate(step, **given):
        cfg = make_config(**(dict(lr_warmup=100, lr_final=0.0) | given))
        teacher.set_rates(cfg, step, 1000, (opt, 2.0), (other, 1.0))
        assert opt.param_groups[0]["lr"] == opt.param_groups[1]["lr"]
        assert opt.param_groups[0]["lr"] == pytest.approx(2 * other.param_groups[0]["lr"])
        return other.param_groups[0]["lr"]

    assert rate(0, lr_warmup=0) == 1
    assert rate(0, lr_warmup=100, lr_final=1.0) == pytest.approx(0.01)
    assert rate(99, lr_warmup=100, lr_final=1.0) == 1
    assert rate(500, lr_warmup=100) == pytest.approx(0.5)
    assert rate(500, lr_final=0.2) == pytest.approx(0.6)
    assert rate(1000) == pytest.approx(0, abs=1e-12)
    assert rate(700, lr_final=1.0) == pytest.approx(1)


# -------------------------------------------------------------------------------------- settings


def test_without_the_gan_there_is_no_truncation_unless_it_is_asked_for():
    assert make_config().t_trunc == Config.t_trunc > 0
    assert make_config(losses=("cd", "gan")).t_trunc == Config.t_trunc
    assert make_config(losses=("cd",)).t_trunc == 0
    assert make_config(losses=("cd", "rf", "bi")).t_trunc == 0
    assert make_config(losses=("cd",), t_trunc=0.4).t_trunc == 0.4
    assert make_config(losses=("cd", "gan"), t_trunc=0.0).t_trunc == 0
    assert make_config("mnist", losses=("cd",)).t_trunc == 0


def test_presets_hold_what_differs_and_flags_win():
    names = {f.name for f in fields(Config)}
    for dataset, preset in PRESETS.items():
        cfg = make_config(dataset)
        assert cfg.dataset == dataset and preset.keys() <= names
        if dataset in LATENT_SETS:
            where = preset["data_dir"] and str(Path(preset["data_dir"]).resolve())
            preset = preset | MODELS["paper"] | dict(model="paper", preset="paper", data_dir=where)
        for f in fields(Config):
            wanted = preset.get(f.name, dataset if f.name == "dataset" else f.default)
            assert getattr(cfg, f.name) == wanted
        assert make_config(dataset, lr=0.123).lr == 0.123
    assert make_config("moons") == Config(dataset="moons")


@pytest.mark.parametrize("given", [
    dict(t_trunc=1.5), dict(t_trunc=-0.1), dict(t_skip=0.0), dict(t_skip=2.0), dict(mu=1.1),
    dict(steps=0), dict(batch_size=0), dict(lr=0.0), dict(huber_c=0.0), dict(n_rf=-1),
    dict(r1=-1.0), dict(betas=(0.9,)), dict(disc_betas=(0.0, 1.0)), dict(losses=("gan",)),
    dict(losses=()),
], ids=str)
def test_settings_that_make_no_sense_are_refused_by_the_flags_name(given):
    (name,) = given
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        make_config(**given)


def test_every_setting_has_a_comment_and_so_a_help_text():
    comments, sections = field_comments()
    names = [f.name for f in fields(Config)]
    assert list(comments) == names
    assert all(len(comments[name]) > 5 and sections[name] for name in names)
    parser = Parser(prog="x", allow_abbrev=False)
    add_field_flags(parser)
    helps = {action.dest: action for action in parser._actions}
    shown = parser.format_help()
    for name in names:
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
    with torch.device("meta"):                     # shapes alone, no memory
        net = model.UNet()
        published = {name: torch.empty(shape) for name, shape in adm_shapes().items()}
    own = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    assert own == adm_shapes()
    assert len(own) == 304
    assert sum(p.numel() for p in net.parameters()) == 153_099_524
    net.load_state_dict(published, strict=True, assign=True)
    published.pop("out.2.bias")
    with pytest.raises(RuntimeError, match="out.2.bias"):
        net.load_state_dict(published, strict=True, assign=True)
    # GroupNorm of 32 groups everywhere, eps 1e-5
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-5)}


@SHAPES
def test_a_state_dict_loads_strictly_and_gives_the_same_answer(shape):
    cfg = small(shape)
    one = shaken(model.velocity_network(cfg, shape), 1)
    two = model.velocity_network(cfg, shape)
    z, t = normal(shape, dtype=torch.float32), times(dtype=torch.float32)
    assert not torch.equal(one(z, t), two(z, t))
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(z, t), two(z, t))


def reference_time(t, dim, scale=1.0):
    """Cosines, then sines, of scale t 10000^(-k / half), number by number."""
    half = dim // 2
    return torch.tensor([[wave(scale * x * 10000 ** (-k / half))
                          for wave in (math.cos, math.sin) for k in range(half)]
                         for x in t.tolist()])


@pytest.mark.parametrize("dim, scale", [(256, 1.0), (32, 10.0), (8, 1000.0)])
def test_time_features_have_cosines_first(dim, scale):
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    found = model.time_features(t, dim, scale)
    torch.testing.assert_close(found, reference_time(t, dim, scale), rtol=0, atol=2e-4)
    assert found[0].tolist() == [1.0] * (dim // 2) + [0.0] * (dim // 2)


def reference_norm(w, name, x):
    return F.group_norm(x, 32, w[name + ".weight"], w[name + ".bias"], 1e-5)


def reference_conv(w, name, x, **how):
    return F.conv2d(x, w[name + ".weight"], w[name + ".bias"], **how)


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


@pytest.mark.parametrize("ch, out", [(128, 128), (128, 256)])
def test_residual_block_scales_first_and_shifts_second(ch, out):
    block = shaken(model.ResBlock(ch, 64, out), 0, 0.2)
    x, emb = normal((ch, 4, 4), 2, dtype=torch.float32), normal((64,), 2, dtype=torch.float32)
    expected = reference_res({"r." + k: v for k, v in block.state_dict().items()}, "r", x, emb)
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_splits_heads_before_queries_keys_and_values(heads):
    layer = shaken(model.Attention(128, heads), 0, 0.2)
    x = normal((128, 3, 5), 2, dtype=torch.float32)
    w = {"a." + k: v for k, v in layer.state_dict().items()}
    torch.testing.assert_close(layer(x, None), reference_attention(w, "a", x, heads),
                               rtol=1e-3, atol=1e-3)
    if heads > 1:                                  # the order matters: another one is no answer
        assert (layer(x, None) - reference_attention(w, "a", x, 1)).abs().max() > 0.1


def test_a_whole_unet_equals_a_functional_reference():
    heads, scale = 4, 7.0
    net = shaken(model.UNet(4, 128, (1, 2), 1, (1,), heads, scale), 0, 0.03)
    w = net.state_dict()
    z, t = normal(LATENTS, 3, dtype=torch.float32), torch.tensor([0.0, 0.4, 1.0])

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
    for i, kept in enumerate((d, c)):
        h = reference_res(w, f"output_blocks.{i}.0", torch.cat([h, kept], 1), emb)
        h = reference_attention(w, f"output_blocks.{i}.1", h, heads)
    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = reference_conv(w, "output_blocks.1.2.conv", h, padding=1)
    for i, kept in ((2, b), (3, a)):
        h = reference_res(w, f"output_blocks.{i}.0", torch.cat([h, kept], 1), emb)
    h = reference_conv(w, "out.2", F.silu(reference_norm(w, "out.0", h)), padding=1)
    assert h.std() > 0.05
    torch.testing.assert_close(net(z, t), h, rtol=1e-3, atol=1e-3 * h.std().item())


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
    with pytest.raises(ValueError, match="divide by 4"):
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
    # 0.15 away in each coordinate; centres are 1.53 apart, so hardly any are confused
    assert gaps.square().mean().item() == pytest.approx(2 * 0.15**2, rel=0.03)
    share = torch.bincount(nearest, minlength=8) / n
    assert ((share - 1 / 8).abs() < 5 * math.sqrt(7 / 64 / n)).all()


def test_an_unknown_density_is_refused_in_words():
    with pytest.raises(UserError, match="no 2D data set 'circle'"):
        data.sample_points("circle", 5)


def test_images_are_given_out_between_minus_one_and_one():
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
    # neither blocks, nor seeds, nor streams repeat one another
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
    """A velocity that treats every sample alone, element by element."""
    return (z - 0.5).tanh() + z * across(t, z)


@SHAPES
@pytest.mark.parametrize("solver, nfe", [("euler", 3), ("heun", 3), ("stochastic", 3)])
def test_samples_do_not_depend_on_the_batch_size(shape, solver, nfe):
    whole = sample.draw(bent, shape, 600, nfe, seed=5, solver=solver, batch=600)
    assert whole.shape == (600, *shape) and whole.std() > 0.1
    for batch in (1000, 256, 97):
        # vectorised tanh rounds the ends of an array in another way than its middle
        torch.testing.assert_close(sample.draw(bent, shape, 600, nfe, 5, solver, batch), whole,
                                   rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sample.draw(bent, shape, 40, nfe, 5, solver), whole[:40],
                               rtol=1e-5, atol=1e-6)
    assert not torch.allclose(sample.draw(bent, shape, 40, nfe, 6, solver), whole[:40])


@SHAPES
def test_every_nfe_and_solver_starts_from_the_same_noise(shape):
    z1 = sample.noise(shape, 300, seed=2)
    for solver, nfe in (("euler", 1), ("euler", 8), ("heun", 5), ("stochastic", 4)):
        calls = []
        sample.draw(counted(bent, calls), shape, 300, nfe, seed=2, solver=solver, batch=128)
        assert len(calls) == 3 * nfe
        starts = torch.cat([calls[k * nfe][0] for k in range(3)])
        assert torch.equal(starts, z1)


def test_stochastic_sampling_takes_noise_that_is_new_at_every_step():
    # a model that predicts 0 leaves t times the fresh noise, which the calls then show
    calls = []

    def field(z, t, y=None):
        return z / across(t, z)

    sample.draw(counted(field, calls), (2,), 256, 4, seed=0, solver="stochastic")
    seen = torch.stack([(z / across(t, z)).flatten() for z, t, _ in calls])
    assert (torch.corrcoef(seen) - torch.eye(4)).abs().max() < 5 / math.sqrt(512)
    torch.testing.assert_close(seen.std(1), torch.ones(4), rtol=0, atol=5 / math.sqrt(2 * 512))


# ---------------------------------------------------------------------------------------- metrics


def whitened(n, d, seed=0):
    """n points whose sample mean is 0 and whose sample covariance is the identity, exactly."""
    x = normal((d,), n, seed)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T


@pytest.mark.parametrize("d", [2, 5])
def test_sliced_w2_of_a_shift_and_of_a_scaling(d):
    a = normal((d,), 400, dtype=torch.float32)
    shift = torch.arange(1.0, d + 1)
    assert evaluate.sliced_w2(a, a) == 0
    # all points move by <w, shift>, whose mean square over directions is |shift|^2 / d
    found = evaluate.sliced_w2(a, a + shift, directions=10_000)
    assert found == pytest.approx(shift.norm().item() / math.sqrt(d), rel=0.03)
    # order within a cloud is no distance, nor is the side from which one looks
    turned = (a + shift)[torch.randperm(400, generator=gen())]
    assert evaluate.sliced_w2(a, turned) == pytest.approx(evaluate.sliced_w2(a, a + shift))
    assert evaluate.sliced_w2(turned, a) == pytest.approx(evaluate.sliced_w2(a, turned))
    # scaling by c moves each projection by (c - 1) times itself
    found = evaluate.sliced_w2(a, 3 * a, directions=10_000)
    assert found == pytest.approx(2 * a.square().sum(1).mean().sqrt().item() / math.sqrt(d),
                                  rel=0.03)
    with pytest.raises(ValueError, match="one shape"):
        evaluate.sliced_w2(a, a[:-1])


def test_frechet_distance_of_diagonal_gaussians():
    d = 6
    a, b = whitened(300, d), whitened(200, d, seed=1)
    sa, sb = torch.linspace(0.1, 2, d).double(), torch.linspace(3, 0.5, d).double()
    ma, mb = torch.arange(d).double(), torch.ones(d).double()
    wanted = ((ma - mb) ** 2 + (sa - sb) ** 2).sum().item()
    found = evaluate.frechet_distance(a * sa + ma, b * sb + mb)
    assert found == pytest.approx(wanted, rel=1e-9)
    assert abs(evaluate.frechet_distance(a, a)) < 1e-9
    with pytest.raises(ValueError, match="two samples"):
        evaluate.frechet_distance(a[:1], b)


@pytest.mark.parametrize("d", [3, 64])
def test_frechet_distance_equals_scipys(d):
    mix = normal((d,), d, seed=2) / math.sqrt(d)
    a, b = normal((d,), 500), normal((d,), 400, seed=1) @ mix + 0.3
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    gap = a.mean(0).numpy() - b.mean(0).numpy()
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    wanted = gap @ gap + np.trace(cov_a + cov_b - 2 * root)
    assert evaluate.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert evaluate.frechet_distance(b, a) == pytest.approx(wanted, rel=1e-6)


def test_frechet_distance_takes_features_that_are_always_zero():
    # ReLU features may never fire; the root of the covariance must not turn that into nan
    a, b = whitened(100, 3), whitened(100, 3, seed=1)
    a, b = (torch.cat([x, torch.zeros(100, 2)], 1) for x in (2 * a, b))
    assert evaluate.frechet_distance(a, b) == pytest.approx(3.0, rel=1e-6)


def test_spread_is_the_root_of_the_mean_variance():
    x = whitened(500, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 7
    std = evaluate.Spread(x).std
    assert std == pytest.approx(math.sqrt((1 + 4 + 9 + 16) / 4))
    assert evaluate.Spread(x.view(500, 1, 2, 2)).std == pytest.approx(std)
    assert evaluate.Spread(*(3 * x).split(70)).std == pytest.approx(3 * std)
