#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Fills the tables of the documents from the committed results of bench.py.

    python3 .ci/readme.py            # rewrites the documents
    python3 .ci/readme.py --check    # fails if that would change one

A table stands between two comments. The first names the table and its arguments:

    <!-- methods file=bench-cpu problem=deep -->
    <!-- /methods -->

Links to tests are filled in, too. Write the name of the test as the title of the link,
and the line can be any: [test](.ci/tests/test_peers.py#L1 "test_pitfall_...").
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / ".github"
DOCUMENTS = ["README.md", ".github/results.md", ".github/recipes.md"]
MISSING = "–"

Row = dict[str, Any]  # of bench.py's JSON


# ----------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Results:
    """A committed run of bench.py."""

    file: str
    card: dict[str, Any]
    rows: list[Row]

    def find(self, **wanted: Any) -> Row | None:
        """Returns the row with these values, or None. Raises if there are several."""
        found = []
        for row in self.rows:
            if all(row[key] == value for key, value in wanted.items()):
                found.append(row)
        if len(found) > 1:
            raise SystemExit(f"{self.file}: {len(found)} rows have {wanted}")
        return found[0] if found else None

    def methods(self, table: str) -> list[str]:
        """Returns the methods in a table, in the order of their first rows."""
        names: list[str] = []
        for row in self.rows:
            if row["table"] == table and row["method"] not in names:
                names.append(row["method"])
        return names


def read_results(file: str) -> Results:
    run = json.loads((RESULTS / f"{file}.json").read_text())
    if not run["complete"]:
        raise SystemExit(f"{file}.json is of a run that did not end")
    return Results(file, run["card"], run["rows"])


# --------------------------------------------------------------------- cells and tables


def three_digits(value: float) -> str:
    """Rounds to three digits, zeros included: 1,230, 24.3, 9.10, 0.270."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    if value >= 1:
        return f"{value:.2f}"
    if 0 < value < 0.001:
        return "< 0.001"
    return f"{value:.3f}"


def number(row: Row | None, key: str, unit: float = 1) -> str:
    """Returns a figure of a row in a unit, for example 1e-3 for milliseconds."""
    if row is None or row[key] is None:
        return MISSING
    return three_digits(row[key] / unit)


def speed_up(row: Row | None) -> str:
    """Returns how many times faster than training everything a row is."""
    if row is None or row["speedup"] is None:
        return MISSING
    if not row["differs"] and row["method"] != "everything":
        return "no difference"  # according to the sign test
    return times(row["speedup"])


def times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def one_decimal(row: Row | None, key: str) -> str:
    if row is None or row[key] is None:
        return MISSING
    return f"{row[key]:.1f}"


def percent(row: Row | None, key: str) -> str:
    if row is None or row[key] is None:
        return MISSING
    return f"{100 * row[key]:.0f}"


def code(method: str) -> str:
    """Sets the names of methods that are code in backticks."""
    name, comma, variant = method.partition(",")
    is_code = name in ("partition", "hoist", "stop_gradient")
    return f"`{name}`{comma}{variant}" if is_code else method


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Writes a table. All columns but the first are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    lines = [f"| {' | '.join(cells)} |" for cells in [header, rule, *rows]]
    return "\n".join(lines)


# -------------------------------------------------------------------------- the tables


def headline(cpu: str, gpu: str, cpu_problem: str, gpu_problem: str) -> str:
    """The first table: one step, with all gradients clipped or the trained layer's."""
    lines = [
        ("train everything", "peers", "everything"),
        ("optax, all gradients clipped", "peers", "optax, clip outside"),
        ("optax, last layer's gradients clipped", "peers", "optax, clip inside"),
        ("`partition`", "peers", "partition"),
        ("`hoist`", "methods", "hoist"),
    ]
    table = [[label] for label, _, _ in lines]
    for file, problem in ((cpu, cpu_problem), (gpu, gpu_problem)):
        rows = []
        for _, kind, method in lines:
            wanted = {"table": kind, "method": method, "problem": problem, "clip": True}
            rows.append(read_results(file).find(optimizer="sgd", **wanted))
        baseline = rows[0]
        for cells, row in zip(table, rows):
            cells.append(number(row, "step_s", 1e-3))
            if row is None or baseline is None:
                cells.append(MISSING)
            else:
                # The quotient of the times shown: hoist stands in another table.
                cells.append(times(baseline["step_s"] / row["step_s"]))
    header = [
        "",
        "CPU, ms per step",
        "CPU, speed-up",
        "GPU, ms per step",
        "GPU, speed-up",
    ]
    return markdown(header, table)


def methods(file: str, problem: str, clip: str = "no", optimizer: str = "sgd") -> str:
    """Each way to freeze, in one problem."""
    results = read_results(file)
    wanted = {"problem": problem, "clip": clip == "yes", "optimizer": optimizer}
    table = []
    for method in results.methods("methods"):
        row = results.find(table="methods", method=method, **wanted)
        if row is not None:
            time, spread = number(row, "step_s", 1e-3), number(row, "spread_s", 1e-3)
            memory = number(row, "memory_bytes", 1e6)
            table.append([code(method), time, spread, speed_up(row), memory])
    header = ["method", "ms per step", "± ms", "speed-up", "memory, MB"]
    return markdown(header, table)


def choices(optimizer: str = "sgd", **files: str) -> str:
    """What to train, one run of bench.py per choice: last_block=bench-last-block ..."""
    table = []
    for choice, file in files.items():
        results = read_results(file)
        wanted = {"table": "methods", "clip": False, "optimizer": optimizer}
        partition = results.find(method="partition", **wanted)
        hoist = results.find(method="hoist", **wanted)
        cells = [choice.replace("_", " "), speed_up(partition)]
        cells += [number(partition, "step_s", 1e-3), number(hoist, "step_s", 1e-3)]
        spreads = [row["spread_s"] for row in (partition, hoist) if row is not None]
        cells.append(three_digits(max(spreads) / 1e-3))
        table.append(cells)
    header = [
        "trainable",
        "`partition`, speed-up",
        "`partition`, ms per step",
        "`hoist`, ms per step",
        "± ms, at most",
    ]
    return markdown(header, table)


def memory(file: str, problem: str) -> str:
    """What a step needs of memory, and how close its time is to the machine's limit."""
    results = read_results(file)
    table = []
    for method in results.methods("methods"):
        wanted = {
            "table": "methods",
            "problem": problem,
            "method": method,
            "clip": False,
        }
        sgd = results.find(optimizer="sgd", **wanted)
        adam = results.find(optimizer="adam", **wanted)
        if adam is not None:
            megabytes = [number(row, "memory_bytes", 1e6) for row in (sgd, adam)]
            table.append([code(method), *megabytes, percent(sgd, "limit_share")])
    header = ["method", "SGD, MB", "Adam, MB", "SGD, % of the limit"]
    return markdown(header, table)


def prefix(file: str, problem: str) -> str:
    """How a step's time falls with the number of frozen layers."""
    results = read_results(file)
    table = []
    for frozen in range(1, 100):
        named = {"table": "prefix", "problem": f"{problem}, {frozen} frozen"}
        partition = results.find(method="partition", **named)
        hoist = results.find(method="hoist", **named)
        if partition is None:
            break
        times = [number(row, "step_s", 1e-3) for row in (partition, hoist)]
        epochs = one_decimal(hoist, "break_even")
        table.append([str(frozen), *times, speed_up(hoist), epochs])
    header = [
        "frozen layers",
        "`partition`, ms per step",
        "`hoist`, ms per step",
        "`hoist`, speed-up",
        "epochs until `hoist` pays off",
    ]
    return markdown(header, table)


def devices(file: str, problem: str, layout: str = "replicated") -> str:
    """What one of several devices computes, holds and sends in a step."""
    results = read_results(file)
    table = []
    for row in results.rows:
        is_wanted = row["table"] == "devices" and row["devices"] > 1
        if is_wanted and (row["problem"], row["layout"]) == (problem, layout):
            label = [code(row["method"]), str(row["devices"])]
            gigaflops = number(row, "flops", 1e9)
            memory, sent = (
                number(row, "memory_bytes", 1e6),
                number(row, "sent_bytes", 1e6),
            )
            table.append([*label, gigaflops, memory, sent])
    header = ["method", "devices", "GFLOP", "memory, MB", "sent, MB"]
    return markdown(header, table)


def walk_through(file: str) -> str:
    """A step of the walk-through, called one by one and in a scan."""
    results = read_results(file)
    table = []
    for label, method in (("`train_step` in a loop", "loop"), ("`train`", "scan")):
        row = results.find(table="run", method=method)
        table.append(
            [label, number(row, "step_s", 1e-6), number(row, "spread_s", 1e-6)]
        )
    return markdown(["", "µs per step", "± µs"], table)


def peers(file: str, small: str = "seed", large: str = "deep", clip: str = "no") -> str:
    """The same step in other libraries, on a small and on a large problem."""
    results = read_results(file)
    table = []
    for method in results.methods("peers"):
        wanted = {"table": "peers", "method": method, "clip": clip == "yes"}
        rows = [results.find(problem=problem, **wanted) for problem in (small, large)]
        if any(rows):
            cells = [number(rows[0], "step_s", 1e-6), number(rows[0], "spread_s", 1e-6)]
            cells += [
                number(rows[1], "step_s", 1e-3),
                number(rows[1], "spread_s", 1e-3),
            ]
            table.append([code(method), *cells])
    header = ["", f"{small}, µs per step", "± µs", f"{large}, ms per step", "± ms"]
    return markdown(header, table)


def hardware(file: str) -> str:
    """A sentence: on what, with which versions and when a run was made."""
    card = read_results(file).card
    machine = f"{card['device_count']} x {card['device_kind']} ({card['cpu']})"
    if card["platform"] == "cpu":
        machine = f"a CPU ({card['cpu']})"
    action = "Measured on"
    if card["platform"] == "tpu":
        action = "Compiled for"
        machine = f"{card['device_count']} x {card['device_kind']}"
    text = f"{action} {machine}, with JAX {card['jax']} and Python {card['python']}"
    text += f", in {card['dtype']}, on {card['date']}"
    if card.get("commit") is not None:  # older results do not tell
        text += f", at commit {card['commit'][:10]}"
    return f"{text}."


def matrix() -> str:
    """Says on which versions of jax no test failed and none was skipped."""
    lines = (RESULTS / "matrix.md").read_text().splitlines()[2:]
    names = []
    for line in lines:
        name, *outcome = [cell.strip() for cell in line.strip("|").split("|")]
        if outcome != ["yes", "0", "0"]:
            raise SystemExit(f"matrix.md: not every test passes: {line}")
        names.append(name)
    *others, last = [name for name in names if name != "newest"]
    numbered = f"{', '.join(others)} and {last}"
    return (
        "The module's own tests, and the tests that use it with other libraries, pass "
        "on JAX "
        f"{numbered}. CI also runs them every week on the latest release."
    )


TABLES: dict[str, Callable[..., str]] = {
    "headline": headline,
    "methods": methods,
    "choices": choices,
    "memory": memory,
    "prefix": prefix,
    "devices": devices,
    "walk-through": walk_through,
    "peers": peers,
    "hardware": hardware,
    "matrix": matrix,
}


# ----------------------------------------------------------------------- the documents

MARKED = re.compile(
    r"<!-- (?P<table>[a-z][a-z-]*)(?P<arguments>( \w+=\S+)*) -->\n"
    r"[\s\S]*?"
    r"<!-- /(?P<end>[a-z-]+) -->"
)
LINK_TO_A_TEST = re.compile(r'\]\((?P<file>[^()\s]+\.py)#L\d+ "(?P<test>test_\w+)"\)')


def fill_table(match: re.Match[str]) -> str:
    name = match["table"]
    if name not in TABLES or match["end"] != name:
        raise SystemExit(f"no table is marked {name} ... /{match['end']}")
    arguments = dict(pair.split("=") for pair in match["arguments"].split())
    start = match[0].splitlines()[0]
    return f"{start}\n\n{TABLES[name](**arguments)}\n\n<!-- /{name} -->"


def line_of(file: Path, function: str) -> int:
    """Returns the line on which a test function starts."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return node.lineno
    raise SystemExit(f"{file} has no function {function}")


def filled(document: Path) -> str:
    """Returns the text of a document with its tables and links to tests filled in."""

    def fill_link(match: re.Match[str]) -> str:
        file, test = match["file"], match["test"]
        line = line_of(document.parent / file, test)
        return f']({file}#L{line} "{test}")'

    text = MARKED.sub(fill_table, document.read_text())
    return LINK_TO_A_TEST.sub(fill_link, text)


def main() -> None:
    for name in DOCUMENTS:
        document = REPOSITORY / name
        if not document.exists():
            continue
        text = filled(document)
        if "--check" not in sys.argv:
            document.write_text(text)
        elif text != document.read_text():
            raise SystemExit(f"{name} is stale: run python3 .ci/readme.py")


if __name__ == "__main__":
    main()
