"""Files that the fuzz damages: one small example of every kind that a verb reads, made once."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest


def make_world(folder: Path) -> None:
    """Write one of everything; a second or two of training included."""
    import torch
    import yaml
    from PIL import Image
    from safetensors.torch import save_file

    import test_convert
    import training_runs
    from clip_files import write as write_clip
    from conftest import make_model
    from nar import cli
    from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
    from text_encoders import tiny_encoder
    from toy_models import clips_folder, words_folder

    def nar(*arguments: object) -> None:
        sys.argv = ["nar", *map(str, arguments)]
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0, arguments

    def put(name: str) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        return folder / name

    torch.manual_seed(1)
    sizes = {"channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1, "latent_channels": 8, "norm_groups": 4}
    ImageTokenizer(ImageTokenizerConfig(vocab_size=32, code_dim=4, **sizes)).save_pretrained(put("tokenizer"))
    make_model("nar", num_classes=3, vocab_size=32).save_pretrained(
        folder / "model",
        class_names=("red apple", "pear", "plum"),
        tokenizer=folder / "tokenizer",
        sampling={"guidance_scale": 1.5},
    )
    tiny_encoder(put("encoder"), "t5")
    words = make_model("text", grid=(4, 4), text_dim=16, text_length=10, vocab_size=32)
    shutil.copytree(words_folder(put("w"), words, folder / "encoder"), folder / "words")
    clips = make_model("words-and-frames", grid=(3, 2, 2), prefix_grid=(2, 2, 2), text_dim=16, text_length=10)
    shutil.copytree(clips_folder(put("c"), clips, folder / "encoder"), folder / "clips")

    random_pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    records = []
    for index, pixels in enumerate(random_pixels):
        name = ("a", "b")[index % 2]
        Image.fromarray(pixels).save(put(f"pictures/{name}/{index}.png"))
        Image.fromarray(pixels).save(put(f"captioned/{index}.png"))
        records.append({"file_name": f"{index}.png", "caption": f"a red apple {index}", "label": index % 2})
        put(f"texts/{index}.txt").write_text(f"a red apple {index}")
        Image.fromarray(pixels).save(put(f"texts/{index}.jpg"))
    shutil.copytree(folder / "captioned", folder / "listed")
    put("captioned/metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    put("listed/metadata.csv").write_text(
        "file_name,caption,label\n"
        + "".join(f"{record['file_name']},{record['caption']},{record['label']}\n" for record in records)
    )
    np.savez(put("array/set.npz"), arr_0=random_pixels, labels=np.arange(12) % 2, settings=np.array('{"model": "x"}'))
    np.savez(put("reference/reference.npz"), mu=np.zeros(1280), sigma=np.eye(1280))
    _write_parquet(put("table/train.parquet"), random_pixels)
    _write_tar(put("tar/train.tar"), random_pixels)
    _write_idx(folder / "idx", random_pixels[..., 0])
    for index in range(4):
        write_clip(put(f"films/{'ab'[index % 2]}/{index}.mp4"), 6, size=(16, 16))
        frames = [Image.fromarray(pixels) for pixels in random_pixels[:6]]
        frames[0].save(put(f"animations/{'ab'[index % 2]}/{index}.gif"), save_all=True, append_images=frames[1:])
    put("clip/start.gif").write_bytes((folder / "animations/a/0.gif").read_bytes())
    put("lists/train.csv").write_text(
        "path,label\n" + "".join(f"{name},class {index}\n" for index, name in enumerate(("a/0.mp4", "b/1.mp4")))
    )
    shutil.copytree(folder / "films", folder / "lists", dirs_exist_ok=True)
    put("prompts/prompts.txt").write_text("a red apple\nblue circle\n")
    put("names/names.json").write_text(json.dumps([f"class {index}" for index in range(5)]))
    put("names/names.txt").write_text("".join(f"class {index}\n" for index in range(5)))
    put("geneval/prompts.jsonl").write_text('{"prompt": "red apple"}\n{"prompt": "blue circle"}\n')
    nar("eval", "composed", "--write-prompts", put("composing/prompts.jsonl"))
    for index, line in enumerate((folder / "composing/prompts.jsonl").read_text().splitlines()[::40]):
        put(f"composed/{index:05d}/metadata.jsonl").write_text(line)
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(_made(put(f"composed/{index:05d}/samples/0000.png")))
    nar("sample", folder / "model", "-n", 2, "-o", folder / "drawn")
    nar("extract", folder / "tokenizer", "--data", folder / "pictures", "--size", 8, "-o", folder / "codes")

    torch.save(test_convert.image_model(), put("published/model.pt"))
    save_file(test_convert.image_model(), put("published-safe/model.safetensors"))
    torch.save(test_convert.llamagen_model(), put("inception/weights.pth"))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), put("i3d/i3d.pt"))
    recipe = training_runs.MODEL | {"data": {"source": str(folder / "pictures"), "size": 8}, "batch_size": 4}
    recipe |= {"num_images": 16, "preview_every": 2, "tokenizer_path": str(folder / "tokenizer")}
    put("recipe/tiny.yaml").write_text(yaml.safe_dump(recipe))
    tokenizer = {name: value for name, value in recipe.items() if name not in ("task", "model", "tokenizer_path")}
    tokenizer |= {"task": "tokenizer", "tokenizer": training_runs.TOKENIZER, "num_images": 8}
    put("recipe-tokenizer/tiny.yaml").write_text(yaml.safe_dump(tokenizer))
    nar("train", folder / "recipe/tiny.yaml", f"run={folder / 'run'}", "num_images=8")
    shutil.rmtree(folder / "run/model")
    shutil.copytree(folder / "model", folder / "twin")
    study = {"recipe": str(folder / "recipe/tiny.yaml"), "num_images": 8, "seeds": [0, 1], "arms": {"a": {}, "b": {}}}
    study["arms"]["b"] = {"settings": ["model.schedule=raster"]}
    study |= {"expect": ["steps of a < b"], "settings": ["optim.warmup_images=4", "data.heldout_share=0.5"]}
    study["judging"] = {"number": 8, "num_sampled": 0, "independence": False, "batch_sizes": []}
    put("plan/tiny.yaml").write_text(yaml.safe_dump(study))
    nar("compare", folder / "plan/tiny.yaml", f"run={folder / 'study'}")
    for left in ("runs", "codes"):
        shutil.rmtree(folder / "study" / left, ignore_errors=True)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _encoded(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _write_parquet(path: Path, pictures: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": _encoded(pixels), "path": f"{index}.png"} for index, pixels in enumerate(pictures)]
    columns = {"image": cells, "label": [0, 1] * 6, "caption": ["red apple"] * 12, "tags": [["a"]] * 12}
    pq.write_table(pa.table(columns), path)


def _write_tar(path: Path, pictures: np.ndarray) -> None:
    with tarfile.open(path, "w") as file:
        for index, pixels in enumerate(pictures):
            for name, data in ((f"{index}.png", _encoded(pixels)), (f"{index}.txt", b"red"), (f"{index}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


def _write_idx(folder: Path, pictures: np.ndarray) -> None:
    folder.mkdir()
    for part in ("train", "t10k"):
        images = struct.pack(">4i", 2051, *pictures.shape) + pictures.tobytes()
        labels = struct.pack(">2i", 2049, len(pictures)) + bytes(index % 10 for index in range(len(pictures)))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
