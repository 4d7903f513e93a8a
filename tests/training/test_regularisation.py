"""The rule that fits dropout and epochs to the text."""

from __future__ import annotations

import pytest

from nanothink.training.regularisation import Regularisation, is_measured, narrowed


@pytest.mark.parametrize(
    ("n_tokens", "n_parameters", "dropout", "epochs"),
    [
        (33_000, 900_000, 0.3, 32),
        (329_000, 2_360_000, 0.3, 32),
        (329_000, 900_000, 0.25, 16),
        (1_300_000, 900_000, 0.1, 4),
        (20_000_000, 900_000, 0.0, 2),
    ],
)
def test_the_rule_gives_what_was_measured(
    n_tokens: int, n_parameters: int, dropout: float, epochs: int
) -> None:
    rule = Regularisation.of(n_tokens, n_parameters)
    assert (rule.dropout, rule.max_epochs) == (dropout, epochs)
    assert rule.weight_decay_tables == (0.1 if dropout == 0.3 else 0.0)


def test_more_text_never_means_more_dropout_or_more_epochs() -> None:
    rules = [Regularisation.of(1000 * 2**n, 1_000_000) for n in range(20)]
    assert [r.dropout for r in rules] == sorted((r.dropout for r in rules), reverse=True)
    assert [r.max_epochs for r in rules] == sorted((r.max_epochs for r in rules), reverse=True)
    assert all(round(100 * r.dropout) % 5 == 0 for r in rules)


@pytest.mark.parametrize(
    ("epochs", "dropout", "decay"), [(40, 0.3, 0.1), (16, 0.3, 0.1), (9, 0.2, 0.0), (1, 0.0, 0.0)]
)
def test_with_time_for_few_epochs_there_is_less_dropout(epochs: float, dropout: float, decay: float) -> None:
    rule = Regularisation.of(33_000, 900_000).within(epochs)
    assert (rule.dropout, rule.weight_decay_tables) == (dropout, decay)


def test_little_text_narrows_a_model_and_never_widens_it() -> None:
    assert [narrowed(256, n) for n in (42_000, 120_000, 330_000)] == [(64, 4), (128, 6), (128, 6)]
    assert narrowed(256, 1_300_000) == (256, None)
    assert narrowed(32, 42_000) == (32, None)
    assert is_measured(330_000)
    assert not is_measured(120_000)


@pytest.mark.parametrize("n_tokens", [1000 * 2**n for n in range(15)])
def test_a_student_has_no_dropout_at_most_16_epochs_and_no_less_width(n_tokens: int) -> None:
    own, taught = (Regularisation.of(n_tokens, 1_000_000, taught=taught) for taught in (False, True))
    assert (taught.dropout, taught.weight_decay_tables) == (0.0, 0.0)
    assert min(own.max_epochs, 16) <= taught.max_epochs <= 16
    assert 128 <= narrowed(256, n_tokens, taught=True)[0] >= narrowed(256, n_tokens)[0]
