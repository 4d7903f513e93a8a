"""Sizes that a training plan weighs: shapes of models, the text, and steps on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from nanothink.config.base import Settings
from nanothink.data.tokenizer import fitting_vocab_size


class Shape(Settings):
    """Sizes that all experts of a plan have."""

    d_model: int
    n_heads: int
    layers: dict[str, int]
    """Number of layers of each kind."""
    length: int
    """Tokens of a block."""
    batch_size: int
    max_vocab: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.length

    def vocab_size(self, n_bytes: int) -> int:
        """Vocabulary for a text of ``n_bytes``. A large head would take most of a small model's time."""
        return min(fitting_vocab_size(n_bytes), self.max_vocab)

    def widened(self, factor: int) -> Shape:
        """The same with features and heads ``factor`` times as many."""
        return self.model_copy(update={"d_model": factor * self.d_model, "n_heads": factor * self.n_heads})

    def n_parameters(self, vocab_size: int) -> int:
        """Parameters of its transformer: attention and SwiGLU are 16 D² a layer."""
        return 16 * self.d_model**2 * self.layers["transformer"] + 2 * vocab_size * self.d_model


def _shape(d_model: int, n_heads: int, layers: Sequence[int], length: int, batch: int, vocab: int) -> Shape:
    by_kind = dict(zip(("transformer", "state_space", "diffuser"), layers, strict=True))
    return Shape(
        d_model=d_model,
        n_heads=n_heads,
        layers=by_kind,
        length=length,
        batch_size=batch,
        max_vocab=vocab,
    )


SHAPES = (
    _shape(64, 2, (2, 2, 2), 128, 8, 1024),
    _shape(64, 2, (4, 4, 4), 128, 8, 1024),
    _shape(128, 4, (2, 3, 2), 256, 8, 2048),
    _shape(128, 4, (4, 6, 4), 256, 8, 4096),
    _shape(256, 8, (3, 3, 3), 256, 8, 4096),
    _shape(384, 6, (6, 6, 4), 512, 8, 8192),
    _shape(512, 8, (8, 12, 6), 512, 16, 16384),
    _shape(768, 12, (12, 24, 8), 1024, 16, 32768),
)
"""From small to large."""


class TextSize(Settings):
    """Numbers of a text that a plan depends on."""

    n_bytes: int
    n_domains: int
    digest: str = ""
    """Hash of all files, to see that it is the same text later."""
    bytes_per_token: float | None = None
    """UTF-8 bytes that a token of the trained tokenizer stands for; None before there is one."""

    def n_tokens(self, vocab_size: int) -> int:
        """Training tokens, about; a tenth is held out."""
        return max(1, int(0.9 * self.n_bytes / (self.bytes_per_token or _usual_bytes_per_token(vocab_size))))


def _usual_bytes_per_token(vocab_size: int) -> float:
    """About 2.6 at 1,024 entries and 0.35 more for each doubling, as measured on the starter corpus."""
    return max(2.0, 2.6 + 0.35 * math.log2(vocab_size / 1024))


class StepTime(Settings):
    """Measured on this machine."""

    step_seconds: float
    """An optimizer step."""
    token_seconds: float
    """Scoring a token of held-out text."""


SpeedOf = Callable[[str, Shape, int], StepTime]
"""(kind, shape, vocabulary) -> its time on this machine."""
