"""Which rank the others have lost, and how to say so: pure functions of what was heard from each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastjepa.engine.processes.activity import LONG, Doing, Moment
from fastjepa.engine.processes.rendezvous import Member

LONGER = 12  # so many times longer may saving and judging take than anything else
# So many times longer may a rank that starts be silent. It loads libraries: while one comes from a cold
# drive, by a call that keeps the interpreter's lock, the thread that speaks for the rank does not run.
STARTING_LONGER = 10
_NAMED = 4  # ranks in a message


@dataclass
class Peer:
    """What is known of a rank.

    Attributes:
        heard_s: when it was last heard from, on the watch's clock.
        moved_s: when it last went on to another thing, as far as is known.
        met: it has been in touch at all.
        place: the line of code at which it was.
        in_collective: whether it waits for others there.
        left: it has said that it ends.
    """

    member: Member
    moment: Moment = field(default_factory=Moment)
    heard_s: float = 0.0
    moved_s: float = 0.0
    met: bool = False
    place: str = ""
    in_collective: bool = False
    left: bool = False

    def hear(self, now_s: float, moment: Moment, place: str, in_collective: bool) -> None:
        if moment.moves != self.moment.moves:
            self.moved_s = now_s
        self.moment, self.place, self.in_collective = moment, place, in_collective
        self.heard_s = now_s

    def may_be_silent_s(self, dead_after_s: float) -> float:
        is_starting = self.met and self.moment.doing == Doing.STARTING
        return dead_after_s * STARTING_LONGER if is_starting else dead_after_s

    def may_be_still_s(self, hang_after_s: float) -> float:
        return hang_after_s * LONGER if self.moment.doing in LONG else hang_after_s

    def was(self) -> str:
        """What it was doing."""
        return f"{self.moment.doing}, after step {self.moment.step}"


@dataclass(frozen=True)
class Verdict:
    """Why the run cannot go on.

    Attributes:
        text: for the person at the keyboard.
        ranks: whose fault it is.
        grace_s: how long each process may take to end by itself.
        hangs: those ranks are alive, and can show where they are.
    """

    text: str
    ranks: tuple[int, ...]
    grace_s: float = 0.0
    hangs: bool = False


def silent(peers: Sequence[Peer], now_s: float, dead_after_s: float) -> Verdict | None:
    """On ranks that have not been heard from for too long."""
    lost = [
        peer for peer in peers if not peer.left and now_s - peer.heard_s >= peer.may_be_silent_s(dead_after_s)
    ]
    if not lost:
        return None
    first = lost[0]
    return Verdict(
        f"{first.member} has not been heard from for more than {first.may_be_silent_s(dead_after_s):g} s; "
        f"it was {first.was()}{_and_others(lost, 'nor have')}. Its host is down, the network is cut, or the "
        "process is stopped.",
        _ranks(lost),
    )


def stuck(peers: Sequence[Peer], now_s: float, hang_after_s: float) -> Verdict | None:
    """On ranks that do not go on while the others wait for them, though their processes live.

    Those with the fewest moves are behind. Several may be: a collective waits for the one that does not come,
    so of those that are behind the ones outside any collective are named.
    """
    present = [peer for peer in peers if not peer.left]
    if not present:
        return None
    fewest = min(peer.moment.moves for peer in present)
    behind = [peer for peer in present if peer.moment.moves == fewest]
    if any(now_s - peer.moved_s < peer.may_be_still_s(hang_after_s) for peer in behind):
        return None
    guilty = [peer for peer in behind if not peer.in_collective] or behind
    first = guilty[0]
    limit_s = first.may_be_still_s(hang_after_s)
    place = f", at {first.place}" if first.place else ""
    wait = "the others wait for it" if len(guilty) < len(present) else "so no rank goes on"
    return Verdict(
        f"{first.member} has been {first.was()}, for more than {limit_s:g} s{place}"
        f"{_and_others(guilty, 'and so have')}; {wait}. run.hang_after_s is how long that may be.",
        _ranks(guilty),
        hangs=True,
    )


def ended(peer: Peer) -> Verdict:
    """On a process that is gone without a word."""
    return Verdict(
        f"{peer.member} has ended without a word; it was {peer.was()}. "
        "It was killed, perhaps for its memory, or crashed, or its host did.",
        _ranks([peer]),
    )


def failed(peer: Peer, why: str, grace_s: float) -> Verdict:
    """On a process that said why it ends."""
    return Verdict(f"{peer.member} cannot go on: {why}", _ranks([peer]), grace_s)


def _ranks(peers: Sequence[Peer]) -> tuple[int, ...]:
    return tuple(peer.member.rank for peer in peers)


def _and_others(peers: Sequence[Peer], joined: str) -> str:
    """The rest of those that the first stands for."""
    rest = [f"{peer.member}" for peer in peers[1:_NAMED]]
    if not rest:
        return ""
    more = f" and {len(peers) - _NAMED} more" if len(peers) > _NAMED else ""
    return f"; {joined} {', '.join(rest)}{more}"
