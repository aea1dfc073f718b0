"""What a run leaves in `policy/`, as others use it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.run_folder import RunFolder
from cluster.train import train

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("local_ray"),
]
START_S = 180.0


@pytest.mark.parametrize("served_alone", [False, True], ids=["merged", "served alone"])
def test_a_run_that_trains_an_adapter_leaves_a_whole_policy_that_vllm_serves(
    tiny: Callable[..., Config], served_alone: bool
) -> None:
    alone = ["rollout.engine.enable_lora=true", "rollout.engine.max_loras=4"] if served_alone else []
    config = tiny(f"adapter-{served_alone}", "learner.lora={r: 4}", "learner.lr=1e-3", *alone)
    summary = train(config)
    assert (summary["steps"], summary["trajectories_lost"]) == (2, 0)
    folder = RunFolder(config.folder)
    assert {f.name for f in Path(folder.policy).iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert _changed(Path(folder.start), Path(folder.policy)), "the adapter is merged into it"
    with _served(folder.policy) as url:
        assert _asked(f"{url}/v1/models")["data"][0]["id"] == "policy"
        body = {"model": "policy", "max_tokens": 40, "messages": [{"role": "user", "content": "Show a flag of Peru."}]}
        assert _asked(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"].strip()


def _changed(before: Path, after: Path) -> bool:
    """Whether the same tensors have other values in places."""
    from safetensors.torch import load_file

    old, new = (load_file(p / "model.safetensors") for p in (before, after))
    assert old.keys() == new.keys()
    return any(not old[name].equal(new[name]) for name in old)


@contextmanager
def _served(policy: str) -> Iterator[str]:
    """What `vllm serve` starts, of a folder; yields its URL. The command itself asks for a package named vllm, and the
    CPU build has another name.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--served-model-name", "policy", "--port", str(port), "--host", "127.0.0.1", "--max-num-seqs", "4"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", policy, *options],
        env=environment,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert server.poll() is None, "vllm serve ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "vllm serve did not answer"
                time.sleep(1.0)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(10)


def _asked(url: str, body: object = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
