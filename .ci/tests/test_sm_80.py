"""The path of GPUs without bulk copies and clusters: on such pretended devices, and on any GPU."""

import cases
import plan
import pytest

import check

NAMES = (
    "small channels",
    "few channels",
    "plane 7×7",
    "plane 7x7, few large channels",
    "large channels",
    "middle channels, more than multiprocessors",
    "very large channels, odd plane",
    "unaligned by one element",
    "cumulative average, odd plane",
    "eval, large",
)
CASES = {case.name: case for case in cases.CASES}


@pytest.fixture(scope="module")
def sm_80_names(text, device, model_new):
    """The text compiled as far as PTX of compute capability 8.0; where pretended, as it is."""
    if device == "cpu":
        return model_new
    names = check.execute(check.sm_80_text(text))
    try:
        check.Target(names, device).plan((2, 4, 3, 3), cases.F32)
    except RuntimeError as error:
        if "toolchain" in str(error):
            pytest.skip("the driver is too old to compile the PTX of this nvcc")
        raise
    return names


@pytest.mark.parametrize("name", NAMES)
def test_sm_80(target, sm_80_names, name):
    target.names = sm_80_names
    case = CASES[name] if target.cuda else cases.small_case(CASES[name])
    cases.pretend(target, cases.Device(5, 32 << 10, (8, 0)), schedule=1)

    check.check_case(target, case)
