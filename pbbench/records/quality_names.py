"""What the quality figures are called where people read them: a distance carries the number of images it was taken from, as in
FID-10k, because it means nothing without; and only what is FID is called FID.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

# Column → header lines.
QUALITY_HEADERS = {
    "frechet_inception_distance": ("FID",),
    "few_images_inception_frechet_distance": ("Fréchet", "too few", "images"),
    "unverified_inception_frechet_distance": ("Fréchet", "unverified", "Inception"),
    "random_features_frechet_distance": ("Fréchet", "random", "features"),
    "patch_frechet_inception_distance": ("patch FID",),
    "few_images_inception_patch_frechet_distance": ("patch Fréchet", "too few", "images"),
    "unverified_inception_patch_frechet_distance": ("patch Fréchet", "unverified", "Inception"),
    "random_features_patch_frechet_distance": ("patch Fréchet", "random", "features"),
    "kernel_inception_distance_mean": ("KID",),
    "unverified_inception_kernel_distance_mean": ("kernel", "unverified", "Inception"),
    "random_features_kernel_distance_mean": ("kernel", "random", "features"),
    "precision": ("preci-", "sion"),
    "recall": ("recall",),
    "unverified_inception_precision": ("precision", "unverified", "Inception"),
    "unverified_inception_recall": ("recall", "unverified", "Inception"),
    "random_features_precision": ("precision", "random", "features"),
    "random_features_recall": ("recall", "random", "features"),
    "seam_score": ("seam", "score"),
    "seam_excess": ("seam", "excess"),
    "held_out_loss": ("held-out", "loss"),
    "num_images": ("images", "scored"),
    "images_seen": ("images", "trained on"),
}
# Column → (the distance, what it is instead of the published one).
DISTANCE_WORDS = {
    "frechet_inception_distance": ("FID", ""),
    "few_images_inception_frechet_distance": ("Fréchet distance", "too few images (not FID)"),
    "unverified_inception_frechet_distance": ("Fréchet distance", "unverified Inception weights (not FID)"),
    "random_features_frechet_distance": ("Fréchet distance", "random features (not FID)"),
    "patch_frechet_inception_distance": ("patch FID", ""),
    "few_images_inception_patch_frechet_distance": ("patch Fréchet distance", "too few images (not FID)"),
    "unverified_inception_patch_frechet_distance": ("patch Fréchet distance", "unverified Inception weights (not FID)"),
    "random_features_patch_frechet_distance": ("patch Fréchet distance", "random features (not FID)"),
    "kernel_inception_distance_mean": ("KID", ""),
    "unverified_inception_kernel_distance_mean": ("kernel distance", "unverified Inception weights (not KID)"),
    "random_features_kernel_distance_mean": ("kernel distance", "random features (not KID)"),
}


def quality_header(name: str, num_images: Iterable[float | None] = ()) -> tuple[str, ...]:
    """The lines over a column; of a distance the first with the number of images, all that occur."""
    first, *rest = QUALITY_HEADERS[name]
    if name not in DISTANCE_WORDS:
        return (first, *rest)
    return (first + tag(num_images) + ("," if rest else ""), *rest)


def quality_label(name: str, num_images: Iterable[float | None] = ()) -> str:
    """The figure in words, for axes, captions and terminals."""
    if name not in DISTANCE_WORDS:
        return "held-out denoising loss" if name == "held_out_loss" else name.replace("_", " ")
    distance, instead = DISTANCE_WORDS[name]
    if not instead:
        return distance + tag(num_images)
    counts = "/".join(f"{n:,}" for n in _counts(num_images))
    return f"{distance}{f' of {counts} images' if counts else ''}, {instead}"


def tag(num_images: Iterable[float | None]) -> str:
    """-10k, or (1,536) where they are no whole thousands; empty where the number is not known."""
    counts = _counts(num_images)
    if counts and all(n % 1000 == 0 for n in counts):
        return "-" + "/".join(f"{n // 1000:,}k" for n in counts)
    return f" ({'/'.join(f'{n:,}' for n in counts)})" if counts else ""


def _counts(num_images: Iterable[float | None]) -> list[int]:
    return sorted({int(n) for n in num_images if n is not None and not math.isnan(n)})
