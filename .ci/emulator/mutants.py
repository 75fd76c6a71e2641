"""Kernels that are wrong on purpose: small edits of the text, each of which the tests must catch.

Applies each edit to a copy of model_new.py's text, and runs the random cases of ../tests/cases.py
until one fails. A mutant that survives points at a check that is missing. Some minutes.

An edit names a function (or struct, lambda, method: `Tile::advance`) and the text in it that is
replaced, which occurs once there; spaces and line ends in it do not count. So what is renamed,
moved or formatted elsewhere breaks no mutant. One that no longer applies or compiles survives.
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

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parents[1])]
CASES = 2000  # random cases for each mutant, at most
LIMIT_S = 60  # of the build and of each case, after which the mutant counts as one that hangs
CUDA_BEGINS = re.compile(r"^FUSED_BATCH_NORM_CUDA = r('''|\"\"\")", re.MULTILINE)
FASTER = '\n#pragma GCC optimize("O0")'  # compiles in a third of the time, most of what one takes

# What is wrong, then one edit or more: the function, the text in it, its replacement.
MUTANTS = [
    # ---- the formula
    (
        "eps outside the root",
        (
            "Moments",
            "rsqrt(m2 * a.plan.per_element + a.call.eps)",
            "1 / (sqrt(m2 * a.plan.per_element) + a.call.eps)",
        ),
    ),
    (
        "eps forgotten with running statistics",
        (
            "resident",
            "(parameters.running_var.value(call.running_float) + call.eps)",
            "(parameters.running_var.value(call.running_float))",
        ),
    ),
    (
        "var unbiased in y",
        (
            "Moments",
            "(m2 * a.plan.per_element + a.call.eps)",
            "(m2 * a.plan.per_element_but_one + a.call.eps)",
        ),
    ),
    (
        "running_var biased",
        ("Channel::save", "per_element_but_one", "per_element"),
    ),
    (
        "momentum weighs the old mean",
        (
            "Channel::save",
            "(1 - factor) * running_mean.value(call.running_float) + factor",
            "factor * running_mean.value(call.running_float) + (1 - factor)",
        ),
    ),
    (
        "the cumulative average counts from 1",
        (
            "fused_batch_norm_forward_kernel",
            "(*call.num_batches_tracked + 1)",
            "(*call.num_batches_tracked + 2)",
        ),
    ),
    (
        "no cumulative average",
        ("fused_batch_norm_forward_kernel", "(call.cumulative)", "(call.cumulative > 1)"),
    ),
    (
        "momentum None is 0.1",
        ("run", "momentum.value_or(0)", "momentum.value_or(0.1)"),
        ("run", "call.cumulative = !momentum.has_value();", ""),
    ),
    (
        "the cumulative average where no block reads the counter",
        (
            "make_plan::find_resident",
            "if (call.cumulative && call.num_batches_tracked) return false;",
            "",
        ),
    ),
    (
        "eval uses the batch's statistics",
        ("ModelNew", "self.training or running_mean is None", "True"),
    ),
    (
        "eval: only a team's first block knows the statistics",
        ("resident", "|| !call.training", ""),
    ),
    (
        "beta forgotten",
        ("Channel::result", "(shift - (mean - A(mean)) * scale)", "((A(mean) - mean) * scale)"),
    ),
    (
        "the mean's low part forgotten",
        ("Channel::result", "(shift - (mean - A(mean)) * scale)", "(shift)"),
    ),
    (
        "the mean folded into the shift",
        (
            "normalise",
            "(widen(x.get(i)) - r[i].mean) * r[i].scale + r[i].shift",
            "widen(x.get(i)) * r[i].scale + (r[i].shift - r[i].mean * r[i].scale)",
        ),
    ),
    (
        "the block's own sums added twice",
        (
            "exchange",
            "Sums<double> sums;\n#pragma unroll",
            "Sums<double> sums = lane == 0 ? own : Sums<double>();\n#pragma unroll",
        ),
    ),
    (
        "a warp's sums added twice",
        (
            "finish",
            "(b.lane < p.statistics) sums.add(partial[b.lane].sums)",
            "(b.lane <= p.statistics) sums.add(partial[b.lane % p.statistics].sums)",
        ),
    ),
    (
        "the last block's sums left out",
        ("exchange", "i < team ? 0", "i < team - 1 ? 0"),
    ),
    (
        "gamma read as float whatever it is",
        ("Channel", "(call.gamma, c, call.affine_float)", "(call.gamma, c, true)"),
        ("Channel::result", "gamma.value(call.affine_float)", "gamma.value(true)"),
    ),
    (
        "running_var stored as float whatever it is",
        (
            "Channel::save",
            "store_parameter<T>(call.running_var, c, call.running_float,",
            "store_parameter<T>(call.running_var, c, true,",
        ),
    ),
    (
        "elements pushed into the wrong half of a word",
        ("Vector::push", "[i - 1] >> kBits", "[i - 1]"),
    ),
    (
        "only half of a double",
        ("Vector::push", "if (kWords > 1) word[1] = bits[1];", ""),
    ),
    # ---- the pivot
    (
        "sums about 0",
        ("pivot_of", "isfinite(pivot) ? pivot : A(0)", "A(0)"),
    ),
    (
        "the mean counted from 0, not from the pivot",
        ("Moments", "pivot + offset", "offset"),
    ),
    (
        "var about the pivot",
        ("Moments", "- sums.s1 * offset", ""),
    ),
    (
        "each block its own pivot",
        ("load_sample", "__umulhi(run * 0x85ebca6bu,", "__umulhi((run + b.rank) * 0x85ebca6bu,"),
    ),
    (
        "each warp its own pivot",
        (
            "load_sample",
            "__umulhi(run * 0x85ebca6bu,",
            "__umulhi((run + threadIdx.x / 32) * 0x85ebca6bu,",
        ),
    ),
    (
        "runs of samples that reach past the plane",
        ("load_sample", "(call.HW - length + 1)", "(call.HW)"),
    ),
    (
        "the channel before's pivot",
        ("summarise", "(b, channel + p.teams)", "(b, channel)"),
    ),
    (
        "hold: the channel before's pivot",
        ("hold", "(b, channel + p.teams)", "(b, channel)"),
    ),
    (
        "packed: the first channel's pivot for a pack's others",
        ("resident", "looks_after ? channel", "looks_after ? channel - warp"),
    ),
    (
        "a sample of the channel behind the last",
        ("load_sample", "if (channel >= call.C) return T();", ""),
    ),
    # ---- indices
    (
        "a tile's next plane is the next channel's",
        ("Tile::advance", "packs * p.plane", "plane"),
    ),
    (
        "the step between tiles counts planes of one channel",
        ("make_plan::set_tiles", "packs * p.plane", "plane"),
    ),
    (
        "the division's magic rounded down",
        (
            "divisor",
            "(ceil_div(int64_t(1) << (31 + by.shift), d))",
            "((int64_t(1) << (31 + by.shift)) / d)",
        ),
    ),
    (
        "tail not masked",
        ("Place::has", "(i >= begin && i < end)", "i >= begin"),
    ),
    (
        "edges summed",
        (
            "add_vector",
            "place.has(i) ? widen(x.get(i)) - pivot[i] : A(0)",
            "widen(x.get(i)) - pivot[i]",
        ),
    ),
    (
        "edges stored as whole vectors",
        ("normalise", "place.count() == Vector<T>::kSize", "place.count() > 0"),
    ),
    (
        "reads past the end of x",
        (
            "inside",
            (
                "!kMasked || from.element + Vector<T>::kSize <= b.a.call.N * b.a.call.C * "
                "b.a.call.HW"
            ),
            "true",
        ),
    ),
    (
        "the copy engine reads past the end of x",
        ("send", "if (inside(b, last))", ""),
    ),
    (
        "what the copy engine leaves at the end of x forgotten",
        ("send", "if (b.lane == 0) to[count] = elementwise(b, last);", ""),
    ),
    (
        "planes aligned as the tensor",
        ("shift_of", "(plane + reinterpret_cast<uintptr_t>(b.a.call.x) / sizeof(T))", "plane"),
    ),
    (
        "the copy engine starts at the plane, not at its cover",
        ("first_element", "(kMasked ? shift_of<T>(b, tile.plane) : 0)", "0"),
    ),
    (
        "one vector too few for a plane's edges",
        ("make_plan::set_planes", "(p.plane + size - 2) / size + 1", "(p.plane + size - 2) / size"),
    ),
    (
        "one vector too many in the last tile",
        (
            "Tile::clip",
            "(p.tile_vectors, p.channel_vectors - first)",
            "(p.tile_vectors, p.channel_vectors - first + 1)",
        ),
    ),
    (
        "tiles behind the channel's end",
        (
            "Tile::clip",
            "first < p.channel_vectors ? min(p.tile_vectors, p.channel_vectors - first) : 0",
            "min(p.tile_vectors, p.channel_vectors - first)",
        ),
    ),
    (
        "a tile's last vectors off by one",
        ("for_each_vector", "if (v + step * i < end)", "if (v + step * i <= end)"),
    ),
    (
        "blocks of a team take the same tiles",
        ("Tile", "(index * p.team + b.rank)", "(index * p.team)"),
    ),
    (
        "each warp sums all of a tile",
        ("summarise", "warp * 32 + b.lane, p.statistics * 32", "b.lane, 32"),
    ),
    (
        "a warp sums its vectors only once for two",
        (
            "summarise",
            "warp * 32 + b.lane, p.statistics * 32",
            "warp * 32 + b.lane, p.statistics * 64",
        ),
    ),
    (
        "a tile's second plane copied to the first's place",
        ("send", "copy_bulk(to + begin,", "copy_bulk(to,"),
    ),
    # ---- packed: channels side by side
    (
        "a pack's channels counted from 0",
        ("resident", "b.first_channel * p.pack +", ""),
    ),
    (
        "a vector's split off by one",
        (
            "resident",
            "((first + 1) * call.HW - element_of(threadIdx.x))",
            "((first + 1) * call.HW - element_of(threadIdx.x)) + 1",
        ),
    ),
    (
        "no split: all elements are the first channel's",
        ("resident", "values[next], split", "values[next], kSize"),
    ),
    (
        "the next channel's pivot for all of a vector",
        ("resident", "pick(pivots)", "same<T>(pivots[next])"),
    ),
    (
        "the next channel's result for all of a vector",
        ("resident", "pick(results)", "same<T>(results[kPacked ? next : 0])"),
    ),
    (
        "the channel behind a pack's last",
        ("resident", "min(first + 1, p.pack - 1)", "first + 1"),
    ),
    (
        "the next channel's elements summed twice",
        (
            "resident",
            "{add_up(part, 0, split), add_up(part, split, kSize), 0}",
            "{add_up(part), add_up(part, split, kSize), 0}",
        ),
    ),
    (
        "the next channel's elements forgotten",
        (
            "resident",
            "sums.add(at * kSize < own ? of.b : of.a)",
            "if (at * kSize >= own) sums.add(of.a)",
        ),
    ),
    (
        "the next channel's elements taken for this one's",
        ("resident", "(at * kSize < own ? of.b : of.a)", "(of.a)"),
    ),
    (
        "a channel's last column forgotten",
        ("resident", "+ 1 - column", "- column"),
    ),
    (
        "a row of threads' sums forgotten",
        ("resident", "(p.threads / p.plane_vectors)", "(p.threads / p.plane_vectors - 1)"),
    ),
    (
        "threads not a multiple of the plane",
        ("make_plan::resident", "(planes * p.plane_vectors)", "(planes * p.plane_vectors + 1)"),
    ),
    (
        "fewer warps than a pack has channels",
        ("make_plan::resident", "ceil_div(32 * p.pack - 31, p.plane_vectors)", "int64_t(1)"),
    ),
    (
        "a block's share ends within a plane",
        (
            "make_plan::resident",
            "(ceil_div(call.N, team) * p.plane_vectors)",
            "(ceil_div(p.channel_vectors, team))",
        ),
    ),
    (
        "channels beyond whole packs",
        ("make_plan", "call.C % pack == 0 &&", ""),
    ),
    (
        "packed though x is not aligned",
        ("make_plan", "size > 2 && aligned &&", "size > 2 &&"),
    ),
    (
        "three channels in a vector",
        ("make_plan", "call.HW >= size - 1 &&", ""),
    ),
    (
        "a packed thread's vectors too near each other",
        ("make_plan::resident", "packs * p.plane", "plane"),
    ),
    (
        "too little room for the cluster's sums",
        ("resident", "+ kMaxPack * kMaxCluster", "+ kMaxPack"),
    ),
    (
        "too little room for the threads' sums",
        ("make_plan::resident", "kResidentOverheadBytes + sums", "kResidentOverheadBytes"),
    ),
    # ---- resident and packed: from x to y
    (
        "vectors summed before they are there",
        ("resident", "copies_wait<1>();", ""),
    ),
    (
        "the second group summed before it is there",
        ("resident", "(add, [] { copies_wait<0>(); })", "(add, [] {})"),
    ),
    (
        "the groups of vectors not made",
        ("resident", "{ copies_commit(); }", "{}"),
    ),
    (
        "both groups made at once",
        ("resident", "[] { copies_commit(); });", "[] {}); copies_commit(); copies_commit();"),
        ("resident", "copies_wait<1>();", "copies_wait<2>();"),
    ),
    (
        "eval: vectors stored before they are there",
        ("resident", "copies_wait<0>(); } else {", "} else {"),
    ),
    (
        "the vectors in registers not summed",
        ("resident", "each_held(add);", ""),
    ),
    (
        "the vectors in shared memory not stored",
        ("resident", "each_kept(store, [] {});", ""),
    ),
    (
        "the second group of vectors left out",
        ("resident::each_kept", "< 2; ++group", "< 1; ++group"),
    ),
    (
        "the second group of vectors not stored",
        (
            "resident",
            "(store, [] {})",
            (
                "([&](const auto& x, const auto& place) { if (&x - kept < int(p.early * "
                "p.threads)) store(x, place); }, [] {})"
            ),
        ),
    ),
    (
        "a vector both in registers and in shared memory",
        ("resident", "kHeld * p.threads", "(kHeld - 1) * p.threads"),
    ),
    (
        "too little room for the vectors in shared memory",
        (
            "make_plan::resident",
            "(resident_held(size, p.pack > 1))",
            "(resident_held(size, p.pack > 1) + 1)",
        ),
    ),
    (
        "threads beyond take vectors",
        ("resident", "thread < p.threads ? share.count : 0", "share.count"),
    ),
    (
        "the sums of warps that are not there",
        ("resident", "} else if (b.lane < int(blockDim.x / 32)) {", "} else {"),
    ),
    (
        "pivots read before they are there",
        ("resident", "pivots[warp] = pivot.a; __syncthreads();", "pivots[warp] = pivot.a;"),
    ),
    (
        "warps' sums read before they are there",
        ("resident", "wait_for_grid(); __syncthreads();", "wait_for_grid();"),
    ),
    (
        "results read before they are there",
        ("resident", "__syncthreads(); if (end == 0)", "if (end == 0)"),
    ),
    (
        "a cooperative block of a warp too many",
        ("make_plan::resident", "- 32 * cooperative", ""),
    ),
    (
        "blocks larger than half of a multiprocessor",
        ("make_plan::resident", "= half_bytes", "= 2 * half_bytes"),
    ),
    # ---- held, streamed and resident tiles
    (
        "the streamed tiles forgotten",
        ("hold", "kept; first +", "p.held; first +"),
    ),
    (
        "a streamed tile read for its neighbour",
        ("hold", "+ h + p.held", "+ h + p.held + 1"),
    ),
    (
        "held tiles stored at each other's places",
        ("hold", "each_held(held[h], stored,", "each_held(held[kTiles - 1 - h], stored,"),
    ),
    (
        "held tiles stored past their ends",
        ("hold::each_held", "if (v < tile.count)", ""),
    ),
    (
        "the first resident tile forgotten",
        ("hold", "(t == kept) to_store", "(t == kept + 1) to_store"),
    ),
    (
        "a resident tile taken for streamed",
        ("hold", "(t < kept) release", "(t <= kept) release"),
    ),
    (
        "streamed tiles not let go",
        ("hold", "(t < kept) release", "(t < p.held) release"),
    ),
    (
        "resident tiles not let go",
        ("hold", "release(b, to_store.slot);", ""),
    ),
    (
        "the ring's tiles let go before they are stored",
        (
            "store",
            (
                "for_each_vector<kAtOnce>(tile_at<T>(b, position.slot), warp * 32 + "
                "b.lane, tile.count, p.storers * 32, [&](unsigned v, const Vector<T>& x) { "
                "normalise(b, x, Place<T, kMasked>(b, tile, v), result); }); release(b, "
                "position.slot)"
            ),
            (
                "release(b, position.slot); for_each_vector<kAtOnce>(tile_at<T>(b, "
                "position.slot), warp * 32 + b.lane, tile.count, p.storers * 32, "
                "[&](unsigned v, const Vector<T>& x) { normalise(b, x, Place<T, "
                "kMasked>(b, tile, v), result); })"
            ),
        ),
    ),
    # ---- the ring
    (
        "fewer tiles than stay in registers",
        ("make_plan::lay_out", "p.tile_vectors), hold ? held_tiles : 1", "p.tile_vectors), 1"),
    ),
    (
        "tiles in registers forgotten by the plan",
        ("make_plan::lay_out", "held_tiles : 0", "held_tiles - 1 : 0"),
    ),
    (
        "a tile of more vectors than stay in registers",
        ("make_plan::lay_out", "kHoldVectors", "2 * kHoldVectors"),
    ),
    (
        "channels that the ring cannot hold in the kernel that keeps them there",
        ("make_plan::lay_out", "p.tiles + 4 <= p.slots", "true"),
    ),
    (
        "more tiles in flight than slots",
        (
            "make_plan",
            "std::min<int64_t>(kFlightBytes / tile_bytes, p.slots - 1)",
            "kFlightBytes / tile_bytes",
        ),
    ),
    (
        "too few channel slots",
        ("make_plan", "p.channel_slots =", "p.channel_slots = warps + 0 *"),
    ),
    (
        "a slot empty when the first warp has stored it",
        (
            "fused_batch_norm_forward_kernel",
            "32 * (p.storers > 0 ? p.storers : p.statistics)",
            "32",
        ),
    ),
    (
        "phases not followed",
        ("RingPosition::advance", "parity ^= 1;", ""),
    ),
    # ---- barriers
    (
        "barriers used before they are there",
        ("fused_batch_norm_forward_kernel", "__syncthreads();", ""),
    ),
    (
        "barriers not published to the copy engine",
        ("fused_batch_norm_forward_kernel", "barrier_init_fence();", ""),
    ),
    (
        "full counts half the arrivals",
        ("fused_batch_norm_forward_kernel", "producers * 64", "producers * 32"),
    ),
    (
        "a slow lane still reads a tile that is let go",
        ("release", "barrier_arrive", "if (b.lane == 0) barrier_arrive"),
        (
            "fused_batch_norm_forward_kernel",
            "32 * (p.storers > 0 ? p.storers : p.statistics)",
            "(p.storers > 0 ? p.storers : p.statistics)",
        ),
    ),
    (
        "a slow lane still sums a tile that is let go",
        ("Summary::publish", "barrier_arrive", "if (b.lane == 0) barrier_arrive"),
        ("fused_batch_norm_forward_kernel", "32 * p.statistics", "p.statistics"),
    ),
    (
        "a slow lane still reads partial sums",
        ("finish", "barrier_arrive", "if (b.lane == 0) barrier_arrive"),
        ("fused_batch_norm_forward_kernel", "ready[s], 32", "ready[s], 1"),
    ),
    (
        "a slow lane of the producer misses a phase",
        ("Producer::run", "__syncwarp();", ""),
    ),
    (
        "the producer does not wait for an empty slot",
        ("Producer::run", "barrier_wait(&b.shared.empty[position.slot], position.parity ^ 1);", ""),
    ),
    (
        "the producer waits for the wrong phase",
        ("Producer::run", "position.parity ^ 1", "position.parity"),
    ),
    (
        "the store warps do not wait for the result",
        ("wait_for_result", "barrier_wait(&b.shared.ready[at.slot], at.parity);", ""),
    ),
    (
        "hold waits for the first channel's result again",
        ("hold", "at.advance(1, p.channel_slots);", ""),
    ),
    (
        "tiles summed before they are there",
        ("summarise", "barrier_wait(&b.shared.full[position.slot], position.parity);", ""),
    ),
    (
        "tiles held before they are there",
        ("hold", "barrier_wait(&b.shared.full[position.slot], position.parity); Sums", "Sums"),
    ),
    (
        "hold: tiles summed before they are there",
        (
            "hold",
            "barrier_wait(&b.shared.full[position.slot], position.parity); summary",
            "summary",
        ),
    ),
    (
        "partial sums read before they are there",
        ("finish", "barrier_wait(&b.shared.summed[at.slot], at.parity);", ""),
    ),
    (
        "fewer bytes expected than copied",
        ("send", "(full, count * kVectorBytes)", "(full, count * kVectorBytes / 2)"),
    ),
    (
        "bytes expected that no copy brings",
        ("send", "(full, count * kVectorBytes)", "(full, tile.count * kVectorBytes)"),
    ),
    (
        "copies not tracked",
        ("send", "copies_arrive", "barrier_arrive"),
    ),
    (
        "only copies tracked",
        ("send", "barrier_arrive", "copies_arrive"),
    ),
    # ---- between blocks, through words
    (
        "no barrier of the grid",
        (
            "fused_batch_norm_forward_kernel",
            "if (p.cooperative) arrival = grid.barrier_arrive();",
            "",
        ),
        (
            "fused_batch_norm_forward_kernel::wait_for_grid",
            "if (p.cooperative) grid.barrier_wait(std::move(arrival));",
            "//",
        ),
    ),
    (
        "the grid's barrier not waited for",
        (
            "fused_batch_norm_forward_kernel::wait_for_grid",
            "if (p.cooperative) grid.barrier_wait(std::move(arrival));",
            "//",
        ),
    ),
    (
        "words wiped behind the grid's barrier",
        (
            "fused_batch_norm_forward_kernel",
            (
                "for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < "
                "p.scratch_words; i += int64_t(p.team) * p.teams * blockDim.x) "
                "store_word(&a.scratch[i], Word{0, 0});"
            ),
            "",
        ),
        (
            "fused_batch_norm_forward_kernel::wait_for_grid",
            "(std::move(arrival))",
            (
                "(std::move(arrival)); for (int64_t i = int64_t(blockIdx.x) * blockDim.x + "
                "threadIdx.x; i < p.scratch_words; i += int64_t(p.team) * p.teams * "
                "blockDim.x) store_word(&a.scratch[i], Word{0, 0})"
            ),
        ),
    ),
    (
        "no barrier of the grid for the counter",
        ("make_plan", "|| (call.cumulative && call.num_batches_tracked)", ""),
    ),
    (
        "scratch not zeroed: state of an earlier launch",
        ("fused_batch_norm_forward_kernel", "store_word(&a.scratch[i], Word{0, 0})", ""),
    ),
    (
        "too little scratch",
        ("make_plan::set_scratch", "(p.team, kLineWords) + 1", "(p.team, kLineWords)"),
    ),
    (
        "a peer's words believed without their tags",
        ("exchange", "missing = missing || word[i].tag == 0", "(void)0"),
    ),
    (
        "words without a mark where s2 is 0",
        ("exchange", "__double_as_longlong(-own.s2)", "__double_as_longlong(own.s2)"),
        ("exchange", "-__longlong_as_double", "__longlong_as_double"),
    ),
    (
        "waits for blocks beyond the team",
        ("exchange", "(unsigned long long)__double_as_longlong(-0.0)", "0ull"),
    ),
    (
        "every block of a team reads the running statistics",
        ("finish", "b.lane == 0, b.rank == 0", "b.lane == 0, true"),
    ),
    (
        "every lane reads the running statistics",
        ("finish", "b.lane == 0, b.rank == 0", "true, b.rank == 0"),
    ),
    (
        "every block of a team updates the running buffers",
        ("finish", "&& b.rank == 0", ""),
    ),
    (
        "every block counts the batch",
        (
            "fused_batch_norm_forward_kernel::wait_for_grid",
            "(call.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0)",
            "(call.num_batches_tracked && threadIdx.x == 0)",
        ),
    ),
    (
        "the counter read late",
        (
            "fused_batch_norm_forward_kernel",
            "wait_for_grid()",
            (
                "wait_for_grid(); if (call.cumulative && call.num_batches_tracked) factor "
                "= 1.0 / double(*call.num_batches_tracked)"
            ),
        ),
    ),
    (
        "more blocks than fit",
        ("fused_batch_norm_launch", "(plan.team * plan.teams)", "(plan.team * (plan.teams + 1))"),
    ),
    # ---- between blocks, resident and packed
    (
        "resident: no barrier of the grid",
        (
            "resident",
            "wait_for_grid()",
            (
                "if (blockIdx.x == 0 && threadIdx.x == 0 && call.num_batches_tracked) "
                "++*call.num_batches_tracked"
            ),
        ),
    ),
    (
        "a team's channels share their scratch",
        ("exchange", "channel * b.", "b.first_channel * b."),
    ),
    (
        "resident: every block of a team updates the running buffers",
        ("resident", "if (b.rank == 0)", ""),
    ),
    (
        "resident: every block of a team reads the running statistics",
        ("resident", "b.rank == 0 || !call.training", "true"),
    ),
    (
        "resident: no cooperative launch",
        (
            "fused_batch_norm_launch",
            "plan.cooperative;",
            "plan.cooperative && plan.structure > kPacked;",
        ),
    ),
    (
        "no cluster asked for",
        ("fused_batch_norm_launch", "plan.cluster ? 2 : 1", "1"),
    ),
    (
        "clusters where there are none",
        ("make_plan", "device.architecture >= 90 ? kMaxCluster : 1", "kMaxCluster"),
    ),
    (
        "threads arrive at the cluster's barrier apart from their warp",
        ("resident", "__syncwarp();  // .aligned", "// .aligned"),
    ),
    (
        "threads wait at the cluster's barrier apart from their warp",
        ("resident", "__syncwarp();  // or threads", "// or threads"),
    ),
    (
        "no barrier of the cluster",
        ("resident", "cluster_arrive();", ""),
        ("resident", "if (p.cluster) cluster_wait();", ""),
    ),
    (
        "the cluster's barrier not waited for",
        ("resident", "if (p.cluster) cluster_wait();", ""),
    ),
    (
        "peers written to before they are there",
        ("resident", "if (p.cluster) cluster_wait();", ""),
        (
            "resident",
            "__syncthreads(); if (end == 0)",
            "if (p.cluster) cluster_wait(); __syncthreads(); if (end == 0)",
        ),
    ),
    (
        "the barrier for the peers' sums initialised when they may come",
        ("resident", "cluster_arrive();", ""),
        ("resident", "if (threadIdx.x == 0)", "cluster_arrive(); if (threadIdx.x == 0)"),
    ),
    (
        "the barrier for the peers' sums not fenced",
        ("resident", "barrier_init_fence();", ""),
    ),
    (
        "one peer's sums not expected",
        ("resident", "p.team * sizeof", "(p.team - 1) * sizeof"),
    ),
    (
        "one channel's sums expected from peers",
        ("resident", "p.pack * p.team * sizeof", "p.team * sizeof"),
    ),
    (
        "the peers' sums not waited for",
        ("resident", "barrier_wait_for_peers(gathered, 0);", ""),
    ),
    (
        "the peers' sums waited for like own copies",
        ("resident", "barrier_wait_for_peers", "barrier_wait"),
    ),
    (
        "the peers' sums waited for in the next phase",
        ("resident", "(gathered, 0)", "(gathered, 1)"),
    ),
    (
        "sums sent to the wrong rank's place",
        ("resident", "of_channel[b.rank]", "of_channel[b.lane]"),
    ),
    (
        "sums sent to the own block only",
        (
            "resident",
            "send_to_peer(&of_channel[b.rank], b.lane,",
            "send_to_peer(&of_channel[b.rank], b.rank,",
        ),
    ),
    (
        "sums sent to one block too many",
        ("resident", "(b.lane < p.team)", "(b.lane <= p.team)"),
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


def verdict(text, build_dir):
    """What catches the wrong kernel: the detector's name, or "values"; "" if nothing does."""
    import cases
    import emulate
    import torch

    import check

    torch.set_num_threads(1)
    (begins,) = CUDA_BEGINS.finditer(text)
    faster = text[: begins.end()] + FASTER + text[begins.end() :]
    target = check.Target(emulate.load(faster, build_dir=build_dir), "cpu", emulate)
    for seed in range(1, CASES + 1):
        signal.alarm(LIMIT_S)
        case, device = cases.random_case(seed)
        cases.pretend(target, device, schedule=seed)
        try:
            cases.check_alone(target, case, seed)
        except AssertionError:
            return f"values, case {seed}"
        except Exception as error:
            detector = re.search(r"emulator: ([a-z ]+):", str(error))
            return f"{detector[1] if detector else f'refused ({error})'}, case {seed}"
    return ""


def examine(edits, text, build_dir):
    """(what caught it, what else went wrong), from a process of its own: it may crash or hang."""
    try:
        wrong = apply(text, *edits)
    except ValueError as error:
        return "", str(error)
    # Here, so that each child finds them loaded: torch too, and what its dispatch modes import.
    import cases  # noqa: F401
    import emulate  # noqa: F401
    import torch._dynamo  # noqa: F401

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        try:
            said = verdict(wrong, build_dir)
        except Exception as error:  # it must compile: else it proves nothing
            said = f"!{error}"
        os.write(write, said.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("no end" if number == signal.SIGALRM else f"crash, signal {number}"), ""
    return ("", said[1:]) if said.startswith("!") else (said, "")


def main():
    """In as many processes as there are processors; returns how many survive."""
    import emulate

    text = (HERE.parents[1] / "model_new.py").read_text()
    emulate.load(text)
    caught_by = collections.Counter()
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as build_dir,
        concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool,
    ):
        shutil.copytree(HERE / "build", build_dir, dirs_exist_ok=True)  # what is the same for all
        unchanged = pool.submit(examine, (), text, build_dir)
        verdicts = [pool.submit(examine, edits, text, build_dir) for _, *edits in MUTANTS]
        if any(unchanged.result()):
            sys.exit(f"the kernel itself fails: {''.join(unchanged.result())}")
        for (name, *_), result in zip(MUTANTS, verdicts, strict=True):
            caught, trouble = result.result()
            print(f"{name}: {f'caught by {caught}' if caught else trouble or 'SURVIVES'}")
            caught_by[re.split(r",| \(", caught)[0]] += 1
    survivors = caught_by.pop("", 0)
    print(", ".join(f"{count} by {kind}" for kind, count in sorted(caught_by.items())))
    print(f"mutants: {caught_by.total()} passed, {survivors} failed")
    return survivors


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
