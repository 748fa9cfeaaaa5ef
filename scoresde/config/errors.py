"""What a configuration that cannot be used raises."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line."""
