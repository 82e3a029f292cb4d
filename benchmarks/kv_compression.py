"""What quantizing on the wire costs, saves and changes: `python -m benchmarks.kv_compression [--json]`.

Prompts are computed by the real model; their KV blocks are encoded and decoded in place, as if they had crossed a slow
link; then the answers are compared with those from the untouched blocks.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.answer_difference import Answer, Difference, break_even_bytes_per_s, difference
from benchmarks.prompts import Prompts, mixed_lengths, word_ids
from benchmarks.report import Machine, Target, machine
from benchmarks.text_prompts import text_prompts
from engine import device as devices
from engine import environment
from slipstream import model_folder
from slipstream import settings as configuration
from slipstream.errors import SlipstreamError
from slipstream.settings import DEFAULT_MODEL

if TYPE_CHECKING:
    from benchmarks.quantized_engine import QuantizedEngine, Quantizing

_LENGTHS = tuple(128 * blocks + 1 for blocks in range(2, 8))
_VARIANTS = (*(("int8", group) for group in (32, 64, 128)), *(("fp8", group) for group in (32, 64, 128)))

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one run. There are `prompts` prompts of text and as many of random words."""

    model: str
    dtype: str
    seed: int
    prompts: int = 20
    max_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to quantize.

    Attributes:
        group: numbers that share a scale.
        wire_share: encoded bytes by KV bytes.
        encode_gb_per_s: GB of KV in one second of one core; so is decode_gb_per_s.
        cpu_s_per_gb: of encoding and decoding together.
        break_even_mb_per_s: a link slower than this moves blocks sooner with it than without.
        differences: by kind of prompt.
    """

    name: str
    group: int
    wire_share: float
    encode_gb_per_s: float
    decode_gb_per_s: float
    cpu_s_per_gb: float
    break_even_mb_per_s: float
    differences: dict[str, Difference]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured.

    Attributes:
        targets: none; nothing was promised.
        repeated: the answers asked for twice from untouched blocks: what differs here is not from quantizing.
        computed_anew: the prompts computed once more in other steps, which rounds differently: what the number format
            itself leaves open.
    """

    settings: Settings
    machine: Machine
    kv_dtype: str
    kv_bytes: int
    repeated: dict[str, Difference]
    computed_anew: dict[str, Difference]
    variants: list[Variant]
    targets: list[Target]


@app.command()
def kv_compression(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few prompts only: shows that all works.")] = False,
    model: Annotated[str, typer.Option("--model", help="A local folder or a Hugging Face id.")] = DEFAULT_MODEL,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts' lengths and random words.")] = 4,
) -> None:
    """Measure size, speed and changed answers of each way to quantize KV blocks. Takes some minutes."""
    dtype = devices.choose_dtype(dtype, "cpu", devices.cpu_flags())
    settings = Settings(model, dtype, seed, prompts=2, max_tokens=8) if quick else Settings(model, dtype, seed)
    messages = Console(stderr=True, highlight=False)
    facts = machine()
    environment.prepare(configuration.Settings(), os.environ)
    try:
        result = _measure(settings, facts, messages)
    except SlipstreamError as error:
        messages.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    command.show(result, as_json, _print)


def _measure(settings: Settings, facts: Machine, messages: Console) -> Report:
    from benchmarks.quantized_engine import QuantizedEngine  # late: vLLM reads the environment when it is imported

    began_s = time.monotonic()

    def say(what: str) -> None:
        messages.print(f"[dim]{time.monotonic() - began_s:6.1f} s[/]  {what}")

    folder = model_folder.resolve(settings.model).path
    prompts = _prompts(settings, folder)
    say("loading the engine and computing the prompts")
    engine = QuantizedEngine(
        folder, settings.dtype, [p for kind in prompts.values() for p in kind], settings.max_tokens
    )
    try:
        originals = engine.answers()
        say("asking again with untouched blocks")
        repeated = _by_kind(prompts, originals, engine.answers())
        variants = []
        for name, group in _VARIANTS:
            say(f"{name}, {group} numbers a group")
            variants.append(_variant(engine, name, group, prompts, originals))
        say("computing the prompts anew, in other steps")
        anew = _by_kind(prompts, originals, engine.answers_computed_anew())
    finally:
        engine.close()
    return Report(settings, facts, str(engine.kv_dtype), engine.kv_bytes, repeated, anew, variants, targets=[])


def _prompts(settings: Settings, folder: Path) -> dict[str, list[list[int]]]:
    lengths = mixed_lengths(_LENGTHS, settings.prompts, settings.seed)
    words = Prompts(word_ids(folder), settings.seed)
    return {"text": text_prompts(folder, lengths), "random words": [words.draw(length) for length in lengths]}


def _variant(
    engine: QuantizedEngine, name: str, group: int, prompts: dict[str, list[list[int]]], originals: list[Answer]
) -> Variant:
    from kv_transfer.compression import codec_for

    codec = codec_for(name, engine.kv_dtype, group)
    assert codec is not None
    engine.restore()
    engine.quantize(codec)  # once to warm up; what comes out of it twice is not what a link would deliver
    engine.restore()
    cost = engine.quantize(codec)
    return _described(name, group, cost, _by_kind(prompts, originals, engine.answers()))


def _described(name: str, group: int, cost: Quantizing, differences: dict[str, Difference]) -> Variant:
    encode, decode = cost.raw_bytes / cost.encode_cpu_s, cost.raw_bytes / cost.decode_cpu_s
    wire_share = cost.wire_bytes / cost.raw_bytes
    return Variant(
        name=name,
        group=group,
        wire_share=wire_share,
        encode_gb_per_s=encode / 1e9,
        decode_gb_per_s=decode / 1e9,
        cpu_s_per_gb=1e9 / encode + 1e9 / decode,
        break_even_mb_per_s=break_even_bytes_per_s(wire_share, encode, decode) / 1e6,
        differences=differences,
    )


def _by_kind(
    prompts: dict[str, list[list[int]]], originals: list[Answer], changed: list[Answer]
) -> dict[str, Difference]:
    found = {}
    begin = 0
    for kind, of_kind in prompts.items():
        these = slice(begin, begin + len(of_kind))
        found[kind] = difference(originals[these], changed[these])
        begin += len(of_kind)
    return found


def _print(console: Console, result: Report) -> None:
    console.print(_cost_table(result))
    for kind, repeated in result.repeated.items():
        console.print(_difference_table(result, kind, repeated))
    facts = result.machine
    console.print(f"{facts.cpu}, {facts.cores} cores, {facts.date}, {result.settings.model}, {result.kv_dtype}")


def _cost_table(result: Report) -> Table:
    table = Table(title=f"Quantizing {result.kv_bytes / 1e6:.0f} MB of KV blocks on one core", title_justify="left")
    for column in ("codec", "group"):
        table.add_column(column)
    for column in ("bytes", "encode GB/s", "decode GB/s", "CPU s per GB", "worth it below MB/s"):
        table.add_column(column, justify="right")
    for one in result.variants:
        speeds = (one.encode_gb_per_s, one.decode_gb_per_s, one.cpu_s_per_gb)
        cells = (f"{one.wire_share:.1%}", *(f"{speed:.2f}" for speed in speeds), f"{one.break_even_mb_per_s:.0f}")
        table.add_row(one.name, str(one.group), *cells)
    return table


def _difference_table(result: Report, kind: str, repeated: Difference) -> Table:
    title = f"Answers of {repeated.tokens} tokens to {repeated.prompts} prompts of {kind}"
    table = Table(title=title, title_justify="left")
    table.add_column("blocks")
    for column in ("identical", "tokens before the first other", "same first token", "|logprob|", "KL mean", "KL max"):
        table.add_column(column, justify="right")
    rows = [("untouched", repeated), ("computed anew", result.computed_anew[kind])]
    rows += [(f"{v.name}, {v.group}", v.differences[kind]) for v in result.variants]
    for name, one in rows:
        shares = (one.identical_share, one.agreement_share, one.first_token_share)
        cells = (f"{one.logprob_delta:.5f}", f"{one.kl_mean:.2e}", f"{one.kl_max:.2e}")
        table.add_row(name, *(f"{share:.1%}" for share in shares), *cells)
    return table


if __name__ == "__main__":
    app()
