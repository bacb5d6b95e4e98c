"""What a recipe would train, found out without training."""
