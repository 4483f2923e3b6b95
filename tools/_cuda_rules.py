"""What the CUDA kernels' machine code is held to: registers, occupancy, the instructions meant."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

import _cuda_bn_rules
import _cuda_ceilings
import _cuda_fp8_rules
import _cuda_head_rules
import _cuda_stream_rules
import _cuda_tf32_rules
from _cuda_block_end import block_end_name, by_block_end
from _cuda_chain_rules import chain_by_tma, chain_tma_tile_of, is_e4m3_chain
from _cuda_cluster import by_cluster, cluster_of, sharing
from _cuda_dgrad_rules import dgrad_by_tma, dgrad_by_window, dgrad_of, dgrad_window_of
from _cuda_early import TRIGGER, WAIT, Early, rule_of
from _cuda_grad1x1_rules import grad1x1_by_tma, grad1x1_merging, grad1x1_tile_of
from _cuda_network import MEETS, at_least, by_network_clusters, network_of
from _cuda_resident import FULL_OCCUPANCY, REGISTERS, RESERVED_SHARED, SHARED, most_registers
from _cuda_stationary import by_stationary, stationary_name
from _cuda_stats_rules import (
    BLOCK_END,
    MEASURED_BY_TMA,
    TRANSFORMED,
    TRANSFORMED_BY_TMA,
    ending,
    grad1x1_name,
    measuring,
    measuring_by_rows,
    merged_gradients,
    summing,
    windows,
)
from _cuda_stem_rules import stem_by_mma, stem_by_wgmma, stem_wgmma_tile_of, writes_e4m3
from _cuda_wgrad_rules import (
    along_bytes,
    along_of,
    by_image_rows,
    by_window_along,
    wgrad_by_tma,
    wgrad_by_window,
    wgrad_name,
)
from _cuda_window import by_window, chain_by_stream, chain_by_window, chain_name, window_name

STEP_BYTES = 64  # of a row of the reduction in one stage: two matrix instructions deep
CHAIN_STEP = 32  # channels of out that conv_chain makes at a time


@dataclass
class Kernel:
    """One kernel's machine code on one architecture."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    early: Early | None = None  # where the architecture lets kernels begin early

    def count(self, pattern: str) -> int:
        """How many instructions match the pattern."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    def wide(self, opcode: str) -> int:
        """How many 128-bit instructions of that kind there are."""
        return self.count(rf"{opcode}\b.*\.128\b.*")

    def failures(self) -> list[str]:
        """The gates that it does not pass, as sentences."""
        rule = next((rule for name, rule in RULES.items() if name in self.name), None)
        if rule is None:
            return ["no rule in tools/_cuda_rules.py names this kernel"]
        checks = {
            f"{self.stack} bytes of stack": self.stack == 0,
            f"{self.local} bytes of local memory": self.local == 0,
            f"{self.count('(LDL|STL).*')} LDL or STL": self.count("(LDL|STL).*") == 0,
            **rule(self),
            **self._early(),
        }
        return [sentence for sentence, passed in checks.items() if not passed]

    def _early(self) -> dict[str, bool]:
        rule = rule_of(self.name)
        if rule is not None and self.early is not None:
            return self.early.checks(rule)
        found = self.count(f"{WAIT}.*|{TRIGGER}.*")
        return {f"{found} instructions for kernels that begin early, expected none": not found}


def _bn_act_vector(kernel: Kernel) -> dict[str, bool]:
    # 256 threads a block: 128 registers leave two blocks an SM. Four vectors of each tensor are in
    # flight; scale and shift come in vectors where a channel is a column: eight floats each, or
    # four, or two doubles.
    channels = 4 if "Float16" in kernel.name else 2
    loads = 4 * (2 if "Lb1E" in kernel.name else 1)
    loads += channels if "AxisE0" in kernel.name else 0
    return {
        f"{kernel.registers} registers, at most 128": kernel.registers <= 128,
        f"{kernel.wide('LDG')} LDG.128, at least {loads}": kernel.wide("LDG") >= loads,
        f"{kernel.wide('STG')} STG.128, at least 4": kernel.wide("STG") >= 4,
    }


def _at_most(registers: int, kernel: Kernel) -> dict[str, bool]:
    return {
        f"{kernel.registers} registers, at most {registers}": kernel.registers <= registers,
    }


@dataclass(frozen=True)
class Tile:
    """A convolution's configuration, as its kernel's name spells it."""

    m: int
    n: int
    warps_m: int
    warps_n: int
    stages: int
    blocks: int
    masked: bool  # a third operand is staged: where the gradient passes
    wide: bool
    window: int = 0  # stages hold filters alone; so many windows of all taps lie beside them

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def shared(self) -> int:
        """Bytes of a block: every stage of every operand, windows of 56 pixels a row.

        A gradient, which has three windows, is put together in float32 where all that lay.
        """
        if self.window == 1:
            return along_bytes(self.m, self.stages)
        if self.window:
            totals = self.m * self.n * 4 if self.window > 2 else 0
            operands = self.stages * self.n + windows(self.m, self.window)
            return max(operands * STEP_BYTES, totals)
        rows = self.m + self.n + (self.m if self.masked else 0)
        return self.stages * rows * STEP_BYTES

    def registers(self, arch: str) -> int:
        """Of a thread, at most, for the blocks that are to share a multiprocessor."""
        return most_registers(self.threads, self.blocks, self.shared, arch)

    @property
    def matrix_instructions(self) -> int:
        """Of a step of the main loop, by one warp: 16 x 8 results each, two deep."""
        return 2 * (self.m // self.warps_m // 16) * (self.n // self.warps_n // 8)


@functools.cache
def tile_of(mangled: str) -> Tile | None:
    """The configuration in a kernel's mangled name, or None."""
    numbers = 6 * r"Li(\d+)E" + r"(?:Li(\d+)E)?E"
    shape = re.search(r"(MaskedShapeI.*?)?(?:Tile|Halo)ShapeI" + numbers, mangled)
    width = re.search(r"LoadWidthE([01])E", mangled)
    if along := along_of(mangled):
        return Tile(*along, masked=True, wide=True, window=1)
    # Kernels of a block's end read 16 bytes at a time, whatever they are made for. One of clusters
    # has several tiles.
    if network_of(mangled) or shape is None or (width is None and BLOCK_END not in mangled):
        return None
    masked, *sizes, windows_of = shape.groups()
    wide, window = width is None or width.group(1) == "0", int(windows_of or 0)
    return Tile(*map(int, sizes), masked=masked is not None, wide=wide, window=window)


def _convolution(kernel: Kernel) -> dict[str, bool]:
    tile = tile_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    block, multiprocessor = SHARED[kernel.arch]
    fits = tile.shared <= block
    asked = tile.blocks * (tile.shared + RESERVED_SHARED)
    most = tile.registers(kernel.arch)
    products = kernel.count("HMMA.*")
    checks = {
        f"{kernel.registers} registers, at most {most}": kernel.registers <= min(most, 255),
        f"{products} HMMA, at least {tile.matrix_instructions}": (
            products >= tile.matrix_instructions
        ),
        f"{asked} bytes of shared memory for {tile.blocks} blocks, at most {multiprocessor}": (
            asked <= multiprocessor or not fits or kernel.arch not in FULL_OCCUPANCY
        ),
    }
    if tile.wide:
        # Both operands of a wgrad lie across the reduction. ldmatrix turns 16-bit ones round;
        # float ones are loaded as they are.
        load = "LDS" if "wgrad_kernelIf" in kernel.name else "LDSM"
        copies, loads = kernel.wide("LDGSTS"), kernel.count(rf"{load}\b.*")
        checks |= {
            f"{copies} LDGSTS.128, at least 2": copies >= 2,
            f"{loads} {load}, at least 2": loads >= 2,
        }
    return checks


def _network(kernel: Kernel) -> dict[str, bool]:
    return _convolution(kernel) | at_least(kernel, MEETS)


# The kernels for sm_90a: threads of a block, which all have as many registers when it begins, and
# consuming warpgroups (csrc/device/warpgroup_shape.h).
WARPGROUP_THREADS, WARPGROUP_REGISTERS, CONSUMERS = 384, 168, 2
STEP_PRODUCTS = 4  # instructions in a step


@dataclass(frozen=True)
class TmaTile:
    """A configuration for sm_90a, as its kernel's name spells it."""

    pixels_left: bool
    together: bool
    pixels: int
    channels: int
    stages: int
    filter_sharing: int = 1
    pixel_sharing: int = 1
    staged: int = 1  # times what 16 bits take

    @property
    def columns(self) -> int:
        """The products' n: what lies on the right side."""
        return self.channels if self.pixels_left else self.pixels

    @property
    def shared(self) -> int:
        """Bytes of a block: stages, a staging tile for each consumer, vectors, barriers."""
        rows = self.stages * (self.pixels + self.channels) + CONSUMERS * self.columns * self.staged
        vectors = CONSUMERS * 8 * self.channels if self.pixels_left else 0
        return 128 * rows + vectors + 8 * (2 * self.stages + 2 * CONSUMERS)


@functools.cache
def tma_tile_of(mangled: str) -> TmaTile | None:
    """The configuration for sm_90a in a kernel's mangled name, or None."""
    shape = re.search(
        r"WarpgroupShapeILN\w*?OrientationE(\d)ELN\w*?ConsumersE(\d)E" + 5 * r"Li(\d+)E", mangled
    )
    if shape is None:
        return None
    left, turns, *numbers = map(int, shape.groups())
    return TmaTile(left == 0, turns == 0, *numbers, staged=_cuda_tf32_rules.staging(mangled))


def _convolution_by_tma(kernel: Kernel) -> dict[str, bool]:
    tile = tma_tile_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    shares = sharing(tile.filter_sharing, tile.pixel_sharing)
    if _cuda_fp8_rules.out_of(kernel.name) is not None:
        counts = _cuda_fp8_rules.counts(
            kernel.name, pixels_left=tile.pixels_left, columns=tile.columns
        )
        return _by_tma(kernel, tile, _cuda_fp8_rules.product(tile.columns), counts | shares)
    if _cuda_tf32_rules.is_tf32(kernel.name):
        counts = _cuda_tf32_rules.counts(tile.columns) | shares
        return _by_tma(kernel, tile, _cuda_tf32_rules.product(tile.columns), counts)
    stores = tile.channels // 64 if tile.pixels_left else 1
    # Weights twice, before the wait and behind it; pixels by both ways; the shortcut in boxes.
    staged = tile.columns // 16
    counts = {
        "UTMALDG.*": 4 + stores,
        r"UTMALDG\.4D\.IM2COL.*": 1,
        "UTMASTG.*": stores,
        r"STSM\b.*": 2 * staged,  # with and without a shortcut
        r"LDSM\b.*": staged,
    }
    if "conv_bn_stats_" in kernel.name:  # of a shortcut nothing
        counts |= {"UTMALDG.*": 4, r"STSM\b.*": staged, r"LDSM\b.*": 0, **MEASURED_BY_TMA}
    if TRANSFORMED in kernel.name:
        counts |= TRANSFORMED_BY_TMA
    counts |= shares
    return _by_tma(kernel, tile, rf"HGMMA\.64x{tile.columns}x16\.F32.*", counts)


def _by_tma(kernel: Kernel, tile: TmaTile, product: str, counts: dict[str, int]) -> dict[str, bool]:
    """What all types have in common; counts: instructions as patterns, at least so many."""
    counts = {"SYNCS.*TRYWAIT": 4, "USETMAXREG.*": 2} | counts
    products = kernel.count(product)
    unit = product[: product.index("GMMA") + 4]
    return {
        f"{kernel.registers} registers, expected {WARPGROUP_REGISTERS}": (
            kernel.registers == WARPGROUP_REGISTERS
        ),
        f"{tile.shared} bytes of shared memory, at most {SHARED[kernel.arch][0]}": (
            tile.shared <= SHARED[kernel.arch][0]
        ),
        f"{products} {unit} of {tile.columns} columns, expected {STEP_PRODUCTS}": (
            products == STEP_PRODUCTS
        ),
        **{
            f"{kernel.count(pattern)} {pattern}, at least {least}": kernel.count(pattern) >= least
            for pattern, least in counts.items()
        },
    }


def _conv_chain(kernel: Kernel) -> dict[str, bool]:
    # Both operands of its first product and its projection, and the right one of its second
    # product, are loaded from shared memory; the left one of that lies in registers. Both of the
    # convolution in front, of which a row of taps makes a step.
    shape = re.search(r"ChainShapeI" + 6 * r"Li(\d+)E" + "E", kernel.name)
    if shape is None:
        return {"its name spells no configuration": False}
    m, following, warps, stages, blocks, front = map(int, shape.groups())
    tile = Tile(m, CHAIN_STEP, warps, 1, stages, blocks, masked=False, wide=True)
    second = Tile(m, following, warps, 1, stages, blocks, masked=False, wide=True)
    ahead = Tile(m, front, warps, 1, stages, blocks, masked=False, wide=True)
    wanted = 2 * tile.matrix_instructions + second.matrix_instructions
    wanted += 3 * ahead.matrix_instructions
    products, copies = kernel.count("HMMA.*"), kernel.wide("LDGSTS")
    loads, least = kernel.count(r"LDSM\b.*"), 2 * 2 + following // 16 + 3 * front // 16
    rows, most = m // warps // 8, tile.registers(kernel.arch)
    return {
        f"{kernel.registers} registers, at most {most}": kernel.registers <= min(most, 255),
        f"{products} HMMA, at least {wanted}": products >= wanted,
        f"{copies} LDGSTS.128, at least {rows}": copies >= rows,
        f"{loads} LDSM, at least {least}": loads >= least,
        f"{kernel.wide('STG')} STG.128, at least {rows}": kernel.wide("STG") >= rows,
    }


def _shape(kernel: Kernel, name: str) -> tuple[int, ...]:
    """The numbers of a shape in a kernel's mangled name."""
    found = re.search(name + r"I((?:Li\d+E)+)E", kernel.name)
    return tuple(map(int, re.findall(r"Li(\d+)E", found.group(1)))) if found else ()


def _stem_by_wgmma(kernel: Kernel) -> dict[str, bool]:
    return stem_by_wgmma(kernel, WARPGROUP_REGISTERS, SHARED["90a"][0])


def _stem(kernel: Kernel) -> dict[str, bool]:
    return stem_by_mma(kernel, _shape(kernel, "StemShape"), REGISTERS)


# By what the mangled name holds. The strided kernel of bn_act: 64 registers leave four blocks.
RULES = {
    "bn_act_vector_kernel": _bn_act_vector,
    "bn_act_strided_kernel": functools.partial(_at_most, 64),
    "conv_wgrad_merge_kernel": functools.partial(_at_most, 64),
    "conv_bn_grad1x1_merge_kernel": grad1x1_merging,
    "conv_bn_grad1x1_kernel": merged_gradients,
    "conv_bn_grad1x1_end_kernel": functools.partial(merged_gradients, ended=True),
    "conv_bn_grad1x1_tma_kernel": grad1x1_by_tma,
    "conv_bn_grad1x1_end_tma_kernel": grad1x1_by_tma,
    "conv_bn_act_kernel": _convolution,
    "conv_bn_act_tma_kernel": _convolution_by_tma,
    "conv_bn_stats_image_kernel": measuring_by_rows,
    "conv_bn_stats_stationary_kernel": by_stationary,
    "bn_add_act_conv_stats_tma_kernel": by_block_end,
    "conv_bn_stats_tma_kernel": _convolution_by_tma,
    "conv_bn_act_window_kernel": by_window,
    "conv_bn_stats_window_kernel": by_window,
    "conv_bn_act_cluster_kernel": by_cluster,
    "network_kernel": _network,
    "network_cluster_kernel": by_network_clusters,
    "conv_bn_stats_kernel": lambda kernel: _convolution(kernel) | measuring(kernel, tile_of),
    BLOCK_END: lambda kernel: _convolution(kernel) | ending(kernel, tile_of),
    "conv_bn_dgrad_kernel": lambda kernel: _convolution(kernel) | summing(kernel, tile_of),
    "conv_bn_dgrad_end_kernel": lambda k: _convolution(k) | summing(k, tile_of, end=True),
    "conv_dgrad_kernel": _convolution,
    "conv_dgrad_tma_kernel": dgrad_by_tma,
    "conv_bn_dgrad_tma_kernel": dgrad_by_tma,
    "conv_bn_dgrad_end_tma_kernel": dgrad_by_tma,
    "conv_bn_dgrad_window_kernel": dgrad_by_window,
    "conv_wgrad_kernel": _convolution,
    "conv_wgrad_tma_kernel": wgrad_by_tma,
    "conv_bn_wgrad_kernel": lambda kernel: _convolution(kernel) | by_window_along(kernel),
    "conv_bn_wgrad_tma_kernel": wgrad_by_tma,
    "conv_bn_wgrad_image_kernel": lambda kernel: by_image_rows(kernel, Tile),
    "conv_bn_wgrad_window_kernel": wgrad_by_window,
    "conv_chain_kernel": _conv_chain,
    "conv_chain_stream_kernel": chain_by_stream,
    "conv_chain_tma_kernel": chain_by_tma,
    "conv_chain_window_kernel": chain_by_window,
    "stem_kernel": _stem,
    "stem_wgmma_kernel": _stem_by_wgmma,
    "conv_bn_stats_stem_rows_kernel": _stem_by_wgmma,
    **_cuda_head_rules.RULES,
    **_cuda_bn_rules.RULES,
    **_cuda_stream_rules.RULES,
    **_cuda_ceilings.RULES,
}


def short_name(mangled: str) -> str:
    """A readable name of a kernel: bn_act_vector<BFloat16, residual, row>."""
    match = re.search(r"resnet_fused\d+(\w+?)_kernelI?(.*)", mangled)
    if match is None:
        return mangled
    name, rest = match.groups()
    types = {"f": "float", "d": "double"}
    found = re.match(r"(?:NS_\d+(B?Float16)E|([fd]))", rest)
    parts = [(found.group(1) or types[found.group(2)])] if found else []
    parts += ["to E4M3"] if writes_e4m3(mangled) else []
    if out := _cuda_fp8_rules.out_of(mangled):
        parts = [f"E4M3 to {out.removeprefix('Float8')}"]
    parts += ["E4M3"] if is_e4m3_chain(mangled) else []
    tile = tile_of(mangled)
    if tile:
        parts.append(
            f"{'halo ' if tile.window else '' if tile.wide else 'narrow '}{tile.m}x{tile.n} "
            f"{tile.threads // 32} warps {tile.stages} stages"
        )
        parts += ["projected"] if BLOCK_END in mangled and "Lb1E" in rest else []
    elif by_tma := tma_tile_of(mangled):
        parts.append(
            f"{'pixels' if by_tma.pixels_left else 'channels'} left "
            f"{by_tma.pixels}x{by_tma.channels} {by_tma.stages} stages"
            f"{'' if by_tma.together else ' in turns'}"
            f"{' shared filters' if by_tma.filter_sharing > 1 else ''}"
            f"{' shared pixels' if by_tma.pixel_sharing > 1 else ''}"
            f"{' transformed' if TRANSFORMED in mangled else ''}"
        )
    elif dgrad := dgrad_of(mangled):
        parts.append(
            f"128x{dgrad.channels} {dgrad.stages} stages"
            f"{' shared filters' if dgrad.filters > 1 else ''}"
            f"{' shared pixels' if dgrad.pixels > 1 else ''}"
        )
    elif turned := dgrad_window_of(mangled):
        parts.append(f"windows for {turned.pixels} pixels")
    elif by_wgrad := wgrad_name(mangled):
        parts.append(by_wgrad)
    elif network := network_of(mangled):
        parts.append(network.short)
    elif cluster := cluster_of(mangled):
        parts.append(f"{cluster.pixels}x64 {cluster.stages} stages, clusters of {cluster.blocks}")
    elif named := (
        window_name(mangled)
        or _cuda_stream_rules.stream_name(mangled)
        or stationary_name(mangled)
        or block_end_name(mangled)
    ):
        parts.append(named)
    elif by_both := chain_name(mangled):
        parts.append(by_both)
    elif by_chain := chain_tma_tile_of(mangled):
        parts.append(by_chain.short)
    elif chain := re.search(r"ChainShapeI" + 6 * r"Li(\d+)E", rest):
        m, following, warps, stages, _, front = chain.groups()
        behind = f" behind {front}" if front != "0" else ""
        parts.append(f"{m}x{following} {warps} warps {stages} stages{behind}")
    elif by_wgmma := stem_wgmma_tile_of(mangled):
        parts.append(f"{by_wgmma.columns} columns")
    elif name.startswith(("stem", "head")):
        shape = re.search(r"\d(?:Stem|Head)ShapeI((?:Li\d+E)+)E", rest)
        parts += ["x".join(re.findall(r"Li(\d+)E", shape.group(1)))] if shape else []
        parts += ["wide"] if "Lb1E" in rest else []
    elif merged := grad1x1_name(mangled):
        parts.append(merged)
    elif merged_by_tma := grad1x1_tile_of(mangled):
        tile = merged_by_tma
        parts.append(f"{tile.filters}x{tile.channels} {tile.stages} stages")
    elif (by_pass := _cuda_bn_rules.name_of(mangled)) is not None:
        parts += by_pass
    elif measured := _cuda_ceilings.name_of(mangled):
        parts.append(measured)
    elif residual := re.search(r"Lb([01])E(?:.*?AxisE([01]))?", rest):
        parts.append("residual" if residual.group(1) == "1" else "plain")
        parts += {None: [], "1": ["row"], "0": ["column"]}[residual.group(2)]
    return f"{name}<{', '.join(parts)}>" if parts else name
