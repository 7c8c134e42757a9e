"""Latent pipelines of diffusers, read from their directories: the same latents and images, and clear refusals."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stepfusion as sf
from stepfusion.checkpoints.diffusers_directory import load_pretrained
from stepfusion_testing.latent_models import condition_unet, randomised, text_model
from stepfusion_testing.stable_diffusion import autoencoder, scheduler, stable_diffusion, tokenizer
from stepfusion_testing.twins import assert_same_bits

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS, NEGATIVE, SCALE, STEPS = ["cat on dog", "dog sat"], "on", 4.0, 20


def stable_diffusion_2(path: Path) -> Any:
    return stable_diffusion(path, scheduler=scheduler(prediction_type="v_prediction"))


def sdxl(path: Path) -> Any:
    torch.manual_seed(0)
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_model(size=16),
        text_encoder_2=text_model(projection=16, size=16),
        tokenizer=tokenizer(path / "1"),
        tokenizer_2=tokenizer(path / "2"),
        unet=condition_unet(large=True),
        scheduler=scheduler(),
        add_watermarker=False,
    )


def inpainting_unet() -> Any:
    config = {name: value for name, value in condition_unet().config.items() if not name.startswith("_")}
    return randomised(diffusers.UNet2DConditionModel(**{**config, "in_channels": 9}))


def latent_diffusion(*parts: Any) -> Any:
    module = "diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond"
    try:
        kind = importlib.import_module(module).LDMPipeline
    except ImportError:
        kind = diffusers.LDMPipeline
    return kind(*parts)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    def save(pipeline: Any) -> Path:
        pipeline.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def start(pipeline: Any, n: int = 2) -> Tensor:
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    size = network.config.sample_size
    return torch.randn(n, 4, size, size, generator=torch.Generator().manual_seed(3))


def assert_same_pixels(ours: Tensor, theirs: Any) -> None:
    """Within one level, and that in at most one pixel of a hundred."""
    wanted = torch.from_numpy(theirs).mul(255).round()
    difference = (ours.float() - wanted).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 0.01


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_2, sdxl])
def test_prompts_give_the_pipelines_latents_and_images(
    make: Callable[[Path], Any], saved: Callable[[Any], Path], tmp_path: Path
) -> None:
    pipeline = make(tmp_path / "tokenizer")
    pipeline.set_progress_bar_config(disable=True)
    x = start(pipeline)
    engine = sf.Engine.from_pretrained(saved(pipeline), device="cpu", network="eager")
    for scale, negative in ((SCALE, NEGATIVE), (SCALE, None), (1.0, None)):
        asked = {"num_inference_steps": STEPS, "guidance_scale": scale, "latents": x.clone()}
        given = {} if negative is None else {"negative_prompt": [negative] * 2}
        theirs = pipeline(PROMPTS, **given, **asked, output_type="latent").images
        ours = engine.sample(
            start=x, prompt=PROMPTS, negative_prompt=negative, guidance=scale, sampler="ddim", steps=STEPS
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    pictures = pipeline(PROMPTS, **asked, output_type="np").images
    assert_same_pixels(engine.to_uint8(ours), pictures)
    assert not torch.equal(ours[0], engine.sample(start=x, prompt="dog", sampler="ddim", steps=STEPS)[0])


def test_an_inpainting_network_is_shown_mask_and_image(saved: Callable[[Any], Path], tmp_path: Path) -> None:
    kind = diffusers.StableDiffusionInpaintPipeline
    torch.manual_seed(0)
    pipeline = stable_diffusion(tmp_path / "tokenizer", unet=inpainting_unet(), kind=kind)
    pipeline.set_progress_bar_config(disable=True)
    # The mode of the latents' distribution, and not a sample of it, which a generator would draw.
    encode = pipeline.vae.encode
    scale = pipeline.vae.config.scaling_factor
    pipeline._encode_vae_image = lambda image, generator: encode(image).latent_dist.mode() * scale
    x = start(pipeline)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 6:16] = 1
    size = {"height": 16, "width": 16, "num_inference_steps": STEPS, "guidance_scale": SCALE, "latents": x.clone()}
    theirs = pipeline(PROMPTS, image=image / 2 + 0.5, mask_image=mask, strength=1.0, output_type="latent", **size)
    engine = sf.Engine.from_pretrained(saved(pipeline), device="cpu", network="eager")
    assert [one.name for one in engine.spec.conditions] == ["encoder_hidden_states", "concatenated"]
    asked = {"prompt": PROMPTS, "guidance": SCALE, "sampler": "ddim", "steps": STEPS}
    ours = engine.sample(start=x, image=image, mask=mask, **asked)
    torch.testing.assert_close(ours, theirs.images, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="conditions must have 'concatenated'"):
        engine.sample(start=x, **asked)
    # An image alone, or with a strength, as with other networks
    partly = engine.sample(2, image=image, mask=mask, strength=0.5, **asked)
    assert not torch.equal(partly, engine.sample(2, image=image, mask=mask, **asked))


def test_an_image_is_edited_in_latents(saved: Callable[[Any], Path], tmp_path: Path) -> None:
    pipeline = stable_diffusion(tmp_path / "tokenizer")
    engine = sf.Engine.from_pretrained(saved(pipeline), device="cpu", network="eager")
    image = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    latent = pipeline.vae.encode(image).latent_dist.mode() * pipeline.vae.config.scaling_factor
    asked = {"prompt": "cat", "steps": 5, "strength": 0.6}
    by_image, by_latent = engine.sample(2, image=image, **asked), engine.sample(2, image=latent, **asked)
    torch.testing.assert_close(by_image, by_latent, rtol=0, atol=1e-4)


def test_a_latent_pipeline_without_texts(saved: Callable[[Any], Path]) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vqvae = autoencoder("VQModel", num_vq_embeddings=32, mid_block_add_attention=True)
    pipeline = latent_diffusion(vqvae, randomised(unet, 0.05), scheduler())
    pipeline.set_progress_bar_config(disable=True)
    path = saved(pipeline)
    engine = sf.Engine.from_pretrained(path, device="cpu", network="eager")
    theirs = pipeline(2, generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np").images
    ours = engine.sample(start=start(pipeline), sampler="ddim", steps=5)
    assert_same_pixels(engine.to_uint8(ours), theirs)
    part = sf.Engine.from_pretrained(path / "unet", device="cpu", network="eager")
    assert_same_bits("pixels", part.to_uint8(ours), engine.to_uint8(ours))


def dit() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3, norm_elementwise_affine=False,
    )  # fmt: skip
    return diffusers.DiTPipeline(randomised(transformer), autoencoder(), scheduler())


def test_a_diffusion_transformer(saved: Callable[[Any], Path]) -> None:
    pipeline = dit()
    model = saved(pipeline)
    change(model / "model_index.json", id2label={"0": "cat, house cat", "1": "dog", "2": "boat"})
    engine = sf.Engine.from_pretrained(model, device="cpu", network="eager")
    assert engine.class_names == ("cat, house cat", "dog", "boat")
    assert (engine.num_classes, engine.null_label) == (4, 3)
    x = start(pipeline)
    null, t = torch.tensor([3, 3]), torch.tensor([900, 900])
    with torch.no_grad():
        out = pipeline.transformer(x, t, torch.tensor([0, 2])).sample
        torch.testing.assert_close(engine.network(x, t, torch.tensor([0, 2])), out, rtol=0, atol=1e-4)
        # The pipeline guides the first three channels of four; its authors' code says why, and ours guides all.
        loop, mine = x.clone(), engine.sample(start=x, labels=[0, 2], guidance=SCALE, sampler="ddim", steps=STEPS)
        pipeline.scheduler.set_timesteps(STEPS)
        for step in pipeline.scheduler.timesteps:
            each = step.expand(2)
            cond = pipeline.transformer(loop, each, torch.tensor([0, 2])).sample[:, :4]
            uncond = pipeline.transformer(loop, each, null).sample[:, :4]
            loop = pipeline.scheduler.step(uncond + SCALE * (cond - uncond), step, loop).prev_sample
    torch.testing.assert_close(mine, loop, rtol=0, atol=1e-3)
    decoded = pipeline.vae.decode(mine / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(engine.decode_latents(mine), decoded, rtol=0, atol=1e-4)


def test_what_no_prompt_is_follows_from_the_pipeline(saved: Callable[[Any], Path], tmp_path: Path) -> None:
    pipeline = sdxl(tmp_path / "tokenizer")
    model = saved(pipeline)
    index = model / "model_index.json"
    for setting, zeros in ((None, True), (True, True), (False, False)):
        change(index, **({} if setting is None else {"force_zeros_for_empty_prompt": setting}))
        text = load_pretrained(model).parts.text
        assert text is not None
        null = text.null()
        assert bool((null["text_embeds"] == 0).all()) is zeros
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        states, pooled = pipeline.encode_prompt("cat", "cat", "cpu", 1, True)[1::2]
        torch.testing.assert_close(null["encoder_hidden_states"], states[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(null["text_embeds"], pooled[0], rtol=0, atol=1e-4)
    change(index, force_zeros_for_empty_prompt="no")
    assert "force_zeros_for_empty_prompt must be true or false, got 'no'" in refusal(model)


# Refusals


def refusal(path: Path) -> str:
    with pytest.raises(sf.CheckpointError) as caught:
        load_pretrained(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_parts_that_are_missing_or_do_not_fit_are_named(saved: Callable[[Any], Path], tmp_path: Path) -> None:
    model = saved(stable_diffusion(tmp_path / "tokenizer"))
    index = model / "model_index.json"
    whole = index.read_text()
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.move(model / part, tmp_path / part)
        assert f"has the part {part!r}, and the folder {model / part} is missing" in refusal(model)
        shutil.move(tmp_path / part, model / part)
    change(index, tokenizer=[None, None])
    assert "has no tokenizer: the folder 'tokenizer' is missing" in refusal(model)
    index.write_text(whole)
    change(index, image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    assert "part 'image_encoder' (CLIPVisionModelWithProjection) is not implemented" in refusal(model)
    index.write_text(whole)
    (model / "vae/config.json").unlink()
    assert "vae/config.json" in refusal(model)


def test_parts_of_other_models_are_refused(saved: Callable[[Any], Path], tmp_path: Path) -> None:
    model = saved(stable_diffusion(tmp_path / "tokenizer"))
    text_model(size=16).save_pretrained(tmp_path / "other")
    shutil.rmtree(model / "text_encoder")
    shutil.move(tmp_path / "other", model / "text_encoder")
    assert "make encoder_hidden_states [77, 16], and the network takes [77, 32]" in refusal(model)


def test_a_transformers_names_must_be_whole(saved: Callable[[Any], Path]) -> None:
    model = saved(dit())
    assert sf.Engine.from_pretrained(model, device="cpu").class_names is None
    change(model / "model_index.json", id2label={"0": "cat", "1": "dog"})
    assert "id2label must name each of the labels 0 to 2" in refusal(model)
