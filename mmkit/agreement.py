"""How alike encoders answer: on which share of the same questions both are right or both wrong, and what is left of it beyond chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkit.report_compare import RIGHT, scores
from mmkit.report_data import Evaluation, RunData


def agreements(data: RunData) -> list[dict[str, Any]]:
    """A matrix for each benchmark that several encoders were asked; controls are left out, and captions, which are not right or wrong.

    Returns:
        For each: "benchmark", "encoders", and "rows": for each encoder its cells, one for each encoder, None without a question in common.
    """
    found = []
    for benchmark in data.benchmarks:
        asked = [data.find(encoder, benchmark) for encoder in data.encoders]
        evaluations = [evaluation for evaluation in asked if evaluation is not None and evaluation.items]
        if len(evaluations) > 1 and not evaluations[0].is_control and not evaluations[0].graded:
            rows = [{"encoder": one.encoder, "cells": [cell(one, other) for other in evaluations]} for one in evaluations]
            found.append({"benchmark": benchmark, "encoders": [evaluation.encoder for evaluation in evaluations], "rows": rows})
    return found


def cell(one: Evaluation, other: Evaluation) -> dict[str, Any] | None:
    """Two encoders on the questions both were asked: "agree" and "kappa", "n", and "right", the share that both have right."""
    shared = [name for name in one.items if name in other.items]
    if not shared:
        return None
    x, y = scores(one, shared) >= RIGHT, scores(other, shared) >= RIGHT
    return {"n": len(shared), "agree": float((x == y).mean()), "right": float((x & y).mean()), "kappa": cohens_kappa(x, y)}


def cohens_kappa(x: Sequence[bool] | np.ndarray, y: Sequence[bool] | np.ndarray) -> float | None:
    """Agreement beyond what two who answer independently, each as often right as now, would have: 1 is all, 0 is chance (Cohen 1960).

    Returns:
        None where chance alone agrees always: both are right everywhere, or wrong everywhere.
    """
    a, b = np.asarray(x, dtype=bool), np.asarray(y, dtype=bool)
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return None if chance == 1 else float(((a == b).mean() - chance) / (1 - chance))
