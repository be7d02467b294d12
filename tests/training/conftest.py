"""Fixtures of the training tests."""

from support.training import (  # noqa: F401
    large_photo,
    narrow_structure,
    photo,
    recipe,
    start_file,
    structure_file,
    structure_request,
    vgg_file,
    with_features,
)
