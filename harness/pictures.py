"""Pictures in one style. A cell is a cloud of points (n, 2) or one image (C, H, W) in [-1, 1]."""

import os
import textwrap
from itertools import repeat, zip_longest
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from harness import UserError
from harness.checkpoint import replacing

os.environ["MPLBACKEND"] = "Agg"   # a notebook's backend works only inside it
import matplotlib.pyplot as plt  # noqa: E402

WINDOW = 2.6                       # points: every panel shows [-2.6, 2.6]^2, in units of data's std
COLOURS = {"data": "#444444", "teacher": "#c2571a", "student": "#1f5fa8"}
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "savefig.dpi": 100, "figure.constrained_layout.use": True}


def from_uint8(images):
    """Pixels 0 ... 255 -> float32 in [-1, 1], of any shape."""
    return images.float() / 127.5 - 1


def to_uint8(z):
    """float32 in [-1, 1], clamped, -> pixels 0 ... 255, of any shape."""
    return ((z + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def write(fig, path):
    """Saves and closes a figure; UserError if it cannot be written."""
    path = picture_path(path, ".png")
    try:
        with replacing(path) as file:
            fig.savefig(file, format=path.suffix[1:])
    finally:
        plt.close(fig)
    return path


def picture_path(path, suffix):
    """The path, with `suffix` added if it has none of a picture; UserError for a folder."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a {suffix} file")
    known = (".gif",) if suffix == ".gif" else (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")
    return path if path.suffix.lower() in known else path.with_name(path.name + suffix)


def as_image(z):
    """(C, H, W) in [-1, 1] -> (H, W, C) in [0, 1], which imshow takes."""
    z = ((z.float() + 1) / 2).clamp(0, 1).cpu()
    return z[:3].permute(1, 2, 0).numpy() if len(z) >= 3 else z[0].numpy()


def draw_points(ax, z, colour):
    z = z.float().cpu().numpy()
    ax.scatter(z[:, 0], z[:, 1], s=1.6, c=colour, alpha=0.45, linewidths=0, rasterized=True)
    ax.set(xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW), aspect="equal")


def grid(path, rows, columns=None, title=None):
    """Cells in labelled rows, [(label, one colour name or one per cell, [cell, ...]), ...].

    A cell that is None, or missing at the end of a row, stays empty. Long labels are wrapped.
    """
    rows = [("\n".join(textwrap.wrap(label, 20)), *row) for label, *row in rows]
    cells = [c for _, _, row in rows for c in row if c is not None]
    points, width = cells[0].ndim == 2, max(len(row) for _, _, row in rows)
    large = not points and max(c.shape[-1] for c in cells) > 64
    side = 1.75 if points else min(1.15 if large else 0.78, 9.2 / width)
    side = 3.5 if len(cells) == 1 else side
    height = side * len(rows) + 0.35 * bool(columns) + 0.35 * bool(title)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(len(rows), width, squeeze=False,
                                 figsize=(side * width + label_width(rows), height))
        layout = fig.get_layout_engine()
        layout.set(rect=(0.01, 0, 0.99, 1))        # or long labels touch the edge
        if not points:
            layout.set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
        for ax in axes.flat:
            frame(ax, points)

        for (label, colours, row), line in zip(rows, axes):
            # a prompt may have dollar signs, which are no mathematics
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6,
                               parse_math=False)
            colours = repeat(colours, width) if isinstance(colours, str) else colours
            for cell, colour, ax in zip_longest(row, colours, line):
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


def label_width(rows):
    """Inches for the labels beside rows; a longer line needs more than 0.9."""
    lines = [line for label, _, _ in rows for line in label.splitlines()]
    return max(0.9, 0.085 * max(map(len, lines), default=0) - 0.2)


def tiles(path, images, columns=16, title=None):
    """Images (n, C, H, W) in [-1, 1] side by side, as one picture; any number of them."""
    n, channels, height, width = images.shape
    rows, scale = -(-n // columns), max(9.2 / columns, 0.1)   # inches per image
    padded = torch.ones(rows * columns, channels, height, width)
    padded[:n] = images
    whole = rearrange(padded, "(r k) c h w -> c (r h) (k w)", k=columns)
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(scale * columns,
                                        scale * height / width * rows + 0.5 * bool(title)))
        ax.imshow(as_image(whole), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.axis("off")
        if title:
            fig.suptitle(title, fontsize=10)
        return write(fig, path)


def frame(ax, visible=True):
    """No ticks, and a grey frame if it is to be visible."""
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(visible)
        spine.set_color("#bbbbbb")


def paths(path, rows, title=None):
    """Sampling paths of points. One row per network, two panels: zt, and the z0-predictions.

    rows is [(label, colour name, [(t, zt, z0_prediction), ...]), ...], from t = 1 to t = 0.
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
    """An animated GIF of points on their way: one panel per sampler, one frame per network call.

    panels is [(label, colour name, [z after 0 calls, after 1, ...]), ...]. A sampler that has
    ended stands still. After the eighth call frames are left out, so that the file stays small.
    """
    last = max(len(steps) for _, _, steps in panels) - 1
    calls = [c for c in range(last + 1) if c <= 8 or c % max(last // 12, 1) == 0 or c == last]
    frames = [film_frame(panels, c, title) for c in calls]
    milliseconds = [900] + [450] * (len(frames) - 2) + [2500]
    path = picture_path(path, ".gif")
    with replacing(path) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:],
                       duration=milliseconds, loop=0)
    return path


def film_frame(panels, call, title):
    """The film's picture after so many calls of the network, with 64 colours."""
    from PIL import Image

    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(2.3 * len(panels), 2.9),
                                 dpi=80)
        for (label, colour, steps), ax in zip(panels, axes[0]):
            ended = call >= len(steps) - 1
            draw_points(ax, steps[min(call, len(steps) - 1)], COLOURS[colour])
            frame(ax)
            ax.set_title(label, weight="bold" if ended else "normal")
            ax.set_xlabel(f"done after {len(steps) - 1}" if ended else f"call {call}")
        fig.suptitle(title or "", fontsize=10)
        fig.canvas.draw()
        pixels = np.asarray(fig.canvas.buffer_rgba())[..., :3]
        plt.close(fig)
    return Image.fromarray(pixels).quantize(64, dither=Image.Dither.NONE)


def losses(path, curves, title=None):
    """One panel per logged term, {name: (steps, values)}; no picture if there is no term."""
    if not curves:
        return None
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
        for ax in axes.flat[max(len(curves) - width, 0):len(curves)]:   # the lowest per column
            ax.set_xlabel("iteration")
        if title:
            fig.suptitle(title, fontsize=10)
        return write(fig, path)
