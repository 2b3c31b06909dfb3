"""Images of any kind, their latents on disk, runs on them, and checkpoints of the official code.

Most tests take an autoencoder of one line, the mean of 8 x 8 pixels; the last ones TAEF2 itself.
"""

import errno
import io
import os
import resource
import shlex
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import checkpoint
import config
import data
import latents
import model
import sample
import vae
from config import UserError, make_config
from data import decode_image
from running import call, copy_faces, read, refused, works

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
CPU = "--device cpu --threads 1"


class Pooling(nn.Module):
    """An autoencoder whose latents are weighted sums of the mean colours of 8 x 8 pixels."""

    scale = 0.5

    def __init__(self, channels=4, stochastic=True):
        super().__init__()
        self.channels, self.stochastic = channels, stochastic
        mix = torch.randn(channels, 3, generator=torch.Generator().manual_seed(channels))
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
    """`vae.load` gives this network instead of a real one."""
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


def decoded_array(content, size=64):
    """decode_image, as an array (H, W, 3)."""
    pixels = decode_image(content, size)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, size, size)
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_an_image_of_the_right_size_is_kept_bit_for_bit(kind):
    image = noise_image("P" if kind == "GIF" else "RGB")
    if kind == "GIF":
        image.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
    content = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(decoded_array(content), np.asarray(image.convert("RGB")))


def test_a_jpeg_is_what_pillow_decodes():
    content = encoded(noise_image(), "JPEG")
    assert np.array_equal(decoded_array(content), np.asarray(Image.open(io.BytesIO(content))))


def test_a_larger_image_is_resized_by_lanczos():
    image = noise_image(size=(150, 150))
    wanted = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(decoded_array(encoded(image)), wanted)


@pytest.mark.parametrize("size", [(64, 100), (100, 64), (65, 64), (64, 67)])
def test_the_centre_is_cropped(size):
    image = noise_image(size=size)
    left, top = (size[0] - 64) // 2, (size[1] - 64) // 2
    wanted = np.asarray(image)[top:top + 64, left:left + 64]
    assert np.array_equal(decoded_array(encoded(image)), wanted)


def test_the_crop_comes_before_the_resize():
    image = noise_image(size=(201, 128))
    wanted = image.crop((36, 0, 164, 128)).resize((64, 64), Image.Resampling.LANCZOS)
    # but near its border, where the filter may see what was cropped
    assert np.array_equal(decoded_array(encoded(image))[:, 3:-3], np.asarray(wanted)[:, 3:-3])


def test_grey_becomes_three_equal_channels():
    image = noise_image("L")
    wanted = np.asarray(image)[..., None].repeat(3, axis=2)
    assert np.array_equal(decoded_array(encoded(image)), wanted)
    black_and_white = Image.fromarray(np.asarray(image) > 99)
    assert set(np.unique(decoded_array(encoded(black_and_white)))) == {0, 255}


def test_sixteen_bit_grey():
    values = np.full((64, 64), 32768, dtype=np.uint16)
    values[0, :4] = 0, 255, 256, 65535
    found = decoded_array(encoded(Image.fromarray(values)))
    assert found[0, :5, 0].tolist() == [0, 0, 1, 255, 128]
    assert np.array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode):
    image = Image.new(mode, (64, 64), (0, 0, 0, 255)[-len(mode):] if mode == "RGBA" else (0, 255))
    half = Image.new(mode, (64, 16), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.paste(half, (0, 0))
    image.paste(Image.new(mode, (64, 16), (0, 0, 0, 51) if mode == "RGBA" else (0, 51)), (0, 16))
    found = decoded_array(encoded(image))
    assert (found[:16] == 255).all() and (found[32:] == 0).all()
    assert (abs(found[16:32].astype(int) - 204) <= 1).all()


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 255, 200, 0, 0] + [0] * 762)
    image.paste(0, (0, 0, 32, 64))
    for kind in ("PNG", "GIF"):
        found = decoded_array(encoded(image, kind, transparency=0))
        assert (found[:, :32] == 255).all() and (found[:, 32:] == (200, 0, 0)).all()


def test_a_transparent_colour_of_rgb_and_grey():
    image = Image.new("RGB", (64, 64), (9, 8, 7))
    image.paste((1, 2, 3), (0, 0, 32, 64))
    found = decoded_array(encoded(image, transparency=(1, 2, 3)))
    assert (found[:, :32] == 255).all() and (found[:, 32:] == (9, 8, 7)).all()
    grey = Image.new("L", (64, 64), 9)
    grey.paste(1, (0, 0, 32, 64))
    found = decoded_array(encoded(grey, transparency=1))
    assert (found[:, :32] == 255).all() and (found[:, 32:] == 9).all()


def test_a_cmyk_jpeg():
    image = Image.new("RGB", (64, 64), (250, 10, 20))
    found = decoded_array(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert abs(found.astype(int) - (250, 10, 20)).max() < 10


TURNS = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}     # from upright to stored


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientations(orientation, kind):
    upright = Image.new("RGB", (80, 64), "red")
    for colour, corner in (("lime", (40, 0)), ("blue", (0, 32)), ("white", (40, 32))):
        upright.paste(colour, (*corner, corner[0] + 40, corner[1] + 32))
    turn, exif = TURNS[orientation], Image.Exif()
    stored = upright.transpose(Image.Transpose[turn]) if turn else upright
    exif[0x0112] = orientation
    more = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    found = decoded_array(encoded(stored, kind, exif=exif, **more)).astype(int)
    for corner, colour in (((4, 4), (255, 0, 0)), ((4, 60), (0, 255, 0)),
                           ((60, 4), (0, 0, 255)), ((60, 60), (255, 255, 255))):
        assert abs(found[corner] - colour).max() < 8


@pytest.mark.parametrize("size", [(63, 64), (64, 63), (200, 10), (1, 1)])
def test_images_that_are_too_small(size):
    with pytest.raises(ValueError, match=f"is {size[0]} x {size[1]}, smaller than 64 x 64"):
        decode_image(encoded(noise_image(size=size)), 64)


def test_bytes_that_are_no_image():
    jpeg, png = encoded(noise_image(), "JPEG"), encoded(noise_image())
    for content in (b"", b"text", jpeg[:200], jpeg[:-len(jpeg) // 2], png[:500], None,
                    b"GIF89a" + bytes(9), b"BM" + bytes(90)):
        with pytest.raises(ValueError, match="cannot be read") as refusal:
            decode_image(content, 64)
        assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------- folder, zip, parquet


def a_folder(path, n, size=(32, 32)):
    """n noise images in nested folders, by name in the order in which they are made."""
    for i in range(n):
        file = Path(path) / f"{'ab'[2 * i >= n]}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(noise_image(size=size, seed=i)))
    return Path(path)


def a_zip(path, folder):
    names = sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("a")
        for name in names:
            file.write(name, name.relative_to(folder))
    return path


def parquet_file(path, images, rows=7, column="image"):
    import pyarrow
    import pyarrow.parquet
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    values = [{"bytes": content, "path": None} for content in images]
    table = pyarrow.table({column: pyarrow.array(values, kind), "label": [0] * len(images)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def contents(folder):
    return [p.read_bytes() for p in sorted(folder.rglob("*.png"))]


def a_parquet(path, folder, shards=3):
    images = contents(folder)
    each = -(-len(images) // shards)
    for i in range(shards):
        parquet_file(path / f"data/train-{i:05d}-of-{shards:05d}.parquet",
                     images[i * each:(i + 1) * each])
    return path


@pytest.fixture
def sources():
    folder = a_folder("images", 50)
    return [data.Folder(folder), data.Zip(a_zip("images.zip", folder)),
            data.Parquet(a_parquet(Path("parquet"), folder))]


def test_all_kinds_give_the_same_images_in_the_same_order(sources):
    folder, archive, parquet = sources
    wanted = contents(Path("images"))
    for source in sources:
        assert source.size == 50
        assert [get() for _, get in source.read()] == wanted
    names = [name for name, _ in folder.read()]
    assert names == [name for name, _ in archive.read()] == sorted(names)
    assert names[:1] + names[-1:] == ["a/0000.png", "b/0049.png"]
    assert [name for name, _ in parquet.read()][16:18] == [
        "train-00000-of-00003.parquet, row 16", "train-00001-of-00003.parquet, row 0"]


@pytest.mark.parametrize("start", [1, 6, 7, 8, 16, 17, 18, 33, 34, 49, 50])
def test_reading_from_the_middle_is_the_tail_of_reading_all(start, sources):
    for source in sources:
        everything = [(name, get()) for name, get in source.read()]
        assert [(name, get()) for name, get in source.read(start)] == everything[start:]


def test_large_row_groups():
    a_folder("images", 150)
    parquet_file(Path("big/one.parquet"), contents(Path("images")), rows=130)
    source = data.Parquet("big")
    everything = [(name, get()) for name, get in source.read()]
    assert [c for _, c in everything] == contents(Path("images"))
    assert [name for name, _ in everything] == [f"one.parquet, row {i}" for i in range(150)]
    for start in (63, 64, 65, 129, 130, 149):
        assert [(name, get()) for name, get in source.read(start)] == everything[start:]


def test_files_that_are_no_images_do_not_count():
    folder = a_folder("images", 4)
    for name in (".hidden.png", "a/._0000.png", ".cache/0.png", "__MACOSX/a/0.png", "notes.txt",
                 "model.pt", "noext"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "folder.png").mkdir()
    shutil.copy(folder / "a/0000.png", folder / "UPPER.PNG")
    for source in (data.Folder(folder), data.Zip(a_zip("images.zip", folder))):
        assert [name for name, _ in source.read()] == [
            "UPPER.PNG", "a/0000.png", "a/0001.png", "b/0002.png", "b/0003.png"]


def test_training_shards_are_preferred():
    a_folder("images", 6)
    some, rest = contents(Path("images"))[:4], contents(Path("images"))[4:]
    parquet_file(Path("set/data/validation-00000-of-00001.parquet"), rest)
    assert data.Parquet("set").size == 2
    parquet_file(Path("set/data/train-00000-of-00001.parquet"), some)
    assert [get() for _, get in data.Parquet("set").read()] == some


def test_the_kind_is_found_by_itself(sources):
    for path, kind in (("images", data.Folder), ("images.zip", data.Zip),
                       ("parquet", data.Parquet), ("parquet/data", data.Parquet)):
        assert type(data.open_images(make_config("folder", data_dir=path))) is kind


def test_decoding_ahead_keeps_the_order(sources):
    wanted = [decode_image(content, 32) for content in contents(Path("images"))]
    for start in (0, 13):
        found = list(data.decoded(sources[0], 32, start, workers=3))
        assert [name for name, _, _ in found] == sources[0].names[start:]
        assert all(torch.equal(p, q) for (_, p, _), q in zip(found, wanted[start:], strict=True))


# -------------------------------------------------------------------------------- encoding


def settings(folder="images", **more):
    return make_config("folder", **dict(data_dir=str(folder), image_size=32, precision="fp32",
                                        teacher_batch_size=4, batch_size=4) | more)


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

    pixels = torch.stack([decode_image(c, 32) for c in contents(Path("images"))])
    for mirrored in (0, 1):
        x = data.from_uint8(pixels.flip(-1) if mirrored else pixels)
        wanted = torch.stack([m for m in pooling.encode(x) if m is not None], dim=1)
        assert np.array_equal(array[:, mirrored], wanted.half().numpy())


def test_all_kinds_of_sources_make_the_same_latents(pooling, sources):
    for name in ("images", "images.zip", "parquet"):
        latents.open_latents(settings(name, latents_dir=f"of/{name}"))
    assert len({the_file(f"of/{name}").read_bytes() for name in
                ("images", "images.zip", "parquet")}) == 1


def test_images_are_encoded_once(pooling, monkeypatch):
    a_folder("images", 5)
    latents.open_latents(settings())
    monkeypatch.setattr(Pooling, "encode", None)
    assert latents.open_latents(settings()).size == 5


def test_encoding_ahead_tells_what_is_lost(pooling, monkeypatch):
    a_folder("images", 37)
    Path("images/a/0003.png").write_bytes(b"no image")
    Path("images/z.png").write_bytes(b"no image either")
    for i in range(200):                           # so that two are less than 1 %
        shutil.copy("images/a/0000.png", f"images/y{i:03d}.png")
    line = f"latents.py --data-dir images --image-size 32 --precision fp32 {CPU}"
    printed = works(line, "--n", 40)
    assert "images a second" in printed and str(the_file()) in printed
    pixels = [decode_image(c, 32) for c in contents(Path("images")) if not c.startswith(b"no")]
    x = data.from_uint8(torch.stack(pixels[:40]))
    gap = pooling.decode(pooling.sample(pooling.encode(x)[0].half().float())).clamp(-1, 1) - x
    psnr = -10 * np.log10((gap / 2).square().mean(dim=(1, 2, 3)).numpy())
    assert "236 images in" in printed and "first 40 back" in printed
    assert f"{psnr.mean():.2f} dB PSNR on average, {psnr.min():.2f} dB" in printed

    # training takes this very file, and asking again encodes nothing
    monkeypatch.setattr(latents, "encode", None)
    assert latents.open_latents(settings()).size == 236
    assert "first 236 back" in works(line, "--n", 1000)
    refused(f"{line} --n 0", "--n 0")
    refused(f"latents.py --data-dir nowhere {CPU}", "nowhere; --data-dir")


class Stopped:
    """Pooling.encode that counts the images it saw and raises `error` in its n-th call."""

    def __init__(self, monkeypatch, n=None, error=KeyboardInterrupt):
        self.calls, self.images, encode = 0, 0, Pooling.encode

        def counted(network, x):
            self.calls += 1
            if self.calls == n:
                raise error
            self.images += len(x)
            return encode(network, x)

        monkeypatch.setattr(Pooling, "encode", counted)


@pytest.fixture
def uninterrupted(pooling):
    """The bytes of the latents of images/, 100 of them, made in one go."""
    a_folder("images", 100)
    latents.open_latents(settings(latents_dir="whole"))
    return the_file("whole").read_bytes()


@pytest.mark.parametrize("nth, kept", [(1, 0), (2, 0), (3, 16), (8, 48), (14, 96)])
def test_an_interrupted_encoding_goes_on(nth, kept, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        Stopped(patch, nth)
        with pytest.raises(KeyboardInterrupt):
            latents.open_latents(settings())
    assert not list(Path("latents").glob("*.npy"))

    rest = Stopped(monkeypatch)
    latents.open_latents(settings())
    assert rest.images == 2 * (100 - kept)
    assert the_file().read_bytes() == uninterrupted
    assert not list(Path("latents").glob("*.part"))


def test_ctrl_c_while_encoding(pooling, monkeypatch, no_pictures):
    a_folder("images", 50)
    with monkeypatch.context() as patch:
        Stopped(patch, 4)
        ended = call(f"train.py {RUN} --data-dir images")
    assert ended.code == 130 and ended.err.count("Traceback") == 0
    assert ended.err.splitlines()[-1].startswith("train.py: ")
    rest = Stopped(monkeypatch)
    works(f"train.py {RUN} --data-dir images")
    assert rest.images == 2 * (50 - 16)


def test_stopping_again_and_again(uninterrupted, monkeypatch):
    for nth in (4, 2, 5, 1, 3):
        with monkeypatch.context() as patch:
            Stopped(patch, nth)
            with pytest.raises(KeyboardInterrupt):
                latents.open_latents(settings())
    latents.open_latents(settings())
    assert the_file().read_bytes() == uninterrupted


def stop_in_the_middle(monkeypatch):
    with monkeypatch.context() as patch:
        Stopped(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            latents.open_latents(settings())
    (part,) = Path("latents").glob("*.part")
    return part, part.with_suffix(".json")


def test_bytes_behind_the_last_state_are_cut(uninterrupted, monkeypatch):
    """A kill in the middle of a write leaves some; they are written again."""
    part, _ = stop_in_the_middle(monkeypatch)
    with open(part, "ab") as file:
        file.write(b"half a batch" * 50)
    latents.open_latents(settings())
    assert the_file().read_bytes() == uninterrupted


@pytest.mark.parametrize("damage", ["shorter", "no state", "no part", "empty state", "cut state"])
def test_a_part_without_its_state_is_made_again(damage, uninterrupted, monkeypatch):
    part, state = stop_in_the_middle(monkeypatch)
    if damage == "shorter":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "no part":
        part.unlink()
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text("" if damage == "empty state" else state.read_text()[:20])
    latents.open_latents(settings())
    assert the_file().read_bytes() == uninterrupted


def spoil(folder, *numbers):
    """Cuts image files in the middle; their names."""
    paths = [sorted(Path(folder).rglob("*.png"))[i] for i in numbers]
    for path in paths:
        path.write_bytes(path.read_bytes()[:100])
    return [str(p.relative_to(folder)) for p in paths]


@pytest.mark.parametrize("which", [0, 15, 70, 149])
def test_a_corrupt_image_is_skipped_and_named(which, pooling, capsys):
    a_folder("images", 150)
    wanted = [decode_image(c, 32) for i, c in enumerate(contents(Path("images"))) if i != which]
    (name,) = spoil("images", which)
    opened = latents.open_latents(settings())
    assert opened.size == 149
    means = pooling.encode(data.from_uint8(torch.stack(wanted)))[0].half().numpy()
    assert np.array_equal(opened.array[:, 0, 0], means)
    printed = capsys.readouterr().out
    assert "skipped 1 of 150" in printed and f"{name} cannot be read" in printed


def test_a_damaged_entry_of_a_zip_is_skipped_and_named(pooling, capsys):
    """Its compressed bytes are wrong: the decompressor fails, before any image decoder."""
    with zipfile.ZipFile("images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for i in range(100):
            file.writestr(f"{i:03d}.bmp", encoded(Image.new("RGB", (32, 32), (i, 0, 0)), "BMP"))
        where = file.getinfo("040.bmp").header_offset + 30 + len("040.bmp")
    content = bytearray(Path("images.zip").read_bytes())
    content[where:where + 12] = b"\xff" * 12
    Path("images.zip").write_bytes(content)
    assert latents.open_latents(settings("images.zip")).size == 99
    assert "040.bmp" in capsys.readouterr().out


def test_a_skipped_image_is_named_after_an_interruption(pooling, monkeypatch, capsys):
    a_folder("images", 100)
    (name,) = spoil("images", 20)
    stop_in_the_middle(monkeypatch)
    assert latents.open_latents(settings()).size == 99
    assert name in capsys.readouterr().out


def test_a_small_image_counts_as_one_that_cannot_be_used(pooling, capsys):
    a_folder("images", 100)
    Path("images/a/0003.png").write_bytes(encoded(noise_image(size=(31, 40))))
    assert latents.open_latents(settings()).size == 99
    assert "0003.png is 31 x 40, smaller than 32 x 32" in capsys.readouterr().out


def test_more_than_one_percent_is_too_much(pooling):
    a_folder("images", 100)
    names = spoil("images", 10, 90)
    with pytest.raises(UserError, match="more than 1 %") as refusal:
        latents.open_latents(settings())
    assert all(name in str(refusal.value) for name in names)
    assert not list(Path("latents").glob("*.npy"))

    # mended, the images are others, and all is well
    for i, name in zip((10, 90), names):
        (Path("images") / name).write_bytes(encoded(noise_image(size=(32, 32), seed=i)))
    assert latents.open_latents(settings()).size == 100


def test_images_that_are_all_too_small(pooling):
    a_folder("images", 30)
    with pytest.raises(UserError, match="smaller --image-size") as refusal:
        latents.open_latents(settings(image_size=64))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000


def changed_image():
    path = Path("images/a/0001.png")
    path.write_bytes(encoded(noise_image(size=(32, 33), seed=77)))


CHANGES = {
    "an image more": lambda p: shutil.copy("images/a/0001.png", "images/a/0001b.png"),
    "an image less": lambda p: Path("images/a/0001.png").unlink(),
    "another image": lambda p: changed_image(),
    "another name": lambda p: Path("images/a/0001.png").rename("images/a/x.png"),
    "other weights": lambda p: p.mix.data.mul_(1.001),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_encoded_anew(change, pooling, capsys):
    a_folder("images", 20)
    latents.open_latents(settings())
    old, content = the_file(), the_file().read_bytes()
    assert "anew" not in capsys.readouterr().out

    CHANGES[change](pooling)
    latents.open_latents(settings())
    assert old.read_bytes() == content
    (new,) = set(Path("latents").glob("*.npy")) - {old}
    printed = capsys.readouterr().out
    assert "anew" in printed and str(old) in printed and str(new) in printed


def test_another_size_makes_another_file(pooling):
    a_folder("images", 20, size=(64, 64))
    for size in (32, 64):
        assert latents.open_latents(settings(image_size=size)).shape == (4, size // 8, size // 8)
    assert len(list(Path("latents").glob("*.npy"))) == 2


@pytest.mark.parametrize("left", [0, 50, 1000, -1])
def test_finished_latents_that_are_cut_short(left, pooling):
    a_folder("images", 20)
    latents.open_latents(settings())
    path = the_file()
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match="cut short or damaged") as refusal:
        latents.open_latents(settings())
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    path.unlink()
    assert latents.open_latents(settings()).size == 20


def test_a_disk_without_room(pooling, monkeypatch):
    a_folder("images", 20)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(UserError, match="--latents-dir"):
            latents.open_latents(settings())
    assert not list(Path("latents").iterdir())
    assert latents.open_latents(settings()).size == 20


def test_only_the_rest_needs_room(uninterrupted, monkeypatch):
    stop_in_the_middle(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda path: SimpleNamespace(free=int(0.6 * len(uninterrupted))))
    assert latents.open_latents(settings()).size == 100


def test_a_disk_that_becomes_full(uninterrupted, monkeypatch):
    calls, fsync = iter(range(100)), os.fsync

    def full(number):
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device.*what is encoded is kept"):
            latents.open_latents(settings())
    rest = Stopped(monkeypatch)
    latents.open_latents(settings())
    assert rest.images == 2 * (100 - 48) and the_file().read_bytes() == uninterrupted


def test_a_write_that_the_system_refuses(uninterrupted):
    """For real: no file may grow beyond half of what is needed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(uninterrupted) // 2, before[1]))
    try:
        with pytest.raises(UserError, match="could not write .*what is encoded is kept"):
            latents.open_latents(settings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    latents.open_latents(settings())
    assert the_file().read_bytes() == uninterrupted


def test_a_folder_that_cannot_be_made(pooling):
    a_folder("images", 5)
    Path("latents").write_text("a file")
    with pytest.raises(UserError, match="could not write .*--latents-dir"):
        latents.open_latents(settings())


def test_images_are_decoded_in_the_precision_of_the_run(pooling):
    seen = []
    pooling.decode = lambda z: seen.append(torch.is_autocast_enabled("cpu")) or z.repeat(1, 1, 8, 8)
    for precision in ("fp32", "bf16"):
        codec = latents.Codec(vae.load(), settings(precision=precision))
        images = codec.decode(torch.full((40, 3, 4, 4), 2.0))
        assert images.dtype == torch.float32 and images.eq(1).all() and len(images) == 40
    assert seen == [False] * 3 + [True] * 3


# --------------------------------------------------------------------------------- batches


def a_latents(stochastic=True):
    """Three images whose means say which image and mirror version it is: 10 i + 5 mirrored."""
    array = np.zeros((3, 2, 2 if stochastic else 1, 4, 2, 2), dtype=np.float16)
    array[:, :, 0] = (10 * np.arange(3)[:, None] + 5 * np.arange(2))[..., None, None, None]
    if stochastic:
        array[:, :, 1] = np.log(np.float32([0.1, 0.5, 1.0]) ** 2)[:, None, None, None, None]
    np.save("some.npy", array)
    return latents.Latents("some.npy", Pooling(stochastic=stochastic))


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
        own = unscaled[kind == k]
        assert own.mean().item() == pytest.approx(5 * k, abs=0.05)
        assert own.std().item() == pytest.approx([0.1, 0.5, 1.0][k // 2], rel=0.05)


def test_the_same_draws_make_the_same_batch():
    source, draws, batches = a_latents(), data.Draws(7), []
    for step in (5, 6, 5):
        draws.at(step)
        batches.append(source.batch(32, draws)[0])
    assert torch.equal(batches[0], batches[2]) and not torch.equal(batches[0], batches[1])


def test_without_a_variance_batches_are_the_latents():
    z0, _ = a_latents(stochastic=False).batch(200, data.Draws(0))
    assert set(z0.unique().tolist()) == {0, 2.5, 5, 7.5, 10, 12.5}


# ----------------------------------------------------------------------- through the scripts


RUN = ("--dataset folder --model tiny --channels 8 --heads 2 --disc-channels 8 --image-size 32 "
       "--batch-size 4 --teacher-batch-size 4 --steps 2 --teacher-steps 2 --n-rf 1 --log-every 1 "
       "--precision fp32 --device cpu --threads 1")


def flip_bytes(path, start, n=200):
    content = bytearray(path.read_bytes())
    content[start:start + n] = bytes(255 - b for b in content[start:start + n])
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def bad_sources():
    folder = a_folder("images", 12)
    Path("empty").mkdir()
    (Path("text") / "a").mkdir(parents=True)
    Path("text/a/notes.txt").write_text("no image")
    with zipfile.ZipFile("text.zip", "w") as file:
        file.writestr("notes.txt", "no image")
    cut(a_zip(Path("cut.zip"), folder))
    Path("page.zip").write_text("<html>log in first</html>")
    Path("nothing.zip").touch()
    for name in ("cut", "page"):
        parquet_file(Path(name) / "train-0.parquet", contents(folder))
    cut(Path("cut/train-0.parquet"))
    Path("page/train-0.parquet").write_text("<html>log in first</html>")
    parquet_file(Path("column/train-0.parquet"), contents(folder), column="picture")
    parquet_file(Path("norows/train-0.parquet"), [])
    parquet_file(Path("null/train-0.parquet"), [None] * 12)
    a_zip(Path("spoilt.zip"), folder)
    for start in range(100, Path("spoilt.zip").stat().st_size - 2000, 1000):
        flip_bytes(Path("spoilt.zip"), start, 20)
    parquet_file(Path("spoilt/train-0.parquet"), contents(folder))
    flip_bytes(Path("spoilt/train-0.parquet"), 4, 3000)


BAD = [
    ("--data-dir empty", "empty holds no images"),
    ("--data-dir text", "text holds no images"),
    ("--data-dir text.zip", "text.zip holds no images"),
    ("--data-dir cut.zip", "cut.zip cannot be read"),
    ("--data-dir page.zip", "page.zip cannot be read"),
    ("--data-dir nothing.zip", "nothing.zip cannot be read"),
    ("--data-dir spoilt.zip", "a/0000.png"),
    ("--data-dir cut", "cut/train-0.parquet"),
    ("--data-dir page", "page/train-0.parquet"),
    ("--data-dir spoilt", "train-0.parquet"),
    ("--data-dir cut/train-0.parquet", "cut/train-0.parquet", "folder"),
    ("--data-dir column", "column/train-0.parquet", "'image'", "picture, label"),
    ("--data-dir norows", "norows", "no rows"),
    ("--data-dir null", "train-0.parquet, row 0"),
    ("--data-dir nowhere", "nowhere", "--data-dir"),
    ("", "--dataset folder needs --data-dir"),
    ("--data-dir images --download", "--download"),
    ("--data-dir images --image-size 36", "--image-size 36", "8"),
    ("--data-dir images --image-size 64", "0000.png is 32 x 32", "--image-size"),
    ("--data-dir images --batch-size 13", "--batch-size 13", "12 samples"),
    ("--data-dir images --teacher-batch-size 16", "--teacher-batch-size 16", "12 samples"),
]


@pytest.mark.parametrize("flags, named", [(b[0], b[1:]) for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(flags, named, pooling, no_pictures):
    bad_sources()
    refused(f"train.py {RUN} {flags}", *named)
    assert not list(Path("runs").rglob("*.pt"))


def test_celebahq_without_a_network(monkeypatch, pooling):
    import huggingface_hub
    def offline(**more):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("train.py --dataset celebahq --download", "korexyz/celeba-hq-256x256", "data/celebahq")


def test_a_teacher_of_other_latents(monkeypatch, no_pictures):
    a_folder("images", 12)
    monkeypatch.setattr(vae, "load", lambda name="sd", files=():
                        Pooling(*(32, False) if name == "taef2" else (4, True)))
    works(f"teacher.py {RUN} --data-dir images --vae taef2 --out theirs")
    assert read("theirs/teacher.pt")["shape"] == (32, 4, 4)
    refused(f"train.py {RUN} --data-dir images --vae sd --teacher-checkpoint theirs/teacher.pt",
            "theirs/teacher.pt", "(32, 4, 4)")
    refused(f"train.py {RUN} --data-dir images --vae sd --out theirs", "--vae sd (there: taef2)")
    assert not list(Path("runs").rglob("*.pt"))    # least of all the teacher that does not fit


def test_a_teacher_of_images_that_changed_since(pooling, no_pictures):
    a_folder("images", 12)
    works(f"teacher.py {RUN} --data-dir images --out run")
    noise_image(size=(32, 32), seed=99).save("images/new.png")
    line = f"train.py {RUN} --data-dir images --out run"
    refused(line, "run/teacher.pt", "have changed", "--teacher-checkpoint")
    assert not Path("run/student.pt").exists()
    works(f"{line} --teacher-checkpoint run/teacher.pt")
    works(f"train.py {RUN} --data-dir images --out other --teacher-checkpoint run/teacher.pt")
    assert read("other/teacher.pt")["data"] == read("run/teacher.pt")["data"] != ""


def test_latents_are_shared_by_runs(pooling, no_pictures, monkeypatch):
    a_folder("images", 12)
    works(f"train.py {RUN} --data-dir images --out one")
    monkeypatch.setattr(Pooling, "encode", None)
    works(f"train.py {RUN} --data-dir images --out two --lr 1e-4")
    assert read("two/student.pt")["shape"] == (4, 4, 4)
    assert len(list(Path("latents").glob("*.npy"))) == 1


def test_more_steps_of_latents_equal_one_run(pooling, no_pictures):
    a_folder("images", 12)
    line = f"train.py {RUN} --lr-final 1 --lr-warmup 0 --data-dir images"
    works(f"{line} --steps 5 --out long")
    works(f"{line} --steps 3 --out short")
    works("train.py --dataset folder --out short --resume --steps 5")
    one, other = (read(f"{name}/student_resume.pt") for name in ("long", "short"))
    for name in ("student", "disc", "target", "ema"):
        for key, value in one[name].items():
            assert torch.equal(other[name][key], value), f"{name}: {key}"


# ------------------------------------------------------------------- a whole run with TAEF2


@pytest.fixture(scope="module")
def taef2_run(faces_dir, taef2_files, tmp_path_factory):
    """A run of a few steps on 24 faces, with everything that it writes."""
    home, before = tmp_path_factory.mktemp("taef2"), Path.cwd()
    copy_faces(faces_dir, 24, home / "faces")
    os.chdir(home)
    relative = " ".join(shlex.quote(os.path.relpath(f)) for f in taef2_files)
    try:
        works("train.py --dataset folder --data-dir faces --vae taef2 --image-size 64 --model tiny "
              "--steps 4 --teacher-steps 4 --batch-size 4 --teacher-batch-size 4 --n-rf 1 "
              f"--log-every 2 --preview-every 4 {CPU} --vae-weights {relative}")
    finally:
        os.chdir(before)
    return home


def is_picture(path):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return min(pixels.shape[:2]) > 50 and pixels.std() > 3


def test_a_whole_run(taef2_run):
    folder = taef2_run / "runs/folder"
    assert {p.name for p in folder.iterdir()} == {
        "teacher.pt", "teacher_resume.pt", "teacher_log.csv", "teacher_losses.png",
        "teacher_preview_000004.png", "student.pt", "student_resume.pt", "log.csv", "losses.png",
        "samples.png", "preview_000004.png"}
    assert all(is_picture(p) for p in folder.glob("*.png"))
    array = np.load(the_file(taef2_run / "latents"), mmap_mode="r")
    assert array.shape == (24, 2, 1, 32, 8, 8)
    assert read(folder / "student.pt")["shape"] == (32, 8, 8)


def test_sampling_latents(taef2_run, monkeypatch):
    monkeypatch.chdir(taef2_run)
    works(f"sample.py --nfe 1 2 --n 3 --out strip.png {CPU}")
    works(f"sample.py --nfe 2 --trajectory --out path.png {CPU}")
    works(f"sample.py --nfe 2 --teacher --n 4 --out teacher.png {CPU}")
    assert all(is_picture(f"{name}.png") for name in ("strip", "path", "teacher"))
    works(f"sample.py --nfe 2 --n 5 --npz raw.npz {CPU}")
    raw = np.load("raw.npz")["arr_0"]
    assert raw.shape == (5, 64, 64, 3) and raw.dtype == np.uint8


def test_the_student_file_alone_knows_its_autoencoder(taef2_run, taef2_files):
    """The paths of weights that were given relative to another folder."""
    shutil.copy(taef2_run / "runs/folder/student.pt", "mine.pt")
    works(f"sample.py --checkpoint mine.pt --nfe 1 --n 2 --npz raw.npz {CPU}")
    content = read("mine.pt")
    assert [Path(f) for f in content["config"]["vae_weights"]] == list(taef2_files)

    # weights that moved can be named
    content["config"]["vae_weights"] = ("/nowhere/encoder.pth", "/nowhere/decoder.pth")
    torch.save(content, "moved.pt")
    refused("sample.py --checkpoint moved.pt --nfe 1 --n 2", "/nowhere/encoder.pth")
    works(f"sample.py --checkpoint moved.pt --nfe 1 --n 2 --npz again.npz {CPU} --vae-weights",
          *taef2_files)
    assert np.array_equal(np.load("again.npz")["arr_0"], np.load("raw.npz")["arr_0"])


def test_more_steps(taef2_run, monkeypatch, no_pictures):
    shutil.copytree(taef2_run, "copy")
    monkeypatch.chdir("copy")
    settings = read("runs/folder/student_resume.pt")["config"]
    assert settings["data_dir"] == str(taef2_run / "faces")
    works(f"train.py --dataset folder --resume --steps 6 {CPU}")
    assert read("runs/folder/student.pt")["step"] == 6


# ------------------------------------------------------------------- the official checkpoints


SMALL = dict(channels=16, mult=(1, 2), blocks=1, attention=(1,), heads=4, time_scale=1.0,
             disc_channels=8)


@pytest.fixture
def small_paper(monkeypatch):
    """The paper's network in small, and its weights, drawn at random."""
    monkeypatch.setitem(config.MODELS, "paper", SMALL)
    network = model.velocity_network(make_config("celebahq"), (4, 32, 32))
    generator = torch.Generator().manual_seed(0)
    return {k: 0.1 * torch.randn(v.shape, generator=generator)
            for k, v in network.state_dict().items()}


def parallel_names(weights):
    return {f"module.{k}": v for k, v in weights.items()}


def test_the_official_teacher_in_its_real_size():
    with torch.device("meta"):
        shapes = model.UNet().state_dict()
    assert len(shapes) == 304 and sum(s.numel() for s in shapes.values()) == 153_099_524
    torch.save({f"module.{k}": torch.zeros(s.shape) for k, s in shapes.items()}, "model_480.pth")
    content = checkpoint.load("model_480.pth", "teacher")
    Path("model_480.pth").unlink()
    with torch.device("meta"):
        network = model.velocity_network(checkpoint.config_of(content), content["shape"])
    checkpoint.load_weights(network.to_empty(device="cpu"), content["ema"], "model_480.pth")
    assert all(not p.any() for p in network.parameters())


@pytest.mark.parametrize("rename", [dict, parallel_names])
def test_an_official_teacher(rename, small_paper):
    torch.save(rename(small_paper), "model_480.pth")
    content = checkpoint.load("model_480.pth")
    assert content["kind"] == "teacher" and content["shape"] == (4, 32, 32)
    assert content["ema"].keys() == small_paper.keys()
    assert all(torch.equal(content["ema"][k], v) for k, v in small_paper.items())
    cfg = checkpoint.config_of(content)
    assert (cfg.dataset, cfg.vae, cfg.image_size, cfg.time_scale) == ("celebahq", "sd", 256, 1.0)


def test_an_official_students_average_is_sampled(small_paper, pooling):
    student = {k: v + 1 for k, v in small_paper.items()}
    torch.save({"model": parallel_names(student), "ema_model": small_paper}, "model_9.pth")
    content = checkpoint.load("model_9.pth", ("student", "student resume"))
    assert content["kind"] == "student"
    network, _ = sample.open_network("model_9.pth", make_config(precision="fp32", device="cpu",
                                                                  threads=1))
    assert all(torch.equal(network.state_dict()[k], v) for k, v in small_paper.items())

    works("sample.py --checkpoint model_9.pth --nfe 1 --n 2 --npz raw.npz --precision fp32 "
          f"{CPU}")
    images = pooling.decode(sample.draw(network, (4, 32, 32), 2, 1)).clamp(-1, 1)
    wanted = data.to_uint8(images).permute(0, 2, 3, 1).numpy()
    raw = np.load("raw.npz")["arr_0"]
    assert raw.shape == (2, 256, 256, 3) and abs(raw.astype(int) - wanted).max() <= 1


def test_distilling_an_official_teacher(small_paper, pooling, no_pictures):
    a_folder("images", 4, size=(256, 256))
    torch.save(parallel_names(small_paper), "model_480.pth")
    works("train.py --dataset celebahq --data-dir images --teacher-checkpoint model_480.pth "
          "--steps 1 --batch-size 2 --teacher-batch-size 2 --disc-channels 8 --out new",
          *CPU.split())
    found = read("new/teacher.pt")
    assert found["kind"] == "teacher" and found["scflow"] == checkpoint.VERSION
    assert all(torch.equal(found["ema"][k], v) for k, v in small_paper.items())
    assert read("new/student.pt")["step"] == 1


def test_an_official_checkpoint_of_another_size(small_paper, pooling):
    del small_paper["out.2.bias"]
    torch.save(small_paper, "model_480.pth")
    refused("sample.py --checkpoint model_480.pth", "model_480.pth", "1 tensors are missing")


@pytest.mark.parametrize("content", [
    {}, {"model": {}}, {"ema_model": 3}, {"ema_model": {}}, {0: torch.zeros(2)}, [1, 2],
    {"ema_model": {0: torch.zeros(2)}}, {"weight": torch.zeros(2)}], ids=str)
def test_other_dictionaries_are_no_checkpoints(content):
    torch.save(content, "other.pt")
    refused("sample.py --checkpoint other.pt", "other.pt")
