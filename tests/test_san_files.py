"""Checkpoints of the network: its own, the authors', wrapped and broken ones."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="san_model needs the extra [san]")
from safetensors.torch import save_file

from san import assert_same, image, small
from san_model import SAN

VARIANTS = ["base", "ssc", "foca", "soca"]


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(suffix, variant, tmp_path):
    model = small(scale=3, variant=variant, iterations=3, normalization="eig", rgb_range=1)
    model.save(tmp_path / f"model.{suffix}")
    assert_same(SAN.from_checkpoint(tmp_path / f"model.{suffix}"), model)


def test_channels_last_weights_are_saved(tmp_path):
    model = small().to(memory_format=torch.channels_last)
    model.save(tmp_path / "model.safetensors")
    assert_same(SAN.from_checkpoint(tmp_path / "model.safetensors"), model)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model, state: {"params": small(1).state_dict(), "params_ema": state},
        lambda model, state: {"params": state, "config": model.config},
        lambda model, state: {"params": state, "config": {"iterations": 100000, "lr": 1e-4}, "params_ema": None},
        lambda model, state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3},
        lambda model, state: torch.nn.DataParallel(model).state_dict(),
        lambda model, state: torch.compile(model).state_dict(),
        lambda model, state: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    ],
    ids=["params_ema", "params", "other config", "state_dict", "DataParallel", "compile", "AveragedModel"],
)
def test_wrapped_checkpoints(wrap, tmp_path):
    model = small()
    torch.save(wrap(model, dict(model.state_dict())), tmp_path / "wrapped.pth")
    assert_same(SAN.from_checkpoint(tmp_path / "wrapped.pth"), model)


def test_files_of_old_torch(tmp_path):
    model = small()
    torch.save(dict(model.state_dict()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(SAN.from_checkpoint(tmp_path / "old.pt"), model)


def test_config_travels_with_a_saved_state_dict(tmp_path):
    model = small(variant="foca")
    torch.save({"ema": torch.optim.swa_utils.AveragedModel(model).state_dict()}, tmp_path / "model.pt")
    assert_same(SAN.from_checkpoint(tmp_path / "model.pt"), model)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("variant", ["base", "ssc", "soca"])
def test_config_is_read_off_the_tensors(scale, variant, tmp_path):
    model = SAN(
        scale, n_resgroups=3, n_resblocks=2, n_feats=24, reduction=3 if variant == "soca" else 16, variant=variant
    )
    with torch.no_grad():
        model.add_mean.bias += 0.3  # the authors' code trains it
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    assert_same(SAN.from_checkpoint(tmp_path / "plain.safetensors"), model)


def test_overrides(tmp_path):
    model = small()
    model.save(tmp_path / "model.pt")
    loaded = SAN.from_checkpoint(tmp_path / "model.pt", normalization="eig", iterations=7)
    assert loaded.config == model.config | {"normalization": "eig", "iterations": 7}
    with pytest.warns(UserWarning, match="is for scale 2: the upsampler for 3 is new"):
        loaded = SAN.from_checkpoint(tmp_path / "model.pt", scale=3)
    assert loaded(image(4, 4)).shape == (1, 3, 12, 12)
    assert torch.equal(loaded.head[0].weight, model.head[0].weight)
    assert torch.equal(loaded.tail[1].weight, model.tail[1].weight)
    with pytest.raises(TypeError, match="colour"):
        SAN.from_checkpoint(tmp_path / "model.pt", colour=3)


def test_broken_checkpoints(tmp_path):
    def refuse(content, match, name="broken.pt"):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=match):
            SAN.from_checkpoint(tmp_path / name)

    state = dict(small().state_dict())
    refuse({k: v for k, v in state.items() if k != "head.0.weight"}, r"broken.pt: .* lacks head\.0\.weight$")
    refuse({k: v for k, v in state.items() if k != "gamma"}, r"broken.pt: .*: missing gamma$")
    refuse(state | {"surplus": torch.ones(1)}, r": unexpected surplus$")
    refuse(state | {"head.0.bias": torch.ones(5)}, r": of another shape head\.0\.bias$")
    refuse({k: v for k, v in state.items() if "rcab" not in k}, r"n_resblocks: expected .*got 0")
    refuse({k: v for k, v in state.items() if "bias" not in k} | {"add_mean.bias": torch.ones(3)}, r" and \d+ more$")
    refuse(state | {"epoch": 3}, "no tensors: epoch")
    refuse(torch.ones(3), "cannot be read")
    refuse(state, "path: expected a .pt", name="model.bin")
    refuse({"params": state, "code": Path("x")}, "cannot be read")  # would run code
    for name in ("junk.pt", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"junk" * 100)
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            SAN.from_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        SAN.from_checkpoint(tmp_path / "nowhere.pt")
