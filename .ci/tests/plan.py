"""All that the tests know of the kernel's launch plan: the names of its fields and layouts."""

import check
from check import Case

LAYOUTS = ("planes", "masked planes", "packed planes", "pixels")
TEAMS = ("block", "cluster", "grid")
# The table and some hundred random cases must take each of these: see branches().
BRANCHES = (
    *(f"{layout}, training, {team}" for layout in LAYOUTS for team in ("block", "grid")),
    *(f"{layout}, training, cluster" for layout in LAYOUTS[:3]),
    *(f"{layout}, eval, {blocks}" for layout in LAYOUTS for blocks in ("one block", "several")),
    *(f"{layout}, {stages} stages" for layout in LAYOUTS[:2] for stages in (3, 4)),
    *(f"{layout}, read again" for layout in (*LAYOUTS[:2], LAYOUTS[3])),
    *(
        f"{layout}, rounds {size}"
        for layout in LAYOUTS
        for size in ("1", "more")
        if layout != "packed planes"
    ),
    *("planes, many rows in registers", "masked planes, many rows in registers"),
    *(f"stagger {size}" for size in ("0", "more")),
    *(f"pixels, {what}" for what in ("whole vectors", "pixel behind pixel", "parts of pixels")),
    *(
        f"layout {layout}"
        for layout in ("contiguous", "channels_last", "channels_last_slice", "unaligned", "strided")
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
    aligned = not case.layout.startswith("unaligned") and case.layout != "channels_last_slice"
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
    if not aligned and layout != "masked planes":  # then the plan for an aligned x is another
        return taken
    if not training:
        taken.add(f"{layout}, eval, {'one block' if plan['team'] == 1 else 'several'}")
        return taken
    taken.add(f"{layout}, training, {TEAMS[plan['team_kind']]}")
    taken.add(f"{layout}, rounds {'1' if plan['rounds'] == 1 else 'more'}")
    taken.add(f"{layout}, {plan['stages']} stages")
    taken.add(f"stagger {'more' if plan['stagger_turns'] else 0}")
    if plan["rows"] > plan["reg_rows"] + plan["smem_rows"]:
        taken.add(f"{layout}, read again")
    if plan["reg_rows"] > 3:
        taken.add(f"{layout}, many rows in registers")
    if layout == "pixels":
        whole = plan["pixels"] == 1
        parts = plan["pixel"] < plan["width"]
        kind = "whole vectors" if whole else "parts of pixels" if parts else "pixel behind pixel"
        taken.add(f"pixels, {kind}")
    return taken


def is_for_sm_80(target: check.Target, case: Case) -> bool:
    """The plan for the case has no clusters."""
    return plan_of(target, case)["team_kind"] != TEAMS.index("cluster")
