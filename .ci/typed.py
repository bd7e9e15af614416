"""Proves that the types of minifreeze serve a typed program: mypy strict and pyright read it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import minifreeze as mf
from minifreeze import Hole, Params, PyTree, Where


def choice(depth: int) -> Where:
    return [f"linear_{i}" for i in range(depth)]


def takes_vectors(path: tuple[object, ...], leaf: jax.Array) -> bool:
    return leaf.ndim == 1


def train_head(params: Params, x: jax.Array, y: jax.Array, steps: int) -> tuple[Params, float]:
    frozen, trainable = mf.partition(choice(2), params)
    vectors, matrices = mf.partition(takes_vectors, trainable)
    print(vectors, matrices)
    once, rest = mf.hoist(mf.loss_fn, trainable, frozen, x, y)
    kept: tuple[jax.Array, ...] = once(frozen, x, y)
    loss = jnp.zeros(())
    for _ in range(steps):
        loss, grads = jax.value_and_grad(rest)(trainable, frozen, kept)
        trainable = mf.sgd_step(trainable, grads, lr=0.1)
    trainable, loss = mf.train_step(trainable, frozen, x, y)
    trainable, losses = mf.train(trainable, frozen, x[None], y[None])
    text: str = mf.summary(trainable=trainable, frozen=frozen)
    print(text, losses.shape, Hole())
    whole = mf.merge(trainable, frozen)
    started: Params = mf.warm_start(whole, params)
    bools: PyTree = mf.mask("*/b", started)
    print(bools)
    return whole, float(loss)


class Model(NamedTuple):
    body: jax.Array
    head: jax.Array


def thaw(model: Model, old: Model) -> tuple[jax.Array, Model]:
    """A model's own type survives: its fields have types after each of the five."""
    head, body = mf.partition("head", model)
    moved = mf.sgd_step(head, grads=head, lr=0.1)
    whole = mf.warm_start(mf.merge(moved, body), old)
    return whole.head + moved.head, whole


xs, ys = mf.dataset(jax.random.key(1), num_records=1)
train_head(mf.init(jax.random.key(0), [1, 4, 4, 10], jnp.float32), xs[0], ys[0], steps=2)
thaw(Model(jnp.ones(2), jnp.ones(3)), Model(jnp.zeros(2), jnp.zeros(3)))
