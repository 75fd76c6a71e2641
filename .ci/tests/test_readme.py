"""What README.md tells its reader to type."""

import copy
import re
import sys
import types

import pytest
import torch

import check

README = (check.ROOT / "README.md").read_text()


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
    there, back = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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


def test_the_commands_are_those_of_check_py_and_these_tests():
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    assert "check.py" in commands[0]
    assert "-m pytest" in commands[1] and commands[1].count("\n") == 0
