"""Stops that wait for a step to end: the first SIGINT or SIGTERM is noted, the second acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupt:
    """Whether somebody has asked for a stop."""

    asked: bool = False


@contextmanager
def noted_interrupts() -> Iterator[Interrupt]:
    """Within the block the first signal sets `asked`; a second one raises KeyboardInterrupt where it stands.

    A signal that the block did not look at any more is raised when it ends well: none is lost. Outside the main
    thread, where no handler can be set, nothing is ever asked.

    Raises:
        KeyboardInterrupt: a stop was asked for.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    earlier: dict[signal.Signals, Any] = {s: signal.signal(s, note) for s in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if interrupt.asked:
        raise KeyboardInterrupt


def terminate_as_interrupt() -> None:
    """From now on SIGTERM raises KeyboardInterrupt, as SIGINT does: both end in exit code 130. In the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
