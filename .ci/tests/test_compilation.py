"""The CUDA text, compiled by nvcc for each architecture: no spills, and no kernel compiled away."""

import functools
import itertools
import json
import re
import shutil
import subprocess
from unittest import mock

import pytest
from test_pasting import in_new_python
from torch.utils import cpp_extension

import check

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def families(cuda: str) -> list[list[int]]:
    """Neighbours for which the text, and nvcc, make the same PTX: one compilation serves them."""
    borders = {int(n) // 10 for n in re.findall(r"__CUDA_ARCH__ *[<>=!]+ *(\d+)", cuda)}
    borders |= {100}  # where nvcc 13 has another code generator
    key = lambda architecture: sum(border <= architecture for border in borders)
    return [list(family) for _, family in itertools.groupby(ARCHITECTURES, key)]


FAMILIES = families(check.TEXT_PATH.read_text())


def print_build_arguments():
    """What the text would hand to load_inline, also where torch has no CUDA."""
    with (
        mock.patch("torch.utils.cpp_extension.load_inline") as load_inline,
        mock.patch("torch.version.cuda", "13.0"),
        mock.patch("torch.utils.cpp_extension.CUDA_HOME", "/usr/local/cuda"),
    ):
        check.execute(check.TEXT_PATH.read_text())
    print(json.dumps(load_inline.call_args.kwargs))


@functools.cache
def compiled(family: tuple[int, ...], directory) -> dict[int, str]:
    """What ptxas says of each of the family's architectures."""
    said = in_new_python(print_build_arguments, TORCH_CUDA_ARCH_LIST="9.0")
    arguments = json.loads(said.splitlines()[-1])
    source = directory / "fused_batch_norm.cu"
    source.write_text("\n".join(arguments["cuda_sources"]))
    # torch's flags and the text's own, less those that choose an architecture
    flags = ["-std=c++17", *cpp_extension.COMMON_NVCC_FLAGS]
    flags += [flag for flag in arguments["extra_cuda_cflags"] if "arch" not in flag]
    flags += [f"-gencode=arch=compute_{family[0]},code=sm_{a}" for a in family]
    command = [NVCC, *flags, "-Xptxas", "-v", "-fatbin", "-o", source.with_suffix(".bin"), source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = re.split(r"^ptxas info\s*: Compiling entry function", done.stderr, flags=re.M)[1:]
    return {a: "".join(kernel for kernel in kernels if f"for 'sm_{a}'" in kernel) for a in family}


def parameters():
    for family in FAMILIES:
        for a in family:  # one worker for a family, since it is compiled once
            marks = pytest.mark.xdist_group(f"nvcc {family[0]}")
            yield pytest.param(a, tuple(family), id=f"sm_{a}", marks=marks)


@pytest.mark.skipif(not NVCC, reason="no nvcc")
@pytest.mark.parametrize("architecture, family", list(parameters()))
def test_compiled_without_spills(architecture, family, tmp_path_factory, record_property):
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    family = tuple(a for a in family if f"sm_{a}" in known)
    if architecture not in family:
        pytest.skip("this nvcc is of another time")
    said = compiled(family, tmp_path_factory.getbasetemp())[architecture]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
    record_property("registers", registers)
    assert spilled == 0, f"{spilled} bytes spilled by {len(registers)} kernels"
    assert min(registers, default=0) >= 24, "a kernel is compiled away, or down to a trap"
