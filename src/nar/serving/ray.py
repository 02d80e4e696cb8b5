"""The server as a Ray Serve deployment: replicas of the same app, each with its own models.

Knows Ray's settings; does not know routes or models. Ray's own refusals come only beyond the app's, which are OpenAI's.

    serve run nar.serving.ray:build models=fashion,emoji replicas=2
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from nar.serving.app import App
from nar.serving.jobs import Store
from nar.serving.models import Served


class Settings(BaseModel):
    """What `serve run` and a YAML of Ray's may set.

    Attributes:
        models: as for `nar serve`, separated by commas.
        replicas: with `most_replicas` the least of them; between the two Ray keeps `target` requests a replica.
        cpus, gpus: of a replica.
        videos: a folder that all replicas share, for clips; without it there are none.
        keys: separated by spaces.
    """

    model_config = ConfigDict(extra="forbid")

    models: str
    replicas: int = Field(default=1, ge=1)
    most_replicas: int | None = Field(default=None, ge=1)
    target: int = Field(default=8, ge=1)
    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    device: str | None = None
    dtype: str = "float32"
    slots: int | None = Field(default=None, ge=1)
    max_waiting: int | None = Field(default=None, ge=0)
    videos: str | None = None
    keys: str = ""


def make(settings: Settings) -> App:
    """The app of one replica, with its models; called in its process, so that no model is sent to it."""
    limits: dict[str, Any] = {"slots": settings.slots, "max_waiting": settings.max_waiting}
    names = [name for name in settings.models.split(",") if name]
    models = [Served.load(name, device=settings.device, dtype=settings.dtype, **limits) for name in names]
    store = None if settings.videos is None else Store(Path(settings.videos).expanduser())
    return App(models, keys=settings.keys.split(), store=store)


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """What `serve run nar.serving.ray:build NAME=VALUE ...` deploys; raises ValueError for settings that are none."""
    settings = Settings.model_validate(dict(arguments))
    threads = str(max(1, int(settings.cpus)))
    if settings.most_replicas is None:
        scale: dict[str, Any] = {"num_replicas": settings.replicas}
    else:
        bounds = {"min_replicas": settings.replicas, "max_replicas": settings.most_replicas}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": settings.target}}
    deployment = serve.deployment(
        name="nar",
        # Above what the app takes, so that its own refusals are seen: they say when to come back.
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=30,
        health_check_period_s=5,
        ray_actor_options={
            "num_cpus": settings.cpus,
            "num_gpus": settings.gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}},
        },
        **scale,
    )
    return deployment(serve.ingress()(Replica)).bind(settings.model_dump())


class Replica:
    """One replica: Ray asks it for its app once it is made, and for its health ever after."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._app = make(Settings.model_validate(dict(settings)))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app.asgi

    def check_health(self) -> None:
        """Raise where a model does not run any more, so that Ray replaces this replica."""
        if dead := [name for name, served in self._app.models.items() if not served.batcher.is_alive()]:
            raise RuntimeError(f"not running: {', '.join(dead)}")
