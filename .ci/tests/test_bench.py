# SPDX-License-Identifier: MIT
"""Tests of bench.py and .ci/peers.py: figures by hand, promises and past bugs."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bench
import minifreeze as mf

TOP = Path(bench.__file__).parent
MACHINE = {"peak_flops": 200.0, "peak_bytes_per_s": 30.0}
SHORT = {  # makes runs short and their figures meaningless
    "SAMPLE_S": 1e-9,
    "MAX_CALLS": 1,
    "PEAK_VECTOR_BYTES": 2**12,
    "RUN_STEPS": 10,
}
SMALL = ["--sizes", "8", "16", "4", "--batch", "8", "--rounds", "1"]


# ----------------------------------------------------------------------- helpers
@pytest.fixture(autouse=True, scope="module")
def compile_quickly() -> Iterator[None]:
    """Turns off compiler optimizations: they are slow, and no test here needs them."""
    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    before = jax.config.values[name.lower()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "1")  # for the processes that are started
        jax.config.update(name.lower(), True)
        yield
    jax.config.update(name.lower(), before)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes runs of bench.main short, and keeps them from ending the tests."""
    monkeypatch.setattr("os._exit", sys.exit)
    for name, value in SHORT.items():
        monkeypatch.setattr(bench, name, value)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Ended:
    """Runs bench.main in this process; stores its exit code and its output."""

    def __init__(self, capsys: Any, *options: object) -> None:
        with pytest.raises(SystemExit) as ended:
            bench.main([str(option) for option in options])
        self.code = ended.value.code
        self.out, self.error = capsys.readouterr()


def rows_in(file: Path, **wanted: Any) -> list[bench.Row]:
    found = []
    for row in json.loads(file.read_text())["rows"]:
        if all(row[key] == value for key, value in wanted.items()):
            found.append(row)
    return found


def case(method: str = "everything", **changes: Any) -> bench.Case:
    return bench.Case("methods", "deep", method, batch_size=8, **changes)


def result(
    method: str, *samples: float, once: float | None = None, **stats: Any
) -> bench.Result:
    return bench.Result(
        case(method),
        bench.CompilerStats(**stats),
        timing=bench.Timing(samples) if samples else None,
        features_timing=None if once is None else bench.Timing((once,)),
    )


def row_of(method: str, *results: bench.Result) -> bench.Row:
    """Returns the row of one method among results that were timed together."""
    row = bench.find_row(bench.rows_of(results), method=method)
    assert row is not None
    return row


def options_of(*typed: str) -> Any:
    return bench.parse(list(typed))


# ---------------------------------------------------------------------- the clock
class FakeClock:
    """A clock that advances only when a step runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[tuple[str, Any]] = []  # (step, its input state)
        fake_time = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(bench, "time", fake_time)

    def step(self, name: str, seconds: float) -> bench.Step:
        def fn(state: Any) -> Any:
            self.log.append((name, state))
            self.now += seconds
            return "used", None

        return bench.Step(fn, init=lambda: "new")


def test_median_and_spread_of_a_timing() -> None:
    timing = bench.Timing((1.5, 3.25, 4.75, 6.0, 10.0))
    # Distances from the median: 3.25, 1.5, 0, 1.25, 5.25.
    assert (timing.median, timing.spread) == (4.75, 1.5)


@pytest.mark.parametrize(
    ("wins", "ties", "losses", "differs"),
    [
        (6, 0, 0, True),  # 2 / 2**6 = 3.1 %
        (7, 0, 0, True),
        (6, 0, 1, False),  # 2 * (1 + 7) / 2**7 = 12.5 %
        (6, 1, 0, False),  # a tie counts like a loss: 12.5 %
        (8, 0, 1, True),  # 2 * (1 + 9) / 2**9 = 3.9 %
        (14, 0, 4, True),  # 2 * (1 + 18 + 153 + 816 + 3060) / 2**18 = 3.1 %
        (13, 0, 5, False),
        (5, 0, 0, None),
    ],
)
def test_timings_differ_according_to_the_sign_test(
    wins: int, ties: int, losses: int, differs: bool | None
) -> None:
    timing = bench.Timing((2.0,) * (wins + ties + losses))
    other = bench.Timing((3.0,) * wins + (2.0,) * ties + (1.0,) * losses)
    assert timing.differs(other) is differs
    assert other.differs(timing) is differs


def test_timings_do_not_differ_if_the_medians_disagree_with_the_rounds() -> None:
    mine = (0.5, 0.5, 0.5, 0.5, 9, 9, 9, 9, 9)  # faster in 8 of 9 rounds
    theirs = (1, 1, 1, 1, 2, 10, 10, 10, 10)
    assert bench.Timing(mine).differs(bench.Timing(theirs)) is False
    equal_medians = (1, 1, 1, 1, 9, 10, 10, 10, 10)
    assert bench.Timing(mine).differs(bench.Timing(equal_medians)) is False


def test_calibration_ends_at_the_first_number_of_calls_that_lasts_long_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock(monkeypatch)
    monkeypatch.setattr(bench, "SAMPLE_S", 0.05)
    assert bench.calibrate(clock.step("a", 0.001)) == 64  # 32 last 0.032 s
    assert bench.calibrate(clock.step("b", 0.06)) == 1
    monkeypatch.setattr(bench, "MAX_CALLS", 12)
    assert bench.calibrate(clock.step("c", 1e-9)) == 12
    assert [name for name, _ in clock.log].count("c") == 1 + 1 + 2 + 4 + 8


def test_one_slow_call_does_not_end_the_calibration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock(monkeypatch)
    monkeypatch.setattr(bench, "SAMPLE_S", 0.05)
    step = clock.step("a", 0.01)

    def hiccup(state: Any) -> Any:
        if len(clock.log) == 1:  # the first call after the warm-up
            clock.now += 1.0
        return step.fn(state)

    assert bench.calibrate(replace(step, fn=hiccup)) == 8


def test_each_round_times_each_case_once_after_an_untimed_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock(monkeypatch)
    monkeypatch.setattr(bench, "SAMPLE_S", 0.5)
    steps = {case(name): clock.step(name, 0.25) for name in "abc"}
    monkeypatch.setattr(bench, "calibrate", lambda step: 2)
    timings = bench.time_rounds(steps, rounds=4)
    assert all(timing.samples == (0.25,) * 4 for timing in timings.values())

    orders = []
    for start in range(0, len(clock.log), 9):
        one_round = clock.log[start : start + 9]
        names = [name for name, _ in one_round]
        assert [state for _, state in one_round] == ["new", "used", "used"] * 3
        assert names[0::3] == names[1::3] == names[2::3]  # one case after the other
        orders.append("".join(names[0::3]))
    assert len(orders) == 4
    assert {"".join(sorted(order)) for order in orders} == {"abc"}
    assert len(set(orders)) > 1  # shuffled


def test_an_interrupted_table_counts_its_finished_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock(monkeypatch)
    monkeypatch.setattr(bench, "calibrate", lambda step: 1)

    def interrupted_after(finished_calls: int) -> dict[str, bench.Step]:
        clock.log.clear()
        step = clock.step("a", 0.25)

        def fn(state: Any) -> Any:
            if len(clock.log) == finished_calls:
                raise KeyboardInterrupt
            return step.fn(state)

        return {"a": replace(step, fn=fn), "b": replace(step, fn=fn)}

    # A round has four calls: each of two steps once for the warm-up, and once timed.
    timings = bench.time_rounds(interrupted_after(11), rounds=7)
    assert timings["a"].samples == timings["b"].samples == (0.25, 0.25)
    with pytest.raises(KeyboardInterrupt):
        bench.time_rounds(interrupted_after(3), rounds=7)


def test_a_call_of_many_steps_counts_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    step = replace(clock.step("scan", 0.5), training_steps=10)
    assert bench.sample(step, calls=2) == 0.05


# ------------------------------------------------------------- the compiler's figures
def products_by_hand(
    sizes: tuple[int, ...],
    batch: int,
    forward: list[int],
    weights: list[int],
    inputs: list[int],
) -> int:
    """Adds 2 x batch x in x out for each layer, once per list that contains it."""
    layers = [*forward, *weights, *inputs]
    return sum(2 * batch * sizes[i] * sizes[i + 1] for i in layers)


@pytest.mark.parametrize(
    ("where", "method", "forward", "weights", "inputs"),
    [
        ("linear_2", "everything", [0, 1, 2], [0, 1, 2], [1, 2]),
        ("linear_2", "zeroed gradients", [0, 1, 2], [0, 1, 2], [1, 2]),
        ("linear_2", "partition", [0, 1, 2], [2], []),
        ("linear_2", "hoist", [2], [2], []),
        (["linear_0", "linear_2"], "hoist", [0, 1, 2], [0, 2], [1, 2]),
        ("linear_1", "partition", [0, 1, 2], [1], [2]),
        ("*/b", "stop_gradient", [0, 1, 2], [], [1, 2]),
        ("linear_2/b", "hoist", [], [], []),
    ],
)
def test_products_of_a_step(
    where: Any, method: str, forward: Any, weights: Any, inputs: Any
) -> None:
    sizes, batch = (3, 5, 7, 2), 11
    problem = bench.mlp("mlp", sizes, batch, where)
    problem = bench.place(problem, jax.devices()[:1])
    step = bench.build_step(problem, case(method))
    stats = bench.compile_step(step)
    wanted = products_by_hand(sizes, batch, forward, weights, inputs)
    assert stats.flops_min == wanted


def products(fn: Callable[..., Any], *args: Any) -> int:
    jaxpr, _ = bench.without_dead_code(jax.make_jaxpr(fn)(*args))
    return bench.product_flops(jaxpr)


def test_products_in_a_scan_count_for_each_of_its_steps() -> None:
    w = jnp.ones((4, 4))

    def fn(x: Any) -> Any:
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    assert products(fn, jnp.ones((3, 4))) == 5 * 2 * 3 * 4 * 4


def test_unused_products_do_not_count() -> None:
    def fn(a: Any, b: Any) -> Any:
        _unused = a @ b
        return a + 1

    jaxpr, used = bench.without_dead_code(jax.make_jaxpr(fn)(*[jnp.ones((2, 2))] * 2))
    assert (bench.product_flops(jaxpr), used) == (0, [True, False])


def test_a_cond_counts_its_largest_branch() -> None:
    def fn(flag: Any, x: Any) -> Any:
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert products(fn, True, jnp.ones((3, 3))) == 2 * 2 * 27


@pytest.mark.parametrize(
    ("padding", "stride", "pairs"),
    [
        ("VALID", 1, 3 * 3),  # 3 outputs with 3 taps each
        ("SAME", 1, 5 * 3 - 2),  # the first and the last output have 2 taps
        ("SAME", 2, 3 * 3 - 2),
    ],
)
def test_products_of_a_convolution(padding: str, stride: int, pairs: int) -> None:
    image, kernel = jnp.ones((2, 4, 5)), jnp.ones((6, 4, 3))  # (N, C, L), (O, I, L)

    def fn(image: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(image, kernel, (stride,), padding)

    assert products(fn, image, kernel) == 2 * 2 * 6 * 4 * pairs


TPU_TUPLE = (
    "%a = (f32[2,128]{1,0:T(8,128)}, f32[64]{0:T(1024)S(1)}, f32[]{:T(128)}) "
    "all-reduce(%a, %b, %c), channel_id=1, replica_groups={}"
)


@pytest.mark.parametrize(
    # Each of 4 devices sends 2 * 3/4 of the result of an all-reduce, 3/4 of that of an
    # all-gather or all-to-all, 3 times that of a reduce-scatter, and that of a permute.
    ("hlo", "result_bytes", "sent_by_4"),
    [
        ("%a = f32[2,3]{1,0} all-reduce(f32[2,3]{1,0} %b), channel_id=1", 24, 36),
        ("ROOT %a = (f32[10]{0}, bf16[2,3]{1,0}) all-reduce(%b, %c)", 52, 78),
        ("%a = (f32[4]{0:T(128)}, s16[4]{0}) all-to-all(%b, %c)", 24, 18),
        ("%a = pred[80]{0} collective-permute(%b)", 80, 80),
        ("%a = f64[5]{0} reduce-scatter(%b), to_apply=%add", 40, 120),
        ("%a = f32[8]{0} all-gather(%b), metadata={op_name=\"f = g(x)\"}", 32, 24),
        ("%s = (f32[1], f32[8]) all-gather-start(%b)\n%d = f32[8] all-gather-done(%s)",
         32, 24),
        ("%a = f32[8] all-gather(%b), channel_id=6\n" * 4, 32, 24),  # pieces of one
        ("%a = f32[8] all-gather(%b), channel_id=6\n"
         "%c = f32[8] all-gather(%d), channel_id=7\n", 64, 48),
        ("%all-reduce.1 = f32[8]{0} add(%b, %c)", 0, 0),
        ("%a = f32[8]{0} fusion(%all-reduce.3), calls=%all-reduce", 0, 0),
        (TPU_TUPLE, 4 * (256 + 64 + 1), 6 * (256 + 64 + 1)),
    ],
)  # fmt: skip
def test_collectives_of_a_program(hlo: str, result_bytes: int, sent_by_4: int) -> None:
    assert bench.collective_bytes(hlo, devices=4) == (result_bytes, sent_by_4)


class FakeJitted:
    """A step with the compiler figures that a test chooses."""

    def __init__(self, flops: float | None) -> None:
        sizes = {"argument": 100, "output": 57, "alias": 23, "temp": 6}
        self.memory = {f"{name}_size_in_bytes": size for name, size in sizes.items()}
        self.flops = flops

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("only compiled")

    def lower(self, *args: Any) -> Any:
        return self

    def compile(self) -> Any:
        return self

    def trace(self, *args: Any) -> Any:  # (4, 5) @ (5, 1): 2 * 4 * 5 * 1 = 40 FLOPs
        def fn(a: Any, unused: Any) -> Any:
            return a @ jnp.ones((5, 1))

        return SimpleNamespace(jaxpr=jax.make_jaxpr(fn)(jnp.ones((4, 5)), jnp.ones(3)))

    def as_text(self) -> str:
        return "%a = f32[10]{0} all-reduce(%b)"

    def cost_analysis(self) -> Any:
        return None if self.flops is None else {"flops": self.flops}

    def memory_analysis(self) -> Any:
        return SimpleNamespace(**self.memory)


@pytest.mark.parametrize(
    ("counted", "trusted"), [(39.0, None), (40.0, 40), (43.0, 43), (None, None)]
)
def test_xlas_flops_are_trusted_only_if_they_cover_the_products(
    counted: float | None, trusted: int | None
) -> None:
    step = bench.Step(FakeJitted(counted), init=lambda: jnp.ones((4, 5)), args=(1.0,))
    stats = bench.compile_step(step)
    assert (stats.flops, stats.flops_min) == (trusted, 40)


def test_memory_includes_everything_resident() -> None:
    fn, unused = FakeJitted(40.0), jnp.ones(3)
    step = bench.Step(
        fn, init=lambda: jnp.ones((4, 5)), args=(unused,), written_bytes=7
    )
    stats = bench.compile_step(step)
    # Arguments, those that the step does not read, new results, temporaries.
    assert stats.memory_bytes == 100 + 12 + (57 - 23) + 6
    assert (stats.unused_bytes, stats.temp_bytes) == (12, 6)
    assert stats.bytes_min == 100 + 7

    features = bench.Step(fn, init=lambda: jnp.ones(3))
    step = replace(step, features_step=features)
    one, three = bench.compile_step(step), bench.compile_step(step, stored_batches=3)
    assert one.kept_bytes == 12
    assert one.memory_bytes is not None
    assert three.memory_bytes == one.memory_bytes + 2 * 12


def test_a_scan_has_no_limit_because_its_parameters_are_read_in_every_step() -> None:
    fn = FakeJitted(40.0)
    step = bench.Step(
        fn, init=lambda: jnp.ones((4, 5)), args=(jnp.ones(3),), training_steps=2
    )
    assert bench.compile_step(step).bytes_min is None


def test_memory_of_hoist_includes_the_weights_that_its_step_does_not_read() -> None:
    problem = bench.mlp("mlp", (8, 16, 4), 2, ["linear_1"])
    problem = bench.place(problem, jax.devices()[:1])
    stats = bench.compile_step(bench.build_step(problem, case("hoist")))
    assert stats.unused_bytes is not None
    assert stats.unused_bytes == 4 * (8 * 16 + 16)  # all of linear_0
    assert stats.memory_bytes is not None
    assert stats.memory_bytes >= 4 * (8 * 16 + 16 + 16 * 4 + 4)


# -------------------------------------------------------------- results are compared
def test_speedup_is_the_ratio_of_the_medians_that_are_printed() -> None:
    everything = result("everything", *[3.0, 4.0, 5.0] * 2)
    part = result("partition", *[0.5, 2.0, 2.0] * 2)
    rows = bench.rows_of([everything, part])
    assert [row["speedup"] for row in rows] == [1, 4 / 2]
    assert [bench.speedup_text(row) for row in rows] == ["1.0x", "2.0x"]
    assert rows[1]["rows_per_s"] == 8 / 2
    assert rows[1]["samples"] == (0.5, 2.0, 2.0, 0.5, 2.0, 2.0)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.0, "1.0x"), (1.03, "1.03x"), (9.96, "10.0x"), (123.4, "123x")],
)
def test_ratios_have_two_or_three_digits(ratio: float, text: str) -> None:
    assert bench.times(ratio) == text


def test_a_slower_method_is_called_slower() -> None:
    everything = result("everything", *[2.0] * 6)
    row = row_of("partition", everything, result("partition", *[8.0] * 6))
    assert bench.speedup_text(row) == "4.0x slower"


@pytest.mark.parametrize("samples", [1, 5])
def test_a_few_samples_give_a_ratio_and_no_verdict(samples: int) -> None:
    everything = result("everything", *[2.0] * samples)
    part = result("partition", *[8.0] * samples, flops_min=10)
    hoist = result("hoist", *[1.0] * samples, once=1.0, kept_bytes=5, flops_min=1)
    rows = bench.rows_of([everything, part, hoist])
    assert (rows[1]["speedup"], rows[1]["differs"]) == (0.25, None)
    assert bench.speedup_text(rows[1]) == "4.0x slower"
    assert bench.conclusion([rows]) == (
        "deep: at least 6 rounds are needed for a verdict."
    )


def test_rounds_that_disagree_are_no_difference() -> None:
    everything = result("everything", *[3.0, 4.0, 5.0] * 2)
    row = row_of("partition", everything, result("partition", *[2.0, 3.0, 6.0] * 2))
    assert (row["speedup"], row["differs"]) == (4 / 3, False)
    assert bench.speedup_text(row) == "no difference seen"


@pytest.mark.parametrize(
    ("hoisted", "epochs"),
    [(2.25, 12.25 / (2.75 - 2.25)), (2.75, None), (3.0, None)],
)
def test_break_even(hoisted: float, epochs: float | None) -> None:
    part = result("partition", *[2.75] * 6, flops_min=10, flops=10)
    hoist = result("hoist", *[hoisted] * 6, once=12.25, flops_min=4, flops=4)
    row = row_of("hoist", part, hoist)
    assert (row["once_s"], row["break_even"]) == (12.25, epochs)


def test_break_even_is_not_given_inside_the_noise() -> None:
    part = result("partition", *[1.0, 3.0, 5.0] * 2, flops_min=10, flops=10)
    hoist = result("hoist", *[1.5, 2.5, 3.5] * 2, once=1.0, flops_min=4, flops=4)
    assert row_of("hoist", part, hoist)["break_even"] is None


def test_cost_per_step_with_the_features_over_epochs() -> None:
    hoist = result("hoist", 1e-3, 1e-3, 1e-3, once=6e-3, kept_bytes=500)
    text = "; ".join(bench.hoist_notes(row_of("hoist", hoist)))
    assert "7.00 ms per step over 1 epoch, 3.00 ms over 3, 1.60 ms over 10" in text
    assert "stores 500 B per batch" in text


@pytest.mark.parametrize(
    ("products", "flops", "useless"),
    [(10, 10, True), (9, 10, False), (10, 8, False), (10, None, False)],
)
def test_nothing_to_hoist_if_no_flops_are_removed(
    products: int, flops: int | None, useless: bool
) -> None:
    part = result("partition", *[3.0] * 6, flops_min=10, flops=10)
    hoist = result("hoist", *[2.0] * 6, once=1.0, flops_min=products, flops=flops)
    row = row_of("hoist", part, hoist)
    assert (row["remark"] == "nothing to hoist") == useless
    assert (row["break_even"] is None) == useless


def test_the_warning_of_hoist_becomes_a_remark_and_others_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = mf.hoist

    def warned(*args: Any) -> Any:
        warnings.warn("hoist found nothing", UserWarning, stacklevel=2)
        warnings.warn("hoist the sails", RuntimeWarning, stacklevel=2)
        return real(*args)

    monkeypatch.setattr(mf, "hoist", warned)
    problem = bench.place(bench.mlp("mlp", (2, 3, 2), 2, "linear_1"), jax.devices()[:1])
    with pytest.warns(RuntimeWarning, match="hoist the sails") as shown:
        remark = bench.hoist(problem).remark
    assert len(shown) == 1
    assert remark == "nothing to hoist"


def test_a_hoist_that_finds_nothing_is_a_remark() -> None:
    problem = bench.mlp("mlp", (2, 3, 2), 2, "linear_0")
    problem = bench.place(problem, jax.devices()[:1])
    assert bench.hoist(problem).remark == "nothing to hoist"


def test_each_computation_of_features_waits_for_the_one_before() -> None:
    # The features before are an argument, which XLA must not drop.
    problem = bench.place(bench.mlp("mlp", (2, 3, 2), 2, "linear_1"), jax.devices()[:1])
    step = bench.hoist(problem).features_step
    assert step is not None
    arguments = (step.init(), *step.args)
    fn: Any = step.fn
    program = fn.lower(*arguments).compile()
    # XLA starts a program when all of its arguments exist.
    count = sum(len(jax.tree.leaves(argument)) for argument in arguments)
    header = program.as_text().partition("\n")[0]
    layout = header.partition("entry_computation_layout={(")[2].partition(")->")[0]
    assert layout.count("{") == count


@pytest.mark.parametrize("drawn", [False, True])
def test_random_numbers_are_found_in_a_cond(drawn: bool) -> None:
    def fn(x: Any) -> Any:
        def noisy(x: Any) -> Any:
            key = jax.random.key(0)
            return x + jax.random.normal(key, x.shape) if drawn else x + 1

        return jax.lax.cond(x.sum() > 0, noisy, lambda x: x, x)

    jaxpr = jax.make_jaxpr(fn)(jnp.ones(2)).jaxpr
    assert bench.draws_random_numbers(jaxpr) == drawn


@pytest.mark.parametrize(
    ("bytes_min", "limit_s"),
    [(90, 90 / 30), (30, 400 / 200)],  # moving 90 bytes, or 400 FLOPs
)
def test_limit_is_the_longer_of_computing_and_moving_bytes(
    bytes_min: int, limit_s: float
) -> None:
    ours = result("partition", 4.0, flops_min=400, bytes_min=bytes_min)
    not_timed = result("hoist", flops_min=400, bytes_min=90)
    rows = bench.rows_of([ours, not_timed])
    bench.add_limits(rows, MACHINE)
    assert [row["limit_share"] for row in rows] == [limit_s / 4, None]


def test_limit_is_given_for_all_rows_of_a_table_or_for_none() -> None:
    ours = result("partition", 4.0, flops_min=400, bytes_min=90)
    rows = bench.rows_of([ours, result("another library", 4.0)])
    bench.add_limits(rows, MACHINE)
    assert [row["limit_share"] for row in rows] == [None, None]


def test_efficiency_is_throughput_per_device_relative_to_one_device() -> None:
    def on(devices: int, seconds: float, layout: str = "replicated") -> bench.Result:
        there = case(devices=devices, layout=layout)
        return bench.Result(there, bench.CompilerStats(), bench.Timing((seconds,)))

    rows = bench.rows_of([on(1, 3.0), on(4, 4.0), on(4, 6.0, "sharded")])
    assert [row["efficiency"] for row in rows] == [None, 3 / 4, 3 / 6]
    assert rows[1]["rows_per_s"] == 4 * 8 / 4


# --------------------------------------------------------------------------- output
@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0012345, "s", "1.23 ms"),
        (999.9, "B", "1.00 kB"),
        (45_600_000, "B", "45.6 MB"),
        (3.2e-7, "s", "320 ns"),
        (0, "B", "0.00 B"),
    ],
)
def test_quantities_have_three_digits_and_a_prefix(
    value: float, unit: str, text: str
) -> None:
    assert bench.quantity(value, unit) == text


def test_a_table_has_its_units_in_the_titles_and_no_empty_columns() -> None:
    results = [
        result("everything", 24.4e-3, 24.0e-3, 24.7e-3, memory_bytes=80_000_000),
        result(
            "hoist",
            0.31e-3,
            0.30e-3,
            0.33e-3,
            memory_bytes=5e5,
            once=1e-3,
            kept_bytes=1,
        ),
    ]
    rows = bench.rows_of(results)
    lines = bench.table_text("deep", rows).splitlines()
    assert lines[1] == "deep"
    assert lines[2].split("  ")[0] == "method"
    assert "ms per step" in lines[2]
    assert "memory MB" in lines[2]
    assert "FLOP" not in lines[2]
    assert "24.4 ± 0.3" in lines[3]
    assert "80.0" in lines[3]
    assert "0.310 ± 0.010" in lines[4]


def test_answer_names_the_gain_and_what_it_costs() -> None:
    adam = replace(case(), optimizer="adam")
    adam_part = replace(case("partition"), optimizer="adam")
    results = [
        result("everything", *[27.0] * 6),
        result("partition", *[10.0] * 6, flops_min=10, flops=10),
        result("hoist", *[0.3] * 6, once=12.0, kept_bytes=500_000, flops_min=1),
        bench.Result(adam, bench.CompilerStats(memory_bytes=213_000_000)),
        bench.Result(adam_part, bench.CompilerStats(memory_bytes=60_000_000)),
    ]
    text = bench.conclusion([bench.rows_of(results)]).replace("\n", " ")
    assert text == (
        "deep: use partition, which is 2.7x faster than training everything. With "
        "Adam, partition needs 153 MB less memory than training all parameters. If "
        "batches repeat, a hoist step is 33.3x faster than a partition step; "
        "computing the features up front pays off from epoch 2 on, and storing them "
        "takes 500 kB per batch."
    )


@pytest.mark.parametrize(
    ("part_s", "hoist_s", "words"),
    [
        (None, 0.3, "deep: partition could not be compared with training everything"),
        (None, 0.3, "hoist could not be compared with partition"),
        (10.0, None, "hoist could not be compared with partition"),
        (10.0, 15.0, "Do not use hoist: its step is 1.5x slower than partition's."),
        (54.0, 0.3, "deep: train everything; partition is 2.0x slower."),
    ],
)
def test_answer_says_what_was_slower_or_not_timed(
    part_s: float | None, hoist_s: float | None, words: str
) -> None:
    def samples(seconds: float | None) -> list[float]:
        return [] if seconds is None else [seconds] * 6

    results = [
        result("everything", *[27.0] * 6),
        result("partition", *samples(part_s), flops_min=10),
        result("hoist", *samples(hoist_s), once=12.0, kept_bytes=5, flops_min=1),
    ]
    text = bench.conclusion([bench.rows_of(results)]).replace("\n", " ")
    assert words in text
    assert "measurably" not in text


def test_answer_prefers_devices_that_are_not_simulated() -> None:
    def on(devices: int, simulated: bool) -> list[bench.Row]:
        results = []
        for method, sent in (("everything", 9_000), ("partition", 3_000)):
            there = case(method, devices=devices, layout="replicated")
            there = replace(there, table="devices", simulated=simulated)
            results.append(bench.Result(there, bench.CompilerStats(sent_bytes=sent)))
        return bench.rows_of(results)

    real, simulated = on(4, simulated=False), on(8, simulated=True)
    assert "of 4 devices" in bench.conclusion([real, simulated])
    assert "of 8 devices" not in bench.conclusion([real, simulated])
    assert "of 8 devices" in bench.conclusion([simulated])


def test_answer_gives_no_verdict_inside_the_noise() -> None:
    results = [
        result("everything", *[3.0, 4.0, 5.0] * 2),
        result("partition", *[2.0, 3.0, 6.0] * 2, flops_min=10, flops=10),
        result("hoist", *[2.0, 3.0, 6.0] * 2, once=1.0, flops_min=10, flops=10),
    ]
    text = bench.conclusion([bench.rows_of(results)]).replace("\n", " ")
    assert "partition was not measurably faster or slower" in text
    assert "There is nothing to hoist." in text


# ---------------------------------------------------------------- the same step
def moving(
    changes: Mapping[str, Any], loss: float = 0.0, group: str | None = "sgd"
) -> bench.Step:
    """Returns a step that adds these changes to parameters of three zeros.

    It is compared with the first step of its group, if it has one. Parameters that the
    first step does not have count as frozen.
    """
    change = {name: jnp.array(values, jnp.float32) for name, values in changes.items()}
    zeros = jax.tree.map(jnp.zeros_like, change)
    return bench.Step(lambda state: (change, loss), init=lambda: zeros, group=group)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (moving({"w": [1, 1, 0.995]}), None),
        (moving({"w": [1, 1, 0.9]}), r"'w' is off by 0.1 \(tolerance 0.01\)"),
        (moving({"w": [1, 1, 0.9]}, group="clipped"), None),
        (moving({"w": [1, 1, 0.9]}, group=None), None),
        (moving({"w": [1, 1, 1]}, loss=np.nan, group=None), "the loss is nan"),
        (moving({"w": [1, 1, 1], "frozen": [0, 1e-3, 0]}),
         "'frozen' is frozen, but it changed"),
        (moving({"w": [1, 1, np.nan]}), "'w' is not finite after the step"),
        (moving({"w": [1, 1, 1]}, loss=np.nan), "the loss is nan"),
        (moving({}), "'w' is not updated"),
    ],
)  # fmt: skip
def test_methods_must_take_the_same_step(step: bench.Step, words: str | None) -> None:
    cases = {
        case("everything"): moving({"w": [1, 1, 1]}),
        case("zeroed gradients"): step,
    }
    context: Any = contextlib.nullcontext()
    if words is not None:
        words = rf"deep, zeroed gradients: {words}"
        context = pytest.raises(FloatingPointError, match=words)
    with context:
        bench.check_same_step(cases)


def test_a_frozen_parameter_must_not_change_by_one_bit() -> None:
    frozen = jnp.ones(3, jnp.bfloat16)
    one_ulp_more = frozen.at[1].set(jnp.bfloat16(1.0078125))

    def step(after: jax.Array) -> bench.Step:
        return bench.Step(
            lambda state: ({"f": after, "w": jnp.ones(3)}, 0.0),
            init=lambda: {"f": frozen, "w": jnp.zeros(3)},
            group="sgd",
        )

    trains = moving({"w": [1, 1, 1]})  # without "f"
    bench.check_same_step({case("partition"): trains, case("hoist"): step(frozen)})
    with pytest.raises(FloatingPointError, match="'f' is frozen, but it changed"):
        bench.check_same_step(
            {case("partition"): trains, case("hoist"): step(one_ulp_more)}
        )


def test_a_frozen_mask_may_contain_infinities_and_nan() -> None:
    mask = jnp.array([0, -jnp.inf, jnp.nan])

    def step(after: Any) -> bench.Step:
        return bench.Step(
            lambda state: ({"w": jnp.ones(3), "mask": after}, 0.0),
            init=lambda: {"w": jnp.zeros(3), "mask": mask},
            group="sgd",
        )

    trains = moving({"w": [1, 1, 1]})  # without the mask
    bench.check_same_step({case("partition"): trains, case("hoist"): step(mask)})
    with pytest.raises(FloatingPointError, match="'mask' is frozen, but it changed"):
        bench.check_same_step({case("partition"): trains, case("hoist"): step(-mask)})


def test_a_trainable_parameter_that_starts_infinite_is_found() -> None:
    def step(after: float) -> bench.Step:
        before = {"w": jnp.array([jnp.inf])}
        return bench.Step(
            lambda state: ({"w": jnp.array([after])}, 0.0), lambda: before, group="sgd"
        )

    with pytest.raises(FloatingPointError, match="'w' is not finite before"):
        bench.check_same_step(
            {case("everything"): step(jnp.inf), case("partition"): step(2.0)}
        )


def test_an_optimizer_that_stores_the_parameters_does_not_delete_them() -> None:
    problem = bench.place(bench.mlp("mlp", (2, 3, 2), 4, "linear_1"), jax.devices()[:1])
    optimizer = SimpleNamespace(
        init=lambda params: params,
        update=lambda grads, moments, params: (grads, moments),
    )
    problem = replace(problem, optimizer=optimizer)
    step = bench.build_step(problem, case("partition", optimizer="optax"))
    for _ in range(2):
        step.fn(step.init(), *step.args)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(problem.params))


def test_a_step_that_changes_nothing_is_found_in_bfloat16_too() -> None:
    ones = jnp.ones(3, jnp.bfloat16)  # an update of one ulp is below the tolerance
    one_ulp_more = ones.at[1].set(jnp.bfloat16(1.0078125))

    def step(after: jax.Array) -> bench.Step:
        return bench.Step(
            lambda state: ({"w": after}, 0.0), init=lambda: {"w": ones}, group="sgd"
        )

    expected = {case("everything"): step(one_ulp_more)}
    bench.check_same_step(expected | {case("partition"): step(one_ulp_more)})
    with pytest.raises(FloatingPointError, match="the update is only 0% of the"):
        bench.check_same_step(expected | {case("partition"): step(ones)})


def test_a_sum_as_the_loss_is_named_on_several_devices() -> None:
    steps = {
        case("everything"): moving({"w": [1, 1, 1]}),
        case("everything", devices=2): moving({"w": [2, 2, 2]}),
    }
    with pytest.raises(FloatingPointError, match="must be a mean over the rows"):
        bench.check_same_step(steps)


def test_a_method_that_trains_too_much_is_found() -> None:
    problem = bench.place(bench.mlp("mlp", (2, 3, 2), 4, "linear_1"), jax.devices()[:1])
    other = replace(problem, where="linear_0")
    steps = {
        case("partition"): bench.build_step(problem, case("partition")),
        case("stop_gradient"): bench.build_step(other, case("stop_gradient")),
    }
    with pytest.raises(FloatingPointError, match="linear_0"):
        bench.check_same_step(steps)


def test_adam_is_that_of_kingma_and_ba() -> None:
    params = {"w": jnp.array([1.0, -2.0])}
    moments = bench.adam_moments(params)
    grads = [[0.5, -1.0], [0.25, 3.0], [-1.0, 0.125]]
    wanted, mean, square = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for t, grad in enumerate(grads, start=1):
        params, moments = bench.adam(params, {"w": jnp.array(grad)}, moments)
        mean = 0.9 * mean + 0.1 * np.array(grad)
        square = 0.999 * square + 0.001 * np.array(grad) ** 2
        corrected = np.sqrt(square / (1 - 0.999**t))
        wanted -= bench.ADAM_RATE * mean / (1 - 0.9**t) / (corrected + 1e-8)
    np.testing.assert_allclose(params["w"], wanted, rtol=1e-5)


def test_clipping_scales_all_gradients_by_one_factor() -> None:
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped = bench.clip_by_global_norm(grads)  # their norm is 5
    np.testing.assert_allclose(clipped["a"], 3 / 5 * bench.CLIP_NORM, rtol=1e-6)
    small = jax.tree.map(lambda g: g / 1000, grads)
    np.testing.assert_array_equal(bench.clip_by_global_norm(small)["b"], small["b"])


def test_a_case_out_of_memory_says_so_and_the_others_go_on(short: None) -> None:
    problem = bench.place(bench.mlp("mlp", (2, 3, 2), 2, "linear_1"), jax.devices()[:1])

    def build(case: bench.Case) -> bench.Step:
        step = bench.build_step(problem, case)
        if case.method == "everything":
            raise ValueError("RESOURCE_EXHAUSTED: 1 PB")
        if case.method == "hoist":
            return replace(step, fn=lambda state, *args: np.empty(2**50))
        return step

    cases = [case(method) for method in ("everything", "partition", "hoist")]
    rows = bench.measure(cases, build, options_of("--rounds", "1"))
    remark = "out of memory (with the table's other methods also loaded)"
    said = [(row["remark"], row["step_s"] is not None) for row in rows]
    assert said == [(remark, False), (None, True), (remark, False)]


def test_a_simulated_case_out_of_memory_does_not_blame_the_other_methods() -> None:
    error = RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU ran out of memory")
    assert bench.expected_failure(error, case(simulated=True)) == "out of memory"


def test_features_that_do_not_fit_in_memory_are_a_remark_too(short: None) -> None:
    problem = bench.place(bench.mlp("mlp", (2, 3, 2), 2, "linear_1"), jax.devices()[:1])

    def build(case: bench.Case) -> bench.Step:
        step = bench.build_step(problem, case)
        assert step.features_step is not None
        too_large = replace(step.features_step, fn=lambda *args: np.empty(2**50))
        return replace(step, features_step=too_large)

    [row] = bench.measure([case("hoist")], build, options_of("--rounds", "1"))
    assert row["remark"].startswith("out of memory")
    assert row["step_s"] is None


@pytest.mark.parametrize("error", [ValueError("a fault"), ImportError("a fault")])
def test_other_errors_are_not_hidden(error: Exception, short: None) -> None:
    def build(case: bench.Case) -> bench.Step:
        raise error

    with pytest.raises(type(error), match="a fault"):
        bench.measure([case()], build, options_of("--rounds", "1"))


# ------------------------------------------------------------------- a whole run
@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """Runs all tables in a process; returns the JSON file, the plot and the lines."""
    folder = tmp_path_factory.mktemp("run")
    file, plot = folder / "run.json", folder / "run.png"
    short = """if True:
        import sys, bench
        bench.SAMPLE_S, bench.PEAK_VECTOR_BYTES, bench.RUN_STEPS = 1e-9, 2**12, 10
        bench.MAX_CALLS = 1
        bench.main(sys.argv[1:])
    """
    tables = ["--tables", "methods", "prefix", "run", "devices"]
    files = ["--json", str(file), "--plot", str(plot)]
    command = [sys.executable, "-c", short, *SMALL, *tables, *files]
    # One device, although test_minifreeze.py may ask XLA for eight in this process.
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        command, cwd=TOP, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    return file, plot, done.stdout.splitlines()


@pytest.mark.slow
def test_run_has_a_row_for_every_case(whole_run: Any) -> None:
    file, _, _ = whole_run
    five = ["everything", "partition", "hoist", "stop_gradient", "zeroed gradients"]
    plain = rows_in(file, table="methods", clip=False, optimizer="sgd")
    assert [row["method"] for row in plain] == [*five, "stop_gradient, not donated"]
    clipped = rows_in(file, table="methods", clip=True)
    assert [row["method"] for row in clipped] == five
    adam = rows_in(file, table="methods", optimizer="adam")
    assert [row["method"] for row in adam] == five[:3]

    prefix = [(row["problem"], row["method"]) for row in rows_in(file, table="prefix")]
    assert prefix == [
        ("mlp, 0 frozen", "everything"),
        ("mlp, 1 frozen", "partition"),
        ("mlp, 1 frozen", "hoist"),
    ]
    assert [row["method"] for row in rows_in(file, table="run")] == ["loop", "scan"]
    devices = rows_in(file, table="devices")
    assert [row["method"] for row in devices] == ["everything", "partition"]
    assert all(row["simulated"] and row["devices"] == 8 for row in devices)


def test_the_run_table_always_uses_sgd() -> None:
    options = options_of("--tables", "run", "--optimizer", "adam", "--rounds", "1")
    problem = bench.mlp("mlp", (2, 3, 2), 2, "linear_1")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(bench, name, value)
        [(_, rows)] = bench.run_table(options, [problem])
    assert [row["label"] for row in rows] == ["loop", "scan"]
    assert [row["optimizer"] for row in rows] == ["sgd", "sgd"]


def test_the_peak_is_measured_in_the_dtype_of_most_parameters() -> None:
    params = {"w": jnp.zeros((4, 4), jnp.bfloat16), "scale": jnp.zeros(4)}
    assert bench.dtype_of(params) == "bfloat16"


@pytest.mark.slow
def test_run_has_all_keys_and_says_what_it_ran_on(whole_run: Any) -> None:
    results = json.loads(whole_run[0].read_text())
    promised = """table problem method clip optimizer devices simulated layout step_s
        spread_s compile_s flops flops_min trainable_bytes collective_bytes sent_bytes
        memory_bytes temp_bytes rows_per_s efficiency once_s kept_bytes break_even
        remark platform samples peak_memory_bytes speedup limit_share"""
    for row in results["rows"]:
        assert set(promised.split()) <= set(row)
    assert (results["complete"], results["ended"]) == (True, "complete")
    card = results["card"]
    assert card["jax"] == jax.__version__
    assert card["peak_flops"] > 0
    assert {"commit", "clean", "date", "cpu", "device_kind"} <= set(card)


@pytest.mark.slow
def test_run_times_all_rows_that_are_not_simulated(whole_run: Any) -> None:
    for row in rows_in(whole_run[0], simulated=False):
        assert row["step_s"] > 0
        assert len(row["samples"]) == 1
        assert row["rows_per_s"] == row["devices"] * row["batch_size"] / row["step_s"]
    for row in rows_in(whole_run[0], simulated=True):
        assert row["step_s"] is None
        assert row["samples"] == []


@pytest.mark.slow
def test_run_prints_narrow_tables_and_ends_with_the_answer(whole_run: Any) -> None:
    _, _, lines = whole_run
    assert max(len(line) for line in lines) <= 100
    conclusion = " ".join(lines[-6:])
    assert "mlp: " in conclusion
    assert "sends" in conclusion


def test_a_long_title_is_wrapped() -> None:
    problem = bench.mlp("mlp", tuple(range(10, 60)), 2, "linear_0", abstract=True)
    lines = bench.describe(problem).splitlines()
    assert len(lines) > 1
    assert max(len(line) for line in lines) <= 100


@pytest.mark.slow
def test_run_draws_a_picture(whole_run: Any) -> None:
    assert whole_run[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_data_parallel_steps_send_what_trains_and_the_loss(whole_run: Any) -> None:
    everything, part = rows_in(whole_run[0], table="devices")
    trained, frozen = 16 * 4 + 4, 8 * 16 + 16
    assert part["trainable_bytes"] == 4 * trained
    assert part["collective_bytes"] == 4 * (trained + 1)
    assert part["sent_bytes"] == 4 * (trained + 1) * 2 * 7 // 8
    assert everything["collective_bytes"] == 4 * (trained + frozen + 1)


@pytest.mark.slow
def test_a_relative_model_is_found_by_the_simulation(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models.parent)
    options = options_of("--model", "mine.py:good", "--train", "head")
    monkeypatch.chdir(TOP)  # after the parsing, as the model's function may do
    rows = bench.compile_for_8_devices(options)
    assert [row["method"] for row in rows] == ["everything", "partition"]


@pytest.mark.slow
def test_nothing_simulated_is_sharded_for_cpus(whole_run: Any) -> None:
    rows = rows_in(whole_run[0], simulated=True)
    assert {row["layout"] for row in rows} == {"replicated"}


# ---------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--devices 4096", "--compile-only simulates more"),
        ("--devices 7 3 7", "--devices contains a duplicate: [7, 3, 7]"),
        ("--train nope --sizes 2 2", "mlp: pattern 'nope'"),
        ("--sizes 8", "--sizes needs at least two widths"),
        ("--sizes 8 99999999999", "below 2**31, not 99999999999"),
        ("--rounds 0", "must be positive"),
        ("--coordinator a:99999 --processes 2 --process 0", "must be HOST:PORT"),
        ("--coordinator a:1 --processes 2", "go together"),
        ("--json {}/no/x.json", "no/x.json: there is no such directory"),
        ("--json {}", "is not a regular file"),
        ("--json {}/x.png --plot {}/./x.png", "must not be the same file"),
        ("--plot {}/x.doc", "x.doc must end in one of: "),
        ("--plot {}/x.png --tables run", "--plot draws the methods and prefix tables"),
        ("--model {}/none.py:make --train w", "there is no file"),
        ("--model {}/mine.py --train w", "must be FILE.py:NAME"),
        ("--model {}/mine.py:good", "--model needs --train or --freeze"),
        ("--model {}/mine.py:good --train head --tables prefix", "freezes MLP layers"),
        ("--model {}/mine.py:good --train v", "mine: pattern 'v'"),
        ("--model {}/mine.py:good --train head --batch 5", "no leaf of the batch"),
        ("--model {}/mine.py:nothing --train w", "mine.py has no nothing()"),
        ("--model {}/mine.py:pair --train w", "(loss_fn, params, batch)"),
        ("--model {}/mine.py:array --train w", "the batch must be a tuple, not "),
        (
            "--model {}/mine.py:large --train w",
            "batch '1' is of type int, not an array",
        ),
        ("--model {}/mine.py:no_optimizer --train w", "str is not an optax optimizer"),
        (
            "--model {}/mine.py:with_optax --train head --optimizer adam",
            "mine.py:with_optax returns an optimizer; omit --optimizer",
        ),
        ("--model {}/mine.py:counts --train w", "parameter 'steps' is int32"),
        ("--model {}/mine.py:function --train w", "parameter 'act' is of type"),
        ("--model {}/mine.py:exits --train w", "called sys.exit(no config)"),
        ("--model {}/mine.py:imports --train w", "uv run --with notthere bench.py"),
        (
            "--model {}/mine.py:uneven --train w",
            "pass the number of rows with --batch N",
        ),
        ("--topology v5e:2x4", "needs --compile-only"),
        ("--topology v5e:2x4 --compile-only --devices 4", "omit --devices"),
        ("--compile-only --tables methods", "only with the devices table"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    typed: str, words: str, models: Path, short: None, capsys: Any
) -> None:
    ended = Ended(capsys, *typed.replace("{}", str(models.parent)).split())
    assert (ended.code, ended.out) == (2, "")
    assert ended.error.startswith("bench.py: error: ")
    assert ended.error.count("\n") == 1
    assert words in ended.error
    assert [file for file in models.parent.iterdir() if file.is_file()] == [models]


def test_a_bug_before_the_first_table_prints_its_traceback(
    short: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_files(options: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(bench, "check_files", check_files)
    ended = Ended(capsys, *SMALL)
    assert (ended.code, ended.out) == (2, "")
    assert ended.error.startswith("Traceback (most recent call last):")
    assert ended.error.endswith("bench.py: error: 'a bug'\n")


def test_disabled_jit_is_refused(short: None, capsys: Any) -> None:
    with jax.disable_jit():
        assert "JAX_DISABLE_JIT is set" in Ended(capsys).error


def test_missing_matplotlib_is_named(
    short: None, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ended = Ended(capsys, "--plot", tmp_path / "x.png")
    assert ended.code == 2
    assert "uv run --with matplotlib bench.py" in ended.error


@pytest.mark.parametrize(
    ("typed", "trained"),
    [
        ("--freeze * !*/b", {"linear_0/b", "linear_1/b"}),
        ("--freeze !linear_0 linear_0/b", {"linear_0/w"}),
        ("--train linear_0", {"linear_0/w", "linear_0/b"}),
    ],
)
def test_freeze_is_the_opposite_of_train(typed: str, trained: set[str]) -> None:
    options = options_of("--sizes", "2", "3", "2", *typed.split())
    (problem,) = bench.load_problems(options)
    trainable, _ = mf.partition(problem.where, problem.params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trainable)]
    assert {bench.leaf_name(path) for path in paths} == trained


def test_options_without_effect_are_named() -> None:
    options = options_of("--tables", "prefix", "run", "--train", "linear_0")
    notes = " ".join(bench.options_without_effect(options))
    assert "--train and --freeze have no effect on the prefix table" in notes
    assert "The run table always uses the walk-through network and SGD" in notes


# ---------------------------------------------------------------- your own model
MODELS = """
    from __future__ import annotations
    import dataclasses
    import jax, jax.numpy as jnp, numpy as np
    w, x = jnp.ones(3), jnp.ones((4, 3))

    def loss(params, x):
        return jnp.mean((x * params["body"]) @ params["head"])

    def dropout_loss(params, key, x):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.mean((x * keep) @ params["body"] * params["head"])

    def token_loss(params, tokens):
        return jnp.mean(params["table"][tokens])

    def good():
        return loss, {"head": w, "body": w}, (x,)
    def keyed():
        params = {"head": jnp.ones(2), "body": jnp.ones((3, 2))}
        return dropout_loss, params, (jax.random.key(0), x)
    def tokens():
        ids = np.zeros((4, 7), np.int32)
        return token_loss, {"table": jnp.ones(5), "body": w}, (ids,)
    def with_optax():
        import optax
        return (*good(), optax.adamw(1e-3))

    def scalars():
        def loss(params, x):
            return jnp.mean((x @ params["body"]) * params["head"] + params["bias"])
        return loss, {"head": 2.0, "bias": 0.5, "body": jnp.ones((3, 2))}, (x,)
    def local_dataclass():
        @dataclasses.dataclass
        class Config:
            width: int
        return loss, {"head": jnp.ones(Config(3).width), "body": w}, (x,)
    def large():
        return loss, {"w": w}, (x, 2**40)
    def no_optimizer():
        return (*good(), "adam")
    def array():
        return loss, {"w": w}, x
    def pair():
        return loss, {"w": w}
    def vector():
        return lambda params, x: params["w"] * x, {"w": w}, (w,)
    def counts():
        return loss, {"w": w, "steps": 3}, (x,)
    def function():
        return loss, {"w": w, "act": jnp.tanh}, (x,)
    def exits():
        raise SystemExit("no config")
    def imports():
        import notthere
    def breaks():
        raise KeyError("no such layer")
    def broken_loss(params, x):
        raise ZeroDivisionError("by what?")
    def loss_breaks():
        return broken_loss, {"w": w}, (x,)
    def uneven():
        return lambda params, a, b: params["w"].sum(), {"w": w}, (x, jnp.ones(2))
    def wrong():
        return lambda params, x: jnp.nan * params["head"].sum(), {"head": w}, (x,)
    def steep():
        return lambda params, x: jnp.sqrt(params["head"]).sum(), {"head": 0 * w}, (x,)
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(MODELS))
    return file


def load(models: Path, name: str, *typed: str) -> bench.Problem:
    options = options_of("--model", f"{models}:{name}", "--train", "*", *typed)
    return bench.load_model(options)


def test_rows_are_those_of_the_data_not_of_a_random_key(models: Path) -> None:
    assert load(models, "keyed").batch_rows == 4
    assert load(models, "uneven", "--batch", "2").batch_rows == 2


def test_rows_of_token_ids_are_counted_in_tokens(models: Path) -> None:
    problem = load(models, "tokens")
    assert (problem.batch_rows, problem.tokens) == (4, 7)
    case = bench.baseline_case("methods", problem, options_of())
    assert (case.batch_size, case.batch_unit) == (28, "tokens")
    assert load(models, "good").tokens is None


def test_a_model_is_measured(models: Path, short: None, capsys: Any) -> None:
    file = models.with_suffix(".json")
    typed = ("--model", f"{models}:keyed", "--train", "head", "--rounds", 1)
    ended = Ended(capsys, *typed, "--json", file)
    assert (ended.code, ended.error) == (0, "")
    assert "mine: train head, batch 4" in ended.out
    (row,) = rows_in(file, method="hoist", clip=False, optimizer="sgd")
    random = "random numbers are drawn once per batch and reused in every epoch"
    assert row["remark"] == random


@pytest.mark.parametrize(
    ("name", "head"), [("scalars", "head"), ("local_dataclass", "head")]
)
def test_an_unusual_model_is_measured(
    name: str, head: str, models: Path, short: None, capsys: Any
) -> None:
    ended = Ended(capsys, "--model", f"{models}:{name}", "--train", head, "--rounds", 1)
    assert (ended.code, ended.error) == (0, "")


def test_a_step_of_your_optimizer_is_optaxs_own(models: Path) -> None:
    problem = bench.place(load(models, "with_optax"), jax.devices()[:1])
    problem = replace(problem, where="head")
    step = bench.build_step(problem, case("partition", optimizer="optax"))
    state, _ = step.fn(step.init(), *step.args)

    head = problem.params["head"]
    grad = jax.grad(problem.loss)(problem.params, *problem.batch)["head"]
    optimizer = optax.adamw(1e-3)
    updates, _ = optimizer.update(grad, optimizer.init(head), head)
    after = step.get_params(state)["head"]
    np.testing.assert_allclose(after, head + updates, rtol=1e-6)
    assert not np.array_equal(after, head)


def test_an_optax_optimizer_takes_the_step(
    models: Path, short: None, capsys: Any
) -> None:
    file = models.with_suffix(".json")
    typed = ("--model", f"{models}:with_optax", "--train", "head", "--rounds", 1)
    ended = Ended(capsys, *typed, "--json", file)
    assert (ended.code, ended.error) == (0, "")
    rows = rows_in(file)
    assert {row["optimizer"] for row in rows} == {"optax"}
    assert [row["method"] for row in rows] == ["everything", "partition", "hoist"]
    everything, part, _ = rows
    # Two moments of 3 floats for "body" are what partition spares.
    assert everything["memory_bytes"] - part["memory_bytes"] >= 2 * 3 * 4


@pytest.mark.parametrize(
    ("name", "frame", "words"),
    [
        ("breaks", "in breaks", "raised KeyError: 'no such layer'"),
        ("loss_breaks", "in broken_loss", "raised ZeroDivisionError: by what?"),
        ("vector", "", "raised TypeError: Gradient only defined for scalar-output"),
    ],
)
def test_an_exception_of_your_own_code_prints_its_traceback(
    name: str, frame: str, words: str, models: Path, short: None, capsys: Any
) -> None:
    ended = Ended(capsys, "--model", f"{models}:{name}", "--train", "w")
    *shown, last = ended.error.splitlines()
    assert (ended.code, ended.out) == (2, "")
    assert last.startswith(f"bench.py: error: {models}:{name} {words}")
    assert shown[0] == "Traceback (most recent call last):"
    assert any(frame in line for line in shown)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong", "mine, everything: the loss is nan"),
        ("steep", "mine, everything: 'head' is not finite after the step"),
    ],
)
def test_a_failure_before_the_first_row_keeps_old_results(
    name: str, words: str, models: Path, short: None, capsys: Any
) -> None:
    kept = models.with_suffix(".json")
    kept.write_text("old")
    typed = ("--model", f"{models}:{name}", "--train", "head", "--json", kept)
    ended = Ended(capsys, *typed)
    assert (ended.code, kept.read_text()) == (1, "old")
    assert ended.error.startswith(f"bench.py: error: {words}")
    assert ended.error.count("\n") == 1


# --------------------------------------------------- results are not lost
def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")

    def write_half(part: Path) -> None:
        part.write_text("ne")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        bench.write_atomically(file, write_half)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("x.json", "old")]


def test_a_full_disk_is_named_and_ends_with_code_1(
    short: None, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(report: bench.Report) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(bench, "write_json", fail)
    ended = Ended(capsys, *SMALL, "--tables", "prefix", "--json", tmp_path / "x.json")
    assert ended.code == 1
    assert "hoist, 1 frozen" in ended.out  # the table is printed all the same
    assert ended.error == "bench.py: error: No space left on device\n"


def test_a_plot_of_nothing_keeps_the_old_one(tmp_path: Path) -> None:
    report, plot = bench.Report(), tmp_path / "x.png"
    plot.write_text("old")
    report.options.plot = plot
    rows = bench.rows_of([result("everything")])  # not timed
    report.tables = [("deep", rows)]
    bench.write_plot(report)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def raise_at(text: str, error: BaseException) -> Callable[..., None]:
    """Returns a `print_now` that raises an error after it has printed a text."""

    def print_now(*texts: str, **options: Any) -> None:
        print(*texts, **options)
        if any(text in said for said in texts):
            raise error

    return print_now


@pytest.mark.parametrize(
    ("error", "code", "ended"),
    [
        (KeyboardInterrupt(), 0, "interrupted"),  # the signal gives the code
        (BrokenPipeError(32, "Broken pipe"), 1, "error: [Errno 32] Broken pipe"),
        (RuntimeError("a fault"), 1, "error: a fault"),
    ],
)
def test_what_was_measured_is_written_however_the_run_ends(
    error: BaseException,
    code: int,
    ended: str,
    short: None,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    kept = tmp_path / "x.json"
    kept.write_text("old")
    monkeypatch.setattr(bench, "print_now", raise_at("freeze the first layers", error))
    run = Ended(capsys, *SMALL, "--tables", "prefix", "run", "--json", kept)
    results = json.loads(kept.read_text())
    assert (run.code, results["complete"], results["ended"]) == (code, False, ended)
    methods = [row["method"] for row in results["rows"]]
    assert methods == ["everything", "partition", "hoist"]
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_an_interrupt_during_the_last_writing_does_not_stop_it(
    short: None, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = bench.write_json

    def interrupted_write(report: bench.Report) -> None:
        if report.ended == "complete":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        real(report)

    monkeypatch.setattr(bench, "write_json", interrupted_write)
    kept = tmp_path / "x.json"
    ended = Ended(capsys, *SMALL, "--tables", "prefix", "--json", kept)
    assert ended.code == 128 + signal.SIGINT
    assert ended.error == (
        "bench.py: interrupted after the last table; the results are complete\n"
    )
    assert json.loads(kept.read_text())["complete"]


def test_the_results_are_on_disk_after_every_table(
    short: None, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    on_disk = []

    def print_now(*texts: str, **options: Any) -> None:
        if any("freeze the first layers" in text for text in texts):
            on_disk.append(json.loads(file.read_text()))

    monkeypatch.setattr(bench, "print_now", print_now)
    ended = Ended(capsys, *SMALL, "--tables", "prefix", "run", "--json", file)
    assert ended.code == 0
    (results,) = on_disk
    assert (results["complete"], results["ended"]) == (False, "running")
    assert {row["table"] for row in results["rows"]} == {"prefix"}


def test_a_signal_in_a_later_round_ends_the_run_and_keeps_the_rounds_before(
    short: None, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    real, taken = bench.sample, []

    def sample(step: bench.Step, calls: int) -> float:
        taken.append(step)
        # The peaks take 10 samples. A round of the prefix table takes 4: one for each
        # of three steps, and one for hoist's features. This is in its second round.
        if len(taken) == 10 + 4 + 2:
            signal.raise_signal(signal.SIGINT)
        return real(step, calls)

    monkeypatch.setattr(bench, "sample", sample)
    typed = [*SMALL, "--rounds", "5", "--tables", "prefix", "run", "--json", file]
    ended = Ended(capsys, *typed)
    assert (ended.code, ended.error) == (130, "bench.py: interrupted\n")
    results = json.loads(file.read_text())
    assert results["ended"] == "interrupted"
    rows = results["rows"]
    assert [len(row["samples"]) for row in rows] == [1, 1, 1]
    assert "hoist, 1 frozen" in ended.out


def test_a_second_signal_raises_unless_it_follows_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: clock.now))
    report = bench.Report()
    with pytest.raises(KeyboardInterrupt):
        report.interrupt(signal.SIGINT, None)
    report.interrupt(signal.SIGTERM, None)
    assert report.signal == signal.SIGTERM
    clock.now += 2
    with pytest.raises(KeyboardInterrupt):
        report.interrupt(signal.SIGINT, None)


def test_a_signal_after_the_last_table_does_not_raise() -> None:
    report = bench.Report()
    report.ended = "complete"
    report.interrupt(signal.SIGINT, None)
    assert report.signal == signal.SIGINT


def start(*typed: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOP / "bench.py"), *map(str, typed)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, **pipes)


def read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without {words!r}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_with_their_exit_code_and_keep_its_rows(
    number: signal.Signals, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    process = start(*SMALL, "--tables", "prefix", "devices", "--json", file)
    read_until(process, "hoist, 1 frozen")  # the last row of the prefix table
    process.send_signal(number)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (128 + number, "bench.py: interrupted\n")
    results = json.loads(file.read_text())
    assert results["ended"] == "interrupted"
    assert len(results["rows"]) == 3
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.slow
def test_an_interrupt_during_the_imports_is_silent() -> None:
    code = f"""if True:
        import importlib.abc, signal, sys
        class Interrupting(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "jax":
                    signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Interrupting())
        import runpy
        runpy.run_path({str(TOP / "bench.py")!r}, run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# ------------------------------------------------------------- clusters and pods
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start_both(*typed: object, others: tuple[object, ...] = ()) -> Any:
    """Starts a cluster of two processes, and passes `others` to the second only."""
    joined = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2]
    first = start(*typed, *joined, "--process", 0)
    second = start(*typed, *joined, "--process", 1, *others)
    return first, second


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    both = start_both(*SMALL, "--json", file)
    (out, error), (silent, _) = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], error
    assert "2 x cpu" in out
    assert silent == "" or silent.startswith("[Gloo]")
    rows = rows_in(file, devices=2)
    assert [(row["layout"], row["method"]) for row in rows] == [
        ("replicated", "everything"),
        ("replicated", "partition"),
        ("sharded", "everything"),
        ("sharded", "partition"),
    ]
    assert all(row["step_s"] > 0 and not row["simulated"] for row in rows)
    assert rows[1]["collective_bytes"] == rows[1]["sent_bytes"] == 4 * (16 * 4 + 4) + 4
    assert rows[1]["efficiency"] > 0


@pytest.mark.slow
def test_processes_with_different_options_all_refuse(tmp_path: Path) -> None:
    both = start_both(*SMALL, others=("--optimizer", "adam"))
    ends = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [2, 2]
    for (_, error), optimizer in zip(ends, ("sgd", "adam")):
        (line,) = [line for line in error.splitlines() if "bench.py" in line]
        assert "processes [1] differ from process 0" in line
        assert f"'optimizer': '{optimizer}'" in line


@pytest.mark.slow
def test_sigterm_to_one_process_ends_both(tmp_path: Path) -> None:
    first, second = start_both(*SMALL, "--rounds", 10**6)
    read_until(first, "Sent is")  # the measuring begins
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=180)
    _, error = first.communicate(timeout=180)
    assert second.returncode == 128 + signal.SIGTERM
    assert first.returncode not in (0, None)
    assert error


def test_a_port_in_use_is_refused_in_one_line(short: None, capsys: Any) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        joined = ("--processes", 2, "--process", 0)
        ended = Ended(capsys, "--coordinator", f"127.0.0.1:{port}", *joined)
    assert ended.code == 2
    assert f"127.0.0.1:{port}" in ended.error
    assert ended.error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        ("JAX TPU support not installed", 'uv run --with "jax[tpu]" bench.py'),
        ("Invalid TPU external name: TPU v9x", "v5e:16x16, v6e:16x16"),
    ],
)
def test_an_unavailable_topology_is_explained(
    raised: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax.experimental import topologies

    def fail(**options: Any) -> Any:
        raise RuntimeError(raised)

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    for name in ("SKIP_MDS_QUERY", "ACCELERATOR_TYPE", "WORKER_HOSTNAMES"):
        # topology_devices sets these; this restores them afterwards.
        monkeypatch.setenv(f"TPU_{name}", "")
    with pytest.raises(ValueError, match="--topology") as error:
        bench.topology_devices("v9x:9")
    assert words in str(error.value)


def test_a_topology_is_tried_replicated_and_sharded(
    short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = bench.mlp("mlp", (4, 8, 2), 4, "linear_1", abstract=True)
    chips = [SimpleNamespace(platform="tpu")] * 4
    monkeypatch.setattr(bench, "topology_devices", lambda name: chips)
    placed = []

    def place(problem: Any, devices: Any, sharded: bool, abstract: bool) -> Any:
        placed.append((devices, sharded, abstract))
        raise MemoryError

    monkeypatch.setattr(bench, "place", place)  # its error becomes a remark
    options = options_of("--compile-only", "--topology", "v5e:2x2")
    ((title, rows),) = bench.devices_table(options, [problem])
    assert placed == [(chips, False, True)] * 2 + [(chips, True, True)] * 2
    found = [[row[key] for key in ("layout", "method", "platform")] for row in rows]
    assert found == [
        ["replicated", "everything", "tpu"],
        ["replicated", "partition", "tpu"],
        ["sharded", "everything", "tpu"],
        ["sharded", "partition", "tpu"],
    ]
    for row in rows:
        assert (row["devices"], row["batch_size"], row["simulated"]) == (4, 4, True)
    assert title.endswith("as compiled for v5e:2x2, not run")


@pytest.mark.slow
def test_simulated_devices_are_as_many_as_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    process = start(*SMALL, "--compile-only", "--devices", 1, 64, "--json", file)
    out, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert "as compiled for cpu, not run" in out
    found = [(row["devices"], row["collective_bytes"]) for row in rows_in(file)]
    trained, everything = 16 * 4 + 4 + 1, 8 * 16 + 16 + 16 * 4 + 4 + 1
    assert found == [(1, 0), (1, 0), (64, 4 * everything), (64, 4 * trained)]


# ------------------------------------------------------------------------- peers
@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(sys.modules, "bench", bench)
    return runpy.run_path(str(bench.PEERS))


@pytest.mark.slow
def test_peers_take_our_step_in_every_form(short: None, peers: dict[str, Any]) -> None:
    problem = bench.mlp("mlp", (4, 8, 8, 2), 4, ["linear_0", "linear_2"])
    options = options_of("--rounds", "1", "--peers")
    ((_, rows),) = peers["peers_table"](options, [problem])
    methods = [row["method"] for row in rows]
    own = ["everything", "partition"]
    assert methods == [*own, *own, *peers["FORMS"], *peers["CLIPPED_FORMS"]]
    timed = {row["method"] for row in rows if row["step_s"] is not None}
    assert {"haiku", "equinox, filter_jit", "nnx, cached_partial", "optax"} <= timed
    for row in rows:
        assert row["step_s"] is not None or "left out" in row["remark"]


@pytest.mark.slow
def test_peers_that_are_missing_are_named(
    short: None, peers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("haiku", "equinox", "flax.nnx", "optax"):
        monkeypatch.setitem(sys.modules, module, None)
    problem = bench.mlp("mlp", (2, 3, 2), 2, ["linear_1"])
    options = options_of("--rounds", "1", "--peers")
    ((_, rows),) = peers["peers_table"](options, [problem])
    others = [*peers["FORMS"], *peers["CLIPPED_FORMS"]]
    assert [row["method"] for row in rows[4:]] == others
    for row in rows[4:]:
        library, _, _ = row["method"].partition(",")
        module = "flax.nnx" if library == "nnx" else library
        assert row["remark"].startswith(f"left out: import of {module} halted")
        assert row["step_s"] is None


@pytest.mark.slow
def test_a_peer_that_takes_another_step_is_refused(
    short: None, peers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_step(params: Any, grads: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 0.5 * bench.SGD_RATE * g, params, grads)

    monkeypatch.setitem(peers["haiku"].__globals__, "descend", half_step)
    problem = bench.mlp("mlp", (2, 3, 2), 2, ["linear_1"])
    options = options_of("--rounds", "1", "--peers")
    with pytest.raises(FloatingPointError, match="mlp, haiku: 'linear_1/b' is off by"):
        list(peers["peers_table"](options, [problem]))
