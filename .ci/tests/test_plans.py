"""check.py --plan and --nets --regret: the variant of the text, and what is made of its plans."""

import argparse
import json
import math

import nets
import plans
import pytest
import texts
import timing
import torch
from nets import Net
from plans import Plan
from timing import F16, F32, Row

import check

TINY = {"first": Net("First", 2, F32, {4: "3*2 8"}), "second": Net("Second", 3, F16, {5: "6"})}


@pytest.fixture
def pretended(monkeypatch):
    """Plan k, the first contender being 0, takes 10, 20, 5, 30, 40 … µs; and is launched once."""

    def take_turns(contenders, xs, repeats):
        for contender in contenders.values():
            contender(xs[-1])
        us = {name: 10.0 * (k + 1) for k, name in enumerate(contenders)}
        us[list(contenders)[min(2, len(us) - 2)]] = 5.0
        return {name: [t] * 9 for name, t in (us | {"copy": 4.0}).items()}

    monkeypatch.setattr(timing, "take_turns", take_turns)
    monkeypatch.setattr(timing, "flush_bytes", lambda: 4096)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a pretended card")
    monkeypatch.setattr(nets, "NETS", TINY)


@pytest.fixture(scope="module")
def considering(text):
    emulator = check.load_emulator()
    names = emulator.load(texts.considering(text))
    emulator.set_device(3, 16 << 10, (9, 0))
    return check.Target(names, "cpu", emulator)


def given(**options) -> argparse.Namespace:
    return argparse.Namespace(**{"nets": [], "channels_last": False, "json": None} | options)


@pytest.mark.emulated
def test_plans_of_the_text(considering, model_new):
    """The chosen one is the planner's own, and the least of those predicted; each can be taken."""
    row, variant = Row((4, 6, 8, 8)), plans.Plans(considering)
    found = variant.considered(row)
    product = check.Target(model_new, "cpu", check.load_emulator())
    considering.emulator.set_device(3, 16 << 10, (9, 0))
    assert found[0].fields == product.plan(row.shape, row.dtype)
    assert len(found) > 5 and found[0].predicted <= min(p.predicted for p in found[1:])
    assert [p.predicted for p in found[1:]] == sorted(p.predicted for p in found[1:])
    x = torch.rand(row.shape)
    want = torch.nn.BatchNorm2d(6)(x)
    for plan in found:
        variant.library.fused_batch_norm_take(plan.place)
        assert considering.plan(row.shape, row.dtype) == plan.fields
        torch.testing.assert_close(considering.model(6)(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.emulated
def test_regret_of_the_text(considering, pretended, capsys, tmp_path):
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        assert plans.regret(given(json=file), considering) == 0
    said = capsys.readouterr().out
    assert said.count("| First float32") <= 2 and "channels-last, the chosen plan" in said
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 6 and {row["copy_us"] for row in rows} == {4.0}
    for row in rows:
        assert {"predicted", "us", "channels", "teams"} <= row["plans"][0].keys()


FIELDS = [("a", 0, "what a is"), ("shared_bytes", 1, ""), ("b", 2, "what b is")]


class FakePlans:
    """Of a target whose plans are made up: 30, of which the second is the fastest."""

    def __init__(self, target):
        self.target = target

    def considered(self, row):
        fields = lambda k: {"a": k, "shared_bytes": 7 * k, "b": 5}
        return [Plan(k, 10.0 + k, fields(k)) for k in range(30)]

    def measure(self, row, some, pool):
        for plan in some:
            plan.us = 12.0 - 4 * (plan.place == 1) + plan.place
        some[2].us = math.nan  # could not run
        assert pool.nbytes >= 3 * row.nbytes
        return 6.0


class FakeTarget:
    names = {"FUSED_BATCH_NORM_CUDA": "fused_batch_norm_considered"}
    device, cuda = "cpu", True


@pytest.fixture
def made_up(monkeypatch, pretended):
    monkeypatch.setattr(plans, "Plans", FakePlans)
    monkeypatch.setattr(plans, "fields_of_plan", lambda text: FIELDS)


def test_plan_on_a_gpu(made_up, capsys):
    assert plans.show(FakeTarget(), [Row((2, 3, 4, 5))] * 2) == 0
    said = capsys.readouterr().out
    assert said.count("plan of 2×3×4×5 float32") == 1  # asked for twice
    assert "what a is" in said and "30 were considered" in said
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert len(table) == 2 + plans.SHOWN
    head, first, second, third = (
        [cell.strip() for cell in table[k].strip("|").split("|")] for k in (0, 2, 3, 4)
    )
    assert head == ["predicted", "µs", "a"]  # bytes follow, b does not differ
    assert (first, second, third) == (
        ["10.0", "12.0", "0"],
        ["11.0", "9.0", "1"],
        ["12.0", "–", "2"],
    )
    assert "the chosen takes 1.333 × the fastest; a copy 6.0 µs" in said


def test_plan_of_what_leaves_no_room(made_up, monkeypatch, capsys):
    def measure(self, row, some, pool):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(FakePlans, "measure", measure)
    assert plans.show(FakeTarget(), [Row((2, 3, 4, 5))]) == 0
    said = capsys.readouterr().out
    assert "needs more GPU memory" in said and "| predicted |       a |" in said


def test_regret(made_up, capsys, tmp_path):
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        assert (
            plans.regret(given(nets=["second"], channels_last=True, json=file), FakeTarget()) == 0
        )
    said = capsys.readouterr().out
    assert "NCHW" not in said
    cells = ["1", "1.333", "1.333", "0.833", "0.833", "0.833"]
    lines = [line for line in said.splitlines() if "| " in line]
    line = next(line for line in lines if "Second" in line)
    assert [c.strip() for c in line.strip("|").split("|")] == ["Second float16", *cells]
    assert any(line.strip("|").split("|")[0].strip() == "all" for line in lines)
    (row,) = json.loads(path.read_text())["rows"]
    # Those of least predicted time, but for the one that failed, and others from all over the rest.
    places = [plan["a"] for plan in row["plans"]]
    assert places[:9] == [0, 1, *range(3, 10)] and len(places) == 9 + 10
    assert places[9:] == list(range(10, 30, 2))


def test_a_text_is_changed_where_it_must_be():
    text = (
        'FUSED_BATCH_NORM_CUDA = r"""\nstruct Planner {\n'
        "  void consider(const std::optional<Plan>& p) {\n"
        "    if (a > best_cost) continue;\n  }\n};\n"
        "Plan& make_plan(int a,\n                int b) {\n  if (a) {\n  }\n  return c;\n}\n\n"
        'use(make_plan(1, 2));\n"""\n\nFUSED_BATCH_NORM_CPP = r"""'
    )
    changed = texts.considering(text)
    assert "consider(const std::optional<Plan>& p) {\n    if (p) considered.push_back" in changed
    assert "Plan& choose_plan(int a,\n" in changed and "use(make_plan(1, 2));" in changed
    assert (
        changed.index("return c;")
        < changed.index("Plan make_plan(const Ts&")
        < changed.index("use(")
    )
    assert "> 2 * best_cost) continue;" in changed
    with pytest.raises(AssertionError, match="0 places"):
        texts.considering(text.replace("make_plan(int", "another_plan(int"))
