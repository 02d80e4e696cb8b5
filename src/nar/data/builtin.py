"""Pictures that have a name: drawn shapes, and Fashion-MNIST from its idx files.

Knows where these come from; does not know other sources. Dimensions: N pictures, size x size pixels.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from nar.data.source import Pictures, Source
from nar.media.crops import centre_crop

FASHION_MNIST = "fashion-mnist"
_NAMES = "t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"
FASHION_MNIST_CLASSES = tuple(_NAMES.split(", "))
TOY = "toy"
TOY_CLASSES = ("circle", "square", "triangle", "cross")
_MOST_PACKED = 1100  # times: no gzip file holds more
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist


def draw_toy(size: int, split: str) -> Pictures:
    """Coloured shapes of four classes at random places and sizes: always the same ones."""
    count = 2048 if split == "train" else 256
    rng = np.random.default_rng((size, count))
    labels = rng.integers(0, len(TOY_CLASSES), count)
    centres, radii = rng.uniform(0.35, 0.65, (2, count, 1, 1)), rng.uniform(0.2, 0.35, (count, 1, 1))
    ground, colour = rng.uniform(160, 255, (count, 1, 1, 3)), rng.uniform(0, 130, (count, 1, 1, 3))
    places = (np.arange(size) + 0.5) / size
    x, y = (places[None, None, :] - centres[0]) / radii, (places[None, :, None] - centres[1]) / radii
    shapes = [
        x**2 + y**2 < 1,
        np.maximum(abs(x), abs(y)) < 0.85,
        (y < 0.8) & (abs(x) < (y + 1) / 1.9),
        (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
    ]
    inside = np.choose(labels[:, None, None], [np.broadcast_to(shape, (count, size, size)) for shape in shapes])
    images = np.where(inside[..., None], colour, ground).round().astype(np.uint8)
    return Pictures(images, labels.astype(np.int64), TOY_CLASSES)


def find_fashion_mnist() -> Path:
    """The folder of Fashion-MNIST: in $NAR_DATA, or where the Debian package puts it."""
    places = [DEBIAN_FOLDER]
    if data := os.environ.get("NAR_DATA"):
        places.insert(0, Path(data).expanduser() / FASHION_MNIST)
    if found := next((place for place in places if place.is_dir()), None):
        return found
    raise FileNotFoundError(
        f"Fashion-MNIST is not in {' or '.join(map(str, places))}; install the Debian package "
        "`dataset-fashion-mnist` (apt-get install dataset-fashion-mnist), or give the folder that holds "
        "train-images-idx3-ubyte.gz and its three companions"
    )


def idx_file(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder, compressed or not; None where there is neither."""
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def read_idx(folder: Path, split: str, size: int) -> Pictures:
    """Read the pictures and labels of one split, padded with zeros to `size`, or cropped to it."""
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx_array(folder, f"{prefix}-images-idx3-ubyte", axes=3)
    labels = _read_idx_array(folder, f"{prefix}-labels-idx1-ubyte", axes=1).astype(np.int64)
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {prefix} pictures but {len(labels)} labels; copy it again")
    if len(labels) and labels.max() >= len(FASHION_MNIST_CLASSES):
        raise ValueError(f"{folder} has label {labels.max()}; Fashion-MNIST has {len(FASHION_MNIST_CLASSES)} classes")
    height, width = images.shape[1:]
    if size >= max(height, width):
        top, left = (size - height) // 2, (size - width) // 2
        grey = np.pad(images, ((0, 0), (top, size - height - top), (left, size - width - left)))
    else:
        grey = np.stack([np.asarray(centre_crop(Image.fromarray(image), size)) for image in images])
    return Pictures(np.repeat(grey[..., None], 3, axis=-1), labels, FASHION_MNIST_CLASSES)


def _read_idx_array(folder: Path, name: str, axes: int) -> np.ndarray:
    """Read an idx file: two zero bytes, type 8 (uint8), the number of axes, one big-endian int32 per axis, the data."""
    path = idx_file(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder} lacks {name}.gz; Fashion-MNIST is four files, copy them all")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes([0, 0, 8, axes]):
                raise ValueError(f"{path} is not an idx file of uint8 with {axes} axes; copy it again")
            shape = tuple(np.frombuffer(head, ">u4", offset=4).tolist())
            most = path.stat().st_size * _MOST_PACKED
            data = file.read(min(math.prod(shape), most) + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    if len(data) != math.prod(shape):
        raise ValueError(f"{path} has {len(data)} bytes for shape {shape}; it is truncated, copy it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def of_arrays(pictures: Pictures) -> Source:
    """Pictures in memory as a source."""
    names = [f"picture {index}" for index in range(len(pictures))]
    return Source(names, pictures.labels, pictures.class_names, lambda index: Image.fromarray(pictures.images[index]))
