"""`simulate`: one run of a cluster under a load, with or without a scaling policy. The same for the same setup.

What the command line and the benchmarks call. See docs/simulator.md for what is modelled and what is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec

from engine.simulated.profile_choice import profile_path
from frontend.router.choice import PolicyName, Router
from planner.objectives import Objective
from planner.scaling import Counts, ScalingPolicy
from simulator.frontend import Policy
from simulator.journey import KeptJourneys
from simulator.members import Member
from simulator.observing import Observer
from simulator.outcome import Limits, Outcome, WorkerLife
from simulator.scaling import ControlLoop, SimulatedScaler, role_name
from simulator.serving import ServedModel, SimulatedCluster
from simulator.tally import Counts as Tallied
from simulator.tally import Tally
from simulator.traces import Arrival
from slipstream.errors import ConfigError
from slipstream.performance import Profile, read_profile
from slipstream.settings import AdmissionSettings, FrontendSettings
from slipstream.v1.registry_pb2 import Role, WorkerState


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """One model of a run.

    Attributes:
        profile: of its workers: a packaged profile's name, a file, or the profile itself.
        decode_profile: of workers that start as decode workers, where it is another one.
        counts: workers that are there from the beginning on.
        objectives: limits by class (`realtime`, `nearline`, `batch`); a class without any is good when it finishes.
        routing: the frontends' policy, or a function that makes one for each frontend.
    """

    name: str
    profile: Profile | Path | str
    counts: Counts
    objectives: Mapping[str, Objective] = field(default_factory=dict)
    decode_profile: Profile | Path | str | None = None
    routing: PolicyName = "kv"


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker dies at a time: the one named, or one by lot that is ready and of that model and role, where given."""

    at_s: float
    worker_id: str = ""
    model: str = ""
    role: Role.ValueType = Role.ROLE_UNSPECIFIED


@dataclass(frozen=True, slots=True)
class Setup:
    """All of a run.

    Attributes:
        load: in order of time; read once, as time passes.
        policy: changes the workers; None: they stay what `counts` say.
        gpu_budget: of all workers together, starting and draining ones too; 0: no limit.
        interval_s: between two decisions.
        start_s: from a worker's start until it is ready; flip_s: in which a worker that changes its role gets nothing.
        admission: in front of every router; None: everything goes to the workers at once.
        frontends: of each model.
        series_s: length of a piece of `Outcome.series`.
        start_unix_s: what the load's beginning is by people's clocks, for daily seasons.
        block_tokens: KV blocks of this size, for a load whose keys are of such blocks; 0: the profiles' own.
        step_by_step: an event for each step of each worker; the same results, only slower.
        keep_journeys: keep each request's; memory grows with their number.
    """

    models: tuple[ModelSetup, ...]
    load: Iterable[Arrival]
    policy: ScalingPolicy | None = None
    gpu_budget: int = 0
    seed: int = 0
    interval_s: float = 5.0
    start_s: float = 60.0
    flip_s: float = 2.0
    failures: tuple[Failure, ...] = ()
    admission: AdmissionSettings | None = field(default_factory=AdmissionSettings)
    frontends: int = 1
    write_back: bool = True
    request_timeout_s: float = FrontendSettings().request_timeout_s
    series_s: float = 30.0
    start_unix_s: float = 0.0
    block_tokens: int = 0
    keep_journeys: bool = False
    step_by_step: bool = False


def simulate(setup: Setup) -> Outcome:
    """Run it to the end of its last request.

    Raises:
        ConfigError: a profile cannot be read, or the setup does not fit together.
        ModelNotFoundError: the load asks for a model that is not there.
    """
    _check(setup)
    random = Random(setup.seed)
    cluster = SimulatedCluster(
        [_served(one, setup, random) for one in setup.models],
        write_back=setup.write_back,
        admission=setup.admission,
        request_timeout_s=setup.request_timeout_s,
        step_by_step=setup.step_by_step,
    )
    lives: list[Member] = []
    cluster.members.on_added = lives.append
    for one in setup.models:
        cluster.members.begin(one.name, one.counts.prefill, one.counts.decode)
    tally = Tally(cluster, {one.name: one.objectives for one in setup.models}, setup.series_s)
    cluster.watchers.append(tally)
    tally.begin()
    kept = KeptJourneys()
    if setup.keep_journeys:
        cluster.watchers.append(kept)
    control = _control(setup, cluster)
    for failure in setup.failures:
        cluster.loop.at(failure.at_s, _kill, cluster, failure, random)
    cluster.run(setup.load)
    tally.end()
    return _outcome(setup, cluster, tally, control, lives, kept)


def profile_named(asked: Profile | Path | str, block_tokens: int = 0) -> Profile:
    """A profile, with its KV cache in blocks of another size where one is given.

    Raises:
        ConfigError: it cannot be read.
    """
    profile = asked if isinstance(asked, Profile) else read_profile(profile_path(Path(asked)))
    return coarse(profile, block_tokens) if block_tokens else profile


def coarse(profile: Profile, block_tokens: int) -> Profile:
    """The same KV cache in blocks of another size."""
    factor = block_tokens / profile.block_tokens
    return msgspec.structs.replace(
        profile,
        block_tokens=block_tokens,
        block_bytes=max(1, round(profile.block_bytes * factor)),
        blocks=int(profile.blocks / factor),
    )


def _check(setup: Setup) -> None:
    if not setup.models:
        raise ConfigError("a simulation needs a model", param="models")
    if len({one.name for one in setup.models}) < len(setup.models):
        raise ConfigError("two models of a simulation have the same name", param="models")
    for name in ("interval_s", "series_s", "request_timeout_s"):
        if getattr(setup, name) <= 0:
            raise ConfigError(f"{name}: {getattr(setup, name)} is not above 0", param=name)


def _served(one: ModelSetup, setup: Setup, random: Random) -> ServedModel:
    prefill = profile_named(one.profile, setup.block_tokens)
    decode = prefill if one.decode_profile is None else profile_named(one.decode_profile, setup.block_tokens)
    if prefill.block_tokens != decode.block_tokens:
        raise ConfigError(
            f"model {one.name!r}: prefill has blocks of {prefill.block_tokens} tokens, decode of "
            f"{decode.block_tokens}; set block_tokens",
            param="block_tokens",
        )
    policies: list[Policy] = [Router(one.routing, random=Random(random.random())) for _ in range(setup.frontends)]
    return ServedModel(one.name, prefill, decode, policies)


def _control(setup: Setup, cluster: SimulatedCluster) -> ControlLoop | None:
    if setup.policy is None:
        return None
    observer = Observer(cluster, setup.start_unix_s)
    cluster.watchers.append(observer)
    scaler = SimulatedScaler(cluster.members, gpu_budget=setup.gpu_budget, start_s=setup.start_s, flip_s=setup.flip_s)
    control = ControlLoop(cluster, setup.policy, scaler, observer, setup.interval_s)
    control.begin()
    return control


def _kill(cluster: SimulatedCluster, failure: Failure, random: Random) -> None:
    ready = [
        one.worker_id
        for one in cluster.members.present.values()
        if one.state == WorkerState.READY
        and failure.model in ("", one.pool.model)
        and failure.role in (Role.ROLE_UNSPECIFIED, one.role)
    ]
    if failure.worker_id:
        cluster.kill(failure.worker_id)
    elif ready:
        cluster.kill(random.choice(ready))


def _outcome(
    setup: Setup,
    cluster: SimulatedCluster,
    tally: Tally,
    control: ControlLoop | None,
    lives: list[Member],
    kept: KeptJourneys,
) -> Outcome:
    duration_s, gpu_hours = cluster.loop.now_s, cluster.members.gpu_s() / 3600.0
    everything = Tallied()
    for counts in tally.totals.values():
        everything.add(counts)
    return Outcome(
        seed=setup.seed,
        duration_s=duration_s,
        gpu_hours=gpu_hours,
        peak_gpus=tally.peak_gpus,
        good_per_gpu_hour=everything.good / gpu_hours if gpu_hours > 0 else 0.0,
        all=everything.figures("", "", duration_s),
        classes=[counts.figures(*key, duration_s) for key, counts in sorted(tally.totals.items())],
        limits=[
            Limits(one.name, service_class, limit.ttft_s, limit.itl_s)
            for one in setup.models
            for service_class, limit in one.objectives.items()
        ],
        series_s=setup.series_s,
        series=tally.series,
        actions=control.actions if control is not None else 0,
        refused_actions=control.refused if control is not None else 0,
        decisions=control.decided if control is not None else [],
        workers=[_life(one, duration_s) for one in lives],
        journeys=tuple(kept.journeys),
    )


def _life(one: Member, duration_s: float) -> WorkerLife:
    lived_s = (duration_s if one.ended_s is None else one.ended_s) - one.started_s
    return WorkerLife(
        one.worker_id,
        one.pool.model,
        role_name(one.role),
        one.gpus,
        one.started_s,
        one.ended_s,
        one.flips,
        one.killed,
        one.worker.work.busy_s / lived_s if lived_s > 0 else 0.0,
    )
