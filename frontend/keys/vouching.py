"""What a global frontend says of a caller to a cluster, in place of the caller's key, which goes no further than to it.

    x-slipstream-caller: k3v9x2m8q0ab;acme;3.0;realtime,batch;*;1000.0,60000.0;200.0,12000.0;512;k3v9x2m8q0ab

are the key's id and tenant, the tenant's weight, the classes and the model that it may use (`*`: any), its rates of
input and output tokens (tokens per second, and at once; empty: none), what is held for an answer without a limit, and
the account that rotated keys share. It is believed from who has a key of `admission.peer_key_sha256`. A global frontend
has no tokenizer: the rates of tokens are kept by the frontends of the clusters, each its own, and all others by the
global frontend.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from frontend.admission.claim import Priority
from frontend.keys.bucket import Rate
from frontend.keys.keyring import Key, Rates
from slipstream.errors import InvalidApiKeyError

CALLER_HEADER = "x-slipstream-caller"
_CLASSES = {one.label: one for one in Priority}
_NAME = re.compile(r"[A-Za-z0-9._:@-]{1,100}")
_PARTS = 9


def vouched(key: Key, model: str) -> str:
    """What is said of a key whose request for a model was let in."""
    rates = key.rates
    return ";".join(
        (
            key.key_id,
            key.tenant,
            repr(key.weight),
            ",".join(one.label for one in key.classes),
            "*" if key.models is None else quote(model, safe=""),
            _said(rates.input_tokens),
            _said(rates.output_tokens),
            str(rates.reserve_output_tokens),
            key.account,
        )
    )


def believed(said: str) -> Key:
    """The key that was said, without its secret.

    Raises:
        InvalidApiKeyError: it is nothing that a global frontend says.
    """
    parts = said.split(";")
    try:
        if len(parts) != _PARTS or not all(_NAME.fullmatch(parts[place]) for place in (0, 1, 8)):
            raise ValueError
        weight = float(parts[2])
        if not 0 < weight <= 1e6:
            raise ValueError
        return Key(
            key_id=parts[0],
            digest=b"",
            tenant=parts[1],
            account=parts[8],
            weight=weight,
            classes=tuple(_CLASSES[name] for name in parts[3].split(",") if name),
            models=None if parts[4] == "*" else re.compile(re.escape(unquote(parts[4]))),
            rates=Rates(
                input_tokens=_rate(parts[5]), output_tokens=_rate(parts[6]), reserve_output_tokens=max(1, int(parts[7]))
            ),
        )
    except (ValueError, KeyError):
        raise InvalidApiKeyError(
            "The global frontend's word for a caller is not understood here: the two are of different versions."
        ) from None


def _said(rate: Rate | None) -> str:
    return "" if rate is None else f"{rate.per_s!r},{rate.capacity!r}"


def _rate(said: str) -> Rate | None:
    if not said:
        return None
    per_s, capacity = map(float, said.split(","))
    if not (0 < per_s < 1e15 and 1 <= capacity < 1e15):
        raise ValueError
    return Rate(per_s, capacity)
