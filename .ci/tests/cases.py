"""What the tests run: the table of cases, random cases, and the devices that are pretended.

The type of a case, the cases that a user sees, the oracle and the rule stand in check.py. One table
serves the GPU and the pretended devices: those take `small` instead of `shape`, where it is given;
a case too large for them says small=None.
"""

import math
import random
from dataclasses import astuple, dataclass, replace

import torch
from texts import plan_seed
from torch.utils._python_dispatch import TorchDispatchMode

import check
from check import Case

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@dataclass(frozen=True)
class Device:
    multiprocessors: int
    shared_bytes: int  # that one block may have
    capability: tuple[int, int]
    usable: int | None = None  # multiprocessors that launches may use, if fewer

    def __str__(self):
        major, minor = self.capability
        return f"{self.multiprocessors} SMs {self.shared_bytes >> 10} KB sm_{major}{minor}"


# So small that tiny tensors walk every path of the plan.
DEVICES = [
    Device(3, 16 << 10, (9, 0)),
    Device(1, 48 << 10, (7, 5)),
    Device(7, 99 << 10, (8, 6)),
    Device(2, 227 << 10, (10, 0)),
    Device(5, 32 << 10, (8, 0)),
    Device(1, 163 << 10, (8, 0)),
    Device(40, 16 << 10, (9, 0)),
]
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (9, 0), (9, 0), (9, 0), (10, 0), (12, 0))


def pretend(target: check.Target, device: Device, schedule: int) -> None:
    """From the next launch on. schedule: the seed of who runs when. Nothing to do on a GPU."""
    if not target.cuda:
        target.emulator.set_device(*astuple(device))
        target.emulator.set_schedule(schedule)


def check_random(target: check.Target, seed: int, *, any_plan: bool) -> None:
    """The random case of this seed on its pretended device.

    any_plan: by the plan of this seed; the target's text is one of any_plan_text.
    """
    case, device = random_case(seed)
    pretend(target, device, schedule=seed)
    if any_plan:
        plan_seed(target.names).value = seed
    check_alone(target, case, seed)


def present() -> Device | None:
    """The GPU of this machine; None without one."""
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(0)
    return Device(p.multi_processor_count, p.shared_memory_per_block_optin, (p.major, p.minor))


def small_case(case: Case) -> Case | None:
    """The case as pretended devices take it; None if it is too large for them."""
    return case if case.small == "same" else case.small and replace(case, shape=case.small)


# ------------------------------------------------------------------------------- values, layouts


def one(value: float):
    """Normal values, and `value` in the middle of the channel in the middle."""

    def fill(shape, normal):
        x = normal(*shape)
        x[tuple(size // 2 for size in shape)] = value
        return x

    return fill


def far_means(shape, normal):
    """Means of 1 to 1000, to 1e7 for float64, on neighbouring channels."""
    x = normal(*shape)
    decades = torch.arange(shape[1], device=x.device).view(1, -1, 1, 1) % (
        8 if x.dtype == F64 else 4
    )
    return x + 10.0**decades


def outlier_image(shape, normal):
    x = normal(*shape)
    x[0] += 1e6
    return x


def channel_slice(x: torch.Tensor) -> torch.Tensor:
    edge = torch.full_like(x[:, :1], math.nan)
    return torch.cat([edge, x, edge], dim=1)[:, 1:-1]


def unaligned_by(elems: int):
    """x that starts so many elements behind a 16-byte boundary."""
    return lambda x: torch.cat([x.new_zeros(elems), x.flatten()])[elems:].view(x.shape)


RANDOM_DATA = {
    "normal": lambda shape, normal: normal(*shape),
    "mean 200": lambda shape, normal: normal(*shape) + 200,
    "tiny": lambda shape, normal: normal(*shape) * 3e-3,
    "far means": far_means,
    **{f"one {value}": one(value) for value in (1e3, -math.inf, math.nan)},
}
check.DATA |= RANDOM_DATA
check.DATA |= {
    "mean 1e4": lambda shape, normal: normal(*shape) + 1e4,
    "outlier middle": one(1e6),
    "outlier last": check.planted(((-1, 0, -1, -1), -1e6)),
    "outlier image": outlier_image,
}
UNALIGNED = {f"unaligned by {elems}": unaligned_by(elems) for elems in (2, 3, 4, 5, 7, 8)}
check.LAYOUTS |= UNALIGNED
check.LAYOUTS |= {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channel_slice": channel_slice,
    "expanded": lambda x: x[:1].expand(x.shape),
}


def batch_slice(x: torch.Tensor) -> torch.Tensor:
    """Channels-last, without the first image: dense, but it may start within a 16-byte vector."""
    whole = torch.cat([x[:1], x]).contiguous(memory_format=torch.channels_last)
    return whole[1:]


def pixels_unaligned(x: torch.Tensor) -> torch.Tensor:
    """Channels-last, one element behind a 16-byte boundary."""
    return unaligned_by(1)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


check.LAYOUTS |= {"channels_last_slice": batch_slice, "channels_last_unaligned": pixels_unaligned}
CHANNELS_LAST = ("channels_last", "channels_last_slice", "channels_last_unaligned")
COPIED = ("strided", "transposed", "channel_slice", "expanded")


# ------------------------------------------------------------------------------------ the table

MORE_CASES = [
    # Ordinary shapes of every kind of plan: what is on chip per channel grows downwards.
    Case("small channels, few images", (32, 128, 28, 28), small=(2, 7, 12, 12)),
    Case("middle channels, as few as teams", (32, 64, 112, 112), small=(5, 2, 28, 20)),
    Case("middle channels, more than multiprocessors", (32, 256, 40, 40), small=(4, 8, 24, 24)),
    Case("very large channels, odd plane", (64, 8, 511, 513), small=(5, 1, 95, 97)),
    Case("very large channels, float16", (64, 8, 512, 512), F16, F32, small=(7, 1, 128, 128)),
    Case("more than 2^31 elements", (64, 64, 725, 725), F16, F32, data="uniform", small=None),
    Case(
        "more than 2^31 elements in one channel",
        (3, 1, 26755, 26757),
        BF16,
        F32,
        data="uniform",
        small=None,
    ),
    # Types: x and y, then the parameters.
    Case("float16, float32 parameters", (16, 48, 32, 32), F16, F32, small=(3, 4, 8, 16)),
    Case("bfloat16, bfloat16 parameters", (16, 48, 32, 32), BF16, small=(3, 4, 8, 16)),
    Case("float64, float32 parameters", (3, 4, 8, 8), F64, F32),
    Case("float64, odd plane", (5, 7, 11, 13), F64),
    Case("float64, large channels", (16, 8, 256, 256), F64, small=(5, 2, 48, 48)),
    # Sizes: planes that are no multiple of a vector, and the smallest of everything.
    Case("plane 7x7, float16", (32, 512, 7, 7), F16, F32, small=(6, 9, 7, 7)),
    Case("plane 7x7, large channels", (256, 2048, 7, 7), small=(12, 16, 7, 7)),
    Case("plane 7x7, few large channels", (512, 64, 7, 7), small=(32, 4, 7, 7)),
    Case("plane 3x5", (9, 17, 3, 5)),
    Case("plane 1x1, bfloat16", (128, 10, 1, 1), BF16, F32),
    Case("odd plane, bfloat16", (7, 33, 101, 99), BF16, F32, small=(3, 2, 51, 49)),
    Case("C = 1", (16, 1, 64, 64), small=(8, 1, 32, 32)),
    Case("C = 5000", (4, 5000, 6, 6), small=(2, 500, 2, 2)),
    Case("N = 1", (1, 32, 224, 224), small=(1, 2, 64, 64)),
    Case("N = 1, HW = 2", (1, 3, 1, 2)),
    Case("N = 3000", (3000, 4, 4, 4), small=(1000, 2, 4, 4)),
    Case("few channels, two images", (2, 3, 1024, 1024), small=(1, 3, 96, 80)),
    Case("HW one less than a vector", (8, 16, 1, 1023), small=(3, 4, 1, 127)),
    Case("HW a power of two", (8, 16, 1, 1024), small=(3, 4, 1, 128)),
    Case("HW one more than a vector", (8, 16, 1, 1025), small=(3, 4, 1, 129)),
    Case("W = 0", (2, 5, 4, 0)),
    Case("N = 0, plane 1x1", (0, 5, 1, 1)),
    Case("N = 0, channels-last", (0, 5, 4, 4), layout="channels_last"),
    # Memory layouts.
    # On the first of DEVICES 17 lanes of a warp have a row more, behind a whole number of chains.
    Case("channels-last, lanes with a row more", (1, 8, 1, 21553), BF16, layout="channels_last"),
    Case(
        "channels-last, many pixels a thread",
        (64, 8, 511, 513),
        BF16,
        layout="channels_last",
        small=(4, 8, 173, 173),
    ),
    Case(
        "channels-last, float16",
        (16, 64, 28, 28),
        F16,
        F32,
        layout="channels_last",
        small=(3, 8, 6, 6),
    ),
    Case("channels-last, C = 3", (8, 3, 224, 224), layout="channels_last", small=(3, 3, 12, 14)),
    Case("channels-last, C = 33", (16, 33, 29, 31), layout="channels_last", small=(3, 33, 5, 7)),
    Case(
        "channels-last, C = 70, bfloat16",
        (16, 70, 29, 31),
        BF16,
        F32,
        layout="channels_last",
        small=(3, 70, 5, 7),
    ),
    Case(
        "channels-last, large channels",
        (16, 64, 256, 256),
        layout="channels_last",
        small=(3, 8, 24, 24),
    ),
    Case(
        "channels-last, a slice of the batch",
        (8, 17, 31, 33),
        layout="channels_last_slice",
        small=(3, 17, 5, 5),
    ),
    Case("channels-last, float64", (8, 6, 31, 33), F64, layout="channels_last", small=(3, 6, 5, 5)),
    Case(
        "eval, channels-last, C = 33",
        (16, 33, 29, 31),
        training=False,
        layout="channels_last",
        small=(9, 33, 15, 17),
    ),
    Case(
        "unaligned by one element, float16",
        (8, 16, 32, 32),
        F16,
        F32,
        layout="unaligned",
        small=(3, 3, 8, 8),
    ),
    Case("N and C exchanged", (8, 16, 32, 32), layout="transposed", small=(3, 3, 8, 8)),
    Case("slice of the channels", (8, 16, 32, 32), layout="channel_slice", small=(3, 3, 8, 8)),
    Case("one image repeated by stride 0", (8, 16, 32, 32), layout="expanded", small=(3, 3, 8, 8)),
    # Values on which careless sums fail.
    Case("mean/std = 1e4", (16, 64, 56, 56), data="mean 1e4", small=(4, 3, 16, 16)),
    Case(
        "mean/std = 1e6, large channels", (16, 16, 256, 256), data="mean 1e6", small=(5, 2, 64, 64)
    ),
    Case("mean/std = 1e6, odd plane", (7, 33, 31, 33), data="mean 1e6", small=(2, 3, 15, 17)),
    Case(
        "mean/std = 200, bfloat16",
        (16, 64, 56, 56),
        BF16,
        F32,
        data="mean 200",
        small=(4, 3, 16, 16),
    ),
    Case(
        "an outlier of 1e6 first in a large channel",
        (64, 1, 224, 224),
        data="outlier first",
        small=(1, 1, 512, 512),
    ),
    Case(
        "an outlier of 1e6 in the middle",
        (16, 8, 56, 56),
        data="outlier middle",
        small=(4, 3, 16, 16),
    ),
    Case("an outlier of 1e6 last", (16, 8, 56, 56), data="outlier last", small=(4, 3, 16, 16)),
    Case("an image of outliers", (3000, 4, 4, 4), data="outlier image", small=(1000, 2, 4, 4)),
    Case("var near eps", (16, 8, 56, 56), data="tiny", small=(4, 3, 16, 16)),
    Case(
        "NaN, inf, -inf in one channel each, float16",
        (16, 8, 56, 56),
        F16,
        F32,
        data="not finite",
        small=(4, 5, 16, 16),
    ),
    # Settings and the running buffers.
    Case("three steps", (16, 32, 14, 14), steps=3, small=(3, 4, 6, 6)),
    Case(
        "three steps, cumulative average",
        (16, 32, 14, 14),
        steps=3,
        settings=(("momentum", None),),
        small=(3, 4, 6, 6),
    ),
    Case(
        "cumulative average, large channels",
        (16, 64, 256, 256),
        steps=2,
        settings=(("momentum", None),),
        small=(5, 2, 64, 64),
    ),
    Case(
        "cumulative average, odd plane",
        (7, 33, 101, 99),
        steps=2,
        settings=(("momentum", None),),
        small=(3, 2, 51, 49),
    ),
    Case("momentum = 1", (16, 32, 14, 14), settings=(("momentum", 1.0),), small=(3, 4, 6, 6)),
    Case("momentum = 0", (16, 32, 14, 14), settings=(("momentum", 0.0),), small=(3, 4, 6, 6)),
    Case("momentum = -0.5", (16, 32, 14, 14), settings=(("momentum", -0.5),), small=(3, 4, 6, 6)),
    Case("eps = 0.3", (16, 32, 14, 14), settings=(("eps", 0.3),), small=(3, 4, 6, 6)),
    Case("not affine", (16, 32, 14, 14), settings=(("affine", False),), small=(3, 4, 6, 6)),
    Case(
        "no running buffers",
        (16, 32, 14, 14),
        settings=(("track_running_stats", False),),
        small=(3, 4, 6, 6),
    ),
    Case("eval, small channels", (16, 32, 28, 28), training=False, small=(2, 5, 8, 12)),
    Case(
        "eval, odd plane, bfloat16", (16, 32, 7, 7), BF16, F32, training=False, small=(3, 4, 7, 7)
    ),
    Case("eval, plane 7x7", (32, 2048, 7, 7), training=False, small=(16, 8, 7, 7)),
    Case("eval, large", (16, 64, 256, 256), training=False, small=(5, 3, 64, 64)),
    Case("eval, large, odd plane", (16, 64, 255, 257), training=False, small=(5, 3, 63, 65)),
    Case(
        "eval, channels-last",
        (16, 32, 28, 28),
        training=False,
        layout="channels_last",
        small=(3, 4, 8, 8),
    ),
    Case("eval, whole pixels", (2, 64, 4, 4), training=False, layout="channels_last"),
    Case("eval, one value per channel", (1, 6, 1, 1), training=False),
    Case("eval, packed planes longer than a block", (14, 12, 1, 417), training=False),
    Case("eval, N = 0", (0, 6, 4, 4), training=False),
    Case(
        "eval, no running buffers",
        (16, 32, 14, 14),
        training=False,
        settings=(("track_running_stats", False),),
        small=(3, 4, 6, 6),
    ),
    Case(
        "eval, not affine",
        (16, 32, 14, 14),
        training=False,
        settings=(("affine", False),),
        small=(3, 4, 6, 6),
    ),
]


CASES = [*check.CASES, *MORE_CASES]


def memory_for(case: Case) -> int:
    """Bytes that checking it takes, roughly: x, both y, the making of x, the oracle's pieces."""
    elems = math.prod(case.shape)
    made_wide = 4 if case.data != "uniform" else 0
    piece = 6 * 8 * min(elems, check.PIECE_ELEMS)
    return elems * (3 * case.dtype.itemsize + 2 * made_wide) + piece


# --------------------------------------------------------------------------------- random cases


# Seeds of random cases by plans that are rare: vectors read again in the kernel with many registers
# or for longer than a chain, many slots, several stages of whole planes, pixels not aligned, eval
# with groups that do not divide C, nothing to do. The tests and the mutants take these, too.
RARE_SEEDS = (66, 87, 123, 132, 143, 158, 179, 185, 233, 269, 298, 303, 378, 499, 545, 699, 925)
RARE_SEEDS += (1437, 2769, 4119, 5480)


def random_case(seed: int, gpu: Device | None = None) -> tuple[Case, Device]:
    """The case of this seed, and the pretended device to run it on, or `gpu`.

    Drawn so that every structure of the plan comes often. That depends on how many channels, or
    packs of them, there are for a multiprocessor, and what share of its shared memory each takes.
    """
    r = random.Random(seed)
    dtype = r.choice((F32, F32, F16, BF16, F64))
    large = gpu is not None or r.random() < 0.35  # shared memory for all of a middle channel
    device = gpu or Device(
        r.choice((1, 1, 2, 2, 3) if large else (1, 2, 3, 3, 5, 7)),
        1024 * r.choice((163, 227) if large else (16, 16, 24, 24, 32, 48, 64, 99)),
        r.choice(CAPABILITIES),
    )
    any_plane, odd = (
        (r.randint(1, 20), r.randint(1, 40)),
        (2 * r.randint(0, 10) + 1, 2 * r.randint(1, 15) + 1),
    )
    planes = ((1, 1), (1, 2), (7, 7), (8, 8), (4, 12), (16, 16), (5, 64), (33, 31), (56, 56))
    gpu_planes = (
        (14, 14),
        (28, 28),
        (112, 112),
        (1, r.randint(1, 5000)),
        (r.randint(1, 300), r.randint(1, 300)),
    )
    H, W = r.choice((*planes, odd, odd, odd, odd, odd, any_plane, *(gpu_planes if gpu else ())))

    vector_elems = 16 // dtype.itemsize
    pack = (
        vector_elems // math.gcd(H * W, vector_elems) if r.random() < (0.4 if large else 0.8) else 1
    )
    few = r.randint(1, device.multiprocessors)
    more = r.randint(device.multiprocessors + 1, 2 * device.multiprocessors + 1)
    packs = r.choice(
        (few, few, more, more, more) if large else (1, few, more, more, more, r.randint(1, 300))
    )
    # Shares of 1 to 1.15, of which two blocks take a half each, make the largest blocks.
    log_shares = (
        ((-1.1, -0.6), (-1.1, -0.6), (0, 0.2), (-1, 1.6))
        if large
        else ((-8, -2), (-3, 0), (-2, 0.5), (0, 3))
    )
    share_bytes = device.shared_bytes * 2 ** r.uniform(
        *r.choice((*log_shares, (-8, 7)) if gpu else log_shares)
    )
    most_elems = 2 ** (24 if gpu else 17 if large else r.randint(13, 16))
    C = max(1, min(pack * packs, most_elems // (H * W)))
    N = max(1, int(min(share_bytes / dtype.itemsize / pack, most_elems / C) / (H * W)))
    if r.random() < 0.1:
        N = min(N, r.randint(1, 4))
    if N * H * W == 1:
        N = 2
    data = r.choice(("mixed", "uniform", "constant", "outlier first", *RANDOM_DATA))
    unaligned = r.choice(("unaligned", *UNALIGNED))
    layout = r.choice(
        ("contiguous",) * 6 + ("channels_last", *CHANNELS_LAST * 2, *COPIED, unaligned, unaligned)
    )
    if layout in CHANNELS_LAST and r.random() < 0.4:  # large groups, many blocks to a team
        C = r.choice((31, 32, 48, 64, 96, 128, 130))
        N = max(2, int(most_elems / C / (H * W)))
        device = gpu or replace(device, multiprocessors=r.choice((2, 12, 25)))
    if layout in ("channels_last", "channels_last_unaligned") and r.random() < 0.7:
        # Whole pixels, whose vectors need no masks where x is aligned.
        C = vector_elems * r.choice((1, 2, 3, 4, 8, 8, 10, 16, 24, 32))
        N = max(2, int(min(share_bytes * device.multiprocessors / dtype.itemsize, most_elems)))
        N = max(2, N // (C * H * W) if r.random() < 0.8 else 2)
    if not gpu and r.random() < 0.05:
        device = replace(device, usable=r.randint(1, device.multiprocessors))
    if r.random() < 0.01:
        N, data, layout = 0, "uniform", "contiguous"
    case = Case(
        f"random {seed}",
        (N, C, H, W),
        dtype,
        params=r.choice((dtype, dtype if dtype == F64 else F32)),  # PyTorch cannot do the mix
        data=data,
        layout=layout,
        training=r.random() < 0.8,
        steps=r.choice((1, 1, 2)),
        settings=(
            ("momentum", r.choice((0.1, 0.1, None, 1.0, 0.0))),
            ("eps", r.choice((1e-5, 1e-5, 1e-3, 0.5))),
            ("affine", r.random() < 0.8),
            ("track_running_stats", r.random() < 0.85),
        ),
    )
    return case, device


def related() -> dict[str, tuple[tuple[Case, Device], tuple[Case, Device]]]:
    """Two cases that differ in one thing that a plan depends on: the first one's is wrong for the
    second. No shape is that of another pair: plans are remembered."""
    device = Device(5, 32 << 10, (9, 0))

    def pair(number, then=None, on=device, **first):
        shape = (2, 3, 32, 4 * (20 + number))
        case = Case(f"related {number}", **{"shape": shape, **first})
        return (case, device), (replace(case, **(then or {})), on)

    buffers = (("track_running_stats", True),)
    return {
        "misalignment": pair(1, {"layout": "unaligned"}),
        "training": pair(2, {"training": True}, training=False),
        "dtype": pair(3, {"dtype": F16, "params": F16}),
        "layout of memory": pair(4, {"layout": "channels_last"}),
        "cumulative average": pair(5, {"settings": (*buffers, ("momentum", None))}),
        "multiprocessors": pair(6, on=Device(1, 32 << 10, (9, 0)), settings=(("momentum", None),)),
        "shared memory": pair(7, {}, Device(5, 16 << 10, (9, 0)), shape=(6, 3, 32, 108)),
        "N": pair(8, {"shape": (3, 3, 32, 112)}),
        "C": pair(9, {"shape": (2, 4, 32, 116)}),
        "HW": pair(10, {"shape": (2, 3, 33, 120)}),
    }


RELATED = related()


# ------------------------------------------------------------------------------------- one case


SLACK = 5  # roundings beyond the rule for a peer as good as it can be; 3,000 random cases needed 2


class Statistics(TorchDispatchMode):
    """Keeps what the operator returns for backward: mean and inv_std."""

    def __init__(self, target: check.Target):
        super().__init__()
        self.operator = target.names["_fused_batch_norm"].train.default
        self.statistics = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is self.operator:
            self.statistics = result[1]
        return result


def check_alone(target: check.Target, case: Case, seed: int) -> None:
    """One forward on a pretended device, all that the kernel writes, by a rule without a peer.

    That would be PyTorch on the CPU, which sums in float64, but errs where means are large.
    """
    dtype = case.params or case.dtype
    ours, theirs = check.make_pair(
        target, case.shape[1], dtype, case.training, seed, **dict(case.settings)
    )
    for model in (ours, theirs):
        if model.num_batches_tracked is not None:
            model.num_batches_tracked.fill_(seed % 4)
    x = check.make_x(case, target.device, seed)
    with torch.no_grad(), Statistics(target) as watched:
        y = ours(x)
    check.check_form(x, y)
    oracle = check.make_oracle(x, theirs)
    oracle.own_error += SLACK
    y_want, y_unit = oracle.y(x)
    lost = 0
    # No wider type holds the mean of a float64 x, or its sums, whose error is a random walk's.
    if x.dtype == F64 and x.numel():
        oracle.own_error += 3 * math.sqrt(x.numel() / x.shape[1])
        lost = (oracle.mean * oracle.inv_std).abs()
        y_unit = y_unit + check.per_channel(oracle.gamma.abs() * lost)
    rule = {"own_error": oracle.own_error}
    check.judge("y", y, None, y_want, y_unit, **rule)
    if (ours.training or ours.running_mean is None) and x.numel():  # else none are written
        mean, inv_std = watched.statistics
        mean_want = oracle.mean + oracle.mean_rest
        check.judge("mean", mean, None, mean_want, mean_want.abs() + torch.sqrt(oracle.var), **rule)
        check.judge("inv_std", inv_std, None, oracle.inv_std, oracle.inv_std * (1 + lost), **rule)
    check.judge_buffers(ours, theirs, theirs, oracle, x, torch_ran=False)
