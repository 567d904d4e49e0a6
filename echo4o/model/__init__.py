"""BAGEL in this project's own code; no parallelism in here."""

from echo4o.model.bagel import Bagel, BagelOutput
from echo4o.model.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig

__all__ = ["Bagel", "BagelConfig", "BagelOutput", "LLMConfig", "VAEConfig", "ViTConfig"]
