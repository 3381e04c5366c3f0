"""Where buffers lie in one static arena: by lifetimes, and in place where a step allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subbyte.export.c.listing import ARENA, Buffer, Step, View


@dataclass(frozen=True, slots=True)
class Placed:
    """offsets: of each arena buffer, in elements. size: of the arena."""

    offsets: dict[int, int]
    size: int


def plan(buffers: Sequence[Buffer], steps: Sequence[Step], outputs: Sequence[View]) -> Placed:
    """The largest buffers first, each as low as those that live at the same time allow."""
    lives = _lifetimes(buffers, steps, outputs)
    leader = _in_place(buffers, steps, lives)
    joined = _joined(lives, leader)
    sizes = {b: max(buffers[m].size for m in leader if leader[m] == b) for b in joined}
    placed: dict[int, int] = {}
    for b in sorted(joined, key=lambda b: (-sizes[b], joined[b])):
        placed[b] = _lowest(b, placed, joined, sizes)
    offsets = {b: placed[leader[b]] for b in leader}
    return Placed(offsets, max((placed[b] + sizes[b] for b in placed), default=0))


def _lifetimes(
    buffers: Sequence[Buffer], steps: Sequence[Step], outputs: Sequence[View]
) -> dict[int, tuple[int, int]]:
    """First and last step of each arena buffer that is used; outputs live until the end."""
    lives: dict[int, tuple[int, int]] = {}
    for at, step in enumerate(steps):
        for view in (step.out, *step.reads):
            if buffers[view.buffer].kind == ARENA:
                lives[view.buffer] = (lives.get(view.buffer, (at, at))[0], at)
    for view in outputs:
        if view.buffer in lives:
            lives[view.buffer] = (lives[view.buffer][0], len(steps))
    return lives


def _in_place(
    buffers: Sequence[Buffer], steps: Sequence[Step], lives: dict[int, tuple[int, int]]
) -> dict[int, int]:
    """Buffer -> the one whose place it shares: what a step reads last, it may write."""
    leader = {b: b for b in lives}
    for at, step in enumerate(steps):
        out = step.out.buffer
        if out not in lives or lives[out][0] != at:
            continue
        for view in step.over:
            b = view.buffer
            whole = b in lives and view.size == buffers[b].size == buffers[out].size
            once = sum(r.buffer == b for r in step.reads) == 1
            if whole and once and lives[b][1] == at:
                leader[out] = leader[b]
                break
    return leader


def _joined(
    lives: dict[int, tuple[int, int]], leader: dict[int, int]
) -> dict[int, tuple[int, int]]:
    """The lifetime of each place."""
    found: dict[int, tuple[int, int]] = {}
    for b, (first, last) in lives.items():
        before = found.get(leader[b], (first, last))
        found[leader[b]] = (min(before[0], first), max(before[1], last))
    return found


def _lowest(
    b: int, placed: dict[int, int], lives: dict[int, tuple[int, int]], sizes: dict[int, int]
) -> int:
    """The lowest offset where b meets no buffer that lives when it does."""
    meets = [p for p in placed if lives[p][0] <= lives[b][1] and lives[b][0] <= lives[p][1]]
    at = 0
    for p in sorted(meets, key=lambda p: placed[p]):
        if at + sizes[b] <= placed[p]:
            break
        at = max(at, placed[p] + sizes[p])
    return at
