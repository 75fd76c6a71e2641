"""Kernels that are wrong on purpose: small edits of the text, each of which the tests must catch.

    python .ci/tests/mutants.py               all of them: some minutes
    python .ci/tests/mutants.py ring eval     those whose name contains one of these words

Applies each edit to a copy of model_new.py's text that takes any plan that fits, and runs the
random cases of cases.py on pretended devices until one fails in the way that stands beside the
mutant. One that survives, or is seen by another detector only, points at a check that is missing.

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
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "emulator"), str(HERE.parents[1])]

import cases  # noqa: E402
import emulate  # noqa: E402
from texts import any_plan_text  # noqa: E402

import check  # noqa: E402

FIRST_SEEDS = (*range(1, 51), *cases.RARE_SEEDS)  # of the random cases that most are caught by
ALL_SEEDS = tuple(dict.fromkeys((*FIRST_SEEDS, *range(51, 1001))))
RELATED = tuple(cases.RELATED)
BUILD_LIMIT_S = 300  # of one build: nothing that is caught
CASE_LIMIT_S = 30  # of one case, of the processor's time: the slowest takes 3
CUDA_BEGINS = re.compile(r"^FUSED_BATCH_NORM_CUDA = r('''|\"\"\")", re.MULTILINE)
FASTER = '\n#pragma GCC optimize("O0")'  # compiles in a third of the time, most of what one takes
FLOAT_ALONE = (  # an edit, too
    "make_launch",
    "typed_launch<float>, typed_launch<__half>, typed_launch<__nv_bfloat16>, typed_launch<double>",
    "typed_launch<float>",
)
VALUES = "values"  # what the kernel writes, beside float64
REFUSED = "refused"  # the launch, by the rules of a GPU
# Beside these the emulator's detectors, see its README.
KINDS = {VALUES, REFUSED, "data race", "unwritten", "out of bounds", "misaligned", "undefined"}
KINDS |= {"barrier", "warp", "deadlock", "host", "limit"}

# What is wrong, and what must see it (of KINDS); then one edit or more: the function, the text in
# it, its replacement.
MUTANTS = [
    # ---- the formula
    (
        "eps outside the root",
        "values",
        (
            "ExchangeWarp::exchange",
            "rsqrt(var + a.eps)",
            "1 / (sqrt(var) + a.eps)",
        ),
    ),
    (
        "eps forgotten with running statistics",
        "values",
        (
            "ExchangeWarp::exchange",
            "var + a.eps",
            "var + (a.training ? a.eps : 0)",
        ),
    ),
    (
        "var unbiased in y",
        "values",
        (
            "ExchangeWarp::exchange",
            "var = m2 * a.per_element;",
            "var = m2 * a.per_element_less;",
        ),
    ),
    (
        "running_var biased",
        "values",
        (
            "ExchangeWarp::save",
            "m2 * a.per_element_less",
            "m2 * a.per_element",
        ),
    ),
    (
        "momentum weighs the old mean",
        "values",
        (
            "ExchangeWarp::save",
            "(1 - factor) * of.running_mean + factor",
            "factor * of.running_mean + (1 - factor)",
        ),
    ),
    (
        "the cumulative average counts from 1",
        "values",
        (
            "fused_batch_norm_forward_kernel",
            "*a.num_batches_tracked + 1",
            "*a.num_batches_tracked + 2",
        ),
    ),
    (
        "no cumulative average",
        "values",
        (
            "fused_batch_norm_forward_kernel",
            "if (a.cumulative)",
            "if (a.cumulative > 1)",
        ),
    ),
    (
        "eval uses the batch's statistics",
        "values",
        (
            "ModelNew",
            "self.training or running_mean is None",
            "True",
        ),
    ),
    (
        "eval: only a team's first block knows the statistics",
        "values",
        (
            "ExchangeWarp::load_channel",
            "(b.rank == 0 || !a.training)",
            "b.rank == 0",
        ),
    ),
    (
        "beta forgotten",
        "values",
        (
            "ExchangeWarp::exchange",
            "of.beta - (mean - A(mean)) * scale",
            "(A(mean) - mean) * scale",
        ),
    ),
    (
        "the mean's low part forgotten",
        "values",
        (
            "ExchangeWarp::exchange",
            "of.beta - (mean - A(mean)) * scale",
            "of.beta",
        ),
    ),
    (
        "the mean folded into the shift",
        "values",
        (
            "Group::store",
            "(widen(v, i) - r.mean[k]) * r.scale[k] + r.shift[k]",
            "widen(v, i) * r.scale[k] + (r.shift[k] - r.mean[k] * r.scale[k])",
        ),
    ),
    (
        "gamma read as float whatever it is",
        "values",
        (
            "ExchangeWarp::load_channel",
            "(a.gamma, c, a.affine_float)",
            "(a.gamma, c, true)",
        ),
    ),
    (
        "running_var stored as float whatever it is",
        "out of bounds",
        (
            "ExchangeWarp::save",
            "(a.running_var, c, a.running_float,",
            "(a.running_var, c, true,",
        ),
    ),
    (
        "a pair of bfloat16 exchanged",
        "values",
        (
            "make_vector",
            "__floats2bfloat162_rn(v[2 * i], v[2 * i + 1])",
            "__floats2bfloat162_rn(v[2 * i + 1], v[2 * i])",
        ),
    ),
    (
        "a double's upper word is the first one's",
        "values",
        (
            "Vector::get",
            "word[i * 2 % 4 + 1]",
            "word[1]",
        ),
    ),
    # ---- the pivot
    (
        "sums about 0",
        "values",
        (
            "ExchangeWarp::set_pivots",
            "isfinite(mean) ? widen(round_to<T>(mean)) : A(0)",
            "0",
        ),
    ),
    (
        "a pivot that is not finite",
        "values",
        (
            "ExchangeWarp::set_pivots",
            "isfinite(mean) ? widen(round_to<T>(mean)) : A(0)",
            "mean",
        ),
    ),
    (
        "the mean of a sample that an outlier is in",
        "values",
        (
            "ExchangeWarp::set_pivots",
            "max(min(u, v), min(max(u, v), w))",
            "u",
        ),
    ),
    (
        "the mean counted from 0, not from the pivot",
        "values",
        (
            "ExchangeWarp::exchange",
            "mean = (leads ? own.pivot[channel] : A(0)) + offset",
            "mean = offset",
        ),
    ),
    (
        "var about the pivot",
        "values",
        (
            "ExchangeWarp::exchange",
            "- sums.s1 * offset",
            "",
        ),
    ),
    (
        "each block its own pivot",
        "values",
        (
            "ExchangeWarp::sample",
            "seed * 0x9e3779b9u",
            "(seed + blockIdx.x) * 0x9e3779b9u",
        ),
    ),
    (
        "runs of samples that reach past the plane",
        "out of bounds",
        (
            "ExchangeWarp::sample",
            "- (apart ? 0 : parts - 1)",
            "",
        ),
    ),
    (
        "a sample of a channels-last x read as of NCHW",
        "values",
        (
            "ExchangeWarp::sample",
            "c + at * a.C",
            "c * a.HW + at",
        ),
    ),
    (
        "a sample of the channel behind the last",
        "out of bounds",
        (
            "ExchangeWarp::sample",
            "min(channel_in_x(i), int(a.C) - 1)",
            "channel_in_x(i)",
        ),
    ),
    (
        "the group before's pivot",
        "values",
        (
            "ExchangeWarp::sample",
            "channel_in_x(i)",
            "channel_in_x(max(i - int(a.stages.divisor), 0))",
        ),
    ),
    (
        "pivots left in the place of the group before",
        "data race",
        (
            "ExchangeWarp::set_pivots",
            "b.stage(i)",
            "b.stage(max(i - int(a.stages.divisor), 0))",
        ),
    ),
    (
        "pivots of two phases in one place",
        "data race",
        (
            "Block::stage",
            "result + (3 + (phase & 1)) * channels",
            "result + 3 * channels",
        ),
    ),
    (
        "pivots left behind the result that shows them",
        "unwritten",
        (
            "ExchangeWarp::exchange",
            "prepare_pivots(stage + stages);",
            "",
        ),
        (
            "ExchangeWarp::exchange",
            "i + 2 * stages",
            "i + stages",
        ),
    ),
    (
        "pivots of channels outside the group",
        "unwritten",
        (
            "Group::load_channels",
            "min(unsigned(c), unsigned(a.channels) - 1)",
            "unsigned(c)",
        ),
    ),
    # ---- groups: where vectors lie, which of their elements count, whose they are
    (
        "the first edge of a plane summed",
        "data race",
        (
            "Group::elements",
            "if (c.in_line == 0) e.begin = before;",
            "",
        ),
    ),
    (
        "the last edge of a plane summed",
        "data race",
        (
            "Group::elements",
            "if (past >= 0)",
            "if (past >= 1)",
        ),
    ),
    (
        "a plane's tail one element longer",
        "data race",
        (
            "typed_launch",
            "int(call.HW - (",
            "int(call.HW + 1 - (",
        ),
    ),
    (
        "planes aligned as the tensor",
        "out of bounds",
        (
            "Group::origin",
            "uint64_t(g) * a.HW + a.misalignment",
            "uint64_t(g) * a.HW",
        ),
    ),
    (
        "a plane's first vector taken for whole",
        "data race",
        (
            "Group::is_whole",
            "c.in_line - 1 < max(width, 3u) - 3",
            "c.in_line < max(width, 3u) - 2",
        ),
    ),
    (
        "a plane's last vectors taken for whole",
        "data race",
        (
            "Group::is_whole",
            "max(width, 3u) - 3",
            "max(width, 2u) - 2",
        ),
    ),
    (
        "pixels whole at the edges of a group",
        "data race",
        (
            "Group::is_whole",
            "o.end - o.begin == kSize &&",
            "",
        ),
    ),
    (
        "pixels whole at the ends of x",
        "out of bounds",
        (
            "Group::is_whole",
            "&& is_inside_x(vector(o, c))",
            "",
        ),
    ),
    (
        "the first vector of x taken for one inside",
        "out of bounds",
        (
            "Group::is_inside_x",
            "v - 1 < max(a.whole_vectors, 1u) - 1",
            "v < a.whole_vectors",
        ),
    ),
    (
        "an x of less than a vector taken for one of many",
        "out of bounds",
        (
            "Group::is_inside_x",
            "max(a.whole_vectors, 1u) - 1",
            "a.whole_vectors - 1",
        ),
    ),
    (
        "reads past the end of x",
        "out of bounds",
        (
            "Group::load",
            "at >= a.whole_vectors",
            "false",
        ),
    ),
    (
        "x ends within a vector that is read as a whole",
        "out of bounds",
        (
            "typed_launch",
            "(call.N * call.C * call.HW + misalignment) / kSize",
            "(call.N * call.C * call.HW + misalignment) / kSize + 1",
        ),
    ),
    (
        "edges stored as whole vectors",
        "data race",
        (
            "Group::store",
            "const bool whole = is_whole(o, c);",
            "const bool whole = true;",
        ),
    ),
    (
        "parts of pixels taken for pixel behind pixel",
        "data race",
        (
            "Group::periodic",
            "&& a.segment.divisor == a.width.divisor",
            "",
        ),
    ),
    (
        "the channel before a group counts",
        "data race",
        (
            "Group::origin",
            "o.begin = max(0, -channel);",
            "",
        ),
    ),
    (
        "parts of pixels not masked",
        "data race",
        (
            "Group::origin",
            "kLayout == kNhwcMasked && !periodic()",
            "false",
        ),
    ),
    (
        "pixel behind pixel masked as parts of pixels",
        "values",
        (
            "Group::origin",
            "&& !periodic()",
            "",
        ),
    ),
    (
        "elements behind x count",
        "out of bounds",
        (
            "Group::elements",
            "e.end = int(max(min(int64_t(e.end), a.N * a.C * a.HW - first), int64_t(0)));",
            "",
        ),
    ),
    (
        "the pixels of a line side by side",
        "data race",
        (
            "Group",
            "column = unsigned(first / kSize) + in_pixel",
            "column = in_line",
        ),
    ),
    (
        "channels of a line counted without end",
        "values",
        (
            "Group",
            "if (periodic()) while",
            "if (false) while",
        ),
    ),
    (
        "a line's channels do not begin again behind C",
        "values",
        (
            "Group::load_channels",
            "if (c == int(a.C) && periodic()) c = 0;",
            "",
        ),
    ),
    (
        "whole pixels: all threads have the first channels",
        "values",
        (
            "Group",
            "channel = in_line * kSize;",
            "channel = 0;",
        ),
    ),
    (
        "packed: a vector's split one element late",
        "values",
        (
            "Group",
            "int(a.HW) - element, kSize",
            "int(a.HW) - element + 1, kSize",
        ),
    ),
    (
        "packed: a vector's split one element early",
        "values",
        (
            "Group",
            "int(a.HW) - element, kSize",
            "int(a.HW) - element - 1, kSize",
        ),
    ),
    (
        "packed: a channel more with each element",
        "values",
        (
            "Group::load_channels",
            "if (kLayout != kNchwPacked || k + 1 == split) ++c;",
            "++c;",
        ),
    ),
    (
        "packed: all elements are the first channel's",
        "values",
        (
            "Group::load_channels",
            "|| k + 1 == split",
            "",
        ),
    ),
    (
        "packed: the next channel's elements summed as this one's",
        "values",
        (
            "Worker::store_partials",
            "of[1].add(sums[e])",
            "of[0].add(sums[e])",
        ),
    ),
    (
        "packed: the split counts for one element more",
        "values",
        (
            "Worker::store_partials",
            "e < group.split",
            "e <= group.split",
        ),
    ),
    (
        "no vector more where x is not aligned",
        "values",
        (
            "nhwc",
            "(p.pixels > 1 || misalignment > 0)",
            "(p.pixels > 1)",
        ),
    ),
    (
        "no line more where x is not aligned",
        "values",
        (
            "nhwc",
            "(pixels * C + size - 1 +",
            "(pixels * C +",
        ),
    ),
    (
        "masks left out though x is not aligned",
        "out of bounds",
        (
            "nhwc",
            "&& !misalignment",
            "",
        ),
    ),
    (
        "masks left out though groups do not divide C",
        "out of bounds",
        (
            "nhwc",
            "C % channels == 0 &&",
            "",
        ),
    ),
    (
        "one vector too few for a plane's edges",
        "values",
        (
            "nchw",
            "(call.HW + size - 2) / size + 1",
            "(call.HW + size - 2) / size",
        ),
    ),
    (
        "packed though x is not aligned",
        "out of bounds",
        (
            "Planner::choose",
            "misalignment_of(call, size) > 0 ||",
            "",
        ),
    ),
    (
        "three channels in a vector",
        "values",
        (
            "Planner::choose",
            "call.HW < size - 1 ||",
            "",
        ),
    ),
    (
        "channels beyond whole packs",
        "values",
        (
            "Planner::choose",
            "call.C % channels > 0 ||",
            "",
        ),
        (
            "nchw",
            "call.C % channels ||",
            "",
        ),
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
        (
            "Block",
            "- (first_group + (a.rounds - 1) * a.teams >= a.Plan::groups)",
            "",
        ),
    ),
    # ---- workers: a thread's vectors
    (
        "blocks of a team take the same vectors",
        "data race",
        (
            "Worker",
            "b.rank * a.share + thread",
            "thread",
        ),
    ),
    (
        "a thread's next vector is the next block's",
        "data race",
        (
            "Planner::with_workers",
            "in_turn ? int64_t(team) * workers : workers",
            "workers",
        ),
    ),
    (
        "threads beyond take vectors",
        "data race",
        (
            "Worker",
            "thread < unsigned(a.workers) &&",
            "",
        ),
    ),
    (
        "a thread's last vector left out",
        "values",
        (
            "Worker",
            "int(divide(a.vectors - 1 - first, a.step)) + 1",
            "int(divide(a.vectors - 1 - first, a.step))",
        ),
    ),
    (
        "vectors behind the group's end",
        "out of bounds",
        (
            "Worker",
            "min(a.vectors_per_thread, int(divide(a.vectors - 1 - first, a.step)) + 1)",
            "a.vectors_per_thread",
        ),
    ),
    (
        "a vector both in registers and in shared memory",
        "values",
        (
            "Worker::each_reg_vector",
            "group.advance(c);",
            "",
        ),
    ),
    (
        "no carry to the next line",
        "data race",
        (
            "Group::advance",
            "c.in_line >= width",
            "false",
        ),
    ),
    (
        "the lines of a step forgotten",
        "data race",
        (
            "Group::advance",
            "c.line += step.line;",
            "",
        ),
    ),
    (
        "a share's first line counted one by one",
        "data race",
        (
            "Group::cursor",
            "line * line_stride",
            "line",
        ),
    ),
    (
        "halves cut elsewhere in every other group",
        "data race",
        (
            "Worker::each_smem_vector",
            "(smem_vectors + 1) / 2",
            "(smem_vectors + (i & 1)) / 2",
        ),
    ),
    (
        "the second half of the vectors in shared memory left out",
        "values",
        (
            "Worker::each_smem_vector",
            "half == 0 ? middle : end",
            "middle",
        ),
    ),
    (
        "the places of a stage overlap the next's",
        "data race",
        (
            "Worker::each_smem_vector",
            "stage * a.smem_vectors * workers",
            "stage * a.smem_vectors",
        ),
    ),
    (
        "both halves one group of copies",
        "data race",
        (
            "Worker::commit_first_half",
            "half == 1",
            "half == 2",
        ),
    ),
    (
        "first halves summed before they are there",
        "data race",
        (
            "Worker::sum",
            "cp_async_wait_group<1>()",
            "cp_async_wait_group<2>()",
        ),
    ),
    (
        "second halves summed before they are there",
        "data race",
        (
            "Worker::sum",
            "cp_async_wait_group<0>()",
            "cp_async_wait_group<1>()",
        ),
    ),
    (
        "the kernel with few registers for a plan with many vectors there",
        "values",
        (
            "typed_launch",
            "p.deep ?",
            "false ?",
        ),
    ),
    # ---- workers: the ring
    (
        "a ring in places that other vectors have",
        "data race",
        (
            "Worker",
            "a.smem_vectors - (rereads ? kRing : 0)",
            "a.smem_vectors",
        ),
    ),
    (
        "a ring in the first places",
        "data race",
        (
            "Worker::ring",
            "a.smem_vectors - kRing + r % kRing",
            "r % kRing",
        ),
    ),
    (
        "the last place of the ring not filled",
        "unwritten",
        (
            "Worker::load",
            "min(ring_vectors, kRing)",
            "min(ring_vectors, kRing - 1)",
        ),
    ),
    (
        "vectors of the ring summed before they are there",
        "data race",
        (
            "Worker::sum",
            "cp_async_wait_group<kRing - 1>()",
            "cp_async_wait_group<kRing>()",
        ),
    ),
    (
        "vectors of the ring stored before they are there",
        "data race",
        (
            "Worker::store",
            "cp_async_wait_group<kRing - 1>()",
            "cp_async_wait_group<kRing>()",
        ),
    ),
    (
        "a vector of the ring overwritten before it is summed",
        "data race",
        (
            "Worker::sum",
            (
                "add(ring(r), c); group.advance(c); if (r + kRing < ring_vectors) "
                "group.load(kShared, ring(r), origin, ahead);"
            ),
            (
                "if (r + kRing < ring_vectors) group.load(kShared, ring(r), origin, ahead); "
                "add(ring(r), c); group.advance(c);"
            ),
        ),
    ),
    (
        "vectors of the ring masked as the first",
        "values",
        (
            "Worker::sum",
            "group.advance(c);",
            "",
        ),
    ),
    (
        "vectors for the ring one too early",
        "values",
        (
            "Worker::sum",
            "ring_cursor(kRing)",
            "ring_cursor(kRing - 1)",
        ),
    ),
    (
        "loads for which the ring has no place",
        "out of bounds",
        (
            "Worker::sum",
            "r + kRing < ring_vectors",
            "r + kRing <= ring_vectors",
        ),
    ),
    (
        "the ring's vectors as if none were in registers",
        "values",
        (
            "Worker::ring_cursor",
            "reg_vectors + smem_vectors + r",
            "smem_vectors + r",
        ),
    ),
    (
        "the ring comes back with the next group's vectors",
        "values",
        (
            "Worker::store",
            "origin, ring_cursor(r - kRing)",
            "next_origin, ring_cursor(r - kRing)",
        ),
    ),
    (
        "the ring filled again with the group that is there already",
        "values",
        (
            "Worker::store",
            "ring(r), next_origin, c",
            "ring(r), origin, c",
        ),
    ),
    (
        "the ring filled behind the last group",
        "barrier",
        (
            "Worker::store",
            "else if (refills)",
            "else",
        ),
    ),
    (
        "the ring comes back with the vector that has just been stored",
        "values",
        (
            "Worker::store",
            "ring_cursor(r - kRing)",
            "ring_cursor(r)",
        ),
    ),
    (
        "later sums in the place of earlier ones",
        "values",
        (
            "Worker::store_partials",
            "if (accumulate) sums[e].add(to);",
            "",
        ),
    ),
    (
        "sums beside those of the group before",
        "unwritten",
        (
            "Worker::sum",
            "r > kChain",
            "true",
        ),
    ),
    (
        "sums left twice",
        "values",
        (
            "Worker::sum",
            "sums[e] = {};",
            "sums[e].s1 += 0;",
        ),
    ),
    # ---- workers: from group to group
    (
        "places refilled with the group that is there already",
        "values",
        (
            "Worker::store",
            "group.origin(b.group(next))",
            "group.origin(b.group(i))",
        ),
    ),
    (
        "places refilled behind the last group",
        "out of bounds",
        (
            "Worker::store",
            "refills = next < b.groups",
            "refills = true",
        ),
    ),
    (
        "places refilled before they are stored",
        "data race",
        (
            "Worker::store",
            (
                "group.store(v, origin, at, result, rereads); if (refills) group.load(memory, v, "
                "next_origin, at);"
            ),
            (
                "if (refills) group.load(memory, v, next_origin, at); group.store(v, origin, at, "
                "result, rereads);"
            ),
        ),
    ),
    (
        "first groups loaded that are not there",
        "out of bounds",
        (
            "Worker::load",
            "exists = i < b.groups",
            "exists = true",
        ),
    ),
    (
        "the first groups loaded last first",
        "unwritten",
        (
            "fused_batch_norm_forward_kernel",
            "worker.load(newest)",
            "worker.load(-i)",
        ),
    ),
    (
        "L2 asked for what is behind x",
        "out of bounds",
        (
            "Group::load",
            "prefetch_global_L2(x + at)",
            "prefetch_global_L2(x + a.whole_vectors + 1)",
        ),
    ),
    (
        "L2 asked for a group that is not there",
        "out of bounds",
        (
            "Worker::prefetch",
            "i >= b.groups ||",
            "",
        ),
    ),
    (
        "eval: vectors stored before they are there",
        "data race",
        (
            "fused_batch_norm_forward_kernel",
            "if (!a.training) cp_async_wait_group<0>();",
            "",
        ),
    ),
    (
        "results read before they are there",
        "unwritten",
        (
            "Worker::store",
            "mbarrier_wait(stage.ready, stage.parity);",
            "",
        ),
    ),
    (
        "no start where there is nothing to do",
        "values",
        (
            "fused_batch_norm_forward_kernel",
            "max(b.groups, 1)",
            "b.groups",
        ),
    ),
    # ---- from the workers to the exchange warps, and back
    (
        "one lane arrives for its warp",
        "deadlock",
        (
            "Worker::sum",
            "mbarrier_arrive(stage.summed);",
            "if (b.lane == 0) mbarrier_arrive(stage.summed);",
        ),
    ),
    (
        "sums published behind the arrival",
        "data race",
        (
            "Worker::sum",
            "mbarrier_arrive(stage.summed);",
            "",
        ),
        (
            "Worker::sum",
            "Cursor ahead =",
            "mbarrier_arrive(stage.summed); Cursor ahead =",
        ),
    ),
    (
        "packed: threads beyond publish",
        "data race",
        (
            "Worker::store_partials",
            "if (thread < unsigned(a.workers)) {",
            "{",
        ),
    ),
    (
        "pixels: threads beyond publish",
        "data race",
        (
            "Worker::store_partials",
            "by_warp ? unsigned(b.lane) < width : thread < unsigned(a.workers)",
            "true",
        ),
    ),
    (
        "sums of every other lane left out",
        "values",
        (
            "Worker::store_partials",
            "bit >= width",
            "bit > width",
        ),
    ),
    (
        "sums there when all warps' but one are",
        "data race",
        (
            "fused_batch_norm_forward_kernel",
            "blockDim.x - 32 * a.exchange_warps",
            "blockDim.x - 32 * a.exchange_warps - 32 * (blockDim.x >= 32 * a.exchange_warps + 64)",
        ),
    ),
    (
        "results ready when one unit's are",
        "unwritten",
        (
            "fused_batch_norm_forward_kernel",
            "stage].ready, 32 * a.units",
            "stage].ready, 32",
        ),
    ),
    (
        "parities as of one stage",
        "unwritten",
        (
            "Block::stage",
            "phase & 1,",
            "unsigned(i) & 1,",
        ),
    ),
    (
        "sums and results share a barrier",
        "unwritten",
        (
            "Block::stage",
            "&barriers.ready,",
            "&barriers.summed,",
        ),
    ),
    (
        "all stages share their barriers",
        "unwritten",
        (
            "Block::stage",
            "head.barriers[stage]",
            "head.barriers[0]",
        ),
    ),
    (
        "partial sums read before they are there",
        "data race",
        (
            "ExchangeWarp::exchange",
            "mbarrier_wait(own.summed, own.parity); Sums<A> sums = block_sums(own.partial);",
            "Sums<A> sums = block_sums(own.partial); mbarrier_wait(own.summed, own.parity);",
        ),
    ),
    (
        "results written behind the arrival",
        "data race",
        (
            "ExchangeWarp::exchange",
            "mbarrier_arrive(own.ready);",
            "",
        ),
        (
            "ExchangeWarp::exchange",
            "if (leads) { own.mean",
            "mbarrier_arrive(own.ready); if (leads) { own.mean",
        ),
    ),
    (
        "all lanes of a channel write its result",
        "data race",
        (
            "ExchangeWarp",
            "channel < a.channels && part == 0",
            "channel < a.channels",
        ),
    ),
    (
        "warps for one stage only",
        "unwritten",
        (
            "Planner::with_team",
            "p.units * stages",
            "p.units",
        ),
    ),
    (
        "every unit takes the first channels",
        "data race",
        (
            "ExchangeWarp",
            "unit * unit_channels + (b.lane & (unit_channels - 1))",
            "b.lane & (unit_channels - 1)",
        ),
    ),
    # ---- the block's sums
    (
        "the last warp's sums left out",
        "values",
        (
            "ExchangeWarp::block_sums",
            "b.lane < a.partial_lines",
            "b.lane < a.partial_lines - 1",
        ),
    ),
    (
        "a channel's last column forgotten",
        "values",
        (
            "ExchangeWarp::block_sums",
            "column * kSize < end",
            "(column + 1) * kSize < end",
        ),
    ),
    (
        "the channel before's sums taken for this one's",
        "values",
        (
            "ExchangeWarp::block_sums",
            "+ (column * kSize < first)",
            "",
        ),
    ),
    (
        "the last line of threads' sums forgotten",
        "values",
        (
            "ExchangeWarp::block_sums",
            "line < a.partial_lines",
            "line < a.partial_lines - 1",
        ),
    ),
    (
        "pixel behind pixel: sums as of an aligned x",
        "values",
        (
            "ExchangeWarp::block_sums",
            "in_line = first + channel",
            "in_line = first - a.misalignment + channel",
        ),
    ),
    (
        "parts of pixels: sums as of an aligned x",
        "values",
        (
            "ExchangeWarp::block_sums",
            "first % kSize",
            "(first - a.misalignment) % kSize",
        ),
    ),
    (
        "pixel behind pixel: a line's last pixel not carried to its front",
        "unwritten",
        (
            "ExchangeWarp::block_sums",
            "in_line < elements ? 0 : elements",
            "0",
        ),
    ),
    (
        "a thread's column changes from vector to vector",
        "values",
        (
            "Planner::unit",
            "32 : p.width.divisor",
            "32 : 32",
        ),
    ),
    # ---- between the blocks of a team
    (
        "slots added twice",
        "data race",
        (
            "gather",
            "Sums<A> sums;",
            "Sums<A> sums = {slots[0].s1, 0};",
        ),
    ),
    (
        "the last block's sums left out",
        "values",
        (
            "gather",
            "at < count ?",
            "at < count - 1 ?",
        ),
    ),
    (
        "sums of blocks beyond the team",
        "out of bounds",
        (
            "gather",
            "at < count ? ld_relaxed(&slots[at * stride]) : nothing",
            "ld_relaxed(&slots[at * stride])",
        ),
    ),
    (
        "a peer's sums believed before they are there",
        "values",
        (
            "gather",
            "while (!complete)",
            "while (false)",
        ),
    ),
    (
        "sums that are NaN taken for an empty slot",
        "deadlock",
        (
            "gather",
            "slot[k].minus_s2 != 0 ||",
            "",
        ),
    ),
    (
        "slots added again with the next ones",
        "values",
        (
            "gather",
            "first += kSlots * parts",
            "first += parts",
        ),
    ),
    (
        "sums without a mark where s2 is 0",
        "deadlock",
        (
            "ExchangeWarp::team_sums",
            "-own.s2",
            "0 - own.s2",
        ),
    ),
    (
        "sums left at another block's place",
        "deadlock",
        (
            "ExchangeWarp::team_sums",
            "b.rank * channels + channel",
            "b.rank + channel",
        ),
    ),
    (
        "a block leaves sums of channels outside the group",
        "values",
        (
            "ExchangeWarp::team_sums",
            "if (exists && part == 0)",
            "if (part == 0)",
        ),
    ),
    (
        "few slots: all lanes of a channel add up all",
        "values",
        (
            "ExchangeWarp::team_sums",
            "channels, part, parts), unit_channels",
            "channels, 0, 1), unit_channels",
        ),
    ),
    (
        "few slots: no block counted",
        "deadlock",
        (
            "ExchangeWarp::team_sums",
            "atomicAdd(counter, 1);",
            "",
        ),
    ),
    (
        "many slots: the team's sums of all channels in one place",
        "deadlock",
        (
            "ExchangeWarp::team_sums",
            "st_relaxed(&totals[c]",
            "st_relaxed(&totals[0]",
        ),
    ),
    (
        "many slots: only the first unit's channels added up",
        "deadlock",
        (
            "ExchangeWarp::team_sums",
            "c >> bits != unit",
            "c >> bits != 0",
        ),
    ),
    (
        "many slots: only as many channels added up as there are blocks",
        "deadlock",
        (
            "ExchangeWarp::team_sums",
            "c += team)",
            "c += channels)",
        ),
    ),
    (
        "many slots: the first block's sums taken for the team's",
        "values",
        (
            "ExchangeWarp::team_sums",
            "gather(totals + channel",
            "gather(slots + channel",
        ),
    ),
    (
        "no place for the team's sums",
        "out of bounds",
        (
            "Planner::with_team",
            "(team + 1) * p.channels",
            "team * p.channels",
        ),
    ),
    (
        "groups share their scratch",
        "values",
        (
            "ExchangeWarp::team_sums",
            "int64_t(b.group(i)) * a.group_bytes",
            "int64_t(b.first_group) * a.group_bytes",
        ),
    ),
    (
        "scratch for one channel of a group",
        "out of bounds",
        (
            "Planner::with_team",
            "(team + 1) * p.channels *",
            "(team + 1) *",
        ),
    ),
    (
        "too little scratch",
        "out of bounds",
        (
            "fused_batch_norm_launch",
            "size_t(arguments.groups) *",
            "size_t(arguments.groups - 1) *",
        ),
    ),
    (
        "scratch not zeroed: state of an earlier launch",
        "unwritten",
        (
            "fused_batch_norm_forward_kernel",
            "st_relaxed(&slots[i], SumSlot<A>{0, 0})",
            "",
        ),
    ),
    (
        "scratch zeroed behind the arrival at the grid's barrier",
        "unwritten",
        (
            "fused_batch_norm_forward_kernel",
            "arrival = grid.barrier_arrive();",
            "",
        ),
        (
            "fused_batch_norm_forward_kernel",
            "auto* const slots =",
            "arrival = grid.barrier_arrive(); auto* const slots =",
        ),
    ),
    (
        "no barrier of the grid",
        "unwritten",
        (
            "fused_batch_norm_forward_kernel",
            "arrival = grid.barrier_arrive();",
            "",
        ),
        (
            "fused_batch_norm_forward_kernel",
            "if (a.cooperative) grid.barrier_wait(std::move(arrival));",
            "",
        ),
    ),
    # ---- the start, running buffers and the counter
    (
        "no barrier of the block at the start",
        "barrier",
        (
            "fused_batch_norm_forward_kernel",
            "__syncthreads();",
            "",
        ),
    ),
    (
        "the cumulative average where blocks do not wait for each other",
        "data race",
        (
            "Planner::consider_group",
            "call.cumulative && call.num_batches_tracked",
            "false",
        ),
    ),
    (
        "every block of a team updates the running buffers",
        "data race",
        (
            "ExchangeWarp::exchange",
            "b.rank == 0 && leads",
            "leads",
        ),
    ),
    (
        "parameters of channels behind C",
        "out of bounds",
        (
            "ExchangeWarp::load_channel",
            "|| c >= a.C",
            "",
        ),
    ),
    (
        "parameters of the group that is done",
        "values",
        (
            "ExchangeWarp::exchange",
            "load_channel(i + stages)",
            "load_channel(i)",
        ),
    ),
    (
        "every block counts the batch",
        "values",
        (
            "fused_batch_norm_forward_kernel",
            "batches && blockIdx.x == 0 &&",
            "batches &&",
        ),
    ),
    (
        "the batch counted before all blocks have read the counter",
        "data race",
        (
            "fused_batch_norm_forward_kernel",
            (
                "if (a.training && batches && blockIdx.x == 0 && threadIdx.x == 0) "
                "atomicAdd(batches, 1);"
            ),
            "",
        ),
        (
            "fused_batch_norm_forward_kernel",
            "const ExchangeWarp<T, kLayout> exchange_warp{b};",
            (
                "if (a.training && a.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0) "
                "++*a.num_batches_tracked; const ExchangeWarp<T, kLayout> exchange_warp{b};"
            ),
        ),
    ),
    # ---- the layout of shared memory
    (
        "places of one stage only",
        "out of bounds",
        (
            "Planner::with_places",
            "stages * smem_vectors * workers",
            "smem_vectors * workers",
        ),
    ),
    (
        "places where the barriers are",
        "barrier",
        (
            "Block",
            "shared + sizeof(Head)",
            "shared",
        ),
    ),
    (
        "no room for the second pivots",
        "data race",
        (
            "Planner::with_places",
            "(3 + 2) * p.channel_stride",
            "(3 + 1) * p.channel_stride",
        ),
    ),
    (
        "room for half of the partial sums",
        "data race",
        (
            "Planner::with_places",
            "2 * p.partials",
            "p.partials",
        ),
    ),
    # ---- the plan and the launch
    (
        "no cooperative launch",
        "barrier",
        (
            "launch",
            "cooperative = arguments.cooperative",
            "cooperative = 0",
        ),
    ),
    (
        "only whole warps of threads",
        "unwritten",
        (
            "block_threads",
            "ceil_div(p.workers, 32)",
            "std::max(p.workers / 32, 1)",
        ),
    ),
    (
        "blocks larger than their share of a multiprocessor",
        "host",
        (
            "Planner::with_workers",
            "multiprocessor_bytes / blocks / 256 * 256",
            "multiprocessor_bytes",
        ),
    ),
    (
        "sums and results in shared memory that is taken",
        "host",
        (
            "Planner::with_workers",
            "with_places(p, workers, 0).shared_bytes",
            "int(sizeof(Head))",
        ),
    ),
    (
        "no other plan where a device has fewer multiprocessors than it says",
        "refused",
        (
            "fused_batch_norm_launch",
            "again = error == cudaErrorCooperativeLaunchTooLarge && device.multiprocessors > 1",
            "again = false",
        ),
    ),
    (
        "the error of a refused launch left to others",
        "host",
        (
            "fused_batch_norm_launch",
            "if (error) cudaGetLastError();",
            "",
        ),
    ),
    (
        "shared memory asked for as this launch needs it",
        "host",
        (
            "launch",
            "device.shared_bytes))",
            "arguments.shared_bytes))",
        ),
    ),
    (
        "shared memory not asked for",
        "refused",
        (
            "launch",
            "arguments.shared_bytes > kUnasked",
            "false",
        ),
    ),
]

# Such plans are remembered: with the planner's own text, by cases.RELATED.
PLANNED_MUTANTS = [
    (
        "a plan remembered for another misalignment",
        "out of bounds",
        (
            "make_plan",
            "misalignment_of(call, size),",
            "0,",
        ),
    ),
    (
        "a plan remembered for another training",
        "out of bounds",
        (
            "make_plan",
            "call.training,",
            "0,",
        ),
    ),
    (
        "a plan remembered for another dtype",
        "values",
        (
            "make_plan",
            "call.dtype,",
            "0,",
        ),
    ),
    (
        "a plan remembered for another layout of memory",
        "values",
        (
            "make_plan",
            "call.channels_last,",
            "0,",
        ),
    ),
    (
        "a plan remembered for another cumulative average",
        "data race",
        (
            "make_plan",
            "call.cumulative && call.num_batches_tracked,",
            "0,",
        ),
    ),
    (
        "a plan remembered for another multiprocessors",
        "host",
        (
            "make_plan",
            "device.multiprocessors,",
            "0,",
        ),
    ),
    (
        "a plan remembered for another shared memory",
        "host",
        (
            "make_plan",
            "device.shared_bytes,",
            "0,",
        ),
    ),
    (
        "a plan remembered for another N",
        "values",
        (
            "make_plan",
            "{call.N,",
            "{0,",
        ),
    ),
    (
        "a plan remembered for another C",
        "values",
        (
            "make_plan",
            "call.C,",
            "0,",
        ),
    ),
    (
        "a plan remembered for another HW",
        "values",
        (
            "make_plan",
            "call.HW,",
            "0,",
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


def check_trial(target, trial):
    """A random case, by its seed, by any plan; or two related ones, by their name."""
    if isinstance(trial, int):
        return cases.check_random(target, trial, any_plan=True)
    for case, device in cases.RELATED[trial]:
        cases.pretend(target, device, schedule=0)
        cases.check_alone(target, case, seed=0)
    return None


def failures(text, trials, build_dir):
    """(trial, kind) of each of these that fails.

    Only the cases are under a limit of time, and of this process's own: a build, or a machine that
    others use, can be slow.
    """
    (begins,) = CUDA_BEGINS.finditer(text)
    faster = text[: begins.end()] + FASTER + text[begins.end() :]
    signal.alarm(BUILD_LIMIT_S)
    target = check.Target(emulate.load(faster, build_dir=build_dir), "cpu", emulate)
    signal.alarm(0)
    for trial in trials:
        signal.setitimer(signal.ITIMER_VIRTUAL, CASE_LIMIT_S)
        try:
            check_trial(target, trial)
        except Exception as error:
            kind = kind_of(error)
            if kind is None:
                raise
            yield trial, kind
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def verdict(text, kind, trials, build_dir):
    """What catches the wrong kernel; else what else has, each once, and "" if nothing has.

    First the kernels for float alone: they compile in a third of the time, and catch most.
    """
    torch.set_num_threads(1)
    if trials == RELATED:
        builds = [(text, RELATED)]
    else:
        text = any_plan_text(text)
        in_float = [s for s in FIRST_SEEDS if cases.random_case(s)[0].dtype == torch.float]
        rest = [s for s in trials if s not in in_float]
        builds = [(apply(text, FLOAT_ALONE), in_float), (text, rest)]
    others = {}
    for of_text, its_trials in builds:
        for trial, found in failures(of_text, its_trials, build_dir):
            if found == kind:
                return f"{kind}, case {trial}", True
            others.setdefault(found, trial)
    return ", ".join(f"{found} (case {trial})" for found, trial in others.items()), False


def examine(text, kind, trials, build_dir):
    """(what was found, whether that is `kind`), from a process of its own: it may crash or hang."""
    import torch._dynamo  # noqa: F401  # by torch's dispatch modes; here, so that each child has it

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said, caught = verdict(text, kind, trials, build_dir)
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
    chosen = [(ALL_SEEDS, m) for m in MUTANTS] + [(RELATED, m) for m in PLANNED_MUTANTS]
    chosen = [m for m in chosen if not words or any(word in m[1][0] for word in words)]
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
        for trials, (name, kind, *edits) in chosen:
            wrong, trouble = applied(text, edits)
            future = None if trouble else pool.submit(examine, wrong, kind, trials, build_dir)
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
