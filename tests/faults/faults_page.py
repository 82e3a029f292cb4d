"""docs/faults.md, made from the cases and from what was measured: the page says nothing that a case does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from tests.faults.case import Case

if TYPE_CHECKING:
    from tests.faults.table import Result

_HEAD = """\
# What is broken on purpose, and what comes of it

Each row is a case of the fault suite: real workers (vLLM, the tiny model), a control plane and a frontend of two
processes, and clients that stream while the fault happens. Every answer is greedy and is compared, token for token,
with what an undisturbed plain vLLM engine says to the same prompt.

```
make faults                                              # every case; half an hour, and this page is written anew
python -m tests.faults.table --short                     # the selection that runs with the tests
python -m tests.faults.table --only kill-decode-engine   # one of them
```

In every row: no answer has a wrong token, every error is one of `slipstream.errors`, no request hangs, and half a
minute after the last one no worker holds a block, a handoff, a request or a file in shared memory that it should not.
"lost" is requests that ended with an error, beside how many may; "moved" answers that went on with another worker, or
whose prompt decode had to compute; "longest wait" what a client waited at most for a first or a next token, beside what
is promised: the suite's short deadlines (prefill 5 s, first token 8 s, next token 6 s, lease of the control plane 3 s),
and room for two cores that do other things too.

<!-- Written by `python -m tests.faults.table` from the cases and tests/faults/measured.json; not edited by hand. -->
"""


def page(cases: Sequence[Case], results: Mapping[str, Result]) -> str:
    """The whole page."""
    parts = [_HEAD]
    for fault, rows in groupby(cases, key=lambda case: case.fault):
        same = list(rows)
        parts.append(f"\n## {fault}\n\n")
        parts += [f"Promised: {words}\n\n" for words in dict.fromkeys(case.promise.words for case in same)]
        parts.append("| case | what is done | requests | lost | wrong | moved | longest wait | besides |\n")
        parts.append("|---|---|---:|---:|---:|---:|---:|---|\n")
        parts += [_row(case, results.get(case.name)) for case in same]
    return "".join(parts)


def _row(case: Case, result: Result | None) -> str:
    measured = result.measured if result is not None else None
    if result is None or measured is None:
        why = result.skipped if result is not None and result.skipped else "not measured yet"
        return f"| `{case.name}` | {case.what} | | | | | | {why} |\n"
    besides = [f"{name.replace('_', ' ')}: {value:g}" for name, value in measured.figures.items()]
    besides += [f"{count} `{code}`" for code, count in sorted(measured.codes.items())]
    besides += [f"**{what}**" for what in result.broken]
    return (
        f"| `{case.name}` | {case.what} | {measured.requests} | {measured.lost} of {case.promise.lost} | "
        f"{measured.wrong} | {measured.moved} | {measured.silence_s:.1f} of {case.promise.silence_s:g} s | "
        f"{'; '.join(besides)} |\n"
    )
