"""Calibration of step schedules: which denoising steps need not be computed, from full runs."""
