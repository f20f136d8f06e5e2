"""The signals by which others stop a run, held until it can heed them. Importing this takes no time."""

import signal

# Of a scheduler, or of a terminal that is gone.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def hold_signals() -> None:
    """Let them wait for a StopRequest: on a cold drive the first imports may take minutes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def let_through() -> None:
    """One that was held comes now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
