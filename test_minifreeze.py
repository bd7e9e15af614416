# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "jax>=0.5.1", "numpy", "pytest", "pytest-cov", "hypothesis", "matplotlib", "scikit-learn",
#   "dm-haiku", "equinox", "flax", "optax", "orbax-checkpoint",
# ]
# ///
# SPDX-License-Identifier: MIT
"""The tests of minifreeze: `uv run test_minifreeze.py [pytest's options]` runs them all.

Laws first, over every container that JAX knows; then errors by their text, the walk-through,
the real peers and hoist; then numbers, against NumPy in float64 and derivatives worked out by
hand; last the bench and the README.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import doctest
import enum
import importlib
import importlib.metadata
import itertools
import json
import os
import pickle
import re
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.tree_util import GetAttrKey, keystr, register_dataclass, tree_flatten_with_path

import bench
import minifreeze as mf
from minifreeze import (
    Hole,
    apply,
    dataset,
    hoist,
    init,
    loss_fn,
    mask,
    merge,
    partition,
    sgd_step,
    summary,
    train,
    train_step,
    warm_start,
)

HERE = Path(__file__).resolve().parent
settings.register_profile(
    "default", max_examples=40, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile(  # that a mutant fails is enough: no smaller example is looked for
    "mutants", settings.get_profile("default"), max_examples=10, phases=[Phase.generate]
)
settings.register_profile("soak", settings.get_profile("default"), max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def is_hole(node):
    return isinstance(node, Hole)


def same(a, b):
    """Bit for bit: structure, shapes, dtypes and bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())
    return True


def words(error, *expected):
    for word in expected:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


# --------------------------------------------------------------- properties of every tree


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: Any
    b: Any
    name: str = dataclasses.field(default="layer", metadata={"static": True})


@jax.tree_util.register_pytree_with_keys_class
class Keyed:
    """A custom node that tells its key paths."""

    def __init__(self, *inner):
        self.inner = inner

    def tree_flatten_with_keys(self):
        return [(GetAttrKey(f"at{i}"), node) for i, node in enumerate(self.inner)], None

    @classmethod
    def tree_unflatten(cls, _, inner):
        return cls(*inner)


@jax.tree_util.register_pytree_node_class
class Silent:
    """A custom node without key paths, and with metadata that cannot be hashed."""

    def __init__(self, inner, note=()):
        self.inner, self.note = list(inner), list(note)

    def tree_flatten(self):
        return self.inner, self.note

    @classmethod
    def tree_unflatten(cls, note, inner):
        return cls(inner, note)


def leaves_strategy():
    return st.one_of(
        st.builds(lambda n: np.full(n, 7.0, np.float32), st.integers(0, 3)),
        st.builds(lambda n: jnp.zeros((n, 2)), st.integers(0, 2)),
        st.builds(lambda n: jax.ShapeDtypeStruct((n,), jnp.bfloat16), st.integers(0, 3)),
        st.sampled_from([0, 1, True, 2.5, 3j, float("nan"), "text", np.float64(2), len]),
    )


def trees(max_leaves=30):
    """Pytrees of everything that JAX knows, with names that look alike or hold `/` and `!`."""
    names = st.text("ab/!*[1", max_size=3)

    def containers(inner):
        few = st.lists(inner, max_size=4)
        return st.one_of(
            st.dictionaries(names, inner, max_size=4),
            st.dictionaries(st.integers(0, 12), inner, max_size=4),
            st.dictionaries(names, inner, max_size=3).map(collections.OrderedDict),
            st.dictionaries(names, inner, max_size=3).map(
                lambda d: collections.defaultdict(list, d)
            ),
            few,
            few.map(tuple),
            st.builds(Pair, inner, inner),
            st.builds(Layer, inner, inner, st.sampled_from("xy")),
            few.map(lambda inner: Keyed(*inner)),
            st.builds(Silent, few, st.lists(st.integers(0, 1), max_size=1)),
        )

    return st.recursive(leaves_strategy() | st.none(), containers, max_leaves=max_leaves)


big = st.integers(50, 300).flatmap(
    lambda n: st.just({f"layer_{i}": {"w": i + 0.5, "b": [i]} for i in range(n)})
)
any_tree = st.one_of(trees(), trees(), trees(), big)


def choose(data, tree):
    """A predicate that takes an arbitrary set of leaves, known by their key paths."""
    paths = [path for path, _ in tree_flatten_with_path(tree)[0]]
    bits = data.draw(st.integers(0, 2 ** len(paths) - 1), label="chosen")
    taken = {path for i, path in enumerate(paths) if bits >> i & 1}
    return lambda path, leaf: path in taken


def held(part):
    return jax.tree.leaves(part, is_leaf=is_hole)


@given(st.data(), any_tree)
def test_property_merge_inverts_partition_in_both_orders(data, tree):
    parts = mf.partition(choose(data, tree), tree)
    for order in itertools.permutations(parts):
        merged = mf.merge(*order)
        assert jax.tree.structure(merged) == jax.tree.structure(tree)
        assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tree)))


@given(st.data(), any_tree)
def test_property_parts_are_disjoint_and_complete_and_keep_the_structure(data, tree):
    where = choose(data, tree)
    selected, rest = mf.partition(where, tree)
    entries, treedef = tree_flatten_with_path(tree)
    assert treedef == jax.tree.structure(selected, is_leaf=is_hole)
    assert treedef == jax.tree.structure(rest, is_leaf=is_hole)
    for (path, leaf), a, b in zip(entries, held(selected), held(rest)):
        assert (a is leaf and is_hole(b)) if where(path, leaf) else (b is leaf and is_hole(a))


@given(st.data(), any_tree)
def test_property_mask_agrees_with_partition(data, tree):
    where = choose(data, tree)
    answers = jax.tree.leaves(mf.mask(where, tree))
    assert all(type(answer) is bool for answer in answers)
    assert answers == [not is_hole(leaf) for leaf in held(mf.partition(where, tree)[0])]
    assert jax.tree.structure(mf.mask(where, tree)) == jax.tree.structure(tree)


@given(st.data(), any_tree)
def test_property_a_part_splits_again_and_all_merge(data, tree):
    first, rest = mf.partition(choose(data, tree), tree)
    second, rest = mf.partition(choose(data, rest), rest)
    third, rest = mf.partition(choose(data, rest), rest)
    parts = data.draw(st.permutations([first, second, third, rest]))
    merged = mf.merge(*parts)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tree)))


@given(st.data(), any_tree.filter(jax.tree.leaves), st.booleans())
def test_property_a_lost_or_doubled_leaf_is_refused_with_its_path(data, tree, lose):
    parts = mf.partition(choose(data, tree), tree)
    entries, treedef = tree_flatten_with_path(tree)
    i = data.draw(st.integers(0, len(entries) - 1), label="leaf")
    wrong = Hole() if lose else entries[i][1]
    broken = []
    for part in parts:
        leaves = held(part)
        leaves[i] = wrong
        broken.append(treedef.unflatten(leaves))
    with pytest.raises(ValueError, match="do not fit") as error:
        mf.merge(*broken)
    words(
        error, f"{slow_name(entries[i][0])!r} is held by {'none' if lose else 'part 0 and part 1'}"
    )
    assert str(error.value).count("is held by") == 1


@given(st.data(), any_tree)
def test_property_warm_start_takes_what_is_held_at_the_same_path(data, tree):
    old, _ = mf.partition(choose(data, tree), tree)
    new, _ = mf.partition(choose(data, tree), tree)
    fresh = jax.tree.map(lambda leaf: leaf, new)
    for a, b, start in zip(held(old), held(new), held(mf.warm_start(fresh, old))):
        assert is_hole(start) if is_hole(b) else start is (b if is_hole(a) else a)


@given(any_tree)
def test_property_summary_counts_what_numpy_counts(tree):
    arrays = [
        leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, str) and leaf is not len
    ]
    count = sum(int(np.prod(getattr(leaf, "shape", ()), dtype=int)) for leaf in arrays)
    last = mf.summary(params=tree).splitlines()[-1].split()
    assert last[:2] == ["total", str(count)]


# An independent reading of the rules for patterns: letter by letter, without fnmatch.


def slow_name(path):
    parts = []
    for key in path:
        (field,) = [f for f in ("key", "idx", "name") if hasattr(key, f)]
        parts.append(str(getattr(key, field)))
    return "/".join(parts)


def slow_glob(glob, text):
    if not glob:
        return not text
    head, tail = glob[0], glob[1:]
    if head == "*":
        return any(slow_glob(tail, text[i:]) for i in range(len(text) + 1))
    if head == "[" and "]" in tail[1 + tail.startswith("!") :]:
        end = tail.index("]", 1 + tail.startswith("!"))
        letters, tail = tail[:end], tail[end + 1 :]
        negated = letters.startswith("!")
        hit = bool(text) and (text[0] in letters[negated:]) != negated
        return hit and slow_glob(tail, text[1:])
    return bool(text) and (head in ("?", text[0])) and slow_glob(tail, text[1:])


def slow_matches(glob, name):
    above = [name[:i] for i, letter in enumerate(name) if letter == "/"]
    return any(slow_glob(glob, candidate) for candidate in [name, *above])


def slow_takes(patterns, name):
    taken = patterns[0].startswith("!")
    for pattern in patterns:
        if slow_matches(pattern.removeprefix("!"), name):
            taken = not pattern.startswith("!")
    return taken


@given(st.data(), any_tree.filter(jax.tree.leaves))
def test_property_patterns_agree_with_a_slow_reading_of_the_rules(data, tree):
    names = [slow_name(path) for path, _ in tree_flatten_with_path(tree)[0]]
    pieces = sorted({name[:i] for name in names for i in range(len(name) + 1)})
    own = st.sampled_from(pieces).flatmap(
        lambda piece: st.sampled_from(
            [piece, piece + "*", "*" + piece[1:], "?" + piece[1:], "[!b]*"]
        )
    )
    patterns = data.draw(st.lists(own | own.map("!".__add__), min_size=1, max_size=4))
    where = data.draw(st.sampled_from([patterns, tuple(patterns)]))
    where = where[0] if len(where) == 1 else where
    useless = [
        pattern
        for pattern in patterns
        if pattern in ("", "!")
        or not any(slow_matches(pattern.removeprefix("!"), name) for name in names)
    ]
    if useless:
        with pytest.raises(ValueError, match="matches no leaf") as error:
            mf.mask(where, tree)
        words(error, repr(useless[0]))
    else:
        assert jax.tree.leaves(mf.mask(where, tree)) == [slow_takes(patterns, n) for n in names]


class Kind(str, enum.Enum):
    """A key whose str() and format() differ in some versions of Python."""

    MLP = "mlp"


@pytest.mark.parametrize(
    "key", ["", "a", "a/", "/", "a/b", "\n", "é", 7, -1, True, 1.5, (1, "x"), Kind.MLP]
)
@pytest.mark.parametrize("below", [1, [1], {"w": 1}, {"": 1}, {"w": [1, {"b": 1}]}])
def test_a_leaf_is_called_what_keystr_calls_it(key, below):
    tree = {"top": {key: below}}
    names = [
        keystr(path, simple=True, separator="/") for path, _ in tree_flatten_with_path(tree)[0]
    ]
    for i, name in enumerate(names):
        literal = "".join(f"[{letter}]" for letter in name)
        assert jax.tree.leaves(mf.mask(literal, tree)) == [i == j for j in range(len(names))]
    with pytest.raises(ValueError, match="matches no leaf") as error:
        mf.partition("nothing", tree)
    assert all(repr(name) in str(error.value) for name in names)


# ------------------------------------------------------------------- laws, one by one


SHAPE = jax.ShapeDtypeStruct((2,), jnp.float32)
CONTAINERS = {
    "dict": {"a": 1, "b": {"c": 2.0, "d": 3}},
    "dict of ints": {1: 1, 10: 2, 2: 3},
    "slash in a key": {"a/b": 1, "a": {"b": 2}},
    "list": [1, [2, 3]],
    "tuple": (1, (2,), 3),
    "named tuple": Pair(1, Pair(2, 3)),
    "dataclass": Layer(w=1, b=Layer(w=2, b=3, name="inner")),
    "custom node": Keyed(1, Keyed(2, 3)),
    "custom node without key paths": Silent([1, Silent([2, 3], [0])], [1]),
    "ordered dict": collections.OrderedDict(z=1, a=2, m=3),
    "default dict": collections.defaultdict(list, a=1, b=2, c=3),
    "none": {"a": None, "b": 1, "c": [None, 2], "d": 3},
    "empty containers": [(), 1, {}, 2, [], 3, Silent([])],
    "single leaf": 1,
    "no leaf": {"a": None, "b": ()},
    "numpy": {"a": np.ones(2), "b": np.float64(1), "c": np.zeros((0, 3))},
    "jax": {"a": jnp.ones(2), "b": jax.random.key(0), "c": jnp.ones((), jnp.bfloat16)},
    "abstract": {"a": SHAPE, "b": [SHAPE], "c": SHAPE},
    "what is no array": {"a": "text", "b": len, "c": object()},
    "nan": {"a": float("nan"), "b": np.nan, "c": jnp.nan},
    "holes": {"a": Hole(), "b": 1, "c": {"d": Hole(), "e": 2}},
}
every_container = pytest.mark.parametrize("tree", CONTAINERS.values(), ids=CONTAINERS)


@every_container
@pytest.mark.parametrize("step", [1, 2, 3])
def test_round_trip(tree, step):
    count = itertools.count()
    chosen = []

    def where(path, leaf):
        if answer := next(count) % step == 0:
            chosen.append(leaf)
        return answer

    selected, rest = mf.partition(where, tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(selected), chosen, strict=True))
    assert len(jax.tree.leaves(rest)) == len(jax.tree.leaves(tree)) - len(chosen)
    for order in [(selected, rest), (rest, selected)]:
        whole = any(map(is_hole, held(tree)))  # a tree with holes has no whole to come back to
        if whole:
            with pytest.raises(ValueError, match="is held by none"):
                mf.merge(*order)
        else:
            merged = mf.merge(*order)
            assert jax.tree.structure(merged) == jax.tree.structure(tree)
            assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tree)))


@every_container
def test_the_predicate_sees_what_tree_map_with_path_gives(tree):
    seen, wanted = [], []
    mf.partition(lambda *args: seen.append(args) or True, tree)
    jax.tree_util.tree_map_with_path(lambda *args: wanted.append(args), tree)
    assert [path for path, _ in seen] == [path for path, _ in wanted]
    assert all(a is b for (_, a), (_, b) in zip(seen, wanted))


def test_tracers_go_through_partition_and_merge():
    traces = []

    @jax.jit
    def double_the_biases(params):
        traces.append(None)
        biases, rest = mf.partition("*/b", params)
        return mf.merge(jax.tree.map(lambda b: 2 * b, biases), rest)

    params = {"l": {"w": jnp.ones(2), "b": jnp.ones(3)}}
    for _ in range(2):
        got = double_the_biases(params)
    same(got, {"l": {"w": jnp.ones(2), "b": 2 * jnp.ones(3)}})
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("where", "taken"),
    [
        ("linear_1", ["linear_1/b", "linear_1/w"]),
        ("linear_1/*", ["linear_1/b", "linear_1/w"]),
        ("*/b", ["linear_0/b", "linear_1/b", "linear_10/b"]),
        ("linear_?", ["linear_0/b", "linear_0/w", "linear_1/b", "linear_1/w"]),
        ("linear_[!1]/w", ["linear_0/w"]),
        ("*1*", ["linear_1/b", "linear_1/w", "linear_10/b", "linear_10/w"]),
        (["*", "!*/w"], ["linear_0/b", "linear_1/b", "linear_10/b"]),
        (("!linear_1",), ["linear_0/b", "linear_0/w", "linear_10/b", "linear_10/w"]),
        ("!linear_1", ["linear_0/b", "linear_0/w", "linear_10/b", "linear_10/w"]),
        (["!*/w", "linear_0"], ["linear_0/b", "linear_0/w", "linear_1/b", "linear_10/b"]),
        (["linear_0", "!*/b", "linear_0/b"], ["linear_0/b", "linear_0/w"]),
        (lambda path, leaf: path[0].key == "linear_10", ["linear_10/b", "linear_10/w"]),
        (lambda path, leaf: np.bool_(leaf.ndim == 2), ["linear_0/w", "linear_1/w", "linear_10/w"]),
    ],
)
def test_what_a_choice_takes(where, taken):
    params = {f"linear_{i}": {"w": jnp.ones((1, 1)), "b": jnp.ones(1)} for i in (0, 1, 10)}
    selected, rest = mf.partition(where, params)
    assert [slow_name(path) for path, _ in tree_flatten_with_path(selected)[0]] == taken
    assert len(jax.tree.leaves(rest)) == 6 - len(taken)
    names = [slow_name(path) for path, _ in tree_flatten_with_path(params)[0]]
    assert jax.tree.leaves(mf.mask(where, params)) == [name in taken for name in names]


def test_only_the_first_letter_gives_back():
    tree = {" a": 1, "!a": 2, "a!": 3}
    assert jax.tree.leaves(mf.mask("! a", tree)) == [False, True, True]
    assert jax.tree.leaves(mf.mask("!!a", tree)) == [True, False, True]


def test_a_glob_takes_a_single_leaf_by_its_empty_name():
    assert mf.partition("*", 5) == (5, Hole())


def test_holes_survive_what_people_do_with_trees():
    trainable, frozen = mf.partition("a", {"a": jnp.ones(2), "b": jnp.ones(3)})
    assert frozen["a"] == Hole() != trainable["a"]
    assert {Hole(), Hole()} == {Hole()}  # hashed, so that it may stand in a static argument
    for copy in [
        jax.jit(lambda tree: tree)(trainable),
        jax.device_put(trainable),
        jax.grad(lambda tree: tree["a"] @ jnp.ones(2))(trainable),
        jax.vmap(lambda tree: tree)(trainable),
        jax.lax.scan(lambda tree, _: (tree, None), trainable, None, length=2)[0],
        jax.tree.map(lambda leaf: leaf, trainable),
        pickle.loads(pickle.dumps(trainable)),
    ]:
        same(copy, trainable)
        same(mf.merge(copy, frozen), {"a": jnp.ones(2), "b": jnp.ones(3)})
    assert repr(Hole()) == "Hole()"
    assert Hole() is not None
    assert Hole() not in (None, (), {}, 0, False)


def test_groups_come_from_splitting_again():
    params = mf.init(jax.random.key(0), [1, 2, 3, 4])
    head, rest = mf.partition("linear_2", params)
    bias, rest = mf.partition("*/b", rest)
    assert len(jax.tree.leaves(head)) == len(jax.tree.leaves(bias)) == 2
    for order in itertools.permutations([head, bias, rest]):
        same(mf.merge(*order), params)
    same(mf.merge(params), params)


def test_merge_names_every_path_at_once():
    first = {"a": 1, "b": Hole(), "c": {"d": 1, "e": Hole()}}
    second = {"a": 1, "b": Hole(), "c": {"d": Hole(), "e": 2}}
    with pytest.raises(ValueError, match="do not fit") as error:
        mf.merge(first, second, first)
    words(
        error,
        "'a' is held by part 0 and part 1 and part 2",
        "'b' is held by none",
        "'c/d' is held by part 0 and part 2",
    )
    assert "c/e" not in str(error.value)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"a": 1}, {"b": 1}, ["'a' is only in part 0", "'b' is only in part 1"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1]}}, ["'a/b/1' is only in part 0"]),
        ({"a": {"b": [1]}}, {"a": {"b": (1,)}}, ["'a/b' is list in part 0, tuple in part 1"]),
        ({"a": None}, {"a": 1}, ["'a' is NoneType in part 0, a leaf in part 1"]),
        ({"a": Hole()}, {"a": None}, ["'a' is a hole in part 0, NoneType in part 1"]),
        ({"a": Hole()}, {"a": {"w": 1}}, ["'a' is a hole in part 0, dict in part 1"]),
        ({"a": ()}, {"a": {}}, ["'a' is tuple in part 0, dict in part 1"]),
        (
            [1, {"a": [1]}, 3],
            [1, {"a": [1, 2]}],
            ["'1/a/1' is only in part 1", "'2' is only in part 0"],
        ),
        (
            Layer(1, {"x": 1}),
            Layer(Hole(), {"y": 1}),
            ["'b/x' is only in part 0", "'b/y' is only in"],
        ),
        (Layer(1, 2, "x"), Layer(1, 2, "y"), ["'' is PyTreeDef(", "'x'", "'y'"]),
        (Silent([1], [0]), Silent([1], [1]), ["[0]", "[1]"]),
        ({"k": Silent([1], [0]), "z": 1}, {"k": Silent([1], [1]), "z": [1]}, ["'k' is", "'z' is"]),
        (1, {"a": 1}, ["'' is a leaf in part 0, dict in part 1"]),
        (
            collections.OrderedDict(a=1, b=2),
            collections.OrderedDict(b=2, a=1),
            ["OrderedDict", "in part 0", "in part 1"],
        ),
    ],
)
def test_merge_says_where_structures_differ(one, other, expected):
    with pytest.raises(ValueError, match="do not fit") as error:
        mf.merge(one, other)
    words(error, *expected)


def test_merge_names_what_is_held_wrong_beside_what_differs():
    with pytest.raises(ValueError, match="do not fit") as error:
        mf.merge({"a": 1, "b": Hole(), "c": {"x": 1}}, {"a": 2, "b": Hole(), "c": Hole()})
    words(
        error,
        "'a' is held by part 0 and part 1",
        "'b' is held by none",
        "'c' is dict in part 0, a hole in part 1",
    )


class Twins(Keyed):
    """A custom node that gives all its children one key."""

    def tree_flatten_with_keys(self):
        return [(GetAttrKey("twin"), node) for node in self.inner], None


jax.tree_util.register_pytree_with_keys_class(Twins)


def test_paths_that_are_not_unique_lose_nothing():
    mine, rest = mf.partition(lambda path, leaf: leaf == 2, Twins(1, 2))
    assert mf.merge(mine, rest).inner == (1, 2)
    with pytest.raises(ValueError, match="do not fit") as error:
        mf.merge(Twins((1, 2), Hole()), Twins([Hole(), 2], 1))
    words(error, "'twin' is tuple in part 0, list in part 1")
    with pytest.raises(ValueError, match="two leaves") as error:
        mf.warm_start(Twins(0, 0), Twins(1, 2))
    assert str(error.value) == "old has two leaves of one key path: ['twin']"
    with pytest.raises(ValueError, match="two leaves") as error:
        mf.warm_start(0, {"a": 0, "b": Twins(1, 2), "c": 3})
    assert str(error.value) == "old has two leaves of one key path: ['b/twin']"


def test_any_number_of_leaves():
    """No comparison leans on small integers being one object (CPython keeps those to 256)."""
    tree = {i: float(i) for i in range(700)}
    parts = [
        mf.partition(lambda path, leaf, i=i: path[0].key % 300 == i, tree)[0] for i in range(300)
    ]
    same(mf.merge(*parts), tree)
    same(
        mf.warm_start(tree, dict.fromkeys(range(600), -1.0)),
        {**tree, **dict.fromkeys(range(600), -1.0)},
    )
    assert (
        len(mf.summary(**{f"part{i}": part for i, part in enumerate(parts)}).splitlines()) == 1004
    )
    with pytest.raises(ValueError, match="do not fit") as error:
        mf.merge(*parts[1:])
    words(error, "'0' is held by none; '300' is held by none; '600' is held by none")


def test_the_nearest_names_of_a_deep_tree_come_soon():
    tree = 1
    for _ in range(300):
        tree = {"kernel": tree, "b": 1}
    with pytest.raises(ValueError, match="10 of 301 names") as error:
        mf.mask("kernal", tree)
    words(error, "nearest first: ['kernel/")


def test_a_pattern_that_matches_nothing_names_the_nearest_ten():
    params = {f"block_{i}": {"attention": {"kernel": i}, "norm": i} for i in range(20)}
    with pytest.raises(ValueError, match="matches no leaf") as error:
        mf.partition(["*", "!blok_7/atention"], params)
    words(error, "'!blok_7/atention'", "10 of 40 names")
    listed = re.findall(r"'(block_[^']*)'", str(error.value))
    assert len(listed) == 10
    assert listed[0] == "block_7/attention/kernel"
    with pytest.raises(ValueError, match=r"2 of 2 names, nearest first: \['ab', 'xy'\]"):
        mf.partition("a", {"xy": 1, "ab": 2})


@pytest.mark.parametrize(
    ("glob", "tree", "nearest"),
    [
        ("kernl", {"kern": 1, "a": {"sub": {"kernel": 1}}}, "a/sub/kernel"),  # at its end
        ("modle", {"mdl": 1, "module": {"sub": {"w": 1}}}, "module/sub/w"),  # at its beginning
        ("sub/kernl", {"sb/kern": 1, "a": {"b": {"sub": {"kernel": 1}}}}, "a/b/sub/kernel"),
        ("modle/sub", {"mdl/sb": 1, "module": {"sub": {"b": {"w": 1}}}}, "module/sub/b/w"),
    ],
)
def test_the_nearest_name_may_be_like_the_pattern_at_either_end(glob, tree, nearest):
    with pytest.raises(ValueError, match="2 of 2 names") as error:
        mf.partition(glob, tree)
    words(error, f"nearest first: [{nearest!r}, ")


def test_an_exception_in_a_predicate_passes_through():
    mine = KeyError("mine")

    def where(path, leaf):
        raise mine

    with pytest.raises(KeyError) as error:
        mf.partition(where, {"a": 1})
    assert error.value is mine


@pytest.mark.parametrize(
    "look",
    [
        lambda path, leaf: bool(leaf > 0),
        lambda path, leaf: leaf > 0,
        lambda path, leaf: int(leaf) == 1,
        lambda path, leaf: [True][leaf.astype(int)],
        lambda path, leaf: np.asarray(leaf) > 0,
        lambda path, leaf: leaf.item() > 0,
        lambda path, leaf: leaf[leaf > 0].size == 1,
    ],
)
def test_a_predicate_that_looks_at_a_tracer(look):
    with pytest.raises(TypeError, match="path, shape and dtype only") as error:
        jax.jit(lambda tree: mf.partition(look, tree))({"a": {"b": 1.0}})
    words(error, "'a/b'")


# ----------------------------------------------------------------------- warm_start, summary


def test_summary_by_hand():
    tree = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": 1.0, "f": len, "key": jax.random.key(0)}
    parts = dict(zip(("selected", "rest"), mf.partition(["w", "f"], tree)))
    assert (
        mf.summary(**parts)
        == """\
path  shape   dtype                       count  part
b     ()      float32                         1  rest
f     -       builtin_function_or_method      0  selected
key   ()      key<fry>                        1  rest
w     (2, 3)  bfloat16                        6  selected

part      count  bytes   share
selected      6     12   75.0%
rest          2     12   25.0%
total         8     24  100.0%"""
    )


def test_summary_names_what_is_held_twice_and_what_differs_and_no_more():
    one, other = {"a": 1, "b": 2, "c": 3, "d": Hole()}, {"a": 4, "b": Hole(), "c": 5, "d": Hole()}
    twice = "'a' is held by one and other; 'c' is held by one and other"
    with pytest.raises(ValueError, match="do not fit") as error:
        mf.summary(one=one, other=other)
    assert str(error.value) == f"the parts do not fit: {twice}"
    with pytest.raises(ValueError, match="do not fit") as error:
        mf.summary(one={**one, "e": 6}, other=other)
    assert str(error.value) == f"the parts do not fit: {twice}; 'e' is only in one"


def test_half_an_array_is_no_array():
    for half in (SimpleNamespace(shape=(2,)), SimpleNamespace(dtype=np.dtype("float32"))):
        assert mf.summary(x=half).splitlines()[1].split() == ["-", "SimpleNamespace", "0", "x"]


def test_an_array_class_is_a_leaf_that_is_no_array():
    tree = {"dtype": np.float32, "kind": jax.Array}
    assert mf.summary(config=tree).splitlines()[1].split() == ["dtype", "-", "type", "0", "config"]
    assert mf.warm_start(tree, {"dtype": np.float64})["dtype"] is np.float64


def test_summary_of_abstract_parts_and_of_tracers_is_the_same_text():
    def make():
        return mf.partition("*/w", mf.init(jax.random.key(0), [3, 4, 5]))

    names = ("trainable", "frozen")
    text = mf.summary(**dict(zip(names, make())))
    assert mf.summary(**dict(zip(names, jax.eval_shape(make)))) == text
    texts: list[str] = []
    jax.eval_shape(lambda *parts: texts.append(mf.summary(**dict(zip(names, parts)))), *make())
    assert texts == [text]


def test_summary_of_one_part_and_of_nothing():
    trainable, _ = mf.partition("a", {"a": np.ones((2, 2), np.float64), "b": 1})
    assert mf.summary(trainable=trainable).splitlines()[1].split() == [
        "a",
        "(2,",
        "2)",
        "float64",
        "4",
        "trainable",
    ]
    assert mf.summary(empty={}).splitlines()[-1].split() == ["total", "0", "0", "0.0%"]


def test_warm_start_compares_shapes_and_dtypes_of_what_is_no_array_too():
    same(mf.warm_start({"a": 0, "b": 1}, {"a": 5}), {"a": 5, "b": 1})
    assert mf.warm_start({"f": len}, {"f": abs}) == {"f": abs}
    with pytest.raises(ValueError, match="'f' is builtin_function_or_method in new, str in old"):
        mf.warm_start({"f": len}, {"f": "text"})


def test_warm_start_tells_paths_of_one_name_apart():
    new = {"a/b": 1, "a": {"b": 2}}
    same(mf.warm_start(new, {"a": {"b": 5}}), {"a/b": 1, "a": {"b": 5}})


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(mf)
    assert result.attempted >= 14
    assert result.failed == 0


def test_all_names_what_is_public():
    public = {n for n, v in vars(mf).items() if getattr(v, "__module__", "") == "minifreeze"}
    assert {n for n in public if not n.startswith("_")} - {"main"} == set(mf.__all__)
    assert all(getattr(mf, name).__doc__ for name in mf.__all__)


# ------------------------------------------------------------------- bad input, all of it


PARAMS = mf.init(jax.random.key(0), [2, 3, 10])
TRAINABLE, FROZEN = mf.partition("linear_1", PARAMS)
INPUTS, LABELS = jnp.ones((4, 2)), jnp.arange(4)
ONCE, REST = mf.hoist(mf.loss_fn, TRAINABLE, FROZEN, INPUTS, LABELS)


def raises(error):
    def where(path, leaf):
        raise error

    return where


def deleted():
    params = jax.tree.map(lambda leaf: leaf + 0, PARAMS)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    return mf.partition("linear_1", params)


def nan_in(tree):
    return jax.tree.map(lambda leaf: leaf * jnp.nan, tree)


def debug_nans(run):
    with jax.debug_nans(True):
        return run()


BAD_INPUT = {
    # choosing
    "pattern matches nothing": (
        lambda: mf.partition("liner_1", PARAMS),
        ValueError,
        ["'liner_1'", "nearest first", "linear_1/b"],
    ),
    "pattern of a substring": (
        lambda: mf.partition("linear", PARAMS),
        ValueError,
        ["'linear'", "linear_0/b"],
    ),
    "pattern of the wrong case": (
        lambda: mf.partition("Linear_1", PARAMS),
        ValueError,
        ["'Linear_1'", "linear_1"],
    ),
    "pattern with a slash too many": (
        lambda: mf.partition("linear_1/", PARAMS),
        ValueError,
        ["'linear_1/'", "linear_1/b"],
    ),
    "pattern with a leading slash": (
        lambda: mf.partition("/linear_1", PARAMS),
        ValueError,
        ["'/linear_1'", "linear_1/b"],
    ),
    "pattern as JAX prints paths": (
        lambda: mf.partition("['linear_1']", PARAMS),
        ValueError,
        ["linear_1/b"],
    ),
    "giving back nothing": (
        lambda: mf.partition("!liner_1", PARAMS),
        ValueError,
        ["'!liner_1'", "linear_1/b"],
    ),
    "one pattern of several": (
        lambda: mf.partition(["linear_1", "*/bias"], PARAMS),
        ValueError,
        ["'*/bias'", "linear_1/b"],
    ),
    "one that gives back, of several": (
        lambda: mf.mask(["*", "!*/bias"], PARAMS),
        ValueError,
        ["'!*/bias'"],
    ),
    "empty pattern": (lambda: mf.partition("", PARAMS), ValueError, ["''", "linear_0/b"]),
    "empty pattern that gives back": (
        lambda: mf.partition("!", PARAMS),
        ValueError,
        ["'!'", "linear_0/b"],
    ),
    "empty pattern in a list": (lambda: mf.partition(["linear_1", ""], PARAMS), ValueError, ["''"]),
    "empty pattern on a single leaf": (
        lambda: mf.partition("", 5),
        ValueError,
        ["''", "1 of 1 names"],
    ),
    "empty list": (lambda: mf.partition([], PARAMS), ValueError, ["empty", "linear_0/b"]),
    "empty tuple": (lambda: mf.mask((), PARAMS), ValueError, ["empty", "linear_0/b"]),
    "pattern on a tree without leaves": (
        lambda: mf.partition("*", {}),
        ValueError,
        ["'*'", "0 of 0 names"],
    ),
    "list with a number": (
        lambda: mf.partition(["linear_1", 2], PARAMS),
        TypeError,
        ["a pattern must be a string", "2"],
    ),
    "list with a list": (
        lambda: mf.partition([["linear_1"]], PARAMS),
        TypeError,
        ["a pattern must be a string"],
    ),
    "list with a predicate": (
        lambda: mf.mask([lambda path, leaf: True], PARAMS),
        TypeError,
        ["a pattern must be a string"],
    ),
    "pattern of bytes": (
        lambda: mf.partition([b"linear_1"], PARAMS),
        TypeError,
        ["a pattern must be a string", "b'linear_1'"],
    ),
    "a set of patterns": (lambda: mf.partition({"linear_1"}, PARAMS), TypeError, ["where", "set"]),
    "a compiled pattern": (
        lambda: mf.partition(re.compile("linear_1"), PARAMS),
        TypeError,
        ["where", "Pattern"],
    ),
    "nothing to choose by": (lambda: mf.partition(None, PARAMS), TypeError, ["where", "NoneType"]),
    "a bool to choose by": (lambda: mf.partition(True, PARAMS), TypeError, ["where", "bool"]),
    "arguments swapped": (lambda: mf.partition(PARAMS, "linear_1"), TypeError, ["where", "dict"]),
    "a mask to choose by": (
        lambda: mf.partition(mf.mask("linear_1", PARAMS), PARAMS),
        TypeError,
        ["where", "dict"],
    ),
    "answer None": (
        lambda: mf.partition(lambda path, leaf: None, PARAMS),
        TypeError,
        ["None", "'linear_0/b'"],
    ),
    "answer a string": (
        lambda: mf.partition(lambda path, leaf: "no", PARAMS),
        TypeError,
        ["'no'", "'linear_0/b'"],
    ),
    "answer an int": (
        lambda: mf.mask(lambda path, leaf: 1, PARAMS),
        TypeError,
        ["got 1", "'linear_0/b'"],
    ),
    "answer an array": (
        lambda: mf.partition(lambda path, leaf: jnp.array(True), PARAMS),
        TypeError,
        ["Array(True", "'linear_0/b'"],
    ),
    "answer a NumPy array": (
        lambda: mf.partition(lambda path, leaf: np.array(True), PARAMS),
        TypeError,
        ["array(True)"],
    ),
    "answer an array of comparisons": (
        lambda: mf.partition(lambda path, leaf: leaf > 0, PARAMS),
        TypeError,
        ["'linear_0/b'"],
    ),
    "a later answer": (
        lambda: mf.partition(lambda path, leaf: True if leaf.ndim == 1 else None, PARAMS),
        TypeError,
        ["'linear_0/w'"],
    ),
    "predicate of one argument": (
        lambda: mf.partition(lambda path: True, PARAMS),
        TypeError,
        ["positional argument"],
    ),
    "predicate that raises": (
        lambda: mf.partition(raises(KeyError("mine")), PARAMS),
        KeyError,
        ["mine"],
    ),
    "predicate that raises a jax error": (
        lambda: mf.partition(raises(jax.errors.UnexpectedTracerError("mine")), PARAMS),
        jax.errors.UnexpectedTracerError,
        ["mine"],
    ),
    "predicate at a traced value": (
        lambda: jax.jit(lambda p: mf.mask(lambda path, leaf: leaf.sum() > 0, p))(PARAMS),
        TypeError,
        ["path, shape and dtype only", "'linear_0/b'"],
    ),
    # merging
    "merge of nothing": (lambda: mf.merge(), TypeError, ["at least one part"]),
    "merge of a part": (
        lambda: mf.merge(TRAINABLE),
        ValueError,
        ["'linear_0/b' is held by none", "'linear_0/w' is held by none"],
    ),
    "merge of a part twice": (
        lambda: mf.merge(TRAINABLE, TRAINABLE),
        ValueError,
        ["'linear_1/w' is held by part 0 and part 1", "'linear_0/w' is held by none"],
    ),
    "merge of a part and the whole": (
        lambda: mf.merge(PARAMS, FROZEN),
        ValueError,
        ["'linear_0/w' is held by part 0 and part 1"],
    ),
    "merge of nan twice": (
        lambda: mf.merge({"a": jnp.nan}, {"a": jnp.nan}),
        ValueError,
        ["'a' is held by part 0 and part 1"],
    ),
    "merge of other names": (
        lambda: mf.merge(TRAINABLE, {"linear_1": Hole()}),
        ValueError,
        ["'linear_0' is only in part 0", "'linear_1' is dict in part 0, a hole in part 1"],
    ),
    "merge of structures that differ at depth": (
        lambda: mf.merge({"a": {"b": {"c": [1, Hole()]}}}, {"a": {"b": {"c": (Hole(), 1)}}}),
        ValueError,
        ["'a/b/c' is list in part 0, tuple in part 1"],
    ),
    "merge with None for a hole": (
        lambda: mf.merge({"a": 1, "b": None}, {"a": None, "b": 2}),
        ValueError,
        ["'a' is a leaf in part 0, NoneType in part 1", "'b' is NoneType"],
    ),
    "merge of parts in a list": (
        lambda: mf.merge([TRAINABLE, FROZEN]),
        ValueError,
        ["'0/linear_0/b' is held by none"],
    ),
    # the other trees
    "warm start with another shape": (
        lambda: mf.warm_start({"a": {"b": jnp.ones(2)}}, {"a": {"b": jnp.ones(3)}}),
        ValueError,
        ["'a/b'", "float32[2] in new", "float32[3] in old"],
    ),
    "warm start with another dtype": (
        lambda: mf.warm_start([jnp.ones(2)], [jnp.ones(2, jnp.bfloat16)]),
        ValueError,
        ["'0'", "float32[2] in new", "bfloat16[2] in old"],
    ),
    "warm start with many misfits": (
        lambda: mf.warm_start([1, 2, 3.0], [1.0, 2, 3]),
        ValueError,
        ["'0' is int32[] in new, float32[] in old", "'2' is float32[] in new"],
    ),
    "summary of nothing": (lambda: mf.summary(), TypeError, ["at least one part"]),
    "summary of a leaf in two parts": (
        lambda: mf.summary(a=PARAMS, b=FROZEN),
        ValueError,
        ["'linear_0/b' is held by a and b"],
    ),
    "summary of structures that differ": (
        lambda: mf.summary(a={"x": 1}, b={"y": 1}),
        ValueError,
        ["'x' is only in a", "'y' is only in b"],
    ),
    # the model
    "one size": (
        lambda: mf.init(jax.random.key(0), [3]),
        ValueError,
        ["[3]", "input and an output"],
    ),
    "no size": (lambda: mf.init(jax.random.key(0), []), ValueError, ["[]"]),
    "size zero": (lambda: mf.init(jax.random.key(0), [3, 0, 2]), ValueError, ["sizes[1]", "0"]),
    "size below zero": (
        lambda: mf.init(jax.random.key(0), [3, 2, -1]),
        ValueError,
        ["sizes[2]", "-1"],
    ),
    "size of a fraction": (
        lambda: mf.init(jax.random.key(0), [3.0, 2]),
        ValueError,
        ["sizes[0]", "3.0"],
    ),
    "size of a string": (lambda: mf.init(jax.random.key(0), "32"), ValueError, ["sizes[0]", "'3'"]),
    "size a bool": (
        lambda: mf.init(jax.random.key(0), [3, True]),
        ValueError,
        ["sizes[1]", "True"],
    ),
    "a seed for a key": (lambda: mf.init(42, [3, 2]), TypeError, ["key"]),
    "many keys for one": (
        lambda: mf.init(jax.random.split(jax.random.key(0)), [3, 2]),
        ValueError,
        ["key"],
    ),
    "wrong width": (
        lambda: mf.apply(PARAMS, jnp.ones((4, 5))),
        ValueError,
        ["linear_0", "width 2", "(4, 5)"],
    ),
    "wrong width inside": (
        lambda: mf.apply(
            {"linear_0": PARAMS["linear_1"], "linear_1": PARAMS["linear_0"]}, jnp.ones((4, 3))
        ),
        ValueError,
        ["linear_1", "width 2", "(4, 10)"],
    ),
    "a number for a batch": (lambda: mf.apply(PARAMS, 1.0), ValueError, ["width 2", "()"]),
    "apply on a part": (lambda: mf.apply(TRAINABLE, INPUTS), ValueError, ["merge", "linear_0/w"]),
    "apply on other names": (
        lambda: mf.apply({"layer": PARAMS["linear_0"]}, INPUTS),
        ValueError,
        ["linear_0, linear_1", "layer"],
    ),
    "apply on a gap in the names": (
        lambda: mf.apply({"linear_0": PARAMS["linear_0"], "linear_2": PARAMS["linear_1"]}, INPUTS),
        ValueError,
        ["linear_2"],
    ),
    "apply on no layer": (lambda: mf.apply({}, INPUTS), ValueError, ["linear_0"]),
    # the training
    "labels that are no integers": (
        lambda: mf.loss_fn(TRAINABLE, FROZEN, INPUTS, jnp.ones(4)),
        TypeError,
        ["integers", "float32"],
    ),
    "labels of another length": (
        lambda: mf.loss_fn(TRAINABLE, FROZEN, INPUTS, jnp.arange(3)),
        ValueError,
        ["(3,)", "(4, 10)"],
    ),
    "labels in a column": (
        lambda: mf.train_step(TRAINABLE, FROZEN, INPUTS, LABELS[:, None]),
        ValueError,
        ["(4, 1)", "(4, 10)"],
    ),
    "integers in the trainable part": (
        lambda: mf.train_step(
            jax.tree.map(lambda leaf: leaf.astype(int), TRAINABLE), FROZEN, INPUTS, LABELS
        ),
        TypeError,
        ["'linear_1/b'", "int32"],
    ),
    "bools in the trainable part": (
        lambda: mf.train(
            {"linear_0": Hole(), "linear_1": jnp.ones(2, bool)}, FROZEN, INPUTS[None], LABELS[None]
        ),
        TypeError,
        ["'linear_1'", "bool"],
    ),
    "a key in the trainable part": (
        lambda: mf.train_step({"key": jax.random.key(0)}, FROZEN, INPUTS, LABELS),
        TypeError,
        ["'key'", "key<fry>"],
    ),
    "text in the trainable part": (
        lambda: mf.train_step({"linear_0": "text"}, FROZEN, INPUTS, LABELS),
        TypeError,
        ["linear_0", "str"],
    ),
    "nan in the trainable part, looked for": (
        lambda: debug_nans(lambda: mf.train_step(nan_in(TRAINABLE), FROZEN, INPUTS, LABELS)),
        FloatingPointError,
        ["nan"],
    ),
    "train_step on parts swapped at depth": (
        lambda: mf.train_step(TRAINABLE, TRAINABLE, INPUTS, LABELS),
        ValueError,
        ["'linear_0/b' is held by none"],
    ),
    "train_step on donated arrays": (
        lambda: mf.train_step(*deleted(), INPUTS, LABELS),
        (RuntimeError, ValueError),
        ["delete"],
    ),
    "train on batches of other lengths": (
        lambda: mf.train(TRAINABLE, FROZEN, INPUTS[None], jnp.stack([LABELS, LABELS])),
        ValueError,
        ["2", "1"],
    ),
    "sgd_step on other gradients": (lambda: mf.sgd_step(TRAINABLE, FROZEN), ValueError, ["Hole"]),
    "more drawn than there is": (
        lambda: mf.dataset(jax.random.key(0), 5, 11),
        ValueError,
        ["batch_size 11", "num_classes 10"],
    ),
    "no records": (lambda: mf.dataset(jax.random.key(0), 0), ValueError, ["num_records", "0"]),
    "a batch of none": (
        lambda: mf.dataset(jax.random.key(0), 5, 0),
        ValueError,
        ["batch_size", "0"],
    ),
    "classes of a fraction": (
        lambda: mf.dataset(jax.random.key(0), 5, 2, 2.5),
        ValueError,
        ["num_classes", "2.5"],
    ),
    # hoisting
    "once with another shape": (
        lambda: ONCE(FROZEN, INPUTS[:3], LABELS),
        ValueError,
        ["'batch/0'", "float32[4,2] in hoist", "float32[3,2] in the call"],
    ),
    "once with another dtype": (
        lambda: ONCE(FROZEN, INPUTS, LABELS.astype(float)),
        ValueError,
        ["'batch/1'", "int32[4] in hoist", "float32[4] in the call"],
    ),
    "once without the labels": (
        lambda: ONCE(FROZEN, INPUTS),
        ValueError,
        ["'batch/1' is only in hoist"],
    ),
    "once on the wrong part": (
        lambda: ONCE(TRAINABLE, INPUTS, LABELS),
        ValueError,
        ["'frozen/linear_0/b' is float32[3] in hoist, Hole in the call"],
    ),
    "rest with less kept": (
        lambda: REST(TRAINABLE, FROZEN, ONCE(FROZEN, INPUTS, LABELS)[:1]),
        ValueError,
        ["'kept/1' is only in hoist"],
    ),
    "rest with parts swapped": (
        lambda: REST(FROZEN, TRAINABLE, ONCE(FROZEN, INPUTS, LABELS)),
        ValueError,
        ["'trainable/linear_1/w' is float32[3,10] in hoist, Hole in the call"],
    ),
    "rest with the batch": (
        lambda: REST(TRAINABLE, FROZEN, (INPUTS, LABELS)),
        ValueError,
        ["kept/"],
    ),
    "hoisting a loss of another batch": (
        lambda: mf.hoist(mf.loss_fn, TRAINABLE, FROZEN, INPUTS),
        TypeError,
        ["'y'"],
    ),
}


@pytest.mark.parametrize(("run", "error", "expected"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(run, error, expected):
    with pytest.raises(error) as raised:
        run()
    words(raised, *expected)


BAD_ARGUMENTS = {
    "steps of zero": (["--steps", "0"], ["--steps must be in 1 .. 10000000, got 0"]),
    "a step too many": (
        ["--steps", "10000001"],
        ["--steps must be in 1 .. 10000000, got 10000001"],
    ),
    "steps below zero": (["--steps", "-1"], ["--steps", "-1"]),
    "steps of a fraction": (["--steps", "1.5"], ["--steps", "1.5"]),
    "steps without end": (
        ["--steps", "1" + "0" * 21],
        ["--steps must be in 1 .. 10000000, got 1000"],
    ),
    "a plot of too long a name": (["--plot", "x" * 300 + ".png"], ["xxx.png", "too long"]),
    "no number of steps": (["--steps"], ["--steps", "argument"]),
    "seed of a word": (["--seed", "x"], ["--seed", "'x'"]),
    "seed below zero": (["--seed", "-1"], ["--seed must be in 0 .. 4294967295, got -1"]),
    "seed too large": (
        ["--seed", str(2**32)],
        ["--seed must be in 0 .. 4294967295, got 4294967296"],
    ),
    "an option that is not there": (["--stepz", "1"], ["--stepz"]),
    "an argument too many": (["extra"], ["extra"]),
    "a plot nowhere": (["--plot", "not/there.png"], ["not/there.png", "No such file"]),
    "a plot on a folder": (["--plot", "folder.png"], ["folder.png", "Is a directory"]),
    "a plot of no kind": (["--plot", "picture"], ["picture", "kind"]),
    "a plot of an unknown kind": (["--plot", "picture.xyz"], ["'xyz'"]),
}


@pytest.mark.parametrize(("argv", "expected"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as error:
        mf.main(argv)
    assert error.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert all(word in said.err for word in expected), said.err
    assert sorted(os.listdir(tmp_path)) == ["folder.png"]


def test_there_are_sixty_rows_of_bad_input():
    assert len(BAD_INPUT) + len(BAD_ARGUMENTS) >= 60


# ------------------------------------------------------------------------------ the main job


def run_python(*argv, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, argv)], capture_output=True, text=True, **options
    )


@pytest.mark.slow
def test_the_walk_through_as_it_is_run(tmp_path):
    """The file alone in an empty folder: ten numbers learned, the middle layer untouched."""
    (tmp_path / "minifreeze.py").write_bytes((HERE / "minifreeze.py").read_bytes())
    done = run_python("minifreeze.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    before, after, beyond = (
        lines.index(x) for x in ("before training", "after training", "out of range")
    )
    guesses = [re.fullmatch(rf"\[{n}\.\] -> (\d)", lines[before + 1 + n])[1] for n in range(10)]
    assert guesses != list("0123456789")
    assert lines[after + 1 : after + 11] == [f"[{n}.] -> {n}" for n in range(10)]
    assert lines[beyond + 1 : beyond + 11] == [f"[{n}.] -> 9" for n in range(10, 20)]
    params = mf.init(jax.random.key(42), [1, 300, 100, 10])
    trainable, frozen = mf.partition(["linear_0", "linear_2"], params)
    assert mf.summary(trainable=trainable, frozen=frozen) in done.stdout
    logits = numpy_logits(params, np.arange(10.0)[:, None])
    assert guesses == [str(n) for n in logits.argmax(-1)]
    assert "10000 steps, loss " in done.stdout
    assert lines[-2:] == [
        "changed: linear_0/b, linear_0/w, linear_2/b, linear_2/w",
        "bit for bit as before: linear_1/b, linear_1/w",
    ]


def test_the_walk_through_line_by_line(capsys):
    mf.main(["--steps", "3"])
    key = jax.random.key(42)
    before = mf.init(key, [1, 300, 100, 10])
    trainable, frozen = mf.partition("!linear_1", before)
    text = mf.summary(trainable=trainable, frozen=frozen)
    trainable, losses = mf.train(trainable, frozen, *mf.dataset(jax.random.fold_in(key, 1), 3))
    after = mf.merge(trainable, frozen)

    def guesses(params, numbers):
        labels = numpy_logits(params, np.array(numbers)[:, None]).argmax(-1)
        return [f"[{n}.] -> {label}" for n, label in zip(numbers, labels)]

    assert capsys.readouterr().out.splitlines() == [
        *("before training", *guesses(before, range(10)), ""),
        *(*text.splitlines(), ""),
        *(f"3 steps, loss {losses[0]:.6f} -> {losses[2]:.6f}", ""),
        *("after training", *guesses(after, range(10)), ""),
        *("out of range", *guesses(after, range(10, 20)), ""),
        "changed: linear_0/b, linear_0/w, linear_2/b, linear_2/w",
        "bit for bit as before: linear_1/b, linear_1/w",
    ]


@pytest.mark.slow
def test_the_walk_through_with_options(capsys, tmp_path):
    mf.main(["--steps", "3", "--seed", "7", "--plot", str(tmp_path / "params.png")])
    out = capsys.readouterr().out
    key = jax.random.key(7)
    parts = mf.partition(["linear_0", "linear_2"], mf.init(key, [1, 300, 100, 10]))
    _, losses = mf.train(*parts, *mf.dataset(jax.random.fold_in(key, 1), 3))
    assert f"3 steps, loss {losses[0]:.6f} -> {losses[-1]:.6f}" in out
    assert out.endswith(f"drawn: {tmp_path / 'params.png'}\n")
    from matplotlib.image import imread

    picture = imread(tmp_path / "params.png")
    assert picture.shape == imread(HERE / ".github" / "params.png").shape  # the README's
    assert picture[..., :3].std() > 0.05  # something is drawn
    assert os.listdir(tmp_path) == ["params.png"]


def test_run_as_a_script_for_one_step(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minifreeze.py", "--steps", "1", "--seed", str(2**32 - 1)])
    runpy.run_path(str(HERE / "minifreeze.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "1 steps, loss " in out
    assert out.endswith("bit for bit as before: linear_1/b, linear_1/w\n")


def test_a_plot_replaces_a_file_and_a_full_disk_is_told(capsys, tmp_path):
    picture = tmp_path / "old.png"
    picture.write_text("not a picture")
    mf.main(["--steps", "1", "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    full = tmp_path / "full.png"
    full.symlink_to("/dev/full")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        mf.main(["--steps", "1", "--plot", str(full)])
    said = capsys.readouterr().err
    assert "full.png: " in said
    assert "No space left" in said
    assert said.count("\n") == 1


def test_the_plot_draws_every_parameter_twice_and_marks_the_frozen(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    before = mf.init(jax.random.key(0), [2, 3, 4])
    _, frozen = mf.partition("linear_1", before)
    after = {**before, "linear_1": jax.tree.map(lambda leaf: leaf + 1, before["linear_1"])}
    mf._plot("unused.png", before, after, frozen)
    axes = [axis for axis in figures[0].axes if axis.get_title()]
    assert len(figures[0].axes) == 3 * len(jax.tree.leaves(before))  # two, and their scale
    titles = [
        "linear_0/b\nfrozen",
        "linear_0/w\nfrozen",
        "linear_1/b\ntrains",
        "linear_1/w\ntrains",
    ]
    assert [axis.get_title() for axis in axes] == [*titles, *titles]
    assert [axis.get_xlabel() for axis in axes] == ["before"] * 4 + ["after"] * 4
    assert [axis.title.get_color() for axis in axes] == (["tab:blue"] * 2 + ["black"] * 2) * 2
    for axis, leaf in zip(axes, [*jax.tree.leaves(before), *jax.tree.leaves(after)]):
        np.testing.assert_array_equal(axis.images[0].get_array(), np.atleast_2d(leaf))
    for above, below in zip(axes[:4], axes[4:]):  # one scale, with zero in its middle
        low, high = above.images[0].get_clim()
        assert (low, high) == below.images[0].get_clim()
        largest = max(np.abs(axis.images[0].get_array()).max() for axis in (above, below))
        assert -low == high == (largest or 1)  # a parameter that is all zero has zero's colour


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(SystemExit, match="2"):
        mf.main(["--plot", "x.png"])
    said = capsys.readouterr().err
    assert "pip install matplotlib" in said
    assert said.count("\n") == 1


def link_packages(folder, *names):
    """Makes `folder` hold the named packages and what they require, and nothing else."""
    done, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in done:
            continue
        done.add(name)
        package = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            (folder / top).symlink_to(package.locate_file(top))
        required = [text for text in package.requires or () if ";" not in text]
        todo += [re.match(r"[\w.-]+", text)[0] for text in required]


@pytest.mark.slow
def test_copied_alone_into_a_package_of_another_name(tmp_path):
    (tmp_path / "site").mkdir()
    link_packages(tmp_path / "site", "jax", "numpy")
    package = tmp_path / "TheirProject"  # any name: this one sorts before "__main__"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "freezing.py").write_bytes((HERE / "minifreeze.py").read_bytes())
    program = """
import pickle, sys
sys.path += ['.', 'site']
import jax, jax.numpy as jnp
from TheirProject import freezing
params = freezing.init(jax.random.key(0), [1, 4, 10])
trainable, frozen = freezing.partition('linear_1', params)
once, rest = freezing.hoist(freezing.loss_fn, trainable, frozen, jnp.ones((2, 1)), jnp.arange(2))
trainable, loss = freezing.train_step(trainable, frozen, jnp.ones((2, 1)), jnp.arange(2))
assert pickle.loads(pickle.dumps(frozen))['linear_1']['w'] == freezing.Hole()
print(sorted(freezing.merge(trainable, frozen)), freezing.__version__, 'pytest' in sys.modules)
import optax
"""
    done = run_python("-I", "-S", "-c", program, cwd=tmp_path)
    assert done.stdout == f"['linear_0', 'linear_1'] {mf.__version__} False\n"
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'optax'"


@pytest.mark.slow
def test_importing_starts_nothing():
    program = (
        "import jax, sys; before = set(sys.modules); import minifreeze;"
        "from jax._src import xla_bridge; assert not xla_bridge._backends;"
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith(('jax', '_'))))"
    )
    done = run_python("-c", program, cwd=HERE)
    assert done.stderr == ""
    assert done.stdout == "['minifreeze']\n"


# ---------------------------------------------------------------------- what the tests share

SIZES = [4, 16, 16, 3]
TRAINS = ("linear_0", "linear_2")  # the middle one is frozen


def named_leaves(tree):
    """Every leaf of a tree under its name."""
    return {
        keystr(path, simple=True, separator="/"): leaf
        for path, leaf in tree_flatten_with_path(tree)[0]
    }


def changed(before, after):
    """The names of the leaves whose dtype, shape or bits differ."""
    before, after = named_leaves(before), named_leaves(after)
    assert set(before) == set(after)

    def bits(leaf):
        leaf = np.asarray(leaf)
        return leaf.dtype, leaf.shape, leaf.tobytes()

    return [name for name in before if bits(before[name]) != bits(after[name])]


def assert_close(got, want, tolerance=1e-6):
    """The same structure, and values as near as float32 sums in another order can be."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(tree_flatten_with_path(got)[0], jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = np.abs(b).max(initial=1)
        np.testing.assert_allclose(a, b, tolerance, tolerance * scale, err_msg=keystr(path))


def is_array(path, leaf):
    return isinstance(leaf, jax.Array)


def size_in_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def a_batch(width=4, classes=3, records=8, seed=7):
    keys = jax.random.split(jax.random.key(seed))
    return (
        jax.random.normal(keys[0], (records, width)),
        jax.random.randint(keys[1], (records,), 0, classes),
    )


def cross_entropy(logits, y):
    """The mean softmax cross-entropy, from its definition."""
    chosen = jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def plain_loss(moving, still, x, y):
    """The loss of the MLP with its layers in two plain dicts: what minifreeze is held against."""
    layers, last = {**moving, **still}, len(moving) + len(still) - 1
    for i in range(last + 1):
        x = x @ layers[f"linear_{i}"]["w"] + layers[f"linear_{i}"]["b"]
        x = x if i == last else jax.nn.relu(x)
    return -jnp.sum(jax.nn.one_hot(y, x.shape[-1]) * jax.nn.log_softmax(x)) / y.size


# Compiled once for all tests: compiling takes longer than anything that the tests compute.
part_gradient = jax.jit(jax.grad(loss_fn))
plain_gradient = jax.jit(jax.grad(plain_loss))


def optax_steps(optimizer, params, gradient, steps, state=None):
    """Steps with optax on any tree: (params, state)."""
    import optax

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params) if state is None else state
    for _ in range(steps):
        params, state = step(params, state, gradient(params))
    return params, state


# ----------------------------------------------------------------- Haiku: the walk-through


def haiku_mlp(sizes):
    import haiku as hk

    return hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP(sizes[1:])(x)))


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ([1, 300, 100, 10], "float32"),
        ([3] * 2, "float32"),
        ([3] * 12, "float32"),
        ([3] * 12, "bfloat16"),
        ([3] * 12, "float16"),
    ],
)
@pytest.mark.parametrize("style", ["key", "PRNGKey"])
def test_init_and_apply_are_haikus_bit_for_bit(sizes, style, dtype):
    key = getattr(jax.random, style)(42)
    x = jnp.linspace(-2, 2, 3 * sizes[0]).reshape(3, sizes[0]).astype(dtype)
    network = haiku_mlp(sizes)
    theirs = network.init(key, x)
    ours = init(key, sizes, dtype)
    assert changed({f"mlp/~/{layer}": leaves for layer, leaves in ours.items()}, theirs) == []
    assert changed(jax.jit(apply)(ours, x), jax.jit(network.apply)(theirs, x)) == []


@pytest.mark.parametrize(
    ("where", "frozen_modules"),
    [
        ("!mlp/~/linear_1", ["mlp/~/linear_1"]),
        (("mlp/~/linear_0", "mlp/~/linear_2"), ["mlp/~/linear_1"]),
        (["*", "!mlp/~/linear_[01]"], ["mlp/~/linear_0", "mlp/~/linear_1"]),
        (lambda path, leaf: path[0].key == "mlp/~/linear_2", ["mlp/~/linear_0", "mlp/~/linear_1"]),
    ],
)
def test_haiku_params_split_as_haiku_splits_them(where, frozen_modules):
    import haiku as hk

    params = haiku_mlp([3] * 4).init(jax.random.key(0), np.ones((2, 3), np.float32))
    parts = partition(where, params)
    theirs = hk.data_structures.partition(lambda module, *_: module not in frozen_modules, params)
    for part, their_part in zip(parts, theirs):
        assert changed(part, their_part) == []
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, merge(*parts), params))


def test_ten_thousand_steps_are_haikus_bit_for_bit():
    import haiku as hk

    sizes, steps = [1, 300, 100, 10], 10_000
    key = jax.random.key(42)
    xs, ys = dataset(jax.random.key(1), steps)
    batches = list(zip(np.asarray(xs), np.asarray(ys)))

    network = haiku_mlp(sizes)
    before = network.init(key, xs[0])
    theirs, their_frozen = hk.data_structures.partition(
        lambda module, *_: module != "mlp/~/linear_1", before
    )

    @jax.jit
    def haiku_step(trainable, frozen, x, y):
        def loss(trainable):
            logits = network.apply(hk.data_structures.merge(trainable, frozen), x)
            return -jnp.sum(jax.nn.one_hot(y, 10) * jax.nn.log_softmax(logits)) / y.shape[0]

        value, grads = jax.value_and_grad(loss)(trainable)
        return jax.tree.map(lambda p, g: p - g * 0.1, trainable, grads), value

    start, frozen = partition("!linear_1", init(key, sizes))
    ours, losses, their_losses = start, [], []
    for x, y in batches:
        theirs, loss = haiku_step(theirs, their_frozen, x, y)
        their_losses.append(loss)
        ours, loss = train_step(ours, frozen, x, y)
        losses.append(loss)
    scanned, scanned_losses = train(start, frozen, xs, ys)

    assert changed({f"mlp/~/{layer}": leaves for layer, leaves in ours.items()}, theirs) == []
    assert changed(scanned, ours) == []
    # NumPy's stack: that of JAX would compile an operation on 10,000 arrays.
    assert changed(np.stack(losses), np.stack(their_losses)) == []
    assert changed(np.stack(losses), scanned_losses) == []
    assert changed(start, ours) == list(named_leaves(start))  # and all that trains has moved
    assert losses[-1] < 0.1 < 2 < losses[0]


# --------------------------------------------------- the same law over everybody's models
# A model is (tree, loss(tree, x, y), a choice of what trains, the names that it must take).


class Affine(NamedTuple):
    weight: Any
    bias: Any


@register_dataclass
@dataclass
class Network:
    body: Any
    head: Any

    def __call__(self, x):
        return jnp.tanh(x @ self.body.weight + self.body.bias) @ self.head.weight + self.head.bias


def two_layers():
    params = init(jax.random.key(3), SIZES)
    return (Affine(params[layer]["w"], params[layer]["b"]) for layer in TRAINS)


def haiku_model():
    import haiku as hk

    @hk.without_apply_rng
    @hk.transform
    def network(x):
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.nets.MLP([6, 5])(x))
        return hk.Linear(3)(jnp.tanh(x))

    params = jax.jit(network.init)(jax.random.key(0), np.ones((1, 4), np.float32))
    taken = ["layer_norm/offset", "layer_norm/scale", "linear/b", "linear/w"]
    where = ("layer_norm", "linear")
    return params, lambda p, x, y: cross_entropy(network.apply(p, x), y), where, taken


def equinox_model():
    import equinox as eqx

    model = eqx.nn.MLP(4, 3, 6, 2, key=jax.random.key(0))

    def loss(model, x, y):
        return cross_entropy(jax.vmap(model)(x), y)

    return model, loss, "layers/2", ["layers/2/weight", "layers/2/bias"]


def linen_model():
    from flax import linen as nn

    network = nn.Sequential([nn.Dense(6), nn.LayerNorm(), nn.tanh, nn.Dense(3)])
    variables = jax.jit(network.init)(jax.random.key(0), np.ones((1, 4), np.float32))
    taken = [f"params/layers_{name}" for name in ("0/bias", "1/bias", "1/scale", "3/bias")]
    where = ("*/bias", "params/layers_1")
    return variables, lambda v, x, y: cross_entropy(network.apply(v, x), y), where, taken


def frozen_dict_model():
    from flax import core

    variables, loss, where, taken = linen_model()
    return core.freeze(variables), loss, where, taken


def nnx_model():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(4, 6, rngs=rngs)
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.body(x)))

    graph, state = nnx.split(Network(nnx.Rngs(0)), nnx.Param)

    def loss(state, x, y):
        return cross_entropy(nnx.merge(graph, state)(x), y)

    return state, loss, "head", ["head/bias/value", "head/kernel/value"]


def named_tuple_model():
    def loss(layers, x, y):
        (w0, b0), (w1, b1) = layers
        return cross_entropy(jnp.tanh(x @ w0 + b0) @ w1 + b1, y)

    return tuple(two_layers()), loss, ["1", "0/bias"], ["0/bias", "1/weight", "1/bias"]


def dataclass_model():
    model = Network(*two_layers())
    return model, lambda m, x, y: cross_entropy(m(x), y), "head", ["head/weight", "head/bias"]


MODELS = [
    haiku_model,
    equinox_model,
    linen_model,
    frozen_dict_model,
    nnx_model,
    named_tuple_model,
    dataclass_model,
]


@pytest.mark.parametrize("make", MODELS)
def test_a_peers_model_splits_trains_and_merges(make):
    import optax

    model, loss, where, taken = make()
    # What is no array (an activation is a leaf of an Equinox module) goes into a third part.
    arrays, static = partition(is_array, model)
    others = [static] if jax.tree.leaves(static) else []
    trainable, frozen = partition(where, arrays)
    assert list(named_leaves(trainable)) == taken
    assert set(named_leaves(trainable)).isdisjoint(named_leaves(frozen))
    assert [name for name, take in named_leaves(mask(where, model)).items() if take] == taken
    for whole in (merge(trainable, frozen, *others), merge(*others, frozen, trainable)):
        assert jax.tree.structure(whole) == jax.tree.structure(model)
        assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(model)))
    for name in named_leaves(arrays):
        part = "trainable" if name in taken else "frozen"
        (row,) = (r for r in summary(trainable=trainable, frozen=frozen).split("\n") if name in r)
        assert row.endswith(part)

    # One jitted step with the parts, and the same by hand with two plain dicts of leaves.
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    x, y = a_batch()
    traces = []

    @jax.jit
    def step(trainable, state, frozen):
        traces.append(1)
        grads = jax.grad(lambda t: loss(merge(t, frozen, *others), x, y))(trainable)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    leaves = named_leaves(model)
    outline = jax.tree.structure(model)

    @jax.jit
    def step_by_hand(moving, state):
        def full(moving):
            return jax.tree.unflatten(outline, [{**leaves, **moving}[name] for name in leaves])

        grads = jax.grad(lambda moving: loss(full(moving), x, y))(moving)
        updates, state = optimizer.update(grads, state, moving)
        return optax.apply_updates(moving, updates), state

    moving = {name: leaves[name] for name in taken}
    state, hand_state = optimizer.init(trainable), optimizer.init(moving)
    assert len(jax.tree.leaves(state)) == 2 * len(taken) + 1
    start = trainable
    for _ in range(20):
        trainable, state = step(trainable, state, frozen)
        moving, hand_state = step_by_hand(moving, hand_state)
    assert len(traces) == 1
    after = merge(trainable, frozen, *others)
    assert changed(arrays, partition(is_array, after)[0]) == taken
    assert changed(start, trainable) == taken
    assert_close(named_leaves(trainable), moving)


# ------------------------------------------------------------------------------ Equinox


def test_mask_serves_equinox_partition_and_parts_serve_filter_jit():
    import equinox as eqx

    model = eqx.nn.MLP(4, 3, 6, 2, key=jax.random.key(0))
    # An activation is a leaf too, and a function: it goes into neither part.
    arrays, static = partition(lambda path, leaf: eqx.is_array(leaf), model)
    assert jax.tree.leaves(static)
    assert not any(eqx.is_array(leaf) for leaf in jax.tree.leaves(static))
    trainable, frozen = partition("layers/2", arrays)

    theirs, their_rest = eqx.partition(model, mask("layers/2", model))
    assert changed(theirs, trainable) == []
    assert {
        name: leaf for name, leaf in named_leaves(their_rest).items() if eqx.is_array(leaf)
    } == named_leaves(frozen)
    x, y = a_batch()

    traces = []

    @eqx.filter_jit
    def step(trainable, frozen, static, x, y):
        traces.append(1)

        def loss(trainable):
            return cross_entropy(jax.vmap(merge(trainable, frozen, static))(x), y)

        value, grads = eqx.filter_value_and_grad(loss)(trainable)
        return sgd_step(trainable, grads), value

    @eqx.filter_jit
    def their_step(trainable, rest, x, y):
        def loss(trainable):
            return cross_entropy(jax.vmap(eqx.combine(trainable, rest))(x), y)

        value, grads = eqx.filter_value_and_grad(loss)(trainable)
        return jax.tree.map(lambda p, g: p - g * 0.1, trainable, grads), value

    for _ in range(50):
        trainable, loss = step(trainable, frozen, static, x, y)
        theirs, their_loss = their_step(theirs, their_rest, x, y)
    assert len(traces) == 1
    assert changed(theirs, trainable) == []
    assert changed(loss, their_loss) == []
    after = merge(trainable, frozen, static)
    assert isinstance(after, eqx.nn.MLP)
    assert changed(frozen, partition("layers/2", partition(is_array, after)[0])[1]) == []


# ----------------------------------------------------------------- every optax optimizer


def ramp(optax):
    return optax.warmup_cosine_decay_schedule(0.0, 3e-2, 10, 50, 1e-3)


def clipped(optax, optimizer):
    return optax.chain(optax.clip_by_global_norm(0.1), optimizer)


def fast_head(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "fast" if "linear_2" in keystr(path) else "slow", params
    )


# Name -> (the optimizer, how many arrays as large as the parameters there are in its state).
OPTIMIZERS = {
    "sgd, momentum": (lambda o: o.sgd(0.1, momentum=0.9), 1),
    "sgd, nesterov, schedule": (lambda o: o.sgd(ramp(o), momentum=0.9, nesterov=True), 1),
    "rmsprop": (lambda o: o.rmsprop(1e-3), 1),
    "adam": (lambda o: o.adam(1e-2), 2),
    "adamw": (lambda o: o.adamw(1e-2, weight_decay=0.1), 2),
    "lamb": (lambda o: o.lamb(1e-2, weight_decay=0.1), 2),
    "lion": (lambda o: o.lion(1e-3, weight_decay=0.1), 1),
    "adafactor": (  # its moments are rows and columns
        lambda o: o.adafactor(1e-2, min_dim_size_to_factor=4, weight_decay_rate=0.1),
        None,
    ),
    "clipped sgd": (lambda o: clipped(o, o.sgd(0.1)), 0),
    "clipped adamw, schedule": (lambda o: clipped(o, o.adamw(ramp(o), weight_decay=0.1)), 2),
    "clipped lion": (lambda o: clipped(o, o.lion(1e-3, weight_decay=0.1)), 1),
    "clipped adafactor": (lambda o: clipped(o, o.adafactor(1e-2, min_dim_size_to_factor=4)), None),
    "adam in two groups": (
        lambda o: o.multi_transform({"slow": o.adam(1e-3), "fast": o.adam(1e-2)}, fast_head),
        2,
    ),
}


def optimizer_named(name):
    import optax

    return OPTIMIZERS[name][0](optax)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optax_optimizer_sees_only_what_trains(name):
    optimizer, moments = optimizer_named(name), OPTIMIZERS[name][1]
    params = init(jax.random.key(0), SIZES)
    trainable, frozen = partition(TRAINS, params)
    x, y = a_batch()

    # The same without minifreeze: two plain dicts, one of what trains.
    moving = {layer: dict(params[layer]) for layer in TRAINS}
    still = {"linear_1": dict(params["linear_1"])}
    trainable, state = optax_steps(
        optimizer, trainable, lambda trainable: part_gradient(trainable, frozen, x, y), 50
    )
    moving, plain_state = optax_steps(
        optimizer, moving, lambda moving: plain_gradient(moving, still, x, y), 50
    )

    after = merge(trainable, frozen)
    assert changed(params, after) == ["linear_0/b", "linear_0/w", "linear_2/b", "linear_2/w"]
    assert changed(moving, trainable) == []
    assert changed(plain_state, state) == []  # so there is nothing more in it, nor less
    if moments is not None:
        arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        assert len(arrays) == moments * len(jax.tree.leaves(trainable))
        assert size_in_bytes(arrays) == moments * size_in_bytes(trainable)
    if moments != 0:
        assert size_in_bytes(state) < size_in_bytes(optimizer.init(params))


def test_mask_serves_optax_masked():
    import optax

    params = init(jax.random.key(0), SIZES)
    x, y = a_batch()
    grads = plain_gradient(params, {}, x, y)

    # Weight decay on weights only.
    decay = optax.masked(optax.add_decayed_weights(0.5), mask("*/w", params))
    updates, _ = jax.jit(decay.update)(grads, decay.init(params), params)
    assert changed(grads, updates) == ["linear_0/w", "linear_1/w", "linear_2/w"]
    for layer in params:  # a half of a float is exact
        w = np.asarray(grads[layer]["w"]) + np.float32(0.5) * np.asarray(params[layer]["w"])
        assert changed(updates[layer], {"b": grads[layer]["b"], "w": w}) == []

    # And state for what the mask selects only, as many bytes as for the part alone.
    adam = optax.masked(optax.adam(1e-2), mask(TRAINS, params))
    trainable, _ = partition(TRAINS, params)
    assert size_in_bytes(adam.init(params)) == size_in_bytes(optax.adam(1e-2).init(trainable))


# ------------------------------------------------------------------------------- Orbax


@pytest.mark.parametrize("target", ["arrays", "abstract arrays"])
def test_orbax_saves_and_restores_the_trainable_part_alone(tmp_path, target):
    import optax
    import orbax.checkpoint as ocp

    params = init(jax.random.key(0), [4, 100, 100, 3])
    trainable, frozen = partition("linear_2", params)
    optimizer = optax.adamw(1e-2)
    x, y = a_batch()
    trainable, state = optax_steps(
        optimizer, trainable, lambda trainable: part_gradient(trainable, frozen, x, y), 1
    )

    fresh, _ = partition("linear_2", init(jax.random.key(1), [4, 100, 100, 3]))
    like = {"trainable": fresh, "state": optimizer.init(fresh)}
    if target == "abstract arrays":
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like
        )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "part", {"trainable": trainable, "state": state})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "part", like)

    assert jax.tree.structure(restored["trainable"]) == jax.tree.structure(trainable)
    assert isinstance(restored["trainable"]["linear_0"]["w"], Hole)
    assert changed(trainable, restored["trainable"]) == []
    assert changed(state, restored["state"]) == []
    assert changed(merge(restored["trainable"], frozen), merge(trainable, frozen)) == []
    # What trains is 3 % of the model: with its two moments still less on disk than the model.
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert written < size_in_bytes(params) / 2


# ---------------------------------------------- warm_start: another frozen set in mid-run


def moments_of(state):
    """The leaves of an optimizer's state that stand for a parameter."""
    return {name: leaf for name, leaf in named_leaves(state).items() if leaf.ndim}


@pytest.mark.parametrize(
    "name", ["sgd, momentum", "adam", "adamw", "lion", "clipped adamw, schedule", "adafactor"]
)
def test_a_changed_frozen_set_keeps_the_surviving_moments(name):
    optimizer = optimizer_named(name)
    params = init(jax.random.key(0), SIZES)
    x, y = a_batch()

    trainable, frozen = partition(("linear_1", "linear_2"), params)
    trainable, state = optax_steps(
        optimizer, trainable, lambda trainable: part_gradient(trainable, frozen, x, y), 5
    )

    # linear_2 survives, linear_0 comes, linear_1 goes.
    params = merge(trainable, frozen)
    trainable, frozen = partition(("linear_0", "linear_2"), params)
    fresh = optimizer.init(trainable)
    warm = warm_start(fresh, state)
    assert jax.tree.structure(warm) == jax.tree.structure(fresh)
    old, new, start = named_leaves(state), named_leaves(warm), named_leaves(fresh)
    survivors = [leaf for leaf in new if "linear_2" in leaf or not new[leaf].ndim]
    newcomers = [leaf for leaf in new if "linear_0" in leaf]
    assert sorted(survivors + newcomers) == sorted(new)
    assert newcomers
    assert not any("linear_1" in leaf for leaf in new)
    assert any("linear_1" in leaf for leaf in old)
    assert all(new[leaf] is old[leaf] for leaf in survivors)
    assert all(new[leaf] is start[leaf] for leaf in newcomers)
    counts = [leaf for leaf in new if not new[leaf].ndim]
    assert all(new[leaf] == 5 for leaf in counts)

    trainable, warm = optax_steps(
        optimizer, trainable, lambda trainable: part_gradient(trainable, frozen, x, y), 5, warm
    )
    after = merge(trainable, frozen)
    assert changed(params, after) == ["linear_0/b", "linear_0/w", "linear_2/b", "linear_2/w"]


def test_warm_start_without_a_change_changes_nothing():
    import optax

    trainable, _ = partition(TRAINS, init(jax.random.key(0), SIZES))
    optimizer = optax.adam(1e-2)
    _, state = optax_steps(optimizer, trainable, lambda trainable: trainable, 1)
    assert changed(state, warm_start(optimizer.init(trainable), state)) == []
    fresh = optimizer.init(trainable)
    assert changed(fresh, warm_start(fresh, ())) == []


def test_gradual_unfreezing_with_adam_layer_by_layer():
    import optax

    lr, b1, b2, eps = 1e-2, 0.9, 0.999, 1e-8
    optimizer = optax.adam(lr, b1, b2, eps)
    params = first = init(jax.random.key(0), SIZES)
    x, y = a_batch()
    stages = ["linear_2", ["linear_1", "linear_2"], "*"]
    stages.append(stages[0])  # and back to the head: a frozen set that was there before
    traces = []

    @jax.jit
    def step(trainable, state, frozen):
        traces.append(1)
        grads = jax.grad(loss_fn)(trainable, frozen, x, y)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    # The same by hand: Adam's two moments a leaf, in NumPy's float64, with one count of steps.
    p = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(params).items()}
    moments, count = {}, 0
    state = None
    for stage, where in enumerate(stages):
        trainable, frozen = partition(where, params)
        fresh = optimizer.init(trainable)
        old = {} if state is None else moments_of(state)
        state = fresh if state is None else warm_start(fresh, state)
        for name, leaf in moments_of(state).items():
            if name in old:
                assert changed(leaf, old[name]) == []
            else:
                assert not np.asarray(leaf).any()
        assert moments_of(state).keys() == moments_of(fresh).keys()
        assert int(state[0].count) == 20 * stage
        names = list(named_leaves(trainable))
        moments = {name: moments.get(name, (0.0, 0.0)) for name in names}
        for _ in range(20):
            trainable, state = step(trainable, state, frozen)
            count += 1
            tree = jax.tree.unflatten(
                jax.tree.structure(params), [p[name].astype(np.float32) for name in p]
            )
            grads = named_leaves(plain_gradient(tree, {}, x, y))
            for name in names:
                g = np.asarray(grads[name], np.float64)
                m, v = moments[name]
                m, v = moments[name] = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                p[name] -= lr * (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + eps)
        after = merge(trainable, frozen)
        assert changed(params, after) == [name for name in named_leaves(params) if name in names]
        params = after
    assert len(traces) == len(stages) - 1  # one trace a frozen set
    for name, leaf in named_leaves(params).items():
        np.testing.assert_allclose(leaf, p[name], rtol=1e-3, atol=1e-4, err_msg=name)
    before, after = (jax.jit(plain_loss)(params, {}, x, y) for params in (first, params))
    assert after < before / 2


def test_warm_start_from_a_checkpoint_of_a_part(tmp_path):
    import orbax.checkpoint as ocp

    body, _ = partition("!linear_2", init(jax.random.key(0), SIZES))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "body", body)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "body", jax.tree.map(jnp.zeros_like, body))

    # Into a whole tree with a new head, and into the parts of another split of it.
    fresh = init(jax.random.key(1), SIZES)
    started = warm_start(fresh, restored)
    assert changed(fresh, started) == ["linear_0/w", "linear_1/w"]  # biases are zero in both
    assert changed(started["linear_1"], body["linear_1"]) == []
    assert started["linear_2"]["w"] is fresh["linear_2"]["w"]
    parts = [warm_start(part, restored) for part in partition("linear_1", fresh)]
    assert changed(started, merge(*parts)) == []


@pytest.mark.parametrize(("width", "dtype"), [(5, "float32"), (3, "bfloat16")])
def test_warm_start_refuses_a_state_that_does_not_fit(width, dtype):
    import optax

    def adam_state(width, dtype):  # of an MLP of two layers, its head trained
        zeros = {"b": np.zeros(width, dtype), "w": np.zeros((16, width), dtype)}
        return optax.adam(1e-2).init({"linear_0": {"b": Hole(), "w": Hole()}, "linear_1": zeros})

    old, new = adam_state(3, "float32"), adam_state(width, jnp.dtype(dtype))
    with pytest.raises(ValueError, match=" fit: ") as error:
        warm_start(new, old)
    assert str(error.value).partition(": ")[2] == (
        f"'0/mu/linear_1/b' is {dtype}[{width}] in new, float32[3] in old; "
        f"'0/mu/linear_1/w' is {dtype}[16,{width}] in new, float32[16,3] in old; "
        f"'0/nu/linear_1/b' is {dtype}[{width}] in new, float32[3] in old; "
        f"'0/nu/linear_1/w' is {dtype}[16,{width}] in new, float32[16,3] in old"
    )


# --------------------------------------------------------------- ways to freeze that go wrong
# Each shows that the trap is there in the real optax, and that it is not there with the parts.


def distance(before, after):
    """The Euclidean one between two trees, in float64."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after))
    return np.sqrt(sum(np.sum(np.subtract(b, a, dtype=np.float64) ** 2) for a, b in pairs))


def test_trap_stop_gradient_with_adamw():
    import optax

    params = init(jax.random.key(0), SIZES)
    x, y = a_batch()
    adamw = optax.adamw(1e-2, weight_decay=0.1)

    @jax.jit
    @jax.grad
    def stopped_gradient(params):
        params = {**params, "linear_1": jax.lax.stop_gradient(params["linear_1"])}
        return plain_loss(params, {}, x, y)

    assert not np.asarray(stopped_gradient(params)["linear_1"]["w"]).any()
    after, _ = optax_steps(adamw, params, stopped_gradient, 5)
    assert "linear_1/w" in changed(params, after)  # by the decay, and nothing else
    decayed = np.asarray(params["linear_1"]["w"]) * (1 - 1e-2 * 0.1) ** 5
    np.testing.assert_allclose(after["linear_1"]["w"], decayed, rtol=1e-6)

    trainable, frozen = partition("!linear_1", params)
    trainable, _ = optax_steps(adamw, trainable, lambda t: part_gradient(t, frozen, x, y), 5)
    trained = ["linear_0/b", "linear_0/w", "linear_2/b", "linear_2/w"]
    assert changed(params, merge(trainable, frozen)) == trained


@pytest.mark.parametrize("name", ["sgd, momentum", "adam"])
def test_trap_zeroed_gradients_under_momentum(name):
    optimizer = optimizer_named(name)
    x, y = a_batch()
    params, state = optax_steps(
        optimizer,
        init(jax.random.key(0), SIZES),
        lambda params: plain_gradient(params, {}, x, y),
        5,
    )

    def zeroed(params):
        grads = plain_gradient(params, {}, x, y)
        return {**grads, "linear_1": jax.tree.map(np.zeros_like, grads["linear_1"])}

    drifted, _ = optax_steps(optimizer, params, zeroed, 5, state)
    assert {"linear_1/b", "linear_1/w"} < set(changed(params, drifted))
    np.testing.assert_array_less(1e-3, distance(params["linear_1"], drifted["linear_1"]))

    trainable, frozen = partition("!linear_1", params)
    warm = warm_start(optimizer.init(trainable), state)
    trainable, _ = optax_steps(
        optimizer, trainable, lambda t: part_gradient(t, frozen, x, y), 5, warm
    )
    after = merge(trainable, frozen)
    assert changed(params, after) == ["linear_0/b", "linear_0/w", "linear_2/b", "linear_2/w"]


def test_trap_optax_masked_alone():
    import optax

    params = init(jax.random.key(0), SIZES)
    x, y = a_batch()
    grads = plain_gradient(params, {}, x, y)
    masked = optax.masked(optax.adam(1e-2), mask("!linear_1", params))
    after, _ = optax_steps(masked, params, lambda _: grads, 1)
    # The raw gradient arrives as the update, and is added: uphill, with a step size of one.
    assert "linear_1/w" in changed(params, after)
    uphill = jax.tree.map(np.add, *map(jax.device_get, (params["linear_1"], grads["linear_1"])))
    assert changed(uphill, after["linear_1"]) == []

    trainable, frozen = partition("!linear_1", params)
    adam = optax.adam(1e-2)
    trainable, _ = optax_steps(adam, trainable, lambda t: part_gradient(t, frozen, x, y), 1)
    assert changed(params["linear_1"], merge(trainable, frozen)["linear_1"]) == []


def test_trap_clipping_counts_frozen_gradients():
    import optax

    params = init(jax.random.key(0), SIZES)
    x, y = a_batch()
    grads = plain_gradient(params, {}, x, y)

    zero = jax.tree.map(np.zeros_like, params)
    head = distance(zero["linear_2"], grads["linear_2"])
    everything = distance(zero, grads)
    limit = float(head) / 2
    assert everything > 1.2 * head
    frozen_to_zero = optax.chain(
        optax.clip_by_global_norm(limit),
        optax.sgd(1.0),
        optax.masked(optax.set_to_zero(), mask("!linear_2", params)),
    )
    after, _ = optax_steps(frozen_to_zero, params, lambda _: grads, 1)
    assert changed(params, after) == ["linear_2/b", "linear_2/w"]
    moved = distance(params, after)
    np.testing.assert_allclose(moved, limit * head / everything, rtol=1e-4)  # too short

    trainable, frozen = partition("linear_2", params)
    clipped = optax.chain(optax.clip_by_global_norm(limit), optax.sgd(1.0))
    stepped, _ = optax_steps(clipped, trainable, lambda t: part_gradient(t, frozen, x, y), 1)
    moved = distance(trainable, stepped)
    np.testing.assert_allclose(moved, limit, rtol=1e-4)  # as long as the limit says


def test_trap_substring_matching():
    import haiku as hk
    import optax

    params = init(jax.random.key(0), [3] * 13)  # linear_0 .. linear_11
    tenth = {"linear_10/b", "linear_10/w", "linear_11/b", "linear_11/w"}
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "train" if "linear_1" in keystr(path) else "freeze", params
    )
    optimizer = optax.multi_transform(
        {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, labels
    )
    after, _ = optax_steps(optimizer, params, lambda params: jax.tree.map(np.ones_like, params), 1)
    assert set(changed(params, after)) == {"linear_1/b", "linear_1/w"} | tenth
    theirs, _ = hk.data_structures.partition(lambda module, *_: "linear_1" in module, params)
    assert set(named_leaves(theirs)) == {"linear_1/b", "linear_1/w"} | tenth

    trainable, _ = partition("linear_1", params)
    assert list(named_leaves(trainable)) == ["linear_1/b", "linear_1/w"]
    assert tenth < set(named_leaves(partition("linear_1*", params)[0]))  # for who asks for it


def test_trap_pattern_that_matches_nothing():
    import optax

    params = init(jax.random.key(0), SIZES)
    x, y = a_batch()
    typo = jax.tree_util.tree_map_with_path(lambda path, _: "linear1" in keystr(path), params)
    optimizer = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), typo))
    after, _ = optax_steps(optimizer, params, lambda p: plain_gradient(p, {}, x, y), 1)
    assert {"linear_1/b", "linear_1/w"} < set(changed(params, after))  # and nobody has said so

    for where in ("linear1", "!linear1", ["*", "!linear1"]):
        for function in (partition, mask):
            with pytest.raises(ValueError, match="matches no leaf") as error:
                function(where, params)
            pattern = where if isinstance(where, str) else where[-1]
            assert str(error.value).startswith(
                f"pattern {pattern!r} matches no leaf; 6 of 6 names, nearest first: ["
            )
            assert "'linear_1/w'" in str(error.value)


def test_trap_optimizer_state_for_frozen_leaves():
    import optax

    params = init(jax.random.key(0), [4, 100, 100, 3])
    trainable, _ = partition("linear_2", params)
    adam = optax.adam(1e-2)
    frozen_to_zero = optax.chain(adam, optax.masked(optax.set_to_zero(), mask("!linear_2", params)))
    whole = 4 * (4 * 100 + 100 + 100 * 100 + 100 + 100 * 3 + 3)
    head = 4 * (100 * 3 + 3)
    count = 4
    assert size_in_bytes(frozen_to_zero.init(params)) == 2 * whole + count  # 87,228 bytes
    assert size_in_bytes(adam.init(params)) == 2 * whole + count  # as with stop_gradient
    assert size_in_bytes(adam.init(trainable)) == 2 * head + count  # 2,428 bytes
    assert len(jax.tree.leaves(adam.init(trainable))) == 2 * 2 + 1


def test_trap_donating_the_split():
    params = init(jax.random.key(0), SIZES)
    x, y = a_batch()
    trainable, frozen = partition("linear_2", params)
    step = jax.jit(train_step.__wrapped__, donate_argnums=0)
    step(trainable, frozen, x, y)
    deleted = [name for name, leaf in named_leaves(params).items() if leaf.is_deleted()]
    assert deleted == ["linear_2/b", "linear_2/w"]  # the original tree is gone, in part
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(params["linear_2"]["w"])

    # No function of the module donates; who wants to donates a copy of what trains.
    params = init(jax.random.key(0), SIZES)
    trainable, frozen = partition("linear_2", params)
    train_step(trainable, frozen, x, y)
    train(trainable, frozen, x[None], y[None])
    once, rest = hoist(loss_fn, trainable, frozen, x, y)
    jax.jit(jax.grad(rest))(trainable, frozen, jax.jit(once)(frozen, x, y))
    sgd_step(trainable, trainable)
    warm_start(params, trainable)
    copy = jax.tree.map(jnp.copy, trainable)
    stepped, _ = step(copy, frozen, x, y)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copy))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, trainable, frozen)))
    assert changed(params, merge(stepped, frozen)) == ["linear_2/b", "linear_2/w"]


# ------------------------------------------------------------------ hoist, on real networks


def other_values(leaf):
    """Another array of the same shape and dtype."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(leaf, 1)
    values = np.asarray(leaf)
    if values.dtype == bool:
        values = ~values
    elif np.issubdtype(values.dtype, np.integer):
        values = values // 2
    else:
        values = values * values.dtype.type(0.5) + values.dtype.type(0.1)
    return jnp.asarray(values)


def assert_hoists(fn, trainable, frozen, *batch, has_aux=False, bitwise=False):
    """rest after once is fn, in values and gradients; gives (once, rest, kept).

    Made with shapes alone, under jit, for these values and, as nothing is baked in, for others.
    """
    once, rest = hoist(fn, *jax.eval_shape(lambda *args: args, trainable, frozen, *batch))
    first = jax.jit(once)
    split = jax.jit(jax.value_and_grad(rest, has_aux=has_aux))
    whole = jax.jit(jax.value_and_grad(fn, has_aux=has_aux))
    for change in (other_values, lambda leaf: leaf):
        t, f, b = jax.tree.map(change, (trainable, frozen, batch))
        kept = first(f, *b)
        got, want = split(t, f, kept), whole(t, f, *b)
        if bitwise:
            assert changed(want, got) == []
        else:
            assert_close(got, want)
    assert isinstance(kept, tuple)
    assert all(isinstance(array, jax.Array) for array in kept)
    return once, rest, kept


def shapes(arrays):
    return sorted(array.shape for array in arrays)


def equations(fn, *args):
    """The names of all operations in the jaxpr of a call, inner jaxprs too."""
    names = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            names.append(eqn.primitive.name)
            for param in jax.tree.leaves(
                list(eqn.params.values()),
                is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
            ):
                inner = getattr(param, "jaxpr", param)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(fn)(*args).jaxpr)
    return names


CHOICES = {
    "the head": "linear_3",
    "the last two": ("linear_2", "linear_3"),
    "a middle one and the last": ("linear_1", "linear_3"),
    "all biases": "*/b",
    "all weights": "*/w",
    "everything": "*",
    "nothing": lambda path, leaf: False,
}
# At least so many matrix products are left in the gradient of rest, and no more: for every
# layer from the first that trains on, forward; the weight's and the input's gradient, backward.
PRODUCTS = {
    "the head": 1 + 1,
    "the last two": 2 + 2 + 1,
    "a middle one and the last": 3 + 2 + 2,
    "all biases": 3 + 3,  # the product before the first trained bias is in once
    "all weights": 4 + 4 + 3,
    "everything": 4 + 4 + 3,
    "nothing": 0,
}
FORMS = {
    "plain": loss_fn,
    "jitted": jax.jit(loss_fn),
    "twice jitted": jax.jit(lambda *args: jax.jit(loss_fn)(*args)),
    "rematerialised": jax.checkpoint(loss_fn),
}


def an_mlp(where, sizes=(3, 5, 5, 5, 4)):
    """A batch and the parts of an MLP whose biases are not zero."""
    draw = np.random.default_rng(0).standard_normal
    params = {
        f"linear_{i}": {"b": draw(n).astype("float32"), "w": draw((m, n)).astype("float32")}
        for i, (m, n) in enumerate(pairwise(sizes))
    }
    x, y = draw((7, sizes[0])).astype("float32"), np.arange(7, dtype="int32") % sizes[-1]
    return *partition(where, jax.tree.map(jnp.asarray, params)), jnp.asarray(x), jnp.asarray(y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choice", CHOICES)
def test_hoist_is_the_mlps_loss_and_gradient_bit_for_bit(choice, form):
    trainable, frozen, x, y = an_mlp(CHOICES[choice])
    _, rest, kept = assert_hoists(FORMS[form], trainable, frozen, x, y, bitwise=True)
    assert size_in_bytes(kept) <= 7 * 5 * 4 + size_in_bytes(y)  # one layer's features, labels
    if form != "rematerialised":  # which is one operation, run again with its inputs
        products = equations(jax.grad(rest), trainable, frozen, kept).count("dot_general")
        assert products == PRODUCTS[choice]


def equinox_network():
    import equinox as eqx

    model = eqx.nn.MLP(4, 3, 8, 3, activation=jax.nn.gelu, key=jax.random.key(0))
    arrays, static = partition(is_array, model)

    def loss(trainable, frozen, x, y):
        return cross_entropy(jax.vmap(merge(trainable, frozen, static))(x), y)

    return loss, *partition("layers/3", arrays), 8


def equinox_filter_jit_network():
    import equinox as eqx

    loss, *rest = equinox_network()
    return eqx.filter_jit(loss), *rest


def haiku_network():
    import haiku as hk

    @hk.without_apply_rng
    @hk.transform
    def network(x):
        x = jax.nn.elu(hk.nets.MLP([16, 8])(x))
        return hk.Linear(3)(hk.LayerNorm(-1, create_scale=True, create_offset=True)(x))

    params = jax.jit(network.init)(jax.random.key(0), np.ones((1, 4), np.float32))

    def loss(trainable, frozen, x, y):
        return cross_entropy(network.apply(merge(trainable, frozen), x), y)

    return loss, *partition("linear", params), 8


def linen_network():
    from flax import linen as nn

    network = nn.Sequential(
        [nn.Dense(16), nn.LayerNorm(), nn.gelu, nn.Dense(8), nn.LayerNorm(), nn.Dense(3)]
    )
    variables = jax.jit(network.init)(jax.random.key(0), np.ones((1, 4), np.float32))

    def loss(trainable, frozen, x, y):
        return cross_entropy(network.apply(merge(trainable, frozen), x), y)

    return loss, *partition("params/layers_5", variables), 8


def nnx_network():
    model, loss, where, _ = nnx_model()
    return (lambda t, f, x, y: loss(merge(t, f), x, y)), *partition(where, model), 6


@pytest.mark.parametrize(
    "make",
    [
        equinox_network,
        equinox_filter_jit_network,
        haiku_network,
        linen_network,
        nnx_network,
    ],
)
def test_hoist_keeps_the_features_of_a_peers_network(make):
    loss, trainable, frozen, width = make()
    x, y = a_batch()
    _, rest, kept = assert_hoists(loss, trainable, frozen, x, y)
    assert sum(array.shape == (8, width) for array in kept) == 1
    assert size_in_bytes(kept) <= 8 * width * 4 + size_in_bytes(y)
    assert equations(jax.grad(rest), trainable, frozen, kept).count("dot_general") == 2


# ------------------------------------------------------------- hoist, on all kinds of functions
# Each row: fn, trainable, frozen, batch, and the shapes that must be kept.


def draws(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


X, BODY, HEAD = draws(8, 4), draws(4, 6), draws(6, 3)


def scanned_body(head, body, x):
    x, layers = x @ body["first"], body["layers"]
    x, means = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.mean()), x, layers)
    return jnp.sum((x @ head) ** 2) + jnp.sum(means)


def scanned_head(layers, first, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), jnp.tanh(x @ first), layers)
    return jnp.sum(x**2)


def conditional_body(head, body, x, flag):
    x = jax.lax.cond(flag, lambda x: jnp.tanh(x @ body), lambda x: jnp.sin(x @ body), x)
    return jnp.sum((x @ head) ** 2)


def conditional_head(head, body, x, flag):
    x = jnp.tanh(x @ body)
    x = jax.lax.cond(flag, lambda x: x @ head, lambda x: 2 * x @ head, x)
    return jnp.sum(x**2)


def switched_body(head, body, x, i):
    x = jax.lax.switch(i, [jnp.tanh, jnp.sin, jax.nn.relu], x @ body)
    return jnp.sum((x @ head) ** 2)


def while_body(head, body, x):
    _, x = jax.lax.while_loop(
        lambda state: state[0] < 3, lambda state: (state[0] + 1, jnp.tanh(state[1])), (0, x @ body)
    )
    return jnp.sum((x @ head) ** 2)


def fori_head(head, body, x):
    x = jnp.tanh(x @ body)
    return jax.lax.fori_loop(0, 3, lambda i, total: total + jnp.sum((x @ head) ** i), 0.0)


def with_lookup(head, table, tokens):
    return jnp.sum((table[tokens].mean(1) @ head) ** 2)


def with_remat(head, body, x):
    x = jax.checkpoint(lambda body, x: jnp.tanh(x @ body))(body, x)
    return jnp.sum((x @ head) ** 2)


def with_remat_across(head, body, x):
    @jax.checkpoint
    def layers(head, body, x):
        return jnp.tanh(jnp.tanh(x @ body) @ head)

    return jnp.sum(layers(head, body, x) ** 2)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (3.0 * g,))


@jax.custom_jvp
def softsign(x):
    return x / (1 + jnp.abs(x))


softsign.defjvp(lambda x, dx: (softsign(*x), dx[0] * 5.0))


def with_custom_vjp(head, body, x):
    return jnp.sum(straight_through(straight_through(3 * x @ body) @ head) ** 2)


def with_custom_jvp(head, body, x):
    return jnp.sum(softsign(softsign(x @ body) @ head) ** 2)


def with_dict_batch(head, body, batch):
    features = jnp.tanh(batch["image"] @ body)
    return jnp.sum(batch["weight"][:, None] * (features @ head) ** 2)


def with_dropout(head, body, x, key):
    x = jnp.tanh(x @ body)
    x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0)
    return jnp.sum((x @ head) ** 2)


def with_fresh_dropout(head_and_key, body, x):
    return with_dropout(head_and_key["head"], body, x, head_and_key["key"])


def with_noise_in_frozen(head, body_and_key, x):
    noise = jax.random.normal(body_and_key["key"], BODY.shape)
    return jnp.sum((jnp.tanh(x @ (body_and_key["body"] + noise)) @ head) ** 2)


def with_inner_gradient(head, body, x):
    slope = jax.vmap(jax.grad(lambda row: jnp.sum(jnp.tanh(row @ body) ** 2)))(x)
    return jnp.sum((slope @ body @ head) ** 2)


def with_inner_vmap(head, body, x):
    return jnp.sum(jax.vmap(jax.jit(lambda row: jnp.tanh(row @ body) @ head))(x) ** 2)


def jitted_at_three_depths(head, body, x):
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    network = jax.jit(lambda head, body, x: jax.jit(layer)(body, x) @ head)
    return jnp.sum(jax.jit(network)(head, body, x) ** 2)


def tied(head, body, x):
    return jnp.sum((jnp.tanh(x @ body) @ head @ head.T) ** 2)


def masked_features(head, body, x):
    features = jnp.tanh(x @ body)  # the mask is smaller, but can be had from them
    return jnp.sum(jnp.where(features > 0, features * head[:, 0], 0) ** 2)


def everything_from_the_batch(head, body, x):
    return jnp.sum(jnp.tanh(x @ body))


def nothing_from_the_batch(head, body):
    return jnp.sum((body @ head) ** 2)


def two_branches(head, body, x, z):
    return jnp.sum((jnp.tanh(x @ body) @ head) ** 2) * jnp.sum(jnp.sin(z @ body) @ head)


TOKENS = np.arange(24, dtype="int32").reshape(8, 3) % 11
STACKED = {"first": BODY, "layers": draws(3, 6, 6)}
ROWS = {"image": X, "weight": draws(8), "unused": draws(1000)}
KINDS = {
    # The mean over the scan's means is done too.
    "scan over frozen layers": (scanned_body, HEAD, STACKED, [X], [(), (8, 6)]),
    "scan over layers that train": (scanned_head, draws(3, 6, 6), BODY, [X], [(8, 6)]),
    "cond in the body": (conditional_body, HEAD, BODY, [X, np.asarray(False)], [(8, 6)]),
    "cond in the head": (conditional_head, HEAD, BODY, [X, np.asarray(True)], [(), (8, 6)]),
    "switch in the body": (switched_body, HEAD, BODY, [X, np.asarray(1, "int32")], [(8, 6)]),
    "while in the body": (while_body, HEAD, BODY, [X], [(8, 6)]),
    "fori_loop in the head": (fori_head, HEAD, BODY, [X], [(8, 6)]),
    "embedding": (with_lookup, HEAD, draws(11, 6), [TOKENS], [(8, 6)]),
    "remat in the body": (with_remat, HEAD, BODY, [X], [(8, 6)]),
    "remat across": (with_remat_across, HEAD, BODY, [X], [(8, 4)]),
    "custom_vjp": (with_custom_vjp, HEAD, BODY, [X], [(8, 6)]),
    "custom_jvp": (with_custom_jvp, HEAD, BODY, [X], [(8, 6)]),
    "dict batch": (with_dict_batch, HEAD, BODY, [ROWS], [(8,), (8, 6)]),
    "inner gradient": (with_inner_gradient, HEAD, BODY, [X], [(8, 6)]),
    "inner vmap": (with_inner_vmap, HEAD, BODY, [X], [(8, 6)]),
    "jits in jits": (jitted_at_three_depths, HEAD, BODY, [X], [(8, 6)]),
    "tied weights": (tied, HEAD, BODY, [X], [(8, 6)]),
    "mask of the features": (masked_features, HEAD, BODY, [X], [(8, 6)]),
    "all of it hoisted": (everything_from_the_batch, HEAD, BODY, [X], [()]),
    "no batch": (nothing_from_the_batch, HEAD, draws(6, 6), [], []),
    "two inputs": (two_branches, HEAD, BODY, [X, draws(2, 4)], [(2, 6), (8, 6)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hoist_is_right_for(kind):
    fn, *arguments, want = KINDS[kind]
    trainable, frozen, batch = jax.tree.map(jnp.asarray, arguments)
    _, _, kept = assert_hoists(fn, trainable, frozen, *batch)
    assert shapes(kept) == want


@pytest.mark.parametrize("style", [jax.random.key, jax.random.PRNGKey])
def test_hoist_and_random_keys(style):
    head, body, x = map(jnp.asarray, (HEAD, BODY, X))
    # A dropout key in the batch: the mask is drawn once, and fixed with the batch.
    once, rest, kept = assert_hoists(with_dropout, head, body, x, style(1))
    assert shapes(kept) == [(8, 6)]
    assert not {"random_bits", "threefry2x32"} & set(equations(rest, head, body, kept))
    other = once(body, x, style(2))
    assert_close(rest(head, body, other), with_dropout(head, body, x, style(2)))
    assert rest(head, body, other) != rest(head, body, kept)

    # Handed in with what trains, it is fresh at every step.
    trains = {"head": head, "key": style(1)}
    once, rest = hoist(with_fresh_dropout, trains, body, x)
    kept = once(body, x)
    assert shapes(kept) == [(8, 6)]
    for seed in (1, 2, 3):
        trains = {"head": head, "key": style(seed)}
        assert_close(rest(trains, body, kept), with_fresh_dropout(trains, body, x))

    # A key among the frozen leaves is like any of them, and a key can be kept and returned.
    frozen = {"body": body, "key": style(1)}
    _, _, kept = assert_hoists(with_noise_in_frozen, head, frozen, x)
    assert shapes(kept) == [(8, 6)]
    once, rest = hoist(lambda head, _, key: (head, jax.random.split(key)), head, (), style(5))
    _, keys = rest(head, (), once((), style(5)))
    want = jax.random.split(style(5))
    assert changed(jax.random.key_data(keys), jax.random.key_data(want)) == []


def test_hoist_and_closures():
    table = jnp.asarray(draws(5, 6, seed=9))
    head, body, x = map(jnp.asarray, (HEAD, BODY, X))

    def loss(head, body, x):
        return jnp.sum((jnp.tanh(x @ body + table.sum(0)) @ head) ** 2) + table.mean()

    _, _, kept = assert_hoists(loss, head, body, x)
    assert shapes(kept) == [(8, 6)]

    @jax.jit
    def split_inside(scale, head, body, x):  # a closure over a tracer
        def loss(head, body, x):
            return jnp.sum((jnp.tanh(x @ body * scale) @ head) ** 2) * scale

        once, rest = hoist(loss, head, body, x)
        return loss(head, body, x), rest(head, body, once(body, x))

    want, got = split_inside(1.5, head, body, x)
    assert_close(got, want)

    # hoist reads the function as it is at the call, not as it was at an earlier one.
    scales, values = [], []

    def scaled(head, body, x):
        return jnp.sum(jnp.tanh(x @ body) @ head) * scales[-1]

    for scale in (1.0, 3.0):
        scales.append(scale)
        once, rest = hoist(scaled, head, body, x)
        values.append(float(rest(head, body, once(body, x))))
    np.testing.assert_allclose(values[1], 3 * values[0], rtol=1e-6)


def test_hoist_gives_the_outputs_that_the_function_gives():
    head, body, x = map(jnp.asarray, (HEAD, BODY, X))

    def loss(head, body, x):
        features = jnp.tanh(x @ body)
        logits = features @ head
        aux = {"logits": logits, "features": [features, features], "inputs": (x, body, head)}
        return jnp.sum(logits**2), {**aux, "none": None, "hole": Hole(), "three": 3, "half": 0.5}

    once, rest, kept = assert_hoists(loss, head, body, x, has_aux=True)
    assert shapes(kept) == [(8, 4), (8, 6)]  # the batch itself, for it is an output
    value, aux = rest(head, body, once(body, x))
    want = loss(head, body, x)
    assert jax.tree.structure((value, aux)) == jax.tree.structure(want)
    assert int(aux["three"]) == 3
    assert aux["half"] == 0.5
    # Arrays, also where it is not jitted and the batch holds NumPy's, or numbers.
    fn, batch = lambda t, f, x, scale, flag: (t.sum(), x, scale, flag), (X, 2.0, True)
    once, rest = hoist(fn, HEAD, BODY, *batch)
    kept = once(BODY, *batch)
    assert [array.dtype.name for array in kept] == ["float32", "float32", "bool"]
    assert all(isinstance(leaf, jax.Array) for leaf in (*kept, *rest(HEAD, BODY, kept)))
    for fn in (lambda t, f, x: x, lambda t, f, x: (t, f), lambda t, f, x: 7.0, lambda t, f, x: ()):
        once, rest = hoist(fn, head, body, x)
        got, want = rest(head, body, once(body, x)), fn(head, body, x)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        assert all(map(jnp.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("integer", [True, False])
def test_hoist_keeps_labels_not_their_one_hot_rows(integer, smoothing):
    import optax

    trainable, frozen, x, y = an_mlp("linear_3", (4, 16, 16, 16, 100))

    def loss(trainable, frozen, x, y):
        logits = apply(merge(trainable, frozen), x)
        if integer:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean() + smoothing * jnp.mean(logits**2)
        targets = optax.smooth_labels(jax.nn.one_hot(y, 100), smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    _, rest, kept = assert_hoists(loss, trainable, frozen, x, y)
    assert (7, 16) in shapes(kept)
    assert size_in_bytes(kept) <= 7 * 16 * 4 + size_in_bytes(y)
    assert equations(jax.grad(rest), trainable, frozen, kept).count("dot_general") == 2


KEPT = {
    "what moves costs nothing, so one of two of a size is kept": (
        lambda t, f, x: (x.reshape(6) * t).sum() + (x * t).sum(),
        jnp.ones((2, 3)),
        ["float32[2,3]"],
    ),
    "a smaller copy, by a single byte": (
        lambda t, f, x: x.astype(jnp.int8).astype(jnp.float32) * t,
        jnp.ones(1, jnp.int16),
        ["int8[1]"],
    ),
    "what one byte more is made of": (
        lambda t, f, x: jnp.concatenate([x, x]).astype(jnp.float32) * t,
        jnp.ones(1, jnp.int8),
        ["int8[1]"],
    ),
    "rows of as many bytes as their labels": (
        lambda t, f, x: jax.nn.one_hot(x, 4, dtype=jnp.int8).astype(jnp.float32) * t,
        jnp.arange(6),
        ["bool[6,4]"],
    ),
    "labels of fewer bytes than their rows": (
        lambda t, f, x: jax.nn.one_hot(x, 5, dtype=jnp.int8).astype(jnp.float32) * t,
        jnp.arange(6),
        ["int32[6]"],
    ),
}


@pytest.mark.parametrize(("fn", "x", "expected"), KEPT.values(), ids=KEPT)
def test_hoist_keeps_the_fewest_bytes(fn, x, expected):
    once, rest = mf.hoist(fn, jnp.ones(()), None, x)
    kept = once(None, x)
    assert [f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for leaf in kept] == expected
    np.testing.assert_array_equal(rest(jnp.ones(()), None, kept), fn(jnp.ones(()), None, x))


def test_hoist_never_keeps_a_weight():
    def loss(head, body, x):
        first = body["int8"].astype(jnp.float32) * body["scale"]  # dequantised
        last = body["direction"] / jnp.linalg.norm(body["direction"], axis=0)  # normalised
        twice = last @ last.T  # a product of frozen leaves alone
        x = jnp.tanh(x @ first) @ head
        return jnp.sum(jnp.tanh(x @ twice + body["bias"]) ** 2) + jnp.sum(first)

    body = {
        "int8": jnp.asarray(100 * BODY, jnp.int8),
        "scale": jnp.asarray(0.01 + draws(6) ** 2),
        "direction": jnp.asarray(draws(3, 3)),
        "bias": jnp.asarray(draws(3)),
    }
    head, x = jnp.asarray(HEAD), jnp.asarray(X)
    once, rest, kept = assert_hoists(loss, head, body, x)
    assert shapes(kept) == [(8, 6)]
    assert equations(once, body, x).count("dot_general") == 1
    assert equations(rest, head, body, kept).count("dot_general") == 3
    # And where a weight goes out as it came in, it comes from the frozen part.
    _, _, kept = assert_hoists(lambda *args: (loss(*args), args[1]), head, body, x, has_aux=True)
    assert shapes(kept) == [(8, 6)]


def test_hoist_reads_shapes_only():
    def spec(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def calls(head, body, x):
        traces.append(1)
        return jnp.sum(jnp.tanh(x @ body) @ head)

    traces = []
    large = spec(10**6, 10**6), spec(10**6, 10**6), spec(10**6, 10**6)  # 4 TB each
    once, rest = hoist(calls, *large)
    (kept,) = jax.eval_shape(once, *large[1:])
    assert kept.shape == (10**6, 10**6)
    assert jax.eval_shape(rest, *large[:2], (kept,)).shape == ()
    assert len(traces) == 1  # the function is not called again


@pytest.mark.parametrize("form", ["plain", "jitted", "twice jitted"])
def test_hoist_saves_the_flops_of_the_frozen_prefix(form):
    params = jax.eval_shape(lambda key: init(key, [256, 256, 256, 256, 10]), jax.random.key(0))
    trainable, frozen = partition("linear_3", params)
    x, y = jax.ShapeDtypeStruct((64, 256), "float32"), jax.ShapeDtypeStruct((64,), "int32")
    once, rest = hoist(FORMS[form], trainable, frozen, x, y)
    kept = jax.eval_shape(once, frozen, x, y)
    assert size_in_bytes(kept) <= 64 * 256 * 4 + size_in_bytes(y)

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    product = 2 * 64 * 256 * 10  # forward; the weight's gradient costs the same
    assert flops(jax.grad(rest), trainable, frozen, kept) < 2 * (2 * product)
    assert flops(jax.grad(loss_fn), trainable, frozen, x, y) > 3 * (2 * 64 * 256 * 256)


def test_once_and_rest_are_ordinary_jax_functions():
    trainable, frozen, x, y = an_mlp("linear_3")
    xs, ys = jnp.stack([x, x + 1, 2 * x]), jnp.stack([y, y[::-1], y])
    once, rest = hoist(loss_fn, trainable, frozen, x, y)
    epochs = 4

    @jax.jit
    def hoisted(trainable, frozen, xs, ys):
        features = jax.lax.map(lambda batch: once(frozen, *batch), (xs, ys))

        def step(trainable, kept):
            loss, grads = jax.value_and_grad(rest)(trainable, frozen, kept)
            return sgd_step(trainable, grads), loss

        def epoch(trainable, _):
            return jax.lax.scan(step, trainable, features)

        return jax.lax.scan(epoch, trainable, None, epochs)

    got, losses = hoisted(trainable, frozen, xs, ys)
    want = trainable
    for epoch in range(epochs):
        want, wanted_losses = train(want, frozen, xs, ys)
        assert_close(losses[epoch], wanted_losses)
    assert_close(got, want, 1e-5)
    assert changed(trainable, got) == ["linear_3/b", "linear_3/w"]

    @jax.jit
    def transformed(trainable, frozen, xs, ys):
        x, y, direction = xs[0], ys[0], jax.tree.map(jnp.ones_like, trainable)
        heads = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), trainable)
        kept, features = once(frozen, x, y), jax.vmap(once, (None, 0, 0))(frozen, xs, ys)

        def composed(trainable, frozen):
            return rest(trainable, frozen, once(frozen, x, y))

        def whole(trainable, frozen):
            return loss_fn(trainable, frozen, x, y)

        def hvp(fn, *args):
            return jax.jvp(lambda t: jax.grad(fn)(t, *args), (trainable,), (direction,))[1]

        return {
            "once vmapped is once mapped": (
                features,
                jax.lax.map(lambda batch: once(frozen, *batch), (xs, ys)),
            ),
            "many batches": (
                jax.vmap(rest, (None, None, 0))(trainable, frozen, features),
                jax.vmap(loss_fn, (None, None, 0, 0))(trainable, frozen, xs, ys),
            ),
            "many heads": (
                jax.vmap(jax.grad(rest), (0, None, None))(heads, frozen, kept),
                jax.vmap(jax.grad(loss_fn), (0, None, None, None))(heads, frozen, x, y),
            ),
            "gradient in the frozen part too": (
                jax.grad(composed, (0, 1))(trainable, frozen),
                jax.grad(whole, (0, 1))(trainable, frozen),
            ),
            "second derivative": (hvp(rest, frozen, kept), hvp(loss_fn, frozen, x, y)),
            "rematerialised": (
                jax.grad(jax.checkpoint(rest))(trainable, frozen, kept),
                jax.grad(loss_fn)(trainable, frozen, x, y),
            ),
            "hoisted once more": (
                hoisted_again(trainable, frozen, kept),
                loss_fn(trainable, frozen, x, y),
            ),
        }

    def hoisted_again(trainable, frozen, kept):
        again, last = hoist(rest, trainable, frozen, kept)
        return last(trainable, frozen, again(frozen, kept))

    for _, (got, want) in sorted(transformed(trainable, frozen, xs, ys).items()):
        assert_close(got, want)


@pytest.mark.parametrize("ordered", [False, True])
def test_side_effects_stay_in_rest_once_a_step(ordered, capfd):
    seen = []

    def loss(head, body, x):
        x = jnp.tanh(x @ body)
        jax.debug.callback(lambda total: seen.append(float(total)), jnp.sum(x), ordered=ordered)

        @jax.jit
        def logits(x):
            jax.debug.print("first feature {}", x[0, 0], ordered=ordered)
            return x @ head

        return jnp.sum(logits(x) ** 2)

    head, body, x = map(jnp.asarray, (HEAD, BODY, X))
    once, rest = hoist(loss, head, body, x)
    kept = jax.jit(once)(body, x)
    jax.effects_barrier()
    assert seen == []
    assert capfd.readouterr().out == ""
    step = jax.jit(rest)
    for number in (1, 2, 3):
        step(head, body, kept).block_until_ready()
        jax.effects_barrier()
        assert len(seen) == number
        assert capfd.readouterr().out.count("first feature") == 1
    features = np.tanh(np.asarray(x, np.float64) @ np.asarray(body, np.float64))
    np.testing.assert_allclose(seen, features.sum(), rtol=1e-5)
    if not ordered:
        jax.jit(jax.grad(rest))(head, body, kept).block_until_ready()
        jax.effects_barrier()
        assert len(seen) == 4


def test_what_a_side_effect_gives_is_not_hoisted():
    from jax.experimental import io_callback

    calls = []

    def count(first):
        calls.append(float(first))
        return np.float32(len(calls))

    def loss(head, body, x):
        number = io_callback(count, jax.ShapeDtypeStruct((), jnp.float32), x[0, 0], ordered=True)
        return jnp.sum(jnp.tanh(x @ body) * number @ head)

    head, body, x = map(jnp.asarray, (HEAD, BODY, X))
    once, rest = hoist(loss, head, body, x)
    kept = once(body, x)
    assert calls == []
    values = [float(jax.jit(rest)(head, body, kept)) for _ in range(3)]
    np.testing.assert_allclose(values, np.multiply([1, 2, 3], values[0]), rtol=1e-5)
    assert calls == [float(x[0, 0])] * 3


MISFITS = {
    "other shapes": (
        lambda once, rest, t, f, x, y, kept: once(f, x[:3], y[:3]),
        "'batch/0' is float32[7,3] in hoist, float32[3,3] in the call; "
        "'batch/1' is int32[7] in hoist, int32[3] in the call",
    ),
    "another dtype": (
        lambda once, rest, t, f, x, y, kept: once(f, x.astype(jnp.bfloat16), y),
        "'batch/0' is float32[7,3] in hoist, bfloat16[7,3] in the call",
    ),
    "another structure": (
        lambda once, rest, t, f, x, y, kept: once(f, {"x": x, "y": y}),
        "'batch/0' is a leaf in hoist, dict in the call; 'batch/1' is only in hoist",
    ),
    "a merged part": (
        lambda once, rest, t, f, x, y, kept: once(merge(t, f), x, y),
        "'frozen/linear_3/b' is Hole in hoist, float32[4] in the call; "
        "'frozen/linear_3/w' is Hole in hoist, float32[5,4] in the call",
    ),
    "another structure and another part": (
        lambda once, rest, t, f, x, y, kept: once(t, {"x": x, "y": y}),
        "'batch/0' is a leaf in hoist, dict in the call; 'batch/1' is only in hoist; "
        "'frozen/linear_0/b' is held by hoist; 'frozen/linear_0/w' is held by hoist; "
        "'frozen/linear_1/b' is held by hoist; 'frozen/linear_1/w' is held by hoist; "
        "'frozen/linear_2/b' is held by hoist; 'frozen/linear_2/w' is held by hoist; "
        "'frozen/linear_3/b' is held by the call; 'frozen/linear_3/w' is held by the call",
    ),
    "too little kept": (
        lambda once, rest, t, f, x, y, kept: rest(t, f, kept[:1]),
        "'kept/1' is only in hoist",
    ),
    "kept of another batch": (
        lambda once, rest, t, f, x, y, kept: jax.jit(rest)(t, f, (kept[0][:2], kept[1])),
        "'kept/0' is float32[7,5] in hoist, float32[2,5] in the call",
    ),
    "another head, differentiated": (
        lambda once, rest, t, f, x, y, kept: jax.jit(jax.grad(rest))(
            jax.tree.map(lambda leaf: leaf[:3], t), f, kept
        ),
        "'trainable/linear_3/b' is float32[4] in hoist, float32[3] in the call; "
        "'trainable/linear_3/w' is float32[5,4] in hoist, float32[3,4] in the call",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_once_and_rest_refuse_what_they_were_not_made_for(misfit):
    call, message = MISFITS[misfit]
    trainable, frozen, x, y = an_mlp("linear_3")
    once, rest = hoist(loss_fn, trainable, frozen, x, y)
    kept = once(frozen, x, y)
    with pytest.raises(ValueError, match=r" fit: | differ: ") as error:
        call(once, rest, trainable, frozen, x, y, kept)
    assert str(error.value).partition(": ")[2] == message


def test_hoist_raises_what_the_function_raises():
    trainable, frozen, x, y = an_mlp("linear_3")
    with pytest.raises(ValueError, match="linear_0 takes inputs of width 3, got shape"):
        hoist(loss_fn, trainable, frozen, x[:, :2], y)
    with pytest.raises(TypeError, match="labels must be integers, got float32"):
        hoist(loss_fn, trainable, frozen, x, y.astype(jnp.float32))


# ------------------------------------------------------------------------------- the model


def numpy_logits(params, x):
    """The MLP in float64, layer after layer in the order of their numbers."""
    x = np.asarray(x, np.float64)
    for i in range(len(params)):
        w, b = (np.asarray(params[f"linear_{i}"][name], np.float64) for name in "wb")
        x = x @ w + b
        if i < len(params) - 1:
            x = np.maximum(x, 0)
    return x


def numpy_loss(params, x, y):
    logits = numpy_logits(params, x)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, np.asarray(y)[..., None], -1).mean()


@pytest.mark.parametrize("sizes", [[3, 2], [3, 4, 2], [2] * 13, (3, np.int64(4), 5)])
@pytest.mark.parametrize("shape", [(), (5,), (2, 5)])
def test_apply_agrees_with_numpy_at_any_depth(sizes, shape):
    params = mf.init(jax.random.key(1), sizes)
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases that are not zero
    x = jax.random.normal(jax.random.key(2), (*shape, sizes[0]))
    for result in (mf.apply(params, x), jax.jit(mf.apply)(params, x)):
        assert result.shape == (*shape, sizes[-1])
        np.testing.assert_allclose(result, numpy_logits(params, x), rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(mf.apply(params, x), mf.apply(params, x.tolist()))


def test_init_is_by_key_and_dtype():
    params = mf.init(jax.random.key(0), [3, 4, 5], jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert list(params) == ["linear_0", "linear_1"]
    other = mf.init(jax.random.key(1), [3, 4, 5], jnp.bfloat16)
    assert (params["linear_0"]["w"] != other["linear_0"]["w"]).any()
    same(mf.init(jax.random.PRNGKey(7), [3, 4]), mf.init(jax.random.key(7), [3, 4]))
    shapes = jax.eval_shape(lambda key: mf.init(key, [3, 4, 5]), jax.random.key(0))
    assert jax.tree.map(lambda s: s.shape, shapes)["linear_1"] == {"w": (4, 5), "b": (5,)}


def test_weights_are_a_normal_cut_at_two_deviations():
    w = np.asarray(mf.init(jax.random.key(0), [400, 500])["linear_0"]["w"]) * np.sqrt(400)
    assert np.abs(w).max() <= 2
    assert np.abs(w).max() > 1.99
    # The variance of a standard normal cut at +-2: 1 - 4 phi(2) / (2 Phi(2) - 1) = 0.774.
    assert abs(w.var() - 0.774) < 0.005
    assert abs(w.mean()) < 0.01


def test_loss_agrees_with_numpy():
    params = mf.init(jax.random.key(0), [3, 8, 5])
    x, y = jax.random.normal(jax.random.key(1), (4, 6, 3)), jnp.arange(24).reshape(4, 6) % 5
    loss = mf.loss_fn(*mf.partition("*/b", params), x, y)
    assert loss.shape == ()
    np.testing.assert_allclose(loss, numpy_loss(params, x, y), rtol=1e-6)


def test_gradients_by_hand():
    # One layer, one example x = [2, 3], label 0, weights and biases zero: both classes have
    # p = 1/2, so d loss / d logits = p - one_hot = [-1/2, 1/2]; d loss / d b is just that,
    # and d loss / d w = outer(x, p - one_hot) = [[-1, 1], [-3/2, 3/2]].
    params = {"linear_0": {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}}
    x, y = jnp.array([[2.0, 3.0]]), jnp.array([0])
    for where in ("*", "*/w", "*/b"):
        grads = jax.grad(mf.loss_fn)(*mf.partition(where, params), x, y)["linear_0"]
        if where != "*/b":
            np.testing.assert_allclose(grads["w"], [[-1, 1], [-1.5, 1.5]], rtol=1e-6)
        if where != "*/w":
            np.testing.assert_allclose(grads["b"], [-0.5, 0.5], rtol=1e-6)
        assert is_hole(grads["w"]) == (where == "*/b")
        assert is_hole(grads["b"]) == (where == "*/w")


@pytest.mark.parametrize("where", ["linear_0", "linear_1", "*/b", "*"])
def test_gradients_against_numpy_differences(where):
    params = mf.init(jax.random.key(0), [3, 7, 5])
    params = jax.tree.map(lambda p: p + 0.01, params)
    x, y = jax.random.normal(jax.random.key(1), (6, 3)), jnp.arange(6) % 5
    grads = jax.grad(mf.loss_fn)(*mf.partition(where, params), x, y)
    for path, grad in tree_flatten_with_path(grads)[0]:
        layer, name = path[0].key, path[1].key
        for index in [tuple(0 for _ in grad.shape), tuple(-1 for _ in grad.shape)]:
            sides = []
            for step in (1e-6, -1e-6):
                moved = {
                    k: {n: np.array(p, np.float64) for n, p in v.items()} for k, v in params.items()
                }
                moved[layer][name][index] += step
                sides.append(numpy_loss(moved, x, y))
            np.testing.assert_allclose(
                grad[index], (sides[0] - sides[1]) / 2e-6, rtol=1e-3, atol=1e-6
            )


# ---------------------------------------------------------------------------- the training


def small():
    params = mf.init(jax.random.key(0), [1, 6, 5, 10])
    return params, *mf.partition(("linear_0", "linear_2"), params)


def test_sgd_step_by_hand_and_over_holes():
    params = {"a": jnp.array([1.0, 2.0]), "b": Hole(), "c": None, "d": 3.0}
    grads = {"a": jnp.array([10.0, -10.0]), "b": Hole(), "c": None, "d": 1.0}
    got = mf.sgd_step(params, grads, lr=0.5)
    same(got, {"a": jnp.array([-4.0, 7.0]), "b": Hole(), "c": None, "d": 2.5})
    np.testing.assert_allclose(mf.sgd_step(params, grads)["a"], [0.0, 3.0])


@pytest.mark.parametrize("lr", [None, 0.3, np.float32(0.3)])
def test_train_step_moves_what_trains_by_its_gradient(lr):
    params, trainable, frozen = small()
    x, y = jnp.arange(4.0)[:, None], jnp.arange(4)
    before = jax.tree.map(np.asarray, params)
    new, loss = mf.train_step(trainable, frozen, x, y, *([] if lr is None else [lr]))
    np.testing.assert_allclose(loss, numpy_loss(params, x, y), rtol=1e-5)
    # The same step from the gradient of the whole network, which knows nothing of parts.
    grads = jax.grad(
        lambda params: mf.loss_fn(
            {k: {n: Hole() for n in v} for k, v in params.items()}, params, x, y
        )
    )(params)
    for layer in ("linear_0", "linear_2"):
        for name in "wb":
            wanted = params[layer][name] - (lr or 0.1) * grads[layer][name]
            np.testing.assert_allclose(new[layer][name], wanted, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(new) == jax.tree.structure(trainable)
    same(params, before)  # nothing was donated: the caller's arrays are alive and unchanged


def test_train_is_train_step_in_a_loop():
    _, trainable, frozen = small()
    xs, ys = mf.dataset(jax.random.key(1), 20)
    looped, losses = trainable, []
    for x, y in zip(xs, ys):
        looped, loss = mf.train_step(looped, frozen, x, y, 0.05)
        losses.append(loss)
    scanned, scan_losses = mf.train(trainable, frozen, xs, ys, 0.05)
    same(scanned, looped)
    same(scan_losses, jnp.stack(losses))
    assert (mf.train(trainable, frozen, xs, ys)[1] != scan_losses)[1:].all()  # lr is 0.1
    for leaf in jax.tree.leaves((trainable, frozen)):
        assert not leaf.is_deleted()


def test_one_trace_per_frozen_set(monkeypatch):
    traces = []
    monkeypatch.setattr(mf, "apply", lambda *args, real=mf.apply: traces.append(1) or real(*args))
    params = mf.init(jax.random.key(0), [1, 9, 10])
    x, y = jnp.ones((3, 1)), jnp.arange(3)
    for where in ("linear_0", "linear_1"):
        trainable, frozen = mf.partition(where, params)
        for lr in (0.1, 0.2, 0.3):
            trainable, _ = mf.train_step(trainable, frozen, x, y, lr)
            assert len(traces) == ("linear_0", "linear_1").index(where) + 1
    scans = []
    monkeypatch.setattr(
        jax.lax, "scan", lambda *args, real=jax.lax.scan: scans.append(1) or real(*args)
    )
    for _ in range(3):
        mf.train(trainable, frozen, x[None], y[None])
    assert len(scans) == 1


def test_no_gradient_of_a_frozen_leaf_is_computed():
    """The compiled step has no output, and no product, of a frozen weight's shape."""
    params = mf.init(jax.random.key(0), [2, 31, 37, 10])
    trainable, frozen = mf.partition("linear_2", params)
    x, y = jnp.ones((3, 2)), jnp.arange(3)
    text = str(jax.make_jaxpr(mf.train_step)(trainable, frozen, x, y))
    made = re.findall(r":f32\[31,37\] = (\w+)", text)
    assert made == []


def test_everything_and_nothing_can_train():
    params, _, _ = small()
    x, y = jnp.ones((2, 1)), jnp.arange(2)
    everything, loss = mf.train_step(*mf.partition("*", params), x, y)
    assert not np.array_equal(everything["linear_1"]["w"], params["linear_1"]["w"])
    nothing, same_loss = mf.train_step(*mf.partition(lambda path, leaf: False, params), x, y)
    assert jax.tree.leaves(nothing) == []
    np.testing.assert_allclose(loss, same_loss, rtol=1e-6)


def test_bfloat16_frozen_weights_stay_so():
    _, trainable, frozen = small()
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    new, _ = mf.train_step(trainable, frozen, jnp.ones((2, 1)), jnp.arange(2))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(new)} == {"float32"}


def test_dataset_rows_are_drawn_without_replacement():
    xs, ys = mf.dataset(jax.random.key(0), 200, batch_size=7, num_classes=9)
    assert (xs.shape, xs.dtype, ys.shape, ys.dtype) == ((200, 7, 1), "float32", (200, 7), "int32")
    np.testing.assert_array_equal(xs[..., 0], ys)
    assert all(len(set(row)) == 7 for row in np.asarray(ys).tolist())
    assert set(np.asarray(ys).ravel().tolist()) == set(range(9))
    assert len({tuple(row) for row in np.asarray(ys).tolist()}) > 190
    assert isinstance(xs, jax.Array)
    same(mf.dataset(jax.random.key(0), 3), mf.dataset(jax.random.key(0), 3, 10, 10))
    # A row is a fair draw: each number is in 7/9 of 200 rows, 155.6 on average.
    counts = np.bincount(np.asarray(ys).ravel())
    assert (np.abs(counts - 155.6) < 25).all()


def test_bfloat16_parameters_keep_their_dtype_whatever_the_learning_rate():
    params = mf.init(jax.random.key(0), [2, 3, 10], jnp.bfloat16)
    trainable, frozen = mf.partition("linear_1", params)
    x, y = jnp.ones((4, 2), jnp.bfloat16), jnp.arange(4)
    for lr in (0.1, np.float32(0.1), jnp.float32(0.1)):
        new, _ = mf.train_step(trainable, frozen, x, y, lr)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(new)} == {"bfloat16"}
        same(mf.train(trainable, frozen, x[None], y[None], lr)[0], new)


def test_hoist_again_sees_what_the_function_closes_over_now():
    scale = jnp.ones(2)

    def fn(trainable, frozen, x):
        return (trainable * frozen * x * scale).sum()

    for factor in (1, 3):
        scale = jnp.full(2, factor)
        once, rest = mf.hoist(fn, jnp.ones(2), jnp.ones(2), jnp.ones(2))
        assert rest(jnp.ones(2), jnp.ones(2), once(jnp.ones(2), jnp.ones(2))) == 2 * factor


def test_hoisted_functions_return_arrays_without_jit_too():
    def fn(trainable, frozen, x, scale):
        return {"size": x.shape[0], "half": 0.5, "scale": scale, "y": trainable * x}

    once, rest = mf.hoist(fn, 1.0, 2.0, jnp.ones(3), 4.0)
    kept = once(2.0, jnp.ones(3), 5.0)
    out = rest(1.0, 2.0, kept)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((kept, out)))
    same(
        out,
        {"size": jnp.array(3), "half": jnp.array(0.5), "scale": jnp.array(5.0), "y": jnp.ones(3)},
    )


def test_labels_are_kept_once_however_they_are_used():
    def fn(trainable, frozen, x, y):
        logits = jax.nn.relu(x @ frozen) @ trainable
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        right = (logits.argmax(-1) == y).mean()
        distance = jnp.abs(logits.argmax(-1) - y.astype(float)).mean()
        return loss + (jax.nn.one_hot(y, 4) * 0.9 * logits).sum(), (right, distance)

    import optax

    batch = jnp.ones((5, 3)), jnp.arange(5) % 4
    args = jnp.ones((7, 4)), jnp.ones((3, 7))
    once, rest = mf.hoist(fn, *args, *batch)
    kept = once(args[1], *batch)
    assert sorted(leaf.shape for leaf in kept) == [(5,), (5, 7)]
    for a, b in zip(jax.tree.leaves(rest(*args, kept)), jax.tree.leaves(fn(*args, *batch))):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# ------------------------------------------------------------------------------- the bench
# One small real run is shared; what is refused is asked for in this process, which is cheap.


BENCH = Path(bench.__file__).resolve()
BENCH_KEYS = [
    *("table", "problem", "method", "clip", "platform", "devices", "simulated", "layout"),
    *("step_s", "spread_s", "vs_all", "compile_s", "flops", "flops_min", "peak_share"),
    *("temp_bytes", "trainable_bytes", "collective_bytes"),
]
BENCH_WAYS = ["all", "partition", "hoist", "stop_gradient", "mask"]


def _bench_command(*options):
    return [sys.executable, "-W", "error", str(BENCH), *map(str, options)]


def _bench(*options, timeout=300):
    command = _bench_command(*options)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def _bench_here(capsys, *options):
    """Runs the bench in this process: (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as ended:
        bench.main(list(map(str, options)))
    return ended.value.code, *capsys.readouterr()


def _bench_rows(results, **wanted):
    return [row for row in results["rows"] if all(row[k] == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def bench_run(tmp_path_factory):
    """A run of every table on a small network: (its results, its output, its folder)."""
    folder = tmp_path_factory.mktemp("bench")
    sizes = ("--sizes", 8, 16, 4, "--batch", 8, "--rounds", 2)
    files = ("--json", folder / "run.json", "--plot", folder / "run.png")
    # A peer may warn when it is imported, and that is not the bench's affair.
    command = [a for a in _bench_command("--peers", *sizes, *files) if a not in ("-W", "error")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run.json").read_text()), done.stdout, folder


def test_bench_doctests():
    assert doctest.testmod(bench) == (0, doctest.testmod(bench).attempted)
    assert doctest.testmod(bench).attempted >= 2


def test_bench_json_has_the_keys_in_their_order(bench_run):
    results, _, _ = bench_run
    assert list(results) == ["card", "complete", "rows"]
    assert results["complete"] is True
    assert all(list(row) == BENCH_KEYS for row in results["rows"])
    card = results["card"]
    assert (card["jax"], card["numpy"]) == (jax.__version__, np.__version__)
    assert (card["platform"], card["device_count"]) == ("cpu", 1)
    assert card["peak_flops"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", card["date"])


def test_bench_measures_every_case(bench_run):
    results, _, _ = bench_run
    methods = [(row["method"], row["clip"]) for row in _bench_rows(results, table="methods")]
    assert methods == [(way, clip) for clip in (False, True) for way in BENCH_WAYS]
    prefix = [(row["problem"], row["method"]) for row in _bench_rows(results, table="prefix")]
    assert prefix == [(f"mlp, {k} frozen", way) for k in (0, 1) for way in BENCH_WAYS[:3]]
    assert [row["method"] for row in _bench_rows(results, table="run")][:2] == ["loop", "scan"]
    for row in results["rows"]:
        assert (row["step_s"] is None) == row["simulated"]
        assert (row["spread_s"] is None) == row["simulated"]
    for row in _bench_rows(results, method="all", simulated=False):
        assert row["vs_all"] == 1
    for row in _bench_rows(results, table="methods"):
        assert row["peak_share"] == row["flops"] / row["step_s"] / results["card"]["peak_flops"]


def test_bench_simulates_the_devices_that_are_not_there(bench_run):
    results, _, _ = bench_run
    rows = [
        (row["devices"], row["simulated"], row["layout"])
        for row in _bench_rows(results, table="devices", method="partition")
    ]
    simulated = [(n, True, kind) for n in (2, 4, 8) for kind in ("replicated", "sharded")]
    assert rows == [(1, False, "replicated"), *simulated]


def test_bench_prints_the_card_and_a_line_a_row(bench_run):
    results, printed, _ = bench_run
    assert printed.startswith(f"jax {jax.__version__}, jaxlib ")
    lines = [line for line in printed.splitlines() if re.match(r"mlp|seed|10000", line)]
    assert len(lines) == len(results["rows"])
    for line, row in zip(lines, results["rows"], strict=True):
        assert re.split(r"  +", line)[:2] == [row["problem"], row["method"]]
        assert ("simulated" in line) == row["simulated"]


def test_bench_peers_are_measured_or_named(bench_run):
    results, printed, _ = bench_run
    names = [row["method"] for row in _bench_rows(results, table="peers", problem="mlp")]
    for peer, module in [("haiku", "haiku"), ("equinox", "equinox"), ("flax nnx", "flax.nnx")]:
        try:
            importlib.import_module(module)
        except ImportError:
            assert f"{peer} is left out" in printed
        else:
            assert peer in names
    trees = [row["method"] for row in _bench_rows(results, problem="10000 leaves")]
    assert trees[:3] == ["partition", "partition, by a pattern", "merge"]
    if "haiku" in names:
        assert trees[3:] == ["haiku partition", "haiku merge"]
        assert _bench_rows(results, table="run", method="haiku loop")


def test_bench_names_the_peers_that_are_missing(monkeypatch):
    for module in ("haiku", "equinox", "flax.nnx", "optax"):
        monkeypatch.setitem(sys.modules, module, None)
    problem = bench.mlp("mlp", (2, 3, 2), 2, ["linear_1"], jnp.float32)
    plan = bench.Plan([problem], jnp.float32, 1, True, None, False, [], 1e9)
    lines = [line for line in bench.peers_table(plan) if isinstance(line, str)]
    assert [line.partition(" is left out: ")[0] for line in lines] == list(bench.PEERS)


def test_bench_draws_a_picture(bench_run):
    from matplotlib import image

    _, printed, folder = bench_run
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(folder / "run.png")[..., :3]
    height, width, _ = pixels.shape
    assert width > height > 500
    assert (pixels[0, 0] == 1).all()  # white, on a dark page too
    for half in (pixels[:, : width // 2], pixels[:, width // 2 :]):
        colors = {tuple(np.round(c * 255).astype(int)) for c in half.reshape(-1, 3)[::7]}
        assert {(0x77, 0x77, 0x77), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)} <= colors
    assert f"drawn: {folder / 'run.png'}" in printed


def test_bench_renders_its_results_as_markdown(bench_run, capsys):
    results, _, folder = bench_run
    bench.main(["--render", str(folder / "run.json"), "--tables", "methods", "devices"])
    text = capsys.readouterr().out
    assert text.startswith(f"jax {jax.__version__}, ")
    assert re.findall(r"^\*\*(\w+)\*\*", text, re.MULTILINE) == ["methods", "devices"]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:6] == "| mlp "]
    rows = _bench_rows(results, table="methods") + _bench_rows(results, table="devices")
    assert [line[1] for line in lines] == [row["method"] for row in rows]
    titles = next(line for line in text.splitlines() if line.startswith("| problem"))
    assert "layout" not in titles  # of no use there
    cells = dict(zip(titles.strip("| ").split(" | "), lines[0], strict=True))
    seconds = {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}
    number, unit = cells["step"].split()
    assert float(number) * seconds[unit] == pytest.approx(rows[0]["step_s"], rel=0.01)


# ---------------------------------------------------------------- the bench's exact figures


def _bench_flops(sizes, batch, forward, weights, inputs):
    """2 x batch x in x out for each layer named, once for each list that it is in."""
    return sum(2 * batch * sizes[i] * sizes[i + 1] for i in [*forward, *weights, *inputs])


@pytest.mark.parametrize(
    ("where", "method", "forward", "weights", "inputs"),
    [
        ("linear_2", "all", [0, 1, 2], [0, 1, 2], [1, 2]),
        ("linear_2", "partition", [0, 1, 2], [2], []),
        ("linear_2", "mask", [0, 1, 2], [2], []),
        ("linear_2", "hoist", [2], [2], []),
        (("linear_0", "linear_2"), "partition", [0, 1, 2], [0, 2], [1, 2]),
        (("linear_0", "linear_2"), "hoist", [0, 1, 2], [0, 2], [1, 2]),
        ("linear_1", "partition", [0, 1, 2], [1], [2]),
        ("*/b", "partition", [0, 1, 2], [], [1, 2]),
        ("*/b", "hoist", [1, 2], [], [1, 2]),
        ("linear_2/b", "hoist", [], [], []),
        ("*/w", "stop_gradient", [0, 1, 2], [0, 1, 2], [1, 2]),
    ],
)
def test_bench_least_flops_are_those_worked_out_by_hand(where, method, forward, weights, inputs):
    sizes, batch = (3, 5, 7, 2), 11
    problem = bench.mlp("mlp", sizes, batch, where, jnp.float32)
    wanted = _bench_flops(sizes, batch, forward, weights, inputs)
    assert bench.least_flops(problem, method) == wanted


def test_bench_exact_figures_of_wide_and_deep_at_every_device_count(tmp_path):
    """At most 1 % over the products; sent: what trains, and the loss's four bytes."""
    counts = (1, 2, 4, 8)
    done = _bench("--devices", *counts, "--compile-only", "--json", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "x.json").read_text())
    wide, deep = (784, 1024, 1024, 10), (1024, 2048, 2048, 2048, 2048, 10)
    least = {
        "wide": _bench_flops(wide, 128, [0, 1, 2], [0, 2], [1, 2]),
        "deep": _bench_flops(deep, 64, [0, 1, 2, 3, 4], [4], []),
    }
    trainable = {"wide": 4 * (784 * 1024 + 1024 + 1024 * 10 + 10), "deep": 4 * (2048 * 10 + 10)}
    for problem in ("wide", "deep"):
        rows = _bench_rows(results, problem=problem, method="partition", layout="replicated")
        assert [row["devices"] for row in rows] == list(counts)
        for row in rows:
            assert row["step_s"] is None
            assert row["flops_min"] == least[problem]
            assert least[problem] <= row["flops"] <= 1.01 * least[problem]
            assert row["trainable_bytes"] == trainable[problem]
            sent = 0 if row["devices"] == 1 else trainable[problem] + 4
            assert row["collective_bytes"] == sent


def test_bench_plans_512_devices_without_them(tmp_path):
    sizes = (512, 1024, 512, 10)
    done = _bench(
        *("--devices", 512, "--compile-only", "--json", tmp_path / "x.json"),
        *("--sizes", *sizes, "--batch", 32, "--train", "linear_2"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("512 cpu simulated") == 4
    results = json.loads((tmp_path / "x.json").read_text())
    replicated, sharded = _bench_rows(results, method="partition")
    assert replicated["collective_bytes"] == 4 * (512 * 10 + 10) + 4
    assert replicated["flops"] <= 1.01 * _bench_flops(sizes, 32, [0, 1, 2], [2], [])
    # Sharded, every device has to be sent, at least, the weights that it does not hold.
    assert sharded["collective_bytes"] > 4 * (512 * 1024 + 1024 * 512)


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("%a = f32[2,3]{1,0} all-reduce(f32[2,3]{1,0} %b), channel_id=1", 24),
        ("%a = f32[] all-reduce(%b)", 4),
        ("ROOT %a = (f32[10]{0}, /*index=1*/bf16[2,3]{1,0}) all-reduce(%b, %c)", 52),
        ("%a = f32[8,128]{1,0:T(8,128)} all-gather(%b), dimensions={0}", 4096),
        ("%a = (f32[4]{0:T(128)}, s8[3]{0}) all-to-all(%b, %c)", 19),
        ("%a = pred[5]{0} collective-permute(%b)", 5),
        ("%a = f64[5]{0} reduce-scatter(%b), to_apply=%add", 40),
        ("%s = (f32[1]{0}, f32[8]{0}) all-gather-start(%b)\n"
         "%d = f32[8]{0} all-gather-done(%s)", 32),
        ("%all-reduce.1 = f32[8]{0} add(%b, %c)", 0),
        ("%a = f32[8]{0} fusion(%all-reduce.3), calls=%all-reduce", 0),
    ],
)  # fmt: skip
def test_bench_reads_collectives_from_the_program(program, wanted):
    assert bench.collective_bytes(program) == wanted


def test_bench_hoist_costs_less_than_twice_the_heads_own_products():
    problem = bench.mlp("mlp", (256, 256, 256, 256, 10), 64, "linear_3", jnp.float32)
    row = bench.Row("methods", "mlp", "hoist")
    bench.prepare(problem, row)
    assert row.flops < 2 * _bench_flops(problem.sizes, 64, [3], [3], [])


# ------------------------------------------------------------- the bench and its agreement


def test_bench_stops_where_methods_disagree():
    before, after = {"w": np.zeros(3, np.float32)}, {"w": np.full(3, 1, np.float32)}
    other = {"w": np.array([1, 1, 0.9], np.float32)}
    bench.compare("deep: mask", "partition", after, after, before)
    words = re.escape("deep: mask must take the same step as partition: 'w' differs by 0.1")
    with pytest.raises(bench.Broken, match=words):
        bench.compare("deep: mask", "partition", other, after, before)
    with pytest.raises(bench.Broken, match="differs by nan"):
        bench.compare("deep: mask", "partition", {"w": other["w"] * np.nan}, after, before)


def _bench_model(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text("import jax, jax.numpy as jnp\n" + textwrap.dedent(text))
    return file


def test_bench_ends_with_the_difference_and_keeps_the_rows(tmp_path, capsys):
    file = _bench_model(
        tmp_path,
        """
        def make():
            return lambda params, x: jnp.nan * params["w"] * x, {"w": jnp.ones(())}, (1.0,)
        """,
    )
    options = ("--model", f"{file}:make", "--train", "w", "--json", tmp_path / "x.json")
    code, _, error = _bench_here(capsys, *options)
    assert (code, error.count("\n")) == (1, 1)
    assert "make: all must take the same step as partition: 'w' differs by nan" in error
    assert json.loads((tmp_path / "x.json").read_text())["complete"] is False


def test_bench_case_out_of_memory_says_so_and_the_rest_goes_on(tmp_path):
    """The frozen part's gradient needs a petabyte: only what computes it must fail."""
    file = _bench_model(
        tmp_path,
        """
        @jax.custom_vjp
        def body(w, x):
            return w * x

        def back(_, g):
            shape = (2**24, 2**24)
            huge = jnp.sort(g[0] * jax.lax.broadcasted_iota(g.dtype, shape, 0))
            return huge[0, : g.size], g

        body.defvjp(lambda w, x: (w * x, None), back)

        def make():
            def loss(params, x):
                return jnp.sum(params["head"] * body(params["body"], x))

            return loss, {"body": jnp.ones(4), "head": jnp.ones(4)}, (jnp.ones(4),)
        """,
    )
    options = ("--model", f"{file}:make", "--train", "head", "--rounds", 2)
    done = _bench(*options, "--json", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "x.json").read_text())
    said = {row["method"]: row["step_s"] is not None for row in results["rows"]}
    fitting = dict.fromkeys(["partition", "hoist", "stop_gradient"], True)
    assert said == {"all (out of memory)": False, "mask (out of memory)": False} | fitting
    assert len(results["rows"]) == 10
    assert done.stdout.count("(out of memory)") == 4
    assert re.search(r"^body +\(4,\) +float32 +4  frozen$", done.stdout, re.MULTILINE)
    assert {row["trainable_bytes"] for row in _bench_rows(results, method="partition")} == {16}


# ------------------------------------------------------------------- the bench and bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--devices 4096", "--devices 4096: there are 1, [CpuDevice(id=0)]; --compile-only"),
        ("--devices 0", "must be a positive integer, got '0'"),
        ("--train nope", "seed: pattern 'nope' matches no leaf; 6 of 6 names, nearest first"),
        ("--freeze nope", "seed: pattern '!nope' matches no leaf"),
        ("--freeze *", "seed: nothing trains"),
        ("--train a --freeze b", "not allowed with argument"),
        ("--sizes 8", "sizes needs an input and an output width, got (8,)"),
        ("--sizes 8 0 2", "sizes[1] must be a positive integer, got 0"),
        ("--batch -1", "argument --batch: must be a positive integer, got '-1'"),
        ("--rounds 1.5", "argument --rounds: must be a positive integer, got '1.5'"),
        ("--tables nope", "invalid choice: 'nope'"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--compile-only --tables run", "--compile-only is for the table devices alone"),
        ("--cluster --tables methods", "--cluster is for the table devices alone"),
        ("--coordinator a:1", "--coordinator, --processes and --process go together"),
        ("--coordinator a --processes 2 --process 0", "must be HOST:PORT, got 'a'"),
        ("--coordinator a:1 --processes 2 --process 2", "--process must be in 0 .. 1, got 2"),
        ("--json {}/no/x.json", "x.json: cannot be written: No such file or directory"),
        ("--json {}", "cannot be written: it is no regular file"),
        ("--plot {}/no/x.png", "x.png: cannot be written: No such file or directory"),
        ("--plot {}/x.doc", "'doc' is no kind of picture (try .png)"),
        ("--plot {}/x.png --tables run", "--plot draws the tables prefix and methods"),
        ("--render {}/none.json", "none.json: no results to read: [Errno 2]"),
        ("--render {}/mine.py", "mine.py: no results to read: "),
        ("--model {}/none.py:make --train w", "there is no file {}/none.py"),
        ("--model {}/mine.py --train w", "name it FILE.py:NAME"),
        ("--model {}/mine.py:none --train w", "mine.py has no function none"),
        ("--model {}/mine.py:number --train w", "mine.py has no function number"),
        ("--model {}/mine.py:good", "--model needs --train or --freeze"),
        ("--model {}/mine.py:good --train w --batch 3", "brings its own sizes and batch"),
        ("--model {}/mine.py:good --train w --tables run", "is for the table methods alone"),
        ("--model {}/mine.py:good --train v", "good: pattern 'v' matches no leaf"),
        ("--model {}/mine.py:none_at_all --train w", "(loss_fn, params, batch), got NoneType"),
        ("--model {}/mine.py:pair --train w", "(loss_fn, params, batch), got (function, dict)"),
        ("--model {}/mine.py:mixed --train w", "got (dict, function, tuple)"),
        ("--model {}/mine.py:text --train w", "of arrays, got str at '0/w'"),
        ("--model {}/mine.py:integer --train w", "'w' in params is int32, which cannot train"),
        ("--model {}/mine.py:vector --train w", "a floating-point number, not "),
    ],
)
def test_bench_refuses(options, words, tmp_path, capsys):
    _bench_model(
        tmp_path,
        """
        number, w = 3, jnp.ones(3)
        def loss(params, x): return jnp.sum(params["w"] * x)
        def good(): return loss, {"w": w}, (w,)
        def none_at_all(): pass
        def pair(): return loss, {"w": w}
        def mixed(): return {"w": w}, loss, (w,)
        def text(): return loss, {"w": "w"}, (w,)
        def integer(): return loss, {"w": w.astype(jnp.int32)}, (w,)
        def vector(): return lambda params, x: params["w"] * x, {"w": w}, (w,)
        """,
    )
    before = sorted(tmp_path.iterdir())
    code, out, error = _bench_here(capsys, *options.format(tmp_path).split())
    assert (code, out) == (2, "")
    assert "error: " in error
    assert error.count("\n") == 1
    assert words.format(tmp_path) in error
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written is left behind


def test_bench_says_that_there_is_no_cluster():
    done = _bench("--cluster")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--cluster: none found, --coordinator names one: " in done.stderr
    assert done.stderr.count("\n") == 1


def test_bench_says_how_to_get_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    code, _, error = _bench_here(capsys, "--plot", tmp_path / "x.png")
    assert code == 2
    assert "--plot needs matplotlib: pip install matplotlib, or uv run --with" in error


def test_bench_writes_in_one_piece(tmp_path):
    target = tmp_path / "x.json"
    target.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), bench.replaced(str(target)) as path:
        Path(path).write_text("half")
        raise KeyboardInterrupt
    assert (target.read_text(), list(tmp_path.iterdir())) == ("old", [target])
    with bench.replaced(str(target)) as path:
        Path(path).write_text("new")
    assert (target.read_text(), list(tmp_path.iterdir())) == ("new", [target])


@pytest.mark.parametrize(
    ("options", "trains"),
    [
        ("--train linear_1", {"linear_1/b", "linear_1/w"}),
        ("--freeze linear_1", {"linear_0/b", "linear_0/w"}),
        ("--freeze * !*/b", {"linear_0/b", "linear_1/b"}),
        ("--freeze !linear_0 linear_0/b", {"linear_0/w"}),
    ],
)
def test_bench_freeze_is_train_turned_round(options, trains):
    _, args = bench.parse(["--sizes", "2", "3", "2", *options.split()])
    (problem,) = bench.problems_of(args)
    trainable, _ = mf.partition(problem.where, problem.data.shapes[0])
    paths = jax.tree_util.tree_flatten_with_path(trainable)[0]
    assert {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths} == trains


def test_bench_interrupted_writes_what_is_there(tmp_path):
    options = ("--sizes", 8, 16, 4, "--rounds", 2, "--tables", "methods", "prefix")
    command = _bench_command(*options, "--json", tmp_path / "x.json")
    bench_process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in bench_process.stdout:
        if re.match("mlp +mask +yes", line):  # the last row before the next table's compilation
            break
    bench_process.send_signal(signal.SIGINT)
    rest, _ = bench_process.communicate(timeout=120)
    assert bench_process.returncode == 130
    assert "not complete: ended after 10 rows" in rest
    results = json.loads((tmp_path / "x.json").read_text())
    assert results["complete"] is False
    assert [row["method"] for row in results["rows"]] == BENCH_WAYS * 2


def test_bench_heeds_an_interruption_that_python_ignored():
    before = signal.getsignal(signal.SIGINT)
    with bench.interruptible() as heed:
        heed()  # nothing to heed yet
        with contextlib.suppress(KeyboardInterrupt):  # as a destructor would
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            heed()
    assert signal.getsignal(signal.SIGINT) is before


# -------------------------------------------------------------- the bench across processes


def _bench_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _bench_cluster(code, *options):
    """Two processes that run ``code``, each with its options of a cluster in sys.argv."""
    port = _bench_port()
    cluster = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process")
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *cluster, str(i), *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(BENCH.parent)},
        )
        for i in (0, 1)
    ]


def test_bench_two_processes_train_as_one(tmp_path):
    """Over gloo, sharded and not; and the bench itself measures there, process 0 alone printing."""
    code = f"""if True:
        import sys, bench, jax, numpy as np
        try:
            bench.main(sys.argv[1:])
        except SystemExit as ended:
            assert not ended.code
        problem = bench.mlp("mlp", (8, 16, 4), 8, ["linear_1"], np.dtype("float32"))
        mesh = jax.sharding.Mesh(np.array(bench.pick_devices("cpu", 2)), ("data",))
        for layout in ("replicated", "sharded"):
            row = bench.Row("devices", "mlp", "partition", layout=layout)
            new = bench.prepare_sharded(problem, mesh, row).updated()["linear_1"]
            if jax.process_index() == 0:
                np.savez({str(tmp_path)!r} + f"/{{layout}}.npz", **new)
    """
    options = ("--sizes", 8, 16, 4, "--batch", 8, "--rounds", 2, "--json", tmp_path / "x.json")
    both = _bench_cluster(code, *options)
    (out, error), (silent, other_error) = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], error + other_error
    assert silent == ""
    assert "2 x cpu" in out
    results = json.loads((tmp_path / "x.json").read_text())
    rows = _bench_rows(results, devices=2, method="partition")
    assert [(row["layout"], row["simulated"]) for row in rows] == [
        ("replicated", False),
        ("sharded", False),
    ]
    assert all(row["step_s"] > 0 for row in rows)
    assert rows[0]["collective_bytes"] == 4 * (16 * 4 + 4) + 4
    # One process, the same 16 rows, by the module alone.
    problem = bench.mlp("mlp", (8, 16, 4), 16, ["linear_1"], np.dtype("float32"))
    params, (x, y) = problem.data.arrays
    trainable, frozen = mf.partition("linear_1", params)
    wanted, _ = mf.train_step(trainable, frozen, x, y)
    for layout in ("replicated", "sharded"):
        new = np.load(tmp_path / f"{layout}.npz")
        for name in ("w", "b"):
            was, must = np.asarray(params["linear_1"][name]), np.asarray(wanted["linear_1"][name])
            assert np.abs(must - was).max() > 1e-4
            np.testing.assert_allclose(new[name], must, rtol=0, atol=1e-6)


@pytest.mark.parametrize("killed", [0, 1])
def test_bench_ends_when_another_process_dies(killed):
    code = "import sys, bench; bench.main(sys.argv[1:])"
    both = _bench_cluster(code, "--sizes", 8, 16, 4, "--devices", 2, "--rounds", 200)
    for line in both[0].stdout:
        if line.startswith("mlp"):  # the first rows, of two: the others are being measured
            break
    both[killed].send_signal(signal.SIGKILL)
    _, error = both[1 - killed].communicate(timeout=120)
    both[killed].communicate(timeout=120)
    assert both[1 - killed].returncode not in (0, None)
    assert error.strip()


def test_bench_says_that_the_coordinator_does_not_answer():
    code = "import sys, bench; bench.JOIN_S = 1; bench.main(sys.argv[1:])"
    both = _bench_cluster(code)
    both[0].kill()  # before it has so much as imported jax
    _, error = both[1].communicate(timeout=120)
    both[0].communicate(timeout=120)
    assert both[1].returncode == 1
    assert re.fullmatch(r"bench.py: no answer from 127.0.0.1:\d+ in 1 s: .*\n", error)


def test_bench_gives_up_on_a_coordinator_that_only_listens():
    code = "import sys, bench; bench.JOIN_S = 1; bench.main(sys.argv[1:])"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", code, "--coordinator", where, "--processes", "2",
             "--process", "1"],
            capture_output=True, text=True, timeout=120,
            env=os.environ | {"PYTHONPATH": str(BENCH.parent)},
        )  # fmt: skip
    assert done.returncode not in (0, None)
    assert "DEADLINE_EXCEEDED" in done.stderr


# -------------------------------------------------------------------------------- the README


def readme_sections():
    """Each heading with the Python blocks under it: (code, the output that is shown)."""
    sections = {}
    token = (
        r"^#+ (?P<title>.*)$"
        r"|```python\n(?P<code>[\s\S]*?)```\n(\n```text\n(?P<shown>[\s\S]*?)```\n)?"
    )
    for match in re.finditer(token, (HERE / "README.md").read_text(), re.MULTILINE):
        if match["title"]:
            blocks = sections.setdefault(match["title"], [])
        elif match["code"]:
            blocks.append((match["code"], match["shown"] or ""))
    return {title: blocks for title, blocks in sections.items() if blocks}


@pytest.mark.slow
@pytest.mark.parametrize(("title", "blocks"), readme_sections().items(), ids=readme_sections())
def test_readme_blocks_print_what_they_show(title, blocks, capsys):
    """The blocks under a heading are one program; only what a clock measured may differ."""
    namespace = {"__name__": "readme"}
    for code, shown in blocks:
        exec(compile(code, f"README.md, {title}", "exec"), namespace)
        said = capsys.readouterr().out
        clock = r"[\d.]+( s$| times as fast)"
        assert re.sub(clock, "N", said, flags=re.M) == re.sub(clock, "N", shown, flags=re.M)


def test_the_readmes_model_goes_through_the_bench(tmp_path, capsys, monkeypatch):
    ((code, _),) = readme_sections()["Your model in the bench"]
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    (options,) = re.findall(r"bench.py (--model mine.*)", (HERE / "README.md").read_text())
    with pytest.raises(SystemExit, match="0"):
        bench.main([*options.split(), "--rounds", "1"])
    out = capsys.readouterr().out
    assert re.search(r"params/layers_4/kernel +\(256, 10\) +float32 +2560 +train", out)
    assert all(re.search(rf"^ *make +{method} ", out, re.M) for method in BENCH_WAYS), out


def test_the_readmes_tables_are_those_of_the_committed_results():
    check = [sys.executable, HERE / ".ci/readme", "--check"]
    done = subprocess.run(
        check, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)}
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_readme_names_every_trap_and_its_test():
    named = re.findall(r"`(test_trap_\w+)` \|", (HERE / "README.md").read_text())
    assert sorted(named) == sorted(name for name in globals() if name.startswith("test_trap_"))


def test_the_readme_has_its_commands():
    text = (HERE / "README.md").read_text()
    for command in (
        "pip install uv",
        "uv run minifreeze.py",
        "uv run test_minifreeze.py",
        "uv run bench.py",
    ):
        assert f"\n{command}\n" in text
    assert len(re.findall(r"```python\n", text)) == sum(map(len, readme_sections().values()))


if __name__ == "__main__":  # in a process of its own, for pytest wants to import first
    sys.exit(subprocess.call([sys.executable, "-m", "pytest", __file__, *sys.argv[1:]]))
