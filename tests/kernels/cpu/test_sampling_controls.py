"""Planted errors in the C++ sampling kernels: their comparisons must fail for each, or they would hold nothing.

All mutants are compiled into one library, each in a namespace of its own, without optimisation.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import cpu_ops, reference
from stepfusion.kernels.cpu import compiler, sampling_library
from stepfusion_testing.twins import (
    StepCase,
    assert_same_bits,
    assert_step_equivalent,
    assert_within,
    mutate,
    outputs,
)

CPU = torch.device("cpu")
FOLDER = Path(sampling_library.__file__).parent
HEADERS = "sampling.h", "noise.h"
Compare = Callable[[], None]

pytestmark = pytest.mark.skipif(
    sampling_library.why_not_sampling_kernels() is not None,
    reason=f"C++: {sampling_library.why_not_sampling_kernels()}",
)


def _step(case: StepCase, nan: str | None = None, layout: torch.memory_format | None = None) -> Compare:
    """The comparison of a step, with a NaN or an infinity in one lane, or with out in another layout."""

    def compare() -> None:
        torch.manual_seed(0)
        given = case.arguments(CPU)
        if nan is not None:
            given["out_uncond" if nan == "guidance" else "out"][1] = torch.inf if nan == "inf" else torch.nan
        if layout is not None:
            given["out"] = given["out"].to(memory_format=layout)
        if nan is None:
            assert_step_equivalent(cpu_ops.diffusion_step, given, truncated=False)
            return
        got, want = (outputs(ops.diffusion_step, given) for ops in (cpu_ops, reference))
        for name in got:
            assert_same_bits(name, got[name], want[name])

    return compare


def _fresh_step() -> None:
    """Parked lanes are copied to fresh memory."""
    given = StepCase((9,), torch.float32, "none").arguments(CPU)
    del given["x_next"]
    got, want = (ops.diffusion_step(**{n: t.clone() for n, t in given.items()}) for ops in (cpu_ops, reference))
    assert_same_bits("x_next", got, want)


def _state_kept() -> None:
    """Rows that keep x and no x0."""
    given = StepCase((9,), torch.float32, "none", history=1).arguments(CPU)
    given["coefficients"][:, kernels.COLUMNS.index("keep_x0")] = 0.0
    got, want = (outputs(ops.diffusion_step, given) for ops in (cpu_ops, reference))
    assert_same_bits("history", got["history"], want["history"])


def _whole_image() -> None:
    """Rows with rescale are not for the kernel."""
    given = StepCase((9,), torch.float32, "none").arguments(CPU)
    given["coefficients"][3, kernels.COLUMNS.index("rescale")] = 0.5
    got = outputs(cpu_ops.diffusion_step, given)["x_next"][0]
    assert_same_bits("x_next", got, torch.full_like(got, torch.nan))


def _exponential() -> None:
    """The standard deviation of a learned variance, to its last bit but one."""
    v = torch.linspace(-20, 20, 1001)
    table = torch.zeros(1, len(kernels.COLUMNS))
    for column in ("sigma", "half_log_span", "clip"):
        table[0, kernels.COLUMNS.index(column)] = 1.0
    out, row = torch.stack((torch.zeros_like(v), v)).view(1, 2, -1), torch.tensor([0])
    x = torch.zeros(1, 1, len(v))
    got = cpu_ops.diffusion_step(x, out, row, table, row, noise=torch.ones_like(x)).flatten()
    exact = (v * 0.5 + 0.5).double().exp()
    assert_within("std", got / exact, torch.ones_like(exact), 2.0**-23)


def _forward() -> None:
    x, t = torch.randn(3, 1030), torch.tensor([0, 5, 10])
    tables = torch.linspace(0.9, 0.1, 10), torch.linspace(0.1, 0.9, 10)
    lanes = {"seeds": t + 3, "indices": t + 1}
    for source in (lanes, {"noise": torch.randn(3, 1030)}):
        got, want = (ops.q_sample(x, t, *tables, **source) for ops in (cpu_ops, reference))
        for name, ours, theirs in zip(("x_t", "eps"), got, want, strict=True):
            assert_same_bits(name, ours, theirs)


def _posterior() -> None:
    x, y, t, *tables = torch.randn(3, 9), torch.randn(3, 9), torch.tensor([0, 5, 10]), *torch.rand(4, 10)
    got, want = (ops.q_posterior_mean_variance(x, y, t, *tables) for ops in (cpu_ops, reference))
    for name, ours, theirs in zip(("mean", "variance", "log variance"), got, want, strict=True):
        assert_same_bits(name, ours, theirs)


def _noise() -> None:
    numbers = torch.tensor([5, 2**31 + 7, 11])
    for stream in (0, 1):
        got, want = (ops.normal(numbers * 2**33, numbers, numbers, (1031,), stream) for ops in (cpu_ops, reference))
        assert_same_bits("z", got, want)


def _pixels() -> None:
    for channels in (1, 2, 3, 4, 5):
        x = torch.cat([torch.randn(2, channels, 5, 5), torch.full((1, channels, 5, 5), torch.nan)])
        for moved in (x, x.to(memory_format=torch.channels_last)):
            assert_same_bits("pixels", cpu_ops.to_uint8(moved).int(), reference.to_uint8(x).int())


def _narrowed(dtype: torch.dtype) -> Compare:
    """Ties, subnormal numbers and what is too large, in 16 bits."""

    def compare() -> None:
        x = torch.arange(-(2**31), 2**31 - 1, 2**12).to(torch.int32).view(torch.float32).view(1, -1)
        x = x[x.isfinite()].view(1, -1)
        table = torch.zeros(1, len(kernels.COLUMNS))
        table[0, [kernels.COLUMNS.index(name) for name in ("next_x", "net_scale")]] = 1.0
        row, copy = torch.tensor([0]), torch.empty_like(x, dtype=dtype)
        state = cpu_ops.diffusion_step(x, torch.zeros_like(x), row, table, row, x_net=copy)
        assert_same_bits("x_net", copy, state.to(dtype))

    return compare


def _widened(dtype: torch.dtype) -> Compare:
    def compare() -> None:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, -1)
        t, zeros = torch.tensor([0]), torch.zeros(values.shape)
        got, want = (
            ops.q_sample(values, t, torch.ones(1), zeros[0, :1], noise=zeros)[0] for ops in (cpu_ops, reference)
        )
        assert_same_bits("x_t", got, want)

    return compare


def _transition(
    shape: tuple[int, ...] = (3, 7, 53), *, learned: bool = False, layout: torch.memory_format | None = None
) -> Compare:
    """The comparison of log-probabilities: of guided lanes, a parked one, one beyond the table, more than one run."""

    def compare() -> None:
        torch.manual_seed(0)
        rows = (3, 1, kernels.PARKED, 5) * 4  # enough lanes that another order shows in the last bit of one
        given = StepCase(shape, learned=learned, guidance=(7.5, 1.0, 0.0, 2.0) * 4, rows=rows)
        known = given.arguments(CPU)
        names = ("x", "out", "rows", "coefficients", "out_uncond", "guidance")
        chosen = {name: known[name] for name in names}
        if layout is not None:
            chosen["out"] = chosen["out"].to(memory_format=layout)
        chosen |= {"x_next": torch.randn_like(chosen["x"])}
        chosen |= {"transitions": kernels.transitions_of(chosen["coefficients"])}
        got, want = (ops.transition_logprob(**chosen) for ops in (cpu_ops, reference))
        if learned:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)
        else:
            assert_same_bits("logprob", got, want)

    return compare


PLAIN = _step(StepCase((1030,), torch.float32, "drawn", copies=2))
LAST = _step(StepCase((3, 7, 7), torch.float32, "drawn"), layout=torch.channels_last)
LEARNED = _step(StepCase((3, 7, 7), torch.float16, "drawn", learned=True))
GUIDED = _step(StepCase((9,), torch.float32, "given", guidance=(7.5, 1.0, 0.0, 2.0)))
GUIDED_NAN = _step(StepCase((9,), torch.float32, "given", guidance=(7.5, 1.0, 0.0, 2.0)), nan="guidance")
SILENT = _step(StepCase((9,), torch.float32, "none"))
SILENT_NAN = _step(StepCase((9,), torch.float32, "none"), nan="nan")
SILENT_INF = _step(StepCase((9,), torch.float32, "none", clip=torch.inf), nan="inf")
BEYOND = _step(StepCase((9,), torch.float32, "none", rows=(5, 1, 2**40)), nan="nan")
HISTORY = _step(StepCase((9,), torch.float32, "none", history=3))
NOISY_HISTORY = _step(StepCase((1030,), torch.float32, "given", history=3))
LONG_HISTORY = _step(StepCase((3, 1030), torch.float32, "none", history=2))
UNGUIDED = _step(StepCase((9,), torch.float32, "given", guidance=(7.5, 1.0, 0.0, 2.0), unguided=True))
KNOWN = _step(StepCase((1030,), torch.float32, "drawn", known=True))
FIXED = _step(StepCase((9,), torch.float32, "none", known=True))


@dataclass(frozen=True)
class Mutant:
    """An error planted in a file, and the comparison that must see it."""

    file: str
    compare: Compare
    old: str
    new: str


NEXT = "row.next_x0 * x0 + row.next_x * x[i] + row.next_out * out[i];"
MUTANTS = {
    "a coefficient": Mutant("step.cpp", SILENT, NEXT, NEXT.replace("next_x *", "x0_x *")),
    "a sign": Mutant("step.cpp", SILENT, NEXT, NEXT.replace("+ row.next_out", "- row.next_out")),
    "a term left out": Mutant("step.cpp", SILENT, NEXT, "row.next_x0 * x0 + row.next_x * x[i];"),
    "terms in another order": Mutant(
        "step.cpp", PLAIN, NEXT, "row.next_x0 * x0 + (row.next_x * x[i] + row.next_out * out[i]);"
    ),
    "no lower bound": Mutant("step.cpp", SILENT, "x0 = x0 < low ? low : x0;", ""),
    "no upper bound": Mutant("step.cpp", SILENT, "x0 = x0 > high ? high : x0;", ""),
    "a NaN that the clip hides": Mutant("step.cpp", SILENT_NAN, "x0 < low ? low : x0", "x0 >= low ? x0 : low"),
    "another row": Mutant("step.cpp", SILENT, "table + row *", "table + std::max(row - 1, int64_t(0)) *"),
    "a row beyond the table": Mutant("step.cpp", BEYOND, "sizeof(float), NOTHING);", "sizeof(float), 1.0f);"),
    "a parked lane": Mutant("step.cpp", SILENT, "if (at < 0) {", "if (at < -1) {"),
    "a parked lane filled": Mutant("step.cpp", SILENT, "if (fill) write", "if (!fill) write"),
    "a parked lane not filled": Mutant("step.cpp", _fresh_step, "if (fill) write", "if (!fill) write"),
    "x0 not the clipped one": Mutant("step.cpp", SILENT, "start[i] = x0;", "start[i] = x[i];"),
    "the last copy": Mutant("step.cpp", PLAIN, "i < copies;", "i < copies - 1;"),
    "the copies in one place": Mutant("step.cpp", PLAIN, "i * images * channels * pixels + start", "start"),
    "another lane's state": Mutant("step.cpp", SILENT, "x.read(image,", "x.read(0,"),
    "another lane's seed": Mutant("step.cpp", PLAIN, "uint64_t(seeds[image])", "uint64_t(seeds[0])"),
    "another lane's index": Mutant("step.cpp", PLAIN, "uint32_t(indices[image])", "uint32_t(indices[0])"),
    "the row for the timestep": Mutant("step.cpp", PLAIN, "timesteps[std::min(at, table_rows - 1)]", "at"),
    "another stream": Mutant("step.cpp", PLAIN, "STREAM_STEP}", "STREAM_FORWARD}"),
    "one run's noise": Mutant("step.cpp", PLAIN, "draw(key, channel * pixels + pixel,", "draw(key, 0 * pixel,"),
    "one channel's noise": Mutant("step.cpp", LAST, "draw(key, channel * pixels + pixel,", "draw(key, pixel,"),
    "another channel": Mutant("step.cpp", LAST, "out.read(image, channel,", "out.read(image, 0 * channel,"),
    "variance for std": Mutant("step.cpp", PLAIN, "moved + row.sigma * z", "moved + row.sigma * row.sigma * z"),
    "variance for std after a history": Mutant(
        "step.cpp", NOISY_HISTORY, "add(row.sigma, z,", "add(row.sigma * row.sigma, z,"
    ),
    "noise before a history": Mutant("step.cpp", NOISY_HISTORY, "&& !weighs_history(row)", ""),
    "noise twice": Mutant("step.cpp", PLAIN, "z != nullptr && !at_once", "z != nullptr"),
    "log variance for log std": Mutant("step.cpp", LEARNED, "= row.half_log_min +", "= 2 * row.half_log_min +"),
    "v not moved to [0, 1]": Mutant("step.cpp", LEARNED, "(v[i] * 0.5f + 0.5f)", "v[i]"),
    "out for v": Mutant("step.cpp", LEARNED, "out.read(image, channels + channel,", "out.read(image, channel,"),
    "a polynomial's term": Mutant("step.cpp", _exponential, "p = p * g + 1.0 / 24.0;", "p = p * g + 1.0 / 25.0;"),
    "guidance from the wrong end": Mutant("step.cpp", GUIDED, "= uncond[i] + scale", "= out[i] + scale"),
    "guidance of one": Mutant("step.cpp", GUIDED_NAN, "guidance[image] != 1.0f", "guidance[image] != 2.0f"),
    "no history": Mutant("step.cpp", HISTORY, "add(row.next_kept(age), kept", "add(0.0f, kept"),
    "history of the same row": Mutant("step.cpp", HISTORY, "kept(age) + start, next_run", "buffers[5], next_run"),
    "history read by a row without": Mutant("step.cpp", HISTORY, "if (row.next_kept(age) != 0.0f) add", "add"),
    "an older weight for the oldest": Mutant(
        "step.cpp", HISTORY, "next_prev2 : next_prev3;", "next_prev2 : next_prev2;"
    ),
    "the history of another lane": Mutant("step.cpp", HISTORY, "kept(age) + start, next_run", "kept(age), next_run"),
    "the history's stride": Mutant(
        "step.cpp", HISTORY, "history + age * images * channels", "history + age * channels"
    ),
    "the history not shifted": Mutant(
        "step.cpp", HISTORY, "int64_t age = entries - 1; age > 0;", "int64_t age = 0; age > 0;"
    ),
    "the history shifted in the wrong order": Mutant(
        "step.cpp",
        HISTORY,
        "int64_t age = entries - 1; age > 0; age--",
        "int64_t age = 1; age < entries; age++",
    ),
    "the history shifted to another place": Mutant(
        "step.cpp", LONG_HISTORY, "kept(age), FLOAT32, start, count);", "kept(age), FLOAT32, 0, count);"
    ),
    "what is kept put in another place": Mutant(
        "step.cpp", LONG_HISTORY, "write_run(run, kept(0), FLOAT32, start,", "write_run(run, kept(0), FLOAT32, 0,"
    ),
    "x0 kept alone": Mutant("step.cpp", HISTORY, "row.keep_x * x[i] + row.keep_x0 * x0;", "row.keep_x0 * x0;"),
    "every row keeps something": Mutant(
        "step.cpp", HISTORY, "entries > 0 && (row.keep_x != 0.0f || row.keep_x0 != 0.0f)", "entries > 0"
    ),
    "the state alone kept by no row": Mutant("step.cpp", _state_kept, "row.keep_x != 0.0f || row", "row"),
    "what the network is shown not scaled": Mutant("step.cpp", SILENT, "row.net_scale != 1.0f", "false"),
    "the next state scaled": Mutant(
        "step.cpp", SILENT, "next_run, buffers[0], count);\n      shown", "next_run, next_run, count);\n      shown"
    ),
    "an unguided row guided": Mutant("step.cpp", UNGUIDED, " && row.unguided == 0.0f", ""),
    "rescaled guidance left out": Mutant("step.cpp", _whole_image, "result.rescale != 0.0f || ", ""),
    "known region left to the sampler": Mutant(
        "step.cpp", FIXED, "known[i] == known[i] ? row.known_x * known[i] : next[i]", "next[i]"
    ),
    "known region with noise left to the sampler": Mutant(
        "step.cpp", KNOWN, "known[i] == known[i] ? fixed : next[i]", "next[i]"
    ),
    "known region without noise": Mutant("step.cpp", KNOWN, " + row.known_sigma * z[i];", ";"),
    "known region by the sampler's scale": Mutant("step.cpp", KNOWN, "row.known_sigma * z[i]", "row.sigma * z[i]"),
    "known region of another lane": Mutant("step.cpp", KNOWN, "known.read(image,", "known.read(0,"),
    "noise of another lane": Mutant("step.cpp", GUIDED, "noise.read(image,", "noise.read(0,"),
    "a flag that was set": Mutant("step.cpp", SILENT_NAN, "__ATOMIC_RELAXED) < 0", "__ATOMIC_RELAXED) >= 0"),
    "no flag for infinity": Mutant("step.cpp", SILENT_INF, "largest < 0x7F800000", "largest < 0x7F800001"),
    "the flag of another lane": Mutant("step.cpp", SILENT_NAN, "flag(flags + image,", "flag(flags,"),
    "additions in another order": Mutant(
        "transition.cpp", _transition(), "terms[i] += terms[half + i]", "terms[i] = terms[2 * i] + terms[2 * i + 1]"
    ),
    "a run left out": Mutant("transition.cpp", _transition(), "image * runs, runs)", "image * runs, 1)"),
    "a deviation in float32": Mutant(
        "transition.cpp",
        _transition(),
        "double(next[i]) - double(mean[i]);\n    terms",
        "next[i] - mean[i];\n    terms",
    ),
    "no weight": Mutant(
        "transition.cpp",
        _transition(),
        "weight * (deviation * deviation);\n  }\n}\n\n// The",
        "deviation * deviation;\n  }\n}\n\n// The",
    ),
    "the normalizer of one element": Mutant(
        "transition.cpp", _transition(), "normalizer * double(elements)", "normalizer"
    ),
    "a step of a parked lane": Mutant("transition.cpp", _transition(), "if (rows[image] < 0) {", "if (false) {"),
    "another channel's output": Mutant(
        "transition.cpp", _transition(layout=torch.channels_last), "out.read(image, channel,", "out.read(image, 0,"
    ),
    "an unguided lane guided": Mutant(
        "transition.cpp", _transition(), "guidance[image] != 1.0f", "guidance[image] != 9.0f"
    ),
    "a deviation that was not scaled": Mutant(
        "transition.cpp", _transition(learned=True), " * double(exponential(-exponent))", ""
    ),
    "a scale that was not counted": Mutant("transition.cpp", _transition(learned=True), " + double(exponent);", ";"),
    "another table": Mutant("forward.cpp", _forward, "weigh(entry(signal,", "weigh(entry(scale,"),
    "beyond the schedule": Mutant("forward.cpp", _forward, "table[t] : NOTHING", "table[t] : 0.0f"),
    "the noise of a step": Mutant("forward.cpp", _forward, "STREAM_FORWARD}", "STREAM_STEP}"),
    "noise not returned": Mutant(
        "forward.cpp",
        _forward,
        "write_run(eps, noise_out, FLOAT32, start,",
        "write_run(eps, noise_out, FLOAT32, element,",
    ),
    "the weights": Mutant("forward.cpp", _posterior, "a * x[i] + b * y[i]", "b * x[i] + a * y[i]"),
    "no log": Mutant("forward.cpp", _posterior, "entry(log_variances,", "entry(variances,"),
    "a lane's place": Mutant("forward.cpp", _noise, "image * elements + element", "image * elements"),
    "no stream": Mutant("forward.cpp", _noise, "uint32_t(stream)", "0"),
    "nine rounds": Mutant("noise.h", _noise, "round < 10;", "round < 9;"),
    "half of the key": Mutant("noise.h", _noise, "uint32_t(key.seed >> 32)", "uint32_t(key.seed)"),
    "a stream of the first round": Mutant("noise.h", _noise, "key.stream ^ k1", "k1"),
    "a timestep of the second round": Mutant("noise.h", _noise, "^ key.timestep ^ k0", "^ k0"),
    "a key of the third round": Mutant("noise.h", _noise, "(k1 + 2 * W1)", "(k1 + W1)"),
    "quads in another order": Mutant("noise.h", _noise, "w % 2 * 2 * BLOCKS", "w % 2 * BLOCKS"),
    "the next quad": Mutant("noise.h", _noise, "uint64_t(element / 4 + i", "uint64_t(element / 4 + 1 + i"),
    "a quad's start": Mutant("noise.h", LAST, "return values + skipped;", "return values;"),
    "the quadrant": Mutant("noise.h", _noise, "angle_word << 30", "angle_word << 29"),
    "the cosine": Mutant("noise.h", _noise, "0.04166107252240181f", "0.0416667f"),
    "halves away from even": Mutant("sampling.h", _narrowed(torch.bfloat16), "word + 0x7FFFu", "word + 0x8000u"),
    "a mantissa's end": Mutant("sampling.h", _narrowed(torch.float16), "0x0FFFu", "0x07FFu"),
    "too large": Mutant(
        "sampling.h",
        _narrowed(torch.float16),
        "(bits_of<float>(word & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f",
        "bits_of<float>(word & 0x7FFFFFFFu) * 4.0f",
    ),
    "subnormal numbers": Mutant("sampling.h", _widened(torch.float16), "- 0.5f;", "- 0.25f;"),
    "levels not rounded": Mutant("pixels.cpp", _pixels, "* 255.0f + 0x1.8p23f", "* 255.0f - 0.5f + 0x1.8p23f"),
    "no clamp": Mutant("pixels.cpp", _pixels, "value > 1.0f ? 1.0f : value", "value"),
    "NaN not black": Mutant("pixels.cpp", _pixels, "+ 0.5f : 0.0f;", "+ 0.5f : 1.0f;"),
    "pixels not interleaved": Mutant("pixels.cpp", _pixels, "pixel[i * C + c] =", "pixel[c * count + i] ="),
    "many channels": Mutant("pixels.cpp", _pixels, "to[i * channels + c] =", "to[c * count + i] ="),
}


def _text(mutant: Mutant, number: int) -> str:
    """The kernels with a mutant's error, in its namespace and under its number."""
    needed = {
        "sampling.h": ("step.cpp", "forward.cpp"),
        "noise.h": ("step.cpp", "forward.cpp"),
        "transition.cpp": ("step.cpp", "transition.cpp"),
    }
    sources = needed.get(mutant.file, (mutant.file,))
    files = {name: (FOLDER / name).read_text() for name in (*HEADERS, *sources)}
    files[mutant.file] = mutate(files[mutant.file], mutant.old, mutant.new)
    body = "\n".join(text[text.index("namespace {") :] for text in files.values())
    body = body.replace('extern "C" void ', f'extern "C" void mutant_{number}_')
    return f"namespace mutant_{number} {{\n{body}\n}}\n"


@pytest.fixture(scope="session")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library of all mutants."""
    headers = [(FOLDER / name).read_text() for name in HEADERS]
    text = "".join(header[: header.index("namespace {")] for header in headers)
    text += "".join(_text(mutant, number) for number, mutant in enumerate(MUTANTS.values()))
    target = tmp_path_factory.mktemp("mutants") / "mutants.so"
    compiler.build(text, [*sampling_library.FLAGS, "-O0"], target)
    return ctypes.CDLL(str(target))


def _functions(library: ctypes.CDLL, prefix: str = "") -> Any:
    """What stands in for :func:`stepfusion.kernels.cpu.sampling_library.function`."""

    def function(kernel: str, addresses: int, sizes: int) -> Any:
        found = library[prefix + kernel]
        found.argtypes = [ctypes.c_void_p] * addresses + [ctypes.c_int64] * sizes
        found.restype = None
        return found

    return function


@pytest.mark.parametrize("name", MUTANTS)
def test_an_error_is_caught(name: str, mutants: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, number = MUTANTS[name], list(MUTANTS).index(name)
    torch.manual_seed(0)
    mutant.compare()
    monkeypatch.setattr(sampling_library, "function", _functions(mutants, f"mutant_{number}_"))
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=r"differ|beyond"):
        mutant.compare()


def test_other_processors_have_plain_cpp_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor none of whose instructions the kernels name."""
    text, named = re.subn(r"defined\(__\w+__\)", "0", sampling_library.source())
    assert named > 10
    target = tmp_path / "plain.so"
    compiler.build(text, [*sampling_library.FLAGS, "-O1"], target)
    monkeypatch.setattr(sampling_library, "function", _functions(ctypes.CDLL(str(target))))
    for compare in (_noise, _forward, PLAIN, LAST):
        compare()
