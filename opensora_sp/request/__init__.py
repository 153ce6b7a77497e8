"""What a run is asked to do: request, settings, flags, checks. Imports no torch."""
