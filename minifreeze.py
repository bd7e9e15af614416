# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.5.1", "numpy"]
# ///
# SPDX-License-Identifier: MIT
"""minifreeze: train part of a JAX model and hold the rest still, in one file to copy.

    trainable, frozen = partition("linear_2", params)       # or a list, or a predicate
    loss, grads = jax.value_and_grad(my_loss)(trainable, frozen, x, y)
    trainable = sgd_step(trainable, grads)                  # or optax: state for what trains
    params = merge(trainable, frozen)                       # inside my_loss, and at the end
    once, rest = hoist(my_loss, trainable, frozen, x, y)    # the frozen prefix, computed once
    print(summary(trainable=trainable, frozen=frozen))

It works on any pytree and knows no layers: the MLP below is there to show it at work
(``python minifreeze.py``). It holds no state, draws no keys, donates no arrays, and is no
optimizer, no checkpointer and no module system: optax, Orbax and Equinox are good at those.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any, TypeAlias

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, keystr, register_dataclass, tree_flatten_with_path

__all__ = [
    "init",
    "apply",
    "Hole",
    "partition",
    "merge",
    "mask",
    "warm_start",
    "summary",
    "loss_fn",
    "sgd_step",
    "train_step",
    "train",
    "hoist",
    "dataset",
]
__version__ = "0.1.0"

PyTree: TypeAlias = Any
KeyPath: TypeAlias = tuple[Any, ...]
Params: TypeAlias = dict[str, dict[str, jax.Array]]
Where: TypeAlias = str | Sequence[str] | Callable[[KeyPath, Any], bool]

# ----------------------------------------------------------------------------- the model


def init(key: jax.Array, sizes: Sequence[int], dtype: Any = jnp.float32) -> Params:
    """Draws the parameters of an MLP: weights from a truncated normal, biases zero.

    >>> jax.tree.map(jnp.shape, init(jax.random.key(0), [1, 300, 10]))
    {'linear_0': {'b': (300,), 'w': (1, 300)}, 'linear_1': {'b': (10,), 'w': (300, 10)}}

    ``key`` is one key of either style. Layer i has ``w`` of shape (sizes[i], sizes[i + 1])
    and ``b`` of shape (sizes[i + 1],). The recipe is dm-haiku's for ``hk.nets.MLP``, bit for
    bit: one split a layer, a standard deviation of 1/sqrt(fan-in), cut at two of them.
    Raises ValueError for fewer than two sizes or one that is not a positive integer.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes needs an input and an output width, got {sizes!r}")
    for i, size in enumerate(sizes):
        _require_positive(f"sizes[{i}]", size)
    params = {}
    for i, shape in enumerate(pairwise(sizes)):
        key, subkey = jax.random.split(key)
        # Multiplying by the rounded reciprocal, not dividing, is what Haiku's bits come from.
        scale = jnp.asarray(1 / np.sqrt(shape[0]), dtype)
        w = scale * jax.random.truncated_normal(subkey, -2, 2, shape, dtype)
        params[f"linear_{i}"] = {"w": w, "b": jnp.zeros(shape[1], dtype)}
    return params


def apply(params: Params, x: jax.Array) -> jax.Array:
    """Gives the logits of the MLP: ReLU between its layers, none after the last.

    >>> apply(init(jax.random.key(0), [1, 300, 10]), jnp.ones((5, 1))).shape
    (5, 10)

    ``x`` is (..., in), the result (..., out). Layers run in the order of their numbers.
    Raises ValueError for a width that does not fit, for layers whose names are not
    linear_0, linear_1, ..., and for parameters with holes (``merge`` fills them).
    """
    x = jnp.asarray(x)
    nodes, _ = tree_flatten_with_path(params, is_leaf=_is_hole)
    if missing := [_name(path) for path, node in nodes if _is_hole(node)]:
        raise ValueError(f"params has holes at {missing}: merge(trainable, frozen) first")
    # A tree function returns dicts sorted, linear_10 before linear_2: count, do not iterate.
    layers = [f"linear_{i}" for i in range(len(params))]
    if not layers or set(layers) != set(params):
        raise ValueError(f"params must hold linear_0, linear_1, ..., it holds {list(params)}")
    for layer in layers:
        w, b = params[layer]["w"], params[layer]["b"]
        if x.shape[-1:] != w.shape[:1]:
            raise ValueError(f"{layer} takes inputs of width {w.shape[0]}, got shape {x.shape}")
        x = x @ w + b  # (..., out)
        if layer != layers[-1]:
            x = jax.nn.relu(x)
    return x


# ----------------------------------------------------------------------------- the trees


@register_dataclass
@dataclass(frozen=True, init=False)  # no __init__ in Python: jit rebuilds a hole faster
class Hole:
    """Stands where another part holds the leaf: a pytree node without leaves.

    >>> jax.tree.leaves(Hole()), Hole() == None, Hole() == Hole()
    ([], False, True)
    """

    __slots__ = ()


def partition(where: Where, tree: PyTree) -> tuple[PyTree, PyTree]:
    """Splits ``tree`` into (selected, rest), each with holes where the other holds the leaf.

    >>> partition("a/*", {"a": {"w": 1, "b": 2}, "c": 3})
    ({'a': {'b': 2, 'w': 1}, 'c': Hole()}, {'a': {'b': Hole(), 'w': Hole()}, 'c': 3})

    ``where`` is one of:

    - a predicate ``(path, leaf) -> bool``, with the key path of ``tree_map_with_path``;
    - a glob (``fnmatch.fnmatchcase``: ``*`` crosses ``/``) over the leaf's name, which is
      ``keystr(path, simple=True, separator="/")``, or over the name of something above it:
      ``"a"`` takes ``a/w`` and ``a/b``, never ``ab/w``;
    - a tuple or list of globs of which the last that matches a leaf decides: a glob takes,
      one after ``!`` gives back, and a first with ``!`` starts from everything. One string
      is a list of one: ``"!a"`` takes everything but ``a``.

    Leaves are shared with ``tree``, never copied. ``merge`` is the inverse.
    Raises ValueError for a glob that matches no leaf, TypeError for a ``where`` or an answer
    of another type; what a predicate raises passes through.
    """
    chosen, leaves, treedef = _choose(where, tree)
    hole = Hole()
    selected = [leaf if take else hole for take, leaf in zip(chosen, leaves)]
    rest = [hole if take else leaf for take, leaf in zip(chosen, leaves)]
    return jax.tree.unflatten(treedef, selected), jax.tree.unflatten(treedef, rest)


def merge(*parts: PyTree) -> PyTree:
    """Puts parts of one tree together again: the inverse of ``partition``, in any order.

    >>> merge({"a": Hole(), "b": 2}, {"a": 1, "b": Hole()})
    {'a': 1, 'b': 2}

    Every leaf must be held by exactly one part: raises ValueError with every path that is
    held twice (equal values too), by no part, or where the structures differ.
    """
    if not parts:
        raise TypeError("merge needs at least one part")
    named = {f"part {i}": part for i, part in enumerate(parts)}
    columns, treedef = _align(named, owners=[1])
    leaves: list[Any] = []
    for slot in zip(*columns):
        held = [leaf for leaf in slot if not _is_hole(leaf)]
        if len(held) != 1:
            raise _misfit(named, owners=[1])
        leaves += held
    return jax.tree.unflatten(treedef, leaves)


def mask(where: Where, tree: PyTree) -> PyTree:
    """Gives the choice of ``partition(where, tree)`` as a tree of bools, True for selected.

    >>> mask("*/b", {"a": {"w": 1, "b": 2}, "c": 3})
    {'a': {'b': True, 'w': False}, 'c': False}

    It serves ``optax.masked`` and ``eqx.partition``. Raises what ``partition`` raises.
    """
    chosen, _, treedef = _choose(where, tree)
    return jax.tree.unflatten(treedef, chosen)


def warm_start(new: PyTree, old: PyTree) -> PyTree:
    """Gives ``new`` with every leaf that ``old`` holds at the same key path in its place.

    >>> warm_start({"a": 0, "b": 0, "c": Hole()}, {"a": 7, "b": Hole(), "c": 8})
    {'a': 7, 'b': 0, 'c': Hole()}

    For an optimizer's state after the frozen set has changed, ``warm_start(
    optimizer.init(trainable), state)``: surviving moments are kept (and the step count), new
    ones start fresh, dropped ones go; and for a checkpoint of a part. Leaves are shared.
    Raises ValueError, with path and both, for shapes or dtypes that do not fit.
    """
    entries, _ = tree_flatten_with_path(old)
    held = dict(entries)
    if len(held) < len(entries):
        twins = [_name(path) for path, n in Counter(path for path, _ in entries).items() if n > 1]
        raise ValueError(f"old has two leaves of one key path: {twins}")
    fresh, treedef = tree_flatten_with_path(new)
    leaves = [held.get(path, leaf) for path, leaf in fresh]
    _refuse_misfits(((*entry, leaf) for entry, leaf in zip(fresh, leaves)), "new", "old")
    return jax.tree.unflatten(treedef, leaves)


def summary(**parts: PyTree) -> str:
    """Tells as a table what each part holds: a row a leaf in tree order, a row a part.

    >>> print(summary(trainable={"w": jnp.ones((2, 3)), "b": Hole()},
    ...               frozen={"w": Hole(), "b": jnp.ones(2)}))
    path  shape   dtype    count  part
    b     (2,)    float32      2  frozen
    w     (2, 3)  float32      6  trainable
    <BLANKLINE>
    part       count  bytes   share
    trainable      6     24   75.0%
    frozen         2      8   25.0%
    total          8     32  100.0%

    ``count`` is in elements, ``bytes`` is count times the dtype's size, ``share`` is of the
    count. Arrays, abstract arrays and tracers give the same text; a leaf that is no array
    counts nothing. Parts need not cover the whole tree, but raises ValueError for a leaf in
    two parts and for structures that differ, TypeError for no part.
    """
    if not parts:
        raise TypeError("summary needs at least one part, as in summary(params=params)")
    columns, _ = _align(parts, owners=[0, 1])
    rows = [["path", "shape", "dtype", "count", "part"]]
    counts, sizes = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
    for path, *slot in zip(_paths(parts), *columns):
        held = [(part, leaf) for part, leaf in zip(parts, slot) if not _is_hole(leaf)]
        if len(held) > 1:
            raise _misfit(parts, owners=[0, 1])
        for part, leaf in held:
            shape, dtype = _spec(leaf)
            count = 0 if shape is None else math.prod(shape)
            counts[part] += count
            sizes[part] += count and count * dtype.itemsize
            text = "-" if shape is None else str(shape)
            rows.append([_name(path), text, str(dtype), str(count), part])
    total = sum(counts.values())
    totals = [["part", "count", "bytes", "share"]]
    for part, count, size in [
        *((part, counts[part], sizes[part]) for part in parts),
        ("total", total, sum(sizes.values())),
    ]:
        totals.append([part, str(count), str(size), f"{count / total if total else 0:.1%}"])
    return f"{_table(rows, right=[3])}\n\n{_table(totals, right=[1, 2, 3])}"


def _is_hole(node: Any) -> bool:
    return isinstance(node, Hole)


def _name(path: KeyPath) -> str:
    """A leaf's name, for people and patterns; its identity is the key path itself."""
    return keystr(path, simple=True, separator="/")


def _spec(leaf: Any) -> tuple[Any, Any]:
    """Shape and dtype of an array, an abstract array or a number; else None and the type."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type):
        return tuple(leaf.shape), leaf.dtype
    if isinstance(leaf, bool | int | float | complex):
        return (), jnp.result_type(leaf)
    return None, type(leaf).__name__


def _show(leaf: Any) -> str:
    shape, dtype = _spec(leaf)
    return str(dtype) if shape is None else f"{dtype}[{','.join(map(str, shape))}]"


def _table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Rows of cells as aligned text; the columns in ``right`` are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


def _choose(where: Where, tree: PyTree) -> tuple[list[bool], list[Any], Any]:
    """Which leaves ``where`` takes, the leaves, and the tree's structure."""
    leaves, treedef = jax.tree.flatten(tree)
    if isinstance(where, str | tuple | list):
        patterns = [where] if isinstance(where, str) else where
        chosen = _match(patterns, list(_names(tree)))
    elif callable(where):
        chosen = [_ask(where, path, leaf) for path, leaf in _leaves(tree)]
    else:
        raise TypeError(
            "where must be a predicate (path, leaf) -> bool, a pattern, or a tuple or list of "
            f"patterns, got {type(where).__name__}: {where!r}"
        )
    return chosen, leaves, treedef


def _leaves(tree: PyTree) -> Iterator[tuple[KeyPath, Any]]:
    """Every leaf with its key path; of a dict, one child after the other.

    Thousands of key paths alive at once set off the garbage collector, which costs more than
    all the rest of ``partition``.
    """
    if type(tree) is dict:
        for key in sorted(tree):  # as JAX does
            for path, leaf in tree_flatten_with_path(tree[key])[0]:
                yield (DictKey(key), *path), leaf
    else:
        yield from tree_flatten_with_path(tree)[0]


def _names(tree: PyTree, above: str = "") -> Iterator[str]:
    """The name of every leaf; below dicts without making key paths, which is twice as fast."""
    if type(tree) is dict:
        for key in sorted(tree):
            yield from _names(tree[key], f"{above}{key!s}/")
    else:
        for path, _ in tree_flatten_with_path(tree)[0]:
            yield above + _name(path) if path else above[:-1]


def _match(patterns: Sequence[str], names: list[str]) -> list[bool]:
    """For each name: does the last pattern that matches it take it?"""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be a string, got {pattern!r} in {patterns!r}")
    if not patterns:
        raise ValueError(f"an empty list of patterns takes nothing; {_nearest('', names)}")
    chosen = [patterns[0].startswith("!")] * len(names)
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        # As * crosses /, glob/* matches name/ iff glob matches the name or one above it.
        match = re.compile(fnmatch.translate(f"{glob}/*")).match
        matches = [match(f"{name}/") is not None for name in names]
        if not glob or not any(matches):
            raise ValueError(f"pattern {pattern!r} matches no leaf; {_nearest(glob, names)}")
        take = not pattern.startswith("!")
        chosen = [take if hit else was for hit, was in zip(matches, chosen)]
    return chosen


def _nearest(glob: str, names: list[str]) -> str:
    """Up to ten names, those first that are most like ``glob``, in whole or at either end."""
    depth = len(glob.split("/"))

    def likeness(name: str) -> float:
        steps = name.split("/")
        alike = {name, "/".join(steps[:depth]), "/".join(steps[-depth:])}
        return max(difflib.SequenceMatcher(None, some, glob).ratio() for some in alike)

    nearest = sorted(names, key=likeness, reverse=True)[:10]
    return f"{len(nearest)} of {len(names)} names, nearest first: {nearest}"


def _ask(where: Callable[[KeyPath, Any], bool], path: KeyPath, leaf: Any) -> bool:
    """The predicate's answer, which must be a bool known without the leaf's value."""
    rule = "a choice may depend on path, shape and dtype only"
    try:
        answer = where(path, leaf)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise TypeError(f"the predicate looked at the value of {_name(path)!r}; {rule}") from error
    if not isinstance(answer, (bool, np.bool_)):
        raise TypeError(
            f"the predicate must return a bool, got {answer!r} at {_name(path)!r}; {rule}"
        )
    return bool(answer)


def _align(parts: Mapping[str, PyTree], owners: Container[int]) -> tuple[Any, Any]:
    """Of every part its leaves and holes in tree order, and the structure that all share."""
    columns, outlines = zip(*(jax.tree.flatten(part, is_leaf=_is_hole) for part in parts.values()))
    if any(outline != outlines[0] for outline in outlines):
        raise _misfit(parts, owners)
    return columns, outlines[0]


def _paths(parts: Mapping[str, PyTree]) -> list[KeyPath]:
    """The key paths of the leaves and holes of parts that share a structure."""
    entries, _ = tree_flatten_with_path(next(iter(parts.values())), is_leaf=_is_hole)
    return [path for path, _ in entries]


def _misfit(parts: Mapping[str, PyTree], owners: Container[int]) -> ValueError:
    """The error for parts that are unlike, or of which more or fewer than may hold a leaf."""
    return ValueError(f"the parts do not fit: {'; '.join(_problems(parts, owners, ()))}")


def _problems(nodes: Mapping[str, PyTree], owners: Container[int], path: KeyPath) -> Iterator[str]:
    """Says of each place from ``path`` on where the parts do not fit what each has there."""
    kinds: dict[str, Any] = {}
    outlines: dict[str, Any] = {}
    below: dict[str, dict[Any, Any]] = {}
    for part, node in nodes.items():
        entries, outlines[part] = tree_flatten_with_path(
            node, is_leaf=lambda inner, node=node: inner is not node or _is_hole(inner)
        )
        kinds[part] = None if outlines[part] == jax.tree.structure(0) else type(node)
        seen: Counter[KeyPath] = Counter()  # a custom node may give two children one key
        below[part] = {}
        for key, child in entries:
            below[part][key, seen[key]] = child
            seen[key] += 1
    if set(kinds.values()) == {None}:
        held = [part for part, node in nodes.items() if not _is_hole(node)]
        if len(held) not in owners:
            yield f"{_name(path)!r} is held by {' and '.join(held) or 'none'}"
    elif len(set(kinds.values())) > 1:
        names = {part: kind.__name__ if kind else "a leaf" for part, kind in kinds.items()}
        names |= {part: "a hole" for part, node in nodes.items() if _is_hole(node)}
        yield f"{_name(path)!r} is {', '.join(f'{names[part]} in {part}' for part in nodes)}"
    else:
        keys = dict.fromkeys(key for children in below.values() for key in children)
        for key in keys:
            here = {part: children[key] for part, children in below.items() if key in children}
            if len(here) == len(nodes):
                yield from _problems(here, owners, path + key[0])
            else:
                yield f"{_name(path + key[0])!r} is only in {' and '.join(here)}"
        first, *others = outlines.values()
        if any(other != first for other in others) and all(
            children.keys() == keys.keys() for children in below.values()
        ):  # the same keys, but other metadata
            told = ", ".join(f"{outlines[part]} in {part}" for part in nodes)
            yield f"{_name(path)!r} is {told}"


def _refuse_misfits(triples: Iterable[tuple[KeyPath, Any, Any]], one: str, other: str) -> None:
    """Raises ValueError with every path at which the two leaves differ in shape or dtype."""
    if misfits := [
        f"{_name(path)!r} is {_show(a)} in {one}, {_show(b)} in {other}"
        for path, a, b in triples
        if _spec(a) != _spec(b)
    ]:
        raise ValueError(f"shapes and dtypes must fit: {'; '.join(misfits)}")


# ----------------------------------------------------------------------------- the training


def loss_fn(trainable: PyTree, frozen: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    """Gives the mean softmax cross-entropy of the MLP's logits, a scalar.

    >>> params = {"linear_0": {"w": jnp.zeros((1, 4)), "b": jnp.zeros(4)}}
    >>> print(loss_fn(*partition("*/w", params), jnp.ones((5, 1)), jnp.arange(5) % 4))
    1.3862944

    ``x`` is (..., in), ``y`` (...) integer labels; a label outside 0 .. out - 1 adds nothing.
    Raises ValueError for shapes that do not fit, TypeError for labels that are no integers.
    """
    logits, y = apply(merge(trainable, frozen), x), jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {y.dtype}")
    if y.shape != logits.shape[:-1]:
        raise ValueError(f"labels of shape {y.shape} do not fit logits of shape {logits.shape}")
    targets = jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / y.size


def sgd_step(params: PyTree, grads: PyTree, lr: Any = 0.1) -> PyTree:
    """Gives ``p - g * lr`` for every leaf; holes stay holes.

    >>> sgd_step({"w": 1.0, "b": Hole()}, {"w": 0.5, "b": Hole()}, lr=0.5)
    {'b': Hole(), 'w': 0.75}
    """
    return jax.tree.map(lambda p, g: p - g * lr, params, grads)


@jax.jit
def train_step(
    trainable: PyTree, frozen: PyTree, x: jax.Array, y: jax.Array, lr: Any = 0.1
) -> tuple[PyTree, jax.Array]:
    """Takes one SGD step on ``loss_fn``: (trainable, the loss before the step).

    Differentiates one argument of two, and that is all that freezing takes: no gradient of a
    frozen leaf is computed, or can be read. Jitted, one trace a frozen set; the caller's
    arrays stay alive. Raises what ``loss_fn`` raises, TypeError for a trainable leaf that
    is not floating-point.
    """
    for path, leaf in tree_flatten_with_path(trainable)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{_name(path)!r} is {leaf.dtype} and cannot train: freeze it")
    loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, x, y)
    # Of a float32 rate, bfloat16 parameters must not become float32.
    new = jax.tree.map(lambda p, q: q.astype(p.dtype), trainable, sgd_step(trainable, grads, lr))
    return new, loss


@jax.jit
def train(
    trainable: PyTree, frozen: PyTree, xs: jax.Array, ys: jax.Array, lr: Any = 0.1
) -> tuple[PyTree, jax.Array]:
    """Takes a ``train_step`` for each batch, in one dispatch: (trainable, losses).

    ``xs`` (steps, batch, in) and ``ys`` (steps, batch) give ``losses`` (steps,), and the
    parameters that the same steps in a loop give. Jitted, as ``train_step`` is.
    """
    return jax.lax.scan(
        lambda trainable, batch: train_step(trainable, frozen, *batch, lr), trainable, (xs, ys)
    )


# ------------------------------------------------------------------- the frozen prefix, once

# Equations that are cheap to run again, and how many bytes of a batch that must save: what
# moves elements costs next to nothing, what computes them one by one is to save something
# (one-hot rows are made of the labels). A product, a random draw, a loop is never run again.
_CHEAP = dict.fromkeys(
    "broadcast_in_dim convert_element_type expand_dims reshape squeeze".split(), 0
) | dict.fromkeys(
    "add and concatenate div eq ge gt le lt max min mul ne neg not or select_n sub".split(), 1
)


def hoist(
    fn: Callable[..., Any], trainable: PyTree, frozen: PyTree, *batch: PyTree
) -> tuple[Callable[..., tuple[jax.Array, ...]], Callable[..., Any]]:
    """Splits ``fn(trainable, frozen, *batch)`` into what no trainable leaf touches and the rest.

    >>> def fn(trainable, frozen, x):
    ...     return jnp.tanh(x @ frozen) @ trainable
    >>> trainable, frozen, x = jnp.ones(2), jnp.ones((3, 2)), jnp.ones((5, 3))
    >>> once, rest = hoist(fn, trainable, frozen, x)
    >>> kept = once(frozen, x)
    >>> [features.shape for features in kept], rest(trainable, frozen, kept).shape
    ([(5, 2)], (5,))

    JAX writes ``fn`` down as a list of equations, a jaxpr. An equation that needs a trainable
    leaf (or has a side effect) must run at every step; one that needs the batch but no
    trainable leaf gives the same at every visit of that batch, so ``once`` runs it and
    ``kept`` carries what the others still need of it. One that needs neither runs where it
    is needed: kept with every batch, it would fill the memory with weights.

    ``kept = once(frozen, *batch)`` is a tuple of arrays, ``rest(trainable, frozen, kept)``
    equals ``fn(trainable, frozen, *batch)`` and has its gradients in ``trainable``. Both can
    be jitted, differentiated, vmapped and scanned. Only shapes and dtypes are read, so
    ``ShapeDtypeStruct``s serve; a call with others raises ValueError with both. Jits are
    looked through; other calls (scan, cond, remat, custom derivatives) are one equation.
    Randomness in the batch (a dropout key) is fixed with the batch: for a fresh draw at
    every step, hand the key in with what trains. Made as jax #3617 advises.
    """
    made_for = jax.eval_shape(lambda *args: args, trainable, frozen, batch)
    # A function of its own, for JAX remembers what it traced, and fn may close over new values.
    traced, out = jax.make_jaxpr(lambda *args: fn(*args), return_shape=True)(
        trainable, frozen, *batch
    )
    opened = jax.make_jaxpr(partial(_open_jits, traced))(*jax.tree.leaves(made_for))
    eqns, outvars, invars = opened.jaxpr.eqns, opened.jaxpr.outvars, iter(opened.jaxpr.invars)
    trainable_vars, frozen_vars, batch_vars = (
        list(islice(invars, len(jax.tree.leaves(arg)))) for arg in made_for
    )

    every_step = set(trainable_vars)
    sources = {var: {var} for var in batch_vars}  # the fewest bytes to have a variable again
    roots = {var: {var} for var in batch_vars}  # and where it can be had from at any cost
    for eqn in eqns:
        inputs = _variables(eqn.invars)
        if eqn.effects or not every_step.isdisjoint(inputs):
            every_step.update(eqn.outvars)
        elif behind := _behind(inputs, sources):
            for var in eqn.outvars:
                sources[var] = roots[var] = {var}
            if (least := _CHEAP.get(eqn.primitive.name)) is not None:
                (var,) = eqn.outvars
                roots[var] = _behind(inputs, roots)
                if _bytes([var]) - _bytes(behind) >= least:
                    sources[var] = behind

    # Keep what stands behind all that the equations of every step need of the batch, but
    # nothing that can be had from the rest of it.
    last = _eqns_for(outvars, eqns, given=sources)
    kept = _behind([*outvars, *(atom for eqn in last for atom in eqn.invars)], sources)
    kept_vars = [var for var in sources if var in kept and not roots[var] <= kept - {var}]

    pure = [eqn for eqn in eqns if not eqn.effects]
    run_once = _function(
        opened, [*frozen_vars, *batch_vars], _eqns_for(kept_vars, pure, given=()), kept_vars
    )
    run_rest = _function(
        opened,
        [*trainable_vars, *frozen_vars, *kept_vars],
        _eqns_for(outvars, eqns, given=kept_vars),
        outvars,
    )
    kept_for = tuple(jax.eval_shape(run_once, *jax.tree.leaves(made_for[1:])))

    def once(frozen: PyTree, *batch: PyTree) -> tuple[jax.Array, ...]:
        made_with = {"frozen": made_for[1], "batch": made_for[2]}
        return tuple(
            map(jnp.asarray, run_once(*_checked(made_with, {"frozen": frozen, "batch": batch})))
        )

    def rest(trainable: PyTree, frozen: PyTree, kept: tuple[jax.Array, ...]) -> Any:
        made_with = {"trainable": made_for[0], "frozen": made_for[1], "kept": kept_for}
        given = {"trainable": trainable, "frozen": frozen, "kept": kept}
        leaves = map(jnp.asarray, run_rest(*_checked(made_with, given)))
        return jax.tree.unflatten(jax.tree.structure(out), leaves)

    return once, rest


def _open_jits(closed: Any, *args: Any) -> list[Any]:
    """Runs a jaxpr; traced, it gives the same jaxpr with the body of every jit in its place."""
    env = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args]))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

    for eqn in closed.jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):  # its name until jax 0.6
            outs = _open_jits(eqn.params["jaxpr"], *map(read, eqn.invars))
        else:
            inputs = _variables(eqn.invars)
            outs = _function(closed, inputs, [eqn], eqn.outvars)(*map(read, inputs))
        env.update(zip(eqn.outvars, outs))
    return list(map(read, closed.jaxpr.outvars))


def _function(
    closed: Any, invars: Sequence[Any], eqns: Sequence[Any], outvars: Sequence[Any]
) -> Callable[..., list[Any]]:
    """Some equations of a jaxpr as a function from ``invars`` to ``outvars``."""
    part = closed.jaxpr.replace(invars=invars, eqns=eqns, outvars=outvars)
    run: Callable[..., list[Any]] = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(part, closed.consts))
    return run


def _eqns_for(outvars: Sequence[Any], eqns: Sequence[Any], given: Container[Any]) -> list[Any]:
    """The equations, of ``eqns``, that ``outvars`` need beyond what is given, and all effects."""
    needed, chosen = set(_variables(outvars)), []
    for eqn in reversed(eqns):
        if eqn.effects or any(var in needed and var not in given for var in eqn.outvars):
            needed.update(_variables(eqn.invars))
            chosen.append(eqn)
    return chosen[::-1]


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(a for a in atoms if not isinstance(a, jex_core.Literal)))


def _behind(atoms: Iterable[Any], origins: Mapping[Any, set[Any]]) -> set[Any]:
    return set().union(*(origins.get(var, ()) for var in _variables(atoms)))


def _bytes(variables: Iterable[Any]) -> int:
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables)


def _checked(made_with: dict[str, PyTree], given: dict[str, PyTree]) -> list[Any]:
    """The leaves of a call's arguments, which must be like those that hoist was made with."""
    abstract = jax.eval_shape(lambda given: given, given)
    sides = {"hoist": made_with, "the call": abstract}
    columns, _ = _align(sides, owners=[0, 2])
    _refuse_misfits(zip(_paths(sides), *columns), *sides)
    return [leaf for arg in given.values() for leaf in jax.tree.leaves(arg)]


# ----------------------------------------------------------------------- the walk-through


def dataset(
    key: jax.Array, num_records: int, batch_size: int = 10, num_classes: int = 10
) -> tuple[jax.Array, jax.Array]:
    """Draws batches of numbers that are their own labels: (xs, ys), on the device.

    >>> xs, ys = dataset(jax.random.key(0), num_records=7, batch_size=5)
    >>> xs.shape, xs.dtype.name, ys.shape, ys.dtype.name
    ((7, 5, 1), 'float32', (7, 5), 'int32')

    A row is drawn from 0 .. num_classes - 1 without replacement: raises ValueError where
    batch_size is greater than num_classes, or one of the three is no positive integer.
    """
    for name, size in [
        ("num_records", num_records),
        ("batch_size", batch_size),
        ("num_classes", num_classes),
    ]:
        _require_positive(name, size)
    if batch_size > num_classes:
        raise ValueError(f"batch_size {batch_size} is more than num_classes {num_classes}")
    labels = jnp.arange(num_classes, dtype=jnp.int32)
    keys = jax.random.split(key, num_records)
    ys = jax.vmap(lambda key: jax.random.permutation(key, labels)[:batch_size])(keys)
    return ys[..., None].astype(jnp.float32), ys


def _require_positive(name: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"{name} must be a positive integer, got {size!r}")


def _plot(file: str, before: Params, after: Params, frozen: PyTree) -> None:
    """Draws every parameter as a heatmap, before above after, one colour scale a parameter."""
    from matplotlib.figure import Figure

    pairs = list(zip(*(tree_flatten_with_path(params)[0] for params in (before, after))))
    held = {path for path, _ in tree_flatten_with_path(frozen)[0]}
    figure = Figure(figsize=(2.4 * len(pairs), 5.5), layout="constrained")
    for column, pair in zip(figure.subplots(2, len(pairs)).T, pairs):
        limit = max(float(jnp.abs(leaf).max()) for _, leaf in pair) or 1.0
        for axis, (path, leaf), when in zip(column, pair, ("before", "after")):
            color = "tab:blue" if path in held else "black"
            axis.set_title(f"{_name(path)}\n{'frozen' if path in held else 'trains'}", color=color)
            axis.spines[:].set_color(color)
            axis.set(xticks=[], yticks=[], xlabel=when)
            axis.imshow(np.atleast_2d(leaf), aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
        figure.colorbar(column[0].images[0], ax=list(column), location="bottom")
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the first and the last layer of an MLP on the identity, its middle one frozen."""
    import argparse
    import os

    # Without its usage text, argparse says what is wrong in one line (and exits with 2).
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="default: 10000")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="default: 42")
    parser.add_argument("--plot", metavar="FILE", help="draw the parameters before and after")
    args = parser.parse_args(argv)
    for option, value, low, high in [
        ("--steps", args.steps, 1, 10**7),  # more batches than that fill the memory
        ("--seed", args.seed, 0, 2**32 - 1),
    ]:
        if not low <= value <= high:
            parser.error(f"{option} must be in {low} .. {high}, got {value}")
    if args.plot is not None:
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ImportError:
            parser.error(
                "--plot needs matplotlib: pip install matplotlib, or uv run --with matplotlib"
            )
        kind = os.path.splitext(args.plot)[1].removeprefix(".").lower()
        if kind not in FigureCanvasBase.get_supported_filetypes():
            parser.error(f"--plot {args.plot}: {kind!r} is no kind of picture (try .png)")
        try:
            is_new = not os.path.exists(args.plot)
            open(args.plot, "ab").close()
            if is_new:
                os.remove(args.plot)
        except OSError as error:
            parser.error(f"--plot {args.plot}: {error.strerror}")

    def show(title: str, params: Params, numbers: jax.Array) -> None:
        x = numbers[:, None].astype(jnp.float32)
        labels = jnp.argmax(apply(params, x), axis=1)
        print(title, *(f"{row} -> {label}" for row, label in zip(np.asarray(x), labels)), sep="\n")

    key = jax.random.key(args.seed)
    before = init(key, [1, 300, 100, 10])
    trainable, frozen = partition(("linear_0", "linear_2"), before)
    show("before training", before, jnp.arange(10))
    print(f"\n{summary(trainable=trainable, frozen=frozen)}\n")

    xs, ys = dataset(jax.random.fold_in(key, 1), args.steps)
    trainable, losses = train(trainable, frozen, xs, ys)
    after = merge(trainable, frozen)
    print(f"{args.steps} steps, loss {losses[0]:.6f} -> {losses[-1]:.6f}\n")
    show("after training", after, jnp.arange(10))
    show("\nout of range", after, jnp.arange(10, 20))

    same: dict[bool, list[str]] = {False: [], True: []}
    for (path, was), leaf in zip(tree_flatten_with_path(before)[0], jax.tree.leaves(after)):
        same[np.asarray(was).tobytes() == np.asarray(leaf).tobytes()].append(_name(path))
    print(f"\nchanged: {', '.join(same[False])}\nbit for bit as before: {', '.join(same[True])}")
    if args.plot is not None:
        try:
            _plot(args.plot, before, after, frozen)
        except (OSError, RuntimeError) as error:  # a full disk, a format that needs LaTeX
            parser.error(f"--plot {args.plot}: {' '.join(str(error).split())}")
        print(f"drawn: {args.plot}")


if __name__ == "__main__":
    main()
