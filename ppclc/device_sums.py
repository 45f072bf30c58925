"""Moments that lie in float32 on the device of the rows, to which kernels add, until they are added to those in float64.

Shape suffixes: N rows, D and E widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ppclc.kernels.moments import add_moments, symmetric

Place = tuple[str, int, int]
"""Name of a running sum, row of it, count of its rows; 0 rows where the sum has none."""
SHARE = 0.5
"""Of the memory that is free on a GPU, what sums may take."""


@dataclass
class DeviceSums:
    """Sums by place: second moments, of which the upper triangle is kept, and cross moments."""

    seconds: dict[Place, torch.Tensor] = field(default_factory=dict)
    crosses: dict[Place, torch.Tensor] = field(default_factory=dict)

    def add(self, second: Place | None, cross: Place | None, x_ND: torch.Tensor, y_NE: torch.Tensor | None) -> None:
        """Add `x'x` at one place and `x'y` at another."""
        width = x_ND.shape[1]
        second_DD = None if second is None else self._at(self.seconds, second, width, width, x_ND.device)
        cross_DE = None if cross is None or y_NE is None else self._at(self.crosses, cross, width, y_NE.shape[1], x_ND.device)
        add_moments(second_DD, cross_DE, x_ND, None if cross is None else y_NE)

    def is_full(self, second: Place | None, cross: Place | None, x_ND: torch.Tensor) -> bool:
        """Whether what is not there yet would take more memory than sums may have; never where there is nothing to let go."""
        new = (second is not None and second not in self.seconds) + (cross is not None and cross not in self.crosses)
        held = sum(t.nbytes for kind in (self.seconds, self.crosses) for t in kind.values())
        if not (new and held and x_ND.is_cuda):
            return False
        free = torch.cuda.mem_get_info(x_ND.device)[0] + torch.cuda.memory_reserved(x_ND.device) - torch.cuda.memory_allocated(x_ND.device)
        return held + new * 4 * x_ND.shape[1] ** 2 > SHARE * (free + held)

    def taken(self) -> Iterator[tuple[Place, torch.Tensor]]:
        """Every sum, whole; it is let go once the next is asked for."""
        while self.seconds:
            place, second_DD = self.seconds.popitem()
            yield place, symmetric(second_DD)
        while self.crosses:
            yield self.crosses.popitem()

    @staticmethod
    def _at(sums: dict[Place, torch.Tensor], place: Place, width: int, other: int, device: torch.device) -> torch.Tensor:
        if place not in sums:
            sums[place] = torch.zeros(width, other, dtype=torch.float32, device=device)
        return sums[place]
