"""What it runs on: the machine as a value, the catalogue, the probe, and the rules of shapes."""
