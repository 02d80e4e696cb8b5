"""Requests that the fuzz sends to a server of pictures: bodies, forms, paths and bytes that are wrong on purpose.

Each is answered with pictures, or with an error in OpenAI's form that is the client's; and the server goes on.
"""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

import fuzz_damage
from fuzz_damage import HOSTILE, short

FIELDS: dict[str, Any] = {
    "model": "model",
    "prompt": "pear",
    "n": 1,
    "seed": 1,
    "size": "auto",
    "class_label": 1,
    "negative_prompt": "",
    "guidance_scale": 2.0,
    "guidance_interval": 3,
    "guidance_curve": "constant",
    "guidance_power": 1.0,
    "temperature": 1.0,
    "top_k": 5,
    "top_p": 0.9,
    "num_inference_steps": 7,
    "deadline_ms": 5000,
    "stream": False,
    "partial_images": 0,
    "output_format": "png",
    "output_compression": 100,
    "user": "x",
}
CLIP: dict[str, Any] = {
    "model": "clips",
    "prompt": "red",
    "seconds": "1",
    "num_frames": 5,
    "fps": 8,
    "size": "auto",
    "seed": 1,
    "guidance_scale": 1.5,
    "temperature": 1.0,
    "top_k": 5,
    "negative_prompt": "",
    "deadline_ms": 5000,
}
PATHS = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/models",
    "/v1/models/model",
    "/metrics",
    "/health",
    "/",
    "/v1/videos",
)
ODD_PATHS = ("/v1/models/..%2f..%2fetc", "//", "/v1/videos", "/%00", "/static/../app.py", "/v1/models/" + "x" * 9000)
Send = Callable[[httpx2.Client], httpx2.Response | None]


def attack(world: Path, draw: random.Random, *, count: int = 6) -> None:
    """Serve three models in this process and send them requests; says on standard output what is wrong with answers."""
    kinds = (_fields, _fields, _bytes, _form, _form, _path, _socket, _clip, _clip, _job)
    with serving(world) as url, httpx2.Client(base_url=url, timeout=30) as client:
        for _ in range(count):
            how, send = draw.choice(kinds)(draw, world)
            print("damage:", how.encode("utf-8", "replace").decode())
            try:
                answer = send(client)
            except (httpx2.InvalidURL, httpx2.LocalProtocolError, UnicodeError):  # the client refuses to send it
                continue
            if wrong := _wrong(answer):
                print("WRONG:", wrong)
        answer = client.post("/v1/images/generations", json={"model": "model", "prompt": "pear", "seed": 1})
        if answer.status_code != 200:
            print(f"WRONG: afterwards the server answers {answer.status_code} {answer.text[:200]}")


@contextmanager
def serving(
    world: Path, names: Sequence[str] = ("model", "words", "clips"), jobs: Path = Path("jobs")
) -> Iterator[str]:
    """A server of examples, that ends as after SIGTERM: what runs may end."""
    from nar.serving.app import App
    from nar.serving.jobs import Store
    from nar.serving.models import Served
    from nar.serving.server import Server, bound

    encoders = {"words": str(world / "encoder")}
    models = [Served.load(f"{name}={world / name}", slots=2, text_encoder=encoders.get(name)) for name in names]
    place, store = bound("127.0.0.1", 0), Store(jobs)
    server = Server(App(models, keepalive_seconds=0.05, store=store), drain_seconds=5, log_level="warning")
    thread = threading.Thread(target=server.run_on, args=(place,), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        if thread.is_alive():
            print("WRONG: the server does not end")
        for served in models:
            served.close()
        if failed := [job for job in store.jobs() if (job.get("error") or {}).get("code") == "internal_error"]:
            print("WRONG: a clip failed:", failed[0]["fields"])


def _wrong(answer: httpx2.Response | None) -> str:
    if answer is None or answer.status_code < 400:
        return ""
    if answer.status_code >= 500 and answer.status_code != 503:
        return f"{answer.status_code} {answer.text[:200]}"
    with suppress(ValueError, KeyError, TypeError):
        error = answer.json()["error"]
        if error.keys() == {"message", "type", "param", "code"} and isinstance(error["message"], str):
            return "" if len(error["message"]) < 2000 else "an error of many pages"
    return f"{answer.status_code} in a form of its own: {answer.text[:200]}"


def _changed(draw: random.Random, fields: Mapping[str, Any] = FIELDS) -> tuple[dict[str, Any], str]:
    kept = {name: fields[name] for name in draw.sample([*fields], draw.randrange(1, 6))}
    said = []
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice([*fields, "x", "", "__proto__", "image", "mask", "input_reference"])
        kept[name] = value = draw.choice(HOSTILE)
        said.append(f"{name} = {short(value)}")
    return kept, ", ".join(said)


def _fields(draw: random.Random, _: Path) -> tuple[str, Send]:
    values, how = _changed(draw)
    body = json.dumps(values).encode()
    headers = {"content-type": "application/json"}
    return how, lambda client: client.post("/v1/images/generations", content=body, headers=headers)


def _bytes(draw: random.Random, _: Path) -> tuple[str, Send]:
    text = json.dumps({name: FIELDS[name] for name in draw.sample([*FIELDS], 5)}).encode()
    bodies = {
        "cut": text[: draw.randrange(len(text))],
        "nested": b"[" * 200_000,
        "objects": b'{"prompt":' * 100_000,
        "twice": text * 2,
        "noise": draw.randbytes(300),
        "utf-16": text.decode().encode("utf-16"),
        "surrogates": b'{"prompt": "\\ud800"}',
        "large": b'{"prompt": "' + b"x" * (40 << 20) + b'"}',
        "digits": b'{"seed": ' + b"9" * 5000 + b"}",
        "list": b"[]",
        "empty": b"",
        "repeated": b'{"n": 1, "n": "x", "n": []}',
    }
    name = draw.choice([*bodies])
    kind = draw.choice(("application/json", "text/plain", "", "multipart/form-data", "application/json; charset=x"))
    path = draw.choice(PATHS[:2])
    return f"{name} as {kind!r} to {path}", lambda client: client.post(
        path, content=bodies[name], headers={"content-type": kind}
    )


def _form(draw: random.Random, world: Path) -> tuple[str, Send]:
    parts: list[tuple[str, Any]] = []
    said = []
    for name in draw.choice((("image",), ("image", "mask"), ("image", "image"), ("mask",), ("image[]", "mask"), ())):
        file = io.BytesIO()
        size = draw.choice(((8, 8), (8, 8), (8, 8), (1, 1), (9, 7), (3000, 1)))
        Image.new(draw.choice(("RGB", "RGBA", "L", "1", "P", "I;16", "CMYK")), size).save(file, draw.choice(("TIFF",)))
        picture = Path(tempfile.mkdtemp(dir="."), f"{name.rstrip('[]')}.png")  # damage may make a folder of it
        picture.write_bytes(file.getvalue())
        if draw.random() < 0.6:
            picture.write_bytes((world / "captioned/0.png").read_bytes())
        if draw.random() < 0.5:
            how = fuzz_damage.damage(picture, draw)
            said.append(f"{name}: {how}")
        data = picture.read_bytes() if picture.is_file() and not picture.is_symlink() else b""
        parts.append((name, (draw.choice(("a.png", "../../x", "", "a\x00b", "é.gif")), data, "image/png")))
    values, how = _changed(draw)
    fields = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    said.append(how)
    return "form " + ", ".join(said), lambda client: client.post("/v1/images/edits", data=fields, files=parts or None)


def _clip(draw: random.Random, world: Path) -> tuple[str, Send]:
    """A job, by JSON with a data URL or by a form, and what can be done with it."""
    values, how = _changed(draw, CLIP)
    values |= {"model": "clips"} if draw.random() < 0.8 else {}
    file = Path(tempfile.mkdtemp(dir="."), "start.gif")  # damage may make a link to a device of it
    shutil.copy(world / "clip/start.gif", file)
    if draw.random() < 0.5:
        how += f", start: {fuzz_damage.damage(file, draw)}"
    data = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
    encoded = base64.b64encode(data).decode()
    url = draw.choice(
        (f"data:image/gif;base64,{encoded}", f"data:;base64,{encoded[:-3]}", "http://127.0.0.1/x", "", 5, None)
    )
    kind = draw.choice(("plain", "json", "form"))
    after = draw.choice(("wait", "delete", "look"))

    def send(client: httpx2.Client) -> httpx2.Response | None:
        if kind == "form":
            texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
            answer = client.post("/v1/videos", data=texts, files={"input_reference": ("a.gif", data, "image/gif")})
        else:
            more = {"input_reference": draw.choice(({"image_url": url}, url, [url]))} if kind == "json" else {}
            body = json.dumps(values | more).encode()
            answer = client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
        if answer.status_code != 200:
            return answer
        place = f"/v1/videos/{answer.json()['id']}"
        if after == "delete":
            return client.delete(place)
        for _ in range(40 if after == "wait" else 1):
            if client.get(place).json()["status"] in ("completed", "failed"):
                break
            time.sleep(0.1)
        return client.get(
            f"{place}/content", params={"variant": draw.choice(("video", "thumbnail", "spritesheet", "x"))}
        )

    return f"clip by {kind}, {how}, then {after}", send


def _job(draw: random.Random, _: Path) -> tuple[str, Send]:
    """A look at jobs that are not there, or by odd names and bounds."""
    number = draw.choice((*HOSTILE[:12], "..%2f..", "video_", "video_x/../..", "%00", "video_" + "0" * 300, "content"))
    method, tail = draw.choice(("GET", "DELETE", "POST")), draw.choice(("", "", "/content", "/remix", "/content/x"))
    bounds = {name: str(draw.choice(HOSTILE)) for name in draw.sample(("after", "limit", "order", "variant"), 2)}
    path = draw.choice((f"/v1/videos/{number}{tail}", "/v1/videos"))
    said = f"{method} {short(path)} with {short(bounds)}"

    def send(client: httpx2.Client) -> httpx2.Response | None:
        answer = client.request(
            method, path, params={key: value for key, value in bounds.items() if "\x00" not in value}
        )
        return None if answer.status_code in (400, 414, 431) and not answer.content else answer

    return said, send


def _path(draw: random.Random, _: Path) -> tuple[str, Send]:
    method = draw.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "X"))
    path = draw.choice((*PATHS, *ODD_PATHS))
    headers = draw.choice(
        (
            {},
            {"authorization": "Bearer \xff"},
            {"transfer-encoding": "x"},
            {"host": ""},
            {"x": "y" * 60_000},
            {"range": "bytes=5-1"},
            {"accept-encoding": "\x00"},
            {"if-modified-since": "x"},
        )
    )

    def send(client: httpx2.Client) -> httpx2.Response | None:
        answer = client.request(method, path, headers=headers, timeout=5)
        return None if method in ("HEAD", "OPTIONS") or answer.status_code in (400, 431) else answer

    def patient(client: httpx2.Client) -> httpx2.Response | None:
        with suppress(httpx2.TransportError):  # the client waits for what it promised to send, or is hung up on
            return send(client)
        return None

    return f"{method} {path[:40]} with {short(headers)}", patient


def _socket(draw: random.Random, _: Path) -> tuple[str, Send]:
    text = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sent = draw.choice(
        (
            b"",
            b"\x00" * 100,
            draw.randbytes(200),
            text[: draw.randrange(len(text))],
            text + b"Content-Length: -1\r\n\r\n{}",
            text + b"Content-Length: 99999999999\r\n\r\n{}",
            text + b"Content-Length: 100\r\n\r\n{",
            text + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
            text + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n1\r\n{\r\n",
            text + b'Content-Length: 33\r\n\r\n{"prompt": "pear", "stream": true}',
            b"GET / HTTP/9.9\r\n\r\n",
        )
    )

    def send(client: httpx2.Client) -> None:
        address = client.base_url
        with socket.create_connection((address.host, address.port or 80), timeout=5) as connection:
            connection.sendall(sent)
            connection.settimeout(draw.choice((0.01, 0.3)))
            with suppress(OSError):
                connection.recv(100)

    return f"bytes {sent[:30]!r} and away", send
