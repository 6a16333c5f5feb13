"""What people see: the terminal, experiment trackers."""
