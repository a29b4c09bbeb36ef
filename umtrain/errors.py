"""Errors a user can cause, each with the exit code the command line ends with.

A message says what is wrong, where (file, row or key), what was expected, and the fix.
"""


class UmtrainError(Exception):
    """Base of every error that is shown without a traceback."""

    exit_code = 1


class ConfigError(UmtrainError):
    """A configuration key, value or combination is wrong."""

    exit_code = 2


class ManifestError(UmtrainError):
    """A manifest, or a row of it, is wrong."""

    exit_code = 2


class DataError(UmtrainError):
    """An image or annotation file is missing, unreadable or lacks what is needed."""

    exit_code = 2


class RunError(UmtrainError):
    """A run directory or checkpoint is missing, damaged or cannot be used."""

    exit_code = 2


class DeviceError(UmtrainError):
    """The machine lacks what the configuration asks of it (GPU, managed memory, disk)."""

    exit_code = 2


class OutOfMemoryError(UmtrainError):
    """Device or host memory ran out; the message names what would fit."""

    exit_code = 3


class RankError(UmtrainError):
    """One of several processes that train together has ended."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end; the text says which, and how to go on."""
