"""The training step of bench.py in other libraries, in the forms that they recommend.

`bench.py --peers` loads this file and prints `peers_table`. Each form donates its
state. Before a form is timed, it must take the same step as bench.py itself. If a
library is missing or does not work with this version of JAX, the remarks say so. If
the documented form of a library is slow, its fast form has a row of its own.
"""

from __future__ import annotations

import importlib
import inspect
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

import bench
import minifreeze as mf

Tree = Any
Function = Callable[..., Any]


def copy_arrays(tree: Tree) -> Tree:
    """Copies the arrays of a tree, because a step donates its input state."""
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    targets = jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / y.size


def descend(params: Tree, grads: Tree) -> Tree:
    return jax.tree.map(lambda p, g: p - g * bench.SGD_RATE, params, grads)


def layer_widths(problem: bench.Problem) -> dict[str, tuple[int, int]]:
    """Returns (inputs, outputs) of each layer, from the first to the last."""
    return {f"linear_{i}": pair for i, pair in enumerate(pairwise(problem.sizes))}


# ------------------------------------------------------------------------------ Haiku


def haiku(problem: bench.Problem) -> bench.Step:
    hk = importlib.import_module("haiku")
    network = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP(problem.sizes[1:])(x))
    )
    trained = mf.mask(problem.where, problem.params)

    def is_trained(module: str, name: str, value: Any) -> bool:
        _, _, layer = module.rpartition("/")
        return bool(trained[layer][name])

    named = {f"mlp/~/{layer}": leaves for layer, leaves in problem.params.items()}
    trainable, frozen = hk.data_structures.partition(is_trained, named)

    def loss_fn(trainable: Tree, frozen: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
        params = hk.data_structures.merge(trainable, frozen)
        return cross_entropy(network.apply(params, x), y)

    def step(trainable: Tree, frozen: Tree, x: jax.Array, y: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, x, y)
        return descend(trainable, grads), loss

    def get_params(trainable: Tree) -> Tree:
        return {
            name.rpartition("/")[2]: dict(leaves) for name, leaves in trainable.items()
        }

    return bench.Step(
        jax.jit(step, donate_argnums=0),
        init=partial(copy_arrays, trainable),
        args=(frozen, *problem.batch),
        get_params=get_params,
    )


# ---------------------------------------------------------------------------- Equinox


def equinox_model(problem: bench.Problem) -> tuple[Any, Any]:
    """Returns the network, and a tree of bools that marks its trainable leaves."""
    eqx = importlib.import_module("equinox")
    trained = mf.mask(problem.where, problem.params)
    layers: list[Any] = []
    marks: list[bool] = []
    for name, (n_in, n_out) in layer_widths(problem).items():
        linear = eqx.nn.Linear(n_in, n_out, key=jax.random.key(0))
        weights = (problem.params[name]["w"].T, problem.params[name]["b"])
        layers.append(eqx.tree_at(weight_and_bias, linear, weights))
        layers.append(eqx.nn.Lambda(jax.nn.relu))
        marks += [trained[name]["w"], trained[name]["b"]]
    model = eqx.nn.Sequential(layers[:-1])

    def all_leaves(model: Any) -> list[Any]:
        found: list[Any] = []
        for linear in model.layers[::2]:
            found += weight_and_bias(linear)
        return found

    nothing_trained = jax.tree.map(lambda leaf: False, model)
    return model, eqx.tree_at(all_leaves, nothing_trained, marks)


def weight_and_bias(linear: Any) -> tuple[Any, Any]:
    return linear.weight, linear.bias


def equinox_params(model: Any) -> Tree:
    """Returns the parameters of a model under the names of the problem."""
    params = {}
    for i, linear in enumerate(model.layers[::2]):
        params[f"linear_{i}"] = {"w": linear.weight.T, "b": linear.bias}
    return params


def equinox_loss(trainable: Any, frozen: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    eqx = importlib.import_module("equinox")
    model = eqx.combine(trainable, frozen)
    return cross_entropy(jax.vmap(model)(x), y)


class EquinoxStep:
    """Puts the state first. ``eqx.filter_jit`` can spare only the first argument."""

    def __init__(self, step: Function) -> None:
        eqx = importlib.import_module("equinox")

        def swapped(batch: tuple[Any, ...], model: Any) -> Any:
            return step(model, *batch)

        self.jitted = eqx.filter_jit(swapped, donate="all-except-first")

    def __call__(self, model: Any, *batch: Any) -> Any:
        return self.jitted(batch, model)

    def lower(self, model: Any, *batch: Any) -> Any:
        return self.jitted.lower(batch, model)


def equinox_filter_jit(problem: bench.Problem) -> bench.Step:
    eqx = importlib.import_module("equinox")
    model, is_trained = equinox_model(problem)

    def step(model: Any, x: jax.Array, y: jax.Array) -> Any:
        trainable, frozen = eqx.partition(model, is_trained)
        loss, grads = eqx.filter_value_and_grad(equinox_loss)(trainable, frozen, x, y)
        updates = jax.tree.map(lambda g: -g * bench.SGD_RATE, grads)
        return eqx.apply_updates(model, updates), loss

    return bench.Step(
        EquinoxStep(step),
        init=partial(copy_arrays, model),
        args=problem.batch,
        get_params=equinox_params,
    )


def equinox_split(problem: bench.Problem) -> bench.Step:
    eqx = importlib.import_module("equinox")
    model, is_trained = equinox_model(problem)
    trainable, rest = eqx.partition(model, is_trained)
    frozen, static = eqx.partition(rest, eqx.is_array)

    def step(trainable: Any, frozen: Any, x: jax.Array, y: jax.Array) -> Any:
        everything_else = eqx.combine(frozen, static)
        value_and_grad = jax.value_and_grad(equinox_loss)
        loss, grads = value_and_grad(trainable, everything_else, x, y)
        return descend(trainable, grads), loss

    return bench.Step(
        jax.jit(step, donate_argnums=0),
        init=partial(copy_arrays, trainable),
        args=(frozen, *problem.batch),
        get_params=lambda trainable: equinox_params(eqx.combine(trainable, rest)),
    )


# --------------------------------------------------------------------------- Flax NNX


def nnx_model(problem: bench.Problem) -> tuple[Any, Any]:
    """Returns the problem's network, and a filter for its trainable parameters."""
    nnx = importlib.import_module("flax.nnx")
    trained = mf.mask(problem.where, problem.params)
    layers: list[Any] = []
    for name, (n_in, n_out) in layer_widths(problem).items():
        linear = nnx.Linear(n_in, n_out, rngs=nnx.Rngs(0))
        linear.kernel = nnx.Param(problem.params[name]["w"])
        linear.bias = nnx.Param(problem.params[name]["b"])
        layers += [linear, nnx.relu]

    def is_trained(path: tuple[Any, ...], value: Any) -> bool:
        _, index, name = path[:3]  # ("layers", 2, "kernel")
        return bool(trained[f"linear_{index // 2}"]["w" if name == "kernel" else "b"])

    return nnx.Sequential(*layers[:-1]), nnx.All(nnx.Param, is_trained)


def nnx_params(model: Any) -> Tree:
    """Returns the parameters of a model under the names of the problem."""
    params = {}
    for i, linear in enumerate(list(model.layers)[::2]):
        params[f"linear_{i}"] = {"w": linear.kernel[...], "b": linear.bias[...]}
    return params


def nnx_loss(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return cross_entropy(model(x), y)


def nnx_graph_mode(problem: bench.Problem, cached: bool) -> bench.Step:
    """Builds the stateful form: the step updates the model in place."""
    nnx = importlib.import_module("flax.nnx")
    model, is_trained = nnx_model(problem)

    def update(model: Any, x: jax.Array, y: jax.Array) -> Any:
        argnums = nnx.DiffState(0, is_trained)
        value_and_grad = nnx.value_and_grad(nnx_loss, argnums=argnums)
        loss, grads = value_and_grad(model, x, y)
        nnx.update(model, descend(nnx.state(model, is_trained), grads))
        return loss

    jit_modes = modes_of(nnx.jit, graph=True)
    jitted = nnx.jit(update, donate_argnums=0, **jit_modes)
    if cached:
        cache_modes = modes_of(nnx.cached_partial, graph=True)
        return nnx_step(
            problem, model, nnx.cached_partial(jitted, model, **cache_modes)
        )
    return nnx_step(problem, model, partial(jitted, model))


def nnx_tree_mode(problem: bench.Problem, cached: bool) -> bench.Step:
    """Builds the form with ``graph=False``, which Flax plans to make its default."""
    nnx = importlib.import_module("flax.nnx")
    model, is_trained = nnx_model(problem)
    modes = modes_of(nnx.jit, graph=False)
    if not modes:
        raise ImportError("this version of Flax has no tree mode")

    def update(model: Any, x: jax.Array, y: jax.Array) -> Any:
        # This computes all gradients; the compiler drops the unused ones.
        loss, grads = nnx.value_and_grad(nnx_loss, **modes)(model, x, y)
        params, grads = nnx.state(model, is_trained), nnx.state(grads, is_trained)
        nnx.update(model, descend(params, grads))
        return loss

    if cached:
        fn = nnx.jit_partial(update, model, donate_argnums=0, graph=False)
        return nnx_step(problem, model, fn)
    jitted = nnx.jit(update, donate_argnums=0, **modes)
    return nnx_step(problem, model, partial(jitted, model))


def modes_of(transform: Function, graph: bool) -> dict[str, bool]:
    """Returns the options for graph or tree mode that this version of Flax has."""
    known = inspect.signature(transform).parameters
    return {name: graph for name in ("graph", "graph_updates") if name in known}


def nnx_step(problem: bench.Problem, model: Any, fn: Function) -> bench.Step:
    """Builds the step of a function ``fn(*batch)`` that updates its model in place."""
    nnx = importlib.import_module("flax.nnx")
    start = copy_arrays(nnx.state(model))

    def init() -> Any:
        nnx.update(model, copy_arrays(start))
        return model

    def step(model: Any, *batch: Any) -> Any:
        return model, fn(*batch)

    return bench.Step(step, init=init, args=problem.batch, get_params=nnx_params)


def nnx_split(problem: bench.Problem) -> bench.Step:
    nnx = importlib.import_module("flax.nnx")
    model, is_trained = nnx_model(problem)
    graphdef, trainable, rest = nnx.split(model, is_trained, ...)

    def loss_fn(trainable: Any, rest: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return nnx_loss(nnx.merge(graphdef, trainable, rest), x, y)

    def step(trainable: Any, rest: Any, x: jax.Array, y: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(trainable, rest, x, y)
        return descend(trainable, grads), loss

    return bench.Step(
        jax.jit(step, donate_argnums=0),
        init=partial(copy_arrays, trainable),
        args=(rest, *problem.batch),
        get_params=lambda trainable: nnx_params(nnx.merge(graphdef, trainable, rest)),
    )


# ------------------------------------------------------------------------------ optax


def optax(problem: bench.Problem, clip: str | None) -> bench.Step:
    """Uses ``selective_transform``, with clipping inside it, outside it or nowhere."""
    optax = importlib.import_module("optax")
    trained = mf.mask(problem.where, problem.params)
    freeze_mask = jax.tree.map(lambda is_trained: not is_trained, trained)
    clipping = optax.clip_by_global_norm(bench.CLIP_NORM)
    inner = optax.sgd(bench.SGD_RATE)
    if clip == "inside":
        inner = optax.chain(clipping, inner)
    # Up to optax 0.2.6, only optax.transforms has it.
    selective_transform = optax.transforms.selective_transform
    optimizer = selective_transform(inner, freeze_mask=freeze_mask)
    if clip == "outside":
        optimizer = optax.chain(clipping, optimizer)

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, moments = state
        loss, grads = jax.value_and_grad(problem.loss)(params, x, y)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state = (problem.params, optimizer.init(problem.params))
    return bench.Step(
        jax.jit(step, donate_argnums=0),
        init=partial(copy_arrays, state),
        args=problem.batch,
        get_params=lambda state: state[0],
    )


# -------------------------------------------------------------------------- the table

FORMS: dict[str, Callable[[bench.Problem], bench.Step]] = {
    "haiku": haiku,
    "equinox, filter_jit": equinox_filter_jit,
    "equinox, split, jax.jit": equinox_split,
    "nnx, nnx.jit": partial(nnx_graph_mode, cached=False),
    "nnx, nnx.jit, tree mode": partial(nnx_tree_mode, cached=False),
    "nnx, cached_partial": partial(nnx_graph_mode, cached=True),
    "nnx, jit_partial, tree mode": partial(nnx_tree_mode, cached=True),
    "nnx, split, jax.jit": nnx_split,
    "optax": partial(optax, clip=None),
}
CLIPPED_FORMS: dict[str, Callable[[bench.Problem], bench.Step]] = {
    "optax, clip inside": partial(optax, clip="inside"),
    "optax, clip outside": partial(optax, clip="outside"),
}
CLIP_BY_NORM_OF_ALL = ("optax, clip outside",)


def peers_table(options: Namespace, problems: Sequence[bench.Problem]) -> bench.Tables:
    """One SGD step in other libraries, and in minifreeze."""
    for problem in problems:
        if not problem.sizes:
            raise ValueError("--peers compares MLPs only; omit --model or --peers")
        problem = bench.place(problem, jax.local_devices()[:1])
        plain = bench.baseline_case("peers", problem, options)
        plain = replace(plain, optimizer="sgd")
        cases = []
        for clip in (False, True):
            for method in ("everything", "partition"):
                cases.append(replace(plain, method=method, clip=clip))
        for name in FORMS:
            cases.append(replace(plain, method=name))
        for name in CLIPPED_FORMS:
            cases.append(replace(plain, method=name, clip=True))
        title = f"{bench.describe(problem)}, in other libraries"
        yield title, bench.measure(cases, partial(build, problem), options)


def build(problem: bench.Problem, case: bench.Case) -> bench.Step:
    """Builds a step; raises ImportError if the library does not offer the form."""
    if case.method in bench.METHODS:
        return bench.build_step(problem, case)
    forms = CLIPPED_FORMS if case.clip else FORMS
    try:
        step = forms[case.method](problem)
        bench.run_calls(step, step.init(), 1)
    except (AttributeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ImportError(f"does not work with this version: {reason}") from error
    trainable, _ = mf.partition(problem.where, problem.params)
    group = bench.group_of(case)
    if case.clip and case.method in CLIP_BY_NORM_OF_ALL:
        group = bench.group_of(replace(case, method="everything"))
    trainable_bytes = bench.tree_bytes(trainable)
    return replace(step, group=group, trainable_bytes=trainable_bytes)
