"""Quantizes KV blocks for the wire, for links that are slower than the quantizing.

A block is an opaque packing of numbers of the KV cache's dtype: which of them are neighbours in the model is the
engine's business. So every number is quantized by itself, to 8 bits, with one scale for each group of neighbours
in memory. The encoded form of some pieces is all groups' peaks, one number of the cache's own dtype each (the largest
magnitude in the group, which that dtype holds exactly), then one byte for each number.

Slots that were never written can hold anything. A number that is not finite arrives as NaN, whatever it was, and the
others of its group as if it were zero; such a group is marked by its peak's sign.

The work is cut into chunks of `_CHUNK_NUMBERS`, the most that torch computes on the calling thread alone. Larger
tensors would start a team of OpenMP threads for each transfer thread, beside the engine's own, and
`torch.set_num_threads` would take threads from the engine too. A chunk's scratch memory also fits a core's cache.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from slipstream.errors import StartupError, TransferError

GROUP = 64
# Just below 32768, torch's grain size; a whole number of groups of 32, 64 and 128.
_CHUNK_NUMBERS = 32768 - 128
# A GPU wants few large operations; 16 MiB of scratch memory at a time.
_GPU_CHUNK_NUMBERS = 1 << 22
# The least peak, so that neither it nor its reciprocal leaves float32's normal range.
_LEAST_PEAK = 2.0**-100
# Keeps the largest number's decoded value from being rounded above it, to infinity at the end of float32's range.
_JUST_BELOW_ONE = 1 - 2.0**-22
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Codec(ABC):
    """One way to quantize, for KV caches of one dtype. Holds no state: any number of threads may use it.

    Tensors of pieces, targets and encoded bytes are one-dimensional, of dtype uint8. All pieces, or targets, of a
    call are on one device, where the work is done; encoded bytes may be on another. Each piece and target is a whole
    number of groups (`group_bytes`) and begins at a multiple of the dtype's size in its storage.

    Args:
        dtype: of the numbers in the KV cache: float32, bfloat16 or float16.
        group: numbers that share a scale. Both sides need the same.
    """

    _levels: float  # what a group's peak is mapped to
    _unit: float  # what `_unpack` makes of the peak

    def __init__(self, dtype: torch.dtype, group: int = GROUP) -> None:
        assert dtype in _DTYPES
        assert _CHUNK_NUMBERS % group == 0
        self._dtype = dtype
        self._group = group
        self._element_bytes = int(dtype.itemsize)
        self.group_bytes = group * self._element_bytes

    def encoded_bytes(self, raw_bytes: int) -> int:
        """Bytes that `raw_bytes` bytes of KV become.

        Raises:
            TransferError: `compression`: not a whole number of groups.
        """
        self._check_whole("raw_bytes", raw_bytes)
        return raw_bytes // self.group_bytes * (self._element_bytes + self._group)

    def encode(self, pieces: Sequence[torch.Tensor], out: torch.Tensor) -> int:
        """Write the encoded form of `pieces`, one after the other, to the front of `out`; returns its bytes.

        Raises:
            TransferError: `compression`: a piece is not a whole number of groups, or `out` is too short.
        """
        numbers = [self._numbers("pieces", piece) for piece in pieces]
        total = sum(len(piece) for piece in numbers)
        encoded = self.encoded_bytes(total * self._element_bytes)
        if len(out) < encoded:
            raise TransferError(f"out: {len(out)} bytes, the encoded pieces need {encoded}", code="compression")
        device = numbers[0].device if numbers else out.device
        with torch.inference_mode():  # each thread has its own
            made = out[:encoded] if device == out.device else torch.empty(encoded, dtype=torch.uint8, device=device)
            scratch = self._scratch(total, device)
            for batch, peaks, codes in self._batches(numbers, made[: encoded - total], made[encoded - total :]):
                found = self._encode_batch(batch, codes.view(torch.int8), scratch[:, : len(codes)])
                peaks.copy_(found.to(self._dtype).view(torch.uint8))
            if device != out.device:
                out[:encoded].copy_(made)
        return encoded

    def decode(self, data: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """Write what `data` stands for into `targets`, one after the other.

        Never fails for what the bytes hold: bytes that `encode` did not make become numbers that mean nothing.

        Raises:
            TransferError: `compression`: a target is not a whole number of groups, or `data` has another length
                than the targets need.
        """
        numbers = [self._numbers("targets", target) for target in targets]
        total = sum(len(target) for target in numbers)
        encoded = self.encoded_bytes(total * self._element_bytes)
        if len(data) != encoded:
            raise TransferError(f"data: {len(data)} bytes, the targets need {encoded}", code="compression")
        with torch.inference_mode():
            data = data.to(numbers[0].device) if numbers else data
            scratch = self._scratch(total, data.device)
            for batch, peaks, codes in self._batches(numbers, data[: encoded - total], data[encoded - total :]):
                values = scratch[0, : len(codes)]
                # A copy, since received bytes may begin anywhere and numbers may not.
                self._decode_batch(peaks.clone().view(self._dtype), codes.view(torch.int8), values)
                for target, part in zip(batch, values.split([len(target) for target in batch]), strict=True):
                    target.copy_(part)

    def _encode_batch(self, batch: list[torch.Tensor], codes: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """Fills `codes` and returns the groups' peaks, float32."""
        values, magnitudes = scratch.unbind(0)
        for source, part in zip(batch, values.split([len(source) for source in batch]), strict=True):
            part.copy_(source)
        rows = values.view(-1, self._group)
        peaks = torch.abs(values, out=magnitudes).view(-1, self._group).amax(1)
        marked = None if math.isfinite(peaks.max().item()) else values.isfinite().logical_not_()
        if marked is not None:
            values.masked_fill_(marked, 0)
            peaks = rows.abs().amax(1)
        peaks.clamp_(min=_LEAST_PEAK)
        rows.mul_((self._levels / peaks).unsqueeze(1))
        self._pack(values, codes)
        if marked is not None:
            codes.masked_fill_(marked, self._not_a_number)
            peaks = torch.where(marked.view(-1, self._group).any(1), -peaks, peaks)
        return peaks

    def _decode_batch(self, peaks: torch.Tensor, codes: torch.Tensor, values: torch.Tensor) -> None:
        """Fills `values`, float32."""
        self._unpack(codes, values)
        scales = peaks.float().abs().mul_(_JUST_BELOW_ONE / self._unit)
        values.view(-1, self._group).mul_(scales.unsqueeze(1))
        if torch.signbit(peaks).any():
            values.masked_fill_(self._is_marked(codes), math.nan)

    def _scratch(self, numbers: int, device: torch.device) -> torch.Tensor:
        """Two rows of float32 for a chunk. Made once a call: memory that is fresh for each chunk costs more than
        the arithmetic."""
        return torch.empty(2, min(numbers, _chunk_numbers(device)), dtype=torch.float32, device=device)

    def _batches(
        self, numbers: Sequence[torch.Tensor], peaks: torch.Tensor, codes: torch.Tensor
    ) -> Iterator[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]]:
        """All of `numbers` in order, cut and joined into chunks, and the bytes of the peaks and codes of each."""
        chunk = _chunk_numbers(codes.device)
        peak_bytes = chunk // self._group * self._element_bytes
        for index, batch in enumerate(_chunks(numbers, chunk)):
            of_peaks, of_codes = (slice(index * size, (index + 1) * size) for size in (peak_bytes, chunk))
            yield batch, peaks[of_peaks], codes[of_codes]

    def _numbers(self, name: str, piece: torch.Tensor) -> torch.Tensor:
        """The piece as numbers of the cache's dtype, over the same memory."""
        self._check_whole(name, len(piece))
        if piece.storage_offset() % self._element_bytes:
            raise TransferError(
                f"{name}: a piece begins at byte {piece.storage_offset()}, which is inside a number of {self._dtype}",
                code="compression",
            )
        return piece.view(self._dtype)

    def _check_whole(self, name: str, length_bytes: int) -> None:
        if length_bytes % self.group_bytes:
            raise TransferError(
                f"{name}: {length_bytes} bytes are no multiple of {self.group_bytes} ({self._group} numbers of "
                f"{self._dtype}), so they cannot be quantized: set transfer.compression=none",
                code="compression",
            )

    _not_a_number: int

    @abstractmethod
    def _pack(self, values: torch.Tensor, codes: torch.Tensor) -> None:
        """Numbers within `_levels` (which may change) to int8 codes, never to one that `_is_marked`."""

    @abstractmethod
    def _unpack(self, codes: torch.Tensor, values: torch.Tensor) -> None:
        """Codes to float32, `_levels` to `_unit`."""

    @abstractmethod
    def _is_marked(self, codes: torch.Tensor) -> torch.Tensor:
        """A mask of the codes that stand for NaN."""


class _Int8(Codec):
    """127 even steps to either side of zero: an error of at most 1/254 of the group's peak."""

    _levels = 127.0
    _unit = 127.0
    _not_a_number = -128

    def _pack(self, values: torch.Tensor, codes: torch.Tensor) -> None:
        # Rounds as `round_` does, which however starts threads whatever the size: added to 1.5 * 2**23, a small
        # number's integer part is the low bits of the sum.
        codes.copy_(values.add_(1.5 * 2**23).view(torch.int32))

    def _unpack(self, codes: torch.Tensor, values: torch.Tensor) -> None:
        values.copy_(codes)

    def _is_marked(self, codes: torch.Tensor) -> torch.Tensor:
        return codes == -128


class _Fp8(Codec):
    """float8_e4m3fn: an error of at most 1/16 of the number itself, or 1/458752 of the group's peak."""

    _levels = 448.0
    # `_unpack` reads the codes as halves, whose exponents are biased by 8 more.
    _unit = 448.0 / 256
    _not_a_number = 0x7F

    def _pack(self, values: torch.Tensor, codes: torch.Tensor) -> None:
        codes.view(torch.float8_e4m3fn).copy_(values)

    def _unpack(self, codes: torch.Tensor, values: torch.Tensor) -> None:
        # On a CPU torch converts float8 one by one, twenty times slower than this: its seven bits are those of a
        # half with three more bits of mantissa and one more of exponent. The mask clears the second copy of the sign.
        halves = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        values.copy_(halves.view(torch.float16))

    def _is_marked(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.bitwise_and(0x7F) == 0x7F


def _chunk_numbers(device: torch.device) -> int:
    return _CHUNK_NUMBERS if device.type == "cpu" else _GPU_CHUNK_NUMBERS


def _chunks(numbers: Sequence[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    room = size
    for piece in numbers:
        for part in (piece[:room], *piece[room:].split(size)):
            batch.append(part)
            room -= len(part)
            if room == 0:
                yield batch
                batch, room = [], size
    if room < size:
        yield batch


_CODECS: dict[str, type[Codec]] = {"int8": _Int8, "fp8": _Fp8}


def codec_for(name: str, dtype: torch.dtype, group: int = GROUP) -> Codec | None:
    """The codec for a value of `transfer.compression`; None for `none`.

    Raises:
        StartupError: KV caches of this dtype cannot be quantized, or there is no such codec.
    """
    if name == "none":
        return None
    if name not in _CODECS:
        raise StartupError(f"transfer.compression: {name!r} is not one of none, {', '.join(_CODECS)}")
    if dtype not in _DTYPES:
        raise StartupError(
            f"transfer.compression={name}: the KV cache holds {dtype}, and only float32, bfloat16 and float16 "
            "can be quantized: set it to none"
        )
    return _CODECS[name](dtype, group)
