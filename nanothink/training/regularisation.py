"""Size, dropout and epochs that a text bears: a rule, from measurements at 0.1 and 1 MB (docs/log.md).

The fewer tokens there are for each parameter, the sooner a model overfits. Dropout puts that off, so that
more epochs pay; with ample text it only slows learning down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

AMPLE = 4.0
"""Training tokens for each parameter above which nothing is to be gained."""

_AT_ONE = 0.15  # dropout at one token for each parameter
_A_DOUBLING = 0.07  # by which it falls where there are twice as many
_MOST = 0.3
_EPOCHS = ((0.3, 16, 32), (0.2, 8, 16), (0.1, 4, 4), (0.0, 0, 2))
"""For this much dropout or more: epochs from which on it pays, and epochs that are enough."""
_TAUGHT_EPOCHS = 16
_TABLES = 0.1  # decay of embeddings and head, at the most dropout

_SIZES = ((80_000, 64, 4), (600_000, 128, 6))
"""Training tokens up to which a width is enough, and layers for it. Measured: at 42 thousand 64
rather than 128 or 256, at 330 thousand 128 and six layers rather than 256 and three. The rest is a guess."""

_TAUGHT_SIZES = ((80_000, 128, 4),)
"""The same for students, which were measured at width 128 and, at 330 thousand, 256."""

_MEASURED = (42_000, 330_000)
"""Training tokens of the texts that the rule is drawn through."""
_NEAR = 1.5


def is_measured(n_tokens: int) -> bool:
    """True if the rule was measured on a text of about this size."""
    return any(size / _NEAR <= n_tokens <= size * _NEAR for size in _MEASURED)


def narrowed(width: int, n_tokens: int, *, taught: bool = False) -> tuple[int, int | None]:
    """Width and layers of a model that is too wide for the text; a student (``taught``) is wider than others.

    ``width`` and None where that is not too wide.
    """
    sizes = _TAUGHT_SIZES if taught else _SIZES
    enough = ((own, layers) for most, own, layers in sizes if n_tokens <= most and own < width)
    return next(enough, (width, None))


@dataclass(frozen=True)
class Regularisation:
    """Settings of a run for a text of some size."""

    dropout: float
    weight_decay_tables: float
    max_epochs: int
    tokens_per_parameter: float

    @property
    def early_stopping_patience(self) -> int:
        """Evaluations in a row without improvement that end a run.

        Five ended a run of 32 epochs at epoch 19, where its rate was still high.
        """
        return max(5, self.max_epochs)

    @classmethod
    def of(cls, n_tokens: int, n_parameters: int, *, taught: bool = False) -> Regularisation:
        """That of so many training tokens and parameters.

        Args:
            taught: learns a teacher's predictions. Each says more than a token, so that a student overfits
                late: it needs no dropout, and bears more epochs. Beyond 16 they gave nothing.
        """
        ratio = n_tokens / n_parameters
        if taught:
            epochs = 2 * cls.of(n_tokens, n_parameters).max_epochs
            return cls(0.0, 0.0, min(epochs, _TAUGHT_EPOCHS), ratio)
        wanted = _AT_ONE - _A_DOUBLING * math.log2(ratio)
        dropout = 0.0 if ratio > AMPLE else min(max(round(20 * wanted) / 20, 0.0), _MOST)  # steps of 0.05
        epochs = next(n for least, _, n in _EPOCHS if dropout >= least)
        return cls(dropout, _TABLES if dropout >= _MOST else 0.0, epochs, ratio)

    def within(self, epochs: float) -> Regularisation:
        """The same for a run that has time for so many: more dropout than pays there only slows it down."""
        pays = next(dropout for dropout, least, _ in _EPOCHS if epochs >= least)
        dropout = min(self.dropout, pays)
        return replace(self, dropout=dropout, weight_decay_tables=_TABLES if dropout >= _MOST else 0.0)
