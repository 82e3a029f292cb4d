"""A schedule's hours as people write them: `mon-fri 08:00-18:00`, `sat,sun 22:00-02:00`, `06:30-09:00`. UTC."""

from __future__ import annotations

import re

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_S = 86400

_HOURS = re.compile(r"(?:(\S+)[ \t]+)?(\d{1,2}:\d{2}(?::\d{2})?)-(\d{1,2}:\d{2}(?::\d{2})?)")


def parse_hours(text: str) -> tuple[tuple[int, ...], int, int]:
    """Weekdays (0 is Monday; none: every day), and seconds after midnight of the start and the end.

    Raises:
        ValueError: not such a text.
    """
    matched = _HOURS.fullmatch(text.strip().lower())
    if matched is None:
        raise ValueError("must be days and hours in UTC, such as `mon-fri 08:00-18:00` or `08:00-18:00`")
    days, start, end = matched.groups()
    start_s, end_s = _seconds(start), _seconds(end)
    if start_s == DAY_S:
        raise ValueError("must start before 24:00")
    if start_s == end_s:
        raise ValueError("must end at another time than it starts; the whole day is 00:00-24:00")
    return (() if days is None else _weekdays(days)), start_s, end_s


def hours_text(weekdays: tuple[int, ...], start_s: int, end_s: int) -> str:
    """The text that `parse_hours` reads."""
    runs: list[list[int]] = []
    for day in weekdays:
        if runs and runs[-1][-1] == day - 1:
            runs[-1].append(day)
        else:
            runs.append([day])
    days = ",".join(DAYS[run[0]] if len(run) == 1 else f"{DAYS[run[0]]}-{DAYS[run[-1]]}" for run in runs)
    return f"{days} {_clock(start_s)}-{_clock(end_s)}".lstrip()


def _weekdays(text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        for name in (first, last) if dash else (first,):
            if name not in DAYS:
                raise ValueError(f"must name days as {', '.join(DAYS)}, has {name!r}")
        begin, end = DAYS.index(first), DAYS.index(last if dash else first)
        found.update((begin + step) % 7 for step in range((end - begin) % 7 + 1))
    return tuple(sorted(found))


def _seconds(clock: str) -> int:
    hours, minutes, seconds = (int(part) for part in (clock + ":00" if clock.count(":") == 1 else clock).split(":"))
    total_s = hours * 3600 + minutes * 60 + seconds
    if minutes > 59 or seconds > 59 or total_s > DAY_S:
        raise ValueError(f"must have times from 00:00 to 24:00, has {clock}")
    return total_s


def _clock(seconds: int) -> str:
    text = f"{seconds // 3600:02d}:{seconds % 3600 // 60:02d}"
    return text if seconds % 60 == 0 else f"{text}:{seconds % 60:02d}"
