"""`slipstream chat`: a conversation in the terminal, over the gRPC face."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from slipstream.addresses import host_port, reachable
from slipstream.cli.face_tls import api_key, face_tls
from slipstream.cli.flags import select, with_settings
from slipstream.cli.show import examples
from slipstream.config import LoadedConfig
from slipstream.errors import SlipstreamError, UnavailableError

if TYPE_CHECKING:
    from rich.console import Console

    from slipstream.client import ChatMessage, Client, SamplingOptions

PANEL = "Use a cluster"

_HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
_CONNECT_TIMEOUT_S = 10.0


def add_to(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream chat", "with the cluster that `slipstream up` started"),
            ('slipstream chat --system "Answer in one sentence." --temperature 0', "short and the same each time"),
            ("slipstream chat --host 10.0.0.1 --grpc-port 9001", "with a frontend elsewhere"),
        ),
    )(chat)


@with_settings(*select("api_key", "frontend.host", "frontend.grpc_port", "security.tls_folder", own={"frontend"}))
def chat(
    loaded: LoadedConfig,
    model: Annotated[str, typer.Option("--model", help="Name of the model, when several are served.")] = "",
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="Instructions before the conversation.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[
        Optional[float],  # noqa: UP045 - typer reads the annotation
        typer.Option("--temperature", help="0 is the likeliest answer; larger is more varied.", show_default=False),
    ] = None,
) -> None:
    """Talk to a model. Answers stream; /quit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from slipstream.cli.terminal import output
    from slipstream.client import Client

    face = loaded.settings.frontend
    target, tls = host_port(reachable(face.host), face.grpc_port), face_tls(loaded.settings.security)
    with Client(target, tls=tls, api_key=api_key(loaded.settings)) as client:
        if not model:
            model = _only_model(client)
        options: SamplingOptions = {"max_tokens": max_tokens, "temperature": temperature}
        console = output()
        console.print(f"Talking to {model}. {_HELP}.", style="dim", markup=False)
        _converse(client, model, system, options, console, _line_reader())


def _only_model(client: Client) -> str:
    models = client.models(timeout_s=_CONNECT_TIMEOUT_S)
    if not models:
        raise UnavailableError("the frontend knows no model yet; see `slipstream status` for its workers")
    return models[0].id


def _converse(
    client: Client,
    model: str,
    system: str,
    options: SamplingOptions,
    console: Console,
    read_line: Callable[[], str | None],
) -> None:
    """Until the end of input or /quit."""
    opening: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while (line := read_line()) is not None:
        command = line.strip()
        if command == "/quit":
            return
        if command == "/reset":
            messages = list(opening)
            console.print("The conversation is forgotten.", style="dim")
        elif command.startswith("/"):
            console.print(f"{_HELP}.", style="dim", markup=False)
        elif command:
            messages.append({"role": "user", "content": line})
            answer = _answer(client, messages, model, options, console)
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()  # refused or stopped at once: as if it had not been said


def _answer(client: Client, messages: list[ChatMessage], model: str, options: SamplingOptions, console: Console) -> str:
    """Print the answer as it comes; what there is of it when it fails or is stopped."""
    text = ""
    try:
        with client.chat(messages, model=model, **options) as stream:
            for piece in stream:
                text += piece.text
                console.out(piece.text, end="", highlight=False)
                console.file.flush()
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim", end="")
    except SlipstreamError as error:
        console.print(f"error: {error.message}", style="red", markup=False, end="")
    console.print()
    return text


def _line_reader() -> Callable[[], str | None]:
    """Reads lines with a prompt, editing and history on a terminal, plainly otherwise. None at the end of input."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - importing it gives input() editing and history

    def read() -> str | None:
        while True:
            try:
                return input("> " if interactive else "")
            except EOFError:
                return None
            except KeyboardInterrupt:  # an empty line, as in a shell
                print(flush=True)  # noqa: T201

    return read
