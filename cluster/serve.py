"""`llmi serve`: the trained policy behind HTTP, on loopback unless told otherwise, beside the tools that it calls."""

from __future__ import annotations

import http.client
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ray import serve as ray_serve

from actors.agent_server import Agent, Gateway
from actors.serving import tool_app
from agent.prompt import system_prompt
from agent.service.keys import Limits, parse_keys
from cluster.config import Config, ConfigError, ServedPolicy
from cluster.console import say
from cluster.pools import init_ray
from cluster.run_folder import RunFolder
from cluster.servers import RunFailed, actor_options, autoscaling, deploy, tool_specs
from replay.folders import is_model
from replay.storage import in_bucket

KEYS = "LLMI_API_KEYS"  # of the environment: NAME:KEY,NAME:KEY
ANSWER_S = 60.0  # the service must answer that soon after everything is up
REQUEST_S = 600.0  # a request that takes longer is given up
SURGE = 25  # percent of the replicas, rounded up, that a new version starts before old ones are stopped


def serve(config: Config, model: str | None, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM, then take everything down.

    Raises:
        ConfigError: there is no policy.
        RunFailed: something did not come up.
    """
    policies = served(config, model)
    keys = api_keys(host)
    if init_ray():
        _check_port(host, port)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has set its own; a shell's background job ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        say(f"starting tool servers and {', '.join(f'{name} of {p.model}' for name, p in policies.items())}")
        with application(config, policies, keys, host, port) as url:
            say(f"serving {url} (the page; the API is at {url}/openapi.json); Ctrl-C ends it")
            while True:
                time.sleep(1.0)
    except KeyboardInterrupt:
        say("stopped")


@contextmanager
def application(
    config: Config, policies: Mapping[str, ServedPolicy], keys: Mapping[str, str], host: str, port: int
) -> Iterator[str]:
    """Tool servers, unless the config names a running pool, and the agents; yields the URL once it answers.

    Args:
        keys: SHA-256 of each API key -> its name.

    Raises:
        RunFailed: the pool does not run, or something did not come up.
    """
    pool, owned = config.pool or f"{config.name}-serve", []
    _start_http(host, port)
    if config.pool:
        _check_pool(config, pool)
    try:
        if not config.pool:
            owned += deploy(config, pool)
        owned.append(agent_app(config))
        ray_serve.run(gateway(config, policies, keys, pool), name=owned[-1], route_prefix="/")
        _wait_for_answer(host, port)
        yield f"http://{host}:{port}"
    finally:
        for app in reversed(owned):
            ray_serve.delete(app, _blocking=False)


def agent_app(config: Config) -> str:
    """Name of the application that answers."""
    return f"{config.name}-agent"


def policy_folder(config: Config, model: str | None) -> str:
    """The policy to serve: `model`, or what the run of this config trained. Raises ConfigError if it is not there."""
    folder = model or RunFolder(config.folder).policy
    if not in_bucket(folder):
        folder = str(Path(folder).expanduser().absolute())
    if not is_model(folder):
        trained = "`llmi train` with this config makes it, and --model names another folder"
        raise ConfigError(f"there is no policy in {folder}; {'--model must hold one' if model else trained}")
    return folder


def served(config: Config, model: str | None) -> dict[str, ServedPolicy]:
    """The policies to serve, their folders found. Raises ConfigError if one is not there."""
    policies = config.serve.policies
    if model is not None or not policies:
        return {config.name: ServedPolicy(model=policy_folder(config, model))}
    if not any(p.weight for p in policies.values()):
        raise ConfigError("serve.policies: all weights are 0; give one of them a share")
    return {name: p.model_copy(update={"model": policy_folder(config, p.model)}) for name, p in policies.items()}


def api_keys(host: str) -> dict[str, str]:
    """Of the environment; a service that others can reach needs some. Raises ConfigError."""
    try:
        keys = parse_keys(os.environ.get(KEYS, ""))
    except ValueError as error:
        raise ConfigError(f"{KEYS}: {error}") from error
    if not keys and host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(f"{host} can be reached from other machines: set {KEYS}=NAME:KEY,... first")
    return keys


def gateway(config: Config, policies: Mapping[str, ServedPolicy], keys: Mapping[str, str], pool: str) -> Any:
    """The agents of the policies behind a gateway.

    Args:
        keys: SHA-256 of each API key -> its name.
        pool: name prefix of the tool and judge servers.
    """
    c = config.serve
    deployment: Any = Gateway
    return deployment.options(
        max_ongoing_requests=1000,
        ray_actor_options=actor_options(c),
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=c.deadline_s,  # one that is replaced ends its documents first
        max_surge_percent=SURGE,
        user_config={name: policy.weight for name, policy in policies.items()},
    ).bind(
        agents={name: _agent(config, name, policy.model, pool) for name, policy in policies.items()},
        keys=dict(keys),
        limits=Limits(c.requests_per_minute, c.documents_at_once),
        folder=c.folder or service_folder(config),
        keep_s=c.keep_days * 86400,
        deadline_s=c.deadline_s,
        body_bytes=int(c.body_mib * (1 << 20)),
        learn=c.learn,
    )


def service_folder(config: Config) -> str:
    """Where the service keeps documents, by default."""
    folder = f"{config.folder}/service"
    return folder if in_bucket(folder) else str(Path(folder).absolute())


def _agent(config: Config, name: str, folder: str, pool: str) -> Any:
    c = config.rollout
    deployment: Any = Agent
    size: dict[str, Any] = {"num_replicas": config.serve.replicas}
    if config.serve.autoscaling:
        size = {"autoscaling_config": autoscaling(config.serve.autoscaling)}
    return deployment.options(
        name=f"agent-{name}",
        max_ongoing_requests=c.concurrency,
        ray_actor_options=actor_options(c, c.threads),
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=config.serve.deadline_s,
        max_surge_percent=SURGE,
        **size,
    ).bind(
        model=folder,
        pool=pool,
        tools={name: tool.timeout_s for name, tool in config.tools.items()},
        judge_s=config.judges.text.timeout_s,
        document_s=config.render.document_s,
        specs=tool_specs(config),
        system=system_prompt(tool_specs(config)) if config.policy.system_prompt == "protocol" else "",
        sampling={"max_tokens": c.max_tokens, "temperature": c.temperature, "top_p": c.top_p},
        engine=c.engine,
    )


def _start_http(host: str, port: int) -> None:
    """Serve takes its HTTP options once, when it starts; training starts it without any."""
    options = {"host": host, "port": port, "request_timeout_s": REQUEST_S}
    ray_serve.start(proxy_location="HeadOnly", http_options=options)
    if not ray_serve.status().proxies:
        raise RunFailed(
            "Serve runs on this Ray cluster without HTTP, which cannot be added: `serve shutdown` ends it and all that "
            f"it serves, and `serve start --http-host {host} --http-port {port}` before a run keeps both possible"
        )


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise RunFailed(f"cannot listen on {host}:{port} ({error}); choose others with --host and --port") from error


def _check_pool(config: Config, pool: str) -> None:
    running = ray_serve.status().applications
    missing = [name for name in config.tools if tool_app(pool, name) not in running]
    if missing:
        raise RunFailed(
            f"no pool {pool!r} with {', '.join(missing)} runs on this Ray cluster; start it, or leave `pool` out"
        )


def _wait_for_answer(host: str, port: int) -> None:
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            with closing(http.client.HTTPConnection(host, port, timeout=ANSWER_S)) as asked:
                asked.request("GET", "/readyz")
                status = asked.getresponse().status
            if status == 200:
                return
            problem = f"status {status}"
        except OSError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise RunFailed(
                f"waited {ANSWER_S:g} s for http://{host}:{port}/readyz: {problem}; "
                "a Serve that ran before keeps the port it was started with"
            )
        time.sleep(0.2)
