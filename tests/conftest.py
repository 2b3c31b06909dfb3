"""What all tests share: path to the code, one thread, no display, folders, data and weights."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"                # else choose_device takes all cores
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
pytest.register_assert_rewrite("running")          # its asserts explain themselves, too


def pytest_addoption(parser):
    parser.addoption("--data-dir", metavar="DIR", help="folder that holds MNIST/raw and "
                     "faces256, the autoencoders' files in ../weights beside it "
                     "[$SCFLOW_TEST_DATA, else ../shared/data beside the repository]")


def needed(request, *parts):
    """A path below the folder of test data, with that folder; skips the test if it is absent."""
    named = request.config.getoption("--data-dir") or os.environ.get("SCFLOW_TEST_DATA")
    folder = Path(named or ROOT.parent / "shared" / "data").resolve()
    path = folder.joinpath(*parts).resolve()
    if not path.exists():
        pytest.skip(f"there is no {path}; name the folder of data by --data-dir or "
                    "SCFLOW_TEST_DATA")
    return path, folder


@pytest.fixture(scope="session")
def mnist_dir(request):
    """The folder that holds MNIST/raw, as a Path; tests that need it are skipped without it."""
    return needed(request, "MNIST", "raw")[1]


@pytest.fixture(scope="session")
def faces_dir(request):
    """The folder of 256 x 256 JPEGs of faces, as a Path; tests that need it are skipped."""
    return needed(request, "faces256")[0]


@pytest.fixture(scope="session")
def taef2_files(request):
    """TAEF2's encoder and decoder as Paths; tests that need them are skipped without them."""
    return tuple(needed(request, "..", "weights", f"taef2_{half}.pth")[0]
                 for half in ("encoder", "decoder"))


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Runs go to ./runs and latents to ./latents; files name this fixture in `pytestmark`."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures cost more than a tiny run does; most tests are not about them."""
    def touch(path, *args, **more):
        Path(path).touch()
    monkeypatch.setattr("sample.strips", touch)
    monkeypatch.setattr("harness.run.Run.strips", lambda run, path, dataset: touch(path))
    monkeypatch.setattr("harness.pictures.losses", touch)
