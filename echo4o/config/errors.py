"""The one error of this package."""


class ConfigError(ValueError):
    """A setting is wrong. The message says what was found, what was expected, and the fix."""
