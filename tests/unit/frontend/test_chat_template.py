"""Templates get what transformers gives them, and can do no harm."""

from __future__ import annotations

import datetime

import pytest

from frontend.chat_template import ChatTemplate
from slipstream.errors import InvalidRequestError, StartupError

USER = [{"role": "user", "content": "hi <b>"}]


def rendered(source: str, **special_tokens: str) -> str:
    now = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
    return ChatTemplate(source, special_tokens, now=lambda: now).render(USER)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi <b></s>"),
        ("{% for m in messages %}\n  {%- if true %}\nx\n  {% endif %}\n{% endfor %}\n", "x\n"),
        ("{{ strftime_now('%d %B %Y') }}", "01 March 2026"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi <b>"}]'),
        ("{{ {'b': 1, 'a': 'é'} | tojson(indent=1, sort_keys=true) }}", '{\n "a": "é",\n "b": 1\n}'),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{% if tools %}T{% else %}no tools{% endif %}", "no tools"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
    ],
)
def test_a_template_finds_what_transformers_offers(source: str, expected: str) -> None:
    assert rendered(source, bos_token="<s>", eos_token="</s>") == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 5 }}",
        "{{ messages[7].content.x }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_raises_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        rendered(source)
    assert caught.value.param == "messages"


def test_the_templates_own_words_reach_the_client() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


def test_a_template_that_does_not_compile_stops_the_start() -> None:
    with pytest.raises(StartupError, match="does not compile"):
        ChatTemplate("{% for %}", {})
