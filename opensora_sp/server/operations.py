"""What those who run the server ask it: /health, /ready, /metrics."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from opensora_sp import __version__
from opensora_sp.server.engine_process import Health
from opensora_sp.server.metrics import CONTENT_TYPE, Counted, Metrics


def add_operations(
    app: FastAPI, health: Callable[[], Health], draining: Callable[[], bool], metrics: Metrics
) -> None:
    """Serve the three. health: of the engine. draining: whether the server is being stopped."""
    app.add_middleware(Counted, metrics=metrics)

    @app.get("/health", include_in_schema=False)
    async def healthy() -> Response:
        """Live: the gateway answers, and its engine goes on and is not given up."""
        engine = health()
        content = {"status": str(engine), "version": __version__, "restarts": engine.restarts}
        return JSONResponse(content, 503 if engine.state == "failed" else 200)

    @app.get("/ready", include_in_schema=False)
    async def ready() -> Response:
        """Ready: jobs are taken and made now."""
        state = "draining" if draining() else str(health())
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics", include_in_schema=False)
    def text() -> Response:
        """Metrics for Prometheus; in a thread, for it walks through all jobs."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)
