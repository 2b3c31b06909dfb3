"""Pretrains the teacher phi by flow matching (Eq. 1): `python teacher.py --dataset mnist`.

train.py calls this by itself where the run has no teacher yet.
"""

import math
from pathlib import Path

import torch
from torch.optim import AdamW

import checkpoint
import data
import parallel
import plots
import sample
from config import UserError, parse_config, run_dir, run_script, teacher_fields
from losses import flow_matching_loss, interpolate
from model import choose_device, copy_of, ema_update, prepare, velocity_network


def train_teacher(cfg):
    """Pretrains cfg.teacher_steps iterations; writes teacher.pt, the EMA, and returns its path."""
    device = choose_device(cfg)
    folder = checkpoint.make_folder(run_dir(cfg))
    dataset = data.load(cfg, device)

    torch.manual_seed(cfg.seed)
    teacher = velocity_network(cfg, dataset.shape)
    ema = prepare(copy_of(teacher), cfg, device)
    teacher = parallel.share(prepare(teacher, cfg, device))
    opt = AdamW(teacher.parameters(), lr=cfg.teacher_lr, weight_decay=0.0, fused=True)
    states = {"teacher": parallel.own(teacher), "ema": ema, "opt": opt}

    draws, start = data.Draws(cfg.seed, device=device), 0
    if cfg.resume and (folder / "teacher_resume.pt").exists():
        state = checkpoint.load(folder / "teacher_resume.pt", "teacher resume", device)
        for name, part in states.items():
            part.load_state_dict(state[name])
        start = state["step"]

    def save(step):
        log.fetch()                                # so a loss that is not finite is never saved
        checkpoint.save(folder / "teacher_resume.pt", "teacher resume", cfg, dataset.shape, step,
                        **{name: part.state_dict() for name, part in states.items()})

    log = checkpoint.Log(folder / "teacher_log.csv", ("fm", "grad_norm"), cfg.log_every, start,
                         cfg.teacher_steps, cfg.teacher_batch_size, "teacher")
    if cfg.overwrite and not cfg.resume:           # or --resume would take up the older student
        (folder / "student_resume.pt").unlink(missing_ok=True)
    with checkpoint.Interrupt() as interrupt, log:
        save(start)
        for step in range(start, cfg.teacher_steps):
            draws.at(step)
            set_rates(cfg, step, cfg.teacher_steps, (opt, cfg.teacher_lr))

            # data, noise and time make zt; the teacher learns its velocity there
            z0, y = dataset.batch(cfg.teacher_batch_size // parallel.WORLD, draws)
            z1 = draws.normal(*z0.shape)
            t = draws.uniform(len(z0))
            loss = flow_matching_loss(teacher(interpolate(z0, z1, t), t, y), z0, z1)
            loss.backward()
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in teacher.parameters()])
            opt.step()
            opt.zero_grad()
            # a young average forgets faster, or it would still remember the random start
            ema_update(ema, teacher, min(cfg.teacher_ema, (1 + step) / (10 + step)))
            log.add(fm=loss, grad_norm=grad_norm)

            done = step + 1
            stop = interrupt.now(done, cfg.log_every, device)
            if done % cfg.save_every == 0 or done == cfg.teacher_steps or stop:
                save(done)
            if stop and done < cfg.teacher_steps:
                raise checkpoint.Interrupted(folder, cfg, done, cfg.teacher_steps)
            if done % cfg.preview_every == 0 and parallel.FIRST:
                sample.strips(folder / f"teacher_preview_{done:06d}.png", [("teacher", ema, None)],
                              dataset.shape, (4, 16), device=device, decode=dataset.decode,
                              title=f"the teacher's EMA after {done} iterations")

    checkpoint.save(folder / "teacher.pt", "teacher", cfg, dataset.shape, cfg.teacher_steps,
                    ema=ema.state_dict(), **dataset_key(dataset))
    if parallel.FIRST:
        plots.losses(folder / "teacher_losses.png", log.curves(), f"teacher on {cfg.dataset}")
    return folder / "teacher.pt"


def find_or_train(cfg):
    """find_teacher, and where there is none, train_teacher; returns the path of teacher.pt."""
    path = find_teacher(cfg)
    parallel.wait()                                # before a process writes what others look for
    if path is None:
        return train_teacher(cfg)
    return adopt(path, run_dir(cfg) / "teacher.pt", cfg)


def find_teacher(cfg):
    """The path of the run's teacher.pt: the one named, or the one that is there; or None.

    A teacher of the same settings in the run's folder or in runs/<dataset> is reused; the run gets
    a copy, so that it is whole. Raises UserError where another one stands in the run's folder.
    """
    own, common = run_dir(cfg) / "teacher.pt", Path("runs") / cfg.dataset / "teacher.pt"
    if cfg.resume and own.exists() and own.with_name("student_resume.pt").exists():
        return own                                 # the student has begun from this one
    if cfg.teacher_checkpoint:
        return Path(cfg.teacher_checkpoint)
    for path in dict.fromkeys([own, common]):
        if not path.exists():
            continue
        there = checkpoint.config_of(checkpoint.load(path, "teacher"))
        clash = checkpoint.differences(cfg, there, teacher_fields(cfg))
        if not clash:
            return path
        if path == own and not cfg.overwrite:
            raise UserError(f"{own} was trained with other settings: {clash}; distil from it by "
                            f"--teacher-checkpoint {own}, replace it by --overwrite, or choose "
                            "another --out")
    if not (cfg.resume or cfg.overwrite or own.exists()) and state_path(own).exists():
        raise UserError(f"{own.parent} holds an unfinished teacher; --resume continues it, "
                        "--overwrite starts anew, another --out keeps both")
    return None


def state_path(teacher):
    """Where the resume state of a teacher.pt lies."""
    return teacher.with_name("teacher_resume.pt")


def adopt(path, own, cfg):
    """Copies a teacher into the run's folder, unless it is the one that lies there already."""
    if own.exists() and own.resolve() == path.resolve():
        return own
    content = checkpoint.load(path, "teacher")
    network_of(content, path, cfg, data.sample_shape(cfg))   # raises before the copy
    if own.exists() and not cfg.overwrite and not cfg.resume:
        there = checkpoint.config_of(checkpoint.load(own, "teacher"))
        if checkpoint.differences(there, checkpoint.config_of(content), teacher_fields(cfg)):
            raise UserError(f"{own} is another teacher than {path}; --overwrite replaces it, "
                            "another --out keeps both")
    checkpoint.make_folder(own.parent)
    checkpoint.save(own, "teacher", checkpoint.config_of(content), content["shape"],
                    content["step"], ema=content["ema"],
                    **{name: content[name] for name in ("data",) if name in content})
    return own


def dataset_key(dataset):
    """What a teacher of latents remembers of the file that holds them."""
    return {"data": dataset.key} if hasattr(dataset, "key") else {}


def load_teacher(path, cfg, shape, key=""):
    """The frozen teacher network of a teacher.pt; UserError where it does not fit the run.

    key tells the latents of the run. Those of other images or another autoencoder take another
    teacher, unless it was named by --teacher-checkpoint.
    """
    content = checkpoint.load(path, "teacher")
    if key and not cfg.teacher_checkpoint and content.get("data", key) != key:
        raise UserError(f"{path} was trained on the latents {content['data']}, not on {key}: the "
                        "images or the autoencoder have changed; delete it to train a new one, or "
                        f"distil from it all the same by --teacher-checkpoint {path}")
    return network_of(content, path, cfg, shape)


def network_of(content, path, cfg, shape):
    """load_teacher for a checkpoint that is read already."""
    trained_on = content["config"]["dataset"]
    if tuple(content["shape"]) != tuple(shape) or trained_on != cfg.dataset:
        raise UserError(f"{path} was trained on {trained_on}, samples of shape "
                        f"{tuple(content['shape'])}, and does not fit {cfg.dataset}; "
                        "name a teacher of this data set")
    teacher = velocity_network(cfg, shape)
    checkpoint.load_weights(teacher, content["ema"], path)
    return copy_of(teacher)


def set_rates(cfg, step, steps, *pairs):
    """Learning rates: up from zero in cfg.lr_warmup steps, down along a cosine to cfg.lr_final."""
    fall = cfg.lr_final + (1 - cfg.lr_final) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    for opt, lr in pairs:
        for group in opt.param_groups:
            group["lr"] = lr * fall * min(1.0, (step + 1) / max(cfg.lr_warmup, 1))


def main(argv=None):
    cfg, given = parse_config(__doc__.splitlines()[0], argv)
    parallel.start(choose_device(cfg))
    if cfg.resume:
        cfg = checkpoint.resumed(cfg, given, run_dir(cfg))
        if not state_path(run_dir(cfg) / "teacher.pt").exists():
            raise UserError(f"the teacher in {run_dir(cfg)} was made elsewhere, so there is no "
                            "state to resume it from; resume it in its own folder")
        path = train_teacher(cfg)
    else:
        path = find_or_train(cfg)
    if parallel.FIRST:
        print(f"teacher: {path}   pictures: {path.parent / 'teacher_losses.png'}   "
              f"next: python train.py --dataset {cfg.dataset} (distils it)")


if __name__ == "__main__":
    run_script(main)
