"""A scene: a function of a test module that gets a Python of its own."""

import os
import subprocess
import sys
from pathlib import Path

import check

PATHS = [str(Path(__file__).parent), str(check.ROOT), str(check.ROOT / ".ci")]
PATHS += [os.environ.get("PYTHONPATH", "")]


def in_new_python(scene, *, under: tuple[str, ...] = (), **environment: str) -> str:
    """Calls the function; returns what it printed. under: a command that runs the Python.

    An empty variable of the environment is one that is not there.
    """
    code = f"import {scene.__module__} as scenes; scenes.{scene.__name__}()"
    settings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(PATHS),
        "PYTHONWARNINGS": "ignore",
        **environment,
    }
    settings = {key: value for key, value in settings.items() if value}
    command = [*under, sys.executable, "-c", code]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=280)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said if len(said) < 8000 else f"{said[:4000]} … {said[-4000:]}"
    return done.stdout
