"""A cache that others may write to is not used: what lies in it is executed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from stepfusion.execution import cache
from stepfusion.kernels import cache as kernels_cache

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in use, with stepfusion's own directory in it; nothing else says where caches are."""
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path / "outer" / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert cache.make_cache_directory("inductor") == tmp_path / "outer" / "cache" / "inductor"
    return tmp_path


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o1777, 0o770])
@pytest.mark.parametrize("folder", ["outer/cache/inductor", "outer/cache", "outer"])
def test_a_directory_that_others_may_write_is_not_used(
    folder: str, mode: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_cache, "_is_own_group", lambda group, user: False)
    (place / folder).chmod(mode)
    if mode & 0o1000 and folder != "outer/cache/inductor":  # nobody may rename there what is not theirs
        assert cache.make_cache_directory("inductor") is not None
        return
    message = rf"is not used, for code in it would be run: others may write to {place / folder} \(mode {mode:o}\)"
    with pytest.warns(RuntimeWarning, match=message):
        assert cache.make_cache_directory("inductor") is None


def test_a_link_to_a_directory_that_others_may_write_is_not_used(place: Path) -> None:
    (place / "open").mkdir()
    (place / "open" / "inner").mkdir(mode=0o700)
    (place / "open").chmod(0o777)
    (place / "outer" / "cache" / "inductor").rmdir()
    (place / "outer" / "cache" / "inductor").symlink_to(place / "open" / "inner")
    with pytest.warns(RuntimeWarning, match=f"others may write to {place / 'open'} "):
        assert cache.make_cache_directory("inductor") is None


def test_a_directory_of_another_user_is_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # whose own directories everybody trusts
        os.chown(place / "outer" / "cache" / "inductor", 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert cache.make_cache_directory("inductor") is None


def test_a_directory_of_root_is_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may do what it likes anyway: a container's image is its."""
    monkeypatch.setattr(Path, "stat", lambda path: os.stat_result((0o40755, 0, 0, 2, 0, 0, 0, 0, 0, 0)))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert kernels_cache.why_not_private(place / "outer" / "cache" / "inductor") is None


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o500])
def test_a_directory_that_others_may_only_read_is_used(mode: int, place: Path) -> None:
    (place / "outer").chmod(mode)
    assert cache.make_cache_directory("inductor") is not None
    (place / "outer").chmod(0o700)


def test_a_group_of_the_user_alone_may_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_cache, "_is_own_group", lambda group, user: True)
    (place / "outer").chmod(0o770)
    assert cache.make_cache_directory("inductor") is not None


def test_what_is_made_under_any_umask_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        assert cache.make_cache_directory("cpp") == tmp_path / "cache" / "cpp"
    finally:
        os.umask(before)


def compiler_directory() -> str | None:
    """Where Inductor is told to compile, if it is told, which is for this user alone."""
    with cache.compiler_cache():
        used = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        assert used is None or kernels_cache.why_not_private(Path(used)) is None
    return used


@pytest.mark.parametrize("default", ["missing", "private", "open"])
def test_inductor_compiles_where_nobody_else_writes(
    default: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without stepfusion's cache, in Inductor's own directory, or apart if others may write to that one, too."""
    inductors = place / "inductors"
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.default_cache_dir", lambda: str(inductors))
    if default != "missing":
        inductors.mkdir(mode=0o700)
    if default == "open":
        inductors.chmod(0o777)
    (place / "outer" / "cache").chmod(0o777)
    with pytest.warns(RuntimeWarning, match="is not used"):
        used = compiler_directory()
    assert (used is None) == (default != "open")
    assert used is None or not Path(used).exists()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_users_own_choice_for_inductor_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "outer").chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
    assert str(place) != default_cache_dir()
    with cache.compiler_cache():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(place)


def test_each_set_of_instructions_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's keys name neither oneDNN's limit nor the processor, and what it keeps depends on both."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    names = {cache.inductor_folder()}
    for limit in ("AVX2", "AVX512_CORE", "avx2_vnni"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        names.add(cache.inductor_folder())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    names.add(cache.inductor_folder())
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: not torch.cuda.is_available())
    names.add(cache.inductor_folder())
    assert len(names) >= 5
    assert all(name.startswith("inductor-") and "/" not in name for name in names)
