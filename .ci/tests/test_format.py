"""Format and style, by ruff and clang-format."""

import re
import subprocess
import sys

import clang_format
import pytest

import check

SETTINGS = check.ROOT / ".ci"
TEXT = check.TEXT_PATH.read_text()
CODE = sorted([*check.ROOT.glob("*.py"), *SETTINGS.rglob("*.py")])
FILES = [str(path.relative_to(check.ROOT)) for path in CODE]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("command", ["format --diff", "check"])
def test_python(command, file):
    ruff = [sys.executable, "-m", "ruff", *command.split(), file, "--no-cache", "-q"]
    ruff += ["--config", SETTINGS / "ruff.toml"]
    done = subprocess.run(ruff, cwd=check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


CONSTANT = r"^(\w+) = r('''|\"\"\")\n(.*?)\2$"
TEXTS = {name: text for name, _, text in re.findall(CONSTANT, TEXT, re.MULTILINE | re.DOTALL)}


def test_texts_are_found():
    assert {"FUSED_BATCH_NORM_CUDA", "FUSED_BATCH_NORM_CPP"} <= set(TEXTS)


@pytest.mark.parametrize("name", TEXTS)
def test_cuda_and_cpp(name):
    """As clang-format would write it, and no line longer than the limit, which it lets be."""
    command = [clang_format.get_executable("clang-format"), "--assume-filename=text.cu"]
    command += [f"--style=file:{SETTINGS / '.clang-format'}"]
    done = subprocess.run(command, input=TEXTS[name], capture_output=True, text=True, check=True)
    assert TEXTS[name].splitlines() == done.stdout.splitlines()
    assert max(map(len, TEXTS[name].splitlines())) <= 100
