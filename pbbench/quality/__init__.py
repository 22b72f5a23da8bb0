"""From images to features to distances, seam score and held-out loss: how good samples are, under names they deserve."""
