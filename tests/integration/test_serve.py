"""`llmi serve` with a policy that knows one document by heart, so that its answer can be told beforehand."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from agent.protocol import format_call
from agent.scaling import STAGES
from tests.integration.by_heart import by_heart
from tests.integration.ray_head import ROOT, Head, free_ports, ray_head

LLMI = [sys.executable, "-m", "cluster.cli"]
QUESTION = "Show two bars, and the flag of Japan."
TEXT = "\n".join(
    [
        "Here are two bars.",
        format_call("code", "two bars", {"code": "plt.bar(['a', 'b'], [1, 2])"}),
        "And here is the flag.",
        format_call("search", "the flag of Japan", {"query": "flag of Japan"}),
        "That is all.",
    ]
)

#: Kills the agent when it is told a line.
KILL_AGENT = """
import ray
ray.init(log_to_driver=False)
(name,) = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if "agent-served" in a["name"]]
agent = ray.get_actor(name, namespace="serve")
print("found", flush=True)
input()
ray.kill(agent)
"""

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Service:
    """A running `llmi serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def ask(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/documents", json=body, timeout=100, trust_env=False)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as head:
        yield head


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_heart(tmp_path_factory.mktemp("policy"), QUESTION, TEXT)


@pytest.fixture(scope="module")
def service(head: Head, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`llmi serve` on the cluster of the tests, which can so reach into it."""
    port, log = free_ports(1)[0], tmp_path_factory.mktemp("serve") / "log"
    small = ["tools={code: {}, search: {timeout_s: 3}}", "rollout.temperature=0.01", "rollout.engine.max_model_len=256"]
    small += ["serve.requests_per_minute=100000"]
    command = [*LLMI, "serve", "examples/tiny.yaml", "name=served", *small, "--model", str(policy), "--port", str(port)]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, env=head.env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        while "serving http" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield Service(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.kill()
        process.wait()


def test_a_prompt_is_answered_with_a_document_and_its_pictures(service: Service) -> None:
    response = service.ask(prompt=QUESTION, seed=1)
    assert response.status_code == 200, response.text
    document = response.json()
    assert document["text"] == TEXT
    assert [(c["source"], c["status"], c["reason"]) for c in document["calls"]] == [
        ("code", "ok", ""),
        ("search", "ok", ""),
    ]
    code, search = document["calls"]
    assert code["description"] == "two bars" and search["params"] == {"query": "flag of Japan"}
    assert "Japan" in search["provenance"]["title"] and search["provenance"]["licence"]
    assert set(document["images"]) == {*code["images"], *search["images"]}
    for url in document["images"].values():
        data = httpx.get(f"{service.url}{url}", timeout=30, trust_env=False).content
        assert Image.open(io.BytesIO(data)).width > 50
        assert url in document["markdown"]


def test_several_tries_of_everything_are_told_of_in_the_document(service: Service) -> None:
    document = service.ask(prompt=QUESTION, seed=1, scale=2).json()
    assert [stage["name"] for stage in document["scaling"]] == list(STAGES)
    assert document["text"] == TEXT and len(document["images"]) == 2
    assert document["scaling"][0]["tokens"] > 100 and 0.3 < document["scaling"][-1]["score"] <= 1


def test_two_hundred_clients_at_once_are_answered_or_told_to_come_back(service: Service) -> None:
    async def go() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.url, timeout=100, limits=limits, trust_env=False) as http:
            asked = (http.post("/v1/documents", json={"prompt": QUESTION, "seed": i % 4}) for i in range(200))
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    statuses = asyncio.run(go())
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 32


def test_it_says_that_it_is_well(service: Service) -> None:
    response = httpx.get(f"{service.url}/healthz", timeout=30, trust_env=False)
    assert (response.status_code, response.json()["status"]) == (200, "ok")
    ready = httpx.get(f"{service.url}/readyz", timeout=30, trust_env=False)
    assert (ready.status_code, ready.json()["models"]) == (200, ["served"])


def test_the_openai_client_streams_a_document(service: Service) -> None:
    ai = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none is needed")
    chunks = list(
        ai.chat.completions.create(
            model="served", messages=[{"role": "user", "content": QUESTION}], seed=1, stream=True
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.count("](http") >= 2 and "That is all." in text and chunks[-1].choices[0].finish_reason == "stop"
    assert len(chunks) > 4


def test_a_client_that_leaves_in_the_middle_takes_its_document_along(service: Service) -> None:
    with httpx.stream("POST", f"{service.url}/v1/documents", json={"prompt": QUESTION, "stream": True}) as response:
        identity = json.loads(next(line for line in response.iter_lines() if line[:5] == "data:")[5:])["id"]
    deadline = time.monotonic() + 30
    while (row := httpx.get(f"{service.url}/v1/documents/{identity}", trust_env=False)).json()["status"] == "writing":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert row.json()["status"] in ("cancelled", "done")  # done, where all was written before the client was gone


@pytest.mark.slow  # another engine has to start
def test_a_worker_killed_in_mid_document_is_replaced_and_the_client_sees_one_answer(
    service: Service, head: Head
) -> None:
    command, body = [sys.executable, "-c", KILL_AGENT], {"prompt": QUESTION, "stream": True, "seed": 1}
    with subprocess.Popen(command, env=head.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdout is not None and killer.stdout.readline() == "found\n"
        with httpx.stream("POST", f"{service.url}/v1/documents", json=body, timeout=200, trust_env=False) as response:
            lines = response.iter_lines()
            while not next(lines).startswith("event: text"):
                pass
            killer.communicate("now\n", timeout=60)
            rest = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    assert rest[-1]["status"] == "done" and rest[-1]["text"] == TEXT
    assert sorted(row["index"] for row in rest if "urls" in row) == [0, 1]


def test_a_body_that_cannot_be_answered_is_refused_in_one_line(service: Service) -> None:
    too_long = "word " * 400
    for body, reason in (
        ({}, "prompt: Field required"),
        ({"prompt": QUESTION, "images": ["no picture"]}, "images.0: neither http(s)"),
        ({"prompt": too_long}, "prompt: This model's maximum context length is 256 tokens"),
    ):
        response = service.ask(**body)
        assert response.status_code == 422 and reason in response.json()["error"]["message"], response.text


def test_a_tool_that_is_down_costs_its_picture_but_not_the_text(service: Service, head: Head) -> None:
    head.python("serve.delete('served-serve-tool-search')")
    document = service.ask(prompt=QUESTION, seed=1).json()
    assert document["text"] == TEXT
    code, search = document["calls"]
    assert code["status"] == "ok" and list(document["images"]) == code["images"]
    assert search["status"] == "failed" and search["reason"].startswith("tool 'search' ")
    assert "No picture: the flag of Japan" in document["markdown"]


def test_ctrl_c_ends_it_and_takes_its_applications_down(service: Service, head: Head) -> None:
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0, service.log.read_text()
    left = "import time; d = time.time() + 60\nwhile serve.status().applications and time.time() < d: time.sleep(0.3)\n"
    assert head.python(left + "print(len(serve.status().applications))").strip() == "0"


def test_without_a_policy_it_ends_at_once_in_one_line(tmp_path: Path) -> None:
    command = [*LLMI, "serve", "examples/tiny.yaml", f"run_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.startswith(f"llmi: there is no policy in {tmp_path}/tiny/policy")
    assert done.stderr.count("\n") == 1
