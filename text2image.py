"""Text to image: pipelines of Stable Diffusion as networks of this project.

A pipeline is a folder in diffusers' layout, or an id on the Hugging Face hub. Its parts are unet/
(Stable Diffusion 3: transformer/), text_encoder/, tokenizer/ and vae/. Conventions: InstaFlow's
UNet takes t' = 1000 t and answers v' = data - noise = -v; Stable Diffusion 3 takes the same t'
and answers v' = noise - data = v. A condition y is the embedding of a text, float32 (B, L, D).
"""

from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from config import LATENT_DOWNSAMPLING, make_config
from harness import UserError, first_line
from harness.hub import ADVICE, library, part
from harness.machine import VelocityNetwork


class StableDiffusion(VelocityNetwork):
    """v(zt, t, y) by diffusers' UNet; for SD 1.5 y is CLIP's last hidden state, (B, 77, 768).

    y = None is the null condition, the embedding of the empty text: a buffer, (L, D).
    """

    subfolder = "unet"

    def __init__(self, inner, null):
        super().__init__()
        self.inner = inner
        self.register_buffer("null", null)

    def forward(self, zt, t, y=None):
        y = self.null.expand(len(zt), -1, -1) if y is None else y
        return self.velocity(zt, 1000 * t, y)

    def velocity(self, zt, t, y):
        return -self.inner(zt, t, y).sample

    @property
    def checkpointing(self):
        return self.inner.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted):               # harness.machine.prepare sets it
        if wanted:
            self.inner.enable_gradient_checkpointing()

    def save(self, folder):
        """Writes the network as FOLDER/unet or FOLDER/transformer in diffusers' layout."""
        self.inner.save_pretrained(folder / self.subfolder)


class StableDiffusion3(StableDiffusion):
    """v(zt, t, y) by the transformer of Stable Diffusion 3.

    It takes embeddings of the words, (B, L, D), and one pooled embedding (B, P), P <= D. Both
    travel as one y, (B, L + 1, D): the last row is the pooled one, with zeros behind it.
    """

    subfolder = "transformer"

    def velocity(self, zt, t, y):
        pooled = y[:, -1, : self.inner.config.pooled_projection_dim]
        return self.inner(zt, y[:, :-1], pooled, t).sample


ADAPTERS = {"UNet2DConditionModel": StableDiffusion, "SD3Transformer2DModel": StableDiffusion3}

# ------------------------------------------------------------------------------------ pipelines


@lru_cache
def found(source):
    """(subfolder, class, config) of the velocity network in a pipeline, or of a bare network.

    Raises UserError if there is none, or if it takes more than latent, time and text.
    """
    pipelines, folder = library("diffusers"), None             # of a network alone
    with suppress(OSError, ValueError):            # ValueError: no valid JSON
        listed = pipelines.DiffusionPipeline.load_config(source)
        folder = "transformer" if listed.get("transformer", [None])[0] else "unet"
    try:
        config = pipelines.UNet2DConditionModel.load_config(source, subfolder=folder)
    except (OSError, ValueError) as e:             # no such id, no network, no such file
        raise UserError(f"{source} holds no pipeline of Stable Diffusion that can be read "
                        f"({first_line(e)}); {ADVICE}") from e
    kind = config.get("_class_name")
    if kind not in ADAPTERS:
        raise UserError(f"{source} holds a {kind}, not one of {' and '.join(ADAPTERS)}; {ADVICE}")
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim", "in_channels"):
        if config.get(name) not in (None, config["out_channels"]):
            raise UserError(f"{source} holds a UNet of another architecture, such as SDXL's ("
                            f"{name} is {config[name]}); name one like Stable Diffusion 1.5's")
    return folder, kind, config


def latents_of(source):
    """The shape (C, h, w) of the latents that a pipeline's network takes."""
    config = found(source)[2]
    return config["in_channels"], config["sample_size"], config["sample_size"]


def velocity(source, rest="", weights=True):
    """The velocity network of a pipeline, or a bare network with the text encoder of `rest`.

    Without `weights` they are random, for others to be loaded. Raises UserError if text encoder
    and network do not fit.
    """
    folder, kind, config = found(source)
    null, kind, adapter = texts_of(rest or source).null.clone(), getattr(
        library("diffusers"), kind), ADAPTERS[kind]
    width = config.get("cross_attention_dim") or config.get("joint_attention_dim")
    if null.shape[1] != width:
        raise UserError(f"{source} holds a network of another architecture: it takes {width} "
                        "numbers per word (cross_attention_dim), and the text encoder of "
                        f"{rest or source} gives {null.shape[1]}; name a pipeline that fits")
    if not weights:
        return adapter(kind.from_config(config), null)
    return adapter(part(kind, source, folder, low_cpu_mem_usage=False), null)


def content(source, rest="", weights=True):
    """A pipeline as the content of a teacher's checkpoint (see harness/checkpoint.py).

    A bare network, such as the folder unet/ that train.py writes, needs `rest`, the pipeline that
    has its text encoder and autoencoder. Without `weights` they are left out.
    """
    if not (rest := rest or source * bool(found(source)[0])):
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
                print(f"longer than {self.length} tokens, so its end is cut: {text}")
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
        absent = [name for name in ("text_encoder_3", "tokenizer_3", "image_encoder",
                                    "feature_extractor") if not listed.get(name, [None])[0]]
        self.pipeline = part(kind, source, None, **dict.fromkeys([*absent, "transformer", "vae"]))
        # without T5 its place is filled with zeros, of the width that the transformer has
        self.pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**found(source)[2]))
        if self.pipeline.text_encoder_3 is not None:
            self.pipeline.text_encoder_3.bfloat16()            # 4.7 billion parameters

    def embed(self, texts, device):
        words, _, pooled, _ = self.pipeline.to(device).encode_prompt(
            texts, None, None, device=device, do_classifier_free_guidance=False)
        return torch.cat([words, F.pad(pooled, (0, words.shape[2] - pooled.shape[1]))[:, None]], 1)
