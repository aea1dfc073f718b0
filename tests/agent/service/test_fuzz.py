"""Requests made up from the service's own description: whatever comes, the answer is one that it describes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from agent.service.api import build
from tests.agent.service.scripted import Scripted, service

CHECKS: list[Callable[..., Any]] = [not_a_server_error, status_code_conformance, response_schema_conformance]


@pytest.fixture
def api(tmp_path: Path) -> Any:
    here = service(tmp_path, Scripted(), requests_per_minute=1_000_000, documents_at_once=1000)
    return schemathesis.openapi.from_asgi("/openapi.json", build(here))


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_request_has_an_answer_that_the_description_knows(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)
