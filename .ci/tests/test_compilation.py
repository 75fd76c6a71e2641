"""The CUDA text, compiled by nvcc for each architecture: no spills, and no kernel compiled away."""

import itertools
import json
import re
import shutil
import subprocess
from unittest import mock

import pytest
from scenes import in_new_python
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


@pytest.mark.skipif(not NVCC, reason="no nvcc")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: " ".join(f"sm_{a}" for a in family))
def test_compiled_without_spills(family, tmp_path):
    """By one compilation; ptxas says of each kernel what it takes."""
    said = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout
    family = [a for a in family if f"sm_{a}" in said.split()]
    if not family:
        pytest.skip("this nvcc is of another time")
    printed = in_new_python(print_build_arguments, TORCH_CUDA_ARCH_LIST="9.0")
    arguments = json.loads(printed.splitlines()[-1])
    source = tmp_path / "fused_batch_norm.cu"
    source.write_text("\n".join(arguments["cuda_sources"]))
    # torch's flags and the text's own, less those that choose an architecture
    flags = ["-std=c++17", *cpp_extension.COMMON_NVCC_FLAGS]
    flags += [flag for flag in arguments["extra_cuda_cflags"] if "arch" not in flag]
    flags += [f"-gencode=arch=compute_{family[0]},code=sm_{a}" for a in family]
    command = [NVCC, *flags, "-Xptxas", "-v", "-fatbin", "-o", source.with_suffix(".bin"), source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = re.split(r"^ptxas info\s*: Compiling entry function", done.stderr, flags=re.M)[1:]
    for a in family:
        taken = [kernel for kernel in kernels if f"for 'sm_{a}'" in kernel]
        registers = [int(re.search(r"Used (\d+) registers", kernel)[1]) for kernel in taken]
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", "".join(taken))]
        print(f"sm_{a}: {len(registers)} kernels, up to {max(registers)} registers")
        assert sum(spilled) == 0, f"sm_{a}: {sum(spilled)} bytes spilled by {len(taken)} kernels"
        assert min(registers) >= 24, f"sm_{a}: a kernel is compiled away, or down to a trap"
