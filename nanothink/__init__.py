"""NanoThink: a small language model of your own, from a folder of JSONL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanothink.config import Config as Config
    from nanothink.runs.trained_model import load as load

__version__ = "0.1.0"
__all__ = ["Config", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``import nanothink`` and ``nanothink --help`` stay instant."""
    if name == "load":
        from nanothink.runs.trained_model import load

        return load
    if name == "Config":
        from nanothink.config import Config

        return Config
    raise AttributeError(f"module 'nanothink' has no attribute '{name}'")
