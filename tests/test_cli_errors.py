"""Commands that cannot do what is asked: one line that names the fix, and exit code 2."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
import torchvision
from click.testing import CliRunner

from resnet_fused.cli import _models, _output, main
from resnet_fused.cli._errors import Group, UserError

pytestmark = pytest.mark.slow  # left out of `make quick`


def _refused(*arguments: str) -> str:
    """The one line on stderr."""
    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """A picture of one colour."""
    from PIL import Image

    file = tmp_path / "red.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(file)
    return str(file)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet5O", "torchvision has no 'resnet5O'; did you mean resnet"),
        ("rf:resnet500", "resnet_fused.models has no 'resnet500'; did you mean rf:resnet50"),
        ("timm:resnet5O", "timm has no 'resnet5O'; did you mean timm:resnet"),
        ("zzzzzzzz", "accepted: a torchvision name such as resnet50, timm:NAME or rf:NAME"),
        ("keras:resnet50", "unknown source 'keras' in 'keras:resnet50'; accepted: timm:, rf:"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "bench", "verify"])
def test_unknown_model(command: str, name: str, hint: str) -> None:
    line = _refused(command, name)
    assert line.startswith("error: MODEL: ")
    assert hint in line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["explain", "resnet18", "--dtype", "float8"], ["--dtype", "float8", "bfloat16"]),
        (["bench", "resnet18", "--dtype", "float32,int8"], ["--dtype", "int8", "bfloat16"]),
        (["bench", "resnet18", "--batch", "1,x"], ["--batch", "'x'"]),
        (["bench", "resnet18", "--batch", "0"], ["--batch", "0"]),
        (["bench", "resnet18", "--rounds", "0"], ["--rounds", "0"]),
        (["explain", "resnet18", "--size", "8"], ["--size", "8"]),
        (["explain", "resnet18", "--mode", "train"], ["--mode", "train", "inference", "training"]),
        (
            ["explain", "resnet18", "--mode", "training", "--size", "32"],
            ["--batch 1", "--size 32", "more than 1 value per channel"],
        ),
        (["explain", "resnet18", "--device", "gpu0"], ["--device", "'gpu0'", "cpu, cuda"]),
        (["explain", "resnet18", "--device", "meta"], ["--device", "'meta'", "cpu, cuda"]),
        (["explain", "resnet18", "--device", "cpu:3"], ["--device", "'cpu:3'", "cpu, cuda"]),
        (["explain", "resnet18", "--device", "cuda:77"], ["--device", "'cuda:77'"]),
        (["verfy"], ["verfy"]),
        (["explain"], ["MODEL"]),
        (["info", "--jsn"], ["--jsn"]),
    ],
)
def test_options(arguments: list[str], parts: list[str]) -> None:
    line = _refused(*arguments)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    "arguments", [["info"], ["explain", "resnet18"], ["bench"], ["verify"], ["predict", "x.jpg"]]
)
def test_typo_in_the_environment_variable(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("RESNET_FUSED_BACKEND", "trition")
    line = _refused(*arguments)
    assert all(part in line for part in ("RESNET_FUSED_BACKEND", "'trition'", "triton", "auto"))


@pytest.mark.parametrize("command", [["predict"], ["verify", "resnet18", "--images"]])
def test_images(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "corrupt.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"\0" * 50)
    assert "no such file" in _refused(*command, str(tmp_path / "absent.jpg"))
    if command != ["predict"]:  # it takes folders
        assert "is a directory" in _refused(*command, str(tmp_path))
    assert "corrupt.jpg' is" in _refused(*command, str(tmp_path / "corrupt.jpg"))


def _predict(picture: str, weights: Path | str, model: str = "resnet18") -> str:
    return _refused("predict", picture, "--model", model, "--weights", str(weights))


def test_weights_that_cannot_be_read(tmp_path: Path, picture: str) -> None:
    (tmp_path / "text.pth").write_text("no tensors here")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1000)}, buffer)
    (tmp_path / "cut.pth").write_bytes(buffer.getvalue()[:1500])
    assert "no such file" in _predict(picture, tmp_path / "absent.pth")
    assert "no such file" in _predict(picture, "resnet18.safetensors")
    assert "is a directory" in _predict(picture, tmp_path)
    for name in ("text.pth", "cut.pth", "text.safetensors"):
        line = _predict(picture, tmp_path / name)
        assert f"{name}' is corrupt or no file of weights" in line


def test_weights_that_would_run_code_are_refused(tmp_path: Path, picture: str) -> None:
    torch.save(_Malicious(str(tmp_path / "ran")), tmp_path / "evil.pth")
    assert "is corrupt or no file of weights" in _predict(picture, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


class _Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_weights_that_hold_something_else(tmp_path: Path, picture: str) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    torch.save({}, tmp_path / "empty.pth")
    for name in ("list.pth", "other.pth", "empty.pth"):
        assert "holds no state_dict" in _predict(picture, tmp_path / name)


def test_a_state_dict_of_another_architecture(tmp_path: Path, picture: str) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    line = _predict(picture, tmp_path / "r18.pth", "resnet50")
    assert "is not a state_dict of resnet50" in line
    assert "tensors are missing: layer1.0.conv3.weight" in line
    assert "have another shape" in line
    line = _predict(picture, tmp_path / "r18.pth", "rf:resnet34")
    assert "is not a state_dict of rf:resnet34" in line


def test_unknown_published_weights(picture: str) -> None:
    line = _predict(picture, "IMAGENET1K_V3", "resnet50")
    assert "'IMAGENET1K_V3' is neither a file nor published weights of resnet50" in line
    assert "IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT" in line
    assert "did you mean" in line


@pytest.mark.parametrize("model", ["resnet18", "rf:resnet18"])
def test_no_network(tmp_path: Path, picture: str, model: str) -> None:
    # Port 9 of this machine answers nobody: the download fails as it does without a network.
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    environment = {**os.environ, **offline, "TORCH_HOME": str(tmp_path / "cache"), "no_proxy": ""}
    run = subprocess.run(
        [sys.executable, "-m", "resnet_fused", "predict", picture, "--model", model],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: --weights: cannot download IMAGENET1K_V1 of {model} (")
    assert "give a file instead: --weights FILE (this one is https://" in line


def test_a_broken_download(monkeypatch: pytest.MonkeyPatch, picture: str) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError('invalid hash value (expected "f37072fd", got "00")')

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", broken)
    assert "cannot download DEFAULT" not in (line := _predict(picture, "DEFAULT"))
    assert "cannot download IMAGENET1K_V1 of resnet18 (invalid hash value" in line


def test_timm_weights(monkeypatch: pytest.MonkeyPatch, picture: str) -> None:
    line = _predict(picture, "IMAGENET1K_V1", "timm:resnet18")
    assert "neither a file nor published weights of timm:resnet18; accepted:" in line
    assert "a1_in1k" in line

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr("timm.create_model", offline)
    line = _predict(picture, "DEFAULT", "timm:resnet18")
    assert "cannot download DEFAULT of timm:resnet18 (the network is down)" in line


def test_a_model_with_nothing_to_verify() -> None:
    line = _refused("verify", "vit_b_16", "--batch", "1")
    assert "has no BatchNorm" in line


def test_output_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for command, option in (("verify", "file/out"), ("verify", "file"), ("bench", "file/r.json")):
        line = _refused(command, "resnet18", "--output", str(tmp_path / option))
        assert line.startswith("error: --output: cannot make folder")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.html"
    _output.write_file(file, "first")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"cannot write '.*report\.html': No space left"):
        _output.write_file(file, "second")
    assert file.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    line = _refused("explain", "timm:resnet18")
    assert line == "error: this needs timm, which is not installed; run `pip install timm`"


def test_defects_of_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object, **__: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(_models, "load", defect)
    result = CliRunner().invoke(main, ["explain", "resnet18"])
    assert isinstance(result.exception, ValueError)


def test_an_interrupt_is_one_line() -> None:
    @click.group(cls=Group)
    def group() -> None:
        pass

    @group.command()
    def stop() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(group, ["stop"])
    assert result.exit_code == 130
    assert result.stderr.strip().splitlines()[-1] == "error: interrupted"
