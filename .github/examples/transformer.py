# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the minifreeze authors
"""A causal transformer with LoRA adapters, in plain JAX.

The parameters are nested dicts and lists, so a pattern can name any leaf. To time
training steps of the head, the adapters, or the last two blocks, run one of::

    model=.github/examples/transformer.py:make
    uv run bench.py --model $model --train head
    uv run bench.py --model $model --train '*lora*'
    uv run bench.py --model $model --train blocks/4 blocks/5 final_norm head

The architecture is GPT-2's, with three differences:

- The head has its own weights instead of sharing those of the token embedding.
- Every attention projection has a LoRA adapter (Hu et al., 2021,
  https://arxiv.org/abs/2106.09685). If lora_rank is 0, there are no adapters.
- There is no dropout.
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


# For speed, some implementations pad the vocabulary to 50,304, a multiple of 64.
GPT2_SMALL = Config(
    vocab=50_257, context=1024, width=768, depth=12, heads=12, dtype=jnp.bfloat16
)


# Parameters


def init(rng: Array, config: Config) -> Params:
    """Returns random parameters, initialized as in nanoGPT.

    See https://github.com/karpathy/nanoGPT/blob/master/model.py.
    """
    rngs = jax.random.split(rng, 3 + config.depth)
    token_rng, position_rng, head_rng, *block_rngs = rngs
    vocab, context, width = config.vocab, config.context, config.width

    blocks = []
    for block_rng in block_rngs:
        blocks.append(init_block(block_rng, config))

    return {
        "token_embedding": init_weights(token_rng, (vocab, width), config),
        "position_embedding": init_weights(position_rng, (context, width), config),
        "blocks": blocks,
        "final_norm": init_norm(config),
        "head": init_weights(head_rng, (width, vocab), config),
    }


def init_block(rng: Array, config: Config) -> Params:
    """Returns the parameters of one block."""
    q_rng, k_rng, v_rng, out_rng, up_rng, down_rng = jax.random.split(rng, 6)
    width = config.width

    # Each block adds to the residual stream twice. Scaling down the layers that do so
    # keeps its variance independent of the depth.
    residual_scale = 1 / math.sqrt(2 * config.depth)

    return {
        "attention_norm": init_norm(config),
        "attention": {
            "query": init_projection(q_rng, config),
            "key": init_projection(k_rng, config),
            "value": init_projection(v_rng, config),
            "out": init_projection(out_rng, config, residual_scale),
        },
        "mlp_norm": init_norm(config),
        "mlp": {
            "up": init_linear(up_rng, width, 4 * width, config),
            "down": init_linear(down_rng, 4 * width, width, config, residual_scale),
        },
    }


def init_projection(rng: Array, config: Config, scale: float = 1.0) -> Params:
    """Returns a (width, width) linear layer with a LoRA adapter.

    The adapter's `b` is zero, so the adapter changes nothing until it is trained.
    Adapters are float32 in every model, because their updates are too small for
    half precision.
    """
    linear_rng, lora_rng = jax.random.split(rng)
    width, rank = config.width, config.lora_rank

    params = init_linear(linear_rng, width, width, config, scale)
    if rank > 0:
        a = jax.random.normal(lora_rng, (width, rank)) / math.sqrt(width)
        params["lora"] = {"a": a, "b": jnp.zeros((rank, width))}
    return params


def init_linear(
    rng: Array, fan_in: int, fan_out: int, config: Config, scale: float = 1.0
) -> Params:
    """Returns a linear layer with zero biases."""
    w = init_weights(rng, (fan_in, fan_out), config, scale)
    return {"w": w, "bias": jnp.zeros(fan_out, config.dtype)}


def init_norm(config: Config) -> Params:
    """Returns the parameters of a layer norm, with scale 1 and bias 0."""
    scale = jnp.ones(config.width, config.dtype)
    bias = jnp.zeros(config.width, config.dtype)
    return {"scale": scale, "bias": bias}


def init_weights(
    rng: Array, shape: tuple[int, ...], config: Config, scale: float = 1.0
) -> Array:
    """Draws weights from a normal distribution with standard deviation 0.02 * scale."""
    weights = 0.02 * scale * jax.random.normal(rng, shape)
    return weights.astype(config.dtype)


# The forward pass


def apply(config: Config, params: Params, tokens: Array) -> Array:
    """Returns the logits of the next token at every position.

    Args:
        config: the sizes that `params` was made with. Under jax.jit, make this
            argument static.
        params: the parameters from `init`.
        tokens: token ids from 0 to config.vocab - 1, integers of shape (batch, time).

    Returns:
        Logits in float32, of shape (batch, time, vocab). Those at a position depend on
        no later token.

    Raises:
        ValueError: if the sequences are longer than config.context.
    """
    time = tokens.shape[1]
    if time > config.context:
        raise ValueError(
            f"tokens of shape {tokens.shape} are too long: the model has positions for "
            f"{config.context} tokens; shorten the sequences or raise Config.context"
        )

    x = params["token_embedding"][tokens]  # (batch, time, width)
    x = x + params["position_embedding"][:time]

    for block in params["blocks"]:
        normed = layer_norm(block["attention_norm"], x)
        x = x + attention(config, block["attention"], normed)
        normed = layer_norm(block["mlp_norm"], x)
        x = x + mlp(block["mlp"], normed)

    x = layer_norm(params["final_norm"], x)
    # With preferred_element_type=float32, this product would not round to bfloat16, but
    # JAX would compute its gradients from float32 operands, which is slower.
    logits = jnp.matmul(x, params["head"])  # (batch, time, vocab)
    return logits.astype(jnp.float32)


def attention(config: Config, params: Params, x: Array) -> Array:
    """Applies causal attention: each position attends to itself and earlier ones.

    Takes and returns arrays of shape (batch, time, width).
    """
    batch, time, width = x.shape
    per_head = (batch, time, config.heads, width // config.heads)

    q = project(config, params["query"], x).reshape(per_head)
    k = project(config, params["key"], x).reshape(per_head)
    v = project(config, params["value"], x).reshape(per_head)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)

    return project(config, params["out"], mixed.reshape(batch, time, width))


def mlp(params: Params, x: Array) -> Array:
    """Applies the MLP to each position.

    Takes and returns arrays of shape (batch, time, width).
    """
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

    a = params["lora"]["a"].astype(x.dtype)  # (in, rank)
    b = params["lora"]["b"].astype(x.dtype)  # (rank, out)
    scale = config.lora_alpha / config.lora_rank
    return y + scale * jnp.matmul(x @ a, b)


def linear(params: dict[str, Array], x: Array) -> Array:
    """Applies a linear layer, from (..., in) to (..., out)."""
    return x @ params["w"] + params["bias"]


def layer_norm(params: dict[str, Array], x: Array) -> Array:
    """Normalizes each position over its width, in float32."""
    x32 = x.astype(jnp.float32)
    centered = x32 - x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(centered).mean(axis=-1, keepdims=True)
    normalized = centered * jax.lax.rsqrt(variance + 1e-5)
    return normalized.astype(x.dtype) * params["scale"] + params["bias"]


def loss_fn(config: Config, params: Params, tokens: Array, targets: Array) -> Array:
    """Returns the mean cross-entropy of the next token, in nats.

    Args:
        config: the sizes that `params` was made with. Under jax.jit, make this
            argument static.
        params: the parameters from `init`.
        tokens: token ids, integers of shape (batch, time).
        targets: the id of the token after each token; same shape as tokens.
    """
    logits = apply(config, params, tokens)  # (batch, time, vocab)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)

    # The same as -jax.nn.log_softmax(logits) at the targets, without an array of all
    # log-probabilities.
    log_normalizers = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return (log_normalizers - target_logits).mean()


# Models for bench.py


def make_model(config: Config, batch_size: int) -> tuple[Loss, Params, Batch]:
    """Returns a loss, its parameters and one batch of random tokens.

    Call the loss as `loss(params, tokens, targets)`. The batch is (tokens, targets),
    both int32 of shape (batch_size, config.context).
    """
    params_rng, data_rng = jax.random.split(jax.random.key(0))
    params = init(params_rng, config)

    shape = (batch_size, config.context + 1)
    stream = jax.random.randint(data_rng, shape, 0, config.vocab, jnp.int32)
    tokens, targets = stream[:, :-1], stream[:, 1:]
    return partial(loss_fn, config), params, (tokens, targets)


def make() -> tuple[Loss, Params, Batch]:
    """Returns a model of 5.0 million parameters, in float32."""
    return make_model(Config(), batch_size=8)


def make_bfloat16() -> tuple[Loss, Params, Batch]:
    """Returns the model of `make` in bfloat16."""
    return make_model(Config(dtype=jnp.bfloat16), batch_size=8)


def make_gpt2_small() -> tuple[Loss, Params, Batch]:
    """Returns a model with the dimensions of GPT-2 small in bfloat16, for a GPU or TPU.

    GPT-2 small has 124 million parameters. This model has 164 million, because its head
    has its own weights.
    """
    return make_model(GPT2_SMALL, batch_size=8)
