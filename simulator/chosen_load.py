"""Makes the load that was asked for, and says what it amounts to."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import msgspec

from frontend import access_log
from simulator.load_choice import MOST_TOKENS, LoadChoice, TraceFormat
from simulator.loads import Constant, DailyCycle, Lognormal, Poisson, Prefixes, Switching, Synthetic
from simulator.traces import MOONCAKE_BLOCK_TOKENS, Arrival, at_speed, read_access_log, read_azure, read_mooncake
from slipstream.errors import ConfigError

PREFIX_COUNT = 4
SYNTHETIC_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Load:
    """What was chosen, ready to run as often as is wanted.

    Attributes:
        block_tokens: of the blocks that the keys stand for; 0: there are none.
        begin: the requests from the beginning.
        about: in a few words, for people.
    """

    begin: Callable[[], Iterator[Arrival]]
    block_tokens: int
    about: str

    def faster(self, factor: float) -> Load:
        """The same requests, `factor` times as close together."""
        return Load(lambda: at_speed(self.begin(), factor), self.block_tokens, self.about)


class LoadSummary(msgspec.Struct, frozen=True):
    """What a load amounts to.

    Attributes:
        hit_rate: of the prompt tokens, those that came before as a prompt's beginning: what a cache without limit has.
    """

    requests: int
    duration_s: float
    rate_per_s: float
    input_tokens: float
    input_variation: float
    output_tokens: float
    hit_rate: float


def default_requests(rate_per_s: float) -> int:
    """Enough for a 99th percentile, and for two minutes of what runs at once."""
    return min(max(2000, math.ceil(rate_per_s * 120.0)), 50_000)


def load_of(choice: LoadChoice) -> Load:
    """Make it; a trace is read at once.

    Raises:
        ConfigError: the trace cannot be read.
    """
    if choice.trace:
        return _trace(choice)
    requests = choice.requests or (0 if choice.duration_s else default_requests(choice.rate_per_s))
    load = Synthetic(
        _rate(choice),
        _lengths(choice.input_tokens, choice.input_variation),
        _lengths(choice.output_tokens, choice.output_variation),
        duration_s=choice.duration_s or math.inf,
        requests=requests,
        gaps=Switching() if choice.shape == "bursts" else Poisson(),
        prefixes=_prefixes(choice) if choice.hit_rate > 0 else None,
        block_tokens=SYNTHETIC_BLOCK_TOKENS,
        seed=choice.seed,
    )
    return Load(lambda: iter(load), 0 if load.prefixes is None else SYNTHETIC_BLOCK_TOKENS, about(choice))


def about(choice: LoadChoice) -> str:
    """In a few words, for people."""
    if choice.trace:
        speed = f" at {choice.speed:g} times its speed" if choice.speed != 1 else ""
        return f"{Path(choice.trace).name}{speed}"
    return (
        f"{choice.rate_per_s:g} requests/s ({choice.shape}), {choice.input_tokens:g} tokens in, "
        f"{choice.output_tokens:g} out, hit rate {choice.hit_rate:.0%}"
    )


def summary_of(arrivals: Iterable[Arrival], block_tokens: int) -> LoadSummary:
    """Counted request by request."""
    requests = inputs = squares = outputs = hits = 0
    last_s = 0.0
    known: set[int] = set()
    for arrival in arrivals:
        requests += 1
        last_s = arrival.at_s
        inputs += arrival.input_tokens
        squares += arrival.input_tokens**2
        outputs += arrival.output_tokens
        new = next((place for place, key in enumerate(arrival.keys) if key not in known), len(arrival.keys))
        hits += min(new * block_tokens, arrival.input_tokens - 1)
        known.update(arrival.keys)
    if not requests:
        raise ConfigError("the load holds no requests", param="load")
    mean = inputs / requests
    return LoadSummary(
        requests=requests,
        duration_s=last_s,
        rate_per_s=requests / last_s if last_s > 0 else float(requests),
        input_tokens=mean,
        input_variation=math.sqrt(max(0.0, squares / requests - mean * mean)) / mean,
        output_tokens=outputs / requests,
        hit_rate=hits / inputs,
    )


def _trace(choice: LoadChoice) -> Load:
    file = Path(choice.trace).expanduser()
    try:
        name = _format(file) if choice.format == "auto" else choice.format
        arrivals = {"mooncake": read_mooncake, "azure": read_azure, "access-log": read_access_log}[name](file)
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"trace {file}: cannot be read ({reason})", param="trace") from None
    sizes = {"mooncake": MOONCAKE_BLOCK_TOKENS, "access-log": access_log.BLOCK_TOKENS}
    block_tokens = sizes[name] if any(one.keys for one in arrivals) else 0
    if choice.requests:
        arrivals = arrivals[: choice.requests]
    if choice.duration_s:
        arrivals = [one for one in arrivals if one.at_s <= choice.duration_s * choice.speed]
    return Load(lambda: at_speed(arrivals, choice.speed), block_tokens, about(choice))


def _format(file: Path) -> TraceFormat:
    """By the file's name, and by its first line."""
    if file.name.removesuffix(".xz").endswith(".csv"):
        return "azure"
    with lzma.open(file) if file.suffix == ".xz" else file.open("rb") as lines:
        return "mooncake" if b'"hash_ids"' in lines.readline(1 << 20) else "access-log"


def _rate(choice: LoadChoice) -> Constant | DailyCycle:
    if choice.shape != "daily":
        return Constant(choice.rate_per_s)
    ratio = choice.peak_to_trough
    # A sinusoid's mean lies in the middle of trough and peak.
    return DailyCycle(2 * choice.rate_per_s * ratio / (1 + ratio), ratio, choice.period_s)


def _lengths(mean: float, variation: float) -> Lognormal:
    return Lognormal(mean, variation, most=MOST_TOKENS)


def _prefixes(choice: LoadChoice) -> Prefixes:
    """Prefixes of which so much of the prompts' tokens is made up: shorter prompts are nothing but a prefix."""
    low, high = 1.0, float(MOST_TOKENS)
    for _ in range(40):
        middle = (low + high) / 2
        if _shared(choice, middle) < choice.hit_rate * choice.input_tokens:
            low = middle
        else:
            high = middle
    return Prefixes(PREFIX_COUNT, math.ceil(high / SYNTHETIC_BLOCK_TOKENS) * SYNTHETIC_BLOCK_TOKENS)


def _shared(choice: LoadChoice, prefix: float) -> float:
    """The mean of a prompt's length, counted up to so many tokens. Lengths are lognormal."""
    if choice.input_variation == 0:
        return min(prefix, choice.input_tokens)
    square = math.log1p(choice.input_variation**2)
    sigma, middle, normal = math.sqrt(square), math.log(choice.input_tokens) - square / 2, NormalDist()
    place = (math.log(prefix) - middle) / sigma
    return choice.input_tokens * normal.cdf(place - sigma) + prefix * (1 - normal.cdf(place))
