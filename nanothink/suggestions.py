"""Commands and names that messages suggest. Commands stand in backticks, so that they copy as one piece.

A message names the command and what the fault asks for. The command line adds the options of the command
that failed (cli/suggestions.py): the core knows none of them.
"""

from __future__ import annotations

import difflib
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


def command(call: str, *words: object) -> str:
    """Format a command for a shell: ``call``, such as ``"store build"``, and words to be quoted."""
    return shlex.join(["nanothink", *call.split(), *map(str, words)])


def suggest(call: str, *words: object) -> str:
    """Format a command as part of a message, in backticks."""
    return f"`{command(call, *words)}`"


def again(*options: object) -> str:
    """Format options as part of a message: the command that was called, once more, with these.

    The command line puts that command before them.
    """
    return f"`{shlex.join(map(str, options))}`"


def domain_named_after(place: Path) -> str:
    """A name for the domain of an import, from that of its file or folder; empty if it has no letter."""
    return re.sub(r"[^\w-]+", "_", place.resolve().stem.lower()).strip("_-")


def install(requirement: str) -> str:
    """Format the command that installs a package, or an extra of NanoThink, for the Python that runs."""
    beside = Path(sys.executable).with_name("pip")
    pip = "pip" if shutil.which("pip") == str(beside) else f"{shlex.quote(sys.executable)} -m pip"
    return f"`{pip} install {shlex.quote(requirement)}`"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` if a known name is close to ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
