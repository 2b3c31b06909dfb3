"""Text to image: pipelines of Stable Diffusion as networks of this project.

A pipeline is a folder in diffusers' layout, or an id on the Hugging Face hub. Its parts are unet/
(or transformer/ for Stable Diffusion 3), text_encoder/, tokenizer/ and vae/. Conventions: the UNets
of InstaFlow take t' = 1000 t and answer v' = data - noise = -v; Stable Diffusion 3 takes the same
t' and answers v' = noise - data = v. A condition y is the embedding of a text, float32 (B, L, D).
"""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from config import LATENT_DOWNSAMPLING, make_config
from harness import UserError, first_line, package
from harness.machine import VelocityNetwork

ADVICE = ("name a folder in diffusers' layout, or the id of one on the Hugging Face hub, which must "
          "be in reach or in its cache")


class StableDiffusion(VelocityNetwork):
    """v(zt, t, y) by diffusers' UNet; y (B, 77, 768) is CLIP's last hidden state for SD 1.5.

    y = None is the null condition, the embedding of the empty text: a buffer, (L, D).
    """

    def __init__(self, inner, null):
        super().__init__()
        self.inner = inner
        self.register_buffer("null", null)

    def embedded(self, y, batch):
        return self.null.expand(batch, -1, -1) if y is None else y

    def forward(self, zt, t, y=None):
        return -self.inner(zt, 1000 * t, self.embedded(y, len(zt))).sample

    @property
    def checkpointing(self):
        return self.inner.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted):               # harness.machine.prepare sets it
        if wanted:
            self.inner.enable_gradient_checkpointing()

    def save(self, folder):
        """Writes the network as FOLDER/unet or FOLDER/transformer in diffusers' layout."""
        self.inner.save_pretrained(folder / SUBFOLDERS[type(self.inner).__name__])


class StableDiffusion3(StableDiffusion):
    """v(zt, t, y) by the transformer of Stable Diffusion 3.

    It takes embeddings of the words, (B, L, D), and one pooled embedding (B, P), P <= D. Both
    travel as one y, (B, L + 1, D): the last row is the pooled one, with zeros behind it.
    """

    def forward(self, zt, t, y=None):
        y = self.embedded(y, len(zt))
        words, pooled = y[:, :-1], y[:, -1, : self.inner.config.pooled_projection_dim]
        return self.inner(zt, words, pooled, 1000 * t).sample


ADAPTERS = {"UNet2DConditionModel": StableDiffusion, "SD3Transformer2DModel": StableDiffusion3}
OPTIONAL = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")   # of SD 3
SUBFOLDERS = {"UNet2DConditionModel": "unet", "SD3Transformer2DModel": "transformer"}


# ------------------------------------------------------------------------------------ pipelines


def library(name):
    """The package diffusers or transformers, without its warnings and progress bars."""
    module = package(name)
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


@lru_cache
def found(source):
    """(subfolder, class, config) of the velocity network in a pipeline, or of a bare network.

    Raises UserError if there is none, or if it takes more than latent, time and text.
    """
    load, error = library("diffusers").UNet2DConditionModel.load_config, None
    for folder in (*SUBFOLDERS.values(), None):
        if Path(source).is_dir() and not Path(source, folder or "", "config.json").exists():
            continue
        try:
            config = load(source, subfolder=folder)
            break
        except (OSError, ValueError) as e:         # no such id, no network, no valid JSON
            error = error or e
    else:
        raise UserError(f"{source} holds no pipeline of Stable Diffusion that can be read"
                        f"{f' ({first_line(error)})' if error else ''}; {ADVICE}")
    kind = config.get("_class_name")
    if kind not in ADAPTERS:
        raise UserError(f"{source} holds a {kind}, not one of {' and '.join(ADAPTERS)}; {ADVICE}")
    strange = [name for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim")
               if config.get(name)]
    if config["in_channels"] != config["out_channels"]:
        strange.append("in_channels")
    if strange:
        raise UserError(f"{source} holds a UNet of another architecture, such as SDXL's "
                        f"({strange[0]} is {config[strange[0]]}); name one as Stable Diffusion 1.5")
    return folder, kind, config


def latents_of(source):
    """The shape (C, h, w) of the latents that a pipeline's network takes."""
    config = found(source)[2]
    return config["in_channels"], config["sample_size"], config["sample_size"]


def part(kind, source, folder, **more):
    """A part of a pipeline by from_pretrained, frozen, in float32; UserError if that fails."""
    try:
        made = kind.from_pretrained(source, **{"subfolder": folder} if folder else {}, **more)
    except Exception as e:                         # no network, no such id, a damaged file
        raise UserError(f"the {folder or 'pipeline'} of {source} cannot be loaded "
                        f"({first_line(e)}); {ADVICE}") from e
    made, info = made if isinstance(made, tuple) else (made, {})
    if lacking := sorted(info.get("missing_keys", ())):
        raise UserError(f"the {folder or 'network'} of {source} lacks {len(lacking)} tensors "
                        f"(first: {lacking[0]}); download it again")
    return made.float().eval().requires_grad_(False) if isinstance(made, nn.Module) else made


def velocity(source, rest="", weights=True):
    """The velocity network of a pipeline, or of a bare network with the texts of `rest`.

    Without `weights` they are random, for others to be loaded. Raises UserError if it does not fit
    the text encoder.
    """
    folder, kind, config = found(source)
    null = texts_of(rest or source).null.clone()
    width = config.get("cross_attention_dim") or config.get("joint_attention_dim")
    if null.shape[1] != width:
        raise UserError(f"{source} holds a network of another architecture: it takes {width} "
                        f"numbers per word (cross_attention_dim), and the text encoder of "
                        f"{rest or source} gives {null.shape[1]}; name a pipeline that fits")
    kind, adapter = getattr(library("diffusers"), kind), ADAPTERS[kind]
    if not weights:
        return adapter(kind.from_config(config), null)
    more = dict(output_loading_info=True, low_cpu_mem_usage=False)
    return adapter(part(kind, source, folder, **more), null)


def content(source, rest="", weights=True):
    """A pipeline as the content of a teacher's checkpoint (see harness/checkpoint.py).

    A bare network, such as the folder unet/ that train.py writes, needs `rest`, the pipeline that
    has its text encoder and autoencoder. Without `weights` they are left out.
    """
    folder = found(source)[0]
    if not (rest := rest or source * bool(folder)):
        raise UserError(f"{source} is a network without text encoder and autoencoder; name the "
                        "pipeline that has them by --teacher-checkpoint")
    shape = latents_of(source)
    cfg = make_config("captioned", teacher_checkpoint=rest,
                      image_size=LATENT_DOWNSAMPLING * shape[1])
    return {"scflow": 1, "kind": "teacher", "config": asdict(cfg), "shape": shape, "step": 0,
            "ema": velocity(source, rest).state_dict() if weights else {}}


# ---------------------------------------------------------------------------------------- texts


@lru_cache
def texts_of(source):
    """The text encoder of a pipeline; it is data, so no checkpoint holds it."""
    return (Texts3 if found(source)[1] == "SD3Transformer2DModel" else Texts)(source)


class Texts:
    """CLIP's text model: a list of texts -> embeddings, float32 (n, L, D); null is that of ""."""

    def __init__(self, source):
        self.tokenizer = part(library("transformers").CLIPTokenizer, source, "tokenizer")
        self.length, self.told = self.tokenizer.model_max_length, False
        self.load(source)
        self.null = self([""], "cpu")[0]

    def load(self, source):
        self.model = part(library("transformers").CLIPTextModel, source, "text_encoder")

    def __call__(self, texts, device):
        for text in texts if not self.told else ():
            if len(self.tokenizer(text).input_ids) > self.length:
                print(f"longer than {self.length} tokens; the end is cut, and that of others, too: "
                      f"{text}")
                self.told = True
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            return self.embed(list(texts), device)

    def embed(self, texts, device):
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.length,
                             return_tensors="pt").input_ids
        return self.model.to(device)(ids.to(device))[0]


class Texts3(Texts):
    """The two or three text models of Stable Diffusion 3, packed for StableDiffusion3."""

    def load(self, source):
        kind = library("diffusers").StableDiffusion3Pipeline
        listed = kind.load_config(source)
        absent = [name for name in OPTIONAL if not listed.get(name, [None])[0]]
        self.pipeline = part(kind, source, None, **dict.fromkeys([*absent, "transformer", "vae"]))
        # without T5 its place is filled with zeros, of the width that the transformer has
        self.pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**found(source)[2]))
        if self.pipeline.text_encoder_3 is not None:
            self.pipeline.text_encoder_3.bfloat16()            # 4.7 billion parameters

    def embed(self, texts, device):
        words, _, pooled, _ = self.pipeline.to(device).encode_prompt(
            texts, None, None, device=device, do_classifier_free_guidance=False)
        return torch.cat([words, F.pad(pooled, (0, words.shape[2] - pooled.shape[1]))[:, None]], 1)
