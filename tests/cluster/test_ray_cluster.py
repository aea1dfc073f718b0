"""ray_cluster.yaml against Ray's own validation, the locks, and the examples that run on it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.doctor import read_lock

ROOT = Path(__file__).resolve().parents[2]
POOLS = {"learner", "rollout", "tools", "judges"}


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def named_resources(section: Any) -> Iterator[str]:
    """The names under every `resources` key of an example."""
    if isinstance(section, dict):
        for key, value in section.items():
            yield from value if key == "resources" else named_resources(value)


def test_ray_accepts_the_cluster_file(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def test_ray_refuses_a_node_type_without_a_machine(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    del config["available_node_types"]["learner"]["node_config"]
    with pytest.raises(Exception, match="node_config"):
        validate_config(prepare_config(config))


def test_every_pool_has_a_node_type_that_offers_its_name(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert set(types) == POOLS | {config["head_node_type"]}
    assert all(list(types[name]["resources"]) == [name] for name in POOLS)
    assert sum(types[name]["max_workers"] for name in POOLS) >= config["max_workers"]


def test_every_resource_that_an_example_asks_for_is_offered() -> None:
    asked = {
        (path.name, name)
        for path in (ROOT / "examples").glob("*.yaml")
        for name in named_resources(yaml.safe_load(path.read_text()))
    }
    assert {(file, name) for file, name in asked if name not in POOLS} == set()


def test_the_image_has_the_locked_ray_and_what_is_installed_exists(config: dict[str, Any]) -> None:
    assert config["docker"]["image"].startswith(
        f"rayproject/ray:{read_lock(ROOT / 'requirements/gpu.txt')['ray']}-py311"
    )
    (command,) = config["setup_commands"]
    lock = Path(command.split()[-1])
    assert (ROOT / config["file_mounts"][str(lock.parent)] / lock.name).is_file()


def test_every_process_of_the_cluster_finds_the_tree_that_serve_deploy_runs(config: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    mounts = {Path(there): here for there, here in config["file_mounts"].items()}
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        [tree] = re.findall(r"PYTHONPATH=(\S+)\s+ray start", "\n".join(config[commands]))
        assert all(mounts[Path(tree, name)] == f"./{name}" for name in packages - {"benchmarks"})


def test_the_dashboard_listens_on_loopback_alone(config: dict[str, Any]) -> None:
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])
