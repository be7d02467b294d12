"""Docstrings of dataclass fields at run time, which Python itself does not keep."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from inspect import Parameter, Signature
from typing import Any


@cache
def field_docs(kind: type) -> Mapping[str, str]:
    """The string under each field of a class, read from its source; empty where there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[field.target.id] = inspect.cleandoc(below.value.value)
    return docs


def describe_options(kind: type[Any], options: type[Any]) -> None:
    """Make ``help`` of a dataclass of options readable: their documentation, and a signature without annotations.

    Args:
        kind: the dataclass; every field has a default.
        options: ``TypedDict`` with the types that its constructor accepts.
    """
    defaults = {field.name: field.default for field in fields(kind)}
    hints = {name: hint.__forward_arg__ for name, hint in options.__annotations__.items()}
    kind.__doc__ = _OptionsDoc(kind.__doc__ or "", hints, defaults)  # type: ignore[assignment]
    parameters = [Parameter(name, Parameter.KEYWORD_ONLY, default=value) for name, value in defaults.items()]
    kind.__signature__ = Signature(parameters)
    kind.__init__.__signature__ = Signature([Parameter("self", Parameter.POSITIONAL_ONLY), *parameters])


class _OptionsDoc:
    """A class docstring that ends with a section of the fields. It is made when it is read, not at import."""

    def __init__(self, summary: str, hints: Mapping[str, str], defaults: Mapping[str, object]) -> None:
        self._summary = inspect.cleandoc(summary)
        self._hints = hints
        self._defaults = defaults

    def __get__(self, instance: object, owner: type) -> str:
        lines, docs = [self._summary, "", "Options:"], field_docs(owner)
        for name, default in self._defaults.items():
            lines.append(f"    {name}: {self._hints[name]} = {default!r}")
            lines.append(textwrap.indent(docs.get(name, ""), " " * 8))
        return "\n".join(lines)
