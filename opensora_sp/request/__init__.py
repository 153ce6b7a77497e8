"""What is asked for: request, settings, flags, checks. Imports no torch."""
