"""Answers to questions with options, before and after an intervention on the visual tokens.

An option is scored by the log-probability of all its tokens after the prompt, normalized over the options of the
question; or the model generates an answer, which workbench/benchmarks/ scores.
"""
