"""Model directories: what is written is read back, by us and by diffusers; what is wrong is named, and no more."""

import errno
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stepfusion.checkpoints.bundled
from stepfusion.checkpoints.bundled import bundled_models
from stepfusion.checkpoints.diffusers_directory import Pretrained, load_pretrained
from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.errors import CheckpointError
from stepfusion.files.atomic import atomic_directory, atomic_write
from stepfusion.networks import UNet2D, UNet2DConfig

pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

SMALL = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "num_train_timesteps": 1000}
WEIGHTS = "diffusion_pytorch_model.safetensors"
FIRST_KEY = "conv_in.weight"


def make_network(seed: int = 0, **changes: object) -> UNet2D:
    torch.manual_seed(seed)
    return UNet2D(UNet2DConfig.from_dict({**SMALL, **changes})).eval()


@pytest.fixture
def network() -> UNet2D:
    return make_network()


@pytest.fixture
def model(tmp_path: Path, network: UNet2D) -> Path:
    """A good directory, in the nested layout."""
    save_pretrained(tmp_path / "model", network, SCHEDULER)
    return tmp_path / "model"


def assert_same_weights(network: UNet2D, expected: dict[str, torch.Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, expected[key].float(), rtol=0, atol=0, msg=key)


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path)
    edit(state)
    save_file({key: value.contiguous() for key, value in state.items()}, path)


def refusal(source: str | os.PathLike[str]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_round_trip(model: Path, network: UNet2D) -> None:
    read = load_pretrained(model)
    assert isinstance(read, Pretrained)
    assert (read.path, read.scheduler_config, read.class_names, read.null_label) == (model, SCHEDULER, None, None)
    assert read.network.config == network.config
    assert not read.network.training
    assert {(p.dtype, p.device.type, p.requires_grad) for p in read.network.parameters()} == {
        (torch.float32, "cpu", True)
    }
    assert_same_weights(read.network, network.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    torch.testing.assert_close(read.network(x, t), network(x, t), rtol=0, atol=0)


def test_the_directory_is_what_diffusers_writes(model: Path, tmp_path: Path) -> None:
    files = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert files == {"model_index.json", f"unet/{WEIGHTS}", "unet/config.json", "scheduler/scheduler_config.json"}
    for path in model.rglob("*.json"):
        text = path.read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert os.listdir(tmp_path) == ["model"]


def test_diffusers_reads_it_and_we_read_it_back(model: Path, network: UNet2D, tmp_path: Path) -> None:
    pipeline = DDPMPipeline.from_pretrained(model)
    assert isinstance(pipeline.scheduler, DDPMScheduler)
    assert_same_weights(network, pipeline.unet.state_dict())
    pipeline.save_pretrained(tmp_path / "again")
    read = load_pretrained(tmp_path / "again")
    assert read.network.config == network.config
    assert_same_weights(read.network, network.state_dict())


def test_a_ddim_scheduler_makes_a_ddim_pipeline(network: UNet2D, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "model", network, {**SCHEDULER, "_class_name": "DDIMScheduler"})
    assert json.loads((tmp_path / "model/model_index.json").read_text())["_class_name"] == "DDIMPipeline"
    assert isinstance(DDIMPipeline.from_pretrained(tmp_path / "model"), DDIMPipeline)


def test_reads_a_flat_directory(model: Path, network: UNet2D, tmp_path: Path) -> None:
    flat = shutil.copytree(model / "unet", tmp_path / "flat")
    assert load_pretrained(str(flat)).scheduler_config == {}
    shutil.copy(model / "scheduler/scheduler_config.json", flat)
    read = load_pretrained(flat)
    assert read.scheduler_config == SCHEDULER
    assert_same_weights(read.network, network.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32(network: UNet2D, tmp_path: Path, dtype: torch.dtype) -> None:
    save_pretrained(tmp_path / "model", network, SCHEDULER, dtype=dtype)
    stored = load_file(tmp_path / "model/unet" / WEIGHTS)
    assert {value.dtype for value in stored.values()} == {dtype}
    assert_same_weights(load_pretrained(tmp_path / "model").network, stored)


def test_reads_the_fp16_variant_where_there_is_no_other(model: Path) -> None:
    (model / "unet" / WEIGHTS).rename(model / "unet/diffusion_pytorch_model.fp16.safetensors")
    edit_weights(
        model / "unet/diffusion_pytorch_model.fp16.safetensors",
        lambda state: state.update({key: value.half() for key, value in state.items()}),
    )
    assert load_pretrained(model).network.conv_in.weight.dtype == torch.float32


def test_channels_last_weights_are_stored_plainly(network: UNet2D, tmp_path: Path) -> None:
    expected = {key: value.clone() for key, value in network.state_dict().items()}
    save_pretrained(tmp_path / "model", network.to(memory_format=torch.channels_last), SCHEDULER)
    assert_same_weights(load_pretrained(tmp_path / "model").network, expected)


def test_the_network_does_not_depend_on_the_file(model: Path, network: UNet2D) -> None:
    """The weights are copied out of the mapped file: overwriting it in place changes nothing."""
    read = load_pretrained(model)
    with open(model / "unet" / WEIGHTS, "r+b") as file:
        file.write(bytes(os.path.getsize(model / "unet" / WEIGHTS)))
    assert_same_weights(read.network, network.state_dict())


def move_to_bin(model: Path, payload: object = None) -> Path:
    state = load_file(model / "unet" / WEIGHTS)
    (model / "unet" / WEIGHTS).unlink()
    path = model / "unet/diffusion_pytorch_model.bin"
    torch.save(state if payload is None else payload, path)
    return path


def test_reads_a_bin_file(model: Path, network: UNet2D) -> None:
    move_to_bin(model)
    assert_same_weights(load_pretrained(model).network, network.state_dict())


def test_safetensors_go_before_bin(model: Path, network: UNet2D) -> None:
    torch.save({}, model / "unet/diffusion_pytorch_model.bin")
    assert_same_weights(load_pretrained(model).network, network.state_dict())


def test_reads_legacy_attention_names(model: Path, network: UNet2D) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            for new, old in names.items():
                if f".{new}." in key:
                    state[key.replace(new, old)] = state.pop(key)

    edit_weights(model / "unet" / WEIGHTS, rename)
    stored = load_file(model / "unet" / WEIGHTS)
    assert "mid_block.attentions.0.proj_attn.weight" in stored
    assert_same_weights(load_pretrained(model).network, network.state_dict())

    twice = "mid_block.attentions.0.to_q.weight"
    edit_weights(model / "unet" / WEIGHTS, lambda state: state.update({twice: torch.zeros(32, 32)}))
    path = model / "unet" / WEIGHTS
    assert refusal(model) == f"{path} has {twice} twice, under its old name and its new one"


def test_labels_round_trip(tmp_path: Path) -> None:
    network = make_network(num_class_embeds=3)
    save_pretrained(tmp_path / "model", network, SCHEDULER, class_names=["cat", "dog"], null_label=2)
    read = load_pretrained(tmp_path / "model")
    assert (read.class_names, read.null_label) == (("cat", "dog"), 2)
    save_pretrained(tmp_path / "other", network, SCHEDULER, class_names=("a", "b", "c"))
    assert load_pretrained(tmp_path / "other").class_names == ("a", "b", "c")
    DDPMPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("labels", "message", "of_the_file"),
    [
        ({"null_label": 3}, "null_label is 3; accepted are integers from 0 to 2", None),
        (
            {"null_label": True},
            "null_label is True; accepted are integers from 0 to 2",
            "null_label must be an integer",
        ),
        (
            {"null_label": "2"},
            "null_label is '2'; accepted are integers from 0 to 2",
            "null_label must be an integer",
        ),
        ({"class_names": ["a"]}, "class_names has 1 entries; accepted are 3", None),
        ({"class_names": ["a", "b", "c"], "null_label": 2}, "class_names has 3 entries; accepted are 2", None),
        ({"class_names": "abc"}, "class_names is not a list of non-empty strings", "class_names must be a list"),
        ({"class_names": ["a", "", "c"]}, "class_names is not a list of non-empty strings", None),
        ({"class_names": ["a", 1, "c"]}, "class_names is not a list of non-empty strings", "class_names.1 must be a"),
    ],
)
def test_labels_are_checked(tmp_path: Path, labels: dict, message: str, of_the_file: str | None) -> None:
    network = make_network(num_class_embeds=3)
    with pytest.raises(CheckpointError) as caught:
        save_pretrained(tmp_path / "model", network, SCHEDULER, **labels)
    assert str(caught.value) == f"the arguments: {message}"
    assert os.listdir(tmp_path) == []
    save_pretrained(tmp_path / "model", network, SCHEDULER)
    (tmp_path / "model/stepfusion.json").write_text(json.dumps(labels))
    assert refusal(tmp_path / "model").startswith(f"{tmp_path / 'model/stepfusion.json'}: {of_the_file or message}")


def test_labels_need_classes(model: Path) -> None:
    path = model / "stepfusion.json"
    path.write_text('{"_note": "skipped", "null_label": 1}')
    message = "class_names or null_label is given, but the network has no class embedding"
    assert refusal(model) == f"{path}: {message}"
    path.write_text('{"labels": []}')
    assert refusal(model) == f"{path}: labels is unknown; accepted are class_names, null_label"


def test_bundled_names(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    model.rename(tmp_path / "models/fashion")
    (tmp_path / "models/__pycache__").mkdir()
    shutil.copytree(tmp_path / "models/fashion", tmp_path / "outside")
    monkeypatch.setattr(stepfusion.checkpoints.bundled, "MODELS", tmp_path / "models")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert bundled_models() == ("fashion",)
    assert load_pretrained("fashion").path == tmp_path / "models/fashion"
    for name in ("cifar", "Fashion", "fashion\0", "", "~", "__pycache__"):
        assert refusal(name) == f"{name!r} is neither a bundled model (fashion) nor a directory"
    assert refusal("../models/none") == "../models/none is missing"
    assert refusal("fashion/../../outside") == "fashion/../../outside is missing"
    assert refusal(Path("fashion")) == "fashion is missing"
    assert load_pretrained("../outside").path == Path("../outside")


def test_a_bundled_name_goes_before_a_directory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model, tmp_path / "models/both")
    shutil.copytree(model, tmp_path / "here/both")
    monkeypatch.setattr(stepfusion.checkpoints.bundled, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path / "here")
    assert load_pretrained("both").path == tmp_path / "models/both"
    assert load_pretrained("./both").path == Path("both")
    shutil.rmtree(tmp_path / "models")
    assert load_pretrained("both").path == Path("both")


def test_names_a_missing_file(model: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} is missing"
    assert refusal(model / "model_index.json") == f"{model / 'model_index.json'} is not a directory"
    weights = model / "unet" / WEIGHTS
    weights.unlink()
    assert refusal(model) == (
        f"{model / 'unet'} has no weights in a form that is read: {WEIGHTS}, a variant of it (.fp16.safetensors), "
        "shards with an .index.json file, or a .bin file"
    )
    (model / "scheduler/scheduler_config.json").unlink()
    assert refusal(model) == f"{model / 'scheduler/scheduler_config.json'} is missing"
    (model / "unet/config.json").unlink()
    assert refusal(model) == f"{model / 'unet/config.json'} is missing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b'{"a": NaN}', "is not JSON: NaN is not a finite number"),
        (b'{"a": -Infinity}', "is not JSON: -Infinity is not a finite number"),
        (b'{"a": 1e999}', "is not JSON: 1e999 is not a finite number"),
        (b"[1]", "holds a JSON list; accepted is an object"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "is larger than 1048576 bytes"),
    ],
    ids=["truncated", "nan", "inf", "1e999", "list", "large"],
)
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_names_bad_json(model: Path, name: str, text: bytes, message: str) -> None:
    (model / name).write_bytes(text)
    assert refusal(model) == f"{model / name} {message}"


@pytest.mark.parametrize("text", [b"\xff\xfe{", b"[" * 100_000, b"1" * 10_000], ids=["bytes", "deep", "digits"])
def test_hostile_json_is_refused(model: Path, text: bytes) -> None:
    (model / "unet/config.json").write_bytes(text)
    assert refusal(model).startswith(f"{model / 'unet/config.json'} is not JSON: ")


def test_names_a_bad_config_value(model: Path) -> None:
    path = model / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [16, 10**9]}))
    assert refusal(model) == (
        f"{path}: the UNet config has block_out_channels = [16, 1000000000]; accepted is a list of 1 to 16 entries, "
        "each an integer from 1 to 16384"
    )


def test_a_large_config_allocates_nothing(model: Path) -> None:
    """A config of 26 GB is compared with the file's header before any memory is taken for it."""
    path = model / "unet/config.json"
    changes = {"block_out_channels": [4096, 4096], "attention_head_dim": 64, "layers_per_block": 2}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB
    assert message.startswith(f"{model / 'unet' / WEIGHTS} does not fit its config: ")
    assert "misshapen (conv_in.weight [16, 3, 3, 3] instead of [4096, 3, 3, 3], " in message


def drop_key(state: dict[str, torch.Tensor]) -> None:
    del state[FIRST_KEY]


def add_keys(state: dict[str, torch.Tensor]) -> None:
    state.update({f"extra.{index}": torch.zeros(1) for index in range(5)})


def add_hostile_key(state: dict[str, torch.Tensor]) -> None:
    state["a\nb" + "c" * 1000] = torch.zeros(1)


def reshape(state: dict[str, torch.Tensor]) -> None:
    state[FIRST_KEY] = torch.zeros(16, 27)


def drop_and_reshape(state: dict[str, torch.Tensor]) -> None:
    drop_key(state)
    state["conv_out.bias"] = torch.zeros(4)


def make_integer(state: dict[str, torch.Tensor]) -> None:
    state[FIRST_KEY] = state[FIRST_KEY].to(torch.int32)


def put_nan(state: dict[str, torch.Tensor]) -> None:
    state[FIRST_KEY][3, 1, 2, 0] = float("nan")


def overflow_float32(state: dict[str, torch.Tensor]) -> None:
    state[FIRST_KEY] = torch.full((16, 3, 3, 3), 1e300, dtype=torch.float64)


BAD_WEIGHTS = [
    (drop_key, "does not fit its config: 1 missing (conv_in.weight)"),
    (add_keys, "does not fit its config: 5 unexpected (extra.0, extra.1, extra.2, ...)"),
    (add_hostile_key, "does not fit its config: 1 unexpected ('a\\nbcccccccc...ccccccccccccc')"),
    (reshape, "does not fit its config: 1 misshapen (conv_in.weight [16, 27] instead of [16, 3, 3, 3])"),
    (
        drop_and_reshape,
        "does not fit its config: 1 missing (conv_in.weight); 1 misshapen (conv_out.bias [4] instead of [3])",
    ),
]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        *BAD_WEIGHTS,
        (make_integer, "does not fit its config: 1 not floating point (conv_in.weight I32)"),
        (put_nan, "has values that are not finite"),
        (overflow_float32, "has values that are not finite"),
    ],
)
def test_names_wrong_safetensors(model: Path, edit: Callable, message: str) -> None:
    path = model / "unet" / WEIGHTS
    edit_weights(path, edit)
    given = refusal(model)
    assert given == (f"{path}: conv_in.weight {message}" if message.startswith("has") else f"{path} {message}")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        *BAD_WEIGHTS,
        (make_integer, "does not fit its config: 1 not floating point (conv_in.weight torch.int32)"),
        (put_nan, "has values that are not finite"),
    ],
)
def test_names_wrong_bin_weights(model: Path, edit: Callable, message: str) -> None:
    state = load_file(model / "unet" / WEIGHTS)
    edit(state)
    path = move_to_bin(model, state)
    given = refusal(model)
    assert given == (f"{path}: conv_in.weight {message}" if message.startswith("has") else f"{path} {message}")


def header_and_body(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def lie_about_shape(path: Path) -> bytes:
    header, body = header_and_body(path)
    header[FIRST_KEY]["shape"] = [16, 3, 3, 3000]
    return with_header(header, body)


def lie_about_offsets(path: Path) -> bytes:
    header, body = header_and_body(path)
    header[FIRST_KEY]["data_offsets"] = [0, 10**15]
    return with_header(header, body)


def unknown_dtype(path: Path) -> bytes:
    header, body = header_and_body(path)
    header[FIRST_KEY]["dtype"] = "F7"
    return with_header(header, body)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda path: b"",
        lambda path: path.read_bytes()[:-1],
        lambda path: path.read_bytes()[:100],
        lambda path: struct.pack("<Q", 2**60) + path.read_bytes()[8:],
        lambda path: b"\x00" * 1000,
        lambda path: path.read_bytes() + b"more",
        lie_about_shape,
        lie_about_offsets,
        unknown_dtype,
    ],
    ids=["empty", "short", "header cut", "header length", "zeros", "long", "shape", "offsets", "dtype"],
)
def test_names_corrupt_safetensors(model: Path, corrupt: Callable[[Path], bytes]) -> None:
    path = model / "unet" / WEIGHTS
    path.write_bytes(corrupt(path))
    assert refusal(model).startswith(f"{path} is not a complete safetensors file: ")


class Malice:
    """Unpickling this creates a file: the proof that code ran."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.target}",))


def test_a_pickle_is_never_executed(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "created"
    path = move_to_bin(model, {FIRST_KEY: Malice(target)})
    assert refusal(model) == f"{path} holds pickled code, which is never run; save a safetensors file"
    path.write_bytes(pickle.dumps({FIRST_KEY: Malice(target)}))
    assert refusal(model) == f"{path} is not a torch.save archive (a zip file); other pickles are never opened"
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # the negative control: it does create the file when it is executed


def test_names_other_bin_contents(model: Path) -> None:
    path = move_to_bin(model, [1, 2])
    assert refusal(model) == f"{path} holds a list; accepted is a state dict"
    torch.save({"state_dict": {FIRST_KEY: torch.zeros(1)}}, path)
    assert refusal(model) == f"{path}: 'state_dict' is not a name with a dense tensor, but dict"
    torch.save({FIRST_KEY: torch.zeros(1, device="meta")}, path)
    assert refusal(model) == f"{path}: 'conv_in.weight' is not a name with a dense tensor, but Tensor"
    torch.save({}, path)
    path.write_bytes(path.read_bytes()[:-40])
    assert refusal(model).startswith(f"{path} is not a torch.save archive")


def test_a_damaged_archive_is_refused(model: Path) -> None:
    path = move_to_bin(model)
    data = bytearray(path.read_bytes())
    data[60:400] = bytes(340)
    path.write_bytes(data)
    assert refusal(model).startswith(f"{path} ")


def raise_no_space(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["rename", "fsync", "mkdir"])
@pytest.mark.parametrize("before", ["nothing", "empty", "model"])
def test_a_failed_save_changes_nothing(
    tmp_path: Path, network: UNet2D, monkeypatch: pytest.MonkeyPatch, failing: str, before: str
) -> None:
    target = tmp_path / "model"
    if before == "empty":
        target.mkdir()
    elif before == "model":
        save_pretrained(target, network, SCHEDULER)
    other = make_network(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, raise_no_space)
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(target, other, SCHEDULER, overwrite=True)
    assert os.listdir(tmp_path) == ([] if before == "nothing" else ["model"])
    if before == "model":
        assert_same_weights(load_pretrained(target).network, network.state_dict())
    save_pretrained(target, other, SCHEDULER, overwrite=True)
    assert_same_weights(load_pretrained(target).network, other.state_dict())
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_last_rename_brings_the_old_directory_back(
    model: Path, network: UNet2D, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, rename = [], os.rename

    def fail_second(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise_no_space()
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_second)
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(model, make_network(seed=1), SCHEDULER, overwrite=True)
    assert len(calls) == 3
    assert os.listdir(model.parent) == ["model"]
    assert_same_weights(load_pretrained(model).network, network.state_dict())


def test_save_refuses_what_it_may_not_replace(model: Path, network: UNet2D, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        save_pretrained(model, network, SCHEDULER)
    assert str(caught.value) == f"directory {model} is not empty; give another directory, or overwrite=True"
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CheckpointError) as caught:
        save_pretrained(tmp_path / "file", network, SCHEDULER, overwrite=True)
    assert str(caught.value) == f"directory {tmp_path / 'file'} is not a directory"
    with pytest.raises(CheckpointError) as caught:
        save_pretrained(tmp_path / "a/b", network, SCHEDULER)
    assert str(caught.value) == f"directory {tmp_path / 'a/b'}: its parent is not a directory"
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]
    assert (tmp_path / "file").read_text() == "kept"


def test_save_checks_its_arguments(network: UNet2D, tmp_path: Path) -> None:
    def message(*args: object, **options: object) -> str:
        with pytest.raises(CheckpointError) as caught:
            save_pretrained(tmp_path / "model", *args, **options)
        return str(caught.value)

    assert message(UNet2DModel(**SMALL), SCHEDULER) == "network is a UNet2DModel; accepted are UNet2D and ContextUNet"
    assert message(network, None) == "scheduler_config is a NoneType; accepted is a dict"
    named = {"_class_name": 5}
    assert message(network, named) == "scheduler_config: _class_name is 5; accepted is a string"
    assert message(network, {"beta_start": float("nan")}).startswith("scheduler_config is not JSON: ")
    assert message(network, {"betas": torch.zeros(2)}).startswith("scheduler_config is not JSON: ")
    accepted = "torch.float64, torch.float32, torch.float16, torch.bfloat16"
    assert message(network, SCHEDULER, dtype=torch.int8) == f"dtype is torch.int8; accepted are {accepted}"
    with torch.no_grad():
        network.conv_in.weight[0, 0, 0, 0] = 1e6
    assert message(network, SCHEDULER, dtype=torch.float16) == (
        "network: conv_in.weight has values that are not finite in torch.float16"
    )
    assert os.listdir(tmp_path) == []


def test_atomic_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.bin"
    atomic_write(path, b"old")
    atomic_write(str(path), b"new")
    assert path.read_bytes() == b"new"
    for failing in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, raise_no_space)
            with pytest.raises(OSError, match="No space left"):
                atomic_write(path, b"never")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["data.bin"]


def test_atomic_directory_is_removed_when_its_block_fails(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as folder:
        fill(folder)
    assert os.listdir(tmp_path) == []


def test_new_files_have_the_usual_permissions(model: Path, tmp_path: Path) -> None:
    atomic_write(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (model / "unet" / WEIGHTS).stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert model.stat().st_mode == (tmp_path / "folder").stat().st_mode
