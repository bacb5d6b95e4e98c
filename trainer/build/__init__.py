"""The models that are trained: toy and assembled LLaVA, and what is added to a model or frozen in it."""
