"""Measurement of a whole machine in minutes: `python -m scripts.gpu_day`, or scripts/gpu_day.sh."""
