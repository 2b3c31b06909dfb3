"""Why few-step samples of a perfect consistency student are too strong: `python oversaturation.py`.

Let the data be N(0, 1). Everything is then known in closed form: zt has standard deviation s(t),
the teacher's path from z1 is z1 s(t), and it ends in z1. A *perfect* consistency student knows the
end of the path from everywhere on it, f(z, t) = z / s(t). Its one-step samples are exact. Yet the
more steps Euler takes with it, the larger the samples: std 1, 1.414, 1.662, 1.816, 1.904, ...
towards 2. So contrast that grows with the steps is no failure of training. Consistency looks along
a curved path, Euler goes along straight lines; only straight paths, which the reflow loss makes,
reconcile the two.
"""

from math import sqrt

import matplotlib.pyplot as plt

import plots
from config import Parser, run_script


def s(t):
    """Standard deviation of zt = (1 - t) z0 + t z1 for z0, z1 ~ N(0, 1)."""
    return sqrt((1 - t) ** 2 + t**2)


def prediction(z, t):
    """f(z, t) of the perfect consistency student: where the teacher's path through z ends."""
    return z / s(t)


def euler(z, nfe):
    """The path of sampling from z at t = 1 in nfe steps, [(t, zt, f(zt, t)), ...] down to t = 0."""
    path = []
    for i in range(nfe, 0, -1):
        t = i / nfe
        path.append((t, z, prediction(z, t)))
        v = (z - prediction(z, t)) / t             # f(z, t) = z - t v
        z = z - v / nfe
    return [*path, (0.0, z, z)]


def std(nfe):
    """Standard deviation of the samples: Euler is linear in z1, so a path from 1 tells it."""
    return euler(1.0, nfe)[-1][1]


def picture(path):
    """Left, where Euler goes from z1 = 1 beside the true path; right, the std over the NFE."""
    with plt.rc_context(plots.STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.5))
        times = [i / 100 for i in range(101)]
        left.plot(times, [s(t) for t in times], c=plots.COLOURS["teacher"], lw=2,
                  label="the teacher's path")
        for nfe, shade in ((1, 0.35), (2, 0.55), (4, 0.75), (16, 1.0)):
            ts, zs, _ = zip(*euler(1.0, nfe))
            left.plot(ts, zs, marker="o", ms=3, lw=1.2, c=plots.COLOURS["student"], alpha=shade)
            left.annotate(f"{nfe} NFE", (0, zs[-1]), (5, 0), textcoords="offset points",
                          ha="left", va="center", fontsize=8)
        left.plot([], [], marker="o", ms=3, c=plots.COLOURS["student"],
                  label="Euler with the perfect CD student")
        left.plot([1, 0], [1, 1], c="#555555", lw=1, ls=":", label="straight path (RF), any NFE")
        left.set(xlim=(1.02, -0.16), ylim=(0.55, 2.15), xlabel="t, from noise (1) to data (0)",
                 ylabel="zt", title="one sample, z1 = 1")
        left.legend(loc="upper left", fontsize=8, frameon=False)

        nfes = [2**i for i in range(9)]
        right.axhline(2, c="#999999", lw=0.8, ls="--")
        right.axhline(1, c=plots.COLOURS["data"], lw=1.2)
        right.plot(nfes, [std(n) for n in nfes], marker="o", ms=4, c=plots.COLOURS["student"])
        right.text(nfes[-1], 1.04, "the data", ha="right", fontsize=8)
        right.text(1, 1.93, "the limit", fontsize=8)
        for n in nfes[:5]:
            right.annotate(f"{std(n):.3f}", (n, std(n)), (5, -10), textcoords="offset points",
                           fontsize=8)
        right.set_xscale("log", base=2)
        right.set(xticks=nfes, xticklabels=nfes, xlabel="NFE", ylabel="std of the samples",
                  ylim=(0.9, 2.1), title="all samples")
        return plots.write(fig, path)


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", default="runs/oversaturation.png", metavar="FILE",
                        help="the picture [%(default)s]")
    args = parser.parse_args(argv)
    print("NFE   std of a perfect consistency student's samples, data N(0, 1)")
    for nfe in (1, 2, 4, 8, 16, 100, 10_000):
        print(f"{nfe:<5} {std(nfe):.3f}")
    print(f"\nwrote {picture(args.out)}")


if __name__ == "__main__":
    run_script(main)
