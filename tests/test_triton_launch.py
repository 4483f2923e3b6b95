"""Which operands the Triton kernels read and write where they lie, and which by a copy."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fused.triton import _launch


def nhwc(n, c, h, w, offset=0, dtype=torch.float16):
    memory = torch.zeros(n * h * w * c + offset, dtype=dtype)[offset:]
    return memory.view(n, h, w, c).permute(0, 3, 1, 2)


ALIGNED = {
    "dense": lambda: nhwc(2, 16, 3, 4),
    "rows of a larger one": lambda: nhwc(2, 16, 6, 4)[:, :, ::2],
    "channels of a larger one": lambda: nhwc(2, 32, 3, 4)[:, 8:24],
    "one image for all": lambda: nhwc(1, 16, 3, 4).expand(5, -1, -1, -1),
    "eight elements on": lambda: nhwc(2, 16, 3, 4, offset=8),
    "four floats on": lambda: nhwc(2, 16, 3, 4, offset=4, dtype=torch.float32),
    "one channel": lambda: torch.zeros(2, 1, 3, 4),
    "odd channels": lambda: nhwc(2, 13, 3, 4, offset=1),
}
COPIED = {
    "channels apart": lambda: torch.zeros(2, 16, 3, 4),
    "one element on": lambda: nhwc(2, 16, 3, 4, offset=1),
    "four elements on": lambda: nhwc(2, 16, 3, 4, offset=4),
    "pixels of 20 channels": lambda: nhwc(2, 20, 3, 4)[:, :16],
    "one channel for all": lambda: nhwc(2, 1, 3, 4).expand(-1, 16, -1, -1),
}


@pytest.mark.parametrize("make", ALIGNED.values(), ids=ALIGNED)
def test_operands_that_stay_where_they_are(make):
    t = make()
    assert _launch.readable(t) is t
    assert _launch.writable(t) is t


@pytest.mark.parametrize("make", COPIED.values(), ids=COPIED)
def test_operands_that_are_copied(make):
    t = make()
    if t._is_view() and 0 not in t.stride():
        t.copy_(torch.rand(t.shape))
    copy = _launch.readable(t)
    assert torch.equal(copy, t)
    target = _launch.writable(t)
    for other in (copy, target):
        assert other.is_contiguous(memory_format=torch.channels_last)
        assert other.shape == t.shape
        assert other.dtype == t.dtype
        assert other.data_ptr() != t.data_ptr()
        assert _launch.readable(other) is other


def test_a_parameter_has_an_address_too():
    weight = torch.nn.Parameter(nhwc(8, 16, 3, 3, offset=1))
    assert _launch.readable(weight) is not weight


def test_tensors_without_memory_are_judged_by_their_offset():
    with FakeTensorMode():
        for make in ALIGNED.values():
            t = make()
            assert _launch.readable(t) is t
        for make in COPIED.values():
            t = make()
            assert _launch.readable(t) is not t
    meta = torch.empty(17, dtype=torch.float16, device="meta")[1:].view(1, 1, 1, 16)
    assert _launch.readable(meta.permute(0, 3, 1, 2)).storage_offset() == 0


def test_the_self_check_multiplies_in_every_kind_of_product():
    from resnet_fused.ops import _triton_checks as checks

    before = torch.backends.cudnn.allow_tf32
    kinds = {
        case.name: [(dtype, _launch.precision(dtype)) for dtype in checks._dtypes(case, "cuda:0")]
        for case in checks.CONV_CASES
    }
    assert (torch.bfloat16, "ieee") in kinds["stem"] and len(kinds["stem"]) == 1
    assert kinds["3x3"] == [
        (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "tf32x3")
    ]  # fmt: skip
    assert torch.backends.cudnn.allow_tf32 == before
