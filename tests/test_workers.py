"""One image by the workers of a Dask cluster: the bytes of one run, whoever is killed, stopped, cut off or refused."""

import signal
from dataclasses import asdict, replace

import pytest
from support.commands import finish as end
from support.commands import start
from support.stores import files, render, shards

pytest.importorskip("distributed")
from support.clusters import Cluster, wait_until

import engine
from engine.model.bundle import load
from engine.parts import missing_parts
from engine.plan.request import Request
from engine.workers import check_workers, cluster, conduct
from engine.workers import render as workers_render

TILES = Request(size=(256, 192), stages=2, tile=8, overlap="4", precision="fp32", executor="tiles")
BANDS = replace(TILES, executor="bands", tile=16, size=(128, 160))
LARGE = replace(TILES, size=(512, 384))
WORDS = "--size 512x384 --stages 2 --tile 8 --overlap 4 --precision fp32 --executor tiles"


@pytest.fixture(scope="module")
def expected(tmp_path_factory, model_file):
    """Function (request) -> files of the store of one run."""
    folder, known = tmp_path_factory.mktemp("one"), {}

    def of(request):
        if request not in known:
            out = folder / str(len(known)) / "out.zarr"
            render(load(model_file), request, out)
            known[request] = files(out.parent)
        return known[request]

    return of


# Pixels


@pytest.fixture(scope="module")
def client():
    """Two processes of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with cluster.connected("local:2", (), 1 << 30) as client:
            yield client


@pytest.mark.parametrize(("request_", "shares"), [(TILES, None), (BANDS, 2)], ids=["tiles", "bands"])
def test_workers_end_in_the_bytes_of_one_run(tmp_path, model_file, client, expected, request_, shares):
    """Also from a store that ``--part`` began, whose division they keep."""
    out, lines = tmp_path / "out.zarr", []
    if shares is not None:
        engine.render(model_file, out, part=f"2/{shares}", **_options(request_))
    conductor = conduct.Conductor(client, lines.append)
    run = workers_render.WorkersRender.begin(conductor, model_file, request_, out)
    assert [seconds > 0 for seconds in run.begun.seconds] == [True, shares is None]
    told = []
    result = run.run(on_progress=lambda progress: told.append(progress.share))
    conductor.close()
    assert files(tmp_path) == expected(request_)
    assert told[-1] == 1.0
    assert told == sorted(told)
    assert result.measurements.writes > 0


def test_a_worker_that_cannot_is_left_out(tmp_path, model_file, client, expected, monkeypatch):
    """A line says why; the others render its share. If none can, the command ends with the error."""
    out, lines = tmp_path / "out.zarr", []
    conductor = conduct.Conductor(client, lines.append)
    run = workers_render.WorkersRender.begin(conductor, model_file, TILES, out)
    (first, second) = conductor.workers()
    client.run(_limit, 1 << 20, workers=[first])
    try:
        run.run()
        assert [line.split(":")[0] for line in lines if "gets no more work" in line] in (
            ["worker cpu-0 gets no more work"], ["worker cpu-1 gets no more work"], [],
        )  # fmt: skip
        assert files(tmp_path) == expected(TILES)
        client.run(_limit, 1 << 20, workers=[second])
        with pytest.raises(engine.BudgetError, match=r"^memory: .* give"):
            workers_render.WorkersRender.begin(
                conduct.Conductor(client, lines.append), model_file, TILES, tmp_path / "none.zarr"
            )
    finally:
        client.run(_limit, 1 << 31)


def _limit(bytes_, dask_worker):
    """Set the memory of a worker, and forget what it keeps, as one that has just come."""
    from engine.workers import tasks

    manager = dask_worker.memory_manager
    manager.memory_limit, manager.memory_pause_fraction, manager.memory_spill_fraction = bytes_, False, False
    tasks._kept.clear()


def _options(request):
    return {key: value for key, value in asdict(request).items() if key != "init"}


# Faults


@pytest.mark.slow
def test_killed_and_stopped_workers_lose_nothing(tmp_path, model_file, expected):
    """One is killed and one is stopped for longer than the scheduler waits; the third one does all shares."""
    out = tmp_path / "out" / "out.zarr"
    with Cluster(tmp_path) as dask:
        for _ in range(3):
            dask.add()
        dask.wait(3)
        process = start(tmp_path, f"render {model_file} {WORDS} --out {out} --dask {dask.address} --shares 6")
        for number in (signal.SIGKILL, signal.SIGSTOP):
            wait_until(lambda: dask.busy(out) or process.poll() is not None)[0].send_signal(number)
        code, error = end(process)
        assert code == 0, error
        assert files(out.parent) == expected(LARGE)


@pytest.mark.slow
def test_ctrl_c_and_a_killed_scheduler_leave_a_store_that_goes_on(tmp_path, model_file, expected):
    out = tmp_path / "out" / "out.zarr"
    with Cluster(tmp_path) as dask:
        dask.add()
        dask.wait(1)
        words = f"render {model_file} {WORDS} --out {out} --dask {dask.address}"
        process = start(tmp_path, words)
        wait_until(lambda: shards(out, 0) >= 3)
        process.send_signal(signal.SIGINT)
        code, error = end(process)
        assert (code, error.splitlines()[-1]) == (
            130, f"engine: {out}: stopped after whole shards; the same command goes on",
        )  # fmt: skip
        assert not dask.busy(out)
        before = shards(out, 0)
        assert before < 192
        process = start(tmp_path, words)
        wait_until(lambda: shards(out, 0) > before)
        dask.scheduler.kill()
        code, error = end(process)
        assert (code, error.splitlines()[-1]) == (
            1, "engine: --dask: the scheduler is lost; start one, and repeat the command to go on",
        )  # fmt: skip
    assert missing_parts(out)
    with Cluster(tmp_path) as dask:
        dask.add()
        code, error = end(start(tmp_path, f"{words.rpartition(' ')[0]} {dask.address}"))
    assert code == 0, error
    assert files(out.parent) == expected(LARGE)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--out x.png --dask local",
            "--dask local: goes into a store, and x.png is a picture; give --out x.zarr, then",
        ),
        ("--out x.zarr --dask local --part 1/2", "--dask local and --part: exclude each other"),
        ("--out x.zarr --devices 0 --device cpu", "--devices and --device cpu: exclude each other"),
        ("--out x.zarr --devices cpu,,cpu", "--devices cpu,,cpu: an empty name; write 0,1 or cuda:0,cuda:1"),
        (
            "--out x.zarr --dask none.json",
            "--dask none.json: no such file; start dask scheduler --scheduler-file none.json",
        ),
        ("--out x.zarr --dask tcp://127.0.0.1:1", "--dask tcp://127.0.0.1:1: no scheduler answers"),
        ("--out x.zarr --shares 4", "--shares 4: divides a render among workers; add --dask"),
    ],
)
def test_refusals(call, monkeypatch, options, message):
    monkeypatch.setattr(cluster, "_CONNECT", "100 ms")
    code, _, error = call(f"render {options}")
    assert (code, len(error.splitlines())) == (2, 1)
    assert error.startswith(f"engine: {message}")


def test_without_dask_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("engine.workers.find_spec", lambda name: None)
    with pytest.raises(
        engine.UsageError, match=r"needs Dask; install the extra dask \(pip install 'ourgan-engine\[dask\]'\)"
    ):
        check_workers("local", ())
