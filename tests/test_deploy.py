"""What deploy/ says is so: metrics that exist, paths that answer, commands that parse, and time enough to drain."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'http'")
pytest.importorskip("prometheus_client", reason="the metrics need the extra 'serving'")
pytest.importorskip("yaml", reason="reads compose.yaml and kubernetes.yaml")

import yaml

from stepfusion.commands.serve import add_serve_arguments
from stepfusion.commands.warm import add_warm_arguments
from stepfusion.lanes.batch_size import default_batch
from stepfusion.options import ExecutionOptions
from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.metrics import PrometheusMetrics
from stepfusion_testing.http_service import gated_engine

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = [DEPLOY / "Dockerfile.cpu", DEPLOY / "Dockerfile.cuda"]
GRAFANA = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
#: Labels that Prometheus itself adds.
OF_PROMETHEUS = {"job", "instance", "le"}


def registered() -> dict[str, set[str]]:
    """The series that the server exposes, and the labels of each."""
    registry = PrometheusMetrics().registry
    assert registry is not None
    found: dict[str, set[str]] = {}
    kinds = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    for metric in registry.collect():
        labels = {"request_seconds": {"stage"}, "requests": {"outcome"}, "rejected": {"reason"}}
        known = labels.get(metric.name.removeprefix("stepfusion_"), set())
        found |= {metric.name + end: known for end in kinds[metric.type]}
    return found


def faults(expression: str) -> list[str]:
    """What a query names that the server does not expose."""
    series = registered()
    names = re.findall(r"stepfusion_\w+", expression)
    wrong = [name for name in names if name not in series]
    allowed = OF_PROMETHEUS.union(*(series[name] for name in names if name in series))
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", expression)
    grouped = [name.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for name in group.split(",")]
    return wrong + [label for label in (*selected, *grouped) if label not in allowed]


def expressions() -> list[str]:
    return [target["expr"] for panel in GRAFANA["panels"] for target in panel["targets"]]


def test_every_metric_of_the_dashboard_exists() -> None:
    assert len(expressions()) >= 10
    assert {expression: wrong for expression in expressions() if (wrong := faults(expression))} == {}
    queries = [one["query"] for one in GRAFANA["templating"]["list"] if one["type"] == "query"]
    for query in queries:
        assert set(re.findall(r"stepfusion_\w+", query["query"])) <= set(registered())


def test_every_metric_is_on_the_dashboard_and_those_of_the_page_exist() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").partition("## Watching")[2]
    assert {name for name in re.findall(r"stepfusion_\w+", page) if name not in registered()} == set()
    shown = set(re.findall(r"stepfusion_\w+", " ".join(expressions())))
    assert set(registered()) - shown == set()


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("sum(stepfusion_images)", ["stepfusion_images"]),
        ("rate(stepfusion_request_seconds[1m])", ["stepfusion_request_seconds"]),
        ('rate(stepfusion_requests_total{reason="dead"}[1m])', ["reason"]),
        ("sum by (le, outcome) (rate(stepfusion_request_seconds_bucket[1m]))", ["outcome"]),
    ],
)
def test_a_metric_that_is_not_there_is_noticed(expression: str, wrong: list[str]) -> None:
    assert faults(expression) == wrong


def test_panels_lie_beside_each_other() -> None:
    cells = [
        (x, y)
        for panel in GRAFANA["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in GRAFANA["panels"]}) == len(GRAFANA["panels"])


# Containers


def test_the_requirements_are_those_of_the_extras() -> None:
    """All that ``pip install .[http]`` asks for, whatever extras it names in turn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted, names = set(project["dependencies"]), ["http"]
    while names:
        for line in project["optional-dependencies"][names.pop()]:
            if ours := re.fullmatch(r"stepfusion\[(.*)\]", line):
                names += ours[1].split(",")
            else:
                wanted.add(line)
    (words,) = re.findall(r"RUN python (requirements\.py .*) > ", DOCKERFILES[0].read_text(encoding="utf-8"))
    script, *named = words.split()
    command = [sys.executable, str(DEPLOY / script), *named]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == sorted(wanted)


def serving(words: list[str]) -> argparse.Namespace:
    """The arguments of ``stepfusion serve``; SystemExit if they do not parse."""
    assert words[0] == "serve"
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return parser.parse_args(words[1:])


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile's last stage."""
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    last = text.rsplit("\nFROM ", 1)[1]
    for line in last.splitlines()[1:]:
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix)
def test_an_image_serves_as_nobody_in_particular(path: Path) -> None:
    found = dict(instructions(path))
    assert found["USER"] == "10001:10001"
    assert json.loads(found["ENTRYPOINT"]) == ["stepfusion"]
    args = serving(json.loads(found["CMD"]))
    assert (args.local, args.host, str(args.port)) == (True, "0.0.0.0", found["EXPOSE"])
    assert "/healthz" in found["HEALTHCHECK"]
    compile(json.loads(found["HEALTHCHECK"].partition("CMD ")[2])[2], "healthcheck", "exec")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", path.read_text(encoding="utf-8"), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


def test_the_cpu_image_is_warmed_for_what_it_serves() -> None:
    """By the user that serves, into the cache in use, for the model and the lanes of its command."""
    steps = list(instructions(DEPLOY / "Dockerfile.cpu"))
    names = [name for name, _ in steps]
    place = next(i for i, (name, text) in enumerate(steps) if name == "RUN" and "stepfusion warm" in text)
    assert names.index("USER") < place
    defaults = dict(text.split("=", 1) for name, text in steps if name == "ARG")
    (directory,) = set(re.findall(r"--out (\S+)", steps[place][1]))
    environment = next(text for name, text in steps if name == "ENV")
    assert f"STEPFUSION_CACHE={directory}" in environment.split()
    assert f"install -d -o 10001 -g 10001 -m 0700 {directory}" in steps[0][1]
    served = serving(json.loads(dict(steps)["CMD"]))
    for command in steps[place][1].split("&&"):
        for name, value in defaults.items():
            command = command.replace(f"${{{name}}}", value.strip('"'))
        parser = argparse.ArgumentParser()
        add_warm_arguments(parser)
        args = parser.parse_args(command.partition("stepfusion warm ")[2].split())
        assert args.model == served.model
        assert args.lanes == (served.lanes or default_batch(ExecutionOptions(), torch.device("cpu")))
        assert (args.dtype, args.backend, args.network, args.invariant) == ("auto", "auto", "auto", False)
        assert 1 in args.batches


def test_a_cache_is_added_where_the_image_looks_for_it() -> None:
    added = dict(instructions(DEPLOY / "Dockerfile.warm"))["COPY"]
    assert added == "--chown=10001:10001 . /var/cache/stepfusion"
    found = dict(instructions(DEPLOY / "Dockerfile.cuda"))
    assert "STEPFUSION_CACHE=/var/cache/stepfusion" in found["ENV"].split()
    assert "TRITON_CACHE_DIR" not in found["ENV"], "Triton's kernels are in the same cache"


def documents(name: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")) if one]


def paths_of_the_server() -> set[str]:
    _, engine = gated_engine()
    return {route.path for route in make_app(AsyncEngine(engine)).routes}  # type: ignore[attr-defined]


def test_compose() -> None:
    compose = documents("compose.yaml")[0]
    server = compose["services"]["server"]
    words = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in server["command"]]
    args = serving(words)
    assert int(server["stop_grace_period"].removesuffix("s")) > args.drain + 10
    assert server["read_only"]
    scraped = yaml.safe_load(compose["configs"]["prometheus"]["content"])["scrape_configs"][0]
    assert scraped["static_configs"] == [{"targets": [f"server:{args.port}"]}]
    assert "/metrics" in paths_of_the_server()  # Prometheus' default path
    assert yaml.safe_load(compose["configs"]["datasource"]["content"])["datasources"][0]["uid"] == "prometheus"
    assert (DEPLOY / "grafana.json").is_file()
    for part in ("prometheus", "grafana"):
        assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", compose["services"][part]["image"])
    used = {config["source"] for one in compose["services"].values() for config in one.get("configs", [])}
    assert used == set(compose["configs"])
    assert set(documents("compose.gpu.yaml")[0]["services"]) <= set(compose["services"])


def test_kubernetes() -> None:
    found = {one["kind"]: one for one in documents("kubernetes.yaml")}
    pod = found["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    args = serving(container["args"])
    (port,) = container["ports"]
    assert (args.host, args.port) == ("0.0.0.0", port["containerPort"])
    wanted = {"startupProbe": "/readyz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    for probe, path in wanted.items():
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
        assert path in paths_of_the_server()
    paused = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > paused + args.drain + 10
    labels = pod["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
    metadata = pod["metadata"]["annotations"]
    assert metadata["prometheus.io/path"] in paths_of_the_server()
    assert metadata["prometheus.io/port"] == str(args.port)
