"""What the real engine makes of what the HTTP face honours; the official client, unchanged."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.support.cluster import Cluster, scrape, status_of
from tests.support.tiny_model import MAX_MODEL_LEN


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", timeout=60, max_retries=0) as made:
        yield made


MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How many stars are there?"}]


async def ask(client: AsyncOpenAI, **options: object) -> str:
    base: dict[str, object] = {"model": "tiny", "prompt": "How many stars", "max_tokens": 12, "temperature": 0}
    base["extra_body"] = {"ignore_eos": True, **options.pop("extra_body", {})}  # type: ignore[dict-item]
    answer = await client.completions.create(**{**base, **options})  # type: ignore[call-overload]
    return str(answer.choices[0].text)


async def test_chat_streamed_and_whole_say_the_same_and_count_the_same(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=12,
        temperature=0,
    )
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_completion_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []


async def test_a_seed_makes_chance_repeatable_and_temperature_makes_it_chance(client: AsyncOpenAI) -> None:
    first, again = [await ask(client, temperature=1.5, seed=7) for _ in range(2)]
    others = {await ask(client, temperature=1.5, seed=seed) for seed in range(5)}
    assert first == again
    assert len(others) > 1


@pytest.mark.parametrize("only_one", [{"top_k": 1}, {"min_p": 1.0}])
async def test_truncated_sampling_down_to_one_token_is_greedy(client: AsyncOpenAI, only_one: dict[str, float]) -> None:
    assert await ask(client, temperature=1.0, extra_body=only_one) == await ask(client)
    assert await ask(client, temperature=1.0, top_p=1e-9) == await ask(client)


async def test_penalties_change_what_is_said_again(client: AsyncOpenAI) -> None:
    long = {"max_tokens": 64}
    plain = await ask(client, **long)
    assert await ask(client, frequency_penalty=2.0, presence_penalty=2.0, **long) != plain
    assert await ask(client, extra_body={"repetition_penalty": 2.0}, **long) != plain


async def test_a_biased_token_is_said_and_a_banned_one_is_not(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="tiny", prompt="How", max_tokens=4, temperature=0, logprobs=1, logit_bias={"40": 100}
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.tokens
    assert tokens is not None
    assert len(set(tokens)) == 1
    banned = await ask(client, max_tokens=1, logit_bias={"40": -100})
    assert banned != tokens[0]


async def test_log_probabilities_come_for_every_token_best_first(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for entry in logprobs.content:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert entry.logprob == pytest.approx(tops[0])  # greedy: the chosen token is the best one


async def test_a_stop_string_that_spans_tokens_ends_the_answer_before_it(client: AsyncOpenAI) -> None:
    whole = await ask(client, max_tokens=24)
    stop = whole[5:11]
    cut = await client.completions.create(
        model="tiny",
        prompt="How many stars",
        max_tokens=24,
        temperature=0,
        stop=[stop],
        extra_body={"ignore_eos": True},
    )
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


async def test_several_choices_are_fanned_out_and_come_in_order(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="tiny", prompt="How many stars", max_tokens=8, temperature=1.2, seed=3, n=4
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 32


async def test_the_model_list_health_and_metrics_tell_of_the_cluster(client: AsyncOpenAI, cluster: Cluster) -> None:
    models = (await client.models.list()).data
    assert [model.id for model in models] == ["tiny"]
    assert MAX_MODEL_LEN in (models[0].model_extra or {}).values()
    assert status_of(f"{cluster.http_url}/health/live") == 200
    assert status_of(f"{cluster.http_url}/health/ready") == 200
    assert any(name.startswith("slipstream_frontend_requests_total") for name in scrape(f"{cluster.http_url}/metrics"))
