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

The benchmark comes first: the methods, the check that all of them take the same step,
the timing, the main table and main(). Below the banner: optimizers, compiler
statistics, several devices, the other tables, loading your own model, options and
output.

Once per batch, the hoist method computes and stores whatever depends only on the frozen
parameters and that batch. The stored values are called features.
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
import traceback
import warnings
import zlib
from argparse import (
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import minifreeze as mf

Tree = Any  # a pytree of arrays, or of their shapes
Function = Callable[..., Any]
LeavesByPath = dict[Any, np.ndarray[Any, Any]]  # of a tree, copied to the host
Row = dict[str, Any]  # a table row, as in the JSON file; unknown values are None
Tables = Iterator[tuple[str, list[Row]]]  # titles and rows
Key = TypeVar("Key", bound=Hashable)

ROUNDS = 7  # samples per case, by default
SIGNIFICANCE = 0.05  # the level at which two cases are called different
MIN_ROUNDS = 6  # fewer can never show a difference
SAMPLE_S = 0.05  # shortest sample; most last up to twice this
MAX_CALLS = 10_000  # per sample


# ------------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class Problem:
    """Minimize ``loss(params, *batch)`` over the parameters that ``where`` selects.

    The loss must be a mean over the rows of the batch. On n devices, the one-device
    batch is repeated n times, so a correct step produces the same update.
    """

    name: str
    where: str | Sequence[str]  # patterns
    loss: Function
    params: Tree  # arrays; shapes if the problem is only compiled
    batch: tuple[Tree, ...]
    batch_rows: int  # rows in one device's batch
    tokens: int | None = None  # per row, if the batch is token ids
    sizes: tuple[int, ...] = ()  # of the MLP; empty for your own model
    optimizer: Any = None  # the optax optimizer that your own model returned, if any
    mesh: Mesh | None = None  # the devices that hold the arrays; set by place()
    sharded: bool = False  # whether each parameter is split over the mesh


@dataclass(frozen=True)
class Case:
    """What one row of a table measures."""

    table: str
    problem: str
    method: str  # one of METHODS, "loop", "scan", or another library's variant
    clip: bool = False  # clip the gradients by their global norm
    optimizer: str = "sgd"
    donate: bool = True  # let the step overwrite its input state
    frozen_layers: int = 0  # in the prefix table
    devices: int = 1
    layout: str | None = None  # on several devices: "replicated" or "sharded"
    platform: str = field(default_factory=jax.default_backend)
    simulated: bool = False  # compiled for devices that are not present
    batch_size: int = 0  # rows or tokens in one device's batch
    batch_unit: str = "rows"  # or "tokens"


@dataclass(frozen=True)
class Step:
    """How a case is run: ``fn(state, *args)`` returns ``(new state, loss)``.

    ``fn`` may donate its input state, so every run starts from a fresh ``init()``.
    """

    fn: Function
    init: Callable[[], Tree]
    args: tuple[Tree, ...] = ()
    training_steps: int = 1  # per call of fn
    # Computes hoist's features. It is a Step so that it can be timed like any other.
    features_step: Step | None = None
    # All steps in a group must make the same update to the parameters that
    # get_params(state) returns. A step without a group is not compared.
    group: str | None = None
    get_params: Function = lambda state: state
    # For the table:
    remark: str | None = None
    trainable_bytes: int | None = None  # per device
    written_bytes: int | None = None  # lower bound on what a step writes, per device


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

    def differs(self, other: Timing) -> bool | None:
        """Returns whether one of the two won significantly more rounds than the other.

        This is the sign test: if both are equally fast, each wins a round with
        probability 1/2. Comparing within a round cancels slowdowns that affect both.
        The medians must agree, because they are what the tables show. Returns None for
        fewer than MIN_ROUNDS.
        """
        rounds = len(self.samples)
        if rounds < MIN_ROUNDS:
            return None
        faster = sum(np.less(self.samples, other.samples))
        slower = sum(np.greater(self.samples, other.samples))
        # The probability of so few exceptions, in either direction, by chance.
        exceptions = rounds - max(faster, slower)
        ways = sum(math.comb(rounds, count) for count in range(exceptions + 1))
        p_value = 2 * ways / 2**rounds
        medians_agree = (self.median - other.median) * (slower - faster) > 0
        return bool(p_value <= SIGNIFICANCE and medians_agree)


@dataclass(frozen=True)
class CompilerStats:
    """What the compiler says about a step, per device."""

    compile_s: float | None = None
    flops: int | None = None  # XLA's count; None if it misses matrix products
    flops_min: int | None = None  # of the matrix products and convolutions alone
    bytes_min: int | None = None  # of all arguments, plus what a step must write
    memory_bytes: int | None = None  # resident arrays plus temporaries
    temp_bytes: int | None = None
    unused_bytes: int | None = None  # resident, but not read by the step
    trainable_bytes: int | None = None
    kept_bytes: int | None = None  # the features of one batch
    collective_bytes: int | None = None  # results of the collectives
    sent_bytes: int | None = None  # by one device, assuming ring collectives


@dataclass(frozen=True)
class Result:
    """What was measured for a case. Ratios to other cases are computed later."""

    case: Case
    stats: CompilerStats
    timing: Timing | None = None  # None if the case was not timed
    features_timing: Timing | None = None  # of one batch
    peak_memory_bytes: int | None = None  # of the process, once the case has run
    remark: str | None = None


# ----------------------------------------------------------------- the ways to freeze
class Gradients(NamedTuple):
    """How a method computes gradients: ``fn(params, *args)`` returns (loss, grads).

    The step updates ``params``, and ``fn`` differentiates with respect to them. Arrays
    are passed in ``args``, because XLA would embed closed-over arrays as constants.
    """

    fn: Function
    params: Tree
    args: tuple[Tree, ...]
    features_step: Step | None = None
    remark: str | None = None


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
    """Computes, once per batch, everything that does not depend on a trainable leaf."""
    trainable, frozen = mf.partition(problem.where, problem.params)
    args = (frozen, *problem.batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        once, rest = mf.hoist(merged_loss(problem), trainable, *args)
    features = jax.jit(once)(*args)
    has_random_features = draws_random_numbers(jax.make_jaxpr(once)(*args).jaxpr)
    return Gradients(
        jax.value_and_grad(rest),
        trainable,
        (frozen, features),
        features_step=build_features_step(once, args, features),
        remark=hoist_remark(caught, has_random_features),
    )


def stop_gradient(problem: Problem) -> Gradients:
    """Differentiates with respect to all parameters, behind lax.stop_gradient."""

    def loss(params: Tree, *batch: Tree) -> Any:
        trainable, frozen = mf.partition(problem.where, params)
        frozen = jax.lax.stop_gradient(frozen)
        return merged_loss(problem)(trainable, frozen, *batch)

    return Gradients(jax.value_and_grad(loss), problem.params, problem.batch)


def zeroed_gradients(problem: Problem) -> Gradients:
    """Computes all gradients, and multiplies those of frozen parameters by zero."""

    def fn(params: Tree, *batch: Tree) -> tuple[jax.Array, Tree]:
        loss, grads = jax.value_and_grad(problem.loss)(params, *batch)
        is_trainable = mf.mask(problem.where, params)
        return loss, jax.tree.map(jnp.multiply, grads, is_trainable)

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
    """Returns one training step: gradients, optional clipping, and the update."""
    gradients = METHODS[case.method](problem)
    optimizer = optimizer_of(problem, case)

    def step(state: Tree, *args: Tree) -> tuple[Tree, jax.Array]:
        params, moments = state
        loss, grads = gradients.fn(params, *args)
        if case.clip:
            grads = clip_by_global_norm(grads)
        params, moments = optimizer.update(params, grads, moments)
        return (params, moments), loss

    def get_params(state: Tree) -> Tree:
        params, _ = state
        if case.method == "everything":
            # Drop the frozen leaves, which this method alone updates, so that they
            # are not compared.
            params, _ = mf.partition(problem.where, params)
        return params

    donated = (0,) if case.donate else ()
    # Give the outputs the shardings of the inputs, or XLA may choose others.
    shardings = state_shardings(problem, optimizer, gradients.params)
    trainable_bytes, written_bytes = bytes_to_write(problem, optimizer, case)
    return Step(
        fn=jax.jit(step, donate_argnums=donated, out_shardings=(shardings, None)),
        init=partial(new_state, problem, optimizer, gradients.params),
        args=gradients.args,
        features_step=gradients.features_step,
        group=group_of(case),
        get_params=get_params,
        remark=gradients.remark,
        trainable_bytes=trainable_bytes,
        written_bytes=written_bytes,
    )


# -------------------------------------------------- do all methods take the same step?
def check_same_step(steps: Mapping[Case, Step]) -> None:
    """Raises FloatingPointError unless all steps in a group make the same update.

    The first step of a group is the reference. Parameters that its get_params() leaves
    out are frozen, and must not change in the others.
    """
    references: dict[str, tuple[Case, LeavesByPath]] = {}
    for case, step in steps.items():
        state = step.init()
        before = to_host(step.get_params(state))
        state, loss = step.fn(state, *step.args)
        after = to_host(step.get_params(state))
        if not jnp.isfinite(loss).all():
            raise FloatingPointError(f"{full_name(case)}: the loss is {loss}")
        for path, leaf in after.items():
            # A frozen mask may contain -inf from the start.
            if is_finite(before[path]) and not is_finite(leaf):
                message = f"{leaf_name(path)!r} is not finite after the step"
                raise FloatingPointError(f"{full_name(case)}: {message}")
        if step.group is None:
            continue
        if step.group not in references:
            references[step.group] = (case, after)
            continue

        reference, expected = references[step.group]
        if case.frozen_layers:
            # The reference trains all layers. Do not expect updates of the frozen ones.
            expected = {path: expected[path] for path in after if path in expected}
        mismatch = find_mismatch(before, after, expected)
        if mismatch is not None:
            message = f"{full_name(case)}: {mismatch}"
            message += f" (reference: {full_name(reference)})"
            if case.devices != reference.devices:
                message += (
                    "; the loss must be a mean over the rows of the batch, and it must "
                    "not draw random arrays whose shape depends on the number of rows"
                )
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
    # In a cluster, all processes use the first one's measurement.
    return state, from_first_process(seconds)


def calibrate(step: Step) -> int:
    """Returns how many calls take at least SAMPLE_S, up to MAX_CALLS."""
    state, _ = run_calls(step, step.init(), 1)  # warm-up
    calls = 1
    while calls < MAX_CALLS:
        state, seconds = run_calls(step, state, calls)
        if seconds >= SAMPLE_S:
            # Make sure that it was not just a brief hiccup of the machine.
            state, seconds_again = run_calls(step, state, calls)
            if seconds_again >= SAMPLE_S:
                break
        calls = min(2 * calls, MAX_CALLS)
    return calls


def sample(step: Step, calls: int) -> float:
    """Returns the seconds per training step, measured over a number of calls."""
    # Untimed warm-up: the previous case may have evicted our arrays from the caches.
    state, _ = run_calls(step, step.init(), 1)
    gc.disable()  # as timeit does
    try:
        _, seconds = run_calls(step, state, calls)
    finally:
        gc.enable()
    return seconds / (calls * step.training_steps)


def time_rounds(steps: Mapping[Key, Step], rounds: int = ROUNDS) -> dict[Key, Timing]:
    """Times each step once per round, in a new random order each round.

    The number of calls per sample is fixed before the first sample. On Ctrl-C, this
    returns the finished rounds, or re-raises if there are none.
    """
    calls = {key: calibrate(step) for key, step in steps.items()}
    keys = list(steps)
    generator = np.random.default_rng(0)  # the same order in all processes
    finished: list[dict[Key, float]] = []
    try:
        for _ in range(rounds):
            seconds = {}
            for index in generator.permutation(len(keys)):
                key = keys[index]
                seconds[key] = sample(steps[key], calls[key])
            finished.append(seconds)
    except KeyboardInterrupt:
        if not finished:
            raise
        # Otherwise keep them. Report.interrupt() has recorded the signal, and
        # Report.add() ends the run once this table is stored.

    timings = {}
    for key in keys:
        timings[key] = Timing(tuple(seconds[key] for seconds in finished))
    return timings


# -------------------------------------------------------------------- from case to row
def measure(
    cases: Sequence[Case], build: Callable[[Case], Step], options: Namespace
) -> list[Row]:
    """Compiles the cases of a table, checks that their steps agree, and times them."""
    steps: dict[Case, Step] = {}
    stats: dict[Case, CompilerStats] = {}
    peaks: dict[Case, int | None] = {}
    remarks: dict[Case, str | None] = {}
    for case in cases:
        try:
            step = build(case)
            stats[case] = compile_step(
                step, devices=case.devices, stored_batches=options.batches
            )
            if not case.simulated:
                try_out(step)
                peaks[case] = peak_memory_bytes()
        except Exception as error:
            remark = expected_failure(error, case)
            if remark is None:
                raise
            # The row has this remark, and the compiler's statistics if there are any.
            remarks[case] = remark
            continue
        steps[case] = step
        remarks[case] = step.remark

    timings: dict[tuple[Case, str], Timing] = {}
    if not any(case.simulated for case in cases):
        check_same_step(with_sgd(steps, build))
        timings = time_rounds(with_features(steps), options.rounds)

    results = []
    for case in cases:
        result = Result(
            case,
            stats=stats.get(case, CompilerStats()),
            timing=timings.get((case, "step")),
            features_timing=timings.get((case, "features")),
            peak_memory_bytes=peaks.get(case),
            remark=remarks[case],
        )
        results.append(result)
    return rows_of(results)


def with_sgd(
    steps: Mapping[Case, Step], build: Callable[[Case], Step]
) -> dict[Case, Step]:
    """Returns the steps to compare, with SGD in place of every other optimizer.

    Adam's first update is nearly the sign of the gradient, and rounding can flip a
    sign.
    """
    to_check: dict[Case, Step] = {}
    for case in steps:
        by_sgd = replace(case, optimizer="sgd")
        if by_sgd not in to_check:
            to_check[by_sgd] = steps[by_sgd] if by_sgd in steps else build(by_sgd)
    return to_check


def with_features(steps: Mapping[Case, Step]) -> dict[tuple[Case, str], Step]:
    """Adds the steps that compute hoist's features, to time them in the same rounds."""
    to_time = {}
    for case, step in steps.items():
        to_time[case, "step"] = step
        if step.features_step is not None:
            to_time[case, "features"] = step.features_step
    return to_time


def methods_table(options: Namespace, problems: Sequence[Problem]) -> Tables:
    """Times one training step of each method.

    Unless the model brings its own optimizer, the last problem also gets rows with
    clipping, with Adam, and without donation.
    """
    for problem in problems:
        baseline = baseline_case("methods", problem, options)
        # The methods left out would also pass your optimizer the frozen parameters,
        # which it might change, for example by weight decay.
        methods = METHODS if problem.optimizer is None else MAIN_METHODS
        cases = [replace(baseline, method=method) for method in methods]
        if problem.optimizer is None and problem is problems[-1]:
            # Without donation, this method must copy the frozen parameters.
            cases.append(replace(baseline, method="stop_gradient", donate=False))
            for method in METHODS:
                cases.append(replace(baseline, method=method, clip=True))
            if baseline.optimizer != "adam":
                for method in MAIN_METHODS:
                    cases.append(replace(baseline, method=method, optimizer="adam"))
        placed = place(problem, jax.local_devices()[:1])
        yield describe(problem), measure(cases, partial(build_step, placed), options)


def run(argv: Sequence[str] | None, report: Report) -> None:
    """Measures and prints each table that the options ask for."""
    options = report.options = parse(argv)
    problems = set_up(options)
    report.begin(dtype_of(problems[-1].params))
    for name in options.tables:
        for title, rows in TABLES[name](options, problems):
            report.add(title, rows)
    report.ended = "complete"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the benchmark and exits. Writes whatever was measured, however it ends."""
    report = Report()
    signal.signal(signal.SIGINT, report.interrupt)
    signal.signal(signal.SIGTERM, report.interrupt)
    try:
        run(argv, report)
    except KeyboardInterrupt:
        report.ended = "interrupted"
    except Exception as error:
        report.fail(error)
    finish(report)


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

    def create() -> tuple[Tree, tuple[Tree, ...]]:
        params_key, x_key, y_key = jax.random.split(jax.random.key(0), 3)
        params = mf.init(params_key, sizes, dtype)
        x = jax.random.normal(x_key, (rows, sizes[0]), dtype)  # (rows, in)
        y = jax.random.randint(y_key, (rows,), 0, sizes[-1])  # (rows,)
        return params, (x, y)

    def loss(params: Tree, x: jax.Array, y: jax.Array) -> Any:
        trainable, frozen = mf.partition("*", params)  # loss_fn expects two trees
        return mf.loss_fn(trainable, frozen, x, y)

    params, batch = jax.eval_shape(create) if abstract else jax.jit(create)()
    return Problem(name, where, loss, params, batch, rows, sizes=sizes)


def baseline_case(table: str, problem: Problem, options: Namespace) -> Case:
    """Returns the case of training everything on one device."""
    case = Case(table, problem.name, "everything", batch_size=problem.batch_rows)
    if problem.tokens is not None:
        tokens = problem.batch_rows * problem.tokens
        case = replace(case, batch_size=tokens, batch_unit="tokens")
    if problem.optimizer is not None:
        return replace(case, optimizer="optax")
    return replace(case, optimizer=options.optimizer)


# --------------------------------------------------------------------- the optimizers
SGD_RATE = 0.1
ADAM_RATE = 1e-3
CLIP_NORM = 0.1  # smaller than the gradient norms of the built-in problems


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
    """Kingma and Ba (2015), with the paper's default constants."""
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

    Every gradient enters the norm, so XLA cannot remove any as dead code.
    """
    squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
    scale = jnp.minimum(1, CLIP_NORM / jnp.sqrt(sum(squares)))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)


def group_of(case: Case) -> str:
    """Names the group of cases that must update the parameters in the same way."""
    if not case.clip:
        return case.optimizer
    norm_of = "all" if case.method == "everything" else "trainable"
    return f"{case.optimizer}, clipped by the norm of {norm_of} gradients"


# ---------------------------------------------------------- details of the benchmark
NOTHING_TO_HOIST = "nothing to hoist"


def build_features_step(once: Function, args: tuple[Tree, ...], features: Tree) -> Step:
    """Returns the step that computes hoist's features.

    Its state is the previous call's features. They are passed in only so that each call
    waits for the one before it, instead of running concurrently with it.
    """

    def compute(previous: Tree, *args: Tree) -> tuple[Tree, tuple[()]]:
        return once(*args), ()

    compute = jax.jit(compute, keep_unused=True)
    return Step(compute, init=lambda: jax.tree.map(jnp.copy, features), args=args)


def hoist_remark(
    caught: Sequence[warnings.WarningMessage], has_random_features: bool
) -> str | None:
    """Returns a remark on the features; re-issues warnings that your model raised."""
    remark = None
    if has_random_features:
        remark = "random numbers are drawn once per batch and reused in every epoch"
    for warning in caught:
        if str(warning.message).startswith("hoist found nothing"):
            remark = NOTHING_TO_HOIST
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return remark


def draws_random_numbers(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "random_bits":
            return True
        if any(draws_random_numbers(inner) for inner in inner_jaxprs(eqn)):
            return True
    return False


def is_finite(array: Any) -> bool:
    return bool(np.isfinite(as_float32(array)).all())


def as_float32(array: Any) -> Any:
    return np.asarray(array).astype(np.float32)


def find_mismatch(
    before: LeavesByPath, after: LeavesByPath, expected: LeavesByPath
) -> str | None:
    """Describes how a step differs from the expected one; None if it does not.

    The parameters may differ by rounding. In bfloat16, rounding can exceed a whole
    update, so the parameters as a whole must also have moved at least half as far as
    expected.
    """
    for path in expected:
        if path not in after:
            return f"{leaf_name(path)!r} is not updated"
    dot_product, squared_length = 0.0, 0.0
    for path, leaf in after.items():
        mismatch = deviation(before[path], leaf, expected.get(path))
        if mismatch is not None:
            return f"{leaf_name(path)!r} {mismatch}"
        if path in expected:
            start = as_float32(before[path])
            update = as_float32(leaf) - start
            expected_update = as_float32(expected[path]) - start
            dot_product += float(np.vdot(update, expected_update))
            squared_length += float(np.vdot(expected_update, expected_update))
    # Their ratio is the fraction of the expected update that was made.
    if dot_product < 0.5 * squared_length:
        fraction = dot_product / squared_length
        return f"the update is only {fraction:.0%} of the expected one"
    return None


def deviation(before: Any, got: Any, expected: Any) -> str | None:
    """Describes how a parameter differs from its expected value after a step.

    Returns None if it differs only by rounding. A parameter without an expected value
    is frozen and must not change.
    """
    finfo: Any = jnp.finfo  # it has no type annotations
    eps = float(finfo(got.dtype).eps)
    if expected is None:
        is_same = before.tobytes() == got.tobytes()
        return None if is_same else "is frozen, but it changed"
    if not is_finite(before):
        return "is not finite before the step"
    before, got, expected = as_float32(before), as_float32(got), as_float32(expected)
    error = np.abs(got - expected).max(initial=0)
    largest_change = np.abs(expected - before).max(initial=0)
    largest_value = np.abs(before).max(initial=0)
    rounding_of_update = max(0.01, 8 * eps) * largest_change  # GPUs multiply in TF32
    rounding_of_value = 4 * eps * largest_value
    tolerance = rounding_of_update + rounding_of_value
    if error > tolerance:
        return f"is off by {error:.3g} (tolerance {tolerance:.3g})"
    return None


def to_host(tree: Tree) -> LeavesByPath:
    """Gathers every leaf, from all processes, as NumPy arrays keyed by path."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        arrays[path] = np.array(leaf)  # a copy, because a step may donate the leaf
    return arrays


def from_first_process(value: float) -> float:
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def try_out(step: Step) -> None:
    """Runs a step once, to find out whether it fits in memory."""
    run_calls(step, step.init(), 1)
    if step.features_step is not None:
        run_calls(step.features_step, step.features_step.init(), 1)


def expected_failure(error: Exception, case: Case) -> str | None:
    """Returns the remark for a case that cannot run, or None if the error is a bug."""
    is_peer = case.method not in METHODS
    if is_peer and isinstance(error, ImportError):  # its library is missing
        return f"left out: {error}"
    # Skip no case in a cluster: the other processes would wait for this one forever.
    out_of_memory = r"MemoryError|RESOURCE_EXHAUSTED|out.of.memory"
    if jax.process_count() > 1 or not re.search(out_of_memory, repr(error), re.I):
        return None
    if case.simulated:
        return "out of memory"
    return "out of memory (with the table's other methods also loaded)"


def peak_memory_bytes() -> int | None:
    """Returns the device's high-water mark since the process started."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def label(case: Case) -> str:
    """Names the method of a case and its variant."""
    words = [case.method]
    if not case.donate:
        words.append("not donated")
    if case.frozen_layers:
        words.append(f"{case.frozen_layers} frozen")
    if case.clip and case.method in METHODS:  # the names of peers already say so
        words.append("clipped")
    if case.optimizer != "sgd":
        words.append("Adam" if case.optimizer == "adam" else case.optimizer)
    return ", ".join(words)


def full_name(case: Case) -> str:
    text = f"{case.problem}, {label(case)}"
    if case.layout is not None:
        text += f", {case.devices} x {case.platform}, {case.layout}"
    return text


def leaf_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_bytes(tree: Tree) -> int:
    """Adds up the bytes of a tree's arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            sharding = getattr(leaf, "sharding", None)
            shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
            total += math.prod(shape) * leaf.dtype.itemsize
    return total


# ---------------------------------------------------------- what the compiler reports
def compile_step(
    step: Step, devices: int = 1, stored_batches: int = 1
) -> CompilerStats:
    """Compiles a step and reads what the compiler says about it.

    Args:
        step: the step to compile. If its ``fn`` has no ``lower``, as in some other
            libraries, only the bytes of its arrays are known.
        devices: how many devices share the work evenly.
        stored_batches: the number of batches whose features stay in memory.
    """
    stats = CompilerStats(trainable_bytes=step.trainable_bytes)
    if step.features_step is not None:
        features = jax.eval_shape(step.features_step.init)
        stats = replace(stats, kept_bytes=tree_bytes(features))
    if not hasattr(step.fn, "lower"):
        return stats

    arguments = (step.init(), *step.args)
    start = time.perf_counter()
    compiled = step.fn.lower(*arguments).compile()
    stats = replace(stats, compile_s=time.perf_counter() - start)
    compiled = getattr(compiled, "compiled", compiled)  # Equinox and Flax wrap it

    if hasattr(step.fn, "trace"):
        jaxpr, is_read = without_dead_code(step.fn.trace(*arguments).jaxpr)
        leaves = jax.tree.leaves(arguments)
        unread = [leaf for leaf, read in zip(leaves, is_read) if not read]
        stats = replace(
            stats,
            flops_min=product_flops(jaxpr) // (step.training_steps * devices),
            unused_bytes=tree_bytes(unread),
        )

    # XLA leaves out the FLOPs of library calls, and counts a loop body only once.
    # Discard its count if it is below that of the products alone.
    costs = compiled.cost_analysis() or {}
    if "flops" in costs and costs["flops"] >= (stats.flops_min or 0):
        stats = replace(stats, flops=int(costs["flops"]))

    collective, sent = collective_bytes(compiled.as_text(), devices)
    stats = replace(stats, collective_bytes=collective, sent_bytes=sent)
    memory = compiled.memory_analysis()
    return stats if memory is None else with_memory(stats, memory, step, stored_batches)


def with_memory(
    stats: CompilerStats, memory: Any, step: Step, stored_batches: int
) -> CompilerStats:
    """Adds what follows from XLA's memory analysis."""
    # Outputs that overwrite donated arguments are aliases.
    new_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    memory_bytes = memory.argument_size_in_bytes + new_bytes + memory.temp_size_in_bytes
    # jit drops arguments that the step does not read, but they stay in memory.
    memory_bytes += stats.unused_bytes or 0
    # The arguments include the features of only one batch.
    memory_bytes += (stats.kept_bytes or 0) * (stored_batches - 1)
    bytes_min = None
    if step.training_steps == 1:  # a scan may keep parameters in a cache
        bytes_min = memory.argument_size_in_bytes + (step.written_bytes or 0)
    return replace(
        stats,
        bytes_min=bytes_min,
        memory_bytes=memory_bytes,
        temp_bytes=memory.temp_size_in_bytes,
    )


def without_dead_code(closed_jaxpr: Any) -> tuple[Any, list[bool]]:
    """Eliminates dead code. Also returns, for each argument, whether it is used."""
    from jax.interpreters.partial_eval import dce_jaxpr

    jaxpr = closed_jaxpr.jaxpr
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Returns the jaxprs among an equation's parameters."""
    found = []
    for param in eqn.params.values():
        values = param if isinstance(param, tuple) else [param]
        for value in values:
            inner = getattr(value, "jaxpr", value)  # of a ClosedJaxpr
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def product_flops(jaxpr: Any) -> int:
    """Counts 2 FLOPs per multiplication in matrix products and convolutions."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = [product_flops(body) for body in inner_jaxprs(eqn)]
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
        else:  # a while loop is counted once because its trip count is unknown
            total += sum(inner)
    return total


def convolution_products(eqn: Any) -> int:
    """Counts the multiplications of a convolution.

    Zeros from padding or dilation do not count. The count of the rest is a product,
    with one factor per spatial axis.
    """
    image, kernel = (variable.aval.shape for variable in eqn.invars)
    output = eqn.outvars[0].aval.shape
    image_spec, kernel_spec, output_spec = eqn.params["dimension_numbers"]
    batch, out_channels = output[output_spec[0]], output[output_spec[1]]
    in_channels_per_group = kernel[kernel_spec[1]]
    count = batch * out_channels * in_channels_per_group
    for axis in range(len(image) - 2):
        # If image and kernel are all ones, each output is the number of kernel taps
        # that fall inside the image.
        taps = jax.lax.conv_general_dilated(
            jnp.ones((1, 1, image[image_spec[2 + axis]])),
            jnp.ones((1, 1, kernel[kernel_spec[2 + axis]])),
            window_strides=[eqn.params["window_strides"][axis]],
            padding=[eqn.params["padding"][axis]],
            lhs_dilation=[eqn.params["lhs_dilation"][axis]],
            rhs_dilation=[eqn.params["rhs_dilation"][axis]],
        )
        count *= int(np.asarray(taps, np.int64).sum())
    return int(count)


# %all-reduce.1 = (f32[8]{0:T(128)}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=1
OPERATION = re.compile(r" = (?P<result>\(.*?\)|\S+) (?P<name>[a-z-]+)\(")
# f32[8], bf16[2,3], pred[]
ARRAY = re.compile(r"\b(?:pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]")


def collective_bytes(hlo: str, devices: int) -> tuple[int, int]:
    """Adds up the bytes of the collectives in a program's HLO text.

    Returns:
        The bytes of their results on one device, and the bytes that one device sends
        for them, assuming ring algorithms. A collective in a loop counts once.
    """
    n = devices
    # Per byte of the result. The result of a reduce-scatter is 1/n of its input.
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
        # An asynchronous collective appears as all-reduce-start and all-reduce-done.
        # Skip -start. Count -done, whose result is that of the synchronous operation.
        name = operation["name"].removesuffix("-done")
        if name not in sent_per_byte:
            continue
        # On TPUs the same collective may appear in several fusions, with the same
        # channel_id.
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
    """Places a problem on a mesh of devices, each with its own copy of the batch.

    Args:
        problem: the problem; its leaves may be arrays or shapes.
        devices: the devices among which the rows are divided.
        sharded: also shard each parameter along its first evenly divisible axis.
            Otherwise each device stores all parameters.
        abstract: return shapes with shardings instead of arrays.
    """
    mesh = Mesh(np.array(devices), ("data",))

    def repeat(leaf: Any) -> Any:
        return jnp.concatenate([leaf] * len(devices)) if len(devices) > 1 else leaf

    def put_batch(leaf: Any) -> Any:
        if leaf.shape[:1] != (problem.batch_rows,):  # for instance a random key
            return put(leaf, NamedSharding(mesh, PartitionSpec()))
        rows = jax.eval_shape(repeat, leaf) if is_abstract(leaf) else repeat(leaf)
        return put(rows, NamedSharding(mesh, PartitionSpec("data")))

    params, batch = problem.params, problem.batch
    if abstract:
        params, batch = shapes_of((params, batch))
    return replace(
        problem,
        mesh=mesh,
        sharded=sharded,
        params=put_params(params, mesh, sharded),
        batch=jax.tree.map(put_batch, batch),
    )


def put_params(tree: Tree, mesh: Mesh, sharded: bool) -> Tree:
    """Puts parameters, or moments of them, on the devices of a mesh."""

    def put_param(leaf: Any) -> Any:
        divisible = [i for i, n in enumerate(leaf.shape) if n and n % mesh.size == 0]
        if not (sharded and divisible):
            return put(leaf, NamedSharding(mesh, PartitionSpec()))
        axes_before = [None] * divisible[0]
        return put(leaf, NamedSharding(mesh, PartitionSpec(*axes_before, "data")))

    return jax.tree.map(put_param, tree)


def put(leaf: Any, sharding: NamedSharding) -> Any:
    """Puts an array on devices, or adds the sharding to a shape."""
    if is_abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.device_put(leaf, sharding)


def new_state(problem: Problem, optimizer: Optimizer, params: Tree) -> Tree:
    """Returns a step's first state: copies of the parameters, and their moments.

    If the parameters are shapes, so is the state.
    """
    assert problem.mesh is not None, "place() comes first"

    def create(params: Tree) -> Tree:
        # Some optimizers store the parameters themselves, so copy the moments, too:
        # a step that donates its state must not delete the problem's arrays.
        return jax.tree.map(jnp.copy, (params, optimizer.init(params)))

    state = jax.eval_shape(create, params) if is_abstract(params) else create(params)
    return put_params(state, problem.mesh, problem.sharded)


def state_shardings(problem: Problem, optimizer: Optimizer, params: Tree) -> Tree:
    """Returns the sharding of each leaf of new_state()."""
    state = new_state(problem, optimizer, shapes_of(params))
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def bytes_to_write(
    problem: Problem, optimizer: Optimizer, case: Case
) -> tuple[int, int]:
    """Returns the bytes of the trainable parameters, without and with their moments.

    A step must write at least these. The state of some methods also contains frozen
    parameters, which need not be written.
    """
    trainable = problem.params
    if case.method != "everything":
        trainable, _ = mf.partition(problem.where, trainable)
    state = new_state(problem, optimizer, shapes_of(trainable))
    return tree_bytes(trainable), tree_bytes(state)


def shapes_of(tree: Tree) -> Tree:
    """Replaces each array of a tree by its shape."""
    return jax.eval_shape(lambda tree: tree, tree)


def is_abstract(tree: Tree) -> bool:
    """Returns whether a tree has shapes in place of arrays."""
    return isinstance(jax.tree.leaves(tree)[0], jax.ShapeDtypeStruct)


def devices_table(options: Namespace, problems: Sequence[Problem]) -> Tables:
    """Times or compiles one data-parallel step of the last problem."""
    problem, devices = problems[-1], usable_devices(options)
    title = describe(problem)

    def build(case: Case) -> Step:
        used = devices[: case.devices]
        if case.devices == 1 and not case.simulated:
            used = jax.local_devices()[:1]  # each process has its own
        sharded = case.layout == "sharded"
        return build_step(place(problem, used, sharded, case.simulated), case)

    one_device = baseline_case("devices", problem, options)
    simulated_cases: list[Case] = []
    for count in device_counts(options, len(devices)):
        case = replace(one_device, devices=count, platform=devices[0].platform)
        # Several CPU devices in one process share its cores, so timing them is
        # meaningless.
        shares_cores = case.platform == "cpu" and count > jax.process_count()
        if options.compile_only or shares_cores:
            simulated_cases += device_cases(replace(case, simulated=True))
        else:
            # Only results timed together are compared, so the single-device cases are
            # timed again with each device count.
            cases = device_cases(one_device)
            if count > 1:
                cases += device_cases(case)
            yield title, measure(cases, build, options)

    if simulated_cases:
        compiled_for = options.topology or devices[0].platform
        rows = measure(simulated_cases, build, options)
        yield f"{title}\nas compiled for {compiled_for}, not run", rows
        return
    # By default, also show what 8 devices would send.
    if not options.devices and jax.process_count() == 1:
        rows = compile_for_8_devices(options)
        yield f"{title}\nas compiled for cpu, not run", rows


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
    count = max(2, jax.process_count())
    while count <= available:
        counts.append(count)
        count *= 2
    return counts


def device_cases(case: Case) -> list[Case]:
    """Returns the cases of everything and partition, in each layout."""
    layouts = ["replicated"]
    # XLA's CPU backend uses all-reduce where its GPU and TPU backends use
    # reduce-scatter, so numbers for simulated sharded steps would be misleading.
    if case.devices > 1 and not (case.simulated and case.platform == "cpu"):
        layouts.append("sharded")
    cases = []
    for layout in layouts:
        for method in ("everything", "partition"):
            cases.append(replace(case, method=method, layout=layout))
    return cases


def usable_devices(options: Namespace) -> list[jax.Device]:
    """Returns the devices, taking one from each process in turn.

    The first n of them then include the same number from each process, if n is a
    multiple of the number of processes.
    """
    if options.topology:
        return topology_devices(options.topology)
    by_process: list[list[jax.Device]] = [[] for _ in range(jax.process_count())]
    for device in jax.devices():
        by_process[device.process_index].append(device)
    devices: list[jax.Device] = []
    for one_of_each in zip(*by_process):
        devices += one_of_each
    return devices


def topology_devices(name: str) -> list[jax.Device]:
    """Returns a pod's chips for ahead-of-time compilation; no TPU needed."""
    from jax.experimental import topologies

    # Otherwise libtpu looks for TPUs, and prints long warnings when it finds none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        if "not installed" in str(error):
            command = 'uv run --with "jax[tpu]" bench.py ...'
            raise ValueError(f"--topology needs the TPU compiler: {command}") from error
        names = "v5e:2x4, v5e:16x16, v6e:16x16 or v5p:4x4x4"
        message = f"--topology {name}: {error}; try, for example, {names}"
        raise ValueError(message) from error
    return list(topology.devices)


def compile_for_8_devices(options: Namespace) -> list[Row]:
    """Runs this script for 8 simulated CPU devices, and returns its rows.

    It takes a new process, because the number of simulated devices must be set before
    JAX starts.
    """
    arguments = []
    for name in ("model", "sizes", "batch", "dtype", "optimizer", "train", "freeze"):
        value = getattr(options, name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *map(str, values)]
    with TemporaryDirectory() as folder:
        file = Path(folder, "devices.json")
        command = [sys.executable, __file__, "--compile-only", "--devices", "8"]
        command += ["--json", str(file), *arguments]
        process = subprocess.run(
            command, cwd=options.start_directory, capture_output=True, text=True
        )
        if process.returncode != 0:
            _, _, last_line = process.stderr.strip().rpartition("\n")
            message = f"the simulation of 8 devices failed: {last_line}"
            raise ChildProcessError(message)
        rows: list[Row] = json.loads(file.read_text("utf-8"))["rows"]
    return rows


# ------------------------------------------------------------------- the other tables
def prefix_table(options: Namespace, problems: Sequence[Problem]) -> Tables:
    """One step with the first n layers frozen, for each n."""
    problem = place(problems[-1], jax.local_devices()[:1])
    layers = [f"linear_{i}" for i in range(len(problem.sizes) - 1)]
    baseline = baseline_case("prefix", problem, options)
    cases = [baseline]
    for frozen in range(1, len(layers)):
        for method in ("partition", "hoist"):
            cases.append(replace(baseline, method=method, frozen_layers=frozen))

    def build(case: Case) -> Step:
        where = layers[case.frozen_layers :]
        return build_step(replace(problem, where=where), case)

    title = f"{problem.name}: freeze the first layers of {sizes_text(problem.sizes)}"
    yield title, measure(cases, build, options)


RUN_STEPS = 10_000  # in the walk-through


def run_table(options: Namespace, problems: Sequence[Problem]) -> Tables:
    """A step of minifreeze's walk-through, run in a Python loop and in a scan."""
    sizes, rows, where = MLPS["seed"]
    problem = mlp("seed", sizes, rows, where, options.dtype)
    trainable, frozen = mf.partition(where, problem.params)
    xs, ys = mf.dataset(jax.random.key(1), RUN_STEPS, rows)
    xs = xs.astype(options.dtype)
    train_step = jax.jit(mf.train_step, donate_argnums=0)
    train = jax.jit(mf.train, donate_argnums=0)
    make_step = partial(
        Step,
        init=lambda: jax.tree.map(jnp.copy, trainable),
        trainable_bytes=tree_bytes(trainable),
    )
    loop = make_step(train_step, args=(frozen, xs[0], ys[0]), group="one step")
    one_step_scan = make_step(train, args=(frozen, xs[:1], ys[:1]), group="one step")
    scan = make_step(train, args=(frozen, xs, ys), training_steps=RUN_STEPS)

    baseline = baseline_case("run", problem, options)
    loop_case = replace(baseline, method="loop", optimizer="sgd")
    scan_case = replace(loop_case, method="scan")
    # The scan that measure() times takes many steps, so compare a one-step scan.
    check_same_step({loop_case: loop, scan_case: one_step_scan})
    steps = {loop_case: loop, scan_case: scan}
    title = (
        "seed: a step of the walk-through. The loop repeats one batch; "
        f"the scan reads {RUN_STEPS:,} different ones."
    )
    yield title, measure([loop_case, scan_case], lambda case: steps[case], options)


def peers_table(options: Namespace, problems: Sequence[Problem]) -> Tables:
    """The same step in other libraries."""
    # peers.py imports bench. Without this alias, a script would load a second copy of
    # itself, whose Case and Step are different classes.
    sys.modules["bench"] = sys.modules[__name__]
    peers = runpy.run_path(str(PEERS))
    yield from peers["peers_table"](options, problems)


PEERS = Path(__file__).parent / ".ci" / "peers.py"
TABLES: dict[str, Callable[[Namespace, Sequence[Problem]], Tables]] = {
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
    if not Path(file).is_file():
        raise ValueError(f"--model: there is no file {file}")
    with errors_of(options.model):
        module = import_file(file)
    if not hasattr(module, name):
        raise ValueError(f"{file} has no {name}()")
    with errors_of(options.model):
        returned = getattr(module, name)()
    if not isinstance(returned, tuple) or len(returned) not in (3, 4):
        expected = "(loss_fn, params, batch) or (loss_fn, params, batch, optimizer)"
        raise ValueError(f"{options.model} must return {expected}")

    loss, params, batch = returned[:3]
    if not isinstance(batch, (tuple, list)):
        kind = type(batch).__name__
        raise ValueError(f"{options.model}: the batch must be a tuple, not {kind}")
    params = arrays_of("parameter", params)
    batch = arrays_of("batch", tuple(batch))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"parameter {leaf_name(path)!r} is {leaf.dtype}, which cannot be "
                "differentiated; close over it in the loss function"
            )
    with errors_of(options.model):
        # Raises here if the loss cannot be differentiated.
        jax.eval_shape(jax.grad(loss), params, *batch)
    rows, tokens = count_rows(batch, options.batch)
    optimizer = returned[3] if len(returned) == 4 else None
    if optimizer is not None and not hasattr(optimizer, "update"):
        kind = type(optimizer).__name__
        raise ValueError(f"{options.model}: {kind} is not an optax optimizer")
    if optimizer is not None and options.optimizer != "sgd":
        raise ValueError(f"{options.model} returns an optimizer; omit --optimizer")
    return Problem(
        name=Path(file).stem,
        where=options.where,
        loss=loss,
        params=params,
        batch=batch,
        batch_rows=rows,
        tokens=tokens,
        optimizer=optimizer,
    )


def import_file(file: str) -> ModuleType:
    """Imports a file and keeps it in sys.modules, where dataclasses look it up."""
    sys.path.insert(0, str(Path(file).parent.resolve()))
    module = ModuleType("benchmarked_model")
    module.__file__ = file
    sys.modules[module.__name__] = module
    code = compile(Path(file).read_text("utf-8"), file, "exec")
    exec(code, vars(module))
    return module


@contextmanager
def errors_of(model: str) -> Iterator[None]:
    """Turns an exception in your code into ValueError, and prints its traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        package, _, _ = str(error.name).partition(".")
        command = f"uv run --with {package} bench.py ..."
        raise ValueError(f"{model}: {error}; try: {command}") from error
    except SystemExit as error:
        raise ValueError(f"{model} called sys.exit({error.code})") from error
    except Exception as error:
        traceback.print_exc()
        name = type(error).__name__
        raise ValueError(f"{model} raised {name}: {error}") from error


def arrays_of(kind: str, tree: Tree) -> Tree:
    """Converts each leaf to a JAX array; raises ValueError if one is not an array.

    Python numbers become arrays with a strong dtype. A weak type would be lost when the
    array is copied.
    """

    def as_array(path: Any, leaf: Any) -> jax.Array:
        try:
            array = jnp.asarray(leaf)
        except (TypeError, ValueError, OverflowError) as error:
            message = f"{kind} {leaf_name(path)!r} is of type {type(leaf).__name__}"
            raise ValueError(f"{message}, not an array: {error}") from error
        return jnp.asarray(array, array.dtype)  # which removes a weak type

    return jax.tree_util.tree_map_with_path(as_array, tree)


def count_rows(batch: Tree, given: int | None) -> tuple[int, int | None]:
    """Finds the number of rows: the common length of the data leaves' first axes.

    Returns:
        The rows, and the tokens per row if all data are token ids (rows, length).
    """
    data = []
    for leaf in jax.tree.leaves(batch):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if leaf.ndim > 0 and not is_key:
            data.append(leaf)
    lengths = sorted({leaf.shape[0] for leaf in data})
    if given is None and len(lengths) != 1:
        message = f"the first axes of the batch's leaves have lengths {lengths}"
        raise ValueError(f"{message}; pass the number of rows with --batch N")
    if given is not None and given not in lengths:
        raise ValueError(f"no leaf of the batch has a first axis of length {given}")

    rows = lengths[0] if given is None else given
    data = [leaf for leaf in data if leaf.shape[0] == rows]
    for leaf in data:
        is_token_ids = leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.integer)
        if not is_token_ids or leaf.shape != data[0].shape:
            return rows, None
    return rows, data[0].shape[1]


# ---------------------------------------------------------------------------- options
class Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, without the usage that argparse would add."""
        self.exit(2, f"bench.py: error: {message}\n")


def parse(argv: Sequence[str] | None) -> Namespace:
    """Reads the command line. Exits with status 2 on an invalid option."""
    parser = Parser(
        "bench.py",
        description=__doc__.partition("The benchmark comes first")[0],
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    names = [name for name in TABLES if name != "peers"]
    add("--tables", nargs="+", choices=names, metavar="TABLE", help=", ".join(names))
    add("--peers", action="store_true", help="compare with other libraries")
    add("--sizes", nargs="+", type=natural, metavar="N", help="layer widths for an MLP")
    add("--batch", type=natural, metavar="N", help="rows per batch on each device")
    selection = parser.add_mutually_exclusive_group()
    train_help, freeze_help = "train these leaves", "freeze these leaves"
    selection.add_argument("--train", nargs="+", metavar="PATTERN", help=train_help)
    selection.add_argument("--freeze", nargs="+", metavar="PATTERN", help=freeze_help)
    optimizer_help = "for models that do not return one (default: sgd)"
    add("--optimizer", choices=("sgd", "adam"), default="sgd", help=optimizer_help)
    dtype_help = "dtype of the built-in MLPs (default: float32)"
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, default="float32", help=dtype_help)
    model_help = "NAME() returns (loss_fn, params, batch); the loss is a mean over rows"
    add("--model", metavar="FILE.py:NAME", help=model_help)
    rounds_help = f"samples per row (default: {ROUNDS})"
    add("--rounds", type=natural, default=ROUNDS, metavar="N", help=rounds_help)
    batches_help = "batches per epoch; hoist stores the features of each (default: 1)"
    add("--batches", type=natural, default=1, metavar="N", help=batches_help)
    add("--devices", nargs="+", type=natural, metavar="N", help="device counts to test")
    compile_help = "compile for simulated devices without timing"
    add("--compile-only", action="store_true", help=compile_help)
    add("--topology", metavar="NAME", help="TPU pod to compile for, such as v5e:16x16")
    cluster_help = "join a SLURM, TPU or Kubernetes cluster"
    add("--cluster", action="store_true", help=cluster_help)
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    add("--processes", type=natural, metavar="N", help="number of processes")
    add("--process", type=int, metavar="I", help="index of this process, from 0")
    add("--json", type=Path, metavar="FILE", help="write the results, table by table")
    add("--plot", type=Path, metavar="FILE", help="draw the prefix and methods tables")
    options = parser.parse_args(argv)

    options.where = options.train
    if options.freeze:
        options.where = [inverted(pattern) for pattern in options.freeze]
    if options.coordinator or options.processes or options.process is not None:
        options.cluster = True
    options.tables = chosen_tables(options)
    # A model may change the working directory.
    options.start_directory = os.getcwd()
    for name in ("json", "plot"):
        file = getattr(options, name)
        if file is not None:
            setattr(options, name, file.resolve())
    check_options(options, parser.error)
    return options


def natural(text: str) -> int:
    """Parses a positive integer."""
    number = int(text)
    if not 0 < number < 2**31:
        raise ArgumentTypeError(f"must be positive and below 2**31, not {number}")
    return number


def inverted(pattern: str) -> str:
    """Turns a pattern for --freeze into one for --train: "a" into "!a" and back."""
    return pattern[1:] if pattern.startswith("!") else f"!{pattern}"


def chosen_tables(options: Namespace) -> list[str]:
    """Returns the named tables or, by default, those to which all options apply."""
    tables = ["methods", "prefix", "run", "devices"]
    if options.tables:
        tables = [table for table in tables if table in options.tables]
    elif options.compile_only or options.cluster or options.devices:
        tables = ["devices"]
    elif options.model:
        tables = ["methods"]
    elif options.where:
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
    if len(sizes) == 1:
        error("--sizes needs at least two widths")
    if len(set(counts)) < len(counts):
        error(f"--devices contains a duplicate: {counts}")

    if options.coordinator is not None:
        _, _, port = options.coordinator.rpartition(":")
        if not port.isdecimal() or int(port) >= 2**16:
            error(f"--coordinator must be HOST:PORT, not {options.coordinator}")
    address = (options.coordinator, options.processes, options.process)
    if any(value is not None for value in address) and None in address:
        error("--coordinator, --processes and --process go together")

    if options.model and not options.where:
        error("--model needs --train or --freeze")
    if options.model and ":" not in options.model:
        error(f"--model must be FILE.py:NAME, not {options.model}")
    if options.model and "prefix" in options.tables:
        error("--model does not work with the prefix table, which freezes MLP layers")
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

    if options.json and options.json == options.plot:
        error(f"--json and --plot must not be the same file: {options.json}")
    for file in (options.json, options.plot):
        if file and file.exists() and not file.is_file():
            error(f"{file} is not a regular file")


def options_without_effect(options: Namespace) -> Iterator[str]:
    if options.model and (options.sizes or options.dtype != "float32"):
        yield "--sizes and --dtype have no effect with --model."
    if options.compile_only and options.rounds != ROUNDS:
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
        if jax.process_count() == 1:
            raise
        failure = str(error).partition("\n")[0] or type(error).__name__
    check_cluster(failure, options)
    # Keep XLA's start-up cost out of the first row.
    jax.jit(jnp.sin).lower(1.0).compile()
    return problems


def check_devices(options: Namespace) -> None:
    available, processes = len(usable_devices(options)), jax.process_count()
    for count in options.devices or []:
        if count > available or count % processes:
            message = f"--devices {count}: {available} can be used here"
            if processes > 1:
                message += f", in multiples of the {processes} processes"
            raise ValueError(f"{message}; --compile-only simulates more")


def check_files(options: Namespace) -> None:
    """Raises an error early if an output file cannot be written."""
    for file in (options.json, options.plot):
        if file is not None:
            if not file.parent.is_dir():
                raise ValueError(f"{file}: there is no such directory")
            TemporaryDirectory(dir=file.parent).cleanup()
    if options.plot is not None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            command = "uv run --with matplotlib bench.py ..."
            raise ValueError(f"--plot needs matplotlib: {command}") from error
        formats = Figure().canvas.get_supported_filetypes()
        if options.plot.suffix[1:].lower() not in formats:
            endings = ", ".join(sorted(formats))
            raise ValueError(f"--plot {options.plot} must end in one of: {endings}")


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
    """Joins the cluster. Only process 0 prints and writes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if options.process == 0 and options.coordinator:
        _, _, port = options.coordinator.rpartition(":")
        # Check first: JAX aborts the process if the port is taken.
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(f"--coordinator {options.coordinator}: {error}") from error
    jax.distributed.initialize(
        options.coordinator,
        options.processes,
        options.process,
        initialization_timeout=60,
    )
    # JAX has replaced our SIGTERM handler in C. Python still has it on record, so set
    # it again to reinstall it.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    if jax.process_index() != 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def check_cluster(failure: str, options: Namespace) -> None:
    """Raises ValueError in all processes if one failed or has different options.

    Compares a checksum of the failure message and the options, because processes can
    exchange only arrays. multihost_utils.assert_equal would suffice, but in jax 0.5.1
    it never fails on process 0.
    """
    shared = dict(vars(options))
    for name in ("json", "plot", "process", "start_directory"):
        del shared[name]
    checksum = zlib.crc32(f"{failure}{shared}".encode())
    checksums = multihost_utils.process_allgather(np.uint32(checksum)).reshape(-1)
    others = np.flatnonzero(checksums != checksums[0])
    if failure:
        raise ValueError(failure)
    if others.size:
        raise ValueError(
            f"processes {others} differ from process 0: either a check failed in one "
            "of the processes, whose own message gives the reason, or their options "
            f"differ; the options of this process: {shared}"
        )


# -------------------------------------------------------------------------- the report
print_now = partial(print, flush=True)


class Report:
    """What a run has measured so far, and how it ended."""

    def __init__(self) -> None:
        self.options = Namespace(json=None, plot=None)
        self.machine: dict[str, Any] = {}
        self.tables: list[tuple[str, list[Row]]] = []  # titles and rows
        self.measuring = False  # whether the measurements have begun
        self.ended = "running"
        self.code = 0
        self.signal: int | None = None  # the last one
        self.signal_time = -math.inf

    def begin(self, dtype: str) -> None:
        """Describes the machine, and prints what applies to all tables."""
        self.measuring = True
        self.machine = describe_machine(self.options, dtype)
        print_now(machine_text(self.machine))
        print_now(legend(self.options))
        self.stop_if_interrupted()

    def add(self, title: str, rows: list[Row]) -> None:
        """Stores, writes and prints a table."""
        add_limits(rows, self.machine)
        self.tables.append((title, rows))
        try:
            write_json(self)
        finally:
            print_now(table_text(title, rows))
        self.stop_if_interrupted()

    def interrupt(self, number: int, frame: object) -> None:
        """Handles Ctrl-C and SIGTERM: raises KeyboardInterrupt during the run.

        Some shells and supervisors send a signal twice. A repeat within a second must
        not interrupt the handling of the first.
        """
        is_repeated = time.monotonic() < self.signal_time + 1
        self.signal, self.signal_time = number, time.monotonic()
        if self.ended == "running" and not is_repeated:
            raise KeyboardInterrupt

    def stop_if_interrupted(self) -> None:
        """Ends the run if time_rounds absorbed a signal."""
        if self.signal is not None:
            raise KeyboardInterrupt

    def fail(self, error: Exception) -> None:
        """Records an error: exit code 2 before the measurements began, else 1."""
        self.ended = f"error: {str(error) or type(error).__name__}"
        self.code = 1 if self.measuring else 2
        if self.measuring:
            needs_traceback = not isinstance(error, (OSError, FloatingPointError))
        else:
            needs_traceback = not isinstance(error, (OSError, ValueError))
        if needs_traceback:
            traceback.print_exception(error)


def finish(report: Report) -> NoReturn:
    """Writes the files, prints the conclusion, and ends the process.

    The exit code is 0, 1, 2, or 128 plus the signal number.
    """
    if report.tables and jax.process_index() == 0:
        for action in (write_json, write_plot, print_conclusion):
            try:
                action(report)
            except Exception as error:
                report.fail(error)

    code, message = report.code, report.ended.partition("\n")[0]
    if report.signal is not None:
        code = 128 + report.signal
        if report.ended == "complete":
            message = "interrupted after the last table; the results are complete"
    if code != 0:
        with suppress(OSError):
            print_now(f"bench.py: {message}", file=sys.stderr)
    if code in (0, 2):
        sys.exit(code)
    os._exit(code)  # a normal exit may hang in JAX's distributed shutdown


def print_conclusion(report: Report) -> None:
    text = conclusion([rows for _, rows in report.tables])
    if text:
        print_now(f"\n{text}")


def write_json(report: Report) -> None:
    file = report.options.json
    if file is None or jax.process_index() != 0:
        return
    rows: list[Row] = []
    for _, table_rows in report.tables:
        rows += table_rows
    results = {
        "card": report.machine,
        "complete": report.ended == "complete",
        "ended": report.ended,
        "rows": rows,
    }
    text = json.dumps(results, indent=1) + "\n"
    write_atomically(file, lambda temporary: temporary.write_text(text, "utf-8"))


def write_plot(report: Report) -> None:
    """Draws the prefix table and the last methods table, if they were timed."""
    timed_tables = {}
    for title, rows in report.tables:
        timed = [row for row in rows if row["step_s"] is not None]
        if timed and timed[0]["table"] in ("methods", "prefix"):
            timed_tables[timed[0]["table"]] = (title.partition("\n")[0], timed)
    if report.options.plot is not None and timed_tables:
        figure = draw(report.machine, timed_tables)
        write_atomically(report.options.plot, figure.savefig)


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes to a temporary file in the same directory, then renames it.

    Readers never see a partial file.
    """
    with TemporaryDirectory(dir=file.parent) as folder:
        temporary = Path(folder, file.name)
        write(temporary)
        temporary.replace(file)


# ------------------------------------------------------------------------ the machine
def describe_machine(options: Namespace, dtype: str) -> dict[str, Any]:
    """Describes the machine and the software, and measures the machine's peak rates."""
    devices = usable_devices(options)
    peak_flops, peak_bytes_per_s = None, None
    if not options.compile_only:
        peak_flops, peak_bytes_per_s = measure_peaks(dtype)
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
        "dtype": dtype,
        "peak_flops": peak_flops,
        "peak_bytes_per_s": peak_bytes_per_s,
        "commit": git("rev-parse", "HEAD"),
        "clean": git("status", "--porcelain") == "",
    }


PEAK_VECTOR_BYTES = 2**28  # larger than the caches of most CPUs and GPUs


def measure_peaks(dtype: str) -> tuple[float, float]:
    """Measures the peak FLOP/s and the peak bandwidth (bytes/s) of one device."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    matrix /= math.sqrt(side)  # repeated products neither vanish nor overflow

    multiply = jax.jit(lambda product, a: (product @ a, None))
    increment = jax.jit(lambda vector: (vector + 1, None), donate_argnums=0)
    size = PEAK_VECTOR_BYTES // 4  # of float32
    steps = {
        "product": Step(multiply, init=lambda: matrix, args=(matrix,)),
        "bandwidth": Step(increment, init=lambda: jnp.zeros(size, jnp.float32)),
    }
    timings = time_rounds(steps, rounds=5)
    product_s = min(timings["product"].samples)
    increment_s = min(timings["bandwidth"].samples)
    read_and_written = 2 * PEAK_VECTOR_BYTES
    return 2 * side**3 / product_s, read_and_written / increment_s


def dtype_of(params: Tree) -> str:
    """Returns the dtype of most parameters."""
    counts: Counter[str] = Counter()
    for leaf in jax.tree.leaves(params):
        counts[leaf.dtype.name] += leaf.size
    [(dtype, _)] = counts.most_common(1)
    return dtype


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = re.search(r"model name\s*: (.+)", info.read_text())
        if model is not None:
            return model[1]
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
NOT_TIMED: Row = {
    "step_s": None,  # median
    "spread_s": None,
    "samples": (),
    "speedup": None,  # relative to everything
    "differs": None,  # from everything, according to Timing.differs
    "rows_per_s": None,  # or tokens
    "efficiency": None,  # throughput per device, relative to a single device
    "limit_share": None,
    "once_s": None,  # to compute hoist's features of one batch
    "break_even": None,  # epochs until the features pay off
}


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Converts the results of a table to rows, with the ratios between them."""
    by_case = {result.case: result for result in results}
    return [row_of(result, by_case) for result in results]


def row_of(result: Result, by_case: Mapping[Case, Result]) -> Row:
    """Converts a result to a row."""
    case, timing = result.case, result.timing
    row = {
        **asdict(case),
        **asdict(result.stats),
        **NOT_TIMED,
        "label": label(case),
        "peak_memory_bytes": result.peak_memory_bytes,
        "remark": result.remark,
    }
    # Users of the JSON file find a row by its problem, method, optimizer and clipping.
    if case.table == "prefix":
        row["problem"] = f"{case.problem}, {case.frozen_layers} frozen"
    if not case.donate:
        row["method"] = f"{case.method}, not donated"
    if timing is None:
        return row

    row["step_s"], row["spread_s"] = timing.median, timing.spread
    row["samples"] = timing.samples
    row["rows_per_s"] = case.devices * case.batch_size / timing.median
    everything_case = replace(case, method="everything", donate=True, frozen_layers=0)
    baseline = by_case.get(everything_case)
    if baseline is not None and baseline.timing is not None:
        row["speedup"] = baseline.timing.median / timing.median
        row["differs"] = timing.differs(baseline.timing)
    one_device = by_case.get(replace(case, devices=1, layout="replicated"))
    if case.devices > 1 and one_device is not None and one_device.timing is not None:
        row["efficiency"] = one_device.timing.median / timing.median
    if result.features_timing is not None:
        row["once_s"] = result.features_timing.median
        partitioned = by_case.get(replace(case, method="partition"))
        if saves_no_work(result, partitioned):
            row["remark"] = NOTHING_TO_HOIST
        if row["remark"] != NOTHING_TO_HOIST:
            row["break_even"] = break_even(result.features_timing, timing, partitioned)
    return row


def saves_no_work(hoisted: Result, partitioned: Result | None) -> bool:
    """Returns whether hoist's step is known to have as many FLOPs as partition's."""
    if partitioned is None:
        return False
    mine, theirs = hoisted.stats, partitioned.stats
    if mine.flops is None or theirs.flops is None:
        return False
    if mine.flops_min is None or theirs.flops_min is None:
        return False
    # The latter also count elementwise operations, of which a few do not matter.
    return mine.flops_min >= theirs.flops_min and mine.flops >= 0.99 * theirs.flops


def break_even(
    once: Timing, hoisted: Timing, partitioned: Result | None
) -> float | None:
    """Returns the number of epochs until hoist pays off; None if it is not faster."""
    if partitioned is None or partitioned.timing is None:
        return None
    saved = partitioned.timing.median - hoisted.median
    if saved <= 0 or not hoisted.differs(partitioned.timing):
        return None
    return once.median / saved


def add_limits(rows: Sequence[Row], machine: Mapping[str, Any]) -> None:
    """Adds the limit to all rows that were timed, or to none, to avoid gaps."""
    timed = [row for row in rows if row["step_s"] is not None]
    limits = [limit_share(row, machine) for row in timed]
    if None not in limits:
        for row, limit in zip(timed, limits):
            row["limit_share"] = limit


def limit_share(row: Row, machine: Mapping[str, Any]) -> float | None:
    """Returns the shortest possible step time as a share of the measured time."""
    if row["flops_min"] is None or row["bytes_min"] is None:
        return None
    computing_s: float = row["flops_min"] / machine["peak_flops"]
    moving_s: float = row["bytes_min"] / machine["peak_bytes_per_s"]
    return max(computing_s, moving_s) / float(row["step_s"])


# ------------------------------------------------------------------------------- text
WIDTH = 100
NO_DIFFERENCE = "no difference seen"


class Column(NamedTuple):
    title: str
    cells: list[str]  # one for each row
    is_text: bool = False


def table_text(title: str, rows: Sequence[Row]) -> str:
    """Formats a title, the non-empty columns, and notes."""
    timed = any(row["step_s"] for row in rows)
    on_devices = rows[0]["layout"] is not None
    columns = [Column("method", [row["label"] for row in rows], is_text=True)]
    if on_devices:
        layouts = [row["layout"] for row in rows]
        columns.append(Column("devices", [str(row["devices"]) for row in rows]))
        columns.append(Column("layout", layouts, is_text=True))
    columns.append(time_column(rows))
    columns.append(Column("speed-up", [speedup_text(row) for row in rows]))
    columns.append(number_column("memory {prefix}B", rows, "memory_bytes"))
    if on_devices:
        columns.append(number_column("sent {prefix}B", rows, "sent_bytes"))
        columns.append(percent_column("efficiency %", rows, "efficiency"))
    if not (on_devices and timed):  # they would not all fit on a line
        rate_title = "{prefix} " + rows[0]["batch_unit"] + "/s"
        columns.append(percent_column("limit %", rows, "limit_share"))
        columns.append(number_column("{prefix}FLOP", rows, "flops"))
        columns.append(number_column(rate_title, rows, "rows_per_s"))

    lines = ["", title, *aligned(columns)]
    for row in rows:
        notes = [] if row["remark"] is None else [row["remark"]]
        # Rows with clipping or Adam would repeat these notes.
        if not row["clip"] and row["optimizer"] == rows[0]["optimizer"]:
            notes += hoist_notes(row)
        if notes:
            note = f"  {row['label']}: {'; '.join(notes)}."
            lines += textwrap.wrap(note, WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def time_column(rows: Sequence[Row]) -> Column:
    """Formats medians with three digits, and spreads with as many decimal places."""
    scale, prefix = si_prefix([row["step_s"] for row in rows])
    cells = []
    for row in rows:
        if row["step_s"] is None:
            cells.append("")
            continue
        median = three_digits(row["step_s"] / scale)
        decimals = len(median.partition(".")[2])
        spread = row["spread_s"] / scale
        cells.append(f"{median} ± {spread:.{decimals}f}")  # such as 24.3 ± 0.3
    return Column(f"{prefix}s per step", cells)


def number_column(title: str, rows: Sequence[Row], key: str) -> Column:
    """Formats a column of numbers, with the SI prefix of their unit in its title."""
    scale, prefix = si_prefix([row[key] for row in rows])
    cells = []
    for row in rows:
        cells.append("" if row[key] is None else three_digits(row[key] / scale))
    return Column(title.format(prefix=prefix).strip(), cells)


def percent_column(title: str, rows: Sequence[Row], key: str) -> Column:
    cells = []
    for row in rows:
        cells.append("" if row[key] is None else three_digits(100 * row[key]))
    return Column(title, cells)


def speedup_text(row: Row) -> str:
    if row["speedup"] is None:
        return ""
    if row["method"] != "everything" and row["differs"] is False:
        return NO_DIFFERENCE
    if row["speedup"] < 1:
        return f"{times(1 / row['speedup'])} slower"
    return times(row["speedup"])


def times(ratio: float) -> str:
    if 1 < ratio < 1.095:
        return f"{ratio:.2f}x"
    return f"{ratio:.1f}x" if ratio < 99.95 else f"{ratio:.0f}x"


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
    if abs(value) >= 999.5:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")


def aligned(columns: Sequence[Column]) -> list[str]:
    """Returns the lines of a table: text left-aligned, numbers right-aligned."""
    padded = []
    for column in columns:
        if not any(column.cells):
            continue
        lines = [column.title, *column.cells]
        width = max(len(line) for line in lines)
        if column.is_text:
            padded.append([line.ljust(width) for line in lines])
        else:
            padded.append([line.rjust(width) for line in lines])
    return ["  ".join(line).rstrip() for line in zip(*padded)]


def hoist_notes(row: Row) -> list[str]:
    """Describes the cost of hoist's features."""
    if row["once_s"] is None or row["remark"] == NOTHING_TO_HOIST:
        return []

    def cost(epochs: int) -> str:
        return quantity(row["step_s"] + row["once_s"] / epochs, "s")

    notes = [
        f"including the features: {cost(1)} per step over 1 epoch, {cost(3)} over 3, "
        f"{cost(10)} over 10"
    ]
    if row["break_even"] is not None:
        notes.append(f"pays off after {row['break_even']:.1f} epochs")
    notes.append(f"stores {quantity(row['kept_bytes'], 'B')} per batch")
    if row["unused_bytes"]:
        unused = quantity(row["unused_bytes"], "B")
        notes.append(
            f"{unused} of frozen parameters are no longer read and can be freed"
        )
    return notes


def describe(problem: Problem) -> str:
    """Returns a table's title, with a list of the parameters of your own model."""
    patterns = problem.where
    if not isinstance(patterns, str):
        patterns = " ".join(patterns)
    text = f"{problem.name}: train {patterns}"
    if problem.sizes:
        text += f" of {sizes_text(problem.sizes)}"
    text += f", batch {problem.batch_rows}"
    if problem.tokens is not None:
        text += f" x {problem.tokens} tokens"
    text = textwrap.fill(text, WIDTH)
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


def machine_text(machine: Mapping[str, Any]) -> str:
    text = (
        f"{machine['date']}: jax {machine['jax']}; {machine['device_count']} x "
        f"{machine['device_kind']} ({machine['platform']}); {machine['cpu']}; "
        f"{machine['dtype']}"
    )
    if machine["peak_flops"] is not None:
        flops = quantity(machine["peak_flops"], "FLOP/s")
        text += f"; peak {flops}, {quantity(machine['peak_bytes_per_s'], 'B/s')}"
    return textwrap.fill(text, WIDTH)


def legend(options: Namespace) -> str:
    """Explains the columns of all tables."""
    lines = []
    if not options.compile_only:
        lines.append(
            "Before timing, each method's update is checked against that of the first "
            "method with the same clipping. The check always uses SGD. Times are "
            "median ± median absolute deviation. Speed-ups are relative to the "
            f'"everything" row; "{NO_DIFFERENCE}" means that neither won '
            f"significantly more rounds (sign test, {SIGNIFICANCE:.0%} level). Limit "
            "is an estimated lower bound on the step time, as a share of the measured "
            "time. It is the larger of two times at measured peak rates: the time for "
            "the matrix products, and the time for reading all arguments and writing "
            "the trainable parameters and their optimizer state. A step can beat it if "
            "data stays in a cache, if it reads only part of an argument, such as an "
            "embedding table, or if it computes in a smaller dtype than that of the "
            "parameters."
        )
    lines.append(
        "Memory is per device, according to the compiler: parameters, optimizer state, "
        "batch, results, temporary arrays, and hoist's features for one epoch."
    )
    if "devices" in options.tables:
        lines.append(
            "Sent is what each device sends per step, derived from the compiled "
            "program and assuming ring collectives. (XLA's CPU backend sums bfloat16 "
            "in float32, so bfloat16 traffic appears twice as large as on a TPU.)"
        )
    lines += options_without_effect(options)
    return "\n".join(textwrap.fill(line, WIDTH) for line in lines)


# --------------------------------------------------------------------- the conclusion
def conclusion(tables: Sequence[Sequence[Row]]) -> str:
    """Returns the conclusion, in a few sentences."""
    last_rows: dict[str, Sequence[Row]] = {}  # of each kind of table
    for rows in tables:
        kind = rows[0]["table"]
        # Simulated devices do not replace real ones.
        if kind not in last_rows or not rows[0]["simulated"]:
            last_rows[kind] = rows
    lines = []
    if "methods" in last_rows:
        lines.append(conclude_methods(last_rows["methods"]))
    if "devices" in last_rows:
        lines.append(conclude_devices(last_rows["devices"]))
    return "\n".join(textwrap.fill(line, WIDTH) for line in lines if line)


def find_row(rows: Sequence[Row], **wanted: Any) -> Row | None:
    """Returns the first row with these values."""
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row
    return None


def conclude_methods(rows: Sequence[Row]) -> str:
    problem, optimizer = rows[0]["problem"], rows[0]["optimizer"]
    if 0 < max(len(row["samples"]) for row in rows) < MIN_ROUNDS:
        return f"{problem}: at least {MIN_ROUNDS} rounds are needed for a verdict."
    partition_row = find_row(rows, method="partition", optimizer=optimizer, clip=False)
    sentences = [f"{problem}: {conclude_partition(partition_row)}"]

    adam_all = find_row(rows, method="everything", optimizer="adam", clip=False)
    adam_part = find_row(rows, method="partition", optimizer="adam", clip=False)
    if adam_all is not None and adam_part is not None:
        all_bytes, part_bytes = adam_all["memory_bytes"], adam_part["memory_bytes"]
        if all_bytes is not None and part_bytes is not None and part_bytes < all_bytes:
            saved = quantity(all_bytes - part_bytes, "B")
            sentences.append(
                f"With Adam, partition needs {saved} less memory than training all "
                "parameters."
            )

    hoist_row = find_row(rows, method="hoist", optimizer=optimizer, clip=False)
    if hoist_row is not None:
        sentences.append(conclude_hoist(hoist_row, partition_row))
    return " ".join(sentences)


def conclude_partition(row: Row | None) -> str:
    if row is None or row["speedup"] is None:
        return (
            "partition could not be compared with training everything because one of "
            "them was not timed."
        )
    if not row["differs"]:
        return "partition was not measurably faster or slower than training everything."
    if row["speedup"] < 1:
        slowdown = times(1 / row["speedup"])
        return f"train everything; partition is {slowdown} slower."
    speedup = times(row["speedup"])
    return f"use partition, which is {speedup} faster than training everything."


def conclude_hoist(row: Row, partition_row: Row | None) -> str:
    if row["remark"] == NOTHING_TO_HOIST:
        return "There is nothing to hoist."
    if not row["samples"] or partition_row is None or not partition_row["samples"]:
        return (
            "hoist could not be compared with partition because one of them was not "
            "timed."
        )
    if not Timing(row["samples"]).differs(Timing(partition_row["samples"])):
        return (
            "Even with repeated batches, hoist was not measurably faster or slower "
            "than partition."
        )
    ratio = partition_row["step_s"] / row["step_s"]
    if ratio < 1:
        slowdown = times(1 / ratio)
        return f"Do not use hoist: its step is {slowdown} slower than partition's."
    # If it takes 1.2 epochs to break even, hoist gains from the second epoch on.
    first_gain = math.floor(row["break_even"]) + 1
    return (
        f"If batches repeat, a hoist step is {times(ratio)} faster than a partition "
        f"step; computing the features up front pays off from epoch {first_gain} "
        f"on, and storing them takes {quantity(row['kept_bytes'], 'B')} per batch."
    )


def conclude_devices(rows: Sequence[Row]) -> str:
    sending = [row for row in rows if row["sent_bytes"]]
    if not sending:
        return ""
    devices, layout = sending[-1]["devices"], sending[-1]["layout"]
    partition_row = find_row(
        sending, method="partition", devices=devices, layout=layout
    )
    everything_row = find_row(
        sending, method="everything", devices=devices, layout=layout
    )
    if partition_row is None or everything_row is None:
        return ""
    if partition_row["simulated"]:
        layout += ", as compiled"
    return (
        f"{partition_row['problem']}: each of {devices} devices ({layout}) sends "
        f"{quantity(partition_row['sent_bytes'], 'B')} per step with partition, and "
        f"{quantity(everything_row['sent_bytes'], 'B')} when training everything."
    )


# --------------------------------------------------------------------------- the plot
def draw(
    machine: Mapping[str, Any], tables: Mapping[str, tuple[str, Sequence[Row]]]
) -> Any:
    """Plots the time per step by frozen layers and by method, with error bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(tables), 4.8), layout="constrained", dpi=150)
    is_cpu = machine["platform"] == "cpu"
    hardware = machine["cpu"] if is_cpu else machine["device_kind"]
    figure.suptitle(
        f"{hardware}, {machine['dtype']}, jax {machine['jax']}, {machine['date']}"
    )
    all_axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, table in zip(all_axes, tables):
        title, rows = tables[table]
        axes.set_title(title, fontsize="medium")
        if table == "prefix":
            draw_prefix(axes, rows)
        else:
            draw_methods(axes, rows)
    return figure


def draw_prefix(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator

    for method in ("partition", "hoist"):
        shown = [row for row in rows if row["method"] in ("everything", method)]
        frozen = [row["frozen_layers"] for row in shown]
        medians_ms, spreads_ms = milliseconds(shown)
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
    medians_ms, spreads_ms = milliseconds(rows)
    names = [row["label"] for row in rows]
    axes.barh(names, medians_ms, xerr=spreads_ms, capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel="ms per step", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")


def milliseconds(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Returns the medians and the spreads."""
    medians = [1e3 * row["step_s"] for row in rows]
    spreads = [1e3 * row["spread_s"] for row in rows]
    return medians, spreads


if __name__ == "__main__":
    main()
