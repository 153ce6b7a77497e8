"""What a request needs, worked out before anything is loaded. Nothing here imports torch."""
