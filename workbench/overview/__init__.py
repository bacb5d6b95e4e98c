"""What a runs folder holds and what its models differ in, from stored files alone: torch is not imported here.

The dashboard and the report show these numbers; they compute none themselves.
"""
