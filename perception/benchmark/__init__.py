"""Measurements of speed and memory that one command makes: what runs, how long it takes, what it costs in accuracy."""
