"""The one case a split by document cannot serve: a domain that holds a single text.

That text is cut in two, and so is every copy of it in any domain, so that copies still agree:
the head trains, the tail validates.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from nanothink.errors import DataError


def single_texts(keys: Mapping[str, NDArray[np.uint64]]) -> dict[int, str]:
    """Text key to domain, for each domain that holds one distinct text (copies do not count)."""
    return {int(own[0]): domain for domain, own in keys.items() if len(own) and bool((own == own[0]).all())}


def head_and_tail(text: str, val_split: float, domain: str) -> tuple[str, str]:
    """Cuts a text in two, ``val_split`` of it in the tail, at the white space nearest to that place.

    White space farther away than a twentieth of the text or a thousand characters is not looked for.
    The tail begins with its white space, as GPT-2's words do. Neither part is ever empty, and together
    they are the text. Raises DataError for a text of one character.
    """
    if len(text) < 2:
        raise DataError(
            f"Domain '{domain}' holds one text of one character, which leaves nothing to validate on. "
            "Add text to it, or leave the domain out with --domains."
        )
    aim = min(max(round(len(text) * (1 - val_split)), 1), len(text) - 1)
    reach = min(len(text) // 20, 1000)
    for distance in range(reach + 1):
        for place in (aim - distance, aim + distance):
            if 0 < place < len(text) and text[place].isspace():
                return text[:place], text[place:]
    return text[:aim], text[aim:]
