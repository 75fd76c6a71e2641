"""Kernels that are wrong on purpose: small edits of the text, each of which the tests must catch.

    python .ci/tests/mutants.py               all of them: some minutes
    python .ci/tests/mutants.py ring eval     those whose name contains one of these words

Applies each edit to a copy of model_new.py's text, and runs the random cases of cases.py on
pretended devices until one fails in the way that stands beside the mutant. One that survives, or is
seen by another detector only, points at a check that is missing.

An edit names a function (or struct, lambda, method: `Group::advance`) and the text in it that is
replaced, which occurs once there; spaces and line ends in it do not count. So what is renamed,
moved or formatted elsewhere breaks no mutant. One that no longer applies fails, as does one that
does not compile, crashes or comes to no end: nobody has said then what is wrong.
"""

import collections
import concurrent.futures
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "emulator"), str(HERE.parents[1])]

import cases  # noqa: E402
import emulate  # noqa: E402

import check  # noqa: E402

FIRST_SEEDS = (*range(1, 51), *cases.RARE_SEEDS)  # of the random cases that most are caught by
ALL_SEEDS = tuple(dict.fromkeys((*FIRST_SEEDS, *range(51, 1001))))
BUILD_LIMIT_S = 300  # of one build: nothing that is caught
CASE_LIMIT_S = 30  # of one case, of the processor's time: the slowest takes 3
CUDA_BEGINS = re.compile(r"^FUSED_BATCH_NORM_CUDA = r('''|\"\"\")", re.MULTILINE)
FASTER = '\n#pragma GCC optimize("O0")'  # compiles in a third of the time, most of what one takes
FLOAT_ALONE = (  # an edit, too
    "make_launch",
    """case 1: return typed_launch<__half>(call, device);
    case 2: return typed_launch<__nv_bfloat16>(call, device);
    default: return typed_launch<double>(call, device);""",
    'default: throw "not built";',
)
VALUES = "values"  # what the kernel writes, beside float64
REFUSED = "refused"  # the launch, by the rules of a GPU
# Beside these the emulator's detectors, see its README.
KINDS = {VALUES, REFUSED, "data race", "unwritten", "out of bounds", "misaligned", "undefined"}
KINDS |= {"barrier", "cluster", "warp", "deadlock", "device", "limit"}

# What is wrong, and what must see it (of KINDS); then one edit or more: the function, the text in
# it, its replacement.
MUTANTS = [
    # ---- the formula
    (
        "eps outside the root",
        "values",
        ("exchange", "rsqrt(moments.var + call.eps)", "1 / (sqrt(moments.var) + call.eps)"),
    ),
    (
        "eps forgotten with running statistics",
        "values",
        ("exchange", "var + call.eps", "var + (call.training ? call.eps : 0)"),
    ),
    (
        "var unbiased in y",
        "values",
        ("batch_moments", "m2 * a.per_element,", "m2 * a.per_element_but_one,"),
    ),
    (
        "running_var biased",
        "values",
        ("Channel::save", "moments.m2 * a.per_element_but_one", "moments.var"),
    ),
    (
        "momentum weighs the old mean",
        "values",
        (
            "Channel::save",
            "(1 - factor) * running_mean + factor",
            "factor * running_mean + (1 - factor)",
        ),
    ),
    (
        "the cumulative average counts from 1",
        "values",
        (
            "fused_batch_norm_forward_kernel",
            "*call.num_batches_tracked + 1",
            "*call.num_batches_tracked + 2",
        ),
    ),
    (
        "no cumulative average",
        "values",
        ("fused_batch_norm_forward_kernel", "(call.cumulative)", "(call.cumulative > 1)"),
    ),
    (
        "momentum None is 0.1",
        "values",
        ("run", "momentum.value_or(0)", "momentum.value_or(0.1)"),
        ("run", "call.cumulative = !momentum.has_value();", ""),
    ),
    (
        "eval uses the batch's statistics",
        "values",
        ("ModelNew", "self.training or running_mean is None", "True"),
    ),
    (
        "eval: only a team's first block knows the statistics",
        "values",
        ("load_channel", "(b.rank == 0 || !call.training)", "b.rank == 0"),
    ),
    (
        "beta forgotten",
        "values",
        ("Channel::result", "beta - (mean - A(mean)) * scale", "(A(mean) - mean) * scale"),
    ),
    (
        "the mean's low part forgotten",
        "values",
        ("Channel::result", "beta - (mean - A(mean)) * scale", "beta"),
    ),
    (
        "the mean folded into the shift",
        "values",
        (
            "Group::store",
            "(widen(v, i) - of.mean) * of.scale + of.shift",
            "widen(v, i) * of.scale + (of.shift - of.mean * of.scale)",
        ),
    ),
    (
        "gamma read as float whatever it is",
        "values",
        ("load_channel", "(call.gamma, c, call.affine_float)", "(call.gamma, c, true)"),
    ),
    (
        "running_var stored as float whatever it is",
        "out of bounds",
        (
            "Channel::save",
            "(call.running_var, c, call.running_float,",
            "(call.running_var, c, true,",
        ),
    ),
    (
        "a word's elements exchanged",
        "values",
        (
            "make_vector",
            "__floats2bfloat162_rn(v[2 * i], v[2 * i + 1])",
            "__floats2bfloat162_rn(v[2 * i + 1], v[2 * i])",
        ),
    ),
    (
        "the last element of the tail left out",
        "values",
        ("Group::load_tail", "i < at.end)", "i < at.end - 1)"),
    ),
    # ---- the pivot
    (
        "sums about 0",
        "values",
        ("set_pivots", "isfinite(mean) ? widen(round_to<T>(mean)) : A(0)", "0"),
    ),
    (
        "a pivot that is not finite",
        "values",
        ("set_pivots", "isfinite(mean) ? widen(round_to<T>(mean)) : A(0)", "mean"),
    ),
    (
        "the mean of a sample that an outlier is in",
        "values",
        (
            "set_pivots",
            "max(min(v, next), min(max(v, next), widen(s.run[(r + 2) % kRuns])))",
            "v",
        ),
    ),
    (
        "the mean counted from 0, not from the pivot",
        "values",
        ("batch_moments", "pivot + offset", "offset"),
    ),
    ("var about the pivot", "values", ("batch_moments", "- s1 * offset", "")),
    (
        "each block its own pivot",
        "values",
        ("sample", "seed * 0x9e3779b9u", "(seed + blockIdx.x) * 0x9e3779b9u"),
    ),
    (
        "runs of samples that reach past the plane",
        "out of bounds",
        ("sample", "- (apart ? 0 : kRunElements - 1)", ""),
    ),
    (
        "a sample of a channels-last x read as of NCHW",
        "values",
        ("sample", "channel + at * call.C", "channel * call.HW + at"),
    ),
    (
        "a sample of the channel behind the last",
        "out of bounds",
        ("sample", "min(channel_of(i), int(call.C) - 1)", "channel_of(i)"),
    ),
    (
        "runs of twice as many elements",
        "out of bounds",
        ("sample", "% kRunElements", "% (2 * kRunElements)"),
    ),
    (
        "the group before's pivot",
        "values",
        (
            "sample",
            "channel_of(i)",
            "channel_of(max(i - int(b.p.sets.divisor), 0))",
        ),
    ),
    (
        "pivots left in the place of the group before",
        "data race",
        ("set_pivots", "b.turn(i)", "b.turn(max(i - int(b.p.sets.divisor), 0))"),
    ),
    (
        "pivots of channels outside the group",
        "unwritten",
        (
            "Group::each_part",
            "min(unsigned(c), unsigned(p.channels) - 1)",
            "unsigned(c)",
        ),
    ),
    (
        "pivots left behind the result that shows them",
        "unwritten",
        ("exchange", "prepare_pivots(set + sets);", ""),
        ("exchange", "i + 2 * sets", "i + sets"),
    ),
    # ---- groups: where vectors lie, which of their elements count, whose they are
    (
        "the first edge of a plane summed",
        "data race",
        ("Group::place", "w.in_row == 0 ? behind : 0", "0"),
    ),
    (
        "the last edge of a plane summed",
        "out of bounds",
        ("Group::place", "to_last < 0 ? kSize", "to_last < 2 ? kSize"),
    ),
    (
        "a plane's tail one element longer",
        "out of bounds",
        ("typed_launch", "int(call.HW - (", "int(call.HW + 1 - ("),
    ),
    (
        "planes aligned as the tensor",
        "out of bounds",
        ("Group::origin", "* call.HW + a.shift", "* call.HW"),
    ),
    (
        "edges stored as whole vectors",
        "data race",
        ("Group::store", "!kMasked || at.end - at.begin == kSize", "true"),
    ),
    (
        "reads past the end of x",
        "out of bounds",
        ("Group::load", "kMasked && at.vector >= a.whole", "false"),
    ),
    (
        "an x of less than a vector taken for one of many",
        "out of bounds",
        ("Group", "max(a.whole, 1u) - 1", "a.whole - 1"),
    ),
    (
        "x ends within a vector that is read as a whole",
        "out of bounds",
        (
            "typed_launch",
            "unsigned((call.N * call.C * call.HW + shift) / kSize)",
            "unsigned((call.N * call.C * call.HW + shift) / kSize + 1)",
        ),
    ),
    (
        "parts of pixels taken for pixel behind pixel",
        "data race",
        ("Group::periodic", "&& p.pixel.divisor == p.width.divisor", ""),
    ),
    (
        "the channel before a group counts",
        "data race",
        ("Group::origin", "o.begin = max(0, -channel);", ""),
    ),
    (
        "channels behind C count",
        "data race",
        ("Group::origin", "min(p.channels, int(call.C) - g * p.channels)", "p.channels"),
    ),
    (
        "parts of pixels not masked",
        "data race",
        ("Group::origin", "kLayout == kPixels && !periodic()", "false"),
    ),
    (
        "pixel behind pixel masked as parts of pixels",
        "values",
        ("Group::origin", "&& !periodic()", ""),
    ),
    (
        "elements before x count",
        "out of bounds",
        ("Group::place", "if (at.vector == 0) at.begin = max(at.begin, a.shift);", ""),
    ),
    (
        "elements behind x count",
        "out of bounds",
        ("Group::place", "at.end = int(min(int64_t(at.end), left));", ""),
    ),
    (
        "a pixel's part counted from its vector's first element",
        "data race",
        ("Group", "- int(first % kSize)", ""),
    ),
    (
        "the pixels of a row side by side",
        "data race",
        ("Group", "column = first / kSize + in_pixel", "column = in_row"),
    ),
    (
        "channels of a row counted without end",
        "values",
        ("Group", "if (periodic()) while", "if (false) while"),
    ),
    (
        "a packed vector's split off by one",
        "values",
        (
            "Group",
            "int(p.pixel.divisor) - offset, kSize",
            "int(p.pixel.divisor) - offset + 1, kSize",
        ),
    ),
    (
        "no split: all elements are the first channel's",
        "values",
        ("Group::pick", "i < split ? of[0] : of[kParts - 1]", "of[0]"),
    ),
    (
        "no vector more where x is not aligned",
        "values",
        ("pixels", "(p.pixels > 1 || shift_bytes(call) > 0)", "(p.pixels > 1)"),
    ),
    (
        "no row more where x is not aligned",
        "values",
        ("pixels", "pixels * C + size - 1", "pixels * C"),
    ),
    (
        "one vector too few for a plane's edges",
        "values",
        ("planes", "(call.HW + size - 2) / size + 1", "(call.HW + size - 2) / size"),
    ),
    (
        "channels beyond whole packs",
        "values",
        ("packed_planes", "call.C % channels ||", ""),
    ),
    (
        "packed though x is not aligned",
        "out of bounds",
        ("packed_planes", "shift_bytes(call) > 0 ||", ""),
    ),
    (
        "three channels in a vector",
        "data race",
        ("packed_planes", "call.HW < size - 1 ||", ""),
    ),
    (
        "the division's magic rounded down",
        "data race",
        (
            "fast_divmod",
            "((int64_t(1) << (31 + shift)) + divisor - 1) / divisor",
            "(int64_t(1) << (31 + shift)) / divisor",
        ),
    ),
    (
        "the last round has a group for every team",
        "out of bounds",
        ("Block", "- (first_group + (p.rounds - 1) * p.teams >= p.groups)", ""),
    ),
    # ---- workers: rows of vectors
    (
        "blocks of a team take the same vectors",
        "data race",
        ("work", "b.rank * p.share + thread", "thread"),
    ),
    (
        "a thread's next vector is the next block's",
        "data race",
        ("work", "step = p.step.divisor", "step = p.threads"),
    ),
    (
        "a block's rows neither side by side nor in turn",
        "data race",
        ("Planner::with_threads", "in_turn ? threads : p.rows * threads", "threads"),
    ),
    (
        "threads beyond take vectors",
        "data race",
        ("work", "thread < unsigned(p.threads) &&", ""),
    ),
    (
        "a thread's last row left out",
        "values",
        (
            "work",
            "int(divide(p.vectors - 1 - first, p.step)) + 1",
            "int(divide(p.vectors - 1 - first, p.step))",
        ),
    ),
    (
        "rows behind the group's end",
        "out of bounds",
        ("work", "min(p.rows, int(divide(p.vectors - 1 - first, p.step)) + 1)", "p.rows"),
    ),
    (
        "a row both in registers and in shared memory",
        "values",
        ("work", "(Walk& at, auto use)", "(Walk at, auto use)"),
    ),
    ("no carry to the next row", "values", ("Group::advance", "w.in_row >= width", "false")),
    (
        "a carry one vector late",
        "values",
        ("Group::advance", "w.in_row >= width", "w.in_row > width"),
    ),
    ("the rows of a step forgotten", "data race", ("Group::advance", "w.row += step_row;", "")),
    (
        "a share's first row counted one by one",
        "data race",
        ("Group::walk", "row * row_stride,", "row,"),
    ),
    (
        "halves cut elsewhere in every other group",
        "data race",
        ("work::each_smem_row", "(smem_rows + 1) / 2", "(smem_rows + (i & 1)) / 2"),
    ),
    (
        "half types' odd planes without a ring",
        "values",
        ("work", "(kLayout == kMaskedPlanes && sizeof(T) != 4)", "false"),
    ),
    (
        "a ring in places that other rows have",
        "data race",
        ("work", "p.smem_rows - (overflows ? kRing : 0)", "p.smem_rows"),
    ),
    (
        "a ring in the first places",
        "data race",
        ("work", "p.smem_rows - kRing + row % kRing", "row % kRing"),
    ),
    (
        "the last place of the ring not filled",
        "data race",
        ("work::load", "min(ring_rows, kRing)", "kRing - 1"),
    ),
    (
        "rows of the ring summed before they are there",
        "data race",
        ("work::sum", "cp_async_wait_group<kRing - 1>()", "cp_async_wait_group<kRing>()"),
    ),
    (
        "rows of the ring stored before they are there",
        "data race",
        ("work::store", "cp_async_wait_group<kRing - 1>()", "cp_async_wait_group<kRing>()"),
    ),
    (
        "a row of the ring overwritten before it is summed",
        "data race",
        (
            "work::sum",
            "add(ring(row), at); group.advance(at); if (row + kRing < ring_rows) "
            "group.load(kShared, ring(row), origin, ahead);",
            "if (row + kRing < ring_rows) group.load(kShared, ring(row), origin, ahead); "
            "add(ring(row), at); group.advance(at);",
        ),
    ),
    ("rows of the ring masked as the first", "values", ("work::sum", "group.advance(at);", "")),
    (
        "rows for the ring one too early",
        "values",
        ("work::sum", "ring_walk(kRing)", "ring_walk(kRing - 1)"),
    ),
    (
        "rows sent for that no place of the ring is for",
        "out of bounds",
        ("work::sum", "row + kRing < ring_rows", "row + kRing <= ring_rows"),
    ),
    (
        "the ring comes back with the next group's rows",
        "values",
        ("work::store", "origin, ring_walk(row - kRing)", "next_origin, ring_walk(row - kRing)"),
    ),
    (
        "the ring filled again with the group that is there already",
        "values",
        ("work::store", "ring(row), next_origin, here", "ring(row), origin, here"),
    ),
    (
        "the ring filled behind the last group",
        "barrier",
        ("work::store", "else if (refills) group", "else group"),
    ),
    (
        "the ring comes back with the row that has just been stored",
        "values",
        ("work::store", "ring_walk(row - kRing)", "ring_walk(row)"),
    ),
    (
        "the kernel with few rows for a plan with many",
        "values",
        ("typed_launch", "plan.reg_rows > register_rows", "plan.reg_rows > 16 + register_rows"),
    ),
    (
        "rows in registers though several groups are under way",
        "values",
        ("Planner::with_threads", "stages == 1 ? std::min", "stages > 0 ? std::min"),
    ),
    # ---- workers: the ring of places
    (
        "the places of a stage overlap the next's",
        "data race",
        ("work::each_smem_row", "stage * p.smem_rows * threads", "stage * p.smem_rows"),
    ),
    (
        "places refilled with the group that is there already",
        "values",
        ("work::store", "group.origin(b.group(next))", "group.origin(b.group(i))"),
    ),
    (
        "places refilled behind the last group",
        "out of bounds",
        ("work::store", "refills = next < b.groups", "refills = true"),
    ),
    (
        "L2 asked for what is behind x",
        "out of bounds",
        ("Group::load", "prefetch_global_L2(x + at.vector)", "prefetch_global_L2(x + a.whole + 1)"),
    ),
    (
        "first groups loaded that are not there",
        "barrier",
        (
            "work::load",
            "if (i < b.groups) group.load(kShared, v,",
            "group.load(kShared, v,",
        ),
    ),
    (
        "the first groups loaded last first",
        "unwritten",
        ("work", "load(i + stages - 1);", "load(-i);"),
    ),
    (
        "places refilled before they are stored",
        "data race",
        (
            "work::store",
            (
                "group.store(v, origin, w, result, overflows); "
                "if (refills) group.load(kShared, v, next_origin, w);"
            ),
            (
                "if (refills) group.load(kShared, v, next_origin, w); "
                "group.store(v, origin, w, result, overflows);"
            ),
        ),
    ),
    (
        "first halves summed before they are there",
        "data race",
        ("work::sum", "cp_async_wait_group<3>()", "cp_async_wait_group<4>()"),
    ),
    (
        "second halves summed before they are there",
        "data race",
        ("work::sum", "cp_async_wait_group<2>()", "cp_async_wait_group<3>()"),
    ),
    (
        "first halves summed before they are there, no later group under way",
        "data race",
        ("work::sum", "cp_async_wait_group<1>()", "cp_async_wait_group<2>()"),
    ),
    (
        "second halves summed before they are there, no later group under way",
        "data race",
        ("work::sum", "cp_async_wait_group<0>()", "cp_async_wait_group<1>()"),
    ),
    (
        "eval: vectors stored before they are there",
        "data race",
        ("work", "if (!b.call.training) cp_async_wait_group<0>();", ""),
    ),
    (
        "the second half of the rows in shared memory left out",
        "values",
        ("work::each_smem_row", "half == 0 ? middle : end", "middle"),
    ),
    (
        "both halves one group of copies",
        "data race",
        ("work::each_smem_row", "after_half();", "if (half == 1) after_half();"),
    ),
    (
        "second halves no group of copies",
        "data race",
        ("work::each_smem_row", "after_half();", "if (half == 0) after_half();"),
    ),
    (
        "results read before they are there",
        "unwritten",
        ("work::store", "mbarrier_wait(b.ready(turn), turn.parity);", ""),
        (
            "work::store",
            "result[e] = results[c]; });",
            "result[e] = results[c]; }); mbarrier_wait(b.ready(turn), turn.parity);",
        ),
    ),
    (
        "no start where there is nothing to do",
        "values",
        ("work", "max(b.groups, 1)", "b.groups"),
    ),
    # ---- from the workers to the exchange warps
    (
        "one lane arrives before its warp has read and written",
        "data race",
        (
            "work::sum",
            "mbarrier_arrive(b.summed(turn));",
            "if (b.lane == 0) mbarrier_arrive(b.summed(turn));",
        ),
        (
            "fused_batch_norm_forward_kernel",
            "blockDim.x - 32 * p.exchange_warps",
            "blockDim.x / 32 - p.exchange_warps",
        ),
    ),
    (
        "sums published behind the arrival",
        "data race",
        ("work::sum", "mbarrier_arrive(b.summed(turn));", ""),
        ("work::sum", "int row = 0,", "mbarrier_arrive(b.summed(turn)); int row = 0,"),
    ),
    (
        "the next channel's elements taken for this one's",
        "values",
        ("leave", "of[1].add(sums[e])", "of[0].add(sums[e])"),
    ),
    (
        "packed: threads beyond publish",
        "data race",
        ("leave", "if (thread < unsigned(b.p.threads)) {", "{"),
    ),
    (
        "pixels: threads beyond publish",
        "data race",
        ("leave", "by_warp ? unsigned(b.lane) < width : thread < unsigned(b.p.threads)", "true"),
    ),
    (
        "sums there when all warps' but one are",
        "data race",
        (
            "fused_batch_norm_forward_kernel",
            "blockDim.x - 32 * p.exchange_warps",
            "blockDim.x - 32 * (p.exchange_warps + 1)",
        ),
    ),
    (
        "results ready when one unit's are",
        "data race",
        ("fused_batch_norm_forward_kernel", "32 * b.layout.units", "32"),
    ),
    (
        "parities as of one set of exchange warps",
        "unwritten",
        ("Block::turn", "phase & 1", "unsigned(i) & 1"),
    ),
    ("sums and results share a barrier", "barrier", ("Block::ready", "summed(t) + 1", "summed(t)")),
    (
        "all sets of exchange warps share their barriers",
        "barrier",
        ("Block::summed", "2 * t.set", "0"),
    ),
    (
        "pivots of two generations in one place",
        "data race",
        ("Block::pivot", "t.parity * p.sets.divisor + t.set", "t.set"),
    ),
    (
        "results, sums and pivots of one set too few",
        "barrier",
        ("SharedLayout", "sets = p.lag + 1", "sets = p.lag > 0 ? p.lag : 1"),
    ),
    (
        "partial sums read before they are there",
        "data race",
        (
            "exchange",
            "mbarrier_wait(b.summed(turn), turn.parity); Sums<A> sums = block_sums(turn);",
            "Sums<A> sums = block_sums(turn); mbarrier_wait(b.summed(turn), turn.parity);",
        ),
    ),
    (
        "results written behind the arrival",
        "data race",
        ("exchange", "mbarrier_arrive(b.ready(turn));", ""),
        (
            "exchange",
            "if (leads()) b.result(turn)[local]",
            "mbarrier_arrive(b.ready(turn)); if (leads()) b.result(turn)[local]",
        ),
    ),
    (
        "all lanes of a channel write its result",
        "data race",
        ("ExchangeWarp::leads", "&& part == 0", ""),
    ),
    (
        "warps for one group's exchange only",
        "unwritten",
        ("Planner::with_team", "layout(p).units * (lag + 1)", "layout(p).units"),
    ),
    (
        "every unit takes the first channels",
        "data race",
        (
            "ExchangeWarp",
            "index * unit_channels + (b.lane & (unit_channels - 1))",
            "b.lane & (unit_channels - 1)",
        ),
    ),
    # ---- the block's sums
    (
        "the last warp's sums left out",
        "values",
        ("block_sums", "b.lane < rows", "b.lane < rows - 1"),
    ),
    (
        "a channel's last column forgotten",
        "values",
        ("block_sums", "c * kSize < end", "(c + 1) * kSize < end"),
    ),
    (
        "the channel before's sums taken for this one's",
        "values",
        ("block_sums", "+ (c * kSize < first)", ""),
    ),
    (
        "the last row of threads' sums forgotten",
        "values",
        ("block_sums", "r < rows", "r < rows - 1"),
    ),
    (
        "pixel behind pixel: sums as of an aligned x",
        "values",
        ("block_sums", "in_row = first + local", "in_row = first - b.a.shift + local"),
    ),
    (
        "parts of pixels: sums as of an aligned x",
        "values",
        ("block_sums", "first % kSize", "(first - b.a.shift) % kSize"),
    ),
    (
        "a thread's column changes from row to row",
        "unwritten",
        ("Planner::grain", "32 : p.width.divisor", "32 : 32"),
    ),
    # ---- between the blocks of a cluster
    (
        "sums sent to the wrong rank's place",
        "data race",
        ("cluster_sums", "st_async(&slots[b.rank], rank,", "st_async(&slots[rank], rank,"),
    ),
    (
        "sums sent to one block too many",
        "cluster",
        (
            "cluster_sums",
            "exists && rank < team; rank += parts) st_async",
            "exists && rank <= team; rank += parts) st_async",
        ),
    ),
    (
        "the peers' sums not waited for",
        "unwritten",
        ("cluster_sums", "mbarrier_wait(b.gathered(), 0);", ""),
    ),
    (
        "one peer's sums not expected",
        "unwritten",
        (
            "fused_batch_norm_forward_kernel",
            "p.team.divisor * sizeof",
            "(p.team.divisor - 1) * sizeof",
        ),
    ),
    (
        "the barrier for the peers' sums not fenced",
        "barrier",
        ("fused_batch_norm_forward_kernel", "fence_mbarrier_init();", ""),
    ),
    (
        "the barrier for the peers' sums initialised when they may come",
        "warp",
        (
            "fused_batch_norm_forward_kernel",
            "if (p.team_kind == kClusterTeam) barrier_cluster_arrive();",
            "",
        ),
        (
            "fused_batch_norm_forward_kernel::begin",
            "if (threadIdx.x == 0) {",
            "if (p.team_kind == kClusterTeam) barrier_cluster_arrive(); if (threadIdx.x == 0) {",
        ),
    ),
    (
        "threads arrive at the cluster's barrier apart from their warp",
        "warp",
        (
            "fused_batch_norm_forward_kernel",
            "sizeof(SumSlot<A>)); } __syncwarp();",
            "sizeof(SumSlot<A>)); }",
        ),
    ),
    (
        "threads wait at the cluster's barrier apart from their warp",
        "warp",
        ("fused_batch_norm_forward_kernel::meet", "__syncwarp();", ""),
    ),
    (
        "no barrier of the cluster",
        "cluster",
        (
            "fused_batch_norm_forward_kernel",
            "if (p.team_kind == kClusterTeam) barrier_cluster_arrive();",
            "",
        ),
        (
            "fused_batch_norm_forward_kernel::meet",
            "if (p.team_kind == kClusterTeam) barrier_cluster_wait();",
            "",
        ),
    ),
    (
        "exchange before the block has met the others",
        "cluster",
        (
            "work",
            "meet(); if (!works) return exchange(prepared);",
            "if (!works) exchange(prepared); meet(); if (!works) return;",
        ),
    ),
    # ---- between the blocks of the grid
    (
        "slots added twice",
        "data race",
        ("gather", "Sums<A> sums;", "Sums<A> sums = {slots[0].s1, 0};"),
    ),
    ("the last block's sums left out", "values", ("gather", "at < count ?", "at < count - 1 ?")),
    (
        "sums of blocks beyond the team",
        "out of bounds",
        (
            "gather",
            "at < count ? ld_relaxed(&slots[at * stride]) : SumSlot<A>{0, A(-0.0)}",
            "ld_relaxed(&slots[at * stride])",
        ),
    ),
    (
        "a peer's sums believed before they are there",
        "values",
        ("gather", "while (!complete)", "while (false)"),
    ),
    (
        "sums that are NaN taken for an empty slot",
        "deadlock",
        ("gather", "slot[k].minus_s2 != 0 ||", ""),
    ),
    (
        "slots added again with the next ones",
        "values",
        ("gather", "first += kSlots * parts", "first += parts"),
    ),
    (
        "sums left at another block's place",
        "deadlock",
        ("grid_sums", "&slots[b.rank * channels + local]", "&slots[b.rank + local]"),
    ),
    (
        "a block leaves sums of channels outside the group",
        "values",
        ("grid_sums", "if (exists && part == 0)", "if (part == 0)"),
    ),
    (
        "the team's sums of all channels in one place",
        "deadlock",
        ("grid_sums", "st_relaxed(&total[c]", "st_relaxed(&total[0]"),
    ),
    (
        "only the first unit's channels added up",
        "deadlock",
        ("grid_sums", "c >> bits != index", "c >> bits != 0"),
    ),
    (
        "only as many channels added up as there are blocks",
        "deadlock",
        ("grid_sums", "c += team)", "c += channels)"),
    ),
    (
        "the first block's sums taken for the team's",
        "values",
        ("grid_sums", "gather(total + local", "gather(slots + local"),
    ),
    (
        "no place for the team's sums",
        "out of bounds",
        ("SharedLayout", "(team + 1) * int64_t(p.channels)", "team * int64_t(p.channels)"),
    ),
    (
        "later sums in the place of earlier ones",
        "values",
        ("leave", "if (more) sums[e].add(partial[at * kSize + e]);", ""),
    ),
    (
        "a chain more for some lanes of a warp",
        "warp",
        (
            "work::sum",
            "overflows && chain < p.rows - p.smem_rows + kRing",
            "row < ring_rows",
        ),
    ),
    ("sums beside those of the group before", "unwritten", ("work::sum", "chain > 0", "true")),
    ("sums left twice", "values", ("work::sum", "sums[e] = {};", "")),
    (
        "sums of every other lane left out",
        "values",
        ("leave", "bit >= width", "bit > width"),
    ),
    ("sums without a mark where s2 is 0", "deadlock", ("grid_sums", "-own.s2", "0 - own.s2")),
    (
        "no block counted",
        "deadlock",
        ("grid_sums", "atomicAdd(counter, 1);", ""),
    ),
    (
        "one unit's count among the sums",
        "values",
        ("grid_sums", "(group + b.layout.units * kLineBytes)", "(group + kLineBytes)"),
    ),
    (
        "groups share their scratch",
        "values",
        ("grid_sums", "b.group(i) * b.layout.group_bytes", "b.first_group * b.layout.group_bytes"),
    ),
    (
        "scratch for one channel of a group",
        "out of bounds",
        ("SharedLayout", "int64_t(p.channels) * slot_bytes", "int64_t(1) * slot_bytes"),
    ),
    (
        "too little scratch",
        "out of bounds",
        ("fused_batch_norm_launch", "size_t(plan.groups) *", "size_t(plan.groups - 1) *"),
    ),
    (
        "scratch not zeroed: state of an earlier launch",
        "unwritten",
        ("fused_batch_norm_forward_kernel", "st_relaxed(&slots[i], SumSlot<A>{0, 0})", ""),
    ),
    (
        "scratch zeroed behind the arrival at the grid's barrier",
        "unwritten",
        ("fused_batch_norm_forward_kernel", "arrival = grid.barrier_arrive();", ""),
        (
            "fused_batch_norm_forward_kernel",
            "auto* const slots =",
            "arrival = grid.barrier_arrive(); auto* const slots =",
        ),
    ),
    (
        "no barrier of the grid",
        "data race",
        ("fused_batch_norm_forward_kernel", "arrival = grid.barrier_arrive();", ""),
        ("fused_batch_norm_forward_kernel::meet", "grid.barrier_wait(std::move(arrival))", ""),
    ),
    # ---- the start, running buffers and the counter
    (
        "no barrier of the block at the start",
        "barrier",
        ("fused_batch_norm_forward_kernel::begin", "__syncthreads();", ""),
    ),
    (
        "the cumulative average where blocks do not wait for each other",
        "data race",
        ("Planner::counts_batches", "call.cumulative && call.num_batches_tracked", "false"),
    ),
    (
        "every block of a team updates the running buffers",
        "data race",
        ("exchange", "b.rank == 0 &&", ""),
    ),
    ("parameters of channels behind C", "out of bounds", ("load_channel", "|| c >= call.C", "")),
    (
        "parameters of the group that is done",
        "values",
        ("exchange", "load_channel(i + sets)", "load_channel(i)"),
    ),
    (
        "every block counts the batch",
        "values",
        ("fused_batch_norm_forward_kernel::meet", "blockIdx.x == 0 &&", ""),
    ),
    (
        "the batch counted before all blocks have read the counter",
        "data race",
        (
            "fused_batch_norm_forward_kernel::meet",
            "if (call.training && batches && blockIdx.x == 0 && threadIdx.x == 0) "
            "atomicAdd(batches, 1);",
            "",
        ),
        (
            "fused_batch_norm_forward_kernel",
            "const auto prepare =",
            "if (call.training && call.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0) "
            "++*call.num_batches_tracked; const auto prepare =",
        ),
    ),
    # ---- the layout of shared memory
    (
        "places of one group only",
        "out of bounds",
        (
            "SharedLayout",
            "int(p.stages.divisor) * p.smem_rows * p.threads",
            "p.smem_rows * p.threads",
        ),
    ),
    (
        "results where the peers' sums come",
        "data race",
        ("SharedLayout", "p.team_kind == kClusterTeam ?", "false ?"),
    ),
    (
        "barriers where results are",
        "barrier",
        ("SharedLayout", "3 * sets * p.channels", "2 * sets * p.channels"),
    ),
    (
        "the new value's weight where the last set's barrier is",
        "barrier",
        ("SharedLayout", "(2 * sets + 1) * int", "(2 * sets) * int"),
    ),
    (
        "partial sums where the cluster's barrier is",
        "barrier",
        ("SharedLayout", "factor_at + int(sizeof(double))", "factor_at - int(sizeof(double))"),
    ),
    (
        "pivots where partial sums are",
        "out of bounds",
        ("SharedLayout", "partial_at + 2 * sets", "partial_at + sets"),
    ),
    # ---- the plan and the launch
    (
        "no cooperative launch",
        "barrier",
        ("fused_batch_norm_launch", "plan.team_kind == kGridTeam", "0"),
    ),
    (
        "no cluster asked for",
        "cluster",
        ("fused_batch_norm_launch", "plan.team_kind == kClusterTeam ? 2 : 1", "1"),
    ),
    (
        "clusters where there are none",
        "refused",
        ("Planner::small", "device.architecture >= 90 ? kMaxCluster : 1", "kMaxCluster"),
    ),
    (
        "only whole warps of threads",
        "unwritten",
        ("block_threads", "ceil_div(p.threads, 32)", "std::max(p.threads / 32, 1)"),
    ),
    (
        "more teams than fit at once",
        "refused",
        (
            "Planner::with_team",
            "blocks * device.multiprocessors / team",
            "(blocks + 1) * device.multiprocessors / team",
        ),
    ),
    (
        "blocks larger than their share of a multiprocessor",
        "refused",
        ("Planner::room", "multiprocessor_bytes / blocks", "multiprocessor_bytes"),
    ),
    (
        "rows in shared memory that is taken",
        "refused",
        ("Planner::with_threads", "room(blocks) - layout(p).bytes", "room(blocks)"),
    ),
    (
        "teams larger than all multiprocessors have room for",
        "refused",
        (
            "Planner::large",
            "std::min<int>(device.multiprocessors,",
            "std::min<int>(2 * device.multiprocessors,",
        ),
    ),
]


# ------------------------------------------------------------------------------------ the edits

PARENTHESES = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
# Up to the brace that opens its body, the definition of …
DEFINITIONS = (
    r"\b(?:struct|class) (?:alignas{parentheses} )?{name}\b[^;{{(]*{{",
    r'^[\w:<>,*&\[\]" ]*\b{name}\s*{parentheses}(?:\s*const)?(?:\s*:[^{{;]*)?\s*{{',  # a function
    r"\b{name} = \[[^\]]*\]\s*(?:{parentheses})?[^{{;]*{{",  # a lambda
)
PYTHON_DEFINITION = r"^( *)(?:class|def) {name}\b"
TOKEN = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|[{}]", re.DOTALL)


def find_once(pattern, text, begin, end, what):
    found = list(re.compile(pattern, re.MULTILINE).finditer(text, begin, end))
    at_margin = [match for match in found if match[0][0] != " "]  # a function before a method
    found = at_margin if len(found) > 1 and len(at_margin) == 1 else found
    if len(found) > 1:
        raise ValueError(f"{what} is there {len(found)} times")
    return found[0] if found else None


def closing_brace(text, begin, end):
    depth = 1
    for token in TOKEN.finditer(text, begin, end):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    raise ValueError("a brace is not closed")


def scope(text, name):
    """(begin, end) of the definition; "a::b": of b within a's."""
    begin, end = 0, len(text)
    for part in name.split("::"):
        for definition in DEFINITIONS:
            pattern = definition.format(name=part, parentheses=PARENTHESES)
            if found := find_once(pattern, text, begin, end, f"the definition of {name}"):
                begin, end = found.start(), closing_brace(text, found.end(), end)
                break
        else:
            pattern = PYTHON_DEFINITION.format(name=part)
            found = find_once(pattern, text, begin, end, f"the definition of {name}")
            if not found:
                raise ValueError(f"there is no {name}")
            behind = re.compile(rf"^ {{0,{len(found[1])}}}(?=\S)", re.MULTILINE)
            behind = behind.search(text, found.end(), end)
            begin, end = found.start(), behind.start() if behind else end
    return begin, end


def apply(text, *edits):
    for name, old, new in edits:
        words = (re.escape(word) for word in re.findall(r"\w+|[^\w\s]", old))
        pattern = r"\s*".join(rf"\b{word}\b" if word[0].isalnum() else word for word in words)
        found = find_once(pattern, text, *scope(text, name), f"“{old}” in {name}")
        if not found:
            raise ValueError(f"there is no “{old}” in {name}")
        text = text[: found.start()] + new + text[found.end() :]
    return text


# ------------------------------------------------------------------------------------- verdicts


def kind_of(error):
    """The kind of detector that an exception of a case comes from; None: of none."""
    if isinstance(error, AssertionError):
        return VALUES
    if found := re.search(r"emulator: ([a-z ]+):", str(error)):
        return found[1]
    return REFUSED if "CUDA error" in str(error) else None


def failures(text, seeds, build_dir):
    """(seed, kind) of each of these random cases that fails.

    Only the cases are under a limit of time, and of this process's own: a build, or a machine that
    others use, can be slow.
    """
    (begins,) = CUDA_BEGINS.finditer(text)
    faster = text[: begins.end()] + FASTER + text[begins.end() :]
    signal.alarm(BUILD_LIMIT_S)
    target = check.Target(emulate.load(faster, build_dir=build_dir), "cpu", emulate)
    signal.alarm(0)
    for seed in seeds:
        signal.setitimer(signal.ITIMER_VIRTUAL, CASE_LIMIT_S)
        case, device = cases.random_case(seed)
        cases.pretend(target, device, schedule=seed)
        try:
            cases.check_alone(target, case, seed)
        except Exception as error:
            kind = kind_of(error)
            if kind is None:
                raise
            yield seed, kind
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def verdict(text, kind, seeds, build_dir):
    """What catches the wrong kernel; else what else has, each once, and "" if nothing has.

    First the kernels for float alone: they compile in a third of the time, and catch most.
    """
    torch.set_num_threads(1)
    in_float = [s for s in FIRST_SEEDS if cases.random_case(s)[0].dtype == torch.float]
    others = {}
    for of_text, its_seeds in (
        (apply(text, FLOAT_ALONE), in_float),
        (text, [s for s in seeds if s not in in_float]),
    ):
        for seed, found in failures(of_text, its_seeds, build_dir):
            if found == kind:
                return f"{kind}, case {seed}", True
            others.setdefault(found, seed)
    return ", ".join(f"{found} (case {seed})" for found, seed in others.items()), False


def examine(text, kind, seeds, build_dir):
    """(what was found, whether that is `kind`), from a process of its own: it may crash or hang."""
    import torch._dynamo  # noqa: F401  # by torch's dispatch modes; here, so that each child has it

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said, caught = verdict(text, kind, seeds, build_dir)
        except Exception as error:  # it must compile: else it proves nothing
            said, caught = str(error), False
        os.write(write, f"{int(caught)}{said}".encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        late = {
            signal.SIGALRM: f"the build took more than {BUILD_LIMIT_S} s",
            signal.SIGVTALRM: f"a case took more than {CASE_LIMIT_S} s",
        }
        return late.get(number, f"crash, signal {number}"), False
    return said[1:], said[0] == "1"


def applied(text, edits):
    """The wrong text, or None and why there is none."""
    try:
        return apply(text, *edits), ""
    except ValueError as error:
        return None, f"does not apply: {error}"


def main(words):
    """In as many processes as there are processors; returns how many survive."""
    text = check.TEXT_PATH.read_text()
    chosen = [m for m in MUTANTS if not words or any(word in m[0] for word in words)]
    emulate.load(text)
    caught_by, failed = collections.Counter(), 0
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as build_dir,
        concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool,
    ):
        # What is the same for all is built once.
        shutil.copytree(emulate.HERE / "build", build_dir, dirs_exist_ok=True)
        # (The tests run all seeds on the kernel itself.)
        unchanged = pool.submit(examine, text, None, FIRST_SEEDS, build_dir)
        results = []
        for name, kind, *edits in chosen:
            wrong, trouble = applied(text, edits)
            future = None if trouble else pool.submit(examine, wrong, kind, ALL_SEEDS, build_dir)
            results.append((name, kind, trouble, future))
        if said := unchanged.result()[0]:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"the kernel itself fails: {said}")
        for name, kind, trouble, future in results:
            said, caught = (trouble, False) if trouble else future.result()
            if caught:
                caught_by[kind] += 1
                print(f"{name}: caught by {said}", flush=True)
            else:
                failed += 1
                print(
                    f"{name}: FAILS, must be caught by {kind}, got {said or 'nothing'}", flush=True
                )
    print(", ".join(f"{count} by {kind}" for kind, count in sorted(caught_by.items())))
    print(f"mutants: {caught_by.total()} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
