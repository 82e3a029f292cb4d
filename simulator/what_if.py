"""Questions to the simulator as plain data: what would a policy do under a load, and what pool does a load need?

`slipstream planner simulate` and `recommend` ask them here; the planner's gRPC service asks a child process
(`simulator.child`), so that a long simulation never holds up the control plane.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from engine.simulated.profile_choice import PACKAGED, profile_path
from planner.objectives import ModelObjectives, Objective
from planner.policy import SloPolicy
from planner.policy_file import parse_policy
from planner.scaling import Counts
from simulator.chosen_load import Load, load_of
from simulator.load_choice import LoadChoice
from simulator.outcome import Outcome
from simulator.pool_trials import Pool
from simulator.recommend import Recommendation, recommend
from simulator.run import ModelSetup, Setup, simulate
from simulator.traces import Arrival, assigned
from slipstream.errors import ConfigError
from slipstream.performance import Profile, read_profile

DEFAULT_PROFILES = ("qwen3-32b-h200",)
SAY_EVERY = 250
"""Requests between two words of progress."""

_COUNTS = re.compile(r"(\d{1,4})P(\d{1,4})D", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Limit = Annotated[float, Meta(gt=0, le=86400)]


class SimulateAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What would this policy do under this load?

    Attributes:
        policy_yaml, policy_name: a policy file's text, and its name for errors.
        model: that the load is for; the policy's first when empty.
        profiles: by model, where the policy names none, or another one is wanted.
        workers: that are there from the beginning on, as `2P3D`; the policy's least when empty.
        fixed: they stay as they are; the policy only says what requests shall get.
        flip_s: in which a worker that changes its role gets nothing.
        start_unix_s: what the load's beginning is by people's clocks, for the policy's schedule.
    """

    policy_yaml: str
    load: LoadChoice
    policy_name: str = "policy"
    model: str = ""
    profiles: dict[str, str] = {}
    workers: str = ""
    fixed: bool = False
    flip_s: Annotated[float, Meta(ge=0, le=3600)] = 2.0
    series_s: Annotated[float, Meta(ge=1, le=86400)] = 30.0
    start_unix_s: Annotated[float, Meta(ge=0)] = 0.0


class RecommendAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What pool does this load need? `profiles` as `profiles_of` has them."""

    load: LoadChoice
    profiles: tuple[str, ...] = DEFAULT_PROFILES
    ttft_s: Limit = 2.0
    itl_s: Limit = 0.05
    percentile: Annotated[float, Meta(ge=1, le=99.99)] = 99.0
    max_gpus: Annotated[int, Meta(ge=1, le=1024)] = 64


def answer_simulate(ask: SimulateAsk, said: Callable[[int, float], None] = lambda requests, at_s: None) -> Outcome:
    """Run it.

    Args:
        said: told now and then how many requests came, and the load's time.

    Raises:
        ConfigError: the policy, a profile or the load is wrong.
    """
    policy = parse_policy(ask.policy_yaml, ask.policy_name)
    chosen = policy.of(ask.model) if ask.model else policy.models[0]
    if chosen is None:
        names = ", ".join(one.model for one in policy.models)
        raise ConfigError(f"model {ask.model} is not in {ask.policy_name}, which has {names}", param="model")
    profiles = {one.model: _profile(one, ask) for one in policy.models}
    load = load_of(ask.load)
    return simulate(
        Setup(
            tuple(_setup(one, profiles[one.model], ask, chosen) for one in policy.models),
            _told(load, chosen.model, said),
            policy=None if ask.fixed else SloPolicy(policy, profiles),
            gpu_budget=0 if ask.fixed else policy.gpu_budget,
            seed=ask.load.seed,
            interval_s=policy.interval_s,
            start_s=policy.start_s,
            flip_s=ask.flip_s,
            series_s=ask.series_s,
            start_unix_s=ask.start_unix_s,
            block_tokens=load.block_tokens,
        )
    )


def answer_recommend(ask: RecommendAsk, said: Callable[[Pool], None] = lambda pool: None) -> Recommendation:
    """Search; `said` is told of each pool that was simulated.

    Raises:
        ConfigError: a profile or the load is wrong.
    """
    objective = Objective(ask.ttft_s, ask.itl_s, ask.percentile)
    profiles = profiles_of(ask.profiles)
    return recommend(load_of(ask.load), objective, profiles, max_gpus=ask.max_gpus, seed=ask.load.seed, said=said)


def profiles_of(names: tuple[str, ...]) -> list[Profile]:
    """Packaged profiles by name, or by all of a name but the `-tp1` at its end; or files.

    Raises:
        ConfigError: there is none of that name.
    """
    found: dict[Path, Profile] = {}
    for name in names:
        variants = sorted(PACKAGED.glob(f"{name}-tp*.json")) if _PLAIN_NAME.fullmatch(name) else []
        files = variants or [profile_path(Path(name))]
        if not files[0].exists():
            packaged = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.json")))
            raise ConfigError(
                f"profile {name}: no such file or packaged profile; packaged are {packaged}", param="profile"
            )
        found.update({file: read_profile(file) for file in files})
    return sorted(found.values(), key=lambda profile: (profile.gpus, profile.name))


def _profile(one: ModelObjectives, ask: SimulateAsk) -> Profile:
    name = ask.profiles.get(one.model) or one.profile
    if not name:
        raise ConfigError(
            f"{ask.policy_name}: {one.model} names no profile, and a simulated worker has none of its own",
            param="profile",
        )
    return read_profile(profile_path(Path(name)))


def _setup(one: ModelObjectives, profile: Profile, ask: SimulateAsk, chosen: ModelObjectives) -> ModelSetup:
    counts = Counts(one.bounds.min_prefill, one.bounds.min_decode)
    if one is chosen and ask.workers:
        matched = _COUNTS.fullmatch(ask.workers)
        if matched is None:
            raise ConfigError(f"workers = {ask.workers} must be counts such as 2P3D, or 0P4D", param="workers")
        counts = Counts(int(matched[1]), int(matched[2]))
    return ModelSetup(one.model, profile, counts, one.objectives)


def _told(load: Load, model: str, said: Callable[[int, float], None]) -> Iterator[Arrival]:
    for number, arrival in enumerate(assigned(load.begin(), model=model), start=1):
        if number % SAY_EVERY == 0:
            said(number, arrival.at_s)
        yield arrival
