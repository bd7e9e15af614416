# SPDX-License-Identifier: MIT
"""The README is true: its programs run, its links resolve, its tables are current."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import readme

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
PEER_TESTS = REPOSITORY / ".ci" / "tests" / "test_peers.py"


def all_documents() -> list[Path]:
    return [README, *sorted((REPOSITORY / ".github").glob("*.md"))]


# ---------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Block:
    """A Python block of the README, and the output that the README shows below it."""

    line: int
    code: str
    output: str


def python_blocks(text: str) -> list[Block]:
    """Finds the Python blocks. Output is a `text` block right below one."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?"
    blocks = []
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 2
        blocks.append(Block(line, match[1], match[2] or ""))
    return blocks


def sections(text: str) -> dict[str, str]:
    """Cuts a document at its second-level headings."""
    found = {}
    for section in re.split(r"^## ", f"## the top\n{text}", flags=re.MULTILINE):
        title, _, below = section.partition("\n")
        if title:
            found[title] = below
    return found


def sections_with_programs() -> list[Any]:
    found = []
    for title, below in sections(README.read_text()).items():
        blocks = python_blocks(below)
        if blocks:
            found.append(pytest.param(blocks, id=title))
    return found


@pytest.mark.parametrize("blocks", sections_with_programs())
def test_programs_print_what_the_readme_shows(
    blocks: list[Block], capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of one section are one program."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block.code, f"README.md:{block.line}", "exec"), namespace)
        assert capsys.readouterr().out == block.output


def test_the_commands_to_set_up_and_to_test_are_in_the_readme() -> None:
    shell = re.findall(r"^```sh\n(.*?)^```$", README.read_text(), re.DOTALL | re.M)
    commands = "\n".join(shell).splitlines()
    assert "pip install uv" in commands
    assert "uv run minifreeze.py" in commands
    assert "uv run test_minifreeze.py" in commands


# ------------------------------------------------------------------------------- links


def prose(text: str) -> str:
    """Returns a document without its code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(document: Path) -> set[str]:
    """Returns the anchors that GitHub makes of a document's headings."""
    found = set()
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.M)
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        found.add(slug)
    return found


def problem_of(link: str, document: Path) -> str | None:
    """Says why a relative link in a document leads nowhere, if it does."""
    path, _, fragment = link.partition("#")
    target = document.parent / path if path else document
    if not target.exists():
        return "no such file"
    line = re.fullmatch(r"L(\d+)", fragment)
    if line is not None:
        num_lines = len(target.read_text().splitlines())
        return None if int(line[1]) <= num_lines else "no such line"
    if fragment and fragment not in anchors(target):
        return "no such heading"
    return None


@pytest.mark.parametrize("document", all_documents(), ids=lambda path: path.name)
def test_relative_links_resolve(document: Path) -> None:
    links = re.findall(r'\]\(([^()\s]+)(?: "[^"]*")?\)', prose(document.read_text()))
    problems = {}
    for link in links:
        if not link.startswith("https://"):
            problem = problem_of(link, document)
            if problem is not None:
                problems[link] = problem
    assert problems == {}


def test_the_readme_links_to_the_test_of_every_pitfall() -> None:
    linked = re.findall(r'"(test_pitfall_\w+)"\)', README.read_text())
    tests = re.findall(r"^def (test_pitfall_\w+)", PEER_TESTS.read_text(), re.MULTILINE)
    assert sorted(linked) == sorted(tests)


# ------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("document", readme.DOCUMENTS)
def test_tables_are_those_of_the_committed_results(document: str) -> None:
    path = REPOSITORY / document
    assert readme.filled(path) == path.read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.4, "1,234"),
        (24.31, "24.3"),
        (9.1, "9.10"),
        (0.27, "0.270"),
        (0.0004, "< 0.001"),
        (0, "0.000"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert readme.three_digits(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(4.44, "4.4x"), (1, "1.0x"), (90.4, "90x"), (None, "–")]
)
def test_speed_up(value: float | None, text: str) -> None:
    row = {"method": "partition", "speedup": value, "differs": True}
    assert readme.speed_up(row) == text


def test_a_speed_up_inside_the_spread_is_no_difference() -> None:
    row = {"method": "partition", "speedup": 1.1, "differs": False}
    assert readme.speed_up(row) == "no difference"


def test_a_table_is_written_in_the_place_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "table": "methods",
        "problem": "deep",
        "clip": False,
        "optimizer": "sgd",
        "method": "everything",
        "step_s": 0.0243,
        "spread_s": 0.0003,
        "speedup": 1.0,
        "differs": True,
        "memory_bytes": 80_000_000,
    }
    faster = {**row, "method": "partition", "step_s": 0.0055, "speedup": 4.42}
    run = {"complete": True, "card": {}, "rows": [row, faster]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    document = tmp_path / "README.md"
    marks = "<!-- methods file=run problem=deep -->\nold\n<!-- /methods -->"
    document.write_text(f"before\n{marks}\nafter\n")
    assert (
        readme.filled(document)
        == """\
before
<!-- methods file=run problem=deep -->

| method | ms per step | ± ms | speed-up | memory, MB |
| --- | ---: | ---: | ---: | ---: |
| everything | 24.3 | 0.300 | 1.0x | 80.0 |
| `partition` | 5.50 | 0.300 | 4.4x | 80.0 |

<!-- /methods -->
after
"""
    )


def test_a_table_that_is_marked_wrongly_is_an_error(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("<!-- methods -->\n<!-- /prefix -->\n")
    with pytest.raises(SystemExit, match="methods"):
        readme.filled(document)


def test_a_link_to_a_test_gets_the_line_of_its_function(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import os\n\n\ndef test_b() -> None: ...\n")
    document = tmp_path / "README.md"
    document.write_text('[test](test_a.py#L1 "test_b")')
    assert readme.filled(document) == '[test](test_a.py#L4 "test_b")'


def test_a_link_to_a_test_that_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_b() -> None: ...\n")
    document = tmp_path / "README.md"
    document.write_text('[test](test_a.py#L1 "test_c")')
    with pytest.raises(SystemExit, match="test_c"):
        readme.filled(document)


def test_all_cpu_results_are_of_one_machine_and_one_commit() -> None:
    """The README says so, because it gives the hardware only once."""
    files = sorted((REPOSITORY / ".github").glob("bench*-cpu*.json"))
    assert len(files) == 4
    cards = [json.loads(file.read_text())["card"] for file in files]
    for card in cards:
        assert card["clean"]
        for key in ("cpu", "commit", "date", "jax", "python", "dtype"):
            assert card[key] == cards[0][key], key
