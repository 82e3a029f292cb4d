"""A `KvNode` in a process of its own, and the handle by which a test commands it.

    python -m tests.support.kv_peer OPTIONS

OPTIONS is a `kv_node.Options` as JSON. The process says its address in one JSON line; then each line on its standard
input is a list of commands ([name, arguments...], the methods of `KvNode`), which it carries out and answers with the
list of what they returned. It ends when its standard input closes.
"""

from __future__ import annotations

import select
import subprocess
import sys
from typing import Any

import msgspec

from kv_transfer import exchange
from tests.support.answer_pipe import take_standard_output
from tests.support.kv_node import DEADLINE_S, Census, Happening, KvNode, Options, Watched

_COMMANDS = {
    *("begin", "publish", "computed", "send", "reset", "end", "pause"),
    *("open", "receive", "cancel", "take", "read", "write", "refill", "holds", "census"),
}


class KvPeer(Watched):
    """A started process. Close it."""

    def __init__(self, options: Options, *prefix: str) -> None:
        """Args:
        prefix: words of the command line before the interpreter's.
        """
        super().__init__()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.support.kv_peer", msgspec.json.encode(options).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.epoch = options.epoch
        try:
            self.address = msgspec.json.decode(self._answer(60.0), type=str)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def all(self, commands: list[list[Any]]) -> list[Any]:
        """Have these carried out, without a break."""
        self.post(commands)
        return self.answers()

    def post(self, commands: list[list[Any]]) -> None:
        """The same, without waiting for the `answers`."""
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(commands) + b"\n")
        self.process.stdin.flush()

    def answers(self) -> list[Any]:
        return msgspec.json.decode(self._answer(DEADLINE_S), type=list[Any])

    def do(self, name: str, *arguments: Any) -> Any:
        return self.all([[name, *arguments]])[0]

    def take(self, wait_s: float) -> list[Happening]:
        return msgspec.convert(self.do("take", wait_s), type=list[Happening])

    def census(self) -> Census:
        return msgspec.convert(self.do("census"), type=Census)

    def kill(self) -> None:
        """SIGKILL; also for a process that is stopped."""
        self.process.kill()
        self.process.wait(timeout=DEADLINE_S)

    def stop(self) -> None:
        """Let it end as a worker does."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=DEADLINE_S) == 0

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _answer(self, deadline_s: float) -> bytes:
        stdout = self.process.stdout
        assert stdout is not None
        assert select.select([stdout], [], [], deadline_s)[0], "the peer says nothing"
        line = stdout.readline()
        assert line, "the peer has ended"
        return line


def main() -> None:
    out = take_standard_output()

    def say(answer: object) -> None:
        out.write(msgspec.json.encode(answer) + b"\n")
        out.flush()

    options = msgspec.json.decode(sys.argv[1], type=Options)
    if options.small_bytes is not None:
        exchange._SMALL_BYTES = options.small_bytes
    node = KvNode(options)
    say(node.address)
    for line in sys.stdin.buffer:
        answers = []
        for name, *arguments in msgspec.json.decode(line):
            assert name in _COMMANDS, name
            answers.append(getattr(node, name)(*arguments))
        say(answers)
    node.close()


if __name__ == "__main__":
    main()
