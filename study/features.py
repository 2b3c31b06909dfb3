"""The features by which images are compared: outputs of a frozen network.

MNIST: a small classifier that is trained here, so its distances compare only with one another.
Other images: FID's Inception network (pytorch-fid). Or your own, `--features module:function`.
"""

import importlib
import os
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

import data
from config import CAPTION_SETS, LATENT_SETS, make_config
from harness import UserError, checkpoint, first_line
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
    if path.exists():
        checkpoint.load_weights(net, checkpoint.load(path, "classifier")["net"], path)
        return net.eval()
    if others := [str(p) for p in sorted(folder.glob("classifier*.pt"))]:
        print(f"{', '.join(others)}: trained on other data, or before classifiers remembered "
              f"theirs; training {path}")

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


def extractor(cfg, spec=None, device="cpu"):
    """(name, features, classes) of images (n, C, H, W) in [-1, 1].

    features returns float32 (n, d) on the CPU. classes, a function of features (n, d), returns the
    class of each image, int64 (n,); it is None if nothing here can tell the classes.

    The images are rounded to the 8 bits of a file first, and AT_A_TIME are processed together.
    Raises UserError if weights or function are missing, or its answers are not features.
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
    d = None                                       # then that of the first answer

    @torch.no_grad()
    def features(z):
        nonlocal d
        parts = []
        for images in from_uint8(to_uint8(z)).split(AT_A_TIME):
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
