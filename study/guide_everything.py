"""What if not only the teacher is guided? `python -m study.guide_everything`.

SCFlow guides the teacher alone. Here the same student is trained three times: as in SCFlow; with
theta~ guided, too; and with theta~ and the student guided. Consistency copies the answer of theta~
from one time to the next, so a guided theta~ applies w again in every copy.
"""

from itertools import product

import torch
from tqdm import trange

import data
import evaluate
import sample
import train
from config import CAPTION_SETS, CLASSES, Config, make_config
from data import Draws
from harness import UserError
from harness.run import Run
from harness.script import given_flags, make_parser, run_script
from model import Guided, set_rates
from study.ablation import CHOSEN
from teacher import find_or_train, load_teacher

GUIDED = {"teacher alone": (), "teacher, theta~": ("target",),
          "teacher, theta~, theta": ("target", "student")}


def distil(cfg, phi, dataset, device, guide):
    """The EMA of a student that train.scflow_step trains with the networks `guide` guided, too."""
    torch.manual_seed(cfg.seed)
    teacher = load_teacher(phi, cfg, dataset.shape)
    net = train.begin(teacher, teacher, cfg, dataset.shape, device)
    for name in guide:
        setattr(net, name, Guided(getattr(net, name), cfg.guidance))
    draws = Draws(cfg.seed, stream=1, device=device)
    for step in trange(cfg.steps, desc=" ".join(("guided: teacher", *guide))):
        draws.at(step)
        set_rates(cfg, step, cfg.steps, (net.opt, cfg.lr), (net.opt_disc, cfg.disc_lr))
        train.scflow_step(net, dataset.batch(cfg.batch_size, draws), step, cfg, draws)
    return net.ema


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", default="8gaussians", help="[%(default)s]",
                        choices=[*CLASSES, *CAPTION_SETS, "folder"])
    names = [name for name in Config.__dataclass_fields__ if name not in CHOSEN]
    args = evaluate.parse(parser, argv, names, "measure with so many seeds of the noise [1]",
                          "runs/guide-everything/evaluation")
    given = given_flags(args, names)
    condition = "text" if args.dataset in CAPTION_SETS else "class"
    cfg = make_config(args.dataset, **{"condition": condition, "guidance": 1.5} | given,
                      seed=args.seed, out="runs/guide-everything")
    with Run(cfg, go_on=True) as run:
        phi, dataset, device, folder = find_or_train(run), run.dataset, run.device, run.folder
        cfg = run.cfg

    rows, networks, w = [], [], cfg.guidance
    shape = data.sample_shape(cfg)
    for name, guide in GUIDED.items():
        ema = distil(cfg, phi, dataset, device, guide)
        networks.append((name, ema, None))
    networks.append(("the same, sampled guided, 2 calls per step", Guided(ema, w), None))
    reference, settings, _ = evaluate.prepare(cfg, shape, device, args.n, args.solver,
                                              args.features, args.batch)
    lost = []                                      # samples that fly apart have no distance
    seeds = range(args.seed, args.seed + args.seeds)
    for (name, network, _), nfe, seed in product(networks, args.nfe, seeds):
        try:
            rows += evaluate.measure(name, network, [nfe], reference, seed=seed, **settings)
        except UserError as e:
            lost.append(str(e).split(";")[0])
    if not rows:
        raise UserError(f"no samples could be measured: {lost[0]}; try a lower --lr")
    evaluate.write(args.out or folder / "evaluation", cfg.dataset, reference, rows, "\n\n".join([
        f"guided with w = {w:g} in training: "
        + evaluate.report(cfg.dataset, reference, rows, args.solver), *lost]), lost=lost)
    picture = sample.strips(folder / "samples.png", networks, shape, (1, 2, 4), args.seed, device,
                            decode=settings["decode"], conditions=sample.conditions_of(cfg),
                            title=f"{cfg.dataset}, w = {w:g}: what is guided in training")
    print(f"wrote {picture}")


if __name__ == "__main__":
    run_script(main)
