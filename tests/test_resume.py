"""Whatever stops a render, the same command with --resume ends in the same bytes as a render that nothing stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import zarr
from support.stores import attributes, files, shards

from engine.cli.app import main
from engine.errors import Interrupted, ResumeError
from engine.job import Job
from engine.model.bundle import load
from engine.plan.request import Request
from engine.run.stage import Stage

ENGINE = Path(sys.executable).parent / "engine"
SMALL = Request(size=(96, 128), stages=2, tile=8, overlap="4", precision="fp32", executor="tiles")
LARGE = ["--size", "512x384", "--stages", "2", "--tile", "8", "--overlap", "4", "--precision", "fp32", "--executor"]


@pytest.fixture(scope="module")
def model(model_file):
    return load(model_file)


@pytest.fixture(scope="module", params=["tiles", "bands"])
def small(request):
    """12 writes: of tiles, or of rows of shards down 4 strips."""
    return replace(SMALL, executor=request.param)


@pytest.fixture(scope="module")
def expected(model, small, tmp_path_factory):
    """The files of an uninterrupted render."""
    folder = tmp_path_factory.mktemp("expected")
    finish(model, folder, small)
    return files(folder)


@pytest.fixture
def command(small):
    """What asks for the same on the command line."""
    cut = ("--tile", "8", "--overlap", "4", "--executor", small.executor)
    return ("--size", "128x96", "--stages", "2", *cut, "--precision", "fp32")


def finish(model, folder, request, resume=True):
    job = Job.prepare(model, request, folder / "out.zarr")
    for _ in job.run(job.open_sink(resume=resume, overwrite=False)):
        pass
    return job


def begin(model, folder, writes, request):
    """A render that stops after so many writes, as a killed one leaves it."""
    job = Job.prepare(model, request, folder / "out.zarr")
    run = job.run(job.open_sink(resume=False, overwrite=False))
    for _ in range(writes):
        next(run)
    return job


def cli(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    return caught.value.code, said.out, said.err


# Death at every step


class Died(BaseException):
    """Stands for SIGKILL: nothing that catches errors catches it."""


STEPS = ((Path, "replace"), (Path, "rename"), (shutil, "rmtree"), (os, "sync"))
"""Every change of the disk that counts: files and folders appear by being renamed, and are removed."""


def render_until(step, model, folder, request):
    """Die before the ``step``-th change of the disk. Returns whether the render got that far."""
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
        for owner, name in STEPS:
            patch.setattr(owner, name, fatal(getattr(owner, name)))
        try:
            finish(model, folder, request)
        except Died:
            return True
    return False


@pytest.mark.parametrize(
    ("changes", "spill", "steps"),
    [({}, False, 20), ({}, True, 30), ({"executor": "bands", "tile": 16}, False, 10)],
    ids=["tiles", "spilling", "bands"],
)
def test_death_before_any_change_of_the_disk_is_survived(tmp_path, model, monkeypatch, changes, spill, steps):
    """While the store is made, while it fills, while tiles spill, while it is finished: one run a step."""
    request = replace(SMALL, **changes)
    finish(model, tmp_path / "expected", request)
    expected = files(tmp_path / "expected")
    if spill:
        monkeypatch.setattr("engine.plan.limits.cache_share", lambda stages: 1)
    step = 1
    while render_until(step, model, tmp_path / str(step), request):
        finish(model, tmp_path / str(step), request)
        assert files(tmp_path / str(step)) == expected, f"died at step {step}"
        step += 1
    assert files(tmp_path / str(step)) == expected
    assert step > steps


def test_a_render_that_dies_again_and_again_gets_there(tmp_path, model, small, expected):
    """As soon as a run lives long enough to make the store and a shard."""
    deaths, step = 0, 1
    while render_until(step, model, tmp_path, small):
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
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Job, "open_sink", lambda self, resume, overwrite, real=Job.open_sink: real(self, False, True))
            assert render_until(step, model, folder, small)
        job = Job.prepare(model, small, folder / "out.zarr")
        for _ in job.run(job.open_sink(resume=False, overwrite=True)):
            pass
        assert files(folder) == expected


# Death of the process


def uninterrupted(capsys, model_file, folder, executor):
    assert cli(capsys, "render", model_file, "--out", folder / "out.zarr", *LARGE, executor)[0] == 0
    return files(folder)


class Running:
    """``engine render --resume`` in a process of its own."""

    def __init__(self, model_file, store, executor):
        command = [ENGINE, "render", model_file, "--out", store, *LARGE, executor, "--resume"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.store = store
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def wait_for(self, condition):
        while not condition():
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.001)

    def end(self, number=None):
        """Send a signal, if any, to the process, which must still run; its exit code and stderr."""
        if number is not None:
            assert self.process.poll() is None
            self.process.send_signal(number)
        _, err = self.process.communicate()
        return self.process.returncode, err


@pytest.mark.parametrize(("executor", "kills"), [("tiles", 3), ("bands", 1)])
def test_kill_9_at_random_moments(tmp_path, capsys, model_file, executor, kills):
    expected = uninterrupted(capsys, model_file, tmp_path / "a", executor)
    store = tmp_path / "b" / "out.zarr"
    store.parent.mkdir()
    total = sum("/c/" in name and content is not None for name, content in expected.items())
    chance = random.Random(7)
    # As soon as there is anything, so while the store is being made; then at a number of shards.
    moments = (chance.randrange(total // 4, total // 2), chance.randrange(total // 2, total * 3 // 4), 0)
    for wanted in sorted(moments[:kills]):
        run = Running(model_file, store, executor)
        run.wait_for(lambda wanted=wanted: any(store.parent.iterdir()) and shards(store) >= wanted)
        assert run.end(signal.SIGKILL)[0] == -signal.SIGKILL
        assert not (store.exists() and attributes(store)["complete"])
    code, err = Running(model_file, store, executor).end()
    assert code == 0, err
    assert files(tmp_path / "b") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_a_whole_shard(tmp_path, capsys, model_file, number):
    store = tmp_path / "b" / "out.zarr"
    run = Running(model_file, store, "tiles")
    run.wait_for(lambda: shards(store) >= 3)
    code, err = run.end(number)
    assert code == 130
    said = [line for line in err.splitlines() if line.startswith("engine: ")]
    assert said == [f"engine: {store}: stopped after a whole shard; the same command with --resume goes on"]
    assert "stopping after this shard" in err
    assert attributes(store)["complete"] is False
    assert not [name for name in files(tmp_path) if name.endswith(".partial")]
    if number == signal.SIGINT:
        assert cli(capsys, "render", model_file, "--out", store, *LARGE, "tiles", "--resume")[0] == 0
        assert files(tmp_path / "b") == uninterrupted(capsys, model_file, tmp_path / "a", "tiles")


# Signals, in this process


@pytest.fixture
def signal_in_run(monkeypatch):
    """(run, times) -> SIGINT arrives so many times while a network runs for that time, on a tile or on a band."""
    networks = {name: getattr(Stage, name) for name in ("run", "push")}

    def arrange(run, times):
        count = 0

        def interrupted(real):
            def call(*arguments):
                nonlocal count
                count += 1
                if count == run:
                    for _ in range(times):
                        signal.raise_signal(signal.SIGINT)
                return real(*arguments)

            return call

        for name, real in networks.items():
            monkeypatch.setattr(Stage, name, interrupted(real))

    return arrange


def test_ctrl_c_finishes_the_shard_and_the_second_one_does_not(
    tmp_path, capsys, model, small, command, expected, signal_in_run
):
    command = ("render", model.path, "--out", tmp_path / "out.zarr", *command)
    Job.prepare(model, small, tmp_path / "out.zarr")  # whatever is measured once is measured
    signal_in_run(4, times=1)
    code, _, err = cli(capsys, *command)
    assert code == 130
    assert "stopped after a whole shard" in err.splitlines()[-1]
    done = shards(tmp_path / "out.zarr", 0)
    assert done > 0
    signal_in_run(2, times=2)
    code, _, err = cli(capsys, *command, "--resume")
    assert code == 130
    assert err.splitlines()[-1] == "engine: stopped at once; --resume goes on from what was finished"
    assert shards(tmp_path / "out.zarr", 0) >= done
    signal_in_run(0, times=0)
    assert cli(capsys, *command, "--resume")[0] == 0
    assert files(tmp_path) == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_last_tile_is_a_finished_render(tmp_path, capsys, model_file, signal_in_run):
    job = finish(load(model_file), tmp_path / "a", SMALL)
    signal_in_run(sum(job.projection.tasks), times=1)
    code, out, _ = cli(
        capsys, "render", model_file, "--out", tmp_path / "b" / "out.zarr", "--size", "128x96", "--stages", "2",
        "--tile", "8", "--overlap", "4",
    )  # fmt: skip
    assert code == 0
    assert "complete" in out
    assert files(tmp_path / "b") == files(tmp_path / "a")


def test_interrupted_is_no_failure():
    assert Interrupted.exit_code == 130


# What --resume does and refuses


def test_resuming_nothing_renders(tmp_path, capsys, model_file, command, expected):
    assert cli(capsys, "render", model_file, "--out", tmp_path / "out.zarr", *command, "--resume")[0] == 0
    assert files(tmp_path) == expected


def test_resuming_a_complete_store_changes_nothing(tmp_path, model, small, command, capsys, model_file, monkeypatch):
    finish(model, tmp_path, small)
    (tmp_path / "out.zarr.scratch").mkdir()  # left behind by a death between the last two steps
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.zarr").rglob("*")}

    def computed(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr(Stage, "run", computed)
    monkeypatch.setattr(Stage, "push", computed)
    monkeypatch.setattr(os, "sync", computed)
    code, out, _ = cli(capsys, "render", model_file, "--out", tmp_path / "out.zarr", *command, "--resume")
    assert code == 0
    assert "complete" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out.zarr").rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_only_what_is_missing_is_computed(tmp_path, model, small, expected):
    whole = begin(model, tmp_path, 5, small)
    written = 5 + (small.executor == "bands")  # which have the next rows written, too, when they are stopped
    job = Job.prepare(model, small, tmp_path / "out.zarr")
    done = list(job.run(job.open_sink(resume=True, overwrite=False)))
    assert len(done) == len(list(job.plan.writes())) - written
    assert job.projection.tasks[-1] == (len(done) if small.executor == "tiles" else 2)  # the strips that are left
    assert job.projection.lr_pixels[-1] < whole.projection.lr_pixels[-1]
    assert files(tmp_path) == expected


def test_a_lost_shard_is_made_again(tmp_path, model, small, expected):
    finish(model, tmp_path, small)
    for lost in ("0/c/0/1/1", "1/c/0/0/0"):
        (tmp_path / "out.zarr" / lost).unlink()
        finish(model, tmp_path, small)
        assert files(tmp_path) == expected


@pytest.mark.parametrize("auto", [False, True])
def test_the_tiles_of_the_store_are_adopted(tmp_path, model, small, expected, auto):
    """More memory or less on another day would choose other tiles: not for a store that is half there."""
    cores = [stage.tile for stage in begin(model, tmp_path, 5, small).plan.stages]
    job = finish(model, tmp_path, replace(small, tile=None, executor="auto" if auto else small.executor))
    assert [stage.tile for stage in job.plan.stages] == cores
    assert cores[-1] == 8
    assert job.plan.executor == small.executor
    assert files(tmp_path) == expected


OTHER = {
    "seed": ({"seed": 1}, "seed: 0 there, 1 here"),
    "size": ({"size": (96, 127)}, "canvas:"),
    "region": ({"roi": (0, 0, 96, 127)}, "roi:"),
    "overlap": ({"overlap": "5"}, 'stages: halo of stage 1 4 there, 5 here; .*overlap: "4" there, "5" here'),
    "tile": ({"tile": 16}, r"stages: core of stage 1 \d there, \d+ here"),
    "executor": ({"executor": None}, 'executor: "(tiles|bands)" there, "(bands|tiles)" here'),
    "stages": ({"stages": 1}, "base:"),
    "precision": ({"precision": "bf16"}, "precision:"),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("complete", [False, True])
def test_another_plan_is_refused_and_the_store_untouched(tmp_path, model, small, name, complete):
    changes, words = OTHER[name]
    if "executor" in changes:
        changes = {"executor": "bands" if small.executor == "tiles" else "tiles"}
    if "roi" in changes:
        from engine.geometry import Box

        changes = {"roi": Box(*changes["roi"])}
    finish(model, tmp_path, small) if complete else begin(model, tmp_path, 5, small)
    before = files(tmp_path)
    job = Job.prepare(model, replace(small, **changes), tmp_path / "out.zarr")
    with pytest.raises(ResumeError, match=words) as caught:
        job.open_sink(resume=True, overwrite=False)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == before


def test_another_model_is_refused_and_the_store_untouched(tmp_path, capsys, model, small, command, swin_model_file):
    begin(model, tmp_path, 5, small)
    before = files(tmp_path)
    code, _, err = cli(capsys, "render", swin_model_file, "--out", tmp_path / "out.zarr", *command, "--resume")
    assert code == 4
    assert "model_digest" in err
    assert files(tmp_path) == before


def test_another_picture_is_refused(tmp_path, model, picture):
    from PIL import Image

    for name, seed in (("a", 0), ("b", 1)):
        values = (picture(6, 8, seed).permute(1, 2, 0).numpy() * 255).astype("uint8")
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    (tmp_path / "out").mkdir()
    begin(model, tmp_path / "out", 5, replace(SMALL, init=tmp_path / "a.png"))
    with pytest.raises(ResumeError, match="init_digest"):
        finish(model, tmp_path / "out", replace(SMALL, init=tmp_path / "b.png"))
    finish(model, tmp_path / "out", replace(SMALL, init=tmp_path / "a.png"))


@pytest.mark.parametrize("writes", [0, 5])
def test_an_existing_store_is_not_taken_for_a_new_one(tmp_path, capsys, model, small, command, model_file, writes):
    begin(model, tmp_path, writes, small)
    before = files(tmp_path)
    code, out, err = cli(capsys, "render", model_file, "--out", tmp_path / "out.zarr", *command)
    assert (code, out) == (4, "")
    assert err.splitlines()[-1].endswith("give --resume to finish it, --overwrite to replace it, or another --out")
    assert files(tmp_path) == before


# Stores that somebody damaged


def with_plan(change):
    def damage(store):
        group = zarr.open_group(store, mode="r+")
        ours = dict(group.attrs["ourgan"])
        group.attrs["ourgan"] = change(ours)

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


@pytest.mark.parametrize("tile", [True, False], ids=["tile", "adopted"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_store_is_refused_in_one_line_and_untouched(tmp_path, capsys, model, model_file, small, name, tile):
    begin(model, tmp_path, 5, small)
    DAMAGE[name](tmp_path / "out.zarr")
    before = files(tmp_path)
    command = ("render", model_file, "--out", tmp_path / "out.zarr", "--size", "128x96", "--stages", "2")
    cut = ("--tile", "8", "--executor", small.executor) if tile else ()
    code, out, err = cli(capsys, *command, "--overlap", "4", *cut, "--resume")
    assert (code, out) == (4, "")
    said = [line for line in err.splitlines() if not line.startswith("measuring ")]
    assert len(said) == 1
    assert said[0].startswith(f"engine: {tmp_path / 'out.zarr'}: ")
    assert "--o" in said[0]  # --overwrite or --out: the way out
    assert files(tmp_path) == before


def test_a_store_without_its_complete_mark_is_finished(tmp_path, model, small, expected):
    finish(model, tmp_path, small)
    with_plan(lambda o: {**o, "complete": False})(tmp_path / "out.zarr")
    finish(model, tmp_path, small)
    assert files(tmp_path) == expected
