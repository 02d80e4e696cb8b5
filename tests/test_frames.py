"""Clips from classes, words and given frames, with tokenizers of both kinds and one that loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make_condition, make_model
from nar import ClassCondition, Pipeline
from nar.condition import PrefixCodes, PrefixCondition
from nar.media.clips import as_array, save_clip
from nar.pipeline import pipeline
from nar.pipeline.continuation import Continuation
from nar.sampling import Sampling, generate
from nar.tokenizer import Tokenizer
from nar.tokenizer.larp import VideoTokenizer
from reference import reference_generate
from toy_models import PaintTokenizer, causal, larp, paint

GREEDY = {"temperature": 0.0, "guidance_scale": 1.0}


def random_clip(length: int, seed: int = 0, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (length, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def whole() -> Pipeline:
    """Frame prediction as published: the condition is the codes of a whole clip, its last given frame repeated."""
    model = make_model("frames-full", grid=(3, 2, 2), prefix_grid=(3, 2, 2))
    return Pipeline(model, larp(), given_frames=(2,))


@pytest.fixture(scope="module")
def partly() -> Pipeline:
    """Classes and the codes of none, one or three first frames."""
    model = make_model("frames", grid=(3, 2, 2), prefix_grid=(2, 2, 2), positions="rope")
    return Pipeline(model, causal(), ["jump", "run"], given_frames=(0, 1, 3), frame_rate=5)


def test_a_model_of_frames_alone_may_begin_from_nothing() -> None:
    model = make_model("words-and-frames", grid=(3, 2, 2), prefix_grid=(2, 2, 2), text_dim=0, text_length=0)
    pipe = Pipeline(model, causal(), given_frames=(0, 3))
    made = pipe(num_images_per_prompt=2, seed=1, output_type="np").videos
    assert made.shape[0] == 2
    np.testing.assert_array_equal(
        pipe.pictures(pipe(num_images_per_prompt=2, seed=1, output_type="codes").videos, "np"), made
    )
    with pytest.raises(ValueError, match="say what to make: this model takes frames"):
        Pipeline(model, causal(), given_frames=(3,))()


def test_clips_of_classes() -> None:
    pipe = Pipeline(make_model("video", grid=(3, 2, 2)), larp())
    out = pipe([3, 4], num_images_per_prompt=2, seed=1, guidance_scale=2.0)
    assert out.images is None
    assert out.names == ["3", "3", "4", "4"]
    assert [len(clip) for clip in out.videos] == [6] * 4
    assert out.videos[0][0].size == (8, 8)
    arrays = pipe([3, 4], num_images_per_prompt=2, seed=1, guidance_scale=2.0, output_type="np", batch_size=3).videos
    assert arrays.shape == (4, 6, 8, 8, 3)
    assert arrays.dtype == np.uint8
    np.testing.assert_array_equal(arrays[2], np.stack([np.asarray(frame) for frame in out.videos[2]]))
    codes = pipe([3, 4], num_images_per_prompt=2, seed=1, guidance_scale=2.0, output_type="codes").videos
    labels = ClassCondition(torch.tensor([3, 3, 4, 4]))
    assert torch.equal(codes, generate(pipe.model, labels, Sampling(guidance_scale=2.0), seed=1))
    assert abs(pipe.pictures(codes, "np").astype(int) - arrays).max() <= 1
    pixels = pipe([3], seed=1, output_type="pt").videos
    assert pixels.shape == (1, 3, 6, 8, 8)
    assert len(pipe([3], seed=1, num_frames=4).videos[0]) == 4
    with pytest.raises(ValueError, match="num_frames 7 is more than this model's 6, and it can't continue a clip"):
        pipe([3], num_frames=7)


def test_given_frames_come_back_unchanged(whole: Pipeline, partly: Pipeline) -> None:
    for pipe, told, added in ((whole, {}, 4), (partly, {"class_labels": 1}, 2)):
        for length in (3, 7):  # more than the window holds: all are kept, the last ones are the condition
            clip = random_clip(length)
            video = pipe(frames=clip, seed=1, output_type="np", **told).videos[0]
            np.testing.assert_array_equal(video[:length], clip)
            assert len(video) == length + added
            pictures = pipe(frames=[Image.fromarray(frame) for frame in clip], seed=1, **told).videos[0]
            np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in pictures]), video)


def test_the_condition_is_the_codes_of_the_last_frames(whole: Pipeline) -> None:
    clip = random_clip(5)
    window = torch.from_numpy(np.concatenate([clip[3:], clip[4:].repeat(4, 0)])).permute(3, 0, 1, 2).float() / 127.5 - 1
    given = PrefixCondition(whole.tokenizer.encode(window[None]))
    codes = whole(frames=clip, seed=1, output_type="codes").videos
    assert torch.equal(codes, generate(whole.model, given, seed=1))


def test_every_given_frame_matters(whole: Pipeline, partly: Pipeline) -> None:
    for pipe, told, count in ((whole, {}, 2), (partly, {"class_labels": 0}, 3)):
        clip = random_clip(count)
        before = pipe(frames=clip, seed=1, output_type="pt", **told).videos[:, :, count:]
        for index in range(count):
            changed = clip.copy()
            changed[index] = random_clip(1, seed=9)[0]
            after = pipe(frames=changed, seed=1, output_type="pt", **told).videos[:, :, count:]
            assert not torch.equal(after, before), f"frame {index} of {count} is not seen"


@pytest.mark.parametrize("make", [larp, causal])
def test_half_precision_reaches_the_decoder(make: Callable[[], Tokenizer]) -> None:
    """Beside a model in bfloat16 the decoder computes in it, to nearly the same pixels in float32."""
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = Pipeline(make_model("video", grid=(3, 2, 2)).to(dtype), make())
        made.append(pipe.decode(torch.arange(24).view(2, 3, 2, 2)))
    assert made[1].dtype == torch.float32
    assert 0 < (made[0] - made[1]).abs().mean() < 0.02


def test_any_number_of_frames_that_was_trained(partly: Pipeline) -> None:
    """None, one or three given frames in one batch each give what they give alone."""
    clips = [random_clip(3), random_clip(1)]
    together = partly(0, frames=clips, seed=1, num_frames=5, output_type="np").videos
    for index, clip in enumerate(clips):
        alone = partly([0] * (index + 1), frames=[clip] * (index + 1), seed=1, num_frames=5, output_type="np").videos
        np.testing.assert_array_equal(alone[index], together[index])
    # Two frames: the model was trained with one and three, so the last one is the condition.
    two = partly(0, frames=clips[0][:2], seed=1, output_type="np").videos[0]
    one = partly(0, frames=clips[0][1:2], seed=1, output_type="np").videos[0]
    np.testing.assert_array_equal(two[2:], one[1:])
    free = partly(0, seed=1, output_type="np").videos[0]
    assert len(free) == 5
    assert not np.array_equal(free[1:], one[1:])
    codes = partly(frames=clips[1], seed=1, output_type="codes").videos  # no class: the null class
    with torch.no_grad():
        pixels = torch.from_numpy(clips[1]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        given = partly.tokenizer.encode(pixels)
    assert torch.equal(codes[:, :1], given), "codes of given frames are kept"
    known = torch.full((1, 3, 2, 2), -1)
    known[:, :, 0, 0] = 5
    codes = partly(frames=clips[1], seed=1, output_type="codes", known=known).videos
    assert torch.equal(codes[:, :1], given), "beside known codes too"
    assert (codes[:, 1:, 0, 0] == 5).all()
    known[0, 2, 1, 1] = 99
    with pytest.raises(ValueError, match="known holds 99; codes are 0 to 23 and -1 where free"):
        partly(frames=clips[1], seed=1, known=known)
    with pytest.raises(ValueError, match=r"grid \(3, 4, 4\) does not fit this model: it reads context frames"):
        partly.at_grid((3, 4, 4))


def test_passes_are_as_many_as_make_the_clip_and_known_codes_are_of_the_first(partly: Pipeline) -> None:
    clip, fronts = random_clip(3), partly.model.layout.schedule.num_steps
    known = torch.full((1, 3, 2, 2), -1)
    known[:, 2] = torch.tensor([[5, 9], [3, 20]])
    for num_frames in (None, 5, 6, 9, 11):
        passes: list[torch.Tensor] = []

        def note(_: Pipeline, front: int, codes: torch.Tensor, passes: list[torch.Tensor] = passes) -> None:
            if front == fronts - 1:
                passes.append(codes.clone())

        partly(0, frames=clip, num_frames=num_frames, known=known, seed=1, callback_on_front_end=note)
        assert len(passes) == partly.continuation.num_passes(3, num_frames)
        assert torch.equal(passes[0][:, 2], known[:, 2])
        assert not any(torch.equal(codes[:, 2], known[:, 2]) for codes in passes[1:])


def test_a_whole_clip_as_condition_leaves_a_frame_to_be_made() -> None:
    short = VideoTokenizer(replace(larp().config, num_frames=4, num_tokens=8, grid=(2, 2, 2))).eval()
    model = make_model("frames-full", grid=(2, 2, 2), prefix_grid=(2, 2, 2))
    assert Continuation(model, short).counts == (3,)
    model = make_model("frames-full", grid=(3, 2, 2), prefix_grid=(3, 2, 2))
    assert Continuation(model, larp()).counts == (5,)


def test_what_is_not_given_is_not_seen(partly: Pipeline) -> None:
    labels, codes = ClassCondition(torch.tensor([1])), torch.zeros(1, 2, 2, 2, dtype=torch.long)
    mask = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    mask[:, :1] = True
    results = []
    for first, second in ((3, 5), (3, 6), (4, 5)):
        codes = codes.clone()
        codes[:, 0], codes[:, 1] = first, second
        results.append(partly.model(torch.zeros(1, 3, 2, 2).long(), (labels, PrefixCondition(codes, mask))))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_masked_codes_with_words_decode_as_the_reference_says(attention: str) -> None:
    model = make_model("words-and-frames", grid=(3, 2, 2), prefix_grid=(2, 2, 2), prefix_attention=attention)
    condition = make_condition(model, 3)
    given = condition.prefix
    assert given is not None
    mask = torch.zeros_like(given.codes, dtype=torch.bool)
    mask[1, :1] = mask[2] = True  # nothing, half, everything
    condition = replace(condition, prefix=PrefixCodes(given.codes, mask))
    for sampling in (Sampling(temperature=0), Sampling(guidance_scale=2.5, guidance_interval=4, top_p=0.9)):
        made = generate(model, condition, sampling, seed=5)
        assert torch.equal(made, reference_generate(model, condition, sampling, 5))
    with pytest.raises(ValueError, match="must have one shape"):
        PrefixCondition(given.codes, mask[:, :1])


def test_given_codes_have_places() -> None:
    """With rotary positions and full attention two given codes that change places change the prediction."""
    model = make_model("frames-full", grid=(2, 2, 3), positions="rope")
    codes = torch.arange(12).view(1, 2, 2, 3)
    swapped = codes.clone()
    swapped[0, 0, 0, 0], swapped[0, 1, 1, 1] = codes[0, 1, 1, 1], codes[0, 0, 0, 0]
    empty = torch.zeros(1, 2, 2, 3, dtype=torch.long)
    with torch.no_grad():
        first, second = (model(empty, PrefixCondition(given)) for given in (codes, swapped))
    assert (first - second).abs().max() > 0.01
    layout = make_model("frames", grid=(2, 2, 3), prefix_grid=(2, 2, 3), positions="rope").layout  # a class first
    assert layout.phases is not None
    before, tokens = layout.phases[:14], layout.phases[14:]
    assert torch.equal(before[1:13][layout.schedule.places], tokens), "the rotation of a place is one"
    for alone in (before[0], before[13]):  # the class and the separator have no place
        assert torch.equal(alone, torch.tensor([1.0, 0.0]).expand_as(alone))


def test_decoding_takes_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline(make_model("video", grid=(3, 2, 2)), larp())
    codes = torch.randint(24, (7, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    whole, seen = pipe.pictures(codes, "pt"), []
    decode = pipe.tokenizer.decode
    monkeypatch.setattr(pipe.tokenizer, "decode", lambda part: seen.append(len(part)) or decode(part))
    monkeypatch.setattr(pipeline, "DECODED_PIXELS", 3 * 6 * 8 * 8 + 1)
    torch.testing.assert_close(pipe.pictures(codes, "pt"), whole)
    assert seen == [3, 3, 1]
    monkeypatch.setattr(pipeline, "DECODED_PIXELS", 1)  # larger pictures than that come one by one
    pipe.pictures(codes, "np")
    assert seen[3:] == [1] * 7


def test_longer_clips_slide_the_window(partly: Pipeline) -> None:
    clip = random_clip(3)
    long = partly(1, frames=clip, num_frames=9, seed=1, output_type="np").videos[0]
    assert len(long) == 9
    short = partly(1, frames=clip, seed=1, output_type="np").videos[0]
    np.testing.assert_array_equal(long[:5], short)
    assert not np.array_equal(long[5:7], short[3:5]), "every pass draws from a stream of its own"
    # A pass sees the last three frames and nothing before them.
    other = random_clip(3, seed=5)
    other[1:] = clip[1:]
    greedy = {"num_frames": 7, "output_type": "np", "seed": 1, **GREEDY}
    model = make_model("frames", grid=(3, 2, 2), prefix_grid=(1, 2, 2), num_classes=10)
    last = Pipeline(model, causal())  # sees one frame
    first, second = last(1, frames=clip, **greedy).videos[0], last(1, frames=other, **greedy).videos[0]
    assert not np.array_equal(first[:3], second[:3])
    np.testing.assert_array_equal(first[3:], second[3:])
    free = partly(1, num_frames=9, seed=1, output_type="np").videos[0]  # begins without any
    np.testing.assert_array_equal(free[:5], partly(1, seed=1, output_type="np").videos[0])
    assert len(free) == 9


def test_every_pass_has_random_numbers_of_its_own() -> None:
    """A model that takes all codes for equally likely samples what its random numbers say, and nothing else."""
    model = make_model("frames", grid=(3, 2, 2), prefix_grid=(1, 2, 2), num_classes=10)
    torch.nn.init.zeros_(model.output.weight)
    passes: list[torch.Tensor] = []

    def note(pipe: Pipeline, front: int, codes: torch.Tensor) -> None:  # noqa: ARG001
        if bool((codes >= 0).all()):
            passes.append(codes.clone())

    clip = random_clip(1)
    Pipeline(model, causal())([1, 1], frames=clip, num_frames=13, seed=1, callback_on_front_end=note)
    assert len(passes) == 3
    rows = torch.cat(passes)[:, 1:].flatten(1)  # of two clips in three passes; first codes are those of the clip
    assert len(rows.unique(dim=0)) == 6


def test_exactly_the_codes_of_the_frames() -> None:
    """With a tokenizer that loses nothing: known codes are the frames, predictions are what the model says."""
    model = make_model("frames", grid=(3, 2, 3), prefix_grid=(2, 2, 3))
    pipe = Pipeline(model, PaintTokenizer(24))  # type: ignore[arg-type]
    given = torch.randint(24, (2, 2, 3), generator=torch.Generator().manual_seed(0))
    known = torch.full((1, 3, 2, 3), -1)
    known[0, :2] = given
    condition = (ClassCondition(torch.tensor([4])), PrefixCondition(given[None]))
    expected = generate(model, condition, Sampling(temperature=0), known=known)
    video = pipe(4, frames=paint(given), output_type="np", **GREEDY).videos[0]
    np.testing.assert_array_equal(video, paint(expected[0]))


def test_frames_of_other_sizes_are_cut_and_resized(partly: Pipeline) -> None:
    wide = np.zeros((1, 16, 32, 3), np.uint8)
    wide[:, :, 4:28] = 200  # the middle square and a little more
    video = partly(1, frames=wide, seed=1, output_type="np").videos[0]
    assert (video[0] == 200).all()


@pytest.mark.parametrize("form", ["folder", "start.gif", "start.webp", "start.mp4"])
def test_frames_from_files(partly: Pipeline, tmp_path: Path, form: str) -> None:
    ramp = np.linspace(20, 220, 3).astype(np.uint8)
    clip = np.broadcast_to(ramp[:, None, None, None], (3, 16, 16, 3)).copy()
    save_clip(clip, tmp_path / form, frame_rate=5)
    video = partly(1, frames=tmp_path / form, seed=1, output_type="np").videos[0]
    assert abs(video[:3].astype(int) - clip[:, :8, :8]).max() <= 4
    assert len(video) == 5


@pytest.mark.parametrize("form", ["start.gif", "start.webp", "start.mp4"])
@pytest.mark.parametrize("frame_rate", [5.3, 8.0])
def test_a_clip_is_read_at_the_rate_of_the_model(tmp_path: Path, form: str, frame_rate: float) -> None:
    levels = np.repeat(np.linspace(20, 230, 6), (1, 3, 2, 1, 4, 5)).astype(np.uint8)  # formats leave repetitions out
    clip = np.broadcast_to(levels[:, None, None, None], (16, 16, 16, 3))
    save_clip(clip, tmp_path / form, frame_rate=frame_rate)
    read = as_array(tmp_path / form, (8, 8), frame_rate=frame_rate)
    assert read.shape == (16, 8, 8, 3)
    assert abs(read.astype(int) - clip[:, :8, :8]).max() <= 4
    save_clip(clip, tmp_path / form, frame_rate=10)
    half = as_array(tmp_path / form, frame_rate=5)
    assert abs(half.astype(int) - clip[::2]).max() <= 4


def test_many_frames_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = np.repeat(np.arange(40, dtype=np.uint8), 48).reshape(40, 4, 4, 3)
    save_clip(clip, tmp_path / "frames", frame_rate=8)
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files are counted in Linux's /proc")
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 10, limits[1]))
    try:
        np.testing.assert_array_equal(as_array(tmp_path / "frames"), clip)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    monkeypatch.setattr("nar.media.clips.MOST_FRAMES", 39)
    with pytest.raises(ValueError, match="has 40 frames; cut out what is to be continued, at most 39"):
        as_array(tmp_path / "frames")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "say what to make: this model takes frames"),
        ({"prompt": "a"}, "takes no prompts; it takes frames"),
        ({"frames": random_clip(1)}, "has 1 frames, this model needs at least 2"),
        ({"frames": random_clip(3), "num_frames": 3}, "num_frames 3 must be more than the 3 that are given"),
        ({"frames": random_clip(3).astype(np.float32)}, "frames must be uint8"),
        ({"frames": []}, "the frames of a clip must be at least one"),
        ({"frames": random_clip(3), "num_frames": 5000000}, "num_frames 5,000,000 is too long.* at most 2,000"),
        ({"frames": random_clip(3), "num_frames": 9, "output_type": "codes"}, "codes are those of one pass"),
        ({"frames": [random_clip(3), random_clip(4)], "output_type": "np"}, "several lengths: set num_frames"),
        ({"frames": random_clip(3), "guidance_scale": 2.0}, "this model's only condition is given frames"),
    ],
)
def test_mistakes_are_named(whole: Pipeline, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole(**values)


def test_frames_of_several_sizes_are_no_clip() -> None:
    with pytest.raises(ValueError, match="of one size"):
        as_array([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))])
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert (as_array([clear]) == 255).all()
