"""Processes of torchrun end with it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neobert import cli, parent

SLEEPER = """
import os, pathlib, sys, time
from neobert import parent
parent.end_with_torchrun()
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_process_ends_with_an_agent_killed_by_9(tmp_path: Path) -> None:
    script, mark = tmp_path / "sleeper.py", tmp_path / "process"
    script.write_text(SLEEPER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    agent = subprocess.Popen(
        [*command, "--nproc-per-node", "1", str(script), str(mark)], stderr=subprocess.DEVNULL
    )
    began = time.monotonic()
    try:
        while not (mark.exists() and mark.read_text()):
            assert agent.poll() is None
            assert time.monotonic() < began + 120
            time.sleep(0.05)
    finally:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    deadline = time.monotonic() + 60
    while _runs(int(mark.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_further_down_outlives_its_shell(tmp_path: Path) -> None:
    """It has the variable as well, from a parent that had it too."""
    script, mark = tmp_path / "sleeper.py", tmp_path / "process"
    script.write_text(SLEEPER.replace("time.sleep(600)", "time.sleep(60)"))
    command = f"{sys.executable} {script} {mark} & sleep 0.2"
    subprocess.run(["sh", "-c", command], env=os.environ | {parent.AGENT: "1"}, check=True)
    began = time.monotonic()
    while not (mark.exists() and mark.read_text()):
        assert time.monotonic() < began + 120
        time.sleep(0.05)
    time.sleep(3 * parent.SECONDS_BETWEEN_LOOKS)
    assert _runs(int(mark.read_text()))
    os.kill(int(mark.read_text()), signal.SIGKILL)


def test_every_command_looks_for_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[int] = []
    monkeypatch.setattr(parent, "end_with", watched.append)
    monkeypatch.delenv(parent.AGENT, raising=False)
    assert cli.main(["--version"]) == 0
    assert not watched
    monkeypatch.setenv(parent.AGENT, "1")
    assert cli.main(["--version"]) == 0
    assert watched == [os.getppid()]
