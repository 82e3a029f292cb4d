"""Floors that a policy tells in advance: when a window holds."""

from __future__ import annotations

from planner.objectives import Window

DAY_S = 86400.0


def active(window: Window, unix_s: float, lead_s: float) -> bool:
    """Whether the floor holds now or within the lead, so that workers are there when it begins."""
    return _within(window, unix_s) or _within(window, unix_s + lead_s)


def _within(window: Window, unix_s: float) -> bool:
    days, second = divmod(unix_s, DAY_S)
    weekday = int(days + 3) % 7  # the epoch was a Thursday
    if window.end_s > window.start_s:
        return window.start_s <= second < window.end_s and (not window.weekdays or weekday in window.weekdays)
    if second >= window.start_s:
        return not window.weekdays or weekday in window.weekdays
    return second < window.end_s and (not window.weekdays or (weekday - 1) % 7 in window.weekdays)
