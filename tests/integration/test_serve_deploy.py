"""The service by `serve deploy`, and a new version of its policy rolled in while people ask."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.by_heart import by_heart
from tests.integration.ray_head import BIN, ROOT, Head, free_ports, ray_head

QUESTION, OLD, NEW = "Which version is it?", "It is the old one, as before.", "It is the new one, at last."
DEADLINE_S = 240.0

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_new_version_is_rolled_in_without_dropping_a_request(tmp_path: Path) -> None:
    policies = {text: by_heart(tmp_path / name, QUESTION, text) for name, text in (("old", OLD), ("new", NEW))}
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with ray_head(dashboard=True) as head:
        deploy(head, tmp_path / "serve.yaml", policies[OLD], port)
        wait_for(url, OLD)
        told: list[tuple[int, str]] = []
        ended = threading.Event()
        clients = [threading.Thread(target=ask_on, args=(url, told, ended)) for _ in range(3)]
        for client in clients:
            client.start()
        try:
            deploy(head, tmp_path / "serve.yaml", policies[NEW], port)
            wait_for(url, NEW)
        finally:
            ended.set()
            for client in clients:
                client.join(60)
    assert {status for status, _ in told} == {200} and {text for _, text in told} == {OLD, NEW}
    assert [text for _, text in told].index(NEW) > 5, "the old version answered while the new one came up"


def deploy(head: Head, file: Path, policy: Path, port: int) -> None:
    small = ["tools={search: {}}", "rollout.temperature=0.01", "rollout.engine.max_model_len=256"]
    small += ["serve.requests_per_minute=100000", f"serve.folder={file.parent}/service"]
    llmi = [sys.executable, "-m", "cluster.cli", "serve", "examples/tiny.yaml", "name=rolled", *small]
    run(head, [*llmi, "--model", str(policy), "--port", str(port), "--write", str(file)])
    run(head, [str(BIN / "serve"), "deploy", str(file), "--address", head.jobs])


def run(head: Head, command: list[str]) -> None:
    done = subprocess.run(command, env=head.env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def ask(url: str) -> tuple[int, str]:
    answer = httpx.post(f"{url}/v1/documents", json={"prompt": QUESTION}, timeout=100, trust_env=False)
    body: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
    return answer.status_code, body.get("text", answer.text)


def ask_on(url: str, told: list[tuple[int, str]], ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            told.append(ask(url))
        except httpx.HTTPError as error:
            told.append((0, repr(error)))


def wait_for(url: str, text: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            said = ask(url)
        except httpx.HTTPError as error:
            said = (0, repr(error))
        if said == (200, text):
            return
        assert time.monotonic() < deadline, said
        time.sleep(1)
