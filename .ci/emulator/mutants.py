"""Kernels that are wrong on purpose: small edits of the text, each of which the checks must catch.

`run(report)` applies each edit to a copy of model_new.py's text and runs the random cases of fuzz.py until one fails.
A mutant that survives points at a check that is missing.
"""

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
CASES = 1000  # random cases per mutant, at most
LIMIT_S = 60  # of the build and of each case, after which the mutant counts as one that hangs

_FIRST_LINE = "#include <cooperative_groups.h>\n"  # of the CUDA text
_FASTER = '#pragma GCC optimize("O0")\n'  # compiles in a third of the time, which is most of what a mutant takes

_NORMALISE = """      for_each_vector<kAtOnce>(tile_at<T>(b, position.slot), warp * 32 + b.lane, tile.count, p.storers * 32,
                               [&](unsigned v, const Vector<T>& x) { normalise(b, x, Place<T, kMasked>(b, tile, v), result); });
"""
_RELEASE = "      release(b, position.slot);\n"
_ZERO = "for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.scratch_words; i += int64_t(p.team) * p.teams * blockDim.x)\n      store_word(&a.scratch[i], Word{0, 0});"
_FIRST_ARRIVAL = "    cluster_arrive();  // waited for below: then the peers are there\n"
_FIRST_WAIT = "  if (p.cluster) cluster_wait();\n"
_INIT_GATHERED = "    if (threadIdx.x == 0) {\n      barrier_init(gathered, 1);\n"
_AWAIT_SUMS = "        barrier_wait_for_peers(gathered, 0);\n"
_GRID_WAIT = "    if (p.cooperative) grid.barrier_wait(std::move(arrival));"

# (what is wrong, text, its replacement, perhaps more such pairs). Each text occurs once.
MUTANTS = [
    # ---- the formula
    ("eps outside the root", "rsqrt(m2 * a.plan.per_element + a.call.eps)", "1 / (sqrt(m2 * a.plan.per_element) + a.call.eps)"),
    ("eps forgotten with running statistics", "rsqrt(parameters.running_var.value(call.running_float) + call.eps)", "rsqrt(parameters.running_var.value(call.running_float))"),
    ("var unbiased in y", "rsqrt(m2 * a.plan.per_element + a.call.eps)", "rsqrt(m2 * a.plan.per_element_but_one + a.call.eps)"),
    ("running_var biased", "moments.m2 * p.per_element_but_one;", "moments.m2 * p.per_element;"),
    ("momentum weighs the old mean", "(1 - factor) * running_mean.value(call.running_float) + factor * moments.mean", "factor * running_mean.value(call.running_float) + (1 - factor) * moments.mean"),
    ("the cumulative average counts from 1", "double(*call.num_batches_tracked + 1)", "double(*call.num_batches_tracked + 2)"),
    ("no cumulative average", "if (call.cumulative) factor =", "if (call.cumulative > 1) factor ="),
    ("momentum None is 0.1", "call.momentum = momentum.value_or(0);\n  call.cumulative = !momentum.has_value();\n  call.dtype = dtype_code(x", "call.momentum = momentum.value_or(0.1);\n  call.dtype = dtype_code(x"),
    ("the cumulative average where no block reads the counter", "if (call.cumulative && call.num_batches_tracked) return false;", ""),
    ("eval uses the batch's statistics", "self.training or running_mean is None", "True"),
    ("eval: only a team's first block knows the statistics", "leads, b.rank == 0 || !call.training", "leads, b.rank == 0"),
    ("beta forgotten", "A(shift - (mean - A(mean)) * scale)", "A((A(mean) - mean) * scale)"),
    ("the mean's low part forgotten", "A(shift - (mean - A(mean)) * scale)", "A(shift)"),
    ("the mean folded into the shift", "(widen(x.get(i)) - r[i].mean) * r[i].scale + r[i].shift", "widen(x.get(i)) * r[i].scale + (r[i].shift - r[i].mean * r[i].scale)"),
    ("the block's own sums added twice", "  Sums<double> sums;\n#pragma unroll", "  Sums<double> sums = lane == 0 ? own : Sums<double>();\n#pragma unroll"),
    ("a warp's sums added twice", "if (b.lane < p.statistics) sums.add(partial[b.lane].sums)", "if (b.lane <= p.statistics) sums.add(partial[b.lane % p.statistics].sums)"),
    ("the last block's sums left out", "lane + 32 * i < team ? 0", "lane + 32 * i < team - 1 ? 0"),
    ("gamma read as float whatever it is", "gamma.load(call.gamma, c, call.affine_float)", "gamma.load(call.gamma, c, true)", "gamma.value(call.affine_float)", "gamma.value(true)"),
    ("running_var stored as float whatever it is", "store_parameter<T>(call.running_var, c, call.running_float,", "store_parameter<T>(call.running_var, c, true,"),
    ("elements pushed into the wrong half of a word", "word[i - 1] >> kBits", "word[i - 1]"),
    ("only half of a double", "if (kWords > 1) word[1] = bits[1];", ""),
    # ---- the pivot
    ("sums about 0", "return isfinite(pivot) ? pivot : A(0);", "return A(0);"),
    ("the mean counted from 0, not from the pivot", "mean = pivot + offset;", "mean = offset;"),
    ("var about the pivot", "m2 = sums.s2 - sums.s1 * offset;", "m2 = sums.s2;"),
    ("each block its own pivot", "__umulhi(run * 0x85ebca6bu,", "__umulhi((run + b.rank) * 0x85ebca6bu,"),
    ("each warp its own pivot", "__umulhi(run * 0x85ebca6bu,", "__umulhi((run + threadIdx.x / 32) * 0x85ebca6bu,"),
    ("runs of samples that reach past the plane", "unsigned(call.HW - length + 1)", "unsigned(call.HW)"),
    ("the channel before's pivot", "sample = load_sample<T>(b, channel + p.teams);\n    Tile tile(b, channel, 0);\n    for", "sample = load_sample<T>(b, channel);\n    Tile tile(b, channel, 0);\n    for"),
    ("hold: the channel before's pivot", "sample = load_sample<T>(b, channel + p.teams);\n    Tile tile(b, channel, 0);\n#pragma", "sample = load_sample<T>(b, channel);\n    Tile tile(b, channel, 0);\n#pragma"),
    ("packed: the first channel's pivot for a pack's others", "looks_after ? channel : call.C)", "looks_after ? channel - warp : call.C)"),
    ("a sample of the channel behind the last", "  if (channel >= call.C) return T();\n", ""),
    # ---- indices
    ("a tile's next plane is the next channel's", "      plane += p.packs * p.plane;", "      plane += p.plane;"),
    ("the step between tiles counts planes of one channel", "int64_t(p.step_vectors / p.plane_vectors) * p.packs * p.plane", "int64_t(p.step_vectors / p.plane_vectors) * p.plane"),
    ("the division's magic rounded down", "by.magic = unsigned(ceil_div(int64_t(1) << (31 + by.shift), d));", "by.magic = unsigned((int64_t(1) << (31 + by.shift)) / d);"),
    ("tail not masked", "return !kMasked || (i >= begin && i < end);", "return !kMasked || i >= begin;"),
    ("edges summed", "place.has(i) ? widen(x.get(i)) - pivot[i] : A(0)", "widen(x.get(i)) - pivot[i]"),
    ("edges stored as whole vectors", "place.count() == Vector<T>::kSize) {", "place.count() > 0) {"),
    ("reads past the end of x", "return !kMasked || from.element + Vector<T>::kSize <= b.a.call.N * b.a.call.C * b.a.call.HW;", "return true;"),
    ("the copy engine reads past the end of x", "if (inside(b, last)) break;", "break;"),
    ("what the copy engine leaves at the end of x forgotten", "if (b.lane == 0) to[count] = elementwise(b, last);", ""),
    ("planes aligned as the tensor", "(plane + reinterpret_cast<uintptr_t>(b.a.call.x) / sizeof(T)) & ", "plane & "),
    ("the copy engine starts at the plane, not at its cover", "(kMasked ? shift_of<T>(b, tile.plane) : 0)", "0"),
    ("one vector too few for a plane's edges", "(p.plane + size - 2) / size + 1", "(p.plane + size - 2) / size"),
    ("one vector too many in the last tile", "min(p.tile_vectors, p.channel_vectors - first)", "min(p.tile_vectors, p.channel_vectors - first + 1)"),
    ("tiles behind the channel's end", "count = first < p.channel_vectors ? min(p.tile_vectors, p.channel_vectors - first) : 0;", "count = min(p.tile_vectors, p.channel_vectors - first);"),
    ("a tile's last vectors off by one", "if (v + step * i < end) use(", "if (v + step * i <= end) use("),
    ("blocks of a team take the same tiles", "unsigned(index * p.team + b.rank)", "unsigned(index * p.team)"),
    ("each warp sums all of a tile", "warp * 32 + b.lane, p.statistics * 32);", "b.lane, 32);"),
    ("a warp sums its vectors only once for two", "warp * 32 + b.lane, p.statistics * 32);", "warp * 32 + b.lane, p.statistics * 64);"),
    ("a tile's second plane copied to the first's place", "copy_bulk(to + begin,", "copy_bulk(to,"),
    # ---- packed: channels side by side
    ("a pack's channels counted from 0", "channel = b.first_channel * p.pack + warp;", "channel = warp;"),
    ("a vector's split off by one", "int((first + 1) * call.HW - element_of(threadIdx.x))", "int((first + 1) * call.HW - element_of(threadIdx.x)) + 1"),
    ("no split: all elements are the first channel's", "values[next], split}; };", "values[next], kSize}; };"),
    ("the next channel's pivot for all of a vector", "pivot = pick(pivots);", "pivot = same<T>(pivots[next]);"),
    ("the next channel's result for all of a vector", "result = pick(results);", "result = same<T>(results[kPacked ? next : 0]);"),
    ("the channel behind a pack's last", "next = min(first + 1, p.pack - 1);", "next = first + 1;"),
    ("the next channel's elements summed twice", "{add_up(part, 0, split), add_up(part, split, kSize), 0}", "{add_up(part), add_up(part, split, kSize), 0}"),
    ("the next channel's elements forgotten", "sums.add(at * kSize < own ? of.b : of.a);", "if (at * kSize >= own) sums.add(of.a);"),
    ("the next channel's elements taken for this one's", "sums.add(at * kSize < own ? of.b : of.a);", "sums.add(of.a);"),
    ("a channel's last column forgotten", "(own + unsigned(call.HW) - 1) / kSize + 1 - column", "(own + unsigned(call.HW) - 1) / kSize - column"),
    ("a row of threads' sums forgotten", "columns * (p.threads / p.plane_vectors)", "columns * (p.threads / p.plane_vectors - 1)"),
    ("threads not a multiple of the plane", "p.threads = unsigned(planes * p.plane_vectors);", "p.threads = unsigned(planes * p.plane_vectors + 1);"),
    ("fewer warps than a pack has channels", "ceil_div(32 * p.pack - 31, p.plane_vectors));", "int64_t(1));"),
    ("a block's share ends within a plane", "set_tiles(ceil_div(call.N, team) * p.plane_vectors);", "set_tiles(ceil_div(p.channel_vectors, team));"),
    ("channels beyond whole packs", "call.C % pack == 0 && ", ""),
    ("packed though x is not aligned", "size > 2 && aligned &&", "size > 2 &&"),
    ("three channels in a vector", "call.HW >= size - 1 && ", ""),
    ("a packed thread's vectors too near each other", "planes * p.packs * p.plane;", "planes * p.plane;"),
    ("too little room for the cluster's sums", "+ kMaxPack * kMaxCluster);", "+ kMaxPack);"),
    ("too little room for the threads' sums", "kResidentOverheadBytes + sums;", "kResidentOverheadBytes;"),
    # ---- resident and packed: from x to y
    ("vectors summed before they are there", "    copies_wait<1>();\n", ""),
    ("the second group summed before it is there", "each_kept(add, [] { copies_wait<0>(); });", "each_kept(add, [] {});"),
    ("the groups of vectors not made", "[] { copies_commit(); }", "[] {}"),
    ("both groups made at once", "[] { copies_commit(); });\n", "[] {});\n  copies_commit();\n  copies_commit();\n", "    copies_wait<1>();\n", "    copies_wait<2>();\n"),
    ("eval: vectors stored before they are there", "    copies_wait<0>();\n  } else {", "  } else {"),
    ("the vectors in registers not summed", "    each_held(add);\n", ""),
    ("the vectors in shared memory not stored", "  each_kept(store, [] {});\n", ""),
    ("the second group of vectors left out", "group < 2; ++group", "group < 1; ++group"),
    ("the second group of vectors not stored", "each_kept(store, [] {});", "each_kept([&](const auto& x, const auto& place) { if (&x - kept < int(p.early * p.threads)) store(x, place); }, [] {});"),
    ("a vector both in registers and in shared memory", "behind = kHeld * p.threads;", "behind = (kHeld - 1) * p.threads;"),
    ("too little room for the vectors in shared memory", "int64_t(resident_held(size, p.pack > 1)) * p.threads", "int64_t(resident_held(size, p.pack > 1) + 1) * p.threads"),
    ("threads beyond take vectors", "thread < p.threads ? share.count : 0", "share.count"),
    ("the sums of warps that are not there", "} else if (b.lane < int(blockDim.x / 32)) {", "} else {"),
    ("pivots read before they are there", "pivots[warp] = pivot.a;\n      __syncthreads();\n", "pivots[warp] = pivot.a;\n"),
    ("warps' sums read before they are there", "    wait_for_grid();\n    __syncthreads();\n", "    wait_for_grid();\n"),
    ("results read before they are there", "  __syncthreads();\n  if (end == 0) return;\n", "  if (end == 0) return;\n"),
    ("a cooperative block of a warp too many", "kResidentThreads - 32 * cooperative", "kResidentThreads"),
    ("blocks larger than half of a multiprocessor", "bytes <= half_bytes;", "bytes <= 2 * half_bytes;"),
    # ---- held, streamed and resident tiles
    ("the streamed tiles forgotten", "first < kept; first += p.held", "first < p.held; first += p.held"),
    ("a streamed tile read for its neighbour", "next = first + h + p.held;", "next = first + h + p.held + 1;"),
    ("held tiles stored at each other's places", "each_held(held[h], stored,", "each_held(held[kTiles - 1 - h], stored,"),
    ("held tiles stored past their ends", "if (v < tile.count) use(vectors[i], v);", "use(vectors[i], v);"),
    ("the first resident tile forgotten", "else if (t == kept) to_store", "else if (t == kept + 1) to_store"),
    ("a resident tile taken for streamed", "if (t < kept) release", "if (t <= kept) release"),
    ("streamed tiles not let go", "if (t < kept) release", "if (t < p.held) release"),
    ("resident tiles not let go", "release(b, to_store.slot);", ""),
    ("the ring's tiles let go before they are stored", _NORMALISE + _RELEASE, _RELEASE + _NORMALISE),
    # ---- the ring
    ("fewer tiles than stay in registers", "p.tile_vectors), hold ? held_tiles : 1));", "p.tile_vectors), 1));"),
    ("tiles in registers forgotten by the plan", "p.held = hold ? held_tiles : 0;", "p.held = hold ? held_tiles - 1 : 0;"),
    ("a tile of more vectors than stay in registers", "kHoldVectors * lanes :", "2 * kHoldVectors * lanes :"),
    ("channels that the ring cannot hold in the kernel that keeps them there", "return p.tiles + 4 <= p.slots;", "return true;"),
    ("more tiles in flight than slots", "std::min<int64_t>(kFlightBytes / tile_bytes, p.slots - 1)", "kFlightBytes / tile_bytes"),
    ("too few channel slots", "p.channel_slots = int(", "p.channel_slots = warps + 0 * int("),
    ("a slot empty when the first warp has stored it", "32 * (p.storers > 0 ? p.storers : p.statistics)", "32"),
    ("phases not followed", "      slot -= slots;\n      parity ^= 1;", "      slot -= slots;"),
    # ---- barriers
    ("barriers used before they are there", "__syncthreads();  // else a warp", "// else a warp"),
    ("barriers not published to the copy engine", "      barrier_init(&b.shared.ready[s], 32);\n    }\n    barrier_init_fence();", "      barrier_init(&b.shared.ready[s], 32);\n    }"),
    ("full counts half the arrivals", "p.bulk ? 1 : p.producers * 64", "p.bulk ? 1 : p.producers * 32"),
    ("a slow lane still reads a tile that is let go", "int slot) { barrier_arrive", "int slot) { if (b.lane == 0) barrier_arrive", "32 * (p.storers > 0 ? p.storers : p.statistics)", "(p.storers > 0 ? p.storers : p.statistics)"),
    ("a slow lane still sums a tile that is let go", "    barrier_arrive(summed);", "    if (b.lane == 0) barrier_arrive(summed);", "32 * p.statistics);", "p.statistics);"),
    ("a slow lane still reads partial sums", "    barrier_arrive(&b.shared.ready[at.slot]);", "    if (b.lane == 0) barrier_arrive(&b.shared.ready[at.slot]);", "ready[s], 32)", "ready[s], 1)"),
    ("a slow lane of the producer misses a phase", "__syncwarp();  // else the slot could", "// else the slot could"),
    ("the producer does not wait for an empty slot", "barrier_wait(&b.shared.empty[position.slot], position.parity ^ 1);", ""),
    ("the producer waits for the wrong phase", "position.parity ^ 1);", "position.parity);"),
    ("the store warps do not wait for the result", "barrier_wait(&b.shared.ready[at.slot], at.parity);", ""),
    ("hold waits for the first channel's result again", "const auto result = same<T>(wait_for_result<A>(b, at));\n    at.advance(1, p.channel_slots);", "const auto result = same<T>(wait_for_result<A>(b, at));"),
    ("tiles summed before they are there", "barrier_wait(&b.shared.full[position.slot], position.parity);\n      summary.add(tile_at<T>(b, position.slot), tile, warp", "summary.add(tile_at<T>(b, position.slot), tile, warp"),
    ("tiles held before they are there", "barrier_wait(&b.shared.full[position.slot], position.parity);\n      Sums<A> part[2];", "Sums<A> part[2];"),
    ("hold: tiles summed before they are there", "barrier_wait(&b.shared.full[position.slot], position.parity);\n      summary.add(tile_at<T>(b, position.slot), tile, lane", "summary.add(tile_at<T>(b, position.slot), tile, lane"),
    ("partial sums read before they are there", "barrier_wait(&b.shared.summed[at.slot], at.parity);", ""),
    ("fewer bytes expected than copied", "barrier_arrive_expect(full, count * kVectorBytes)", "barrier_arrive_expect(full, count * kVectorBytes / 2)"),
    ("bytes expected that no copy brings", "barrier_arrive_expect(full, count * kVectorBytes)", "barrier_arrive_expect(full, tile.count * kVectorBytes)"),
    ("copies not tracked", "copies_arrive(full);", "barrier_arrive(full);"),
    ("only copies tracked", "barrier_arrive(full);  // for all but", "copies_arrive(full);  // for all but"),
    # ---- between blocks, through words
    ("no barrier of the grid", "  if (p.cooperative) arrival = grid.barrier_arrive();\n", "", _GRID_WAIT, "//"),
    ("the grid's barrier not waited for", _GRID_WAIT, "//"),
    ("words wiped behind the grid's barrier", _ZERO, "", _GRID_WAIT, _GRID_WAIT + "\n  " + _ZERO),
    ("no barrier of the grid for the counter", "p.cooperative = p.team > 1 || (call.cumulative && call.num_batches_tracked);", "p.cooperative = p.team > 1;"),
    ("scratch not zeroed: state of an earlier launch", "store_word(&a.scratch[i], Word{0, 0});", ";"),
    ("too little scratch", "ceil_div(p.team, kLineWords) + 1", "ceil_div(p.team, kLineWords)"),
    ("a peer's words believed without their tags", "missing = missing || word[i].tag == 0;", "(void)0;"),
    ("words without a mark where s2 is 0", "__double_as_longlong(-own.s2)", "__double_as_longlong(own.s2)", "-__longlong_as_double(word[i].tag)", "__longlong_as_double(word[i].tag)"),
    ("waits for blocks beyond the team", "(unsigned long long)__double_as_longlong(-0.0)};", "0ull};"),
    ("every block of a team reads the running statistics", "b.lane == 0, b.rank == 0);", "b.lane == 0, true);"),
    ("every lane reads the running statistics", "b.lane == 0, b.rank == 0);", "true, b.rank == 0);"),
    ("every block of a team updates the running buffers", "b.lane == 0 && b.rank == 0) parameters.save", "b.lane == 0) parameters.save"),
    ("every block counts the batch", "if (call.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0)", "if (call.num_batches_tracked && threadIdx.x == 0)"),
    ("the counter read late", "  wait_for_grid();\n\n  if (role", "  wait_for_grid();\n  if (call.cumulative && call.num_batches_tracked) factor = 1.0 / double(*call.num_batches_tracked);\n\n  if (role"),
    ("more blocks than fit", "config.gridDim = dim3(plan.team * plan.teams);", "config.gridDim = dim3(plan.team * (plan.teams + 1));"),
    # ---- between blocks, resident and packed
    ("resident: no barrier of the grid", "    wait_for_grid();\n    __syncthreads();\n", "    if (blockIdx.x == 0 && threadIdx.x == 0 && call.num_batches_tracked) ++*call.num_batches_tracked;\n    __syncthreads();\n"),
    ("a team's channels share their scratch", "b.a.scratch + channel * b.a.plan.channel_words", "b.a.scratch + b.first_channel * b.a.plan.channel_words"),
    ("resident: every block of a team updates the running buffers", "if (b.rank == 0) parameters.save(p, moments, call.momentum);", "parameters.save(p, moments, call.momentum);"),
    ("resident: every block of a team reads the running statistics", "leads, b.rank == 0 || !call.training", "leads, true"),
    ("resident: no cooperative launch", "attributes[0].val.cooperative = plan.cooperative;", "attributes[0].val.cooperative = plan.cooperative && plan.structure > kPacked;"),
    ("no cluster asked for", "plan.cluster ? 2 : 1;", "1;"),
    ("clusters where there are none", "device.architecture >= 90 ? kMaxCluster : 1", "kMaxCluster"),
    ("threads arrive at the cluster's barrier apart from their warp", "    __syncwarp();      // .aligned", "    // .aligned"),
    ("threads wait at the cluster's barrier apart from their warp", "  __syncwarp();  // or threads that waited", "  // or threads that waited"),
    ("no barrier of the cluster", _FIRST_ARRIVAL, "", _FIRST_WAIT, ""),
    ("the cluster's barrier not waited for", _FIRST_WAIT, ""),
    ("peers written to before they are there", _FIRST_WAIT, "", "  __syncthreads();\n  if (end == 0) return;\n", "  if (p.cluster) cluster_wait();\n  __syncthreads();\n  if (end == 0) return;\n"),
    ("the barrier for the peers' sums initialised when they may come", _FIRST_ARRIVAL, "", _INIT_GATHERED, _FIRST_ARRIVAL + _INIT_GATHERED),
    ("the barrier for the peers' sums not fenced", "      barrier_init(gathered, 1);\n      barrier_init_fence();\n", "      barrier_init(gathered, 1);\n"),
    ("one peer's sums not expected", "p.pack * p.team * sizeof(Sums<double>)", "p.pack * (p.team - 1) * sizeof(Sums<double>)"),
    ("one channel's sums expected from peers", "p.pack * p.team * sizeof(Sums<double>)", "p.team * sizeof(Sums<double>)"),
    ("the peers' sums not waited for", _AWAIT_SUMS, ""),
    ("the peers' sums waited for like own copies", _AWAIT_SUMS, "        barrier_wait(gathered, 0);\n"),
    ("the peers' sums waited for in the next phase", _AWAIT_SUMS, "        barrier_wait_for_peers(gathered, 1);\n"),
    ("sums sent to the wrong rank's place", "send_to_peer(&of_channel[b.rank]", "send_to_peer(&of_channel[b.lane]"),
    ("sums sent to the own block only", "send_to_peer(&of_channel[b.rank], b.lane,", "send_to_peer(&of_channel[b.rank], b.rank,"),
    ("sums sent to one block too many", "if (b.lane < p.team) send_to_peer", "if (b.lane <= p.team) send_to_peer"),
]


def apply(text, *edits):
    for old, new in zip(edits[::2], edits[1::2]):
        if text.count(old) != 1:
            raise ValueError(f"the text to replace occurs {text.count(old)} times: {old}")
        text = text.replace(old, new)
    return text


def _verdict(text, build_dir):
    """What catches the wrong kernel: the detector's name, or 'values'; '' if nothing does."""
    import torch

    import emulate

    torch.set_num_threads(1)
    emulate.load(apply(text, _FIRST_LINE, _FASTER + _FIRST_LINE), build_dir=build_dir)
    for seed in range(1, CASES + 1):
        signal.alarm(LIMIT_S)
        failed, lines = emulate.fuzz(seed, 1, lambda line: None)[1:]
        if failed:
            detector = re.search(r"emulator: ([a-z ]+):", lines[0])
            error = re.search(r"^  (\w+): (.*)", lines[0], re.MULTILINE)
            kind = detector[1] if detector else "values" if error[1] == "AssertionError" else f"refused ({error[2][:60]})"
            return f"{kind}, case {seed}"
    return ""


def _examine(index, text, build_dir):
    """Judges one mutant (None: the text as it is) in a process of its own, which may crash or hang."""
    try:
        wrong = text if index is None else apply(text, *MUTANTS[index][1:])
    except ValueError as error:
        return "", str(error)
    sys.path.insert(0, str(HERE))
    import emulate  # noqa: F401 - here, so that each child finds it loaded

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        try:
            verdict = _verdict(wrong, build_dir)
        except Exception as error:  # it must compile: else it proves nothing
            verdict = f"!{error}"
        os.write(write, verdict.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        verdict = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return ("no end" if os.WTERMSIG(status) == signal.SIGALRM else f"crash, signal {os.WTERMSIG(status)}"), ""
    return ("", verdict[1:]) if verdict.startswith("!") else (verdict, "")


def run(report=print):
    """Examines all mutants, in as many processes as there are processors. report: gets a line for each.

    Returns (caught, survived, lines of the survivors).
    """
    import emulate

    text = (HERE.parents[1] / "model_new.py").read_text()
    emulate.load(text)
    survivors, by = [], {}
    with tempfile.TemporaryDirectory() as build_dir:
        shutil.copytree(HERE / "build", build_dir, dirs_exist_ok=True)  # what is the same for all
        pool = concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
        with pool:
            unchanged = pool.submit(_examine, None, text, build_dir)
            verdicts = [pool.submit(_examine, i, text, build_dir) for i in range(len(MUTANTS))]
            if any(unchanged.result()):
                survivors.append(f"the kernel itself fails, so the rest proves nothing: {''.join(unchanged.result())}")
                report(survivors[0])
            for (name, *_), verdict in zip(MUTANTS, verdicts):
                caught, trouble = verdict.result()
                line = f"{name}: " + (f"caught by {caught}" if caught else trouble or "SURVIVES")
                report(line)
                if caught:
                    kind = re.split(r",| \(", caught)[0]
                    by[kind] = by.get(kind, 0) + 1
                else:
                    survivors.append(line)
    report(f"{sum(by.values())} of {len(MUTANTS)} caught: " + ", ".join(f"{count} by {kind}" for kind, count in sorted(by.items())))
    return sum(by.values()), len(survivors), survivors


if __name__ == "__main__":
    sys.exit(1 if run()[1] else 0)
