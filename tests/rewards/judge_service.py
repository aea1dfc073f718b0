"""A model service on this machine that speaks OpenAI's chat protocol, and misbehaves when told to."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any

from tests.local_service import Answering

Misbehaviour = Callable[["Handler"], None]


class Handler(Answering):
    server: JudgeService

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(request)
            behaviour = self.server.behaviours.pop(0) if self.server.behaviours else self.server.mood(request)
        self.request_body = request
        try:
            behaviour(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def good(self) -> None:
        self.say(verdict(self.names(), 4))

    def names(self) -> list[str]:
        properties = self.request_body["response_format"]["json_schema"]["schema"]["properties"]
        return [name for name in properties if not name.endswith("_reason")]

    def say(self, text: str, likely: dict[str, float] | None = None) -> None:
        """One token a character; `likely` are the probabilities in the place of every digit."""
        tokens = [
            {
                "token": sign,
                "logprob": 0.0,
                "top_logprobs": [
                    {"token": other, "logprob": math.log(p)}
                    for other, p in (likely if likely and sign.isdigit() else {sign: 1.0}).items()
                ],
            }
            for sign in text
        ]
        choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": tokens}}
        self.answer(200, {"choices": [choice]})


class JudgeService(ThreadingHTTPServer):
    """Takes `behaviours` one a request; after them it behaves as a document asks for with "mood: NAME", else well.

    Attributes:
        seen: the requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours: list[Misbehaviour] = []
        self.seen: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def mood(self, request: dict[str, Any]) -> Misbehaviour:
        asked = json.dumps(request["messages"][1:])
        return next((do for name, do in MOODS.items() if f"mood: {name}." in asked), Handler.good)


def verdict(names: list[str], score: Any, reason: str = "fine") -> str:
    return json.dumps({key: value for name in names for key, value in ((f"{name}_reason", reason), (name, score))})


def says(text: str, likely: dict[str, float] | None = None) -> Misbehaviour:
    return lambda handler: handler.say(text, likely)


def answers(status: int, said: Any, **headers: str) -> Misbehaviour:
    return lambda handler: handler.answer(status, said, **headers)


def sleeps(seconds: float) -> Misbehaviour:
    def behave(handler: Handler) -> None:
        time.sleep(seconds)
        handler.good()

    return behave


def half(handler: Handler) -> None:
    handler.say(verdict(handler.names(), 4)[:-10])


def out_of_range(handler: Handler) -> None:
    handler.say(verdict(handler.names(), 9))


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


#: All ways in which a judge gives no verdict, and never will.
MOODS: dict[str, Misbehaviour] = {
    "talks": says("I would say that this is a rather good answer: 5 out of 5."),
    "range": out_of_range,
    "foreign": says("Das ist eine sehr gute Antwort: fünf von fünf Punkten."),
    "half": half,
    "slow": sleeps(4.0),
    "error": answers(500, {"error": {"message": "out of memory"}}),
    "hangs up": hangs_up,
}
