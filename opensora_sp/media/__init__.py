"""References in, videos and pictures out."""
