"""One replay of a trace under one routing policy, in virtual time; runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from benchmarks.router_baselines import Dynamo, LlmD
from frontend.router.choice import Router
from simulator import traces
from simulator.frontend import Policy
from simulator.journey import Summary, summarize
from simulator.run import coarse
from simulator.serving import fixed_cluster
from slipstream.performance import read_profile

TRACE = Path(__file__).with_name("traces") / "mooncake_conversation_trace.jsonl.xz"
PROFILES = Path(__file__).resolve().parent.parent / "engine" / "simulated" / "profiles"
TTFT_SLO_S, TPOT_SLO_S = 10.0, 0.1
"""The limits that Mooncake states for this trace."""

LOAD_ONLY = ("round_robin", "load", "power_of_two")
FETCHING = frozenset({"kv", "load_fetching"})
"""Policies under which prefill fetches what a decode worker has; it takes an index of who has what, as `kv` has it."""

POLICIES: dict[str, Callable[[], Policy]] = {
    "kv": lambda: Router(policy="kv"),
    "round_robin": lambda: Router(policy="round_robin"),
    "load": lambda: Router(policy="load"),
    "power_of_two": lambda: Router(policy="power_of_two"),
    "load_fetching": lambda: Router(policy="load"),
    "llm_d": LlmD,
    "dynamo": Dynamo,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Which cluster serves the trace, and how fast the trace comes.

    Attributes:
        speed: times the trace's own rate.
        requests: of the trace's beginning.
    """

    profile: str
    prefill: int
    decode: int
    speed: float
    requests: int = 1 << 30
    frontends: int = 1


def replay(setting: Setting, policy: str) -> Summary:
    """The whole of it; the same for the same arguments."""
    profile = coarse(read_profile(PROFILES / f"{setting.profile}.json"), traces.MOONCAKE_BLOCK_TOKENS)
    policies = [POLICIES[policy]() for _ in range(setting.frontends)]
    counts = setting.prefill, setting.decode
    cluster, kept = fixed_cluster((profile, profile), counts, policies, write_back=policy in FETCHING)
    cluster.run(traces.at_speed(_arrivals()[: setting.requests], setting.speed))
    return summarize(kept.journeys, ttft_slo_s=TTFT_SLO_S, tpot_slo_s=TPOT_SLO_S)


@lru_cache(maxsize=1)
def _arrivals() -> list[traces.Arrival]:
    return traces.read_mooncake(TRACE)
