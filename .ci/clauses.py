# SPDX-License-Identifier: MIT
"""Mutants of meaning: each breaks one clause of what minifreeze.py promises.

.ci/mutate replaces `old`, which must occur exactly once in minifreeze.py, by `new`, and
expects test_minifreeze.py to fail.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clause:
    """A change of minifreeze.py. Its name says what becomes true."""

    name: str
    old: str
    new: str


PARTITION = [
    Clause(
        "the first matching pattern wins",
        """    selection = [patterns[0].startswith("!")] * len(names)
    for pattern in patterns:
""",
        """    selection = [patterns[0].startswith("!")] * len(names)
    for pattern in reversed(patterns):
""",
    ),
    Clause(
        "a list that starts with an exclusion starts from nothing",
        'selection = [patterns[0].startswith("!")] * len(names)',
        "selection = [False] * len(names)",
    ),
    Clause(
        "linear_1 also selects linear_10",
        'fnmatch.fnmatchcase(f"{name}/", f"{glob}/*")',
        'fnmatch.fnmatchcase(name, f"{glob}*")',
    ),
    Clause(
        "a pattern that matches nothing is accepted",
        "if not any(matches):",
        "if not matches:",
    ),
    Clause(
        "a selection of nothing is accepted",
        "if selection and not any(selection):",
        "if not selection and any(selection):",
    ),
    Clause(
        "a predicate may return anything",
        "if not isinstance(answer, (bool, np.bool_)):",
        "if not isinstance(answer, object):",
    ),
    Clause(
        "a tree of bools may have another structure",
        "if treedef != jax.tree.structure(tree):",
        "if len(entries) != len(jax.tree.leaves(tree)):",
    ),
]

MERGE = [
    Clause(
        "the first part wins",
        "if len(leaves) > 1 or (not leaves and not partial):",
        "if not leaves and not partial:",
    ),
    Clause(
        "a lost leaf stays a hole",
        "if len(leaves) > 1 or (not leaves and not partial):",
        "if len(leaves) > 1:",
    ),
    Clause(
        "a partial merge accepts an overlap",
        "if len(leaves) > 1 or (not leaves and not partial):",
        "if len(leaves) != 1 and not partial:",
    ),
    Clause(
        "the parts may have other containers",
        "if any(treedef != treedefs[0] for treedef in treedefs):",
        "if any(len(column) != len(columns[0]) for column in columns):",
    ),
    Clause(
        "a hole of another copy of the module is a leaf",
        'if type(node).__name__ == "Hole" and is_dataclass(node) and not fields(node):',
        "if node is NotImplemented:",
    ),
]

WARM_START = [
    Clause(
        "a leaf of new without a value in old keeps its own",
        "without_value.append(name)",
        "leaves.append(node)",
    ),
    Clause(
        "a leaf of old without a place in new is dropped",
        "if not _is_hole(node) and not expected:",
        "if _is_hole(node) and not expected:",
    ),
    Clause(
        "a fresh leaf takes the value in old, if there is one",
        "elif name in fresh_names or _is_hole(old_nodes[name]):",
        "elif name not in old_nodes or _is_hole(old_nodes[name]):",
    ),
    Clause(
        "a hole in old replaces a leaf of new",
        "elif name in fresh_names or _is_hole(old_nodes[name]):",
        "elif name in fresh_names:",
    ),
    Clause(
        "dtypes may differ",
        "if str(wanted) != str(found):",
        "if wanted.shape != found.shape:",
    ),
    Clause(
        "shapes may differ",
        "if str(wanted) != str(found):",
        "if wanted.dtype != found.dtype:",
    ),
    Clause(
        "of two leaves with one name, the last one counts",
        "if name in nodes:",
        "if name in ():",
    ),
]

HOIST = [
    Clause(
        "no control flow is hoisted",
        "if operation.has_effect or not late.isdisjoint(operation.inputs):",
        """if (
            operation.has_effect
            or not late.isdisjoint(operation.inputs)
            or operation.costly.intersection({"scan", "while", "cond"})
        ):""",
    ),
    Clause(
        "no custom gradient is hoisted",
        "if operation.has_effect or not late.isdisjoint(operation.inputs):",
        """if (
            operation.has_effect
            or not late.isdisjoint(operation.inputs)
            or any("custom_vjp" in name for name in operation.costly)
        ):""",
    ),
    Clause(
        "an operation with an effect runs once",
        "if operation.has_effect or not late.isdisjoint(operation.inputs):",
        "if not late.isdisjoint(operation.inputs):",
    ),
    Clause(
        "ties go to the earlier value",
        'connect((value, "entry"), (value, "exit"), sizes[value])',
        'connect((value, "entry"), (value, "exit"), sizes[value] + value / 2**20)',
    ),
    Clause(
        "the fewest values are kept, not the fewest bytes",
        "sizes = [aval.size * aval.dtype.itemsize for aval in program.avals]",
        "sizes = [1 for aval in program.avals]",
    ),
    Clause(
        "the fewest elements are kept, not the fewest bytes",
        "sizes = [aval.size * aval.dtype.itemsize for aval in program.avals]",
        "sizes = [aval.size for aval in program.avals]",
    ),
    Clause(
        "nothing is rebuilt",
        "if early_inputs and costly:",
        "if early_inputs:",
    ),
    Clause(
        "costly results are rebuilt",
        "costly = operation.costly or not costly_weights.isdisjoint(operation.inputs)",
        "costly = not costly_weights.isdisjoint(operation.inputs)",
    ),
    Clause(
        "costly results of weights are rebuilt",
        "costly = operation.costly or not costly_weights.isdisjoint(operation.inputs)",
        "costly = operation.costly",
    ),
    Clause(
        "the flow is greedy: it is never sent back",
        "capacity[head][tail] += flow",
        "capacity[head][tail] += 0",
    ),
    Clause(
        "a useless hoist is silent if it moves a reduction",
        "if not operation.costly.issubset(_REDUCTIONS):",
        "if operation.costly:",
    ),
    Clause(
        "weak types may differ",
        "def _require_same(\n    expected: Mapping[str, PyTree], given: Mapping[str, "
        "PyTree], weak_types: bool = True\n",
        "def _require_same(\n    expected: Mapping[str, PyTree], given: Mapping[str, "
        "PyTree], weak_types: bool = False\n",
    ),
]

CLAUSES = PARTITION + MERGE + WARM_START + HOIST
