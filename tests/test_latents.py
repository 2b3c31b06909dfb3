"""Images of any kind, their latents on disk, runs on them, and checkpoints of the official code.

Most tests use an autoencoder of one line, the mean of 8 x 8 pixels; the last ones TAEF2 itself.
"""

import errno
import io
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import config
import data
import latents
import model
import sample
import vae
from config import make_config
from harness import UserError, checkpoint
from harness.pictures import from_uint8, to_uint8
from harness.saved import open_network
from latents import decode_image
from running import copy_faces, gen, half, is_picture, read, refused, same, works

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
CPU = "--device cpu --threads 1"


class Pooling(nn.Module):
    """An autoencoder whose latents are weighted sums of the mean colours of 8 x 8 pixels."""

    scale = 0.5

    def __init__(self, channels=4, stochastic=True):
        super().__init__()
        self.channels, self.stochastic = channels, stochastic
        mix = torch.randn(channels, 3, generator=gen(channels))
        self.mix = nn.Parameter(mix, requires_grad=False)

    def encode(self, x):
        mean = torch.einsum("kc,bchw->bkhw", self.mix, F.avg_pool2d(x, 8))
        return mean, mean - 3 if self.stochastic else None

    def sample(self, mean, logvar=None, noise=None):
        return self.scale * (mean if noise is None else mean + (logvar / 2).exp() * noise)

    def decode(self, z0):
        colours = torch.einsum("ck,bkhw->bchw", torch.linalg.pinv(self.mix), z0 / self.scale)
        return F.interpolate(colours, scale_factor=8.0)


@pytest.fixture
def pooling(monkeypatch):
    """`vae.load` returns this network instead of a real one."""
    network = Pooling()
    monkeypatch.setattr(vae, "load", lambda name="sd", files=(): network)
    return network


# -------------------------------------------------------------------------------- decoding


def noise_image(mode="RGB", size=(64, 64), seed=0):
    random = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = size[::-1] if bands == 1 else (*size[::-1], bands)
    return Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), mode)


def encoded(image, kind="PNG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


RAMP = np.arange(4096).reshape(64, 64)             # 12 bits
TURNS = [None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90",
         "TRANSVERSE", "ROTATE_270"]               # from upright to stored, for EXIF 1 to 8


def grey_file(values, kind="TIFF"):
    return encoded(Image.fromarray(values), kind)


def resized(image, size=64):
    """The central square, resized to size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS,
                        box=(left, top, left + side, top + side))


def decode_table():
    """Rows of (name, file, the image that it shows, by how much its values may differ)."""
    rgb, grey, palette = noise_image(), noise_image("L"), noise_image("P")
    palette.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
    for image, kind, more in ((rgb, "PNG", {}), (rgb, "BMP", {}), (rgb, "TIFF", {}),
                              (rgb, "WEBP", {"lossless": True}), (palette, "GIF", {}),
                              (grey, "PNG", {}), (grey.convert("1"), "PNG", {})):
        yield f"{image.mode} {kind}", encoded(image, kind, **more), image, 0
    jpeg, red = encoded(rgb, "JPEG"), Image.new("RGB", (64, 64), (250, 10, 20))
    yield "JPEG", jpeg, Image.open(io.BytesIO(jpeg)), 0
    yield "CMYK", encoded(red.convert("CMYK"), "JPEG", quality=95), red, 10
    for size in ((64, 100), (65, 64), (64, 67), (150, 150), (201, 128)):
        image = noise_image(size=size)
        yield f"size {size}", encoded(image), resized(image), 0

    # grey of many bits keeps its contrast
    fine, coarse = RAMP * 16 + 15, Image.fromarray((RAMP // 16).astype(np.uint8))
    for bits, values in (("16", fine.astype(np.uint16)), ("12 in 16", RAMP.astype(np.uint16)),
                         ("8 in 32", (RAMP // 16).astype(np.int32)),
                         ("16 in 32", fine.astype(np.int32))):
        yield f"{bits} bits", grey_file(values), coarse, 0
    yield "16 bits in a PNG", grey_file(fine.astype(np.uint16), "PNG"), coarse, 0
    yield ("float 0 ... 1", grey_file((RAMP / 4095).astype(np.float32)),
           Image.fromarray(np.round(RAMP / 4095 * 255).astype(np.uint8)), 0)

    # transparency becomes white: of four stripes of black, one is clear and one is faint
    alpha = Image.fromarray(np.uint8([[0], [51], [255], [255]]).repeat(16, 0).repeat(64, 1))
    wanted = alpha.point(lambda a: 255 - a)
    for mode in ("L", "RGB"):
        image = Image.new(mode, (64, 64))
        image.putalpha(alpha)
        yield f"{mode} with alpha", encoded(image), wanted, 1
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 255, 200, 0, 0] + [0] * 762)
    image.paste(0, (0, 0, 32, 64))
    wanted = image.convert("RGB")
    wanted.paste("white", (0, 0, 32, 64))
    for kind in ("PNG", "GIF"):
        yield f"{kind} with a clear colour", encoded(image, kind, transparency=0), wanted, 0

    # each EXIF orientation
    upright, exif = Image.new("RGB", (80, 64), "red"), Image.Exif()
    for colour, left, top in (("lime", 40, 0), ("blue", 0, 32), ("white", 40, 32)):
        upright.paste(colour, (left, top, left + 40, top + 32))
    for exif[0x0112], turn in enumerate(TURNS, start=1):
        stored = upright.transpose(Image.Transpose[turn]) if turn else upright
        for kind, more in (("PNG", {}), ("JPEG", {"quality": 98, "subsampling": 0})):
            yield f"{turn} {kind}", encoded(stored, kind, exif=exif, **more), resized(upright), 8


def test_every_kind_of_file_shows_its_image(monkeypatch):
    for name, content, wanted, tolerance in decode_table():
        pixels = decode_image(content, 64)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 64, 64)
        gap = pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(wanted.convert("RGB"))
        assert abs(gap).max() <= tolerance, name

    # an orientation that Pillow cannot apply is ignored
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda image: 1 / 0)
    pixels = decode_image(encoded(noise_image()), 64).permute(1, 2, 0)
    assert np.array_equal(pixels, np.asarray(noise_image()))


def refusals():
    """Contents that are refused, and the reason."""
    jpeg, png = encoded(noise_image(), "JPEG"), encoded(noise_image())
    for content in (b"", b"text", jpeg[:200], jpeg[:-len(jpeg) // 2], png[:500], None,
                    b"GIF89a" + bytes(9), b"BM" + bytes(90)):
        yield content, "cannot be read"
    for width, height in ((63, 64), (64, 63), (200, 10), (1, 1)):
        yield (encoded(noise_image(size=(width, height))),
               f"^is {width} x {height}, smaller than 64 x 64$")
    for low, high, kind in ((-1, 9, np.int32), (0, 70_000, np.int32), (0.0, 1.5, np.float32),
                            (0.0, float("nan"), np.float32)):
        yield (grey_file(np.where(RAMP == 0, low, high).astype(kind)),
               "cannot be read .grey from .* to .*, not within 0")


def test_what_is_no_image_or_too_small_is_refused_in_one_line():
    for content, reason in refusals():
        with pytest.raises(ValueError, match=reason) as refusal:
            decode_image(content, 64)
        assert "\n" not in str(refusal.value) and "BytesIO" not in str(refusal.value)


def test_pillows_warnings_are_silent(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    images = latents.ImageFiles([("a", lambda: encoded(noise_image(size=(80, 80))))], list)
    with warnings.catch_warnings(record=True) as caught:
        assert [wrong for _, _, wrong in latents.decoded(images, 64)] == [None]
    assert not caught


# ---------------------------------------------------------------------- folder, zip, tables


def a_folder(path, n, size=(32, 32)):
    """n noise images in nested folders, by name in the order in which they are made."""
    for i in range(n):
        file = Path(path) / f"{'ab'[2 * i >= n]}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(noise_image(size=size, seed=i)))
    return Path(path)


def a_zip(path, folder):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in sorted(folder.rglob("*"), reverse=True):
            file.write(name, name.relative_to(folder))
    return path


def parquet_file(path, images, column="image", kind=None):
    import pyarrow
    import pyarrow.parquet
    kind = kind or pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    values = [{"bytes": content, "path": None} if pyarrow.types.is_struct(kind) else content
              for content in images]
    table = pyarrow.table({"label": [0] * len(images), column: pyarrow.array(values, kind)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def contents(folder):
    return [p.read_bytes() for p in sorted(Path(folder).rglob("*.png"))]


def a_parquet(path, folder, shards=3):
    images = contents(folder)
    for i in range(shards):
        part = images[i * len(images) // shards:(i + 1) * len(images) // shards]
        parquet_file(path / f"data/train-{i:05d}-of-{shards:05d}.parquet", part)
    return path


@pytest.fixture(autouse=True)
def tables_are_cached_here(tmp_path, monkeypatch):
    """The package datasets copies parquet files into its cache: here, not into the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def opened(path, **more):
    return latents.open_images(make_config("folder", data_dir=str(path), **more))


@pytest.fixture
def sources():
    folder = a_folder("images", 50)
    return [opened(path) for path in
            (folder, a_zip("images.zip", folder), a_parquet(Path("parquet"), folder))]


def test_all_kinds_give_the_same_images_in_the_same_order(sources):
    wanted = [decode_image(content, 32) for content in contents("images")]
    for source in sources:
        assert source.size == 50
        names, pixels, _ = zip(*latents.decoded(source, 32))
        assert list(names) == [name for name, _ in source.files]
        assert all(map(torch.equal, pixels, wanted))
    folder, archive, parquet = ([name for name, _ in source.files] for source in sources)
    assert folder == archive == sorted(folder) and folder[0] == "a/0000.png"
    assert parquet[15:17] == ["data/train-00000-of-00003.parquet, row 15",
                              "data/train-00001-of-00003.parquet, row 0"]


def test_hidden_files_and_files_that_are_no_images_do_not_count():
    folder = a_folder("images", 4)
    for name in (".hidden.png", "a/._0000.png", ".cache/0.png", "__MACOSX/a/0.png", "notes.txt",
                 "__MACOSX\\p\\._1.JPG", "x.incomplete/1.parquet", "a/._t.parquet", "noext"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "folder.png").mkdir()
    shutil.copy(folder / "a/0000.png", folder / "UPPER.PNG")
    for source in (opened(folder), opened(a_zip("images.zip", folder))):
        assert [name for name, _ in source.files] == [
            "UPPER.PNG", "a/0000.png", "a/0001.png", "b/0002.png", "b/0003.png"]


def test_pictures_of_other_formats_are_counted_and_named(pooling, capsys):
    a_folder("images", 3)
    for name, kind in (("1.jfif", "JPEG"), ("2.JPE", "JPEG"), ("3.avif", "AVIF")):
        if Path(name).suffix.lower() in latents.SUFFIXES:
            Path("images", name).write_bytes(encoded(noise_image(), kind))
    Path("phone").mkdir()
    for name in ("images/1.heic", "images/2.HEIC", "images/3.svg", "images/4.txt", "phone/1.heic"):
        Path(name).touch()
    assert latents.open_latents(settings()).size == 5 + (".avif" in latents.SUFFIXES)
    assert "3 pictures are left out, convert them: 2 .heic, 1 .svg" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no images.*1 .heic"):
        opened("phone")


def test_a_subfolder_that_cannot_be_read_is_named(monkeypatch):
    a_folder("images", 4)
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    refused(f"latents.py --data-dir images {CPU}", "images/b (Permission denied)")


def test_file_names_need_not_be_utf_8(pooling, capsys):
    a_folder("images", 3, size=(32, 32))
    for name in (b"images/caf\xe9.png", b"images/\xff.png"):
        shutil.copy("images/a/0000.png", os.fsdecode(name))
    Path(os.fsdecode(b"images/\xff.png")).write_bytes(b"no image")
    assert latents.open_latents(settings()).size == 4
    assert "\\udcff.png cannot be read" in capsys.readouterr().out.encode("ascii").decode()


def test_the_column_of_images_is_found():
    import pyarrow
    images = contents(a_folder("images", 6))
    parquet_file(Path("img/1.parquet"), images, column="img")
    parquet_file(Path("picture/1.parquet"), images, column="picture")
    parquet_file(Path("binary/1.parquet"), images, column="image", kind=pyarrow.binary())
    for folder in ("img", "picture", "binary"):
        assert [get() for _, get in opened(folder).files] == images
    parquet_file(Path("split/data/validation-00000-of-00001.parquet"), images[:2])
    assert opened("split").size == 2
    for i, some in enumerate((images[2:4], images[4:])):
        parquet_file(Path(f"split/data/train-0000{i}-of-00002.parquet"), some)
    assert [get() for _, get in opened("split").files] == images[2:]
    Path("split/data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="split holds 1 of 2 files"):
        opened("split")


def test_a_table_without_images_does_not_hide_the_images_beside_it():
    import pyarrow
    a_folder("images", 6)
    parquet_file(Path("images/metadata.parquet"), ["a", "b"], "text", pyarrow.string())
    for said in ("metadata.parquet has no column of images", "metadata.parquet cannot be read"):
        images = opened("images")
        assert images.size == 6 and said in images.note
        Path("images/metadata.parquet").write_bytes(b"PAR1")


# -------------------------------------------------------------------------------- the download


@pytest.fixture
def hub(monkeypatch):
    """Sets how many images --download gets, or the error that it meets."""
    import datasets
    load = datasets.load_dataset

    def answer(n=0, error=None):
        def load_dataset(name, revision, split, cache_dir):
            assert (name, split) == (latents.CELEBAHQ, "train") and len(revision) == 40
            if error:
                raise error
            parquet_file(Path("hub.parquet"), [encoded(noise_image(size=(32, 32)))] * n)
            return load("parquet", split=split, cache_dir=cache_dir, data_files={
                split: "hub.parquet", "validation": "hub.parquet"})
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return answer


def test_celebahq_is_downloaded_once_and_found_without_the_flag(hub, monkeypatch):
    monkeypatch.setattr(latents, "CELEBAHQ_SIZE", 20)
    hub(20)
    assert latents.open_images(make_config("celebahq", download=True)).size == 20
    hub(error=AssertionError("asked again"))
    for download in (True, False):
        images = latents.open_images(make_config("celebahq", download=download))
        assert images.size == 20 and decode_image(images.files[19][1](), 32).shape == (3, 32, 32)


def test_a_download_that_is_not_whole_is_never_taken(hub, pooling):
    line = f"latents.py --dataset celebahq --download --image-size 32 {CPU}"
    hub(error=OSError("We could not connect to 'the hub'\nCheck your connection"))
    for _ in range(2):                             # the second try finds what the first left
        refused(line, "korexyz/celeba-hq-256x256", "data/celebahq", "again")
    hub(20)
    for _ in range(2):
        refused(line, "data/celebahq holds 20 images, not the 28,000 of CelebA-HQ")
    assert not list(Path(".").rglob("*.npy"))


def test_the_other_splits_of_celebahq_are_accepted_and_named(hub, pooling, monkeypatch, capsys):
    monkeypatch.setattr(latents, "OTHER_SIZES", (24,))
    hub(24)
    cfg = make_config("celebahq", download=True, image_size=32)
    assert latents.open_latents(cfg).size == 24
    assert "the public training split has 28,000" in capsys.readouterr().out


def test_without_the_package_datasets_one_sentence_names_it(monkeypatch):
    a_parquet(Path("parquet"), a_folder("images", 3))
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(f"latents.py --data-dir parquet {CPU}", "pip install datasets")
    refused(f"latents.py --dataset celebahq --download {CPU}", "pip install datasets")


# -------------------------------------------------------------------------------- encoding


def settings(folder="images", **more):
    given = dict(data_dir=str(folder), image_size=32, precision="fp32")
    return make_config("folder", **given | more)


def the_file(folder="latents"):
    (path,) = Path(folder).glob("*.npy")
    return path


@pytest.mark.parametrize("stochastic", [True, False])
def test_the_file_holds_moments_of_images_and_mirror_images(stochastic, pooling):
    pooling.stochastic = stochastic
    a_folder("images", 37)
    opened = latents.open_latents(settings())
    array = np.load(the_file(), mmap_mode="r")
    planes = 2 if stochastic else 1
    assert array.shape == (37, 2, planes, 4, 4, 4) and array.dtype == np.float16
    assert opened.shape == (4, 4, 4) and opened.size == 37 and isinstance(opened.array, np.memmap)

    pixels = torch.stack([decode_image(c, 32) for c in contents("images")])
    for mirrored in (0, 1):
        x = from_uint8(pixels.flip(-1) if mirrored else pixels)
        wanted = torch.stack([m for m in pooling.encode(x) if m is not None], dim=1)
        assert np.array_equal(array[:, mirrored], wanted.half().numpy())


def test_encoding_is_float32_and_decoding_in_the_precision_of_the_run(pooling):
    bf16 = []
    pooling.encode = lambda x: (bf16.append(torch.is_autocast_enabled("cpu")) or x, None)
    pooling.decode = lambda z: bf16.append(torch.is_autocast_enabled("cpu")) or z.repeat(1, 1, 8, 8)
    for precision in ("fp32", "bf16"):
        codec = latents.Codec(pooling, settings(precision=precision))
        assert codec.encode(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).dtype == torch.half
        images = codec.decode(torch.full((40, 3, 4, 4), 2.0))
        assert images.dtype == torch.float32 and images.eq(1).all() and len(images) == 40
    assert bf16 == [False] * 7 + [True] * 3


def test_encoding_ahead_tells_what_is_lost(pooling, monkeypatch):
    a_folder("images", 230)
    for name in ("a/0003.png", "z.png"):           # less than 1 %
        Path("images", name).write_bytes(b"no image")
    line = f"latents.py --data-dir images --image-size 32 --precision fp32 {CPU}"
    printed = works(line, "--n", 40)
    pixels = [decode_image(c, 32) for c in contents("images") if not c.startswith(b"no")]
    x = from_uint8(torch.stack(pixels[:40]))
    gap = pooling.decode(pooling.sample(pooling.encode(x)[0].half().float())).clamp(-1, 1) - x
    psnr = -10 * np.log10((gap / 2).square().mean(dim=(1, 2, 3)).numpy())
    for text in (f"229 images in {the_file()}", "first 40 back",
                 "skipped 2 of 231", f"{psnr.mean():.2f} dB PSNR on average, {psnr.min():.2f} dB"):
        assert text in printed

    # training uses this very file, and asking again encodes nothing
    monkeypatch.setattr(latents, "encode", None)
    assert latents.open_latents(settings()).size == 229
    assert "first 229 back" in works(line, "--n", 1000)
    refused(f"{line} --n 0", "--n 0")


def test_the_scale_of_another_autoencoder_is_noticed(pooling, capsys):
    a_folder("images", 4)
    z0 = pooling.sample(torch.stack([pooling.encode(from_uint8(decode_image(c, 32)[None]))[0][0]
                                     for c in contents("images")]))
    pooling.scale *= 1 / z0.std().item()
    latents.open_latents(settings())
    printed = capsys.readouterr().out
    assert "standard deviation 1.0" in printed and "scale" not in printed
    pooling.scale *= 1.5
    latents.open_latents(settings(latents_dir="other"))
    assert f"another than {pooling.scale}" in capsys.readouterr().out


def test_an_autoencoder_that_cannot_be_right_is_named(pooling):
    Path("images").mkdir()
    for name in "ab":
        Image.new("RGB", (32, 32), "white").save(f"images/{name}.png")
    line = f"latents.py --data-dir images --image-size 32 {CPU}"
    with torch.no_grad():
        weights = pooling.mix.clone()
        pooling.mix[0, 0] = float("nan")
        refused(line, "nan or inf", "--vae-weights")
        assert not list(Path("latents").glob("*.npy"))
        pooling.mix.copy_(weights)
    pooling.decode = lambda z: torch.ones(len(z), 3, 32, 32)
    refused(line, "2 of 2 images", "single colour")


@pytest.fixture
def uninterrupted(pooling):
    """The bytes of the latents of images/, 100 of them, made in one go."""
    a_folder("images", 100)
    latents.open_latents(settings(latents_dir="whole"))
    return the_file("whole").read_bytes()


def count(monkeypatch, n=None):
    """A list that grows by every image that Pooling sees; its n-th call kills the process."""
    encode, calls, seen = Pooling.encode, [], []

    def counted(network, x):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.extend(x)
        return encode(network, x)

    monkeypatch.setattr(Pooling, "encode", counted)
    return seen


def kill(monkeypatch, nth=8):
    """Kills an encoding in the nth call of the encoder; returns the unfinished file."""
    with monkeypatch.context() as patch:
        count(patch, nth)
        process = multiprocessing.get_context("fork").Process(
            target=latents.open_latents, args=(settings(),))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL and not list(Path("latents").glob("*.npy"))
    (part,) = Path("latents").glob("*.part")
    return part


def test_an_encoding_is_killed_anywhere_and_continues(uninterrupted, monkeypatch):
    """Each batch takes two calls, the second for the mirror images; the last one is made again."""
    for nth in (4, 2, 6, 1, 5):
        kill(monkeypatch, nth)
    seen = count(monkeypatch)
    latents.open_latents(settings())
    # 16, 16, 32, 32 and 48 rows are written; the last 16 of them do not count
    assert len(seen) == 2 * (100 - 32)
    assert the_file().read_bytes() == uninterrupted and not list(Path("latents").glob("*.part"))


def torn(part):
    """The last batch that was written is half zeros, as after a power cut."""
    array = np.load(part, mmap_mode="r+")
    array[40:48] = 0
    array.flush()


DAMAGE = {
    "torn": torn,
    "empty": lambda part: part.write_bytes(b""),
    "shorter": lambda part: part.write_bytes(part.read_bytes()[:-1]),
    "lost": lambda part: part.unlink(),
    "of another shape": lambda part: np.save(part.open("wb"), np.ones((100, 2, 1, 4, 4, 4))),
    "of other images": lambda part: np.save(part.open("wb"),
                                            np.ones((99, 2, 2, 4, 4, 4), np.float16)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_part_that_is_damaged_is_made_again(kind, uninterrupted, monkeypatch):
    DAMAGE[kind](kill(monkeypatch))
    latents.open_latents(settings())
    assert the_file().read_bytes() == uninterrupted


def test_two_processes_do_not_encode_the_same_images(pooling):
    a_folder("images", 3)
    path = f"latents/images-sd-32-{latents.data_key(settings())}.npy"
    with checkpoint.locked(f"{path}.lock", "holds it"):
        with pytest.raises(UserError, match="another process is encoding these images"):
            latents.open_latents(settings())
    assert latents.open_latents(settings()).path == Path(path)


def test_every_process_waits_whether_or_not_it_finds_the_file(pooling, monkeypatch):
    """A barrier that only some reach would hang."""
    waits = []
    monkeypatch.setattr(latents, "wait", lambda: waits.append(1))
    a_folder("images", 4)
    for first in (True, False, True):
        monkeypatch.setattr(latents, "FIRST", first)
        latents.open_latents(settings())
    assert len(waits) == 3


@pytest.mark.parametrize("which, killed", [(0, False), (15, False), (20, True), (99, False)])
def test_a_damaged_image_is_skipped_and_named(which, killed, pooling, monkeypatch, capsys):
    a_folder("images", 100)
    wanted = [decode_image(c, 32) for i, c in enumerate(contents("images")) if i != which]
    path = sorted(Path("images").rglob("*.png"))[which]
    half(path)
    if killed:
        kill(monkeypatch)
    opened = latents.open_latents(settings())
    assert opened.size == 99 and not list(Path("latents").glob("*.part"))
    means = pooling.encode(from_uint8(torch.stack(wanted)))[0].half().numpy()
    assert np.array_equal(opened.array[:, 0, 0], means)
    printed = capsys.readouterr().out
    assert "skipped 1 of 100" in printed and f"{path.name} cannot be read" in printed


def test_a_damaged_entry_of_a_zip_is_skipped_and_named(pooling, capsys):
    path = a_zip(Path("images.zip"), a_folder("images", 3))
    start = zipfile.ZipFile(path).getinfo("b/0002.png").header_offset + 50
    content = bytearray(path.read_bytes())
    content[start:start + 12] = b"\xff" * 12        # the decompressor fails, or its checksum
    path.write_bytes(content)
    assert latents.open_latents(settings(path)).size == 2
    assert "b/0002.png" in capsys.readouterr().out


@pytest.mark.parametrize("n", [2, 30, 100])
def test_one_bad_image_is_always_allowed_and_more_than_one_percent_is_not(n, pooling):
    first, *_, last = sorted(a_folder("images", n).rglob("*.png"))
    first.write_bytes(encoded(noise_image(size=(31, 40))))
    assert latents.open_latents(settings()).size == n - 1
    half(last)
    refused(f"latents.py --data-dir images --image-size 32 {CPU}", "more than 1 %",
            "0000.png is 31 x 40, smaller", last.name)
    assert len(list(Path("latents").glob("*.npy"))) == 1


CHANGES = {
    "an image more": lambda p: shutil.copy("images/a/0001.png", "images/a/0001b.png"),
    "an image less": lambda p: Path("images/a/0001.png").unlink(),
    "another image": lambda p: noise_image(size=(32, 33), seed=77).save("images/a/0001.png"),
    "another name": lambda p: Path("images/a/0001.png").rename("images/a/x.png"),
    "other weights": lambda p: p.mix.data.mul_(1.001),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_changes_with_the_images_and_weights(change, pooling):
    a_folder("images", 4)
    key = latents.data_key(settings())
    assert latents.open_latents(settings()).key == key and key in the_file().stem
    assert latents.data_key(settings(image_size=24)) != key
    CHANGES[change](pooling)
    assert latents.data_key(settings()) != key


def test_the_key_stays_when_images_are_copied_or_moved(sources, pooling, monkeypatch):
    paths = [Path(name) for name in ("images", "images.zip", "parquet")]
    keys = [latents.open_latents(settings(path)).key for path in paths]
    monkeypatch.setattr(Pooling, "encode", None)   # the latents are found, too
    Path("elsewhere").mkdir()
    for path, key in zip(paths, keys):
        for file in [path, *path.rglob("*")]:
            os.utime(file, (1e9, 1e9))
        moved = settings(path.rename(f"elsewhere/renamed{path.suffix or path.name}"))
        assert latents.open_latents(moved).key == key == latents.data_key(moved)
    # all kinds of sources make the same latents
    assert len({path.read_bytes() for path in Path("latents").glob("*.npy")}) == 1


def test_finished_latents_that_are_damaged_are_named(pooling):
    a_folder("images", 3)
    latents.open_latents(settings())
    path = the_file()
    whole = path.read_bytes()
    for array in (np.zeros((3, 2, 2, 4, 4, 4), np.float32), np.zeros((0, 2, 2, 4, 4, 4), "f2"),
                  np.zeros((3, 2), np.int64)):
        np.save(path, array)
        for content in (path.read_bytes(), whole[:-1], b"latents", b""):
            path.write_bytes(content)
            with pytest.raises(UserError, match="cut short or damaged") as refusal:
                latents.open_latents(settings())
            assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_only_what_is_still_to_encode_needs_room(uninterrupted, monkeypatch):
    def free(n):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=n))

    free(int(0.6 * len(uninterrupted)))
    with pytest.raises(UserError, match="--latents-dir"):
        latents.open_latents(settings())
    free(len(uninterrupted))
    kill(monkeypatch, 12)
    free(int(0.6 * len(uninterrupted)))
    assert latents.open_latents(settings()).size == 100


def test_a_disk_that_becomes_full(uninterrupted, monkeypatch):
    fsync, calls = os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device.*what is encoded is kept"):
            latents.open_latents(settings())
    seen = count(monkeypatch)
    latents.open_latents(settings())
    assert len(seen) == 2 * (100 - 48) and the_file().read_bytes() == uninterrupted


# --------------------------------------------------------------------------------- batches


def a_latents(stochastic=True, device="cpu"):
    """Three images whose means say which image and mirror version it is: 10 i + 5 mirrored."""
    array = np.zeros((3, 2, 2 if stochastic else 1, 4, 2, 2), dtype=np.float16)
    array[:, :, 0] = (10 * np.arange(3)[:, None] + 5 * np.arange(2))[..., None, None, None]
    if stochastic:
        array[:, :, 1] = np.log(np.float32([0.1, 0.5, 1.0]) ** 2)[:, None, None, None, None]
    np.save("some.npy", array)
    codec = latents.Codec(Pooling(stochastic=stochastic), settings(image_size=16))
    return latents.Latents("some.npy", codec, device=device)


def test_batches_are_draws_of_the_posterior():
    source = a_latents()
    draws = data.Draws(0)
    draws.at(3)
    z0, y = source.batch(6000, draws)
    assert z0.shape == (6000, 4, 2, 2) and z0.dtype == torch.float32 and y is None
    unscaled = z0 / Pooling.scale
    kind = (unscaled.mean((1, 2, 3)) / 5).round().long()
    assert kind.unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert (kind.bincount() - 1000).abs().max() < 5 * (6000 * 5 / 36) ** 0.5
    for k in range(6):
        part = unscaled[kind == k]
        assert part.mean().item() == pytest.approx(5 * k, abs=0.05)
        assert part.std().item() == pytest.approx([0.1, 0.5, 1.0][k // 2], rel=0.05)


def test_without_a_variance_batches_are_the_latents():
    source, draws, batches = a_latents(stochastic=False), data.Draws(7), []
    for step in (5, 6, 5):
        draws.at(step)
        batches.append(source.batch(200, draws)[0])
    assert set(batches[0].unique().tolist()) == {0, 2.5, 5, 7.5, 10, 12.5}
    # the same draws make the same batch
    assert torch.equal(batches[0], batches[2]) and not torch.equal(batches[0], batches[1])


@pytest.mark.parametrize("stochastic", [True, False])
def test_batches_that_a_thread_makes_ahead_are_the_same(stochastic):
    plain, ahead = a_latents(stochastic), a_latents(stochastic)
    ahead.thread, made = ThreadPoolExecutor(1), []
    whole = ahead.drawn
    ahead.drawn = lambda n, draws: made.append((n, draws.step)) or whole(n, draws)
    one, other = data.Draws(5, stream=1), data.Draws(5, stream=1)
    # in turn, and where the thread has made another batch: a resumed run, another size, a repeat
    for step, n in ((0, 7), (1, 7), (2, 7), (9, 7), (10, 4), (11, 4), (11, 4)):
        one.at(step), other.at(step)
        assert torch.equal(plain.batch(n, one)[0], ahead.batch(n, other)[0])
        assert torch.equal(one.normal(3), other.normal(3))     # all later draws agree, too
    ahead.thread.shutdown()
    assert made.count((7, 1)) == made.count((7, 2)) == 1 and (4, 12) in made


def test_the_thread_uses_the_runs_gpu(monkeypatch):
    """Also the first one, whose device has no index."""
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    for device in ("cuda", "cuda:1"):
        a_latents(device=device).thread.submit(int).result()
    assert chosen == [0, 1]


# ----------------------------------------------------------------------- through the scripts


RUN = ("--dataset folder --model tiny --channels 8 --heads 2 --disc-channels 8 --image-size 32 "
       "--batch-size 4 --teacher-batch-size 4 --steps 2 --teacher-steps 2 --n-rf 1 --log-every 1 "
       "--precision fp32 --device cpu --threads 1")


def bad_sources():
    images = contents(a_folder("images", 12))
    Path("text").mkdir()
    Path("text/notes.txt").write_text("no image")
    half(a_zip(Path("cut.zip"), Path("images")))
    for name, some in (("cut", images), ("norows", []), ("null", [None] * 12)):
        parquet_file(Path(name) / "train-0.parquet", some)
    half(Path("cut/train-0.parquet"))


BAD = [
    ("--data-dir text", "text holds no images"),
    ("--data-dir cut.zip", "cut.zip cannot be read"),
    ("--data-dir cut", "cut/train-0.parquet"),
    ("--data-dir norows", "norows"),
    ("--data-dir null", "train-0.parquet, row 0"),
    ("--data-dir images/a/0000.png", "0000.png is one file", "folder"),
    ("--data-dir nowhere", "nowhere", "--data-dir"),
    ("", "--dataset folder needs --data-dir"),
    ("--data-dir images --download", "--download"),
    ("--data-dir images --image-size 36", "--image-size 36", "8"),
    ("--data-dir images --image-size 64", "0000.png is 32 x 32", "--image-size"),
    ("--data-dir images --batch-size 13", "--batch-size 13", "12 samples"),
]


def test_bad_input(pooling):
    bad_sources()
    for flags, *named in BAD:
        refused(f"train.py {RUN} {flags}", *named)
    assert not list(Path("runs").rglob("*.pt"))


def test_a_teacher_of_other_latents(monkeypatch, no_pictures):
    a_folder("images", 12)
    monkeypatch.setattr(vae, "load", lambda name="sd", files=():
                        Pooling(*(32, False) if name == "taef2" else (4, True)))
    works(f"teacher.py {RUN} --data-dir images --vae taef2 --out theirs")
    assert read("theirs/teacher.pt")["shape"] == (32, 4, 4)
    refused(f"train.py {RUN} --data-dir images --vae sd --teacher-checkpoint theirs/teacher.pt",
            "theirs/teacher.pt", "(32, 4, 4)")
    refused(f"train.py {RUN} --data-dir images --vae sd --out theirs", "--vae sd")
    assert not list(Path("runs").rglob("*.pt"))    # least of all the teacher that does not fit


def test_a_teacher_of_images_that_changed_since(pooling, no_pictures):
    a_folder("images", 12)
    works(f"teacher.py {RUN} --data-dir images --out run")
    noise_image(size=(32, 32), seed=99).save("images/new.png")
    line = f"train.py {RUN} --data-dir images --out run"
    refused(line, "run/teacher.pt", "other data", "--teacher-checkpoint")
    assert not Path("run/student.pt").exists()
    works(f"{line} --teacher-checkpoint run/teacher.pt")
    works(f"train.py {RUN} --data-dir images --out other --teacher-checkpoint run/teacher.pt")
    assert read("other/teacher.pt")["data"] == read("run/teacher.pt")["data"] != ""


# ------------------------------------------------------------------- a whole run with TAEF2


def test_a_whole_run_and_its_samples(faces_dir, taef2_files):
    copy_faces(faces_dir, 24, "faces")
    relative = " ".join(shlex.quote(os.path.relpath(f)) for f in taef2_files)
    works("train.py --dataset folder --data-dir faces --vae taef2 --image-size 64 --model tiny "
          "--steps 4 --teacher-steps 4 --batch-size 4 --teacher-batch-size 4 --n-rf 1 "
          f"--log-every 2 --preview-every 4 {CPU} --vae-weights {relative}")
    assert np.load(the_file(), mmap_mode="r").shape == (24, 2, 1, 32, 8, 8)
    folder = Path("runs/folder")
    works(f"sample.py --nfe 1 2 --n 3 --out {folder}/strip.png {CPU}")
    works(f"sample.py --nfe 2 --trajectory --out {folder}/path.png {CPU}")
    works(f"sample.py --nfe 2 --teacher --n 4 --out {folder}/teacher.png {CPU}")
    assert sum(map(is_picture, folder.glob("*.png"))) >= 8

    # the student's file alone knows its autoencoder, also in another folder
    Path("elsewhere").mkdir()
    shutil.copy(folder / "student.pt", "elsewhere/mine.pt")
    os.chdir("elsewhere")
    works(f"sample.py --checkpoint mine.pt --nfe 1 --n 5 --npz raw.npz {CPU}")
    raw = np.load("raw.npz")["arr_0"]
    assert raw.shape == (5, 64, 64, 3) and raw.dtype == np.uint8

    # weights that moved can be named
    content = read("mine.pt")
    content["config"]["vae_weights"] = ("/nowhere/encoder.pth", "/nowhere/decoder.pth")
    torch.save(content, "moved.pt")
    refused("sample.py --checkpoint moved.pt --nfe 1 --n 2", "/nowhere/encoder.pth")
    works(f"sample.py --checkpoint moved.pt --nfe 1 --n 5 --npz again.npz {CPU} --vae-weights",
          *taef2_files)
    assert np.array_equal(np.load("again.npz")["arr_0"], raw)


# ------------------------------------------------------------------- the official checkpoints


SMALL = dict(channels=16, mult=(1, 2), blocks=1, attention=(1,), heads=4, time_scale=1.0,
             disc_channels=8)


@pytest.fixture
def small_paper(monkeypatch):
    """The paper's network in small, and its weights, drawn at random."""
    monkeypatch.setitem(config.MODELS, "paper", SMALL)
    network = model.velocity_network(make_config("celebahq"), (4, 32, 32))
    generator = gen()
    return {k: 0.1 * torch.randn(v.shape, generator=generator)
            for k, v in network.state_dict().items()}


def parallel_names(weights):
    return {f"module.{k}": v for k, v in weights.items()}


def test_an_official_students_average_is_sampled(small_paper, pooling):
    student = {k: v + 1 for k, v in small_paper.items()}
    torch.save({"model": parallel_names(student), "ema_model": small_paper}, "model_9.pth")
    assert checkpoint.load("model_9.pth")["kind"] == "student"
    network, _, _ = open_network("model_9.pth", precision="fp32", device="cpu", threads=1)
    assert same(dict(network.state_dict()), small_paper)

    works(f"sample.py --checkpoint model_9.pth --nfe 1 --n 2 --npz raw.npz --precision fp32 {CPU}")
    images = pooling.decode(sample.draw(network, (4, 32, 32), 2, 1)).clamp(-1, 1)
    wanted = to_uint8(images).permute(0, 2, 3, 1).numpy()
    raw = np.load("raw.npz")["arr_0"]
    assert raw.shape == (2, 256, 256, 3) and abs(raw.astype(int) - wanted).max() <= 1


def test_distilling_an_official_teacher(small_paper, pooling, no_pictures):
    a_folder("images", 4, size=(256, 256))
    torch.save(parallel_names(small_paper), "model_480.pth")
    works("train.py --dataset celebahq --data-dir images --teacher-checkpoint model_480.pth "
          f"--steps 1 --batch-size 2 --teacher-batch-size 2 --disc-channels 8 --out new {CPU}")
    teacher = read("new/teacher.pt")
    assert teacher["kind"] == "teacher" and teacher["scflow"] == checkpoint.VERSION
    assert teacher["config"]["time_scale"] == 1 and same(teacher["ema"], small_paper)
    assert read("new/student.pt")["step"] == 1
