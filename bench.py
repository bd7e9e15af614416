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

It prints what it runs on, its tables row by row, and the answer in its last lines. Every step
donates its state and is fed its own result. Cases are timed in rounds, in a shuffled order, and
compared within a round, so that what slows the machine down slows them all; those that must
take the same step are shown to take it first. FLOPs and bytes are the compiled program's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import socket
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path

import minifreeze as mf

Tree: TypeAlias = Any
Data: TypeAlias = Any  # (params, batch), the batch a tuple
Step: TypeAlias = Callable[..., tuple[Tree, Any]]  # (state, *args) -> (state, loss)
Options: TypeAlias = argparse.Namespace

wait: Any = jax.block_until_ready
config: Any = jax.config  # jax leaves these without types
Spec: Any = PartitionSpec

SGD_RATE, ADAM_RATE = 0.1, 1e-3
CLIP = 0.1  # a norm that the problems' gradients exceed, so that clipping clips
SAMPLE_S, SAMPLE_STEPS = 0.05, 3  # a sample is no shorter, far above the clock's grain
RUN_STEPS = 10_000
VECTOR = 2**24  # floats that no cache holds
OUT_OF_MEMORY = "out of memory"
JOIN_S = 60  # how long a process waits for its cluster


class Refused(Exception):
    """What was asked for cannot be done: one line on stderr, exit code 2."""


class Broken(Exception):
    """The measurement cannot be trusted, or not go on: one line on stderr, exit code 1."""


# --------------------------------------------------------------------------- the problems


@dataclass(frozen=True)
class Problem:
    """What trains, by which ``loss(params, *batch)``; ``make(n)`` draws both for n devices."""

    name: str
    where: mf.Where
    loss: Callable[..., jax.Array]
    make: Callable[[int], Data]
    sizes: tuple[int, ...] = ()  # of the MLP; a model of the user's has none
    batch: int = 0  # rows, for each device

    def shapes(self, devices: int = 1) -> Data:
        return jax.eval_shape(lambda: self.make(devices))


PROBLEMS: dict[str, tuple[tuple[int, ...], int, list[str]]] = {
    "seed": ((1, 300, 100, 10), 10, ["linear_0", "linear_2"]),
    "wide": ((784, 1024, 1024, 10), 128, ["linear_0", "linear_2"]),
    "deep": ((1024, 2048, 2048, 2048, 2048, 10), 64, ["linear_4"]),
}


def mlp(name: str, sizes: Sequence[int], batch: int, where: mf.Where, dtype: str) -> Problem:
    """The module's MLP, on ``batch`` rows of noise a device."""

    def make(devices: int) -> Data:
        key_w, key_x, key_y = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(key_x, (devices * batch, sizes[0]), dtype)
        y = jax.random.randint(key_y, (devices * batch,), 0, sizes[-1])
        return jax.jit(mf.init, static_argnums=(1, 2))(key_w, tuple(sizes), dtype), (x, y)

    def loss(params: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
        return mf.loss_fn(*mf.partition("*", params), x, y)

    return Problem(name, where, loss, make, tuple(sizes), batch)


@functools.lru_cache(maxsize=4)  # all that were ever drawn would fill the memory
def drawn(make: Callable[[int], Data], devices: int = 1) -> Data:
    return make(devices)


# ------------------------------------------------------------ five ways to hold layers still


class Way(NamedTuple):
    """What a step differentiates, what it is given beside that, and the loss of the two."""

    state: Tree  # donated, and replaced by its update
    args: tuple[Tree, ...]  # never closed over: XLA would fold them into the program
    loss: Callable[..., jax.Array]  # loss(state, *args)
    grads: Callable[[Tree], Tree] = lambda grads: grads  # what becomes of the gradients
    once: Callable[[], Tree] | None = None  # what was computed before the first step


def train_all(problem: Problem, params: Tree, batch: Tree) -> Way:
    """Holds nothing still."""
    return Way(params, batch, problem.loss)


def partition(problem: Problem, params: Tree, batch: Tree) -> Way:
    """Differentiates what trains: no frozen gradient is made, and the state is that alone."""

    def loss(trainable: Tree, frozen: Tree, *batch: Tree) -> jax.Array:
        return problem.loss(mf.merge(trainable, frozen), *batch)

    trainable, frozen = mf.partition(problem.where, params)
    return Way(trainable, (frozen, *batch), loss)


def hoist(problem: Problem, params: Tree, batch: Tree) -> Way:
    """Does the same, with what no trainable leaf touches computed once a batch."""
    trainable, (frozen, *_), loss, *_ = partition(problem, params, batch)
    once, rest = mf.hoist(loss, trainable, frozen, *batch)
    features = partial(jax.jit(once), frozen, *batch)
    return Way(trainable, (frozen, features()), rest, once=features)


def stop_gradient(problem: Problem, params: Tree, batch: Tree) -> Way:
    """Differentiates all parameters, those that are frozen to zeros."""

    def loss(params: Tree, *batch: Tree) -> jax.Array:
        trainable, frozen = mf.partition(problem.where, params)
        return problem.loss(mf.merge(trainable, jax.lax.stop_gradient(frozen)), *batch)

    return Way(params, batch, loss)


def mask(problem: Problem, params: Tree, batch: Tree) -> Way:
    """Differentiates all parameters, and multiplies the frozen gradients by 0."""

    def masked(grads: Tree) -> Tree:
        return jax.tree.map(lambda g, trains: g * trains, grads, mf.mask(problem.where, grads))

    return Way(params, batch, problem.loss, masked)


WAYS = {f.__name__: f for f in (partition, hoist, stop_gradient, mask)}
WAYS = {"all": train_all, **WAYS, "stop_gradient, not donated": stop_gradient}


def step_of(way: Way, optimizer: str, clip: bool) -> Step:
    """The step on ``(params, moments)``: the loss's gradients, clipped or not, and an update."""

    def step(state: Tree, *args: Tree) -> tuple[Tree, jax.Array]:
        params, moments = state
        loss, grads = jax.value_and_grad(way.loss)(params, *args)
        grads = way.grads(grads)
        if clip:  # over all gradients that there are, and so it reads them all
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
            scale = jnp.minimum(1, CLIP / norm)
            grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
        if optimizer == "adam":
            return adam(params, grads, *moments), loss
        return (mf.sgd_step(params, grads, SGD_RATE), ()), loss

    return step


def started(optimizer: str, params: Tree) -> Tree:
    """The state before the first step, of arrays of its own: a step deletes what it is given."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    moments = (zeros, zeros, jnp.zeros((), jnp.int32)) if optimizer == "adam" else ()
    return jax.tree.map(jnp.copy, (params, moments))


def adam(params: Tree, grads: Tree, mean: Tree, square: Tree, count: jax.Array) -> Tree:
    """Adam (Kingma and Ba, 2015), with its usual constants."""
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
    square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, square, grads)
    count += 1

    def new(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        m, v = m / (1 - 0.9**count), v / (1 - 0.999**count)
        return (p - ADAM_RATE * m / (jnp.sqrt(v) + 1e-8)).astype(p.dtype)

    return jax.tree.map(new, params, mean, square), (mean, square, count)


# ---------------------------------------------------------------------------- the figures


@dataclass
class Row:
    """One line of a table and of the JSON, in its keys and their order; None: no such figure.

    Ratios are medians over rounds. FLOPs, bytes and shares are of one step on one device.
    """

    table: str
    problem: str
    method: str
    clip: bool = False
    platform: str = field(default_factory=jax.default_backend)
    devices: int = 1
    simulated: bool = False
    layout: str | None = None
    step_s: float | None = None
    spread_s: float | None = None  # median absolute deviation
    vs_all: float | None = None  # `all` of the same clipping, optimizer and layout
    compile_s: float | None = None
    flops: int | None = None
    flops_min: int | None = None  # least_flops
    peak_share: float | None = None  # flops a second, of the peak in the same rounds
    temp_bytes: int | None = None
    trainable_bytes: int | None = None
    collective_bytes: int | None = None  # the results of collectives
    optimizer: str = "sgd"
    memory_bytes: int | None = None  # arguments + outputs - aliased + temporary
    alias_bytes: int | None = None
    bytes_min: int | None = None  # least_bytes
    roofline_share: float | None = None
    rows_per_s: float | None = None
    efficiency: float | None = None  # of many devices: what of one device's pace each keeps
    sent_bytes: int | None = None  # by each device of a ring
    once_s: float | None = None  # hoist: what is computed before the first step, a batch
    kept_bytes: int | None = None  # and kept with it
    kept_ratio: float | None = None  # of the batch's own bytes
    break_even: float | None = None  # epochs after which that has paid
    remark: str | None = None


def tree_bytes(tree: Tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def least_flops(problem: Problem, method: str) -> int | None:
    """The least FLOPs of a step: its matrix products, 2 x batch x in x out each.

    - Forward, one product a layer. ``hoist`` has done those below the lowest layer that
      trains, and that layer's own unless its ``w`` trains.
    - For the gradient of each ``w`` that trains, one.
    - For the gradient of a layer's input, one in each layer above the lowest that trains
      (be it only its ``b``): below, nobody asks for it.

    ``all`` trains everything. Elementwise work (biases, ReLU, softmax, the update) is left
    out: it is the slack between this and XLA's count. None for a model that is no MLP here.
    """
    if not problem.sizes:
        return None
    trains = mf.mask("*" if method == "all" else problem.where, problem.shapes()[0])
    products = [2 * problem.batch * n_in * n_out for n_in, n_out in pairwise(problem.sizes)]
    layers = [trains[f"linear_{i}"] for i in range(len(products))]
    lowest = min(i for i, layer in enumerate(layers) if layer["w"] or layer["b"])
    total = 0
    for i, (layer, flops) in enumerate(zip(layers, products)):
        hoisted = method == "hoist" and (i < lowest or (i == lowest and not layer["w"]))
        total += flops * ((not hoisted) + layer["w"] + (i > lowest))
    return total


def least_bytes(way: Way, trains: int, moments: int) -> int:
    """The least bytes that a step moves: its inputs read once, what changes written once.

    Read: the parameters and the batch (of ``hoist``, the features) that the loss uses, and the
    moments. Written: what trains, and its moments. All else may stay in a cache.
    """
    traced = jax.make_jaxpr(way.loss)(way.state, *way.args).jaxpr
    used = {id(atom) for eqn in traced.eqns for atom in eqn.invars}
    return trains + 2 * moments + tree_bytes([v.aval for v in traced.invars if id(v) in used])


def least_seconds(flops: float, moved: float, peak: float, bandwidth: float) -> float:
    """The roofline: no step is faster than its FLOPs at the peak, or its bytes at theirs."""
    return max(flops / peak, moved / bandwidth)


def median_and_spread(samples: Sequence[float]) -> tuple[float, float]:
    """The median, and the median distance from it."""
    middle = statistics.median(samples)
    return middle, statistics.median(abs(sample - middle) for sample in samples)


def paired_ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(samples, base, strict=True))


def epochs_to_pay(once: float, partition: float, hoist: float) -> float | None:
    """The visits of a batch after which hoist has paid: its cost over what a visit saves."""
    return once / (partition - hoist) if partition > hoist else None


# What a ring sends, a device, for each byte of the result that it has in the end.
RING: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
# An asynchronous collective is a -start and a -done; the -done has the result's shape alone.
COLLECTIVE = re.compile(rf" = (\(.*?\)|\S+) ({'|'.join(RING)})(?:-done)?\(")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collective_bytes(hlo: str, devices: int) -> tuple[int, int]:
    """The bytes of the collectives' results on a device, and those that a ring sends for them.

    >>> text = "%r = (f32[10]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=1"
    >>> collective_bytes(text, devices=4)
    (52, 78)
    """
    total, sent = 0, 0.0  # by the program's text; one in a loop counts once
    for result, kind in COLLECTIVE.findall(hlo):
        for name, bits, axes in ARRAY.findall(result):
            size = math.prod(int(n) for n in axes.split(",") if n)
            size = size if name == "pred" else size * int(bits) // 8
            total, sent = total + size, sent + RING[kind](devices) * size
    return total, round(sent)


def note_program(row: Row, step: Any, *args: Tree) -> None:
    """Compiles a jitted step and notes what XLA says of it."""
    start = time.perf_counter()
    compiled = step.lower(*args).compile()
    row.compile_s = time.perf_counter() - start
    compiled = getattr(compiled, "compiled", compiled)  # Equinox and Flax wrap it
    flops = (compiled.cost_analysis() or {}).get("flops")
    # On some GPUs XLA does not count what a library computes.
    row.flops = None if flops is None or flops < (row.flops_min or 0) else int(flops)
    row.collective_bytes, row.sent_bytes = collective_bytes(compiled.as_text(), row.devices)
    if (memory := compiled.memory_analysis()) is not None:
        row.temp_bytes, row.alias_bytes = memory.temp_size_in_bytes, memory.alias_size_in_bytes
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        row.memory_bytes = held - row.alias_bytes + row.temp_bytes


def note_times(case: Case, base: Sequence[float], peak: float, bandwidth: float) -> None:
    """Notes what the samples say, also beside those of `all` and what the device can do."""
    row = case.row
    row.step_s, row.spread_s = median_and_spread(case.samples)
    row.vs_all = paired_ratio(case.samples, base) if base else None
    row.rows_per_s = case.rows / row.step_s if case.rows else None
    row.once_s = median_and_spread(case.once.samples)[0] if case.once else None
    if row.flops is not None and row.platform == jax.default_backend():  # whose peak it is
        row.peak_share = row.flops / row.step_s / peak
        least = least_seconds(row.flops_min or row.flops, row.bytes_min or 0, peak, bandwidth)
        row.roofline_share = least / row.step_s


def note_comparisons(rows: Sequence[Row]) -> None:
    """Notes when hoist has paid against partition, and what of one device's pace many keep."""
    for row, base in product(rows, rows):
        like = base.problem, base.clip, base.optimizer, base.platform
        if (
            row.step_s
            and base.step_s
            and like == (row.problem, row.clip, row.optimizer, row.platform)
        ):
            if row.once_s and base.method == "partition":
                row.break_even = epochs_to_pay(row.once_s, base.step_s, row.step_s)
            if base.devices == 1 < row.devices and base.method == row.method:
                row.efficiency = base.step_s / row.step_s  # at as many rows a device


# ------------------------------------------------------------------------------ the clock


@dataclass
class Case:
    """Something to time: ``run(fresh(), n)`` takes n steps and gives (state, loss)."""

    row: Row
    run: Callable[[Tree, int], tuple[Tree, Any]]
    fresh: Callable[[], Tree]  # the same state for each sample: it gets donated
    read: Callable[[Tree], Tree] = lambda state: state  # what of the state is compared
    group: str = ""  # of cases that must take the same step
    first: int = 1  # steps until they are compared
    steps: int = 0  # a sample; 0: as many as it needs
    rows: int = 0  # of a batch
    once: Case | None = None
    samples: list[float] = field(default_factory=list)  # s a step, one a round


def repeat(step: Step, args: Sequence[Tree], state: Tree, steps: int) -> tuple[Tree, Any]:
    for _ in range(steps):
        state, loss = step(state, *args)
    return state, loss


def prepare(problem: Problem, row: Row, mesh: Mesh | None = None, devices: int = 1) -> Case:
    """Compiles a method's step: for the default device, with the rows of one or of many, or
    for a mesh, over whose devices the batch is spread; and the parameters, if ``sharded``.
    """
    make_way, start = partial(WAYS[row.method], problem), partial(started, row.optimizer)
    data = drawn(problem.make, devices) if mesh is None else problem.shapes(mesh.size)
    way = make_way(*data)
    trains, _ = mf.partition("*" if row.method == "all" else problem.where, data[0])
    row.trainable_bytes, row.flops_min = tree_bytes(trains), least_flops(problem, row.method)
    moments = tree_bytes(jax.eval_shape(start, trains)) - row.trainable_bytes
    donated, everywhere = () if row.method.endswith("not donated") else (0,), None
    if mesh is None:
        row.bytes_min = least_bytes(way, row.trainable_bytes, moments)
        step = jax.jit(step_of(way, row.optimizer, row.clip), donate_argnums=donated)
        fresh: Any = start
    else:
        places, everywhere = spread(problem, row, mesh), NamedSharding(mesh, Spec())
        lay = make_way(*places)
        moment_places = (lay.state, lay.state, everywhere) if row.optimizer == "adam" else ()
        states = lay.state, moment_places
        step = jax.jit(
            step_of(way, row.optimizer, row.clip),
            donate_argnums=donated,
            in_shardings=(states, *lay.args),
            out_shardings=(states, everywhere),
        )
        fresh = jax.jit(start, out_shardings=states)
        row.trainable_bytes = sum(
            math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, place in zip(*map(jax.tree.leaves, (way.state, lay.state)))
        )
    note_program(row, step, jax.eval_shape(start, way.state), *way.args)
    if mesh is not None and not row.simulated:
        way = make_way(*jax.device_put(drawn(problem.make, mesh.size), places))

    def read(state: Tree) -> Tree:
        # Adam's first step is the gradients' sign, which a rounding turns: take its moment.
        tree = state[1][0] if state[1] else state[0]
        tree = mf.partition(problem.where, tree)[0] if row.method == "all" else tree
        if mesh is not None:
            tree = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    # Clipped, `all` stands alone: a norm over all is another than one over what trains.
    group = row.optimizer + (", clipped" + " over all" * (row.method == "all")) * row.clip
    case = Case(row, partial(repeat, step, way.args), partial(fresh, way.state), read, group)
    case.rows = rows_in(data[1])
    if (once := way.once) is not None:
        case.once = Case(row, partial(repeat, lambda state: (state, once()), ()), lambda: None)
        row.kept_bytes = tree_bytes(way.args[1])
        row.kept_ratio = row.kept_bytes / tree_bytes(data[1])
        if "random_bits" in str(jax.make_jaxpr(once)()):
            row.remark = "what it draws at random is drawn once, and fixed"
    return case


def spread(problem: Problem, row: Row, mesh: Mesh) -> Tree:
    """Where parameters and batch go: what is shared by its first axis that divides, or whole."""
    params, batch = problem.shapes(mesh.size)

    def place(leaf: Any, axes: Sequence[int]) -> NamedSharding:
        axis = next((i for i in axes if leaf.shape[i] and leaf.shape[i] % mesh.size == 0), None)
        spec = Spec() if axis is None or mesh.size == 1 else Spec(*[None] * axis, "data")
        return NamedSharding(mesh, spec)

    return (
        jax.tree.map(lambda x: place(x, range(x.ndim) if row.layout == "sharded" else ()), params),
        jax.tree.map(lambda x: place(x, [0] if x.shape[:1] == (rows_in(batch),) else ()), batch),
    )


def rows_in(batch: Tree) -> int:
    """The length of a batch: that of its first array that has one."""
    return next((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape), 1)


@contextlib.contextmanager
def fitting_in_memory(row: Row) -> Iterator[None]:
    """Lets a case that runs out of memory say so in its row, and the rest go on."""
    try:
        yield
    except (MemoryError, ValueError, jax.errors.JaxRuntimeError) as error:
        known = re.search("MemoryError|RESOURCE_EXHAUSTED|out.of.memory", repr(error), re.I)
        # The other processes of a cluster would wait for this one in the case's collectives.
        if not known or jax.process_count() > 1:
            raise
        row.remark = OUT_OF_MEMORY


def measure(
    options: Options, rows: Sequence[Row], make: Callable[[Row], Case], known: Sequence[Case] = ()
) -> Sequence[Row]:
    """Makes cases, shows that they (and what is known) agree, and times them in rounds."""
    cases = []
    for row in rows:
        with fitting_in_memory(row):
            cases.append(make(row))
    check_agreement([*known, *cases])
    rates = probes(options.dtype)
    time_in_rounds([*cases, *(case.once for case in cases if case.once), *rates], options.rounds)
    best = [probe.rows / min(probe.samples) for probe in rates]
    bases = {(c.row.clip, c.row.optimizer): c.samples for c in cases if c.row.method == "all"}
    for case in cases:
        if case.row.remark != OUT_OF_MEMORY:
            note_times(case, bases.get((case.row.clip, case.row.optimizer), []), *best)
    note_comparisons(rows)
    return rows


@functools.cache
def probes(dtype: str) -> tuple[Case, Case]:
    """What the device can do at most: a product, a sum; their `rows` are FLOPs and bytes."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    matrix, vector = jax.random.normal(jax.random.key(0), (n, n), dtype), jnp.ones(VECTOR)
    multiply = partial(repeat, jax.jit(lambda a, b: (a, a @ b), donate_argnums=0), (matrix,))
    add = partial(repeat, jax.jit(lambda a, b: (a + b, None), donate_argnums=0), (vector,))
    case = partial(Case, Row("", "", ""))
    return (
        case(multiply, partial(jnp.copy, matrix), rows=2 * n**3),
        case(add, partial(jnp.copy, vector), rows=3 * vector.nbytes),
    )


def time_in_rounds(cases: Sequence[Case], rounds: int) -> None:
    """Times each case once a round, in a shuffled order that is the same in all processes."""
    order, shuffle = list(cases), random.Random(0).shuffle
    gc.disable()  # it would go through all that JAX has loaded
    try:
        for i in range(-1, rounds):
            shuffle(order)
            for case in order:
                with fitting_in_memory(case.row):
                    if i < 0:
                        case.samples, case.steps = [], case.steps or enough_steps(case)
                    elif case.row.remark != OUT_OF_MEMORY:
                        case.samples.append(seconds(case, case.steps) / case.steps)
    finally:
        gc.enable()


def seconds(case: Case, steps: int) -> float:
    """The time of so many steps, after an untimed one that brings back what others displaced."""
    state, _ = wait(case.run(case.fresh(), case.first))
    start = time.perf_counter()
    wait(case.run(state, steps))
    return time.perf_counter() - start


def enough_steps(case: Case) -> int:
    """How many steps a sample takes; in a cluster process 0 says, for all must take as many."""
    steps, took = 1, 0.0
    while took < SAMPLE_S / 4 and steps < 40_000:
        took = float(multihost_utils.broadcast_one_to_all(np.float32(seconds(case, steps))))
        steps *= 4
    return max(SAMPLE_STEPS, math.ceil(steps / 4 * SAMPLE_S / took))


def check_agreement(cases: Sequence[Case]) -> None:
    """Stops where cases of a group differ in their first steps, by over a hundredth in a leaf.

    Of the leaf's largest change, for a GPU multiplies float32 in TF32; with four roundings of
    its largest value. What the first of the group does not train must stay as it was.
    """
    first: dict[str, tuple[Row, Tree]] = {}
    for case in cases:
        with fitting_in_memory(case.row):
            before = dict(tree_flatten_with_path(case.read(case.fresh()))[0])
            state, loss = case.run(case.fresh(), case.first)
            after = dict(tree_flatten_with_path(case.read(state))[0])
            like, wanted = first.setdefault(case.group, (case.row, after))
            what = f"{case.row.problem}: {label(case.row)}"
            if not jnp.isfinite(loss).all():
                raise Broken(f"{what}: the loss is {loss}")
            for path, leaf in after.items():
                a, b, was = map(np.float32, (leaf, wanted.get(path, before[path]), before[path]))
                name = repr(keystr(path, simple=True, separator="/"))
                if not np.isfinite(a).all():
                    raise Broken(f"{what}: the gradient of {name} is not finite")
                difference, largest = (np.abs(x).max(initial=0) for x in (a - b, was))
                eps = float(np.spacing(leaf.dtype.type(1)))
                allowed = max(0.01, 8 * eps) * np.abs(b - was).max(initial=0) + 4 * eps * largest
                if difference > allowed:
                    must = f"must take the step of {label(like)}: {name} differs by"
                    raise Broken(f"{what} {must} {difference:.3g}, {allowed:.3g} is allowed")


# ----------------------------------------------------------------------------- the tables

Lines: TypeAlias = Iterator[Row | str]  # a table's rows, and what else is to be printed


def methods_table(options: Options, problems: Sequence[Problem]) -> Lines:
    """Every problem plainly; the last one also clipped, not donated and with Adam."""
    usual, (*donated, not_donated) = options.optimizer or "sgd", WAYS
    for problem in problems:
        # Of a model of the user's, nobody knows whether there is something to hoist.
        same = problem.sizes and least_flops(problem, "hoist") == least_flops(problem, "partition")
        ways = [way for way in donated if not (same and way == "hoist")]
        kinds = [(way, False, usual) for way in ways]
        if problem is problems[-1]:
            kinds += [(not_donated, False, usual), *((way, True, usual) for way in ways)]
            kinds += [(way, False, "adam") for way in ways[:-2] if options.optimizer is None]
        rows = [Row("methods", problem.name, way, clip, optimizer=opt) for way, clip, opt in kinds]
        yield from measure(options, rows, partial(prepare, problem))


def prefix_table(options: Options, problems: Sequence[Problem]) -> Lines:
    """`all` is the same step whatever else would be frozen, and stands for 0 of them."""
    whole, rows, prefixes = problems[-1], list[Row](), dict[str, Problem]()
    for frozen in range(len(whole.sizes) - 1):
        where = [f"linear_{i}" for i in range(frozen, len(whole.sizes) - 1)]
        name = f"{whole.name}, {frozen} frozen"
        prefixes[name] = dataclasses.replace(whole, name=name, where=where)
        for way in ("partition", "hoist") if frozen else ("all",):
            rows.append(Row("prefix", name, way, optimizer=options.optimizer or "sgd"))
    yield from measure(options, rows, lambda row: prepare(prefixes[row.problem], row))


def run_table(options: Options, problems: Sequence[Problem]) -> Lines:
    """The walk-through's steps on its own data: by `train_step`, and by Haiku's."""
    problem = mlp("seed", *PROBLEMS["seed"], options.dtype)
    xs, ys = mf.dataset(jax.random.key(1), RUN_STEPS, problem.batch)
    batches = xs.astype(options.dtype), ys
    make = partial(prepare_run, mf.train_step, *mf.partition(problem.where, drawn(problem.make)[0]))
    makes = dict.fromkeys(("loop", "scan"), partial(make, batches))
    if options.peers:
        makes |= load_peers().run(sys.modules[__name__], problem, batches)
    rows = [Row("run", "seed", way) for way in makes]
    # A sample takes half a second: a third of the rounds says as much.
    fewer = Options(**vars(options) | {"rounds": -(-options.rounds // 3)})
    yield from measure(fewer, rows, lambda row: makes[row.method](row))


def prepare_run(step: Step, state: Tree, frozen: Tree, batches: Tree, row: Row) -> Case:
    """Compiles a step that is called for each batch, or one call for them all."""
    one_by_one, scanned = list(zip(*batches)), row.method.endswith("scan")

    def all_steps(state: Tree, frozen: Tree, *batches: Tree) -> Any:
        return jax.lax.scan(lambda state, batch: step(state, frozen, *batch), state, batches)

    jitted = jax.jit(all_steps if scanned else step, donate_argnums=0)
    note_program(row, jitted, state, frozen, *(batches if scanned else one_by_one[0]))
    row.flops = None if scanned else row.flops  # of a loop XLA counts the body once

    def run(state: Tree, steps: int) -> Any:
        if scanned:
            return jitted(state, frozen, *(column[:steps] for column in batches))
        for batch in one_by_one[:steps]:
            state, loss = jitted(state, frozen, *batch)
        return state, loss

    fresh, rows = partial(jax.tree.map, jnp.copy, state), batches[1].shape[1]
    return Case(row, run, fresh, first=10, steps=RUN_STEPS, rows=rows)


def peers_table(options: Options, problems: Sequence[Problem]) -> Lines:
    for problem in problems if len(problems) == 1 else (problems[0], problems[-1]):
        yield from load_peers().table(sys.modules[__name__], options, problem)


def load_peers() -> Any:
    """The other libraries' steps, which stand in a file of their own."""
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), ".ci", "peers.py")
    if not os.path.isfile(file):
        raise Refused(f"--peers: the other libraries' steps are expected in {file}")
    return module_of(file, "peers")


def devices_table(options: Options, problems: Sequence[Problem]) -> Lines:
    """Data-parallel steps: timed where the devices are real, else compiled for simulated ones."""
    timed: list[Row] = []
    for kind, devices in meshes(options):
        count, mesh = len(devices), Mesh(np.array(devices), ("data",))
        simulated = bool(options.compile_only) or (kind == "cpu" and count > jax.process_count())
        for problem, layout in product(problems[-2:], ("replicated", "sharded")):
            row = Row("devices", problem.name, "all", False, kind, count, simulated, layout)
            row.optimizer = options.optimizer or "sgd"
            rows = [row, dataclasses.replace(row, method="partition")]
            places = jax.tree.leaves(spread(problem, row, mesh)[0])
            if layout == "sharded" and all(place.is_fully_replicated for place in places):
                continue  # no axis divides by the devices
            if simulated:
                for row in rows:
                    with fitting_in_memory(row):
                        prepare(problem, row, mesh)
            else:  # one device, with as many rows, must make the same
                like = Row("", problem.name, "all", optimizer=row.optimizer)
                known = prepare(problem, like, devices=count)
                timed += measure(options, rows, partial(prepare, problem, mesh=mesh), [known])
                note_comparisons(timed)
            yield from rows
    if not (options.devices or options.compile_only) and jax.process_count() == 1:
        yield from simulated_rows(options)


def meshes(options: Options) -> Iterator[tuple[str, list[jax.Device]]]:
    """Each platform, the default one first, and so many of its devices, as many a process."""
    processes, kinds = jax.process_count(), [jax.default_backend(), "cpu", "gpu", "tpu"]
    for kind in dict.fromkeys(kinds[:1] if processes > 1 or options.devices else kinds):
        with contextlib.suppress(RuntimeError):  # "Unknown backend"
            devices = jax.devices(kind)
            doubled = [processes * 2**i for i in range(20) if processes * 2**i <= len(devices)]
            usual = sorted({1, *doubled, len(devices)})
            # One device alone is in the other tables.
            for count in options.devices or (usual if len(usual) > 1 or kind != kinds[0] else []):
                own = [[d for d in devices if d.process_index == i] for i in range(processes)]
                each = [d for some in own for d in some[: count // processes]]
                yield kind, each or jax.local_devices(backend=kind)[:1]


def simulated_rows(options: Options) -> Any:
    """The rows of eight simulated CPU devices: in this process they would disturb all else."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    worker = spawn.Process(target=send_simulated_rows, args=(options, there), daemon=True)
    worker.start()
    there.close()
    return here.recv()


def send_simulated_rows(options: Options, pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    options.devices, options.compile_only = [8], True
    pipe.send(list(devices_table(options, set_up(options))))


SIMULATED = """; on simulated ones, exact but for
time, which is left out, and sharded as XLA does it for CPUs"""
TABLES: dict[str, tuple[str, Callable[[Options, Sequence[Problem]], Lines]]] = {
    "methods": ("a step, by how layers are held still", methods_table),
    "prefix": ("a step, by how many layers from the first are frozen", prefix_table),
    "devices": (f"a data-parallel step, seen from one device{SIMULATED}", devices_table),
    "run": (f"{RUN_STEPS} steps of the walk-through, each", run_table),
    "peers": ("the same step in other libraries, in the forms that they recommend", peers_table),
}

# ------------------------------------------------------------------ options and refusals

USED_BY = {  # option: the tables that heed it; the others heed them all
    **dict.fromkeys(("sizes", "batch"), "methods prefix devices peers"),
    **dict.fromkeys(("train", "freeze"), "methods devices peers"),
    "optimizer": "methods prefix devices",
    "model": "methods devices",
    **dict.fromkeys(("devices", "compile_only", "cluster", "coordinator"), "devices"),
}


def parse(argv: Sequence[str] | None) -> Options:
    # Without its usage text, argparse says what is wrong in one line (and exits with 2).
    parser = argparse.ArgumentParser("bench.py", argparse.SUPPRESS, __doc__.partition("\n")[0])
    add, which = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--tables", nargs="+", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    add("--peers", action="store_true", help="other libraries too")
    add("--sizes", nargs="+", type=positive, metavar="N", help="the widths of an MLP")
    add("--batch", type=positive, metavar="N", help="rows in a batch, a device")
    which.add_argument("--train", nargs="+", metavar="PATTERN", help="what trains")
    which.add_argument("--freeze", nargs="+", metavar="PATTERN", help="what does not")
    add("--optimizer", choices=("sgd", "adam"), help="default: sgd, and adam in a few rows")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--model", metavar="FILE.py:NAME", help="NAME() is (loss_fn, params, batch)")
    add("--rounds", type=positive, metavar="N", help="default: 7")
    add("--devices", nargs="+", type=positive, metavar="N", help="how many")
    add("--compile-only", action="store_true", help="simulate devices, time nothing")
    add("--cluster", action="store_true", help="SLURM, TPU pods, Kubernetes")
    add("--coordinator", metavar="HOST:PORT", help="a cluster named by hand")
    add("--processes", type=positive, metavar="N", help="how many it has")
    add("--process", type=int, metavar="I", help="which this one is, from 0")
    add("--json", metavar="FILE", help="the results")
    add("--plot", metavar="FILE", help="a picture of the tables prefix and methods")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a positive integer below 2**31, got {text!r}")
    return int(text)


def tables_of(options: Options) -> list[str]:
    """The tables that are asked for, or all that heed every option given."""
    given = {name: uses.split() for name, uses in USED_BY.items() if getattr(options, name)}
    asked = [*(options.tables or []), *["peers"] * options.peers]
    for name, table in product(given, asked):
        if table not in given[name]:
            raise Refused(f"--{name.replace('_', '-')} is not used by the table {table}")
    fit = [t for t in TABLES if t != "peers" and all(t in uses for uses in given.values())]
    usual = fit[:1] if options.model else fit  # of a model the devices only where named
    return list(dict.fromkeys([*(options.tables or usual), *asked]))


def refuse(options: Options, tables: Sequence[str]) -> None:
    """Refuses what does not go together, before anything is measured."""
    by_hand = [options.coordinator, options.processes, options.process]
    count, own, counts = options.processes or 1, options.process or 0, options.devices or []
    port = re.fullmatch(r".+:(\d+)", options.coordinator or "_:1")
    files = {"--json": options.json, "--plot": options.plot}
    files = {option: file for option, file in files.items() if file is not None}
    joins, model = options.cluster or options.coordinator, options.model
    mlp_only = options.sizes or options.batch or options.dtype != "float32"
    drawn_tables = {"prefix", "methods"} & set(tables)
    refusals = {
        "JAX_DISABLE_JIT is set, and nothing would be compiled": config.jax_disable_jit,
        "--coordinator, --processes and --process go together": 0 < by_hand.count(None) < 3,
        "--cluster finds what --coordinator names: one of them": options.cluster and by_hand[0],
        "--compile-only joins no cluster": options.compile_only and joins,
        "--compile-only measures no rounds": options.compile_only and options.rounds,
        f"--process must be in 0 .. {count - 1}, got {own}": not 0 <= own < count,
        f"--coordinator must be HOST:PORT, got {options.coordinator!r}": not (
            port and 0 < int(port[1]) < 2**16
        ),
        f"--devices names a count twice: {counts}": len(set(counts)) < len(counts),
        "--model brings its own sizes, batch and dtype": model and mlp_only,
        "--model needs --train or --freeze": model and not (options.train or options.freeze),
        "--plot draws the tables prefix and methods": options.plot and not drawn_tables,
        "--json and --plot name the same file": len(files) > len({*map(beside, files.values())}),
    }
    for why, wrong in refusals.items():
        if wrong:
            raise Refused(why)
    if "peers" in tables:
        load_peers()
    for option, file in files.items():
        try:
            with open(beside(file), "w"):
                os.remove(beside(file))
            if not file or (os.path.exists(file) and not os.path.isfile(file)):
                raise OSError("it is no regular file")
        except OSError as error:
            why = f"{option} {file}: cannot be written: {error.strerror or error}"
            raise Refused(why) from None
    if options.plot:
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ImportError:
            raise Refused("--plot needs matplotlib: uv run --with matplotlib bench.py") from None
        if extension(options.plot) not in FigureCanvasBase.get_supported_filetypes():
            raise Refused(f"--plot {options.plot}: no kind of picture (try .png)")


def beside(file: str) -> str:
    """What is written first, and takes the place of ``file`` once it is whole."""
    return f"{os.path.realpath(file)}.{os.getpid()}.part"


def extension(file: str) -> str:
    return os.path.splitext(file)[1].removeprefix(".").lower()


def problems_of(options: Options) -> list[Problem]:
    """The problems that are asked for, of which something trains."""
    turned = [p.removeprefix("!") if p.startswith("!") else f"!{p}" for p in options.freeze or []]
    where, chosen = options.train or turned, PROBLEMS
    if options.sizes:
        chosen = {"mlp": (options.sizes, 64, [f"linear_{len(options.sizes) - 2}"])}
    problems = [
        mlp(name, sizes, options.batch or batch, where or usual, options.dtype)
        for name, (sizes, batch, usual) in chosen.items()
    ]
    problems = [load_model(options.model, where)] if options.model else problems
    for problem in problems:
        try:
            mf.partition(problem.where, problem.shapes()[0])
        except (ValueError, TypeError, OverflowError) as error:
            raise Refused(f"{problem.name}: {error}") from None
    return problems


def load_model(spec: str, where: mf.Where) -> Problem:
    """The problem in FILE.py:NAME, where NAME() gives (loss_fn, params, batch)."""
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name:
        raise Refused(f"--model {spec}: name it FILE.py:NAME")
    sys.path.insert(0, os.path.dirname(os.path.abspath(file)))
    try:
        loss, params, batch = getattr(module_of(file, "bench_model"), name)()
        params, batch = jax.tree.map(jnp.asarray, (params, tuple(batch)))
        jax.eval_shape(jax.grad(loss), params, *batch)
    except OSError as error:
        raise Refused(f"--model {spec}: {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise Refused(f"--model {spec}: it must return (loss_fn, params, batch): {why}") from None

    def make(devices: int) -> Data:
        def again(leaf: jax.Array) -> jax.Array:  # a random key serves all devices
            column = leaf.shape[:1] == (rows_in(batch),)
            return jnp.concatenate([leaf] * devices) if column else leaf

        return params, jax.tree.map(again, batch)

    return Problem(os.path.basename(file).removesuffix(".py"), where, loss, make)


def module_of(file: str, name: str) -> Any:
    found: Any = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where a dataclass looks for its module
    found.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------- the cluster


def set_up(options: Options) -> list[Problem]:
    """Makes or joins the devices that are asked for, and gives the problems."""
    if options.compile_only:
        flags = os.environ.get("XLA_FLAGS", "")  # another count there would be refused
        os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
        config.update("jax_platforms", "cpu")
        options.devices = options.devices or [1, 2, 4, 8]
        config.update("jax_num_cpu_devices", max(options.devices))
    if options.cluster or options.coordinator:
        join_cluster(options)
    refusal, problems = None, list[Problem]()
    try:
        problems = problems_of(options)
        devices, processes = jax.devices(), jax.process_count()
        for count in options.devices or []:
            if count > len(devices):
                hint = "" if processes > 1 else "; --compile-only simulates more"
                raise Refused(f"--devices {count}: there are {len(devices)}, {devices}{hint}")
            if count != 1 and count % processes:
                raise Refused(f"--devices {count}: {processes} processes cannot give as many each")
    except Refused as error:
        refusal = error
    heed_the_others(options, refusal)
    return problems


def join_cluster(options: Options) -> None:
    """Joins the other processes, and ends with them: JAX gives up on one silent for 100 s.

    It ends this process itself, by a C++ stack, where others do not come within JOIN_S, come
    twice, or die: that cannot be caught.
    """
    if options.process:
        await_answer(options.coordinator)
    config.update("jax_cpu_collectives_implementation", "gloo")
    named = options.coordinator, options.processes, options.process
    try:
        jax.distributed.initialize(*named, initialization_timeout=JOIN_S)
    except ValueError as error:
        raise Refused(f"--cluster: none found, --coordinator names one: {error}") from None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX took it, for checkpoints
    if jax.process_index() != 0:
        os.dup2(2, 1)  # gloo greets on stdout, where process 0 alone prints


def await_answer(coordinator: str) -> None:
    """Waits until the coordinator is there: JAX would abort with a C++ stack, not its name."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + JOIN_S
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=JOIN_S).close()
        except OSError as error:
            if time.monotonic() > end:
                raise Broken(f"no answer from {coordinator} in {JOIN_S} s: {error}") from None
            time.sleep(0.1)


def heed_the_others(options: Options, refusal: Refused | None) -> None:
    """Refuses, in every process, options that differ from process 0's and what one refuses."""
    names = [name for name in vars(options) if name not in ("json", "plot", "process")]
    sums = [zlib.crc32(repr(vars(options)[name]).encode()) for name in names]
    mine = np.array([refusal is not None, *sums], np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(mine))
    for (i, theirs), (j, name) in product(enumerate(everyone), enumerate(names, 1)):
        if theirs[j] != everyone[0][j]:
            option = "--" + name.replace("_", "-")
            raise Refused(f"process {i} was given another {option} than process 0")
    if everyone[:, 0].any():
        raise refusal or Refused(f"process {everyone[:, 0].argmax()} refuses")


# ------------------------------------------------------------------------- presentation


def quantity(value: float | None, unit: str) -> str:
    """Three digits with a prefix, nothing for None.

    >>> quantity(0.0012345, "s"), quantity(82, "B"), quantity(1.885e9, ""), quantity(None, "s")
    ('1.23 ms', '82 B', '1.89 G', '')
    """
    if value is None:
        return ""
    exponent = int(f"{value:.2e}".partition("e")[2])  # of the rounded value: 999.9 is 1.00 k
    digits = 0 if isinstance(value, int) and value < 1000 else 2 - exponent % 3
    prefix = ("f", "p", "n", "µ", "m", "", "k", "M", "G", "T", "P")[exponent // 3 + 5]
    return f"{value / 1000 ** (exponent // 3):.{digits}f} {prefix}{unit}".rstrip()


def label(row: Row) -> str:
    """A row's method and what is special about it."""
    clipped = "clipped" if row.clip and "clip" not in row.method else ""
    special = clipped, "adam" if row.optimizer == "adam" else "", row.layout
    return ", ".join(filter(None, (row.method, *special)))


COLUMNS: dict[str, tuple[int, Callable[[Row], str]]] = {  # widths, to the left if negative
    "problem": (-14, lambda row: row.problem + f" on {row.devices}" * (row.table == "devices")),
    "method": (-27, label),
    "step": (8, lambda row: quantity(row.step_s, "s")),
    "vs all": (7, lambda row: "" if row.vs_all is None else f"{row.vs_all:.3f}x"),
    "of limit": (8, lambda row: "" if row.roofline_share is None else f"{row.roofline_share:.0%}"),
    "rows/s": (7, lambda row: quantity(row.rows_per_s, "")),
    "FLOPs": (7, lambda row: quantity(row.flops, "")),
    "memory": (8, lambda row: quantity(row.memory_bytes, "B")),
}
MEANS = """step: median; vs all: within a round; of limit: the least that its FLOPs or bytes take;
memory: arguments, results and temporary bytes on a device, counted once where they share a place"""


def say(text: str) -> None:
    if jax.process_index() == 0:
        try:
            print(text, flush=True)
        except OSError as error:  # `| head`, a full device
            raise Broken(f"stdout is gone: {error.strerror}") from None


def say_cells(cells: Sequence[str]) -> None:
    """Cells under each other on the screen, widths known before the rows are."""
    pairs = zip(cells, (width for width, _ in COLUMNS.values()))
    say("  ".join(c.ljust(-w) if w < 0 else c.rjust(w) for c, w in pairs).rstrip())


def details(row: Row) -> Iterator[str]:
    """What a row has no columns for."""
    if row.once_s:
        paid = f"paid after {row.break_even:.2g} epochs" if row.break_even else "never paid"
        kept = f"{quantity(row.kept_bytes, 'B')} more a batch ({row.kept_ratio or 0:.1f}x its own)"
        yield f"once {quantity(row.once_s, 's')} and {kept}, {paid}"
    if row.devices > 1:
        kind = f"{row.platform}, simulated" if row.simulated else row.platform
        pace = f"; each at {row.efficiency:.0%} of one's pace" if row.efficiency else ""
        results, sent = (quantity(n, "B") for n in (row.collective_bytes, row.sent_bytes))
        yield f"{kind}: collectives' results {results}, sent by each in a ring {sent}{pace}"
    if row.remark:
        yield row.remark


def answers(rows: Sequence[Row]) -> list[str]:
    """What to decide by, in three lines that stand alone."""
    said, last = dict[str, list[str]](), {row.table: row.problem for row in rows}
    for row in rows:
        usual = row.method in ("all", "partition", "hoist", "loop", "scan") and not row.clip
        told = row.table in ("methods", "run") or row.devices > 1
        if usual and told and row.problem == last[row.table]:
            about, parts = row.problem + ", adam" * (row.optimizer == "adam"), [row.method]
            ratio = f" ({1 / row.vs_all:.1f}x)" if row.vs_all and row.method != "all" else ""
            if row.table == "devices":
                about += f" on {row.devices} devices, {row.layout}"
                parts.append(f"sends {quantity(row.sent_bytes, 'B')} a step")
            else:
                held = f", {quantity(row.memory_bytes, 'B')}" * (row.table == "methods")
                parts.append(quantity(row.step_s, "s") + ratio + held)
                parts += [f", {text}" for text in details(row) if row.once_s]
            said.setdefault(about, []).append(" ".join(parts).replace(" ,", ","))
    return [f"{about}: {' | '.join(texts)}" for about, texts in said.items()][:3]


def card(options: Options) -> dict[str, Any]:
    """What the figures depend on."""
    device, rates = jax.devices()[0], list[float | None]([None, None])
    if not options.compile_only:
        for i, probe in enumerate(probes(options.dtype)):
            rates[i] = probe.rows / min(seconds(probe, 3) / 3 for _ in range(3))
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = "".join(re.findall(r"model name\s*: (.+)", file.read())[:1]) or cpu
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": f"{cpu.strip()}, {os.cpu_count()} cores",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "dtype": options.dtype,
        "peak_flops": rates[0],
        "peak_bytes_per_s": rates[1],
    }


def card_text(card: dict[str, Any]) -> str:
    """What a run ran on, in a line."""
    text = "jax {jax}, jaxlib {jaxlib}, numpy {numpy}, Python {python}; {device_count} x "
    text = (text + "{device_kind} ({platform}); {cpu}; {date}; {dtype}").format(**card)
    if card["peak_flops"]:
        text += f" products at {quantity(card['peak_flops'], 'FLOP/s')}"
        text += f", memory at {quantity(card['peak_bytes_per_s'], 'B/s')}"
    return text


def write(options: Options, card: dict[str, Any], rows: Sequence[Row], ended: str) -> list[str]:
    """Writes the files that are asked for, each in one piece, if there is something to write."""
    if jax.process_index() != 0 or not rows:
        return []
    written = []
    if options.json:
        results = {"card": card, "complete": ended == "complete", "ended": ended}
        text = json.dumps({**results, "rows": list(map(dataclasses.asdict, rows))}, indent=1)
        with open(beside(options.json), "w", encoding="utf-8") as file:
            file.write(text + "\n")
        written.append(options.json)
    if options.plot and any(row.step_s for row in rows):
        draw(rows, beside(options.plot), extension(options.plot))
        written.append(options.plot)
    for file in written:
        os.replace(beside(file), os.path.realpath(file))
    return written


def draw(rows: Sequence[Row], target: str, kind: str) -> None:
    """Draws time against frozen layers, a line a method, and the last problem's methods."""
    from matplotlib.figure import Figure

    colors = dict(zip(WAYS, ("#777777", "#0072b2", "#009e73", "#e69f00", "#d55e00", "#e69f00")))
    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    timed = [row for row in rows if row.step_s and row.optimizer == rows[0].optimizer]
    for way in ("partition", "hoist"):
        prefix = [row for row in timed if row.table == "prefix" and row.method in ("all", way)]
        frozen = [int(row.problem.split()[-2]) for row in prefix]  # "deep, 3 frozen"
        steps = [1e3 * (row.step_s or 0) for row in prefix]
        left.plot(frozen, steps, "o-", color=colors[way], label=way)
    methods = [row for row in timed if row.table == "methods"]
    methods = [row for row in methods if row.problem == methods[-1].problem]
    places = {way: i for i, way in enumerate(dict.fromkeys(row.method for row in methods))}
    for clip, aside, hatch, name in (False, -0.2, "", "plain"), (True, 0.2, "////", "clipped"):
        chosen = [row for row in methods if row.clip == clip]
        x = [places[row.method] + aside for row in chosen]
        height = [1e3 * (row.step_s or 0) for row in chosen]
        style = {"color": [colors[row.method] for row in chosen], "hatch": hatch, "label": name}
        bars = right.bar(x, height, 0.38, edgecolor="white", **style)
        right.bar_label(bars, fmt="{:.3g}", fontsize=8)
    right.set_xticks(range(len(places)), [way.replace(", ", ",\n") for way in places], fontsize=8)
    left.set_xticks(range(len(frozen)))
    left.set(title="frozen, layer by layer", xlabel="layers frozen, from the first")
    right.set(title=", ".join({row.problem for row in methods}))
    for axis in (axis for axis in (left, right) if axis.has_data()):
        axis.set(yscale="log", ylabel="ms a step")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(target, dpi=200, format=kind)


def leave(code: int) -> NoReturn:
    """Ends the process: at once where Python, or JAX's farewell to a cluster, could hang."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        if code in (0, 2) or (code == 1 and not jax.distributed.is_initialized()):
            raise SystemExit(code)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    options, facts, rows = Options(json=None, plot=None), dict[str, Any](), list[Row]()
    code, ended = 0, "complete"
    try:
        options = parse(argv)
        tables = tables_of(options)
        refuse(options, tables)
        options.rounds, options.peers = options.rounds or 7, "peers" in tables
        problems = set_up(options)
        facts = card(options)
        say(card_text(facts))
        for problem in problems if options.model else []:
            trainable, frozen = mf.partition(problem.where, problem.shapes()[0])
            say(f"\n{problem.name}\n{mf.summary(trainable=trainable, frozen=frozen)}")
        for table in tables:
            say(f"\n{table}: {TABLES[table][0]}")
            for problem in problems if table != "run" else []:
                if problem.sizes:
                    what = f"batch {problem.batch}, trains {problem.where}"
                    say(f"{problem.name}: {list(problem.sizes)}, {what}")
            say(MEANS)
            say_cells(list(COLUMNS))
            for row in TABLES[table][1](options, problems):
                if isinstance(row, Row):
                    rows.append(row)
                    say_cells([cell(row) for _, cell in COLUMNS.values()])
                for text in details(row) if isinstance(row, Row) else (row,):
                    say(f"    {text}")
    except Refused as error:
        code, ended = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, ended = 130, "interrupted"
    except Exception as error:
        code, ended = 1, str(error) if isinstance(error, Broken) else repr(error)
        if not isinstance(error, Broken) and jax.process_count() == 1:
            write(options, facts, rows, ended)
            raise
    written = write(options, facts, rows, ended)
    if code:
        print(f"bench.py: {ended}", file=sys.stderr)
    with contextlib.suppress(Broken):
        for line in [*(f"written: {file}" for file in written), *answers(rows)]:
            say(line)
    leave(code)


if __name__ == "__main__":
    main()
