"""Several networks together, and what is asked of an image: by hand, and by the commands."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import train_runs as runs
from command import as_json, run
from nets import stir
from safetensors.torch import load_file, save_file
from torch import nn

import resnet_fused as rf
from resnet_fused.data.sources import open_source
from resnet_fused.train import views

CPU = torch.device("cpu")
F64 = torch.float64
MODEL = "rf:cifar_resnet20"


def small(seed: int, classes: int = 5, channels: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return stir(rf.models.CifarResNet(8, classes, channels), seed).eval()


def mean_of(models, x):
    """The mean of the softmaxes, in float64."""
    plain = [rf.unfuse(copy.deepcopy(model)).double() for model in models]
    with torch.no_grad():
        return sum(model(x.double()).softmax(1) for model in plain) / len(plain)


def test_an_ensemble_is_the_mean_of_its_members_probabilities():
    members = [small(seed) for seed in range(3)]
    together = rf.models.Ensemble(members)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        scores = together(x)
        alone = together.scores(x)
        assert all(torch.equal(a, m(x)) for a, m in zip(alone, members, strict=True))
    assert scores.dtype is torch.float32 and len(together) == 3
    torch.testing.assert_close(scores.double().exp(), mean_of(members, x), rtol=1e-4, atol=1e-6)
    # Logits far apart: no probability is lost to an overflow.
    far = [torch.tensor([[1000.0, 0.0, -1000.0]]), torch.tensor([[0.0, 900.0, 0.0]])]
    found = rf.models.Ensemble.combine(far)
    assert found[0, :2].exp().tolist() == pytest.approx([0.5, 0.5]) and bool(found.isfinite().all())


def test_members_keep_their_dtype_and_may_be_engines():
    members = [small(seed) for seed in range(2)]
    x = torch.randn(2, 3, 8, 8)
    engines = rf.models.Ensemble(rf.freeze(m, x) for m in members)
    torch.testing.assert_close(engines(x).double().exp(), mean_of(members, x), rtol=1e-4, atol=1e-6)
    wide = rf.models.Ensemble(copy.deepcopy(m).double() for m in members)
    with torch.no_grad():
        assert wide(x.double()).dtype is F64
        half = rf.models.Ensemble(copy.deepcopy(m).bfloat16() for m in members)(x.bfloat16())
    assert half.dtype is torch.float32


def test_an_ensemble_trains_moves_and_is_saved():
    together = rf.models.Ensemble([small(0), small(1)])
    x = torch.randn(2, 3, 8, 8)
    together(x).logsumexp(1).sum().backward()
    assert all(p.grad is not None for p in together.parameters())
    again = pickle.loads(pickle.dumps(together))
    with torch.no_grad():
        assert torch.equal(again(x), together(x))
        other = rf.models.Ensemble([small(2), small(3)])
        other.load_state_dict(together.state_dict())
        assert torch.equal(other(x), together(x))


def test_bad_members_are_named():
    with pytest.raises(ValueError, match="members: got none"):
        rf.models.Ensemble([])
    with pytest.raises(RuntimeError, match="they have 5 and 7 classes"):
        rf.models.Ensemble([small(0), small(1, 7)])(torch.randn(1, 3, 8, 8))


# ------------------------------------------------------------------ views of an image


def view(model, looks, channels=3):
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    return views.View(copy.deepcopy(model), looks, channels, mean, std, CPU), mean, std


def normalised(images, mean, std):
    shape = (1, -1, 1, 1)
    m, s = (torch.tensor(v, dtype=F64).view(shape) for v in (mean, std))
    return (images.double() / 255 - m) / s


def test_scales_look_at_all_of_an_image():
    model = small(4)
    images = torch.randint(256, (2, 3, 20, 28), dtype=torch.uint8)
    looks = views.Views(0, 0, scales=(16, 24))
    found, mean, std = view(model, looks)
    assert torch.equal(looks.transform()(images[0]), images[0])
    expected = torch.zeros(2, 5, dtype=F64)
    for side in (16, 24):
        # The shorter side is 20: the longer one keeps the ratio, rounded down.
        sized = torch.nn.functional.interpolate(
            images.double(), (side, int(side * 28 / 20)), mode="bilinear", antialias=True,
            align_corners=False,
        ).round()  # fmt: skip
        expected += mean_of([model], normalised(sized, mean, std)) / 2
    # A byte that is rounded the other way is a 255th.
    torch.testing.assert_close(found(images).double().exp(), expected, rtol=0.05, atol=5e-3)
    one, *_ = view(model, views.Views(0, 0, scales=(20,)))
    exact = mean_of([model], normalised(images, mean, std))
    torch.testing.assert_close(one(images).double().exp(), exact, rtol=1e-4, atol=1e-6)
    assert views.PAPER_SCALES == (224, 256, 384, 480, 640)


def test_ten_crops_are_averaged():
    model = small(5, channels=3)
    image = torch.randint(256, (1, 20, 24), dtype=torch.uint8)
    looks = views.Views(16, 20, 10)
    crops = torch.stack([looks.transform()(image)])
    assert crops.shape == (1, 10, 1, 16, 16)
    found, mean, std = view(model, looks)
    flat = normalised(crops[0].expand(-1, 3, -1, -1), mean, std)
    expected = mean_of([model], flat).mean(0, keepdim=True)
    torch.testing.assert_close(found(crops).double().exp(), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="resize"):
        views.Views(20, 16).transform()


# ------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images, and two runs on it with other seeds."""
    top = tmp_path_factory.mktemp("ensemble")
    folder = runs.picture_folder(top / "data")
    found = [top / "a", top / "b"]
    for seed, output in enumerate(found):
        run("train", MODEL, "--data", f"imagefolder:{folder}", "--recipe", "digits", "--output",
            output, "--set", "size=16", "--batch-size", 4, "--epochs", 1, "--workers", 0, "--seed",
            seed, "--no-tensorboard")  # fmt: skip
    return folder, found


def networks(paths):
    made = []
    for path in paths:
        model = rf.models.CifarResNet(20, 2, 3)
        model.load_state_dict(load_file(path / "model.safetensors"))
        made.append(model.eval())
    return made


def test_evaluate_takes_several_runs(trained):
    folder, paths = trained
    record = as_json("evaluate", *paths)
    assert [member["model"] for member in record["members"]] == [MODEL, MODEL]
    assert record["model"] == f"{MODEL} + {MODEL}"
    source = open_source(f"imagefolder:{folder}")
    looks = views.Views(16, 16)
    images = torch.stack([looks.transform()(source.val[i][0]) for i in range(6)])
    labels = torch.tensor([source.val[i][1] for i in range(6)])
    p = mean_of(networks(paths), normalised(images, source.mean, source.std))
    assert record["loss"] == pytest.approx(
        float(-p.gather(1, labels[:, None]).log().mean()), rel=1e-3
    )
    assert record["top1"] == float((p.argmax(1) == labels).double().mean())


def test_evaluate_looks_at_scales(trained):
    folder, paths = trained
    record = as_json("evaluate", paths[0], "--scales", "16,24")
    assert record["scales"] == [16, 24] and record["images"] == 6
    source = open_source(f"imagefolder:{folder}")
    found = views.View(
        networks(paths)[0], views.Views(0, 0, scales=(16, 24)), 3, source.mean, source.std, CPU
    )
    scores = [found(source.val[i][0][None]) for i in range(6)]
    right = [int(s.argmax()) == source.val[i][1] for i, s in enumerate(scores)]
    assert record["top1"] == sum(right) / 6
    losses = [-float(s[0, source.val[i][1]]) for i, s in enumerate(scores)]
    assert record["loss"] == pytest.approx(sum(losses) / 6, rel=1e-3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--scales", "16", "--crops", 10], ["--crops", "all of an image"]),
        (["--scales", "16", "--size", 8], ["--size", "all of an image"]),
        (["--scales", "0"], ["0"]),
        (["--weights", "x.pth"], ["--weights: got 1 for 2 MODELs"]),
    ],
)
def test_what_does_not_go_together_is_named(trained, more, words):
    refused = run("evaluate", *trained[1], *more, code=2)
    assert all(word in refused.stderr for word in words), refused.stderr


def test_runs_of_other_sizes_and_classes_are_refused(trained, tmp_path):
    folder, paths = trained
    run("train", MODEL, "--data", f"imagefolder:{folder}", "--recipe", "digits", "--output",
        tmp_path / "c", "--set", "size=24", "--batch-size", 4, "--epochs", 1, "--workers", 0,
        "--no-tensorboard")  # fmt: skip
    refused = run("evaluate", paths[0], tmp_path / "c", code=2)
    assert "give --size and --resize" in refused.stderr
    both = as_json("evaluate", paths[0], tmp_path / "c", "--size", 16, "--resize", 16)
    assert both["images"] == 6


def test_predict_takes_several_networks(trained, tmp_path):
    folder, _ = trained
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = stir(rf.models.cifar_resnet20(num_classes=4), seed)
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(net.state_dict(), files[-1])
    picture = next((folder / "val").rglob("*.png"))
    base = ["predict", picture, "--topk", 4]
    alone = [as_json(*base, "--model", MODEL, "--weights", file) for file in files]
    both = as_json(*base, *(w for f in files for w in ("--model", MODEL, "--weights", f)))
    assert both["model"] == f"{MODEL} + {MODEL}"

    def table(record):
        return {row["index"]: row["probability"] for row in record["predictions"]}

    for index, probability in table(both).items():
        mean = sum(table(record)[index] for record in alone) / 2
        assert probability == pytest.approx(mean, rel=1e-3, abs=1e-6)
    refused = run(*base, "--model", MODEL, "--weights", files[0], "--weights", files[1], code=2)
    assert "got 2 for 1 MODELs" in refused.stderr
    save_file(rf.models.cifar_resnet20(num_classes=3).state_dict(), tmp_path / "3.safetensors")
    refused = run(*base, "--model", MODEL, "--weights", files[0], "--model", MODEL, "--weights",
                  tmp_path / "3.safetensors", code=2)  # fmt: skip
    assert "know different classes" in refused.stderr
