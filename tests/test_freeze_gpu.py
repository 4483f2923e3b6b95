"""The engine's program for a GPU, with the emulator's kernels and a stand-in for CUDA graphs.

The stand-in's graph is what it is on a GPU: the launches between its beginning and its end, which a
replay repeats on the same memory; a tensor that a launch reads from elsewhere would be stale.
"""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from nets import images, stir, tiny_resnet
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.freeze import _gpu, _kernels, _order, _served


class StandIn:
    """Graphs that run again what was captured; marks that say who waited for what."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.captured = self.replayed = 0
        self.failures: list[Exception] = []
        self.inside = 0
        self.own_capture = False
        self.current = 0
        self.held: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def active(self):
        yield

    def capturing(self) -> bool:
        return self.own_capture

    def capture(self, run):
        if self.failures:
            raise self.failures.pop(0)
        self.captured += 1
        result = run()

        def replay() -> None:
            assert self._lock.acquire(blocking=False), "two replays of one memory at once"
            try:
                self.replayed += 1
                for kept, made in zip(_leaves(result), _leaves(run()), strict=True):
                    kept.copy_(made)
            finally:
                self._lock.release()

        return replay, result

    def mark(self) -> str:
        self.log.append("mark")
        return f"mark {self.log.count('mark')}"

    def wait(self, mark: str) -> None:
        self.log.append(f"wait for {mark}")

    def stream(self) -> int:
        return self.current

    def hold(self, memory) -> None:
        self.held += [(self.current, tensor.data_ptr()) for tensor in memory]

    def release(self) -> None:
        self.log.append("release")


def _leaves(result) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(result)


class Launches:
    """In the place of the kernels' launches: writes what the reference computes."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.places: list[tuple[int, int]] = []

    def __call__(self, op: str, *arguments) -> None:
        x, weight, scale, shift, residual, out, *rest = arguments
        assert op == "conv_bn_act"
        self.ran.append(op)
        self.places.append((out.data_ptr(), out.untyped_storage().nbytes()))
        y = torch.ops.resnet_fused.conv_bn_act.reference(x, weight, scale, shift, residual, *rest)
        out.copy_(y)


@pytest.fixture
def launches(monkeypatch) -> Launches:
    """Makes conv_bn_act be served by a kernel that writes into given memory."""
    made = Launches()
    choose = _kernels.KINDS["conv_bn_act"].choose

    def chosen(step, args):
        with backends.backend("reference"):
            return choose(step, args)

    kind = _kernels.KINDS["conv_bn_act"]._replace(choose=chosen)
    monkeypatch.setitem(_kernels.KINDS, "conv_bn_act", kind)
    monkeypatch.setitem(_kernels._LAUNCHES, "reference", made)
    return made


def engine_of(model: nn.Module, x: torch.Tensor, **options) -> tuple[rf.Engine, StandIn]:
    """An engine whose programs are those of a GPU."""
    engine, driver = rf.freeze(model, x, **options), StandIn()
    engine._programs.clear()
    engine._builder = _gpu.Builder(_gpu.laid_out(engine._graph), driver, engine._free)
    engine._programs[engine._first], _ = engine._built([x], True)
    return engine, driver


def run(model, x):
    with torch.inference_mode():
        return model(x)


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [tv.BasicBlock, tv.Bottleneck])
def test_replays_with_new_data(launches, block):
    model = tiny_resnet(block)
    engine, driver = engine_of(model, images())
    results = []
    for _ in range(3):
        x = images()
        results.append((run(engine, x), run(model, x)))
    for found, expected in results:  # each is the caller's own memory
        close(found, expected)
    assert (driver.captured, driver.replayed) == (1, 3)
    assert {row.implementation for row in engine.report().rows} == {"reference", "torch"}


def test_who_calls_in_another_mode_than_it_was_made_in(launches):
    """A graph's inputs are written by every call: memory of inference mode could not be."""
    model = tiny_resnet(tv.BasicBlock)
    with torch.inference_mode():
        engine, driver = engine_of(model, images())
        for _ in range(3):  # a shape that is captured here, too
            engine(images(3))
    modes = (torch.no_grad, torch.inference_mode, torch.enable_grad)
    for count in (2, 3):
        for mode in modes:
            x = images(count)
            with mode():
                found = engine(x)
            close(found, run(model, x))
    assert driver.captured == 2 and driver.replayed >= 2 * len(modes)


def test_kernels_write_into_one_planned_arena(launches):
    engine, _ = engine_of(tiny_resnet(), images(2, 64))
    launches.places.clear()
    run(engine, images(2, 64))
    memory = engine.memory
    assert memory.arena and memory.outside > 0
    assert {size for _, size in launches.places} == {memory.planned}
    assert memory.peak <= memory.planned < memory.without_reuse / 2
    assert len({start for start, _ in launches.places}) < len(launches.places)  # used again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_live_together_do_not_meet(launches, dtype):
    """Every value is as it was written, until its last reader has read it."""
    model = tiny_resnet().to(dtype)
    engine, _ = engine_of(model, images(2, 32, dtype))
    (program,) = engine._programs.values()
    plan = program.plan
    for a in plan.lives:
        for b in plan.lives:
            together = a.first <= b.last and b.first <= a.last and a.dtype == b.dtype
            if a.value < b.value and together:
                low, high = plan.offsets[a.value], plan.offsets[b.value]
                assert low + a.size <= high or high + b.size <= low
    assert all(offset % 256 == 0 for offset in plan.offsets.values())
    x = images(2, 32, dtype)
    with backends.backend("reference"):
        expected = run(rf.fuse(model), x)
    torch.testing.assert_close(run(engine, x), expected, rtol=0, atol=0)


def test_a_shape_runs_step_by_step_first_and_is_captured_when_it_comes_again(launches):
    model = tiny_resnet()
    engine, driver = engine_of(model, images(1), max_shapes=2)
    for batch, captured in ((2, 1), (2, 2), (2, 2), (3, 2), (4, 2), (3, 2), (1, 2), (3, 3)):
        x = images(batch)
        close(run(engine, x), run(model, x))
        assert driver.captured == captured, batch
    assert [key[0][0] for key in engine._programs] == [1, 3]


def test_eight_threads_replay_one_after_the_other(launches):
    model = tiny_resnet(tv.BasicBlock)
    engine, driver = engine_of(model, images(1, 16))
    work = [images(1, 16) * (1 + k) for k in range(8)]
    expected = [run(model, x) for x in work]
    failures: list[object] = []

    def serve(k: int) -> None:
        try:
            for _ in range(3):
                close(run(engine, work[k]), expected[k])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and driver.replayed == 24


@pytest.mark.parametrize("wrong", [False, True])
def test_kernels_that_begin_early_must_agree_with_those_that_wait(
    launches, monkeypatch, caplog, wrong
):
    """The first replay is compared with the steps one by one; else each kernel waits."""
    run_in = _gpu.Steps.run_in

    def raced(self, args, arena):
        result = run_in(self, args, arena)
        return result + 1 if wrong and self.early else result

    begin = _kernels.Kernel.__init__

    def early(self, step, values):
        begin(self, step, values)
        self.late = None

    monkeypatch.setattr(_gpu.Steps, "run_in", raced)
    monkeypatch.setattr(_kernels.Kernel, "__init__", early)
    model = tiny_resnet(tv.BasicBlock)
    engine, driver = engine_of(model, images())
    assert (driver.captured, driver.replayed) == ((2, 1) if wrong else (1, 1))
    assert ("gave another result" in caplog.text) == wrong
    whys = [row.why for row in engine.report().rows if row.implementation == "reference"]
    assert all(("but not so: kernels that begin" in why) == wrong for why in whys)
    x = images()
    close(run(engine, x), run(model, x))


def test_a_stream_waits_for_the_one_before_it(launches):
    engine, driver = engine_of(tiny_resnet(tv.BasicBlock), images())
    driver.log.clear()
    run(engine, images())
    run(engine, images())
    assert driver.log == ["wait for mark 1", "mark", "wait for mark 1", "mark"]


def test_memory_that_another_stream_reads_is_not_the_next_ones_meanwhile(launches):
    """An engine may drop a program whose replay a second thread's stream has still to run."""
    engine, driver = engine_of(tiny_resnet(tv.BasicBlock), images())
    run(engine, images())
    assert driver.held == [], "the allocator orders what its own stream does"
    driver.current = 7
    run(engine, images())
    (program,) = engine._programs.values()
    memory = [*program._inputs, *program._memory.values()]
    assert len(memory) >= 2
    assert driver.held == [(7, tensor.data_ptr()) for tensor in memory]


def test_out_of_memory_drops_the_other_shapes_and_captures_again(launches):
    model = tiny_resnet(tv.BasicBlock)
    engine, driver = engine_of(model, images(1))
    run(engine, images(2))
    driver.failures = [torch.OutOfMemoryError("CUDA out of memory")]
    x = images(2)
    close(run(engine, x), run(model, x))
    assert "release" in driver.log and driver.captured == 2
    assert [key[0][0] for key in engine._programs] == [2]
    assert engine.memory.shape == ((2, 3, 32, 32),)


@pytest.mark.parametrize("errors", [2, 1])
def test_without_a_graph_it_runs_step_by_step_and_says_so(launches, caplog, errors):
    model = tiny_resnet(tv.BasicBlock)
    engine, driver = engine_of(model, images(1))
    run(engine, images(2))
    error = torch.OutOfMemoryError("CUDA out of memory")
    refused = RuntimeError("operation not permitted when stream is capturing")
    driver.failures = [error, error] if errors == 2 else [refused]
    for _ in range(2):
        x = images(2)
        close(run(engine, x), run(model, x))
    assert "runs step by step" in caplog.text and str(driver.failures) == "[]"
    assert not engine._programs[(images(2).shape,)].arena
    assert driver.replayed == 0


def test_a_callers_own_capture_gets_the_steps(launches):
    model = tiny_resnet(tv.BasicBlock)
    engine, driver = engine_of(model, images(1))
    driver.own_capture = True
    for x in (images(2), images(2), images(2), images(1)):
        close(run(engine, x), run(model, x))
    assert (driver.captured, driver.replayed) == (1, 0)


def test_a_broadcast_shortcut_is_added_apart(launches):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.n(self.a(x)) + x.mean((2, 3), keepdim=True).sum(1, keepdim=True))

    model, x = stir(Net()).eval(), images()
    engine, _ = engine_of(model, x)
    close(run(engine, x), run(model, x))
    assert launches.ran == []


def test_the_default_of_a_place_without_kernels():
    """Rules ask; without a GPU's kernels they say who refused."""
    said = _served.refusal("stem", torch.device("cuda", 0), torch.float16)
    assert said is not None and "no kernel of stem serves it" in said
    assert _served.refusal("nothing", torch.device("cuda", 0), torch.float16) == (
        "this version has no op nothing"
    )


def test_a_kernel_that_knows_no_order_says_so(launches):
    """Of conv_bn_act Triton's kernel takes the hint; others walk forwards and are right."""
    model, x = tiny_resnet(tv.BasicBlock), images()
    engine = rf.freeze(model, x)
    graph, said = _order.turned(engine._graph, [x], x.dtype, 0)
    assert len(said) > 3
    builder = _gpu.Builder(_gpu.laid_out(graph), StandIn(), engine._free)
    program, _ = builder.build([x], True)
    close(program([x]), run(model, x))
    whys = {graph.steps[at].name: why for at, (_, why) in program.served.items()}
    for name, _, _ in said:
        assert whys[name].endswith("the batch forwards: reference must")
    assert launches.ran


def narrow() -> nn.Module:
    """A bottleneck network that the interpreter computes in seconds."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        rf.nn.Bottleneck(16, 8, 1, nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32))),
        rf.nn.Bottleneck(32, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    return stir(body).eval()


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "held"), [(torch.float32, 10**9), (torch.float16, 0)])
def test_tritons_kernels_write_into_the_arena(dtype, held):
    """Also where layers walk the batch backwards: behind whatever the cache does not hold."""
    model, x = narrow().to(dtype), images(1, 12, dtype)
    engine = rf.freeze(model, x)
    driver = StandIn()
    graph, said = _order.turned(engine._graph, [x], dtype, held)
    assert said[0][1] == (held == 0)
    builder = _gpu.Builder(_gpu.laid_out(graph), driver, engine._free)
    with backends.backend("triton"):
        program, _ = builder.build([x], True)
        given = images(1, 12, dtype)
        found = program([given])
        expected = run(rf.fuse(model), given)
    assert program.arena and {name for name, _ in program.served.values()} == {"triton", "torch"}
    whys = [why for name, why in program.served.values() if name == "triton"]
    assert all("it begins when the step ahead has ended: Triton's interp" in why for why in whys)
    assert sum(why.endswith("the batch backwards") for why in whys) == (0 if held else len(said))
    assert program.plan.planned < program.plan.total
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
