# SPDX-License-Identifier: MIT
"""The steps of .ci/mutate that need Python.

    mutants.py check               the clause mutants fit the module
    mutants.py clauses             try every clause mutant
    mutants.py prune SESSION       leave out operator mutants that cannot matter
    mutants.py retry SESSION       forget the mutants that survived, to try them again
    mutants.py covering FILE MODULE LINE  the tests that run a line of a module
    mutants.py survivors SESSION   write .ci/survivors.md

SESSION is cosmic-ray's SQLite file. FILE is of coverage, with a context per test.
"""

from __future__ import annotations

import ast
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clauses import CLAUSES, Clause

CI = Path(__file__).resolve().parent
REPOSITORY = CI.parent
SURVIVORS = CI / "survivors.md"
# Of bench.py, only the functions that work out published figures are mutated. Methods
# are named without their class.
BENCH_FIGURES = [
    "median",
    "spread",
    "differs",
    "product_flops",
    "collective_bytes",
    "saves_no_work",
    "break_even",
    "limit_share",
]


# ---------------------------------------------------------------------- clause mutants


def mutated(source: str, clause: Clause) -> str:
    """Applies a clause mutant to the source of minifreeze.py."""
    found = source.count(clause.old)
    if found != 1:
        raise SystemExit(f"{clause.name}: the old text occurs {found} times, not once")
    return source.replace(clause.old, clause.new)


def is_noticed(clause: Clause, source: str) -> bool:
    """Whether test_minifreeze.py fails beside the mutated module."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "minifreeze.py").write_text(mutated(source, clause))
        shutil.copy(REPOSITORY / "test_minifreeze.py", folder)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "test_minifreeze.py"]
        environment = {**os.environ, "HYPOTHESIS_PROFILE": "mutants"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True
        )
    # 1: a test failed. 2: pytest could not import the module, which is no mutant.
    if done.returncode not in (0, 1):
        raise SystemExit(f"{clause.name}: {done.stdout}{done.stderr}")
    return done.returncode == 1


def check_clauses() -> str:
    """Returns the source of the module, if every clause mutant can be applied to it."""
    source = (REPOSITORY / "minifreeze.py").read_text()
    for clause in CLAUSES:
        mutated(source, clause)
    return source


def try_clauses() -> None:
    source = check_clauses()
    unnoticed = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        answers = pool.map(lambda clause: is_noticed(clause, source), CLAUSES)
        for clause, noticed in zip(CLAUSES, answers):
            print("noticed" if noticed else "SURVIVED", clause.name, flush=True)
            if not noticed:
                unnoticed.append(clause)
    if unnoticed:
        raise SystemExit(f"{len(unnoticed)} of {len(CLAUSES)} clause mutants survive")


# -------------------------------------------------------------------- operator mutants

Position = tuple[int, int]  # line, column


def annotation_spans(tree: ast.AST) -> list[tuple[Position, Position]]:
    """Returns where the type annotations start and end. Nothing evaluates them."""
    spans = []
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            note = getattr(node, field, None)
            if isinstance(note, ast.expr):
                end = (note.end_lineno or 0, note.end_col_offset or 0)
                spans.append(((note.lineno, note.col_offset), end))
    return spans


def prune(session: sqlite3.Connection) -> None:
    for file in ("minifreeze.py", "bench.py"):
        spans = annotation_spans(ast.parse((REPOSITORY / file).read_text()))
        mutants = session.execute(
            "SELECT job_id, definition_name, start_pos_row, start_pos_col"
            " FROM mutation_specs WHERE module_path = ?",
            (file,),
        ).fetchall()
        for job, function, line, column in mutants:
            place = (line, column)
            in_annotation = any(start <= place < end for start, end in spans)
            in_figures = file == "minifreeze.py" or function in BENCH_FIGURES
            if in_annotation or not in_figures:
                session.execute("DELETE FROM work_items WHERE job_id = ?", (job,))
                session.execute("DELETE FROM mutation_specs WHERE job_id = ?", (job,))
    counts = "SELECT module_path, count(*) FROM mutation_specs GROUP BY module_path"
    for file, count in session.execute(counts):
        print(f"{file}: {count} mutants")


def retry(session: sqlite3.Connection) -> None:
    session.execute("DELETE FROM work_results WHERE test_outcome != 'KILLED'")


def print_covering_tests(file: str, module: str, line: int) -> None:
    """Prints the tests that run a line, those that run the fewest lines first."""
    from coverage import CoverageData

    data = CoverageData(file)
    data.read()
    [source] = [name for name in data.measured_files() if Path(name).name == module]
    lines_of: dict[str, set[int]] = {}
    for number, contexts in data.contexts_by_lineno(source).items():
        for context in contexts:
            test = context.partition("|")[0].partition("[")[0]  # of all parameters
            lines_of.setdefault(test, set()).add(number)
    lines_of.pop("", None)  # what runs on import
    # Coverage counts a statement by its first line.
    covered = set().union(*lines_of.values())
    statement = max((start for start in covered if start <= line), default=0)
    for test in sorted(lines_of, key=lambda test: len(lines_of[test])):
        if statement in lines_of[test]:
            print(test)


# ---------------------------------------------------------------------- survivors.md


@dataclass(frozen=True)
class Survivor:
    """A row of survivors.md, but for its reason."""

    function: str
    line: str
    becomes: str


def changed_lines(diff: str) -> tuple[str, str]:
    """Returns the lines that a diff removes and adds, each side in one line."""
    sides: dict[str, list[str]] = {"-": [], "+": []}
    for line in diff.splitlines():
        is_header = line.startswith(("---", "+++"))
        if line[:1] in sides and not is_header:
            sides[line[0]].append(line[1:].strip())
    return " ".join(sides["-"]), " ".join(sides["+"])


def surviving(session: sqlite3.Connection) -> list[Survivor]:
    rows = session.execute(
        "SELECT definition_name, diff FROM work_results"
        " JOIN mutation_specs USING (job_id) WHERE test_outcome != 'KILLED'"
        " ORDER BY module_path DESC, start_pos_row"
    )
    survivors = []
    for function, diff in rows:
        survivor = Survivor(function or "(module)", *changed_lines(diff))
        if survivor not in survivors:
            survivors.append(survivor)
    return survivors


def cells(row: str) -> list[str]:
    """Splits a row of a table. A bar inside a cell is written as \\|."""
    parts = row.strip().strip("|").replace(r"\|", "\0").split("|")
    return [part.strip().replace("\0", "|") for part in parts]


def table_row(*texts: str) -> str:
    escaped = [text.replace("|", r"\|") for text in texts]
    return f"| {' | '.join(escaped)} |"


def known_reasons(text: str) -> dict[Survivor, str]:
    """Reads the reasons that people have written."""
    reasons = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            function, old, new, reason = cells(line)
            survivor = Survivor(function.strip("`"), old.strip("`"), new.strip("`"))
            reasons[survivor] = reason
    return reasons


def write_survivors(session: sqlite3.Connection) -> None:
    reasons = known_reasons(SURVIVORS.read_text())
    total, killed = session.execute(
        "SELECT count(*), sum(test_outcome = 'KILLED') FROM work_results"
    ).fetchone()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True)
    lines = [
        "# Mutants that survive",
        "",
        "`.ci/mutate` writes this table. The reasons are written by hand, and kept.",
        "",
        f"At commit {commit.strip()}, the tests noticed {killed:,} of {total:,}"
        f" operator mutants ({killed / total:.1%}). These survive:",
        "",
        table_row("function", "line", "becomes", "why no test can notice"),
        "|---|---|---|---|",
    ]
    without_reason = 0
    for survivor in surviving(session):
        reason = reasons.get(survivor, "")
        without_reason += not reason
        code = [f"`{survivor.function}`", f"`{survivor.line}`", f"`{survivor.becomes}`"]
        lines.append(table_row(*code, reason))
    SURVIVORS.write_text("\n".join(lines) + "\n")
    print(f"{SURVIVORS}: {without_reason} survivors have no reason yet")


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "check":
        check_clauses()
        return
    if command == "clauses":
        try_clauses()
        return
    if command == "covering":
        file, module, line = arguments
        print_covering_tests(file, module, int(line))
        return
    steps = {"prune": prune, "retry": retry, "survivors": write_survivors}
    with sqlite3.connect(arguments[0]) as session:
        steps[command](session)


if __name__ == "__main__":
    main()
