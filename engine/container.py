"""Limits that a container, a batch system or a shell sets for this process: control groups, affinity and RLIMIT_AS.

Every function takes the root of the file system, so that tests can make one. A system without such limits has none of the
files, and the functions say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 1 << 60
"""Version 1 of control groups writes a number near 2^63 for no limit."""


def free_memory(root: Path = _ROOT) -> int | None:
    """Bytes that the limits of this process leave; None without a limit."""
    return min((*_cgroup_memory(root), *_address_space(root)), default=None)


def cpu_count(root: Path = _ROOT) -> int:
    """Processors that this process may keep busy: those of its affinity, or its control groups' share of time if less."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    return max(1, min((cores, *(int(share) for share in _cpu_shares(root)))))


def _cgroup_memory(root: Path) -> Iterator[int]:
    """Bytes that each group leaves. Cached pages of files that are not in use are free: the kernel drops them first."""
    for group in _groups(root, ""):
        limits = [_number(group / "memory.max"), _number(group / "memory.high")]
        used = _number(group / "memory.current")
        for limit in limits:
            if limit is not None and used is not None:
                yield max(0, limit - used + _statistic(group, "inactive_file"))
    for group in _groups(root, "memory"):
        limit, used = _number(group / "memory.limit_in_bytes"), _number(group / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < _UNLIMITED:
            yield max(0, limit - used + _statistic(group, "total_inactive_file"))


def _cpu_shares(root: Path) -> Iterator[float]:
    """Processors by time, of each group that has a quota."""
    for group in _groups(root, ""):
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max" and int(period) > 0:
                yield int(quota) / int(period)
    for group in _groups(root, "cpu"):
        quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota_us is not None and period_us and quota_us > 0:
            yield quota_us / period_us


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and of the groups around it; ``controller`` is "" for version 2.

    A container may see its own group as the root of the hierarchy, while /proc names it by the host's path.
    """
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, names, path = line.split(":", 2)
            if (number == "0" and not names) if not controller else controller in names.split(","):
                mounts = [names, controller] if controller else ["", "unified"]
                for mount in dict.fromkeys(mounts):
                    top = root / "sys/fs/cgroup" / mount
                    group = top / path.lstrip("/")
                    yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", and without the file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(group: Path, name: str) -> int:
    """A line of a group's memory.stat; 0 without it."""
    with suppress(OSError, ValueError):
        lines = (group / "memory.stat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
    return 0


def _address_space(root: Path) -> Iterator[int]:
    """Bytes of address space that RLIMIT_AS leaves."""
    with suppress(OSError, ValueError, StopIteration):
        limits = (root / "proc/self/limits").read_text().splitlines()
        limit = int(next(line for line in limits if line.startswith("Max address space")).split()[3])
        status = (root / "proc/self/status").read_text().splitlines()
        used = int(next(line for line in status if line.startswith("VmSize:")).split()[1]) * 1024
        yield max(0, limit - used)
