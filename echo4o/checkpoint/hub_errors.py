"""What went wrong between here and the Hugging Face hub, in words that name the fix and never hold a token."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from collections.abc import Iterator

#: Statuses of a server that may answer the same request later.
BUSY = (408, 429, 500, 502, 503, 504)
_TOKEN = re.compile(r"(hf_|Bearer\s+|oauth_)[\w.=+/-]{6,}")
#: Loggers that tell of each request, at some level with what the server answers.
_CHATTY = ("httpx", "httpx2", "httpcore", "httpcore2", "filelock")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def without_token(text: str, token: str | None = None) -> str:
    """`text` with what is, or looks like, an access token replaced."""
    if token:
        text = text.replace(token, "(token)")
    return _TOKEN.sub("(token)", text)


def holds_token(text: str) -> bool:
    """Whether a text that is to be published holds what looks like the hub's access token."""
    return re.search(r"\bhf_[A-Za-z0-9]{20,}", text) is not None


def is_unreachable(error: BaseException) -> bool:
    """Whether no answer came: no network, a name that is not resolved, a connection cut, or offline mode."""
    names = {kind.__name__ for kind in type(error).__mro__}
    # Of httpx or httpx2, whichever the hub's library uses.
    return isinstance(error, ConnectionError) or "TransportError" in names


def status_of(error: BaseException) -> int | None:
    """The HTTP status, if there was an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    cause = first_cause(error)
    return is_unreachable(cause) or status_of(cause) in BUSY


def is_of_the_hub(error: BaseException) -> bool:
    """Whether an error comes of a transfer, and not of a fault in our code."""
    cause = first_cause(error)
    return status_of(cause) is not None or is_unreachable(cause) or isinstance(cause, OSError)


def first_cause(error: BaseException) -> BaseException:
    """The answer or the break of the connection behind an error of the hub's library; itself if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if status_of(cause) is not None or is_unreachable(cause):
            return cause
        cause = cause.__cause__
    return error


def in_words(error: BaseException, name: str, revision: str | None = None, *, to_write: bool = False) -> str:
    """What happened to a call about the repository `name`, and what to do.

    Args:
        to_write: the call wanted to write.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    token, status = get_token(), status_of(error)
    reason = without_token(_first_line(error), token)
    if isinstance(error, GatedRepoError):
        how = "with an account that has accepted them" if token else f"and {_LOG_IN}"
        return f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name} {how}"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no branch, tag or commit {revision or 'main'}: see {constants.ENDPOINT}/{name}/tree/main"
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and to_write and not token):
        return f"the hub asks who you are: {_LOG_IN} (a token that may write)"
    if isinstance(error, RepositoryNotFoundError) or (status == 401 and not token):
        private = "your token may not read it" if token else f"it is private: then {_LOG_IN}"
        return f"the hub has no model {name}, or {private}. Check the spelling (owner/name)"
    if status == 401:
        return f"the hub does not accept your token (wrong or expired): {_LOG_IN}"
    if status == 403:
        right = "write to" if to_write else "read"
        return f"your token may not {right} {name}: use one with that right, for this owner ({reason})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: make room in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on another disk"
    if isinstance(error, LocalEntryNotFoundError) or is_unreachable(error):
        kept = "" if to_write else f", and the cache {constants.HF_HUB_CACHE} does not hold all of {name}"
        return f"the hub {constants.ENDPOINT} cannot be reached{kept}. Check the network, proxy and HF_HUB_OFFLINE"
    if status in BUSY:
        return f"the hub answers with status {status}: try again later; what has been transferred is kept"
    return f"the hub's answer about {name}: {reason}"


@contextlib.contextmanager
def quiet_requests() -> Iterator[None]:
    """No line a request in the log, whose addresses may be signed."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
