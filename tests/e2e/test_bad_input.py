"""What a client gets wrong, answered by the real cluster: the right status, the right field, and no harm done."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from slipstream.client import Client
from slipstream.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from slipstream.v1.registry_pb2 import Role
from tests.support.cluster import Cluster, wait_for
from tests.support.tiny_model import MAX_MODEL_LEN, VOCAB_SIZE


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", timeout=60, max_retries=0) as made:
        yield made


def post(cluster: Cluster, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{cluster.http_url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    with caught.value as answer:
        return answer.code, json.loads(answer.read())["error"]


def test_malformed_json_is_400_in_the_shape_of_openai(cluster: Cluster) -> None:
    status, error = post(cluster, b'{"model": "tiny", "prompt": ')
    assert status == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", "many"), ("temperature", -1), ("prompt", {"a": 1}), ("n", 0), ("stop", 1), ("top_p", 2)],
)
def test_a_wrong_type_or_value_is_400_and_names_the_field(cluster: Cluster, field: str, value: object) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2, field: value}
    status, error = post(cluster, json.dumps(body).encode())
    assert status == 400
    assert error["param"] == field


def test_an_overlong_prompt_is_400_and_both_lengths_are_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 9000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert str(MAX_MODEL_LEN) in caught.value.message
    assert "9000" in caught.value.message or "9001" in caught.value.message


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="hello")
    assert caught.value.code == "model_not_found"
    assert "nobody" in caught.value.message


def test_a_token_id_outside_the_vocabulary_is_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=[VOCAB_SIZE], max_tokens=1)


def test_echo_is_refused_and_not_ignored(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="tiny", prompt="hello", echo=True)


def test_grpc_tells_the_same_mistakes_with_the_same_types(cluster: Cluster) -> None:
    with Client(cluster.grpc_target) as client:
        with pytest.raises(ContextLengthError, match=str(MAX_MODEL_LEN)):
            client.complete([5] * 9000, max_tokens=1)
        with pytest.raises(ModelNotFoundError):
            client.complete("hello", model="nobody")
        with pytest.raises(InvalidRequestError, match="top_p"):
            client.complete("hello", top_p=7.0)


def test_after_all_that_nothing_is_held_and_the_next_answer_comes(cluster: Cluster, client: openai.OpenAI) -> None:
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=3).usage is not None

    def nothing_open() -> bool:
        roles = (Role.ROLE_PREFILL, Role.ROLE_DECODE)
        return all(cluster.metrics(role)["slipstream_worker_requests_open"] == 0 for role in roles)

    wait_for("no call is open", nothing_open, timeout_s=2)
