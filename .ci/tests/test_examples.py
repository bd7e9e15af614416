# SPDX-License-Identifier: MIT
"""Tests of .github/examples/transformer.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minifreeze as mf

EXAMPLES = Path(__file__).resolve().parents[2] / ".github" / "examples"


def load_example(name: str) -> Any:
    """Imports a file of the examples folder, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


transformer = load_example("transformer")
# Compiled once per configuration, which is faster than compiling each operation.
init = jax.jit(transformer.init, static_argnums=1)
apply = jax.jit(transformer.apply, static_argnums=0)
loss_fn = jax.jit(transformer.loss_fn, static_argnums=0)

TINY = transformer.Config(vocab=11, context=7, width=12, depth=2, heads=3, lora_rank=2)


@pytest.fixture(name="params", scope="module")
def params_fixture() -> Any:
    return init(jax.random.key(0), TINY)


@pytest.fixture(name="tokens")
def tokens_fixture() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (3, 7), 0, TINY.vocab)


def abstract_params(config: Any) -> Any:
    """Returns the shapes and dtypes of the parameters, without computing them."""
    return jax.eval_shape(partial(transformer.init, config=config), jax.random.key(0))


def randomize(params: Any, seed: int) -> Any:
    """Returns parameters without the zeros and ones that could hide a mistake."""
    rng = np.random.default_rng(seed)

    def add_noise(leaf: Any) -> Any:
        return leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(add_noise, params)


# The forward pass


def test_logits_have_a_row_per_token_and_a_column_per_word(
    params: Any, tokens: jax.Array
) -> None:
    logits = apply(TINY, params, tokens)

    assert logits.shape == (3, 7, 11)
    assert logits.dtype == jnp.float32


def test_sequences_may_be_shorter_than_the_context(
    params: Any, tokens: jax.Array
) -> None:
    logits = jax.eval_shape(partial(apply, TINY), params, tokens[:, :4])

    assert logits.shape == (3, 4, 11)


def test_a_sequence_longer_than_the_context_raises(params: Any) -> None:
    tokens = jnp.zeros((3, 8), jnp.int32)

    with pytest.raises(ValueError, match=r"\(3, 8\).*positions for 7 tokens"):
        transformer.apply(TINY, params, tokens)


@pytest.mark.parametrize("position", range(7))
def test_a_token_changes_no_earlier_logits(
    params: Any, tokens: jax.Array, position: int
) -> None:
    params = randomize(params, seed=position)
    other_token = (tokens[:, position] + 1) % TINY.vocab
    changed_tokens = tokens.at[:, position].set(other_token)

    before = apply(TINY, params, tokens)
    after = apply(TINY, params, changed_tokens)

    np.testing.assert_array_equal(before[:, :position], after[:, :position])
    for later in range(position, 7):
        assert not np.array_equal(before[:, later], after[:, later]), later


def test_logits_agree_with_numpy_in_float64(params: Any, tokens: jax.Array) -> None:
    params = randomize(params, seed=0)
    expected = numpy_forward(params, np.asarray(tokens), heads=3, lora_scale=16 / 2)

    logits = apply(TINY, params, tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def numpy_forward(
    params: Any, tokens: Any, heads: int, lora_scale: float
) -> np.ndarray[Any, Any]:
    """Computes the logits one sequence and one head at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    all_logits = []
    for sequence in tokens:
        x = params["token_embedding"][sequence]
        x = x + params["position_embedding"][: len(sequence)]
        for block in params["blocks"]:
            normed = numpy_norm(block["attention_norm"], x)
            x = x + numpy_attention(block["attention"], normed, heads, lora_scale)
            normed = numpy_norm(block["mlp_norm"], x)
            x = x + numpy_mlp(block["mlp"], normed)
        all_logits.append(numpy_norm(params["final_norm"], x) @ params["head"])
    return np.stack(all_logits)


def numpy_norm(norm: Any, x: Any) -> Any:
    mean = x.mean(axis=1, keepdims=True)
    variance = x.var(axis=1, keepdims=True)
    normalized = (x - mean) / np.sqrt(variance + 1e-5)
    return normalized * norm["scale"] + norm["bias"]


def numpy_attention(attention: Any, x: Any, heads: int, lora_scale: float) -> Any:
    weights, biases = {}, {}
    for name, projection in attention.items():
        lora = projection["lora"]
        weights[name] = projection["w"] + lora_scale * lora["a"] @ lora["b"]
        biases[name] = projection["bias"]

    length, width = x.shape
    head_width = width // heads
    queries = x @ weights["query"] + biases["query"]
    keys = x @ weights["key"] + biases["key"]
    values = x @ weights["value"] + biases["value"]
    mixed = np.zeros((length, width))
    for head in range(heads):
        columns = slice(head * head_width, (head + 1) * head_width)
        query = queries[:, columns]
        key = keys[:, columns]
        value = values[:, columns]
        for position in range(length):
            visible = position + 1
            scores = key[:visible] @ query[position] / math.sqrt(head_width)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            mixed[position, columns] = shares @ value[:visible]
    return mixed @ weights["out"] + biases["out"]


def numpy_mlp(mlp: Any, x: Any) -> Any:
    hidden = x @ mlp["up"]["w"] + mlp["up"]["bias"]
    # GELU by its tanh approximation, as in GPT-2.
    angle = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    gelu = hidden * (1 + np.tanh(angle)) / 2
    return gelu @ mlp["down"]["w"] + mlp["down"]["bias"]


def test_bfloat16_agrees_with_float32_to_its_precision(
    params: Any, tokens: jax.Array
) -> None:
    half_config = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    abstract = abstract_params(half_config)
    half_params = jax.tree.map(
        lambda leaf, like: leaf.astype(like.dtype), params, abstract
    )
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half_params)

    half_logits = apply(half_config, half_params, tokens)
    logits = apply(TINY, params, tokens)

    assert half_params["head"].dtype == jnp.bfloat16
    assert half_params["blocks"][0]["attention"]["query"]["w"].dtype == jnp.bfloat16
    assert half_logits.dtype == jnp.float32
    np.testing.assert_allclose(half_logits, logits, atol=0.02)


# The loss


def test_the_loss_of_a_uniform_model_is_log_vocab(
    params: Any, tokens: jax.Array
) -> None:
    params = randomize(params, seed=0)
    params["head"] = jnp.zeros((12, 11))  # all logits are equal

    loss = loss_fn(TINY, params, tokens, tokens)

    np.testing.assert_allclose(loss, math.log(11), rtol=1e-6)


def test_the_loss_is_the_mean_negative_log_probability_of_the_targets(
    params: Any, tokens: jax.Array
) -> None:
    params = randomize(params, seed=0)
    targets = (tokens + 1) % TINY.vocab

    logits = np.asarray(apply(TINY, params, tokens), np.float64)
    losses = []
    for row in range(3):
        for position in range(7):
            probs = np.exp(logits[row, position])
            probs /= probs.sum()
            losses.append(-math.log(probs[targets[row, position]]))

    loss = loss_fn(TINY, params, tokens, targets)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


# LoRA


def test_adapters_change_nothing_before_training(
    params: Any, tokens: jax.Array
) -> None:
    params_without = jax.tree.map(jnp.asarray, params)  # a copy of the dicts
    for block in params_without["blocks"]:
        for projection in block["attention"].values():
            del projection["lora"]

    logits = apply(TINY, params, tokens)
    logits_without = apply(TINY, params_without, tokens)

    np.testing.assert_allclose(logits, logits_without, atol=1e-6)


def test_rank_zero_leaves_the_adapters_out(tokens: jax.Array) -> None:
    config = dataclasses.replace(TINY, lora_rank=0)
    params = abstract_params(config)

    assert sorted(params["blocks"][0]["attention"]["query"]) == ["bias", "w"]
    logits = jax.eval_shape(partial(apply, config), params, tokens)
    assert logits.shape == (3, 7, 11)


def test_training_the_adapters_lowers_the_loss_and_keeps_the_base_bits(
    params: Any, tokens: jax.Array
) -> None:
    adapters, base = mf.partition("*lora*", params)
    targets = (tokens + 1) % TINY.vocab

    def lora_loss(adapters: Any, base: Any) -> jax.Array:
        merged = mf.merge(adapters, base)
        loss: jax.Array = transformer.loss_fn(TINY, merged, tokens, targets)
        return loss

    @jax.jit
    def step(adapters: Any, base: Any) -> tuple[Any, jax.Array]:
        loss, grads = jax.value_and_grad(lora_loss)(adapters, base)
        return mf.sgd_step(adapters, grads, lr=0.3), loss

    losses = []
    for _ in range(20):
        adapters, loss = step(adapters, base)
        losses.append(float(loss))
    trained = mf.merge(adapters, base)

    assert losses[-1] < losses[0] - 0.01
    entries_before, _ = jax.tree.flatten_with_path(params)
    for (path, before), after in zip(entries_before, jax.tree.leaves(trained)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_same = np.asarray(before).tobytes() == np.asarray(after).tobytes()
        assert is_same == ("lora" not in name), name


def test_adapters_are_float32_in_a_bfloat16_model() -> None:
    config = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    adapters, _ = mf.partition("*lora*", abstract_params(config))

    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(adapters)}
    assert dtypes == {"float32"}


def temporary_bytes(loss: Any, adapters: Any, base: Any) -> int:
    """Returns the temporary memory of the compiled gradient by the adapters."""
    memory = jax.jit(jax.grad(loss)).lower(adapters, base).compile().memory_analysis()
    assert memory is not None
    return int(memory.temp_size_in_bytes)


def test_a_lora_gradient_needs_no_memory_of_the_size_of_a_base_weight() -> None:
    config = dataclasses.replace(TINY, width=384, depth=1)
    adapters, base = mf.partition("*lora*", abstract_params(config))
    tokens = jnp.zeros((1, 2), jnp.int32)
    weight_bytes = 384 * 384 * 4

    def activation_form(adapters: Any, base: Any) -> jax.Array:
        merged = mf.merge(adapters, base)
        loss: jax.Array = transformer.loss_fn(config, merged, tokens, tokens)
        return loss

    def merged_form(adapters: Any, base: Any) -> jax.Array:
        merged = fold_adapters(mf.merge(adapters, base))
        loss: jax.Array = transformer.loss_fn(config, merged, tokens, tokens)
        return loss

    assert temporary_bytes(activation_form, adapters, base) < weight_bytes
    # The folded form exceeds the limit, so this test can fail.
    assert temporary_bytes(merged_form, adapters, base) > weight_bytes


def fold_adapters(params: Any) -> Any:
    """Adds each adapter to its weight, as no training step should."""
    blocks = []
    for block in params["blocks"]:
        attention = {}
        for name, projection in block["attention"].items():
            lora = projection["lora"]
            weight = projection["w"] + 8.0 * lora["a"] @ lora["b"]
            attention[name] = {"w": weight, "bias": projection["bias"]}
        blocks.append({**block, "attention": attention})
    return {**params, "blocks": blocks}


# Models for bench.py


@pytest.fixture(name="model", scope="module")
def model_fixture() -> Any:
    return transformer.make()


def test_make_returns_a_loss_its_parameters_and_a_batch(model: Any) -> None:
    loss, params, (tokens, targets) = model

    assert tokens.shape == targets.shape == (8, 64)
    assert tokens.dtype == targets.dtype == jnp.int32
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    # Random logits of small weights are nearly uniform.
    value = jax.jit(loss)(params, tokens, targets)
    np.testing.assert_allclose(value, math.log(256), rtol=0.03)


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("head", 256 * 256),
        ("*lora*", 6 * 4 * 2 * 256 * 8),
        ("*bias", 6 * (4 * 256 + 5 * 256 + 2 * 256) + 256),  # no adapters
        (["blocks/4", "blocks/5"], 2 * (12 * 256**2 + 13 * 256 + 4 * 2 * 256 * 8)),
    ],
)
def test_patterns_select_the_parts_that_are_trained(
    model: Any, where: Any, count: int
) -> None:
    _, params, _ = model
    trainable, _ = mf.partition(where, params)

    sizes = [leaf.size for leaf in jax.tree.leaves(trainable)]
    assert sum(sizes) == count


def test_make_bfloat16_differs_in_dtype_alone(model: Any) -> None:
    params, batch = jax.eval_shape(without_loss(transformer.make_bfloat16))

    assert params["head"].dtype == jnp.bfloat16
    assert batch[0].dtype == jnp.int32
    _, model_params, model_batch = model
    assert shapes(params) == shapes(model_params)
    assert shapes(batch) == shapes(model_batch)


def test_make_gpt2_small_has_the_sizes_of_gpt2_small() -> None:
    # Nothing is computed: the parameters would take 0.3 GB.
    params, (tokens, targets) = jax.eval_shape(
        without_loss(transformer.make_gpt2_small)
    )

    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    adapters, _ = mf.partition("*lora*", params)
    adapter_sizes = [leaf.size for leaf in jax.tree.leaves(adapters)]
    # GPT-2-small has 124,439,808 parameters, and shares its embedding with the head.
    assert sum(sizes) - sum(adapter_sizes) == 124_439_808 + 50_257 * 768
    assert params["head"].dtype == jnp.bfloat16
    assert tokens.shape == targets.shape == (8, 1024)


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


def without_loss(make: Any) -> Any:
    """Returns a function that returns arrays alone, as jax.eval_shape requires."""

    def make_arrays() -> tuple[Any, Any]:
        _, params, batch = make()
        return params, batch

    return make_arrays
