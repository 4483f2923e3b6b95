"""The package's front door: names, laziness, and functions that are named as their modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

import resnet_fused as rf


@pytest.mark.parametrize("name", rf.__all__)
def test_every_public_name_is_there(name):
    assert getattr(rf, name) is not None
    assert name in dir(rf)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'fuze'"):
        rf.fuze  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import resnet_fused as rf; assert callable(rf.explain) and callable(rf.verify)",
        "import resnet_fused.explain, resnet_fused.verify, resnet_fused as rf\n"
        "assert callable(rf.explain) and callable(rf.verify)",
        "from resnet_fused.explain import Explanation; import resnet_fused as rf\n"
        "assert rf.Explanation is Explanation and callable(rf.explain)",
        "from resnet_fused import verify; assert callable(verify)",
        "import resnet_fused, sys; assert 'torch' not in sys.modules",
        "import torch, resnet_fused as rf; rf.ops; torch.ops.resnet_fused.bn_act.reference",
    ],
)
def test_in_a_fresh_process(code):
    subprocess.run([sys.executable, "-c", code], check=True)
