"""Which of the API's words a server knows: found out by its refusals, and remembered for the run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

#: Statuses of a request that the server does not understand.
NOT_UNDERSTOOD = (400, 415, 422, 501)


@dataclass(frozen=True)
class Speech:
    """How one request is worded.

    Attributes:
        schema: the reply is held to the answer's JSON schema; else it is only asked for in words.
        new_cap: ``max_completion_tokens`` instead of ``max_tokens``, as reasoning models want it.
        cold: temperature 0; some models take no temperature at all.
    """

    schema: bool = True
    new_cap: bool = False
    cold: bool = True

    def arguments(self, schema: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
        """Keywords of a chat completion."""
        arguments: dict[str, Any] = {"max_completion_tokens" if self.new_cap else "max_tokens": max_tokens}
        if self.cold:
            arguments["temperature"] = 0.0
        if self.schema:
            named = {"name": "answer", "strict": True, "schema": dict(schema)}
            arguments["response_format"] = {"type": "json_schema", "json_schema": named}
        return arguments

    def simpler(self, error: Exception) -> Speech | None:
        """The same without what the server has just refused; None if that was something else."""
        if getattr(error, "status_code", None) not in NOT_UNDERSTOOD:
            return None
        text = f"{getattr(error, 'param', '')} {getattr(error, 'message', '')}".lower()
        if not self.new_cap and "max_tokens" in text and "max_completion_tokens" in text:
            return replace(self, new_cap=True)
        if self.cold and "temperature" in text:
            return replace(self, cold=False)
        # Servers word it in many ways, or not at all: without the schema a request that is wrong stays wrong.
        return replace(self, schema=False) if self.schema else None


class Dialect:
    """What a server has understood so far; shared by all workers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._speech, self._takes_schemas = Speech(), False

    def speech(self) -> Speech:
        with self._lock:
            return self._speech

    def understood(self, speech: Speech) -> None:
        """Remember what has worked. A server that has taken a schema once takes schemas: it was something else then."""
        with self._lock:
            self._takes_schemas |= speech.schema
            self._speech = replace(speech, schema=speech.schema or self._takes_schemas)

    @property
    def notes(self) -> list[str]:
        """What differs from temperature 0 and answers held to a schema."""
        speech = self.speech()
        notes = [] if speech.cold else ["the model takes no temperature: replies are drawn at its own"]
        return notes + ([] if speech.schema else ["the server holds replies to no schema: they are asked for in words"])
