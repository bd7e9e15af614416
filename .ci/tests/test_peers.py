# SPDX-License-Identifier: MIT
"""minifreeze beside Haiku, optax, Orbax, Flax and Equinox.

One section per library: what is equal, what works together, and the errors that a
`Hole` causes there. A pitfall is a common mistake in freezing parameters. Its test
shows the mistake, and what avoids it. .ci/peers.py has the libraries' benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import Array
from jax.tree_util import keystr, tree_map_with_path

import minifreeze as mf
from helpers import (
    Params,
    PyTree,
    all_finite,
    assert_close,
    changed,
    named,
    nbytes,
    random_mlp,
    same_bits,
    structure,
    take_steps,
)

HEAD = ["linear_2/b", "linear_2/w"]
OUTER_LAYERS = ["linear_0/b", "linear_0/w", "linear_2/b", "linear_2/w"]


def cross_entropy(logits: Array, y: Array) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(losses)


def full_gradients(params: Params, x: Array, y: Array) -> Params:
    """Returns the gradients of all parameters of the MLP."""
    trainable, nothing = mf.partition("*", params)
    grads: Params = jax.grad(mf.loss_fn)(trainable, nothing, x, y)
    return grads


def train_part(
    optimizer: optax.GradientTransformation,
    where: mf.Where,
    params: Params,
    x: Array,
    y: Array,
    count: int = 1,
    state: PyTree = None,
) -> Params:
    """Trains the selected leaves as minifreeze recommends. Returns all parameters."""
    trainable, frozen = mf.partition(where, params)

    def gradient(trainable: PyTree) -> PyTree:
        return jax.grad(mf.loss_fn)(trainable, frozen, x, y)

    trainable, _ = take_steps(optimizer, trainable, gradient, count, state)
    return mf.merge(trainable, frozen)


# ------------------------------------------------------------------------------- Haiku


def haiku_mlp(sizes: list[int]) -> hk.Transformed:
    return hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP(sizes)(x)))


def with_haiku_names(params: Params) -> Params:
    return {f"mlp/~/{layer}": leaves for layer, leaves in params.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_init_equals_haikus_mlp_bit_for_bit(
    optimised: None, dtype: str, make_key: Callable[[int], Array]
) -> None:
    sizes = [3] * 12  # linear_10 sorts before linear_2
    network = haiku_mlp(sizes[1:])
    ours = mf.init(make_key(42), sizes, dtype)
    theirs = network.init(make_key(42), jnp.ones((1, 3), dtype))
    assert same_bits(with_haiku_names(ours), theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_apply_equals_haikus_mlp_bit_for_bit(optimised: None, dtype: str) -> None:
    sizes = [3] * 12
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_mlp(sizes))
    x = jnp.linspace(-2, 2, 9).reshape(3, 3).astype(dtype)
    ours = jax.jit(mf.apply)(params, x)
    theirs = jax.jit(haiku_mlp(sizes[1:]).apply)(with_haiku_names(params), x)
    assert same_bits(ours, theirs)
    assert np.abs(np.asarray(ours, np.float32)).min() > 0


def test_ten_thousand_steps_equal_haikus_bit_for_bit(optimised: None) -> None:
    """Compares `mf.train` with Haiku's partition, merge and MLP. Freezes linear_1."""
    rng = np.random.default_rng(1)
    digits = np.tile(np.arange(10, dtype=np.int32), (10_000, 1))
    ys = jnp.asarray(rng.permuted(digits, axis=1)[:, :4])
    xs = ys[..., None].astype(jnp.float32)
    params = random_mlp([1, 300, 100, 10])

    network = haiku_mlp([300, 100, 10])
    haiku_trainable, haiku_frozen = hk.data_structures.partition(
        lambda module, name, value: module != "mlp/~/linear_1", with_haiku_names(params)
    )

    def haiku_loss(trainable: PyTree, x: Array, y: Array) -> Array:
        whole = hk.data_structures.merge(trainable, haiku_frozen)
        log_probabilities = jax.nn.log_softmax(network.apply(whole, x))
        return -jnp.sum(jax.nn.one_hot(y, 10) * log_probabilities) / len(y)

    def haiku_step(trainable: PyTree, batch: tuple[Array, Array]) -> tuple[PyTree, Any]:
        loss, grads = jax.value_and_grad(haiku_loss)(trainable, *batch)
        return jax.tree.map(lambda p, g: p - g * 0.1, trainable, grads), loss

    @jax.jit
    def haiku_train(trainable: PyTree, xs: Array, ys: Array) -> tuple[PyTree, Array]:
        return jax.lax.scan(haiku_step, trainable, (xs, ys))

    haiku_after, haiku_losses = haiku_train(haiku_trainable, xs, ys)
    trainable, frozen = mf.partition("!linear_1", params)
    after, losses = mf.train(trainable, frozen, xs, ys)
    assert same_bits(named(with_haiku_names(after)), named(haiku_after))
    assert same_bits(losses, haiku_losses)
    assert losses[0] > 2
    assert losses[-1] < 0.1


def test_a_pattern_selects_what_haikus_partition_selects(params: Params) -> None:
    haiku_params = with_haiku_names(params)
    theirs, _ = hk.data_structures.partition(
        lambda module, name, value: module != "mlp/~/linear_1", haiku_params
    )
    ours, _ = mf.partition("!mlp/~/linear_1", haiku_params)
    assert named(theirs) == named(ours)
    assert len(named(ours)) == 4


def test_merge_raises_where_haikus_merge_lets_the_last_tree_win() -> None:
    first, last = {"layer": {"w": 1}}, {"layer": {"w": 2}}
    assert hk.data_structures.merge(first, last) == {"layer": {"w": 2}}
    with pytest.raises(ValueError, match="layer/w"):
        mf.merge(first, last)


def test_pitfall_a_substring_also_matches_linear_10() -> None:
    layer = {"w": jnp.ones(1), "b": jnp.ones(1)}
    params = {f"linear_{i}": layer for i in range(12)}
    theirs, _ = hk.data_structures.partition(
        lambda module, name, value: "linear_1" in module, params
    )
    assert list(theirs) == ["linear_1", "linear_10", "linear_11"]
    ours, _ = mf.partition("linear_1", params)
    assert list(named(ours)) == ["linear_1/b", "linear_1/w"]


# ------------------------------------------------------------------------------- optax


def sgd_with_momentum() -> optax.GradientTransformation:
    return optax.sgd(0.1, momentum=0.9)


def adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-2, weight_decay=0.1)


def lion() -> optax.GradientTransformation:
    return optax.lion(1e-3, weight_decay=0.1)


def adafactor() -> optax.GradientTransformation:
    return optax.adafactor(1e-2, min_dim_size_to_factor=4)


def clipped_adam_with_schedule() -> optax.GradientTransformation:
    return optax.chain(optax.clip(0.1), optax.adam(lambda step: 0.1 / (step + 1)))


@pytest.mark.parametrize(
    "make_optimizer",
    [sgd_with_momentum, adamw, lion, adafactor, clipped_adam_with_schedule],
)
def test_an_optimizer_sees_only_the_trainable_leaves(
    make_optimizer: Callable[[], optax.GradientTransformation],
    params: Params,
    x: Array,
    y: Array,
) -> None:
    optimizer = make_optimizer()
    trainable, _ = mf.partition("!linear_1", params)
    state = optimizer.init(trainable)
    assert [name for name in named(state) if "linear_1" in name] == []
    after = train_part(optimizer, "!linear_1", params, x, y, count=50)
    assert changed(params, after) == OUTER_LAYERS


def test_warm_start_keeps_the_moments_through_gradual_unfreezing(
    params: Params, x: Array, y: Array
) -> None:
    optimizer = optax.adam(1e-2)
    num_traces = 0

    @jax.jit
    def five_steps(trainable: PyTree, state: PyTree, frozen: PyTree) -> PyTree:
        nonlocal num_traces
        num_traces += 1

        def gradient(trainable: PyTree) -> PyTree:
            return jax.grad(mf.loss_fn)(trainable, frozen, x, y)

        return take_steps(optimizer, trainable, gradient, 5, state)

    trainable, frozen = mf.partition("linear_2", params)
    state = optimizer.init(trainable)
    for stage, where in enumerate(["linear_2", "!linear_0", "*", "linear_2"]):
        trainable, frozen = mf.partition(where, params)
        fresh_state = optimizer.init(trainable)
        old_leaves = named(state)
        state = mf.warm_start(fresh_state, state)
        assert structure(state) == structure(fresh_state)
        assert state[0].count == 5 * stage
        for name, leaf in named(state).items():
            expected = old_leaves.get(name, named(fresh_state)[name])
            assert same_bits(leaf, expected)

        trainable, state = five_steps(trainable, state, frozen)
        before, params = params, mf.merge(trainable, frozen)
        assert changed(before, params) == list(named(trainable))
    assert num_traces == 3  # the fourth stage freezes the same leaves as the first


@pytest.mark.parametrize("spelling", ["selective_transform", "partition", "freeze"])
def test_training_a_part_equals_optaxs_ways_to_freeze(
    spelling: str, params: Params, x: Array, y: Array
) -> None:
    """They are equal because AdamW updates each leaf on its own."""
    optimizer = adamw()
    frozen_leaves = mf.mask("linear_1", params)
    labels = jax.tree.map(lambda frozen: "freeze" if frozen else "train", frozen_leaves)
    if spelling == "selective_transform":
        wrapped = optax.transforms.selective_transform(
            optimizer, freeze_mask=frozen_leaves
        )
    elif spelling == "partition":
        transforms = {"train": optimizer, "freeze": optax.set_to_zero()}
        wrapped = optax.transforms.partition(transforms, labels)
    else:
        wrapped = optax.chain(optimizer, optax.transforms.freeze(frozen_leaves))

    def gradient(params: Params) -> Params:
        return full_gradients(params, x, y)

    theirs, _ = take_steps(wrapped, params, gradient, 10)
    ours = train_part(optimizer, "!linear_1", params, x, y, count=10)
    assert_close(ours, theirs)
    assert changed(params, theirs) == OUTER_LAYERS


def test_optaxs_freeze_before_weight_decay_does_not_freeze(
    params: Params, x: Array, y: Array
) -> None:
    freeze = optax.transforms.freeze(mf.mask("linear_1", params))

    def gradient(params: Params) -> Params:
        return full_gradients(params, x, y)

    after, _ = take_steps(optax.chain(freeze, adamw()), params, gradient, 1)
    assert changed(params, after) == list(named(params))


def stopped_gradients(params: Params, x: Array, y: Array) -> Params:
    """Returns gradients with linear_1 behind `stop_gradient`, which makes them zero."""
    stopped = jax.lax.stop_gradient(params["linear_1"])

    def loss(params: Params) -> Array:
        return cross_entropy(mf.apply({**params, "linear_1": stopped}, x), y)

    grads: Params = jax.grad(loss)(params)
    return grads


def test_pitfall_weight_decay_moves_weights_behind_stop_gradient(
    params: Params, x: Array, y: Array
) -> None:
    optimizer = optax.adamw(1e-2, weight_decay=0.1)

    def gradient(params: Params) -> Params:
        return stopped_gradients(params, x, y)

    after, _ = take_steps(optimizer, params, gradient, 5)
    decayed = np.asarray(params["linear_1"]["w"]) * (1 - 1e-2 * 0.1) ** 5
    np.testing.assert_allclose(after["linear_1"]["w"], decayed, rtol=1e-5)

    after = train_part(optimizer, "!linear_1", params, x, y, count=5)
    assert changed(params, after) == OUTER_LAYERS


@pytest.mark.parametrize("make_optimizer", [sgd_with_momentum, adamw])
def test_pitfall_old_moments_move_weights_with_zero_gradients(
    make_optimizer: Callable[[], optax.GradientTransformation],
    params: Params,
    x: Array,
    y: Array,
) -> None:
    """Trains everything for five steps, then zeroes the gradients of linear_1."""
    optimizer = make_optimizer()
    trained, state = take_steps(
        optimizer, params, lambda params: full_gradients(params, x, y), 5
    )
    after, _ = take_steps(
        optimizer, trained, lambda params: stopped_gradients(params, x, y), 5, state
    )
    assert {"linear_1/b", "linear_1/w"} <= set(changed(trained, after))

    trainable, _ = mf.partition("!linear_1", trained)
    state = mf.warm_start(optimizer.init(trainable), state)
    after = train_part(optimizer, "!linear_1", trained, x, y, 5, state)
    assert changed(trained, after) == OUTER_LAYERS


def test_pitfall_optax_masked_alone_adds_the_raw_gradient(
    params: Params, x: Array, y: Array
) -> None:
    optimizer = optax.adam(1e-2)
    masked = optax.masked(optimizer, mf.mask("!linear_1", params))
    grads = full_gradients(params, x, y)
    updates, _ = masked.update(grads, masked.init(params), params)
    after = optax.apply_updates(params, updates)
    uphill = jax.tree.map(jnp.add, params["linear_1"], grads["linear_1"])
    assert_close(after["linear_1"], uphill)

    after = train_part(optimizer, "!linear_1", params, x, y)
    assert changed(params, after) == OUTER_LAYERS


def global_norm(tree: PyTree) -> float:
    squares = [np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(squares)))


def test_pitfall_the_clipping_norm_counts_frozen_gradients(
    params: Params, x: Array, y: Array
) -> None:
    """With learning rate 1, the length of the step is that of the clipped gradient."""
    grads = full_gradients(params, x, y)
    norm_of_all, norm_of_head = global_norm(grads), global_norm(grads["linear_2"])
    limit = norm_of_head / 2
    clip, sgd = optax.clip_by_global_norm(limit), optax.sgd(1.0)

    def length_of_step(after: Params) -> float:
        assert changed(params, after) == HEAD
        return global_norm(jax.tree.map(jnp.subtract, after, params))

    freeze = optax.transforms.freeze(mf.mask("!linear_2", params))
    optimizer = optax.chain(clip, sgd, freeze)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    theirs = length_of_step(optax.apply_updates(params, updates))
    np.testing.assert_allclose(theirs, limit * norm_of_head / norm_of_all, rtol=1e-4)

    ours = train_part(optax.chain(clip, sgd), "linear_2", params, x, y)
    np.testing.assert_allclose(length_of_step(ours), limit, rtol=1e-4)


def test_pitfall_a_pattern_that_matches_nothing_is_silent(
    params: Params, x: Array, y: Array
) -> None:
    typo = tree_map_with_path(lambda path, _: "linear1" in keystr(path), params)
    optimizer = optax.chain(optax.sgd(0.1), optax.transforms.freeze(typo))
    grads = full_gradients(params, x, y)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    assert changed(params, after) == list(named(params))  # nothing is frozen

    with pytest.raises(ValueError, match=r"'!linear1'.*linear_1/"):
        mf.partition("!linear1", params)


def test_pitfall_optimizer_state_for_frozen_leaves(params: Params) -> None:
    adam = optax.adam(1e-2)
    freeze = optax.transforms.freeze(mf.mask("!linear_2", params))
    counter_bytes = 4
    theirs = optax.chain(adam, freeze).init(params)
    assert nbytes(theirs) == 2 * nbytes(params) + counter_bytes

    head, _ = mf.partition("linear_2", params)
    assert nbytes(adam.init(head)) == 2 * nbytes(params["linear_2"]) + counter_bytes


def test_hole_error_optimizer_state_of_all_parameters(params: Params) -> None:
    optimizer = optax.adam(1e-3)
    trainable, _ = mf.partition("linear_2", params)
    state_of_all = optimizer.init(params)
    with pytest.raises(ValueError, match="Hole"):
        optimizer.update(trainable, state_of_all)
    optimizer.update(trainable, optimizer.init(trainable))


def test_hole_error_updates_of_a_part_applied_to_all_parameters(params: Params) -> None:
    updates, frozen = mf.partition("linear_2", params)
    with pytest.raises(TypeError, match="Hole"):
        optax.apply_updates(params, updates)
    trainable, zeros = updates, jax.tree.map(jnp.zeros_like, updates)
    after = mf.merge(optax.apply_updates(trainable, zeros), frozen)
    assert same_bits(after, params)


# ------------------------------------------------------------------------------- Orbax


def test_orbax_saves_and_restores_the_trainable_part_alone(tmp_path: Path) -> None:
    params = random_mlp([3, 100, 100, 5])
    trainable, frozen = mf.partition("linear_2", params)
    state = optax.adam(1e-2).init(trainable)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (trainable, state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "part", (trainable, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "part", target)
    assert same_bits(restored, (trainable, state))
    assert same_bits(mf.merge(restored[0], frozen), params)

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < nbytes(params) / 2


def test_orbax_restores_without_a_target_and_warm_start_finds_the_leaves(
    params: Params, tmp_path: Path
) -> None:
    """Named tuples come back as dicts, and holes as None."""
    trainable, _ = mf.partition("linear_2", params)
    optimizer = optax.adam(1e-2)
    state = jax.tree.map(lambda leaf: leaf + 7, optimizer.init(trainable))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "part", {"head": trainable, "state": state})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "part")

    assert same_bits(mf.warm_start(optimizer.init(trainable), restored["state"]), state)
    zeros = jax.tree.map(jnp.zeros_like, params)
    started = mf.warm_start(zeros, restored["head"], fresh=["linear_0", "linear_1"])
    assert changed(zeros, started) == HEAD
    assert same_bits(started["linear_2"], params["linear_2"])
    with pytest.raises(ValueError, match="fresh"):
        mf.warm_start(zeros, restored["head"])


# -------------------------------------------------------------------------------- Flax


def dense_norm_dense(train: bool) -> nn.Sequential:
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.5)
    return nn.Sequential([nn.Dense(6), norm, nn.relu, nn.Dense(5)])


def test_pitfall_a_pattern_also_selects_running_statistics(x: Array, y: Array) -> None:
    """AdamW trains the running variance until it is negative and its root is NaN."""
    network = dense_norm_dense(train=False)
    variables = network.init(jax.random.key(0), x)
    optimizer = optax.adamw(0.1, weight_decay=1.0)

    def train_selected(where: str) -> PyTree:
        trainable, frozen = mf.partition(where, variables)

        def loss(trainable: PyTree) -> Array:
            logits: Any = network.apply(mf.merge(trainable, frozen), x)
            return cross_entropy(logits, y)

        trainable, _ = take_steps(optimizer, trainable, jax.grad(loss), 100)
        return mf.merge(trainable, frozen)

    wrong = train_selected("*/layers_1")
    assert not same_bits(wrong["batch_stats"], variables["batch_stats"])
    assert not all_finite(wrong)
    right = train_selected("params/layers_1")
    assert same_bits(right["batch_stats"], variables["batch_stats"])
    assert all_finite(right)


@pytest.mark.parametrize(
    ("train", "moved"), [(True, ["layers_1/mean", "layers_1/var"]), (False, [])]
)
def test_pitfall_statistics_of_a_frozen_layer_move_in_train_mode(
    train: bool, moved: list[str], x: Array
) -> None:
    variables = dense_norm_dense(train=False).init(jax.random.key(0), x)
    trainable, frozen = mf.partition("params/layers_3", variables)
    whole = mf.merge(trainable, frozen)
    _, new = dense_norm_dense(train).apply(whole, x, mutable=["batch_stats"])
    assert changed(variables["batch_stats"], new["batch_stats"]) == moved


def test_warm_start_reads_msgpack_which_stores_lists_as_dicts() -> None:
    optimizer = optax.adam(1.0)
    state = optimizer.init([jnp.ones(2), {"w": jnp.ones(3)}])
    state = jax.tree.map(lambda leaf: leaf + 7, state)
    stored = flax.serialization.to_bytes(state)
    restored = flax.serialization.msgpack_restore(stored)
    zeros = jax.tree.map(jnp.zeros_like, state)
    assert same_bits(mf.warm_start(zeros, restored), state)


def test_grad_of_a_part_equals_nnx_diff_state(x: Array, y: Array) -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.body = nnx.Linear(3, 6, rngs=rngs)
            self.head = nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.head(nnx.relu(self.body(x)))

    model = Net(nnx.Rngs(0))
    wrt = nnx.DiffState(0, nnx.PathContains("head"))
    theirs = nnx.grad(lambda model: cross_entropy(model(x), y), argnums=wrt)(model)

    graph, state = nnx.split(model, nnx.Param)
    head, body = mf.partition("head", state)

    def loss(head: PyTree, body: PyTree) -> Array:
        return cross_entropy(nnx.merge(graph, mf.merge(head, body))(x), y)

    ours = jax.grad(loss)(head, body)
    assert list(named(ours)) == ["head/bias/value", "head/kernel/value"]
    assert_close(named(ours), named(theirs))


def test_hole_error_linen_model_called_with_a_part(x: Array) -> None:
    network = nn.Dense(5)
    variables = network.init(jax.random.key(0), x)
    part, others = mf.partition("*/bias", variables)
    with pytest.raises((TypeError, ValueError), match="Hole"):
        network.apply(part, x)
    network.apply(mf.merge(part, others), x)


def test_hole_error_nnx_model_merged_from_a_part(x: Array) -> None:
    graph, state = nnx.split(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
    part, others = mf.partition("bias*", state)
    with pytest.raises((TypeError, ValueError), match="Hole"):
        nnx.merge(graph, part)(x)
    nnx.merge(graph, mf.merge(part, others))(x)


def test_hole_error_msgpack_of_a_part(params: Params) -> None:
    part, others = mf.partition("linear_2", params)
    with pytest.raises(TypeError, match="Hole"):
        flax.serialization.to_bytes(part)
    flax.serialization.to_bytes(mf.merge(part, others))


# ----------------------------------------------------------------------------- Equinox


@pytest.fixture
def equinox_mlp() -> eqx.nn.MLP:
    """Three layers, 3 to 6 to 6 to 5, and the activation function as a leaf."""
    return eqx.nn.MLP(3, 5, width_size=6, depth=2, key=jax.random.key(0))


def last_layer(model: eqx.nn.MLP) -> tuple[Array, Array | None]:
    return model.layers[2].weight, model.layers[2].bias


def test_partition_equals_equinoxs_partition_with_tree_at(
    equinox_mlp: eqx.nn.MLP,
) -> None:
    """By pattern, and by Equinox's own tree of bools."""
    nothing = jax.tree.map(lambda _: False, equinox_mlp)
    spec = eqx.tree_at(last_layer, nothing, (True, True))
    theirs, _ = eqx.partition(equinox_mlp, spec)
    by_pattern, _ = mf.partition("layers/2", equinox_mlp)
    by_bools, _ = mf.partition(spec, equinox_mlp)
    assert named(theirs) == named(by_pattern) == named(by_bools)
    assert list(named(theirs)) == ["layers/2/weight", "layers/2/bias"]


def test_equinoxs_partition_accepts_a_mask(equinox_mlp: eqx.nn.MLP) -> None:
    theirs, _ = eqx.partition(equinox_mlp, mf.mask("layers/2", equinox_mlp))
    ours, _ = mf.partition("layers/2", equinox_mlp)
    assert named(theirs) == named(ours)


def test_merge_raises_where_equinoxs_combine_keeps_the_first_leaf() -> None:
    assert eqx.combine({"w": 1}, {"w": 2}) == {"w": 1}
    with pytest.raises(ValueError, match="'w'"):
        mf.merge({"w": 1}, {"w": 2})


def test_merge_raises_where_equinoxs_combine_leaves_a_gap() -> None:
    assert eqx.combine({"w": None}, {"w": None}) == {"w": None}
    with pytest.raises(ValueError, match="'w'"):
        mf.merge({"w": mf.Hole()}, {"w": mf.Hole()})


def test_a_partial_merge_joins_the_arrays_of_a_model_split_twice(
    equinox_mlp: eqx.nn.MLP, x: Array
) -> None:
    arrays, static = mf.partition(lambda path, leaf: eqx.is_array(leaf), equinox_mlp)
    head, body = mf.partition("layers/2", arrays)
    joined = mf.merge(head, body, partial=True)
    assert same_bits(joined, arrays)
    with pytest.raises(ValueError, match="activation"):
        mf.merge(head, body)
    expected = jax.vmap(equinox_mlp)(x)
    assert same_bits(jax.vmap(mf.merge(joined, static))(x), expected)


def test_hoist_names_the_activation_function_among_the_arrays(
    equinox_mlp: eqx.nn.MLP, x: Array
) -> None:
    head, body = mf.partition("layers/2", equinox_mlp)

    def forward(head: PyTree, body: PyTree, x: Array) -> Any:
        return jax.vmap(mf.merge(head, body))(x)

    with pytest.raises(TypeError, match=r"activation.*close over"):
        mf.hoist(forward, head, body, x)


def test_optax_calls_labels_that_are_an_equinox_model(
    equinox_mlp: eqx.nn.MLP,
) -> None:
    """optax calls labels that are callable, as an Equinox model is; use a lambda."""
    arrays, _ = mf.partition(lambda path, leaf: eqx.is_array(leaf), equinox_mlp)
    trains = mf.mask("layers/2", arrays)
    labels = jax.tree.map(lambda leaf: "train" if leaf else "freeze", trains)
    transforms = {"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}
    wrong = optax.transforms.partition(transforms, labels)
    with pytest.raises((TypeError, ValueError)) as error:
        wrong.init(arrays)
    assert "__call__" in [frame.name for frame in error.traceback]
    right = optax.transforms.partition(transforms, lambda _: labels)
    counter_bytes = 4
    state = right.init(arrays)
    assert nbytes(state) == 2 * nbytes(last_layer(arrays)) + counter_bytes


def test_hole_error_equinox_model_called_as_a_part(
    equinox_mlp: eqx.nn.MLP, x: Array
) -> None:
    part, others = mf.partition("*/bias", equinox_mlp)
    with pytest.raises((TypeError, ValueError), match="Hole"):
        jax.vmap(part)(x)
    jax.vmap(mf.merge(part, others))(x)


# -------------------------------------------------------------- a model of each library


@dataclass(frozen=True)
class Model:
    """A model of some library, and the leaves to train."""

    tree: PyTree
    forward: Callable[[PyTree, Array], Any]
    where: mf.Where
    selected: list[str]  # the names that `where` must select
    kept_bytes: int  # of one batch of four records


FEATURES = 4 * 6 * 4  # (batch, width) float32
LABELS = 4 * 4  # (batch,) int32
PER_RECORD = 4 * 4  # (batch, 1) float32


def haiku_model(x: Array) -> Model:
    network = haiku_mlp([6, 6, 5])
    where = "mlp/~/linear_2"
    selected = [f"{where}/b", f"{where}/w"]
    tree = network.init(jax.random.key(0), x)
    return Model(tree, network.apply, where, selected, FEATURES + LABELS)


def equinox_model(x: Array) -> Model:
    model = eqx.nn.MLP(3, 5, width_size=6, depth=2, key=jax.random.key(0))

    def forward(model: eqx.nn.MLP, x: Array) -> Array:
        return jax.vmap(model)(x)

    selected = ["layers/2/weight", "layers/2/bias"]
    return Model(model, forward, "layers/2", selected, FEATURES + LABELS)


def linen_model(x: Array) -> Model:
    """Trains the norm, and the bias of the last layer."""
    network = nn.Sequential([nn.Dense(6), nn.LayerNorm(), nn.tanh, nn.Dense(5)])
    where = ["*/bias", "!params/layers_0", "params/layers_1"]
    selected = [
        "params/layers_1/bias",
        "params/layers_1/scale",
        "params/layers_3/bias",
    ]
    tree = network.init(jax.random.key(0), x)
    # hoist keeps what comes last before the norm's scale: the centered features, and
    # 1/std of each record.
    kept_bytes = FEATURES + PER_RECORD + LABELS
    return Model(tree, network.apply, where, selected, kept_bytes)


def frozen_dict_model(x: Array) -> Model:
    model = linen_model(x)
    tree = flax.core.freeze(model.tree)
    return Model(tree, model.forward, model.where, model.selected, model.kept_bytes)


def nnx_model(x: Array) -> Model:
    rngs = nnx.Rngs(0)
    body, head = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)
    graph, state = nnx.split(nnx.Sequential(body, nnx.relu, head), nnx.Param)

    def forward(state: PyTree, x: Array) -> Any:
        return nnx.merge(graph, state)(x)

    selected = ["layers/2/bias/value", "layers/2/kernel/value"]
    return Model(state, forward, "layers/2", selected, FEATURES + LABELS)


@pytest.mark.parametrize(
    "make_model",
    [haiku_model, equinox_model, linen_model, frozen_dict_model, nnx_model],
)
def test_a_model_can_be_split_hoisted_trained_and_merged(
    make_model: Callable[[Array], Model], x: Array, y: Array
) -> None:
    model = make_model(x)
    arrays, static = mf.partition(lambda path, leaf: eqx.is_array(leaf), model.tree)
    trainable, frozen = mf.partition(model.where, arrays)
    assert list(named(trainable)) == model.selected

    def loss(trainable: PyTree, frozen: PyTree, x: Array, y: Array) -> Array:
        whole = mf.merge(trainable, frozen, static)
        return cross_entropy(model.forward(whole, x), y)

    once, rest = mf.hoist(loss, trainable, frozen, x, y)
    kept = jax.jit(once)(frozen, x, y)
    assert nbytes(kept) == model.kept_bytes
    direct = jax.jit(jax.value_and_grad(loss))
    hoisted = jax.jit(jax.value_and_grad(rest))
    loss_before, _ = direct(trainable, frozen, x, y)
    assert_close(
        hoisted(trainable, frozen, kept), direct(trainable, frozen, x, y), 1e-5
    )

    def gradient(trainable: PyTree) -> PyTree:
        return jax.grad(rest)(trainable, frozen, kept)

    after, _ = take_steps(adamw(), trainable, gradient, 10)
    assert_close(hoisted(after, frozen, kept), direct(after, frozen, x, y), 1e-5)
    loss_after, _ = direct(after, frozen, x, y)
    assert loss_after < loss_before

    merged = mf.merge(static, frozen, after)
    assert structure(merged) == structure(model.tree)
    assert changed(model.tree, merged) == model.selected


def test_hole_error_haiku_model_applied_to_a_part(x: Array) -> None:
    network = haiku_mlp([6, 5])
    part, others = mf.partition("*/b", network.init(jax.random.key(0), x))
    with pytest.raises(AttributeError, match="Hole"):
        network.apply(part, x)
    network.apply(mf.merge(part, others), x)
