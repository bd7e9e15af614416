# SPDX-License-Identifier: MIT
"""Mutants of meaning: each breaks one clause of what minifreeze.py promises.

.ci/mutate replaces `old`, which must occur exactly once in minifreeze.py, by `new`, and
expects test_minifreeze.py to fail.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clause:
    """A change of minifreeze.py that breaks the rule that `name` denies."""

    name: str
    old: str
    new: str


CLAUSES: list[Clause] = []
