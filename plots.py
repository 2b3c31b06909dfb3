"""Pictures, in one look: a cell is a cloud of points (n, 2) or one image (C, H, W) in [-1, 1]."""

from itertools import repeat, zip_longest
from pathlib import Path

import matplotlib
import numpy as np

from config import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend must be chosen first)

WINDOW = 2.6                       # points: every panel shows [-2.6, 2.6]^2, in units of data's std
COLOURS = {"data": "#444444", "teacher": "#c2571a", "student": "#1f5fa8"}
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "savefig.dpi": 100, "figure.constrained_layout.use": True}


def write(fig, path):
    """Saves and closes a figure; UserError where the file cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path)
    except (OSError, ValueError) as e:
        raise UserError(f"could not write the picture {path} ({e}); name another .png") from e
    finally:
        plt.close(fig)
    return Path(path)


def as_image(z):
    """(C, H, W) in [-1, 1] -> (H, W, C) in [0, 1], which imshow takes."""
    z = ((z.float() + 1) / 2).clamp(0, 1).cpu()
    return z[:3].permute(1, 2, 0).numpy() if len(z) >= 3 else z[0].numpy()


def draw_points(ax, z, colour):
    z = z[:4000].float().cpu().numpy()
    ax.scatter(z[:, 0], z[:, 1], s=1.6, c=colour, alpha=0.45, linewidths=0, rasterized=True)
    ax.set(xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW), aspect="equal")


def grid(path, rows, columns=None, title=None):
    """Cells in labelled rows, [(label, a colour's name or one a cell, [cell, ...]), ...].

    A cell that is None, or wanting at the end of a row, stays empty.
    """
    points = next(c for _, _, cells in rows for c in cells if c is not None).ndim == 2
    width = max(len(cells) for _, _, cells in rows)
    large = not points and max(c.shape[-1] for _, _, cells in rows for c in cells
                               if c is not None) > 64
    side = 1.75 if points else min(1.15 if large else 0.78, 9.2 / width)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            len(rows), width, squeeze=False,
            figsize=(side * width + 0.9, side * len(rows) + (0.35 if columns else 0)
                     + (0.35 if title else 0)),
        )
        if not points:
            fig.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(points)
                spine.set_color("#bbbbbb")
        for (label, colours, cells), line in zip(rows, axes):
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)
            colours = repeat(colours, width) if isinstance(colours, str) else colours
            for cell, colour, ax in zip_longest(cells, colours, line):
                if cell is None:
                    ax.axis("off")
                elif points:
                    draw_points(ax, cell, COLOURS[colour])
                else:
                    ax.imshow(as_image(cell), cmap="gray", vmin=0, vmax=1,
                              interpolation=None if large else "nearest")
        for ax, text in zip(axes[0], columns or []):
            ax.set_title(text)
        if title:
            fig.suptitle(title, fontsize=10)
        return write(fig, path)


def paths(path, rows, title=None):
    """Sampling paths of points, one row of two panels a network: zt, and the z0-predictions.

    rows is [(label, colour's name, [(t, zt, z0_prediction), ...]), ...], from t = 1 to t = 0.
    """
    shown = 120
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(len(rows), 2, squeeze=False, figsize=(8.2, 4.1 * len(rows)))
        for (label, colour, steps), line in zip(rows, axes):
            end = steps[-1][1]
            for ax, which, name in zip(line, (1, 2), ("paths of zt", "z0-predictions f(zt, t)")):
                draw_points(ax, end, "#cccccc")
                track = np.stack([step[which][:shown].float().cpu().numpy() for step in steps])
                ax.plot(track[:, :, 0], track[:, :, 1], c=COLOURS[colour], alpha=0.45, lw=0.7)
                ax.scatter(*track[0].T, s=9, facecolors="none", edgecolors="#333333", lw=0.6,
                           label="noise z1" if which == 1 else "first prediction, f(z1, 1)")
                ax.scatter(*track[-1].T, s=8, c=COLOURS[colour], lw=0, label="sample", zorder=3)
                ax.set_title(f"{label}: {name}")
                reach = max(3.3, WINDOW) if which == 1 else WINDOW
                ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
                ax.legend(loc="upper right", fontsize=7, framealpha=0.9, markerscale=1.5)
        if title:
            fig.suptitle(title, fontsize=10)
        return write(fig, path)


def film(path, panels, title=None):
    """An animated GIF of points on their way, a panel a sampler, a frame a number of network calls.

    panels is [(label, colour's name, [z after 0 calls, after 1, ...]), ...]; a sampler that is done
    stands still. Frames thin out after the eighth call, so that the file stays small.
    """
    from PIL import Image

    last = max(len(steps) for _, _, steps in panels) - 1
    calls = [c for c in range(last + 1) if c <= 8 or c % max(last // 12, 1) == 0 or c == last]
    frames = []
    with plt.rc_context(STYLE):
        for c in calls:
            fig, axes = plt.subplots(1, len(panels), squeeze=False,
                                     figsize=(2.3 * len(panels), 2.9), dpi=80)
            for (label, colour, steps), ax in zip(panels, axes[0]):
                done = c >= len(steps) - 1
                draw_points(ax, steps[min(c, len(steps) - 1)], COLOURS[colour])
                ax.set(xticks=[], yticks=[])
                ax.set_title(label, weight="bold" if done else "normal")
                ax.set_xlabel(f"done after {len(steps) - 1}" if done else f"call {c}")
                for spine in ax.spines.values():
                    spine.set_visible(True)
                    spine.set_color("#bbbbbb")
            fig.suptitle(title or "", fontsize=10)
            fig.canvas.draw()
            frames.append(Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3])
                          .quantize(16, dither=Image.Dither.NONE))
            plt.close(fig)
    shown = [900] + [450] * (len(frames) - 2) + [2500]   # milliseconds
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=shown, loop=0)
    except (OSError, ValueError) as e:
        raise UserError(f"could not write the film {path} ({e}); name another .gif") from e
    return Path(path)


def losses(path, curves, title=None):
    """One panel a logged term, {name: (steps, values)}."""
    width = min(len(curves), 4)
    height = -(-len(curves) // width)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(height, width, squeeze=False,
                                 figsize=(2.5 * width, 1.9 * height + 0.3))
        for ax in axes.flat[len(curves):]:
            ax.axis("off")
        for ax, (name, (steps, values)) in zip(axes.flat, curves.items()):
            ax.plot(steps, values, c=COLOURS["student"], lw=1)
            ax.set_title(name)
            ax.grid(alpha=0.25)
        for ax in axes.flat[max(len(curves) - width, 0):len(curves)]:   # the lowest of a column
            ax.set_xlabel("iteration")
        if title:
            fig.suptitle(title, fontsize=10)
        return write(fig, path)
