"""OpenAI's forms of requests, errors and events, as plain values.

Knows names of fields, their ranges and how a refusal reads; does not know models, files or the server that answers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nar.storage.fields import suggestion
from nar.storage.text import shortened

MOST = 2**31 - 1  # of numbers without a limit of their own: a deadline of 24 days
LONGEST_PROMPT = 32_000  # characters, as OpenAI's
MOST_PICTURES = 10  # of one request
MOST_SEED = 2**32 - 1
# With a length that is checked, so that halves of characters ("\ud800"), which no answer can hold, are refused too.
Text = Annotated[str, Field(max_length=LONGEST_PROMPT)]
Asked = TypeVar("Asked", bound="Generation")

_KINDS = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("service_unavailable_error", "server_is_overloaded"),
}


class Refusal(Exception):  # noqa: N818 not every one is somebody's error
    """An answer other than 200: its status and what the body says.

    `retry_after_seconds` is the wait that the client is asked for; None where repeating does not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        message = shortened(message, 1900)  # whatever of the request it repeats
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after_seconds = status, message, param, retry_after_seconds
        kind, usual = _KINDS.get(status, ("invalid_request_error" if status < 500 else "server_error", None))
        self.kind, self.code = kind, code or usual or ("internal_error" if status >= 500 else "invalid_value")

    @property
    def error(self) -> dict[str, Any]:
        """The object that clients of OpenAI's look for under `error`."""
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}

    @property
    def headers(self) -> dict[str, str]:
        """When to come back, in both spellings: whole seconds, as HTTP has them, and milliseconds."""
        wait = self.retry_after_seconds
        return {} if wait is None else {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(round(1000 * wait))}


class _Fields(BaseModel):
    """Fields of a request; null stands for the default, and unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if value is not None}


class Generation(_Fields):
    """What pictures and clips have in common: the condition, the seed and how codes are sampled."""

    prompt: Text = ""
    model: Text | None = None
    size: Text = "auto"
    user: Text | None = None
    safety_identifier: Text | None = None
    # Extensions: not of OpenAI's, and named as other servers of open models name them.
    class_label: int | Text | None = None
    negative_prompt: Text = ""
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = None
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    guidance_interval: Annotated[int, Field(ge=0, le=MOST)] | None = None
    guidance_curve: Text | None = None
    guidance_power: Annotated[float, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MOST)] | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=MOST)] | None = None


class Pictures(Generation):
    """Body of POST /v1/images/generations. Fields of OpenAI's that say nothing here take their default alone."""

    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] = 1
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=MOST)] = 0
    output_format: Literal["png", "webp", "jpeg"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json"] = "b64_json"
    background: Literal["auto", "opaque"] = "auto"
    quality: Literal["auto"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    style: None = None
    complexity: None = None
    input_fidelity: None = None
    svg: None = None
    frame_count: None = None
    frame_duration_ms: None = None

    @model_validator(mode="after")
    def _together(self) -> Pictures:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream: true")
        if self.output_compression not in (None, 100) and self.output_format == "png":
            raise ValueError("output_compression is for webp and jpeg; png loses nothing")
        return self


class Clip(Generation):
    """Fields of POST /v1/videos, but for the file `input_reference`."""

    seconds: Annotated[float, Field(gt=0, le=3600)] | None = None
    num_frames: Annotated[int, Field(ge=1, le=MOST)] | None = None
    fps: Annotated[float, Field(gt=0)] | None = None
    width: Annotated[int, Field(ge=1, le=MOST)] | None = None  # vLLM-Omni's way to say the size
    height: Annotated[int, Field(ge=1, le=MOST)] | None = None

    @model_validator(mode="after")
    def _together(self) -> Clip:
        if self.width is not None or self.height is not None:
            size = f"{self.width}x{self.height}"
            if None in (self.width, self.height) or self.size not in ("auto", size):
                raise ValueError("give size, or width and height")
            self.size = size
        if self.seconds is not None and self.num_frames is not None:
            raise ValueError("give seconds or num_frames, not both")
        return self


def read_fields(schema: type[Asked], values: Any) -> Asked:
    """Check values from JSON or a form, whose texts stand for numbers.

    Raises:
        Refusal: names the first field that is wrong, what it may be, and of an unknown one the nearest that there is.
    """
    from pydantic import ValidationError

    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise refusal_of(error.errors(include_url=False), schema.model_fields) from None


def refusal_of(errors: Sequence[Mapping[str, Any]], known: Mapping[str, Any]) -> Refusal:
    """The refusal that says what a validation found first, fields that do not exist before the others."""
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    place = [str(part) for part in first["loc"] if part != "body" and not str(part).endswith("str]")]
    name = place[0][:80] if place else None
    if first["type"] == "extra_forbidden":
        hint = suggestion(str(name), known)
        listed = "" if hint else f"; fields: {', '.join(sorted(known))}"
        return Refusal(400, f"unknown field {name!r}{hint}{listed}", param=name, code="unsupported_parameter")
    said = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in ("json_invalid", "model_attributes_type", "missing") and name not in known:
        return Refusal(400, f"the body must be a JSON object, with Content-Type: application/json ({said})")
    if first["type"] == "value_error":
        return Refusal(400, said, code="invalid_value")
    shown = shortened(str(first.get("input")), 60)
    return Refusal(400, f"{name}: {said[:1].lower()}{said[1:]}, not {shown!r}", param=name, code="invalid_value")


def partial_fronts(ends: Sequence[int], count: int) -> list[int]:
    """After which fronts `count` pictures on the way are sent, given how many tokens each front ends at.

    They divide the tokens evenly, as j / (count + 1) of all; as many as there are fronts, or one less, are all of them
    but the last, which is the result.
    """
    if count >= len(ends) - 1:
        return list(range(len(ends) - 1))
    wanted = [ends[-1] * part / (count + 1) for part in range(1, count + 1)]
    chosen = {next(front for front, end in enumerate(ends) if end >= share) for share in wanted}
    return sorted(chosen - {len(ends) - 1})


def event(name: str, **fields: Any) -> str:
    """A server-sent event, whose JSON has its name as `type`."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n"


def usage(text_tokens: int, image_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Tokens that a request took, in OpenAI's form."""
    given = text_tokens + image_tokens
    details = {"image_tokens": image_tokens, "text_tokens": text_tokens}
    return {
        "input_tokens": given,
        "input_tokens_details": details,
        "output_tokens": output_tokens,
        "total_tokens": given + output_tokens,
    }


def now() -> int:
    """Unix time in whole seconds."""
    return int(time.time())
