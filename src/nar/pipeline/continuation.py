"""How a model continues clips: the lengths of context and result, and the codes of context frames as a condition.

Knows the lengths of clips and grids, and asks the tokenizer for codes; does not know prompts or files. Legend: `B`
batch, `T H W` frames and pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar.condition import Condition, PrefixCondition
from nar.media.clips import MOST_FRAMES
from nar.model import Transformer
from nar.tokenizer import Tokenizer
from nar.tokenizer.causal import CausalTokenizer

KINETICS_CONTEXT = 5  # frames, of 16: the published protocol of frame prediction


def prefix_grid(tokenizer: Tokenizer, grid: tuple[int, ...], counts: Sequence[int]) -> tuple[int, ...]:
    """The grid of codes that conditions a model of clips of `grid` on up to so many frames; see `Continuation`.

    Raises:
        ValueError: the model is one of pictures, or clips can't be cut after so many frames.
    """
    shape = tokenizer.pixel_shape(grid)
    if len(shape) != 3:
        raise ValueError("given_frames are for models of clips; leave them out for pictures")
    allowed = range(1, shape[0], tokenizer.config.frames_per_code if isinstance(tokenizer, CausalTokenizer) else 1)
    wrong = [count for count in counts if count and count not in allowed]
    if wrong or not any(counts) or len(set(counts)) != len(counts):
        listed = ", ".join(map(str, [0, *allowed][:12])) + (", ..." if len(allowed) > 11 else "")
        raise ValueError(f"given_frames {list(counts)} must be different ones of {listed}, and not 0 alone")
    return (1 + allowed.index(max(counts)), *grid[1:]) if isinstance(tokenizer, CausalTokenizer) else grid


class Continuation:
    """How a model continues clips (3, T, H, W), float in -1..1.

    `counts` are the numbers of context frames that it was trained with (`given_frames` in recipes and config.json), in
    order; 0 among them lets it begin without any. By default as many as its prefix holds, or 5 where that is a whole
    clip; for models without a prefix 0.

    Where the prefix is a whole grid, a code may depend on all frames (LARP): the last context frame is repeated to the
    end, and all codes are sampled. Where it is shorter, the tokenizer is causal: its first codes are those of the first
    frames whatever follows, and are kept in the result.

    Attributes:
        makes_clips: whether results have frames.
        num_frames: those that one pass gives, the context included; 1 for models of pictures.
        causal: whether codes of the context are codes of the result.
        has_holes: whether the prefix is that of a picture or clip to edit, in which what is not given is a hole.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, counts: Sequence[int] = ()) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.grid, self.prefix = model.config.grid, model.config.prefix_grid
        shape = tokenizer.pixel_shape(self.grid)
        self.makes_clips = len(shape) == 3
        if self.makes_clips and self.prefix and self.prefix[1:] != self.grid[1:]:
            raise ValueError(
                f"prefix_grid {self.prefix} must be frames of the model's grid {self.grid}; mend config.json"
            )
        self.num_frames = shape[0] if self.makes_clips else 1
        self.has_holes = model.config.prefix_holes == "token"
        self.causal = bool(self.prefix) and self.prefix[0] < self.grid[0]
        self.counts = tuple(sorted(counts)) or (self._default_count(),)

    def _default_count(self) -> int:
        if self.causal:
            return 1 + (self.prefix[0] - 1) * ((self.num_frames - 1) // (self.grid[0] - 1))
        takes_frames = self.prefix and not self.has_holes
        return min(KINETICS_CONTEXT, max(1, self.num_frames - 1)) if takes_frames else 0

    def num_context(self, clip: Tensor | None) -> int:
        """How many of a clip's last frames the model is conditioned on."""
        return self._count(0 if clip is None else clip.shape[1])

    def extended(self, clip: Tensor | None, decoded: Tensor) -> Tensor:
        """A clip with the frames that a pass, decoded (3, T, H, W), adds to it."""
        added = decoded[:, self.num_context(clip) :]
        return added if clip is None else torch.cat([clip, added], 1)

    def num_passes(self, length: int, num_frames: int | None) -> int:
        """How many passes make a clip of `num_frames` from one of `length`."""
        passes = 0
        while not passes or length < (num_frames or 0):
            length += self.num_frames - self._count(length)
            passes += 1
        return passes

    def check(self, lengths: Collection[int], num_frames: Any, output_type: str) -> None:
        """Raise ValueError when clips of these lengths can't be continued, or not to `num_frames`, or not as asked."""
        if num_frames is not None and not isinstance(num_frames, int | np.integer):
            raise ValueError(f"num_frames must be a whole number, not {num_frames!r}")
        if not self.makes_clips:
            if num_frames is not None:
                raise ValueError("this model makes pictures: num_frames is for models that make clips")
            return
        if output_type == "codes" and num_frames is not None:
            raise ValueError("codes are those of one pass: leave num_frames out")
        if num_frames is None and len(lengths) > 1 and output_type in ("np", "pt"):
            raise ValueError(f"clips of {sorted(lengths)} context frames grow to several lengths: set num_frames")
        least = min((count for count in self.counts if count), default=0)
        if short := [length for length in lengths if 0 < length < least]:
            raise ValueError(f"the clip to continue has {min(short)} frames, this model needs at least {least}")
        if num_frames is not None and num_frames > MOST_FRAMES:
            raise ValueError(f"num_frames {num_frames:,} is too long: at most {MOST_FRAMES:,}, held in memory")
        if num_frames is not None and num_frames <= max(lengths):
            raise ValueError(f"num_frames {num_frames} must be more than the {max(lengths)} that are given")
        if not self.prefix and num_frames is not None and num_frames > self.num_frames:
            longest = f"this model's {self.num_frames}, and it can't continue a clip; models with frame prediction can"
            raise ValueError(f"num_frames {num_frames} is more than {longest}")

    @torch.inference_mode()
    def condition(self, clips: Sequence[Tensor | None]) -> Condition:
        """The codes of each clip's last frames, with a mask where the model was trained with several numbers of them.

        Raises:
            ValueError: a clip without frames for a model that can't begin without.
        """
        counts = [self.num_context(clip) for clip in clips]
        if min(counts) < self.counts[0]:
            raise ValueError("this model continues clips: give it frames")
        codes = torch.zeros(len(clips), *self.prefix, dtype=torch.long, device=self.model.device)
        encoded: dict[int, Tensor] = {}  # each clip alone, so that its codes do not depend on the others
        for row, (clip, count) in enumerate(zip(clips, counts, strict=True)):
            if clip is None or not count:
                continue
            if id(clip) not in encoded:
                last = clip[:, clip.shape[1] - count :]
                repeated = last[:, -1:].expand(-1, self.num_frames - count, -1, -1)
                encoded[id(clip)] = self.tokenizer.encode(torch.cat([last, repeated], 1)[None])[0, : self.prefix[0]]
            codes[row] = encoded[id(clip)]
        return self.masked(codes, counts)

    def masked(self, codes: Tensor, counts: Sequence[int]) -> Condition:
        """Condition on codes (B, *prefix), of which only those of the first `counts` frames are seen."""
        if len(self.counts) == 1 and not self.has_holes:
            return PrefixCondition(codes)
        steps = torch.tensor([self._num_steps(count) for count in counts], device=codes.device)
        mask = torch.arange(self.prefix[0], device=codes.device) < steps[:, None]
        return PrefixCondition(codes, mask[(..., *(None,) * (codes.ndim - 2))].expand_as(codes))

    def known(self, condition: Condition) -> Tensor | None:
        """The codes of the result (B, *grid) that the context decides, -1 elsewhere; None when it decides none."""
        prefix = condition.prefix
        if not self.causal or prefix is None:
            return None
        known = torch.full((len(condition), *self.grid), -1, device=prefix.codes.device)
        known[:, : self.prefix[0]] = prefix.codes if prefix.mask is None else prefix.codes.masked_fill(~prefix.mask, -1)
        return known

    def _count(self, length: int) -> int:
        return max((count for count in self.counts if count <= length), default=0)

    def _num_steps(self, count: int) -> int:
        """How many steps in time the codes of `count` context frames fill."""
        if self.causal and count:
            return 1 + (count - 1) * (self.grid[0] - 1) // (self.num_frames - 1)
        return self.prefix[0] if count else 0
