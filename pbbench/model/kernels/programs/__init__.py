"""The operators' Triton kernels. Imported where one is to run, so that the package works without Triton.

They have run in Triton's interpreter and compile for Hopper; on a GPU they have not run yet.

A map is a pointer and the steps from one row, channel and pixel to the next (``Lies``), so any layout is read as it lies: for a
step that is 1 Triton compiles a version of its own, which knows what is contiguous. Names in capitals are sizes of tiles.
"""
