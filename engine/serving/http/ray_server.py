"""The HTTP application as a Ray Serve deployment: its replicas, on one machine or several, behind Ray's proxy."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette

from stepfusion.serving.http.model_app import ModelApp
from stepfusion.serving.http.stopping import stopping, when_gone

if TYPE_CHECKING:
    from ray import serve

_NAME = "stepfusion"
_ONGOING = 1024  # requests at a replica, of which its own queue refuses what is too much
_LAST_WORDS_SECONDS = 5.0  # for the responses of requests that were ended, before Ray kills a replica


@dataclass(frozen=True)
class Replicas:
    """How many, and what each takes of a machine: CPUs, which also are its threads, and GPUs or parts of one."""

    number: int = 1
    cpus: float = 1.0
    gpus: float = 0.0


def deployment(model: ModelApp, replicas: Replicas, drain: float) -> serve.Application:
    """What ``serve.run`` runs. A replica loads the model when it starts.

    Ray tells a replica nothing before it kills it, and a client of a replica that is killed gets a plain 500. So a
    replica looks whether its application is still wanted, and ends its own requests after ``drain`` seconds.
    """
    from ray import serve

    def is_wanted() -> bool:
        application = serve.status().applications.get(_NAME)
        return application is not None and application.status != "DELETING"

    def build() -> Starlette:
        app = model.make()
        when_gone(is_wanted, drain, app.state.end_requests)
        return app

    @serve.ingress(build)
    class Model:
        app: Starlette

        def check_health(self) -> None:
            if not self.app.state.service.live:
                raise RuntimeError("the engine is dead")  # Ray replaces the replica

    deployed = serve.deployment(
        name=_NAME,
        num_replicas=replicas.number,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        max_ongoing_requests=_ONGOING,
        graceful_shutdown_timeout_s=drain + _LAST_WORDS_SECONDS,
    )(Model)
    application: serve.Application = deployed.bind()
    return application


def serve_with_ray(
    model: ModelApp,
    replicas: Replicas,
    *,
    host: str,
    port: int,
    address: str | None,
    drain: float,
    ready: Callable[[], object],
) -> None:
    """Run the deployment until SIGINT or SIGTERM; then let replicas finish what they have, ``drain`` seconds at most.

    Args:
        address: of a Ray cluster; None starts one here, which ends with this process.
        ready: called when it serves.
    """
    import ray
    from ray import serve

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    stopped = threading.Event()
    ray.init(**options, log_to_driver=False, logging_level=logging.WARNING)
    try:
        with stopping(stopped.set):
            serve.start(http_options={"host": host, "port": port})
            serve.run(deployment(model, replicas, drain), name=_NAME, route_prefix="/")
            if not stopped.is_set():
                ready()
            while not stopped.wait(0.2):  # a wait without end would hold the signal back
                pass
            serve.delete(_NAME)
            if address is None:
                serve.shutdown()
    finally:
        ray.shutdown()
