"""The bench's step in other libraries: each in the forms that it recommends, named in the row.

`bench.py --peers` loads this file, which adds its tables. Every form donates its state, and is
shown to take the step that bench.py's own take before it is timed. A library that is not there, or
was made for another jax, is named and left out. Where a form is slow, the fast one of the same
library stands beside it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise, repeat
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import minifreeze as mf


class Peer(NamedTuple):
    """A step in one form."""

    step: Callable[..., Any]  # (state, *args) -> (state, loss)
    fresh: Callable[[], Any]  # a state of its own arrays
    args: tuple[Any, ...]
    read: Callable[[Any], Any]  # state -> the parameters, by the bench's names
    jitted: Any = None  # what can be compiled and asked, where that is not the step


def copied(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    targets = jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / y.size


# ---------------------------------------------------------------------------------- Haiku


def haiku_parts(problem: Any, params: Any, rate: float) -> Any:
    """(step, trainable, frozen, trainable -> our names), the step not jitted."""
    hk = importlib.import_module("haiku")
    trains = mf.mask(problem.where, params)
    network = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP(problem.sizes[1:])(x))
    )

    def selected(module: str, name: str, value: Any) -> bool:
        return bool(trains[module.rpartition("/")[2]][name])

    def loss_fn(trainable: Any, frozen: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        params = hk.data_structures.merge(trainable, frozen)
        return cross_entropy(network.apply(params, x), y)

    def step(trainable: Any, frozen: Any, x: jax.Array, y: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, x, y)
        return jax.tree.map(lambda p, g: p - g * rate, trainable, grads), loss

    def read(trainable: Any) -> Any:
        return {
            name.rpartition("/")[2]: dict(layer) for name, layer in trainable.items()
        }

    named = {f"mlp/~/{name}": layer for name, layer in params.items()}
    return step, *hk.data_structures.partition(selected, named), read


def haiku(problem: Any, params: Any, batch: Any, rate: float, norm: float) -> Peer:
    step, trainable, frozen, read = haiku_parts(problem, params, rate)
    return Peer(
        jax.jit(step, donate_argnums=0),
        partial(copied, trainable),
        (frozen, *batch),
        read,
    )


# -------------------------------------------------------------------------------- Equinox


def equinox(
    problem: Any, params: Any, batch: Any, rate: float, norm: float, form: str
) -> Peer:
    eqx = importlib.import_module("equinox")
    trains = mf.mask(problem.where, params)
    modules: list[Any] = []
    for name, (n_in, n_out) in zip(sorted(params), pairwise(problem.sizes)):
        linear = eqx.nn.Linear(n_in, n_out, key=jax.random.key(0))
        held = params[name]["w"].T, params[name]["b"]
        modules += [eqx.tree_at(leaves_of, linear, held), eqx.nn.Lambda(jax.nn.relu)]
    model = eqx.nn.Sequential(modules[:-1])
    linears = range(0, len(model.layers), 2)
    filter_spec = eqx.tree_at(
        lambda model: [leaf for i in linears for leaf in leaves_of(model[i])],
        jax.tree.map(lambda _: False, model),
        [trains[f"linear_{i // 2}"][name] for i in linears for name in ("w", "b")],
    )

    def loss_fn(trainable: Any, frozen: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(jax.vmap(eqx.combine(trainable, frozen))(x), y)

    def read(model: Any) -> Any:
        return {
            f"linear_{i // 2}": {"w": model[i].weight.T, "b": model[i].bias}
            for i in linears
        }

    def filtered(model: Any, x: jax.Array, y: jax.Array) -> Any:
        trainable, frozen = eqx.partition(model, filter_spec)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(trainable, frozen, x, y)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -g * rate, grads)), loss

    if form == "filter_jit":
        # What can be spared from donation is the first argument: the batch stands there.
        jitted = eqx.filter_jit(
            lambda rest, model: filtered(model, *rest), donate="all-except-first"
        )

        def step(model: Any, *rest: Any) -> Any:
            return jitted(rest, model)

        def lower(model: Any, *rest: Any) -> Any:
            return jitted.lower(rest, model)

        return Peer(
            step, partial(copied, model), batch, read, SimpleNamespace(lower=lower)
        )
    trainable, rest = eqx.partition(model, filter_spec)
    frozen, static = eqx.partition(rest, eqx.is_array)

    def plain(trainable: Any, frozen: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss_of(trainable: Any) -> jax.Array:
            return loss_fn(trainable, eqx.combine(frozen, static), x, y)

        loss, grads = jax.value_and_grad(loss_of)(trainable)
        return jax.tree.map(lambda p, g: p - g * rate, trainable, grads), loss

    return Peer(
        jax.jit(plain, donate_argnums=0),
        partial(copied, trainable),
        (frozen, *batch),
        lambda trainable: read(eqx.combine(trainable, rest)),
    )


def leaves_of(linear: Any) -> Any:
    return linear.weight, linear.bias


# ------------------------------------------------------------------------------- Flax NNX


def nnx(
    problem: Any, params: Any, batch: Any, rate: float, norm: float, form: str
) -> Peer:
    nnx = importlib.import_module("flax.nnx")
    trains = mf.mask(problem.where, params)
    modules: list[Any] = []
    for name, (n_in, n_out) in zip(sorted(params), pairwise(problem.sizes)):
        linear = nnx.Linear(n_in, n_out, rngs=nnx.Rngs(0))
        linear.kernel = nnx.Param(params[name]["w"])
        linear.bias = nnx.Param(params[name]["b"])
        modules += [linear, nnx.relu]
    model = nnx.Sequential(*modules[:-1])

    def selected(path: tuple[Any, ...], value: Any) -> bool:  # ("layers", 2, "kernel")
        return bool(
            trains[f"linear_{path[1] // 2}"]["w" if path[2] == "kernel" else "b"]
        )

    trainable = nnx.All(nnx.Param, selected)

    def loss_fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(model(x), y)

    def update(model: Any, x: jax.Array, y: jax.Array) -> Any:
        argnums = nnx.DiffState(0, trainable)
        loss, grads = nnx.value_and_grad(loss_fn, argnums=argnums)(model, x, y)
        params = nnx.state(model, trainable)
        nnx.update(model, jax.tree.map(lambda p, g: p - g * rate, params, grads))
        return loss

    def read(model: Any) -> Any:
        kept = [m for m in model.layers if isinstance(m, nnx.Linear)]
        return {
            f"linear_{i}": {"w": m.kernel[...], "b": m.bias[...]}
            for i, m in enumerate(kept)
        }

    graphdef, train, rest = nnx.split(model, trainable, ...)
    if form == "split/merge in jax.jit":

        def plain(train: Any, rest: Any, x: jax.Array, y: jax.Array) -> Any:
            def loss_of(train: Any) -> jax.Array:
                return loss_fn(nnx.merge(graphdef, train, rest), x, y)

            loss, grads = jax.value_and_grad(loss_of)(train)
            return jax.tree.map(lambda p, g: p - g * rate, train, grads), loss

        return Peer(
            jax.jit(plain, donate_argnums=0),
            partial(copied, train),
            (rest, *batch),
            lambda train: read(nnx.merge(graphdef, train, rest)),
        )

    def modes(function: Any) -> dict[str, bool]:
        """What cached_partial works in, where this version of Flax asks."""
        return dict.fromkeys(
            {"graph", "graph_updates"} & {*inspect.signature(function).parameters}, True
        )

    jitted = nnx.jit(update, donate_argnums=0, **modes(nnx.jit))
    call = partial(jitted, model)
    if form == "cached_partial":
        call = nnx.cached_partial(jitted, model, **modes(nnx.cached_partial))
    start = nnx.state(model)

    def fresh() -> Any:
        nnx.update(
            model, copied(start)
        )  # the model's own arrays are replaced at every step
        return model

    start = copied(start)
    return Peer(lambda model, *rest: (model, call(*rest)), fresh, batch, read, jitted)


# ---------------------------------------------------------------------------------- optax


def optax(
    problem: Any, params: Any, batch: Any, rate: float, norm: float, form: str
) -> Peer:
    optax = importlib.import_module("optax")
    frozen = jax.tree.map(lambda trains: not trains, mf.mask(problem.where, params))
    sgd, clip = optax.sgd(rate), optax.clip_by_global_norm(norm)
    inner = optax.chain(clip, sgd) if form == "inside" else sgd
    # Until optax 0.2.6 it stands with the transforms alone.
    selective = getattr(
        optax, "selective_transform", optax.transforms.selective_transform
    )
    optimizer = selective(inner, freeze_mask=frozen)
    if form == "outside":
        optimizer = optax.chain(clip, optimizer)

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, moments = state
        loss, grads = jax.value_and_grad(problem.loss)(params, x, y)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state = params, optimizer.init(params)
    return Peer(
        jax.jit(step, donate_argnums=0),
        partial(copied, state),
        batch,
        lambda state: state[0],
    )


# ----------------------------------------------------------------------------- the tables

FORMS: dict[str, Callable[..., Peer]] = {  # the row's name; clipped where it says so
    "haiku": haiku,
    "equinox, filter_jit": partial(equinox, form="filter_jit"),
    "equinox, split, jax.jit": partial(equinox, form="split"),
    "nnx, nnx.jit": partial(nnx, form="jit"),
    "nnx, cached_partial": partial(nnx, form="cached_partial"),
    "nnx, split, jax.jit": partial(nnx, form="split/merge in jax.jit"),
    "optax": partial(optax, form="plain"),
    "optax, clip inside": partial(optax, form="inside"),
    "optax, clip outside": partial(optax, form="outside"),
}
GROUPS = {
    "optax, clip inside": "sgd, clipped",
    "optax, clip outside": "sgd, clipped over all",
}


def add_tables(bench: Any) -> None:
    """Adds the table of peers, and Haiku's rows to that of the walk-through, to the bench's own."""
    ours = bench.run_table

    def run_table(options: Any, problems: Any) -> Any:
        for group in ours(options, problems):
            _, _, batches, _ = group[0].make.args  # of prepare_run
            yield [*group, *haiku_runs(bench, problems[0], batches)]

    def peers_table(options: Any, problems: Any) -> Any:
        """the same step in other libraries, in the forms that they recommend"""
        for problem in problems if len(problems) == 1 else (problems[0], problems[-1]):
            yield rows(bench, problem)

    run_table.__doc__ = f"{ours.__doc__}; and Haiku's"
    bench.TABLES |= {"run": run_table, "peers": peers_table}
    bench.TABLES["devices"] = bench.TABLES.pop(
        "devices"
    )  # the last: it changes what there is
    bench.UNUSED["peers"] = f"optimizer model {bench.DEVICES}"


def rows(bench: Any, problem: Any) -> list[Any]:
    """The rows of one problem, ours first; a form that is not to be had says why."""
    params, batch = problem.params, problem.batch
    ours = [
        bench.Row(
            "peers", problem.name, way, clip, make=partial(bench.prepare, problem)
        )
        for clip in (False, True)
        for way in ("all", "partition")
    ]

    def make(peer: Peer, row: Any) -> None:
        row.flops_min = bench.least_flops(problem, "partition")
        jitted = peer.jitted or peer.step
        if hasattr(jitted, "lower"):  # not nnx.jit before flax 0.11
            bench.note_program(row, jitted, peer.fresh(), *peer.args)
        row.trainable_bytes, row.bytes_min = ours[1].trainable_bytes, ours[1].bytes_min
        row.run = partial(bench.take_steps, peer.step, partial(repeat, peer.args))
        row.batch, row.group = problem.rows, GROUPS.get(row.method, "sgd")
        row.fresh, row.read = peer.fresh, peer.read

    theirs = []
    for name, build in FORMS.items():
        row = bench.Row("peers", problem.name, name, name in GROUPS)
        try:
            row.make = partial(
                make, build(problem, params, batch, bench.SGD_RATE, bench.CLIP)
            )
        except (ImportError, AttributeError, TypeError) as error:
            row.remark = f"left out: {error}"
        theirs.append(row)
    return ours + theirs


def haiku_runs(bench: Any, problem: Any, batches: Any) -> list[Any]:
    """Haiku's step in a loop and in a scan over the walk-through's batches."""
    try:
        step, trainable, frozen, read = haiku_parts(
            problem, problem.params, bench.SGD_RATE
        )
    except (ImportError, AttributeError):  # the table of peers says so
        return []

    def scan(trainable: Any, frozen: Any, *batches: Any) -> Any:
        return jax.lax.scan(
            lambda state, batch: step(state, frozen, *batch), trainable, batches
        )

    return [
        bench.Row(
            "run",
            problem.name,
            f"haiku {way}",
            steps=bench.RUN_STEPS,
            read=read,
            make=partial(bench.prepare_run, trainable, frozen, batches, step),
        )
        for way, step in (("loop", step), ("scan", scan))
    ]
