"""The project's own errors. Each message says what is wrong, what was found, what was expected and what to change."""

import contextlib
import os
from collections.abc import Iterator


def add_note(error: BaseException, text: str) -> None:
    """What BaseException.add_note does, which Python 3.10 lacks: there `full_text` alone shows it."""
    error.__notes__ = [*getattr(error, "__notes__", ()), text]


def full_text(error: BaseException) -> str:
    """The message of an error and the notes that were added to it on its way, one below the other."""
    return "\n  ".join([str(error), *getattr(error, "__notes__", ())])


@contextlib.contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around writing to an open file: an OSError inside that names no file, as the kernel does not where the disk is
    full, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


class ConfigError(ValueError):
    """A JSON file, flag or combination of settings is wrong. Lists every problem found, one per line."""


class ContextError(ConfigError):
    """A prompt and the answer asked for do not fit into the model's context."""


class WeightError(ValueError):
    """A weight file is missing, damaged, unsafe, or does not hold exactly the tensors that are needed."""


class DataError(ValueError):
    """A data file, record or image cannot be used; names the file and the record."""


class UnknownKeyError(DataError):
    """A record, turn or message has a key that nothing reads and that may have been meant to change training."""


class TemplateError(DataError):
    """A conversation cannot be rendered, or the tokenizer does not round-trip the template."""


class CheckpointError(ValueError):
    """A training checkpoint cannot be found, read, written or matched to the running model."""


class TrainingError(ValueError):
    """A training step must not go on: non-finite loss, nothing to learn from, no gradient."""


class LostRankError(ValueError):
    """A process of a launch over several ranks is lost, so that the others cannot go on."""
