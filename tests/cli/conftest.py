"""Fixtures of the tests of engine train."""

from support.training import (  # noqa: F401
    large_photo,
    narrow_structure,
    photo,
    start_file,
    structure_file,
    vgg_file,
)
