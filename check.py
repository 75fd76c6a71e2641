# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "ninja", "setuptools"]
# ///
"""Compares `ModelNew` of model_new.py with `nn.BatchNorm2d`: correctness, then speed.

The rule for every number: with float64 as the reference, our error may be at most twice the error
of `nn.BatchNorm2d` on the same device, plus one rounding of the output's type.
Errors are in such roundings (u = half the distance from 1 to the next number), of the worst
element: |y − oracle| / (u·(|gamma|·max(1, |x̂|) + |beta|)). torch's error counts as at least one,
since that much is luck. NaN and infinity must stand exactly where the oracle has them.

Without a CUDA device small cases of the same kinds run on a pretended one: the CPU executes the
kernel's text, and nothing is timed. --nets times the batch norms of whole nets instead, and only
compares y once for each shape.

Exit status: 0, or 1 if a case failed, 2 for wrong arguments. A speed below its bar fails nothing.
"""

import argparse
import copy
import itertools
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # `| head` and Ctrl-C end it, without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.excepthook = lambda kind, *rest: (
        None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    )
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # not needed here

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent
for needed in ("model_new.py", ".ci/timing.py"):
    if not (ROOT / needed).exists():
        sys.exit(f"check.py: error: {needed} must lie beside check.py, in the whole repository")
sys.path[:0] = [str(ROOT / ".ci"), str(ROOT / ".ci" / "emulator")]

import nets
import options
import plans
import readme
import timing
from texts import considering, execute, fields_of_plan, renamed, sm_80_text

TEXT_PATH = ROOT / "model_new.py"
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


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
DATA: dict[str, Callable] = {  # x from its shape and a source of normally distributed numbers
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


LAYOUTS: dict[str, Callable] = {  # how x lies in memory
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
        return f"{self.name}, {timing.Row(self.shape, self.dtype)}"


CASES = [
    Case("small channels", (32, 1024, 14, 14), small=(3, 5, 8, 8)),
    Case("middle channels", (32, 256, 56, 56), small=(4, 3, 16, 16)),
    Case("large channels", (16, 64, 256, 256), small=(5, 2, 64, 64)),
    Case("very large channels", (64, 64, 512, 512), data="uniform", small=(7, 1, 96, 96)),
    Case("few channels", (8, 3, 224, 224), small=(2, 3, 64, 64)),
    Case("plane 7×7", (32, 2048, 7, 7), small=(16, 9, 7, 7)),
    Case("plane 1×1", (128, 10, 1, 1)),
    Case("odd plane", (7, 33, 101, 99), small=(3, 2, 51, 49)),
    Case("large odd plane", (64, 8, 511, 513), BF16, F32, small=(5, 1, 95, 97)),
    Case("half parameters", (16, 48, 32, 32), F16, small=(3, 4, 8, 16)),
    Case("float parameters", (16, 48, 32, 32), BF16, F32, small=(3, 4, 8, 16)),
    Case("double", (16, 48, 32, 32), F64, small=(3, 4, 8, 8)),
    Case("channels-last", (16, 64, 28, 28), layout="channels_last", small=(3, 8, 6, 6)),
    Case("unaligned by one element", (8, 16, 32, 32), layout="unaligned", small=(3, 3, 8, 8)),
    Case("every other row and column", (8, 16, 32, 32), layout="strided", small=(3, 3, 8, 8)),
    Case("mean/std = 1e6", (16, 64, 56, 56), data="mean 1e6", small=(4, 3, 16, 16)),
    Case("a constant channel", (16, 8, 56, 56), data="constant", small=(4, 3, 16, 16)),
    Case("an outlier of 1e6 first", (16, 8, 56, 56), data="outlier first", small=(4, 3, 16, 16)),
    Case("NaN, ±inf in a channel", (16, 8, 56, 56), data="not finite", small=(4, 5, 16, 16)),
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
    own_error: float  # roundings: the oracle is no wider than a float64 y

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
        """Over N, H and W, of f(a piece of x, its channels); torch adds a row by halves."""
        total = zeros.clone()
        for at in pieces(x.shape):
            total[at[1]] += f(x[at], at[1]).double().transpose(0, 1).flatten(1).sum(1)
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


def within(limit: float, name: str, got, want, unit, piece: tuple[slice, ...] = ()) -> float:
    """got's largest error; raises with the first place beyond `limit`. got: [piece] of `name`."""
    assert got.shape == want.shape, f"{name}: {want.shape} expected, got {got.shape}"
    error = roundings(got, want, unit)
    if largest(error) > limit:
        at = tuple((error > limit).nonzero()[0].tolist())
        starts, wrong = [s.start for s in piece] + [0] * 4, int((error > limit).sum())
        place = [i + start for i, start in zip(at, starts)]
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
        ours = max(ours, within(limit, "y", y[at], *oracle.y(x[at], at[1]), piece=at))
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

    def plan(self, shape, dtype, training=True, momentum=0.1, channels_last=False) -> dict:
        N, C, H, W = shape
        plan = self.names["_fused_batch_norm"].fused_batch_norm_plan
        words = plan(N, C, H * W, dtype, training, momentum, channels_last)
        fields = fields_of_plan(self.names["FUSED_BATCH_NORM_CUDA"])
        return {name: words[place] for name, place, _ in fields}


def make_pair(target: Target, C: int, dtype: torch.dtype, training=True, seed=0, **settings):
    """(ModelNew, nn.BatchNorm2d) with the same random parameters, half negative, and buffers.

    No gamma is small: y would hardly depend on x, and a wrong store of that channel not show.
    """
    theirs = nn.BatchNorm2d(C, device=target.device, dtype=dtype, **settings)
    generator = torch.Generator(target.device).manual_seed(seed)
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            limits = (0.2, 5) if name == "running_var" else (-1.5, 1.5)
            tensor.uniform_(*limits, generator=generator)
            if name == "weight":  # of ±[0.5, 1.5]
                tensor.mul_(2 / 3).add_(torch.where(tensor < 0, -0.5, 0.5))
    ours = target.model(C, dtype=dtype, **settings)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(training), theirs.train(training)


def check_case(target: Target, case: Case) -> tuple[float, float]:
    """Checks y, the running buffers, the gradients; returns y's error, ours and torch's."""
    C, params, settings = case.shape[1], case.params or case.dtype, dict(case.settings)
    ours, theirs = make_pair(target, C, params, case.training, **settings)
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
    mean, var = before.running_mean.double(), before.running_var.double()
    if ours.training and x.numel():
        momentum = 1 / batches if before.momentum is None else before.momentum
        count = x.numel() // x.shape[1]
        mean = (1 - momentum) * mean + momentum * (oracle.mean + oracle.mean_rest)
        var = (1 - momentum) * var + momentum * oracle.var * (count / (count - 1))
    units = mean.abs() + oracle.var.sqrt().nan_to_num(0.0), var.abs() + before.eps
    steps = 2 if ours.training else 0  # momentum and 1 − momentum are rounded, too
    for name, want, unit in zip(("running_mean", "running_var"), (mean, var), units):
        got, torchs = getattr(ours, name), getattr(theirs, name) if torch_ran else None
        judge(name, got, torchs, want, unit, own_error=oracle.own_error, steps=steps)
    ours.load_state_dict(theirs.state_dict())


def check_backward(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Holds the gradients of x, gamma and beta to those of nn.BatchNorm2d in float64."""
    models = (ours, x.dtype), (theirs, x.dtype), (copy.deepcopy(theirs).double(), F64)
    dy = torch.randn_like(x) / 16  # small: their sums must fit into float16
    for cudnn in (True, False):  # ours takes cuDNN's backward where PyTorch's layer would
        gradients = []
        for model, dtype in models:
            leaf = x.to(dtype, copy=True).requires_grad_()
            with torch.backends.cudnn.flags(enabled=cudnn):
                wanted = [leaf, *model.parameters()]
                gradients.append(torch.autograd.grad(model(leaf), wanted, dy.to(dtype)))
        for name, got, torchs, want in zip(("dx", "dgamma", "dbeta"), *gradients):
            assert got.dtype == torchs.dtype, f"{name}: {torchs.dtype} expected, got {got.dtype}"
            unit = want.abs().max().expand_as(want)
            judge(name, got, torchs, want, unit, own_error=4.0 * (x.dtype == F64))


def load_on_gpu(text: str) -> Target:
    return Target(execute(text), "cuda")


def load_emulator():
    import emulate  # .ci/emulator/emulate.py

    return emulate


# ------------------------------------------------------------------------------------------- main


def run_cases(cases: list[Case], target: Target, whose: str = "") -> dict[str, tuple | None]:
    """Prints a line for each case; the errors of y, ours and torch's, None where it failed."""
    errors: dict[str, tuple | None] = {}
    for case in cases:
        try:
            errors[str(case)] = check_case(target, case)
            said = "ok    {:8.2f} u   torch {:9.3g} u".format(*errors[str(case)])
        except torch.OutOfMemoryError:
            said = "skip  needs more GPU memory"
        except Exception as error:
            errors[str(case)] = None
            said = f"FAIL  {type(error).__name__}: {' '.join(str(error).split())[:400]}"
        print(f"{whose}{case!s:58} {said}", flush=True)
    return errors


def choose_cases(given: argparse.Namespace) -> list[Case]:
    layout = "channels_last" if given.channels_last else "contiguous"
    if given.shape:
        choices = itertools.product(given.xs, ("uniform", "mixed"))
        return [Case(data, x.shape, x.dtype, data=data, layout=layout) for x, data in choices]
    cases = [case for case in CASES if given.dtype in (None, case.dtype)]
    if given.channels_last:
        return [replace(case, layout=layout) for case in cases if case.layout == "contiguous"]
    large = torch.cuda.is_available()
    return [c if large or c.small == "same" else replace(c, shape=c.small) for c in cases]


def main() -> int:
    given, text = options.parse(__doc__), TEXT_PATH.read_text()
    of_plans = given.plan or given.regret
    text = considering(text) if of_plans else text
    cuda, cases, start = torch.cuda.is_available(), choose_cases(given), time.perf_counter()
    if cuda:
        p = torch.cuda.get_device_properties(0)
        print(f"{p.name}, {p.multi_processor_count} multiprocessors, torch {torch.__version__}")
        target = load_on_gpu(renamed(text, "plans") if of_plans else text)
    else:
        print("No CUDA device: the CPU executes the kernel's text, on a pretended one; no timing.")
        print("More tests: see README.md, Two commands", flush=True)
        target = Target(load_emulator().load(text), "cpu", load_emulator())
    print(f"model_new.py loaded in {time.perf_counter() - start:.1f} s", flush=True)
    if given.plan and not cuda:
        print("planned for an H100: 132 multiprocessors of compute capability 9.0, 227 KB each")
        target.emulator.set_device(132, 227 << 10, (9, 0))
    if given.plan:
        return plans.show(target, given.xs)
    if given.regret:
        return plans.regret(given, target)
    theirs = given.against and load_on_gpu(renamed(given.against, "theirs"))
    if given.nets is not None:
        return nets.run(given, target.model, theirs and theirs.model, target.device)
    errors = run_cases(cases, target)
    if theirs:
        run_cases(cases, theirs, "theirs: ")
    if cuda:
        rows = timing.choose(given.channels_last, given.shape, given.dtype)
        measured = timing.measure_rows(rows, target.model, theirs and theirs.model)
        if given.json:
            timing.write_json(given.json, measured)
    failed = [*errors.values()].count(None)
    passed = len(errors) - failed
    if given.readme:
        sm_80 = load_on_gpu(sm_80_text(text)).model
        failed += readme.write(errors, measured, target.model, sm_80, target.device)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
