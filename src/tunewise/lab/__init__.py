"""Trying it: trials in processes of their own, the studies that ask them questions, and what was found."""
