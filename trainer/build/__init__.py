"""The models that a run trains: a toy LLaVA, an assembled LLaVA, and what is added to either or frozen in it."""
