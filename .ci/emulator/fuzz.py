"""Random cases for the emulated kernel: everything about a case is drawn from its seed, and compared with float64."""

import dataclasses
import math
import random

import torch

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float64: 0.0}  # subnormal steps
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (9, 0), (9, 0), (9, 0), (10, 0), (12, 0))
STRUCTURES = ("resident", "packed", "ring", "hold")
# Every run of some hundred cases must take each of these: see branches().
BRANCHES = (
    *(f"{structure}, training, {team}" for structure in STRUCTURES[:2] for team in ("one block", "cluster")),
    "resident, training, cooperative",
    *(f"{structure}, turns {size}" for structure in STRUCTURES[:2] for size in ("0", "more")),
    *(f"{structure}, eval, {team}" for structure in STRUCTURES[:2] for team in ("one block", "several blocks")),
    *(f"{structure}, {field} {size}" for structure in STRUCTURES[2:] for field in ("bulk", "cooperative") for size in "01"),
    *(f"{structure}, {field} {size}" for structure in STRUCTURES[2:] for field in ("team", "teams", "rounds") for size in ("1", "more")),
    *(f"ring, tiles {size}" for size in ("1", "more")),
    *(f"hold, streamed {size}" for size in ("0", "more")),
    *(f"{structure}, {edges}" for structure in ("resident", "ring", "hold") for edges in ("masked edges", "whole vectors")),
    *(f"layout {layout}" for layout in ("contiguous", "channels_last", "unaligned", "strided")),
    *("affine", "not affine", "cumulative average", "moving average"),
)


@dataclasses.dataclass
class Case:
    seed: int
    multiprocessors: int
    shared_bytes: int
    capability: tuple
    shape: tuple
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    layout: str  # contiguous, channels_last, unaligned, strided
    values: str
    training: bool
    steps: int
    options: dict  # of ModelNew

    def __str__(self):
        kinds = [str(t).removeprefix("torch.") for t in (self.dtype, self.parameter_dtype)]
        mode = f"{self.steps} training steps" if self.training else "eval"
        major, minor = self.capability
        device = f"{self.multiprocessors} multiprocessors, {self.shared_bytes // 1024} KB, {major}.{minor}"
        return f"seed {self.seed}: {'x'.join(map(str, self.shape))} {' '.join(kinds)} {self.layout} {self.values} {mode} {self.options} on {device}"


def draw(seed):
    """The case of this seed."""
    r = random.Random(seed)
    dtype = r.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64))
    large = r.random() < 0.35  # multiprocessors with shared memory for a ring of many tiles
    multiprocessors = r.choice((1, 1, 2, 2, 3) if large else (1, 2, 3, 3, 5, 7))
    shared_bytes = 1024 * r.choice((163, 227) if large else (16, 16, 24, 24, 32, 48, 64, 99))
    any_plane, odd = (r.randint(1, 20), r.randint(1, 40)), (2 * r.randint(0, 10) + 1, 2 * r.randint(1, 15) + 1)
    planes = ((1, 1), (1, 2), (7, 7), (8, 8), (4, 12), (16, 16), (5, 64), (33, 31), (56, 56))
    H, W = r.choice((*planes, odd, odd, odd, odd, odd, any_plane))
    # The plan depends on how many channels, or packs of them, there are for a multiprocessor, and on what share of its
    # shared memory each takes. Shares of 1 to 1.15, of which two blocks take a half each, make the blocks with the most threads.
    size = 16 // dtype.itemsize
    pack = size // math.gcd(H * W, size) if r.random() < (0.4 if large else 0.8) else 1
    few, more = r.randint(1, multiprocessors), r.randint(multiprocessors + 1, 2 * multiprocessors + 1)
    packs = r.choice((few, few, more, more, more) if large else (1, few, more, more, more, r.randint(1, 300)))
    ranges = ((-1.1, -0.6), (-1.1, -0.6), (0, 0.2), (-1, 1.6)) if large else ((-8, -2), (-3, 0), (-2, 0.5), (0, 3))
    share = 2 ** r.uniform(*r.choice(ranges))
    most = 2 ** (17 if large else r.randint(13, 16))  # elements
    C = max(1, min(pack * packs, most // (H * W)))
    N = max(1, int(min(share * shared_bytes / dtype.itemsize / pack, most / C) / (H * W)))
    if N * H * W == 1:
        N = 2
    momentum = r.choice((0.1, 0.1, None, 1.0, 0.0))
    options = dict(momentum=momentum, eps=r.choice((1e-5, 1e-5, 1e-3, 0.5)), affine=r.random() < 0.8, track_running_stats=r.random() < 0.85)
    return Case(
        seed=seed,
        multiprocessors=multiprocessors,
        shared_bytes=shared_bytes,
        capability=r.choice(CAPABILITIES),
        shape=(N, C, H, W),
        dtype=dtype,
        parameter_dtype=r.choice((dtype, torch.float32)),
        layout=r.choice(("contiguous",) * 4 + ("channels_last", "unaligned", "strided")),
        values=r.choice(("normal", "normal", "far mean", "constant channel", "outlier", "infinite", "nan")),
        training=r.random() < 0.75,
        steps=r.choice((1, 1, 2)),
        options=options,
    )


def make_x(case, generator):
    N, C, H, W = case.shape
    x = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    if case.values == "far mean":
        x += 10.0 ** (torch.arange(C).view(1, -1, 1, 1) % (4 if case.dtype != torch.float64 else 8))
    elif case.values == "constant channel":
        x[:, C // 2] = 3.1
    elif case.values in ("outlier", "infinite", "nan"):
        special = {"outlier": 3e4, "infinite": float("-inf"), "nan": float("nan")}[case.values]
        x[N // 2, C // 2, H // 2, W // 2] = special
    x = x.to(case.dtype)
    if case.layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if case.layout == "unaligned":
        shift = 1 + case.seed % (16 // x.element_size())  # from the 16-byte boundary, up to all of a vector
        return torch.empty(x.numel() + shift, dtype=x.dtype)[shift:].view(case.shape).copy_(x)
    if case.layout == "strided":
        return torch.empty(N, C, W, 2 * H, dtype=x.dtype).transpose(2, 3)[:, :, ::2].copy_(x)
    return x


def check_close(name, got, expected, bound):
    """Compares with the expected float64 tensor, element by element; not finite must meet not finite."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    expected_finite = torch.isfinite(expected.to(got.dtype)) & torch.isfinite(expected)
    wide = got.double()
    wrong = torch.where(expected_finite, ~((wide - expected).abs() <= bound), torch.isfinite(wide))
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(where)}: expected {expected[where].item():.9g} within {torch.as_tensor(bound).expand(expected.shape)[where].item():.3g}, "
            f"got {wide[where].item():.9g}; {int(wrong.sum())} of {wrong.numel()} wrong"
        )


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps what the operator returns beside y: mean and inv_std."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.saved = operator, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is self.operator:
            self.saved = result[1]
        return result


def run(emulator, namespace, case):
    """Runs the case; raises AssertionError or the emulator's RuntimeError. Returns the names of the branches that it took."""
    emulator.set_device(case.multiprocessors, case.shared_bytes, case.capability)
    emulator.set_schedule(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    N, C, H, W = case.shape
    module = namespace["ModelNew"](C, dtype=case.parameter_dtype, **case.options).train(case.training)
    affine, tracked = case.options["affine"], case.options["track_running_stats"]
    gamma, beta = torch.ones(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    running_mean, running_var = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64)
    with torch.no_grad():
        if affine:
            module.gamma.copy_(torch.randn(C, generator=generator))
            module.beta.copy_(torch.randn(C, generator=generator))
            gamma, beta = module.gamma.double(), module.beta.double()
        if tracked:
            module.running_mean.copy_(torch.randn(C, generator=generator))
            module.running_var.copy_(torch.rand(C, generator=generator) + 0.5)

    column = lambda v: v.view(1, C, 1, 1)
    batch = case.training or not tracked
    arithmetic = ROUNDING[torch.float64 if case.dtype == torch.float64 else torch.float32]
    # Roundings that a sum of so many terms may show; sums of narrower types are short, and merged in float64.
    long_sum = 64 + ((N * H * W) ** 0.5 if case.dtype == torch.float64 else 0)
    for step in range(1, (case.steps if case.training else 1) + 1):
        x = make_x(case, generator)
        if tracked:
            running_mean, running_var = module.running_mean.to(torch.float64, copy=True), module.running_var.to(torch.float64, copy=True)
        with torch.no_grad(), Watch(namespace["_fused_batch_norm"].train.default) as watch:
            y = module(x)
        wide = x.double()
        if batch:
            about = wide[:1, :, :1, :1]  # or a large mean would cost digits here
            mean, var = (about + (wide - about).mean((0, 2, 3), keepdim=True)).flatten(), (wide - about).var((0, 2, 3), correction=0)
        else:
            mean, var = running_mean, running_var
        scaled = (wide - column(mean)) * column(gamma / (var + case.options["eps"]).sqrt())
        expected = scaled + column(beta)
        assert y.dtype == x.dtype and y.device == x.device, f"y is {y.dtype} on {y.device}"
        for layout in (torch.contiguous_format, torch.channels_last):
            assert y.is_contiguous(memory_format=layout) or not x.is_contiguous(memory_format=layout), f"y has strides {y.stride()}, x {x.stride()}"
        # One rounding to y's type, and a few of the arithmetic's: of each term, and of the sums that mean and var come from;
        # and what a mean far from 0 loses in float64 itself, in the kernel as here, in units of the standard deviation.
        inv_std = 1 / (var + case.options["eps"]).sqrt()
        lost = 64 * ROUNDING[torch.float64] * mean.abs() * inv_std
        rounding = ROUNDING[case.dtype]
        bound = 1.01 * rounding * expected.abs() + TINY[case.dtype] + long_sum * arithmetic * (scaled.abs() + column(beta.abs() + gamma.abs()))
        bound += column(lost * gamma.abs()) + column(lost) * scaled.abs()
        check_close(f"step {step}: y", y, expected, bound)
        if batch:  # what backward needs
            saved = watch.saved
            check_close(f"step {step}: mean", saved[0], mean, long_sum * arithmetic * (var.sqrt() + mean.abs()))
            check_close(f"step {step}: inv_std", saved[1], inv_std, (long_sum * arithmetic + lost) * inv_std)
        if case.training and tracked:
            momentum = case.options["momentum"]
            factor = 1 / step if momentum is None else momentum
            rounding = ROUNDING[case.parameter_dtype]
            new_mean = (1 - factor) * running_mean + factor * mean if factor < 1 else mean
            new_var = wide.var((0, 2, 3), correction=1)
            new_var = (1 - factor) * running_var + factor * new_var if factor < 1 else new_var
            if factor == 0:
                new_mean, new_var = torch.where(torch.isfinite(mean), running_mean, mean), torch.where(torch.isfinite(var), running_var, var)
            one_rounding = lambda v: 1.01 * rounding * v.abs() + TINY[case.parameter_dtype] + lost * (var + case.options["eps"]).sqrt()
            check_close(f"step {step}: running_mean", module.running_mean, new_mean, one_rounding(new_mean) + long_sum * arithmetic * var.sqrt())
            check_close(f"step {step}: running_var", module.running_var, new_var, one_rounding(new_var) + (long_sum * arithmetic + lost) * new_var)
            assert module.num_batches_tracked.item() == step, f"num_batches_tracked is {module.num_batches_tracked.item()} after step {step}"
    return branches(namespace, case)


def branches(namespace, case):
    """What the case exercises, and what the plan decided for it, as names: "team 1", "team more" where a field is a number."""
    N, C, H, W = case.shape
    tracked = case.options["track_running_stats"]
    training = case.training or not tracked
    kinds = [str(t).removeprefix("torch.") for t in (case.dtype, case.parameter_dtype)]
    taken = {f"x {kinds[0]}, parameters {kinds[1]}", f"layout {case.layout}", f"capability {case.capability[0]}.{case.capability[1]}"}
    taken.add("affine" if case.options["affine"] else "not affine")
    if training and tracked:
        taken.add("cumulative average" if case.options["momentum"] is None else "moving average")
    if N * C * H * W == 0:
        return taken
    momentum = case.options["momentum"] if tracked else 0.0  # there is always a counter in the plan
    text = namespace["_fused_batch_norm"].fused_batch_norm_plan(N, C, H * W, case.dtype, training, momentum)
    plan = {name: int(value) for name, value in (field.split("=") for field in text.split())}
    plan["rounds"] = -(-C // plan["teams"])
    structure, masked = STRUCTURES[plan["structure"]], H * W * case.dtype.itemsize % 16 > 0
    if case.layout == "unaligned" and (structure == "packed" or not masked):  # then the plan for an aligned x is another
        return taken
    size = lambda field: str(plan[field]) if plan[field] < 2 else "more"
    if structure in ("resident", "packed"):
        team = "one block" if plan["team"] == 1 else "cooperative" if plan["cooperative"] else "cluster" if training else "several blocks"
        taken.add(f"{structure}, {'training' if training else 'eval'}, {team}")
        taken.add(f"{structure}, turns {'more' if plan['turns'] else 0}")
    else:
        taken |= {f"{structure}, {field} {size(field)}" for field in ("bulk", "cooperative", "team", "teams", "rounds")}
        taken.add(f"ring, tiles {size('tiles')}" if structure == "ring" else f"hold, streamed {size('streamed')}")
    if structure != "packed":
        taken.add(f"{structure}, {'masked edges' if masked else 'whole vectors'}")
    return taken
