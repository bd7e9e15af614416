# SPDX-License-Identifier: MIT
"""Runs every recipe of .github/recipes.md as a reader would: pasted alone."""

from __future__ import annotations

import contextlib
import dis
import inspect
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import jax
import pytest

TOP = Path(__file__).resolve().parents[2]
RECIPES = TOP / ".github" / "recipes.md"
MAX_LINES = 40
MAX_COLUMNS = 88


# A block of Python, and a block of text right below it.
PROGRAM = re.compile(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Recipe:
    """One question of recipes.md, with its answer."""

    heading: str
    introduction: str  # the sentences above the program
    code: str  # empty if there is no program
    output: str  # what the program prints, according to the document
    num_programs: int


def read_recipes(text: str) -> list[Recipe]:
    """Splits the document at its third-level headings."""
    recipes = []
    for section in re.split(r"^(?=#{2,3} )", text, flags=re.MULTILINE):
        if not section.startswith("### "):
            continue
        heading, _, body = section.partition("\n")
        introduction, *rest = PROGRAM.split(body)
        code, output = rest[:2] if rest else ("", "")
        recipes.append(
            Recipe(
                heading=heading.removeprefix("### "),
                introduction=introduction.strip(),
                code=code,
                output=output or "",
                num_programs=len(PROGRAM.findall(body)),
            )
        )
    return recipes


ALL_RECIPES = read_recipes(RECIPES.read_text())


def by_heading(recipe: Recipe) -> str:
    return recipe.heading


each_recipe = pytest.mark.parametrize("recipe", ALL_RECIPES, ids=by_heading)


@each_recipe
def test_a_recipe_is_a_question_sentences_and_one_short_program(
    recipe: Recipe,
) -> None:
    assert recipe.heading.endswith("?")
    assert recipe.introduction.endswith(".")
    assert recipe.num_programs == 1

    lines = [line for line in recipe.code.splitlines() if line.strip()]
    assert len(lines) <= MAX_LINES
    assert max(len(line) for line in lines) <= MAX_COLUMNS


@each_recipe
def test_a_recipe_prints_what_it_says(recipe: Recipe) -> None:
    code = compile(recipe.code, recipe.heading, "exec", dont_inherit=True)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)

    assert printed.getvalue() == recipe.output
    assert closed_over_arrays(namespace) == []


def closed_over_arrays(namespace: dict[str, Any]) -> list[str]:
    """Lists the arrays that a recipe's functions read without being passed them.

    In a jitted function, such an array becomes a constant of the compiled program:
    compilation is slow, and a new value of the name is ignored. The functions that are
    not jitted themselves are checked too, because jitted ones call them.
    """
    found = []
    for name, value in namespace.items():
        function = inspect.unwrap(value) if callable(value) else value
        if not isinstance(function, FunctionType):
            continue
        if function.__globals__ is not namespace:  # imported
            continue
        for array in global_arrays(function, namespace):
            found.append(f"{name} reads {array}")
    return found


def global_arrays(function: FunctionType, namespace: dict[str, Any]) -> list[str]:
    """Lists the global arrays, and trees of arrays, that a function reads."""
    arrays = []
    for name in sorted(globals_read(function.__code__)):
        leaves = jax.tree.leaves(namespace.get(name))
        if any(isinstance(leaf, jax.Array) for leaf in leaves):
            arrays.append(name)
    return arrays


def globals_read(code: CodeType) -> set[str]:
    """Returns the global names that a function reads, also in its inner functions."""
    names = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            names.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= globals_read(constant)
    return names


def test_closed_over_arrays_are_found() -> None:
    source = """
import jax
import jax.numpy as jnp

frozen = {"w": jnp.ones(3)}

def loss(w, x):
    return (w * frozen["w"] * x).sum()

grad_fn = jax.jit(jax.grad(loss))

@jax.jit
def step(w, x):
    return w - jax.grad(lambda w: (w * frozen["w"] * x).sum())(w)

@jax.jit
def good_step(w, frozen, x):
    return w * frozen["w"] * x
"""
    namespace: dict[str, Any] = {}
    exec(source, namespace)

    assert closed_over_arrays(namespace) == [
        "loss reads frozen",
        "grad_fn reads frozen",
        "step reads frozen",
    ]


sharded_recipes = [recipe for recipe in ALL_RECIPES if "sharding" in recipe.code]


@pytest.mark.parametrize("recipe", sharded_recipes, ids=by_heading)
def test_a_recipe_for_many_devices_runs_on_four(recipe: Recipe) -> None:
    four_devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    result = subprocess.run(
        [sys.executable, "-c", recipe.code],
        env={**os.environ, "PYTHONPATH": str(TOP), **four_devices},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout == recipe.output


def test_recipes_for_many_devices_exist() -> None:
    assert len(sharded_recipes) >= 2


# The index


def test_the_index_links_every_recipe_once_and_in_order() -> None:
    links = re.findall(r"^\| \[(.+?)\]\(#(.+?)\)", RECIPES.read_text(), re.MULTILINE)

    expected = [(recipe.heading, anchor(recipe.heading)) for recipe in ALL_RECIPES]
    assert links == expected


def anchor(heading: str) -> str:
    """Returns the fragment that GitHub makes of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.replace(" ", "-")
