"""The conditions of a prompt: what an image is to show and what not, where they are made, and what is public."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stepfusion as sf
from stepfusion.latents.prompts import NoPrompts, PromptConditions
from stepfusion.latents.text import TextEncoder, TextPart
from stepfusion_testing.latent_models import text_model, write_tokenizer

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture
def encoder(tmp_path: Path) -> TextEncoder:
    torch.manual_seed(0)
    model = text_model(projection=24, layers=2)
    part = TextPart(write_tokenizer(tmp_path / "tokenizer"), model.config.to_dict(), model.state_dict())
    return TextEncoder.from_parts(part)


def test_the_refiner_is_told_a_low_score_of_every_negative_prompt(encoder: TextEncoder) -> None:
    made = PromptConditions(encoder, 5, 64, 32)
    for text in ("cat", None):
        assert made(text)["time_ids"].tolist() == [64, 32, 0, 0, 6.0]
        assert made.negative(text)["time_ids"].tolist() == [64, 32, 0, 0, 2.5]
        for name in ("encoder_hidden_states", "text_embeds"):
            assert torch.equal(made(text)[name], made.negative(text)[name])
    base = PromptConditions(encoder, 6, 64, 32)
    assert base("cat")["time_ids"].tolist() == base.negative("cat")["time_ids"].tolist() == [64, 32, 0, 0, 64, 32]
    assert set(PromptConditions(encoder, None, 64, 32)("cat")) == {"encoder_hidden_states", "text_embeds"}


def test_an_encoder_moves_as_a_copy(encoder: TextEncoder) -> None:
    made = PromptConditions(encoder, 6, 64, 64)
    assert encoder.to("cpu") is encoder
    assert made.to(torch.device("cpu")) is made
    moved = made.to("meta")
    assert moved is not made
    assert moved.explanation == "CLIP, 2 layers of 32, 77 tokens, on meta in float32"
    assert moved.text.shapes == encoder.shapes
    assert made("cat")["text_embeds"].isfinite().all(), "the first one stays where it was"


def test_what_is_missing_is_said_where_prompts_are_encoded() -> None:
    with pytest.raises(ValueError, match="prompts cannot be encoded: there is no tokenizer"):
        NoPrompts("there is no tokenizer")("cat")


def test_the_public_names_are_there() -> None:
    assert set(sf.latents.__all__) <= set(dir(sf.latents))
    assert sf.latents.PromptConditions is PromptConditions
