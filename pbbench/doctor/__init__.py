"""What this machine can measure, what it cannot, and why."""
