"""All that the tests know of the kernel's launch plan: the names of its fields and structures."""

import check
from check import Case

STRUCTURES = ("resident", "packed", "ring", "hold")
# The table and some hundred random cases must take each of these: see branches().
BRANCHES = (
    *(
        f"{structure}, training, {team}"
        for structure in STRUCTURES[:2]
        for team in ("one block", "cluster")
    ),
    "resident, training, cooperative",
    *(f"{structure}, turns {size}" for structure in STRUCTURES[:2] for size in ("0", "more")),
    *(
        f"{structure}, eval, {team}"
        for structure in STRUCTURES[:2]
        for team in ("one block", "several blocks")
    ),
    *(
        f"{structure}, {field} {size}"
        for structure in STRUCTURES[2:]
        for field in ("bulk", "cooperative")
        for size in "01"
    ),
    *(
        f"{structure}, {field} {size}"
        for structure in STRUCTURES[2:]
        for field in ("team", "teams", "rounds")
        for size in ("1", "more")
    ),
    *(f"ring, tiles {size}" for size in ("1", "more")),
    *(f"hold, streamed {size}" for size in ("0", "more")),
    *(
        f"{structure}, {edges}"
        for structure in ("resident", "ring", "hold")
        for edges in ("masked edges", "whole vectors")
    ),
    *(f"layout {layout}" for layout in ("contiguous", "channels_last", "unaligned", "strided")),
    *("affine", "not affine", "cumulative average", "moving average"),
)


def plan_of(target: check.Target, case: Case) -> dict[str, int]:
    """The plan for the case, with a contiguous and aligned x, on the current device."""
    settings = dict(case.settings)
    tracked = settings.get("track_running_stats", True)
    momentum = (
        settings.get("momentum", 0.1) if tracked else 0.0
    )  # there is always a counter in the plan
    return target.plan(case.shape, case.dtype, case.training or not tracked, momentum)


def branches(target: check.Target, case: Case) -> set[str]:
    """What the case exercises and what the plan decided for it, by names as in BRANCHES."""
    N, C, H, W = case.shape
    settings = dict(case.settings)
    tracked = settings.get("track_running_stats", True)
    training = case.training or not tracked
    aligned = not case.layout.startswith("unaligned")
    taken = {
        f"layout {case.layout if aligned else 'unaligned'}",
        "affine" if settings.get("affine", True) else "not affine",
    }
    if training and tracked:
        taken.add(
            "moving average" if settings.get("momentum", 0.1) is not None else "cumulative average"
        )
    if N * C * H * W == 0:
        return taken
    plan = plan_of(target, case)
    plan["rounds"] = -(-C // plan["teams"])
    structure, masked = STRUCTURES[plan["structure"]], H * W * case.dtype.itemsize % 16 > 0
    if not aligned and (
        structure == "packed" or not masked
    ):  # then the plan for an aligned x is another
        return taken
    size = lambda field: str(plan[field]) if plan[field] < 2 else "more"
    if structure in ("resident", "packed"):
        blocks = "cluster" if training else "several blocks"
        if plan["team"] == 1:
            blocks = "one block"
        elif plan["cooperative"]:
            blocks = "cooperative"
        taken.add(f"{structure}, {'training' if training else 'eval'}, {blocks}")
        taken.add(f"{structure}, turns {'more' if plan['turns'] else 0}")
    else:
        taken |= {
            f"{structure}, {field} {size(field)}"
            for field in ("bulk", "cooperative", "team", "teams", "rounds")
        }
        taken.add(
            f"ring, tiles {size('tiles')}"
            if structure == "ring"
            else f"hold, streamed {size('streamed')}"
        )
    if structure != "packed":
        taken.add(f"{structure}, {'masked edges' if masked else 'whole vectors'}")
    return taken


def is_for_sm_80(target: check.Target, case: Case) -> bool:
    """The plan for the case has no bulk copies, and no clusters."""
    plan = plan_of(target, case)
    cluster = case.training and plan["team"] > 1 and not plan["cooperative"]
    return not plan["bulk"] and not cluster
