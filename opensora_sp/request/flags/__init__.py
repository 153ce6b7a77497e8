"""Every flag, its type, its rules and its documentation."""
