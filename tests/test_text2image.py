"""Text to image with Stable Diffusion: tiny random pipelines of the same classes, the same code."""

import copy
import csv
import io
import json
import re
import shutil
import sys
import tarfile
import zipfile
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import model
import sample
import train
from config import make_config
from harness import UserError
from harness.saved import conditions_of, open_decoder, open_network
from running import files, gen, half, is_picture, read, refused, rows, same, works
from test_parallel import all_work, assert_close
from test_runs import commands_of

for name in ("diffusers", "transformers", "datasets"):
    pytest.importorskip(name, reason=f"text to image needs the package {name}")

import captioned
import datasets
import text2image
from study import clip, memory
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel)
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig,
                          CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer)

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The hub is out of reach: it says so at once, not after half a minute of trying."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


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


def autoencoder():
    return AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1,
                         down_block_types=("DownEncoderBlock2D",) * 4, sample_size=64,
                         up_block_types=("UpDecoderBlock2D",) * 4)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Folders of a tiny Stable Diffusion 1.5 and a tiny Stable Diffusion 3, with random weights."""
    folder = tmp_path_factory.mktemp("pipelines")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        words = tokenizer()
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        StableDiffusionPipeline(
            vae=autoencoder(), text_encoder=CLIPTextModel(text_config(len(words))), tokenizer=words,
            unet=unet, scheduler=FlowMatchEulerDiscreteScheduler(), safety_checker=None,
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
        table = datasets.Dataset.from_dict({"url": part, "caption": ["not this one"] * len(part)})
        table.to_parquet(folder / f"{shard:05d}.parquet")
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


def of_zip(folder, some=SAMPLES):
    inside = of_metadata(folder.with_name("inside"), some)
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(inside.rglob("*.*")):
            archive.write(name, name.relative_to(inside))
    return path


def of_parquet(folder, some=SAMPLES):
    images = [{"bytes": image, "path": None} for image, _ in some.values()]
    datasets.Dataset.from_dict({"image": images, "caption": [text for _, text in some.values()]}
                               ).to_parquet(folder / "train-0.parquet")
    return folder


@pytest.mark.parametrize("layout", [of_tars, of_texts, of_metadata, of_zip, of_parquet,
                                    partial(of_metadata, kind="csv")])
def test_all_layouts_give_the_same_images_and_captions(layout):
    path = layout(Path("images"))
    found = [(text, get()) for _, text, get in captioned.samples(path)]
    assert found == [(text, image) for image, text in SAMPLES.values()]


# -------------------------------------------------------------------------------- the networks


def settings(pipeline, **more):
    return make_config("captioned", teacher_checkpoint=str(pipeline), data_dir="images",
                       image_size=64, device="cpu", threads=1, **dict(precision="fp32") | more)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_no_condition_is_the_empty_text(pipelines, name):
    net = text2image.velocity(str(pipelines / name))
    z, t = torch.randn(3, 4, 8, 8, generator=gen(0)), torch.rand(3, generator=gen(1))
    empty, some = (captioned.Prompts(str(pipelines / name), [text] * 3).to("cpu")
                   for text in ("", "a red ring"))
    assert net(z, t).shape == z.shape
    torch.testing.assert_close(net(z, t), net(z, t, empty))
    assert (net(z, t, some) - net(z, t)).abs().max() > 1e-3
    net.micro_batches = 3
    torch.testing.assert_close(net(z, t, some), torch.cat([
        text2image.velocity(str(pipelines / name))(z[i : i + 1], t[i : i + 1], some[i : i + 1])
        for i in range(3)]))


@torch.no_grad()
def test_euler_is_the_sampling_loop_of_instaflow(pipelines):
    """Its loop by its description: t' = 1000 (1 - i/N), z <- z + v'/N, v' guided, data - noise."""
    pipe = StableDiffusionPipeline.from_pretrained(pipelines / "sd")
    words, empty = (pipe.text_encoder(pipe.tokenizer(
        [text] * 2, padding="max_length", max_length=77, return_tensors="pt").input_ids)[0]
        for text in ("a photo of a cat", ""))
    noise, n, w = sample.noise((4, 8, 8), 2, seed=3), 5, 1.5
    z = noise
    for i in range(n):
        t = torch.full((2,), 1000 * (1 - i / n))
        null, v = pipe.unet(z, t, empty).sample, pipe.unet(z, t, words).sample
        z = z + (null + w * (v - null)) / n
    net = model.Guided(text2image.velocity(str(pipelines / "sd")), w)
    y = captioned.Prompts(str(pipelines / "sd"), ["a photo of a cat"] * 2)
    ours = sample.draw(net, (4, 8, 8), 2, n, seed=3, y=y)
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_transformer_gets_time_and_velocity_as_they_are(pipelines):
    pipe = StableDiffusion3Pipeline.from_pretrained(pipelines / "sd3", text_encoder_3=None,
                                                    tokenizer_3=None)
    words, _, pooled, _ = pipe.encode_prompt(["a cat"] * 2, None, None,
                                             do_classifier_free_guidance=False)
    z, t = torch.randn(2, 4, 8, 8, generator=gen(0)), torch.tensor([1.0, 0.25])
    wanted = pipe.transformer(z, words, pooled, 1000 * t).sample
    y = captioned.Prompts(str(pipelines / "sd3"), ["a cat"] * 2).to("cpu")
    assert y.shape == (2, 77 + 256 + 1, 64)
    torch.testing.assert_close(text2image.velocity(str(pipelines / "sd3"))(z, t, y), wanted)


def test_the_discriminator_is_the_encoder_half_of_the_unet(pipelines):
    z, cfg = torch.randn(3, 4, 8, 8, generator=gen(0)), settings(pipelines / "sd")
    y = captioned.Prompts(cfg.teacher_checkpoint, ["one", "two", "three"]).to("cpu")
    disc, net = model.discriminator(cfg, (4, 8, 8)), text2image.velocity(cfg.teacher_checkpoint)
    middle = []
    for part in (disc.encoder.mid_block, net.inner.mid_block):
        part.register_forward_hook(lambda module, args, answer: middle.append(answer))
    assert disc(z, y).shape == (3,)
    net(z, torch.zeros(3), y)
    assert torch.equal(middle[-1], middle[-2])
    disc.micro_batches = 3
    torch.testing.assert_close(disc(z, y), disc.forward(z, y))
    frozen = model.discriminator(replace(cfg, disc_trunk="frozen"), (4, 8, 8))
    assert {name.split(".")[0] for name in frozen.state_dict()} == {"head", "null"}
    assert all(p.requires_grad for p in disc.parameters())


def test_frozen_weights_in_bf16_change_nothing(pipelines):
    cfg = settings(pipelines / "sd", precision="bf16", disc_trunk="frozen")
    teacher = model.copy_of(text2image.velocity(cfg.teacher_checkpoint))
    whole = copy.deepcopy(teacher)
    whole.bf16 = True
    net = train.begin(teacher, teacher, cfg, (4, 8, 8), torch.device("cpu"))
    z, t = torch.randn(2, 4, 8, 8, generator=gen(0)), torch.tensor([1.0, 0.25])
    halves = [p for p in net.teacher.parameters() if p.dtype == torch.bfloat16]
    assert len(halves) > 20 and torch.equal(net.teacher(z, t), whole(z, t))
    for network in (net.student, net.target, net.ema):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {p.dtype for p in net.disc.parameters()} == {torch.float32}
    assert net.disc.frozen[0].conv_in.weight.dtype == torch.bfloat16


def test_the_full_size_network_and_its_memory():
    with torch.device("meta"):
        full = memory.stable_diffusion()
        disc = model.UNetDiscriminator(full, torch.zeros(77, 768))
        assert sum(p.numel() for p in memory.stable_diffusion().parameters()) == 859_520_964
    assert sum(p.numel() for p in disc.parameters()) == 353_958_913
    printed = works("study.memory")
    assert "859,520,964" in printed and "353,958,913" in printed and "24" in printed


# ------------------------------------------------------------------------------------- as a run


RUN = ("--dataset captioned --data-dir images --image-size 64 --batch-size 4 --n-gan 0 --n-bi 0 "
       "--steps 4 --log-every 1 --preview-every 9 --device cpu --threads 1")
WEIGHTS = ("student", "target", "ema", "disc", "opt", "opt_disc")


@pytest.fixture
def images():
    """A folder of captioned images."""
    return of_texts(Path("images"))


def finite(log):
    """The rows of a log, all of whose numbers are finite."""
    lines = rows(log)
    assert all(np.isfinite(float(v)) for line in lines for v in line.values() if v)
    return lines


EIGHT = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs the package bitsandbytes")


@pytest.mark.parametrize("flags", [
    "--precision fp32", "--precision bf16 --disc-trunk frozen",
    "--precision fp32 --preset paper --checkpointing --n-rf 0", pytest.param(
        "--precision bf16 --adam8bit --ema-on-cpu --disc-trunk frozen", marks=EIGHT)])
def test_four_losses_resumed_bit_for_bit(pipelines, images, no_pictures, flags):
    line = f"train.py {RUN} {flags} --teacher-checkpoint {pipelines}/sd"
    works(f"{line} --out whole")
    last = finite("whole/log.csv")[-1]
    assert all(last[name] for name in ("cd", "gan", "rf", "bi", "disc"))
    works(f"{line} --out parts --steps 2")
    works("train.py --dataset captioned --out parts --resume --steps 4")
    whole, parts = (read(f"{out}/student_resume.pt") for out in ("whole", "parts"))
    assert all(same(whole[name], parts[name]) for name in WEIGHTS)
    assert same(read("whole/student.pt")["ema"], read("parts/student.pt")["ema"])
    teacher, name = read("whole/teacher.pt")["ema"], "inner.conv_in.weight"
    assert not torch.equal(teacher[name], whole["student"][name])
    assert ("8bit" in flags) == ("__bnb_optimizer_quant_state__" in whole["opt"]["state"][0])


def test_two_processes_compute_what_one_computes(pipelines, images):
    line = f"train.py {RUN} --precision fp32 --teacher-checkpoint {pipelines}/sd"
    works(f"{line} --out one")
    assert is_picture("one/samples.png") and is_picture("one/losses.png")
    all_work(f"{line} --out two")
    assert_close(read("two/student.pt")["ema"], read("one/student.pt")["ema"])
    all_work(f"{line} --out frozen --steps 1 --n-rf 0 --disc-trunk frozen --precision bf16")
    assert all(finite("frozen/log.csv")[0][name] for name in ("cd", "gan", "rf", "bi"))


def test_the_baselines(pipelines, images, no_pictures):
    more = "--precision fp32 --steps 4 --pairs 6 --pair-steps 2"
    works(f"train.py {RUN} {more} --method reflow-distill --teacher-checkpoint {pipelines}/sd")
    folder = Path("runs/captioned-reflow-distill")
    finite(folder / "log.csv")
    works(f"train.py {RUN} {more} --method cd --teacher-checkpoint {folder}/teacher.pt")
    assert read("runs/captioned-cd/student.pt")["config"]["teacher_checkpoint"] == (
        f"{pipelines}/sd")


def test_stable_diffusion_3(pipelines, images, no_pictures):
    line = f"train.py {RUN} --precision fp32 --teacher-checkpoint {pipelines}/sd3"
    works(f"{line} --out four --steps 2")
    assert all(finite("four/log.csv")[-1][name] for name in ("cd", "gan", "rf", "bi"))
    works(f"{line} --out fgm --steps 2 --method fgm --precision bf16")
    assert finite("fgm/log.csv")[-1]["fgm"]
    again = SD3Transformer2DModel.from_pretrained("fgm/transformer")
    assert same({f"inner.{k}": v for k, v in again.state_dict().items()},
                {k: v for k, v in read("fgm/student.pt")["ema"].items() if k != "null"})
    works("sample.py --checkpoint fgm/student.pt --prompt 'a cat' --nfe 1 --n 2 --out cat.png")


def test_a_student_is_one_of_diffusers_too(pipelines, images, no_pictures):
    works(f"train.py {RUN} --precision fp32 --teacher-checkpoint {pipelines}/sd --out run")
    line = "sample.py --prompt 'a red cat' --nfe 1 --n 2 --seed 5 --precision fp32 --checkpoint"
    works(f"{line} run/student.pt --npz ours.npz")
    works(f"{line} run/unet --teacher-checkpoint {pipelines}/sd --png theirs")
    ours = np.load("ours.npz")["arr_0"]
    assert (np.stack([plt.imread(p) for p in sorted(Path("theirs").iterdir())]) * 255 == ours).all()
    refused(f"{line} run/unet", "run/unet", "--teacher-checkpoint")

    # the code of docs/text-to-image.md
    page = (ROOT / "docs" / "text-to-image.md").read_text()
    code = re.search(r"```python\n(.*)image = .*?```", page, re.S)[1].replace(
        "runs/captioned", "run").replace("XCLiu/2_rectified_flow_from_sd_1_5", f"{pipelines}/sd")
    exec(code, names := {})
    theirs = names["pipe"](["a red cat"] * 2, latents=sample.noise((4, 8, 8), 2, seed=5),
                           num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    network, _, cfg = open_network("run/student.pt", device="cpu", threads=1, precision="fp32")
    y = conditions_of(cfg, prompts=["a red cat"])(2)
    z0 = sample.draw(network, (4, 8, 8), 2, 1, seed=5, y=y)
    images = (open_decoder(cfg)(z0) + 1) / 2
    torch.testing.assert_close(theirs, images, atol=1e-5, rtol=0)
    assert abs(images.permute(0, 2, 3, 1).numpy() * 255 - ours).max() <= 0.5001


# ------------------------------------------------------------------------------------- bad input


def without(key, what):
    """The samples, one of them without its image (0) or its caption (1)."""
    some = dict(SAMPLES)
    some[key] = tuple(None if i == what else part for i, part in enumerate(some[key]))
    return some


@pytest.mark.parametrize("layout", [of_tars, of_texts, of_metadata, of_parquet])
@pytest.mark.parametrize("what, words", [(0, "has no image"), (1, "has no caption")])
def test_samples_without_image_or_caption_are_skipped_and_named(layout, what, words, capsys):
    path = layout(Path("images"), without("00004", what))
    encode(path)
    texts = captioned.captions_of(Path("latents/some.npy"))
    assert texts == [text for key, (_, text) in SAMPLES.items() if key != "00004"]
    assert np.load("latents/some.npy").shape == (19, 1, 2, 4, 8, 8)
    printed = capsys.readouterr().out
    assert "skipped 1 of 20 images: sample" in printed
    assert words in printed or "No such file" in printed
    assert ("sample 4," if layout is of_parquet else "00004") in printed


def encode(path, stop=None):
    """Encodes by made-up numbers; call number `stop` of the autoencoder fails."""
    calls = count()

    def numbers(pixels):
        if next(calls) == stop:
            raise KeyboardInterrupt
        return pixels.float().mean((1, 2, 3)).half()[:, None, None, None, None, None].expand(
            -1, 1, 2, 4, 8, 8)

    codec = SimpleNamespace(row=(1, 2, 4, 8, 8), vae=SimpleNamespace(scale=1), encode=numbers,
                            sample=lambda z: z)
    captioned.encode(SimpleNamespace(path=path), codec, Path("latents/some.npy"), 64)


@pytest.mark.parametrize("stop", [2, 15])
def test_an_interrupted_encoding_continues(stop):
    some = {f"{i:05d}": (picture(i) if i != 20 else b"no image", f"number {i}")
            for i in range(250)}
    path = of_metadata(Path("images"), some | {"99999": (picture(1), None)})
    encode(path)
    whole = {p.name: p.read_bytes() for p in Path("latents").iterdir()}
    shutil.rmtree("latents")
    with pytest.raises(KeyboardInterrupt):
        encode(path, stop=stop)
    encode(path)
    assert {p.name: p.read_bytes() for p in Path("latents").iterdir()} == whole


def test_damaged_captions_are_named(pipelines, images, no_pictures):
    line = f"train.py {RUN} --precision fp32 --teacher-checkpoint {pipelines}/sd"
    works(f"{line} --steps 1 --out one")
    (captions,) = Path("latents").glob("*.jsonl")
    half(captions)
    refused(f"{line} --out two", captions.name, "damaged", "delete it")
    captions.write_text("".join(captions.read_text().splitlines(True)[:-1]))
    refused(f"{line} --out two", ".jsonl", "does not fit", "delete them all")


def bad_images():
    for name, what in (("noimage", 0), ("nocaption", 1)):
        some = {key: without(key, what)[key] if int(key) < 3 else SAMPLES[key] for key in SAMPLES}
        of_tars(Path(name), some)
    of_metadata(Path("gone"))
    for path in sorted(Path("gone").rglob("*.jpg"))[:3]:
        path.unlink()
    half(of_tars(Path("cut")) / "00001.tar")
    for path in of_tars(Path("tables")).glob("*.tar"):
        path.unlink()
    Path("empty").mkdir(), Path("nothing").mkdir()
    tarfile.open("nothing/0.tar", "w").close()
    for path in of_texts(Path("latin")).rglob("*.txt"):
        path.write_bytes("grün".encode("latin-1"))
    of_metadata(Path("numbers"), {key: (image, 7) for key, (image, _) in SAMPLES.items()})
    rows = of_metadata(Path("other")) / "metadata.jsonl"
    rows.write_text(rows.read_text().replace('"text"', '"alt"'))
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        archive.writestr("a/1.jpg", picture(1))
    of_texts(Path("images"))


def bad_pipelines(pipelines):
    for name, change in (("sd2", {"cross_attention_dim": 48}), ("inpainting", {"in_channels": 9}),
                         ("sdxl", {"addition_embed_type": "text_time"}),
                         ("video", {"_class_name": "UNet3DConditionModel"}),
                         ("nosize", {"sample_size": None})):
        shutil.copytree(pipelines / "sd", name)
        file = Path(name, "unet", "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    shutil.copytree(pipelines / "sd", "half")
    half(Path("half/unet/diffusion_pytorch_model.safetensors"))
    shutil.copytree(pipelines / "sd", "notext")
    shutil.rmtree("notext/text_encoder")
    shutil.copytree(pipelines / "sd", "nowords")
    for path in set(Path("nowords/tokenizer").iterdir()) - {
            Path("nowords/tokenizer/tokenizer_config.json")}:
        path.unlink()
    shutil.copytree(pipelines / "sd", "nodict")
    Path("nodict/unet/config.json").write_text("[]")


BAD = [
    ("--data-dir noimage", "1 %", "2 of 20", "sample 0, 00000, has no image"),
    ("--data-dir nocaption", "1 %", "2 of 20", "sample 0, 00000, has no caption"),
    ("--data-dir gone", "1 %", "2 of 20", "No such file", "00000.jpg"),
    ("--data-dir latin", "1 %", "2 of 20", "no text in UTF-8"),
    ("--data-dir numbers", "1 %", "2 of 20", "no text in UTF-8"),
    ("--data-dir other", "no column of captions", "alt"),
    ("--data-dir nothing", "no captioned images"),
    ("--data-dir pictures.zip", "no column of captions"),
    ("--data-dir cut", "cut/00001.tar", "cut short"),
    ("--data-dir tables", "no column of images", "url, caption"),
    ("--data-dir empty", "no captioned images"),
    ("--data-dir nowhere", "nowhere", "--data-dir"),
    ("--data-dir ''", "needs --data-dir"),
    ("--teacher-checkpoint ''", "needs --teacher-checkpoint", "XCLiu/2_rectified_flow_from_sd_1_5"),
    ("--teacher-checkpoint nobody/nothing", "nobody/nothing", "hub"),
    ("--teacher-checkpoint sd2", "sd2", "another architecture", "cross_attention_dim"),
    ("--teacher-checkpoint inpainting", "inpainting", "another architecture", "in_channels"),
    ("--teacher-checkpoint sdxl", "sdxl", "another architecture", "addition_embed_type"),
    ("--teacher-checkpoint video", "UNet3DConditionModel"),
    ("--teacher-checkpoint nosize", "nosize holds a", "None"),
    ("--teacher-checkpoint nodict", "nodict holds no pipeline"),
    ("--teacher-checkpoint nowords", "tokenizer of", "nowords"),
    ("--teacher-checkpoint half", "the unet of", "half"),
    ("--teacher-checkpoint notext", "text_encoder of", "notext"),
    ("--r1 1", "--r1 1.0", "attention"),
    ("--vae pipeline --vae-weights sd.bin", "--vae pipeline has its own weights", "--vae sd"),
    ("--eval-every 5", "--eval-every is not for captioned", "evaluate.py --prompts"),
    ("--model tiny", "--model", "captioned"),
    ("--vae taef2", "(32, 8, 8)"),
    ("--condition none --guidance 1", "--condition none"),
    ("--image-size 128", "(4, 8, 8)", "--image-size 64"),
]


def test_bad_input(pipelines, no_pictures):
    bad_images(), bad_pipelines(pipelines)
    works(f"train.py {RUN} --steps 1 --teacher-checkpoint {pipelines}/sd")
    before = files("runs")
    for flags, *named in BAD:
        refused(f"train.py {RUN} --teacher-checkpoint {pipelines}/sd --overwrite {flags}",
                *named)
    assert files("runs") == before


def test_a_missing_package_is_named(pipelines, monkeypatch, images):
    line = f"train.py {RUN} --teacher-checkpoint {pipelines}/sd"
    for names in ("diffusers", "transformers", "datasets", "diffusers transformers",
                  "diffusers datasets", "transformers datasets"):
        with monkeypatch.context() as patch:
            for name in names.split():
                patch.setitem(sys.modules, name, None)
            for cached in (text2image.found, text2image.texts_of):
                cached.cache_clear()
            refused(line, f"this needs {names.replace(' ', ' and ')}", f"pip install {names}")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(f"{line} --adam8bit", "bitsandbytes", "pip install bitsandbytes")


def test_what_sampling_refuses_and_says(pipelines, images, no_pictures):
    line = f"sample.py --checkpoint {pipelines}/sd --nfe 1 --n 2 --out some.png"
    printed = works(f"{line} --prompt '{'a cat ' * 30}'")
    assert "longer than 77 tokens" in printed and is_picture("some.png")
    refused("sample.py --checkpoint nobody/nothing --nfe 1", "nobody/nothing", "hub")
    refused("sample.py --checkpoint nobody/nothing.pt --nfe 1", "no checkpoint nobody/nothing.pt")
    refused(f"{line} --class 1", "--class")
    Path("full").mkdir(), Path("full/note.txt").touch()
    refused(f"sample.py --checkpoint {pipelines}/sd --nfe 1 --n 2 --png full", "full", "--png")

    # a student whose pipeline has moved
    works(f"train.py {RUN} --steps 1 --teacher-checkpoint {pipelines}/sd --out run")
    content = read("run/student.pt")
    content["config"]["teacher_checkpoint"] = "/gone/sd"
    torch.save(content, "run/moved.pt")
    line = "sample.py --checkpoint run/moved.pt --nfe 1 --n 2 --out moved.png"
    refused(line, "/gone/sd", "--teacher-checkpoint")
    works(f"{line} --teacher-checkpoint {pipelines}/sd")
    for flags, *named in (("--teacher-checkpoint ''", "--teacher-checkpoint"),
                          ("--prompts ''", "--prompts"), ("--prompt a --prompts b", "not allowed"),
                          ("--teacher-checkpoint nowhere", "nowhere", "hub")):
        refused(f"{line} {flags}", *named)
    refused("sample.py --checkpoint images --nfe 1", "images", "unet/config.json")


# ------------------------------------------------------------------------------------ evaluation


@pytest.fixture
def small_clip(pipelines):
    """A folder with a tiny random CLIP."""
    words = CLIPTokenizer.from_pretrained(pipelines / "sd" / "tokenizer")
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                  image_size=32, patch_size=16)
    torch.manual_seed(1)
    CLIPModel(CLIPConfig(text_config=text_config(len(words)).to_dict(), vision_config=vision,
                         projection_dim=16)).save_pretrained("clip")
    CLIPProcessor(image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
                  tokenizer=words).save_pretrained("clip")
    return Path("clip")


def test_clip_score_is_a_cosine_and_knows_its_pairs(small_clip):
    score = clip.Score(str(small_clip))
    pictures = torch.rand(4, 3, 64, 64, generator=gen(0)) * 2 - 1
    prompts = ["a cat", "a dog on a red sofa", "soup", "a lighthouse at sunset"]
    (name, values), = score(pictures, None, prompts).items()
    assert name == "CLIP score (clip)" and values.shape == (4,) and values.abs().max() <= 1
    order = [2, 0, 3, 1]
    again = score(pictures[order], None, [prompts[i] for i in order])[name]
    torch.testing.assert_close(again, values[order])
    other = score(pictures, None, prompts[1:] + prompts[:1])[name]
    assert (other - values).abs().min() > 1e-4


def test_prompts_come_from_lines_or_pairs():
    Path("a.txt").write_text("a cat\n\n  a dog \n")
    Path("a.json").write_text('[["1.jpg", "a cat"], ["2.jpg", "a dog"]]')
    assert sample.read_prompts("a.txt") == sample.read_prompts("a.json") == ["a cat", "a dog"]
    Path("notepad.txt").write_text("a cat\na dog", encoding="utf-8-sig")
    assert sample.read_prompts("notepad.txt") == ["a cat", "a dog"]
    Path("b.json").write_text('{"no": "list"}')
    Path("empty.json").write_text('["a cat", " "]')      # all later prompts would belong to others
    Path("c.json").write_text('[["1.jpg", ["a cat"]]]')
    Path("d.txt").write_text("\n \n"), Path("e.txt").write_bytes(b"gr\xfcn")
    for name in ("b.json", "c.json", "d.txt", "e.txt", "none.txt", "empty.json"):
        with pytest.raises(UserError, match=name):
            sample.read_prompts(name)


def test_numbered_samples_have_the_order_of_their_numbers():
    Path("many").mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (i, i, i)).save(f"many/{i}.png")
    assert clip.read_samples("many")[:, 0, 0, 0].tolist() == list(range(12))
    np.save("one.npy", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="one.npy"):
        clip.read_samples("one.npy")


def test_the_commands_of_the_page(pipelines, small_clip, no_pictures):
    """Every command of docs/text-to-image.md, with other names and flags that make it small."""
    of_tars(Path("SHARDS")), of_texts(Path("COCO/val2014"))
    Path("prompts.txt").write_text("\n".join(text for _, text in SAMPLES.values()))
    Path("own.py").write_text("def few(x): return x[:, :, ::16, ::16].flatten(1)[:, :5]\n")
    names = {"XCLiu/2_rectified_flow_from_sd_1_5": f"{pipelines}/sd", "5000": "20", "1024": "64",
             "haopt/scflow_t2i": f"{pipelines}/sd", "openai/clip-vit-large-patch14": "clip",
             "stabilityai/stable-diffusion-3-medium-diffusers": f"{pipelines}/sd3"}
    machine = "--device cpu --threads 1 --precision fp32".split()
    train = "--steps 2 --batch-size 4 --n-gan 0 --n-bi 0 --image-size 64 --overwrite".split()
    more = {"train.py": [*train, *machine], "sample.py": ["--n", "20", *machine],
            "evaluate.py": ["--features", "own:few", *machine]}
    if not find_spec("bitsandbytes"):
        names["--adam8bit"] = "--overwrite"
    printed = []
    for script, *given in commands_of(ROOT / "docs" / "text-to-image.md"):
        given = [names.get(word, word) for word in given]
        if "other.npz" in given:
            works("sample.py --dataset captioned --nfe 1 --n 20 --npz other.npz", *machine)
        small = [] if "--resume" in given else more.get(script, [])
        printed.append(works(script, *given, *small))
    assert {"teacher.pt", "student.pt", "student_resume.pt", "unet", "transformer"} <= {
        path.name for path in Path("runs").glob("captioned*/*")}

    refused("evaluate.py --dataset captioned --nfe 1", "--real")

    # one table for the teacher and its student, and one for samples in both kinds of files
    table, samples = (text for text in printed if "Frechet" in text)
    for words in ("teacher, w = 1.5", "student", "CLIP score (clip)", "20 samples against 20",
                  "centre crop, Lanczos to 64 x 64"):
        assert words in table
    assert samples.splitlines()[-2].split("|")[2:] == samples.splitlines()[-1].split("|")[2:]


def test_what_measuring_refuses(images, small_clip):
    np.savez("some.npz", arr_0=np.zeros((4, 64, 64, 3), np.uint8))
    Path("empty").mkdir()
    Path("two.txt").write_text("a cat\na dog"), Path("own.py").write_text("few = len")
    for line, *named in (("some.npz", "--real"), ("two.txt --real images", "two.txt", "arr_0"),
                         ("some.npz --real images --clip clip --prompts two.txt", "--prompts"),
                         ("some.npz --real images --clip nobody/clip", "nobody/clip"),
                         ("some.npz --real empty --features own:few", "empty holds", "--real"),
                         ("some.npz --real images --prompts none.txt", "none.txt"),
                         ("some.npz --real images --prompts two.txt", "--prompts", "--clip"),
                         ("some.npz --real images --out a --n 50", "--out, --n"),
                         ("some.npz --real images --checkpoint a.pt --median --seeds 2 "
                          "--guidance 2 --dataset mnist", "--checkpoint, --median, --guidance, "
                          "--seeds, --dataset mnist")):
        refused(f"evaluate.py --samples {line}", *named)


def test_a_run_goes_on_when_its_pipeline_has_moved(pipelines, images, no_pictures):
    shutil.copytree(pipelines / "sd", "here")
    works(f"train.py {RUN} --precision fp32 --steps 1 --teacher-checkpoint here --out run")
    Path("here").rename("there")
    text2image.found.cache_clear(), text2image.texts_of.cache_clear()
    line = "train.py --out run --resume --steps 2"
    refused(line, "here", "--teacher-checkpoint")
    refused(f"{line} --teacher-checkpoint run/teacher.pt", "leave --teacher-checkpoint out")
    works(f"{line} --teacher-checkpoint there")
    assert read("run/student.pt")["config"]["teacher_checkpoint"] == str(Path("there").absolute())


def test_the_teacher_by_a_command_of_its_own(pipelines, images, no_pictures):
    works(f"teacher.py {RUN} --precision fp32 --teacher-checkpoint {pipelines}/sd")
    assert read("runs/captioned/teacher.pt")["shape"] == (4, 8, 8)
