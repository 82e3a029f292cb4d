"""Makes the profiles of GPUs that are shipped with the simulated engine: `python -m simulator.gpu_profiles`.

Step times come from NVIDIA's operator tables, measured on these GPUs and packaged as aiconfigurator, which is
installed into an environment of its own; KV capacity is arithmetic on the model's shape and the GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from slipstream.performance import DecodePoint, PrefillPoint, Profile, encode_profile

PACKAGE = "aiconfigurator==0.12.0"
TABLES = Path(__file__).with_name("aiconfigurator_tables.py")
FOLDER = Path(__file__).resolve().parent.parent / "engine" / "simulated" / "profiles"

PREFILL_TOKENS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (256, 1024, 4096, 16384, 65536)

BLOCK_TOKENS = 16
STEP_TOKENS = 8192  # vLLM's max_num_batched_tokens for these GPUs
MAX_RUNNING = 256
MEMORY_SHARE = 0.9  # vLLM's gpu_memory_utilization
WORKSPACE_BYTES = 4 * 10**9  # activations and captured graphs, a GPU
KV_BYTES_PER_VALUE = 2  # bfloat16
LEAST_KV_TOKENS = 16384  # a worker with less room than this is no worker

# Transfers of 4.5 GB in 31.65 ms between nodes of eight GPUs: Mooncake with vLLM, published for H800.
TRANSFER_BYTES_PER_S_PER_GPU = 4.5e9 / 31.65e-3 / 8
TRANSFER_LATENCY_S = 0.5e-3

ESTIMATE_TIMEOUT_S = 900.0
INSTALL_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model's shape decides its memory.

    Attributes:
        weights: how they are stored, in aiconfigurator's words; weight_bytes follows from it.
        experts: of a mixture, how they lie on the GPUs: `divided`, each over all, or `spread`, whole ones; else empty.
        backend: the engine whose tables are read.
        systems: GPUs for which a profile is made, where it fits.
    """

    name: str
    label: str
    weight_bytes: int
    layers: int
    kv_heads: int
    head_size: int
    tensor_parallel: tuple[int, ...]
    max_model_len: int
    config: dict[str, object] | None = None
    weights: str = "fp8"
    experts: str = ""
    backend: str = "vllm"
    systems: tuple[str, ...] = ("h100_sxm", "h200_sxm")

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of KV a token, over all GPUs of a worker."""
        return 2 * self.layers * self.kv_heads * self.head_size * KV_BYTES_PER_VALUE


@dataclass(frozen=True, slots=True)
class Gpu:
    system: str
    label: str
    memory_bytes: int


# aiconfigurator has no configuration of this one; this is the model's own, as far as it is read.
_QWEN_72B: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
MODELS = (
    Model("Qwen/Qwen3-32B", "qwen3-32b", 32_762_000_000, 64, 8, 128, (1, 2, 4, 8), 131072),
    Model(
        "Qwen/Qwen3-32B",
        "qwen3-32b-bf16",
        65_524_000_000,
        64,
        8,
        128,
        (2, 4, 8),
        131072,
        weights="bfloat16",
        systems=("h100_sxm",),
    ),
    Model(
        "Qwen/Qwen3-30B-A3B",
        "qwen3-30b-a3b",
        61_064_000_000,
        48,
        4,
        128,
        (2,),
        131072,
        weights="bfloat16",
        experts="divided",
    ),
    Model("meta-llama/Meta-Llama-3.1-70B", "llama-3.1-70b", 70_554_000_000, 80, 8, 128, (1, 2, 4, 8), 131072),
    Model(
        # Of attention it keeps 576 values a token and layer, keys and values in one.
        "deepseek-ai/DeepSeek-V3",
        "deepseek-v3-trtllm",
        685_000_000_000,
        61,
        1,
        288,
        (8,),
        131072,
        experts="spread",
        backend="trtllm",
    ),
    Model("Qwen/Qwen2.5-72B", "qwen2.5-72b", 72_706_000_000, 80, 8, 128, (1, 4, 8), 131072, _QWEN_72B),
)
GPUS = (Gpu("h100_sxm", "h100", 80 * 10**9), Gpu("h200_sxm", "h200", 141 * 10**9))


def kv_tokens(model: Model, gpu: Gpu, gpus: int) -> int:
    """Tokens of KV that fit beside the weights; negative when not even these fit."""
    room = gpus * (gpu.memory_bytes * MEMORY_SHARE - WORKSPACE_BYTES) - model.weight_bytes
    return int(room // model.kv_token_bytes)


def that_fit() -> Iterator[tuple[Model, Gpu, int]]:
    """Every model on every GPU with each tensor parallelism that leaves room for KV."""
    for model in MODELS:
        for gpu in (one for one in GPUS if one.system in model.systems):
            for gpus in model.tensor_parallel:
                if kv_tokens(model, gpu, gpus) >= LEAST_KV_TOKENS:
                    yield model, gpu, gpus


def make(python: Path, folder: Path, model: Model, gpu: Gpu, gpus: int, today: date) -> Profile:
    """One profile, with the tables read by `python`, which has the package.

    Raises:
        subprocess.CalledProcessError: the package failed; its words are on standard error.
    """
    source = model.name
    if model.config is not None:
        source = str(folder / model.label)
        Path(source).mkdir(exist_ok=True)
        (Path(source) / "config.json").write_text(json.dumps(model.config))
    task = {
        "model": source,
        "system": gpu.system,
        "tensor_parallel": gpus,
        "weights": model.weights,
        "experts": {"": None, "divided": (gpus, 1), "spread": (1, gpus)}[model.experts],
        "backend": model.backend,
        "prefill_tokens": PREFILL_TOKENS,
        "batches": BATCHES,
        "contexts": CONTEXTS,
    }
    ran = subprocess.run(
        [str(python), str(TABLES)],
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=ESTIMATE_TIMEOUT_S,
    )
    answer = json.loads(ran.stdout)
    return Profile(
        name=f"{model.label}-{gpu.label}-tp{gpus}",
        model=model.name,
        device=gpu.system,
        source=f"{PACKAGE}, measured operator tables of {gpu.system}, {model.backend} backend, "
        f"{model.weights} weights, bfloat16 KV; transfer: Mooncake with vLLM on H800",
        measured_on=today.isoformat(),
        prefill=tuple(PrefillPoint(int(tokens), seconds) for tokens, seconds in answer["prefill"]),
        decode=tuple(DecodePoint(int(batch), int(context), seconds) for batch, context, seconds in answer["decode"]),
        block_tokens=BLOCK_TOKENS,
        block_bytes=BLOCK_TOKENS * model.kv_token_bytes,
        blocks=kv_tokens(model, gpu, gpus) // BLOCK_TOKENS,
        step_tokens=STEP_TOKENS,
        max_running=MAX_RUNNING,
        max_model_len=min(model.max_model_len, kv_tokens(model, gpu, gpus)),
        transfer_bytes_per_s=gpus * TRANSFER_BYTES_PER_S_PER_GPU,
        transfer_latency_s=TRANSFER_LATENCY_S,
        tensor_parallel=gpus,
        gpus=gpus,
        prefill_step_tokens=PREFILL_TOKENS[-1],  # the tables are of a whole prompt in one pass
    )


def environment(folder: Path) -> Path:
    """The interpreter of an environment with the package, made on first use."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", PACKAGE]
        subprocess.run(install, check=True, timeout=INSTALL_TIMEOUT_S)
    return python


def main() -> int:
    """Write every profile; prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "slipstream" / "aiconfigurator")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--only", default="", help="part of the names to make")
    given = parser.parse_args()
    python = environment(given.environment)
    given.folder.mkdir(parents=True, exist_ok=True)
    for model, gpu, gpus in that_fit():
        name = f"{model.label}-{gpu.label}-tp{gpus}"
        if given.only not in name:
            continue
        profile = make(python, given.environment, model, gpu, gpus, date.today())
        (given.folder / f"{name}.json").write_bytes(encode_profile(profile))
        sys.stderr.write(f"{name}: {profile.blocks * profile.block_tokens} tokens of KV\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
