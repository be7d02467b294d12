"""Contact sheet: its pictures are those of larger renders with the same seeds."""

import numpy as np
import pytest
from PIL import Image
from support.stores import pixels, render

from engine.errors import UsageError
from engine.plan.canvas import first_enlargement
from engine.plan.request import Request
from engine.preview import MAX_SEEDS, contact_sheet


def test_sheet_shows_the_seeds_of_larger_renders(tmp_path, models):
    model = models["rrdb"]
    height, width = first_enlargement((160, 200), model.base_size, 4)
    seeds = []
    found = contact_sheet(
        model,
        Request(size=(200, 160), seed=3, precision="fp32"),
        tmp_path / "new" / "sheet.png",
        3,
        on_seed=seeds.append,
    )
    assert list(found) == seeds == [3, 4, 5]
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    first = render(model, Request(size=(width, height), seed=3, precision="fp32"), tmp_path / "a.zarr")
    np.testing.assert_array_equal(sheet[8 : 8 + height, 8 : 8 + width], pixels(first.out).transpose(1, 2, 0))
    large = render(model, Request(size=(200, 160), seed=3, precision="fp32"), tmp_path / "b.zarr")
    assert large.plan.base == first.plan.base
    assert [path.name for path in tmp_path.iterdir()].count("sheet.png.zarr") == 0


@pytest.mark.parametrize(
    ("count", "changes", "words"),
    [(0, {}, "use 1 to 400 seeds"), (MAX_SEEDS + 1, {}, "use 1 to 400 seeds"), (2, {"seed": 2**64 - 1}, "seeds up to")],
)
def test_sheets_that_are_refused(tmp_path, models, count, changes, words):
    with pytest.raises(UsageError, match=words):
        contact_sheet(models["rrdb"], Request(**changes), tmp_path / "sheet.png", count)
    assert not list(tmp_path.iterdir())
