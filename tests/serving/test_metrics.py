"""Metrics, spans and logs, with and without the libraries they need."""

import logging
from typing import Any

import pytest

import stepfusion as sf
from stepfusion.serving import AsyncEngine, Overloaded, metrics, tracing
from stepfusion_testing.serving_twins import NAN_LABEL, Gate, small_engine, wait_until_idle


def serve(**options: Any) -> AsyncEngine:
    """A service that has done three images, refused one request and failed another."""
    gate = Gate(small_engine().network)
    service = AsyncEngine(small_engine(gate), queue=8, **options).start()
    service.submit(n=3, steps=4, labels=0).result(30)
    with pytest.raises(sf.NonFiniteError):
        service.submit(n=1, steps=2, labels=NAN_LABEL).result(30)
    with pytest.raises(ValueError):
        service.submit(n=1, steps=0)
    gate.shut()
    waiting = [service.submit(n=8, steps=1, labels=0)]
    gate.wait_for_call()
    waiting += [service.submit(n=8, steps=1, labels=0)]
    with pytest.raises(Overloaded):
        service.submit(n=1, steps=1, labels=0)
    assert waiting[1].cancel()
    gate.open()
    waiting[0].result(30)
    wait_until_idle(service)
    service.close()
    return service


class TestPrometheus:
    def test_what_is_counted(self) -> None:
        pytest.importorskip("prometheus_client")
        service = serve()
        assert service.registry is not None
        expected = {
            "stepfusion_images_total": 3 + 8,
            "stepfusion_ticks_total": 4 + 2 + 1,
            "stepfusion_lanes": 16,
            "stepfusion_lanes_busy": 0,
            "stepfusion_queue_images": 0,
            "stepfusion_requests_active": 0,
        }
        got = {name: service.registry.get_sample_value(name) for name in expected}
        assert got == expected
        outcomes = {"done": 2, "nonfinite": 1, "cancelled": 1}
        for outcome, count in outcomes.items():
            labels = {"outcome": outcome}
            assert service.registry.get_sample_value("stepfusion_requests_total", labels) == count
        for reason, count in {"invalid": 1, "overloaded": 1}.items():
            assert service.registry.get_sample_value("stepfusion_rejected_total", {"reason": reason}) == count
        for stage in ("queued", "running", "total"):
            assert service.registry.get_sample_value("stepfusion_request_seconds_count", {"stage": stage}) == 4
        assert b"stepfusion_images_total 11.0" in service.metrics()

    def test_services_do_not_share_a_registry(self) -> None:
        client = pytest.importorskip("prometheus_client")
        first, second = serve(), serve()
        assert first.registry is not second.registry
        assert b"stepfusion" not in client.generate_latest()

    def test_without_the_client(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metrics, "find_spec", lambda name: None)
        service = serve()
        assert (service.registry, service.metrics()) == (None, b"")


class TestSpans:
    def test_a_request_and_its_stages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("opentelemetry.sdk")
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
        service = AsyncEngine(small_engine()).start()
        with provider.get_tracer("caller").start_as_current_span("caller") as caller:
            good = service.submit(n=2, steps=3, labels=0)
        good.result(30)
        with pytest.raises(sf.NonFiniteError):
            service.submit(n=1, steps=2, labels=NAN_LABEL).result(30)
        service.close()
        spans = [span for span in exporter.get_finished_spans() if span.name != "caller"]
        assert [span.name.removeprefix("stepfusion.") for span in spans] == ["queued", "running", "request"] * 2
        queued, running, request = spans[:3]
        assert request.parent is not None
        assert request.parent.span_id == caller.get_span_context().span_id
        assert queued.parent == running.parent == request.context
        assert queued.start_time == request.start_time <= queued.end_time == running.start_time
        assert running.end_time == request.end_time
        assert dict(request.attributes or {})["stepfusion.outcome"] == "done"
        assert spans[-1].parent is None
        assert spans[-1].status.status_code is trace.StatusCode.ERROR
        assert (spans[-1].status.description or "").startswith("NonFiniteError: image 0")

    def test_without_opentelemetry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracing, "find_spec", lambda name: None)
        assert type(tracing.make_tracing()) is tracing.Tracing
        assert serve().status.state == "closed"


def test_logs_have_fields_and_no_handlers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "stepfusion.serving"):
        serve()
    ended = [record for record in caplog.records if hasattr(record, "outcome")]
    assert [(record.outcome, record.images) for record in ended][:2] == [("done", 3), ("nonfinite", 1)]
    assert all(record.queued_s >= 0 and record.running_s >= 0 for record in ended)
    assert "became non-finite at step 1 of 2" in ended[1].getMessage()
    assert not logging.getLogger("stepfusion.serving").handlers
