"""`resnet-fused info`: what is installed, what was built, and what would run where."""

from __future__ import annotations

import os
from typing import Any

import click

from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._options import check_environment, json_option
from resnet_fused.cli._output import echo_json


@click.command()
@json_option
def info(as_json: bool) -> None:
    """Versions, the machine, the extension, and which implementation serves which op."""
    about = collect()
    if as_json:
        echo_json(about)
        return
    for section, lines in _sections(about):
        click.echo(click.style(section, bold=True))
        for line in lines:
            click.echo(f"  {line}")


def collect() -> dict[str, Any]:
    """Everything that `info` says, as JSON holds it."""
    import torch

    from resnet_fused import _extension, _selfcheck, admission, backends
    from resnet_fused.bench import record

    requested, source = check_environment()
    with user_errors():
        _selfcheck.time_limit()  # it may be set to no number
    with admission.without_checks("`resnet-fused info` starts no self-check"):
        ops, admitted = _ops(), _admission()
    try:
        build = _extension.build_info()
    except ValueError as error:
        raise UserError(f"the extension's build_info is no JSON: {error}") from error
    return {
        "versions": record.versions(),
        "cuda": torch.version.cuda,
        "machine": record.machine(),
        "extension": {
            "built": _extension.available(), "why_not": _extension.why_not(), "build": build,
        },
        "backend": {
            "requested": requested,
            "source": source,
            "accepted": list(backends.BACKENDS),
            "environment": {backends.ENVIRONMENT: os.environ.get(backends.ENVIRONMENT)},
        },
        "ops": ops,
        "admission": admitted,
        "commit": record.commit(),
    }  # fmt: skip


def _ops() -> list[dict[str, Any]]:
    """For each op and kind of call: the implementation, why, and what was refused."""
    import torch

    import resnet_fused.ops  # noqa: F401 - importing it enters the implementations
    from resnet_fused import backends

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    names = dict.fromkeys(entry.op for entry in backends.implementations())
    rows = []
    for op in names:
        wide = (torch.float32, torch.bfloat16, torch.float16)
        for device in devices:
            for dtype in (torch.float8_e4m3fn,) if op.endswith("_fp8") else wide:
                call = backends.Call(op, device, dtype)
                try:
                    choice = backends.choose(call)
                except RuntimeError as error:
                    chosen, why, refused = None, str(error), []
                else:
                    chosen, why = choice.implementation.name, choice.why
                    refused = [list(pair) for pair in choice.refused]
                rows.append(
                    {
                        "op": op, "device": device, "dtype": str(dtype).removeprefix("torch."),
                        "implementation": chosen, "why": why, "refused": refused,
                    }
                )  # fmt: skip
    return rows


def _admission() -> dict[str, Any]:
    """Where verdicts are kept, and for each kernel and GPU whether it is admitted, or why not."""
    import torch

    from resnet_fused import admission

    rows = []
    for kernel in admission.kernels():
        for index in range(max(1, torch.cuda.device_count())):
            reason = admission.platform_refusal(kernel.implementation, index)
            row: dict[str, Any] = {
                "op": kernel.op, "implementation": kernel.implementation, "gpu": index,
                "admitted": False, "why": reason, "source": "platform",
                "configurations": [], "refused": [],
            }  # fmt: skip
            if reason is None:
                found = admission.verdict(kernel.op, kernel.implementation, index)
                row |= {
                    "admitted": found.reason is None, "why": found.reason, "source": found.source,
                    "configurations": sorted(found.configurations),
                    "refused": [list(pair) for pair in found.refused],
                }  # fmt: skip
            rows.append(row)
    path = admission.cache_path()
    return {"cache": None if path is None else str(path), "kernels": rows}


def _admission_lines(about: dict[str, Any]) -> list[str]:
    lines = [f"cache {about['cache'] or 'none: no home folder'}"]
    reasons = {row["why"] for row in about["kernels"]}
    if len(reasons) == 1 < len(about["kernels"]) and reasons != {None}:
        return [*lines, f"none of {len(about['kernels'])} kernels: {reasons.pop()}"]
    for row in about["kernels"]:
        state = row["why"]
        if row["admitted"]:
            state = f"admitted ({row['source']}): {len(row['configurations'])} configurations"
        lines.append(f"{row['op']:22} {row['implementation']:9} GPU {row['gpu']}  {state}")
        if row["admitted"]:
            lines += [f"    not {name}: {why}" for name, why in row["refused"]]
    return lines


def _sections(about: dict[str, Any]) -> list[tuple[str, list[str]]]:
    machine, extension, backend = about["machine"], about["extension"], about["backend"]
    gpus = [
        f"GPU: {g['name']}, compute capability {g['capability']}, {g['memory_gib']} GiB"
        for g in machine["gpus"]
    ]
    if extension["built"]:
        build = extension["build"]
        cuda = f"with CUDA kernels for {', '.join(build.get('archs', []))}"
        built = [
            f"built, {cuda if build.get('cuda') else 'without CUDA kernels'}",
            f"compiler {build.get('compiler')}, nvcc {build.get('nvcc')}, "
            f"torch {build.get('torch_target')} and later",
        ]
    else:
        built = [f"not in use: {extension['why_not']}"]
    ops = []
    for row in about["ops"]:
        refused = "; ".join(f"not {name}: {why}" for name, why in row["refused"])
        chosen = row["implementation"] or "none"
        ops.append(
            f"{row['op']:22} {row['device']:5} {row['dtype']:13} {chosen:10} "
            f"{row['why']}{f' ({refused})' if refused else ''}"
        )
    variable, value = next(iter(backend["environment"].items()))
    return [
        ("versions", [f"{k} {v or 'not installed'}" for k, v in about["versions"].items()]
         + [f"CUDA of torch: {about['cuda'] or 'none'}", f"commit {about['commit'] or 'unknown'}"]),
        ("machine", [
            f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}, "
            f"{machine['threads']} threads, {machine['memory_gib']} GiB, {machine['system']}",
            *(gpus or ["no GPU that torch sees"]),
        ]),
        ("extension resnet_fused._C", built),
        ("backend", [
            f"{backend['requested']} (asked for by: {backend['source']})",
            f"{variable}={value or ''} (accepted: {', '.join(backend['accepted'])})",
        ]),
        ("implementations", ops),
        ("admission of GPU kernels", _admission_lines(about["admission"])),
    ]  # fmt: skip
