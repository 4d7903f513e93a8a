"""The mathematics of diffusion, as pure functions of tensors: schedule, conversions, DDIM, and what is drawn.

A clean vector y becomes noisier level by level, 0 (clean) to N (nothing left of it):

    x_t = √ᾱ_t y + √(1 − ᾱ_t) ε,   ε ~ N(0, 1)

ᾱ is the cosine schedule of Nichol & Dhariwal 2021 (section 3.2), the conversions between y, ε and the
velocity v = √ᾱ_t ε − √(1 − ᾱ_t) y are those of Salimans & Ho 2022 (appendix D), the step back is DDIM
(Song et al. 2021, equations 12 and 16). Tests compare all of it with ``diffusers``' schedulers.

What training draws is a function of (seed, position of the block in the run, token) alone, so a resumed run
draws the same again, whatever the batches were.

Shapes: B blocks, T time, D width, N noise levels; ``alpha_bar`` broadcasts against (..., D).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_OFFSET = 0.008  # keeps the first noise level from vanishing (Nichol & Dhariwal 2021, section 3.2)
_LARGEST_BETA = 0.999  # the same section: no singularity at the last level


def cosine_alpha_bars(n_levels: int) -> Tensor:
    """ᾱ of levels 0 to N, (N + 1,) float64: 1 at level 0, nearly 0 at level N."""

    def squared_cosine(t: float) -> float:
        return math.cos((t + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2

    kept = [1.0]
    for level in range(n_levels):
        ratio = squared_cosine((level + 1) / n_levels) / squared_cosine(level / n_levels)
        kept.append(kept[-1] * max(ratio, 1 - _LARGEST_BETA))
    return torch.tensor(kept, dtype=torch.float64)


def diffuse(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t: mean √ᾱ y, variance 1 − ᾱ."""
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise


def noise_from_clean(noisy: Tensor, clean: Tensor, alpha_bar: Tensor) -> Tensor:
    """The ε that, with this y, gave x_t. Needs a level above 0."""
    return (noisy - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()


def velocity(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The velocity v of a clean vector and the noise added to it."""
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean


def clean_from_velocity(noisy: Tensor, v: Tensor, alpha_bar: Tensor) -> Tensor:
    """The y of x_t and v, well-conditioned at every level."""
    return alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * v


def ddim_step(noisy: Tensor, clean: Tensor, alpha_bar: Tensor, next_alpha_bar: Tensor) -> Tensor:
    """Step from x_t and a guess at y to x at a lower level; nothing is drawn (η = 0).

    Args:
        noisy: x_t, at a level above 0.
        clean: the guess.
        alpha_bar: of the level of ``noisy``.
        next_alpha_bar: of the level to go to; 1 gives the guess itself.
    """
    return diffuse(clean, noise_from_clean(noisy, clean, alpha_bar), next_alpha_bar)


def ddim_levels(n_levels: int, n_steps: int) -> list[int]:
    """The levels that sampling in ``n_steps`` evaluations visits, N first, evenly spaced.

    "Trailing" spacing (Lin et al. 2024, section 3.3): it begins at pure noise however few the steps.
    """
    return [round(n_levels - i * n_levels / n_steps) for i in range(n_steps)]


@dataclass(frozen=True)
class Draws:
    """All random choices of a training step, block by block."""

    levels: Tensor
    """(B, T) int64, uniform in 1 .. N."""
    noise: Tensor
    """(B, T, D): added to the clean targets."""
    pure: Tensor
    """(B, T, D): input of the first evaluation: N(0, 1), or 0 (the null noise)."""
    guided: Tensor
    """(B, 1, 1) bool: True if the second evaluation sees the first one's guess."""
    split: Tensor
    """(B,) bool: with one evaluation per step, True if the block's is the one from pure noise."""
    offset: Tensor
    """(B,) int64: first of the tokens at which the head is trained at a random level too."""

    @classmethod
    def make(
        cls,
        seed: int,
        positions: Iterable[int],
        length: int,
        width: int,
        *,
        n_levels: int,
        null_fraction: float,
        guided_fraction: float,
        device: torch.device,
    ) -> Draws:
        """Draws for the blocks at these positions of the run.

        Args:
            seed: the run's.
            positions: of the blocks, counted over the whole run; a repeated block has a new one.
            length: T.
            width: D.
            n_levels: N.
            null_fraction: of blocks whose first evaluation starts from the null noise.
            guided_fraction: of blocks whose second evaluation is self-conditioned.
            device: where the tensors are made; another kind of device draws other numbers.
        """
        rows = []
        for position in positions:
            generator = block_generator(seed, "training noise", position, device)
            # Always the same draws in the same order, so that no setting shifts those of another.
            chances = torch.rand(3, generator=generator, device=device)
            offset = torch.randint(length, (1,), generator=generator, device=device)
            levels = torch.randint(1, n_levels + 1, (length,), generator=generator, device=device)
            noise = torch.randn(length, width, generator=generator, device=device)
            if null_fraction < 1:
                pure = torch.randn(length, width, generator=generator, device=device)
                pure = pure * (chances[0] >= null_fraction)
            else:
                pure = noise.new_zeros(1, 1).expand(length, width)
            rows.append((levels, noise, pure, chances[1] < guided_fraction, chances[2] < 0.5, offset[0]))
        levels, noise, pure, guided, split, offset = (
            torch.stack(column) for column in zip(*rows, strict=True)
        )
        return cls(levels, noise, pure, guided.view(-1, 1, 1), split, offset)


def block_generator(seed: int, purpose: str, number: int, device: torch.device) -> torch.Generator:
    """A generator seeded by (seed, purpose, number)."""
    named = f"{seed}\0{purpose}\0{number}".encode()
    key = int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")
    return torch.Generator(device).manual_seed(key % (1 << 63))


def sampling_noise(seeds: Sequence[int], lengths: Sequence[int], states: Tensor) -> Tensor:
    """(B, T, D) noise for the last T tokens of each sequence: a function of its seed and a token's place.

    Args:
        lengths: of the sequences, these tokens included.
        states: (B, T, D), for shape and device.
    """
    noise = [
        torch.randn(states.shape[-1], generator=generator, device=states.device)
        for seed, length in zip(seeds, lengths, strict=True)
        for place in range(length - states.shape[1] + 1, length + 1)
        for generator in [block_generator(seed, "sampling noise", place, states.device)]
    ]
    return torch.stack(noise).view_as(states)


def squared_error(guess: Tensor, clean: Tensor, valid: Tensor, weight: Tensor | float) -> Tensor:
    """Mean over features, times ``weight``, summed over valid positions."""
    return ((guess - clean).square().mean(-1) * valid * weight).sum()
