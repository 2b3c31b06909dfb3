"""What images are compared by: the features of a frozen network.

MNIST: a small classifier trained here with a fixed seed, so its distances compare only with one
another. Images and latents: the Inception network of the original FID. Or a function of your own,
`--features my_module:my_function`.
"""

import importlib
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import Weights, WeightsEnum, inception_v3
from tqdm import trange

import checkpoint
import data
from config import LATENT_SETS, UserError, make_config

AT_A_TIME = 100                    # images that a network sees together


# ------------------------------------------------------------------------------ MNIST's classifier


class Classifier(nn.Module):
    """A small CNN for 28 x 28 digits; `features` (B, 64) come from its last layer but one."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 49, 64), nn.ReLU(),
        )
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        return self.last(self.features(x))


def mnist_classifier(data_dir, folder=Path("runs/mnist"), epochs=2):
    """The classifier, trained once with a fixed seed (about a minute) and kept in `folder`."""
    path = checkpoint.make_folder(folder) / "classifier.pt"
    torch.manual_seed(0)
    net = Classifier()
    if path.exists():
        content = checkpoint.load(path, "classifier")
        checkpoint.load_weights(net, content["net"], path)
        return net.eval()
    images, labels = data.mnist(data_dir)
    generator, batch = torch.Generator().manual_seed(0), 100
    steps = epochs * len(images) // batch
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for i in trange(steps, desc="classifier for the features"):
        chosen = order[i * batch:][:batch]
        loss = F.cross_entropy(net(data.from_uint8(images[chosen])), labels[chosen])
        opt.zero_grad()
        loss.backward()
        opt.step()
        rates.step()
    net.eval()
    held, answers = data.mnist(data_dir, train=False)
    with torch.no_grad():
        right = torch.cat([net(data.from_uint8(x)).argmax(1) for x in held.split(500)]) == answers
    print(f"classifier: {100 * right.float().mean():.2f} % of the test digits right")
    checkpoint.save(path, "classifier", make_config("mnist"), (1, 28, 28), steps,
                    net=net.state_dict())
    return net


# ------------------------------------------------------------------------------ FID's Inception


def inception():
    """The InceptionV3 of the original FID, weights still random: images in [-1, 1] -> (B, 2048).

    torchvision's network with 1008 classes, but its average pooling leaves the padding out of the
    mean and its last block pools by the maximum, as TensorFlow's of 2015 does. Key names are those
    of pytorch-fid's weights; the last layer `fc` is there for them alone.
    """
    net = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    for name, block in net.named_children():
        if not hasattr(block, "branch_pool"):
            continue

        def pool(x, name=name):
            if name == "Mixed_7c":
                return F.max_pool2d(x, 3, stride=1, padding=1)
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

        # torchvision's block hands branch_pool its own average; this branch takes ours instead
        def remember(block, inputs, pool=pool):
            block.pooled = pool(inputs[0])

        block.register_forward_pre_hook(remember)
        block.branch_pool.register_forward_pre_hook(lambda _, __, block=block: (block.pooled,))
    return net.eval().requires_grad_(False)


class Inception_Weights(WeightsEnum):
    """pytorch-fid's port of the network that the FID was defined by."""

    FID = Weights(url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                  "pt_inception-2015-12-05-6726825d.pth", transforms=None,
                  meta={"file_name": "pt_inception-2015-12-05-6726825d.pth", "license": "Apache-2"})


def fid_network(device="cpu"):
    """`inception` with its published weights, as a function of images in [-1, 1].

    Raises UserError where they cannot be fetched.
    """
    from vae import fetch
    net, weights = inception(), Inception_Weights.FID
    content = fetch(weights, instead="other features by --features")
    checkpoint.load_weights(net, content, weights.meta["file_name"])
    net.fc = nn.Identity()
    net.to(device)

    def features(x):
        x = x.expand(-1, 3, -1, -1).to(device)     # grey images have three equal channels
        return net(F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False))

    return features


# ----------------------------------------------------------------------------- the one in use


def own_function(spec):
    """The function that "my_module:my_function" names; UserError where there is none."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
        if not callable(function):
            raise TypeError(f"{name} is no function")
        return function
    except Exception as e:                         # the module may raise anything
        raise UserError(f"--features {spec}: {data.first_line(e)}; it names a function of a Python "
                        "file as my_module:my_function, images (B, C, H, W) in [-1, 1] -> (B, d)"
                        ) from e


def extractor(dataset, spec="", data_dir="data", device="cpu"):
    """(name, function): images in [-1, 1] -> features float32 (n, d) on the CPU.

    They are seen in the 8 bits of a file, AT_A_TIME together.
    Raises UserError where the weights or the function are not to be had, or their shape is wrong.
    """
    if spec:
        name, function = spec, own_function(spec)
    elif dataset in LATENT_SETS:
        name, function = "Inception features", fid_network(device)
    else:
        name, function = "the classifier's features", mnist_classifier(data_dir).features

    @torch.no_grad()
    def features(z):
        parts = []
        for images in data.from_uint8(data.to_uint8(z)).split(AT_A_TIME):
            try:
                found = function(images)
            except Exception as e:                 # a user's function may raise anything
                if not spec:
                    raise
                raise UserError(f"--features {spec} failed on images of shape "
                                f"{tuple(images.shape)}: {data.first_line(e)}") from e
            if not (torch.is_tensor(found) and found.ndim == 2 and len(found) == len(images)):
                shape = tuple(found.shape) if torch.is_tensor(found) else type(found).__name__
                raise UserError(f"the features {name} of {len(images)} images have shape {shape}; "
                                f"({len(images)}, d) is wanted")
            parts.append(found.float().cpu())
            if not parts[-1].isfinite().all():
                raise UserError(f"the features {name} hold numbers that are not finite")
        return torch.cat(parts)
    return name, features
