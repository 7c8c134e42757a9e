"""LoRA weights of every form are added to the weights that they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfusion.errors import CheckpointError
from stepfusion.latents.lora import METADATA_KEY, merge_lora
from stepfusion_testing.latent_models import condition_unet, text_model
from stepfusion_testing.ldm_files import ldm_unet

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.1.conv1"
IN = "mid_block.attentions.0.proj_in"
TEXT = "encoder.layers.1.self_attn.q_proj"

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def parts() -> dict[str, State]:
    return {
        "unet": condition_unet().state_dict(),
        "text_encoder": text_model().state_dict(),
        "text_encoder_2": text_model(projection=8).state_dict(),
    }


def pair(weight: Tensor, rank: int = 3, *, matrix: bool = False) -> tuple[Tensor, Tensor]:
    """A [r, I, ...] and B [O, r, 1, ...] for a weight; as matrices for a 1x1 convolution if ``matrix``."""
    down = torch.randn(rank, *weight.shape[1:])
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2))
    return (down.flatten(1), up.flatten(1)) if matrix else (down, up)


def formula(weight: Tensor, down: Tensor, up: Tensor, factor: float) -> Tensor:
    if down.ndim == 2:
        return weight + factor * (up @ down).reshape(weight.shape)
    return weight + factor * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)


def key_in(state: State, module: str) -> str:
    return next(key for key in state if key in (f"{module}.weight", f"text_model.{module}.weight"))


FORMS: dict[str, tuple[str, str, str]] = {
    "peft": ("{}.lora_A.weight", "{}.lora_B.weight", "{}.alpha"),
    "adapter": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", "{}.alpha"),
    "2023": ("{}.lora.down.weight", "{}.lora.up.weight", "{}.alpha"),
    "linear layer": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight", "{}.alpha"),
    "kohya": ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha"),
}


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_added_by_the_formula(parts: dict[str, State], form: str, alpha: float | None) -> None:
    modules = {"unet": (QUERY, OUT, CONV, IN), "text_encoder": (TEXT,), "text_encoder_2": (TEXT,)}
    prefixes = {"unet": "unet.", "text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."}
    if form == "kohya":
        prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    lora, wanted = {}, {part: dict(state) for part, state in parts.items()}
    for part, names in modules.items():
        for name in names:
            key = key_in(parts[part], name)
            down, up = pair(parts[part][key], matrix=name == IN)
            inside = name if part == "unet" else "text_model." + name
            module = prefixes[part] + (inside.replace(".", "_") if form == "kohya" else inside)
            tensors = [down, up] if alpha is None else [down, up, torch.tensor(alpha)]
            lora |= {form.format(module): tensor for form, tensor in zip(FORMS[form], tensors, strict=False)}
            factor = 0.5 * (1 if alpha is None else alpha / 3)
            wanted[part][key] = formula(parts[part][key], down, up, factor)
    merged = merge_lora(parts, lora, scale=0.5)
    for part, state in wanted.items():
        assert merged[part].keys() == state.keys()
        changed = {key for key in state if merged[part][key] is not parts[part][key]}
        assert changed == {key_in(parts[part], name) for name in modules[part]}
        for key in changed:
            torch.testing.assert_close(merged[part][key], state[key])


def test_attention_processors_of_2023_are_read(parts: dict[str, State]) -> None:
    attention = QUERY.removesuffix(".to_q")
    lora, wanted = {}, {}
    for name, module in (("to_q", QUERY), ("to_out", attention + ".to_out.0")):
        down, up = pair(parts["unet"][module + ".weight"])
        key = f"{attention}.processor.{name}_lora"
        lora |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        wanted[module + ".weight"] = formula(parts["unet"][module + ".weight"], down, up, 1)
    text = parts["text_encoder"]
    down, up = pair(text[key_in(text, TEXT)])
    old = "text_encoder.text_model." + TEXT.removesuffix("q_proj") + "to_q_lora"
    lora |= {f"{old}.down.weight": down, f"{old}.up.weight": up}
    merged = merge_lora(parts, lora)
    for key, tensor in wanted.items():
        torch.testing.assert_close(merged["unet"][key], tensor)
    torch.testing.assert_close(
        merged["text_encoder"][key_in(text, TEXT)], formula(text[key_in(text, TEXT)], down, up, 1)
    )


@pytest.mark.parametrize("large", [False, True])
def test_every_weight_is_found_under_the_names_of_compvis(large: bool) -> None:
    state = condition_unet(large=large).state_dict()
    lora, modules = {}, []
    for old, new in zip(ldm_unet(state, 2), state, strict=True):
        if new.endswith(".weight") and state[new].ndim in (2, 4):
            down, up = pair(state[new], 1)
            flat = "lora_unet_" + old.removesuffix(".weight").replace(".", "_")
            lora |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            modules.append((new, formula(state[new], down, up, 1)))
    merged = merge_lora({"unet": state}, lora)["unet"]
    assert len(modules) > 50
    for key, wanted in modules:
        torch.testing.assert_close(merged[key], wanted)


def test_adding_and_taking_away_leaves_the_weights(parts: dict[str, State]) -> None:
    down, up = pair(parts["unet"][QUERY + ".weight"])
    lora = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    there = merge_lora(parts, lora, scale=1.5)
    back = merge_lora(there, lora, scale=-1.5)
    torch.testing.assert_close(back["unet"][QUERY + ".weight"], parts["unet"][QUERY + ".weight"])
    half = {"unet": {key: tensor.half() for key, tensor in parts["unet"].items()}}
    assert merge_lora(half, lora)["unet"][QUERY + ".weight"].dtype == torch.float16


@pytest.mark.parametrize(("root", "factor"), [(False, 6 / 4), (True, 6 / 2)])
def test_alpha_in_the_metadata_of_diffusers_counts(parts: dict[str, State], root: bool, factor: float) -> None:
    weight = parts["unet"][QUERY + ".weight"]
    down, up = pair(weight, 4)
    lora = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    noted = {"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": root, "unet.alpha_pattern": {}}
    merged = merge_lora(parts, lora, metadata={METADATA_KEY: json.dumps(noted)})
    torch.testing.assert_close(merged["unet"][QUERY + ".weight"], formula(weight, down, up, factor))
    for wrong, sentence in (
        (json.dumps({**noted, "unet.use_dora": True}), "use_dora"),
        (json.dumps({**noted, "unet.lora_alpha": "6"}), "lora_alpha must be"),
        ("{", "is not JSON"),
        ("[" * 100, "is not JSON"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            merge_lora(parts, lora, metadata={METADATA_KEY: wrong})


def drop(key: str) -> Callable[[State], State]:
    return lambda lora: {name: tensor for name, tensor in lora.items() if name != key}


A, B = f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: {**s, "unet.nowhere.lora_A.weight": s[A]},
            "'unet.nowhere.lora_A.weight', and the unet has no weight",
        ),
        (lambda s: {**s, f"unet.{QUERY}.hada_w1_a": s[A]}, "hada_w1_a', which is not known; accepted are lora_A"),
        (lambda s: {**s, f"unet.{QUERY}.lora_B.bias": s[A]}, "lora_B.bias', which is not known"),
        (lambda s: {**s, "transformer.x.lora_A.weight": s[A]}, "'transformer.x.lora_A.weight', and the unet has no"),
        (lambda s: {**s, f"unet.{QUERY}.lora.down.weight": s[A]}, "the same under another name"),
        (drop(A), "without its counterpart"),
        (drop(B), "without its counterpart"),
        (lambda s: {f"unet.{QUERY}.alpha": torch.tensor(1.0)}, "without its counterpart"),
        (lambda s: {**s, A: s[A][:2]}, r"does not fit its weight \[8, 8\]: A is \[2, 8\], B is \[8, 3\]"),
        (lambda s: {**s, A: s[A][:, :4]}, "does not fit"),
        (lambda s: {**s, B: s[B][0]}, "does not fit"),
        (lambda s: {**s, A: s[A].int()}, "must be a floating-point tensor"),
        (lambda s: {**s, A: torch.full_like(s[A], torch.inf)}, "not finite"),
        (lambda s: {**s, f"unet.{QUERY}.alpha": torch.tensor([1.0, 2.0])}, "must be one number"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    parts: dict[str, State], change: Callable[..., Any], sentence: str
) -> None:
    down, up = pair(parts["unet"][QUERY + ".weight"])
    with pytest.raises(CheckpointError, match=sentence):
        merge_lora(parts, change({A: down, B: up}))


def test_a_part_that_the_pipeline_lacks_is_named(parts: dict[str, State]) -> None:
    key = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    with pytest.raises(CheckpointError, match="the pipeline has no text_encoder_2"):
        merge_lora({"unet": parts["unet"]}, {key: torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="scale must be a finite number"):
        merge_lora(parts, {}, scale=float("nan"))
