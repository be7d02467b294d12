"""Limits of control groups, versions 1 and 2, from made-up file systems; RLIMIT_AS and affinity for real."""

import os
import resource
import subprocess
import sys

import pytest

from engine.container import cpu_count, free_memory

MIB = 1 << 20


def made(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


V2 = {"proc/self/cgroup": "0::/pod/box", "sys/fs/cgroup/cgroup.controllers": "cpu memory"}
V1 = {"proc/self/cgroup": "4:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n1:name=systemd:/"}
BOX, POD = "sys/fs/cgroup/pod/box", "sys/fs/cgroup/pod"
MEMORY, CPU = "sys/fs/cgroup/memory/docker/1234", "sys/fs/cgroup/cpu,cpuacct/docker/1234"
NO_LIMIT = 9223372036854771712

MEMORY_LIMITS = {
    "none": ({}, None),
    "max": (V2 | {f"{BOX}/memory.max": "max", f"{BOX}/memory.current": 5 * MIB}, None),
    "own": (V2 | {f"{BOX}/memory.max": 300 * MIB, f"{BOX}/memory.current": 100 * MIB}, 200 * MIB),
    "high": (
        V2 | {f"{BOX}/memory.max": "max", f"{BOX}/memory.high": 50 * MIB, f"{BOX}/memory.current": 10 * MIB},
        40 * MIB,
    ),
    "outer is tighter": (
        V2
        | {f"{BOX}/memory.max": 300 * MIB, f"{BOX}/memory.current": 100 * MIB}
        | {f"{POD}/memory.max": 250 * MIB, f"{POD}/memory.current": 150 * MIB},
        100 * MIB,
    ),
    "cached files are free": (
        V2
        | {f"{BOX}/memory.max": 300 * MIB, f"{BOX}/memory.current": 200 * MIB}
        | {f"{BOX}/memory.stat": f"anon 1\ninactive_file {150 * MIB}\nactive_file 7"},
        250 * MIB,
    ),
    "own group is the root": (
        V2 | {"sys/fs/cgroup/memory.max": 64 * MIB, "sys/fs/cgroup/memory.current": 80 * MIB},
        0,
    ),
    "hybrid": (
        {"proc/self/cgroup": "0::/box"}
        | {"sys/fs/cgroup/unified/box/memory.max": 9 * MIB, "sys/fs/cgroup/unified/box/memory.current": MIB},
        8 * MIB,
    ),
    "version 1": (
        V1 | {f"{MEMORY}/memory.limit_in_bytes": 90 * MIB, f"{MEMORY}/memory.usage_in_bytes": 30 * MIB},
        60 * MIB,
    ),
    "version 1 without limit": (
        V1 | {f"{MEMORY}/memory.limit_in_bytes": NO_LIMIT, f"{MEMORY}/memory.usage_in_bytes": 30 * MIB},
        None,
    ),
    "version 1 in a container": (
        V1
        | {"sys/fs/cgroup/memory/memory.limit_in_bytes": 90 * MIB}
        | {"sys/fs/cgroup/memory/memory.usage_in_bytes": 80 * MIB},
        10 * MIB,
    ),
    "address space": (
        {
            "proc/self/limits": f"Limit  Soft Limit  Hard Limit  Units\nMax address space  {500 * MIB}  unlimited  bytes",
            "proc/self/status": "Name: a\nVmSize:   102400 kB",
        },
        400 * MIB,
    ),
    "no limit of address space": (
        {"proc/self/limits": "Max address space  unlimited  unlimited  bytes", "proc/self/status": "VmSize: 1 kB"},
        None,
    ),
    "nonsense": ({"proc/self/cgroup": "what\n0::", f"{BOX}/memory.max": "?"}, None),
}

CPU_LIMITS = {
    "none": ({}, None),
    "max": (V2 | {f"{BOX}/cpu.max": "max 100000"}, None),
    "one of a pod's": (V2 | {f"{BOX}/cpu.max": "max 100000", f"{POD}/cpu.max": "100000 100000"}, 1),
    "half a core": (V2 | {f"{BOX}/cpu.max": "50000 100000"}, 1),
    "version 1": (V1 | {f"{CPU}/cpu.cfs_quota_us": 100000, f"{CPU}/cpu.cfs_period_us": 100000}, 1),
    "version 1 without quota": (V1 | {f"{CPU}/cpu.cfs_quota_us": -1, f"{CPU}/cpu.cfs_period_us": 100000}, None),
    "nonsense": (V2 | {f"{BOX}/cpu.max": "a b c"}, None),
}


@pytest.mark.parametrize("name", MEMORY_LIMITS)
def test_memory(tmp_path, name):
    files, expected = MEMORY_LIMITS[name]
    assert free_memory(made(tmp_path, files)) == expected


@pytest.mark.parametrize("name", CPU_LIMITS)
def test_processors(tmp_path, name):
    files, expected = CPU_LIMITS[name]
    assert cpu_count(made(tmp_path, files)) == (expected or len(os.sched_getaffinity(0)))


def python(code, **options):
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "VIPS_CONCURRENCY")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, **options, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_default_memory_fits_a_limit_of_address_space():
    """As ``prlimit --as`` and batch systems set it."""
    limit = 3 << 30
    code = "from engine.device.memory import free_host, resident; import torch; print(free_host(), resident())"
    free, resident = map(int, python(code, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))))
    assert resident < free < limit


def test_threads_follow_the_affinity():
    one = min(os.sched_getaffinity(0))
    code = "import engine, torch, os; print(torch.get_num_threads(), os.cpu_count(), os.environ.get('OMP_NUM_THREADS'))"
    threads, cores, chosen = python(code, preexec_fn=lambda: os.sched_setaffinity(0, {one}))
    assert threads == "1"
    assert chosen == ("1" if int(cores) > 1 else "None")
