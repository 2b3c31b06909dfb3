"""Pretrains the teacher phi by flow matching (Eq. 1): `python teacher.py --dataset mnist`.

train.py does this by itself if the run has no teacher yet.
"""

import torch
from torch.optim import AdamW

from data import Draws
from harness import UserError, checkpoint, machine
from harness.run import Run
from harness.script import command, parse_config, run_script
from losses import flow_matching_loss, interpolate
from model import copy_of, ema_update, set_rates, velocity_network, with_nulls


def train_teacher(run):
    """Pretrains cfg.teacher_steps iterations; writes the EMA as teacher.pt and returns the path."""
    cfg, dataset = run.cfg, run.dataset
    torch.manual_seed(cfg.seed)
    teacher = velocity_network(cfg, dataset.shape)
    ema = machine.prepare(copy_of(teacher), cfg, run.device)
    teacher = machine.share(machine.prepare(teacher, cfg, run.device))
    opt = AdamW(teacher.parameters(), lr=cfg.teacher_lr, weight_decay=0.0, fused=True)

    # all random draws of an iteration come from its own seed, so that a resumed run needs the
    # step's number, the weights and the optimiser, and nothing else
    draws = Draws(cfg.seed, device=run.device)
    states = dict(teacher=teacher, ema=ema, opt=opt)
    with run.loop("teacher", states, ("fm", "grad_norm")) as steps:
        for step in steps:
            draws.at(step)
            set_rates(cfg, step, cfg.teacher_steps, (opt, cfg.teacher_lr),
                      final=cfg.teacher_lr_final)

            # data, noise and time make zt; the teacher learns the velocity at zt
            z0, y = dataset.batch(cfg.teacher_batch_size // machine.WORLD, draws)
            z1 = draws.normal(*z0.shape)                                   # (B, ...)
            t = draws.uniform(len(z0))                                     # (B,)
            if y is not None:                      # Eq. 3 needs the null condition, too
                y = with_nulls(y, draws.uniform(len(y)) < cfg.p_null, cfg.num_classes)
            loss = flow_matching_loss(teacher(interpolate(z0, z1, t), t, y), z0, z1)
            loss.backward()
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in teacher.parameters()])
            opt.step()
            opt.zero_grad()

            # ramp the decay up, so that the average does not keep the random initial weights
            ema_update(ema, teacher, min(cfg.teacher_ema, (1 + step) / (10 + step)))
            run.log(fm=loss, grad_norm=grad_norm)
    return run.finish("teacher", ema)


def find_or_train(run):
    """The path of the run's teacher.pt; trains it if no teacher of the same settings exists."""
    path = run.find_teacher()
    machine.wait()                                 # all have looked before one of them writes
    return train_teacher(run) if path is None else run.adopted(path)


def load_teacher(path, cfg, shape):
    """The frozen network of a teacher.pt, or of the student.pt of a 2-RF, on the CPU."""
    network = velocity_network(cfg, shape)
    checkpoint.load_weights(network, checkpoint.load(path, ("teacher", "student"))["ema"], path)
    return copy_of(network)


def main(argv=None):
    cfg, given = parse_config(__doc__, argv)
    with Run(cfg, given) as run:
        if cfg.resume and not run.resume_file("teacher").exists():
            raise UserError(f"{run.folder} has no teacher_resume.pt, so its teacher cannot be "
                            "continued; use --resume in the folder where it was trained")
        path = train_teacher(run) if cfg.resume else find_or_train(run)
        pictures = run.pictures("teacher")
    if machine.FIRST:
        print(f"teacher: {path}   pictures: {', '.join(map(str, pictures))}   "
              f"next: {command('train.py')} with the same flags distils it")


if __name__ == "__main__":
    run_script(main)
