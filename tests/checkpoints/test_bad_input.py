"""Bad input to checkpoints: each mistake's error to the letter, before any work, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import stepfusion as sf
from stepfusion_testing.bad_input import (
    DEVICES,
    MODELS,
    NAN,
    WEIGHTS,
    Case,
    check_case,
    config_with,
    facts_with,
    full_at_last,
    full_disk,
    network,
    pickled_code,
    scheduler_with,
    tree,
    truncate,
    weights_with,
    write,
)
from stepfusion_testing.tiny_model import SCHEDULER, tiny_network

pytestmark = pytest.mark.usefixtures("bad_input_workspace")


# fmt: off
CHECKPOINTS = [
    Case("model name: with ../", lambda: sf.load_pretrained("../models/fashion-mnist"),
         sf.CheckpointError, "../models/fashion-mnist is missing"),
    Case("model name: of a hub", lambda: sf.load_pretrained("google/ddpm-cifar10-32"),
         sf.CheckpointError, "google/ddpm-cifar10-32 is missing; nothing is downloaded: if it is a repository of the "
         "Hugging Face hub, get its files with `hf download google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32`, "
         "and name the directory ddpm-cifar10-32"),
    Case("model name: of no folder", lambda: sf.load_pretrained("model/none"),
         sf.CheckpointError, "model/none is missing"),
    Case("model name: unknown", lambda: sf.load_pretrained("imagenet"),
         sf.CheckpointError, f"'imagenet' is neither a bundled model ({MODELS}) nor a directory"),
    Case("model name: empty", lambda: sf.load_pretrained(""),
         sf.CheckpointError, f"'' is neither a bundled model ({MODELS}) nor a directory"),
    Case("model name: a file", lambda: sf.load_pretrained("model/unet/config.json"),
         sf.CheckpointError, "model/unet/config.json is not a directory"),
    Case("config: missing", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet/config.json is missing",
         lambda: Path("model/unet/config.json").unlink()),
    Case("config: no JSON", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet/config.json is not JSON: Expecting ...",
         write("model/unet/config.json", b"{'sample_size': 8}")),
    Case("config: a list", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet/config.json holds a JSON list; accepted is an object",
         write("model/unet/config.json", b"[]")),
    Case("config: huge", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet/config.json is larger than 1048576 bytes",
         write("model/unet/config.json", b" " * (1 << 20) + b"{}")),
    Case("config: unknown key", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/config.json: the UNet config has the unknown key 'chanels'; accepted are act_fn, "
        "add_attention, attention_head_dim, attn_norm_num_groups, block_out_channels, center_input_sample, "
        "class_embed_type, down_block_types, downsample_padding, downsample_type, dropout, flip_sin_to_cos,"
        " freq_shift, in_channels, layers_per_block, mid_block_scale_factor, mid_block_type, norm_eps, "
        "norm_num_groups, num_class_embeds, num_train_timesteps, out_channels, resnet_time_scale_shift, "
        "sample_size, time_embedding_dim, time_embedding_type, up_block_types, upsample_type",
         config_with(chanels=3)),
    Case("config: NaN channels", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet/config.json is not JSON: NaN is not a finite number",
         config_with(in_channels=NAN)),
    Case("config: 10**9 channels", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/config.json: the UNet config has block_out_channels = [1000000000]; accepted is a list "
        "of 1 to 16 entries, each an integer from 1 to 16384",
         config_with(block_out_channels=[10**9])),
    Case("config: too many weights", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/config.json: the UNet config describes 144,153,198,593 parameters; accepted are at most"
        " 10,000,000,000",
         config_with(block_out_channels=[16384], layers_per_block=8)),
    Case("config: bool channels", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/config.json: the UNet config has in_channels = True; accepted is an integer from 1 to "
        "16384",
         config_with(in_channels=True)),
    Case("config: other class", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/config.json: the UNet config has _class_name = 'UNet3DConditionModel'; accepted is "
        "'UNet2DModel'",
         config_with(_class_name="UNet3DConditionModel")),
    Case("class names: too few", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/stepfusion.json: class_names has 1 entries; accepted are 3",
         facts_with(class_names=["Cat"])),
    Case("null label: out of range", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/stepfusion.json: null_label is 4; accepted are integers from 0 to 3",
         facts_with(null_label=4)),
    Case("facts: unknown key", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/stepfusion.json: author is unknown; accepted are class_names, null_label",
         facts_with(author="me")),
    Case("weights: none", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet has no weights in a form that is read: diffusion_pytorch_model.safetensors, "
        "a variant of it (.fp16.safetensors), shards with an .index.json file, or a .bin file",
         WEIGHTS.unlink),
    Case("weights: one missing", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors does not fit its config: 1 missing (conv_in.weight)",
         weights_with(lambda state: state.pop("conv_in.weight"))),
    Case("weights: one extra", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors does not fit its config: 1 unexpected (extra)",
         weights_with(lambda state: state.update(extra=torch.zeros(1)))),
    Case("weights: one misshapen", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors does not fit its config: 1 misshapen (conv_in.bias "
        "[7] instead of [8])",
         weights_with(lambda state: state.update({"conv_in.bias": torch.zeros(7)}))),
    Case("weights: integers", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors does not fit its config: 1 not floating point "
        "(conv_in.bias I64)",
         weights_with(lambda state: state.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)}))),
    Case("weights: NaN", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors: conv_in.bias has values that are not finite",
         weights_with(lambda state: state["conv_in.bias"].fill_(NAN))),
    Case("weights: truncated", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors is not a complete safetensors file: ...",
         truncate),
    Case("weights: empty file", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors is not a complete safetensors file: ...",
         write(WEIGHTS, b"")),
    Case("weights: code in an archive", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.bin holds pickled code, which is never run; save a safetensors "
        "file",
         pickled_code(archive=True)),
    Case("weights: a bare pickle with code", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.bin is not a torch.save archive (a zip file); other pickles are"
        " never opened",
         pickled_code(archive=False)),
    Case("scheduler: missing", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError, "model/scheduler/scheduler_config.json is missing",
         lambda: shutil.rmtree("model/scheduler")),
    Case("scheduler: unknown key", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError, "scheduler config: unknown keys: 'beta_shedule'",
         scheduler_with(beta_shedule="linear")),
    Case("scheduler: unknown schedule", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError,
         "scheduler config: beta_schedule must be one of 'linear', 'scaled_linear', 'squaredcos_cap_v2', "
        "'sigmoid', got 'wavy'",
         scheduler_with(beta_schedule="wavy")),
    Case("scheduler: unknown prediction", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError,
         "scheduler config: prediction_type must be one of 'epsilon', 'sample', 'v_prediction', got 'flow'",
         scheduler_with(prediction_type="flow")),
    Case("scheduler: thresholding at no quantile", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError,
         "scheduler config: dynamic_thresholding_ratio must be a finite number in (0, inf], got 0.0",
         scheduler_with(thresholding=True, dynamic_thresholding_ratio=0)),
    Case("scheduler: NaN clip", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError, "model/scheduler/scheduler_config.json is not JSON: NaN is not a finite number",
         scheduler_with(clip_sample_range=NAN)),
    Case("from_pretrained: device", lambda: sf.Engine.from_pretrained("model", device="quantum"),
         ValueError, f"device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'quantum'"),
    Case("save: no network", lambda: sf.save_pretrained("new", network, SCHEDULER),
         sf.CheckpointError, "network is a function; accepted are UNet2D and ContextUNet"),
    Case("save: directory in use", lambda: sf.save_pretrained("model", tiny_network(), SCHEDULER),
         sf.CheckpointError, "directory CWD/model is not empty; give another directory, or overwrite=True"),
    Case("save: no parent", lambda: sf.save_pretrained("no/where", tiny_network(), SCHEDULER),
         sf.CheckpointError, "directory no/where: its parent is not a directory"),
    Case("save: null label", lambda: sf.save_pretrained("new", tiny_network(), SCHEDULER, null_label=9),
         sf.CheckpointError, "the arguments: null_label is 9; accepted are integers from 0 to 3"),
    Case("save: int8", lambda: sf.save_pretrained("new", tiny_network(), SCHEDULER, dtype=torch.int8),
         sf.CheckpointError,
         "dtype is torch.int8; accepted are torch.float64, torch.float32, torch.float16, torch.bfloat16"),
    Case("save: NaN in the scheduler",
         lambda: sf.save_pretrained("new", tiny_network(), {"clip_sample_range": NAN}),
         sf.CheckpointError, "scheduler_config is not JSON: ..."),
]

# fmt: on


@pytest.mark.parametrize("disk", [full_disk, full_at_last])
def test_a_full_disk_when_a_model_is_saved(
    disk: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree()
    disk(monkeypatch)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        sf.save_pretrained("new", tiny_network(), SCHEDULER)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        sf.save_pretrained("model", tiny_network(), SCHEDULER, overwrite=True)
    assert tree() == before


@pytest.mark.usefixtures("no_network_call")
@pytest.mark.parametrize("case", CHECKPOINTS, ids=lambda case: case.name)
def test_a_call(case: Case) -> None:
    check_case(case)
