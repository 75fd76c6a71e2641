"""check.py --nets: every batch norm of some nets, each at its own shape, forward or training.

A net's time is the sum over its layers: a shape that three layers have counts three times.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import timing
import torch
import torch.nn as nn
from timing import BF16, F16, F32, Measured, Row, markdown


@dataclass(frozen=True)
class Net:
    title: str
    batch: int
    dtype: torch.dtype
    # By the side of the planes, or (N, H, W): channels of each layer; 64*3: of three of them.
    layers: dict[int | tuple[int, int, int], str]

    def rows(self, channels_last: bool) -> dict[Row, int]:
        """Its distinct shapes, each with the number of layers that have it."""
        found = {}
        for plane, layers in self.layers.items():
            N, H, W = plane if isinstance(plane, tuple) else (self.batch, plane, plane)
            for layer in layers.split():
                C, _, count = layer.partition("*")
                found[Row((N, int(C), H, W), self.dtype, channels_last)] = int(count or 1)
        return found

    def __str__(self) -> str:
        return f"{self.title} {str(self.dtype).removeprefix('torch.')}"


RESNET50 = {
    112: "64",
    56: "64*6 256*4 128",
    28: "128*7 512*5 256",
    14: "256*11 1024*7 512",
    7: "512*5 2048*4",
}
NETS = {  # shapes as the nets' own definitions give them, a forward of each traced
    "resnet50_256": Net("ResNet-50, batch 256", 256, BF16, RESNET50),
    "resnet50_32": Net("ResNet-50, batch 32", 32, F32, RESNET50),
    "mobilenetv2": Net(
        "MobileNetV2, batch 128",
        128,
        F16,
        {
            112: "32*2 16 96",
            56: "96 24*2 144*3",
            28: "144 32*3 192*5",
            14: "192 64*4 384*8 96*3 576*5",
            7: "576 160*3 960*6 320 1280",
        },
    ),
    "efficientnet_b4": Net(
        "EfficientNet-B4, batch 16",
        16,
        F16,
        {
            190: "48*2 24*3 144",
            95: "144 32*4 192*7",
            48: "192 56*4 336*7",
            24: "336 112*6 672*12 160*6 960*11",
            12: "960 272*8 1632*16 448*2 2688*2 1792",
        },
    ),
    "densenet121": Net(
        "DenseNet-121, batch 64",
        64,
        F32,
        {
            112: "64",
            56: "64 128*7 96 160 192 224 256",
            28: "128*13 160 192 224 256 288 320 352 384 416 448 480 512",
            14: "256 128*24 288 320 352 384 416 448 480 512 544 576 608 640 672 704 736 768 800 "
            "832 864 896 928 960 992 1024",
            7: "512 128*16 544 576 608 640 672 704 736 768 800 832 864 896 928 960 992 1024",
        },
    ),
    "unet": Net(
        "U-Net, batch 4",
        4,
        F32,
        {512: "64*4", 256: "128*4", 128: "256*4", 64: "512*4", 32: "1024*2"},
    ),
    "yolov8s": Net(
        "YOLOv8s, batch 16",
        16,
        F16,
        {
            320: "32",
            160: "64*3 32*2",
            80: "128*7 64*8",
            40: "256*7 128*11 64*2",
            20: "512*6 256*6 64*2 128*2",
        },
    ),
    "resnet20": Net("ResNet-20, batch 512", 512, F32, {32: "16*7", 16: "32*6", 8: "64*6"}),
    "odd": Net(  # a detector's 800×1333 pictures, video, Inception's planes, many channels
        "odd planes, batch 1 … 32",
        1,
        F32,
        {
            (1, 400, 667): "64",
            (1, 200, 334): "256",
            (1, 100, 167): "512",
            (1, 50, 84): "1024",
            (2, 25, 42): "2048",
            (1, 321, 481): "48",
            (1, 1080, 1920): "16",
            (4, 720, 1280): "16",
            (1, 35, 35): "192",
            (32, 17, 17): "128",
            (1, 16, 16): "4096",
        },
    ),
}
LAYOUTS = {False: "NCHW", True: "channels-last"}
REPEATS = 20  # timed calls of each contender
LONG_US = 12  # rows whose copy takes longer stand apart: a launch alone takes a few µs
WORST = 10  # rows of each layout
TRAINING_SPIN = 3 * timing.SPIN_CYCLES  # the host takes longer for forward and backward
# Loosely: a fast wrong kernel must show. Of y; and of gradients, relative to the largest one.
TOLERANCE = {F32: 1e-3, F16: 3e-2, BF16: 3e-2, torch.float64: 1e-6}
GRADIENT_TOLERANCE = {F32: 1e-2, F16: 5e-2, BF16: 5e-2}


# ------------------------------------------------------------------------------------- measuring


def make_pool(rows: Iterable[Row], device: str) -> torch.Tensor:
    """Random numbers, of which every x is a part: filling x anew for each row takes too long."""
    largest = max(rows, key=lambda row: row.nbytes)
    nbytes = max(3 * largest.nbytes, timing.flush_bytes() + largest.nbytes) + (1 << 20)
    return torch.rand(nbytes // largest.dtype.itemsize, dtype=largest.dtype, device=device)


def take_xs(row: Row, pool: torch.Tensor, calls: int) -> list[torch.Tensor]:
    """Another x for each call, as far as the pool goes, aligned as the allocator aligns."""
    N, C, H, W = row.shape
    numel = math.prod(row.shape)
    step = math.ceil(row.nbytes / 512) * 512 // row.dtype.itemsize
    parts = [pool[i * step :][:numel] for i in range(min(calls, pool.numel() // step))]
    if row.channels_last:
        return [part.view(N, H, W, C).permute(0, 3, 1, 2) for part in parts]
    return [part.view(row.shape) for part in parts]


def step_of(module: nn.Module) -> Callable:
    """A training step of this layer alone: from x and y's gradient to y and all gradients."""
    parameters = list(module.parameters())

    def step(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x, dy = pair
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)

    return step


def difference(row: Row, got: tuple, want: tuple) -> str:
    """What of y, or of y, dx, dgamma and dbeta, is not as eager's: nothing, if all is well."""
    for name, ours, eagers in zip(("y", "dx", "dgamma", "dbeta"), got, want):
        limit = TOLERANCE[row.dtype]
        if name != "y":
            limit = GRADIENT_TOLERANCE[row.dtype] * max(1, eagers.abs().max().item())
        error = (ours - eagers).abs().max().item()
        if not error <= limit:
            return f"{name} differs from eager's by {error:.3g}"
    return ""


@dataclass
class Bench:
    """How nets are measured. make: ours and the other versions, from C, as ModelNew does."""

    make: dict[str, Callable]
    device: str = "cuda"
    training: bool = False
    compile: bool = False
    failed: int = 0  # rows where ours is wrong
    compile_s: float = 0

    def contenders(self, row: Row) -> dict[str, Callable]:
        """eager, compiled, others, ours, with the same parameters: float32 beside a half x."""
        eager = nn.BatchNorm2d(row.shape[1]).to(self.device)
        nn.init.uniform_(eager.weight, 0.5, 1.5)
        nn.init.uniform_(eager.bias)
        modules = {"eager": eager}
        if self.compile:
            torch._dynamo.reset()
            modules["compile"] = torch.compile(copy.deepcopy(eager), dynamic=False)
        for name, make in self.make.items():
            modules[name] = make(row.shape[1]).to(self.device)
            modules[name].load_state_dict(eager.state_dict())
        if self.training:
            return {name: step_of(module) for name, module in modules.items()}
        return modules

    def first_results(self, row: Row, contenders: dict[str, Callable], x) -> None:
        """Runs each once; ours must be as eager's. Who cannot run leaves."""
        results = {}
        for name in list(contenders):
            start = time.perf_counter()
            try:
                result = contenders[name](x)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                said = " ".join(str(error).split())[:200]
                print(f"{name} cannot run {row}: {type(error).__name__}: {said}", flush=True)
                self.failed += name == "ours"
                del contenders[name]
                continue
            if name == "compile":
                self.compile_s += time.perf_counter() - start
            if name in ("eager", "ours"):
                results[name] = result if self.training else (result,)
        if len(results) == 2 and (wrong := difference(row, results["ours"], results["eager"])):
            self.failed += 1
            print(f"FAIL  {row}: {wrong}", flush=True)

    def measure(self, row: Row, pool: torch.Tensor) -> dict[str, list[float]]:
        """Deciles of the GPU time in µs per contender, and of a copy where there is a forward."""
        contenders = self.contenders(row)
        us = {name: [math.nan] * 9 for name in ([] if self.training else ["copy"]) + [*contenders]}
        calls = (timing.WARM_UP + REPEATS) * len(us)
        xs = take_xs(row, pool, calls)
        if self.training:
            turned = xs[len(xs) // 2 :] + xs[: len(xs) // 2]
            inputs = [(x.detach().requires_grad_(), dy) for x, dy in zip(xs, turned)]
        else:
            inputs = xs
        with torch.set_grad_enabled(self.training):
            self.first_results(row, contenders, inputs[0])
            if not self.training:
                contenders["copy"] = torch.empty_like(xs[0]).copy_
            spin = TRAINING_SPIN if self.training else timing.SPIN_CYCLES
            return us | timing.take_turns(contenders, inputs, REPEATS, spin)

    def measure_net(self, name: str, channels_last: bool) -> list[Measured]:
        rows, measured = NETS[name].rows(channels_last), []
        pool = make_pool(rows, self.device)
        for row, count in rows.items():
            try:
                measured.append(Measured(row, self.measure(row, pool), name, count))
            except torch.OutOfMemoryError:
                print(f"{row}: needs more GPU memory")
        return measured


# ------------------------------------------------------------------------------------- reporting


def sums(measured: list[Measured]) -> dict[str, float]:
    """µs of all layers, per contender; nan where it could not run one of them."""
    return {n: sum(m.layers * m.us[n][4] for m in measured) for n in measured[0].us}


def net_cells(name: str, measured: list[Measured]) -> dict[str, str]:
    total = sums(measured)
    return {
        "net": str(NETS[name]),
        "layers": str(sum(m.layers for m in measured)),
        "shapes": str(len(measured)),
        **{f"{n} µs": f"{us:.0f}" for n, us in total.items()},
        **{f"× {n}": f"{us / total['ours']:.3f}" for n, us in total.items() if n != "ours"},
    }


def row_cells(m: Measured) -> dict[str, str]:
    return {
        "net": m.net,
        "x": str(m.row),
        **{f"{n} µs": f"{times[4]:.1f}" for n, times in m.us.items()},
        **{f"× {n}": f"{ratio:.3f}" for n, ratio in m.speed_up().items()},
    }


def spread(ratios: list[float]) -> str:
    ordered = sorted(ratios)
    mean, low = statistics.geometric_mean(ordered), ordered[len(ordered) // 10]
    return f"{mean:.3f}, {low:.3f}, {ordered[0]:.3f} ({len(ordered)} rows)"


def sorted_by(measured: list[Measured], name: str) -> list[Measured]:
    """Those that have a time of `name`, ours the slowest first."""
    known = [m for m in measured if math.isfinite(m.speed_up()[name])]
    return sorted(known, key=lambda m: m.speed_up()[name])


def report(measured: list[Measured]) -> Iterator[str]:
    """How the rows of a layout are spread, and the worst of them."""
    yield "Speed relative to each, all rows: geometric mean, 10th percentile, least"
    names = [name for name in measured[0].us if name != "ours"]
    for name in names:
        ordered = sorted_by(measured, name)
        if not ordered:
            continue
        said = spread([m.speed_up()[name] for m in ordered])
        long = [m for m in ordered if "copy" in m.us and m.us["copy"][4] > LONG_US]
        if long:
            said += f"; where a copy takes > {LONG_US} µs: "
            said += spread([m.speed_up()[name] for m in long])
        yield f"  × {name + ':':9} {said}"
        if name != "copy":
            behind = [m for m in ordered if m.speed_up()[name] < 1]
            far = sum(m.speed_up()[name] < 0.9 for m in behind)
            said = ", ".join(f"{m.row} {m.speed_up()[name]:.3f}" for m in behind[:WORST])
            yield f"    behind {name}: {len(behind)} rows, by more than 10 %: {far} {said}".rstrip()
    yield f"The {WORST} rows of least × {names[0]}"
    yield from markdown([row_cells(m) for m in sorted_by(measured, names[0])[:WORST]])
    if "theirs" in names and (ordered := sorted_by(measured, "theirs")):
        yield f"The {WORST} rows of least and of most × theirs"
        yield from markdown([row_cells(m) for m in ordered[:WORST] + ordered[-WORST:]])


def measure_nets(bench: Bench, names, channels_last: bool) -> list[Measured]:
    """Prints a line a net as it comes, then what report says of all rows."""
    what = "forward and backward" if bench.training else "forward"
    print(f"\n{LAYOUTS[channels_last]}, {what}, all layers of a net together")
    every: list[Measured] = []
    for name in names:
        measured = bench.measure_net(name, channels_last)
        table = markdown([net_cells(name, measured)]) if measured else []
        print("\n".join(table[2:] if every else table), flush=True)
        every += measured
    if every:
        print("\n".join(report(every)), flush=True)
    return every


def run(given: argparse.Namespace, ours: Callable, theirs: Callable | None, device: str) -> int:
    """--nets; 1 if ours was wrong or failed anywhere."""
    make = ({"theirs": theirs} if theirs else {}) | {"ours": ours}
    bench, start = Bench(make, device, given.training, given.compile), time.perf_counter()
    every: list[Measured] = []
    for channels_last in (True,) if given.channels_last else LAYOUTS:
        every += measure_nets(bench, given.nets or NETS, channels_last)
    if given.json:
        timing.write_json(given.json, every)
    compiled = f", of which torch.compile took {bench.compile_s:.0f} s" if given.compile else ""
    seconds = time.perf_counter() - start
    print(f"{len(every)} rows in {seconds:.0f} s{compiled}; ours wrong or failed: {bench.failed}")
    return 1 if bench.failed else 0
