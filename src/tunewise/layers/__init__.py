"""torch functions and modules that methods put in place; they know nothing of recipes."""
