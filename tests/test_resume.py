"""Whatever stops a render, the same command with --resume ends in the bytes of an uninterrupted render."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from support.stores import attributes, files, render, shards

from engine.errors import EngineError, Interrupted, ResumeError
from engine.geometry import Box
from engine.job import Job
from engine.model.bundle import load
from engine.plan.request import Request
from engine.run.stage import Stage

ENGINE = Path(sys.executable).parent / "engine"
SMALL = Request(size=(128, 96), stages=2, tile=8, overlap="4", precision="fp32", executor="tiles")
LARGE = "--size 512x384 --stages 2 --tile 8 --overlap 4 --precision fp32 --executor"


@pytest.fixture(scope="module")
def model(model_file):
    return load(model_file)


@pytest.fixture(scope="module", params=["tiles", "bands"])
def small(request):
    """12 writes: of flat tiles, or of rows of shards down 4 strips."""
    return replace(SMALL, executor=request.param, tile=8 if request.param == "bands" else (16, 4))


@pytest.fixture(scope="module")
def expected(model, small, tmp_path_factory):
    """Files of an uninterrupted render."""
    folder = tmp_path_factory.mktemp("expected")
    finish(model, folder, small)
    return files(folder)


@pytest.fixture
def command(small):
    """Options of the command line that request the same render."""
    tile = "x".join(map(str, small.core[::-1])) if small.executor == "tiles" else small.tile
    return f"--size 128x96 --stages 2 --tile {tile} --overlap 4 --precision fp32 --executor {small.executor}"


def finish(model, folder, request):
    """Render what is missing."""
    return render(model, request, folder / "out.zarr", resume=True)


def begin(model, folder, writes, request):
    """Render a number of boxes and stop, as a killed render leaves the store."""
    job = Job.prepare(model, request, folder / "out.zarr")
    run = job.run(job.open_sink(resume=False, overwrite=False))
    for _ in range(writes):
        next(run)
    return job


# Death at every change of the disk


class Died(BaseException):
    """Stands for SIGKILL: no handler of errors catches it."""


CHANGES = ((Path, "replace"), (Path, "rename"), (shutil, "rmtree"))
"""Every change of the disk that counts: files and folders appear by being renamed, and are removed."""


def dies_at(step, model, folder, request, *, overwrite=False):
    """Die before change number ``step`` of the disk. Returns whether the render reached it."""
    count = 0

    def fatal(real):
        def call(*arguments, **named):
            nonlocal count
            count += 1
            if count == step:
                raise Died
            return real(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CHANGES:
            patch.setattr(owner, name, fatal(getattr(owner, name)))
        try:
            render(model, request, folder / "out.zarr", resume=not overwrite, overwrite=overwrite)
        except Died:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "spill", "steps"),
    [({}, False, 20), ({}, True, 28), ({"executor": "bands", "tile": 16}, False, 10)],
    ids=["tiles", "spilling", "bands"],
)
def test_death_at_every_step_is_survived(tmp_path, model, monkeypatch, changes, spill, steps):
    """While the store is made, while it fills, while tiles spill, while it is finished: one run for each step."""
    request = replace(SMALL, **changes)
    finish(model, tmp_path / "expected", request)
    expected = files(tmp_path / "expected")
    if spill:
        monkeypatch.setattr("engine.plan.limits.cache_share", lambda stages: 1)
    step = 1
    while dies_at(step, model, tmp_path / str(step), request):
        finish(model, tmp_path / str(step), request)
        assert files(tmp_path / str(step)) == expected, f"died at step {step}"
        step += 1
    assert files(tmp_path / str(step)) == expected
    assert step > steps


def test_repeated_deaths_end_in_the_same_bytes(tmp_path, model, small, expected):
    """As soon as a run lives long enough to make the store and a shard."""
    deaths, step = 0, 1
    while dies_at(step, model, tmp_path, small):
        deaths += 1
        step = min(step + 1, 9)
        assert deaths < 100
    assert deaths > 9
    assert files(tmp_path) == expected


def test_death_while_a_store_is_replaced_loses_only_the_old_one(tmp_path, model, small, expected):
    finish(model, tmp_path / "old", replace(small, seed=1))
    for step in range(1, 12):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "old", folder)
        assert dies_at(step, model, folder, small, overwrite=True)
        render(model, small, folder / "out.zarr", overwrite=True)
        assert files(folder) == expected, step


# Death of the process


class Running:
    """``engine render --resume`` in its own process."""

    def __init__(self, model_file, store, executor):
        command = [ENGINE, "render", model_file, "--out", store, *LARGE.split(), executor, "--resume"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def wait_for(self, condition):
        while not condition():
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.001)

    def end(self, number=None):
        """(exit code, stderr) after a signal to the process, which must still run, or at its own end."""
        if number is not None:
            assert self.process.poll() is None
            self.process.send_signal(number)
        _, err = self.process.communicate()
        return self.process.returncode, err


def killed(model_file, store, executor, count):
    """Kill a render when anything exists and the store has ``count`` shards."""
    run = Running(model_file, store, executor)
    run.wait_for(lambda: any(store.parent.iterdir()) and shards(store) >= count)
    assert run.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (store.exists() and attributes(store)["complete"])


def test_kill_9(tmp_path, call, model_file):
    store = tmp_path / "b" / "out.zarr"
    store.parent.mkdir()
    killed(model_file, store, "tiles", 40)
    for out in (store, tmp_path / "a" / "out.zarr"):
        code, _, err = call(f"render {model_file} --out {out} {LARGE} tiles --resume")
        assert code == 0, err
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["tiles", "bands"])
def test_kill_9_at_random_moments(tmp_path, call, model_file, executor):
    assert call(f"render {model_file} --out {tmp_path / 'a' / 'out.zarr'} {LARGE} {executor}")[0] == 0
    expected = files(tmp_path / "a")
    store = tmp_path / "b" / "out.zarr"
    store.parent.mkdir()
    total = sum("/c/" in name and content is not None for name, content in expected.items())
    chance = random.Random(7)
    # While the store is being made, then at two numbers of shards.
    for count in (0, chance.randrange(total // 4, total // 2), chance.randrange(total // 2, total * 3 // 4)):
        killed(model_file, store, executor, count)
    code, err = Running(model_file, store, executor).end()
    assert code == 0, err
    assert files(tmp_path / "b") == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_stops_after_a_whole_shard(tmp_path, model_file, number):
    store = tmp_path / "out.zarr"
    run = Running(model_file, store, "tiles")
    run.wait_for(lambda: shards(store) >= 3)
    code, err = run.end(number)
    assert code == 130
    lines = [line for line in err.splitlines() if line.startswith("engine: ")]
    assert lines == [f"engine: {store}: stopped after a whole shard; the same command with --resume goes on"]
    assert "stopping after this shard" in err
    assert attributes(store)["complete"] is False
    assert not [name for name in files(tmp_path) if name.endswith(".partial")]


# Signals in this process


@pytest.fixture
def signal_in_run(monkeypatch):
    """Function ``signal_in_run(number, times)``: SIGINT arrives ``times`` times in run ``number`` of a network."""
    networks = {name: getattr(Stage, name) for name in ("run", "push")}

    def arrange(number, times):
        count = 0

        def interrupted(real):
            def call(*arguments):
                nonlocal count
                count += 1
                if count == number:
                    for _ in range(times):
                        signal.raise_signal(signal.SIGINT)
                return real(*arguments)

            return call

        for name, real in networks.items():
            monkeypatch.setattr(Stage, name, interrupted(real))

    return arrange


def test_second_ctrl_c_stops_at_once(tmp_path, call, model, small, command, expected, signal_in_run):
    """The first one finishes the shard."""
    out = tmp_path / "out.zarr"
    command = f"render {model.path} --out {out} {command}"
    Job.prepare(model, small, out)  # measures what is measured once
    signal_in_run(4, times=1)
    code, _, err = call(command)
    assert code == 130
    assert "stopped after a whole shard" in err.splitlines()[-1]
    count = shards(out, 0)
    assert count > 0
    signal_in_run(2, times=2)
    code, _, err = call(f"{command} --resume")
    assert code == 130
    assert err.splitlines()[-1] == "engine: interrupted; continue with --resume"
    assert shards(out, 0) >= count
    signal_in_run(0, times=0)
    assert call(f"{command} --resume")[0] == 0
    assert files(tmp_path) == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_last_tile_finishes_the_render(tmp_path, call, model, signal_in_run):
    job = finish(model, tmp_path / "a", SMALL)
    signal_in_run(sum(job.projection.tasks), times=1)
    code, out, _ = call(
        f"render {model.path} --out {tmp_path / 'b' / 'out.zarr'} --size 128x96 --stages 2 --tile 8 --overlap 4 "
        "--precision fp32"
    )
    assert code == 0
    assert "out.zarr: 128x96, in " in out
    assert files(tmp_path / "b") == files(tmp_path / "a")


def test_interrupted_is_no_failure():
    assert Interrupted.exit_code == 130


# Resume and its refusals


def test_missing_store_is_begun(tmp_path, call, model_file, command, expected):
    assert call(f"render {model_file} --out {tmp_path / 'out.zarr'} {command} --resume")[0] == 0
    assert files(tmp_path) == expected


def test_complete_store_is_unchanged(tmp_path, model, small, command, call, monkeypatch):
    finish(model, tmp_path, small)
    (tmp_path / f".out.zarr.{'0123' * 8}.scratch").mkdir()  # left behind by a death between the last two steps
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.zarr").rglob("*")}

    def computed(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr(Stage, "run", computed)
    monkeypatch.setattr(Stage, "push", computed)
    monkeypatch.setattr(os, "fsync", computed)
    code, out, _ = call(f"render {model.path} --out {tmp_path / 'out.zarr'} {command} --resume")
    assert code == 0
    assert "out.zarr: 128x96, in " in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out.zarr").rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_only_missing_boxes_are_computed(tmp_path, model, small, expected):
    whole = begin(model, tmp_path, 5, small)
    written = 5 + (small.executor == "bands")  # a stopped render by bands writes its next rows too
    job = Job.prepare(model, small, tmp_path / "out.zarr")
    writes = list(job.run(job.open_sink(resume=True, overwrite=False)))
    assert len(writes) == len(list(job.plan.writes())) - written
    assert job.projection.tasks[-1] == (len(writes) if small.executor == "tiles" else 2)  # the remaining strips
    assert job.projection.lr_pixels[-1] < whole.projection.lr_pixels[-1]
    assert files(tmp_path) == expected


def test_lost_shard_is_rendered_again(tmp_path, model, small, expected):
    finish(model, tmp_path, small)
    for lost in ("0/c/0/1/1", "1/c/0/0/0"):
        (tmp_path / "out.zarr" / lost).unlink()
        finish(model, tmp_path, small)
        assert files(tmp_path) == expected


def test_tiles_of_the_store_are_adopted(tmp_path, model, small, expected):
    """Another amount of memory on another day would select other tiles, but not for a store that is half there."""
    for executor in (small.executor, "auto"):
        folder = tmp_path / executor
        tiles = [stage.core for stage in begin(model, folder, 5, small).plan.stages]
        job = finish(model, folder, replace(small, tile=None, executor=executor))
        assert [stage.core for stage in job.plan.stages] == tiles
        assert tiles[-1] == small.core
        assert job.plan.executor == small.executor
        assert files(folder) == expected


OTHER = {
    "seed": ({"seed": 1}, "seed: 0 there, 1 here"),
    "size": ({"size": (127, 96)}, "canvas:"),
    "region": ({"roi": Box(0, 0, 96, 127)}, "roi:"),
    "overlap": ({"overlap": "5"}, "stages: halo of step 2 4 there, 5 here"),
    "tile": ({"tile": 16}, r"stages: core of step 2 (\d|\[4, 16\]) there, \d+ here"),
    "executor": ({"executor": None}, 'executor: "(tiles|bands)" there, "(bands|tiles)" here'),
    "stages": ({"stages": 1}, "base:"),
    "precision": ({"precision": "bf16"}, "precision:"),
}
"""Changes of the request, and words of the refusal."""


def test_another_plan_is_refused_and_the_store_untouched(tmp_path, model, small):
    begin(model, tmp_path / "part", 5, small)
    finish(model, tmp_path / "complete", small)
    before = files(tmp_path)
    for changes, words in OTHER.values():
        if "executor" in changes:
            changes = {"executor": "bands" if small.executor == "tiles" else "tiles", "tile": 8}
        for folder in ("part", "complete"):
            job = Job.prepare(model, replace(small, **changes), tmp_path / folder / "out.zarr")
            with pytest.raises(ResumeError, match=words) as caught:
                job.open_sink(resume=True, overwrite=False)
            assert caught.value.exit_code == 4
            assert "\n" not in str(caught.value)
            assert files(tmp_path) == before


def test_another_model_is_refused_and_the_store_untouched(tmp_path, call, model, small, command, swin_model_file):
    begin(model, tmp_path, 5, small)
    before = files(tmp_path)
    code, _, err = call(f"render {swin_model_file} --out {tmp_path / 'out.zarr'} {command} --resume")
    assert code == 4
    assert "made with another plan" in err
    assert files(tmp_path) == before


def test_another_picture_is_refused(tmp_path, model, picture):
    for name, seed in (("a", 0), ("b", 1)):
        values = (picture(6, 8, seed).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    begin(model, tmp_path / "out", 5, replace(SMALL, init=tmp_path / "a.png"))
    with pytest.raises(ResumeError, match="init_digest"):
        finish(model, tmp_path / "out", replace(SMALL, init=tmp_path / "b.png"))
    finish(model, tmp_path / "out", replace(SMALL, init=tmp_path / "a.png"))


def test_existing_store_needs_resume_or_overwrite(tmp_path, call, model, small, command):
    for writes in (0, 5):
        folder = tmp_path / str(writes)
        begin(model, folder, writes, small)
        before = files(folder)
        code, out, err = call(f"render {model.path} --out {folder / 'out.zarr'} {command}")
        assert (code, out) == (4, "")
        assert err.splitlines()[-1].endswith("give --resume to finish it, --overwrite to replace it, or another --out")
        assert files(folder) == before


# Damaged stores


def with_plan(change):
    def damage(store):
        group = zarr.open_group(store, mode="r+")
        group.attrs["ourgan"] = change(dict(group.attrs["ourgan"]))

    return damage


def with_text(name, change):
    def damage(store):
        (store / name).write_text(change((store / name).read_text()))

    return damage


DAMAGE = {
    "no plan": with_plan(lambda o: {k: v for k, v in o.items() if k != "plan"}),
    "empty plan": with_plan(lambda o: {**o, "plan": {}}),
    "plan of a wrong type": with_plan(lambda o: {**o, "plan": "yes"}),
    "plan without stages": with_plan(lambda o: {**o, "plan": {k: v for k, v in o["plan"].items() if k != "stages"}}),
    "stages of a wrong type": with_plan(lambda o: {**o, "plan": {**o["plan"], "stages": "12"}}),
    "an executor of a wrong type": with_plan(lambda o: {**o, "plan": {**o["plan"], "executor": ["bands"]}}),
    "another executor": with_plan(lambda o: {**o, "plan": {**o["plan"], "executor": "rows"}}),
    "stages are no stages": with_plan(lambda o: {**o, "plan": {**o["plan"], "stages": [1, 2]}}),
    "a core of zero": with_plan(lambda o: {**o, "plan": {**o["plan"], "stages": [{"core": 0}, {"core": 0}]}}),
    "a core of a wrong type": with_plan(lambda o: {**o, "plan": {**o["plan"], "stages": [{"core": "8"}, {"core": 8}]}}),
    "another core": with_plan(lambda o: {**o, "plan": {**o["plan"], "stages": [{"core": 16}, {"core": 8}]}}),
    "attributes of a wrong type": with_plan(lambda o: ["complete"]),
    "attributes are text": with_plan(lambda o: "complete"),
    "metadata cut": with_text("zarr.json", lambda text: text[: len(text) // 2]),
    "metadata empty": with_text("zarr.json", lambda text: ""),
    "metadata is a list": with_text("zarr.json", lambda text: "[]"),
    "metadata is a number": with_text("zarr.json", lambda text: "3"),
    "metadata of another kind": with_text(
        "zarr.json", lambda text: json.dumps({"zarr_format": 3, "node_type": "array"})
    ),
    "metadata of another version": with_text(
        "zarr.json", lambda text: text.replace('"zarr_format": 3', '"zarr_format": 9')
    ),
    "array metadata cut": with_text("0/zarr.json", lambda text: text[:50]),
    "array metadata is a list": with_text("1/zarr.json", lambda text: "[]"),
    "array of another codec": with_text("0/zarr.json", lambda text: text.replace("zstd", "abacus")),
    "array gone": lambda store: (store / "0" / "zarr.json").unlink(),
    "level gone": lambda store: shutil.rmtree(store / "1"),
    "store gone but for a folder": lambda store: [shutil.rmtree(store), store.mkdir()],
    "a file instead": lambda store: [shutil.rmtree(store), store.write_text("")],
}


def test_damaged_store_is_refused_in_one_line_and_untouched(tmp_path, call, model, small):
    """With the tiles of the store requested, and with tiles that would be adopted from it."""
    begin(model, tmp_path / "whole", 5, small)
    store, options = tmp_path / "damaged" / "out.zarr", "--size 128x96 --stages 2 --overlap 4 --precision fp32"
    adopts = Request(size=small.size, stages=2, overlap="4", precision="fp32")
    jobs = [
        Job.prepare(model, request, store) for request in (adopts, replace(adopts, tile=8, executor=small.executor))
    ]
    for name, damage in DAMAGE.items():
        shutil.copytree(tmp_path / "whole", store.parent)
        damage(store)
        before = files(store.parent)
        for job in jobs:
            with pytest.raises(EngineError) as caught:
                copy(job).open_sink(resume=True)
            line = caught.value.for_command_line()
            assert caught.value.exit_code == 4, (name, line)
            assert line.startswith(f"{store}: ")
            assert "--o" in line, name  # the way out: --overwrite or --out
            assert files(store.parent) == before, name
        if name == next(reversed(DAMAGE)):
            code, out, err = call(f"render {model.path} --out {store} {options} --resume")
            assert (code, out, err) == (4, "", f"engine: {line}\n")
            assert files(store.parent) == before
        shutil.rmtree(store.parent)


def test_store_without_its_complete_mark_is_finished(tmp_path, model, small, expected):
    finish(model, tmp_path, small)
    with_plan(lambda o: {**o, "complete": False})(tmp_path / "out.zarr")
    finish(model, tmp_path, small)
    assert files(tmp_path) == expected


# Resume where pixels are rounded in another way


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
def test_other_rounding_needs_consent(tmp_path, call, model, small, command):
    begin(model, tmp_path, 5, small)
    before = files(tmp_path)
    line = f"render {model.path} --out {tmp_path / 'out.zarr'} {command} --resume"
    facts = attributes(tmp_path / "out.zarr")
    torch.set_num_threads(3)
    code, _, err = call(line)
    assert code == 4
    assert f"threads {facts['threads']} there, 3 here" in err
    assert "--accept-backend" in err
    assert files(tmp_path) == before
    assert call(f"{line} --accept-backend")[0] == 0
    assert call(line)[0] == 0  # nothing is left to compute
    assert attributes(tmp_path / "out.zarr")["instructions"] == facts["instructions"]
