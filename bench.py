# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.5.1", "numpy"]
# ///
# SPDX-License-Identifier: MIT
"""bench: what freezing buys on this machine, across its devices, for your model.

    python bench.py                                         # every table, under 90 seconds
    python bench.py --model mine.py:make --train 'head/*'   # your own model
    python bench.py --devices 8 64 512 --compile-only       # a cluster, planned on a laptop
    python bench.py --json run.json --plot run.png          # to keep

It prints what it runs on, its tables, and the answer. Every step donates its state and is fed its
own result. Cases are timed in rounds, in a shuffled order, and compared within a round; those that
must take the same step are shown to take it first. FLOPs and bytes are the compiled program's.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import multiprocessing
import os
import platform
import re
import runpy
import signal
import socket
import sys
import time
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from argparse import Namespace as Options
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, lru_cache, partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path

import minifreeze as mf

Tree: TypeAlias = Any
Loss: TypeAlias = Callable[..., jax.Array]
Step: TypeAlias = Callable[..., tuple[Tree, Any]]  # (state, *args) -> (state, loss)
# jax leaves these without types
config: Any = jax.config
wait: Any = jax.block_until_ready
Shape: Any = jax.ShapeDtypeStruct
Spec: Any = PartitionSpec

SGD_RATE, ADAM_RATE = 0.1, 1e-3
CLIP = 0.1  # a norm that the problems' gradients exceed, so that clipping clips
SAMPLE_S, SAMPLE_STEPS, RUN_STEPS = 0.05, 3, 10_000  # a sample's least, and its most
VECTOR = 2**24  # floats that no cache holds
JOIN_S = 60  # how long a process waits for its cluster
PART = f".{os.getpid()}.part"  # of a name: what takes the file's place once it is whole


class Stop(Exception):
    """Ends the run by a line on stderr, with 1 if it broke, with 2 if it could not be begun."""


# --------------------------------------------------------------------------- the problems


class Problem(NamedTuple):
    """What trains, by which ``loss(params, *batch)``; ``make(n)`` draws both for n devices."""

    name: str
    where: mf.Where
    loss: Loss
    make: Callable[[int], Any]
    sizes: tuple[int, ...] = ()  # of the MLP; a model of the user's has none
    batch: int = 0  # its rows, for each device


PROBLEMS: dict[str, tuple[tuple[int, ...], int, list[str]]] = {
    "seed": ((1, 300, 100, 10), 10, ["linear_0", "linear_2"]),
    "wide": ((784, 1024, 1024, 10), 128, ["linear_0", "linear_2"]),
    "deep": ((1024, 2048, 2048, 2048, 2048, 10), 64, ["linear_4"]),
}


def mlp(name: str, sizes: Sequence[int], batch: int, where: mf.Where, dtype: str) -> Problem:
    """The module's MLP, on noise."""

    def make(devices: int) -> tuple[Tree, tuple[Tree, ...]]:
        key_w, key_x, key_y = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(key_x, (devices * batch, sizes[0]), dtype)
        y = jax.random.randint(key_y, (devices * batch,), 0, sizes[-1])
        return jax.jit(mf.init, static_argnums=(1, 2))(key_w, tuple(sizes), dtype), (x, y)

    def loss(params: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
        return mf.loss_fn(*mf.partition("*", params), x, y)

    return Problem(name, where, loss, make, tuple(sizes), batch)


@lru_cache(maxsize=4)  # all that were ever drawn would fill the memory
def drawn(make: Callable[[int], Any], devices: int = 1, abstract: bool = False) -> Any:
    """Parameters and batch, or their shapes alone."""
    return jax.eval_shape(lambda: make(devices)) if abstract else make(devices)


# ------------------------------------------------------------ five ways to hold layers still

WAYS = ["all", "partition", "hoist", "stop_gradient", "mask", "stop_gradient, not donated"]


def way_of(method: str, problem: Problem, params: Tree, batch: tuple[Tree, ...]) -> Any:
    """(what is differentiated and donated, args, loss(it, *args), what was computed before).

    Nothing is closed over: XLA would fold it into the program.
    """
    trainable, frozen = mf.partition(problem.where, params)

    def of_parts(trainable: Tree, frozen: Tree, *batch: Tree) -> jax.Array:
        return problem.loss(mf.merge(trainable, frozen), *batch)

    def stopped(params: Tree, *batch: Tree) -> jax.Array:
        trainable, frozen = mf.partition(problem.where, params)
        return of_parts(trainable, jax.lax.stop_gradient(frozen), *batch)

    if method == "partition":  # no frozen gradient is made, and the state is what trains
        return trainable, (frozen, *batch), of_parts, None
    if method == "hoist":  # and what no trainable leaf touches is computed once a batch
        once, rest = mf.hoist(of_parts, trainable, frozen, *batch)
        features = partial(jax.jit(once), frozen, *batch)
        return trainable, (frozen, features()), rest, features
    # All are differentiated: those that are frozen to zeros, or `mask` multiplies them by 0.
    return params, batch, stopped if method.startswith("stop") else problem.loss, None


def take_step(row: Row, loss: Loss, where: mf.Where, state: Tree, *args: Tree) -> Tree:
    """On ``(params, moments)``: the loss's gradients, clipped or not, and an update."""
    params, moments = state
    value, grads = jax.value_and_grad(loss)(params, *args)
    if row.method == "mask":
        grads = jax.tree.map(lambda g, trains: g * trains, grads, mf.mask(where, grads))
    if row.clip:  # over all gradients that there are, and so it reads them all
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        scale = jnp.minimum(1, CLIP / norm)
        grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
    if row.optimizer == "adam":
        return adam(params, grads, *moments), value
    return (mf.sgd_step(params, grads, SGD_RATE), ()), value


def adam(params: Tree, grads: Tree, mean: Tree, square: Tree, count: jax.Array) -> Tree:
    """Adam (Kingma and Ba, 2015), with its usual constants."""
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
    square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, square, grads)
    count += 1
    rate, late = ADAM_RATE / (1 - 0.9**count), 1 - 0.999**count
    steps = jax.tree.map(lambda m, v: rate * m / (jnp.sqrt(v / late) + 1e-8), mean, square)
    params = jax.tree.map(lambda p, step: (p - step).astype(p.dtype), params, steps)
    return params, (mean, square, count)


def started(params: Tree, moments: Tree) -> Tree:
    """The state before the first step, in arrays of its own: a step deletes what it is given."""
    return jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, moments)


# ---------------------------------------------------------------------------- the figures

# Ratios are medians over rounds. FLOPs, bytes and shares are of one step on one device: `temp`,
# `alias` and `memory` as XLA says, `collective` of the results of collectives, `sent` by a ring
# for them, `kept` by hoist. `efficiency` is what of one device's pace each of many keeps.
KEYS = """table problem method clip platform devices simulated layout step_s spread_s vs_all
    compile_s flops flops_min peak_share temp_bytes trainable_bytes collective_bytes optimizer
    memory_bytes alias_bytes bytes_min roofline_share rows_per_s efficiency sent_bytes once_s
    kept_bytes kept_ratio break_even remark""".split()


class Row(SimpleNamespace):
    """A line of a table and of the JSON, its ``KEYS``; and how its step is run to come to them.

    ``make(row)`` gives it ``run``: ``run(fresh(), n)`` takes n steps and gives (state, loss). Of
    the state, ``read`` gives what is compared within a ``group``, which must take the same step.
    A sample takes ``steps``; ``samples`` are seconds a step, one a round.
    """

    def __init__(self, *values: Any, **named: Any) -> None:
        usual = dict.fromkeys([*KEYS, "run", "once"]) | {"clip": False, "simulated": False}
        usual |= {"devices": 1, "platform": jax.default_backend(), "optimizer": "sgd"}
        usual |= {"make": lambda row: None, "fresh": lambda: None, "read": lambda state: state}
        usual |= {"group": "", "batch": 1, "steps": SAMPLE_STEPS}
        super().__init__(**usual | dict(zip(KEYS, values)) | named)

    def figures(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in KEYS}


def tree_bytes(tree: Tree) -> int:
    """The bytes of its arrays on one device."""
    arrays = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)


def least_flops(problem: Problem, method: str) -> int | None:
    """The least FLOPs of a step: its matrix products, 2 x batch x in x out each.

    One a layer forward (``hoist`` has done those that need nothing that trains), one for the
    gradient of each ``w`` that trains, and one for that of each layer's input above the lowest
    layer that trains. Elementwise work, the slack to XLA's count, is left out. None for a model
    that is no MLP here.
    """
    if not problem.sizes:
        return None
    trains = mf.mask("*" if method == "all" else problem.where, drawn(problem.make, 1, True)[0])
    total, below = 0, False  # does something train below?
    for i, (n_in, n_out) in enumerate(pairwise(problem.sizes)):
        w, b = trains[f"linear_{i}"]["w"], trains[f"linear_{i}"]["b"]
        products = (method != "hoist" or below or w) + w + below
        total += products * 2 * problem.batch * n_in * n_out
        below = below or w or b
    return total


def least_bytes(loss: Loss, state: Tree, args: Tree, update: int) -> int:
    """The least bytes that a step moves: its inputs read once, what changes written once.

    Read: the parameters and the batch (of ``hoist``, the features) that the loss uses, and the
    moments. Written: what trains, and its moments. All else may stay in a cache.
    """
    traced = jax.make_jaxpr(loss)(state, *args).jaxpr
    used = {id(atom) for eqn in traced.eqns for atom in eqn.invars}
    given = zip(traced.invars, jax.tree.leaves((state, args)))
    return update + tree_bytes([leaf for var, leaf in given if id(var) in used])


# An asynchronous collective is a -start and a -done; the -done has the result's shape alone.
COLLECTIVE = re.compile(r" = (\(.*?\)|\S+) ([a-z-]+?)(?:-done)?\(")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collective_bytes(hlo: str, n: int) -> tuple[int, int]:
    """The bytes of the collectives' results on one of n devices, and those that a ring sends.

    >>> text = "%r = (f32[10]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=1"
    >>> collective_bytes(text, 4)
    (52, 78)
    """
    ring = {"all-reduce": 2 * (n - 1) / n, "all-gather": (n - 1) / n, "reduce-scatter": n - 1}
    ring |= {"all-to-all": (n - 1) / n, "collective-permute": 1}
    total, sent = 0, 0.0  # by the program's text; one in a loop counts once
    for result, kind in COLLECTIVE.findall(hlo):
        for name, bits, axes in ARRAY.findall(result) if kind in ring else ():
            size = math.prod(int(axis) for axis in axes.split(",") if axis)
            size = size if name == "pred" else size * int(bits) // 8
            total, sent = total + size, sent + ring[kind] * size
    return total, round(sent)


def note_program(row: Row, step: Any, *args: Tree) -> None:
    """Compiles a jitted step and notes what XLA says of it."""
    start = time.perf_counter()
    compiled = step.lower(*args).compile()
    row.compile_s = time.perf_counter() - start
    compiled = getattr(compiled, "compiled", compiled)  # Equinox and Flax wrap it
    flops = (compiled.cost_analysis() or {}).get("flops", -1)
    # On some GPUs XLA does not count what a library computes.
    row.flops = int(flops) if flops >= (row.flops_min or 0) else None
    row.collective_bytes, row.sent_bytes = collective_bytes(compiled.as_text(), row.devices)
    if (memory := compiled.memory_analysis()) is not None:
        row.temp_bytes, row.alias_bytes = memory.temp_size_in_bytes, memory.alias_size_in_bytes
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        row.memory_bytes = held - row.alias_bytes + row.temp_bytes


def note_times(row: Row, base: Sequence[float], peak: float, bandwidth: float) -> None:
    """Notes what the samples say, also beside those of `all` and what the device can do.

    The roofline: no step is faster than its least FLOPs at the peak, or its bytes at theirs.
    """
    row.step_s = float(np.median(row.samples))
    row.spread_s = float(np.median(np.abs(np.subtract(row.samples, row.step_s))))
    row.vs_all = float(np.median(np.divide(row.samples, base))) if base else None
    row.once_s = float(np.median(row.once.samples)) if row.once else None
    row.rows_per_s = row.batch / row.step_s
    if row.flops is not None and row.platform == jax.default_backend():  # whose peak it is
        row.peak_share = row.flops / row.step_s / peak
        least = max((row.flops_min or row.flops) / peak, (row.bytes_min or 0) / bandwidth)
        row.roofline_share = least / row.step_s


def note_comparisons(rows: Sequence[Row]) -> None:
    """Notes when hoist has paid, t_once / (t_partition - t_hoist), and how devices scale."""
    same = ("problem", "clip", "optimizer", "platform")
    for row, base in product([row for row in rows if row.step_s], repeat=2):
        if all(getattr(row, key) == getattr(base, key) for key in same):
            if base.method == "partition" and row.once_s and base.step_s > row.step_s:
                row.break_even = row.once_s / (base.step_s - row.step_s)
            if base.method == row.method and base.devices == 1 < row.devices:
                row.efficiency = base.step_s / row.step_s  # at as many rows a device


# ------------------------------------------------------------------------------ the clock


def prepare(problem: Problem, row: Row, devices: Sequence[jax.Device] = ()) -> None:
    """Compiles a method's step, on the rows of ``row.devices``, for the default one or others.

    Those share a batch by rows, a ``sharded`` parameter by its first axis that they divide. Of
    what is simulated the arrays are shapes alone.
    """

    def put(sharded: bool, leaf: Any) -> Any:
        axes = [i for i, n in enumerate(leaf.shape) if n and n % row.devices == 0]
        spec = Spec(*[None] * axes[0], "data") if sharded and axes else Spec()
        place = NamedSharding(Mesh(np.array(devices), ("data",)), spec)
        shape = Shape(leaf.shape, leaf.dtype, sharding=place)
        return shape if row.simulated else jax.device_put(leaf, place)

    row.batch = problem.batch * row.devices
    params, batch = drawn(problem.make, row.devices, row.simulated)
    count = jnp.zeros((), jnp.int32)
    if devices:
        params = jax.tree.map(partial(put, row.layout == "sharded"), params)
        batch = jax.tree.map(lambda leaf: put(leaf.shape[:1] == (row.batch,), leaf), batch)
        count = put(False, count)
    start, args, loss, once = way_of(row.method, problem, params, batch)
    trains, _ = mf.partition("*" if row.method == "all" else problem.where, params)
    row.flops_min, row.trainable_bytes = least_flops(problem, row.method), tree_bytes(trains)
    copies = 5 if row.optimizer == "adam" else 1  # what trains, and two moments both ways
    row.bytes_min = least_bytes(loss, start, args, copies * row.trainable_bytes)
    state = start, (start, start, count) if row.optimizer == "adam" else ()
    row.fresh = partial(started, *state)
    places = (jax.tree.map(lambda leaf: leaf.sharding, state), None) if devices else None
    donated = () if row.method.endswith("not donated") else (0,)
    take = partial(take_step, row, loss, problem.where)
    step = jax.jit(take, donate_argnums=donated, out_shardings=places)
    note_program(row, step, state, *args)

    def read(state: Tree) -> Tree:
        # Adam's first step is the gradients' sign, which a rounding turns: take its moment.
        tree = state[1][0] if state[1] else state[0]
        return mf.partition(problem.where, tree)[0] if row.method == "all" else tree

    # Clipped, `all` stands alone: a norm over all is another than one over what trains.
    row.group = row.optimizer + (", clipped" + " over all" * (row.method == "all")) * row.clip
    row.run, row.read = None if row.simulated else partial(repeat, step, args), read
    if once is not None:
        row.once = Row(run=partial(repeat, lambda state: (state, once()), ()))
        row.kept_bytes = tree_bytes(args[1])
        row.kept_ratio = row.kept_bytes / tree_bytes(batch)
        if "random_bits" in str(jax.make_jaxpr(once)()):
            row.remark = "what it draws at random is drawn once, and fixed"


def repeat(step: Step, args: Sequence[Tree], state: Tree, steps: int) -> tuple[Tree, Any]:
    for _ in range(steps):
        state, loss = step(state, *args)
    return state, loss


@contextlib.contextmanager
def outliving(row: Row) -> Iterator[None]:
    """A row that runs out of memory says so, is run no more, and the rest go on."""
    try:
        yield
    except (MemoryError, ValueError, jax.errors.JaxRuntimeError) as error:
        known = re.search("MemoryError|RESOURCE_EXHAUSTED|out.of.memory", repr(error), re.I)
        # The other processes of a cluster would wait for this one in the row's collectives.
        if not known or jax.process_count() > 1:
            raise
        row.remark, row.run = "out of memory", None


def measure(rows: Sequence[Row], options: Options) -> None:
    """Makes rows, shows that they agree, and times them in rounds."""
    first: dict[str, tuple[Row, Tree]] = {}
    for row in rows:
        with outliving(row):
            row.make(row)
            if row.run:
                check_agreement(row, first)
    if any(row.run for row in rows):
        rates = probes(options.dtype)
        time_in_rounds([*rows, *(row.once for row in rows if row.once), *rates], options.rounds)
        timed = [row for row in rows if row.run]
        bases = {(row.clip, row.optimizer): row.samples for row in timed if row.method == "all"}
        for row in timed:
            base = bases.get((row.clip, row.optimizer), [])
            note_times(row, base, *(probe.batch / min(probe.samples) for probe in rates))


@cache
def probes(dtype: str) -> list[Row]:
    """What the device can do at most: a product, a sum; a batch is their FLOPs, their bytes."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    matrix, vector = jax.random.normal(jax.random.key(0), (n, n), dtype), jnp.ones(VECTOR)
    rows = [Row(batch=2 * n**3), Row(batch=3 * vector.nbytes)]
    steps: list[Step] = [lambda a, b: (a, a @ b), lambda a, b: (a + b, None)]
    for row, step, start in zip(rows, steps, (matrix, vector)):
        row.run = partial(repeat, jax.jit(step, donate_argnums=0), (start,))
        row.fresh = partial(jnp.copy, start)
    return rows


def time_in_rounds(rows: Sequence[Row], rounds: int) -> None:
    """Times each row once a round, in a shuffled order that is the same in all processes."""
    order, shuffle = list(rows), np.random.default_rng(0).shuffle
    for row in order:
        row.samples = []
    gc.disable()  # it would go through all that JAX has loaded
    try:
        for _ in range(rounds):
            shuffle(order)
            for row in order:
                if row.run:
                    with outliving(row):
                        sample(row)
    finally:
        gc.enable()


def sample(row: Row) -> None:
    """Takes a sample that is long enough: process 0's time, for all must take as many steps.

    One untimed step goes before it, and brings back into the caches what others displaced.
    """
    state, _ = wait(row.run(row.fresh(), 1))
    start = time.perf_counter()
    wait(row.run(state, row.steps))
    took = np.float32(time.perf_counter() - start)
    seconds = float(multihost_utils.broadcast_one_to_all(took))
    if seconds >= SAMPLE_S or row.steps >= RUN_STEPS:
        row.samples.append(seconds / row.steps)
    else:
        row.steps *= 2
        sample(row)


def check_agreement(row: Row, first: dict[str, tuple[Row, Tree]]) -> None:
    """Stops where a row's first step is not that of its group's ``first``.

    A leaf may differ by a hundredth of its largest change, for a GPU multiplies float32 in
    TF32, and by four roundings of its largest value. What the first does not train must stay.
    """
    what, state = f"{row.problem}: {label(row)}", row.fresh()
    before = on_host(row.read(state))
    state, loss = row.run(state, 1)
    after = on_host(row.read(state))
    if not jnp.isfinite(loss).all():
        raise Stop(1, f"{what}: the loss is {loss}")
    like, wanted = first.setdefault(row.group, (row, after))
    for name, leaf in after.items():
        a, b, was = map(np.float32, (leaf, wanted.get(name, before[name]), before[name]))
        if not np.isfinite(a).all():
            raise Stop(1, f"{what}: the gradient of {name!r} is not finite")
        apart, change, value = (np.abs(x).max(initial=0) for x in (a - b, b - was, was))
        eps = float(np.spacing(leaf.dtype.type(1)))
        if apart > (allowed := max(0.01, 8 * eps) * change + 4 * eps * value):
            differs = f"{name!r} differs by {apart:.3g}, {allowed:.3g} is allowed"
            raise Stop(1, f"{what} must take the step of {label(like)}: {differs}")


def on_host(tree: Tree) -> dict[str, np.ndarray]:
    """Every array by its name, whole."""
    gather, host = partial(multihost_utils.process_allgather, tiled=True), {}
    for path, leaf in tree_flatten_with_path(tree)[0]:
        name = keystr(path, simple=True, separator="/")
        host[name] = np.asarray(leaf if leaf.is_fully_addressable else gather(leaf))
    return host


# ----------------------------------------------------------------------------- the tables

Rows: TypeAlias = Iterator[list[Row]]  # those that are timed together, before they are made


def methods_table(options: Options, problems: Sequence[Problem]) -> Rows:
    """a step, by how layers are held still"""
    usual = options.optimizer or "sgd"
    for problem in problems:
        # Of a model of the user's, nobody knows whether there is something to hoist.
        same = problem.sizes and least_flops(problem, "hoist") == least_flops(problem, "partition")
        *ways, not_donated = [way for way in WAYS if not (same and way == "hoist")]
        kinds = [(way, False, usual) for way in ways]
        if problem is problems[-1]:
            kinds += [(not_donated, False, usual), *((way, True, usual) for way in ways)]
            kinds += [(way, False, "adam") for way in ways[:-2] if options.optimizer is None]
        new = partial(Row, "methods", problem.name, make=partial(prepare, problem))
        yield [new(way, clip, optimizer=optimizer) for way, clip, optimizer in kinds]


def prefix_table(options: Options, problems: Sequence[Problem]) -> Rows:
    """a step, by how many layers from the first are frozen"""
    problem, rows = problems[-1], list[Row]()
    layers = [f"linear_{i}" for i in range(len(problem.sizes) - 1)]
    for n, way in [(0, "all"), *product(range(1, len(layers)), ("partition", "hoist"))]:
        make = partial(prepare, problem._replace(where=layers[n:]))
        optimizer = options.optimizer or "sgd"
        rows += [Row("prefix", f"{problem.name}, {n} frozen", way, make=make, optimizer=optimizer)]
    yield rows


def devices_table(options: Options, problems: Sequence[Problem]) -> Rows:
    """a data-parallel step on one device; simulated: no times, sharded as XLA does for CPUs"""
    for devices, problem in product(meshes(options), problems[-2:]):
        count, kind, optimizer = len(devices), devices[0].platform, options.optimizer or "sgd"
        simulated = bool(options.compile_only) or (kind == "cpu" and count > jax.process_count())
        leaves = jax.tree.leaves(drawn(problem.make, 1, True)[0])
        divides = count > 1 and any(n % count == 0 for leaf in leaves for n in leaf.shape)
        new = partial(Row, platform=kind, devices=count, simulated=simulated, optimizer=optimizer)
        # One device, with as many rows, must take the same step; it is not shown.
        alone = [] if simulated else [new("", problem.name, "all", make=partial(prepare, problem))]
        new = partial(new, "devices", problem.name, make=partial(prepare, problem, devices=devices))
        for layout in ("replicated", "sharded")[: 1 + divides]:
            yield alone + [new(way, layout=layout) for way in ("all", "partition")]
    if not (options.devices or options.compile_only) and jax.process_count() == 1:
        # In this process simulated devices would disturb all else.
        spawn, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
        worker = ProcessPoolExecutor(1, spawn, signal.signal, ignore)
        yield [Row(**figures) for figures in worker.submit(simulated_rows, options).result()]


def meshes(options: Options) -> Iterator[list[jax.Device]]:
    """Of each platform 1, 2, 4, ... devices, as many of each process."""
    usual, processes = jax.default_backend(), jax.process_count()
    alone = processes > 1 or options.devices or options.compile_only
    for kind in dict.fromkeys((usual,) if alone else (usual, "cpu", "gpu", "tpu")):
        with contextlib.suppress(RuntimeError):  # "Unknown backend"
            devices = jax.devices(kind)
            own = [[d for d in devices if d.process_index == i] for i in range(processes)]
            counts = {1, len(devices), *(processes * 2**i for i in range(20))}
            if kind == usual and len(devices) == 1:
                counts = set()  # it is in the other tables
            for n in options.devices or sorted(n for n in counts if n <= len(devices)):
                yield [d for some in own for d in some[: n // processes]] or devices[:1]


def simulated_rows(options: Options) -> list[dict[str, Any]]:
    """The figures of eight simulated CPU devices."""
    options.devices, options.compile_only = [8], True
    rows = [row for group in devices_table(options, set_up(options)) for row in group]
    measure(rows, options)
    return [row.figures() for row in rows]


def run_table(options: Options, problems: Sequence[Problem]) -> Rows:
    """the walk-through's 10,000 steps, each: by `train_step`, and by Haiku's"""
    problem = mlp("seed", *PROBLEMS["seed"], options.dtype)
    xs, ys = mf.dataset(jax.random.key(1), RUN_STEPS, problem.batch)
    batches = xs.astype(options.dtype), ys
    ours = partial(prepare_run, *mf.partition(problem.where, drawn(problem.make)[0]), batches)
    makes = {"loop": partial(ours, mf.train_step), "scan": partial(ours, mf.train)}
    if "peers" in options.tables:
        makes |= peers().run(sys.modules[__name__], problem, batches)
    yield [Row("run", "seed", way, steps=RUN_STEPS, make=make) for way, make in makes.items()]


def prepare_run(state: Tree, frozen: Tree, batches: Tree, step: Step, row: Row) -> None:
    """Makes a step that is called for each batch or, a scan, with them all."""
    scan, jitted = row.method.endswith("scan"), jax.jit(step, donate_argnums=0)
    one_by_one = list(zip(*batches))

    def run(state: Tree, steps: int) -> Any:
        for batch in [[column[:steps] for column in batches]] if scan else one_by_one[:steps]:
            state, loss = jitted(state, frozen, *batch)
        return state, loss

    row.run, row.fresh, row.batch = run, lambda: started(state, ())[0], batches[1].shape[1]
    note_program(row, jitted, state, frozen, *(batches if scan else one_by_one[0]))
    row.flops = None if scan else row.flops  # of a loop XLA counts the body once


def peers_table(options: Options, problems: Sequence[Problem]) -> Rows:
    """the same step in other libraries, in the forms that they recommend"""
    for problem in problems if len(problems) == 1 else (problems[0], problems[-1]):
        yield peers().rows(sys.modules[__name__], problem)


def peers() -> Any:
    with refusing("--peers needs the other libraries' steps"):
        return SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / ".ci/peers.py")))


# Each with what it uses of the options that not all tables use.
MANY = "sizes batch train freeze optimizer model devices compile_only cluster coordinator"
TABLES: dict[str, tuple[Callable[[Options, Sequence[Problem]], Rows], str]] = {
    "methods": (methods_table, "sizes batch train freeze optimizer model"),
    "prefix": (prefix_table, "sizes batch optimizer"),
    "devices": (devices_table, MANY),
    "run": (run_table, ""),
    "peers": (peers_table, "sizes batch train freeze"),
}

# ---------------------------------------------------------------- options and the cluster


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Refuses in one line what Python, JAX or the module does not take."""
    try:
        yield
    except Exception as error:
        raise Stop(2, f"error: {what}: {str(error).partition(chr(10))[0]}") from None


def positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise ArgumentTypeError(f"must be a positive integer below 2**31, got {text!r}")
    return int(text)


def writable(file: str) -> str:
    with refusing(f"{file}: cannot be written"):
        if not file or (os.path.exists(file) and not os.path.isfile(file)):
            raise OSError("it is no regular file")
        open(file + PART, "xb").close()
        os.remove(file + PART)
    return os.path.realpath(file)


def parse(argv: Sequence[str] | None) -> Options:
    """The options, with the tables that are asked for or all that use every option given."""
    # Without its usage text, argparse says what is wrong in one line, and exits with 2.
    parser = ArgumentParser("bench.py", SUPPRESS, __doc__.partition("\n")[0])
    add, which = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--tables", nargs="+", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    add("--peers", action="store_true", help="other libraries too")
    add("--sizes", nargs="+", type=positive, metavar="N", help="the widths of an MLP")
    add("--batch", type=positive, metavar="N", help="rows in a batch, a device")
    which.add_argument("--train", nargs="+", metavar="PATTERN", help="what trains")
    which.add_argument("--freeze", nargs="+", metavar="PATTERN", help="what does not")
    add("--optimizer", choices=("sgd", "adam"), help="default: sgd, and adam in a few rows")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32")
    add("--model", metavar="FILE.py:NAME", help="NAME() is (loss_fn, params, batch)")
    add("--rounds", type=positive, metavar="N", help="default: 7")
    add("--devices", nargs="+", type=positive, metavar="N", help="how many")
    add("--compile-only", action="store_true", help="simulate devices, time nothing")
    add("--cluster", action="store_true", help="SLURM, TPU pods, Kubernetes")
    add("--coordinator", metavar="HOST:PORT", help="a cluster named by hand")
    add("--processes", type=positive, metavar="N", help="how many it has")
    add("--process", type=int, metavar="I", help="which this one is, from 0")
    add("--json", type=writable, metavar="FILE", help="the results")
    add("--plot", type=writable, metavar="FILE", help="a picture of the tables prefix and methods")
    options = parser.parse_args(argv)
    given = {name for name, value in vars(options).items() if value not in (None, False)}
    ignored = {table: {*MANY.split()} - {*words.split()} for table, (_, words) in TABLES.items()}
    usual = [table for table in TABLES if table != "peers" and not given & ignored[table]]
    usual = usual[:1] if options.model else usual  # of a model the devices only where named
    options.tables = list(dict.fromkeys((options.tables or usual) + ["peers"] * options.peers))
    ignored |= {"model": {"sizes", "batch", "dtype"}, "cluster": {"coordinator"}}
    ignored |= {"compile_only": {"cluster", "coordinator", "rounds"}}
    for user in [*options.tables, *sorted(given & {"model", "cluster", "compile_only"})]:
        for name in sorted(given & ignored[user]):
            parser.error(f"--{name} is not used with {user}".replace("_", "-"))
    hand, counts = (options.coordinator, options.processes, options.process), options.devices or []
    address = re.fullmatch(r".+:(\d{1,5})", options.coordinator or "")
    whole = address and int(address[1]) < 2**16 and hand[2] in range(hand[1] or 0)
    pictured, patterns = {"prefix", "methods"}.intersection(options.tables), {"train", "freeze"}
    refusals: dict[str, Any] = {
        "JAX_DISABLE_JIT is set, and nothing would be compiled": config.jax_disable_jit,
        "--coordinator HOST:PORT, --processes N and --process 0 .. N - 1 go together": not whole
        and hand.count(None) < 3,
        f"--devices names a count twice: {counts}": len(set(counts)) < len(counts),
        "--model needs --train or --freeze": options.model and not given & patterns,
        "--plot draws the tables prefix and methods": options.plot and not pictured,
        "--json and --plot name the same file": options.json and options.json == options.plot,
    }
    for why, wrong in refusals.items():
        if wrong:
            parser.error(why)
    if options.plot:
        with refusing("--plot takes matplotlib (uv run --with matplotlib bench.py) and x.png"):
            from matplotlib.figure import Figure

            Figure().canvas.get_supported_filetypes()[Path(options.plot).suffix[1:].lower()]
    if "peers" in options.tables:
        peers()
    options.dtype, options.rounds = options.dtype or "float32", options.rounds or 7
    return options


def problems_of(options: Options) -> list[Problem]:
    """The problems that are asked for, of which something trains."""
    turned = [p.removeprefix("!") if p.startswith("!") else f"!{p}" for p in options.freeze or []]
    where, chosen, problems = options.train or turned, PROBLEMS, list[Problem]()
    if options.sizes:
        chosen = {"mlp": (tuple(options.sizes), 64, [f"linear_{len(options.sizes) - 2}"])}
    if options.model:
        chosen = {}
        with refusing(f"--model {options.model}: FILE.py:NAME must give (loss_fn, params, batch)"):
            problems = [load_model(options.model, where)]
    for name, (sizes, batch, usual) in chosen.items():
        problems += [mlp(name, sizes, options.batch or batch, where or usual, options.dtype)]
    for problem in problems:
        with refusing(problem.name):
            mf.partition(problem.where, drawn(problem.make, 1, True)[0])
    return problems


def load_model(spec: str, where: mf.Where) -> Problem:
    file, name = spec.rsplit(":", 1)
    sys.path.insert(0, str(Path(file).parent.resolve()))
    loss, params, batch = runpy.run_path(file)[name]()
    params, batch = jax.tree.map(jnp.asarray, (params, tuple(batch)))
    jax.eval_shape(jax.grad(loss), params, *batch)
    rows = next((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape), 1)

    def again(devices: int, leaf: jax.Array) -> jax.Array:  # a random key serves all devices
        return jnp.concatenate([leaf] * devices) if leaf.shape[:1] == (rows,) else leaf

    def make(devices: int) -> tuple[Tree, tuple[Tree, ...]]:
        return params, jax.tree.map(partial(again, devices), batch)

    return Problem(Path(file).stem, where, loss, make, batch=rows)


def set_up(options: Options) -> list[Problem]:
    """Makes or joins the devices that are asked for, and gives the problems.

    All processes end where one refuses, or was given other options than process 0.
    """
    if options.compile_only:
        flags = os.environ.get("XLA_FLAGS", "")  # another count there would be refused
        os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
        config.update("jax_platforms", "cpu")
        options.devices = options.devices or [1, 2, 4, 8]
        config.update("jax_num_cpu_devices", max(options.devices))
    if options.cluster or options.coordinator:
        join_cluster(options)
    problems, refusal, processes = list[Problem](), "", jax.process_count()
    try:
        problems = problems_of(options)
        for count in options.devices or []:
            if count > jax.device_count() or (count > 1 and count % processes):
                there = f"there are {jax.device_count()} in {processes} processes, {jax.devices()}"
                raise Stop(2, f"error: --devices {count}: {there}; --compile-only simulates more")
    except Stop as stop:
        refusal = stop.args[1]
    own = ("json", "plot", "process")
    given = [f"--{name} {value}" for name, value in vars(options).items() if name not in own]
    told = np.frombuffer(json.dumps([refusal, *given]).ljust(2**14).encode(), np.uint8)
    texts = multihost_utils.process_allgather(told).reshape(processes, -1)
    first, *others = [json.loads(text.tobytes()) for text in texts]
    for i, theirs in enumerate(others, 1):
        for mine, other in zip(first, theirs):
            if mine != other:
                raise Stop(2, f"error: process {i}: {other!r}; process 0: {mine!r}")
    if refusal:
        raise Stop(2, refusal)
    return problems


def join_cluster(options: Options) -> None:
    """Joins the other processes, and ends with them: JAX gives up on one silent for 100 s.

    It ends this process itself, by a C++ stack, where others do not come within JOIN_S, come
    twice, or die: that cannot be caught.
    """
    host, _, port = (options.coordinator or "").rpartition(":")
    end = time.monotonic() + JOIN_S
    while options.process:  # JAX would end it so where there is no process 0, too
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            break
        if time.monotonic() > end:
            raise Stop(1, f"no answer from {options.coordinator} in {JOIN_S} s")
        time.sleep(0.1)
    config.update("jax_cpu_collectives_implementation", "gloo")
    named = options.coordinator, options.processes, options.process
    with refusing("--cluster: none found, --coordinator names one"):
        jax.distributed.initialize(*named, initialization_timeout=JOIN_S)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX took it, for checkpoints
    if jax.process_index() != 0:  # process 0 alone prints and writes
        options.json = options.plot = None
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# ------------------------------------------------------------------------- presentation

MEANS = """step: median; vs all: within a round; of limit: the least that its FLOPs or bytes take;
memory: arguments, results and temporary bytes on a device, counted once where they share a place"""
LINE = "{:14}  {:27}" + " {:>8}" * 6
TITLES = LINE.format("problem", "method", "step", "vs all", "of limit", "rows/s", "FLOPs", "memory")


def quantity(value: float | None, unit: str) -> str:
    """Three digits with a prefix, or a share; nothing for None.

    >>> quantity(0.0012345, "s"), quantity(999.9, "B"), quantity(0.345, "x"), quantity(0.345, "%")
    ('1.23 ms', '1.00 kB', '0.345x', '34%')
    """
    if value is None:
        return ""
    if unit in ("x", "%"):
        return f"{value:#.3g}".rstrip(".") + "x" if unit == "x" else f"{value:.0%}"
    power = int(f"{value:.2e}".partition("e")[2]) // 3  # of the rounded value
    digits = f"{value / 1000**power:#.3g}".rstrip(".")
    return f"{digits} {' kMGTPfpnµm'[power].strip()}{unit}".rstrip()


def about(problem: Problem) -> str:
    """What is trained, on what."""
    trainable, frozen = mf.partition(problem.where, drawn(problem.make, 1, True)[0])
    network = list(problem.sizes) or f"\n{mf.summary(trainable=trainable, frozen=frozen)}"
    return f"{problem.name}: batch {problem.batch}, trains {problem.where} of {network}"


def label(row: Row) -> str:
    """A row's method and what is special about it."""
    clipped = "clipped" if row.clip and "clip" not in row.method else ""
    adam = "adam" if row.optimizer == "adam" else ""
    return ", ".join(filter(None, (row.method, clipped, adam, row.layout)))


def lines(row: Row) -> str:
    """A row under ``TITLES``, and below it what it has no columns for."""
    where = row.problem + f" on {row.devices}" * (row.table == "devices")
    values = row.step_s, row.vs_all, row.roofline_share, row.rows_per_s, row.flops, row.memory_bytes
    cells = map(quantity, values, ("s", "x", "%", "", "", "B"))
    return "\n    ".join((LINE.format(where, label(row), *cells).rstrip(), *notes(row)))


def notes(row: Row) -> Iterator[str]:
    if row.once_s:
        paid = f"paid after {row.break_even:.2g} epochs" if row.break_even else "never paid"
        kept = f"{quantity(row.kept_bytes, 'B')} more a batch ({row.kept_ratio:.1f}x its own)"
        yield f"once {quantity(row.once_s, 's')} and {kept}, {paid}"
    if row.devices > 1:
        results, sent = (quantity(n, "B") for n in (row.collective_bytes, row.sent_bytes))
        pace = f", each at {row.efficiency:.0%} of one's pace" if row.efficiency else ""
        simulated = "simulated: " * row.simulated
        yield f"{simulated}collectives' results {results}, sent by each in a ring {sent}{pace}"
    if row.remark:
        yield row.remark


def answers(rows: Sequence[Row]) -> list[str]:
    """What to decide by, in three lines that stand alone."""
    said, last = dict[str, list[str]](), {row.table: row.problem for row in rows}
    for row in rows:
        usual = row.method in ("all", "partition", "hoist", "loop", "scan") and not row.clip
        if usual and row.table in ("methods", "run", "devices") and row.problem == last[row.table]:
            what = row.problem + f" on {row.devices} devices" * (row.table == "devices")
            ratio = f" ({1 / row.vs_all:.3g}x)" if row.vs_all and row.method != "all" else ""
            step = f"{row.method} {quantity(row.step_s, 's')}{ratio}".rstrip()
            facts = filter(None, (step, quantity(row.memory_bytes, "B"), *notes(row)))
            said.setdefault(f"{what}, {row.layout or row.optimizer}", []).append(", ".join(facts))
    return [f"{what}: {' | '.join(texts)}" for what, texts in said.items()][:3]


def card(options: Options) -> dict[str, Any]:
    """What the figures depend on."""
    device, cpu = jax.devices()[0], platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        (cpu,) = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[:1] or [cpu]
    rates = [] if options.compile_only else probes(options.dtype)
    time_in_rounds(rates, 3)
    facts = {module.__name__: module.__version__ for module in (jax, jaxlib, np)}
    facts |= {"python": platform.python_version(), "platform": device.platform}
    facts |= {"device_kind": device.device_kind, "device_count": jax.device_count()}
    facts |= {"processes": jax.process_count(), "cpu": f"{cpu.strip()}, {os.cpu_count()} cores"}
    facts |= {"date": time.strftime("%Y-%m-%d", time.gmtime()), "dtype": options.dtype}
    peaks = [probe.batch / min(probe.samples) for probe in rates] or [None, None]
    return facts | dict(zip(("peak_flops", "peak_bytes_per_s"), peaks))


def write(options: Options, facts: dict[str, Any], rows: Sequence[Row], ended: str) -> None:
    """Writes the files that are asked for, each in one piece."""
    if options.json:
        results = {"card": facts, "complete": ended == "complete", "ended": ended}
        results["rows"] = [row.figures() for row in rows]
        Path(options.json + PART).write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        os.replace(options.json + PART, options.json)
    pictured = [row for row in rows if row.step_s and row.table in ("prefix", "methods")]
    if options.plot and pictured:
        figure = drawing(pictured)
        figure.savefig(options.plot + PART, dpi=200, format=Path(options.plot).suffix[1:].lower())
        os.replace(options.plot + PART, options.plot)


def drawing(rows: Sequence[Row]) -> Any:
    """Time against frozen layers, a line a method, and beside it the last problem's methods."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way in ("partition", "hoist"):
        prefix = [row for row in rows if row.table == "prefix" and row.method in ("all", way)]
        left.plot([1e3 * row.step_s for row in prefix], "o-", label=way)
    left.set(title="ms a step, by layers frozen from the first", xticks=range(len(prefix)))
    left.legend()
    methods = [row for row in rows if row.table == "methods"]
    methods = [row for row in methods if row.problem == methods[-1].problem]
    bars = right.barh([label(row) for row in methods], [1e3 * row.step_s for row in methods])
    right.bar_label(bars, fmt="{:.3g}")
    right.set(title="ms a step, by method", xmargin=0.15)
    right.invert_yaxis()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    options, facts, rows = Options(), dict[str, Any](), list[Row]()
    code, ended, say = 0, "complete", partial(print, flush=True)
    try:
        options = parse(argv)
        problems = set_up(options)
        facts = card(options)
        short = {k: quantity(v, "") if isinstance(v, float) else v for k, v in facts.items()}
        say(*(f"{key} {value}" for key, value in short.items()), sep=", ")
        for table in options.tables:
            make, _ = TABLES[table]
            say(f"\n{table}: {make.__doc__}", *map(about, problems), MEANS, TITLES, sep="\n")
            for group in make(options, problems):
                measure(group, options)
                rows += [row for row in group if row.table]
                note_comparisons([row for row in rows if row.table == table])
                say(*(lines(row) for row in group if row.table), sep="\n")
    except Stop as stop:
        code, ended = stop.args
    except KeyboardInterrupt:
        code, ended = 130, "interrupted"
    except OSError as error:  # stdout is gone: `| head`, a full device
        code, ended = 1, str(error)
    except Exception as error:
        code, ended = 1, repr(error)
        if jax.process_count() == 1:
            sys.excepthook(*sys.exc_info())
    try:
        if rows:
            write(options, facts, rows, ended)
            for text in answers(rows):
                say(text)
    except OSError as error:
        code, ended = code or 1, str(error)
    if code:
        say(f"bench.py: {ended}", file=sys.stderr)
    for child in multiprocessing.active_children():
        child.kill()
    if code in (0, 2):
        sys.exit(code)
    os._exit(code)  # Python's end, or JAX's farewell to a cluster, could hang


if __name__ == "__main__":
    main()
