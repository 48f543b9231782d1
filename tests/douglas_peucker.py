"""Douglas-Peucker simplification with every way of breaking ties: the reference of lines simplified by GEOS."""

from __future__ import annotations

import numpy as np

TIE = 1e-6  # metres; distances that differ by less may be ordered either way by rounding


def possible_simplifications(points: np.ndarray, tolerance: float) -> list[tuple[int, ...]]:
    """All sets of vertices that GEOS' topology-preserving simplification of one line may keep.

    A section is flattened where no vertex lies farther than `tolerance` from its chord, else it is split at the vertex
    that lies farthest. Where two vertices are equally far, or one lies exactly at the tolerance, rounding decides: all
    outcomes are listed. GEOS splits the first sections of a closed line whatever the distances, so that at least four
    points are left. Its test that a simplified line does not cross itself is left out.

    Args:
        points: [P, 2].
        tolerance: metres.

    Returns:
        Indices into the points, one tuple per outcome.
    """
    least = 4 if np.array_equal(points[0], points[-1]) else 2

    def sections(first: int, last: int, depth: int, kept: int) -> list[tuple[int, ...]]:
        """Outcomes between two vertices, without the first; `kept` counts the points of the sections before."""
        if last - first == 1:
            return [(last,)]
        chord = points[last] - points[first]
        inner = points[first + 1 : last] - points[first]
        share = np.clip(inner @ chord / (chord @ chord), 0, 1) if chord.any() else np.zeros(len(inner))
        distance = np.linalg.norm(inner - share[:, None] * chord, axis=1)
        outcomes = []
        too_few = kept < least and depth + 1 < least
        if distance.max() <= tolerance + TIE and not too_few:
            outcomes.append((last,))
        if distance.max() > tolerance - TIE or too_few:
            for middle in first + 1 + np.flatnonzero(distance > distance.max() - TIE):
                for left in sections(first, int(middle), depth + 1, kept):
                    # The first section of a line counts its start as well.
                    counted = kept + len(left) + (kept == 0)
                    outcomes += [left + right for right in sections(int(middle), last, depth + 1, counted)]
        return outcomes

    return sorted({(0, *outcome) for outcome in sections(0, len(points) - 1, 1, 0)})


def decided_by_rounding(points: np.ndarray, simplified: np.ndarray, tolerance: float) -> bool:
    """Whether a simplification is one of several possible ones, so that another implementation may keep other vertices.

    False with a single possible outcome: then two implementations have to agree.
    """
    outcomes = possible_simplifications(points, tolerance)
    return len(outcomes) > 1 and any(
        len(outcome) == len(simplified) and np.abs(points[list(outcome)] - simplified).max() < TIE
        for outcome in outcomes
    )
