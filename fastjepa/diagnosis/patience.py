"""What may never end, as on a drive or a store that is gone, and is waited for only so long."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 60.0


class NoAnswerError(Exception):
    """It did not end in time, and goes on in a thread that nobody waits for."""


def within(seconds: float, do: Callable[[], T]) -> T:
    """What `do` gives or raises.

    Raises:
        NoAnswerError: it did neither for so many seconds.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(do())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    done, _ = wait([answer], seconds)
    if not done:
        raise NoAnswerError
    return answer.result()
