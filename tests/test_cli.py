"""Commands that succeed: what they print, what they write, and their exit codes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from command import as_json, run
from PIL import Image

import resnet_fused as rf
from resnet_fused import admission
from resnet_fused.bench import load, record
from resnet_fused.data import photographs

pytestmark = pytest.mark.slow  # left out of `make quick`

SMALL = ["resnet18", "--size", "64"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """The photograph of a temple as a PNG file."""
    file = tmp_path / "temple.png"
    photographs()[0].save(file)
    return file


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state_dict of a resnet18 with 5 classes."""
    file = tmp_path_factory.mktemp("weights") / "five.pth"
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), file)
    return file


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from resnet_fused.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    seconds = []
    for _ in range(3):  # its own time: the machine may be busy, the program may not
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("info", "verify", "bench", "explain", "predict"))
    assert done.stdout.rstrip().endswith("False")
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", ["info", "verify", "bench", "explain", "predict"])
def test_every_command_has_help(command: str) -> None:
    assert "--json" in run(command, "--help").stdout


def test_python_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "resnet_fused", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("resnet-fused, version")


def test_info() -> None:
    about = as_json("info")
    assert about["versions"]["torch"] == torch.__version__
    assert about["machine"]["cores"] >= 1
    assert about["extension"]["built"] is (about["extension"]["why_not"] is None)
    assert "RESNET_FUSED_BACKEND" in about["backend"]["environment"]
    served = {(row["op"], row["device"], row["dtype"]): row for row in about["ops"]}
    assert all(row["implementation"] for row in about["ops"] if row["device"] == "cpu")
    assert ("conv_bn_act_fp8", "cpu", "float8_e4m3fn") in served
    call = rf.backends.Call("conv_bn_act", "cpu", torch.float32)
    expected = rf.backends.choose(call).implementation.name
    assert served["conv_bn_act", "cpu", "float32"]["implementation"] == expected
    text = run("info").stdout
    assert torch.__version__ in text
    assert "conv_bn_act" in text


def test_info_shows_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FUSED_BACKEND", "reference")
    about = as_json("info")
    assert about["backend"]["requested"] == "reference"
    assert about["backend"]["source"] == "RESNET_FUSED_BACKEND"
    rows = [row for row in about["ops"] if row["op"] == "conv_bn_act"]
    assert {row["implementation"] for row in rows} == {"reference"}


@pytest.mark.parametrize("name", ["resnet18", "rf:resnet18", "timm:resnet18"])
def test_explain(name: str) -> None:
    found = as_json("explain", name, "--size", "64", "--batch", "2")
    assert found["model"] == name
    assert len(found["rows"]) == 20
    assert sum(found["counts"].values()) == 20
    assert "modules" not in found["counts"]
    assert found["rows"][0].keys() == {"layer", "pattern", "implementation", "why"}


def test_explain_prints_a_line_a_layer_and_a_summary() -> None:
    lines = run("explain", *SMALL).stdout.splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[1].startswith("conv1 ")
    assert "20 of 20 convolutions fused" in lines[-1]


def test_explain_in_training() -> None:
    training, inference = (
        as_json("explain", *SMALL, "--batch", "2", "--mode", mode)
        for mode in ("training", "inference")
    )
    assert (training["mode"], inference["mode"]) == ("training", "inference")
    assert all(row["why"].startswith("training") for row in training["rows"])
    assert not any("training" in row["why"] for row in inference["rows"])


def test_info_says_once_what_keeps_all_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "platform_refusal", lambda name, index=0: "no such thing here")
    text = run("info").stdout
    assert text.count("no such thing here") == 1
    assert f"none of {len(admission.kernels())} kernels: no such thing here" in text


def test_predict_agrees_with_torchvision(picture: Path, weights: Path) -> None:
    found = as_json("predict", str(picture), "--model", "resnet18", "--weights", str(weights))
    plain = torchvision.models.resnet18(num_classes=5).eval()
    plain.load_state_dict(torch.load(weights))
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    with torch.inference_mode():
        expected = plain(preset(photographs()[0])[None])[0].softmax(0)
    assert [entry["rank"] for entry in found["predictions"]] == [1, 2, 3, 4, 5]
    got = torch.zeros(5)
    for entry in found["predictions"]:
        assert entry["label"] == f"class {entry['index']}"
        got[entry["index"]] = entry["probability"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["state_dict", "ddp", "checkpoint", "safetensors"])
def test_predict_reads_every_form_of_weights(
    tmp_path: Path, picture: Path, weights: Path, form: str
) -> None:
    state = torch.load(weights)
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, file)
    elif form == "ddp":
        torch.save({f"module.{key}": value for key, value in state.items()}, file)
    elif form == "checkpoint":
        torch.save({"epoch": 3, "state_dict": state}, file)
    else:
        torch.save(state, file)
    call = ("predict", str(picture), "--model", "resnet18", "--topk", "1", "--weights")
    assert as_json(*call, str(file))["predictions"] == as_json(*call, str(weights))["predictions"]


def test_predict_names_classes(tmp_path: Path, picture: Path) -> None:
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    arguments = ("--model", "resnet18", "--weights", str(tmp_path / "w.pth"), "--topk", "2000")
    found = as_json("predict", str(picture), *arguments)["predictions"]
    names = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    assert len(found) == 1000
    assert all(entry["label"] == names[entry["index"]] for entry in found)
    lines = run("predict", str(picture), *arguments[:-1], "3").stdout.splitlines()
    assert [line.strip().split("%  ")[1] for line in lines] == [e["label"] for e in found[:3]]


def test_published_weights_come_with_their_own_crop(
    monkeypatch: pytest.MonkeyPatch, picture: Path
) -> None:
    state = torchvision.models.resnet50().state_dict()
    asked: list[str] = []

    def fake(url: str, **_: object) -> dict[str, torch.Tensor]:
        asked.append(url)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fake)
    found = as_json("predict", str(picture), "--weights", "IMAGENET1K_V2")
    enum = torchvision.models.ResNet50_Weights
    assert asked == [enum.IMAGENET1K_V2.url]
    assert found["weights"] == "torchvision's ResNet50_Weights.IMAGENET1K_V2"
    x = enum.IMAGENET1K_V2.transforms()(photographs()[0])[None]
    plain = torchvision.models.resnet50().eval()
    plain.load_state_dict(state)
    with torch.inference_mode():
        assert found["predictions"][0]["index"] == plain(x).argmax().item()


def test_bench_record(tmp_path: Path) -> None:
    file = tmp_path / "new" / "record.json"
    found = as_json("bench", *SMALL, "--batch", "1,2", "--rounds", "2", "--output", str(file))
    assert json.loads(file.read_text()) == found
    record.validate(found)
    assert found["complete"] and (found["settings"]["rounds"], found["settings"]["threads"]) == (
        2, None,
    )  # fmt: skip
    keys = [row["key"] for row in found["rows"]]
    assert keys == [f"model/inference/resnet18/b{n}/float32/64px" for n in (1, 2)]
    for row in found["rows"]:
        assert list(row["variants"]) == ["eager", "fused", "fused_again", "onednn"]
        assert all(len(one["samples_s"]) == 2 for one in row["variants"].values())
        assert row["omitted"] == {} and row["crashed"] == []
        assert 0 < row["limit"]["seconds"] < row["limit"]["eager_seconds"]
        pairs = {(ratio["baseline"], ratio["variant"]) for ratio in row["ratios"]}
        assert pairs >= {("eager", "fused"), ("eager", "onednn"), ("onednn", "fused")}
        assert row["load"]["cores"] >= 1 and len(row["verdicts"]) == 2
    assert {"torch", "python"} <= found["versions"].keys()


def test_bench_predicts_and_refuses_a_verdict_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(range(1000))

    def busy() -> load.CpuTimes:  # each reading: 10 s later, 6% of two cores used by others
        step = next(readings)
        return load.CpuTimes(10.0 * step, 19.2 * step, 18.0 * step)

    monkeypatch.setattr(load.LoadMeter.__init__, "__defaults__", (2, busy))
    lines = run("bench", *SMALL, "--batch", "1", "--rounds", "1").stdout.splitlines()
    (at,) = (i for i, line in enumerate(lines) if "predicted by the roofline: at least" in line)
    for line, beside in zip(lines[at + 1 :], ("eager", "onednn"), strict=False):
        assert "no verdict, other programs used 6.0% of the 2 cores (limit 5%)" in line
        assert line.endswith(f"against {beside}")


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm:resnet18"])
def test_bench_times_any_network_beside_the_peers_that_can(name: str) -> None:
    found = as_json("bench", name, "--size", "32", "--batch", "1", "--rounds", "1")
    record.validate(found)
    (row,) = found["rows"]
    assert row["key"] == f"model/inference/{name}/b1/float32/32px"
    assert {"eager", "fused", "fused_again"} <= row["variants"].keys() and not row["crashed"]
    assert all("samples_s" in one for one in row["variants"].values())
    if name == "mobilenet_v2":
        assert "it has no conv1" in row["omitted"]["onednn"]


def test_verify_writes_the_report(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    result = run("verify", *SMALL, "--batch", "2", "--output", str(out))
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.png"]
    with Image.open(out / "report.png") as image:
        assert image.size[0] > 1000
    page = (out / "report.html").read_text()
    for text in ("BatchNorm was calibrated", "layer4.1.conv2", "every check passed"):
        assert text in page
    for text in ("BatchNorm was calibrated", "layer4.1.conv2", "end to end", "20 of 20"):
        assert text in result.stdout
    assert str(out / "report.html") in result.stdout
    assert result.stderr == ""  # a pipe gets no progress bar


def test_verify_json(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By the module's name: the package's attribute of that name is the command.
    monkeypatch.setattr(sys.modules["resnet_fused.cli.verify"], "ROUNDS", 2)
    found = as_json("verify", *SMALL, "--images", str(picture), "--batch", "3", "--time")
    verification = found["verification"]
    assert verification["ok"] is True
    assert verification["input_shape"] == [3, 3, 64, 64]
    assert len(verification["layers"]) == 20
    assert all(0 < layer["bound_use"] <= 1 for layer in verification["layers"])
    assert "temple.png" in found["images"]
    assert "calibrated" in found["calibration"]
    assert sum(found["explanation"]["counts"].values()) == 20
    assert "modules" not in found["explanation"]["counts"]
    assert [timing["batch"] for timing in found["timings"]] == [1, 8]
    assert found["report"] is None


def test_verify_with_weights_calibrates_nothing(weights: Path) -> None:
    found = as_json("verify", *SMALL, "--weights", str(weights), "--dtype", "bfloat16")
    assert found["calibration"] is None
    assert found["verification"]["dtype"] == "bfloat16"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every convolution of a fused layer is off by a thousandth."""

    def wrong(x, weight, scale, shift, residual, stride, padding, dilation, groups, act):
        y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
        y = y * scale[:, None, None] + (shift + 1e-3)[:, None, None]
        y = y if residual is None else y + residual
        return y.relu() if act == "relu" else y

    monkeypatch.setenv("RESNET_FUSED_BACKEND", "reference")
    with torch.library._scoped_library("resnet_fused", "IMPL") as library:
        library.impl("conv_bn_act.reference", wrong, "CPU")
        yield


@pytest.mark.usefixtures("planted")
def test_verify_exits_with_1_when_a_check_fails(tmp_path: Path) -> None:
    result = run("verify", *SMALL, "--batch", "1", "--output", str(tmp_path), code=1)
    failure = "layer conv1 (conv+bn+relu, reference) is off by"
    assert f"FAILED:\n  {failure}" in result.stdout
    page = (tmp_path / "report.html").read_text()
    assert "checks failed" in page
    assert failure in page
    assert as_json("verify", *SMALL, "--batch", "1", code=1)["verification"]["ok"] is False
