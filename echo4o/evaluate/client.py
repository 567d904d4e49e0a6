"""Calls to a judge: any server that speaks OpenAI's chat completions, through the official `openai` client.

What may pass is tried again, with growing pauses and as long as the server asks for. What cannot pass (a wrong key, an
unknown model, an empty account) ends the run at once. The key is read from the environment, and replaced in all
that a server says.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from echo4o.evaluate.dialect import Dialect
from echo4o.evaluate.pacing import Pace, backoff

logger = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
#: A server that asks for a longer pause gets it from a run that is started again.
MAX_RETRY_AFTER = 600.0
#: Statuses after which the same request may succeed.
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
#: Statuses that every further request would get, too.
FATAL = (401, 402, 403, 404)
_EMPTY_ACCOUNT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated")
_LOOKS_LIKE_KEY = re.compile(r"(?:sk-|Bearer\s+)[\w*.\-]{6,}")


class JudgeError(ValueError):
    """No judging with this server, key or model; the message names the fix and never holds a key."""


class CallFailed(Exception):
    """One question got no reply; `attempts` calls were made."""

    def __init__(self, message: str, attempts: int) -> None:
        super().__init__(message)
        self.attempts = attempts


@dataclass(frozen=True)
class JudgeOptions:
    """Which judge, and how it is called.

    Attributes:
        model: its name as the server knows it; there is no default.
        url: base URL, up to and including ``/v1``.
        key_env: environment variable that holds the key; None: ``OPENAI_API_KEY`` if there is one.
        workers: questions at once.
        requests_per_minute, tokens_per_minute: limits of the account; None for none.
        timeout: seconds for one reply.
        max_attempts: calls for one question.
        backoff: seconds before the second call; doubled from call to call.
    """

    model: str
    url: str = OPENAI_URL
    key_env: str | None = None
    workers: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 180.0
    max_attempts: int = 6
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise JudgeError("name the judge with --judge-model, as exactly as the server knows it")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError("--judge-url must be an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise JudgeError(
                "--judge-url holds more than an address; a key belongs in the environment (--judge-key-env)"
            )
        for name in ("workers", "max_attempts"):
            if getattr(self, name) < 1:
                raise JudgeError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("requests_per_minute", "tokens_per_minute", "timeout", "backoff"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise JudgeError(f"{name} is {value}; it must be above 0")

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def is_openai(self) -> bool:
        return (urlsplit(self.url).hostname or "").endswith("api.openai.com")

    def key(self) -> str | None:
        """From the environment; None for servers that want none.

        Raises:
            JudgeError: if it is missing where one is needed, or cannot be one.
        """
        name = self.key_env or OPENAI_KEY
        key = os.environ.get(name, "").strip()
        if not key:
            if self.key_env or self.is_openai:
                raise JudgeError(f"the environment variable {name} holds no key for {self.host}: export {name}=…")
            return None
        if not re.fullmatch(r"[!-~]+", key):
            raise JudgeError(f"the environment variable {name} holds characters that no key has; set it anew")
        return key


@dataclass(frozen=True)
class Reply:
    """What a judge answered.

    Attributes:
        truncated: cut at `max_tokens`.
        refusal: the judge's words where it would not answer, or the server's reason to withhold them.
        model: the name that the server gives its model.
        attempts: calls that it took.
    """

    text: str
    truncated: bool = False
    refusal: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    model: str = ""
    attempts: int = 1


class JudgeClient:
    """Asks one judge; safe to use from many threads.

    Attributes:
        served_by: names that the server gives its model.

    Raises:
        ImportError: without the ``eval`` extra.
        JudgeError: without a key where one is needed.
    """

    def __init__(self, options: JudgeOptions, stop: threading.Event | None = None) -> None:
        self.options = options
        key = options.key()
        self.pace = Pace(options.requests_per_minute, options.tokens_per_minute, stop)
        self.dialect = Dialect()
        self.served_by: set[str] = set()
        self._openai = _library()
        for name in ("httpx", "httpx2"):  # they tell of each request
            if (chatty := logging.getLogger(name)).level == logging.NOTSET:
                chatty.setLevel(logging.WARNING)
        # Without a key no header either: some servers refuse one that is made up.
        self._headers: Any = None if key else {"Authorization": self._openai.Omit()}
        self._client = self._openai.OpenAI(
            api_key=key or "none", base_url=options.url, timeout=options.timeout, max_retries=0
        )
        self._secret = _Secret(key)

    def ask(
        self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any], max_tokens: int, tokens: float = 0.0
    ) -> Reply:
        """One reply.

        Args:
            schema: of the answer, for servers that hold a reply to it.
            tokens: about what the call will take, for the limit of tokens a minute.

        Raises:
            CallFailed: if this question got no reply.
            JudgeError: if no question will.
            Stopped: if the run is being stopped.
        """
        attempts, tried = 0, 0
        speech = self.dialect.speech()
        while True:
            self.pace.wait(tokens)
            attempts, tried = attempts + 1, tried + 1
            try:
                response = self._client.chat.completions.create(
                    model=self.options.model,
                    messages=list(messages),
                    extra_headers=self._headers,
                    **speech.arguments(schema, max_tokens),
                )  # type: ignore[call-overload]
                reply = self._reply(response, attempts)
            except (self._openai.OpenAIError, ValueError, OSError) as error:
                problem, seconds = self._problem(error)
                if (simpler := speech.simpler(error)) is not None:
                    speech, tried = simpler, tried - 1
                    continue
                self._raise_if_fatal(error, problem)
                if not is_passing(error) or tried >= self.options.max_attempts:
                    raise CallFailed(problem, attempts) from None
                logger.debug("attempt %d: %s", tried, problem)
                if seconds is not None:
                    self.pace.hold(seconds)
                self.pace.sleep(max(seconds or 0.0, backoff(tried, self.options.backoff)))
                continue
            self.dialect.understood(speech)
            if reply.model:
                self.served_by.add(reply.model)
            return reply

    def _reply(self, response: Any, attempts: int) -> Reply:
        """Raises ValueError if the server's answer holds no reply: a gateway's page, say."""
        choice = next(iter(getattr(response, "choices", None) or ()), None)
        message = getattr(choice, "message", None)
        if choice is None or message is None:
            raise ValueError("the server's answer holds no reply")
        usage = getattr(response, "usage", None)
        counts = {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
        refusal = getattr(message, "refusal", None)
        if choice.finish_reason == "content_filter":
            refusal = refusal or "withheld by the server's content filter"
        return Reply(
            text=self._secret.out_of(message.content if isinstance(message.content, str) else ""),
            truncated=choice.finish_reason == "length",
            refusal=self._secret.out_of(refusal) if refusal else None,
            usage={name: count for name, count in counts.items() if isinstance(count, int)},
            model=str(getattr(response, "model", "") or ""),
            attempts=attempts,
        )

    def _problem(self, error: Exception) -> tuple[str, float | None]:
        """What went wrong, without secrets, and for how long the server wants to be left alone."""
        status = getattr(error, "status_code", None)
        kind = type(error).__name__
        text = self._secret.out_of(str(getattr(error, "message", None) or error), also_what_looks_like_one=True)
        text = " ".join(text.split())[:400]
        return f"{kind}{f' {status}' if status else ''}: {text}", retry_after(error)

    def _raise_if_fatal(self, error: Exception, problem: str) -> None:
        """Raises JudgeError for what every further question would meet, too."""
        status, code = getattr(error, "status_code", None), str(getattr(error, "code", "") or "")
        is_empty = any(word in (code, getattr(error, "type", None)) for word in _EMPTY_ACCOUNT)
        name = self.options.key_env or OPENAI_KEY
        fixes = {
            401: f"the server takes no such key; set {name}",
            402: "the account is empty; top it up, or take another judge",
            403: "the key has no right to this; take another key or model",
            404: f"it knows no model {self.options.model!r}, or no chat completions at this address; see --judge-model "
            "and --judge-url (which ends in /v1)",
        }
        seconds = retry_after(error)
        fix = None
        if is_empty:
            fix = fixes[402]
        elif status in FATAL:
            fix = fixes[status]
        elif seconds is not None and seconds > MAX_RETRY_AFTER:
            fix = f"it asks for a pause of {seconds / 60:.0f} minutes; run the same command after it"
        if fix is not None:
            raise JudgeError(f"judge at {self.options.host}: {fix} ({problem}). What is judged stays judged.") from None


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later: also where no answer, or none that can be read, came."""
    status = getattr(error, "status_code", None)
    return status is None or status in PASSING or status >= 500 or status < 400


def retry_after(error: Exception) -> float | None:
    """Seconds that the server asks to wait: ``Retry-After``, as a number or a date, or ``retry-after-ms``."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    if headers is None:
        return None
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(milliseconds) / 1000)
        if (value := headers.get("retry-after")) is None:
            return None
        if re.fullmatch(r"\s*[\d.]+\s*", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


@dataclass(frozen=True)
class _Secret:
    """A key, and texts without it."""

    key: str | None = field(repr=False)

    def out_of(self, text: str, also_what_looks_like_one: bool = False) -> str:
        if self.key and len(self.key) >= 8:  # a shorter one ("EMPTY") is no secret, and may be a word of a reply
            text = text.replace(self.key, "(key)")
        return _LOOKS_LIKE_KEY.sub("(key)", text) if also_what_looks_like_one else text


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError("judging calls a model through the openai package: pip install 'echo4o[eval]'") from error
    return openai
