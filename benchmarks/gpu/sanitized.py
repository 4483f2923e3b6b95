"""What runs under compute-sanitizer: `python -m gpu.sanitized DEVICE module:function=NAME ...`."""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> int:
    """Runs checks of the exact tier, one after the other; 1 if one of them failed."""
    from gpu.worker import EXTENSION, add_extension, direct
    from resnet_fused import _selfcheck

    add_extension(os.environ.get(EXTENSION))
    device, failed = arguments[0], 0
    for one in arguments[1:]:
        check, _, configuration = one.partition("=")
        try:
            with direct():
                _selfcheck.load(check)(configuration, device)
        except Exception as error:
            print(f"failed: {one}: {_selfcheck.text_of(error)}", flush=True)
            failed = 1
        else:
            print(f"passed: {one}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
