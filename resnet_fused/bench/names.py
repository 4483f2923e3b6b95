"""Names of kernels' subjects: each says all about its case but the batch, so none is listed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from resnet_fused.cases import BnActCase, ChainCase, ConvCase, HeadCase, StemCase

Case = ConvCase | BnActCase | StemCase | HeadCase | ChainCase

_CONV_NAME = re.compile(
    r"(?P<r>\d+)x(?P<s>\d+)(?:s(?P<stride>\d+))?(?:d(?P<dilation>\d+))?(?:g(?P<groups>\d+))?"
    r"_(?P<c>\d+)_(?P<k>\d+)_at(?P<h>\d+)(?:x(?P<w>\d+))?(?P<add>_add)?(?P<noact>_noact)?"
)
_BN_NAME = re.compile(r"(?P<c>\d+)_at(?P<h>\d+)(?:x(?P<w>\d+))?(?P<add>_add)?(?P<noact>_noact)?")
_STEM_NAME = re.compile(
    r"(?P<r>\d+)x(?P<s>\d+)s(?P<stride>\d+)_(?P<c>\d+)_(?P<k>\d+)_at(?P<h>\d+)(?:x(?P<w>\d+))?"
    r"(?:_(?P<images>uint8|float32))?(?P<normed>_norm)?"
)
_HEAD_NAME = re.compile(
    r"(?P<c>\d+)_(?P<classes>\d+)_at(?P<h>\d+)(?:x(?P<w>\d+))?(?P<bare>_nobias)?"
)
_CHAIN_NAME = re.compile(
    r"(?P<k>\d+)_(?P<c>\d+)_(?P<m>\d+)_at(?P<h>\d+)(?:x(?P<w>\d+))?"
    r"(?:_proj(?P<projected>\d+)(?:s(?P<stride>\d+))?)?(?:_front(?P<front>\d+))?(?P<even>_even)?"
)


def _size(case: Case) -> str:
    return f"{case.h}" if case.h == case.w else f"{case.h}x{case.w}"


def _told(case: Any, name: str) -> str:
    """The name, if the case can be made of it again."""
    again = case_of(type(case), name, case.n)
    same = {
        field.name: getattr(case, field.name)
        for field in dataclasses.fields(case)
        if field.name in ("name", "tags", "count")
    }
    if dataclasses.replace(again, **same) != case:
        about = getattr(case, "geometry", case)
        raise ValueError(f"case {case.name} is no {_FORMS[type(case)].what}: {about}")
    return name


def conv_name(case: ConvCase) -> str:
    """A name from which `conv_case` makes the convolution again, whatever its batch.

    Raises:
        ValueError: for a convolution that is not one of a ResNet: other padding than half of the
            filter, unequal strides or dilations.
    """
    stride, dilation = case.stride[0], case.dilation[0]
    name = (
        f"{case.r}x{case.s}{f's{stride}' if stride > 1 else ''}"
        f"{f'd{dilation}' if dilation > 1 else ''}{f'g{case.groups}' if case.groups > 1 else ''}"
        f"_{case.c}_{case.k}_at{_size(case)}{_ending(case)}"
    )
    return _told(case, name)


def conv_case(name: str, batch: int) -> ConvCase:
    """The convolution that a name of `conv_name` stands for, at a batch size.

    Raises:
        ValueError: for another name.
    """
    found = _match(ConvCase, name)
    c, k, h, r, s = (int(found[field]) for field in ("c", "k", "h", "r", "s"))
    stride, dilation, groups = (
        int(found[field] or 1) for field in ("stride", "dilation", "groups")
    )
    return ConvCase(
        name, batch, c, h, int(found["w"] or h), k, r, s, (stride,) * 2,
        (dilation * (r // 2), dilation * (s // 2)), (dilation,) * 2, groups,
        residual=found["add"] is not None, act="none" if found["noact"] else "relu",
    )  # fmt: skip


def bn_name(case: BnActCase) -> str:
    """A name from which `bn_case` makes the case again, whatever its batch."""
    return f"{case.c}_at{_size(case)}{_ending(case)}"


def bn_case(name: str, batch: int) -> BnActCase:
    """The BatchNorm (with add and ReLU) that a name of `bn_name` stands for.

    Raises:
        ValueError: for another name.
    """
    found = _match(BnActCase, name)
    c, h = int(found["c"]), int(found["h"])
    act = "none" if found["noact"] else "relu"
    return BnActCase(name, batch, c, h, int(found["w"] or h), found["add"] is not None, act)


def _ending(case: ConvCase | BnActCase) -> str:
    return ("_add" if case.residual else "") + ("_noact" if case.act == "none" else "")


def stem_name(case: StemCase) -> str:
    """A name from which `stem_case` makes the stem again, whatever its batch.

    Raises:
        ValueError: for other paddings than half of the filter, unequal strides, another pooling
            than 3x3 with stride 2, another layout.
    """
    images = "" if case.images == "same" else f"_{case.images}"
    normed = "_norm" if case.normed else ""
    name = f"{case.r}x{case.s}s{case.stride[0]}_{case.c}_{case.k}_at{_size(case)}{images}{normed}"
    return _told(case, name)


def stem_case(name: str, batch: int) -> StemCase:
    """The stem that a name of `stem_name` stands for, at a batch size.

    Raises:
        ValueError: for another name.
    """
    found = _match(StemCase, name)
    c, k, h, r, s, stride = (int(found[field]) for field in ("c", "k", "h", "r", "s", "stride"))
    return StemCase(
        name, batch, c, h, int(found["w"] or h), k, r, s, (stride,) * 2, (r // 2, s // 2),
        images=found["images"] or "same", normed=found["normed"] is not None,
    )  # fmt: skip


def head_name(case: HeadCase) -> str:
    """A name from which `head_case` makes the head again, whatever its batch.

    Raises:
        ValueError: for another layout.
    """
    name = f"{case.c}_{case.classes}_at{_size(case)}{'' if case.bias else '_nobias'}"
    return _told(case, name)


def head_case(name: str, batch: int) -> HeadCase:
    """The head that a name of `head_name` stands for, at a batch size.

    Raises:
        ValueError: for another name.
    """
    found = _match(HeadCase, name)
    c, classes, h = (int(found[field]) for field in ("c", "classes", "h"))
    return HeadCase(name, batch, c, h, int(found["w"] or h), classes, found["bare"] is None)


def chain_name(case: ChainCase) -> str:
    """A name from which `chain_case` makes the chain again, whatever its batch.

    Raises:
        ValueError: for one that no name tells.
    """
    step = f"s{case.projection_stride}" if case.projection_stride > 1 else ""
    projected = f"_proj{case.projected}{step}" if case.projected else ""
    front = f"_front{case.front}" if case.front else ""
    even = "_even" if case.out_stride == 2 else ""
    return _told(case, f"{case.k}_{case.c}_{case.m}_at{_size(case)}{projected}{front}{even}")


def chain_case(name: str, batch: int) -> ChainCase:
    """The chain that a name of `chain_name` stands for, at a batch size.

    Raises:
        ValueError: for another name.
    """
    found = _match(ChainCase, name)
    k, c, m, h = (int(found[field]) for field in ("k", "c", "m", "h"))
    return ChainCase(
        name, batch, k, h, int(found["w"] or h), c, m, int(found["projected"] or 0),
        int(found["stride"] or 1), int(found["front"] or 0), 2 if found["even"] else 1,
    )  # fmt: skip


class _Form(NamedTuple):
    """How cases of a type are named."""

    what: str
    example: str
    pattern: re.Pattern[str]
    name: Callable[[Any], str]
    case: Callable[[str, int], Any]


_FORMS: dict[type, _Form] = {
    ConvCase: _Form(
        "convolution of a ResNet", "a convolution such as 3x3s2_128_128_at56 or "
        "1x1_64_256_at56_add", _CONV_NAME, conv_name, conv_case,
    ),
    BnActCase: _Form("tensor", "a tensor such as 256_at56_add", _BN_NAME, bn_name, bn_case),
    StemCase: _Form(
        "stem of a ResNet", "a stem such as 7x7s2_3_64_at224 or 7x7s2_3_64_at224_uint8",
        _STEM_NAME, stem_name, stem_case,
    ),
    HeadCase: _Form(
        "head of a ResNet", "a head such as 2048_1000_at7", _HEAD_NAME, head_name, head_case
    ),
    ChainCase: _Form(
        "chain of a ResNet", "a chain such as 64_256_64_at56 or 128_512_256_at28_front128_even",
        _CHAIN_NAME, chain_name, chain_case,
    ),
}  # fmt: skip


def _match(form: type, name: str) -> re.Match[str]:
    about = _FORMS[form]
    found = about.pattern.fullmatch(name)
    if found is None:
        raise ValueError(f"name is {name!r}; accepted is {about.example}")
    return found


def name_of(case: Case) -> str:
    """The name of any case.

    Raises:
        ValueError: no name tells it.
    """
    return _FORMS[type(case)].name(case)


def case_of(form: type, name: str, batch: int) -> Any:
    """The case of a type that a name stands for, at a batch size.

    Args:
        form: `ConvCase`, `BnActCase`, `StemCase`, `HeadCase` or `ChainCase`.
        name: as of `name_of`.
        batch: images.

    Raises:
        ValueError: for another name.
    """
    return _FORMS[form].case(name, batch)
