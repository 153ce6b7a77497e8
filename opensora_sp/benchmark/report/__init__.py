"""The benchmark's report: JSON, an HTML page, a table, and comparisons of reports."""
