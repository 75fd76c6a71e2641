"""Where the tests run: on the CUDA device; without one on pretended devices, see .ci/emulator.

    python -m pytest .ci/tests                    all, with 100 random cases
    python -m pytest .ci/tests --seeds 1000       with more of them
    python -m pytest .ci/tests -k "7x7 and sm_80" some
    python -m pytest .ci/tests -n 0 --pdb         in this process

`CUDA_VISIBLE_DEVICES= python -m pytest .ci/tests` pretends though there is a GPU.
"""

import os

import cases
import pytest
import torch
from texts import any_plan_text

import check

torch.set_num_threads(1)  # each worker is a process of its own


def pytest_addoption(parser):
    parser.addoption(
        "--seeds", type=int, default=100, metavar="N", help="random cases 1 … N (default 100)"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """A GPU works for one process at a time: more than a few only take its memory."""
    return min(8, os.cpu_count()) if torch.cuda.is_available() else None


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if item.get_closest_marker("emulated") and torch.cuda.is_available():
        pytest.skip("needs pretended devices, which take the place of a GPU where there is none")


@pytest.fixture(scope="session")
def device() -> str:
    """Of the tensors that ModelNew takes: "cuda", or "cpu" where the device is pretended."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def text() -> str:
    return check.TEXT_PATH.read_text()


@pytest.fixture(scope="session")
def model_new(text, device) -> dict:
    """The names that model_new.py's text made."""
    if device == "cuda":
        return check.load_on_gpu(text).names
    return check.load_emulator().load(text)


@pytest.fixture(scope="session")
def any_plan_model_new(text, device) -> dict:
    """The same, with any plan that fits in place of the fastest: see texts.plan_seed."""
    text = any_plan_text(text)
    return check.load_on_gpu(text).names if device == "cuda" else check.load_emulator().load(text)


@pytest.fixture
def target(model_new, device):
    """Where a check runs; without a GPU on the first pretended device, until it takes another."""
    target = check.Target(model_new, device, None if device == "cuda" else check.load_emulator())
    cases.pretend(target, cases.DEVICES[0], schedule=0)
    torch.manual_seed(0)
    yield target
    if device == "cuda":
        torch.cuda.empty_cache()
