"""Four ways to serve the same requests on the same cores, one after the other, and what is made of what was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks import phases
from benchmarks.arrivals import Driven, Load, draw, drive
from benchmarks.load import LoadClient
from benchmarks.nixl_pair import Placement
from benchmarks.prompts import Prompts
from benchmarks.report import Machine, Target, at_least, at_most, below, ratio
from benchmarks.samples import Spread, spread
from benchmarks.server import Server

# The promise, word for word. It has three numbers, and each busy load is held to all of them.
TARGET = "(d) has half the TTFT p50 and twice the tokens/s of (a) or better, and lower ITL p99 than (c)."
CALM_COMPARISON = f"Where the requests ask for less than any system can give: {TARGET}"
AS_SHIPPED_COMPARISON = "The same beside (b), the pair as shipped, whose connector puts both engines on one core."
AGGREGATED_COMPARISON = "Beside (c), one aggregated engine on both cores: TTFT p50 no higher, tokens/s no lower."

NIXL, AS_SHIPPED, AGGREGATED, SLIPSTREAM = "nixl", "nixl_as_shipped", "aggregated", "slipstream"
DESCRIPTIONS = {
    NIXL: "(a) vLLM with NixlConnector: one prefill, one decode, a core each; the affinity side effect undone",
    AS_SHIPPED: "(b) the same as shipped",
    AGGREGATED: "(c) one aggregated vLLM engine on all cores, its own step size",
    SLIPSTREAM: "(d) slipstream up: one prefill and one decode worker, default settings",
}

# What a machine does on its own; with more, somebody else was computing.
QUIET_CORES = 0.1

# Above what the slowest of them takes for an answer when it has fallen far behind.
_ANSWER_TIMEOUT_S = 240.0
_WARM_STREAMS = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked of each system."""

    model: str
    dtype: str
    seed: int
    loads: tuple[Load, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """All that was seen of one system."""

    server: Server
    idle_cores: float
    driven: Mapping[str, Driven]
    placements: Sequence[Placement] = ()


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One load on one system.

    Attributes:
        failed: requests without a whole answer; they are in none of the figures.
        duration_s: from the first request to the end of the last answer.
        tokens_per_s: answer tokens by that time; no system can have more than the requests ask for.
        cpu_s, cpu_s_per_1000_tokens: of the servers, with all their processes.
        client_cores, others_cores: CPU seconds a second of this client, and of everything else on the machine.
        sent_late_ms: the longest that a request was sent after its time.
        same_answers: word for word those of Slipstream.
    """

    requests: int
    failed: int
    ttft: Spread | None
    itl: Spread | None
    duration_s: float
    tokens_per_s: float
    cpu_s: float
    cpu_s_per_1000_tokens: float | None
    client_cores: float
    others_cores: float
    sent_late_ms: float
    same_answers: int
    failures: list[str]


@dataclass(frozen=True, slots=True)
class SystemResult:
    """One system. `placements` are of its engines' threads, where that is in question."""

    name: str
    description: str
    start_s: float
    idle_cores: float
    loads: dict[str, LoadResult]
    placements: list[Placement]


@dataclass(frozen=True, slots=True)
class Report:
    """What `--json` prints. `comparisons` are judged like targets but were not promised.

    Attributes:
        skipped: systems that could not be measured here, and why.
        disturbed: loads during which other programs took more than `QUIET_CORES`, as `system load`, and how many
            cores those took. Where there are any, systems were not compared under the same conditions.
    """

    benchmark: str
    targets: list[Target]
    comparisons: list[Target]
    machine: Machine
    settings: Settings
    systems: list[SystemResult]
    skipped: dict[str, str] = field(default_factory=dict)
    disturbed: dict[str, float] = field(default_factory=dict)


async def measure(
    server: Server,
    settings: Settings,
    words: Sequence[int],
    say: Callable[[str], None],
    look: Callable[[], Sequence[Placement]] = tuple,
) -> Seen:
    """All loads on one running system.

    Args:
        look: where its engines' threads are; asked after the last load.

    Raises:
        SlipstreamError: it failed a request of the warm-up.
    """
    say(f"{server.name}: ready after {server.start_s:.1f} s; warming up")
    async with LoadClient(server.url, server.model, timeout_s=_ANSWER_TIMEOUT_S) as client:
        lengths = [load.prompt_tokens for load in settings.loads]
        # Apart from those that are measured, so that nothing of them is in a prefix cache.
        await phases.warm_up(client, Prompts(words, -1 - settings.seed), lengths, _WARM_STREAMS)
        idle = await phases.idle_cores(server)
        driven = {}
        for place, load in enumerate(settings.loads):
            say(f"{server.name}: {load.name}, {load.requests} requests, {load.rate_per_s:g} a second")
            arrivals = draw(load, words, settings.seed + place)
            driven[load.name] = await drive(server, client, arrivals, load.max_tokens)
        placements = look()
    say(f"{server.name}: stopping")
    return Seen(server, idle, driven, placements)


def report(settings: Settings, machine: Machine, seen: Mapping[str, Seen], skipped: Mapping[str, str]) -> Report:
    """Of all systems that were measured; Slipstream's has to be among them."""
    systems = {name: _system(name, one, seen[SLIPSTREAM]) for name, one in seen.items()}
    targets: list[Target] = []
    comparisons: list[Target] = []
    for load in settings.loads:
        of = {name: system.loads[load.name] for name, system in systems.items()}
        ours, nixl, shipped, aggregated = (of.get(name) for name in (SLIPSTREAM, NIXL, AS_SHIPPED, AGGREGATED))
        assert ours is not None
        begin = load.name
        words = TARGET if load.busy else CALM_COMPARISON
        promised = [
            at_most(f"{begin}_ttft_p50_of_nixl", _ttft(ours, nixl), 0.5, words),
            at_least(f"{begin}_tokens_per_s_of_nixl", _speed(ours, nixl), 2.0, words),
            below(f"{begin}_itl_p99_of_aggregated", _itl(ours, aggregated), 1.0, words),
        ]
        (targets if load.busy else comparisons).extend(promised)
        comparisons += [
            at_most(f"{begin}_ttft_p50_of_nixl_as_shipped", _ttft(ours, shipped), 0.5, AS_SHIPPED_COMPARISON),
            at_least(f"{begin}_tokens_per_s_of_nixl_as_shipped", _speed(ours, shipped), 2.0, AS_SHIPPED_COMPARISON),
            at_most(f"{begin}_ttft_p50_of_aggregated", _ttft(ours, aggregated), 1.0, AGGREGATED_COMPARISON),
            at_least(f"{begin}_tokens_per_s_of_aggregated", _speed(ours, aggregated), 1.0, AGGREGATED_COMPARISON),
        ]
    ordered = [systems[name] for name in DESCRIPTIONS if name in systems]
    disturbed = {
        f"{system.name} {load}": result.others_cores
        for system in ordered
        for load, result in system.loads.items()
        if result.others_cores > QUIET_CORES
    }
    return Report("pd_vs_nixl", targets, comparisons, machine, settings, ordered, dict(skipped), disturbed)


def _ttft(ours: LoadResult, theirs: LoadResult | None) -> float | None:
    return _of(ours, theirs, lambda one: one.ttft.p50_ms if one.ttft else None)


def _itl(ours: LoadResult, theirs: LoadResult | None) -> float | None:
    return _of(ours, theirs, lambda one: one.itl.p99_ms if one.itl else None)


def _speed(ours: LoadResult, theirs: LoadResult | None) -> float | None:
    return _of(ours, theirs, lambda one: one.tokens_per_s)


def _of(ours: LoadResult, theirs: LoadResult | None, figure: Callable[[LoadResult], float | None]) -> float | None:
    # Who drops requests is quick with the rest: such a figure says nothing in our favour.
    if theirs is None or ours.failed:
        return None
    return ratio(figure(ours), figure(theirs))


def _system(name: str, seen: Seen, reference: Seen) -> SystemResult:
    return SystemResult(
        name=name,
        description=DESCRIPTIONS[name],
        start_s=round(seen.server.start_s, 2),
        idle_cores=round(seen.idle_cores, 3),
        loads={load: load_result(driven, reference.driven[load]) for load, driven in seen.driven.items()},
        placements=list(seen.placements),
    )


def load_result(driven: Driven, reference: Driven) -> LoadResult:
    """The figures of one load; `reference` is what the answers are compared with."""
    answers = [answer for answer in driven.answers if answer is not None]
    tokens = sum(answer.completion_tokens for answer in answers)
    began_s = min((answer.sent_s for answer in answers), default=0.0)
    duration_s = max((answer.ended_s for answer in answers), default=0.0) - began_s
    pairs = zip(driven.answers, reference.answers, strict=True)
    return LoadResult(
        requests=len(driven.answers),
        failed=len(driven.answers) - len(answers),
        ttft=spread([answer.ttft_s for answer in answers]),
        itl=spread([gap_s for answer in answers for gap_s in answer.gaps_s]),
        duration_s=round(duration_s, 2),
        tokens_per_s=round(tokens / duration_s, 2) if duration_s else 0.0,
        cpu_s=round(driven.cpu.server_s, 2),
        cpu_s_per_1000_tokens=round(driven.cpu.server_s / tokens * 1e3, 2) if tokens else None,
        client_cores=round(driven.cpu.client_s / driven.cpu.wall_s, 3),
        others_cores=round(driven.cpu.others_s / driven.cpu.wall_s, 3),
        sent_late_ms=round(driven.late_s * 1e3, 2),
        same_answers=sum(one is not None and other is not None and one.text == other.text for one, other in pairs),
        failures=sorted(set(driven.failures)),
    )
