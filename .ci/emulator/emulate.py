"""Runs model_new.py without a GPU: the CPU executes its CUDA and C++ texts, unchanged.

    import emulate
    names = emulate.load(open("model_new.py").read())  # ModelNew in it takes CPU tensors
    emulate.set_device(multiprocessors=3, shared_bytes=16 * 1024, capability=(9, 0))
    emulate.set_schedule(seed=7)  # the order in which threads and copies go on
    y = names["ModelNew"](5)(torch.rand(2, 5, 3, 3))

What a detector finds (README.md lists them) is raised as a RuntimeError with its place in the text.
"""

import concurrent.futures
import ctypes
import fcntl
import functools
import hashlib
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


# -------------------------------------------------------------------------------------------- build


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
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process that wants the same makes it once
        if not target.exists():
            unfinished = target.with_name(f"unfinished-{target.name}")
            if source is not None:
                target.with_suffix(".cpp").write_text(source)
            _run(command(unfinished))
            unfinished.replace(target)
    return target


@functools.cache
def _own_files():
    """Name and content of the emulator's C++ files, on which all that is built depends."""
    files = sorted(
        p for folder in ("include", "runtime") for p in (HERE / folder).rglob("*") if p.is_file()
    )
    return tuple((str(p.relative_to(HERE)), p.read_text()) for p in files) + (
        torch.__version__,
        sys.version,
        _compiler(),
    )


def _torch_flags(name):
    includes = [*torch.utils.cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    return [
        "-std=c++20",
        "-w",
        f"-DTORCH_EXTENSION_NAME={name}",
        *(f"-isystem{path}" for path in includes),
    ]


def _library_flags():
    libraries = pathlib.Path(torch.__file__).parent / "lib"
    return [f"-L{libraries}", f"-Wl,-rpath,{libraries}"]


def _start_runtime(directory):
    global _runtime
    if _runtime is not None:
        return
    flags = [*_torch_flags("emulator"), "-O2", "-march=native", "-fPIC"]

    def compile_one(name):
        source = HERE / "runtime" / f"{name}.cpp"
        command = lambda target: [_compiler(), *flags, "-c", source, "-o", target]
        return _make(directory, f"{name}.o", (name, flags, _own_files()), command)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, ("runtime", "memory", "copies", "tensors")))
    link = [_compiler(), "-shared", *objects, *_library_flags(), "-lc10", "-ldl"]
    library = _make(directory, "emulator.so", objects, lambda target: [*link, "-o", target])
    # Global: the built texts find their functions in it.
    _runtime = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _runtime.emulator_end.restype = ctypes.c_char_p
    _runtime.emulator_watch_allocations()
    set_device()
    set_schedule(0)


def _build(name, directory, cpp_text, cuda_text):
    """Compiles the two texts (cached by content), loads the library and returns its name."""
    version = subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout
    kernel_flags = ["-std=c++17", "-O1", "-g1", "-w", "-fPIC", "-ffp-contract=off"]
    # A call at each load and store, which runtime/memory.cpp answers: no sanitizer is linked.
    kernel_flags += ["-fsanitize=thread", f"-I{HERE / 'include'}"]
    undefined = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
    kernel_flags += [f"-fsanitize={undefined}"]
    if "clang" not in version:
        kernel_flags += ["--param", "tsan-instrument-func-entry-exit=0"]
        kernel_flags += ["-fno-gnu-unique"]  # or two versions of a text would share variables
    # What the text asks about CUDA is asked about the CPU; not so what the headers ask.
    includes = "\n".join(re.findall(r"^\s*#include.*$", cpp_text, re.MULTILINE))
    renamed = "#define is_cuda is_cpu\n#define fused_batch_norm_launch emulated_launch"
    cpp_source = f'{includes}\n{renamed}\n#line 1 "FUSED_BATCH_NORM_CPP"\n{cpp_text}'
    cpp_source += '\n#include "emulated_launch.h"\n'
    unnamed = f"{name}_{16 * '0'}"
    cpp_flags = [*_torch_flags(unnamed), "-fPIC", f"-I{HERE / 'include'}"]

    def compile_text(source, flags, kind):
        key = (source, flags, _own_files())
        text = directory / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}-{kind}.cpp"
        command = lambda target: [_compiler(), *flags, "-c", text, "-o", target]
        return _make(directory, f"{kind}.o", key, command, source)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        runtime = pool.submit(_start_runtime, directory)
        parts = [
            pool.submit(compile_text, cpp_source, cpp_flags, "cpp"),
            pool.submit(compile_text, cuda_text, kernel_flags, "cuda"),
        ]
        runtime.result()
        objects = [part.result() for part in parts]
    # Each build has a name of its own, under which its operators are registered. It is put into the
    # object file, since compiling the C++ text takes longest.
    name = f"{name}_{hashlib.sha256(repr(objects).encode()).hexdigest()[:16]}"
    rename = f"LC_ALL=C sed s/{unnamed}/{name}/g {objects[0]}"
    command = lambda target: ["sh", "-c", f"{rename} > {target}"]
    objects[0] = _make(directory, "named.o", name, command)
    link = [_compiler(), "-shared", "-Wl,-Bsymbolic", *objects, *_library_flags()]
    link += ["-lc10", "-ltorch_cpu"]
    key = [str(o) for o in objects]
    library = _make(directory, f"{name}.so", key, lambda target: [*link, "-o", target])
    torch.ops.load_library(library)
    return f"{name}.so"


# ---------------------------------------------------------------------------------------- interface


def load(text, *, build_dir=None):
    """Executes the text of model_new.py so that its kernel runs on the CPU. Returns its namespace.

    build_dir: where compiled files are kept, by content (default: build/ beside this file). The
    first build takes about 9 s, one that changes only the CUDA text about 5 s, none under 1 s.
    """
    directory = pathlib.Path(build_dir or HERE / "build")
    directory.mkdir(parents=True, exist_ok=True)

    def load_inline(cpp_sources, cuda_sources, **_):
        join = lambda sources: sources if isinstance(sources, str) else "\n".join(sources)
        # Not by the name that is given, which another text has another of: so that the C++ text,
        # which takes longest, is compiled once.
        return _build("fused_batch_norm", directory, join(cpp_sources), join(cuda_sources))

    extension = torch.utils.cpp_extension
    pretended = [
        (extension, "load_inline", load_inline),
        (extension, "_get_build_directory", lambda *_, **__: str(directory)),
        (extension, "CUDA_HOME", "emulated"),
        (torch.version, "cuda", "emulated"),
        (torch.cuda, "is_available", lambda: False),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in pretended]
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST")
    namespace = {}
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
    return namespace


def load_host(source, *, build_dir=None):
    """The library of a C++ source that includes what CUDA texts do; compiled without detectors."""
    directory = pathlib.Path(build_dir or HERE / "build")
    directory.mkdir(parents=True, exist_ok=True)
    _start_runtime(directory)
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{HERE / 'include'}"]
    key = (source, flags, _own_files())
    text = directory / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}-host.cpp"
    command = lambda target: [_compiler(), *flags, text, "-o", target]
    return ctypes.CDLL(str(_make(directory, "host.so", key, command, source)))


def set_device(multiprocessors=3, shared_bytes=16 * 1024, capability=(9, 0), usable=None):
    """The pretended device. shared_bytes: of one block, up to 256 KB; an SM has 1 KB more.

    usable: multiprocessors that launches get, if fewer than the device says that it has.
    """
    major, minor = capability
    _runtime.emulator_set_device(
        multiprocessors, shared_bytes, 10 * major + minor, usable or multiprocessors
    )


def set_schedule(seed, policy=None):
    """Who runs when. policy: one of POLICIES; None: chosen by the seed."""
    number = seed % len(POLICIES) if policy is None else POLICIES.index(policy)
    _runtime.emulator_set_schedule(ctypes.c_uint64(seed), number)
