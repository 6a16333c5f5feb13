"""Published tables that add one method after another, as rows that can be run."""
