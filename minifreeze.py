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

It works on any pytree, holds no state, draws no keys and donates nothing. For the tool alone, copy
what stands above the walk-through. For optimizers and checkpoints see optax and Orbax.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jax.tree_util import all_leaves, keystr, register_dataclass, tree_flatten_with_path

__all__ = ["Hole", "partition", "mask", "merge", "summary", "warm_start", "hoist"]
__version__ = "0.2.2"
T = TypeVar("T")
PyTree: TypeAlias = Any
Fn: TypeAlias = Callable[..., Any]
Where: TypeAlias = str | Sequence[str] | Callable[[tuple[Any, ...], Any], bool]


@register_dataclass
@dataclass(frozen=True)
class Hole:
    """Stands where another part holds the leaf: a pytree node without leaves, and never data."""


_is_hole = Hole.__instancecheck__  # isinstance, as a function of the node alone
_name = partial(keystr, simple=True, separator="/")  # for people: a key may hold a /, too


def _ten(items: Iterable[Any]) -> str:
    """Ten texts or names of key paths at most, for a message, and how many there are."""
    texts = [item if isinstance(item, str) else repr(_name(item)) for item in items]
    return (", ".join(texts[:10]) or "nothing") + f", ... of {len(texts)}" * (len(texts) > 10)


def partition(where: Where, tree: T) -> tuple[T, T]:
    """Splits ``tree`` in two, the chosen leaves and the others; a ``Hole`` is where they are not.

    >>> partition("a/*", {"a": {"w": 1, "b": 2}, "c": 3})
    ({'a': {'b': 2, 'w': 1}, 'c': Hole()}, {'a': {'b': Hole(), 'w': Hole()}, 'c': 3})

    ``where`` is a predicate ``(path, leaf) -> bool`` with JAX's key path; or a glob
    (``fnmatch.fnmatchcase``: ``*`` crosses ``/``) over a leaf's name, which is ``keystr(path,
    simple=True, separator="/")``, or that of something above it: ``"a"`` takes ``a/w``, never
    ``ab/w``; or a list of globs, the last that matches decides. ``"!a"`` gives back, and if first,
    takes all but ``a``. Leaves are shared. Raises ValueError for a glob that matches no leaf and
    for a choice that takes none, TypeError for a ``where`` or an answer of another type.
    """
    leaves, treedef = jax.tree.flatten(tree)
    chosen, hole = jax.tree.leaves(mask(where, tree)), Hole()
    selected = [leaf if take else hole for take, leaf in zip(chosen, leaves)]
    others = [hole if take else leaf for take, leaf in zip(chosen, leaves)]
    return jax.tree.unflatten(treedef, selected), jax.tree.unflatten(treedef, others)


def mask(where: Where, tree: PyTree) -> PyTree:
    """Gives the choice of ``partition(where, tree)`` as a tree of bools, for optax and Equinox.

    >>> mask("*/b", {"a": {"w": 1, "b": 2}, "c": 3})
    {'a': {'b': True, 'w': False}, 'c': False}
    """
    entries, treedef = tree_flatten_with_path(tree)
    globs = [where] if isinstance(where, str) else where
    if isinstance(globs, Sequence) and all(isinstance(glob, str) for glob in globs):
        names = [_name(path) for path, _ in entries]
        chosen = [any(glob.startswith("!") for glob in [*globs][:1])] * len(names)
        for glob in globs or [""]:
            # As * crosses /, glob/* matches name/ iff glob matches the name or one above it.
            below = f"{glob.removeprefix('!')}/*"
            hits = [fnmatch.fnmatchcase(f"{name}/", below) for name in names]
            if below == "/*" or not any(hits):
                nearest = difflib.get_close_matches(glob, names, n=len(names) + 1, cutoff=0)
                raise ValueError(f"pattern {glob!r} matches none of {_ten(map(repr, nearest))}")
            chosen = [glob[0] != "!" if hit else was for hit, was in zip(hits, chosen)]
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


def merge(*parts: T) -> T:
    """Puts parts of one tree together again: the inverse of ``partition``, in any order.

    >>> merge({"a": Hole(), "b": 2}, {"a": 1, "b": Hole()})
    {'a': 1, 'b': 2}

    Raises ValueError with the paths that no part or more than one holds, or that not all have.
    """
    if not parts:
        raise TypeError("merge needs at least one part")
    columns, treedefs = zip(*(jax.tree.flatten(part, is_leaf=_is_hole) for part in parts))
    held = [[node for node in slot if not isinstance(node, Hole)] for slot in zip(*columns)]
    if treedefs.count(treedefs[0]) < len(parts) or any(len(leaves) != 1 for leaves in held):
        _align({f"part {i}": part for i, part in enumerate(parts)}, (1,))
    return cast(T, jax.tree.unflatten(treedefs[0], [leaf for (leaf,) in held]))


def _align(parts: dict[str, Any], holders: Sequence[int], weak: bool = False) -> dict[Any, Any]:
    """By the names on each key path, in tree order, the leaf of every part that holds one there.

    Raises ValueError with the places that not all have, that other than ``holders`` parts hold, or
    whose leaves differ in shape or dtype; else with containers that differ, or twins of one path.
    """

    def show(node: Any) -> str:
        text = "a hole" if _is_hole(node) else " ".join(_spec(node)[:2])
        return text + " weak" * (weak and getattr(node, "weak_type", False))

    flat, treedefs = zip(*(tree_flatten_with_path(p, is_leaf=_is_hole) for p in parts.values()))
    named = [{tuple(_name((k,)) for k in path): node for path, node in some} for some in flat]
    nodes = dict(zip(parts, named))
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
        at = next((i for i, some in enumerate(zip(*map(str, treedefs))) if len({*some}) > 1), 0)
        faults = [f"{p} has ..{str(t)[max(0, at - 20) :][:80]}.." for p, t in zip(parts, treedefs)]
    if faults:
        raise ValueError(f"the parts do not fit: {_ten(faults)}")
    return places


def summary(**parts: PyTree) -> str:
    """Tells as a table what each part holds: a row a leaf in tree order, a row a part.

    >>> print(summary(head={"w": jnp.ones((2, 3)), "b": Hole()}, body={"w": Hole(), "b": 1.0}))
    path  shape   dtype    count  part
    b     ()      float32  1      body
    w     (2, 3)  float32  6      head
    <BLANKLINE>
    part   count  bytes  share
    head   6      24     85.7%
    body   1      4      14.3%
    total  7      28     100.0%

    ``count`` is in elements, ``share`` of it; what is no array, abstract or not, counts nothing.
    Raises TypeError for no part, ValueError for a leaf in two, two at one path, other structures.
    """
    if not parts:
        raise TypeError("summary needs at least one part, as in summary(params=params)")
    rows: list[list[Any]] = [["path", "shape", "dtype", "count", "part"]]
    sums = {part: np.zeros(2, np.int64) for part in parts}  # elements, bytes
    for path, held in _align(parts, (0, 1)).items():
        for part, leaf in held.items():
            shape, dtype, *sizes = _spec(leaf)
            rows.append([_name(path), shape, dtype, sizes[0], part])
            sums[part] += sizes
    full = np.sum([*sums.values()], axis=0)
    totals = [[k, *n, f"{n[0] / max(1, full[0]):.1%}"] for k, n in [*sums.items(), ("total", full)]]
    return f"{_table(rows)}\n\n{_table([['part', 'count', 'bytes', 'share'], *totals])}"


def _spec(leaf: Any) -> tuple[str, str, int, int]:
    """Shape and dtype as text, elements and bytes; of what is no array ``-`` and the type."""
    if type(leaf) in (bool, int, float, complex):
        leaf = np.empty((), jnp.result_type(leaf))
    if isinstance(leaf, type) or not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return "-", type(leaf).__name__, 0, 0
    count = int(np.prod(leaf.shape))
    return str(tuple(map(int, leaf.shape))), str(leaf.dtype), count, count * leaf.dtype.itemsize


def _table(rows: Sequence[Sequence[Any]]) -> str:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(f"{c!s:{w}}" for c, w in zip(row, widths)).rstrip() for row in rows)


def warm_start(new: T, old: PyTree) -> T:
    """Gives ``new`` with every leaf that ``old`` holds at the same key path in its place.

    >>> warm_start({"a": 0, "b": 0, "c": Hole()}, {"a": 7, "b": Hole(), "c": 8})
    {'a': 7, 'b': 0, 'c': Hole()}

    For a checkpoint of a part (keys count by name: a list may be a dict by now), and for an
    optimizer when the frozen set has changed: ``warm_start(optimizer.init(trainable), state)``
    keeps the moments that go on and Adam's step count, without a bias correction for leaves that
    join late: after 5,000 steps their first update is 0.1 / sqrt(0.001) = 3.2 learning rates.
    Raises ValueError, with both sides, where no path is shared or shapes or dtypes differ.
    """
    sides = [_align({side: tree}, (0, 1)) for side, tree in (("new", new), ("old", old))]
    fresh, held = ({path: leaf for path, of in at.items() for leaf in of.values()} for at in sides)
    if fresh and held.keys().isdisjoint(fresh):
        raise ValueError(f"no path is in both: new has {_ten(fresh)}; old has {_ten(held)}")
    started: T = jax.tree.unflatten(jax.tree.structure(new), map(held.get, fresh, fresh.values()))
    _align({"new": new, "old": started}, (0, 2))
    return started


# What only moves elements or computes them one by one: cheap to do again at every step.
_CHEAP = """broadcast_in_dim concatenate convert_element_type copy expand_dims pad reshape rev slice
split squeeze tile transpose abs add and atan2 ceil clamp cos cosh div eq erf exp exp2 expm1 floor
ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt
select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor""".split()


def hoist(fn: Fn, trainable: PyTree, frozen: PyTree, *batch: PyTree) -> tuple[Fn, Fn]:
    """Splits ``fn(trainable, frozen, *batch)`` into what no trainable leaf touches and the rest.

    >>> head, body, x = jnp.ones(2), jnp.ones((3, 2)), jnp.ones((5, 3))
    >>> once, rest = hoist(lambda head, body, x: jnp.tanh(x @ body) @ head, head, body, x)
    >>> kept = jax.jit(once)(body, x)
    >>> [features.shape for features in kept], rest(head, body, kept).shape
    ([(5, 2)], (5,))

    What needs a trainable leaf or has an effect runs at every step, in ``rest``. What else is made
    of the batch and of weights (frozen leaves, arrays closed over) is made by ``once`` and kept, or
    what that is made of, if no larger and cheap to go on from. What weights alone make is not kept,
    what the batch alone makes only where smaller: if costly and large, it belongs in the data.

    ``rest(trainable, frozen, once(frozen, *batch))`` equals ``fn(trainable, frozen, *batch)``,
    with gradients in ``trainable`` alone. Jit ``once``. Calls with other shapes, dtypes or weak
    types raise ValueError with both; close over what is no array. Look at the shapes of ``kept``:
    of a ``jax.checkpoint`` or a scan of which a part trains, nothing moves. A key in the batch is
    fixed with it; pass fresh ones: ``jax.grad(lambda head: rest((head, key), ...))``.
    """
    specs = jax.eval_shape(lambda *args: args, trainable, frozen, batch)
    # A function of its own, for JAX remembers what it traced, and fn may close over new values.
    traced, out = jax.make_jaxpr(lambda *a: fn(*a), return_shape=True)(trainable, frozen, *batch)
    closed = _open(traced)
    args = jax.tree.unflatten(jax.tree.structure(specs), closed.jaxpr.invars)
    keep = _keep(closed, *map(jax.tree.leaves, args))
    run_once = jaxpr_as_fun(_cut(closed, jax.tree.leaves(args[1:]), keep, effects=False))
    run_rest = jaxpr_as_fun(_cut(closed, jax.tree.leaves((args[:2], keep)), closed.jaxpr.outvars))

    def check(made: PyTree, given: PyTree) -> None:
        _align({"hoist": made, "the call": jax.eval_shape(lambda t: t, given)}, (0, 2), weak=True)

    def once(frozen: PyTree, *batch: PyTree) -> tuple[Array, ...]:
        check({"frozen": specs[1], "batch": specs[2]}, {"frozen": frozen, "batch": batch})
        return tuple(map(jnp.asarray, run_once(*jax.tree.leaves((frozen, batch)))))

    def rest(trainable: PyTree, frozen: PyTree, kept: tuple[Array, ...]) -> Any:
        check(dict(zip(("trainable", "frozen"), specs)), {"trainable": trainable, "frozen": frozen})
        # Without weak types: what was kept may have been stored, and they are spent by now.
        _align({"hoist": {"kept": tuple(v.aval for v in keep)}, "the call": {"kept": kept}}, (0, 2))
        made = run_rest(*jax.tree.leaves((trainable, frozen, kept)))
        leaves = [jnp.asarray(x if isinstance(x, Array) else jax.device_put(x)) for x in made]
        return jax.tree.unflatten(jax.tree.structure(out), leaves)  # device_put: weak on 0.7.2 too

    return once, rest


def _open(closed: Any) -> Any:
    """A jaxpr of what its results need, every jit without shardings replaced by its body."""

    def mark(e: Any) -> Any:
        early = getattr(type(e.params["inline"]), "JAX_EARLY", True)  # a bool until jax 0.11
        return e.replace(params=e.params | {"jaxpr": _open(e.params["jaxpr"]), "inline": early})

    jaxpr: Any = dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals), instantiate=True)[0]
    eqns = [mark(e) if e.primitive.name in ("jit", "pjit") else e for e in jaxpr.eqns]
    with jax.ensure_compile_time_eval():  # arrays again: NumPy's have no .at for a custom gradient
        consts = [jnp.asarray(c) if hasattr(c, "__array__") else c for c in closed.consts]
    marked = closed.replace(jaxpr=jaxpr.replace(eqns=eqns), consts=consts)
    return jax.make_jaxpr(jaxpr_as_fun(marked))(*closed.in_avals)  # JAX puts in what is marked


def _keep(closed: Any, trains: list[Any], stays: list[Any], given: list[Any]) -> list[Any]:
    """The variables that ``once`` hands to ``rest``, in the order of the equations."""
    every_step, used = set(trains), _variables(closed.jaxpr.outvars)
    weights = {*stays, *(var for var in closed.jaxpr.constvars if var.aval.shape)}
    origin = {var: {var} for var in given}  # of what is made of the batch: what to have it of

    def size(variables: Iterable[Any]) -> int:
        return sum(var.aval.size * var.aval.dtype.itemsize for var in variables)

    def fewest_bytes(variables: set[Any]) -> set[Any]:
        """All origins, or each itself where smaller, if that is less; without what others give."""
        nearest = [min(origin[var], {var}, key=size) for var in variables]
        sets = set().union(*(origin[var] for var in variables)), set().union(*nearest)
        return min(({v for v in some if not origin[v] <= some - {v}} for some in sets), key=size)

    for eqn in closed.jaxpr.eqns:
        inputs = _variables(eqn.invars)
        if eqn.effects or inputs & every_step:
            every_step.update(eqn.outvars)
            used |= inputs
            continue
        weighs = any(np.ndim(a.val) if isinstance(a, Literal) else a in weights for a in eqn.invars)
        weights.update(eqn.outvars if weighs else ())
        behind = set() if weighs and not _is_cheap(eqn) else fewest_bytes(inputs & origin.keys())
        origin |= {var: behind or {var} for var in eqn.outvars if inputs & origin.keys()}
    return sorted(fewest_bytes(used & origin.keys()), key=list(origin).index)


def _is_cheap(e: Any) -> bool:  # an equation; relu is a custom_jvp of a jit
    inner = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}.get(e.primitive.name)
    return all(map(_is_cheap, e.params[inner].eqns)) if inner else e.primitive.name in _CHEAP


def _cut(closed: Any, invars: list[Any], outvars: list[Any], effects: bool = True) -> Any:
    """A jaxpr from ``invars`` to ``outvars``: what they need, and what has an effect."""
    needed, eqns = _variables(outvars).difference(invars), list[Any]()
    for eqn in reversed(closed.jaxpr.eqns):
        if (effects and eqn.effects) or not needed.isdisjoint(eqn.outvars):
            needed |= _variables(eqn.invars).difference(invars)
            eqns.insert(0, eqn)
    return closed.replace(jaxpr=closed.jaxpr.replace(invars=invars, eqns=eqns, outvars=outvars))


def _variables(atoms: Iterable[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


# ------------------------------------------------------------------------ the walk-through
__all__ += ["init", "apply", "loss_fn", "sgd_step", "train_step", "train", "dataset"]
Params: TypeAlias = dict[str, dict[str, Array]]
Batches: TypeAlias = tuple[Array, Array]


def init(key: Array, sizes: Sequence[int], dtype: Any = jnp.float32) -> Params:
    """Draws an MLP as ``hk.nets.MLP`` does, bit for bit: a normal of 1/sqrt(fan-in), cut at two.

    >>> jax.tree.map(jnp.shape, init(jax.random.key(0), [1, 300, 10]))
    {'linear_0': {'b': (300,), 'w': (1, 300)}, 'linear_1': {'b': (10,), 'w': (300, 10)}}

    Raises ValueError unless ``sizes`` are two positive integers or more.
    """
    _require_sizes(*sizes)
    params = {}
    for i in range(len(sizes) - 1):
        key, subkey = jax.random.split(key)
        # Multiplying by the rounded reciprocal, not dividing, is what Haiku's bits come from.
        scale = jnp.asarray(1 / np.sqrt(sizes[i]), dtype)
        w = scale * jax.random.truncated_normal(subkey, -2, 2, tuple(sizes[i : i + 2]), dtype)
        params[f"linear_{i}"] = {"w": w, "b": jnp.zeros(sizes[i + 1], dtype)}
    return params


def _require_sizes(*sizes: Any) -> None:
    if len(sizes) < 2 or not all(type(n) in (int, np.int32, np.int64) and n > 0 for n in sizes):
        raise ValueError(f"sizes must be two or more positive integers, got {sizes}")


def apply(params: Params, x: Array) -> Array:
    """Gives the logits (..., out) of the MLP for ``x`` (..., in), with ReLU between its layers.

    >>> apply(init(jax.random.key(0), [1, 300, 10]), jnp.ones((5, 1))).shape
    (5, 10)

    Raises ValueError for another width, for layers other than linear_0, linear_1, ..., for holes.
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
    """Gives the mean softmax cross-entropy for ``x`` (..., in) and integer labels ``y`` (...).

    >>> params = {"linear_0": {"w": jnp.zeros((1, 4)), "b": jnp.zeros(4)}}
    >>> print(loss_fn(*partition("*/w", params), jnp.ones((5, 1)), jnp.arange(5) % 4))
    1.3862944

    A label outside 0 .. out - 1 adds nothing. Raises ValueError for shapes, TypeError for dtypes.
    """
    logits, y = apply(merge(trainable, frozen), x), jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {y.dtype}")
    if y.shape != logits.shape[:-1]:
        raise ValueError(f"labels of shape {y.shape} do not fit logits of shape {logits.shape}")
    targets = jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / y.size


def sgd_step(params: T, grads: T, lr: Any = 0.1) -> T:
    """Gives ``p - g * lr`` for every leaf in its own dtype, whatever that of ``lr``.

    >>> sgd_step({"w": jnp.float32(1), "b": Hole()}, {"w": jnp.float32(0.5), "b": Hole()}, lr=0.5)
    {'b': Hole(), 'w': Array(0.75, dtype=float32)}
    """
    new: T = jax.tree.map(lambda p, g: jnp.asarray(p - g * lr, jnp.result_type(p)), params, grads)
    return new


@jax.jit
def train_step(trainable: T, frozen: PyTree, x: Array, y: Array, lr: Any = 0.1) -> tuple[T, Array]:
    """Takes one SGD step on ``loss_fn``: (trainable, the loss before the step).

    One trace a frozen set, nothing donated; raises TypeError for a leaf that is not floating.
    """
    for path, leaf in tree_flatten_with_path(trainable)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{_name(path)!r} is {leaf.dtype} and cannot train: freeze it")
    loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, x, y)
    return sgd_step(trainable, grads, lr), loss


@jax.jit
def train(trainable: T, frozen: PyTree, xs: Array, ys: Array, lr: Any = 0.1) -> tuple[T, Array]:
    """Takes a ``train_step`` for each batch, in one dispatch: (trainable, losses (steps,)).

    ``xs`` is (steps, batch, ..., in), ``ys`` (steps, batch, ...): ValueError for other shapes.
    """
    if xs.ndim < 3 or xs.shape[:-1] != ys.shape:
        raise ValueError(f"train takes a batch a step, got shapes {xs.shape} and {ys.shape}")
    return jax.lax.scan(lambda t, batch: train_step(t, frozen, *batch, lr), trainable, (xs, ys))


def dataset(key: Array, num_records: int, batch_size: int = 10, num_classes: int = 10) -> Batches:
    """Draws batches of numbers that are their own labels; a row has no number twice.

    >>> xs, ys = dataset(jax.random.key(0), num_records=7, batch_size=5)
    >>> xs.shape, xs.dtype.name, ys.shape, ys.dtype.name
    ((7, 5, 1), 'float32', (7, 5), 'int32')

    Raises ValueError for sizes that are no positive integers and for batch_size > num_classes.
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
            axis.set(title=f"{_name(path)}\n{held.get(path, 'trains')}", xlabel=when, yticks=[])
            axis.imshow(np.atleast_2d(leaf), aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
        figure.colorbar(column[0].images[0], ax=list(column), location="bottom")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # the whole picture or none
        part = file if file.is_char_device() else Path(folder, file.name)
        figure.savefig(part, format=file.suffix[1:], dpi=150)
        part.replace(file)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the first and the last layer of an MLP on the identity, its middle one frozen."""
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--seed", type=int, default=42, help="default: 42")
    parser.add_argument("--plot", type=Path, help="draw the parameters before and after")
    args = parser.parse_args(argv)
    if not (1 <= args.steps <= 10**7 and 0 <= args.seed < 2**32):  # more steps fill the memory
        parser.error(f"not 1 <= --steps {args.steps} <= 10**7, 0 <= --seed {args.seed} < 2**32")

    def show(title: str, params: Params, numbers: range) -> None:
        labels = apply(params, jnp.array(numbers, jnp.float32)[:, None]).argmax(axis=1)
        print(title, *(f"[{n}.] -> {label}" for n, label in zip(numbers, labels)), "", sep="\n")

    before = init(key := jax.random.key(args.seed), [1, 300, 100, 10])
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
            parser.error(" ".join(f"--plot (pip install matplotlib) {args.plot}: {error}".split()))


if __name__ == "__main__":
    main()
