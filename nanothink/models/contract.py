"""The interface of every language model. Trainer, evaluation, sampling and NanoThink use nothing else.

Two promises come with it, and each model is tested for them: *causality* (tokens after t change nothing at
or before t) and *equal decoding* (``step`` gives the logits that the parallel forward pass gives).

Shapes: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn

from nanothink.config import Config
from nanothink.models.decoding import project
from nanothink.models.dropout import Dropout
from nanothink.models.joint_gate import JointGate, no_neighbours
from nanothink.models.loss import CHUNK_ROWS, linear_cross_entropy, linear_log_likelihood
from nanothink.models.low_rank import AdaptedLinear

if TYPE_CHECKING:
    from nanothink.models.decoding.steps import Step
    from nanothink.models.store_gate import Neighbours


Choose: TypeAlias = Callable[[Tensor, Sequence[int]], int | None]
"""Draws the next token of a text from logits (1, V), after tokens that were drafted since its last one; None
where the text would end before that token is read."""


class State:
    """Decoding state of a model after the tokens read so far. Opaque: made by ``start``, used by ``step``.

    Its rows are sequences of their own. They may join and leave, and may have read different numbers of
    tokens; whoever reads on gives each of them the same number.
    """

    step: Step | None = None
    """Reads tokens into the tensors of this state; None once one of them has been replaced."""

    choose: Choose | None = None
    """Set by whoever continues a text with this state: its model may then read drafted tokens ahead."""

    rewind_every: int = 0
    """Tokens that may be read after each ``remember``, for ``rewind``; 0: it can't."""

    def remember(self) -> None:
        """Keep what ``rewind`` needs to come back to this place."""

    def rewind(self, n_tokens: int) -> None:
        """Forget the last tokens, so many; ``remember`` was called before each ``rewind_every`` of them."""
        raise NotImplementedError

    def check_room(self, tokens: Tensor) -> None:
        """Raise UsageError for (B, T) tokens that do not fit."""

    def has_room(self, n_new: int) -> bool:
        """True if the tensors of this state take so many more tokens as they are."""
        return True

    def join(self, other: State) -> None:
        """Append copies of the rows of another state of the same model, which stays as it is."""
        raise NotImplementedError

    def drop(self, row: int) -> None:
        """Remove one row. The last one takes its place, so no other is copied."""
        raise NotImplementedError


def joined_rows(own: Tensor | None, others: Tensor | None) -> Tensor | None:
    """(B, ...) and (b, ...) -> (B + b, ...); None stands for no rows."""
    if own is None or others is None:
        return others if own is None else own
    return torch.cat([own, others])


def without_row(own: Tensor | None, row: int) -> Tensor | None:
    """(B, ...) -> (B - 1, ...), as ``State.drop`` orders them."""
    if own is None:
        return None
    order = list(range(len(own) - 1))
    if row < len(order):
        order[row] = len(order)
    return own[order]


class LanguageModel(nn.Module, ABC):
    """Base of all models."""

    kind: ClassVar[str]
    """The name that commands, configs and checkpoints use."""

    vocab_size: int

    d_model: int
    """Width of the residual stream, and of ``hidden`` too in every model but the combined one."""

    lm_head: nn.Linear | None
    """None: the embedding table is the head."""

    context_length: int | None
    """Most tokens that one forward pass or one decoding state can hold; None: no limit."""

    joint_gate: JointGate | None = None
    """Mixes predictions with those of memories (joint_gate.py), fitted after training. No part of the
    parameters."""

    logit_scale: float = 1.0
    """Factor on the logits from calibration (inference/calibration.py). In every prediction; not in ``loss``,
    which is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = Dropout()  # rate 0; training sets it

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The table of token embeddings, (V, D)."""

    @abstractmethod
    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D): the final states, which the head reads."""

    @property
    def head_weight(self) -> nn.Parameter:
        """(V, D): the LM head, or the embedding table when tied. Its D is that of ``hidden``."""
        head = self.embedding if self.lm_head is None else self.lm_head
        return cast(nn.Parameter, head.weight)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers that hold most of its own parameters, in forward order; all are used by calls alone.

        They are compiled, recomputed in the backward pass, and shared out over processes one by one. A model
        without any is one piece in all of these.
        """
        return ()

    @abstractmethod
    def start(self, batch_size: int) -> State:
        """An empty decoding state for ``batch_size`` sequences."""

    @abstractmethod
    def read(self, tokens: Tensor, state: State, *, last_only: bool = False) -> Tensor:
        """Read (B, T) more tokens, T >= 1, and return their states as ``hidden`` does, (B, T, D) float32.

        Advances ``state`` in place. The result does not depend on how a sequence is cut. No gradients.

        Args:
            last_only: return the last token's state alone, (B, 1, D), which can be cheaper.

        Raises:
            UsageError: the state would hold more than ``context_length`` tokens.
        """

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """Read (B, T) more tokens, T >= 1, and predict the one after them: (B, V) float32 logits.

        Advances ``state`` as ``read`` does.
        """
        last = self.read(tokens, state, last_only=True)[:, -1]  # (B, D)
        with torch.no_grad():
            return self.predicted(last)

    def forward(self, tokens: Tensor) -> Tensor:
        """The same as ``logits``."""
        return self.logits(tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V) float32. For short inputs: training never holds this tensor."""
        return self.predicted(self.hidden(tokens))

    def predictions(self, tokens: Tensor) -> Iterator[Tensor]:
        """``logits`` of (B, T) tokens, (R, V) of some hundred positions at a time, for longer inputs."""
        states = self.hidden(tokens).flatten(0, 1)
        for start in range(0, len(states), CHUNK_ROWS):
            yield self.predicted(states[start : start + CHUNK_ROWS])

    def predicted(self, states: Tensor) -> Tensor:
        """(..., D) final states -> (..., V) float32 logits, calibrated."""
        return project(self._scaled(states), self.head_weight).float()

    def loss(self, inputs: Tensor, targets: Tensor, *, scale: float = 1.0) -> Tensor:
        """Cross-entropy summed over the targets (B, T) that are not IGNORE, in nats, times ``scale``.

        A scalar float32. With ``scale`` = 1 / number of targets it is the mean. ``logit_scale`` is left out.
        """
        states = self.hidden(inputs).flatten(0, 1)  # (B*T, D)
        return linear_cross_entropy(states, self.head_weight, targets.flatten(), scale=scale)

    def log_likelihood(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """(B, T) float32: log-likelihood of each target in nats, 0 where it is IGNORE. Differentiable."""
        states = self._scaled(self.hidden(inputs)).flatten(0, 1)  # (B*T, D)
        return linear_log_likelihood(states, self.head_weight, targets.flatten()).view(targets.shape)

    def expert_logits(self, states: Tensor, weights: Tensor | None) -> list[Tensor]:
        """(N, D) final states -> (N, V) logits of each expert that predicts by itself; here the model alone.

        Args:
            weights: (N, E) of the experts of a combined model.
        """
        return [project(states, self.head_weight).float()]

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Of what ``expert_logits`` gives."""
        return (self.kind,)

    def weights_read(self, state: State) -> Tensor | None:
        """(B, T, E) weights of the experts for the tokens of the last ``read``; None for a single model."""
        return None

    def stored_neighbours(self, keys: Tensor) -> Neighbours:
        """Neighbours in the vector store of (N, D') ``key_states``; none without one."""
        return no_neighbours(len(keys), keys.device)

    def key_states(self, states: Tensor) -> Tensor:
        """(N, D) final states -> (N, D') what memories are searched with; its length means nothing."""
        return states

    def cache_keys(self, states: Tensor) -> list[Tensor]:
        """(N, D) final states -> the keys of each document cache, (N, D_e): those of every expert, the first
        being ``key_states``."""
        return [self.key_states(states)]

    def _scaled(self, states: Tensor) -> Tensor:
        """Input of the head, (..., D)."""
        return states if self.logit_scale == 1.0 else states * self.logit_scale

    @torch.no_grad()
    def fold_logit_scale(self) -> None:
        """Move ``logit_scale`` into the weights, for programs that do not know it."""
        self._scaled_weight().mul_(self.logit_scale)
        self.logit_scale = 1.0

    def _scaled_weight(self) -> Tensor:
        """A weight that scales the logits and nothing else."""
        return self.head_weight

    @abstractmethod
    def activation_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """Estimate of what a training step keeps for its backward pass, in bytes.

        Args:
            value_bytes: size of a value in the type that matrix products run in, 4 or 2.
        """

    @abstractmethod
    def reading_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """Estimate of the most that ``hidden`` holds at a time without gradients, in bytes."""

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters with their names, by their role for the optimizer, each exactly once.

        "embeddings": tables looked up by token. "head": the LM head; where it is the embedding table
        itself, the table counts as embeddings. "matrices": weights of linear layers. "adapters": low-rank
        adapters. "other": the rest.
        """
        embeddings = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}
        matrices = {id(module.weight) for module in self.modules() if isinstance(module, nn.Linear)}
        adapted = [module for module in self.modules() if isinstance(module, AdaptedLinear)]
        adapters = {id(factor) for layer in adapted for factor in (layer.lora_A, layer.lora_B)}
        head = id(self.head_weight)
        groups: dict[str, list[tuple[str, nn.Parameter]]]
        groups = {"matrices": [], "embeddings": [], "head": [], "adapters": [], "other": []}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            key = id(parameter)
            if key in embeddings:
                role = "embeddings"
            elif key == head:
                role = "head"
            elif key in adapters:
                role = "adapters"
            else:
                role = "matrices" if key in matrices else "other"
            groups[role].append((name, parameter))
        return groups


@dataclass(frozen=True)
class Batch:
    """Training blocks, and their places in the run."""

    inputs: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64, IGNORE where there is nothing to predict."""
    positions: Sequence[int]
    """Place of each block in the run's order. With the seed they fix every random choice of a loss."""


@dataclass(frozen=True)
class Loss:
    """Sums over the valid targets of a batch, times the scale that was asked for."""

    total: Tensor
    """Scalar; it is minimised."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars by name, for the records; empty where there is nothing but the total."""


@dataclass(frozen=True)
class FrozenBase:
    """The trained model that an expert's own training builds on."""

    kind: str
    path: str | None
    """Its checkpoint; None: the one of this kind in the checkpoint folder."""
    setting: str
    """``section.key`` of ``path``."""
    option: str
    """The option of ``pretrain`` that gives ``path``."""
    at_every_step: bool
    """Its states are targets: resuming needs it too, and its context must be as long as the expert's."""


class Expert(LanguageModel):
    """A model that is trained by itself and that NanoThink combines with others.

    A kind of expert is a subclass and its entry in ``models.EXPERTS``, with a section of ``Config`` if it has
    settings of its own. The methods below are what kinds differ in beside the model itself.
    """

    @classmethod
    @abstractmethod
    def build(cls, config: Config, vocab_size: int) -> Expert:
        """A freshly initialised one, on the CPU. Its weights follow torch's global seed."""

    @classmethod
    def settle(cls, config: Config, device: torch.device) -> tuple[Config, str]:
        """The settings with every choice made that they leave to this machine, and a line about it, or ""."""
        return config, ""

    @classmethod
    def runnable(cls, config: Config, device: torch.device) -> Config:
        """The settings of a trained one with every choice undone that this machine cannot follow."""
        return config

    @classmethod
    def base(cls, config: Config) -> FrozenBase | None:
        """The model that its training builds on; None: it learns from text alone."""
        return None

    def adopt(self, base: LanguageModel, targets: Tensor) -> None:
        """Start from ``base``; called once, before the first step.

        From the weights of a model of the same kind and shape, unless a kind has another ``base``. A table of
        positions may be longer there.

        Args:
            targets: (B, T), a sample of the training targets.
        """
        mine = self.state_dict()
        with torch.no_grad():
            for name, weight in base.state_dict().items():
                mine[name].copy_(weight[: mine[name].shape[0]])

    def training_loss(
        self, batch: Batch, scale: float, *, seed: int, base: LanguageModel | None = None
    ) -> Loss:
        """The loss that its training minimises: ``scale`` times sums over valid targets.

        Args:
            seed: the run's, for random choices.
            base: the model that it builds on, if that is needed at every step.
        """
        return Loss(self.loss(batch.inputs, batch.targets, scale=scale))

    def foreign_config(self) -> dict[str, Any]:
        """Keyword arguments of the class of ``transformers`` that has the same weights under the same names.

        With ``architectures`` and ``model_type``; empty if there is no such class.
        """
        return {}
