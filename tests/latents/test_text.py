"""Prompts become the conditions that diffusers' pipelines give their networks."""

from __future__ import annotations

import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfusion.errors import CheckpointError
from stepfusion.latents.clip import TextModel
from stepfusion.latents.text import TextEncoder, TextPart
from stepfusion.latents.tokenizer import read_tokenizer
from stepfusion_testing.latent_models import text_model, write_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ("cat", "", "A  cat sat on\nthe dog, 'tis 42 étés! 猫 <|endoftext|> dog!", "!" * 20)


def part(directory: Path, model: Any) -> TextPart:
    return TextPart(directory, model.config.to_dict(), model.state_dict())


def theirs(directory: Path) -> Any:
    return transformers.CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers as SD1, SD2 and SDXL's second have them, and one in a single file."""
    root = tmp_path_factory.mktemp("tokenizers")
    kinds: dict[str, dict[str, Any]] = {
        "sd1": {},
        "sd2": {"pad": "!"},
        "xl": {"pad": "!", "style": "new"},
        "whole": {"style": "whole"},
    }
    return {name: write_tokenizer(root / name, **options) for name, options in kinds.items()}


@pytest.mark.parametrize("name", ["sd1", "sd2", "xl", "whole"])
def test_tokens_are_those_of_transformers(directories: dict[str, Path], name: str) -> None:
    ours, reference = read_tokenizer(directories[name], 77), theirs(directories[name])
    assert ours.model_max_length == 77
    assert ours.pad_token == ("!" if name in ("sd2", "xl") else "<|endoftext|>")
    for prompt in (*PROMPTS, "cat sat " * 60):
        options = {"padding": "max_length", "max_length": 77, "truncation": True}
        assert ours(prompt, **options)["input_ids"] == reference(prompt, **options)["input_ids"], prompt


def sd_pipeline(directory: Path, model: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=model,
        tokenizer=theirs(directory),
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_prompt_of_stable_diffusion_is_that_of_its_pipeline(directories: dict[str, Path], name: str) -> None:
    model = text_model()
    encoder = TextEncoder.from_parts(part(directories[name], model))
    pipeline = sd_pipeline(directories[name], model)
    for prompt in PROMPTS:
        wanted, null = pipeline.encode_prompt(prompt, "cpu", 1, True)
        given = encoder.encode(prompt)
        assert list(given) == ["encoder_hidden_states"]
        torch.testing.assert_close(given["encoder_hidden_states"], wanted[0])
        torch.testing.assert_close(encoder.null()["encoder_hidden_states"], null[0])
    assert encoder.shapes == {"encoder_hidden_states": (77, 32)}
    states = model(
        theirs(directories[name])("cat", padding="max_length", return_tensors="pt").input_ids,
        output_hidden_states=True,
    )
    skipped = encoder.encode("cat", clip_skip=1)["encoder_hidden_states"]
    torch.testing.assert_close(skipped, model.final_layer_norm(states.hidden_states[-2])[0])


@pytest.mark.parametrize("zeros", [True, False])
def test_a_prompt_of_sdxl_is_that_of_its_pipeline(directories: dict[str, Path], zeros: bool) -> None:
    models = text_model(), text_model(projection=24, size=48, eos=2)
    tokenizers = directories["sd1"], directories["xl"]
    encoder = TextEncoder.from_parts(*map(part, tokenizers, models), zeros_for_empty=zeros)
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=models[0],
        text_encoder_2=models[1],
        tokenizer=theirs(tokenizers[0]),
        tokenizer_2=theirs(tokenizers[1]),
        unet=None,
        scheduler=None,
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    assert encoder.shapes == {"encoder_hidden_states": (77, 80), "text_embeds": (24,)}
    for prompt, prompt_2, skip in (("cat", None, None), ("cat on dog!", "dog", None), ("dog", None, 1)):
        wanted, null, pooled, null_pooled = pipeline.encode_prompt(prompt, prompt_2, "cpu", 1, True, clip_skip=skip)
        given = encoder.encode(prompt, prompt_2, clip_skip=skip)
        torch.testing.assert_close(given["encoder_hidden_states"], wanted[0])
        torch.testing.assert_close(given["text_embeds"], pooled[0])
        none = encoder.null()
        torch.testing.assert_close(none["encoder_hidden_states"], null[0])
        torch.testing.assert_close(none["text_embeds"], null_pooled[0])
        assert bool((none["text_embeds"] == 0).all()) is zeros


def test_the_refiner_has_one_model_that_projects(directories: dict[str, Path]) -> None:
    encoder = TextEncoder.from_parts(part(directories["xl"], text_model(projection=24)))
    assert {name: value.shape for name, value in encoder.encode("cat").items()} == {
        "encoder_hidden_states": (77, 32),
        "text_embeds": (24,),
    }


def test_a_long_prompt_is_cut_as_in_diffusers_with_a_warning(directories: dict[str, Path]) -> None:
    model = text_model()
    encoder = TextEncoder.from_parts(part(directories["sd1"], model))
    prompt = "cat " * 75 + "sat on dog"
    for _ in range(2):  # the second is kept, and warns too
        with pytest.warns(UserWarning, match=r"more than 77 tokens; cut off was 'sat on dog'"):
            given = encoder.encode(prompt)
    wanted, _ = sd_pipeline(directories["sd1"], model).encode_prompt(prompt, "cpu", 1, False)
    torch.testing.assert_close(given["encoder_hidden_states"], wanted[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode("cat " * 75)


def test_lately_encoded_prompts_are_kept(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = TextModel.forward

    def counted(self: TextModel, tokens: Tensor) -> Any:
        calls.append(1)
        return forward(self, tokens)

    monkeypatch.setattr(TextModel, "forward", counted)
    encoder = TextEncoder.from_parts(part(directories["sd1"], text_model()), cache=2)
    first = encoder.encode("cat")["encoder_hidden_states"]
    before = first.clone()
    first.zero_()
    assert torch.equal(encoder.encode("cat")["encoder_hidden_states"], before)
    assert len(calls) == 1
    for prompt in ("dog", "cat", "sat", "cat", "dog"):  # "dog" was the one that was not asked for
        encoder.encode(prompt)
    assert len(calls) == 4
    found = []
    threads = [threading.Thread(target=lambda: found.append(encoder.encode("on cat"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one["encoder_hidden_states"], found[0]["encoder_hidden_states"]) for one in found)


def test_nothing_is_asked_of_a_network(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: asked.append(arguments))
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    for name in directories:
        TextEncoder.from_parts(part(directories[name], text_model(layers=1))).encode("cat")
    assert asked == []


def test_ambient_settings_change_nothing(directories: dict[str, Path]) -> None:
    model = part(directories["sd1"], text_model())
    wanted = TextEncoder.from_parts(model).encode("cat")["encoder_hidden_states"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        given = TextEncoder.from_parts(model).encode("cat")["encoder_hidden_states"]
    assert torch.equal(given, wanted)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (7, "prompt must be a text, got int"),
        (["cat"], "prompt must be a text, got list"),
        ("a\0b", "prompt must have no NUL character, got one at 1"),
        ("x" * 10_001, "prompt must have at most 10000 characters, got 10001"),
        ("cat \ud800", "prompt must be text that UTF-8 can hold"),
    ],
)
def test_prompts_that_are_none_are_refused(directories: dict[str, Path], prompt: Any, sentence: str) -> None:
    encoder = TextEncoder.from_parts(part(directories["sd1"], text_model(layers=1)))
    with pytest.raises(ValueError, match=sentence):
        encoder.encode(prompt)
    with pytest.raises(ValueError, match="prompt_2 is for a second text encoder"):
        encoder.encode("cat", "dog")
    with pytest.raises(ValueError, match="clip_skip must be in"):
        encoder.encode("cat", clip_skip=2)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("vocab.json", "[]", "accepted is an object"),
        ("vocab.json", '{"a": 1.5}', "the number of 'a' must be in"),
        ("vocab.json", '{"a": 1, "b": 1}', "the same number"),
        ("vocab.json", '{"a": 1}', "cannot be built"),
        ("merges.txt", "a b c\n", "a merge must be a pair of tokens"),
        ("tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}', "tokenizer_class must be"),
        ("tokenizer_config.json", '{"padding_side": "left"}', "padding_side must be 'right'"),
        ("tokenizer_config.json", '{"model_max_length": "77"}', "model_max_length"),
        ("tokenizer_config.json", '{"bos_token": 3}', "a special token must be a text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": "a"}}', "number of an added token"),
        ("added_tokens.json", '{"<new>": 600}', "added tokens are not implemented"),
        ("tokenizer.json", "{}", "must have a model of the type BPE"),
    ],
)
def test_tokenizer_files_that_are_wrong_are_named(tmp_path: Path, file: str, content: str, sentence: str) -> None:
    directory = write_tokenizer(tmp_path / "tokenizer")
    (directory / "special_tokens_map.json").unlink()
    (directory / file).write_text(content)
    with pytest.raises(CheckpointError, match=sentence):
        read_tokenizer(directory, 77)


def test_a_tokenizer_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer: accepted is tokenizer.json"):
        read_tokenizer(tmp_path, 77)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architectures": ["T5EncoderModel"]}, "architectures of a text encoder must be one of"),
        ({"architectures": None}, "architectures"),
        ({"model_type": "t5"}, "model_type"),
        ({"hidden_size": 30}, "multiple of num_attention_heads"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be an integer"),
        ({"num_hidden_layers": 4}, "lacks the tensor 'encoder.layers.3"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of"),
        ({"use_attention_mask": True}, "use_attention_mask"),
    ],
)
def test_a_text_config_that_does_not_fit_is_refused(change: dict[str, Any], sentence: str) -> None:
    model = text_model()
    with pytest.raises(CheckpointError, match=sentence):
        TextModel({**model.config.to_dict(), **change}, model.state_dict())


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("projection", [None, 16])
def test_weights_are_found_with_the_prefix_and_without(prefix: str, projection: int | None) -> None:
    model = text_model(projection=projection)
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    named = {name if name.startswith("text_projection") else prefix + name: tensor for name, tensor in state.items()}
    named[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    ours = TextModel(model.config.to_dict(), named)
    tokens = torch.tensor([1, 2, 3])
    torch.testing.assert_close(ours(tokens).last, model(tokens[None]).last_hidden_state[0])
    assert not any(t.is_meta for t in (*ours.parameters(), *ours.buffers()))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(directories: dict[str, Path]) -> None:
    model = text_model()
    config = {**model.config.to_dict(), "vocab_size": 100}
    name = next(name for name in model.state_dict() if name.endswith("token_embedding.weight"))
    state = {**model.state_dict(), name: model.state_dict()[name][:100]}
    with pytest.raises(CheckpointError, match="its text encoder has vocab_size 100"):
        TextEncoder.from_parts(TextPart(directories["sd1"], config, state))


def test_models_in_the_wrong_order_are_refused(directories: dict[str, Path]) -> None:
    plain, projecting = part(directories["sd1"], text_model()), part(directories["xl"], text_model(projection=8))
    for wrong in ([projecting, plain], [plain, plain], [projecting, projecting]):
        with pytest.raises(CheckpointError, match="the second one must have a projection"):
            TextEncoder.from_parts(*wrong)


def test_without_transformers_a_sentence_says_what_to_install(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = part(directories["sd1"], text_model())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"needs the package 'transformers': pip install stepfusion\[latent\]"):
        TextEncoder.from_parts(model)
