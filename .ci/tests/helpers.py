# SPDX-License-Identifier: MIT
"""Small functions that several of the repository's test files use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path

Params: TypeAlias = dict[str, dict[str, jax.Array]]
PyTree: TypeAlias = Any


def random_mlp(sizes: Sequence[int]) -> Params:
    """Draws the parameters of an MLP with NumPy. The biases are not zero."""
    rng = np.random.default_rng(1)
    params = {}
    for i in range(len(sizes) - 1):
        fan_in, fan_out = sizes[i], sizes[i + 1]
        w = rng.standard_normal((fan_in, fan_out), np.float32) / np.sqrt(fan_in)
        b = rng.standard_normal(fan_out, np.float32) / 10
        params[f"linear_{i}"] = {
            "w": jnp.asarray(w, jnp.float32),
            "b": jnp.asarray(b, jnp.float32),
        }
    return params


def named(tree: PyTree) -> dict[str, Any]:
    """Returns every leaf by its name, for example "linear_0/w".

    A `Hole` is not a leaf, so a part has the names of its own leaves only.
    """
    leaves = {}
    for path, leaf in tree_flatten_with_path(tree)[0]:
        leaves[keystr(path, simple=True, separator="/")] = leaf
    return leaves


def structure(tree: PyTree) -> Any:
    """Returns the tree's structure, as `Any`: JAX's type for it has no `==`."""
    return jax.tree.structure(tree)


def same_bits(got: PyTree, want: PyTree) -> bool:
    """Whether two trees agree in structure, shapes, dtypes and every bit."""
    if structure(got) != structure(want):
        return False
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        a, b = np.asarray(a), np.asarray(b)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        if a.tobytes() != b.tobytes():
            return False
    return True


def changed(before: PyTree, after: PyTree) -> list[str]:
    """Returns the names of the leaves that differ in at least one bit."""
    old, new = named(before), named(after)
    assert old.keys() == new.keys()
    return [name for name in old if not same_bits(old[name], new[name])]


def assert_close(got: PyTree, want: PyTree, tolerance: float = 1e-6) -> None:
    """Compares structure, shapes and dtypes exactly, and values within `tolerance`."""
    assert structure(got) == structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert jnp.shape(a) == jnp.shape(b)
        assert jnp.result_type(a) == jnp.result_type(b)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def all_finite(tree: PyTree) -> bool:
    """Whether no leaf holds an infinity or a NaN."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Returns the bytes of all arrays in a tree, abstract or not."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def take_steps(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    gradient: Callable[[PyTree], PyTree],
    count: int,
    state: PyTree = None,
) -> tuple[PyTree, PyTree]:
    """Takes `count` steps of an optax optimizer in one scan.

    Starts from `optimizer.init(params)` unless a state is given. Returns the new
    parameters and the new state.
    """
    if state is None:
        state = optimizer.init(params)

    def step(carry: PyTree, _: None) -> tuple[PyTree, None]:
        params, state = carry
        updates, state = optimizer.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def scan(carry: PyTree) -> PyTree:
        return jax.lax.scan(step, carry, None, length=count)[0]

    new_params, new_state = scan((params, state))
    return new_params, new_state
