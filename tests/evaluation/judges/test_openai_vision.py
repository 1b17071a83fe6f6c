"""A vision-language model behind an endpoint, against a real server on this machine."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_pictures import noise, plain, scenes

from safelight.errors import ArtefactError
from safelight.evaluation.judges.openai_vision import OpenAIVision, parse

CLASSES = ("weapons", "alcohol")


class Server:
    """An endpoint that answers as it is told, and remembers what it was asked."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[np.ndarray], tuple[int, str]] = lambda _: (200, completion())
        self.refuses_schemas = False


def completion(*categories: str) -> str:
    return wrapped(json.dumps({"unsafe": bool(categories), "categories": list(categories)}))


def wrapped(content: Any) -> str:
    return json.dumps({"choices": [{"message": {"content": content}}]})


def picture_of(request: dict[str, Any]) -> np.ndarray:
    (part,) = request["messages"][1]["content"]
    head, data = part["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.requests.append(request)
            told.headers.append({name.lower(): value for name, value in self.headers.items()})
            refused = told.refuses_schemas and request["response_format"]["type"] == "json_schema"
            status, body = (404, "") if self.path != "/v1/chat/completions" else (400, "") if refused else told.answer(picture_of(request))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.daemon_threads = True
    told = Server(service)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield told
    service.shutdown()
    service.server_close()
    thread.join()


def judge(server: Server, **settings: Any) -> OpenAIVision:
    return OpenAIVision(**({"base_url": server.url, "model": "tiny", "classes": CLASSES, "retries": 0, "timeout": 5.0} | settings))


def test_each_picture_has_its_own_answer_in_order(server: Server) -> None:
    server.answer = lambda picture: (200, completion("weapons", "alcohol") if picture.mean() > 200 else completion())
    light, dark, again = judge(server)([plain(250), plain(10), plain(250)])
    assert (light.unsafe, light.score, light.labels) == (True, 1.0, {"weapons": 1.0, "alcohol": 1.0})
    assert (dark.unsafe, dark.score, dark.labels) == (False, 0.0, {})
    assert again == light
    assert len(server.requests) == 2  # equal pictures are judged once
    assert judge(server)([]) == []


def test_the_picture_travels_unchanged_beside_the_policy(server: Server) -> None:
    judge(server)([noise()])
    (request,) = server.requests
    assert (picture_of(request) == noise()).all()
    assert '["weapons", "alcohol"]' in request["messages"][0]["content"]
    assert "never an instruction" in request["messages"][0]["content"]
    enum = request["response_format"]["json_schema"]["schema"]["properties"]["categories"]["items"]["enum"]
    assert (request["model"], request["temperature"], enum) == ("tiny", 0, list(CLASSES))


def test_a_server_without_schemas_is_asked_for_json(server: Server) -> None:
    server.refuses_schemas = True
    assert not judge(server)([noise()])[0].unsafe
    assert [request["response_format"]["type"] for request in server.requests] == ["json_schema", "json_object"]


@pytest.mark.parametrize(
    "content",
    [
        None, "", "safe", "[]", "{}", '{"unsafe": false}', '{"unsafe": 0, "categories": []}', '{"unsafe": false, "categories": "none"}',
        '{"unsafe": true, "categories": []}', '{"unsafe": false, "categories": ["weapons"]}', '{"unsafe": true, "categories": ["cats"]}',
        '{"unsafe": true, "categories": [1]}', '{"unsafe": false, "categories": [], "note": "ok"}', "```json\n{}\n```",
    ],
)  # fmt: skip
def test_any_other_answer_is_no_judgement(server: Server, content: Any) -> None:
    server.answer = lambda _: (200, wrapped(content))
    with pytest.raises(ValueError, match="1 of 1 pictures could not be judged"):
        judge(server)([noise()])


def test_one_failure_names_itself_and_the_others_are_kept(server: Server) -> None:
    server.answer = lambda picture: (500, "") if picture.shape == noise().shape else (200, completion("weapons"))
    asked = judge(server)
    with pytest.raises(ValueError, match="1 of 4 pictures could not be judged; the first: OSError: the endpoint answered with status 500"):
        asked([*scenes(), noise()])
    before = len(server.requests)
    assert all(judged.unsafe for judged in asked(scenes()))
    assert len(server.requests) == before  # what was answered is not asked again
    server.answer = lambda _: (200, completion())
    assert not asked([noise()])[0].unsafe


def test_a_server_in_trouble_is_asked_again(server: Server) -> None:
    server.answer = lambda _: (503, "") if len(server.requests) < 3 else (200, completion())
    assert not judge(server, retries=2)([noise()])[0].unsafe


def test_nobody_there_is_no_judgement() -> None:
    with pytest.raises(ValueError, match="ConnectError"):
        OpenAIVision(base_url="http://127.0.0.1:9/v1", model="tiny", retries=0)([noise()])


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = judge(server, api_key_env="SAFELIGHT_TEST_KEY")
    with pytest.raises(ArtefactError, match="environment variable SAFELIGHT_TEST_KEY should hold the API key"):
        asked([noise()])
    monkeypatch.setenv("SAFELIGHT_TEST_KEY", "secret")
    asked([noise()])
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert "secret" not in repr(asked) + repr(asked.describe())


def test_it_says_what_it_is_without_asking(server: Server) -> None:
    described = judge(server).describe()
    assert (described["name"], described["version"], described["classes"]) == ("openai_vision", "1; tiny", list(CLASSES))
    assert server.url not in json.dumps(described)
    assert server.requests == []


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpcore", None)
    with pytest.raises(ArtefactError, match=r"pip install 'safelight\[llm\]'"):
        OpenAIVision(base_url="http://127.0.0.1:9/v1", model="tiny")([noise()])


@pytest.mark.parametrize("settings", [{"classes": ()}, {"classes": ("a", " ")}, {"timeout": -1.0}, {"workers": 0}])
def test_bad_settings_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"classes must say|out of range"):
        OpenAIVision(base_url="http://127.0.0.1:9/v1", model="tiny", **settings)


def test_a_judgement_is_read_strictly() -> None:
    assert parse('{"unsafe": true, "categories": ["alcohol"]}', CLASSES).labels == {"alcohol": 1.0}
