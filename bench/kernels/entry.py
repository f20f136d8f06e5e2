"""From a case to its rows: judge every way, make those that are right ready, race them."""

from dataclasses import dataclass, field

import torch

from bench.kernels.case import CANNOT, Case, Phase, Random, Way, arrange, gradient_of
from bench.kernels.check import Verdicts, first_line
from bench.kernels.choices import Choice, choices_made
from bench.kernels.clock import Clock
from bench.kernels.race import Race
from bench.kernels.table import Row

MOST_SETS = 16


@dataclass
class Entry:
    """A case in one phase, ready to be timed.

    Attributes:
        choices: what the op as a user gets it has chosen between.
        left_out: ways that are not timed, and why.
    """

    case: Case
    phase: Phase
    verdicts: Verdicts
    race: Race
    choices: list[Choice] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """With why a way is red; where the op as a user gets it is, no number at all."""
        dtype = str(self.case.dtype).removeprefix("torch.")
        facts = self.case.op, self.case.name, self.phase, dtype
        red = [Row(*facts, way=name, kind="red", red=why) for name, why in self.verdicts.red.items()]
        if not self.verdicts.may_be_timed:
            return red
        return red + self.race.rows(*facts, self.case.bytes_moved[self.phase], self.peak_bytes)


def enter(
    case: Case,
    phase: Phase,
    verdicts: Verdicts,
    clock: Clock,
    random: Random,
    copied_bytes: int,
) -> Entry:
    """Make the ways of a case ready.

    Args:
        case: what is computed.
        phase: which pass of it.
        verdicts: which ways are right; no other is timed.
        clock: of the device.
        random: of the inputs.
        copied_bytes: see `Race`.
    """
    entry = Entry(case, phase, verdicts, Race(clock, copied_bytes))
    if not verdicts.may_be_timed:
        return entry
    with clock.stream():
        sets = max(1, min(MOST_SETS, -(-clock.rotated_bytes // case.bytes_moved[phase])))
        inputs = [case.make(random) for _ in range(sets)]
        gradients = [gradient_of(case, given, random) for given in inputs]
        for way in case.ways(clock.device.type):
            if way.name not in verdicts.right:
                continue
            try:
                _start(entry, way, list(zip(inputs, gradients, strict=True)))
            except Exception as failure:  # out of memory, say: the others are still worth measuring
                if CANNOT not in str(failure):
                    entry.left_out.append(f"{way.name}: {first_line(failure)}")
    return entry


def _start(entry: Entry, way: Way, sets: list[tuple[tuple, torch.Tensor | None]]) -> None:
    clock = entry.race.clock
    calls = [arrange(entry.case, way.call, entry.phase, *given) for given in sets]
    if way.kind == "fastjepa":
        with choices_made() as made:
            calls[0]()
        entry.choices = made
    calls[0]()
    peak_bytes = clock.peak_bytes(calls[0])
    entry.race.add(way.name, way.kind, clock.watch(calls))
    entry.peak_bytes[way.name] = peak_bytes


def decides(case: Case, phase: Phase) -> bool:
    """Whether the table of a device goes by this phase: by each pass alone, if they were timed alone."""
    if "backward" in case.bytes_moved or "forward+backward" not in case.bytes_moved:
        return phase != "forward+backward"
    return phase == "forward+backward"
