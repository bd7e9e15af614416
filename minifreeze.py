# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.5.1", "numpy"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the minifreeze authors
"""minifreeze: freeze part of any JAX model.

Split the parameters into two trees, and merge them inside your loss function. JAX
differentiates with respect to the first argument, so put the trainable tree first:

    def loss_fn(trainable, frozen, x, y):
        params = merge(trainable, frozen)
        ...

    trainable, frozen = partition("head", params)
    loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, x, y)

If you use the same batches in every epoch, run the frozen layers only once per batch:

    once, rest = hoist(loss_fn, trainable, frozen, x, y)
    kept = jax.jit(once)(frozen, x, y)
    loss, grads = jax.value_and_grad(rest)(trainable, frozen, kept)

The functions are stateless and never donate buffers. They accept any pytree; for
``hoist``, every leaf must be an array. Everything below the "walk-through" banner is an
example and can be deleted.
"""

from __future__ import annotations

import difflib
import enum
import fnmatch
import math
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import all_leaves, keystr, register_dataclass, tree_flatten_with_path

__all__ = ["Hole", "partition", "mask", "merge", "summary", "warm_start", "hoist"]
__version__ = "0.3.0"

T = TypeVar("T")
PyTree: TypeAlias = Any
KeyPath: TypeAlias = tuple[Any, ...]
Function: TypeAlias = Callable[..., Any]
Predicate: TypeAlias = Callable[[KeyPath, Any], bool]
Where: TypeAlias = str | Sequence[str] | Predicate | PyTree  # see partition


# ---------------------------------------------------------------------- holes and names


@register_dataclass
@dataclass(frozen=True)
class Hole:
    """A placeholder for a leaf that another part holds.

    A hole is a pytree node with no children, so ``grad``, ``jit`` and optimizers skip
    it.
    """


def _is_hole(node: Any) -> bool:
    """Returns whether a node is a hole.

    Raises ValueError if the hole comes from another copy of this module. Such a hole
    would otherwise look like an empty container.
    """
    if isinstance(node, Hole):
        return True
    # Another class may also be called Hole, so check more than the name.
    same_name = type(node).__name__ == "Hole"
    if same_name and is_dataclass(node) and not fields(node):
        raise ValueError(
            f"found a Hole from another copy of minifreeze ({type(node).__module__}): "
            "the module was imported twice or reloaded. Use one copy to split and merge"
        )
    return False


def _name(path: KeyPath) -> str:
    """Returns a key path as text, such as ``linear_0/w``."""
    return keystr(path, simple=True, separator="/")


def _names(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Returns the name of every leaf, in tree order."""
    return [_name(path) for path, _ in tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]


def _first_ten(items: Iterable[str]) -> str:
    """Joins up to ten items for an error message."""
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
        leaf = np.zeros((), jnp.result_type(leaf))
    looks_like_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    is_class = isinstance(leaf, type)  # np.float32 itself has both attributes
    if is_class or not looks_like_array:
        return _Spec("-", type(leaf).__name__, 0, 0)
    shape = tuple(int(size) for size in leaf.shape)  # sizes can be NumPy integers
    count = math.prod(shape)
    return _Spec(str(shape), str(leaf.dtype), count, count * leaf.dtype.itemsize)


# -------------------------------------------------------------------- select and split


def partition(where: Where, tree: T) -> tuple[T, T]:
    """Splits a tree into the leaves that ``where`` selects and all other leaves.

    Both results have the structure of ``tree``, with a ``Hole`` wherever the other tree
    holds the leaf. The leaves are shared, not copied.

    Args:
      where: Selects leaves. One of:

        * A glob pattern over leaf names, such as ``"head"`` or ``"blocks/*/bias"``. A
          leaf's name is its key path, joined with ``/``. To list all names, use
          ``print(summary(tree=tree))``. A pattern selects a leaf if it matches the
          whole name of the leaf or of a container above it: ``"head"`` selects
          ``head/w`` but not ``head2/w``. As in ``fnmatch``, ``*`` also matches ``/``.
        * A list or tuple of patterns. The last match wins. A pattern with a leading
          ``!`` excludes leaves. If the first pattern has a leading ``!``, every leaf
          starts out selected.
        * A predicate ``(path, leaf) -> bool``, where ``path`` is JAX's key path.
        * A tree of bools with the structure of ``tree``, as returned by ``mask``.
      tree: Any pytree.

    Returns:
      A tuple ``(selected, others)``.

    Raises:
      ValueError: If a pattern matches no leaf, if ``where`` is an empty list or selects
        no leaf although ``tree`` has some, or if a tree of bools differs in structure
        from ``tree``.
      TypeError: If ``where`` is none of the above, or if a predicate does not return a
        bool.

    >>> partition("a/*", {"a": {"w": 1, "b": 2}, "c": 3})
    ({'a': {'b': 2, 'w': 1}, 'c': Hole()}, {'a': {'b': Hole(), 'w': Hole()}, 'c': 3})
    """
    leaves, treedef = jax.tree.flatten(tree)
    selection = _select(where, tree)
    _require_some_selected(selection, where, tree)
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
    selection = _select(where, tree)
    _require_some_selected(selection, where, tree)
    return jax.tree.unflatten(jax.tree.structure(tree), selection)


def _require_some_selected(selection: list[bool], where: Where, tree: PyTree) -> None:
    """Raises ValueError if a tree has leaves, but none of them is selected."""
    # An empty list is a mistake, even if the tree has no leaves to select.
    if isinstance(where, (list, tuple)) and not where:
        raise ValueError("`where` is an empty list of patterns, which selects no leaf")
    if selection and not any(selection):
        entries, _ = tree_flatten_with_path(tree)
        names = [repr(_name(path)) for path, _ in entries]
        first_path, _ = entries[0]
        raise ValueError(
            f"`where` selects none of the leaves {_first_ten(names)} "
            f"(the key path of the first one is {first_path})"
        )


def _select(where: Where, tree: PyTree) -> list[bool]:
    """Returns, for each leaf in tree order, whether ``where`` selects it.

    It may select nothing, which ``warm_start`` allows. ``partition`` and ``mask`` rule
    that out with ``_require_some_selected``.
    """
    if isinstance(where, str):
        return _select_by_patterns([where], tree)
    if isinstance(where, (list, tuple)):
        if not where:
            return [False] * len(jax.tree.leaves(tree))
        # A list without strings, such as [True, False], is a tree of bools.
        if any(isinstance(item, str) for item in where):
            return _select_by_patterns(where, tree)
    # A callable container is a tree of bools, not a predicate: the mask of an Equinox
    # model is itself a callable model.
    is_leaf = all_leaves([where])
    if callable(where) and is_leaf:
        return _select_by_predicate(where, tree)
    return _select_by_bools(where, tree)


def _select_by_patterns(patterns: Sequence[str], tree: PyTree) -> list[bool]:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"patterns must be strings, got {pattern!r}")
    names = _names(tree)
    starts_selected = patterns[0].startswith("!")
    selection = [starts_selected] * len(names)
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
    """Returns whether a glob matches a name or the name of a container above it.

    The names "head" and "head/w" become "head/" and "head/w/", and the glob "head"
    becomes "head/*". It matches both, because * matches any text, even none, and even
    text with slashes. It does not match "head2/w/".
    """
    if not glob:
        return False  # a tree that is one leaf has the empty name, which "/*" matches
    return fnmatch.fnmatchcase(f"{name}/", f"{glob}/*")


def _no_match_error(pattern: str, glob: str, tree: PyTree) -> str:
    """Explains why a pattern matches no leaf."""
    names = _names(tree)
    for name, leaf in zip(names, jax.tree.leaves(tree)):
        if glob.startswith(f"{name}/"):
            return (
                f"pattern {pattern!r} matches no leaf: {name!r} is a single leaf "
                f"({_spec(leaf)}), and a pattern cannot select part of a leaf"
            )
    if not names:
        return f"pattern {pattern!r} matches no leaf: the tree has no leaves"
    nearest = difflib.get_close_matches(glob, names, n=10, cutoff=0)
    return (
        f"pattern {pattern!r} matches none of the {len(names)} leaves; "
        f"the nearest names are {_first_ten(map(repr, nearest))}"
    )


def _select_by_predicate(predicate: Function, tree: PyTree) -> list[bool]:
    selection = []
    for path, leaf in tree_flatten_with_path(tree)[0]:
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
        "`where` must be a pattern, a list of patterns, a predicate or a tree of bools"
    )
    if bools is None:
        raise TypeError(f"{expected}, got None")
    entries = tree_flatten_with_path(bools)[0]
    for path, leaf in entries:
        if not isinstance(leaf, (bool, np.bool_)):
            place = f" at {_name(path)!r}" if path else ""
            raise TypeError(f"{expected}, got {type(leaf).__name__}{place}")
    if not _same_structure(bools, tree):
        raise ValueError(_structure_error({"where": bools, "the tree": tree}))
    return [bool(leaf) for _, leaf in entries]


def _same_structure(tree: PyTree, other: PyTree) -> bool:
    treedef: Any = jax.tree.structure(tree)
    return bool(treedef == jax.tree.structure(other))


def _structure_error(
    trees: Mapping[str, PyTree], is_leaf: Callable[[Any], bool] | None = None
) -> str:
    """Explains how the structures of labelled trees differ."""
    names = {label: set(_names(tree, is_leaf)) for label, tree in trees.items()}
    all_names = set().union(*names.values())
    problems = []
    for label in trees:
        missing = [repr(name) for name in sorted(all_names - names[label])]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            problems.append(f"{_first_ten(missing)} {verb} missing from {label}")
    if not problems:
        # The names agree, so the containers differ. Show each structure, starting just
        # before the first difference.
        texts = [str(jax.tree.structure(tree, is_leaf)) for tree in trees.values()]
        common = 0  # the number of leading characters that all texts share
        for characters in zip(*texts):
            if len(set(characters)) > 1:
                break
            common += 1
        start = max(0, common - 20)
        for label, text in zip(trees, texts):
            problems.append(f"{label} has ..{text[start : start + 80]}..")
    return f"the structures differ; {'; '.join(problems[:10])}"


# --------------------------------------------------------------------- merge and report


def _align(parts: Mapping[str, PyTree]) -> tuple[list[tuple[Any, ...]], Any]:
    """Aligns the parts of a tree, position by position.

    Returns:
      A list of rows and the structure of the tree, in which holes count as leaves. Each
      row contains, for one position, the leaf or hole of every part.

    Raises:
      ValueError: If the parts differ in structure.
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


def merge(*parts: T, partial: bool = False) -> T:
    """Merges parts of one tree. This is the inverse of ``partition``.

    Args:
      *parts: One or more trees of the same structure, in any order. Each leaf must be
        in exactly one of them, and the others must have a ``Hole`` in its place.
      partial: If True, a position that is a hole in every part stays a hole. Use this
        to merge some, but not all, of a tree's parts.

    Returns:
      The merged tree. The leaves are shared, not copied.

    Raises:
      ValueError: If several parts hold a leaf, if no part holds it and ``partial`` is
        False, or if the parts differ in structure. The message names the leaves
        or shows the structures.
      TypeError: If there are no parts.

    >>> merge({"a": Hole(), "b": 2}, {"a": 1, "b": Hole()})
    {'a': 1, 'b': 2}
    """
    if not parts:
        raise TypeError("merge needs at least one part")
    parts_by_label = {f"part {index}": part for index, part in enumerate(parts)}
    rows, treedef = _align(parts_by_label)
    merged = []
    for nodes in rows:
        leaves = [node for node in nodes if not _is_hole(node)]
        if len(leaves) > 1 or (not leaves and not partial):
            raise ValueError(_merge_error(parts_by_label, rows, partial))
        merged.append(leaves[0] if leaves else Hole())
    return cast(T, jax.tree.unflatten(treedef, merged))


def _row_names(parts: Mapping[str, PyTree]) -> list[str]:
    """Returns one name for each row that ``_align`` returns."""
    first_part = next(iter(parts.values()))
    return _names(first_part, is_leaf=_is_hole)


def _merge_error(
    parts: Mapping[str, PyTree], rows: list[tuple[Any, ...]], partial: bool
) -> str:
    """Lists the leaves that no part holds and those that several parts hold."""
    lost, overlaps = [], []
    for name, nodes in zip(_row_names(parts), rows):
        holders = [label for label, node in zip(parts, nodes) if not _is_hole(node)]
        if not holders:
            lost.append(repr(name))
        elif len(holders) > 1:
            overlaps.append(f"{name!r} is in {_first_ten(holders)}")
    problems = []
    if lost and not partial:
        problems.append(
            "pass the part that holds the missing leaves, or partial=True to leave "
            f"holes; none of {len(parts)} part(s) holds {_first_ten(lost)}"
        )
    if overlaps:
        problems.append(f"several parts hold the same leaf: {_first_ten(overlaps)}")
    return "; ".join(problems)


def summary(**parts: PyTree) -> str:
    """Returns a table of all leaves and the size of each part.

    Args:
      **parts: The whole tree, as in ``summary(params=params)``, or parts of one tree.
        The keywords are the names of the parts in the table.

    Returns:
      A string with one row per leaf, in tree order, and one row per part. ``count`` is
      the number of elements, and ``share`` is the percentage of all elements. Abstract
      arrays are counted like arrays, and a Python number counts as one element. Any
      other leaf counts as 0 elements.

    Raises:
      ValueError: If several parts hold a leaf, if the parts differ in structure, or if
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
        raise ValueError("a part cannot be called 'total', which labels the last row")
    rows, _ = _align(parts)
    leaf_rows: list[Sequence[Any]] = [("path", "shape", "dtype", "count", "part")]
    counts = dict.fromkeys(parts, 0)
    sizes = dict.fromkeys(parts, 0)  # bytes
    for name, nodes in zip(_row_names(parts), rows):
        held = [(part, node) for part, node in zip(parts, nodes) if not _is_hole(node)]
        if len(held) > 1:
            raise ValueError(_merge_error(parts, rows, partial=True))
        if not held:
            continue
        [(part, leaf)] = held
        spec = _spec(leaf)
        leaf_rows.append((name, spec.shape, spec.dtype, spec.count, part))
        counts[part] += spec.count
        sizes[part] += spec.bytes

    counts["total"] = sum(counts.values())
    sizes["total"] = sum(sizes.values())
    part_rows: list[Sequence[Any]] = [("part", "count", "bytes", "share")]
    for part, count in counts.items():
        share = count / max(counts["total"], 1)
        part_rows.append((part, count, sizes[part], f"{share:.1%}"))
    return f"{_table(leaf_rows)}\n\n{_table(part_rows)}"


def _table(rows: Sequence[Sequence[Any]]) -> str:
    """Aligns rows of cells in columns, two spaces apart."""
    widths = []
    for column in zip(*rows):
        widths.append(max(len(str(cell)) for cell in column))
    lines = []
    for row in rows:
        cells = [str(cell).ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# --------------------------------------------------------------------------- warm start


def warm_start(new: T, old: PyTree, *, fresh: Where = (), unused: Where = ()) -> T:
    """Fills ``new`` with values from ``old`` and accounts for every leaf of both.

    Use it to load a checkpoint and to change the frozen set during training:
    ``warm_start(optimizer.init(trainable), old_state)`` keeps the moments of all leaves
    that stay trainable.

    Leaves are matched by name, such as ``linear_0/w``. The containers may differ: a
    checkpoint can be a flat dict with the key ``"linear_0/w"``, or have a dict with the
    keys ``"0"``, ``"1"``, ... where ``new`` has a list.

    * A leaf of ``new`` that ``fresh`` selects keeps its value.
    * Every other leaf of ``new`` takes the value of the leaf of the same name in
      ``old``. If ``old`` has a ``Hole`` there, because the leaf was frozen, the leaf
      keeps its value from ``new``.
    * Every leaf of ``old`` must have a leaf or ``Hole`` of the same name in ``new``,
      unless ``unused`` selects it. A ``Hole`` means that the leaf is now frozen, so its
      old value is dropped. ``unused`` has no effect on names that occur in ``new``.

    Adam's step count is copied like any other leaf. Newly unfrozen leaves then get
    almost no bias correction, and their first update is about three times too large. To
    restart the count instead, select it with ``fresh``. Its name is ``0/count`` in
    ``optax.adam``.

    Args:
      new: The tree to fill.
      old: The tree to take values from.
      fresh: Selects leaves of ``new``, like the ``where`` of ``partition``. Unlike
        ``where``, it may select nothing (the default).
      unused: Selects leaves of ``old`` in the same way.

    Returns:
      A tree with the structure of ``new``.

    Raises:
      ValueError: If a leaf of ``new`` has no value in ``old``, if a leaf of ``old`` has
        no place in ``new``, if shapes or dtypes differ, if a name occurs twice in one
        tree, if a pattern matches no leaf, or if a tree of bools differs in structure.
      TypeError: If ``fresh`` or ``unused`` is not a valid ``where``.

    >>> warm_start({"a": 0, "b": 0, "c": Hole()}, {"a": 7, "b": Hole(), "c": 8})
    {'a': 7, 'b': 0, 'c': Hole()}
    >>> warm_start({"body": 0, "head": 0}, {"body": 7, "head": 7}, fresh="head")
    {'body': 7, 'head': 0}
    """
    new_nodes = _nodes_by_name(new, "new")
    old_nodes = _nodes_by_name(old, "old")
    fresh_names = _selected_names("fresh", fresh, new)
    unused_names = _selected_names("unused", unused, old)

    leaves, without_value, mismatches = [], [], []
    for name, node in new_nodes.items():
        if _is_hole(node):
            continue  # holes belong to the structure of new, not to its leaves
        if name in fresh_names:
            leaves.append(node)
        elif name not in old_nodes:
            without_value.append(name)
        elif _is_hole(old_nodes[name]):
            leaves.append(node)
        else:
            leaves.append(old_nodes[name])
            wanted, found = _spec(node), _spec(old_nodes[name])
            if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
                mismatches.append(f"{name!r} is {wanted} in new and {found} in old")

    without_place = []
    for name, node in old_nodes.items():
        # Names that occur in new are accounted for: copied, fresh, or a hole.
        if not _is_hole(node) and name not in new_nodes and name not in unused_names:
            without_place.append(name)

    if without_value or without_place or mismatches:
        raise ValueError(
            _warm_start_error(without_value, without_place, mismatches, old)
        )
    return cast(T, jax.tree.unflatten(jax.tree.structure(new), leaves))


def _warm_start_error(
    without_value: list[str],
    without_place: list[str],
    mismatches: list[str],
    old: PyTree,
) -> str:
    problems = []
    if without_value:
        problems.append(
            f"old has no value for {_first_ten(map(repr, without_value))} "
            "(to keep a value from new, select it with fresh)"
        )
        if _holds_none(old):
            problems.append(
                "old contains None, which is how checkpoint libraries restore a hole "
                "if they get no target tree; select such leaves with fresh"
            )
    if without_place:
        problems.append(
            f"new has no place for {_first_ten(map(repr, without_place))} "
            "(to ignore a value of old, select it with unused)"
        )
    if mismatches:
        problems.append(f"shapes or dtypes differ: {_first_ten(mismatches)}")
    return "; ".join(problems)


def _nodes_by_name(tree: PyTree, label: str) -> dict[str, Any]:
    """Returns the leaves and holes of a tree by name, in tree order."""
    nodes: dict[str, Any] = {}
    for path, node in tree_flatten_with_path(tree, is_leaf=_is_hole)[0]:
        name = _name(path)
        if name in nodes:
            raise ValueError(f"two leaves of {label} have the name {name!r}")
        nodes[name] = node
    return nodes


def _selected_names(label: str, where: Where, tree: PyTree) -> set[str]:
    """Returns the names of the leaves that ``where`` selects. There may be none."""
    try:
        selection = _select(where, tree)
    except TypeError as error:
        raise TypeError(f"{label}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    return {name for name, chosen in zip(_names(tree), selection) if chosen}


def _holds_none(tree: PyTree) -> bool:
    """Returns whether a tree contains None."""
    return any(node is None for node in jax.tree.leaves(tree, is_leaf=_is_none))


def _is_none(node: Any) -> bool:
    return node is None


# -------------------------------------------------------------------------------- hoist

# Primitives that ``rest`` may repeat to save memory. Most of them take about as long as
# reading the result from memory. Special functions and random bits are slower, but
# still much cheaper than a matrix product.
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
_CHEAP = frozenset(_ELEMENTWISE + _CASTS_AND_MOVES + _IDENTITIES + _RANDOM_BITS)

_REDUCTIONS = frozenset(
    """
    argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod
    reduce_sum reduce_xor
    """.split()
)


def hoist(
    fn: Function, trainable: PyTree, frozen: PyTree, *batch: PyTree
) -> tuple[Function, Function]:
    """Splits a function into one that runs once per batch and one that runs every step.

    ``rest(trainable, frozen, once(frozen, *batch))`` equals
    ``fn(trainable, frozen, *batch)`` and has the same gradient with respect to
    ``trainable``. If every epoch uses the same batches, call ``once`` in the first
    epoch and store the results.

    The rule: ``once`` stores values from which ``rest`` can rebuild, by cheap
    operations alone, every value it needs that depends on the batch but not on a
    trainable leaf. Of all such sets of values, ``once`` stores the one with the fewest
    bytes: a minimum cut. If several sets tie, it stores the one that leaves ``rest``
    the least work.

    Cheap operations are elementwise functions, casts, data movement (slices, gathers,
    transposes, ...) and random bits. All others are costly: matrix products,
    convolutions, reductions, sorts, ...

    For example, take ``tanh(x @ body) @ head`` with a trainable ``head``. ``rest`` must
    compute the product with ``head``, for which it needs the ``tanh``. To compute the
    ``tanh`` itself, it would need ``x @ body``, which has just as many bytes. So
    ``once`` stores the ``tanh``, which leaves ``rest`` less work. If ``fn`` cast the
    ``tanh`` to a wider dtype before the product with ``head``, ``once`` would still
    store the narrower ``tanh``, and ``rest`` would repeat the cast in every step.

    In detail, ``hoist`` traces ``fn`` and divides its intermediate values into three
    kinds:

    * late: depends on a trainable leaf, or comes from an operation with an effect.
      ``rest`` computes it in every step.
    * early: depends on the batch and is not late. ``once`` can compute it.
    * fixed: depends only on frozen leaves and constants. ``once`` never stores it,
      because every batch would store another copy. If ``rest`` needs such a value, it
      computes it in every step, even if it is costly. To avoid that, compute it
      yourself and pass it as part of ``frozen``.

    ``rest`` needs the early values that late operations read or that ``fn`` returns. It
    must be able to rebuild all of them from what ``once`` stores. Note that:

    * A ``jit`` without shardings is inlined, and a ``custom_jvp`` is cheap if
      everything in it is cheap. Any other operation that wraps a function is never
      split and counts as costly: ``scan``, ``while_loop``, ``cond``, ``checkpoint``,
      ``custom_vjp``, ``shard_map``, and a ``jit`` with shardings. For example, a
      ``scan`` over the layers of a model is late if one of the layers is trainable.
    * ``rest`` never repeats a costly early operation. If a needed value depends on one,
      ``once`` stores its result or a value computed from it, even if that is
      larger than the batch, as in ``x @ x.T``.
    * Cheap operations count as free: ``rest`` will repeat any number of them to save a
      single stored byte.
    * A cheap operation on an early value counts as costly if repeating it would also
      repeat a costly operation on fixed values. For example,
      ``(embeddings @ projection)[ids]`` is stored, because to rebuild it, ``rest``
      would have to repeat the matrix product.

    Args:
      fn: A function ``fn(trainable, frozen, *batch)`` on pytrees of arrays.
      trainable: Everything that changes between steps: the part to differentiate and,
        for example, a random key. (A key in the batch would give the same random
        numbers in every epoch.) With ``fn((params, key), frozen, x)``, differentiate
        ``lambda params: rest((params, key), frozen, kept)``.
      frozen: The part that does not change.
      *batch: The data. Arrays that ``fn`` closes over are treated as constants.

    Returns:
      A tuple ``(once, rest)`` of functions:

      * ``once(frozen, *batch)`` returns a tuple of arrays to store. Call it under
        ``jax.jit``. ``jax.eval_shape(once, frozen, *batch)`` shows what it will store.
      * ``rest(trainable, frozen, kept)`` returns what ``fn`` returns, where ``kept`` is
        the result of ``once``.

      Both raise ValueError if an argument differs in structure, shape, dtype or weak
      type from the one that ``hoist`` traced, and TypeError if a leaf is not an array.
      The weak types of ``kept`` do not matter.

    Raises:
      TypeError: If a leaf of an argument is not an array. Python numbers and
        ``jax.ShapeDtypeStruct`` also count as arrays.

    Warns:
      UserWarning: If ``once`` would run only cheap operations and reductions, which are
        not worth hoisting.

    >>> head, body, x = jnp.ones(2), jnp.ones((3, 2)), jnp.ones((5, 3))
    >>> model = lambda head, body, x: jnp.tanh(x @ body) @ head
    >>> once, rest = hoist(model, head, body, x)
    >>> kept = jax.jit(once)(body, x)
    >>> [features.shape for features in kept], rest(head, body, kept).shape
    ([(5, 2)], (5,))
    """
    types = _abstract({"trainable": trainable, "frozen": frozen, "batch": batch})
    # A new lambda bypasses JAX's trace cache. A cached trace would be wrong if values
    # that fn closes over have changed.
    closed_jaxpr, out_shapes = jax.make_jaxpr(
        lambda *args: fn(*args), return_shape=True
    )(trainable, frozen, *batch)
    out_treedef = jax.tree.structure(out_shapes)
    program = _to_program(closed_jaxpr)
    frozen_start = len(jax.tree.leaves(trainable))
    batch_start = frozen_start + len(jax.tree.leaves(frozen))
    trainable_ids = program.inputs[:frozen_start]
    frozen_ids = program.inputs[frozen_start:batch_start]
    batch_ids = program.inputs[batch_start:]

    kept_ids = _values_to_keep(program, trainable_ids, batch_ids)
    kept_types = tuple(program.avals[value_id] for value_id in kept_ids)
    once_program = _subprogram(program, frozen_ids + batch_ids, kept_ids)
    rest_program = _subprogram(
        program,
        trainable_ids + frozen_ids + kept_ids,
        program.outputs,
        keep_effects=True,
    )
    _warn_if_useless(once_program)

    def once(frozen: PyTree, *batch: PyTree) -> tuple[Array, ...]:
        expected = {"frozen": types["frozen"], "batch": types["batch"]}
        _require_same(expected, {"frozen": frozen, "batch": batch})
        return tuple(_run(once_program, jax.tree.leaves((frozen, batch))))

    def rest(trainable: PyTree, frozen: PyTree, kept: tuple[Array, ...]) -> Any:
        expected = {"trainable": types["trainable"], "frozen": types["frozen"]}
        _require_same(expected, {"trainable": trainable, "frozen": frozen})
        # Arrays may lose their weak type when they are stored. That is harmless,
        # because the trace has already resolved all type promotion.
        _require_same({"kept": kept_types}, {"kept": kept}, weak_types=False)
        outputs = _run(rest_program, jax.tree.leaves((trainable, frozen, kept)))
        return jax.tree.unflatten(out_treedef, outputs)

    return once, rest


def _abstract(tree: PyTree) -> PyTree:
    """Replaces every array with its shape, dtype and weak type.

    Raises:
      TypeError: If a leaf is not an array.
    """
    try:
        return jax.eval_shape(lambda tree: tree, tree)
    except (TypeError, ValueError) as error:
        for path, leaf in tree_flatten_with_path(tree)[0]:
            if not _is_array(leaf):
                raise TypeError(
                    f"{_name(path)!r} is a {type(leaf).__name__}, not an array: let fn "
                    "close over it instead of passing it"
                ) from error
        raise


def _is_array(leaf: Any) -> bool:
    """Returns whether JAX can trace a leaf."""
    try:
        jax.eval_shape(lambda leaf: leaf, leaf)
    except (TypeError, ValueError):
        return False
    return True


def _require_same(expected: PyTree, given: PyTree, weak_types: bool = True) -> None:
    """Raises ValueError unless arguments match the expected abstract arguments."""
    given = _abstract(given)
    if not _same_structure(expected, given):
        trees = {"what hoist traced": expected, "this call": given}
        raise ValueError(_structure_error(trees))
    problems = []
    entries, _ = tree_flatten_with_path(expected)
    for (path, wanted), found in zip(entries, jax.tree.leaves(given)):
        wanted_type = _describe_type(wanted, weak_types)
        found_type = _describe_type(found, weak_types)
        if wanted_type != found_type:
            problems.append(
                f"{_name(path)!r}: expected {wanted_type}, got {found_type}"
            )
    if problems:
        raise ValueError(
            f"the arguments do not match what hoist traced: {_first_ten(problems)}; "
            "call hoist again for other shapes or dtypes"
        )


def _describe_type(leaf: Any, weak_types: bool) -> str:
    """Describes an abstract array, such as "weak float32 (2, 3)"."""
    weak = "weak " if weak_types and leaf.weak_type else ""
    return f"{weak}{leaf.dtype} {leaf.shape}"


class _Cost(enum.IntEnum):
    """How costly an operation is. REDUCTION and HEAVY both count as costly."""

    CHEAP = enum.auto()
    REDUCTION = enum.auto()  # not worth hoisting on its own
    HEAVY = enum.auto()  # all other operations


@dataclass(frozen=True)
class _Operation:
    """One step of a program."""

    run: Function  # takes the inputs and returns a list of the outputs
    inputs: list[int]  # the ids of values
    outputs: list[int]
    cost: _Cost
    has_effect: bool


@dataclass(frozen=True)
class _Program:
    """A function, as a list of operations in the order in which they run.

    Every value has an id: its index in ``avals``.
    """

    inputs: list[int]
    operations: list[_Operation]
    outputs: list[int]
    constants: dict[int, Any]  # by id
    avals: list[Any]  # the shape, dtype and weak type of every value


def _to_program(closed_jaxpr: Any) -> _Program:
    """Converts a traced function to a program and inlines plain jits."""
    # Imported here so that partition and merge do not depend on JAX's internals.
    from jax.interpreters.partial_eval import dce_jaxpr

    # Remove dead code. For example, a trainable leaf that a scan carries but never uses
    # would make the whole scan late. dce_jaxpr keeps all constvars, so they still match
    # the consts.
    live_jaxpr, _ = dce_jaxpr(
        closed_jaxpr.jaxpr,
        used_outputs=[True] * len(closed_jaxpr.out_avals),
        instantiate=True,  # keep unused inputs, so that they still match the arguments
    )
    builder = _ProgramBuilder(jaxpr_to_copy=closed_jaxpr)
    inputs = [builder.new_value(variable.aval) for variable in live_jaxpr.invars]
    outputs = builder.add(live_jaxpr, closed_jaxpr.consts, inputs)
    return _Program(
        inputs, builder.operations, outputs, builder.constants, builder.avals
    )


class _ProgramBuilder:
    """Numbers the values of a traced function and collects its operations."""

    def __init__(self, jaxpr_to_copy: Any) -> None:
        self.operations: list[_Operation] = []
        self.constants: dict[int, Any] = {}
        self.avals: list[Any] = []
        # _equation_function replaces the contents of a copy, so any jaxpr will do.
        self.jaxpr_to_copy = jaxpr_to_copy

    def new_value(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def new_constant(self, aval: Any, constant: Any) -> int:
        value_id = self.new_value(aval)
        self.constants[value_id] = constant
        return value_id

    def add(self, jaxpr: Any, consts: Sequence[Any], inputs: list[int]) -> list[int]:
        """Adds the operations of a jaxpr. The inputs and the result are ids of values.

        Plain jits are inlined.
        """
        from jax.extend.core import Literal

        ids: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, constant in zip(jaxpr.constvars, consts, strict=True):
            ids[variable] = self.new_constant(variable.aval, _as_jax_array(constant))

        def id_or_new_constant(atom: Any) -> int:
            if isinstance(atom, Literal):
                return self.new_constant(atom.aval, atom.val)
            return ids[atom]

        for eqn in jaxpr.eqns:
            if _is_plain_jit(eqn):
                # The body binds every argument, so a literal becomes a constant.
                body = eqn.params["jaxpr"]
                arguments = [id_or_new_constant(atom) for atom in eqn.invars]
                outputs = self.add(body.jaxpr, body.consts, arguments)
            else:
                # Literals stay inside the equation; only variables are passed.
                variables = [var for var in eqn.invars if not isinstance(var, Literal)]
                outputs = [self.new_value(variable.aval) for variable in eqn.outvars]
                operation = _Operation(
                    run=_equation_function(eqn, variables, self.jaxpr_to_copy),
                    inputs=[ids[variable] for variable in variables],
                    outputs=outputs,
                    cost=_cost(eqn),
                    has_effect=bool(eqn.effects),
                )
                self.operations.append(operation)
            ids.update(zip(eqn.outvars, outputs, strict=True))
        return [id_or_new_constant(atom) for atom in jaxpr.outvars]


def _equation_function(eqn: Any, variables: list[Any], jaxpr_to_copy: Any) -> Function:
    """Wraps one equation of a jaxpr as a function of its input variables.

    The function runs a jaxpr that has only this equation, as JAX itself would. (Calling
    ``Primitive.bind`` instead would lose the name scope of the equation.) The
    constructors of jaxprs differ between versions of JAX, so this copies an existing
    jaxpr and replaces its constants, inputs, outputs and equations. ``x * x`` lists
    ``x`` twice in ``variables``, which does no harm.
    """
    from jax.extend.core import jaxpr_as_fun

    jaxpr = jaxpr_to_copy.jaxpr.replace(
        constvars=[], invars=variables, outvars=eqn.outvars, eqns=[eqn]
    )
    closed_jaxpr = jaxpr_to_copy.replace(jaxpr=jaxpr, consts=[])
    return cast(Function, jaxpr_as_fun(closed_jaxpr))


def _as_jax_array(constant: Any) -> Any:
    """Converts a constant to a JAX array.

    A traced constant can be a NumPy array. It has no ``.at``, which a custom derivative
    rule may use.
    """
    if not hasattr(constant, "__array__"):  # such as a jax.Ref
        return constant
    with jax.ensure_compile_time_eval():  # a concrete array, even under a trace
        return jnp.asarray(constant)


def _is_plain_jit(eqn: Any) -> bool:
    """Returns whether an equation calls a jitted function without shardings."""
    if eqn.primitive.name not in ("jit", "pjit"):  # "pjit" before JAX 0.7
        return False
    shardings = [*eqn.params["in_shardings"], *eqn.params["out_shardings"]]
    return not any(isinstance(item, jax.sharding.Sharding) for item in shardings)


def _cost(eqn: Any) -> _Cost:
    """Returns the cost of an equation, or that of its costliest part."""
    name = eqn.primitive.name
    if name in _CHEAP:
        return _Cost.CHEAP
    if name in _REDUCTIONS:
        return _Cost.REDUCTION
    if _is_plain_jit(eqn):  # reached only by the recursion below: others are inlined
        body = eqn.params["jaxpr"]
    elif name == "custom_jvp_call":  # such as jax.nn.relu
        body = eqn.params["call_jaxpr"]
    else:
        return _Cost.HEAVY
    return max([_cost(inner_eqn) for inner_eqn in body.eqns], default=_Cost.CHEAP)


def _run(program: _Program, inputs: list[Any]) -> list[Array]:
    """Runs a program and returns its outputs as arrays."""
    values = dict(program.constants)
    values.update(zip(program.inputs, inputs))
    for operation in program.operations:
        arguments = [values[value_id] for value_id in operation.inputs]
        values.update(zip(operation.outputs, operation.run(*arguments)))
    outputs = [values[value_id] for value_id in program.outputs]
    # An output can be a Python number: a literal or an argument passed through.
    # device_put keeps its weak type in every version of JAX.
    return [x if isinstance(x, Array) else jax.device_put(x) for x in outputs]


def _subprogram(
    program: _Program,
    inputs: list[int],
    outputs: list[int],
    keep_effects: bool = False,
) -> _Program:
    """Returns the part of a program that computes outputs from inputs.

    If ``keep_effects`` is True, this includes all operations that have an effect.
    """
    given = set(inputs)
    # Values that the outputs and the chosen operations need.
    live = set(outputs) - given
    operations = []
    for operation in reversed(program.operations):
        is_live = not live.isdisjoint(operation.outputs)
        if is_live or (keep_effects and operation.has_effect):
            operations.append(operation)
            live.update(set(operation.inputs) - given)
    operations.reverse()
    return replace(program, inputs=inputs, operations=operations, outputs=outputs)


def _warn_if_useless(once_program: _Program) -> None:
    if any(operation.cost is _Cost.HEAVY for operation in once_program.operations):
        return
    warnings.warn(
        "hoist found nothing worth computing once per batch: every costly operation, "
        "apart from reductions, depends on a trainable leaf or has an effect, or does "
        "not depend on the batch. If fn closes over data, pass the data as the batch",
        stacklevel=3,
    )


def _values_to_keep(
    program: _Program, trainable: list[int], batch: list[int]
) -> list[int]:
    """Returns the ids of the values to store, in ascending order."""
    # The late and the early values; see the docstring of hoist. All others are fixed.
    late, early = set(trainable), set(batch)
    # Early values that rest needs.
    needed: set[int] = set()
    # Early values that cannot be rebuilt from others: the batch and costly results.
    cannot_rebuild = set(batch)
    # For every other early value, the early values that it is rebuilt from. (The cheap
    # fixed values that it also needs can be computed again.)
    rebuilt_from: dict[int, set[int]] = {}
    # Fixed values that take at least one costly operation to compute.
    costly_fixed: set[int] = set()

    for operation in program.operations:
        early_inputs = early.intersection(operation.inputs)
        # Repeating an operation means repeating the fixed values that it reads, too.
        reads_costly_fixed = not costly_fixed.isdisjoint(operation.inputs)
        is_costly = operation.cost is not _Cost.CHEAP or reads_costly_fixed
        if operation.has_effect or not late.isdisjoint(operation.inputs):
            late.update(operation.outputs)
            needed.update(early_inputs)
        elif early_inputs:
            early.update(operation.outputs)
            if is_costly:
                cannot_rebuild.update(operation.outputs)
            else:
                for value_id in operation.outputs:
                    rebuilt_from[value_id] = early_inputs
        elif is_costly:
            costly_fixed.update(operation.outputs)

    needed.update(early.intersection(program.outputs))
    sizes = [aval.size * aval.dtype.itemsize for aval in program.avals]
    return sorted(_minimum_cut(sorted(needed), cannot_rebuild, rebuilt_from, sizes))


_Node: TypeAlias = tuple[int, str]  # (value id, "in" or "out"), or the sink


def _minimum_cut(
    needed: list[int],
    cannot_rebuild: set[int],
    rebuilt_from: Mapping[int, set[int]],
    sizes: Sequence[int],
) -> set[int]:
    """Returns the values to store so that all needed values can be rebuilt.

    Think of each value as a pipe whose capacity is the size of the value. Flow enters
    at the needed values and runs backwards through the computation: from each value to
    the values that it is rebuilt from. The pipe of a value that cannot be rebuilt ends
    in the sink.

    To store a value is to block its pipe. If the blocked pipes stop all flow, every
    path from a needed value to the sink crosses a stored value, so every needed value
    can be rebuilt. The blocked pipes with the least total capacity are a minimum cut.
    If there are several, this function returns the one nearest to the needed values.

    The largest possible flow equals the capacity of a minimum cut. So send as much flow
    as possible, and block each pipe that further flow could enter but not leave. This
    is the method of Ford and Fulkerson, "Maximal flow through a network" (1956), with
    the shortest paths of Edmonds and Karp (1972). PyTorch's
    ``min_cut_rematerialization_partition`` uses the same idea to choose what to store
    between the forward and the backward pass.

    Args:
      needed: The ids of the values that must be stored or rebuilt.
      cannot_rebuild: The ids of the values that can only be stored.
      rebuilt_from: For all other values, the ids of the values to rebuild them from.
      sizes: The size of every value in bytes, by id.
    """
    # residual[a][b] is how much more flow can go from a to b. Through the pipe of a
    # value, flow goes from (id, "in") to (id, "out").
    sink: _Node = (0, "sink")
    residual: dict[_Node, dict[_Node, float]] = defaultdict(dict)

    def connect(tail: _Node, head: _Node, capacity: float) -> None:
        residual[tail][head] = capacity
        residual[head][tail] = 0  # no flow to send back yet

    for value_id in cannot_rebuild:
        connect((value_id, "in"), (value_id, "out"), sizes[value_id])
        connect((value_id, "out"), sink, math.inf)
    for value_id, input_ids in rebuilt_from.items():
        connect((value_id, "in"), (value_id, "out"), sizes[value_id])
        for input_id in input_ids:
            connect((value_id, "out"), (input_id, "in"), math.inf)

    # Send flow from one needed value at a time, which is much faster than from all of
    # them at once. The last, failed search from a value finds every node that further
    # flow from it could reach. All edges out of these nodes are full, and they stay
    # full, because later searches avoid the nodes.
    reachable: set[_Node] = set()
    for value_id in needed:
        start = (value_id, "in")
        came_from = _search(start, sink, residual, avoid=reachable)
        while sink in came_from:
            _send_flow(came_from, start, sink, residual)
            came_from = _search(start, sink, residual, avoid=reachable)
        reachable.update(came_from)

    # In the cut are the pipes that further flow could enter, but not leave.
    cut = set()
    for value_id, end in reachable:
        if end == "in" and (value_id, "out") not in reachable:
            cut.add(value_id)
    return cut


def _send_flow(
    came_from: Mapping[_Node, _Node],
    start: _Node,
    goal: _Node,
    residual: Mapping[_Node, dict[_Node, float]],
) -> None:
    """Sends as much flow as possible along the path that a search has found."""
    path = []
    node = goal
    while node != start:
        path.append((came_from[node], node))
        node = came_from[node]
    # Every path crosses a pipe, so the flow is finite.
    flow = min(residual[tail][head] for tail, head in path)
    for tail, head in path:
        residual[tail][head] -= flow
        residual[head][tail] += flow


def _search(
    start: _Node,
    goal: _Node,
    residual: Mapping[_Node, Mapping[_Node, float]],
    avoid: set[_Node],
) -> dict[_Node, _Node]:
    """Searches breadth first, along edges with residual capacity.

    The nodes in ``avoid`` count as visited.

    Returns:
      The predecessor of each node that was reached. The search ends at the goal if
      there is a path to it. In that case, the result includes the goal.
    """
    came_from = {start: start}
    queue = deque([start])
    while queue and goal not in came_from:
        node = queue.popleft()
        for neighbor, capacity in residual[node].items():
            if capacity > 0 and neighbor not in came_from and neighbor not in avoid:
                came_from[neighbor] = node
                queue.append(neighbor)
    return came_from


# -------------------------------------------------------------- the walk-through
#
# A worked example: train the first and last layer of an MLP and freeze the middle one.
# If you only need the library, delete everything from here on. The example's imports
# are here so that they go with it.

import argparse
import itertools
import tempfile
from pathlib import Path

__all__ += ["init", "apply", "loss_fn", "sgd_step", "train_step", "train", "dataset"]

Params: TypeAlias = dict[str, dict[str, Array]]


def init(key: Array, sizes: Sequence[int], dtype: Any = jnp.float32) -> Params:
    """Initializes an MLP with the layers ``linear_0``, ``linear_1``, ...

    The parameters equal those of Haiku's ``hk.nets.MLP`` bit for bit. The weights come
    from a normal distribution with standard deviation 1 / sqrt(fan-in), truncated at
    two standard deviations. The biases are zero.

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
        raise ValueError(f"sizes needs at least two widths, got {sizes}")
    for size in sizes:
        _require_positive("every size", size)
    params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        key, subkey = jax.random.split(key)
        # To match Haiku bit for bit, multiply by the rounded reciprocal.
        scale = jnp.asarray(1 / np.sqrt(fan_in), dtype)
        w = scale * jax.random.truncated_normal(subkey, -2, 2, (fan_in, fan_out), dtype)
        params[f"linear_{i}"] = {"w": w, "b": jnp.zeros(fan_out, dtype)}
    return params


def _require_positive(label: str, number: Any) -> None:
    # Not isinstance, because bool is a subclass of int.
    if type(number) not in (int, np.int32, np.int64) or number < 1:
        raise ValueError(f"{label} must be a positive integer, got {number!r}")


def apply(params: Params, x: Array) -> Array:
    """Applies the MLP, with a ReLU between layers.

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
    # JAX sorts keys as strings (linear_10 before linear_2), so build names by counting.
    layers = [f"linear_{i}" for i in range(len(params))]
    if not layers or set(layers) != set(params):
        names = [repr(name) for name in params]
        raise ValueError(
            f"the layers must be linear_0, linear_1, ..., but are {_first_ten(names)}"
        )
    for layer in layers:
        w, b = params[layer]["w"], params[layer]["b"]
        if _is_hole(w) or _is_hole(b):
            raise ValueError(f"{layer} has holes: call merge(trainable, frozen) first")
        if x.shape[-1:] != w.shape[:1]:
            raise ValueError(
                f"{layer} needs inputs of width {w.shape[0]}, got shape {x.shape}"
            )
        if b.shape != w.shape[1:]:
            raise ValueError(
                f"{layer} has w of shape {w.shape} but b of shape {b.shape}"
            )
        if layer != "linear_0":
            x = jax.nn.relu(x)
        x = x @ w  # (..., out)
        # Broadcast explicitly, for users who set jax_numpy_rank_promotion="raise".
        x = x + jnp.broadcast_to(b, x.shape)
    return x


def loss_fn(trainable: PyTree, frozen: PyTree, x: Array, y: Array) -> Array:
    """Returns the mean softmax cross-entropy of the MLP.

    Args:
      trainable: The parameters to differentiate, with holes. ``jax.grad``
        differentiates a function with respect to its first argument.
      frozen: The other parameters, with holes.
      x: The inputs, of shape (..., in).
      y: The labels: integers of shape (...). A row with a label outside
        0, ..., out - 1 adds zero to the sum but still counts in the mean.

    Returns:
      A scalar with the dtype of the logits. For logits narrower than 32 bits, the sum
      is taken in float32.

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
        # one_hot compares in the dtype of y, and class 256 does not fit in 8 bits.
        y = y.astype(jnp.int32)
    is_label = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    # Select instead of multiplying by 0, because 0 * -inf is nan.
    label_log_likelihoods = jnp.where(is_label, jax.nn.log_softmax(logits), 0)
    sum_dtype = jnp.promote_types(logits.dtype, jnp.float32)
    mean = jnp.sum(label_log_likelihoods, dtype=sum_dtype) / y.size
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
    if not _same_structure(params, grads):
        raise ValueError(_structure_error({"params": params, "grads": grads}))

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

    The arguments and errors are those of ``loss_fn`` and ``sgd_step``.

    Returns:
      The new trainable part and the loss before the step.
    """
    _require_floating(trainable)  # jax.grad's own error would not name the leaf
    loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, x, y)
    return sgd_step(trainable, grads, lr), loss


@jax.jit
def train(
    trainable: T, frozen: PyTree, xs: Array, ys: Array, lr: Any = 0.1
) -> tuple[T, Array]:
    """Runs ``train_step`` on many batches in one call, with ``jax.lax.scan``.

    Args:
      trainable: The trainable part.
      frozen: The frozen part.
      xs: The inputs, of shape (steps, batch, ..., in).
      ys: The labels, of shape (steps, batch, ...).
      lr: The learning rate.

    Returns:
      The new trainable part and the losses, of shape (steps,).

    Raises:
      ValueError: If the shapes do not match. For other errors see ``loss_fn`` and
        ``sgd_step``.
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
    """Generates batches for learning the identity: each number is its own label.

    Args:
      key: A JAX random key.
      num_records: The number of batches.
      batch_size: The number of distinct examples in each batch.
      num_classes: Numbers are drawn from 0, ..., num_classes - 1.

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
        print(f"{number} -> {label}")
    print()


def _print_changes(before: Params, after: Params) -> None:
    """Prints which leaves changed and which are unchanged, bit for bit."""
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
    """Returns why a plot cannot be written to ``file``, or None if it can."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "plotting needs matplotlib: pip install matplotlib"
    formats = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in formats:
        return f"the suffix must be one of {', '.join(formats)}"
    if not file.parent.is_dir():
        return "the folder does not exist"
    if file.is_dir():
        return "the path is a folder"
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError:
        return "the folder is not writable"
    return None


def _plot(file: Path, before: Params, after: Params, frozen: PyTree) -> None:
    """Draws each parameter before and after training, with one color scale for both."""
    from matplotlib.figure import Figure

    frozen_names = _names(frozen)
    names = _names(before)
    old_leaves, new_leaves = jax.tree.leaves(before), jax.tree.leaves(after)
    figure = Figure(figsize=(2.4 * len(names), 5.5), layout="constrained")
    columns = figure.subplots(2, len(names)).T  # one pair per parameter
    for name, column, old, new in zip(names, columns, old_leaves, new_leaves):
        limit = max(float(jnp.abs(old).max()), float(jnp.abs(new).max())) or 1.0
        state = "frozen" if name in frozen_names else "trainable"
        images = []
        for axes, leaf, label in zip(column, (old, new), ("before", "after")):
            image = axes.imshow(
                np.atleast_2d(leaf), aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit
            )
            images.append(image)
            axes.set(title=f"{name}\n{state}", xlabel=label, yticks=[])
        figure.colorbar(images[0], ax=list(column), location="bottom")

    # Write to a temporary folder and rename, so that a failure leaves no partial image.
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        finished = Path(folder, file.name)
        figure.savefig(finished, dpi=150)
        finished.replace(file)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the first and last layer of an MLP to learn the identity."""
    parser = argparse.ArgumentParser(
        description="Train an MLP to learn the identity, with its middle layer frozen.",
        usage=argparse.SUPPRESS,  # so that an error is a single line
    )
    parser.add_argument("--steps", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--seed", type=int, default=42, help="default: 42")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all parameters")
    args = parser.parse_args(argv)
    if not 1 <= args.steps <= 10**7:  # all batches must fit in memory
        parser.error(f"--steps must be from 1 to 10,000,000, got {args.steps}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    if args.plot:
        error = _plot_error(args.plot)
        if error is not None:
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
