# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the minifreeze authors
"""A causal transformer with LoRA adapters, in plain JAX.

The parameters are nested dicts and lists, so their names read well in patterns::

    bench.py --model .github/examples/transformer.py:make --train head
    bench.py --model .github/examples/transformer.py:make --train '*lora*'
    bench.py --model .github/examples/transformer.py:make \\
        --train blocks/4 blocks/5 final_norm head

The architecture is GPT-2's, with two differences: the head has weights of its own
instead of sharing the token embedding's, and every attention projection has a LoRA
adapter (Hu et al., 2021). With lora_rank=0, there are no adapters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Params: TypeAlias = dict[str, Any]
Batch: TypeAlias = tuple[Array, Array]
Loss: TypeAlias = Callable[..., Array]


@dataclass(frozen=True)
class Config:
    """The sizes of a model. The defaults suit a CPU."""

    vocab: int = 256  # number of different tokens
    context: int = 64  # longest sequence, in tokens
    width: int = 256  # size of the residual stream
    depth: int = 6  # number of blocks
    heads: int = 4  # attention heads per block; divides width
    lora_rank: int = 8  # 0 for a model without adapters
    lora_alpha: float = 16.0  # adapters are scaled by lora_alpha / lora_rank
    dtype: DTypeLike = jnp.float32  # of all parameters except the adapters


GPT2_SMALL = Config(
    vocab=50_257, context=1024, width=768, depth=12, heads=12, dtype=jnp.bfloat16
)


# Parameters


def init(key: Array, config: Config) -> Params:
    """Returns random parameters, initialized as in GPT-2."""
    keys = jax.random.split(key, 3 + config.depth)
    token_key, position_key, head_key, *block_keys = keys
    vocab, context, width = config.vocab, config.context, config.width

    blocks = []
    for block_key in block_keys:
        blocks.append(init_block(block_key, config))

    return {
        "token_embedding": normal(token_key, (vocab, width), config),
        "position_embedding": normal(position_key, (context, width), config),
        "blocks": blocks,
        "final_norm": init_norm(config),
        "head": normal(head_key, (width, vocab), config),
    }


def init_block(key: Array, config: Config) -> Params:
    """Returns the parameters of one block."""
    query_key, key_key, value_key, out_key, up_key, down_key = jax.random.split(key, 6)
    width = config.width

    # Each block adds two values to the residual stream. Smaller weights there keep
    # the variance of the sum independent of the depth.
    residual_scale = 1 / math.sqrt(2 * config.depth)

    return {
        "attention_norm": init_norm(config),
        "attention": {
            "query": init_projection(query_key, config),
            "key": init_projection(key_key, config),
            "value": init_projection(value_key, config),
            "out": init_projection(out_key, config, residual_scale),
        },
        "mlp_norm": init_norm(config),
        "mlp": {
            "up": init_linear(up_key, width, 4 * width, config),
            "down": init_linear(down_key, 4 * width, width, config, residual_scale),
        },
    }


def init_projection(key: Array, config: Config, scale: float = 1.0) -> Params:
    """Returns a (width, width) linear layer with a LoRA adapter.

    The adapter's `b` is zero, so that the adapter changes nothing until it is trained.
    Adapters are float32 in every model, because their updates are too small for
    half precision.
    """
    linear_key, lora_key = jax.random.split(key)
    width, rank = config.width, config.lora_rank

    params = init_linear(linear_key, width, width, config, scale)
    if rank > 0:
        a = jax.random.normal(lora_key, (width, rank)) / math.sqrt(width)
        params["lora"] = {"a": a, "b": jnp.zeros((rank, width))}
    return params


def init_linear(
    key: Array, fan_in: int, fan_out: int, config: Config, scale: float = 1.0
) -> Params:
    """Returns a linear layer with zero biases."""
    w = normal(key, (fan_in, fan_out), config, scale)
    return {"w": w, "b": jnp.zeros(fan_out, config.dtype)}


def init_norm(config: Config) -> Params:
    """Returns a layer norm that only normalizes."""
    scale = jnp.ones(config.width, config.dtype)
    bias = jnp.zeros(config.width, config.dtype)
    return {"scale": scale, "bias": bias}


def normal(
    key: Array, shape: tuple[int, ...], config: Config, scale: float = 1.0
) -> Array:
    """Draws weights from a normal distribution with standard deviation 0.02 * scale."""
    weights = 0.02 * scale * jax.random.normal(key, shape)
    return weights.astype(config.dtype)


# The forward pass


def apply(config: Config, params: Params, tokens: Array) -> Array:
    """Returns the logits of the next token at every position.

    Args:
        config: the sizes that `params` was made with.
        params: the parameters from `init`.
        tokens: token ids, integers of shape (batch, time).

    Returns:
        Logits in float32, of shape (batch, time, vocab). Those at a position depend on
        no later token.
    """
    time = tokens.shape[1]
    x = params["token_embedding"][tokens]  # (batch, time, width)
    x = x + params["position_embedding"][:time]

    for block in params["blocks"]:
        normed = layer_norm(block["attention_norm"], x)
        x = x + attention(config, block["attention"], normed)
        normed = layer_norm(block["mlp_norm"], x)
        x = x + mlp(block["mlp"], normed)

    x = layer_norm(params["final_norm"], x)
    logits: Array = x @ params["head"]  # (batch, time, vocab)
    return logits.astype(jnp.float32)


def attention(config: Config, params: Params, x: Array) -> Array:
    """Lets every position read from itself and from earlier positions.

    Takes and returns arrays of shape (batch, time, width).
    """
    batch, time, width = x.shape
    split = (batch, time, config.heads, width // config.heads)

    query = project(config, params["query"], x).reshape(split)
    key = project(config, params["key"], x).reshape(split)
    value = project(config, params["value"], x).reshape(split)

    # Query position q reads from key position k, in each head h.
    scores = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32
    )
    scores = scores / math.sqrt(width // config.heads)
    position = jnp.arange(time)
    is_visible = position[:, None] >= position[None, :]  # (q, k)
    scores = jnp.where(is_visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)  # (batch, heads, q, k)

    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return project(config, params["out"], mixed.reshape(batch, time, width))


def mlp(params: Params, x: Array) -> Array:
    """Transforms each position on its own, from and to (batch, time, width)."""
    hidden = jax.nn.gelu(linear(params["up"], x))  # (batch, time, 4 * width)
    return linear(params["down"], hidden)


def project(config: Config, params: Params, x: Array) -> Array:
    """Applies a linear layer and its LoRA adapter, from (..., in) to (..., out).

    The adapter is applied to the activations: x @ w + (x @ a) @ b. In the other form,
    x @ (w + a @ b), automatic differentiation would build the gradient of the whole
    weight, even if `w` is frozen.
    """
    y = linear(params, x)
    if "lora" not in params:
        return y

    a: Array = params["lora"]["a"].astype(x.dtype)  # (in, rank)
    b: Array = params["lora"]["b"].astype(x.dtype)  # (rank, out)
    scale = config.lora_alpha / config.lora_rank
    return y + scale * ((x @ a) @ b)


def linear(params: Params, x: Array) -> Array:
    """Applies a linear layer, from (..., in) to (..., out)."""
    w: Array = params["w"]  # (in, out)
    b: Array = params["b"]  # (out,)
    return x @ w + b


def layer_norm(params: Params, x: Array) -> Array:
    """Normalizes each position over its width, in float32."""
    x32 = x.astype(jnp.float32)
    centered = x32 - x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(centered).mean(axis=-1, keepdims=True)
    normalized = centered * jax.lax.rsqrt(variance + 1e-5)
    scale: Array = params["scale"]  # (width,)
    bias: Array = params["bias"]  # (width,)
    return normalized.astype(x.dtype) * scale + bias


def loss_fn(config: Config, params: Params, tokens: Array, targets: Array) -> Array:
    """Returns the mean cross-entropy of the next token, in nats.

    Args:
        config: the sizes that `params` was made with.
        params: the parameters from `init`.
        tokens: token ids, integers of shape (batch, time).
        targets: for each token the id of the one that follows it, of the same shape.
    """
    log_probs = jax.nn.log_softmax(apply(config, params, tokens))
    target_log_probs = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)
    return -target_log_probs.mean()


# Models for bench.py


def make_model(config: Config, batch_size: int) -> tuple[Loss, Params, Batch]:
    """Returns a loss, its parameters and one batch of random tokens.

    Call the loss as `loss(params, tokens, targets)`. The batch is (tokens, targets),
    both int32 of shape (batch_size, config.context).
    """
    params_key, data_key = jax.random.split(jax.random.key(0))
    params = init(params_key, config)

    text_shape = (batch_size, config.context + 1)
    text = jax.random.randint(data_key, text_shape, 0, config.vocab, jnp.int32)
    tokens, targets = text[:, :-1], text[:, 1:]
    return partial(loss_fn, config), params, (tokens, targets)


def make() -> tuple[Loss, Params, Batch]:
    """Returns a model of 4.9 million parameters, in float32."""
    return make_model(Config(), batch_size=8)


def make_bfloat16() -> tuple[Loss, Params, Batch]:
    """Returns the model of `make` in bfloat16."""
    return make_model(Config(dtype=jnp.bfloat16), batch_size=8)


def make_gpt2_small() -> tuple[Loss, Params, Batch]:
    """Returns a model of GPT-2-small's size in bfloat16, for a GPU or a TPU."""
    return make_model(GPT2_SMALL, batch_size=8)
