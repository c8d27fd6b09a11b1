"""Starting ranks: launchers, processes on one machine, signals, placement, the roll call."""
