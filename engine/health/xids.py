"""What the driver's error reports (Xids) mean for whoever computes on the device.

Numbers and meanings are those of NVIDIA's catalogue (https://docs.nvidia.com/deploy/xid-errors/, "Analyzing Xid Errors
with the Xid Catalog"). The grouping follows the immediate action that it names: where it says RESET_GPU, RESTART_BM or
to have the hardware looked at, the device is done for until then; where it says RESTART_APP, a process was at fault or
was the one hit, and the device goes on. Those that NVIDIA's own Kubernetes device plugin leaves out of its health check
as the application's (13, 31, 43, 45, 68, 109) are so here too.
"""

from __future__ import annotations

import enum


class XidKind(enum.Enum):
    """For whom an Xid is fatal."""

    DEVICE = "device"
    APPLICATION = "application"
    HARMLESS = "harmless"
    UNKNOWN = "unknown"


DEVICE = {
    46: "the GPU stopped processing",
    48: "an uncorrectable (double bit) memory error",
    61: "its power management unit stopped at a breakpoint",
    62: "its power management unit halted",
    64: "a bad row of memory could not be remapped",
    74: "an NVLink error",
    79: "the GPU has fallen off the bus",
    95: "an uncontained memory error",
    110: "a security fault",
    119: "its system processor (GSP) does not answer",
    120: "its system processor (GSP) failed",
    136: "link training failed",
    140: "an unrecovered memory error",
    142: "a fatal error in the NVLink's or GPU's fabric",
    143: "the GPU could not be initialized",
    145: "a fatal NVLink error (RLW)",
    149: "a fatal NVLink error (NETIR)",
    151: "a key rotation error",
    155: "an NVLink that failed in software",
    157: "a bad resource could not be retired",
    158: "a fatal timeout",
    171: "an uncorrectable error of its memory (DRAM)",
    172: "an uncorrectable error of its caches (SRAM)",
}
APPLICATION = {
    13: "a kernel's exception",
    31: "a kernel's memory page fault",
    32: "a corrupted push buffer",
    43: "a channel that was reset after a kernel's fault",
    45: "a channel cleaned up after another error, or after its process ended",
    68: "a video decoder's exception",
    69: "an exception of a graphics class",
    94: "a contained memory error: the process that was hit has to end",
    109: "a context switch that timed out",
    137: "a fault of a peer's access over NVLink",
}
HARMLESS = {
    63: "a bad row or page of memory was recorded, to be replaced with the next reset",
    92: "many corrected memory errors",
    154: "the driver's advice on recovery changed",
    156: "a bad resource was retired",
}


def kind_of(xid: int) -> XidKind:
    """For whom it is fatal."""
    if xid in DEVICE:
        return XidKind.DEVICE
    if xid in APPLICATION:
        return XidKind.APPLICATION
    return XidKind.HARMLESS if xid in HARMLESS else XidKind.UNKNOWN


def meaning_of(xid: int) -> str:
    """For people."""
    return DEVICE.get(xid) or APPLICATION.get(xid) or HARMLESS.get(xid) or "not known here; see NVIDIA's catalogue"
