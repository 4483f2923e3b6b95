"""What the machine code of conv_bn_act for sm_90a on float32 holds, beside that of all by TMA."""

from __future__ import annotations

SHAPE = "Tf32Shape"


def is_tf32(mangled: str) -> bool:
    """Whether a kernel's tensors are float32, multiplied in TF32."""
    return SHAPE in mangled


def staging(mangled: str) -> int:
    """How many times the 16-bit kernels' staging a kernel has."""
    return 2 if is_tf32(mangled) else 1


def product(columns: int) -> str:
    """The instruction that multiplies, as a pattern."""
    return rf"HGMMA\.64x{columns}x8\.F32\.TF32.*"


def counts(columns: int) -> dict[str, int]:
    """Instructions of the epilogue and the loads, with how many there are at least.

    Args:
        columns: of its products.
    """
    return {
        # Weights twice, before the wait and behind it; pixels by both ways; the shortcut in boxes.
        "UTMALDG.*": 6,
        r"UTMALDG\.4D\.IM2COL.*": 1,
        "UTMASTG.*": 2,
        "STS": columns,  # a word for each sum, with and without a shortcut
        "LDS": columns // 2,
    }
