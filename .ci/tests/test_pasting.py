"""The text of model_new.py in kernel benchmark harnesses: how they load it, and what they refuse.

Each scene is a Python of its own, since a text that is executed leaves operators in its process.
"""

import os
import re

import pytest
import torch
from scenes import in_new_python
from torch.utils import cpp_extension

import check

TEXT = check.TEXT_PATH.read_text()
REFERENCE = (check.ROOT / "reference_model.py").read_text()
RESERVED = {"Model", "batch_size", "features", "dim1", "dim2", "get_inputs", "get_init_inputs"}

# Anywhere in the text, comments too: KernelBench leaves those out, BackendBench and CUDA-L1 do not.
REFUSED = {
    "the word pass": r"\bpass\b",
    "try:": r"\btry\s*:",
    "except": r"\bexcept\b\s*(:|\w)",
    "threads or processes": r"\bthreading\b|\bmultiprocessing\b|\bconcurrent\.futures\b",
    "patched timers": r"(torch\.cuda\.(Event|synchronize)|time\.(time|perf_counter))\s*=(?!=)",
    "_make_subclass": r"_make_subclass",
    "a subclass of torch.Tensor": r"class\s+\w+\s*\([^)]*\btorch\.Tensor\b",
    "torch.nn.functional": r"torch\.nn\.functional|\bnn\.functional|\bF\.\w+",
    "torch.batch_norm": r"torch\.(native_)?batch_norm\b",
    "torch compute calls": r"torch\.(mean|var|std|sum|sqrt|rsqrt|add|mul|matmul|addcmul|var_mean"
    r"|native_batch_norm)\s*\(",
    "a torch layer": r"\bnn\.(BatchNorm|Conv|Linear|LayerNorm|GroupNorm|InstanceNorm|SyncBatch)\w*",
    "torch.nn.modules": r"\bnn\.modules\b",
    "streams": r"(?i)stream\(",
    "half casts": r"__float2half(_rn)?\s*\(|static_cast<\s*half\s*>|\.half\s*\("
    r"|\.to\(\s*torch\.float16",
    "input(": r"input\s*\(",
    "sleep": r"time\.sleep\s*\(",
    "while True": r"while\s+True\s*:",
    "a future import": r"from\s+__future__",
    "a fixed operator namespace": r"TORCH_LIBRARY(_FRAGMENT)?\s*\(\s*(?!TORCH_EXTENSION_NAME)",
    "__file__": r"\b__file__\b",
    "inspect or pickle": r"\binspect\.|\bpickle\b",
}


@pytest.mark.parametrize("pattern", REFUSED.values(), ids=REFUSED)
def test_text_is_free_of(pattern):
    for number, line in enumerate(TEXT.splitlines(), 1):
        assert not re.search(pattern, line), f"model_new.py:{number}: {line.strip()}"


@pytest.mark.parametrize("required", ["__global__", "load_inline"])
def test_text_has(required):
    assert required in TEXT


# --------------------------------------------------------------------------------------- scenes


WITHOUT_GPU = (
    "(torch must be a CUDA build|nvcc must be installed|a CUDA device must be present).*, got"
)


def use(names: dict) -> None:
    """ModelNew as a harness uses it: against torch; without a GPU, what forward says."""
    model, x = names["ModelNew"](64), torch.rand(2, 64, 4, 4)
    if torch.cuda.is_available():
        y = model.cuda()(x.cuda()).detach().cpu()
        want = torch.nn.BatchNorm2d(64)(x).detach()
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    else:
        says(WITHOUT_GPU, names)


def says(pattern: str, names: dict) -> None:
    """forward raises, since it cannot run here, and says why."""
    with pytest.raises(RuntimeError, match=pattern):
        names["ModelNew"](64)(torch.rand(2, 64, 4, 4))


def without_file_or_module():
    use(check.execute(TEXT))


def behind_two_lines():
    """As KernelBench puts there."""
    directory = os.path.dirname(cpp_extension._get_build_directory("fused_batch_norm", False))
    line = f"os.environ['TORCH_EXTENSIONS_DIR'] = {directory!r}"
    use(check.execute(f"import os\n{line}\n{TEXT}"))


def in_one_dict(*texts: str):
    names = check.execute("\n".join(texts))
    use(names)
    assert names["Model"](*names["get_init_inputs"]()).bn.num_features == names["features"] == 64


def behind_the_reference():
    in_one_dict(REFERENCE, TEXT)


def before_the_reference():
    in_one_dict(TEXT, REFERENCE)


def six_times():
    for _ in range(6):
        use(check.execute(TEXT))


def without_names_of_the_reference():
    assert not RESERVED & set(check.execute(TEXT))


def without_nvcc():
    torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", None
    says("nvcc must be installed .*, got none", check.execute(TEXT))


def torch_without_cuda():
    torch.version.cuda, cpp_extension.CUDA_HOME = None, "/usr/local/cuda"
    says("torch must be a CUDA build, got .* without CUDA", check.execute(TEXT))


def torch_2_8():
    torch.__version__ = type(torch.__version__)("2.8.0")
    says(r"torch must be 2\.9 or later, got 2\.8\.0", check.execute(TEXT))


def no_gpu_and_no_list():
    """TORCH_CUDA_ARCH_LIST, without which torch would raise an IndexError."""
    torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", "/usr/local/cuda"
    says(r"TORCH_CUDA_ARCH_LIST set\), got none", check.execute(TEXT))


SCENES = [
    without_file_or_module,
    behind_two_lines,
    behind_the_reference,
    before_the_reference,
    six_times,
    without_names_of_the_reference,
    without_nvcc,
    torch_without_cuda,
    torch_2_8,
]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_executed(scene):
    in_new_python(scene)


def test_a_node_without_gpu_or_list_says_so():
    in_new_python(no_gpu_and_no_list, CUDA_VISIBLE_DEVICES="-1", TORCH_CUDA_ARCH_LIST="")


# ------------------------------------------------------------------------------- cold, on a GPU


def and_again_from_another_directory():
    use(check.execute(TEXT))
    os.environ["TORCH_EXTENSIONS_DIR"] += "/second"
    use(check.execute(TEXT))


def compiles_but_has_no_gpu():
    assert not torch.cuda.is_available()
    says("x must be on a CUDA device, got", check.execute(TEXT))


@pytest.mark.cuda
def test_cold_build_in_a_new_directory(tmp_path):
    settings = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": ""}
    in_new_python(without_file_or_module, **settings)


@pytest.mark.cuda
def test_arch_list_of_another_gpu_then_again_from_another_directory(tmp_path):
    settings = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "Ada"}
    in_new_python(and_again_from_another_directory, **settings)


@pytest.mark.cuda
def test_a_node_without_gpu_compiles(tmp_path):
    settings = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "9.0"}
    in_new_python(compiles_but_has_no_gpu, CUDA_VISIBLE_DEVICES="-1", **settings)
    assert list(tmp_path.rglob("*.so"))
