from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from cluster.config import Config, ConfigError, ServedPolicy, Serving, load
from cluster.serve import _check_port, api_keys, gateway, policy_folder, served
from cluster.serve_file import build, to_yaml
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


def test_policies_stand_side_by_side_with_their_weights_and_sizes(config: Config, tmp_path: Path) -> None:
    for name in ("stable", "canary"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    policies = {
        "stable": ServedPolicy(model=str(tmp_path / "stable"), weight=9),
        "canary": ServedPolicy(model=str(tmp_path / "canary")),
    }
    scale = {"autoscaling": {"min": 1, "max": 4, "target": 16}}
    serving = Serving.model_validate(scale | {"policies": {n: p.model_dump() for n, p in policies.items()}})
    many = config.model_copy(update={"serve": serving})
    front = gateway(many, served(many, None), {}, "pool")._bound_deployment
    assert front._deployment_config.user_config == {"stable": 9.0, "canary": 1.0}
    for name, agent in front.init_kwargs["agents"].items():
        deployment = agent._bound_deployment
        assert deployment.init_kwargs["model"] == str(tmp_path / name)
        assert deployment._deployment_config.autoscaling_config.max_replicas == 4
        assert deployment._deployment_config.max_surge_percent > 0


def test_all_weights_at_nought_are_refused(config: Config) -> None:
    none = {"stable": ServedPolicy(model="x", weight=0)}
    with pytest.raises(ConfigError, match="all weights are 0"):
        served(config.model_copy(update={"serve": config.serve.model_copy(update={"policies": none})}), None)


def test_a_serve_file_holds_every_application_and_each_can_be_built_from_it(config: Config) -> None:
    file = yaml.safe_load(to_yaml(config, {"tiny": ServedPolicy(model="/policies/tiny")}, "127.0.0.1", 8000))
    names = [app["name"] for app in file["applications"]]
    assert names == [
        *(f"tiny-serve-tool-{name}" for name in config.tools),
        "tiny-serve-judge-text",
        "tiny-serve-judge-image",
        "tiny-agent",
    ]
    assert [app["route_prefix"] for app in file["applications"]] == [None] * 6 + ["/"]
    made = [build(app["args"])._bound_deployment.name for app in file["applications"]]
    assert made == ["ToolServer"] * 4 + ["JudgeServer"] * 2 + ["Gateway"]


def test_a_service_that_others_can_reach_needs_keys(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMI_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached from other machines"):
        api_keys("0.0.0.0")
