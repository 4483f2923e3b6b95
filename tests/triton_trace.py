"""Watches Triton's interpreter: which elements of which argument a kernel loads and stores.

Also runs single programs of a launch, for tensors too large to go through whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resnet_fused.triton import _limits

PROOF = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
"""Whether everything runs (`make proof`), not only the sample that CI has time for."""

needs_interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        not _limits.interpreted(), reason="needs TRITON_INTERPRET=1: make interpreter"
    ),
]
"""For `pytestmark`: Triton decides how kernels run when it first sees them, once a process."""


def _modules(fn: Any) -> frozenset[int]:
    """Which of Triton's modules a function's names lead to: those that calling it patches."""
    from triton.runtime import interpreter

    known = (interpreter.tl, interpreter.tl.core)
    return frozenset(id(v) for v in fn.__globals__.values() if any(v is m for m in known))


def _hasten() -> None:
    """Leaves out work of the interpreter that has no effect: more than half of its time.

    It checks each addition and product of 32-bit indices for overflow, and drops the finding where
    `debug` is off; and each call of a jitted function within a kernel patches triton.language
    anew, though the kernel's launch has.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch_modules, patched = interpreter._patch_lang, set()

    def begin(fn: Any) -> Any:
        patched.clear()
        patched.add(_modules(fn))
        return patch_modules(fn)

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if _modules(function.fn) not in patched:
            patched.add(_modules(function.fn))
            patch_modules(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter._patch_lang = begin
    interpreter.InterpretedFunction.__call__ = call


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32 numbers, the product exact and the sum rounded: a GPU's multiply-add."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


def _fuse() -> None:
    """Has tl.math.fma round once, as on a GPU: older interpreters round the product as well.

    The sign of scale * y + shift, and with it ReLU's mask, is then right bit for bit.
    """
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    original = builder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not x.data.dtype == y.data.dtype == z.data.dtype == np.float32:
            return original(self, x, y, z)
        return interpreter.TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

    builder.create_fma = create_fma


def _convert_e4m3() -> None:
    """Has e4m3 be converted as on a GPU: the interpreter rounds ties away, loses carries, NaN."""
    from triton.runtime import interpreter

    original, e4m3 = interpreter._convert_float, interpreter.tl.float8e4nv
    wide = {interpreter.tl.float32: np.float32, interpreter.tl.float16: np.float16}

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == e4m3 and target in wide:
            stored = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float8_e4m3fn)
            return stored.float().numpy().astype(wide[target])
        if source == interpreter.tl.float32 and target == e4m3:
            # satfinite: beyond 448 comes 448; NaN stays.
            found = torch.from_numpy(np.ascontiguousarray(data)).clamp(-448, 448)
            return found.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = convert


if _limits.interpreted():
    _hasten()
    _fuse()
    _convert_e4m3()


class Access:
    """What happened to one tensor during one launch.

    Attributes:
        loads: how often each element of its storage was loaded, int64.
        stores: likewise stored.
        itemsize: bytes of an element.
    """

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.itemsize = tensor.element_size()
        self.start = storage.data_ptr()
        self.stop = self.start + storage.nbytes()
        self.loads = np.zeros(storage.nbytes() // self.itemsize, np.int64)
        self.stores = np.zeros_like(self.loads)

    @property
    def loaded(self) -> int:
        """Bytes asked for, by active lanes."""
        return int(self.loads.sum()) * self.itemsize

    @property
    def stored(self) -> int:
        """Bytes written, by active lanes."""
        return int(self.stores.sum()) * self.itemsize

    @property
    def unique(self) -> int:
        """Bytes loaded or stored at least once."""
        return int(((self.loads > 0) | (self.stores > 0)).sum()) * self.itemsize


@dataclasses.dataclass
class Launch:
    """One kernel's launch: its name, an `Access` for each pointer argument, the other arguments.

    Arguments in one storage share their `Access`.
    """

    name: str
    accesses: dict[str, Access]
    values: dict[str, Any]

    def __getitem__(self, argument: str) -> Access:
        return self.accesses[argument]

    @property
    def distinct(self) -> list[Access]:
        """Each storage once."""
        return list({id(a): a for a in self.accesses.values()}.values())

    def note(self, addresses: np.ndarray, mask: np.ndarray, store: bool) -> None:
        active = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))
        active = active[np.broadcast_to(mask, active.shape)].astype(np.int64)
        if not active.size:
            return
        low, high = int(active.min()), int(active.max())
        for access in self.distinct:
            if access.start <= low and high < access.stop:
                offset = (active - low) // access.itemsize
                first = (low - access.start) // access.itemsize
                counts = np.bincount(offset)
                (access.stores if store else access.loads)[first : first + len(counts)] += counts
                return
        kind = "store" if store else "load"
        raise AssertionError(f"{self.name}: a {kind} at {low:#x}..{high:#x} is in no argument")


def issued_bytes(launches: Sequence[Launch]) -> int:
    """Of active lanes, loads and stores."""
    return sum(a.loaded + a.stored for launch in launches for a in launch.distinct)


def unique_bytes(launches: Sequence[Launch]) -> int:
    """Of the call's tensors: each byte once, however many kernels touch it."""
    touched: dict[int, int] = {}
    for launch in launches:
        for name, access in launch.accesses.items():
            if name != "partial" and access.unique:
                touched[access.start] = max(touched.get(access.start, 0), access.unique)
    return sum(touched.values())


def _patched(patch: pytest.MonkeyPatch, owner: object, name: str, wrap: Callable[..., Any]) -> None:
    """Replaces a function by wrap(original, *its arguments)."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: wrap(original, *args, **kwargs))


@contextlib.contextmanager
def watch() -> Iterator[list[Launch]]:
    """Yields the list to which every launch within the block is added.

    A lane that is active outside all arguments fails the test, whatever lies there.
    """
    from triton.runtime import interpreter

    launches: list[Launch] = []

    def begin(original, executor, args_dev, kwargs):
        args, kwargs = original(executor, args_dev, kwargs)
        values = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        tensors = {n: values.pop(n) for n, v in [*values.items()] if isinstance(v, Tensor)}
        by_storage: dict[int, Access] = {}
        for value in tensors.values():
            by_storage.setdefault(value.untyped_storage().data_ptr(), Access(value))
        accesses = {n: by_storage[t.untyped_storage().data_ptr()] for n, t in tensors.items()}
        launches.append(Launch(executor.fn.__name__, accesses, values))
        return args, kwargs

    def load(original, ptrs, mask, *rest, **options):
        launches[-1].note(ptrs.data, mask.data, store=False)
        return original(ptrs, mask, *rest, **options)

    def store(original, ptrs, value, mask, *rest, **options):
        launches[-1].note(ptrs.data, mask.data, store=True)
        return original(ptrs, value, mask, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        executor = interpreter.GridExecutor
        begin_original = executor._init_args_hst
        patch.setattr(
            executor, "_init_args_hst", lambda self, *args: begin(begin_original, self, *args)
        )
        # Loads and stores without a mask go through these two as well, with one that is all true.
        _patched(patch, interpreter.interpreter_builder, "create_masked_load", load)
        _patched(patch, interpreter.interpreter_builder, "create_masked_store", store)
        yield launches


class Programs:
    """Stands in for a kernel: runs a few programs of its grid, and copies no storage.

    Args:
        kernel: an interpreted kernel.
        pick: from the grid to the programs that run, as (x, y, z).
        change: what to do to the arguments (by name) before, to plant a fault.
    """

    def __init__(
        self,
        kernel: Any,
        pick: Callable[[tuple[int, ...]], Sequence[tuple[int, int, int]]],
        change: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.kernel, self.pick, self.change = kernel, pick, change

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._run(grid, args, kwargs)

    def _run(self, grid: tuple[int, ...], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        from triton.runtime import interpreter

        fn = self.kernel.rewrite()
        names = inspect.getfullargspec(fn).args
        kwargs = {name: value for name, value in kwargs.items() if name in names}
        bound = inspect.getcallargs(fn, *args, **kwargs)
        if self.change is not None:
            self.change(bound)
        executor = interpreter.GridExecutor(fn, self.kernel.arg_names, grid)
        scope = interpreter._patch_lang(fn)
        try:
            values = {
                name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
                for name, value in bound.items()
            }
            builder = interpreter.interpreter_builder
            builder.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
            for program in self.pick(grid):
                builder.set_grid_idx(*program)
                fn(**values)
        finally:
            scope.restore()


def every_program(grid: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """All of a grid, for `Programs`."""
    full = (*grid, *(1,) * (3 - len(grid)))
    return [tuple(int(i) for i in index) for index in np.ndindex(*full)]


def last_program(grid: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """The last one of a grid, for `Programs`."""
    x, y, z = (*grid, *(1,) * (3 - len(grid)))
    return [(x - 1, y - 1, z - 1)]
