"""What tensors are alive while code runs: live bytes by category and module, over time, as torch's viewer shows them."""
