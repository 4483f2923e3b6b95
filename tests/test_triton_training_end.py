"""The gradient between two blocks by Triton's kernel: when it is taken, and what nodes hand to it.

The kernel's own numbers are held in `test_triton_bn_dgrad_end`; here are rows of blocks whose
backward takes it, beside the same by two ops and by eager PyTorch, all against float64.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools

import pytest
import torch
from end_gradient import build
from test_triton_training_nodes import check_gradients
from torch import nn
from torchvision.models.resnet import Bottleneck
from training_nets import Step, gradient_like, norms, projection
from triton_trace import needs_interpreter, watch

import resnet_fused as rf
from resnet_fused import backends, cases
from resnet_fused.bench.nodes import by_triton, ends_by_triton, nodes, unites_by_triton
from resnet_fused.ops import _end_gradient, _grad1x1
from resnet_fused.triton import _end_gradient as rule
from resnet_fused.triton import _grad1x1 as merged
from resnet_fused.triton import _grad1x1_end as united
from resnet_fused.triton import _limits, _tiles

OP = _end_gradient.OP
UNITED = f"{_end_gradient.UNITED}_kernel"
KERNEL, PASS, IMAGE = f"{OP}_kernel", "bn_add_act_backward_kernel", "conv_bn_dgrad_kernel"
H200, A100 = _tiles.Limits(132, 232448, 90), _tiles.Limits(108, 166912, 80)
CONSUMER = _tiles.Limits(170, 101376, 120)
BF16 = torch.bfloat16


def place_of(case, *, projected=False, added=1, dtype=BF16):
    geometry = (list(case.stride), list(case.padding), list(case.dilation), case.groups)
    return _end_gradient.Place(
        torch.device("cpu"), dtype, case.input_shape, case.weight_shape, geometry, projected, added
    )


def ask(case, limits, *, projected=False, added=1):
    """The rule's verdict on a place, and whether both gradients would come from one kernel."""
    sizes = case.n * case.h * case.w, case.k, case.c, 2
    plain = (case.r, case.s, *case.stride) == (1, 1, 1, 1)
    one = plain and merged.choose(*sizes, limits).config is not None
    place = place_of(case, projected=projected, added=added)
    found = rule.choose(
        case, 2, limits, projected=projected, merged=one,
        less=_end_gradient.less_bytes(place, merged=one),
        added=_end_gradient.added_elements(place),
    )  # fmt: skip
    return found, one


class TestRule:
    """When it is taken: arithmetic, no kernel runs."""

    @pytest.mark.parametrize("limits", [H200, A100, CONSUMER], ids=lambda one: one.capability)
    @pytest.mark.parametrize("batch", [32, 256])
    def test_where_resnet50_takes_it(self, batch, limits):
        merging = by_triton(BF16, limits)
        found = nodes(
            rf.models.resnet50(), (batch, 3, 224, 224), BF16, merging=merging, ending=True
        )
        layers = [(node, k.layer) for node in found for k in node.kernels if k.op == OP]
        verdicts = [ask(node.cases[layer], limits) for node, layer in layers]
        # All but some of those where both gradients would come from one kernel, which L2 does not
        # bound as it does the end's.
        left = [merged for one, merged in verdicts if not one.ended]
        apart = {32: 1, 256: 4} if limits is H200 else {}
        assert len(verdicts) == 15 and left == [True] * apart.get(batch, 0)
        assert sum(one for _, one in verdicts) == (6 if limits is H200 else 0)

    def test_what_is_read_again_may_be_more_than_what_is_saved(self):
        """64 channels into 256 filters: dz and y are four times the gradient that is spared."""
        case = cases.ConvCase("wide", 32, 64, 56, 56, 256)
        verdict, one = ask(case, H200)
        assert one and not verdict.ended
        assert verdict.why == "77.1 MB more through memory"
        verdict, one = ask(case, A100)
        assert not one and verdict == (True, "25.7 MB less through memory")

    def test_no_pixels_and_no_configuration(self):
        case = cases.ConvCase("none", 0, 64, 56, 56, 64)
        assert ask(case, H200)[0] == (False, "an empty batch")
        product = rule.product_of(cases.ConvCase("c", 2, 64, 8, 8, 64), 2)
        assert rule.unfit(product, H200) is None
        left = rule.unfit(product, H200, frozenset({"256x128_8w3s"}))
        assert left == "none of its configurations is left on this GPU"
        verdict = rule.choose(cases.ConvCase("c", 2, 64, 8, 8, 64), 2, H200, frozenset(), less=1)
        assert verdict == (False, left)

    def test_where_one_kernel_makes_all_three(self):
        """By the GPU: its places among ResNet-50's fifteen, and cycles that are said."""
        shapes = {32: (6, 3, 3), 256: (6, 3, 3), 1: (0, 1, 0)}
        for batch, wanted in shapes.items():
            taken = [
                sum(
                    kernel.op == _end_gradient.UNITED
                    for node in nodes(
                        rf.models.resnet50(), (batch, 3, 224, 224), BF16,
                        ending=ends_by_triton(BF16, limits),
                        uniting=unites_by_triton(BF16, limits),
                    )
                    for kernel in node.kernels
                )
                for limits in (H200, A100, CONSUMER)
            ]  # fmt: skip
            assert tuple(taken) == wanted
        case = cases.ConvCase("c", 256, 256, 56, 56, 64)
        found = rule.unite(case, 2, H200, projected=True, added=case.n * case.c * 3136)
        assert found == (True, "813 thousand cycles predicted, of more kernels 1113")
        left = rule.unite(case, 2, H200, frozenset())
        assert left == (False, "64 filters and 256 channels of 2 bytes do not fit one kernel")
        empty = rule.unite(cases.ConvCase("none", 0, 64, 56, 56, 64), 2, H200)
        assert empty == (False, "an empty batch")

    def test_which_shapes_one_kernel_of_all_three_takes(self):
        for limits, filters, channels, name in (
            (H200, 64, 256, "64x128_8w2s"), (H200, 128, 512, "128x128_8w2s"), (H200, 144, 64, None),
            (H200, 128, 528, None), (A100, 64, 512, "64x128_8w2s"), (A100, 128, 256, "128x64_8w2s"),
            (A100, 128, 512, None), (CONSUMER, 64, 256, "128x64_8w2s"), (CONSUMER, 64, 272, None),
            (H200, 56, 256, None), (H200, 64, 72, None),
        ):  # fmt: skip
            found = united.serves(filters, channels, 2, limits)
            assert (found and found.name) == name
            assert united.serves(filters, channels, 4, limits) is None
        assert united.unfit(56, 64, 2) == "56 filters and 64 channels are no multiples of 16"
        small = dataclasses.replace(H200, shared_memory=64 * 1024)
        assert united.serves(64, 256, 2, small) is None
        assert united.serves(64, 256, 2, H200, frozenset({"128x128_8w2s"})) is None

    def test_a_place_asks_the_rule_of_all_three(self, monkeypatch):
        case = cases.ConvCase("c", 32, 256, 56, 56, 64)
        entry, place = _end_gradient.UNITING["triton"], place_of(case, projected=True)
        assert entry.refusal(place) is None
        assert entry.verdict(place) == rule.unite(
            case, 2, _limits.INTERPRETER_LIMITS, projected=True, added=32 * 256 * 3136
        )
        monkeypatch.setattr(_end_gradient._triton, "allowed", lambda *_: frozenset())
        assert entry.refusal(place) == (
            "64 filters and 256 channels of 2 bytes do not fit one kernel"
        )

    def test_a_place_asks_the_rule(self, monkeypatch):
        """The kernel's entry, on the interpreter's pretended GPU, with the merged kernel or not."""
        case = cases.ConvCase("c", 32, 64, 56, 56, 256)
        entry, place = _end_gradient.ENDING["triton"], place_of(case)
        assert entry.refusal(place) is None
        for one in (True, False):
            way = _grad1x1.Way(one, "?")
            monkeypatch.setattr(_grad1x1, "way", lambda *_, way=way, **__: way)
            assert entry.verdict(place).ended is not one
        monkeypatch.setattr(_end_gradient._triton, "allowed", lambda *_: frozenset())
        assert entry.refusal(place) == "none of its configurations is left on this GPU"


def sixteens():
    """Between these blocks once a projection's reductions, once an addend of every other pixel."""
    torch.manual_seed(5)
    blocks = [
        Bottleneck(32, 16, 1, projection(32, 64)), Bottleneck(64, 16),
        Bottleneck(64, 32, 2, projection(64, 128, 2)),
    ]  # fmt: skip
    model = nn.Sequential(*blocks)
    for norm in norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
    return model.to(memory_format=torch.channels_last).train(), torch.randn(3, 32, 6, 7)


def half(name):
    """Blocks and images in float16, with what the oracle sees of them."""
    model, x = sixteens() if name == SIXTEENS else build(name, torch.float32)
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers(), x):
            if t.is_floating_point():
                t.copy_(t.half())
    return model, x.half().contiguous(memory_format=torch.channels_last)


def step(model, x, word=None, both="never"):
    """A step of a row; with a word by the Triton kernels, whose launches are counted."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    names, said = [], []
    if word is None:
        out = model(x)
        out.backward(gradient_like(out))
    else:
        model = rf.fuse(model)
        with (
            rf.backend("triton"), _end_gradient.preferring(word), _grad1x1.preferring(both),
            backends.recording() as routes, watch() as launches,
        ):  # fmt: skip
            out = model(x)
            out.backward(gradient_like(out))
        names = [launch.name for launch in launches]
        said = [route.why for route in routes if "gradient of the end" in route.why]
    grads = {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return Step(out.detach(), grads, buffers), collections.Counter(names), said


ROWS = ("basic", "bottlenecks", "projected within")
SIXTEENS = "sixteens"
"""A row whose channels the kernel of all three gradients takes."""


@functools.cache
def made(name, word, both="never"):
    model, x = half(name)
    if word is None:
        return step(model.double(), x.double())
    return step(model.half(), x, word, both)


INTERPRETED = [
    *needs_interpreter, pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
]  # fmt: skip


class TestRows:
    """Steps of rows of blocks by the kernels."""

    pytestmark = INTERPRETED

    @pytest.mark.parametrize("name", ROWS)
    def test_a_row_s_gradients(self, name):
        (one, names, said), (two, others, told) = made(name, "always"), made(name, "never")
        oracle, _, _ = made(name, None)
        blocks = sum(isinstance(child, nn.Module) for child in half(name)[0])
        assert (names[KERNEL], names[PASS]) == (blocks - 1, 1)
        assert (others[KERNEL], others[PASS]) == (0, blocks)
        assert others[IMAGE] - names[IMAGE] == blocks - 1
        assert torch.equal(one.out, two.out)
        check_gradients(one, two, oracle)
        for texts, how in ((said, f"one op ({OP})"), (told, "two ops")):
            assert len(texts) == blocks - 1
            assert all(f"before it by {how}: " in why for why in texts)

    def test_the_rule_decides_by_itself(self):
        model, x = half("bottlenecks")
        _, names, said = step(model.half(), x, "auto")
        assert (names[KERNEL], names[PASS]) == (2, 1)
        assert all("MB less through memory" in why for why in said)

    @pytest.mark.parametrize("name", ["1.conv3.weight", "0.bn3.weight", "0.downsample.1.weight"])
    def test_a_fault_of_the_kernel_is_seen(self, name, monkeypatch):
        """Of the gradient, of either BatchNorm's reductions."""
        from resnet_fused.triton import conv_bn_dgrad_end as kernel

        right = kernel.launch

        def wrong(*arguments, **options):
            right(*arguments, **options)
            residual, dx, sums = arguments[8], arguments[10], arguments[11]
            if name == "1.conv3.weight":
                dx[:, 3] *= 1.5
            elif residual is not None:
                sums[1 + ("downsample" in name)] *= 1.5

        model, x = half("bottlenecks")
        monkeypatch.setattr(kernel, "launch", wrong)
        one, _, _ = step(copy.deepcopy(model).half(), x, "always")
        (two, _, _), (oracle, _, _) = made("bottlenecks", "never"), made("bottlenecks", None)
        with pytest.raises(AssertionError, match=name.replace(".", r"\.") + ": "):
            check_gradients(one, two, oracle)


class TestUnited:
    """Rows in which one kernel makes all three gradients between two blocks."""

    pytestmark = INTERPRETED

    def test_a_row_s_gradients(self):
        (one, names, said), (two, others, _) = (
            made(SIXTEENS, *words) for words in (("always", "always"), ("never", "never"))
        )
        kernels = UNITED, KERNEL, PASS, "conv_bn_grad1x1_kernel"
        # Both gradients of the other 1x1 convolutions of stride 1 come from one kernel, too.
        assert [names[kernel] for kernel in kernels[:3]] == [2, 0, 1]
        assert [others[kernel] for kernel in kernels] == [0, 0, 3, 0] and names[kernels[3]]
        assert torch.equal(one.out, two.out)
        check_gradients(one, two, made(SIXTEENS, None)[0])
        how = f"before it by one op ({_end_gradient.UNITED}): "
        assert len(said) == 2 and all(how in why for why in said)

    @pytest.mark.parametrize(
        ("words", "found"),
        [(("always", "never"), (0, 2)), (("never", "always"), (0, 0)), (("auto", "auto"), (0, 2))],
    )
    def test_by_whose_word(self, words, found):
        """Two tiles of pixels are too few by the rule."""
        _, names, _ = made(SIXTEENS, *words)
        assert (names[UNITED], names[KERNEL]) == found

    @pytest.mark.parametrize(
        ("result", "name"),
        [(10, "1.conv3.weight"), (11, "0.bn3.weight"), (11, "0.downsample.1.weight"),
         (12, "1.conv1.weight")],
    )  # fmt: skip
    def test_a_fault_of_the_kernel_is_seen(self, result, name, monkeypatch):
        """Of the gradient, of either BatchNorm's reductions, of the weights'."""
        from resnet_fused.triton import conv_bn_grad1x1_end as kernel

        right = kernel.launch

        def wrong(*arguments, **options):
            right(*arguments, **options)
            target = arguments[result]
            if result == 11:
                target = target[1 + ("downsample" in name) :]
            target *= 1.5

        model, x = half(SIXTEENS)
        monkeypatch.setattr(kernel, "launch", wrong)
        one, _, _ = step(copy.deepcopy(model).half(), x, "always", "always")
        (two, _, _), (oracle, _, _) = made(SIXTEENS, "never"), made(SIXTEENS, None)
        with pytest.raises(AssertionError, match=name.replace(".", r"\.") + ": "):
            check_gradients(one, two, oracle)
