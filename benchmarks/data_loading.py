"""How many images a second the training loader hands out: files decoded as they are used, against the same set prepared.

    taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/data_loading.py [--num-images 384] [--out results/data]

Built-in scenes are saved in a temporary folder as the sites of data sets give theirs (JPEG or WebP, 256 pixels on the shorter
side or CelebA's 178 × 218), prepared at 128 × 128, and read by ``training_loader`` in batches of 32 with flips, in one process
(``data.num_workers`` 0) and as a set too large for memory. Raw and prepared take turns; files are in the system's cache, so
this is the processor's work, not the disk's. **Only ratios mean something.** Writes loading.json and loading.md.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import results_folder
from pbbench.records import environment

SIZE = (128, 128)
BATCH = 32
ROUNDS = 3
SECONDS = 0.5  # at least, of each round
SOURCES = {
    "folder, JPEG 256 × 256": ("folder", "JPEG", (256, 256)),
    "zip, JPEG 256 × 256": ("zip", "JPEG", (256, 256)),
    "LSUN's LMDB, WebP 256 × 341": ("lmdb", "WEBP", (256, 341)),
    "CelebA's folder, JPEG 178 × 218": ("folder", "JPEG", (218, 178)),
}


def save(path: Path, container: str, kind: str, size: tuple[int, int], num_images: int) -> None:
    """``num_images`` scenes at ``size`` (H, W) as one of the containers that data sets come in."""
    import lmdb
    from PIL import Image

    from pbbench.data.synthetic import scene

    def encoded(number: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(scene(0, number, size)).save(file, kind, quality=90)
        return file.getvalue()

    if container == "lmdb":
        with lmdb.open(str(path), map_size=2**32) as opened, opened.begin(write=True) as transaction:
            for number in range(num_images):
                transaction.put(f"{number:040x}".encode(), encoded(number))
    elif container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(num_images):
                archive.writestr(f"images/{number:06d}.jpg", encoded(number))
    else:
        path.mkdir()
        for number in range(num_images):
            (path / f"{number:06d}.jpg").write_bytes(encoded(number))


def images_per_second(path: Path, num_images: int) -> float:
    """An epoch of the training loader, or as many as fill a moment, after a first batch that opens files and fills caches."""
    from pbbench.data.images import open_images
    from pbbench.data.loader import training_loader
    from pbbench.experiment.experiment import parse_experiment

    settings = {"model": {"image_size": SIZE[0]}, "training": {"batch_size": BATCH}, "data": {"num_workers": 0}}
    loader = training_loader(open_images(str(path), SIZE, memory_limit_bytes=0), parse_experiment(settings, "benchmark"))
    next(loader)
    batches = max(1, num_images // BATCH)
    started, seen = time.perf_counter(), 0
    while not seen or time.perf_counter() - started < SECONDS:
        seen += sum(len(batch) for batch in islice(loader, batches))
    return seen / (time.perf_counter() - started)


def measure(name: str, folder: Path, num_images: int) -> dict[str, Any]:
    from pbbench.data.prepare import prepare

    container, kind, size = SOURCES[name]
    raw, packed = folder / f"raw.{container}", folder / "packed"
    save(raw, container, kind, size, num_images)
    started = time.perf_counter()
    prepare(str(raw), packed, SIZE, threads=1)
    preparing = num_images / (time.perf_counter() - started)
    rounds = [{path: images_per_second(path, num_images) for path in (raw, packed)} for _ in range(ROUNDS)]
    speeds = {path: statistics.median(one[path] for one in rounds) for path in (raw, packed)}
    ratios = [one[packed] / one[raw] for one in rounds]
    return {
        "source": name,
        "images_per_second_decoded": speeds[raw],
        "images_per_second_prepared": speeds[packed],
        "ratio": statistics.median(ratios),
        "ratio_of_each_round": ratios,
        "images_per_second_preparing": preparing,
    }


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Loading images: decoded as they are used, and prepared",
        "",
        f"Images a second out of the training loader at {SIZE[0]} × {SIZE[1]}, batch {BATCH}, one process pinned to "
        f"{report['cores']} core{'s' if report['cores'] > 1 else ''},",
        f"{report['num_images']} scenes, files in the system's cache; median of {ROUNDS} rounds in turn. Made by "
        "`python benchmarks/data_loading.py`.",
        "",
        "| source | decoded as used | prepared | prepared ÷ decoded | rounds | preparing once |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for row in report["rows"]:
        rounds = ", ".join(f"{ratio:.0f}" for ratio in row["ratio_of_each_round"])
        lines.append(
            f"| {row['source']} | {row['images_per_second_decoded']:,.0f} | {row['images_per_second_prepared']:,.0f} "
            f"| **{row['ratio']:.0f}** | {rounds} | {row['images_per_second_preparing']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = results_folder.parser(__doc__, "results/data")
    parser.add_argument("--num-images", type=int, default=384)
    options = parser.parse_args(words)
    rows = []
    for name in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder), options.num_images))
    report = {"num_images": options.num_images, "cores": len(os.sched_getaffinity(0)), "rows": rows}
    results_folder.publish(options.out, "loading", report, markdown(report), environment.probe("cpu"))
    print(markdown(report))


if __name__ == "__main__":
    main()
