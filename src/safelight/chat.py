"""Asking a model behind an OpenAI-compatible endpoint, within limits of time and size."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .files import parse_json

LARGEST_ANSWER = 1 << 20  # bytes
MOST_RECEIVED = 2 << 20
"""Bytes of one answer with its headers, as they come over the wire."""


@dataclass(frozen=True)
class Endpoint:
    """Where a chat model is, and how patiently it is asked."""

    base_url: str
    model: str
    api_key_env: str
    """The environment variable that holds the API key; empty: none is needed."""
    timeout: float
    """Seconds until an answer must be complete, for each attempt."""
    retries: int

    def client(self) -> Any:
        """A pool of connections whose every read and write ends with the attempt's deadline, to be used as a context.

        Raises:
            ImportError: if httpcore is missing.
            ValueError: if the environment variable of the key is named, but not set.
        """
        try:
            import httpcore
        except ImportError as error:
            raise ImportError("asking a chat model needs httpcore; `pip install 'safelight[llm]'`") from error
        self._headers()  # raises without a key
        return httpcore.ConnectionPool(network_backend=_within_deadlines(), max_connections=64)

    def ask(self, client: Any, messages: Sequence[dict[str, Any]], forms: Sequence[dict[str, Any]]) -> str:
        """The model's answer in the first of these forms that the server supports.

        Raises:
            OSError, ValueError: if there is no answer after all attempts, or it has no text.
        """
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        for form in forms:
            request = {"model": self.model, "messages": list(messages), "temperature": 0, "response_format": form}
            status, body = self._post(client, url, request)
            if status not in (400, 422):
                break
        if status != 200:
            raise OSError(f"the endpoint answered with status {status}")
        answer = parse_json(body)
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError("the answer holds no message") from None
        if not isinstance(content, str):
            raise ValueError("the answer has no text")
        return content

    def _headers(self) -> dict[str, str]:
        if not self.api_key_env:
            return {}
        if not (key := os.environ.get(self.api_key_env)):
            raise ValueError(f"the environment variable {self.api_key_env} should hold the API key of {self.base_url}, but is not set")
        return {"Authorization": f"Bearer {key}"}

    def _post(self, client: Any, url: str, request: dict[str, Any]) -> tuple[int, bytes]:
        """Status and body, after as many attempts as allowed."""
        import httpcore

        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                status, body = self._attempt(client, url, request)
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, TimeoutError) as error:
                if last:
                    raise OSError(f"no answer: {type(error).__name__} {error}".strip()) from error
            else:
                if last or (status != 429 and status < 500):
                    return status, body
            time.sleep(min(0.2 * 2**attempt, 5))
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, client: Any, url: str, request: dict[str, Any]) -> tuple[int, bytes]:
        """One request. No redirect is followed; an answer is read as it comes, and refused if it is packed: small ones unpack to gigabytes."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity", **self._headers()}
        _deadline.at, body = time.monotonic() + self.timeout, bytearray()
        waits = dict.fromkeys(("connect", "read", "write", "pool"), self.timeout)
        with client.stream("POST", url, headers=headers, content=json.dumps(request).encode(), extensions={"timeout": waits}) as response:
            packed = [
                value for name, value in response.headers if name.lower() == b"content-encoding" and value.strip().lower() != b"identity"
            ]
            if packed:
                raise OSError(f"the answer is packed ({packed[0].decode(errors='replace')}), which was not asked for")
            for part in response.iter_stream():
                body += part
                if len(body) > LARGEST_ANSWER:
                    raise OSError("the answer is far too long")
            return response.status, bytes(body)


_deadline = threading.local()
"""When this thread's attempt ends. An attempt is one blocking call, so that no two share a thread."""


def _within_deadlines() -> Any:
    """Httpcore's way to the network, with a limit on each attempt as a whole: a trickle of bytes, in a body or in headers, would last for ever."""
    import httpcore

    def left() -> float:
        seconds = float(_deadline.at) - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("no complete answer in time")
        return seconds

    class Stream(httpcore.NetworkStream):
        def __init__(self, stream: Any) -> None:
            self._stream, self._received = stream, 0

        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            data: bytes = self._stream.read(max_bytes, left())
            self._received += len(data)
            if self._received > MOST_RECEIVED:
                raise OSError("the answer is far too long")
            return data

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            self._received = 0
            self._stream.write(buffer, left())

        def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
            return Stream(self._stream.start_tls(ssl_context, server_hostname, left()))

        def close(self) -> None:
            self._stream.close()

        def get_extra_info(self, info: str) -> Any:
            return self._stream.get_extra_info(info)

    class Backend(httpcore.NetworkBackend):
        def __init__(self) -> None:
            self._backend = httpcore.SyncBackend()

        def connect_tcp(self, host: str, port: int, timeout: Any = None, local_address: Any = None, socket_options: Any = None) -> Any:
            return Stream(self._backend.connect_tcp(host, port, left(), local_address, socket_options))

        def sleep(self, seconds: float) -> None:
            time.sleep(min(seconds, left()))

    return Backend()


def answer_forms(name: str, schema: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """How an answer's form is asked for; the second is for servers that refuse the first."""
    return (
        {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}},
        {"type": "json_object"},
    )
