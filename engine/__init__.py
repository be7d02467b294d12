"""Streaming inference for OUR-GAN: one photograph in, a seamless image larger than memory out.

    import engine

    result = engine.render("model.safetensors", "out.zarr", size=(3072, 4096), seed=7)   # sizes are (height, width)
    print(result.path, result.measurements.seconds)

    store = engine.open("out.zarr")                          # finished, or still growing
    print(store.size, store.levels, store.complete)
    corner = store.read(engine.Box(0, 0, 512, 512))          # numpy uint8 [h, w, 3]
    engine.export("out.zarr", "out.tif")                     # .ome.tif, .png, .jpg, .webp

    engine.render("RealESRGAN_x4plus.pth", "large.zarr", init="photo.jpg")    # enlarge a picture with a checkpoint

load(path)                   Open a model file or a super-resolution checkpoint; ``render`` takes it in place of a path.
render(model, out, ...)      Plan and render: options of ``Request``, ``on_progress``, ``cancelled``, ``resume``, ``overwrite``.
open(path)                   Open a store: size, levels, provenance, and regions at any level.
export(store, out, ...)      Write a store to TIFF, PNG, JPEG or WebP in bounded memory.
Request(...)                 Options of a render, each documented under its field.
Job.prepare(model, ...)      A planned render: look at ``plan`` and ``projection`` before it runs, and go box by box.
Box(y0, x0, y1, x1)          Half-open rectangle in pixels.
EngineError                  Base of every error: one line that says what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.threads import limit_spinning
from engine.version import __version__

if TYPE_CHECKING:
    from engine.errors import EngineError
    from engine.exporters import export
    from engine.geometry import Box
    from engine.job import Job, Progress, RenderResult, render
    from engine.model.bundle import Model, load
    from engine.plan.request import Request
    from engine.store import Store
    from engine.store import open_store as open

limit_spinning()  # before any module of the package loads torch

__all__ = [
    "Box",
    "EngineError",
    "Job",
    "Model",
    "Progress",
    "RenderResult",
    "Request",
    "Store",
    "__version__",
    "export",
    "load",
    "open",
    "render",
]

_SOURCES = {
    "Box": "engine.geometry:Box",
    "EngineError": "engine.errors:EngineError",
    "Job": "engine.job:Job",
    "Model": "engine.model.bundle:Model",
    "Progress": "engine.job:Progress",
    "RenderResult": "engine.job:RenderResult",
    "Request": "engine.plan.request:Request",
    "Store": "engine.store:Store",
    "export": "engine.exporters:export",
    "load": "engine.model.bundle:load",
    "open": "engine.store:open_store",
    "render": "engine.job:render",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import on first use: ``engine --help`` does not wait for torch."""
    if name not in _SOURCES:
        raise AttributeError(f"module 'engine' has no attribute '{name}'")
    from importlib import import_module

    module, _, attribute = _SOURCES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_SOURCES})
