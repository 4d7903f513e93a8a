"""Real output of a terminal, with its colours, as a picture:

    tmux capture-pane -e -p -S -60 | python docs/figures/terminal.py "nanothink demo" > docs/figures/demo.svg
"""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text


def picture(captured: str, title: str, width: int = 100) -> str:
    console = Console(record=True, width=width, file=open("/dev/null", "w"), legacy_windows=False)
    console.print(Text.from_ansi(captured.strip("\n") + "\n"), soft_wrap=False)  # room for what hangs below
    svg = console.export_svg(title=title, theme=MONOKAI)
    # Pages may load nothing from elsewhere, and an image cannot: the viewer's own font stands in.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S).replace("Fira Code, ", "")


if __name__ == "__main__":
    print(picture(sys.stdin.read(), sys.argv[1]))
