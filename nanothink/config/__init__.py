"""Settings: pydantic classes, presets, and where each value came from."""

from nanothink.config.data import DataConfig
from nanothink.config.model import (
    DiffuserConfig,
    DocumentCacheConfig,
    MLAConfig,
    ModelConfig,
    StateSpaceConfig,
    TransformerConfig,
    VectorStoreConfig,
)
from nanothink.config.run import Config
from nanothink.config.training import (
    DistillationConfig,
    TrainConfig,
    TrainDiffuserConfig,
    TrainExpertConfig,
    TrainMLAConfig,
)
