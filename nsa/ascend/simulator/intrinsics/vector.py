"""The vector core: memory to UB and back, and what the vector unit computes."""
