"""Around a launch: what refuses it, what it changes, whose memory and multiprocessors it takes."""

import ctypes
import faulthandler
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time

import cases
import pytest
import torch
from cases import F16, F32, F64
from scenes import in_new_python
from test_behaviour import assert_same, random_x
from torch import nn
from torch.utils import cpp_extension

import check
from check import Case

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def buffers_of(model) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_unchanged(model, before) -> None:
    for name, buffer in model.named_buffers():
        assert_same(name, buffer.clone(), before[name])


# ------------------------------------------------------------------------ parameters and buffers


@modes
@pytest.mark.parametrize("absent", ["gamma", "beta"])
@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (0, 4, 5, 7)], ids=str)
def test_gamma_without_beta_and_the_reverse(target, shape, dtype, absent, training):
    """After construction, as with bias=None in PyTorch; and in the bound function."""
    params = F64 if dtype == F64 else F32
    ours, theirs = check.make_pair(target, shape[1], params, training)
    setattr(ours, absent, None)
    # On a GPU, PyTorch's own backward gives no gradient of beta without gamma.
    parameter, value = (theirs.weight, 1) if absent == "gamma" else (theirs.bias, 0)
    parameter.requires_grad_(False).fill_(value)
    x = random_x(target, *shape, dtype=dtype)
    theirs, dy = theirs.double(), torch.randn_like(x)
    results = []
    for model, to in ((ours, dtype), (theirs, F64)):
        leaf = x.to(to, copy=True).requires_grad_()
        y = model(leaf)
        wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(y, wanted, dy.to(to))
        results.append([y.detach(), *grads])
    assert [t.dtype for t in results[0]] == [dtype, dtype, params]
    tolerance = {F32: 1e-4, F16: 2e-2, F64: 1e-9}[dtype]
    for got, want in zip(*results):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    if training and x.numel():
        forward = target.names["_fused_batch_norm"].fused_batch_norm_forward
        y = forward(x, getattr(ours, "gamma", None), getattr(ours, "beta", None))
        assert_same("y", y.detach(), results[0][0])


def test_gamma_and_beta_of_two_types(target):
    x, gamma = random_x(target, 2, 4, 3, 3, dtype=F16), torch.ones(4, device=target.device)
    forward = target.names["_fused_batch_norm"].fused_batch_norm_forward
    with pytest.raises(RuntimeError, match="gamma and beta must .*, got"):
        forward(x, gamma, gamma.to(F16))


@modes
def test_batches_are_counted_as_in_pytorch_without_running_buffers(target, training):
    """As test-time adaptation leaves a model: running_mean = running_var = None."""
    ours, theirs = check.make_pair(target, 4, F32, training)
    for model in (ours, theirs):
        model.running_mean = model.running_var = None
    x = random_x(target, 3, 4, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x.clone()), rtol=1e-4, atol=1e-4)
    assert ours.num_batches_tracked.item() == theirs.num_batches_tracked.item() == training


def test_buffers_made_under_inference_mode(target):
    """Changed there, refused elsewhere before anything is changed; as PyTorch refuses them."""
    with torch.inference_mode():
        model = target.model(4)
        x = random_x(target, 3, 4, 5, 7)
        model(x)
        assert model.num_batches_tracked.item() == 1
    before = buffers_of(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="inference"):
        model(x.clone())
    assert_unchanged(model, before)
    model.eval()
    with torch.no_grad():
        assert model(x.clone()).isfinite().all()


@modes
def test_x_that_cannot_be_saved_for_backward_changes_no_buffer(target, training):
    model = target.model(4).train(training)
    before = buffers_of(model)
    with torch.inference_mode():
        x = random_x(target, 3, 4, 5, 7)
    with pytest.raises(RuntimeError, match="[Ii]nference tensors cannot be saved"):
        model(x)
    assert_unchanged(model, before)


def test_backward_of_eval_after_training_is_refused(target):
    """The running buffers that it needs have changed; PyTorch takes the changed ones."""
    model, x = target.model(4), random_x(target, 3, 4, 5, 7).requires_grad_()
    y = model.eval()(x)
    model.train()(x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = model.eval()(x)
    model(x.detach())
    y.sum().backward()


def test_each_changed_buffer_has_a_new_version(target):
    model, x = target.model(4), random_x(target, 3, 4, 5, 7)
    versions = lambda: [buffer._version for buffer in model.buffers()]
    before = versions()
    model(x)
    assert versions() == [version + 1 for version in before]
    model.eval()(x)
    assert versions() == [version + 1 for version in before]


def test_a_whole_net_back_into_plain_layers(target):
    """The README's lines."""
    ModelNew = target.names["ModelNew"]

    def net(layer):
        return nn.Sequential(layer(4), nn.ModuleDict({"gamma": layer(4, affine=False)}), layer(4))

    ours = net(lambda *args, **settings: ModelNew(*args, device=target.device, **settings))
    for layer in (ours[0], ours[2]):
        nn.init.normal_(layer.gamma)
        nn.init.normal_(layer.beta)
        layer(random_x(target, 3, 4, 5, 7))
    plain = net(nn.BatchNorm2d).to(target.device)

    state = ours.state_dict()
    for name in [n for n, m in ours.named_modules() if isinstance(m, ModelNew) and m.affine]:
        for theirs, own in (("weight", "gamma"), ("bias", "beta")):
            state[f"{name}.{theirs}"] = state.pop(f"{name}.{own}")
    plain.load_state_dict(state)

    for index in (0, 2):
        layer, x = plain[index].eval(), random_x(target, 3, 4, 5, 7)
        torch.testing.assert_close(layer(x), ours[index].eval()(x), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "dtype, value",
    [
        # 128 of them added up are more than the type holds.
        pytest.param(F32, 2.7e36, id="float32"),
        pytest.param(F64, 1.5e306, id="float64"),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_channel_of_a_large_value(target, dtype, value, layout):
    """y = beta, and running_mean is right."""
    x = check.LAYOUTS[layout](torch.full((4, 4, 8, 8), value, dtype=dtype, device=target.device))
    ours, _ = check.make_pair(target, 4, dtype)
    mean, var = ours.running_mean.clone().double(), ours.running_var.clone()
    with torch.no_grad():
        y = ours(x)
    assert_same("y", y, ours.beta.detach().view(1, -1, 1, 1).expand(y.shape).clone())
    want = 0.9 * mean + 0.1 * value
    torch.testing.assert_close(ours.running_mean.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.running_var, 0.9 * var)


# ------------------------------------------------------------------------------ refused launches


def test_refused_launch(target, text):
    """The message says what was refused; the next operator knows nothing of it."""
    threads = r"config\.blockDim = dim3\(.*?\);"
    broken, found = re.subn(threads, "config.blockDim = dim3(2048);", text)
    assert found == 1
    names = check.execute(broken) if target.cuda else target.emulator.load(broken)
    model, x = names["ModelNew"](4, device=target.device), random_x(target, 2, 4, 3, 5)
    before = buffers_of(model)
    said = r"fused_batch_norm_forward_kernel must .*Float \(2, 4, 3, 5\).*, got CUDA error: .*inval"
    with pytest.raises(RuntimeError, match=said):
        model(x)
    assert_same("x + 1", x + 1, 1 + x)
    assert_unchanged(model, before)


@pytest.mark.emulated
def test_a_refused_launch_that_leaves_its_error_is_seen(target, text):
    """Else the test above would know nothing without a GPU."""
    broken = text.replace("dim3(block_threads(arguments))", "dim3(2048)")
    broken, found = re.subn(r"\n.*cudaGetLastError\(\);.*", "", broken)
    assert found == 1
    names = target.emulator.load(broken)
    with pytest.raises(RuntimeError, match="host: the launch leaves an error"):
        names["ModelNew"](4)(random_x(target, 2, 4, 3, 5))


# Cooperative launches on any device: few channels, large ones.
COOPERATIVE = {
    "cumulative average": Case(
        "", (16, 64, 28, 28), settings=(("momentum", None),), small=(4, 4, 12, 12)
    ),
    "few large channels": Case("", (16, 4, 256, 256), small=(4, 1, 64, 64)),
    "channels-last": Case("", (16, 64, 28, 28), layout="channels_last", small=(8, 16, 16, 16)),
}


@pytest.mark.emulated
@pytest.mark.parametrize("case", COOPERATIVE.values(), ids=COOPERATIVE)
def test_on_one_of_seven_multiprocessors(target, case):
    target.emulator.set_device(7, 32 << 10, (8, 0), usable=1)
    cases.check_alone(target, cases.small_case(case), seed=1)


@pytest.mark.cuda
@pytest.mark.parametrize("case", COOPERATIVE.values(), ids=COOPERATIVE)
def test_in_a_green_context(target, case):
    from torch.cuda import green_contexts

    try:
        context = green_contexts.GreenContext.create(num_sms=16, device_id=0)
        context.set_context()
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"no green context: {error}")
    try:
        check.check_case(target, case)
        torch.cuda.synchronize()
    finally:
        context.pop_context()


@pytest.mark.cuda
def test_six_threads_with_other_shapes(target):
    """Each launch needs another amount of shared memory: none may take it from another."""
    shapes = (
        (4, 64, 256, 256),
        (16, 64, 128, 128),
        (128, 10, 64, 64),
        (32, 256, 28, 28),
        (64, 64, 112, 112),
        (2, 3, 512, 512),
    )
    xs = [random_x(target, *shape) for shape in shapes]
    models = [check.make_pair(target, shape[1], F32)[0] for shape in shapes]
    with torch.no_grad():
        wants = [model(x) for model, x in zip(models, xs)]
    torch.cuda.synchronize()
    failed, end = [], time.monotonic() + 10

    def work(model, x, want):
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                while time.monotonic() < end and not failed:
                    for _ in range(50):
                        y = model(x)
                    assert torch.equal(y, want), "another y"
        except Exception as error:
            failed.append(f"{tuple(x.shape)}: {error}")

    arguments = zip(models, xs, wants)
    threads = [threading.Thread(target=work, args=args) for args in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not failed, failed


# ----------------------------------------------------------------------------- whose memory it is


@pytest.mark.cuda
def test_x_on_a_device_that_is_not_the_current_one(target):
    """y, the statistics and scratch memory are on x's; nothing is asked of the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    shape = (16, 64, 256, 256)
    other = random_x(target, *shape).to("cuda:1")
    model = check.make_pair(target, shape[1], F32)[0]
    want = model(other.to("cuda:0")).detach().cpu()
    model = model.to("cuda:1")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    with torch.cuda.device(0):
        for leaf in (other, other.clone().requires_grad_()):
            y = model(leaf)
            assert y.device == other.device
            assert_same("y", y.detach().cpu(), want)
        (y * 2).sum().backward()
    assert leaf.grad.device == other.device
    assert torch.cuda.max_memory_allocated(0) == before


ALLOCATOR = """
#include <cuda_runtime_api.h>
#include <sys/types.h>
extern "C" {
int asked = 0;
void* allocate(ssize_t bytes, int, cudaStream_t) {
  void* memory = nullptr;
  ++asked;
  cudaMalloc(&memory, bytes);
  return memory;
}
void release(void* memory, ssize_t, int, cudaStream_t) { cudaFree(memory); }
}
"""


def with_another_allocator():
    path = os.environ["ALLOCATOR"]
    pluggable = torch.cuda.memory.CUDAPluggableAllocator(path, "allocate", "release")
    torch.cuda.memory.change_current_allocator(pluggable)
    target = check.load_on_gpu(check.TEXT_PATH.read_text())
    asked = ctypes.c_int.in_dll(ctypes.CDLL(path), "asked")
    model, x = target.model(64), torch.randn(16, 64, 128, 128, device="cuda")
    with torch.no_grad():
        before = asked.value
        y = model(x)
        assert asked.value >= before + 2, "y and the statistics come from somewhere else"
    want = nn.BatchNorm2d(64).cuda()(x).detach()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_memory_from_the_allocator_that_was_chosen_before_the_import(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or cpp_extension.CUDA_HOME is None:
        pytest.skip("no g++, or no CUDA toolkit, to compile an allocator with")
    source, library = tmp_path / "allocator.cpp", tmp_path / "allocator.so"
    source.write_text(ALLOCATOR)
    home = cpp_extension.CUDA_HOME
    command = [compiler, "-shared", "-fPIC", source, "-o", library, f"-I{home}/include"]
    command += [f"-L{home}/lib64", "-lcudart"]
    subprocess.run(command, check=True)
    in_new_python(with_another_allocator, ALLOCATOR=str(library))


# --------------------------------------------------------------------------- a compiled package


def packaged(make):
    """Each step says that it is over: the last one printed is the one before a crash."""
    model = nn.Sequential(make(16), nn.ReLU()).cuda().eval()
    x = torch.randn(8, 16, 14, 14, device="cuda")
    with torch.no_grad():
        want = model(x)
        print("eager", flush=True)
        batch = torch.export.Dim("batch", min=2, max=1024)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        print("exported", flush=True)
        print(program.graph, flush=True)
        torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-4)
        print("ran as exported", flush=True)
        decomposed = program.run_decompositions({})
        print("decomposed", flush=True)
        print(decomposed.graph, flush=True)
        path = f"{tempfile.mkdtemp()}/net.pt2"
        path = torch._inductor.aoti_compile_and_package(program, package_path=path)
        print("compiled", flush=True)
        loaded = torch._inductor.aoti_load_package(path)
        print("loaded", flush=True)
        for N in (8, 2, 33):
            x = torch.randn(N, 16, 14, 14, device="cuda")
            got = loaded(x)
            torch.cuda.synchronize()
            print(f"ran with N = {N}", flush=True)
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
    print("right", flush=True)


def package_of_ours():
    faulthandler.enable()
    packaged(check.load_on_gpu(check.TEXT_PATH.read_text()).names["ModelNew"])


def package_of_pytorchs():
    packaged(nn.BatchNorm2d)


@pytest.mark.cuda
def test_compiled_package():
    """A net with a dynamic batch, compiled ahead of time. Where it fails, PyTorch's layer is tried:
    its package too needs a C++ compiler whose libraries go with torch's."""
    try:
        said = in_new_python(package_of_ours)
    except AssertionError as ours:
        try:
            in_new_python(package_of_pytorchs)
        except AssertionError as theirs:
            pytest.skip(f"nor does that of PyTorch's own layer: {theirs}; ours: {ours}")
        raise
    assert said.splitlines()[-1] == "right", said
