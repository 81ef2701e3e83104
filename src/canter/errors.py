"""Errors that a user can cause, which the command line prints as one message. Any other exception is a bug."""

from canter.redaction import redacted


class CanterError(Exception):
    """Base of Canter's errors.

    The message names the file, line and value, and the remedy; passwords, signatures and tokens are removed from URLs.
    """

    def __init__(self, *arguments: object):
        super().__init__(*(redacted(one) if isinstance(one, str) else one for one in arguments))


class ManifestError(CanterError, ValueError):
    """A manifest or index that cannot be used."""


class AudioError(CanterError, ValueError):
    """An audio file that cannot be decoded."""


class BudgetError(CanterError, ValueError):
    """A budget that is malformed, or was measured for another model or setting."""


class PlanError(CanterError, ValueError):
    """A plan that cannot be made, or a position that belongs to another plan."""


class CheckpointError(CanterError, ValueError):
    """A model or training state that cannot be read or does not fit."""


class ConfigError(CanterError, ValueError):
    """A configuration with an unknown, missing or impossible setting."""
