"""Weights in every file that diffusers, accelerate and trainers write: shards, variants, averages, prefixes."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepfusion.checkpoints.diffusers_directory import load_pretrained
from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.errors import CheckpointError
from stepfusion.networks import UNet2D, UNet2DConfig

pytest.importorskip("diffusers")

from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
PLAIN = "diffusion_pytorch_model"
State = dict[str, Tensor]


@pytest.fixture
def network() -> UNet2D:
    torch.manual_seed(0)
    return UNet2D(UNet2DConfig.from_dict(UNET)).eval()


@pytest.fixture
def unet(tmp_path: Path, network: UNet2D) -> Path:
    """The network's folder of a model directory, without weights."""
    save_pretrained(tmp_path / "model", network, {"_class_name": "DDPMScheduler"})
    (tmp_path / "model/unet" / f"{PLAIN}.safetensors").unlink()
    return tmp_path / "model/unet"


def state_of(network: nn.Module) -> State:
    return {key: value.clone() for key, value in network.state_dict().items()}


def read(unet: Path, **options: Any) -> State:
    return load_pretrained(unet.parent, **options).network.state_dict()


def assert_read(unet: Path, wanted: State, **options: Any) -> None:
    found = read(unet, **options)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted[key].float()), key


def refusal(unet: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(unet.parent, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, state: State) -> None:
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path)


# Shards


def shard(unet: Path, state: State, kind: str, index: str = "", parts: int = 3) -> Path:
    """Write weights as diffusers' sharded form; the path of the index."""
    names, weight_map = list(state), {}
    for part in range(parts):
        name = f"{PLAIN}-{part + 1:05d}-of-{parts:05d}.{kind}"
        mine = {key: state[key] for key in names[part::parts]}
        write(unet / name, mine)
        weight_map |= dict.fromkeys(mine, name)
    path = unet / f"{PLAIN}.{kind}.index{index}.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read(unet: Path, network: UNet2D, kind: str) -> None:
    shard(unet, state_of(network), kind)
    assert_read(unet, state_of(network))


def test_shards_that_diffusers_wrote(unet: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = UNet2DModel(**UNET)
    for variant in (None, "fp16"):
        theirs.save_pretrained(tmp_path / f"{variant}", max_shard_size="100KB", variant=variant)
        assert len(list((tmp_path / f"{variant}").glob("*.safetensors"))) > 2
        shutil.copytree(tmp_path / f"{variant}", unet, dirs_exist_ok=True)
        assert_read(unet, state_of(theirs), variant=variant)
        assert_read(unet, state_of(theirs))


def test_shards_of_a_variant(unet: Path, network: UNet2D) -> None:
    shard(unet, {key: value.half() for key, value in state_of(network).items()}, "safetensors", ".fp16")
    assert_read(unet, {key: value.half() for key, value in state_of(network).items()}, variant="fp16")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.clear(), "lists no shards"),
        (lambda m: m.update(a="../evil.safetensors"), "lists '../evil.safetensors'; accepted are .safetensors files"),
        (lambda m: m.update(a="/etc/passwd"), "lists '/etc/passwd'; accepted are"),
        (lambda m: m.update(a="sub/x.safetensors"), "lists 'sub/x.safetensors'; accepted are"),
        (lambda m: m.update(a="x.bin"), "lists 'x.bin'; accepted are"),
        (lambda m: m.update(a="gone.safetensors"), "lists gone.safetensors, which is missing"),
        (
            lambda m: m.pop("conv_in.bias"),
            "does not fit its shard diffusion_pytorch_model-00002-of-00003.safetensors: ",
        ),
        (lambda m: m.update(more=m["conv_in.bias"]), "does not fit its shard diffusion_pytorch_model-00002-of-00003"),
        (lambda m: m.update(a=1), "weight_map.a must be a string, got 1"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    unet: Path, network: UNet2D, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = shard(unet, state_of(network), "safetensors")
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))
    given = refusal(unet)
    assert given.startswith(str(path))
    assert message in given


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}, "x": 1}', "{"])
def test_an_index_of_another_form_is_refused(unet: Path, text: str) -> None:
    path = unet / f"{PLAIN}.safetensors.index.json"
    path.write_text(text)
    assert refusal(unet).startswith(str(path))


def test_a_tensor_missing_from_all_shards_is_named(unet: Path, network: UNet2D) -> None:
    state = state_of(network)
    del state["conv_out.weight"]
    shard(unet, state, "safetensors")
    assert "1 missing (conv_out.weight)" in refusal(unet)


# Variants


@pytest.mark.parametrize("variant", ["fp16", "bf16", "fp32", "ema", "non_ema", "mine"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("base", [PLAIN, "model"])
def test_a_variant_is_read_where_there_is_no_other(
    unet: Path, network: UNet2D, variant: str, kind: str, base: str
) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(variant, torch.float32)
    state = {key: value.to(dtype) for key, value in state_of(network).items()}
    write(unet / f"{base}.{variant}.{kind}", state)
    assert_read(unet, state)
    assert_read(unet, state, variant=variant)


def test_weights_without_a_variant_go_first_and_a_variant_may_be_asked_for(unet: Path, network: UNet2D) -> None:
    plain, average = state_of(network), {key: value + 1 for key, value in state_of(network).items()}
    half = {key: value.half() for key, value in plain.items()}
    write(unet / f"{PLAIN}.ema.safetensors", average)
    assert_read(unet, average)
    write(unet / f"{PLAIN}.bin", plain)
    assert_read(unet, plain)
    write(unet / f"{PLAIN}.fp16.safetensors", half)
    assert_read(unet, half)
    write(unet / f"{PLAIN}.safetensors", plain)
    assert_read(unet, plain)
    assert_read(unet, average, variant="ema")
    assert refusal(unet, variant="bf16").startswith(f"{unet} has no weights of the variant 'bf16'; there is 'diff")


def test_two_variants_of_no_known_name_are_not_chosen_from(unet: Path, network: UNet2D) -> None:
    for variant in ("step1", "step2"):
        write(unet / f"{PLAIN}.{variant}.safetensors", state_of(network))
    assert refusal(unet) == f"{unet} has weights in the variants step1, step2: choose one by variant="
    assert_read(unet, state_of(network), variant="step2")


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_flax_model.msgpack",
        "model.ckpt",
        "model.onnx",
        f"{PLAIN}-00001-of-00002.safetensors",
        "tf_model.h5",
    ],
)
def test_weights_in_other_forms_are_named(unet: Path, name: str) -> None:
    """ "has no weights" is not true where there are some."""
    assert refusal(unet).endswith("or a .bin file")
    (unet / name).write_bytes(b"x")
    assert refusal(unet).endswith(f"or a .bin file; there is '{name}'")


def test_an_average_that_diffusers_saved(tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = UNet2DModel(**UNET)
    average = EMAModel(theirs.parameters(), decay=0.5, model_cls=UNet2DModel, model_config=theirs.config)
    for _ in range(3):
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(1.0)
        average.step(theirs.parameters())
    average.save_pretrained(tmp_path / "unet_ema")
    assert "inv_gamma" in json.loads((tmp_path / "unet_ema/config.json").read_text())
    found = load_pretrained(tmp_path / "unet_ema").network.state_dict()
    wanted = dict(zip(theirs.state_dict(), average.shadow_params, strict=True))
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key].data, rtol=0, atol=0)


# Names


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "unet."]
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_prefixes_of_wrappers_are_taken_off(unet: Path, network: UNet2D, prefix: str, kind: str) -> None:
    write(unet / f"{PLAIN}.{kind}", {prefix + key: value for key, value in state_of(network).items()})
    assert_read(unet, state_of(network))


def test_what_pytorch_itself_puts_before_names(unet: Path, network: UNet2D) -> None:
    wanted = state_of(network)
    write(unet / f"{PLAIN}.safetensors", nn.DataParallel(torch.compile(network)).state_dict())
    assert_read(unet, wanted)
    network.down_blocks[0].compile()
    network.mid_block = torch.compile(network.mid_block)
    state = network.state_dict()
    assert any("mid_block._orig_mod." in key for key in state)
    write(unet / f"{PLAIN}.safetensors", {key: value.clone() for key, value in state.items()})
    assert_read(unet, wanted)


def test_a_prefix_of_some_names_is_left(unet: Path, network: UNet2D) -> None:
    state = state_of(network)
    state["module.conv_in.bias"] = state.pop("conv_in.bias")
    write(unet / f"{PLAIN}.safetensors", state)
    assert "1 missing (conv_in.bias); 1 unexpected (module.conv_in.bias)" in refusal(unet)


def test_one_name_twice_is_refused(unet: Path, network: UNet2D) -> None:
    state = state_of(network)
    state["_orig_mod.conv_in.bias"] = state["conv_in.bias"].clone()
    write(unet / f"{PLAIN}.safetensors", state)
    assert refusal(unet).endswith("has conv_in.bias twice, under its old name and its new one")


def test_legacy_attention_under_a_prefix(unet: Path, network: UNet2D) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in state_of(network).items():
        for now, then in old.items():
            key = key.replace(f".{now}.", f".{then}.")
        state[f"module.{key}"] = value
    write(unet / f"{PLAIN}.bin", state)
    assert_read(unet, state_of(network))


# Files of torch.save


@pytest.mark.parametrize("protocol", [2, 3])
def test_the_form_before_zip_files_is_read(unet: Path, network: UNet2D, protocol: int) -> None:
    path = unet / f"{PLAIN}.bin"
    torch.save(state_of(network), path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert not zipfile.is_zipfile(path)
    assert_read(unet, state_of(network))
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(unet).startswith(f"{path} is damaged: ")


def test_a_legacy_file_runs_no_code(unet: Path, tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "created"), "w"))

    path = unet / f"{PLAIN}.bin"
    torch.save({"conv_in.weight": Malice()}, path, _use_new_zipfile_serialization=False)
    assert refusal(unet) == f"{path} holds pickled code, which is never run; save a safetensors file"
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_other_protocols_are_named(unet: Path, network: UNet2D, zipped: bool) -> None:
    path = unet / f"{PLAIN}.bin"
    torch.save(state_of(network), path, _use_new_zipfile_serialization=zipped, pickle_protocol=4)
    assert refusal(unet).startswith(f"{path} is pickled in a way that the restricted unpickler does not read")


def test_programs_archives_and_tar_files_are_named(unet: Path, network: UNet2D) -> None:
    path = unet / f"{PLAIN}.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"):
            archive.writestr(name, "x")
    assert refusal(unet) == f"{path} holds a TorchScript program, which is never run; save its state dict"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    assert refusal(unet) == f"{path} is a zip file, but not one that torch.save wrote of a state dict"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert refusal(unet) == f"{path} is in the tar form of PyTorch before 0.1.10, which is never opened"


def rewrite(path: Path, edit: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """The same archive with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            changed = edit(name, data)
            if changed is not None:
                archive.writestr(name, changed)


def test_a_record_that_was_cut_short_is_damaged(unet: Path, network: UNet2D) -> None:
    """It was filled up with its neighbours' bytes, and these became weights."""
    path = unet / f"{PLAIN}.bin"
    write(path, state_of(network))
    rewrite(path, lambda name, data: data)
    assert_read(unet, state_of(network))
    for record in ("data/0", "data/7"):
        for edit in (lambda data: data[: len(data) // 2], lambda data: data[:-4], lambda data: data + bytes(4)):
            write(path, state_of(network))
            rewrite(path, lambda name, data: edit(data) if name.endswith(record) else data)  # noqa: B023
            message = "is damaged: its records are not as long as the tensors that it declares"
            assert refusal(unet) == f"{path} {message}"


@pytest.mark.parametrize("missing", ["data/0", "data.pkl"])
def test_a_record_that_is_missing_is_named(unet: Path, network: UNet2D, missing: str) -> None:
    path = unet / f"{PLAIN}.bin"
    write(path, state_of(network))
    rewrite(path, lambda name, data: None if name.endswith(missing) else data)
    assert refusal(unet).startswith(str(path))


def test_a_compressed_archive_is_refused(unet: Path, network: UNet2D) -> None:
    path = unet / f"{PLAIN}.bin"
    write(path, state_of(network))
    rewrite(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert refusal(unet).startswith(f"{path} is damaged: ")


def test_a_file_saved_on_another_device_is_read(unet: Path, network: UNet2D) -> None:
    path = unet / f"{PLAIN}.bin"
    write(path, state_of(network))
    cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    rewrite(path, lambda name, data: data.replace(cpu, cuda) if name.endswith("data.pkl") else data)
    assert_read(unet, state_of(network))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "stride 0": lambda t: torch.ones(1, dtype=t.dtype).expand(t.shape),
    "one row for all": lambda t: torch.ones(t.shape[1:]).expand(t.shape),
    "overlapping": lambda t: torch.as_strided(torch.ones(t.numel() // 2 + 40), t.shape, (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("zipped", [True, False])
def test_views_that_repeat_bytes_are_refused(unet: Path, network: UNet2D, name: str, zipped: bool) -> None:
    """A file of 8 kB asked for gigabytes."""
    state = state_of(network)
    state["conv_in.weight"] = VIEWS[name](state["conv_in.weight"])
    path = unet / f"{PLAIN}.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert refusal(unet).startswith(
        f"{path}: 'conv_in.weight' is a view that repeats bytes of its storage: it needs "
    )


def test_tensors_that_share_their_bytes_are_refused(unet: Path, network: UNet2D) -> None:
    state = state_of(network)
    state["mid_block.resnets.1.conv1.weight"] = state["mid_block.resnets.0.conv1.weight"]
    path = unet / f"{PLAIN}.bin"
    torch.save(state, path)
    assert "conv1.weight' is a view that repeats bytes of its storage: it needs 73728 bytes" in refusal(unet)


@pytest.mark.parametrize("zipped", [True, False])
def test_views_with_bytes_of_their_own_are_read(unet: Path, network: UNet2D, zipped: bool) -> None:
    """All weights in one buffer, as optimisers flatten them; transposed and channels_last."""
    state = state_of(network)
    flat = torch.cat([value.flatten() for value in state.values()])
    views, start = {}, 0
    for key, value in state.items():
        views[key] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    views["conv_in.weight"] = state["conv_in.weight"].to(memory_format=torch.channels_last)
    turned = "time_embedding.linear_1.weight"
    views[turned] = state[turned].t().contiguous().t()
    torch.save(views, unet / f"{PLAIN}.bin", _use_new_zipfile_serialization=zipped)
    assert_read(unet, state)


def test_a_small_file_of_a_large_network_takes_no_memory(unet: Path) -> None:
    import resource

    config = {**UNET, "block_out_channels": [4096, 4096], "attention_head_dim": 64}
    (unet / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in UNet2D(UNet2DConfig.from_dict(config)).state_dict().items()}
    one = torch.ones(1)
    torch.save({key: one.expand(shape) for key, shape in shapes.items()}, unet / f"{PLAIN}.bin")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "is a view that repeats bytes" in refusal(unet)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


def test_safetensors_are_still_read_first(unet: Path, network: UNet2D) -> None:
    write(unet / f"{PLAIN}.safetensors", state_of(network))
    (unet / f"{PLAIN}.bin").write_bytes(b"never opened")
    assert_read(unet, state_of(network))
    assert load_file(unet / f"{PLAIN}.safetensors").keys() == state_of(network).keys()
