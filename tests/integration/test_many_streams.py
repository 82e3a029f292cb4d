"""Two hundred streams at once through a real frontend process, a tenth of whose clients leave in the middle."""

from __future__ import annotations

from pathlib import Path

from benchmarks.frontend_servers import slipstream_frontend
from benchmarks.many_streams import Endurance, endure
from tests.support.text_model_folder import write_model_folder

PLAN = Endurance(streams=200, seconds=6.0, step_s=0.2, tokens=20, leavers=20, words=5, ramp_s=1.0)
EXCLAMATION_MARK = 0


async def test_every_stream_is_answered_and_clients_that_leave_take_their_work_with_them(tmp_path: Path) -> None:
    model, logs = tmp_path / "model", tmp_path / "logs"
    model.mkdir()
    logs.mkdir()
    write_model_folder(model)
    async with slipstream_frontend(model, logs, step_s=PLAN.step_s, first_token=EXCLAMATION_MARK) as frontend:
        seen = await endure(frontend, PLAN)
    assert seen.errors == []
    assert seen.answers >= PLAN.streams - PLAN.leavers
    assert seen.tokens >= seen.answers * PLAN.tokens // 2
    assert seen.left >= PLAN.leavers
    assert seen.most_streams >= PLAN.streams * 0.9
    assert seen.open_after == 0
