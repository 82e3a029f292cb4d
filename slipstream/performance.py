"""How fast a worker computes: measured tables, and predictions between their points.

A profile is data with a source and a date. The router, the simulated engine, the simulator and the planner all
predict with the same two functions, so that a wrong profile is wrong everywhere in the same way and the live
corrections apply everywhere.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from slipstream.errors import ConfigError

Seconds = Annotated[float, Meta(gt=0, le=86400)]
Count = Annotated[int, Meta(ge=1)]


class PrefillPoint(msgspec.Struct, frozen=True):
    """One prompt of `tokens` tokens, nothing of it cached, alone on the engine: from its first step to its last."""

    tokens: Count
    seconds: Seconds


class DecodePoint(msgspec.Struct, frozen=True):
    """One step of `batch` sequences with `context_tokens` tokens each."""

    batch: Count
    context_tokens: Count
    seconds: Seconds


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker can do.

    Attributes:
        source: how the tables came to be: a command, a package with its version.
        measured_on: ISO date.
        prefill: by rising tokens; at least two points.
        decode: a full grid: every batch with every context; sorted by batch, then context.
        step_tokens: most tokens computed in one engine step (chunked prefill).
        prefill_step_tokens: the same when the prefill table was made: a longer prompt's seconds hold the fixed cost of
            each of its steps. A table of whole prompts in one pass has its longest prompt here. 0 is `step_tokens`.
        max_running: most sequences in one step.
        blocks: KV blocks in all.
        transfer_bytes_per_s, transfer_latency_s: of KV blocks to another worker.
        overhead_s: from a request's arrival to its first step, and from a step's end to its tokens' arrival, together.
    """

    name: str
    model: str
    device: str
    source: str
    measured_on: str
    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    block_tokens: Count
    block_bytes: Count
    blocks: Count
    step_tokens: Count
    max_running: Count
    max_model_len: Count
    transfer_bytes_per_s: Annotated[float, Meta(gt=0)]
    transfer_latency_s: Annotated[float, Meta(ge=0)]
    overhead_s: Annotated[float, Meta(ge=0)] = 0.0
    tensor_parallel: Count = 1
    gpus: Annotated[int, Meta(ge=0)] = 1
    prefill_step_tokens: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        tokens = [point.tokens for point in self.prefill]
        if len(tokens) < 2 or any(one >= other for one, other in pairwise(tokens)):
            raise ValueError("prefill: at least two points, by rising tokens, are needed")
        grid = [(point.batch, point.context_tokens) for point in self.decode]
        batches, contexts = sorted({one for one, _ in grid}), sorted({one for _, one in grid})
        if not grid or grid != [(batch, context) for batch in batches for context in contexts]:
            raise ValueError("decode: a full grid of batch and context_tokens, sorted by both, is needed")
        if not self.prefill_step_tokens:  # settled here: `step_tokens` may be replaced, what was measured stays
            msgspec.structs.force_setattr(self, "prefill_step_tokens", self.step_tokens)


class Predictor:
    """Seconds between and beyond a profile's points: linear between them, the last slope beyond the last.

    Every method is pure. Made once for a profile and kept: the tables are laid out for quick reading.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._tokens = [float(point.tokens) for point in profile.prefill]
        self._batches = sorted({float(point.batch) for point in profile.decode})
        self._contexts = sorted({float(point.context_tokens) for point in profile.decode})
        width = len(self._contexts)
        rows = [point.seconds for point in profile.decode]
        self._decode = [rows[start : start + width] for start in range(0, len(rows), width)]
        self._least_decode_s = max(self._decode[0][0] * 0.5, 1e-9)
        self.step_overhead_s = _step_overhead_s(profile)
        """What a step costs before its first token."""
        self._step_tokens = profile.step_tokens
        self._prefill = _rising(
            point.seconds - self.step_overhead_s * math.ceil(point.tokens / profile.prefill_step_tokens)
            for point in profile.prefill
        )

    @property
    def batches(self) -> list[float]:
        """Between these a decode step's seconds are linear in its batch."""
        return self._batches

    def prefill_s(self, new_tokens: float, context_tokens: float = 0.0) -> float:
        """Seconds to compute `new_tokens` after `context_tokens` that are in the cache, alone on the engine."""
        if new_tokens <= 0:
            return 0.0
        return self.steps_s(new_tokens) + self.chunk_s(new_tokens, context_tokens)

    def steps_s(self, new_tokens: float) -> float:
        """What the steps for so many tokens cost before their tokens, alone on the engine."""
        return self.step_overhead_s * math.ceil(new_tokens / self._step_tokens)

    def chunk_s(self, new_tokens: float, context_tokens: float) -> float:
        """What these tokens add to a step that runs anyway."""
        added = self._whole_s(context_tokens + new_tokens) - self._whole_s(context_tokens)
        return max(0.0, added)

    def decode_s(self, batch: float, context_tokens: float) -> float:
        """Seconds of one step of `batch` sequences with `context_tokens` on average."""
        if batch <= 0:
            return 0.0
        # Written out, since a router asks for several of these for each request.
        batches, contexts, table = self._batches, self._contexts, self._decode
        if len(batches) == 1 or len(contexts) == 1:
            return self._narrow_decode_s(batch, context_tokens)
        row = bisect_right(batches, batch, 1, len(batches) - 1) - 1
        column = bisect_right(contexts, context_tokens, 1, len(contexts) - 1) - 1
        part = (context_tokens - contexts[column]) / (contexts[column + 1] - contexts[column])
        line, above = table[row], table[row + 1]
        low = line[column] + (line[column + 1] - line[column]) * part
        high = above[column] + (above[column + 1] - above[column]) * part
        seconds = low + (high - low) * ((batch - batches[row]) / (batches[row + 1] - batches[row]))
        return seconds if seconds > self._least_decode_s else self._least_decode_s

    def decode_run(self, batch: float, context_tokens: float, most: int) -> tuple[int, float, float]:
        """Steps one after the other, each with a token more of context, as far as a straight line describes them.

        Returns:
            How many (`most` at most), the seconds of the first, and how much longer each is than the one before.
        """
        contexts, steps = self._contexts, most
        knot = max(bisect_right(contexts, context_tokens), 1)
        if knot < len(contexts) - 1:
            steps = min(most, int(contexts[knot] - context_tokens) + 1)
        first_s = self.decode_s(batch, context_tokens)
        if steps == 1:
            return 1, first_s, 0.0
        last_s = self.decode_s(batch, context_tokens + (steps - 1))
        second_s = self.decode_s(batch, context_tokens + 1)
        each_s = (last_s - first_s) / (steps - 1)
        # Where a lower bound cuts the line it is none.
        if abs(second_s - first_s - each_s) > 1e-12 + 1e-9 * first_s:
            return 1, first_s, 0.0
        return steps, first_s, each_s

    def step_s(self, chunks: list[tuple[int, int]], batch: int, context_tokens: float) -> float:
        """Seconds of one mixed step: prefill chunks (new tokens, context before them) beside a decode batch."""
        added = sum(self.chunk_s(new, context) for new, context in chunks)
        if batch > 0:
            return self.decode_s(batch, context_tokens) + added
        return self.step_overhead_s + added

    def transfer_s(self, moved_bytes: float) -> float:
        """Seconds for that many bytes of KV to another worker."""
        return self.profile.transfer_latency_s + moved_bytes / self.profile.transfer_bytes_per_s

    def _narrow_decode_s(self, batch: float, context_tokens: float) -> float:
        """Of a table of one batch or one context."""
        row, share = _place(self._batches, batch)
        low = _line(self._contexts, self._decode[row], context_tokens)
        if row + 1 == len(self._decode):
            return max(low, 1e-9)
        high = _line(self._contexts, self._decode[row + 1], context_tokens)
        return max(low + (high - low) * share, self._least_decode_s)

    def _whole_s(self, tokens: float) -> float:
        """The prefill table without the fixed cost of its steps; 0 at 0 tokens."""
        if tokens <= self._tokens[0]:
            return self._prefill[0] * tokens / self._tokens[0]
        return _line(self._tokens, self._prefill, tokens)


def _step_overhead_s(profile: Profile) -> float:
    """Of the two shortest prompts: what is the same in each of their steps, beside what grows with the tokens.

    Nothing where both consist of nearly full steps: then the two cannot be told apart.
    """
    first, second = profile.prefill[0], profile.prefill[1]
    first_steps, second_steps = (math.ceil(one.tokens / profile.prefill_step_tokens) for one in (first, second))
    unlike = first_steps * second.tokens - second_steps * first.tokens
    if abs(unlike) < 0.05 * first_steps * second.tokens:
        return 0.0
    overhead_s = (first.seconds * second.tokens - second.seconds * first.tokens) / unlike
    return min(max(0.0, overhead_s), first.seconds / first_steps)


def _rising(values: Iterable[float]) -> list[float]:
    """More tokens never cost less: where a table says so, that was noise."""
    return list(accumulate(values, max))


def _place(points: list[float], at: float) -> tuple[int, float]:
    """Between which points a value lies: the left one's index, and the share of the way to the right one.

    The share is beyond 1, or below 0, outside the points.
    """
    last = len(points) - 2
    if last < 0:
        return 0, 0.0
    index = bisect_right(points, at) - 1
    if index > last:
        index = last
    elif index < 0:
        index = 0
    left = points[index]
    return index, (at - left) / (points[index + 1] - left)


def _between(values: list[float], index: int, share: float) -> float:
    if len(values) == 1:
        return values[0]
    left = values[index]
    return left + (values[index + 1] - left) * share


def _line(points: list[float], values: list[float], at: float) -> float:
    return _between(values, *_place(points, at))


def read_profile(path: Path) -> Profile:
    """A profile file (JSON).

    Raises:
        ConfigError: it cannot be read, or is not a profile; the message names the field.
    """
    try:
        return decode_profile(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot be read ({error.strerror})", param="profile") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"profile {path}: {error}", param="profile") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"profile {path}: not JSON ({error})", param="profile") from None


def decode_profile(content: bytes) -> Profile:
    """From JSON; raises msgspec's errors."""
    return msgspec.json.decode(content, type=Profile)


def encode_profile(profile: Profile) -> bytes:
    """As JSON, one field a line."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"
