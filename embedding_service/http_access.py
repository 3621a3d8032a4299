"""Who may ask, and who may change: bearer tokens, compared in constant time and never written anywhere."""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import SettingError
from embedding_service.http_messages import Scope, header
from embedding_service.http_schema import Problem

CHANGE_VARIABLE, READ_VARIABLE = "LEXSHARD_TOKEN", "LEXSHARD_READ_TOKEN"
FEEDBACK_VARIABLE = "LEXSHARD_FEEDBACK_TOKEN"
VARIABLES = frozenset((CHANGE_VARIABLE, READ_VARIABLE, FEEDBACK_VARIABLE))
MIN_LENGTH, MAX_LENGTH = 16, 4096
_CHALLENGE = ((b"www-authenticate", b"Bearer"),)


@dataclass(frozen=True)
class Access:
    """`change`: what endpoints that change something, or tell of exports, ask for; without it they answer nobody.
    `read`: what the others ask for, besides `change`, which opens them too; without it they answer everybody.
    `feedback`: what clicks must be told with, in place of `read`, where clients that read are not trusted to count.
    """

    change: bytes | None = field(default=None, repr=False)
    read: bytes | None = field(default=None, repr=False)
    feedback: bytes | None = field(default=None, repr=False)

    def check_read(self, scope: Scope) -> None:
        """Raises Problem 401."""
        if self.read is not None and not _shows(scope, self.read, self.change):
            raise Problem(401, "token_required", "show the reading token: Authorization: Bearer TOKEN", _CHALLENGE)

    def check_feedback(self, scope: Scope) -> None:
        """Raises Problem 401."""
        if self.feedback is None:
            self.check_read(scope)
        elif not _shows(scope, self.feedback, self.change):
            raise Problem(401, "token_required", "show the feedback token: Authorization: Bearer TOKEN", _CHALLENGE)

    def check_change(self, scope: Scope) -> None:
        """Raises Problem 401, or 403 where the service was started without a token."""
        if self.change is None:
            message = f"changes are switched off: the service was started without serve.token_file or {CHANGE_VARIABLE}"
            raise Problem(403, "changes_off", message)
        if not _shows(scope, self.change):
            raise Problem(401, "token_required", "show the token for changes: Authorization: Bearer TOKEN", _CHALLENGE)


def find_access(token_file: str = "", read_token_file: str = "", feedback_token_file: str = "") -> Access:
    """The tokens of files, or of the environment where no file is named. Raises SettingError, without the token."""
    change = _find(token_file, "serve.token_file", CHANGE_VARIABLE)
    read = _find(read_token_file, "serve.read_token_file", READ_VARIABLE)
    return Access(change, read, _find(feedback_token_file, "serve.feedback_token_file", FEEDBACK_VARIABLE))


def _find(file: str, setting: str, variable: str) -> bytes | None:
    if file:
        try:
            with open(Path(file), "rb") as handle:
                token = handle.read(MAX_LENGTH + 2).strip()
        except OSError as error:
            raise SettingError(setting, f"{file} cannot be read: {error.strerror}") from None
        where = file
    elif os.environ.get(variable):
        token, setting, where = os.environ[variable].encode().strip(), variable, "the environment variable"
    else:
        return None
    if not MIN_LENGTH <= len(token) <= MAX_LENGTH or not token.isascii() or b" " in token or b"\n" in token:
        raise SettingError(setting, f"{where} must hold one word of {MIN_LENGTH} to {MAX_LENGTH} ASCII characters")
    return token


def _shows(scope: Scope, *accepted: bytes | None) -> bool:
    kind, _, given = header(scope, b"authorization").partition(b" ")
    matches = [hmac.compare_digest(given.strip(), token) for token in accepted if token is not None]
    return kind.lower() == b"bearer" and any(matches)
