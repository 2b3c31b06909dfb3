"""Why few-step samples of a perfect consistency student are too large.

Let the data be N(0, 1). Everything is then known in closed form: zt has standard deviation s(t),
the teacher's path from z1 is z1 s(t), and it ends in z1. A *perfect* consistency student knows the
end of the path from every point of it, f(z, t) = z / s(t). Its one-step samples are exact. Yet the
more steps Euler takes with it, the larger the samples: std 1, 1.414, 1.662, 1.816, 1.904, ...
towards 2. So contrast that grows with the steps need not be a failure of training. Consistency
follows a curved path, and Euler follows straight lines; straight paths, which the reflow loss
makes, reconcile the two. This is our explanation, proved for Gaussian data only. The paper suspects
that the statistics of latents differ from those of pixels (docs/departures.md, note 5).
"""

import torch

import sample
from harness import pictures
from harness.pictures import COLOURS, plt
from harness.script import make_parser, run_script


def s(t):
    """Standard deviation of zt = (1 - t) z0 + t z1 for z0, z1 ~ N(0, 1)."""
    return ((1 - t) ** 2 + t**2) ** 0.5


def velocity(z, t, y=None):
    """The perfect consistency student's v, from f(z, t) = z - t v = z / s(t); z (B, 1), t (B,)."""
    t = t.double()[:, None]
    return (z - z / s(t)) / t


def path(nfe):
    """Euler's path from z1 = 1: lists of t and zt, from t = 1 to t = 0."""
    steps = sample.euler(velocity, torch.ones(1, 1, dtype=torch.float64), nfe)
    times, points = zip(*((t, z.item()) for t, z, _ in steps))
    return times, points


def std(nfe):
    """Standard deviation of the samples: Euler is linear in z1, so the path from 1 tells it."""
    return path(nfe)[1][-1]


def picture(file):
    """Draws Euler's paths from z1 = 1 beside the true path, and the std over the NFE."""
    with plt.rc_context(pictures.STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.5))
        times = [i / 100 for i in range(101)]
        left.plot(times, [s(t) for t in times], c=COLOURS["teacher"], lw=2,
                  label="the teacher's path")
        for nfe, shade in ((1, 0.35), (2, 0.55), (4, 0.75), (16, 1.0)):
            times, points = path(nfe)
            left.plot(times, points, marker="o", ms=3, lw=1.2, c=COLOURS["student"], alpha=shade)
            left.annotate(f"{nfe} NFE", (0, points[-1]), (5, 0), textcoords="offset points",
                          ha="left", va="center", fontsize=8)
        left.plot([], [], marker="o", ms=3, c=COLOURS["student"],
                  label="Euler with the perfect CD student")
        left.plot([1, 0], [1, 1], c="#555555", lw=1, ls=":", label="straight path (RF), any NFE")
        left.set(xlim=(1.02, -0.16), ylim=(0.55, 2.15), xlabel="t, from noise (1) to data (0)",
                 ylabel="zt", title="one sample, z1 = 1")
        left.legend(loc="upper left", fontsize=8, frameon=False)

        nfes = [2**i for i in range(9)]
        right.axhline(2, c="#999999", lw=0.8, ls="--")
        right.axhline(1, c=COLOURS["data"], lw=1.2)
        right.plot(nfes, [std(n) for n in nfes], marker="o", ms=4, c=COLOURS["student"])
        right.text(nfes[-1], 1.04, "the data", ha="right", fontsize=8)
        right.text(1, 1.93, "the limit", fontsize=8)
        for n in nfes[:5]:
            right.annotate(f"{std(n):.3f}", (n, std(n)), (5, -10), textcoords="offset points",
                           fontsize=8)
        right.set_xscale("log", base=2)
        right.set(xticks=nfes, xticklabels=nfes, xlabel="NFE", ylabel="std of the samples",
                  ylim=(0.9, 2.1), title="all samples")
        return pictures.write(fig, file)


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--out", default="runs/oversaturation.png", metavar="FILE",
                        help="the picture [%(default)s]")
    args = parser.parse_args(argv)
    print("NFE   std of a perfect consistency student's samples, data N(0, 1)")
    for nfe in (1, 2, 4, 8, 16, 100, 10_000):
        print(f"{nfe:<5} {std(nfe):.3f}")
    print(f"\nwrote {picture(args.out)}")


if __name__ == "__main__":
    run_script(main)
