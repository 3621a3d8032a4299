"""A process of our own that ends with the one that has started it, however that ends.

    python -m cluster.child PID COMMAND...     becomes COMMAND, which the kernel kills as soon as PID, its parent, ends

It runs at low priority: what it is there for goes first.

To Linux a process's parent is the thread that has started it: that thread must live as long as the process is wanted.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

_NICENESS = 10
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def child_command(module: str, *arguments: str) -> list[str]:
    """The command of `python -m module arguments...` as a child of this process. Start it in `child_environment`.

    Nothing is imported from the folder that it is started in, which `-m` alone would look into first of all.
    """
    python = [sys.executable, "-P", "-m"]
    return [*python, "cluster.child", str(os.getpid()), *python, module, *arguments]


def child_environment(*, without: Collection[str]) -> dict[str, str]:
    """This process's environment but for the variables `without`; our packages are found from any folder."""
    root = str(Path(__file__).parents[1])
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = [root, *map(os.path.abspath, given)]  # relative to here, not to where the child is started
    ours = {name: value for name, value in os.environ.items() if name not in without}
    return {**ours, "PYTHONPATH": os.pathsep.join(paths)}


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it is kept by what this becomes
    if os.getppid() != parent:  # it was gone before the kernel was told
        sys.exit(1)
    os.nice(_NICENESS)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
