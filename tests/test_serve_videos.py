"""Clips as jobs, through OpenAI's client, and a store that outlives its processes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from conftest import make_model
from nar import Pipeline
from nar.media.clips import as_array, save_clip
from nar.serving.app import App
from nar.serving.jobs import CLAIM, Store
from nar.serving.models import Served
from nar.serving.protocol import Clip, Refusal
from nar.serving.videos import Videos
from serving_tools import http, serving, wait_until
from toy_models import causal

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's methods for videos


@pytest.fixture(scope="module")
def server(clips_folder: Path, toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, App]]:
    models = [Served.load(f"toy={toy_folder}"), Served.load(f"moving={clips_folder}")]
    with serving(models, store=Store(tmp_path_factory.mktemp("jobs"))) as running:
        yield running


@pytest.fixture(scope="module")
def url(server: tuple[str, App]) -> str:
    return server[0]


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def pipe(clips_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(clips_folder)


def frames_of(client: openai.OpenAI, number: str) -> np.ndarray:
    """The frames of a job's clip, from its sprite sheet, which loses nothing."""
    content = client.videos.download_content(number, variant="spritesheet").read()
    strip = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return np.stack(np.split(strip, strip.shape[1] // strip.shape[0], 1))


def test_a_clip_is_that_of_the_pipeline(client: openai.OpenAI, pipe: Pipeline, tmp_path: Path) -> None:
    job = client.videos.create_and_poll(prompt="a red apple", extra_body={"seed": 3, "num_frames": 9})
    assert (job.status, job.progress, job.model, job.error) == ("completed", 100, "moving", None)
    assert (job.size, job.seconds) == ("8x8", "1.8")
    assert job.model_extra is not None
    assert (job.model_extra["seed"], job.model_extra["num_frames"], job.model_extra["fps"]) == (3, 9, 5.0)
    assert job.completed_at
    assert job.expires_at
    assert job.expires_at > job.completed_at
    expected = pipe(prompt="a red apple", seed=3, num_frames=9, output_type="np").videos[0]
    assert np.array_equal(frames_of(client, job.id), expected)
    video = tmp_path / "video.mp4"
    video.write_bytes(client.videos.download_content(job.id).read())
    assert as_array(video).shape == expected.shape
    thumbnail = Image.open(io.BytesIO(client.videos.download_content(job.id, variant="thumbnail").read()))
    assert np.array_equal(np.asarray(thumbnail.convert("RGB")), expected[0])


def test_sync_answers_with_the_clip_itself(url: str, client: openai.OpenAI, pipe: Pipeline, tmp_path: Path) -> None:
    answer = http.post(f"{url}/v1/videos/sync", json={"prompt": "a red apple", "seed": 3, "num_frames": 9})
    assert (answer.status_code, answer.headers["content-type"], answer.headers["x-seed"]) == (200, "video/mp4", "3")
    expected = pipe(prompt="a red apple", seed=3, num_frames=9, output_type="np").videos[0]
    assert np.array_equal(frames_of(client, answer.headers["x-video-id"]), expected)
    (tmp_path / "video.mp4").write_bytes(answer.content)
    assert as_array(tmp_path / "video.mp4").shape == expected.shape
    refused = http.post(f"{url}/v1/videos/sync", json={"prompt": "a red apple", "num_frames": 10**7})
    assert refused.status_code == 400


def test_extensions(url: str, client: openai.OpenAI, pipe: Pipeline, tmp_path: Path) -> None:
    job = client.videos.create_and_poll(prompt="a red apple", extra_body={"seed": 3, "num_frames": 9})
    asked = {"prompt": "a red apple", "seconds": "1", "video": {"id": job.id}, "seed": 4}  # which the client can't send
    longer = client.videos.poll(http.post(f"{url}/v1/videos/extensions", json=asked).json()["id"])
    assert (longer.status, longer.model, longer.seconds) == ("completed", "moving", "2.8")  # 9 + 5 of 5 a second
    (tmp_path / "video.mp4").write_bytes(client.videos.download_content(job.id).read())
    expected = pipe(prompt="a red apple", frames=str(tmp_path / "video.mp4"), seed=4, num_frames=14, output_type="np")
    assert np.array_equal(frames_of(client, longer.id), expected.videos[0])
    with (tmp_path / "video.mp4").open("rb") as file:
        sent = client.videos.extend(prompt="a red apple", seconds="1", video=file, extra_body={"seed": 4})  # type: ignore[arg-type]
    assert np.array_equal(frames_of(client, client.videos.poll(sent.id).id), expected.videos[0])


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"prompt": "x"}, 400, "video is"),
        ({"prompt": "x", "video": {"id": "video_none"}}, 404, "no video"),
        ({"prompt": "x", "video": {"id": 5}}, 400, "video is"),
        ({"prompt": "x", "video": "video_none"}, 400, "video is"),
        ({"prompt": "x", "video": {"id": "a", "image_url": "b"}}, 400, "video is"),
    ],
)
def test_extensions_that_are_refused(url: str, body: dict[str, Any], status: int, said: str) -> None:
    answer = http.post(f"{url}/v1/videos/extensions", json=body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]


def test_seconds(client: openai.OpenAI) -> None:
    job = client.videos.create(prompt="a red apple", seconds="2")  # type: ignore[arg-type]
    assert job.model_extra is not None
    assert job.model_extra["num_frames"] == 10
    client.videos.delete(job.id)


@pytest.mark.parametrize("form", [".png", ".gif", ".webp", ".mp4"])
def test_continuation(client: openai.OpenAI, pipe: Pipeline, tmp_path: Path, form: str) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / f"given{form}"
    if form == ".png":
        Image.fromarray(clip[0]).save(path)
    else:
        save_clip(clip, path, frame_rate=pipe.frame_rate)
    job = client.videos.create_and_poll(prompt="pear", input_reference=path, extra_body={"seed": 1})
    assert job.status == "completed", job.error
    given: Any = [Image.fromarray(clip[0])] if form == ".png" else str(path)
    expected = pipe(prompt="pear", frames=given, seed=1, output_type="np").videos[0]
    assert np.array_equal(frames_of(client, job.id), expected)


def test_json_with_a_data_url(url: str, client: openai.OpenAI) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "png")
    reference = {"image_url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
    answer = http.post(f"{url}/v1/videos", json={"prompt": "pear", "input_reference": reference})
    assert answer.status_code == 200, answer.text
    wait_until(lambda: client.videos.retrieve(answer.json()["id"]).status == "completed")


def test_list_and_delete(client: openai.OpenAI) -> None:
    made = [client.videos.create(prompt="pear").id for _ in range(5)]
    assert [job.id for job in client.videos.list(limit=2)][:5] == made[::-1]
    assert [job.id for job in client.videos.list(order="asc")][-5:] == made
    page = client.videos.list(limit=2, after=made[3])
    assert [job.id for job in page.data] == [made[2], made[1]]
    assert page.has_more
    for number in made:
        deleted = client.videos.delete(number)
        assert (deleted.deleted, deleted.object) == (True, "video.deleted")
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(number)


def test_a_job_that_is_deleted_frees_its_slot(client: openai.OpenAI, server: tuple[str, App]) -> None:
    batcher = server[1].models["moving"].batcher
    job = client.videos.create(prompt="pear", extra_body={"num_frames": 1500})
    with pytest.raises(openai.NotFoundError, match="comes later"):
        client.videos.download_content(job.id)
    wait_until(lambda: client.videos.retrieve(job.id).status == "in_progress")
    wait_until(lambda: batcher.running == 1)
    client.videos.delete(job.id)
    wait_until(lambda: batcher.running + batcher.waiting == 0)
    after = client.videos.create_and_poll(prompt="pear")  # the worker goes on
    assert after.status == "completed"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "toy"}, "makes pictures"),
        ({"seconds": "0"}, "seconds"),
        ({"seconds": "soon"}, "seconds"),
        ({"seconds": "4", "num_frames": 9}, "not both"),
        ({"num_frames": 100_000}, "too long"),
        ({"size": "1280x720"}, "8x8"),
        ({"fps": 24}, "this model makes 5"),
        ({"frames": 24}, "did you mean"),
        ({"input_reference": "words"}, "unknown field"),
    ],
)
def test_refusals(url: str, fields: dict[str, Any], said: str) -> None:
    answer = http.post(f"{url}/v1/videos", data={"prompt": "pear", **fields})
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("file", [b"", b"#EXTM3U\n/etc/passwd", b"GIF89a", b"\x00\x00\x00\x20ftypisom", b"\x89PNG"])
def test_references_that_are_nothing(url: str, file: bytes) -> None:
    """Playlists, which would have other files read, among them."""
    answer = http.post(f"{url}/v1/videos", data={"prompt": "pear"}, files={"input_reference": ("x.mp4", file)})
    assert answer.status_code == 400, answer.text
    assert "input_reference" in answer.json()["error"]["message"]
    assert "/tmp" not in answer.text


@pytest.mark.parametrize("number", ["video_1", "..", "%2e%2e%2fetc", "video_/../x", "video_" + "0" * 5000])
def test_jobs_that_are_not_there(url: str, number: str) -> None:
    for path in (f"/v1/videos/{number}", f"/v1/videos/{number}/content"):
        answer = http.get(url + path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
    assert http.delete(f"{url}/v1/videos/{number}").status_code in (404, 405)


def test_ranges(url: str, client: openai.OpenAI) -> None:
    job = client.videos.create_and_poll(prompt="pear")
    whole = http.get(f"{url}/v1/videos/{job.id}/content")
    part = http.get(f"{url}/v1/videos/{job.id}/content", headers={"range": "bytes=10-19"})
    assert (whole.headers["content-type"], part.status_code) == ("video/mp4", 206)
    assert part.content == whole.content[10:20]
    assert http.get(f"{url}/v1/videos/{job.id}/content?variant=x").status_code == 400


def test_jobs_belong_to_their_key(clips_folder: Path, tmp_path: Path) -> None:
    with serving([Served.load(f"moving={clips_folder}")], keys=["a", "b"], store=Store(tmp_path)) as (url, _):
        first, second = (openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in "ab")
        job = first.videos.create(prompt="pear")
        assert [other.id for other in first.videos.list()] == [job.id]
        assert not list(second.videos.list())
        for call in (second.videos.retrieve, second.videos.delete, second.videos.download_content):
            with pytest.raises(openai.NotFoundError):
                call(job.id)


def test_a_full_disk_is_said(server: tuple[str, App], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    videos = server[1].videos
    assert videos is not None
    monkeypatch.setattr(videos.store, "create", full)
    answer = http.post(f"{url}/v1/videos", data={"prompt": "pear"})
    assert answer.status_code == 507
    assert "disk" in answer.json()["error"]["message"]


def test_a_full_disk_while_a_clip_is_written(
    server: tuple[str, App], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job waits, and is made when there is room again."""
    videos = server[1].videos
    assert videos is not None
    write, failed = videos.store.write, list[str]()

    def full(number: str, name: str, writer: Any) -> bool:
        if name.endswith(".mp4") and not failed:
            failed.append(number)
            raise OSError(28, "No space left on device")
        return write(number, name, writer)

    monkeypatch.setattr(videos.store, "write", full)
    monkeypatch.setattr("nar.serving.videos.RETRY_SECONDS", 0.05)
    job = client.videos.create_and_poll(prompt="pear")
    assert failed == [job.id]
    assert job.status == "completed"


def test_store_keeps_and_forgets(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_seconds=0.0)
    first, second = store.create({"model": "m"}, {"a": b"1"}), store.create({"model": "m"}, {})
    claimed = store.claim(lambda job: job["model"] == "m")
    assert claimed is not None
    assert (claimed["id"], claimed["status"]) == (first["id"], "in_progress")
    assert Store(tmp_path).claim(lambda job: job["id"] == first["id"]) is None  # this process works on it
    assert store.beat(first["id"])
    store.update(first["id"], status="completed")
    assert not store.beat(first["id"])
    time.sleep(1.1)
    store.sweep()
    assert [job["id"] for job in store.jobs()] == [second["id"]]
    assert store.delete(second["id"])
    assert not store.delete(second["id"])
    assert store.update(second["id"], progress=5) is None
    assert list(tmp_path.glob("video_*")) == []  # a job that was deleted does not come back


def test_a_job_of_a_process_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    store = Store(tmp_path)
    job = store.create({"model": "m"}, {})
    assert store.claim(lambda _: True)
    claim = store.file(job["id"], CLAIM)
    held = json.loads(claim.read_text())
    for changed in ({"pid": 2**22 + 1}, {"token": "that of a process before this one, of the same number"}):
        claim.write_text(json.dumps(held | changed))
        assert store.claim(lambda _: True), changed
    claim.write_text(json.dumps(held | {"host": "elsewhere"}))
    assert not store.claim(lambda _: True)
    os.utime(claim, (0, 0))  # silent for long
    assert store.claim(lambda _: True)


def test_those_that_ended_first_go_when_there_is_no_room(tmp_path: Path) -> None:
    store = Store(tmp_path, most_bytes=5000)
    numbers = []
    for _ in range(3):
        numbers.append(store.create({"model": "m"}, {"video.mp4": bytes(2000)})["id"])
    for number in (numbers[1], numbers[0], numbers[2]):
        store.keep_seconds += 10.0  # as if they ended one after the other
        store.update(number, status="completed")
    waiting = store.create({"model": "m"}, {})
    store.sweep()
    assert [job["id"] for job in store.jobs()] == [numbers[0], numbers[2], waiting["id"]]


def test_a_job_that_ends_while_it_is_claimed_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    first, second = (store.create({"model": "m"}, {})["id"] for _ in range(2))
    take = store._take

    def late(path: Path) -> bool:
        if path.parent.name == first:  # another process had it, and ends it now
            store.update(first, status="completed", progress=100)
        return take(path)

    monkeypatch.setattr(store, "_take", late)
    claimed = store.claim(lambda _: True)
    assert claimed is not None
    assert claimed["id"] == second
    ended = store.get(first)
    assert ended is not None
    assert (ended["status"], ended["progress"]) == ("completed", 100)
    assert not store.file(first, CLAIM).exists()


def test_jobs_that_nobody_works_on_go_after_a_week(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lost, waiting = (store.create({"model": model}, {})["id"] for model in ("old", "new"))
    week = time.time() - 8 * 86_400
    os.utime(store.file(lost, "job.json"), (week, week))
    store.sweep()
    assert [job["id"] for job in store.jobs()] == [waiting]


def queued(videos: Videos, key: str) -> str:
    """Ask for a clip with this key; gives its job's id."""
    return str(asyncio.run(videos.create(Clip(prompt="pear"), None, key))["id"])


@pytest.fixture
def idle(clips_folder: Path, tmp_path: Path) -> Iterator[App]:
    """An app that nobody works for."""
    app = App([Served.load(f"moving={clips_folder}")], store=Store(tmp_path / "jobs"), max_waiting_per_key=2)
    yield app
    app.model("moving").close()


def test_jobs_of_other_models_fill_no_queue(idle: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nar.serving.videos.MOST_WAITING", 3)
    assert idle.videos is not None
    for _ in range(3):
        idle.videos.store.create({"model": "old", "key": ""}, {})
    for _ in range(3):
        queued(idle.videos, "")
    with pytest.raises(Refusal, match="3 clips of moving are waiting, at most 3") as refused:
        queued(idle.videos, "")
    assert refused.value.status == 503


def test_clips_of_a_key_are_limited_and_keys_take_turns(idle: App, monkeypatch: pytest.MonkeyPatch) -> None:
    assert idle.videos is not None
    videos, made = idle.videos, list[str]()
    first, second = queued(videos, "a"), queued(videos, "a")
    with pytest.raises(Refusal, match="2 clips of moving are waiting for this key, at most 2") as refused:
        queued(videos, "a")
    assert refused.value.status == 429
    third = queued(videos, "b")

    async def run(_: Served, job: dict[str, Any]) -> None:
        made.append(job["id"])
        videos.store.update(job["id"], status="completed")

    async def work() -> None:
        task = asyncio.create_task(videos.work(idle.model("moving")))
        while len(made) < 3:
            await asyncio.sleep(0.01)
        task.cancel()

    monkeypatch.setattr(videos, "_run", run)
    asyncio.run(work())
    assert made == [first, third, second]


def test_a_clip_that_is_written_for_long_is_not_taken_over(
    server: tuple[str, App], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = server[1].videos
    assert videos is not None
    monkeypatch.setattr("nar.serving.videos.PROGRESS_SECONDS", 0.05)
    monkeypatch.setattr("nar.serving.jobs._SILENT_SECONDS", 1.5)
    write, is_taken = videos.store.write, list[bool]()

    def slow(number: str, name: str, writer: Any) -> bool:
        if name.endswith(".mp4"):
            time.sleep(2.0)
            is_taken.append(Store(videos.store.folder).claim(lambda job: job["id"] == number) is not None)
        return write(number, name, writer)

    monkeypatch.setattr(videos.store, "write", slow)
    assert client.videos.create_and_poll(prompt="pear").status == "completed"
    assert is_taken == [False]


def test_what_is_asked_of_a_clip(clips_folder: Path) -> None:
    served = Served.load(f"moving={clips_folder}")
    request, _ = served.planned(Clip(negative_prompt="red"), None)
    assert request.negative == "red"
    assert not served.planned(Clip(), None)[0].has_negative
    served.close()


def test_a_clip_without_a_class_is_refused_at_once(tmp_path: Path) -> None:
    """By a model without a null class, as pictures are."""
    causal().save_pretrained(tmp_path / "tokenizer")
    model = make_model("frames", grid=(3, 2, 2), prefix_grid=(2, 2, 2), null_class=False)
    frames = {"given_frames": [0, 1, 3], "frame_rate": 5.0}
    model.save_pretrained(tmp_path / "model", tokenizer=tmp_path / "tokenizer", **frames)
    served = Served.load(str(tmp_path / "model"))
    with pytest.raises(Refusal, match="no null class: give class_label"):
        served.planned(Clip(), None)
    assert served.planned(Clip(class_label=1), None)[0].label == 1
    served.close()


def started(arguments: list[str], folder: Path) -> tuple[subprocess.Popen[str], str]:
    """`nar serve` in a process of its own, and its address."""
    command = [sys.executable, "-c", "from nar.cli import main; main()", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=(folder / "log").open("w"), text=True, env={**os.environ}
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"http://\S+", line):
            return process, found[0]
    raise AssertionError((folder / "log").read_text())


@pytest.mark.slow
def test_jobs_survive_a_kill_and_the_server_ends_when_told(clips_folder: Path, tmp_path: Path) -> None:
    """The clip after a SIGKILL is the one that would have been; SIGTERM lets what runs finish."""
    arguments = [f"moving={clips_folder}", "--videos", str(tmp_path / "jobs")]
    process, url = started(arguments, tmp_path)
    try:
        body = {"prompt": "pear", "seed": 4, "num_frames": 61}
        number = http.post(f"{url}/v1/videos", json=body).json()["id"]
        wait_until(lambda: http.get(f"{url}/v1/videos/{number}").json()["status"] == "in_progress")
    finally:
        process.kill()
        process.wait()
    process, url = started(arguments, tmp_path)
    try:
        wait_until(lambda: http.get(f"{url}/v1/videos/{number}").json()["status"] == "completed", 60)
        sheet = http.get(f"{url}/v1/videos/{number}/content?variant=thumbnail").content
        expected = Pipeline.from_pretrained(clips_folder)(prompt="pear", seed=4, num_frames=61, output_type="np")
        first = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))
        assert np.array_equal(first, expected.videos[0][0])
        later = http.post(f"{url}/v1/videos", json=body).json()["id"]
        wait_until(lambda: http.get(f"{url}/v1/videos/{later}").json()["status"] == "in_progress")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
        job = Store(tmp_path / "jobs").get(later)
        assert job is not None
        assert job["status"] == "completed"
    finally:
        process.kill()
        process.wait()


def refused(url: str) -> None:
    """Ask for more pictures than are made in a moment."""
    with suppress(httpx2.HTTPError):  # connections that come too late
        http.post(f"{url}/v1/images/generations", json={"prompt": "1", "n": 10})


@pytest.mark.slow
def test_a_second_signal_refuses_all_that_runs(clips_folder: Path, toy_folder: Path, tmp_path: Path) -> None:
    arguments = [f"toy={toy_folder}", f"moving={clips_folder}", "--videos", str(tmp_path / "jobs"), "--slots", "1"]
    process, url = started([*arguments, "--max-waiting", "400"], tmp_path)
    try:
        number = http.post(f"{url}/v1/videos", json={"prompt": "pear", "seed": 4, "num_frames": 401}).json()["id"]
        wait_until(lambda: http.get(f"{url}/v1/videos/{number}").json()["status"] == "in_progress")

        asked = [threading.Thread(target=refused, args=(url,)) for _ in range(8)]
        for one in asked:
            one.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        job = Store(tmp_path / "jobs").get(number)
        assert job is not None
        assert job["status"] == "queued"  # for the next process
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
