"""Output that cannot be written: real pipes, real terminals and full devices."""

import fcntl
import io
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.engine.output import MOST_WAITING, Output, tell

PIPE = 4096  # bytes, the smallest that Linux makes

# Everything that a run prints, and then what a library prints with no thought of failing.
PRINT_ALL = """
import atexit, logging, sys
from fastjepa.engine.console import RunConsole
from fastjepa.engine.output import settle, tell
from tests.engine.test_console import PROGRESS, VERDICT

atexit.register(settle)
for _ in range(3):
    with RunConsole(True, title="a run") as console:
        if "wait" in sys.argv and sys.argv.pop():
            open("begun", "w").write(str(console._live))
            sys.stdin.read()
        console.say("hello")
        console.warn("careful")
        console.show_verdict(3, VERDICT)
        console.show_progress(PROGRESS)
        console.show_table([{"name": "x", "knn_top1": 0.1, "linear_top1": 0.2, "rankme": 3.0}])
        logging.getLogger("fastjepa").warning("skipped a.png")
    tell("stopped", sys.stdout)
    tell("error", sys.stderr)
try:
    print("by a library")
    print("by a library", file=sys.stderr)
except OSError:
    pass
open("done", "w").close()
"""


ROOT = Path(__file__).resolve().parents[2]
PRINTS = (sys.executable, "-c", PRINT_ALL)


def start(folder: Path, *command: str, **streams: Any) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path, "TERM": "xterm"}, **streams
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_below_everything_that_is_printed(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        assert start(tmp_path, *PRINTS, stdout=full, stderr=full).wait(60) == 0
    assert (tmp_path / "done").exists()


def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = start(tmp_path, *PRINTS, stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    assert process.wait(60) == 0
    assert (tmp_path / "done").exists()


def test_no_standard_output_at_all(tmp_path: Path) -> None:
    process = start(tmp_path, "sh", "-c", 'exec "$@" >&-', "sh", *PRINTS, stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert (tmp_path / "done").exists()


def test_a_terminal_that_is_gone(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(tmp_path, *PRINTS, "wait", stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    begun, deadline_s = tmp_path / "begun", time.monotonic() + 60
    while not (begun.exists() and begun.read_text()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert "Live" in begun.read_text()
    os.close(ours)
    _, said = process.communicate(b"", timeout=60)
    assert process.returncode == 0, said
    assert b"Traceback" not in said
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="sets the size of a pipe")
@given(
    sizes=st.lists(st.integers(0, 3000), max_size=40),
    drained=st.sets(st.integers(0, 40)),
)
def test_what_is_not_taken_at_once_comes_later_whole_and_in_order(
    sizes: list[int], drained: set[int]
) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE)
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)  # full, it takes a part of a text and then fails, as a disk does
    texts = [f"{number:04d}{'ü' * size}\n" for number, size in enumerate(sizes)]
    arrived = b""
    with open(reader, "rb", buffering=0) as pipe, open(writer, "w", encoding="utf-8") as stream:
        output = Output(stream)
        for number, text in enumerate(texts):
            output.write(text)
            output.flush()
            if number in drained:
                arrived += pipe.read(PIPE) or b""
        for _ in range(2 * MOST_WAITING // PIPE):
            output.flush()
            arrived += pipe.read(PIPE) or b""
    lines = arrived.decode().splitlines(keepends=True)
    kept = set(lines)
    assert lines == [text for text in texts if text in kept]
    assert lines == texts or sum(len(text.encode()) for text in texts) > MOST_WAITING


def test_only_so_much_waits() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w") as stream, open(reader, "rb"):
        output = Output(stream)
        for _ in range(1000):
            output.write("x" * 999 + "\n")
            output.flush()
        assert len(output._waiting) < MOST_WAITING + 1000


def test_what_the_encoding_lacks(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w", encoding="ascii") as stream:
        stream.write("before\n")
        tell("ü \udcff.png", stream)
    assert path.read_text() == "before\n\\xfc \\udcff.png\n"


def test_a_stream_in_memory() -> None:
    stream = io.StringIO()
    tell("hello", stream)
    assert stream.getvalue() == "hello\n"
    tell("hello", None)
