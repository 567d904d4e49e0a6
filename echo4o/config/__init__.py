"""Every setting of a run: dataclasses, YAML and command line, checks, and what is loaded from where."""

from echo4o.config.arguments import (
    GROUPS,
    DataArguments,
    ModelArguments,
    RunConfig,
    TrainingArguments,
)
from echo4o.config.checks import validate
from echo4o.config.errors import ConfigError
from echo4o.config.lists import split_names, split_rates
from echo4o.config.load_plan import LoadPlan, plan_loading
from echo4o.config.parsing import flag_help, load_config, save_resolved

__all__ = [
    "GROUPS",
    "ConfigError",
    "DataArguments",
    "LoadPlan",
    "ModelArguments",
    "RunConfig",
    "TrainingArguments",
    "flag_help",
    "load_config",
    "plan_loading",
    "save_resolved",
    "split_names",
    "split_rates",
    "validate",
]
