# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "ninja", "setuptools"]
# ///
"""Checks and times `ModelNew` of model_new.py against `nn.BatchNorm2d`.

    python check.py                   correctness, refusals, paste-ability, compilation, speed
    python check.py --quick           the same without the speed table
    python check.py --readme          all of it, then writes the measured tables and the chart into README.md
    python check.py --shape 16x64x256x256 --dtype bfloat16        one shape: correctness and speed
    python check.py --plan 16x64x256x256                          how the kernel would be launched, and why that costs what
    python check.py --only graph      the checks whose name contains "graph"
    python check.py --emulate         the kernel's own text, executed by the CPU (automatic where there is no CUDA device)
    python check.py --mutants         also deliberately wrong kernels, each of which has to be caught
    python check.py --seeds N         N random cases (and schedules, where emulated) instead of 100;  --seed S repeats one

The rule for every number: with the same input in float64 as the oracle, our error may be at most twice the error of
`nn.BatchNorm2d` on the same device, plus one rounding of the output's type. Errors are given in such roundings (u = half the
distance from 1 to the next number): |y − oracle| / (u·(|gamma|·max(1, |x̂|) + |beta|)), the worst element counts. torch's error
counts as at least one rounding, since that much is luck. NaN and infinity must stand exactly where the oracle has them.

Exit status: 0 when nothing failed, else 1. A speed below its bar is marked, it is not a failure.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import itertools
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterator
from unittest import mock

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # not needed here
os.environ.setdefault("PYTHONWARNINGS", "ignore:Failed to initialize NumPy")  # nor in the processes that this one starts

import torch
import torch.nn as nn
from torch.utils import cpp_extension

import reference_model

ROOT = Path(__file__).resolve().parent
TEXT_PATH = ROOT / "model_new.py"
EMULATOR = ROOT / ".ci" / "emulator"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64,
          "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
TIME_LIMIT_S = 300  # for one check
GREY, RED, GREEN, PLAIN = ("\033[90m", "\033[31m", "\033[32m", "\033[0m") if sys.stdout.isatty() else ("",) * 4


# ------------------------------------------------------------------------------------------------------ reporting


class Skip(Exception):
    """This check cannot be made here; the message says why."""


@dataclass
class Report:
    """Prints one line per check as it is made, and counts."""

    only: str = ""
    counts: dict[str, int] = field(default_factory=lambda: {"ok": 0, "FAIL": 0, "skip": 0})
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def wants(self, name: str) -> bool:
        return self.only in name

    def section(self, title: str, function: Callable, *arguments):
        """Calls function(report, *arguments); what goes wrong between its checks fails the section, not the run."""
        print(f"\n{title}", flush=True)
        try:
            return function(self, *arguments)
        except Skip as reason:
            self.add(title, "skip", str(reason))
        except Exception as error:
            self.add(title, "FAIL", described(error))

    def add(self, name: str, status: str, detail: str) -> None:
        self.counts[status] += 1
        self.rows.append((name, status, detail))
        colour = {"ok": GREEN, "FAIL": RED, "skip": GREY}[status]
        print(f"  {colour}{status:4}{PLAIN} {name:62} {detail}", flush=True)

    def run(self, name: str, function: Callable[[], str | None]) -> None:
        if self.wants(name):
            watchdog = threading.Timer(TIME_LIMIT_S, self.give_up, [name])  # a kernel that hangs would be waited for for ever
            watchdog.daemon = True
            watchdog.start()
            self.add(name, *outcome(function))
            watchdog.cancel()

    def give_up(self, name: str) -> None:
        self.add(name, "FAIL", f"not finished after {TIME_LIMIT_S} s; the rest was not run")
        print(f"\n{self.closing_line()}", flush=True)
        os._exit(1)

    def closing_line(self) -> str:
        passed, failed, skipped = self.counts.values()
        return f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else "")


def outcome(function: Callable[[], str | None]) -> tuple[str, str]:
    """Calls `function`; whatever it raises becomes a status and a detail, so that one bad case does not end the run."""
    try:
        return "ok", function() or ""
    except Skip as reason:
        return "skip", str(reason)
    except Exception as error:
        return "FAIL", described(error)


def described(error: Exception) -> str:
    """The message of an expectation that failed or of what the kernel's side raised; of anything else also where."""
    compiler = re.search(r"^.*\berror: .*$", str(error), re.M)
    message = " ".join((compiler[0] if compiler else str(error)).split())[:400]
    if isinstance(error, (AssertionError, RuntimeError, ValueError)) and message:
        return message if isinstance(error, AssertionError) else f"{type(error).__name__}: {message}"
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {message}  [{Path(at.filename).name}:{at.lineno}: {at.line}]"


def show_shape(shape) -> str:
    return "×".join(map(str, shape))


def show_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------ the cases
# One table for the GPU and for the emulated devices. The emulated ones take `small` instead of `shape`, where it is given;
# a case too large for them says small=None.


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    params: torch.dtype | None = None  # type of gamma, beta and the running buffers; None: as x
    data: str = "mixed"  # how x is made, see DATA
    layout: str = "contiguous"  # how x lies in memory, see LAYOUTS
    small: tuple[int, int, int, int] | None | str = "same"
    training: bool = True
    steps: int = 1  # forwards before the running buffers are compared
    settings: tuple[tuple[str, object], ...] = ()  # arguments of the constructor


def case_name(case: Case) -> str:
    return f"{case.name}, {show_shape(case.shape)} {show_dtype(case.dtype)}"


F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

CASES = [
    # Ordinary shapes of every kind of plan: what is on chip per channel grows downwards.
    Case("small channels", (32, 128, 28, 28), small=(3, 5, 8, 8)),
    Case("middle channels", (32, 64, 112, 112), small=(4, 3, 16, 16)),
    Case("large channels", (16, 64, 256, 256), small=(5, 2, 64, 64)),
    Case("middle channels, more than multiprocessors", (32, 256, 40, 40), small=(4, 8, 24, 24)),
    Case("very large channels", (64, 64, 512, 512), data="uniform", small=(7, 1, 96, 96)),
    Case("very large channels, odd plane", (64, 8, 511, 513), small=(5, 1, 95, 97)),
    Case("very large channels, float16", (64, 8, 512, 512), F16, F32, small=(7, 1, 128, 128)),
    Case("more than 2^31 elements", (64, 64, 725, 725), F16, F32, data="uniform", small=None),
    Case("more than 2^31 elements in one channel", (3, 1, 26755, 26757), BF16, F32, data="uniform", small=None),
    # Types: x and y, then the parameters.
    Case("float16, float32 parameters", (16, 48, 32, 32), F16, F32, small=(3, 4, 8, 16)),
    Case("float16, float16 parameters", (16, 48, 32, 32), F16, small=(3, 4, 8, 16)),
    Case("bfloat16, float32 parameters", (16, 48, 32, 32), BF16, F32, small=(3, 4, 8, 16)),
    Case("bfloat16, bfloat16 parameters", (16, 48, 32, 32), BF16, small=(3, 4, 8, 16)),
    Case("float64", (16, 48, 32, 32), F64, small=(3, 4, 8, 8)),
    Case("float64, odd plane", (5, 7, 11, 13), F64),
    Case("float64, large channels", (16, 8, 256, 256), F64, small=(5, 2, 48, 48)),
    # Sizes: planes that are no multiple of a vector, and the smallest of everything.
    Case("plane 7x7", (32, 2048, 7, 7), small=(16, 9, 7, 7)),
    Case("plane 7x7, float16", (32, 512, 7, 7), F16, F32, small=(6, 9, 7, 7)),
    Case("plane 7x7, large channels", (256, 2048, 7, 7), small=(12, 16, 7, 7)),
    Case("plane 7x7, few large channels", (512, 64, 7, 7), small=(32, 4, 7, 7)),
    Case("plane 3x5", (9, 17, 3, 5)),
    Case("plane 1x1", (128, 10, 1, 1)),
    Case("plane 1x1, bfloat16", (128, 10, 1, 1), BF16, F32),
    Case("odd plane", (7, 33, 101, 99), small=(3, 2, 51, 49)),
    Case("odd plane, bfloat16", (7, 33, 101, 99), BF16, F32, small=(3, 2, 51, 49)),
    Case("C = 1", (16, 1, 64, 64), small=(8, 1, 32, 32)),
    Case("C = 5000", (4, 5000, 6, 6), small=(2, 500, 2, 2)),
    Case("N = 1", (1, 32, 224, 224), small=(1, 2, 64, 64)),
    Case("N = 1, H·W = 2", (1, 3, 1, 2)),
    Case("N = 3000", (3000, 4, 4, 4), small=(1000, 2, 4, 4)),
    Case("few channels", (2, 3, 1024, 1024), small=(2, 3, 64, 64)),
    Case("H·W one less than a vector", (8, 16, 1, 1023), small=(3, 4, 1, 127)),
    Case("H·W a power of two", (8, 16, 1, 1024), small=(3, 4, 1, 128)),
    Case("H·W one more than a vector", (8, 16, 1, 1025), small=(3, 4, 1, 129)),
    Case("N = 0", (0, 5, 4, 4)),
    Case("W = 0", (2, 5, 4, 0)),
    # Memory layouts.
    Case("channels-last", (16, 64, 28, 28), layout="channels_last", small=(3, 8, 6, 6)),
    Case("channels-last, float16", (16, 64, 28, 28), F16, F32, layout="channels_last", small=(3, 8, 6, 6)),
    Case("unaligned by one element", (8, 16, 32, 32), layout="unaligned", small=(3, 3, 8, 8)),
    Case("unaligned by one element, float16", (8, 16, 32, 32), F16, F32, layout="unaligned", small=(3, 3, 8, 8)),
    Case("every other row and column", (8, 16, 32, 32), layout="strided", small=(3, 3, 8, 8)),
    Case("N and C exchanged", (8, 16, 32, 32), layout="transposed", small=(3, 3, 8, 8)),
    Case("slice of the channels", (8, 16, 32, 32), layout="channel_slice", small=(3, 3, 8, 8)),
    Case("one image repeated by stride 0", (8, 16, 32, 32), layout="expanded", small=(3, 3, 8, 8)),
    # Values on which careless sums fail.
    Case("mean/std = 1e4", (16, 64, 56, 56), data="mean 1e4", small=(4, 3, 16, 16)),
    Case("mean/std = 1e6", (16, 64, 56, 56), data="mean 1e6", small=(4, 3, 16, 16)),
    Case("mean/std = 1e6, large channels", (16, 16, 256, 256), data="mean 1e6", small=(5, 2, 64, 64)),
    Case("mean/std = 1e6, odd plane", (7, 33, 31, 33), data="mean 1e6", small=(2, 3, 15, 17)),
    Case("mean/std = 200, bfloat16", (16, 64, 56, 56), BF16, F32, data="mean 200", small=(4, 3, 16, 16)),
    Case("a constant channel", (16, 8, 56, 56), data="constant", small=(4, 3, 16, 16)),
    Case("an outlier of 1e6 first", (16, 8, 56, 56), data="outlier first", small=(4, 3, 16, 16)),
    Case("an outlier of 1e6 first in a large channel", (64, 1, 224, 224), data="outlier first", small=(1, 1, 512, 512)),
    Case("an outlier of 1e6 in the middle", (16, 8, 56, 56), data="outlier middle", small=(4, 3, 16, 16)),
    Case("an outlier of 1e6 last", (16, 8, 56, 56), data="outlier last", small=(4, 3, 16, 16)),
    Case("an image of outliers", (3000, 4, 4, 4), data="outlier image", small=(1000, 2, 4, 4)),
    Case("var near eps", (16, 8, 56, 56), data="tiny", small=(4, 3, 16, 16)),
    Case("NaN, inf, -inf in one channel each", (16, 8, 56, 56), data="not finite", small=(4, 5, 16, 16)),
    Case("NaN, inf, -inf in one channel each, float16", (16, 8, 56, 56), F16, F32, data="not finite", small=(4, 5, 16, 16)),
    # Settings and the running buffers.
    Case("three steps", (16, 32, 14, 14), steps=3, small=(3, 4, 6, 6)),
    Case("three steps, cumulative average", (16, 32, 14, 14), steps=3, settings=(("momentum", None),), small=(3, 4, 6, 6)),
    Case("cumulative average, large channels", (16, 64, 256, 256), steps=2, settings=(("momentum", None),), small=(5, 2, 64, 64)),
    Case("cumulative average, odd plane", (7, 33, 101, 99), steps=2, settings=(("momentum", None),), small=(3, 2, 51, 49)),
    Case("momentum = 1", (16, 32, 14, 14), settings=(("momentum", 1.0),), small=(3, 4, 6, 6)),
    Case("momentum = 0", (16, 32, 14, 14), settings=(("momentum", 0.0),), small=(3, 4, 6, 6)),
    Case("momentum = -0.5", (16, 32, 14, 14), settings=(("momentum", -0.5),), small=(3, 4, 6, 6)),
    Case("eps = 0.3", (16, 32, 14, 14), settings=(("eps", 0.3),), small=(3, 4, 6, 6)),
    Case("not affine", (16, 32, 14, 14), settings=(("affine", False),), small=(3, 4, 6, 6)),
    Case("no running buffers", (16, 32, 14, 14), settings=(("track_running_stats", False),), small=(3, 4, 6, 6)),
    Case("eval", (16, 32, 28, 28), training=False, small=(3, 4, 8, 8)),
    Case("eval, odd plane, bfloat16", (16, 32, 7, 7), BF16, F32, training=False, small=(3, 4, 7, 7)),
    Case("eval, plane 7x7", (32, 2048, 7, 7), training=False, small=(16, 8, 7, 7)),
    Case("eval, large", (16, 64, 256, 256), training=False, small=(5, 3, 64, 64)),
    Case("eval, large, odd plane", (16, 64, 255, 257), training=False, small=(5, 3, 63, 65)),
    Case("eval, channels-last", (16, 32, 28, 28), training=False, layout="channels_last", small=(3, 4, 8, 8)),
    Case("eval, one value per channel", (1, 6, 1, 1), training=False),
    Case("eval, N = 0", (0, 6, 4, 4), training=False),
    Case("eval, no running buffers", (16, 32, 14, 14), training=False, settings=(("track_running_stats", False),), small=(3, 4, 6, 6)),
    Case("eval, not affine", (16, 32, 14, 14), training=False, settings=(("affine", False),), small=(3, 4, 6, 6)),
]

# What the speed table runs, with the bar for copy time / our time (H200). The benchmark's own size comes first.
SPEED_CASES = [
    ((64, 64, 512, 512), F32, 0.80),
    ((16, 64, 256, 256), F32, 0.93), ((8, 64, 512, 512), F32, 0.93), ((128, 256, 56, 56), F32, 0.93),
    ((32, 64, 112, 112), F32, 0.90), ((32, 256, 56, 56), F32, 0.90), ((32, 512, 28, 28), F32, 0.90),
    ((32, 1024, 14, 14), F32, 0.90), ((32, 128, 28, 28), F32, 0.90), ((32, 64, 56, 56), F32, 0.90),
    ((32, 2048, 7, 7), F32, 0.85), ((64, 320, 40, 40), F16, 0.85), ((7, 33, 101, 99), F32, 0.85),
    ((256, 64, 112, 112), BF16, 0.88), ((256, 256, 56, 56), BF16, 0.88), ((256, 2048, 7, 7), BF16, 0.88),
    ((2, 3, 1024, 1024), F32, 0.75), ((8, 3, 224, 224), F32, 0.75), ((128, 10, 64, 64), F32, 0.75),
]


def with_value(x: torch.Tensor, value: float, where: int) -> torch.Tensor:
    """x: (N, C, H, W); puts `value` at element `where` of channel 0's N·H·W ones (negative: from the end)."""
    channel = x.transpose(0, 1)[0].flatten()
    channel[where] = value
    x[:, 0] = channel.view_as(x[:, 0])
    return x


def mixed(shape, normal) -> torch.Tensor:
    """Each channel has a mean and a standard deviation of its own, so that channels cannot be mistaken for each other."""
    c = torch.arange(shape[1], device=normal(1).device, dtype=torch.float32).view(1, -1, 1, 1) % 17
    return normal(*shape) * (0.5 + c / 4) + (c - 5)


def not_finite(shape, normal) -> torch.Tensor:
    x = mixed(shape, normal)
    x[-1, 0, -1, -1], x[0, 1, 0, 0], x[0, 3, 0, 1] = math.nan, math.inf, -math.inf
    return x


def constant(shape, normal) -> torch.Tensor:
    x = mixed(shape, normal)
    x[:, 0], x[:, -1] = 12345.678, 0.1
    return x


DATA: dict[str, Callable] = {
    "mixed": mixed,
    "mean 200": lambda shape, normal: normal(*shape) + 200,
    "mean 1e4": lambda shape, normal: normal(*shape) + 1e4,
    "mean 1e6": lambda shape, normal: normal(*shape) + 1e6,
    "tiny": lambda shape, normal: normal(*shape) * 3e-3,
    "constant": constant,
    "outlier first": lambda shape, normal: with_value(normal(*shape), 1e6, 0),
    "outlier middle": lambda shape, normal: with_value(normal(*shape), 1e6, shape[0] * shape[2] * shape[3] // 2 + 1),
    "outlier last": lambda shape, normal: with_value(normal(*shape), -1e6, -1),
    "outlier image": lambda shape, normal: torch.cat([normal(1, *shape[1:]) + 1e6, normal(shape[0] - 1, *shape[1:])]),
    "not finite": not_finite,
}


def unaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def strided(x: torch.Tensor) -> torch.Tensor:
    N, C, H, W = x.shape
    large = x.new_full((N, C, 2 * H, 2 * W + 1), math.nan)
    large[:, :, ::2, 1::2] = x
    return large[:, :, ::2, 1::2]


def channel_slice(x: torch.Tensor) -> torch.Tensor:
    edge = torch.full_like(x[:, :1], math.nan)
    return torch.cat([edge, x, edge], dim=1)[:, 1:-1]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "unaligned": unaligned,
    "strided": strided,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channel_slice": channel_slice,
    "expanded": lambda x: x[:1].expand(x.shape),
}


def make_x(case: Case, device: str, seed: int) -> torch.Tensor:
    """x: (N, C, H, W) in the case's type and layout. The same values for the same seed, whatever else runs."""
    generator = torch.Generator(device).manual_seed(seed)
    if case.data == "uniform":  # straight in its type: no float32 copy of the largest shapes
        x = torch.empty(case.shape, dtype=case.dtype, device=device).uniform_(generator=generator)
    else:
        wide = F64 if case.dtype == F64 else F32
        x = DATA[case.data](case.shape, lambda *s: torch.randn(*s, generator=generator, device=device, dtype=wide)).to(case.dtype)
    return LAYOUTS[case.layout](x)


def random_case(seed: int) -> Case:
    """A case for a real GPU, of up to 2^24 elements; the emulator draws its own, smaller ones."""
    r = random.Random(seed)
    dtype, params = r.choice([(F32, F32)] * 3 + [(F16, F32), (F16, F16), (BF16, F32), (BF16, BF16), (F64, F64)])
    elems = int(2 ** r.uniform(4, 24))
    H, W = r.choice([(1, 1), (7, 7), (14, 14), (28, 28), (56, 56), (112, 112), (1, r.randint(1, 5000)), (r.randint(1, 300), r.randint(1, 300))])
    C = min(r.choice([1, 2, 3, 64, r.randint(1, 2000)]), max(1, elems // (H * W)))
    N = max(2 if H * W == 1 else 1, elems // (C * H * W))
    return Case("random", (N, C, H, W), dtype, params, r.choice(["mixed", "mixed", "uniform", "tiny", "mean 200"]),
                r.choice(["contiguous"] * 7 + list(LAYOUTS)), training=r.random() < 0.85, steps=r.choice([1, 1, 2]),
                settings=(("momentum", r.choice([0.1, 0.1, None])), ("affine", r.random() < 0.8), ("eps", r.choice([1e-5, 1e-3]))))


# ------------------------------------------------------------------------------------------- oracle and errors

PIECE_ELEMS = 1 << 26  # the oracle works on pieces of so many elements: 512 MB in float64


def pieces(shape) -> Iterator[tuple[slice, slice, slice]]:
    """Slices (n, c, h) that cover a tensor of `shape` in pieces of at most PIECE_ELEMS elements or one row."""
    N, C, H, W = shape
    channels = max(1, min(C, PIECE_ELEMS // max(1, N * H * W)))
    images = max(1, min(N, PIECE_ELEMS // max(1, channels * H * W)))
    rows = max(1, min(H, PIECE_ELEMS // max(1, channels * images * W)))
    for c, n, h in itertools.product(range(0, C, channels), range(0, N, images), range(0, H, rows)):
        yield slice(n, n + images), slice(c, c + channels), slice(h, h + rows)


def per_channel(v: torch.Tensor) -> torch.Tensor:
    return v.view(1, -1, 1, 1)


def channel_average(x: torch.Tensor, f: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
    """The average over N, H, W of f(x in float64), in float64: (C,)."""
    total = torch.zeros(x.shape[1], dtype=F64, device=x.device)
    for n, c, h in pieces(x.shape):
        total[c] += f(x[n, c, h].double(), c).sum((0, 2, 3))
    return total / (x.numel() / max(1, x.shape[1]) if x.numel() else 1)


@dataclass
class Oracle:
    """What one forward must give, in float64, straight from the formula."""

    mean: torch.Tensor  # (C,)
    mean_rest: torch.Tensor  # (C,) what rounding `mean` to one float64 lost
    var: torch.Tensor  # (C,) biased
    inv_std: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    own_error: float  # roundings by which the oracle itself may be off: it is no wider than a float64 output

    def centred(self, x: torch.Tensor, c: slice) -> torch.Tensor:
        return (x.double() - per_channel(self.mean[c])) - per_channel(self.mean_rest[c])

    def y(self, x: torch.Tensor, c: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(y, the magnitude that an error is measured against) for a piece of x with channels `c`."""
        x_hat = self.centred(x, c) * per_channel(self.inv_std[c])
        gamma, beta = per_channel(self.gamma[c]), per_channel(self.beta[c])
        return gamma * x_hat + beta, gamma.abs() * x_hat.abs().clamp(min=1) + beta.abs()


def make_oracle(x: torch.Tensor, model: nn.BatchNorm2d) -> Oracle:
    """`model`: the settings, the parameters, and for eval the running buffers as they are before the forward."""
    C, device = x.shape[1], x.device
    oracle = Oracle(*(torch.zeros(C, dtype=F64, device=device) for _ in range(6)), own_error=4.0 * (x.dtype == F64))
    if model.training or model.running_mean is None:
        oracle.mean = channel_average(x, lambda v, c: v)
        oracle.mean_rest = channel_average(x, lambda v, c: v - per_channel(oracle.mean[c])).nan_to_num(0.0, 0.0, 0.0)
        oracle.var = channel_average(x, lambda v, c: oracle.centred(v, c) ** 2)
    else:
        oracle.mean, oracle.var = model.running_mean.double(), model.running_var.double()
    oracle.inv_std = 1 / torch.sqrt(oracle.var + model.eps)
    oracle.gamma = model.weight.detach().double() if model.affine else torch.ones(C, dtype=F64, device=device)
    oracle.beta = model.bias.detach().double() if model.affine else torch.zeros(C, dtype=F64, device=device)
    return oracle


def roundings(got: torch.Tensor, want: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Element by element, the error of `got` in roundings of its type; infinite where NaN or infinity is not as in `want`."""
    u = torch.finfo(got.dtype).eps / 2
    error = (got.double() - want).abs() / (unit * u).clamp(min=1e-300)
    rounded = want.to(got.dtype)
    as_wanted = (got == rounded) | (got.isnan() & rounded.isnan())
    return torch.where(as_wanted & ~rounded.isfinite(), 0.0, error).nan_to_num(nan=math.inf, posinf=math.inf)


def limit_for(theirs: float, own_error: float = 0.0, steps: int = 1) -> float:
    """The pass rule. Where torch itself is wrong (infinite error), it is no measure."""
    return 2 * max(theirs if math.isfinite(theirs) else 0.0, 1.0) + steps + own_error


def largest(error: torch.Tensor) -> float:
    return error.max().item() if error.numel() else 0.0


def judge(name: str, got: torch.Tensor, theirs: torch.Tensor | None, want: torch.Tensor, unit: torch.Tensor, **rule) -> float:
    """Compares one whole tensor by the pass rule; returns our error in roundings."""
    error = roundings(got, want, unit)
    limit = limit_for(largest(roundings(theirs, want, unit)) if theirs is not None else 0.0, **rule)
    assert got.shape == want.shape, f"{name}: shape {show_shape(want.shape)} expected, got {show_shape(got.shape)}"
    if largest(error) > limit:
        at = (error > limit).nonzero()[0].tolist()
        raise AssertionError(f"{name}{at}: expected {want[tuple(at)].item():.9g}, got {got[tuple(at)].item():.9g} "
                             f"({error[tuple(at)].item():.3g} roundings, limit {limit:.3g})")
    return largest(error)


def judge_y(x: torch.Tensor, y: torch.Tensor, y_torch: torch.Tensor | None, oracle: Oracle) -> str:
    """Compares y with the oracle piece by piece; returns "ours …, torch …"."""
    ours = theirs = 0.0
    for n, c, h in pieces(x.shape):
        want = oracle.y(x[n, c, h], c)
        ours = max(ours, largest(roundings(y[n, c, h], *want)))
        if y_torch is not None:
            theirs = max(theirs, largest(roundings(y_torch[n, c, h], *want)))
    limit = limit_for(theirs, oracle.own_error)
    for n, c, h in pieces(x.shape) if ours > limit else ():
        want, unit = oracle.y(x[n, c, h], c)
        error = roundings(y[n, c, h], want, unit)
        if largest(error) > limit:
            at = (error > limit).nonzero()[0].tolist()
            place = [at[0] + n.start, at[1] + c.start, at[2] + h.start, at[3]]
            raise AssertionError(f"y{place}: expected {want[tuple(at)].item():.9g}, got {y[n, c, h][tuple(at)].item():.9g} "
                                 f"({error[tuple(at)].item():.3g} roundings, limit {limit:.3g}; "
                                 f"{int((error > limit).sum())} elements of {error.numel()} wrong)")
    return f"ours {ours:8.2f} u   torch " + (f"{theirs:8.3g} u" if y_torch is not None else "  raises")


# ---------------------------------------------------------------------------------------- correctness of one case


@dataclass
class Target:
    """Where a check runs: the namespace that model_new.py's text made, and the device whose tensors it takes."""

    names: dict
    device: str  # "cuda", or "cpu" for an emulated device
    emulator: object = None  # the emulator's module

    @property
    def cuda(self) -> bool:
        return self.emulator is None

    def model(self, *args, **settings) -> nn.Module:
        return self.names["ModelNew"](*args, device=self.device, **settings)

    def plan(self, shape, dtype, training: bool = True, momentum: float | None = 0.1) -> dict[str, int]:
        N, C, H, W = shape
        text = self.names["_fused_batch_norm"].fused_batch_norm_plan(N, C, H * W, dtype, training, momentum)
        return {key: int(value) for key, value in (word.split("=") for word in text.split())}


def make_pair(target: Target, C: int, dtype: torch.dtype, training: bool = True, seed: int = 0, **settings):
    """(ModelNew, nn.BatchNorm2d) with the same random parameters (half of them negative) and running buffers."""
    theirs = nn.BatchNorm2d(C, device=target.device, dtype=dtype, **settings)
    generator = torch.Generator(target.device).manual_seed(seed)
    with torch.no_grad():
        for name, tensor in itertools.chain(theirs.named_parameters(), theirs.named_buffers()):
            if name == "running_var":
                tensor.uniform_(0.2, 5, generator=generator)
            elif tensor.is_floating_point():
                tensor.uniform_(-1.5, 1.5, generator=generator)
    ours = target.model(C, dtype=dtype, **settings)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(training), theirs.train(training)


def memory_for(case: Case) -> int:
    """Bytes that checking the case takes on the GPU, roughly: x, both results, the making of x, the oracle's pieces."""
    elems = math.prod(case.shape)
    width = 4 if case.data != "uniform" else 0
    return elems * (3 * case.dtype.itemsize + 2 * width) + 6 * 8 * min(elems, PIECE_ELEMS)


def check_case(target: Target, case: Case) -> str:
    """Ours and torch's error for y, and the running buffers after `case.steps` forwards."""
    if target.cuda and memory_for(case) > torch.cuda.mem_get_info()[0]:
        raise Skip(f"needs {memory_for(case) / 1e9:.0f} GB of GPU memory")
    ours, theirs = make_pair(target, case.shape[1], case.params or case.dtype, case.training, **dict(case.settings))
    detail = ""
    for step in range(case.steps):
        x = make_x(case, target.device, seed=step)
        oracle = make_oracle(x, theirs)
        before = copy.deepcopy(theirs)
        with torch.no_grad():
            y = ours(x)
            try:
                y_torch = theirs(x.clone())  # torch's own kernels fault on some unaligned views
            except (RuntimeError, ValueError):  # a size or a mix of types that torch cannot do
                y_torch = None
        if target.cuda:
            torch.cuda.synchronize()
        check_form(x, y)
        detail = judge_y(x, y, y_torch, oracle)
        judge_buffers(ours, theirs, before, oracle, x, y_torch is not None)
    return detail


def check_form(x: torch.Tensor, y: torch.Tensor) -> None:
    """y has x's type and shape, and keeps its layout where that is contiguous or channels-last."""
    assert type(y) is torch.Tensor and y.dtype == x.dtype and y.device == x.device, f"y: {type(y)}, {y.dtype}, {y.device}"
    assert y.shape == x.shape, f"y: shape {show_shape(x.shape)} expected, got {show_shape(y.shape)}"
    kept = [f for f in (torch.contiguous_format, torch.channels_last) if x.is_contiguous(memory_format=f)]
    assert all(y.is_contiguous(memory_format=f) for f in kept), f"y: x's strides {x.stride()} expected, got {y.stride()}"


def judge_buffers(ours: nn.Module, theirs: nn.Module, before: nn.Module, oracle: Oracle, x: torch.Tensor, torch_ran: bool) -> None:
    """The running buffers after one forward, starting from torch's buffers `before` it; then ours continue from torch's."""
    if ours.running_mean is None:
        assert before.running_mean is None and ours.num_batches_tracked is None
        return
    batches = before.num_batches_tracked.item() + ours.training
    assert ours.num_batches_tracked.item() == batches, f"num_batches_tracked: expected {batches}, got {ours.num_batches_tracked.item()}"
    mean, var = before.running_mean.double(), before.running_var.double()
    if ours.training and x.numel():
        momentum = 1 / batches if before.momentum is None else before.momentum
        count = x.numel() // x.shape[1]
        mean = (1 - momentum) * mean + momentum * (oracle.mean + oracle.mean_rest)
        var = (1 - momentum) * var + momentum * oracle.var * (count / (count - 1))
    deviation = torch.sqrt(oracle.var).nan_to_num(0.0)
    rule = {"own_error": oracle.own_error, "steps": 2 if ours.training else 0}  # 1 − momentum and momentum are rounded too
    judge("running_mean", ours.running_mean, theirs.running_mean if torch_ran else None, mean, mean.abs() + deviation, **rule)
    judge("running_var", ours.running_var, theirs.running_var if torch_ran else None, var, var.abs() + before.eps, **rule)
    ours.load_state_dict(theirs.state_dict())


# -------------------------------------------------------------------------------------------------- behaviour
# Each function is one check; its docstring's first line is its name. `where`: "any", or "cuda" for a real GPU only.

BEHAVIOURS: list[tuple[str, str, Callable[[Target], str | None]]] = []


def behaviour(where: str):
    def register(function):
        BEHAVIOURS.append((function.__doc__.splitlines()[0].rstrip("."), where, function))
        return function
    return register


def random_x(target: Target, *shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    return make_x(Case("", shape, dtype), target.device, seed)


def size_for(target: Target, large: tuple, small: tuple) -> tuple:
    return large if target.cuda else small


def assert_same(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Bitwise."""
    if torch.equal(got, want):
        return
    at = tuple((got != want).nonzero()[0].tolist())
    raise AssertionError(f"{name}{list(at)}: expected {want[at].item()!r}, got {got[at].item()!r} (must be the same bits)")


@behaviour("any")
def as_harnesses_make_it(target: Target) -> None:
    """made as harnesses make it: seed, get_init_inputs, .to(dtype), strict load."""
    torch.manual_seed(42)
    model = target.names["ModelNew"](*reference_model.get_init_inputs()).to(target.device)
    assert torch.equal(model.gamma, torch.ones_like(model.gamma)) and not model.beta.any()
    model.load_state_dict(reference_model.Model(*reference_model.get_init_inputs()).state_dict(), strict=True)
    for dtype in (F16, BF16, F32):
        half = copy.deepcopy(model).to(device=target.device, dtype=dtype)
        assert {t.dtype for t in half.state_dict().values()} == {dtype, torch.int64}
        x = random_x(target, 2, 64, 4, 4, dtype=dtype)
        for training in (True, False):
            check_form(x, half.train(training)(x).detach())


@behaviour("any")
def state_dict_spellings(target: Target) -> None:
    """state_dict in all three spellings, strictly."""
    theirs = make_pair(target, 3, F32)[1].state_dict()
    spellings = {
        "weight": theirs,
        "bn.weight": {f"bn.{k}": v for k, v in theirs.items()},
        "gamma": {{"weight": "gamma", "bias": "beta"}.get(k, k): v for k, v in theirs.items()},
    }
    for first_key, state in spellings.items():
        model = target.model(3)
        model.load_state_dict(state, strict=True)
        assert_same(f"gamma, from {first_key}", model.gamma.detach(), theirs["weight"])
        assert_same(f"beta, from {first_key}", model.beta.detach(), theirs["bias"])
        assert_same(f"running_var, from {first_key}", model.running_var, theirs["running_var"])
        without = {k: v for k, v in state.items() if k != first_key}
        assert_raises(RuntimeError, "gamma", lambda: model.load_state_dict(without, strict=True))
        assert_raises(RuntimeError, "stranger", lambda: model.load_state_dict({**state, "stranger": theirs["bias"]}, strict=True))
    again = target.model(3)
    again.load_state_dict(model.state_dict())
    assert_same("gamma, saved and loaded", again.gamma.detach(), model.gamma.detach())


@behaviour("any")
def forward_without_functional(target: Target) -> None:
    """forward with every torch.nn.functional call forbidden."""
    model, x = target.model(4), random_x(target, 2, 4, 6, 6)

    def forbidden(*args, **kwargs):
        raise AssertionError("torch.nn.functional was called in forward")

    with contextlib.ExitStack() as stack:
        for name in dir(torch.nn.functional):
            if callable(getattr(torch.nn.functional, name)) and not name.startswith("_") and name[0].islower():
                stack.enter_context(mock.patch.object(torch.nn.functional, name, forbidden))
        model(x)
        model.eval()(x)


@behaviour("any")
def repeatable(target: Target) -> None:
    """bitwise the same over 3 runs, with and without grad."""
    for large, small in (((16, 64, 256, 256), (3, 2, 24, 24)), ((32, 64, 56, 56), (3, 4, 8, 8)), ((9, 5, 31, 33), (3, 2, 7, 9)),
                         ((32, 256, 40, 40), (4, 8, 24, 24)), ((256, 2048, 7, 7), (12, 16, 7, 7))):
        x = random_x(target, *size_for(target, large, small))
        results = []
        for run in range(3):
            model = make_pair(target, x.shape[1], F32)[0]
            with torch.set_grad_enabled(run == 2):
                results.append((model(x).detach(), model.running_mean, model.running_var))
        for other in results[1:]:
            for name, got, want in zip(("y", "running_mean", "running_var"), other, results[0]):
                assert_same(name, got, want)


def make_gradients(x: torch.Tensor, dy: torch.Tensor, oracle: Oracle, training: bool) -> list[torch.Tensor]:
    """Gradients of x, gamma and beta in float64, for whole (small) tensors."""
    count, everything = x.numel() // x.shape[1], slice(None)
    dy = dy.double()
    x_hat = oracle.centred(x, everything) * per_channel(oracle.inv_std)
    d_gamma, d_beta = (dy * x_hat).sum((0, 2, 3)), dy.sum((0, 2, 3))
    through_statistics = per_channel(d_beta / count) + x_hat * per_channel(d_gamma / count) if training else 0
    return [per_channel(oracle.gamma * oracle.inv_std) * (dy - through_statistics), d_gamma, d_beta]


@behaviour("any")
def backward(target: Target) -> str:
    """backward against torch's, train and eval, every type."""
    worst = 0.0
    shape = size_for(target, (16, 24, 28, 28), (3, 4, 6, 6))
    types = [(F32, F32), (F64, F64), (F16, F32), (BF16, F32)]
    if target.cuda:  # PyTorch's CPU backward, which stands in on emulated devices, wants half-type statistics for these
        types += [(F16, F16), (BF16, BF16)]
    for (dtype, params), training in itertools.product(types, (True, False)):
        x, dy = random_x(target, *shape, dtype=dtype), random_x(target, *shape, dtype=dtype, seed=1) / 16  # sums that float16 holds
        ours, theirs = make_pair(target, x.shape[1], params, training)
        oracle = make_oracle(x, theirs)
        gradients = []
        for model in (ours, theirs):
            leaf = x.clone().requires_grad_()
            with torch.backends.cudnn.flags(enabled=False):  # ours calls PyTorch's own backward, not cuDNN's
                model(leaf).backward(dy)
            gradients.append([leaf.grad, *(p.grad for p in model.parameters())])
        wanted = make_gradients(x, dy, oracle, training)
        for name, got, their, want in zip(("x.grad", "gamma.grad", "beta.grad"), *gradients, wanted):
            assert got is not None and got.dtype == their.dtype, f"{name}: {their.dtype} expected, got {got if got is None else got.dtype}"
            label = f"{name} ({show_dtype(dtype)}, {'train' if training else 'eval'})"
            unit = want.abs().max().expand_as(want)
            worst = max(worst, judge(label, got, their, want, unit, own_error=oracle.own_error))
    return f"ours {worst:8.2f} u at most"


@behaviour("any")
def compiled(target: Target) -> None:
    """torch.compile(fullgraph=True), train, eval and backward."""
    x = random_x(target, *size_for(target, (8, 16, 28, 28), (2, 3, 6, 6)))
    for training in (True, False):
        torch._dynamo.reset()
        direct = make_pair(target, x.shape[1], F32, training)[0]
        graph = copy.deepcopy(direct)
        leaf, compiled_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = direct(leaf)
        # On the emulated device there is no code generator to try, only whether forward can be traced whole.
        y_compiled = torch.compile(graph, fullgraph=True, backend="inductor" if target.cuda else "aot_eager")(compiled_leaf)
        assert_same("y", y_compiled.detach(), y.detach())
        for (name, got), want in zip(graph.state_dict().items(), direct.state_dict().values()):
            assert_same(name, got, want)
        y.square().sum().backward()
        y_compiled.square().sum().backward()
        torch.testing.assert_close(compiled_leaf.grad, leaf.grad, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@behaviour("cuda")
def one_launch(target: Target) -> str:
    """one launch per training forward, nothing else on the stream."""
    def kernels(model, x) -> list[str]:
        model(x)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(x)
            torch.cuda.synchronize()
        return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]

    if len(kernels(nn.BatchNorm2d(8, device="cuda"), random_x(target, 4, 8, 16, 16))) < 2:
        raise Skip("the profiler sees no kernels on this machine")
    tried = 0
    try:
        for deterministic, (shape, dtype) in itertools.product((False, True), (
                ((16, 64, 256, 256), F32), ((32, 256, 56, 56), F32), ((32, 2048, 7, 7), F32), ((7, 33, 101, 99), BF16),
                ((128, 10, 1, 1), F32), ((2, 3, 512, 512), F16), ((8, 64, 512, 512), F32), ((2, 4, 8, 8), F64))):
            torch.use_deterministic_algorithms(deterministic)
            for settings in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
                with torch.no_grad():
                    seen = kernels(target.model(shape[1], **settings), random_x(target, *shape, dtype=dtype))
                tried += 1
                assert len(seen) == 1, (f"{show_shape(shape)} {show_dtype(dtype)} {settings}"
                                        f"{' deterministic' if deterministic else ''}: {len(seen)} on the stream: {seen}")
                assert "fused_batch_norm_forward_kernel" in seen[0], seen[0]
    finally:
        torch.use_deterministic_algorithms(False)
    return f"{tried} forwards, 1 kernel each"


@behaviour("cuda")
def memory_needed(target: Target) -> str:
    """memory: y and little else is allocated."""
    shape = (16, 64, 256, 256)
    model, x = target.model(64), random_x(target, *shape)
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = model(x)
    extra = torch.cuda.max_memory_allocated() - before - y.nbytes
    assert extra <= 4 << 20, f"{extra} bytes besides y's {y.nbytes}, expected at most {4 << 20}"
    return f"{extra / 1024:.0f} KB besides y's {y.nbytes / 2**20:.0f} MB"


@behaviour("cuda")
def poisoned_memory(target: Target) -> None:
    """output and scratch memory poisoned before the launch."""
    for shape in ((16, 64, 256, 256), (32, 256, 28, 28), (7, 33, 101, 99), (2, 3, 512, 512), (4, 5000, 6, 6), (8, 64, 512, 512),
                  (256, 2048, 7, 7)):
        x = random_x(target, *shape)
        clean = None
        for byte in (0x00, 0xFF, 0x01, 0x7F, None):  # NaN, flags that look set, counters that look full; None: what the last run left
            model = make_pair(target, shape[1], F32)[0]
            if byte is not None:
                torch.cuda.empty_cache()
                sizes = [x.nbytes] + [1 << k for k in range(9, 25)] * 2
                blocks = [torch.full((size,), byte, dtype=torch.uint8, device="cuda") for size in sizes]
                del blocks  # back to the allocator's cache, from where the forward takes its memory
            with torch.no_grad():
                results = [model(x), model.running_mean, model.running_var]
            clean = clean or results
            for name, got, want in zip(("y", "running_mean", "running_var"), results, clean):
                assert_same(f"{show_shape(shape)}, byte {byte}: {name}", got, want)


@behaviour("cuda")
def graph_replay(target: Target) -> str:
    """CUDA graph of 3 forwards, replayed 1,000 times, changed input."""
    shapes = ((4, 64, 56, 56), (2, 8, 256, 256), (128, 10, 1, 1))
    models = [make_pair(target, s[1], F32)[0] for s in shapes]
    xs = [random_x(target, *s) for s in shapes]
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for model, x in zip(models, xs):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = [model(x) for model, x in zip(models, xs)]
        for turn in range(3):
            for x, shape in zip(xs, shapes):
                x.copy_(random_x(target, *shape, seed=100 + turn))
            direct = [copy.deepcopy(model) for model in models]
            graph.replay()
            for y, model, x, replayed in zip(ys, direct, xs, models):
                assert_same("y", y, model(x))
                for name, buffer in model.named_buffers():
                    assert_same(name, getattr(replayed, name), buffer)
        first = [y.clone() for y in ys]
        for _ in range(1000):
            graph.replay()
        for y, want, model in zip(ys, first, models):
            assert_same("y after 1,000 replays", y, want)
            assert model.num_batches_tracked.item() == 1 + 3 + 1000, f"num_batches_tracked: {model.num_batches_tracked.item()}"
    return "3,000 forwards"


@behaviour("cuda")
def side_stream(target: Target) -> None:
    """a side stream: the launch waits for what is in front of it there."""
    model = make_pair(target, 16, F32)[0]
    late = random_x(target, 8, 16, 64, 64)
    x = torch.zeros_like(late)
    with torch.no_grad():
        want = copy.deepcopy(model)(late)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # ~10 ms: a launch on another stream would read the zeros
            x.copy_(late)
            y = model(x)
        stream.synchronize()
    assert_same("y", y, want)


@behaviour("cuda")
def two_streams(target: Target) -> str:
    """1,000 forwards on two streams at once."""
    shapes = ((16, 64, 64, 64), (2, 3, 512, 512))
    xs = [random_x(target, *s) for s in shapes]
    models = [make_pair(target, s[1], F32)[0] for s in shapes]
    streams = [torch.cuda.Stream() for _ in shapes]
    with torch.no_grad():
        want = [copy.deepcopy(model)(x) for model, x in zip(models, xs)]
        wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        for _ in range(500):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    wrong[i] += (models[i](xs[i]) != want[i]).sum()
        torch.cuda.synchronize()
    assert not wrong.any(), f"elements that differ, per stream: {wrong.tolist()}"
    return "same bits in all"


@behaviour("cuda")
def second_device(target: Target) -> None:
    """a second device, while the first is the current one."""
    if torch.cuda.device_count() < 2:
        raise Skip("this machine has one GPU")
    x = random_x(target, 8, 16, 64, 64)
    model = make_pair(target, 16, F32)[0]
    want = copy.deepcopy(model)(x).detach()
    got = model.to("cuda:1")(x.to("cuda:1")).detach()
    assert got.device == torch.device("cuda:1"), got.device
    assert_same("y", got.to(x.device), want)


# -------------------------------------------------------------------------------------------------- refusals


def assert_raises(kind: type[Exception], pattern: str, function: Callable) -> str:
    try:
        function()
    except Exception as error:
        assert isinstance(error, kind), f"expected {kind.__name__}, got {type(error).__name__}: {error}"
        message = str(error).strip()
        assert re.search(pattern, message), f"expected a message with “{pattern}”, got “{message.splitlines()[0] if message else ''}”"
        return message.splitlines()[0]
    raise AssertionError(f"expected {kind.__name__}, nothing was raised")


def call_bound(target: Target, x=None, gamma=None, beta=None, running_mean=None, running_var=None, batches=None, momentum=0.1):
    x = random_x(target, 2, 4, 3, 3) if x is None else x
    forward = target.names["_fused_batch_norm"].fused_batch_norm_forward
    return forward(x, gamma, beta, 1e-5, running_mean, running_var, batches, True, momentum)


def ones(target: Target, *shape, dtype=F32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype, device=target.device)


# name, the exception's type (as nn.BatchNorm2d's, where that has one), what the message must hold, the call
REFUSALS: list[tuple[str, type[Exception], str, Callable[[Target], object]]] = [
    ("x with 3 dimensions", ValueError, r"x must .*4-?D.*got", lambda t: t.model(4)(ones(t, 2, 4, 3))),
    ("x with 5 dimensions", ValueError, r"x must .*4-?D.*got", lambda t: t.model(4)(ones(t, 2, 4, 3, 3, 3))),
    ("x with another C", RuntimeError, r"must .*got", lambda t: t.model(4)(ones(t, 2, 5, 3, 3))),
    ("x with another C, eval", RuntimeError, r"must .*got", lambda t: t.model(4).eval()(ones(t, 2, 5, 3, 3))),
    ("x of an integer type", RuntimeError, r"x must .*got", lambda t: t.model(4)(ones(t, 2, 4, 3, 3, dtype=torch.int32))),
    ("x float16, parameters float64", RuntimeError, r"must .*got", lambda t: t.model(4, dtype=F64)(ones(t, 2, 4, 3, 3, dtype=F16))),
    ("x float32, parameters float16", RuntimeError, r"must .*got", lambda t: t.model(4, dtype=F16)(ones(t, 2, 4, 3, 3))),
    ("one value per channel in training", ValueError, r"more than 1 value|x must", lambda t: t.model(4)(ones(t, 1, 4, 1, 1))),
    ("gamma of another length", RuntimeError, r"gamma must .*got", lambda t: call_bound(t, gamma=ones(t, 5), beta=ones(t, 4))),
    ("beta of another length", RuntimeError, r"beta must .*got", lambda t: call_bound(t, gamma=ones(t, 4), beta=ones(t, 3))),
    ("running_mean of another type", RuntimeError, r"running_mean must .*got",
     lambda t: call_bound(t, running_mean=ones(t, 4, dtype=torch.int64), running_var=ones(t, 4))),
    ("running_var of another length", RuntimeError, r"running_var must .*got",
     lambda t: call_bound(t, running_mean=ones(t, 4), running_var=ones(t, 2))),
    ("num_batches_tracked of another type", RuntimeError, r"num_batches_tracked must .*got",
     lambda t: call_bound(t, running_mean=ones(t, 4), running_var=ones(t, 4), batches=ones(t, 1))),
]
CUDA_REFUSALS = [
    ("x on the CPU", RuntimeError, r"x must .*got", lambda t: t.model(4)(torch.ones(2, 4, 3, 3))),
    ("gamma on the CPU", RuntimeError, r"gamma must .*got", lambda t: call_bound(t, gamma=torch.ones(4), beta=torch.ones(4))),
]


# ------------------------------------------------------------------------------------- paste-ability and the text
# What kernel benchmark harnesses do with the text of model_new.py, and what they refuse to find in it.

HARNESS_LINES = "import os\nos.environ[\"TORCH_EXTENSIONS_DIR\"] = {!r}\n"
RESERVED_NAMES = {"Model", "batch_size", "features", "dim1", "dim2", "get_inputs", "get_init_inputs"}

REFUSED_PATTERNS = {  # over the text without `#…` and `//…` tails, as KernelBench's strict check reads it
    "the word pass": r"\bpass\b", "try:": r"\btry\s*:", "except": r"\bexcept\b\s*(:|\w)",
    "threads or processes": r"\bthreading\b|\bmultiprocessing\b|\bconcurrent\.futures\b",
    "patched timers": r"(torch\.cuda\.Event|torch\.cuda\.synchronize|time\.time|time\.perf_counter)\s*=(?!=)",
    "_make_subclass": r"_make_subclass", "a subclass of torch.Tensor": r"class\s+\w+\s*\([^)]*\btorch\.Tensor\b",
    "torch.nn.functional": r"torch\.nn\.functional|\bnn\.functional|\bF\.\w+", "torch.batch_norm": r"torch\.(native_)?batch_norm\b",
    "torch compute calls": r"torch\.(mean|var|std|sum|sqrt|rsqrt|add|mul|matmul|addcmul|var_mean|native_batch_norm)\s*\(",
    "a torch layer": r"\bnn\.(BatchNorm|Conv|Linear|LayerNorm|GroupNorm|InstanceNorm|SyncBatchNorm)\w*",
    "streams": r"torch\.cuda\.Stream\s*\(|with\s+torch\.cuda\.stream",
    "half casts": r"__float2half\s*\(|static_cast<\s*half\s*>|\.half\s*\(|\.to\(\s*torch\.float16",
    "input(": r"input\s*\(", "sleep": r"time\.sleep\s*\(", "while True": r"while\s+True\s*:",
    "a future import": r"from\s+__future__", "a fixed operator namespace": r"TORCH_LIBRARY(_FRAGMENT)?\s*\(\s*(?!TORCH_EXTENSION_NAME)",
    "__file__": r"\b__file__\b", "inspect or pickle": r"\binspect\.|\bpickle\b",
}
REQUIRED_PATTERNS = {"__global__": r"__global__", "load_inline": r"load_inline"}


def scan_text(text: str) -> str:
    """text: free of what harnesses refuse to find."""
    lines = [re.sub(r"(#|//).*", "", line) for line in text.splitlines()]
    for name, pattern in REFUSED_PATTERNS.items():
        for number, line in enumerate(lines, 1):
            assert not re.search(pattern, line), f"model_new.py:{number}: {name}: {line.strip()}"
    for name, pattern in REQUIRED_PATTERNS.items():
        assert re.search(pattern, text), f"model_new.py: no {name}"
    return f"{len(REFUSED_PATTERNS)} patterns, {len(lines)} lines"


def execute(*texts: str) -> dict:
    """As harnesses do: no __file__, __name__ is "builtins", everything in one dict."""
    names: dict = {}
    for text in texts:
        exec(compile(text, "<string>", "exec"), names)
    return names


def use_pasted(names: dict) -> None:
    """Makes ModelNew as a harness would; on a GPU runs it once against torch, without one sees what forward says."""
    model = names["ModelNew"](64)
    x = torch.rand(2, 64, 4, 4)
    if torch.cuda.is_available():
        y = model.cuda()(x.cuda()).detach().cpu()
        torch.testing.assert_close(y, nn.BatchNorm2d(64)(x).detach(), rtol=1e-4, atol=1e-4)
    else:
        assert_raises(RuntimeError, r"CUDA", lambda: model(x))


def check_pasting(report: Report, text: str) -> None:
    reference = (ROOT / "reference_model.py").read_text()

    def reserved_names() -> None:
        names = set(execute(text)) & RESERVED_NAMES
        assert not names, f"module-level {sorted(names)}: would replace the reference's"

    def behind_two_lines() -> None:
        with mock.patch.dict(os.environ):
            use_pasted(execute(HARNESS_LINES.format(default_build_directory()) + text))

    def both(first: str, second: str) -> None:
        names = execute(first, second)
        use_pasted(names)
        assert names["Model"](*names["get_init_inputs"]()).bn.num_features == names["features"] == 64

    def again() -> str:
        start = time.perf_counter()
        for _ in range(5):
            use_pasted(execute(text))
        return f"{(time.perf_counter() - start) / 5:.2f} s each"

    report.run("text: free of what harnesses refuse to find", lambda: scan_text(text))
    report.run("text: no name that a reference uses", reserved_names)
    report.run("executed without __file__ or module", lambda: use_pasted(execute(text)))
    report.run("executed behind two lines that set the build directory", behind_two_lines)
    report.run("in one dict with the reference, reference first", lambda: both(reference, text))
    report.run("in one dict with the reference, reference last", lambda: both(text, reference))
    report.run("executed 5 times more in one process", again)
    for name, pretended, pattern in PRETENDED:
        report.run(name, lambda: says(text, pretended, pattern))
    check_environments(report)


def default_build_directory() -> str:
    return cpp_extension._get_build_directory("fused_batch_norm", verbose=False).rsplit(os.sep, 1)[0]


# A Python of its own each: (name, environment, statements before the text is executed, what to do with the names). All start at once.
USE = "check.use_pasted(check.execute(text))"
SAY = """
try:
    y = check.execute(text)["ModelNew"](4)(torch.ones(2, 4, 3, 3, device="cuda" if torch.cuda.is_available() else "cpu"))
    print("said: nothing")
except Exception as error:
    print("said:", type(error).__name__, " ".join(str(error).split()))
"""
ENVIRONMENTS = [
    ("cold build in a new directory", "gpu", {}, USE, ""),
    ("TORCH_CUDA_ARCH_LIST=Ada, then again from another directory", "gpu", {"TORCH_CUDA_ARCH_LIST": "Ada"},
     USE + "\nos.environ['TORCH_EXTENSIONS_DIR'] += '/second'\n" + USE, ""),
    ("a node without GPU, TORCH_CUDA_ARCH_LIST=9.0, compiles", "gpu", {"CUDA_VISIBLE_DEVICES": "", "TORCH_CUDA_ARCH_LIST": "9.0"}, SAY, r"CUDA"),
    ("a node without GPU or TORCH_CUDA_ARCH_LIST says so", "any", {"CUDA_VISIBLE_DEVICES": ""},
     "torch.version.cuda, check.cpp_extension.CUDA_HOME = '13.0', '/usr/local/cuda'" + SAY, r"TORCH_CUDA_ARCH_LIST"),
]

# (name, what is pretended while the text is executed, what forward then says)
PRETENDED = [
    ("a machine without nvcc says so", ((torch.version, "cuda", "13.0"), (cpp_extension, "CUDA_HOME", None)), r"nvcc"),
    ("a torch without CUDA says so", ((torch.version, "cuda", None),), r"CUDA"),
    ("a torch older than 2.9 is refused, and says so", ((torch, "__version__", type(torch.__version__)("2.8.0")),), r"2\.9"),
]


def says(text: str, pretended: tuple, pattern: str) -> str:
    with contextlib.ExitStack() as while_executed:
        for owner, name, value in pretended:
            while_executed.enter_context(mock.patch.object(owner, name, value))
        names = execute(text)
    return assert_raises(RuntimeError, pattern, lambda: names["ModelNew"](4)(torch.ones(2, 4, 3, 3)))


def check_environments(report: Report) -> None:
    """Imports in fresh processes, each with its own build directory and environment."""
    with tempfile.TemporaryDirectory() as scratch:
        started = []
        for number, (name, where, environment, code, pattern) in enumerate(ENVIRONMENTS):
            if not report.wants(name):
                continue
            if where == "gpu" and not torch.cuda.is_available():
                report.add(name, "skip", "no CUDA device")
                continue
            program = (f"import sys, os, time; sys.path.insert(0, {str(ROOT)!r}); import torch, check\n"
                       f"text = check.TEXT_PATH.read_text(); start = time.perf_counter()\n{code}\n"
                       "print('seconds:', round(time.perf_counter() - start, 1))")
            settings = {**os.environ, "TORCH_EXTENSIONS_DIR": f"{scratch}/{number}", **environment}
            for key in ("TORCH_CUDA_ARCH_LIST",) if not environment.get("TORCH_CUDA_ARCH_LIST") else ():
                settings.pop(key, None)
            started.append((name, pattern, subprocess.Popen([sys.executable, "-c", program], env=settings, text=True,
                                                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
        for name, pattern, process in started:
            report.run(name, lambda: judge_environment(process, pattern))


def judge_environment(process: subprocess.Popen, pattern: str) -> str:
    try:
        printed, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    lines = printed.strip().splitlines() or ["nothing was printed"]
    assert process.returncode == 0, f"exit status {process.returncode}: {lines[-1]}"
    said = next((line for line in lines if line.startswith("said: ")), "")
    assert re.search(pattern, said), f"expected a message with “{pattern}”, {said}"
    return f"{lines[-1].removeprefix('seconds: ')} s  {said.removeprefix('said: ')[:140]}"


# -------------------------------------------------------------------------------------------------- compilation

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def build_arguments(text: str) -> dict:
    """What the text would hand to load_inline, also where torch has no CUDA."""
    with (mock.patch("torch.utils.cpp_extension.load_inline") as load_inline, mock.patch("torch.version.cuda", "13.0"),
          mock.patch("torch.utils.cpp_extension.CUDA_HOME", "/usr/local/cuda"), mock.patch.dict(os.environ, TORCH_CUDA_ARCH_LIST="9.0")):
        execute(text)
    return load_inline.call_args.kwargs


def families_of(architectures: list[int], cuda: str) -> list[list[int]]:
    """Groups neighbours for which the text, and nvcc, make the same PTX: one compilation serves them all."""
    borders = {int(number) // 10 for number in re.findall(r"__CUDA_ARCH__ *[<>=!]+ *(\d+)", cuda)} | {100}  # where nvcc 13 has another code generator
    return [list(family) for _, family in itertools.groupby(architectures, lambda a: sum(border <= a for border in borders))]


def compile_for(family: list[int], nvcc: str, source: Path, flags: list[str]) -> dict[int, str]:
    """Compiles the CUDA text once for a family, at low priority; what ptxas says of each of its architectures."""
    targets = [f"-gencode=arch=compute_{family[0]},code=sm_{a}" for a in family]
    command = ["nice", nvcc, *flags, "-Xptxas", "-v", *targets, "-fatbin", "-o", str(source.with_suffix(f".{family[0]}")), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (re.findall(r".*error.*", done.stderr) or [done.stderr[-300:]])[0]
    kernels = re.split(r"^ptxas info\s*: Compiling entry function", done.stderr, flags=re.M)[1:]
    return {a: "".join(kernel for kernel in kernels if f"for 'sm_{a}'" in kernel) for a in family}


def registers_and_spills(said: str) -> str:
    """Of the kernels of one architecture, from what compile_for returns."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)] or [0]
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
    assert min(registers) >= 24, f"a kernel of {min(registers)} registers: compiled away, or down to a trap"
    assert spills == 0, f"{spills} bytes of registers spilled ({len(registers)} kernels, up to {max(registers)} registers)"
    return f"{len(registers)} kernels, up to {max(registers)} registers, no spills"


@contextlib.contextmanager
def compiling(report: Report, arguments: dict) -> Iterator[Callable[[int], str]]:
    """Compiles the CUDA text while other checks run; yields what waits for an architecture's result and judges it."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout if Path(nvcc).exists() else ""
    wanted = [a for a in ARCHITECTURES if report.wants(f"sm_{a}") and f"sm_{a}" in known]
    cuda = "\n".join(arguments["cuda_sources"])
    # torch's flags and the text's own, less those that choose an architecture
    flags = ["-std=c++17", *cpp_extension.COMMON_NVCC_FLAGS, *(f for f in arguments["extra_cuda_cflags"] if "arch" not in f)]
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        source = Path(scratch) / "fused_batch_norm.cu"
        source.write_text(cuda)
        started = {}
        for family in sorted(families_of(wanted, cuda), key=len, reverse=True):
            started |= dict.fromkeys(family, threads.submit(compile_for, family, nvcc, source, flags))

        def judge(a: int) -> str:
            if a not in started:
                raise Skip("this nvcc is too old for it" if known else "no nvcc")
            return registers_and_spills(started[a].result()[a])

        yield judge


def check_compilation(report: Report, judge: Callable[[int], str]) -> None:
    for a in ARCHITECTURES:
        report.run(f"sm_{a}", lambda: judge(a))


# -------------------------------------------------------------------------------------------------- speed

SPIN_CYCLES = 500_000  # ~250 µs of an idle GPU in front of each timed call, in which Python gets ahead: only GPU time is measured
WARM_UP = 5
BUDGET_US = 600_000  # GPU time spent on one row, roughly


@dataclass
class Speed:
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    bar: float | None
    us: dict[str, list[float]]  # per contender every run's time, sorted

    def at(self, name: str, share: float = 0.5) -> float:
        times = self.us.get(name)  # none: it failed
        return times[round(share * (len(times) - 1))] if times else math.nan

    @property
    def tb_s(self) -> float:
        """What the operation needs, x read once and y written once, per second."""
        return 2 * math.prod(self.shape) * self.dtype.itemsize / self.at("ours") / 1e6

    def of_copy(self, name: str = "ours") -> float:
        return self.at("copy") / self.at(name)

    def verdict(self) -> str:
        missed = [f"bar {self.bar:.2f}"] if self.bar and self.of_copy() < self.bar else []
        missed += [peer for peer in ("eager", "compile") if self.at("ours") > self.at(peer)]
        return "below " + ", ".join(missed) if missed else "met"

    def cells(self) -> list[str]:
        ours = f"{self.at('ours'):.1f} ({self.at('ours', 0.1):.1f}–{self.at('ours', 0.9):.1f})"
        return [show_shape(self.shape), show_dtype(self.dtype), *(shown(self.at(n), ".1f") for n in ("copy", "eager", "compile")), ours,
                f"{self.tb_s:.2f}", f"{100 * self.of_copy():.0f} %", shown(self.at("eager") / self.at("ours"), ".2f"),
                shown(self.at("compile") / self.at("ours"), ".2f"), shown(self.bar or math.nan, ".2f"), self.verdict()]


def shown(number: float, form: str) -> str:
    return "–" if math.isnan(number) else format(number, form)


SPEED_COLUMNS = ["shape", "type", "copy µs", "eager µs", "compile µs", "ours µs (p10–p90)", "TB/s", "of copy", "× eager", "× compile", "bar", ""]


def flush_bytes() -> int:
    """Four times what L2 holds."""
    return 4 * torch.cuda.get_device_properties(0).L2_cache_size


def copies_of_x(shape, dtype: torch.dtype) -> list[torch.Tensor]:
    """So many different x that L2 holds nothing of one when its turn comes again."""
    nbytes = math.prod(shape) * dtype.itemsize
    wanted = max(3, math.ceil(flush_bytes() / nbytes))
    room = int(0.6 * torch.cuda.mem_get_info()[0] / nbytes) - 2  # beside them: the copy's y, and a result
    if room < 1:
        raise Skip(f"needs {5 * nbytes / 1e9:.0f} GB of GPU memory")
    return [torch.rand(shape, device="cuda", dtype=dtype) for _ in range(min(wanted, room))]


def take_turns(contenders: dict[str, Callable], xs: list[torch.Tensor]) -> dict[str, list[float]]:
    """GPU time of every call in µs, sorted, per contender.

    As benchmark harnesses do, each call comes behind a write that fills L2: else it would have to write back what the contender
    before it has left there, another amount for each. Some of that outlives the write, so the order is random.
    """
    flush = torch.empty(flush_bytes(), device="cuda", dtype=torch.uint8)
    once_us = sum(timed(contender, xs[0]) for contender in contenders.values())
    events: dict[str, list] = {name: [] for name in contenders}
    turn, order = itertools.count(), random.Random(0)
    for _ in range(WARM_UP + max(20, min(100, int(BUDGET_US / once_us)))):
        for name, contender in order.sample(list(contenders.items()), len(contenders)):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(SPIN_CYCLES)
            start.record()
            contender(xs[next(turn) % len(xs)])
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: sorted(1000 * start.elapsed_time(stop) for start, stop in pairs[WARM_UP:]) for name, pairs in events.items()}


@torch.no_grad()
def measure(shape, dtype: torch.dtype, bar: float | None, target: Target, peers: bool = True) -> Speed:
    """Times copy, eager and compile (the peers), and ours in turn, each call on another copy of x, so that L2 never holds what is read."""
    xs = copies_of_x(shape, dtype)
    contenders = {"copy": torch.empty_like(xs[0]).copy_}
    if peers:
        eager = nn.BatchNorm2d(shape[1]).to("cuda", dtype)
        torch._dynamo.reset()
        for name, peer in {"eager": eager, "compile": torch.compile(copy.deepcopy(eager), dynamic=False)}.items():
            try:
                peer(xs[0])
                contenders[name] = peer
            except Exception as error:
                print(f"       {name} of {show_shape(shape)} failed: {described(error)}")
    contenders["ours"] = target.model(shape[1]).to("cuda", dtype)
    contenders["ours"](xs[0])
    return Speed(shape, dtype, bar, take_turns(contenders, xs))


def timed(function: Callable, x: torch.Tensor) -> float:
    """µs of one call, host time included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function(x)
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start)


def host_us(target: Target) -> dict[str, float]:
    """Host time of one training forward of 128×10×1×1, where Python and the launch are all there is."""
    x = torch.rand(128, 10, 1, 1, device="cuda")
    models = {"ours": target.model(10), "eager": nn.BatchNorm2d(10, device="cuda")}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _, (name, model) in itertools.product(range(11), models.items()):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(300):
                model(x)
            torch.cuda.synchronize()
            times[name].append(1e6 * (time.perf_counter() - start) / 300)
    return {name: sorted(t)[5] for name, t in times.items()}


def measure_all(report: Report, target: Target, rows, line: Callable[[list[str]], str], peers: bool = True) -> list[Speed]:
    """Times the rows (shape, type, bar) and prints line(cells) of each."""
    print(line(SPEED_COLUMNS))
    speeds = []
    for shape, dtype, bar in rows:
        torch.cuda.empty_cache()
        try:
            speeds.append(measure(shape, dtype, bar, target, peers))
            print(line(speeds[-1].cells()), flush=True)
        except Skip as reason:
            report.add(f"speed {show_shape(shape)} {show_dtype(dtype)}", "skip", str(reason))
        except Exception as error:
            report.add(f"speed {show_shape(shape)} {show_dtype(dtype)}", "FAIL", described(error))
    return speeds


def check_speed(report: Report, target: Target, rows) -> tuple[list[Speed], dict[str, float]]:
    widths = [15, 9, 8, 9, 10, 24, 5, 7, 7, 9, 5, 8]
    speeds = measure_all(report, target, rows, lambda cells: "  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths)))
    host = host_us(target)
    met = sum(s.verdict() == "met" for s in speeds)
    print(f"  {met} of {len(speeds)} rows meet their bar. TB/s counts x read and y written once each.")
    print(f"  whole call of 128×10×1×1, Python included: ours {host['ours']:.1f} µs, eager {host['eager']:.1f} µs")
    return speeds, host


# ------------------------------------------------------------------------------------------------ the sm_80 path
# What GPUs without bulk copies and clusters run, on a GPU that has both.

STRUCTURES = ("resident", "packed", "ring", "hold")
SM_80_CASES = ("small channels", "few channels", "plane 7x7", "plane 7x7, few large channels", "large channels",
               "middle channels, more than multiprocessors", "very large channels, odd plane", "unaligned by one element",
               "cumulative average, odd plane", "eval, large")
SM_80_SPEED_CASES = [((16, 64, 256, 256), F32, None), ((32, 512, 28, 28), F32, None), ((64, 64, 512, 512), F32, None)]


def sm_80_text(text: str) -> str:
    """The text with its kernel compiled as far as PTX of compute capability 8.0 only, in a build directory of its own."""
    for old, new in ((r'\[f"-gencode=.*?\]', '["-gencode=arch=compute_80,code=compute_80"]'),
                     (r'name="fused_batch_norm"', 'name="fused_batch_norm_sm_80"')):
        text, found = re.subn(old, new, text)
        assert found == 1, f"model_new.py has {old} {found} times, expected once"
    return text


def sm_80_cells(cells: list[str]) -> list[str]:
    """Shape, type, copy, ours and share of the copy, of a row of the speed table."""
    return [cells[i] for i in (0, 1, 2, 5, 7)]


def check_sm_80_case(target: Target, case: Case) -> str:
    plan = target.plan(case.shape, case.dtype, case.training, dict(case.settings).get("momentum", 0.1))
    assert not plan["bulk"] and (plan["team"] == 1 or plan["cooperative"] or not case.training), f"not compiled for 8.0: {plan}"
    return f"{check_case(target, case)}   {STRUCTURES[plan['structure']]}"


def check_sm_80(report: Report, text: str) -> list[Speed]:
    print("  compiling the kernel, some 30 s the first time …", flush=True)
    target = Target(execute(sm_80_text(text)), "cuda")
    try:
        target.plan((2, 4, 3, 3), F32)
    except RuntimeError as error:
        if "toolchain" in str(error):
            raise Skip("the driver is too old to compile the PTX of this nvcc")
        raise
    for case in CASES:
        if case.name in SM_80_CASES:
            report.run(f"sm_80 path: {case_name(case)}", lambda: check_sm_80_case(target, case))
            torch.cuda.empty_cache()
    widths = [15, 9, 8, 24, 7]
    line = lambda cells: "  sm_80 path  " + "  ".join(f"{c:>{w}}" for c, w in zip(sm_80_cells(cells), widths))
    return measure_all(report, target, SM_80_SPEED_CASES, line, peers=False)


# ------------------------------------------------------------------------------------------------------ the plan


def plan_comments(text: str) -> dict[str, str]:
    """What the kernel's text says of each field of its struct Plan."""
    struct = re.search(r"struct Plan \{(.*?)\n\};", text, re.S)
    lines = re.findall(r"^\s*\w+ ([^;/]+);\s*//\s*(.*)$", struct[1] if struct else "", re.M)
    return {name.strip(): comment for names, comment in lines for name in names.split(",")}


def show_plan(target: Target, shape, dtype: torch.dtype) -> None:
    """The launch plan of one shape, the bytes it needs and, on a GPU, how long a copy of as many takes."""
    plan = target.plan(shape, dtype)
    print(f"plan of {show_shape(shape)} {show_dtype(dtype)}")
    reasons = plan_comments(target.names["FUSED_BATCH_NORM_CUDA"])
    for key, value in plan.items():
        print(f"  {key:32} {value:<16,} {reasons.get(key, '')}".rstrip())
    nbytes = math.prod(shape) * dtype.itemsize
    again = nbytes * plan["streamed"] // plan["tiles"]
    print(f"  {'bytes needed: x read, y written':32} {2 * nbytes:,}")
    print(f"  {'bytes expected to travel':32} {2 * nbytes + again:,}  ({again / nbytes:.0%} of x is read again, from L2 as far as it is there)")
    if target.cuda:
        xs = copies_of_x(shape, dtype)
        us = take_turns({"copy": torch.empty_like(xs[0]).copy_}, xs)["copy"]
        us = us[len(us) // 2]
        print(f"  {'floor: a copy takes, µs':32} {us:,.1f}  ({2 * nbytes / us / 1e6:.2f} TB/s)")


# -------------------------------------------------------------------------------------------------- emulated devices

# multiprocessors, shared memory of a block in bytes, compute capability: so small that tiny tensors walk every path of the plan.
DEVICES = [(3, 16 << 10, (9, 0)), (1, 48 << 10, (7, 5)), (7, 99 << 10, (8, 6)), (2, 227 << 10, (10, 0)), (5, 32 << 10, (8, 0)),
           (1, 163 << 10, (8, 0)), (40, 16 << 10, (9, 0))]
RANDOM_CASES = 20  # in one check


def load_emulator():
    """The module .ci/emulator/emulate.py; Skip where it or a C++ compiler is missing."""
    if not (EMULATOR / "emulate.py").exists():
        raise Skip("no .ci/emulator")
    if not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")):
        raise Skip("no C++ compiler")
    if str(EMULATOR) not in sys.path:
        sys.path.insert(0, str(EMULATOR))
    import emulate
    return emulate


worker_target: Target | None = None


def start_worker() -> None:
    """Each worker process loads the kernel once; the build is cached by the emulator."""
    global worker_target
    torch.set_num_threads(1)
    emulator = load_emulator()
    worker_target = Target(emulator.load(TEXT_PATH.read_text()), "cpu", emulator)


def emulated_task(kind: str, index: int, seed: int | None) -> tuple[str, str, dict[str, int]]:
    """Runs one check in a worker; checks are known by their place in the tables, which any process can look up.

    Returns its status and detail, and how many cases took each branch of the plan."""
    emulator, taken = worker_target.emulator, {}
    emulator.set_device(*DEVICES[0])
    emulator.set_schedule(index if seed is None else seed)
    if kind == "case":
        function = lambda: check_on_devices(CASES[index], index, seed, taken)
    elif kind == "behaviour":
        function = lambda: BEHAVIOURS[index][2](worker_target)
    elif kind == "refusal":
        _, expected, pattern, call = REFUSALS[index]
        function = lambda: assert_raises(expected, pattern, lambda: call(worker_target))
    else:
        function = lambda: check_random(emulator, seed, index, taken)
    return *outcome(function), taken


def check_on_devices(case: Case, index: int, seed: int | None, taken: dict[str, int]) -> str:
    """The case on every pretended device, each under another schedule."""
    import fuzz

    case = small_case(case)
    options = {"momentum": 0.1, "affine": True, "track_running_stats": True, **dict(case.settings)}
    for number, device in enumerate(DEVICES):
        schedule = index + number if seed is None else seed
        worker_target.emulator.set_device(*device)
        worker_target.emulator.set_schedule(schedule)
        try:
            detail = check_case(worker_target, case)
        except Exception as error:
            multiprocessors, shared_bytes, (major, minor) = device
            raise AssertionError(f"{multiprocessors} multiprocessors, {shared_bytes >> 10} KB, sm_{major}{minor}, "
                                 f"--seed {schedule}: {described(error)}")
        named = fuzz.Case(
            seed=schedule, multiprocessors=device[0], shared_bytes=device[1], capability=device[2], shape=case.shape, dtype=case.dtype,
            parameter_dtype=case.params or case.dtype, layout=case.layout, values=case.data, training=case.training, steps=case.steps, options=options)
        for branch in fuzz.branches(worker_target.names, named):
            taken[branch] = taken.get(branch, 0) + 1
    return detail


def check_random(emulator, first_seed: int, count: int, taken: dict[str, int]) -> str:
    passed, failed, lines = emulator.fuzz(first_seed, count, lambda line: None, taken)
    assert not failed, f"{failed} of {count} failed: " + " | ".join(" ".join(line.split())[:300] for line in lines)
    return f"{passed} cases"


def small_case(case: Case) -> Case:
    return case if case.small == "same" else replace(case, shape=case.small)


def emulated_tasks(seeds: int, seed: int | None) -> list[tuple[str, tuple]]:
    """(name, arguments of emulated_task) of every check."""
    tasks = [(case_name(small_case(case)), ("case", i, seed)) for i, case in enumerate(CASES) if case.small is not None]
    tasks += [(name, ("behaviour", i, seed)) for i, (name, where, _) in enumerate(BEHAVIOURS) if where == "any"]
    tasks += [(f"refused: {name}", ("refusal", i, seed)) for i, (name, *_) in enumerate(REFUSALS)]
    return tasks + [(name, ("random", len(chunk), chunk[0])) for name, chunk in seed_chunks(seeds, seed)]


worker = threading.local()  # a thread's own worker process


def in_worker(*task) -> tuple[str, str, dict[str, int]]:
    """emulated_task in this thread's worker process. One that dies or hangs fails this check only; the next gets a new one."""
    if not hasattr(worker, "pool"):
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["torch"])  # once for all workers, since that takes a second
        worker.pool = concurrent.futures.ProcessPoolExecutor(1, server, start_worker)
    try:
        return worker.pool.submit(emulated_task, *task).result(TIME_LIMIT_S)
    except (concurrent.futures.BrokenExecutor, concurrent.futures.TimeoutError) as error:
        for process in (worker.pool._processes or {}).values():
            process.kill()
        del worker.pool
        return "FAIL", f"the process that ran it died or hung: {type(error).__name__}", {}


def check_branches(taken: collections.Counter[str]) -> str:
    """Prints how many cases took each branch."""
    import fuzz

    for branch, count in sorted(taken.items()):
        print(f"       {count:6,} cases: {branch}")
    missing = [branch for branch in fuzz.BRANCHES if not taken[branch]]
    assert not missing, f"taken by no case: {', '.join(missing)}"
    return f"{len(fuzz.BRANCHES)} branches"


def check_emulated(report: Report, seeds: int, seed: int | None) -> None:
    """The correctness table, the behaviour that needs no GPU, and the refusals, on emulated devices, in two processes or more."""
    taken: collections.Counter[str] = collections.Counter()
    tasks = [t for t in emulated_tasks(seeds, seed) if report.wants(t[0])]
    try:
        print("  building the emulated kernel …", flush=True)
        start = time.perf_counter()
        start_worker()
        print(f"  built in {time.perf_counter() - start:.1f} s", flush=True)
    except Skip as reason:
        for name, _ in tasks:
            report.add(name, "skip", str(reason))
        return
    except Exception as error:
        report.add("the emulated kernel is built", "FAIL", described(error))
        return
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for (name, _), (status, detail, branches) in zip(tasks, threads.map(lambda task: in_worker(*task[1]), tasks)):
            report.add(name, status, detail)
            taken.update(branches)
    if seed is None and not report.only:  # else too few cases
        report.run("every branch of the plan was taken", lambda: check_branches(taken))
    for name, where, _ in BEHAVIOURS:
        if where == "cuda" and report.wants(name):
            report.add(name, "skip", "needs a GPU")


def check_mutants(report: Report) -> None:
    load_emulator()
    import mutants

    caught, _, survivors = mutants.run(lambda line: print(f"       {line}", flush=True))
    for survivor in survivors:
        report.add("mutant not caught", "FAIL", survivor)
    report.add("mutants caught", "ok" if caught else "FAIL", str(caught))


# -------------------------------------------------------------------------------------------------- README.md

BAR_WIDTH = 40


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def chart(speeds: list[Speed]) -> str:
    """Text bars: each contender's speed as a share of the copy's."""
    lines = []
    for speed in speeds:
        for name in ("ours", "compile", "eager"):
            share = speed.of_copy(name)
            label = f"{show_shape(speed.shape)} {show_dtype(speed.dtype)}" if name == "ours" else ""
            filled = 0 if math.isnan(share) else min(BAR_WIDTH, round(BAR_WIDTH * share))
            lines.append(f"{label:26} {name:8}{'█' * filled}{'░' * (BAR_WIDTH - filled)} {shown(100 * share, '3.0f'):>3} %")
    return "```text\n" + "\n".join(lines) + "\n```"


def write_readme(report: Report, speeds: list[Speed], host: dict[str, float], sm_80: list[Speed] | None, machine: str) -> None:
    """Replaces what stands between `<!-- check.py: NAME -->` and `<!-- end -->` in README.md."""
    measured = [(name, re.match(r"ours +(\S+) u +torch +(.*)", detail)) for name, status, detail in report.rows
                if status == "ok" and not name.startswith("sm_80 path")]
    contents = {
        "machine": f"Measured on {machine} by `python check.py --readme`: {report.closing_line()}.",
        "speed": markdown_table(SPEED_COLUMNS[:-1], [s.cells()[:-1] for s in speeds]),
        "host": f"The whole call of 128×10×1×1, Python included: ours {host['ours']:.1f} µs, eager {host['eager']:.1f} µs.",
        "chart": chart(speeds),
        "accuracy": markdown_table(["case", "our error, u", "torch's, u"], [[name, m[1], m[2].removesuffix(" u")] for name, m in measured if m]),
    }
    if sm_80:
        contents["sm_80"] = markdown_table(sm_80_cells(SPEED_COLUMNS), [sm_80_cells(s.cells()) for s in sm_80])
    path = ROOT / "README.md"
    readme = path.read_text()
    for name, content in contents.items():
        pattern = rf"(<!-- check\.py: {name} -->\n).*?(<!-- end -->)"
        readme, found = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", readme, flags=re.S)
        if not found:
            print(f"README.md has no “<!-- check.py: {name} -->”")
    path.write_text(readme)
    print("README.md: tables and chart written")


# -------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = lambda text: tuple(int(n) for n in re.split("[x×,]", text))
    parser.add_argument("--quick", action="store_true", help="leave the speed table out")
    parser.add_argument("--readme", action="store_true", help="write the measured tables and the chart into README.md")
    parser.add_argument("--shape", type=shape, metavar="NxCxHxW", help="check and time this shape only")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="x's type for --shape and --plan")
    parser.add_argument("--plan", type=shape, metavar="NxCxHxW", help="print the launch plan of this shape")
    parser.add_argument("--only", default="", metavar="TEXT", help="only checks whose name contains TEXT")
    parser.add_argument("--emulate", action="store_true", help="execute the kernel's text on the CPU even if there is a GPU")
    parser.add_argument("--seeds", type=int, default=100, metavar="N", help="random cases, and schedules of emulated devices (default 100)")
    parser.add_argument("--seed", type=int, metavar="S", help="repeat one: the random case, and the schedule of every emulated case")
    parser.add_argument("--mutants", action="store_true", help="check that wrong kernels are caught")
    arguments = parser.parse_args()
    for given in (arguments.shape, arguments.plan):
        if given and len(given) != 4:
            parser.error("a shape is four sizes: NxCxHxW")
    if (arguments.shape or arguments.readme) and not torch.cuda.is_available():
        parser.error("--shape and --readme need a CUDA device")
    return arguments


def load_on_gpu(text: str) -> Target:
    """Executes model_new.py's text; says how long the build took, and whether it was one."""
    built = any(Path(default_build_directory()).glob("fused_batch_norm*/*.so"))
    print("model_new.py: " + ("loading the kernel" if built else "compiling the kernel, about 10 s …"), flush=True)
    start = time.perf_counter()
    names = execute(text)
    print(f"model_new.py: {'loaded' if built else 'cold build'} in {time.perf_counter() - start:.1f} s", flush=True)
    return Target(names, "cuda")


def gpu_name() -> str:
    p = torch.cuda.get_device_properties(0)
    return (f"{p.name} (sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, {p.total_memory / 1e9:.0f} GB), "
            f"torch {torch.__version__}, CUDA {torch.version.cuda}")


def check_cases(report: Report, target: Target, cases: list[Case], seeds: int, seed: int | None) -> None:
    for case in cases:
        report.run(case_name(case), lambda: check_case(target, case))
        torch.cuda.empty_cache()
    for name, chunk in seed_chunks(seeds, seed):
        report.run(name, lambda: check_random_cases(target, chunk))


def check_random_cases(target: Target, seeds: range) -> str:
    for seed in seeds:
        case = random_case(seed)
        try:
            check_case(target, case)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case}: {described(error)}")
    return f"{len(seeds)} cases"


def seed_chunks(seeds: int, seed: int | None) -> Iterator[tuple[str, range]]:
    """(name, seeds) of the random cases: 1 … `seeds`, or only `seed`."""
    if seed is not None:
        yield f"random case, seed {seed}", range(seed, seed + 1)
        return
    for first in range(1, seeds + 1, RANDOM_CASES):
        chunk = range(first, min(first + RANDOM_CASES, seeds + 1))
        yield f"random cases, seeds {chunk[0]} to {chunk[-1]}", chunk


def check_behaviour(report: Report, target: Target) -> None:
    for name, _, function in BEHAVIOURS:
        report.run(name, lambda: function(target))
        torch.cuda.empty_cache()


def check_refusals(report: Report, target: Target) -> None:
    for name, kind, pattern, call in REFUSALS + CUDA_REFUSALS:
        report.run(f"refused: {name}", lambda: assert_raises(kind, pattern, lambda: call(target)))


CASES_TITLE = "Correctness against float64: largest error of y, in roundings (u) of its type"
SM_80_TITLE = "The path of GPUs without bulk copies and clusters: compiled for sm_80, on this GPU"
PASTING_TITLE = "Paste-ability: the text of model_new.py, loaded as kernel benchmark harnesses load it"
COMPILATION_TITLE = "The CUDA text, compiled by nvcc for each architecture"


def check_on_gpu(report: Report, text: str, arguments: argparse.Namespace) -> None:
    print(gpu_name())
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        print(f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']}")
    try:
        target = load_on_gpu(text)
    except Exception as error:
        report.add("model_new.py is built", "FAIL", described(error))
        return
    if arguments.plan:
        show_plan(target, arguments.plan, DTYPES[arguments.dtype])
        return
    speed_rows = SPEED_CASES
    if arguments.shape:
        dtype = DTYPES[arguments.dtype]
        report.section(CASES_TITLE, check_cases, target, [Case(data, arguments.shape, dtype, data=data) for data in ("uniform", "mixed")], 0, None)
        speed_rows = [r for r in SPEED_CASES if r[:2] == (arguments.shape, dtype)] or [(arguments.shape, dtype, None)]
    else:
        report.section(CASES_TITLE, check_cases, target, CASES, arguments.seeds, arguments.seed)
        report.section("Behaviour", check_behaviour, target)
        report.section("Refusals: the exception's type, and the argument named", check_refusals, target)
        report.section(PASTING_TITLE, check_pasting, text)
        if not arguments.quick:
            with compiling(report, build_arguments(text)) as judge:
                report.section(COMPILATION_TITLE, check_compilation, judge)
    speeds, sm_80 = None, None
    if not arguments.quick and not arguments.only:
        speeds = report.section("Speed: GPU time of one training forward, L2 cold; median of runs in which all four take turns",
                                check_speed, target, speed_rows)
    if not arguments.quick and not arguments.shape and report.wants("sm_80 path") and torch.cuda.get_device_capability() >= (9, 0):
        sm_80 = report.section(SM_80_TITLE, check_sm_80, text)
    if arguments.readme and speeds:
        write_readme(report, *speeds, sm_80, gpu_name())


def check_without_gpu(report: Report, text: str, arguments: argparse.Namespace) -> None:
    reason = "asked for" if torch.cuda.is_available() else "no CUDA device"
    print(f"Emulation ({reason}): the CPU executes the kernel's own text. Correctness only, no speed. torch {torch.__version__}")
    if arguments.plan:
        emulator = load_emulator()
        target = Target(emulator.load(text), "cpu", emulator)
        emulator.set_device(multiprocessors=132, shared_bytes=227 << 10, capability=(9, 0))
        print("pretended device: 132 multiprocessors, 227 KB of shared memory, sm_90 (an H200)")
        show_plan(target, arguments.plan, DTYPES[arguments.dtype])
        return
    try:
        build = build_arguments(text)
    except Exception as error:
        report.add("model_new.py is executed", "FAIL", described(error))
        return
    with contextlib.nullcontext() if arguments.emulate else compiling(report, build) as judge:
        report.section("The correctness table on pretended devices", check_emulated, arguments.seeds, arguments.seed)
        if not arguments.emulate:
            report.section(PASTING_TITLE, check_pasting, text)
            report.section(COMPILATION_TITLE, check_compilation, judge)


def main() -> int:
    arguments = parse_arguments()
    report = Report(arguments.only)
    text = TEXT_PATH.read_text()
    if torch.cuda.is_available() and not arguments.emulate:
        check_on_gpu(report, text, arguments)
    else:
        check_without_gpu(report, text, arguments)
    if arguments.mutants:
        report.section("Wrong on purpose: edits of the CUDA text, each of which has to be caught", check_mutants)
    if not arguments.plan:
        print(f"\n{report.closing_line()}")
    return 1 if report.counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
