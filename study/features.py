"""The features by which images are compared: outputs of a frozen network.

MNIST: a small classifier that is trained here, so its distances compare only with one another.
Other images: FID's Inception network (pytorch-fid). Or your own, `--features module:function`.
"""

import hashlib
import importlib
import io
import os
import sys
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from operator import add
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm, trange

import data
from config import CAPTION_SETS, LATENT_SETS, make_config
from harness import UserError, checkpoint, first_line, machine
from harness.pictures import from_uint8, to_uint8

AT_A_TIME = 100                    # images that a network sees together


class Classifier(nn.Sequential):
    """A small CNN for 28 x 28 digits; its `features` (B, 64) are the last hidden layer."""

    def __init__(self):
        features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 49, 64), nn.ReLU(),
        )
        super().__init__(OrderedDict(features=features, last=nn.Linear(64, 10)))


def mnist_classifier(data_dir, folder=Path("runs/mnist"), epochs=2):
    """The classifier of these digits, trained once (about a minute) and kept in `folder`.

    The file's name holds the key of the data, so other data never reuse it.
    """
    cfg = make_config("mnist", data_dir=str(data_dir), condition="class")   # labels count
    path = folder / f"classifier-{data.key(cfg)}.pt"
    torch.manual_seed(0)
    net = Classifier()
    if machine.from_first(path.exists):
        checkpoint.load_weights(net, checkpoint.load(path, "classifier")["net"], path)
        return net.eval()

    images, labels = data.mnist(data_dir)
    generator, batch = torch.Generator().manual_seed(0), 100
    steps = epochs * len(images) // batch
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for i in trange(steps, desc="classifier for the features"):
        chosen = order[i * batch:][:batch]
        loss = F.cross_entropy(net(from_uint8(images[chosen])), labels[chosen])
        opt.zero_grad()
        loss.backward()
        opt.step()
        rates.step()

    net.eval()
    images, labels = data.mnist(data_dir, train=False)
    with torch.no_grad():
        answers = torch.cat([net(from_uint8(x)).argmax(1) for x in images.split(500)])
    print(f"classifier: {100 * (answers == labels).float().mean():.2f} % of the test digits right")
    checkpoint.save(path, "classifier", cfg, (1, 28, 28), steps, net=net.state_dict())
    return net


def inception(device="cpu"):
    """The network that defines the FID, as a function of images in [-1, 1] -> (B, 2048).

    Raises UserError if pytorch-fid or its weights are missing.
    """
    try:
        from pytorch_fid import inception as fid
    except ImportError as e:
        raise UserError("the Frechet distance of images needs the package pytorch-fid (pip install "
                        "pytorch-fid), or your own function by --features") from e
    file = Path(torch.hub.get_dir(), "checkpoints", Path(fid.FID_WEIGHTS_URL).name)
    try:
        # pytorch-fid itself would also read files that can run code; this call refuses them
        torch.hub.load_state_dict_from_url(fid.FID_WEIGHTS_URL, map_location="cpu",
                                           check_hash=True, weights_only=True)
        network = fid.InceptionV3(normalize_input=False).eval().to(device)
    except Exception as e:                         # no network, a cut file, other weights
        raise UserError(f"the weights of FID's network cannot be loaded ({first_line(e)}); "
                        f"download {fid.FID_WEIGHTS_URL} by hand as {file}, or use your own "
                        "function by --features") from e
    # grey images get three equal channels
    return lambda x: network(x.expand(-1, 3, -1, -1).to(device))[0].flatten(1)


def function_of(spec):
    """The function that "my_module:my_function" names; UserError if there is none."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
        if not callable(function):
            raise TypeError(f"{name} is not a function")
        return function
    except (Exception, SystemExit) as e:           # the module may raise anything
        raise UserError(f"--features {spec}: {first_line(e)}; name a function of a Python file as "
                        "my_module:my_function, images (B, C, H, W) in [-1, 1] -> (B, d)") from e


def as_jpeg(images):
    """uint8 (n, 3, H, W), written as JPEG and read again: Pillow's quality 75, 4:2:0."""
    pixels = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG")
        pixels.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(pixels).permute(0, 3, 1, 2)


def extractor(cfg, spec=None, device="cpu", jpeg=False):
    """(name, features, classes) of images (n, C, H, W) in [-1, 1].

    features returns float32 (n, d) on the CPU. classes, a function of features (n, d), returns the
    class of each image, int64 (n,); it is None if nothing here can tell the classes.

    The images are rounded to the 8 bits of a file first, and AT_A_TIME are processed together.
    jpeg: they pass through a JPEG file, as in the official test. Raises UserError if weights or
    function are missing, or its answers are not features.
    """
    classes = None
    if spec is not None:
        name, function = spec, function_of(spec)
    elif cfg.dataset in CAPTION_SETS:
        name, function = "means of 4 x 4 pixels", lambda x: F.avg_pool2d(x, 4).flatten(1)
    elif cfg.dataset in (*LATENT_SETS, "cifar10"):
        name, function = "Inception features", inception(device)
    else:
        classifier = mnist_classifier(cfg.data_dir)
        name, function = "the classifier's features", classifier.features
        classes = torch.no_grad()(lambda x: classifier.last(x).argmax(1))
    name += " of JPEG images" * jpeg
    d = None                                       # then that of the first answer

    @torch.no_grad()
    def features(z):
        nonlocal d
        parts = []
        for pixels in to_uint8(z).split(AT_A_TIME):
            images = from_uint8(as_jpeg(pixels) if jpeg else pixels)
            try:
                x = function(images)
                d = d or x.shape[-1]
                if x.shape != (len(images), d) or not d or x.is_complex() or not x.isfinite().all():
                    raise ValueError(f"the answer is {x.dtype} of shape {tuple(x.shape)}")
            except (Exception, SystemExit) as e:   # a user's function may raise anything
                if spec is None:
                    raise
                raise UserError(f"--features {spec} failed on {len(images)} images: "
                                f"{first_line(e)}; it must return finite real numbers (n, d), with "
                                "one d for all images") from e
            parts.append(x.float().cpu())
        return torch.cat(parts)
    return name, features, classes


# -------------------------------------------------------------------------- features of the data


class Spread:
    """Std of samples that come in batches: the root of the mean variance over their elements.

    With classes y it is the std within a class: the variances are those of each class, and their
    mean is over all classes of two or more samples.
    """

    def __init__(self):
        self.sums = {}                             # {class: samples, sums, sums of squares}

    def add(self, z, y=None):
        """Takes in a batch (b, ...), classes (b,) or None; returns the Spread itself."""
        z = z.flatten(1).double().cpu()
        for k in [None] if y is None else y.unique().tolist():
            some = z if y is None else z[y == k]
            self.take({k: (len(some), some.sum(0), some.square().sum(0))})
        return self

    def take(self, sums):
        """Takes in the sums of another Spread; returns the Spread itself."""
        for k, new in sums.items():
            self.sums[k] = tuple(map(add, self.sums.get(k, (0, 0, 0)), new))
        return self

    @property
    def std(self):
        variances = [((square / n - (mean / n).square()).mean() * n / (n - 1)).item()
                     for n, mean, square in self.sums.values() if n > 1]
        return (sum(variances) / len(variances)) ** 0.5 if variances else float("nan")


def images_in_blocks(images, cfg):
    """Yields the images that can be read, float32 (AT_A_TIME, 3, H, W) in [-1, 1]."""
    import latents                                 # not above: points need no torchvision
    decoded = latents.decoded(images, cfg.image_size, enlarge=cfg.dataset == "captioned")
    pixels = (pixels for _, pixels, _ in tqdm(decoded, "features of the data", images.size)
              if pixels is not None)
    while block := list(islice(pixels, AT_A_TIME)):
        yield from_uint8(torch.stack(block))


def data_features(cfg, name, features):
    """(features float32 (N, d), std) of all images that the settings name, on the CPU.

    name and features are those of `extractor`. Rank 0 computes them once, for all processes.
    """
    with np.load(machine.from_first(kept_features, cfg, name, features)) as file:
        return torch.from_numpy(file["features"]), float(file["std"])


def kept_features(cfg, name, features):
    """The file of data_features in --latents-dir, made if there is none that fits.

    Its name ends in a key of images, size and `name`: other images, another file. It fits if
    `features` still gives the same for the first images. Raises UserError if none can be read.
    """
    import latents
    try:                                           # download would wait for the other processes
        images = latents.open_images(replace(cfg, download=False))
    except UserError as e:                         # of captioned --real names them
        raise UserError(str(e).replace("--data-dir", "--real") if cfg.dataset == "captioned"
                        else str(e)) from e
    lines = "\n".join([*images.identity(), name, cfg.dataset, str(cfg.image_size)])
    key = hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()[:12]
    source = latents.printable(Path(cfg.data_dir).stem)
    path = Path(cfg.latents_dir, f"{source}-features-{key}.npz")

    parts, spread = [], Spread()
    for x in images_in_blocks(images, cfg):
        parts.append(features(x))
        spread.add(x)
        if len(parts) == 1 and path.exists():
            with suppress(Exception), np.load(path) as file:   # a damaged file raises anything
                kept = torch.from_numpy(file["features"])[:len(x)]
                # not equal: two devices round differently
                if file["std"] and (kept - parts[0]).norm() < 0.01 * parts[0].norm():
                    return path
            print(f"{path} is damaged, or of other features of this name; it is made again")
    if not parts:
        raise UserError(f"{cfg.data_dir} has no image that can be read")
    values = torch.cat(parts)
    if len(values) < images.size:
        print(f"skipped {images.size - len(values):,} images that cannot be read")
    with checkpoint.replacing(path) as file:
        np.savez(file, features=values.numpy(), std=spread.std)
    return path
