# SPDX-License-Identifier: MIT
"""Compiler flags, garbage collection and fixtures for the repository's own tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import Params, random_mlp

# The programs under test are so small that compiling takes longer than running. These
# flags shorten it. Subprocesses inherit them. Set your own values to override them.
xla_flags = ["--xla_cpu_parallel_codegen_split_count=1"]
if (0, 7) <= jax.__version_info__ < (0, 11):
    xla_flags.append("--xla_cpu_use_fusion_emitters=false")
XLA_FLAGS = os.environ.setdefault("XLA_FLAGS", " ".join(xla_flags))
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
COMPILE_QUICKLY = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
jax.config.update("jax_disable_most_optimizations", COMPILE_QUICKLY)

# JAX allocates many long-lived containers. With the default threshold, the garbage
# collector scans all of them again and again.
gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def one_device_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the eight-device flag of test_minifreeze.py out of subprocesses."""
    monkeypatch.setenv("XLA_FLAGS", XLA_FLAGS)


@pytest.fixture
def optimised() -> Iterator[None]:
    """Compiles with XLA's usual optimizations, to compare bits, FLOPs or memory."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", COMPILE_QUICKLY)
    jax.clear_caches()


@pytest.fixture(scope="session")
def params() -> Params:
    """An MLP with sizes [3, 6, 6, 5] and nonzero biases."""
    return random_mlp([3, 6, 6, 5])


@pytest.fixture(scope="session")
def x() -> jax.Array:
    """A batch of four inputs, (4, 3)."""
    return jnp.asarray(np.random.default_rng(0).standard_normal((4, 3), np.float32))


@pytest.fixture(scope="session")
def y() -> jax.Array:
    """The labels of the batch, (4,)."""
    return jnp.array([3, 0, 4, 1], jnp.int32)
