"""Settings: pydantic classes, presets, and where each value came from."""

from nanothink.config.data import DataConfig
from nanothink.config.model import DiffuserConfig, ModelConfig, StateSpaceConfig, TransformerConfig
from nanothink.config.run import Config
from nanothink.config.training import TrainConfig, TrainDiffuserConfig, TrainExpertConfig

__all__ = [
    "Config",
    "DataConfig",
    "DiffuserConfig",
    "ModelConfig",
    "StateSpaceConfig",
    "TrainConfig",
    "TrainDiffuserConfig",
    "TrainExpertConfig",
    "TransformerConfig",
]
