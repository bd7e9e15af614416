# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.5.1", "numpy", "pytest", "hypothesis"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the minifreeze authors
"""Tests for minifreeze.py. If you copy the module, copy this file next to it.

    uv run test_minifreeze.py              # all tests
    uv run test_minifreeze.py -k merge     # tests whose name contains merge

Each function has one section, in the order of minifreeze.py: examples, errors, then
properties (Hypothesis). Most tests are parametrized: to add a case, add a
``pytest.param(..., id=...)`` to the list. In the hoist section, most cases are
functions.
"""

# Many JAX functions have no type annotations:
# mypy: allow-untyped-calls

from __future__ import annotations

import collections
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import itertools
import math
import os
import pickle
import re
import runpy
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, DrawFn, SearchStrategy
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.tree_util import GetAttrKey, keystr

import minifreeze
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

PyTree: TypeAlias = Any

# The sharding tests need several devices. XLA reads this flag when JAX initializes its
# backend, which is after import.
EIGHT_CPUS = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_CPUS}"

pytestmark = pytest.mark.filterwarnings("error")  # a warning fails its test

# The default profile is deterministic.
settings.register_profile("default", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("soak", max_examples=20_000, deadline=None)
settings.register_profile(
    "mutants", max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def examples(factor: float) -> int:
    """The profile's number of examples, times a factor.

    Capped at 2,000, because every example of hoist is compiled.
    """
    return min(2_000, int(factor * settings().max_examples))


@pytest.fixture(autouse=True, scope="module")
def compile_quickly() -> Iterator[None]:
    """Turns off most XLA optimizations: compilation takes most of the run time."""
    option = "jax_disable_most_optimizations"
    before = jax.config.values[option]
    jax.config.update(option, True)
    yield
    jax.config.update(option, before)


@pytest.fixture
def fully_optimized(compile_quickly: None) -> Iterator[None]:
    """Turns on XLA's optimizations, for tests that compare bits or costs.

    The argument makes pytest run `compile_quickly` first, which this overrides.
    """
    option = "jax_disable_most_optimizations"
    before = jax.config.values[option]
    jax.config.update(option, False)
    jax.clear_caches()  # otherwise JAX would reuse unoptimized programs in its cache
    yield
    jax.config.update(option, before)
    jax.clear_caches()


@pytest.fixture(params=["x64", "strict dtypes", "strict ranks", "no jit", "debug nans"])
def strict_setting(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test under each of JAX's strictness and debugging options."""
    option, value = {
        "x64": ("jax_enable_x64", True),
        "strict dtypes": ("jax_numpy_dtype_promotion", "strict"),
        "strict ranks": ("jax_numpy_rank_promotion", "raise"),
        "no jit": ("jax_disable_jit", True),
        "debug nans": ("jax_debug_nans", True),
    }[request.param]
    before = jax.config.values[option]
    jax.config.update(option, value)
    yield
    jax.config.update(option, before)


# ------------------------------------------------------------------------------ helpers


HOLE = Hole()


@contextlib.contextmanager
def raises(
    error: type[BaseException], *fragments: str, absent: Sequence[str] = ()
) -> Iterator[None]:
    """Expects an error whose message contains all of `fragments`, none of `absent`."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert missing == [], message
    unwanted = [fragment for fragment in absent if fragment in message]
    assert unwanted == [], message


def paths(tree: PyTree) -> list[Any]:
    """The key path of each leaf, in tree order."""
    return [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def leaf_names(tree: PyTree) -> list[str]:
    """The name of each leaf, in tree order, such as ``"linear_0/w"``."""
    return [keystr(path, simple=True, separator="/") for path in paths(tree)]


def leaves_by_name(tree: PyTree) -> dict[str, Any]:
    """The leaves, keyed by name."""
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def is_hole(node: Any) -> bool:
    return isinstance(node, Hole)


def leaves_and_holes(tree: PyTree) -> list[Any]:
    """The leaves and the holes, in tree order."""
    return jax.tree.leaves(tree, is_leaf=is_hole)


def structure_with_holes(tree: PyTree) -> Any:
    """The structure of a tree, in which holes count as leaves."""
    return jax.tree.structure(tree, is_leaf=is_hole)


def pair_leaves(got: PyTree, want: PyTree) -> list[tuple[Any, Any]]:
    """Asserts that the structures are equal, holes included, and pairs the leaves."""
    got_structure: Any = jax.tree.structure(got)
    assert got_structure == jax.tree.structure(want)
    return list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def assert_identical(got: PyTree, want: PyTree) -> None:
    """Asserts that structures, shapes, dtypes and bits are equal."""
    for g, w in pair_leaves(got, want):
        g, w = np.asarray(g), np.asarray(w)
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        assert g.tobytes() == w.tobytes()


def assert_close(got: PyTree, want: PyTree, tolerance: float = 1e-6) -> None:
    """Asserts that structures, shapes and dtypes are equal, and values close."""
    for g, w in pair_leaves(got, want):
        assert (np.shape(g), jnp.result_type(g)) == (np.shape(w), jnp.result_type(w))
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def assert_same_objects(got: PyTree, want: PyTree) -> None:
    """Asserts that structures are equal and that the leaves are the same objects."""
    for g, w in pair_leaves(got, want):
        assert g is w


def changed(before: PyTree, after: PyTree) -> list[str]:
    """The names of the leaves whose bits changed."""
    assert leaf_names(before) == leaf_names(after)
    new_leaves = leaves_by_name(after)
    result = []
    for name, leaf in leaves_by_name(before).items():
        if np.asarray(leaf).tobytes() != np.asarray(new_leaves[name]).tobytes():
            result.append(name)
    return result


def normal(*shape: int, seed: int = 0) -> Any:
    """A float32 array of standard normal samples."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def vector(*numbers: float) -> Any:
    return np.array(numbers, np.float32)


@contextlib.contextmanager
def imported(name: str, file: Path) -> Iterator[Any]:
    """Imports a file as a module, and removes it from sys.modules afterwards."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def one_part_per_leaf(count: int) -> tuple[PyTree, list[PyTree]]:
    """A dict of numbers, and its split into one part per number."""
    tree = {key: float(key) for key in range(count)}
    holes = dict.fromkeys(tree, HOLE)
    return tree, [holes | {key: number} for key, number in tree.items()]


# "linear_1" is a prefix of "linear_10", but names a different layer.
LAYERS = {
    "linear_0": {"b": np.zeros(3), "w": np.ones((2, 3))},
    "linear_1": {"b": np.zeros(3), "w": np.ones((3, 3))},
    "linear_10": {"b": np.zeros(5), "w": np.ones((3, 5))},
}

# More leaves than an error message lists.
BLOCKS = {f"block_{i}": {"b": np.zeros(3), "w": np.ones((3, 3))} for i in range(300)}


def mlp(*sizes: int) -> PyTree:
    """The parameters of an MLP, with biases that are not zero."""
    params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        numbers = normal(fan_in + 1, fan_out, seed=i + 1)
        params[f"linear_{i}"] = {
            "b": numbers[0] / 10,
            "w": numbers[1:] / np.float32(fan_in**0.5),
        }
    return params


# A network with 5 classes, and a batch of 4 examples.
PARAMS = mlp(3, 6, 6, 5)
INPUTS = normal(4, 3)
LABELS: Any = np.array([3, 0, 4, 1], np.int32)


# ---------------------------------------- trees of the kinds of nodes that JAX allows


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Identity:
    """A layer without leaves, which looks like a hole but for its name."""


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    """An Equinox-style model: a callable tree with static metadata."""

    w: Any
    b: Any
    name: str = field(default="layer", metadata={"static": True})

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("partition must not take a model for a predicate")


class Node:
    """A container without key paths, with metadata that cannot be hashed."""

    def __init__(self, children: list[Any], note: list[Any]) -> None:
        self.children = children
        self.note = note


class Twins:
    """A container whose children all have the same key."""

    def __init__(self, *children: Any) -> None:
        self.children = children


jax.tree_util.register_pytree_node(
    Node,
    lambda node: (node.children, node.note),
    lambda note, children: Node(list(children), note),
)
jax.tree_util.register_pytree_with_keys(
    Twins,
    lambda twins: ([(GetAttrKey("twin"), child) for child in twins.children], None),
    lambda _, children: Twins(*children),
)


def containers(children: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Containers of every kind. Keys often collide or contain pattern characters."""
    keys = st.text("ab/!*[1\n", max_size=3)
    lists = st.lists(children, max_size=4)
    return st.one_of(
        st.dictionaries(keys, children, max_size=4),
        st.dictionaries(st.integers(0, 12), children, max_size=4),
        st.dictionaries(keys, children, max_size=3).map(collections.OrderedDict),
        lists,
        lists.map(tuple),
        st.builds(Pair, children, children),
        st.builds(Layer, children, children, st.sampled_from(["x", "y"])),
        st.builds(Node, lists, st.sampled_from([[0], [1]])),
    )


LEAVES = st.one_of(
    st.integers(0, 3).map(np.zeros),
    st.integers(0, 2).map(jnp.ones),
    st.integers(0, 3).map(lambda size: jax.ShapeDtypeStruct((size,), jnp.bfloat16)),
    st.sampled_from([0, 1, True, 2.5, 3j, math.nan, "text", np.float64(2), len]),
)
TREES = st.recursive(LEAVES | st.none(), containers, max_leaves=30)
TREES_WITH_HOLES = st.recursive(
    LEAVES | st.none() | st.just(HOLE), containers, max_leaves=30
)


@st.composite
def trees_and_selections(
    draw: DrawFn, trees: SearchStrategy[PyTree] = TREES
) -> tuple[PyTree, set[Any]]:
    """A tree and the paths of some leaves: one or more, unless it has no leaves."""
    tree = draw(trees)
    if not paths(tree):
        return tree, set()
    return tree, draw(st.sets(st.sampled_from(paths(tree)), min_size=1))


def selects(selection: set[Any]) -> Callable[[Any, Any], bool]:
    """The predicate that selects the given paths."""
    return lambda path, leaf: path in selection


# --------------------------------------------------------------------------------- Hole


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Empty:
    """A container without children, like a hole."""


def test_an_empty_container_is_no_hole() -> None:
    tree = {"a": Empty(), "b": 1}
    selected, others = partition("b", tree)
    assert selected == {"a": Empty(), "b": 1}
    assert others == {"a": Empty(), "b": HOLE}
    assert merge(selected, others) == tree


def test_holes_are_equal_hashable_and_immutable() -> None:
    assert Hole() == HOLE
    assert len({Hole(), Hole()}) == 1
    others: list[Any] = [None, (), {}, 0, False]
    assert HOLE not in others
    assert repr(HOLE) == "Hole()"
    hole: Any = HOLE
    with pytest.raises(AttributeError):
        hole.value = 1


def test_hole_is_a_node_without_leaves() -> None:
    assert jax.tree.leaves(HOLE) == []


def double(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: 2 * leaf, tree)


def squares(tree: PyTree) -> Any:
    return jnp.sum(tree["a"] ** 2)


def scan_twice(tree: PyTree) -> PyTree:
    return lax.scan(lambda carry, _: (carry, None), tree, None, length=2)[0]


def pickle_and_unpickle(tree: PyTree) -> PyTree:
    return pickle.loads(pickle.dumps(tree))


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(jax.jit(double), id="jit"),
        pytest.param(jax.grad(squares), id="grad"),
        pytest.param(jax.vmap(double), id="vmap"),
        pytest.param(scan_twice, id="scan"),
        pytest.param(jax.device_put, id="device_put"),
        pytest.param(pickle_and_unpickle, id="pickle"),
    ],
)
def test_holes_survive(transform: Callable[[PyTree], PyTree]) -> None:
    trainable, frozen = partition("a", {"a": jnp.ones(2), "b": jnp.ones(3)})
    result = transform(trainable)
    assert result["b"] == HOLE
    assert leaf_names(merge(result, frozen)) == ["a", "b"]


# ------------------------------------------------------------------- partition and mask


def is_bias(path: Any, leaf: Any) -> bool:
    return bool(path[-1].key == "b")


def is_matrix(path: Any, leaf: Any) -> Any:
    return np.bool_(leaf.ndim == 2)


# Each case gives `where` and the names of the leaves of LAYERS that it selects.
SELECTIONS = [
    pytest.param("linear_0/b", ["linear_0/b"], id="a full name"),
    pytest.param("linear_1", ["linear_1/b", "linear_1/w"], id="a name, not a prefix"),
    pytest.param(
        "*/b", ["linear_0/b", "linear_1/b", "linear_10/b"], id="star is any text"
    ),
    pytest.param(
        "l*w", ["linear_0/w", "linear_1/w", "linear_10/w"], id="star crosses slashes"
    ),
    pytest.param(
        "linear_?/w", ["linear_0/w", "linear_1/w"], id="question mark is one character"
    ),
    pytest.param("linear_[1-3]/b", ["linear_1/b"], id="character class"),
    pytest.param("linear_[!0]/b", ["linear_1/b"], id="negated character class"),
    pytest.param(["linear_0", "!*/b"], ["linear_0/w"], id="last pattern wins"),
    pytest.param(
        ["linear_0", "!linear_0", "linear_0/b"], ["linear_0/b"], id="selected again"
    ),
    pytest.param(
        "!linear_1*", ["linear_0/b", "linear_0/w"], id="exclamation mark first: all but"
    ),
    pytest.param(
        ("!*/w", "linear_0"),
        ["linear_0/b", "linear_0/w", "linear_1/b", "linear_10/b"],
        id="a tuple that starts with an exclusion",
    ),
    pytest.param(
        is_bias, ["linear_0/b", "linear_1/b", "linear_10/b"], id="predicate on paths"
    ),
    pytest.param(
        is_matrix,
        ["linear_0/w", "linear_1/w", "linear_10/w"],
        id="predicate on leaves that returns np.bool_",
    ),
    pytest.param(
        {
            "linear_0": {"b": True, "w": False},
            "linear_1": {"b": np.False_, "w": np.True_},
            "linear_10": {"b": False, "w": False},
        },
        ["linear_0/b", "linear_1/w"],
        id="tree of bools",
    ),
]


@pytest.mark.parametrize(("where", "selected"), SELECTIONS)
def test_partition(where: Any, selected: list[str]) -> None:
    trainable, frozen = partition(where, LAYERS)
    assert leaf_names(trainable) == selected
    assert leaf_names(frozen) == [
        name for name in leaf_names(LAYERS) if name not in selected
    ]
    assert (
        structure_with_holes(trainable)
        == structure_with_holes(frozen)
        == structure_with_holes(LAYERS)
    )
    for name, leaf in (leaves_by_name(trainable) | leaves_by_name(frozen)).items():
        assert leaf is leaves_by_name(LAYERS)[name]


@pytest.mark.parametrize(("where", "selected"), SELECTIONS)
def test_mask(where: Any, selected: list[str]) -> None:
    marks = leaves_by_name(mask(where, LAYERS))
    assert marks == {name: name in selected for name in leaf_names(LAYERS)}
    assert {type(mark) for mark in marks.values()} == {bool}


@pytest.mark.parametrize(
    ("marks", "tree", "parts"),
    [
        pytest.param(
            [True, False], [1, 2], ([1, HOLE], [HOLE, 2]), id="a list, not of patterns"
        ),
        pytest.param(
            Layer(w=True, b=False),
            Layer(w=1, b=2),
            (Layer(w=1, b=HOLE), Layer(w=HOLE, b=2)),
            id="a callable model, not a predicate",
        ),
    ],
)
def test_partition_by_bools(marks: PyTree, tree: PyTree, parts: Any) -> None:
    assert partition(marks, tree) == parts


def test_partition_does_not_mark_holes() -> None:
    _, tree = partition("a", {"a": 1, "b": 2, "c": 3})
    assert mask("b", tree) == {"a": HOLE, "b": True, "c": False}
    assert partition({"a": HOLE, "b": True, "c": False}, tree)[0] == {
        "a": HOLE,
        "b": 2,
        "c": HOLE,
    }


def test_partition_of_tracers() -> None:
    trainable, frozen = jax.jit(lambda tree: partition("a", tree))({"a": 1, "b": 2})
    assert (trainable["b"], frozen["a"]) == (HOLE, HOLE)
    assert (trainable["a"], frozen["b"]) == (1, 2)


def test_partition_of_a_tree_without_leaves_by_predicate() -> None:
    assert partition(is_bias, {"a": None}) == ({"a": None}, {"a": None})


def never(path: Any, leaf: Any) -> bool:
    return False


def returns_none_at_w(path: Any, leaf: Any) -> Any:
    return True if path[-1].key == "b" else None


def returns_text(path: Any, leaf: Any) -> Any:
    return "no"


def returns_one(path: Any, leaf: Any) -> Any:
    return 1


def returns_array(path: Any, leaf: Any) -> Any:
    return np.array(True)


def divides_by_zero(path: Any, leaf: Any) -> bool:
    return bool(1 / 0)


[(FIRST_PATH, _), *_] = jax.tree_util.tree_leaves_with_path(LAYERS)


def all_false() -> PyTree:
    return jax.tree.map(lambda leaf: False, LAYERS)


def one_mark_is_an_integer() -> PyTree:
    return all_false() | {"linear_1": {"b": 1, "w": True}}


@pytest.mark.parametrize("function", [partition, mask])
@pytest.mark.parametrize(
    ("where", "error", "fragments"),
    [
        pytest.param("linear", ValueError, ["'linear'"], id="a mere prefix"),
        pytest.param(
            "inear_0*", ValueError, ["'inear_0*'"], id="anchored at the start"
        ),
        pytest.param("*inear_", ValueError, ["'*inear_'"], id="anchored at the end"),
        pytest.param("LINEAR_1", ValueError, ["'LINEAR_1'"], id="case counts"),
        pytest.param(
            ["linear_1", "*/bias"],
            ValueError,
            ["'*/bias'"],
            id="one of two matches nothing",
        ),
        pytest.param(
            ["linear_1", "!*/bias"], ValueError, ["'!*/bias'"], id="excludes nothing"
        ),
        pytest.param(
            "linear_1/w/0",
            ValueError,
            ["'linear_1/w' is a single leaf (float64 (3, 3))"],
            id="below a leaf",
        ),
        pytest.param("", ValueError, ["pattern '' matches"], id="the empty pattern"),
        pytest.param(
            ["*", "!"], ValueError, ["pattern '!' matches"], id="the empty exclusion"
        ),
        pytest.param([], ValueError, ["an empty list"], id="empty list"),
        pytest.param((), ValueError, ["an empty list"], id="empty tuple"),
        # If nothing is selected, the message lists every leaf, including the last.
        pytest.param(
            ["linear_0", "!*"],
            ValueError,
            ["none of the leaves 'linear_0/b'", "'linear_10/w'"],
            id="everything excluded again",
        ),
        pytest.param(
            never,
            ValueError,
            ["none of the leaves 'linear_0/b'", "'linear_10/w'", f"is {FIRST_PATH}"],
            id="predicate selects nothing",
        ),
        pytest.param(
            all_false(),
            ValueError,
            ["none of the leaves 'linear_0/b'", "'linear_10/w'"],
            id="bools select nothing",
        ),
        pytest.param(
            returns_none_at_w,
            TypeError,
            ["returned NoneType for the leaf 'linear_0/w'"],
            id="predicate returns None",
        ),
        pytest.param(
            returns_text,
            TypeError,
            ["returned str for the leaf 'linear_0/b'"],
            id="predicate returns a string",
        ),
        pytest.param(
            returns_one,
            TypeError,
            ["returned int for the leaf 'linear_0/b'"],
            id="predicate returns an integer",
        ),
        pytest.param(
            returns_array,
            TypeError,
            ["returned ndarray for the leaf 'linear_0/b'"],
            id="predicate returns an array",
        ),
        pytest.param(
            divides_by_zero, ZeroDivisionError, [], id="the predicate's own error"
        ),
        pytest.param(None, TypeError, ["got None"], id="None"),
        pytest.param(
            ["linear_1", 2],
            TypeError,
            ["must be strings, got 2"],
            id="a string and a number",
        ),
        pytest.param(
            one_mark_is_an_integer(),
            TypeError,
            ["got int at 'linear_1/b'"],
            id="a mark that is not a bool",
        ),
        pytest.param(
            {"linear_0": True},
            ValueError,
            ["'linear_10/w' are missing from where", "'linear_0' is missing"],
            id="bools in a different structure",
        ),
        pytest.param(
            {f"layer_{i}": {"w": True, "b": True} for i in range(3)},
            ValueError,
            ["'linear_10/w' are missing from where", "'layer_0/b', 'layer_0/w'"],
            id="as many bools in a different structure",
        ),
    ],
)
def test_partition_rejects(
    function: Any, where: Any, error: type[Exception], fragments: list[str]
) -> None:
    with raises(error, *fragments):
        function(where, LAYERS)


def test_partition_rejects_arguments_in_the_wrong_order() -> None:
    with raises(TypeError, "got ndarray at 'linear_0/b'"):
        partition(LAYERS, "linear_1")
    with raises(TypeError, "got int at 'w'"):
        partition(Layer(1, 2), "w")


def test_partition_rejects_a_pattern_if_there_are_no_leaves() -> None:
    with raises(ValueError, "'*' matches no leaf: the tree has no leaves"):
        partition("*", {"a": None})


def test_partition_lists_the_ten_nearest_names_of_a_typo() -> None:
    tree = {f"block_{i}": {"attention": {"w": i}, "norm": i} for i in range(20)}
    with pytest.raises(ValueError, match=str(len(leaf_names(tree)))) as caught:
        partition(["*", "!blok_7/atention"], tree)
    listed = re.findall(r"block_[\w/]*", str(caught.value))
    assert len(listed) == 10
    assert listed[0] == "block_7/attention/w"
    assert "in all" not in str(caught.value)


def test_partition_rejects_a_predicate_that_returns_a_tracer() -> None:
    def is_positive(path: Any, leaf: Any) -> Any:
        return leaf > 0

    with raises(TypeError, "the predicate must return a bool", "Tracer", "'a'"):
        jax.jit(lambda tree: mask(is_positive, tree))({"a": 1.0})


def assert_split(
    tree: PyTree, selection: set[Any], selected: PyTree, others: PyTree
) -> None:
    """Asserts that each selected leaf is only in `selected`, and others in `others`."""
    assert (
        structure_with_holes(selected)
        == structure_with_holes(others)
        == structure_with_holes(tree)
    )
    path_of = iter(paths(tree))
    for node, first, second in zip(
        leaves_and_holes(tree),
        leaves_and_holes(selected),
        leaves_and_holes(others),
        strict=True,
    ):
        if is_hole(node):
            assert is_hole(first)
            assert is_hole(second)
            continue
        path = next(path_of)
        if path in selection:
            assert first is node
            assert is_hole(second)
        else:
            assert is_hole(first)
            assert second is node


@given(trees_and_selections(TREES_WITH_HOLES))
def test_property_partition_by_predicate(case: tuple[PyTree, set[Any]]) -> None:
    tree, selection = case
    asked = []

    def where(path: Any, leaf: Any) -> bool:
        asked.append((path, leaf))
        return path in selection

    parts = partition(where, tree)
    assert_split(tree, selection, *parts)

    # The predicate sees each leaf once, in tree order, with its path.
    assert [path for path, _ in asked] == paths(tree)
    assert_same_objects([leaf for _, leaf in asked], jax.tree.leaves(tree))


@given(trees_and_selections(TREES_WITH_HOLES))
def test_property_mask_says_what_partition_does(case: tuple[PyTree, set[Any]]) -> None:
    tree, selection = case
    marks = mask(selects(selection), tree)
    assert structure_with_holes(marks) == structure_with_holes(tree)
    assert jax.tree.leaves(marks) == [path in selection for path in paths(tree)]
    if selection:
        assert_split(tree, selection, *partition(marks, tree))


def slow_match(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name or one of its ancestors.

    This is a reference implementation with `re`. Keys contain no "]", so the only
    character class that can occur is "[!b]", from `forms` in trees_and_patterns.
    """
    if pattern == "":
        return False
    special = {"*": ".*", "?": ".", "[!b]": "[^b]"}
    regex = ""
    for token in re.findall(r"\[!b\]|.", pattern, re.DOTALL):
        regex += special.get(token, re.escape(token))
    keys = name.split("/")
    above = ["/".join(keys[:depth]) for depth in range(1, len(keys) + 1)]
    matches = [re.fullmatch(regex, text, re.DOTALL) for text in above]
    return any(matches)


@st.composite
def trees_and_patterns(draw: DrawFn) -> tuple[PyTree, list[str]]:
    """A tree with leaves, and patterns that are made from pieces of its names."""
    tree = draw(TREES.filter(leaf_names))
    patterns = []
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(leaf_names(tree)))
        piece = name[: draw(st.integers(0, len(name)))]
        forms = [piece, piece + "*", "*" + piece[1:], "?" + piece[1:], "[!b]*"]
        exclamation = draw(st.sampled_from(["", "!"]))
        patterns.append(exclamation + draw(st.sampled_from(forms)))
    return tree, patterns


@given(trees_and_patterns())
def test_property_patterns(case: tuple[PyTree, list[str]]) -> None:
    tree, patterns = case
    rules = [(not text.startswith("!"), text.removeprefix("!")) for text in patterns]

    # A leading exclusion starts from everything.
    selected = [patterns[0].startswith("!")] * len(leaf_names(tree))
    matched = [False] * len(patterns)
    for i, name in enumerate(leaf_names(tree)):
        for j, (selecting, pattern) in enumerate(rules):
            if slow_match(pattern, name):
                matched[j] = True
                selected[i] = selecting  # the last match wins

    if not all(matched):
        with raises(ValueError, repr(patterns[matched.index(False)])):
            mask(patterns, tree)
    elif not any(selected):
        with raises(ValueError):
            mask(patterns, tree)
    else:
        assert jax.tree.leaves(mask(patterns, tree)) == selected


# -------------------------------------------------------------------------------- merge


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        pytest.param([{"a": 1, "b": 2}], {"a": 1, "b": 2}, id="one part"),
        pytest.param(
            [{"a": 1, "b": HOLE}, {"a": HOLE, "b": 2}], {"a": 1, "b": 2}, id="two"
        ),
        pytest.param(
            [(HOLE, HOLE, 3), (1, HOLE, HOLE), (HOLE, 2, HOLE)], (1, 2, 3), id="three"
        ),
        pytest.param([[HOLE, None], [1, None]], [1, None], id="None in every part"),
        pytest.param([1, HOLE], 1, id="a tree that is one leaf"),
        pytest.param([{}, {}], {}, id="no leaves"),
        pytest.param(
            [Layer(w=1, b=HOLE), Layer(w=HOLE, b=2)], Layer(w=1, b=2), id="a dataclass"
        ),
    ],
)
def test_merge(parts: list[PyTree], whole: PyTree) -> None:
    assert merge(*parts) == whole
    assert merge(*reversed(parts)) == whole


@pytest.mark.parametrize(
    ("parts", "union"),
    [
        pytest.param(
            [[1, HOLE, HOLE], [HOLE, 2, HOLE]], [1, 2, HOLE], id="two of three"
        ),
        pytest.param([[HOLE, 2]], [HOLE, 2], id="one part"),
        pytest.param([[1, HOLE], [HOLE, 2]], [1, 2], id="nothing missing"),
    ],
)
def test_merge_partial(parts: list[PyTree], union: PyTree) -> None:
    assert merge(*parts, partial=True) == union


def test_merge_many_parts() -> None:
    # More parts than Python allows nested calls.
    tree, parts = one_part_per_leaf(1_100)
    assert merge(*parts) == tree
    assert merge(*reversed(parts)) == tree


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("parts", "fragments", "absent"),
    [
        pytest.param(
            [{"ok": 1, "twice": 2}, {"ok": HOLE, "twice": 3}],
            ["'twice'", "part 0", "part 1"],
            ["'ok'"],
            id="two parts",
        ),
        pytest.param(
            [[1, HOLE], [HOLE, 2], [3, HOLE]],
            ["'0'", "part 0", "part 2"],
            ["'1'", "part 1"],
            id="not in adjacent parts",
        ),
        pytest.param(
            [[1, 2], [1, 2]],
            ["'0'", "'1'", "part 0", "part 1"],
            [],
            id="the same tree twice",
        ),
    ],
)
def test_merge_rejects_an_overlap(
    parts: list[PyTree], fragments: list[str], absent: list[str], partial: bool
) -> None:
    with raises(ValueError, *fragments, absent=absent):
        merge(*parts, partial=partial)


def test_merge_rejects_a_lost_leaf() -> None:
    with raises(ValueError, "'gone'", absent=["'ok'"]):
        merge({"ok": 1, "gone": HOLE})


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("parts", "fragments"),
    [
        pytest.param(
            [{"a": HOLE}, {"b": HOLE}],
            ["'b' is missing from part 0", "'a' is missing from part 1"],
            id="different keys",
        ),
        pytest.param(
            [{"a": HOLE}, {"a": {"w": 1}}],
            ["'a/w' is missing from part 0"],
            id="a hole for a subtree",
        ),
        pytest.param(
            [[1, None], [HOLE, 2]], ["'1' is missing from part 0"], id="None for a leaf"
        ),
        pytest.param(
            [[1], (HOLE,)],
            ["PyTreeDef([*])", "PyTreeDef((*,))"],
            id="a list and a tuple",
        ),
        pytest.param(
            [[20 * [1], [1]], [20 * [HOLE], (HOLE,)]],
            # Each text starts 20 characters before the difference.
            [
                "part 0 has .. *, *, *, *, *, *], [*]])..;",
                "1 has .. *, *, *, *, *, *], (*,)])",
            ],
            id="a difference far from the start",
        ),
        pytest.param(
            [Layer(1, 2, "x"), Layer(HOLE, HOLE, "y")],
            ["Layer[('x',)]", "Layer[('y',)]"],
            id="metadata",
        ),
        pytest.param(
            [Node([1], [0]), Node([HOLE], [7])],
            ["Node[[0]]", "Node[[7]]"],
            id="unhashable",
        ),
        pytest.param(
            [Node([1], [float("nan")]), Node([HOLE], [float("nan")])],
            ["Node[[nan]]"],
            id="nan",
        ),
    ],
)
def test_merge_rejects_different_structures(
    parts: list[PyTree], fragments: list[str], partial: bool
) -> None:
    with raises(ValueError, *fragments):
        merge(*parts, partial=partial)


def test_merge_shows_80_characters_of_each_structure() -> None:
    with pytest.raises(ValueError, match="the structures differ") as caught:
        merge([20 * [1], [1], 30 * [1]], [20 * [HOLE], (HOLE,), 30 * [HOLE]])
    _, first, _, second, _ = str(caught.value).split("..")
    # The 20 characters before the first difference, and 60 from there.
    before = f"{6 * '*, '}*"[-17:] + "], "
    assert first == (before + "[*], [" + 20 * "*, ")[:80]
    assert second == (before + "(*,), [" + 20 * "*, ")[:80]


def test_merge_describes_ten_differences_at_most() -> None:
    with pytest.raises(ValueError, match="the structures differ") as caught:
        merge(*[{f"only_in_{i}": 1} for i in range(11)])
    assert str(caught.value).count("missing from part") == 10


def test_merge_lists_ten_leaves_at_most() -> None:
    with raises(ValueError, "'0', '1',", "'9'", "11 in all", absent=["'10'"]):
        merge([HOLE] * 11)
    with raises(ValueError, "'0', '1',", "'9'", absent=["in all"]):
        merge([HOLE] * 10)


def test_merge_rejects_no_parts() -> None:
    with raises(TypeError, "at least one part"):
        merge()


def test_merge_reports_holes_from_another_copy() -> None:
    ours, _ = partition("a", {"a": 1, "b": 2})
    with imported("copy_of_minifreeze", Path(minifreeze.__file__)) as copy:
        _, theirs = copy.partition("a", {"a": 1, "b": 2})
    with raises(ValueError, "copy_of_minifreeze"):
        merge(ours, theirs)


def test_merge_keeps_containers_that_look_like_holes() -> None:
    layers = [Identity(), 1, 2]
    assert merge(*partition("1", layers)) == layers


@given(st.data(), TREES_WITH_HOLES)
def test_property_merge_inverts_partition(data: DataObject, tree: PyTree) -> None:
    parts, rest = [], tree
    for _ in range(data.draw(st.integers(1, 3), label="number of splits")):
        selection: set[Any] = set()
        if paths(rest):  # partition rejects an empty selection from a tree with leaves
            selections = st.sets(st.sampled_from(paths(rest)), min_size=1)
            selection = data.draw(selections, label="selection")
        selected, rest = partition(selects(selection), rest)
        parts.append(selected)
    shuffled = data.draw(st.permutations([*parts, rest]), label="order")

    # Holes in the original tree stay holes.
    assert_same_objects(merge(*shuffled, partial=True), tree)
    if not any(is_hole(node) for node in leaves_and_holes(tree)):
        assert_same_objects(merge(*shuffled), tree)

    # Any two parts may be merged first.
    merged = merge(*shuffled[:2], partial=True)
    assert_same_objects(merge(merged, *shuffled[2:], partial=True), tree)


@given(st.data(), trees_and_selections(TREES.filter(paths)))
def test_property_merge_rejects_one_wrong_leaf(
    data: DataObject, case: tuple[PyTree, set[Any]]
) -> None:
    """Exactly one leaf is missing or duplicated."""
    tree, selection = case
    parts = partition(selects(selection), tree)
    index = data.draw(st.integers(0, len(paths(tree)) - 1), label="index")
    is_lost = data.draw(st.booleans(), label="is_lost")
    replacement = HOLE if is_lost else jax.tree.leaves(tree)[index]
    broken = []
    for part in parts:
        part_nodes = leaves_and_holes(part)
        part_nodes[index] = replacement
        broken.append(jax.tree.unflatten(structure_with_holes(tree), part_nodes))
    problem = "missing" if is_lost else "several parts"
    with raises(ValueError, repr(leaf_names(tree)[index]), problem):
        merge(*broken)


# ------------------------------------------------------------------------------ summary


class Activation:
    """Not an array: it has a shape, but no dtype."""

    shape = (2,)


def test_summary() -> None:
    tree = {"b": 1.0, "f": Activation(), "w": jnp.ones((2, 3), jnp.bfloat16)}
    selected, others = partition(["w", "f"], tree)
    assert summary(selected=selected, others=others).splitlines() == [
        "path  shape   dtype       count  part",
        "b     ()      float32     1      others",
        "f     -       Activation  0      selected",
        "w     (2, 3)  bfloat16    6      selected",
        "",
        "part      count  bytes  share",
        "selected  6      12     85.7%",
        "others    1      4      14.3%",
        "total     7      16     100.0%",
    ]


@pytest.mark.parametrize(
    ("leaf", "row", "size"),
    [
        pytest.param(np.zeros((2, 3), np.int8), "(2, 3) int8 6", 6, id="NumPy"),
        pytest.param(np.float64(1), "() float64 1", 8, id="a NumPy number"),
        pytest.param(2.5, "() float32 1", 4, id="a Python number"),
        pytest.param(True, "() bool 1", 1, id="a Python bool"),
        pytest.param(np.zeros((0, 4)), "(0, 4) float64 0", 0, id="no elements"),
        pytest.param(
            jax.ShapeDtypeStruct((np.int64(5),), jnp.bfloat16),
            "(5,) bfloat16 5",
            10,
            id="an abstract array",
        ),
        pytest.param(
            jax.ShapeDtypeStruct((2**33, 2**33), jnp.int8),
            f"(8589934592, 8589934592) int8 {2**66}",
            2**66,
            id="a count above 64 bits",
        ),
        pytest.param("text", "- str 0", 0, id="text"),
        pytest.param(np.float32, "- type 0", 0, id="a class"),
    ],
)
def test_summary_row(leaf: Any, row: str, size: int) -> None:
    lines = summary(part={"leaf": leaf}).splitlines()
    assert " ".join(lines[1].split()) == f"leaf {row} part"
    _, _, total_size, _ = lines[-1].split()
    assert total_size == str(size)


def test_summary_counts_a_key_array_once_per_key() -> None:
    lines = summary(keys=jax.random.split(jax.random.key(0), 3)).splitlines()
    assert lines[-1].split() == ["total", "3", "24", "100.0%"]  # 2 uint32 per key


def test_summary_of_a_single_element() -> None:
    assert summary(x=[1.0]).splitlines()[-2].split() == ["x", "1", "4", "100.0%"]


def test_summary_leaves_out_a_leaf_that_no_part_holds() -> None:
    lines = summary(part={"a": HOLE, "b": 1.0}).splitlines()
    assert lines[1].split() == ["b", "()", "float32", "1", "part"]


def test_summary_of_holes_alone() -> None:
    assert summary(part=[HOLE]).splitlines()[-1].split() == ["total", "0", "0", "0.0%"]


def test_summary_of_many_parts() -> None:
    _, parts = one_part_per_leaf(300)
    labelled = {f"part_{i}": part for i, part in enumerate(parts)}
    _, *rows = summary(**labelled).splitlines()
    assert rows[299].split() == ["299", "()", "float32", "1", "part_299"]
    assert rows[-1].split() == ["total", "300", "1200", "100.0%"]


def test_summary_of_abstract_arrays_and_tracers() -> None:
    texts = []

    def summarize(head: PyTree, body: PyTree) -> tuple[PyTree, PyTree]:
        texts.append(summary(head=head, body=body))
        return head, body

    head = {"b": HOLE, "w": jnp.ones((2, 3), jnp.bfloat16)}
    body = {"b": np.ones(2, np.float32), "w": HOLE}
    abstract_head, abstract_body = jax.eval_shape(summarize, head, body)
    texts.append(summary(head=abstract_head, body=abstract_body))
    for text in texts:
        assert text.splitlines() == [
            "path  shape   dtype     count  part",
            "b     (2,)    float32   2      body",
            "w     (2, 3)  bfloat16  6      head",
            "",
            "part   count  bytes  share",
            "head   6      12     75.0%",
            "body   2      8      25.0%",
            "total  8      20     100.0%",
        ]


@pytest.mark.parametrize(
    ("parts", "error", "fragments"),
    [
        pytest.param({}, TypeError, ["at least one part"], id="no part"),
        pytest.param(
            {"total": [1]}, ValueError, ["called 'total'"], id="a part called total"
        ),
        pytest.param(
            {"one": [1, 2], "two": [HOLE, 3]},
            ValueError,
            ["'1' is in one, two"],
            id="an overlap",
        ),
        pytest.param(
            {"one": {"x": 1}, "two": {"y": 2}},
            ValueError,
            ["'y' is missing from one", "'x' is missing from two"],
            id="different keys",
        ),
        pytest.param(
            {"one": [1], "two": (HOLE,)},
            ValueError,
            ["one has ..PyTreeDef([*])"],
            id="a list and a tuple",
        ),
        pytest.param(
            {"one": BLOCKS, "two": BLOCKS},
            ValueError,
            ["600 in all"],
            id="600 overlaps",
        ),
    ],
)
def test_summary_rejects(
    parts: dict[str, PyTree], error: type[Exception], fragments: list[str]
) -> None:
    with raises(error, *fragments):
        summary(**parts)


def test_summary_of_an_overlap_does_not_ask_for_missing_leaves() -> None:
    with raises(ValueError, "'0' is in one, two", absent=["'1'", "missing"]):
        summary(one=[1, HOLE], two=[2, HOLE])


@given(trees_and_selections())
def test_property_summary_counts_as_numpy_does(case: tuple[PyTree, set[Any]]) -> None:
    tree, selection = case
    selected, others = partition(selects(selection), tree)
    lines = summary(selected=selected, others=others).splitlines()
    counts = {"selected": 0, "others": 0, "total": 0}
    sizes = {"selected": 0, "others": 0, "total": 0}
    for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True):
        if callable(leaf) or isinstance(leaf, str):
            continue
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        array = np.zeros(np.shape(leaf), dtype)
        part = "selected" if path in selection else "others"
        for label in (part, "total"):
            counts[label] += array.size
            sizes[label] += array.nbytes
    for line in lines[-3:]:
        label, count, size, _ = line.split()
        assert (int(count), int(size)) == (counts[label], sizes[label])


# --------------------------------------------------------------------------- warm_start


class Adam(NamedTuple):
    """An optax-style optimizer state: a count and one tree per moment."""

    count: Any
    mu: Any
    nu: Any


class Schedule(NamedTuple):
    count: Any


def adam(count: int, moments: PyTree) -> Adam:
    return Adam(np.int32(count), mu=moments, nu=jax.tree.map(np.square, moments))


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        pytest.param({"a": 0, "b": 0}, {"a": 7, "b": 8}, {"a": 7, "b": 8}, id="all"),
        pytest.param(
            [0, 0], {"0": 7, "1": 8}, [7, 8], id="old list, restored as a dict"
        ),
        # JAX sorts the keys as strings: "0", "1", "10", "11", "2", ...
        pytest.param(
            [0] * 12,
            {str(i): 100 + i for i in range(12)},
            list(range(100, 112)),
            id="old list of twelve, restored as a dict",
        ),
        # The fields are in the order w, b, and the keys in the order b, w.
        pytest.param(
            Layer(w=0, b=0), {"w": 7, "b": 8}, Layer(w=7, b=8), id="fields, not sorted"
        ),
        pytest.param(
            {"linear_0": {"w": 0, "b": 0}},
            {"linear_0/w": 7, "linear_0/b": 8},
            {"linear_0": {"w": 7, "b": 8}},
            id="a flat checkpoint",
        ),
        pytest.param(
            {"linear_0/w": 0},
            {"linear_0": {"w": 7}},
            {"linear_0/w": 7},
            id="a flat model",
        ),
        pytest.param(
            {"a": 0, "b": 0}, {"a": 7, "b": HOLE}, {"a": 7, "b": 0}, id="unfreeze"
        ),
        pytest.param(
            {"a": 0, "b": HOLE},
            {"a": 7, "b": 8},
            {"a": 7, "b": HOLE},
            id="freeze again",
        ),
        pytest.param([HOLE, 0], [7, HOLE], [HOLE, 0], id="nothing in common"),
        pytest.param(
            {"f": len, "t": float},
            {"f": abs, "t": HOLE},
            {"f": abs, "t": float},
            id="no arrays",
        ),
        pytest.param({}, {}, {}, id="no leaves"),
    ],
)
def test_warm_start(new: PyTree, old: PyTree, expected: PyTree) -> None:
    assert warm_start(new, old) == expected


@pytest.mark.parametrize(
    ("fresh", "expected"),
    [
        pytest.param("head", {"body": 7, "head": 0}, id="a pattern"),
        pytest.param(["head", "*"], {"body": 1, "head": 0}, id="patterns"),
        pytest.param({"body": False, "head": True}, {"body": 7, "head": 0}, id="bools"),
        pytest.param(
            lambda path, leaf: leaf == 0, {"body": 7, "head": 0}, id="predicate"
        ),
        pytest.param((), {"body": 7, "head": 8}, id="nothing"),
        pytest.param([], {"body": 7, "head": 8}, id="the empty list"),
        pytest.param(
            never, {"body": 7, "head": 8}, id="a predicate that selects nothing"
        ),
    ],
)
def test_warm_start_fresh_leaves_keep_their_value(fresh: Any, expected: PyTree) -> None:
    new, old = {"body": 1, "head": 0}, {"body": 7, "head": 8}
    assert warm_start(new, old, fresh=fresh) == expected


def test_warm_start_fresh_leaves_need_not_be_in_old() -> None:
    new = {"body": 1, "head": 0}
    assert warm_start(new, {"body": 7}, fresh="head") == {"body": 7, "head": 0}


def test_warm_start_fresh_leaf_of_a_different_shape() -> None:
    new = {"body": vector(0), "head": np.zeros((3, 10))}
    old = {"body": vector(5), "head": np.ones((3, 1000))}
    result = warm_start(new, old, fresh="head")
    assert result["body"] is old["body"]
    assert result["head"] is new["head"]


@pytest.mark.parametrize(
    "unused",
    [
        pytest.param("decoder", id="a pattern"),
        pytest.param({"encoder": False, "decoder": True}, id="bools"),
    ],
)
def test_warm_start_unused_leaves_of_old(unused: Any) -> None:
    old = {"encoder": 7, "decoder": 8}
    assert warm_start({"encoder": 0}, old, unused=unused) == {"encoder": 7}


def test_warm_start_matches_by_name_not_by_path() -> None:
    new = {"a/b": {"c": 0}}
    assert warm_start(new, {"a": {"b/c": 7}}) == {"a/b": {"c": 7}}


def test_warm_start_keeps_the_moments_when_a_layer_is_unfrozen() -> None:
    old = adam(3, {"body": HOLE, "head": vector(5)})
    new = adam(0, {"body": vector(0), "head": vector(0)})
    result = warm_start(new, old)
    assert_identical(result, adam(3, {"body": vector(0), "head": vector(5)}))


def test_warm_start_with_a_fresh_count() -> None:
    old, new = adam(3, {"w": vector(5)}), adam(0, {"w": vector(0)})
    result = warm_start(new, old, fresh="count")
    assert_identical(result, adam(0, {"w": vector(5)}))


def test_warm_start_of_an_optimizer_from_its_restored_dict() -> None:
    old = {"0": {"count": np.int32(3), "mu": {"w": vector(5)}, "nu": {"w": vector(25)}}}
    result = warm_start((adam(0, {"w": vector(0)}),), old)
    assert_identical(result, (adam(3, {"w": vector(5)}),))


# Removing the first transformation of a chain shifts the index of Adam's state.
NO_STATE_OF_CLIP = ()
OLD_ADAM, OLD_SCHEDULE = adam(3, {"w": vector(5)}), Schedule(np.int32(50))
CLIPPED_CHAIN = (NO_STATE_OF_CLIP, OLD_ADAM, OLD_SCHEDULE)
SHORTER_CHAIN = (adam(0, {"w": vector(0)}), Schedule(np.int32(0)))


def test_warm_start_of_a_shorter_chain() -> None:
    """The remedy: drop the state of clip from old, too."""
    result = warm_start(SHORTER_CHAIN, (OLD_ADAM, OLD_SCHEDULE))
    assert_identical(result, (OLD_ADAM, OLD_SCHEDULE))


DEEP = {f"layer_{i}": np.ones(2) for i in range(16)}
SHALLOW = {f"layer_{i}": np.ones(2) for i in range(12)}


@pytest.mark.parametrize(
    ("new", "old", "fragments"),
    [
        pytest.param(
            {"a": 0},
            {"b": 7},
            ["no value for 'a'", "no place for 'b'"],
            id="no name in common",
        ),
        pytest.param(
            {"a": 0, "b": 0}, {"a": 7}, ["no value for 'b'"], id="a leaf that old lacks"
        ),
        pytest.param(
            {"a": 0}, {"a": 7, "b": 8}, ["no place for 'b'"], id="a leaf that new lacks"
        ),
        pytest.param(
            {"w": np.ones(2)},
            {"w": np.ones(3)},
            ["'w' is float64 (2,) in new and float64 (3,) in old"],
            id="a different shape",
        ),
        pytest.param(
            {"w": np.ones(2, np.float32)},
            {"w": np.ones(2, np.float16)},
            ["'w' is float32 (2,) in new and float16 (2,) in old"],
            id="a different dtype",
        ),
        pytest.param(
            {"f": len},
            {"f": "text"},
            ["'f' is builtin_function_or_method - in new and str - in old"],
            id="a different type",
        ),
        pytest.param(
            {"body": 0, "norm": 0},
            {"trunk": 7, "norm": 8},
            ["no value for 'body'", "no place for 'trunk'"],
            id="a renamed body that shares one leaf",
        ),
        pytest.param(
            DEEP,
            SHALLOW,
            ["no value for 'layer_12'", "'layer_15'"],
            id="old has 12 of 16 layers",
        ),
        pytest.param(
            SHALLOW,
            DEEP,
            ["no place for 'layer_12'", "'layer_15'"],
            id="old has 4 layers too many",
        ),
        pytest.param(
            SHORTER_CHAIN,
            CLIPPED_CHAIN,
            ["no value for '0/count', '0/mu/w'", "no place for '1/mu/w'", "'2/count'"],
            id="a chain whose indices have shifted",
        ),
        pytest.param(
            {"kernel": 0},
            {"kernel": {"value": 7}},
            ["no value for 'kernel'", "no place for 'kernel/value'"],
            id="boxed",
        ),
        pytest.param(
            {"a": 0, "b": 0},
            {"a": 7, "b": None},
            ["no value for 'b'", "old contains None"],
            id="None for a hole",
        ),
        pytest.param(
            {"x": 0},
            {"x": 1, "y": Twins(1, 2)},
            ["two leaves of old have the name 'y/twin'"],
            id="twins in old",
        ),
        pytest.param(
            {"a/b": 0, "a": {"b": 0}},
            {"a/b": 1},
            ["two leaves of new have the name 'a/b'"],
            id="one name twice in new",
        ),
    ],
)
def test_warm_start_rejects(new: PyTree, old: PyTree, fragments: list[str]) -> None:
    mentions_none = any("None" in fragment for fragment in fragments)
    with raises(ValueError, *fragments, absent=[] if mentions_none else ["None"]):
        warm_start(new, old)


def test_warm_start_takes_its_options_by_name() -> None:
    function: Any = warm_start
    with pytest.raises(TypeError):
        function({"a": 0}, {"a": 7}, "a")


def test_warm_start_lists_ten_leaves_of_each_tree_at_most() -> None:
    with pytest.raises(ValueError, match="600 in all") as caught:
        warm_start(BLOCKS, {"params": BLOCKS})
    assert len(re.findall(r"'block_", str(caught.value))) == 10
    assert len(re.findall(r"'params/block_", str(caught.value))) == 10


@pytest.mark.parametrize(
    ("options", "error", "fragments"),
    [
        pytest.param(
            {"fresh": "haed"},
            ValueError,
            ["fresh: pattern 'haed'", "'head'"],
            id="a typo in fresh",
        ),
        pytest.param(
            {"unused": "x"},
            ValueError,
            ["unused: pattern 'x'", "'body'"],
            id="a typo in unused",
        ),
        pytest.param(
            {"fresh": ["head", "x"]},
            ValueError,
            ["pattern 'x' matches none"],
            id="one of two patterns",
        ),
        pytest.param(
            {"fresh": returns_text},
            TypeError,
            ["returned str for the leaf 'body'"],
            id="predicate returns a string",
        ),
        pytest.param({"fresh": None}, TypeError, ["fresh: ", "got None"], id="None"),
    ],
)
def test_warm_start_rejects_options(
    options: dict[str, Any], error: type[Exception], fragments: list[str]
) -> None:
    tree = {"body": 1, "head": 2}
    with raises(error, *fragments):
        warm_start(tree, tree, **options)


def flat_dict(nodes: dict[str, Any]) -> PyTree:
    """A dict with keys such as "layer_0/w", in the given order."""
    return collections.OrderedDict(nodes)


def nested_dict(nodes: dict[str, Any]) -> PyTree:
    """A dict of dicts, in the given order."""
    tree = collections.OrderedDict()
    for name, node in nodes.items():
        layer, key = name.split("/")
        tree[layer] = {key: node}
    return tree


class LeafPlan(NamedTuple):
    """What `new` and `old` hold under one name."""

    in_new: str  # "leaf", "hole" or "nothing"
    in_old: str
    is_fresh: bool
    is_unused: bool


NODE_KINDS = st.sampled_from(["leaf", "leaf", "hole", "nothing"])
PLANS = st.builds(LeafPlan, NODE_KINDS, NODE_KINDS, st.booleans(), st.booleans())


@settings(max_examples=examples(4))
@given(
    st.lists(PLANS, max_size=6).flatmap(
        lambda plans: st.permutations(list(enumerate(plans)))
    ),
    st.sampled_from([flat_dict, nested_dict]),
    st.sampled_from([flat_dict, nested_dict]),
)
def test_property_warm_start(
    plans: list[tuple[int, LeafPlan]], make_new: Any, make_old: Any
) -> None:
    """New has the names in order, and old in the order of the plans."""
    old, new, expected = {}, {}, {}
    fresh, unused, unmatched = [], [], []
    for i, plan in plans:
        name = f"layer_{i}/w"
        if plan.in_new != "nothing":
            new[name] = i if plan.in_new == "leaf" else HOLE
        if plan.in_old != "nothing":
            old[name] = 100 + i if plan.in_old == "leaf" else HOLE
        if plan.in_new == "leaf" and plan.is_fresh:
            fresh.append(name)
        if plan.in_old == "leaf" and plan.is_unused:
            unused.append(name)

        if plan.in_new == "leaf" and plan.in_old == "nothing" and not plan.is_fresh:
            unmatched.append(name)
        if plan.in_old == "leaf" and plan.in_new == "nothing" and not plan.is_unused:
            unmatched.append(name)
        if plan.in_new == plan.in_old == "leaf" and not plan.is_fresh:
            expected[name] = old[name]
        elif name in new:
            expected[name] = new[name]

    new, expected = dict(sorted(new.items())), dict(sorted(expected.items()))
    old_tree, new_tree = make_old(old), make_new(new)
    if unmatched:
        with pytest.raises(ValueError, match="'") as caught:
            warm_start(new_tree, old_tree, fresh=fresh, unused=unused)
        listed = re.findall(r"'(layer_\d/w)'", str(caught.value))
        assert sorted(listed) == sorted(unmatched)
    else:
        result = warm_start(new_tree, old_tree, fresh=fresh, unused=unused)
        assert result == make_new(expected)


# -------------------------------------------------------------------------------- hoist
#
# In the examples, `t` is the trainable part, `f` the frozen part and `x` the batch.
# hoist needs only their shapes and dtypes. The rules, and the tests that cover them:
#
# - Early values depend on the batch, but not on `t`. Only they are kept:
#   test_hoist_keeps_the_features_of_a_frozen_body.
# - Late values depend on `t`, or on an effect. `rest` computes them:
#   test_hoist_keeps_the_product_before_a_trainable_bias, and the section "effects".
# - Cheap operations on early values may be repeated in `rest`, others never are:
#   test_hoist_rebuilds and test_hoist_does_not_rebuild.
# - hoist warns if `once` has no costly operation except reductions:
#   the section "warnings".
# - Among all sufficient sets, the one with the fewest bytes is kept:
#   test_hoist_keeps_the_fewest_bytes.
# - Ties go to the latest values: test_hoist_breaks_ties_in_favor_of_the_latest_value.
# - Weights, and values made from weights alone, are never kept:
#   test_hoist_keeps_no_weights.


def abstract(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


HEAD, BODY, BATCH = abstract(6), abstract(4, 6), abstract(8, 4)


def hoist_quietly(*args: Any) -> Any:
    """Calls hoist, ignoring its warning that it hoists nothing costly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "hoist", UserWarning)
        return hoist(*args)


def kept_arrays(
    fn: Callable[..., Any], t: PyTree, f: PyTree, *batch: PyTree
) -> list[str]:
    """The arrays that `once` keeps, such as ``["float32[8, 6]"]``, sorted.

    Asserts that `rest` returns the shapes and dtypes of `fn`.
    """
    once, rest = hoist_quietly(fn, t, f, *batch)
    kept = jax.eval_shape(once, f, *batch)
    assert jax.eval_shape(rest, t, f, kept) == jax.eval_shape(fn, t, f, *batch)
    return sorted(describe(leaf) for leaf in kept)


def describe(leaf: Any) -> str:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    dtype = "key" if is_key else leaf.dtype.name
    # Omit axes of length one: where they appear depends on the JAX version.
    shape = [size for size in leaf.shape if size != 1]
    return f"{dtype}{shape}"


def programs(
    fn: Callable[..., Any], t: PyTree, f: PyTree, *batch: PyTree
) -> tuple[str, str]:
    """The programs of `once` and `rest`, as text."""
    once, rest = hoist_quietly(fn, t, f, *batch)
    kept = jax.eval_shape(once, f, *batch)
    return str(jax.make_jaxpr(once)(f, *batch)), str(jax.make_jaxpr(rest)(t, f, kept))


def gradient_and_outputs(fn: Callable[..., Any], t: PyTree, *others: PyTree) -> PyTree:
    """The gradient of a weighted sum of the outputs of `fn`, and the outputs."""

    def weighted_sum(t: PyTree) -> Any:
        outputs = fn(t, *others)
        # Weight each output, so that swapping two of them changes the gradient.
        terms = [
            i * jnp.sum(y) for i, y in enumerate(jax.tree.leaves(outputs), start=1)
        ]
        return sum(terms), outputs

    return jax.grad(weighted_sum, has_aux=True)(t)


def assert_hoist_preserves_values(
    fn: Callable[..., Any], t: PyTree, f: PyTree, *batch: PyTree
) -> None:
    """`rest` after `once` equals `fn`, in value and gradient."""
    once, rest = hoist_quietly(fn, t, f, *batch)
    leaves, treedef = jax.tree.flatten((t, f, batch))
    arrays = [normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    t, f, batch = jax.device_put(jax.tree.unflatten(treedef, arrays))

    def hoisted(t: PyTree, f: PyTree, *batch: PyTree) -> PyTree:
        return rest(t, f, once(f, *batch))

    got = jax.jit(lambda *args: gradient_and_outputs(hoisted, *args))(t, f, *batch)
    want = jax.jit(lambda *args: gradient_and_outputs(fn, *args))(t, f, *batch)
    assert_close(got, want, 1e-5)


def sharding_of_rows(devices: int) -> Any:
    """The sharding that divides the first axis over the first `devices` CPU devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:devices]), ("rows",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))


def sorted_arrays(arrays: Any) -> list[Any]:
    """The arrays, sorted by value."""
    return sorted(map(np.asarray, arrays), key=lambda leaf: leaf.tolist())


# ................................................................ which values are kept


def test_hoist_keeps_the_features_of_a_frozen_body() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return jnp.tanh(x @ f) @ t

    assert kept_arrays(fn, HEAD, BODY, BATCH) == ["float32[8, 6]"]
    assert_hoist_preserves_values(fn, HEAD, BODY, BATCH)


def test_hoist_keeps_the_product_before_a_trainable_bias() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return jnp.tanh(x @ f + t)

    assert kept_arrays(fn, HEAD, BODY, BATCH) == ["float32[8, 6]"]
    in_once, in_rest = programs(fn, HEAD, BODY, BATCH)
    assert "dot_general" in in_once
    assert "dot_general" not in in_rest
    assert "tanh" in in_rest


def test_hoist_breaks_ties_in_favor_of_the_latest_value() -> None:
    # x @ f, its tanh and the sine of the tanh have the same size.
    def fn(t: Any, f: Any, x: Any) -> Any:
        return jnp.sin(jnp.tanh(x @ f)) @ t

    assert kept_arrays(fn, HEAD, BODY, BATCH) == ["float32[8, 6]"]
    in_once, in_rest = programs(fn, HEAD, BODY, BATCH)
    assert "sin" in in_once
    assert "tanh" not in in_rest
    assert "sin" not in in_rest


def test_hoist_keeps_one_byte_from_which_two_outputs_are_rebuilt() -> None:
    # The flow from the first output fills the largest value, and the flow from the
    # second one must be able to push it back.
    def fn(t: Any, f: Any, x: Any) -> Any:
        largest = x.max()
        return largest + jnp.uint8(1), t * largest.astype(jnp.float32)

    args = [abstract(), None, abstract(8, dtype="uint8")]
    assert kept_arrays(fn, *args) == ["uint8[]"]
    in_once, in_rest = programs(fn, *args)
    assert "add" in in_rest
    assert "add" not in in_once


def test_hoist_pushes_back_no_flow_that_was_not_sent() -> None:
    # The total and the largest of x must be stored, although the largest of y, from
    # which the total is computed, is just as small.
    def fn(t: Any, f: Any, x: Any, y: Any) -> Any:
        largest = x.max()
        total = largest.astype(jnp.int16) + y.max().astype(jnp.int16)
        return total.astype(jnp.uint8), t * largest.astype(jnp.float32)

    xs, ys = abstract(8, dtype="uint8"), abstract(8, dtype="int8")
    assert kept_arrays(fn, abstract(), None, xs, ys) == ["uint8[]", "uint8[]"]


def wide_copy(t: Any, f: Any, x: Any) -> Any:
    return (x @ f).astype(jnp.float32) @ t


def narrow_copy(t: Any, f: Any, x: Any) -> Any:
    return (x @ f).astype(jnp.bfloat16) @ t


def normalized_images(t: Any, f: Any, x: Any) -> Any:
    return ((x / 255 - f["mean"]) / f["deviation"]) @ t


def fewer_but_wider(t: Any, f: Any, x: Any) -> Any:
    return x.astype(jnp.float32)[:, :4] @ t


def fewer_and_equally_wide(t: Any, f: Any, x: Any) -> Any:
    return x[:, :3] @ t


def two_children(t: Any, f: Any, x: Any) -> Any:
    z = x @ f
    return jnp.sin(z) @ t + jnp.cos(z) @ t


def two_parents(t: Any, f: Any, x: Any) -> Any:
    return (x @ f[0] + x @ f[1]) @ t


def layer_norm(z: Any) -> Any:
    centered = z - z.mean(axis=1, keepdims=True)
    variance = jnp.square(centered).mean(axis=1, keepdims=True)
    return centered * lax.rsqrt(variance + 1e-5)


def frozen_norm(t: Any, f: Any, x: Any) -> Any:
    return (layer_norm(x @ f["w"]) * f["scale"]) @ t


def trainable_norm_and_residual(t: Any, f: Any, x: Any) -> Any:
    z = x @ f
    return z @ t + (layer_norm(z) * t) @ t


def embeddings(t: Any, f: Any, ids: Any) -> Any:
    return f[ids] @ t


def embeddings_from_int8(t: Any, f: Any, ids: Any) -> Any:
    return (f["int8"].astype(jnp.float32) * f["scale"])[ids] @ t


def one_hot_labels(t: Any, f: Any, x: Any, y: Any) -> Any:
    return jnp.sum(jax.nn.one_hot(y, 10) * (x @ f @ t))


def dropout(t: Any, f: Any, x: Any, key: Any) -> Any:
    return jnp.where(jax.random.bernoulli(key, 0.5, (8, 60)), x @ t, 0)


def differences_of_all_pairs(t: Any, f: Any, x: Any) -> Any:
    return t * (x[:, None] - x[None, :]) ** 2


IDS = abstract(8, dtype="int32")


# Each case gives a function, its arguments and the arrays that hoist keeps.
@pytest.mark.parametrize(
    ("fn", "args", "kept"),
    [
        pytest.param(
            wide_copy,
            [HEAD, abstract(4, 6, dtype="bfloat16"), abstract(8, 4, dtype="bfloat16")],
            ["bfloat16[8, 6]"],
            id="bfloat16 features, not their float32 copy",
        ),
        pytest.param(
            narrow_copy,
            [abstract(6, dtype="bfloat16"), BODY, BATCH],
            ["bfloat16[8, 6]"],
            id="the bfloat16 copy of float32 features",
        ),
        pytest.param(
            normalized_images,
            [
                HEAD,
                {"mean": abstract(6), "deviation": abstract(6)},
                abstract(8, 6, dtype="uint8"),
            ],
            ["uint8[8, 6]"],
            id="uint8 images, not normalized ones",
        ),
        pytest.param(
            fewer_but_wider,
            [abstract(4), None, abstract(8, 6, dtype="uint8")],
            ["uint8[8, 6]"],
            id="48 elements of 1 byte, not 32 elements of 4 bytes",
        ),
        pytest.param(
            fewer_and_equally_wide,
            [abstract(3), None, BATCH],
            ["float32[8, 3]"],
            id="24 elements of 4 bytes, not 32 elements of 4 bytes",
        ),
        pytest.param(
            two_children,
            [HEAD, BODY, BATCH],
            ["float32[8, 6]"],
            id="one value, not its two children",
        ),
        pytest.param(
            two_parents,
            [HEAD, [BODY, BODY], BATCH],
            ["float32[8, 6]"],
            id="one value, not its two parents",
        ),
        pytest.param(
            frozen_norm,
            [HEAD, {"w": BODY, "scale": abstract(6)}, BATCH],
            ["float32[8, 6]"],
            id="the result of a frozen norm",
        ),
        # As in the first trainable block of a pre-norm transformer. The norm is
        # rebuilt from z, the mean of each row and the variance of each row.
        pytest.param(
            trainable_norm_and_residual,
            [HEAD, BODY, BATCH],
            ["float32[8, 6]", "float32[8]", "float32[8]"],
            id="a residual and its statistics, not its norm",
        ),
        pytest.param(
            embeddings,
            [HEAD, abstract(50, 6), IDS],
            ["int32[8]"],
            id="ids, not embeddings",
        ),
        pytest.param(
            embeddings_from_int8,
            [HEAD, {"int8": abstract(50, 6, dtype="int8"), "scale": abstract(6)}, IDS],
            ["int32[8]"],
            id="ids, not embeddings from a table that is cheap to make",
        ),
        pytest.param(
            one_hot_labels,
            [abstract(6, 10), BODY, BATCH, IDS],
            ["float32[8, 6]", "int32[8]"],
            id="labels, not one-hot rows",
        ),
        # The key goes in as uint32[2] and is kept as key[]. Both have the same size,
        # and ties go to the latest value.
        pytest.param(
            dropout,
            [abstract(4, 60), None, BATCH, abstract(2, dtype="uint32")],
            ["float32[8, 4]", "key[]"],
            id="a key, not a dropout mask",
        ),
        pytest.param(
            differences_of_all_pairs,
            [abstract(), None, BATCH],
            ["float32[8, 4]"],
            id="the batch, not the differences of all pairs",
        ),
    ],
)
def test_hoist_keeps_the_fewest_bytes(
    fn: Any, args: list[Any], kept: list[str]
) -> None:
    assert kept_arrays(fn, *args) == kept


def test_hoist_keeps_embeddings_if_the_table_is_costly_to_make() -> None:
    def fn(t: Any, f: Any, ids: Any) -> Any:
        table = f["table"] @ f["projection"]
        return table[ids] @ t

    frozen = {"table": abstract(50, 4), "projection": BODY}
    assert kept_arrays(fn, HEAD, frozen, IDS) == ["float32[8, 6]"]


def test_hoist_keeps_embeddings_if_the_table_is_made_from_a_costly_one() -> None:
    def fn(t: Any, f: Any, ids: Any) -> Any:
        table = jnp.sin(f["table"] @ f["projection"])
        return table[ids] @ t

    frozen = {"table": abstract(50, 4), "projection": BODY}
    assert kept_arrays(fn, HEAD, frozen, IDS) == ["float32[8, 6]"]


def test_hoist_keeps_a_product_that_is_larger_than_the_batch() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return t * (x @ x.T)

    assert kept_arrays(fn, abstract(), None, BATCH) == ["float32[8, 8]"]


def test_hoist_keeps_no_weights() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return (x @ f) @ t @ (f.T @ f)

    assert kept_arrays(fn, abstract(6, 6), BODY, BATCH) == ["float32[8, 6]"]


def test_hoist_keeps_nothing_without_a_batch() -> None:
    def fn(t: Any, f: Any) -> Any:
        return (f @ f) @ t

    assert kept_arrays(fn, HEAD, abstract(6, 6)) == []


def test_hoist_keeps_no_frozen_leaf_that_is_an_output() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return f, x @ f @ t

    assert kept_arrays(fn, HEAD, BODY, BATCH) == ["float32[8, 6]"]


def test_hoist_keeps_an_output_that_does_not_depend_on_the_trainable_part() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        z = x @ f
        return z @ t, z.max(axis=1)

    assert kept_arrays(fn, HEAD, BODY, BATCH) == ["float32[8, 6]", "float32[8]"]


def test_hoist_stores_a_value_returned_twice_only_once() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        z = x @ f
        return {"z": z, "again": z, "sum": z @ t, "x": x}

    assert kept_arrays(fn, HEAD, BODY, BATCH) == ["float32[8, 4]", "float32[8, 6]"]


def test_hoist_keeps_only_the_used_result_of_an_operation() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        _, indices = lax.top_k(x @ f, 3)
        return jnp.where(t > 0, indices, 0)

    assert kept_arrays(fn, abstract(), BODY, BATCH) == ["int32[8, 3]"]


def test_hoist_does_not_compute_unused_values() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        used, unused = x @ f, x @ x.T
        return used @ t, len(unused)

    assert kept_arrays(fn, HEAD, BODY, BATCH) == ["float32[8, 6]"]
    in_once, _ = programs(fn, HEAD, BODY, BATCH)
    assert in_once.count("dot_general") == 1


# Since JAX 0.7, an option makes the constants of a jaxpr literals in it.
LITERALS_OPTION = "jax_use_simplified_jaxpr_constants"
LITERALS = [False, True] if LITERALS_OPTION in jax.config.values else [False]


@contextlib.contextmanager
def array_literals(on: bool) -> Iterator[None]:
    """Sets the option, if this version of JAX has it."""
    if LITERALS == [False]:
        yield
        return
    before = jax.config.values[LITERALS_OPTION]
    jax.config.update(LITERALS_OPTION, on)
    try:
        yield
    finally:
        jax.config.update(LITERALS_OPTION, before)


@pytest.mark.parametrize("inside_jit", [False, True])
@pytest.mark.parametrize("literals", LITERALS)
def test_hoist_treats_a_closed_over_array_as_a_weight(
    inside_jit: bool, literals: bool
) -> None:
    weights = np.ones((4, 6), np.float32)

    def fn(t: Any, f: Any, x: Any) -> Any:
        square = weights @ weights.T
        return x @ square @ weights @ t @ square

    function = jax.jit(fn) if inside_jit else fn
    with array_literals(literals):
        assert kept_arrays(function, abstract(6, 4), None, BATCH) == ["float32[8, 6]"]


def test_hoist_keeps_the_boundary_between_stacked_layers() -> None:
    # Twelve stacked layers, split into two leaves. Only the last four train.
    def layers(stack: Any, x: Any) -> Any:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    def fn(late: Any, early: Any, x: Any) -> Any:
        return layers(late, layers(early, x))

    args = abstract(4, 6, 6), abstract(8, 6, 6), abstract(8, 6)
    assert kept_arrays(fn, *args) == ["float32[8, 6]"]
    # The input has the same shape, so check that each program scans over its layers.
    in_once, in_rest = programs(fn, *args)
    assert in_once.count("scan[") == in_rest.count("scan[") == 1
    assert "length=8" in in_once
    assert "length=4" in in_rest
    assert_hoist_preserves_values(fn, *args)


# ........................................................... which operations are cheap
#
# `fn` needs both z = x @ f and operation(z). If the operation is cheap, only z is kept.


def kept_of_z_and(operation: Callable[[Any], Any], dtype: str = "float32") -> list[str]:
    """The arrays that hoist keeps for a function that needs z and operation(z).

    If hoist may rebuild operation(z), it keeps z alone. Otherwise it keeps both.
    """

    def fn(t: Any, f: Any, x: Any) -> Any:
        z = lax.dot(x, f)
        # `where` reads z itself, whatever its dtype. A product would first cast it.
        return jnp.where(t > 0, z, -z), operation(z)

    return kept_arrays(
        fn, abstract(), abstract(4, 6, dtype=dtype), abstract(8, 4, dtype=dtype)
    )


def name_of(function: Any) -> str:
    return str(function.__name__)


@pytest.mark.parametrize(
    "operation",
    [
        lax.abs,
        lax.acos,
        lax.acosh,
        lax.asin,
        lax.asinh,
        lax.atan,
        lax.atanh,
        lax.cbrt,
        lax.ceil,
        lax.cos,
        lax.cosh,
        lax.digamma,
        lax.erf,
        lax.erf_inv,
        lax.erfc,
        lax.exp,
        lax.exp2,
        lax.expm1,
        lax.floor,
        lax.is_finite,
        lax.lgamma,
        lax.log,
        lax.log1p,
        lax.logistic,
        lax.neg,
        lax.round,
        lax.rsqrt,
        lax.sign,
        lax.sin,
        lax.sinh,
        lax.sqrt,
        lax.square,
        lax.tan,
        lax.tanh,
    ],
    ids=name_of,
)
def test_hoist_rebuilds_elementwise(operation: Any) -> None:
    assert kept_of_z_and(operation) == ["float32[8, 6]"]


@pytest.mark.parametrize(
    "operation",
    [
        lax.add,
        lax.atan2,
        lax.complex,
        lax.div,
        lax.eq,
        lax.ge,
        lax.gt,
        lax.le,
        lax.lt,
        lax.max,
        lax.min,
        lax.mul,
        lax.ne,
        lax.nextafter,
        lax.pow,
        lax.rem,
        lax.sub,
    ],
    ids=name_of,
)
def test_hoist_rebuilds_elementwise_of_two(operation: Any) -> None:
    assert kept_of_z_and(lambda z: operation(z, z)) == ["float32[8, 6]"]


@pytest.mark.parametrize(
    "operation",
    [
        lax.bitwise_and,
        lax.bitwise_or,
        lax.bitwise_xor,
        lax.shift_left,
        lax.shift_right_arithmetic,
        lax.shift_right_logical,
    ],
    ids=name_of,
)
def test_hoist_rebuilds_bits_of_two(operation: Any) -> None:
    assert kept_of_z_and(lambda z: operation(z, z), "int32") == ["int32[8, 6]"]


@pytest.mark.parametrize(
    "operation", [lax.bitwise_not, lax.clz, lax.population_count], ids=name_of
)
def test_hoist_rebuilds_bits(operation: Any) -> None:
    assert kept_of_z_and(operation, "int32") == ["int32[8, 6]"]


def pad(z: Any) -> Any:
    return jnp.pad(z, 1)


def broadcast(z: Any) -> Any:
    return lax.broadcast(z, (5,))


def reshape(z: Any) -> Any:
    return lax.reshape(z, (6, 8))


def transpose(z: Any) -> Any:
    return lax.transpose(z, (1, 0))


def reverse(z: Any) -> Any:
    return lax.rev(z, (0,))


def expand_dims(z: Any) -> Any:
    return lax.expand_dims(z, (1,))


def squeeze(z: Any) -> Any:
    return lax.squeeze(lax.slice(z, (0, 0), (1, 6)), (0,))


def concatenate(z: Any) -> Any:
    return lax.concatenate([z, z], 0)


def stacked(z: Any) -> Any:
    return jnp.stack([z, z])


def unstack(z: Any) -> Any:
    return list(z)


def split(z: Any) -> Any:
    return jnp.split(z, 2)


def tile(z: Any) -> Any:
    return jnp.tile(z, (2, 1))


def gather(z: Any) -> Any:
    return z[jnp.array([3, 1, 4])]


def dynamic_slice(z: Any) -> Any:
    return lax.dynamic_slice_in_dim(z, jnp.int32(2), 3)


def dynamic_update_slice(z: Any) -> Any:
    return lax.dynamic_update_slice_in_dim(z, -z[:1], jnp.int32(2), 0)


# Writing moves data. Adding at the same places, below, also computes sums.
def scatter(z: Any) -> Any:
    return z.at[jnp.array([3, 1])].set(0)


def add_iota(z: Any) -> Any:
    return z + lax.broadcasted_iota("float32", (8, 6), 0)


def select(z: Any) -> Any:
    return jnp.where(z > 0, z, 0)


def clamp(z: Any) -> Any:
    return lax.clamp(0.0, z, 1.0)


def integer_pow(z: Any) -> Any:
    return lax.integer_pow(z, 3)


def convert(z: Any) -> Any:
    return z.astype("int32")


def bitcast(z: Any) -> Any:
    return lax.bitcast_convert_type(z, "int32")


def reduce_precision(z: Any) -> Any:
    return lax.reduce_precision(z, exponent_bits=5, mantissa_bits=10)


def parts_of_complex(z: Any) -> Any:
    c = lax.conj(lax.complex(z, z))
    return lax.real(c), lax.imag(c)


def copied(z: Any) -> Any:
    return jnp.copy(z)


def stop_gradient(z: Any) -> Any:
    return lax.stop_gradient(z)


def name_for_checkpoint(z: Any) -> Any:
    return checkpoint_name(z, "z")


def optimization_barrier(z: Any) -> Any:
    return lax.optimization_barrier(z)


def sharding_constraint(z: Any) -> Any:
    return lax.with_sharding_constraint(z, sharding_of_rows(1))


def random_numbers(z: Any) -> Any:
    key = jax.random.key(0)
    key = jax.random.fold_in(key, z[0, 0].astype("int32"))
    return jax.random.normal(jax.random.split(key)[1], (8, 60))


def random_numbers_of_old_keys(z: Any) -> Any:
    key = jax.random.PRNGKey(z[0, 0].astype("int32"))
    return jax.random.normal(jax.random.split(key)[1], (8, 60))


def gradient_that_adds(z: Any) -> Any:
    """JAX sums the two gradients of z with `add_any`."""
    return jax.grad(lambda z: jnp.sum(z * jnp.sin(z)))(z)


def cheap_jit(z: Any) -> Any:
    return jax.jit(lambda z: jax.jit(jnp.sin)(z) + 1)(z)


def relu(z: Any) -> Any:
    """A custom_jvp whose body is a jit."""
    return jax.nn.relu(z)


@pytest.mark.parametrize(
    "operation",
    [
        pad,
        broadcast,
        reshape,
        transpose,
        reverse,
        expand_dims,
        squeeze,
        tile,
        concatenate,
        stacked,
        unstack,
        split,
        gather,
        scatter,
        dynamic_slice,
        dynamic_update_slice,
        add_iota,
        select,
        clamp,
        integer_pow,
        convert,
        bitcast,
        reduce_precision,
        parts_of_complex,
        copied,
        stop_gradient,
        name_for_checkpoint,
        optimization_barrier,
        sharding_constraint,
        random_numbers,
        random_numbers_of_old_keys,
        gradient_that_adds,
        cheap_jit,
        relu,
    ],
    ids=name_of,
)
def test_hoist_rebuilds(operation: Any) -> None:
    assert kept_of_z_and(operation) == ["float32[8, 6]"]


def sum_of_elements(z: Any) -> Any:
    return z.sum()


def largest(z: Any) -> Any:
    return z.max(axis=0)


def cumulative_sum(z: Any) -> Any:
    return lax.cumsum(z)


def sort(z: Any) -> Any:
    return lax.sort(z)


def argmax(z: Any) -> Any:
    return z.argmax(axis=1)


def scatter_add(z: Any) -> Any:
    return z.at[jnp.array([3, 1])].add(z[:2])


def gram_matrix(z: Any) -> Any:
    return z.T @ z


def convolution(z: Any) -> Any:
    return lax.conv(z[None, None], jnp.ones((2, 1, 3, 3)), (1, 1), "SAME")


def fourier_transform(z: Any) -> Any:
    return jnp.fft.rfft(z)


def jit_of_a_product(z: Any) -> Any:
    return jax.jit(lambda z: z.T @ z)(z)


def jit_with_shardings(z: Any) -> Any:
    return jax.jit(jnp.sin, out_shardings=sharding_of_rows(1))(z)


@jax.custom_jvp
def normalize(z: Any) -> Any:
    """A custom_jvp whose body has a reduction."""
    return z / z.sum()


def normalize_jvp(primals: Any, tangents: Any) -> Any:
    return normalize(*primals), tangents[0]


normalize.defjvp(normalize_jvp)


def scan_of_cheap(z: Any) -> Any:
    _, rows = lax.scan(lambda carry, row: (carry, jnp.sin(row)), 0, z)
    return rows


def while_of_cheap(z: Any) -> Any:
    return lax.while_loop(lambda z: z[0, 0] < 1, lambda z: z + 1, z)


def cond_of_cheap(z: Any) -> Any:
    return lax.cond(z[0, 0] < 0, jnp.sin, jnp.cos, z)


def checkpoint_of_cheap(z: Any) -> Any:
    return jax.checkpoint(jnp.sin)(z)


@jax.custom_vjp
def vjp_of_cheap(z: Any) -> Any:
    return jnp.sin(z)


vjp_of_cheap.defvjp(lambda z: (jnp.sin(z), z), lambda z, g: (g * jnp.cos(z),))


@pytest.mark.parametrize(
    ("operation", "result"),
    [
        pytest.param(sum_of_elements, "float32[]", id="sum"),
        pytest.param(largest, "float32[6]", id="max"),
        pytest.param(cumulative_sum, "float32[8, 6]", id="cumsum"),
        pytest.param(sort, "float32[8, 6]", id="sort"),
        pytest.param(argmax, "int32[8]", id="argmax"),
        pytest.param(scatter_add, "float32[8, 6]", id="scatter-add"),
        pytest.param(gram_matrix, "float32[6, 6]", id="product"),
        pytest.param(convolution, "float32[2, 8, 6]", id="convolution"),
        pytest.param(fourier_transform, "complex64[8, 4]", id="fft"),
        pytest.param(jit_of_a_product, "float32[6, 6]", id="jit of a product"),
        pytest.param(jit_with_shardings, "float32[8, 6]", id="jit with shardings"),
        pytest.param(normalize, "float32[8, 6]", id="custom_jvp of a sum"),
        pytest.param(scan_of_cheap, "float32[8, 6]", id="scan of a sine"),
        pytest.param(while_of_cheap, "float32[8, 6]", id="while of a sum of two"),
        pytest.param(cond_of_cheap, "float32[8, 6]", id="cond of sine and cosine"),
        pytest.param(checkpoint_of_cheap, "float32[8, 6]", id="checkpoint of a sine"),
        pytest.param(vjp_of_cheap, "float32[8, 6]", id="custom_vjp of a sine"),
    ],
)
def test_hoist_does_not_rebuild(operation: Any, result: str) -> None:
    assert kept_of_z_and(operation) == sorted(["float32[8, 6]", result])


def test_hoist_rebuilds_a_long_chain_of_cheap_operations() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        z = x @ f
        first = z
        for _ in range(1500):  # exceeds Python's recursion limit
            z = jnp.sin(z)
        return first @ t + z @ t

    assert kept_arrays(fn, HEAD, BODY, BATCH) == ["float32[8, 6]"]


# ........................................................ control flow and custom rules
#
# An operation with an inner program (a scan, a cond, ...) is hoisted as a whole, or not
# at all.


def with_scan(w: Any, x: Any) -> Any:
    return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0]


def with_while(w: Any, x: Any) -> Any:
    """Three layers, in a loop that counts them."""

    def is_running(state: Any) -> Any:
        count, _ = state
        return count < 3

    def layer(state: Any) -> Any:
        count, x = state
        return count + 1, jnp.tanh(x @ w)

    return lax.while_loop(is_running, layer, (0, x))[1]


# In the tests, x holds standard normal samples: far from 99.
def with_first_branch(w: Any, x: Any) -> Any:
    return lax.cond(x[0, 0] < 99, lambda: jnp.tanh(x @ w), lambda: jnp.sin(x))


def with_second_branch(w: Any, x: Any) -> Any:
    return lax.cond(x[0, 0] > 99, lambda: jnp.sin(x), lambda: jnp.tanh(x @ w))


def with_checkpoint(w: Any, x: Any) -> Any:
    return jax.checkpoint(lambda x: jnp.tanh(x @ w))(x)


@jax.custom_vjp
def clipped_product(x: Any, w: Any) -> Any:
    return x @ w


def clipped_product_forward(x: Any, w: Any) -> Any:
    return x @ w, (x, w)


def clipped_product_backward(saved: Any, gradient: Any) -> Any:
    x, w = saved
    gradient = jnp.clip(gradient, -1, 1)
    return gradient @ w.T, x.T @ gradient


clipped_product.defvjp(clipped_product_forward, clipped_product_backward)


def with_custom_vjp(w: Any, x: Any) -> Any:
    return clipped_product(x, w)


def with_shard_map(w: Any, x: Any) -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    rows, replicated = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    shard_map: Any = getattr(jax, "shard_map", None)
    if shard_map is None:  # before JAX 0.6
        shard_map = importlib.import_module("jax.experimental.shard_map").shard_map
    specs = {"in_specs": (rows, replicated), "out_specs": rows}
    return shard_map(jnp.dot, mesh=mesh, **specs)(x, w)


# Each case gives a layer and the primitive in its program.
CONTROL_FLOW = [
    pytest.param(with_scan, "scan[", id="scan"),
    pytest.param(with_while, "while[", id="while"),
    pytest.param(with_first_branch, "cond[", id="cond that holds"),
    pytest.param(with_second_branch, "cond[", id="cond that fails"),
    pytest.param(with_checkpoint, "remat", id="checkpoint"),
    pytest.param(with_custom_vjp, "custom_vjp_call", id="custom_vjp"),
    pytest.param(with_shard_map, "shard_map", id="shard_map"),
]
SQUARE, SQUARE_X = abstract(6, 6), abstract(8, 6)


@pytest.mark.parametrize(("layer", "primitive"), CONTROL_FLOW)
def test_hoist_moves_frozen_control_flow(layer: Any, primitive: str) -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return layer(f, x) @ t

    assert kept_arrays(fn, HEAD, SQUARE, SQUARE_X) == ["float32[8, 6]"]
    in_once, in_rest = programs(fn, HEAD, SQUARE, SQUARE_X)
    assert primitive in in_once
    assert primitive not in in_rest
    assert_hoist_preserves_values(fn, HEAD, SQUARE, SQUARE_X)


@pytest.mark.parametrize(("layer", "primitive"), CONTROL_FLOW)
def test_hoist_leaves_control_flow_with_a_trainable_part(
    layer: Any, primitive: str
) -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return layer(t * f, x)

    with pytest.warns(UserWarning, match="^hoist found nothing worth computing"):
        hoist(fn, HEAD, SQUARE, SQUARE_X)
    assert kept_arrays(fn, HEAD, SQUARE, SQUARE_X) == ["float32[8, 6]"]
    in_once, in_rest = programs(fn, HEAD, SQUARE, SQUARE_X)
    assert primitive not in in_once
    assert primitive in in_rest


def test_hoist_does_not_split_a_scan_with_one_frozen_output() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        def layer(carry: Any, _: Any) -> Any:
            frozen, trained = carry
            return (jnp.tanh(frozen @ f), trained @ f + t), None

        return lax.scan(layer, (x, x), None, length=3)[0]

    # The scan is late as a whole, so only its input x is kept.
    assert kept_arrays(fn, HEAD, SQUARE, SQUARE_X) == ["float32[8, 6]"]
    in_once, in_rest = programs(fn, HEAD, SQUARE, SQUARE_X)
    assert "scan[" not in in_once
    assert "scan[" in in_rest


def test_hoist_preserves_the_gradient_of_a_custom_vjp() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return clipped_product(x @ f, t)

    once, rest = hoist(fn, abstract(6, 2), BODY, BATCH)
    t, f, x = normal(6, 2), normal(4, 6), normal(8, 4)
    gradient = jax.grad(lambda t: 50 * rest(t, f, once(f, x)).sum())(t)
    clipped = np.ones((8, 2), np.float32)  # each element was 50
    assert_close(gradient, (x @ f).T @ clipped, 1e-5)


def test_hoist_preserves_the_gradient_of_a_custom_vjp_that_indexes_a_constant() -> None:
    # NumPy arrays have no `.at`, so the backward pass must receive a JAX array.
    @jax.custom_vjp
    def dot(a: Any, b: Any) -> Any:
        return a @ b

    def forward(a: Any, b: Any) -> Any:
        return a @ b, b

    def backward(b: Any, gradient: Any) -> Any:
        return gradient * b.at[:].get(), gradient * b

    dot.defvjp(forward, backward)

    def fn(t: Any, f: Any, x: Any) -> Any:
        return dot(t * x, jnp.array([2.0, 3.0, 4.0]))

    with pytest.warns(UserWarning, match="^hoist found nothing worth computing"):
        once, rest = hoist(fn, 1.0, None, abstract(3))
    assert jax.grad(rest)(1.0, None, once(None, jnp.ones(3))) == 2 + 3 + 4


def test_hoist_preserves_the_shardings_of_a_jit() -> None:
    sharded = jax.jit(lambda w, x: jnp.tanh(x @ w), out_shardings=sharding_of_rows(8))

    def fn(t: Any, f: Any, x: Any) -> Any:
        # The outer jit has no shardings, so hoist inlines it and finds the inner one.
        return jax.jit(sharded)(f, x) @ t

    once, _ = hoist(fn, HEAD, BODY, BATCH)
    (kept,) = jax.jit(once)(normal(4, 6), normal(8, 4))
    assert [shard.data.shape for shard in kept.addressable_shards] == [(1, 6)] * 8


# .............................................................................. effects


@pytest.mark.parametrize("ordered", [False, True])
def test_hoist_leaves_effects_in_rest(ordered: bool) -> None:
    printed: list[Any] = []
    counted: list[Any] = []

    def count(element: Any) -> Any:
        counted.append(element)
        return np.float32(len(counted))

    def fn(t: Any, f: Any, x: Any) -> Any:
        z = jnp.tanh(x @ f)
        jax.debug.callback(printed.append, z[0, 0], ordered=ordered)
        calls = io_callback(count, abstract(), z[0, 0], ordered=ordered)
        return (z @ t).sum() * calls

    t, f, x = jnp.ones(3), jnp.ones((2, 3)), jnp.full((4, 2), 0.5)
    element = np.tanh(0.5 + 0.5)  # every element of z, which has shape (4, 3)
    sum_of_z = 4 * 3 * element
    once, rest = hoist(fn, t, f, x)
    kept = jax.block_until_ready(jax.jit(once)(f, x))
    jax.effects_barrier()
    assert printed == counted == []

    step = jax.jit(rest)
    results = [step(t, f, kept), step(t, f, kept)]
    jax.effects_barrier()
    np.testing.assert_allclose(printed, [element, element], rtol=1e-6)
    np.testing.assert_allclose(counted, [element, element], rtol=1e-6)
    # Each step runs the callback again.
    np.testing.assert_allclose(results, [sum_of_z, 2 * sum_of_z], rtol=1e-6)


def test_hoist_reads_a_reference_in_every_step() -> None:
    new_ref = getattr(jax, "new_ref", None)
    if new_ref is None:  # in older versions of JAX
        new_ref = importlib.import_module("jax._src.core").mutable_array
    factor = new_ref(jnp.float32(1))

    def fn(t: Any, f: Any, x: Any) -> Any:
        return (x @ f).sum() * t * factor[...]

    once, rest = hoist(fn, 1.0, BODY, BATCH)
    f, x = jnp.ones((4, 6)), jnp.ones((8, 4))
    kept = once(f, x)
    sum_of_product = 8 * 6 * 4  # x @ f has 8 x 6 elements, and each is a sum of 4 ones
    assert rest(1.0, f, kept) == sum_of_product
    factor[...] = jnp.float32(2)
    assert rest(1.0, f, kept) == 2 * sum_of_product


def dropout_loss(t: Any, f: Any, x: Any, key: Any) -> Any:
    z = jnp.tanh(x @ f)
    return (jnp.where(jax.random.bernoulli(key, 0.5, z.shape), z, 0) @ t).sum()


def test_hoist_uses_the_key_that_is_in_the_batch() -> None:
    t, f, x = normal(6), normal(4, 6), normal(8, 4)
    keys = [jax.random.key(1), jax.random.key(2)]
    want = [dropout_loss(t, f, x, key) for key in keys]
    assert want[0] != want[1]

    once, rest = hoist(dropout_loss, t, f, x, keys[0])
    got = [rest(t, f, once(f, x, key)) for key in keys]
    assert_close(got, want, 1e-5)


def test_hoist_uses_the_key_that_each_step_passes() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        head, key = t
        return dropout_loss(head, f, x, key)

    head, f, x = normal(6), normal(4, 6), normal(8, 4)
    keys = [jax.random.key(1), jax.random.key(2)]
    want = [dropout_loss(head, f, x, key) for key in keys]
    assert want[0] != want[1]

    once, rest = hoist(fn, (head, keys[0]), f, x)
    kept = once(f, x)
    got = [rest((head, key), f, kept) for key in keys]
    assert_close(got, want, 1e-5)


# ............................................................................. warnings


def test_hoist_warns_if_it_hoists_nothing() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return jnp.sum((x + t) @ f)

    with pytest.warns(
        UserWarning, match="^hoist found nothing worth computing"
    ) as caught:
        hoist(fn, abstract(4), BODY, BATCH)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the warning points at hoist's caller
    assert "\n" not in str(caught[0].message)


def test_hoist_warns_if_it_hoists_only_reductions() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return (x - x.mean(axis=0)) @ t

    with pytest.warns(UserWarning, match="^hoist found nothing worth computing"):
        hoist(fn, abstract(4), BODY, BATCH)


def test_hoist_warns_if_the_data_are_closed_over() -> None:
    data = np.ones((100, 4), np.float32)

    def fn(t: Any, f: Any) -> Any:
        return jnp.sum(data @ f @ t)

    with pytest.warns(UserWarning, match="^hoist found nothing worth computing"):
        hoist(fn, HEAD, BODY)


def test_hoist_keeps_the_ids_and_warns_if_the_position_embedding_trains() -> None:
    def fn(t: Any, f: Any, ids: Any) -> Any:
        return (f["table"][ids] + t) @ f["w"]

    args = (
        abstract(6),
        {"table": abstract(50, 6), "w": abstract(6, 6)},
        abstract(8, dtype="int32"),
    )
    with pytest.warns(UserWarning, match="^hoist found nothing worth computing"):
        hoist(fn, *args)
    assert kept_arrays(fn, *args) == ["int32[8]"]


# ........................................................... once and rest as functions


def run_eagerly(step: Any, xs: Any) -> Any:
    return jnp.stack([step(x) for x in xs])


def run_with_jit(step: Any, xs: Any) -> Any:
    return jnp.stack([jax.jit(step)(x) for x in xs])


def run_with_vmap(step: Any, xs: Any) -> Any:
    return jax.vmap(step)(xs)


def run_with_scan(step: Any, xs: Any) -> Any:
    return lax.map(step, xs)


@pytest.mark.parametrize(
    "run", [run_eagerly, run_with_jit, run_with_vmap, run_with_scan], ids=name_of
)
def test_hoisted_functions_work_under(run: Any) -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return jnp.sum(jnp.tanh(x @ f) @ t)

    once, rest = hoist(fn, HEAD, BODY, BATCH)
    t, f, xs = normal(6), normal(4, 6), normal(3, 8, 4)
    got = run(lambda x: jax.grad(rest)(t, f, once(f, x)), xs)
    want = [np.tanh(x @ f).sum(axis=0) for x in xs]
    assert_close(got, np.stack(want), 1e-5)


def test_hoist_over_eight_devices_keeps_each_row_on_its_device() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return jnp.sum(jnp.tanh(x @ f) @ t)

    once, rest = hoist(fn, HEAD, BODY, BATCH)
    t, f, x = normal(6), normal(4, 6), normal(8, 4)
    (kept,) = jax.jit(once)(f, jax.device_put(x, sharding_of_rows(8)))
    assert [shard.data.shape for shard in kept.addressable_shards] == [(1, 6)] * 8
    gradient = jax.jit(jax.grad(rest))(t, f, (kept,))
    assert_close(gradient, np.tanh(x @ f).sum(axis=0), 1e-5)


def test_hoisted_functions_return_arrays() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return {"size": len(x), "x": x, "t": t, "none": None, "hole": HOLE}

    x = vector(1, 2, 3)
    with pytest.warns(UserWarning, match="^hoist found nothing worth computing"):
        once, rest = hoist(fn, 1.0, 2.0, x)
    kept = once(2.0, x)
    assert type(kept) is tuple
    result = rest(3.0, 2.0, kept)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((kept, result)))
    want = {"size": np.int32(3), "x": x, "t": np.float32(3), "none": None, "hole": HOLE}
    assert_identical(result, want)


def test_hoist_calls_fn_once_and_uses_the_current_value_of_closed_over_variables() -> (
    None
):
    calls = []
    factor = 1.0

    def fn(t: Any, f: Any, x: Any) -> Any:
        calls.append(factor)
        return x @ f @ t * factor

    def hoisted(x: Any) -> Any:
        once, rest = hoist(fn, HEAD, BODY, BATCH)
        return rest(jnp.ones(6), jnp.ones((4, 6)), once(jnp.ones((4, 6)), x))

    element = 4 * 6  # of x @ f @ t, if all of them are ones
    x = jnp.ones((8, 4))
    assert hoisted(x)[0] == element
    factor = 2.0
    assert hoisted(x)[0] == 2 * element
    factor = 3.0
    assert jax.jit(hoisted)(x)[0] == 3 * element  # hoist also works under a trace
    assert calls == [1.0, 2.0, 3.0]


def test_hoist_donates_nothing() -> None:
    trainable, frozen = jax.device_put(partition("linear_2", PARAMS))
    once, rest = hoist(loss_fn, trainable, frozen, INPUTS, LABELS)
    x, y = jax.device_put((INPUTS, LABELS))
    kept = once(frozen, x, y)
    jax.grad(rest)(trainable, frozen, kept)
    rest(trainable, frozen, kept)
    arguments = jax.tree.leaves((trainable, frozen, kept, x, y))
    assert not any(leaf.is_deleted() for leaf in arguments)


@pytest.mark.usefixtures("strict_setting")
def test_hoist_under_strict_settings() -> None:
    trainable, frozen = partition("linear_2", PARAMS)
    once, rest = hoist(loss_fn, trainable, frozen, INPUTS, LABELS)
    kept = jax.jit(once)(frozen, INPUTS, LABELS)
    loss = jax.jit(rest)(trainable, frozen, kept)
    np.testing.assert_allclose(loss, numpy_loss(PARAMS, INPUTS, LABELS), rtol=1e-5)


@pytest.mark.usefixtures("fully_optimized")
@pytest.mark.parametrize(
    "where", ["linear_2", "!linear_0", "!linear_1", "*/b", "*/w", "*"]
)
def test_hoist_preserves_the_loss_of_the_mlp_bit_for_bit(where: str) -> None:
    trainable, frozen = partition(where, PARAMS)
    once, rest = hoist_quietly(loss_fn, trainable, frozen, INPUTS, LABELS)

    # Compile each function on its own, as a user does: in one program, XLA could
    # merge the two computations.
    x, y = 2 * INPUTS, LABELS[::-1]
    kept = jax.jit(once)(frozen, x, y)
    hoisted = jax.jit(jax.value_and_grad(rest))(trainable, frozen, kept)
    direct = jax.jit(jax.value_and_grad(loss_fn))(trainable, frozen, x, y)
    if jax.default_backend() == "cpu":
        assert_identical(hoisted, direct)
    else:  # accelerators may round matrix products differently in two programs
        assert_close(hoisted, direct, 1e-2)


@pytest.mark.usefixtures("fully_optimized")
def test_hoist_saves_the_products_of_the_frozen_layers() -> None:
    params = jax.eval_shape(lambda: init(jax.random.key(0), [256, 256, 256, 256, 10]))
    trainable, frozen = partition("linear_3", params)
    x, y = abstract(64, 256), abstract(64, dtype="int32")
    # The jit must not hide the products from hoist, which inlines it.
    once, rest = hoist(jax.jit(loss_fn), trainable, frozen, x, y)
    kept = jax.eval_shape(once, frozen, x, y)

    def flops(fn: Any, *args: Any) -> float:
        program: Any = jax.jit(jax.grad(fn)).lower(*args).compile()
        return float(program.cost_analysis()["flops"])

    product_of_head = 2 * 64 * 256 * 10
    head = 2 * product_of_head  # forward, and the gradient of the weights
    body = 3 * (2 * 64 * 256 * 256)  # the forward products of three layers
    assert flops(loss_fn, trainable, frozen, x, y) > body
    assert head <= flops(rest, trainable, frozen, kept) < 2 * head


# ............................................................................... errors


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        pytest.param([{"f": len}, 1.0, 2.0], ["trainable/f"], id="trainable"),
        pytest.param([1.0, {"f": len}, 2.0], ["frozen/f"], id="frozen"),
        pytest.param([1.0, 2.0, {"f": "text"}], ["batch/0/f"], id="batch"),
    ],
)
def test_hoist_rejects_leaves_that_are_not_arrays(
    args: list[Any], fragments: list[str]
) -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return jnp.float32(0)

    with raises(TypeError, *fragments, "close over"):
        hoist(fn, *args)


class NumbersOnly:
    """A container that rejects the placeholder arrays JAX rebuilds it with."""

    def __init__(self, number: Any) -> None:
        if not isinstance(number, float):
            raise ValueError("numbers only")
        self.number = number


jax.tree_util.register_pytree_node(
    NumbersOnly,
    lambda container: ((container.number,), None),
    lambda _, children: NumbersOnly(*children),
)


def test_hoist_passes_on_the_error_of_a_container() -> None:
    numbers = NumbersOnly(1.0)
    with raises(ValueError, "numbers only"):
        hoist(lambda t, f, x: t.number * x, numbers, None, BATCH)


def test_hoist_passes_on_the_errors_of_fn() -> None:
    trainable, frozen = partition("linear_2", PARAMS)
    with raises(TypeError, "labels must be integers, got float32"):
        hoist(loss_fn, trainable, frozen, INPUTS, INPUTS[:, 0])


def hoisted_loss() -> tuple[Any, ...]:
    trainable, frozen = partition("linear_2", PARAMS)
    once, rest = hoist(loss_fn, trainable, frozen, INPUTS, LABELS)
    return once, rest, trainable, frozen


def test_once_rejects_a_mismatched_batch() -> None:
    once, _, _, frozen = hoisted_loss()
    with raises(ValueError, "'batch/0': expected float32 (4, 3), got float32 (3, 3)"):
        once(frozen, INPUTS[:3], LABELS)
    with raises(ValueError, "'batch/0': expected float32 (4, 3), got bfloat16 (4, 3)"):
        once(frozen, INPUTS.astype("bfloat16"), LABELS)
    with raises(ValueError, "'batch/0/x' is missing from what hoist traced"):
        once(frozen, {"x": INPUTS}, LABELS)
    with raises(ValueError, "'batch/1' is missing from this call"):
        once(frozen, INPUTS)


def test_once_rejects_a_mismatched_frozen_part() -> None:
    once, _, trainable, _ = hoisted_loss()
    with raises(ValueError, "frozen/linear_0/w"):
        once(trainable, INPUTS, LABELS)


def test_rest_rejects_a_mismatched_trainable_or_frozen_part() -> None:
    once, rest, trainable, frozen = hoisted_loss()
    kept = once(frozen, INPUTS, LABELS)
    short = jax.tree.map(lambda leaf: leaf[:3], trainable)
    with raises(ValueError, "frozen/linear_0/w"):
        rest(trainable, trainable, kept)
    with raises(
        ValueError, "'trainable/linear_2/b': expected float32 (5,), got float32 (3,)"
    ):
        jax.grad(rest)(short, frozen, kept)


def test_rest_rejects_mismatched_kept_arrays() -> None:
    once, rest, trainable, frozen = hoisted_loss()
    kept = once(frozen, INPUTS, LABELS)
    with raises(ValueError, "'kept/1' is missing from this call"):
        rest(trainable, frozen, kept[:1])
    with raises(ValueError, "'kept/0': expected", "float32", "int32"):
        jax.jit(rest)(trainable, frozen, kept[::-1])


@pytest.mark.parametrize("position", [0, 1, 2], ids=["trainable", "frozen", "batch"])
@pytest.mark.parametrize(
    ("made_with", "called_with", "fragment"),
    [
        pytest.param(
            2.0,
            jnp.float32(2),
            "expected weak float32 (), got float32 ()",
            id="an array for a number",
        ),
        pytest.param(
            jnp.float32(2),
            2.0,
            "expected float32 (), got weak float32 ()",
            id="a number for an array",
        ),
    ],
)
def test_hoisted_functions_reject_a_different_weak_type(
    position: int, made_with: Any, called_with: Any, fragment: str
) -> None:
    # A Python number is weakly typed, which can change the dtypes of results.
    def fn(t: Any, f: Any, x: Any) -> Any:
        return t * f * x

    args = [vector(1, 1, 1), vector(1, 1, 1), vector(1, 1, 1)]
    args[position] = made_with
    once, rest = hoist_quietly(fn, *args)
    args[position] = called_with
    t, f, x = args
    with raises(ValueError, fragment):
        rest(t, f, once(f, x))


def test_rest_accepts_kept_values_that_have_lost_their_weak_type() -> None:
    def fn(t: Any, f: Any, x: Any) -> Any:
        return t * f, x

    ones = vector(1, 1, 1)
    once, rest = hoist_quietly(fn, ones, ones, 2.0)
    (number,) = once(ones, 2.0)
    assert number.weak_type
    stored = jnp.asarray(np.asarray(number))
    assert not stored.weak_type
    assert_identical(rest(ones, ones, (stored,)), (ones, np.float32(2)))


# ............................................................ property: the minimum cut
#
# Random programs of one-dimensional arrays. The values that hoist keeps are compared
# with the optimum, found by brute force.


class VectorType(NamedTuple):
    """The shape and dtype of a value."""

    size: int
    dtype: str


def sine(inputs: list[Any], result: VectorType) -> Any:
    return lax.sin(inputs[0])


def add(inputs: list[Any], result: VectorType) -> Any:
    return inputs[0] + inputs[1]


def join(inputs: list[Any], result: VectorType) -> Any:
    return jnp.concatenate(inputs)


def shorter_copy(inputs: list[Any], result: VectorType) -> Any:
    """Has fewer elements, but more bytes if it turns bfloat16 into float32."""
    return lax.slice(inputs[0].astype(result.dtype), (0,), (result.size,))


def product_with_weights(inputs: list[Any], result: VectorType) -> Any:
    weights = np.cos(np.arange(inputs[0].size * result.size))
    return inputs[0] @ weights.reshape(-1, result.size).astype(result.dtype)


def running_sum(inputs: list[Any], result: VectorType) -> Any:
    return lax.cumsum(inputs[0])


CHEAP = [sine, add, join, shorter_copy]
COSTLY = [product_with_weights, running_sum]

# Every program starts with these four values. Its steps add one value each.
TRAINABLE, FROZEN, BATCH_0, BATCH_1 = range(4)
FIRST_STEP = 4


@dataclass(frozen=True)
class Step:
    """An operation on earlier values of the program, identified by index."""

    operation: Callable[[list[Any], VectorType], Any]
    inputs: tuple[int, ...]
    result: VectorType


@dataclass(frozen=True)
class Program:
    """A function that hoist can split. It returns the values at `outputs`."""

    inputs: tuple[VectorType, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def values(self, *inputs: Any) -> list[Any]:
        """Returns all values of the program, in order."""
        values = list(inputs)
        for step in self.steps:
            step_inputs = [values[index] for index in step.inputs]
            values.append(step.operation(step_inputs, step.result))
        return values

    def __call__(self, *inputs: Any) -> list[Any]:
        """Returns the outputs."""
        values = self.values(*inputs)
        return [values[index] for index in self.outputs]


# The most elements a value may have. A small limit means few shapes, so few
# compilations.
LARGEST = 6
VECTOR_TYPES = st.builds(
    VectorType, st.integers(2, 4), st.sampled_from(["float32", "bfloat16"])
)


def partners(operation: Any, size: int, value_types: list[VectorType]) -> list[int]:
    """The values that `add` or `join` can combine with a value of the given size."""
    result = []
    for i, partner in enumerate(value_types):
        if operation is add and partner.size == size:
            result.append(i)
        if operation is join and partner.size + size <= LARGEST:
            result.append(i)
    return result


@st.composite
def random_programs(draw: DrawFn) -> Program:
    """Programs of up to eight steps that return two to four values."""
    value_types = draw(st.lists(VECTOR_TYPES, min_size=4, max_size=4))
    program_inputs = tuple(value_types)
    steps = []
    if draw(st.booleans()):  # a costly operation on weights alone
        steps.append(Step(running_sum, (FROZEN,), value_types[FROZEN]))
        value_types.append(value_types[FROZEN])
    for _ in range(draw(st.integers(4, 7))):
        operation = draw(st.sampled_from(CHEAP + COSTLY))
        index = draw(st.integers(0, len(value_types) - 1))
        inputs = [index]
        size, dtype = value_types[index]
        if operation in (add, join):
            candidates = partners(operation, size, value_types)
            if not candidates:
                continue  # leave this step out
            inputs.append(draw(st.sampled_from(candidates)))
            partner = value_types[inputs[1]]
            if operation is join:
                size += partner.size
            if partner.dtype != dtype:
                dtype = "float32"  # JAX promotes bfloat16
        elif operation is shorter_copy:
            size = max(1, size - 1)
            dtype = "bfloat16" if dtype == "float32" else "float32"
        elif operation is product_with_weights:
            size = draw(st.integers(2, 4))
        value_types.append(VectorType(size, dtype))
        steps.append(Step(operation, tuple(inputs), value_types[-1]))
    # Hypothesis prefers small numbers. Count from the end so that outputs tend to come
    # from the last steps, which makes most steps necessary.
    last = len(value_types) - 1
    indices = st.integers(0, last).map(lambda age: last - age)
    outputs = draw(st.lists(indices, min_size=2, max_size=4, unique=True))
    return Program(program_inputs, tuple(steps), tuple(outputs))


def listing(program: Program) -> str:
    """The program as text. Hypothesis prints it if the test fails."""
    lines = []
    labels = ["trainable", "frozen", "batch 0", "batch 1"]
    for index, (label, value_type) in enumerate(
        zip(labels, program.inputs, strict=True)
    ):
        lines.append(f"{index}: {label} -> {value_type.dtype}[{value_type.size}]")
    for index, step in enumerate(program.steps, start=FIRST_STEP):
        call = f"{step.operation.__name__}{step.inputs}"
        lines.append(f"{index}: {call} -> {step.result.dtype}[{step.result.size}]")
    lines.append(f"returns {program.outputs}")
    return "\n".join(lines)


class ValueClasses(NamedTuple):
    """The values of a program, classified by the rule in hoist's docstring."""

    late: set[int]  # depend on the trainable part
    early: set[int]  # depend on the batch, and are not late
    rebuildable: set[int]  # early results of cheap operations


def classify(program: Program) -> ValueClasses:
    late, early = {TRAINABLE}, {BATCH_0, BATCH_1}
    rebuildable: set[int] = set()
    # Weights that `rest` has to recompute at a cost: results of a costly operation, or
    # of any operation on such results.
    costly_weights: set[int] = set()
    for index, step in enumerate(program.steps, start=FIRST_STEP):
        inputs = set(step.inputs)
        is_costly = step.operation in COSTLY or bool(inputs & costly_weights)
        if inputs & late:
            late.add(index)
        elif inputs & early:
            early.add(index)
            if not is_costly:
                rebuildable.add(index)
        elif is_costly:
            costly_weights.add(index)
    return ValueClasses(late, early, rebuildable)


def needed_early_values(program: Program, classes: ValueClasses) -> set[int]:
    """The early values that are returned, or that a needed late value reads."""
    needed = set(program.outputs)
    indexed_steps = list(enumerate(program.steps, start=FIRST_STEP))
    for index, step in reversed(indexed_steps):
        if index in needed and index in classes.late:
            needed.update(step.inputs)
    return needed & classes.early


def values_to_rebuild(
    program: Program, classes: ValueClasses, kept: set[int]
) -> set[int] | None:
    """The early values that `rest` has to rebuild, or None if it cannot."""
    result = set()
    wanted = needed_early_values(program, classes) - kept
    while wanted:
        index = wanted.pop()
        if index not in classes.rebuildable:
            return None
        result.add(index)
        inputs = set(program.steps[index - FIRST_STEP].inputs) & classes.early
        wanted |= inputs - kept - result
    return result


def best_to_keep(program: Program, nbytes: list[int]) -> tuple[int, ...]:
    """The smallest set, in bytes, from which `rest` can rebuild all it needs.

    Among sets of that size, the one that leaves the fewest values to rebuild. There is
    only one, because minimum cuts form a lattice and all sizes are positive.
    """
    classes = classify(program)
    costs = {}
    for count in range(len(classes.early) + 1):
        for kept in itertools.combinations(sorted(classes.early), count):
            to_rebuild = values_to_rebuild(program, classes, set(kept))
            if to_rebuild is not None:
                total_bytes = sum(nbytes[index] for index in kept)
                costs[kept] = (total_bytes, len(to_rebuild))
    lowest = min(costs.values())
    (best,) = [kept for kept, cost in costs.items() if cost == lowest]
    return best


@settings(max_examples=examples(1))
@given(random_programs())
def test_property_hoist_keeps_a_minimum_cut(program: Program) -> None:
    note(listing(program))
    numbers = [
        normal(value_type.size, seed=i).astype(value_type.dtype)
        for i, value_type in enumerate(program.inputs)
    ]
    t, f, *batch = jax.device_put(numbers)
    once, rest = hoist_quietly(program, t, f, *batch)
    kept = once(f, *batch)

    values = program.values(t, f, *batch)
    best = best_to_keep(program, [value.nbytes for value in values])
    assert_close(sorted_arrays(kept), sorted_arrays(values[i] for i in best), 1e-5)

    assert_close(rest(t, f, kept), program(t, f, *batch), 1e-5)


# ......................................................... property: value and gradient
#
# Random programs of 3 x 3 matrices, whose operations cover many JAX features.

# Comparisons use an arbitrary threshold, so rounding is unlikely to change their
# outcome. For the same reason, `to_integers` adds an arbitrary offset.
THRESHOLD = 0.0123
OFFSET = 0.0321


def to_integers(a: Any) -> Any:
    """Maps any matrix to the integers 0, 1 and 2."""
    from_0_to_1 = jnp.abs(jnp.sin(a))
    below_3 = 2.9 * from_0_to_1 + OFFSET
    return jnp.floor(below_3).astype("int32")


def to_key(a: Any) -> Any:
    return jax.random.key(to_integers(a)[0, 0])


def matrix_product(a: Any, b: Any) -> Any:
    return jnp.tanh(a @ b)


def outer_difference(a: Any, b: Any) -> Any:
    return ((a[:, None] - b[None, :]) ** 2).mean(axis=0)


def divided_by_mean(a: Any, b: Any) -> Any:
    return a / (2 + jnp.abs(b).mean(axis=1, keepdims=True))


def sum_of_all(a: Any, b: Any) -> Any:
    return jnp.full((3, 3), a.sum() / 9)


def python_numbers(a: Any, b: Any) -> Any:
    return 0.5 * a + len(b) * 2


def integers(a: Any, b: Any) -> Any:
    return ((to_integers(a) << 2) ^ to_integers(b)).astype("float32")


def bools(a: Any, b: Any) -> Any:
    return jnp.where((a > THRESHOLD) & ~(b > THRESHOLD), a, b)


def narrow_types(a: Any, b: Any) -> Any:
    return to_integers(a).astype("int8") + b.astype("bfloat16").astype("float32")


def largest_indices(a: Any, b: Any) -> Any:
    values, indices = lax.top_k(to_integers(a), 2)
    return b.at[indices[:, 0]].add(values[:, :1] / 3)


def one_hot_rows(a: Any, b: Any) -> Any:
    return jax.nn.one_hot(to_integers(a)[0], 3) + b


def rows_by_index(a: Any, b: Any) -> Any:
    return a[to_integers(b)[0]]


def empty_rows(a: Any, b: Any) -> Any:
    return jnp.concatenate([a[:0], b[1:], a[:1]])


def reversed_elements(a: Any, b: Any) -> Any:
    return a.T.reshape(9)[::-1].reshape(3, 3) - b


def random_of_key(a: Any, b: Any) -> Any:
    first, second = jax.random.split(to_key(a))
    return jax.random.uniform(first, (3, 3)) + jax.random.uniform(second, (3, 3)) * b


def stopped_gradient(a: Any, b: Any) -> Any:
    return lax.stop_gradient(a) * b


def repeated_doubling(a: Any, b: Any) -> Any:
    steps = to_integers(b)[0, 0]
    return lax.fori_loop(0, steps, lambda _, n: 2 * n, to_integers(a)).astype("float32")


@jax.custom_jvp
def steep_sine(a: Any) -> Any:
    return jnp.sin(a)


def steep_sine_jvp(primals: Any, tangents: Any) -> Any:
    return steep_sine(*primals), 3.0 * tangents[0]


steep_sine.defjvp(steep_sine_jvp)


def with_custom_rules(a: Any, b: Any) -> Any:
    return clipped_product(steep_sine(a), b) / 3


# Wrappers that call another operation inside a transformation. Most close over `a` or
# `b`.


def jit_call(inner: Any, a: Any, b: Any) -> Any:
    return jax.jit(lambda x, y: inner(x, b) + y)(a, jnp.sin(b))


def scan_call(inner: Any, a: Any, b: Any) -> Any:
    def body(x: Any, row: Any) -> Any:
        return inner(x + row, b), x[0]

    final, rows = lax.scan(body, a, b)
    return final + rows


def cond_call(inner: Any, a: Any, b: Any) -> Any:
    return lax.cond(b[0, 0] > THRESHOLD, lambda: inner(a, b), lambda: jnp.sin(a))


def vmap_call(inner: Any, a: Any, b: Any) -> Any:
    return jax.vmap(lambda row: inner(row * a, b).mean(axis=0))(a)


def grad_call(inner: Any, a: Any, b: Any) -> Any:
    return jnp.sin(jax.grad(lambda x: inner(x, b).sum() / 9)(a))


def checkpoint_call(inner: Any, a: Any, b: Any) -> Any:
    return jax.checkpoint(inner)(a, b)


OPERATIONS = [
    matrix_product,
    outer_difference,
    divided_by_mean,
    sum_of_all,
    python_numbers,
    integers,
    bools,
    narrow_types,
    largest_indices,
    one_hot_rows,
    rows_by_index,
    empty_rows,
    reversed_elements,
    random_of_key,
    stopped_gradient,
    repeated_doubling,
    with_custom_rules,
]
CALLS = [jit_call, scan_call, cond_call, vmap_call, grad_call, checkpoint_call]


@dataclass(frozen=True)
class MatrixStep:
    """An operation on two values, called directly or by one of CALLS."""

    operation: Callable[..., Any]
    inputs: tuple[int, int]
    call: Callable[..., Any] | None


FIRST_MATRIX_STEP = 5


@dataclass(frozen=True)
class MatrixProgram:
    """Values 0 to 4 are t, f, x, y and a constant. Each step adds one value."""

    steps: tuple[MatrixStep, ...]

    def __call__(self, t: Any, f: Any, x: Any, y: Any) -> Any:
        """Returns the last value and a weighted sum of all results.

        The sum makes every step necessary.
        """
        constant = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)
        values = [t, f, x, y, constant]
        for step in self.steps:
            a, b = [jnp.asarray(values[i]) for i in step.inputs]
            if step.call is None:
                values.append(step.operation(a, b))
            else:
                values.append(step.call(step.operation, a, b))
        steps = values[FIRST_MATRIX_STEP:]
        weighted = [i * value for i, value in enumerate(steps, start=1)]
        return values[-1], sum(weighted)


@st.composite
def matrix_programs(draw: DrawFn) -> MatrixProgram:
    """Programs of two to five different operations."""
    count = draw(st.integers(2, 5))
    operations = draw(
        st.lists(
            st.sampled_from(OPERATIONS), min_size=count, max_size=count, unique=True
        )
    )
    steps = []
    for i, operation in enumerate(operations):
        last = FIRST_MATRIX_STEP + i - 1
        inputs = (draw(st.integers(0, last)), draw(st.integers(0, last)))
        call = draw(st.none() | st.sampled_from(CALLS))
        steps.append(MatrixStep(operation, inputs, call))
    return MatrixProgram(tuple(steps))


def assert_hoist_preserves(program: MatrixProgram) -> None:
    t, f, x, y = normal(4, 3, 3)
    once, rest = hoist_quietly(program, t, f, x, y)

    # Use new values, to catch values baked in at trace time.
    t, f, x, y = normal(4, 3, 3, seed=1)

    @jax.jit
    def hoisted_and_direct(t: Any, f: Any, x: Any, y: Any) -> PyTree:
        hoisted = gradient_and_outputs(lambda t: rest(t, f, once(f, x, y)), t)
        return hoisted, gradient_and_outputs(lambda t: program(t, f, x, y), t)

    hoisted, direct = hoisted_and_direct(t, f, x, y)
    assert_close(hoisted, direct, 1e-3)


@pytest.mark.parametrize("operation", OPERATIONS, ids=name_of)
def test_hoist_preserves_value_and_gradient_of(operation: Any) -> None:
    """Tries the operation alone and in each call, on early and late values in turn."""
    t, x, y = 0, 2, 3
    steps = []
    for number, call in enumerate([None, *CALLS], start=OPERATIONS.index(operation)):
        is_early = number % 2 == 0
        inputs = (x, y) if is_early else (t, x)
        steps.append(MatrixStep(operation, inputs, call))
    assert_hoist_preserves(MatrixProgram(tuple(steps)))


@settings(max_examples=examples(1 / 6))
@given(matrix_programs())
def test_property_hoist_changes_no_value_and_no_gradient(
    program: MatrixProgram,
) -> None:
    assert_hoist_preserves(program)


# --------------------------------------------------------------------------------- init


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_init_draws_truncated_normals_scaled_by_fan_in(dtype: Any) -> None:
    params = init(jax.random.key(0), [64, 256, 100], dtype)
    assert list(params) == ["linear_0", "linear_1"]
    for layer, fan_in, fan_out in [("linear_0", 64, 256), ("linear_1", 256, 100)]:
        assert_identical(params[layer]["b"], np.zeros(fan_out, dtype))
        w = params[layer]["w"]
        assert (w.shape, w.dtype) == ((fan_in, fan_out), dtype)
        # A standard normal z, given that it lies between -2 and 2, has variance
        # 1 - 4 pdf(2) / P(|z| < 2) = 1 - 4 * 0.05399 / 0.95450 = 0.7737. It lies
        # between -1 and 1 with the probability 0.68269 / 0.95450 = 0.7152.
        z = np.asarray(w, np.float64) * np.sqrt(fan_in)
        assert np.abs(z).max() <= 2
        assert abs(z.mean()) < 0.02
        assert abs(z.std() - np.sqrt(0.7737)) < 0.02
        assert abs(np.mean(np.abs(z) < 1) - 0.7152) < 0.02


def test_init_draws_different_weights_per_layer_and_key() -> None:
    params = init(jax.random.key(0), [4, 4, 4])
    others = init(jax.random.key(1), [4, 4, 4])
    first, second = params["linear_0"]["w"], params["linear_1"]["w"]
    assert not np.isin(first, second).any()
    assert not np.isin(first, others["linear_0"]["w"]).any()


def test_init_with_an_old_key_and_numpy_sizes() -> None:
    params = init(jax.random.PRNGKey(0), tuple(np.array([4, 3])))
    assert jax.tree.map(np.shape, params) == {"linear_0": {"b": (3,), "w": (4, 3)}}
    assert len(np.unique(params["linear_0"]["w"])) == 4 * 3


@pytest.mark.parametrize(
    ("sizes", "fragments"),
    [
        pytest.param([30], ["got [30]"], id="one size"),
        pytest.param([], ["got []"], id="no size"),
        pytest.param([3, 0, 2], ["got 0"], id="zero"),
        pytest.param([3, -17], ["got -17"], id="negative"),
        pytest.param([3.5, 2], ["got 3.5"], id="a float"),
        pytest.param([3, True], ["got True"], id="a bool"),
    ],
)
def test_init_rejects(sizes: Any, fragments: list[str]) -> None:
    with raises(ValueError, *fragments):
        init(jax.random.key(0), sizes)


# -------------------------------------------------------------------------------- apply


def numpy_logits(params: PyTree, x: Any) -> Any:
    """The logits in float64, applying the layers in numeric order."""
    x = np.asarray(x, np.float64)
    for i in range(len(params)):
        if i > 0:
            x = np.maximum(x, 0)
        w = np.asarray(params[f"linear_{i}"]["w"], np.float64)
        b = np.asarray(params[f"linear_{i}"]["b"], np.float64)
        x = x @ w + b
    return x


@pytest.mark.parametrize(
    ("sizes", "batch_shape"),
    [
        pytest.param([3, 6, 6, 5], (4,), id="a batch"),
        pytest.param([3, 6, 6, 5], (), id="one example"),
        pytest.param([3, 6, 6, 5], (2, 7), id="two batch axes"),
        pytest.param([3, 5], (4,), id="one layer"),
        pytest.param([3] * 13, (4,), id="linear_10 after linear_2"),
    ],
)
def test_apply(sizes: list[int], batch_shape: tuple[int, ...]) -> None:
    params = mlp(*sizes)
    x = normal(*batch_shape, 3)
    logits = jax.jit(apply)(params, x)
    assert logits.shape == (*batch_shape, sizes[-1])
    np.testing.assert_allclose(logits, numpy_logits(params, x), rtol=1e-4, atol=1e-5)


def with_layer(name: str, **leaves: Any) -> PyTree:
    """PARAMS, with some leaves of one layer replaced."""
    return PARAMS | {name: PARAMS[name] | leaves}


@pytest.mark.parametrize(
    ("params", "x", "fragments"),
    [
        pytest.param(
            PARAMS, normal(4, 2), ["linear_0 needs", "got shape (4, 2)"], id="x narrow"
        ),
        pytest.param(
            PARAMS, normal(4, 5), ["linear_0 needs", "got shape (4, 5)"], id="x wide"
        ),
        pytest.param(
            PARAMS, np.float32(1), ["linear_0 needs", "got shape ()"], id="x a number"
        ),
        pytest.param(
            with_layer("linear_1", w=normal(5, 6)),
            INPUTS,
            ["linear_1 needs", "width 5", "got shape (4, 6)"],
            id="inner width",
        ),
        pytest.param(
            with_layer("linear_1", b=normal(1)),
            INPUTS,
            ["linear_1 has", "b of shape (1,)"],
            id="bias narrow",
        ),
        pytest.param(
            with_layer("linear_1", b=normal(7)),
            INPUTS,
            ["linear_1 has", "b of shape (7,)"],
            id="bias wide",
        ),
        pytest.param(
            with_layer("linear_2", b=HOLE), INPUTS, ["linear_2 has holes"], id="a hole"
        ),
        pytest.param({"a": 1}, INPUTS, ["but are 'a'"], id="a different name"),
        pytest.param({}, INPUTS, ["but are nothing"], id="no layer"),
        pytest.param(
            LAYERS, INPUTS, ["'linear_1', 'linear_10'"], id="linear_2 missing"
        ),
        pytest.param(BLOCKS, INPUTS, ["300 in all"], id="300 different names"),
    ],
)
def test_apply_rejects(params: PyTree, x: Any, fragments: list[str]) -> None:
    with raises(ValueError, *fragments):
        apply(params, x)


# ------------------------------------------------------------------------------ loss_fn


def numpy_loss(params: PyTree, x: Any, y: Any) -> float:
    """Mean cross-entropy in float64. Out-of-range labels contribute zero loss."""
    logits = numpy_logits(params, x)
    log_normalizer = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    log_probabilities = logits - log_normalizer
    is_label = np.asarray(y)[..., None] == np.arange(logits.shape[-1])
    return float(-(log_probabilities * is_label).sum() / np.size(y))


def numpy_gradients(
    params: PyTree = PARAMS,
    x: Any = INPUTS,
    y: Any = LABELS,
    loss: Callable[..., float] = numpy_loss,
) -> PyTree:
    """The gradients of a loss, by central differences in float64."""
    params = jax.tree.map(lambda leaf: np.array(leaf, np.float64), params)
    gradients = jax.tree.map(np.zeros_like, params)
    for leaf, gradient in pair_leaves(params, gradients):
        for index in np.ndindex(leaf.shape):
            value = leaf[index]
            leaf[index] = value + 1e-6
            above = loss(params, x, y)
            leaf[index] = value - 1e-6
            below = loss(params, x, y)
            leaf[index] = value
            gradient[index] = (above - below) / 2e-6
    return gradients


@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param(INPUTS, LABELS, id="a batch"),
        pytest.param(INPUTS[0], LABELS[0], id="one example"),
        pytest.param(INPUTS[None], LABELS[None], id="two batch axes"),
        pytest.param(INPUTS, LABELS.tolist(), id="a list of labels"),
        pytest.param(INPUTS, np.array([3, -1, 5, 99]), id="labels out of range"),
        pytest.param(INPUTS, LABELS.astype("int8"), id="int8"),
        pytest.param(INPUTS, LABELS.astype("uint8"), id="uint8"),
    ],
)
def test_loss_fn(x: Any, y: Any) -> None:
    trainable, frozen = partition("*/b", PARAMS)
    loss = jax.jit(loss_fn)(trainable, frozen, x, y)
    assert (loss.shape, loss.dtype) == ((), "float32")
    np.testing.assert_allclose(loss, numpy_loss(PARAMS, x, y), rtol=1e-5)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(np.array([0, 64, 200], np.uint8), id="uint8"),
        pytest.param(np.array([-1, 5, 127], np.int8), id="int8"),
    ],
)
def test_loss_fn_of_more_classes_than_the_labels_have_values(labels: Any) -> None:
    params = mlp(3, 320)
    loss = jax.jit(loss_fn)(*partition("*", params), INPUTS[:3], labels)
    want = numpy_loss(params, INPUTS[:3], labels.astype(np.int64))
    np.testing.assert_allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize("strict_setting", ["x64"], indirect=True)
@pytest.mark.usefixtures("strict_setting")
def test_loss_fn_does_not_shorten_labels_of_64_bits() -> None:
    out_of_range = LABELS.astype(np.int64) + 2**32
    assert loss_fn(*partition("*", PARAMS), INPUTS, out_of_range) == 0


@pytest.mark.parametrize(
    "count",
    [
        # The largest finite float16 is 65,504, and the mean loss is about 2.4.
        pytest.param(28_000, id="sum of losses overflows"),
        pytest.param(70_000, id="count overflows"),
    ],
)
def test_loss_fn_in_float16_does_not_overflow(count: int) -> None:
    params = jax.tree.map(np.float16, mlp(1, 10))
    x = normal(count, 1).astype(np.float16)
    y = np.arange(count) % 10
    loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(*partition("*", params), x, y)
    assert loss.dtype == "float16"
    np.testing.assert_allclose(loss, numpy_loss(params, x, y), rtol=2e-3)

    # The gradient with respect to the logits: (probabilities - one-hot labels) / count.
    exponentials = np.exp(numpy_logits(params, x))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    errors = (probabilities - np.eye(10)[y]) / count
    want = {"b": errors.sum(axis=0), "w": np.float64(x).T @ errors}
    assert_close(gradient, {"linear_0": as_dtype(want, np.float16)}, 2e-3)
    assert np.abs(want["b"]).max() > 0.02
    assert np.abs(want["w"]).max() > 0.02


def numpy_loss_without_class_2(params: PyTree, x: Any, y: Any) -> float:
    """The loss of PARAMS without class 2, which is the label of no example."""
    last = {
        "b": np.delete(params["linear_2"]["b"], 2),
        "w": np.delete(params["linear_2"]["w"], 2, axis=1),
    }
    return numpy_loss(params | {"linear_2": last}, x, np.where(y > 2, y - 1, y))


def test_loss_fn_with_a_logit_of_minus_infinity_for_a_different_class() -> None:
    params = with_layer("linear_2", b=vector(0, 0, -math.inf, 0, 0))
    trainable, frozen = partition("linear_2", params)
    loss_and_gradient = jax.jit(jax.value_and_grad(loss_fn))
    loss, gradient = loss_and_gradient(trainable, frozen, INPUTS, LABELS)
    without = numpy_loss_without_class_2
    np.testing.assert_allclose(loss, without(params, INPUTS, LABELS), rtol=1e-5)
    want, _ = partition("linear_2", numpy_gradients(params, loss=without))
    assert_close(gradient, as_dtype(want, np.float32), 1e-5)


def test_loss_fn_gives_the_gradients_of_numpy() -> None:
    trainable, frozen = partition("*", PARAMS)
    gradients = jax.jit(jax.grad(loss_fn))(trainable, frozen, INPUTS, LABELS)
    want = jax.tree.map(np.float32, numpy_gradients())
    assert_close(gradients, want, 1e-5)


def test_loss_fn_gives_gradients_per_example() -> None:
    trainable, frozen = partition("*", PARAMS)
    gradient = jax.vmap(jax.grad(loss_fn), in_axes=(None, None, 0, 0))
    per_example = jax.jit(gradient)(trainable, frozen, INPUTS, LABELS)
    mean = jax.tree.map(lambda leaf: np.mean(leaf, axis=0), per_example)
    assert_close(mean, jax.tree.map(np.float32, numpy_gradients()), 1e-5)


@pytest.mark.parametrize(
    ("y", "error", "fragments"),
    [
        pytest.param(LABELS * 1.5, TypeError, ["integers, got float"], id="floats"),
        pytest.param(LABELS[:3], ValueError, ["(3,)", "(4, 5)"], id="too few labels"),
        pytest.param(LABELS[:, None], ValueError, ["(4, 1)"], id="a column of labels"),
    ],
)
def test_loss_fn_rejects_labels(
    y: Any, error: type[Exception], fragments: list[str]
) -> None:
    trainable, frozen = partition("linear_1", PARAMS)
    with raises(error, *fragments):
        loss_fn(trainable, frozen, INPUTS, y)
    with raises(error, *fragments):
        train_step(trainable, frozen, INPUTS, y)


def test_loss_fn_rejects_the_same_part_twice() -> None:
    trainable, _ = partition("linear_1", PARAMS)
    with raises(ValueError, "linear_1/w", "linear_0/b"):
        loss_fn(trainable, trainable, INPUTS, LABELS)


# ----------------------------------------------------------------------------- sgd_step


@pytest.mark.parametrize(
    ("params", "grads", "lr", "result"),
    [
        pytest.param([vector(1, 2)], [vector(10, -10)], 0.5, [vector(-4, 7)], id="lr"),
        pytest.param(
            {"a": 3.0}, {"a": 1.0}, 0.5, {"a": np.float32(2.5)}, id="a number"
        ),
        pytest.param([HOLE, None], [HOLE, None], 0.5, [HOLE, None], id="no leaf"),
        pytest.param(
            [jnp.array([1, 3], jnp.bfloat16)],
            [jnp.array([0.5, -2], jnp.bfloat16)],
            jnp.float32(0.5),
            [jnp.array([0.75, 4], jnp.bfloat16)],
            id="bfloat16 and a float32 lr",
        ),
        pytest.param(
            [np.array([1, 3], np.float16)],
            [np.array([0.5, -2], np.float32)],
            np.float64(0.5),
            [np.array([0.75, 4], np.float16)],
            id="float32 gradients of float16",
        ),
    ],
)
def test_sgd_step(params: PyTree, grads: PyTree, lr: Any, result: PyTree) -> None:
    assert_close(sgd_step(params, grads, lr), result)


def test_sgd_step_default_lr() -> None:
    assert_close(sgd_step([vector(1)], [vector(10)]), [vector(0)])


@pytest.mark.parametrize(
    ("params", "grads", "lr", "error", "fragments"),
    [
        pytest.param(
            {"w": vector(1)},
            {"w": HOLE},
            0.1,
            ValueError,
            ["'w' is missing from grads"],
            id="a hole for a leaf",
        ),
        pytest.param(
            {"w": vector(1, 2)},
            {"w": vector(1, 2)},
            np.ones((3, 1)),
            ValueError,
            ["'w' has shape (2,)", "lr has shape (3, 1)"],
            id="lr of a different shape",
        ),
        pytest.param(
            {"w": np.float32(1)},
            {"w": vector(1, 2)},
            0.1,
            ValueError,
            ["'w' has shape (), but its gradient has shape (2,)"],
            id="a gradient of a different shape",
        ),
        pytest.param(
            {"w": vector(1, 2, 3)},
            {"w": np.ones((2, 3), np.float32)},
            0.1,
            ValueError,
            ["'w' has shape (3,), but its gradient has shape (2, 3)"],
            id="a gradient with a batch axis",
        ),
        pytest.param(
            {"w": np.array([1])},
            {"w": np.array([1])},
            0.1,
            TypeError,
            ["'w' is int32"],
            id="integers",
        ),
        pytest.param(
            {"w": np.array([1j])},
            {"w": np.array([1j])},
            0.1,
            TypeError,
            ["'w' is complex64"],
            id="complex",
        ),
    ],
)
def test_sgd_step_rejects(
    params: PyTree, grads: PyTree, lr: Any, error: type[Exception], fragments: list[str]
) -> None:
    with raises(error, *fragments):
        sgd_step(params, grads, lr)


# --------------------------------------------------------------------------- train_step


@pytest.mark.parametrize("where", ["linear_0", "linear_1", "linear_2", "*/b", "*"])
def test_train_step_moves_the_trainable_leaves_by_their_gradient(where: str) -> None:
    trainable, frozen = partition(where, PARAMS)
    after, loss = train_step(trainable, frozen, INPUTS, LABELS, 0.3)
    np.testing.assert_allclose(loss, numpy_loss(PARAMS, INPUTS, LABELS), rtol=1e-5)
    gradients, _ = partition(where, numpy_gradients())
    want = jax.tree.map(
        lambda leaf, g: leaf - 0.3 * np.float32(g), trainable, gradients
    )
    assert_close(after, want, 1e-5)
    assert changed(PARAMS, merge(after, frozen)) == leaf_names(trainable)


def test_train_step_has_a_learning_rate_of_a_tenth_by_default() -> None:
    trainable, frozen = partition("linear_2", PARAMS)
    after, _ = train_step(trainable, frozen, INPUTS, LABELS)
    want, _ = train_step(trainable, frozen, INPUTS, LABELS, 0.1)
    assert_identical(after, want)


def test_train_step_of_nothing_trainable() -> None:
    everything, nothing = partition("*", PARAMS)
    after, loss = train_step(nothing, everything, INPUTS, LABELS)
    assert after == nothing
    np.testing.assert_allclose(loss, numpy_loss(PARAMS, INPUTS, LABELS), rtol=1e-5)


def test_train_step_donates_nothing() -> None:
    trainable, frozen = jax.device_put(partition("linear_1", PARAMS))
    train_step(trainable, frozen, INPUTS, LABELS)
    train(trainable, frozen, INPUTS[None], LABELS[None])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((trainable, frozen)))


def test_train_step_that_donates_deletes_only_the_trainable_leaves() -> None:
    params = jax.device_put(PARAMS)
    trainable, frozen = partition("linear_2", params)
    undecorated = inspect.unwrap(train_step)  # the function under jax.jit
    donating = jax.jit(undecorated, donate_argnums=0)
    donating(trainable, frozen, INPUTS, LABELS)
    deleted = [
        name for name, leaf in leaves_by_name(params).items() if leaf.is_deleted()
    ]
    assert deleted == ["linear_2/b", "linear_2/w"]


def test_train_step_computes_no_gradient_of_a_frozen_weight() -> None:
    # Of all arrays, only the weights of linear_1 and their gradient are 6 x 6.
    def results_of_that_shape(where: str) -> list[str]:
        trainable, frozen = partition(where, PARAMS)
        program = str(jax.make_jaxpr(train_step)(trainable, frozen, INPUTS, LABELS))
        return re.findall(r":f32\[6,6\] = (\w+)", program)

    assert results_of_that_shape("linear_2") == []
    assert "dot_general" in results_of_that_shape("linear_1")


def test_train_step_is_traced_once_and_reads_the_frozen_part_in_every_step() -> None:
    for where in ["linear_0", "linear_1"]:
        trainable, frozen = jax.device_put(partition(where, PARAMS))
        trainable, _ = train_step(trainable, frozen, INPUTS, LABELS, 0.1)
        frozen = jax.tree.map(lambda leaf: 2 * leaf, frozen)
        with jax.no_tracing(True):  # retracing would raise
            _, loss = train_step(trainable, frozen, INPUTS, LABELS, 0.2)
        want = numpy_loss(merge(trainable, frozen), INPUTS, LABELS)
        np.testing.assert_allclose(loss, want, rtol=1e-5)


def as_dtype(tree: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), tree)


@pytest.mark.parametrize("bfloat16_leaves", ["linear_1", "linear_2", "*"])
def test_train_step_keeps_every_dtype(bfloat16_leaves: str) -> None:
    bfloat16, float32 = partition(bfloat16_leaves, PARAMS)
    params = merge(as_dtype(bfloat16, jnp.bfloat16), float32)
    trainable, frozen = partition("linear_2", params)
    after, _ = train_step(trainable, frozen, INPUTS, LABELS, jnp.float32(1))
    gradients, _ = partition("linear_2", numpy_gradients(params))
    want = jax.tree.map(
        lambda leaf, g: (leaf - g).astype(leaf.dtype), trainable, gradients
    )
    assert_close(after, want, 0.02)
    assert changed(params, merge(after, frozen)) == leaf_names(trainable)


@pytest.mark.usefixtures("strict_setting")
def test_train_step_under_strict_settings() -> None:
    trainable, frozen = partition("linear_2", PARAMS)
    after, loss = train_step(trainable, frozen, INPUTS, LABELS, 0.3)
    gradients, _ = partition("linear_2", numpy_gradients())
    want = jax.tree.map(
        lambda leaf, g: leaf - np.float32(0.3 * g), trainable, gradients
    )
    assert_close(after, want, 1e-5)
    np.testing.assert_allclose(loss, numpy_loss(PARAMS, INPUTS, LABELS), rtol=1e-5)


@pytest.mark.parametrize(
    ("trainable", "fragments"),
    [
        pytest.param(
            as_dtype(PARAMS, np.int32), ["'linear_0/b' is int32"], id="integers"
        ),
        pytest.param(
            as_dtype(PARAMS, np.complex64), ["'linear_0/b' is complex64"], id="complex"
        ),
        pytest.param(
            {"key": jax.eval_shape(jax.random.key, 0)},
            ["'key' is key<"],
            id="a random key",
        ),
    ],
)
def test_train_step_rejects_leaves_that_are_not_floating(
    trainable: PyTree, fragments: list[str]
) -> None:
    frozen = jax.tree.map(lambda leaf: HOLE, trainable)
    with raises(TypeError, *fragments):
        jax.eval_shape(train_step, trainable, frozen, INPUTS, LABELS)


# -------------------------------------------------------------------------------- train


def batches() -> tuple[Any, Any]:
    """Six batches of four examples."""
    return normal(6, 4, 3), np.arange(24, dtype=np.int32).reshape(6, 4) % 5


def numpy_train(where: str, xs: Any, ys: Any, lr: float) -> tuple[PyTree, list[float]]:
    """The trained part of PARAMS and the losses, in float64."""
    trainable, frozen = partition(where, as_dtype(PARAMS, np.float64))
    losses = []
    for x, y in zip(xs, ys, strict=True):
        params = merge(trainable, frozen)
        losses.append(numpy_loss(params, x, y))
        gradients, _ = partition(where, numpy_gradients(params, x, y))
        trainable = jax.tree.map(lambda leaf, g: leaf - lr * g, trainable, gradients)
    return trainable, losses


@pytest.mark.parametrize(
    "batch_shape",
    [pytest.param((4,), id="one batch axis"), pytest.param((2, 2), id="two")],
)
def test_train_takes_one_step_per_batch(batch_shape: tuple[int, ...]) -> None:
    xs, ys = batches()
    xs, ys = xs.reshape(6, *batch_shape, 3), ys.reshape(6, *batch_shape)
    trainable, frozen = partition("linear_1", PARAMS)
    after, losses = train(trainable, frozen, xs, ys, 0.3)
    want, want_losses = numpy_train("linear_1", xs, ys, 0.3)
    assert_close(after, as_dtype(want, np.float32), 1e-5)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)


def test_train_is_traced_once_per_frozen_set() -> None:
    for where in ["linear_0", "linear_1"]:
        trainable, frozen = jax.device_put(partition(where, PARAMS))
        trainable, _ = train(trainable, frozen, *batches(), 0.1)
        with jax.no_tracing(True):
            train(trainable, frozen, *batches(), 0.2)


@pytest.mark.parametrize(
    ("xs", "ys", "fragments"),
    [
        pytest.param(INPUTS, LABELS, ["(4, 3)", "(4,)"], id="one batch"),
        pytest.param(
            INPUTS[None], np.stack([LABELS] * 2), ["(2, 4)"], id="more labels"
        ),
        pytest.param(
            np.stack([INPUTS] * 2), LABELS[None], ["(1, 4)"], id="fewer labels"
        ),
    ],
)
def test_train_rejects(xs: Any, ys: Any, fragments: list[str]) -> None:
    trainable, frozen = partition("linear_1", PARAMS)
    with raises(ValueError, *fragments):
        train(trainable, frozen, xs, ys)


# ------------------------------------------------------------------------------ dataset


def test_dataset_shapes_and_dtypes() -> None:
    xs, ys = dataset(jax.random.key(0), 200, batch_size=7, num_classes=9)
    assert xs.shape == (200, 7, 1)
    assert xs.dtype == jnp.float32
    assert ys.shape == (200, 7)
    assert ys.dtype == jnp.int32
    np.testing.assert_array_equal(xs[..., 0], ys)


def test_dataset_draws_every_batch_without_replacement() -> None:
    _, ys = dataset(jax.random.key(0), 200, batch_size=7, num_classes=9)
    assert {len(set(row)) for row in ys.tolist()} == {7}
    assert set(ys.ravel().tolist()) == set(range(9))
    different_rows = {frozenset(row) for row in ys.tolist()}
    assert len(different_rows) > 30  # of the 36 ways to choose 7 of 9


def test_dataset_defaults() -> None:
    _, ys = dataset(jax.random.key(0), 4)
    assert np.sort(ys).tolist() == 4 * [list(range(10))]


def test_dataset_depends_on_the_key() -> None:
    first, second = [dataset(jax.random.key(seed), 4)[1] for seed in (0, 1)]
    assert (first != second).any(axis=1).all()


@pytest.mark.parametrize(
    ("sizes", "fragments"),
    [
        pytest.param([-1], ["num_records must be", "got -1"], id="no records"),
        pytest.param([5, 0], ["batch_size must be", "got 0"], id="empty batches"),
        pytest.param([5, 2, 2.5], ["num_classes must be", "got 2.5"], id="a float"),
        pytest.param(
            [5, 11],
            ["batch_size 11", "num_classes 10"],
            id="more than there are classes",
        ),
    ],
)
def test_dataset_rejects(sizes: list[Any], fragments: list[str]) -> None:
    with raises(ValueError, *fragments):
        dataset(jax.random.key(0), *sizes)


# --------------------------------------------------------------------------------- main


def run_main(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """The lines that the walk-through prints."""
    minifreeze.main(list(argv))
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out.splitlines()


def section(lines: list[str], title: str) -> list[str]:
    """The lines below a title, up to the next blank line."""
    below = lines[lines.index(title) + 1 :]
    return below[: below.index("")]


def guesses(params: PyTree, numbers: range) -> list[str]:
    """What main prints for a network: the class with the largest logit per number."""
    inputs = np.array(numbers)[:, None]
    labels = numpy_logits(params, inputs).argmax(axis=-1)
    return [f"{n} -> {label}" for n, label in zip(numbers, labels, strict=True)]


def four_steps(seed: int) -> tuple[PyTree, PyTree, Any]:
    """The parameters before and after four steps of main, and the losses."""
    init_key, data_key = jax.random.split(jax.random.key(seed))
    before = init(init_key, [1, 300, 100, 10])
    trainable, frozen = partition("!linear_1", before)
    trainable, losses = train(trainable, frozen, *dataset(data_key, 4))
    return before, merge(trainable, frozen), losses


def test_main_takes_ten_thousand_steps_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Called(Exception):
        pass

    def fake_dataset(key: Any, num_records: int) -> Any:
        assert num_records == 10_000
        raise Called

    monkeypatch.setattr(minifreeze, "dataset", fake_dataset)
    with pytest.raises(Called):
        minifreeze.main([])


def test_main_learns_the_identity(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_main(capsys)
    learned = [f"{number} -> {number}" for number in range(10)]
    assert section(lines, "after training") == learned
    assert section(lines, "before training") != learned
    largest_class = 9
    answers = [f"{number} -> {largest_class}" for number in range(10, 20)]
    assert section(lines, "out of range") == answers


def test_main_prints_what_its_functions_compute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = run_main(capsys, "--steps", "4", "--seed", str(2**32 - 1))

    before, after, losses = four_steps(seed=2**32 - 1)
    trainable, frozen = partition("!linear_1", before)
    table = summary(trainable=trainable, frozen=frozen).splitlines()

    assert section(lines, "before training") == guesses(before, range(10))
    assert section(lines, "after training") == guesses(after, range(10))
    assert section(lines, "out of range") == guesses(after, range(10, 20))
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table
    (report,) = [line for line in lines if "loss" in line]
    assert [f"{losses[0]:.6f}", f"{losses[-1]:.6f}"] == re.findall(r"\d+\.\d+", report)
    # "changed: linear_0/b, ..." and "unchanged, bit for bit: linear_1/b, ..."
    assert re.findall(r"linear_\d/\w", lines[-2]) == leaf_names(trainable)
    assert re.findall(r"linear_\d/\w", lines[-1]) == leaf_names(frozen)


@pytest.mark.parametrize(
    "argv", [["--steps", "1"], ["--steps", "10000000"], ["--seed", "0"]]
)
def test_main_accepts(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Accepted(Exception):
        pass

    def start(*sizes: Any) -> None:
        raise Accepted

    monkeypatch.setattr(minifreeze, "init", start)
    with pytest.raises(Accepted):
        minifreeze.main(argv)


def test_main_of_the_file_run_as_a_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minifreeze.py", "--steps", "1"])
    runpy.run_path(minifreeze.__file__, run_name="__main__")
    assert "before training" in capsys.readouterr().out


def assert_main_rejects(
    capsys: pytest.CaptureFixture[str], argv: list[str], *fragments: str
) -> None:
    """Asserts that main exits with status 2 before training, and what it prints."""
    with pytest.raises(SystemExit) as caught:
        minifreeze.main(argv)
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert [fragment for fragment in fragments if fragment not in printed.err] == [], (
        printed.err
    )
    assert printed.out == ""


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        pytest.param(["--steps", "0"], "10,000,000, got 0", id="no steps"),
        pytest.param(["--steps", "10000001"], "got 10000001", id="too many steps"),
        pytest.param(
            ["--steps", "x"], "invalid int value: 'x'", id="steps not a number"
        ),
        pytest.param(["--seed", "-1"], "got -1", id="negative seed"),
        pytest.param(["--seed", "4294967296"], "got 4294967296", id="seed of 33 bits"),
        pytest.param(["--seed", "8589934592"], "got 8589934592", id="seed of 34 bits"),
        pytest.param(["--speed", "1"], "arguments: --speed", id="unknown option"),
    ],
)
def test_main_rejects(
    argv: list[str], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_main_rejects(capsys, argv, fragment)


# -------------------------------------------------------------------------- main --plot
#
# These tests run without matplotlib: a stand-in records the calls.


class FakeAxes:
    """One picture in a figure."""

    def __init__(self) -> None:
        self.labels: dict[str, Any] = {}

    def set(self, **labels: Any) -> None:
        self.labels = labels

    def imshow(self, picture: Any, **options: Any) -> FakeAxes:
        self.picture = picture
        self.limits = (options["vmin"], options["vmax"])
        return self


class FakeFigure:
    """Stands in for matplotlib.figure.Figure."""

    saved: FakeFigure | None = None

    def __init__(self, figsize: tuple[float, float] = (0, 0), layout: str = "") -> None:
        self.canvas = self  # it also stands in for the canvas
        self.size = figsize

    def get_supported_filetypes(self) -> dict[str, str]:
        return {"png": "Portable Network Graphics", "pdf": "Portable Document Format"}

    def subplots(self, rows: int, columns: int) -> Any:
        self.axes = [[FakeAxes() for _ in range(columns)] for _ in range(rows)]
        return np.array(self.axes)

    def colorbar(self, image: FakeAxes, ax: list[FakeAxes], location: str) -> None:
        assert image in ax

    def savefig(self, file: Path, **options: Any) -> None:
        file.write_text("the new picture")
        FakeFigure.saved = self


@pytest.fixture
def fake_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("matplotlib.figure")
    vars(module)["Figure"] = FakeFigure
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    monkeypatch.setattr(FakeFigure, "saved", None)


@pytest.mark.usefixtures("fake_matplotlib")
def test_plot_draws_every_parameter_before_and_after(tmp_path: Path) -> None:
    file = tmp_path / "params.PNG"  # uppercase suffixes are accepted
    file.write_text("the old picture")
    minifreeze.main(["--steps", "4", "--plot", str(file)])
    assert file.read_text() == "the new picture"
    assert os.listdir(tmp_path) == ["params.PNG"]

    before, after, _ = four_steps(seed=42)
    _, frozen = partition("!linear_1", before)

    assert FakeFigure.saved is not None
    width, height = FakeFigure.saved.size
    assert 2 < width / len(leaf_names(before)) < 3  # inches per parameter
    assert 2 < height / 2 < 3
    row_before, row_after = FakeFigure.saved.axes
    assert len(row_before) == len(leaf_names(before))
    for i, name in enumerate(leaf_names(before)):
        above, below = row_before[i], row_after[i]
        np.testing.assert_array_equal(
            above.picture, np.atleast_2d(leaves_by_name(before)[name])
        )
        np.testing.assert_array_equal(
            below.picture, np.atleast_2d(leaves_by_name(after)[name])
        )

        state = "frozen" if name in leaf_names(frozen) else "trainable"
        assert above.labels["title"] == below.labels["title"] == f"{name}\n{state}"
        assert above.labels["xlabel"] == "before"
        assert below.labels["xlabel"] == "after"

        # Both pictures share a color scale centered on zero.
        largest = max(np.abs(above.picture).max(), np.abs(below.picture).max())
        largest = largest or 1.0  # a parameter that is all zeros
        assert above.limits == below.limits == (-largest, largest)


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.mark.usefixtures("no_matplotlib")
def test_main_without_plot_does_not_need_matplotlib() -> None:
    minifreeze.main(["--steps", "1"])


@pytest.mark.usefixtures("no_matplotlib")
def test_plot_without_matplotlib_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_main_rejects(capsys, ["--plot", "x.png"], "pip install matplotlib")


@pytest.mark.usefixtures("fake_matplotlib")
def test_plot_rejects_a_folder_that_is_not_writable_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def reject(**options: Any) -> None:
        raise PermissionError

    monkeypatch.setattr("tempfile.TemporaryFile", reject)
    file = str(tmp_path / "x.png")
    assert_main_rejects(capsys, ["--plot", file], file, "not writable")


@pytest.mark.usefixtures("fake_matplotlib")
@pytest.mark.parametrize(
    ("file", "fragments"),
    [
        pytest.param(
            "picture", ["picture: the suffix must be one of png, pdf"], id="no suffix"
        ),
        pytest.param(
            "picture.xyz",
            ["picture.xyz: the suffix must be one of png, pdf"],
            id="unknown suffix",
        ),
        pytest.param(
            "missing/x.png", ["x.png: the folder does not exist"], id="no such folder"
        ),
        pytest.param("folder.png", ["folder.png: the path is a folder"], id="a folder"),
    ],
)
def test_plot_rejects(
    file: str,
    fragments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    assert_main_rejects(capsys, ["--plot", file], *fragments)
    assert os.listdir(tmp_path) == ["folder.png"]


@pytest.mark.usefixtures("fake_matplotlib")
def test_plot_that_fails_halfway_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill_the_disk(self: FakeFigure, file: Path, **options: Any) -> None:
        file.write_text("half a pic")
        raise OSError("no space left")

    monkeypatch.setattr(FakeFigure, "savefig", fill_the_disk)
    file = tmp_path / "params.png"
    file.write_text("the old picture")
    with pytest.raises(SystemExit) as caught:
        minifreeze.main(["--steps", "1", "--plot", str(file)])
    assert caught.value.code == 2
    assert "no space left" in capsys.readouterr().err
    assert file.read_text() == "the old picture"
    assert os.listdir(tmp_path) == ["params.png"]


# --------------------------------------------------------------------------- the module

TOOL = ["Hole", "partition", "mask", "merge", "summary", "warm_start", "hoist"]
WALK_THROUGH = [
    "init",
    "apply",
    "loss_fn",
    "sgd_step",
    "train_step",
    "train",
    "dataset",
]
WITHOUT_EXAMPLES = ["Hole", "train_step", "train"]


def run_examples(module: Any, name: str) -> tuple[int, int]:
    """Runs the examples in one docstring. Returns how many ran and how many failed."""
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner()
    for test in finder.find(getattr(module, name), name, globs=vars(module).copy()):
        runner.run(test)
    return runner.tries, runner.failures


@pytest.mark.parametrize("name", TOOL + WALK_THROUGH)
def test_docstring_examples(name: str) -> None:
    assert getattr(minifreeze, name).__doc__
    count, failures = run_examples(minifreeze, name)
    assert failures == 0
    assert (count == 0) == (name in WITHOUT_EXAMPLES)


def test_the_library_works_without_the_walk_through(tmp_path: Path) -> None:
    text = Path(minifreeze.__file__).read_text(encoding="utf-8")
    tool_text, _ = re.split(r"(?m)^# .*the walk-through.*$", text, maxsplit=1)
    file = tmp_path / "tool.py"
    file.write_text(tool_text, encoding="utf-8")
    with imported("tool", file) as tool:
        assert tool.__all__ == TOOL
        for name in TOOL:
            _, failures = run_examples(tool, name)
            assert failures == 0


def test_public_names_are_in_the_order_of_the_file() -> None:
    assert minifreeze.__all__ == TOOL + WALK_THROUGH
    text = Path(minifreeze.__file__).read_text(encoding="utf-8")
    defined = re.findall(r"(?m)^(?:def|class) ([A-Za-z]\w*)", text)
    public = [name for name in defined if name in minifreeze.__all__]
    assert public == minifreeze.__all__


COPIED_INTO_A_PACKAGE = """
import sys
import jax, jax.numpy as jnp, numpy
before = set(sys.modules)
from their_project import freezing

new = {name.split(".")[0] for name in set(sys.modules) - before}
allowed = {*sys.stdlib_module_names, "jax", "jaxlib", "numpy", "scipy", "their_project"}
assert new <= allowed, new - allowed

# JAX rejects this option once its backends are initialized, so this proves that
# importing does not initialize them.
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count("cpu") == 3

params = freezing.init(jax.random.key(0), [1, 4, 10])
trainable, frozen = freezing.partition("linear_1", params)
x, y = jnp.ones((2, 1)), jnp.arange(2)
trainable, loss = freezing.train_step(trainable, frozen, x, y)
print(sorted(freezing.merge(trainable, frozen)), freezing.__version__)
"""


def test_a_copy_in_a_package_needs_jax_and_numpy_alone(tmp_path: Path) -> None:
    package = tmp_path / "their_project"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "freezing.py").write_bytes(Path(minifreeze.__file__).read_bytes())
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    del environment["XLA_FLAGS"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COPIED_INTO_A_PACKAGE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == f"['linear_0', 'linear_1'] {minifreeze.__version__}\n"


# --------------------------------------------------- situations from public bug reports


def lora(layer: PyTree, x: Any) -> Any:
    return x @ layer["w"] + (x @ layer["a"]) @ layer["b"]


def lora_by_merged_weights(layer: PyTree, x: Any) -> Any:
    return x @ (layer["w"] + layer["a"] @ layer["b"])


def lora_parts() -> tuple[PyTree, PyTree]:
    """Four layers of 64 x 64 with adapters of rank 4. Only the adapters train."""
    layer = {"w": abstract(64, 64), "a": abstract(64, 4), "b": abstract(4, 64)}
    return partition(["*/a", "*/b"], [layer] * 4)


def lora_gradient(layer_fn: Any) -> Any:
    def loss(trainable: PyTree, frozen: PyTree, x: Any) -> Any:
        for layer in merge(trainable, frozen):
            x = layer_fn(layer, x)
        return jnp.mean(x**2)

    return jax.grad(loss)


def all_reduced_bytes(layer_fn: Any) -> int:
    """The number of bytes one step all-reduces across eight devices."""
    rows = sharding_of_rows(8)
    replicated = jax.sharding.NamedSharding(rows.mesh, jax.sharding.PartitionSpec())
    step = jax.jit(lora_gradient(layer_fn), in_shardings=(replicated, replicated, rows))
    program = str(step.lower(*lora_parts(), abstract(16, 64)).compile().as_text())
    total = 0
    for result in re.findall(r"= (.*) all-reduce\(", program):
        for shape in re.findall(r"f32\[([\d,]*)\]", result):
            total += 4 * math.prod(int(size) for size in shape.split(",") if size)
    return total


def test_report_lora_step_sends_only_the_gradients_of_the_adapters() -> None:
    # keras #19496: data-parallel training must not all-reduce gradients of the base.
    adapters = 4 * (2 * 64 * 4) * 4  # layers, elements, bytes
    base = 4 * (64 * 64) * 4
    assert all_reduced_bytes(lora) == adapters
    assert all_reduced_bytes(lora_by_merged_weights) >= base


@pytest.mark.usefixtures("fully_optimized")
def test_report_lora_step_needs_no_memory_of_the_size_of_the_base() -> None:
    # quax #28, jax #23316
    step = jax.jit(lora_gradient(lora))
    program: Any = step.lower(*lora_parts(), abstract(1, 64)).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 64 * 4


def test_report_float32_adapters_of_a_float16_base_learn() -> None:
    # needle #53: the adapters must stay float32, and the loss must stay finite.
    layer = {
        "w": normal(8, 8).astype("float16"),
        "a": normal(8, 2),
        "b": np.zeros((2, 8), np.float32),
    }
    trainable, frozen = partition(["a", "b"], layer)
    x, y = normal(16, 8, seed=1), normal(16, 8, seed=2)

    def loss(trainable: PyTree, frozen: PyTree) -> Any:
        return jnp.mean((lora(merge(trainable, frozen), x) - y) ** 2)

    def step(trainable: PyTree, _: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(trainable, frozen)
        return sgd_step(trainable, gradients, 0.02), value

    trained, losses = lax.scan(step, trainable, None, length=200)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] / 2


if __name__ == "__main__":
    # pytest would warn that Hypothesis is already imported.
    ignored = "ignore::pytest.PytestAssertRewriteWarning"
    sys.exit(pytest.main(["-W", ignored, __file__, *sys.argv[1:]]))
