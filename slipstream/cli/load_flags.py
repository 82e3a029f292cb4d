"""The flags by which a load and workers are chosen, for the commands that simulate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
import typer

from simulator.load_choice import LoadChoice
from slipstream.errors import ConfigError

_LOAD, _SYNTHETIC = "Load", "Synthetic load, without --trace"


@dataclass(frozen=True, slots=True)
class _Flag:
    """A field of `simulator.load_choice.LoadChoice` as a flag."""

    field: str
    spelling: str
    help: str
    panel: str = _SYNTHETIC
    metavar: str | None = None

    @property
    def parameter(self) -> inspect.Parameter:
        default = getattr(LoadChoice(), self.field)
        option = typer.Option(
            self.spelling,
            help=self.help,
            rich_help_panel=self.panel,
            metavar=self.metavar,
            show_default=default not in ("", 0),
        )
        annotation: Any = Annotated[type(default), option]
        return inspect.Parameter(self.field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_FLAGS = (
    _Flag("trace", "--trace", "A trace to replay; may be compressed (.xz).", _LOAD, "FILE"),
    _Flag(
        "format",
        "--format",
        "Of the trace: mooncake, azure, access-log; auto: by the file.",
        _LOAD,
        "NAME",
    ),
    _Flag("speed", "--speed", "Replay the trace this many times as fast.", _LOAD),
    _Flag("requests", "--requests", "Requests at most; all of a trace, or enough, when absent.", _LOAD),
    _Flag("duration_s", "--duration-s", "Length of the load at most.", _LOAD),
    _Flag("rate_per_s", "--rate", "Requests a second, on average."),
    _Flag("input_tokens", "--input-tokens", "Mean length of a prompt (ISL)."),
    _Flag("output_tokens", "--output-tokens", "Mean length of an answer (OSL)."),
    _Flag(
        "input_variation",
        "--input-variation",
        "Deviation of prompts' lengths over their mean; 0: all alike.",
    ),
    _Flag("output_variation", "--output-variation", "The same of the answers' lengths."),
    _Flag("hit_rate", "--hit-rate", "Share of the prompt tokens that begin as others did before."),
    _Flag("shape", "--shape", "steady (Poisson), bursts or daily.", metavar="NAME"),
    _Flag("peak_to_trough", "--peak-to-trough", "Of a daily load."),
    _Flag("period_s", "--period-s", "Of a daily load: its day."),
    _Flag("seed", "--seed", "The same seed, the same run."),
)


def with_load(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of a load; its first parameter receives the `LoadChoice`."""
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    def run(**given: Any) -> None:
        command(_choice({flag.field: given.pop(flag.field) for flag in _FLAGS}), **given)

    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*keywords, *(flag.parameter for flag in _FLAGS)])  # type: ignore[attr-defined]
    run.__annotations__ = {}
    return run


def _choice(values: dict[str, object]) -> LoadChoice:
    """Checked.

    Raises:
        ConfigError: one is beyond its limits; the message names the flag.
    """
    for flag in _FLAGS:
        value = values[flag.field]
        try:
            msgspec.convert({flag.field: value}, LoadChoice)
        except msgspec.ValidationError as error:
            names = get_args(get_type_hints(LoadChoice)[flag.field])
            limit = f"must be one of {', '.join(names)}" if isinstance(value, str) and names else in_words(error)
            raise ConfigError(f"{flag.spelling} = {value}: {limit}", param=flag.field) from None
    return msgspec.convert(values, LoadChoice)


def in_words(error: msgspec.ValidationError) -> str:
    """`--ttft-s: must be float > 0.0`, or without the flag's name where the error has none."""
    limit, _, place = str(error).replace("Expected", "must be").replace("`", "").partition(" - at $")
    field = place.lstrip(".")
    return f"--{field.replace('_', '-')}: {limit}" if field and field not in {flag.field for flag in _FLAGS} else limit
