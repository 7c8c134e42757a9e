"""The model of a job: read once by every process, and known by what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepfusion import bulk
from stepfusion.bulk import checkpoint, local
from stepfusion.bulk.checkpoint import read_checkpoint
from stepfusion.bulk.worker import Worker
from stepfusion.errors import BulkError
from stepfusion_testing.bulk_jobs import TINY, generate, run_counting_reads, serve_counting_reads, start
from stepfusion_testing.tiny_model import save_tiny_model


def reads(place: Path) -> list[str]:
    """How often each process opened the model's config."""
    return [path.read_text() for path in place.glob("reads-*")]


def test_one_process_reads_its_checkpoint_once(place: Path) -> None:
    process = start(run_counting_reads, str(place), f"{TINY} --out out", "unet/config.json")
    process.join(60)
    assert process.exitcode == 0
    assert reads(place) == ["1"]


def test_every_process_of_several_reads_its_checkpoint_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, load = list[object](), checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", lambda source, lora: read.append(source) or load(source, lora))
    monkeypatch.setattr(local, "_serve", serve_counting_reads)
    generate(f"{TINY} --out out --devices cpu,cpu")
    assert read == ["model"]
    assert reads(place) == ["1", "1"]


@pytest.mark.parametrize("read_before", [False, True])
def test_a_worker_refuses_another_model(read_before: bool) -> None:
    generate(f"{TINY} --out out")
    job = bulk.verify(Path("out"))
    save_tiny_model(Path("other"), block_out_channels=(12,))
    config = bulk.WorkerConfig(job, Path("out").absolute(), "other", bulk.TableRequest(steps=2))
    with pytest.raises(BulkError, match="the model other is not the one that this job was begun with"):
        Worker(config, read_checkpoint("other") if read_before else None)


def test_the_digest_is_of_weights_and_configs() -> None:
    digest = read_checkpoint("model").digest
    assert read_checkpoint("./model").digest == digest
    for folder, changes in (("wide", {"block_out_channels": (12,)}), ("plain", {"num_class_embeds": None})):
        save_tiny_model(Path(folder), **changes)
        assert read_checkpoint(folder).digest != digest
    scheduler = Path("model/scheduler/scheduler_config.json")
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_end": 0.03}))
    assert read_checkpoint("model").digest != digest
