# SPDX-License-Identifier: MIT
"""Runs sharded programs on eight simulated devices, and prints what they do as JSON.

test_reports.py starts this file in a process of its own, because the number of devices
cannot change after JAX has started.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import minifreeze as mf
from helpers import PyTree, random_mlp

WIDTH, RANK, NUM_LAYERS, BATCH = 256, 4, 3, 64


def all_reduced_bytes(program: str) -> int:
    """Sums the sizes of all float32 results of all-reduces in the text of a program."""
    total = 0
    for results in re.findall(r"= (.*) all-reduce(?:-start)?\(", program):
        for shape in re.findall(r"f32\[([\d,]*)\]", results):
            total += 4 * math.prod(int(size) for size in shape.split(",") if size)
    return total


def adapted_activations(trainable: PyTree, frozen: PyTree, x: jax.Array) -> Any:
    """LoRA as it should be: the adapters act on the activations."""
    for adapter, w in zip(trainable, frozen):
        x = jnp.tanh(x @ w + (x @ adapter["a"]) @ adapter["b"])
    return jnp.mean(x**2)


def merged_weights(trainable: PyTree, frozen: PyTree, x: jax.Array) -> Any:
    """LoRA as it should not be: the adapters are added to the weights."""
    for adapter, w in zip(trainable, frozen):
        x = jnp.tanh(x @ (w + adapter["a"] @ adapter["b"]))
    return jnp.mean(x**2)


def lora_traffic(loss: Callable[..., Any], mesh: Mesh) -> int:
    """Returns the bytes that a data-parallel gradient of LoRA adapters all-reduces."""
    adapter = {
        "a": jnp.ones((WIDTH, RANK)),
        "b": jnp.ones((RANK, WIDTH)),
    }
    trainable = [adapter] * NUM_LAYERS
    frozen = [jnp.ones((WIDTH, WIDTH))] * NUM_LAYERS
    replicated = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    arguments = jax.device_put((trainable, frozen), replicated)
    x = jax.device_put(jnp.ones((BATCH, WIDTH)), by_row)
    gradient = jax.jit(jax.grad(loss), out_shardings=replicated)
    compiled: Any = gradient.lower(*arguments, x).compile()
    return all_reduced_bytes(compiled.as_text())


def hoist_on_a_sharded_batch(mesh: Mesh) -> dict[str, Any]:
    """Compares a hoisted loss on all devices with the plain loss on one device."""
    params = random_mlp([3, 6, 6, 5])
    trainable, frozen = mf.partition("linear_2", params)
    x = jnp.linspace(-1, 1, BATCH * 3).reshape(BATCH, 3)
    y = jnp.arange(BATCH) % 5
    expected = mf.loss_fn(trainable, frozen, x, y)

    by_row = NamedSharding(mesh, PartitionSpec("data"))
    x, y = jax.device_put((x, y), by_row)
    once, rest = mf.hoist(mf.loss_fn, trainable, frozen, x, y)
    kept = jax.jit(once)(frozen, x, y)
    loss = jax.jit(rest)(trainable, frozen, kept)
    rows_per_device = [leaf.addressable_shards[0].data.shape[0] for leaf in kept]
    return {"difference": abs(float(loss - expected)), "rows": rows_per_device}


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = Mesh(jax.devices(), "data")
    results = {
        "adapted activations": lora_traffic(adapted_activations, mesh),
        "merged weights": lora_traffic(merged_weights, mesh),
        "hoist": hoist_on_a_sharded_batch(mesh),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
