"""Correlation of two arrays, each value with a weight."""

from __future__ import annotations

import math

import numpy as np


def pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Weighted Pearson correlation of two arrays; None where one of them is constant. weights: None: all are 1."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    weights = np.ones(len(x)) if weights is None else weights
    x, y = x - np.average(x, weights=weights), y - np.average(y, weights=weights)
    covariance = np.sum(weights * x * y)
    return float(covariance / np.sqrt(np.sum(weights * x * x) * np.sum(weights * y * y)))


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Weighted Spearman correlation, which a few extreme values do not move, and which is 1 for any rising curve.

    None where an array is constant, NaN where a value is. weights: None: all are 1.
    """
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    weights = np.ones(len(x)) if weights is None else weights
    return pearson(ranks(x, weights), ranks(y, weights), weights)


def ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weight below each value plus half of the weight at it: with weights of 1, the mean rank up to a constant."""
    _, place = np.unique(values, return_inverse=True)
    at = np.bincount(place, weights=weights)
    return (np.cumsum(at) - at / 2)[place]
