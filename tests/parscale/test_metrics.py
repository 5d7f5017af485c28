"""The run's figures: whole rows, nothing lost by a kill, nothing left of what a resume undoes."""

import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from parscale.metrics import COLUMNS, MetricsWriter, read_csv
from sharding.settings import InputError


def write_steps(workdir, steps, resume_step=0):
    with MetricsWriter(workdir, resume_step) as writer:
        for step in steps:
            writer.write(step, loss=5.0 / step, tokens=step * 64, learning_rate=np.float32(1e-3))


def checksum(content: bytes) -> bytes:
    """The masked CRC-32C of TFRecord, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return ((rotated + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def events(workdir) -> list[Event]:
    """The records of every event file: 8 bytes of length, 4 of checksum, the record, 4 more."""
    found = []
    for path in sorted(workdir.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            assert content[8:12] == checksum(content[:8])
            assert content[12 + length : 16 + length] == checksum(content[12 : 12 + length])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_rows_come_back_as_written(tmp_path):
    loss = np.float32(2.3456789)
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(1, loss=loss, tokens=np.int64(1 << 40), grad_norm=math.inf, skipped=0)
        writer.write(2, held_out_loss=1.5, bits_per_byte=None)
        # Readable while the run goes on.
        columns = read_csv(tmp_path / "new" / "run")
    assert tuple(columns) == COLUMNS
    assert columns["step"] == [1, 2]
    assert columns["tokens"] == [1 << 40, None]
    assert np.float32(columns["loss"][0]) == loss
    assert columns["grad_norm"] == [math.inf, None]
    assert columns["held_out_loss"] == [None, 1.5]
    assert columns["bits_per_byte"] == [None, None]


def test_a_resumed_run_reads_as_if_it_had_not_been_interrupted(tmp_path):
    write_steps(tmp_path / "whole", range(1, 9))
    write_steps(tmp_path / "resumed", range(1, 7))
    write_steps(tmp_path / "resumed", range(5, 9), resume_step=4)
    assert (tmp_path / "resumed" / "metrics.csv").read_bytes() == (
        tmp_path / "whole" / "metrics.csv"
    ).read_bytes()
    assert not list((tmp_path / "resumed").glob("*.partial"))


@pytest.mark.parametrize("kept", [0, 3, 60, -1, -9])
def test_a_torn_end_is_mended(tmp_path, kept):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.csv"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    whole = content[:kept].count(b"\n") - 1
    assert read_csv(path)["step"] == [1, 2, 3][: max(whole, 0)]
    write_steps(tmp_path, range(max(whole, 0) + 1, 4), resume_step=max(whole, 0))
    assert path.read_bytes() == content


@pytest.mark.multiprocess
def test_a_kill_loses_no_row_that_was_written(tmp_path):
    program = (
        "import sys\n"
        "from parscale.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for step in range(1, 6):\n"
        "    writer.write(step, loss=1.0)\n"
        "print('written', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert read_csv(tmp_path)["step"] == [1, 2, 3, 4, 5]


def test_tensorboard_has_the_same_figures(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [2], resume_step=1)  # within the same second: nothing is overwritten
    found = events(tmp_path)
    losses = [
        (event.step, value.simple_value)
        for event in found
        for value in event.summary.value
        if value.tag == "loss"
    ]
    assert losses == [(1, 5.0), (2, 2.5), (2, 2.5)]
    # TensorBoard is told to forget what a resume does again.
    purged = [event.step for event in found if event.HasField("session_log")]
    assert purged[-1] == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_events_that_cannot_be_written_end_the_run(tmp_path):
    with pytest.raises(OSError, match="No space left"), MetricsWriter(tmp_path) as writer:  # noqa: PT012
        (number,) = (
            int(name)
            for name in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{name}").startswith(f"{tmp_path}/events")
        )
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, number)
        os.close(full)
        writer.write(1, loss=1.0)


def test_wrong_names_and_files_are_refused(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer, pytest.raises(KeyError, match="los"):
        writer.write(1, los=2.0)
    with pytest.raises(InputError, match="no such file"):
        read_csv(tmp_path)
    path = tmp_path / "metrics.csv"
    path.write_text("a,b\n1,2\n")
    for read in (read_csv, MetricsWriter):
        with pytest.raises(InputError, match="not the record of a run: its first line is 'a,b'"):
            read(tmp_path)
    path.write_text(",".join(COLUMNS) + "\n1,2\n")
    with pytest.raises(InputError, match="line 2"):
        read_csv(path)
    assert path.read_text().endswith("\n1,2\n")
