from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.config import Config, ConfigError, load
from cluster.serve import _check_port, policy_folder
from cluster.servers import RunFailed

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(TINY, [f"run_dir={tmp_path}"])


def test_it_serves_what_the_run_trained_unless_a_model_is_named(config: Config, tmp_path: Path) -> None:
    for folder in (Path(config.folder) / "policy", tmp_path / "other"):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    assert policy_folder(config, None) == f"{config.folder}/policy"
    assert policy_folder(config, str(tmp_path / "other")) == str(tmp_path / "other")


def test_a_run_that_has_trained_nothing_yet_has_no_policy_to_serve(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"there is no policy in .*tiny/policy; `llmi train`"):
        policy_folder(config, None)


def test_a_folder_that_holds_no_model_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model must hold one"):
        policy_folder(config, str(tmp_path))


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunFailed, match=rf"cannot listen on 127\.0\.0\.1:{port} .*--port"):
            _check_port("127.0.0.1", port)
