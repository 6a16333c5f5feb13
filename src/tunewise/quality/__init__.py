"""Is the result good? What fine-tuning breaks, measured before and after, and a gate that refuses a broken model."""
