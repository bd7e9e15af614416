# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.5.1", "numpy"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the minifreeze authors
"""minifreeze: train part of a JAX model and hold the rest still, in one file to copy.

    trainable, frozen = partition("linear_2", params)       # or a list, or a predicate
    loss, grads = jax.value_and_grad(my_loss)(trainable, frozen, x, y)
    trainable = sgd_step(trainable, grads)                  # or optax: state for what trains
    params = merge(trainable, frozen)                       # inside my_loss, and at the end
    once, rest = hoist(my_loss, trainable, frozen, x, y)    # the frozen prefix, computed once
    print(summary(trainable=trainable, frozen=frozen))

It works on any pytree and knows no layers. It holds no state, draws no keys, donates no
arrays, and is no optimizer, no checkpointer and no module system: optax, Orbax and Equinox
are good at those. For the tool alone, copy what stands above the walk-through: the MLP below
is there to show it at work (``python minifreeze.py``).
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal, jaxpr_as_fun
from jax.tree_util import all_leaves, keystr, register_dataclass, tree_flatten_with_path

__all__ = ["Hole", "partition", "merge", "mask", "summary", "warm_start", "hoist"]
__version__ = "0.2.0"

T = TypeVar("T")
PyTree: TypeAlias = Any
Fn: TypeAlias = Callable[..., Any]
Where: TypeAlias = str | Sequence[str] | Callable[[tuple[Any, ...], Any], bool]


@register_dataclass
@dataclass(frozen=True)
class Hole:
    """Stands where another part holds the leaf: a pytree node without leaves.

    >>> jax.tree.leaves(Hole()), Hole() == None, Hole() == Hole()
    ([], False, True)
    """


def _is_hole(node: Any) -> bool:
    return isinstance(node, Hole)


_name = partial(keystr, simple=True, separator="/")  # for people; its key path is its identity


def _ten(items: Iterable[Any]) -> str:
    """Ten texts or names of key paths at most, for a message, and how many there are."""
    texts = [item if isinstance(item, str) else repr(_name(item)) for item in items]
    return ", ".join(texts[:10]) + f", ... ({len(texts)} in all)" * (len(texts) > 10)


def partition(where: Where, tree: T) -> tuple[T, T]:
    """Splits ``tree`` in two, the chosen leaves and the others, each with holes for the other's.

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
    Raises ValueError for a glob that matches no leaf and for a choice that takes none,
    TypeError for a ``where`` or an answer of another type; what a predicate raises passes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    chosen, hole = jax.tree.leaves(mask(where, tree)), Hole()
    selected = [leaf if take else hole for take, leaf in zip(chosen, leaves)]
    others = [hole if take else leaf for take, leaf in zip(chosen, leaves)]
    return jax.tree.unflatten(treedef, selected), jax.tree.unflatten(treedef, others)


def mask(where: Where, tree: PyTree) -> PyTree:
    """Gives the choice of ``partition(where, tree)`` as a tree of bools, True for chosen.

    >>> mask("*/b", {"a": {"w": 1, "b": 2}, "c": 3})
    {'a': {'b': True, 'w': False}, 'c': False}

    It serves ``optax.masked`` and ``eqx.partition``. Raises what ``partition`` raises.
    """
    entries, treedef = tree_flatten_with_path(tree)
    patterns = [where] if isinstance(where, str) else where
    if isinstance(patterns, tuple | list) and all(isinstance(p, str) for p in patterns):
        chosen = _match(patterns or [""], [_name(path) for path, _ in entries])
    elif callable(where) and all_leaves([where]):  # not a model, which is a tree
        chosen = [where(path, leaf) for path, leaf in entries]
    else:
        raise TypeError(f"where comes first, a predicate or patterns, not {type(where).__name__}")
    for (path, _), answer in zip(entries, chosen):
        if not isinstance(answer, bool | np.bool_):
            raise TypeError(f"where gave {type(answer).__name__}, not a bool, at {_name(path)!r}")
    if entries and not any(chosen):
        raise ValueError(f"where takes none of {_ten(dict(entries))}; the first is {entries[0][0]}")
    return jax.tree.unflatten(treedef, map(bool, chosen))


def _match(patterns: Sequence[str], names: list[str]) -> list[bool]:
    """For each name: does the last pattern that matches it take it?"""
    chosen = [patterns[0].startswith("!")] * len(names)
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        # As * crosses /, glob/* matches name/ iff glob matches the name or one above it.
        hits = [fnmatch.fnmatchcase(f"{name}/", f"{glob}/*") for name in names]
        if not glob or not any(hits):
            nearest = difflib.get_close_matches(glob, names, n=len(names) + 1, cutoff=0)
            raise ValueError(f"pattern {pattern!r} matches none of {_ten(map(repr, nearest))}")
        chosen = [pattern == glob if hit else was for hit, was in zip(hits, chosen)]
    return chosen


def merge(*parts: T) -> T:
    """Puts parts of one tree together again: the inverse of ``partition``, in any order.

    >>> merge({"a": Hole(), "b": 2}, {"a": 1, "b": Hole()})
    {'a': 1, 'b': 2}

    Every leaf must be held by exactly one part: raises ValueError with the paths that are
    held twice (equal values too), by no part, or where the structures differ.
    """
    if not parts:
        raise TypeError("merge needs at least one part")
    columns, treedefs = zip(*(jax.tree.flatten(part, is_leaf=_is_hole) for part in parts))
    held = [[node for node in slot if not isinstance(node, Hole)] for slot in zip(*columns)]
    if treedefs.count(treedefs[0]) < len(parts) or any(len(leaves) != 1 for leaves in held):
        _align({f"part {i}": part for i, part in enumerate(parts)}, (1,), _show)
    return cast(T, jax.tree.unflatten(treedefs[0], [leaf for (leaf,) in held]))


def _align(parts: dict[str, Any], holders: Sequence[int], show: Fn) -> dict[Any, dict[str, Any]]:
    """At each key path, in tree order, the leaf of every part that holds one there.

    Raises ValueError for paths that not every part has, paths at which the number of parts
    that hold a leaf is not in ``holders`` or ``show`` tells their leaves apart; if there are
    none, for containers that differ.
    """
    flat, treedefs = zip(*(tree_flatten_with_path(p, is_leaf=_is_hole) for p in parts.values()))
    nodes = dict(zip(parts, map(dict, flat)))
    if [*map(len, flat)] != [*map(len, nodes.values())]:
        raise ValueError(f"two leaves have one key path in {' or '.join(parts)}")
    places, faults = {}, []
    for path in {path: None for some in nodes.values() for path in some}:
        here = {part: some[path] for part, some in nodes.items() if path in some}
        held = places[path] = {part: node for part, node in here.items() if not _is_hole(node)}
        alone = " alone" * (len(here) < len(parts))
        if alone or len(held) not in holders or len({*map(show, held.values())}) > 1:
            told = " and ".join(f"{show(node)} in {part}" for part, node in here.items())
            faults.append(f"{_name(path)!r} is {told}{alone}")
    if not faults and treedefs.count(treedefs[0]) < len(parts):  # the containers alone differ
        texts = [*map(str, treedefs)]
        start = next((i for i, some in enumerate(zip(*texts)) if len({*some}) > 1), 0)
        faults = [f"{p} has ..{text[max(0, start - 20) :][:80]}.." for p, text in zip(parts, texts)]
    if faults:
        raise ValueError(f"the parts do not fit: {_ten(faults)}")
    return places


def summary(**parts: PyTree) -> str:
    """Tells as a table what each part holds: a row a leaf in tree order, a row a part.

    >>> print(summary(trainable={"w": jnp.ones((2, 3)), "b": Hole()},
    ...               frozen={"w": Hole(), "b": jnp.ones(2)}))
    path  shape   dtype    count  part
    b     (2,)    float32  2      frozen
    w     (2, 3)  float32  6      trainable
    <BLANKLINE>
    part       count  bytes  share
    trainable  6      24     75.0%
    frozen     2      8      25.0%
    total      8      32     100.0%

    ``count`` is in elements, ``bytes`` is count times the dtype's size, ``share`` is of the
    count. Arrays, abstract arrays and tracers give the same text; a leaf that is no array
    counts nothing. Parts need not cover the whole tree, but raises ValueError for a leaf in
    two parts and for structures that differ, TypeError for no part.
    """
    if not parts:
        raise TypeError("summary needs at least one part, as in summary(params=params)")
    rows: list[list[Any]] = [["path", "shape", "dtype", "count", "part"]]
    sums = {part: np.zeros(2, np.int64) for part in parts}  # elements, bytes
    for path, held in _align(parts, (0, 1), _show).items():
        for part, leaf in held.items():
            shape, dtype, *sizes = _spec(leaf)
            rows.append([_name(path), shape, dtype, sizes[0], part])
            sums[part] += sizes
    total = np.sum([*sums.values()], axis=0)
    groups = [*sums.items(), ("total", total)]
    totals = [[part, *sizes, f"{sizes[0] / max(1, total[0]):.1%}"] for part, sizes in groups]
    return f"{_table(rows)}\n\n{_table([['part', 'count', 'bytes', 'share'], *totals])}"


def _spec(leaf: Any) -> tuple[str, str, int, int]:
    """Shape and dtype as text, elements and bytes; of what is no array ``-`` and the type."""
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        leaf = np.empty((), jnp.result_type(leaf))
    if isinstance(leaf, type) or not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return "-", type(leaf).__name__, 0, 0
    shape, dtype, count = tuple(leaf.shape), leaf.dtype, int(np.prod(leaf.shape))
    return str(shape), str(dtype), count, count * dtype.itemsize


def _show(node: Any) -> str:
    return "a hole" if _is_hole(node) else " ".join(_spec(node)[:2])


def _table(rows: Sequence[Sequence[Any]]) -> str:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(f"{c!s:{w}}" for c, w in zip(row, widths)).rstrip() for row in rows)


def warm_start(new: T, old: PyTree) -> T:
    """Gives ``new`` with every leaf that ``old`` holds at the same key path in its place.

    >>> warm_start({"a": 0, "b": 0, "c": Hole()}, {"a": 7, "b": Hole(), "c": 8})
    {'a': 7, 'b': 0, 'c': Hole()}

    For a checkpoint of a part, and for an optimizer's state after the frozen set has changed,
    ``warm_start(optimizer.init(trainable), state)``: surviving moments are kept, new ones
    start fresh, dropped ones go. Adam's step count is kept too, so leaves that join late get
    no bias correction: after 5,000 steps the first update of one is 3.2 times the learning
    rate, 0.1 / sqrt(0.001), where the first of a run is 1. Leaves are shared.
    Raises ValueError, with path and both, for shapes or dtypes that do not fit, and with
    names of both sides where no path is shared.
    """
    held = dict(tree_flatten_with_path(old)[0])
    _align({"old": old}, (0, 1), _show)  # or there are two leaves at one path
    fresh, treedef = tree_flatten_with_path(new)
    if fresh and held.keys().isdisjoint(dict(fresh)):
        raise ValueError(f"no path is in both: new has {_ten(dict(fresh))}; old has {_ten(held)}")
    started: T = jax.tree.unflatten(treedef, [held.get(path, leaf) for path, leaf in fresh])
    _align({"new": new, "old": started}, (0, 2), _show)
    return started


# What only moves elements or computes them one by one: cheap to do again at every step.
_CHEAP = """broadcast_in_dim concatenate convert_element_type copy expand_dims pad reshape rev slice
squeeze transpose abs add and ceil clamp cos div eq erf exp expm1 floor ge gt integer_pow is_finite
le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt select_n sign sin sqrt square
sub tan tanh xor""".split()


def hoist(fn: Fn, trainable: PyTree, frozen: PyTree, *batch: PyTree) -> tuple[Fn, Fn]:
    """Splits ``fn(trainable, frozen, *batch)`` into what no trainable leaf touches and the rest.

    >>> def fn(trainable, frozen, x):
    ...     return jnp.tanh(x @ frozen) @ trainable
    >>> trainable, frozen, x = jnp.ones(2), jnp.ones((3, 2)), jnp.ones((5, 3))
    >>> once, rest = hoist(fn, trainable, frozen, x)
    >>> kept = jax.jit(once)(frozen, x)
    >>> [features.shape for features in kept], rest(trainable, frozen, kept).shape
    ([(5, 2)], (5,))

    JAX writes ``fn`` down as a list of equations, a jaxpr. Those that need a trainable leaf or
    have an effect run at every step, in ``rest``. What the others make of the batch and of
    weights (frozen leaves, arrays that ``fn`` closes over) is made by ``once`` and kept; what
    is made of either alone is made again where it is needed, for labels are smaller than their
    one-hot rows and weights would ride along with every batch.

    ``kept = once(frozen, *batch)`` is a tuple of arrays, ``rest(trainable, frozen, kept)``
    equals ``fn(trainable, frozen, *batch)``. Both can be jitted, differentiated, vmapped and
    scanned; jit ``once``, or it runs operation by operation. Only shapes, dtypes and weak types
    are read, so ``ShapeDtypeStruct``s serve; a call with others raises ValueError with both.
    Gradients are right in ``trainable`` alone. What is no array must be closed over.

    Look at the shapes of ``kept``: a function inside ``jax.checkpoint``, or a scan of which a
    part trains, is one operation, and nothing in it moves. Costly work on the batch alone that
    makes it larger goes back into the step: do it in the data. Randomness in the batch (a
    dropout key) is fixed with it: for a fresh draw at every step, hand the key in beside what
    trains, ``jax.grad(lambda head: rest((head, key), frozen, kept))``. As jax #3617 advises.
    """
    specs = jax.eval_shape(lambda *args: args, trainable, frozen, batch)
    # A function of its own, for JAX remembers what it traced, and fn may close over new values.
    traced, out = jax.make_jaxpr(lambda *a: fn(*a), return_shape=True)(trainable, frozen, *batch)
    closed = jax.make_jaxpr(jaxpr_as_fun(_inline(traced)))(*jax.tree.leaves(specs))
    args = jax.tree.unflatten(jax.tree.structure(specs), closed.jaxpr.invars)
    keep = _keep(closed, *map(jax.tree.leaves, args))
    run_once = jaxpr_as_fun(_cut(closed, jax.tree.leaves(args[1:]), keep, effects=False))
    run_rest = jaxpr_as_fun(_cut(closed, jax.tree.leaves((args[:2], keep)), closed.jaxpr.outvars))

    def once(frozen: PyTree, *batch: PyTree) -> tuple[Array, ...]:
        _check({"frozen": specs[1], "batch": specs[2]}, {"frozen": frozen, "batch": batch})
        return tuple(map(jnp.asarray, run_once(*jax.tree.leaves((frozen, batch)))))

    def rest(trainable: PyTree, frozen: PyTree, kept: tuple[Array, ...]) -> Any:
        _check({"trainable": specs[0]}, {"trainable": trainable})
        _check({"frozen": specs[1]}, {"frozen": frozen})
        # Without weak types: what was kept may have been stored, and they are spent by now.
        _align({"hoist": tuple(var.aval for var in keep), "kept": kept}, (0, 2), _show)
        leaves = map(jnp.asarray, run_rest(*jax.tree.leaves((trainable, frozen, kept))))
        return jax.tree.unflatten(jax.tree.structure(out), leaves)

    return once, rest


def _check(made_with: PyTree, given: PyTree) -> None:
    """Refuses arguments that are not like those that hoist was made with."""
    sides = {"hoist": made_with, "the call": jax.eval_shape(lambda tree: tree, given)}
    _align(sides, (0, 2), lambda node: _show(node) + " weak" * getattr(node, "weak_type", False))


def _inline(closed: Any) -> Any:
    """A jaxpr whose jits, at any depth, JAX opens when it traces it again (but for shardings)."""

    def opened(eqn: Any) -> Any:
        if eqn.primitive.name not in ("jit", "pjit"):  # its name until jax 0.6
            return eqn
        inner = _inline(eqn.params["jaxpr"])
        return eqn.replace(params={**eqn.params, "jaxpr": inner, "inline": True})

    return closed.replace(jaxpr=closed.jaxpr.replace(eqns=list(map(opened, closed.jaxpr.eqns))))


def _keep(closed: Any, trains: list[Any], stays: list[Any], given: list[Any]) -> list[Any]:
    """The variables that ``once`` hands to ``rest``, in the order of the equations."""
    jaxpr = _cut(closed, closed.jaxpr.invars, closed.jaxpr.outvars).jaxpr
    every_step, used = set(trains), _variables(jaxpr.outvars)
    weights = {*stays, *(var for var in jaxpr.constvars if var.aval.shape)}
    origin = {var: {var} for var in given}  # of what is made of the batch: what to have it of

    def least(found: set[Any]) -> set[Any]:
        """The fewest bytes to have these variables of: each itself or its origin."""
        return set().union(*({v} if _bytes({v}) < _bytes(origin[v]) else origin[v] for v in found))

    for eqn in jaxpr.eqns:
        inputs = _variables(eqn.invars)
        batch = inputs & origin.keys()
        if eqn.effects or inputs & every_step:
            every_step.update(eqn.outvars)
            used |= inputs
            continue
        behind = set().union(*(origin[var] for var in batch))
        if any(np.ndim(a.val) if isinstance(a, Literal) else a in weights for a in eqn.invars):
            weights.update(eqn.outvars)
            behind = least(batch) if eqn.primitive.name in _CHEAP else set()
        origin |= {var: behind or {var} for var in eqn.outvars if batch}
    kept = least(used & origin.keys())
    # What can be had of the others need not be kept beside them.
    return [var for var in origin if var in kept and not origin[var] <= kept - {var}]


def _cut(closed: Any, invars: list[Any], outvars: list[Any], effects: bool = True) -> Any:
    """A jaxpr from ``invars`` to ``outvars``: what they need, and what has an effect."""
    needed, eqns = _variables(outvars).difference(invars), []
    for eqn in reversed(closed.jaxpr.eqns):
        if (effects and eqn.effects) or not needed.isdisjoint(eqn.outvars):
            needed |= _variables(eqn.invars).difference(invars)
            eqns.append(eqn)
    part = closed.jaxpr.replace(invars=invars, eqns=eqns[::-1], outvars=outvars)
    return closed.replace(jaxpr=part)


def _variables(atoms: Iterable[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def _bytes(variables: Iterable[Any]) -> int:
    return sum(var.aval.size * var.aval.dtype.itemsize for var in variables)


# ------------------------------------------------------------------------ the walk-through

__all__ += ["init", "apply", "loss_fn", "sgd_step", "train_step", "train", "dataset"]

Params: TypeAlias = dict[str, dict[str, Array]]


def init(key: Array, sizes: Sequence[int], dtype: Any = jnp.float32) -> Params:
    """Draws the parameters of an MLP: weights from a truncated normal, biases zero.

    >>> jax.tree.map(jnp.shape, init(jax.random.key(0), [1, 300, 10]))
    {'linear_0': {'b': (300,), 'w': (1, 300)}, 'linear_1': {'b': (10,), 'w': (300, 10)}}

    ``key`` is one key of either style. Layer i has ``w`` of shape (sizes[i], sizes[i + 1])
    and ``b`` of shape (sizes[i + 1],). The recipe is dm-haiku's for ``hk.nets.MLP``, bit for
    bit: one split a layer, a standard deviation of 1/sqrt(fan-in), cut at two of them.
    Raises ValueError for fewer than two sizes or one that is not a positive integer.
    """
    _require_sizes(*sizes)
    params = {}
    for i, shape in enumerate(pairwise(sizes)):
        key, subkey = jax.random.split(key)
        # Multiplying by the rounded reciprocal, not dividing, is what Haiku's bits come from.
        scale = jnp.asarray(1 / np.sqrt(shape[0]), dtype)
        w = scale * jax.random.truncated_normal(subkey, -2, 2, shape, dtype)
        params[f"linear_{i}"] = {"w": w, "b": jnp.zeros(shape[1], dtype)}
    return params


def _require_sizes(*sizes: Any) -> None:
    if len(sizes) < 2 or not all(type(n) in (int, np.int32, np.int64) and n > 0 for n in sizes):
        raise ValueError(f"sizes must be two or more positive integers, got {sizes}")


def apply(params: Params, x: Array) -> Array:
    """Gives the logits of the MLP: ReLU between its layers, none after the last.

    >>> apply(init(jax.random.key(0), [1, 300, 10]), jnp.ones((5, 1))).shape
    (5, 10)

    ``x`` is (..., in), the result (..., out). Layers run in the order of their numbers.
    Raises ValueError for a width that does not fit, for layers whose names are not
    linear_0, linear_1, ..., and for parameters with holes (``merge`` fills them).
    """
    # A tree function returns dicts sorted, linear_10 before linear_2: count, do not iterate.
    layers = [f"linear_{i}" for i in range(len(params))]
    if not layers or set(layers) != set(params):
        raise ValueError(f"params holds {_ten(map(repr, params))}, not linear_0, linear_1, ...")
    for layer in layers:
        w, b = params[layer]["w"], params[layer]["b"]
        if _is_hole(w) or _is_hole(b):
            raise ValueError(f"{layer} has holes: merge(trainable, frozen) first")
        if x.shape[-1:] != w.shape[:1]:
            raise ValueError(f"{layer} takes inputs of width {w.shape[0]}, got shape {x.shape}")
        x = (x if layer == "linear_0" else jax.nn.relu(x)) @ w + b  # (..., out)
    return x


def loss_fn(trainable: PyTree, frozen: PyTree, x: Array, y: Array) -> Array:
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


def sgd_step(params: T, grads: T, lr: Any = 0.1) -> T:
    """Gives ``p - g * lr`` for every leaf, in the leaf's own dtype; holes stay holes.

    >>> sgd_step({"w": jnp.float32(1), "b": Hole()}, {"w": jnp.float32(0.5), "b": Hole()}, lr=0.5)
    {'b': Hole(), 'w': Array(0.75, dtype=float32)}
    """
    # Of a float32 rate, bfloat16 parameters must not become float32.
    new: T = jax.tree.map(lambda p, g: jnp.asarray(p - g * lr, jnp.result_type(p)), params, grads)
    return new


@jax.jit
def train_step(trainable: T, frozen: PyTree, x: Array, y: Array, lr: Any = 0.1) -> tuple[T, Array]:
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
    return sgd_step(trainable, grads, lr), loss


@jax.jit
def train(trainable: T, frozen: PyTree, xs: Array, ys: Array, lr: Any = 0.1) -> tuple[T, Array]:
    """Takes a ``train_step`` for each batch, in one dispatch: (trainable, losses).

    ``xs`` (steps, batch, in) and ``ys`` (steps, batch) give ``losses`` (steps,), and the
    parameters that the same steps in a loop give. Jitted, as ``train_step`` is.
    Raises ValueError for other shapes, such as those of one batch.
    """
    if xs.ndim < 3 or xs.shape[:-1] != ys.shape:
        raise ValueError(f"train takes a batch a step, got shapes {xs.shape} and {ys.shape}")
    return jax.lax.scan(lambda t, batch: train_step(t, frozen, *batch, lr), trainable, (xs, ys))


def dataset(
    key: Array, num_records: int, batch_size: int = 10, num_classes: int = 10
) -> tuple[Array, Array]:
    """Draws batches of numbers that are their own labels: (xs, ys), on the device.

    >>> xs, ys = dataset(jax.random.key(0), num_records=7, batch_size=5)
    >>> xs.shape, xs.dtype.name, ys.shape, ys.dtype.name
    ((7, 5, 1), 'float32', (7, 5), 'int32')

    A row is drawn from 0 .. num_classes - 1 without replacement: raises ValueError where
    batch_size is greater than num_classes, or one of the three is no positive integer.
    """
    _require_sizes(num_records, batch_size, num_classes)
    keys = jax.random.split(key, num_records)
    ys = jax.vmap(lambda k: jax.random.choice(k, num_classes, (batch_size,), replace=False))(keys)
    return ys[..., None].astype(jnp.float32), ys.astype(jnp.int32)


def _plot(file: Path, before: Params, after: Params, frozen: PyTree) -> None:
    """Draws every parameter as a heatmap, before above after, one colour scale a parameter."""
    from matplotlib.figure import Figure

    pairs = list(zip(*(tree_flatten_with_path(params)[0] for params in (before, after))))
    held = {path: "frozen" for path, _ in tree_flatten_with_path(frozen)[0]}
    figure = Figure(figsize=(2.4 * len(pairs), 5.5), layout="constrained")
    for column, pair in zip(figure.subplots(2, len(pairs)).T, pairs):
        limit = max(float(jnp.abs(leaf).max()) for _, leaf in pair) or 1.0
        for axis, (path, leaf), when in zip(column, pair, ("before", "after")):
            axis.set(title=f"{_name(path)}\n{held.get(path, 'trains')}", xlabel=when)
            axis.imshow(np.atleast_2d(leaf), aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
        figure.colorbar(column[0].images[0], ax=list(column), location="bottom")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # the whole picture or none
        part = file if file.is_char_device() else Path(folder, file.name)
        figure.savefig(part, format=file.suffix[1:], dpi=150)
        part.replace(file)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the first and the last layer of an MLP on the identity, its middle one frozen."""
    # Without its usage text, argparse says what is wrong in one line (and exits with 2).
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--seed", type=int, default=42, help="default: 42")
    parser.add_argument("--plot", type=Path, help="draw the parameters before and after")
    args = parser.parse_args(argv)
    if not (1 <= args.steps <= 10**7 and 0 <= args.seed < 2**32):  # more steps fill the memory
        parser.error("--steps must be in 1 .. 10**7 and --seed in 0 .. 2**32 - 1")

    def show(title: str, params: Params, numbers: range) -> None:
        labels = apply(params, jnp.array(numbers, jnp.float32)[:, None]).argmax(axis=1)
        print(title, *(f"[{n}.] -> {label}" for n, label in zip(numbers, labels)), "", sep="\n")

    key = jax.random.key(args.seed)
    before = init(key, [1, 300, 100, 10])
    trainable, frozen = partition(("linear_0", "linear_2"), before)
    show("before training", before, range(10))
    print(summary(trainable=trainable, frozen=frozen))
    trainable, losses = train(trainable, frozen, *dataset(jax.random.fold_in(key, 1), args.steps))
    after = merge(trainable, frozen)
    print(f"\n{args.steps} steps, loss {losses[0]:.6f} -> {losses[-1]:.6f}\n")
    show("after training", after, range(10))
    show("out of range", after, range(10, 20))

    pairs = zip(tree_flatten_with_path(before)[0], map(np.asarray, jax.tree.leaves(after)))
    same = {_name(path): np.asarray(was).tobytes() == leaf.tobytes() for (path, was), leaf in pairs}
    print("changed:", ", ".join(name for name in same if not same[name]))
    print("bit for bit as before:", ", ".join(name for name in same if same[name]))
    if args.plot is not None:
        try:
            _plot(args.plot, before, after, frozen)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            how = ", pip install matplotlib" * isinstance(error, ImportError)
            parser.error(f"--plot {args.plot}: {' '.join(str(error).split())}{how}")


if __name__ == "__main__":
    main()
