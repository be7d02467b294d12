"""Damage to the file of a shard."""

import numpy as np


def flip(path, bit):
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def replaced_by_folder(path):
    path.unlink()
    path.mkdir()


def _replaced_by_link(path):
    moved = path.parents[5] / "moved"  # beside the store
    path.rename(moved)
    path.symlink_to(moved.absolute())


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "garbage": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": replaced_by_folder,
    "a link": _replaced_by_link,
}
"""Damage that shows in a shard's file without decoding it."""
