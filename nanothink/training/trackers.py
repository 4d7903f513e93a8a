"""Trackers: a copy of a run's numbers for TensorBoard, trackio or wandb.

``metrics.jsonl`` is the record; a tracker is optional (the setting ``tracker``) and never stops a run. Its
first failure is reported, and the run continues without it. Each process that trains writes its own run in
trackio and wandb, grouped under the run's name, since a resumed run repeats steps.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nanothink.errors import UsageError
from nanothink.suggestions import install

_PACKAGES = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}


class Tracker(Protocol):
    """Receives numbers and texts by name. Any method may raise any exception of its library."""

    def log(self, values: Mapping[str, float | str], step: int) -> None: ...

    def close(self) -> None: ...


def require_tracker(name: str) -> None:
    """Raise UsageError if the package of this tracker is not installed."""
    package = _PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UsageError(
            f"tracker={name} needs {package}: {install(f'nanothink[{name}]')}. Train without it: tracker=none"
        )


def open_tracker(name: str, folder: Path, config: Mapping[str, Any], step: int) -> Tracker | None:
    """Open the tracker called ``name`` for the run in ``folder``, which has done ``step`` steps.

    Raises:
        UsageError: its package is missing, or it cannot start.
    """
    require_tracker(name)
    try:
        if name == "tensorboard":
            return _TensorBoard(folder, step)
        return _Wandb(_PACKAGES[name], folder, config, step) if name in _PACKAGES else None
    except Exception as error:
        raise UsageError(f"tracker={name} cannot start: {error}. Train without it: tracker=none") from error


class _TensorBoard:
    """One event file in the run's folder.

    tensorboardX's ``SummaryWriter`` hands events to a thread, and where that dies of a full disk the run
    waits for it forever; its ``EventsWriter`` writes at once and raises.
    """

    FLUSH_SECONDS = 30.0

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event = Event
        # An unguessable name, so that nobody can put a link there.
        self._writer = EventsWriter(str(folder / "events"), f".{secrets.token_hex(6)}")
        if step:  # TensorBoard hides what earlier processes wrote for the steps that are repeated
            self._write(step + 1, session_log=SessionLog(status=SessionLog.START))
        self._flush()

    def log(self, values: Mapping[str, float | str], step: int) -> None:
        from tensorboardX.summary import scalar, text

        for name, value in values.items():
            summary = text(name, value) if isinstance(value, str) else scalar(name, value)
            self._write(step, summary=summary)
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self._flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))

    def _flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()


class _Wandb:
    """wandb, or trackio, which has the same functions and keeps everything on this machine."""

    def __init__(self, package: str, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._library = importlib.import_module(package)
        name = f"{folder.name} from step {step}" if step else folder.name
        with contextlib.redirect_stdout(io.StringIO()):  # trackio prints; standard output is for results
            self._library.init(project="nanothink", name=name, group=folder.name, config=dict(config))

    def log(self, values: Mapping[str, float | str], step: int) -> None:
        self._library.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._library.finish()
