"""Presets and users' edited ones: TOML files that hold every value of a training run.

A preset has a table [sr] and, where step 1 is trained too, a table [structure]; every value is in it, and its comments say what
each does. What differs at a step stands in a table [sr.step3]. Recipes, frozen dataclasses, are the tables' schema.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from engine.errors import InputError, UsageError
from engine.training.sr.recipe import Recipe
from engine.training.structure.recipe import StructureRecipe

STEP_TABLES = ("step2", "step3", "step4")  # within [sr]: what differs at that step


@dataclass(frozen=True, slots=True)
class Preset:
    """The tables of a file; a run that needs step 1's refuses a file without it. `steps`: the recipes of those that differ."""

    sr: Recipe
    structure: StructureRecipe | None
    steps: Mapping[str, Recipe] = dataclasses.field(default_factory=dict)

    def step(self, step: int) -> Recipe:
        return self.steps.get(f"step{step}", self.sr)

    def replace(self, **changes: Any) -> Self:  # noqa: ANN401 (each is checked by the schema)
        """Other values of super-resolution, at every step."""
        steps = {name: recipe.replace(**changes) for name, recipe in self.steps.items()}
        return dataclasses.replace(self, sr=self.sr.replace(**changes), steps=steps)


def preset_names() -> tuple[str, ...]:
    folder = resources.files("engine.training") / "presets"
    return tuple(sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")))


def preset_text(name: str) -> str:
    """The TOML text of a preset, comments and all."""
    if name not in preset_names():
        raise UsageError(f"no preset is called {name!r}; there are {', '.join(preset_names())}")
    return (resources.files("engine.training") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def read_preset(name: str) -> Preset:
    return parse(preset_text(name), f"preset {name}")


def read_file(path: Path) -> Preset:
    """A user's edited preset."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(
            f"{path}: cannot be read ({reason}); name a TOML file as engine train preset prints it"
        ) from None
    return parse(text, str(path))


def parse(text: str, source: str) -> Preset:
    """Refuses unknown and missing keys and wrong types; `source` is what the error calls the text."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: no valid TOML: {error}") from None
    if unknown := sorted(tables.keys() - {"sr", "structure"}):
        raise InputError(f"{source}: {unknown[0]!r} is no table; there are [sr] and [structure]")
    if "sr" not in tables:
        raise InputError(f"{source}: the table [sr] is missing; take a whole preset and edit it")
    sr = _table(tables["sr"], f"{source}: [sr]")
    different = {name: sr.pop(name) for name in STEP_TABLES if name in sr}
    usual, structure = _fill(Recipe, sr, f"{source}: [sr]"), None
    if "structure" in tables:
        where = f"{source}: [structure]"
        structure = _fill(StructureRecipe, _table(tables["structure"], where), where)
    steps = {}
    for name, values in different.items():
        where = f"{source}: [sr.{name}]"
        steps[name] = _fill(Recipe, sr | _table(values, where), where)
    return Preset(usual, structure, steps)


def _table(values: object, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where} = {values!r}: expected a table")
    return values


def _fill(schema: type, values: dict[str, Any], where: str) -> Any:  # noqa: ANN401 (an object of the schema)
    hints = get_type_hints(schema)
    if unknown := sorted(values.keys() - hints.keys()):
        raise InputError(f"{where} {unknown[0]!r} is no setting; there are {', '.join(hints)}")
    if missing := [name for name in hints if name not in values]:
        raise InputError(f"{where} {missing[0]!r} is missing ({len(missing)} in all); take a whole preset and edit it")
    try:
        return schema(**{name: _typed(values[name], hint, f"{where} {name}") for name, hint in hints.items()})
    except UsageError as error:
        raise InputError(f"{where} {error}") from None


def _typed(value: object, hint: Any, where: str) -> object:  # noqa: ANN401 (a type of any kind)
    """The value as the schema's type; a whole number serves as a float, and nothing else is converted."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InputError(f"{where} = {value!r}: choose one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} = {value!r}: expected a list")
        return tuple(_typed(item, get_args(hint)[0], where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where} = {value!r}: expected {_NAMES[hint]}")
    return value


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
