"""Asking a model behind an OpenAI-compatible endpoint, within limits of time and size."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LARGEST_ANSWER = 1 << 20  # bytes


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
        """An `httpx.Client`, to be used as a context.

        Raises:
            ImportError: if httpx is missing.
            ValueError: if the environment variable of the key is named, but not set.
        """
        try:
            import httpx
        except ImportError as error:
            raise ImportError("asking a chat model needs httpx; `pip install 'safelight[llm]'`") from error
        return httpx.Client(headers=self._headers(), timeout=self.timeout)

    def ask(self, client: Any, messages: Sequence[dict[str, Any]], forms: Sequence[dict[str, Any]]) -> str:
        """The model's answer in the first of these forms that the server supports.

        Raises:
            OSError, httpx.TransportError, ValueError: if there is no answer after all attempts, or it has no text.
        """
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        for form in forms:
            request = {"model": self.model, "messages": list(messages), "temperature": 0, "response_format": form}
            status, body = self._post(client, url, request)
            if status not in (400, 422):
                break
        if status != 200:
            raise OSError(f"the endpoint answered with status {status}")
        content = json.loads(body)["choices"][0]["message"]["content"]
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
        import httpx

        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                status, body = self._attempt(client, url, request)
            except (httpx.TransportError, TimeoutError):
                if last:
                    raise
            else:
                if last or (status != 429 and status < 500):
                    return status, body
            time.sleep(min(0.2 * 2**attempt, 5))
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, client: Any, url: str, request: dict[str, Any]) -> tuple[int, bytes]:
        deadline, body = time.monotonic() + self.timeout, bytearray()
        with client.stream("POST", url, json=request) as response:
            for part in response.iter_bytes():  # httpx's timeout is for each read: a trickle of bytes would last for ever
                body += part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no complete answer within {self.timeout:g} s")
                if len(body) > LARGEST_ANSWER:
                    raise OSError("the answer is far too long")
            return response.status_code, bytes(body)


def answer_forms(name: str, schema: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """How an answer's form is asked for; the second is for servers that refuse the first."""
    return (
        {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}},
        {"type": "json_object"},
    )
