"""What app.py shows. Reads below the runs folder only; numbers are computed in `workbench` and `analyses`, never
here."""
