"""A pipeline of diffusers around one of ours, and the files by which diffusers finds it in a model folder.

The same seed gives the same bits. Knows diffusers' habits, and imports it; does not know how pictures are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from nar.pipeline.pipeline import Pipeline


class Loader(torch.nn.Module):
    """The part of a pipeline that holds ours, as `nar`. Parts alone are told the folder of a revision, and a format."""

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__()
        self.nar = pipe

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **_: Any) -> Loader:
        """Load the model folder whose tokenizer is at `folder`, on the CPU, from where `pipe.to` moves it."""
        return cls(Pipeline.from_pretrained(Path(folder).parent, device="cpu", dtype=torch_dtype or torch.float32))


@dataclass
class NAROutput(BaseOutput):  # type: ignore[misc]
    """What a call returns: `images` or, of a model of clips, `frames`, and the `seed` that makes them again."""

    images: Any = None
    frames: Any = None
    seed: Any = None


class NARPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Samples pictures or clips; `nar` is the `nar.Pipeline` that does so, and `tokenizer` what has loaded it."""

    def __init__(self, tokenizer: Loader) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer)
        self.nar = tokenizer.nar

    def __call__(
        self,
        prompt: Any = None,
        *,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("codes",),
        image: Any = None,
        mask_image: Any = None,
        **options: Any,
    ) -> Any:
        """Sample pictures of prompts or class labels, or with `image` and `mask_image` (white is new) edit one.

        A seed is drawn from `generator`, or from each of a list. `options` are those of `nar.Pipeline`: class_labels,
        negative_prompt, guidance_scale, num_images_per_prompt, temperature, top_k, top_p, seed, frames, ... Of
        `output_type` "np" and "pt" values are 0..1; "latent" gives codes. `callback_on_step_end` is called after each
        front, as f(pipe, front, front, {"codes": codes}); codes are -1 where undecided, and what it returns is unused.
        """
        if unknown := set(callback_on_step_end_tensor_inputs) - {"codes"}:
            raise ValueError(f"callback_on_step_end_tensor_inputs may name codes, not {', '.join(sorted(unknown))}")
        wanted = {"np": "pt", "latent": "codes"}.get(output_type, output_type)
        with self.progress_bar(total=self.nar.num_steps) as bar:

            def after_front(_: Any, front: int, codes: torch.Tensor) -> None:
                if bar.n == bar.total:  # the next batch
                    bar.total += self.nar.num_steps
                bar.update()
                if callback_on_step_end is not None:
                    tensors = {"codes": codes} if callback_on_step_end_tensor_inputs else {}
                    callback_on_step_end(self, front, front, tensors)

            options |= {"generator": generator, "output_type": wanted, "callback_on_front_end": after_front}
            if image is not None or mask_image is not None:
                out = self.nar.edit(image, mask=mask_image, prompt=prompt, **options)
            else:
                out = self.nar(prompt, **options)
        results = out.images if out.videos is None else out.videos
        if wanted == "pt":  # -1..1, and of clips (B, 3, T, H, W)
            results = (results / 2 + 0.5).clamp(0, 1)
            results = results if out.videos is None else results.transpose(1, 2)
            results = results.movedim(-3, -1).cpu().numpy() if output_type == "np" else results
        made = NAROutput(seed=out.seed, **{"images" if out.videos is None else "frames": results})
        return made if return_dict else made.to_tuple()

    def to(self, *where: Any, **options: Any) -> Any:
        """Move the pipeline to a device or into a number format, in place; returns it."""
        options.pop("silence_dtype_warnings", None)
        self.nar.to(*where, **options)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.nar.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of its weights."""
        return self.nar.dtype

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write a folder for both libraries; options are those of `nar.Pipeline.save_pretrained`."""
        self.nar.save_pretrained(save_directory, diffusers=True, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload such a folder; options are those of `nar.Pipeline.push_to_hub`."""
        return self.nar.push_to_hub(repo_id, diffusers=True, **options)
