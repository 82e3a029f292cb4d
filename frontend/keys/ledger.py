"""The accounts of keys: what each has had, what it has running, and whether it may have more.

    with ledger.enter(key) as spending:            # a place among the key's requests
        spending.charge(input_tokens, most_output) # counts them, and holds what the answer may need
        ...
        spending.settle(output_tokens)             # charges what it was

One request is charged as a whole or refused as a whole, so that its refusal can say after what time it fits.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from frontend.keys import table as columns
from frontend.keys.bucket import Rate, charged, given_back, level, room_in_s
from frontend.keys.keyring import Key
from frontend.keys.table import (
    CONNECTIONS,
    FULL_AT_INPUT,
    FULL_AT_OUTPUT,
    FULL_AT_REQUESTS,
    HELD,
    LAST_HELD,
    STREAMS,
    OwnTable,
    Row,
    Table,
)
from slipstream.errors import RateLimitError

SWEEP_S = 1.0
"""How often what was held for too long is looked for: other processes may wait for it."""
_FIRST_GUESS_S = 1.0
_MANY_ACCOUNTS = 20_000
_SMOOTHING = 0.2


class LimitError(RateLimitError):
    """Attributes:
    reason: which limit, for the metric.
    """

    def __init__(self, message: str, reason: str, retry_after_s: float) -> None:
        # Up, to what is told of it in thousandths: a second try must not come too early.
        super().__init__(message, retry_after_s=math.ceil(max(retry_after_s, 0.001) * 1000) / 1000)
        self.reason = reason


@dataclass(slots=True, eq=False)
class _Held:
    """Output tokens held for a request."""

    amount: float
    since_s: float
    rate: Rate
    lapsed: bool = False

    @property
    def lapses_s(self) -> float:
        return self.since_s + self.rate.fills_in_s


@dataclass(slots=True)
class Account:
    """One account, as this process sees it.

    Attributes:
        lasts_s: smoothed time that its requests take.
        last_asked: input and output tokens of the last one.
    """

    row: Row
    own: int
    holds: deque[_Held] = field(default_factory=deque)
    lasts_s: float = _FIRST_GUESS_S
    last_asked: tuple[float, float] = (0.0, 0.0)


class Ledger:
    """All accounts.

    Args:
        clock: monotonic seconds, the same for all processes of a machine.
    """

    def __init__(self, table: Table | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.table = table or OwnTable()
        self.clock = clock
        self.late_s = 0.0 if isinstance(self.table, OwnTable) else 2 * SWEEP_S
        self._accounts: dict[str, Account] = {}

    def account(self, name: str) -> Account:
        found = self._accounts.get(name)
        if found is None:
            own = columns.own_columns(self.table.member)
            found = self._accounts[name] = Account(self.table.row(name), own)
        return found

    def enter(self, key: Key) -> Spending:
        """A place for one request, and a first look whether it can be had: before it is tokenized.

        Raises:
            LimitError: there is none.
        """
        account, now_s, most = self.account(key.account), self.clock(), key.rates.streams
        with self.table.locked():
            self._lapse(account, now_s)
            if most is not None and columns.total(account.row, STREAMS) >= most:
                raise LimitError(
                    f"API key {key.key_id}: {most} requests at the same time are allowed (streams), and run.",
                    "streams",
                    account.lasts_s / most,
                )
            self._check_requests(key, account, now_s)
            account.row[account.own + STREAMS] += 1
        return Spending(self, key, account, now_s)

    def connect(self, key: Key) -> Account:
        """One more connection; `disconnect` the account when it is gone.

        Raises:
            LimitError: there are as many as may be.
        """
        account, most = self.account(key.account), key.rates.connections
        with self.table.locked():
            if most is not None and columns.total(account.row, CONNECTIONS) >= most:
                raise LimitError(
                    f"API key {key.key_id}: {most} connections at the same time are allowed, and open.",
                    "connections",
                    account.lasts_s,
                )
            account.row[account.own + CONNECTIONS] += 1
        return account

    def disconnect(self, account: Account) -> None:
        with self.table.locked():
            account.row[account.own + CONNECTIONS] -= 1

    def charge(self, spending: Spending, input_tokens: int, output_tokens: int) -> None:
        """See `Spending.charge`."""
        key, account, now_s = spending.key, spending.account, self.clock()
        rates, row = key.rates, account.row
        with self.table.locked():
            self._lapse(account, now_s)
            account.last_asked = input_tokens, output_tokens
            self._check(key, account, input_tokens, output_tokens, now_s)
            if rates.requests is not None:
                row[FULL_AT_REQUESTS] = charged(rates.requests, row[FULL_AT_REQUESTS], 1.0, now_s)
            if rates.input_tokens is not None:
                row[FULL_AT_INPUT] = charged(rates.input_tokens, row[FULL_AT_INPUT], input_tokens, now_s)
            if rates.output_tokens is not None:
                held = _Held(min(output_tokens, rates.output_tokens.capacity), now_s, rates.output_tokens)
                account.holds.append(held)
                spending.held = held
                row[account.own + HELD] += held.amount
                row[LAST_HELD] = now_s
        spending.charged_s, spending.input_tokens = now_s, input_tokens

    def leave(self, spending: Spending) -> None:
        """The request has ended, settled or not."""
        account, key, now_s = spending.account, spending.key, self.clock()
        rates, row, held = key.rates, account.row, spending.held
        account.lasts_s += _SMOOTHING * (now_s - spending.began_s - account.lasts_s)
        with self.table.locked():
            row[account.own + STREAMS] -= 1
            self._lapse(account, now_s)
            if held is not None:
                over = spending.output_tokens - held.amount if held.lapsed else spending.output_tokens
                if not held.lapsed:
                    held.lapsed = True
                    row[account.own + HELD] -= held.amount
                    if held in account.holds:
                        account.holds.remove(held)
                if over > 0:
                    row[FULL_AT_OUTPUT] = charged(held.rate, row[FULL_AT_OUTPUT], over, now_s)
            if spending.void and spending.charged_s is not None:
                self._give_back(spending, rates.requests, FULL_AT_REQUESTS, 1.0, now_s)
                self._give_back(spending, rates.input_tokens, FULL_AT_INPUT, spending.input_tokens, now_s)

    def sweep(self) -> None:
        """Charge what was held for too long, also of keys that nobody uses at the moment."""
        now_s = self.clock()
        for account in self._accounts.values():
            if account.holds:
                with self.table.locked():
                    self._lapse(account, now_s)
        if len(self._accounts) > _MANY_ACCOUNTS:  # a global frontend speaks for as many keys as it has
            self.keep_only(name for name, one in self._accounts.items() if max(one.row[:LAST_HELD]) > now_s)

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget the accounts of keys that are gone, when nothing of theirs runs."""
        kept = frozenset(names)
        for name in [one for one in self._accounts if one not in kept]:
            account = self._accounts[name]
            if not any(account.row[account.own : account.own + columns.OWN_COLUMNS]):
                del self._accounts[name]

    def left(self, key: Key) -> list[tuple[str, int, int, float]]:
        """Of each rate that is limited: its name, the limit, what is left, and seconds until it is whole again."""
        account, now_s = self.account(key.account), self.clock()
        row, rates = account.row, key.rates
        found = []
        for name, rate, column in (
            ("requests", rates.requests, FULL_AT_REQUESTS),
            ("input-tokens", rates.input_tokens, FULL_AT_INPUT),
            ("output-tokens", rates.output_tokens, FULL_AT_OUTPUT),
        ):
            if rate is not None:
                there = level(rate, row[column], now_s)
                if column == FULL_AT_OUTPUT:
                    there -= columns.total(row, HELD)
                left = max(0, math.floor(there + rate.slack))
                found.append((name, round(rate.per_s * 60), left, max(0.0, (rate.capacity - there) / rate.per_s)))
        return found

    def _check_requests(self, key: Key, account: Account, now_s: float) -> None:
        """Before it is known how many tokens a request has: whether it could be had if it had none. What is told of the
        wait counts with as many as the last one had, which for one that comes again is what it has."""
        rate = key.rates.requests
        if rate is not None and room_in_s(rate, account.row[FULL_AT_REQUESTS], 1.0, now_s):
            self._check(key, account, *account.last_asked, now_s)

    def _check(self, key: Key, account: Account, input_tokens: float, output_tokens: float, now_s: float) -> None:
        rates, row = key.rates, account.row
        worst_s, reason, limit = 0.0, "", 0.0
        for name, rate, column, amount in (
            ("requests", rates.requests, FULL_AT_REQUESTS, 1.0),
            ("input_tokens", rates.input_tokens, FULL_AT_INPUT, input_tokens),
            ("output_tokens", rates.output_tokens, FULL_AT_OUTPUT, output_tokens),
        ):
            if rate is None:
                continue
            held = columns.total(row, HELD) if column == FULL_AT_OUTPUT else 0.0
            last_s = row[LAST_HELD] + self.late_s
            wait_s = room_in_s(rate, row[column], amount, now_s, held=held, last_held_s=last_s)
            if wait_s > worst_s:
                worst_s, reason, limit = wait_s, name, rate.per_s * 60
        if reason:
            raise LimitError(
                f"Rate limit reached for API key {key.key_id}: {limit:g} {reason.replace('_', ' ')} per minute. Try "
                f"again in {worst_s:.3f} s.",
                reason,
                worst_s,
            )

    def _lapse(self, account: Account, now_s: float) -> None:
        """What was held for as long as its bucket needs to fill is charged as it is: so it is known when there is room
        at the latest."""
        holds, row = account.holds, account.row
        while holds and now_s >= holds[0].lapses_s:
            held = holds.popleft()
            held.lapsed = True
            row[account.own + HELD] -= held.amount
            row[FULL_AT_OUTPUT] = charged(held.rate, row[FULL_AT_OUTPUT], held.amount, held.lapses_s)

    def _give_back(self, spending: Spending, rate: Rate | None, column: int, amount: float, now_s: float) -> None:
        if rate is not None and spending.charged_s is not None:
            row = spending.account.row
            row[column] = given_back(rate, row[column], amount, spending.charged_s, now_s)


@dataclass(slots=True)
class Spending:
    """One request's; made by `Ledger.enter`, left once."""

    ledger: Ledger
    key: Key
    account: Account
    began_s: float
    held: _Held | None = None
    charged_s: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    void: bool = False

    def charge(self, input_tokens: int, output_tokens: int) -> None:
        """Count the request and its prompt, and hold what its answers may need.

        Raises:
            LimitError: it cannot be had now; nothing is counted.
        """
        self.ledger.charge(self, input_tokens, output_tokens)

    def settle(self, output_tokens: int, *, void: bool = False) -> None:
        """What it was in the end.

        Args:
            void: nothing was computed for it, and that is not its sender's fault: it shall not count.
        """
        self.output_tokens, self.void = output_tokens, void

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ledger.leave(self)
