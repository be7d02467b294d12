"""engine: streaming inference for OUR-GAN. A model of one photograph becomes a seamless image larger than memory.

from pathlib import Path
import engine

model = engine.load("model.safetensors")
job = engine.Job(model, engine.Request(size=(3072, 4096), seed=7), Path("out.zarr"))
print(job.plan, job.projection)
for done in job.run(job.open_sink(resume=False, overwrite=False)):
    print(done.box)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.version import __version__

if TYPE_CHECKING:
    from engine.job import Job
    from engine.model.bundle import load
    from engine.plan.request import Request

__all__ = ["Job", "Request", "__version__", "load"]

_HOMES = {"load": "engine.model.bundle", "Job": "engine.job", "Request": "engine.plan.request"}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import on first use: ``engine --help`` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
