"""Do the lines from noise z1 to the one-step sample x1 cross? `python -m study.crossing STUDENT...`

Prints, per student of points: `crossing`, the standard deviation per element of x1 among lines that
meet at t = 1/2, and `error`, the RMS difference there between the prediction and x1. A network that
reflow has trained predicts the mean of the lines that meet, so its error is at least the crossing.
"""

import torch

import sample
from harness import UserError
from harness.script import make_parser, run_script
from losses import interpolate, z0_prediction


@torch.no_grad()
def crossing(network, n=4000, others=200_000):
    """(crossing, error) of a network of points. Lines are compared with the nearest of `others`.

    Half of the mean squared difference of two samples is their variance.
    """
    z1 = sample.noise((2,), n + others, seed=0)
    x1 = sample.draw(network, (2,), n + others, 1, seed=0, batch=10_000)
    half = torch.full((n + others,), 0.5)
    zr = interpolate(x1, z1, half)
    nearest = torch.cat([torch.cdist(z, zr[n:]).argmin(1) for z in zr[:n].split(500)])
    f_r = z0_prediction(network, zr[:n], half[:n])
    variance = (x1[n:][nearest] - x1[:n]).square().mean() / 2
    error = (f_r - x1[:n]).square().mean()
    return variance.sqrt().item(), error.sqrt().item()


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("students", nargs="+", metavar="STUDENT", help="student.pt of points")
    for path in parser.parse_args(argv).students:
        network, content, cfg = sample.open_network(path)
        if tuple(content["shape"]) != (2,) or cfg.condition != "none":
            raise UserError(f"{path} is of {cfg.dataset}, with --condition {cfg.condition}; name "
                            "students of points that are unconditional")
        print("{}: crossing {:.3f}, error {:.3f}".format(path, *crossing(network)))


if __name__ == "__main__":
    run_script(main)
