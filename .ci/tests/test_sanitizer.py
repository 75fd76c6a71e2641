"""compute-sanitizer over small cases: memory, shared memory's order, barriers, initialisation."""

import shutil
from dataclasses import replace

import cases
import pytest
from scenes import in_new_python

import check

CUDA_BIN = "/usr/local/cuda/bin/"
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(f"{CUDA_BIN}compute-sanitizer")


def small_cases():
    """Forwards only, of the table's small shapes: PyTorch's kernels have no part in it."""
    target = check.load_on_gpu(check.TEXT_PATH.read_text())
    for case in cases.CASES:
        if small := cases.small_case(case):
            small = replace(small, data="uniform")
            x = check.make_x(small, "cuda")
            model = target.model(x.shape[1], dtype=small.params or small.dtype)
            model.train(small.training)(x)


@pytest.mark.cuda
@pytest.mark.skipif(not SANITIZER, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_nothing_found_by(tool, model_new):
    """model_new: built before, or the compiler would be watched too."""
    in_new_python(small_cases, under=(SANITIZER, "--tool", tool, "--error-exitcode", "9"))
