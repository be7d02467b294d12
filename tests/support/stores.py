"""Renders to a store, and what the store holds on disk."""

import json

import zarr

from engine.job import Job


def render(model, request, out, *, resume=False, overwrite=False, writes=None, log=lambda line: None):
    """Render to ``out`` and return the job; ``writes``: number of writes after which the render stops."""
    job = Job.prepare(model, request, out, log)
    run = job.run(job.open_sink(resume=resume, overwrite=overwrite))
    for count, _ in enumerate(run, 1):
        if count == writes:
            run.close()
            break
    return job


def files(folder):
    """Every path below a folder, with the bytes of files; None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def image_files(store):
    """Every path below a store but its metadata, which name the executor."""
    return {name: content for name, content in files(store).items() if name != "zarr.json"}


def shards(store, level="*"):
    """Number of shards of a store, or of one level."""
    return len(list(store.glob(f"{level}/c/*/*/*[0-9]")))


def pixels(store, level=0):
    """Pixels of a level, uint8 [3, H, W]."""
    return zarr.open_group(store, mode="r")[str(level)][:]


def attributes(store):
    """Plan and provenance of a store."""
    return json.loads((store / "zarr.json").read_text())["attributes"]["ourgan"]
