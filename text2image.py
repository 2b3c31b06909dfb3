"""Text to image: pipelines of Stable Diffusion as networks of this project.

A pipeline is a folder in diffusers' layout, or an id on the Hugging Face hub. Its parts are unet/
(Stable Diffusion 3: transformer/), text_encoder/, tokenizer/ and vae/. Conventions: InstaFlow's
UNet takes t' = 1000 t and answers v' = data - noise = -v; Stable Diffusion 3 takes the same t'
and answers v' = noise - data = v. A condition y is the embedding of a text, float32 (B, L, D).
"""

from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from config import LATENT_DOWNSAMPLING, make_config
from harness import UserError, first_line
from harness.hub import ADVICE, library, part
from harness.machine import VelocityNetwork


KINDS = ("UNet2DConditionModel", "SD3Transformer2DModel")


class StableDiffusion(VelocityNetwork):
    """v(zt, t, y) by diffusers' UNet, or by the transformer of Stable Diffusion 3.

    For SD 1.5 y is CLIP's last hidden state, (B, 77, 768). The transformer takes embeddings of the
    words, (B, L, D), and one pooled embedding (B, P), P <= D. Both travel as one y, (B, L + 1, D):
    the last row is the pooled one, with zeros behind it. y = None is the null condition, the
    embedding of the empty text: a buffer, (L, D).
    """

    def __init__(self, inner, null):
        super().__init__()
        self.inner, self.is_unet = inner, hasattr(inner, "down_blocks")
        self.register_buffer("null", null)

    def forward(self, zt, t, y=None):
        y = self.null.expand(len(zt), -1, -1) if y is None else y
        if self.is_unet:
            return -self.inner(zt, 1000 * t, y).sample
        pooled = y[:, -1, : self.inner.config.pooled_projection_dim]
        return self.inner(zt, y[:, :-1], pooled, 1000 * t).sample

    def save(self, folder):
        """Writes the network as FOLDER/unet or FOLDER/transformer in diffusers' layout."""
        self.inner.save_pretrained(folder / ("unet" if self.is_unet else "transformer"))


@lru_cache
def found(source):
    """The velocity network of a pipeline, or a bare network: folder, kind, config, latents' shape.

    Raises UserError if there is none, or if it takes more than latent, time and text.
    """
    if Path(source).is_absolute() and not Path(source).exists():
        raise UserError(f"there is no {source}; if it has moved, name its new place by "
                        "--teacher-checkpoint")
    pipelines, folder = library("diffusers", "transformers", "datasets"), None
    # a network alone has no such file; another may hold no JSON, or no dictionary
    with suppress(OSError, ValueError, AttributeError):
        listed = pipelines.DiffusionPipeline.load_config(source)
        folder = "transformer" if listed.get("transformer", [None])[0] else "unet"
    try:
        config = pipelines.UNet2DConditionModel.load_config(source, subfolder=folder)
        kind, out = config.get("_class_name"), config.get("out_channels")
        shape = out, config.get("sample_size"), config.get("sample_size")
    except (OSError, ValueError, AttributeError) as e:         # or no such id, no network
        raise UserError(f"{source} holds no pipeline of Stable Diffusion that can be read "
                        f"({first_line(e)}); {ADVICE}") from e
    if kind not in KINDS or None in shape:
        raise UserError(f"{source} holds a {kind} for latents of shape {shape}, not a "
                        f"{' or '.join(KINDS)} of known shape; {ADVICE}")
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim", "in_channels"):
        if config.get(name) not in (None, out):
            raise UserError(f"{source} holds a UNet of another architecture, such as SDXL's ("
                            f"{name} is {config[name]}); name one like Stable Diffusion 1.5's")
    return SimpleNamespace(folder=folder, kind=kind, config=config, shape=shape)


def velocity(source, rest="", weights=True):
    """The velocity network of a pipeline, or a bare network with the text encoder of `rest`.

    Without `weights` they are random, for others to be loaded. Raises UserError if text encoder
    and network do not fit.
    """
    it, null = found(source), texts_of(rest or source).null.clone()
    width = it.config.get("cross_attention_dim") or it.config.get("joint_attention_dim")
    if null.shape[1] != width:
        raise UserError(f"{source} holds a network of another architecture: it takes {width} "
                        "numbers per word (cross_attention_dim), and the text encoder of "
                        f"{rest or source} gives {null.shape[1]}; name a pipeline that fits")
    network = getattr(library("diffusers"), it.kind)
    return StableDiffusion(part(network, source, it.folder, low_cpu_mem_usage=False) if weights
                           else network.from_config(it.config), null)


def content(source, rest="", weights=True):
    """A pipeline as the content of a teacher's checkpoint (see harness/checkpoint.py).

    A bare network, such as the folder unet/ that train.py writes, needs `rest`, the pipeline that
    has its text encoder and autoencoder. Without `weights` they are left out.
    """
    if not (rest := rest or source * bool(found(source).folder)):
        raise UserError(f"{source} is a network without text encoder and autoencoder; name the "
                        "pipeline that has them by --teacher-checkpoint")
    shape = found(source).shape
    cfg = make_config("captioned", teacher_checkpoint=rest,
                      image_size=LATENT_DOWNSAMPLING * shape[1])
    return {"kind": "teacher", "config": asdict(cfg), "shape": shape, "step": 0,
            "ema": velocity(source, rest).state_dict() if weights else {}}


class Texts:
    """The text encoder of a pipeline: a list of texts -> embeddings, float32 (n, L, D).

    It is data, so no checkpoint holds it. null is the embedding of "", (L, D).
    """

    def __init__(self, source):
        self.tokenizer = part(library("transformers", "datasets").CLIPTokenizer, source,
                              "tokenizer")
        self.length, self.told = self.tokenizer.model_max_length, False
        if self.tokenizer("a").input_ids == self.tokenizer("b").input_ids:
            raise UserError(f"the tokenizer of {source} knows no words: files of it are missing; "
                            "download it again")
        if found(source).kind == "UNet2DConditionModel":
            self.model = part(library("transformers").CLIPTextModel, source, "text_encoder")
            self.embed = self.clip
        else:
            self.pipeline, self.embed = encoders(source), self.packed
        self.null = self([""], "cpu")[0]

    def __call__(self, texts, device):
        long = [text for text in texts if len(self.tokenizer(text).input_ids) > self.length]
        if long and not self.told:                 # once is enough
            print(f"longer than {self.length} tokens, so its end is cut: {long[0]}")
            self.told = True
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            return self.embed(list(texts), device)

    def clip(self, texts, device):
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.length,
                             return_tensors="pt").input_ids
        return self.model.to(device)(ids.to(device))[0]

    def packed(self, texts, device):
        words, _, pooled, _ = self.pipeline.to(device).encode_prompt(
            texts, None, None, device=device, do_classifier_free_guidance=False)
        return torch.cat([words, F.pad(pooled, (0, words.shape[2] - pooled.shape[1]))[:, None]], 1)


def encoders(source):
    """Stable Diffusion 3's pipeline with nothing but its two or three text encoders."""
    kind = library("diffusers").StableDiffusion3Pipeline
    absent = [name for name, place in kind.load_config(source).items() if place == [None, None]]
    pipeline = part(kind, source, None, **dict.fromkeys([*absent, "transformer", "vae"]))
    # without T5 its place is filled with zeros, of the width that the transformer has
    pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**found(source).config))
    if pipeline.text_encoder_3 is not None:
        pipeline.text_encoder_3.bfloat16()         # 4.7 billion parameters
    return pipeline


texts_of = lru_cache(Texts)        # each pipeline's is loaded once
