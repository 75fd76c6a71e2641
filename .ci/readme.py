"""Writes what was measured into README.md, in short, and .ci/SPEED.md, row by row.

Between `<!-- check.py: NAME -->` and `<!-- end -->`. Names that end with a card are for one kind of
GPU: what another one has measured stays, with the commit that it was measured at.
"""

import hashlib
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import nets
import timing
import torch
from timing import BF16, F16, F32, Measured, Row

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", ROOT / ".ci" / "SPEED.md")
WORST = 6  # rows of accuracy
SHOWN = [  # rows of README.md, the benchmark's own first
    Row((64, 64, 512, 512), F32),
    Row((16, 64, 256, 256), F32),
    Row((32, 256, 56, 56), F32),
    Row((32, 1024, 14, 14), F32),
    Row((64, 320, 40, 40), F16),
    Row((256, 256, 56, 56), BF16),
]
SM_80_ROWS = [Row(s) for s in ((64, 64, 512, 512), (16, 64, 256, 256), (32, 512, 28, 28))]


def version() -> str:
    """The commit, or without a repository what git calls the content of model_new.py."""
    git = f"git -C {shlex.quote(str(ROOT))}"
    clean = f"{git} diff --quiet HEAD -- model_new.py && {git} log -1 --format=%h -- model_new.py"
    commit = subprocess.run(clean, shell=True, capture_output=True, text=True).stdout.strip()
    if commit:
        return f"commit {commit}"
    text = (ROOT / "model_new.py").read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()[:10]
    return f"blob {blob} (git log --find-object={blob})"


def where() -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {version()}"


def by_net(measured: list[Measured]) -> dict[str, dict[str, float]]:
    """The µs of all layers, per net and contender."""
    names = dict.fromkeys(m.net for m in measured)
    return {name: nets.sums([m for m in measured if m.net == name]) for name in names}


def claim(kind: str, rows: list[Measured], layouts: dict[str, list[Measured]]) -> str:
    """The benchmark's own size, which comes first, and the range over the nets."""
    first = ", ".join(f"{ratio:.2f} × {name}" for name, ratio in rows[0].speed_up().items())
    said = [f"- {kind}: {rows[0].row}: {first}"]
    for layout, measured in layouts.items():
        ratios = {
            name: [us[name] / us["ours"] for us in by_net(measured).values()]
            for name in ("copy", "eager")
        }
        spread = ", ".join(f"{min(r):.2f}–{max(r):.2f} × {name}" for name, r in ratios.items())
        said.append(f"{len(by_net(measured))} nets, {layout}: {spread}")
    return f"{'; '.join(said)} ({version()})"


def net_table(forward: dict[str, list[Measured]], training: dict[str, list[Measured]]) -> str:
    """A row a net, the layouts side by side."""
    sums = {layout: by_net(measured) for layout, measured in forward.items()}
    steps = {layout: by_net(measured) for layout, measured in training.items()}
    lines = []
    for name in next(iter(sums.values())):
        cells = {"net": str(nets.NETS[name])}
        for layout in sums:
            us, step = sums[layout].get(name), steps[layout].get(name)
            if us and step:
                cells |= {
                    f"{layout}: eager µs": f"{us['eager']:.0f}",
                    f"{layout}: ours µs": f"{us['ours']:.0f}",
                    f"{layout}: × eager": f"{us['eager'] / us['ours']:.2f}",
                    f"{layout}: × copy": f"{us['copy'] / us['ours']:.2f}",
                    f"{layout}: with backward, × eager": f"{step['eager'] / step['ours']:.2f}",
                }
        lines.append(cells)
    return "\n".join([where(), "", *timing.markdown(lines)])


def table(rows: list[Measured]) -> str:
    """With one line in front: where, and how many rows meet their bar."""
    met = sum(row.verdict() == "met" for row in rows)
    lines = timing.markdown([row.cells() for row in rows])
    return "\n".join([f"{where()}: {met} of {len(rows)} rows meet their bar.", "", *lines])


def spread(measured: list[Measured]) -> str:
    """What --nets prints below its table, as lists and tables."""
    lines = [where(), ""]
    for line in nets.report(measured):
        if line.startswith(" "):
            lines.append(f"- {line.strip()}")
        else:
            lines += [line] if line.startswith("|") else ["", line, ""]
    return "\n".join(lines)


def beside(ours: Callable, sm_80: Callable) -> str:
    """What no table shows: the host's time, and the path of older GPUs."""
    host = timing.whole_call_us(ours)
    old = timing.measure_rows(SM_80_ROWS, sm_80, peers=False)
    shares = ", ".join(f"{m.speed_up()['copy']:.2f} ({m.row})" for m in old)
    return (
        f"A whole call of 128×10×1×1, Python included: {host['ours']:.1f} µs, "
        f"eager {host['eager']:.1f}. Compiled for sm_80, × copy: {shares}."
    )


def accuracy(errors: dict[str, tuple | None]) -> str:
    passed = sorted(((e, name) for name, e in errors.items() if e), reverse=True)
    cells = [
        {"case": name, "ours, u": f"{ours:.2f}", "torch's, u": f"{torchs:.3g}"}
        for (ours, torchs), name in passed[:WORST]
    ]
    return "\n".join([where(), "", *timing.markdown(cells)])


def fill(contents: dict[str, str], files=FILES) -> None:
    """Puts each content into its place, in one of the files."""
    missing = set(contents)
    for path in files:
        text = path.read_text()
        for name, content in contents.items():
            place = rf"(<!-- check\.py: {re.escape(name)} -->\n).*?(<!-- end -->)"
            new = lambda m, content=content: f"{m[1]}{content}\n{m[2]}"
            text, found = re.subn(place, new, text, flags=re.S)
            missing -= {name} if found else set()
        path.write_text(text)
    print(f"written: {', '.join(n for n in contents if n not in missing)}")
    if missing:
        print(f"no place for: {', '.join(sorted(missing))}")


def write(errors: dict, rows: list[Measured], ours: Callable, sm_80: Callable, device: str) -> int:
    """errors, rows: of the cases, of the NCHW table. The rest is measured here.

    Returns how many rows of the nets failed.
    """
    kind, layouts = timing.card(), nets.LAYOUTS
    last = timing.measure_rows(timing.choose(channels_last=True), ours)
    said = beside(ours, sm_80)
    forward = nets.Bench({"ours": ours}, device)
    training = nets.Bench({"ours": ours}, device, training=True)
    of_nets = {layouts[cl]: nets.measure_nets(forward, nets.NETS, cl) for cl in layouts}
    of_steps = {layouts[cl]: nets.measure_nets(training, nets.NETS, cl) for cl in layouts}
    contents = {
        f"claim {kind}": claim(kind, rows, of_nets),
        f"nets {kind}": net_table(of_nets, of_steps),
        "rows": table([m for m in rows if m.row in SHOWN]),
        f"NCHW {kind}": table(rows),
        f"channels-last {kind}": table(last),
        f"beside {kind}": said,
        **{f"nets, {layout}, {kind}": spread(m) for layout, m in of_nets.items()},
        **{f"training, {layout}, {kind}": spread(m) for layout, m in of_steps.items()},
        "accuracy": accuracy(errors),
    }
    fill(contents)
    return forward.failed + training.failed
