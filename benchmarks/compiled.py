"""C++ beside the installed PyTorch: libraries below `build/`, compiled where this PyTorch's is not there yet."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1] / "build"


def lacks() -> str:
    """Why code that stands for CUDA cannot be here; empty where it can."""
    if torch.version.cuda is not None:
        return "this PyTorch is built with CUDA, and would look for a device"
    return "" if _compiler() else "there is no C++ compiler"


def library(name: str, code: str, links: Sequence[str]) -> Path:
    """The library of some code, linked to PyTorch's own of these names. Raises RuntimeError, as the compiler says."""
    root = Path(torch.__file__).parent
    made = FOLDER / name / f"torch-{torch.__version__}-{hashlib.sha256(code.encode()).hexdigest()[:12]}.so"
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-L{root / 'lib'}"]
    part = made.with_suffix(f".{os.getpid()}")
    command = [_compiler() or "", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-x", "c++", "-", *includes, "-o", str(part)]
    done = subprocess.run([*command, *(f"-l{n}" for n in links)], input=code, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} does not compile: {done.stderr[:2000]}")
    part.replace(made)  # whole, whoever else compiles it now
    return made


def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")
