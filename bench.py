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

The file has two halves. The first is the benchmark: the methods, the check that all of
them take the same step, the timing, and the path from a case to its result. The second,
below the banner, holds everything else: optimizers, figures from the compiler, several
devices, other tables, your own model, options and output.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # Exit quietly on Ctrl-C while JAX is being imported (about 1 s).
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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import minifreeze as mf

Tree = Any  # a pytree of arrays, or of their shapes
Function = Callable[..., Any]
Key = TypeVar("Key", bound=Hashable)

SAMPLE_S = 0.05  # a sample lasts about this long
MAX_CALLS = 10_000  # per sample
PEAK_VECTOR_BYTES = 2**28  # larger than any CPU or GPU cache


# ------------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class Case:
    """What one row of a table measures."""

    table: str
    problem: str
    method: str  # one of METHODS, or the name of another library's form
    clip: bool = False  # clip the gradients by their global norm
    optimizer: str = "sgd"
    donate: bool = True  # let the step overwrite its input state
    frozen_layers: int | None = None  # in the prefix table
    devices: int = 1
    layout: str | None = None  # on several devices: "replicated" or "sharded"
    platform: str = field(default_factory=jax.default_backend)
    simulated: bool = False  # compiled for absent devices; never run
    rows: int = 0  # rows or tokens per training step, over all devices
    unit: str = "rows"  # or "tokens"


@dataclass(frozen=True)
class Step:
    """How a case is run: ``fn(state, *args)`` returns ``(new state, loss)``.

    ``fn`` may donate its input state, so every run starts from a fresh ``init()``.
    """

    fn: Function
    init: Callable[[], Tree]
    args: tuple[Tree, ...] = ()
    steps: int = 1  # training steps per call of fn
    # Steps in one group must produce the same update. None: compared with no other.
    same_step_group: str | None = ""
    get_params: Callable[[Tree], Tree] = lambda state: state  # the ones to compare
    hoisted: Hoisted | None = None
    trainable_bytes: int | None = None  # per device
    written_bytes: int | None = None  # trainables + optimizer state, per device


class Hoisted(NamedTuple):
    """The features that hoist computes once per batch and stores."""

    features: Tree  # of one batch
    compute: Step  # computes them
    nothing_to_hoist: bool = False  # minifreeze.hoist warned that they save nothing
    random: bool = False  # some of them come from a random number generator


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
        """Tells whether the intervals median ± spread overlap."""
        return abs(self.median - other.median) <= self.spread + other.spread


@dataclass(frozen=True)
class Result:
    """What was measured for a case. Ratios are computed when they are printed."""

    case: Case
    program: Program
    timing: Timing | None = None  # None if the case was not timed
    once: Timing | None = None  # seconds to compute hoist's features of one batch
    nothing_to_hoist: bool = False
    # The device's high-water mark since the process started.
    peak_memory_bytes: int | None = None
    remark: str | None = None


@dataclass(frozen=True)
class Problem:
    """Minimize ``loss(params, *batch)`` over the parameters that ``where`` selects.

    The loss must be a mean over the rows of the batch. On n devices the batch is n
    copies of that of one device, and the update must not change.
    """

    name: str
    where: str | Sequence[str]  # patterns
    loss: Function
    params: Tree
    batch: tuple[Tree, ...]
    rows: int  # in the batch of one device
    tokens: int | None = None  # per row, if the batch is token ids
    sizes: tuple[int, ...] = ()  # of the MLP; empty for your own model
    optimizer: Any = None  # of optax, if your own model has one
    sharding: Function = lambda leaf: None  # of a parameter, see place()
    abstract: bool = False  # params and batch are shapes, not arrays


# ----------------------------------------------------------------- the ways to freeze
class Gradients(NamedTuple):
    """How a method computes gradients: ``fn(params, *args)`` is ``(loss, grads)``.

    ``params`` are the parameters that are differentiated and updated. Arrays are
    passed in ``args``, not closed over: XLA would embed them as constants.
    """

    fn: Function
    params: Tree
    args: tuple[Tree, ...]
    hoisted: Hoisted | None = None


def everything(problem: Problem) -> Gradients:
    """Trains every parameter: the baseline."""
    fn = jax.value_and_grad(problem.loss)
    return Gradients(fn, problem.params, problem.batch)


def partition(problem: Problem) -> Gradients:
    """Differentiates with respect to the trainable part only."""
    trainable, frozen = mf.partition(problem.where, problem.params)
    fn = jax.value_and_grad(merged_loss(problem))
    return Gradients(fn, trainable, (frozen, *problem.batch))


def hoist(problem: Problem) -> Gradients:
    """Computes whatever depends on no trainable leaf once per batch."""
    trainable, frozen = mf.partition(problem.where, problem.params)
    args = (frozen, *problem.batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        once, rest = mf.hoist(merged_loss(problem), trainable, *args)
    features = jax.jit(once)(*args)
    hoisted = Hoisted(
        features,
        compute=features_step(once, args, features),
        nothing_to_hoist=hoist_warned(caught),
        random=draws_random_numbers(jax.make_jaxpr(once)(*args).jaxpr),
    )
    return Gradients(jax.value_and_grad(rest), trainable, (frozen, features), hoisted)


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
    """Returns the loss as a function of the two parts of the parameters."""

    def loss(trainable: Tree, frozen: Tree, *batch: Tree) -> Any:
        return problem.loss(mf.merge(trainable, frozen), *batch)

    return loss


METHODS: dict[str, Callable[[Problem], Gradients]] = {
    "everything": everything,
    "partition": partition,
    "hoist": hoist,
    "stop_gradient": stop_gradient,
    "zeroed gradients": zeroed_gradients,
}
MAIN_METHODS = ("everything", "partition", "hoist")


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

    def state_shapes(params: Tree) -> Tree:
        def with_place(leaf: Any) -> Any:
            return with_sharding(leaf, problem.sharding(leaf))

        return jax.tree.map(with_place, jax.eval_shape(start, params))

    shapes = state_shapes(gradients.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)

    def init() -> Tree:
        if problem.abstract:
            return shapes
        return jax.device_put(start(gradients.params), shardings)

    def get_params(state: Tree) -> Tree:
        params, _ = state
        if case.method == "everything":  # only this method also moves frozen leaves
            params, _ = mf.partition(problem.where, params)
        return params

    trainable = problem.params
    if case.method != "everything":
        trainable, _ = mf.partition(problem.where, problem.params)
    donated = (0,) if case.donate else ()
    return Step(
        fn=jax.jit(step, donate_argnums=donated, out_shardings=(shardings, None)),
        init=init,
        args=gradients.args,
        same_step_group=same_step_group(case),
        get_params=get_params,
        hoisted=gradients.hoisted,
        trainable_bytes=tree_bytes(trainable),
        written_bytes=tree_bytes(state_shapes(trainable)),
    )


# -------------------------------------------------------- all must take the same step
def check_same_step(steps: Mapping[Case, Step]) -> None:
    """Raises FloatingPointError unless all cases in a group take the same step.

    Parameters absent from the group's first case must stay unchanged.
    """
    references: dict[str, tuple[Case, Arrays]] = {}
    for case, step in steps.items():
        if step.same_step_group is None:
            continue
        state = step.init()
        before = to_host(step.get_params(state))
        state, loss = step.fn(state, *step.args)
        after = to_host(step.get_params(state))
        if not jnp.isfinite(loss).all():
            raise FloatingPointError(f"{full_name(case)}: the loss is {loss}")

        if step.same_step_group not in references:
            references[step.same_step_group] = (case, after)
        reference, expected = references[step.same_step_group]
        for path, leaf in after.items():
            wanted = expected.get(path, before[path])
            problem = deviation(before[path], leaf, wanted)
            if problem is None:
                continue
            message = f"{full_name(case)}: {leaf_name(path)!r} {problem}"
            message += f" (reference: {full_name(reference)})"
            if case.devices != reference.devices:
                message += "; the loss must be a mean over the rows of the batch"
            raise FloatingPointError(message)


# ------------------------------------------------------------------------- the timing
def run_calls(step: Step, state: Tree, calls: int) -> tuple[Tree, float]:
    """Calls a step, waits for its outputs, and returns (state, seconds)."""
    loss = None
    start = time.perf_counter()
    for _ in range(calls):
        state, loss = step.fn(state, *step.args)
    jax.block_until_ready((state, loss))
    seconds = time.perf_counter() - start
    return state, from_first_process(seconds)  # every process uses process 0's timing


def calibrate(step: Step) -> int:
    """Returns how many calls last about SAMPLE_S. These timings are discarded."""
    state, _ = run_calls(step, step.init(), 1)  # compiles
    calls = 1
    while True:
        state, seconds = run_calls(step, state, calls)
        if seconds >= SAMPLE_S or calls >= MAX_CALLS:
            return calls
        calls = min(2 * calls, MAX_CALLS)


def sample(step: Step, calls: int) -> float:
    """Returns the seconds per training step, measured over a number of calls."""
    # Untimed warm-up: the previous case evicted our arrays from the caches.
    state, _ = run_calls(step, step.init(), 1)
    gc.disable()  # as timeit does
    try:
        _, seconds = run_calls(step, state, calls)
    finally:
        gc.enable()
    return seconds / (calls * step.steps)


def time_rounds(steps: Mapping[Key, Step], rounds: int = 7) -> dict[Key, Timing]:
    """Times each step once per round, in a fresh random order each round.

    The number of calls per sample is fixed before the first sample.
    """
    calls = {key: calibrate(step) for key, step in steps.items()}
    samples: dict[Key, list[float]] = {key: [] for key in steps}
    keys = list(steps)
    generator = np.random.default_rng(0)  # the same order in all processes
    for _ in range(rounds):
        for index in generator.permutation(len(keys)):
            key = keys[index]
            samples[key].append(sample(steps[key], calls[key]))
    return {key: Timing(tuple(seconds)) for key, seconds in samples.items()}


# ---------------------------------------------------------------- from case to result
Build = Callable[[Case], Step]


class Table(NamedTuple):
    title: str
    results: list[Result]  # timed together; results of two tables are never compared


def measure(builds: Mapping[Case, Build], options: Namespace) -> list[Result]:
    """Builds and compiles cases, checks that their steps agree, and times them."""
    steps: dict[Case, Step] = {}
    programs: dict[Case, Program] = {}
    remarks: dict[Case, str] = {}  # why a case is left out
    for case, build in builds.items():
        try:
            step = build(case)
            programs[case] = compile_step(step, case.devices, options.batches)
            if not case.simulated:
                run_calls(step, step.init(), 1)  # does it fit into memory?
        except Exception as error:
            remarks[case] = why_left_out(error)  # re-raises anything else
            continue
        steps[case] = step

    timings: dict[tuple[Case, str], Timing] = {}
    if not any(case.simulated for case in builds):
        check_same_step(steps_to_check(steps, builds))
        timings = time_rounds(steps_to_time(steps), options.rounds)

    peak = peak_memory_bytes()
    results = []
    for case in builds:
        hoisted = steps[case].hoisted if case in steps else None
        remark = remarks.get(case)
        if hoisted is not None and hoisted.random:
            remark = "random numbers are drawn once per batch and kept"
        result = Result(
            case,
            program=programs.get(case, Program()),
            timing=timings.get((case, "step")),
            once=timings.get((case, "features")),
            nothing_to_hoist=hoisted is not None and hoisted.nothing_to_hoist,
            peak_memory_bytes=peak,
            remark=remark,
        )
        results.append(result)
    return results


def methods_table(options: Namespace, problems: Sequence[Problem]) -> Iterator[Table]:
    """One step per method; the last problem is also run with clipping and with Adam."""
    for problem in problems:
        plain = first_case("methods", problem, options)
        if problem.optimizer is not None:
            # The other methods show it the frozen parameters, and an optimizer may
            # update all parameters that it sees, e.g. by weight decay.
            cases = [replace(plain, method=method) for method in MAIN_METHODS]
        else:
            cases = [replace(plain, method=method) for method in METHODS]
            if problem is problems[-1]:
                cases += variants(plain)
        placed = place(problem, jax.local_devices()[:1])
        builds: dict[Case, Build] = {}
        for case in cases:
            builds[case] = partial(build_step, placed)
        yield Table(describe(problem), measure(builds, options))


def variants(plain: Case) -> list[Case]:
    """Returns the cases without donation, with clipping, and with Adam."""
    cases = [replace(plain, method="stop_gradient", donate=False)]
    for method in METHODS:
        cases.append(replace(plain, method=method, clip=True))
    if plain.optimizer == "sgd":
        for method in MAIN_METHODS:
            cases.append(replace(plain, method=method, optimizer="adam"))
    return cases


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
            report.tables.append(TableRows(table.title, rows))
            say(table_text(table.title, rows))
    report.ended = "complete"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark. Writes whatever was measured, however the run ends."""
    report = Report()
    with Interrupts() as interrupts:
        try:
            # The inner finally holds signals before an except clause can be
            # interrupted.
            try:
                run(argv, report)
            finally:
                interrupts.hold()
        except KeyboardInterrupt:
            report.ended = "interrupted"
        except Exception as error:
            report.fail(error)
        finish(report)
        leave(report, interrupts)


# ====================================================================================
# The benchmark ends here. Everything below is supporting code.
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
    where: str | Sequence[str],
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
        trainable, frozen = mf.partition("*", params)
        return mf.loss_fn(trainable, frozen, x, y)

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
    """Scales the gradients to a norm of at most CLIP_NORM.

    This keeps every gradient live.
    """
    squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
    scale = jnp.minimum(1, CLIP_NORM / jnp.sqrt(sum(squares)))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)


def same_step_group(case: Case) -> str:
    """Names the group of cases that must update the parameters identically."""
    if not case.clip:
        return case.optimizer
    norm_of = "all" if case.method == "everything" else "trainable"
    return f"{case.optimizer}, clipped by the norm of {norm_of} gradients"


# ---------------------------------------------------------- details of the first half
Arrays = dict[Any, np.ndarray[Any, Any]]  # by key path, on the host


def features_step(once: Function, args: tuple[Tree, ...], features: Tree) -> Step:
    """Returns the step that computes hoist's features; its state is the last ones."""

    def compute(previous: Tree, *args: Tree) -> tuple[Tree, tuple[()]]:
        return once(*args), ()

    # keep_unused: each timed call must wait for the one before it.
    compute = jax.jit(compute, keep_unused=True)
    return Step(compute, init=lambda: jax.tree.map(jnp.copy, features), args=args)


def hoist_warned(caught: Sequence[warnings.WarningMessage]) -> bool:
    """Tells whether minifreeze.hoist warned; shows the warnings of your own model."""
    warned = False
    for warning in caught:
        if str(warning.message).startswith("hoist"):
            warned = True
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return warned


def deviation(start: Any, got: Any, wanted: Any) -> str | None:
    """Describes how a parameter differs from the expected one after a step.

    Tolerance: 1% of the largest change (GPUs use TF32 for float32 products) plus four
    ulps of the largest value. Returns None within it.
    """
    finfo: Any = jnp.finfo  # it has no type annotations
    eps = float(finfo(got.dtype).eps)
    start, got, wanted = np.float32(start), np.float32(got), np.float32(wanted)
    if not np.isfinite(got).all():
        return "is not finite after the step"
    apart = np.abs(got - wanted).max(initial=0)
    largest_change = np.abs(wanted - start).max(initial=0)
    largest_value = np.abs(start).max(initial=0)
    tolerance = max(0.01, 8 * eps) * largest_change + 4 * eps * largest_value
    if apart > tolerance:
        return f"is off by {apart:.3g} (tolerance {tolerance:.3g})"
    return None


def to_host(tree: Tree) -> Arrays:
    """Gathers every leaf, from all processes, as NumPy arrays keyed by path."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        arrays[path] = np.asarray(leaf)
    return arrays


def from_first_process(value: float) -> float:
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def why_left_out(error: Exception) -> str:
    """Returns the remark for a case that cannot run; re-raises anything else."""
    if isinstance(error, ImportError):  # an optional library is missing
        return f"left out: {error}"
    out_of_memory = r"MemoryError|RESOURCE_EXHAUSTED|out.of.memory"
    # In a cluster the other processes would wait for this one forever.
    if re.search(out_of_memory, repr(error), re.I) and jax.process_count() == 1:
        return "out of memory"
    raise error


def steps_to_check(
    steps: Mapping[Case, Step], builds: Mapping[Case, Build]
) -> dict[Case, Step]:
    """Returns each case's step with SGD in the place of its optimizer.

    The first step of Adam is essentially the gradient's sign, which rounding can flip.
    """
    found: dict[Case, Step] = {}
    for case, step in steps.items():
        by_sgd = replace(case, optimizer="sgd")
        if by_sgd == case:
            found[case] = step
        elif by_sgd not in steps:
            found[by_sgd] = builds[case](by_sgd)
    return found


def steps_to_time(steps: Mapping[Case, Step]) -> dict[tuple[Case, str], Step]:
    """Returns each case's step, and the computation of hoist's features."""
    found: dict[tuple[Case, str], Step] = {}
    for case, step in steps.items():
        found[case, "step"] = step
        if step.hoisted is not None:
            found[case, "features"] = step.hoisted.compute
    return found


def first_case(table: str, problem: Problem, options: Namespace) -> Case:
    """Returns the case of training everything on one device."""
    case = Case(table, problem.name, "everything", rows=problem.rows)
    if problem.tokens is not None:
        case = replace(case, rows=problem.rows * problem.tokens, unit="tokens")
    if problem.optimizer is not None:
        return replace(case, optimizer="optax")
    return replace(case, optimizer=options.optimizer)


def peak_memory_bytes() -> int | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def leaf_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def with_sharding(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def tree_bytes(tree: Tree) -> int:
    """Adds up the bytes of a tree's arrays on one device."""
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
    """What the compiler says about a step; all figures are per device."""

    compile_s: float | None = None
    flops: int | None = None  # XLA's count; None if it misses matrix products
    flops_min: int | None = None  # of the matrix products and convolutions alone
    bytes_min: int | None = None  # arguments read once, trainables + state written once
    memory_bytes: int | None = None  # resident arrays plus temporaries
    temp_bytes: int | None = None
    unused_bytes: int | None = None  # resident, but not read by the step
    trainable_bytes: int | None = None
    kept_bytes: int | None = None  # hoist's features of one batch
    collective_bytes: int | None = None  # results of the collectives
    sent_bytes: int | None = None  # sent for them in a ring


def compile_step(step: Step, devices: int = 1, batches: int = 1) -> Program:
    """Compiles a step and reads what the compiler says about it.

    Args:
        step: a step whose ``fn`` has ``lower``, as jitted functions have.
        devices: how many devices share the work evenly.
        batches: batches per epoch; the features of each stay in memory.
    """
    kept_bytes = None
    if step.hoisted is not None:
        kept_bytes = tree_bytes(step.hoisted.features)
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
        jaxpr, is_read = without_dead_code(step.fn.trace(*arguments).jaxpr)
        unused = []
        for leaf, leaf_is_read in zip(jax.tree.leaves(arguments), is_read):
            if not leaf_is_read:
                unused.append(leaf)
        flops_min = product_flops(jaxpr) // (step.steps * devices)
        unused_bytes = tree_bytes(unused)
        program = replace(program, flops_min=flops_min, unused_bytes=unused_bytes)
    # XLA does not count library calls and counts a loop body only once.
    costs = compiled.cost_analysis() or {}
    if costs.get("flops", -1) >= (program.flops_min or 0):
        program = replace(program, flops=int(costs["flops"]))

    memory = compiled.memory_analysis()
    if memory is None:
        return program
    memory_bytes = (
        memory.argument_size_in_bytes
        + (program.unused_bytes or 0)  # jit drops arguments that it does not read
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes  # outputs that overwrite donated arguments
        + memory.temp_size_in_bytes
        + (kept_bytes or 0) * (batches - 1)  # the features of the other batches
    )
    bytes_min = None
    if step.steps == 1:  # a scan may keep parameters in a cache between its steps
        bytes_min = memory.argument_size_in_bytes + (step.written_bytes or 0)
    return replace(
        program,
        bytes_min=bytes_min,
        memory_bytes=memory_bytes,
        temp_bytes=memory.temp_size_in_bytes,
    )


def without_dead_code(closed_jaxpr: Any) -> tuple[Any, list[bool]]:
    """Returns the jaxpr after dead-code elimination, and a used-flag per argument."""
    from jax.interpreters.partial_eval import dce_jaxpr

    jaxpr = closed_jaxpr.jaxpr
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Returns the jaxprs among an equation's parameters."""
    found = []
    for param in eqn.params.values():
        values = param if isinstance(param, tuple) else [param]
        for value in values:
            jaxpr = getattr(value, "jaxpr", value)  # of a ClosedJaxpr
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found


def draws_random_numbers(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "random_bits":
            return True
        if any(draws_random_numbers(inner) for inner in inner_jaxprs(eqn)):
            return True
    return False


def product_flops(jaxpr: Any) -> int:
    """Counts 2 FLOPs per multiplication in matrix products and convolutions."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = [product_flops(jaxpr) for jaxpr in inner_jaxprs(eqn)]
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * eqn.outvars[0].aval.size * depth
        elif name == "conv_general_dilated":
            total += 2 * convolution_products(eqn)
        elif name == "cond":  # the branch with the most work
            total += max(inner)
        elif name == "scan":
            total += eqn.params["length"] * sum(inner)
        else:  # a while loop counts once: its length is not known
            total += sum(inner)
    return total


def convolution_products(eqn: Any) -> int:
    """Counts the multiplications of a convolution, excluding padding."""
    image, kernel = (variable.aval.shape for variable in eqn.invars)
    output = eqn.outvars[0].aval.shape
    image_spec, kernel_spec, output_spec = eqn.params["dimension_numbers"]
    batch, out_channels = output[output_spec[0]], output[output_spec[1]]
    in_channels_per_group = kernel[kernel_spec[1]]
    count = batch * out_channels * in_channels_per_group
    for axis, (padding_before, _) in enumerate(eqn.params["padding"]):
        stride = eqn.params["window_strides"][axis]
        image_step = eqn.params["lhs_dilation"][axis]
        kernel_step = eqn.params["rhs_dilation"][axis]
        windows = np.arange(output[output_spec[2 + axis]]) * stride  # (outputs,)
        taps = np.arange(kernel[kernel_spec[2 + axis]]) * kernel_step  # (taps,)
        position = windows[:, None] + taps - padding_before  # in the dilated image
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
    sent_per_byte = {  # of the result, which for reduce-scatter is 1/n of the input
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
        # An asynchronous collective appears as -start and -done. Count only -done,
        # whose result matches the synchronous form.
        name = operation["name"].removesuffix("-done")
        if name not in sent_per_byte:
            continue
        # On TPUs one collective may stand in several fusions, with one channel.
        channel = re.search(r"channel_id=\d+", line)
        if channel is not None:
            if channel[0] in channels:
                continue
            channels.add(channel[0])
        for array in ARRAY.finditer(operation["result"]):
            size = math.prod(int(axis) for axis in array["shape"].split(",") if axis)
            size = size * int(array["bits"] or 8) // 8  # a pred is one byte
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
    """Places a problem on devices, giving each device its own copy of the batch.

    Args:
        problem: with arrays or shapes.
        devices: they share the rows of the batch.
        sharded: also shard each parameter along its first evenly divisible axis.
            Otherwise each device stores all parameters.
        abstract: return shapes instead of arrays.
    """
    mesh = Mesh(np.array(devices), ("data",))
    count = len(devices)

    def sharding_of(param: Any) -> NamedSharding:
        if sharded:
            for axis, size in enumerate(param.shape):
                if size and size % count == 0:
                    before = [None] * axis
                    return NamedSharding(mesh, PartitionSpec(*before, "data"))
        return NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if abstract:
            return with_sharding(leaf, sharding)
        return jax.device_put(leaf, sharding)

    def put_batch(leaf: Any) -> Any:
        if leaf.shape[:1] != (problem.rows,):  # for instance a random key
            return put(leaf, NamedSharding(mesh, PartitionSpec()))
        if abstract:
            shape = (count * problem.rows, *leaf.shape[1:])
            leaf = jax.ShapeDtypeStruct(shape, leaf.dtype)
        elif count > 1:
            leaf = jnp.concatenate([leaf] * count)
        return put(leaf, NamedSharding(mesh, PartitionSpec("data")))

    params = jax.tree.map(lambda leaf: put(leaf, sharding_of(leaf)), problem.params)
    batch = jax.tree.map(put_batch, problem.batch)
    placed = replace(problem, params=params, batch=batch)
    return replace(placed, sharding=sharding_of, abstract=abstract)


def devices_table(options: Namespace, problems: Sequence[Problem]) -> Iterator[Table]:
    """One data-parallel step of the last problem, on several devices."""
    problem, devices = problems[-1], usable_devices(options)
    title = describe(problem)
    timed, compiled = [], []
    for count in device_counts(options, len(devices)):
        # Devices of one CPU share its cores, so their times would mean nothing.
        on_one_cpu = devices[0].platform == "cpu" and count > jax.process_count()
        if options.compile_only or on_one_cpu:
            compiled.append(count)
        else:
            timed.append(count)

    for count in timed:
        cases = device_cases(problem, jax.local_devices()[:1], options)
        if count > 1:
            cases |= device_cases(problem, devices[:count], options)
        yield Table(title, measure(cases, options))
    simulated: dict[Case, Build] = {}
    for count in compiled:
        simulated |= device_cases(problem, devices[:count], options, simulated=True)
    if simulated:
        compiled_for = options.topology or devices[0].platform
        title += f"\nas compiled for {compiled_for}, not run"
        yield Table(title, measure(simulated, options))
    alone = jax.process_count() == 1
    if alone and options.devices is None and not options.compile_only:
        yield simulated_elsewhere(problem, options)


def device_counts(options: Namespace, available: int) -> list[int]:
    """Returns the numbers of devices to test."""
    if options.devices is not None:
        counts: list[int] = options.devices
        return counts
    if options.topology:
        return [available]
    if options.compile_only:
        return [1, 2, 4, 8]
    counts = []
    count = 2 if jax.process_count() == 1 else jax.process_count()
    while count <= available:
        counts.append(count)
        count *= 2
    return counts


def device_cases(
    problem: Problem,
    devices: Sequence[jax.Device],
    options: Namespace,
    simulated: bool = False,
) -> dict[Case, Build]:
    """Returns the cases of everything and partition, in each layout."""
    count, device_platform = len(devices), devices[0].platform
    case = first_case("devices", problem, options)
    case = replace(
        case,
        devices=count,
        platform=device_platform,
        simulated=simulated,
        rows=case.rows * count,
    )
    layouts = ["replicated"]
    # XLA for CPUs all-reduces gradients that it reduce-scatters for GPUs and TPUs.
    if count > 1 and not (simulated and device_platform == "cpu"):
        layouts.append("sharded")

    builds: dict[Case, Build] = {}
    for layout in layouts:
        placed = place(problem, devices, layout == "sharded", abstract=simulated)
        for method in ("everything", "partition"):
            built = replace(case, method=method, layout=layout)
            builds[built] = partial(build_step, placed)
    return builds


def usable_devices(options: Namespace) -> list[jax.Device]:
    """Returns the devices, interleaved across processes."""
    if options.topology:
        return topology_devices(options.topology)
    by_process: list[list[jax.Device]] = [[] for _ in range(jax.process_count())]
    for device in jax.devices():
        by_process[device.process_index].append(device)
    return [device for turn in zip(*by_process) for device in turn]


def topology_devices(name: str) -> list[jax.Device]:
    """Returns a pod's chips for ahead-of-time compilation; no TPU needed."""
    from jax.experimental import topologies

    # Otherwise libtpu looks for TPUs, and prints long warnings when it finds none.
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
        message = f"--topology {name}: {error}; use for example {names}"
        raise ValueError(message) from error
    return list(found.devices)


def simulated_elsewhere(problem: Problem, options: Namespace) -> Table:
    """Compiles for 8 CPU devices in a new process.

    JAX has already fixed this process's device count.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder, "devices.json")
        command = [sys.executable, __file__, *problem_options(options)]
        command += ["--compile-only", "--devices", "8", "--json", str(file)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            _, _, last_line = process.stderr.strip().rpartition("\n")
            raise RuntimeError(f"the simulation of 8 devices failed: {last_line}")
        rows = json.loads(file.read_text("utf-8"))["rows"]
    title = f"{describe(problem)}\nas compiled for cpu, not run"
    return Table(title, [result_from(row) for row in rows])


def problem_options(options: Namespace) -> list[str]:
    """Returns the options that define the problem, as command-line arguments."""
    arguments = ["--optimizer", options.optimizer, "--dtype", options.dtype]
    for name in ("model", "batch"):
        if getattr(options, name) is not None:
            arguments += [f"--{name}", str(getattr(options, name))]
    for name in ("sizes", "train", "freeze"):
        if getattr(options, name):
            arguments += [f"--{name}", *map(str, getattr(options, name))]
    return arguments


# ------------------------------------------------------------------- the other tables
def prefix_table(options: Namespace, problems: Sequence[Problem]) -> Iterator[Table]:
    """One step with the first n layers frozen, for each n."""
    problem = place(problems[-1], jax.local_devices()[:1])
    layers = [f"linear_{i}" for i in range(len(problem.sizes) - 1)]
    first = replace(first_case("prefix", problem, options), frozen_layers=0)
    builds: dict[Case, Build] = {
        first: partial(build_step, replace(problem, where=layers))
    }
    for frozen in range(1, len(layers)):
        partly_frozen = replace(problem, where=layers[frozen:])
        for method in ("partition", "hoist"):
            case = replace(first, method=method, frozen_layers=frozen)
            builds[case] = partial(build_step, partly_frozen)
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

    loop = Step(
        fn=jax.jit(mf.train_step, donate_argnums=0),
        init=lambda: jax.tree.map(jnp.copy, trainable),
        args=(frozen, xs[0], ys[0]),
        trainable_bytes=tree_bytes(trainable),
    )
    train = jax.jit(mf.train, donate_argnums=0)
    scan_once = replace(loop, fn=train, args=(frozen, xs[:1], ys[:1]))
    scan = replace(scan_once, args=(frozen, xs, ys), steps=steps, same_step_group=None)
    loop_case = replace(first_case("run", problem, options), method="loop")
    scan_case = replace(loop_case, method="scan")
    check_same_step({loop_case: loop, scan_case: scan_once})

    builds: dict[Case, Build] = {loop_case: lambda case: loop}
    builds[scan_case] = lambda case: scan
    title = (
        f"seed: one step of the walk-through. The loop repeats one batch; "
        f"the scan reads {steps:,}."
    )
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
    returned = call_model(options.model)
    if not isinstance(returned, tuple) or len(returned) not in (3, 4):
        expected = "(loss_fn, params, batch) or (loss_fn, params, batch, optimizer)"
        raise ValueError(f"{options.model} must return {expected}")

    loss, params, batch = returned[:3]
    params = arrays_of("parameter", params)
    batch = arrays_of("batch", tuple(batch))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"parameter {leaf_name(path)!r} is {leaf.dtype}, which cannot be "
                "differentiated; close over it in the loss function"
            )
    jax.eval_shape(jax.grad(loss), params, *batch)
    rows, tokens = count_rows(batch, options.batch)
    return Problem(
        name=Path(options.model.rpartition(":")[0]).stem,
        where=options.where,
        loss=loss,
        params=params,
        batch=batch,
        rows=rows,
        tokens=tokens,
        optimizer=returned[3] if len(returned) == 4 else None,
    )


def call_model(model: str) -> Any:
    file, _, name = model.rpartition(":")
    sys.path.insert(0, str(Path(file).parent.resolve()))
    try:
        module = runpy.run_path(file)
        if name not in module:
            raise ValueError(f"{file} has no {name}()")
        return module[name]()
    except ModuleNotFoundError as error:
        command = f"uv run --with {error.name} bench.py ..."
        raise ValueError(f"{model}: {error}; {command}") from error
    except SystemExit as error:
        raise ValueError(f"{model} called sys.exit({error.code})") from error


def arrays_of(label: str, tree: Tree) -> Tree:
    """Converts each leaf to a JAX array; raises ValueError if one is not an array."""

    def as_array(path: Any, leaf: Any) -> jax.Array:
        try:
            return jnp.asarray(leaf)
        except TypeError as error:
            found = f"{leaf_name(path)!r} is a {type(leaf).__name__}"
            raise ValueError(f"{label} {found}, not an array") from error

    return jax.tree_util.tree_map_with_path(as_array, tree)


def count_rows(batch: Tree, given: int | None) -> tuple[int, int | None]:
    """Finds the rows of a batch: the first axis that all its data leaves share.

    Returns:
        The rows, and the tokens per row if all data are token ids (rows, length).
    """
    data = []
    for leaf in jax.tree.leaves(batch):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if leaf.ndim > 0 and not is_key and given in (None, leaf.shape[0]):
            data.append(leaf)
    lengths = sorted({leaf.shape[0] for leaf in data})
    if len(lengths) != 1:
        found = f"the leaves of the batch have first axes {lengths}"
        if given is not None:
            found = f"no leaf of the batch has a first axis of {given}"
        raise ValueError(f"{found}; pass the number of rows with --batch N")

    for leaf in data:
        is_ids = leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.integer)
        if not is_ids or leaf.shape != data[0].shape:
            return lengths[0], None
    return lengths[0], data[0].shape[1]


# ---------------------------------------------------------------------------- options
class Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, without the usage that argparse would add."""
        self.exit(2, f"bench.py: error: {message}\n")


def parse(argv: Sequence[str] | None) -> Namespace:
    """Reads the command line. Exits with status 2 on an invalid option."""
    parser = Parser(
        "bench.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    names = [name for name in TABLES if name != "peers"]
    add("--tables", nargs="+", choices=names, metavar="TABLE", help=", ".join(names))
    add("--peers", action="store_true", help="compare with other libraries")
    add("--sizes", nargs="+", type=int, metavar="N", help="layer widths for an MLP")
    add("--batch", type=int, metavar="N", help="rows per batch and device")
    which = parser.add_mutually_exclusive_group()
    train_help, freeze_help = "train these leaves", "freeze these leaves"
    which.add_argument("--train", nargs="+", metavar="PATTERN", help=train_help)
    which.add_argument("--freeze", nargs="+", metavar="PATTERN", help=freeze_help)
    add("--optimizer", choices=("sgd", "adam"), default="sgd", help="default: sgd")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of MLPs")
    model_help = "NAME() returns (loss_fn, params, batch); the loss is a mean over rows"
    add("--model", metavar="FILE.py:NAME", help=model_help)
    add("--rounds", type=int, default=7, metavar="N", help="samples per row; default 7")
    batches_help = "batches per epoch (sizes hoist's feature cache)"
    add("--batches", type=int, default=1, metavar="N", help=batches_help)
    add("--devices", nargs="+", type=int, metavar="N", help="device counts to test")
    add("--compile-only", action="store_true", help="simulate devices, time nothing")
    add("--topology", metavar="NAME", help="TPU pod to compile for, such as v5e:16x16")
    cluster_help = "join a SLURM, TPU or Kubernetes cluster"
    add("--cluster", action="store_true", help=cluster_help)
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    add("--processes", type=int, metavar="N", help="number of processes")
    add("--process", type=int, metavar="I", help="index of this process, from 0")
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--plot", type=Path, metavar="FILE", help="draw the prefix and methods tables")
    options = parser.parse_args(argv)

    options.where = options.train
    if options.freeze:
        options.where = [inverted(pattern) for pattern in options.freeze]
    if options.coordinator or options.processes or options.process is not None:
        options.cluster = True
    options.tables = chosen_tables(options)
    for name in ("json", "plot"):  # a model may change the working directory
        file = getattr(options, name)
        if file is not None:
            setattr(options, name, file.absolute())
    check_options(options, parser.error)
    return options


def inverted(pattern: str) -> str:
    """Turns a pattern for --freeze into one for --train: "a" into "!a" and back."""
    return pattern[1:] if pattern.startswith("!") else f"!{pattern}"


def chosen_tables(options: Namespace) -> list[str]:
    """Returns the named tables, or else those affected by every given option."""
    tables = ["methods", "prefix", "run", "devices"]
    if options.tables:
        tables = [table for table in tables if table in options.tables]
    elif options.compile_only or options.cluster or options.devices:
        tables = ["devices"]
    elif options.model:
        tables = ["methods"]
    elif options.where and not options.peers:
        tables = ["methods", "devices"]
    elif options.sizes or options.batch or options.optimizer != "sgd":
        tables = ["methods", "prefix", "devices"]
    if options.peers:
        tables.append("peers")
    return tables


def check_options(options: Namespace, error: Callable[[str], Any]) -> None:
    """Calls error() for options that are invalid or contradict each other."""
    if jax.config.values["jax_disable_jit"]:
        error("JAX_DISABLE_JIT is set, so nothing would be compiled")

    sizes, counts = options.sizes or [], options.devices or []
    numbers = [options.batch, options.rounds, options.batches, options.processes]
    for number in [*sizes, *counts, *numbers]:
        if number is not None and not 0 < number < 2**31:
            error(f"numbers must be positive and below 2**31, not {number}")
    if len(sizes) == 1:
        error("--sizes needs at least two widths")
    if len(set(counts)) < len(counts):
        error(f"--devices contains a duplicate: {counts}")

    _, _, port = (options.coordinator or "host:1").rpartition(":")
    if not port.isdecimal() or int(port) >= 2**16:
        error(f"--coordinator must be HOST:PORT, not {options.coordinator}")
    address = (options.coordinator, options.processes, options.process)
    missing = [value is None for value in address]
    if any(missing) and not all(missing):
        error("--coordinator, --processes and --process go together")

    if options.model and not options.where:
        error("--model needs --train or --freeze")
    if options.model and ":" not in options.model:
        error(f"--model must be FILE.py:NAME, not {options.model}")
    if options.model and "prefix" in options.tables:
        error("the prefix table freezes layers of an MLP: omit it with --model")
    if options.topology and not options.compile_only:
        error("--topology needs --compile-only")
    if options.topology and options.devices:
        error("--topology uses the whole pod; omit --devices")
    if options.compile_only and options.cluster:
        error("--compile-only runs in one process; it cannot join a cluster")
    if options.compile_only and options.tables != ["devices"]:
        error("--compile-only works only with the devices table")
    if options.plot and not {"methods", "prefix"} & set(options.tables):
        error("--plot draws the methods and prefix tables; select at least one of them")

    files = [file.resolve() for file in (options.json, options.plot) if file]
    if len(set(files)) < len(files):
        error(f"--json and --plot must not be the same file: {files[0]}")
    for file in files:
        if file.exists() and not file.is_file():
            error(f"{file} is not a regular file")


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
            yield "The run table always uses the walk-through network and SGD."


def set_up(options: Namespace) -> list[Problem]:
    """Joins the cluster, checks devices and files, and returns the problems.

    Raises ValueError in all processes if one of them fails its checks or was started
    with different options.
    """
    if options.compile_only:
        jax.config.update("jax_platforms", "cpu")
        if not options.topology:
            most = max(options.devices or [8])
            jax.config.update("jax_num_cpu_devices", most)
    if options.cluster:
        join_cluster(options)

    problems: list[Problem] = []
    failure = ""
    try:
        check_devices(options)
        check_files(options)
        problems = load_problems(options)
    except Exception as error:
        failure = str(error).partition("\n")[0] or type(error).__name__
        if jax.process_count() == 1:
            raise ValueError(failure) from error
    check_cluster(failure, options)
    # Keep XLA's start-up cost out of the first row.
    jax.jit(jnp.sin).lower(1.0).compile()
    return problems


def check_devices(options: Namespace) -> None:
    available, processes = len(usable_devices(options)), jax.process_count()
    for count in options.devices or []:
        if count > available or count % processes:
            raise ValueError(
                f"--devices {count}: there are {available} devices in {processes} "
                f"processes; the count must be at most {available} and divisible by "
                f"{processes} (--compile-only simulates more)"
            )


def load_problems(options: Namespace) -> list[Problem]:
    """Returns your own model, or an MLP of the given sizes, or the built-in MLPs."""
    problems = []
    if options.model:
        problems.append(load_model(options))
    else:
        mlps = MLPS
        if options.sizes:
            last_layer = f"linear_{len(options.sizes) - 2}"
            mlps = {"mlp": (tuple(options.sizes), 64, [last_layer])}
        for name, (sizes, rows, where) in mlps.items():
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
    """Makes this process one of a cluster. Only process 0 prints and writes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if options.process == 0 and options.coordinator:
        _, _, port = options.coordinator.rpartition(":")
        try:  # JAX aborts if the port is taken
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(f"--coordinator {options.coordinator}: {error}") from error
    jax.distributed.initialize(
        options.coordinator,
        options.processes,
        options.process,
        initialization_timeout=60,
    )
    # JAX replaced the OS-level handler behind Python's back; reinstall ours.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    if jax.process_index() != 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def check_cluster(failure: str, options: Namespace) -> None:
    """Raises ValueError in all processes if one failed or has different options.

    multihost_utils.assert_equal would suffice, but in jax 0.5.1 it never fails on
    process 0.
    """
    shared = dict(vars(options))
    for name in ("json", "plot", "process"):
        del shared[name]
    checksum = zlib.crc32(f"{failure}{shared}".encode())
    checksums = multihost_utils.process_allgather(np.uint32(checksum)).reshape(-1)
    others = np.flatnonzero(checksums != checksums[0])
    if failure:
        raise ValueError(failure)
    if others.size:
        raise ValueError(
            f"processes {others} failed their checks or were started with different "
            f"options from process 0; the options of this process: {shared}"
        )


# ----------------------------------------------------------------------------- output
say = partial(print, flush=True)


class Interrupts:
    """Makes Ctrl-C and SIGTERM raise KeyboardInterrupt; after hold(), records them."""

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
        self.card: dict[str, Any] = {}  # empty until the measuring begins
        self.tables: list[TableRows] = []
        self.ended = ""
        self.code = 0

    def fail(self, error: Exception) -> None:
        """Records an error: exit code 2 if the measuring never began, else 1."""
        self.ended = f"error: {error}"
        measuring = bool(self.card)
        self.code = 1 if measuring else 2
        if measuring and not isinstance(error, (OSError, FloatingPointError)):
            sys.excepthook(type(error), error, error.__traceback__)


def finish(report: Report) -> None:
    """Writes the files and prints the answer, if anything was measured."""
    try:
        if report.tables and jax.process_index() == 0:
            write_files(report)
            conclusion = answer([table.rows for table in report.tables])
            if conclusion:
                say(f"\n{conclusion}")
    except OSError as error:
        report.fail(error)


def leave(report: Report, interrupts: Interrupts) -> None:
    """Ends the process with 0, 1, 2 or 128 + the signal number."""
    code = report.code
    if interrupts.received is not None:
        code = 128 + interrupts.received
    if code != 0:
        first_line = report.ended.partition("\n")[0]
        with suppress(OSError):
            say(f"bench.py: {first_line}", file=sys.stderr)
    if code in (0, 2):
        sys.exit(code)
    os._exit(code)  # interpreter or JAX-distributed shutdown may hang


# ------------------------------------------------------------------------ the machine
def describe_machine(options: Namespace) -> dict[str, Any]:
    """Describes the machine and the software."""
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
    """Measures the peak FLOP/s and the peak bandwidth (bytes/s) of one device."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    matrix /= math.sqrt(side)  # repeated products neither vanish nor overflow
    vector_bytes = PEAK_VECTOR_BYTES

    def multiply(product: jax.Array, a: jax.Array) -> tuple[jax.Array, None]:
        return product @ a, None

    def increment(vector: jax.Array) -> tuple[jax.Array, None]:
        return vector + 1, None

    steps = {
        "product": Step(jax.jit(multiply), init=lambda: matrix, args=(matrix,)),
        "increment": Step(
            jax.jit(increment, donate_argnums=0),
            init=lambda: jnp.zeros(vector_bytes // 4, jnp.float32),
        ),
    }
    timings = time_rounds(steps, rounds=5)
    flops = 2 * side**3 / min(timings["product"].samples)
    bytes_moved = 2 * vector_bytes  # read and written
    return flops, bytes_moved / min(timings["increment"].samples)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*: (.+)", info.read_text())
        if found is not None:
            return found[1]
    return platform.processor()


def git(*arguments: str) -> str | None:
    """Runs git in this file's repository; None without git or a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return process.stdout.strip() if process.returncode == 0 else None


# -------------------------------------------------------------------- results as rows
Row = dict[str, Any]  # of the JSON file; an unknown figure is None


class TableRows(NamedTuple):
    title: str
    rows: list[Row]


class HoistOutcome(str, Enum):
    """The comparison of hoist's step with partition's."""

    FASTER = "faster"
    SLOWER = "slower"
    NO_DIFFERENCE = "no difference"
    NOTHING_TO_HOIST = "nothing to hoist"
    NOT_TIMED = "not timed"  # one of the two


@dataclass(frozen=True)
class Figures:
    """The statistics of a result's samples, alone and relative to its table."""

    step_s: float | None = None
    spread_s: float | None = None
    samples: tuple[float, ...] = ()
    speedup: float | None = None  # relative to everything
    differs: bool | None = None  # from everything, by more than the spreads
    rows_per_s: float | None = None
    efficiency: float | None = None  # share of the speed of one device alone
    limit_share: float | None = None
    once_s: float | None = None
    hoist_outcome: HoistOutcome | None = None
    break_even: float | None = None  # in epochs


def rows_of(results: Sequence[Result], card: Mapping[str, Any]) -> list[Row]:
    """Converts the results of one table to rows of the JSON file."""
    all_figures = [figures_of(result, results, card) for result in results]
    timed = [figures for figures in all_figures if figures.step_s is not None]
    show_limit = all(figures.limit_share is not None for figures in timed)

    rows = []
    for result, figures in zip(results, all_figures):
        if not show_limit:
            figures = replace(figures, limit_share=None)
        remark = result.remark
        if figures.hoist_outcome is HoistOutcome.NOTHING_TO_HOIST:
            remark = HoistOutcome.NOTHING_TO_HOIST.value
        row = asdict(result.case) | asdict(result.program) | asdict(figures)
        row["peak_memory_bytes"] = result.peak_memory_bytes
        row["remark"] = remark
        if result.case.frozen_layers is not None:
            row["problem"] += f", {result.case.frozen_layers} frozen"
        if not result.case.donate:
            row["method"] += ", not donated"
        rows.append(row)
    return rows


def result_from(row: Row) -> Result:
    """Restores the result of a row that was not timed."""
    case = Case(**{part.name: row[part.name] for part in fields(Case)})
    program = Program(**{part.name: row[part.name] for part in fields(Program)})
    return Result(case, program, remark=row["remark"])


def figures_of(
    result: Result, results: Sequence[Result], card: Mapping[str, Any]
) -> Figures:
    case, timing = result.case, result.timing
    partition = find_result(results, replace(case, method="partition"))
    outcome = hoist_outcome(result, partition)
    if timing is None:
        return Figures(hoist_outcome=outcome)

    speedup, differs = None, None
    base = baseline(case, results)
    if base is not None:
        speedup = base.median / timing.median
        differs = not timing.overlaps(base)

    efficiency = None
    if case.devices > 1 and case.layout == "replicated":
        rows_alone = case.rows // case.devices
        alone = find_result(results, replace(case, devices=1, rows=rows_alone))
        if alone is not None and alone.timing is not None:
            efficiency = alone.timing.median / timing.median

    once_s, break_even = None, None
    if result.once is not None:
        once_s = result.once.median
        if outcome is HoistOutcome.FASTER and partition and partition.timing:
            break_even = once_s / (partition.timing.median - timing.median)

    return Figures(
        step_s=timing.median,
        spread_s=timing.spread,
        samples=timing.samples,
        speedup=speedup,
        differs=differs,
        rows_per_s=case.rows / timing.median,
        efficiency=efficiency,
        limit_share=limit_share(result.program, timing, card),
        once_s=once_s,
        hoist_outcome=outcome,
        break_even=break_even,
    )


def find_result(results: Sequence[Result], case: Case) -> Result | None:
    for result in results:
        if result.case == case:
            return result
    return None


def baseline(case: Case, results: Sequence[Result]) -> Timing | None:
    """Returns the timing of the comparable case that trains everything."""
    for result in results:
        other = result.case
        same_update = (other.clip, other.optimizer) == (case.clip, case.optimizer)
        same_place = (other.devices, other.layout) == (case.devices, case.layout)
        if other.method == "everything" and same_update and same_place:
            return result.timing
    return None


def hoist_outcome(hoist: Result, partition: Result | None) -> HoistOutcome | None:
    if hoist.case.method != "hoist":
        return None
    if hoist.nothing_to_hoist:
        return HoistOutcome.NOTHING_TO_HOIST
    if partition is None:
        return HoistOutcome.NOT_TIMED
    if saves_no_work(hoist.program, partition.program):
        return HoistOutcome.NOTHING_TO_HOIST
    if hoist.timing is None or partition.timing is None:
        return HoistOutcome.NOT_TIMED
    if hoist.timing.overlaps(partition.timing):
        return HoistOutcome.NO_DIFFERENCE
    if hoist.timing.median > partition.timing.median:
        return HoistOutcome.SLOWER
    return HoistOutcome.FASTER


def saves_no_work(hoist: Program, partition: Program) -> bool:
    """Tells whether hoist's step has as many FLOPs as partition's."""
    if hoist.flops_min is None or partition.flops_min is None:
        return False
    if hoist.flops_min < partition.flops_min:
        return False
    if hoist.flops is None or partition.flops is None:
        return True
    return hoist.flops >= 0.99 * partition.flops


def limit_share(
    program: Program, timing: Timing, card: Mapping[str, Any]
) -> float | None:
    """Returns the roofline bound as a fraction of the measured time."""
    if program.flops_min is None or program.bytes_min is None:
        return None
    computing_s: float = program.flops_min / card["peak_flops"]
    moving_s: float = program.bytes_min / card["peak_bytes_per_s"]
    return max(computing_s, moving_s) / timing.median


# ------------------------------------------------------------------------------- text
WIDTH = 100
NO_DIFFERENCE = "no difference seen"


def table_text(title: str, rows: Sequence[Row]) -> str:
    """Formats a title, the non-empty columns, and notes."""
    timed = any(row["step_s"] for row in rows)
    on_devices = rows[0]["layout"] is not None
    columns = {"method": [label(row) for row in rows]}
    if on_devices:
        columns["devices"] = [str(row["devices"]) for row in rows]
        columns["layout"] = [row["layout"] for row in rows]
    columns |= time_column(rows)
    columns["speed-up"] = [speedup_text(row) for row in rows]
    columns |= number_column("memory", rows, "memory_bytes", "B")
    if on_devices:
        columns |= number_column("sent", rows, "sent_bytes", "B")
        columns |= percent_column("efficiency", rows, "efficiency")
    if not (on_devices and timed):  # they would not all fit on a line
        columns |= percent_column("limit", rows, "limit_share")
        columns |= number_column("", rows, "flops", "FLOP")
        columns |= number_column("", rows, "rows_per_s", f" {rows[0]['unit']}/s")

    lines = ["", title]
    lines += aligned({name: cells for name, cells in columns.items() if any(cells)})
    for row in rows:
        texts = [] if row["remark"] is None else [row["remark"]]
        # The other updates repeat the notes of the first one.
        if not row["clip"] and row["optimizer"] == rows[0]["optimizer"]:
            texts += hoist_notes(row)
        if texts:
            note = f"  {label(row)}: {'; '.join(texts)}."
            lines += textwrap.wrap(note, WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def label(row: Row) -> str:
    """Names a row's method and its variant."""
    words = [row["method"]]
    if row["frozen_layers"] is not None:
        words.append(f"{row['frozen_layers']} frozen")
    if row["clip"] and row["method"] in METHODS:  # other libraries' names say it
        words.append("clipped")
    if row["optimizer"] != "sgd":
        words.append("Adam" if row["optimizer"] == "adam" else row["optimizer"])
    return ", ".join(words)


def full_name(case: Case) -> str:
    text = f"{case.problem}, {label(asdict(case))}"
    if case.layout is not None:
        text += f", {case.devices} x {case.platform}, {case.layout}"
    return text


def time_column(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Formats medians with three digits, and spreads as precisely: 24.3 ± 0.3."""
    scale, prefix = si_prefix([row["step_s"] for row in rows])
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
    title: str, rows: Sequence[Row], key: str, unit: str
) -> dict[str, list[str]]:
    """Formats a column of plain numbers, with their unit in its title."""
    scale, prefix = si_prefix([row[key] for row in rows])
    cells = []
    for row in rows:
        cells.append("" if row[key] is None else three_digits(row[key] / scale))
    return {f"{title} {prefix}{unit}".strip(): cells}


def percent_column(title: str, rows: Sequence[Row], key: str) -> dict[str, list[str]]:
    cells = []
    for row in rows:
        cells.append("" if row[key] is None else f"{row[key]:.0%}")
    return {title: cells}


def speedup_text(row: Row) -> str:
    if row["speedup"] is None:
        return ""
    if row["method"] != "everything" and not row["differs"]:
        return NO_DIFFERENCE
    if row["speedup"] < 1:
        return f"{times(1 / row['speedup'])} slower"
    return times(row["speedup"])


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if 0.95 <= ratio < 9.95 else f"{three_digits(ratio)}x"


def quantity(value: float, unit: str) -> str:
    """Formats three digits with an SI prefix: 1.23 ms, 45.6 MB."""
    scale, prefix = si_prefix([value])
    return f"{three_digits(value / scale)} {prefix}{unit}"


SI_PREFIXES = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1.0: ""}
SI_PREFIXES |= {1e-3: "m", 1e-6: "µ", 1e-9: "n"}


def si_prefix(values: Sequence[float | None]) -> tuple[float, str]:
    """Returns the factor and the prefix that suit the largest value."""
    largest = max([value for value in values if value is not None], default=0)
    rounded = float(f"{largest:.2e}")  # 999.9 is 1.00 k
    for scale, prefix in SI_PREFIXES.items():
        if rounded >= scale:
            return scale, prefix
    return 1.0, ""


def three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:.0f}"


def aligned(columns: Mapping[str, list[str]]) -> list[str]:
    """Returns the lines of a table: text left-aligned, numbers right-aligned."""
    padded = []
    for title, cells in columns.items():
        column = [title, *cells]
        width = max(len(cell) for cell in column)
        if title in ("method", "layout"):
            padded.append([cell.ljust(width) for cell in column])
        else:
            padded.append([cell.rjust(width) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*padded)]


def hoist_notes(row: Row) -> list[str]:
    """Describes the cost of hoist's features."""
    if row["once_s"] is None:
        return []
    if row["hoist_outcome"] == HoistOutcome.NOTHING_TO_HOIST:
        return []
    costs = []
    for epochs in (1, 3, 10):
        costs.append(quantity(row["step_s"] + row["once_s"] / epochs, "s"))
    including = f"including feature computation: {', '.join(costs)} per step"
    texts = [f"{including} over 1, 3, 10 epochs"]
    if row["break_even"] is not None:
        texts.append(f"pays off after {row['break_even']:.1f} epochs")
    texts.append(f"stores {quantity(row['kept_bytes'], 'B')} per batch")
    if row["unused_bytes"]:
        unused = quantity(row["unused_bytes"], "B")
        texts.append(f"{unused} of weights are no longer read and can be freed")
    return texts


def describe(problem: Problem) -> str:
    """Returns a table's title; for your own model with a list of its parameters."""
    patterns = problem.where
    if not isinstance(patterns, str):
        patterns = " ".join(patterns)
    text = f"{problem.name}: train {patterns}"
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
    """Formats layer widths: [1024, 2048 x 4, 10]."""
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
        text += f"; commit {card['commit'][:10]}"
        if not card["clean"]:
            text += " (uncommitted changes)"
    return textwrap.fill(text, WIDTH)


def legend(options: Namespace) -> str:
    """Explains the columns, once."""
    lines = []
    if not options.compile_only:
        lines.append(
            "Times are median ± median absolute deviation. Speed-ups are relative to "
            f'the everything row; "{NO_DIFFERENCE}" means that the intervals overlap. '
            "Limit is the roofline bound (matrix products, or reading the arguments "
            "and writing the trainables, at measured peak rates) as a share of the "
            "step time."
        )
    lines.append(
        "Memory is per device: parameters, optimizer state, batch, results, temporary "
        "arrays, and hoist's features for one epoch."
    )
    if "devices" in options.tables:
        lines.append(
            "Sent is the traffic of each device in a ring, according to the compiled "
            "program. (XLA's CPU backend sums bfloat16 in float32, so it sends twice "
            "as many bytes as TPUs.)"
        )
    lines += options_without_effect(options)
    return "\n".join(textwrap.fill(line, WIDTH) for line in lines)


# ------------------------------------------------------------------------- the answer
def answer(tables: Sequence[Sequence[Row]]) -> str:
    """Returns the conclusion, in a few sentences."""
    lines = []
    methods = [rows for rows in tables if rows[0]["table"] == "methods"]
    if methods:
        lines.append(answer_methods(methods[-1]))
    devices = [rows for rows in tables if rows[0]["table"] == "devices"]
    if devices:
        lines.append(answer_devices(devices[-1]))
    return "\n".join(textwrap.fill(line, WIDTH) for line in lines if line)


ORDINALS = ("first", "second", "third")


def find(rows: Sequence[Row], **wanted: Any) -> Row | None:
    """Returns the first row with these values."""
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row
    return None


def answer_methods(rows: Sequence[Row]) -> str:
    problem, optimizer = rows[0]["problem"], rows[0]["optimizer"]
    part = find(rows, method="partition", optimizer=optimizer, clip=False)
    sentences = [f"{problem}: {answer_partition(part)}"]

    with_adam = find(rows, method="partition", optimizer="adam", clip=False)
    all_with_adam = find(rows, method="everything", optimizer="adam", clip=False)
    if with_adam is not None and all_with_adam is not None:
        part_bytes, all_bytes = with_adam["memory_bytes"], all_with_adam["memory_bytes"]
        if part_bytes is not None and all_bytes is not None and part_bytes < all_bytes:
            saved = quantity(all_bytes - part_bytes, "B")
            sentences.append(f"With Adam, partition needs {saved} less memory.")

    hoist = find(rows, method="hoist", optimizer=optimizer, clip=False)
    if hoist is not None:
        sentences.append(answer_hoist(hoist, part))
    return " ".join(sentences)


def answer_partition(row: Row | None) -> str:
    if row is None or row["speedup"] is None:
        return "no comparison: everything or partition was not timed."
    if not row["differs"]:
        return f"{NO_DIFFERENCE} between partition and training everything."
    if row["speedup"] < 1:
        slowdown = times(1 / row["speedup"])
        return f"train everything; partition is {slowdown} slower."
    speedup = times(row["speedup"])
    return f"use partition, which is {speedup} faster than training everything."


def answer_hoist(hoist: Row, partition: Row | None) -> str:
    outcome = hoist["hoist_outcome"]
    if outcome == HoistOutcome.NOTHING_TO_HOIST:
        return "There is nothing to hoist."
    if partition is None or outcome == HoistOutcome.NOT_TIMED:
        return "No comparison of hoist with partition: one of them was not timed."
    if outcome == HoistOutcome.NO_DIFFERENCE:
        return f"Even if batches repeat, {NO_DIFFERENCE} between hoist and partition."
    ratio = partition["step_s"] / hoist["step_s"]
    if outcome == HoistOutcome.SLOWER:
        slowdown = times(1 / ratio)
        return f"Do not use hoist: its step is {slowdown} slower than partition's."
    full_epochs = math.floor(hoist["break_even"])  # in which it has not paid off
    when = f"after {full_epochs} epochs"
    if full_epochs < len(ORDINALS):
        when = f"from the {ORDINALS[full_epochs]} epoch on"
    return (
        f"If batches repeat, each step of hoist is {times(ratio)} faster than one of "
        f"partition; computing the features first pays off {when}, for "
        f"{quantity(hoist['kept_bytes'], 'B')} per batch."
    )


def answer_devices(rows: Sequence[Row]) -> str:
    last = rows[-1]
    where = {"devices": last["devices"], "layout": last["layout"]}
    part = find(rows, method="partition", **where)
    whole = find(rows, method="everything", **where)
    if last["devices"] == 1 or part is None or whole is None:
        return ""
    if part["sent_bytes"] is None or whole["sent_bytes"] is None:
        return ""
    how = last["layout"]
    if last["simulated"]:
        how += ", as compiled"
    return (
        f"{last['problem']}: each of {last['devices']} devices ({how}) "
        f"sends {quantity(part['sent_bytes'], 'B')} per step with partition, and "
        f"{quantity(whole['sent_bytes'], 'B')} with everything."
    )


# ------------------------------------------------------------------------------ files
def write_files(report: Report) -> None:
    """Writes the JSON file and the plot, if they were asked for."""
    options = report.options
    if options.json is not None:
        rows: list[Row] = []
        for table in report.tables:
            rows += table.rows
        results = {
            "card": report.card,
            "complete": report.ended == "complete",
            "ended": report.ended,
            "rows": rows,
        }
        text = json.dumps(results, indent=1) + "\n"
        write_atomically(options.json, lambda file: file.write_text(text, "utf-8"))
    if options.plot is not None and tables_to_draw(report):
        write_atomically(options.plot, partial(draw, report))


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes to a temporary file in the same directory, then renames it.

    Readers never see a partial file.
    """
    with TemporaryDirectory(dir=file.resolve().parent) as folder:
        temporary = Path(folder, file.name)
        write(temporary)
        temporary.replace(file.resolve())


def check_files(options: Namespace) -> None:
    """Raises an error if a file could not be written at the end."""
    if options.json is not None:
        check_writable(options.json, Path.touch)
    if options.plot is not None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            command = "uv run --with matplotlib bench.py ..."
            raise ValueError(f"--plot needs matplotlib: {command}") from error
        check_writable(options.plot, Figure().savefig)


def check_writable(file: Path, write: Callable[[Path], Any]) -> None:
    with TemporaryDirectory(dir=file.resolve().parent) as folder:
        write(Path(folder, file.name))


def tables_to_draw(report: Report) -> dict[str, TableRows]:
    """Returns the timed rows of the prefix table and of the last methods table."""
    found = {}
    for table in report.tables:
        timed = [row for row in table.rows if row["step_s"] is not None]
        if timed and timed[0]["table"] in ("methods", "prefix"):
            title = table.title.partition("\n")[0]
            found[timed[0]["table"]] = TableRows(title, timed)
    return found


def draw(report: Report, file: Path) -> None:
    """Draws the time per step by frozen layers and by method, with its spread."""
    from matplotlib.figure import Figure

    card, tables = report.card, tables_to_draw(report)
    figure = Figure(figsize=(7 * len(tables), 4.8), layout="constrained", dpi=150)
    machine = card["cpu"] if card["platform"] == "cpu" else card["device_kind"]
    figure.suptitle(f"{machine}, {card['dtype']}, jax {card['jax']}, {card['date']}")
    all_axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (name, table) in zip(all_axes, tables.items()):
        axes.set_title(table.title, fontsize="medium")
        if name == "prefix":
            draw_prefix(axes, table.rows)
        else:
            draw_methods(axes, table.rows)
    figure.savefig(file)


def draw_prefix(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator

    for method in ("partition", "hoist"):
        shown = [row for row in rows if row["method"] in ("everything", method)]
        frozen = [row["frozen_layers"] for row in shown]
        medians_ms = [1e3 * row["step_s"] for row in shown]
        spreads_ms = [1e3 * row["spread_s"] for row in shown]
        axes.errorbar(
            frozen, medians_ms, spreads_ms, marker="o", capsize=3, label=method
        )
    axes.set(xlabel="frozen layers, from the first", ylabel="ms per step", yscale="log")
    axes.set(xticks=sorted({row["frozen_layers"] for row in rows}))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend()


def draw_methods(axes: Any, rows: Sequence[Row]) -> None:
    medians_ms = [1e3 * row["step_s"] for row in rows]
    spreads_ms = [1e3 * row["spread_s"] for row in rows]
    names = [label(row) for row in rows]
    axes.barh(names, medians_ms, xerr=spreads_ms, capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel="ms per step", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    main()
