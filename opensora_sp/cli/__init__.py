"""The commands: parse, check, run, end."""
