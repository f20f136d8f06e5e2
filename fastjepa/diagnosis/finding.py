"""What a check says."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        level: fail where it prevents a run; warn where it costs one something.
        about: what was looked at, in a word or two.
        what: what was found.
        do: what to do about it; empty where there is nothing to do.
    """

    level: Level
    about: str
    what: str
    do: str = ""

    def line(self) -> str:
        """For the terminal."""
        return f"{self.level:<4}  {self.about:<14}  {self.what}{f': {self.do}' if self.do else ''}"


def is_fit(findings: Iterable[Finding]) -> bool:
    """Whether nothing prevents a run."""
    return all(finding.level != "fail" for finding in findings)
