"""Memory meters for anyone's PyTorch code; nothing here knows of patches, models or sweeps.

``tensors.trace`` counts live tensor bytes while a step runs and says what filled the peak; ``predict.predict`` does the same
on fake tensors; ``meter.Meter`` reads torch's CUDA allocator, NVML and the process's resident memory around a block of code.
``allocator.replay`` turns allocations and frees into what torch's caching allocator would reserve for them; ``snapshot`` holds
that against a trace recorded on a GPU.
"""
