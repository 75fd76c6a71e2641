"""How x lies in memory: random strides, with sizes of 1 whose strides say nothing, and gradients.

Forward against float64, by the rule of check.py; y's strides, also those that meta tensors promise;
backward where the gradient lies in another order than x.
"""

import itertools
import math
import random

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64
from test_behaviour import kernels_of, random_x

import check
from check import Case

GPU = cases.present()
BATCH = 25  # patterns of a test
PATTERNS = 2000 if GPU else 200
ORDERS = ((0, 1, 2, 3), (0, 2, 3, 1))  # NCHW and channels-last, from the outermost in memory


def random_strides(seed: int):
    """A layout: x in a random order, cut out, repeated, unaligned; with strides for sizes of 1."""

    def layout(x: torch.Tensor) -> torch.Tensor:
        r = random.Random(seed)
        order = r.choice((*ORDERS * 3, tuple(r.sample(range(4), 4))))
        if r.random() < 0.1:
            repeated = r.randrange(4)
            x = x.narrow(repeated, 0, min(1, x.shape[repeated])).expand(x.shape)
        cut = [r.choice((0, 1, 4)) if r.random() < 0.15 else 0 for _ in range(4)]
        start = [r.randint(0, extra) for extra in cut]
        memory_shape = [x.shape[dim] + cut[dim] for dim in order]
        behind_boundary = r.choice((0, 0, 1, 2, 3, 4, 8))
        memory = x.new_full((behind_boundary + math.prod(memory_shape),), math.nan)
        whole = memory[behind_boundary:].view(memory_shape).permute(*map(order.index, range(4)))
        for dim in range(4):
            whole = whole.narrow(dim, start[dim], x.shape[dim])
        whole.copy_(x)
        any_stride = lambda: r.choice((0, 1, 2, 7, 64, 1000))
        strides = [
            any_stride() if size == 1 and r.random() < 0.5 else stride
            for size, stride in zip(x.shape, whole.stride())
        ]
        return whole.as_strided(x.shape, strides)

    return layout


def random_pattern(seed: int) -> Case:
    r = random.Random(seed)
    shape = [r.choice(s) for s in ((1, 1, 1, 2, 3), (1, 1, 3, 4, 8, 9), (1, 1, 2, 4, 7))]
    shape.append(r.choice((1, 1, 2, 3, 8)))
    if r.random() < 0.05:
        shape[r.choice((0, 2, 3))] = 0
    if shape[0] * shape[2] * shape[3] == 1:
        shape[r.choice((0, 2, 3))] = 5
    dtype = r.choice((F32, F32, F16, BF16, F64))
    layout = f"random strides {seed}"
    check.LAYOUTS[layout] = random_strides(seed)
    params = dtype if dtype == F64 else F32
    training = r.random() < 0.6
    return Case(f"pattern {seed}", tuple(shape), dtype, params, layout=layout, training=training)


def on_meta(t: torch.Tensor) -> torch.Tensor:
    meta = torch.empty(t.untyped_storage().nbytes(), dtype=torch.uint8, device="meta")
    return meta.view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())


def check_strides(target, case: Case, x: torch.Tensor) -> None:
    """y is dense, and what meta tensors say of it is so."""
    model = check.make_pair(target, x.shape[1], case.params, case.training)[0]
    with torch.no_grad():
        y, y_meta = model(x), model.to("meta")(on_meta(x))
    check.check_form(x, y)
    dense = (torch.contiguous_format, torch.channels_last)
    assert any(y.is_contiguous(memory_format=form) for form in dense), y.stride()
    assert (y.stride(), y.storage_offset()) == (y_meta.stride(), y_meta.storage_offset())


TOLERANCE = {F32: 1e-5, F64: 1e-12, F16: 5e-3, BF16: 4e-2}  # of the largest; wrong order: about 1


def check_gradients(target, case: Case, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Those of x, gamma and beta, against PyTorch's in float64, all of it contiguous."""
    # With a large eps, or gradients of few elements would cancel.
    ours, theirs = check.make_pair(target, x.shape[1], case.params, case.training, eps=0.5)
    x = x.detach().requires_grad_()
    got = torch.autograd.grad(ours(x), [x, *ours.parameters()], dy)
    assert got[0].shape == x.shape
    wide = x.detach().double().contiguous().clone().requires_grad_()
    if x.numel() == 0:
        assert not any(grad.any() for grad in got)
        return
    y = theirs.double()(wide)
    wants = torch.autograd.grad(y, [wide, *theirs.parameters()], dy.double().contiguous())
    for name, grad, want in zip(("dx", "dgamma", "dbeta"), got, wants):
        slack = TOLERANCE[x.dtype] * (want.abs().max() + dy.abs().max()).item()
        torch.testing.assert_close(
            grad.double(), want, rtol=0, atol=slack, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_pattern(target, seed: int) -> None:
    case = random_pattern(seed)
    x = check.make_x(case, target.device, seed)
    told = f"{case}, strides {x.stride()}, from {x.storage_offset()}, training {case.training}"
    try:
        if target.cuda:
            check.check_case(target, case)
        else:
            cases.check_alone(target, case, seed)
        check_strides(target, case, x)
        dy = random_strides(seed + 1)(torch.randn(x.shape, device=x.device).to(x.dtype))
        check_gradients(target, case, x, dy)
    except Exception as error:
        raise AssertionError(f"{told}: {error}") from error


@pytest.mark.parametrize("first", range(0, PATTERNS, BATCH))
def test_random_strides(target, first):
    failed = []
    for seed in range(first, first + BATCH):
        try:
            check_pattern(target, seed)
        except AssertionError as error:
            failed.append(str(error))
    assert not failed, f"{len(failed)} of {BATCH} patterns: " + "\n".join(failed)


# Dense, as people come by them: strides of sizes of 1 are those of something larger.
DENSE = {
    "a picture read as H×W×C": lambda new: new(48, 56, 4).permute(2, 0, 1)[None],
    "tokens": lambda new: new(3, 50, 16).transpose(1, 2)[..., None],
    "channels of one image": lambda new: new(1, 12, 8, 8)[:, 3:7],
    "half of the channels": lambda new: new(1, 8, 6, 5).chunk(2, 1)[1],
    "one row": lambda new: new(1, 4, 9, 8)[:, :, 2:3].transpose(1, 2).contiguous().transpose(1, 2),
    "an image, channels-last": lambda new: new(3, 7, 6, 9).permute(0, 3, 1, 2)[1:2],
    "one channel, channels-last": lambda new: new(3, 7, 6, 1).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense_but_for_strides_of_sizes_of_1(target, name, dtype, training):
    new = lambda *shape: torch.randn(shape, device=target.device).to(dtype)
    x = DENSE[name](new)
    check.LAYOUTS[name] = lambda _: x
    params = F64 if dtype == F64 else F32
    case = Case(name, tuple(x.shape), dtype, params, layout=name, training=training)
    if target.cuda:
        check.check_case(target, case)
    else:
        cases.check_alone(target, case, seed=0)
    check_strides(target, case, x)
    for order in ORDERS:
        dy = new(*(x.shape[dim] for dim in order)).permute(*map(order.index, range(4)))
        check_gradients(target, case, x, dy)


@pytest.mark.cuda
@pytest.mark.parametrize("made", DENSE.values(), ids=DENSE)
def test_dense_x_takes_one_launch(target, made):
    if len(kernels_of(torch.nn.BatchNorm2d(8).cuda(), random_x(target, 4, 8, 16, 16))) < 2:
        pytest.skip("the profiler sees no kernels on this machine")
    x = made(lambda *shape: torch.randn(shape, device=target.device))
    for training in (True, False):
        model = target.model(x.shape[1]).train(training)
        with torch.no_grad():
            (kernel,) = kernels_of(model, x)
        assert "fused_batch_norm_forward_kernel" in kernel


@pytest.mark.cuda
def test_other_strides_cost_one_copy(target):
    """Channels-last, cut: y is channels-last, so that neither y nor x is copied a second time."""
    if len(kernels_of(torch.nn.BatchNorm2d(8).cuda(), random_x(target, 4, 8, 16, 16))) < 2:
        pytest.skip("the profiler sees no kernels on this machine")
    x = random_x(target, 4, 8, 16, 16).contiguous(memory_format=torch.channels_last)[..., 3:]
    with torch.no_grad():
        kernels = kernels_of(target.model(8), x)
    assert len(kernels) == 2 and "fused_batch_norm_forward_kernel" in kernels[1]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("x_order, dy_order", list(itertools.product(ORDERS, ORDERS)))
def test_gradient_in_another_order(target, x_order, dy_order, training):
    """Each with itself and with the other; a second derivative goes the same way."""
    shape = (3, 5, 4, 6)

    def ordered(order):
        memory = torch.randn([shape[dim] for dim in order], device=target.device, dtype=F64)
        return memory.permute(*map(order.index, range(4)))

    case = Case("", shape, F64, F64, training=training)
    x, dy = ordered(x_order), ordered(dy_order)
    check_gradients(target, case, x, dy)
    if not training:
        return
    ours, theirs = check.make_pair(target, shape[1], F64, training)
    seconds = []
    for model in (ours, theirs):
        leaf = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf), leaf, dy, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*seconds, rtol=1e-8, atol=1e-8)


def test_empty_x_keeps_its_layout(target):
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 3, 1, 1)):
        for form in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(shape, device=target.device).to(memory_format=form)
            y = target.model(shape[1])(x).detach()
            check.check_form(x, y)
            assert target.model(shape[1]).to("meta")(on_meta(x)).stride() == y.stride()
