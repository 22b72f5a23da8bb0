"""Image file ↔ x_start: where image files lie, how they become pixels, and in which order training sees them."""
