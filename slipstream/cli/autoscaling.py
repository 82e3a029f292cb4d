"""What `slipstream up --autoscale` needs besides its flags: a policy, a model's name, a place where a planner asks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream.errors import ConfigError, StartupError
from slipstream.settings import DEFAULT_MODEL, Settings

if TYPE_CHECKING:
    from rich.console import Console

    from planner.objectives import PlannerObjectives

POLICY_FILE = "policy.yaml"
SOCKET = "scaler.sock"
CPU_PROFILE = "smollm2-cpu"
ITL_S = 0.25
PERCENTILE = 90.0
"""Of the policy that is made where none is given: for a laptop, on which everything else runs too."""
START_S = 30.0
INTERVAL_S = 5.0


@contextmanager
def autoscaled(settings: Settings, run_folder: Path, console: Console) -> Iterator[Settings]:
    """The settings completed while the block runs: with the model's name, a policy and a socket for the planner.

    Raises:
        ConfigError: the policy is wrong, or is not about the model that is served.
        StartupError: the run folder cannot be written.
    """
    from planner.policy_file import read_policy, write_policy
    from slipstream import model_folder

    folder = model_folder.resolve(settings.model, weights=False)
    name = settings.served_model_name or folder.served_name
    policy = settings.planner.policy
    if policy is None:
        policy = run_folder / POLICY_FILE
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            write_policy(default_policy(settings, name), policy)
        except OSError as error:
            raise StartupError(f"the run folder {run_folder} cannot be written ({error.strerror})") from None
        console.print(f"Scaling by {policy}; give your own with --planner-policy", soft_wrap=True)
    elif read_policy(policy).of(name) is None:
        named = ", ".join(one.model for one in read_policy(policy).models)
        raise ConfigError(f"{policy}: it is about {named}; this cluster serves {name}", param="planner.policy")
    # Short, because the path of a socket must be, and for this user alone.
    with tempfile.TemporaryDirectory(prefix="slipstream-") as private:
        planner = settings.planner.model_copy(
            update={"policy": policy.absolute(), "scaler": f"unix:{private}/{SOCKET}"}
        )
        yield settings.model_copy(update={"served_model_name": name, "planner": planner})


def default_policy(settings: Settings, model: str) -> PlannerObjectives:
    """What is aimed at where nobody says it: the TTFT that admission protects, within what this machine has."""
    from planner.objectives import Bounds, ModelObjectives, Objective, PlannerObjectives

    cluster = settings.cluster
    own = settings.worker.profile is not None or settings.worker.engine == "simulated"
    profile = CPU_PROFILE if settings.model == DEFAULT_MODEL and not own else ""
    objective = Objective(ttft_s=settings.admission.ttft_slo_s, itl_s=ITL_S, percentile=PERCENTILE)
    return PlannerObjectives(
        models=(
            ModelObjectives(
                model,
                {"realtime": objective},
                profile=profile,
                bounds=Bounds(allow_aggregated=cluster.prefill == 0),
            ),
        ),
        gpu_budget=max(cluster.prefill + cluster.decode, cluster.max_workers or len(os.sched_getaffinity(0)), 2),
        interval_s=INTERVAL_S,
        start_s=START_S,
    )
