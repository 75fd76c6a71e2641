"""Runs model_new.py without a GPU: its CUDA and C++ texts, unchanged, compiled by the host compiler and executed by the CPU.

    import emulate
    namespace = emulate.load(open("model_new.py").read())   # ModelNew in it takes CPU tensors
    emulate.set_device(multiprocessors=3, shared_bytes=16 * 1024, capability=(9, 0))
    emulate.set_schedule(seed=7)                             # the order in which threads and copies go on
    y = namespace["ModelNew"](5)(torch.rand(2, 5, 3, 3))

What a detector finds (README.md lists them) is raised as a RuntimeError with the place in the text and the seed.
`python emulate.py [count] [first seed]` runs random cases and prints which branches of the plan they took.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import torch
import torch.utils.cpp_extension

HERE = pathlib.Path(__file__).resolve().parent
POLICIES = ("round_robin", "random", "starve", "last_first")

_runtime = None  # the shared library of runtime/
_loaded = None  # the namespace that load() made last


# ---------------------------------------------------------------------------------------------- build


def _compiler():
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(name):
            return name
    raise RuntimeError("a C++ compiler must be installed (g++ or clang++), got none")


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")


def _make(directory, name, key, command, source=None):
    """The file `directory/<hash of key>-name`, made by `command(target)` unless it is there."""
    target = directory / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}-{name}"
    if not target.exists():
        unfinished = target.with_name(f"{os.getpid()}-{target.name}")  # other processes may build the same
        if source is not None:
            target.with_suffix(".cpp").write_text(source)
        _run(command(unfinished))
        unfinished.replace(target)
    return target


@functools.cache
def _own_files():
    """Name and content of the emulator's C++ files: whatever is built from them is built again when they change."""
    files = sorted(p for folder in ("include", "runtime") for p in (HERE / folder).rglob("*") if p.is_file())
    return tuple((str(p.relative_to(HERE)), p.read_text()) for p in files) + (torch.__version__, sys.version, _compiler())


def _torch_flags(name):
    includes = [*torch.utils.cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    return ["-std=c++20", "-w", f"-DTORCH_EXTENSION_NAME={name}", *(f"-isystem{path}" for path in includes)]


def _start_runtime(directory):
    global _runtime
    if _runtime is not None:
        return
    sources = [HERE / "runtime" / name for name in ("runtime.cpp", "memory.cpp", "copies.cpp", "tensors.cpp")]

    flags = [*_torch_flags("emulator"), "-O2", "-march=native", "-fPIC"]
    compile_one = lambda source: _make(
        directory, f"{source.stem}.o", (source, _own_files()), lambda target: [_compiler(), *flags, "-c", source, "-o", target]
    )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    libraries = pathlib.Path(torch.__file__).parent / "lib"
    link = [_compiler(), "-shared", *objects, f"-L{libraries}", "-lc10", f"-Wl,-rpath,{libraries}", "-ldl"]
    library = _make(directory, "emulator.so", objects, lambda target: [*link, "-o", target])
    _runtime = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # the built texts find their functions in it
    _runtime.emulator_end.restype = ctypes.c_char_p
    _runtime.emulator_watch_allocations()
    set_device()
    set_schedule(0)


def _build(name, directory, cpp_text, cuda_text):
    """Compiles the two texts (cached by content), loads the library and returns its name."""
    directory.mkdir(parents=True, exist_ok=True)
    gcc = "clang" not in subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout
    # -fsanitize=thread: a call at each load and store, which runtime/memory.cpp answers; the sanitizer itself is not linked.
    watched = ["-fsanitize=thread", "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"]
    watched += ["--param", "tsan-instrument-func-entry-exit=0"] if gcc else []
    # No fused multiply-add here, as everywhere in C++; -fno-gnu-unique, or two versions of a text would share variables.
    kernel_flags = ["-std=c++17", "-O1", "-g1", "-w", "-fPIC", "-ffp-contract=off", f"-I{HERE / 'include'}", *watched]
    kernel_flags += ["-fno-gnu-unique"] if gcc else []
    # Whatever the C++ text asks about CUDA is asked about the CPU; not so in the headers, which therefore come first.
    includes = "\n".join(re.findall(r"^\s*#include.*$", cpp_text, re.MULTILINE))
    renamed = "#define is_cuda is_cpu\n#define fused_batch_norm_launch emulated_launch\n"
    cpp_source = f'{includes}\n{renamed}#line 1 "FUSED_BATCH_NORM_CPP"\n{cpp_text}\n#include "emulated_launch.h"\n'
    unnamed = f"{name}_{16 * '0'}"
    cpp_flags = [*_torch_flags(unnamed), "-fPIC", f"-I{HERE / 'include'}"]

    def compile_text(source, flags, kind):
        key = (source, flags, _own_files())
        text = directory / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}-{kind}.cpp"
        return _make(directory, f"{kind}.o", key, lambda target: [_compiler(), *flags, "-c", text, "-o", target], source)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        runtime = pool.submit(_start_runtime, directory)
        parts = [pool.submit(compile_text, cpp_source, cpp_flags, "cpp"), pool.submit(compile_text, cuda_text, kernel_flags, "cuda")]
        runtime.result()
        objects = [part.result() for part in parts]
    # Each build has a name of its own, under which its operators are registered. It is put into the object file, since
    # compiling the C++ text takes longest.
    name = f"{name}_{hashlib.sha256(repr(objects).encode()).hexdigest()[:16]}"
    rename = f"LC_ALL=C sed s/{unnamed}/{name}/g {objects[0]}"
    objects[0] = _make(directory, "named.o", name, lambda target: ["sh", "-c", f"{rename} > {target}"])
    libraries = pathlib.Path(torch.__file__).parent / "lib"
    link = ["-shared", "-Wl,-Bsymbolic", *objects, f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    library = _make(directory, f"{name}.so", [str(o) for o in objects], lambda target: [_compiler(), *link, "-o", target])
    torch.ops.load_library(library)
    return f"{name}.so"


# ---------------------------------------------------------------------------------------------- interface


def load(text, *, build_dir=None):
    """Executes the text of model_new.py so that its kernel runs on the CPU. Returns its namespace.

    build_dir: where compiled files are kept (default: build/ beside this file). The first build takes about 9 s, one that
    changes only the CUDA text about 5 s, none under 1 s.
    """
    global _loaded
    directory = pathlib.Path(build_dir or HERE / "build")

    def load_inline(name, cpp_sources, cuda_sources, **_):
        join = lambda sources: sources if isinstance(sources, str) else "\n".join(sources)
        return _build(name, directory, join(cpp_sources), join(cuda_sources))

    extension = torch.utils.cpp_extension
    pretended = [
        (extension, "load_inline", load_inline),
        (extension, "CUDA_HOME", "emulated"),
        (torch.version, "cuda", "emulated"),
        (torch.cuda, "is_available", lambda: False),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in pretended]
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST")
    namespace = {"__name__": "model_new"}
    try:
        for owner, name, value in pretended:
            setattr(owner, name, value)
        os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0"  # so that the text builds without a GPU
        exec(compile(text, "model_new.py", "exec"), namespace)
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
        if architectures is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    _loaded = namespace
    return namespace


def set_device(multiprocessors=3, shared_bytes=16 * 1024, capability=(9, 0)):
    """The pretended device. shared_bytes: what one block may have at most, up to 256 KB; a multiprocessor has 1 KB more."""
    major, minor = capability
    _runtime.emulator_set_device(multiprocessors, shared_bytes, 10 * major + minor)


def set_schedule(seed, policy=None):
    """Who runs when. policy: one of POLICIES; None: chosen by the seed."""
    number = seed % len(POLICIES) if policy is None else POLICIES.index(policy)
    _runtime.emulator_set_schedule(ctypes.c_uint64(seed), number)


def fuzz(first_seed, count, report=print, taken=None):
    """Runs the random cases of the seeds first_seed … with what load() loaded last.

    report: gets a line for each failure. taken: a dictionary that counts the cases for each branch of the plan.
    Returns (passed, failed, lines of the failures).
    """
    import fuzz as random_cases

    failures = []
    for seed in range(first_seed, first_seed + count):
        case = random_cases.draw(seed)
        try:
            branches = random_cases.run(sys.modules[__name__], _loaded, case)
        except Exception as error:  # whatever goes wrong is the case's failure
            failures.append(f"{case}\n  {type(error).__name__}: {error}")
            report(failures[-1])
            continue
        for branch in branches if taken is not None else ():
            taken[branch] = taken.get(branch, 0) + 1
    return count - len(failures), len(failures), failures


# ---------------------------------------------------------------------------------------------- command line


def _fuzz_share(text, seeds):
    torch.set_num_threads(1)
    load(text)
    taken, lines = {}, []
    failed = sum(fuzz(seed, 1, lines.append, taken)[1] for seed in seeds)
    return failed, lines, taken


def main(count=200, first_seed=1):
    import fuzz as random_cases

    text = (HERE.parents[1] / "model_new.py").read_text()
    load(text)
    processes = os.cpu_count() or 1
    seeds = range(first_seed, first_seed + count)
    total_failed, taken = 0, dict.fromkeys(random_cases.BRANCHES, 0)
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(_fuzz_share, text, seeds[i :: 8 * processes]) for i in range(8 * processes)]
        for share in concurrent.futures.as_completed(shares):
            failed, lines, branches = share.result()
            print("\n".join(lines), end="\n" if lines else "", flush=True)
            total_failed += failed
            for branch, cases in branches.items():
                taken[branch] = taken.get(branch, 0) + cases
    for branch in sorted(taken):
        print(f"{taken[branch]:6} cases: {branch}")
    print(f"{count - total_failed} passed, {total_failed} failed")
    return total_failed == 0 and all(taken.values())


if __name__ == "__main__":
    sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
