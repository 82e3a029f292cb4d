"""What `slipstream up --autoscale` makes of its settings before anything is started."""

from __future__ import annotations

import io
import stat
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.policy_file import read_policy, write_policy
from slipstream import config
from slipstream.cli.app import app
from slipstream.cli.autoscaling import autoscaled
from slipstream.errors import ConfigError
from slipstream.settings import Settings
from tests.support.text_model_folder import write_model_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    return write_model_folder(folder)


def loaded(model: Path, changed: dict[str, object] | None = None) -> Settings:
    own = {"model": str(model), "cluster.autoscale": True, "worker.engine": "simulated", **(changed or {})}
    return config.load(own, {}, None).settings


def test_without_a_policy_one_is_written_that_says_what_is_aimed_at(model: Path, tmp_path: Path) -> None:
    output = io.StringIO()
    changed: dict[str, object] = {"cluster.max_workers": 3, "admission.ttft_slo_s": 1.5}
    with autoscaled(loaded(model, changed), tmp_path / "run", Console(file=output, width=500)) as settings:
        assert settings.planner.policy is not None
        policy = read_policy(settings.planner.policy)
        socket = Path(settings.planner.scaler.removeprefix("unix:"))
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700, "nobody else may start processes"
        assert len(str(socket)) < 100
    assert not socket.parent.exists()
    assert str(settings.planner.policy) in output.getvalue()
    assert policy.gpu_budget == 3
    (one,) = policy.models
    assert (one.model, settings.served_model_name) == (model.name, model.name)
    assert one.objectives["realtime"].ttft_s == 1.5


def test_a_policy_that_is_given_must_be_about_the_model(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_policy(PlannerObjectives((ModelObjectives("other", {"realtime": Objective(1.0, 1.0)}),), gpu_budget=2), path)
    own = loaded(model, {"planner.policy": str(path)})
    with (
        pytest.raises(ConfigError, match="it is about other; this cluster serves") as caught,
        autoscaled(own, tmp_path / "run", Console(file=io.StringIO())),
    ):
        pass
    assert caught.value.param == "planner.policy"
    named = own.model_copy(update={"served_model_name": "other"})
    with autoscaled(named, tmp_path / "run", Console(file=io.StringIO())) as settings:
        assert settings.planner.policy == path


def test_a_policy_by_which_nobody_would_act_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("")
    arguments = ["up", "--model", str(model), "--planner-policy", str(path), "--log-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--autoscale" in result.output
