"""Model, data and features of a run: one setup for packed questions and one for conversations."""
