"""What hardware and allocator say of a phase: torch.cuda, NVML, resident memory, the ledger that closes between them."""
