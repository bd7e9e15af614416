# /// script
# requires-python = ">=3.10"
# dependencies = ["jax>=0.5.1", "numpy"]
# ///
# SPDX-License-Identifier: MIT
"""bench: what freezing buys on this machine, across its devices, for your model.

    python bench.py                                      # every table, under 90 seconds
    python bench.py --model mine.py:make --train 'head/*'          # your own model
    python bench.py --devices 8 64 512 --compile-only    # a cluster, planned on a laptop
    python bench.py --json run.json --plot run.png       # to keep; --render run.json: Markdown

To decide whether to freeze, what, and how, one needs to know what a step costs then. The
bench prints what it runs on and, as soon as each row is there, the tables:

    methods   five ways to hold layers still, plain and with clipping by global norm
    prefix    the first 0, 1, 2, ... layers frozen
    devices   data-parallel: the step's time, and the bytes that devices send each other
    run       10,000 steps of the walk-through: a dispatch a step, or one for all (scan)
    peers     the same step in Haiku, Equinox, Flax NNX and optax (with --peers)

A row has the median step time and its spread (median absolute deviation), its ratio to
training everything, compile time, XLA's FLOPs beside the least that the maths needs, the
share of the measured peak, and the bytes that are temporary, that train, that are sent. Time
is taken in rounds, each case once a round, and ratios within a round, so that a machine that
slows down slows them all. Before it times methods that must agree, the bench makes sure that
they do. FLOPs and bytes are read from the compiled program, the same on every machine of a kind.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path

import minifreeze as mf

PyTree: TypeAlias = Any
Step: TypeAlias = Callable[..., tuple[PyTree, Any]]  # (state, *args) -> (state, loss)

# jax leaves these without types.
wait: Callable[[PyTree], PyTree] = jax.block_until_ready
configure: Callable[[str, Any], None] = jax.config.update
Spec: Any = PartitionSpec

RATE, CLIP = 0.1, 0.1  # a norm that the problems' gradients exceed, so that clipping clips
SAMPLE_S = 0.01  # what is timed takes at least this long, far above the clock's grain
JOIN_S, SILENCE_S = 60, 60  # how long a process waits for the cluster, how long it may be silent
OUT_OF_MEMORY = " (out of memory)"
RUN_STEPS = 10_000


class Refused(Exception):
    """What was asked for cannot be done: one line on stderr, exit code 2."""


class Broken(Exception):
    """The measurement cannot be trusted: one line on stderr, exit code 1."""


# ------------------------------------------------------------------------------- the rows


@dataclass
class Row:
    """One line of a table and of the JSON, in its keys and their order; None: no such figure.

    ``vs_all`` compares with ``all`` of the same problem, clipping and layout; ``peak_share``
    is ``flops`` a second over the peak; FLOPs, temporary bytes and ``collective_bytes`` are
    those of one step on one device.
    """

    table: str
    problem: str
    method: str
    clip: bool = False
    platform: str = dataclasses.field(default_factory=jax.default_backend)
    devices: int = 1
    simulated: bool = False
    layout: str | None = None
    step_s: float | None = None
    spread_s: float | None = None
    vs_all: float | None = None
    compile_s: float | None = None
    flops: int | None = None
    flops_min: int | None = None
    peak_share: float | None = None
    temp_bytes: int | None = None
    trainable_bytes: int | None = None
    collective_bytes: int | None = None


def quantity(value: float | None, unit: str) -> str:
    """Three digits with a prefix, nothing for None.

    >>> quantity(0.0012345, "s"), quantity(82, "B"), quantity(1.885e9, ""), quantity(None, "s")
    ('1.23 ms', '82 B', '1.89 G', '')
    """
    if value is None:
        return ""
    if isinstance(value, int) and value < 1000:
        return f"{value} {unit}".rstrip()
    exponent = int(f"{value:.2e}".partition("e")[2])  # of the rounded value: 999.9 is 1.00 k
    prefix = {
        -5: "f",
        -4: "p",
        -3: "n",
        -2: "µ",
        -1: "m",
        0: "",
        1: "k",
        2: "M",
        3: "G",
        4: "T",
        5: "P",
    }
    scaled = value / 1000 ** (exponent // 3)
    return f"{scaled:.{2 - exponent % 3}f} {prefix[exponent // 3]}{unit}".rstrip()


@dataclass(frozen=True)
class Column:
    title: str
    width: int
    cell: Callable[[Row], str]
    devices_only: bool = False

    def shown_in(self, table: str) -> bool:
        return table == "devices" or not self.devices_only


def _count(row: Row) -> str:
    return f"{row.devices} {row.platform}{' simulated' if row.simulated else ''}"


COLUMNS = (
    Column("problem", 14, lambda row: row.problem),
    Column("method", 15, lambda row: row.method),
    Column("clip", 4, lambda row: "yes" if row.clip else ""),
    Column("devices", 15, _count, devices_only=True),
    Column("layout", 10, lambda row: row.layout or "", devices_only=True),
    Column("step", 8, lambda row: quantity(row.step_s, "s")),
    Column("±", 8, lambda row: quantity(row.spread_s, "s")),
    Column("vs all", 7, lambda row: "" if row.vs_all is None else f"{row.vs_all:.3f}x"),
    Column("compile", 8, lambda row: quantity(row.compile_s, "s")),
    Column("FLOPs", 7, lambda row: quantity(row.flops, "")),
    Column("least", 7, lambda row: quantity(row.flops_min, "")),
    Column("of peak", 7, lambda row: "" if row.peak_share is None else f"{row.peak_share:.1%}"),
    Column("temp", 8, lambda row: quantity(row.temp_bytes, "B")),
    Column("trains", 8, lambda row: quantity(row.trainable_bytes, "B")),
    Column("sent", 8, lambda row: quantity(row.collective_bytes, "B"), devices_only=True),
)
NAMES = ("problem", "method", "clip", "devices", "layout")  # set to the left


def line(cells: Sequence[str], columns: Sequence[Column]) -> str:
    """Cells under each other on the screen, widths known before the rows are."""
    return "  ".join(
        cell.ljust(column.width) if column.title in NAMES else cell.rjust(column.width)
        for cell, column in zip(cells, columns)
    ).rstrip()


def card_text(card: dict[str, Any]) -> str:
    """What a run ran on, in a line."""
    return (
        f"jax {card['jax']}, jaxlib {card['jaxlib']}, numpy {card['numpy']}, "
        f"Python {card['python']}; {card['device_count']} x {card['device_kind']} "
        f"({card['platform']}); {card['cpu']}; {card['date']}; {card['dtype']} products at "
        f"{quantity(card['peak_flops'], 'FLOP/s') or 'no measured rate'}"
    )


def render(results: dict[str, Any], tables: Sequence[str]) -> str:
    """The results of a run as Markdown: what it ran on, and its tables' columns with figures."""
    rows = [Row(**row) for row in results["rows"]]
    parts = [card_text(results["card"]) + ("" if results["complete"] else "; interrupted")]
    for table in tables:
        if chosen := [row for row in rows if row.table == table]:
            parts.append(f"**{table}**: {TABLES[table].says}\n\n{_markdown(chosen)}")
    return "\n\n".join(parts)


def _markdown(rows: Sequence[Row]) -> str:
    columns = [
        column
        for column in COLUMNS
        if column.shown_in(rows[0].table) and any(column.cell(row) for row in rows)
    ]
    rule = ["---" if column.title in NAMES else "---:" for column in columns]
    lines = [[column.title for column in columns], rule]
    lines += [[column.cell(row) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


class Report:
    """Prints rows as they come, holds them, and writes them down at the end."""

    def __init__(self, card: dict[str, Any], json_file: str | None, plot_file: str | None):
        self.card, self.rows = card, list[Row]()
        self.json_file, self.plot_file = json_file, plot_file

    def say(self, text: str) -> None:
        if jax.process_index() == 0:
            print(text, flush=True)

    def add(self, row: Row) -> None:
        columns = [column for column in COLUMNS if column.shown_in(row.table)]
        if not self.rows or self.rows[-1].table != row.table:
            self.say(f"\n{row.table}: {TABLES[row.table].says}")
            self.say(line([column.title for column in columns], columns))
        self.rows.append(row)
        self.say(line([column.cell(row) for column in columns], columns))

    def finish(self, complete: bool) -> None:
        """Writes what there is: all of it, or what an interruption left."""
        if jax.process_index() != 0:
            return
        if not complete:
            self.say(f"\nnot complete: ended after {len(self.rows)} rows")
        rows = [dataclasses.asdict(row) for row in self.rows]
        if self.json_file is not None:
            results = {"card": self.card, "complete": complete, "rows": rows}
            with replaced(self.json_file) as path, open(path, "w", encoding="utf-8") as file:
                json.dump(results, file, indent=1, allow_nan=False)
                file.write("\n")
            self.say(f"written: {self.json_file}")
        if self.plot_file is not None and any(row.step_s for row in self.rows):
            draw(self.rows, self.plot_file)
            self.say(f"drawn: {self.plot_file}")


@contextlib.contextmanager
def replaced(target: str, keep: bool = True) -> Iterator[str]:
    """A file to write beside ``target``, which takes its place once it is whole."""
    target = os.path.realpath(target)
    beside = f"{target}.{os.getpid()}.part"
    try:
        yield beside
        if keep:
            os.replace(beside, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)


def draw(rows: Sequence[Row], target: str) -> None:
    """Draws time against frozen layers, a line a method, and the methods as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
    timed = [row for row in rows if row.step_s is not None]
    left, right = figure.subplots(1, 2)
    _draw_prefix(left, [row for row in timed if row.table == "prefix"])
    _draw_methods(right, [row for row in timed if row.table == "methods"])
    with replaced(target) as path:
        figure.savefig(path, dpi=200, format=extension(target))


COLORS = {
    "all": "#777777",
    "partition": "#0072b2",
    "hoist": "#009e73",
    "stop_gradient": "#e69f00",
    "mask": "#d55e00",
}


def _draw_prefix(axis: Any, rows: Sequence[Row]) -> None:
    axis.set(yscale="log", xlabel="layers frozen, from the first", ylabel="ms a step")
    axis.set_title(f"{rows[0].problem.partition(',')[0]}, layer by layer" if rows else "prefix")
    for method in dict.fromkeys(row.method for row in rows):
        chosen = [row for row in rows if row.method == method]
        counts = [int(row.problem.split()[1]) for row in chosen]  # "deep, 3 frozen"
        times = [1e3 * (row.step_s or 0) for row in chosen]
        axis.plot(counts, times, "o-", color=COLORS[method], label=method)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    _tidy(axis, "lower left", 1)


def _draw_methods(axis: Any, rows: Sequence[Row]) -> None:
    problem = rows[-1].problem if rows else "methods"
    methods = list(dict.fromkeys(row.method for row in rows))
    styles = [(False, -0.2, "", "plain"), (True, 0.2, "////", "clipped by global norm")]
    for clip, aside, hatch, label in styles:
        chosen = [row for row in rows if (row.problem, row.clip) == (problem, clip)]
        places = [methods.index(row.method) + aside for row in chosen]
        times = [1e3 * (row.step_s or 0) for row in chosen]
        colors = [COLORS[row.method] for row in chosen]
        bars = axis.bar(
            places, times, 0.38, color=colors, hatch=hatch, edgecolor="white", label=label
        )
        axis.bar_label(bars, fmt="{:.3g}", fontsize=8)
    axis.set(title=f"{problem}, ways to freeze", ylabel="ms a step", yscale="log")
    axis.set_xticks(range(len(methods)), methods)
    if rows:
        axis.set_ylim(top=3 * axis.get_ylim()[1])  # room for the legend
    _tidy(axis, "upper right", 2)


def _tidy(axis: Any, place: str, columns: int) -> None:
    axis.yaxis.set_major_formatter("{x:g}")
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, loc=place, ncols=columns)


# --------------------------------------------------------------- the problems and methods


@dataclass(frozen=True)
class Data:
    """The parameters and the batch of a problem: their shapes, and they, when first needed."""

    draw: Callable[[], tuple[PyTree, tuple[PyTree, ...]]]

    @functools.cached_property
    def shapes(self) -> tuple[PyTree, tuple[PyTree, ...]]:
        shapes: tuple[PyTree, tuple[PyTree, ...]] = jax.eval_shape(self.draw)
        return shapes

    @functools.cached_property
    def arrays(self) -> tuple[PyTree, tuple[PyTree, ...]]:
        return self.draw()


@dataclass(frozen=True)
class Problem:
    """What trains, by which ``loss(params, *batch)``, on what."""

    name: str
    where: mf.Where
    loss: Callable[..., jax.Array]
    data: Data
    sizes: tuple[int, ...] = ()  # of the MLP; a model of the user's has none
    batch: int = 0


def mlp(name: str, sizes: Sequence[int], batch: int, where: mf.Where, dtype: Any) -> Problem:
    """The module's MLP, on ``batch`` rows of noise."""

    def draw() -> tuple[PyTree, tuple[PyTree, ...]]:
        key_w, key_x, key_y = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(key_x, (batch, sizes[0]), dtype)
        y = jax.random.randint(key_y, (batch,), 0, sizes[-1])
        return _init(key_w, tuple(sizes), dtype), (x, y)

    return Problem(name, where, mlp_loss, Data(draw), tuple(sizes), batch)


_init = jax.jit(mf.init, static_argnums=(1, 2))


def mlp_loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    return mf.loss_fn(*mf.partition("*", params), x, y)


PROBLEMS = {
    "seed": ((1, 300, 100, 10), 10, ["linear_0", "linear_2"]),
    "wide": ((784, 1024, 1024, 10), 128, ["linear_0", "linear_2"]),
    "deep": ((1024, 2048, 2048, 2048, 2048, 10), 64, ["linear_4"]),
}


def refuse_misfits(problem: Problem) -> None:
    """Refuses a choice that takes no leaf of the parameters, or trains none."""
    try:
        trainable, _ = mf.partition(problem.where, problem.data.shapes[0])
    except ValueError as error:
        raise Refused(f"{problem.name}: {error}") from None
    if not jax.tree.leaves(trainable):
        raise Refused(f"{problem.name}: nothing trains with {problem.where!r}")


def load_model(spec: str, where: mf.Where) -> Problem:
    """The problem in FILE.py:NAME, where NAME() gives (loss_fn, params, batch)."""
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name:
        raise Refused(f"--model {spec}: name it FILE.py:NAME")
    if not os.path.isfile(file):
        raise Refused(f"--model {spec}: there is no file {file}")
    found = importlib.util.spec_from_file_location("bench_model", file)
    if found is None or found.loader is None:
        raise Refused(f"--model {spec}: {file} cannot be imported")
    module = importlib.util.module_from_spec(found)
    sys.modules["bench_model"] = module  # where a dataclass looks for its module
    sys.path.insert(0, os.path.dirname(os.path.abspath(file)))
    found.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise Refused(f"--model {spec}: {file} has no function {name}")
    return _model_problem(spec, getattr(module, name)(), where)


def _model_problem(spec: str, made: Any, where: mf.Where) -> Problem:
    wanted = f"--model {spec}: it must return (loss_fn, params, batch)"
    if not isinstance(made, tuple | list) or len(made) != 3:
        raise Refused(f"{wanted}, got {_kind(made)}")
    loss, params, batch = made
    if not callable(loss) or not isinstance(batch, tuple | list):
        raise Refused(f"{wanted}, a function, a tree and a tuple, got {_kind(made)}")
    for path, leaf in tree_flatten_with_path((params, tuple(batch)))[0]:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise Refused(f"{wanted} of arrays, got {type(leaf).__name__} at {_name(path)!r}")
    params, batch = jax.tree.map(jnp.asarray, (params, tuple(batch)))
    for path, leaf in tree_flatten_with_path(params)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise Refused(
                f"{wanted}, and {_name(path)!r} in params is {leaf.dtype}, which cannot train: "
                "hand it in with the batch"
            )
    if not _is_scalar(out := jax.eval_shape(loss, params, *batch)):
        raise Refused(f"{wanted}, and loss_fn(params, *batch) a floating-point number, not {out}")
    return Problem(spec.rpartition(":")[2], where, loss, Data(lambda: (params, batch)))


def _is_scalar(out: Any) -> bool:
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    return shape == () and dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _kind(made: Any) -> str:
    if isinstance(made, tuple | list):
        return f"({', '.join(type(item).__name__ for item in made)})"
    return type(made).__name__


def _name(path: Any) -> str:
    return keystr(path, simple=True, separator="/")


@dataclass(frozen=True)
class Method:
    """A jitted step ``step(state, *args)``, how to lay out its arguments, and to read them."""

    step: Step
    arrange: Callable[[PyTree, tuple[PyTree, ...]], tuple[PyTree, ...]]
    params: Callable[..., PyTree]  # (state, *args) -> the parameters


def method_of(name: str, problem: Problem, clip: bool = False) -> Method:
    """One way to take an SGD step on what trains and hold the rest still.

    ``partition`` and ``hoist`` differentiate what trains, and their state is that alone;
    ``stop_gradient`` and ``mask`` differentiate all parameters, and get or make zeros for the
    frozen. ``all`` freezes nothing. Data, frozen leaves and features are arguments: XLA would
    fold what a closure holds into the program, and the step would seem to cost nothing.
    """
    where, loss = problem.where, problem.loss

    def loss_of_parts(trainable: PyTree, frozen: PyTree, *batch: PyTree) -> jax.Array:
        return loss(mf.merge(trainable, frozen), *batch)

    def loss_stopped(params: PyTree, *batch: PyTree) -> jax.Array:
        trainable, frozen = mf.partition(where, params)
        return loss(mf.merge(trainable, jax.lax.stop_gradient(frozen)), *batch)

    def masked(grads: PyTree) -> PyTree:
        return jax.tree.map(lambda g, trains: g * trains, grads, mf.mask(where, grads))

    def whole(params: PyTree, batch: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        return params, *batch

    def parts(params: PyTree, batch: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        return *mf.partition(where, params), *batch

    def first(params: PyTree, *args: PyTree) -> PyTree:
        return params

    def merged(trainable: PyTree, frozen: PyTree, *args: PyTree) -> PyTree:
        return mf.merge(trainable, frozen)

    if name == "hoist":
        shapes, shapes_of_batch = problem.data.shapes
        once, rest = mf.hoist(loss_of_parts, *mf.partition(where, shapes), *shapes_of_batch)

        def parts_once(params: PyTree, batch: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            trainable, frozen = mf.partition(where, params)
            return trainable, frozen, jax.jit(once)(frozen, *batch)

        return Method(sgd(rest, [], clip), parts_once, merged)
    if name == "partition":
        return Method(sgd(loss_of_parts, [], clip), parts, merged)
    if name == "stop_gradient":
        return Method(sgd(loss_stopped, [], clip), whole, first)
    return Method(sgd(loss, [masked] if name == "mask" else [], clip), whole, first)


def sgd(
    loss: Callable[..., jax.Array], transforms: Sequence[Callable[[PyTree], PyTree]], clip: bool
) -> Step:
    """The jitted step on the loss's first argument, its gradients transformed, then clipped."""

    @jax.jit
    def step(state: PyTree, *args: PyTree) -> tuple[PyTree, jax.Array]:
        value, grads = jax.value_and_grad(loss)(state, *args)
        for transform in [*transforms, clip_by_global_norm] if clip else transforms:
            grads = transform(grads)
        return mf.sgd_step(state, grads, RATE), value

    return step


def clip_by_global_norm(grads: PyTree) -> PyTree:
    """Shortens the gradients to a norm of CLIP over all that there are: it reads them all."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    scale = jnp.minimum(1, CLIP / norm)
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)


# ---------------------------------------------------------------------- the exact figures


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
    trains = mf.mask("*" if method == "all" else problem.where, problem.data.shapes[0])
    products = [2 * problem.batch * n_in * n_out for n_in, n_out in pairwise(problem.sizes)]
    layers = [trains[f"linear_{i}"] for i in range(len(products))]
    lowest = min(i for i, layer in enumerate(layers) if layer["w"] or layer["b"])
    total = 0
    for i, (layer, product) in enumerate(zip(layers, products)):
        hoisted = method == "hoist" and (i < lowest or (i == lowest and not layer["w"]))
        total += product * ((not hoisted) + layer["w"] + (i > lowest))
    return total


# An asynchronous collective is a -start and a -done; the -done has the result's shape alone.
_COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) "
    r"(?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-done)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collective_bytes(hlo: str) -> int:
    """The bytes that the collectives of a compiled program leave on each device.

    >>> collective_bytes("%r = (f32[10]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=1")
    52

    It is the size of their results, by the program's text: for an all-reduce what every
    device hands in, for an all-gather all of what is gathered. How many times these bytes
    cross a wire is the network's affair. A collective in a loop counts once.
    """
    total = 0
    for shapes in _COLLECTIVE.findall(hlo):
        for name, bits, axes in _ARRAY.findall(shapes):
            size = math.prod(int(n) for n in axes.split(",") if n)
            total += size if name == "pred" else size * int(bits) // 8
    return total


def compile_step(row: Row, step: Any, *args: PyTree) -> None:
    """Compiles a jitted step and notes what XLA says of it; a later call need not compile."""
    lower = getattr(step, "lower", None)
    if lower is None:  # nnx.jit before flax 0.11
        return
    start = time.perf_counter()
    compiled = lower(*args).compile()
    row.compile_s = time.perf_counter() - start
    compiled = getattr(compiled, "compiled", compiled)  # Equinox and Flax wrap it
    flops = (compiled.cost_analysis() or {}).get("flops")
    row.flops = None if flops is None else int(flops)
    memory = compiled.memory_analysis()
    row.temp_bytes = None if memory is None else memory.temp_size_in_bytes
    row.collective_bytes = collective_bytes(compiled.as_text())


def trainable_bytes(problem: Problem, method: str) -> int:
    where = "*" if method == "all" else problem.where
    trainable, _ = mf.partition(where, problem.data.shapes[0])
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainable))


# ------------------------------------------------------------------------------ the clock


@dataclass
class Case:
    """Something to time: ``run(n)`` takes n steps and gives what must be waited for."""

    row: Row
    run: Callable[[int], PyTree]
    updated: Callable[[], PyTree] | None = None  # the parameters after one step, to compare
    like: str = "partition"  # the method that must give the same
    steps: int = 0  # a sample; 0: as many as SAMPLE_S needs
    samples: list[float] = dataclasses.field(default_factory=list)  # s a step, one a round


def repeat(step: Step, state: PyTree, args: Sequence[PyTree], steps: int) -> PyTree:
    """Takes steps, from the same state in each sample: a longer one trains no other network."""
    loss = None
    for _ in range(steps):
        state, loss = step(state, *args)
    return state, loss


def prepare(problem: Problem, row: Row) -> Case:
    """Compiles a method's step for a problem, on the default device."""
    params, batch = problem.data.arrays
    method = method_of(row.method, problem, row.clip)
    state, *args = method.arrange(params, batch)
    row.flops_min = least_flops(problem, row.method)
    row.trainable_bytes = trainable_bytes(problem, row.method)
    compile_step(row, method.step, state, *args)

    def updated() -> PyTree:
        new = method.params(method.step(state, *args)[0], *args)
        return mf.partition(problem.where, new)[0] if row.method == "all" else new

    # Clipped, `all` is another step: its norm counts the layers that the others freeze.
    like = "all" if row.method == "all" and row.clip else "partition"
    return Case(row, functools.partial(repeat, method.step, state, args), updated, like)


@contextlib.contextmanager
def fitting_in_memory(row: Row) -> Iterator[None]:
    """Lets a case that runs out of memory say so in its row, and the rest go on."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        text = "RESOURCE_EXHAUSTED" if isinstance(error, MemoryError) else str(error)
        known = re.search("RESOURCE_EXHAUSTED|out.of.memory", text, re.IGNORECASE)
        # The other processes of a cluster would wait for this one in the case's collectives.
        if not known or jax.process_count() > 1:
            raise
        row.method += OUT_OF_MEMORY


Wanted: TypeAlias = tuple[Row, Callable[[Row], Case]]


def measure(
    plan: Plan,
    wanted: Iterable[Wanted],
    problem: Problem | None = None,
    known: Callable[[], PyTree] | None = None,
) -> list[Row]:
    """Prepares cases, makes sure that they agree, times them in rounds, and gives their rows.

    ``known`` is what the cases must make of the problem's parameters, where it is not one of
    themselves that says it.
    """
    rows, cases = [], []
    for row, make in wanted:
        rows.append(row)
        with fitting_in_memory(row):
            case = make(row)
            wait(case.run(case.steps or 1))  # warm
            cases.append(case)
    if problem is not None:
        check_agreement(cases, problem, known)
    time_in_rounds(cases, plan.rounds)
    for case in cases:
        note_times(case, cases, plan.peak)
    return rows


def check_agreement(
    cases: Sequence[Case], problem: Problem, known: Callable[[], PyTree] | None
) -> None:
    """Stops where a method's step is not the step of the method that it must agree with."""
    updates = {(case.row.method, case.row.clip): case.updated for case in cases}

    @functools.cache
    def wanted(like: str, clip: bool) -> PyTree | None:
        update = known or updates.get((like, clip))  # none where that ran out of memory
        return update and update()

    for case in cases:
        name, clip = case.row.method, case.row.clip
        with fitting_in_memory(case.row):
            if case.updated and (known or name != case.like) and wanted(case.like, clip):
                what = f"{case.row.problem}: {name}{' with clipping' * clip}"
                before = problem.data.arrays[0]
                compare(what, case.like, case.updated(), wanted(case.like, clip), before)


def compare(what: str, like: str, got: PyTree, wanted: PyTree, before: PyTree) -> None:
    """Raises Broken where, in a leaf that both have, two updates differ by over a hundredth.

    A hundredth of the leaf's largest change, for a GPU multiplies float32 in TF32; with four
    roundings of its largest value, for in a small step the parameters' own rounding shows.
    """
    there, old = dict(tree_flatten_with_path(wanted)[0]), dict(tree_flatten_with_path(before)[0])
    for path, leaf in tree_flatten_with_path(got)[0]:
        if path in there:
            a, b, was = (np.asarray(x, np.float32) for x in (leaf, there[path], old[path]))
            eps = float(np.spacing(np.ones((), leaf.dtype)))
            allowed = max(0.01, 8 * eps) * np.abs(b - was).max(initial=0)
            allowed += 4 * eps * np.abs(was).max(initial=0)
            difference = np.abs(a - b).max(initial=0)
            if not difference <= allowed:  # nor where it is nan
                raise Broken(
                    f"{what} must take the same step as {like}: {_name(path)!r} differs by "
                    f"{difference:.3g}, {allowed:.3g} is allowed"
                )


def time_in_rounds(cases: Sequence[Case], rounds: int) -> None:
    """Times each case once a round, so that what slows the machine down slows them all."""
    for case in cases:
        case.steps = case.steps or enough_steps(case)
    for _ in range(rounds):
        for case in cases:
            if OUT_OF_MEMORY not in case.row.method:
                with fitting_in_memory(case.row):
                    case.samples.append(seconds(case, case.steps) / case.steps)


def seconds(case: Case, steps: int) -> float:
    start = time.perf_counter()
    wait(case.run(steps))
    return time.perf_counter() - start


def enough_steps(case: Case) -> int:
    """How many steps take SAMPLE_S; in a cluster process 0 says, for all must take as many."""
    steps = 1
    while (took := agreed(seconds(case, steps))) < SAMPLE_S / 4 and steps < 10_000:
        steps *= 4
    return max(1, math.ceil(steps * SAMPLE_S / took))


def agreed(value: float) -> float:
    """What process 0 measured."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def note_times(case: Case, cases: Sequence[Case], peak: float) -> None:
    """Puts into a case's row what its samples say, beside those of `all`."""
    row = case.row
    if OUT_OF_MEMORY in row.method:
        return
    row.step_s = statistics.median(case.samples)
    row.spread_s = statistics.median(abs(sample - row.step_s) for sample in case.samples)
    for base in cases:
        if (base.row.method, base.row.clip) == ("all", row.clip):
            row.vs_all = statistics.median(a / b for a, b in zip(case.samples, base.samples))
    if row.flops is not None and row.platform == jax.default_backend():  # whose peak it is
        row.peak_share = row.flops / row.step_s / peak


def matmul_peak(dtype: Any) -> float:
    """The most FLOPs a second seen in a matrix product, of a size that keeps the device busy."""
    best, took, n = 0.0, 0.0, 512
    while took < 0.03 and n < 8192:
        n *= 2
        pair = jax.random.normal(jax.random.key(0), (2, n, n), dtype)
        case = Case(Row("", "", ""), functools.partial(repeat, jax.jit(_product), pair, ()))
        took = min(seconds(case, 1) for _ in range(6))
        best = max(best, 2 * n**3 / took)
    return best


def _product(pair: jax.Array) -> tuple[jax.Array, None]:
    return pair[0] @ pair[1], None


def card(dtype: Any) -> dict[str, Any]:
    """What the figures depend on."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": cpu_model(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "dtype": jnp.dtype(dtype).name,
        "peak_flops": None,
    }


def cpu_model() -> str:
    cores = f"{os.cpu_count()} cores"
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        if model := re.search(r"model name\s*: (.+)", file.read()):
            return f"{model[1].strip()}, {cores}"
    return f"{platform.processor() or platform.machine()}, {cores}"


# ----------------------------------------------------------------------------- the tables


@dataclass
class Plan:
    """What is to be measured, and how."""

    problems: Sequence[Problem]
    dtype: Any
    rounds: int
    peers: bool
    devices: Sequence[int] | None
    compile_only: bool
    options: Sequence[str]  # those that say what the problems are, for a child process
    peak: float = math.nan  # measured last

    def named(self, *names: str) -> list[Problem]:
        """The standard problems of these names; or the user's own, whatever its name."""
        standard = [problem for problem in self.problems if problem.name in names]
        return standard or list(self.problems)


Lines: TypeAlias = Iterator[Row | str]  # a table's rows, and what else is to be printed


def methods_table(plan: Plan) -> Lines:
    for problem in plan.named(*PROBLEMS):
        wanted = [
            (Row("methods", problem.name, method, clip), functools.partial(prepare, problem))
            for clip in (False, True)
            for method in ("all", "partition", "hoist", "stop_gradient", "mask")
        ]
        yield from measure(plan, wanted, problem)


def prefix_table(plan: Plan) -> Lines:
    (whole,) = plan.named("deep")
    layers = len(whole.sizes) - 1
    for frozen in range(layers):
        where = [f"linear_{i}" for i in range(frozen, layers)]
        name = f"{whole.name}, {frozen} frozen"
        problem = dataclasses.replace(whole, name=name, where=where)
        wanted = [
            (Row("prefix", name, method), functools.partial(prepare, problem))
            for method in ("all", "partition", "hoist")
        ]
        yield from measure(plan, wanted, problem)


def run_table(plan: Plan) -> Lines:
    """The walk-through's steps, on its own data, whatever the problems are."""
    sizes, rows, where = PROBLEMS["seed"]
    problem = mlp("seed", sizes, rows, where, plan.dtype)
    trainable, frozen = mf.partition(where, problem.data.arrays[0])
    xs, ys = mf.dataset(jax.random.key(1), RUN_STEPS, rows)
    xs = xs.astype(plan.dtype)
    batches = list(zip(xs, ys))

    def scan(steps: int) -> PyTree:
        return mf.train(trainable, frozen, xs[:steps], ys[:steps])

    def prepare_scan(row: Row) -> Case:
        compile_step(row, mf.train, trainable, frozen, xs, ys)
        row.flops = None  # of a loop XLA counts the body once
        return Case(row, scan, lambda: scan(10)[0], "scan", RUN_STEPS)

    loop = Peer(mf.train_step, trainable, (frozen,), lambda state, frozen: state)
    wanted: list[Wanted] = [
        (Row("run", "seed", "loop"), functools.partial(prepare_loop, loop, batches)),
        (Row("run", "seed", "scan"), prepare_scan),
    ]
    if plan.peers and why_missing("haiku") is None:
        haiku = haiku_step(problem, False)
        make = functools.partial(prepare_loop, haiku, batches)
        wanted.append((Row("run", "seed", "haiku loop"), make))
    for row, _ in wanted:
        row.trainable_bytes = trainable_bytes(problem, "partition")
    # A sample takes about a second: a third of the rounds says as much.
    fewer = dataclasses.replace(plan, rounds=math.ceil(plan.rounds / 3))
    yield from measure(fewer, wanted, problem)


def prepare_loop(peer: Peer, batches: Sequence[tuple[PyTree, ...]], row: Row) -> Case:
    """Compiles a step that is called for each batch in turn."""
    frozen = peer.args[0]
    compile_step(row, peer.step, peer.state, frozen, *batches[0])

    def loop(steps: int) -> PyTree:
        state, loss = peer.state, None
        for batch in batches[:steps]:
            state, loss = peer.step(state, frozen, *batch)
        return state, loss

    return Case(row, loop, lambda: peer.params(loop(10)[0], frozen), "scan", RUN_STEPS)


# ------------------------------------------------------------------------ many devices


def devices_table(plan: Plan) -> Lines:
    """Every platform and count; what a CPU host lacks is compiled in a child process.

    There, for a process with eight CPU devices has eight times the threads for its one CPU,
    and would disturb the times of the other tables.
    """
    for kind in platforms(plan):
        for count in plan.devices or usual_counts(kind):
            devices = pick_devices(kind, count)
            for problem in plan.named("wide", "deep"):
                for layout in ("replicated", "sharded")[: 1 if count == 1 else 2]:
                    yield from measure_devices(plan, problem, devices, layout)
    if plan.devices is None and not plan.compile_only and jax.process_count() == 1:
        lacking = [count for count in (2, 4, 8) if count > len(devices_of("cpu"))]
        yield from simulated_rows(lacking, plan.options) if lacking else []


def platforms(plan: Plan) -> list[str]:
    """The default platform first; in a cluster, or if devices are named, it alone."""
    found = [jax.default_backend(), *filter(devices_of, ("cpu", "gpu", "tpu"))]
    alone = jax.process_count() > 1 or plan.devices is not None
    return found[:1] if alone else list(dict.fromkeys(found))


def devices_of(kind: str) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # "Unknown backend"
        return jax.devices(kind)
    return []


def usual_counts(kind: str) -> list[int]:
    """1, 2, 4, 8, ... in a process; in a cluster 1 and those to which all give as many."""
    total, processes = len(jax.devices(kind)), jax.process_count()
    counts = [processes * 2**i for i in range(total.bit_length()) if processes * 2**i <= total]
    return sorted({1, *counts, total})


def refuse_counts(counts: Sequence[int]) -> None:
    """Refuses counts of devices that cannot be had."""
    devices, processes = jax.devices(), jax.process_count()
    for count in counts:
        if count > len(devices):
            hint = "" if processes > 1 else "; --compile-only simulates more"
            raise Refused(f"--devices {count}: there are {len(devices)}, {devices}{hint}")
        if count != 1 and count % processes:
            raise Refused(f"--devices {count}: {processes} processes cannot give as many each")


def pick_devices(kind: str, count: int) -> list[jax.Device]:
    """So many devices, as many of each process; one is a process's own."""
    if count == 1:
        return [jax.local_devices(backend=kind)[0]]
    each = count // jax.process_count()
    return [
        device
        for process in range(jax.process_count())
        for device in [d for d in jax.devices(kind) if d.process_index == process][:each]
    ]


def measure_devices(
    plan: Plan, problem: Problem, devices: list[jax.Device], layout: str
) -> list[Row]:
    """The rows of one mesh: timed where its devices are real, else only compiled."""
    kind, count = devices[0].platform, len(devices)
    simulated = kind == "cpu" and count > jax.process_count()
    rows = [
        Row("devices", problem.name, method, False, kind, count, simulated, layout)
        for method in ("all", "partition")
    ]
    make = functools.partial(prepare_sharded, problem, Mesh(np.array(devices), ("data",)))
    if not (simulated or plan.compile_only):
        whole = widened(problem, count)  # of which one device must make the same
        known = prepare(whole, Row("", "", "partition")).updated
        return measure(plan, [(row, make) for row in rows], whole, known)
    for row in rows:
        with fitting_in_memory(row):
            make(row)
    return rows


def widened(problem: Problem, count: int) -> Problem:
    """The problem with as many rows for each of ``count`` devices."""
    dtype = problem.data.shapes[1][0].dtype
    return mlp(problem.name, problem.sizes, problem.batch * count, problem.where, dtype)


def prepare_sharded(problem: Problem, mesh: Mesh, row: Row) -> Case:
    """Compiles a step for a mesh: the batch over its devices, the parameters by ``layout``.

    ``replicated``: each device has them all. ``sharded``: each has a part of every array's
    first axis that can be cut so, and XLA gathers what it needs when it needs it.
    """
    whole = widened(problem, mesh.size)
    everywhere, rows_apart = NamedSharding(mesh, Spec()), NamedSharding(mesh, Spec("data"))

    def place(leaf: jax.Array) -> NamedSharding:
        for axis, size in enumerate(leaf.shape):
            if row.layout == "sharded" and size % mesh.size == 0:
                return NamedSharding(mesh, Spec(*[None] * axis, "data"))
        return everywhere

    params, batch = whole.data.shapes
    places = jax.tree.map(place, params), jax.tree.map(lambda _: rows_apart, batch)
    method = method_of(row.method, problem)
    inputs = method.arrange(*places)
    step = jax.jit(method.step, in_shardings=inputs, out_shardings=(inputs[0], everywhere))
    row.flops_min = least_flops(problem, row.method)  # of a device's part of the batch
    row.trainable_bytes = trainable_bytes(problem, row.method)
    compile_step(row, step, *method.arrange(params, batch))

    @functools.cache
    def placed() -> tuple[PyTree, ...]:
        return method.arrange(*jax.tree.map(_spread, whole.data.arrays, places))

    def run(steps: int) -> PyTree:
        state, *args = placed()
        return repeat(step, state, args, steps)

    def updated() -> PyTree:
        new, _ = run(1)
        if row.method == "all":
            new, _ = mf.partition(problem.where, new)
        new = jax.jit(lambda tree: tree, out_shardings=everywhere)(new)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), new)

    return Case(row, run, updated)


def _spread(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, over the devices of them all."""
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def simulated_rows(counts: Sequence[int], options: Sequence[str]) -> Iterator[Row]:
    """The rows for so many simulated CPU devices, from a child process."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "rows.json")
        command = [sys.executable, os.path.abspath(__file__), *options, "--compile-only"]
        command += ["--devices", *map(str, counts), "--json", file]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise Broken(f"the simulated devices ended with {done.returncode}: {done.stderr}")
        with open(file, encoding="utf-8") as results:
            yield from (Row(**row) for row in json.load(results)["rows"])


def simulate(count: int) -> None:
    """Gives this process so many CPU devices and no other; works before the first use of one."""
    flags = os.environ.get("XLA_FLAGS", "")  # another count there would be refused
    os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    configure("jax_platforms", "cpu")
    configure("jax_num_cpu_devices", count)


def join_cluster(args: argparse.Namespace) -> None:
    """Joins the other processes, and waits for none of them longer than two minutes."""
    if args.process:
        await_answer(args.coordinator)
    configure("jax_cpu_collectives_implementation", "gloo")
    by_hand = {
        "coordinator_address": args.coordinator,
        "num_processes": args.processes,
        "process_id": args.process,
    }
    limits: dict[str, Any] = {
        "initialization_timeout": JOIN_S,
        "heartbeat_timeout_seconds": SILENCE_S,  # from jax 0.6 on; 100 s before
        "shutdown_timeout_seconds": SILENCE_S,
    }
    known = inspect.signature(jax.distributed.initialize).parameters
    limits = {name: limit for name, limit in limits.items() if name in known}
    try:
        jax.distributed.initialize(**(by_hand if args.coordinator else {}), **limits)
    except ValueError as error:
        raise Refused(f"--cluster: none found, --coordinator names one: {error}") from None
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


# -------------------------------------------------------------------------------- the peers


@dataclass(frozen=True)
class Peer:
    """A library's SGD step, written as its documentation writes it."""

    step: Step  # (state, *args) -> (state, loss)
    state: PyTree
    args: tuple[PyTree, ...]
    params: Callable[..., PyTree]  # (state, *args) -> the parameters, as the module names them
    jitted: Any = None  # what to compile, where it is not the step


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    targets = jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / y.size


def haiku_step(problem: Problem, clip: bool) -> Peer:
    hk = importlib.import_module("haiku")
    params, batch = problem.data.arrays
    trains = mf.mask(problem.where, params)
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP(problem.sizes[1:])(x)))

    def selected(module: str, name: str, value: Any) -> bool:
        return bool(trains[module.rpartition("/")[2]][name])

    def loss_fn(trainable: PyTree, frozen: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        params = hk.data_structures.merge(trainable, frozen)
        return cross_entropy(network.apply(params, x), y)

    @jax.jit
    def step(trainable: PyTree, frozen: PyTree, x: jax.Array, y: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, x, y)
        return jax.tree.map(lambda p, g: p - g * RATE, trainable, grads), loss

    def read(trainable: PyTree, frozen: PyTree, *batch: jax.Array) -> PyTree:
        merged = hk.data_structures.merge(trainable, frozen)
        return {name.rpartition("/")[2]: layer for name, layer in merged.items()}

    named = {f"mlp/~/{name}": layer for name, layer in params.items()}
    trainable, frozen = hk.data_structures.partition(selected, named)
    return Peer(step, trainable, (frozen, *batch), read)


def equinox_step(problem: Problem, clip: bool) -> Peer:
    eqx = importlib.import_module("equinox")
    params, batch = problem.data.arrays

    def with_layers(layers: PyTree) -> Any:
        """The layers' arrays, or which of them train, as an Equinox model."""
        modules: list[Any] = []
        for i, (n_in, n_out) in enumerate(pairwise(problem.sizes)):
            linear = eqx.nn.Linear(n_in, n_out, key=jax.random.key(0))
            held = layers[f"linear_{i}"]["w"], layers[f"linear_{i}"]["b"]
            linear = eqx.tree_at(lambda linear: (linear.weight, linear.bias), linear, held)
            modules += [linear, eqx.nn.Lambda(jax.nn.relu)]
        return eqx.nn.Sequential(modules[:-1])

    model = with_layers({n: {"w": p["w"].T, "b": p["b"]} for n, p in params.items()})
    no_leaf = jax.tree.map(lambda _: False, model)
    trains = mf.mask(problem.where, params)
    linears = range(0, len(model.layers), 2)
    filter_spec = eqx.tree_at(
        lambda model: [leaf for i in linears for leaf in (model[i].weight, model[i].bias)],
        no_leaf,
        [trains[f"linear_{i // 2}"][name] for i in linears for name in ("w", "b")],
    )

    def loss_fn(trainable: Any, frozen: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(jax.vmap(eqx.combine(trainable, frozen))(x), y)

    def step(model: Any, x: jax.Array, y: jax.Array) -> Any:
        trainable, frozen = eqx.partition(model, filter_spec)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(trainable, frozen, x, y)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -g * RATE, grads)), loss

    def read(model: Any, *batch: jax.Array) -> PyTree:
        return {f"linear_{i // 2}": {"w": model[i].weight.T, "b": model[i].bias} for i in linears}

    return Peer(eqx.filter_jit(step), model, batch, read)


def nnx_step(problem: Problem, clip: bool) -> Peer:
    nnx = importlib.import_module("flax.nnx")
    params, batch = problem.data.arrays
    trains = mf.mask(problem.where, params)
    names = {"kernel": "w", "bias": "b"}
    modules: list[Any] = []
    for i, (n_in, n_out) in enumerate(pairwise(problem.sizes)):
        linear = nnx.Linear(n_in, n_out, rngs=nnx.Rngs(0))
        linear.kernel = nnx.Param(params[f"linear_{i}"]["w"])
        linear.bias = nnx.Param(params[f"linear_{i}"]["b"])
        modules += [linear, nnx.relu]
    model = nnx.Sequential(*modules[:-1])

    def selected(path: tuple[Any, ...], value: Any) -> bool:  # ("layers", 2, "kernel")
        return bool(trains[f"linear_{path[1] // 2}"][names[path[2]]])

    trainable = nnx.All(nnx.Param, selected)

    def loss_fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(model(x), y)

    def update(model: Any, x: jax.Array, y: jax.Array) -> Any:
        argnums = nnx.DiffState(0, trainable)
        loss, grads = nnx.value_and_grad(loss_fn, argnums=argnums)(model, x, y)
        params = nnx.state(model, trainable)
        nnx.update(model, jax.tree.map(lambda p, g: p - g * RATE, params, grads))
        return loss

    jitted = nnx.jit(update)

    def step(model: Any, x: jax.Array, y: jax.Array) -> Any:
        return model, jitted(model, x, y)  # the model's own arrays are replaced

    def read(model: Any, *batch: jax.Array) -> PyTree:
        return {
            f"linear_{i // 2}": {"w": linear.kernel[...], "b": linear.bias[...]}
            for i, linear in enumerate(model.layers)
            if i % 2 == 0
        }

    return Peer(step, model, batch, read, jitted)


def optax_step(problem: Problem, clip: bool) -> Peer:
    optax = importlib.import_module("optax")
    params, batch = problem.data.arrays
    labels = jax.tree.map(
        lambda trains: "train" if trains else "freeze", mf.mask(problem.where, params)
    )
    optimizer = optax.multi_transform(
        {"train": optax.sgd(RATE), "freeze": optax.set_to_zero()}, labels
    )
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optimizer)

    @jax.jit
    def step(state: PyTree, x: jax.Array, y: jax.Array) -> Any:
        params, moments = state
        loss, grads = jax.value_and_grad(problem.loss)(params, x, y)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state = params, optimizer.init(params)
    return Peer(step, state, batch, lambda state, *batch: state[0])


PEERS = {  # name: its module, its step, whether it is also clipped
    "haiku": ("haiku", haiku_step, False),
    "equinox": ("equinox", equinox_step, False),
    "flax nnx": ("flax.nnx", nnx_step, False),
    "optax": ("optax", optax_step, True),
}


def why_missing(peer: str) -> str | None:
    """None for a peer that can be imported."""
    try:
        importlib.import_module(PEERS[peer][0])
    except (ImportError, AttributeError) as error:  # not installed; made for another jax
        return f"{peer} is left out: {error}"
    return None


def peers_table(plan: Plan) -> Lines:
    missing = {peer: why for peer in PEERS if (why := why_missing(peer)) is not None}
    yield from missing.values()
    for problem in plan.named("seed", "deep"):
        wanted: list[Wanted] = [
            (Row("peers", problem.name, method, clip), functools.partial(prepare, problem))
            for clip in (False, True)
            for method in ("all", "partition")
        ]
        for peer, (_, build, clipped) in PEERS.items():
            for clip in (False, True)[: 0 if peer in missing else 1 + clipped]:
                make = functools.partial(prepare_peer, problem, build)
                wanted.append((Row("peers", problem.name, peer, clip), make))
        yield from measure(plan, wanted, problem)
    yield from measure_trees(plan, "haiku" not in missing)


def prepare_peer(problem: Problem, build: Callable[[Problem, bool], Peer], row: Row) -> Case:
    peer = build(problem, row.clip)
    row.flops_min = least_flops(problem, "partition")
    row.trainable_bytes = trainable_bytes(problem, "partition")
    compile_step(row, peer.jitted or peer.step, peer.state, *peer.args)
    # Now, for NNX takes its steps in place. What clips all gradients must agree with `all`.
    updated = peer.params(peer.step(peer.state, *peer.args)[0], *peer.args)
    run = functools.partial(repeat, peer.step, peer.state, peer.args)
    return Case(row, run, lambda: updated, "all" if row.clip else "partition")


def measure_trees(plan: Plan, with_haiku: bool) -> list[Row]:
    """The rows of splitting and merging 10,000 leaves, in Python alone."""
    leaf = np.zeros(1, np.float32)
    tree = {f"layer_{i}": {"w": leaf, "b": leaf} for i in range(5000)}
    parts = mf.partition("*/w", tree)
    works: dict[str, Callable[[], Any]] = {
        "partition": lambda: mf.partition(lambda path, leaf: path[-1].key == "w", tree),
        "partition, by a pattern": lambda: mf.partition("*/w", tree),
        "merge": lambda: mf.merge(*parts),
    }
    if with_haiku:
        hk = importlib.import_module("haiku").data_structures
        halves = hk.partition(lambda module, name, value: name == "w", tree)
        works["haiku partition"] = lambda: hk.partition(lambda m, name, v: name == "w", tree)
        works["haiku merge"] = lambda: hk.merge(*halves)

    def prepare_work(row: Row) -> Case:
        work = works[row.method]

        def run(steps: int) -> None:
            for _ in range(steps):
                work()

        return Case(row, run)

    return measure(plan, [(Row("peers", "10000 leaves", name), prepare_work) for name in works])


# ------------------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Table:
    says: str
    rows: Callable[[Plan], Lines]


TABLES = {
    "methods": Table("a step, by how layers are held still", methods_table),
    "prefix": Table("a step, by how many layers from the first are frozen", prefix_table),
    "devices": Table("a data-parallel step, figures a device; time on real ones", devices_table),
    "run": Table(f"{RUN_STEPS} steps, time a step", run_table),
    "peers": Table("the same step in other libraries", peers_table),
}


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    # Without its usage text, argparse says what is wrong in one line (and exits with 2).
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], usage=argparse.SUPPRESS
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--tables", nargs="+", choices=TABLES, metavar="TABLE", help=", ".join(TABLES)
    )
    what.add_argument("--peers", action="store_true", help="other libraries too")
    what.add_argument("--sizes", nargs="+", type=int, metavar="N", help="the widths of an MLP")
    what.add_argument("--batch", type=positive, metavar="N", help="rows in a batch, a device")
    which = what.add_mutually_exclusive_group()
    which.add_argument("--train", nargs="+", metavar="PATTERN", help="what trains")
    which.add_argument("--freeze", nargs="+", metavar="PATTERN", help="what does not")
    what.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    what.add_argument("--model", metavar="FILE.py:NAME", help="NAME() is (loss_fn, params, batch)")
    what.add_argument("--rounds", type=positive, default=7, metavar="N", help="default: 7")
    where = parser.add_argument_group("where")
    where.add_argument("--devices", nargs="+", type=positive, metavar="N", help="how many")
    where.add_argument("--compile-only", action="store_true", help="simulate them, time nothing")
    where.add_argument("--cluster", action="store_true", help="SLURM, TPU pods, Kubernetes")
    where.add_argument("--coordinator", metavar="HOST:PORT", help="a cluster named by hand")
    where.add_argument("--processes", type=positive, metavar="N", help="how many it has")
    where.add_argument("--process", type=int, metavar="I", help="which this one is, from 0")
    out = parser.add_argument_group("what to write")
    out.add_argument("--json", metavar="FILE", help="the results")
    out.add_argument("--plot", metavar="FILE", help="a picture of prefix and methods")
    out.add_argument("--render", metavar="FILE", help="measure nothing: show a --json file")
    return parser, parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def tables_of(args: argparse.Namespace) -> list[str]:
    """The tables that are asked for; some options allow for one only."""
    for option, given, only in [
        ("--compile-only", args.compile_only, "devices"),
        ("--cluster", args.cluster or args.coordinator, "devices"),
        ("--model", args.model, "methods"),
    ]:
        if given:
            if set(args.tables or [only]) != {only} or args.peers:
                raise Refused(f"{option} is for the table {only} alone")
            return [only]
    usual = [table for table in TABLES if table != "peers"]
    return list(dict.fromkeys([*(args.tables or usual), *["peers"] * args.peers]))


def refuse_options(args: argparse.Namespace, tables: Sequence[str]) -> None:
    """Refuses what does not go together, before anything is measured."""
    by_hand = (args.coordinator, args.processes, args.process)
    if any(x is not None for x in by_hand) and any(x is None for x in by_hand):
        raise Refused("--coordinator, --processes and --process go together")
    if args.process is not None and not 0 <= args.process < args.processes:
        raise Refused(f"--process must be in 0 .. {args.processes - 1}, got {args.process}")
    if args.coordinator and not re.fullmatch(r".+:\d+", args.coordinator):
        raise Refused(f"--coordinator must be HOST:PORT, got {args.coordinator!r}")
    if args.model is not None and (args.sizes or args.batch):
        raise Refused("--model brings its own sizes and batch")
    if args.model is not None and not (args.train or args.freeze):
        raise Refused("--model needs --train or --freeze, to say what trains")
    if args.json is not None:
        refuse_unwritable("--json", args.json)
    if args.plot is not None:
        refuse_plot(args.plot, tables)


def refuse_unwritable(option: str, target: str) -> None:
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError("it is no regular file")
        with replaced(target, keep=False) as path, open(path, "x", encoding="utf-8"):
            pass
    except OSError as error:
        raise Refused(f"{option} {target}: cannot be written: {error.strerror or error}") from None


def refuse_plot(target: str, tables: Sequence[str]) -> None:
    if not {"prefix", "methods"} & set(tables):
        raise Refused("--plot draws the tables prefix and methods")
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise Refused(
            "--plot needs matplotlib: pip install matplotlib, or uv run --with matplotlib"
        ) from None
    if extension(target) not in FigureCanvasBase.get_supported_filetypes():
        raise Refused(f"--plot {target}: {extension(target)!r} is no kind of picture (try .png)")
    refuse_unwritable("--plot", target)


def extension(file: str) -> str:
    return os.path.splitext(file)[1].removeprefix(".")


def where_of(args: argparse.Namespace) -> list[str] | None:
    """What trains: --train's patterns, or --freeze's, each turned round."""
    if args.freeze is None:
        train: list[str] | None = args.train
        return train
    return [p.removeprefix("!") if p.startswith("!") else f"!{p}" for p in args.freeze]


def problem_options(args: argparse.Namespace) -> list[str]:
    """The options that say what the problems are, once more."""
    options = []
    for name in ("sizes", "batch", "train", "freeze", "dtype"):
        value = getattr(args, name)
        if value is not None:
            options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return options


def problems_of(args: argparse.Namespace) -> list[Problem]:
    where, dtype = where_of(args), jnp.dtype(args.dtype)
    if args.model is not None:
        problems = [load_model(args.model, where or [])]
    elif args.sizes is not None:
        head = [f"linear_{len(args.sizes) - 2}"]
        problems = [mlp("mlp", args.sizes, args.batch or 64, where or head, dtype)]
    else:
        problems = [
            mlp(name, sizes, args.batch or batch, where or usual, dtype)
            for name, (sizes, batch, usual) in PROBLEMS.items()
        ]
    for problem in problems:
        refuse_misfits(problem)
    return problems


def plan_of(args: argparse.Namespace) -> Plan:
    devices = args.devices
    if args.compile_only:
        devices = devices or [1, 2, 4, 8]
        simulate(max(devices))
    elif args.cluster or args.coordinator:
        join_cluster(args)
    refuse_counts(devices or [])
    return Plan(
        problems_of(args),
        jnp.dtype(args.dtype),
        args.rounds,
        args.peers or "peers" in (args.tables or []),
        devices,
        args.compile_only,
        problem_options(args),
    )


def show_split(report: Report, problem: Problem) -> None:
    trainable, frozen = mf.partition(problem.where, problem.data.shapes[0])
    report.say(f"\n{problem.name}\n{mf.summary(trainable=trainable, frozen=frozen)}")


def bench(plan: Plan, tables: Sequence[str], report: Report) -> int:
    """Measures the tables and gives the exit code; what there is gets written in any case."""
    complete = False
    try:
        if not plan.compile_only:
            plan.peak = report.card["peak_flops"] = matmul_peak(plan.dtype)
        report.say(card_text(report.card))
        for problem in plan.problems:
            if not problem.sizes:
                show_split(report, problem)
        with interruptible() as heed:
            for table in tables:
                for row in TABLES[table].rows(plan):
                    report.add(row) if isinstance(row, Row) else report.say(row)
                    heed()
        complete = True
    except KeyboardInterrupt:
        return 130
    except Broken as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if jax.process_count() == 1:
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"bench.py: {who}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        report.finish(complete)
    return 0


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Remembers a Ctrl-C: where Python ignores exceptions (in a destructor) it would be lost."""
    seen: list[int] = []

    def note(number: int, frame: object) -> NoReturn:
        seen.append(number)
        raise KeyboardInterrupt

    def heed() -> None:
        if seen:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield heed
    finally:
        signal.signal(signal.SIGINT, before)


def leave(code: int) -> NoReturn:
    """Ends the process; after a failure without the farewell that a cluster waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code and jax.distributed.is_initialized():
        os._exit(code)
    raise SystemExit(code)


def show(file: str, tables: Sequence[str], plot: str | None) -> None:
    """Prints results that --json has written as Markdown."""
    try:
        with open(file, encoding="utf-8") as results_file:
            results = json.load(results_file)
        text = render(results, tables)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"--render {file}: no results to read: {error}") from None
    print(text)
    if plot is not None:
        draw([Row(**row) for row in results["rows"]], plot)


def main(argv: Sequence[str] | None = None) -> None:
    parser, args = parse(argv)
    try:
        tables = tables_of(args)
        refuse_options(args, tables)
        if args.render is not None:
            return show(args.render, args.tables or list(TABLES), args.plot)
        plan = plan_of(args)
    except Refused as error:
        parser.error(str(error))
    except Broken as error:
        print(f"bench.py: {error}", file=sys.stderr)
        leave(1)
    report = Report(card(plan.dtype), args.json, args.plot)
    leave(bench(plan, tables, report))


if __name__ == "__main__":
    main()
