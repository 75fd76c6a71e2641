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
CASES = 400  # random cases per mutant, at most
LIMIT_S = 60  # of the build and of each case, after which the mutant counts as one that hangs

_STORE = """        for_each_vector<kAtOnce>(tile_at<T>(b, position.slot), tile.count, b.lane,
                        [&](int, unsigned v, const Vector<T>& x) { normalise(b, x, Place<T, kMasked>(b, tile, v), result); });
"""
_RELEASE = "        release(b, position.slot);\n"

# (what is wrong, text, its replacement). The text occurs once.
MUTANTS = [
    # ---- the formula
    ("eps outside the root", "rsqrt(sums.m2 / sums.count + call.eps)", "1 / (sqrt(sums.m2 / sums.count) + call.eps)"),
    ("eps forgotten with running statistics", "channel, call.running_float) + call.eps)", "channel, call.running_float))"),
    ("var unbiased in y", "rsqrt(sums.m2 / sums.count + call.eps)", "rsqrt(sums.m2 / (sums.count - 1) + call.eps)"),
    ("a warp's mean divided by count - 1", "s1 / A(max(count, 1u))", "s1 / A(max(count - 1, 1u))"),
    ("running_var biased", "const double unbiased = sums.m2 / (sums.count - 1);", "const double unbiased = sums.m2 / sums.count;"),
    ("momentum weighs the old mean", "(1 - factor) * old_mean + factor * sums.mean", "factor * old_mean + (1 - factor) * sums.mean"),
    ("the cumulative average counts from 1", "double(*call.num_batches_tracked + 1)", "double(*call.num_batches_tracked + 2)"),
    ("no cumulative average", "if (call.cumulative) factor =", "if (call.cumulative > 1) factor ="),
    ("momentum None is 0.1", "call.momentum = momentum.value_or(0);\n  call.cumulative = !momentum.has_value();\n  call.dtype = dtype;", "call.momentum = momentum.value_or(0.1);\n  call.dtype = dtype;"),
    ("eval uses the batch's statistics", "training = self.training or buffers[0] is None", "training = True"),
    ("beta forgotten", "A(beta - (mean - A(mean)) * inv_std * gamma)", "A((A(mean) - mean) * inv_std * gamma)"),
    ("the mean's low part forgotten", "A(beta - (mean - A(mean)) * inv_std * gamma)", "A(beta)"),
    ("the mean folded into the shift", "(widen(x.get(i)) - r.mean) * r.scale + r.shift", "widen(x.get(i)) * r.scale + (r.shift - r.mean * r.scale)"),
    ("sums about 0", "if (!isfinite(pivot)) pivot = 0;", "pivot = 0;"),
    ("merge without the means' distances", "part[i].m2 + part[i].count * distance * distance", "part[i].m2"),
    ("the block's own partial merged twice", "part[i] = Partial{mean[i].value, m2[i].value, double(mean[i].tag - 1)};", "part[i] = i == 0 && lane == 31 ? own : Partial{mean[i].value, m2[i].value, double(mean[i].tag - 1)};"),
    ("a warp's partial merged twice", "b.lane < partials ? b.shared.partial[at.slot * partials + b.lane] :", "b.lane <= partials ? b.shared.partial[at.slot * partials + b.lane % partials] :"),
    ("the last block's sums left out", "lane + 32 * i < team ? 0u : 1u", "lane + 32 * i < team - 1 ? 0u : 1u"),
    ("gamma read as float whatever it is", "load_parameter<T>(call.gamma, channel, call.affine_float)", "load_parameter<T>(call.gamma, channel, true)"),
    ("running_var stored as float whatever it is", "store_parameter<T>(call.running_var, channel, call.running_float,", "store_parameter<T>(call.running_var, channel, true,"),
    ("only half of a double", "if (sizeof(T) == 8) word[i * 2 % 4 + 1] = bits[1];", ""),
    # ---- indices
    ("a tile's next plane is the next channel's", "      plane += b.a.call.C * b.a.call.HW;", "      plane += b.a.call.HW;"),
    ("the step between tiles counts planes of one channel", "int64_t(p.step_vectors / p.plane_vectors) * call.C * call.HW", "int64_t(p.step_vectors / p.plane_vectors) * call.HW"),
    ("the division's magic rounded down", "p.by_plane_vectors.magic = unsigned(ceil_div(int64_t(1) << (31 + p.by_plane_vectors.shift), p.plane_vectors));", "p.by_plane_vectors.magic = unsigned((int64_t(1) << (31 + p.by_plane_vectors.shift)) / p.plane_vectors);"),
    ("tail not masked", "return !kMasked || (i >= begin && i < end);", "return !kMasked || i >= begin;"),
    ("edges summed", "place.has(i) ? widen(x.get(i)) - pivot : A(0)", "widen(x.get(i)) - pivot"),
    ("edges counted", "count += place.count();", "count += Vector<T>::kSize;"),
    ("edges stored as whole vectors", "place.count() == Vector<T>::kSize) {", "place.count() > 0) {"),
    ("reads past the end of x", "if (from.count() > 0 && from.element + Vector<T>::kSize <= elements)", "if (from.count() > 0)"),
    ("planes aligned as the tensor", "(element + reinterpret_cast<uintptr_t>(a.call.x) / sizeof(T)) & (kSize - 1)", "element & (kSize - 1)"),
    ("one vector too few for a plane's edges", "(call.HW + size - 2) / size + 1", "(call.HW + size - 2) / size"),
    ("one vector too many in the last tile", "min(p.tile_vectors, p.channel_vectors - first)", "min(p.tile_vectors, p.channel_vectors - first + 1)"),
    ("a tile's last vectors off by one", "if (v + 32 * i < count) use(", "if (v + 32 * i <= count) use("),
    ("blocks of a team take the same tiles", "unsigned(index * p.team + b.rank)", "unsigned(index * p.team)"),
    ("a warp's first tile off by one in the next channel", "if (first < 0) first += p.statistics;", "if (first < 0) first += p.statistics - 1;"),
    ("a tile's second plane copied to the first's place", "copy_bulk(to + begin,", "copy_bulk(to,"),
    # ---- tiles held, streamed and resident
    ("the streamed tiles forgotten", "first < end; first += p.held", "first < p.held; first += p.held"),
    ("a streamed tile read for its neighbour", "next = stored + p.held;", "next = stored + p.held + p.statistics;"),
    ("held tiles stored at each other's places", "const int stored = first + h * p.statistics, next = stored + p.held;", "const int stored = first + (kTiles - 1 - h) * p.statistics, next = stored + p.held;"),
    ("held tiles stored past their ends", "if (v < tile.count) normalise(", "normalise("),
    ("the first resident tile forgotten", "else if (t < p.held + p.streamed + p.statistics) resident", "else if (t < p.held + p.streamed + 2 * p.statistics) resident"),
    ("a resident tile taken for streamed", "if (t < p.held + p.streamed) release", "if (t <= p.held + p.streamed) release"),
    ("streamed tiles not let go", "if (t < p.held + p.streamed) release", "if (t < p.held) release"),
    ("resident tiles not let go", "release(b, resident.slot);", ""),
    ("the ring's tiles let go before they are stored", _STORE + _RELEASE, _RELEASE + _STORE),
    # ---- the ring
    ("slots not in whole turns of the warps", "kMaxSlots)) / turn * turn;", "kMaxSlots));"),
    ("held and other tiles not in whole turns of the warps", "held_tiles)) * turn;", "held_tiles)) * turn + 1;"),
    ("channels that the ring cannot hold in the kernel that keeps them there", "return p.tiles + turn <= p.slots;", "return true;"),
    ("more tiles in flight than slots", "std::min<int64_t>(kFlightBytes / tile_bytes, p.slots - 1)", "kFlightBytes / tile_bytes"),
    ("too few channel slots", "p.channel_slots = int(", "p.channel_slots = warps + 0 * int("),
    ("a channel's turns of the ring forgotten", "unsigned(p.tiles / p.slots) & 1", "0"),
    ("phases not followed", "      slot -= slots;\n      parity ^= 1;", "      slot -= slots;"),
    # ---- barriers
    ("barriers used before they are there", "__syncthreads();  // else a warp", "// else a warp"),
    ("barriers not published to the copy engine", "    barrier_init_fence();\n", ""),
    ("full counts half the arrivals", "p.bulk ? 1 : p.producers * 64", "p.bulk ? 1 : p.producers * 32"),
    ("a slow lane still reads a tile that is let go", "__syncwarp();  // else a slow lane might still read\n", ""),
    ("a slow lane still sums a tile that is let go", "__syncwarp();  // else a slow lane might still read a tile that", "// else a slow lane might still read a tile that"),
    ("a slow lane still reads partial sums", "__syncwarp();  // else a slow lane might still read partials", "// else a slow lane might still read partials"),
    ("lanes copy before the slot is empty", "      __syncwarp();\n      load();", "      load();"),
    ("the producer does not wait for an empty slot", "barrier_wait(&b.shared.empty[position.slot], position.parity ^ 1);", ""),
    ("the producer waits for the wrong phase", "position.parity ^ 1);", "position.parity);"),
    ("the store warps do not wait for the result", "barrier_wait(&b.shared.ready[at.slot], at.parity);", ""),
    ("hold waits for the first channel's result again", "const Result<A> result = wait_for_result<A>(b, at);\n    at.advance({1, 0}, p.channel_slots);", "const Result<A> result = wait_for_result<A>(b, at);"),
    ("the store warps do not wait for tiles", "barrier_wait(&b.shared.full[position.slot], position.parity);\n        const Tile tile(b, channel, t);\n        for_each", "const Tile tile(b, channel, t);\n        for_each"),
    ("partial sums read before they are there", "barrier_wait(&b.shared.summed[at.slot], at.parity);", ""),
    ("fewer bytes expected than copied", "if (b.lane == 0) barrier_arrive_expect(full, tile.count * kVectorBytes)", "if (b.lane == 0) barrier_arrive_expect(full, tile.count * kVectorBytes / 2)"),
    ("copies not tracked", "copies_arrive(full);", "barrier_arrive(full);"),
    # ---- between blocks
    ("no barrier of the grid", "cooperative_groups::this_grid().sync();", ""),
    ("no barrier of the grid for the counter", "(p.team > 1 || (call.cumulative && call.num_batches_tracked))", "p.team > 1"),
    ("scratch not zeroed: state of an earlier launch", "store_word(&a.scratch[i], Word{0, 0});", ";"),
    ("too little scratch", "call.C * (2 * p.team + 1) : 0", "call.C * 2 * p.team : 0"),
    ("a peer's words believed without their tags", "missing = missing || mean[i].tag == 0 || m2[i].tag == 0;", "(void)0;"),
    ("m2 believed by the mean's tag", "missing = missing || mean[i].tag == 0 || m2[i].tag == 0;", "missing = missing || mean[i].tag == 0;"),
    ("every block counts the batch", "b.rank == 0 && b.first_channel == 0 && threadIdx.x == 0) *call.num_batches_tracked", "threadIdx.x == 0) *call.num_batches_tracked"),
    ("every block of a team updates the running buffers", "if (b.rank == 0) {", "{"),
    ("the counter read late", "*call.num_batches_tracked += 1;\n", "*call.num_batches_tracked += 1;\n  if (call.cumulative && call.num_batches_tracked) factor = 1.0 / double(*call.num_batches_tracked);\n"),
    ("more blocks than fit", "config.gridDim = dim3(plan.team, plan.teams);", "config.gridDim = dim3(plan.team, plan.teams + 1);"),
]


def apply(text, old, new):
    if text.count(old) != 1:
        raise ValueError(f"the text to replace occurs {text.count(old)} times: {old}")
    return text.replace(old, new)


def _verdict(text, build_dir):
    """What catches the wrong kernel: the detector's name, or 'values'; '' if nothing does."""
    import torch

    import emulate

    torch.set_num_threads(1)
    emulate.load(text, build_dir=build_dir)
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
                    kind = caught.split(",")[0]
                    by[kind] = by.get(kind, 0) + 1
                else:
                    survivors.append(line)
    report(f"{sum(by.values())} of {len(MUTANTS)} caught: " + ", ".join(f"{count} by {kind}" for kind, count in sorted(by.items())))
    return sum(by.values()), len(survivors), survivors


if __name__ == "__main__":
    sys.exit(1 if run()[1] else 0)
