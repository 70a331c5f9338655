"""A process that ends soon after the one that started it, also where that one was killed by -9.

``python -m neobert.parent PID ...`` is ``neobert ...`` that ends with process PID.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, Popen

SECONDS_BETWEEN_LOOKS = 0.5
AGENT = "TORCHELASTIC_RUN_ID"  # set by torchrun, and so by what stands on it, for its processes


def end_with(parent: int) -> None:
    """End this process at once when its parent is no longer ``parent``, in whatever work it is.

    As by a signal 9: only for work that survives one. Linux and macOS give an orphan another
    parent; elsewhere this does nothing.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="neobert-parent").start()


def end_with_torchrun() -> None:
    """`end_with` the agent that started this process, if one did: killed by -9 it ends nobody.

    Processes further down inherit the variable, and their parents are no agent: an agent is one
    that began without it, as only Linux tells; elsewhere nobody is watched.
    """
    if AGENT not in os.environ:
        return
    agent = os.getppid()
    try:
        began_with = Path(f"/proc/{agent}/environ").read_bytes()
    except OSError:
        return
    if AGENT.encode() + b"=" not in began_with:
        end_with(agent)


def start(arguments: Sequence[str]) -> "Popen[bytes]":
    """``neobert ...`` in a process that ends with this one; nothing but its errors is shown."""
    command = [sys.executable, "-m", "neobert.parent", str(os.getpid()), *arguments]
    return Popen(command, stdout=DEVNULL)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    from neobert.cli import main

    sys.exit(main(sys.argv[2:]))
