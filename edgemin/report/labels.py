"""Places the names of a figure's points so that none covers another: greedy, and the same on every run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """The area shared with another rectangle."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def within(self, other: Box) -> bool:
        """Whether it lies inside another rectangle."""
        return (
            other.left <= self.left
            and other.bottom <= self.bottom
            and self.right <= other.right
            and self.top <= other.top
        )


Spot = tuple[float, float]
Segment = tuple[Spot, Spot]

_ANGLES = 16
_MARKER_WEIGHT, _SEGMENT_WEIGHT, _LEADER_WEIGHT = 400.0, 90.0, 60.0
"""What covering a marker, a line or a leader costs, in pixels of distance."""


def place(
    spots: Sequence[Spot],
    sizes: Sequence[tuple[float, float]],
    segments: Sequence[Segment],
    bounds: Box,
    marker: float,
) -> list[Spot]:
    """Finds a place for each label.

    Each label, the most crowded point's first, takes the cheapest of a fan of places around its point: no
    label below it, within the bounds, near, and as few markers, lines and leaders crossed as can be.

    Args:
        spots: the points, in pixels.
        sizes: width and height of each label, in pixels.
        segments: lines that labels had better not cover.
        bounds: what labels must stay within.
        marker: radius of the points' markers, in pixels.

    Returns:
        The centre of each label, in the order of the points.
    """
    markers = [Box(x - marker, y - marker, x + marker, y + marker) for x, y in spots]
    order = sorted(range(len(spots)), key=lambda index: (-_crowding(spots, index), index))
    taken: list[Box] = []
    leaders: list[Segment] = []
    centres: dict[int, Spot] = {}
    for index in order:
        best: tuple[float, Spot] | None = None
        others = [other for other, spot in zip(markers, spots, strict=True) if spot != spots[index]]
        candidates = list(_candidates(spots[index], sizes[index], marker, bounds))
        for centre in candidates:
            box = around(centre, sizes[index])
            if not box.within(bounds) or any(box.overlap(other) for other in taken):
                continue
            leader = (spots[index], nearest(box, spots[index]))
            cost = math.dist(*leader)
            cost += _MARKER_WEIGHT * sum(box.overlap(other) > 0 for other in markers)
            cost += _MARKER_WEIGHT * sum(_touches(other, leader) for other in (*taken, *others))
            cost += _SEGMENT_WEIGHT * sum(_touches(box, segment) for segment in segments)
            cost += _LEADER_WEIGHT * sum(_touches(box, other) for other in leaders)
            cost += _LEADER_WEIGHT * sum(_cross(leader, other) for other in (*leaders, *segments))
            if best is None or cost < best[0]:
                best = (cost, centre)
        centres[index] = best[1] if best is not None else candidates[0]
        taken.append(around(centres[index], sizes[index]))
        leaders.append((spots[index], nearest(taken[-1], spots[index])))
    return [centres[index] for index in range(len(spots))]


def nearest(box: Box, spot: Spot) -> Spot:
    """The point of a rectangle nearest to a spot: where a leader line ends."""
    return min(max(spot[0], box.left), box.right), min(max(spot[1], box.bottom), box.top)


def _crowding(spots: Sequence[Spot], index: int) -> float:
    here = spots[index]
    return sum(1 / (10 + math.dist(here, spot)) for number, spot in enumerate(spots) if number != index)


def _candidates(spot: Spot, size: tuple[float, float], marker: float, bounds: Box) -> Iterator[Spot]:
    """Places around the point at growing distance, and at last all over the bounds."""
    for ring in range(10):
        reach = marker * (1.6 + 1.4 * ring)
        for step in range(_ANGLES):
            angle = math.pi * (step // 2 + step % 2) / (_ANGLES / 2) * (1 if step % 2 else -1)
            x, y = math.cos(angle), math.sin(angle)
            yield spot[0] + x * reach + _sign(x) * size[0] / 2, spot[1] + y * (reach + size[1] / 2)
    rows = int((bounds.top - bounds.bottom) / size[1])
    columns = int((bounds.right - bounds.left) / size[0] * 4)
    for row in range(rows):
        for column in range(columns):
            yield bounds.left + size[0] * (0.5 + column / 4), bounds.bottom + size[1] * (0.5 + row)


def _sign(value: float) -> float:
    return 0.0 if abs(value) < 0.2 else math.copysign(1.0, value)


def around(centre: Spot, size: tuple[float, float]) -> Box:
    """The rectangle of a size around its centre."""
    return Box(centre[0] - size[0] / 2, centre[1] - size[1] / 2, centre[0] + size[0] / 2, centre[1] + size[1] / 2)


def _touches(box: Box, segment: Segment) -> bool:
    """Whether a segment enters the box (Liang and Barsky's clipping)."""
    (x0, y0), (x1, y1) = segment
    start, end = 0.0, 1.0
    for delta, low, high in (
        (x1 - x0, box.left - x0, box.right - x0),
        (y1 - y0, box.bottom - y0, box.top - y0),
    ):
        if delta == 0:
            if low > 0 or high < 0:
                return False
            continue
        near, far = sorted((low / delta, high / delta))
        start, end = max(start, near), min(end, far)
    return start < end


def _cross(one: Segment, other: Segment) -> bool:
    """Whether two segments cross in their interiors."""

    def side(a: Spot, b: Spot, c: Spot) -> float:
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    apart = side(*one, other[0]) * side(*one, other[1]) < 0
    return apart and side(*other, one[0]) * side(*other, one[1]) < 0
