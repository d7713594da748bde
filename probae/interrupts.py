"""Ctrl-C and SIGTERM as a wish to stop between two steps, where nothing is half done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

TOLD = b"\nstopping after this step; Ctrl-C again stops at once\n"
LAUNCHER = 5.0  # seconds within which a launcher's signal is the one that the terminal sent, too


def terminate(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM as Python handles Ctrl-C; :class:`Interrupts` takes over from it."""
    raise KeyboardInterrupt


class Interrupts:
    """Takes note of the first Ctrl-C, and lets the second one raise KeyboardInterrupt at once.

    SIGTERM is noted likewise, however often it comes, where :func:`terminate` handled it before.
    Other handlers stay, and so do all of them outside of the main thread.

    Args:
        launched: whether a launcher passes signals on, so that one Ctrl-C may come twice.
        quiet: say nothing on stderr.
    """

    def __init__(self, launched: bool = False, quiet: bool = False) -> None:
        self.launched, self.quiet = launched, quiet
        self.asked = False
        self.since = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if handler in (signal.default_int_handler, terminate):
                    self.before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.asked and number == signal.SIGINT
        if again and not (self.launched and now - self.since < LAUNCHER):
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.since = True, now
            if not self.quiet:
                with contextlib.suppress(OSError):  # print() may be at work already
                    os.write(2, TOLD)
