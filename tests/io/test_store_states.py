"""Any order of events in a store's life against a model: writers that die, damage of all kinds, repair, and replacement.

The model knows the bytes that it damaged. So a shard is missing, damaged by the model, or has exactly the expected pixels.
"""

import math
import random
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.plans import plan_of
from support.stores import attributes, files, image_files

from engine.errors import EngineError, ResumeError
from engine.io.halving import halve
from engine.io.shards import shard_path
from engine.io.store_check import check_store
from engine.io.zarr_store import ZarrSink
from engine.store import open_store

PLANS = {
    "tiles of one shard": plan_of((24, 40), cores=(2, 4), halos=(0, 0), shard=16, chunk=8),
    "tiles of four shards": plan_of((41, 35), cores=(2, 8), halos=(0, 0), shard=16, chunk=8, seed=2),
}
DAMAGE = ("flip", "flip in the index", "cut", "longer", "empty", "garbage", "deleted", "folder", "full folder", "link")
MEMORY = Path("/dev/shm")
"""Folder in memory, where waiting for the disk takes no time."""


def pyramid(plan):
    """Expected pixels of every level."""
    rng = np.random.default_rng(plan.seed)
    levels = [rng.integers(0, 256, (3, *plan.size), np.uint8)]
    for _ in plan.pyramid[1:]:
        levels.append(halve(levels[-1]))
    return levels


EXPECTED = {plan.seed: pyramid(plan) for plan in PLANS.values()}


def content(path):
    """Content at the place of a shard: bytes, names in a folder, the target of a link, or None."""
    if path.is_symlink():
        return str(path.readlink())
    if path.is_dir():
        return sorted(p.name for p in path.iterdir())
    return path.read_bytes() if path.exists() else None


class Store(RuleBasedStateMachine):
    """A store of one name.

    Attributes:
        plan: plan of the store.
        sink: writer of the store; None after its death or its end.
        bad: damaged shards (level, row, column), and what was put in their places.
        kept: files of the store that the present one replaces.
        compared: shards (seed, level, row, column) whose pixels were compared, and their bytes.
    """

    @initialize(name=st.sampled_from(sorted(PLANS)))
    def create(self, name):
        self.folder = TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.path = Path(self.folder.name) / "out.zarr"
        self.plan = PLANS[name]
        self.sink = ZarrSink.create(self.path, self.plan, {"licences": []})
        self.bad, self.kept, self.compared = {}, None, {}

    # The writer

    @precondition(lambda self: self.sink)
    @rule(share=st.floats(0, 1), is_new=st.booleans(), order=st.randoms(use_true_random=False))
    def write(self, share, is_new, order):
        """Write a share of the missing boxes, or of all, in any order."""
        self.sink.note({"share": share})
        boxes = list(self.sink.missing() if is_new else self.plan.writes())
        for box in order.sample(boxes, round(share * len(boxes))):
            with self.refusal(*self.bad):
                self.sink.write(box, self.pixels(box))

    @precondition(lambda self: self.sink)
    @rule()
    def write_the_rest(self):
        self.write(1.0, True, random.Random(0))
        if self.sink.is_finished:
            self.finish()

    @precondition(lambda self: self.sink)
    @rule(is_writing=st.booleans())
    def die(self, is_writing):
        """Others meddle in vain, then the process ends: its lock goes, its temporary file stays."""
        self.intrude()
        if is_writing:
            part = shard_path(self.path, 0, 0, 0).with_name(f"0.{'0a' * 16}.partial")
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(b"half a shard")
        self.sink.close()
        self.sink = None

    @precondition(lambda self: not self.sink)
    @rule()
    def resume(self):
        with self.refusal(*self.full_folders()):
            self.sink = ZarrSink.resume(self.path, self.plan)
            assert not list(self.path.rglob("*.partial"))
            self.forget()
            assert all(kind == "flip" for kind, _ in self.bad.values())

    @precondition(lambda self: self.sink and self.sink.is_finished)
    @rule()
    def finish(self):
        with self.refusal(*self.bad):
            self.sink.finish()
            assert self.is_complete()
            assert [p.name for p in self.path.parent.iterdir()] == ["out.zarr"]
            self.sink = self.kept = None

    @precondition(lambda self: not self.sink)
    @rule(name=st.sampled_from(sorted(PLANS)))
    def overwrite(self, name):
        before, was_complete = files(self.path), self.is_complete()
        with self.refusal(*self.full_folders(), *(i for i, (kind, _) in self.bad.items() if kind == "link")):
            self.sink = ZarrSink.create(self.path, PLANS[name], {"licences": []}, overwrite=True)
            self.bad, self.plan = {}, PLANS[name]
            if was_complete or self.kept is None or not self.kept[1]:
                self.kept = before, was_complete
            assert files(self.sink.replaced) == self.kept[0]

    # Others

    @precondition(lambda self: self.present() - set(self.bad))
    @rule(data=st.data(), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage(self, data, where, bit):
        shards = st.lists(st.sampled_from(sorted(self.present() - set(self.bad))), min_size=1, max_size=3, unique=True)
        for index in data.draw(shards):
            self.put(index, data.draw(st.sampled_from(DAMAGE)), where, bit)

    @precondition(lambda self: not self.sink)
    @rule(repair=st.booleans())
    def check(self, repair):
        self.forget()
        complete, bad, missing = self.is_complete(), set(self.bad), self.missing()
        with self.refusal(*(self.full_folders() if repair else ())):
            findings = check_store(self.path, repair=repair)
            shards = {d.file for d in findings.damage}
            assert shards == {self.file(index) for index in bad}, findings
            assert findings.complete == complete
            assert findings.missing == len(missing)
            assert self.is_complete() == (complete and not (repair and bad))
            self.forget()
            assert not (repair and self.bad)

    @precondition(lambda self: not self.sink and self.is_complete() and not self.bad)
    @rule(data=st.data())
    def misplace(self, data):
        """A whole shard in the place of another has right checksums. The levels of a finished store show it."""
        one, other = data.draw(st.permutations(sorted(self.present())))[:2]
        if len({self.file(i).read_bytes() for i in (one, other)}) == 1:
            return
        shutil.copyfile(self.file(other), self.file(one))
        assert self.file(one) in {d.file for d in check_store(self.path, repair=True).damage}

    @rule()
    def read(self):
        store, complete = open_store(self.path), self.is_complete()
        for level, expected in enumerate(EXPECTED[self.plan.seed]):
            bad = {index for index in self.bad if index[0] == level}
            pixels = None
            with self.refusal(*bad):
                pixels = store.read(level=level)
            if pixels is None:
                continue
            assert not (complete and bad)
            for index in self.indices(level):
                rows, columns = self.box(index).slices
                black = index in bad or not self.file(index).exists()
                np.testing.assert_array_equal(
                    pixels[rows, columns].transpose(2, 0, 1), 0 if black else expected[:, rows, columns]
                )

    # The model

    @contextmanager
    def refusal(self, *reasons):
        """An error of the engine in one line is allowed for reasons alone."""
        refusal = None
        try:
            yield
        except EngineError as error:
            refusal = error
        self.forget()
        if refusal is not None and (not reasons or "\n" in str(refusal)):
            raise refusal

    def intrude(self):
        """Others write the store, or rename it, while it has a writer."""
        for intrusion in (
            lambda: check_store(self.path, repair=True),
            lambda: ZarrSink.resume(self.path, self.plan),
            lambda: ZarrSink.create(self.path, self.plan, {}, overwrite=True),
            lambda: ZarrSink.create(self.path, self.plan, {}),
        ):
            with pytest.raises(ResumeError, match=r"is being written|exists|holds .*, which no render wrote"):
                intrusion()
        aside = self.path.rename(self.path.with_name("aside.zarr"))
        with pytest.raises(ResumeError, match="removed, renamed or replaced"):
            self.sink.note({"share": 0.0})
        aside.rename(self.path)

    def put(self, index, kind, where, bit):
        """Damage a shard. ``where``: place of a flip or a cut in the file; ``bit``: bit to flip, seed of garbage."""
        path = self.file(index)
        stored = bytearray(path.read_bytes())
        path.unlink()
        end = (
            len(stored) - 16 * math.prod(s // c for s, c in zip(self.plan.shard, self.plan.chunk, strict=True)) - 4
        )  # of the chunks
        if kind.startswith("flip"):
            at = int(where * end) if kind == "flip" else end + int(where * (len(stored) - end))
            stored[at] ^= 1 << bit
            path.write_bytes(stored)
        elif kind in ("cut", "longer"):
            path.write_bytes(stored[: int(where * len(stored))] if kind == "cut" else stored + b"\0")
        elif kind == "garbage":
            path.write_bytes(np.random.default_rng(bit).bytes(len(stored)))
        elif kind == "empty":
            path.touch()
        elif kind == "link":
            path.symlink_to(path.parent)
        elif kind.endswith("folder"):
            path.mkdir()
            if kind.startswith("full"):
                (path / "notes").write_text("somebody's")
        if kind != "deleted" or self.is_complete():
            self.bad[index] = kind, content(path)

    def pixels(self, box):
        rows, columns = box.slices
        return EXPECTED[self.plan.seed][0][:, rows, columns]

    def indices(self, level=None):
        levels = range(len(self.plan.pyramid)) if level is None else (level,)
        return [(at, *index) for at in levels for index in self.plan.grid(at).indices()]

    def file(self, index):
        return shard_path(self.path, *index)

    def box(self, index):
        return self.plan.grid(index[0]).box(*index[1:])

    def present(self):
        return {index for index in self.indices() if self.file(index).exists()}

    def missing(self):
        return set(self.indices()) - self.present()

    def full_folders(self):
        return [index for index, (kind, _) in self.bad.items() if kind == "full folder"]

    def is_complete(self):
        return attributes(self.path)["complete"]

    def forget(self):
        """Drop damage that is no longer in its place: the shard was removed or written again."""
        complete = self.is_complete()
        self.bad = {
            index: damage
            for index, damage in self.bad.items()
            if content(self.file(index)) == damage[1] and (damage[1] is not None or complete)
        }

    @invariant()
    def every_shard_is_right_missing_or_damaged_by_the_model(self):
        group, stored = zarr.open_group(self.path, mode="r"), {i: content(self.file(i)) for i in self.present()}
        assert not self.is_complete() or set(self.indices()) == set(stored) | set(self.bad)
        for index in set(stored) - set(self.bad):
            key = self.plan.seed, *index
            if stored[index] != self.compared.get(key):
                part = (slice(None), *self.box(index).slices)
                expected = EXPECTED[self.plan.seed][index[0]][part]
                np.testing.assert_array_equal(group[str(index[0])][part], expected)
                self.compared[key] = stored[index]

    def teardown(self):
        """From any state, repair and a render to the end make the undisturbed store."""
        with self.folder:
            if self.sink:
                self.sink.close()
            for index in self.full_folders():
                (self.file(index) / "notes").unlink()
            check_store(self.path, repair=True)
            self.render(ZarrSink.resume(self.path, self.plan))
            findings = check_store(self.path)
            assert (findings.complete, findings.missing, findings.damage) == (True, 0, ())
            assert [p.name for p in self.path.parent.iterdir()] == ["out.zarr"]
            undisturbed = self.path.with_name("undisturbed.zarr")
            self.render(ZarrSink.create(undisturbed, self.plan, {"licences": []}))
            assert image_files(self.path) == image_files(undisturbed)

    def render(self, sink):
        for box in list(sink.missing()):
            sink.write(box, self.pixels(box))
        sink.finish()


def run(examples, steps):
    run_state_machine_as_test(
        Store,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, derandomize=True, database=None, deadline=None,
            phases=[Phase.generate],  # shrinking takes up to five minutes
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_any_order_of_events():
    run(8, 15)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_orders_of_events():
    run(60, 25)
