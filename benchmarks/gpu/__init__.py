"""The stages of `gpu_check.py`: what runs in worker processes, and what keeps their record."""
