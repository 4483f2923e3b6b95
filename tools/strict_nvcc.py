"""Runs nvcc, and fails where ptxas says in passing that it made the code slow.

    python tools/strict_nvcc.py nvcc -c kernel.cu ...

ptxas reports these as information, which `--warning-as-error` lets through: matrix instructions
that it had to serialize (C7510, C7511), and waits or arrivals that it put in (C7517, C7519, C7520).
CMake calls it as the compiler's launcher.
"""

from __future__ import annotations

import re
import subprocess
import sys

NOTE = re.compile(r"serialized|\bC75(?:10|11|17|19|20)\b")


def main(command: list[str]) -> int:
    """Runs the command and relays what it prints; its exit status, or 1 where a line is a note."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stdout.write(result.stdout)
    notes = [line for line in result.stdout.splitlines() if NOTE.search(line)]
    for line in notes:
        print(f"error: not accepted from ptxas: {line}")
    return result.returncode or int(bool(notes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
