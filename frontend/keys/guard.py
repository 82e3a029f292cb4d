"""What the faces ask of each request: who is it, may it be here, and what may it use.

    caller = guard.caller(guard.http_credential(headers), endpoint)   # 401, 403
    caller.check_model(name)                                          # 403
    with caller.enter() as spending: ...                              # 429; see `ledger`

| endpoint                                        | needs                                            |
|-------------------------------------------------|--------------------------------------------------|
| /health/*, gRPC health checking                 | nothing: probes have no keys                     |
| /v1/*, gRPC Inference                           | a key with the scope `inference`                 |
| /metrics, /slipstream/v1/*                      | the scope `observe`, by `security.observe_needs_key` |
| /slipstream/v1/cluster                          | a global frontend's key, which it checks itself  |
| all else: the OpenAPI document, unknown paths, gRPC reflection | any key                           |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from frontend.admission.claim import Priority
from frontend.keys import metrics
from frontend.keys.connections import CallPeers
from frontend.keys.keyring import Key, Keyring, RefusedKeyError
from frontend.keys.ledger import Ledger, LimitError, Spending
from frontend.keys.vouching import CALLER_HEADER, believed
from slipstream.errors import NotAllowedError, SlipstreamError

KEY_HEADERS = ("authorization", "api-key", "x-api-key")
"""The first of them that has a key counts."""
PEER_KEY_HEADER = "x-slipstream-peer-key"
_NAMES = frozenset((*KEY_HEADERS, PEER_KEY_HEADER, CALLER_HEADER))
_HTTP_NAMES = {name.encode(): name for name in _NAMES}
_BEARER = "bearer "

NOT_ITS_FAULT = frozenset((429, 500, 503))
"""Statuses of requests that do not count against a key's rates when nothing was generated."""

OPEN = frozenset(("health", "cluster"))
SCOPES = {
    "chat": "inference",
    "completions": "inference",
    "models": "inference",
    "generate": "inference",
    "metrics": "observe",
    "explain": "observe",
    "clusters": "observe",
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request, with its key.

    Attributes:
        counts_tokens: whether tokens are counted here; a global frontend leaves that to the clusters.
    """

    key: Key
    ledger: Ledger
    counts_tokens: bool = True

    def check_model(self, model: str) -> None:
        """Whether the key is for this model, which may or may not exist.

        Raises:
            NotAllowedError: it is not.
        """
        if not self.key.may_use(model):
            metrics.refused("model")
            raise NotAllowedError(
                f"The API key {self.key.key_id} is not for the model '{model[:200]}'.",
                param="model",
                code="model_not_allowed",
            )

    def allowed_class(self, wanted: Priority | None, default: Priority) -> Priority:
        """The class of a request: the one that it names, else the default one, or the highest below it of the key's.

        Raises:
            NotAllowedError: it names one that the key is not for, or there is none.
        """
        classes = self.key.classes
        if wanted is None:
            if default in classes:
                return default
            lower = [one for one in classes if one > default]
            if lower or classes:
                return (lower or classes)[0]
            wanted = default
        if wanted not in classes:
            metrics.refused("class")
            allowed = ", ".join(one.label for one in classes) or "none"
            raise NotAllowedError(
                f"The API key {self.key.key_id} is not for the class '{wanted.label}'; it may use: {allowed}.",
                param="x-slipstream-class",
                code="class_not_allowed",
            )
        return wanted

    def enter(self) -> Spending:
        """A place for one request; see `Ledger.enter`.

        Raises:
            LimitError: there is none.
        """
        try:
            return self.ledger.enter(self.key)
        except LimitError as error:
            metrics.refused(error.reason)
            raise

    def charge(self, spending: Spending, input_tokens: int, output_tokens: int) -> None:
        """See `Spending.charge`; counted.

        Raises:
            LimitError: it cannot be had now.
        """
        try:
            spending.charge(input_tokens, output_tokens)
        except LimitError as error:
            metrics.refused(error.reason)
            raise
        own = metrics.series_of(self.key.tenant)
        own.requests.inc()
        own.input.inc(input_tokens)

    def settle(self, spending: Spending, output_tokens: int, *, void: bool) -> None:
        """See `Spending.settle`; counted."""
        spending.settle(output_tokens, void=void)
        if output_tokens:
            metrics.series_of(self.key.tenant).output.inc(output_tokens)

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """A request that is answered elsewhere, where its tokens count: a global frontend's.

        Raises:
            LimitError: it cannot be had now.
        """
        with self.enter() as spending:
            self.charge(spending, 0, 0)
            try:
                yield
            except SlipstreamError as error:
                self.settle(spending, 0, void=error.http_status in NOT_ITS_FAULT)
                raise

    def limit_headers(self) -> list[tuple[str, str]]:
        """OpenAI's `x-ratelimit-*`, as things are now. `tokens` is whichever of input and output has less left."""
        rates = self.ledger.left(self.key)
        tokens = [one for one in rates if one[0] != "requests"]
        if not self.counts_tokens:
            rates = [one for one in rates if one not in tokens]
        elif tokens:
            rates.append(("tokens", *min(tokens, key=lambda one: one[2] / one[1])[1:]))
        headers = []
        for name, limit, left, whole_in_s in rates:
            headers.append((f"x-ratelimit-limit-{name}", str(limit)))
            headers.append((f"x-ratelimit-remaining-{name}", str(left)))
            headers.append((f"x-ratelimit-reset-{name}", f"{whole_in_s:.3f}s"))
        return headers


class Guard:
    """Who may come in.

    Args:
        observe_needs_key: `security.observe_needs_key`.
        required: whether nobody comes in without a key; else only what global frontends say of callers counts.
        counts_tokens: see `Caller`.
        check_peer: raises PeerKeyError for what is no key of a global frontend; without it none is believed.
        wall_clock: Unix seconds, for the times in keys.

    Attributes:
        keyring: what `watch` read last.
    """

    def __init__(
        self,
        keyring: Keyring,
        ledger: Ledger,
        *,
        observe_needs_key: bool = True,
        required: bool = True,
        counts_tokens: bool = True,
        check_peer: Callable[[str], None] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.keyring, self.ledger = keyring, ledger
        self.peers = CallPeers()
        self._required, self._counts_tokens, self._check_peer = required, counts_tokens, check_peer
        self._observe_needs_key = observe_needs_key
        self._wall_clock = wall_clock

    def replace(self, keyring: Keyring) -> None:
        """Go by other keys from now on; requests that are already in go on."""
        self.keyring = keyring
        self.ledger.keep_only(keyring.accounts)

    def http_caller(self, headers: Iterable[tuple[bytes, bytes]], endpoint: str) -> Caller | None:
        """Who sent a request to an endpoint (a name of `frontend.http_boundary`); None where nobody asks.

        Args:
            headers: ASGI's, with names in lower case.

        Raises:
            RefusedKeyError, NotAllowedError: it may not.
        """
        if self._is_open(endpoint):
            return None
        said: dict[str, str] = {}
        for raw, value in headers:
            name = _HTTP_NAMES.get(raw)
            if name is not None:
                said.setdefault(name, value.decode("latin-1"))
        return self._caller(said, endpoint)

    def grpc_caller(self, metadata: Iterable[tuple[str, str | bytes]], endpoint: str) -> Caller | None:
        """The same of a call's metadata."""
        if self._is_open(endpoint):
            return None
        said: dict[str, str] = {}
        for name, value in metadata:
            if name in _NAMES and isinstance(value, str):
                said.setdefault(name, value)
        return self._caller(said, endpoint)

    def _is_open(self, endpoint: str) -> bool:
        return endpoint in OPEN or (not self._observe_needs_key and SCOPES.get(endpoint) == "observe")

    def _caller(self, said: dict[str, str], endpoint: str) -> Caller | None:
        if CALLER_HEADER in said and PEER_KEY_HEADER in said and self._check_peer is not None:
            self._check_peer(said[PEER_KEY_HEADER])
            key = believed(said[CALLER_HEADER])
        elif not self._required:
            return None
        else:
            key = self._key(_credential(*(said.get(name) for name in KEY_HEADERS)))
        self._check_scope(key, endpoint)
        return Caller(key, self.ledger, self._counts_tokens)

    def _key(self, credential: str) -> Key:
        try:
            if not credential:
                raise RefusedKeyError(
                    "You didn't provide an API key. Send it as `Authorization: Bearer KEY` (or `x-api-key: KEY`).",
                    "missing",
                )
            return self.keyring.find(credential, self._wall_clock())
        except RefusedKeyError as error:
            metrics.refused(error.reason)
            raise

    def _check_scope(self, key: Key, endpoint: str) -> None:
        scope = SCOPES.get(endpoint)
        if scope is not None and scope not in key.scopes:
            metrics.refused("scope")
            raise NotAllowedError(
                f"The API key {key.key_id} has not the scope '{scope}', which this needs.", code="scope_not_allowed"
            )


def _credential(authorization: str | None, *others: str | None) -> str:
    if authorization is not None and authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip()
    return next((one.strip() for one in others if one is not None), "")
