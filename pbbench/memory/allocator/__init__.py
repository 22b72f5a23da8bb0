"""torch's CUDA caching allocator, replayed: allocations and frees in order → allocated and reserved bytes. No torch."""

from pbbench.memory.allocator.caching import AllocatorOutOfMemory, CachingAllocator, Replay, replay
from pbbench.memory.allocator.settings import AllocatorSettings

__all__ = ["AllocatorOutOfMemory", "AllocatorSettings", "CachingAllocator", "Replay", "replay"]
