"""SIGTERM and Ctrl-C wait until an iteration is finished; a second Ctrl-C does not."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .distributed import gathered, launcher, say, size

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is only remembered, for `received`."""

    def __init__(self) -> None:
        """Nothing has been received."""
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        """Catch the signals; only the main thread can, in another one they keep doing what they did."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the signals back; but of several processes one that fails is not stopped before it has said why.

        `torchrun` sends SIGTERM at once when another one has ended.
        """
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._previous and kind is not None and issubclass(kind, RuntimeError) and size() > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def received(self) -> signal.Signals | None:
        """The signal that came to this process or to any other; all must ask at the same place, and leave together."""
        return next(filter(None, gathered(self._received)), None)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not `print`: the signal may have interrupted one.
        message = f"\n{self._received.name}: finishing this iteration to write a checkpoint; Ctrl-C leaves at once\n"
        os.write(STDERR, message.encode())


def leave(received: signal.Signals, run: Path, iterations: int, command: str | None = None) -> NoReturn:
    """End the program with the status that shells give to `received`, and show how to go on with `run`.

    `command` does so; None is this program with `--resume`.
    """
    resume = command or shlex.join([*launcher(), sys.argv[0], "--resume", str(run)])
    say(f"stopped after {iterations} iterations by {received.name}; continue with: {resume}", file=sys.stderr)
    raise SystemExit(128 + received)
