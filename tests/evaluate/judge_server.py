"""A stand-in of a judge on this machine: OpenAI's chat completions, deterministic answers, and every kind of trouble.

    with JudgeServer() as judge:
        OpenAI(base_url=judge.url, api_key="any").chat.completions.create(...)

Scores come from a hash of everything that was asked, pictures included: the same question always gets the same answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Kind = Literal[
    "delay", "busy", "error", "drop", "reset", "truncate", "markdown", "garbage", "no_json", "empty", "refuse",
    "unauthorized", "unknown_model", "quota", "bad_request",
]  # fmt: skip
STATUS = {"busy": 429, "error": 500, "unauthorized": 401, "unknown_model": 404, "quota": 429, "bad_request": 400}
#: Every name that a rubric of this project asks for.
ALL_NAMES = ("correct", "fantasy_fulfillment", "identity_preservation", "aesthetic_quality", "score", "reason")


@dataclass
class Fault:
    """What happens to requests.

    Attributes:
        times: so many requests; None: all.
        containing: only requests whose text holds this.
        seconds: of a delay, or of Retry-After (None: no such header).
        message: of an error.
    """

    kind: Kind
    times: int | None = 1
    containing: str = ""
    seconds: float | None = None
    message: str = "out of order"


@dataclass(frozen=True)
class Asked:
    """One request as it came.

    Attributes:
        digest: of messages, pictures included, which names the question.
        at: when it came (`time.monotonic`).
    """

    digest: str
    text: str
    model: str
    num_images: int
    max_tokens: int
    has_schema: bool
    temperature: float | None
    at: float


@dataclass
class JudgeServer:
    """Use as a context manager.

    Attributes:
        faults: for the next requests that fit, first come first served.
        weather: share of requests by kind of fault, drawn from the question's hash and how often it came: a retry of
            the same question comes through in the end.
        delay: seconds that every answer takes.
        supports_schema: False: 400 for `response_format`.
        only_new_names: 400 for ``max_tokens`` and for a temperature, as some models do.
        asked: every request; `counts`: how often each question was answered with a reply.
        authorization: how many requests had the header. Its content is kept nowhere.
        echo_authorization: errors quote the header, as careless servers do.
    """

    faults: list[Fault] = field(default_factory=list)
    weather: dict[Kind, float] = field(default_factory=dict)
    delay: float = 0.0
    supports_schema: bool = True
    only_new_names: bool = False
    echo_authorization: bool = False
    answer: Callable[[str], dict[str, Any]] | None = None
    asked: list[Asked] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    authorization: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> JudgeServer:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.judge = self
        threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def times_asked(self, text: str) -> int:
        """Requests whose text holds `text`."""
        return sum(text in one.text for one in self.asked)

    def fault_for(self, asked: Asked) -> Fault | None:
        """The fault of a request, used up."""
        with self._lock:
            for fault in self.faults:
                if fault.times != 0 and fault.containing in asked.text:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
            number = sum(one.digest == asked.digest for one in self.asked)
        place = _share(asked.digest, f"weather {number}")
        for kind, share in self.weather.items():
            if place < share:
                return Fault(kind, seconds=0.05 if kind in ("busy", "delay") else None)
            place -= share
        return None

    @contextlib.contextmanager
    def counted(self):
        """While a request is worked on."""
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def noted(self, asked: Asked) -> None:
        with self._lock:
            self.asked.append(asked)

    def replied(self, asked: Asked) -> None:
        with self._lock:
            self.counts[asked.digest] += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    judge: JudgeServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in one packet: in two, the second waits 40 ms for the first one's receipt.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        judge = self.server.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        authorization = self.headers.get("Authorization")
        judge.authorization["absent" if authorization is None else "present"] += 1
        with judge.counted():
            asked = _asked(body)
            judge.noted(asked)
            self._reply(judge, body, asked, authorization if judge.echo_authorization else None)

    def _reply(self, judge: JudgeServer, body: dict[str, Any], asked: Asked, quoted: str | None) -> None:
        if self.path != "/v1/chat/completions":
            return self._error(404, "no such path", code=None)
        time.sleep(judge.delay)
        fault = judge.fault_for(asked)
        kind = fault.kind if fault else None
        if fault and kind == "delay":
            time.sleep(fault.seconds or 0.0)
        elif fault and kind in ("drop", "reset"):
            return self._hang_up(reset=kind == "reset")
        elif fault and kind in STATUS:
            codes = {"quota": "insufficient_quota", "unknown_model": "model_not_found", "busy": "rate_limit_exceeded"}
            wait = {"Retry-After": f"{fault.seconds:g}"} if kind == "busy" and fault.seconds is not None else {}
            message = f"{fault.message} {quoted}" if quoted else fault.message
            return self._error(STATUS[kind], message, code=codes.get(kind), headers=wait)
        if "response_format" in body and not judge.supports_schema:
            return self._error(400, "response_format is not supported", code=None, param="response_format")
        if judge.only_new_names and "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return self._error(400, message, code="unsupported_parameter", param="max_tokens")
        if judge.only_new_names and body.get("temperature", 1) != 1:
            message = "Unsupported value: 'temperature' does not support 0 with this model."
            return self._error(400, message, code="unsupported_value", param="temperature")
        if kind == "no_json":
            judge.replied(asked)
            return self._send(200, b"<html>a gateway's page</html>", {"Content-Type": "application/json"})
        self._send_completion(judge, body, asked, kind)

    def _send_completion(self, judge: JudgeServer, body: dict[str, Any], asked: Asked, kind: Kind | None) -> None:
        values = judge.answer(asked.text) if judge.answer else answer_of(asked.digest, _schema(body))
        text: str | None = json.dumps(values)
        reason = "stop"
        if kind == "truncate":
            text, reason = (text or "")[: len(text or "") // 2], "length"
        elif kind == "markdown":
            text = "Here is my **verdict**:\n\n```json\n" + json.dumps(values, indent=2) + "\n```\nI hope this helps!"
        elif kind == "garbage":
            text = "I'd rather talk about the weather, which is fine on most days of the week."
        elif kind in ("empty", "refuse"):
            text = None
        message = {
            "role": "assistant",
            "content": text,
            "refusal": "I cannot judge this." if kind == "refuse" else None,
        }
        prompt_tokens = len(asked.text) // 4 + 765 * asked.num_images
        judge.replied(asked)
        content = {
            "id": f"chatcmpl-{asked.digest[:12]}",
            "object": "chat.completion",
            "created": 0,
            "model": asked.model,
            "choices": [] if kind == "empty" else [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(text or "") // 4,
                "total_tokens": prompt_tokens + len(text or "") // 4,
            },
        }
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(
        self, status: int, message: str, *, code: str | None, param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        content = {"error": {"message": message, "type": code or "invalid_request_error", "param": param, "code": code}}
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self, reset: bool) -> None:
        """Close without an answer; `reset` as a machine does that has crashed."""
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `asked`."""


def answer_of(digest: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    """A value for each name of the schema, or for all that rubrics know."""
    properties = (schema or {}).get("properties") or dict.fromkeys(ALL_NAMES, {})
    return {name: _value(digest, name, about) for name, about in properties.items()}


def _value(digest: str, name: str, about: dict[str, Any]) -> Any:
    share = _share(digest, name)
    if about.get("type") == "string" or name == "reason":
        return f"reason {digest[:8]}"
    if "enum" in about:
        return about["enum"][int(share * len(about["enum"]))]
    low, high = about.get("minimum", 0), about.get("maximum", 1 if name == "correct" else 10)
    return int(low + share * (high - low + 1))


def _share(digest: str, name: str) -> float:
    """From 0 to below 1, by hash."""
    return int.from_bytes(hashlib.sha256(f"{digest} {name}".encode()).digest()[:6], "big") / 2**48


def _schema(body: dict[str, Any]) -> dict[str, Any] | None:
    return body.get("response_format", {}).get("json_schema", {}).get("schema")


def _asked(body: dict[str, Any]) -> Asked:
    texts, num_images = [], 0
    for message in body["messages"]:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                assert part["image_url"]["url"].startswith("data:image/jpeg;base64,")
                num_images += 1
    digest = hashlib.sha256(json.dumps([body["model"], body["messages"]], sort_keys=True).encode()).hexdigest()
    return Asked(
        digest, "\n".join(texts), body["model"], num_images, body.get("max_tokens", body.get("max_completion_tokens")),
        "response_format" in body, body.get("temperature"), time.monotonic(),
    )  # fmt: skip
