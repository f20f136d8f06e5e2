"""Whether images come as fast as the model eats them, and what would make them."""

import math

from fastjepa.diagnosis.facts import Appetite, Host, Loading, Wants
from fastjepa.diagnosis.finding import Finding

HEADROOM = 1.1  # of what is to be read: a loader that just keeps up waits half of the time
_ABOUT = "images/s"


def check_feeding(loading: Loading, appetite: Appetite, host: Host, wants: Wants) -> Finding:
    """The loader beside the model, both for all ranks of this host."""
    eaten = appetite.images_per_second * wants.ranks
    read = supply(loading, host, wants)
    ranks = f" in each of {wants.ranks} ranks" if wants.ranks > 1 else ""
    readers = f"{loading.workers} workers{ranks}" if loading.workers else "the training process"
    what = (
        f"{_count(read)} are read by {readers} ({_count(loading.one_core)} by one process, "
        f"{loading.decoder}); {appetite.device} eats {_count(eaten)}, {appetite.how}"
    )
    # Without workers the model stands still while images are read.
    waits = eaten / (eaten + read) if not loading.workers else max(0.0, 1 - read / eaten)
    if waits < 0.05:
        return Finding("ok", _ABOUT, what)
    do = remedy(appetite.images_per_second, loading, host, wants)
    return Finding("warn", _ABOUT, f"{what}: the model would wait {waits:.0%} of the time", do)


def supply(loading: Loading, host: Host, wants: Wants) -> float:
    """Images per second of all ranks: what one was measured to read, as far as there are cores."""
    if not loading.workers:
        return loading.one_core * wants.ranks
    return min(
        loading.images_per_second * wants.ranks, max(loading.images_per_second, loading.one_core * host.cores)
    )


def remedy(images_per_second: float, loading: Loading, host: Host, wants: Wants) -> str:
    """What would feed a rank that eats so many."""
    workers = max(1, math.ceil(HEADROOM * images_per_second / loading.one_core))
    if workers * wants.ranks <= host.cores and workers != loading.workers:
        return f"speed.workers={workers}"
    if workers <= loading.workers:
        lighter = _lighter(loading, wants)
        return (
            f"workers slow each other down, or the drive does; {lighter}" if lighter else "use a faster drive"
        )
    cores = f"it would take {workers * wants.ranks} workers, and there are {host.cores} cores"
    return f"{cores}: {_lighter(loading, wants) or 'use a host with more cores for each GPU'}"


def _lighter(loading: Loading, wants: Wants) -> str:
    """What makes an image cheaper to read."""
    changes = []
    if wants.decodes and not wants.is_packed:
        changes.append("pack the images once (fastjepa data pack)")
    if wants.decodes and loading.decoder == "pillow":
        changes.append("pip install torchvision (speed.decoder=torchvision)")
    if wants.decodes and wants.augment == "cpu" and wants.device != "cpu":
        changes.append("on a GPU speed.augment=device")
    return ", ".join(changes)


def say_of_h100(loading: Loading, appetite: Appetite, host: Host) -> Finding:
    """For a machine without a GPU: what one would need of this loader."""
    workers = math.ceil(HEADROOM * appetite.images_per_second / loading.one_core)
    what = f"{appetite.device} would eat up to {_count(appetite.images_per_second)}, {appetite.how}"
    return Finding("ok", _ABOUT, f"{what}: {workers:,} loader workers on cores like these {host.cores}")


def _count(images_per_second: float) -> str:
    digits = 1 if images_per_second < 10 else 0
    return f"{images_per_second:,.{digits}f} images/s"
