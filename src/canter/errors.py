"""What a user can cause. The command line prints these as one message; everything else is a bug."""

from canter.redaction import redacted


class CanterError(Exception):
    """Base of Canter's own errors. The message names the file, line and value, and the way out; URLs in it are without
    their passwords, signatures and tokens."""

    def __init__(self, *arguments: object):
        super().__init__(*(redacted(one) if isinstance(one, str) else one for one in arguments))


class ManifestError(CanterError, ValueError):
    """A manifest or index that cannot be used."""


class AudioError(CanterError, ValueError):
    """An audio file that cannot be decoded."""


class BudgetError(CanterError, ValueError):
    """A budget that is malformed, or was measured on something else."""


class PlanError(CanterError, ValueError):
    """A plan that cannot be made, or a position that belongs to another plan."""


class CheckpointError(CanterError, ValueError):
    """A model or training state that cannot be read or does not fit."""


class ConfigError(CanterError, ValueError):
    """A configuration with an unknown, missing or impossible setting."""
