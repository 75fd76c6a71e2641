"""What is refused: the exception's type, as nn.BatchNorm2d's where it has one, and what it says."""

import pytest
import torch
from cases import F16, F32, F64


def module(*shape, C=4, training=True, params=F32, dtype=F32, on=None):
    """Calls ModelNew(C) with x of the shape."""

    def call(target):
        x = torch.ones(*shape, dtype=dtype, device=on or target.device)
        target.model(C, dtype=params).train(training)(x)

    return call


def bound(*, on=None, **lengths):
    """Calls the bound function with 4 channels. lengths: of arguments, or (length, type)."""

    def call(target):
        made = {}
        for name, given in lengths.items():
            length, dtype = given if isinstance(given, tuple) else (given, F32)
            made[name] = torch.ones(length, dtype=dtype, device=on or target.device)
        x = torch.ones(2, 4, 3, 3, device=target.device)
        absent = {"gamma": None, "beta": None}
        target.names["_fused_batch_norm"].fused_batch_norm_forward(x, **(absent | made))

    return call


BUFFERS = {"running_mean": 4, "running_var": 4}
INT32, INT64 = torch.int32, torch.int64
REFUSED = {
    "x with 3 dimensions": (ValueError, "x must .*4-?D.*got", module(2, 4, 3)),
    "x with 5 dimensions": (ValueError, "x must .*4-?D.*got", module(2, 4, 3, 3, 3)),
    "x with another C": (RuntimeError, "must .*got", module(2, 5, 3, 3)),
    "x with another C, eval": (RuntimeError, "must .*got", module(2, 5, 3, 3, training=False)),
    "x of an integer type": (RuntimeError, "x must .*got", module(2, 4, 3, 3, dtype=INT32)),
    "x float16, parameters float64": (
        RuntimeError,
        "must .*got",
        module(2, 4, 3, 3, params=F64, dtype=F16),
    ),
    "x float32, parameters float16": (RuntimeError, "must .*got", module(2, 4, 3, 3, params=F16)),
    "one value per channel in training": (
        ValueError,
        "more than 1 value|x must",
        module(1, 4, 1, 1),
    ),
    "gamma of another length": (RuntimeError, "gamma must .*got", bound(gamma=5, beta=4)),
    "beta of another length": (RuntimeError, "beta must .*got", bound(gamma=4, beta=3)),
    "running_mean of another type": (
        RuntimeError,
        "running_mean must .*got",
        bound(running_mean=(4, INT64), running_var=4),
    ),
    "running_var of another length": (
        RuntimeError,
        "running_var must .*got",
        bound(running_mean=4, running_var=2),
    ),
    "num_batches_tracked of another type": (
        RuntimeError,
        "num_batches_tracked must .*got",
        bound(**BUFFERS, num_batches_tracked=1),
    ),
}
REFUSED_ON_GPU = {
    "x on the CPU": (RuntimeError, "must .*device.*got", module(2, 4, 3, 3, on="cpu")),
    "gamma on the CPU": (RuntimeError, "gamma must .*got", bound(gamma=4, beta=4, on="cpu")),
}


@pytest.mark.parametrize("kind, message, call", REFUSED.values(), ids=REFUSED)
def test_refused(target, kind, message, call):
    with pytest.raises(kind, match=message):
        call(target)


@pytest.mark.cuda
@pytest.mark.parametrize("kind, message, call", REFUSED_ON_GPU.values(), ids=REFUSED_ON_GPU)
def test_refused_on_a_gpu(target, kind, message, call):
    with pytest.raises(kind, match=message):
        call(target)
