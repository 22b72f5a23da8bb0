"""Two runs side by side: what became of memory, speed and quality, what is not comparable, and the gate's rule."""
