"""End-to-end rows measured on real machines: NVIDIA's `silicon_sample.csv`, as far as our profiles speak of the same.

The file lies in the package from which our GPU profiles were made, beside the operator tables; no profile was made
from it.
"""

from __future__ import annotations

import csv
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.simulated import profile_choice
from simulator import gpu_profiles
from slipstream.performance import Profile, read_profile

SAMPLE = "import aiconfigurator_core, pathlib; print(pathlib.Path(aiconfigurator_core.__file__).parent)"
SYSTEMS = {"h100_sxm": "h100", "h200_sxm": "h200"}
MODELS = {
    ("Qwen/Qwen3-32B", "fp8"): "qwen3-32b",
    ("Qwen/Qwen3-32B", ""): "qwen3-32b-bf16",  # no precision given: the model as it is published
    ("meta-llama/Llama-3.1-70B", "fp8"): "llama-3.1-70b",
    ("deepseek-ai/DeepSeek-V3", "fp8"): "deepseek-v3-trtllm",
}
ENGINES = {"deepseek-v3-trtllm": "trtllm"}
"""Whose tables a profile is made of, where that is not vLLM."""

DESCRIBED_CLIENT = re.compile("model=Llama-3.1-70B|^db-dump/")
"""Of these sources the client is published (InferenceMAX): lengths are drawn from 0.8 to 1 of the nominal ones."""

DESCRIBED_SHARE = 0.8
MEMORY_BYTES_PER_S = {"h100_sxm": 3.35e12, "h200_sxm": 4.8e12}

_CONCURRENCY = re.compile("silicon_concurrency=([0-9]+)")
_WEIGHT_BYTES = {one.label: one.weight_bytes for one in gpu_profiles.MODELS if not one.experts}


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement, and the profiles of the workers that it was taken on.

    Attributes:
        mode: `agg` or `disagg`; workers: prefill and decode ones, 0 and 1 where one does both.
        clients: requests under way.
        least_share: of the lengths that the client drew, as far as it is published.
    """

    name: str
    mode: str
    backend: str
    model: str
    prefill: Profile
    decode: Profile
    workers: tuple[int, int]
    input_tokens: int
    output_tokens: int
    clients: int
    least_share: float
    ttft_s: float
    tpot_s: float

    @property
    def fits(self) -> bool:
        """All clients' sequences have room in the KV cache, as our profile counts it."""
        tokens = self.decode.blocks * self.decode.block_tokens * max(1, self.workers[1])
        return self.clients * (self.input_tokens + self.output_tokens) <= tokens

    @property
    def possible(self) -> bool:
        """A step reads all weights and the whole batch's KV: no GPU is faster than its memory, even with KV of one
        byte a value. Unknown for mixtures of experts, of which a step reads a part."""
        weights = _WEIGHT_BYTES.get(self.model, 0)
        token_bytes = self.decode.block_bytes / self.decode.block_tokens / 2
        batch = self.clients / max(1, self.workers[1])
        read_bytes = weights + batch * (self.input_tokens + self.output_tokens / 2) * token_bytes
        return self.tpot_s >= read_bytes / (MEMORY_BYTES_PER_S[self.decode.device] * self.decode.gpus)


def sample_file(python: Path) -> Path:
    """Where the rows lie, in the environment of that interpreter.

    Raises:
        subprocess.CalledProcessError: the package is not there.
    """
    found = subprocess.run([str(python), "-c", SAMPLE], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    return Path(found.stdout.strip()) / "systems" / "silicon_sample.csv"


def read_rows(file: Path) -> tuple[list[Row], Counter[str]]:
    """The usable rows, and how many were left out by each rule."""
    rows, left_out = [], Counter[str]()
    with file.open(newline="") as lines:
        for line in csv.DictReader(lines):
            found = row_of(line)
            if isinstance(found, Row):
                rows.append(found)
            else:
                left_out[found] += 1
    return rows, left_out


def row_of(line: Mapping[str, str]) -> Row | str:
    """A row, or the rule that leaves it out."""
    if line["system"] not in SYSTEMS:
        return "not on H100 or H200"
    label = MODELS.get((line["model_path"], line["precision"]))
    if label is None:
        return "a model or precision without a profile of ours"
    disaggregated = line["mode"] == "disagg"
    if line["backend"] != ENGINES.get(label, "vllm") and (not disaggregated or label in ENGINES):
        return "another engine than the one whose tables the profile is made of"
    if disaggregated and not line["prefill_num_workers"]:
        return "numbers of workers are not given"
    sizes = (line["prefill_tp_size"], line["decode_tp_size"]) if disaggregated else (line["tp_size"],) * 2
    profiles = [_profile(f"{label}-{SYSTEMS[line['system']]}-tp{size}") for size in sizes]
    if profiles[0] is None or profiles[1] is None:
        return "a division over GPUs without a profile of ours"
    workers = (int(line["prefill_num_workers"]), int(line["decode_num_workers"])) if disaggregated else (0, 1)
    source = line["silicon_data_source"]
    said = _CONCURRENCY.search(source)
    if disaggregated:
        clients = int(said[1]) if said else int(line["decode_batch_size"]) * workers[1]
    else:
        clients = int(line["batch_size"])
    return Row(
        name=line["id"],
        mode=line["mode"],
        backend=line["backend"],
        model=label,
        prefill=profiles[0],
        decode=profiles[1],
        workers=workers,
        input_tokens=int(line["isl"]),
        output_tokens=int(line["osl"]),
        clients=clients,
        least_share=DESCRIBED_SHARE if DESCRIBED_CLIENT.search(source) else 1.0,
        ttft_s=float(line["silicon_ttft_ms"]) / 1e3,
        tpot_s=float(line["silicon_tpot_ms"]) / 1e3,
    )


def _profile(name: str) -> Profile | None:
    file = profile_choice.PACKAGED / f"{name}.json"
    return read_profile(file) if file.exists() else None


def by_model(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of one model and GPU after the other."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.model} {SYSTEMS[row.decode.device]}", []).append(row)
    yield from sorted(groups.items())
