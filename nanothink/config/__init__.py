"""Settings: pydantic classes, presets, and where each value came from."""

from nanothink.config.data import DataConfig
from nanothink.config.model import ModelConfig, StateSpaceConfig, TransformerConfig
from nanothink.config.run import Config
from nanothink.config.training import TrainConfig, TrainExpertConfig

__all__ = [
    "Config",
    "DataConfig",
    "ModelConfig",
    "StateSpaceConfig",
    "TrainConfig",
    "TrainExpertConfig",
    "TransformerConfig",
]
