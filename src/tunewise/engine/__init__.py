"""One step, three ways to run it: dry, measured, trained."""
