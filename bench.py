# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.5.1", "numpy"]
# ///
# SPDX-License-Identifier: MIT
"""Measures what freezing part of a model saves: time, memory and network traffic.

    uv run bench.py --json run.json                        # two MLPs, about 90 s
    uv run bench.py --model mine.py:make --train 'head/*'  # your own model
    uv run bench.py --compile-only --devices 8 64 512      # simulated devices
    uv run --with "jax[tpu]" bench.py --compile-only --topology v5e:16x16  # a TPU pod

The file has two halves. The first one is the benchmark: the ways to freeze, the check
that they all take the same step, the clock, and the path from a case to its result. The
second one, below the banner, has all the rest: the optimizers, what the compiler says,
several devices, the other tables, your own model, the options and the output.
"""

from __future__ import annotations

import os
import signal

if (
    __name__ == "__main__"
):  # importing JAX takes a second, in which you may press Ctrl-C
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))

import gc
import itertools
import json
import math
import platform
import re
import runpy
import socket
import subprocess
import sys
import textwrap
import time
import warnings
import zlib
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

import minifreeze as mf

Tree = Any  # a pytree of arrays, or of their shapes
Function = Callable[..., Any]

SAMPLE_S = 0.05  # a sample lasts about this long
MAX_CALLS = 10_000  # in one sample
PEAK_VECTOR_BYTES = 2**28  # more than the caches of CPUs and GPUs hold
NOTHING_TO_HOIST = "nothing to hoist"


# ------------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class Case:
    """What one row of a table measures."""

    table: str
    problem: str
    method: str  # see METHODS
    clip: bool = False  # whether gradients are clipped by their global norm
    optimizer: str = "sgd"
    devices: int = 1
    layout: str | None = None  # on several devices: "replicated" or "sharded"
    platform: str = field(default_factory=jax.default_backend)
    simulated: bool = False  # compiled for devices that are not there, and never run
    rows: int = 0  # in one training step, over all devices
    unit: str = "rows"  # or "tokens"


@dataclass(frozen=True)
class Step:
    """How a case is run: ``fn(state, *args)`` returns ``(new state, loss)``.

    ``fn`` may delete the state that it is given (donation), so each run starts with a
    new one from ``init()``.
    """

    fn: Function
    init: Callable[[], Tree]
    args: tuple[Tree, ...] = ()
    steps: int = 1  # training steps in one call of fn
    update: str = ""  # steps with the same text here must move parameters alike
    read: Callable[[Tree], Tree] = lambda state: state  # the parameters in a state
    features: Step | None = None  # computes what hoist keeps for one batch, its args[1]
    trainable_bytes: int | None = None  # on one device
    written_bytes: int | None = None  # of those and of their moments
    remark: str | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds per training step, one sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def spread(self) -> float:
        """The median absolute deviation."""
        return float(np.median(np.abs(np.subtract(self.samples, self.median))))

    def overlaps(self, other: Timing) -> bool:
        """Whether the intervals median ± spread overlap."""
        return abs(self.median - other.median) <= self.spread + other.spread


@dataclass(frozen=True)
class Result:
    """What was measured for a case. Ratios are computed when they are printed."""

    case: Case
    program: Program
    timing: Timing | None = None  # None if it was not run
    once: Timing | None = None  # hoist's features, in seconds per batch
    peak_memory_bytes: int | None = None  # of the process so far, by its device
    remark: str | None = None


@dataclass(frozen=True)
class Problem:
    """Minimize ``loss(params, *batch)`` over the parameters that ``where`` selects."""

    name: str
    where: mf.Where
    loss: Function
    params: Tree
    batch: tuple[Tree, ...]
    rows: int  # in the batch of one device
    tokens: int | None = None  # in a row, if the batch is token ids
    sizes: tuple[int, ...] = ()  # of the MLP; empty for your own model
    optimizer: Any = None  # of optax, if your own model has one
    sharding: Function = lambda leaf: None  # of a parameter, see place()
    abstract: bool = False  # whether params and batch are shapes


# ----------------------------------------------------------------- the ways to freeze
class Gradients(NamedTuple):
    """How a method computes gradients: ``fn(params, *args)`` is ``(loss, grads)``.

    ``params`` are the parameters that are differentiated and updated. ``args`` are
    arguments, because XLA would fold arrays that ``fn`` closes over into the program.
    """

    fn: Function
    params: Tree
    args: tuple[Tree, ...]
    features: Callable[[], Tree] | None = None  # computes args[1]
    remark: str | None = None


def everything(problem: Problem) -> Gradients:
    """Trains all parameters: what the other methods are compared with."""
    fn = jax.value_and_grad(problem.loss)
    return Gradients(fn, problem.params, problem.batch)


def partition(problem: Problem) -> Gradients:
    """Differentiates the trainable part only."""
    trainable, frozen = mf.partition(problem.where, problem.params)
    fn = jax.value_and_grad(merged_loss(problem))
    return Gradients(fn, trainable, (frozen, *problem.batch))


def hoist(problem: Problem) -> Gradients:
    """Like partition, but computes once per batch what no trainable leaf changes."""
    trainable, frozen = mf.partition(problem.where, problem.params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        once, rest = mf.hoist(merged_loss(problem), trainable, frozen, *problem.batch)

    remark = None
    if any(str(warning.message).startswith("hoist") for warning in caught):
        remark = NOTHING_TO_HOIST
    elif "random_bits" in str(jax.make_jaxpr(once)(frozen, *problem.batch)):
        remark = "random numbers are drawn once per batch and kept"
    features = partial(jax.jit(once), frozen, *problem.batch)
    args = (frozen, features())
    return Gradients(jax.value_and_grad(rest), trainable, args, features, remark)


def stop_gradient(problem: Problem) -> Gradients:
    """Differentiates all parameters; the gradients of the frozen ones are zeros."""

    def loss(params: Tree, *batch: Tree) -> Any:
        trainable, frozen = mf.partition(problem.where, params)
        frozen = jax.lax.stop_gradient(frozen)
        return merged_loss(problem)(trainable, frozen, *batch)

    return Gradients(jax.value_and_grad(loss), problem.params, problem.batch)


def zeroed_gradients(problem: Problem) -> Gradients:
    """Computes all gradients, and multiplies those of frozen parameters by zero."""

    def fn(params: Tree, *batch: Tree) -> tuple[jax.Array, Tree]:
        loss, grads = jax.value_and_grad(problem.loss)(params, *batch)
        trained = mf.mask(problem.where, params)
        return loss, jax.tree.map(jnp.multiply, grads, trained)

    return Gradients(fn, problem.params, problem.batch)


def merged_loss(problem: Problem) -> Function:
    """The loss as a function of the two parts of the parameters."""

    def loss(trainable: Tree, frozen: Tree, *batch: Tree) -> Any:
        return problem.loss(mf.merge(trainable, frozen), *batch)

    return loss


METHODS: dict[str, Callable[[Problem], Gradients]] = {
    "everything": everything,
    "partition": partition,
    "hoist": hoist,
    "stop_gradient": stop_gradient,
    "zeroed gradients": zeroed_gradients,
    "stop_gradient, not donated": stop_gradient,
}


def build_step(problem: Problem, case: Case) -> Step:
    """Returns one training step: gradients, clipping if asked for, and the update."""
    gradients = METHODS[case.method](problem)
    optimizer = optimizer_of(problem, case)

    def step(state: Tree, *args: Tree) -> tuple[Tree, jax.Array]:
        params, moments = state
        loss, grads = gradients.fn(params, *args)
        if case.clip:
            grads = clip_by_global_norm(grads)
        params, moments = optimizer.update(params, grads, moments)
        return (params, moments), loss

    def start(params: Tree) -> Tree:
        return jax.tree.map(jnp.copy, params), optimizer.init(params)

    shapes = jax.eval_shape(start, gradients.params)
    shardings = jax.tree.map(problem.sharding, shapes)

    def init() -> Tree:
        if problem.abstract:
            return jax.tree.map(with_sharding, shapes, shardings)
        return jax.device_put(start(gradients.params), shardings)

    def read(state: Tree) -> Tree:
        params, _ = state
        if case.method == "everything":  # the other methods do not move the rest
            params, _ = mf.partition(problem.where, params)
        return params

    trains = "*" if case.method == "everything" else problem.where
    trainable, _ = mf.partition(trains, problem.params)
    trainable_bytes = tree_bytes(trainable)
    # The moments have a multiple of the parameters' bytes: 0 for SGD, 2 for Adam.
    state_bytes = tree_bytes(jax.tree.map(with_sharding, shapes, shardings))
    bytes_per_trained_byte = state_bytes / tree_bytes(gradients.params)
    donated = () if case.method.endswith("not donated") else (0,)
    return Step(
        fn=jax.jit(step, donate_argnums=donated, out_shardings=(shardings, None)),
        init=init,
        args=gradients.args,
        update=update_name(case),
        read=read,
        features=features_step(gradients),
        trainable_bytes=trainable_bytes,
        written_bytes=round(bytes_per_trained_byte * trainable_bytes),
        remark=gradients.remark,
    )


# -------------------------------------------------------- all must take the same step
def check_same_step(cases: Mapping[Case, Step]) -> None:
    """Raises FloatingPointError unless cases of one update move their parameters alike.

    Parameters that the first of them does not have must not move at all.
    """
    first: dict[str, tuple[Case, Arrays]] = {}
    for case, step in cases.items():
        state = step.init()
        before = to_host(step.read(state))
        state, loss = step.fn(state, *step.args)
        after = to_host(step.read(state))
        if not jnp.isfinite(loss).all():
            raise FloatingPointError(f"{full_name(case)}: the loss is {loss}")

        like, expected = first.setdefault(step.update, (case, after))
        for path, leaf in after.items():
            wanted = expected.get(path, before[path])
            wrong = difference(before[path], leaf, wanted)
            if wrong is not None:
                where = f"{full_name(case)}: {leaf_name(path)!r}"
                raise FloatingPointError(f"{where} {wrong} (see {full_name(like)})")


# -------------------------------------------------------------------------- the clock
def run_calls(step: Step, state: Tree, calls: int) -> tuple[Tree, float]:
    """Calls a step, waits for its outputs, and returns (state, seconds)."""
    start = time.perf_counter()
    loss = None
    for _ in range(calls):
        state, loss = step.fn(state, *step.args)
    block_until_ready((state, loss))
    seconds = time.perf_counter() - start
    return state, from_first_process(seconds)  # all processes go by one clock


def calibrate(step: Step) -> int:
    """Returns how many calls a sample of about SAMPLE_S needs. None of them is kept."""
    state, _ = run_calls(step, step.init(), 1)  # compiles
    calls = 1
    while calls < MAX_CALLS:
        state, seconds = run_calls(step, state, calls)
        if seconds >= SAMPLE_S:
            break
        calls *= 2
    return calls


def sample(step: Step, calls: int) -> float:
    """Returns the seconds per training step, measured over a number of calls."""
    # Untimed: the case before this one has filled the caches with its own arrays.
    state, _ = run_calls(step, step.init(), 1)
    gc.disable()  # as timeit does
    try:
        _, seconds = run_calls(step, state, calls)
    finally:
        gc.enable()
    return seconds / (calls * step.steps)


def time_rounds(cases: Mapping[Case, Step], rounds: int = 7) -> dict[Case, Timing]:
    """Times each case once per round, in an order that is new in each round.

    The number of calls in a sample is fixed before the first sample is taken.
    """
    calls = {case: calibrate(step) for case, step in cases.items()}
    samples: dict[Case, list[float]] = {case: [] for case in cases}
    order = list(cases)
    generator = np.random.default_rng(0)  # all processes draw the same order
    for _ in range(rounds):
        for index in generator.permutation(len(order)):
            case = order[index]
            samples[case].append(sample(cases[case], calls[case]))
    return {case: Timing(tuple(seconds)) for case, seconds in samples.items()}


# ---------------------------------------------------------------- from case to result
Build = Callable[[Case], Step]


class Table(NamedTuple):
    title: str
    results: list[Result]  # timed together; results of two tables are never compared


def measure(builds: Mapping[Case, Build], options: Namespace) -> list[Result]:
    """Builds and compiles cases, checks that their steps agree, and times them."""
    steps: dict[Case, Step] = {}
    programs: dict[Case, Program] = {}
    remarks: dict[Case, str | None] = {}
    for case, build in builds.items():
        try:
            step = build(case)
            programs[case] = compile_step(step, case.devices, options.batches)
            if not case.simulated:
                run_calls(step, step.init(), 1)  # does it fit into memory?
        except Exception as error:
            remarks[case] = why_left_out(error)  # raises all other errors again
            continue
        steps[case] = step
        remarks[case] = step.remark

    timings: dict[Case, Timing] = {}
    if not any(case.simulated for case in builds):
        check_same_step(sgd_steps(steps, builds))
        timings = time_rounds(steps | features_steps(steps), options.rounds)

    peak = peak_memory_bytes()
    results = []
    for case in builds:
        program = programs.get(case, Program())
        timing = timings.get(case)
        once = timings.get(features_case(case))
        results.append(Result(case, program, timing, once, peak, remarks[case]))
    return results


def methods_table(options: Namespace, problems: Sequence[Problem]) -> Iterator[Table]:
    """One step by each method; for the last problem also clipped, and with Adam."""
    for problem in problems:
        problem = place(problem, jax.local_devices()[:1])
        plain = case_of("methods", problem, options)
        clipped = replace(plain, clip=True)
        adam = replace(plain, optimizer="adam")

        main_methods = ["everything", "partition", "hoist"]
        donated = [*main_methods, "stop_gradient", "zeroed gradients"]
        if problem.optimizer is not None:  # it might move the frozen parameters it sees
            cases = [replace(plain, method=method) for method in main_methods]
        elif problem.name != problems[-1].name:
            cases = [replace(plain, method=method) for method in donated]
        else:
            cases = [replace(plain, method=method) for method in METHODS]
            cases += [replace(clipped, method=method) for method in donated]
            if options.optimizer == "sgd":
                cases += [replace(adam, method=method) for method in main_methods]
        builds: dict[Case, Build] = {
            case: partial(build_step, problem) for case in cases
        }
        yield Table(describe(problem), measure(builds, options))


def run(argv: Sequence[str] | None, report: Report) -> None:
    """Measures and prints each table that the options ask for."""
    options = report.options = parse(argv)
    problems = set_up(options)
    report.card = describe_machine(options)
    say(card_text(report.card))
    say(legend(options))
    for name in options.tables:
        for table in TABLES[name](options, problems):
            rows = rows_of(table.results, report.card)
            report.tables.append(rows)
            say(table_text(table.title, rows))
    report.ended = "complete"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark. What was measured is written, however the run ends."""
    report = Report()
    with Interrupts() as interrupts:
        try:
            try:
                run(argv, report)
            finally:
                interrupts.hold()  # the writing below is not to be interrupted
        except KeyboardInterrupt:
            report.ended = "interrupted"
        except Exception as error:
            report.fail(error)
        finish(report)
        leave(report, interrupts)


# ====================================================================================
# The benchmark ends here. All that follows is what it is made of.
# ====================================================================================


# -------------------------------------------------------------- the built-in problems
# name: (widths of an MLP, rows per batch, the trainable layers)
MLPS: dict[str, tuple[tuple[int, ...], int, list[str]]] = {
    "seed": ((1, 300, 100, 10), 10, ["linear_0", "linear_2"]),
    "deep": ((1024, 2048, 2048, 2048, 2048, 10), 64, ["linear_4"]),
}


def mlp(
    name: str,
    sizes: tuple[int, ...],
    rows: int,
    where: mf.Where,
    dtype: str = "float32",
    abstract: bool = False,
) -> Problem:
    """Returns a random MLP with one batch of random data, or the shapes of both."""

    def draw() -> tuple[Tree, tuple[Tree, ...]]:
        params_key, x_key, y_key = jax.random.split(jax.random.key(0), 3)
        params = mf.init(params_key, sizes, dtype)
        x = jax.random.normal(x_key, (rows, sizes[0]), dtype)  # (rows, in)
        y = jax.random.randint(y_key, (rows,), 0, sizes[-1])  # (rows,)
        return params, (x, y)

    def loss(params: Tree, x: jax.Array, y: jax.Array) -> Any:
        everything, nothing = mf.partition("*", params)
        return mf.loss_fn(everything, nothing, x, y)

    params, batch = jax.eval_shape(draw) if abstract else jax.jit(draw)()
    return Problem(name, where, loss, params, batch, rows, sizes=sizes)


# --------------------------------------------------------------------- the optimizers
SGD_RATE = 0.1
ADAM_RATE = 1e-3
CLIP_NORM = 0.1  # smaller than the gradients of the built-in problems


class Optimizer(NamedTuple):
    init: Function  # params -> moments
    update: Function  # (params, grads, moments) -> (params, moments)


def no_moments(params: Tree) -> tuple[()]:
    return ()


def sgd(params: Tree, grads: Tree, moments: tuple[()]) -> tuple[Tree, tuple[()]]:
    return mf.sgd_step(params, grads, SGD_RATE), moments


def adam_moments(params: Tree) -> Tree:
    mean = jax.tree.map(jnp.zeros_like, params)
    square = jax.tree.map(jnp.zeros_like, params)
    return mean, square, jnp.int32(0)


def adam(params: Tree, grads: Tree, moments: Tree) -> tuple[Tree, Tree]:
    """Kingma and Ba (2015), with the constants that they propose."""
    mean, square, count = moments
    count += 1
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
    square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, square, grads)

    def updated(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        m = m / (1 - 0.9**count)
        v = v / (1 - 0.999**count)
        return (p - ADAM_RATE * m / (jnp.sqrt(v) + 1e-8)).astype(p.dtype)

    return jax.tree.map(updated, params, mean, square), (mean, square, count)


def optimizer_of(problem: Problem, case: Case) -> Optimizer:
    if case.optimizer == "sgd":
        return Optimizer(no_moments, sgd)
    if case.optimizer == "adam":
        return Optimizer(adam_moments, adam)

    def optax_update(params: Tree, grads: Tree, moments: Tree) -> tuple[Tree, Tree]:
        updates, moments = problem.optimizer.update(grads, moments, params)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        return params, moments

    return Optimizer(problem.optimizer.init, optax_update)


def clip_by_global_norm(grads: Tree) -> Tree:
    """Scales the gradients to a norm of at most CLIP_NORM. It reads all of them."""
    squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
    scale = jnp.minimum(1, CLIP_NORM / jnp.sqrt(sum(squares)))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)


def update_name(case: Case) -> str:
    """The same for cases that must move the trainable parameters alike."""
    if not case.clip:
        return case.optimizer
    norm_of = "all" if case.method == "everything" else "trainable"
    return f"{case.optimizer}, clipped by the norm of {norm_of} gradients"


# ---------------------------------------------------------- details of the first half
Arrays = dict[Any, np.ndarray[Any, Any]]  # by key path, on the host
untyped: Any = jax  # for the functions of JAX that have no type annotations
block_until_ready = untyped.block_until_ready


def difference(start: Any, got: Any, wanted: Any) -> str | None:
    """Says how far a parameter is from where it should be after a step, if it is far.

    A hundredth of its largest change is allowed, because GPUs multiply float32 in
    TF32, and four roundings of its largest value.
    """
    eps = float(untyped.numpy.finfo(got.dtype).eps)
    start, got, wanted = np.float32(start), np.float32(got), np.float32(wanted)
    if not np.isfinite(got).all():
        return "has a gradient that is not finite"
    apart = np.abs(got - wanted).max(initial=0)
    change = np.abs(wanted - start).max(initial=0)
    value = np.abs(start).max(initial=0)
    allowed = max(0.01, 8 * eps) * change + 4 * eps * value
    if apart > allowed:
        return f"differs by {apart:.3g}, {allowed:.3g} is allowed"
    return None


def to_host(tree: Tree) -> Arrays:
    """The whole leaves as NumPy arrays by key path, whichever process holds them."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        arrays[path] = np.asarray(leaf)
    return arrays


def from_first_process(value: float) -> float:
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def why_left_out(error: Exception) -> str:
    """The remark for a case that cannot be measured; other errors are raised again."""
    if isinstance(error, ImportError):  # another library
        return f"left out: {error}"
    out_of_memory = r"MemoryError|RESOURCE_EXHAUSTED|out.of.memory"
    # In a cluster the other processes would wait for this one forever.
    if re.search(out_of_memory, repr(error), re.I) and jax.process_count() == 1:
        return "out of memory"
    raise error


def sgd_steps(
    steps: Mapping[Case, Step], builds: Mapping[Case, Build]
) -> dict[Case, Step]:
    """The same cases with SGD, to compare their first steps.

    The first step of Adam is the sign of the gradient, which a rounding error can turn.
    """
    found: dict[Case, Step] = {}
    for case, step in steps.items():
        by_sgd = replace(case, optimizer="sgd")
        if by_sgd == case:
            found[case] = step
        elif by_sgd not in steps:
            found[by_sgd] = builds[case](by_sgd)
    return found


def features_case(case: Case) -> Case:
    return replace(case, method=f"features of {case.method}")


def features_step(gradients: Gradients) -> Step | None:
    """The step that computes hoist's features, and has no state."""
    compute = gradients.features
    if compute is None:
        return None
    return Step(lambda state: (state, compute()), init=lambda: ())


def features_steps(steps: Mapping[Case, Step]) -> dict[Case, Step]:
    found = {}
    for case, step in steps.items():
        if step.features is not None:
            found[features_case(case)] = step.features
    return found


def case_of(table: str, problem: Problem, options: Namespace) -> Case:
    """The case that trains all of a problem on one device."""
    return Case(
        table=table,
        problem=problem.name,
        method="everything",
        optimizer=options.optimizer if problem.optimizer is None else "optax",
        rows=problem.rows * (problem.tokens or 1),
        unit="rows" if problem.tokens is None else "tokens",
    )


def peak_memory_bytes() -> int | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def leaf_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def with_sharding(leaf: Any, sharding: Any) -> Any:
    return untyped.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def tree_bytes(tree: Tree) -> int:
    """The bytes of a tree's arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            sharding = getattr(leaf, "sharding", None)
            shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
            total += math.prod(shape) * leaf.dtype.itemsize
    return total


# ------------------------------------------------------------- the compiler's figures
@dataclass(frozen=True)
class Program:
    """What the compiler says about a step; all figures are for one device."""

    compile_s: float | None = None
    flops: int | None = None  # as XLA counts them, if it counts at least the products
    flops_min: int | None = None  # of the matrix products and convolutions alone
    bytes_min: int | None = None  # arguments read once, what trains written once
    memory_bytes: int | None = None  # all that is resident, and temporaries
    temp_bytes: int | None = None
    unused_bytes: int | None = None  # resident, but not read by the step
    trainable_bytes: int | None = None
    kept_bytes: int | None = None  # what hoist keeps for one batch
    collective_bytes: int | None = None  # results of the collectives
    sent_bytes: int | None = None  # what a ring sends for them


def compile_step(step: Step, devices: int = 1, batches: int = 1) -> Program:
    """Compiles a step and reads what the compiler says about it.

    Args:
        step: a step whose ``fn`` has ``lower``, as jitted functions have.
        devices: how many devices share the work evenly.
        batches: in an epoch, because the features of each stay in memory.
    """
    kept_bytes = tree_bytes(step.args[1]) if step.features is not None else None
    program = Program(trainable_bytes=step.trainable_bytes, kept_bytes=kept_bytes)
    if not hasattr(step.fn, "lower"):
        return program

    arguments = (step.init(), *step.args)
    start = time.perf_counter()
    compiled = step.fn.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    compiled = getattr(compiled, "compiled", compiled)  # Equinox and Flax wrap it
    collective, sent = collective_bytes(compiled.as_text(), devices)
    program = replace(
        program, compile_s=seconds, collective_bytes=collective, sent_bytes=sent
    )

    if hasattr(step.fn, "trace"):
        jaxpr, used = without_dead_code(step.fn.trace(*arguments).jaxpr)
        flops = product_flops(jaxpr) // (step.steps * devices)
        unused = [
            leaf for leaf, read in zip(jax.tree.leaves(arguments), used) if not read
        ]
        program = replace(program, flops_min=flops, unused_bytes=tree_bytes(unused))
    flops = int((compiled.cost_analysis() or {}).get("flops", -1))
    # XLA misses calls of libraries, and all but one iteration of a scan.
    if flops >= (program.flops_min or 0):
        program = replace(program, flops=flops)

    memory = compiled.memory_analysis()
    if memory is None:
        return program
    arguments_bytes, temporary = (
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
    )
    results = memory.output_size_in_bytes
    resident = arguments_bytes + results - memory.alias_size_in_bytes
    resident += program.unused_bytes or 0
    resident += (kept_bytes or 0) * (batches - 1)
    return replace(
        program,
        bytes_min=arguments_bytes // step.steps + (step.written_bytes or 0),
        memory_bytes=resident + temporary,
        temp_bytes=temporary,
    )


def without_dead_code(closed: Any) -> tuple[Any, list[bool]]:
    """Returns the jaxpr of what its results need, and which arguments they need."""
    from jax.interpreters.partial_eval import dce_jaxpr

    jaxpr = closed.jaxpr
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))


def product_flops(jaxpr: Any) -> int:
    """Counts 2 FLOPs per multiplication in matrix products and convolutions."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * eqn.outvars[0].aval.size * depth
        elif name == "conv_general_dilated":
            total += 2 * convolution_products(eqn)
        elif name == "cond":  # the branch with the most work
            total += max(
                product_flops(branch.jaxpr) for branch in eqn.params["branches"]
            )
        else:  # a while loop counts once: its length is not known
            times = eqn.params["length"] if name == "scan" else 1
            for inner in inner_jaxprs(eqn.params):
                total += times * product_flops(inner)
    return total


def inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        inner = getattr(value, "jaxpr", value)  # of a ClosedJaxpr
        if hasattr(inner, "eqns"):
            yield inner


def convolution_products(eqn: Any) -> int:
    """Counts the multiplications of a convolution, those with padding left out."""
    image, kernel = (variable.aval.shape for variable in eqn.invars)
    output = eqn.outvars[0].aval.shape
    image_spec, kernel_spec, output_spec = eqn.params["dimension_numbers"]
    count = output[output_spec[0]] * output[output_spec[1]] * kernel[kernel_spec[1]]
    for axis, (before, _) in enumerate(eqn.params["padding"]):
        stride = eqn.params["window_strides"][axis]
        image_step = eqn.params["lhs_dilation"][axis]
        kernel_step = eqn.params["rhs_dilation"][axis]
        outputs = np.arange(output[output_spec[2 + axis]]) * stride  # (outputs,)
        taps = np.arange(kernel[kernel_spec[2 + axis]]) * kernel_step  # (taps,)
        position = outputs[:, None] + taps - before  # in the dilated image
        last = (image[image_spec[2 + axis]] - 1) * image_step
        inside = (position >= 0) & (position <= last) & (position % image_step == 0)
        count *= int(inside.sum())
    return int(count)


# A result, such as f32[8]{0} or a tuple of them; the operation; its operands.
OPERATION = re.compile(r" = (?P<result>\(.*?\)|\S+) (?P<name>[a-z-]+)\(")
ARRAY = re.compile(r"\b(?:pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]")


def collective_bytes(hlo: str, devices: int) -> tuple[int, int]:
    """Adds up the collectives in a program's text.

    Returns:
        The bytes of their results on one device, and the bytes that one device sends
        for them in a ring. A collective in a loop counts once.
    """
    n = devices
    sent_per_byte = {
        "all-reduce": 2 * (n - 1) / n,
        "all-gather": (n - 1) / n,
        "reduce-scatter": n - 1,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }
    total, sent = 0, 0.0
    channels = set()
    for line in hlo.splitlines():
        operation = OPERATION.search(line)
        if operation is None:
            continue
        # An asynchronous collective has a -start and a -done, whose result is the same.
        name = operation["name"].removesuffix("-done")
        # On TPUs one collective may stand in several fusions, with one channel.
        channel = re.search(r"channel_id=\d+", line)
        if name not in sent_per_byte or (channel and channel[0] in channels):
            continue
        if channel:
            channels.add(channel[0])
        for array in ARRAY.finditer(operation["result"]):
            size = math.prod(int(axis) for axis in array["shape"].split(",") if axis)
            size = size * int(array["bits"] or 8) // 8  # a pred takes a byte
            total += size
            sent += size * sent_per_byte[name]
    return total, round(sent)


# -------------------------------------------------------------------- several devices
def place(
    problem: Problem,
    devices: Sequence[jax.Device],
    sharded: bool = False,
    abstract: bool = False,
) -> Problem:
    """Puts a problem on devices, with a batch of its own size for each of them.

    Args:
        problem: with arrays or shapes.
        devices: they share the rows of the batch.
        sharded: whether they share each parameter, too, by the first axis that they
            divide evenly. Otherwise each device holds all parameters.
        abstract: whether the result has shapes in the place of arrays.
    """
    mesh = Mesh(np.array(devices), ("data",))
    count = len(devices)

    def sharding(leaf: Any) -> NamedSharding:
        axes = [
            axis for axis, size in enumerate(leaf.shape) if size and size % count == 0
        ]
        if not sharded or not axes:
            return NamedSharding(mesh, untyped.sharding.PartitionSpec())
        before = [None] * axes[0]
        return NamedSharding(mesh, untyped.sharding.PartitionSpec(*before, "data"))

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if abstract:
            return with_sharding(leaf, sharding)
        return jax.device_put(leaf, sharding)

    def put_batch(leaf: Any) -> Any:
        if leaf.shape[:1] != (problem.rows,):  # for instance a random key
            return put(leaf, NamedSharding(mesh, untyped.sharding.PartitionSpec()))
        if abstract:
            shape = (count * problem.rows, *leaf.shape[1:])
            leaf = untyped.ShapeDtypeStruct(shape, leaf.dtype)
        elif count > 1:
            leaf = jnp.concatenate([leaf] * count)
        return put(leaf, NamedSharding(mesh, untyped.sharding.PartitionSpec("data")))

    params = jax.tree.map(lambda leaf: put(leaf, sharding(leaf)), problem.params)
    batch = jax.tree.map(put_batch, problem.batch)
    placed = replace(problem, params=params, batch=batch)
    return replace(placed, sharding=sharding, abstract=abstract)


def devices_table(options: Namespace, problems: Sequence[Problem]) -> Iterator[Table]:
    """One data-parallel step of the last problem, on several devices."""
    problem, devices = problems[-1], usable_devices(options)
    processes = jax.process_count()
    counts = options.devices
    if counts is None and options.topology:
        counts = [len(devices)]
    elif counts is None and options.compile_only:
        counts = [1, 2, 4, 8]
    elif counts is None:
        powers = [processes * 2**i for i in range(20)]
        counts = [count for count in powers if 1 < count <= len(devices)]

    title = describe(problem)
    simulated: dict[Case, Build] = {}
    for count in counts:
        # Several devices of one CPU share its cores: their times would mean nothing.
        on_one_cpu = devices[0].platform == "cpu" and count > processes
        if options.compile_only or on_one_cpu:
            simulated |= device_cases(problem, devices[:count], options, simulated=True)
        else:
            cases = device_cases(problem, jax.local_devices()[:1], options)
            if count > 1:
                cases |= device_cases(problem, devices[:count], options)
            yield Table(title, measure(cases, options))
    if simulated:
        compiled_for = options.topology or devices[0].platform
        title += f"\nas compiled for {compiled_for}, not run"
        yield Table(title, measure(simulated, options))
    if options.devices is None and not options.compile_only and processes == 1:
        yield simulated_elsewhere(problem, options)


def device_cases(
    problem: Problem,
    devices: Sequence[jax.Device],
    options: Namespace,
    simulated: bool = False,
) -> dict[Case, Build]:
    """Training everything and a part on some devices, replicated and sharded."""
    count, kind = len(devices), devices[0].platform
    case = case_of("devices", problem, options)
    case = replace(case, devices=count, platform=kind, rows=case.rows * count)
    layouts = ["replicated"]
    # XLA for CPUs all-reduces gradients that it reduce-scatters for GPUs and TPUs.
    if count > 1 and not (simulated and kind == "cpu"):
        layouts.append("sharded")

    builds: dict[Case, Build] = {}
    for layout in layouts:
        placed = place(problem, devices, layout == "sharded", abstract=simulated)
        for method in ("everything", "partition"):
            row = replace(case, method=method, layout=layout, simulated=simulated)
            builds[row] = partial(build_step, placed)
    return builds


def usable_devices(options: Namespace) -> list[jax.Device]:
    """The devices, in an order in which the processes take turns."""
    if options.topology:
        return topology_devices(options.topology)
    by_process: list[list[jax.Device]] = [[] for _ in range(jax.process_count())]
    for device in jax.devices():
        by_process[device.process_index].append(device)
    return [device for turn in zip(*by_process) for device in turn]


def topology_devices(name: str) -> list[jax.Device]:
    """The chips of a TPU pod that need not exist, for the compiler."""
    from jax.experimental import topologies

    # Without these libtpu looks for TPUs, and says at length that there are none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        if "not installed" in str(error):
            command = 'uv run --with "jax[tpu]" bench.py ...'
            raise ValueError(f"--topology needs the TPU compiler: {command}") from error
        names = "v5e:2x4, v5e:16x16, v6e:16x16 or v5p:4x4x4"
        raise ValueError(
            f"--topology {name}: {error}; use for example {names}"
        ) from error
    return list(found.devices)


def simulated_elsewhere(problem: Problem, options: Namespace) -> Table:
    """Compiles for 8 CPU devices in a new process: in this one JAX has counted them."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "devices.json")
        command = [sys.executable, __file__, *problem_options(options)]
        command += ["--compile-only", "--devices", "8", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"the simulation of 8 devices failed: {said[-1]}")
        rows = json.loads(file.read_text("utf-8"))["rows"]
    title = f"{describe(problem)}\nas compiled for cpu, not run"
    return Table(title, [result_from(row) for row in rows])


def problem_options(options: Namespace) -> list[str]:
    """The options that define the problem, as they were typed."""
    typed = ["--optimizer", options.optimizer, "--dtype", options.dtype]
    for name in ("model", "batch"):
        if getattr(options, name) is not None:
            typed += [f"--{name}", str(getattr(options, name))]
    for name in ("sizes", "train", "freeze"):
        if getattr(options, name):
            typed += [f"--{name}", *map(str, getattr(options, name))]
    return typed


# ------------------------------------------------------------------- the other tables
def prefix_table(options: Namespace, problems: Sequence[Problem]) -> Iterator[Table]:
    """One step with the first n layers frozen, for each n."""
    problem = place(problems[-1], jax.local_devices()[:1])
    case = case_of("prefix", problem, options)
    layers = [f"linear_{i}" for i in range(len(problem.sizes) - 1)]
    all_train = replace(problem, where=layers)
    first = replace(case, problem=f"{problem.name}, 0 frozen")
    builds: dict[Case, Build] = {first: partial(build_step, all_train)}
    for frozen in range(1, len(layers)):
        rest_trains = replace(problem, where=layers[frozen:])
        named = replace(case, problem=f"{problem.name}, {frozen} frozen")
        for method in ("partition", "hoist"):
            build = partial(build_step, rest_trains)
            builds[replace(named, method=method)] = build
    title = f"{problem.name}: freeze the first layers of {sizes_text(problem.sizes)}"
    yield Table(title, measure(builds, options))


def run_table(options: Namespace, problems: Sequence[Problem]) -> Iterator[Table]:
    """A step of minifreeze's walk-through, in a loop and in a scan."""
    steps = RUN_STEPS
    sizes, rows, where = MLPS["seed"]
    problem = mlp("seed", sizes, rows, where, options.dtype)
    trainable, frozen = mf.partition(where, problem.params)
    xs, ys = mf.dataset(jax.random.key(1), steps, rows)
    xs = xs.astype(options.dtype)

    def build(case: Case) -> Step:
        step = Step(
            fn=jax.jit(mf.train_step, donate_argnums=0),
            init=lambda: jax.tree.map(jnp.copy, trainable),
            args=(frozen, xs[0], ys[0]),
            trainable_bytes=tree_bytes(trainable),
            written_bytes=tree_bytes(trainable),
        )
        if case.method == "loop":
            return step
        fn = jax.jit(mf.train, donate_argnums=0)
        one_batch = replace(step, fn=fn, args=(frozen, xs[:1], ys[:1]))
        check_same_step({replace(case, method="loop"): step, case: one_batch})
        # It may not be compared with the loop: it takes many steps at once.
        all_batches = replace(one_batch, args=(frozen, xs, ys), steps=steps)
        return replace(all_batches, update="scan")

    case = case_of("run", problem, options)
    builds = {replace(case, method=method): build for method in ("loop", "scan")}
    title = f"seed: a step of the {steps} in minifreeze's walk-through"
    yield Table(title, measure(builds, options))


def peers_table(options: Namespace, problems: Sequence[Problem]) -> Iterator[Table]:
    """The same step in other libraries."""
    sys.modules["bench"] = sys.modules[__name__]  # which peers.py imports
    peers = runpy.run_path(str(PEERS))
    yield from peers["peers_table"](options, problems)


RUN_STEPS = 10_000  # in the walk-through
PEERS = Path(__file__).parent / ".ci" / "peers.py"
TABLES: dict[str, Callable[[Namespace, Sequence[Problem]], Iterator[Table]]] = {
    "methods": methods_table,
    "prefix": prefix_table,
    "run": run_table,
    "devices": devices_table,
    "peers": peers_table,
}


# --------------------------------------------------------------------- your own model
def load_model(options: Namespace) -> Problem:
    """Calls the function that --model names, and checks what it returns."""
    file, _, name = options.model.rpartition(":")
    sys.path.insert(0, str(Path(file).parent.resolve()))
    try:
        module = runpy.run_path(file)
        if name not in module:
            raise ValueError(f"{file} has no {name}()")
        made = module[name]()
    except ModuleNotFoundError as error:
        command = f"uv run --with {error.name} bench.py ..."
        raise ValueError(f"{options.model}: {error}; {command}") from error
    except SystemExit as error:
        raise ValueError(f"{options.model} called sys.exit({error.code})") from error
    if not isinstance(made, tuple) or len(made) not in (3, 4):
        expected = "(loss_fn, params, batch) or (loss_fn, params, batch, optimizer)"
        raise ValueError(f"{options.model} must return {expected}")

    loss, params, batch = made[:3]
    params = arrays_of("parameter", params)
    batch = arrays_of("batch", tuple(batch))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = leaf_name(path)
            raise ValueError(
                f"parameter {name!r} is {leaf.dtype} and has no gradient: close over it"
            )
    jax.eval_shape(jax.grad(loss), params, *batch)
    rows, tokens = count_rows(batch, options.batch)
    return Problem(
        Path(file).stem,
        options.where,
        loss,
        params,
        batch,
        rows,
        tokens,
        optimizer=made[3] if len(made) == 4 else None,
    )


def arrays_of(what: str, tree: Tree) -> Tree:
    """The tree with each leaf as a JAX array; raises ValueError for other leaves."""

    def as_array(path: Any, leaf: Any) -> jax.Array:
        try:
            return jnp.asarray(leaf)
        except TypeError as error:
            message = (
                f"{what} {leaf_name(path)!r} is a {type(leaf).__name__}, not an array"
            )
            raise ValueError(message) from error

    return jax.tree_util.tree_map_with_path(as_array, tree)


def count_rows(batch: Tree, given: int | None) -> tuple[int, int | None]:
    """Finds the rows of a batch: the first axis that all its data leaves share.

    Returns:
        The rows, and the tokens per row if all data are token ids (rows, length).
    """
    data = []
    for leaf in jax.tree.leaves(batch):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if leaf.ndim > 0 and not is_key:
            data.append(leaf)
    if given is not None:
        data = [leaf for leaf in data if leaf.shape[0] == given]
    lengths = sorted({leaf.shape[0] for leaf in data})
    if len(lengths) != 1:
        found = f"the leaves of the batch have first axes {lengths}"
        if given is not None:
            found = f"no leaf of the batch has a first axis of {given}"
        raise ValueError(f"{found}: say with --batch N how many rows it has")
    tokens = data[0].shape[1] if data[0].ndim == 2 else None
    for leaf in data:
        same_shape = leaf.shape == data[0].shape
        if not same_shape or not jnp.issubdtype(leaf.dtype, jnp.integer):
            tokens = None
    return lengths[0], tokens


# ---------------------------------------------------------------------------- options
def parse(argv: Sequence[str] | None) -> Namespace:
    """Reads the command line. A wrong option ends the process with code 2."""
    parser = ArgumentParser(
        "bench.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    names = [name for name in TABLES if name != "peers"]
    add("--tables", nargs="+", choices=names, metavar="TABLE", help=", ".join(names))
    add("--peers", action="store_true", help="compare with other libraries")
    add(
        "--sizes", nargs="+", type=int, metavar="N", help="widths of an MLP of your own"
    )
    add("--batch", type=int, metavar="N", help="rows per batch and device")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--train", nargs="+", metavar="PATTERN", help="train these leaves"
    )
    which.add_argument("--freeze", nargs="+", metavar="PATTERN", help="freeze these")
    add("--optimizer", choices=("sgd", "adam"), default="sgd", help="default: sgd")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the MLPs",
    )
    add(
        "--model",
        metavar="FILE.py:NAME",
        help="NAME() returns (loss_fn, params, batch)",
    )
    add(
        "--rounds",
        type=int,
        default=7,
        metavar="N",
        help="samples per row (default: 7)",
    )
    add("--batches", type=int, default=1, metavar="N", help="batches in an epoch")
    add("--devices", nargs="+", type=int, metavar="N", help="numbers of devices")
    add("--compile-only", action="store_true", help="simulate devices, time nothing")
    add(
        "--topology", metavar="NAME", help="a TPU pod to compile for, such as v5e:16x16"
    )
    add(
        "--cluster", action="store_true", help="join a SLURM, TPU or Kubernetes cluster"
    )
    add(
        "--coordinator", metavar="HOST:PORT", help="join a cluster by its first process"
    )
    add("--processes", type=int, metavar="N", help="how many the cluster has")
    add("--process", type=int, metavar="I", help="the number of this one, from 0")
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--plot", type=Path, metavar="FILE", help="draw the prefix and methods tables")
    # argparse would print its usage as well, which is longer than the error.
    parser.error = partial(refuse, parser)  # type: ignore[method-assign, assignment]
    options = parser.parse_args(argv)

    options.where = options.train or [inverted(glob) for glob in options.freeze or []]
    named = (options.coordinator, options.processes, options.process)
    options.cluster = options.cluster or any(value is not None for value in named)
    options.tables = chosen_tables(options)
    for file in ("json", "plot"):  # a model may change the working directory
        if getattr(options, file) is not None:
            setattr(options, file, getattr(options, file).absolute())
    check_options(options, parser.error)
    return options


def refuse(parser: ArgumentParser, message: str) -> None:
    parser.exit(2, f"bench.py: error: {message}\n")


def inverted(pattern: str) -> str:
    """Turns a pattern for --freeze into one for --train: "a" into "!a" and back."""
    return pattern[1:] if pattern.startswith("!") else f"!{pattern}"


def chosen_tables(options: Namespace) -> list[str]:
    """The tables that are named; if none is, those on which all given options act."""
    tables = ["methods", "prefix", "run", "devices"]
    if options.tables:
        tables = [table for table in tables if table in options.tables]
    elif options.compile_only or options.cluster or options.devices:
        tables = ["devices"]
    elif options.model:
        tables = ["methods"]
    elif options.peers and not options.sizes:
        tables = tables
    elif options.where:
        tables = ["methods", "devices"]
    elif options.sizes or options.batch or options.optimizer != "sgd":
        tables = ["methods", "prefix", "devices"]
    return tables + ["peers"] * options.peers


def check_options(options: Namespace, error: Callable[[str], Any]) -> None:
    """Calls error() for options that are wrong or do not go together."""
    if untyped.config.jax_disable_jit:
        error("JAX_DISABLE_JIT is set, so nothing would be compiled")

    sizes, counts = options.sizes or [], options.devices or []
    numbers = [options.batch, options.rounds, options.batches, options.processes]
    for number in [*sizes, *counts, *numbers]:
        if number is not None and not 0 < number < 2**31:
            error(f"numbers must be positive and below 2**31, not {number}")
    if sizes and len(sizes) < 2:
        error("--sizes needs the widths of two layers or more")
    if len(set(counts)) < len(counts):
        error(f"--devices names a number twice: {counts}")

    _, _, port = (options.coordinator or "host:1").rpartition(":")
    if not port.isdecimal() or int(port) >= 2**16:
        error(f"--coordinator must be HOST:PORT, not {options.coordinator}")
    named = (options.coordinator, options.processes, options.process)
    if any(value is None for value in named) and any(
        value is not None for value in named
    ):
        error("--coordinator, --processes and --process go together")

    if options.model and not options.where:
        error("--model needs --train or --freeze")
    if options.model and ":" not in options.model:
        error(f"--model must be FILE.py:NAME, not {options.model}")
    if options.model and "prefix" in options.tables:
        error("the prefix table freezes layers of an MLP: it does not go with --model")
    if options.topology and not options.compile_only:
        error("--topology is for chips that are not there: add --compile-only")
    if options.topology and options.devices:
        error("--topology has all chips of the pod: leave out --devices")
    if options.compile_only and options.cluster:
        error(
            "--compile-only simulates all devices in one process: leave out the cluster"
        )
    if options.compile_only and options.tables != ["devices"]:
        error("--compile-only goes with the devices table alone")
    if options.plot and not {"methods", "prefix"} & set(options.tables):
        error("--plot draws the methods and prefix tables, and neither is measured")

    files = [
        file.resolve() for file in (options.json, options.plot) if file is not None
    ]
    if len(set(files)) < len(files):
        error(f"--json and --plot must not be the same file: {files[0]}")
    for file in files:
        if file.exists() and not file.is_file():
            error(f"--json and --plot must be regular files, which {file} is not")


def options_without_effect(options: Namespace) -> Iterator[str]:
    if options.model and (options.sizes or options.dtype != "float32"):
        yield "--sizes and --dtype have no effect with --model."
    if options.compile_only and options.rounds != 7:
        yield "--rounds has no effect with --compile-only."
    if options.devices and "devices" not in options.tables:
        yield "--devices has no effect without the devices table."
    if "prefix" in options.tables and options.where:
        yield "--train and --freeze have no effect on the prefix table."
    if "run" in options.tables:
        changed = (options.sizes, options.batch, options.where, options.model)
        if any(changed) or options.optimizer != "sgd":
            yield "The run table is always of the walk-through's network and of SGD."


def set_up(options: Namespace) -> list[Problem]:
    """Joins the cluster, checks devices and files, and returns the problems.

    Raises ValueError in all processes if one of them refuses or has other options.
    """
    if options.compile_only:
        untyped.config.update("jax_platforms", "cpu")
        if not options.topology:
            most = max(options.devices or [8])
            untyped.config.update("jax_num_cpu_devices", most)
    if options.cluster:
        join_cluster(options)

    problems: list[Problem] = []
    refused = ""
    try:
        check_devices(options)
        check_files(options)
        problems = load_problems(options)
    except Exception as error:
        refused = str(error).partition("\n")[0] or type(error).__name__
        if jax.process_count() == 1:
            raise ValueError(refused) from error
    agree_in_cluster(refused, options)
    jax.jit(jnp.sin).lower(1.0).compile()  # XLA's own start is not to be in a row
    return problems


def check_devices(options: Namespace) -> None:
    found, processes = len(usable_devices(options)), jax.process_count()
    for count in options.devices or []:
        if count > found or count % processes:
            raise ValueError(
                f"--devices {count}: there are {found} in {processes} processes, and "
                "each must have as many; --compile-only simulates more"
            )


def load_problems(options: Namespace) -> list[Problem]:
    """Your own model, or an MLP of the sizes given, or the built-in MLPs."""
    if options.model:
        problems = [load_model(options)]
    else:
        chosen = MLPS
        if options.sizes:
            last_layer = f"linear_{len(options.sizes) - 2}"
            chosen = {"mlp": (tuple(options.sizes), 64, [last_layer])}
        problems = []
        for name, (sizes, rows, where) in chosen.items():
            rows = options.batch or rows
            where = options.where or where
            abstract = options.compile_only
            problems.append(mlp(name, sizes, rows, where, options.dtype, abstract))
    for problem in problems:
        try:
            mf.partition(problem.where, problem.params)
        except ValueError as error:
            raise ValueError(f"{problem.name}: {error}") from error
    return problems


def join_cluster(options: Namespace) -> None:
    """Makes this process one of a cluster. Only the first one prints and writes."""
    untyped.config.update("jax_cpu_collectives_implementation", "gloo")
    if options.process == 0 and options.coordinator:
        _, _, port = options.coordinator.rpartition(":")
        try:  # JAX would crash on a port in use
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(f"--coordinator {options.coordinator}: {error}") from error
    named = (options.coordinator, options.processes, options.process)
    jax.distributed.initialize(*named, initialization_timeout=60)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # JAX took it
    if jax.process_index() != 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def agree_in_cluster(refused: str, options: Namespace) -> None:
    """Raises ValueError in all processes if one refuses or has other options.

    multihost_utils.assert_equal would do, but on jax 0.5.1 process 0 passes it.
    """
    own = {"json": None, "plot": None, "process": None}
    shared = vars(options) | own
    mark = zlib.crc32(f"{refused}{shared}".encode())
    marks = multihost_utils.process_allgather(np.uint32(mark)).reshape(-1)
    others = np.flatnonzero(marks != marks[0])
    if refused:
        raise ValueError(refused)
    if others.size:
        raise ValueError(
            f"processes {others} refuse or have other options than process 0; "
            f"the options of this one: {shared}"
        )


# ----------------------------------------------------------------------------- output
say = partial(print, flush=True)


class Interrupts:
    """Makes Ctrl-C and SIGTERM raise KeyboardInterrupt until held; then notes them."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.held = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        self.received = number
        if not self.held:
            raise KeyboardInterrupt

    def hold(self) -> None:
        self.held = True


class Report:
    """What a run has measured so far, and how it ended."""

    def __init__(self) -> None:
        self.options = Namespace(json=None, plot=None)
        self.card: dict[str, Any] = {}
        self.tables: list[list[Row]] = []
        self.ended = ""
        self.code = 0

    def fail(self, error: Exception) -> None:
        """Notes an error: code 2 if nothing could be measured, else 1."""
        self.ended = f"error: {error}"
        self.code = self.code or (1 if self.card else 2)
        expected = isinstance(error, (OSError, FloatingPointError))
        if self.card and not expected:
            sys.excepthook(type(error), error, error.__traceback__)


def finish(report: Report) -> None:
    """Writes the files and prints the answer, if anything was measured."""
    try:
        if report.tables and jax.process_index() == 0:
            write_files(report)
            say()
            say(answer(report.tables))
    except OSError as error:
        report.fail(error)


def leave(report: Report, interrupts: Interrupts) -> None:
    """Ends the process: 0, 1 or 2, or as a shell would report the signal."""
    code = report.code
    if interrupts.received is not None:
        code = 128 + interrupts.received
    if code:
        first_line = report.ended.partition("\n")[0]
        with suppress(OSError):
            say(f"bench.py: {first_line}", file=sys.stderr)
    if code in (0, 2):
        sys.exit(code)
    os._exit(code)  # Python's end, or JAX's farewell to a cluster, could hang


# ------------------------------------------------------------------------ the machine
def describe_machine(options: Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    devices = usable_devices(options)
    peak_flops, peak_bytes_per_s = None, None
    if not options.compile_only:
        peak_flops, peak_bytes_per_s = measure_peaks(options.dtype)
    return {
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "processes": jax.process_count(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "dtype": options.dtype,
        "peak_flops": peak_flops,
        "peak_bytes_per_s": peak_bytes_per_s,
        "commit": git("rev-parse", "HEAD"),
        "clean": git("status", "--porcelain") == "",
    }


def measure_peaks(dtype: str) -> tuple[float, float]:
    """Measures the FLOPs and the bytes per second that one device can do."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    vector_bytes = PEAK_VECTOR_BYTES

    def multiply(state: tuple[()], a: jax.Array) -> tuple[tuple[()], jax.Array]:
        return state, a @ a

    def increment(vector: jax.Array) -> tuple[jax.Array, None]:
        return vector + 1, None

    product = Case("peak", "", "matrix product")
    stream = Case("peak", "", "vector increment")
    steps = {
        product: Step(jax.jit(multiply), init=lambda: (), args=(matrix,)),
        stream: Step(
            jax.jit(increment, donate_argnums=0),
            init=lambda: jnp.zeros(vector_bytes // 4, jnp.float32),
        ),
    }
    timings = time_rounds(steps, rounds=5)
    flops = 2 * side**3 / min(timings[product].samples)
    bytes_per_s = 2 * vector_bytes / min(timings[stream].samples)  # read and written
    return flops, bytes_per_s


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*: (.+)", info.read_text())
        if found is not None:
            return found[1]
    return platform.processor()


def git(*arguments: str) -> str | None:
    """What git says about this file's repository; None without git or a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# -------------------------------------------------------------------- results as rows
KEYS = """table problem method clip optimizer platform devices layout simulated
    rows unit step_s spread_s samples speedup differs rows_per_s efficiency limit_share
    once_s break_even kept_bytes compile_s flops flops_min bytes_min memory_bytes
    temp_bytes unused_bytes peak_memory_bytes trainable_bytes collective_bytes
    sent_bytes remark""".split()
Row = dict[str, Any]  # of the JSON file; a figure that is not known is None


def rows_of(results: Sequence[Result], card: Mapping[str, Any]) -> list[Row]:
    """The results of one table as rows of the JSON file."""
    rows = []
    for result in results:
        row = dict.fromkeys(KEYS) | asdict(result.case) | asdict(result.program)
        row["samples"] = []
        row["peak_memory_bytes"] = result.peak_memory_bytes
        row["remark"] = result.remark
        if nothing_to_hoist(result, results):
            row["remark"] = NOTHING_TO_HOIST
        if result.timing is not None:
            row |= time_figures(result, result.timing, results)
            row["limit_share"] = limit_share(result, result.timing, card)
        rows.append(row)

    timed = [row for row in rows if row["step_s"] is not None]
    if any(row["limit_share"] is None for row in timed):  # all rows of a table or none
        for row in timed:
            row["limit_share"] = None
    return rows


def result_from(row: Row) -> Result:
    """The result of a row that was not timed."""
    case = Case(**{part.name: row[part.name] for part in fields(Case)})
    program = Program(**{part.name: row[part.name] for part in fields(Program)})
    return Result(case, program, remark=row["remark"])


def time_figures(result: Result, timing: Timing, results: Sequence[Result]) -> Row:
    """What the samples say, also beside those of the other results of the table."""
    case = result.case
    figures: Row = {
        "step_s": timing.median,
        "spread_s": timing.spread,
        "samples": list(timing.samples),
        "rows_per_s": case.rows / timing.median,
    }
    base = baseline(case, results)
    if base is not None:
        figures["speedup"] = base.median / timing.median
        figures["differs"] = base is timing or not timing.overlaps(base)

    rows_alone = case.rows // case.devices
    alone = timing_of(results, replace(case, devices=1, rows=rows_alone))
    if alone is not None and case.devices > 1 and case.layout == "replicated":
        figures["efficiency"] = alone.median / timing.median

    if result.once is not None:
        figures["once_s"] = result.once.median
        part = timing_of(results, replace(case, method="partition"))
        useless = nothing_to_hoist(result, results)
        if part is not None and not useless and not timing.overlaps(part):
            saved = part.median - timing.median
            if saved > 0:
                figures["break_even"] = result.once.median / saved  # epochs
    return figures


def baseline(case: Case, results: Sequence[Result]) -> Timing | None:
    """The timing of the case that trains everything in the same way and place."""
    for result in results:
        other = result.case
        same_update = (other.clip, other.optimizer) == (case.clip, case.optimizer)
        same_place = (other.devices, other.layout) == (case.devices, case.layout)
        if other.method == "everything" and same_update and same_place:
            return result.timing
    return None


def timing_of(results: Sequence[Result], case: Case) -> Timing | None:
    for result in results:
        if result.case == case:
            return result.timing
    return None


def nothing_to_hoist(result: Result, results: Sequence[Result]) -> bool:
    """Whether hoist said so, or its step computes as much as partition's."""
    if result.remark == NOTHING_TO_HOIST:
        return True
    for other in results:
        if other.case == replace(result.case, method="partition"):
            own, its = result.program, other.program
            same_products = (own.flops_min or 0) >= (its.flops_min or 0)
            same_flops = (own.flops or 0) >= 0.99 * (its.flops or 0)
            return result.case.method == "hoist" and same_products and same_flops
    return False


def limit_share(
    result: Result, timing: Timing, card: Mapping[str, Any]
) -> float | None:
    """The part of a step's time that its least FLOPs or bytes take at the peak."""
    program = result.program
    if program.flops_min is None or program.bytes_min is None:
        return None
    computing: float = program.flops_min / card["peak_flops"]
    moving: float = program.bytes_min / card["peak_bytes_per_s"]
    return max(computing, moving) / timing.median


# ------------------------------------------------------------------------------- text
WIDTH = 100
NO_DIFFERENCE = "no difference seen"


def table_text(title: str, rows: Sequence[Row]) -> str:
    """A title, the columns in which there is something, and notes."""
    timed = any(row["step_s"] for row in rows)
    on_devices = rows[0]["layout"] is not None
    columns = {"method": [label(row) for row in rows]}
    if on_devices:
        columns["devices"] = [str(row["devices"]) for row in rows]
        columns["layout"] = [row["layout"] for row in rows]
    columns |= time_column(rows)
    columns["speed-up"] = [speedup_text(row) for row in rows]
    columns |= number_column("memory", "B", [row["memory_bytes"] for row in rows])
    if on_devices:
        columns |= number_column("sent", "B", [row["sent_bytes"] for row in rows])
        columns["efficiency"] = [percent(row["efficiency"]) for row in rows]
    if not (on_devices and timed):  # for all of them a line is too short
        columns["limit"] = [percent(row["limit_share"]) for row in rows]
        columns |= number_column("", "FLOP", [row["flops"] for row in rows])
        per_s = [row["rows_per_s"] for row in rows]
        columns |= number_column(f"{rows[0]['unit']}/s", "", per_s)

    lines = ["", title]
    lines += aligned({name: cells for name, cells in columns.items() if any(cells)})
    for row in rows:
        lines += notes(row)
    return "\n".join(lines)


def label(row: Row) -> str:
    """The method, and what is special about the row."""
    words = [row["method"]]
    _, comma, frozen = row["problem"].partition(", ")
    if comma:
        words.append(frozen)
    if row["clip"] and "clip" not in row["method"]:
        words.append("clipped")
    if row["optimizer"] != "sgd":
        words.append(row["optimizer"].replace("adam", "Adam"))
    return ", ".join(words)


def full_name(case: Case) -> str:
    text = f"{case.problem}, {label(asdict(case))}"
    if case.layout is not None:
        text += f", {case.devices} x {case.platform}, {case.layout}"
    return text


def time_column(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Medians with three digits, spreads with as many decimals: 24.3 ± 0.3."""
    medians = [row["step_s"] for row in rows]
    scale, prefix = si_prefix(medians)
    cells = []
    for row in rows:
        if row["step_s"] is None:
            cells.append("")
            continue
        median = three_digits(row["step_s"] / scale)
        decimals = len(median.partition(".")[2])
        cells.append(f"{median} ± {row['spread_s'] / scale:.{decimals}f}")
    return {f"{prefix}s per step": cells}


def number_column(
    title: str, unit: str, values: Sequence[float | None]
) -> dict[str, list[str]]:
    """A column of plain numbers, with their unit in its title."""
    scale, prefix = si_prefix(values)
    cells = []
    for value in values:
        cells.append("" if value is None else three_digits(value / scale))
    return {f"{title} {prefix}{unit}".strip(): cells}


def speedup_text(row: Row) -> str:
    if row["speedup"] is None:
        return ""
    return times(row["speedup"]) if row["differs"] else NO_DIFFERENCE


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if 0.95 <= ratio < 9.95 else f"{three_digits(ratio)}x"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def quantity(value: float | None, unit: str) -> str:
    """Three digits with an SI prefix: 1.23 ms, 45.6 MB. Nothing for None."""
    if value is None:
        return ""
    scale, prefix = si_prefix([value])
    return f"{three_digits(value / scale)} {prefix}{unit}".rstrip()


SI_PREFIXES = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1.0: ""}
SI_PREFIXES |= {1e-3: "m", 1e-6: "µ", 1e-9: "n"}


def si_prefix(values: Sequence[float | None]) -> tuple[float, str]:
    """The factor and the prefix that suit the largest value."""
    largest = max([value for value in values if value is not None], default=0)
    rounded = float(f"{largest:.2e}")  # 999.9 is 1.00 k
    for scale, prefix in SI_PREFIXES.items():
        if rounded >= scale:
            return scale, prefix
    return 1.0, ""


def three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:.0f}"


def aligned(columns: Mapping[str, list[str]]) -> list[str]:
    """The lines of a table: texts to the left, numbers to the right."""
    padded = []
    for title, cells in columns.items():
        column = [title, *cells]
        width = max(len(cell) for cell in column)
        if title in ("method", "layout"):
            padded.append([cell.ljust(width) for cell in column])
        else:
            padded.append([cell.rjust(width) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*padded)]


def notes(row: Row) -> list[str]:
    """What a row has no columns for."""
    texts = [] if row["remark"] is None else [row["remark"]]
    if row["once_s"] is not None and row["remark"] != NOTHING_TO_HOIST:
        costs = [row["step_s"] + row["once_s"] / epochs for epochs in (1, 3, 10)]
        over = ", ".join(quantity(cost, "s") for cost in costs)
        texts.append(f"with the features {over} per step over 1, 3, 10 epochs")
        if row["break_even"] is not None:
            texts.append(f"pays after {row['break_even']:.1f} epochs")
        texts.append(f"keeps {quantity(row['kept_bytes'], 'B')} per batch")
        if row["unused_bytes"]:
            unused = quantity(row["unused_bytes"], "B")
            texts.append(f"{unused} of frozen weights may then be dropped")
    if not texts:
        return []
    line = f"{label(row)}: {'; '.join(texts)}."
    return textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")


def describe(problem: Problem) -> str:
    """A table's title; for your own model with a list of its parameters."""
    where = "the leaves of a predicate"
    if isinstance(problem.where, str):
        where = problem.where
    elif isinstance(problem.where, Sequence):
        where = " ".join(problem.where)
    text = f"{problem.name}: train {where}"
    if problem.sizes:
        text += f" of {sizes_text(problem.sizes)}"
    text += f", batch {problem.rows}"
    if problem.tokens is not None:
        text += f" x {problem.tokens} tokens"
    if not problem.sizes:
        trainable, frozen = mf.partition(problem.where, problem.params)
        text += f"\n\n{mf.summary(trainable=trainable, frozen=frozen)}\n"
    return text


def sizes_text(sizes: Sequence[int]) -> str:
    """[1024, 2048 x 4, 10]"""
    texts = []
    for size, group in itertools.groupby(sizes):
        count = len(list(group))
        texts.append(f"{size} x {count}" if count > 1 else f"{size}")
    return f"[{', '.join(texts)}]"


def card_text(card: Mapping[str, Any]) -> str:
    text = (
        f"{card['date']}: jax {card['jax']}, jaxlib {card['jaxlib']}, "
        f"numpy {card['numpy']}, Python {card['python']}; {card['device_count']} x "
        f"{card['device_kind']} ({card['platform']}); {card['cpu']}; {card['dtype']}"
    )
    if card["peak_flops"] is not None:
        flops = quantity(card["peak_flops"], "FLOP/s")
        text += f"; peak {flops}, {quantity(card['peak_bytes_per_s'], 'B/s')}"
    if card["commit"] is not None:
        changes = "" if card["clean"] else " with changes"
        text += f"; commit {card['commit'][:10]}{changes}"
    return textwrap.fill(text, WIDTH)


def legend(options: Namespace) -> str:
    """Explains the columns, once."""
    lines = []
    if not options.compile_only:
        lines.append(
            "Times are median ± median absolute deviation. Speed-ups are against "
            f'everything in the same table, or "{NO_DIFFERENCE}" where these intervals '
            "overlap. Limit: the share of the time that the products, or reading "
            "all arguments and writing what trains, take at the peak."
        )
    lines.append(
        "Memory is that of one device: parameters, moments, batch, results, temporary "
        "arrays, and hoist's features for an epoch."
    )
    if "devices" in options.tables:
        lines.append(
            "Sent is what each device sends in a ring, by the compiled program. (XLA "
            "for CPUs sums bfloat16 in float32, so it sends twice as much as on TPUs.)"
        )
    lines += options_without_effect(options)
    return "\n".join(textwrap.fill(line, WIDTH) for line in lines)


def answer(tables: Sequence[Sequence[Row]]) -> str:
    """What the run says, in one or two sentences."""
    lines = []
    methods = [rows for rows in tables if rows[0]["table"] == "methods"]
    if methods:
        lines.append(answer_methods(methods[-1]))
    devices = [rows for rows in tables if rows[0]["table"] == "devices"]
    if devices:
        lines.append(answer_devices(devices[-1]))
    return "\n".join(textwrap.fill(line, WIDTH) for line in lines)


def find(rows: Sequence[Row], **wanted: Any) -> Row:
    """The first row with these values; a row without values if there is none."""
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row
    return dict.fromkeys(KEYS)


def answer_methods(rows: Sequence[Row]) -> str:
    optimizer, problem = rows[0]["optimizer"], rows[0]["problem"]
    plain = find(rows, method="partition", optimizer=optimizer, clip=False)
    if plain["speedup"] is None:
        return f"{problem}: everything and partition could not both be timed."
    if plain["differs"]:
        text = (
            f"{problem}: partition is {times(plain['speedup'])} as fast as everything"
        )
    else:
        text = f"{problem}: {NO_DIFFERENCE} between partition and everything"

    whole = find(rows, method="everything", optimizer="adam", clip=False)
    part = find(rows, method="partition", optimizer="adam", clip=False)
    if part["memory_bytes"] is not None and whole["memory_bytes"] is not None:
        saved = whole["memory_bytes"] - part["memory_bytes"]
        text += f", and Adam needs {quantity(saved, 'B')} less"
    return f"{text}. {answer_hoist(find(rows, method='hoist', clip=False))}".rstrip()


def answer_hoist(row: Row) -> str:
    if row["remark"] == NOTHING_TO_HOIST:
        return "There is nothing to hoist."
    if row["speedup"] is None:
        return ""
    if row["break_even"] is None:
        return f"If batches repeat, {NO_DIFFERENCE} between hoist and partition."
    epoch = math.floor(row["break_even"]) + 1
    kept = quantity(row["kept_bytes"], "B")
    return (
        f"If batches repeat, hoist is {times(row['speedup'])} as fast from epoch "
        f"{epoch} on, for {kept} per batch."
    )


def answer_devices(rows: Sequence[Row]) -> str:
    last = rows[-1]
    wanted = {"devices": last["devices"], "layout": last["layout"]}
    whole = quantity(find(rows, method="everything", **wanted)["sent_bytes"], "B")
    part = quantity(find(rows, method="partition", **wanted)["sent_bytes"], "B")
    return (
        f"{last['problem']}: each of {last['devices']} devices ({last['layout']}) "
        f"sends {part} per step with partition, and {whole} with everything."
    )


# ------------------------------------------------------------------------------ files
def write_files(report: Report) -> None:
    """Writes the JSON file and the plot, if they are asked for."""
    options = report.options
    if options.json is not None:
        results = {
            "card": report.card,
            "complete": report.ended == "complete",
            "ended": report.ended,
            "rows": [row for rows in report.tables for row in rows],
        }
        text = json.dumps(results, indent=1) + "\n"
        in_one_piece(options.json, lambda part: part.write_text(text, "utf-8"))
    if options.plot is not None and drawable(report.tables):
        in_one_piece(options.plot, partial(draw, report))


def in_one_piece(file: Path, write: Callable[[Path], Any], keep: bool = True) -> None:
    """Writes a file beside its place first, so that nobody ever sees half of it."""
    with TemporaryDirectory(dir=file.resolve().parent) as folder:
        part = Path(folder, file.name)
        write(part)
        if keep:
            part.replace(file.resolve())


def check_files(options: Namespace) -> None:
    """Raises an error if a file could not be written at the end."""
    if options.json is not None:
        in_one_piece(options.json, Path.touch, keep=False)
    if options.plot is not None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            command = "uv run --with matplotlib bench.py ..."
            raise ValueError(f"--plot needs matplotlib: {command}") from error
        in_one_piece(options.plot, Figure().savefig, keep=False)


def drawable(tables: Sequence[Sequence[Row]]) -> dict[str, list[Row]]:
    """The timed rows of the prefix table and of the last methods table."""
    found = {}
    for rows in tables:
        timed = [row for row in rows if row["step_s"] is not None]
        if timed and timed[0]["table"] in ("methods", "prefix"):
            found[timed[0]["table"]] = timed
    return found


def draw(report: Report, file: Path) -> None:
    """Draws the time per step by frozen layers and by method, with its spread."""
    from matplotlib.figure import Figure

    card, tables = report.card, drawable(report.tables)
    figure = Figure(figsize=(6 * len(tables), 4.8), layout="constrained", dpi=150)
    machine = card["cpu"] if card["platform"] == "cpu" else card["device_kind"]
    figure.suptitle(f"{machine}, {card['dtype']}, jax {card['jax']}, {card['date']}")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for axis, (table, rows) in zip(axes, tables.items()):
        if table == "prefix":
            draw_prefix(axis, rows)
        else:
            draw_methods(axis, rows)
    figure.savefig(file)


def draw_prefix(axis: Any, rows: Sequence[Row]) -> None:
    for method in ("partition", "hoist"):
        shown = [row for row in rows if row["method"] in ("everything", method)]
        frozen = [int(row["problem"].split()[-2]) for row in shown]
        medians_ms = [1e3 * row["step_s"] for row in shown]
        spreads_ms = [1e3 * row["spread_s"] for row in shown]
        axis.errorbar(
            frozen, medians_ms, spreads_ms, marker="o", capsize=3, label=method
        )
    axis.set(xlabel="frozen layers, from the first", ylabel="ms per step", yscale="log")
    axis.set(xticks=frozen, title=rows[0]["problem"].partition(",")[0])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.legend()


def draw_methods(axis: Any, rows: Sequence[Row]) -> None:
    medians_ms = [1e3 * row["step_s"] for row in rows]
    spreads_ms = [1e3 * row["spread_s"] for row in rows]
    names = [label(row) for row in rows]
    axis.barh(names, medians_ms, xerr=spreads_ms, capsize=3)
    axis.invert_yaxis()
    axis.set(xlabel="ms per step", xscale="log", title=rows[0]["problem"])
    axis.xaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    main()
