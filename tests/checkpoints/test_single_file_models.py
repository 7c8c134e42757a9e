"""Single files of Stable Diffusion are read as the pipelines that they were made of, with LoRA files and without."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import stepfusion as sf
from stepfusion.commands.arguments import open_engine
from stepfusion.commands.main import main
from stepfusion.commands.sample import add_sample_arguments
from stepfusion.latents import single_file as names
from stepfusion_testing.single_files import TinyFile
from stepfusion_testing.twins import assert_same_bits

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

Made = Callable[[str], TinyFile]
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    return lambda family: TinyFile(tmp_path, family, monkeypatch)


def opened(path: Path, **arguments: Any) -> sf.Engine:
    return sf.Engine.from_pretrained(path, device="cpu", network="eager", **arguments)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_makes_the_pipelines_latents(made: Made, family: str) -> None:
    file = made(family)
    path, given = file.write(), {"prediction": "v_prediction"} if family == "sd2" else {}
    pipeline = file.pipeline(given.get("prediction", "epsilon"))
    pipeline.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    engine = opened(path, **given)
    asked = {"num_inference_steps": 10, "guidance_scale": 4.0, "latents": x.clone()}
    theirs = pipeline("cat on dog", negative_prompt="on", **asked, output_type="latent").images
    ours = engine.sample(start=x, prompt="cat on dog", negative_prompt="on", guidance=4.0, sampler="ddim", steps=10)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    decoded = pipeline.vae.decode(ours / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(engine.decode_latents(ours), decoded, rtol=0, atol=1e-4)
    lines = engine.explain().splitlines()
    assert any(line.startswith("text encoder") and "CLIP, 3 layers of" in line for line in lines)
    assert any(line.startswith("decoder") and "AutoencoderKL, images 2 times as large" in line for line in lines)


def test_the_refiner_of_a_single_file_is_guided_away_from_a_low_score(made: Made) -> None:
    file = made("sdxl-refiner")
    pipeline = file.pipeline("epsilon")
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    ids = [torch.tensor([[16, 16, 0, 0, score]], dtype=torch.float32) for score in (6.0, 2.5)]
    engine = opened(file.write())
    for negative in ("on", None):
        states, null, pooled, null_pooled = pipeline.encode_prompt("cat", None, "cpu", 1, True, negative)
        latent = x.clone()
        pipeline.scheduler.set_timesteps(5)
        with torch.no_grad():
            for step in pipeline.scheduler.timesteps:
                given, none = (
                    pipeline.unet(
                        latent, step, text, added_cond_kwargs={"text_embeds": pool, "time_ids": numbers}
                    ).sample
                    for text, pool, numbers in zip((states, null), (pooled, null_pooled), ids, strict=True)
                )
                latent = pipeline.scheduler.step(none + 4.0 * (given - none), step, latent).prev_sample
        asked = {"negative_prompt": negative, "guidance": 4.0, "sampler": "ddim", "steps": 5}
        ours = engine.sample(start=x, prompt="cat", **asked)
        torch.testing.assert_close(ours, latent, rtol=0, atol=1e-3)


def test_without_tokenizers_a_model_takes_conditions_and_says_where_they_are_looked_for(
    made: Made,
) -> None:
    file = made("sd1")
    engine = opened(file.write())
    states = torch.randn(77, 32)
    given = {"conditions": {"encoder_hidden_states": states}}
    assert engine.sample(1, steps=2, **given).shape == (1, 4, 8, 8)
    assert (
        engine.sample(1, steps=2, guidance=2.0, null_conditions={"encoder_hidden_states": 0 * states}, **given)
        .isfinite()
        .all()
    )
    with pytest.raises(ValueError, match=r"prompt was given.* folder is missing: .*tokenizer; copy it"):
        engine.sample(1, steps=2, prompt="cat")
    with pytest.raises(ValueError, match="conditions must have 'encoder_hidden_states'"):
        engine.sample(1, steps=2)
    assert not engine.runners.takes_prompts
    assert list(sf.load_single_file(file.path).contents())
    assert f"holds no tokenizer, and its folder is missing: {file.path.parent / 'tokenizer'}" in engine.explain()


def test_what_sd2_predicts_must_be_said(made: Made) -> None:
    file = made("sd2")
    path = file.write()
    with pytest.raises(sf.CheckpointError, match=r"does not say what its network predicts.*give prediction="):
        opened(path)
    assert opened(path, prediction="epsilon").prediction == "epsilon"
    path.with_suffix(".json").write_text(json.dumps({"prediction_type": "v_prediction", "sample_size": 4}))
    engine = opened(path)
    assert (engine.prediction, engine.shape) == ("v_prediction", (4, 4, 4))
    path.with_suffix(".json").write_text(json.dumps({"prediction_type": "velocity"}))
    with pytest.raises(sf.CheckpointError, match="prediction_type must be one of"):
        opened(path)


def test_metadata_and_marks_in_a_file_are_read(made: Made) -> None:
    file = made("sd2")
    noted = {"modelspec.prediction_type": "v", "modelspec.resolution": "128x64"}
    engine = opened(file.write(metadata=noted))
    assert (engine.prediction, engine.shape) == ("v_prediction", (4, 8, 16))
    with pytest.raises(sf.CheckpointError, match=r"modelspec.prediction_type must be epsilon or v, got 'flow'"):
        opened(file.write(metadata={"modelspec.prediction_type": "flow"}))
    marked = opened(file.write(v_pred=torch.zeros(1), ztsnr=torch.zeros(1)))
    assert marked.prediction == "v_prediction"
    assert marked.schedule.alphas_cumprod[-1] == 0
    with pytest.raises(sf.CheckpointError, match="'edm_mean': its network is preconditioned as EDM has it"):
        opened(file.write(edm_mean=torch.zeros(4)))


def test_an_inpainting_file_is_known_by_its_first_convolution(made: Made) -> None:
    file = made("sd1")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    engine = opened(file.write(**{name: torch.randn(8, 9, 3, 3)}))
    assert [one.name for one in engine.spec.conditions] == ["encoder_hidden_states", "concatenated"]
    assert engine.shape == (4, 8, 8)


def test_files_that_do_not_fit_are_refused(made: Made) -> None:
    file = made("sd1")
    name = "model.diffusion_model.out.2.weight"
    with pytest.raises(sf.CheckpointError, match=r"does not fit its family sd1: 1 misshapen \(conv_out.weight"):
        opened(file.write(**{name: torch.zeros(3, 8, 3, 3)}))
    with pytest.raises(sf.CheckpointError, match=r"model.safetensors: the file \(sd1\) has the tensor 'control.x'"):
        opened(file.write(**{"control.x": torch.zeros(1)}))
    path = file.write()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(sf.CheckpointError, match="is not a complete safetensors file"):
        opened(path)


def test_a_file_without_text_encoders_takes_conditions(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made("sd1")
    file.tensors = {name: one for name, one in file.tensors.items() if not name.startswith("cond_stage")}
    monkeypatch.setitem(names._BY_CONTEXT, 32, "sd1")
    file.tokenizers()
    engine = opened(file.write())
    with pytest.raises(ValueError, match="the file has no text_encoder: give conditions, as tensors"):
        engine.sample(1, steps=1, prompt="cat")


# LoRA


def lora(path: Path, network: Any, text: Any = None) -> tuple[Path, dict[str, Tensor]]:
    """A file of LoRA weights for a query of the UNet, and of the text encoder, and the products by module."""
    tensors, products = {}, {}
    for prefix, module, state in (("unet", QUERY, network), ("text_encoder", TEXT, text)):
        if state is not None:
            name = module.removeprefix("text_model.") + ".weight"
            weight = next(one for key, one in state.state_dict().items() if key.endswith(name))
            down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
            tensors |= {f"{prefix}.{module}.lora_A.weight": down, f"{prefix}.{module}.lora_B.weight": up}
            products[prefix] = up @ down
    save_file(tensors, path)
    return path, products


def test_lora_files_are_added_to_a_single_files_weights(made: Made, tmp_path: Path) -> None:
    file = made("sd1")
    path = file.write()
    first, one = lora(tmp_path / "first.safetensors", file.unet, file.texts["text_encoder"])
    second, two = lora(tmp_path / "second.safetensors", file.unet)
    weight = file.unet.state_dict()[QUERY + ".weight"]
    for given, wanted in (
        (first, weight + one["unet"]),
        ([first, (second, 0.5)], weight + one["unet"] + 0.5 * two["unet"]),
        ({str(second): -1, str(first): 0.25}, weight - two["unet"] + 0.25 * one["unet"]),
    ):
        merged = sf.load_single_file(path, lora=given).network.state_dict()
        torch.testing.assert_close(merged.pop(QUERY + ".weight"), wanted, rtol=0, atol=1e-6)
        for name, tensor in merged.items():
            assert torch.equal(tensor, file.unet.state_dict()[name]), name
    file.tokenizers()
    states = []
    for arguments in ({}, {"lora": first}):
        text = sf.load_single_file(path, **arguments).parts.text
        assert text is not None
        states.append(text.encode("cat")["encoder_hidden_states"])
    with torch.no_grad():
        query = next(
            w for n, w in file.texts["text_encoder"].named_parameters() if n.endswith(TEXT[-25:] + ".weight")
        )
        query.add_(one["text_encoder"])
        tokens = transformers.CLIPTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
        ids = tokens("cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
        torch.testing.assert_close(states[1], file.texts["text_encoder"](ids)[0][0], rtol=0, atol=1e-4)
    assert not torch.allclose(*states, atol=1e-3)


def test_lora_files_that_do_not_fit_are_refused(made: Made, tmp_path: Path) -> None:
    file = made("sd1")
    path = file.write()
    for name, sentence in (
        ("unet.other.lora_A.weight", "has 'unet.other.lora_A.weight', and the unet has no weight for it"),
        ("text_encoder.other.lora_A.weight", "and the text_encoder has no weight for it"),
        (f"lora_te2_{TEXT.replace('.', '_')}.lora_down.weight", "and the pipeline has no text_encoder_2"),
        ("unet.x.hada_w1_a", "which is not known"),
    ):
        save_file({name: torch.ones(2, 2)}, tmp_path / "lora.safetensors")
        with pytest.raises(sf.CheckpointError, match=sentence) as caught:
            opened(path, lora=tmp_path / "lora.safetensors")
        assert str(tmp_path / "lora.safetensors") in str(caught.value)
    with pytest.raises(sf.CheckpointError, match=r"missing.safetensors is missing"):
        opened(path, lora="missing.safetensors")
    for given, sentence in (
        (3, "lora must be a path, several, or scales by path, got int"),
        (("a.safetensors", 0.5), "lora must name files, each with a scale or without, got 0.5"),
        ({"a.safetensors": "strong"}, "the scale of a LoRA must be a number"),
    ):
        with pytest.raises(TypeError, match=sentence):
            opened(path, lora=given)
    loaded = sf.load_single_file(path)
    with pytest.raises(ValueError, match="lora cannot be added to a model that was read already"):
        opened(loaded, lora="a.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora cannot be added to files of EDM and of guided-diffusion"):
        opened(tmp_path / "model.pt", lora="a.safetensors")


def test_lora_files_are_added_to_a_directory(made: Made, tmp_path: Path) -> None:
    file = made("sd1")
    file.pipeline("epsilon").save_pretrained(tmp_path / "model")
    added, products = lora(tmp_path / "lora.safetensors", file.unet, file.texts["text_encoder"])
    model = sf.load_pretrained(tmp_path / "model", lora={added: 0.5})
    wanted = file.unet.state_dict()[QUERY + ".weight"] + 0.5 * products["unet"]
    torch.testing.assert_close(model.network.state_dict()[QUERY + ".weight"], wanted, rtol=0, atol=1e-6)
    single = sf.load_single_file(file.write(), lora={added: 0.5})
    assert model.parts.text is not None
    assert single.parts.text is not None
    ours, theirs = model.parts.text.encode("dog"), single.parts.text.encode("dog")
    assert_same_bits("states", ours["encoder_hidden_states"], theirs["encoder_hidden_states"])


def test_a_command_takes_single_files_and_lora(made: Made, tmp_path: Path) -> None:
    file = made("sd1")
    added, products = lora(tmp_path / "style:1.safetensors", file.unet)
    parser = argparse.ArgumentParser()
    add_sample_arguments(parser)
    words = [str(file.write()), "--device", "cpu", "--network", "eager"]
    engine = open_engine(parser.parse_args([*words, "--lora", f"{added}:0.5,{added}"]))
    wanted = file.unet.state_dict()[QUERY + ".weight"] + 1.5 * products["unet"]
    assert isinstance(engine.network, torch.nn.Module)
    torch.testing.assert_close(engine.network.state_dict()[QUERY + ".weight"], wanted, rtol=0, atol=1e-6)
    assert torch.equal(
        open_engine(parser.parse_args(words)).network.state_dict()[QUERY + ".weight"],  # type: ignore[union-attr]
        file.unet.state_dict()[QUERY + ".weight"],
    )
    with pytest.raises(ValueError, match="--lora must be files, each with a number after a colon"):
        open_engine(parser.parse_args([*words, "--lora", "a.safetensors:strong"]))


def test_commands_say_where_a_tokenizer_is_missing(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(made("sd1").write())
    assert main(["sample", path, "-n", "1", "--steps", "1", "--prompt", "cat", "--device", "cpu"]) == 1
    assert "--prompt was given, and this model has no text encoder: a single file holds" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("cat\n")
    words = ["generate", path, "--prompts", "prompts.txt", "--num", "1", "--out", "out", "--devices", "cpu"]
    assert main(words) == 1
    assert "has no text encoder: a single file holds no tokenizer" in capsys.readouterr().err
    assert main(["show", "model", path]) == 0
    assert "text encoder none: a single file holds no tokenizer" in capsys.readouterr().out


def test_a_command_makes_pictures_of_a_single_file(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = made("sd1")
    file.tokenizers()
    lora(tmp_path / "style.safetensors", file.unet)
    file.write()
    words = [
        "sample",
        "model.safetensors",
        "--prompt",
        "cat",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--network",
        "eager",
    ]
    assert main([*words, "--out", "plain.png"]) == 0
    assert main([*words, "--out", "styled.png", "--lora", "style.safetensors:0.5"]) == 0
    assert main(["show", "metadata", "styled.png"]) == 0
    assert "--lora style.safetensors:0.5" in capsys.readouterr().out
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "styled.png").read_bytes()
