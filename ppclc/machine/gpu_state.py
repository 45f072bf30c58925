"""What a GPU is doing while it is timed: clocks, temperature, power, and why its clocks are held down, as `nvidia-smi` tells them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence

import torch

NOT_TOLD = "not told"
FIELDS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The same by its new name and its old one: a driver may know one alone, and answers nothing to a question with a name that it does not know."""
Ask = Callable[[Sequence[str]], str]


def gpu_state(device: str, ask: Ask | None = None) -> str:
    """One line, as `clocks.sm 1980 MHz, temperature.gpu 41, ...`, of the current GPU; `not told` where nothing answers, empty for a CPU."""
    if device == "cpu":
        return ""
    return ", ".join(f"{name} {value}" for name, value in gpu_fields(ask).items()) or NOT_TOLD


def gpu_fields(ask: Ask | None = None) -> dict[str, str]:
    """What the current GPU does, by `nvidia-smi`'s names; nothing where nothing answers."""
    ask = ask or nvidia_smi
    for fields in ((*FIELDS, REASONS[0]), (*FIELDS, REASONS[1]), FIELDS):
        values = [value.strip() for value in ask(fields).split(",")]
        if len(values) == len(fields):
            return dict(zip(fields, values, strict=True))
    return {}


def nvidia_smi(fields: Sequence[str]) -> str:
    """The values of the current device, between commas; nothing where they cannot be had."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", *_named()]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    return told[0] if told else ""


def _named() -> list[str]:
    """The current device among several: `nvidia-smi` numbers all that the machine has, PyTorch those that it may see."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return [] if uuid is None else ["-i", f"GPU-{uuid}"]
