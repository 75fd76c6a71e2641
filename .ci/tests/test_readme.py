"""What README.md tells its reader to type."""

import copy
import inspect
import re
import shlex
import subprocess
import sys
import types

import conftest
import pytest
import torch

import check

README = (check.ROOT / "README.md").read_text()
BLOCKS = {
    language: re.findall(rf"```{language}\n(.*?)\n```", README, re.DOTALL)
    for language in ("sh", "python")
}
COMMANDS = [
    command
    for block in BLOCKS["sh"]
    for line in block.splitlines()
    for command in line.partition("#")[0].split(" && ")
]


@pytest.fixture
def model(device):
    """Layers at two depths, with settings and a history of their own, in eval and train mode."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
        torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(4, affine=False)),
        torch.nn.BatchNorm2d(4, track_running_stats=False),
    ).to(device)
    model(torch.randn(4, 3, 8, 8, device=device))
    model[2].eval()
    return model


def forget(layer):
    for t in layer.state_dict().values():
        t.zero_()


def states(model) -> list:
    return [*model.state_dict().values()]


def test_swapping_the_layers_of_a_model(model, model_new, device, monkeypatch):
    there, back = BLOCKS["python"]
    module = types.ModuleType("model_new")
    vars(module).update(model_new)
    monkeypatch.setitem(sys.modules, "model_new", module)
    eager, plain = copy.deepcopy(model), copy.deepcopy(model).apply(forget)
    names = {"model": model, "plain": plain}
    exec(there, names)
    kinds = [type(layer) for layer in model.modules()]
    assert kinds.count(model_new["ModelNew"]) == 3 and torch.nn.BatchNorm2d not in kinds
    x = torch.randn(4, 3, 8, 8, device=device)
    torch.testing.assert_close(model(x), eager(x), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(model.buffers(), eager.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    exec(back, names)
    torch.testing.assert_close(plain.state_dict(), dict(zip(plain.state_dict(), states(model))))
    exec(back, names | {"model": model[1], "plain": plain[1].apply(forget)})  # a layer alone
    torch.testing.assert_close([*plain[1].state_dict().values()], states(model[1]))


def in_this_python(*arguments):
    """Runs the Python that runs the tests, at the root of the project; gives what it printed."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=check.ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{shlex.join(command)}: {(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    """As far as it goes without installing, timing or testing anything."""
    program, *arguments = shlex.split(command)
    if arguments[:2] == ["-m", "pytest"]:
        collected = in_this_python(*arguments, "-n", "0", "--collect-only", "-q")
        assert int(re.search(r"^(\d+) tests collected", collected, re.MULTILINE)[1]) > 500
    elif arguments[:1] == ["check.py"]:
        in_this_python(*(arguments if "--plan" in arguments else ("check.py", "--plan", "2x3x4x4")))
    elif arguments[:2] == ["-m", "venv"]:
        in_this_python(*arguments, "--help")
    elif program.endswith("pip"):
        assert arguments[0] == "install"
        for file in re.findall(r"-r (\S+)", command):
            assert (check.ROOT / file).is_file()
    else:
        raise AssertionError(f"nobody knows how to try {command}")


def test_each_kind_of_command_is_there():
    for kind in (" -m venv ", "pip install ", "check.py", " -m pytest "):
        assert any(kind in command for command in COMMANDS), kind


def test_options_that_are_named_are_there():
    known = in_this_python("check.py", "--help") + inspect.getsource(conftest)
    for option in re.findall(r"`(--[a-z-]+)", README):
        assert re.search(rf"{option}\b", known), option


def test_files_that_are_named_are_there():
    for file in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (check.ROOT / file).exists(), file


@pytest.mark.parametrize("block", BLOCKS["python"])
def test_python_block_compiles(block):
    compile(block, "README.md", "exec")
