"""ModelNew under the tools that people train with. Each failed once, but those at the end."""

import copy
import functools
import sys

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
import torch.utils.checkpoint
import torch.utils.cpp_extension
from torch import nn

NUMBERS = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(2, 3),
    "permuted": lambda t: t.permute(0, 2, 1, 3),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channels-last, some columns": lambda t: t.contiguous(memory_format=torch.channels_last)[
        ..., 1:
    ],
    "one channel, channels-last": lambda t: t[:, :1].contiguous(memory_format=torch.channels_last),
    "every other row": lambda t: t[:, :, ::2],
    "expanded": lambda t: t[:, :1].expand(-1, 4, -1, -1),
    "unaligned": lambda t: t[1:],
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture
def backend(device):
    """Of torch.compile. On a CPU its default would compile C++, for code that is not ours."""
    torch._dynamo.reset()
    yield "inductor" if device == "cuda" else "aot_eager"
    torch._dynamo.reset()


def make(target, C=4, training=True, **settings):
    """A ModelNew and an nn.BatchNorm2d of the same random state."""
    ours = target.model(C, **settings).train(training)
    with torch.no_grad():
        for t in (*ours.parameters(), *ours.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand(C, device=t.device) + 0.5)
    theirs = nn.BatchNorm2d(C, **settings).to(target.device).train(training)
    state = ours.state_dict()
    for name in ("gamma", "beta"):
        if name in state:
            state[{"gamma": "weight", "beta": "bias"}[name]] = state.pop(name)
    theirs.load_state_dict(state)
    return ours, theirs


def rand(target, *shape, **options):
    return torch.rand(*shape, device=target.device, **options)


def laid_out(target, layout, **options):
    return LAYOUTS[layout](rand(target, 3, 4, 5, 7, **options))


def step(module, x, forward=None):
    """One forward and backward: y and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    y = (module if forward is None else forward)(x)
    parameters = list(module.parameters())
    grads = torch.autograd.grad(
        (y.double() * torch.linspace(0, 1, y.numel(), device=y.device).view(y.shape)).sum(),
        [x, *parameters],
    )
    return y.detach(), *grads


def same_state(ours, theirs):
    for name, buffer in theirs.named_buffers():
        NUMBERS(getattr(ours, name), buffer)
        assert not getattr(ours, name).requires_grad


# ---- torch.compile


@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"affine": False}], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_compiled_training(target, backend, dynamic, settings):
    ours, theirs = make(target, **settings)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for batch in (2, 3, 5) if dynamic else (2, 2, 2):
        x = rand(target, batch, 4, 5, 7)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        NUMBERS(step(ours, x, compiled), step(theirs, x))
        same_state(ours, theirs)


@layouts
@modes
def test_compiled_layouts(target, layout, training):
    """Inductor compares the strides that the fake tensor promised with the real ones."""
    torch._dynamo.reset()
    ours, theirs = make(target, C=laid_out(target, layout).shape[1], training=training)
    x = laid_out(target, layout)
    with torch.no_grad():
        y = torch.compile(ours, fullgraph=True)(x)
    NUMBERS(y, theirs(x))
    same_state(ours, theirs)
    torch._dynamo.reset()


def test_compiled_eval_leaves_buffers_alone(target):
    """Inductor reuses memory that it believes to be its own: of buffers said to change, say."""
    torch._dynamo.reset()
    ours, theirs = make(target, training=False)
    x = rand(target, 2, 4, 5, 7)
    NUMBERS(step(ours, x, torch.compile(ours, fullgraph=True)), step(theirs, x))
    same_state(ours, theirs)


@pytest.mark.cuda
def test_compiled_step_launches(target):
    """Forward is the kernel and nothing else: no buffer is cloned or copied."""
    torch._dynamo.reset()
    ours, _ = make(target, 64)
    compiled = torch.compile(ours, fullgraph=True)
    x = rand(target, 8, 64, 56, 56, requires_grad=True)
    compiled(x).sum().backward()
    compiled(x).sum().backward()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        compiled(x)
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1 and "fused_batch_norm_forward_kernel" in launched[0], launched


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "channels-last", "unaligned"])
@modes
@pytest.mark.parametrize("operator", ["fused_batch_norm_forward", "train", "eval"])
def test_opcheck(target, operator, layout, training):
    ours, _ = make(target, training=training)
    x = LAYOUTS[layout](rand(target, 4, 4, 4, 7)).detach().requires_grad_()
    if (operator, training) in (("train", False), ("eval", True)):
        pytest.skip("not what this operator is for")
    arguments = (x, ours.gamma, ours.beta, 1e-5, ours.running_mean, ours.running_var)
    if operator != "eval":
        arguments += (ours.num_batches_tracked, training, 0.1)
    operators = target.names["_fused_batch_norm"]
    torch.library.opcheck(getattr(operators, operator).default, arguments)


# ---- Tensors without memory


@layouts
@modes
@pytest.mark.parametrize("fake_module", [True, False], ids=["fake module", "real module"])
def test_fake(target, fake_module, training, layout):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = laid_out(target, layout)
    ours, _ = make(target, C=x.shape[1], training=training)
    expected = copy.deepcopy(ours)(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        if fake_module:
            for name, t in (*ours.named_parameters(), *ours.named_buffers()):
                (ours._parameters if name in ours._parameters else ours._buffers)[name] = (
                    mode.from_tensor(t)
                )
        y = ours(mode.from_tensor(x))
    assert (y.shape, y.dtype, y.device, y.stride()) == (
        expected.shape,
        expected.dtype,
        expected.device,
        expected.stride(),
    )
    assert y.storage_offset() == expected.storage_offset()  # Inductor asks how y is aligned


@layouts
@modes
@pytest.mark.parametrize("meta_module", [True, False], ids=["meta module", "real module"])
def test_meta(target, meta_module, training, layout):
    x = laid_out(target, layout)
    ours, _ = make(target, C=x.shape[1], training=training)
    expected = copy.deepcopy(ours)(x)
    if meta_module:
        ours.to("meta")
    buffers = copy.deepcopy(dict(ours.named_buffers()))
    on_meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    y = ours(on_meta)
    assert y.is_meta and (y.shape, y.dtype, y.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )
    if not meta_module:
        NUMBERS(dict(ours.named_buffers()), buffers)


@pytest.mark.parametrize(
    "argument", ["gamma and beta", "running_mean and running_var", "num_batches_tracked"]
)
def test_without_memory_refused(target, argument):
    """The bound function reads and writes no tensor that has no memory."""
    ours, _ = make(target)
    for name in argument.split(" and "):
        t = getattr(ours, name)
        (ours._parameters if name in ours._parameters else ours._buffers)[name] = (
            nn.Parameter(t.to("meta")) if isinstance(t, nn.Parameter) else t.to("meta")
        )
    with pytest.raises(RuntimeError, match="must .*device.*got .*meta"):
        ours(rand(target, 2, 4, 5, 7))


# ---- Gradients


def test_pruned_and_parametrised(target):
    """gamma is then computed from other parameters."""
    x = rand(target, 2, 4, 5, 7)
    for change in (
        lambda module, name: torch.nn.utils.prune.random_unstructured(module, name, 0.5),
        lambda module, name: torch.nn.utils.parametrize.register_parametrization(
            module, name, nn.Softplus()
        ),
    ):
        ours, theirs = make(target)
        for module, name in ((ours, "gamma"), (theirs, "weight")):
            torch.manual_seed(0)
            change(module, name)
        NUMBERS(step(ours, x)[:2], step(theirs, x)[:2])


@modes
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 3, 0), (2, 0, 3, 3)], ids=str)
def test_empty_backward(target, shape, training):
    ours, _ = make(target, shape[1], training=training)
    x = rand(target, *shape, requires_grad=True)
    ours(x).sum().backward()
    for t in (x, ours.gamma, ours.beta):
        torch.testing.assert_close(t.grad, torch.zeros_like(t))


@modes
def test_unaligned_y_changes_in_place(target, training):
    ours, theirs = make(target, 3, training=training)
    t = rand(target, 3, 3, 5, 7)
    x = t[1:].requires_grad_()
    assert x.data_ptr() % 16
    y = torch.relu_(ours(x))
    y.sum().backward()
    expected = t[1:].clone().requires_grad_()
    torch.relu_(theirs(expected)).sum().backward()
    NUMBERS(x.grad, expected.grad)
    assert y.data_ptr() % 16 == x.data_ptr() % 16 and not y._is_view()


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MIXES = [
    (x, p, b)
    for x in (F16, BF16, F32, F64)
    for p in dict.fromkeys((x, F32, None))
    for b in dict.fromkeys((x, F32))
]


@modes
@pytest.mark.parametrize(
    "mix", MIXES, ids=lambda mix: ", ".join(str(t).removeprefix("torch.") for t in mix)
)
def test_backward_of_every_mix(target, mix, training):
    dtype, of_parameters, of_buffers = mix
    ours, theirs = make(target, training=training, affine=of_parameters is not None)
    for name in ("running_mean", "running_var"):
        setattr(ours, name, getattr(ours, name).to(of_buffers))
    for name in ("gamma", "beta") if of_parameters else ():
        setattr(ours, name, nn.Parameter(getattr(ours, name).to(of_parameters)))
    with torch.no_grad():
        for mine, its in (
            ("gamma", "weight"),
            ("beta", "bias"),
            ("running_mean",) * 2,
            ("running_var",) * 2,
        ):
            if getattr(ours, mine) is not None:
                setattr(
                    theirs.double(), its, type(getattr(theirs, its))(getattr(ours, mine).double())
                )
    x = rand(target, 3, 4, 5, 7).to(dtype)
    found, expected = step(ours, x), step(theirs, x.double())
    assert [t.dtype for t in found] == [dtype, dtype, *(p.dtype for p in ours.parameters())]
    for t, true in zip(found, expected):
        rounding = {F16: 2e-3, BF16: 2e-2, F32: 1e-5, F64: 1e-12}[
            t.dtype if t.dtype.itemsize < dtype.itemsize else dtype
        ]
        torch.testing.assert_close(
            t.double(), true, rtol=rounding, atol=rounding * true.abs().max().item()
        )


def test_backward_of_changed_buffers_refused(target):
    """As of any other tensor that backward needs and somebody has written to."""
    ours, _ = make(target, training=False)
    x = rand(target, 2, 4, 5, 7, requires_grad=True)
    y = ours(x)
    ours.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@modes
@pytest.mark.parametrize("grad", ["no_grad", "frozen", "all"])
def test_forward_mode(target, training, grad):
    """Refused: a y without tangent would be silently wrong."""
    import torch.autograd.forward_ad as forward_ad

    ours, _ = make(target, training=training)
    ours.requires_grad_(grad == "all")
    x = rand(target, 2, 4, 5, 7)
    refused = pytest.raises(NotImplementedError, match="must .*got.*forward-mode")
    with torch.set_grad_enabled(grad != "no_grad"), forward_ad.dual_level(), refused:
        ours(forward_ad.make_dual(x, torch.ones_like(x)))


@modes
@pytest.mark.parametrize(
    "with_buffers", [True, False], ids=["buffers given", "buffers of the module"]
)
def test_func_grad(target, training, with_buffers):
    ours, theirs = make(target, training=training)
    x = rand(target, 2, 4, 5, 7)
    weights = torch.linspace(0, 1, x.numel(), device=x.device).view(x.shape)
    buffers = dict(ours.named_buffers()) if with_buffers else {}

    def loss(parameters, x):
        return (torch.func.functional_call(ours, {**parameters, **buffers}, (x,)) * weights).sum()

    of_parameters, of_x = torch.func.grad(loss, argnums=(0, 1))(dict(ours.named_parameters()), x)
    NUMBERS((of_x, of_parameters["gamma"], of_parameters["beta"]), step(theirs, x)[1:])
    same_state(ours, theirs)


# ---- Graphs of other tools


@modes
def test_jit_trace(target, training):
    ours, theirs = make(target, training=training)
    traced = torch.jit.trace(ours, rand(target, 2, 4, 5, 7), check_trace=False)
    x = rand(target, 3, 4, 6, 6)
    NUMBERS(traced(x), theirs(x))


@modes
def test_fx_symbolic_trace(target, training):
    ours, theirs = make(target, training=training)
    convolution = nn.Conv2d(3, 4, 3).to(target.device)
    graph = torch.fx.symbolic_trace(nn.Sequential(convolution, ours))
    assert [node.op for node in graph.graph.nodes].count("call_function") == 1
    x = rand(target, 2, 3, 6, 6)
    NUMBERS(graph(x), theirs(convolution(x)))
    same_state(ours, theirs)


# ---- The module's state


@pytest.mark.parametrize("names", ["{}", "bn.{}"], ids=["nn.BatchNorm2d's", "Model's"])
def test_checkpoint_without_counter(target, names):
    """Of before the counter was: nn.BatchNorm2d takes it, and keeps its own counter."""
    ours, theirs = make(target)
    ours(rand(target, 2, 4, 5, 7))
    old = {
        names.format(name): t
        for name, t in theirs.state_dict().items()
        if name != "num_batches_tracked"
    }
    ours.load_state_dict(old)
    assert ours.num_batches_tracked.item() == 1
    NUMBERS(ours.gamma, theirs.weight)
    NUMBERS(ours.running_var, theirs.running_var)
    with torch.device("meta"):
        empty = target.names["ModelNew"](4)
    empty.load_state_dict(old, assign=True)
    assert empty.num_batches_tracked.item() == 0
    new = copy.deepcopy(ours.state_dict())
    del new["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="Missing key.*num_batches_tracked"):
        ours.load_state_dict(new)


@pytest.mark.parametrize(
    "settings", [{}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_reset(target, settings):
    fresh = target.model(4, **settings).state_dict()
    with torch.device("meta"):
        ours = target.names["ModelNew"](4, **settings)
    ours.to_empty(device=target.device)
    ours.reset_parameters()
    NUMBERS(ours.state_dict(), fresh)
    ours(rand(target, 2, 4, 5, 7))
    ours.reset_running_stats()
    NUMBERS(ours.state_dict(), fresh)


@pytest.mark.parametrize("eps", [0.0, -1e-5])
@modes
def test_eps(target, eps, training):
    """As PyTorch from 2.13 on: refused when used; 0 passes in eval."""
    ours, _ = make(target, training=training, eps=eps)
    x = rand(target, 2, 4, 5, 7)
    if training or eps < 0:
        with pytest.raises(ValueError, match="eps must .*got"):
            ours(x)
    else:
        assert ours(x).isfinite().all()


# ---- The build


def test_loaded_again(target, text):
    """The same text again, and its operators with it."""
    if target.cuda:
        again = {}
        exec(text, again)
    else:
        again = target.emulator.load(text)
    x = rand(target, 2, 4, 5, 7)
    torch.testing.assert_close(
        again["ModelNew"](4, device=target.device)(x), target.model(4)(x), rtol=0, atol=0
    )


@pytest.mark.cuda
def test_loaded_from_another_directory(target, text, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    test_loaded_again(target, text)


# ---- The bound function


def test_bound_function(target):
    """The spec's call: x, gamma, beta, eps → y."""
    forward = target.names["_fused_batch_norm"].fused_batch_norm_forward
    x, gamma, beta = rand(target, 2, 4, 5, 7), rand(target, 4), rand(target, 4)
    expected = torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-3)
    NUMBERS(forward(x, gamma, beta, 1e-3), expected)
    NUMBERS(
        forward(x, gamma, beta),
        torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True),
    )
    mean, var, count = (
        torch.zeros_like(gamma),
        torch.ones_like(gamma),
        torch.tensor(0, device=x.device),
    )
    forward(
        x, gamma, beta, running_mean=mean, running_var=var, num_batches_tracked=count, momentum=None
    )
    NUMBERS((mean, var), (x.mean((0, 2, 3)), x.var((0, 2, 3))))
    assert count.item() == 1
    y = forward(x, gamma, beta, running_mean=mean, running_var=var, training=False)
    NUMBERS(y, torch.nn.functional.batch_norm(x, mean, var, gamma, beta))


@modes
def test_parameters_in_columns_of_a_table(target, training):
    ours, theirs = make(target, training=training)
    table = rand(target, 4, 2)
    x = rand(target, 2, 4, 5, 7)
    y = torch.func.functional_call(ours, {"gamma": table[:, 0], "beta": table[:, 1]}, (x,))
    NUMBERS(
        y, torch.func.functional_call(theirs, {"weight": table[:, 0], "bias": table[:, 1]}, (x,))
    )
    for wrong in (rand(target, 5, 2)[:, 0], rand(target, 4, 1)):
        with pytest.raises(RuntimeError, match="gamma must .*got"):
            torch.func.functional_call(ours, {"gamma": wrong, "beta": table[:, 1]}, (x,))


def test_buffers_in_columns_refused(target):
    ours, _ = make(target)
    ours.running_var = rand(target, 4, 2)[:, 0]
    with pytest.raises(RuntimeError, match="running_var must .*contiguous"):
        ours(rand(target, 2, 4, 5, 7))


# ---- What always worked


@modes
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradcheck(target, training, check):
    ours, _ = make(target, 2, training=training, dtype=F64, momentum=0.0)
    x = rand(target, 3, 2, 2, 3, dtype=F64, requires_grad=True)

    def call(x, gamma, beta):
        return torch.func.functional_call(ours, {"gamma": gamma, "beta": beta}, (x,))

    assert check(call, (x, ours.gamma, ours.beta))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(target, use_reentrant):
    ours, theirs = make(target)
    x = rand(target, 2, 4, 5, 7)
    checkpointed = lambda module: functools.partial(
        torch.utils.checkpoint.checkpoint, module, use_reentrant=use_reentrant
    )
    found = step_backward(ours, x, checkpointed(ours))
    NUMBERS(found, step_backward(theirs, x, checkpointed(theirs)))
    same_state(ours, theirs)


def step_backward(module, x, forward):
    """As step(), by backward(), which the older kind of checkpointing wants."""
    x = x.detach().requires_grad_()
    y = forward(x)
    (y * torch.linspace(0, 1, y.numel(), device=y.device).view(y.shape)).sum().backward()
    return y.detach(), x.grad, *(p.grad for p in module.parameters())


def test_export(target):
    ours, theirs = make(target)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(
        ours, (rand(target, 3, 4, 5, 7),), dynamic_shapes=({0: batch},)
    ).module()
    for size in (2, 5):
        x = rand(target, size, 4, 5, 7)
        NUMBERS(exported(x), theirs(x))
    NUMBERS(exported.running_var, theirs.running_var)


@pytest.mark.cuda
def test_graphed_callables(target):
    ours, theirs = make(target)
    x = rand(target, 2, 4, 5, 7, requires_grad=True)
    before = copy.deepcopy(ours.state_dict())
    graphed = torch.cuda.make_graphed_callables(ours, (x,))
    ours.load_state_dict(before)  # the warm-up trains
    for _ in range(3):
        x = rand(target, 2, 4, 5, 7)
        NUMBERS(step(ours, x, graphed), step(theirs, x))
        same_state(ours, theirs)


@pytest.mark.cuda
def test_reduce_overhead(target):
    torch._dynamo.reset()
    ours, theirs = make(target)
    compiled = torch.compile(ours, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = rand(target, 2, 4, 5, 7)
        torch.compiler.cudagraph_mark_step_begin()
        NUMBERS(step(ours, x, compiled), step(theirs, x))
        same_state(ours, theirs)


COLD_CAPTURE = """
import sys, torch
names = {}
exec(open(sys.argv[1]).read(), names)
ours = names["ModelNew"](4, device="cuda")
x = torch.rand(2, 4, 5, 7, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.no_grad(), torch.cuda.graph(graph):
    y = ours(x)
graph.replay()
expected = torch.nn.BatchNorm2d(4, device="cuda")
torch.testing.assert_close(y, expected(x))
torch.testing.assert_close(ours.running_var, expected.running_var)
"""


@pytest.mark.cuda
def test_first_call_in_a_capture(text, tmp_path):
    import subprocess

    path = tmp_path / "model_new.py"
    path.write_text(text)
    subprocess.run([sys.executable, "-c", COLD_CAPTURE, str(path)], check=True)
