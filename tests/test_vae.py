"""Autoencoders: equal to diffusers', from every published file, and from files that are not it."""

import hashlib
import io
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import WeightsEnum

import data
import vae
from config import UserError

NARROW = (32, 32, 64, 64)


def diffusers_model(widths):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=4, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


@pytest.fixture(scope="module")
def theirs():
    """Diffusers' autoencoder, narrow, with all weights drawn at random (norms, too)."""
    model = diffusers_model(NARROW).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim == 1:
            p.copy_(p + 0.2 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def narrow(monkeypatch):
    """`vae.load("sd", ...)` builds the narrow network."""
    monkeypatch.setitem(vae.AUTOENCODERS, "sd", (lambda: vae.AutoencoderKL(NARROW),
                                                 [vae.Autoencoder_Weights.SD_FT_MSE]))


def agree(ours, theirs, size):
    """Moments and images of both networks are equal."""
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        mean, logvar = ours.encode(x)
        posterior = theirs.encode(x).latent_dist
        torch.testing.assert_close(mean, posterior.mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logvar, posterior.logvar, atol=1e-4, rtol=1e-4)
        assert mean.std() > 0.01 and mean.shape == (2, 4, size // 8, size // 8)
        z = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
        images = theirs.decode(z).sample
        torch.testing.assert_close(ours.decode(vae.AutoencoderKL.scale * z), images,
                                   atol=1e-4, rtol=1e-4)
        assert images.std() > 0.01


# ----------------------------------------------------------- the same network as in diffusers


def test_the_network_has_the_published_size():
    with torch.device("meta"):
        tensors = vae.AutoencoderKL().state_dict()
    assert len(tensors) == 248
    assert sum(t.numel() for t in tensors.values()) == 83_653_863
    assert vae.Autoencoder_Weights.SD_FT_MSE.meta["num_params"] == 83_653_863


def test_a_narrow_network_equals_diffusers(theirs):
    ours = vae.AutoencoderKL(NARROW)
    ours.load_state_dict(vae.diffusers_names(theirs.state_dict()))
    agree(ours, theirs, 64)


def test_the_real_network_equals_diffusers(tmp_path):
    """Full widths, from a file, by the way that users go."""
    theirs = diffusers_model((128, 256, 512, 512)).eval()
    path = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(theirs.state_dict(), path)
    ours = vae.load("sd", [str(path)])
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    agree(ours, theirs, 32)


def test_images_of_any_size_that_divides_by_8(theirs):
    ours = vae.AutoencoderKL(NARROW)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, 24, 40) * 2 - 1
    with torch.no_grad():
        mean = ours.encode(x)[0]
        torch.testing.assert_close(mean, theirs.encode(x).latent_dist.mean, atol=1e-4, rtol=1e-4)
        assert ours.decode(mean).shape == x.shape


def test_log_variances_are_clamped(theirs):
    ours = vae.AutoencoderKL(NARROW)
    weights = dict(theirs.state_dict())
    weights["quant_conv.bias"] = torch.tensor([0.0] * 4 + [100.0, -100.0] * 2)
    ours.load_state_dict(weights)
    with torch.no_grad():
        logvar = ours.encode(torch.zeros(1, 3, 16, 16))[1]
    assert logvar[:, 0].eq(20).all() and logvar[:, 1].eq(-30).all()


# ------------------------------------------------------------------- every form of file it has


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(weights):
    for new, old in OLD_ATTENTION.items():
        weights = {re.sub(rf"(attentions\.0)\.{re.escape(new)}\.", rf"\1.{old}.", k): v
                   for k, v in weights.items()}
    return weights


def four_dimensions(weights):
    return {k: v[:, :, None, None] if "attentions.0" in k and v.ndim == 2 else v
            for k, v in weights.items()}


def compvis(weights):
    """Diffusers' names -> CompVis', block by block as docs/formats.md has it."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
                 "to_out.0": "proj_out"}
    table = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
    for half in ("encoder", "decoder"):
        for j in (0, 1):
            table[f"{half}.mid_block.resnets.{j}"] = f"{half}.mid.block_{j + 1}"
        for new, old in attention.items():
            table[f"{half}.mid_block.attentions.0.{new}"] = f"{half}.mid.attn_1.{old}"
    for i in range(4):
        table[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        table[f"decoder.up_blocks.{3 - i}.upsamplers.0.conv"] = f"decoder.up.{i}.upsample.conv"
        for j in range(3):
            table[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            table[f"decoder.up_blocks.{3 - i}.resnets.{j}"] = f"decoder.up.{i}.block.{j}"
    found = {}
    for key, value in four_dimensions(weights).items():
        for new, old in table.items():
            key = key.replace(new + ".", old + ".")
        found[key] = value
    return found


def original(weights):
    foreign = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(3),
               "model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.tensor(7)}
    return {"state_dict": compvis(weights) | foreign, "global_step": 840000}


def whole_checkpoint(weights):
    return {"state_dict": {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2),
        "cond_stage_model.transformer.embeddings": torch.zeros(3), "betas": torch.zeros(1000),
        **{f"first_stage_model.{k}": v for k, v in compvis(weights).items()},
        "first_stage_model.loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}}


FORMS = {
    "new.bin": dict, "old.bin": old_names, "old-1x1.bin": lambda w: old_names(four_dimensions(w)),
    "new.safetensors": dict, "old.safetensors": old_names, "compvis.pth": compvis,
    "original.ckpt": original, "whole.ckpt": whole_checkpoint,
    "parallel.pt": lambda w: {f"module.{k}": v for k, v in w.items()},
    "part-of-a-pipeline.pt": lambda w: {f"vae.{k}": v for k, v in w.items()} | {"unet.x": w},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_published_form_is_the_same_network(name, theirs, narrow, tmp_path):
    from safetensors.torch import save_file
    weights = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(FORMS[name](weights), path)
    found = vae.load("sd", [str(path)]).state_dict()
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(found[key], value), key


def test_the_inverse_renaming_is_the_tables(theirs):
    """So that the test above cannot agree with itself: some names and shapes from CompVis."""
    names = compvis(theirs.state_dict())
    for key in ("encoder.down.1.block.0.norm1.weight", "encoder.down.2.block.0.nin_shortcut.bias",
                "encoder.down.0.downsample.conv.weight", "encoder.mid.block_2.conv1.bias",
                "decoder.mid.attn_1.proj_out.weight", "decoder.up.3.block.2.conv2.weight",
                "decoder.up.1.upsample.conv.bias", "decoder.norm_out.weight", "quant_conv.weight"):
        assert key in names
    assert names["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert not any("blocks" in key or "attentions" in key for key in names)
    assert names["decoder.up.0.block.2.conv2.weight"].shape[0] == 32    # the finest level
    assert "decoder.up.0.upsample.conv.weight" not in names


def test_half_precision_files_become_float32(theirs, narrow, tmp_path):
    torch.save({k: v.half() for k, v in theirs.state_dict().items()}, tmp_path / "half.bin")
    found = vae.load("sd", [tmp_path / "half.bin"])
    assert {p.dtype for p in found.parameters()} == {torch.float32}


# --------------------------------------------------------------------------- latents of images


def test_draws_of_the_posterior():
    sd = SimpleNamespace(scale=vae.AutoencoderKL.scale)
    mean = torch.tensor([-2.0, 0.0, 3.0])
    logvar = torch.tensor([-30.0, 0.0, 2.0])
    noise = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0))
    z = vae.AutoencoderKL.sample(sd, mean, logvar, noise) / 0.18215
    assert torch.allclose(z.mean(0), mean, atol=0.03)
    assert torch.allclose(z.std(0), (logvar / 2).exp(), rtol=0.02, atol=1e-5)


def test_scale_times_mean_and_back(theirs):
    ours = vae.AutoencoderKL(NARROW)
    ours.load_state_dict(theirs.state_dict())
    assert ours.scale == 0.18215 and ours.stochastic and ours.channels == 4
    mean = torch.randn(2, 4, 4, 4)
    z0 = ours.sample(mean)
    assert torch.equal(z0, 0.18215 * mean)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z0), theirs.decode(mean).sample,
                                   atol=1e-4, rtol=1e-4)


def test_pixels_lie_between_minus_one_and_one():
    x = data.from_uint8(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert torch.allclose(x, torch.tensor([-1.0, -0.6, 1.0]))
    assert torch.equal(vae.Autoencoder_Weights.SD_FT_MSE.transforms()(torch.tensor([255])),
                       torch.ones(1))


# ------------------------------------------------------------------------------- tiny ones


def documented(half, channels, pooled):
    """Keys and shapes of a tiny autoencoder's file, from docs/formats.md section 3."""
    found = {}

    def block(i, pool=False):
        for j in (0, 2, 4):
            conv(f"{i}.conv.{j}", 64, 64)
        if pool:
            found.update({f"{i}.pool.0.weight": (256, 64, 1, 1), f"{i}.pool.1.weight": (256,),
                          f"{i}.pool.1.bias": (256,), f"{i}.pool.3.weight": (64, 256, 1, 1)})

    def conv(name, ins, out, bias=True):
        found[f"{name}.weight"] = (out, ins, 3, 3)
        if bias:
            found[f"{name}.bias"] = (out,)

    if half == "encoder":
        conv(0, 3, 64)
        block(1)
        for i in (2, 6, 10):
            conv(i, 64, 64, bias=False)
            for j in (1, 2, 3):
                block(i + j, pooled and i == 10)
        conv(14, 64, channels)
    else:
        conv(1, channels, 64)
        for i in (3, 8, 13):
            for j in (0, 1, 2):
                block(i + j, pooled and i == 3)
            conv(i + 4, 64, 64, bias=False)
        block(18)
        conv(19, 64, 3)
    return found


@pytest.mark.parametrize("name, channels, pooled", [("taesd", 4, False), ("taef2", 32, True)])
def test_tiny_networks_have_the_documented_keys(name, channels, pooled):
    own = {k: tuple(v.shape) for k, v in vae.AUTOENCODERS[name][0]().state_dict().items()}
    wanted = {f"{half}.{k}": shape for half in ("encoder", "decoder")
              for k, shape in documented(half, channels, pooled).items()}
    assert own == wanted
    assert sum(map(np.prod, wanted.values())) * 4 == pytest.approx(
        {"taesd": 9.8e6, "taef2": 5.4e6 * 2}[name], rel=0.15)


def test_taef2s_files_have_the_documented_keys(taef2_files):
    for path, half in zip(taef2_files, ("encoder", "decoder")):
        found = {k: tuple(v.shape) for k, v in vae.read(path).items()}
        assert found == documented(half, 32, True)


def test_taef2_from_its_files_in_both_orders(taef2_files):
    one, other = (vae.load("taef2", files) for files in (taef2_files, taef2_files[::-1]))
    assert vae.fingerprint(one) == vae.fingerprint(other)
    assert one.channels == 32 and one.scale == 1 and not one.stochastic
    assert one.encode(torch.zeros(1, 3, 16, 16))[1] is None


def test_taef2_reconstructs_faces(taef2_files, faces_dir):
    codec = vae.load("taef2", taef2_files).to(memory_format=torch.channels_last)
    psnr, latents = [], []
    for path in sorted(faces_dir.glob("*.jpg"))[::32]:
        x = data.from_uint8(torch.from_numpy(np.array(Image.open(path)))[None].permute(0, 3, 1, 2))
        z0 = codec.sample(*codec.encode(x))
        error = (codec.decode(z0).clamp(-1, 1) - x).square().mean() / 4
        psnr.append(-10 * error.log10().item())
        latents.append(z0)
    assert np.mean(psnr) >= 32.8 and min(psnr) > 26
    z0 = torch.cat(latents)
    assert z0.mean().item() == pytest.approx(-0.02, abs=0.03)
    assert z0.std().item() == pytest.approx(0.91, abs=0.03)


def test_fingerprints_change_with_any_weight():
    torch.manual_seed(0)
    network = vae.TinyAutoencoder(4, pooled=False)
    before = vae.fingerprint(network)
    assert re.fullmatch("[0-9a-f]{12}", before) and vae.fingerprint(network) == before
    with torch.no_grad():
        network.decoder[-1].bias[1] += 1e-6
    assert vae.fingerprint(network) != before


# ------------------------------------------------------------------------- files that are not it


class Mischief:
    """A pickled object whose reading would run code."""

    def __reduce__(self):
        return os.mkdir, ("mischief",)


def said(name, files, *named):
    """The sentence that refuses files of weights; it is one line and names them."""
    with pytest.raises(UserError) as refused:
        vae.load(name, [str(f) for f in files])
    sentence = str(refused.value)
    assert "\n" not in sentence
    for word in named:
        assert str(word) in sentence, f"{word!r} is not in: {sentence}"
    return sentence


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("left", [0, 1, 100, 0.5, -1])
def test_files_cut_short(kind, left, theirs, narrow, tmp_path):
    from safetensors.torch import save_file
    path = tmp_path / f"cut.{kind}"
    weights = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    (save_file if kind == "safetensors" else torch.save)(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(left * len(whole)) if left == 0.5 else left])
    said("sd", [path], path)


@pytest.mark.parametrize("suffix", ["bin", "pth", "ckpt", "safetensors"])
def test_files_of_other_bytes(suffix, narrow, tmp_path):
    for content in (b"<!DOCTYPE html><html>no such file</html>", b"\x80\x02]q\x00", bytes(500)):
        path = tmp_path / f"other.{suffix}"
        path.write_bytes(content)
        said("sd", [path], path)


def test_files_that_are_not_there(narrow, tmp_path):
    said("sd", [tmp_path / "no.bin"], tmp_path / "no.bin", "--vae-weights")
    said("sd", [tmp_path], tmp_path)               # a folder


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_objects_are_refused_and_do_not_run(zipped, beside, theirs, narrow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": theirs.state_dict(), "callbacks": Mischief()} if beside else Mischief()
    torch.save(content, "evil.ckpt", _use_new_zipfile_serialization=zipped)
    said("sd", ["evil.ckpt"], "evil.ckpt")
    assert not os.path.exists("mischief")


def without(weights, *keys):
    return {k: v for k, v in weights.items() if k not in keys}


WRONG = {
    "another network": lambda w: torch.nn.Linear(2, 2).state_dict(),
    "missing keys": lambda w: without(w, "quant_conv.bias", "decoder.conv_in.weight"),
    "more keys": lambda w: w | {"decoder.conv_in.extra": torch.zeros(3)},
    "wrong shape": lambda w: w | {"decoder.conv_out.bias": torch.zeros(4)},
    "wrong attention": lambda w: w | {
        "encoder.mid_block.attentions.0.to_q.weight": torch.zeros(64, 64, 3, 3)},
    "nothing": lambda w: {},
    "a list": lambda w: list(w.values()),
    "a tensor": lambda w: torch.zeros(3),
    "no tensors": lambda w: {k: 1.0 for k in w},
    "numbers for keys": lambda w: dict(enumerate(w.values())),
    "an empty state dict": lambda w: {"state_dict": {}, **w},
    "a nested one": lambda w: {"vae": w},
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_of_something_else(kind, theirs, narrow, tmp_path):
    path = tmp_path / "wrong.bin"
    torch.save(WRONG[kind](dict(theirs.state_dict())), path)
    said("sd", [path], path)


def test_the_sentence_names_the_wrong_keys(theirs, narrow, tmp_path):
    path = tmp_path / "wrong.bin"
    weights = without(dict(theirs.state_dict()), "quant_conv.bias", "decoder.conv_in.weight")
    torch.save(weights | {"decoder.conv_out.bias": torch.zeros(4)}, path)
    said("sd", [path], "2 of 244 tensors are missing, 0 unexpected, 1 of another shape",
         "quant_conv.bias", "decoder.conv_out.bias", "diffusion_pytorch_model")


def test_tiny_files_that_do_not_fit(taef2_files, tmp_path):
    encoder, decoder = taef2_files
    said("taef2", [encoder], "takes 2", "not 1")
    said("sd", [encoder, decoder], "takes 1", "not 2")
    said("taef2", [encoder, encoder], "taef2_encoder.pth")
    said("taef2", [decoder, decoder], "taef2_decoder.pth")
    said("taesd", [encoder, decoder], "taef2_encoder.pth", "not the taesd autoencoder")
    said("sd", [encoder], "taef2_encoder.pth", "not the sd autoencoder")
    for content in ({"0.weight": 3}, {0: torch.zeros(2)}, {"params": vae.read(encoder)},
                    [torch.zeros(2)]):
        torch.save(content, tmp_path / "wrong.pth")
        said("taef2", [tmp_path / "wrong.pth", decoder], tmp_path / "wrong.pth")


# --------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on this machine that answers `answer`, and torch.hub's cache in tmp_path/hub."""
    monkeypatch.setenv("no_proxy", "*")
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(site.status)
            self.send_header("Content-Length", str(site.promised or len(site.answer)))
            self.end_headers()
            self.wfile.write(site.answer)

        def log_message(self, *args):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})

    def stop():
        http.shutdown()
        http.server_close()
        thread.join()

    site = SimpleNamespace(status=200, answer=b"", promised=None, asked=asked, stop=stop,
                           url=f"http://127.0.0.1:{http.server_port}/weights.pth",
                           cache=tmp_path / "hub" / "checkpoints")
    thread.start()
    yield site
    if thread.is_alive():
        stop()
    torch.hub.set_dir(before)


def good_file():
    file = io.BytesIO()
    torch.save({"weight": torch.arange(5000.0)}, file)
    return file.getvalue()


def hashed(content):
    return f"x-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def published(url, file_name):
    class Own_Weights(WeightsEnum):
        FILE = vae.entry(url, file_name=file_name)
    return Own_Weights.FILE


def download_fails(server, name, *named, requests=1):
    """fetch raises a sentence that says where a file fetched by hand goes; the cache is clean."""
    with pytest.raises(UserError) as failed:
        vae.fetch(published(server.url, name))
    sentence = str(failed.value)
    assert "\n" not in sentence
    for word in (server.url, server.cache / name, *named):
        assert str(word) in sentence, f"{word} is not in: {sentence}"
    assert len(server.asked) == requests


def clean(server):
    return not server.cache.exists() or not list(server.cache.iterdir())


@pytest.mark.parametrize("name", [hashed(good_file()), "plain.pth"])
def test_a_download_is_kept(server, name):
    server.answer = good_file()
    weights = published(server.url, name)
    assert torch.equal(vae.fetch(weights)["weight"], torch.arange(5000.0))
    assert [p.name for p in server.cache.iterdir()] == [name]
    server.stop()
    assert torch.equal(vae.fetch(weights)["weight"], torch.arange(5000.0))
    assert server.asked == ["/weights.pth"]


def test_a_file_laid_into_the_cache_by_hand(server):
    server.cache.mkdir(parents=True)
    (server.cache / "plain.pth").write_bytes(good_file())
    assert "weight" in vae.fetch(published(server.url, "plain.pth"))
    assert not server.asked


NAMES = [hashed(good_file()), "plain.pth"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_a_server_that_refuses(server, status, name):
    server.status, server.answer = status, b"<html>no</html>"
    download_fails(server, name, str(status))
    assert clean(server)


@pytest.mark.parametrize("name", NAMES)
def test_a_web_page_instead_of_the_file(server, name):
    server.answer = b"<!DOCTYPE html>\n<html>log in first</html>\n" * 50
    download_fails(server, name)
    assert clean(server)


@pytest.mark.parametrize("name", NAMES)
def test_a_connection_that_ends_early(server, name):
    whole = good_file()
    server.answer, server.promised = whole[:len(whole) // 2], len(whole)
    download_fails(server, name)
    assert clean(server)


def test_other_bytes_than_the_hash_promises(server):
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, file)
    server.answer = file.getvalue()
    download_fails(server, NAMES[0])
    assert clean(server)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_listens(server, name):
    server.stop()
    download_fails(server, name, "--vae-weights", requests=0)
    assert clean(server)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_in_the_cache(server, name):
    """It may be the user's: it is named and left where it is."""
    server.cache.mkdir(parents=True)
    (server.cache / name).write_bytes(good_file()[:3000])
    download_fails(server, name, "damaged", requests=0)
    assert (server.cache / name).stat().st_size == 3000


def test_a_cache_that_cannot_be_written(server):
    server.cache.parent.mkdir()
    server.cache.write_text("a file where the folder should be")
    with pytest.raises(UserError) as failed:
        vae.fetch(published(server.url, "plain.pth"))
    assert str(server.cache) in str(failed.value) and "\n" not in str(failed.value)


@pytest.fixture
def small_files(server, monkeypatch):
    """A tiny autoencoder, and its two files laid into the cache by hand."""
    torch.manual_seed(0)
    network, published_files = vae.TinyAutoencoder(4, pooled=False), []
    server.cache.mkdir(parents=True)
    for half in ("encoder", "decoder"):
        torch.save(getattr(network, half).state_dict(), server.cache / f"{half}.pth")
        published_files.append(published(server.url, f"{half}.pth"))
    monkeypatch.setitem(vae.AUTOENCODERS, "taesd", (
        lambda: vae.TinyAutoencoder(4, pooled=False), published_files))
    return network


def test_the_network_from_the_cache(small_files):
    assert vae.fingerprint(vae.load("taesd")) == vae.fingerprint(small_files)


def test_another_networks_file_in_the_cache(small_files, server):
    """The sentence says where it lies, since nobody named it."""
    torch.save({"0.weight": torch.zeros(3)}, server.cache / "decoder.pth")
    sentence = said("taesd", [], server.cache / "decoder.pth")
    assert "leave --vae-weights out" not in sentence
