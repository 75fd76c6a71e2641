"""compute-sanitizer over small cases: memory, shared memory's order, barriers, initialisation."""

import os
import shutil
from dataclasses import replace

import cases
import mutants
import pytest
from scenes import in_new_python

import check

CUDA_BIN = "/usr/local/cuda/bin/"
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(f"{CUDA_BIN}compute-sanitizer")
WRONG = {name: edits for name, _, *edits in mutants.MUTANTS}
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not SANITIZER, reason="no compute-sanitizer"),
]


def load():
    """The text, or the mutant of it that the environment names."""
    text, wrong = check.TEXT_PATH.read_text(), os.environ.get("WRONG")
    if wrong:
        text = check.renamed(mutants.apply(text, *WRONG[wrong]), "wrong")
    return check.load_on_gpu(text)


def small_cases():
    """Forwards of the table's small shapes."""
    target = load()
    for case in cases.CASES:
        if small := cases.small_case(case):
            small = replace(small, data="uniform")
            x = check.make_x(small, "cuda")
            model = target.model(x.shape[1], dtype=small.params or small.dtype)
            model.train(small.training)(x).sum().item()


def sanitized(tool: str, **environment: str) -> str:
    """Each tensor is an allocation of its own: in PyTorch's large blocks memcheck sees no end."""
    in_new_python(load, **environment)  # else the compiler would be watched, too
    under = (SANITIZER, "--tool", tool, "--error-exitcode", "9", "--print-limit", "9")
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **environment}
    return in_new_python(small_cases, under=under, **settings)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_nothing_found_by(tool):
    assert "SUMMARY: 0 " in sanitized(tool)


@pytest.mark.parametrize(
    "tool, wrong",
    [
        ("memcheck", "reads past the end of x"),
        ("racecheck", "results read before they are there"),
        ("initcheck", "the second half of the vectors in shared memory left out"),
    ],
)
def test_a_wrong_kernel_is_found_by(tool, wrong, tmp_path):
    with pytest.raises(AssertionError, match="SUMMARY: [1-9]"):
        sanitized(tool, WRONG=wrong, TORCH_EXTENSIONS_DIR=str(tmp_path))
