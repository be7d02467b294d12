"""Two renders into one store at the same time."""

import shutil

import numpy as np

from support.commands import finish, start
from support.stores import attributes, pixels

RENDER = "render model.safetensors --out out.zarr --size 512x384 --stages 2 --tile 8 --overlap 4 --precision fp32 -q"
RACES = {
    "new, new": ("", ""),
    "new, --overwrite": ("", "--overwrite"),
    "--overwrite, --overwrite": ("--overwrite", "--overwrite"),
    "new, --resume": ("", "--resume"),
}
"""Options of the first and the second render. A resumed one has the seed of the first, another one its own."""


def words(options, executor="tiles"):
    """Command line of a render."""
    return f"{RENDER} --executor {executor} {options}"


def images(folder, model_file):
    """Pixels of the two seeds; ``folder`` becomes a working folder."""
    shutil.copy(model_file, folder / "model.safetensors")
    images = []
    for seed in (0, 1):
        code, error = finish(start(folder, words(f"--seed {seed} --overwrite")))
        assert code == 0, error
        images.append(pixels(folder / "out.zarr"))
    return images


def race(folder, name, wait, expected, start=start, finish=finish):
    """Start the second render after ``wait(first)``, and check that one of them has made the whole store."""
    first, second = RACES[name]
    seeds = (0, 0) if "--resume" in second else (0, 1)
    processes = [start(folder, words(first))]
    wait(processes[0])
    processes.append(start(folder, words(f"{second} --seed {seeds[1]}")))
    codes, errors = zip(*map(finish, processes), strict=True)
    assert sorted(codes) in ([0, 4], [0, 0]), (codes, errors)
    assert [len(error.splitlines()) for error in errors] == [code // 4 for code in codes], errors
    provenance = attributes(folder / "out.zarr")
    assert provenance["complete"] is True
    seed = provenance["plan"]["seed"]
    assert seed in [s for s, code in zip(seeds, codes, strict=True) if code == 0]
    assert np.array_equal(pixels(folder / "out.zarr"), expected[seed]), "complete, and wrong"
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "out.zarr"]
