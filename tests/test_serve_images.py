"""OpenAI's official client, and raw HTTP, against a running server of pictures."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from typer.testing import CliRunner

from nar import Pipeline
from nar.cli.app import app
from nar.serving.app import CONTENT_POLICY, STATIC, App
from nar.serving.edits import read
from nar.serving.models import Served
from nar.serving.protocol import Refusal, partial_fronts
from serving_tools import http, serving, wait_until


@pytest.fixture(scope="module")
def server(toy_folder: Path, words_folder: Path) -> Iterator[tuple[str, App]]:
    models = [Served.load(f"toy={toy_folder}", slots=4), Served.load(f"words={words_folder}", slots=2)]
    with serving(models, keepalive_seconds=0.05) as running:
        yield running


@pytest.fixture(scope="module")
def url(server: tuple[str, App]) -> str:
    return server[0]


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def pipe(toy_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(toy_folder)


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def test_pictures_are_those_of_the_pipeline(client: openai.OpenAI, pipe: Pipeline) -> None:
    options: dict[str, Any] = {"seed": 5, "guidance_scale": 3.0, "temperature": 0.9, "top_k": 20}
    made = client.images.generate(prompt="pear", n=3, extra_body=options)
    expected = pipe("pear", num_images_per_prompt=3, **options)
    assert [item.model_extra["seed"] for item in made.data or ()] == [5, 5, 5]
    for item, picture in zip(made.data or (), expected.images, strict=True):
        assert np.array_equal(pixels(item.b64_json or ""), np.asarray(picture))
    assert made.size == "8x8"
    assert made.usage is not None
    assert made.usage.output_tokens == 48


def test_class_label_and_prompt_are_one_class(client: openai.OpenAI) -> None:
    def first(**fields: Any) -> np.ndarray:
        extra = {"seed": 1, **fields}
        data = client.images.generate(prompt=extra.pop("prompt", ""), extra_body=extra).data
        return pixels((data or [])[0].b64_json or "")

    by_name = first(prompt="plum")
    for fields in ({"prompt": "2"}, {"class_label": 2}, {"class_label": "Plum"}, {"prompt": "plum", "class_label": 2}):
        assert np.array_equal(first(**fields), by_name), fields
    assert not np.array_equal(first(), by_name)  # the null class


def test_words(client: openai.OpenAI, words_folder: Path) -> None:
    fields = {"seed": 2, "negative_prompt": "red"}
    made = client.images.generate(model="words", prompt="a red apple", extra_body=fields).data or []
    expected = Pipeline.from_pretrained(words_folder)(prompt="a red apple", **fields)
    assert np.array_equal(pixels(made[0].b64_json or ""), np.asarray(expected.images[0]))


def test_a_seed_of_its_own_is_returned(client: openai.OpenAI) -> None:
    made = client.images.generate(prompt="pear")
    again = client.images.generate(prompt="pear", extra_body={"seed": made.data[0].model_extra["seed"]})
    assert made.data[0].b64_json == again.data[0].b64_json


@pytest.mark.parametrize(("form", "expected"), [("webp", "WEBP"), ("jpeg", "JPEG"), ("png", "PNG")])
def test_formats(client: openai.OpenAI, form: Any, expected: str) -> None:
    made = client.images.generate(prompt="pear", output_format=form, output_compression=100)
    assert Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))).format == expected
    assert made.output_format == form


def test_stream(client: openai.OpenAI, pipe: Pipeline) -> None:
    events = list(client.images.generate(prompt="pear", stream=True, partial_images=7, extra_body={"seed": 5}))
    names = [event.type for event in events]
    assert names == ["image_generation.partial_image"] * (len(names) - 1) + ["image_generation.completed"]
    places = [event.partial_image_index for event in events[:-1]]
    assert places == list(range(len(places)))
    fronts = [event.model_extra["front"] for event in events[:-1]]
    assert fronts == sorted(fronts)
    assert events[-1].usage.output_tokens == 16
    assert events[-1].model_extra["seed"] == 5
    final = pixels(events[-1].b64_json)
    assert np.array_equal(final, np.asarray(pipe("pear", seed=5).images[0]))


def test_partial_pictures_show_that_front(client: openai.OpenAI, pipe: Pipeline) -> None:
    shown: dict[int, np.ndarray] = {}
    pipe("pear", seed=5, callback_on_front_end=lambda p, front, c: shown.update({front: np.asarray(p.pictures(c)[0])}))
    for event in client.images.generate(prompt="pear", stream=True, partial_images=7, extra_body={"seed": 5}):
        if event.type.endswith("partial_image"):
            assert np.array_equal(pixels(event.b64_json), shown[event.model_extra["front"]])


def test_stream_of_several(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt="pear", n=3, stream=True, partial_images=1))
    done = [event.model_extra["image_index"] for event in events if event.type.endswith("completed")]
    assert sorted(done) == [0, 1, 2]


def test_which_fronts_are_sent() -> None:
    ends = list(np.cumsum([min(front + 1, 31 - front) for front in range(31)]))  # 16x16
    assert partial_fronts(ends, 3) == [10, 15, 20]  # of 0..30; the spec counts from 1
    assert partial_fronts(ends, 30) == list(range(30))
    assert partial_fronts(ends, 31) == list(range(30))


def test_models(client: openai.OpenAI) -> None:
    first, second = client.models.list().data
    assert (first.id, second.id) == ("toy", "words")
    assert first.model_extra["class_names"] == ["red apple", "pear", "plum"]
    assert sorted(place for front in first.model_extra["fronts"] for place in front) == list(range(16))
    assert "prompt" in second.model_extra["takes"]
    assert "prompt" not in first.model_extra["takes"]
    assert client.models.retrieve("words").id == "words"


@pytest.mark.parametrize(
    ("fields", "status", "code", "param", "said"),
    [
        ({"prompt": "fig"}, 400, "invalid_value", "prompt", "red apple, pear, plum"),
        ({"n": 11}, 400, "invalid_value", "n", "10, not '11'"),
        ({"n": 0}, 400, "invalid_value", "n", "1, not '0'"),
        ({"sed": 1}, 400, "unsupported_parameter", "sed", "did you mean 'seed'"),
        ({"size": "1024x1024"}, 400, "invalid_size", "size", "8x8"),
        ({"quality": "hd"}, 400, "invalid_value", "quality", "'auto', not 'hd'"),
        ({"background": "transparent"}, 400, "invalid_value", "background", "opaque"),
        ({"response_format": "url"}, 400, "invalid_value", "response_format", "b64_json"),
        ({"style": "vivid"}, 400, "invalid_value", "style", "vivid"),
        ({"output_compression": 50}, 400, "invalid_value", None, "webp and jpeg"),
        ({"partial_images": 2}, 400, "invalid_value", None, "stream"),
        ({"partial_images": 8, "stream": True}, 400, "invalid_value", "partial_images", "at most 7"),
        ({"seed": -1}, 400, "invalid_value", "seed", "0"),
        ({"seed": 2**32}, 400, "invalid_value", "seed", "4294967295"),
        ({"guidance_scale": 2000}, 400, "invalid_value", None, "guidance_scale"),
        ({"temperature": -1}, 400, "invalid_value", "temperature", "0"),
        ({"guidance_curve": "round"}, 400, "invalid_value", None, "cosine"),
        ({"negative_prompt": "red"}, 400, "invalid_value", "negative_prompt", "negative"),
        ({"negative_prompt": "red", "guidance_scale": 1.0, "model": "words"}, 400, None, "negative_prompt", "above 1"),
        ({"class_label": 1, "prompt": "plum"}, 400, "invalid_value", "class_label", "two classes"),
        ({"class_label": 1, "model": "words"}, 400, "invalid_value", "class_label", "no classes"),
        ({"num_inference_steps": 50}, 400, "invalid_value", "num_inference_steps", "always takes 7"),
        ({"model": "dall-e-3"}, 404, "model_not_found", "model", "toy, words"),
        ({"deadline_ms": 0}, 400, "invalid_value", "deadline_ms", "1"),
        ({"deadline_ms": 10**300}, 400, "invalid_value", "deadline_ms", "2147483647"),
    ],
)
def test_refusals(
    client: openai.OpenAI, fields: dict[str, Any], status: int, code: str | None, param: str | None, said: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.images.generate(prompt=fields.pop("prompt", "pear"), extra_body=fields)
    error = refused.value
    assert error.status_code == status
    assert (error.code, error.param) == (code or error.code, param)
    assert said in str(error)
    assert error.request_id
    assert error.request_id.startswith("req_")


def is_openai_error(answer: httpx2.Response) -> bool:
    error = answer.json()["error"]
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/images/generations", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/none/at-all", 404),
        ("POST", "/health", 405),
    ],
)
def test_framework_errors_have_openais_form(url: str, method: str, path: str, status: int) -> None:
    answer = http.request(method, url + path)
    assert answer.status_code == status
    assert is_openai_error(answer)
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"", "application/json", 400),
        (b"null", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 20_000, "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "pear", "safety_identifier": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "pear", "model": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "pear", "\\ud800": 1}', "application/json", 400),
        (b'{"prompt": "pear", "guidance_scale": NaN}', "application/json", 400),
        (b'{"prompt": "pear", "seed": 1e400}', "application/json", 400),
        (b'{"prompt": "pear", "seed": ' + b"9" * 6000 + b"}", "application/json", 400),
        (b'{"prompt": {"a": 1}}', "application/json", 400),
        (b'{"prompt": "pear"}', "text/plain", 400),
        (b'{"prompt": "pear"}', "application/x-www-form-urlencoded", 400),
        (json.dumps({"prompt": "x" * 32_001}).encode(), "application/json", 400),
        (json.dumps({"prompt": "x" * 31_000}).encode(), "application/json", 400),  # no class; no message of pages
        (b" " * (2**20 + 1), "application/json", 413),
    ],
)
def test_bodies_that_are_nothing(url: str, body: bytes, kind: str, status: int) -> None:
    answer = http.post(f"{url}/v1/images/generations", content=body, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert is_openai_error(answer)
    assert len(answer.text) < 2000


def test_texts_that_are_half_a_character_are_echoed_as_json(url: str) -> None:
    """By a form of such a charset, whose names an error repeats."""
    field = '--x\r\nContent-Disposition: form-data; name="\\ud800"\r\n\r\n1\r\n'
    headers = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    answer = http.post(f"{url}/v1/images/edits", content=f"{field * 2}--x--\r\n".encode(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "\ud800")


def test_bodies_without_a_length_are_limited_too(url: str) -> None:
    answer = http.post(
        f"{url}/v1/images/generations",
        content=iter([b" " * 2**18] * 5),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413
    assert is_openai_error(answer)


def test_null_is_the_default(url: str) -> None:
    body = {"prompt": "pear", "n": None, "seed": None, "style": None, "model": None, "quality": "auto"}
    assert http.post(f"{url}/v1/images/generations", json=body).status_code == 200


def test_a_client_that_leaves_frees_its_work(server: tuple[str, App]) -> None:
    """Of a request that is not streamed, which no framework tells its handler of."""
    url, app = server
    body = {"prompt": "pear", "n": 10}
    batcher = app.models["toy"].batcher
    with pytest.raises(httpx2.ReadTimeout):
        http.post(f"{url}/v1/images/generations", json=body, timeout=0.02)
    wait_until(lambda: batcher.running + batcher.waiting == 0)
    wait_until(lambda: 'outcome="cancelled",route="image_generation"' in http.get(f"{url}/metrics").text)


def test_a_stream_that_is_closed_frees_its_work(server: tuple[str, App]) -> None:
    url, app = server
    batcher = app.models["toy"].batcher
    body = {"prompt": "pear", "n": 10, "stream": True, "partial_images": 6}
    with http.stream("POST", f"{url}/v1/images/generations", json=body) as answer:
        next(answer.iter_lines())
    wait_until(lambda: batcher.running + batcher.waiting == 0)


def test_small_answers_are_not_held_back(url: str) -> None:
    """Heads and bodies are two packets; where the second waits for the first one's receipt that is 40 ms on Linux,
    but for the first packets of a connection."""
    seconds = []
    for _ in range(40):
        begun = time.perf_counter()
        assert http.get(f"{url}/v1/models").status_code == 200
        seconds.append(time.perf_counter() - begun)
    assert min(seconds[-10:]) < 0.02, seconds


def test_health_and_metrics(url: str, client: openai.OpenAI) -> None:
    client.images.generate(prompt="pear")
    assert http.get(f"{url}/health").json() == {"status": "ok"}
    text = http.get(f"{url}/metrics").text
    assert 'nar_requests_total{outcome="ok",route="image_generation"}' in text
    assert 'nar_cache_slots{model="toy"} 4.0' in text
    assert 'nar_requests_waiting{model="words"} 0.0' in text
    assert "pear" not in text


def test_many_at_once_are_those_of_each_alone(client: openai.OpenAI, pipe: Pipeline) -> None:
    found: dict[int, np.ndarray] = {}

    def ask(seed: int) -> None:
        extra = {"seed": seed, "guidance_scale": 1.0 + seed % 3}
        made = client.with_options(max_retries=20).images.generate(prompt=str(seed % 3), extra_body=extra)
        found[seed] = pixels(made.data[0].b64_json)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(24):
        alone = pipe(seed % 3, seed=seed, guidance_scale=1.0 + seed % 3).images[0]
        assert np.array_equal(found[seed], np.asarray(alone)), seed


def test_a_full_queue_refuses_at_once(toy_folder: Path) -> None:
    with serving([Served.load(f"toy={toy_folder}", slots=1, max_waiting=1)]) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        refused: list[openai.APIStatusError] = []

        def ask() -> None:
            try:
                client.images.generate(prompt="pear", n=2)
            except openai.APIStatusError as error:
                refused.append(error)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert refused
        for error in refused:
            assert isinstance(error, openai.InternalServerError)
            assert (error.status_code, error.code) == (503, "server_is_overloaded")
            wait = int(error.response.headers["retry-after-ms"])
            assert 0 <= wait < 120_000
            assert error.response.headers["retry-after"] == str(math.ceil(wait / 1000))


def test_keys(toy_folder: Path) -> None:
    with serving([Served.load(f"toy={toy_folder}")], keys=["first", "second"]) as (url, _):
        for key in ("first", "second"):
            assert openai.OpenAI(base_url=f"{url}/v1", api_key=key).models.list().data
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="third", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            client.images.generate(prompt="pear")
        assert refused.value.code == "invalid_api_key"
        assert http.get(f"{url}/v1/models").status_code == 401
        assert http.get(f"{url}/health").status_code == 200


def test_keys_are_needed_under_a_prefix(toy_folder: Path) -> None:
    """Where the app is part of another, or behind a prefix, all but its health, metrics and page needs a key."""
    app = App([Served.load(f"toy={toy_folder}")], keys=["secret"])
    mounted = TestClient(Starlette(routes=[Mount("/nar", app.asgi)]))
    behind = TestClient(app.asgi, root_path="/nar")
    for client, prefix in ((mounted, "/nar"), (behind, "/nar"), (TestClient(app.asgi), "")):
        for path in ("/v1/models", "/openapi.json", "/nothing", "/health/"):
            assert client.get(prefix + path).status_code == 401, (prefix, path)
        assert client.post(f"{prefix}/v1/images/generations", json={"prompt": "pear"}).status_code == 401
        for path in ("/", "/app.js", "/health", "/metrics"):
            assert client.get(prefix + path).status_code == 200, (prefix, path)
        key = {"authorization": "Bearer secret"}
        assert client.get(f"{prefix}/v1/models", headers=key).json()["data"][0]["id"] == "toy"
    app.model("toy").close()


def test_one_name_twice_is_refused(toy_folder: Path) -> None:
    served = Served.load(f"toy={toy_folder}")
    with pytest.raises(ValueError, match="NAME=MODEL"):
        App([served, served])
    served.close()


def test_a_text_encoder_is_of_models_that_read_words(
    toy_folder: Path, words_folder: Path, encoder_folder: Path
) -> None:
    for folder in (toy_folder, words_folder):  # the first reads no words, and is no reason to refuse both
        served = Served.load(str(folder), text_encoder=str(encoder_folder))
        assert served.reads_words == (folder == words_folder)
        served.close()
    with pytest.raises(ValueError, match="no model of these reads words: leave --text-encoder out"):
        CliRunner().invoke(
            app, ["serve", str(toy_folder), "--port", "0", "--text-encoder", "nowhere"], catch_exceptions=False
        )


def test_a_folder_with_an_equals_sign(toy_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_folder.parent, tmp_path / "lr=0.1") / "model"
    for source, name in ((str(folder), "lr=0.1"), (f"toy={toy_folder}", "toy")):
        served = Served.load(source)
        assert served.name == name
        served.close()


def test_waits_are_whole_seconds() -> None:
    """As HTTP has them: clients fail at others."""
    for wait, seconds in ((0.512, "1"), (2.0, "2"), (2.001, "3")):
        headers = Refusal(503, "full", retry_after_seconds=wait).headers
        assert headers == {"retry-after": seconds, "retry-after-ms": str(round(1000 * wait))}


def test_draining(toy_folder: Path) -> None:
    with serving([Served.load(f"toy={toy_folder}")]) as (url, app):
        app.is_draining = True
        answer = http.post(f"{url}/v1/images/generations", json={"prompt": "pear"})
        assert answer.status_code == 503
        assert answer.headers["retry-after-ms"]
        assert http.get(f"{url}/health").status_code == 503


EDIT = np.full((8, 8, 3), 200, np.uint8)


def mask_of(rows: slice, columns: slice, side: int = 8) -> bytes:
    mask = np.full((side, side, 4), 255, np.uint8)
    mask[rows, columns, 3] = 0
    return png(mask)


def test_edits_keep_what_is_not_masked(client: openai.OpenAI) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    mask = mask_of(slice(4, 8), slice(0, 8))
    made = client.images.edit(image=png(picture), mask=mask, prompt="pear", n=2, extra_body={"seed": 1})
    first, second = (pixels(item.b64_json) for item in made.data)
    for edited in (first, second):
        assert np.array_equal(edited[:4], picture[:4])
        assert not np.array_equal(edited[4:], picture[4:])
    assert not np.array_equal(first, second)
    assert made.usage.input_tokens_details.image_tokens == 16


@pytest.mark.parametrize("form", ["png", "webp"])
def test_edits_turn_pictures_upright(form: str) -> None:
    """Those with alpha too, and masks."""
    pixels = np.zeros((6, 4, 4), np.uint8)
    pixels[..., 3], pixels[:3] = 255, 90
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(file, form, exif=exif, lossless=True)
    upright = np.asarray(read(file.getvalue(), "image"))
    assert np.array_equal(upright, np.rot90(pixels, -1))


def test_edits_stream(client: openai.OpenAI) -> None:
    mask = mask_of(slice(2, 8), slice(2, 8))
    events = list(client.images.edit(image=png(EDIT), mask=mask, prompt="pear", stream=True, partial_images=2))
    assert events[0].type == "image_edit.partial_image"
    assert events[-1].type == "image_edit.completed"


def test_what_is_under_the_mask_is_not_seen(client: openai.OpenAI) -> None:
    mask = mask_of(slice(4, 8), slice(0, 8))
    other = EDIT.copy()
    other[4:] = 7
    made = [
        client.images.edit(image=png(picture), mask=mask, prompt="pear", extra_body={"seed": 1}).data[0].b64_json
        for picture in (EDIT, other)
    ]
    assert np.array_equal(pixels(made[0])[4:], pixels(made[1])[4:])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"image": png(EDIT)}, "give a mask"),
        ({"image": png(EDIT), "mask": png(EDIT)}, "no alpha"),
        ({"image": png(EDIT), "mask": mask_of(slice(0, 0), slice(0, 0))}, "frees nothing"),
        ({"image": png(EDIT), "mask": mask_of(slice(0, 2), slice(0, 2), side=16)}, "one size"),
        ({"image": b"not a picture", "mask": b""}, "can't be read"),
        ({"image": png(EDIT)[:40], "mask": mask_of(slice(0, 2), slice(0, 2))}, "image"),
        ({"mask": mask_of(slice(0, 2), slice(0, 2))}, "image is missing"),
        ({"image": png(EDIT), "masque": b"x"}, "unknown file"),
    ],
)
def test_edits_that_are_refused(url: str, files: dict[str, bytes], said: str) -> None:
    parts = {name: (name, content, "application/octet-stream") for name, content in files.items()}
    answer = http.post(f"{url}/v1/images/edits", files=parts, data={"prompt": "pear"})
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


def test_sizes_are_known_before_decoding(client: openai.OpenAI) -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")  # 50 kB, 400 million pixels
    with pytest.raises(openai.BadRequestError, match="pixels"):
        client.images.edit(image=file.getvalue(), mask=mask_of(slice(0, 2), slice(0, 2)), prompt="pear")


def test_two_images_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="twice"):
        client.images.edit(image=[png(EDIT), png(EDIT)], mask=mask_of(slice(0, 2), slice(0, 2)), prompt="pear")
    one = client.images.edit(image=[png(EDIT)], mask=mask_of(slice(0, 2), slice(0, 2)), prompt="pear")
    assert len(one.data) == 1


def test_the_page_needs_nothing_from_elsewhere(url: str) -> None:
    paths = {path.name: path.read_text(encoding="utf-8") for path in STATIC.iterdir()}
    for name, text in paths.items():
        answer = httpx2.get(f"{url}/{'' if name == 'index.html' else name}")
        assert answer.text == text
        assert answer.headers["content-security-policy"] == CONTENT_POLICY
        others = re.findall(r"https?:(?!//www\.w3\.org/2000/svg)[^\s\"']*", text)
        assert others == [], name
        named = re.findall(r"""(?:src|href|from)[= ]"(?:\./)?([^"]+)\"""", text)
        assert set(named) <= set(paths), name
    script = httpx2.get(f"{url}/app.js")
    assert script.headers["content-type"].startswith("text/javascript")  # others are not run
