"""What the host and the drive of a run are good for."""

from fastjepa.diagnosis.facts import Drive, Host, Wants
from fastjepa.diagnosis.finding import Finding
from fastjepa.engine.processes.files import BESIDES, files_needed, most_ranks

PREFETCHED = 2  # batches that torch's DataLoader has each worker read ahead
# Of the training process for each loader worker: its pipes, and the tensors of the batches it has sent. 11 to
# 17 were counted, and crops that the device resizes come with three tensors more.
FILES_PER_WORKER = 24


def check_files(host: Host, wants: Wants | None) -> Finding:
    """Open files: of the loader's workers, and of ranks that watch each other."""
    ranks, workers = (1, 0) if wants is None else (wants.ranks, wants.workers)
    # Only a run of several ranks raises the soft limit.
    limit, flag = (host.soft_files, "-n") if ranks == 1 else (host.hard_files, "-Hn")
    if limit is None:
        return Finding("ok", "open files", "no limit")
    of_workers = FILES_PER_WORKER * workers
    needed = of_workers + (BESIDES if ranks == 1 else files_needed(ranks))
    for_whom = counted(workers, "loader worker") if workers else "a run"
    if ranks > 1:
        for_whom = f"{for_whom} in each of {ranks} ranks" if workers else f"a run of {ranks} ranks"
    what = f"{limit:,} allowed (ulimit {flag})"
    if limit < needed:
        # What is counted for libraries and shards is seldom used up, but the trainer refuses ranks too many.
        is_refused = ranks > 1 and limit < files_needed(ranks)
        fewer = ", or lower speed.workers" if workers else ""
        where = ", as root before the launcher" if ranks > 1 else fewer
        return Finding(
            "fail" if is_refused or limit < needed - BESIDES // 2 else "warn",
            "open files",
            f"{what}, and {for_whom} may need {needed:,}",
            f"ulimit {flag} {needed}{where}",
        )
    most = (
        ""
        if host.hard_files is None
        else f", enough for runs of {most_ranks(host.hard_files - of_workers):,} ranks"
    )
    return Finding("ok", "open files", f"{what}{most}")


def check_shared_memory(host: Host, wants: Wants | None) -> Finding:
    """What loader workers put their batches into."""
    if host.shared_bytes is None:
        return Finding("ok", "shared memory", "no /dev/shm on this system")
    what = f"{size(host.shared_bytes)} free in /dev/shm"
    workers = 0 if wants is None else wants.ranks * wants.workers
    if wants is None or not workers:
        return Finding("ok", "shared memory", what)
    # The batch in hand besides.
    needed = wants.batch_bytes * (workers * PREFETCHED + wants.ranks)
    asked = f"{workers} loader workers with batches of {size(wants.batch_bytes)} need {size(needed)}"
    if wants.augment == "device":
        asked = f"{asked} at least, since crops are larger than views"
    if host.shared_bytes < needed:
        fitting = (host.shared_bytes // wants.batch_bytes - wants.ranks) // (PREFETCHED * wants.ranks)
        fewer = f"speed.workers={fitting}" if fitting > 0 else "speed.workers=0"
        return Finding(
            "fail",
            "shared memory",
            f"{what}, and {asked}: they would be killed",
            f"give a container --shm-size={-(-needed // 2**30) + 1}g (or --ipc=host), or use {fewer}",
        )
    return Finding("ok", "shared memory", f"{what}; {asked}")


def check_cores(host: Host, wants: Wants | None) -> Finding:
    """Whether loader workers have cores to run on."""
    what = counted(host.cores, "core")
    if wants is None:
        return Finding("ok", "cores", what)
    running = wants.ranks * (wants.workers + 1)
    if running > host.cores and wants.workers > 1:
        each = max(1, host.cores // wants.ranks - 1)
        return Finding(
            "warn",
            "cores",
            f"{what} for {counted(wants.ranks, 'rank')} with {wants.workers} loader workers each",
            f"more workers than cores read no faster: speed.workers={each}",
        )
    return Finding("ok", "cores", f"{what}; {counted(running, 'process', 'es')} would run")


def check_memory(host: Host, wants: Wants) -> Finding:
    """For the copy on the host that a checkpoint is written from."""
    needed = wants.checkpoint_bytes
    if host.memory_bytes is None:
        return Finding("ok", "memory", f"saving takes {size(needed)}; what is free is not known here")
    what = f"{size(host.memory_bytes)} available, of which saving takes {size(needed)}"
    if host.memory_bytes < needed:
        return Finding("fail", "memory", what, "free some, or train on several hosts, which share it")
    if host.memory_bytes < 2 * needed:
        return Finding("warn", "memory", what, "little is left for the loader and the system: free some")
    return Finding("ok", "memory", what)


def check_drive(drive: Drive, wants: Wants | None) -> Finding:
    """Whether the run can be written, and its checkpoints have room."""
    if drive.error is not None:
        return Finding(
            "fail",
            "run folder",
            f"cannot write below {drive.folder}: {drive.error}",
            "choose another run.dir",
        )
    what = f"{size(drive.free_bytes)} free below {drive.folder}"
    if wants is None:
        return Finding("ok", "run folder", what)
    one = wants.checkpoint_bytes
    # A new one is whole before the oldest goes.
    always, at_end = one * (wants.keep_last + 1), one * (wants.kept + 1)
    there = drive.free_bytes + drive.saved_bytes
    takes = f"{wants.keep_last} checkpoints of {size(one)}, and one being written, take {size(always)}"
    if there < always:
        fitting = there // one - 1
        fewer = f"free some, choose another run.dir, or run.keep_last={fitting}"
        do = fewer if fitting > 0 else "free some, or choose another run.dir"
        return Finding("fail", "run folder", f"{what}, and {takes}", do)
    if there < at_end:
        return Finding(
            "warn",
            "run folder",
            f"{what}, and with those of run.keep_every checkpoints take {size(at_end)} in the end",
            "raise run.keep_every, or have room by then",
        )
    return Finding("ok", "run folder", f"{what}; {takes}")


def check_drive_rate(drive: Drive, wants: Wants, images_per_second: float | None) -> Finding | None:
    """Whether a checkpoint is written before the next is due; None if that is not known.

    Args:
        drive: where the run goes.
        wants: of the configuration.
        images_per_second: of all ranks.
    """
    if drive.bytes_per_second is None:
        return None
    save_s = wants.checkpoint_bytes / drive.bytes_per_second
    what = f"writes {size(drive.bytes_per_second)}/s, so {save_s:,.1f} s for a checkpoint"
    if images_per_second is None:
        return Finding("ok", "drive", what)
    between_s = wants.save_every_images / images_per_second
    if save_s > between_s:
        return Finding(
            "warn",
            "drive",
            f"{what}, and one is due every {between_s:,.1f} s: training would wait for it",
            "raise run.save_every, or choose a faster drive for run.dir",
        )
    return Finding(
        "ok", "drive", f"{what}, beside the training that goes on; one is due every {between_s:,.0f} s"
    )


def counted(count: int, name: str, plural: str = "s") -> str:
    """1, "rank" -> "1 rank"; 2, "rank" -> "2 ranks"."""
    return f"{count:,} {name}{plural if count != 1 else ''}"


def size(count: float) -> str:
    """1_500_000_000 -> "1.5 GB"."""
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= of:
            return f"{count / of:,.3g} {unit}"
    return f"{count / 1e3:,.3g} KB"
