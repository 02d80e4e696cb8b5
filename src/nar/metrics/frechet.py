"""Numbers that compare two sets of features: Frechet and kernel distance, Inception Score, precision, recall, coverage.

Knows arrays only; does not know which network made the features, or pictures, files and models.
Dimensions: N real rows, M fake rows, D features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Features = Tensor | np.ndarray
ROUNDING = 1e-12  # of the variance of both sets; a set in another order is at 1e-15 of it from itself
EQUAL = 16  # rounding errors of a squared distance, of both lengths: equal rows are within 5, up to 12,288 features
BLOCK_NUMBERS = 1 << 24  # distances held at once: 64 MB in float32


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to features: mean (D,) and covariance (D, D), float64, and how many rows it came from."""

    mean: np.ndarray
    covariance: np.ndarray
    num_samples: int


class RunningStatistics:
    """A Gaussian fitted to batches of rows (n, D) in one pass; memory does not grow with the number of batches.

    Batches are centred before they are merged (Chan et al. 1979): plain sums of x x^T lose half of the digits where the
    mean is large.
    """

    def __init__(self) -> None:
        self.count, self._mean, self._scatter = 0, np.zeros(0), np.zeros((0, 0))

    def add(self, batch: Features) -> None:
        """Take in rows; raises ValueError for rows of another length or numbers that are not finite."""
        rows = _as_rows(batch).cpu().double().numpy()
        if len(rows) == 0:
            return
        if not np.isfinite(rows).all():
            span = f"{self.count} to {self.count + len(rows)}"
            raise ValueError(f"features {span} hold NaN or infinity; check the pictures and dtype")
        if self.count == 0:
            self._mean, self._scatter = np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2)
        if rows.shape[1] != len(self._mean):
            raise ValueError(f"a batch has {rows.shape[1]} features a row, the ones before it {len(self._mean)}")
        centre = rows.mean(axis=0)
        shift = centre - self._mean
        total = self.count + len(rows)
        self._scatter += (rows - centre).T @ (rows - centre)
        self._scatter += np.outer(shift, shift) * (self.count * len(rows) / total)
        self._mean = self._mean + shift * (len(rows) / total)
        self.count = total

    def result(self, *, ddof: int = 1) -> Statistics:
        """The Gaussian so far; `ddof` is what the count is reduced by in the covariance: 1 for FID, 0 for FVD."""
        if self.count <= ddof:
            raise ValueError(f"{self.count} rows give no covariance with ddof {ddof}; at least {ddof + 1} are needed")
        return Statistics(self._mean, self._scatter / (self.count - ddof), self.count)


def feature_statistics(batches: Iterable[Features], *, ddof: int = 1) -> Statistics:
    """Fit a Gaussian to batches of rows (n, D) in one pass, see `RunningStatistics`.

    Raises:
        ValueError: too few rows, rows of different lengths, or numbers that are not finite.
    """
    running = RunningStatistics()
    for batch in batches:
        running.add(batch)
    return running.result(ddof=ddof)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared distance of two Gaussians (Heusel et al. 2017).

    The trace of the root is the sum of the singular values of R1' R2, where R R' is a covariance: real and at least
    zero whatever the rank, and the same from either side. So nothing can become complex or infinite, and the 1e-6 that
    ADM adds to the diagonals when `scipy.linalg.sqrtm` fails is never needed. What is within rounding of zero is 0.
    """
    _check_widths(len(first.mean), len(second.mean))
    # Not the eigenvalues of R1' C2 R1: squared, what should be 0 comes as 1e-16, with a root of 1e-8, and 600 pictures
    # of 1,280 features are at -5e-6 from themselves in place of 1e-13.
    shared = np.linalg.svd(_root(first.covariance).T @ _root(second.covariance), compute_uv=False)
    spread = np.trace(first.covariance) + np.trace(second.covariance)
    difference = first.mean - second.mean
    distance = float(difference @ difference + spread - 2 * shared.sum())
    return distance if distance > ROUNDING * spread else 0.0


def frechet_influence(first: Statistics, second: Statistics, rows: Features) -> np.ndarray:
    """Return how every row (M,) that `second` was fitted to moves the Frechet distance; their mean is 0.

    This is the distance's derivative (its influence function): the spread of the mean of these numbers is the
    distance's own sampling spread to first order. A plain bootstrap would be biased, because repeated rows lower the
    rank of the covariance. Needs more rows than features to mean much.
    """
    root = _root(first.covariance)
    shared, axes = np.linalg.eigh(root.T @ second.covariance @ root)
    kept = shared > 1e-10 * shared.max(initial=0)
    half = root @ (axes[:, kept] * shared[kept] ** -0.25)  # half @ half.T is the optimal map from second to first
    centred = _as_rows(rows).cpu().double().numpy() - second.mean
    spread = np.square(centred).sum(1) - np.square(centred @ half).sum(1)
    spread += 2 * centred @ (second.mean - first.mean)
    influence: np.ndarray = spread - spread.mean()
    return influence


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (D, D) with R R' = C."""
    values, vectors = np.linalg.eigh(covariance)
    root: np.ndarray = vectors * np.sqrt(values.clip(min=0))
    return root


def kernel_distance(real: Features, fake: Features) -> float:
    """Return KID: the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    All pairs are used, where the paper averages over random subsets: the expectation is the same, the spread smaller.
    Not multiplied by 1000; may be slightly negative.
    """
    for name, rows in (("real", real), ("fake", fake)):
        if len(rows) < 2:
            raise ValueError(f"{len(rows)} {name} rows; the kernel distance needs at least 2")
    return float(resampled_kernel_distance(real, fake, (torch.ones(len(real), 1), torch.ones(len(fake), 1))))


def resampled_kernel_distance(real: Features, fake: Features, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Return KID (R,) of R resamplings of both sets, given how often each row was drawn: (N, R) and (M, R).

    Pairs of a row with itself are left out.
    """
    real, fake = _as_pair(real, fake)
    real_counts, fake_counts = (count.to(real.device, torch.float64) for count in weights)

    def mean_of_pairs(left: Tensor, counts: Tensor, right: Tensor, others: Tensor, *, same: bool) -> Tensor:
        total = torch.zeros(counts.shape[1], dtype=torch.float64, device=left.device)
        for rows in _blocks(len(left), len(right)):
            total += (counts[rows] * (_kernel(left[rows], right) @ others)).sum(0)
        pairs = counts.sum(0) * others.sum(0)
        if same:
            own = ((left.double().square().sum(1) / left.shape[1] + 1) ** 3)[:, None]
            total -= (counts.square() * own).sum(0)
            pairs = pairs - counts.square().sum(0)
        return total / pairs

    within = mean_of_pairs(real, real_counts, real, real_counts, same=True)
    within += mean_of_pairs(fake, fake_counts, fake, fake_counts, same=True)
    return within - 2 * mean_of_pairs(real, real_counts, fake, fake_counts, same=False)


def split_score(probabilities: Tensor) -> tuple[float, np.ndarray]:
    """Return exp(KL(p(y|x), p(y))), the Inception Score (Salimans et al. 2016), of one split of probabilities (n, K),
    and how every row (n,) moves it; their mean is 0."""
    part = probabilities.double()
    divergence = (torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))).sum(1)
    score = math.exp(divergence.mean().item())
    influence: np.ndarray = score * (divergence - divergence.mean()).cpu().numpy()
    return score, influence


def score_of_splits(splits: list[tuple[float, np.ndarray]]) -> tuple[float, np.ndarray]:
    """Return the mean of the splits' scores, and how every row (N,) moves it, scaled so that a mean over all rows does.

    Every split counts the same, however short it is, and so do its rows together.
    """
    count = sum(len(influence) for _, influence in splits)
    weighted = [influence * (count / (len(influence) * len(splits))) for _, influence in splits]
    return float(np.mean([score for score, _ in splits])), np.concatenate(weighted)


def precision_recall(real: Features, fake: Features, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """Return whether each fake row (M,) and each real row (N,) is inside: their means are precision and recall
    (Kynkaanniemi et al. 2019), with ADM's conventions.

    A fake row is inside if it lies in the ball of some real row, which reaches to its k-th nearest neighbour among the
    real rows (itself not counted); for real rows the roles are exchanged.
    """
    real, fake = _as_pair(real, fake)
    radii_real, radii_fake = neighbour_radii(real, k, "real"), neighbour_radii(fake, k, "fake")
    covered_real = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    inside = []
    for rows in _blocks(len(fake), len(real)):
        distances = _squared_distances(fake[rows], real)  # (block, N)
        inside.append((distances <= radii_real).any(1))
        covered_real |= (distances <= radii_fake[rows, None]).any(0)
    return torch.cat(inside), covered_real


def density_coverage(real: Features, fake: Features, *, k: int = 5) -> tuple[Tensor, Tensor]:
    """Return the density at the fake rows (M,), and which real balls (N,) hold one: their means are density and
    coverage (Naeem et al. 2020).

    The density is the number of real balls (k-th nearest neighbour) that a fake row lies in, divided by k. For equal
    distributions its mean is 1 and coverage about 1 - (N / (N + M))^k: 0.97 for N = M and k = 5, but only 0.87 when
    there are twice as many real rows as fake ones.
    """
    real, fake = _as_pair(real, fake)
    radii = neighbour_radii(real, k, "real")
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    density = []
    for rows in _blocks(len(fake), len(real)):
        inside = _squared_distances(fake[rows], real) < radii  # (block, N)
        density.append(inside.sum(1).double() / k)
        covered |= inside.any(0)
    return torch.cat(density), covered


def nearest(rows: Features, references: Features, *, candidates: int = 1) -> tuple[Tensor, Tensor]:
    """Find the nearest of the references (N, D) for each row (M, D): its Euclidean distance (M,), and its place (M,).

    The distance is the length of the difference in float64; only the search multiplies, which cancels digits where
    numbers are large: of pixels, that of equal pictures came out as up to 47. The best `candidates` by products are
    then compared by differences. Pictures may be uint8: they are converted a block at a time.
    """
    rows, references = torch.as_tensor(rows), torch.as_tensor(references).to(torch.as_tensor(rows).device)
    if rows.ndim != 2 or references.shape[1:] != rows.shape[1:] or not len(references):
        raise ValueError(f"rows {tuple(rows.shape)} have no nearest of references {tuple(references.shape)}")
    places = _closest(rows, references, min(candidates, len(references)))[1]
    distances = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for some in _blocks(len(rows), places.shape[1] * rows.shape[1]):
        difference = rows[some, None].double() - references[places[some]].double()
        distances[some], best = difference.square().sum(-1).min(1)
        places[some, 0] = places[some].gather(1, best[:, None])[:, 0]
    return distances.sqrt(), places[:, 0]


def neighbour_radii(rows: Tensor, k: int, name: str) -> Tensor:
    """Return the squared distance (N,) of every row to its k-th nearest other row."""
    if k < 1 or len(rows) <= k:
        raise ValueError(f"k = {k} with {len(rows)} {name} rows; allowed is 1 to the number of rows - 1")
    return _closest(rows, rows, k + 1)[0][:, k]  # index 0 is the row itself


def _closest(rows: Tensor, references: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The squared distances by products and the places (M, number) of the references (N, D) nearest to each row."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    least = torch.full((len(rows), number), torch.inf, dtype=dtype, device=rows.device)
    places = torch.zeros(len(rows), number, dtype=torch.long, device=rows.device)
    step = max(number, BLOCK_NUMBERS // rows.shape[1])
    for start in range(0, len(references), step):
        block = _as_rows(references[start : start + step]).to(dtype)
        for some in _blocks(len(rows), max(len(block), rows.shape[1])):
            squared = _squared_distances(_as_rows(rows[some]).to(dtype), block)
            found, at = squared.topk(min(number, len(block)), largest=False)
            both, where = torch.cat((least[some], found), 1), torch.cat((places[some], at + start), 1)
            least[some], kept = both.topk(number, largest=False)
            places[some] = where.gather(1, kept)
    return least, places


def _as_rows(features: Features) -> Tensor:
    rows = torch.as_tensor(features).detach()
    if rows.ndim != 2:
        raise ValueError(f"features must be rows (N, D), not of shape {tuple(rows.shape)}")
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


def _as_pair(real: Features, fake: Features) -> tuple[Tensor, Tensor]:
    real, fake = _as_rows(real), _as_rows(fake)
    _check_widths(real.shape[1], fake.shape[1])
    return real, fake.to(real)


def _check_widths(real: int, fake: int) -> None:
    if real != fake:
        raise ValueError(f"{real} features cannot be compared with {fake}; were both made by one network?")


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(1, BLOCK_NUMBERS // max(1, num_columns))
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _kernel(left: Tensor, right: Tensor) -> Tensor:
    # In float64: the sums cancel, float32 left 4e-6 of a small distance.
    return (left.double() @ right.double().T / left.shape[1] + 1) ** 3


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """Return |l|^2 + |r|^2 - 2 l.r (L, R) around the mean of `right`, which keeps float32 exact enough.

    What is within rounding of 0 is 0, so that equal rows lie in balls of no radius.
    """
    centre = right.mean(0)
    left, right = left - centre, right - centre
    of_left, of_right = left.square().sum(1, keepdim=True), right.square().sum(1)
    squared = torch.addmm(of_right, left, right.T, alpha=-2).add_(of_left)
    return squared.masked_fill_(squared < EQUAL * torch.finfo(squared.dtype).eps * (of_left + of_right), 0)
