"""Asked to stop: the first SIGTERM or Ctrl-C is noted, the second one ends the process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """A context in which the first signal only sets :attr:`signal`, to be polled.

    Outside the main thread, where Python allows no handlers, signals do what they always did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        self.signal = number
