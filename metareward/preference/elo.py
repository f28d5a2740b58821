"""Elo scores of judgments from their battles (arXiv 2407.19594, section 2.2).

The scores are on the natural-log scale: exp(eps_m - eps_n) is the odds that m beats n. They maximise

    f(eps) = sum_mn B_mn log sigmoid(eps_m - eps_n) - ridge/2 sum_m eps_m^2.

Without the ridge a judgment that never loses would go to infinity. The gradient of the first sum adds up to 0
over m, so at the maximum ridge * sum(eps) = 0: the scores are centred by themselves.
"""

from __future__ import annotations

import numpy as np

MAX_STEPS = 200


def elo_scores(battles: np.ndarray, ridge: float = 0.01) -> np.ndarray:
    """The maximiser of f by Newton's method with a backtracking line search, in float64.

    Why it converges: f is smooth, and its Hessian -(L + ridge I), with L a weighted graph Laplacian, is at
    most -ridge I everywhere. So f is strongly concave with one maximum eps*, the Newton step is always an
    ascent direction, and with backtracking the method converges from any start, quadratically near eps*. It
    stops when the gradient's norm is at most 1e-13 (1 + sum B); strong concavity gives |eps - eps*| <=
    |gradient| / ridge, that is 1e-11 (1 + sum B) at ridge 0.01.

    Args:
        battles: [n, n] float64, B_mn = weighted wins of m over n, with a zero diagonal.
        ridge: positive.

    Returns:
        [n] float64, mean 0. All zeros where there is no win.

    Raises:
        ValueError: `ridge` is not positive, or the matrix is not square, has a negative or non-finite entry
            or something on its diagonal.
        RuntimeError: the tolerance was not reached, which a ridge many orders below 1e-6 can cause.
    """
    wins = _checked(battles, ridge)
    count = len(wins)
    eps = np.zeros(count)
    tolerance = 1e-13 * (1.0 + wins.sum())
    for _ in range(MAX_STEPS):
        gradient, hessian = _derivatives(eps, wins, ridge)
        if np.linalg.norm(gradient) <= tolerance:
            return eps - eps.mean() if count else eps
        step = np.linalg.solve(hessian, gradient)
        eps = eps + _step_length(eps, step, float(gradient @ step), wins, ridge) * step
    raise RuntimeError(f"the Elo scores did not converge in {MAX_STEPS} Newton steps (ridge {ridge})")


def _objective(eps: np.ndarray, wins: np.ndarray, ridge: float) -> float:
    difference = eps[:, None] - eps[None, :]
    # log sigmoid(x) = -log(1 + exp(-x)), in the form that does not overflow.
    return float(-(wins * np.logaddexp(0.0, -difference)).sum() - ridge / 2 * (eps @ eps))


def _derivatives(eps: np.ndarray, wins: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of f [n], and minus its Hessian [n, n]."""
    difference = eps[:, None] - eps[None, :]
    lose = np.exp(-np.logaddexp(0.0, difference))  # sigmoid(eps_n - eps_m)
    surplus = wins * lose
    gradient = surplus.sum(axis=1) - surplus.sum(axis=0) - ridge * eps
    weight = (wins + wins.T) * lose * lose.T
    hessian = np.diag(weight.sum(axis=1) + ridge) - weight
    return gradient, hessian


def _step_length(eps: np.ndarray, step: np.ndarray, slope: float, wins: np.ndarray, ridge: float) -> float:
    start = _objective(eps, wins, ridge)
    # At the maximum the gain drowns in rounding; the slack keeps full steps there, which the quadratic end
    # needs.
    slack = 1e-14 * (1.0 + abs(start)) * len(eps)
    length = 1.0
    while _objective(eps + length * step, wins, ridge) < start + 1e-4 * length * slope - slack:
        length /= 2
    return length


def _checked(battles: np.ndarray, ridge: float) -> np.ndarray:
    wins = np.asarray(battles, dtype=np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1]:
        raise ValueError(f"battles must be a square matrix, not of shape {wins.shape}")
    if not np.isfinite(wins).all() or (wins < 0).any() or np.diagonal(wins).any():
        raise ValueError("battles must be finite and not negative, with a zero diagonal")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, not {ridge}: it keeps the scores finite")
    return wins
