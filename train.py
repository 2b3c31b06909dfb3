"""Distils a teacher into a few-step student by SCFlow's Algorithm 1: `python train.py`.

phi is the teacher, theta the student, and theta~ the moving average of theta that CD and BI aim at.
It moves more slowly than theta, so the goals are steadier. Samples are drawn from a second average,
slower still. If there is no teacher yet, it is trained.
"""

from functools import partial
from types import SimpleNamespace

import torch
from torch.optim import AdamW

from data import Draws
from harness import machine, plan
from harness.hub import package
from harness.run import Run
from harness.script import command, parse_config, run_script
from losses import (bidirectional_loss, consistency_loss, discriminator_loss, expand,
                    generator_loss, interpolate, r1_penalty, reflow_loss, time_skip,
                    z0_prediction, z0_predictions)
from model import Guided, copy_of, discriminator, ema_update, flow_map, set_rates
from study import baselines
from teacher import find_or_train, load_teacher


def losses_in_use(cfg, step):
    """The losses of iteration `step`, counted from 0: those whose warm-up N is over (step >= N)."""
    starts = {"cd": 0, "gan": cfg.n_gan, "rf": cfg.n_rf, "bi": cfg.n_bi}
    return {name for name in cfg.losses if step >= starts[name]}


def scflow_step(net, batch, step, cfg, draws):
    """One iteration of Algorithm 1: updates D, theta, theta~. Returns the terms for the log.

    net comes from `begin`; batch is (z0, y), data (B, ...) and labels, words or None; draws are the
    iteration's random numbers. The student sees 3B samples, theta~ 2B, the teacher B.
    """
    z0, y = batch
    use = losses_in_use(cfg, step)

    # noise, time, and how far the teacher steps down and up from zt (Algorithm 2)
    z1 = draws.normal(*z0.shape)                                           # (B, ...)
    t = draws.uniform(len(z0))                                             # (B,)
    d_s, d_k = time_skip(t, draws.uniform(len(t)), draws.uniform(len(t)), cfg.t_skip)
    zt = interpolate(z0, z1, t)

    # one velocity of the teacher gives both steps (Eq. 6); theta~ predicts z0 from both ends
    with torch.no_grad():
        v = net.teacher(zt, t, y)
        lo = zt - expand(d_s, zt) * v, t - d_s
        hi = zt + expand(d_k, zt) * v, t + d_k
        f_lo, f_hi = z0_predictions(net.target, [lo, hi if "bi" in use else None], y)

    # CD and BI need f(zt, t); GAN and RF need the one-step sample x1 = f(z1, 1)
    one_step = (z1, torch.ones_like(t)) if use & {"gan", "rf"} else None
    f_t, x1 = z0_predictions(net.student, [(zt, t), one_step], y)
    terms = disc_step(net, z0, x1, y, cfg) if "gan" in use else {}

    # L = L_CD + l_GAN L_GAN + l_RF L_RF + l_BI L_BI
    loss = terms["cd"] = ("cd" in use) * consistency_loss(f_t, f_lo, z0, t, t - d_s, cfg.t_trunc,
                                                          cfg.truncation, cfg.metric, cfg.huber_c)
    if "gan" in use:
        terms["gan"] = generator_loss(net.disc(x1, y))
        loss = loss + cfg.l_gan * terms["gan"]
    if "rf" in use:
        zr = interpolate(x1.detach(), z1, t)
        terms["rf"] = reflow_loss(z0_prediction(net.student, zr, t, y), x1, cfg.rf_x1 == "free")
        loss = loss + cfg.l_rf * terms["rf"]
    if "bi" in use:
        terms["bi"] = bidirectional_loss(f_t, f_hi, cfg.metric, cfg.huber_c)
        loss = loss + cfg.l_bi * terms["bi"]

    # step theta (inputs=theta leaves no gradient in D), then theta~ <- mu theta~ + (1 - mu) theta
    theta = [p for p in net.student.parameters() if p.requires_grad]
    loss.backward(inputs=theta)
    terms["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in theta])
    net.opt.step()
    net.opt.zero_grad()
    ema_update(net.target, net.student, cfg.mu)
    ema_update(net.ema, net.student, cfg.ema)
    return terms


def disc_step(net, z0, x1, y, cfg):
    """Updates the discriminator by data z0 and one-step samples x1. Returns terms for the log."""
    # R1 needs the gradient with respect to D's input, so D gets its own copy of z0
    real = z0.detach().clone().requires_grad_(cfg.r1 > 0)
    d_real, d_fake = net.disc(real, y), net.disc(x1.detach(), y)
    loss = discriminator_loss(d_real, d_fake)
    terms = {"disc": loss, "d_real": d_real.mean(), "d_fake": d_fake.mean()}
    if cfg.r1 > 0:
        terms["r1"] = r1_penalty(d_real, real)
        loss = loss + cfg.r1 / 2 * terms["r1"]
    loss.backward(inputs=list(net.disc.parameters()))
    terms["grad_norm_d"] = torch.nn.utils.get_total_norm([p.grad for p in net.disc.parameters()])
    net.opt_disc.step()
    net.opt_disc.zero_grad()
    return terms


def begin(teacher, start, cfg, shape, device):
    """All networks and optimisers of a run: teacher, student, target (theta~), ema, disc, opt,
    opt_disc. theta, theta~ and the EMA are copies of `start`.

    `start` is the teacher phi, except in the second stage of reflow-distill: there it is the 2-RF,
    the teacher after training on pairs of noise and its sample.
    """
    def trained(network):
        return copy_of(network).requires_grad_(True).train()

    start = flow_map(start) if cfg.method == "flowmap" else start
    # FGM has no discriminator. Its online flow, a copy of the teacher, is stored as net.disc
    disc = trained(teacher) if cfg.method == "fgm" else discriminator(cfg, shape)
    net = SimpleNamespace(teacher=teacher, student=trained(start), target=copy_of(start),
                          ema=copy_of(start), disc=disc)
    for network in vars(net).values():
        machine.prepare(network, cfg, device, distilled=network is not teacher)
    net.teacher = Guided(teacher, cfg.guidance)    # the teacher alone is guided (Eq. 3)
    if getattr(net.student, "text", None):
        net.student.text.requires_grad_(False)     # the text encoder stays the teacher's
    machine.save_memory(net, cfg)
    net.student, net.disc = machine.share(net.student), machine.share(net.disc)
    adam = package("bitsandbytes").optim.AdamW8bit if cfg.adam8bit else partial(AdamW, fused=True)
    net.opt = adam(net.student.parameters(), cfg.lr, cfg.betas, weight_decay=0.0)
    net.opt_disc = adam(net.disc.parameters(), cfg.disc_lr, cfg.disc_betas, weight_decay=0.0)
    return net


STATES = ("student", "target", "ema", "disc", "opt", "opt_disc")
TERMS = ("cd", "gan", "rf", "bi", "disc", "d_real", "d_fake", "r1", "grad_norm_d", "grad_norm")
STEPS = {"scflow": (scflow_step, TERMS), "cd": (scflow_step, TERMS), **baselines.STEPS}


def train(run):
    """Distils cfg.steps iterations; writes the EMA as student.pt and returns the path."""
    cfg, first_step = run.cfg, 0
    if run.finished():
        return run.path("student")
    teacher_path = start_path = find_or_train(run)
    late = set(cfg.losses) - losses_in_use(cfg, cfg.steps - 1)
    if late and machine.FIRST:
        print(f"not in use, since {cfg.steps} iterations end before they begin: "
              f"{' '.join(sorted(late))}")
    dataset, device = run.dataset, run.device
    run.discard_older()                            # all has been checked
    if cfg.method == "reflow-distill":             # first train a 2-RF, in a folder of its own
        first_step = max(1, cfg.steps * 5 // 6)    # the paper spends 50 of 60 epochs on it
        with run.stage("reflow", method="reflow", steps=first_step) as stage:
            start_path = train(stage)

    torch.manual_seed(cfg.seed)
    teacher = start = load_teacher(teacher_path, cfg, dataset.shape)
    if start_path != teacher_path:
        start = machine.prepare(load_teacher(start_path, cfg, dataset.shape), cfg, device)
    net = begin(teacher, start, cfg, dataset.shape, device)
    if "reflow" in cfg.method:                     # the second stage makes its pairs of new noise
        source, k = (net.teacher, 1) if start is teacher else (start, 2)
        seed = cfg.seed + k * baselines.PAIRS_SEED
        dataset = baselines.Pairs(run.folder, source, dataset, cfg, seed, device)

    draws = Draws(cfg.seed, stream=1, device=device)
    iteration, terms = STEPS[cfg.method]
    states = {name: getattr(net, name) for name in STATES}
    with run.loop("student", states, terms, first_step) as steps:
        for step in steps:
            draws.at(step)
            set_rates(cfg, step - first_step, cfg.steps - first_step,
                      (net.opt, cfg.lr), (net.opt_disc, cfg.disc_lr))
            batch = dataset.batch(cfg.batch_size // machine.WORLD, draws)
            run.log(**iteration(net, batch, step, cfg, draws))
    return run.finish("student", net.ema)


def main(argv=None):
    cfg, given = parse_config(__doc__, argv, plan=plan.ABOUT)
    only = given.pop("plan", False)
    with Run(cfg, given) as run:
        what = "already finished" if run.finished() else "wrote"
        if (only or what == "wrote") and plan.show(run, only, begin, scflow_step):
            return
        path = train(run)
        pictures = run.pictures("student")         # also those that an interrupted run did not draw
    if machine.FIRST:
        nfe = cfg.student_nfes(1, 4)[-1]
        print(f"{what}: {path}   pictures: {', '.join(map(str, pictures))}   "
              f"next: {command('sample.py')} --checkpoint {path} --nfe {nfe}")


if __name__ == "__main__":
    run_script(main)
