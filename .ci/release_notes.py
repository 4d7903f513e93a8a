"""Print the section of CHANGELOG.md for a version that is about to be released.

    python .ci/release_notes.py 0.1.0

Exits with 1 and a message when the version is not ``nanothink.__version__``, or has no dated section.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def current_version(source: str) -> str:
    """Value of ``__version__`` in the source of ``nanothink/__init__.py``."""
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise SystemExit('nanothink/__init__.py has no line __version__ = "..."')
    return found[1]


def release_notes(version: str, current: str, changelog: str) -> str:
    """The text below ``## VERSION - YYYY-MM-DD``, up to the next section.

    Raises:
        SystemExit: with a message; the release is not ready.
    """
    if version != current:
        raise SystemExit(f"The tag says {version}, nanothink/__init__.py says {current}.")
    heading = re.compile(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d\n", re.MULTILINE)
    found = heading.search(changelog)
    if found is None:
        raise SystemExit(f"CHANGELOG.md has no section '## {version} - YYYY-MM-DD'. Is it still unreleased?")
    notes = re.split(r"^## ", changelog[found.end() :], maxsplit=1, flags=re.MULTILINE)[0].strip()
    if not notes:
        raise SystemExit(f"The section of {version} in CHANGELOG.md is empty.")
    return notes + "\n"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    current = current_version((ROOT / "nanothink/__init__.py").read_text("utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    sys.stdout.write(release_notes(sys.argv[1], current, changelog))


if __name__ == "__main__":
    main()
