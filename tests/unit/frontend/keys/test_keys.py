"""Keys themselves: made, taken apart, found, and not given away."""

from __future__ import annotations

import traceback
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frontend.keys import edits, secret
from frontend.keys.entries import KeyEntry, KeyFile
from frontend.keys.keyring import Keyring, RefusedKeyError, model_pattern
from frontend.keys.secret import new_key
from slipstream.errors import ConfigError
from slipstream.settings import TenantSettings
from tests.unit.frontend.keys.faces import content, entry

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def test_keys_are_what_a_scanner_looks_for_and_all_different() -> None:
    made = [new_key() for _ in range(50)]
    assert len({one.plain for one in made}) == len({one.key_id for one in made}) == 50
    for one in made:
        assert secret.id_of(one.plain) == one.key_id
        assert one.plain not in repr(one)


@given(st.integers(0, 65), st.characters(codec="ascii"))
def test_a_mistyped_key_is_none(place: int, character: str) -> None:
    plain = "slp_k3v9x2m8q0ab_" + "0" * 43
    whole = plain + secret._checksum(plain)
    wrong = whole[:place] + character + whole[place + 1 :]
    assert secret.id_of(wrong) == ("k3v9x2m8q0ab" if wrong == whole else None)


@given(st.text())
def test_no_text_is_too_strange_to_be_refused(text: str) -> None:
    with pytest.raises(RefusedKeyError) as caught:
        Keyring(KeyFile()).find(text, 0.0)
    assert caught.value.reason == "malformed"


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text("ab*", min_size=1, max_size=6), max_size=4), st.text("ab", max_size=6))
def test_patterns_are_those_of_a_shell_and_never_slow(patterns: list[str], name: str) -> None:
    found = model_pattern(patterns)
    assert (found is None or found.fullmatch(name) is not None) == any(_matches(one, name) for one in patterns)


def _matches(pattern: str, name: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(_matches(pattern[1:], name[at:]) for at in range(len(name) + 1))
    return bool(name) and name[0] == pattern[0] and _matches(pattern[1:], name[1:])


def test_a_key_with_a_known_id_and_another_secret_is_refused() -> None:
    one = new_key()
    forged = content({"id": one.key_id, "sha256": new_key().sha256})
    with pytest.raises(RefusedKeyError) as caught:
        Keyring(forged).find(one.plain, 0.0)
    assert caught.value.reason == "wrong_secret"
    assert one.plain not in "".join(traceback.format_exception(caught.value))


def test_a_tenants_key_of_the_settings_works_beside_those_of_the_file() -> None:
    tenants = [TenantSettings(name="acme", key_sha256=secret.digest("old").hex(), weight=2, priority="nearline")]
    own = new_key()
    ring = Keyring(content(entry(own, tenant="acme")), tenants)
    by_settings, by_file = ring.find("old", 0.0), ring.find(own.plain, 0.0)
    assert (by_settings.key_id, by_file.key_id) == ("tenant:acme", own.key_id)
    assert by_settings.weight == by_file.weight == 2
    assert by_settings.classes == by_file.classes


WANTED = KeyEntry(id="0" * 12, sha256="0" * 64, tenant="acme", expires=NOW + timedelta(days=90), limits={"streams": 3})


def test_rotation_leaves_two_valid_keys_that_share_their_rates() -> None:
    first, second, third = new_key(), new_key(), new_key()
    made = edits.created(KeyFile(), WANTED, first, NOW)
    once = edits.rotated(made.content, first.key_id, second, NOW + timedelta(days=30), timedelta(hours=24))
    ring, at_s = Keyring(once.content), (NOW + timedelta(days=30)).timestamp()
    old, new = ring.find(first.plain, at_s), ring.find(second.plain, at_s)
    assert old.account == new.account == first.key_id
    assert (old.tenant, old.rates) == (new.tenant, new.rates)
    with pytest.raises(RefusedKeyError, match="has expired"):
        ring.find(first.plain, at_s + 86400)
    assert ring.find(second.plain, at_s + 89 * 86400) is new, "it lasts as long as its predecessor did"
    again = edits.rotated(once.content, second.key_id, third, NOW + timedelta(days=31), timedelta())
    assert again.entry.account == first.key_id


def test_what_is_over_is_not_rotated_and_a_revoked_key_stays_revoked() -> None:
    key = new_key()
    made = edits.created(KeyFile(), WANTED, key, NOW)
    gone = edits.revoked(made.content, key.key_id, NOW)
    assert edits.revoked(gone, key.key_id, NOW + timedelta(days=1)) == gone
    with pytest.raises(ConfigError, match="is revoked"):
        edits.rotated(gone, key.key_id, new_key(), NOW, timedelta(1))
    with pytest.raises(ConfigError, match="there is no key"):
        edits.revoked(gone, "nobody", NOW)
