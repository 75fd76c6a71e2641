"""Forwards against float64: the table and random cases, on the GPU or on pretended devices."""

import zlib
from collections import Counter

import cases
import plan
import pytest
import torch

import check

GPU = cases.present()
DEVICES = [GPU] if GPU else cases.DEVICES
LARGE_BYTES = 4 << 30


def parameters():
    """(case, device), one worker for those that take much memory."""
    for case in cases.CASES:
        for device in DEVICES:
            case_here = case if GPU else cases.small_case(case)
            marks = []
            if case_here is None:
                marks = [pytest.mark.skip("too large for a pretended device")]
            elif cases.memory_for(case_here) > LARGE_BYTES:
                marks = [pytest.mark.xdist_group("large")]
            yield pytest.param(
                case_here, device, marks=marks, id=f"{case.name.replace('×', 'x')}-{device}"
            )


@pytest.mark.parametrize("case, device_of_case", list(parameters()))
def test_case(target, case, device_of_case):
    schedule = zlib.crc32(f"{case}{device_of_case}".encode())
    if target.cuda and cases.memory_for(case) > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"needs {cases.memory_for(case) / 1e9:.0f} GB of GPU memory")
    cases.pretend(target, device_of_case, schedule)
    check.check_case(target, case)
    if not target.cuda:
        cases.check_alone(target, case, schedule)


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(1, metafunc.config.getoption("seeds") + 1))


def test_random_case(target, seed):
    case, device_of_case = cases.random_case(seed, GPU)
    cases.pretend(target, device_of_case, schedule=seed)
    if target.cuda:
        check.check_case(target, case)
    else:
        cases.check_alone(target, case, seed)


@pytest.mark.emulated
def test_every_branch_of_the_plan_is_taken(target, pytestconfig):
    """By the cases above. As their plans say: each is executed there."""
    if pytestconfig.getoption("seeds") < 100:
        pytest.skip("too few random cases")
    tried = [
        (small, device)
        for case in cases.CASES
        if (small := cases.small_case(case))
        for device in cases.DEVICES
    ]
    tried += [cases.random_case(seed) for seed in range(1, pytestconfig.getoption("seeds") + 1)]
    taken = Counter()
    for case, device in tried:
        cases.pretend(target, device, schedule=0)
        taken.update(plan.branches(target, case))
    missing = [branch for branch in plan.BRANCHES if not taken[branch]]
    assert not missing, f"taken by none of {len(tried)} cases: {missing}"
