# SPDX-License-Identifier: MIT
"""Situations from public bug reports, each with the right result.

The reports come from other projects. Each test names them, as `project #number`.
Situations that need only jax and numpy are in test_minifreeze.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array

import minifreeze as mf
from helpers import (
    Params,
    PyTree,
    all_finite,
    assert_close,
    nbytes,
    random_mlp,
    same_bits,
    take_steps,
)


def cross_entropy(logits: Array, y: Array) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(losses)


# ---------------------------------------------------------- checkpoints that do not fit


def schedule(step: Array) -> Array:
    return 0.1 / (step + 1)


ONE_WEIGHT = {"w": jnp.zeros(2)}


@pytest.fixture
def clipped_state() -> Any:
    """The state of chain(clip, adam, schedule): Adam counts 3, the schedule 50."""
    adam, scale = optax.scale_by_adam(), optax.scale_by_schedule(schedule)
    chain = optax.chain(optax.clip_by_global_norm(1.0), adam, scale)
    clip_state, adam_state, schedule_state = chain.init(ONE_WEIGHT)
    moments = {"w": jnp.ones(2)}
    adam_state = adam_state._replace(count=jnp.int32(3), mu=moments)
    schedule_state = schedule_state._replace(count=jnp.int32(50))
    return clip_state, adam_state, schedule_state


@pytest.fixture
def unclipped_state() -> Any:
    """A new state of chain(adam, schedule)."""
    adam, scale = optax.scale_by_adam(), optax.scale_by_schedule(schedule)
    return optax.chain(adam, scale).init(ONE_WEIGHT)


def test_a_chain_whose_indices_have_shifted_is_refused(
    clipped_state: Any, unclipped_state: Any
) -> None:
    """optax #290, orbax #2972: "1/count" is Adam's there, and the schedule's here."""
    with pytest.raises(ValueError, match=r"1/mu/w.*2/count"):
        mf.warm_start(unclipped_state, clipped_state)


def test_a_chain_can_be_restored_when_both_sides_have_the_same_indices(
    clipped_state: Any, unclipped_state: Any
) -> None:
    adam, scale = mf.warm_start(unclipped_state, clipped_state[1:])
    assert adam.count == 3
    assert adam.mu["w"].tolist() == [1, 1]
    assert scale.count == 50


def test_parameters_in_flaxs_boxes_do_not_match_plain_ones() -> None:
    initializer = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    boxed = nn.Dense(5, kernel_init=initializer).init(jax.random.key(0), jnp.ones(3))
    plain = nn.unbox(boxed)
    with pytest.raises(ValueError, match="params/kernel/value"):
        mf.warm_start(plain, boxed)
    assert same_bits(mf.warm_start(plain, nn.unbox(boxed)), plain)


# ------------------------------------------------------------------------- LoRA


def adapted(trainable: PyTree, frozen: PyTree, x: Array) -> Any:
    """Two layers. The adapters act on the activations, in the dtype of the base."""
    for adapter, w in zip(trainable, frozen):
        a = adapter["a"].astype(w.dtype)
        b = adapter["b"].astype(w.dtype)
        x = jnp.tanh(x @ w + (x @ a) @ b)
    return jnp.mean((x - 0.5) ** 2)


def lora_parts(width: int, dtype: str) -> tuple[PyTree, PyTree]:
    """Returns float32 adapters of rank 4 and the weights of two square layers."""
    rng = np.random.default_rng(0)
    trainable, frozen = [], []
    for _ in range(2):
        w = rng.standard_normal((width, width), np.float32) / np.sqrt(width)
        a = rng.standard_normal((width, 4), np.float32) / np.sqrt(width)
        b = np.zeros((4, width), np.float32)
        trainable.append({"a": jnp.asarray(a), "b": jnp.asarray(b)})
        frozen.append(jnp.asarray(w, dtype))
    return trainable, frozen


def test_float32_adapters_train_on_a_float16_base() -> None:
    """needle #53: float16 adapters become NaN."""
    trainable, frozen = lora_parts(16, "float16")
    x = jnp.linspace(-1, 1, 64).reshape(4, 16).astype("float16")

    def gradient(trainable: PyTree) -> PyTree:
        return jax.grad(adapted)(trainable, frozen, x)

    after, _ = take_steps(optax.adam(1e-2), trainable, gradient, 200)
    assert all_finite(after)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(after)} == {"float32"}
    assert adapted(after, frozen, x) < adapted(trainable, frozen, x) / 2


# ------------------------------------------------------------- layers stacked in a leaf


def scan_layers(weights: Array, x: Array) -> Array:
    def layer(x: Array, w: Array) -> tuple[Array, None]:
        return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, weights)[0]


def stacked_loss(late: Array, early: Array, x: Array) -> Array:
    return jnp.sum(scan_layers(late, scan_layers(early, x)) ** 2)


@pytest.fixture
def stacked() -> Array:
    """The weights of eight layers, (8, 6, 6)."""
    weights = np.random.default_rng(0).standard_normal((8, 6, 6), np.float32) / 2
    return jnp.asarray(weights)


def test_stacked_layers_cut_in_two_have_the_gradients_of_the_late_ones(
    stacked: Array,
) -> None:
    """equinox #123, openpi #422."""
    x = jnp.linspace(-1, 1, 24).reshape(4, 6)

    def unrolled(weights: Array) -> Array:
        features = x
        for w in weights:
            features = jnp.tanh(features @ w)
        return jnp.sum(features**2)

    late, early = stacked[5:], stacked[:5]
    gradient = jax.grad(stacked_loss)
    assert_close(gradient(late, early, x), jax.grad(unrolled)(stacked)[5:], 1e-5)
    program = str(jax.make_jaxpr(gradient)(late, early, x))
    assert program.count("f32[5,6,6]") == 1  # the argument, and no gradient


# --------------------------------------------------------------- optimizers of a part


def every_fourth_step() -> Any:
    return optax.MultiSteps(optax.adam(1e-2), every_k_schedule=4)


def clipped_adamw() -> Any:
    return optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))


def per_leaf_trust_ratio() -> Any:
    return optax.lamb(1e-2)


def factored_moments() -> Any:
    return optax.adafactor(1e-2, min_dim_size_to_factor=4)


def matrices_orthogonalised() -> Any:
    return optax.contrib.muon(1e-2)


def averaged() -> Any:
    return optax.contrib.schedule_free_sgd(1e-1)


def signs() -> Any:
    return optax.lion(1e-3)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        every_fourth_step,
        clipped_adamw,
        per_leaf_trust_ratio,
        factored_moments,
        matrices_orthogonalised,
        averaged,
        signs,
    ],
)
def test_an_optimizer_treats_a_part_as_a_list_of_its_leaves(
    make_optimizer: Callable[[], Any], params: Params, x: Array, y: Array
) -> None:
    """optax #1649, flax #4901, equinox #590."""
    trainable, frozen = mf.partition("!linear_1", params)
    leaves, treedef = jax.tree.flatten(trainable)

    def gradient(trainable: PyTree) -> PyTree:
        return jax.grad(mf.loss_fn)(trainable, frozen, x, y)

    def gradient_of_list(leaves: list[Array]) -> list[Any]:
        return jax.tree.leaves(gradient(jax.tree.unflatten(treedef, leaves)))

    of_part, _ = take_steps(make_optimizer(), trainable, gradient, 20)
    of_list, _ = take_steps(make_optimizer(), leaves, gradient_of_list, 20)
    assert_close(jax.tree.leaves(of_part), of_list, 1e-5)
    assert not same_bits(of_part, trainable)


def take_lbfgs_steps(loss: Callable[[PyTree], Any], params: PyTree) -> PyTree:
    optimizer = optax.lbfgs()
    state = optimizer.init(params)
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
    return params


def test_lbfgs_treats_a_part_as_a_list_of_its_leaves(
    params: Params, x: Array, y: Array
) -> None:
    trainable, frozen = mf.partition("!linear_1", params)
    leaves, treedef = jax.tree.flatten(trainable)

    def loss(trainable: PyTree) -> Array:
        return mf.loss_fn(trainable, frozen, x, y)

    def loss_of_list(leaves: list[Array]) -> Array:
        return loss(jax.tree.unflatten(treedef, leaves))

    of_part = take_lbfgs_steps(loss, trainable)
    of_list = take_lbfgs_steps(loss_of_list, leaves)
    assert_close(jax.tree.leaves(of_part), of_list, 1e-4)
    assert loss(of_part) < loss(trainable) / 2


# --------------------------------------------------------------- the loss against optax


def test_uint8_labels_of_more_than_256_classes() -> None:
    """`jax.nn.one_hot` compares in the labels' dtype, in which 256 equals 0."""
    params = random_mlp([3, 320])
    x = jnp.ones((4, 3))
    y = jnp.array([0, 63, 64, 255], jnp.uint8)
    trainable, nothing = mf.partition("*", params)
    logits = mf.apply(params, x)
    expected = cross_entropy(logits, y.astype(jnp.int32))
    np.testing.assert_allclose(mf.loss_fn(trainable, nothing, x, y), expected, 1e-6)


def test_a_logit_of_minus_infinity_for_another_class(x: Array, params: Params) -> None:
    params = {**params, "linear_2": dict(params["linear_2"])}
    params["linear_2"]["b"] = params["linear_2"]["b"].at[0].set(-jnp.inf)
    y = jnp.array([3, 2, 4, 1])  # never class 0
    trainable, frozen = mf.partition("linear_0", params)
    loss, grads = jax.value_and_grad(mf.loss_fn)(trainable, frozen, x, y)
    np.testing.assert_allclose(loss, cross_entropy(mf.apply(params, x), y), 1e-6)
    assert all_finite(grads)


# ------------------------------------------------------------------------- transformers
NUM_BLOCKS, WIDTH, VOCABULARY = 3, 64, 50
BATCH, LENGTH = 4, 16


def random_weights(*shape: int) -> Array:
    rng = np.random.default_rng(shape)
    return jnp.asarray(rng.standard_normal(shape, np.float32) / np.sqrt(shape[0]))


def norm_params() -> Any:
    return {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}


@pytest.fixture
def transformer() -> Any:
    """The parameters of a causal pre-norm transformer with one attention head."""
    layers = {}
    for i in range(NUM_BLOCKS):
        layers[f"block_{i}"] = {
            "attention_norm": norm_params(),
            "qkv": random_weights(WIDTH, 3 * WIDTH),
            "out": random_weights(WIDTH, WIDTH),
            "mlp_norm": norm_params(),
            "up": random_weights(WIDTH, 2 * WIDTH),
            "down": random_weights(2 * WIDTH, WIDTH),
        }
    embed = random_weights(VOCABULARY, WIDTH)
    head = random_weights(WIDTH, VOCABULARY)
    return {"embed": embed, **layers, "norm": norm_params(), "head": head}


def normalise(params: Any, x: Array) -> Any:
    """LayerNorm over the last axis."""
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.mean(centered**2, axis=-1, keepdims=True)
    scaled = centered * jax.lax.rsqrt(variance + 1e-6)
    return scaled * params["scale"] + params["bias"]


def attend(params: Any, x: Array) -> Any:
    query, key, value = jnp.split(x @ params["qkv"], 3, axis=-1)
    scores = query @ key.swapaxes(1, 2) / np.sqrt(WIDTH)  # (batch, length, length)
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    return weights @ value @ params["out"]


def transform(params: Any, tokens: Array) -> Any:
    """Returns the residual stream after all blocks that `params` holds."""
    x = params["embed"][tokens]  # (batch, length, width)
    for name in params:
        if name.startswith("block_"):
            block = params[name]
            x = x + attend(block, normalise(block["attention_norm"], x))
            hidden = jax.nn.gelu(normalise(block["mlp_norm"], x) @ block["up"])
            x = x + hidden @ block["down"]
    return x


def language_loss(
    trainable: PyTree, frozen: PyTree, tokens: Array, targets: Array
) -> Array:
    params = mf.merge(trainable, frozen)
    x = normalise(params["norm"], transform(params, tokens))
    return cross_entropy(x @ params["head"], targets)


def test_hoist_keeps_a_residual_stream_once(transformer: Any) -> None:
    """The last block of a pre-norm transformer trains.

    It needs `x` and `x - mean`. `x` and the statistics of each token rebuild both.
    """
    where = ["block_2", "norm", "head"]
    trainable, frozen = mf.partition(where, transformer)
    tokens = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCABULARY
    targets = (tokens + 1) % VOCABULARY
    once, rest = mf.hoist(language_loss, trainable, frozen, tokens, targets)
    kept = jax.jit(once)(frozen, tokens, targets)

    stream = BATCH * LENGTH * WIDTH * 4
    mean_and_deviation = 2 * BATCH * LENGTH * 4
    assert stream <= nbytes(kept) <= 1.05 * (stream + mean_and_deviation)
    hoisted = jax.jit(jax.value_and_grad(rest))(trainable, frozen, kept)
    direct = jax.jit(jax.value_and_grad(language_loss))
    assert_close(hoisted, direct(trainable, frozen, tokens, targets), 1e-4)


def test_hoist_keeps_tokens_where_every_block_trains_its_biases(
    transformer: Any,
) -> None:
    """Every step reads the embeddings again, so the tokens are kept in their place."""
    trainable, frozen = mf.partition("*bias", transformer)
    tokens = jnp.zeros((BATCH, LENGTH), jnp.int32)
    with pytest.warns(UserWarning, match="^hoist"):
        once, _ = mf.hoist(language_loss, trainable, frozen, tokens, tokens)
    kept = jax.eval_shape(once, frozen, tokens, tokens)
    # The first norm's statistics come from the embeddings alone.
    assert nbytes(kept) <= 2 * nbytes(tokens) + 2 * BATCH * LENGTH * 4


# ------------------------------------------------------- running statistics in Flax NNX


class NormedNet(nnx.Module):
    """A body of two layers with BatchNorm, and a head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 6, rngs=rngs)
        self.first_norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.second = nnx.Linear(6, 6, rngs=rngs)
        self.second_norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.first_norm(self.first(x)))
        x = nnx.relu(self.second_norm(self.second(x)))
        return self.head(x)


def num_products(fn: Callable[..., Any], *args: PyTree) -> int:
    """Returns how many matrix products a function computes."""
    return str(jax.make_jaxpr(fn)(*args)).count("dot_general[")


def test_hoist_passes_batch_norm_when_its_statistics_are_frozen(
    x: Array, y: Array
) -> None:
    """Evaluation-mode statistics beside the trainable part end the frozen prefix."""
    parts: Any = nnx.split(NormedNet(nnx.Rngs(0)), nnx.Param, ...)
    graph, params, statistics = parts
    head, body = mf.partition("head", params)

    def loss(head: PyTree, body_and_statistics: PyTree, x: Array, y: Array) -> Array:
        body, statistics = body_and_statistics
        model = nnx.merge(graph, mf.merge(head, body), statistics)
        return cross_entropy(model(x), y)

    frozen = (body, statistics)
    once, rest = mf.hoist(loss, head, frozen, x, y)
    kept = jax.jit(once)(frozen, x, y)
    assert num_products(loss, head, frozen, x, y) == 3
    assert num_products(rest, head, frozen, kept) == 1
    features_and_labels = 4 * 6 * 4 + 4 * 4
    assert nbytes(kept) == features_and_labels
    assert_close(rest(head, frozen, kept), loss(head, frozen, x, y))
