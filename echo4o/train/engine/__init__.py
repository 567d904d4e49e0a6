"""Engines: what runs the model. One process today; sharded ones implement the same protocol."""

from echo4o.train.engine.protocol import Engine
from echo4o.train.engine.single import SingleProcessEngine

__all__ = ["Engine", "SingleProcessEngine"]
