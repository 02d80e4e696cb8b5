"""Labels in, pictures out: the only place where condition, sampling and tokenizer meet.

Knows model folders, names of classes and pixels; does not know the command line or HTTP.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nar.condition import ClassCondition
from nar.config import suggestion
from nar.folder import CONFIG, from_dict, read_config
from nar.model import Transformer
from nar.sampling import Sampling, Session, generate_fronts
from nar.tokenizer import Tokenizer, load_tokenizer

BUNDLED = Path(__file__).parent / "bundled"
OUTPUT_TYPES = ("pil", "np", "pt", "codes")

Callback = Callable[["Pipeline", int, Tensor], None]


@dataclass(frozen=True)
class Output:
    """What a call made. `images` by output type: Pillow pictures, uint8 (B, H, W, 3), float -1..1 (B, 3, H, W), or
    codes (B, *grid).

    Picture i can be drawn again with `seed` at its place in `indices`.
    """

    images: Any
    class_labels: list[int]
    seed: int


def bundled_names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def find_model(source: str | Path) -> Path:
    """The folder of a model: a bundled name, a local folder, or a hub id such as `someone/nar-l`, which is downloaded.

    Raises:
        FileNotFoundError: none of these.
    """
    path = Path(source)
    if (BUNDLED / str(source) / CONFIG).is_file():
        return BUNDLED / str(source)
    if path.exists() or str(source).startswith((".", "/", "~")):
        read_config(path.expanduser())
        return path.expanduser()
    if str(source).count("/") == 1:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"no folder {str(source)!r} here, and it can't be had from the hub ({type(error).__name__})"
            ) from error
    raise FileNotFoundError(
        f"no model {str(source)!r}{suggestion(str(source), bundled_names())}; "
        f"bundled: {', '.join(bundled_names())}; or give a model folder or a hub id"
    )


class Pipeline:
    """A model with its tokenizer and class names; call it to get pictures."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        class_names: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> None:
        if tokenizer.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"the model has {model.config.vocab_size} codes but the tokenizer {tokenizer.config.vocab_size}: "
                "they do not belong together"
            )
        self.model = model
        self.session = Session(model)
        self.tokenizer = tokenizer
        self.class_names = tuple(class_names)
        self.sampling = sampling or Sampling()

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: torch.device | str | None = None, dtype: str | torch.dtype = "float32"
    ) -> Pipeline:
        """Load a bundled name, a model folder or a hub id. `device` defaults to a GPU when there is one.

        The tokenizer stays in float32, whatever the `dtype` of the transformer: "float32", "bfloat16", "float16", or
        on a CPU "int8". On a CPU "float16" means half-precision weights and float32 arithmetic; see `nar.precision`.

        Raises:
            FileNotFoundError: no such model, or it comes without a tokenizer.
            ValueError: a damaged folder, or a model that makes something else than pictures of classes.
        """
        folder = find_model(source)
        config = read_config(folder)
        sizes = config.get("model", {})
        if config.get("kind") == "transformer" and (not sizes.get("num_classes") or len(sizes.get("grid", ())) == 3):
            raise ValueError(
                f"{folder} makes clips, or pictures from text features or given frames; Pipeline makes pictures of "
                "classes so far: docs/checkpoints.md shows the Python for the others"
            )
        if config.get("kind") == "transformer" and not (folder / "tokenizer").is_dir():
            raise FileNotFoundError(
                f"{folder} has no tokenizer to make pictures with; copy a converted one to {folder / 'tokenizer'}, "
                "or convert the model again with --tokenizer FOLDER"
            )
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(
            Transformer.from_pretrained(folder, dtype, place),
            load_tokenizer(folder / "tokenizer").to(place),
            config.get("class_names", ()),
            from_dict(Sampling, config.get("sampling", {}), folder / CONFIG),
        )

    def at_grid(self, grid: Sequence[int]) -> Pipeline:
        """The same pipeline, weights shared, for pictures of another size; raises ValueError when the model can't."""
        return Pipeline(self.model.at_grid(tuple(grid)), self.tokenizer, self.class_names, self.sampling)

    def label_index(self, label: str | int) -> int:
        """The number of a class, given its name (any case) or number; raises ValueError with the names."""
        count = self.model.config.num_classes
        if not count:
            raise ValueError("this model has no classes")
        text = str(label).strip()
        names = [name.lower() for name in self.class_names]
        if text.lower() in names:
            return names.index(text.lower())
        if text.isdecimal() and int(text) < count:
            return int(text)
        listed = ", ".join(self.class_names) if 0 < len(names) <= 40 else f"numbers 0 to {count - 1}"
        raise ValueError(f"unknown class {text!r}{suggestion(text.lower(), names)}; classes: {listed}")

    def label_name(self, index: int) -> str:
        """The name of a class, or its number where there are no names."""
        return self.class_names[index] if index < len(self.class_names) else str(index)

    def __call__(
        self,
        class_labels: Sequence[str | int] | str | int,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        guidance_curve: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        known: Tensor | None = None,
        batch_size: int = 32,
        output_type: str = "pil",
        callback_on_front_end: Callback | None = None,
    ) -> Output:
        """Draw `num_images_per_prompt` pictures of each label, in that order.

        Settings that are None take the model's own defaults. Picture i depends on (seed, i) only, not on `batch_size`;
        without `seed` or `generator` a seed is drawn, and returned.

        Args:
            guidance_scale: 1.0 is off.
            known: codes (number of pictures, *grid) kept as given, -1 where free.
            output_type: "pil", "np" (uint8), "pt" (float -1..1) or "codes".
            callback_on_front_end: called as f(pipe, front, codes) after each front of each batch; codes are -1 where
                undecided.

        Raises:
            ValueError: an unknown class, or a setting that is out of range.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")
        if num_images_per_prompt < 1 or batch_size < 1:
            raise ValueError(
                f"num_images_per_prompt {num_images_per_prompt} and batch_size {batch_size} must be at least 1"
            )
        given = {
            "guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "guidance_curve": guidance_curve,
            "temperature": temperature, "top_k": top_k, "top_p": top_p,
        }  # fmt: skip
        sampling = dataclasses.replace(self.sampling, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
        if seed is None:
            seed = generator.initial_seed() if generator is not None else secrets.randbits(32)
        wanted = [class_labels] if isinstance(class_labels, str | int) else class_labels
        labels = [self.label_index(label) for label in wanted]
        labels = [label for label in labels for _ in range(num_images_per_prompt)]
        if known is not None and len(known) != len(labels):
            raise ValueError(f"known has {len(known)} rows for {len(labels)} pictures")
        made: list[Any] = []
        for start in range(0, len(labels), batch_size):
            rows = range(start, min(start + batch_size, len(labels)))
            codes = torch.empty(0)
            for front, codes in generate_fronts(
                self.model,
                ClassCondition(torch.tensor([labels[row] for row in rows])),
                sampling,
                seed=seed,
                indices=rows,
                known=None if known is None else known[rows.start : rows.stop],
                session=self.session,
            ):
                if callback_on_front_end is not None:
                    callback_on_front_end(self, front, codes)
            made.extend(self.pictures(codes, output_type))
        if output_type == "np":
            return Output(np.stack(made), labels, seed)
        return Output(made if output_type == "pil" else torch.stack(made), labels, seed)

    @torch.inference_mode()
    def pictures(self, codes: Tensor, output_type: str = "pil") -> Any:
        """Decode codes (B, *grid), with -1 (drawn as mid-grey) where undecided, into one of the output types."""
        if output_type == "codes":
            return codes
        pixels = self.tokenizer.decode(codes.clamp_min(0)).clamp(-1, 1)
        if (codes < 0).any():
            shape = pixels.shape[2:]
            hidden = (codes < 0)[:, None].float()
            pixels = pixels.masked_fill(torch.nn.functional.interpolate(hidden, size=shape).bool(), 0.0)
        if output_type == "pt":
            return pixels
        images = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return images if output_type == "np" else [Image.fromarray(image) for image in images]

    def growing(self, fronts: Sequence[Tensor]) -> Iterator[list[Image.Image]]:
        """The pictures after each front, given the codes that the callback saw."""
        for codes in fronts:
            yield self.pictures(codes)
