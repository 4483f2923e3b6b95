"""Gives the wheel in a folder the platform tag that it honestly has, and prints it.

auditwheel finds the oldest glibc and libstdc++ that the binary runs with. torch's own libraries are
not packed: torch, imported first, brings them. Where no manylinux tag fits, the plain one stays.

    python tools/tag_wheel.py build/wheel
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")


def main(folder: Path) -> int:
    """Repairs the one wheel in the folder in place; 0 also when it stays as it is."""
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        print(f"error: expected one wheel in {folder}, found {len(wheels)}", file=sys.stderr)
        return 1
    wheel = wheels[0]
    auditwheel = shutil.which("auditwheel")
    if sys.platform.startswith("linux") and "-none-any" not in wheel.name and auditwheel:
        with tempfile.TemporaryDirectory(dir=folder) as repaired:
            excludes = [part for name in TORCH_LIBRARIES for part in ("--exclude", name)]
            command = [
                auditwheel,
                "repair",
                "--plat",
                "auto",
                *excludes,
                "-w",
                repaired,
                str(wheel),
            ]
            result = subprocess.run(
                command, capture_output=True, text=True, check=False, env=os.environ
            )
            made = sorted(Path(repaired).glob("*.whl"))
            if result.returncode == 0 and made:
                wheel.unlink()
                wheel = made[0].rename(folder / made[0].name)
            else:
                print(f"auditwheel left the plain tag: {result.stderr.strip().splitlines()[-1:]}")
    print(
        f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB), tag {'-'.join(wheel.stem.split('-')[2:])}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
