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
    thread, where no handler can be set, nothing is ever asked, and neither is by a signal that is ignored.

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

    minded = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    earlier: dict[signal.Signals, Any] = {s: signal.signal(s, note) for s in minded}
    try:
        yield interrupt
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if interrupt.asked:
        raise KeyboardInterrupt


_stop = Interrupt()
"""Signals come to the whole process, and so does what is remembered of them."""


def terminate_as_interrupt() -> None:
    """From now on SIGTERM raises KeyboardInterrupt, as SIGINT does, and either is remembered: both end in exit code 130.

    In the main thread alone; a signal that is ignored, as in a shell's background, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    _stop.asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        _stop.asked = True
        raise KeyboardInterrupt

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def raise_if_stopped() -> None:
    """Raise KeyboardInterrupt where one was raised before and swallowed.

    Python drops what is raised in a finalizer or a weak reference's callback, and a graph that was lowered to ONNX
    leaves torch with seconds of them.
    """
    if _stop.asked:
        raise KeyboardInterrupt
