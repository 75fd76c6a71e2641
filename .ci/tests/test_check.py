"""check.py as its user calls it."""

import json
import re

import pytest
import torch

import check
from check import Case


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["check.py", *arguments])
    return check.main()


WRONG = {  # arguments, and what is said of them
    "no shape": ("--plan axbxcxd", "axbxcxd must be NxCxHxW"),
    "three sizes": ("--plan 4x64x56", "4x64x56 must be NxCxHxW"),
    "size 0": ("--plan 0x0x0x0", "0x0x0x0 must be NxCxHxW"),
    "one value per channel": ("--plan 1x64x1x1", "more than one value per channel"),
    "larger than a GPU": ("--plan 100000x100000x1000x1000", "must fit into"),
    "unknown type": ("--plan 4x64x56x56 --dtype int8", "invalid choice: 'int8'"),
    "plan and timing": ("--plan 4x64x56x56 --json rows.json", "--plan goes with"),
    "readme and a shape": ("--readme --shape 4x64x56x56", "--readme goes with"),
    "unknown option": ("--seeds -3", "unrecognized arguments: --seeds"),
}


@pytest.mark.parametrize("arguments, expected", WRONG.values(), ids=WRONG)
def test_wrong_arguments_get_one_line_and_exit_status_2(monkeypatch, capsys, arguments, expected):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *arguments.split())
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("check.py: error: ") and expected in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_timing_needs_a_gpu(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "--shape", "4x64x56x56")
    assert exit.value.code == 2
    assert "--shape must have a CUDA device, got none" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["", "--dtype bfloat16", "--channels-last"])
def test_plan(monkeypatch, capsys, target, options):
    """Each field of the text's struct Plan, with what the launch would take for this very x."""
    assert run(monkeypatch, "--plan", "16x64x256x256", *options.split()) == 0
    said = capsys.readouterr().out
    dtype = torch.bfloat16 if "bfloat16" in options else torch.float32
    assert f"{2 * dtype.itemsize * 16 * 64 * 256 * 256:,}" in said
    printed = re.findall(r"^  (\w+) +(-?[\d,]+)\b", said, re.MULTILINE)
    printed = {name: int(value.replace(",", "")) for name, value in printed}
    plan = target.plan((16, 64, 256, 256), dtype, channels_last="channels-last" in options)
    assert printed == plan and plan


def test_a_field_of_the_plan_without_a_comment_takes_its_place():
    struct = (
        "struct Plan {\n  int a;\n  // The team.\n  FastDivmod b, c;  // two\n  int d;  // last\n};"
    )
    expected = [("a", 0, ""), ("b", 1, "two"), ("c", 4, "two"), ("d", 7, "last")]
    assert check.fields_of_plan(struct) == expected


@pytest.mark.emulated
def test_without_arguments(monkeypatch, capsys, target):
    assert run(monkeypatch) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("No CUDA device")
    assert said[-1] == f"{len(check.CASES)} passed, 0 failed"


def test_a_failing_case_is_counted(capsys, target):
    """A shape of three sizes stands for what fails."""
    errors = check.run_cases([Case("good", (2, 3, 4, 4)), Case("bad", (2, 3, 4))], target)
    assert [error is None for error in errors.values()] == [False, True]
    assert "FAIL" in capsys.readouterr().out


def broken(target, how):
    """The target with a ModelNew whose y is changed by `how`, in place."""

    class Broken(target.names["ModelNew"]):
        def forward(self, x):
            y = super().forward(x)
            how(y)
            return y

    return check.Target({**target.names, "ModelNew": Broken}, target.device, target.emulator)


def set_one(value):
    return lambda y: y[1, 2, 3].fill_(value)


@pytest.mark.parametrize(
    "how",
    [set_one(9.0), set_one(torch.nan), set_one(torch.inf), lambda y: y.mul_(1 + 2**-18)],
    ids=["another value", "NaN", "inf", "a factor of 1 + 2^-18"],
)
def test_a_wrong_y_is_found(target, how):
    """With the first bad coordinate, where it is one row."""
    with pytest.raises(AssertionError, match=r"y\[\d, \d, \d, \d\]: .* expected, got .* u, limit"):
        check.check_case(broken(target, how), Case("", (3, 4, 5, 6)))


@pytest.mark.cuda
def test_one_shape_measured_against_this_very_text(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["--shape", "32x64x56x56", "--against", str(check.TEXT_PATH), "--json", str(path)]
    assert run(monkeypatch, *arguments) == 0
    assert "theirs" in capsys.readouterr().out
    assert json.loads(path.read_text())
