"""Networks of others in the benchmark: built the same everywhere, judged, inference alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fused.bench import gauges, limits, networks, peers, process, record
from resnet_fused.bench import subject as subjects
from resnet_fused.bench.ceilings import Ceilings
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.work import build

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from gpu import parts


def _inference(name: str, batch: int = 1, **more: Any) -> Subject:
    return Subject("model", "inference", name, batch, "float32", "cpu", size=32, **more)


def test_one_network_has_one_name() -> None:
    assert networks.canonical("rf:resnet18") == "resnet18"
    assert [networks.is_own(n) for n in ("rf:resnet18", "resnet18", "timm:resnet18", "vgg16")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert _inference("vgg16").foreign and not _inference("resnet18").foreign
    for name in ("resnet17", "timm:resnet17", "rf:vgg16", "hub:resnet18"):
        with pytest.raises(ValueError, match="accepted is a network of torchvision, timm:NAME"):
            networks.build(name)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm:resnet10t"])
def test_a_foreign_network_is_the_same_in_every_process(name: str, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    work, again = build(_inference(name)), build(_inference(name))
    assert torch.equal(torch.random.get_rng_state(), before)
    work.share(tmp_path / "shared.pt")
    child = build(_inference(name), tmp_path / "shared.pt")
    assert not any(module.training for module in child.module.modules())
    with torch.inference_mode():
        outputs = [one.run(one.module) for one in (work, again, child)]
        other = build(_inference(name, seed=1))
        assert not torch.equal(other.run(other.module), outputs[0])
    assert all(torch.equal(out, outputs[0]) for out in outputs[1:])
    assert work.judge(outputs[0]).ok and child.judge(outputs[0]).ok
    assert not work.judge(outputs[0] * 1.01).ok
    assert limits.limit(work, Ceilings(1e11, 1e10, "float32"))["seconds"] > 0


def test_timm_is_no_peer_of_its_own_networks() -> None:
    assert peers.PEERS["timm"].why_not(_inference("timm:resnet18")) == "the subject is timm's own"


class TwoHeads(nn.Module):
    """A network that returns several tensors, which torchvision's of old do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"one": self.one(x), "rest": [self.two(x)]}


def test_every_tensor_of_several_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "build", lambda name: TwoHeads())
    work = build(_inference("two_heads", batch=4))
    with torch.inference_mode():
        out = work.run(work.module)
    assert work.judge(out).ok
    wrong = work.judge({"one": out["one"], "rest": [out["rest"][0] * 1.01]})
    assert not wrong.ok and "output 1" in wrong.text
    assert "it lacks output 1" in work.judge({"one": out["one"], "rest": []}).text


def test_of_others_inference_as_a_whole_is_all() -> None:
    for level, ops in (("kernel", ()), ("block", ()), ("model", ("training",))):
        with pytest.raises(ValueError, match=r"model is 'vgg16'; accepted are resnet18.* alone"):
            subjects.subjects(level, "cpu", model="vgg16", batches=[1], ops=ops)
    (one,) = subjects.subjects("model", "cpu", model="vgg16", batches=[1], ops=["inference"])
    assert one.key == "model/inference/vgg16/b1/float32"
    with pytest.raises(ValueError, match="op is 'training'; accepted for vgg16 is inference"):
        build(Subject("model", "training", "vgg16", 1, "float32", "cpu", size=32))


@pytest.mark.parametrize(
    ("visible", "name"), [(None, "1"), ("", "1"), ("4, 7", "7"), ("GPU-a,GPU-b", "GPU-b")]
)
def test_the_current_gpu_is_the_childs_only_one(
    visible: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gauges.current_gpu() == name
    seen: dict[str, Any] = {}

    def start(command: Any, *, env: dict[str, str], **_: Any) -> None:
        seen.update(env)
        raise OSError("no more processes")

    monkeypatch.setattr(process.subprocess, "Popen", start)
    on_gpu = Subject("kernel", "bn_act", "8_at8", 1, "float32", "cuda")
    with pytest.raises(process.SampleError, match="no process could be started"):
        process.ChildVariant("inductor", "a:b", on_gpu, None, 1.0, 1).prepare()
    assert seen["CUDA_VISIBLE_DEVICES"] == name


def test_a_record_names_the_gpu_in_use_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class About:
        major, minor, total_memory = 9, 0, 2**30

        def __init__(self, index: int) -> None:
            self.name = f"GPU {index}"

    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 3),
        ("current_device", lambda: 1),
        ("get_device_properties", About),
    ):
        monkeypatch.setattr(torch.cuda, name, value)  # fmt: skip
    assert [gpu["name"] for gpu in record.gpus()] == ["GPU 1", "GPU 0", "GPU 2"]


def test_gpu_record_fails_a_row_in_which_ours_crashed() -> None:
    row = {"variants": {"eager": {}}, "omitted": {"fused": "boom", "cudnn": "boom", "apex": "no"}}
    assert parts.wrong_of_ours(row) == ""
    assert parts.wrong_of_ours(row | {"crashed": ["cudnn"]}) == ""
    assert parts.wrong_of_ours(row | {"crashed": ["fused", "cudnn"]}) == "fused: boom"
