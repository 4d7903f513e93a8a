"""Two users of one group, played by forks of the test process, and folders that they share."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

FIRST, SECOND, GROUP = 2001, 2002, 2100


class AsUser(Protocol):
    def __call__(self, user: int, action: Callable[[], Any], *, umask: int = 0o022) -> Any: ...


@pytest.fixture
def as_user() -> AsUser:
    """Run an action as another user of the group and return its result, or what was raised as text."""
    if os.geteuid():
        pytest.skip("only root can act as other users")

    def run(user: int, action: Callable[[], Any], *, umask: int = 0o022) -> Any:
        read_end, write_end = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about forking a process that has threads
            child = os.fork()
        if not child:
            try:
                os.setgroups([GROUP])
                os.setgid(user)
                os.setuid(user)
                os.umask(umask)
                answer = json.dumps(action())
            except BaseException as error:
                answer = json.dumps(f"{type(error).__name__}: {error}")
                if isinstance(error, AssertionError):
                    traceback.print_exc()
            os.write(write_end, answer.encode())
            os._exit(0)
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            given = pipe.read()
        os.waitpid(child, 0)
        return json.loads(given)

    return run


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that the group may write to, and that passes its group on."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    inside = folder / "shared"
    inside.mkdir()
    os.chown(inside, -1, GROUP if os.geteuid() == 0 else -1)
    inside.chmod(0o2775)
    yield inside
    shutil.rmtree(folder)
