"""A warm server: models loaded once, jobs that survive a crash, an HTTP API and a page."""
