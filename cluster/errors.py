"""The errors a user can meet.

    LexshardError                 anything below; the command line prints its message and exits with status 2
    ├── SettingError              a setting is unknown, of the wrong type or cannot be honoured (also a ValueError)
    ├── DataError                 session data is missing, damaged or of the wrong shape       (also a ValueError)
    ├── KeyNotFound               a key is not in the vocabulary                               (also a KeyError)
    ├── CheckpointError           a checkpoint is damaged, foreign or does not fit the run
    ├── ArtifactError             a served artifact is damaged, hostile or does not fit
    ├── ShardLost                 a part of the index that another process holds does not answer
    ├── InstallationError         the installed packages do not work together
    └── LaunchError               workers could not be started, or failed more often than allowed

Every message names what is wrong (file, row, key or setting) and the way out.
"""

from __future__ import annotations


class LexshardError(Exception):
    """Base of every error that is the user's or the environment's, never a bug of ours."""


class SettingError(LexshardError, ValueError):
    """A setting is unknown, has the wrong type, or cannot be honoured."""

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"setting {path}: {problem}")


class DataError(LexshardError, ValueError):
    """Session data is missing, damaged or of the wrong shape.

    `file`, `row_group` (index inside the file) and `row` (index inside the row group) are part of the message where
    they are known.
    """

    def __init__(
        self, problem: str, *, file: str | None = None, row_group: int | None = None, row: int | None = None
    ) -> None:
        self.problem = problem
        self.file = file
        self.row_group = row_group
        self.row = row
        where = [f"{name} {value}" for name, value in (("row group", row_group), ("row", row)) if value is not None]
        prefix = ", ".join(([file] if file else []) + where)
        super().__init__(f"{prefix}: {problem}" if prefix else problem)


class KeyNotFound(LexshardError, KeyError):
    """A key is not in the vocabulary."""

    def __init__(self, key: object, table: str) -> None:
        self.key = key
        self.table = table
        super().__init__(f"key {key!r} is not in the {table} vocabulary")

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0])


class CheckpointError(LexshardError):
    """A checkpoint is damaged, foreign, or does not fit the run that wants to load it."""


class ArtifactError(LexshardError):
    """A served artifact is damaged, hostile, or does not fit what is asked of it."""


class ShardLost(LexshardError):
    """A part of the index that another process holds does not answer; it is asked again when it does."""


class InstallationError(LexshardError):
    """The installed packages do not work together; the message prints the command that mends it."""


class LaunchError(LexshardError):
    """Workers could not be started, or failed more often than allowed."""
