"""Requests that schemathesis makes from the server's OpenAPI document, valid and not, to the application itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.serve.app import application
from rwkv_npu.serve.openapi import document
from rwkv_npu.serve.service import Limits, Service
from rwkv_npu.text.chat import TEMPLATES

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis needs Python 3.11")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
OPERATIONS = [
    (method, path)
    for path, item in document()["paths"].items()
    for method in item
    if method in ("get", "post", "put", "delete")
]


@pytest.fixture(scope="module")
def api(checkpoint: Path) -> Iterator[Any]:
    with rwkv_npu.load(checkpoint, backend="numpy") as model:
        service = Service(model, "tiny", TEMPLATES["g1"], limits=Limits(max_tokens=4))
        yield schemathesis.openapi.from_asgi("/openapi.json", application(service, hosts=None))
        service.close()


def test_the_document_has_every_path(api: Any) -> None:
    routed = {route.path.replace(":path", "") for route in api.app._app.routes}
    unavailable = {"/v1/embeddings", "/api/embed", "/api/embeddings"}
    assert routed - unavailable - {"/", "/page/{name}", "/openapi.json", "/v1/health"} == set(
        document()["paths"]
    )


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part)
def test_requests(method: str, path: str, api: Any) -> None:
    operation = api[path][method.upper()]

    @given(
        st.sampled_from(list(schemathesis.GenerationMode)).flatmap(lambda mode: operation.as_strategy(mode))
    )
    @settings(
        max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    def requests(case: Any) -> None:
        # A schema cannot say all: a token may be outside of the vocabulary, and a file no state.
        case.call_and_validate(
            excluded_checks=[checks.positive_data_acceptance, checks.negative_data_rejection]
        )

    requests()
