"""The OpenAPI document and the face agree: schemathesis asks by the one and looks at the answers of the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from operator import methodcaller
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from frontend.http_face import create_app
from frontend.inference import InferenceService
from frontend.openai_requests import ChatBody, CompletionBody
from frontend.tokenizer import TextModel
from tests.support.scripted_dispatcher import ScriptedDispatcher

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
few = settings(max_examples=5, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
OURS = "tiny"
# Refused with another value than these, each with an error that names it: requests that shall be served leave them out.
NOT_SERVED = frozenset(
    ("tools", "functions", "function_call", "tool_choice", "audio", "web_search_options", "continue_final_message")
) | {"response_format", "modalities", "echo", "suffix", "best_of", "stream_options", "cache_salt"}


@pytest.fixture
def app(text_model: TextModel, dispatcher: ScriptedDispatcher) -> FastAPI:
    service = InferenceService(dispatcher, text_model, model_name=OURS, request_timeout_s=20, max_n=3)
    return create_app(service, max_body_bytes=1 << 20)


def answers(operation: Any, mode: GenerationMode, call: Callable[[Any], Any] = methodcaller("call")) -> Counter[int]:
    """How often it was answered with which status.

    Args:
        call: has a case answered.
    """
    seen: Counter[int] = Counter()

    @few
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = {name: value for name, value in case.body.items() if name not in NOT_SERVED} | {"model": OURS}
        response = call(case)
        seen[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    ask()
    return seen


def test_what_the_document_says_is_what_is_answered(app: FastAPI) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    seen = {}
    found: Any
    for found in schema.get_all_operations():
        operation = found.ok()
        seen[operation.label] = answers(operation, GenerationMode.POSITIVE)
        if operation.body:
            refused = answers(operation, GenerationMode.NEGATIVE)
            assert set(refused) <= {400}, (operation.label, refused)
    assert {"POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models", "GET /metrics"} <= set(seen)
    for label in ("GET /v1/models", "GET /health/live", "GET /metrics"):
        assert set(seen[label]) == {200}
    assert all(status in (200, 400, 404) for statuses in seen.values() for status in statuses)


def test_the_document_names_the_limits_that_are_set(app: FastAPI) -> None:
    schemas = app.openapi()["components"]["schemas"]
    for body in (ChatBody, CompletionBody):
        properties = schemas[body.__name__]["properties"]
        assert properties["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 3}
        assert properties["stop_token_ids"]["anyOf"][0]["maxItems"] == 1024
