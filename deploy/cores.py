"""Which CPUs each worker gets. Two engines that share cores make each other's step times jump, so they do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def divide(cores: Sequence[Sequence[int]], shares: int) -> list[tuple[int, ...]] | None:
    """Disjoint sets of CPUs, as even as they can be.

    Args:
        cores: the physical cores, each as its logical CPUs; a core is not split while there is one for each share.

    Returns:
        One set of CPUs for each share; None when there is nothing to divide: fewer than two shares, or fewer CPUs.
    """
    units = [tuple(core) for core in cores]
    if len(units) < shares:
        units = [(cpu,) for core in units for cpu in core]
    if shares < 2 or len(units) < shares:
        return None
    each, extra = divmod(len(units), shares)
    starts = [index * each + min(index, extra) for index in range(shares + 1)]
    return [
        tuple(sorted(cpu for unit in units[start:end] for cpu in unit)) for start, end in itertools.pairwise(starts)
    ]


def physical_cores(cpus: Iterable[int], topology: Path = _TOPOLOGY) -> list[tuple[int, ...]]:
    """The given logical CPUs grouped by physical core, as the kernel tells; each its own where it does not."""
    groups: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        try:
            core = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            core = f"alone-{cpu}"
        groups.setdefault(core, []).append(cpu)
    return [tuple(group) for group in groups.values()]
