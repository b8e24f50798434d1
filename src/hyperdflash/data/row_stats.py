"""Counts a source's rows: every row read is either taken or dropped for one reason."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Self

NAMED = 5  # places listed per reason

DUPLICATE = "asks the same as another row"
HELD_OUT = "on the held-out side"
BEYOND = "beyond the number wanted"
BENCHMARK = "holds a benchmark's prompt"
NOT_MALFORMED = (DUPLICATE, HELD_OUT, BEYOND, BENCHMARK)


@dataclass
class RowStats:
    """``read`` rows of ``source``, of which ``taken`` are used; ``dropped`` counts the others by reason. ``places`` lists the
    first rows of each reason that concerns a single row, ``unread`` the fields that rows have and nothing reads, ``uncompared``
    the benchmarks that no row was compared with."""

    source: str
    read: int = 0
    taken: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    uncompared: list[str] = field(default_factory=list)

    def drop(self, reason: str, place: str) -> None:
        self.dropped[reason] += 1
        if len(named := self.places.setdefault(reason, [])) < NAMED:
            named.append(place)

    def move(self, count: int, reason: str) -> None:
        """Counts ``count`` taken rows as dropped."""
        if count:
            self.taken -= count
            self.dropped[reason] += count

    def as_record(self) -> dict:
        """Returns a record for JSON; ``RowStats.of_record`` is the inverse."""
        return asdict(self) | {"dropped": dict(self.dropped.most_common())}

    @classmethod
    def of_record(cls, record: dict) -> Self:
        return cls(**record | {"dropped": Counter(record["dropped"])})

    def lines(self) -> list[str]:
        """Returns ``source: 20 rows read, 12 taken`` and one line per reason, with the places of the first rows."""
        lines = [f"{self.source}: {self.read:,} rows read, {self.taken:,} taken"]
        for reason, count in sorted(self.dropped.items(), key=lambda item: (item[0] in NOT_MALFORMED, -item[1], item[0])):
            named = self.places.get(reason, [])
            more = f" and {count - len(named):,} more" if named and count > len(named) else ""
            lines.append(f"    {count:,} {reason}" + (f": {', '.join(named)}{more}" if named else ""))
        rest = {"not read": self.unread, "not compared with the benchmarks": self.uncompared}
        return lines + [f"    {what}: {', '.join(names)}" for what, names in rest.items() if names]
