"""Optional packages, and networks of theirs in a folder or on the Hugging Face hub."""

import importlib
import warnings
from importlib.util import find_spec

from torch import nn

from harness import UserError, first_line

ADVICE = ("name a folder in diffusers' layout, or the id of one on the Hugging Face hub, which "
          "must be in reach or in its cache")


def package(name, *others):
    """An optional package. If it is absent, UserError names it, and what is absent of `others`."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        lacking = [name, *(other for other in others if not find_spec(other))]
        raise UserError(f"this needs {' and '.join(lacking)}; install by pip install "
                        f"{' '.join(lacking)}") from e


def library(name, *others):
    """The package diffusers or transformers, without its warnings and progress bars."""
    warnings.filterwarnings("ignore", module="huggingface_hub")
    module = package(name, *others)
    module.utils.logging.set_verbosity_error(), module.utils.logging.disable_progress_bar()
    return module


def part(kind, source, folder, **more):
    """A part of a pipeline by from_pretrained, frozen, in float32; UserError if that fails.

    kind is a class of diffusers or transformers, source a folder or an id on the hub, and folder
    the part's place in it.
    """
    more |= {"subfolder": folder} if folder else {}
    more |= {"output_loading_info": True} if issubclass(kind, nn.Module) else {}
    try:
        made = kind.from_pretrained(source, **more)
    except Exception as e:                         # no network, no such id, a damaged file
        raise UserError(f"the {folder or 'network'} of {source} cannot be loaded "
                        f"({first_line(e)}); {ADVICE}") from e
    made, info = made if isinstance(made, tuple) else (made, {})
    if lacking := sorted(info.get("missing_keys", ())):
        raise UserError(f"the {folder or 'network'} of {source} lacks {len(lacking)} tensors "
                        f"(first: {lacking[0]}); download it again")
    return made.float().eval().requires_grad_(False) if isinstance(made, nn.Module) else made
