"""What was measured, as JSON for machines, a page and a table for people, and comparisons."""
