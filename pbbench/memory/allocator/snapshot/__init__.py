"""What torch's CUDA allocator did during a step, recorded on a GPU and replayed anywhere, compared to the byte.

    recording = snapshot.record(lambda: train_step(batch))     # on a machine with a GPU
    snapshot.save(recording, path)
    print(snapshot.compare(snapshot.load(path)).report())      # anywhere

The replay is given what the step asked for (and, because a replay cannot know them, where the driver put segments and when
the cache was given back); where every block lies, what is allocated and reserved, it must find out itself.
Recordings are JSON. The pickles that ``torch.cuda.memory._dump_snapshot`` writes are not read: a pickle can run code.
"""

from pbbench.memory.allocator.snapshot.comparison import Comparison, compare
from pbbench.memory.allocator.snapshot.recording import STATISTICS, Recording, load, record, save
from pbbench.memory.allocator.snapshot.torch_dicts import TraceEvent, events_of, segments_of

__all__ = [
    "STATISTICS",
    "Comparison",
    "Recording",
    "TraceEvent",
    "compare",
    "events_of",
    "load",
    "record",
    "save",
    "segments_of",
]
