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
        "    for pattern in patterns:\n        excludes",
        "    for pattern in reversed(patterns):\n        excludes",
    ),
    Clause(
        "a list that starts with an exclusion starts from nothing",
        'starts_selected = patterns[0].startswith("!")',
        "starts_selected = False",
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
        "if not _same_structure(bools, tree):",
        "if len(entries) != len(_names(tree)):",
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
        "if same_name and is_dataclass(node) and not fields(node):",
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
        "if not _is_hole(node) and name not in new_nodes and name not in unused_names:",
        "if _is_hole(node) and name not in new_nodes and name not in unused_names:",
    ),
    Clause(
        "a fresh leaf takes the value in old, if there is one",
        "if name in fresh_names:",
        "if name in fresh_names and name not in old_nodes:",
    ),
    Clause(
        "a hole in old replaces a leaf of new",
        "elif _is_hole(old_nodes[name]):",
        "elif name is old_nodes[name]:",
    ),
    Clause(
        "dtypes may differ",
        "if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):",
        "if wanted.shape != found.shape:",
    ),
    Clause(
        "shapes may differ",
        "if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):",
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
        "has_effect=bool(eqn.effects),",
        'has_effect=eqn.effects or eqn.primitive.name in ("scan", "while", "cond"),',
    ),
    Clause(
        "no custom gradient is hoisted",
        "has_effect=bool(eqn.effects),",
        'has_effect=eqn.effects or "custom_vjp" in eqn.primitive.name,',
    ),
    Clause(
        "an operation with an effect runs once",
        "if operation.has_effect or not late",
        "if not late",
    ),
    Clause(
        "ties go to the earlier value",
        "sizes = [aval.size * aval.dtype.itemsize for aval in program.avals]",
        """sizes = [
            aval.size * aval.dtype.itemsize + value_id / 2**20
            for value_id, aval in enumerate(program.avals)
        ]""",
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
        "            if is_costly:\n",
        "            if True:\n",
    ),
    Clause(
        "costly results are rebuilt",
        "is_costly = operation.cost is not _Cost.CHEAP or reads_costly_fixed",
        "is_costly = reads_costly_fixed",
    ),
    Clause(
        "costly results of weights alone are rebuilt",
        "is_costly = operation.cost is not _Cost.CHEAP or reads_costly_fixed",
        "is_costly = operation.cost is not _Cost.CHEAP",
    ),
    Clause(
        "outputs that only the batch makes are forgotten",
        "early.intersection(program.outputs)",
        "early.intersection(program.inputs)",
    ),
    Clause(
        "the flow is greedy: it is never sent back",
        "residual[head][tail] += flow",
        "residual[head][tail] += 0",
    ),
    Clause(
        "a useless hoist is silent if it moves a reduction",
        "if any(operation.cost is _Cost.HEAVY for",
        "if any(operation.cost is not _Cost.CHEAP for",
    ),
    Clause(
        "weak types may differ",
        'weak = "weak " if weak_types and leaf.weak_type else ""',
        'weak = ""',
    ),
]

CLAUSES = PARTITION + MERGE + WARM_START + HOIST
