"""A whole run: open it, work through its outputs, write, record, resume."""
