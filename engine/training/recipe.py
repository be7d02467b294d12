"""How to train: frozen dataclasses are the schema of the TOML presets and of `--config`.

Knows names, types and limits; knows no network. A preset has a table [sr] and, where step 1 is trained too, a table
[structure]; every value is in it, and its comments say what each does. What differs at a step stands in a table [sr.step3].
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from engine.archs.hpvaegan import Config, Padding
from engine.errors import InputError, UsageError
from engine.training.structure_losses import Kind, Losses

STEP_TABLES = ("step2", "step3", "step4")  # within [sr]: what differs at that step


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureRecipe:
    """Step 1: iterations for each scale, copies of the photograph in a batch, and what the networks look like."""

    iterations: tuple[int, ...]
    batch: int
    padding: Padding
    coordinates: bool
    last_vae: int
    vae_texture: float
    vae_coherence: float
    texture: float
    detail: float
    feature_texture: float
    adversarial: float
    discriminator: Kind
    sigma: float
    ema: float
    checkpoint_every: int

    def __post_init__(self) -> None:
        if not self.iterations or min(*self.iterations, self.batch, self.checkpoint_every) < 1:
            raise UsageError(
                f"iterations = {list(self.iterations)}, batch = {self.batch} and "
                f"checkpoint_every = {self.checkpoint_every} must be at least 1"
            )

    @property
    def losses(self) -> Losses:
        return Losses(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Losses)})

    def run(self) -> dict[str, Any]:
        """These as `train_structure` takes them."""
        config = Config(padding=self.padding, coordinates=self.coordinates, last_vae=self.last_vae)
        alike = {name: getattr(self, name) for name in ("iterations", "batch", "sigma", "ema", "checkpoint_every")}
        return alike | {"config": config, "losses": self.losses}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A super-resolution step: everything about a run but its data, its start and its seed."""

    iterations: int
    batch: int
    crop: int
    degradation: Literal["bicubic", "bsrgan"]
    flip: bool
    rotate: bool
    held_out: float

    chain: float
    reconstructions: int
    samples: int

    sigma: float
    noise: Literal["fixed", "uniform"]
    render_sigma: float
    noise_channels: int
    blocks: int

    pixel: float
    consistency: float
    perceptual: float
    perceptual_layers: Literal["esrgan", "swinir", "forms"]
    texture: float
    detail: float
    feature_texture: float
    checkerboard: float
    adversarial: float
    gan: Literal["ragan", "vanilla", "hinge"]
    gan_from: int
    discriminator: Literal["vgg", "unet", "patch", "projected"]
    discriminator_channels: int

    learning_rate: float
    discriminator_rate: float
    betas: tuple[float, ...]
    milestones: tuple[int, ...]
    decay: float
    ema: float

    checkpoint_every: int
    store: Literal["fp16", "fp32"]

    def __post_init__(self) -> None:
        least = {"iterations": 1, "batch": 1, "crop": 8, "checkpoint_every": 1, "discriminator_channels": 1}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= least.get(field.name, 0)):
                raise UsageError(f"{field.name} = {value}: must be at least {least.get(field.name, 0)}")
        for name, most in (("held_out", 0.5), ("chain", 1.0), ("decay", 1.0)):
            if getattr(self, name) > most:
                raise UsageError(f"{name} = {getattr(self, name)}: must be at most {most}")
        if self.ema >= 1 or len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UsageError(f"ema = {self.ema} and the two betas = {list(self.betas)} must lie in 0..1, below 1")

    def replace(self, **changes: Any) -> Self:  # noqa: ANN401 (each is checked by the schema)
        return dataclasses.replace(self, **changes)


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
