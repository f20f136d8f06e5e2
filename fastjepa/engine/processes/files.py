"""How many files and sockets a process of a large run has open at a time, and whether it may."""

from fastjepa.config import ConfigError

# Of rank 0 for each rank: the store, the watch, and gloo's group of all ranks, of the hosts and of the saver.
# The others have no more of them than gloo's.
_PER_RANK = 5
BESIDES = 256  # shards, loader workers and their pipes, libraries


def files_needed(size: int) -> int:
    """By rank 0 of so many."""
    return _PER_RANK * size + BESIDES


def most_ranks(files: int) -> int:
    """Of a run whose rank 0 may have so many open."""
    return max(1, (files - BESIDES) // _PER_RANK)


def allow_files(size: int) -> None:
    """Raise this process's limit of open files as far as it may be raised.

    Args:
        size: ranks of the run.

    Raises:
        ConfigError: rank 0 would need more.
    """
    import resource  # of Unix alone, as several processes are

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # macOS takes no "unlimited"
            pass
    needed = files_needed(size)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise ConfigError(
            f"a run of {size} ranks needs up to {needed} open files and sockets in a process, and {soft} are "
            f"allowed here. Raise the hard limit, which `ulimit -Hn` shows: `ulimit -n {needed}` as root "
            "before the launcher, nofile in /etc/security/limits.conf, or LimitNOFILE of the service that "
            "starts the processes"
        )
