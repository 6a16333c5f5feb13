"""What is done when the gate refuses a tuned model: cures, in the order of their cost, within what is left."""
