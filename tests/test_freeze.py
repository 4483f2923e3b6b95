"""The frozen engine on the CPU: the fused model's results, in every shape, thread and dtype."""

from __future__ import annotations

import threading

import pytest
import torch
from nets import images, tiny_resnet
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused.freeze import _trace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("block", [tv.BasicBlock, tv.Bottleneck])
def test_it_gives_the_fused_models_bits(block, dtype):
    model = tiny_resnet(block).to(dtype)
    fused, engine = rf.fuse(model), rf.freeze(model, images(2, 32, dtype))
    for shape in ((2, 32), (7, 41), (7, 41), (7, 41), (0, 32)):
        x = images(*shape, dtype)
        assert torch.equal(run(engine, x), run(fused, x)), shape
    x = torch.randn(3, 3, 97, 131).to(dtype).contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(engine, x), run(fused, x))


def test_the_values_are_those_of_the_moment():
    model, x = tiny_resnet(), images()
    engine, before = rf.freeze(model, x), run(rf.fuse(model), x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2) if tensor.is_floating_point() else None
    assert torch.equal(run(engine, x), before)
    assert not torch.equal(run(rf.fuse(model), x), before)
    assert not list(engine.parameters()) and not engine.state_dict()


def test_eight_threads_on_one_engine():
    model = tiny_resnet()
    fused, engine = rf.fuse(model), rf.freeze(model, images(1, 32), max_shapes=2)
    work = [images(1 + k % 3, 32 + 8 * (k % 3)) * (1 + k) for k in range(8)]
    expected = [run(fused, x) for x in work]
    failures: list[str] = []
    start = threading.Barrier(8)

    def serve(k: int) -> None:
        start.wait()
        for repeat in range(6):
            with torch.no_grad():
                if not torch.equal(engine(work[k]), expected[k]):
                    failures.append(f"thread {k}, call {repeat}")

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(engine._programs) <= 2


def test_freezing_beside_a_thread_that_serves():
    """torch.fx patches every module's call while it traces; that must not show elsewhere."""
    model, x = tiny_resnet(tv.BasicBlock), images(1)
    served = [rf.freeze(model, x), model, rf.fuse(model)]
    expected = [run(each, x) for each in served]
    stop, failures, calls = threading.Event(), [], []

    def serve() -> None:
        while not stop.is_set():
            for each, wanted in zip(served, expected, strict=True):
                try:
                    assert torch.equal(run(each, x), wanted)
                except BaseException as error:
                    failures.append(error)
                    return
            calls.append(1)

    thread = threading.Thread(target=serve)
    thread.start()
    plain = rf.unfuse(model)
    while len(calls) < 3 and not failures:
        _trace.trace(plain, 1)
    rf.freeze(model, x)
    stop.set()
    thread.join()
    assert failures == []


def test_shapes_are_prepared_when_they_come_again_and_dropped_by_use():
    engine = rf.freeze(tiny_resnet(), images(1, 32), max_shapes=2)

    def prepared() -> list[int]:
        return [key[0][0] for key in engine._programs]

    run(engine, images(2, 32))
    assert prepared() == [1]
    run(engine, images(2, 32))
    assert prepared() == [1, 2]
    run(engine, images(1, 32))  # used last
    run(engine, images(3, 32))
    run(engine, images(3, 32))
    assert prepared() == [1, 3]


def test_the_shortcuts_memory_is_used_again():
    engine = rf.freeze(tiny_resnet(), images(2, 64))
    memory = engine.memory
    assert memory.peak <= memory.planned < memory.without_reuse
    assert not memory.arena
    assert "ATen" in str(memory)
    assert memory.shape == ((2, 3, 64, 64),)


@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("x_last", [False, True])
def test_feature_maps_have_pytorchs_layout(weights_last, x_last):
    body = nn.Sequential(*list(tiny_resnet().children())[:-2]).eval()
    if weights_last:
        body = body.to(memory_format=torch.channels_last)
    x = images() if x_last else images().contiguous()
    y, expected = run(rf.freeze(body, x), x), run(body, x)
    assert y.is_contiguous(memory_format=torch.channels_last) == expected.is_contiguous(
        memory_format=torch.channels_last
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_bytes_with_mean_and_std():
    model = tiny_resnet()
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    bytes_ = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    engine = rf.freeze(model, bytes_, input_norm=rf.ops.stem_input_norm(mean, std))
    wide = bytes_.double() / 255
    for channel in range(3):
        wide[:, channel] = (wide[:, channel] - mean[channel]) / std[channel]
    expected = run(model.double(), wide)
    torch.testing.assert_close(run(engine, bytes_).double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"dtype torch.float32; accepted is torch.uint8"):
        engine(images(2, 40))
    for channels in (1, 4):
        with pytest.raises(ValueError, match=f"{channels} channels.*accepted are 3"):
            engine(bytes_[:, :1].expand(2, channels, 40, 40))


MODEL = tiny_resnet(tv.BasicBlock)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: (images(dtype=torch.float64),), ValueError, "torch.float64; accepted is torch.fl"),
        (lambda: (images()[0],), ValueError, "3 dimensions.*accepted are 4"),
        (lambda: (torch.zeros(1, 4, 32, 32),), ValueError, "4 channels.*accepted are 3"),
        (lambda: (images().to("meta"),), ValueError, "on meta; accepted is cpu"),
        (lambda: (images().requires_grad_(),), RuntimeError, "requires a gradient"),
        (lambda: (3,), TypeError, "argument 0 is a int"),
        (lambda: (images(), images()), TypeError, "2 arguments; accepted are 1"),
    ],
)
def test_wrong_calls_say_so(given, error, message):
    engine = rf.freeze(MODEL, images())
    with pytest.raises(error, match=message):
        engine(*given())


@pytest.mark.parametrize(
    ("model", "example", "options", "error", "message"),
    [
        (lambda: 3, images, {}, TypeError, "model must be an nn.Module, got int"),
        (lambda: MODEL, lambda: None, {}, TypeError, "example holds a NoneType"),
        (lambda: MODEL, lambda: (), {}, TypeError, "empty tuple"),
        (lambda: tiny_resnet().train(), images, {}, ValueError, "training mode.*model.eval"),
        (lambda: MODEL, lambda: images(dtype=torch.float16), {}, ValueError, "one dtype"),
        (lambda: MODEL, lambda: images().byte(), {}, ValueError, "uint8 with input_norm"),
        (lambda: MODEL, lambda: images().to("meta"), {}, ValueError, "accepted are cpu and cuda"),
        (lambda: MODEL, images, {"max_shapes": 0}, ValueError, "max_shapes is 0"),
        (lambda: MODEL, images, {"input_norm": torch.ones(2, 4)}, ValueError, r"\(2, 3\)"),
        (lambda: rf.freeze(MODEL, images()), images, {}, TypeError, "an engine already"),
    ],
)
def test_wrong_arguments_say_so(model, example, options, error, message):
    with pytest.raises(error, match=message):
        rf.freeze(model(), example(), **options)


def test_one_layer_in_training_mode_is_named():
    model = tiny_resnet()
    model.layer2[0].bn1.train()
    with pytest.raises(ValueError, match=r"layer2\.0\.bn1 in training mode"):
        rf.freeze(model, images())


def test_an_engine_stays_where_it_is():
    engine = rf.freeze(MODEL, images())
    assert engine.eval() is engine and engine.to("cpu") is engine and not engine.training
    for change in (engine.half, engine.double, lambda: engine.to("meta")):
        with pytest.raises(RuntimeError, match="freeze the model again"):
            change()
    with pytest.raises(RuntimeError, match="for inference"):
        engine.train()


@pytest.mark.filterwarnings("ignore")
def test_tracers_are_told_to_take_the_model():
    engine, x = rf.freeze(MODEL, images()), images()
    with torch.no_grad():
        for trace in (torch.jit.trace, lambda e, x: torch.export.export(e, (x,))):
            with pytest.raises(RuntimeError, match="model that it was made of"):
                trace(engine, x)
        graph = torch.fx.symbolic_trace(nn.Sequential(engine, nn.ReLU()))
        assert torch.equal(graph(x), engine(x).relu())


def test_autocast_around_it_changes_nothing():
    engine, x = rf.freeze(MODEL, images()), images()
    expected = run(rf.fuse(MODEL), x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(engine(x), expected)


def test_with_gradients_on_a_plain_input_is_served():
    engine, x = rf.freeze(MODEL, images()), images()
    y = engine(x)
    assert not y.requires_grad and torch.equal(y, run(rf.fuse(MODEL), x))


def test_explain_shows_an_engine():
    model, x = tiny_resnet(tv.BasicBlock), images()
    with torch.no_grad():
        explained, fused = rf.explain(rf.freeze(model, x), x), rf.explain(rf.fuse(model), x)
    assert {(r.layer, r.pattern, r.implementation) for r in explained.rows} == {
        (r.layer, r.pattern, r.implementation) for r in fused.rows
    }
    assert len(explained.rows) == len(fused.rows) == 12
    with pytest.raises(ValueError, match="accepted are 3"):
        rf.explain(rf.freeze(model, x), torch.zeros(1, 5, 8, 8))
