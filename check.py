# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "ninja", "setuptools"]
# ///
"""Compares `ModelNew` of model_new.py with `nn.BatchNorm2d`: correctness, then speed.

The rule for every number: with the same input in float64 as the oracle, our error may be at most
twice the error of `nn.BatchNorm2d` on the same device, plus one rounding of the output's type.
Errors are in such roundings (u = half the distance from 1 to the next number), of the worst
element: |y − oracle| / (u·(|gamma|·max(1, |x̂|) + |beta|)). torch's error counts as at least one,
since that much is luck. NaN and infinity must stand exactly where the oracle has them.

Without a CUDA device the same cases run on a pretended one: the CPU executes the kernel's text.
Exit status: 0, or 1 if a case failed, 2 for wrong arguments. A speed below its bar fails nothing.
"""

import argparse
import copy
import itertools
import json
import math
import random
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # not needed here

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent
TEXT_PATH = ROOT / "model_new.py"
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = {"float32": F32, "float16": F16, "bfloat16": BF16, "float64": F64}


def show(shape, dtype: torch.dtype) -> str:
    return f"{'×'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


# -------------------------------------------------------------------------------------- the cases


def mixed(shape, normal) -> torch.Tensor:
    """Each channel has a mean and a deviation of its own, so that mixing channels up shows."""
    c = torch.arange(shape[1], device=normal(1).device, dtype=F32).view(1, -1, 1, 1) % 17
    return normal(*shape) * (0.5 + c / 4) + (c - 5)


def planted(*values: tuple[tuple, float]) -> Callable:
    """`mixed`, with other values in some places."""

    def fill(shape, normal) -> torch.Tensor:
        x = mixed(shape, normal)
        for place, value in values:
            x[place] = value
        return x

    return fill


ALL = slice(None)
# How x is made, from its shape and a source of normally distributed numbers.
DATA: dict[str, Callable] = {
    "mixed": mixed,
    "mean 1e6": lambda shape, normal: normal(*shape) + 1e6,
    "constant": planted(((ALL, 0), 12345.678), ((ALL, -1), 0.1)),
    "outlier first": planted(((0, 0, 0, 0), 1e6)),
    "not finite": planted(
        ((-1, 0, -1, -1), math.nan), ((0, 1, 0, 0), math.inf), ((0, 3, 0, 1), -math.inf)
    ),
}


def strided(x: torch.Tensor) -> torch.Tensor:
    N, C, H, W = x.shape
    large = x.new_full((N, C, 2 * H, 2 * W + 1), math.nan)
    large[:, :, ::2, 1::2] = x
    return large[:, :, ::2, 1::2]


# How x lies in memory.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "strided": strided,
}


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = F32
    params: torch.dtype | None = None  # of gamma, beta and the running buffers; None: as x
    data: str = "mixed"  # of DATA, or "uniform" in [0, 1)
    layout: str = "contiguous"  # of LAYOUTS
    small: tuple[int, int, int, int] | str | None = "same"  # shape on a pretended device
    training: bool = True
    steps: int = 1  # forwards, each of which changes the running buffers
    backward: bool = False  # checks the gradients as well
    settings: tuple[tuple[str, object], ...] = ()  # arguments of the constructor

    def __str__(self) -> str:
        return f"{self.name}, {show(self.shape, self.dtype)}"


CASES = [
    # Every kind of plan: what has to stay on the chip of a channel grows downwards.
    Case("small channels", (32, 1024, 14, 14), small=(3, 5, 8, 8)),
    Case("middle channels", (32, 256, 56, 56), small=(4, 3, 16, 16)),
    Case("large channels", (16, 64, 256, 256), small=(5, 2, 64, 64)),
    Case("very large channels", (64, 64, 512, 512), data="uniform", small=(7, 1, 96, 96)),
    Case("few channels", (8, 3, 224, 224), small=(2, 3, 64, 64)),
    # Planes that end inside a vector.
    Case("plane 7×7", (32, 2048, 7, 7), small=(16, 9, 7, 7)),
    Case("plane 1×1", (128, 10, 1, 1)),
    Case("odd plane", (7, 33, 101, 99), small=(3, 2, 51, 49)),
    Case("large odd plane", (64, 8, 511, 513), BF16, F32, small=(5, 1, 95, 97)),
    # Types of x and of the parameters.
    Case("half parameters", (16, 48, 32, 32), F16, small=(3, 4, 8, 16)),
    Case("float parameters", (16, 48, 32, 32), BF16, F32, small=(3, 4, 8, 16)),
    Case("double", (16, 48, 32, 32), F64, small=(3, 4, 8, 8)),
    # Layouts.
    Case("channels-last", (16, 64, 28, 28), layout="channels_last", small=(3, 8, 6, 6)),
    Case("unaligned by one element", (8, 16, 32, 32), layout="unaligned", small=(3, 3, 8, 8)),
    Case("every other row and column", (8, 16, 32, 32), layout="strided", small=(3, 3, 8, 8)),
    # Values on which careless sums fail.
    Case("mean/std = 1e6", (16, 64, 56, 56), data="mean 1e6", small=(4, 3, 16, 16)),
    Case("a constant channel", (16, 8, 56, 56), data="constant", small=(4, 3, 16, 16)),
    Case("an outlier of 1e6 first", (16, 8, 56, 56), data="outlier first", small=(4, 3, 16, 16)),
    Case("NaN, ±inf in a channel", (16, 8, 56, 56), data="not finite", small=(4, 5, 16, 16)),
    # The module.
    Case("momentum=None", (3, 4, 9, 9), steps=3, settings=(("momentum", None),)),
    Case("eval", (16, 64, 56, 56), training=False, small=(3, 4, 8, 8)),
    Case("backward", (16, 24, 28, 28), backward=True, small=(3, 4, 6, 6)),
    Case("N = 0", (0, 5, 4, 4)),
]


def make_x(case: Case, device: str, seed: int = 0) -> torch.Tensor:
    """x: (N, C, H, W) in the case's type and layout; the same values for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    if case.data == "uniform":  # without a float32 copy of the largest shapes
        x = torch.empty(case.shape, dtype=case.dtype, device=device).uniform_(generator=generator)
    else:
        like = {"dtype": F64 if case.dtype == F64 else F32, "device": device}
        x = DATA[case.data](case.shape, lambda *s: torch.randn(*s, generator=generator, **like))
    return LAYOUTS[case.layout](x.to(case.dtype))


# ------------------------------------------------------------------------- oracle, and pass rule

PIECE_ELEMS = 1 << 26  # the oracle works on pieces of so many elements: 512 MB in float64


def pieces(shape) -> Iterator[tuple[slice, slice, slice]]:
    """Slices (n, c, h) that cover a tensor of `shape`, each of PIECE_ELEMS or one row at most."""
    N, C, H, W = shape
    channels = max(1, min(C, PIECE_ELEMS // max(1, N * H * W)))
    images = max(1, min(N, PIECE_ELEMS // max(1, channels * H * W)))
    rows = max(1, min(H, PIECE_ELEMS // max(1, channels * images * W)))
    starts = range(0, N, images), range(0, C, channels), range(0, H, rows)
    for n, c, h in itertools.product(*starts):
        yield slice(n, n + images), slice(c, c + channels), slice(h, h + rows)


def per_channel(v: torch.Tensor) -> torch.Tensor:
    return v.view(1, -1, 1, 1)


@dataclass
class Oracle:
    """What one forward must give, in float64, straight from the formula. All (C,)."""

    mean: torch.Tensor
    mean_rest: torch.Tensor  # what rounding `mean` to one float64 lost
    var: torch.Tensor  # biased
    inv_std: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    own_error: float  # in roundings: the oracle is no wider than a float64 output

    def centred(self, x: torch.Tensor, c: slice = ALL) -> torch.Tensor:
        return (x.double() - per_channel(self.mean[c])) - per_channel(self.mean_rest[c])

    def y(self, x: torch.Tensor, c: slice = ALL) -> tuple[torch.Tensor, torch.Tensor]:
        """y of a piece of x with the channels c, and the size that an error is measured by."""
        x_hat = self.centred(x, c) * per_channel(self.inv_std[c])
        gamma, beta = per_channel(self.gamma[c]), per_channel(self.beta[c])
        return gamma * x_hat + beta, gamma.abs() * x_hat.abs().clamp(min=1) + beta.abs()


def make_oracle(x: torch.Tensor, model: nn.BatchNorm2d) -> Oracle:
    """`model`: settings, parameters and, for eval, the running buffers before the forward."""
    zeros = torch.zeros(x.shape[1], dtype=F64, device=x.device)
    gamma, beta = (model.weight, model.bias) if model.affine else (zeros + 1, zeros)
    gamma, beta = gamma.detach().double(), beta.detach().double()
    oracle = Oracle(*[zeros] * 4, gamma, beta, own_error=4.0 * (x.dtype == F64))

    def average(f: Callable) -> torch.Tensor:
        """Over N, H and W, of f(a piece of x, its channels)."""
        total = zeros.clone()
        for at in pieces(x.shape):
            total[at[1]] += f(x[at], at[1]).double().sum((0, 2, 3))
        return total / max(1, x.numel() // x.shape[1])

    if model.training or model.running_mean is None:
        oracle.mean = average(lambda v, c: v)
        oracle.mean_rest = average(oracle.centred).nan_to_num(0.0, 0.0, 0.0)
        oracle.var = average(lambda v, c: oracle.centred(v, c) ** 2)
    else:
        oracle.mean, oracle.var = model.running_mean.double(), model.running_var.double()
    oracle.inv_std = 1 / torch.sqrt(oracle.var + model.eps)
    return oracle


def roundings(got: torch.Tensor, want: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Per element, got's error in roundings of its type; inf if NaN or inf is not as in want."""
    u, rounded = torch.finfo(got.dtype).eps / 2, want.to(got.dtype)
    error = (got.double() - want).abs() / (unit * u).clamp(min=1e-300)
    as_wanted = (got == rounded) | (got.isnan() & rounded.isnan())
    error = torch.where(as_wanted & ~rounded.isfinite(), 0.0, error)
    return error.nan_to_num(nan=math.inf, posinf=math.inf)


def largest(error: torch.Tensor) -> float:
    return error.max().item() if error.numel() else 0.0


def limit_for(theirs: float, own_error: float = 0.0, steps: int = 1) -> float:
    """The pass rule. Where torch itself is wrong (not finite) or raises (NaN), it is no measure."""
    return 2 * max(theirs if math.isfinite(theirs) else 0.0, 1.0) + steps + own_error


def within(limit: float, name: str, got, want, unit, origin=(0, 0, 0, 0)) -> float:
    """got's largest error; raises with the first place beyond `limit`, counted from `origin`."""
    assert got.shape == want.shape, f"{name}: {want.shape} expected, got {got.shape}"
    error = roundings(got, want, unit)
    if largest(error) > limit:
        at = tuple((error > limit).nonzero()[0].tolist())
        place, wrong = [i + j for i, j in zip(at, origin)], int((error > limit).sum())
        raise AssertionError(
            f"{name}{place}: {want[at].item():.9g} expected, got {got[at].item():.9g} "
            f"({error[at].item():.3g} u, limit {limit:.3g} u; {wrong} of {error.numel()} wrong)"
        )
    return largest(error)


def judge(name: str, got, theirs, want, unit, **rule) -> float:
    """Holds one whole tensor to the pass rule; returns our error."""
    error = math.nan if theirs is None else largest(roundings(theirs, want, unit))
    return within(limit_for(error, **rule), name, got, want, unit)


def judge_y(x, y, y_torch, oracle: Oracle) -> tuple[float, float]:
    """Holds y to the pass rule, piece by piece; our error and torch's (NaN: torch raised)."""
    ours, theirs = 0.0, math.nan if y_torch is None else 0.0
    for at in pieces(x.shape) if y_torch is not None else ():
        theirs = max(theirs, largest(roundings(y_torch[at], *oracle.y(x[at], at[1]))))
    limit = limit_for(theirs, oracle.own_error)
    for at in pieces(x.shape):
        origin = [*(s.start for s in at), 0]
        ours = max(ours, within(limit, "y", y[at], *oracle.y(x[at], at[1]), origin))
    return ours, theirs


# ------------------------------------------------------------------------- correctness of a case


@dataclass
class Target:
    """What is checked: the names that model_new.py's text defines, and whose tensors it takes."""

    names: dict
    device: str  # "cuda", or "cpu" for a pretended device
    emulator: object = None  # the module .ci/emulator/emulate.py

    @property
    def cuda(self) -> bool:
        return self.emulator is None

    def model(self, *args, **settings) -> nn.Module:
        return self.names["ModelNew"](*args, device=self.device, **settings)

    def plan(self, shape, dtype, training=True, momentum: float | None = 0.1) -> dict[str, int]:
        N, C, H, W = shape
        module = self.names["_fused_batch_norm"]
        text = module.fused_batch_norm_plan(N, C, H * W, dtype, training, momentum)
        return {key: int(value) for key, value in (word.split("=") for word in text.split())}


def make_pair(target: Target, C: int, dtype: torch.dtype, training=True, seed=0, **settings):
    """(ModelNew, nn.BatchNorm2d) with the same random parameters, half negative, and buffers."""
    theirs = nn.BatchNorm2d(C, device=target.device, dtype=dtype, **settings)
    generator = torch.Generator(target.device).manual_seed(seed)
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            limits = (0.2, 5) if name == "running_var" else (-1.5, 1.5)
            tensor.uniform_(*limits, generator=generator)
    ours = target.model(C, dtype=dtype, **settings)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(training), theirs.train(training)


def check_case(target: Target, case: Case) -> tuple[float, float]:
    """Checks y, the running buffers, the gradients; returns y's error, ours and torch's."""
    params = case.params or case.dtype
    ours, theirs = make_pair(target, case.shape[1], params, case.training, **dict(case.settings))
    for step in range(case.steps):
        x = make_x(case, target.device, step)
        oracle, before = make_oracle(x, theirs), copy.deepcopy(theirs)
        with torch.no_grad():
            y = ours(x)
            try:
                y_torch = theirs(x.clone())  # torch's own kernels fault on some unaligned views
            except (RuntimeError, ValueError):  # a size or a mix of types that torch cannot do
                y_torch = None
        check_form(x, y)
        errors = judge_y(x, y, y_torch, oracle)
        judge_buffers(ours, theirs, before, oracle, x, y_torch is not None)
    if case.backward:
        check_backward(ours, theirs, x)
    return errors


def check_form(x: torch.Tensor, y: torch.Tensor) -> None:
    """y has x's type, device and shape, and keeps its layout: contiguous, or channels-last."""
    form = lambda t: (type(t), t.dtype, t.device, t.shape)
    assert form(y) == form(x), f"y: {form(x)} expected, got {form(y)}"
    for kept in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=kept):
            assert y.is_contiguous(memory_format=kept), f"y: {kept} expected, got {y.stride()}"


def judge_buffers(ours, theirs, before, oracle: Oracle, x: torch.Tensor, torch_ran: bool) -> None:
    """The running buffers after a forward; torch's were `before`. Ours go on from torch's."""
    if ours.running_mean is None:
        assert before.running_mean is None and ours.num_batches_tracked is None
        return
    batches, got = before.num_batches_tracked.item() + ours.training, ours.num_batches_tracked
    assert got.item() == batches, f"num_batches_tracked: {batches} expected, got {got.item()}"
    batch_mean, batch_var = oracle.mean + oracle.mean_rest, oracle.var
    mean, var = before.running_mean.double(), before.running_var.double()
    if ours.training and x.numel():
        momentum = 1 / batches if before.momentum is None else before.momentum
        count = x.numel() // x.shape[1]
        mean = (1 - momentum) * mean + momentum * batch_mean
        var = (1 - momentum) * var + momentum * batch_var * (count / (count - 1))
    # 1 − momentum and momentum are rounded, too.
    rule = {"own_error": oracle.own_error, "steps": 2 if ours.training else 0}
    mean_unit = mean.abs() + batch_var.sqrt().nan_to_num(0.0)
    torchs = (theirs.running_mean, theirs.running_var) if torch_ran else (None, None)
    judge("running_mean", ours.running_mean, torchs[0], mean, mean_unit, **rule)
    judge("running_var", ours.running_var, torchs[1], var, var.abs() + before.eps, **rule)
    ours.load_state_dict(theirs.state_dict())


def check_backward(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> float:
    """The gradients of x, gamma and beta, held to float64's, beside torch's; our largest error."""
    dy, gradients, worst = torch.randn_like(x) / 16, [], 0.0
    for model, dtype in ((ours, x.dtype), (theirs, x.dtype), (copy.deepcopy(theirs).double(), F64)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):  # ours calls PyTorch's own, not cuDNN's
            wanted = [leaf, *model.parameters()]
            gradients.append(torch.autograd.grad(model(leaf), wanted, dy.to(dtype)))
    for name, got, their, want in zip(("dx", "dgamma", "dbeta"), *gradients):
        assert got.dtype == their.dtype, f"{name}: {their.dtype} expected, got {got.dtype}"
        unit = want.abs().max().expand_as(want)
        worst = max(worst, judge(name, got, their, want, unit, own_error=4.0 * (x.dtype == F64)))
    return worst


# ------------------------------------------------------------------------------------ the targets


def execute(text: str) -> dict:
    """The names that the text defines, made as benchmark harnesses do: without __file__."""
    names: dict = {}
    exec(compile(text, "<string>", "exec"), names)
    return names


def load_on_gpu(text: str) -> Target:
    return Target(execute(text), "cuda")


def load_emulator():
    """The module .ci/emulator/emulate.py; its first pretended device takes every kind of plan."""
    sys.path.insert(0, str(ROOT / ".ci" / "emulator"))
    import emulate

    return emulate


def renamed(text: str, suffix: str) -> str:
    """The text with an extension and operators of its own, to be loaded beside another one."""
    return re.sub(
        r"""(["']|ops\.)fused_batch_norm(?=["'.:])""", rf"\1fused_batch_norm_{suffix}", text
    )


def sm_80_text(text: str) -> str:
    """What GPUs without bulk copies and clusters run: PTX of compute capability 8.0 only."""
    option = '["-gencode=arch=compute_80,code=compute_80"]'
    text, found = re.subn(r'\[f"-gencode=.*?\]', option, text)
    assert found == 1, f"model_new.py chooses its architecture in {found} places, expected 1"
    return renamed(text, "sm_80")


# ------------------------------------------------------------------------------------------ speed

CARDS = ("H100", "H200")
# x's type; the share of a copy's speed that the project asks of itself on each of CARDS; shapes.
NCHW = [
    (F32, (0.84, 0.80), "64x64x512x512"),  # the benchmark's own, see reference_model.py
    (F32, (0.93, 0.91), "16x64x256x256 8x64x512x512 128x256x56x56"),
    (F32, (0.93, 0.90), "32x64x112x112 32x256x56x56 32x512x28x28 32x1024x14x14 32x128x28x28"),
    (F32, (0.93, 0.90), "32x64x56x56"),
    (F32, (0.88, 0.85), "32x2048x7x7 7x33x101x99"),
    (F16, (0.88, 0.85), "64x320x40x40"),
    (BF16, (0.88, 0.83), "256x64x112x112 256x256x56x56 256x2048x7x7"),
    (F32, (0.75, 0.74), "2x3x1024x1024 8x3x224x224 128x10x64x64"),
]
CHANNELS_LAST = [  # asked where a group of 128 bytes of channels fits on the chip, and where not
    (F32, (0.70, 0.66), "32x256x56x56 32x512x28x28 32x1024x14x14 1024x512x1x1"),
    (F32, (0.62, 0.58), "32x64x112x112 128x256x56x56 16x64x256x256"),
    (F16, (0.70, 0.66), "32x256x56x56 256x512x28x28 256x2048x7x7"),
    (F16, (0.62, 0.58), "256x64x112x112 256x256x56x56"),
    (BF16, (0.70, 0.66), "256x512x28x28 256x1024x14x14 256x2048x7x7"),
    (BF16, (0.62, 0.58), "256x64x112x112 256x256x56x56"),
    (F32, (), "8x3x224x224"),
]
SPIN_CYCLES = 500_000  # ~250 µs: Python gets ahead of the GPU, so that only GPU time is measured
WARM_UP, BUDGET_US = 5, 600_000  # runs that do not count; GPU time for one row, roughly


@dataclass
class Row:
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str = "contiguous"
    bar: float | None = None
    us: dict[str, list[float]] = field(default_factory=dict)  # each contender's runs, sorted

    def at(self, name: str, share: float = 0.5) -> float:
        times = self.us[name]
        return times[round(share * (len(times) - 1))] if times else math.nan  # none: it failed

    def peers(self) -> dict[str, float]:
        """How many times as fast as each other contender ours is."""
        return {p: self.at(p) / self.at("ours") for p in self.us if p not in ("copy", "ours")}

    def verdict(self) -> str:
        missed = [f"bar {self.bar:.2f}"] if self.bar and self.of_copy() < self.bar else []
        missed += [peer for peer, speed_up in self.peers().items() if speed_up < 1]
        return "below " + ", ".join(missed) if missed else "met"

    def of_copy(self) -> float:
        return self.at("copy") / self.at("ours")

    def cells(self) -> dict[str, str]:
        """TB/s counts what the operation needs: x read once, y written once."""
        nbytes = 2 * math.prod(self.shape) * self.dtype.itemsize
        runs = "{:.1f} ({:.1f}–{:.1f})".format(*(self.at("ours", p) for p in (0.5, 0.1, 0.9)))
        return {
            "x": show(self.shape, self.dtype),
            **{f"{name} µs": f"{self.at(name):.1f}" for name in self.us if name != "ours"},
            "ours µs (p10–p90)": runs,
            "TB/s": f"{nbytes / self.at('ours') / 1e6:.2f}",
            "of copy": f"{self.of_copy():.0%}",
            **{f"× {peer}": f"{speed_up:.2f}" for peer, speed_up in self.peers().items()},
            "verdict": self.verdict(),
        }


def take_turns(contenders: dict[str, Callable], xs: list[torch.Tensor]) -> dict[str, list[float]]:
    """GPU time of every call in µs, sorted, per contender.

    As benchmark harnesses do, each call comes behind a write that fills L2: else it would have to
    write back what the one before has left there. Some of that outlives the write, so the order is
    random; and each call has another x, so that L2 never holds what is read.
    """
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(4 * l2_bytes, device="cuda", dtype=torch.uint8)
    once_us = sum(host_us(contender, xs[0], 1) for contender in contenders.values())
    events: dict[str, list] = {name: [] for name in contenders}
    x, order = itertools.cycle(xs), random.Random(0)
    for _ in range(WARM_UP + max(20, min(100, int(BUDGET_US / once_us)))):
        for name, contender in order.sample(list(contenders.items()), len(contenders)):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(SPIN_CYCLES)
            start.record()
            contender(next(x))
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    times = lambda runs: sorted(1000 * start.elapsed_time(stop) for start, stop in runs[WARM_UP:])
    return {name: times(runs) for name, runs in events.items()}


def host_us(function: Callable, x: torch.Tensor, calls: int) -> float:
    """Of one call, the host's time included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function(x)
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / calls


@torch.no_grad()
def measure(row: Row, target: Target, theirs: Target | None = None, peers: bool = True) -> Row:
    """Times a copy, eager and compiled PyTorch (or `theirs` instead), and ours."""
    nbytes = math.prod(row.shape) * row.dtype.itemsize
    wanted = math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / nbytes)
    room = int(0.6 * torch.cuda.mem_get_info()[0] / nbytes) - 2  # copy's y, and a result
    new_x = lambda: LAYOUTS[row.layout](torch.rand(row.shape, device="cuda", dtype=row.dtype))
    xs = [new_x() for _ in range(max(1, min(max(3, wanted), room)))]
    contenders = {"copy": torch.empty_like(xs[0]).copy_}
    if theirs:
        contenders["theirs"] = theirs.model(row.shape[1]).to("cuda", row.dtype)
    elif peers:
        torch._dynamo.reset()
        contenders["eager"] = nn.BatchNorm2d(row.shape[1]).to("cuda", row.dtype)
        contenders["compile"] = torch.compile(copy.deepcopy(contenders["eager"]), dynamic=False)
    contenders["ours"] = target.model(row.shape[1]).to("cuda", row.dtype)
    us = {name: [] for name in contenders}
    for name in us:
        try:
            contenders[name](xs[0])
        except Exception as error:  # a peer that cannot run this row leaves its cells empty
            if name == "ours":
                raise
            print(f"{name} failed: {described(error)}")
            del contenders[name]
    return replace(row, us=us | take_turns(contenders, xs))


def main() -> int:
    text = TEXT_PATH.read_text()
    emulator = load_emulator()
    target = Target(emulator.load(text), "cpu", emulator)
    for case in CASES:
        if case.small != "same":
            case = replace(case, shape=case.small)
        try:
            print(case, check_case(target, case))
        except Exception as e:
            print("FAIL", case, type(e), e)
    return 0


if __name__ == "__main__":
    sys.exit(main())
