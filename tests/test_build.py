"""The compiled extension: what it says of itself, and bn_act_out called directly."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused import _extension

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

needs_extension = pytest.mark.skipif(
    not _extension.available(), reason=f"no compiled extension: {_extension.why_not()}"
)
pytestmark = needs_extension


def bn_act_out(x, scale, shift, residual=None, relu=True, out=None):
    """Calls the op; out is poisoned with NaN, so an element that is not written shows."""
    out = torch.full_like(x, float("nan")) if out is None else out
    torch.ops.resnet_fused.bn_act_out(x, scale, shift, residual, relu, out)
    return out


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def expected(x, scale, shift, residual=None, relu=True):
    """The op in float64, rounded once: exact for the integers of `operands`."""
    z = x.double() * scale.double()[:, None, None] + shift.double()[:, None, None]
    z = z if residual is None else z + residual.double()
    return (z.relu() if relu else z).to(x.dtype)


def operands(shape, dtype, seed=0):
    """Small integers and powers of two: no arithmetic on them rounds in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randint(-4, 5, shape, generator=generator).to(dtype) for _ in range(2))
    scale = 2.0 ** torch.randint(-2, 3, shape[1:2], generator=generator)
    scale = scale * (1 - 2 * torch.randint(0, 2, shape[1:2], generator=generator))
    shift = torch.randint(-4, 5, shape[1:2], generator=generator)
    return x, scale.to(compute_dtype(dtype)), shift.to(compute_dtype(dtype)), residual


def misaligned(tensor):
    """The same values and strides, one element off a 16-byte boundary."""
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return buffer[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def sliced(tensor):
    """The same values inside a larger tensor, with gaps in every dimension."""
    n, c, h, w = tensor.shape
    larger = torch.full((n + 1, c + 3, h + 1, w + 2), float("nan"), dtype=tensor.dtype)
    return larger[1:, 2 : c + 2, :h, 1 : w + 1].copy_(tensor)


LAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "nhwc": lambda t: t.contiguous(memory_format=torch.channels_last),
    "misaligned nchw": lambda t: misaligned(t.contiguous()),
    "misaligned nhwc": lambda t: misaligned(t.contiguous(memory_format=torch.channels_last)),
    "sliced": sliced,
    "sliced nhwc": lambda t: sliced(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "whnc": lambda t: t.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
}
SHAPES = [
    (2, 64, 7, 7),
    (2, 65, 5, 3),
    (3, 1, 4, 4),
    (1, 3, 33, 35),
    (2, 8, 1, 1),
    (3, 5, 1, 9),
    (4, 4, 4, 4),
    (1, 1, 1, 1),
]


def test_build_info_says_what_was_built():
    info = _extension.build_info()
    assert info["torch_target"] == "2.11"
    assert re.search(r"\d+\.\d+", info["compiler"])
    assert info["cuda"] is bool(info["archs"])
    if info["cuda"]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
        assert all(re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch) for arch in info["archs"])
        assert info["why_no_cuda"] is None
    else:
        assert info["nvcc"] is None
        assert info["why_no_cuda"]


def test_the_binary_is_abi3_and_knows_no_builders_folder():
    import resnet_fused._C as extension

    path = Path(extension.__file__)
    assert path.name.endswith(".abi3.so")
    assert str(ROOT).encode() not in path.read_bytes()
    dynamic = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
    assert "libcudart" not in dynamic  # linked statically: torch brings another version
    assert "libtorch_cuda" not in dynamic  # a PyTorch without CUDA loads the same file


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_in_every_layout(layout, dtype):
    for seed, shape in enumerate(SHAPES):
        x, scale, shift, residual = operands(shape, dtype, seed)
        place = LAYOUTS[layout]
        for other in (None, place(residual), residual[:, :, :1, :1].expand(shape)):
            for relu in (True, False):
                y = bn_act_out(place(x), scale, shift, other, relu, place(torch.full_like(x, 9)))
                assert torch.equal(y, expected(x, scale, shift, other, relu)), (shape, relu)


@pytest.mark.op_matrix
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_layouts(dtype):
    x, scale, shift, residual = operands((2, 24, 6, 5), dtype)
    want = expected(x, scale, shift, residual)
    for x_layout in LAYOUTS.values():
        for out_layout in LAYOUTS.values():
            y = bn_act_out(
                x_layout(x), scale, shift, residual, out=out_layout(torch.full_like(x, 9))
            )
            assert torch.equal(y, want)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape):
    x, scale, shift, residual = operands(shape, torch.float32)
    assert bn_act_out(x, scale, shift, residual).shape == shape


def test_threads_split_a_long_row_and_many_short_ones():
    for shape in ((1, 1, 300, 1001), (2, 7, 150, 151)):
        for fmt in (torch.contiguous_format, torch.channels_last):
            x, scale, shift, residual = operands(shape, torch.bfloat16)
            y = bn_act_out(x.contiguous(memory_format=fmt), scale, shift, residual)
            assert torch.equal(y, expected(x, scale, shift, residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_widens_exactly(dtype):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(1, 1, 256, 256)
    y = bn_act_out(x, torch.ones(1), torch.zeros(1), relu=False)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(7), x.nan_to_num(7))
    wide = bn_act_out(x, torch.tensor([4.0]), torch.zeros(1), relu=False)
    assert torch.equal(wide.nan_to_num(7), (x.float() * 4).to(dtype).nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs_nearest_even(dtype):
    """Random float32 bit patterns, ties and overflow's edge: scale carries them into the op."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator).to(torch.int32)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = (halves.view(torch.int32) + (0x1000 if dtype == torch.float16 else 0x8000)).view(
        torch.float32
    )
    for values in (bits.view(torch.float32), halves, ties, torch.full((1 << 16,), 65519.99)):
        x = torch.ones(1, 1 << 16, 1, 2, dtype=dtype)
        y = bn_act_out(x, values, torch.zeros(1 << 16), relu=False)
        want = values.to(dtype)[None, :, None, None].expand_as(y)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.nan_to_num(7), want.nan_to_num(7))


def test_the_product_is_not_rounded_before_the_shift():
    """(1 + 2^-23)(1 - 2^-23) - 1 is -2^-46 with one fma, 0 with two roundings."""
    x = torch.full((1, 1, 4, 8), 1 + 2.0**-23)
    y = bn_act_out(x, torch.tensor([1 - 2.0**-23]), torch.tensor([-1.0]), relu=False)
    assert torch.equal(y, torch.full_like(x, -(2.0**-46)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay(dtype):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -1.0], dtype=dtype)
    x = special.repeat(8, 5).view(1, 8, 5, 5)
    residual = special.repeat_interleave(5).repeat(8).view(1, 8, 5, 5)
    one, zero = (
        torch.ones(8, dtype=compute_dtype(dtype)),
        torch.zeros(8, dtype=compute_dtype(dtype)),
    )
    for layout in ("nchw", "nhwc", "sliced"):
        for relu in (True, False):
            y = bn_act_out(LAYOUTS[layout](x), one, zero, LAYOUTS[layout](residual), relu)
            want = (x + residual).relu() if relu else x + residual
            assert torch.equal(y.isnan(), want.isnan())
            assert torch.equal(y.nan_to_num(7), want.nan_to_num(7))


def test_guard_bands_stay():
    x, scale, shift, residual = operands((2, 5, 3, 7), torch.float16)
    for step in (1, 2):  # dense, and every other element
        buffer = torch.full((64 + step * x.numel() + 64,), 77.0, dtype=x.dtype)
        strides = tuple(step * s for s in x.contiguous(memory_format=torch.channels_last).stride())
        out = buffer[64:].as_strided(x.shape, strides)
        bn_act_out(x, scale, shift, residual, out=out)
        assert torch.equal(out, expected(x, scale, shift, residual))
        assert int((buffer != 77).sum()) <= x.numel()
        assert bool((buffer[:64] == 77).all())
        assert bool((buffer[-64:] == 77).all())
        assert step == 1 or bool((buffer[65:-64:2] == 77).all())


def test_inputs_are_left_alone():
    x, scale, shift, residual = operands((2, 6, 3, 3), torch.float32)
    before = [t.clone() for t in (x, scale, shift, residual)]
    bn_act_out(x, scale, shift, residual)
    assert all(map(torch.equal, (x, scale, shift, residual), before))


def test_slices_of_one_tensor_may_be_input_and_output():
    """Halves of a concatenation buffer interleave in memory without sharing an element."""
    for fmt in (torch.contiguous_format, torch.channels_last):
        buffer = torch.zeros(2, 8, 3, 3).contiguous(memory_format=fmt)
        x, scale, shift, _ = operands((2, 4, 3, 3), torch.float32)
        buffer[:, :4] = x
        bn_act_out(buffer[:, :4], scale, shift, out=buffer[:, 4:])
        assert torch.equal(buffer[:, 4:], expected(x, scale, shift))
        assert torch.equal(buffer[:, :4], x)


F32, C8 = (2, 8, 3, 3), (8,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 3)}, r"x: expected 4 dimensions .*\[2, 8, 3\]"),
        ({"x": torch.zeros(F32, dtype=torch.int32)}, "x: expected float32, float64, float16 or"),
        ({"scale": torch.zeros(7)}, r"scale: expected shape \[8\].* got \[7\]"),
        ({"scale": torch.zeros(8, 1)}, r"scale: expected shape \[8\].* got \[8, 1\]"),
        ({"scale": torch.zeros(8, dtype=torch.float64)}, "scale: expected float32.*got float64"),
        ({"shift": torch.zeros(9)}, r"shift: expected shape \[8\].* got \[9\]"),
        ({"shift": torch.zeros(8, dtype=torch.float16)}, "shift: expected float32.*got float16"),
        ({"shift": torch.zeros(16)[::2]}, "shift: expected a contiguous tensor"),
        ({"residual": torch.zeros(2, 8, 1, 1)}, r"residual: expected x's shape .*\[2, 8, 1, 1\]"),
        ({"residual": torch.zeros(F32).half()}, "residual: expected x's dtype float32.*float16"),
        ({"out": torch.zeros(2, 8, 3, 4)}, r"out: expected x's shape .*\[2, 8, 3, 4\]"),
        ({"out": torch.zeros(F32).bfloat16()}, "out: expected x's dtype float32, got bfloat16"),
        ({"out": torch.zeros(1, 8, 3, 3).expand(F32)}, "out: its elements share memory"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    arguments = {
        "x": torch.zeros(F32),
        "scale": torch.zeros(C8),
        "shift": torch.zeros(C8),
        "residual": None,
        "relu": True,
        "out": torch.zeros(F32),
    }
    with pytest.raises(RuntimeError, match=f"^{message}"):
        torch.ops.resnet_fused.bn_act_out(**(arguments | change))


def test_a_float64_x_wants_float64_scales():
    x = torch.zeros(F32, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"^scale: expected float64 \(x is float64\), got float32"
    ):
        bn_act_out(x, torch.zeros(8), torch.zeros(8))


def test_shared_memory_is_refused():
    scale, shift = torch.ones(8), torch.zeros(8)
    buffer = torch.zeros(2 * 2 * 8 * 3 * 3)
    x = buffer[: 2 * 72].view(F32)
    shifted = buffer[1 : 2 * 72 + 1].view(F32)
    row_later = buffer[72 : 72 + 144].view(F32)
    for out in (x, shifted, row_later):
        with pytest.raises(RuntimeError, match="^out: it shares memory with x"):
            bn_act_out(x, scale, shift, out=out)
        with pytest.raises(RuntimeError, match="^out: it shares memory with residual"):
            bn_act_out(torch.zeros(F32), scale, shift, x, out=out)
    with pytest.raises(RuntimeError, match="^out: it shares memory with scale"):
        bn_act_out(torch.zeros(F32), buffer[:8], shift, out=x)
    apart = buffer[144:288].view(F32)
    assert bn_act_out(x, scale, shift, out=apart) is apart


def test_torch_refuses_another_device():
    with pytest.raises((RuntimeError, NotImplementedError)):
        bn_act_out(
            torch.zeros(F32, device="meta"), torch.zeros(8), torch.zeros(8), out=torch.ones(F32)
        )


def test_a_missing_torch_names_the_command():
    """setup.py's text is what a user reads; its command must be the one that works."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert any("pip install --no-build-isolation ." in str(text) for text in texts)


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("90a", ["90a"]),
        ("80;90a", ["80", "90a"]),
        ("8.0, 9.0a 12.0+PTX", ["80", "90a", "120+PTX"]),
        ("80;80", ["80"]),
    ],
)
def test_architectures_are_read(text, archs):
    assert _toolchain("architectures", text) == repr(archs)


def test_a_wrong_architecture_is_named():
    with pytest.raises(subprocess.CalledProcessError) as caught:
        _toolchain("architectures", "80;hopper")
    assert "ARCHS: 'hopper' is no GPU architecture" in caught.value.stderr


def test_nvcc_can_be_hidden(monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_NO_CUDA", "1")
    assert _toolchain("find_nvcc") == "(None, 'RESNET_FUSED_NO_CUDA is set')"


def _toolchain(function, *arguments):
    """Calls a function of tools/toolchain.py as setup.py would, in a Python of its own."""
    code = f"import toolchain; print(repr(toolchain.{function}(*{arguments!r})))"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT / "tools"
    ).stdout.strip()


def test_the_extension_loads_before_anybody_has_imported_torch():
    line = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "extension_line.py")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "does not load" not in line
