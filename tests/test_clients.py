"""Requests of vLLM-Omni's and SGLang's benchmarks, written down from their sources as aiohttp sends them."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from nar import Pipeline
from nar.serving.jobs import Store
from nar.serving.models import Served
from serving_tools import http, serving

RECORDED = json.loads((Path(__file__).parent / "data/clients.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def url(toy_folder: Path, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = [Served.load(f"toy={toy_folder}", slots=4), Served.load(f"clips={clips_folder}", slots=2)]
    store = Store(tmp_path_factory.mktemp("videos"), keep_seconds=3600)
    with serving(models, store=store) as (address, _):
        yield address


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, "png")
    return file.getvalue()


def sent(url: str, recorded: dict[str, Any]) -> httpx2.Response:
    """Send a recorded request; each field of a form has a content type, as aiohttp gives it one."""
    if "json" in recorded:
        body = json.dumps(recorded["json"]).encode()
        return http.post(url + recorded["path"], content=body, headers=recorded["headers"])
    border, body = "9f2c0d2a", b""
    for name, value in recorded["form"]:
        head = f'Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="{name}"'
        body += f"--{border}\r\n{head}\r\n\r\n{value}\r\n".encode()
    if "file" in recorded:
        name, filename, kind = recorded["file"]
        head = f'Content-Type: {kind}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"'
        body += f"--{border}\r\n{head}\r\n\r\n".encode() + picture() + b"\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary={border}"}
    return http.post(url + recorded["path"], content=body + f"--{border}--\r\n".encode(), headers=headers)


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["client"][:60])
def test_recorded_requests(url: str, recorded: dict[str, Any], toy_folder: Path) -> None:
    answer = sent(url, recorded)
    if refused := recorded.get("refused"):
        assert answer.status_code == 400
        assert refused in answer.json()["error"]["message"]
        return
    assert answer.status_code == 200, answer.text
    if recorded["path"] != "/v1/videos":
        made = answer.json()
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["data"][0]["b64_json"]))).convert("RGB"))
        options = {key: value for key, value in recorded["json"].items() if key == "guidance_scale"}
        pipe = Pipeline.from_pretrained(toy_folder, device="cpu")
        expected = pipe("pear", seed=recorded.get("seed", made["seed"]), output_type="np", **options).images[0]
        assert np.array_equal(pixels, expected)
        return
    job = answer.json()  # then as both clients poll, fetch, and as one of them cleans up
    while job["status"] not in ("completed", "failed"):
        time.sleep(0.02)
        job = http.get(f"{url}/v1/videos/{job['id']}").json()
    assert job["status"] == "completed"
    assert job["seed"] == recorded.get("seed", job["seed"])
    content = http.get(f"{url}/v1/videos/{job['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert len(content.content) > 100
    assert http.delete(f"{url}/v1/videos/{job['id']}").status_code == 200


def test_what_they_ask_before(url: str) -> None:
    assert http.get(f"{url}/health").status_code == 200
    assert http.get(f"{url}/v1/model_info").status_code == 404  # SGLang's; its client goes on with --model
