"""check.py --nets without a GPU: with made-up times, and with the clock of a pretended GPU."""

import argparse
import itertools
import json
import math
import re
import signal
import subprocess
import sys

import nets
import pytest
import readme
import texts
import timing
import torch
from nets import Net
from timing import BF16, F16, F32, Row
from torch import nn

import check

ALL_NETS = nets.NETS
TINY = {
    "first": Net("First", 2, F32, {4: "3*2 8", 2: "8*3"}),
    "second": Net("Second", 3, F16, {(1, 3, 5): "6"}),
}


@pytest.mark.parametrize(
    "name, layers, buffers",  # as published: "non-trainable parameters", two for each channel
    [
        ("resnet50_256", 53, 53_120),
        ("resnet50_32", 53, 53_120),
        ("mobilenetv2", 52, 34_112),
        ("efficientnet_b4", 96, 125_200),
        ("densenet121", 121, 83_648),
        ("unet", 18, 2 * (4 * (64 + 128 + 256 + 512) + 2 * 1024)),
        ("yolov8s", 57, 20_032),
        ("resnet20", 19, 2 * (7 * 16 + 6 * 32 + 6 * 64)),
    ],
)
def test_the_nets_have_all_their_layers(name, layers, buffers):
    rows = nets.NETS[name].rows(channels_last=False)
    assert sum(rows.values()) == layers
    assert sum(2 * row.shape[1] * count for row, count in rows.items()) == buffers
    listed = " ".join(nets.NETS[name].layers.values()).split()
    assert len(rows) == len(listed), "a shape stands there twice"


class Fake(nn.BatchNorm2d):
    """Stands for ModelNew."""

    def __init__(self, C):
        super().__init__(C)


class Wrong(Fake):
    def forward(self, x):
        return super().forward(x) * (1 + 0.5 * (x.shape[1] == 8))


class Failing(Fake):
    def forward(self, x):
        if x.shape[1] == 8:
            raise RuntimeError("no such kernel")
        return super().forward(x)


TIMES = {"copy": 10, "eager": 60, "compile": 40, "theirs": 30, "ours": 20}


@pytest.fixture
def pretended(monkeypatch):
    """Times are made up, so that sums and ratios are known; every contender runs once."""
    calls = []

    def take_turns(contenders, inputs, repeats, spin=0):
        calls.append((dict(contenders), inputs, spin))
        for contender in contenders.values():
            contender(inputs[-1])
        numel = (inputs[0] if isinstance(inputs[0], torch.Tensor) else inputs[0][0]).numel()
        return {name: [numel * TIMES.get(name, 25) / 48.0] * 9 for name in contenders}

    monkeypatch.setattr(timing, "take_turns", take_turns)
    monkeypatch.setattr(timing, "flush_bytes", lambda: 4096)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a pretended card")
    monkeypatch.setattr(nets, "NETS", TINY)
    return calls


def given(**options) -> argparse.Namespace:
    default = {"nets": [], "training": False, "compile": False, "channels_last": False}
    return argparse.Namespace(**default | {"json": None} | options)


def test_forward(pretended, capsys, tmp_path):
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        assert nets.run(given(json=file), Fake, Fake, "cpu") == 0
    said = capsys.readouterr().out
    # First: planes of 2·3·16 elements in two layers, 2·8·16 in one, 2·8·4 in three; at 1/48 each.
    total = (2 * 96 + 256 + 3 * 64) / 48
    cells = [f"{10 * total:.0f}", f"{60 * total:.0f}", f"{30 * total:.0f}", f"{20 * total:.0f}"]
    lines = [
        line for line in said.splitlines() if "First, batch" in line or "First float32" in line
    ]
    assert len(lines) == 2, "a line a net and layout"
    for line in lines:
        assert [c.strip() for c in line.strip("|").split("|")] == [
            *("First float32", "6", "3"),
            *cells,
            *("0.500", "3.000", "1.500"),
        ]
    assert "× copy:     0.500, 0.500, 0.500 (4 rows); where a copy takes > 12 µs: 0.5" in said
    assert "behind theirs: 0 rows, by more than 10 %: 0\n" in said
    assert "8 rows in" in said and "ours wrong or failed: 0" in said
    rows = json.loads(path.read_text().replace("NaN", "null"))["rows"]
    assert [row["layers"] for row in rows] == [2, 1, 3, 1] * 2
    assert {row["net"] for row in rows} == {"first", "second"}


def test_training(pretended, capsys):
    assert nets.run(given(training=True, nets=["first"]), Fake, None, "cpu") == 0
    said = capsys.readouterr().out
    assert "copy" not in said and "× eager" in said and "forward and backward" in said
    contenders, inputs, spin = pretended[0]
    assert list(contenders) == ["eager", "ours"] and spin > timing.SPIN_CYCLES
    y, dx, dgamma, dbeta = contenders["ours"](inputs[0])
    torch.testing.assert_close(dbeta, inputs[0][1].sum((0, 2, 3)))
    assert dx.shape == y.shape == inputs[0][0].shape and dgamma.shape == (3,)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ours", [Wrong, Failing])
def test_a_wrong_or_failing_kernel_fails_the_run(pretended, capsys, ours, training):
    assert nets.run(given(training=training), ours, Fake, "cpu") == 1
    said = capsys.readouterr().out
    assert "ours wrong or failed: 4" in said  # two rows with 8 channels, two layouts
    assert ("y differs from eager's" if ours is Wrong else "no such kernel") in said


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_a_wrong_gradient_is_found(wrong):
    want = [torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5), torch.rand(3), torch.rand(3)]
    got = [t.clone() for t in want]
    assert nets.difference(Row((2, 3, 4, 5)), got, want) == ""
    got[wrong].view(-1)[1] += 0.05
    name = ("y", "dx", "dgamma", "dbeta")[wrong]
    assert f"{name} differs from eager's by 0.05" in nets.difference(Row((2, 3, 4, 5)), got, want)
    got[wrong].view(-1)[1] = math.nan
    assert f"{name} differs from eager's by nan" in nets.difference(Row((2, 3, 4, 5)), got, want)


@pytest.mark.emulated
@pytest.mark.parametrize("training", [False, True])
def test_our_own_kernel(pretended, capsys, target, training):
    """With the names of its parameters, and gradients in their order."""
    assert nets.run(given(training=training), target.model, None, "cpu") == 0
    assert "ours wrong or failed: 0" in capsys.readouterr().out


def test_one_who_cannot_run_a_row_does_not_end_the_run(pretended, capsys):
    assert nets.run(given(channels_last=True), Fake, Failing, "cpu") == 0
    said = capsys.readouterr().out
    assert "NCHW" not in said
    assert "theirs cannot run 2×8×4×4 float32: RuntimeError: no such kernel" in said
    assert "nan" in said  # the sum of its layers
    assert "× theirs:   1.500, 1.500, 1.500 (2 rows)" in said


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_xs_are_parts_of_the_pool_and_overlap_nowhere(channels_last, dtype):
    row, pool = Row((2, 3, 5, 7), dtype, channels_last), torch.rand(1 << 12).to(dtype)
    step = {F32: 1024, BF16: 512}[dtype]  # bytes
    xs = nets.take_xs(row, pool, 100)
    kept = torch.channels_last if channels_last else torch.contiguous_format
    assert len(xs) == 4096 * dtype.itemsize // step
    assert len(nets.take_xs(row, pool, 3)) == 3
    starts = [x.data_ptr() for x in xs]
    assert all(b - a == step for a, b in itertools.pairwise(starts))
    for x in xs:
        assert x.shape == row.shape and x.is_contiguous(memory_format=kept)
        assert pool.data_ptr() <= x.data_ptr() <= pool.data_ptr() + 4096 * dtype.itemsize - x.nbytes


def test_a_pool_is_larger_than_what_stays_in_l2(pretended):
    """Three of the largest x; and of small ones so many that they fill what is flushed."""
    pool = nets.make_pool(TINY["first"].rows(False), "cpu")
    assert pool.nbytes >= 3 * 4 * 256 and pool.nbytes >= 4096 + 4 * 256


class FakeEvent:
    """An event of a GPU whose clock goes on by 5 µs with each call of a contender."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def elapsed_time(self, stop):
        return (stop.at - self.at) / 1e3


@pytest.mark.parametrize("repeats", [0, 20])
def test_take_turns(monkeypatch, repeats):
    """Every contender as often, with each x in turn; the deciles of what its events say."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "flush_bytes", lambda: 64)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
    seen = {"a": [], "b": []}

    def contender(name, us):
        def call(x):
            seen[name].append(x)
            FakeEvent.now += us

        return call

    us = timing.take_turns({"a": contender("a", 5), "b": contender("b", 7)}, [1, 2, 3], repeats)
    assert [len(us[name]) for name in "ab"] == [9, 9]
    assert math.isclose(us["a"][4], 5) and math.isclose(us["b"][4], 7)
    calls = timing.WARM_UP + repeats
    assert len(seen["a"]) == len(seen["b"]) >= calls
    if repeats:
        assert len(seen["a"]) == calls
    assert max(map(seen["a"].count, (1, 2, 3))) < len(seen["a"])


@pytest.fixture
def documents(monkeypatch, tmp_path):
    """Copies of README.md and SPEED.md; what is timed beside the nets is made up."""
    copies = []
    for path in readme.FILES:
        copies.append(tmp_path / path.name)
        copies[-1].write_text(path.read_text())
    monkeypatch.setattr(readme, "fill", lambda c, fill=readme.fill: fill(c, copies))
    monkeypatch.setattr(timing, "card", lambda: "H200")
    monkeypatch.setattr(timing, "whole_call_us", lambda ours: {"ours": 11.1, "eager": 33.3})
    times = {"copy": 1.0, "eager": 4.0, "compile": 3.0, "ours": 2.0}
    made_up = lambda rows: [
        timing.Measured(r, {n: [t] * 9 for n, t in times.items()}) for r in rows
    ]
    monkeypatch.setattr(timing, "measure_rows", lambda rows, ours, peers=True: made_up(rows))
    return copies, made_up(timing.choose(channels_last=False))


def test_readme(pretended, documents, capsys):
    """Every place of the card is filled, the other card's stay."""
    copies, rows = documents
    before = [path.read_text() for path in copies]
    errors = {"a case": (1.25, 2.5), "a failed one": None}
    assert readme.write(errors, rows, Fake, Fake, "cpu") == 0
    said = capsys.readouterr().out
    assert "no place for" not in said
    place = re.compile(r"<!-- check\.py: (.*?) -->\n(.*?)<!-- end -->", re.DOTALL)
    for path, old in zip(copies, before):
        filled, was = (dict(place.findall(text)) for text in (path.read_text(), old))
        assert filled.keys() == was.keys()
        for name, content in filled.items():
            assert (content == was[name]) == ("H100" in name), name
        assert place.sub("", path.read_text()) == place.sub("", old)
    text = copies[0].read_text()
    lines = text.count("\n") + len(ALL_NETS) - len(TINY)
    assert lines + 12 <= 190  # with the table of another card
    assert "2 nets, NCHW: 0.50–0.50 × copy, 3.00–3.00 × eager; 2 nets, channels-last" in text
    assert "commit" in text or "blob" in text


def test_rows_of_the_readme_are_rows_of_the_table(monkeypatch):
    monkeypatch.setattr(timing, "card", lambda: "H200")
    assert set(readme.SHOWN) <= {*timing.choose(channels_last=False)}


def test_the_version_without_a_repository_is_what_git_calls_the_text(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "model_new.py").write_text("x = 1\n")
    said = subprocess.run(
        ["git", "hash-object", "model_new.py"], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    assert readme.version().startswith(f"blob {said[:10]} ")


WRONG = {  # arguments, and what the line says of them
    ("--training",): "--training, --compile, --regret go with --nets",
    ("--nets", "--compile"): "--nets must name nets with --compile",
    ("--nets", "no_such_net"): "invalid choice: 'no_such_net'",
    ("--nets", "--shape", "1x2x3x4"): "--nets goes with",
    ("--nets", "--dtype", "float16"): "--nets goes with",
    ("--nets", "--regret", "--training"): "--regret goes with",
    ("--against", ""): "--against must be a file or revision with ModelNew, got ''",
    ("--against", sys.executable): "--against must be a file or revision with ModelNew, got",
    ("--against", "no such thing"): "--against must be a file or revision with ModelNew, got",
    ("--against", ":model_new.py"): "--against must be a file or revision with ModelNew, got",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_arguments(monkeypatch, capsys, arguments):
    monkeypatch.setattr("sys.argv", ["check.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        check.main()
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert WRONG[arguments] in said


def test_without_the_rest_of_the_repository(tmp_path):
    """Both what it compares and what it needs itself."""
    for needed in ("model_new.py", ".ci/timing.py"):
        (tmp_path / "check.py").write_text((check.ROOT / "check.py").read_text())
        done = subprocess.run(
            [sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"check.py: error: {needed} must lie beside")
        (tmp_path / "model_new.py").touch()


@pytest.mark.parametrize("stop", ["interrupt", "closed pipe"])
def test_stopped_from_outside(stop):
    """Ctrl-C and `| head` end it by their signals, without a traceback."""
    arguments = [sys.executable, "check.py", "--plan", "4x64x56x56"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        arguments, cwd=check.ROOT, stdout=pipe, stderr=pipe, text=True
    ) as process:
        process.stdout.readline()
        if stop == "interrupt":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
        said = process.stderr.read()
    wanted = signal.SIGINT if stop == "interrupt" else signal.SIGPIPE
    assert "Traceback" not in said and process.returncode == -wanted


@pytest.mark.emulated
def test_the_plan_says_for_which_card(monkeypatch, capsys, target):
    monkeypatch.setattr("sys.argv", ["check.py", "--plan", "4x64x56x56"])
    assert check.main() == 0
    assert "planned for an H100" in capsys.readouterr().out


@pytest.mark.emulated
@pytest.mark.parametrize(
    "case", [c for c in check.CASES if c.training and c.data != "not finite"], ids=str
)
def test_a_wrong_store_shows_in_channel_0(target, case):
    """A ReLU there, as it stands in for what a wrong store does."""
    if case.small != "same":
        case = check.replace(case, shape=case.small)
    if 0 in case.shape:
        pytest.skip("there is no y")

    class Broken(target.names["ModelNew"]):
        def forward(self, x):
            y = super().forward(x)
            y[:, 0].relu_()
            return y

    names = {**target.names, "ModelNew": Broken}
    with pytest.raises(AssertionError, match=r"y\[\d+, 0, "):
        check.check_case(check.Target(names, target.device, target.emulator), case)


@pytest.mark.parametrize("training", [False, True])
def test_nets_with_the_real_turns(monkeypatch, capsys, training):
    """Nothing but the clock and the memory of a GPU is pretended."""

    class Event(FakeEvent):
        def record(self):
            FakeEvent.now += 1
            super().record()

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "flush_bytes", lambda: 4096)
    monkeypatch.setattr(nets, "NETS", TINY)
    assert nets.run(given(training=training), Fake, Fake, "cpu") == 0
    said = capsys.readouterr().out
    assert "8 rows in" in said and "nan" not in said
    assert said.count("1.000, 1.000, 1.000 (4 rows)") == (4 if training else 6)


@pytest.fixture
def pretended_gpu(pretended, documents, monkeypatch, model_new, text):
    """What check.py asks of a GPU; the kernels are emulated."""
    loaded = []

    def load(changed):
        loaded.append(changed)
        variant = texts.considering(text)
        of_plans = "fused_batch_norm_considered" in changed
        return check.Target(check.load_emulator().load(variant) if of_plans else model_new, "cpu")

    properties = argparse.Namespace(name="a card", multi_processor_count=132, L2_cache_size=1024)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(check, "load_on_gpu", load)
    monkeypatch.setattr(check, "CASES", [check.Case("small", (2, 3, 4, 4))])
    made_up = timing.measure_rows
    monkeypatch.setattr(
        timing, "measure_rows", lambda rows, ours, *rest, **more: made_up(rows, ours)
    )
    return loaded


@pytest.mark.emulated
@pytest.mark.parametrize(
    "arguments, loaded, said",
    [
        (["--nets"], 1, "8 rows in"),
        (["--nets", "second", "--training"], 1, "2 rows in"),
        (["--nets", "--against", str(check.TEXT_PATH), "--channels-last"], 2, "× theirs:   1.500"),
        (["--against", str(check.TEXT_PATH)], 2, "theirs: small, 2×3×4×4 float32"),
        (["--plan", "2x3x4x5"], 1, "plan of 2×3×4×5 float32"),
        (["--readme"], 2, "written: claim H200, nets H200"),
        ([], 1, "1 passed, 0 failed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_on_a_pretended_gpu(pretended_gpu, monkeypatch, capsys, target, arguments, loaded, said):
    monkeypatch.setattr("sys.argv", ["check.py", *arguments])
    assert check.main() == 0
    assert said in capsys.readouterr().out and len(pretended_gpu) == loaded
