"""Step caches: policies that decide at which steps the blocks are computed."""
