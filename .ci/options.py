"""The command line of check.py."""

import argparse
import re
from pathlib import Path

import nets
import timing
import torch
from texts import text_of

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = {"float32": F32, "float16": F16, "bfloat16": BF16, "float64": F64}
GOES_WITH = {  # what may stand beside an option
    "--plan": {"--dtype", "--channels-last"},
    "--readme": set(),
    "--nets": {"--training", "--compile", "--regret", "--channels-last", "--against", "--json"},
    "--regret": {"--nets", "--channels-last", "--json"},
}


def a_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9][0-9]*([x×][1-9][0-9]*){3}", text):
        raise argparse.ArgumentTypeError(f"{text} must be NxCxHxW, four sizes of 1 or more")
    N, C, H, W = map(int, re.split("[x×]", text))
    if N * H * W == 1:
        raise argparse.ArgumentTypeError(f"{text} must have more than one value per channel")
    return N, C, H, W


def make_parser(description: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    parser.print_usage = lambda file=None: None  # what is wrong takes one line
    add = parser.add_argument
    shape = {"type": a_shape, "action": "append", "metavar": "NxCxHxW", "default": []}
    add("--shape", **shape, help="check and time this x only; may be repeated")
    add("--dtype", choices=DTYPES, help="its type (float32); alone: cases and table of this type")
    add("--channels-last", action="store_true", help="x in channels-last layout")
    add("--against", metavar="FILE|REV", help="another model_new.py beside ours, in the same run")
    names = {"nargs": "*", "choices": nets.NETS, "metavar": "NAME"}
    said = f"time all batch norms of these nets: {', '.join(nets.NETS)}; without a name, of all"
    add("--nets", **names, help=said)
    add("--training", action="store_true", help="with --nets: forward and backward together")
    add("--compile", action="store_true", help="with --nets NAME: torch.compile as well, slowly")
    add("--regret", action="store_true", help="with --nets: the planner against other plans of its")
    add("--plan", **shape, help="how this x would be launched; on a GPU, other plans timed as well")
    add("--json", type=Path, metavar="FILE", help="also write the measured rows")
    add("--readme", action="store_true", help="measure everything, write README.md and SPEED.md")
    return parser


def parse(description: str) -> argparse.Namespace:
    """What was asked for; wrong arguments end the program with one line and exit status 2.

    xs: the rows of --shape and --plan. against: the other version's text. json: open for writing.
    """
    parser = make_parser(description)
    given, cuda = parser.parse_args(), torch.cuda.is_available()
    default = parser.get_default
    used = [f"--{n.replace('_', '-')}" for n, v in vars(given).items() if v != default(n)]
    for option, others in GOES_WITH.items():
        if option in used and not {*used} <= {option, *others}:
            allowed = " and ".join(sorted(others)) or "no other option"
            parser.error(f"{option} goes with {allowed}, got {' '.join(used)}")
    of_nets = given.training or given.compile or given.regret
    if of_nets and given.nets is None:
        parser.error(f"--training, --compile, --regret go with --nets, got {' '.join(used)}")
    if given.compile and not given.nets:
        parser.error("--nets must name nets with --compile, which takes seconds for each shape")
    try:
        given.against = None if given.against is None else text_of(given.against)
    except (LookupError, OSError) as error:
        parser.error(str(error))
    if not cuda and not given.plan and not {*used} <= {"--dtype"}:
        parser.error(f"{' '.join(used)} must have a CUDA device, got none")
    like = DTYPES[given.dtype or "float32"], given.channels_last
    given.xs = [timing.Row(shape, *like) for shape in given.shape + given.plan]
    gpu_bytes = torch.cuda.mem_get_info()[1] if cuda else 288 << 30  # none has more
    for x in given.xs:
        if 2 * x.nbytes > gpu_bytes:
            parser.error(f"{x} must fit into {gpu_bytes >> 30} GB of GPU memory, with its y")
    try:
        given.json = given.json and given.json.open("w")
    except OSError as error:
        parser.error(str(error))
    given.dtype = DTYPES.get(given.dtype)
    return given
