"""Writes what was measured into README.md, between `<!-- check.py: NAME -->` and `<!-- end -->`.

Names that end with a card are for one kind of GPU: what another one has measured stays.
"""

import re
from collections.abc import Callable
from pathlib import Path

import timing
import torch

PATH = Path(__file__).resolve().parent.parent / "README.md"
WORST = 6  # rows of accuracy
SM_80_ROWS = [timing.Row(s) for s in ((64, 64, 512, 512), (16, 64, 256, 256), (32, 512, 28, 28))]


def claim(kind: str, rows: list[timing.Measured]) -> str:
    """The benchmark's own size, which comes first, and the range over all rows."""
    ratios = [row.speed_up() for row in rows]
    of = lambda name: [r[name] for r in ratios]
    spread = lambda name: f"{min(of(name)):.2f}–{max(of(name)):.2f} × {name}"
    first = ", ".join(f"{ratios[0][name]:.2f} × {name}" for name in ratios[0])
    every = ", ".join(spread(name) for name in ratios[0])
    return f"- {kind}: {rows[0].row}: {first}; all {len(rows)} rows: {every}"


def table(rows: list[timing.Measured], more: str = "") -> str:
    """With one line in front: where, how many rows meet their bar, and `more`."""
    met = sum(row.verdict() == "met" for row in rows)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = timing.markdown([row.cells() for row in rows])
    return "\n".join([f"{where}: {met} of {len(rows)} rows meet their bar.{more}", "", *lines])


def beside(ours: Callable, sm_80: Callable) -> str:
    """What no table shows: the host's time, and the path of older GPUs."""
    host = timing.whole_call_us(ours)
    old = timing.measure_rows(SM_80_ROWS, sm_80, peers=False)
    shares = ", ".join(f"{m.speed_up()['copy']:.2f} ({m.row})" for m in old)
    return (
        f" A whole call of 128×10×1×1, Python included: {host['ours']:.1f} µs, "
        f"eager {host['eager']:.1f}. Compiled for sm_80, × copy: {shares}."
    )


def accuracy(errors: dict[str, tuple | None]) -> str:
    passed = sorted(((e, name) for name, e in errors.items() if e), reverse=True)
    cells = [
        {"case": name, "ours, u": f"{ours:.2f}", "torch's, u": f"{torchs:.3g}"}
        for (ours, torchs), name in passed[:WORST]
    ]
    return "\n".join(timing.markdown(cells))


def write(errors: dict, rows: list[timing.Measured], ours: Callable, sm_80: Callable) -> None:
    """errors, rows: of the cases, of the table. The rest is measured here."""
    kind = timing.card()
    contents = {
        f"claim {kind}": claim(kind, rows),
        f"speed {kind}": table(rows, beside(ours, sm_80)),
        "channels-last": table(timing.measure_rows(timing.choose(channels_last=True), ours)),
        "accuracy": accuracy(errors),
    }
    text = PATH.read_text()
    for name, content in contents.items():
        place = rf"(<!-- check\.py: {name} -->\n).*?(<!-- end -->)"
        new = lambda m, content=content: f"{m[1]}{content}\n{m[2]}"
        text, found = re.subn(place, new, text, flags=re.S)
        print(f"README.md: {name}: {'written' if found else 'no such place'}")
    PATH.write_text(text)
