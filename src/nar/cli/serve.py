"""`nar serve`: models behind OpenAI's routes, with a page to use them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from nar.cli import options as shared
from nar.cli.app import app, echo

NEEDED = ("fastapi", "uvicorn", "multipart", "prometheus_client")


@app.command(
    epilog="Examples: nar serve fashion emoji clips, then open http://127.0.0.1:8000 in a browser, or: "
    "curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' "
    """-d '{"model": "fashion", "prompt": "sneaker", "seed": 1}'. """
    'In Python: openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")'
    '.images.generate(model="emoji", prompt="a red apple", extra_body={"seed": 1}).'
)
def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Bundled names, model folders or hub ids; NAME=MODEL names one."),
    ],
    host: Annotated[
        str, typer.Option(help="0.0.0.0 listens on every network, not only on this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="NAR_API_KEYS", help="Only these are let in; repeatable. Without any, everybody is."),
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Pictures of a model that are sampled together. Default: by memory.")
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(min=0, help="Pictures that wait beyond them; more are refused. Default: 4 a slot.")
    ] = None,
    max_waiting_per_key: Annotated[
        int | None,
        typer.Option(min=1, help="Of one key, or address where there are none; clips of a key. Default: all."),
    ] = None,
    videos: Annotated[
        Path | None, typer.Option(help="Folder of jobs for clips. Default: ~/.cache/nar/videos-PORT.")
    ] = None,
    keep_hours: Annotated[
        float,
        typer.Option(min=0, max=876_000, callback=shared.finite, help="How long clips are kept after they are made."),
    ] = 24.0,
    drain_seconds: Annotated[
        float,
        typer.Option(
            min=0, max=86_400, callback=shared.finite, help="What runs has so long to end after SIGTERM or Ctrl-C."
        ),
    ] = 30.0,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the encoder of models that read words, instead of their own."),
    ] = None,
    device: shared.Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, on a CPU float16, int8; auto measures.")] = "float32",
) -> None:
    """Serve models over HTTP: OpenAI's routes for pictures and clips, and a page that shows them grow."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ModuleNotFoundError(f"serving needs {', '.join(missing)}: pip install nar-gen[serve]")
    import logging

    from nar.serving.app import App
    from nar.serving.jobs import Store
    from nar.serving.models import Served
    from nar.serving.server import Server, bound

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    socket = bound(host, port)  # before the models are loaded: a port that is taken is known at once
    limits = {"slots": slots, "max_waiting": max_waiting, "max_waiting_per_key": max_waiting_per_key}
    served = []
    for source in models:
        served.append(Served.load(source, device=device, dtype=dtype, text_encoder=text_encoder, **limits))
        echo(served[-1].described())
    if text_encoder and not any(one.reads_words for one in served):
        raise ValueError("no model of these reads words: leave --text-encoder out")
    port = socket.getsockname()[1]
    store = None
    if any(one.makes_clips for one in served):
        if find_spec("av") is None:
            raise ModuleNotFoundError("clips are served as mp4, which needs PyAV: pip install nar-gen[video]")
        store = Store(videos or Path(f"~/.cache/nar/videos-{port}").expanduser(), keep_seconds=3600 * keep_hours)
    server = App(served, keys=api_key or (), store=store, max_waiting_per_key=max_waiting_per_key)
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    Server(server, drain_seconds=drain_seconds, on_start=lambda: echo(f"http://{shown}:{port}")).run_on(socket)
    for one in served:
        one.close()
