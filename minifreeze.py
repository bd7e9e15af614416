# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.5.1", "numpy"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the minifreeze authors
"""minifreeze: freeze part of any JAX model.

Split the parameters into two trees, differentiate a loss with respect to the first
one, and merge the trees wherever you need the whole model:

    trainable, frozen = partition("head", params)
    loss, grads = jax.value_and_grad(my_loss)(trainable, frozen, x, y)
    params = merge(trainable, frozen)  # in my_loss, and after training

If batches repeat, compute the frozen part of the model once per batch:

    once, rest = hoist(my_loss, trainable, frozen, x, y)
    kept = jax.jit(once)(frozen, x, y)
    loss, grads = jax.value_and_grad(rest)(trainable, frozen, kept)

The functions work on any pytree, keep no state, and donate nothing. The upper half of
this file is the tool. The lower half, below the banner, is a worked example that you
can delete.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import all_leaves, keystr, register_dataclass, tree_flatten_with_path

__all__ = ["Hole", "partition", "mask", "merge", "summary", "warm_start", "hoist"]
__version__ = "0.3.0"

Fn: TypeAlias = Callable[..., Any]
T = TypeVar("T")
PyTree: TypeAlias = Any
KeyPath: TypeAlias = tuple[Any, ...]
Predicate: TypeAlias = Callable[[KeyPath, Any], bool]
Where: TypeAlias = str | Sequence[str] | Predicate | PyTree  # see partition


# ---------------------------------------------------------------------- holes and names


@register_dataclass
@dataclass(frozen=True)
class Hole:
    """Marks the place of a leaf that is in another part.

    A hole is a pytree node without children. Gradients, optimizer states and ``jit``
    therefore pass over it.
    """


def _is_hole(node: Any) -> bool:
    """Returns whether a node is a hole; refuses a hole of another copy of this file."""
    if isinstance(node, Hole):
        return True
    if type(node).__name__ == "Hole" and is_dataclass(node) and not fields(node):
        raise ValueError(
            "the tree holds a Hole of another copy of minifreeze (imported twice, or "
            f"reloaded, as {type(node).__module__}): split and merge with the same copy"
        )
    return False


def _name(path: KeyPath) -> str:
    """Returns a key path as text, such as ``linear_0/w``."""
    return keystr(path, simple=True, separator="/")


def _names(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Returns the name of every leaf, in tree order."""
    return [_name(path) for path, _ in tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]


def _listing(items: Iterable[str]) -> str:
    """Joins at most ten items for a message, and counts them if there are more."""
    items = list(items)
    if len(items) > 10:
        return f"{', '.join(items[:10])}, ... ({len(items)} in all)"
    return ", ".join(items) or "nothing"


@dataclass(frozen=True)
class _Spec:
    """Describes a leaf."""

    shape: str  # such as "(2, 3)"; "-" for a leaf that is not an array
    dtype: str  # the type's name for a leaf that is not an array
    count: int  # elements
    bytes: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def _spec(leaf: Any) -> _Spec:
    """Describes an array, an abstract array, a Python number, or any other leaf."""
    if type(leaf) in (bool, int, float, complex):
        leaf = np.empty((), jnp.result_type(leaf))
    # A class such as np.float32 has the attributes, too, but is not an array.
    is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    if isinstance(leaf, type) or not is_array:
        return _Spec("-", type(leaf).__name__, 0, 0)
    shape = tuple(int(size) for size in leaf.shape)
    count = math.prod(shape)
    return _Spec(str(shape), str(leaf.dtype), count, count * leaf.dtype.itemsize)


def partition(where: Where, tree: T) -> tuple[T, T]:
    """Splits a tree into the leaves that ``where`` selects and all other leaves.

    Both results have the structure of ``tree``, with a ``Hole`` in place of every leaf
    that is in the other one. The leaves are shared, not copied.

    Args:
      where: Selects leaves. One of:

        * A glob pattern over leaf names, such as ``"head"`` or ``"blocks/*/bias"``. A
          name joins the keys of a leaf's path with ``/``; ``print(summary(tree=tree))``
          lists all names. A pattern selects a leaf if it matches the whole name, or
          the whole name of a container above the leaf: ``"head"`` selects ``head/w``
          but not ``head2/w``. As in ``fnmatch``, ``*`` also matches ``/``.
        * A list or tuple of patterns. The last pattern that matches a leaf decides. A
          pattern that starts with ``!`` excludes. If the first pattern does so, the
          list starts from all leaves.
        * A predicate ``(path, leaf) -> bool``, where ``path`` is JAX's key path.
        * A tree of bools with the structure of ``tree``, such as ``mask`` returns.
      tree: Any pytree.

    Returns:
      A tuple ``(selected, others)``.

    Raises:
      ValueError: If a pattern matches no leaf, if ``where`` selects no leaf, or if a
        tree of bools has another structure than ``tree``.
      TypeError: If ``where`` is of another type, or if a predicate does not return a
        bool.

    >>> partition("a/*", {"a": {"w": 1, "b": 2}, "c": 3})
    ({'a': {'b': 2, 'w': 1}, 'c': Hole()}, {'a': {'b': Hole(), 'w': Hole()}, 'c': 3})
    """
    leaves, treedef = jax.tree.flatten(tree)
    selection = _select_some(where, tree)
    hole = Hole()
    selected = [leaf if chosen else hole for chosen, leaf in zip(selection, leaves)]
    others = [hole if chosen else leaf for chosen, leaf in zip(selection, leaves)]
    return jax.tree.unflatten(treedef, selected), jax.tree.unflatten(treedef, others)


def mask(where: Where, tree: PyTree) -> PyTree:
    """Returns the selection of ``partition(where, tree)`` as a tree of bools.

    Use it for libraries that expect a mask, such as optax and Equinox. The arguments
    and errors are those of ``partition``.

    >>> mask("*/b", {"a": {"w": 1, "b": 2}, "c": 3})
    {'a': {'b': True, 'w': False}, 'c': False}
    """
    return jax.tree.unflatten(jax.tree.structure(tree), _select_some(where, tree))


def _select_some(where: Where, tree: PyTree) -> list[bool]:
    """Returns what ``_select`` returns, and refuses to select nothing."""
    selection = _select(where, tree)
    if isinstance(where, (list, tuple)) and not where:
        raise ValueError("where is an empty list of patterns, which selects nothing")
    if selection and not any(selection):
        names = [repr(name) for name in _names(tree)]
        raise ValueError(f"where selects none of the leaves {_listing(names)}")
    return selection


def _select(where: Where, tree: PyTree) -> list[bool]:
    """Returns, for each leaf in tree order, whether ``where`` selects it."""
    if isinstance(where, str):
        return _select_by_patterns([where], tree)
    if isinstance(where, (list, tuple)):
        if not where:
            return [False] * len(jax.tree.leaves(tree))
        if any(isinstance(item, str) for item in where):
            return _select_by_patterns(where, tree)
    # A model can be callable, too, but it is a container. A predicate is a leaf.
    if callable(where) and all_leaves([where]):
        return _select_by_predicate(where, tree)
    return _select_by_bools(where, tree)


def _select_by_patterns(patterns: Sequence[str], tree: PyTree) -> list[bool]:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be a string, but one is {pattern!r}")
    names = _names(tree)
    selection = [patterns[0].startswith("!")] * len(names)
    for pattern in patterns:
        excludes = pattern.startswith("!")
        glob = pattern.removeprefix("!")
        matches = [_matches(glob, name) for name in names]
        if not any(matches):
            raise ValueError(_no_match_error(pattern, glob, tree))
        for index, matched in enumerate(matches):
            if matched:
                selection[index] = not excludes
    return selection


def _matches(glob: str, name: str) -> bool:
    """Returns whether a glob matches a name, or the name of a container above it."""
    # Because * also matches /, "glob/*" matches "name/" in exactly these two cases.
    return glob != "" and fnmatch.fnmatchcase(f"{name}/", f"{glob}/*")


def _no_match_error(pattern: str, glob: str, tree: PyTree) -> str:
    """Describes a pattern without matches."""
    names = _names(tree)
    for name, leaf in zip(names, jax.tree.leaves(tree)):
        if glob.startswith(f"{name}/"):
            return (
                f"pattern {pattern!r} matches no leaf: {name!r} is a single leaf "
                f"({_spec(leaf)}), which a pattern cannot split"
            )
    nearest = difflib.get_close_matches(glob, names, n=10, cutoff=0)
    return (
        f"pattern {pattern!r} matches none of the {len(names)} leaves; "
        f"the nearest names are {_listing(map(repr, nearest))}"
    )


def _select_by_predicate(predicate: Predicate, tree: PyTree) -> list[bool]:
    entries = tree_flatten_with_path(tree)[0]
    selection = []
    for path, leaf in entries:
        answer = predicate(path, leaf)
        if not isinstance(answer, (bool, np.bool_)):
            raise TypeError(
                f"the predicate must return a bool, but returned "
                f"{type(answer).__name__} for the leaf {_name(path)!r}"
            )
        selection.append(bool(answer))
    return selection


def _select_by_bools(bools: PyTree, tree: PyTree) -> list[bool]:
    expected = (
        "where must be a pattern, a list of patterns, a predicate or a tree of bools"
    )
    if bools is None:
        raise TypeError(f"{expected}, not None")
    entries = tree_flatten_with_path(bools)[0]
    for path, leaf in entries:
        if not isinstance(leaf, (bool, np.bool_)):
            place = f" at {_name(path)!r}" if path else ""
            raise TypeError(f"{expected}, but is {type(leaf).__name__}{place}")
    treedef: Any = jax.tree.structure(bools)
    if treedef != jax.tree.structure(tree):
        raise ValueError(_structure_error({"where": bools, "the tree": tree}))
    return [bool(leaf) for _, leaf in entries]


def _structure_error(
    trees: Mapping[str, PyTree], is_leaf: Callable[[Any], bool] | None = None
) -> str:
    """Describes how the structures of labelled trees differ."""
    names = {label: set(_names(tree, is_leaf)) for label, tree in trees.items()}
    problems = []
    for name in sorted(set().union(*names.values())):
        for label in trees:
            if name not in names[label]:
                problems.append(f"{name!r} is missing from {label}")
    if not problems:  # The same names in other containers: show where these differ.
        texts = [str(jax.tree.structure(tree, is_leaf)) for tree in trees.values()]
        differs = [len(set(characters)) > 1 for characters in zip(*texts)]
        start = max(0, differs.index(True) - 20) if any(differs) else 0
        for label, text in zip(trees, texts):
            problems.append(f"{label} is ..{text[start : start + 80]}..")
    return f"the structures differ: {_listing(problems)}"


# --------------------------------------------------------------------- merge and report


def merge(*parts: T, partial: bool = False) -> T:
    """Merges parts of one tree. This is the inverse of ``partition``.

    Args:
      *parts: Trees of one structure, in any order and of any number. Every leaf must be
        in exactly one of them, with a ``Hole`` in its place in the others.
      partial: If True, a place that is a hole in every part stays a hole. Use it to
        merge some of the parts of a tree that was split more than once.

    Returns:
      The merged tree. The leaves are shared, not copied.

    Raises:
      ValueError: If a leaf is in several parts, if it is in none and ``partial`` is
        False, or if the parts differ in structure. The message lists the names.
      TypeError: If there are no parts.

    >>> merge({"a": Hole(), "b": 2}, {"a": 1, "b": Hole()})
    {'a': 1, 'b': 2}
    """
    if not parts:
        raise TypeError("merge needs at least one part")
    labelled = {f"part {index}": part for index, part in enumerate(parts)}
    rows, treedef = _align(labelled)
    merged = []
    for nodes in rows:
        leaves = [node for node in nodes if not isinstance(node, Hole)]
        if len(leaves) > 1 or (not leaves and not partial):
            raise ValueError(_merge_error(labelled, partial))
        merged.append(leaves[0] if leaves else Hole())
    result: T = jax.tree.unflatten(treedef, merged)
    return result


def _align(parts: Mapping[str, PyTree]) -> tuple[list[tuple[Any, ...]], Any]:
    """Lines up parts of one tree.

    Returns:
      For each place in the tree, the leaf or hole of every part; and the structure.
    """
    columns = []
    treedefs: list[Any] = []
    for part in parts.values():
        nodes, treedef = jax.tree.flatten(part, is_leaf=_is_hole)
        columns.append(nodes)
        treedefs.append(treedef)
    if any(treedef != treedefs[0] for treedef in treedefs):
        raise ValueError(_structure_error(parts, is_leaf=_is_hole))
    return list(zip(*columns)), treedefs[0]


def _merge_error(parts: Mapping[str, PyTree], partial: bool) -> str:
    """Describes the lost and overlapping leaves of parts of one tree."""
    rows, _ = _align(parts)
    first_part = next(iter(parts.values()))
    lost, overlaps = [], []
    for name, nodes in zip(_names(first_part, is_leaf=_is_hole), rows):
        holders = [label for label, node in zip(parts, nodes) if not _is_hole(node)]
        if not holders:
            lost.append(repr(name))
        elif len(holders) > 1:
            overlaps.append(f"{name!r} is in {_listing(holders)}")
    problems = []
    if lost and not partial:
        problems.append(
            "pass the part that holds the lost leaves, or partial=True to leave holes: "
            f"{_listing(parts)} have a hole at {_listing(lost)}"
        )
    if overlaps:
        problems.append(f"leaves overlap: {_listing(overlaps)}")
    return "; ".join(problems)


def summary(**parts: PyTree) -> str:
    """Returns a table of all leaves, and the size of each part.

    Args:
      **parts: The whole tree, as in ``summary(params=params)``, or parts of one tree.
        The keywords are the names of the parts in the table.

    Returns:
      A text with a row for each leaf, in tree order, and a row for each part. ``count``
      is the number of elements, and ``share`` is the share of all elements. A leaf that
      is not an array counts as 0 elements. Abstract arrays count as arrays.

    Raises:
      ValueError: If a leaf is in several parts, if the parts differ in structure, or if
        a part is called ``total``.
      TypeError: If there are no parts.

    >>> head = {"w": jnp.ones((2, 3)), "b": Hole()}
    >>> print(summary(head=head, body={"w": Hole(), "b": 1.0}))
    path  shape   dtype    count  part
    b     ()      float32  1      body
    w     (2, 3)  float32  6      head
    <BLANKLINE>
    part   count  bytes  share
    head   6      24     85.7%
    body   1      4      14.3%
    total  7      28     100.0%
    """
    if not parts:
        raise TypeError("summary needs at least one part, as in summary(params=params)")
    if "total" in parts:
        raise ValueError("a part cannot be called total: the last row has that name")
    rows, _ = _align(parts)
    first_part = next(iter(parts.values()))
    leaf_rows: list[Sequence[Any]] = [("path", "shape", "dtype", "count", "part")]
    counts = dict.fromkeys(parts, 0)
    sizes = dict.fromkeys(parts, 0)  # bytes
    for name, nodes in zip(_names(first_part, is_leaf=_is_hole), rows):
        if sum(not _is_hole(node) for node in nodes) > 1:
            raise ValueError(_merge_error(parts, partial=True))
        for part, node in zip(parts, nodes):
            if not _is_hole(node):
                spec = _spec(node)
                leaf_rows.append((name, spec.shape, spec.dtype, spec.count, part))
                counts[part] += spec.count
                sizes[part] += spec.bytes

    total = sum(counts.values())
    part_rows: list[Sequence[Any]] = [("part", "count", "bytes", "share")]
    for part, count in counts.items():
        part_rows.append((part, count, sizes[part], f"{count / max(total, 1):.1%}"))
    whole = total / max(total, 1)
    part_rows.append(("total", total, sum(sizes.values()), f"{whole:.1%}"))
    return f"{_table(leaf_rows)}\n\n{_table(part_rows)}"


def _table(rows: Sequence[Sequence[Any]]) -> str:
    """Aligns rows of cells in columns, two spaces apart."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [str(cell).ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def warm_start(new: T, old: PyTree, *, fresh: Where = (), unused: Where = ()) -> T:
    """Fills a tree with the leaves of another one, and accounts for every leaf.

    Use it to load a checkpoint, and to change the frozen set: with
    ``warm_start(optimizer.init(trainable), old_state)``, leaves that stay trainable
    keep their moments.

    Leaves are matched by name, such as ``linear_0/w``. The containers may therefore
    differ: nested or flat dicts, lists or dicts with the keys ``"0"``, ``"1"``, ...

    * A leaf that ``fresh`` selects keeps its value from ``new``.
    * Every other leaf of ``new`` takes the leaf of the same name in ``old``. If
      ``old`` has a ``Hole`` there (the leaf was frozen), it keeps its value.
    * A leaf of ``old`` that fills nothing must be at a ``Hole`` of ``new`` (the leaf
      is now frozen), or be selected by ``fresh`` or ``unused``.

    Args:
      new: The tree to fill.
      old: The tree to take leaves from.
      fresh: Selects leaves of ``new``, like ``where`` in ``partition``. It may also
        select nothing: ``()``.
      unused: Selects leaves of ``old`` in the same way.

    Returns:
      A tree with the structure of ``new``.

    Raises:
      ValueError: If a leaf of ``new`` has no value in ``old``, if a leaf of ``old``
        has no place in ``new``, if shapes or dtypes differ, if a name occurs twice in
        one tree, or if a pattern matches no leaf.
      TypeError: If ``fresh`` or ``unused`` is not a valid ``where``.

    Note: Adam's step count is taken from ``old`` like any other leaf, so new leaves get
    no bias correction. After 5,000 steps, their first update is 0.1 / sqrt(0.001) = 3.2
    learning rates. ``fresh="0/count"`` restarts the count.

    >>> warm_start({"a": 0, "b": 0, "c": Hole()}, {"a": 7, "b": Hole(), "c": 8})
    {'a': 7, 'b': 0, 'c': Hole()}
    >>> warm_start({"body": 0, "head": 0}, {"body": 7, "head": 7}, fresh="head")
    {'body': 7, 'head': 0}
    """
    new_nodes = _nodes_by_name(new, "new")
    old_nodes = _nodes_by_name(old, "old")
    fresh_names = _selected_names(fresh, new)
    unused_names = _selected_names(unused, old)

    leaves, without_value, without_place, unlike = [], [], [], []
    for name, node in new_nodes.items():
        if _is_hole(node):
            continue
        if name not in fresh_names and name not in old_nodes:
            without_value.append(name)
        elif name in fresh_names or _is_hole(old_nodes[name]):
            leaves.append(node)
        else:
            leaves.append(old_nodes[name])
            wanted, found = _spec(node), _spec(old_nodes[name])
            if str(wanted) != str(found):
                unlike.append(f"{name!r} is {wanted} in new and {found} in old")
    for name, node in old_nodes.items():
        expected = name in new_nodes or name in unused_names
        if not _is_hole(node) and not expected:
            without_place.append(name)

    problems = []
    if without_value:
        problems.append(
            f"old has no value for {_listing(map(repr, without_value))} "
            "(fresh selects leaves that keep their value from new)"
        )
        if not _names_of_none(old).isdisjoint(without_value):
            problems.append(
                "old has None in some of these places, as a checkpoint has for holes "
                "if it was restored without a target: select these leaves with fresh"
            )
    if without_place:
        problems.append(
            f"new has no place for {_listing(map(repr, without_place))} "
            "(unused selects leaves of old to leave out)"
        )
    if unlike:
        problems.append(f"shapes or dtypes differ: {_listing(unlike)}")
    if problems:
        raise ValueError("; ".join(problems))
    filled: T = jax.tree.unflatten(jax.tree.structure(new), leaves)
    return filled


def _nodes_by_name(tree: PyTree, label: str) -> dict[str, Any]:
    """Returns the leaves and holes of a tree by name, in tree order."""
    nodes: dict[str, Any] = {}
    for path, node in tree_flatten_with_path(tree, is_leaf=_is_hole)[0]:
        name = _name(path)
        if name in nodes:
            raise ValueError(f"two leaves of {label} have the name {name!r}")
        nodes[name] = node
    return nodes


def _selected_names(where: Where, tree: PyTree) -> set[str]:
    """Returns the names of the leaves that ``where`` selects, which may be none."""
    selection = _select(where, tree)
    return {name for name, chosen in zip(_names(tree), selection) if chosen}


def _names_of_none(tree: PyTree) -> set[str]:
    """Returns the names of all places that hold None."""
    entries = tree_flatten_with_path(tree, is_leaf=lambda node: node is None)[0]
    return {_name(path) for path, node in entries if node is None}


# -------------------------------------------------------------------------------- hoist


# Cheap primitives: running them costs about as much as reading their stored results.
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj cos cosh digamma div eq eq_to erf erf_inv erfc
    exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow
    is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mulhi ne neg
    nextafter not or polygamma population_count pow real reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan
    tanh xor zeta
""".split()
_CASTS_AND_MOVES = """
    bitcast_convert_type broadcast_in_dim concatenate convert_element_type copy
    dynamic_slice dynamic_update_slice gather iota pad reshape rev scatter slice
    split squeeze stack tile transpose unstack
""".split()
_IDENTITIES = """
    layout_constraint name optimization_barrier reshard sharding_constraint
    stop_gradient
""".split()
_RANDOM_BITS = """
    random_bits random_clone random_fold_in random_seed random_split random_unwrap
    random_wrap rng_bit_generator rng_uniform threefry2x32
""".split()
_REDUCTIONS = """
    argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod
    reduce_sum reduce_xor
""".split()
_CHEAP = frozenset(_ELEMENTWISE + _CASTS_AND_MOVES + _IDENTITIES + _RANDOM_BITS)


def hoist(fn: Fn, trainable: PyTree, frozen: PyTree, *batch: PyTree) -> tuple[Fn, Fn]:
    """Splits a function into a frozen part, computed once per batch, and the rest.

    ``rest(trainable, frozen, once(frozen, *batch))`` equals
    ``fn(trainable, frozen, *batch)``, and so does its gradient with respect to
    ``trainable``. If the same batches return every epoch, compute ``once`` in the first
    epoch only, and store what it returns.

    The values that ``once`` returns are a minimum cut. A value is late if it depends on
    a trainable leaf or comes from an operation with an effect. It is early if it
    depends on the batch and is not late. The late operations run in ``rest``. Every
    early value that they read, or that ``fn`` returns, is either kept by ``once``, or
    rebuilt in ``rest`` from kept values by cheap operations. ``hoist`` keeps the fewest
    bytes that make this possible, and, if several choices are equal, the latest values.

    Cheap operations are elementwise functions, casts, moves of data (slices, gathers,
    transposes, ...), random bits, and a ``jit`` or ``custom_jvp`` of cheap operations.
    All other operations are costly and never run again: products, convolutions,
    reductions, sorts, and operations that run a program of their own. The latter move
    as a whole or not at all: ``scan``, ``while_loop``, ``cond``, ``checkpoint``,
    ``custom_vjp``, ``shard_map``, and a ``jit`` with shardings.

    Values that depend on frozen leaves alone are never kept: ``rest`` computes them
    again. Costly results of the batch alone are kept, even if they are larger than the
    batch (``x @ x.T``). A long chain of cheap operations runs in every step.

    Args:
      fn: A function ``fn(trainable, frozen, *batch)`` of pytrees of arrays. ``hoist``
        traces it once.
      trainable: The part to differentiate. Pass random keys, counters and anything
        else that changes from step to step as a part of this argument:
        ``fn((params, key), frozen, x)``.
      frozen: The part that does not change.
      *batch: The data. Data that ``fn`` closes over count as frozen.

    Returns:
      A tuple ``(once, rest)`` of functions:

      * ``once(frozen, *batch)`` returns a tuple of arrays. Jit it, and look at the
        shapes: they are what you store per batch.
      * ``rest(trainable, frozen, kept)`` returns what ``fn`` returns.

      Both raise ValueError for another structure, shape, dtype or weak type than that
      of the arguments of ``hoist``.

    Raises:
      TypeError: If a leaf of an argument is not an array. Python numbers and
        ``jax.ShapeDtypeStruct`` are allowed.

    Warns:
      UserWarning: If ``hoist`` is useless, because ``once`` has no costly operation
        other than reductions.

    >>> head, body, x = jnp.ones(2), jnp.ones((3, 2)), jnp.ones((5, 3))
    >>> model = lambda head, body, x: jnp.tanh(x @ body) @ head
    >>> once, rest = hoist(model, head, body, x)
    >>> kept = jax.jit(once)(body, x)
    >>> [features.shape for features in kept], rest(head, body, kept).shape
    ([(5, 2)], (5,))
    """
    expected = _abstract({"trainable": trainable, "frozen": frozen, "batch": batch})
    # A new lambda, because JAX remembers what it traced, and fn may close over values
    # that have changed since.
    traced, out = jax.make_jaxpr(lambda *args: fn(*args), return_shape=True)(
        trainable, frozen, *batch
    )
    program = _flatten_jits(traced)
    numbers = jax.tree.unflatten(
        jax.tree.structure((trainable, frozen, batch)), program.inputs
    )
    trainable_values, frozen_values, batch_values = map(jax.tree.leaves, numbers)

    kept_values = _values_to_keep(program, trainable_values, batch_values)
    once_program = _subprogram(program, frozen_values + batch_values, kept_values)
    rest_program = _subprogram(
        program,
        trainable_values + frozen_values + kept_values,
        program.outputs,
        with_effects=True,
    )
    _warn_if_useless(once_program)

    def once(frozen: PyTree, *batch: PyTree) -> tuple[Array, ...]:
        _require_same(expected, {"frozen": frozen, "batch": batch})
        return tuple(_run(once_program, jax.tree.leaves((frozen, batch))))

    def rest(trainable: PyTree, frozen: PyTree, kept: tuple[Array, ...]) -> Any:
        _require_same(expected, {"trainable": trainable, "frozen": frozen})
        # Weak types get lost when arrays are stored, and have done their work.
        shapes = {"kept": tuple(program.avals[value] for value in kept_values)}
        _require_same(shapes, {"kept": kept}, weak_types=False)
        outputs = _run(rest_program, jax.tree.leaves((trainable, frozen, kept)))
        return jax.tree.unflatten(jax.tree.structure(out), outputs)

    return once, rest


def _abstract(tree: PyTree) -> PyTree:
    """Replaces every array by its shape and dtype."""
    try:
        return jax.eval_shape(lambda tree: tree, tree)
    except (TypeError, ValueError) as error:
        for path, leaf in tree_flatten_with_path(tree)[0]:
            if not _is_array(leaf):
                raise TypeError(
                    f"{_name(path)!r} is {type(leaf).__name__}, not an array: "
                    "close over it instead of passing it as an argument"
                ) from error
        raise


def _is_array(leaf: Any) -> bool:
    """Returns whether JAX accepts a leaf as an array. It also accepts a number."""
    try:
        jax.eval_shape(lambda leaf: leaf, leaf)
    except (TypeError, ValueError):
        return False
    return True


def _require_same(
    expected: Mapping[str, PyTree], given: Mapping[str, PyTree], weak_types: bool = True
) -> None:
    """Raises ValueError unless arguments match the abstract arguments of ``hoist``."""

    def describe(leaf: Any) -> str:
        weak = "weak " if weak_types and leaf.weak_type else ""
        return f"{weak}{leaf.dtype} {leaf.shape}"

    expected = {label: expected[label] for label in given}
    given = _abstract(given)
    treedef: Any = jax.tree.structure(expected)
    if treedef != jax.tree.structure(given):
        trees = {"the arguments of hoist": expected, "this call": given}
        raise ValueError(_structure_error(trees))
    problems = []
    for (path, wanted), found in zip(
        tree_flatten_with_path(expected)[0], jax.tree.leaves(given)
    ):
        if describe(wanted) != describe(found):
            problems.append(
                f"{_name(path)!r} is {describe(found)}, but was {describe(wanted)}"
            )
    if problems:
        raise ValueError(
            f"call hoist again for other shapes or dtypes: {_listing(problems)}"
        )


@dataclass(frozen=True)
class _Operation:
    """An operation of a traced function. Its inputs and outputs are numbered values."""

    run: Fn  # called with the inputs, returns a list of the outputs
    inputs: list[int]
    outputs: list[int]
    costly: set[str]  # the costly primitives in it; empty if the operation is cheap
    has_effect: bool


@dataclass(frozen=True)
class _Program:
    """Operations on numbered values, in the order in which they run."""

    inputs: list[int]
    operations: list[_Operation]
    outputs: list[int]
    constants: dict[int, Any]
    avals: list[Any]  # the shape and dtype of each value


def _flatten_jits(traced: Any) -> _Program:
    """Converts a traced function, and replaces each call of a jit by its operations."""
    from jax.extend.core import Literal
    from jax.interpreters.partial_eval import dce_jaxpr

    program = _Program([], [], [], {}, [])

    def new_value(aval: Any) -> int:
        program.avals.append(aval)
        return len(program.avals) - 1

    def append(jaxpr: Any, constants: Sequence[Any], inputs: list[int]) -> list[int]:
        """Appends the operations of a jaxpr, and returns the numbers of its outputs."""
        numbers: dict[Any, int] = dict(zip(jaxpr.invars, inputs))
        for variable, constant in zip(jaxpr.constvars, constants):
            numbers[variable] = new_value(variable.aval)
            program.constants[numbers[variable]] = _as_jax_array(constant)

        def number_of(atom: Any) -> int:
            if not isinstance(atom, Literal):
                return numbers[atom]
            number = new_value(atom.aval)
            program.constants[number] = atom.val
            return number

        for eqn in jaxpr.eqns:
            if _is_plain_jit(eqn):
                body = eqn.params["jaxpr"]
                arguments = [number_of(atom) for atom in eqn.invars]
                outputs = append(body.jaxpr, body.consts, arguments)
            else:
                variables = [var for var in eqn.invars if not isinstance(var, Literal)]
                outputs = [new_value(variable.aval) for variable in eqn.outvars]
                operation = _Operation(
                    run=_equation_as_function(eqn, variables, traced),
                    inputs=[numbers[variable] for variable in variables],
                    outputs=outputs,
                    costly=_costly_primitives(eqn),
                    has_effect=bool(eqn.effects),
                )
                program.operations.append(operation)
            numbers.update(zip(eqn.outvars, outputs))
        return [number_of(atom) for atom in jaxpr.outvars]

    # Operations that no output needs must not make a value late.
    live, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.out_avals), instantiate=True)
    program.inputs.extend(new_value(variable.aval) for variable in live.invars)
    program.outputs.extend(append(live, traced.consts, program.inputs))
    return program


def _as_jax_array(constant: Any) -> Any:
    """Converts a NumPy constant, because a custom gradient may use ``.at``."""
    if not hasattr(constant, "__array__"):  # such as a jax.Ref
        return constant
    with jax.ensure_compile_time_eval():
        return jnp.asarray(constant)


def _equation_as_function(eqn: Any, inputs: list[Any], traced: Any) -> Fn:
    """Returns an equation as a function of its input variables."""
    from jax.extend.core import jaxpr_as_fun

    # A jaxpr of one equation, because the arguments of Primitive.bind differ between
    # versions of JAX.
    jaxpr = traced.jaxpr.replace(
        constvars=[], invars=inputs, outvars=eqn.outvars, eqns=[eqn]
    )
    run: Fn = jaxpr_as_fun(traced.replace(jaxpr=jaxpr, consts=[]))
    return run


def _is_plain_jit(eqn: Any) -> bool:
    """Returns whether an equation is a jitted call without shardings."""
    if eqn.primitive.name not in ("jit", "pjit"):  # pjit before JAX 0.7
        return False
    shardings = [*eqn.params["in_shardings"], *eqn.params["out_shardings"]]
    return not any(isinstance(item, jax.sharding.Sharding) for item in shardings)


def _costly_primitives(eqn: Any) -> set[str]:
    """Returns the names of the costly primitives in an equation."""
    name = eqn.primitive.name
    if name in _CHEAP:
        return set()
    if _is_plain_jit(eqn):
        body = eqn.params["jaxpr"]
    elif name == "custom_jvp_call":  # such as jax.nn.relu
        body = eqn.params["call_jaxpr"]
    else:
        return {name}
    costly = set()
    for inner in body.eqns:
        costly |= _costly_primitives(inner)
    return costly


def _run(program: _Program, inputs: list[Any]) -> list[Array]:
    """Runs a program, and returns its outputs as arrays."""
    values = dict(program.constants)
    values.update(zip(program.inputs, inputs))
    for operation in program.operations:
        arguments = [values[number] for number in operation.inputs]
        values.update(zip(operation.outputs, operation.run(*arguments)))
    outputs = [values[number] for number in program.outputs]
    # device_put keeps the weak type of a Python number on every version of JAX.
    return [x if isinstance(x, Array) else jax.device_put(x) for x in outputs]


def _subprogram(
    program: _Program,
    inputs: list[int],
    outputs: list[int],
    with_effects: bool = False,
) -> _Program:
    """Returns the part of a program that computes outputs from inputs.

    With ``with_effects``, the part includes all operations that have an effect.
    """
    needed = set(outputs).difference(inputs)
    operations = []
    for operation in reversed(program.operations):
        is_needed = not needed.isdisjoint(operation.outputs)
        if is_needed or (with_effects and operation.has_effect):
            operations.append(operation)
            needed.update(set(operation.inputs).difference(inputs))
    operations.reverse()
    return replace(program, inputs=inputs, operations=operations, outputs=outputs)


def _warn_if_useless(once_program: _Program) -> None:
    for operation in once_program.operations:
        if not operation.costly.issubset(_REDUCTIONS):
            return
    warnings.warn(
        "hoist moves no costly operation out of the step, other than reductions: the "
        "others depend on a trainable leaf, or not on the batch (pass data that fn "
        "closes over as the batch)",
        stacklevel=3,
    )


def _values_to_keep(
    program: _Program, trainable: list[int], batch: list[int]
) -> list[int]:
    """Returns the numbers of the values that ``once`` returns, in ascending order."""
    # 1. Mark late and early values. A late operation runs in every step.
    late = set(trainable)
    late_operations, other_operations = [], []
    for operation in program.operations:
        if operation.has_effect or not late.isdisjoint(operation.inputs):
            late.update(operation.outputs)
            late_operations.append(operation)
        else:
            other_operations.append(operation)
    early = set(batch)
    for operation in other_operations:
        if not early.isdisjoint(operation.inputs):
            early.update(operation.outputs)

    # 2. Find out how to rebuild early values. Costly results cannot be rebuilt, so they
    # are sources. To rebuild costly results of weights alone would be costly, too.
    sources = set(batch)
    costly_weights: set[int] = set()
    inputs_of: dict[int, list[int]] = {}
    for operation in other_operations:
        early_inputs = [value for value in operation.inputs if value in early]
        costly = operation.costly or not costly_weights.isdisjoint(operation.inputs)
        for output in operation.outputs:
            if early_inputs and costly:
                sources.add(output)
            elif early_inputs:
                inputs_of[output] = early_inputs
            elif costly:
                costly_weights.add(output)

    # 3. Cut between the sources and the early values that rest needs.
    needed = early.intersection(program.outputs)
    for operation in late_operations:
        needed.update(early.intersection(operation.inputs))
    sizes = [aval.size * aval.dtype.itemsize for aval in program.avals]
    return sorted(_minimum_cut(sorted(needed), sources, inputs_of, sizes))


_Node: TypeAlias = tuple[int, str]


def _minimum_cut(
    needed: list[int],
    sources: set[int],
    inputs_of: Mapping[int, list[int]],
    sizes: Sequence[int],
) -> set[int]:
    """Returns the values to keep so that every needed value is kept or can be rebuilt.

    This is a minimum vertex cut: every path from a needed value through ``inputs_of``
    to a source contains a kept value, and the kept values have the least total size.
    Of several such cuts it is the one that is nearest to the needed values.

    The method is that of Ford and Fulkerson, "Maximal flow through a network" (1956).
    Each value is a pipe whose capacity is its size. Flow starts at the needed values
    and ends in the sources. When no more flow fits, the pipes whose entry can be
    reached and whose exit cannot be are the cut.

    Args:
      needed: The values that must be kept or rebuilt.
      sources: The values that cannot be rebuilt.
      inputs_of: For all other values, the values from which they are rebuilt.
      sizes: The size of every value, in bytes.
    """
    end: _Node = (-1, "end")
    capacity: dict[_Node, dict[_Node, float]] = defaultdict(dict)

    def connect(tail: _Node, head: _Node, limit: float) -> None:
        capacity[tail][head] = limit
        capacity[head].setdefault(tail, 0)  # A later path can send flow back.

    for value in sorted(sources.union(inputs_of)):
        if value in sources:
            connect((value, "exit"), end, math.inf)
        else:
            for inner in inputs_of[value]:
                connect((value, "exit"), (inner, "entry"), math.inf)
        connect((value, "entry"), (value, "exit"), sizes[value])

    # No path leads from an exhausted node to the end. This remains true while flow is
    # added elsewhere, so an exhausted node is never searched again.
    exhausted: set[_Node] = set()

    def find_path(start: _Node) -> list[tuple[_Node, _Node]]:
        """Returns the steps of a path with free capacity from a node to the end."""
        came_from = {start: start}
        stack = [start]
        while stack:
            node = stack.pop()
            if node == end:
                steps = []
                while node != start:
                    steps.append((came_from[node], node))
                    node = came_from[node]
                return steps
            # The way ahead was connected first. Push it last, to try it first.
            for neighbour, free in reversed(capacity[node].items()):
                if (
                    free > 0
                    and neighbour not in came_from
                    and neighbour not in exhausted
                ):
                    came_from[neighbour] = node
                    stack.append(neighbour)
        exhausted.update(came_from)
        return []

    for value in needed:
        while steps := find_path((value, "entry")):
            flow = min(capacity[tail][head] for tail, head in steps)
            for tail, head in steps:
                capacity[tail][head] -= flow
                capacity[head][tail] += flow

    cut = set()
    for value, side in exhausted:
        if side == "entry" and (value, "exit") not in exhausted:
            cut.add(value)
    return cut


# -------------------------------------------------------------- the walk-through
#
# A worked example: train the first and last layer of an MLP, and freeze the middle one.
# If you only need the tool, delete everything from here on.

import argparse
import itertools
import tempfile
from pathlib import Path

__all__ += ["init", "apply", "loss_fn", "sgd_step", "train_step", "train", "dataset"]

Params: TypeAlias = dict[str, dict[str, Array]]


def init(key: Array, sizes: Sequence[int], dtype: Any = jnp.float32) -> Params:
    """Initializes an MLP with the layers ``linear_0``, ``linear_1``, ...

    The parameters equal those of Haiku's ``hk.nets.MLP`` bit for bit: weights from a
    normal distribution with standard deviation 1 / sqrt(fan-in), truncated at two
    standard deviations, and biases of zero.

    Args:
      key: A JAX random key.
      sizes: The widths of the input, of the hidden layers and of the output.
      dtype: The dtype of all parameters.

    Returns:
      ``{"linear_0": {"w": (sizes[0], sizes[1]), "b": (sizes[1],)}, ...}``.

    Raises:
      ValueError: If there are fewer than two sizes, or if a size is not a positive
        integer.

    >>> jax.tree.map(jnp.shape, init(jax.random.key(0), [1, 300, 10]))
    {'linear_0': {'b': (300,), 'w': (1, 300)}, 'linear_1': {'b': (10,), 'w': (300, 10)}}
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes must be at least an input and an output, got {sizes}")
    for size in sizes:
        _require_positive("every size", size)
    params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        key, subkey = jax.random.split(key)
        # To get Haiku's bits, multiply by the rounded reciprocal instead of dividing.
        scale = jnp.asarray(1 / np.sqrt(fan_in), dtype)
        w = scale * jax.random.truncated_normal(subkey, -2, 2, (fan_in, fan_out), dtype)
        params[f"linear_{i}"] = {"w": w, "b": jnp.zeros(fan_out, dtype)}
    return params


def _require_positive(label: str, number: Any) -> None:
    if type(number) not in (int, np.int32, np.int64) or number < 1:
        raise ValueError(f"{label} must be a positive integer, got {number!r}")


def apply(params: Params, x: Array) -> Array:
    """Applies the MLP, with a ReLU between the layers.

    Args:
      params: What ``init`` returns, without holes.
      x: The inputs, of shape (..., sizes[0]).

    Returns:
      The logits, of shape (..., sizes[-1]).

    Raises:
      ValueError: If the layers are not ``linear_0``, ``linear_1``, ..., if a layer has
        holes, or if shapes do not match.

    >>> apply(init(jax.random.key(0), [1, 300, 10]), jnp.ones((5, 1))).shape
    (5, 10)
    """
    # JAX sorts the keys of dicts, linear_10 before linear_2. Go by the numbers.
    layers = [f"linear_{i}" for i in range(len(params))]
    if not layers or set(layers) != set(params):
        names = [repr(name) for name in params]
        raise ValueError(
            f"the layers must be linear_0, linear_1, ..., but are {_listing(names)}"
        )
    for layer in layers:
        w, b = params[layer]["w"], params[layer]["b"]
        if _is_hole(w) or _is_hole(b):
            raise ValueError(f"{layer} has holes: merge(trainable, frozen) first")
        if x.shape[-1:] != w.shape[:1]:
            raise ValueError(
                f"{layer} needs inputs of width {w.shape[0]}, got shape {x.shape}"
            )
        if b.shape != w.shape[1:]:
            raise ValueError(f"{layer} has w of shape {w.shape}, but b of {b.shape}")
        if layer != "linear_0":
            x = jax.nn.relu(x)
        x = x @ w  # (..., out)
        x = x + jnp.broadcast_to(b, x.shape)
    return x


def loss_fn(trainable: PyTree, frozen: PyTree, x: Array, y: Array) -> Array:
    """Returns the mean softmax cross-entropy of the MLP.

    Args:
      trainable: The parameters to differentiate; ``jax.grad`` differentiates the first
        argument of a function.
      frozen: The other parameters.
      x: The inputs, of shape (..., in).
      y: The labels: integers of shape (...). A label outside 0, ..., out - 1 adds
        nothing to the loss.

    Returns:
      A scalar with the dtype of the logits. Logits of fewer than 32 bits are summed in
      float32.

    Raises:
      TypeError: If the labels are not integers.
      ValueError: If shapes do not match, or if the parts cannot be merged.

    >>> params = {"linear_0": {"w": jnp.zeros((1, 4)), "b": jnp.zeros(4)}}
    >>> print(loss_fn(*partition("*/w", params), jnp.ones((5, 1)), jnp.arange(5) % 4))
    1.3862944
    """
    logits = apply(merge(trainable, frozen), x)  # (..., out)
    y = jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {y.dtype}")
    if y.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels of shape {y.shape} do not match logits of shape {logits.shape}"
        )
    if y.dtype.itemsize < 4:
        y = y.astype(jnp.int32)  # 8 bits cannot count more than 256 classes
    is_label = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    # Select instead of multiplying by 0, because 0 * -inf is nan.
    log_likelihoods = jnp.where(is_label, jax.nn.log_softmax(logits), 0)
    sum_dtype = jnp.promote_types(logits.dtype, jnp.float32)
    mean = jnp.sum(log_likelihoods, dtype=sum_dtype) / y.size
    return -mean.astype(logits.dtype)


def sgd_step(params: T, grads: T, lr: Any = 0.1) -> T:
    """Returns ``p - g * lr`` for every leaf, in the leaf's own dtype.

    Args:
      params: A tree of floating-point arrays. It may have holes.
      grads: A tree of the same structure and shapes.
      lr: The learning rate, a scalar.

    Raises:
      TypeError: If a leaf of ``params`` is not floating-point.
      ValueError: If the structures differ, or if an update would change a leaf's shape.

    >>> params = {"w": jnp.float32(1), "b": Hole()}
    >>> sgd_step(params, {"w": jnp.float32(0.5), "b": Hole()}, lr=0.5)
    {'b': Hole(), 'w': Array(0.75, dtype=float32)}
    """
    _require_floating(params)

    def update(path: KeyPath, p: Any, g: Any) -> Array:
        new = p - g * lr
        if jnp.shape(new) != jnp.shape(p):
            raise ValueError(
                f"{_name(path)!r} has shape {jnp.shape(p)}, but its gradient has shape "
                f"{jnp.shape(g)} and lr has shape {jnp.shape(lr)}"
            )
        return jnp.asarray(new, jnp.result_type(p))

    new_params: T = jax.tree_util.tree_map_with_path(update, params, grads)
    return new_params


def _require_floating(tree: PyTree) -> None:
    for path, leaf in tree_flatten_with_path(tree)[0]:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{_name(path)!r} is {dtype}, but only floating-point leaves can be "
                "trained: freeze it"
            )


@jax.jit
def train_step(
    trainable: T, frozen: PyTree, x: Array, y: Array, lr: Any = 0.1
) -> tuple[T, Array]:
    """Takes one step of SGD on ``loss_fn``.

    The arguments are those of ``loss_fn`` and ``sgd_step``, and so are the errors.

    Returns:
      The new trainable part, and the loss before the step.
    """
    _require_floating(trainable)
    loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, x, y)
    return sgd_step(trainable, grads, lr), loss


@jax.jit
def train(
    trainable: T, frozen: PyTree, xs: Array, ys: Array, lr: Any = 0.1
) -> tuple[T, Array]:
    """Calls ``train_step`` on many batches, in a single dispatch.

    Args:
      trainable: The trainable part.
      frozen: The frozen part.
      xs: The inputs, of shape (steps, batch, ..., in).
      ys: The labels, of shape (steps, batch, ...).
      lr: The learning rate.

    Returns:
      The new trainable part, and the losses, of shape (steps,).

    Raises:
      ValueError: If the shapes do not match. For other errors see ``train_step``.
    """
    if xs.ndim < 3 or xs.shape[:-1] != ys.shape:
        raise ValueError(
            "train needs xs of shape (steps, batch, ..., in) and ys of shape "
            f"(steps, batch, ...), got {xs.shape} and {ys.shape}"
        )

    def step(trainable: T, batch: tuple[Array, Array]) -> tuple[T, Array]:
        x, y = batch
        new_trainable, loss = train_step(trainable, frozen, x, y, lr)
        return new_trainable, loss

    return jax.lax.scan(step, trainable, (xs, ys))


def dataset(
    key: Array, num_records: int, batch_size: int = 10, num_classes: int = 10
) -> tuple[Array, Array]:
    """Draws batches of numbers whose labels are the numbers themselves.

    Args:
      key: A JAX random key.
      num_records: The number of batches.
      batch_size: The number of different numbers in a batch.
      num_classes: The numbers are 0, ..., num_classes - 1.

    Returns:
      The inputs, float32 of shape (num_records, batch_size, 1), and the labels, int32
      of shape (num_records, batch_size).

    Raises:
      ValueError: If an argument is not a positive integer, or if ``batch_size`` is
        larger than ``num_classes``.

    >>> xs, ys = dataset(jax.random.key(0), num_records=7, batch_size=5)
    >>> xs.shape, xs.dtype.name, ys.shape, ys.dtype.name
    ((7, 5, 1), 'float32', (7, 5), 'int32')
    """
    _require_positive("num_records", num_records)
    _require_positive("batch_size", batch_size)
    _require_positive("num_classes", num_classes)
    if batch_size > num_classes:
        raise ValueError(
            f"batch_size {batch_size} must be at most num_classes {num_classes}"
        )

    def draw(key: Array) -> Array:
        return jax.random.choice(key, num_classes, (batch_size,), replace=False)

    ys = jax.vmap(draw)(jax.random.split(key, num_records))  # (num_records, batch_size)
    return ys[..., None].astype(jnp.float32), ys.astype(jnp.int32)


def _print_predictions(title: str, params: Params, numbers: range) -> None:
    x = jnp.array(numbers, jnp.float32)[:, None]  # (numbers, 1)
    labels = apply(params, x).argmax(axis=1)
    print(title)
    for number, label in zip(numbers, labels):
        print(f"[{number}.] -> {label}")
    print()


def _print_changes(before: Params, after: Params) -> None:
    """Prints which leaves changed, and which ones kept every bit."""
    changed, unchanged = [], []
    new_leaves = jax.tree.leaves(after)
    for (path, old), new in zip(tree_flatten_with_path(before)[0], new_leaves):
        if np.asarray(old).tobytes() == np.asarray(new).tobytes():
            unchanged.append(_name(path))
        else:
            changed.append(_name(path))
    print("changed:", ", ".join(changed))
    print("unchanged, bit for bit:", ", ".join(unchanged))


def _plot_error(file: Path) -> str | None:
    """Returns why a picture cannot be written to a file, or None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is missing: pip install matplotlib"
    formats = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in formats:
        return f"the suffix must be one of {', '.join(formats)}"
    if not file.parent.is_dir():
        return "the folder does not exist"
    if file.is_dir():
        return "this is a folder"
    return None


def _plot(file: Path, before: Params, after: Params, frozen: PyTree) -> None:
    """Draws each parameter before and after training, with one color scale for both."""
    from matplotlib.figure import Figure

    frozen_names = _names(frozen)
    names = _names(before)
    old_leaves, new_leaves = jax.tree.leaves(before), jax.tree.leaves(after)
    figure = Figure(figsize=(2.4 * len(names), 5.5), layout="constrained")
    columns = figure.subplots(2, len(names)).T
    for name, column, old, new in zip(names, columns, old_leaves, new_leaves):
        limit = max(float(jnp.abs(old).max()), float(jnp.abs(new).max())) or 1.0
        state = "frozen" if name in frozen_names else "trainable"
        for axis, leaf, label in zip(column, (old, new), ("before", "after")):
            image = axis.imshow(
                np.atleast_2d(leaf), aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit
            )
            axis.set(title=f"{name}\n{state}", xlabel=label, yticks=[])
        figure.colorbar(image, ax=list(column), location="bottom")

    # Write the whole picture or nothing.
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        part = Path(folder, file.name)
        figure.savefig(part, dpi=150)
        part.replace(file)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the first and last layer of an MLP to learn the identity."""
    parser = argparse.ArgumentParser(
        description="Train the first and last layer of an MLP, the middle one frozen."
    )
    parser.add_argument("--steps", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--seed", type=int, default=42, help="default: 42")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all parameters")
    args = parser.parse_args(argv)
    if not 1 <= args.steps <= 10**7:  # all batches must fit in memory
        parser.error(f"--steps must be from 1 to 10,000,000, got {args.steps}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    if args.plot and (error := _plot_error(args.plot)):
        parser.error(f"--plot {args.plot}: {error}")

    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    before = init(init_key, [1, 300, 100, 10])
    trainable, frozen = partition(["linear_0", "linear_2"], before)
    _print_predictions("before training", before, range(10))
    print(summary(trainable=trainable, frozen=frozen))

    xs, ys = dataset(data_key, args.steps)
    trainable, losses = train(trainable, frozen, xs, ys)
    after = merge(trainable, frozen)
    print(f"\n{args.steps} steps, loss {losses[0]:.6f} -> {losses[-1]:.6f}\n")
    _print_predictions("after training", after, range(10))
    _print_predictions("out of range", after, range(10, 20))
    _print_changes(before, after)
    if args.plot:
        try:
            _plot(args.plot, before, after, frozen)
        except OSError as error:
            parser.error(f"--plot {args.plot}: {error}")


if __name__ == "__main__":
    main()
