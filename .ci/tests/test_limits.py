"""Sizes that the kernel's 32-bit numbers do not hold are refused; all others are not.

By the plan's operator and by meta tensors, which take no memory; on a GPU with room by real ones.
"""

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64

GPU = cases.present()
H100 = cases.Device(132, 227 << 10, (9, 0))
LAST = torch.channels_last
CHANNELS, ALL, GROUP = (
    "fewer than 2147483136 channels",
    "less than 64 GB",
    "vectors of 16 bytes in ",
)

REFUSED = [
    # shape, dtype, memory format, what the message says
    ((1, 2**31 + 64, 1, 2), F16, None, CHANNELS),
    ((2, 2**31 + 64, 1, 1), F16, None, CHANNELS),
    ((1, 2**31, 1, 2), F32, None, CHANNELS),
    ((1, 1, 1, 2**35), BF16, None, ALL),
    ((2**20, 2**20, 2**10, 2**10), F32, None, ALL),
    ((2, 1, 2**16, 2**16), F32, None, GROUP + "a channel's planes"),
    ((2, 8, 2**15, 2**15), F16, LAST, GROUP + "neighbouring channels"),
    ((2**30, 1, 1, 3), F16, None, GROUP + "a channel's planes"),  # 6 GB, two vectors a plane
    ((17, 1500000001, 1, 1), F16, None, "less than 64 GB in whole rows of 8 pixels"),
]
TAKEN = [
    ((2, 0, 2**20, 2**20), F32, None),
    ((0, 5, 2**20, 2**30), F16, None),
    ((0, 2**33, 1, 1), F16, None),
    ((2**30, 1, 1, 1), F16, None),  # 2 GB
    ((2**27, 4, 1, 4), F32, None),  # 8 GB
    ((2**30, 1, 1, 4), F32, None),
    ((2**17, 64, 2**5, 2**5), F16, LAST),
    ((2, 1, 2**15, 2**15 + 1), F64, None),
    ((2, 1, 2**15, 2**16), F32, None),
    ((2, 2**31 - 1024, 1, 1), F16, None),
    ((1, 2**31 - 1024, 1, 2), F16, None),
]


def plan_of(target, shape, dtype, memory_format, training=True):
    cases.pretend(target, GPU or H100, schedule=0)
    channels_last = memory_format == LAST
    return target.plan(shape, dtype, training, channels_last=channels_last)


def on_meta(target, shape, dtype, memory_format):
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    settings = {"affine": False, "track_running_stats": False}
    return target.names["ModelNew"](shape[1], device="meta", **settings)(x)


@pytest.mark.parametrize("shape, dtype, memory_format, said", REFUSED, ids=str)
def test_refused(target, shape, dtype, memory_format, said):
    for call in (plan_of, on_meta):
        with pytest.raises(RuntimeError, match=f"x must have .*{said}.*, got .*{shape[1]}"):
            call(target, shape, dtype, memory_format or torch.contiguous_format)


@pytest.mark.parametrize("shape, dtype, memory_format", TAKEN, ids=str)
def test_taken(target, shape, dtype, memory_format):
    memory_format = memory_format or torch.contiguous_format
    y = on_meta(target, shape, dtype, memory_format)
    assert y.shape == shape and y.is_contiguous(memory_format=memory_format)
    for training in (True, False):
        plan = plan_of(target, shape, dtype, memory_format, training)
        del plan["line_stride"]  # of 32 bits; the operator gives it as an int
        assert min(plan.values()) >= 0


@pytest.mark.parametrize("sizes", [(-1, 4, 9), (2, -4, 9), (2, 4, -9)], ids=str)
def test_negative_sizes_have_no_plan(target, sizes):
    make_plan = target.names["_fused_batch_norm"].fused_batch_norm_plan
    with pytest.raises(RuntimeError, match="N, C and HW must .*, got .*-"):
        make_plan(*sizes, F32, True, 0.1)


WIDE = {
    "four planes": ((195225987, 4, 1, 11), F32, None, False),
    "two lines of channels": ((2**17, 128, 2**5, 2**5), F16, LAST, True),
}


@pytest.mark.parametrize("wide", WIDE.values(), ids=WIDE)
def test_groups_are_only_as_wide_as_can_be_numbered(target, wide):
    assert 0 < plan_of(target, *wide)["vectors"] < 2**31


# ------------------------------------------------------------------------------------- on a GPU


def room_for(gb: float) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gb * 1e9:
        pytest.skip(f"needs {gb:.0f} GB of GPU memory")


def normalised(target, x):
    """y in eval with running_mean 1 and running_var 4, without eps to speak of."""
    C = x.shape[1]
    mean, var = x.new_ones(C), x.new_full((C,), 4)
    forward = target.names["_fused_batch_norm"].fused_batch_norm_forward
    return forward(x, None, None, 1e-9, mean, var, None, False)


def assert_normalised(x, y):
    """Piece by piece."""
    for got, want in zip(y.flatten().split(1 << 28), x.flatten().split(1 << 28)):
        assert torch.equal(got, (want - 1) / 2)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(1, 2**31 + 64, 1, 2), (2, 2**31 + 64, 1, 1)], ids=str)
def test_too_many_channels(target, shape):
    room_for(10)
    x = torch.empty(shape, dtype=F16, device="cuda")
    with pytest.raises(RuntimeError, match=CHANNELS):
        target.names["_fused_batch_norm"].fused_batch_norm_forward(x, None, None)
    assert (torch.zeros(3, device="cuda") + 1).sum().item() == 3


@pytest.mark.cuda
def test_pixels_of_more_than_2_to_32_elements_together(target):
    room_for(8)
    x = torch.randint(-8, 8, (1, 613566757, 1, 1), device="cuda", dtype=torch.int8).to(F16)
    assert_normalised(x, normalised(target, x))


@pytest.mark.cuda
def test_as_many_channels_as_there_may_be(target):
    room_for(80)
    x = torch.ones(2, 2**31 - 1024, 1, 1, dtype=F16, device="cuda")
    x[1].neg_()
    y = target.names["_fused_batch_norm"].fused_batch_norm_forward(x, None, None)
    for got, want in zip(y.flatten().split(1 << 28), x.flatten().split(1 << 28)):
        assert torch.equal(got, want)


@pytest.mark.cuda
def test_packs_of_planes_of_more_than_2_to_31_vectors(target):
    room_for(75)
    x = torch.empty(195225987, 4, 1, 11, device="cuda").random_(-8, 8)
    assert_normalised(x, normalised(target, x))
