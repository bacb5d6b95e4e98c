"""Answers to questions with options while the visual tokens are changed on their way: what every intervention is scored
by.

An answer is scored at the last position of the prompt, by the log-probability of each option's first token among the
options. Where options of one question begin with the same token that is no answer, and the question is refused.
"""
