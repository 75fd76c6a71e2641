"""Forwards against float64: the table and random cases, on the GPU or on pretended devices."""

import fcntl
import zlib
from collections import Counter
from dataclasses import replace

import cases
import plan
import pytest
import torch
from texts import plan_seed

import check

GPU = cases.present()
DEVICES = [GPU] if GPU else cases.DEVICES
LARGE_BYTES = 4 << 30


def test_no_case_of_the_table_is_there_twice():
    """Under another name, or as the same small form of another shape."""
    forms = [case if GPU else cases.small_case(case) for case in cases.CASES]
    names = Counter(case.name for case in cases.CASES)
    same = Counter(replace(form, name="", small=None) for form in forms if form)
    assert max(names.values()) == max(same.values()) == 1, (
        names.most_common(4),
        same.most_common(4),
    )


def parameters():
    for case in cases.CASES:
        name = case.name.replace("×", "x")
        case = case if GPU else cases.small_case(case)
        if case is None:
            too_large = pytest.mark.skip("too large for a pretended device")
            yield pytest.param(None, None, marks=too_large, id=name)
        for device in DEVICES if case else ():
            yield pytest.param(case, device, id=f"{name}-{device}")


@pytest.fixture
def room(target, case, tmp_path_factory):
    """The GPU memory that the case takes. Of those that take much, one runs at a time."""
    nbytes = cases.memory_for(case)
    if not target.cuda or nbytes < LARGE_BYTES:
        yield
        return
    lock = tmp_path_factory.getbasetemp().parent / "room.lock"
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if nbytes > torch.cuda.mem_get_info()[0]:
            pytest.skip(f"needs {nbytes / 1e9:.0f} GB of GPU memory")
        yield
        torch.cuda.empty_cache()


@pytest.mark.parametrize("case, device_of_case", list(parameters()))
@pytest.mark.usefixtures("room")
def test_case(target, case, device_of_case):
    schedule = zlib.crc32(f"{case}{device_of_case}".encode())
    cases.pretend(target, device_of_case, schedule)
    check.check_case(target, case)
    if not target.cuda:
        cases.check_alone(target, case, schedule)


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        seeds = {*range(1, metafunc.config.getoption("seeds") + 1), *cases.RARE_SEEDS}
        metafunc.parametrize("seed", sorted(seeds))


def check_random(target, seed, any_plan):
    if target.cuda:
        check.check_case(target, cases.random_case(seed, GPU)[0])
    else:
        cases.check_random(target, seed, any_plan=any_plan)


def test_random_case(target, seed):
    check_random(target, seed, any_plan=False)


def test_random_case_by_any_plan(target, any_plan_model_new, seed):
    """Of tiny devices the planner takes few structures; so each is executed."""
    target.names = any_plan_model_new
    plan_seed(target.names).value = seed
    check_random(target, seed, any_plan=True)


@pytest.mark.parametrize("first, then", cases.RELATED.values(), ids=cases.RELATED)
def test_a_plan_is_remembered_for_its_like_only(target, first, then):
    for case, device_of_case in (first, then):
        cases.pretend(target, GPU or device_of_case, schedule=0)
        cases.check_alone(target, case, seed=0)


@pytest.mark.emulated
def test_every_branch_of_the_plan_is_taken(target, any_plan_model_new, pytestconfig):
    """By the cases above. As their plans say: each is executed there."""
    if (seeds := pytestconfig.getoption("seeds")) < 500:
        pytest.skip("too few random cases")
    tried = [
        (small, device, None)
        for case in cases.CASES
        if (small := cases.small_case(case))
        for device in cases.DEVICES
    ]
    tried += [(*cases.random_case(seed), of) for seed in range(1, seeds + 1) for of in (None, seed)]
    taken, as_planned = Counter(), target.names
    for case, device, seed_of_plan in tried:
        target.names = any_plan_model_new if seed_of_plan else as_planned
        if seed_of_plan:
            plan_seed(target.names).value = seed_of_plan
        cases.pretend(target, device, schedule=0)
        taken.update(plan.branches(target, case))
    missing = [branch for branch in plan.BRANCHES if not taken[branch]]
    assert not missing, f"taken by none of {len(tried)} cases: {missing}"
