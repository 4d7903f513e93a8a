"""The promises of every model (docs/architecture.md) as assertions: causal, and the same step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nanothink.models.contract import LanguageModel, State

Outputs = Callable[[Tensor], Mapping[str, Tensor]]


def tokens_of(vocab_size: int, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain_outputs(model: LanguageModel, targets: Tensor) -> Outputs:
    """All that a model of one expert says of (B, T) tokens."""

    def outputs(x: Tensor) -> dict[str, Tensor]:
        log_likelihood = model.log_likelihood(x, targets)
        return {"hidden": model.hidden(x), "logits": model.logits(x), "log_likelihood": log_likelihood}

    return outputs


def assert_causal(
    outputs: Outputs, x: Tensor, vocab_size: int, *, autocast: bool = False, atol: float = 1e-6
) -> None:
    """Tokens after t change nothing at or before t, and something after it, or nothing was tested."""
    length = x.shape[1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = outputs(x)
        for t in sorted({0, 1, length // 2 - 1, length // 2, length - 2}):
            changed = x.clone()
            changed[:, t + 1 :] = tokens_of(vocab_size, len(x), length - 1 - t, seed=5 + t)
            for name, found in outputs(changed).items():
                same, other = found[:, : t + 1], before[name][:, : t + 1]
                torch.testing.assert_close(same, other, rtol=0, atol=atol, msg=f"{name}: {{}}".format)
                assert not torch.equal(found[:, t + 1 :], before[name][:, t + 1 :]), name


def assert_every_token_matters(output: Callable[[Tensor], Tensor], x: Tensor, vocab_size: int) -> None:
    """Causality alone would also hold for a model that looks at nothing."""
    last = output(x)[:, -1]
    for t in range(x.shape[1]):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % vocab_size
        assert not torch.allclose(output(changed)[:, -1], last, atol=1e-4), t


def assert_steps_are_parallel(
    model: LanguageModel,
    x: Tensor,
    cuts: Sequence[int],
    *,
    tolerance: float = 1e-4,
    look: Callable[[State, int], None] = lambda state, position: None,
) -> None:
    """However a text is cut into steps, the logits after each are those of the parallel pass.

    ``look`` is called after each step with the state and the number of tokens read.
    """
    parallel = model.logits(x).detach()
    state, position = model.start(len(x)), 0
    for n_tokens in cuts:
        found = model.step(x[:, position : position + n_tokens], state)
        position += n_tokens
        assert found.dtype == torch.float32
        assert not found.requires_grad
        torch.testing.assert_close(found, parallel[:, position - 1], rtol=tolerance, atol=tolerance)
        look(state, position)


def assert_steps_stay_close_under_autocast(model: LanguageModel, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        parallel, state = model.logits(x).detach(), model.start(len(x))
        found = torch.stack([model.step(x[:, t : t + 1], state) for t in range(x.shape[1])], dim=1)
    torch.testing.assert_close(found, parallel, rtol=0.05, atol=0.05 * float(parallel.abs().max()))
