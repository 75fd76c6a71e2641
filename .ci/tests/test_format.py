"""Format and style, by ruff and clang-format of the releases in .ci/requirements.txt."""

import importlib.metadata
import re
import subprocess
import sys

import pytest

import check

SETTINGS = check.ROOT / ".ci"
TEXT = check.TEXT_PATH.read_text()
CODE = sorted([*check.ROOT.glob("*.py"), *SETTINGS.rglob("*.py")])
FILES = [str(path.relative_to(check.ROOT)) for path in CODE]


def pinned(tool):
    """Skips where another release of the tool is installed, or none: its format is another."""
    requirements = (SETTINGS / "requirements.txt").read_text()
    wanted = re.search(rf"^{tool}==(\S+)$", requirements, re.MULTILINE)[1]
    found = {d.name: d.version for d in importlib.metadata.distributions()}.get(tool)
    return pytest.mark.skipif(found != wanted, reason=f"needs {tool} {wanted}, got {found}")


@pinned("ruff")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("command", ["format --diff", "check"])
def test_python(command, file):
    ruff = [sys.executable, "-m", "ruff", *command.split(), file, "--no-cache", "-q"]
    ruff += ["--config", SETTINGS / "ruff.toml"]
    done = subprocess.run(ruff, cwd=check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


CONSTANT = r"^(\w+) = r('''|\"\"\")\n(.*?)\2$"
TEXTS = {name: text for name, _, text in re.findall(CONSTANT, TEXT, re.MULTILINE | re.DOTALL)}
CPP = ("emulator/include/**/*.h", "emulator/runtime/*", "tests/*.cpp")
CPP_FILES = sorted(file for kind in CPP for file in SETTINGS.glob(kind))
SOURCES = TEXTS | {file.name: file.read_text() for file in CPP_FILES}


def test_texts_are_found():
    assert {"FUSED_BATCH_NORM_CUDA", "FUSED_BATCH_NORM_CPP", "runtime.cpp"} <= set(SOURCES)


@pinned("clang-format")
@pytest.mark.parametrize("name", SOURCES)
def test_cuda_and_cpp(name):
    """As clang-format would write it, and no line longer than the limit, which it lets be."""
    import clang_format

    command = [clang_format.get_executable("clang-format"), "--assume-filename=text.cu"]
    command += [f"--style=file:{SETTINGS / '.clang-format'}"]
    done = subprocess.run(command, input=SOURCES[name], capture_output=True, text=True, check=True)
    assert SOURCES[name].splitlines() == done.stdout.splitlines()
    assert max(map(len, SOURCES[name].splitlines())) <= 100
