"""Pictures and videos: references are read here, and finished outputs are written."""
