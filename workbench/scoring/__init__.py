"""Answers to questions with options, before and after an intervention on the visual tokens.

An answer is scored at the last position of the prompt: the log-probabilities of the options' first tokens, normalized
over the options of the question. Options of one question that begin with the same token cannot be scored in this way,
so such a question is an error.
"""
