"""check.py --plan and --nets --regret: plans that the planner considers, predicted and measured.

They come from a variant of the text, see texts.considering: `Plans` lists what Planner::consider
got for a row, and launches any of it.
"""

import argparse
import ctypes
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import nets
import timing
import torch
from texts import fields_of_plan
from timing import F32, Row, markdown

SHOWN = 10  # plans of least predicted time that --plan shows
SPREAD = 12  # and so many others that --regret times as well, evenly from the best to the worst
REPEATS = 15  # timed calls of each plan
WORDS = 64  # of a plan, at most
FOLLOW = {"vectors", "width", "segment", "share", "step", "units", "unit_bits", "partial_width"}


@dataclass
class Plan:
    place: int  # among those considered
    predicted: float  # µs
    fields: dict[str, int]
    us: float = math.nan  # measured


@dataclass
class Regret:
    """A row with its plans, the chosen one first, then by predicted time."""

    row: Row
    net: str
    plans: list[Plan]
    copy_us: float = math.nan

    @property
    def best(self) -> Plan:
        return min(self.plans, key=lambda plan: math.inf if math.isnan(plan.us) else plan.us)

    @property
    def regret(self) -> float:
        return self.plans[0].us / self.best.us


@dataclass
class Plans:
    """target: of the variant of the text."""

    target: object
    library: ctypes.CDLL = field(init=False)

    def __post_init__(self):
        name = self.target.names["_fused_batch_norm"].name
        (path,) = (p for p in torch.ops.loaded_libraries if Path(p).name.endswith(f"{name}.so"))
        self.library = ctypes.CDLL(path)  # the one that is loaded already
        words, places = ctypes.POINTER(ctypes.c_int), ctypes.c_int
        self.library.fused_batch_norm_considered.restype = places
        self.library.fused_batch_norm_considered_plan.argtypes = [places, words, ctypes.c_size_t]
        self.library.fused_batch_norm_considered_plan.restype = ctypes.c_double
        self.library.fused_batch_norm_take.argtypes = [places]

    def considered(self, row: Row) -> list[Plan]:
        """The chosen plan, then all others by predicted time. Asked once for each row: a planner
        that remembers plans considers nothing the second time."""
        self.library.fused_batch_norm_take(-1)
        chosen = self.target.plan(row.shape, row.dtype, channels_last=row.channels_last)
        fields = fields_of_plan(self.target.names["FUSED_BATCH_NORM_CUDA"])
        found: dict[tuple, Plan] = {}
        for place in range(self.library.fused_batch_norm_considered()):
            words = (ctypes.c_int * WORDS)()
            cost = self.library.fused_batch_norm_considered_plan(place, words, ctypes.sizeof(words))
            plan = Plan(place, cost, {name: words[at] for name, at, _ in fields})
            found.setdefault(tuple(plan.fields.values()), plan)
        return sorted(found.values(), key=lambda p: (p.fields != chosen, p.predicted))

    def measure(self, row: Row, plans: list[Plan], pool: torch.Tensor) -> float:
        """Times them; returns a copy's µs. One that fails or gives another y is left out."""
        params = max(row.dtype, F32, key=lambda dtype: dtype.itemsize)
        module = self.target.model(row.shape[1], dtype=params)

        def launch(plan: Plan) -> Callable:
            def call(x):
                self.library.fused_batch_norm_take(plan.place)
                return module(x)

            return call

        contenders: dict[str, Callable] = {str(plan.place): launch(plan) for plan in plans}
        xs = nets.take_xs(row, pool, (timing.WARM_UP + REPEATS) * (len(plans) + 1))
        with torch.no_grad():
            want = None
            for plan in plans:
                try:
                    y = contenders[str(plan.place)](xs[0])
                    want = y if want is None else want
                    wrong = nets.difference(row, (y,), (want,))
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    wrong = " ".join(str(error).split())[:200]
                if wrong:
                    print(f"{row}: {wrong.replace('eager', 'the first plan')}; {plan.fields}")
                    del contenders[str(plan.place)]
            contenders["copy"] = torch.empty_like(xs[0]).copy_
            us = timing.take_turns(contenders, xs, REPEATS)
        for plan in plans:
            if str(plan.place) in us:
                plan.us = us[str(plan.place)][4]
        self.library.fused_batch_norm_take(-1)
        return us["copy"][4]


def differing(plans: list[Plan]) -> list[str]:
    """The fields in which the plans differ, but for those that follow from others."""
    names = [name for name in plans[0].fields if len({p.fields[name] for p in plans}) > 1]
    return [n for n in names if n not in FOLLOW and not n.endswith(("_bytes", "_at", "_stride"))]


def cells(plan: Plan, names: list[str], timed: bool = True) -> dict[str, str]:
    measured = {"µs": "–" if math.isnan(plan.us) else f"{plan.us:.1f}"} if timed else {}
    fields = {name: str(plan.fields[name]) for name in names}
    return {"predicted": f"{plan.predicted:.1f}", **measured, **fields}


def show(target, xs: list[Row]) -> int:
    """--plan: how each x is launched, and what else was considered; on a GPU, both measured."""
    cuda_text = target.names["FUSED_BATCH_NORM_CUDA"]
    reasons = {name: why for name, _, why in fields_of_plan(cuda_text)}
    variant = Plans(target)
    for x in dict.fromkeys(xs):
        plans = variant.considered(x)
        print(f"plan of {x}; bytes needed, x read and y written once each: {2 * x.nbytes:,}")
        for key, value in plans[0].fields.items():
            print(f"  {key:20} {value:<16,} {reasons[key]}".rstrip())
        near = plans[:SHOWN]
        print(f"the chosen plan, then those of least predicted µs; {len(plans)} were considered")
        timed = target.cuda
        try:
            if timed:
                copy_us = variant.measure(x, near, nets.make_pool([x], target.device))
        except torch.OutOfMemoryError:
            timed = False
            print("not timed: that needs more GPU memory")
        print("\n".join(markdown([cells(plan, differing(near), timed) for plan in near])))
        if timed:
            regret = Regret(x, "", near).regret
            print(
                f"the chosen takes {regret:.3f} × the fastest; a copy {copy_us:.1f} µs", flush=True
            )
    return 0


def measure_net(variant: Plans, name: str, channels_last: bool) -> list[Regret]:
    found, net = [], nets.NETS[name]
    pool = nets.make_pool(net.rows(False), variant.target.device)
    for row in net.rows(channels_last):
        plans = variant.considered(row)
        others = plans[SHOWN:]
        some = plans[:SHOWN] + others[:: max(1, math.ceil(len(others) / SPREAD))]
        try:
            copy_us = variant.measure(row, some, pool)
        except torch.OutOfMemoryError:
            print(f"{row}: needs more GPU memory")
            continue
        if math.isfinite(some[0].us):
            found.append(Regret(row, name, [p for p in some if math.isfinite(p.us)], copy_us))
    return found


def net_cells(name: str, found: list[Regret]) -> dict[str, str]:
    regrets = [f.regret for f in found]
    right = [f.plans[0].predicted / f.plans[0].us for f in found]
    return {
        "net": name,
        "rows": str(len(found)),
        "regret": f"{statistics.geometric_mean(regrets):.3f}",
        "most": f"{max(regrets):.3f}",
        "predicted / measured": f"{statistics.geometric_mean(right):.3f}",
        "from": f"{min(right):.3f}",
        "to": f"{max(right):.3f}",
    }


def regret(given: argparse.Namespace, target) -> int:
    """--nets --regret: what the chosen plans take, relative to the fastest of some."""
    variant, every = Plans(target), []
    for channels_last in (True,) if given.channels_last else nets.LAYOUTS:
        print(
            f"\n{nets.LAYOUTS[channels_last]}, the chosen plan relative to the fastest considered"
        )
        in_layout: list[Regret] = []
        for name in given.nets or nets.NETS:
            found = measure_net(variant, name, channels_last)
            table = markdown([net_cells(str(nets.NETS[name]), found)]) if found else []
            print("\n".join(table[2:] if in_layout else table), flush=True)
            in_layout += found
        if not in_layout:
            continue
        print("\n".join(markdown([net_cells("all", in_layout)])[2:]))
        for f in sorted(in_layout, key=lambda f: -f.regret)[: nets.WORST]:
            print(f"{f.row}: {f.regret:.3f}; copy {f.copy_us:.1f} µs; chosen, fastest:")
            names = differing([f.plans[0], f.best])
            print("\n".join(markdown([cells(plan, names) for plan in (f.plans[0], f.best)])))
        every += in_layout
    if given.json:
        write_json(given.json, every)
    return 0


def write_json(file: TextIO, every: list[Regret]) -> None:
    """Per row all timed plans, the chosen first: predicted and measured µs, and the fields."""
    rows = [
        {
            "net": f.net,
            "x": str(f.row),
            "channels_last": f.row.channels_last,
            "copy_us": f.copy_us,
            "plans": [{"predicted": p.predicted, "us": p.us, **p.fields} for p in f.plans],
        }
        for f in every
    ]
    with file:
        json.dump({"card": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)
