"""What a caller hears while post-training takes minutes: decisions, and how far each step is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

T = TypeVar("T")
R = TypeVar("R")


class Listener(Protocol):
    """note: a decision in a line. progress: `done` of `total` parts of a step, which has a name."""

    def note(self, text: str) -> None: ...
    def progress(self, step: str, done: int, total: int) -> None: ...


class Notes:
    """Decisions worth a line: told at once, and kept."""

    def __init__(self, listener: Listener | None) -> None:
        self.listener, self.taken = listener, list[str]()

    def tell(self, text: str) -> None:
        if self.listener is not None:
            self.listener.note(text)

    def add(self, text: str) -> None:
        self.taken.append(text)
        self.tell(text)

    def progress(self, step: str, done: int, total: int) -> None:
        if self.listener is not None:
            self.listener.progress(step, done, total)

    def over(self, step: str, items: Sequence[T]) -> Sequence[T]:
        """The items; whoever goes through them is heard of."""
        return _Watched(step, items, self)

    def counted(self, step: str, function: Callable[[T], R], total: int) -> Callable[[T], R]:
        """The function; its calls are heard of."""
        calls = [0]

        def counting(x: T) -> R:
            found = function(x)
            calls[0] += 1
            self.progress(step, min(calls[0], total), total)
            return found

        return counting


@dataclass(frozen=True, slots=True)
class _Watched(Sequence[T], Generic[T]):
    step: str
    items: Sequence[T]
    notes: Notes

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: Any) -> Any:
        found = self.items[index]
        return _Watched(self.step, found, self.notes) if isinstance(index, slice) else found

    def __iter__(self) -> Iterator[T]:
        for i, item in enumerate(self.items):
            yield item
            self.notes.progress(self.step, i + 1, len(self.items))
