"""Training with MMEngine; the only package that imports it. Import from its modules: each loads what it needs."""
