"""The three ways a run can fail; every message says what, where, the value, and what to do."""


class ConfigError(ValueError):
    """A key of the run's configuration is unknown, has the wrong type, or asks for the impossible."""


class DataError(ValueError):
    """A file or row of the data cannot be used."""


class RunError(RuntimeError):
    """The world failed under a run that was set up rightly: full disk, dead worker, non-finite loss."""


class SamplingError(RunError):
    """Answers are not to be had, or not to be scored. The weights are those of the last step, and can be saved."""
