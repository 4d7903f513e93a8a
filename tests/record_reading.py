"""What one pass over a file of records gives."""

from __future__ import annotations

from pathlib import Path

from nanothink.data.records import Problem, iter_records


class Reading:
    """Everything one pass over a file gives."""

    def __init__(self, path: Path) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.bytes: list[int] = []
        self.numbered = list(
            iter_records(
                path,
                on_problem=self.problems.append,
                on_warning=self.warnings.append,
                on_bytes=self.bytes.append,
            )
        )
        self.records = [record for _, record in self.numbered]
        self.texts = [record.text for record in self.records]


def read(folder: Path, content: bytes, name: str = "a.jsonl") -> Reading:
    path = folder / name
    path.write_bytes(content)
    return Reading(path)


def only_problem(reading: Reading) -> Problem:
    assert len(reading.problems) == 1, reading.problems
    assert reading.records == []
    return reading.problems[0]
