"""Ray Serve around the same app: two replicas, one of which is killed while it works. Needs the extra `ray`."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image
from pydantic import ValidationError

from nar import Pipeline

ray = pytest.importorskip("ray", reason="Ray is an extra of its own, of half a GB")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PORT = 8456


@pytest.fixture(scope="module")
def client(toy_folder: Path) -> Iterator[openai.OpenAI]:
    from ray import serve

    from nar.serving.ray import build

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}.items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
        serve.start(http_options={"port": PORT, "host": "127.0.0.1"})
        serve.run(build({"models": f"toy={toy_folder}", "replicas": 2, "cpus": 0.5}), name="nar")
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=8, timeout=120)
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[int]:
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "ray::ServeReplica" in line]


def test_settings() -> None:
    from nar.serving.ray import build

    with pytest.raises(ValidationError, match="replicas"):
        build({"models": "fashion", "replicas": 0})
    with pytest.raises(ValidationError, match="model"):
        build({"model": "fashion"})


def test_streams_and_refusals(client: openai.OpenAI) -> None:
    events = [event.type for event in client.images.generate(prompt="pear", stream=True, partial_images=3)]
    assert events == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    with pytest.raises(openai.BadRequestError, match="red apple"):
        client.images.generate(prompt="fig")


def test_a_replica_that_is_killed_loses_nothing(client: openai.OpenAI, toy_folder: Path) -> None:
    """Its requests end in an error that the client sees and repeats."""
    pipe, outcomes = Pipeline.from_pretrained(toy_folder), Counter[str]()
    expected = [np.asarray(pipe("pear", seed=seed).images[0]) for seed in range(8)]

    def ask() -> None:
        for number in range(40):
            try:
                data = client.images.generate(prompt="pear", extra_body={"seed": number % 8}).data or []
            except openai.APIError as error:
                outcomes[type(error).__name__] += 1
                continue
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[0].b64_json or ""))))
            outcomes["right" if np.array_equal(picture, expected[number % 8]) else "wrong"] += 1

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    os.kill(replicas()[0], signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert outcomes == {"right": 240}
