# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "jax>=0.5.1", "numpy", "pytest", "pytest-cov", "hypothesis", "matplotlib", "scikit-learn",
#   "dm-haiku", "equinox", "flax", "optax", "orbax-checkpoint",
# ]
# ///
# SPDX-License-Identifier: MIT
"""The tests of minifreeze: `uv run test_minifreeze.py [pytest's options]` runs them all.

Laws first, over every container that JAX knows; then errors by their text; then numbers,
against NumPy in float64, derivatives worked out by hand and the real peers; last the programs.
"""

import collections
import dataclasses
import doctest
import importlib.metadata
import itertools
import os
import pathlib
import pickle
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.tree_util import GetAttrKey, tree_flatten_with_path

import minifreeze as mf
from minifreeze import Hole

HERE = pathlib.Path(__file__).resolve().parent
settings.register_profile(
    "default", max_examples=40, deadline=None, suppress_health_check=list(HealthCheck)
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


def test_a_glob_takes_a_single_leaf_by_its_empty_name():
    assert mf.partition("*", 5) == (5, Hole())


def test_holes_survive_what_people_do_with_trees():
    trainable, frozen = mf.partition("a", {"a": jnp.ones(2), "b": jnp.ones(3)})
    assert frozen["a"] == Hole() != trainable["a"]
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
    words(error, "'twin'")


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
    mf.train(trainable, frozen, x[None], y[None])
    once = len(traces)
    mf.train(trainable, frozen, x[None], y[None])
    assert len(traces) == once


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


# ------------------------------------------------------------------- bad input, all of it


PARAMS = mf.init(jax.random.key(0), [2, 3, 10])
TRAINABLE, FROZEN = mf.partition("linear_1", PARAMS)
X, Y = jnp.ones((4, 2)), jnp.arange(4)
ONCE, REST = mf.hoist(mf.loss_fn, TRAINABLE, FROZEN, X, Y)


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
    "apply on a part": (lambda: mf.apply(TRAINABLE, X), ValueError, ["merge", "linear_0/w"]),
    "apply on other names": (
        lambda: mf.apply({"layer": PARAMS["linear_0"]}, X),
        ValueError,
        ["linear_0, linear_1", "layer"],
    ),
    "apply on a gap in the names": (
        lambda: mf.apply({"linear_0": PARAMS["linear_0"], "linear_2": PARAMS["linear_1"]}, X),
        ValueError,
        ["linear_2"],
    ),
    "apply on no layer": (lambda: mf.apply({}, X), ValueError, ["linear_0"]),
    # the training
    "labels that are no integers": (
        lambda: mf.loss_fn(TRAINABLE, FROZEN, X, jnp.ones(4)),
        TypeError,
        ["integers", "float32"],
    ),
    "labels of another length": (
        lambda: mf.loss_fn(TRAINABLE, FROZEN, X, jnp.arange(3)),
        ValueError,
        ["(3,)", "(4, 10)"],
    ),
    "labels in a column": (
        lambda: mf.train_step(TRAINABLE, FROZEN, X, Y[:, None]),
        ValueError,
        ["(4, 1)", "(4, 10)"],
    ),
    "integers in the trainable part": (
        lambda: mf.train_step(jax.tree.map(lambda leaf: leaf.astype(int), TRAINABLE), FROZEN, X, Y),
        TypeError,
        ["'linear_1/b'", "int32"],
    ),
    "bools in the trainable part": (
        lambda: mf.train(
            {"linear_0": Hole(), "linear_1": jnp.ones(2, bool)}, FROZEN, X[None], Y[None]
        ),
        TypeError,
        ["'linear_1'", "bool"],
    ),
    "a key in the trainable part": (
        lambda: mf.train_step({"key": jax.random.key(0)}, FROZEN, X, Y),
        TypeError,
        ["'key'", "key<fry>"],
    ),
    "text in the trainable part": (
        lambda: mf.train_step({"linear_0": "text"}, FROZEN, X, Y),
        TypeError,
        ["linear_0", "str"],
    ),
    "nan in the trainable part, looked for": (
        lambda: debug_nans(lambda: mf.train_step(nan_in(TRAINABLE), FROZEN, X, Y)),
        FloatingPointError,
        ["nan"],
    ),
    "train_step on parts swapped at depth": (
        lambda: mf.train_step(TRAINABLE, TRAINABLE, X, Y),
        ValueError,
        ["'linear_0/b' is held by none"],
    ),
    "train_step on donated arrays": (
        lambda: mf.train_step(*deleted(), X, Y),
        (RuntimeError, ValueError),
        ["delete"],
    ),
    "train on batches of other lengths": (
        lambda: mf.train(TRAINABLE, FROZEN, X[None], jnp.stack([Y, Y])),
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
        lambda: ONCE(FROZEN, X[:3], Y),
        ValueError,
        ["'batch/0'", "float32[4,2] in hoist", "float32[3,2] in the call"],
    ),
    "once with another dtype": (
        lambda: ONCE(FROZEN, X, Y.astype(float)),
        ValueError,
        ["'batch/1'", "int32[4] in hoist", "float32[4] in the call"],
    ),
    "once without the labels": (
        lambda: ONCE(FROZEN, X),
        ValueError,
        ["'batch/1' is only in hoist"],
    ),
    "once on the wrong part": (
        lambda: ONCE(TRAINABLE, X, Y),
        ValueError,
        ["'frozen/linear_0/b' is float32[3] in hoist, Hole in the call"],
    ),
    "rest with less kept": (
        lambda: REST(TRAINABLE, FROZEN, ONCE(FROZEN, X, Y)[:1]),
        ValueError,
        ["'kept/1' is only in hoist"],
    ),
    "rest with parts swapped": (
        lambda: REST(FROZEN, TRAINABLE, ONCE(FROZEN, X, Y)),
        ValueError,
        ["'trainable/linear_1/w' is float32[3,10] in hoist, Hole in the call"],
    ),
    "rest with the batch": (lambda: REST(TRAINABLE, FROZEN, (X, Y)), ValueError, ["kept/"]),
    "hoisting a loss of another batch": (
        lambda: mf.hoist(mf.loss_fn, TRAINABLE, FROZEN, X),
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
    "steps of zero": (["--steps", "0"], ["--steps must be in 1 ..", "0"]),
    "steps below zero": (["--steps", "-1"], ["--steps", "-1"]),
    "steps of a fraction": (["--steps", "1.5"], ["--steps", "1.5"]),
    "steps without end": (["--steps", "1" + "0" * 21], ["--steps must be in 1 ..", "10000000"]),
    "a plot of too long a name": (["--plot", "x" * 300 + ".png"], ["xxx.png", "too long"]),
    "no number of steps": (["--steps"], ["--steps", "argument"]),
    "seed of a word": (["--seed", "x"], ["--seed", "'x'"]),
    "seed below zero": (["--seed", "-1"], ["--seed", "-1"]),
    "seed too large": (["--seed", str(2**32)], ["--seed", str(2**32)]),
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
    assert lines[-2:] == [
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
    assert picture.shape[1] > picture.shape[0] > 600
    assert picture[..., :3].std() > 0.05  # something is drawn
    assert os.listdir(tmp_path) == ["params.png"]


def test_the_plot_draws_every_parameter_twice_and_marks_the_frozen(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    before = mf.init(jax.random.key(0), [2, 3, 4])
    _, frozen = mf.partition("linear_1", before)
    after = jax.tree.map(lambda leaf: leaf + 1, before)
    mf._plot("unused.png", before, after, frozen)
    axes = [axis for axis in figures[0].axes if axis.get_title()]
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
        assert low == -high < 0
        assert high == max(np.abs(axis.images[0].get_array()).max() for axis in (above, below)) or 1


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
    package = tmp_path / "their_project"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "freezing.py").write_bytes((HERE / "minifreeze.py").read_bytes())
    program = """
import pickle, sys
sys.path += ['.', 'site']
import jax, jax.numpy as jnp
from their_project import freezing
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


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(mf)
    assert result.attempted >= 14
    assert result.failed == 0


def test_all_names_what_is_public():
    public = {n for n, v in vars(mf).items() if getattr(v, "__module__", "") == "minifreeze"}
    assert {n for n in public if not n.startswith("_")} - {"main"} == set(mf.__all__)
    assert all(getattr(mf, name).__doc__ for name in mf.__all__)


# -------------------------------------------------------------------------------- the README


def readme_sections():
    """Each heading with the Python blocks under it: (code, the output that is shown)."""
    sections = {}
    token = r"^#+ (?P<title>.*)$|```python\n(?P<code>[\s\S]*?)```\n(\n```text\n(?P<shown>[\s\S]*?)```\n)?"
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


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
