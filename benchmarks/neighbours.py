"""Are samples copies of training pictures? Each sample's nearest neighbour among all training pictures.

    python benchmarks/neighbours.py       # finds copies that are hidden among fresh draws

A distance alone says little, because some pictures are rare and others have many alike. So a sample is
compared with the neighbourhood that it landed in: it counts as *close* if it is nearer to its nearest
training picture x than any other training picture is to x (Alaa et al. 2022, arXiv:2102.08921, call such a
sample not authentic). Held-out pictures, which no network has copied, give the share that is normal.

The search is exact: every distance is computed, in float64, in pieces that bound the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

PIECE = 2**24        # numbers in float64 that a piece of the search holds at a time: 128 MiB


@dataclass
class Vectors:
    """Training pictures as vectors of D numbers: `count` of them, where read(start, stop) returns those from
    start to stop, (stop - start, D). pictures: how many different pictures they are; vector i shows the
    picture i % pictures, so that mirrored copies may follow."""
    read: Callable[[int, int], np.ndarray]
    count: int
    pictures: int


class Nearest(NamedTuple):
    """The nearest vector of each query."""
    distance: np.ndarray       # (M,) root mean square over the D numbers, in their unit
    index: np.ndarray          # (M,) which of the vectors


def nearest(queries: np.ndarray, vectors: Vectors, without: np.ndarray | None = None) -> Nearest:
    """The nearest of the vectors for each query (M, D), by exact search. without (M,): a picture that does
    not count for that query, as it is the query itself."""
    size = max(1, PIECE // queries.shape[1])
    parts = []
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        parts.append(_nearest(queries[part], vectors, None if without is None else without[part]))
    return Nearest(*(np.concatenate(part) for part in zip(*parts)))


def _nearest(queries: np.ndarray, vectors: Vectors, without: np.ndarray | None) -> Nearest:
    """For so few queries that they fit into a piece."""
    count, width = queries.shape
    q = torch.from_numpy(queries.reshape(count, width)).double()
    best = torch.full((count,), torch.inf, dtype=torch.float64)
    index = torch.zeros(count, dtype=torch.long)
    for start, stop in _pieces(vectors.count, max(1, PIECE // (count + width))):
        rows = torch.from_numpy(np.ascontiguousarray(vectors.read(start, stop))).double()
        # |q - r|^2 = |q|^2 + |r|^2 - 2 qr. In float64 the cancellation costs 1e-8 of the vectors' length,
        # which is far below a grey level.
        squares = q.square().sum(1)[:, None] + rows.square().sum(1) - 2 * q @ rows.T        # (M, rows)
        if without is not None:
            same = torch.arange(start, stop) % vectors.pictures == torch.from_numpy(without)[:, None]
            squares[same] = torch.inf
        found, where = squares.min(1)
        closer = found < best
        best = torch.where(closer, found, best)
        index = torch.where(closer, where + start, index)
    return Nearest((best.clamp(min=0) / width).sqrt().numpy(), index.numpy())


def _pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in tqdm(range(0, count, size), desc="neighbours", delay=5, leave=False):
        yield start, min(start + size, count)


def compare(sets: dict[str, np.ndarray], vectors: Vectors, worst: int = 12) -> dict[str, dict]:
    """For each named set of queries (M, D): the share that is close, with its standard error, the quantiles
    of distance / (distance from x to its own nearest neighbour), and the queries with the lowest ratios.

    A ratio below 1 is close. Where a training picture is there twice, its own distance is 0: nothing is
    closer, and the ratio counts as 1 for a further copy and as the limit of 10 for anything else."""
    found = {name: nearest(queries, vectors) for name, queries in sets.items()}
    # Each training picture that is the nearest of something is itself a query, once.
    hit = np.unique(np.concatenate([near.index for near in found.values()]))
    rows = np.concatenate([vectors.read(i, i + 1) for i in hit.tolist()])
    own = nearest(rows, vectors, without=hit % vectors.pictures).distance
    result = {}
    for name, near in found.items():
        theirs = own[np.searchsorted(hit, near.index)]
        ratio = np.full(len(theirs), 10.0)
        np.divide(near.distance, theirs, out=ratio, where=theirs > 0)
        ratio[(theirs == 0) & (near.distance == 0)] = 1.0
        ratio = ratio.clip(max=10.0)
        share = float((ratio < 1).mean())
        order = np.argsort(ratio, kind="stable")[:worst]
        result[name] = {
            "count": len(ratio), "close": share, "error": float(np.sqrt(share * (1 - share) / len(ratio))),
            "median distance": float(np.median(near.distance)), "median ratio": float(np.median(ratio)),
            "ratio quantiles": np.quantile(ratio, np.linspace(0, 1, 101)).round(4).tolist(),
            "worst": [{"query": int(i), "picture": int(near.index[i] % vectors.pictures),
                       "mirrored": bool(near.index[i] >= vectors.pictures),
                       "distance": float(near.distance[i]), "ratio": float(ratio[i])} for i in order]}
    return result


def of_array(rows: np.ndarray) -> Vectors:
    """All rows (N, D) of an array, each another picture."""
    return Vectors(lambda start, stop: rows[start:stop], len(rows), len(rows))


def demo() -> None:
    """Share that is close: of fresh draws, and where a tenth of them are noisy training vectors."""
    random = np.random.default_rng(0)
    train, fresh = random.normal(size=(20_000, 16)), random.normal(size=(1000, 16))
    copied = fresh.copy()
    copied[:100] = train[:100] + 0.05 * random.normal(size=(100, 16))
    sets = {"fresh draws": fresh, "100 copies among them": copied}
    for name, row in compare(sets, of_array(train)).items():
        print(f"{name}: {row['close']:.1%} +- {row['error']:.1%} close; lowest ratio "
              f"{row['worst'][0]['ratio']:.2f}")


if __name__ == "__main__":
    demo()
