"""One target under libFuzzer: `python -m tests.fuzz.one NAME CORPUS LIBFUZZER_ARGUMENTS...`; see `campaign`."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

_READERS = (
    "kv_transfer.wire",
    "kv_transfer.greeting",
    "kv_transfer.board",
    "frontend.openai_requests",
    "frontend.sampling_fields",
    "frontend.clusters.upstream",
    "frontend.known_caches",
    "engine.vllm_events",
    "simulator.traces",
    "slipstream.block_keys",
)


def main() -> None:
    name, corpus, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=[*_READERS], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    for number, seed in enumerate(target.seeds):
        (Path(corpus) / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *arguments, corpus], target.prepare())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
