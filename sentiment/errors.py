"""Errors whose message is one sentence for the user: what is wrong, and what to do about it."""


class ProjectError(Exception):
    """Something the user can mend. A stage prints the message alone, and keeps the trace for the log file."""


class ParamsError(ProjectError):
    """params.yaml holds an unknown key, a wrong type or a value out of range."""


class DataError(ProjectError):
    """A source or a table cannot be read, or does not hold what the parameters say."""


class CheckpointError(ProjectError):
    """A checkpoint or a model folder cannot be loaded."""


class TrainingError(ProjectError):
    """Training cannot go on, or cannot start on this device."""


class RegistryError(ProjectError):
    """Git, the tags or the cache do not hold what was asked of them."""


class TuneError(ProjectError):
    """A search for parameters cannot begin or cannot go on."""
