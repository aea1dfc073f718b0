"""What it learns from: prompt sets, their synthesis, the built-in pictures."""
