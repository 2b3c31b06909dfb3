"""Text to image with Stable Diffusion: tiny random pipelines of the same classes, the same code."""

import csv
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import sample
import train
from config import make_config
from running import files, gen, half, is_picture, read, refused, rows, same, works

for name in ("diffusers", "transformers", "datasets"):
    pytest.importorskip(name, reason=f"text to image needs the package {name}")

import captioned
import text2image
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel)
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection,
                          CLIPTokenizer)

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


# ------------------------------------------------------------------------------ tiny pipelines


def tokenizer():
    """CLIP's tokenizer with single characters as its whole vocabulary."""
    characters = [chr(c) for c in range(33, 127)]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    Path("vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    Path("merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer("vocab.json", "merges.txt", model_max_length=77)


def text_config(words, width=32):
    return CLIPTextConfig(vocab_size=words, hidden_size=width, intermediate_size=2 * width,
                          num_hidden_layers=2, num_attention_heads=2, projection_dim=width,
                          max_position_embeddings=77, bos_token_id=words - 2,
                          eos_token_id=words - 1)


def autoencoder(channels=4):
    return AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1,
                         down_block_types=("DownEncoderBlock2D",) * 4,
                         up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels,
                         sample_size=64)


def unet(**more):
    return UNet2DConditionModel(**dict(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4) | more)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Folders of a tiny Stable Diffusion 1.5 and a tiny Stable Diffusion 3, with random weights."""
    folder = tmp_path_factory.mktemp("pipelines")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        words = tokenizer()
        StableDiffusionPipeline(
            vae=autoencoder(), text_encoder=CLIPTextModel(text_config(len(words))), tokenizer=words,
            unet=unet(), scheduler=FlowMatchEulerDiscreteScheduler(), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False).save_pretrained("sd")
        encoders = [CLIPTextModelWithProjection(text_config(len(words), w)) for w in (16, 32)]
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
            caption_projection_dim=32, pooled_projection_dim=48, pos_embed_max_size=8)
        StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder(), text_encoder=encoders[0], tokenizer=words,
            text_encoder_2=encoders[1], tokenizer_2=words, text_encoder_3=None,
            tokenizer_3=None).save_pretrained("sd3")
    return folder


# ------------------------------------------------------------------------------ captioned images


def picture(i, size=64, kind="JPEG"):
    random = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(random).resize((size, size)).save(file, kind)
    return file.getvalue()


SAMPLES = {f"{i:05d}": (picture(i), f"picture number {i}, of noise") for i in range(20)}


def of_tars(folder, some=SAMPLES):
    """Two shards of img2dataset, with the tables that it writes beside them."""
    import pyarrow
    import pyarrow.parquet
    folder.mkdir()
    keys = [*some]
    for shard, part in enumerate((keys[:9], keys[9:])):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for key in part:
                image, text = some[key]
                about = {"jpg": image, "json": b'{"key": 1}', "txt": text and text.encode()}
                for suffix, content in about.items():
                    if content is not None:
                        entry = tarfile.TarInfo(f"{key}.{suffix}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
        table = pyarrow.table({"url": part, "caption": ["not this one"] * len(part)})
        pyarrow.parquet.write_table(table, folder / f"{shard:05d}.parquet")
    return folder


def of_texts(folder, some=SAMPLES):
    for key, (image, text) in some.items():
        path = folder / key[:4] / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if image is not None:
            path.write_bytes(image)
        if text is not None:
            path.with_suffix(".txt").write_text(text)
    return folder


def of_metadata(folder, some=SAMPLES, kind="jsonl"):
    of_texts(folder, {key: (image, None) for key, (image, _) in some.items()})
    rows = [{"file_name": f"{key[:4]}/{key}.jpg", "text": text} for key, (_, text) in some.items()
            if text is not None]
    with open(folder / f"metadata.{kind}", "w", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader(), writer.writerows(rows)
    return folder


def of_csv(folder, some=SAMPLES):
    return of_metadata(folder, some, "csv")


def of_zip(folder, some=SAMPLES):
    inside = of_metadata(folder.with_name("inside"), some)
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(inside.rglob("*.*")):
            archive.write(name, name.relative_to(inside))
    return path


def of_parquet(folder, some=SAMPLES):
    import pyarrow
    import pyarrow.parquet
    folder.mkdir()
    table = pyarrow.table({"image": [{"bytes": image, "path": None} for image, _ in some.values()],
                           "caption": [text for _, text in some.values()]})
    pyarrow.parquet.write_table(table, folder / "train-0.parquet")
    return folder


LAYOUTS = (of_tars, of_texts, of_metadata, of_csv, of_zip, of_parquet)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_give_the_same_images_and_captions(layout):
    path = layout(Path("images"))
    found = [(text, get()) for _, text, get in captioned.samples(path)]
    assert found == [(text, image) for image, text in SAMPLES.values()]
    again = [text for _, text, _ in captioned.samples(path, start=13)]
    assert again == [text for _, text in SAMPLES.values()][13:]


# ------------------------------------------------------------------------------------- as a run


def settings(pipeline, images="images", **more):
    return make_config("captioned", teacher_checkpoint=str(pipeline), data_dir=str(images),
                       image_size=64, device="cpu", threads=1, precision="fp32", **more)


RUN = ("--dataset captioned --data-dir images --image-size 64 --batch-size 4 --n-gan 0 --n-bi 0 "
       "--log-every 1 --preview-every 3 --device cpu --threads 1 --precision fp32")


def test_it_runs(pipelines):
    of_texts(Path("images"))
    works(f"train.py {RUN} --steps 3 --teacher-checkpoint {pipelines}/sd")
