"""The wrong kernels of mutants.py: that each can be made, and what counts as caught."""

import os
import signal
import time

import mutants
import pytest

ALL = (*mutants.MUTANTS, *mutants.PLANNED_MUTANTS)


def test_each_applies(text):
    """To the text of today: else the run of some minutes would say so, at its end."""
    failed = {}
    for name, _, *edits in (*ALL, ("float alone", None, mutants.FLOAT_ALONE)):
        wrong, trouble = mutants.applied(text, edits)
        if trouble or wrong == text:
            failed[name] = trouble or "changes nothing"
    assert not failed


def test_names_and_kinds():
    names = [name for name, *_ in ALL]
    assert len({*names}) == len(names)
    assert {kind for _, kind, *_ in ALL} <= mutants.KINDS


def test_a_text_that_is_gone_is_named(text):
    for edit, trouble in {
        ("make_launch", "no such text", ""): "there is no “no such text” in make_launch",
        ("no_such_function", "return", ""): "there is no no_such_function",
    }.items():
        assert mutants.applied(text, [edit]) == (None, f"does not apply: {trouble}")


ERRORS = {
    "values": AssertionError("y[0, 1, 2, 3]: 1 expected, got 2"),
    "data race": RuntimeError("… got CUDA error: emulator: data race: thread 3 of block 0 reads"),
    "refused": RuntimeError("… got CUDA error: invalid argument"),
}


def raises(error):
    raise error


@pytest.fixture
def examine(text, monkeypatch):
    """Examines a kernel whose cases and build are what the test says, but fork and limits real."""

    def examine(kind, case, build=lambda *_, **__: {}):
        monkeypatch.setattr(mutants.emulate, "load", build)
        check_random = lambda target, seed, any_plan: case(seed)
        monkeypatch.setattr(mutants.cases, "check_random", check_random)
        monkeypatch.setattr(mutants, "CASE_LIMIT_S", 1)
        return mutants.examine(text, kind, mutants.FIRST_SEEDS, None)

    return examine


@pytest.mark.parametrize("kind", ERRORS)
def test_caught_by_its_own_kind_only(examine, kind):
    """Whatever other detectors have said before."""
    last = max(mutants.FIRST_SEEDS)
    others = [error for other, error in ERRORS.items() if other != kind]
    assert examine(kind, lambda seed: raises(others[seed % 2]))[1] is False
    found = examine(kind, lambda seed: raises(ERRORS[kind] if seed == last else others[0]))
    assert found == (f"{kind}, case {last}", True)


@pytest.mark.parametrize("kind", ["values", "deadlock"])
def test_not_caught(examine, kind, monkeypatch):
    """Neither by a build, nor by time, nor by an error that no detector raises."""

    def endless(seed):
        while True:
            seed += 1

    def no_build(*_, **__):
        raise RuntimeError("g++ -c: error")

    assert examine(kind, lambda seed: None) == ("", False)
    assert examine(kind, endless) == ("a case took more than 1 s", False)
    killed = examine(kind, lambda seed: os.kill(os.getpid(), signal.SIGKILL))
    assert killed == ("crash, signal 9", False)
    assert examine(kind, lambda seed: raises(TypeError("no detector"))) == ("no detector", False)
    assert examine(kind, None, no_build) == ("g++ -c: error", False)
    monkeypatch.setattr(mutants, "BUILD_LIMIT_S", 1)
    late = examine(kind, None, lambda *_, **__: time.sleep(60))
    assert late == ("the build took more than 1 s", False)
