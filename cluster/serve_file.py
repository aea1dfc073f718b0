"""The service as a Serve config file, for `serve deploy` on a running cluster.

Each tool, each judge and the agent is an application, built on the cluster by `build`. Deploying a changed file again
rolls the new version in: replicas of the old one end their documents first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from cluster.config import Config, ServedPolicy
from cluster.serve import REQUEST_S, agent_app, api_keys, gateway
from cluster.servers import applications


def to_yaml(config: Config, policies: Mapping[str, ServedPolicy], host: str, port: int) -> str:
    """The file.

    Args:
        policies: whose folders every node can read: on a shared disk, or `s3://...`.
    """
    ours = config.model_copy(update={"serve": config.serve.model_copy(update={"policies": dict(policies)})})
    args = {"config": ours.model_dump(mode="json"), "host": host}
    names = [*(() if config.pool else applications(config, f"{config.name}-serve")), agent_app(config)]
    apps = [
        {
            "name": name,
            "route_prefix": "/" if name == agent_app(config) else None,
            "import_path": f"{__name__}:build",
            "args": {"app": name, **args},
        }
        for name in names
    ]
    served = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port, "request_timeout_s": REQUEST_S},
        "applications": apps,
    }
    return yaml.safe_dump(served, sort_keys=False, allow_unicode=True)


def build(args: dict[str, Any]) -> Any:
    """The application `args["app"]` of a file, made where it runs.

    Raises:
        ConfigError: other machines can reach it, and it has no API keys (`LLMI_API_KEYS` of the cluster's processes).
    """
    config = Config.model_validate(args["config"])
    pool = config.pool or f"{config.name}-serve"
    if args["app"] == agent_app(config):
        return gateway(config, config.serve.policies, api_keys(args["host"]), pool)
    return applications(config, pool)[args["app"]]
