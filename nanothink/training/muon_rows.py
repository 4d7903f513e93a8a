"""Muon over several processes: the rows of each matrix are brought together in one of them.

Orthogonalising needs the whole matrix. Each matrix has one owner: it receives the rows, orthogonalises, and
sends them back, in one exchange there and one back for all matrices of a shape. So a matrix is worked on
once, as in one process, and by the same code; matrices are dealt out by cost, the dearest first, each to the
process that has least to do (Graham 1969). While one shape is worked on, the rows of the next are under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanothink.training.muon import by_shape

Orthogonalise = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Orthogonalises each of several matrices of a shape."""


class MatrixOwners:
    """Who orthogonalises which matrix.

    Args:
        matrices: this process's rows of each, and the shape of the whole. The same order in every process.
    """

    def __init__(self, matrices: Sequence[tuple[nn.Parameter, torch.Size]]) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.shapes = dict(matrices)
        dealt = deal([_cost(shape) for _, shape in matrices], self.size)
        self.owner = {own: rank for (own, _), rank in zip(matrices, dealt, strict=True)}

    def orthogonalised(
        self,
        moving: Sequence[nn.Parameter],
        ahead: Callable[[nn.Parameter], Tensor],
        orthogonalise: Orthogonalise,
        dtype: torch.dtype,
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Own rows of each matrix, orthogonalised; shape by shape, so that few are held at a time.

        Args:
            ahead: gives own rows of the matrix to orthogonalise; called once for each of ``moving``.
            dtype: of the result.
        """
        same = by_shape(moving, self.shapes)
        pending = [_Exchange(self, shape, entries) for shape, entries in same.items()]
        if pending:
            pending[0].gather(ahead)
        for i, exchange in enumerate(pending):
            if i + 1 < len(pending):
                pending[i + 1].gather(ahead)
            exchange.work_and_return(orthogonalise, dtype)
            if i:
                yield from pending[i - 1].received()
        if pending:
            yield from pending[-1].received()


class _Exchange:
    """The matrices of one shape, on their way to their owners and back."""

    def __init__(self, owners: MatrixOwners, shape: torch.Size, entries: Sequence[nn.Parameter]) -> None:
        self.shape, self.rank, self.size = shape, owners.rank, owners.size
        self.by_owner = [[own for own in entries if owners.owner[own] == r] for r in range(self.size)]
        self.n_own = len(self.by_owner[self.rank])
        self.rows = rows_by_rank(shape[0], self.size)
        width = shape[1]
        # numbers: to each owner this process's rows of its matrices, and from each process the rows of ours
        self.outgoing = [len(group) * self.rows[self.rank] * width for group in self.by_owner]
        self.incoming = [self.n_own * n * width for n in self.rows]

    def gather(self, ahead: Callable[[nn.Parameter], Tensor]) -> None:
        """Send rows to the owners."""
        parts = [ahead(own).reshape(-1) for group in self.by_owner for own in group]
        self.arriving, self.work = self._exchange(torch.cat(parts), self.outgoing, self.incoming)

    def work_and_return(self, orthogonalise: Orthogonalise, dtype: torch.dtype) -> None:
        """Orthogonalise the matrices of this process, and send their rows back."""
        matrices = self._arrived()
        made = orthogonalise(matrices.unbind())
        returned = [
            rows.reshape(-1)
            for of_process in zip(*(torch.split(matrix, self.rows) for matrix in made), strict=True)
            for rows in of_process
        ]
        flat = torch.cat(returned) if returned else matrices.new_empty(0, dtype=dtype)
        self.arriving, self.work = self._exchange(flat, self.incoming, self.outgoing)

    def _arrived(self) -> Tensor:
        """The matrices of this process, (B, M, N)."""
        self.work.wait()
        pieces = torch.split(self.arriving, self.incoming)
        del self.arriving
        return torch.cat(
            [piece.view(self.n_own, n, self.shape[1]) for piece, n in zip(pieces, self.rows, strict=True)], 1
        )

    def received(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Own rows of all matrices."""
        self.work.wait()
        entries = [own for group in self.by_owner for own in group]
        pieces = self.arriving.view(len(entries), self.rows[self.rank], self.shape[1])
        del self.arriving
        return list(zip(entries, pieces, strict=True))

    def _exchange(self, flat: Tensor, outgoing: list[int], incoming: list[int]) -> tuple[Tensor, Any]:
        arriving = flat.new_empty(sum(incoming))
        work = torch.distributed.all_to_all_single(arriving, flat, incoming, outgoing, async_op=True)
        return arriving, work


def deal(costs: Sequence[float], n_processes: int) -> list[int]:
    """A process for each of several pieces of work, so that none has much more to do than another."""
    load, owners = [0.0] * n_processes, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def rows_by_rank(n_rows: int, n_processes: int) -> list[int]:
    """Rows of a tensor that each process keeps, as torch.chunk deals them out."""
    step = -(-n_rows // n_processes)
    return [max(0, min(step, n_rows - rank * step)) for rank in range(n_processes)]


def _cost(shape: torch.Size) -> float:
    """Products of a Newton-Schulz step: two of the smaller side squared by the larger, one of it cubed."""
    least, most = sorted(shape)
    return 2.0 * least * least * most + least**3
