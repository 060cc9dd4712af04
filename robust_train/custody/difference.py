"""Which rows of a list are not what they were, by their digests: the list may have grown, shrunk or changed order."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

DEEPEST = 32  # nested gaps; a list that was made to be hard to align is not looked into any further


@dataclass(frozen=True)
class Difference:
    """What became of the rows of a record.

    Args:
        changed: row numbers, as recorded, of rows that have another content now.
        appeared: row numbers, as found, of rows that the record does not have.
        vanished: row numbers, as recorded, of rows that are there no more.
        moved: rows ``(as recorded, as found)`` with the same content whose place among the other rows is another one.
        recorded_names: names of all recorded rows (files); empty where rows have none.
        found_names: names of all rows found.

    Guarantees:
        All four are empty exactly where every row is the same and in the same order.
    """

    changed: tuple[int, ...] = ()
    appeared: tuple[int, ...] = ()
    vanished: tuple[int, ...] = ()
    moved: tuple[tuple[int, int], ...] = ()
    recorded_names: Sequence[str] = field(default=(), repr=False, compare=False)
    found_names: Sequence[str] = field(default=(), repr=False, compare=False)

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return not (self.changed or self.appeared or self.vanished or self.moved)

    def text(self, limit: int = 20) -> str:
        """One line for each kind of difference: how many rows, and which.

        Args:
            limit: how many rows, or runs of consecutive rows, a line names at most, >= 1.
        """
        if self.equal:
            return "no difference"
        lines = [
            ("changed", len(self.changed), _listed(self.changed, self.recorded_names)),
            ("appeared", len(self.appeared), _listed(self.appeared, self.found_names)),
            ("vanished", len(self.vanished), _listed(self.vanished, self.recorded_names)),
            ("moved", len(self.moved), (f"{was} -> {now}" for was, now in self.moved)),
        ]
        return "\n".join(f"{what:<9} {n} ({_cut(items, limit)})" for what, n, items in lines if n)

    def to_dict(self) -> dict[str, Any]:
        """As plain builtins: lists of ``{"row": …}``, with ``"name"`` where rows have names, and ``"to"`` if moved."""
        return {
            "equal": self.equal,
            "changed": [_entry(row, self.recorded_names) for row in self.changed],
            "appeared": [_entry(row, self.found_names) for row in self.appeared],
            "vanished": [_entry(row, self.recorded_names) for row in self.vanished],
            "moved": [{**_entry(was, self.recorded_names), "to": now} for was, now in self.moved],
        }


def difference(
    recorded: Sequence[str],
    found: Sequence[str],
    recorded_names: Sequence[str] = (),
    found_names: Sequence[str] = (),
) -> Difference:
    """Compare two lists of digests.

    A row whose digest is on both sides is the same row. Such rows are ``moved`` unless they belong to the longest run
    found that kept its order, so that inserting or deleting rows moves no others. Of the rest, a recorded and a found
    row are one row that ``changed`` where they have the same name; rows without names where they lie between the same
    unchanged neighbours, or else have the same number. What remains ``vanished`` or ``appeared``.

    Args:
        recorded: digests, one a row.
        found: digests, one a row.
        recorded_names: name of each recorded row, ``""`` for none; empty where no row has one.
        found_names: the same for the rows found.

    Guarantees:
        ``len(vanished) + len(changed) == (Counter(recorded) - Counter(found)).total()`` and
        ``len(appeared) + len(changed) == (Counter(found) - Counter(recorded)).total()``.
    """
    kept = aligned(recorded, found)
    kept_recorded, kept_found = {i for i, _ in kept}, {j for _, j in kept}
    lost = [i for i in range(len(recorded)) if i not in kept_recorded]
    new = [j for j in range(len(found)) if j not in kept_found]
    moved, lost, new = _paired(lost, new, recorded.__getitem__, found.__getitem__)

    named = dict(enumerate(recorded_names)), dict(enumerate(found_names))
    changed, lost, new = _paired(lost, new, lambda i: named[0].get(i) or None, lambda j: named[1].get(j) or None)
    before = [i for i, _ in kept], [j for _, j in kept]
    for place in (lambda row, side: bisect_left(before[side], row), lambda row, side: row):
        pairs, lost, new = _paired(
            lost,
            new,
            lambda i, place=place: None if named[0].get(i) else place(i, 0),
            lambda j, place=place: None if named[1].get(j) else place(j, 1),
        )
        changed += pairs
    return Difference(
        changed=tuple(sorted(i for i, _ in changed)),
        appeared=tuple(new),
        vanished=tuple(lost),
        moved=tuple(moved),
        recorded_names=recorded_names,
        found_names=found_names,
    )


def aligned(recorded: Sequence[str], found: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of equal rows, ascending on both sides: a patience alignment, in n log n for all but made-up lists.

    Equal rows at both ends of a range are aligned first; then those whose digest is unique in the range, as many as
    keep their order; then the gaps between these in the same way.

    Args:
        recorded: digests.
        found: digests.
    """
    pairs: list[tuple[int, int]] = []
    todo = [(0, len(recorded), 0, len(found), 0)]
    while todo:
        a, b, c, d, depth = todo.pop()
        while a < b and c < d and recorded[a] == found[c]:
            pairs.append((a, c))
            a, c = a + 1, c + 1
        while a < b and c < d and recorded[b - 1] == found[d - 1]:
            b, d = b - 1, d - 1
            pairs.append((b, d))
        if a == b or c == d:
            continue
        anchors = _anchors(recorded, found, range(a, b), range(c, d)) if depth < DEEPEST else []
        if anchors:
            pairs += anchors
            ends = [*anchors, (b, d)]
            starts = [(a, c), *((i + 1, j + 1) for i, j in anchors)]
            todo += [(i, k, j, m, depth + 1) for (i, j), (k, m) in zip(starts, ends, strict=True)]
        elif b - a == d - c:
            pairs += [(a + k, c + k) for k in range(b - a) if recorded[a + k] == found[c + k]]
    return sorted(pairs)


def _anchors(recorded: Sequence[str], found: Sequence[str], rows: range, others: range) -> list[tuple[int, int]]:
    """Rows unique in both ranges, as many as keep their order (a longest increasing subsequence)."""
    left, right = Counter(recorded[i] for i in rows), Counter(found[j] for j in others)
    place = {found[j]: j for j in others if right[found[j]] == 1}
    unique = [(i, place[recorded[i]]) for i in rows if left[recorded[i]] == 1 and recorded[i] in place]
    smallest: list[int] = []  # of all runs of a length, the smallest last place
    last: list[int] = []  # where that run's last member stands in `unique`
    previous: list[int] = []
    for k, (_, j) in enumerate(unique):
        length = bisect_left(smallest, j)
        previous.append(last[length - 1] if length else -1)
        smallest[length : length + 1], last[length : length + 1] = [j], [k]
    run, k = [], last[-1] if last else -1
    while k >= 0:
        run.append(unique[k])
        k = previous[k]
    return run[::-1]


def _paired(
    lost: list[int], new: list[int], left: Callable[[int], Any], right: Callable[[int], Any]
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Pair rows of equal key in their order; a key of None pairs with nothing. Returns also what is left over."""
    waiting: defaultdict[Any, deque[int]] = defaultdict(deque)
    for j in new:
        if (key := right(j)) is not None:
            waiting[key].append(j)
    pairs, rest = [], []
    for i in lost:
        key = left(i)
        if key is not None and waiting.get(key):
            pairs.append((i, waiting[key].popleft()))
        else:
            rest.append(i)
    taken = {j for _, j in pairs}
    return pairs, rest, [j for j in new if j not in taken]


def _listed(rows: Sequence[int], names: Sequence[str]) -> Iterator[str]:
    """Rows in words: with their names, or as runs of consecutive numbers."""
    at = 0
    while at < len(rows):
        first = last = rows[at]
        if names and names[first]:
            at += 1
            yield f"{first} {printable(names[first])}"
            continue
        while at < len(rows) and rows[at] == last and not (names and names[last]):
            at, last = at + 1, last + 1
        yield f"{first}" if last - 1 == first else f"{first}-{last - 1}"


def _cut(items: Iterable[str], limit: int) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (f", and {len(items) - limit} more" if len(items) > limit else "")


def printable(text: str) -> str:
    """The text, without what could steer a terminal or cannot be printed."""
    return text if text.isprintable() else ascii(text)


def _entry(row: int, names: Sequence[str]) -> dict[str, Any]:
    return {"row": row, "name": names[row]} if names and names[row] else {"row": row}
