"""A page that follows a run: written again as the run changes, until it ends."""

import time
from collections.abc import Generator
from pathlib import Path

from fastjepa.report.status import Status, is_held
from fastjepa.report.write import compose, put

_LOOK_S = 1.0


def watch_report(run_dir: Path, every_s: int) -> Generator[tuple[Path, Status], None, None]:
    """Write the page at once and whenever the run has changed, at most once in `every_s` seconds.

    The last page is of a run that is not going any more. Closed or interrupted before that, it leaves the
    page without what makes a browser load it again.

    Yields:
        The path of the page and where the run is, after each writing.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the report cannot be written.
    """
    page = None
    try:
        while True:
            seen = _look(run_dir)
            page = compose(run_dir)
            yield put(page, run_dir, every_s if page.status.is_live else None), page.status
            if not page.status.is_live:
                return
            time.sleep(every_s)
            while _look(run_dir) == seen:
                time.sleep(_LOOK_S)
    finally:
        if page is not None and page.status.is_live:
            put(page, run_dir)


def _look(run_dir: Path) -> tuple[object, ...]:
    """Something else after each change of what a page is made of."""
    paths = [run_dir / "config.yaml", run_dir / "metrics.jsonl", run_dir / "report" / "summary.json"]
    paths += sorted((run_dir / "report" / "snapshots").glob("*.safetensors"))
    return (is_held(run_dir), *((path.name, _changed_at(path)) for path in paths))


def _changed_at(path: Path) -> int:
    """In nanoseconds; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
