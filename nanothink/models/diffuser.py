"""The diffuser expert: denoises representations of a frozen transformer, position by position.

For position i the *clean target* y is the row of token i+1 in the frozen transformer's LM head,
RMS-normalised and standardised; its row in the embedding table, or the hidden state, are a setting. A
causal *context encoder*, transformer blocks over the tokens up to i, gives z; a *denoiser* (denoiser.py)
predicts y from x_t, z and the noise level t, with self-conditioning as a setting (after Chen et al. 2023). No
position sees the target of another, noised or clean, so the model is causal by construction.

As a language model its distribution is that of its LM head on the denoiser's last state, from the null
noise x_N = 0 at the last level, in one evaluation: exact, and what loss, perplexity and generation use.
The head's cross-entropy is part of the loss (the rounding loss of Diffusion-LM, Li et al. 2022, section
4.2). Text can also be sampled by DDIM from drawn noise.

It differs from MAR (Li et al. 2024) in predicting the velocity (or the clean target), in causal attention
over tokens, and in the null noise.

Shapes: B batch, T time, D model width, V vocabulary, N noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanothink.config import Config, DiffuserConfig, ModelConfig, TransformerConfig
from nanothink.data.tokens import IGNORE
from nanothink.errors import UsageError
from nanothink.models import decoding
from nanothink.models.contract import Batch, Expert, FrozenBase, LanguageModel, Loss, State
from nanothink.models.decoding_states import Ddim, DiffuserState
from nanothink.models.denoiser import Condition, Denoiser
from nanothink.models.layers import linear
from nanothink.models.loss import CHUNK_ROWS, linear_cross_entropy
from nanothink.models.noise import (
    Draws,
    clean_from_velocity,
    cosine_alpha_bars,
    ddim_levels,
    ddim_step,
    diffuse,
    sampling_noise,
    squared_error,
)
from nanothink.models.precision import matmul_dtype
from nanothink.models.transformer import Decoder, block_reading_bytes, inner_width, shape_inner_width

if TYPE_CHECKING:
    from nanothink.models.decoding.steps import Step

_SMALLEST_SCALE = 1e-3  # features that hardly vary are not amplified


class Diffuser(Expert):
    """See the head of this file.

    A new one has no targets yet: ``adopt`` takes them from a transformer, and checkpoints contain them.

    Args:
        vocab_size: V.
        model: width and context.
        blocks: heads, feed-forward and rotary base of the encoder's blocks.
        shape: layers, denoiser, noise levels, target, objective.
    """

    kind: ClassVar[str] = "diffuser"
    lm_head: nn.Linear
    context_length: int
    target_table: Tensor
    target_mean: Tensor
    target_scale: Tensor
    alpha_bars: Tensor

    def __init__(
        self, vocab_size: int, model: ModelConfig, blocks: TransformerConfig, shape: DiffuserConfig
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.d_model = width = model.d_model
        self.context_length = model.max_seq_len
        self.shape = shape
        self.inner = shape_inner_width(width, blocks)
        self.encoder = Decoder(
            vocab_size, model, blocks, n_layers=shape.n_layers, std=1.0, dropout=self.dropout
        )
        self.denoiser = Denoiser(
            width,
            shape.denoiser_layers,
            inner_width(width, shape.denoiser_mult),
            shape.training_steps,
            guided=shape.self_conditioning > 0,
            dropout=self.dropout,
        )
        self.lm_head = linear(width, vocab_size, zero=True)
        looked_up = vocab_size if shape.target != "hidden_state" else 0
        self.register_buffer("target_table", torch.zeros(looked_up, width))
        self.register_buffer("target_mean", torch.zeros(width))
        self.register_buffer("target_scale", torch.ones(width))
        alpha_bars = cosine_alpha_bars(shape.training_steps).float()  # (N + 1,)
        self.register_buffer("alpha_bars", alpha_bars, persistent=False)

    @classmethod
    def build(cls, config: Config, vocab_size: int) -> Diffuser:
        """See ``Expert.build``."""
        return cls(vocab_size, config.model, config.transformer, config.diffuser)

    @classmethod
    def settle(cls, config: Config, device: torch.device) -> tuple[Config, str]:
        """See ``Expert.settle``: the path of its transformer, from any folder."""
        named = config.diffuser.transformer
        if named is None:
            return config, ""
        shape = config.diffuser.model_copy(update={"transformer": str(Path(named).resolve())})
        return config.model_copy(update={"diffuser": shape}), ""

    @classmethod
    def base(cls, config: Config) -> FrozenBase:
        """See ``Expert.base``: a transformer, from which its targets come."""
        shape = config.diffuser
        return FrozenBase(
            "transformer",
            path=shape.transformer,
            setting="diffuser.transformer",
            option="--transformer",
            at_every_step=shape.target == "hidden_state",
        )

    @property
    def embedding(self) -> nn.Embedding:
        """See ``LanguageModel.embedding``."""
        return self.encoder.embed_tokens

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See ``LanguageModel.blocks``."""
        return [*self.encoder.layers, *self.denoiser.mlps]

    @torch.no_grad()
    def adopt(self, base: LanguageModel, targets: Tensor) -> None:
        """See ``Expert.adopt``: take over embeddings and targets, with the targets' mean and spread.

        Args:
            base: a frozen transformer of the same vocabulary and width.
            targets: (B, T), over which mean and spread are taken, IGNORE left out.
        """
        self.embedding.weight.copy_(base.embedding.weight)
        valid = targets != IGNORE
        if self.shape.target == "hidden_state":
            sample = base.hidden(targets.clamp_min(0))[valid]
        else:
            table = base.embedding.weight
            if self.shape.target == "head_row":
                table = base.head_weight
                table = table - table.mean(0)
            table = F.rms_norm(table, (self.d_model,))
            sample = table[targets[valid]]
        self.target_mean.copy_(sample.mean(0))
        self.target_scale.copy_(sample.std(0).clamp_min(_SMALLEST_SCALE))
        if self.shape.target != "hidden_state":
            self.target_table.copy_((table - self.target_mean) / self.target_scale)

    @torch.no_grad()
    def clean_targets(self, targets: Tensor, transformer: LanguageModel | None = None) -> Tensor:
        """(B, T) tokens that follow -> (B, T, D) clean targets; where the token is IGNORE they mean nothing.

        Args:
            targets: token i+1 at position i.
            transformer: needed where the target is its hidden state: position i's is the state that has read
                tokens 1 to i+1.
        """
        known = targets.clamp_min(0)
        if self.shape.target != "hidden_state":
            return F.embedding(known, self.target_table)
        if transformer is None:
            raise UsageError(
                "this diffuser's targets are hidden states of its transformer, which is needed to make them"
            )
        return (transformer.hidden(known) - self.target_mean) / self.target_scale

    def condition(self, states: Tensor) -> Condition:
        """Condition of the denoiser on (..., D) states of the encoder."""
        return self.denoiser.condition(states.to(matmul_dtype(states)))

    def denoise(
        self, condition: Condition, noisy: Tensor | None, levels: Tensor | int, guess: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One evaluation of the denoiser; see ``Denoiser.forward``.

        Returns:
            The guess at the clean target, and the state that the head reads, (..., D) float32 each.
        """
        predicted, hidden = self.denoiser(condition, noisy, levels, guess)
        if self.shape.prediction == "velocity":
            alpha_bar = self.alpha_bars[levels].unsqueeze(-1)
            null = predicted.new_zeros(()) if noisy is None else noisy
            predicted = clean_from_velocity(null, predicted, alpha_bar)
        return predicted, hidden

    def denoise_by_ddim(
        self, condition: Condition, noisy: Tensor, level: int, n_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Denoise x from ``level`` to level 0 in at most ``n_steps`` evaluations.

        With self-conditioning all but the first see the guess from pure noise, as in training. With a later
        guess in its place, fewer tokens were right at every further step (docs/log.md).

        Returns:
            The last guess at the clean target, and the state of that evaluation, (..., D) float32 each.
        """
        visited = ddim_levels(level, min(n_steps, level))
        from_pure: Tensor | None = None
        for current, following in zip(visited, [*visited[1:], 0], strict=True):
            guess, hidden = self.denoise(condition, noisy, current, from_pure)
            if current == self.shape.training_steps:
                from_pure = guess
            noisy = ddim_step(noisy, guess, self.alpha_bars[current], self.alpha_bars[following])
        return guess, hidden

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64, T <= context_length -> (B, T, D) float32: the denoiser's from null noise."""
        return self.denoise(self.condition(self.encoder(tokens)), None, self.shape.training_steps)[1]

    def start(self, batch_size: int, ddim: Ddim | None = None) -> DiffuserState:
        """An empty decoding state; with ``ddim``, steps give the logits at the end of DDIM sampling."""
        state = DiffuserState(len(self.encoder.layers), batch_size, self.context_length)
        if ddim is not None:
            if not 1 <= ddim.n_steps <= self.shape.training_steps:
                raise UsageError(
                    f"DDIM in {ddim.n_steps} steps: this diffuser has {self.shape.training_steps} noise "
                    "levels; use 1 to as many steps"
                )
            state.ddim = ddim
        return state

    def read(self, tokens: Tensor, state: State, *, last_only: bool = False) -> Tensor:
        """See ``LanguageModel.read``."""
        assert isinstance(state, DiffuserState)
        if (step := self._step_for(tokens, state)) is not None:
            states = step.read(tokens, state.lengths)
            state.advance(tokens.shape[1])
            return states[:, -1:] if last_only else states
        encoded = self.encoder.read(tokens, state, last_only=last_only)
        with torch.no_grad():
            condition = self.condition(encoded)
            if state.ddim is None:
                return self.denoise(condition, None, self.shape.training_steps)[1]
            noise = sampling_noise(state.ddim.seeds, state.lengths, encoded)
            return self.denoise_by_ddim(condition, noise, self.shape.training_steps, state.ddim.n_steps)[1]

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """See ``LanguageModel.step``."""
        assert isinstance(state, DiffuserState)
        step = self._step_for(tokens, state, self.head_weight)
        if step is None:
            return super().step(tokens, state)
        logits = self._scaled(step.predict(tokens, state.lengths))
        state.advance(tokens.shape[1])
        return logits

    def _step_for(self, tokens: Tensor, state: DiffuserState, head: Tensor | None = None) -> Step | None:
        """The program for these tokens, with logits if there is a head; None where there is none."""
        if state.ddim is not None:
            return None  # the encoder's own is found further down

        def build() -> Step | None:
            from nanothink.models.decoding.steps import diffuser_step

            return diffuser_step(self, state, tokens.shape[1], head)

        return decoding.step_for(state, tokens, self.embedding.weight, head, build)

    def training_loss(
        self, batch: Batch, scale: float, *, seed: int, base: LanguageModel | None = None
    ) -> Loss:
        """See ``Expert.training_loss``: squared errors of the clean target, and cross-entropy of the head.

        Total = mse_weight (mse_pure + mse_noised) + cross_entropy_weight (cross_entropy + rounding / every),
        with the parts of ``denoising_losses``. At cross_entropy_weight 0 the head's part stays in with weight
        1, but reaches the head alone.
        """
        shape = self.shape
        draws = Draws.make(
            seed,
            batch.positions,
            batch.inputs.shape[1],
            self.d_model,
            n_levels=shape.training_steps,
            null_fraction=shape.null_fraction,
            guided_fraction=shape.self_conditioning,
            device=batch.inputs.device,
        )
        clean = self.clean_targets(batch.targets, base)
        parts = self.denoising_losses(batch.inputs, batch.targets, clean, draws, scale)
        total = shape.mse_weight * (parts["mse_pure"] + parts["mse_noised"])
        of_head = parts["cross_entropy"]
        if "rounding" in parts:
            of_head = of_head + parts["rounding"] / shape.rounding_every
        total = total + (shape.cross_entropy_weight or 1.0) * of_head
        return Loss(total, {name: part.detach() for name, part in parts.items()})

    def denoising_losses(
        self, inputs: Tensor, targets: Tensor, clean: Tensor, draws: Draws, scale: float
    ) -> Mapping[str, Tensor]:
        """The parts of the loss: sums over the targets that are not IGNORE, times ``scale``.

        Args:
            inputs: (B, T) tokens.
            targets: (B, T), the next tokens.
            clean: (B, T, D), their clean targets.
            draws: the random choices for these blocks.
            scale: such as 1 / number of targets for means.

        Returns:
            ``mse_pure``: squared error of the guess from pure noise, mean over the D features.
            ``mse_noised``: the same at a random level, of what the network predicts there: the clean
            target or the velocity. ``cross_entropy``: of the head on the states of the former, in nats.
            ``rounding``: of the head on those of the latter, at every ``rounding_every``-th token. Where only
            some blocks or tokens have a part, it is scaled up to stand for all.
        """
        shape, last = self.shape, self.shape.training_steps
        condition = self.condition(self.encoder(inputs))
        valid = targets != IGNORE
        if shape.evaluations == 1:
            return self._one_evaluation(condition, targets, clean, draws, scale)
        pure = draws.pure if shape.null_fraction < 1 else None
        guess, states = self.denoise(condition, pure, last)
        noisy = diffuse(clean, draws.noise, self.alpha_bars[draws.levels].unsqueeze(-1))
        earlier = guess.detach() * draws.guided if shape.self_conditioning > 0 else None
        second, rounding_states = self.denoise(condition, noisy, draws.levels, earlier)
        parts = {
            "cross_entropy": self._cross_entropy(states, targets, scale),
            "mse_pure": squared_error(guess, clean, valid, scale),
            "mse_noised": self._noised_error(second, clean, draws.levels, valid, scale),
        }
        if shape.rounding_every:
            every, length = shape.rounding_every, targets.shape[1]
            chosen = torch.arange(0, length, every, device=targets.device)  # (T / every,)
            chosen = (draws.offset.unsqueeze(1) + chosen) % length  # (B, T / every)
            picked = rounding_states.gather(1, chosen.unsqueeze(-1).expand(-1, -1, self.d_model))
            stands_for = length / chosen.shape[1]  # ``every``, where that divides the length
            parts["rounding"] = self._cross_entropy(picked, targets.gather(1, chosen), scale * stands_for)
        return parts

    def _one_evaluation(
        self, condition: Condition, targets: Tensor, clean: Tensor, draws: Draws, scale: float
    ) -> Mapping[str, Tensor]:
        """Half of the blocks from pure noise, half at random levels; each counts twice."""
        pure = draws.split.view(-1, 1)  # (B, 1)
        levels = torch.where(pure, self.shape.training_steps, draws.levels)
        noisy = diffuse(clean, draws.noise, self.alpha_bars[levels].unsqueeze(-1))
        noisy = torch.where(pure.unsqueeze(-1), draws.pure, noisy)
        guess, states = self.denoise(condition, noisy, levels)
        here = torch.where(pure, targets, IGNORE)
        there = torch.where(pure, IGNORE, targets)
        parts = {
            "cross_entropy": self._cross_entropy(states, here, 2 * scale),
            "mse_pure": squared_error(guess, clean, here != IGNORE, 2 * scale),
            "mse_noised": self._noised_error(guess, clean, draws.levels, there != IGNORE, 2 * scale),
        }
        if self.shape.rounding_every:
            parts["rounding"] = self._cross_entropy(states, there, 2 * scale)
        return parts

    def _noised_error(
        self, guess: Tensor, clean: Tensor, levels: Tensor, valid: Tensor, scale: float
    ) -> Tensor:
        """``squared_error`` of the prediction. A velocity's error is that of the guess divided by 1 − ᾱ."""
        weight: Tensor | float = scale
        if self.shape.prediction == "velocity":
            weight = scale / (1 - self.alpha_bars[levels])  # (B, T)
        return squared_error(guess, clean, valid, weight)

    def _cross_entropy(self, states: Tensor, targets: Tensor, scale: float) -> Tensor:
        if not self.shape.cross_entropy_weight:
            states = states.detach()  # only the head is trained by it
        return linear_cross_entropy(states.flatten(0, 1), self.head_weight, targets.flatten(), scale=scale)

    def activation_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.activation_bytes``; the factors were counted with saved-tensor hooks."""
        width, inner = self.d_model, self.inner
        per_width, per_inner = (41, 8) if value_bytes == 4 else (24, 4)
        in_flight = value_bytes * (4 * width + 3 * inner)  # gradients of the block being worked on
        encoder = len(self.encoder.layers) * (per_width * width + per_inner * inner) + 12 * width
        denoiser = self.shape.evaluations * self.denoiser.activation_bytes(value_bytes)
        denoiser += 40 * width  # targets, noise and what is shared by the evaluations
        head = self.vocab_size * (4 * width + CHUNK_ROWS * 8)  # the head's gradient and one chunk of logits
        return batch_size * length * (encoder + denoiser + in_flight) + head

    def reading_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.reading_bytes``; the factors were counted by torch's profiler."""
        denoiser, by_level = self.denoiser.reading_bytes(value_bytes)
        per_token = max(block_reading_bytes(self.d_model, self.inner, value_bytes), denoiser)
        return batch_size * length * per_token + by_level
