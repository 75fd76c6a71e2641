"""How the text builds: under which name, where, and what it says. Nothing is compiled here."""

import os
import re
import warnings

import pytest
import torch
import torch.utils.cpp_extension


@pytest.fixture
def build(text, monkeypatch, tmp_path):
    """Executes the text without compiling: gives its names, and what it gave load_inline."""
    given = []

    def load_inline(**settings):
        given.append(settings)
        return "fused_batch_norm.so"

    monkeypatch.setattr(torch.utils.cpp_extension, "load_inline", load_inline)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def execute(text=text):
        names = {}
        exec(text, names)
        return names, given

    return execute


@pytest.fixture
def lock(build, tmp_path):
    """The file that says to torch until 2.13 that somebody builds what the text would build."""
    _, (given,) = build()
    directory = torch.utils.cpp_extension._get_build_directory(given["name"], verbose=False)
    path = os.path.join(directory, "lock")
    open(path, "w").close()
    return path


@pytest.mark.parametrize("torch_has_baton", [True, False], ids=["torch 2.13", "torch 2.14"])
def test_lock_of_a_killed_build(build, lock, torch_has_baton, monkeypatch, caplog):
    """One line, which is no warning: that would be an error under -W error. Torch from 2.14 on
    leaves the file there when nobody builds."""
    extension = torch.utils.cpp_extension
    if torch_has_baton:
        monkeypatch.setattr(extension, "FileBaton", object(), raising=False)
    else:
        monkeypatch.delattr(extension, "FileBaton", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(build()[1]) == 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == torch_has_baton
    for line in said:
        assert re.search(f"{re.escape(lock)}.*delete", line) and "\n" not in line


def test_no_lock_no_word(build, recwarn, caplog):
    build()
    assert not recwarn.list and not caplog.records


def test_builds_of_different_sources_do_not_meet(build, text, monkeypatch):
    """Each has a name, so a directory, of its own: texts, architectures, versions of torch."""
    build()
    build()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    build()
    build(text.replace("constexpr int kRing = 4;", "constexpr int kRing = 3;"))
    build(text.replace("have less than 64 GB", "be small"))
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.99.0"))
    _, given = build()
    first, again, *others = [settings["name"] for settings in given]
    assert first == again and len({first, *others}) == 5
    assert all(name.isidentifier() for name in (first, *others))


@pytest.mark.parametrize("variable", ["HOME", "TORCH_EXTENSIONS_DIR"])
def test_no_directory_to_build_in(build, variable, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, "/dev/null")
    names, given = build()
    assert not given
    with pytest.raises(RuntimeError, match="TORCH_EXTENSIONS_DIR must .*got") as raised:
        names["ModelNew"](4)(torch.rand(2, 4, 3, 3))
    assert "\n" not in str(raised.value)


def test_space_in_the_path_of_torch(build, monkeypatch):
    monkeypatch.setattr(torch.utils.cpp_extension, "TORCH_LIB_PATH", "/home/my torch/lib")
    names, given = build()
    assert not given
    with pytest.raises(RuntimeError, match="must .*without spaces, got /home/my torch/lib$"):
        names["ModelNew"](4)(torch.rand(2, 4, 3, 3))
