"""Conditions are data of a lane: prompts, tensors, what stands for none, and what is prepared of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import stepfusion as sf
from stepfusion.execution.evaluator import Evaluator
from stepfusion.lanes.conditions import ConditionSet
from stepfusion.lanes.prepared import PreparedConditions
from stepfusion.networks import ConditionSpec
from stepfusion_testing.conditioned import SHAPE, Keywords, Prompts, TextNetwork, text_condition, text_engine
from stepfusion_testing.twins import assert_same_bits

A, B = text_condition("a boat"), text_condition("two cats")


def closed(
    network: TextNetwork, condition: dict[str, Tensor], null: dict[str, Tensor], scale: float
) -> Callable[..., Any]:
    """The same network with its conditions built in, and guidance by hand (Ho & Salimans 2022, equation 6)."""

    def call(x: Tensor, timesteps: Tensor) -> Tensor:
        def predict(given: dict[str, Tensor]) -> Tensor:
            batch = {name: value.expand(len(x), *value.shape) for name, value in given.items()}
            return network(x, timesteps, **batch)

        out = predict(condition)
        return out if scale == 1 else predict(null) + scale * (out - predict(null))

    return call


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "foreign"])
@pytest.mark.parametrize("sizes", [False, True], ids=["text", "text-and-sizes"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_are_those_of_a_network_with_its_condition_built_in(foreign: bool, sizes: bool, scale: float) -> None:
    network = TextNetwork(sizes=sizes).eval()
    given = {**A, **({"sizes": torch.tensor([3, 9])} if sizes else {})}
    nothing = {**B, **({"sizes": torch.tensor([1, 2])} if sizes else {})}
    engine = text_engine(
        Keywords(network) if foreign else network,
        prompts=None,
        conditions=network.conditions if foreign else None,
    )
    images = engine.sample(
        3, sampler="ddim", steps=7, seed=5, conditions=given, null_conditions=nothing, guidance=scale
    )
    by_hand = closed(network, given, nothing, scale)
    twin = sf.Engine(by_hand, sf.NoiseSchedule.linear(100), shape=SHAPE, device="cpu", backend="reference")
    torch.testing.assert_close(images, twin.sample(3, sampler="ddim", steps=7, seed=5), rtol=0, atol=2e-6)


def test_labels_and_conditions_go_together() -> None:
    network = TextNetwork(classes=4).eval()
    engine = text_engine(network, null_label=3, prompts=None)
    images = engine.sample(2, steps=4, labels=[0, 1], conditions=A, guidance=2.0)
    for image, label in enumerate((0, 1)):

        def by_hand(x: Tensor, t: Tensor, label: int = label) -> Tensor:
            text = A["text"].expand(len(x), -1, -1)
            with_label = network(x, t, torch.full((len(x),), label), text=text)
            without = network(x, t, torch.full((len(x),), 3), text=text)
            return without + 2.0 * (with_label - without)

        twin = sf.Engine(by_hand, sf.NoiseSchedule.linear(100), shape=SHAPE, device="cpu", backend="reference")
        torch.testing.assert_close(images[image], twin.sample(1, steps=4, indices=[image])[0], rtol=0, atol=2e-6)


def test_without_a_null_label_guidance_keeps_the_label() -> None:
    """The image's own, and not label 0, beside the conditions that stand for none."""
    network = TextNetwork(classes=4).eval()
    engine = text_engine(network, prompts=None)
    images = engine.sample(2, steps=4, labels=[1, 2], conditions=A, null_conditions=B, guidance=3.0)
    for image, label in enumerate((1, 2)):

        def by_hand(x: Tensor, t: Tensor, label: int = label) -> Tensor:
            labels = torch.full((len(x),), label)
            given, none = (network(x, t, labels, text=c["text"].expand(len(x), -1, -1)) for c in (A, B))
            return none + 3.0 * (given - none)

        twin = sf.Engine(by_hand, sf.NoiseSchedule.linear(100), shape=SHAPE, device="cpu", backend="reference")
        torch.testing.assert_close(images[image], twin.sample(1, steps=4, indices=[image])[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("way", ["eager", "compile"])
def test_an_images_bits_do_not_depend_on_the_prompts_beside_it(way: str) -> None:
    """Prompts, negative prompts, samplers, steps and scales mixed in one batch."""
    engine = text_engine(sizes=True, batch=4, invariant=True, network=way)
    tables = [
        engine.table("ddim", 5), engine.table("heun", 4), engine.table("ddpm", 6), engine.table("dpmpp_2m", 5),
    ]  # fmt: skip
    prompts, negatives = ["a boat", "two cats", "a boat", ""], ["blurred", "", "grey", "blurred"]
    scales = [1.0, 3.0, 7.5, 2.0]
    together = engine.sample(
        4, tables, prompt=prompts, negative_prompt=negatives, guidance=scales, seed=[1, 1, 2, 3], indices=[0, 1, 0, 7]
    )
    for image in range(4):
        alone = engine.sample(
            1, tables[image], prompt=prompts[image], negative_prompt=negatives[image], guidance=scales[image],
            seed=[1, 1, 2, 3][image], indices=[[0], [1], [0], [7]][image],
        )  # fmt: skip
        assert_same_bits("image", together[image : image + 1], alone)
    assert not torch.equal(together[0], engine.sample(1, tables[0], prompt="two cats", seed=1)[0])


def test_prompts_are_the_conditions_that_they_are_encoded_to() -> None:
    engine = text_engine()
    by_prompt = engine.sample(2, steps=3, prompt=["a boat", "two cats"], negative_prompt="fog", guidance=2.0)
    tensors = {"text": torch.stack((A["text"], B["text"]))}
    by_tensor = engine.sample(steps=3, conditions=tensors, null_conditions=text_condition("fog"), guidance=2.0)
    assert_same_bits("images", by_prompt, by_tensor)
    no_prompt = engine.sample(2, steps=3, prompt="a boat", guidance=2.0)
    zeros = {"text": torch.zeros_like(A["text"])}
    assert_same_bits(
        "images", no_prompt, engine.sample(2, steps=3, conditions=A, null_conditions=zeros, guidance=2.0)
    )
    assert_same_bits("images", engine.sample(2, steps=3), engine.sample(2, steps=3, conditions=zeros))


def test_conditions_are_prepared_once_and_the_network_is_called_once_without_guidance() -> None:
    engine = text_engine(batch=4)
    network = engine.network
    assert isinstance(network, TextNetwork)
    engine.sample(4, steps=5, prompt="a boat", guidance=1.0)
    network.prepared, network.batches = 0, []
    engine.sample(4, steps=5, prompt=["a boat", "two cats", "two cats", "a boat"], guidance=1.0)
    assert (network.prepared, network.batches) == (1, [4] * 5)  # the boat was kept
    network.batches = []
    engine.sample(4, steps=5, prompt="a boat", guidance=2.0)
    assert network.batches == [8] * 5


def test_what_was_prepared_is_kept_up_to_so_many_bytes() -> None:
    network = TextNetwork().eval()
    evaluator = Evaluator(network, False, conditions=network.conditions)
    one = 5 * 16 * 4
    prepared = PreparedConditions(evaluator, network.conditions, torch.device("cpu"), torch.float32, 2 * one)
    sets = [ConditionSet((text,), lambda text=text: text_condition(text)) for text in "abc"]  # type: ignore[misc]
    assert prepared.layout == (((5, 16), torch.float32),)
    network.prepared = 0
    for place in (0, 1, 0, 1, 2, 1, 0):  # c takes the place of a, and a that of c
        prepared.of(sets[place])
    assert network.prepared == 4
    small = PreparedConditions(evaluator, network.conditions, torch.device("cpu"), torch.float32, 1)
    network.prepared = 0
    for place in (0, 0, 1, 1):  # one is kept, whatever its size
        small.of(sets[place])
    assert network.prepared == 2


def test_a_request_of_many_prompts_encodes_them_when_their_images_enter_lanes() -> None:
    prompts = Prompts()
    engine = text_engine(prompts=prompts, batch=8)
    texts = [f"prompt {number}" for number in range(100)]
    request = engine.request(prompt=texts, steps=1)
    assert len(request) == 100
    assert prompts.encoded == ["prompt 0"]
    prompts.encoded.clear()
    pixels = torch.cat(list(engine.generate(prompt=texts, steps=1)))
    assert set(prompts.encoded) == set(texts)
    assert_same_bits(
        "pixels", pixels[60:61], torch.cat(list(engine.generate(prompt=texts[60], steps=1, indices=[60])))
    )


def test_a_prompt_that_is_not_finite_breaks_its_own_image_only() -> None:
    engine = text_engine(batch=2, invariant=True)
    broken = {"text": torch.stack((A["text"], B["text"]))}
    broken["text"][1, 2, 3] = float("nan")
    images = engine.sample(conditions=broken, steps=3, nonfinite="keep")
    assert_same_bits("image 0", images[:1], engine.sample(1, conditions=A, steps=3))
    assert not images[1].isfinite().all()
    with pytest.raises(sf.NonFiniteError, match="image 1 "):
        engine.sample(conditions=broken, steps=3)


def test_serving_mixes_prompts_and_gives_the_offline_bits() -> None:
    engine = text_engine(sizes=True, batch=4, invariant=True)
    asked: list[dict[str, Any]] = [
        {"prompt": "a boat", "seed": 3, "steps": 5},
        {"prompt": ["two cats", "a boat"], "negative_prompt": "fog", "guidance": 3.0, "steps": 4, "seed": 1},
        {"prompt": "fog", "guidance": [2.0], "steps": 6, "sampler": "ddpm"},
        {"conditions": {**A, "sizes": torch.tensor([7, 7])}, "steps": 3},
    ]
    service = sf.serving.AsyncEngine(engine).start()
    try:
        results = [service.submit(None, **options) for options in asked]
        images = [result.result(60).images for result in results]
    finally:
        service.close()
    for options, served in zip(asked, images, strict=True):
        assert_same_bits("served", served, engine.sample(**options))


def test_halved_lanes_and_wider_runners_keep_the_conditions() -> None:
    """Images that move to another runner take what was prepared with them."""
    engine = text_engine(batch=4)
    service = sf.serving.AsyncEngine(engine).start()
    try:
        first = service.submit(1, prompt="a boat", steps=40, seed=4)
        others = [service.submit(1, prompt=f"text {i}", steps=3) for i in range(3)]
        for other in others:
            other.result(60)
        image = first.result(60).images
    finally:
        service.close()
    torch.testing.assert_close(image, engine.sample(1, prompt="a boat", steps=40, seed=4), rtol=0, atol=1e-5)


def test_images_and_masks_become_latents() -> None:
    """The mean of 2 x 2 pixels stands for an encoder."""

    def encode(images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 2)[:, :2]

    engine = text_engine(encode_images=encode, decode=lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    image = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3, 0] = 1  # one pixel frees the latent over it, and no other
    small = torch.zeros(1, 1, 4, 4)
    small[..., 1, 0] = 1
    by_image = engine.sample(2, steps=4, image=image, mask=mask, strength=0.5, prompt="a boat")
    by_latent = engine.sample(2, steps=4, image=encode(image), mask=small, strength=0.5, prompt="a boat")
    assert_same_bits("latents", by_image, by_latent)
    kept = by_image[:, :, small[0, 0] == 0]
    assert_same_bits("kept", kept, encode(image).expand(2, -1, -1, -1)[:, :, small[0, 0] == 0])
    with pytest.raises(ValueError, match=r"image must have the size .* \[2, 4, 4\], got \[3, 6, 6\] with latents"):
        engine.sample(2, steps=4, image=torch.zeros(1, 3, 6, 6), strength=0.5)
    with pytest.raises(ValueError, match="image must be finite"):
        engine.sample(2, steps=4, image=torch.full((1, 3, 8, 8), float("nan")), strength=0.5)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompt": 3}, TypeError, "prompt must be a text or a list of texts, got int"),
    ({"prompt": ["a", 3], "n": 2}, TypeError, "prompt must be a text or a list of texts, got 3"),
    ({"prompt": ["a", "b"], "n": 3}, ValueError, "prompt must be one text or one for each of the 3 images, got 2"),
    ({"prompt": "a" * 10_001}, ValueError, "prompt must have at most 10000 characters, got 10001"),
    ({"prompt": "a\0b"}, ValueError, "prompt must not have a NUL character"),
    ({"negative_prompt": b"a"}, TypeError, "negative_prompt must be a text"),
    ({"prompt": "not a text"}, ValueError, "prompt cannot be encoded"),
    ({"conditions": [A["text"]]}, TypeError, "conditions must be a mapping of names to tensors, got list"),
    ({"conditions": {"txt": A["text"]}}, ValueError, "conditions has 'txt', and the model's conditions are text"),
    ({"conditions": {"text": A["text"][:3]}}, ValueError, r"text is .*\[3, 6\].*accepted is floating point \[5, 6\]"),
    ({"conditions": {"text": A["text"].long()}}, ValueError, "text is .*int64.*; accepted is floating point"),
    ({"conditions": {"text": "boat"}}, TypeError, "text is str; accepted is a tensor"),
    ({"conditions": {"text": torch.zeros(2, 5, 6)}, "n": 3}, ValueError, r"accepted is floating point \[3, 5, 6\]"),
    ({"conditions": {"text": A["text"].to("meta")}}, ValueError, "text must hold values"),
    ({"null_conditions": {"sizes": A["text"]}}, ValueError, "null_conditions has 'sizes'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_conditions_are_refused_before_any_work(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = text_engine()
    assert isinstance(engine.network, TextNetwork)
    with pytest.raises(error, match=message):
        engine.sample(steps=2, **options)
    assert engine.network.batches == []


def test_engines_without_an_encoder_or_without_conditions_say_so() -> None:
    bare = text_engine(prompts=None)
    with pytest.raises(ValueError, match="prompt was given, and this engine has no text encoder"):
        bare.sample(prompt="a boat")
    with pytest.raises(ValueError, match=r"conditions must have 'text', \[5, 6\] for all images or for each"):
        bare.sample(1)
    with pytest.raises(ValueError, match="guidance needs null_conditions"):
        bare.sample(1, conditions=A, guidance=2.0)
    plain = sf.Engine(lambda x, t: x, sf.NoiseSchedule.linear(100), shape=SHAPE, device="cpu")
    for option in ("prompt", "negative_prompt"):
        with pytest.raises(ValueError, match=f"{option} was given, and this engine's model takes none"):
            plain.sample(1, **{option: "a boat"})
    with pytest.raises(ValueError, match="conditions must have different names, got text, text"):
        text_engine(conditions=[ConditionSpec("text", (2,))] * 2)


def test_the_network_itself_refuses_wrong_conditions() -> None:
    network = TextNetwork().eval()
    x, t = torch.zeros(2, *SHAPE), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="this network needs the condition 'text'; it has text"):
        network(x, t)
    with pytest.raises(TypeError, match="this network takes no condition 'txt'; it has text"):
        network(x, t, txt=A["text"])
    with pytest.raises(ValueError, match=r"accepted is floating point \[2, 5, 6\]"):
        network(x, t, text=A["text"][None])


def test_hooks_are_seen_and_their_network_is_called_whole() -> None:
    network = TextNetwork().eval()
    seen: list[int] = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    engine = text_engine(network, batch=2)
    images = engine.sample(2, steps=3, prompt=["a boat", "two cats"])
    assert seen == [2] * 3
    assert not engine.evaluator.hoisted
    torch.testing.assert_close(images, text_engine(batch=2).sample(2, steps=3, prompt=["a boat", "two cats"]))


class _Signed(Prompts):
    """An encoder whose negative prompts are encoded otherwise, and which is told where it is to run."""

    device: torch.device | None = None

    def negative(self, prompt: str | None) -> dict[str, Tensor]:
        return {name: -value for name, value in self(prompt).items()}

    def to(self, device: torch.device) -> _Signed:
        moved = _Signed()
        moved.device = device
        return moved


def test_negative_prompts_are_encoded_by_a_method_of_their_own() -> None:
    prompts = _Signed()
    engine = text_engine(prompts=prompts)
    moved = engine.runners.prompts
    assert isinstance(moved, _Signed)
    assert (prompts.device, moved.device) == (None, torch.device("cpu"))
    both = engine.sample(2, steps=3, prompt="a boat", negative_prompt=["a boat", "two cats"], guidance=2.0, seed=1)
    negative = {"text": -torch.stack((A["text"], B["text"]))}
    by_tensor = engine.sample(2, steps=3, conditions=A, null_conditions=negative, guidance=2.0, seed=1)
    assert_same_bits("images", both, by_tensor)
    assert "text encoder                 _Signed" in engine.explain()


def test_prompts_that_cannot_be_encoded_say_why() -> None:
    class Missing:
        missing = "it is on holiday"

        def __call__(self, prompt: str | None) -> dict[str, Tensor]:
            raise AssertionError

    engine = text_engine(prompts=Missing())
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(ValueError, match=f"^{name} was given, and .* no text encoder: it is on holiday$"):
            engine.sample(1, **{name: "a boat"})  # type: ignore[arg-type]
    nothing = text_engine(prompts=None)
    given = {"conditions": A, "null_conditions": B, "guidance": 2.0, "steps": 2}
    assert_same_bits("images", engine.sample(1, **given), nothing.sample(1, **given))
    assert "text encoder   none          it is on holiday" in engine.explain()
    assert "text encoder" not in nothing.explain()
