"""Requests made up from the service's own description: whatever comes, the answer is one that it describes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from agent.service.api import build
from tests.agent.service.scripted import Scripted, service

CHECKS: list[Callable[..., Any]] = [not_a_server_error, status_code_conformance, response_schema_conformance]
PATHS = ["/v1/documents", "/v1/documents/{identity}", "/v1/chat/completions", "/v1/images/{name}"]
PATHS += [f"/v1/documents/{{identity}}/{part}" for part in ("events", "page", "feedback")]
PATHS += ["/v1/models", "/healthz", "/readyz"]


@pytest.mark.parametrize("path", PATHS)
def test_every_request_has_an_answer_that_the_description_knows(tmp_path: Path, path: str) -> None:
    app = build(service(tmp_path, Scripted(), requests_per_minute=1_000_000, documents_at_once=1000))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    assert set(schema) == set(PATHS)
    for operation in schema[path].values():

        @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy())
        def answered(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        answered()
