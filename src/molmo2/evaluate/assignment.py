"""One-to-one assignment of least total cost (Hungarian method), for rectangular costs.

Source: D. F. Crouse, On implementing 2D rectangular assignment algorithms, 2016: each row in turn is assigned along a
shortest augmenting path. Of equally short paths the one is taken that SciPy's `linear_sum_assignment` takes, so that
scores are equal to those of evaluations which use SciPy, also where several assignments cost the same.
"""

from typing import Any

import numpy as np


def assign(costs: Any) -> list[tuple[int, int]]:
    """Pairs (row, column) of an assignment of least total cost, min(N, M) of them, rows ascending.

    Args:
        costs: (N, M) finite numbers.
    Raises:
        ValueError: The costs are no matrix, or not finite.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if costs.ndim != 2 or not np.isfinite(costs).all():
        raise ValueError(f"Costs are a matrix of finite numbers; found the shape {costs.shape} or infinite entries.")
    if costs.shape[1] < costs.shape[0]:
        return sorted((row, column) for column, row in assign(costs.T))
    num_rows, num_columns = costs.shape
    row_prices, column_prices = np.zeros(num_rows), np.zeros(num_columns)
    column_of, row_of = np.full(num_rows, -1), np.full(num_columns, -1)
    for row in range(num_rows):
        _extend(costs, row, (row_prices, column_prices), (column_of, row_of))
    return list(enumerate(column_of.tolist()))


def _extend(
    costs: np.ndarray, first: int, prices: tuple[np.ndarray, np.ndarray], assigned: tuple[np.ndarray, np.ndarray]
) -> None:
    """Assign one more row, along the shortest augmenting path that starts there (Dijkstra on reduced costs)."""
    (row_prices, column_prices), (column_of, row_of) = prices, assigned
    lengths = np.full(costs.shape[1], np.inf)
    came_from = np.full(costs.shape[1], -1)
    unvisited = np.arange(costs.shape[1])[::-1].copy()
    visited_rows, visited_columns = [first], []
    row, length = first, 0.0
    while True:
        through = length + costs[row, unvisited] - row_prices[row] - column_prices[unvisited]
        is_shorter = through < lengths[unvisited]
        lengths[unvisited[is_shorter]] = through[is_shorter]
        came_from[unvisited[is_shorter]] = row
        length = lengths[unvisited].min()
        nearest = np.flatnonzero(lengths[unvisited] == length)
        free = nearest[row_of[unvisited[nearest]] < 0]
        place = int(free[-1]) if len(free) else int(nearest[0])
        column = int(unvisited[place])
        visited_columns.append(column)
        if row_of[column] < 0:
            break
        row = int(row_of[column])
        visited_rows.append(row)
        unvisited[place] = unvisited[-1]
        unvisited = unvisited[:-1]
    row_prices[first] += length
    others = visited_rows[1:]
    row_prices[others] += length - lengths[column_of[others]]
    column_prices[visited_columns] -= length - lengths[visited_columns]
    while True:  # walk back and hand each column to the row that reached it
        row = int(came_from[column])
        row_of[column] = row
        column_of[row], column = column, column_of[row]
        if row == first:
            return
