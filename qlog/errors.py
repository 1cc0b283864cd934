"""The one exception type that a user is meant to read."""


class ConfigError(ValueError):
    """A setting, a file or a device layout that qlog cannot work with.

    The message is one sentence that names the field, its value and the remedy;
    `qlog.command_line` prints it without a traceback and exits with status 2.
    """
