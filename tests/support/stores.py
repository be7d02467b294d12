"""How tests make a store, and what they ask of it on disk."""

import zarr

from engine.job import Job


def render(model, request, out, *, resume=False, overwrite=False, most=None):
    """Render to ``out``, or ``most`` writes of it, and return the job."""
    job = Job.prepare(model, request, out)
    for count, _ in enumerate(job.run(job.open_sink(resume=resume, overwrite=overwrite)), 1):
        if count == most:
            break
    return job


def files(folder):
    """Every path below with its bytes; None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def shards(store, level="*"):
    """How many shards a store has."""
    return len(list(store.glob(f"{level}/c/*/*/*[0-9]")))


def pixels(store, level=0):
    """uint8 [3, H, W]."""
    return zarr.open_group(store, mode="r")[str(level)][:]


def attributes(store):
    return dict(zarr.open_group(store, mode="r").attrs["ourgan"])
