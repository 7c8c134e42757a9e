"""`load_edm`: weights by their published names; what the file does not say; every fault in one sentence."""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import stepfusion as sf
from stepfusion.checkpoints.edm import load_edm
from stepfusion.networks import DhariwalUNet, SongUNet
from stepfusion_testing.edm_forward import Architecture, State, forward, random_state

DOCS = Path(__file__).parents[2] / "docs" / "edm.md"
DDPMPP = Architecture(16, 16, (1, 2), 1, frozenset({8}), classes=4, augment=9)
NCSNPP = Architecture(
    8, 8, (2, 1), 2, frozenset(), channels=5, noise=2, fourier=True, encoder="residual", taps=(1, 3, 3, 1)
)
SKIPS = Architecture(8, 8, (1, 2, 2), 1, frozenset({4, 2}), encoder="skip", decoder="skip", taps=(1, 4, 5, 5, 4, 1))
ADM = Architecture(16, 64, (1, 2), 1, frozenset({16}), adm=True, channels=2, classes=3)
ALL = {"DDPM++": DDPMPP, "NCSN++": NCSNPP, "skips": SKIPS, "ADM": ADM}
SIGMAS = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80}


def write(
    folder: Path, a: Architecture, config: dict[str, Any] | None, prefix: str = "model.", **others: torch.Tensor
) -> Path:
    """A file of weights, and the JSON object beside it."""
    path = folder / "edm.safetensors"
    state = {prefix + key: value for key, value in random_state(a).items()}
    save_file({**state, **others}, path)
    if config is not None:
        path.with_suffix(".json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("prefix", ["model.", "", "module.model."])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_the_architecture_follows_from_the_weights(name: str, prefix: str, tmp_path: Path) -> None:
    a = ALL[name]
    loaded = load_edm(write(tmp_path, a, SIGMAS, prefix))
    assert isinstance(loaded.network, DhariwalUNet if a.adm else SongUNet)
    assert (loaded.sigma_data, loaded.sigma_min, loaded.sigma_max) == (0.5, 0.002, 80)
    assert loaded.null_label == (a.classes or None)
    assert not loaded.network.training
    assert loaded.network.sample_size == a.height
    x, t = torch.randn(2, a.channels, a.height, a.height), torch.tensor([-1.5, 1.0])
    labels = (torch.tensor([1, a.classes]),) if a.classes else ()
    classes = torch.eye(a.classes + 1)[labels[0]][:, : a.classes] if labels else None
    expected = forward(random_state(a), a, x, t, classes)["out"]
    assert float((loaded.network(x, t, *labels).double() - expected).abs().max()) <= 1e-4


def test_what_is_given_goes_before_the_file_beside(tmp_path: Path) -> None:
    path = write(tmp_path, NCSNPP, {"_note": "mine", "sigma_data": 0.5, "model_type": "SongUNet"})
    loaded = load_edm(path)
    assert (loaded.sigma_data, loaded.sigma_min, loaded.sigma_max) == (0.5, 0.0, math.inf)
    assert load_edm(path, sigma_data=2).sigma_data == 2
    wide = load_edm(path, img_resolution=[8, 24], dropout=0.25).network
    assert wide.sample_size == (8, 24)
    assert wide.config.dropout == 0.25
    path.with_suffix(".json").unlink()
    assert load_edm(path, sigma_data=1.0).sigma_data == 1


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    path = tmp_path / "edm.safetensors"
    save_file({key: value.half() for key, value in random_state(ADM).items()}, path)
    network = load_edm(path, sigma_data=0.5).network
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


def changed(state: State, **changes: torch.Tensor | None) -> State:
    """A state with other tensors, by names with "__" for dots; None leaves one out."""
    names = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in {**state, **names}.items() if value is not None}


BAD_WEIGHTS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "missing": (
        {"dec__8x8_in0__qkv__bias": None},
        "PATH does not fit its config: 1 missing (dec.8x8_in0.qkv.bias)",
    ),
    "unexpected": ({"u": torch.ones(3)}, "PATH does not fit its config: 1 unexpected (u)"),
    "misshapen": (
        {"map_layer1__bias": torch.ones(3)},
        "PATH does not fit its config: 1 misshapen (map_layer1.bias [3] instead of [64])",
    ),
    "integers": (
        {"map_layer1__bias": torch.ones(64, dtype=torch.int64)},
        "PATH does not fit its config: 1 not floating point (map_layer1.bias I64)",
    ),
    "not finite": (
        {"map_layer1__bias": torch.full((64,), math.inf)},
        "PATH: map_layer1.bias has values that are not finite",
    ),
    "not EDM's": (
        {"map_layer0__weight": None},
        "PATH has no tensors named map_layer0.weight; every SongUNet and DhariwalUNet of EDM has one",
    ),
    "two networks": (
        {"ema__map_layer0__weight": torch.ones(2, 2)},
        "PATH has 2 tensors named map_layer0.weight; every SongUNet and DhariwalUNet of EDM has one",
    ),
    "no first convolution": (
        {"enc__16x16_conv__weight": None},
        "PATH has the first convolutions []; accepted is one enc.HxH_conv",
    ),
    "no last convolution": (
        {"dec__16x16_aux_conv__weight": None},
        "PATH has neither dec.16x16_aux_conv.weight, as a SongUNet has, nor out_conv.weight, as a DhariwalUNet",
    ),
    "a block of another rank": (
        {"enc__8x8_block0__conv0__weight": torch.ones(32, 16, 3)},
        "PATH: enc.8x8_block0.conv0.weight is [32, 16, 3]; accepted are 4 sizes of at least 1",
    ),
    "another rank": (
        {"map_label__weight": torch.ones(4)},
        "PATH: map_label.weight is [4]; accepted are 2 sizes of at least 1",
    ),
    "no multiple": (
        {"map_layer0__weight": torch.ones(24, 16)},
        "PATH has layers of 24 channels, which are no multiple of 16",
    ),
    "another filter": (
        {"enc__8x8_down__skip__resample_filter": torch.full((1, 1, 2, 2), 0.5)},
        "PATH: enc.8x8_down.skip.resample_filter is not the filter of resample_filter [1, 1]",
    ),
    "a filter that is none": (
        {"dec__16x16_up__conv0__resample_filter": torch.ones(1, 1, 2, 3)},
        "PATH: dec.16x16_up.conv0.resample_filter is [1, 1, 2, 3]; accepted is [1, 1, K, K] with K up to 16",
    ),
    "a filter of zeros": (
        {"dec__16x16_up__conv0__resample_filter": torch.zeros(1, 1, 2, 2)},
        "PATH: dec.16x16_up.conv0.resample_filter is not a filter whose taps grow from its ends",
    ),
    "more channels out": (
        {"dec__16x16_aux_conv__weight": torch.ones(6, 16, 3, 3), "dec__16x16_aux_conv__bias": torch.ones(6)},
        "PATH returns 6 channels for 3; a network in EDM's preconditioning returns as many as it takes",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    changes, message = BAD_WEIGHTS[case]
    path = tmp_path / "edm.safetensors"
    save_file(changed(random_state(DDPMPP), **changes), path)
    with pytest.raises(sf.CheckpointError) as caught:
        load_edm(path, sigma_data=0.5)
    assert str(caught.value) == message.replace("PATH", str(path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"sigma_min": 0.1},
            "PATH does not say sigma_data, the standard deviation of the training data: give it, or write it to "
            "JSON; the models that NVlabs published have 0.5",
        ),
        ({"sigma_data": 0}, "config of PATH: sigma_data must be above 0, got 0"),
        ({"sigma_data": "0.5"}, "config of PATH: sigma_data must be a number, got '0.5'"),
        ({**SIGMAS, "sigma_max": 0.001}, "config of PATH: sigma_max must be above sigma_min, got 0.001"),
        ({**SIGMAS, "preconditioning": "vp"}, "config of PATH: preconditioning must be 'edm', got 'vp'"),
        ({**SIGMAS, "model_type": "DhariwalUNet"},
         "config of PATH: model_type is 'DhariwalUNet', the weights are of SongUNet"),
        ({**SIGMAS, "channel_mult": [1, 3]}, "PATH does not fit its config: "),
        ({**SIGMAS, "img_resolution": 15}, "config of PATH: img_resolution must be a multiple of 2, for"),
        ({**SIGMAS, "num_blocks": 10**6}, "config of PATH: num_blocks must be in [1, 32], got 1000000"),
        ({**SIGMAS, "sigma": 1}, "config of PATH: sigma is unknown; accepted are preconditioning, sigma_data, "),
        ({**SIGMAS, "resample_filter": [1, 2]}, "PATH: enc.8x8_down.conv0.resample_filter is not the filter of "),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, DDPMPP, config)
    with pytest.raises(sf.CheckpointError) as caught:
        load_edm(path)
    wanted = message.replace("PATH", str(path)).replace("JSON", str(path.with_suffix(".json")))
    assert str(caught.value).startswith(wanted)


def test_fields_of_song_are_not_those_of_adm(tmp_path: Path) -> None:
    path = write(tmp_path, ADM, {**SIGMAS, "encoder_type": "skip"})
    message = r"encoder_type is a field of SongUNet, and the weights are a DhariwalUNet's$"
    with pytest.raises(sf.CheckpointError, match=message):
        load_edm(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "edm.pkl").write_bytes(b"\x80\x04.")
    (tmp_path / "edm.safetensors").write_bytes(b"1234")
    for name, message in {
        "edm.pkl": r"is a pickle, which is never opened; docs/edm\.md has a script to convert it$",
        "nowhere.safetensors": "is missing$",
        "": "is not a file$",
        "edm.safetensors": "is not a complete safetensors file: ",
    }.items():
        with pytest.raises(sf.CheckpointError, match=message):
            load_edm(tmp_path / name, sigma_data=0.5)


def test_a_state_dict_of_torch_save_is_told_what_to_do(tmp_path: Path) -> None:
    torch.save(random_state(ADM), tmp_path / "edm.pt")
    message = r"is a checkpoint of EDM \(NVlabs\), which is read as a safetensors file \(docs/edm\.md\)$"
    with pytest.raises(sf.CheckpointError, match=message):
        sf.load_guided_diffusion(tmp_path / "edm.pt")


CHECKOUT = """
import torch


class {model}(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        for key, value in state.items():
            *path, name = key.split(".")
            owner = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, torch.nn.Module())
                owner = owner._modules[part]
            owner.register_buffer(name, value)


class {precond}(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        self.img_resolution, self.sigma_data = 16, 0.5
        self.sigma_min, self.sigma_max = 0, float("inf")
        self.model = {model}(state)
"""


@pytest.mark.parametrize("precond", ["EDMPrecond", "VPPrecond"])
def test_the_script_of_the_docs_converts_a_pickle(
    precond: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout that stands for the authors', whose classes the pickle names."""
    script = re.findall(r"```python\n(# convert\.py.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(script) == 1
    (tmp_path / "convert.py").write_text(script[0])
    (tmp_path / "networks.py").write_text(CHECKOUT.format(model="DhariwalUNet", precond=precond))
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.delitem(sys.modules, "networks", raising=False)
        network = getattr(importlib.import_module("networks"), precond)(random_state(ADM))
        (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": network}))
        patch.delitem(sys.modules, "networks")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "convert.py", "edm.pkl"], check=False, **options)
    if precond != "EDMPrecond":
        assert done.stderr == "edm.pkl has a VPPrecond; only EDMPrecond is read by stepfusion\n"
        assert done.returncode == 1
        return
    assert (done.returncode, done.stderr) == (0, "")
    loaded = load_edm(tmp_path / "edm.safetensors")
    assert (loaded.sigma_data, loaded.sigma_min, loaded.sigma_max) == (0.5, 0.0, math.inf)
    state = loaded.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in random_state(ADM).items())
