"""SIGTERM and Ctrl-C wait until an iteration is finished; a second Ctrl-C does not."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is only remembered, as `received`."""

    def __init__(self) -> None:
        """Nothing has been received."""
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        """Catch the signals; only the main thread can, in another one they keep doing what they did."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not `print`: the signal may have interrupted one.
        message = f"\n{self.received.name}: finishing this iteration to write a checkpoint; Ctrl-C leaves at once\n"
        os.write(STDERR, message.encode())
