"""Presets: TOML files with every value of a training.

A preset has a table [sr] and, if it trains step 1, a table [structure]. A table [sr.step3] holds values of [sr] that differ
for step 3. The recipes are the tables' schemas.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_type_hints

import msgspec

from engine.errors import InputError, UsageError, option
from engine.training.sr.recipe import Recipe
from engine.training.structure.recipe import StructureRecipe

STEP_TABLES = ("step2", "step3", "step4")
"""Tables within [sr] with the values of one step."""

_TYPE_NAMES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "array": "a list",
}  # fmt: skip
"""Types in msgspec's messages, for a person who edits TOML."""

Schema = TypeVar("Schema", Recipe, StructureRecipe)


@dataclass(frozen=True, slots=True)
class Preset:
    """Recipes of all steps."""

    sr: Recipe
    """Super-resolution steps."""
    structure: StructureRecipe | None
    """Step 1; None if the preset does not train it."""
    steps: Mapping[str, Recipe] = dataclasses.field(default_factory=dict)
    """Recipes of super-resolution steps that differ, by "step2" to "step4"."""

    def step(self, step: int) -> Recipe:
        """Recipe of a super-resolution step, 2 to 4."""
        return self.steps.get(f"step{step}", self.sr)

    def replace(self, **changes: Any) -> Self:  # noqa: ANN401 (checked by the recipe)
        """The preset with other values for all super-resolution steps."""
        steps = {name: recipe.replace(**changes) for name, recipe in self.steps.items()}
        return dataclasses.replace(self, sr=self.sr.replace(**changes), steps=steps)


def preset_names() -> tuple[str, ...]:
    """Names of the presets."""
    folder = resources.files("engine.training") / "presets"
    return tuple(sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")))


def preset_text(name: str) -> str:
    """TOML text of a preset with its comments. Raises UsageError for an unknown name."""
    if name not in preset_names():
        raise UsageError(f"{option('preset', name)}: unknown; use one of {', '.join(preset_names())}")
    return (resources.files("engine.training") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def read_preset(name: str) -> Preset:
    """A preset by name. Raises UsageError for an unknown name."""
    return parse(preset_text(name), f"preset {name}")


def read_file(path: Path) -> Preset:
    """A user's edited preset. Raises InputError if the file cannot be read or is not a preset."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(
            f"{path}: cannot be read ({reason}); give a TOML file as engine train preset prints it"
        ) from error
    return parse(text, str(path))


def parse(text: str, source: str) -> Preset:
    """Parse the TOML text of a preset.

    Args:
        text: TOML text.
        source: name of the text in messages.

    Raises:
        InputError: invalid TOML, an unknown or missing key, a wrong type or a value out of range.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: not valid TOML ({error}); correct it") from None
    if unknown := sorted(tables.keys() - {"sr", "structure"}):
        raise InputError(f"{source}: [{unknown[0]}] is not a known table; use [sr] and [structure]")
    if "sr" not in tables:
        raise InputError(f"{source}: the table [sr] is missing; edit a whole preset")
    sr = _table(tables["sr"], f"{source}: [sr]")
    step_tables = {name: sr.pop(name) for name in STEP_TABLES if name in sr}
    usual, structure = _convert(sr, Recipe, f"{source}: [sr]"), None
    if "structure" in tables:
        title = f"{source}: [structure]"
        structure = _convert(_table(tables["structure"], title), StructureRecipe, title)
    steps = {}
    for name, values in step_tables.items():
        title = f"{source}: [sr.{name}]"
        steps[name] = _convert(sr | _table(values, title), Recipe, title)
    return Preset(usual, structure, steps)


def _table(values: object, title: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{title} = {values!r}: expected a table; write keys and values below its title")
    return values


def _convert(table: dict[str, Any], schema: type[Schema], title: str) -> Schema:
    """A table as its recipe. A whole number serves as a float; nothing else is converted."""
    names = [field.name for field in dataclasses.fields(schema)]
    if unknown := sorted(table.keys() - set(names)):
        raise InputError(f"{title} {unknown[0]}: unknown setting; use {', '.join(names)}")
    if missing := [name for name in names if name not in table]:
        raise InputError(f"{title} {missing[0]}: missing ({len(missing)} in all); edit a whole preset")
    try:
        return msgspec.convert(table, schema)
    except msgspec.ValidationError as error:
        raise InputError(f"{title} {_explain(str(error), table, schema)}") from None
    except UsageError as error:
        raise InputError(f"{title} {error}") from None


def _explain(message: str, table: dict[str, Any], schema: type[Schema]) -> str:
    """msgspec's message, such as "Expected `int`, got `str` - at `$.batch`", with the value and the permitted ones."""
    problem, _, path = message.rpartition(" - at `$.")
    name = re.split(r"\W", path)[0]
    if expected := re.match(r"Expected `(\w+)`", problem):
        return f"{name} = {table[name]!r}: wrong type; use {_TYPE_NAMES.get(expected[1], expected[1])}"
    choices = get_args(get_type_hints(schema)[name])
    return f"{name} = {table[name]!r}: unknown; use one of {', '.join(map(repr, choices))}"
