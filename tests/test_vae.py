"""Autoencoders: equal to diffusers', from every published file, and from files that are not it."""

import hashlib
import os
import re
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import WeightsEnum

import vae
from config import LATENT_CHANNELS
from harness import UserError, checkpoint
from harness.pictures import from_uint8
from running import Mischief, gen

NARROW = (32, 32, 64, 64)


def diffusers_model(widths):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=4, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


@pytest.fixture(scope="module")
def theirs():
    """Diffusers' autoencoder, narrow; all its weights are random, those of the norms, too."""
    model = diffusers_model(NARROW).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 1:
            p.copy_(p + 0.2 * torch.randn(p.shape, generator=gen(1)))
    return model


def ours_of(theirs):
    ours = vae.AutoencoderKL(NARROW).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return ours


@pytest.fixture
def narrow(monkeypatch):
    """`vae.load("sd", ...)` builds the narrow network."""
    monkeypatch.setitem(vae.AUTOENCODERS, "sd", (lambda: vae.AutoencoderKL(NARROW),
                                                 [vae.Autoencoder_Weights.SD_FT_MSE]))


close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def agree(ours, theirs, height, width):
    """Moments and images of both networks are equal."""
    x = torch.rand(2, 3, height, width, generator=gen(2)) * 2 - 1
    (mean, logvar), posterior = ours.encode(x), theirs.encode(x).latent_dist
    close(mean, posterior.mean)
    close(logvar, posterior.logvar)
    assert mean.std() > 0.01 and mean.shape == (2, 4, height // 8, width // 8)
    z = torch.randn(mean.shape, generator=gen(3))
    images = theirs.decode(z).sample
    close(ours.decode(vae.AutoencoderKL.scale * z), images)
    assert images.std() > 0.01


# ----------------------------------------------------------- the same network as in diffusers


def test_the_networks_have_the_published_sizes():
    with torch.device("meta"):
        networks = {name: build() for name, (build, _) in vae.AUTOENCODERS.items()}
    assert {name: network.channels for name, network in networks.items()} == LATENT_CHANNELS
    tensors = networks["sd"].state_dict()
    assert len(tensors) == 248
    assert sum(t.numel() for t in tensors.values()) == 83_653_863


def test_the_real_network_equals_diffusers(tmp_path):
    """With all its channels, loaded from a file as users do."""
    theirs = diffusers_model((128, 256, 512, 512)).eval()
    torch.save(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    ours = vae.load("sd", [tmp_path / "diffusion_pytorch_model.bin"])
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    agree(ours, theirs, 16, 16)


def test_a_narrow_network_equals_diffusers_at_any_size_that_divides_by_8(theirs):
    agree(ours_of(theirs), theirs, 24, 40)


def test_log_variances_are_clamped(theirs):
    ours = ours_of(theirs)
    ours.quant_conv.bias.copy_(torch.tensor([0.0] * 4 + [100.0, -100.0] * 2))
    logvar = ours.encode(torch.zeros(1, 3, 16, 16))[1]
    assert logvar[:, 0].eq(20).all() and logvar[:, 1].eq(-30).all()


def test_draws_of_the_posterior(theirs):
    ours = ours_of(theirs)
    assert ours.scale == 0.18215 and ours.stochastic and ours.channels == 4
    mean, logvar = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([-30.0, 0.0, 2.0])
    z0 = ours.sample(mean, logvar, torch.randn(100_000, 3, generator=gen())) / 0.18215
    assert torch.allclose(z0.mean(0), mean, atol=0.03)
    assert torch.allclose(z0.std(0), (logvar / 2).exp(), rtol=0.02, atol=1e-5)
    # without noise it is the mean
    assert torch.equal(ours.sample(mean, logvar), 0.18215 * mean)


# ------------------------------------------------------------------- every form of file it has


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(weights):
    for new, old in OLD.items():
        weights = {k.replace(f".0.{new}.", f".0.{old}."): v for k, v in weights.items()}
    return weights


def four_dimensions(weights):
    return {k: v[:, :, None, None] if "attentions.0" in k and v.ndim == 2 else v
            for k, v in weights.items()}


def safetensors(weights, path):
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in weights.items()}, path)


legacy = partial(torch.save, _use_new_zipfile_serialization=False)
FORMS = {                          # name: (names and types of the weights, what writes the file)
    "new.bin": (dict, torch.save),
    "old.bin": (lambda w: old_names(four_dimensions(w)), torch.save),
    "old.safetensors": (old_names, safetensors),
    "compiled.pt": (lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()}, legacy),
    "half.bin": (lambda w: {k: v.half() for k, v in w.items()}, torch.save),
    # the first bytes tell what a file is, not its suffix
    "safe.ckpt": (dict, safetensors),
    "pickled.safetensors": (dict, torch.save),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_published_form_is_the_same_network(name, theirs, narrow, tmp_path):
    form, save = FORMS[name]
    save(form(theirs.state_dict()), tmp_path / name)
    loaded = vae.load("sd", [tmp_path / name]).state_dict()
    assert loaded.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], value.half().float() if "half" in name else value), key


# ------------------------------------------------------------------------------- tiny ones


def test_diffusers_single_file_of_both_halves_is_the_same_tiny_autoencoder(tmp_path):
    """AutoencoderTiny, as the hub has it: encoder.layers.N and decoder.layers.N."""
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    theirs = AutoencoderTiny().eval()
    torch.save(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    ours = vae.load("taesd", [tmp_path / "diffusion_pytorch_model.bin"])
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        z0 = theirs.encode(x).latents
        torch.testing.assert_close(ours.encode(x)[0], z0, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.decode(z0), theirs.decode(z0).sample, atol=1e-5, rtol=1e-4)


def test_taef2_from_its_files_in_both_orders(taef2_files):
    one, other = (vae.load("taef2", files) for files in (taef2_files, taef2_files[::-1]))
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(other)
    assert one.channels == 32 and one.scale == 1 and not one.stochastic
    assert one.encode(torch.zeros(1, 3, 16, 16))[1] is None


def test_taef2_reconstructs_faces(taef2_files, faces_dir):
    codec = vae.load("taef2", taef2_files)
    faces = [np.array(Image.open(path)) for path in sorted(faces_dir.glob("*.jpg"))[::200]]
    x = from_uint8(torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2))
    z0 = codec.sample(*codec.encode(x))
    error = (codec.decode(z0).clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4
    psnr = -10 * error.log10()
    assert psnr.mean() >= 32.8 and psnr.min() > 26
    assert z0.mean().item() == pytest.approx(-0.02, abs=0.03)
    assert z0.std().item() == pytest.approx(0.91, abs=0.03)


def test_fingerprints_change_with_any_weight():
    torch.manual_seed(0)
    network = vae.TinyAutoencoder(4, pooled=False)
    before = checkpoint.fingerprint(network)
    assert re.fullmatch("[0-9a-f]{12}", before) and checkpoint.fingerprint(network) == before
    with torch.no_grad():
        network.decoder[-1].bias[1] += 1e-6
    assert checkpoint.fingerprint(network) != before


# ------------------------------------------------------------------------- files that are not it


def said(name, files, *named):
    """The sentence that refuses files of weights; it is one line and names them."""
    with pytest.raises(UserError) as refused:
        vae.load(name, [str(f) for f in files])
    sentence = str(refused.value)
    assert "\n" not in sentence
    for word in named:
        assert str(word) in sentence, f"{word!r} is not in: {sentence}"
    return sentence


def without(weights, *keys):
    return {k: v for k, v in weights.items() if k not in keys}


WRONG = {                                          # name: (content from weights, words named)
    "another network": (lambda w: torch.nn.Linear(2, 2).state_dict(), "2 unexpected"),
    "missing and misshapen": (
        lambda w: without(w, "quant_conv.bias") | {"decoder.conv_out.bias": torch.zeros(4)},
        "1 tensors are missing, 0 unexpected, 1 of another shape", "quant_conv.bias",
        "decoder.conv_out.bias", "not the sd autoencoder", "diffusion_pytorch_model"),
    "nan": (lambda w: w | {"quant_conv.bias": torch.full((8,), float("nan"))}, "quant_conv.bias",
            "not finite"),
    "a list": (lambda w: list(w.values()), "a list"),
    "numbers for keys": (lambda w: dict(enumerate(w.values())), "244 tensors are missing"),
    "a nested one": (lambda w: {"state_dict": w}, "244 tensors are missing"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_of_something_else(kind, theirs, narrow, tmp_path):
    content, *named = WRONG[kind]
    torch.save(content(dict(theirs.state_dict())), tmp_path / "wrong.bin")
    said("sd", [tmp_path / "wrong.bin"], tmp_path / "wrong.bin", *named)


def test_files_that_are_damaged_or_other_bytes(theirs, narrow, tmp_path):
    safetensors(theirs.state_dict(), tmp_path / "a")
    torch.save(theirs.state_dict(), tmp_path / "b")
    contents = [b"<!DOCTYPE html><html>no such file</html>", b"\x80\x02]q\x00", bytes(500)]
    for whole in ((tmp_path / name).read_bytes() for name in "ab"):
        contents += [whole[:end] for end in (0, 1, 100, len(whole) // 2, -1)]
    path = tmp_path / "cut.bin"
    for content in contents:
        path.write_bytes(content)
        said("sd", [path], path, "damaged")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    said("sd", [path], "Git LFS pointer")
    said("sd", [tmp_path / "no.bin"], tmp_path / "no.bin", "--vae-weights")


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_refused_and_do_not_run(zipped, theirs, narrow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Mischief(), {**theirs.state_dict(), "callbacks": Mischief()}):
        torch.save(content, "evil.ckpt", _use_new_zipfile_serialization=zipped)
        said("sd", ["evil.ckpt"], "evil.ckpt", "could run code" if zipped else "damaged")
    assert not os.path.exists("mischief")


def test_tiny_files_that_do_not_fit(taef2_files, tmp_path):
    encoder, decoder = taef2_files
    said("taef2", [encoder], "taef2_decoder.pth", "decoder.1.weight")
    said("sd", [encoder, decoder], "takes 1", "not 2")
    said("taef2", [encoder, encoder], "taef2_encoder.pth")
    said("taef2", [decoder, decoder], "taef2_decoder.pth")
    said("taesd", [encoder, decoder], "taef2_encoder.pth", "not the taesd autoencoder")
    said("sd", [encoder], "taef2_encoder.pth", "not the sd autoencoder")
    for content in ({"0.weight": 3}, {0: torch.zeros(2)}, {"params": vae.read(encoder)}):
        torch.save(content, tmp_path / "wrong.pth")
        said("taef2", [tmp_path / "wrong.pth", decoder], tmp_path / "wrong.pth")


# --------------------------------------------------------------------------------- downloads


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """torch.hub's cache."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on this machine: its URL, its folder, and the requests that it had."""
    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            asked.append(code)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    folder, asked = tmp_path / "site", []
    folder.mkdir()
    http = HTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}/w.pth", file=folder / "w.pth",
                          asked=asked)
    http.shutdown()
    http.server_close()
    thread.join()


def published(url, file_name):
    class Own_Weights(WeightsEnum):
        FILE = vae.entry(url, file_name)
    return Own_Weights.FILE


@pytest.mark.parametrize("hashed", [True, False])
def test_a_file_is_downloaded_once_or_put_into_the_cache_by_hand(server, cache, hashed):
    torch.save({"weight": torch.ones(5000)}, server.file)
    digits = hashlib.sha256(server.file.read_bytes()).hexdigest()[:8]
    name = f"x-{digits}.pth" if hashed else "plain.pth"
    for _ in range(2):
        assert torch.equal(vae.fetch(published(server.url, name))["weight"], torch.ones(5000))
    assert [p.name for p in cache.iterdir()] == [name] and len(server.asked) == 1
    (cache / "mine.pth").write_bytes(server.file.read_bytes())
    assert "weight" in vae.fetch(published(server.url, "mine.pth")) and len(server.asked) == 1


@pytest.mark.parametrize("name, content, word", [
    ("plain.pth", None, "404"), ("plain.pth", b"<html>log in first</html>\n" * 50, ""),
    ("x-01234567.pth", b"another file", "hash")])
def test_a_download_that_fails_says_where_to_put_the_file_and_leaves_nothing(
        server, cache, name, content, word):
    if content:
        server.file.write_bytes(content)
    with pytest.raises(UserError) as failed:
        vae.fetch(published(server.url, name))
    assert "\n" not in str(failed.value) and len(server.asked) == 1
    for text in (server.url, cache / name, "--vae-weights", word):
        assert str(text) in str(failed.value)
    assert not list(cache.iterdir())


def test_a_damaged_file_in_the_cache_is_named_and_stays(server, cache):
    (cache / "w.pth").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged.*delete it") as failed:
        vae.fetch(published(server.url, "w.pth"))
    assert str(cache / "w.pth") in str(failed.value) and not server.asked
    assert (cache / "w.pth").read_bytes() == b"damaged"


def test_of_several_processes_only_the_first_downloads(cache, monkeypatch):
    """The others wait for its file; here it comes while they wait. They never delete it."""
    monkeypatch.setattr(vae, "FIRST", False)
    monkeypatch.setattr(vae, "wait", lambda: torch.save({"weight": torch.ones(1)}, cache / "w.pth"))
    assert "weight" in vae.fetch(published("http://nowhere.invalid/w.pth", "w.pth"))


def test_the_network_from_the_cache(cache, monkeypatch):
    torch.manual_seed(0)
    network, files = vae.TinyAutoencoder(4, pooled=False), []
    for half in ("encoder", "decoder"):
        torch.save(getattr(network, half).state_dict(), cache / f"{half}.pth")
        files.append(published(f"http://nowhere.invalid/{half}.pth", f"{half}.pth"))
    monkeypatch.setitem(vae.AUTOENCODERS, "taesd", (vae.AUTOENCODERS["taesd"][0], files))
    assert checkpoint.fingerprint(vae.load("taesd")) == checkpoint.fingerprint(network)

    # another network's file: the sentence says where it is, since nobody named it
    torch.save({"0.weight": torch.zeros(3)}, cache / "decoder.pth")
    sentence = said("taesd", [], cache / "decoder.pth")
    assert "leave --vae-weights out" not in sentence
