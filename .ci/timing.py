"""The speed tables of check.py: what is timed, how, against what, and how a row reads."""

import copy
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

import torch
import torch.nn as nn

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CARDS = ("H100", "H200")
# x's types; the share of a copy's speed that the project asks of itself on each of CARDS; shapes.
NCHW = [
    ([F32], (0.84, 0.80), "64x64x512x512"),  # the benchmark's own, see reference_model.py
    ([F32], (0.93, 0.91), "16x64x256x256 8x64x512x512 128x256x56x56"),
    ([F32], (0.93, 0.90), "32x64x112x112 32x256x56x56 32x512x28x28 32x1024x14x14"),
    ([F32], (0.93, 0.90), "32x128x28x28 32x64x56x56"),
    ([F32], (0.88, 0.85), "32x2048x7x7 7x33x101x99"),
    ([F16], (0.88, 0.85), "64x320x40x40"),
    ([BF16], (0.88, 0.83), "256x64x112x112 256x256x56x56 256x2048x7x7"),
    ([F32], (0.75, 0.74), "2x3x1024x1024 8x3x224x224 128x10x64x64"),
]
CHANNELS_LAST = [
    # The chip has room for 128 bytes of every pixel,
    ([F32], (0.70, 0.66), "32x256x56x56 32x512x28x28 32x1024x14x14 1024x512x1x1"),
    ([F16, BF16], (0.70, 0.66), "256x512x28x28 256x2048x7x7"),
    # it has not,
    ([F32], (0.62, 0.58), "32x64x112x112 128x256x56x56 16x64x256x256"),
    ([F16, BF16], (0.62, 0.58), "256x64x112x112 256x256x56x56"),
    # a pixel is no whole number of 16-byte vectors.
    ([F32], (0, 0), "8x3x224x224"),
]
SPIN_CYCLES = 500_000  # ~250 µs: Python gets ahead of the GPU, so that only GPU time is measured
WARM_UP = 5  # runs that do not count
BUDGET_US = 600_000  # GPU time for one row, roughly


@dataclass(frozen=True)
class Row:
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    channels_last: bool = False
    bar: float = field(default=0, compare=False)  # share of a copy's speed; 0: none

    def __str__(self) -> str:
        return f"{'×'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def make_x(self) -> torch.Tensor:
        kept = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.rand(self.shape, dtype=self.dtype, device="cuda")
        return x.contiguous(memory_format=kept)


def card() -> str:
    """One of CARDS, or the name of another one."""
    name = torch.cuda.get_device_name()
    return next((kind for kind in CARDS if kind in name), name)


def choose(channels_last: bool, shapes=(), dtype: torch.dtype | None = None) -> list[Row]:
    """The rows of a table, with their bars on this card; or those of other shapes or type."""
    table = [
        Row(
            tuple(map(int, shape.split("x"))),
            of,
            channels_last,
            dict(zip(CARDS, bars)).get(card(), 0),
        )
        for dtypes, bars, names in (CHANNELS_LAST if channels_last else NCHW)
        for of, shape in itertools.product(dtypes, names.split())
    ]
    if not shapes and not dtype:
        return table
    shapes = shapes or dict.fromkeys(row.shape for row in table)
    known = {row: row for row in table}
    chosen = [Row(shape, dtype or F32, channels_last) for shape in shapes]
    return [known.get(row, row) for row in chosen]


# ------------------------------------------------------------------------------------- measuring


def flush_bytes() -> int:
    return 4 * torch.cuda.get_device_properties(0).L2_cache_size


def host_us(function: Callable, x: torch.Tensor, calls: int = 1) -> float:
    """One call, the host's time included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function(x)
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / calls


def take_turns(
    contenders: dict[str, Callable], xs: list, repeats: int = 0, spin: int = SPIN_CYCLES
) -> dict[str, list[float]]:
    """The deciles of the GPU time of a call in µs, per contender.

    As benchmark harnesses do, each call follows a write that fills L2: else it would have to write
    back what the one before has left there. Some of that outlives the write, so the order is
    random; and each call uses a different x, so that L2 never holds what is read. Without
    `repeats`, there are as many as fit into BUDGET_US.
    """
    flush = torch.empty(flush_bytes(), device="cuda", dtype=torch.uint8)
    if not repeats:
        once_us = sum(host_us(contender, xs[0]) for contender in contenders.values())
        repeats = max(20, min(100, int(BUDGET_US / once_us)))
    runs: dict[str, list] = {name: [] for name in contenders}
    x, order = itertools.cycle(xs), random.Random(0)
    for _ in range(WARM_UP + repeats):
        for name, contender in order.sample(list(contenders.items()), len(contenders)):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(spin)
            start.record()
            contender(next(x))
            stop.record()
            runs[name].append((start, stop))
    torch.cuda.synchronize()
    us = {n: [1e3 * start.elapsed_time(stop) for start, stop in runs[n][WARM_UP:]] for n in runs}
    return {name: statistics.quantiles(times, n=10) for name, times in us.items()}


@torch.no_grad()
def measure(row: Row, ours: Callable, theirs: Callable | None = None, peers: bool = True) -> dict:
    """take_turns of a copy, eager and compiled PyTorch (`peers`), `theirs` and ours.

    ours, theirs: make a module from C, as ModelNew does. Parameters are float32 beside a half x, as
    mixed precision has them: that is where eager is fastest. A peer that cannot run has no times.
    """
    params = max(row.dtype, F32, key=lambda dtype: dtype.itemsize)
    make = lambda module: module(row.shape[1]).to("cuda", params)
    room = int(0.6 * torch.cuda.mem_get_info()[0] / row.nbytes) - 2  # the copy's y, and a result
    wanted = max(3, math.ceil(flush_bytes() / row.nbytes))
    xs = [row.make_x() for _ in range(max(1, min(wanted, room)))]
    contenders: dict[str, Callable] = {"copy": torch.empty_like(xs[0]).copy_}
    if peers:
        torch._dynamo.reset()
        contenders["eager"] = make(nn.BatchNorm2d)
        contenders["compile"] = torch.compile(copy.deepcopy(contenders["eager"]), dynamic=False)
    if theirs:
        contenders["theirs"] = make(theirs)
    contenders["ours"] = make(ours)
    us = {name: [math.nan] * 9 for name in contenders}
    for name in us:
        try:
            contenders[name](xs[0])
        except Exception as error:
            if name == "ours":
                raise
            print(f"{name} cannot run {row}: {type(error).__name__}: {str(error)[:200]}")
            del contenders[name]
    return us | take_turns(contenders, xs)


def whole_call_us(ours: Callable) -> dict[str, float]:
    """Of 128×10×1×1, where the host's part is all there is: the best of some runs."""
    x, times = torch.rand(128, 10, 1, 1, device="cuda"), {}
    with torch.no_grad():
        for name, make in {"ours": ours, "eager": nn.BatchNorm2d}.items():
            module = make(10).to("cuda")
            times[name] = min(host_us(module, x, calls=300) for _ in range(10))
    return times


# -------------------------------------------------------------------------------------- reporting


@dataclass
class Measured:
    row: Row
    us: dict[str, list[float]]  # deciles, per contender
    net: str = ""  # whose row it is,
    layers: int = 1  # and of how many of its layers

    def speed_up(self) -> dict[str, float]:
        """How many times as fast as each other contender ours is, by their medians."""
        return {n: t[4] / self.us["ours"][4] for n, t in self.us.items() if n != "ours"}

    def verdict(self) -> str:
        asked, ratios = {"copy": self.row.bar, "eager": 1, "compile": 1}, self.speed_up()
        missed = [name for name, least in asked.items() if ratios.get(name, least) < least]
        return "below " + ", ".join(missed).replace("copy", "bar") if missed else "met"

    def cells(self) -> dict[str, str]:
        """TB/s counts what the operation needs: x read once, y written once."""
        low, median, high = (self.us["ours"][decile] for decile in (0, 4, 8))
        return {
            "x": str(self.row),
            **{f"{name} µs": f"{times[4]:.1f}" for name, times in self.us.items()},
            "p10–p90": f"{low:.1f}–{high:.1f}",
            "TB/s": f"{2 * self.row.nbytes / median / 1e6:.2f}",
            **{f"× {name}": f"{ratio:.3f}"[:5] for name, ratio in self.speed_up().items()},
            "bar": f"{self.row.bar:.2f}" if self.row.bar else "–",
            "verdict": self.verdict(),
        }


def markdown(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a table, aligned for the eye as well."""
    widths = {"net": 36, "x": 23, "p10–p90": 13, "case": 48}
    line = lambda cells: f"| {' | '.join(f'{c:>{widths.get(n, 7)}}' for n, c in cells.items())} |"
    head = rows[0]
    return [line({name: name for name in head}), f"|{' ---: |' * len(head)}", *map(line, rows)]


def measure_rows(
    rows: list[Row], ours: Callable, theirs: Callable | None = None, peers: bool = True
) -> list[Measured]:
    """Prints the table as it comes; beside `theirs`, how we compare over all rows as well."""
    measured: list[Measured] = []
    for row in rows:
        torch.cuda.empty_cache()
        try:
            measured.append(Measured(row, measure(row, ours, theirs, peers and not theirs)))
        except torch.OutOfMemoryError:
            print(f"{row}: needs more GPU memory")
            continue
        lines = markdown([measured[-1].cells()])
        print("\n".join(["", *lines] if len(measured) == 1 else lines[2:]), flush=True)
    if theirs and measured:
        ratios = {str(m.row): m.speed_up()["theirs"] for m in measured}
        worst = min(ratios, key=ratios.get)
        mean = statistics.geometric_mean(ratios.values())
        print(f"× theirs: geometric mean {mean:.3f}, worst {ratios[worst]:.3f} ({worst})")
    return measured


def write_json(file: TextIO, measured: list[Measured]) -> None:
    """Per row the deciles of each contender's times in µs."""
    rows = [
        {
            "net": m.net,
            "layers": m.layers,
            "x": str(m.row),
            "channels_last": m.row.channels_last,
            "us": m.us,
        }
        for m in measured
    ]
    with file:
        json.dump({"card": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)
