"""One render on the workers of a Dask cluster, or on several devices of this machine.

cluster    the cluster that a user names, or processes of this machine
tasks      functions that run on a worker
conduct    gives works to workers, and collects their answers
render     a store that is begun, rendered in shares and finished by workers
"""

from __future__ import annotations

from importlib.util import find_spec

from engine.errors import UsageError, option
from engine.plan.parts import MAX_PARTS


def check_workers(
    dask: str | None,
    devices: object,
    shares: int | None = None,
    *,
    part: object = None,
    overwrite: bool = False,
    device: str | None = None,
) -> None:
    """Raise UsageError for options of workers that contradict others, or without the extra ``dask``."""
    name = option("dask", dask) if dask is not None else option("devices")
    if dask is not None and devices:
        raise UsageError(f"{name} and {option('devices')}: exclude each other; give one of them")
    if part is not None:
        raise UsageError(
            f"{name} and {option('part')}: exclude each other, as workers render all parts; give one of them"
        )
    if overwrite:
        raise UsageError(
            f"{name} and {option('overwrite', True)}: exclude each other, as workers share a store; remove the old store first"
        )
    if devices and device is not None:
        raise UsageError(f"{option('devices')} and {option('device', device)}: exclude each other; give one of them")
    if shares is not None and not 1 <= shares <= MAX_PARTS:
        raise UsageError(f"{option('shares', shares)}: the number of shares must be from 1 to {MAX_PARTS}")
    if find_spec("distributed") is None:
        raise UsageError(f"{name}: needs Dask; install the extra dask (pip install 'ourgan-engine[dask]')")
