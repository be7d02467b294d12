"""``engine plan --workers``: a forecast of a render by many workers."""

import json

import pytest

from engine.plan.parts import MAX_PARTS


def test_workers_share_the_shards(call, model_file, tmp_path):
    words = f"plan {model_file} --size 512x384 --stages 2 --overlap 4 --tile 16 --executor tiles --precision fp32"
    one, four = (
        json.loads(call(f"{words} --out {tmp_path / 's.zarr'} --workers {count} --json")[1])["fleet"]
        for count in (1, 4)
    )
    assert (one["workers"], four["workers"], one["is_measured"]) == (1, 4, False)
    assert one["overhead"] == 0
    assert one["imbalance"] == 1
    assert {key: one[key] for key in ("shards", "objects", "bytes", "requests", "egress")} == {
        key: four[key] for key in ("shards", "objects", "bytes", "requests", "egress")
    }
    assert four["bytes"]["raw"] >= 512 * 384 * 3
    assert one["seconds"]["slowest"] > four["seconds"]["slowest"] > one["seconds"]["slowest"] / 8
    assert not list(tmp_path.glob("s.zarr*"))  # nothing is written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--workers 0", f"--workers 0: must be from 1 to {MAX_PARTS}"),
        ("--workers 4 --part 1/4", "--workers 4 and --part 1/4: exclude each other; give one of them"),
    ],
)
def test_refused(call, model_file, words, message):
    code, out, err = call(f"plan {model_file} {words}")
    assert (code, out, err) == (2, "", f"engine: {message}\n")
