"""Counter-based noise: published words, equal bits in Triton and PyTorch, and the statistics of a standard normal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import philox, reference
from stepfusion.kernels.backend import tl, triton

# Random123, kat_vectors, philox4x32-10: counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
TAIL = 5.8  # the largest radius of tl.randn, whose uniform is clamped at 1e-7, is 5.68
#: Draws beyond it, found by a scan of 2 * 10^8: seed, timestep, index, element.
RARE = [(2026, 999, 46, 385400), (2026, 999, 71, 1035941), (2026, 999, 190, 155261)]
ROUNDINGS = 4  # of Box-Muller in float32; 3.1 measured over 10^7 pairs, where the worst cases of all steps add to 6.3

BoxMuller = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@triton.jit
def words_kernel(words_ptr, library_ptr, counter_ptr, seed_ptr, N: tl.constexpr):
    """Words [4, N] of ours and of Triton's Philox for counters [4, N] and one seed."""
    i = tl.arange(0, N)
    c0 = tl.load(counter_ptr + i).to(tl.uint32)
    c1 = tl.load(counter_ptr + N + i).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * N + i).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * N + i).to(tl.uint32)
    seed = tl.load(seed_ptr)
    w0, w1, w2, w3 = philox._philox(seed, c0, c1, c2, c3)
    tl.store(words_ptr + i, w0.to(tl.int64))
    tl.store(words_ptr + N + i, w1.to(tl.int64))
    tl.store(words_ptr + 2 * N + i, w2.to(tl.int64))
    tl.store(words_ptr + 3 * N + i, w3.to(tl.int64))
    v0, v1, v2, v3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(library_ptr + i, v0.to(tl.int64))
    tl.store(library_ptr + N + i, v1.to(tl.int64))
    tl.store(library_ptr + 2 * N + i, v2.to(tl.int64))
    tl.store(library_ptr + 3 * N + i, v3.to(tl.int64))


def _key(low: int, high: int) -> torch.Tensor:
    """Two 32-bit words as the int64 that has their bits."""
    return torch.tensor([low | high << 32], dtype=torch.uint64).view(torch.int64)


def _int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _draw(seed: int, timestep: int, index: int, elements: int, stream: int = kernels.STREAM_STEP) -> torch.Tensor:
    """float32 [elements], by the reference."""
    return reference.normal(_int64(seed), _int64(index), _int64(timestep), (elements,), stream)[0]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_of_the_reference(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    drawn = philox.philox_words(tuple(map(_int64, counter)), _key(*key))
    assert tuple(int(w) for w in drawn) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_of_the_kernel(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...], kernel_device: torch.device
) -> None:
    counters = torch.tensor(counter, device=kernel_device)[:, None].repeat(1, 4)
    ours, library = torch.empty_like(counters), torch.empty_like(counters)
    words_kernel[(1,)](ours, library, counters.contiguous(), _key(*key).to(kernel_device), N=4)
    assert ours.cpu().T.tolist() == [list(words)] * 4
    assert library.cpu().T.tolist() == [list(words)] * 4


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1, 2**32, 0x1234_5678_9ABC_DEF0])
def test_words_equal_triton_for_any_counter(seed: int, kernel_device: torch.device) -> None:
    counters = torch.randint(0, 2**32, (4, 256))
    counters[:, :2] = torch.tensor([0, 2**32 - 1])
    ours, library = torch.empty_like(counters, device=kernel_device), torch.empty_like(counters, device=kernel_device)
    words_kernel[(1,)](ours, library, counters.to(kernel_device), _int64(seed).to(kernel_device), N=256)
    twin = torch.stack(philox.philox_words(tuple(counters), _int64(seed)))
    assert torch.equal(ours.cpu(), twin)
    assert torch.equal(library.cpu(), twin)


@pytest.mark.parametrize("shape", [(1,), (4097,), (3, 32, 32), (2, 3, 5, 7)])
@pytest.mark.parametrize("stream", [kernels.STREAM_STEP, kernels.STREAM_INITIAL, kernels.STREAM_FORWARD])
def test_normals_equal_bit_for_bit(shape: tuple[int, ...], stream: int, kernel_device: torch.device) -> None:
    seeds, indices, timesteps = _int64(7, -1, -(2**63)), _int64(0, 2**32 - 1, 2**31), _int64(999, 0, 2**31 + 5)
    drawn = kernels.normal(*(t.to(kernel_device) for t in (seeds, indices, timesteps)), shape, stream)
    assert torch.equal(drawn.cpu(), reference.normal(seeds, indices, timesteps, shape, stream))


def test_no_images_no_noise(kernel_device: torch.device) -> None:
    none = torch.empty(0, dtype=torch.int64, device=kernel_device)
    assert kernels.normal(none, none, none, (3, 4)).shape == (0, 3, 4)
    assert reference.normal(none, none, none, (3, 4)).shape == (0, 3, 4)
    one = none.new_zeros(1)
    assert kernels.normal(one, one, one, (0, 4)).shape == reference.normal(one, one, one, (0, 4)).shape == (1, 0, 4)


def _edge_words() -> torch.Tensor:
    """Words around every power of two and every 4/3 of one, where the logarithm changes its interval."""
    centres = [int(2**k * scale) for k in range(33) for scale in (1, 4 / 3)]
    words = torch.cat([torch.arange(-300, 300) + centre for centre in centres])
    return words.clamp(0, 2**32 - 1)


@pytest.mark.parametrize("words", [torch.arange(10**6), 2**32 - 1 - torch.arange(10**6), _edge_words(), None])
def test_normals_agree_with_float64(words: torch.Tensor | None) -> None:
    """Within 4 * 2**-23 of the larger of a pair: a pair is one point on a circle, and so is its error."""
    words = torch.randint(0, 2**32, (4 * 10**6,)) if words is None else words
    angles = torch.randint(0, 2**32, words.shape)
    pair, truth = philox._box_muller_reference(words, angles), philox._box_muller_exact(words, angles)
    larger = torch.maximum(truth[0].abs(), truth[1].abs())
    error = torch.maximum((pair[0].double() - truth[0]).abs(), (pair[1].double() - truth[1]).abs())
    assert bool((error <= ROUNDINGS * 2.0**-23 * larger).all())


def test_float64_draws_follow_the_same_words() -> None:
    lanes = _int64(3, 4)
    exact = reference.normal(lanes, lanes, lanes, (1000,), dtype=torch.float64)
    assert exact.dtype == torch.float64
    assert (exact - reference.normal(lanes, lanes, lanes, (1000,))).abs().max() < 4e-6


def test_noise_is_keyed_by_the_training_timestep(kernel_device: torch.device) -> None:
    """Rows of different tables that stand for one timestep draw one noise; another stream draws another."""
    x, out = torch.zeros(1, 64, device=kernel_device), torch.zeros(1, 64, device=kernel_device)
    lane = {name: torch.tensor([value], device=kernel_device) for name, value in (("seeds", 5), ("indices", 9))}

    def walk(timesteps: list[int], row: int) -> torch.Tensor:
        table = torch.zeros(len(timesteps), len(kernels.COLUMNS), device=kernel_device)
        table[:, kernels.COLUMNS.index("sigma")] = 1.0
        keys = torch.tensor(timesteps, device=kernel_device)
        return kernels.diffusion_step(x, out, torch.tensor([row], device=kernel_device), table, keys, **lane)[0].cpu()

    z = _draw(5, 500, 9, 64)
    assert torch.equal(walk([900, 500, 100], row=1), z)
    assert torch.equal(walk([999, 750, 500, 250, 0], row=2), z)
    assert not torch.equal(walk([900, 501, 100], row=1), z)
    assert not torch.equal(_draw(5, 500, 9, 64, kernels.STREAM_INITIAL), z)


def test_an_image_draws_the_same_noise_in_any_batch(kernel_device: torch.device) -> None:
    indices = torch.arange(6, device=kernel_device)
    seeds, timesteps = torch.full_like(indices, 3), torch.full_like(indices, 10)
    batch = kernels.normal(seeds, indices, timesteps, (5, 9))
    order = torch.tensor([4, 0, 5], device=kernel_device)
    assert torch.equal(batch[order], kernels.normal(seeds[:3], indices[order], timesteps[:3], (5, 9)))


def _correlated(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Beyond 5 standard errors; so are the squares, which see a shared radius where signs hide it."""
    products = a.flatten() * b.flatten()
    mean, square = products.mean(dtype=torch.float64), products.square().mean(dtype=torch.float64)
    return bool(mean.abs() > 5 / math.sqrt(len(products)) or (square - 1).abs() > 5 * math.sqrt(8 / len(products)))


def _faults(lanes: int, elements: int) -> set[str]:
    """What distinguishes ``lanes * elements`` draws of the reference from independent standard normals."""
    seeds, indices, timesteps = torch.full((lanes,), 11), torch.arange(lanes), torch.full((lanes,), 321)
    z = reference.normal(seeds, indices, timesteps, (elements,))
    sample, n = z.flatten().double(), z.numel()
    few = slice(0, max(lanes // 10, 2))
    quads = z.view(-1, 4)

    def other(seed: int = 0, timestep: int = 0, index: int = 0) -> torch.Tensor:
        return reference.normal(seeds[few] ^ seed, indices[few] + index, timesteps[few] + timestep, (elements,))

    from scipy import stats

    checks = {
        "mean": abs(float(sample.mean())) > 5 / math.sqrt(n),
        "variance": abs(float(sample.var()) - 1) > 5 * math.sqrt(2 / n),
        "fourth moment": abs(float(sample.pow(4).mean()) - 3) > 5 * math.sqrt(96 / n),
        "distribution": stats.kstest(sample.numpy(), "norm").pvalue < 1e-3,
        "lanes": _correlated(z[0::2], z[1::2]),
        "neighbours": _correlated(z[:, :-1], z[:, 1:]),
        "quads": any(_correlated(quads[:, i], quads[:, j]) for i, j in itertools.combinations(range(4), 2)),
        "timesteps": _correlated(z[few], other(timestep=1)),
        "seeds": _correlated(z[few], other(seed=1)),
        "top bit of the seed": _correlated(z[few], other(seed=-(2**63))),
        "top bit of the index": _correlated(z[few], other(index=2**31)),
    }
    return {name for name, failed in checks.items() if failed}


@pytest.mark.slow
def test_statistics_of_ten_million_draws() -> None:
    assert _faults(lanes=100, elements=100_000) == set()


def test_statistics_notice_too_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox.numbers, "ROUNDS", 2)
    assert "neighbours" in _faults(lanes=10, elements=40_000)


def _angle_is_radius(radius: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _box_muller(radius, radius)


def _same_twice(radius: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = _box_muller(radius, angle)
    return x, x


def _too_wide(radius: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = _box_muller(radius, angle)
    return x * 1.01, y * 1.01


_box_muller = philox._box_muller_reference


@pytest.mark.parametrize(
    ("broken", "fault"), [(_angle_is_radius, "distribution"), (_same_twice, "quads"), (_too_wide, "variance")]
)
def test_statistics_notice_a_broken_transform(broken: BoxMuller, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "_box_muller_reference", broken)
    assert fault in _faults(lanes=10, elements=40_000)


@pytest.mark.slow
def test_as_many_rare_draws_as_there_should_be() -> None:
    """Of 2**26 draws 456 beyond 4.5 standard deviations and 38 beyond 5 are expected, give or take 5 roots."""
    counts = {4.5: 0, 5.0: 0}
    for index in range(64):
        counter = (torch.arange(2**18), _int64(77), _int64(index), _int64(0))
        w0, w1, w2, w3 = philox.philox_words(counter, _int64(1))
        for radius, angle in ((w0, w1), (w2, w3)):
            near = radius < 2**32 * math.exp(-(4.5**2) / 2)  # no other pair has a radius beyond 4.5
            z = torch.stack(philox._box_muller_reference(radius[near], angle[near])).abs()
            for bound in counts:
                counts[bound] += int((z > bound).sum())
    for bound, count in counts.items():
        expected = 2**26 * math.erfc(bound / math.sqrt(2))
        assert abs(count - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize(("seed", "timestep", "index", "element"), RARE)
def test_the_tail_that_a_clamp_would_cut_is_drawn(seed: int, timestep: int, index: int, element: int) -> None:
    z = float(_draw(seed, timestep, index, element + 1)[element])
    assert abs(z) > TAIL
    assert abs(z) > math.sqrt(-2 * math.log(1e-7))  # what tl.randn can reach


def test_the_tail_ends_at_six_and_two_thirds() -> None:
    """The smallest words give the largest radii, one by one: nothing is clamped."""
    words = torch.arange(8)
    x, y = philox._box_muller_reference(words, torch.full_like(words, 2**31))  # -pi/4: x is the whole radius
    radii = (-2 * ((words + 1) / 2**32).double().log()).sqrt()
    assert torch.hypot(x, y).allclose(radii.float(), rtol=1e-6, atol=0.0)
    assert float(torch.hypot(x, y).max()) == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)
    assert float(x.max()) > 6.66
