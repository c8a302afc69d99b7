"""Every error a user can cause. Each child also is the built-in it refines.

A message names the key, shows the value and gives the way out; see `LlmkdError.of`.
"""


class LlmkdError(Exception):
    """Root of all errors llmkd raises on purpose; the command line prints it without a
    traceback.
    """

    @classmethod
    def of(cls, key: str, value: object, problem: str, *ways_out: str) -> "LlmkdError":
        """Build the house form: `key: value`, what is wrong with it, then one line per way out."""
        lines = [f"{key}: {value!r}: {problem}", *(f"  - {way}" for way in ways_out)]
        return cls("\n".join(lines))


class RecipeError(LlmkdError, ValueError):
    """A recipe, a flag or an argument says something that cannot be done."""


class DataError(LlmkdError, ValueError):
    """The data are not what the recipe says they are."""


class MissingFileError(LlmkdError, FileNotFoundError):
    """A path in the recipe leads nowhere."""


class TeacherError(LlmkdError, ValueError):
    """The teacher cannot teach this student (vocabulary, weights)."""


class AnnotatorError(LlmkdError, ValueError):
    """An annotator gave no usable answer (NaN, wrong length, a server that does not answer)."""


class NonFiniteError(LlmkdError, ArithmeticError):
    """Training produced NaN or infinity; the last good checkpoint is still there."""


class RunFolderError(LlmkdError, FileExistsError):
    """The output folder holds something else, or there is no room for the run."""


class HubError(LlmkdError, RuntimeError):
    """The Hub cannot be reached or refuses."""


class MissingExtraError(LlmkdError, ImportError):
    """An optional dependency is needed; the message holds the pip command."""
