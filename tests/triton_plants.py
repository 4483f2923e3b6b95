"""Planted kernels and calls for the tests of tools/triton_gates.py; runs in a process of its own.

    python tests/triton_plants.py

prints one JSON object. Kernels here must not be interpreted, hence the process.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import _triton_aot as aot
import _triton_cases as cases
import _triton_rules as rules
import triton_gates

from resnet_fused.triton import _launch, _tiles, conv_bn_act


@triton.jit(do_not_specialize=["free"])
def typed_kernel(
    x, y, out, one, sixteen, odd, large, free, flag: tl.constexpr, BLOCK: tl.constexpr
):
    lane = tl.arange(0, BLOCK)
    total = tl.load(x + lane * one + sixteen) + tl.load(y + lane * odd + large + free)
    tl.store(out + lane, total if flag else total * 2)


@triton.jit
def conv_bn_act_kernel(x, out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Has the name of a matrix kernel and multiplies no matrices."""
    row = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(8):
        acc += tl.load(x + row + step * BLOCK_K).to(tl.float32)
    tl.store(out + row, acc.to(out.dtype.element_ty))


@triton.jit
def nameless_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 0.0)


def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def recorded(kernel: Any, capability: int, *arguments: Any, **options: Any) -> aot.Launch:
    with aot.recording(aot.ARCHITECTURES[capability].limits) as launches:
        _launch.traceable(kernel, arguments[0])[(7, 2)](*arguments, **options)
    return launches[0]


def verdict(variant: aot.Variant) -> list[str]:
    entry = cases.Recorded(variant, [])
    return next(found.failures for found in triton_gates.compiled([entry], workers=0))


def typed() -> dict[str, Any]:
    odd = meta(65)[1:]
    arguments = (meta(64), odd, meta(64, dtype=torch.float32), 1, 48, 7, 2**31, 16, True, 32)
    launch = recorded(typed_kernel, 90, *arguments, num_warps=8)
    variant = launch.variant
    names = list(variant.signature)
    return {
        "signature": variant.signature,
        "constants": {names[place]: value for (place,), value in variant.constants.items()},
        "known": [name for name in names if variant.known(name)],
        "grid": launch.grid,
        "warps": variant.options["num_warps"],
        "capability": variant.capability,
    }


def derived() -> list[str]:
    """Where a real launch's signature differs from Triton's documented rules, written anew."""
    wrong = []
    for layout in ("nhwc", "nchw", "unaligned"):
        for shape in cases.SHAPES:
            call = cases.Call("conv_bn_act", shape, "bf16", layout)
            with aot.recording(aot.ARCHITECTURES[90].limits) as launches:
                call.launch()
            launch = launches[0]
            skipped = set(conv_bn_act.conv_bn_act_kernel.do_not_specialize)
            for name, value in zip(launch.variant.signature, launch.arguments, strict=False):
                free = name in skipped
                if isinstance(value, torch.Tensor):
                    kind = "*" + {"bfloat16": "bf16", "float32": "fp32"}[str(value.dtype)[6:]]
                    known = value.storage_offset() * value.element_size() % 16 == 0
                else:
                    kind = "i32" if abs(value) < 2**31 else "i64"
                    kind = "constexpr" if value == 1 and not free else kind
                    known = value % 16 == 0
                known = known and kind != "constexpr" and not free
                seen = launch.variant.signature[name], launch.variant.known(name)
                if seen != (kind, known):
                    wrong.append(f"{shape.name} {layout} {name}={value}: {seen}")
    return wrong


def planted(tile: _tiles.Tile, capability: int = 80) -> list[str]:
    """The gates' words on conv_bn_act with a configuration that does not ship."""
    call = cases.Call("conv_bn_act", cases.SHAPES[0])
    shape = cases.SHAPES[0]
    with aot.recording(aot.ARCHITECTURES[capability].limits) as launches:
        conv_bn_act.launch(
            call.tensor(*shape.input_shape), call.tensor(*shape.weight_shape),
            call.tensor(shape.k), call.tensor(shape.k), call.tensor(*shape.output_shape),
            call.tensor(*shape.output_shape), (1, 1), (0, 0), (1, 1), 1, "relu",
            plan=_tiles.Plan(tile, 1, False, "planted"),
        )  # fmt: skip
    return verdict(launches[0].variant)


def training() -> dict[str, Any]:
    """A pass of training's as it ships, with narrower loads and with a spill; what is sampled."""
    chosen = [c for c in cases.calls() if c.op == "bn_add_act_backward" and c.sample]
    full = next(call for call in chosen if call.form == "out projected")
    entries, _ = cases.record([full], 80)
    entry = next(e for e in entries if e.variant.kernel == "bn_add_act_backward_kernel")
    code, error = triton_gates.attempt(entry.variant)
    assert code is not None, error
    counts = {**code.counts, "LDG.E.64": 5}
    sampled, _ = cases.record([call for call in cases.calls() if call.sample], 90)
    return {
        "shipped": rules.failures(entry.variant, code),
        "narrow": rules.failures(entry.variant, dataclasses.replace(code, counts=counts)),
        "spilling": rules.failures(entry.variant, dataclasses.replace(code, stack=8)),
        "ops": sorted({call.op for e in sampled if e.sample for call in e.calls if call.sample}),
        "expected": sorted(
            (
                *cases.CONVOLUTIONS,
                *cases.training.OPS,
                "bn_act",
                "conv_bn_act_fp8",
                "conv_chain",
                "head",
                "stem",
            )
        ),
        "kernels": sorted({e.variant.kernel for e in sampled} - set(rules.RULES)),
    }


def main() -> None:
    plain = recorded(
        conv_bn_act_kernel, 80, meta(4096), meta(4096), BLOCK_M=32, BLOCK_N=64, BLOCK_K=64
    ).variant
    shipped, _ = cases.record(
        [cases.Call("conv_bn_act", cases.SHAPES[0], tile="32x64_4w4s", sample=True)], 80
    )
    code, error = triton_gates.attempt(shipped[0].variant)
    assert code is not None, error
    narrow = dataclasses.replace(code, counts={**code.counts, "STG.E.64": 1})
    unpipelined = {k: n for k, n in code.loop.items() if not k.startswith("LDGSTS")}
    block = list(plain.signature).index("BLOCK_M")
    broken = dataclasses.replace(plain, constants={**plain.constants, (block,): 33})
    one = cases.record([cases.Call("conv_bn_act", s) for s in cases.SHAPES[:1] * 3], 80)[0]
    print(
        json.dumps(
            {
                "typed": typed(),
                "derived": derived(),
                "spilling": planted(_tiles.Tile(256, 256, 4, 3, "")),
                "large": planted(_tiles.Tile(128, 128, 8, 8, "")),
                "no_dot": verdict(plain),
                "broken": verdict(broken),
                "nameless": verdict(recorded(nameless_kernel, 80, meta(64), BLOCK=64).variant),
                "shipped": rules.failures(shipped[0].variant, code),
                "blocks": code.blocks(aot.ARCHITECTURES[80]),
                "registers": code.registers,
                "narrow": rules.failures(shipped[0].variant, narrow),
                "synchronous": rules.failures(
                    shipped[0].variant,
                    dataclasses.replace(code, loop={**unpipelined, "LDG.E.128": 8}),
                ),
                "older": rules.failures(
                    dataclasses.replace(
                        shipped[0].variant,
                        capability=90,
                        constants={
                            **shipped[0].variant.constants,
                            (list(shipped[0].variant.signature).index("BLOCK_M"),): 64,
                        },
                    ),
                    code,
                ),
                "calls_of_one": [len(one), len(one[0].calls)],
                "rows": triton_gates.rows(),
                "configurations": [tile.name for tile in _tiles.TILES],
                "sampled": sorted(
                    {
                        (call.op, call.tile)
                        for call in cases.calls()
                        if call.sample and call.op in cases.CONVOLUTIONS
                        if call.tile and call.type == "bf16"
                    }
                ),
                "training": training(),
                "reasons": [gate.reason for gate in rules.GATES],
            }
        )
    )


if __name__ == "__main__":
    main()
