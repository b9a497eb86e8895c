"""Files that are written whole or not at all, and a folder that one process has for itself."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, also when the machine stops or the disk is full.

    Raises:
        OSError: it cannot be written; what was there is there still.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        error.add_note(f"{path} could not be written; make room or make the folder writable, then resume")
        raise


def locked(path: Path) -> BaseFileLock:
    """The folder's lock, which the system releases when this process ends, however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"another process is writing to {path}; wait for it or choose another --output") from None
    except OSError as error:
        error.add_note(f"The run folder {path} cannot be written; choose another --output or make it writable")
        raise
    return lock


def write_rows(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write a CSV with `write_whole`; columns that come later leave earlier cells empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
