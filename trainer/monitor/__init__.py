"""What is measured and checked while a model trains: CKNNA, progress, warnings, errors that stop the run."""
