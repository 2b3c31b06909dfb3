"""Distils a teacher into a few-step student by SCFlow's Algorithm 1: `python train.py`.

phi is the teacher, theta the student, theta~ the moving average of theta that CD and BI aim at. A
second, slower average is the one that is sampled from. Where there is no teacher, one is trained.
"""

import time
from dataclasses import fields
from types import SimpleNamespace

import torch
from torch.optim import AdamW

import baselines
import checkpoint
import data
import parallel
import plots
import sample
from config import (CIRCUMSTANCES, Config, UserError, parse_config, run_dir, run_script,
                    teacher_fields)
from losses import (bidirectional_loss, consistency_loss, discriminator_loss, expand,
                    generator_loss, interpolate, r1_penalty, reflow_loss, time_skip,
                    z0_prediction, z0_predictions)
from model import choose_device, copy_of, discriminator, ema_update, prepare
from teacher import find_or_train, load_teacher, set_rates


def losses_in_use(cfg, step):
    """The losses of iteration `step`: those of cfg.losses whose warm-up is over (iter >= N)."""
    first = {"cd": 0, "gan": cfg.n_gan, "rf": cfg.n_rf, "bi": cfg.n_bi}
    return {name for name in cfg.losses if step >= first[name]}


def scflow_step(net, z0, y, step, cfg, draws):
    """One iteration of Algorithm 1: steps D, then theta, moves theta~; returns the logged terms.

    net holds teacher, student, target (theta~), ema, disc and the optimisers opt, opt_disc.
    z0 is data (B, ...), y labels (B,) or None, draws the random numbers of this iteration.
    Networks see 3B student, 2B EMA and B teacher samples.
    """
    use, terms = losses_in_use(cfg, step), {}

    # noise, time, and how far the teacher steps down and up from zt (Algorithm 2)
    z1 = draws.normal(*z0.shape)                                           # (B, ...)
    t = draws.uniform(len(z0))                                             # (B,)
    d_s, d_k = time_skip(t, draws.uniform(len(t)), draws.uniform(len(t)), cfg.t_skip)
    zt = interpolate(z0, z1, t)

    # one velocity of the teacher serves both steps (Eq. 6); theta~ predicts from where they land
    with torch.no_grad():
        v = net.teacher(zt, t, y)
        lo = zt - expand(d_s, zt) * v, t - d_s
        hi = zt + expand(d_k, zt) * v, t + d_k
        f_lo, *f_hi = z0_predictions(net.target, [lo, hi] if "bi" in use else [lo], y)

    # f(zt, t) serves CD and BI, the one-step sample x1 = f(z1, 1) serves GAN and RF; f_hi and x1
    # are lists of one, or empty where no loss needs them
    here, noise = (zt, t), (z1, torch.ones_like(t))
    f_t, *x1 = z0_predictions(net.student, [here, noise] if use & {"gan", "rf"} else [here], y)

    # the discriminator steps first; R1 differentiates by a leaf of its own, so nothing leaks
    if "gan" in use:
        real = z0.detach().clone().requires_grad_(cfg.r1 > 0)
        d_real, d_fake = net.disc(real, y), net.disc(x1[0].detach(), y)
        loss_d = discriminator_loss(d_real, d_fake)
        terms |= {"disc": loss_d, "d_real": d_real.mean(), "d_fake": d_fake.mean()}
        if cfg.r1 > 0:
            terms["r1"] = r1_penalty(d_real, real)
            loss_d = loss_d + cfg.r1 / 2 * terms["r1"]
        loss_d.backward()
        net.opt_disc.step()
        net.opt_disc.zero_grad()

    # L = L_CD + l_GAN L_GAN + l_RF L_RF + l_BI L_BI
    metric = cfg.metric, cfg.huber_c
    loss = terms["cd"] = consistency_loss(f_t, f_lo, z0, t, lo[1], cfg.t_trunc, cfg.truncation,
                                          *metric)
    if "gan" in use:
        terms["gan"] = generator_loss(net.disc(x1[0], y))
        loss = loss + cfg.l_gan * terms["gan"]
    if "rf" in use:
        zr = interpolate(x1[0].detach(), z1, t)
        terms["rf"] = reflow_loss(z0_prediction(net.student, zr, t, y), x1[0])
        loss = loss + cfg.l_rf * terms["rf"]
    if "bi" in use:
        terms["bi"] = bidirectional_loss(f_t, f_hi[0], *metric)
        loss = loss + cfg.l_bi * terms["bi"]

    # step theta (D takes no gradient here), then theta~ <- mu theta~ + (1 - mu) theta
    theta = list(net.student.parameters())
    loss.backward(inputs=theta)
    terms["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in theta])
    net.opt.step()
    net.opt.zero_grad()
    ema_update(net.target, net.student, cfg.mu)
    ema_update(net.ema, net.student, cfg.ema)
    return terms


def begin(teacher, cfg, shape, device):
    """All networks and optimisers of a run: theta, theta~ and the EMA start as the teacher phi."""
    def own():
        return copy_of(teacher).requires_grad_(True).train()

    disc = own() if cfg.method == "fgm" else discriminator(cfg, shape)   # fgm: its online flow
    net = SimpleNamespace(teacher=teacher, student=own(), target=copy_of(teacher),
                          ema=copy_of(teacher), disc=disc)
    for network in vars(net).values():
        prepare(network, cfg, device)
    net.student, net.disc = parallel.share(net.student), parallel.share(net.disc)
    net.opt = AdamW(net.student.parameters(), cfg.lr, cfg.betas, weight_decay=0.0, fused=True)
    net.opt_disc = AdamW(net.disc.parameters(), cfg.disc_lr, cfg.disc_betas, weight_decay=0.0,
                         fused=True)
    return net


TERMS = ("cd", "gan", "rf", "bi", "disc", "d_real", "d_fake", "r1", "grad_norm")
STATES = ("student", "target", "ema", "disc", "opt", "opt_disc")


def train(cfg):
    """Distils cfg.steps iterations in the run's folder; returns the path of student.pt."""
    folder = checkpoint.make_folder(run_dir(cfg))
    if finished(cfg, folder):
        return folder / "student.pt"
    teacher_path = find_or_train(cfg)
    device = choose_device(cfg)
    dataset = data.load(cfg, device)

    torch.manual_seed(cfg.seed)
    teacher = load_teacher(teacher_path, cfg, dataset.shape, getattr(dataset, "key", ""))
    net = begin(teacher, cfg, dataset.shape, device)

    # all random draws of an iteration come from its own seed, so a step number is all that a
    # resumed run needs besides the weights and the optimisers
    draws, start, spent = data.Draws(cfg.seed, stream=1, device=device), 0, 0.0
    states = {name: parallel.own(getattr(net, name)) for name in STATES}
    if cfg.resume and (folder / "student_resume.pt").exists():
        state = checkpoint.load(folder / "student_resume.pt", "student resume", device)
        for name, part in states.items():
            part.load_state_dict(state[name])
        start, spent = state["step"], state.get("seconds", 0.0)
        del state
    begun = time.perf_counter() - spent

    def save(step):
        checkpoint.save(folder / "student_resume.pt", "student resume", cfg, dataset.shape, step,
                        seconds=time.perf_counter() - begun,
                        **{name: part.state_dict() for name, part in states.items()})

    save(start)
    if start == 0 and parallel.FIRST:
        (folder / "log.csv").unlink(missing_ok=True)   # of an older run
    iteration, batch, first, terms = scflow_step, dataset.batch, 0, TERMS
    if cfg.method in baselines.STEPS:
        iteration, terms = baselines.STEPS[cfg.method]
        try:
            batch, first = baselines.prepare(net, cfg, dataset, folder, start, train)
        except KeyboardInterrupt as e:
            save(start)                            # the seconds that were spent count
            raise checkpoint.Interrupted(folder, cfg, start, cfg.steps) from e
    start = max(start, first)

    log = checkpoint.Log(folder / "log.csv", terms, cfg.log_every, start, cfg.steps,
                         cfg.batch_size, "student")
    with checkpoint.Interrupt() as interrupt, log:
        for step in range(start, cfg.steps):
            draws.at(step)
            set_rates(cfg, step - first, cfg.steps - first,
                      (net.opt, cfg.lr), (net.opt_disc, cfg.disc_lr))
            z0, y = batch(cfg.batch_size // parallel.WORLD, draws)
            log.add(**iteration(net, z0, y, step, cfg, draws))

            done = step + 1
            stop = interrupt.now(done, cfg.log_every, device)
            if done % cfg.save_every == 0 or done == cfg.steps or stop:
                log.fetch()                        # so a loss that is not finite is never saved
                save(done)
            if stop and done < cfg.steps:
                raise checkpoint.Interrupted(folder, cfg, done, cfg.steps)
            if done % cfg.preview_every == 0 and parallel.FIRST:
                sample.strips(folder / f"preview_{done:06d}.png", [("student", net.ema, None)],
                              dataset.shape, (1, 4), device=device, decode=dataset.decode,
                              title=f"the student's EMA after {done} iterations")
        seconds = time.perf_counter() - begun

    checkpoint.save(folder / "student.pt", "student", cfg, dataset.shape, cfg.steps,
                    ema=net.ema.state_dict(), seconds=seconds)
    if not parallel.FIRST:
        return folder / "student.pt"
    plots.losses(folder / "losses.png", log.curves(), f"{cfg.method} on {cfg.dataset}")
    points = len(dataset.shape) == 1
    few, many = ((1, 2, 4, 8, 16),) * 2 if points else ((1, 2, 4, 8), (1, 2, 4, 8, 50))
    networks = [("teacher", net.teacher, many), ("student", net.ema, few)]
    shown = min(4000 if points else 10, dataset.size or 4000)
    real = dataset.batch(shown, data.Draws(cfg.seed, stream=1, device=device, rank=0, world=1))[0]
    sample.strips(folder / "samples.png", networks, dataset.shape, few, device=device,
                  data=real.cpu(), decode=dataset.decode)
    return folder / "student.pt"


# ------------------------------------------------------------------------ what may be overwritten


def finished(cfg, folder):
    """Whether the folder's student is this very run, finished; UserError where it is another."""
    student, state = folder / "student.pt", folder / "student_resume.pt"
    if cfg.overwrite:
        return False
    if cfg.resume:
        return state.exists() and checkpoint.load(state, "student resume")["step"] >= cfg.steps \
            and student.exists()
    ways = "--resume continues it, --overwrite starts anew, another --out keeps both"
    if student.exists():
        there = checkpoint.config_of(checkpoint.load(student, "student"))
        if clash := checkpoint.differences(cfg, there, what_counts(cfg)):
            raise UserError(f"{student} was trained with other settings: {clash}; {ways}")
        return True
    if state.exists():
        at = checkpoint.load(state, "student resume")["step"]
        raise UserError(f"{folder} holds an unfinished student at step {at}; {ways}")
    return False


def what_counts(cfg):
    """The settings that make a run what it is: two runs that share them are the same."""
    names = dict.fromkeys([f.name for f in fields(Config) if f.name not in CIRCUMSTANCES])
    unused = () if "reflow" in cfg.method else ("pairs", "pair_steps")
    return [n for n in [*names, *teacher_fields(cfg)] if n not in unused]


def main(argv=None):
    cfg, given = parse_config(__doc__.splitlines()[0], argv)
    if cfg.resume:
        cfg = checkpoint.resumed(cfg, given, run_dir(cfg))
    elif cfg.teacher_checkpoint:
        there = checkpoint.config_of(checkpoint.load(cfg.teacher_checkpoint, "teacher"))
        cfg = checkpoint.same_architecture(cfg, given, there, cfg.teacher_checkpoint)
    parallel.start(choose_device(cfg))
    known = finished(cfg, run_dir(cfg))
    path = train(cfg)
    folder = path.parent
    if not parallel.FIRST:
        return
    what = "already finished" if known else "wrote"
    print(f"{what}: {path}   pictures: {folder / 'samples.png'}, {folder / 'losses.png'}   "
          f"next: python sample.py --checkpoint {path} --nfe 4")


if __name__ == "__main__":
    run_script(main)
