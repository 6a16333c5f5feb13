"""What is learnt: the model, the records, their tokens, and how these lie in batches."""
