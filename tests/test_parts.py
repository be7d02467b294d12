"""One image in parts: any number of them gives the store of one run, whatever stops, races or is missing."""

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import zip_longest

import pytest
from support.commands import finish as end
from support.commands import start, wait_for
from support.stores import attributes, files, render, shards

import engine
from engine.errors import BudgetError, InputError, ResumeError
from engine.geometry import Box
from engine.io.store_check import check_store
from engine.io.zarr_store import ZarrSink
from engine.job import Job
from engine.model.bundle import load
from engine.parts import missing_parts
from engine.plan.parts import Part
from engine.plan.request import Request

TILES = Request(size=(128, 96), stages=2, tile=(8, 4), overlap="4", precision="fp32", executor="tiles")
"""24 writes of a tile each."""

BANDS = replace(TILES, executor="bands", tile=16, size=(128, 160))
"""2 strips of 3 rows of shards."""

REQUESTS = {
    "tiles": (TILES, (1, 2, 4)),
    "bands": (BANDS, (1, 2, 4, 7)),
    "one step": (replace(TILES, stages=1, size=(96, 72)), (3,)),
    "bands of one step": (replace(BANDS, stages=1, size=(96, 160)), (3,)),
    "batched": (replace(TILES, executor="batched", device="cpu"), (3,)),
    "a region": (replace(TILES, roi=Box(10, 20, 90, 120)), (3,)),
    "reduced": (replace(BANDS, size=(64, 1040), stages=None, tile=None), (2,)),
    "cross-fade": (replace(TILES, blend=4), (2,)),
    "repeats in 16 bits": (replace(TILES, wrap="both", depth=16), (2,)),
    "bands repeat in 16 bits": (replace(BANDS, wrap="both", depth=16), (2,)),
}
"""Requests, and numbers of parts; a seventh part of the bands is empty."""


@pytest.fixture(scope="module")
def model(model_file):
    return load(model_file)


def part(model, request, out, number, count, *, writes=None):
    """Render a part and return the job; ``writes``: number of writes after which it stops, as a killed one does."""
    job = Job.prepare(model, request, out)
    run = job.run(job.open_part(Part(number, count)))
    for done, _ in enumerate(run, 1):
        if done == writes:
            run.close()
            break
    return job


# Pixels


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "cross-fade" else n for n in REQUESTS]
)
def test_parts_end_in_the_bytes_of_one_run(tmp_path, models, name):
    """Metadata and pyramid included, in any order of the parts."""
    model, (request, counts) = models["noisy" if name in ("tiles", "bands") else "rrdb"], REQUESTS[name]
    one = render(model, request, tmp_path / "one" / "out.zarr")
    expected = files(tmp_path / "one")
    for count in counts:
        out, pixels = tmp_path / f"{count}" / "out.zarr", 0
        for number in (*range(2, count + 1), 1):
            pixels += sum(part(model, request, out, number, count).projection.lr_pixels)
        assert attributes(out)["complete"] is False
        assert pixels >= sum(one.projection.lr_pixels)
        engine.finish(out)
        assert files(out.parent) == expected, count
        part(model, request, out, 1, count)  # a repeated job
        assert files(out.parent) == expected


def test_parts_grow_the_pyramid_where_they_can(tmp_path, model):
    """What is left to ``finish`` are the parents of two parts, not the whole pyramid."""
    out = tmp_path / "out.zarr"
    for number in (1, 2):
        part(model, TILES, out, number, 2)
    before = shards(out)
    engine.finish(out)
    assert (shards(out, 0), before, shards(out)) == (24, 29, 33)  # the cut is below an odd row of shards


def test_tiles_of_inner_steps_are_computed_once(tmp_path, model):
    """The parts leave them to each other; together they compute what one run does."""
    ran = []
    for folder, parts in (("one", 1), ("parts", 3)):
        pixels, out = [0, 0], tmp_path / folder / "out.zarr"

        def count(position, lr_pixels, pixels=pixels):
            pixels[position] += lr_pixels

        for number in range(1, parts + 1):
            job = Job.prepare(model, TILES, out)
            for _ in job.run(job.open_part(Part(number, parts)), count):
                pass
        ran.append(pixels)
    assert ran[0] == ran[1]


# Ends


@pytest.mark.parametrize("request_", [TILES, BANDS], ids=["tiles", "bands"])
def test_a_stopped_part_goes_on(tmp_path, model, request_, monkeypatch):
    """With the same command, also from spilled tiles; files that other parts are writing stay."""
    monkeypatch.setattr("engine.plan.limits.cache_share", lambda stages: 1)
    render(model, request_, tmp_path / "one" / "out.zarr")
    out = tmp_path / "parts" / "out.zarr"
    part(model, request_, out, 1, 2, writes=1)
    assert [p.missing for p in missing_parts(out)] < [p.shards for p in missing_parts(out)]
    cut, kept = (out / name for name in ("0/c/0/0/0", "0/c/0/1/0"))
    assert cut.exists()
    before = kept.exists() and kept.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:-9])  # as by a disk
    mine, other = (out / "0" / "c" / "0" / name for name in (f"0/0.{'a' * 32}.partial", f"9/0.{'a' * 32}.partial"))
    other.parent.mkdir()
    mine.touch(), other.touch()
    part(model, request_, out, 1, 2)
    assert not before or before == kept.stat().st_mtime_ns
    assert not mine.exists()
    assert other.exists()
    other.unlink(), other.parent.rmdir()
    part(model, request_, out, 2, 2)
    engine.finish(out)
    assert files(tmp_path / "parts") == files(tmp_path / "one")


def test_a_killed_part_goes_on(tmp_path, model_file, model):
    words = f"render {model_file} --size 512x384 --stages 2 --tile 8 --overlap 4 --precision fp32 --executor tiles"
    out = tmp_path / "parts" / "out.zarr"
    process = start(tmp_path, f"{words} --out {out} --part 2/2")
    wait_for(lambda: shards(out) >= 3, process)
    process.send_signal(signal.SIGKILL)
    assert end(process)[0] == -signal.SIGKILL
    request = replace(TILES, size=(512, 384), tile=8)
    for number in (1, 2):
        part(model, request, out, number, 2)
    engine.finish(out)
    render(model, request, tmp_path / "one" / "out.zarr")
    assert files(tmp_path / "parts") == files(tmp_path / "one")


# Several processes


def test_a_part_runs_once_and_beside_no_whole_run(tmp_path, model, call):
    out = tmp_path / "out.zarr"
    job = Job.prepare(model, TILES, out)
    first = job.open_part(Part(1, 2))
    with pytest.raises(ResumeError, match=rf"part 1/2 is being rendered by another process \({os.getpid()}\); wait"):
        Job.prepare(model, TILES, out).open_part(Part(1, 2))
    part(model, TILES, out, 2, 2)  # another one may
    for change in (lambda: Job.prepare(model, TILES, out).open_sink(resume=True), lambda: check_store(out)):
        with pytest.raises(ResumeError, match="is being written by another process"):
            change()
    code, text, _ = call(f"finish {out}")
    assert (code, text) == (4, f"part 1/2: 12 of 12 shards missing; process {os.getpid()} renders it\n")
    job.render(first)
    engine.finish(out)


def test_parts_without_locks_are_harmless(tmp_path, model, monkeypatch):
    """On a file system that locks nothing, two processes of one part write equal shards."""
    render(model, TILES, tmp_path / "one" / "out.zarr")
    monkeypatch.setattr("engine.io.files.fcntl", None)
    out = tmp_path / "parts" / "out.zarr"
    jobs = [Job.prepare(model, TILES, out) for _ in range(2)]
    for _ in zip_longest(*(job.run(job.open_part(Part(1, 2))) for job in jobs)):
        pass
    part(model, TILES, out, 2, 2)
    engine.finish(out)
    assert files(tmp_path / "parts") == files(tmp_path / "one")


def test_two_first_parts_make_one_store(tmp_path, model, monkeypatch):
    """The slower one finds a store where it saw none, and adopts its plan, with tiles of another choice."""
    out = tmp_path / "parts" / "out.zarr"
    render(model, TILES, tmp_path / "one" / "out.zarr")
    slower, create, raced = Job.prepare(model, replace(TILES, tile=None), out), ZarrSink.create, []

    def late(path, *arguments, **options):
        if not raced:
            raced.append(1)
            part(model, TILES, out, 2, 3, writes=2)
        return create(path, *arguments, **options)

    monkeypatch.setattr(ZarrSink, "create", late)
    assert slower.plan.stages != Job.prepare(model, TILES, out).plan.stages
    slower.render(slower.open_part(Part(1, 3)))
    for number in (2, 3):
        part(model, replace(TILES, tile=None), out, number, 3)
    engine.finish(out)
    assert files(tmp_path / "parts") == files(tmp_path / "one")


# Refusals


@pytest.fixture(scope="module")
def begun(tmp_path_factory, model_file, model):
    """Command that begins a store of 24 shards in two parts, and the store with one of them."""
    folder = tmp_path_factory.mktemp("begun")
    out = folder / "out.zarr"
    words = f"render {model_file} --out {out} --size 128x96 --stages 2 --tile 8x4 --overlap 4 --precision fp32"
    part(model, TILES, out, 1, 2)
    return f"{words} --executor tiles", out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--part 0/2", 2, "--part 0/2: parts are counted from 1 to 2; give one of these"),
        ("--part 2", 2, "--part 2: not a part; write NUMBER/COUNT, such as 2/4"),
        ("--part 1/2 --overwrite", 2, "--part 1/2 and --overwrite: exclude each other"),
        ("--part 1/3", 4, "begun in another number of parts (2, not 3); give --part 1/2 and so on, or --resume alone"),
        ("--part 2/2 --seed 3", 4, "made with another plan (seed: 0 there, 3 here)"),
        ("--part 2/2 --preview 2", 2, "--part: does not apply to a contact sheet"),
    ],
)
def test_refusals(begun, call, options, code, message):
    words, out = begun
    before = files(out.parent)
    end, _, err = call(f"{words} {options}")
    assert end == code
    assert message in err.splitlines()[-1]
    assert files(out.parent) == before


def test_a_part_of_a_picture_is_refused(call):
    code, _, err = call("render --part 2/2 --out x.png")
    assert (code, err) == (
        2, "engine: --part 2/2: goes into a store, and x.png is a picture; give --out x.zarr, then engine finish x.zarr and "
        "engine export x.zarr x.png\n",
    )  # fmt: skip


def test_a_machine_without_the_memory_of_the_plan_is_refused(begun, model):
    """Its own plan would have smaller tiles, which is another picture."""
    _, out = begun
    job = Job.prepare(model, replace(TILES, tile=None), out)
    job.measured = replace(job.measured, budget=replace(job.measured.budget, host=job.measured.baseline + 1000))
    before = files(out.parent)
    with pytest.raises(BudgetError, match=r"memory: the plan .* more than .*; give at least memory="):
        job.open_part(Part(2, 2))
    assert files(out.parent) == before


def test_another_machine_is_refused(begun, model, monkeypatch):
    _, out = begun
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    with pytest.raises(ResumeError, match="threads 1 there, 7 here"):
        Job.prepare(model, TILES, out).open_part(Part(2, 2))


def test_a_store_that_is_no_part_is_refused(tmp_path, model):
    render(model, TILES, tmp_path / "out.zarr", writes=2)
    with pytest.raises(ResumeError, match="begun as a whole, not in parts; give resume=True in place of part"):
        Job.prepare(model, TILES, tmp_path / "out.zarr").open_part(Part(1, 2))


# Finish


def test_finish_names_the_missing_parts_and_their_commands(tmp_path, call, model_file):
    """Their commands then render them, and the store is that of one run."""
    words = f"render {model_file} --size 128x96 --stages 2 --tile 8x4 --overlap 4 --precision fp32 --executor tiles"
    out = tmp_path / "out.zarr"
    assert call(f"{words} --out {tmp_path / 'one' / 'out.zarr'}")[0] == 0
    code, text, _ = call(f"{words} --out {out} --part 2/3")
    assert code == 0
    assert "part 2/3: 8 of 24 shards, rows 32 to 63; 3 parts together take" in text
    assert f"when all parts are rendered: engine finish {out}" in text
    assert f"in 3 parts: engine finish {out} names those that are missing" in call(f"info {out}")[1]
    lost = out / "0" / "c" / "0" / "2" / "0"
    lost.unlink()
    code, text, err = call(f"finish {out}")
    assert (code, len(text.splitlines())) == (4, 3)
    assert text.splitlines()[1].startswith("part 2/3: 1 of 8 shards missing; run engine render ")
    assert err == (
        f"engine: {out}: 17 shards of parts 1/3, 2/3, 3/3 missing; render again with --part for each, then finish\n"
    )
    assert not attributes(out)["complete"]
    for line in text.splitlines():
        assert call(line.partition("run engine ")[2])[0] == 0
    damaged = out / "0" / "c" / "0" / "1" / "3"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    code, text, err = call(f"finish {out} --json")
    assert (code, json.loads(text)["missing"][0]["part"]) == (4, "1/3")
    assert "1 shard of part 1/3 missing; render again with --part 1/3, then finish" in err
    assert call(json.loads(text)["missing"][0]["command"].partition(" ")[2])[0] == 0
    code, text, _ = call(f"finish {out}")
    assert (code, text.splitlines()[0]) == (0, f"{out}: 128x96, complete")
    assert files(out) == files(tmp_path / "one" / "out.zarr")


def test_one_run_finishes_what_parts_began(tmp_path, model, begun):
    shutil.copytree(begun[1], tmp_path / "out.zarr")
    render(model, TILES, tmp_path / "out.zarr", resume=True)
    render(model, TILES, tmp_path / "one" / "out.zarr")
    assert files(tmp_path / "out.zarr") == files(tmp_path / "one" / "out.zarr")


def test_finish_of_other_folders(tmp_path):
    for name in ("none.zarr", "empty.zarr"):
        if name.startswith("empty"):
            (tmp_path / name).mkdir()
        with pytest.raises(InputError, match="no store of this engine"):
            engine.finish(tmp_path / name)
