# SPDX-License-Identifier: MIT
"""A typed program that uses minifreeze. mypy --strict and pyright must accept it.

It also runs, so that what it annotates is true.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import minifreeze as mf


def first_layers(count: int) -> mf.Where:
    return [f"linear_{i}" for i in range(count)]


def is_vector(path: tuple[Any, ...], leaf: jax.Array) -> bool:
    return leaf.ndim == 1


def train_head(
    params: mf.Params, x: jax.Array, y: jax.Array, num_steps: int
) -> tuple[mf.Params, float]:
    frozen, trainable = mf.partition(first_layers(2), params)
    once, rest = mf.hoist(mf.loss_fn, trainable, frozen, x, y)
    kept: tuple[jax.Array, ...] = once(frozen, x, y)
    for _ in range(num_steps):
        grads = jax.grad(rest)(trainable, frozen, kept)
        trainable = mf.sgd_step(trainable, grads, lr=0.1)
    trainable, loss = mf.train_step(trainable, frozen, x, y)
    trainable, losses = mf.train(trainable, frozen, x[None], y[None])
    table: str = mf.summary(trainable=trainable, frozen=frozen)
    print(table, losses.shape)
    return mf.merge(trainable, frozen), float(loss)


def select_in_every_way(params: mf.Params) -> list[mf.Params]:
    """Selects by a pattern, a list of patterns, a predicate and a tree of bools."""
    biases: mf.PyTree = mf.mask("*/b", params)
    selected = []
    for where in ("*/b", ["*", "!*/w"], is_vector, biases):
        part, others = mf.partition(where, params)
        selected.append(part)
        print(others)
    return selected


def start_from(params: mf.Params, checkpoint: mf.PyTree) -> mf.Params:
    return mf.warm_start(params, checkpoint, fresh="linear_2", unused=())


class Model(NamedTuple):
    body: jax.Array
    head: jax.Array
    scale: float


def update_head(model: Model, old: Model) -> tuple[jax.Array, Model]:
    """Keeps the type of a model: its fields are still typed at the end."""
    arrays, static = mf.partition(["body", "head"], model)
    head, body = mf.partition("head", arrays)
    moved = mf.sgd_step(head, grads=head, lr=0.1)
    joined = mf.merge(moved, body, partial=True)
    whole = mf.warm_start(mf.merge(joined, static), old)
    return whole.head + moved.head, whole


xs, ys = mf.dataset(jax.random.key(1), num_records=1)
params = mf.init(jax.random.key(0), [1, 4, 4, 10], jnp.float32)
trained, loss = train_head(params, xs[0], ys[0], num_steps=2)
print(loss, len(select_in_every_way(trained)), start_from(params, trained), mf.Hole())
model = Model(jnp.ones(2), jnp.ones(3), 1.0)
print(update_head(model, Model(jnp.zeros(2), jnp.zeros(3), 2.0)))
