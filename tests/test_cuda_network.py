"""A network in one launch as far as it goes without a GPU: arguments, plans, choice, self-check.

What it computes is tested in the emulator (test_emulated_network*.py).
"""

from __future__ import annotations

import emulated
import network_standin
import pytest
import torch

from resnet_fused import _extension, admission, backends
from resnet_fused.ops import _admitted, _cuda, _cuda_network, _cuda_plan
from resnet_fused.ops import _cuda_network_checks as checks
from resnet_fused.ops._cuda_network import Wish

OP = _cuda_network.OP
HALF = torch.float16
H200 = (132, 232448, 233472, 90)

needs_kernel = pytest.mark.skipif(
    not _cuda_plan.exists(OP), reason="the extension was built without nvcc, or is an older one"
)


def layers(name="stage", dtype=HALF):
    return checks.layers_of(name, dtype, "cpu", torch.Generator().manual_seed(0))[0]


# Plans.


@needs_kernel
def test_layers_that_do_not_hang_together_share_a_phase():
    made = _cuda_network.plan(layers(), H200, Wish(cluster=1))
    assert made.meets == (0, 0, 1, 1, 1, 1, 1) and (made.meetings, made.launches) == (5, 1)
    assert made.blocks == 264 and made.cycles > 6 * 1776


@needs_kernel
def test_memory_serves_again_behind_a_meeting_as_in_an_arena():
    """A layer that overwrites what another one of its phase reads, or writes, begins a new one."""
    wide, narrow = layers()[1], layers()[0]  # the projection's result is the smaller one

    def meets(*given):
        return _cuda_network.plan(given, H200).meets

    def over(memory, one):
        return one._replace(out=memory.as_strided(one.out.shape, one.out.stride()))

    assert meets(wide, narrow) == (0, 0)
    assert meets(wide, over(wide.x, narrow)) == (0, 1)
    assert meets(wide, over(wide.out, narrow)) == (0, 1)
    with pytest.raises(RuntimeError, match="layer 1: out: it shares memory with x"):
        meets(wide, over(narrow.x, narrow))


@needs_kernel
@pytest.mark.parametrize(("name", "cluster"), _cuda_network.CONFIGURATIONS.items())
def test_every_configuration_plans_its_networks(name, cluster):
    for network in checks.NETWORKS:
        for pixels in checks.PIXELS[cluster]:
            cut = checks.SPLITS[network, cluster]
            wish = Wish(0, cluster, cut, (pixels,) * len(cut))
            made = _cuda_network.plan(layers(network), H200, wish)
            assert (made.cluster, made.splits, made.pixels) == (cluster, cut, wish.pixels)
            assert made.wish.blocks == made.blocks
            again = _cuda_network.plan(layers(network), H200, made.wish)
            assert again == made


@needs_kernel
def test_what_is_not_built_is_refused_and_named():
    said = _cuda_network.plan(layers(), H200, Wish(cluster=2))
    assert said == "clusters of 2 blocks; 4 and 8 are built, 1 is without"
    said = _cuda_network.plan(layers(), (108, 163 << 10, 164 << 10, 80), Wish(cluster=8))
    assert said == "clusters are for GPUs of capability 9.0"
    said = _cuda_network.plan(layers(), H200, Wish(cluster=1, splits=(1, 1, 99, 1, 1, 1, 1)))
    assert said.startswith("layer 2: ")


# Arguments: refused in the order of the checks, on the CPU too.


def image(*shape, dtype=HALF):
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


X, OUT = image(1, 16, 5, 5), image(1, 24, 5, 5)
ONE = {
    "x": X, "weight": image(24, 16, 1, 1), "scale": torch.ones(24), "shift": torch.zeros(24),
    "residual": image(1, 24, 5, 5), "geometry": [1, 1, 0, 0, 1, 1, 1, 1], "out": OUT,
}  # fmt: skip
BAD = [
    ({"x": [X.double()] * 2}, "layer 0: x: expected bfloat16, float16 or float32, got float64"),
    ({"weight": [ONE["weight"]]}, "weight: expected 2, as many as x has, got 1"),
    ({"scale": []}, "scale: expected 2, as many as x has, got 0"),
    ({"shift": [ONE["shift"]] * 3}, "shift: expected 2, as many as x has, got 3"),
    ({"residual": [None]}, "residual: expected 2, as many as x has, got 1"),
    ({"out": [OUT]}, "out: expected 2, as many as x has, got 1"),
    ({"geometry": [1] * 15}, "geometry: expected 8 integers a layer, 16, got 15"),
    ({"geometry": ONE["geometry"] + [0] * 8}, "layer 1: stride: expected 1 to"),
    ({"x": [X, X.bfloat16()]}, "layer 1: weight: expected x's dtype bfloat16, got float16"),
    ({"out": [OUT, image(1, 24, 5, 4)]}, "layer 1: out: expected the convolution's shape"),
    ({"residual": [None, image(1, 8, 5, 5)]}, "layer 1: residual: expected out's shape"),
    ({"scale": [ONE["scale"], torch.ones(8)]}, "layer 1: scale: expected shape [24]"),
    ({"shift": [ONE["shift"].half()] * 2}, "layer 0: shift: expected float32"),
    ({"residual": [OUT, None]}, "layer 0: out: it shares memory with residual"),
    ({"blocks": -1}, "blocks: expected 0 to"),
    ({"cluster": 1 << 40}, "cluster: expected 0 to"),
    ({"splits": [1]}, "splits: expected 2, as many as x has, got 1"),
    ({"pixels": [64, -1]}, "pixels: expected 0 to"),
    ({"workspace": torch.zeros(64)}, "workspace: expected contiguous int32"),
    ({"workspace": torch.zeros(200, dtype=torch.int32)[1:]}, "workspace: expected an address"),
    ({"workspace": None}, "workspace: it shares memory with out of layer 1"),
    ({}, "network_out: expected CUDA tensors, got others"),
]


@needs_kernel
@pytest.mark.parametrize(("changes", "words"), BAD, ids=lambda value: str(value)[:40])
def test_wrong_arguments_are_refused_by_name(changes, words):
    given = {name: [one, one] for name, one in ONE.items()} | {
        "geometry": ONE["geometry"] * 2, "out": [OUT, image(1, 24, 5, 5)], "blocks": 0,
        "cluster": 0, "splits": [], "pixels": [],
    }  # fmt: skip
    memory = torch.zeros(1024, dtype=torch.int32)
    given["workspace"] = memory[-memory.data_ptr() % 256 // 4 :]
    given |= changes
    if given["workspace"] is None:  # the last layer's result
        given["workspace"] = memory[-memory.data_ptr() % 256 // 4 :]
        flat = given["workspace"].view(HALF)[: 24 * 25]
        given["out"] = [OUT, flat.view(1, 5, 5, 24).permute(0, 3, 1, 2)]
    names = "x weight scale shift residual geometry out workspace blocks cluster splits pixels"
    with pytest.raises(RuntimeError) as error:
        _cuda_plan.raw(OP, "out")(*(given[name] for name in names.split()))
    assert words in str(error.value)


@needs_kernel
def test_float32_and_narrow_layers_are_refused_by_the_plan():
    single = [one._replace(x=one.x.float(), weight=one.weight.float(), out=one.out.float(),
                           residual=None) for one in layers()]  # fmt: skip
    assert _cuda_network.plan(single, H200) == (
        "layer 0: its dtype; all layers share one of 16 bits"
    )
    narrow = _cuda_network.Layer(
        image(1, 12, 4, 4), image(16, 12, 1, 1), torch.ones(16), torch.zeros(16), None, (1, 1),
        (0, 0), (1, 1), 1, "relu", image(1, 16, 4, 4),
    )  # fmt: skip
    assert "16 bytes at a time" in _cuda_network.plan([narrow], H200)


# The choice.


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose room for clusters the test says."""
    room = {8: 32, 4: 64}
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    monkeypatch.setattr(_cuda_network, "clusters", lambda device, cluster: room[cluster])
    allowed: dict[str, frozenset[str] | None] = {OP: None}
    monkeypatch.setattr(_admitted, "names", lambda op, name, device: allowed.get(op))
    return room, allowed


@needs_kernel
def test_the_least_predicted_of_the_admitted_ones_is_taken(gpu):
    room, allowed = gpu
    device, given = torch.device("cuda", 0), layers()
    best = _cuda_network.choose(given, device)
    each = [_cuda_network.plan(given, H200, Wish(cluster=c)) for c in (8, 4, 1)]
    assert best == min(each, key=lambda one: one.cycles)
    allowed[OP] = frozenset({"through_memory"})
    assert _cuda_network.choose(given, device) == each[2]
    allowed[OP] = frozenset()
    assert _cuda_network.choose(given, device) == "none of its configurations was admitted"
    allowed[OP] = frozenset({"clusters_of_8"})
    room[8] = 30  # as where GPCs are uneven
    assert _cuda_network.choose(given, device).blocks == 240
    room[8] = 0
    assert "has no room for one" in _cuda_network.choose(given, device)


def test_it_is_entered_for_admission_and_refused_where_it_cannot_run(monkeypatch):
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.check == "resnet_fused.ops._cuda_network_checks:network"
    device = torch.device("cuda", 0)
    assert "torch.float32" in _cuda_network.refusal(device, torch.float32)
    monkeypatch.setattr(_extension, "available", lambda: False)
    assert "the compiled extension is missing" in _cuda_network.refusal(device, HALF)
    with pytest.raises(ImportError, match="holds no CUDA kernel of network"):
        checks.network_configurations()


@needs_kernel
def test_a_configuration_of_conv_bn_act_that_was_refused_keeps_it_back(gpu, monkeypatch):
    _, allowed = gpu
    asked: list[backends.Call] = []
    monkeypatch.setattr(_cuda, "supports", lambda call: asked.append(call))
    device = torch.device("cuda", 0)
    assert _cuda_network.refusal(device, HALF) is None and asked[0].op == OP
    single = _cuda_plan.configurations("conv_bn_act")[_cuda_network.alone(_plan(), 0)[0]]
    allowed["conv_bn_act"] = frozenset(_cuda_plan.configurations("conv_bn_act")) - {single}
    assert single in _cuda_network.refusal(device, HALF)


def _plan():
    return _cuda_network.plan(layers(), H200, Wish(cluster=1))


def test_the_workspace_is_zeros_at_an_aligned_address():
    made = _cuda_network.Plan(1, 1, 1, 0, 1000, 256, 0.0, (1,), (64,), (0,), "")
    memory = _cuda_network.workspace(made, torch.device("cpu"))
    assert memory.data_ptr() % 256 == 0 and memory.numel() == 250 and not memory.any()


# The self-check.


@needs_kernel
@pytest.mark.emulated
@pytest.mark.parametrize("name", _cuda_network.CONFIGURATIONS)
def test_the_self_check_passes_right_kernels(name, monkeypatch):
    monkeypatch.setattr(_cuda_network, "DTYPES", (torch.bfloat16,))
    count = []

    def launch(*given):
        count.append(given)
        network_standin.launch(*given)

    checks.check(name, "cpu", launch, emulated.H200, room=8)
    cluster = _cuda_network.CONFIGURATIONS[name]
    assert len(count) == 2 * len(checks.NETWORKS) * (1 + len(checks.PIXELS[cluster]))
    if cluster > 1:  # not its GPU
        checks.check(name, "cpu", lambda *_: None, (108, 163 << 10, 164 << 10, 80))


def exact(given, made, memory):
    """In the place of a launch: what the layers are to be."""
    for one in given:
        one.out.copy_(checks._expected(one))


@needs_kernel
def test_the_self_check_passes_no_wrong_ones():
    checks.check("through_memory", "cpu", exact, H200)
    count = len(layers())
    for wrong in range(count):

        def launch(given, made, memory, wrong=wrong):
            exact(given, made, memory)
            if len(given) == count:
                given[wrong].out[-1, -1, -1, -1] += 64

        with pytest.raises(ArithmeticError, match=f"layer {wrong}: 1 of .* elements are wrong"):
            checks.check("through_memory", "cpu", launch, H200)

    def dirty(given, made, memory):
        exact(given, made, memory)
        memory[0] = 1

    with pytest.raises(ArithmeticError, match="first: its counters are not zeros again"):
        checks.check("through_memory", "cpu", dirty, H200)
    with pytest.raises(ArithmeticError, match="NaN or not written"):
        checks.check("clusters_of_8", "cpu", lambda *_: None, H200)
    with pytest.raises(ValueError, match="accepted are 'clusters_of_8'"):
        checks.check("clusters_of_2", "cpu", exact, H200)
    with pytest.raises(ArithmeticError, match="no network of the self-check fits it"):
        checks.check("through_memory", "cpu", exact, (132, 1024, 2048, 90))
