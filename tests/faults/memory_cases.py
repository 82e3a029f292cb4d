"""KV caches that are too small for what is asked of them at the same time."""

from __future__ import annotations

from kv_transfer.board import Counter
from tests.faults.arena import ANSWER_TOKENS, Arena
from tests.faults.case import Case, Promise, Stream
from tests.faults.load import Load
from tests.faults.process_cases import BUSY_S

AT_ONCE = 24


async def ask_too_much(arena: Arena, load: Load) -> None:
    """More streams at once than there are blocks for: workers wait for room, preempt, and compute again."""
    before = _counted(arena)
    await load.until_answered(3 * AT_ONCE)
    after = _counted(arena)
    load.measured.figures.update({name: float(after[name] - before[name]) for name in after})
    if not load.measured.figures["preemptions"]:
        load.measured.broken.append("no worker ran out of blocks: the case shows nothing")


def _counted(arena: Arena) -> dict[str, int]:
    sums = dict.fromkeys(("preemptions", "handoffs_reset"), 0)
    for member in arena.cluster.members:
        board = member.board()
        if board is None:
            continue
        sums["preemptions"] += board.counter(Counter.PREEMPTIONS)
        sums["handoffs_reset"] += board.counter(Counter.HANDOFFS_RESET)
        board.close()
    return sums


CASES = (
    Case(
        "kv-blocks-exhausted",
        "Out of KV blocks",
        f"{AT_ONCE} streams at once of {ANSWER_TOKENS} tokens, in caches with room for two full contexts each",
        Promise("Requests wait, and every answer is right.", silence_s=2 * BUSY_S),
        inflict=ask_too_much,
        stream=Stream(at_once=AT_ONCE, tokens=ANSWER_TOKENS),
        short=True,
    ),
)
