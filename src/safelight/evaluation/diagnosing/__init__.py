"""What is wrong with a guard: failure signatures with their figures."""
