"""What all tests share: the path to the code, one thread, no display, the folder of MNIST."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--data-dir", metavar="DIR", help="folder that holds MNIST/raw "
                     "[$SCFLOW_TEST_DATA, else ../shared/data beside the repository]")


@pytest.fixture(scope="session")
def mnist_dir(request):
    """The folder that holds MNIST/raw, as a Path; tests that need it are skipped without it."""
    named = request.config.getoption("--data-dir") or os.environ.get("SCFLOW_TEST_DATA")
    path = Path(named or ROOT.parent / "shared" / "data").resolve()
    if not (path / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST/raw in {path}; name its folder by --data-dir or SCFLOW_TEST_DATA")
    return path
