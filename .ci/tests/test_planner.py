"""The planner in the CUDA text: what holds of its plans, what they take; it remembers."""

import ctypes
import re
import time

import cases
import pytest
from cases import F32

import check

H100 = cases.Device(132, 227 << 10, (9, 0))
PLANS = 100_000
MADE_US, REMEMBERED_US = 60, 5  # of the host's time, in the mean: at most


@pytest.mark.emulated
def test_invariants(target, model_new):
    """Of random shapes, types, layouts and modes on eight cards: see planner.cpp."""
    names = [model_new[f"FUSED_BATCH_NORM_{text}"] for text in ("CALL", "CUDA")]
    up_to_make_plan = r"(.*?^Plan& make_plan\(.*?^\}$)"
    planner = re.match(up_to_make_plan, names[1], re.DOTALL | re.MULTILINE)[1]
    code = (check.ROOT / ".ci" / "tests" / "planner.cpp").read_text()
    library = target.emulator.load_host("\n".join((names[0], planner, "}", code)))
    library.try_plans.restype = ctypes.c_char_p
    us = (ctypes.c_double * 2)()
    broken = library.try_plans(ctypes.c_int64(1), ctypes.c_int64(PLANS), us).decode()
    assert not broken, broken
    assert us[0] <= MADE_US and us[1] <= REMEMBERED_US, list(us)


def test_plans_are_remembered(target):
    """By a thread. The quickest of some, since other processes take time as well."""
    cases.pretend(target, cases.present() or H100, schedule=0)
    make_plan = target.names["_fused_batch_norm"].fused_batch_norm_plan

    def took(channels):
        start = time.perf_counter()
        make_plan(100, channels, 56 * 56, F32, True, 0.1)
        return time.perf_counter() - start

    sizes = range(1000, 1050)
    assert min(map(took, sizes)) > 2 * min(map(took, sizes))
