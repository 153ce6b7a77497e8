"""Everything that knows there is more than one rank: groups, collectives, layout, watchdog."""
