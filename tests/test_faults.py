"""Every call of the system that fails: one line, no half-written file, and the same command then ends as if undisturbed."""

from itertools import product

import pytest
from support.faults import CASES, KINDS, Attack, build_shim, is_possible, numbers
from support.forks import Server

pytestmark = pytest.mark.skipif(not is_possible(), reason="needs Linux and a C compiler")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Server of commands with the library that fails calls."""
    with Server(build_shim(tmp_path_factory.mktemp("shim"))) as server:
        yield server


@pytest.fixture
def check(server, model_file, tmp_path):
    """Function ``check(kind, case, is_lasting, gap)`` that fails calls with growing gaps between them."""

    def run(kind, case, is_lasting, gap):
        attack = Attack(CASES[case], KINDS[kind], model_file, server, tmp_path, is_lasting=is_lasting)
        assert sum(code != 0 for _, code, _ in attack.run(numbers(gap=gap))) >= 2

    return run


@pytest.mark.parametrize(
    ("kind", "case", "is_lasting"),
    [
        ("disk", "render", False),
        ("disk", "picture", True),
        ("disk", "upscale", True),
        ("disk", "export-png", True),
        ("disk", "build-over", True),
        ("opens", "check", False),
        ("descriptors", "build", True),
        ("reads", "repair", False),
        ("allocations", "check", False),
    ],
)
def test_some_calls_fail(check, kind, case, is_lasting):
    check(kind, case, is_lasting, gap=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["opens", "allocations"])
def test_some_calls_of_every_case_fail(check, kind, case):
    check(kind, case, is_lasting=False, gap=2)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("is_lasting", [False, True], ids=["once", "from there on"])
@pytest.mark.parametrize(("kind", "case"), list(product(KINDS, CASES)))
def test_every_call_fails(check, kind, case, is_lasting):
    check(kind, case, is_lasting, gap=0.02 if case == "train" and kind == "allocations" else 0)
