"""What is good: rules, judges with their rubrics, and the hybrid sum."""
