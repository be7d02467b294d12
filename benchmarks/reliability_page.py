"""Write the tables of docs/reliability.md from the committed rows of benchmarks/results.

    python benchmarks/reliability_page.py

The text around the tables is written by hand. Measures nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from results_page import ROOT, Row, count, latest, paragraph, percent, rows, source, table

PAGE = ROOT / "docs" / "reliability.md"

SAME = "one line, nothing half-written, and the same command then ends as if undisturbed"

PARTS = {
    "kills": (
        "`kill -9` at random moments",
        "the same command ends with the bytes of an undisturbed run; a training with its tensors",
    ),
    "disk": (
        "a full disk at the n-th change of a file (n from 1 on)",
        SAME,
    ),
    "opens": ("`EIO` at the n-th open of a file or folder", SAME),
    "descriptors": ("no descriptor at the n-th open of a file or folder", SAME),
    "reads": ("`EIO` at the n-th read of a file", SAME),
    "allocations": (
        "no memory at the n-th allocation of more than 16 KiB",
        f"{SAME}; libraries below Python may abort",
    ),
    "bits": ("a flipped bit in a shard of a finished store", "noticed"),
    "damage": (
        "1 to 3 shards cut, zeroed, grown, garbage, empty, missing, a folder, a link, with a flipped bit",
        "rendered again to the same bytes",
    ),
    "races": (
        "two renders into one store, the second at a random time",
        "no store that says complete and is wrong; the other process ends in one line",
    ),
    "fuzz": ("mutated files", "read, or refused in one line, within 60 s and 1 GiB"),
    "container": ("limits of memory", "a render within the limit, or one line"),
    "signals": (
        "INT, TERM, HUP, three INT, all six within 60 ms, at several times",
        "one line, exit 130, no temporary file",
    ),
    "streams": ("standard streams closed or full", "no traceback, and an exit code that tells"),
}
"""Each part of benchmarks/faults.py: what is injected, and the end that is promised."""


CALLS = "disk", "opens", "descriptors", "reads", "allocations"
"""Parts whose seeds are the calls of a command, so that they end."""


def faults() -> list[Row]:
    """The last row of each block of seeds; where seeds end, a row replaces rows that start at its first seed or later."""
    shown: dict[tuple[str, str], list[Row]] = {}
    for row in rows("faults"):
        first, last = int(row["first"]), int(row["last"])
        before = shown.get((row["part"], row["case"]), [])
        blocks = [(one, int(one["first"]), int(one["last"])) for one in before]
        if row["part"] in CALLS:
            kept = [one for one, start, _ in blocks if start < first]
        else:
            kept = [one for one, start, end in blocks if (start, end) != (first, last)]
        shown[row["part"], row["case"]] = [*kept, row]
    return [row for of_case in shown.values() for row in of_case]


def total(shown: Sequence[Row], key: str) -> int:
    return sum(int(row[key]) for row in shown)


def overview(shown: Sequence[Row]) -> list[str]:
    body = []
    for part, (fault, end) in PARTS.items():
        of_part = [row for row in shown if row["part"] == part]
        if of_part:
            numbers = f"{total(of_part, 'faults'):,}", f"{total(of_part, 'failures'):,}"
            body.append((fault, end, *numbers, f"`faults.py {part}`"))
    return [
        table(("fault", "end", "injected", "ended otherwise", "again"), body),
        source("faults.py PART", "faults", shown),
    ]


def each(shown: Sequence[Row]) -> list[str]:
    cases = dict.fromkeys((row["part"], row["case"]) for row in shown if row["part"] not in CALLS)
    body = []
    for part, case in sorted(cases, key=lambda one: list(PARTS).index(one[0])):
        of_case = [row for row in shown if (row["part"], row["case"]) == (part, case)]
        body.append((part, case, f"{total(of_case, 'faults'):,}", f"{total(of_case, 'failures'):,}"))
    return ["### By command", table(("part", "command or case", "injected", "ended otherwise"), body)]


def command(case: str) -> str:
    """The command of a case: it makes about as many calls undisturbed, however they fail."""
    return case.partition(",")[0]


def calls(shown: Sequence[Row]) -> list[str]:
    """Which share of the calls of each command failed, and how many runs ended otherwise."""
    all_of = {
        (row["part"], name): int(row["total"])
        for row in rows("faults")
        if row["total"]
        for name in (row["case"], command(row["case"]))
    }

    def cell(part: str, case: str) -> str:
        of_case = [row for row in shown if (row["part"], row["case"]) == (part, case)]
        if not of_case:
            return "none"
        failed, otherwise = total(of_case, "faults"), total(of_case, "failures")
        text = f"{failed:,} of {all_of.get((part, case), all_of[part, command(case)]):,}"
        return f"{text}, {otherwise} otherwise" if otherwise else text

    cases = dict.fromkeys(row["case"] for row in shown if row["part"] in CALLS)
    body = [(case, *(cell(part, case) for part in CALLS)) for case in sorted(cases)]
    return [
        "### Calls of the system by command",
        paragraph("Calls that failed, of all calls that the command makes; `once` or `from there on`, as above."),
        table(("command", *CALLS), body),
    ]


def cost() -> list[str]:
    (row,) = latest("faults_cost")[-1:]
    cpu, wall, size = (float(row[f"after_{key}"]) / float(row[f"before_{key}"]) - 1 for key in ("cpu", "wall", "bytes"))
    return [
        "### Cost",
        paragraph(
            f"The same render (512x384, bands, float32, one thread) by this engine and by the one before checksums, locks, "
            f"identities and synchronised files, in turns; medians of {row['renders']}. A loaded "
            "machine shows in both times."
        ),
        table(
            ("", "before", "after", "difference"),
            [
                ("CPU time (s)", row["before_cpu"], row["after_cpu"], signed(cpu)),
                ("elapsed time (s)", row["before_wall"], row["after_wall"], signed(wall)),
                ("store (bytes)", count(row["before_bytes"]), count(row["after_bytes"]), signed(size)),
            ],
        ),
        source("faults.py cost", "faults_cost", [row]),
    ]


def signed(ratio: float) -> str:
    return f"{'+' if ratio >= 0 else '-'}{percent(abs(ratio))}"


def rounding() -> list[str]:
    shown = latest("rounding_sizes", "first")
    differing, values = total(shown, "differing"), total(shown, "values")
    worst = min((int(row["worst_one_in"]) for row in shown if row["worst_one_in"]), default=None)
    return [
        table(
            ("renders", "that differ", "values", "that differ", "worst image", "largest difference"),
            [
                (
                    total(shown, "renders"),
                    total(shown, "differing_renders"),
                    f"{values:,}",
                    f"{differing:,}",
                    f"1 value of {worst:,}" if worst else "none",
                    f"{max(int(row['max_levels']) for row in shown)} level",
                )
            ],
        ),
        source("bench_rounding.py sizes", "rounding_sizes", shown),
    ]


def page(text: str) -> str:
    """The page with its tables written again, between their markers."""
    shown = faults()
    tables = {"faults": [*overview(shown), *calls(shown), *each(shown), *cost()], "rounding": rounding()}
    for name, parts in tables.items():
        begin, end = f"<!-- {name}: written by benchmarks/reliability_page.py -->", f"<!-- end of {name} -->"
        body = "\n\n".join([begin, *parts, end])
        text, number = re.subn(
            f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, body=body: body, text, flags=re.DOTALL
        )
        assert number == 1, name
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
