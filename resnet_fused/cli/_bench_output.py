"""What `resnet-fused bench` shows and writes of a record, and of two records compared."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resnet_fused.cli._errors import OPTIONAL, UserError
from resnet_fused.cli._output import check_folder, plain, to_json, write_file

if TYPE_CHECKING:
    from resnet_fused.bench.compare import Change, Comparison, Estimate, Gate

PICTURES = ("roofline", "waterfall", "peers", "memory")
WIDTH = 160  # of a table that goes into a file or a pipe
Row = Mapping[str, Any]


def check_targets(files: Mapping[str, Path | None], folders: Mapping[str, Path | None]) -> None:
    """Fails before the work is done if its results could not be made or written.

    Args:
        files: option -> the file it names, if any.
        folders: option -> the folder it names, if any.

    Raises:
        UserError: a file that is a folder, a folder that cannot be made or written, two options
            with one file, or what draws pictures is not installed.
    """
    given = {option: file for option, file in files.items() if file is not None}
    for option, file in given.items():
        if file.is_dir():
            raise UserError(f"{option}: '{file}' is a folder; give a file")
        twins = [o for o, other in given.items() if other.absolute() == file.absolute()]
        if len(twins) > 1:
            raise UserError(f"{' and '.join(twins)}: both name '{file}'; give two files")
        _check_folder(option, file.parent)
    for option, folder in folders.items():
        if folder is not None:
            _check_folder(option, folder)
    for option in ("--html", "--png-dir"):
        if given.get(option) or folders.get(option):
            for module in ("matplotlib", *(["jinja2"] if option == "--html" else [])):
                if importlib.util.find_spec(module) is None:
                    raise UserError(
                        f"{option}: this needs {OPTIONAL[module]}, which is not installed; "
                        f"run `pip install {OPTIONAL[module]}`"
                    )


def _check_folder(option: str, folder: Path) -> None:
    try:
        check_folder(folder)
    except UserError as error:
        raise UserError(error.message.replace("--output:", f"{option}:", 1)) from error


def write_outputs(
    record: dict[str, Any], output: Path | None, html: Path | None, png_dir: Path | None
) -> list[str]:
    """Writes what was asked for; the record first, since it alone cannot be made again.

    Returns:
        A sentence for each file, and for each picture that the record has nothing for.
    """
    said, content = [], plain(record)
    if output is not None:
        write_file(output, to_json(content) + "\n")
        said.append(f"record: {output}")
    if html is not None:
        from resnet_fused.report import bench_page

        write_file(html, bench_page.render(content))
        said.append(f"page: {html}")
    if png_dir is not None:
        from resnet_fused.report import plots

        for name in PICTURES:
            try:
                picture = getattr(plots, name)(content)
            except plots.NothingToDrawError as error:
                said.append(f"no {name} picture: {error}")
                continue
            write_file(png_dir / f"{name}.png", picture)
            said.append(f"picture: {png_dir / f'{name}.png'}")
    return said


def say_machine(record: Row) -> None:
    """Prints where and with what a record was taken."""
    machine, versions = record["machine"], record["versions"]
    click.echo(
        f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine.get('cpu_capability')}, {machine.get('memory_gib')} GiB"
    )
    for gpu in machine.get("gpus") or []:
        click.echo(
            f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
            f"driver {machine.get('driver') or 'unknown'}"
        )
    named = (f"{name} {version}" for name, version in versions.items() if version)
    click.echo(f"versions: {', '.join(named)}; commit {record.get('commit') or 'unknown'}")
    for dtype, rates in (record.get("ceilings") or {}).items():
        click.echo(
            f"ceilings, {dtype}: {rates['flops'] / 1e9:,.0f} GFLOP/s, "
            f"{rates['bandwidth'] / 1e9:,.1f} GB/s, measured in this run"
        )


def say_rows(record: Row) -> None:
    """Prints a table for each row, its verdicts, and who was left out."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for row in record["rows"]:
        console.print()
        console.print(_row_table(row), highlight=False)
        if (steps := _steps_table(row)) is not None:
            console.print(steps, highlight=False)
        limit = row["limit"]
        click.echo(
            f"  predicted by the roofline: at least {_least_ms(limit['eager_seconds'])} eager, "
            f"{_least_ms(limit['seconds'])} fused, {limit['eager_seconds'] / limit['seconds']:.2f}x"
        )
        for sentence in row.get("verdicts") or ():
            click.echo(f"  {sentence}")
        for name, variant in row["variants"].items():
            if "wrong" in variant:
                click.echo(f"  {name} is WRONG and has no time: {variant['wrong']}")
        for why, names in _by_reason(row.get("omitted") or {}).items():
            click.echo(f"  without {', '.join(names)}: {why}")
        for name, variant in row["variants"].items():
            if kernels := _kernels(variant):
                click.echo(f"  {name} ran {kernels}")
            if variant.get("note"):
                click.echo(f"  {name}: {variant['note']}")
    for key, why in (record.get("failed") or {}).items():
        click.echo(f"\nnot measured: {key}: {why}")
    if "stopped" in record:
        click.echo(f"\nSTOPPED: {record['stopped']}")
    if not record.get("complete", True):
        click.echo(f"\nnot complete: {record['reached']} of {record['of']} rows were reached")


def _least_ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def _by_reason(omitted: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, why in omitted.items():
        found.setdefault(why, []).append(name)
    return found


def _kernels(variant: Row, most: int = 3) -> str:
    names = list(dict.fromkeys(variant.get("kernels") or ()))
    short = [name if len(name) <= 60 else f"{name[:57]}..." for name in names[:most]]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(short) + rest


def _row_table(row: Row) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    noise, load = row.get("noise"), row.get("load") or {}
    title = row["key"]
    if noise is not None:
        title += f", noise {noise:.1%}"
    if load.get("foreign") is not None:
        title += f", others used {load['foreign']:.1%} of the cores"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("variant")
    rate, unit = ("TFLOP/s", 1) if row["subject"]["device"] == "cuda" else ("GFLOP/s", 1e3)
    columns = ("ms", "spread", "images/s", rate, "GB/s", "of limit", "over eager", "peak MB")
    for name in (*columns, "prepared"):
        table.add_column(name, justify="right", no_wrap=True)
    gains = {r["variant"]: r for r in row.get("ratios") or () if r["baseline"] == "eager"}
    for name, variant in row["variants"].items():
        table.add_row(Text(name), *_cells(variant, gains.get(name), unit))
    limit = (row.get("limit") or {}).get("seconds")
    if limit:
        table.add_row("(limit)", _number(limit * 1e3, ",.3f"), style="dim")
    return table


def _steps_table(row: Row) -> Any:
    """What a training step's time went into, beside the least by the roofline; None for others."""
    measured = {
        name: variant["op_s"] for name, variant in row["variants"].items() if variant.get("op_s")
    }
    if not measured:
        return None
    from rich import box
    from rich.table import Table
    from rich.text import Text

    least = row["limit"].get("ops") or {}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("ms of a step, by kind of kernel")
    for name in (*measured, "(limit)"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    names = dict.fromkeys(name for own in (*measured.values(), least) for name in own)
    for name in names:
        own = (times.get(name) for times in (*measured.values(), least))
        table.add_row(name, *(_number(_times(time, 1e3), ",.3f") for time in own))
    return table


def _cells(variant: Row, gain: Row | None, unit: float) -> Iterable[str]:
    if "wrong" in variant:
        return ("WRONG",)
    memory = variant.get("peak_memory_bytes")
    over = f"{gain['median']:.2f}x ({gain['low']:.2f} .. {gain['high']:.2f})" if gain else ""
    return (
        _number(_times(variant.get("median_s"), 1e3), ",.3f"),
        _number(variant.get("spread"), ".1%"),
        _number(variant.get("images_per_s"), ",.1f"),
        _number(_times(variant.get("tflops"), unit), ",.1f"),
        _number(variant.get("gbs"), ",.1f"),
        _number(variant.get("of_limit"), ".0%"),
        over,
        _number(_times(memory, 1e-6), ",.0f"),
        _number(variant.get("prepare_s"), ",.1f s") if variant.get("prepare_s") is not None else "",
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(value: float | None, form: str) -> str:
    if value is None:
        return ""
    body, space, unit = form.partition(" ")
    return f"{value:{body}}{space}{unit}"


def faults_of_ours(record: Row, ours: Sequence[str]) -> list[str]:
    """The variants of ours that a record says are wrong or crashed: "WRONG: key: name"."""
    found = []
    for row in record["rows"]:
        wrong = [name for name, variant in row["variants"].items() if "wrong" in variant]
        for word, names in (("WRONG", wrong), ("CRASHED", row.get("crashed") or ())):
            mine = (name for name in names if name.startswith(tuple(ours)))
            found += [f"{word}: {row['key']}: {name}" for name in mine]
    return found


def say_comparison(found: Comparison, gate: Gate | None, names: tuple[Path, Path]) -> None:
    """Prints two records side by side."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for which, name, about in zip("AB", names, (found.a, found.b), strict=True):
        place = ", ".join([str(about["cpu"]), *(str(gpu) for gpu in about["gpus"])])
        click.echo(
            f"{which}: {os.fspath(name)}, {about['date']}, commit {about['commit'] or 'unknown'}, "
            f"{place}, {about['rows']} rows"
        )
    for note in found.notes:
        click.echo(f"  {note}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("row and variant", overflow="fold")
    for name in ("A ms", "B ms", "A / B", "beside eager", "noise"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("B is", overflow="fold")
    key = None
    for change in found.changes:
        if change.key != key:
            key = change.key
            table.add_row(Text(key, style="bold"))
        table.add_row(*(Text(cell) for cell in _change_cells(change)), style=_style(change))
    console.print(table, highlight=False)
    for which, keys in (("A", found.only_a), ("B", found.only_b)):
        for key in keys:
            click.echo(f"only in {which}: {key}")
    if gate is not None:
        _say_gate(gate)


def _change_cells(change: Change) -> tuple[str, ...]:
    return (
        f"  {change.variant}",
        _number(_times(change.a_s, 1e3), ",.3f"),
        _number(_times(change.b_s, 1e3), ",.3f"),
        _interval(change.ratio),
        _interval(change.beside_eager),
        _number(change.noise, ".1%"),
        change.text,
    )


def _interval(found: Estimate | None) -> str:
    return "" if found is None else f"{found.median:.3f} ({found.low:.3f} .. {found.high:.3f})"


def _style(change: Change) -> str:
    from resnet_fused.bench import compare

    colours = {compare.FASTER: "green", compare.SLOWER: "red", compare.WRONG: "bold red"}
    return colours.get(change.verdict, "" if change.verdict == compare.SAME else "dim")


def _say_gate(gate: Gate) -> None:
    for sentence in gate.unjudged:
        click.echo(f"not judged: {sentence}")
    if gate.ok:
        click.echo(
            f"gate: passed, none of our {gate.judged} timed variants is slower by more than "
            f"{gate.limit:.1%} plus the noise"
        )
        return
    click.echo(f"gate: FAILED at {gate.limit:.1%}")
    for sentence in gate.failures:
        click.echo(f"  {sentence}")
