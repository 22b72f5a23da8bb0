"""What a step would take on a GPU that is not there: the step on fake tensors, repeated on the replayed allocator."""
