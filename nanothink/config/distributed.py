"""Settings of a run of several processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from nanothink.config.base import Settings


class DistributedConfig(Settings):
    """Placement of parameters, gradients and moments. One process alone has all of them."""

    shard: Literal["full", "none"] = "full"
    """'full': each process keeps its share of parameters, gradients and moments. 'none': each keeps all; less
    is sent, and nothing is saved in memory."""

    @field_validator("shard", mode="before")
    @classmethod
    def _none_is_a_name_here(cls, value: Any) -> Any:
        return "none" if value is None else value  # --set reads none as no value
