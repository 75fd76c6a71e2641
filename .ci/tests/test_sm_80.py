"""What GPUs before sm_90 execute, on any GPU: other instructions, and more registers a thread.

Pretended devices show neither.
"""

import cases
import pytest

import check

pytestmark = pytest.mark.cuda
NAMES = (
    "small channels",
    "few channels",
    "plane 7×7",
    "plane 7x7, few large channels",
    "large channels",
    "middle channels, more than multiprocessors",
    "very large channels, odd plane",
    "channels-last, float16",
    "channels-last, C = 33",
    "unaligned by one element",
    "cumulative average, odd plane",
    "eval, large",
)
CASES = {case.name: case for case in cases.CASES}


@pytest.fixture(scope="module")
def sm_80_names(text, device):
    """The text compiled as far as PTX of compute capability 8.0."""
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
    check.check_case(target, CASES[name])
