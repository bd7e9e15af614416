"""The walk-through's picture, drawn by the real matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.tree_util import keystr, tree_flatten_with_path
from matplotlib.figure import Figure
from matplotlib.image import imread

import minifreeze

PICTURE_IN_README = Path(minifreeze.__file__).parent / ".github" / "params.png"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved during the test."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def save(self: Figure, *args: Any, **options: Any) -> None:
        saved.append(self)
        savefig(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def named(params: Any) -> dict[str, Any]:
    entries, _ = tree_flatten_with_path(params)
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in entries}


def walk_through(seed: int, steps: int) -> tuple[Any, Any]:
    """The parameters of the walk-through, before and after the training."""
    init_key, data_key = jax.random.split(jax.random.key(seed))
    before = minifreeze.init(init_key, [1, 300, 100, 10])
    trainable, frozen = minifreeze.partition("!linear_1", before)
    xs, ys = minifreeze.dataset(data_key, steps)
    trainable, _ = minifreeze.train(trainable, frozen, xs, ys)
    return before, minifreeze.merge(trainable, frozen)


def test_plot_draws_every_parameter_twice_on_one_scale(
    figures: list[Figure], tmp_path: Path
) -> None:
    file = tmp_path / "params.png"
    file.write_text("the old picture")
    minifreeze.main(["--steps", "4", "--plot", str(file)])
    assert imread(file).shape == imread(PICTURE_IN_README).shape
    assert list(tmp_path.iterdir()) == [file]

    (figure,) = figures
    before, after = walk_through(seed=42, steps=4)
    pictures = [axes for axes in figure.axes if axes.get_title()]
    scales = [axes for axes in figure.axes if not axes.get_title()]
    assert len(scales) == len(named(before))

    leaves = [*named(before).items(), *named(after).items()]
    labels = ["before"] * len(named(before)) + ["after"] * len(named(after))
    for axes, (name, leaf), label in zip(pictures, leaves, labels, strict=True):
        state = "frozen" if name.startswith("linear_1") else "trainable"
        assert axes.get_title() == f"{name}\n{state}"
        assert axes.get_xlabel() == label
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), np.atleast_2d(leaf))
        old, new = named(before)[name], named(after)[name]
        largest = max(np.abs(old).max(), np.abs(new).max()) or 1.0
        assert image.get_clim() == (-largest, largest)


@pytest.mark.parametrize("suffix", ["png", "PNG", "pdf", "svg"])
def test_plot_writes_the_format_of_the_suffix(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing takes a second, and the format does not depend on it.
    monkeypatch.setattr(Figure, "draw", lambda *args: None)
    file = tmp_path / f"params.{suffix}"
    minifreeze.main(["--steps", "1", "--plot", str(file)])
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix.lower()]
    assert file.read_bytes().startswith(start)


def test_plot_refuses_a_format_that_matplotlib_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        minifreeze.main(["--plot", str(tmp_path / "params.xyz")])
    printed = capsys.readouterr()
    assert "params.xyz" in printed.err
    assert "png" in printed.err
    assert printed.out == ""
