"""Streaming inference for OUR-GAN: one photograph in, a seamless image larger than memory out.

    import engine

    result = engine.render("model.safetensors", "out.zarr", size="4096x3072", seed=7)
    engine.export("out.zarr", "out.png", max_size=2048)      # also .tif, .ome.tif, .jpg, .webp

    store = engine.open("out.zarr")                          # finished, or still growing
    corner = store.read((0, 0, 512, 512))                    # x, y, width, height -> numpy uint8 [height, width, 3]

    engine.render("realsr", "large.zarr", init="photo.jpg")  # enlarge a picture

Sizes are (width, height) and regions (x, y, width, height), or texts as on the command line. Arrays are [height, width, 3].
docs/api.md has more examples.

Functions
    load(path)             Open a model file or a super-resolution checkpoint; ``render`` takes it in place of a path.
    render(model, out)     Plan a render and run it, with the options of ``Request``.
    finish(store)          Complete a store whose parts are rendered, or say which are missing.
    open(path)             Open a store to read.
    export(store, out)     Write a store to a TIFF, PNG, JPEG or WebP file in bounded memory.

Classes
    Request                Options of a render.
    Job                    A planned render: look at its plan and cost before it runs.
    Store                  Size, levels and provenance of a store, and its pixels region by region.
    Model                  An open model.
    Box                    Rectangle by rows and columns.
    Progress               State of a render, which ``on_progress`` receives.
    RenderResult           Path, Plan, Projection (expected cost) and Measurements (measured cost) of a render.
    ExportResult           Summary of an exported file.

Errors: each is an EngineError, with one line that says what to do
    UsageError             An option is wrong, or contradicts another one.
    BudgetError            The plan does not fit the memory, VRAM or disk.
    AlignmentError         A tile or halo does not fit a network's window.
    InputError             A picture or store cannot be read: also ModelError (a model) and ResumeError (a store to continue).
    StorageError           An object store fails, or refuses access (AccessError).
    RenderError            A network produced NaN or infinity.
    Interrupted            Stopped on request; resuming continues.
"""

from __future__ import annotations

from engine.guards import guard_pictures
from engine.threads import limit_spinning, limit_threads
from engine.version import __version__

TYPE_CHECKING = False  # as in typing, whose import would delay the first line of the command line

if TYPE_CHECKING:
    from engine.api import render
    from engine.errors import (
        AccessError,
        AlignmentError,
        BudgetError,
        EngineError,
        InputError,
        Interrupted,
        ModelError,
        RenderError,
        ResumeError,
        StorageError,
        UsageError,
    )
    from engine.exporters import ExportResult, export
    from engine.geometry import Box
    from engine.job import Job
    from engine.model.bundle import Model, load
    from engine.parts import finish
    from engine.plan.cost import Projection
    from engine.plan.plan import Plan
    from engine.plan.request import Request
    from engine.result import Measurements, Progress, RenderResult
    from engine.store import Store
    from engine.store import open_store as open

limit_spinning()  # before any module of the package loads torch or pyvips
limit_threads()
guard_pictures()

__all__ = [
    "AccessError",
    "AlignmentError",
    "Box",
    "BudgetError",
    "EngineError",
    "ExportResult",
    "InputError",
    "Interrupted",
    "Job",
    "Measurements",
    "Model",
    "ModelError",
    "Plan",
    "Progress",
    "Projection",
    "RenderError",
    "RenderResult",
    "Request",
    "ResumeError",
    "StorageError",
    "Store",
    "UsageError",
    "__version__",
    "export",
    "finish",
    "load",
    "open",
    "render",
]

_MODULES = {
    "engine.errors": (
        "AccessError",
        "AlignmentError",
        "BudgetError",
        "EngineError",
        "InputError",
        "Interrupted",
        "ModelError",
        "RenderError",
        "ResumeError",
        "StorageError",
        "UsageError",
    ),
    "engine.exporters": ("ExportResult", "export"),
    "engine.parts": ("finish",),
    "engine.geometry": ("Box",),
    "engine.api": ("render",),
    "engine.job": ("Job",),
    "engine.model.bundle": ("Model", "load"),
    "engine.plan.cost": ("Projection",),
    "engine.plan.plan": ("Plan",),
    "engine.plan.request": ("Request",),
    "engine.result": ("Measurements", "Progress", "RenderResult"),
    "engine.store": ("Store", "open"),
}
"""Module of every public name."""

if not TYPE_CHECKING:  # to a type checker, any name would be one of the package

    def __getattr__(name: str) -> object:
        """Import on first use: ``engine --help`` does not wait for torch."""
        from importlib import import_module

        for module, names in _MODULES.items():
            if name in names:
                value = getattr(import_module(module), "open_store" if name == "open" else name)
                globals()[name] = value
                return value
        raise AttributeError(f"module 'engine' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
