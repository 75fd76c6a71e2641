"""What ModelNew promises beyond the numbers of one forward."""

import copy
import itertools

import pytest
import torch
import torch.nn as nn
from cases import BF16, F16, F32, F64

import check
import reference_model
from check import Case


def random_x(target, *shape, dtype=F32, seed=0):
    return check.make_x(Case("", shape, dtype), target.device, seed)


def assert_same(name, got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda text: f"{name}: {text}")


def size_for(target, large, small):
    return large if target.cuda else small


def test_made_as_harnesses_make_it(target):
    """Seed, get_init_inputs, strict load, .to(dtype)."""
    torch.manual_seed(42)
    model = target.names["ModelNew"](*reference_model.get_init_inputs()).to(target.device)
    assert torch.equal(model.gamma, torch.ones_like(model.gamma)) and not model.beta.any()
    reference = reference_model.Model(*reference_model.get_init_inputs())
    model.load_state_dict(reference.state_dict(), strict=True)
    for dtype in (F16, BF16, F32):
        half = copy.deepcopy(model).to(device=target.device, dtype=dtype)
        assert {t.dtype for t in half.state_dict().values()} == {dtype, torch.int64}
        x = random_x(target, 2, 64, 4, 4, dtype=dtype)
        for training in (True, False):
            check.check_form(x, half.train(training)(x).detach())


OWN_NAMES = {"weight": "gamma", "bias": "beta"}


@pytest.mark.parametrize(
    "spelled",
    [lambda key: key, lambda key: f"bn.{key}", lambda key: OWN_NAMES.get(key, key)],
    ids=["weight", "bn.weight", "gamma"],
)
def test_state_dict(target, spelled):
    theirs = check.make_pair(target, 3, F32)[1].state_dict()
    state = {spelled(key): value for key, value in theirs.items()}
    model = target.model(3)
    model.load_state_dict(state, strict=True)
    for key, value in theirs.items():
        assert_same(key, model.state_dict()[OWN_NAMES.get(key, key)], value)
    without = {key: value for key, value in state.items() if key != spelled("weight")}
    with pytest.raises(RuntimeError, match="gamma"):
        model.load_state_dict(without, strict=True)
    with pytest.raises(RuntimeError, match="stranger"):
        model.load_state_dict({**state, "stranger": theirs["bias"]}, strict=True)


def test_state_dict_saved_and_loaded(target):
    model, again = check.make_pair(target, 3, F32)[0], target.model(3)
    again.load_state_dict(model.state_dict())
    for key, value in model.state_dict().items():
        assert_same(key, again.state_dict()[key], value)


def test_forward_calls_nothing_of_torch_nn_functional(target, monkeypatch):
    model, x = target.model(4), random_x(target, 2, 4, 6, 6)

    def forbidden(*args, **kwargs):
        raise AssertionError("torch.nn.functional was called in forward")

    for name, function in vars(torch.nn.functional).items():
        if callable(function) and name[0].islower():
            monkeypatch.setattr(torch.nn.functional, name, forbidden)
    model(x)
    model.eval()(x)


@pytest.mark.parametrize(
    "large, small",
    [
        ((16, 64, 256, 256), (3, 2, 24, 24)),
        ((32, 64, 56, 56), (3, 4, 8, 8)),
        ((9, 5, 31, 33), (3, 2, 7, 9)),
        ((32, 256, 40, 40), (4, 8, 24, 24)),
        ((256, 2048, 7, 7), (12, 16, 7, 7)),
    ],
    ids=str,
)
def test_bitwise_the_same_over_three_runs(target, large, small):
    """The last with gradients."""
    x = random_x(target, *size_for(target, large, small))
    results = []
    for run in range(3):
        model = check.make_pair(target, x.shape[1], F32)[0]
        with torch.set_grad_enabled(run == 2):
            y = model(x).detach()
        results.append({"y": y, **model.state_dict()})
    for other, (name, want) in itertools.product(results[1:], results[0].items()):
        assert_same(name, other[name], want)


MIXES = [(F32, F32), (F16, F32), (BF16, F32), (F16, F16), (BF16, BF16)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype, params", MIXES, ids=str)
def test_backward(target, dtype, params, training):
    if not target.cuda and params in (F16, BF16):
        pytest.skip("PyTorch's CPU backward, which stands in here, wants float32 statistics")
    x = random_x(target, *size_for(target, (16, 24, 28, 28), (3, 4, 6, 6)), dtype=dtype)
    check.check_backward(*check.make_pair(target, x.shape[1], params, training), x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_without_graph_breaks(target, training):
    """Forward, running buffers and backward. Pretended devices have no code generator to try."""
    torch._dynamo.reset()
    x = random_x(target, *size_for(target, (8, 16, 28, 28), (2, 3, 6, 6)))
    direct = check.make_pair(target, x.shape[1], F32, training)[0]
    graph = copy.deepcopy(direct)
    leaf, compiled_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = direct(leaf)
    backend = "inductor" if target.cuda else "aot_eager"
    y_compiled = torch.compile(graph, fullgraph=True, backend=backend)(compiled_leaf)
    assert_same("y", y_compiled.detach(), y.detach())
    for name, want in direct.state_dict().items():
        assert_same(name, graph.state_dict()[name], want)
    y.square().sum().backward()
    y_compiled.square().sum().backward()
    torch.testing.assert_close(compiled_leaf.grad, leaf.grad, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- on a GPU


def kernels_of(model, x) -> list[str]:
    """What one forward puts on the stream, after a first one."""
    model(x)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        model(x)
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_gpu]


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def deterministic(request):
    """With deterministic algorithms torch.empty would fill its memory, by a kernel."""
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((16, 64, 256, 256), F32),
        ((32, 256, 56, 56), F32),
        ((32, 2048, 7, 7), F32),
        ((7, 33, 101, 99), BF16),
        ((128, 10, 1, 1), F32),
        ((2, 3, 512, 512), F16),
        ((8, 64, 512, 512), F32),
        ((2, 4, 8, 8), F64),
    ],
    ids=str,
)
def test_one_launch_and_nothing_else_on_the_stream(target, shape, dtype):
    eager = nn.BatchNorm2d(8, device="cuda")
    if len(kernels_of(eager, random_x(target, 4, 8, 16, 16))) < 2:
        pytest.skip("the profiler sees no kernels on this machine")
    x = random_x(target, *shape, dtype=dtype)
    for settings in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        with torch.no_grad():
            (kernel,) = kernels_of(target.model(shape[1], **settings), x)
        assert "fused_batch_norm_forward_kernel" in kernel


@pytest.mark.cuda
def test_memory_is_allocated_for_y_and_little_else(target):
    model, x = target.model(64), random_x(target, 16, 64, 256, 256)
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = model(x)
    assert torch.cuda.max_memory_allocated() - before - y.nbytes <= 4 << 20


@pytest.mark.cuda
@pytest.mark.parametrize(
    "shape",
    [
        (16, 64, 256, 256),
        (32, 256, 28, 28),
        (7, 33, 101, 99),
        (2, 3, 512, 512),
        (4, 5000, 6, 6),
        (8, 64, 512, 512),
        (256, 2048, 7, 7),
    ],
    ids=str,
)
def test_output_and_scratch_memory_poisoned_before_the_launch(target, shape):
    x = random_x(target, *shape)
    results = []
    # NaN, flags that look set, counters that look full; None: what the last run left
    for byte in (0x00, 0xFF, 0x01, 0x7F, None):
        model = check.make_pair(target, shape[1], F32)[0]
        if byte is not None:
            torch.cuda.empty_cache()
            sizes = [x.nbytes] + [1 << k for k in range(9, 25)] * 2
            blocks = [torch.full((size,), byte, dtype=torch.uint8, device="cuda") for size in sizes]
            del blocks  # back to the allocator's cache, from where the forward takes its memory
        with torch.no_grad():
            results.append({"y": model(x), **model.state_dict()})
        for name, want in results[0].items():
            assert_same(f"byte {byte}: {name}", results[-1][name], want)


@pytest.mark.cuda
def test_graph_of_three_forwards_replayed_with_changed_input(target):
    shapes = ((4, 64, 56, 56), (2, 8, 256, 256), (128, 10, 1, 1))
    models = [check.make_pair(target, shape[1], F32)[0] for shape in shapes]
    xs = [random_x(target, *shape) for shape in shapes]
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for model, x in zip(models, xs, strict=True):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = [model(x) for model, x in zip(models, xs, strict=True)]
        for turn in range(3):
            for x, shape in zip(xs, shapes, strict=True):
                x.copy_(random_x(target, *shape, seed=100 + turn))
            direct = copy.deepcopy(models)
            graph.replay()
            for y, x, model, replayed in zip(ys, xs, direct, models, strict=True):
                assert_same("y", y, model(x))
                for name, buffer in model.named_buffers():
                    assert_same(name, getattr(replayed, name), buffer)
        first = [y.clone() for y in ys]
        for _ in range(1000):
            graph.replay()
        for y, want, model in zip(ys, first, models, strict=True):
            assert_same("y after 1,000 replays", y, want)
            assert model.num_batches_tracked.item() == 1 + 3 + 1000


@pytest.mark.cuda
def test_on_a_side_stream_the_launch_waits_for_what_is_in_front_of_it(target):
    model = check.make_pair(target, 16, F32)[0]
    late = random_x(target, 8, 16, 64, 64)
    x = torch.zeros_like(late)
    with torch.no_grad():
        want = copy.deepcopy(model)(late)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # ~10 ms: a launch elsewhere would read the zeros
            x.copy_(late)
            y = model(x)
        stream.synchronize()
    assert_same("y", y, want)


@pytest.mark.cuda
def test_a_thousand_forwards_on_two_streams_at_once(target):
    shapes = ((16, 64, 64, 64), (2, 3, 512, 512))
    xs = [random_x(target, *shape) for shape in shapes]
    models = [check.make_pair(target, shape[1], F32)[0] for shape in shapes]
    streams = [torch.cuda.Stream() for _ in shapes]
    with torch.no_grad():
        wants = [copy.deepcopy(model)(x) for model, x in zip(models, xs, strict=True)]
        wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        for _ in range(500):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    wrong[i] += (models[i](xs[i]) != wants[i]).sum()
        torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]


@pytest.mark.cuda
def test_a_second_device_while_the_first_is_the_current_one(target):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    x = random_x(target, 8, 16, 64, 64)
    model = check.make_pair(target, 16, F32)[0]
    want = copy.deepcopy(model)(x).detach()
    got = model.to("cuda:1")(x.to("cuda:1")).detach()
    assert got.device == torch.device("cuda:1")
    assert_same("y", got.to(x.device), want)
