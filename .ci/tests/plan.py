"""All that the tests know of the kernel's launch plan: the names of its fields and layouts."""

import check
from check import Case

LAYOUTS = ("NCHW", "NCHW masked", "NCHW packed", "NHWC", "NHWC masked")
TEAMS = ("blocks", "grid")
# The table and some hundred random cases must take each of these: see branches().
BRANCHES = (
    *(f"{layout}, training, {team}" for layout in LAYOUTS for team in TEAMS),
    *(f"{layout}, eval, {blocks}" for layout in LAYOUTS for blocks in ("one block", "several")),
    *(f"{layout}, {stages} stages" for layout in LAYOUTS for stages in (1, 2)),
    *(f"{layout}, 3 stages" for layout in LAYOUTS[:3]),
    *(f"{layout}, read again" for layout in LAYOUTS if layout != "NCHW packed"),
    *(f"{layout}, rounds {size}" for layout in LAYOUTS for size in ("1", "more")),
    "NCHW, many vectors in registers",
    *(f"NHWC masked, {what}" for what in ("one pixel", "pixel behind pixel", "parts of pixels")),
    *(
        f"layout {layout}"
        for layout in (
            "contiguous",
            "channels_last",
            "channels_last_slice",
            "channels_last_unaligned",
            "unaligned",
            "strided",
        )
    ),
    *("affine", "not affine", "cumulative average", "moving average"),
)


def plan_of(target: check.Target, case: Case) -> dict[str, int]:
    """The plan for the case, with a dense and aligned x, on the current device."""
    settings = dict(case.settings)
    tracked = settings.get("track_running_stats", True)
    # There is always a counter in the plan.
    momentum = settings.get("momentum", 0.1) if tracked else 0.0
    training = case.training or not tracked
    channels_last = case.layout.startswith("channels_last")
    return target.plan(case.shape, case.dtype, training, momentum, channels_last)


def branches(target: check.Target, case: Case) -> set[str]:
    """What the case exercises and what the plan decided for it, by names as in BRANCHES."""
    N, C, H, W = case.shape
    settings = dict(case.settings)
    tracked = settings.get("track_running_stats", True)
    training = case.training or not tracked
    aligned = "unaligned" not in case.layout and case.layout != "channels_last_slice"
    taken = {
        f"layout {'unaligned' if case.layout.startswith('unaligned') else case.layout}",
        "affine" if settings.get("affine", True) else "not affine",
    }
    if training and tracked:
        taken.add(
            "moving average" if settings.get("momentum", 0.1) is not None else "cumulative average"
        )
    if N * C * H * W == 0:
        return taken
    plan = plan_of(target, case)
    layout = LAYOUTS[plan["layout"]]
    if not aligned and not layout.endswith("masked"):  # then the plan for an aligned x is another
        return taken
    if not training:
        taken.add(f"{layout}, eval, {'one block' if plan['team'] == 1 else 'several'}")
        return taken
    taken.add(f"{layout}, training, {TEAMS[plan['cooperative']]}")
    taken.add(f"{layout}, rounds {'1' if plan['rounds'] == 1 else 'more'}")
    taken.add(f"{layout}, {plan['stages']} stages")
    if plan["vectors_per_thread"] > plan["reg_vectors"] + plan["smem_vectors"]:
        taken.add(f"{layout}, read again")
    if plan["deep"]:
        taken.add(f"{layout}, many vectors in registers")
    if layout == "NHWC masked":
        whole, parts = plan["pixels"] == 1, plan["segment"] < plan["width"]
        kind = "one pixel" if whole else "parts of pixels" if parts else "pixel behind pixel"
        taken.add(f"NHWC masked, {kind}")
    return taken
