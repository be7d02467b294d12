"""What can go wrong, as one class per cause and one exit code per class.

Every message is one line: what was wrong, the value, the limit, what to do.
"""


class EngineError(Exception):
    """Base of every error that the engine raises on purpose."""

    exit_code = 1


class UsageError(EngineError):
    """The request contradicts itself or names something that does not exist."""

    exit_code = 2


class BudgetError(EngineError):
    """The plan does not fit the memory, VRAM or disk that it may use."""

    exit_code = 3


class AlignmentError(EngineError):
    """A tile, halo or shard does not sit on the grid that a stage demands."""

    exit_code = 3


class InputError(EngineError):
    """A photograph, picture or store that cannot be read or used."""

    exit_code = 4


class ModelError(InputError):
    """A model file or checkpoint that is damaged, incomplete or of an unknown architecture."""


class ResumeError(InputError):
    """The output exists and cannot be continued with this plan."""


class RenderError(EngineError):
    """A network produced NaN or infinity: nothing was written for that tile."""


class Interrupted(EngineError):
    """Stopped on request after a whole shard; the same command with --resume goes on."""

    exit_code = 130
