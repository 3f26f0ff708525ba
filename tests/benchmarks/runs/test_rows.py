"""The results store: rows survive whatever ends the writer."""

import json
import signal
import subprocess
import sys

import pytest

from tests.points import POINT
from toruslab.benchmarks.runs.rows import RowFile

WRITER = """
import sys
from pathlib import Path
from toruslab.benchmarks.runs.rows import RowFile
rows = RowFile(Path(sys.argv[1]))
for n in range(len(rows.rows), 10**6):
    rows.add({"point": %r, "source": "measured", "n": n, "filler": "x" * 40_000_000})
    print(n, flush=True)
"""


def row(n: int) -> dict:
    return {"point": POINT, "source": "measured", "n": n}


@pytest.mark.slow
def test_rows_survive_kill_9_in_the_middle_of_a_write(tmp_path):
    """Rows are of 40 MB; the writer is killed as soon as its file grows; every row that it has reported is there."""
    torn = 0
    for n in range(4):
        path = tmp_path / f"{n}.jsonl"
        command = [sys.executable, "-c", WRITER % POINT, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            assert writer.stdout.readline() == "0\n"
            size = path.stat().st_size
            while path.stat().st_size <= size and writer.poll() is None:
                pass
            writer.send_signal(signal.SIGKILL)
            reported = [0, *map(int, writer.stdout.read().split())]
        torn += not path.read_bytes().endswith(b"\n")
        found = [r["n"] for r in RowFile(path).rows]
        assert found == list(range(len(found))) and found[-1] >= reported[-1]
        RowFile(path).add(row(-1))
        assert [r["n"] for r in RowFile(path).rows] == [*found, -1]
        path.unlink()
    assert torn, "no kill fell into a write"


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    rows = RowFile(path)
    for n in range(3):
        rows.add(row(n))
    path.write_bytes(path.read_bytes()[:-cut])
    again = RowFile(path)
    assert [r["n"] for r in again.rows] == [0, 1]
    again.add(row(7))
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1, 7]
