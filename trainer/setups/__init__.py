"""What a run needs before its first step, for packed questions and for conversations."""
