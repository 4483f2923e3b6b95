"""Bytes that a training step's forward and backward move through a GPU's memory, by the profiler.

    python benchmarks/traffic.py --model resnet50 --batch 256        # needs ncu and its permission
    python benchmarks/traffic.py --output traffic.json

Eager (channels_last, autocast) and fused take one step each under Nsight Compute, which counts each
kernel's reads and writes of memory. Caches are left as the kernel ahead has left them and clocks as
they are. Kernels run one after the other so: programmatic launches do not overlap, sizes stay. What
the roofline predicts is benchmarks/predict_cuda_training.py's. The extension is the one in place,
or of a wheel in build/wheel. Exit code 1: fused moves more than --at-most times eager's bytes; 2:
nothing could be measured, or no kernel of this package served a layer.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
VARIANTS = ("eager", "fused")
WARM_UP = 3
"""Steps ahead: compilers, cuDNN's search, self-checks of kernels."""
LIMIT_S = 1800.0
SERVED = "layers served by: "
OPTIONS = (
    "--profile-from-start", "off", "--cache-control", "none", "--clock-control", "none", "--csv",
    "--print-units", "base", "--metrics", ",".join(METRICS),
)  # fmt: skip


def parse(text: str) -> dict[str, Any]:
    """What Nsight Compute printed, its program's own lines among it.

    Args:
        text: of `--csv --metrics`, a line a kernel and metric.

    Returns:
        "kernels", "read" and "written" bytes, and "names": kernel -> [how many, bytes].

    Raises:
        ValueError: there is no table, or one in other units than bytes.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    if not rows or not {"ID", "Kernel Name", "Metric Name", "Metric Value"} <= rows[0].keys():
        raise ValueError("it printed no table of metrics")
    sums, names, kernels = dict.fromkeys(METRICS, 0.0), {}, set()
    for row in rows:
        if row["Metric Name"] not in sums:
            continue
        if row.get("Metric Unit", "byte") != "byte":
            raise ValueError(f"{row['Metric Name']} is in {row['Metric Unit']}, not in byte")
        value = float(row["Metric Value"].replace(",", ""))
        sums[row["Metric Name"]] += value
        one = names.setdefault(row["Kernel Name"], [0, 0.0])
        one[0] += row["ID"] not in kernels
        one[1] += value
        kernels.add(row["ID"])
    if not kernels:
        raise ValueError(f"its table holds none of {', '.join(METRICS)}")
    read, written = (sums[metric] for metric in METRICS)
    return {"kernels": len(kernels), "read": read, "written": written, "names": names}


def step(variant: str, model: str, batch: int, size: int, beside: Path) -> None:
    """Takes a few steps and marks the last one's forward and backward for the profiler."""
    import torch

    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from gpu import extension

    import resnet_fused as rf

    folder, _ = extension.locate(ROOT, beside)
    if folder is not None:
        rf.__path__.append(folder)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    made = rf.unfuse(rf.models.get_model(model)).cuda().to(memory_format=torch.channels_last)
    net = (rf.fuse(made) if variant == "fused" else made).train()
    x = torch.randn(batch, 3, size, size, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        print(SERVED + json.dumps(rf.explain(net, x).counts()), flush=True)
    for number in range(WARM_UP + 1):
        net.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if number == WARM_UP:
            torch.cuda.profiler.start()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def measure(ncu: str, variant: str, model: str, batch: int, size: int) -> dict[str, Any]:
    """One variant's bytes.

    Raises:
        ValueError: the profiler ended with an error, or printed nothing that can be read.
    """
    program = [sys.executable, str(Path(__file__).resolve()), "--step", variant]
    words = ["--model", model, "--batch", str(batch), "--size", str(size)]
    with tempfile.TemporaryDirectory() as beside:
        ran = subprocess.run(
            [ncu, *OPTIONS, *program, *words, "--beside", beside], capture_output=True, text=True,
            timeout=LIMIT_S, check=False,
        )  # fmt: skip
    if ran.returncode != 0:
        said = " ".join((ran.stdout + ran.stderr).split())[-400:]
        raise ValueError(f"{variant}: exit code {ran.returncode}: {said}")
    served = [line for line in ran.stdout.splitlines() if line.startswith(SERVED)]
    counts = json.loads(served[-1].removeprefix(SERVED)) if served else {}
    if variant == "fused" and not counts.keys() & {"cuda", "triton"}:
        raise ValueError(
            f"fused: no kernel of resnet_fused served a layer ({counts}): `resnet-fused explain "
            f"rf:{model} --mode training --device cuda --dtype bfloat16` says why"
        )
    return {**parse(ran.stdout), "served": counts}


def report(found: dict[str, dict[str, Any]], batch: int) -> Iterable[str]:
    """The table's lines, and the kernels of ours that move most."""
    yield "| | kernels | MB an image read | written | together |"
    yield "| --- | --- | --- | --- | --- |"
    for variant, one in found.items():
        read, written = (1e-6 * one[name] / batch for name in ("read", "written"))
        sizes = f"{read:.1f} | {written:.1f} | {read + written:.1f}"
        yield f"| {variant} | {one['kernels']} | {sizes} |"
    served = ", ".join(f"{count} by {name}" for name, count in found["fused"]["served"].items())
    yield f"\nconvolutions of the fused one: {served}\n"
    names = found["fused"]["names"]
    for name in sorted(names, key=lambda name: -names[name][1])[:10]:
        count, moved = names[name]
        yield f"{1e-6 * moved / batch:8.1f} MB an image in {count:3d} of {name[:90]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures both; see the file's head."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="of resnet_fused.models")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--at-most", type=float, default=0.5, help="of eager's bytes")
    parser.add_argument("--ncu", default="ncu", help="Nsight Compute's program")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--step", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--beside", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.step:
        step(chosen.step, chosen.model, chosen.batch, chosen.size, chosen.beside)
        return 0
    ncu = shutil.which(chosen.ncu)
    if ncu is None:
        print(f"error: --ncu: {chosen.ncu!r} is not found", file=sys.stderr)
        return 2
    try:
        found = {
            variant: measure(ncu, variant, chosen.model, chosen.batch, chosen.size)
            for variant in VARIANTS
        }
    except (ValueError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    eager, fused = (found[name]["read"] + found[name]["written"] for name in VARIANTS)
    ratio = fused / eager
    print("\n".join(report(found, chosen.batch)))
    print(f"\nfused moves {ratio:.3f} of eager's bytes; asked for is {chosen.at_most} at most")
    if chosen.output:
        about = {"model": chosen.model, "batch": chosen.batch, "size": chosen.size, "ratio": ratio}
        chosen.output.write_text(json.dumps({**about, "variants": found}, indent=1) + "\n")
    return 0 if ratio <= chosen.at_most else 1


if __name__ == "__main__":
    sys.exit(main())
