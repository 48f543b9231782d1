"""Benchmarks of speed, memory and accuracy in one command."""
