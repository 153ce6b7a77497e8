"""Quality: how far outputs are from those of a reference run."""
