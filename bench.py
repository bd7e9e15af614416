# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.5.1", "numpy"]
# ///
# SPDX-License-Identifier: MIT
"""bench: what freezing buys on this machine, across its devices, for your model.

    python bench.py --json run.json                         # all but peers, 90 s on two cores
    python bench.py --model mine.py:make --train 'head/*'   # your own model
    python bench.py --devices 8 64 512 --compile-only       # a cluster, planned on a laptop

Every step donates its state and is fed its own result. Rows are timed in shuffled rounds; those
that must take the same step are shown to take it first. FLOPs and bytes are the compiled program's.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import runpy
import signal
import sys
import time
import zlib
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.backend import backends

import minifreeze as mf

Tree = Any
Function = Callable[..., Any]
untyped: Any = jax  # for what jax leaves without types

SGD_RATE, ADAM_RATE, CLIP = (
    0.1,
    1e-3,
    0.1,
)  # CLIP: a norm that the problems' gradients exceed
SAMPLE_S, SAMPLE_STEPS, RUN_STEPS = 0.05, 3, 10_000  # a sample's least, and its most
VECTOR, SIDE = (
    2**24,
    {"cpu": 1024},
)  # more floats than a cache holds; a product's side, else 8192
PROBES: list[Function] = [
    lambda a, b: (a, a @ b),
    lambda a, b: (a + b, None),
]  # compiled once


# --------------------------------------------------------------------------- the problems
class Problem(NamedTuple):
    """What trains, by which ``loss(params, *batch)``; each device has a batch of so many rows."""

    name: str
    where: mf.Where
    loss: Function
    params: Tree
    batch: tuple[Tree, ...]
    rows: int
    sizes: tuple[int, ...] = ()  # of the MLP; a model of the user's has none

    def __str__(self) -> str:
        trainable, frozen = mf.partition(self.where, self.params)
        network = (
            list(self.sizes) or f"\n{mf.summary(trainable=trainable, frozen=frozen)}"
        )
        return f"{self.name}: batch {self.rows}, trains {self.where} of {network}"


PROBLEMS: dict[str, tuple[tuple[int, ...], int, list[str]]] = {
    "seed": ((1, 300, 100, 10), 10, ["linear_0", "linear_2"]),
    "wide": ((784, 1024, 1024, 10), 128, ["linear_0", "linear_2"]),
    "deep": ((1024, 2048, 2048, 2048, 2048, 10), 64, ["linear_4"]),
}


def mlp(
    name: str, sizes: tuple[int, ...], rows: int, where: mf.Where, options: Any
) -> Problem:
    """The module's MLP, on noise, or as the options have it; where nothing runs, shapes alone."""
    rows = options.batch or rows

    def draw() -> tuple[Tree, tuple[Tree, ...]]:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[1], (rows, sizes[0]), options.dtype)
        y = jax.random.randint(keys[2], (rows,), 0, sizes[-1])
        return mf.init(keys[0], sizes, options.dtype), (x, y)

    params, batch = jax.eval_shape(draw) if options.compile_only else jax.jit(draw)()
    loss = partial(
        mf.loss_fn, mf.partition("*", params)[1]
    )  # whose other part is empty
    return Problem(name, options.where or where, loss, params, batch, rows, sizes)


# ------------------------------------------------------------ five ways to hold layers still
WAYS = [
    "all",
    "partition",
    "hoist",
    "stop_gradient",
    "mask",
    "stop_gradient, not donated",
]


def way_of(method: str, problem: Problem) -> Any:
    """(what is differentiated and donated, args, loss(it, *args), what was computed before)."""
    # Nothing is closed over: XLA would fold it into the program.
    _, where, loss, params, batch, *_ = problem
    trainable, frozen = mf.partition(where, params)

    def of_parts(trainable: Tree, frozen: Tree, *batch: Tree) -> Any:
        return loss(mf.merge(trainable, frozen), *batch)

    def stopped(params: Tree, *batch: Tree) -> Any:
        trainable, frozen = mf.partition(where, params)
        return of_parts(trainable, jax.lax.stop_gradient(frozen), *batch)

    if (
        method == "partition"
    ):  # no frozen gradient is made, and the state is what trains
        return trainable, (frozen, *batch), of_parts, None
    if method == "hoist":  # and what no trainable leaf touches is computed once a batch
        once, rest = mf.hoist(of_parts, trainable, frozen, *batch)
        features = partial(jax.jit(once), frozen, *batch)
        return trainable, (frozen, features()), rest, features
    # All are differentiated: those that are frozen to zeros, or `mask` multiplies them by 0.
    return params, batch, stopped if method.startswith("stop") else loss, None


def take_step(
    row: Row, loss: Function, where: mf.Where, state: Tree, *args: Tree
) -> Tree:
    """On ``(params, moments)``: the gradients, clipped or not, and an update by SGD or Adam."""
    params, moments = state
    value, grads = jax.value_and_grad(loss)(params, *args)
    if row.method == "mask":
        grads = jax.tree.map(lambda g, trains: g * trains, grads, mf.mask(where, grads))
    if row.clip:  # over all gradients that there are, and so it reads them all
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(
            lambda g: (g * jnp.minimum(1, CLIP / norm)).astype(g.dtype), grads
        )
    if row.optimizer == "sgd":
        return (mf.sgd_step(params, grads, SGD_RATE), ()), value
    mean, square, count = moments  # Kingma and Ba, 2015, with its usual constants
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
    square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, square, grads)
    count += 1
    rate, late = ADAM_RATE / (1 - 0.9**count), 1 - 0.999**count
    steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v / late) + 1e-8), mean, square)
    return (mf.sgd_step(params, steps, rate), (mean, square, count)), value


# ---------------------------------------------------------------------------- the figures
# Ratios are medians over rounds; FLOPs, bytes and shares those of a step on one device: `temp`,
# `alias` and `memory` as XLA says, `collective` what collectives give, `sent` what a ring sends for
# them, `kept` what hoist keeps. `efficiency` is the part of one device's pace that each keeps.
KEYS = """table problem method clip platform devices simulated layout step_s spread_s vs_all
    compile_s flops flops_min peak_share temp_bytes trainable_bytes collective_bytes optimizer
    memory_bytes alias_bytes bytes_min roofline_share rows_per_s efficiency sent_bytes once_s
    kept_bytes kept_ratio break_even remark""".split()


class Row(SimpleNamespace):
    """A line of a table and of the JSON, its ``KEYS``; and what they come from.

    ``make(row)`` gives it ``run``: ``run(fresh(), n)`` takes n steps and gives (state, loss).
    ``read(state)`` must be the same in a ``group``. ``samples`` are seconds a step, one a round.
    """

    def __init__(self, *values: Any, **named: Any) -> None:
        usual = dict.fromkeys([*KEYS, "on", "run", "once"]) | {
            "clip": False,
            "simulated": False,
        }
        usual |= {
            "platform": jax.default_backend(),
            "devices": 1,
            "optimizer": "sgd",
            "group": "",
        }
        usual |= {
            "make": lambda row: None,
            "fresh": lambda: None,
            "read": lambda state: state,
        }
        usual |= {"batch": 1, "moment_bytes": 0, "steps": SAMPLE_STEPS, "samples": []}
        super().__init__(**usual | dict(zip(KEYS, values)) | named)


def tree_bytes(tree: Tree) -> int:
    """The bytes of its arrays on one device."""
    shapes = [
        (leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    ]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def least_flops(problem: Problem, method: str) -> int | None:
    """The least FLOPs of a step: 2 x batch x in x out for each matrix product; None for a model.

    One a layer forward (``hoist`` has done those that need nothing that trains), one for the
    gradient of each ``w`` that trains, one for that of each input above the first layer that does.
    """
    if not problem.sizes:
        return None
    trains = mf.mask("*" if method == "all" else problem.where, problem.params)
    total, below = 0, False  # does something train below?
    for i, (n_in, n_out) in enumerate(pairwise(problem.sizes)):
        w, b = trains[f"linear_{i}"]["w"], trains[f"linear_{i}"]["b"]
        products = (method != "hoist" or below or w) + w + below
        total += products * 2 * problem.rows * n_in * n_out
        below = below or w or b
    return total


# An asynchronous collective is a -start and a -done; the -done has the result's shape alone.
COLLECTIVE = re.compile(r" = (\(.*?\)|\S+) ([a-z-]+?)(?:-done)?\(")
ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collective_bytes(hlo: str, n: int) -> tuple[int, int]:
    """The bytes of the collectives' results on one of n devices, and those that a ring sends."""
    ring = {
        "all-reduce": 2 * (n - 1) / n,
        "all-gather": (n - 1) / n,
        "reduce-scatter": n - 1,
    }
    ring |= {"all-to-all": (n - 1) / n, "collective-permute": 1}
    total, sent = 0, 0.0  # by the program's text; one in a loop counts once
    for result, kind in COLLECTIVE.findall(hlo):
        for bits, axes in (
            ARRAY.findall(result) if kind in ring else ()
        ):  # a pred has a byte
            size = (
                math.prod(int(axis) for axis in axes.split(",") if axis)
                * int(bits or 8)
                // 8
            )
            total, sent = total + size, sent + ring[kind] * size
    return total, round(sent)


def note_program(row: Row, step: Any, *args: Tree) -> None:
    """Compiles a jitted step and notes what XLA says of it, and the least bytes that it moves.

    They are its arguments (XLA leaves out what is not used) and, written, what trains; of Adam's
    two moments those of what trains, read and written.
    """
    start = time.perf_counter()
    compiled = step.lower(*args).compile()
    row.compile_s = time.perf_counter() - start
    compiled = getattr(compiled, "compiled", compiled)  # Equinox and Flax wrap it
    flops = (compiled.cost_analysis() or {}).get("flops", -1)
    # On some GPUs XLA does not count what a library computes.
    row.flops = int(flops) if flops >= (row.flops_min or 0) else None
    row.collective_bytes, row.sent_bytes = collective_bytes(
        compiled.as_text(), row.devices
    )
    if (memory := compiled.memory_analysis()) is not None:
        arguments, row.alias_bytes = (
            memory.argument_size_in_bytes,
            memory.alias_size_in_bytes,
        )
        results, row.temp_bytes = memory.output_size_in_bytes, memory.temp_size_in_bytes
        row.memory_bytes = arguments + results - row.alias_bytes + row.temp_bytes
        if row.trainable_bytes is not None:
            copies = 5 if row.moment_bytes else 1
            row.bytes_min = arguments - row.moment_bytes + copies * row.trainable_bytes


def note_times(rows: Sequence[Row], peak: float = 0, bandwidth: float = 0) -> None:
    """Notes what the samples say of rows that were timed together, also beside each other.

    The roofline is the time of the least FLOPs at the peak or, if longer, of the least bytes at
    theirs. ``hoist`` has paid after t_once / (t_partition - t_hoist) epochs.
    """
    for row in rows:
        row.step_s = float(np.median(row.samples))
        row.spread_s = float(np.median(np.abs(np.subtract(row.samples, row.step_s))))
        row.rows_per_s = row.batch / row.step_s
        row.once_s = float(np.median(row.once.samples)) if row.once else None
        flops = row.flops_min or row.flops
        if (
            flops is not None and row.platform == jax.default_backend()
        ):  # whose peak it is
            row.peak_share = (
                None if row.flops is None else row.flops / row.step_s / peak
            )
            row.roofline_share = (
                max(flops / peak, (row.bytes_min or 0) / bandwidth) / row.step_s
            )
    for row, base in product(rows, repeat=2):
        if (row.clip, row.optimizer) == (base.clip, base.optimizer):
            ratio = float(np.median(np.divide(row.samples, base.samples)))
            if (base.method, base.layout) == ("all", row.layout):
                row.vs_all = ratio
            if base.method == row.method and base.devices == 1 < row.devices:
                row.efficiency = 1 / ratio  # at as many rows a device
            if (base.method, base.problem) == ("partition", row.problem) and row.once_s:
                saved = base.step_s - row.step_s
                row.break_even = row.once_s / saved if saved > 0 else None


# ------------------------------------------------------------------------------ the clock
def prepare(problem: Problem, row: Row) -> None:
    """Compiles a method's step, for the default device or those that the row is ``on``.

    A batch has each row once for each of them. They share it, and ``sharded`` parameters, by the
    first axis that they divide. Of what is simulated the arrays are shapes alone.
    """
    mesh = jax.sharding.Mesh(
        row.on or jax.local_devices(backend=row.platform)[:1], "data"
    )

    def put(leaf: Any, share: bool, copies: int = 1) -> Any:
        shape = (leaf.shape[0] * copies, *leaf.shape[1:]) if copies > 1 else leaf.shape
        axes = [i for i, n in enumerate(shape) if share and n and n % row.devices == 0]
        spec = [*[None] * axes[0], "data"] if axes else []
        place = jax.sharding.NamedSharding(mesh, untyped.sharding.PartitionSpec(*spec))
        if row.simulated:
            return untyped.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)
        return jax.device_put(
            jnp.repeat(leaf, copies, axis=0) if copies > 1 else leaf, place
        )

    def for_each(leaf: Any) -> Any:
        each = leaf.shape[:1] == (problem.rows,)  # a random key serves all devices
        return put(leaf, each, row.devices if each else 1)

    params = jax.tree.map(partial(put, share=row.layout == "sharded"), problem.params)
    batch = jax.tree.map(for_each, problem.batch)
    start, args, loss, once = way_of(
        row.method, problem._replace(params=params, batch=batch)
    )
    state = (
        start,
        (start, start, put(jnp.int32(0), False)) if row.optimizer == "adam" else (),
    )
    trains, compared = (
        (problem.where, "*") if row.method != "all" else ("*", problem.where)
    )
    row.batch, row.flops_min = (
        problem.rows * row.devices,
        least_flops(problem, row.method),
    )
    parts = state[1], mf.partition(trains, params)[0]
    row.moment_bytes, row.trainable_bytes = map(tree_bytes, parts)
    places = jax.tree.map(lambda leaf: leaf.sharding, state), None
    donated = () if row.method.endswith("not donated") else (0,)
    take = partial(take_step, row, loss, problem.where)
    step = jax.jit(take, donate_argnums=donated, out_shardings=places)
    note_program(row, step, state, *args)
    # Each time in new arrays: a step deletes what it is given.
    row.fresh = lambda: (
        jax.tree.map(jnp.copy, start),
        jax.tree.map(jnp.zeros_like, state[1]),
    )
    row.run = (
        None if row.simulated else partial(take_steps, step, partial(repeat, args))
    )
    # Adam's first step is the gradients' sign, which a rounding turns: its moment is compared.
    row.read = lambda state: mf.partition(compared, (state[1] or state)[0])[0]
    # Clipped, `all` stands alone: a norm over all is another than one over what trains.
    row.group = (
        row.optimizer + (", clipped" + " over all" * (row.method == "all")) * row.clip
    )
    if once is not None:
        row.once = Row(
            run=partial(take_steps, lambda state: (state, once()), partial(repeat, ()))
        )
        row.kept_bytes = tree_bytes(args[1])
        row.kept_ratio = row.kept_bytes / tree_bytes(batch)
        if "random_bits" in str(jax.make_jaxpr(once)()):
            row.remark = "what it draws at random is drawn once, and fixed"


def take_steps(step: Function, feed: Function, state: Tree, steps: int) -> Any:
    """Takes a step with each of the args that ``feed(steps)`` gives, and waits: (state, loss)."""
    for args in feed(steps):
        state, loss = step(state, *args)
    return untyped.block_until_ready((state, loss))


def in_turn(do: Function, rows: Sequence[Row]) -> None:
    """Does it to each row; one that runs out of memory says so and is run no more; others go on."""
    for row in rows:
        try:
            do(row)
        except (MemoryError, ValueError, jax.errors.JaxRuntimeError) as error:
            known = re.search(
                "MemoryError|RESOURCE_EXHAUSTED|out.of.memory", repr(error), re.I
            )
            # The other processes of a cluster would wait for this one in the row's collectives.
            if not known or jax.process_count() > 1:
                raise
            row.remark, row.run = "out of memory", None


def measure(rows: Sequence[Row], options: Namespace) -> list[float]:
    """Makes rows, shows that they agree, times them in rounds and notes it; gives the peaks."""
    rates = [] if options.compile_only else probes(options.dtype)
    in_turn(lambda row: row.make(row), rows)
    in_turn(partial(check_agreement, first={}), [row for row in rows if row.run])
    order = [*rows, *(row.once for row in rows if row.once), *rates]
    shuffle = np.random.default_rng(0).shuffle  # the same in all processes
    for _ in range(options.rounds if rows else 3):
        shuffle(order)
        in_turn(sample, [row for row in order if row.run])
    peaks = [rate.batch / min(rate.samples) for rate in rates]
    note_times([row for row in rows if row.run], *peaks)
    for row in rows:  # their arrays make room
        row.make = row.run = row.fresh = row.once = None
    return peaks


def probes(dtype: str) -> list[Row]:
    """What the device can do at most: a product, a sum; a batch is their FLOPs, their bytes."""
    n = SIDE.get(jax.default_backend(), 8192)
    starts = jax.random.normal(jax.random.key(0), (n, n), dtype), jnp.ones(VECTOR)
    rows = [Row(batch=2 * n**3), Row(batch=3 * starts[1].nbytes)]
    for row, step, start in zip(rows, PROBES, starts):
        row.run = partial(
            take_steps, jax.jit(step, donate_argnums=0), partial(repeat, (start,))
        )
        row.fresh = partial(jnp.copy, start)
    return rows


def sample(row: Row) -> None:
    """Adds seconds a step, of a sample that is long enough: by process 0's clock for all."""
    # An untimed step first fills the caches that others emptied; no garbage is collected.
    took = timeit(partial(row.run, row.run(row.fresh(), 1)[0], row.steps), number=1)
    seconds = float(multihost_utils.broadcast_one_to_all(np.float32(took)))
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

    def read(state: Tree) -> dict[Any, np.ndarray]:  # by key path; whole, on the host
        whole = partial(multihost_utils.process_allgather, tiled=True)
        leaves = jax.tree_util.tree_leaves_with_path(row.read(state))
        return {
            k: np.asarray(x if x.is_fully_addressable else whole(x)) for k, x in leaves
        }

    what, state = f"{row.problem}: {label(row)}", row.fresh()
    before = read(state)
    state, loss = row.run(state, 1)
    after = read(state)
    if not jnp.isfinite(loss).all():
        raise FloatingPointError(f"{what}: the loss is {loss}")
    like, wanted = first.setdefault(row.group, (row, after))
    for path, leaf in after.items():
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        a, b, was = map(
            np.float32, (leaf, wanted.get(path, before[path]), before[path])
        )
        if not np.isfinite(a).all():
            raise FloatingPointError(f"{what}: the gradient of {name!r} is not finite")
        apart, change, value = (np.abs(x).max(initial=0) for x in (a - b, b - was, was))
        eps = float(np.spacing(leaf.dtype.type(1)))
        if apart > (allowed := max(0.01, 8 * eps) * change + 4 * eps * value):
            differs = f"{name!r} differs by {apart:.3g}, {allowed:.3g} is allowed"
            raise FloatingPointError(
                f"{what} must take the step of {label(like)}: {differs}"
            )


# ----------------------------------------------------------------------------- the tables
def methods_table(
    options: Namespace, problems: Sequence[Problem]
) -> Iterator[list[Row]]:
    """a step, by how layers are held still"""
    for problem in problems:
        kinds = [(way, False, options.optimizer) for way in WAYS]
        kinds += [(way, True, options.optimizer) for way in WAYS[:-1]]
        kinds += [
            (way, False, "adam") for way in WAYS[:3] if options.optimizer == "sgd"
        ]
        kinds = kinds if problem is problems[-1] else kinds[: len(WAYS) - 1]
        new = partial(Row, "methods", problem.name, make=partial(prepare, problem))
        yield [new(way, clip, optimizer=optimizer) for way, clip, optimizer in kinds]


def prefix_table(
    options: Namespace, problems: Sequence[Problem]
) -> Iterator[list[Row]]:
    """a step, by how many layers from the first are frozen"""
    problem, rows = problems[-1], list[Row]()
    layers = [f"linear_{i}" for i in range(len(problem.sizes) - 1)]
    for n, way in [(0, "all"), *product(range(1, len(layers)), ("partition", "hoist"))]:
        make = partial(prepare, problem._replace(where=layers[n:]))
        what = f"{problem.name}, {n} frozen"
        rows += [Row("prefix", what, way, make=make, optimizer=options.optimizer)]
    yield rows


def devices_table(
    options: Namespace, problems: Sequence[Problem]
) -> Iterator[list[Row]]:
    """a data-parallel step on one device; simulated: no times, sharded as XLA does for CPUs"""
    usual, processes = jax.devices(), jax.process_count()
    named = options.devices or processes > 1
    for devices in (
        [usual] if named else map(jax.devices, sorted(backends()))
    ):  # the CPU first
        own = [[d for d in devices if d.process_index == i] for i in range(processes)]
        by_turns = [d for turn in zip(*own) for d in turn]
        powers = {len(devices), *(processes * 2**i for i in range(20))}
        several = devices != usual[:1]  # the usual one alone is in the other tables
        for n in options.devices or sorted(
            n for n in powers if several and n <= len(devices)
        ):
            yield from (
                device_rows(problem, by_turns[:n], options) for problem in problems[-2:]
            )
    if not named:  # last: what was made before is gone
        vars(options).update(compile_only=True, devices=[8], cluster=False)
        yield from devices_table(options, set_up(options))


def device_rows(
    problem: Problem, devices: list[jax.Device], options: Namespace
) -> list[Row]:
    n, kind, ways = len(devices), devices[0].platform, ("all", "partition")
    simulated = options.compile_only or (kind == "cpu" and n > jax.process_count())
    make = partial(prepare, problem)
    new = partial(
        Row, problem=problem.name, platform=kind, optimizer=options.optimizer, make=make
    )
    # What they must agree with, and are measured against, is one device of their kind: not shown.
    alone = [new(method=way) for way in ways if n > 1 and not simulated]
    new = partial(new, table="devices", devices=n, simulated=simulated, on=devices)
    sizes = {size for leaf in jax.tree.leaves(problem.params) for size in leaf.shape}
    layouts = ["replicated", "sharded"][
        : 1 + (n > 1 and any(size % n == 0 for size in sizes))
    ]
    return alone + [
        new(layout=layout, method=way) for layout, way in product(layouts, ways)
    ]


def run_table(options: Namespace, problems: Sequence[Problem]) -> Iterator[list[Row]]:
    """a step of the walk-through's 10,000: one by one by `train_step`, or all in one `train`"""
    problem = problems[0]
    xs, ys = mf.dataset(jax.random.key(1), RUN_STEPS, problem.rows)
    batches = xs.astype(options.dtype), ys
    ours = partial(prepare_run, *mf.partition(problem.where, problem.params), batches)
    makes = {"loop": partial(ours, mf.train_step), "scan": partial(ours, mf.train)}
    yield [
        Row("run", "seed", way, steps=RUN_STEPS, make=make)
        for way, make in makes.items()
    ]


def prepare_run(
    state: Tree, frozen: Tree, batches: Tree, step: Function, row: Row
) -> None:
    """Makes a step that is called for each batch or, a scan, with them all."""
    jitted, scan = jax.jit(step, donate_argnums=0), row.method.endswith("scan")
    loop = [] if scan else [(frozen, *batch) for batch in zip(*batches)]

    def feed(steps: int) -> Any:
        return (
            [(frozen, *(column[:steps] for column in batches))]
            if scan
            else loop[:steps]
        )

    row.run, row.fresh = (
        partial(take_steps, jitted, feed),
        partial(jax.tree.map, jnp.copy, state),
    )
    note_program(row, jitted, state, *feed(RUN_STEPS)[0])
    row.batch, row.flops = (
        batches[1].shape[1],
        None if scan else row.flops,
    )  # it counts one pass


# Each yields lists of unmade rows that are timed together; .ci/peers.py adds its own tables.
tables: list[Function] = [methods_table, prefix_table, run_table, devices_table]
TABLES = {table.__name__.removesuffix("_table"): table for table in tables}
PEERS, PICTURED = Path(__file__).parent / ".ci/peers.py", ("prefix", "methods")

# ---------------------------------------------------------------- options and the cluster
DEVICES = "devices compile_only cluster coordinator"
UNUSED = {  # by a table, or beside another option
    "methods": DEVICES,
    "prefix": f"train freeze model {DEVICES}",
    "run": f"sizes batch train freeze optimizer model {DEVICES}",
    "model": "sizes batch dtype",
    "cluster": "coordinator",
    "compile_only": "cluster coordinator rounds",
}


def parse(argv: Sequence[str] | None) -> Namespace:
    """The options; tables are those asked for or that use every option; of a model, the first."""
    if "--peers" in (sys.argv if argv is None else argv):
        runpy.run_path(str(PEERS))["add_tables"](sys.modules[__name__])
    # Without its usage text, argparse says what is wrong in one line, and exits with 2.
    parser = ArgumentParser(
        "bench.py", SUPPRESS, __doc__.partition("\n")[0], allow_abbrev=False
    )
    add, which = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--tables", nargs="+", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    add("--peers", action="store_true", help="other libraries too")
    add("--sizes", nargs="+", type=int, metavar="N", help="the widths of an MLP")
    add("--batch", type=int, metavar="N", help="rows in a batch, a device")
    which.add_argument("--train", nargs="+", metavar="PATTERN", help="what trains")
    which.add_argument("--freeze", nargs="+", metavar="PATTERN", help="what does not")
    add(
        "--optimizer",
        choices=("sgd", "adam"),
        default="sgd",
        help="default: sgd, with some adam",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="default: float32",
    )
    add("--model", metavar="FILE.py:NAME", help="NAME() is (loss_fn, params, batch)")
    add("--rounds", type=int, default=7, metavar="N", help="default: 7")
    add("--devices", nargs="+", type=int, metavar="N", help="how many")
    add("--compile-only", action="store_true", help="simulate devices, time nothing")
    add("--cluster", action="store_true", help="SLURM, TPU pods, Kubernetes")
    add("--coordinator", metavar="HOST:PORT", help="a cluster named by hand")
    add("--processes", type=int, metavar="N", help="how many it has")
    add("--process", type=int, metavar="I", help="which this one is, from 0")
    add("--json", type=Path.cwd().joinpath, metavar="FILE", help="the results")
    add(
        "--plot",
        type=Path.cwd().joinpath,
        metavar="FILE",
        help="a picture of prefix and methods",
    )
    options = parser.parse_args(argv)
    given = {
        name
        for name, value in vars(options).items()
        if value != parser.get_default(name)
    }
    unused = {user: given.intersection(names.split()) for user, names in UNUSED.items()}
    usual = [name for name in TABLES if not unused.get(name)][
        : 1 if options.model else None
    ]
    asked = (options.tables or usual) + ["peers"] * options.peers
    options.tables = [name for name in TABLES if name in asked]
    for user in (*options.tables, *sorted(given)):
        for name in sorted(unused.get(user, ())):
            parser.error(f"--{name} is not used with {user}".replace("_", "-"))
    options.where = options.train or [
        f"!{p}".removeprefix("!!") for p in options.freeze or []
    ]
    options.cluster = bool(given & {"cluster", "coordinator", "processes", "process"})
    counts, port = (
        options.devices or [],
        (options.coordinator or ":1").rpartition(":")[2],
    )
    numbers = [
        *counts,
        *(options.sizes or []),
        options.batch,
        options.rounds,
        options.processes,
    ]
    numbers = [n for n in numbers if n is not None and not 0 < n < 2**31]
    files = [
        str(file.resolve()) for file in (options.json, options.plot) if file is not None
    ]
    refusals: dict[str, Any] = {
        "JAX_DISABLE_JIT is set, and nothing would be compiled": untyped.config.jax_disable_jit,
        f"numbers must be positive, and below 2**31: {numbers}": numbers,
        "--coordinator must be HOST:PORT": not port.isdecimal() or int(port) >= 2**16,
        f"--devices names a count twice: {counts}": len(set(counts)) < len(counts),
        "--model needs --train or --freeze": options.model and not options.where,
        "--plot draws methods and prefix": options.plot
        and not {*options.tables} & {*PICTURED},
        f"--json, --plot must be regular files, not the same: {files}": len({*files})
        < len(files)
        or any(os.path.exists(file) and not os.path.isfile(file) for file in files),
    }
    for why in (why for why, wrong in refusals.items() if wrong):
        parser.error(why)
    return options


def problems_of(options: Namespace) -> list[Problem]:
    """The user's model, or an MLP of the sizes given, or the usual ones."""
    if options.model:
        file, name = options.model.rsplit(":", 1)
        sys.path.insert(0, str(Path(file).parent.resolve()))
        loss, params, batch = runpy.run_path(file)[name]()
        params, batch = jax.tree.map(jnp.asarray, (params, tuple(batch)))
        jax.eval_shape(jax.grad(loss), params, *batch)
        rows = next((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape), 1)
        return [Problem(Path(file).stem, options.where, loss, params, batch, rows)]
    sizes: tuple[int, ...] = tuple(options.sizes or ())
    chosen = {"mlp": (sizes, 64, [f"linear_{len(sizes) - 2}"])} if sizes else PROBLEMS
    return [mlp(name, *problem, options) for name, problem in chosen.items()]


def set_up(options: Namespace) -> list[Problem]:
    """Makes or joins the devices that are asked for, and gives the problems.

    All processes end by one line where one refuses or was given other options. Where others do not
    come within a minute, come twice, or die, JAX ends this one itself, by a C++ stack.
    """
    if options.compile_only:
        options.devices = options.devices or [1, 2, 4, 8]
        untyped.extend.backend.clear_backends()
        untyped.config.update("jax_platforms", "cpu")
        untyped.config.update("jax_num_cpu_devices", max(options.devices))
    if options.cluster:
        untyped.config.update("jax_cpu_collectives_implementation", "gloo")
        named = options.coordinator, options.processes, options.process
        jax.distributed.initialize(*named, initialization_timeout=60)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX took it, for checkpoints
        if jax.process_index() != 0:  # process 0 alone prints and writes
            options.json = options.plot = None
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    problems, refused, doing = list[Problem](), "", ""
    try:
        here, processes = jax.devices(), jax.process_count()
        if any(n > len(here) or n % processes for n in options.devices or []):
            found = f"there are {len(here)} in {processes} processes, {here}"
            raise ValueError(
                f"--devices {options.devices}: {found}; --compile-only simulates more"
            )
        doing = "--json, --plot (uv run --with matplotlib bench.py): "
        write(options, {}, [], "")
        doing = (
            options.model
            and f"{options.model}, FILE.py:NAME, gives (loss_fn, params, batch): "
        )
        problems = problems_of(options)
        for problem in problems:
            doing = f"{problem.name}: "
            mf.partition(problem.where, problem.params)
    except Exception as error:
        refused = f"{doing or ''}{error}".partition("\n")[0]
    shared = vars(options) | dict.fromkeys(("json", "plot", "process"))
    mark = np.uint32(zlib.crc32(f"{refused}{shared}".encode()))
    marks = multihost_utils.process_allgather(mark).reshape(-1)
    others = np.flatnonzero(marks != marks[0])
    if refused or others.size:
        differ = f"processes {others} refuse, or have other options than process 0; here: {shared}"
        raise ValueError(refused or differ)
    return problems


# ------------------------------------------------------------------------- presentation
MEANS = """step: median; vs all: within a round; of limit: the least that its FLOPs or bytes take;
memory: arguments, results and temporary bytes on a device, counted once where they share a place"""
LINE = "{:14}  {:34} {:>7} {:>8} {:>8} {:>7} {:>7} {:>7}"
TITLES = LINE.format(
    "problem", "method", "step", "vs all", "of limit", "rows/s", "FLOPs", "memory"
)


def quantity(value: float | None, unit: str) -> str:
    """Three digits with a prefix, or a ratio; nothing for None."""
    if value is None:
        return ""
    power = (
        0 if unit == "x" else int(f"{value:.2e}".partition("e")[2]) // 3
    )  # once rounded
    digits = f"{value / 1000**power:#.3g}".rstrip(".")
    return digits + f" {' kMGTPfpnµm'[power].strip()}{unit}".rstrip().replace(" x", "x")


def label(row: Row) -> str:
    """A row's method and what is special about it."""
    devices = f"{row.devices} {row.platform}" if row.table == "devices" else ""
    words = (
        row.method,
        "clipped" * row.clip,
        row.optimizer.removeprefix("sgd"),
        devices,
        row.layout,
    )
    return ", ".join(filter(None, words))


def line(row: Row) -> str:
    """A row under ``TITLES``, and below it what it has no columns for."""
    values = row.step_s, row.vs_all, row.rows_per_s, row.flops, row.memory_bytes
    cells = [*map(quantity, values, ("s", "x", "", "", "B"))]
    cells.insert(2, "" if row.roofline_share is None else f"{row.roofline_share:.0%}")
    return "\n    ".join(
        (LINE.format(row.problem, label(row), *cells).rstrip(), *notes(row))
    )


def notes(row: Row) -> Iterator[str]:
    if row.once_s:
        paid = (
            f"paid after {row.break_even:.2g} epochs"
            if row.break_even
            else "never paid"
        )
        kept = f"{quantity(row.kept_bytes, 'B')} more a batch ({row.kept_ratio:.1f}x its own)"
        yield f"once {quantity(row.once_s, 's')} and {kept}, {paid}"
    if row.devices > 1 and row.sent_bytes is not None:
        given, sent = quantity(row.collective_bytes, "B"), quantity(row.sent_bytes, "B")
        pace = f", each at {row.efficiency:.0%} of one's pace" if row.efficiency else ""
        yield f"{'simulated: ' * row.simulated}collectives give {given}, a ring sends {sent}{pace}"
    if row.remark:
        yield row.remark


def answers(rows: Sequence[Row]) -> list[str]:
    """The answer, in at most three lines that stand alone: of a table the last problem timed."""
    said, tables = dict[Any, dict[str, list[str]]](), ("methods", "devices", "run")
    ways = "all", "partition", "hoist", "loop", "scan"
    rows = [
        row
        for row in rows
        if row.table in tables and row.method in ways and not row.clip
    ]
    for row in sorted(
        rows, key=lambda row: (tables.index(row.table), row.step_s is not None)
    ):
        ratio = (
            f" ({1 / row.vs_all:.3g}x)" if row.vs_all and row.method != "all" else ""
        )
        step = f"{row.method} {quantity(row.step_s, 's')}{ratio}".rstrip()
        facts = filter(None, (step, quantity(row.memory_bytes, "B"), *notes(row)))
        kind = said.setdefault((row.table, row.optimizer, row.layout), {})
        what = label(row).replace(row.method, row.problem, 1)
        kind[what] = [
            *kind.pop(what, []),
            ", ".join(facts),
        ]  # the last one again the last
    return [
        f"{what}: {' | '.join(texts)}"
        for what, texts in map(dict.popitem, said.values())
    ][:3]


def card(options: Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    peaks, device = [*measure([], options), None, None], jax.devices()[0]
    info = Path("/proc/cpuinfo")
    names = (
        re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    )
    cpu = f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores"
    facts = {module.__name__: module.__version__ for module in (jax, jaxlib, np)}
    facts |= {"python": platform.python_version(), "platform": device.platform}
    facts |= {"device_kind": device.device_kind, "device_count": jax.device_count()}
    facts |= {
        "processes": jax.process_count(),
        "cpu": cpu,
        "date": time.strftime("%Y-%m-%d"),
    }
    return facts | {
        "dtype": options.dtype,
        "peak_flops": peaks[0],
        "peak_bytes_per_s": peaks[1],
    }


def write(
    options: Namespace, facts: dict[str, Any], rows: Sequence[Row], ended: str
) -> None:
    """Writes the files that are asked for, each in one piece; without rows, shows that it can."""
    pictured = [row for row in rows if row.step_s and row.table in PICTURED]
    results = {"card": facts, "complete": ended == "complete", "ended": ended}
    results |= {"rows": [{key: getattr(row, key) for key in KEYS} for row in rows]}
    for file, shown in ((options.json, rows), (options.plot, pictured)):
        if file:
            with TemporaryDirectory(dir=file.resolve().parent) as folder:
                part = Path(folder, "part")
                if file == options.json:
                    part.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
                else:
                    drawing(pictured).savefig(part, format=file.suffix[1:].lower())
                if shown:
                    part.replace(file.resolve())


def drawing(rows: Sequence[Row]) -> Any:
    """Time against frozen layers, a line a method, and beside it the last problem's methods."""
    from matplotlib.figure import Figure  # uv run --with matplotlib bench.py

    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=200)
    left, right = figure.subplots(1, 2)
    prefix, methods = ([row for row in rows if row.table == name] for name in PICTURED)
    for way in ("partition", "hoist"):
        times = [1e3 * row.step_s for row in prefix if row.method in ("all", way)]
        left.plot(times, "o-", label=way)
    left.set(
        title="ms a step, by layers frozen from the first", xticks=range(len(times))
    )
    left.legend()
    methods = [
        row for row in reversed(methods) if row.problem == methods[-1].problem
    ]  # upwards
    names = [f"{label(row)}: {quantity(row.step_s, 's')}" for row in methods]
    right.barh(names, [1e3 * row.step_s for row in methods])
    right.set(title="ms a step, by method")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    options, facts, rows = Namespace(), dict[str, Any](), list[Row]()
    code, ended, say = 0, "complete", partial(print, flush=True)
    try:
        options = parse(argv)
        problems = set_up(options)
        facts = card(options)
        short = {
            k: quantity(v, "") if isinstance(v, float) else v for k, v in facts.items()
        }
        say(*(f"{key} {value}" for key, value in short.items()), sep=", ")
        for table in options.tables:
            say(
                f"\n{table}: {TABLES[table].__doc__}",
                *problems,
                MEANS,
                TITLES,
                sep="\n",
            )
            for group in TABLES[table](options, problems):
                measure(group, options)
                rows += (shown := [row for row in group if row.table])
                say(*map(line, shown), sep="\n")
    except KeyboardInterrupt:
        code, ended = 130, "interrupted"
    except Exception as error:  # also an OSError: stdout is gone, `| head`
        code, ended = 1 if facts else 2, f"error: {error}"
        if facts and not isinstance(error, (OSError, FloatingPointError)):
            sys.excepthook(*sys.exc_info())
    try:
        if rows:
            write(options, facts, rows, ended)
            say("", *answers(rows), sep="\n")
    except OSError as error:
        code, ended = code or 1, f"error: {error}"
    if code:
        say(f"bench.py: {ended}".partition("\n")[0], file=sys.stderr)
    if code in (0, 2):
        sys.exit(code)
    os._exit(code)  # Python's end, or JAX's farewell to a cluster, could hang


if __name__ == "__main__":
    main()
