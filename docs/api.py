"""Write docs/api.md, the reference of the Python API, from the docstrings: ``python docs/api.py > docs/api.md``."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from inspect import Parameter
from typing import Any

import engine
from engine.fields import field_docs
from engine.plan.request import RequestOptions

COLUMNS = 100

GUIDE = """\
# Python API

<!-- Written by: python docs/api.py > docs/api.md -->

Everything is in `engine`. Sizes are (width, height), regions are (x, y, width, height), and both
may be texts as on the command line: `"4096x3072"`, `"1000,500,512,512"`. Arrays are
[height, width, channels].

Import `engine` before `torch`: it limits how long idle threads spin, and torch reads that limit
when it is loaded. `GOMP_SPINCOUNT` or `OMP_WAIT_POLICY` in the environment take precedence.

## Examples

### Render

`None` in place of the model file takes the model that comes with the engine.

```python
import engine

result = engine.render("model.safetensors", "out.zarr", size="1024x768", seed=7)
print(result.path, f"{result.measurements.seconds:.1f} s")
engine.export("out.zarr", "out.jpg", max_size=512)
```

### Plan first

`Job.prepare` takes what `render` takes, and refuses what `render` refuses. It renders nothing.

```python
import engine

request = engine.Request(size=(1024, 768), seed=7, memory="2GiB")
try:
    job = engine.Job.prepare("model.safetensors", request, "planned.zarr")
    job.check()
except engine.BudgetError as error:
    print("does not fit:", error)
else:
    print(job.plan.executor, [stage.tile for stage in job.plan.stages])
    print(f"{job.projection.host / 2**20:.0f} MiB, about {job.projection.seconds:.0f} s")
    result = job.render()
```

### Render a region

The region has the pixels of the whole image, which is not rendered.

```python
import engine

engine.render("model.safetensors", "detail.zarr", size="4096x3072", roi=(2000, 1000, 256, 256))
print(engine.open("detail.zarr").size)  # (256, 256)
```

### Render in parts

Each call may run in a process or on a machine of its own, with a folder that all see
([scale.md](scale.md)). With `dask="tcp://host:8786"`, `dask="local:2"` or `devices="0,1"`, one call
gives the parts to workers and finishes the store (extra `dask`).

```python
import engine

for number in (1, 2):
    engine.render("model.safetensors", "parts.zarr", size="512x384", part=f"{number}/2")
engine.finish("parts.zarr")
```

### Enlarge a picture

The model is a checkpoint, or `realsr` or `x4plus` of the extra `.[weights]`. The picture is a file,
or an array of uint8, uint16 or float32 (0 to 1) in sRGB: [height, width], or with 1 to 4 channels,
grey or RGB and then alpha. The store has its channels and its depth.

```python
import engine

engine.render("realsr", "large.zarr", init="photo.jpg")
engine.export("large.zarr", "large.png")

crop = engine.open("large.zarr").read((0, 0, 40, 30))
engine.render("realsr", "larger.zarr", init=crop)
```

### Progress and cancelling

A cancelled render keeps its finished shards. `resume=True` continues it, on the same
machine with the same bits.

```python
import time

import engine


def show(progress: engine.Progress) -> None:
    print(f"step {progress.step}: {progress.done / progress.total:.0%}")


deadline = time.monotonic() + 3600
try:
    engine.render(
        "model.safetensors",
        "slow.zarr",
        size="1024x768",
        resume=True,
        on_progress=show,
        cancelled=lambda: time.monotonic() > deadline,
    )
except engine.Interrupted as error:
    print(error)
```

### Errors

Every error that the engine raises on purpose is an `EngineError`, with one line that says what to
do.

```python
import engine

try:
    engine.render("model.safetensors", "out.zarr", size="1024x768")
except engine.ResumeError as error:
    print(error)  # out.zarr: exists; give resume=True to finish it, overwrite=True to replace it, ...
except engine.EngineError as error:
    print(error.exit_code, error)
```

### Read the pixels

`read` takes a region, x first. Slices are those of numpy, rows first.

```python
import engine

store = engine.open("out.zarr")
print(store.size, store.levels, store.complete)
corner = store.read((0, 0, 512, 256))  # uint8 [256, 512, 3]
same = store[0:256, 0:512]
small = store.read(level=len(store.levels) - 1)
```

Other programs read the store as OME-Zarr, one array a level, with the channels first:

```python
import zarr

array = zarr.open_array("out.zarr/0", mode="r")
print(array.shape)  # (3, 768, 1024)
corner = array[:, 0:256, 0:512]
```

### Many pictures with one model

A loaded model keeps its networks. With `resume=True`, finished stores are not rendered again.

```python
from pathlib import Path

import engine

model = engine.load("realsr")
for picture in sorted(Path("pictures").glob("*.jpg")):
    store = Path("large") / f"{picture.stem}.zarr"
    engine.render(model, store, init=picture, resume=True)
    engine.export(store, store.with_suffix(".png"), overwrite=True)
```
"""

FUNCTIONS = ("render", "finish", "load", "open", "export")
CLASSES = {
    "Request": (),
    "Job": ("prepare", "check", "open_sink", "open_part", "render", "run", "device", "seam_error"),
    "Store": ("size", "levels", "provenance", "complete", "read", "__getitem__"),
    "Model": ("digest", "stages", "base_size"),
    "Box": ("height", "width", "shape", "area", "slices"),
    "Progress": (),
    "RenderResult": (),
    "Plan": ("size", "is_whole", "to_json"),
    "Projection": ("host", "working", "to_json"),
    "Measurements": (),
    "ExportResult": (),
}
"""Public classes and their members on the page; fields are listed as well."""

SECTION = re.compile(r"^(Args|Raises|Returns|Attributes|Options):\n", re.MULTILINE)
HEADERS = {"Args": ("argument", "meaning"), "Raises": ("error", "cause"), "Attributes": ("attribute", "meaning")}


def page() -> str:
    """The whole page."""
    blocks = [GUIDE.rstrip(), "## Functions"]
    for name in FUNCTIONS:
        blocks += _function(name, getattr(engine, name), level=3)
    blocks.append("## Classes")
    for name, members in CLASSES.items():
        blocks += _class(name, getattr(engine, name), members)
    errors = [getattr(engine, name) for name in engine.__all__ if name.endswith(("Error", "Interrupted"))]
    blocks += [
        "## Error classes",
        _table(
            ("error", "base", "exit code", "meaning"),
            ((f"`{e.__name__}`", f"`{e.__base__.__name__}`", str(e.exit_code), _summary(e)) for e in errors),
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _function(name: str, function: Callable[..., Any], level: int) -> Iterator[str]:
    yield f"{'#' * level} {name}"
    yield f"```python\n{_signature(name, function)}\n```"
    yield from _prose(function)


def _class(name: str, kind: type, members: Sequence[str]) -> Iterator[str]:
    yield f"### {name}"
    yield from _prose(kind)
    if kind is engine.Request:
        hints = {name: hint.__forward_arg__ for name, hint in RequestOptions.__annotations__.items()}
        yield _table(
            ("option", "type", "default", "meaning"),
            ((f"`{f.name}`", f"`{hints[f.name]}`", f"`{f.default!r}`", field_docs(kind)[f.name]) for f in fields(kind)),
        )
    elif is_dataclass(kind):
        hints = {field.name: field.type for field in fields(kind)}
        yield _table(
            ("field", "type", "meaning"),
            ((f"`{name}`", f"`{hints[name]}`", doc) for name, doc in field_docs(kind).items()),
        )
    values = {member: inspect.getattr_static(kind, member) for member in members}
    methods = {member: getattr(kind, member) for member, value in values.items() if not _is_property(value)}
    if len(methods) < len(members):
        yield _table(
            ("property", "meaning"),
            ((f"`{member}`", _summary(value)) for member, value in values.items() if _is_property(value)),
        )
    for member, method in methods.items():
        yield from _function(f"{name}.{member}", method, level=4)


def _is_property(value: object) -> bool:
    return isinstance(value, property | cached_property)


def _signature(name: str, function: Callable[..., Any]) -> str:
    """The call in one line, or with a line for each parameter."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    texts, named = [], False
    for parameter in parameters:
        if parameter.kind is Parameter.KEYWORD_ONLY and not named:
            named = True
            texts.append("*")
        if parameter.kind is Parameter.VAR_KEYWORD:
            texts.append(f"**{parameter.name}")
            continue
        default = "" if parameter.default is Parameter.empty else f" = {_default(parameter.default)}"
        texts.append(f"{parameter.name}: {parameter.annotation}{default}")
    result = f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(texts)}){result}"
    return line if len(line) <= COLUMNS - 8 else f"{name}(\n    {(',' + chr(10) + '    ').join(texts)},\n){result}"


def _default(value: object) -> str:
    return "..." if callable(value) else repr(value)


def _prose(documented: object) -> Iterator[str]:
    """Paragraphs and tables of a docstring."""
    text, *sections = SECTION.split(inspect.getdoc(documented) or "")
    for paragraph in text.strip().split("\n\n"):
        yield _wrapped(paragraph)
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        lines, _, rest = (body + "\n").partition("\n\n")
        if title == "Returns":
            yield _wrapped(f"Returns: {lines}")
        elif title in HEADERS:
            entries = re.split(r"\n(?=\S)", textwrap.dedent(lines).strip())
            yield _table(HEADERS[title], ((f"`{name}`", doc) for name, _, doc in (e.partition(": ") for e in entries)))
        if rest.strip():
            yield _wrapped(rest)


def _summary(documented: object) -> str:
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_inline(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(_inline(text), COLUMNS, break_long_words=False, break_on_hyphens=False)


def _inline(text: str) -> str:
    """One line of Markdown from a docstring's text."""
    return " ".join(text.replace("``", "`").split())


if __name__ == "__main__":
    sys.stdout.write(page())
