"""First light's measurement: each system in turn, never two at once, and what is made of what was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from statistics import mean

from benchmarks import phases
from benchmarks.load import Answer, LoadClient
from benchmarks.phases import Interference, InterferencePlan, Sequential
from benchmarks.prompts import Prompts, mixed_lengths
from benchmarks.report import Machine, Target, at_most, below, equals, ratio
from benchmarks.samples import Spread, spread
from benchmarks.server import CpuUse, Server

# The promises, word for word.
REQUESTS_TARGET = (
    "`python -m benchmarks.first_light --json` runs 20 requests of 100, 500 and 2,000 tokens through the cluster "
    "and through one aggregated engine and prints TTFT, ITL and tokens/s of both."
)
EXPOSED_TARGET = "Exposed transfer time is at most 10% of total transfer time for prompts of 2,000 tokens"
ITL_TARGET = (
    "Disaggregated ITL p99 under a concurrent 2,000-token prompt must be below half of the aggregated one "
    "(the point of the design)."
)
CHUNKED_COMPARISON = (
    "The same against the harder rival, an aggregated engine that computes prompts in chunks as small as "
    "Slipstream's: below half of its ITL p99 too."
)

_PROMISED_REQUESTS = 20.0
_ANSWER_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked of each system."""

    model: str
    dtype: str
    seed: int = 2
    requests: int = 20
    lengths: tuple[int, ...] = (100, 500, 2000)
    max_tokens: int = 32
    interference: InterferencePlan = field(default_factory=InterferencePlan)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of requests that came one after another.

    Attributes:
        tokens_per_s: answer tokens by the time from the first request to the end of the last.
        prefill_ms, transfer_ms, rest_of_ttft_ms: means of where the time to the first token went, where the system
            tells: until the prompt was handed over, while its blocks were copied, and all else (HTTP, routing, the
            decode worker's admission and first step).
    """

    requests: int
    ttft: Spread | None
    itl: Spread | None
    tokens_per_s: float
    prefill_ms: float | None = None
    transfer_ms: float | None = None
    exposed_ms: float | None = None
    rest_of_ttft_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Disturbed:
    """Of steady streams beside long prompts.

    Attributes:
        itl: under a long prompt's prefill.
        itl_quiet: of the same streams otherwise.
        prefill_ttft: the long prompts' own TTFT.
        came_together: share of tokens that came in one network read with the one before; their latency is 0.
        cpu_cores, client_cpu_cores, others_cores: CPU seconds a second of the server, this client, and all else.
    """

    streams: int
    long_prompts: int
    itl: Spread | None
    itl_quiet: Spread | None
    prefill_ttft: Spread | None
    tokens_per_s_under_prefill: float
    came_together: float
    cpu_cores: float
    client_cpu_cores: float
    others_cores: float


@dataclass(frozen=True, slots=True)
class SystemResult:
    """One system.

    Attributes:
        others_cores: what everything else on the machine took during the requests one after another; figures are
            only good when it is near 0. The interference phase has its own.
        tokens_without_event: answer tokens that had no SSE event of their own (no text yet).
        same_answers: requests answered word for word like the first system's.
    """

    name: str
    description: str
    start_s: float
    idle_cores: float
    others_cores: float
    cpu_s_per_request: float
    tokens_without_event: int
    same_answers: int
    all_lengths: Latencies
    by_length: dict[str, Latencies]
    interference: Disturbed


@dataclass(frozen=True, slots=True)
class Report:
    """What `--json` prints. `comparisons` are judged like targets but were not promised."""

    benchmark: str
    targets: list[Target]
    comparisons: list[Target]
    machine: Machine
    settings: Settings
    systems: list[SystemResult]


@dataclass(frozen=True, slots=True)
class Seen:
    """All that was seen of one system."""

    server: Server
    description: str
    idle_cores: float
    sequential: Sequential
    interference: Interference


async def measure(
    entered: AbstractAsyncContextManager[Server],
    description: str,
    settings: Settings,
    words: Sequence[int],
    say: Callable[[str], None],
) -> Seen:
    """Start one system, put both loads on it, stop it.

    Raises:
        SlipstreamError: it did not start, or failed a request.
    """
    async with entered as server:
        say(f"{server.name}: ready after {server.start_s:.1f} s; warming up")
        async with LoadClient(server.url, server.model, timeout_s=_ANSWER_TIMEOUT_S) as client:
            await phases.warm_up(
                client, Prompts(words, settings.seed + 1), settings.lengths, settings.interference.streams
            )
            idle = await phases.idle_cores(server)
            say(f"{server.name}: {settings.requests} requests one after another")
            asked = Prompts(words, settings.seed)
            lengths = mixed_lengths(settings.lengths, settings.requests, settings.seed)
            sequential = await phases.one_after_another(
                server, client, [asked.draw(tokens) for tokens in lengths], settings.max_tokens
            )
            say(f"{server.name}: long prompts beside {settings.interference.streams} steady streams")
            seen = await phases.interference(server, client, asked, settings.interference, _saying(server.name, say))
        say(f"{server.name}: stopping")
    return Seen(server, description, idle, sequential, seen)


def _saying(name: str, say: Callable[[str], None]) -> Callable[[Interference], None]:
    def progress(seen: Interference) -> None:
        say(f"{name}: {len(seen.long_answers)} long prompts, {len(seen.disturbed_s)} latencies under them")

    return progress


def report(settings: Settings, machine: Machine, seen: Sequence[Seen]) -> Report:
    """Of the cluster, the aggregated engine and, where there is one, the aggregated engine with small steps."""
    systems = [_system(one, seen[0], settings) for one in seen]
    p99_ms = [one.interference.itl.p99_ms if one.interference.itl else None for one in systems]
    longest = systems[0].by_length[str(max(settings.lengths))]
    answered = float(min(one.all_lengths.requests for one in systems[:2]))
    targets = [
        equals("requests_answered_by_both", answered, _PROMISED_REQUESTS, REQUESTS_TARGET),
        below("itl_p99_under_prefill_of_aggregated", ratio(p99_ms[0], p99_ms[1]), 0.5, ITL_TARGET),
        at_most("exposed_share_of_transfer", ratio(longest.exposed_ms, longest.transfer_ms), 0.1, EXPOSED_TARGET),
    ]
    comparisons = [
        below(f"itl_p99_under_prefill_of_{one.name}", ratio(p99_ms[0], its_p99_ms), 0.5, CHUNKED_COMPARISON)
        for one, its_p99_ms in zip(systems[2:], p99_ms[2:], strict=True)
    ]
    return Report("first_light", targets, comparisons, machine, settings, systems)


def _system(seen: Seen, reference: Seen, settings: Settings) -> SystemResult:
    sequential = seen.sequential
    answers = sequential.answers
    by_length = {
        str(tokens): latencies([answer for answer in answers if answer.prompt_tokens == tokens])
        for tokens in settings.lengths
    }
    return SystemResult(
        name=seen.server.name,
        description=seen.description,
        start_s=round(seen.server.start_s, 2),
        idle_cores=round(seen.idle_cores, 4),
        others_cores=_others_cores(sequential.cpu),
        cpu_s_per_request=round(sequential.cpu.server_s / len(answers), 4),
        tokens_without_event=sum(answer.completion_tokens - len(answer.arrivals_s) for answer in answers),
        same_answers=_same(answers, reference.sequential.answers),
        all_lengths=latencies(answers),
        by_length=by_length,
        interference=disturbed(seen.interference, settings.interference.streams),
    )


def _others_cores(used: CpuUse) -> float:
    return round(used.others_s / used.wall_s, 3)


def _same(answers: Sequence[Answer], others: Sequence[Answer]) -> int:
    return sum(answer.text == other.text for answer, other in zip(answers, others, strict=True))


def latencies(answers: Sequence[Answer]) -> Latencies:
    """Of answers that came one after another."""
    gaps_s = [gap_s for answer in answers for gap_s in answer.gaps_s]
    spent_s = sum(answer.ended_s - answer.sent_s for answer in answers)
    tokens = sum(answer.completion_tokens for answer in answers)
    return Latencies(
        requests=len(answers),
        ttft=spread([answer.ttft_s for answer in answers]),
        itl=spread(gaps_s),
        tokens_per_s=round(tokens / spent_s, 2) if spent_s else 0.0,
        **_ways_of_ttft(answers),
    )


def _ways_of_ttft(answers: Sequence[Answer]) -> Mapping[str, float]:
    accounted = [(answer, answer.account) for answer in answers if answer.account is not None]
    if not accounted:
        return {}
    prefill_s = mean(account["prefill_s"] for _, account in accounted)
    transfer_s = mean(account["transfer_s"] for _, account in accounted)
    exposed_s = mean(account["transfer_exposed_s"] for _, account in accounted)
    ttft_s = mean(answer.ttft_s for answer, _ in accounted)
    return {
        "prefill_ms": round(prefill_s * 1e3, 3),
        "transfer_ms": round(transfer_s * 1e3, 3),
        "exposed_ms": round(exposed_s * 1e3, 3),
        "rest_of_ttft_ms": round((ttft_s - prefill_s - exposed_s) * 1e3, 3),
    }


def disturbed(seen: Interference, streams: int) -> Disturbed:
    """Of one interference phase."""
    windows_s = sum(window.end_s - window.start_s for window in seen.windows)
    return Disturbed(
        streams=streams,
        long_prompts=len(seen.windows),
        itl=spread(seen.disturbed_s),
        itl_quiet=spread(seen.quiet_s),
        prefill_ttft=spread([answer.ttft_s for answer in seen.long_answers]),
        tokens_per_s_under_prefill=round(len(seen.disturbed_s) / windows_s, 2) if windows_s else 0.0,
        came_together=round(1 - seen.reads / seen.arrivals, 4) if seen.arrivals else 0.0,
        cpu_cores=round(seen.cpu.server_s / seen.cpu.wall_s, 3),
        client_cpu_cores=round(seen.cpu.client_s / seen.cpu.wall_s, 3),
        others_cores=_others_cores(seen.cpu),
    )
